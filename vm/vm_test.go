// What the tests share: the images, built once; one guest for all tests that leave it as it was; helpers.
//
// ENVD_BIN names a binary to test instead of building one; it must be static. -v shows the figures. A longer soak:
// go test -v -run TestSoak -timeout 2h . -snapshots 300. The other flags are -starts 10 and -clone-cpus 2.

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

// prepared is for an agent that is no init yet.
var prepared = os.Getenv("ENVD_VM_PREPARED") != ""

var testDir string

func TestMain(m *testing.M) {
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin") // for the tools of e2fsprogs
	var err error
	if testDir, err = scratch(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	if shared.guest != nil {
		shared.guest.close()
	}
	os.RemoveAll(testDir)
	os.Exit(code)
}

var built = sync.OnceValues(func() (*images, error) {
	i, err := buildImages(testDir)
	if err == nil && i.kvmRuns() {
		accelerator = "kvm"
	}
	return i, err
})

// needGuests skips a test where no guest can run, and says what lacks.
func needGuests(t *testing.T) *images {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		t.Skip("the guests are amd64")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	for _, name := range []string{"/dev/net/tun", "../bin/kernel/vmlinuz"} {
		if _, err := os.Stat(name); err != nil {
			t.Skipf("needs %s (tools/setup vm fetches a kernel)", name)
		}
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs qemu-system-x86_64")
	}
	i, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// boot starts a guest of the test's own.
func boot(t *testing.T, o options) *guest {
	t.Helper()
	i := needGuests(t)
	o.prepared = o.prepared || prepared
	g, err := i.boot(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.finish(t) })
	return g
}

// finish closes the guest and shows its console if the test failed. That a kernel panicked fails any test.
func (g *guest) finish(t *testing.T) {
	g.close()
	text := g.console.text()
	if strings.Contains(text, "Kernel panic") && !t.Failed() {
		t.Error("the guest's kernel panicked")
	}
	if t.Failed() {
		t.Logf("the guest's console:\n%s", text)
	}
}

var shared struct {
	sync.Mutex
	guest *guest
}

// sharedGuest is one guest for all tests that leave nothing behind and take little: root filesystem on ext4, 2 CPUs, 256 MiB.
func sharedGuest(t *testing.T) *guest {
	t.Helper()
	i := needGuests(t)
	shared.Lock()
	defer shared.Unlock()
	if shared.guest != nil {
		select {
		case <-shared.guest.gone:
			t.Fatal("the guest that tests share has ended")
		default:
		}
		return shared.guest
	}
	g, err := i.boot(options{root: "rw", prepared: prepared})
	if err != nil {
		t.Fatal(err)
	}
	shared.guest = g
	return g
}

// mustRun runs a command that must succeed and returns its output.
func (g *guest) mustRun(t *testing.T, cmd string, args ...string) string {
	t.Helper()
	r, err := g.run(cmd, args...)
	if err != nil {
		t.Fatal(g.explain(err))
	}
	if r.end.ExitCode != 0 {
		t.Fatalf("%s %v: %s\n%s%s", cmd, args, r.end.Status, r.stdout.String(), r.stderr.String())
	}
	return r.stdout.String()
}

// start starts a command that goes on; it is killed when the test ends.
func (g *guest) start(t *testing.T, ready, cmd string, args ...string) uint32 {
	t.Helper()
	pid, err := g.background(ready, cmd, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.kill(pid) })
	return pid
}

func byPID(pid uint32) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: pid}}
}

func (g *guest) kill(pid uint32) error {
	select {
	case <-g.gone:
		return nil
	default:
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	_, err := g.proc.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{Process: byPID(pid), Signal: pb.Signal_SIGNAL_SIGKILL}))
	if connect.CodeOf(err) == connect.CodeNotFound {
		return nil
	}
	return err
}

// waitFor calls f until it is content.
func waitFor(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// watchHealth asks for /health, over and over, on new connections. The function that it returns ends that, and fails the test
// if an answer was missing or took longer than `limit`.
func watchHealth(t *testing.T, g *guest, limit time.Duration) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	client := &http.Client{Transport: &http.Transport{DialContext: g.network.dial, DisableKeepAlives: true}, Timeout: patience}
	var worst time.Duration
	count, failures := 0, []error{}
	go func() {
		defer close(done)
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
				failures = append(failures, err)
				return
			}
			count++
			worst = max(worst, time.Since(start))
		}
	}()
	return func() {
		t.Helper()
		close(quit)
		<-done
		t.Logf("/health was answered %d times, the slowest after %v", count, worst.Round(time.Millisecond))
		if len(failures) > 0 {
			t.Errorf("/health failed: %v", failures)
		}
		if worst > limit {
			t.Errorf("the slowest answer to /health took %v, limit %v", worst, limit)
		}
	}
}

// leftClean: the guest, which has ended, unmounted its root filesystem or made it read-only, and the file is on it whole.
func (g *guest) leftClean(t *testing.T, file string, size int) {
	t.Helper()
	if header, err := exec.Command("dumpe2fs", "-h", g.disk).Output(); err != nil || strings.Contains(string(header), "needs_recovery") {
		t.Errorf("the filesystem was not left clean: %v\n%s", err, header)
	}
	if report, err := exec.Command("e2fsck", "-fn", g.disk).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, report)
	}
	content, err := exec.Command("debugfs", "-R", "cat "+file, g.disk).Output()
	if err != nil {
		t.Error(err)
	}
	checkRecords(t, content, size)
}

// checkRecords looks at what `workload dirty` has written.
func checkRecords(t *testing.T, content []byte, size int) {
	t.Helper()
	if want := fmt.Sprintf("%015d\n", size-record); len(content) != size || !strings.HasSuffix(string(content), want) {
		t.Errorf("the file has %d bytes, want %d", len(content), size)
	}
}

// status reads one figure in kB of the agent's /proc/1/status, in bytes.
func (g *guest) status(t *testing.T, field string) int {
	t.Helper()
	return procFigure(t, g.mustRun(t, "/workload", "cat", "/proc/1/status"), field)
}

func procFigure(t *testing.T, text, field string) int {
	t.Helper()
	for line := range strings.Lines(text) {
		if name, value, _ := strings.Cut(line, ":"); name == field {
			n, err := strconv.Atoi(strings.Fields(value)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Fatalf("no %s in\n%s", field, text)
	return 0
}

// processes lists those whose parent is PID 1: orphans and the agent's own. The agent itself and kernel threads are not in it.
func (g *guest) processes(t *testing.T) (lines []string) {
	t.Helper()
	for line := range strings.Lines(g.mustRun(t, "/workload", "processes")) {
		f := strings.Fields(line)
		if f[1] == "2" || f[0] == "1" || f[0] == "2" {
			continue
		}
		lines = append(lines, strings.TrimSpace(line))
	}
	return lines
}
