// Package inuse says who is on which local port: for reports to people, not for
// the dial path, which asks about one port at a time (package lookup).
package inuse
