//go:build linux

// Command mutations breaks one line of the library at a time, on purpose, and
// shows what goes red: the unit tests, the stress program, or the model of the
// lock. A line that can be broken and nothing notices lacks a test, and the exit
// status is 1 then.
//
// The tree is never edited. The go command is told to read a broken copy in place
// of the file (-overlay), so an interrupt leaves nothing behind.
//
// What is broken, and who has to notice, is in the list (list_*.go). First all of
// those run with nothing broken, for a red is worth something only if it was green.
package main
