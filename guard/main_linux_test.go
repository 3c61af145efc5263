package guard

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/netns"
)

// group is the cgroup that the tests run in, and outside the one they come from.
// refused is why there are none.
var (
	group, outside string
	refused        error
)

func TestMain(m *testing.M) {
	if play := roles[os.Getenv(roleEnv)]; play != nil {
		if err := play(os.Args[1:]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(netns.Main(func() int {
		leave, err := enterCgroup()
		refused = err
		defer leave()
		return m.Run()
	}))
}

// enterCgroup mounts a cgroup v2 file system, and moves the process to a cgroup
// of its own.
func enterCgroup() (leave func(), err error) {
	leave = func() {}
	mount, err := os.MkdirTemp("", "guard")
	if err != nil {
		return leave, err
	}
	leave = func() { os.Remove(mount) }
	if err := unix.Mount("none", mount, "cgroup2", 0, ""); err != nil {
		return leave, os.NewSyscallError("mount cgroup2", err)
	}
	group = filepath.Join(mount, "guard-test-"+strconv.Itoa(os.Getpid()))
	outside = group + "-outside"
	leave = func() {
		_ = joinCgroup(mount, os.Getpid())
		// The kernel lets go of processes that have ended a moment later.
		for _, g := range []string{group, outside} {
			for try := 0; os.Remove(g) != nil && try < 100; try++ {
				time.Sleep(10 * time.Millisecond)
			}
		}
		_ = unix.Unmount(mount, 0)
		os.Remove(mount)
	}
	for _, g := range []string{group, outside} {
		if err := os.Mkdir(g, 0o755); err != nil {
			return leave, err
		}
	}
	return leave, joinCgroup(group, os.Getpid())
}

func joinCgroup(path string, pid int) error {
	return os.WriteFile(filepath.Join(path, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

// attach starts a guard over this process, or skips the test where that is not
// permitted.
func attach(t testing.TB, o Options) *Guard {
	t.Helper()
	needCgroup(t)
	g, err := Attach(group, o)
	if err != nil {
		if missing := missingCapabilities(); len(missing) > 0 {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

func needCgroup(t testing.TB) {
	t.Helper()
	netns.Need(t)
	if refused != nil {
		t.Skipf("needs a cgroup v2: %v", refused)
	}
}

// roleEnv makes this program something else than a test.
const roleEnv = "CONNECTX_GUARD_ROLE"

var roles = map[string]func(args []string) error{}

// roleCommand is a process of the test, in the same cgroup.
func roleCommand(t testing.TB, role string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	cmd.Stderr = os.Stderr
	return cmd
}
