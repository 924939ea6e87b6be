// The daemon under test: built, started on a free port with a cgroup directory of its own, watched through /proc,
// stopped by pid, and everything that it left removed.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// build makes the daemon as `make build` does, but into dir.
func build(ctx context.Context, dir string) (string, error) {
	commit := "unknown"
	if out, err := exec.CommandContext(ctx, "git", "-C", "..", "rev-parse", "--short=12", "HEAD").Output(); err == nil {
		commit = strings.TrimSpace(string(out))
	}
	bin := filepath.Join(dir, "envd")
	cmd := exec.CommandContext(ctx, "../tools/build", bin)
	cmd.Env = append(os.Environ(), "COMMIT="+commit)
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building envd: %w\n%s", err, out)
	}
	return bin, nil
}

// buildHelpers makes the programs beside this one, with the flags of any small static binary.
func buildHelpers(ctx context.Context, dir string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", dir+"/",
		"./plain", "./bare", "./probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building what envd is compared with: %w\n%s", err, out)
	}
	return nil
}

// writableCgroup2 returns the mount point of a cgroup v2 hierarchy in which a directory can be made, or "".
func writableCgroup2() string {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 3 || f[2] != "cgroup2" {
			continue
		}
		probe, err := os.MkdirTemp(f[1], "envd-bench-probe-")
		if err != nil {
			continue
		}
		os.Remove(probe)
		return f[1]
	}
	return ""
}

// daemon is a running server process: envd, the plain server, or the bare handler.
type daemon struct {
	cmd    *exec.Cmd
	addr   string
	url    string
	cgroup string        // its --cgroup-root, "" when there is none
	boot   time.Duration // from exec to the first /health answered
	output bytes.Buffer
	exited chan struct{} // closed when the process has been waited for
}

var instances atomic.Int32

// startEnvd runs the binary with its defaults, but for the address, the run directory, the cgroup root, and further flags.
func (b *bench) startEnvd(ctx context.Context, flags ...string) (*daemon, error) {
	d := &daemon{}
	n := instances.Add(1)
	args := []string{"--isnotfc", "--listen", "127.0.0.1", "--run-dir", filepath.Join(b.dir, fmt.Sprintf("run%d", n))}
	args = append(args, flags...)
	if b.cgroup2 != "" {
		d.cgroup = filepath.Join(b.cgroup2, fmt.Sprintf("envd-bench-%d-%d", os.Getpid(), n))
		if err := os.Mkdir(d.cgroup, 0o755); err != nil {
			return nil, err
		}
		args = append(args, "--cgroup-root", d.cgroup)
	}
	return d, d.run(ctx, func(port string) *exec.Cmd { return exec.Command(b.envd, append(args, "--port", port)...) })
}

// startHelper runs the plain server or the bare handler.
func (b *bench) startHelper(ctx context.Context, name string) (*daemon, error) {
	d := &daemon{}
	return d, d.run(ctx, func(port string) *exec.Cmd { return exec.Command(filepath.Join(b.dir, name), port) })
}

func (d *daemon) run(ctx context.Context, command func(port string) *exec.Cmd) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	d.addr = l.Addr().String()
	d.url = "http://" + d.addr
	l.Close()
	_, port, _ := net.SplitHostPort(d.addr)
	d.cmd = command(port)
	d.cmd.Stdout, d.cmd.Stderr = &d.output, &d.output
	d.exited = make(chan struct{})
	start := time.Now()
	if err := d.cmd.Start(); err != nil {
		d.removeCgroup()
		return err
	}
	go func() { d.cmd.Wait(); close(d.exited) }()
	for !d.answers() {
		select {
		case <-d.exited:
			d.removeCgroup()
			return fmt.Errorf("%s ended at its start:\n%s", d.cmd.Path, d.output.String())
		case <-ctx.Done():
			return errors.Join(ctx.Err(), d.stop())
		case <-time.After(20 * time.Microsecond):
		}
		if time.Since(start) > 10*time.Second {
			return errors.Join(fmt.Errorf("%s does not answer /health", d.cmd.Path), d.stop())
		}
	}
	d.boot = time.Since(start)
	return nil
}

func (d *daemon) answers() bool {
	conn, err := net.Dial("tcp", d.addr)
	if err != nil {
		return false
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(2 * time.Second))
	io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
	var head [10]byte
	_, err = io.ReadFull(conn, head[:])
	return err == nil && string(head[:]) == "HTTP/1.1 2"
}

// stop ends the daemon, what is left of its children in its cgroup, and the cgroup.
func (d *daemon) stop() error {
	d.cmd.Process.Signal(unix.SIGTERM)
	var err error
	select {
	case <-d.exited:
	case <-time.After(8 * time.Second):
		d.cmd.Process.Kill()
		<-d.exited
		err = errors.New("the daemon did not stop within 8 s of SIGTERM")
	}
	return errors.Join(err, d.removeCgroup())
}

func (d *daemon) removeCgroup() error {
	if d.cgroup == "" {
		return nil
	}
	os.WriteFile(filepath.Join(d.cgroup, "cgroup.kill"), []byte("1"), 0)
	for deadline := time.Now().Add(3 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		var dirs []string
		filepath.WalkDir(d.cgroup, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, path)
			}
			return nil
		})
		var err error
		for i := len(dirs) - 1; i >= 0; i-- { // a directory comes after its parent
			err = errors.Join(err, os.Remove(dirs[i]))
		}
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

func (d *daemon) pid() int { return d.cmd.Process.Pid }

// status reads one figure of /proc/PID/status; figures in kB come back in bytes.
func (d *daemon) status(field string) (float64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.pid()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		if name != field {
			continue
		}
		value = strings.TrimSpace(value)
		number, kB := strings.CutSuffix(value, " kB")
		v, err := strconv.ParseFloat(number, 64)
		if kB {
			v *= 1024
		}
		return v, err
	}
	return 0, fmt.Errorf("no %s in /proc/%d/status", field, d.pid())
}

// openFiles counts the daemon's descriptors once the count has stayed the same for 200 ms: a closed connection leaves
// it a little later than the client.
func (d *daemon) openFiles() (int, error) {
	last, since := -1, time.Now()
	for begin := since; ; time.Sleep(5 * time.Millisecond) {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.pid()))
		if err != nil {
			return 0, err
		}
		if len(entries) != last {
			last, since = len(entries), time.Now()
		}
		if time.Since(since) > 200*time.Millisecond || time.Since(begin) > 5*time.Second {
			return last, nil
		}
	}
}

// zombiesLeft gives the daemon 2 s to wait for what has ended and counts what it has not waited for.
func (d *daemon) zombiesLeft() int {
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if n := d.zombies(); n == 0 || time.Now().After(deadline) {
			return n
		}
	}
}

func (d *daemon) zombies() int {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	n := 0
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		// pid (name) state ppid ...; the name may hold anything, a closing parenthesis included.
		f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		if len(f) > 1 && f[0] == "Z" && f[1] == strconv.Itoa(d.pid()) {
			n++
		}
	}
	return n
}
