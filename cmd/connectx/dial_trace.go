package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/seed22601231/connectx"
)

// traceTo returns a context whose dials write a line for each event, and what
// is to be called when there is a connection.
func traceTo(ctx context.Context, w io.Writer) (traced context.Context, connected func(net.Conn)) {
	var mu sync.Mutex // the hooks may be called side by side
	start := time.Now()
	line := func(event, format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Fprintf(w, "%.6f %-10s %s\n", time.Since(start).Seconds(), event, fmt.Sprintf(format, args...))
	}
	tryLine := func(event string) func(connectx.TraceTry) {
		return func(t connectx.TraceTry) { line(event, "%s", formatTry(t)) }
	}
	traced = connectx.WithTrace(ctx, &connectx.Trace{
		SourceChosen: func(source netip.Addr, destination netip.AddrPort) { line("source", "%v->%v", source, destination) },
		Try:          tryLine("try"),
		Conflict:     tryLine("conflict"),
		Contention:   tryLine("contention"),
		Fallback:     func(reason error) { line("fallback", "%v", reason) },
	})
	return traced, func(conn net.Conn) { line("connected", "%v->%v", conn.LocalAddr(), conn.RemoteAddr()) }
}

// formatTry is the try as "192.0.2.1:40000-40063->192.0.2.2:7", with an asterisk
// for a source address that the kernel chooses.
func formatTry(t connectx.TraceTry) string {
	source, ports := "*", t.Ports.String()
	if t.Source.IsValid() {
		source = t.Source.String()
	}
	if t.Ports.Low == t.Ports.High {
		ports = fmt.Sprint(t.Ports.Low)
	}
	return fmt.Sprintf("%s->%v", net.JoinHostPort(source, ports), t.Destination)
}
