// What no namespace isolates: freezing the root filesystem, dropping the page cache.

package main

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// TestFilesystemFreeze: between /fsfreeze and /fsthaw nothing is written, requests are answered all the same, and a
// second call of either is no error. An /init thaws too.
func TestFilesystemFreeze(t *testing.T) {
	g := boot(t, options{root: "rw"})
	g.mustRun(t, "/workload", "mkdir", "/d")
	post := func(path string) {
		t.Helper()
		if status, answer, err := g.post(path, ""); err != nil || status != http.StatusNoContent {
			t.Errorf("%s: %v, %d %s", path, err, status, answer)
		}
	}
	for n, thaw := range []string{"/fsthaw", "/init"} {
		post("/fsfreeze")
		post("/fsfreeze")
		stop := watchHealth(t, g, 10*time.Second)
		written := make(chan error, 1)
		name := fmt.Sprintf("/d/%d", n)
		go func() { written <- g.upload(name, []byte("x")) }()
		// That it does not end is seen by what ends meanwhile.
		for range 3 {
			g.mustRun(t, "/workload", "exit", "0")
		}
		select {
		case err := <-written:
			t.Errorf("a file was written while the filesystem was frozen: %v", err)
		default:
		}
		stop()
		post(thaw)
		if err := <-written; err != nil {
			t.Errorf("after %s: %v", thaw, err)
		}
		if content, err := g.download(name); err != nil || string(content) != "x" {
			t.Errorf("after %s: %q, %v", thaw, content, err)
		}
	}
	post("/fsthaw")
}

// TestFreeze: frozen processes stand still, and the agent does not.
func TestFreeze(t *testing.T) {
	g := boot(t, options{root: "rw"})
	g.start(t, "ready", "/workload", "oracle")
	if status, answer, err := g.post("/freeze?maxWaitMs=5000", ""); err != nil || status != http.StatusOK || !strings.Contains(answer, `"frozen"`) {
		t.Fatalf("/freeze: %v, %d %s", err, status, answer)
	}
	answered := make(chan error, 1)
	go func() { _, _, _, err := g.ask("clock"); answered <- err }()
	stop := watchHealth(t, g, 10*time.Second)
	time.Sleep(500 * time.Millisecond) // a process that was not frozen would have answered
	select {
	case err := <-answered:
		t.Errorf("a frozen process answered: %v", err)
	default:
	}
	stop()
	if status, answer, err := g.post("/unfreeze", ""); err != nil || status != http.StatusNoContent {
		t.Fatalf("/unfreeze: %v, %d %s", err, status, answer)
	}
	if err := <-answered; err != nil {
		t.Error(err)
	}
	g.mustRun(t, "/workload", "exit", "0")
}

// TestPrepareDropsTheCache: what is saved of a guest is smaller for it.
func TestPrepareDropsTheCache(t *testing.T) {
	g := boot(t, options{root: "rw"})
	g.mustRun(t, "/workload", "dirty", "/big", "48")
	before := procFigure(t, g.mustRun(t, "/workload", "cat", "/proc/meminfo"), "Cached")
	g.prepare(t)
	after := procFigure(t, g.mustRun(t, "/workload", "cat", "/proc/meminfo"), "Cached")
	t.Logf("page cache: %d MiB before, %d MiB after", before>>20, after>>20)
	if before < 48<<20 || after > before-40<<20 {
		t.Errorf("the page cache had %d bytes before and has %d after", before, after)
	}
}

// TestReclaimer: when four fifths of the memory are in use, the page cache is dropped, without anybody asking.
func TestReclaimer(t *testing.T) {
	g := boot(t, options{root: "rw", memory: 256})
	// The cache of a file that is read is what there is to drop; memory that stays in use is what makes it happen.
	g.mustRun(t, "/workload", "dirty", "/big", "16")
	total := procFigure(t, g.mustRun(t, "/workload", "cat", "/proc/meminfo"), "MemTotal")
	available := procFigure(t, g.mustRun(t, "/workload", "cat", "/proc/meminfo"), "MemAvailable")
	g.start(t, "has", "/workload", "hold", fmt.Sprint((available-total*17/100)>>20))
	waitFor(t, "the cache is dropped", func() error {
		if cached := procFigure(t, g.mustRun(t, "/workload", "cat", "/proc/meminfo"), "Cached"); cached > 24<<20 {
			return fmt.Errorf("%d bytes are cached", cached)
		}
		if !strings.Contains(strings.ToLower(g.console.text()), "cache") {
			return fmt.Errorf("nothing of it is in the log")
		}
		return nil
	})
}
