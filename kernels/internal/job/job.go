// Package job is what the program that boots kernels and the one that runs tests
// on them say to each other.
package job

// A Job is one run of a program on a kernel.
type Job struct {
	Binary  string   // relative to the root of the tree that the tests need
	Dir     string   // the same, where it is run
	Args    []string // without the program's name
	UID     int      // and GID
	Refuse  []uint32 // options of level SOL_IP that setsockopt and getsockopt refuse with ENOPROTOOPT
	Seconds int      // after which it is killed
}

// A Plan is what is run on one kernel.
type Plan struct {
	Modules []string // loaded beforehand; all others are when the kernel asks for them
	Jobs    []Job
}

// A Line is a part of the report, which comes as one JSON value a line. The
// fields other than Job are set in turn: features first, output and end of each
// job, and Done at the end of it all.
type Line struct {
	Feature *Feature `json:",omitempty"`
	Job     int
	Output  string `json:",omitempty"`
	End     *End   `json:",omitempty"`
	Done    bool   `json:",omitempty"`
}

// A Feature is what has been found out about the kernel.
type Feature struct{ Name, Value string }

// An End is how a job has ended.
type End struct {
	Code    int    // of the process
	Problem string // why there is no code, or one that says nothing
	Seconds float64
}
