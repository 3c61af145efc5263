//go:build linux

package connectx

import (
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/seed22601231/connectx/internal/sys"
	"github.com/seed22601231/connectx/lookup"
)

// connectUDP connects the socket: the UDP rows of the contract.
func (a *attempt) connectUDP() error {
	a.shareByFlagOnly()
	l := &a.lock
	*l = tupleLock{attempt: a, maybeShared: a.hook.hasUserControl()}
	broken := true // unless the caller's hook, on a fresh socket, lets it end
	defer func() {
		if l.conn != nil {
			a.ns.release(l.conn, broken)
		}
	}()
	err := l.connect()
	broken = l.blind != nil
	if l.blind == nil {
		return err
	}
	if err := l.reuse(); err != nil {
		return err
	}
	a.fallBack(l.blind)
	return a.connectUDPAlone(l.blind)
}

// shareByFlagOnly takes options off a socket that the caller's hook has put it on,
// because of which the lock would not lock. Sockets of one user that have
// SO_REUSEPORT share a port whatever SO_REUSEADDR says. One that has
// SO_INCOMING_CPU is found by a lookup on that processor before those that were
// bound after it (compute_score in net/ipv4/udp.c), so that two could find
// themselves; the kernel writes over it anyway, with each datagram that a
// connected socket receives.
func (a *attempt) shareByFlagOnly() {
	if a.hook.hasUserControl() {
		_ = sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 0)
		_ = sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_INCOMING_CPU, -1)
	}
}

// connectUDPAlone is for when the kernel does not answer lookups, and says why.
// It never shares a port: a picked one is the kernel's choice for this socket
// alone, and an explicit one is had only while nobody else has it.
func (a *attempt) connectUDPAlone(why error) error {
	if err := sys.SetInt(a.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 0); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	switch {
	case a.local.Port() == 0 && a.hook.ports != (PortRange{}):
		return a.bindAlone()
	case a.local == (netip.AddrPort{}):
		return nil // net.Dialer connects, and the kernel picks a port
	}
	err := a.bind(a.local)
	switch {
	case err == unix.EADDRINUSE && a.local.Port() != 0:
		return &inUseError{"the source port is in use and cannot be shared: " + why.Error(), a.chosen(), a.remote, err}
	case err == unix.EADDRINUSE && len(a.hook.sources) > 0:
		return a.exhausted(a.local.Addr(), taken{tried: a.ports.Len(), held: a.ports.Len()})
	}
	return os.NewSyscallError("bind", err)
}

// bindAlone binds a port of PortRange that nobody is on.
func (a *attempt) bindAlone() error {
	walk := a.ns.order.Walk(a.ports, a.local.Addr(), a.remote)
	for port, ok := walk.Next(); ok; port, ok = walk.Next() {
		switch err := a.bind(netip.AddrPortFrom(a.local.Addr(), port)); err {
		case nil:
			return nil
		case unix.EADDRINUSE:
		default:
			return os.NewSyscallError("bind", err)
		}
	}
	return a.exhausted(a.local.Addr(), taken{tried: a.ports.Len(), held: a.ports.Len()})
}

// A tupleLock is an attempt that may share its port. What keeps two sockets
// from one 4-tuple is described at take and takeShared.
type tupleLock struct {
	*attempt
	conn   *lookup.Conn // nil until the first question
	device uint32       // the interface that lookups name, else 0
	bound  bool         // the socket has a port, and cannot have another

	// maybeShared says that SO_REUSEADDR may be set on the socket: because
	// the caller's hook has done so, or a try that has come to nothing.
	maybeShared bool

	// blind is set when the kernel does not answer, or not as it should, and
	// says why.
	blind error
}

func (l *tupleLock) connect() error {
	l.device = l.boundDevice()
	source := l.local.Addr()
	if !source.IsValid() {
		if !l.canAsk() {
			return l.blind
		}
		route, err := l.route(l.conn, l.device)
		if noAnswer(err) {
			l.blind = err
			return err
		}
		if err != nil {
			// Most likely there is no route, and then connect has the words
			// for it. If it has not, this socket has a port of its own.
			return l.connectUDPAlone(err)
		}
		source = route.Source
		l.sourceChosen(source)
		if l.device == 0 {
			l.device = route.Interface
		}
	}
	if port := l.local.Port(); port != 0 {
		return l.connectFrom(netip.AddrPortFrom(source, port))
	}
	return l.connectPicked(source)
}

// canAsk opens the connection for questions, if that has not been done yet.
func (l *tupleLock) canAsk() bool {
	if l.conn == nil && l.blind == nil {
		l.conn, l.blind = l.ns.conn()
	}
	return l.blind == nil
}

// take tries to connect the socket from local. While a bound socket has
// SO_REUSEADDR off, nobody else can bind its port: that is the lock. It lasts
// from bind until the socket is connected.
//
// A socket that has the flag off when it is bound gets the port only if nobody
// else is on it. Then there is nothing to find out, and this is all. Only a
// port that is in use needs takeShared.
//
// Before that, a lookup has to find nobody: unconnected sockets may share the
// port without taking part in this. As the one bound last we would receive what
// is meant for them, and would not even see them in a lookup afterwards. looked
// says that this has been done.
//
// seen is the cookie of the socket that was in the way, if the kernel told.
func (l *tupleLock) take(local netip.AddrPort, looked bool) (o outcome, seen uint64, err error) {
	if l.maybeShared {
		if err := l.setShared(0); err != nil {
			return failed, 0, err
		}
	}
	switch err := l.bind(local); err {
	case nil:
		l.bound = true
		return l.finish()
	case unix.EADDRINUSE:
	default:
		return failed, 0, os.NewSyscallError("bind", err)
	}
	if !looked {
		if !l.canLook() {
			return failed, 0, l.blind
		}
		l.did.Lookups++
		switch s, err := l.conn.UDP(local, l.remote, l.device); {
		case err == nil:
			return l.inTheWay(s), s.Cookie, nil
		case err != lookup.ErrNotFound:
			l.blind = err
			return failed, 0, err
		}
	}
	return l.takeShared(local)
}

// takeAny is take for any port that nobody is on. If there is one the kernel
// finds it, at random, in a few microseconds even where they are rare.
func (l *tupleLock) takeAny(source netip.Addr) (outcome, error) {
	if l.maybeShared {
		if err := l.setShared(0); err != nil {
			return failed, err
		}
	}
	sa := sys.NewSockaddr(l.family, netip.AddrPortFrom(source, 0), l.localScope)
	switch err := sys.BindAnyPort(l.fd, &sa); err {
	case nil:
		l.bound = true
	case unix.EADDRINUSE:
		return conflict, nil
	default:
		return failed, os.NewSyscallError("bind", err)
	}
	if own := l.hook.ports; source == l.remote.Addr() || own != (PortRange{}) {
		local, err := sys.LocalAddr(l.fd)
		switch {
		case err != nil, local == l.remote:
			return conflict, nil // it would talk to itself
		case own != (PortRange{}) && !own.Contains(local.Port()):
			return conflict, nil // the system's range has changed a moment ago
		}
	}
	o, _, err := l.finish()
	return o, err
}

// canLook prepares for lookups of sockets.
func (l *tupleLock) canLook() bool {
	if l.ns.blind.Load() {
		l.blind = errNotOurself
	}
	if !l.canAsk() {
		return false
	}
	if l.device == 0 {
		// Without an interface, sockets that are bound to one would not be
		// found, and they receive before all others.
		route, err := l.route(l.conn, 0)
		if noAnswer(err) {
			l.blind = err
			return false
		}
		l.device = route.Interface
	}
	return true
}

// noAnswer reports whether err means that a question for a route got no answer,
// in contrast to the answer that there is none.
func noAnswer(err error) bool {
	if err == nil || err == errMulticastOptions || errors.Is(err, lookup.ErrNoSource) {
		return false
	}
	_, isCall := errors.AsType[*os.SyscallError](err)
	_, isAnswer := errors.AsType[syscall.Errno](err)
	return isCall || !isAnswer
}

// takeShared is take for a port that others are on. Once the port is locked, a
// lookup tells which socket would receive a datagram on the 4-tuple; it must be
// this one.
//
// If several sockets bind before the first of them takes the flag away, all of
// them hold the lock together. The kernel finds the one that was bound last, so
// only that one finds itself.
func (l *tupleLock) takeShared(local netip.AddrPort) (o outcome, seen uint64, err error) {
	cookie, err := sys.Cookie(l.fd, unix.SO_COOKIE)
	if err != nil {
		return failed, 0, os.NewSyscallError("getsockopt", err)
	}

	if err := l.setShared(1); err != nil {
		return failed, 0, err
	}
	switch err := l.bind(local); err {
	case nil:
		l.bound = true
	case unix.EADDRINUSE:
		return contention, 0, nil
	default:
		return failed, 0, os.NewSyscallError("bind", err)
	}
	if err := l.setShared(0); err != nil {
		return failed, 0, err
	}
	if err := l.awaitBinds(local); err != nil {
		return failed, 0, err
	}
	s, err := l.whoReceives(local)
	switch {
	case err == lookup.ErrNotFound:
		l.ns.blind.Store(true)
		l.blind = errNotOurself
		return failed, 0, l.blind
	case err != nil:
		l.blind = err
		return failed, 0, err
	case s.Cookie != cookie:
		return l.inTheWay(s), s.Cookie, nil
	}
	return l.finish()
}

// awaitBinds returns when no bind is under way that has found the flag still set.
// The kernel's bind reads the flags of all sockets on the port, and only then
// adds its own: with thousands of them that takes long enough for us to look and
// to connect in between. It holds the lock of the port's hash slot meanwhile
// (udp_lib_get_port in net/ipv4/udp.c), for which another bind has to wait. That
// one is bound to fail, since we are on the port.
func (l *tupleLock) awaitBinds(local netip.AddrPort) error {
	fd, err := unix.Socket(l.family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	if l.hook.hasUserControl() {
		// The address may be one that this machine does not have.
		_ = sys.SetInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1)
	}
	sa := sys.NewSockaddr(l.family, local, l.localScope)
	switch err := sys.Bind(fd, &sa); err {
	case unix.EADDRINUSE:
		return nil
	case nil:
		return errNotLocked
	default:
		return os.NewSyscallError("bind", err)
	}
}

var errNotLocked = errors.New("the kernel lets others bind a UDP port that is locked")

// whoReceives is the lookup of a socket that is there, our own if no other. The
// kernel may come upon one that is just being closed instead, and then says that
// there is none.
func (l *tupleLock) whoReceives(local netip.AddrPort) (s lookup.Socket, err error) {
	for range 8 {
		l.did.Lookups++
		if s, err = l.conn.UDP(local, l.remote, l.device); err != lookup.ErrNotFound {
			break
		}
	}
	return s, err
}

// finish connects the socket, whose 4-tuple is known to be free, and unlocks
// the port.
func (l *tupleLock) finish() (o outcome, seen uint64, err error) {
	sa := l.remoteSockaddr()
	switch err := sys.ConnectUDP(l.fd, &sa); err {
	case nil:
	case unix.EADDRINUSE:
		// The kernel has no such error here. It comes from a guard (module
		// guard): the 4-tuple is reserved for another socket, which no
		// lookup finds before it is connected.
		return conflict, 0, nil
	default:
		return failed, 0, os.NewSyscallError("connect", err)
	}
	if err := l.setShared(1); err != nil {
		return failed, 0, err
	}
	l.drain()
	return won, 0, nil
}

// setShared sets SO_REUSEADDR.
func (l *tupleLock) setShared(on int32) error {
	l.maybeShared = on != 0
	return os.NewSyscallError("setsockopt", sys.SetInt(l.fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, on))
}

var errNotOurself = errors.New("sock_diag does not find UDP sockets (is the udp_diag module missing?)")

// inTheWay tells the two kinds of sockets apart that a lookup finds. One that
// was not connected when it was found may have connected, to a destination of
// its own, before the kernel wrote its answer; so being connected is not enough.
func (l *tupleLock) inTheWay(s lookup.Socket) outcome {
	if s.Remote == l.remote {
		return conflict
	}
	return contention
}

// drain throws away the datagrams that came in between bind and connect, when
// the socket was open to everybody. See also dropStrangers.
func (l *tupleLock) drain() {
	var b [1]byte
	for {
		if _, err := sys.Recv(l.fd, b[:], 0); err != nil {
			return
		}
	}
}

// reuse makes the socket ready for another try. One that has a port must make
// place for a fresh one; closing it unlocks its port.
func (l *tupleLock) reuse() error {
	if !l.bound {
		return nil
	}
	l.bound, l.maybeShared = false, l.hook.hasUserControl()
	if err := l.renew(); err != nil {
		return err
	}
	l.shareByFlagOnly()
	return nil
}

const (
	// A socket that holds an explicit port is taken for one that does not
	// share if nothing has changed for patience, and over at least
	// patienceTries looks: a holder of the lock may be off the processor for
	// milliseconds, and the whole machine for longer. The first 20 looks come
	// within a few milliseconds, so it is those after them that tell. Where
	// there is more to run than the processors can, it is as many times longer,
	// maxPatience at most.
	patience      = 40 * time.Millisecond
	patienceTries = 48
	maxPatience   = 10 * patience

	// maxWait bounds the wait in a crowd where something always changes.
	maxWait = 5 * time.Second
)

// connectFrom connects from an explicit port.
func (l *tupleLock) connectFrom(local netip.AddrPort) error {
	var (
		start, since time.Time // of contention, and of the last change in it
		holder       uint64
		looks        int
	)
	for try := 0; ; try++ {
		l.begin(local.Port(), local.Port())
		o, seen, err := l.take(local, false)
		if o == contention || o == conflict && l.trace.Conflict != nil {
			err = l.reuse()
		}
		l.end(local.Port(), local.Port(), o)
		switch {
		case o == won || err != nil:
			return err
		case o == conflict:
			return &inUseError{"the 4-tuple is in use", local, l.remote, unix.EADDRINUSE}
		}
		now := time.Now()
		if try == 0 {
			start = now
		}
		if try == 0 || seen != holder {
			since, holder, looks = now, seen, 0
		}
		looks++
		if unchanged := now.Sub(since); unchanged > patience && looks > patienceTries && unchanged > loadedPatience() || now.Sub(start) > maxWait {
			return &inUseError{"the source port is held by a socket that does not share it", local, l.remote, unix.EADDRINUSE}
		}
		if err := l.backOff(try); err != nil {
			return err
		}
	}
}

// loadedPatience is patience on this machine, by its load average of the last
// minute (sysinfo(2)) and the processors that the process may use. It does not see
// an overload that has just begun, nor a CPU quota.
func loadedPatience() time.Duration {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return patience
	}
	return patienceAt(float64(info.Loads[0])/(1<<16), runtime.NumCPU())
}

func patienceAt(load float64, processors int) time.Duration {
	return min(max(patience, time.Duration(load/float64(processors)*float64(patience))), maxPatience)
}

// backOff waits for about as long as the lock is held, and for longer the more
// often that was not enough.
func (l *tupleLock) backOff(try int) error {
	switch {
	case try < 4:
		// The holder is likely at work on another processor, or is a
		// goroutine that waits for one.
		runtime.Gosched()
	case try < 20:
		// The runtime's timers are no good below a millisecond.
		runtime.Gosched()
		ts := unix.NsecToTimespec(int64(5+rand.IntN(50)) * int64(time.Microsecond))
		_ = unix.Nanosleep(&ts, nil)
	default:
		return l.sleep(time.Duration(500+rand.IntN(500)) * time.Microsecond)
	}
	return l.ended()
}

// sleep waits, or until the context is over.
func (a *attempt) sleep(d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-a.ctx.Done():
	}
	return a.ended()
}

// dropStrangers throws away what drain has come too early for: a datagram that
// another processor was about to deliver while the socket was being connected.
// It stops at the first one from the peer.
//
// A filter (SO_ATTACH_FILTER) would leave no such gap, but would have to stay:
// a page of memory for each socket, and the place of one that the caller may
// want.
func dropStrangers(conn *net.UDPConn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		for {
			from, err := sys.Peek(int(fd))
			if err != nil || from == peerOf(conn) {
				return
			}
			var b [1]byte
			_, _ = sys.Recv(int(fd), b[:], 0)
		}
	})
}

// peerOf is the remote address in the form that sys.Peek has.
func peerOf(conn *net.UDPConn) netip.AddrPort {
	peer := conn.RemoteAddr().(*net.UDPAddr).AddrPort()
	return netip.AddrPortFrom(peer.Addr().Unmap().WithZone(""), peer.Port())
}
