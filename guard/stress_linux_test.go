package guard

import (
	"flag"
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

var stressProgram = flag.String("stress", "", "`path` of the program of make stress, which is run under a guard for as long as the race")

// Under a guard the library keeps its promises in a crowd of neighbours, some of
// them killed, and in the end nothing is reserved.
func TestStressUnderAGuard(t *testing.T) {
	if *stressProgram == "" {
		t.Skip("needs the program of make stress (flag -stress, as make guard has it)")
	}
	for _, test := range []struct {
		name    string
		options Options
	}{
		{"that denies", Options{}},
		{"that shares ports", Options{Share: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := attach(t, test.options)
			cmd := exec.Command(*stressProgram, "-duration", raceTime.String())
			// It sets sysctls.
			cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("%v: %s", err, out)
			}
			s := mustStats(t, g)
			t.Logf("%+v", s)
			if s.Allowed == 0 || s.FailedOpen != 0 || s.Overlapping != 0 {
				t.Errorf("%+v", s)
			}
			if reservations, err := g.Reservations(); err != nil || len(reservations) != 0 {
				t.Errorf("in the end there are reservations: %v, %v", reservations, err)
			}
		})
	}
}
