package main

import (
	"strings"
	"testing"
)

func TestUsage(t *testing.T) {
	tests := []struct {
		name           string
		args           []string
		code           int
		stdout, stderr string // substrings; nothing at all if empty
	}{
		{"no subcommand", nil, exitUsage, "", "Usage: connectx"},
		{"unknown subcommand", []string{"dmeo"}, exitUsage, "", `unknown subcommand "dmeo"`},
		{"help on an unknown subcommand", []string{"help", "dmeo"}, exitUsage, "", `unknown subcommand "dmeo"`},
		{"help", []string{"help"}, exitOK, "demo", ""},
		{"help as a flag", []string{"-h"}, exitOK, "demo", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { checkRun(t, tt.args, tt.code, tt.stdout, tt.stderr) })
	}
}

func checkRun(t *testing.T, args []string, code int, stdout, stderr string) {
	t.Helper()
	var out, errs strings.Builder
	if got := run(args, &out, &errs); got != code {
		t.Errorf("exit code %d, want %d", got, code)
	}
	for _, s := range []struct{ stream, got, want string }{
		{"stdout", out.String(), stdout},
		{"stderr", errs.String(), stderr},
	} {
		if !strings.Contains(s.got, s.want) || s.want == "" && s.got != "" {
			t.Errorf("%s is %q, want %q in it", s.stream, s.got, s.want)
		}
	}
}
