package main

import (
	"bytes"
	"strings"
	"testing"
)

const twoRuns = `goos: linux
cpu: some processor
BenchmarkDialInTurn/loopback/tcp/IPv4/source+port-2	3	1 ns/op	80 connectx-p50-ns	100 net-p50-ns
BenchmarkDial/tcp/IPv4/source+port/dialer=net-2         	    4404	     100 ns/op	      50 B/op	      15 allocs/op
BenchmarkDial/tcp/IPv4/source+port/dialer=connectx-2    	    4404	      80 ns/op	      60 B/op	      21 allocs/op
BenchmarkExhausted/udp/dialer=connectx-2	1	7 ns/op	300000000 found-max-ns	20 first-ns	10 lookups-ns
BenchmarkParallel/udp/goroutines=1/dialer=net-2	1	7 ns/op	100 dials/s
BenchmarkParallel/udp/goroutines=2/dialer=net-2	1	7 ns/op	160 dials/s
BenchmarkParallel/udp/goroutines=1/dialer=connectx-2	1	7 ns/op	100 dials/s
BenchmarkParallel/udp/goroutines=2/dialer=connectx-2	1	7 ns/op	150 dials/s
PASS
BenchmarkDialInTurn/loopback/tcp/IPv4/source+port-2	3	1 ns/op	200 connectx-p50-ns	200 net-p50-ns
BenchmarkDial/tcp/IPv4/source+port/dialer=net-2         	    4404	     200 ns/op	      50 B/op	      15 allocs/op
BenchmarkDial/tcp/IPv4/source+port/dialer=connectx-2    	    4404	     200 ns/op	      60 B/op	      22 allocs/op
`

func TestTable(t *testing.T) {
	r := results{}
	if err := r.read(strings.NewReader(twoRuns)); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := r.print(&out, rows(r)); err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for line := range strings.Lines(out.String()) {
		got[strings.Join(strings.Fields(line), " ")] = true
	}
	for _, want := range []string{
		"tcp IPv4 source+port 0.90 0.80 to 1.00 ≤ 0.90 kept",
		"tcp IPv4 source+port 0.90 0.80 to 1.00",
		"tcp IPv4 source+port 6.50 6.00 to 7.00 ≤ 6.00 MISSED",
		"first answer : a lookup for each port 2.00 2.00 to 2.00 ≤ 1.00 MISSED",
		"milliseconds until a freed port is found, at most 300.00 300.00 to 300.00 ≤ 100.00 MISSED",
		"udp net 1.60 1.60 to 1.60",
		"udp connectx 1.50 1.50 to 1.50 ≥ 1.52 MISSED", // 0.95 of what net.Dialer reaches
		"2 runs, 4 limits missed",
	} {
		if !got[want] {
			t.Errorf("there is no line %q in\n%s", want, out.String())
		}
	}
}

func TestWrongInput(t *testing.T) {
	for _, test := range []struct{ name, input, want string }{
		{"a value is not a number", "BenchmarkDial/x-2 1 many ns/op", "line 1"},
		{"a unit is missing", "BenchmarkDial/x-2 1 7 ns/op 8", "line 1"},
	} {
		if err := (results{}).read(strings.NewReader(test.input)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got error %v, want one with %q", test.name, err, test.want)
		}
	}
	r := results{}
	if err := r.print(&bytes.Buffer{}, rows(r)); err == nil {
		t.Error("no results make a table")
	}
	const net, connectx = "BenchmarkDial/tcp/IPv4/source/dialer=net-2 1 7 allocs/op\n", "BenchmarkDial/tcp/IPv4/source/dialer=connectx-2 1 7 allocs/op\n"
	r.read(strings.NewReader(net + connectx + net))
	if err := r.print(&bytes.Buffer{}, rows(r)); err == nil || !strings.Contains(err.Error(), "dialer=connectx") {
		t.Errorf("one dialer has a run less: got error %v, want one that names it", err)
	}
}
