//go:build linux

package connectx_test

import (
	"bufio"
	"encoding/json"
	"expvar"
	"fmt"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/seed22601231/connectx"
)

// Counters for /debug/vars, which the import of expvar adds to
// http.DefaultServeMux.
func ExampleReadStats() {
	if expvar.Get("connectx") == nil { // a name can be published once only
		expvar.Publish("connectx", expvar.Func(func() any { return connectx.ReadStats() }))
	}
	published := func() (s connectx.Stats) {
		if err := json.Unmarshal([]byte(expvar.Get("connectx").String()), &s); err != nil {
			log.Fatal(err)
		}
		return s
	}

	before := published()
	for _, address := range []string{"127.0.0.1:9", "127.0.0.2:9"} {
		conn, err := connectx.Dial("udp", address)
		if err != nil {
			log.Fatal(err)
		}
		conn.Close()
	}
	fmt.Println("dials:", published().UDP.DialsFromAny-before.UDP.DialsFromAny)
	// Output: dials: 2
}

// Counters for Prometheus, in its text format.
func ExampleReadStats_prometheus() {
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		s := connectx.ReadStats()
		for _, metric := range []struct {
			name, help string
			of         func(*connectx.ProtocolStats) uint64
		}{
			{"dials", "Dials to one address.", func(s *connectx.ProtocolStats) uint64 {
				return s.DialsFromAny + s.DialsFromAddr + s.DialsFromPort
			}},
			{"tries", "Tries to take a port.", func(s *connectx.ProtocolStats) uint64 { return s.Tries }},
			{"wins", "Tries that took a port.", func(s *connectx.ProtocolStats) uint64 { return s.Wins }},
			{"conflicts", "Tries that found the 4-tuple to exist.", func(s *connectx.ProtocolStats) uint64 { return s.Conflicts }},
			{"contention", "Tries that found the port locked or held.", func(s *connectx.ProtocolStats) uint64 { return s.Contention }},
			{"errors", "Tries that failed for another reason.", func(s *connectx.ProtocolStats) uint64 { return s.Errors }},
			{"exhausted", "Dials that found every port taken.", func(s *connectx.ProtocolStats) uint64 { return s.Exhausted }},
			{"fallbacks", "Dials without a feature of the kernel.", func(s *connectx.ProtocolStats) uint64 { return s.Fallbacks }},
			{"lookups", "Lookups of a 4-tuple.", func(s *connectx.ProtocolStats) uint64 { return s.Lookups }},
		} {
			name := "connectx_" + metric.name + "_total"
			fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s counter\n", name, metric.help, name)
			fmt.Fprintf(w, "%s{protocol=\"tcp\"} %d\n", name, metric.of(&s.TCP))
			fmt.Fprintf(w, "%s{protocol=\"udp\"} %d\n", name, metric.of(&s.UDP))
		}
	})

	// What a scrape gets, without the numbers.
	server := httptest.NewServer(handler)
	defer server.Close()
	resp, err := http.Get(server.URL)
	if err != nil {
		log.Fatal(err)
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		if series, _, _ := strings.Cut(lines.Text(), " "); series != "#" {
			fmt.Println(series)
		}
	}
	// Output:
	// connectx_dials_total{protocol="tcp"}
	// connectx_dials_total{protocol="udp"}
	// connectx_tries_total{protocol="tcp"}
	// connectx_tries_total{protocol="udp"}
	// connectx_wins_total{protocol="tcp"}
	// connectx_wins_total{protocol="udp"}
	// connectx_conflicts_total{protocol="tcp"}
	// connectx_conflicts_total{protocol="udp"}
	// connectx_contention_total{protocol="tcp"}
	// connectx_contention_total{protocol="udp"}
	// connectx_errors_total{protocol="tcp"}
	// connectx_errors_total{protocol="udp"}
	// connectx_exhausted_total{protocol="tcp"}
	// connectx_exhausted_total{protocol="udp"}
	// connectx_fallbacks_total{protocol="tcp"}
	// connectx_fallbacks_total{protocol="udp"}
	// connectx_lookups_total{protocol="tcp"}
	// connectx_lookups_total{protocol="udp"}
}
