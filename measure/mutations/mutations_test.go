//go:build linux

package main

import (
	"context"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/seed22601231/connectx/internal/program"
)

const libraryRoot = "../.."

// Each line that is to be broken is in the library once, and whatever has to notice
// exists.
func TestListIsUpToDate(t *testing.T) {
	check, err := os.ReadFile(filepath.Join(libraryRoot, "model", "check"))
	if err != nil {
		t.Fatal(err)
	}
	functions := make(map[string][]string)
	names := make(map[string]bool)
	for _, m := range list {
		if _, err := m.broken(libraryRoot); err != nil {
			t.Error(err)
		}
		if m.old == m.new || len(m.catchers) == 0 || names[m.name] || strings.ContainsAny(m.name, "|\n") {
			t.Errorf("%q: breaks nothing, nothing has to notice, or the name is not one for the table", m.name)
		}
		names[m.name] = true
		for _, c := range m.catchers {
			switch c := c.(type) {
			case tests:
				if functions[c.dir] == nil {
					functions[c.dir] = testFunctions(t, filepath.Join(libraryRoot, c.dir))
				}
				for name := range strings.SplitSeq(c.names, "|") {
					if !slices.Contains(functions[c.dir], name) {
						t.Errorf("%q: there is no test %s in %q", m.name, name, c.dir)
					}
				}
			case model:
				if !strings.Contains(string(check), "fails '"+string(c)+"'") {
					t.Errorf("%q: the model has no mutation %q", m.name, c)
				}
			}
		}
	}
}

// testFunctions returns the names of the tests of a package.
func testFunctions(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Fatalf("%s: no tests: %v", dir, err)
	}
	var names []string
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok {
				names = append(names, f.Name.Name)
			}
		}
	}
	return names
}

// A small module, in which everything happens that can happen to a mutation.
const (
	smallCode = `package small

// Sign is 1 above 0, else 0.
func Sign(n int) int {
	if n > 0 {
		return 1
	}
	return 0
}
`
	smallTest = `package small

import "testing"

func TestSign(t *testing.T) {
	if Sign(5) != 1 {
		t.Error("not 1")
	}
}

func TestZero(t *testing.T) {
	if Sign(-5) != 0 {
		t.Error("not 0")
	}
}
`
)

func smallModule(t *testing.T) *tree {
	t.Helper()
	tr := &tree{root: t.TempDir(), temp: t.TempDir()}
	for name, content := range map[string]string{
		"go.mod": "module small\n\ngo 1.26\n", "small.go": smallCode, "small_test.go": smallTest,
	} {
		if err := os.WriteFile(filepath.Join(tr.root, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return tr
}

func TestMutationsOfASmallModule(t *testing.T) {
	both := in(".", "TestSign", "TestZero")
	for _, tt := range []struct {
		name, old, new string
		catcher        catcher
		want           string // in the line that tells what has come of it
		survives       bool
		err            error
	}{
		{name: "caught", old: "return 1", new: "return 2", catcher: both, want: "`TestSign` after "},
		{name: "caught by the other test", old: "return 0", new: "return 1", catcher: both, want: "`TestZero` after "},
		{name: "survives", old: "n > 0", new: "n > 1", catcher: both, want: "SURVIVES: not TestSign, TestZero", survives: true},
		{name: "does not compile", old: "return 1", new: "return one", catcher: both, want: "undefined: one", err: errNotCompiled},
		{name: "hangs, as it should", old: "return 1", new: "select {}", catcher: both.orHang(time.Second), want: "(timed out) after "},
		{name: "panics", old: "return 1", new: "panic(n)", catcher: both, want: "`TestSign` after "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tr := smallModule(t)
			m := mutation{name: tt.name, file: "small.go", old: tt.old, new: tt.new, catchers: []catcher{tt.catcher}}
			if err := tr.checkGreen(t.Context(), []*mutation{&m}, io.Discard); err != nil {
				t.Fatal(err)
			}
			rows, err := tr.breakAll(t.Context(), []*mutation{&m}, io.Discard)
			if err != nil {
				t.Fatal(err)
			}
			r := rows[0]
			if got := r.String(); !strings.Contains(got, tt.want) {
				t.Errorf("%q does not contain %q", got, tt.want)
			}
			if !errors.Is(r.err, tt.err) || (r.err == nil) != (tt.err == nil) {
				t.Errorf("error %v, want %v", r.err, tt.err)
			}
			if bad := verdict(rows) != nil; bad != (tt.survives || tt.err != nil) {
				t.Errorf("verdict: %v", verdict(rows))
			}
			if content, err := os.ReadFile(filepath.Join(tr.root, "small.go")); string(content) != smallCode {
				t.Errorf("the file was edited: %q, %v", content, err)
			}
		})
	}
}

// What is red, or does not run, with nothing broken says nothing.
func TestCatcherThatIsNotGreen(t *testing.T) {
	for _, tt := range []struct {
		name, edit, test, want string
	}{
		{"red", "return 2", "TestSign", "small_test.go:7: not 1"},
		{"no such test", "return 1", "TestNone", "no test of that name"},
		{"does not compile", "return one", "TestSign", "does not compile"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tr := smallModule(t)
			edited := strings.Replace(smallCode, "return 1", tt.edit, 1)
			if err := os.WriteFile(filepath.Join(tr.root, "small.go"), []byte(edited), 0o644); err != nil {
				t.Fatal(err)
			}
			m := mutation{file: "small.go", catchers: []catcher{in(".", tt.test)}}
			if err := tr.checkGreen(t.Context(), []*mutation{&m}, io.Discard); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

func TestTextThatIsNotInTheFileOnce(t *testing.T) {
	tr := smallModule(t)
	for _, old := range []string{"return 3", "return"} {
		m := mutation{file: "small.go", old: old}
		if name, err := tr.overlay(&m); err == nil || !strings.Contains(err.Error(), "out of date") {
			t.Errorf("%q: %q, %v", old, name, err)
		}
	}
}

// An interrupt ends the tests, and all that they have started.
func TestInterruptEndsTheTests(t *testing.T) {
	tr := smallModule(t)
	ctx, cancel := context.WithCancel(t.Context())
	started := filepath.Join(tr.temp, "started")
	m := mutation{file: "small.go", old: "return 1", new: "os.WriteFile(" + `"` + started + `"` + ", nil, 0o644); select {}", catchers: []catcher{in(".", "TestSign")}}
	withOS := strings.Replace(smallCode, "package small", "package small\n\nimport \"os\"\n\nvar _ = os.Args", 1)
	if err := os.WriteFile(filepath.Join(tr.root, "small.go"), []byte(withOS), 0o644); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			if _, err := os.Stat(started); err == nil || ctx.Err() != nil {
				cancel()
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	if rows, err := tr.breakAll(ctx, []*mutation{&m}, io.Discard); !errors.Is(err, context.Canceled) {
		t.Fatalf("%v, %v", rows, err)
	}
	// The test program is in the temporary folder of the go command.
	programs, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, p := range programs {
		if target, _ := os.Readlink(p); strings.HasPrefix(target, tr.temp) {
			t.Errorf("%s still runs", target)
		}
	}
}

func TestOutputOfGoTest(t *testing.T) {
	const start = `{"Time":"2026-01-01T00:00:00Z","Action":"run","Test":"TestA"}` + "\n"
	for _, tt := range []struct {
		name, out string
		c         tests
		want      outcome
		err       string
	}{
		{name: "passes", out: start + `{"Action":"pass","Test":"TestA"}`},
		{name: "fails in a part of a test", out: start + `{"Time":"2026-01-01T00:00:01.5Z","Action":"fail","Test":"TestA/udp"}`, want: outcome{red: "`TestA`", after: "1.5 s"}},
		{name: "fails outside of the tests", out: start + `{"Time":"2026-01-01T00:00:01Z","Action":"fail","Package":"p"}`, want: outcome{red: "`the test program`", after: "1.0 s"}},
		{name: "is skipped", out: start + `{"Action":"skip","Test":"TestA"}`, err: "no test of that name"},
		{name: "hangs", out: start + `{"Action":"output","Output":"panic: test timed out after 2m0s\n"}` + "\n" + `{"Action":"fail","Test":"TestA"}`, err: "the list does not expect"},
		{name: "was not built", out: `{"Action":"build-output","Output":"a.go:1: undefined\n"}` + "\n" + `{"Action":"build-fail"}` + "\n" + `{"Action":"fail","FailedBuild":"p"}`, err: "a.go:1: undefined"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			run, err := parseTests(strings.NewReader(tt.out))
			if err != nil {
				t.Fatal(err)
			}
			got, err := run.outcome(tt.c, nil, "")
			if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%+v, %v, want %+v, %q", got, err, tt.want, tt.err)
			}
		})
	}
	if run, err := parseTests(strings.NewReader("no JSON")); err == nil {
		t.Errorf("%+v", run)
	}
}

func TestOutputOfStress(t *testing.T) {
	for _, tt := range []struct{ out, promise, last string }{
		{"stress -seed 1\n  10 s  12 dials  0 failures\n", "", "  10 s  12 dials  0 failures"},
		{"stress -seed 1\nduplicates: udp a->b\nmisdelivered: c\n", "duplicates", "duplicates: udp a->b"},
		{"stress -seed 1\nstress: process \"dial\": exit status 2\n", "", "stress: process \"dial\": exit status 2"},
	} {
		if promise, last := readStress(strings.NewReader(tt.out)); promise != tt.promise || last != tt.last {
			t.Errorf("%q: %q, %q", tt.out, promise, last)
		}
	}
	// All promises that the program has are known.
	source, err := os.ReadFile("../stress/tally.go")
	if err != nil {
		t.Fatal(err)
	}
	all := regexp.MustCompile(`promise = "(.*)"`).FindAllStringSubmatch(string(source), -1)
	if len(all) == 0 {
		t.Error("no promise found")
	}
	for _, found := range all {
		if promise, _ := readStress(strings.NewReader(found[1] + ": something\n")); promise != found[1] {
			t.Errorf("%q is not taken for a broken promise", found[1])
		}
	}
}

func TestOutputOfTheModel(t *testing.T) {
	got := parseModel("   478233 states  holds: no two on one 4-tuple\nMutations:\n      324 states  counterexample found, as it must: leaving the flag set\n")
	if len(got) != 1 || got["leaving the flag set"] != "324" {
		t.Errorf("%q", got)
	}
}

func TestTable(t *testing.T) {
	caught := row{mutation: &mutation{name: "sleeps"}, caught: []outcome{{red: "`TestA`", after: "0.1 s"}, {red: "model", after: "12 states"}}, missed: []catcher{stress(time.Minute)}}
	survives := row{mutation: &mutation{name: "dreams"}, missed: []catcher{in(".", "TestA")}}
	mistake := row{mutation: &mutation{name: "errs"}, err: errors.New("does not compile: a.go:1\na.go:2")}
	var b strings.Builder
	writeTable(&b, []row{caught, survives, mistake}, "Without the model.")
	for _, want := range []string{
		heading + "\n| mutation | caught by | after |\n|---|---|---|\n| sleeps | `TestA`; model; not by stress for 60 s | 0.1 s; 12 states |\n",
		"\n| dreams | **nothing** |  |\n", "\n| errs | **error: does not compile: a.go:1** |  |\n", ". Without the model.\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("there is no %q in\n%s", want, &b)
		}
	}
	if err := verdict([]row{caught}); err != nil {
		t.Error(err)
	}
	if err := verdict([]row{caught, survives, mistake}); err == nil || !strings.Contains(err.Error(), "2 of 3") {
		t.Error(err)
	}
}

func TestWithoutTheModel(t *testing.T) {
	both := &mutation{name: "both", catchers: []catcher{in(".", "TestA"), model("m")}}
	rest := leaveOutModel([]*mutation{both, {name: "only the model", catchers: []catcher{model("m")}}})
	if len(rest) != 1 || rest[0].name != "both" || len(rest[0].catchers) != 1 || len(both.catchers) != 2 {
		t.Errorf("%+v", rest)
	}
}

func TestFlags(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want int
	}{
		{[]string{"-help"}, program.OK},
		{[]string{"-run", "("}, program.Usage},
		{[]string{"-run", "cookie", "-o", "file"}, program.Usage},
		{[]string{"more"}, program.Usage},
		{[]string{"-none"}, program.Usage},
		{[]string{"-run", "there is no such mutation"}, program.Failed},
	} {
		var stdout, stderr strings.Builder
		if got := runCommand(tt.args, &stdout, &stderr); got != tt.want {
			t.Errorf("%q: %d, want %d: %s", tt.args, got, tt.want, &stderr)
		}
	}
}
