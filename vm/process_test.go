// Processes in a guest: the agent is PID 1, and the kernel's limits are real.

package main

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

func TestExec(t *testing.T) {
	t.Parallel()
	g := sharedGuest(t)
	if v := g.mustRun(t, "/workload", "cat", "/proc/version"); !strings.HasPrefix(v, "Linux version ") {
		t.Errorf("/proc/version: %q", v)
	}
	for _, test := range []struct {
		args   []string
		code   int32
		status string
		signal int32
	}{
		{[]string{"exit", "0"}, 0, "exit status 0", 0},
		{[]string{"exit", "7"}, 7, "exit status 7", 0},
		{[]string{"segv"}, -1, "signal: segmentation fault", 11},
		{[]string{"run", "/workload", "exit", "9"}, 9, "exit status 9", 0},
	} {
		r, err := g.run("/workload", test.args...)
		if err != nil {
			t.Fatal(err)
		}
		if status, _, _ := strings.Cut(r.end.Status, " (core"); r.end.ExitCode != test.code || status != test.status || r.end.Signal != test.signal {
			t.Errorf("%v: %v", test.args, r.end)
		}
	}
}

// TestNoHome: the image has neither /etc/passwd nor /root. What a client starts without naming a directory runs all the same.
func TestNoHome(t *testing.T) {
	t.Parallel()
	g := sharedGuest(t)
	start := newStart("/workload", "cat", "/proc/self/stat")
	start.Msg.Process.Cwd = nil
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	stream, err := g.proc.Start(ctx, start)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	var r result
	for stream.Receive() {
		r.take(stream.Msg().Event)
	}
	if stream.Err() != nil || r.end == nil || r.end.ExitCode != 0 {
		t.Errorf("%v, %v", stream.Err(), r.end)
	}
}

// TestOrphans: PID 1 reaps what is left to it, and takes no status from the children that clients wait for.
func TestOrphans(t *testing.T) {
	g := sharedGuest(t)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for worker := range 2 {
		wg.Go(func() {
			for n := worker; ; n = (n + 1) % 100 {
				select {
				case <-stop:
					return
				default:
				}
				r, err := g.run("/workload", "exit", fmt.Sprint(n))
				if err != nil || r.end.ExitCode != int32(n) {
					t.Errorf("exit %d: %v, %v", n, err, r)
					return
				}
			}
		})
	}
	g.mustRun(t, "/workload", "orphans", "200")
	close(stop)
	wg.Wait()
	waitFor(t, "orphans", func() error {
		for _, p := range g.processes(t) {
			if f := strings.Fields(p); f[2] == "Z" {
				return fmt.Errorf("a zombie: %s", p)
			}
		}
		return nil
	})
}

// TestOutOfMemory: the kernel takes the process that takes the memory, never the agent, and the client is told.
func TestOutOfMemory(t *testing.T) {
	g := boot(t, options{root: "rw", memory: 192})
	stop := watchHealth(t, g, 5*time.Second)
	for _, test := range []struct {
		name string
		args []string
		code int32
	}{
		{"alone", []string{"hog", "4096"}, -1},
		{"below a shell", []string{"run", "/workload", "hog", "4096"}, 137},
	} {
		r, err := g.run("/workload", test.args...)
		if err != nil {
			t.Fatalf("%s: %v", test.name, err)
		}
		t.Logf("%s: %v", test.name, r.end)
		if r.end.ExitCode != test.code || !r.end.OomKilled {
			t.Errorf("%s: %v", test.name, r.end)
		}
		if test.code == -1 && r.end.Signal != 9 {
			t.Errorf("%s: signal %d", test.name, r.end.Signal)
		}
		if r.end.MaxRssBytes < 64<<20 || r.end.MaxRssBytes > 192<<20 {
			t.Errorf("%s: a peak of %d bytes", test.name, r.end.MaxRssBytes)
		}
	}
	stop()
	if r, err := g.run("/workload", "hog", "8"); err != nil || r.end.ExitCode != 0 || r.end.OomKilled || r.end.MaxRssBytes < 8<<20 {
		t.Errorf("a modest one afterwards: %v, %v", r.end, err)
	}
	if score := g.mustRun(t, "/workload", "cat", "/proc/1/oom_score_adj"); score != "-1000\n" {
		t.Errorf("the agent's oom_score_adj is %q", score)
	}
}

// TestForkBomb: the limit on processes leaves room for the agent, and the bomb ends whole by one signal.
func TestForkBomb(t *testing.T) {
	g := boot(t, options{root: "rw"})
	stop := watchHealth(t, g, 10*time.Second)
	pid, err := g.background("fork: refused", "/workload", "forkbomb")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := g.proc.List(ctx, connect.NewRequest(&pb.ListRequest{})); err != nil {
		t.Errorf("List: %v", err)
	}
	// There is no process to be had: that is said, at once.
	if r, err := g.run("/workload", "exit", "0"); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("a Start meanwhile: %v, %v", err, r)
	}
	if err := g.kill(pid); err != nil {
		t.Errorf("kill: %v", err)
	}
	waitFor(t, "the bomb is gone", func() error {
		r, err := g.run("/workload", "processes")
		if err != nil {
			return err
		}
		if r.end.ExitCode != 0 {
			return fmt.Errorf("%v", r.end)
		}
		left := 0
		for line := range strings.Lines(r.stdout.String()) {
			if strings.HasSuffix(line, " workload\n") {
				left++
			}
		}
		if left > 1 { // itself
			return fmt.Errorf("%d are left", left)
		}
		return nil
	})
	stop()
}

// TestShapes: other machines.
func TestShapes(t *testing.T) {
	for _, test := range []struct {
		name string
		o    options
	}{
		{"1 CPU", options{root: "rw", cpus: 1}},
		{"4 CPUs", options{root: "rw", cpus: 4}},
		{"96 MiB", options{root: "rw", memory: 96}},
		{"initramfs", options{}},
		{"read-only root", options{root: "ro", words: []string{"loader.dirs=yes"}}},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := boot(t, test.o)
			const size = 1 << 20
			if out := g.mustRun(t, "/workload", "output", fmt.Sprint(size)); len(out) != size || !strings.HasSuffix(out, fmt.Sprintf("%015d\n", size-record)) {
				t.Errorf("%d bytes of output", len(out))
			}
			g.mustRun(t, "/workload", "orphans", "20")
			t.Logf("RSS %.1f MiB", float64(g.status(t, "VmRSS"))/(1<<20))
		})
	}
}

// record is the size of what `workload output` writes: at the offset o stands o.
const record = 16
