package guard

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func init() {
	roles["connect"] = playConnect
	roles["attach"] = playAttach
}

// playConnect connects a socket, and keeps it: from its first argument to the
// second.
func playConnect(args []string) error {
	if _, err := connectShared(args[0], args[1]); err != nil {
		return err
	}
	return keep()
}

// connectShared connects a socket that shares its port. The caller closes it, also
// if there is an error.
func connectShared(local, remote string) (fd int, err error) {
	s := &socket{family: v4}
	if s.fd, err = unix.Socket(v4, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err != nil {
		return s.fd, err
	}
	if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return s.fd, err
	}
	if err := unix.Bind(s.fd, s.address(local)); err != nil {
		return s.fd, err
	}
	return s.fd, s.connect(remote)
}

// playAttach attaches a guard to a cgroup, pinned in a folder, and keeps it.
func playAttach(args []string) error {
	if _, err := Attach(args[0], Options{Pin: args[1]}); err != nil {
		return err
	}
	return keep()
}

// keep says that all is done, and returns when the standard input ends.
func keep() error {
	fmt.Println("ready")
	_, _ = io.Copy(io.Discard, os.Stdin)
	return nil
}

// start returns when the process is ready. It ends with the test, or when stop is
// called.
func start(t testing.TB, cmd *exec.Cmd) (stop func()) {
	t.Helper()
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	t.Cleanup(stop)
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("%v: %q, %v", cmd.Args, line, err)
	}
	return stop
}

// outsideCgroup has the process started in another cgroup.
func outsideCgroup(t testing.TB, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	dir, err := os.Open(outside)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dir.Close() })
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	return cmd
}

func TestASocketOfAnotherCgroup(t *testing.T) {
	g := attach(t, Options{})
	stop := start(t, outsideCgroup(t, roleCommand(t, "connect", "127.0.0.1:5000", "127.0.0.9:7")))
	second := open(t, v4).bind("127.0.0.1:5000")
	second.mustFail("127.0.0.9:7", unix.EADDRINUSE)
	if reservations, err := g.Reservations(); err != nil || len(reservations) != 0 {
		t.Errorf("reservations %v, %v; want none", reservations, err)
	}
	stop()
	second.mustConnect("127.0.0.9:7")
}

func TestAProcessThatIsKilled(t *testing.T) {
	g := attach(t, Options{})
	stop := start(t, roleCommand(t, "connect", "127.0.0.1:5000", "127.0.0.9:7"))
	second := open(t, v4).bind("127.0.0.1:5000")
	second.mustFail("127.0.0.9:7", unix.EADDRINUSE)
	mustMatch(t, g)
	stop()
	second.mustConnect("127.0.0.9:7")
	mustMatch(t, g)
}

// A socket stays what it is when it is passed on.
func TestASocketThatOutlivesItsProcess(t *testing.T) {
	g := attach(t, Options{})
	first := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
	other := roleCommand(t, "hold")
	other.ExtraFiles = []*os.File{os.NewFile(uintptr(dup(t, first.fd)), "socket")}
	defer other.ExtraFiles[0].Close()
	stop := start(t, outsideCgroup(t, other))
	other.ExtraFiles[0].Close()
	first.close()
	second := open(t, v4).bind("127.0.0.1:5000")
	second.mustFail("127.0.0.9:7", unix.EADDRINUSE)
	mustMatch(t, g)
	stop()
	second.mustConnect("127.0.0.9:7")
	mustMatch(t, g)
}

func init() { roles["hold"] = func([]string) error { return keep() } }

func dup(t testing.TB, fd int) int {
	t.Helper()
	other, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return other
}

// bpffs mounts a BPF file system.
func bpffs(t testing.TB) string {
	t.Helper()
	needCgroup(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "bpf", 0, ""); err != nil {
		t.Skipf("needs a BPF file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestAPinnedGuardOutlivesItsProcess(t *testing.T) {
	pin := filepath.Join(bpffs(t), "guard")
	stop := start(t, roleCommand(t, "attach", group, pin))
	first := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
	second := open(t, v4).bind("127.0.0.1:5000")
	second.mustFail("127.0.0.9:7", unix.EADDRINUSE)
	stop()
	second.mustFail("127.0.0.9:7", unix.EADDRINUSE)

	if g, err := Attach(outside, Options{Pin: pin}); err == nil {
		g.Close()
		t.Fatal("taken over for another cgroup")
	}
	g := attach(t, Options{Pin: pin})
	second.mustFail("127.0.0.9:7", unix.EADDRINUSE)
	mustMatch(t, g)
	if got := mustStats(t, g); got.Denied != 3 {
		t.Errorf("denied %d, want 3: counted from the beginning", got.Denied)
	}
	first.close()
	second.mustConnect("127.0.0.9:7")
	mustMatch(t, g)

	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(pin); !os.IsNotExist(err) {
		t.Errorf("%s is there after Close: %v", pin, err)
	}
	open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
}

// The one who takes it over tells it when ports become few.
func TestAPinnedGuardThatShares(t *testing.T) {
	pin := filepath.Join(bpffs(t), "guard")
	attach(t, Options{Pin: pin, Share: true})
	g := attach(t, Options{Pin: pin})
	setPorts(t, g, 43000, 43009, "")
	for range 10 {
		openPlain(t, v4).mustConnect("127.0.0.9:7")
	}
	s := openPlain(t, v4)
	if err := unix.Bind(s.fd, s.address("127.0.0.1:0")); err != unix.EADDRINUSE {
		t.Errorf("bind before Sync: %v", err)
	}
	mustSync(t, g)
	s.bind("127.0.0.1:0").mustConnect("127.0.0.10:7")
	mustMatch(t, g)
}

// One that is pinned, and has not what this version needs, is left as it is.
func TestAPinnedGuardOfAnotherVersion(t *testing.T) {
	for _, missing := range []string{programsMapTaken, programsProgSync} {
		pin := filepath.Join(bpffs(t), "guard")
		g := attach(t, Options{Pin: pin})
		if err := os.Remove(g.pinned(missing)); err != nil {
			t.Fatal(err)
		}
		if other, err := Attach(group, Options{Pin: pin}); !errors.Is(err, errOtherVersion) {
			t.Errorf("without %s: %v, want %v", missing, err, errOtherVersion)
			if err == nil {
				other.Close()
			}
		}
		if _, err := os.Stat(g.pinned("connect4")); err != nil {
			t.Errorf("without %s: %v", missing, err)
		}
		first := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
		open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
		first.close()
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestAGuardThatWasKilledInAttach(t *testing.T) {
	pin := filepath.Join(bpffs(t), "guard")
	start(t, roleCommand(t, "attach", group, pin))()
	if err := os.Remove((&Guard{pin: pin}).pinned("connect6")); err != nil {
		t.Fatal(err)
	}
	g := attach(t, Options{Pin: pin})
	open(t, v6).bind("[::1]:5000").mustConnect("[::1]:7")
	open(t, v6).bind("[::1]:5000").mustFail("[::1]:7", unix.EADDRINUSE)
	if got := mustStats(t, g); got.Allowed != 1 || got.Denied != 1 {
		t.Errorf("%+v", got)
	}
}

// Of several at the same time, one attaches, and the others take that over.
func TestAttachesAtTheSameTimeMakeOneGuard(t *testing.T) {
	pin := filepath.Join(bpffs(t), "guard")
	for range 5 {
		var all sync.WaitGroup
		guards := make([]*Guard, 4)
		for i := range guards {
			all.Go(func() {
				var err error
				if guards[i], err = Attach(group, Options{Pin: pin, Share: true}); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if t.Failed() {
			return
		}
		s := open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
		for _, g := range guards {
			if got := mustStats(t, g); got.Allowed != 1 || !g.share {
				t.Errorf("allowed %d, shares: %v; of all guards that there are, want 1, true", got.Allowed, g.share)
			}
			mustMatch(t, g)
		}
		s.close()
		for _, g := range guards {
			all.Go(func() {
				if err := g.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if _, err := os.Stat(pin); !os.IsNotExist(err) {
			t.Errorf("%s is there after Close: %v", pin, err)
		}
	}
}

func TestAPinThatIsNoBPFFileSystemIsLeftAlone(t *testing.T) {
	needCgroup(t)
	pin := t.TempDir()
	file := filepath.Join(pin, programsMapPorts)
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	nowhere := filepath.Join(pin, "link")
	if err := os.Symlink("none", nowhere); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]error{
		pin:                          errNotBPF,
		nowhere:                      fs.ErrNotExist,
		file:                         unix.ENOTDIR,
		filepath.Join(file, "guard"): unix.ENOTDIR,
		filepath.Join(pin, "guard"):  errNotBPF,
	} {
		if g, err := Attach(group, Options{Pin: path}); err == nil {
			g.Close()
			t.Errorf("%s: no error", path)
		} else if !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", path, err, want)
		}
	}
	left, err := os.ReadDir(pin)
	if err != nil || len(left) != 2 {
		t.Errorf("left in the folder: %v, %v; want the file and the link", left, err)
	}
}

func TestAMountPointAsPin(t *testing.T) {
	pin := bpffs(t)
	if err := attach(t, Options{Pin: pin}).Close(); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(pin + "/connectx_*"); err != nil || len(left) > 0 {
		t.Errorf("%v, %v: pinned after Close", left, err)
	}
}

// It has been taken over, and the first one was closed: the pins are not its own.
func TestCloseLeavesThePinsOfALaterGuard(t *testing.T) {
	pin := filepath.Join(bpffs(t), "guard")
	first := attach(t, Options{Pin: pin})
	taken := attach(t, Options{Pin: pin})
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	start(t, roleCommand(t, "attach", group, pin))()
	for _, g := range []*Guard{first, taken} {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	open(t, v4).bind("127.0.0.1:5000").mustConnect("127.0.0.9:7")
	open(t, v4).bind("127.0.0.1:5000").mustFail("127.0.0.9:7", unix.EADDRINUSE)
	mustMatch(t, attach(t, Options{Pin: pin}))
}

// As when a service is stopped, and started again.
func TestACgroupThatIsRemoved(t *testing.T) {
	pin := filepath.Join(bpffs(t), "guard")
	cgroup := filepath.Join(group, "service")
	for i := range 3 {
		if err := os.Mkdir(cgroup, 0o755); err != nil {
			t.Fatal(err)
		}
		g, err := Attach(cgroup, Options{Pin: pin})
		if err != nil {
			t.Fatal(err)
		}
		mustSync(t, g)
		if err := os.Remove(cgroup); err != nil {
			t.Fatal(err)
		}
		if i == 0 { // else the kernel has not detached it when the next one comes
			eventually(t, "Sync has noticed", func() bool { return errors.Is(g.Sync(), ErrEnded) })
		}
		// The pins stay, as if it had been killed.
		if err := g.closeAll(); err != nil {
			t.Fatal(err)
		}
		if err := g.Sync(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Sync after the end: %v, want %v", err, os.ErrClosed)
		}
	}
}

func TestAttachSaysWhatIsMissing(t *testing.T) {
	needCgroup(t)
	for _, test := range []struct {
		name    string
		cgroup  string
		options Options
		want    string
	}{
		{"that there is no such cgroup", group + "/none", Options{}, "no such file or directory"},
		{"that it is no cgroup v2", "/", Options{}, ErrNotCgroup2.Error()},
		{"that it is no BPF file system", group, Options{Pin: filepath.Join(t.TempDir(), "guard")}, errNotBPF.Error()},
		{"that Max is too large", group, Options{Max: 1 << 30}, "option Max is 1073741824, not between"},
	} {
		t.Run(test.name, func(t *testing.T) {
			g, err := Attach(test.cgroup, test.options)
			if err == nil {
				g.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), test.want) {
				t.Errorf("%v, want %q", err, test.want)
			}
		})
	}
	t.Run("which privileges", func(t *testing.T) {
		exe, err := os.Open("/proc/self/exe")
		if err != nil {
			t.Fatal(err)
		}
		defer exe.Close()
		cmd := roleCommand(t, "try", group)
		cmd.Stderr = nil
		// It may be in a folder that only root can enter.
		cmd.Path, cmd.ExtraFiles = "/proc/self/fd/3", []*os.File{exe}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := cmd.CombinedOutput()
		if want := "needs root, or also CAP_BPF and CAP_PERFMON and CAP_NET_ADMIN"; !strings.Contains(string(out), want) {
			t.Errorf("%q, %v; want %q", out, err, want)
		}
	})
}

func init() {
	roles["try"] = func(args []string) error {
		g, err := Attach(args[0], Options{})
		if err == nil {
			g.Close()
		}
		return err
	}
}
