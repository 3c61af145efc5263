//go:build linux

package connectx_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/lookup"
)

func init() { children["exhausted"] = exhausted }

const exhaustedEnv = "CONNECTX_TEST_EXHAUSTED"

// An exhaustion is what a child of BenchmarkExhausted is to measure.
type exhaustion struct {
	Dialer, Network string
	Source          netip.Addr
	Full            netip.AddrPort
	Ports           []uint16 // that are not taken yet; the child takes and frees them
}

// An exhaustionResult is what it took.
type exhaustionResult struct {
	First     time.Duration // dial to the full destination, before which the process knew nothing
	Lookups   time.Duration // one lookup for each port of the range
	Following latencies     // dials to the full destination
	Found     latencies     // from the moment a port is free to the end of the dial that gets it
}

// Dials to a destination whose ports are all taken. Each iteration is done by a
// new process: the first answer must not profit from what others have found out.
func BenchmarkExhausted(b *testing.B) {
	for _, network := range []string{"tcp", "udp"} {
		b.Run(network, func(b *testing.B) {
			to := newFullDestination(b, network)
			dialers := []string{"net", "connectx"}
			uncontended := map[string]time.Duration{}
			for _, name := range dialers {
				took, err := dials(benchDialer(name), network, to.remote.String(), 1000)
				if err != nil {
					b.Fatal(err)
				}
				uncontended[name] = took.percentile(0.5)
			}
			ports := to.fillBut(b, 10)
			for _, name := range dialers {
				b.Run("dialer="+name, func(b *testing.B) {
					what, err := json.Marshal(exhaustion{name, network, to.source, to.remote, ports})
					if err != nil {
						b.Fatal(err)
					}
					var first, lookups, following, found latencies
					for b.Loop() {
						out := runChild(b, "exhausted", exhaustedEnv+"="+string(what))
						var r exhaustionResult
						if err := json.Unmarshal([]byte(out), &r); err != nil {
							b.Fatal(err)
						}
						first, lookups = append(first, r.First), append(lookups, r.Lookups)
						following, found = append(following, r.Following...), append(found, r.Found...)
					}
					b.ReportMetric(0, "ns/op") // that of the child
					b.ReportMetric(float64(first.percentile(0.5)), "first-ns")
					b.ReportMetric(float64(lookups.percentile(0.5)), "lookups-ns")
					following.report(b)
					b.ReportMetric(float64(uncontended[name]), "uncontended-p50-ns")
					b.ReportMetric(float64(slices.Max(found)), "found-max-ns")
				})
			}
		})
	}
}

// fillBut fills the destination but for n ports, which it returns.
func (d *fullDestination) fillBut(b *testing.B, n int) []uint16 {
	b.Helper()
	ports := shuffledPorts()[:n]
	for _, port := range ports {
		fd, err := openPlain(d.network, netip.AddrPortFrom(d.source, port), d.remote)
		if err != nil {
			b.Fatal(err)
		}
		defer unix.Close(fd)
	}
	d.fill(b, &connectx.Dialer{}, benchPorts-n)
	return ports
}

// dials opens and closes connections, and returns how long each dial took.
func dials(by dialer, network, address string, n int) (latencies, error) {
	var all latencies
	for range n {
		conn, took, err := timedDial(by, network, address)
		if err != nil {
			return nil, err
		}
		hangUp(conn)
		all = append(all, took)
	}
	return all, nil
}

// exhausted measures in a process of its own.
func exhausted() int {
	var e exhaustion
	if err := json.Unmarshal([]byte(os.Getenv(exhaustedEnv)), &e); err != nil {
		return failChild("%s: %v", exhaustedEnv, err)
	}
	r, err := e.measure()
	if err != nil {
		return failChild("%s %s: %v", e.Dialer, e.Network, err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return failChild("%v", err)
	}
	return 0
}

func (e *exhaustion) measure() (r exhaustionResult, err error) {
	plain := make([]int, len(e.Ports))
	for i, port := range e.Ports {
		if plain[i], err = openPlain(e.Network, netip.AddrPortFrom(e.Source, port), e.Full); err != nil {
			return r, fmt.Errorf("port %d: %w", port, err)
		}
	}
	by := benchDialer(e.Dialer)
	if r.First, err = e.dialFull(by); err != nil {
		return r, err
	}
	if r.Lookups, err = e.lookups(); err != nil {
		return r, err
	}
	// Some dialers take a second for so many.
	for start := time.Now(); len(r.Following) < 20 || len(r.Following) < 1000 && time.Since(start) < time.Second; {
		took, err := e.dialFull(by)
		if err != nil {
			return r, err
		}
		r.Following = append(r.Following, took)
	}
	for i, port := range e.Ports {
		took, err := e.find(by, plain[i])
		if err != nil {
			return r, err
		}
		r.Found = append(r.Found, took)
		if plain[i], err = openPlain(e.Network, netip.AddrPortFrom(e.Source, port), e.Full); err != nil {
			return r, fmt.Errorf("port %d: %w", port, err)
		}
		if _, err := e.dialFull(by); err != nil {
			return r, err
		}
	}
	return r, nil
}

// dialFull dials to the full destination, and wants to hear that it is.
func (e *exhaustion) dialFull(by dialer) (time.Duration, error) {
	conn, took, err := timedDial(by, e.Network, e.Full.String())
	if err == nil {
		conn.Close()
		return 0, fmt.Errorf("connected from %v although all ports are taken", conn.LocalAddr())
	}
	if !isExhausted(err) {
		return 0, err
	}
	return took, nil
}

// isExhausted reports whether that is what the error says: net.Dialer says it
// with an errno.
func isExhausted(err error) bool {
	return errors.Is(err, connectx.ErrPortsExhausted) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAGAIN)
}

// lookups asks for each port of the range which socket is there.
func (e *exhaustion) lookups() (time.Duration, error) {
	conn, err := lookup.Open()
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	ask := conn.UDP
	if e.Network == "tcp" {
		ask = conn.TCP
	}
	start := time.Now()
	for port := benchLow; port <= benchHigh; port++ {
		if _, err := ask(netip.AddrPortFrom(e.Source, uint16(port)), e.Full, 0); err != nil {
			return 0, fmt.Errorf("lookup of port %d: %w", port, err)
		}
	}
	return time.Since(start), nil
}

// find frees a port by closing fd, and dials until a dial gets it.
func (e *exhaustion) find(by dialer, fd int) (time.Duration, error) {
	if err := unix.Close(fd); err != nil {
		return 0, err
	}
	for start := time.Now(); ; {
		conn, err := by.Dial(e.Network, e.Full.String())
		took := time.Since(start)
		if err == nil {
			hangUp(conn)
			return took, nil
		}
		if !isExhausted(err) {
			return 0, err
		}
		if took > 10*time.Second {
			return 0, fmt.Errorf("a free port was not found within %v: %w", took, err)
		}
	}
}
