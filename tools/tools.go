// Package tools pins the programs that the Makefile runs on the other modules.
// They are the tool directives of its go.mod.
package tools
