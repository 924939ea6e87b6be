// The clients of the soak. Each knows what the guest must have done, whatever was cut.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

type soak struct {
	t       *testing.T
	stop    chan struct{}
	workers sync.WaitGroup

	mu      sync.Mutex
	changed *sync.Cond
	g       *guest
	epoch   int  // counts guests
	cycling bool // what breaks now may

	done        [6]atomic.Int64 // by worker: what it has done
	names       atomic.Int64
	outputBytes int64
	resumed     int
}

func startSoak(t *testing.T, g *guest) *soak {
	s := &soak{t: t, g: g, stop: make(chan struct{})}
	s.changed = sync.NewCond(&s.mu)
	for _, work := range []func(){s.exec, s.exec, s.output, s.terminal, s.transfer, s.watch} {
		s.workers.Go(work)
	}
	s.waitProgress(0)
	return s
}

func (s *soak) end() {
	close(s.stop)
	s.workers.Wait()
}

// did is for when it has ended.
func (s *soak) did() string {
	return fmt.Sprintf("%d commands, %d bytes of output, %d lines typed, %d transfers, %d files seen",
		s.done[0].Load()+s.done[1].Load(), s.outputBytes, s.done[3].Load(), s.done[4].Load(), s.done[5].Load())
}

func (s *soak) streamsResumed() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.resumed
}

// replace exchanges the guest; until it has a new one, errors of the old one are to be expected.
func (s *soak) replace(f func(*guest) *guest) {
	s.mu.Lock()
	s.cycling = true
	g := s.g
	s.mu.Unlock()
	defer func() { // also when the test fails
		s.mu.Lock()
		defer s.mu.Unlock()
		s.epoch++
		s.cycling = false
		s.changed.Broadcast()
	}()
	next := f(g)
	s.mu.Lock()
	s.g = next
	s.mu.Unlock()
}

func (s *soak) stopped() bool {
	select {
	case <-s.stop:
		return true
	default:
		return s.t.Failed()
	}
}

// current is the guest of now.
func (s *soak) current() (*guest, int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.g, s.epoch
}

// broke is told of an error with the guest of that epoch. If a snapshot explains it, it waits for the next guest; else
// the test fails.
func (s *soak) broke(epoch int, what string, err error) (tolerated bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.epoch == epoch && !s.cycling {
		s.t.Errorf("%s: %v (no snapshot was being taken)", what, err)
		return false
	}
	for s.epoch == epoch && s.cycling {
		s.changed.Wait()
	}
	return true
}

// waitProgress waits until every worker has done something since the last time.
func (s *soak) waitProgress(n int) {
	var before [6]int64
	for w := range before {
		before[w] = s.done[w].Load()
	}
	for w := range before {
		deadline := time.Now().Add(patience)
		for s.done[w].Load() == before[w] && !s.t.Failed() {
			if time.Now().After(deadline) {
				s.t.Errorf("worker %d got nothing done after snapshot %d", w, n)
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// call bounds a unary call.
func call() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), patience)
}

// exec runs commands; each is told by its tag, and none may lose its status.
func (s *soak) exec() {
	worker := int(s.names.Add(1) - 1)
	for n := 0; !s.stopped(); n++ {
		code := int32(n % 100)
		tag := fmt.Sprintf("exec-%d-%d", worker, n)
		started := false
		for attempt := 0; ; attempt++ {
			g, epoch := s.current()
			end, start, err := s.execOnce(g, tag, code, attempt > 0)
			started = started || start
			if err == nil {
				if end.ExitCode != code {
					s.t.Errorf("%s: %v, want the exit code %d", tag, end, code)
				}
				break
			}
			if attempt > 0 && !started && connect.CodeOf(err) == connect.CodeNotFound {
				break // the request itself was cut off
			}
			if !s.broke(epoch, tag, err) {
				return
			}
		}
		s.done[worker].Add(1)
	}
}

func (s *soak) execOnce(g *guest, tag string, code int32, again bool) (end *pb.ProcessEvent_EndEvent, started bool, err error) {
	ctx, cancel := call()
	defer cancel()
	var r result
	if again {
		stream, err := g.proc.Connect(ctx, connect.NewRequest(&pb.ConnectRequest{
			Process: &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}}))
		if err != nil {
			return nil, false, err
		}
		defer stream.Close()
		for stream.Receive() {
			r.take(stream.Msg().Event)
		}
		err = stream.Err()
		if err == nil && r.end == nil {
			err = errors.New("a stream without an end")
		}
		return r.end, r.pid != 0, err
	}
	request := newStart("/workload", "exit", strconv.Itoa(int(code)))
	request.Msg.Tag = &tag
	stream, err := g.proc.Start(ctx, request)
	if err != nil {
		return nil, false, err
	}
	defer stream.Close()
	for stream.Receive() {
		r.take(stream.Msg().Event)
	}
	err = stream.Err()
	if err == nil && r.end == nil {
		err = errors.New("a stream without an end")
	}
	return r.end, r.pid != 0, err
}

// follow reads a process's output from an offset, over all guests, and hands each piece to f, until f is content.
func (s *soak) follow(what string, pid uint32, f func(piece []byte) (enough bool)) {
	offset := 0
	for first := true; ; first = false {
		g, epoch := s.current()
		err := func() error {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			request := connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)})
			request.Header().Set("Envd-Output-From", strconv.Itoa(offset))
			stream, err := g.proc.Connect(ctx, request)
			if err != nil {
				return err
			}
			defer stream.Close()
			for n := 0; stream.Receive(); n++ {
				if n == 0 {
					at, lost := stream.ResponseHeader().Get("Envd-Output-Offset"), stream.ResponseHeader().Get("Envd-Output-Lost")
					if at != strconv.Itoa(offset) || lost != "0" {
						s.t.Errorf("%s: resumed at %s with %s bytes lost, asked for %d", what, at, lost, offset)
						return nil
					}
					if !first {
						s.mu.Lock()
						s.resumed++
						s.mu.Unlock()
					}
				}
				if end := stream.Msg().Event.GetEnd(); end != nil && !s.stopped() {
					s.t.Errorf("%s: it ended: %v", what, end)
					return nil
				}
				if s.stopped() {
					return nil
				}
				data := stream.Msg().Event.GetData()
				piece := append(append(data.GetStdout(), data.GetStderr()...), data.GetPty()...)
				offset += len(piece)
				if f(piece) || s.t.Failed() {
					return nil
				}
			}
			if err := stream.Err(); err != nil {
				return err
			}
			return errors.New("a stream without an end")
		}()
		if err == nil || !s.broke(epoch, what, err) {
			return
		}
	}
}

// output follows a process that never stops talking and checks each byte.
func (s *soak) output() {
	g, _ := s.current()
	pid, err := g.background("", "/workload", "output", "0", "2")
	if err != nil {
		s.t.Error(err)
		return
	}
	offset := 0
	s.follow("output", pid, func(piece []byte) bool {
		for _, b := range piece {
			want := byte('\n')
			if at := offset % record; at < record-1 {
				want = fmt.Appendf(nil, "%015d", offset-at)[at]
			}
			if b != want {
				s.t.Errorf("output: at offset %d stands %q, want %q", offset, b, want)
				return true
			}
			offset++
		}
		s.outputBytes = int64(offset)
		s.done[2].Add(1)
		return s.stopped()
	})
	s.kill(pid)
}

// terminal types lines and waits for each.
func (s *soak) terminal() {
	g, _ := s.current()
	request := newStart("/workload", "cat")
	request.Msg.Pty = &pb.PTY{Size: &pb.PTY_Size{Cols: 80, Rows: 24}}
	pid, err := g.startDetached(request, "")
	if err != nil {
		s.t.Error(err)
		return
	}
	var mu sync.Mutex
	var screen bytes.Buffer
	seen := make(chan struct{}, 1)
	quit := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		s.follow("terminal", pid, func(piece []byte) bool {
			mu.Lock()
			screen.Write(piece)
			mu.Unlock()
			select {
			case seen <- struct{}{}:
			default:
			}
			select {
			case <-quit:
				return true
			default:
				return false
			}
		})
	})
	for n := 0; !s.stopped(); n++ {
		line := fmt.Sprintf("line %d.", n)
		g, epoch := s.current()
		ctx, cancel := call()
		_, err := g.proc.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPID(pid),
			Input: &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte(line + "\n")}}}))
		cancel()
		if err != nil {
			if !s.broke(epoch, "terminal", err) {
				break
			}
			continue // whether it was typed is not known
		}
		deadline := time.After(patience)
		for found := false; !found && !s.stopped(); {
			mu.Lock()
			found = strings.Count(screen.String(), line) >= 2 // the echo, and what cat says
			mu.Unlock()
			if !found {
				select {
				case <-seen:
				case <-time.After(time.Second):
				case <-deadline:
					g, epochNow := s.current()
					s.t.Errorf("terminal: %q, sent at epoch %d, now %d, is not on the screen, which ends with %q; the agent has %q",
						line, epoch, epochNow, tail(screen.String()), tail(g.everything(pid)))
				}
			}
		}
		s.done[3].Add(1)
	}
	close(quit)
	s.kill(pid)
	wg.Wait()
}

// transfer writes a file and reads it back. A broken upload leaves what was there, or is done whole; that may still be going
// on when the next begins, which therefore goes to another file.
func (s *soak) transfer() {
	name, before := 0, []byte(nil)
	for version := 0; !s.stopped(); version++ {
		path := fmt.Sprintf("/transferred%d", name)
		next := bytes.Repeat(fmt.Appendf(nil, "version %d\n", version), 20_000)
		g, epoch := s.current()
		written := true
		if err := g.upload(path, next); err != nil {
			if !s.broke(epoch, "upload", err) {
				return
			}
			written = false
		}
		for {
			g, epoch := s.current()
			got, err := g.download(path)
			missing := errors.Is(err, errMissing)
			if err != nil && !missing {
				if !s.broke(epoch, "download", err) {
					return
				}
				continue
			}
			if missing && (written || before != nil) || !missing && !bytes.Equal(got, next) && (written || !bytes.Equal(got, before)) {
				s.t.Errorf("download of %s: %v, %d bytes, which are neither version %d nor what was there before: %.20q",
					path, err, len(got), version, got)
				return
			}
			before = got
			break
		}
		if !written {
			name, before = name+1, nil
		}
		s.done[4].Add(1)
	}
}

// watch makes files in a watched directory; each must be told of.
func (s *soak) watch() {
	ctx, cancel := call()
	defer cancel()
	g, _ := s.current()
	created, err := g.fs.CreateWatcher(ctx, connect.NewRequest(&pb.CreateWatcherRequest{Path: "/watched"}))
	if err != nil {
		s.t.Errorf("watch: %v", err)
		return
	}
	id := created.Msg.WatcherId
	for n := 0; !s.stopped(); n++ {
		name := fmt.Sprintf("f%d", n)
		g, epoch := s.current()
		if err := g.upload("/watched/"+name, []byte("x")); err != nil {
			if !s.broke(epoch, "watch", err) {
				return
			}
			continue
		}
		for deadline, found := time.Now().Add(patience), false; !found; {
			g, epoch := s.current()
			ctx, cancel := call()
			events, err := g.fs.GetWatcherEvents(ctx, connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: id}))
			cancel()
			if err != nil {
				if !s.broke(epoch, "watch", err) {
					return
				}
				break // the events may have been in the answer that was lost
			}
			for _, e := range events.Msg.Events {
				found = found || e.Name == name && e.Type == pb.EventType_EVENT_TYPE_CREATE
			}
			if time.Now().After(deadline) {
				s.t.Errorf("watch: nothing was told of %s", name)
				return
			}
			if !found {
				time.Sleep(10 * time.Millisecond)
			}
		}
		s.done[5].Add(1)
	}
}

func (s *soak) kill(pid uint32) {
	g, _ := s.current()
	if err := g.kill(pid); err != nil && !s.t.Failed() {
		s.t.Error(err)
	}
}

func tail(s string) string { return s[max(0, len(s)-100):] }

// everything is what the agent still has of a process's output.
func (g *guest) everything(pid uint32) string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	request := connect.NewRequest(&pb.ConnectRequest{Process: byPID(pid)})
	request.Header().Set("Envd-Output-From", "all")
	stream, err := g.proc.Connect(ctx, request)
	if err != nil {
		return err.Error()
	}
	defer stream.Close()
	var all []byte
	for stream.Receive() {
		data := stream.Msg().Event.GetData()
		all = append(append(append(all, data.GetStdout()...), data.GetStderr()...), data.GetPty()...)
	}
	return fmt.Sprintf("%s (%d bytes, from %s, %s lost)", all, len(all), stream.ResponseHeader().Get("Envd-Output-Offset"), stream.ResponseHeader().Get("Envd-Output-Lost"))
}
