// The budgets: what a sandbox pays for envd, with a little headroom. Each figure is printed by its test (go test -v -run TestBudget).
// A change that needs more has to say so here.

package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const (
	binaryBudget = 9_500_000 // bytes, amd64
	residentSize = 11 << 20  // bytes, at rest
	threadBudget = 8         // at rest, on two CPUs
	wakeupBudget = 12.0      // a second, at rest, of all threads
	execBudget   = 220.0     // allocations for a start of /bin/true, from request to the end of its stream
	chunkBudget  = 13.0      // allocations for a message of output
)

func needNoRace(t *testing.T) {
	t.Helper()
	if raceEnabled() {
		t.Skip("the race detector needs memory, threads and allocations of its own")
	}
}

func TestBudgetOfBinary(t *testing.T) {
	t.Parallel()
	needNoRace(t)
	info, err := os.Stat(daemonBinary(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the binary has %d bytes", info.Size())
	if runtime.GOARCH == "amd64" && info.Size() > binaryBudget {
		t.Errorf("the binary has %d bytes, the budget is %d; `make size` tells of what", info.Size(), binaryBudget)
	}
}

// At rest means: started, asked once, left alone.
func TestBudgetAtRest(t *testing.T) {
	t.Parallel()
	needNoRace(t)
	d := startDaemonWith(t, daemonConfig{env: []string{"GOMAXPROCS=2"}})
	d.healthy(t)
	d.http.CloseIdleConnections()
	// A busy machine adds to a figure for a while, a daemon that is never at rest adds to it always: the best of five counts.
	wakeups := func() (n int64) {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", d.pid))
		for _, task := range tasks {
			tid, _ := strconv.Atoi(filepath.Base(task))
			count, _ := strconv.ParseInt(statusField(tid, "voluntary_ctxt_switches:"), 10, 64)
			n += count
		}
		return n
	}
	least := 1e9
	for range 5 {
		before, began := wakeups(), time.Now()
		time.Sleep(2 * time.Second)
		if least = min(least, float64(wakeups()-before)/time.Since(began).Seconds()); least <= wakeupBudget {
			break
		}
	}
	t.Logf("at rest: %d KiB resident, %d threads, %.1f wake-ups a second", d.rss()>>10, d.threads(), least)
	if d.rss() > residentSize {
		t.Errorf("%d KiB are resident, the budget is %d", d.rss()>>10, residentSize>>10)
	}
	if d.threads() > threadBudget {
		t.Errorf("%d threads, the budget is %d", d.threads(), threadBudget)
	}
	if least > wakeupBudget {
		t.Errorf("%.1f wake-ups a second, the budget is %.1f", least, wakeupBudget)
	}
}

// mallocCounter is laid over the daemon's source, so that nothing of it is in the binary that is shipped: at SIGUSR1 the number of
// allocations so far goes to standard error.
const mallocCounter = `package main

import (
	"os"
	"os/signal"
	"runtime"
	"syscall"
)

func init() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGUSR1)
	go func() {
		for range signals {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			println("mallocs", m.Mallocs)
		}
	}()
}
`

func TestBudgetOfAllocations(t *testing.T) {
	t.Parallel()
	needNoRace(t)
	dir := publicDir(t)
	source := writeFile(t, filepath.Join(dir, "counter.go"), mallocCounter, 0o644)
	root, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	replace, err := json.Marshal(map[string]map[string]string{"Replace": {filepath.Join(root, "counter.go"): source}})
	if err != nil {
		t.Fatal(err)
	}
	overlay := writeFile(t, filepath.Join(dir, "overlay.json"), string(replace), 0o644)
	counted := filepath.Join(dir, "envd")
	if out, err := exec.Command("tools/build", counted, "-overlay="+overlay).CombinedOutput(); err != nil {
		t.Fatalf("tools/build: %v\n%s", err, out)
	}
	d := startDaemonWith(t, daemonConfig{program: counted})
	asked := 0
	mallocs := func() (n float64) {
		asked++
		if err := syscall.Kill(d.pid, syscall.SIGUSR1); err != nil {
			t.Fatal(err)
		}
		waitFor(t, 10*time.Second, "the daemon counts its allocations", func() bool {
			counts := strings.Split(d.log(), "mallocs ")[1:]
			if len(counts) < asked {
				return false
			}
			_, err := fmt.Sscanln(counts[asked-1], &n)
			return err == nil
		})
		return n
	}

	const starts = 200
	run := func() {
		for range starts {
			if result := d.run(t, []string{"/bin/true"}); result.end.GetExitCode() != 0 {
				t.Fatalf("/bin/true: %v", result.end)
			}
		}
	}
	run() // the first ones fill pools
	before := mallocs()
	run()
	perStart := (mallocs() - before) / starts

	const size = 64 << 20
	count := func() (messages float64) {
		_, frames := d.rawStream(t, "Start", fmt.Sprintf(`{"process":{"cmd":"head","args":["-c","%d","/dev/zero"]}}`, size))
		return float64(len(frames))
	}
	count()
	before = mallocs()
	messages := count()
	perMessage := (mallocs() - before - perStart) / messages

	t.Logf("allocations: %.0f a start, %.2f a message of output (%.0f messages)", perStart, perMessage, messages)
	if perStart > execBudget {
		t.Errorf("%.0f allocations a start, the budget is %.0f", perStart, execBudget)
	}
	if perMessage > chunkBudget {
		t.Errorf("%.2f allocations a message of output, the budget is %.2f", perMessage, chunkBudget)
	}
}
