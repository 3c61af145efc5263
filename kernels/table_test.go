//go:build linux

package main

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/seed22601231/connectx/kernels/internal/job"
)

func TestTable(t *testing.T) {
	techniques := func(line string) test {
		return test{"TestTechniques", "pass", "        technique  connections\n        " + line + "\n        udp4  connect(dst)  20\n"}
	}
	left := leftOut{tests: "TestFast", reason: "is about time"}
	here := &column{name: running, took: 2 * time.Second, runs: []*machineRun{{accel: "none",
		features: []job.Feature{{Name: "IP_LOCAL_PORT_RANGE", Value: "yes"}},
		results:  []*result{{task: task{row: "connectx"}, tests: []test{techniques("tcp4  bind(src, 0)  20")}}},
	}}}
	guest := &column{name: "6.1", took: time.Minute, runs: []*machineRun{{accel: "tcg",
		features: []job.Feature{{Name: "IP_LOCAL_PORT_RANGE", Value: "ENOPROTOOPT"}},
		results: []*result{
			{task: task{row: "connectx", leftOut: []leftOut{left}}, tests: []test{
				techniques("tcp4  bind(src, 0)  19"), {"TestUsers", "skip", "    a_test.go:1: needs root\n"}, {"TestBad", "fail", ""}}},
			{task: task{row: "connectx, ipv6.disable=1"}, end: job.End{Seconds: 4}, tests: []test{{"TestA", "pass", ""}}},
		},
	}}}
	got := strings.TrimPrefix(table([]*column{here, guest}), about)
	want := `|  | running | Debian bookworm |
|---|---|---|
| IP_LOCAL_PORT_RANGE | yes | ENOPROTOOPT |
| accelerator | none | tcg |
| time | 2s | 1m0s |
| connectx | 1 passed, 0 s | 1 passed, 1 skipped, **1 failed**, 0 s |
| connectx, ipv6.disable=1 | - | 1 passed, 4 s |

## Skipped

These are the tests that have skipped themselves, and why.

- TestUsers: needs root. In connectx (Debian bookworm).

## Left out

These are the tests that were not run, and why.

- TestFast: is about time. In connectx (Debian bookworm).

## Techniques

What the kernels do with other ways to connect (TestTechniques).

2 lines on running:

` + "```\ntcp4  bind(src, 0)  20\nudp4  connect(dst)  20\n```" + `

Debian bookworm does otherwise:

` + "```\ntcp4  bind(src, 0)  19\n```\n"
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"Debian bookworm: connectx: TestBad\n    \n"}, failed([]*column{here, guest})); diff != "" {
		t.Error(diff)
	}
}
