// A client of QEMU's machine protocol, as far as the tests need it. Source: docs/interop/qmp-spec.

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

type qmp struct {
	conn net.Conn

	mu      sync.Mutex // serialises commands
	replies chan qmpMessage

	events chan qmpMessage // those that nobody waits for are dropped once it is full
}

type qmpMessage struct {
	QMP    json.RawMessage
	Return json.RawMessage
	Error  *struct{ Class, Desc string }
	Event  string
	Data   struct {
		Guest  bool
		Reason string
	}
}

// connectQMP waits for QEMU to make its socket.
func connectQMP(path string, gone <-chan struct{}) (*qmp, error) {
	for {
		conn, err := net.Dial("unix", path)
		if err == nil {
			q := &qmp{conn: conn, replies: make(chan qmpMessage), events: make(chan qmpMessage, 64)}
			go q.read()
			_, err := q.command("qmp_capabilities", nil)
			return q, err
		}
		select {
		case <-gone:
			return nil, errors.New("QEMU ended at its start")
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (q *qmp) read() {
	defer close(q.replies)
	defer close(q.events)
	for in := json.NewDecoder(q.conn); ; {
		var m qmpMessage
		if in.Decode(&m) != nil {
			return
		}
		switch {
		case m.QMP != nil: // the greeting
		case m.Event != "":
			select {
			case q.events <- m:
			default:
			}
		default:
			q.replies <- m
		}
	}
}

func (q *qmp) command(name string, arguments any) (json.RawMessage, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	request := map[string]any{"execute": name}
	if arguments != nil {
		request["arguments"] = arguments
	}
	err := json.NewEncoder(q.conn).Encode(request)
	if err == nil {
		reply, ok := <-q.replies
		switch {
		case !ok:
			err = io.ErrUnexpectedEOF
		case reply.Error != nil:
			err = errors.New(reply.Error.Desc)
		default:
			return reply.Return, nil
		}
	}
	return nil, fmt.Errorf("QMP %s: %w", name, err)
}

// status asks a query-* command for its member `status`.
func (q *qmp) status(query string) (string, error) {
	reply, err := q.command(query, nil)
	var s struct{ Status string }
	if err == nil {
		err = json.Unmarshal(reply, &s)
	}
	return s.Status, err
}
