// A guest that is filled up, and one whose console takes nothing any more: neither stops the agent, which is its process 1.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"
)

// healthTimes asks for /health, over and over, on new connections; what it returns ends that and gives how long the answers
// took.
func healthTimes(t *testing.T, g *guest) (stop func() []time.Duration) {
	quit, done := make(chan struct{}), make(chan []time.Duration, 1)
	client := &http.Client{Transport: &http.Transport{DialContext: g.network.dial, DisableKeepAlives: true}, Timeout: patience}
	go func() {
		var times []time.Duration
		defer func() { done <- times }()
		for {
			select {
			case <-quit:
				return
			case <-time.After(20 * time.Millisecond):
			}
			start := time.Now()
			resp, err := client.Get(g.url + "/health")
			if err == nil {
				resp.Body.Close()
				if resp.StatusCode != http.StatusOK {
					err = errors.New(resp.Status)
				}
			}
			if err != nil {
				t.Errorf("/health: %v", err)
				return
			}
			times = append(times, time.Since(start))
		}
	}()
	return func() []time.Duration {
		close(quit)
		times := <-done
		slices.Sort(times)
		return times
	}
}

func percentile(times []time.Duration, percent int) time.Duration {
	if len(times) == 0 {
		return 0
	}
	return times[min(len(times)*percent/100, len(times)-1)].Round(time.Microsecond)
}

func logTimes(t *testing.T, when string, times []time.Duration) {
	t.Helper()
	t.Logf("/health %s: %d answers, p50 %v, p99 %v, worst %v", when, len(times), percentile(times, 50), percentile(times, 99),
		percentile(times, 100))
}

// mebibytes reads a figure of the guest's /proc/meminfo.
func (g *guest) mebibytes(t *testing.T, field string) int {
	t.Helper()
	return procFigure(t, g.mustRun(t, "/workload", "cat", "/proc/meminfo"), field) >> 20
}

// fillUp uploads pieces until one is refused, which must be by 507, and returns how many MiB were taken.
func (g *guest) fillUp(t *testing.T, dir string, mebibytes int) (taken int, refusal error) {
	t.Helper()
	for n := 0; ; n++ {
		err := g.upload(fmt.Sprintf("%s/%dx%d", dir, n, mebibytes), make([]byte, mebibytes<<20))
		if err != nil {
			if !strings.Contains(err.Error(), "507") {
				t.Fatalf("upload to %s: %v", dir, g.explain(err))
			}
			return taken, err
		}
		taken += mebibytes
		if taken > g.memory {
			t.Fatalf("%s took %d MiB of a guest of %d", dir, taken, g.memory)
		}
	}
}

// TestUploadsFillMemory: whatever is uploaded to file systems that are in memory, the guest lives.
func TestUploadsFillMemory(t *testing.T) {
	g := boot(t, options{root: "rw", memory: 256})
	t.Logf("%s; MemTotal %d MiB, MemAvailable %d MiB", accelerator, g.mebibytes(t, "MemTotal"), g.mebibytes(t, "MemAvailable"))
	stop := healthTimes(t, g)
	time.Sleep(5 * time.Second)
	logTimes(t, "at rest", stop())
	stop = healthTimes(t, g)
	all, total := 0, g.mebibytes(t, "MemTotal")
	for _, dir := range []string{"/tmp", "/dev/shm", "/run"} {
		for _, size := range []int{8, 1} {
			taken, refusal := g.fillUp(t, dir, size)
			all += taken
			t.Logf("%s took %d MiB in pieces of %d, MemAvailable %d MiB; then: %v", dir, taken, size,
				g.mebibytes(t, "MemAvailable"), refusal)
		}
	}
	if all > total/2 {
		t.Errorf("file systems in memory took %d MiB of %d", all, total)
	}
	filled := stop()
	logTimes(t, "meanwhile", filled)
	if worst := percentile(filled, 100); worst > healthPatience {
		t.Errorf("/health took %v", worst)
	}
	// A file on the disk needs no memory that the kernel cannot take back. Programs run as well.
	if err := g.upload("/on-disk", make([]byte, 8<<20)); err != nil {
		t.Errorf("an upload to the disk: %v", err)
	}
	g.lives(t)
	// The kernel's own devtmpfs has no bound that could be set; what is left to be had is refused all the same.
	taken, refusal := g.fillUp(t, "/dev", 1)
	t.Logf("/dev took %d MiB, MemAvailable %d MiB; then: %v", taken, g.mebibytes(t, "MemAvailable"), refusal)
	g.lives(t)
	// With all of that full, a process takes what its group may have.
	stop = healthTimes(t, g)
	g.run("/workload", "hog", fmt.Sprint(g.memory))
	hogged := stop()
	logTimes(t, "beside a process that takes all", hogged)
	if worst := percentile(hogged, 100); worst > healthPatience {
		t.Errorf("/health took %v beside a process that takes all", worst)
	}
	g.lives(t)
	g.init(t, timestamp(time.Now()))
}

// healthPatience is what /health may take at worst in an emulated machine whose host may be busy; the figures are printed. Where
// processes took the agent's own program from memory it was 17 s and more.
const healthPatience = 8 * time.Second

// TestUploadsBesideProcesses: where processes have the memory already, a file system in memory takes little; the rest of it
// is not the agent's alone to give.
func TestUploadsBesideProcesses(t *testing.T) {
	g := boot(t, options{root: "rw", memory: 256})
	g.start(t, "has", "/workload", "hold", fmt.Sprint(g.mebibytes(t, "MemAvailable")-70))
	before := g.mebibytes(t, "MemAvailable")
	stop := watchHealth(t, g, 10*time.Second)
	for _, dir := range []string{"/tmp", "/dev/shm", "/run"} {
		taken, refusal := g.fillUp(t, dir, 4)
		t.Logf("%s took %d MiB, MemAvailable %d MiB; then: %v", dir, taken, g.mebibytes(t, "MemAvailable"), refusal)
	}
	if available := g.mebibytes(t, "MemAvailable"); available < before/2 {
		t.Errorf("%d MiB are available, %d were before the uploads", available, before)
	}
	if err := g.upload("/on-disk", make([]byte, 8<<20)); err != nil {
		t.Errorf("an upload to the disk: %v", err)
	}
	stop()
	g.lives(t)
}

// TestBlockedConsole: who presses Ctrl-S on the serial console, and leaves, stops neither the agent nor the end of the guest.
func TestBlockedConsole(t *testing.T) {
	g := boot(t, options{root: "rw"})
	if _, err := g.keys.Write([]byte{'S' - '@'}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second) // nothing shows that it has been heeded
	go g.run("/workload", "write", "/dev/ttyS0", strings.Repeat("more than a terminal keeps\n", 2000))
	stop := healthTimes(t, g)
	for n := range 50 {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		r, _ := http.NewRequestWithContext(ctx, "POST", g.url+"/init",
			strings.NewReader(fmt.Sprintf(`{"hyperloopIP":"none%d %s"}`, n, strings.Repeat("x", 200))))
		status, answer, err := g.do(r)
		cancel()
		if err != nil || status != http.StatusNoContent {
			t.Fatalf("/init %d: %v, %d %s", n, err, status, answer)
		}
	}
	times := stop()
	logTimes(t, "meanwhile", times)
	if text := g.console.text(); strings.Contains(text, "none49") {
		t.Fatalf("the console was not stopped:\n%s", text)
	}
	g.mustRun(t, "/workload", "exit", "0")
	began := time.Now()
	g.run("/workload", "kill", "1", "15")
	reason, err := g.ended()
	took := time.Since(began)
	t.Logf("SIGTERM to the end: %v, %s", took.Round(time.Millisecond), reason)
	if err != nil || reason != "guest-shutdown" || took > 8*time.Second {
		t.Errorf("it ended after %v by %q, %v", took, reason, err)
	}
}
