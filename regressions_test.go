// Faults that a review of the daemon found, each as it was seen.

package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

// A tracer has the first word when its tracee dies: until it has heard, nobody else may reap.
func TestTracedProcessKeepsItsStatus(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemon(t)
	s := d.start(t, argv("sleep", "300"))
	pid := int(s.pid)
	traced := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // the tracer is a thread
		if _, _, errno := syscall.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0); errno != 0 {
			traced <- errno
			return
		}
		traced <- nil
		waitFor(t, 5*time.Second, "the end of the tracee", func() bool { state, _ := processState(pid); return state == 'Z' })
		time.Sleep(100 * time.Millisecond) // the tracer takes its time
		syscall.Wait4(pid, nil, syscall.WALL, nil)
	}()
	if err := <-traced; err != nil {
		t.Skipf("needs ptrace: %v", err)
	}
	d.kill(t, s.pid)
	wantEnd(t, s.collect().end, -1, false, "signal: killed")
	waitFor(t, 2*time.Second, "no zombie", func() bool { return len(d.zombies()) == 0 })
}

// A process that leaves its terminal open to nobody costs no CPU, and the daemon still stops (the harness waits for that).
func TestProcessThatLeavesItsTerminal(t *testing.T) {
	d := startDaemon(t)
	s := d.start(t, sh("exec sleep 60 </dev/null >/dev/null 2>&1"), withPTY(80, 24))
	waitFor(t, 5*time.Second, "sleep", func() bool {
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", s.pid))
		return string(name) == "sleep\n"
	})
	ticks := func() (n int) { // of 10 ms, proc_pid_stat(5)
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.pid))
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		return atoi(t, fields[11]) + atoi(t, fields[12])
	}
	before := ticks()
	time.Sleep(time.Second)
	if used := ticks() - before; used > 20 {
		t.Errorf("%d ms of CPU in a second with nothing to do", used*10)
	}
	d.kill(t, s.pid)
}

// Root in the guest may remove the idle leaves. Starts go on, with leaves again.
func TestLeavesRemovedByOthers(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	if d.cgroup == "" {
		t.Skip("needs a cgroup2 hierarchy that can be written")
	}
	for range 3 {
		d.run(t, argv("true"))
		idle, err := filepath.Glob(filepath.Join(d.cgroup, "user", "*", "cgroup.procs"))
		if err != nil || len(idle) == 0 {
			t.Fatalf("leaves: %q, %v", idle, err)
		}
		for _, procs := range idle {
			os.Remove(filepath.Dir(procs))
		}
		wantEnd(t, d.run(t, argv("true")).end, 0, true, "exit status 0")
	}
	if got := d.output(t, argv("cat", "/proc/self/cgroup")); !strings.Contains(got, "/user/") {
		t.Errorf("no leaf in %q", got)
	}
}

// What is small on the wire may be large in memory.
func TestMessagesAreBounded(t *testing.T) {
	d := startDaemon(t)
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	fmt.Fprintf(z, `{"process":{"pid":1},"input":{"stdin":"%s"}}`, strings.Repeat("AAAA", 64<<20/4))
	z.Close()
	reply := d.request(t, "POST", "/process.Process/SendInput", bomb.String(), "Content-Type", "application/json", "Content-Encoding", "gzip")
	if reply.status != http.StatusTooManyRequests || !strings.Contains(reply.body, "resource_exhausted") {
		t.Errorf("%d %.200s", reply.status, reply.body)
	}
	// Bodies of /init that never end, from anybody.
	for range 100 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(d.url, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST /init HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n{%s", strings.Repeat(" ", 900_000))
	}
	d.healthy(t)
	if peak := d.peakRSS(); peak > 100<<20 && !raceEnabled() {
		t.Errorf("peak RSS %d MiB", peak>>20)
	}
}

// What a start that never gets anywhere was told is not kept.
func TestConfigIsNotKept(t *testing.T) {
	needNoRace(t)
	d := startDaemon(t)
	argument := strings.Repeat("a", 10<<20)
	for range 12 {
		d.open(t, argv("no-such-command", argument))
	}
	waitFor(t, 20*time.Second, "the memory is given back", func() bool {
		d.run(t, argv("true"))
		return d.rss() < 120<<20
	})
}

// The soft limit is 1024, as programs expect; whoever needs more may have it.
func TestOpenFilesLimit(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	var own unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_NOFILE, &own)
	if got, want := d.output(t, sh("ulimit -Sn; ulimit -Hn")), fmt.Sprintf("1024\n%d\n", own.Max); got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// Output and `end` of a stream that was sent to its end may have been lost on the way: all of it is still there.
func TestResumeAfterTheEnd(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	r := d.run(t, sh("head -c 3000000 /dev/zero; exit 3"), withTag("ended"))
	if len(r.stdout) != 3000000 {
		t.Fatalf("%d bytes", len(r.stdout))
	}
	s := d.connect(t, byTag("ended"), withOutputFrom("1000"))
	wantOffset(t, s.header, 1000, 0)
	if r := s.collect(); len(r.stdout) != 2999000 || r.end.GetExitCode() != 3 {
		t.Errorf("%d bytes, %v", len(r.stdout), r.end)
	}
}

// A start that is given up before its child exists takes the child with it all the same.
func TestStartsGivenUpAtOnce(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	var wait sync.WaitGroup
	for i := range 300 {
		wait.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Duration(1+i%4)*time.Millisecond)
			defer cancel()
			stream, err := d.process().Start(ctx, connect.NewRequest(&pb.StartRequest{
				Process: &pb.ProcessConfig{Cmd: "sleep", Args: []string{"300"}}}))
			if err == nil {
				for stream.Receive() {
				}
				stream.Close()
			}
		})
	}
	wait.Wait()
	waitFor(t, 10*time.Second, "no child is left", func() bool { return len(descendantsOf(d.pid)) == 0 })
}

// Where memory is short each of many stalled streams holds a little only.
func TestManyStalledStreamsShareTheMemory(t *testing.T) {
	d := startDaemon(t, "--output-memory", "1048576")
	const streams = 300
	for range streams {
		d.start(t, argv("cat", "/dev/zero"), withStdin(false)) // never read on
	}
	time.Sleep(500 * time.Millisecond) // time to read more than it should
	// A stream costs some 60 KiB by itself; a piece of 128 KiB each would be 37 MiB more.
	if rss := d.rss(); rss > 45<<20 && !raceEnabled() {
		t.Errorf("RSS %d MiB with %d stalled streams", rss>>20, streams)
	}
	for _, p := range d.list(t) {
		d.kill(t, p.GetPid())
	}
}
