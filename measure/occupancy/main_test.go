//go:build linux

package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/seed22601231/connectx/internal/holders"
	"github.com/seed22601231/connectx/internal/netns"
	"github.com/seed22601231/connectx/internal/program"
)

func TestMain(m *testing.M) {
	holders.Main()
	os.Exit(netns.Main(m.Run))
}

// A quick sweep, from the measurement to the pictures.
func TestQuick(t *testing.T) {
	netns.Need(t)
	o := options{dir: t.TempDir()}
	var stderr strings.Builder
	if code := run([]string{"-quick", "-o", o.dir}, &stderr); code != program.OK {
		t.Fatalf("exit code %d: %s", code, &stderr)
	}
	for _, network := range networks {
		if line := network + ", random ports taken: 99.9 %\n"; !strings.Contains(stderr.String(), line) {
			t.Errorf("there is no line %q in\n%s", line, &stderr)
		}
		rows, err := readRows(o.file(network, "csv"))
		if err != nil {
			t.Fatal(err)
		}
		checkRows(t, network, rows)
		picture, err := os.ReadFile(o.file(network, "svg"))
		if err != nil {
			t.Fatal(err)
		}
		checkPicture(t, network, picture, rows)
	}

	// The pictures follow from the tables alone.
	again := options{dir: t.TempDir()}
	for _, network := range networks {
		copyFile(t, o.file(network, "csv"), again.file(network, "csv"))
	}
	if code := run([]string{"-plot", "-o", again.dir}, &stderr); code != program.OK {
		t.Fatalf("exit code %d: %s", code, &stderr)
	}
	for _, network := range networks {
		first, err := os.ReadFile(o.file(network, "svg"))
		if err != nil {
			t.Fatal(err)
		}
		if second, err := os.ReadFile(again.file(network, "svg")); err != nil || !bytes.Equal(first, second) {
			t.Errorf("%s: another picture of the same table (%v)", network, err)
		}
	}
}

// checkRows wants each technique at each occupancy. When all ports are taken
// every dial fails, and those that search for a free port fail only then.
func checkRows(t *testing.T, network string, rows []row) {
	t.Helper()
	want := (len(techniquesOf(network)) + len(ownFill)) * len(occupancies)
	if len(rows) != want {
		t.Errorf("%s: %d rows, want %d", network, len(rows), want)
	}
	for _, r := range rows {
		what := fmt.Sprintf("%s, %s, fill %s, %g %% taken", network, r.technique, r.fill, r.occupancy)
		if r.ports != quickPlan.ports() || r.kernel == "" || r.machine == "" || r.date == "" {
			t.Errorf("%s: measured with %+v", what, r.where)
		}
		full := r.occupancy == 100
		switch {
		case r.dials == 0:
			t.Errorf("%s: no dials", what)
		case full && r.failures != r.dials:
			t.Errorf("%s: %d of %d dials fail, want all", what, r.failures, r.dials)
		case !full && r.failures != 0 && r.technique != "random-port":
			t.Errorf("%s: %d of %d dials fail, want none", what, r.failures, r.dials)
		case r.failures < r.dials && (r.p50 <= 0 || r.p99 < r.p50):
			t.Errorf("%s: p50 %v, p99 %v", what, r.p50, r.p99)
		}
	}
}

// checkPicture wants well-formed XML in which the techniques are named.
func checkPicture(t *testing.T, network string, picture []byte, rows []row) {
	t.Helper()
	var texts []string
	root := ""
	for d := xml.NewDecoder(bytes.NewReader(picture)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%s: %v", network, err)
		}
		switch token := token.(type) {
		case xml.StartElement:
			if root == "" {
				root = token.Name.Local
			}
		case xml.CharData:
			texts = append(texts, string(token))
		}
	}
	if root != "svg" {
		t.Errorf("%s: the picture is a <%s>, want an <svg>", network, root)
	}
	for _, r := range rows {
		if !slices.Contains(texts, r.technique) {
			t.Fatalf("%s: the picture does not name %s", network, r.technique)
		}
	}
	if bytes.Contains(picture, []byte("NaN")) || bytes.Contains(picture, []byte("Inf")) {
		t.Errorf("%s: a point is nowhere", network)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o666)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestUsage(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		want string // in what is said
	}{
		{[]string{"-fast"}, "-fast"},
		{[]string{"-quick=often"}, `"often"`},
		{[]string{"-o", dir, "tcp"}, `"tcp"`},
		{[]string{"-o", dir + "/none"}, dir + "/none"},
		{[]string{"-o", file}, file},
		{[]string{"-o", dir, "-plot", "-quick"}, "-quick"},
	} {
		var stderr strings.Builder
		if code := run(test.args, &stderr); code != program.Usage || !strings.Contains(stderr.String(), test.want) {
			t.Errorf("%q: exit code %d and %q, want %d and %s", test.args, code, &stderr, program.Usage, test.want)
		}
	}
	var stderr strings.Builder
	if code := run([]string{"-h"}, &stderr); code != program.OK || !strings.Contains(stderr.String(), "-plot") {
		t.Errorf("-h: exit code %d and %q", code, &stderr)
	}
}

func TestTableThatIsNone(t *testing.T) {
	good := strings.Join(header, ",") + "\n"
	for _, test := range []struct{ name, table, want string }{
		{"no file", "", "no such file"},
		{"another header", "a,b\n1,2\n", "not a table"},
		{"no rows", good, "not a table"},
		{"a row too short", good + "random,net.Dialer,5\n", "wrong number of fields"},
		{"no number", good + "random,net.Dialer,half,10,0,1,2,28232,k,m,d\n", "line 2: occupancy_percent"},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := options{dir: t.TempDir()}
			if test.table != "" {
				if err := os.WriteFile(o.file("tcp", "csv"), []byte(test.table), 0o666); err != nil {
					t.Fatal(err)
				}
			}
			var stderr strings.Builder
			if code := run([]string{"-plot", "-o", o.dir}, &stderr); code != program.Failed || !strings.Contains(stderr.String(), test.want) {
				t.Errorf("exit code %d and %q, want %d and %q", code, &stderr, program.Failed, test.want)
			}
		})
	}
}
