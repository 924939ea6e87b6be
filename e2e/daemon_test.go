// Builds the daemon, starts it on a port of its own and stops it again. ENVD_BIN names a binary to test instead.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

var scratch string // removed when the tests have ended

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "envd-e2e-"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(scratch)
	os.Exit(code)
}

var buildDaemon = sync.OnceValues(func() (string, error) {
	if bin := os.Getenv("ENVD_BIN"); bin != "" {
		return filepath.Abs(bin)
	}
	bin := filepath.Join(scratch, "envd")
	if out, err := exec.Command("../tools/build", bin).CombinedOutput(); err != nil {
		return "", fmt.Errorf("tools/build: %w\n%s", err, out)
	}
	return bin, nil
})

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// startDaemon returns the URL of a daemon that listens on the port and that is stopped when the test has ended. By then
// the test must have ended what it started there.
func startDaemon(t *testing.T, port int) string {
	t.Helper()
	bin, err := buildDaemon()
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	daemon := exec.Command(bin, "--isnotfc", "--listen", "127.0.0.1",
		"--port", strconv.Itoa(port), "--run-dir", t.TempDir())
	daemon.Stdout, daemon.Stderr = &log, &log
	daemon.WaitDelay = time.Second // a process that a failed case left behind may hold the log open
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { daemon.Wait(); close(ended) }()
	t.Cleanup(func() {
		daemon.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(8 * time.Second): // it promises five
			t.Error("the daemon did not stop on SIGTERM")
			daemon.Process.Kill()
			<-ended
		}
		if code := daemon.ProcessState.ExitCode(); code != 0 {
			t.Errorf("the daemon ended with %v", daemon.ProcessState)
		}
		if t.Failed() {
			t.Logf("the daemon's log:\n%s", log.Bytes())
		}
	})

	// Dialled from this goroutine's own thread: it may be in a network namespace of its own.
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		conn, err := net.Dial("tcp4", address)
		if err == nil {
			conn.Close()
			return "http://" + address
		}
		select {
		case <-ended:
			t.Fatalf("the daemon ended: %v\n%s", daemon.ProcessState, log.Bytes())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("the daemon does not listen: %v", err)
		}
	}
}

// post sends JSON and decodes the answer into reply, unless that is nil.
func post(t *testing.T, url string, request, reply any) {
	t.Helper()
	body, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, "POST", url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		t.Fatalf("POST %s: %s", url, resp.Status)
	}
	if reply != nil {
		if err := json.NewDecoder(resp.Body).Decode(reply); err != nil {
			t.Fatalf("POST %s: %v", url, err)
		}
	}
}

// nothingRuns fails the test if a case left a process behind, and kills that process.
func nothingRuns(t *testing.T, url string) {
	var list struct {
		Processes []struct {
			Pid    int
			Config struct{ Args []string }
		}
	}
	post(t, url+"/process.Process/List", struct{}{}, &list)
	for _, p := range list.Processes {
		t.Errorf("still running: %d %q", p.Pid, strings.Join(p.Config.Args, " "))
		syscall.Kill(p.Pid, syscall.SIGKILL)
	}
}
