package main

import (
	"context"
	"fmt"
	"net/http"

	coder "github.com/coder/websocket"
	gorilla "github.com/gorilla/websocket"
)

// A conn is a WebSocket in gorilla's words.
type conn interface {
	WriteMessage(messageType int, data []byte) error
	ReadMessage() (messageType int, data []byte, err error)
}

// A coderConn is a conn of coder/websocket.
type coderConn struct {
	ctx context.Context
	*coder.Conn
}

func (c coderConn) WriteMessage(messageType int, data []byte) error {
	return c.Write(c.ctx, coder.MessageType(messageType), data)
}

func (c coderConn) ReadMessage() (messageType int, data []byte, err error) {
	t, data, err := c.Read(c.ctx)
	return int(t), data, err
}

// ask sends text and expects it back.
func ask(c conn, text string) error {
	if err := c.WriteMessage(gorilla.TextMessage, []byte(text)); err != nil {
		return err
	}
	_, answer, err := c.ReadMessage()
	if err != nil {
		return err
	}
	if string(answer) != text {
		return fmt.Errorf("the answer to %q is %q", text, answer)
	}
	return nil
}

// echo is the server.
func echo(w http.ResponseWriter, r *http.Request) {
	ws, err := coder.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer ws.CloseNow()
	for {
		t, data, err := ws.Read(r.Context())
		if err != nil || ws.Write(r.Context(), t, data) != nil {
			return
		}
	}
}
