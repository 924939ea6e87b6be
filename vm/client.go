// Commands in a guest through its agent.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

// result is what became of a command.
type result struct {
	pid            uint32
	stdout, stderr bytes.Buffer
	end            *pb.ProcessEvent_EndEvent
}

func newStart(cmd string, args ...string) *connect.Request[pb.StartRequest] {
	root := "/" // the home of root is not in the image
	r := connect.NewRequest(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: cmd, Args: args, Cwd: &root}})
	r.Header().Set("Envd-Extensions", "1")
	return r
}

// run runs a command to its end.
func (g *guest) run(cmd string, args ...string) (*result, error) {
	return g.runTagged("", cmd, args...)
}

func (g *guest) runTagged(tag, cmd string, args ...string) (*result, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	request := newStart(cmd, args...)
	if tag != "" {
		request.Msg.Tag = &tag
	}
	stream, err := g.proc.Start(ctx, request)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", cmd, strings.Join(args, " "), err)
	}
	defer stream.Close()
	r := &result{}
	for stream.Receive() {
		r.take(stream.Msg().Event)
	}
	err = stream.Err()
	if err == nil && r.end == nil {
		err = errors.New("no end")
	}
	if err != nil {
		return r, fmt.Errorf("%s %s: the stream broke: %w\n%s%s", cmd, strings.Join(args, " "), err, r.stdout.String(), r.stderr.String())
	}
	return r, nil
}

func (r *result) take(e *pb.ProcessEvent) {
	switch e := e.Event.(type) {
	case *pb.ProcessEvent_Start:
		r.pid = e.Start.Pid
	case *pb.ProcessEvent_Data:
		r.stdout.Write(e.Data.GetStdout())
		r.stderr.Write(e.Data.GetStderr())
	case *pb.ProcessEvent_End:
		r.end = e.End
	}
}

// background starts a command and returns its pid once its first output is there, or at once if ready is empty.
func (g *guest) background(ready, cmd string, args ...string) (uint32, error) {
	return g.startDetached(newStart(cmd, args...), ready)
}

// startDetached waits without a deadline of the context's: that would become the command's own.
func (g *guest) startDetached(request *connect.Request[pb.StartRequest], ready string) (uint32, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer time.AfterFunc(patience, cancel).Stop()
	stream, err := g.proc.Start(ctx, request)
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	r := &result{}
	for stream.Receive() {
		r.take(stream.Msg().Event)
		if r.end != nil {
			break
		}
		if r.pid != 0 && strings.Contains(r.stdout.String(), ready) {
			return r.pid, nil
		}
	}
	return r.pid, fmt.Errorf("%v: ended early: %v %v\n%s%s", request.Msg, stream.Err(), r.end, r.stdout.String(), r.stderr.String())
}

// post sends a body and returns the answer.
func (g *guest) post(path, body string) (status int, answer string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, "POST", g.url+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	return g.do(r)
}

func (g *guest) get(path string) (status int, answer string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, "GET", g.url+path, nil)
	if err != nil {
		return 0, "", err
	}
	return g.do(r)
}

func (g *guest) do(r *http.Request) (int, string, error) {
	resp, err := g.http.Do(r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// ask sends a question to the helper's oracle, over UDP so that the way takes no longer than it must.
func (g *guest) ask(question string) (answer string, sent, received time.Time, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := g.network.dial(ctx, "udp4", g.address+":9999")
	if err != nil {
		return "", sent, received, err
	}
	defer conn.Close()
	buf := make([]byte, 1500)
	for range 20 {
		sent = time.Now()
		if _, err = conn.Write([]byte(question)); err == nil {
			conn.SetReadDeadline(time.Now().Add(time.Second))
			var n int
			if n, err = conn.Read(buf); err == nil {
				return string(buf[:n]), sent, time.Now(), nil
			}
		}
	}
	return "", sent, received, fmt.Errorf("the oracle: %w", err)
}
