// What a host does with its sandboxes, from end to end, and what it does when something fails.

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

// mustCreate makes a sandbox that ends with the test.
func (h *host) mustCreate(t *testing.T, o options, init string) *sandbox {
	t.Helper()
	h.images, h.log, o.prepared = needGuests(t), t.Logf, prepared
	s, err := h.create(o, ids("sandbox-1", "template-1"), init)
	if err != nil {
		t.Fatal(err)
	}
	s.finishes(t)
	return s
}

func (s *sandbox) finishes(t *testing.T) {
	t.Cleanup(func() { s.finish(t); s.destroy() })
}

// keepsAlive tells whether a connection outlives its answer, by a request that does not end what was prepared.
func (s *sandbox) keepsAlive(t *testing.T) bool {
	t.Helper()
	resp, err := s.control.Get(s.url + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, resp.Body)
	return !resp.Close
}

// forwards tells whether what listens on the guest's loopback interface is reachable from outside.
func (s *sandbox) forwards() error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := s.network.dial(ctx, "tcp4", guestAddress+":8081")
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, "echo"); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 4))
	return err
}

// knows checks what a sandbox has learned of itself: its names, and who it acts as where nobody is named.
func (s *sandbox) knows(t *testing.T, uid string) {
	t.Helper()
	for name, want := range map[string]string{"SANDBOX": "true", "SANDBOX_ID": s.ids["instanceID"], "TEMPLATE_ID": s.ids["envID"]} {
		waitFor(t, ".WRENN_"+name, func() error {
			content, err := s.download("/run/wrenn/.WRENN_" + name)
			if err == nil && string(content) != want {
				err = fmt.Errorf("%q, want %q", content, want)
			}
			return err
		})
	}
	for path, want := range map[string]string{"/proc/self/environ": "WRENN_SANDBOX_ID=" + s.ids["instanceID"] + "\x00",
		"/proc/self/status": "\nUid:\t" + uid + "\t"} {
		if r, err := s.run("/workload", "cat", path); err != nil || !strings.Contains("\x00"+r.stdout.String(), want) {
			t.Errorf("%s of %s: %v, %q lacks %q", path, s.ids["instanceID"], err, r.stdout.String(), want)
		}
	}
}

// endOf asks how a process ended that was started long ago.
func (s *sandbox) endOf(tag string) (*pb.ProcessEvent_EndEvent, error) {
	ctx, cancel := call()
	defer cancel()
	stream, err := s.proc.Connect(ctx, connect.NewRequest(&pb.ConnectRequest{Process: &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}}))
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	var r result
	for stream.Receive() {
		r.take(stream.Msg().Event)
	}
	return r.end, stream.Err()
}

// serve does what the host does for those whose sandbox it is: small files as forms and large ones as streams, directories without a
// name of a user, a terminal that is found again by its tag after its stream was dropped.
func (s *sandbox) serve(t *testing.T) {
	t.Helper()
	ctx, cancel := call()
	defer cancel()
	must := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	const path = "/served/by the host"
	for name, content := range map[string]string{"small": "x", "streamed": strings.Repeat("streamed\n", 500_000)} {
		body, feed := io.Pipe()
		form := multipart.NewWriter(feed)
		go func() {
			part, err := form.CreateFormFile("file", "upload")
			if err == nil {
				_, err = io.WriteString(part, content)
			}
			feed.CloseWithError(errors.Join(err, form.Close()))
		}()
		query := url.Values{"path": {path + "/" + name}, "username": {"root"}}.Encode()
		resp, err := s.control.Post(s.url+"/files?"+query, form.FormDataContentType(), body)
		must(name, err)
		resp.Body.Close()
		text, err := s.answer(2*time.Minute, "GET", "/files?"+query, "", 200)
		if err != nil || resp.StatusCode != 200 || string(text) != content {
			t.Errorf("%s: %s, then %d bytes of %d, %v", name, resp.Status, len(text), len(content), err)
		}
	}
	_, err := s.fs.MakeDir(ctx, connect.NewRequest(&pb.MakeDirRequest{Path: path + "/directory"}))
	must("MakeDir", err)
	list, err := s.fs.ListDir(ctx, connect.NewRequest(&pb.ListDirRequest{Path: path, Depth: 1}))
	if must("ListDir", err); len(list.Msg.Entries) != 3 {
		t.Errorf("ListDir: %v", list.Msg)
	}
	_, err = s.fs.Remove(ctx, connect.NewRequest(&pb.RemoveRequest{Path: "/served"}))
	must("Remove", err)

	tag, off := "terminal of a host", false
	terminal := newStart("/workload", "cat")
	terminal.Msg.Tag, terminal.Msg.Stdin = &tag, &off
	terminal.Msg.Pty = &pb.PTY{Size: &pb.PTY_Size{Cols: 80, Rows: 24}}
	pid, err := s.startDetached(terminal, "") // drops the stream after `start`
	must("Start", err)
	byTag := &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}
	stream, err := s.proc.Connect(ctx, connect.NewRequest(&pb.ConnectRequest{Process: byTag}))
	must("Connect", err)
	defer stream.Close()
	if !stream.Receive() || stream.Msg().Event.GetStart().GetPid() != pid {
		t.Fatalf("Connect: %v, %v", stream.Msg(), stream.Err())
	}
	_, err = s.proc.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: byTag, Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 100, Rows: 30}}}))
	must("Update", err)
	input := &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("typed\n")}}
	_, err = s.proc.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byTag, Input: input}))
	must("SendInput", err)
	var screen strings.Builder
	for strings.Count(screen.String(), "typed") < 2 && stream.Receive() { // the echo, and what cat says
		screen.Write(stream.Msg().Event.GetData().GetPty())
	}
	_, err = s.proc.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{Process: byTag, Signal: pb.Signal_SIGNAL_SIGKILL}))
	must("SendSignal", err)
	var end *pb.ProcessEvent_EndEvent
	for stream.Receive() {
		end = stream.Msg().Event.GetEnd()
	}
	if strings.Count(screen.String(), "typed") < 2 || end == nil || stream.Err() != nil {
		t.Errorf("the terminal: %q, %v, %v", screen.String(), end, stream.Err())
	}
}

// TestHost leads a sandbox through its life while clients use it: /init never comes, a pause fails when all is prepared, one
// succeeds, three clones are made of it side by side, and the sandbox itself goes on.
func TestHost(t *testing.T) {
	t.Parallel()
	const backstop = 6 * time.Second
	h := &host{}
	s := h.mustCreate(t, options{root: "rw", args: []string{"--prepared-timeout", backstop.String()}}, noInit)
	if !regexp.MustCompile(`^\d+\.\d+\.\d+$`).MatchString(s.version) {
		t.Errorf("the version is %q", s.version)
	}
	s.knows(t, "0")
	if err := s.upload("/etc/passwd", []byte("root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")); err != nil {
		t.Fatal(err)
	}
	s.mustRun(t, "/workload", "mkdir", "/watched")
	s.start(t, "listening", "/workload", "listen", "127.0.0.1:8081")
	waitFor(t, "a forwarder", s.forwards)
	checksum := s.start(t, "checking", "/workload", "memory", "8")
	if _, err := s.runTagged("early", "/workload", "exit", "7"); err != nil {
		t.Fatal(err)
	}
	s.serve(t)
	load := startSoak(t, s.guest)

	// A pause that fails after its preparation. The agent is told nothing.
	idle := s.idleConnections(t, 5)
	closed := 0
	var prepared time.Duration
	sampled := s.sampled.Load()
	load.replace(func(g *guest) *guest {
		err := h.pause(s, "/no/such/directory/state")
		began := time.Now()
		if err == nil {
			t.Error("a pause into a directory that is not there succeeded")
			return g
		}
		for _, conn := range idle {
			conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			if n, err := conn.Read(make([]byte, 1)); err == io.EOF {
				closed++
			} else {
				t.Errorf("an idle connection: %d bytes, %v, want its end", n, err)
			}
			conn.Close()
		}
		if s.keepsAlive(t) {
			t.Error("connections are kept while it is prepared")
		}
		if err := s.forwards(); err == nil {
			t.Error("a forwarder runs while it is prepared")
		}
		waitFor(t, "the agent helps itself", func() error {
			if !s.keepsAlive(t) {
				return errors.New("connections are not kept")
			}
			return s.forwards()
		})
		prepared = time.Since(began)
		return g
	})
	if sampled = s.sampled.Load() - sampled; sampled < int64(backstop/time.Second)/2 {
		t.Errorf("%d samples in %v", sampled, prepared)
	}
	load.waitProgress(1)
	resumed := load.streamsResumed()
	t.Logf("a pause failed: %d idle connections closed; recovered after %v, limit %v; %d samples meanwhile; %d streams resumed",
		closed, prepared.Round(100*time.Millisecond), backstop, sampled, resumed)

	// A pause that succeeds, clones of it, and the sandbox itself.
	path := filepath.Join(t.TempDir(), "state")
	load.replace(func(g *guest) *guest {
		if err := h.pause(s, path); err != nil {
			t.Error(err)
			return g
		}
		var wg sync.WaitGroup
		for n, of := range []struct{ init, uid string }{
			{`{"defaultUser":"user","envVars":{"CLONE":"0"}}`, "1000"}, {noInit, "0"}, {`{"defaultUser":7}`, "0"}} {
			wg.Go(func() {
				c, err := h.clone(s, path, ids(fmt.Sprintf("clone-%d", n), "template-2"), of.init)
				if err != nil {
					t.Error(err)
					return
				}
				c.finishes(t)
				c.knows(t, of.uid)
				if _, envs, err := c.get("/envs"); err != nil || strings.Contains(envs, `"CLONE":"0"`) != (n == 0) {
					t.Errorf("clone %d: %s, %v", n, envs, err)
				}
				if end, err := c.endOf("early"); err != nil || end.GetExitCode() != 7 {
					t.Errorf("clone %d: the process that ended before: %v, %v", n, end, err)
				}
				c.checksumsHold(t, checksum)
				waitFor(t, "a forwarder", c.forwards)
				if !c.keepsAlive(t) || c.missed.Load() > 0 || c.sampled.Load() == 0 {
					t.Errorf("clone %d: %d samples, %d missed", n, c.sampled.Load(), c.missed.Load())
				}
				c.destroy()
			})
		}
		wg.Wait()
		if t.Failed() {
			return g
		}
		next, err := h.resume(s, path, "")
		if err != nil {
			t.Error(err)
			return g
		}
		next.finishes(t)
		s = next
		return s.guest
	})
	load.waitProgress(2)
	load.end()
	if t.Failed() {
		return
	}
	s.knows(t, "0")
	s.checksumsHold(t, checksum)
	waitFor(t, "a forwarder", s.forwards)
	if end, err := s.endOf("early"); err != nil || end.GetExitCode() != 7 {
		t.Errorf("the process that ended before: %v, %v", end, err)
	}
	if s.missed.Load() > 0 {
		t.Errorf("%d requests for metrics failed", s.missed.Load())
	}
	t.Logf("paused, cloned 3 times, resumed: %s; %d streams resumed", load.did(), load.streamsResumed()-resumed)
}

// idleConnections are such as a proxy keeps: each has had one answer.
func (s *sandbox) idleConnections(t *testing.T, n int) (conns []net.Conn) {
	t.Helper()
	for range n {
		ctx, cancel := call()
		defer cancel()
		conn, err := s.dial(ctx, "tcp4", guestAddress+":49983")
		if err == nil {
			_, err = io.WriteString(conn, "GET /envs HTTP/1.1\r\nHost: sandbox\r\n\r\n")
		}
		for buf := make([]byte, 1); err == nil && buf[0] != '}'; {
			_, err = conn.Read(buf)
		}
		if err == nil {
			_, err = io.ReadFull(conn, make([]byte, 1)) // the end of the line
		}
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	return conns
}

// TestFrozenWhilePreparing: the host does not wait for the preparation to end. The sandbox that goes on from such a snapshot is
// told so by /init, and does not stay prepared for another.
func TestFrozenWhilePreparing(t *testing.T) {
	t.Parallel()
	h := &host{prepare: time.Second}
	s := h.mustCreate(t, options{root: "rw", memory: 128, slowDisk: true}, noInit)
	s.start(t, "listening", "/workload", "listen", "127.0.0.1:8081")
	waitFor(t, "a forwarder", s.forwards)
	s.mustRun(t, "/workload", "dirty", "/big", "12")
	path := filepath.Join(t.TempDir(), "state")
	gaveUp := false
	h.log = func(string, ...any) { gaveUp = true }
	if err := h.pause(s, path); err != nil || !gaveUp {
		t.Fatalf("%v; the preparation was waited for: %v", err, !gaveUp)
	}
	began := time.Now()
	next, err := h.resume(s, path, "")
	if err != nil {
		t.Fatal(err)
	}
	next.finishes(t)
	if !next.keepsAlive(t) {
		t.Error("after /init it is prepared, or becomes so")
	}
	waitFor(t, "a forwarder", next.forwards)
	t.Logf("resumed and recovered within %v", time.Since(began).Round(time.Millisecond))
}

// TestFrozenSnapshot: the other way to pause, all of it at once. What was written before is on the disk, which needs no recovery;
// a clone is thawed by /init alone, or step by step.
func TestFrozenSnapshot(t *testing.T) {
	t.Parallel()
	h := &host{freezes: true}
	s := h.mustCreate(t, options{root: "rw"}, "")
	s.start(t, "ready", "/workload", "oracle")
	s.mustRun(t, "/workload", "dirty", "/dirty", "8")
	path := filepath.Join(t.TempDir(), "state")
	began := time.Now()
	if err := h.pause(s, path); err != nil {
		t.Fatal(err)
	}
	paused := time.Since(began)
	s.leftClean(t, "/dirty", 8<<20)
	var wg sync.WaitGroup
	for n, init := range []string{"", noInit} {
		wg.Go(func() {
			began := time.Now()
			c, err := h.clone(s, path, ids(fmt.Sprintf("clone-%d", n), "template-2"), init)
			if err != nil {
				t.Error(err)
				return
			}
			c.finishes(t)
			if _, _, _, err := c.ask("clock"); err != nil {
				t.Errorf("clone %d: a process stands still: %v", n, err)
			}
			if err := c.upload("/after", []byte("x")); err != nil {
				t.Errorf("clone %d: a file is not written: %v", n, err)
			}
			t.Logf("clone %d is thawed and answers after %v", n, time.Since(began).Round(time.Millisecond))
		})
	}
	wg.Wait()
	t.Logf("frozen and saved in %v", paused.Round(time.Millisecond))
}
