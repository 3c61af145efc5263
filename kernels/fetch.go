//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// suites are the releases of Debian that have the kernels.
var suites = map[string]string{"6.1": "bookworm", "6.12": "trixie"}

// metapackage depends on the kernel that is current. It is the flavour for
// virtual machines: the same source and, as for the network, the same modules in a
// quarter of the size.
const metapackage = "linux-image-cloud-amd64"

const (
	keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	archive = "http://deb.debian.org/debian"
)

// A kernel is an unpacked package of one.
type kernel struct {
	version string // as on the command line
	dir     string
}

// needs are the programs and files that have to be there, and the Debian package
// that has each.
var needs = []struct {
	file, pkg string
	fetch     bool // only to fetch a kernel
}{
	{"qemu-system-x86_64", "qemu-system-x86", false},
	{"apt-get", "apt", true},
	{"dpkg-deb", "dpkg", true},
	{keyring, "debian-archive-keyring", true},
}

// checkNeeds says what is missing to run these kernels.
func checkNeeds(versions []string, cache string) error {
	if len(versions) == 0 {
		return nil
	}
	fetches := false
	for _, v := range versions {
		if _, err := cached(v, cache); err != nil {
			fetches = true
		}
	}
	var missing []error
	for _, n := range needs {
		if n.fetch && !fetches {
			continue
		}
		_, err := exec.LookPath(n.file)
		if filepath.IsAbs(n.file) {
			_, err = os.Stat(n.file)
		}
		if err != nil {
			missing = append(missing, fmt.Errorf("needs %s: apt-get install --no-install-recommends %s", n.file, n.pkg))
		}
	}
	return errors.Join(missing...)
}

// cached returns the kernel of the cache.
func cached(version, cache string) (*kernel, error) {
	images, err := filepath.Glob(filepath.Join(cache, version, "boot", "vmlinuz-*"))
	if err != nil {
		return nil, err
	}
	if len(images) != 1 {
		return nil, fmt.Errorf("%d kernels in %s", len(images), filepath.Join(cache, version))
	}
	return &kernel{version: version, dir: filepath.Join(cache, version)}, nil
}

// release is the name that the kernel has for itself.
func (k *kernel) release() string { return strings.TrimPrefix(filepath.Base(k.image()), "vmlinuz-") }

// image is the file that is booted.
func (k *kernel) image() string {
	images, _ := filepath.Glob(filepath.Join(k.dir, "boot", "vmlinuz-*"))
	return images[0]
}

// fetch returns a kernel, from the cache or else from Debian. apt checks that it
// is signed; what it knows of this machine it is not told, and nothing is
// installed.
func fetch(ctx context.Context, version, cache string, progress io.Writer) (*kernel, error) {
	if k, err := cached(version, cache); err == nil {
		return k, nil
	}
	fmt.Fprintf(progress, "fetching Linux %s from Debian %s\n", version, suites[version])
	cache, err := filepath.Abs(cache)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp(cache, version+".")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	a := apt{dir}
	if err := a.configure(suites[version]); err != nil {
		return nil, err
	}
	if _, err := a.run(ctx, "apt-get", "update"); err != nil {
		return nil, err
	}
	depends, err := a.run(ctx, "apt-cache", "depends", metapackage)
	if err != nil {
		return nil, err
	}
	pkg, err := imagePackage(depends)
	if err != nil {
		return nil, err
	}
	if _, err := a.run(ctx, "apt-get", "download", pkg); err != nil {
		return nil, err
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.deb"))
	if err != nil || len(files) != 1 {
		return nil, fmt.Errorf("apt-get download %s: %d files, %v", pkg, len(files), err)
	}
	tree := filepath.Join(dir, "tree")
	if _, err := a.run(ctx, "dpkg-deb", "--extract", files[0], tree); err != nil {
		return nil, err
	}
	if err := os.Rename(tree, filepath.Join(cache, version)); err != nil {
		return nil, err
	}
	return cached(version, cache)
}

var dependsOnImage = regexp.MustCompile(`(?m)^\s*Depends: (linux-image-\S+)$`)

// imagePackage finds the kernel in what apt-cache depends prints.
func imagePackage(depends []byte) (string, error) {
	found := dependsOnImage.FindSubmatch(depends)
	if found == nil {
		return "", fmt.Errorf("%s depends on no kernel: %q", metapackage, depends)
	}
	return string(found[1]), nil
}

// apt is one that has configuration, lists and cache in a directory of its own.
type apt struct{ dir string }

func (a apt) configure(suite string) error {
	for _, dir := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(a.dir, dir), 0o755); err != nil {
			return err
		}
	}
	sources := fmt.Sprintf("Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n", archive, suite, keyring)
	return os.WriteFile(filepath.Join(a.dir, "debian.sources"), []byte(sources), 0o644)
}

// run runs a program of apt's, and returns its output.
func (a apt) run(ctx context.Context, name string, args ...string) ([]byte, error) {
	if name != "dpkg-deb" {
		for _, option := range []string{
			"Dir::Etc::sourcelist=" + filepath.Join(a.dir, "debian.sources"),
			"Dir::Etc::sourceparts=-",
			"Dir::State=" + filepath.Join(a.dir, "state"),
			"Dir::State::status=/dev/null",
			"Dir::Cache=" + filepath.Join(a.dir, "cache"),
			"APT::Architecture=amd64",
			"APT::Architectures=amd64",
			"APT::Sandbox::User=", // the directory may be closed to another user
			"Acquire::Languages=none",
			"Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
		} {
			args = append(args, "-o", option)
		}
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = a.dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", name, args[0], err, stderr.Bytes())
	}
	return out, nil
}
