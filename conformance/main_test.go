//go:build linux

package conformance

import (
	"context"
	"net"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/seed22601231/connectx"
	"github.com/seed22601231/connectx/internal/netns"
)

func TestMain(m *testing.M) {
	os.Exit(netns.Main(func() int {
		if netns.Inside() && os.Getenv(udpEnv) == "" {
			if err := netns.LoopbackUp("2001:db8::1/128", "2001:db8::2/128", "2001:db8::3/128"); err != nil {
				println(err.Error())
				return 1
			}
		}
		code := m.Run()
		if err := goleak.Find(); err != nil && code == 0 {
			println(err.Error())
			return 1
		}
		return code
	}))
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// dialers are the two that must behave alike, made from the same net.Dialer.
var dialers = []struct {
	name string
	of   func(net.Dialer) dialFunc
}{
	{"net.Dialer", func(d net.Dialer) dialFunc { return d.DialContext }},
	{"connectx.Dialer", func(d net.Dialer) dialFunc {
		c := connectx.Dialer{Dialer: d}
		return c.DialContext
	}},
	{"connectx.Dialer.NetDialer", func(d net.Dialer) dialFunc {
		c := connectx.Dialer{Dialer: d}
		return c.NetDialer().DialContext
	}},
}
