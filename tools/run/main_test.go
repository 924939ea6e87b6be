package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestRun does what `make run ONCE=1` does, as the user who tests and, if that is root, as an ordinary one.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil { // the ordinary user has to get in
		t.Fatal(err)
	}
	build := func(name string, command ...string) string {
		binary := filepath.Join(dir, name)
		cmd := exec.Command(command[0], append(command[1:], binary)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
		return binary
	}
	runner, envd := build("run", "go", "build", "-o"), build("envd", "../build")
	for _, uid := range []uint32{0, 65534} {
		t.Run(fmt.Sprint("uid ", uid), func(t *testing.T) {
			cmd := exec.Command(runner, "-once", "-port", freePort(t), envd)
			cmd.Dir = "/"
			if os.Getuid() == 0 {
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
			} else if uid == 0 {
				t.Skip("needs root: runs the daemon as root")
			}
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Errorf("run: %v", err)
			}
			for _, want := range []string{"Hello from process", "This line went to standard error.", "exit status 0"} {
				if !strings.Contains(string(out), "\n"+want) {
					t.Errorf("the output lacks %q", want)
				}
			}
			if t.Failed() {
				t.Logf("\n%s", out)
			}
		})
	}
}

// TestPortTaken: the daemon that is there already must not answer in the place of ours.
func TestPortTaken(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	port := listener.Addr().(*net.TCPAddr).Port
	wantError(t, run(t.Context(), "/bin/true", port, true), "address already in use")
}

// TestDaemonEnds: a daemon that does not stay is an error at once.
func TestDaemonEnds(t *testing.T) {
	port, _ := strconv.Atoi(freePort(t))
	wantError(t, run(t.Context(), "/bin/false", port, true), "the daemon ended: exit status 1")
}

func wantError(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want %q", err, want)
	}
}

// freePort returns a port that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	_, port, _ := net.SplitHostPort(listener.Addr().String())
	return port
}
