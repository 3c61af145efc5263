//go:build linux

package main

// Outcomes are what has become of dials of one kind.
type Outcomes struct {
	Dials     int
	Connected int
	Exhausted int // no port, as may be
	Conflict  int // the 4-tuple existed, as may be
	Held      int // the port was held by a socket that does not share, as may be
	Spurious  int // none of that
}

func (o Outcomes) add(p Outcomes) Outcomes {
	return Outcomes{
		o.Dials + p.Dials, o.Connected + p.Connected, o.Exhausted + p.Exhausted,
		o.Conflict + p.Conflict, o.Held + p.Held, o.Spurious + p.Spurious,
	}
}

// A Tally counts what one process has done.
type Tally struct {
	Dials map[string]Outcomes // by kind

	// Certain are dials that nothing may stop: from an explicit port that
	// nobody holds without sharing it, to a destination that nobody else dials.
	Certain int

	Echoes         int
	Sent, Received int // datagrams to listeners
	Dumps          int
	Passing        int // duplicates that were in one dump only
}

func (t *Tally) add(other Tally) {
	if t.Dials == nil {
		t.Dials = make(map[string]Outcomes)
	}
	for kind, o := range other.Dials {
		t.Dials[kind] = t.Dials[kind].add(o)
	}
	t.Certain += other.Certain
	t.Echoes += other.Echoes
	t.Sent += other.Sent
	t.Received += other.Received
	t.Dumps += other.Dumps
	t.Passing += other.Passing
}

// total is all dials.
func (t Tally) total() (all Outcomes) {
	for _, o := range t.Dials {
		all = all.add(o)
	}
	return all
}

// A promise is one that can be broken.
type promise string

const (
	duplicate    promise = "duplicates"
	misdelivered promise = "misdelivered"
	spurious     promise = "spurious failures"
	stuck        promise = "stuck ports"
)

var promises = []promise{duplicate, misdelivered, spurious, stuck}

// A Failure is a broken promise.
type Failure struct {
	Promise promise
	What    string
	At      int64 // when it was found out

	// Sender is whose token somebody else has got the answer to, if that is what
	// the failure is. Nothing is wrong with it if that process was dead by then.
	Sender *Sender
}

// A Sender is one incarnation of a process.
type Sender struct{ Process, Incarnation int }

// A Report is what a process tells its parent, now and then.
type Report struct {
	Ready    bool  // others can depend on it from now on
	Tally    Tally // since the last report
	Failures []Failure
}
