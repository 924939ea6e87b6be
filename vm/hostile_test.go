// Guests that are given what they should not be given, or not what they should.

package main

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"
)

// lives: the agent runs commands, tells how they end, and reaps what others leave behind.
func (g *guest) lives(t *testing.T) {
	t.Helper()
	threads := func() int {
		n, err := strconv.Atoi(strings.TrimSpace(g.mustRun(t, "/workload", "count")))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := threads()
	if r, err := g.run("/workload", "exit", "7"); err != nil || r.end.ExitCode != 7 {
		t.Errorf("exit 7: %v, %v", r, err)
	}
	g.mustRun(t, "/workload", "orphans", "100")
	waitFor(t, "orphans are reaped", func() error {
		if now := threads(); now > before+50 {
			return fmt.Errorf("%d threads, %d before", now, before)
		}
		return nil
	})
}

// TestHostileStart: an `ip=` that nobody understands, and an address on eth0 that is not the usual one, as a kernel's own ip=
// leaves it; mounts that are there; a metadata service that never answers. Then a fork bomb when the machine is to go off.
func TestHostileStart(t *testing.T) {
	const address = "10.7.7.7"
	i := needGuests(t)
	g, err := i.start(options{root: "rw", address: address, words: []string{"ip=:::300.1.2::nothing", "loader.mounts=yes",
		"loader.ip=eth0," + address + ",255.255.255.0,10.7.7.1"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.finish(t) })
	g.network.mmds.beSilent()
	if _, err := g.healthy(); err != nil {
		t.Fatal(err)
	}
	g.lives(t)
	if routes := g.mustRun(t, "/workload", "cat", "/proc/net/route"); strings.Contains(routes, "FEA9") {
		t.Errorf("eth0 had an address and got another:\n%s", routes)
	}
	mounts := g.mustRun(t, "/workload", "cat", "/proc/mounts")
	for _, dir := range []string{"/run", "/tmp"} {
		if content, err := g.download(dir + "/kept"); err != nil || string(content) != dir {
			t.Errorf("%s/kept: %q, %v", dir, content, err)
		}
	}
	for _, dir := range []string{"/run", "/tmp", "/proc"} {
		if n := strings.Count(mounts, " "+dir+" "); n != 1 {
			t.Errorf("%d mounts at %s:\n%s", n, dir, mounts)
		}
	}
	waitFor(t, "the metadata service is asked", func() error {
		if g.network.mmds.asked() == 0 {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	// Whether a request without a token may be heeded the service would say: it is given its ten seconds. Others go on.
	stop := watchHealth(t, g, 10*time.Second)
	began := time.Now()
	g.init(t, timestamp(time.Now()))
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("/init took %v", took)
	}
	stop()
	if _, err := g.background("fork: refused", "/workload", "forkbomb"); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	pressCtrlAltDel(t, g)
	reason, err := g.ended()
	took := time.Since(began)
	t.Logf("with a fork bomb: %s after %v", reason, took.Round(time.Millisecond))
	if err != nil || reason != "guest-reset" || took > 30*time.Second {
		t.Errorf("with a fork bomb it ended after %v by %q, %v", took, reason, err)
	}
}

// TestOtherCard: the kernel's ip= was for another card. Its address and its way out stay; the host reaches the agent by eth0.
// Processes that dump core, to a file or to a program, end as they do elsewhere.
func TestOtherCard(t *testing.T) {
	g := boot(t, options{root: "rw", twoCards: true, words: []string{"loader.ip=eth1,10.9.9.9,255.255.255.0,10.9.9.1"}})
	g.lives(t)
	var ways []string
	for line := range strings.Lines(g.mustRun(t, "/workload", "cat", "/proc/net/route")) {
		if f := strings.Fields(line); len(f) > 2 && f[1] == "00000000" {
			ways = append(ways, f[0])
		}
	}
	if len(ways) == 0 || ways[0] != "eth1" {
		t.Errorf("the ways out, the first one being taken: %v", ways)
	}
	for _, pattern := range []string{"/tmp/core.%p", "|/workload exit 0", "|/no/such/program"} {
		g.mustRun(t, "/workload", "write", "/proc/sys/kernel/core_pattern", pattern)
		r, err := g.run("/workload", "segv", "dumping")
		if err != nil {
			t.Fatal(err)
		}
		dumped := pattern != "|/no/such/program"
		if r.end.Signal != 11 || r.end.ExitCode != -1 || strings.Contains(r.end.Status, "core dumped") != dumped {
			t.Errorf("%s: %v", pattern, r.end)
		}
		if pattern[0] == '/' {
			if list := g.mustRun(t, "/workload", "ls", "/tmp"); !strings.Contains(list, fmt.Sprintf("core.%d\n", r.pid)) {
				t.Errorf("no core of %d in /tmp: %q", r.pid, list)
			}
		}
		g.lives(t)
	}
}

// TestNowhereToMount: a read-only root without a single directory. Nothing can be mounted or written; programs run.
func TestNowhereToMount(t *testing.T) {
	g := boot(t, options{root: "ro"})
	g.lives(t)
	start := newStart("/workload", "count")
	start.Msg.Process.Cwd = nil // whoever names none gets one that is there
	if _, err := g.startDetached(start, "\n"); err != nil {
		t.Error(err)
	}
	g.init(t, timestamp(time.Now()))
	pressCtrlAltDel(t, g)
	if reason, err := g.ended(); err != nil || reason != "guest-reset" {
		t.Errorf("it ended by %q, %v", reason, err)
	}
}
