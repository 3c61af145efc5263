//go:build linux

package main

import (
	"cmp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

// A binary is a test binary that is built and put into the machines.
type binary struct {
	name string // of the file, and in the table
	pkg  string // relative to the library; may be that of a nested module
	arch string // GOARCH
	cgo  bool
	data []string // what the tests read, relative to the package
}

// packages are what is tested. Those of cmd are not: their tests build programs
// with the go command.
var packages = []binary{
	{name: "connectx", pkg: ".", data: []string{"testdata", "docs/faults.md", "docs/system-calls.md"}},
	{name: "lookup", pkg: "lookup", data: []string{"testdata"}},
	{name: "portpick", pkg: "portpick", data: []string{"testdata"}},
	{name: "internal/inuse", pkg: "internal/inuse"},
	{name: "internal/holders", pkg: "internal/holders"},
	{name: "internal/techniques", pkg: "internal/techniques"},
	{name: "internal/terminal", pkg: "internal/terminal"},
	{name: "model", pkg: "model"},
	{name: "guard", pkg: "guard"},
}

// Names of packages that the variants run.
var (
	every = []string{"connectx", "lookup", "portpick", "internal/inuse", "internal/holders", "internal/techniques", "internal/terminal", "model"}
	dials = []string{"connectx"}
	both  = []string{"connectx", "lookup"}
	guard = []string{"guard"}
)

// A variant is a way to run some of the packages.
type variant struct {
	name     string // empty for the ordinary one
	packages []string
	arch     string // GOARCH, amd64 if empty
	cgo      bool
	job      job.Job

	tests   string // only those that match this regexp
	running bool   // only on the running kernel
	boot    string // kernel parameters of a virtual machine of its own
}

const nobody = 65534

var variants = []variant{
	{packages: slices.Concat(every, guard)},
	{name: "unprivileged user", packages: both, job: job.Job{UID: nobody},
		tests: "TestEvery|TestPicked|TestSourceAddrs|TestPortRange|TestTechniques|TestUDPWhen|TestWithout|TestLook|TestSource"},
	{name: "IP_LOCAL_PORT_RANGE refused", packages: dials, job: job.Job{Refuse: []uint32{unix.IP_LOCAL_PORT_RANGE}}, running: true},
	{name: "IP_BIND_ADDRESS_NO_PORT refused", packages: dials, job: job.Job{Refuse: []uint32{unix.IP_BIND_ADDRESS_NO_PORT}}, running: true},
	{name: "linux/386", packages: every, arch: "386", running: true},
	{name: "CGO_ENABLED=1", packages: both, cgo: true, running: true},
	{name: "ipv6.disable=1", packages: dials, tests: "TestWithoutIPv6", boot: "ipv6.disable=1"},
}

// modules are what the tests make use of and Debian does not have in the kernel
// itself. Others can be added: those that they depend on come by themselves.
var modules = []string{"inet_diag", "tcp_diag", "udp_diag", "raw_diag", "veth", "dummy", "bridge", "vrf", "macvlan", "tun",
	"xfrm_user", "nfnetlink", // a netlink.Handle has sockets of both
}

// console is what the report needs.
var console = []string{"virtio_pci", "virtio_console"}

// A task is a job as the table has it.
type task struct {
	row     string
	variant string
	binary  binary
	job     job.Job
	leftOut []leftOut
	some    bool // only the tests that the command line asks for, perhaps none
}

// A leftOut is a test that is not run somewhere.
type leftOut struct {
	pkg, variant string // all of them if empty
	slow         bool   // only where the processor is emulated
	tests        string // as in -test.skip, where of TestA/part|TestAB the first is what counts for TestAB: ^TestA$/part
	reason       string
}

// applies reports whether the test is not run there.
func (l *leftOut) applies(pkg, variant string, slow bool) bool {
	return (l.pkg == "" || l.pkg == pkg) && (l.variant == "" || l.variant == variant) && (!l.slow || slow)
}

// tasks are what is run on a kernel, in a machine with these kernel parameters.
func tasks(kernel string, slow bool, boot, tests string) (all []task) {
	guest := kernel != running
	for _, v := range variants {
		if v.boot != boot || v.running && guest {
			continue
		}
		for _, p := range packages {
			if !slices.Contains(v.packages, p.name) {
				continue
			}
			p.arch, p.cgo = cmp.Or(v.arch, "amd64"), v.cgo
			t := task{row: p.name, variant: v.name, binary: p, job: v.job, some: tests != ""}
			if v.name != "" {
				t.row += ", " + v.name
			}
			var skip []string
			for _, l := range leftOuts {
				if l.applies(p.name, v.name, slow) {
					t.leftOut = append(t.leftOut, l)
					skip = append(skip, l.tests)
				}
			}
			t.job.Binary, t.job.Dir = p.file(), "src/"+p.pkg
			t.job.Seconds = 600
			if slow {
				t.job.Seconds = 3600
			}
			t.job.Args = []string{"-test.v=test2json", "-test.timeout=0"}
			if len(skip) > 0 {
				t.job.Args = append(t.job.Args, "-test.skip="+strings.Join(skip, "|"))
			}
			if only := cmp.Or(v.tests, tests); only != "" {
				t.job.Args = append(t.job.Args, "-test.run="+only)
			}
			all = append(all, t)
		}
	}
	return all
}

// boots are the kernel parameters with which a virtual machine is booted.
func boots() (parameters []string) {
	for _, v := range variants {
		if !slices.Contains(parameters, v.boot) {
			parameters = append(parameters, v.boot)
		}
	}
	return parameters
}

// file is the name of the binary in the tree.
func (b *binary) file() string {
	name := "tests/" + strings.ReplaceAll(b.name, "/", "-") + "." + b.arch
	if b.cgo {
		name += ".cgo"
	}
	return name
}
