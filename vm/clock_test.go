// The clock of a guest that is set, by years: what waits for a time waits as long as it would have, and what tells the time tells
// the new one.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

const year = 365 * 24 * time.Hour

// TestClockIsSet: by a process of the guest and by /init, forward and back, in a guest that has booted and in one that was resumed.
func TestClockIsSet(t *testing.T) {
	t.Parallel()
	const deadline, retention, backstop = 2 * time.Second, 4 * time.Second, 4 * time.Second
	h := &host{}
	s := h.mustCreate(t, options{root: "rw", memory: 128, rtc: "2020-02-02T02:02:02",
		args: []string{"--retain-time", retention.String(), "--prepared-timeout", backstop.String()}}, noInit)
	s.start(t, "ready", "/workload", "oracle")
	s.mustRun(t, "/workload", "mkdir", "/watched")
	if e := s.clockError(t, time.Until(time.Date(2020, 2, 2, 2, 2, 2, 0, time.UTC))); e < -time.Second || e > patience {
		t.Fatalf("the clock is %v off what the machine's showed at its start", e)
	}
	set := func(by time.Duration) func() {
		return func() { s.mustRun(t, "/workload", "clock", strconv.Itoa(int(by/time.Second))) }
	}
	init := func() { s.init(t, timestamp(time.Now())) }
	for _, step := range []struct {
		name          string
		before, set   func()
		ahead         time.Duration // of the true time, afterwards
		staysPrepared bool          // if it was
	}{
		{"/init, six years forward", nil, init, 0, false},
		{"settimeofday, a year forward", nil, set(year), year, true},
		{"/init, a year back", nil, init, 0, false},
		{"settimeofday, a year back", nil, set(-year), -year, true},
		{"/init after a resume, a year forward", func() {
			path := filepath.Join(t.TempDir(), "state")
			err := h.pause(s, path)
			if err == nil {
				s, err = h.resume(s, path, "")
			}
			if err != nil {
				t.Fatal(err)
			}
			s.finishes(t)
		}, init, 0, false},
	} {
		if step.before != nil {
			step.before()
		}
		// A process that has ended, a preparation, one that has a deadline, a stream with keep-alives, a watcher that is asked.
		tag, endedAfter := "ended before "+step.name, time.Now()
		if _, err := s.runTagged(tag, "/workload", "exit", "7"); err != nil {
			t.Fatal(err)
		}
		stop, preparedAfter := func() {}, time.Now()
		if step.staysPrepared {
			s.prepare(t)
		} else {
			stop = watchHealth(t, s.guest, 10*time.Second)
		}
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		defer time.AfterFunc(2*patience, cancel).Stop() // a deadline of the context's would be the commands'
		w, err := s.fs.CreateWatcher(ctx, connect.NewRequest(&pb.CreateWatcherRequest{Path: "/watched"}))
		if err != nil {
			t.Fatal(err)
		}
		limited := newStart("/workload", "sleep", "3600")
		limited.Header().Set("Connect-Timeout-Ms", strconv.Itoa(int(deadline/time.Millisecond)))
		limitedAfter := time.Now()
		over, alive := make(chan error, 1), make(chan int, 1)
		go func() { over <- receive(s.proc.Start(ctx, limited))(nil) }()
		kept := newStart("/workload", "sleep", "3600")
		kept.Header().Set("Keepalive-Ping-Interval", "1")
		keptAfter := time.Now()
		go func() {
			n := 0
			receive(s.proc.Start(ctx, kept))(func(e *pb.ProcessEvent) bool {
				if e.GetKeepalive() != nil {
					n++
				}
				return n < 3
			})
			alive <- n
		}()

		step.set()

		if e := s.clockError(t, step.ahead); e < -patience || e > patience {
			t.Errorf("%s: the clock is %v off: this test tests nothing", step.name, e)
		}
		now := func() time.Time { return time.Now().Add(step.ahead) }
		told := func(what string, at time.Time) {
			if off := at.Sub(now()); off < -patience || off > patience {
				t.Errorf("%s: %s says %v, %v off", step.name, what, at, off)
			}
		}
		if end, err := s.endOf(tag); err != nil && time.Since(endedAfter) < retention || err == nil && end.GetExitCode() != 7 {
			t.Errorf("%s: a process that has ended: %v, %v", step.name, end, err)
		}
		if step.staysPrepared && s.keepsAlive(t) && time.Since(preparedAfter) < backstop {
			t.Errorf("%s: it is prepared no more after %v", step.name, time.Since(preparedAfter))
		}
		if err := s.upload("/watched/file", []byte(step.name)); err != nil {
			t.Error(err)
		}
		stat, err := s.fs.Stat(ctx, connect.NewRequest(&pb.StatRequest{Path: "/watched/file"}))
		if err != nil {
			t.Fatal(err)
		}
		told("the file", stat.Msg.Entry.ModifiedTime.AsTime())
		_, text, err := s.get("/metrics")
		var figures struct {
			TS  int64   `json:"ts"`
			CPU float64 `json:"cpu_used_pct"`
		}
		if err := errors.Join(err, json.Unmarshal([]byte(text), &figures)); err != nil || figures.CPU < 0 || figures.CPU > 100 {
			t.Errorf("%s: metrics: %v, %s", step.name, err, text)
		}
		told("/metrics", time.Unix(figures.TS, 0))
		waitFor(t, "the watcher", func() error {
			events, err := s.fs.GetWatcherEvents(ctx, connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: w.Msg.WatcherId}))
			if err == nil && len(events.Msg.Events) == 0 {
				err = errors.New("no event")
			}
			return err
		})
		err = <-over
		if took := time.Since(limitedAfter); connect.CodeOf(err) != connect.CodeDeadlineExceeded || took < deadline {
			t.Errorf("%s: a deadline of %v: %v after %v", step.name, deadline, err, took)
		}
		n := <-alive
		if took := time.Since(keptAfter); n != 3 || took < 3*time.Second-100*time.Millisecond {
			t.Errorf("%s: %d keep-alives within %v", step.name, n, took)
		}
		keptFor := time.Since(keptAfter)
		waitFor(t, "what has ended is forgotten", func() error {
			if _, err := s.endOf(tag); connect.CodeOf(err) != connect.CodeNotFound {
				return fmt.Errorf("%v", err)
			}
			return nil
		})
		if took := time.Since(endedAfter); took < retention {
			t.Errorf("%s: forgotten after %v", step.name, took)
		}
		forgotten := time.Since(endedAfter)
		waitFor(t, "it is not prepared", func() error {
			if !s.keepsAlive(t) {
				return errors.New("connections are not kept")
			}
			return nil
		})
		recovered := time.Since(preparedAfter)
		stop()
		lines := strings.Split(strings.TrimSpace(s.console.text()), "\n")
		var line struct{ Timestamp time.Time }
		if err := json.Unmarshal([]byte(lines[len(lines)-1]), &line); err != nil {
			t.Errorf("%s: %v: %q", step.name, err, lines[len(lines)-1])
		}
		told("the log", line.Timestamp)
		t.Logf("%s: 3 keep-alives of 1 s after %.1f s; a status that is kept for %v gone after %.1f s",
			step.name, keptFor.Seconds(), retention, forgotten.Seconds())
		if step.staysPrepared {
			t.Logf("%s: recovered by itself within %.1f s, limit %v", step.name, recovered.Seconds(), backstop)
		}
	}
	// A time that no clock can show changes nothing: the kernel refuses it.
	s.init(t, `{"timestamp":"2600-01-01T00:00:00Z"}`)
	if e := s.clockError(t, 0); e < -patience || e > patience {
		t.Errorf("after /init with a time of the year 2600 the clock is %v off", e)
	}
	t.Logf("%d samples of the metrics, %d missed", s.sampled.Load(), s.missed.Load())
}

// receive hands a stream's events to f, as long as that likes, and returns why it ended.
func receive(stream *connect.ServerStreamForClient[pb.StartResponse], err error) func(f func(*pb.ProcessEvent) bool) error {
	return func(f func(*pb.ProcessEvent) bool) error {
		if err != nil {
			return err
		}
		defer stream.Close()
		for stream.Receive() {
			if f != nil && !f(stream.Msg().Event) {
				return nil
			}
		}
		return stream.Err()
	}
}
