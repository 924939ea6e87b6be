// Snapshots: a guest is prepared, stopped, written to a file, loaded by a new QEMU into a new network, and goes on.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

var snapshots = flag.Int("snapshots", 25, "how often the soak saves and loads its guest")

// prepare asks the agent to prepare for a snapshot, as the host does.
func (g *guest) prepare(t *testing.T) {
	t.Helper()
	status, answer, err := g.post("/snapshot/prepare", "")
	if status == http.StatusNotFound && os.Getenv("ENVD_VM_UNPREPARED") != "" {
		return
	}
	if err != nil || status != http.StatusNoContent {
		t.Fatalf("/snapshot/prepare: %v, %d %s", err, status, answer)
	}
}

// first sends the first request after a resume and returns how long the answer took.
func (g *guest) first(t *testing.T) time.Duration {
	t.Helper()
	start := time.Now()
	status, answer, err := g.get("/health")
	if err != nil || status != http.StatusOK {
		t.Fatal(g.explain(fmt.Errorf("the first request after the resume: %v, %d %s", err, status, answer)))
	}
	return time.Since(start)
}

// init sends POST /init, which must succeed.
func (g *guest) init(t *testing.T, body string) {
	t.Helper()
	if status, answer, err := g.post("/init", body); err != nil || status != http.StatusNoContent {
		t.Fatalf("/init %s: %v, %d %s", body, err, status, answer)
	}
}

func timestamp(at time.Time) string {
	return fmt.Sprintf(`{"timestamp":%q}`, at.UTC().Format(time.RFC3339Nano))
}

// cycle saves the guest and lets it go on as another, whose first request it returns the time of.
func (g *guest) cycle(t *testing.T) (*guest, time.Duration) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "state")
	defer os.Remove(path)
	begin := time.Now()
	since := func() time.Duration { return time.Since(begin).Round(time.Millisecond) }
	g.prepare(t)
	prepared := since()
	if err := g.save(path); err != nil {
		t.Fatal(err)
	}
	saved := since()
	next, err := g.load(path, false)
	if err != nil {
		t.Fatal(err)
	}
	next.inherit(g)
	t.Cleanup(func() { next.finish(t) })
	if err := next.cont(); err != nil {
		t.Fatal(err)
	}
	loaded := since()
	took := next.first(t)
	next.init(t, timestamp(time.Now()))
	t.Logf("prepared at %v, saved at %v, loaded at %v, first answer after %v, /init at %v", prepared, saved, loaded, took.Round(time.Millisecond), since())
	return next, took
}

// TestSoak saves and loads a guest over and over while clients run commands, follow an output, type into a terminal, move
// files and watch a directory. Nothing may be lost but the connections, and those resume where they were cut.
func TestSoak(t *testing.T) {
	g := boot(t, options{root: "rw"})
	g.mustRun(t, "/workload", "mkdir", "/watched")
	checksum, err := g.background("checking", "/workload", "memory", "16")
	if err != nil {
		t.Fatal(err)
	}
	fds := func(g *guest) int { return strings.Count(g.mustRun(t, "/workload", "ls", "/proc/1/fd"), "\n") }
	fdsBefore, rssBefore := fds(g), g.status(t, "VmRSS")
	var firsts []time.Duration
	start := time.Now()
	s := startSoak(t, g)
	for n := range *snapshots {
		time.Sleep(300 * time.Millisecond)
		if t.Failed() {
			break
		}
		var took time.Duration
		s.replace(func(g *guest) *guest {
			g, took = g.cycle(t)
			return g
		})
		firsts = append(firsts, took)
		s.waitProgress(n + 1)
	}
	perCycle := time.Since(start) / time.Duration(max(1, len(firsts)))
	s.end()
	if t.Failed() {
		return
	}
	slices.Sort(firsts)
	t.Logf("%d snapshots, %v each: %s; %d streams resumed", len(firsts), perCycle.Round(time.Millisecond), s.did(), s.streamsResumed())
	t.Logf("first request after a resume: median %v, slowest %v", firsts[len(firsts)/2].Round(time.Millisecond), firsts[len(firsts)-1].Round(time.Millisecond))
	// The checksummer lives on, and the emulator is not at fault.
	s.g.checksumsHold(t, checksum)
	waitFor(t, "descriptors", func() error {
		if n := fds(s.g); n > fdsBefore+8 {
			return fmt.Errorf("the agent has %d, %d before", n, fdsBefore)
		}
		return nil
	})
	rss := s.g.status(t, "VmRSS")
	s.g.prepare(t) // hands memory back
	s.g.first(t)
	t.Logf("the agent's RSS: %.1f MiB before, %.1f MiB after, %.1f MiB after one more preparation",
		float64(rssBefore)/(1<<20), float64(rss)/(1<<20), float64(s.g.status(t, "VmRSS"))/(1<<20))
}

// TestClones loads one snapshot eight times, side by side. What each of them draws must be its own: after an /init that
// tells them apart, and after an empty one when the metadata does.
var cloneCPUs = flag.Int("clone-cpus", 1, "of each clone in TestClones")

func TestClones(t *testing.T) {
	const clones = 8
	g := boot(t, options{root: "rw", memory: 128, cpus: *cloneCPUs}) // each CPU has a generator of its own
	g.network.mmds.set(map[string]string{"instanceID": "template", "envID": "e"})
	g.start(t, "ready", "/workload", "oracle")
	checksum := g.start(t, "checking", "/workload", "memory", "4")
	g.mustRun(t, "/workload", "mkdir", "/watched")
	path := filepath.Join(t.TempDir(), "state")
	// A generator that was seeded just now gives all clones the same at first: else the test would show nothing.
	time.Sleep(10 * time.Second) // a young kernel seeds it often
	if _, _, _, err := g.ask("getrandom"); err != nil {
		t.Fatal(err)
	}
	g.prepare(t)
	if err := g.save(path); err != nil {
		t.Fatal(err)
	}
	for _, by := range []string{"init", "metadata"} {
		t.Run(by, func(t *testing.T) {
			drawn := map[string][]string{} // by question
			var mu sync.Mutex
			var wg sync.WaitGroup
			loaded := make([]*guest, clones)
			for n := range clones {
				wg.Go(func() {
					c, err := g.load(path, true)
					if err != nil {
						t.Error(err)
						return
					}
					loaded[n] = c
				})
			}
			wg.Wait()
			t.Cleanup(func() {
				for _, c := range loaded {
					if c != nil {
						c.finish(t)
					}
				}
			})
			if t.Failed() {
				return
			}
			var questions = []string{"urandom", "getrandom", "uuid"}
			for n, c := range loaded {
				wg.Go(func() {
					if err := c.cont(); err != nil {
						t.Error(err)
						return
					}
					// What they draw before anybody told them apart shows whether the test can fail.
					if answer, _, _, err := c.ask("getrandom"); err == nil {
						mu.Lock()
						drawn["before"] = append(drawn["before"], answer)
						mu.Unlock()
					}
					if _, err := c.healthy(); err != nil {
						t.Error(err)
						return
					}
					id := fmt.Sprintf("clone-%d", n)
					body := fmt.Sprintf(`{"envVars":{"CLONE":%q}}`, id)
					if by == "metadata" {
						c.network.mmds.set(map[string]string{"instanceID": id, "envID": "e"})
						body = ""
					}
					status, answer, err := c.post("/init", body)
					if err != nil || status != http.StatusNoContent {
						t.Errorf("/init: %v, %d %s", err, status, answer)
						return
					}
					if by == "metadata" {
						if err := c.waitEnv("WRENN_SANDBOX_ID", id); err != nil {
							t.Error(err)
							return
						}
					}
					for _, q := range questions {
						answer, _, _, err := c.ask(q)
						if err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						drawn[q] = append(drawn[q], answer)
						mu.Unlock()
					}
					ctx, cancel := context.WithTimeout(context.Background(), patience)
					defer cancel()
					w, err := c.fs.CreateWatcher(ctx, connect.NewRequest(&pb.CreateWatcherRequest{Path: "/watched"}))
					if err != nil {
						t.Error(err)
						return
					}
					mu.Lock()
					drawn["watcher"] = append(drawn["watcher"], w.Msg.WatcherId)
					mu.Unlock()
					c.checksumsHold(t, checksum)
				})
			}
			wg.Wait()
			distinct := func(q string) int {
				got := slices.Clone(drawn[q])
				slices.Sort(got)
				return len(slices.Compact(got))
			}
			t.Logf("before they were told apart, %d clones drew %d different values", len(drawn["before"]), distinct("before"))
			for _, q := range append(questions, "watcher") {
				if distinct := distinct(q); distinct != clones {
					t.Errorf("%s: %d distinct ones of %d: %v", q, distinct, clones, drawn[q])
				}
			}
		})
	}
}

// checksumsHold: the process that checks memory lives on. Else the emulator is at fault, not the agent.
func (g *guest) checksumsHold(t *testing.T, pid uint32) {
	t.Helper()
	ctx, cancel := call()
	defer cancel()
	list, err := g.proc.List(ctx, connect.NewRequest(&pb.ListRequest{}))
	if err != nil || !slices.ContainsFunc(list.Msg.Processes, func(p *pb.ProcessInfo) bool { return p.Pid == pid }) {
		t.Errorf("the memory of the guest is broken, or its checker is gone: %v", err)
	}
}

// waitEnv waits until the agent's environment has the variable.
func (g *guest) waitEnv(name, value string) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		_, text, err := g.get("/envs")
		var envs map[string]string
		if err == nil {
			err = json.Unmarshal([]byte(text), &envs)
		}
		if err == nil && envs[name] == value {
			return nil
		}
		if time.Now().After(deadline) {
			return g.explain(fmt.Errorf("%s is %q, want %q (%v)", name, envs[name], value, err))
		}
	}
}

// TestClock: the clock of a restored guest stands where it stood; /init with a timestamp sets it.
func TestClock(t *testing.T) {
	g := boot(t, options{root: "rw", memory: 128})
	g.start(t, "ready", "/workload", "oracle")
	path := filepath.Join(t.TempDir(), "state")
	g.prepare(t)
	if err := g.save(path); err != nil {
		t.Fatal(err)
	}
	stopped := time.Now()
	time.Sleep(10*time.Second - time.Since(stopped))
	next, err := g.load(path, false)
	if err != nil {
		t.Fatal(err)
	}
	next.inherit(g)
	t.Cleanup(func() { next.finish(t) })
	if err := next.cont(); err != nil {
		t.Fatal(err)
	}
	next.first(t)
	if e := next.clockError(t, 0); e > -9*time.Second {
		t.Errorf("after 10 s the clock is %v off: this test tests nothing", e)
	}
	for _, ahead := range []time.Duration{0, time.Hour} { // an hour behind is the same as being told what will be in an hour
		sent := time.Now()
		next.init(t, timestamp(sent.Add(ahead)))
		answered := time.Since(sent)
		e := next.clockError(t, ahead)
		t.Logf("after /init with a timestamp, which took %v: the clock is off by %v", answered.Round(time.Millisecond), e.Round(100*time.Microsecond))
		// The timestamp is as old as the request when it is applied.
		if limit := 50*time.Millisecond + answered; e < -limit || e > limit {
			t.Errorf("the clock is off by %v", e)
		}
	}
	// A little ahead stays as it is; far ahead is set.
	next.init(t, timestamp(time.Now().Add(time.Hour-2*time.Second)))
	if e := next.clockError(t, time.Hour); e < -time.Second {
		t.Errorf("a clock that was 2 s ahead was set: %v", e)
	}
}

// clockError is the guest's clock less the host's, less what it is meant to be ahead; the best of a few readings.
func (g *guest) clockError(t *testing.T, ahead time.Duration) time.Duration {
	t.Helper()
	var best, shortest time.Duration
	for n := range 10 {
		answer, sent, received, err := g.ask("clock")
		if err != nil {
			t.Fatal(err)
		}
		nanos, err := strconv.ParseInt(answer, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		took := received.Sub(sent)
		if n == 0 || took < shortest {
			shortest = took
			best = time.Unix(0, nanos).Sub(sent.Add(took / 2).Add(ahead))
		}
	}
	return best
}

// upload sends a whole file.
func (g *guest) upload(path string, content []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, "POST", g.url+"/files?path="+path, bytes.NewReader(content))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", "application/octet-stream")
	status, answer, err := g.do(r)
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("upload: %d %s", status, answer)
	}
	return err
}

var errMissing = errors.New("no such file in the guest")

func (g *guest) download(path string) ([]byte, error) {
	status, answer, err := g.get("/files?path=" + path)
	switch {
	case err == nil && status == http.StatusNotFound:
		err = errMissing
	case err == nil && status != http.StatusOK:
		err = fmt.Errorf("download: %d %s", status, answer)
	}
	return []byte(answer), err
}
