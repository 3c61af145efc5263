package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
)

// dial joins standard input and output with a connection.
func dial(args []string, stdout, stderr io.Writer) int {
	return dialWith(os.Stdin, args, stdout, stderr)
}

// dialWith leaves interrupts and a closed standard output to what they do to any
// program: to end it, without a word.
func dialWith(stdin io.Reader, args []string, stdout, stderr io.Writer) int {
	complain := func(err error) { fmt.Fprintf(stderr, "connectx dial: %v\n", err) }
	var o dialOptions
	if code, done := parsed("dial", o.parse(args, stdout), stderr); done {
		return code
	}
	ctx := context.Background()
	connected := func(net.Conn) {}
	if o.trace {
		ctx, connected = traceTo(ctx, stderr)
	}
	conn, err := o.dialer.DialContext(ctx, o.network, o.address)
	if err != nil {
		complain(err)
		return exitFailed
	}
	defer conn.Close()
	connected(conn)
	if tcp, ok := conn.(*net.TCPConn); ok {
		err = copyStream(tcp, stdin, stdout)
	} else {
		err = copyDatagrams(conn, stdin, stdout, o.wait)
	}
	if err != nil {
		complain(err)
		return exitFailed
	}
	return exitOK
}
