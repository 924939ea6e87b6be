// Promise P7, as far as it shows without a virtual machine: prepare and recovery, whatever is going on meanwhile, and
// freezing. A client with an address of its own, in a network namespace, plays the host; a seccomp filter plays a disk that
// hangs and a kernel that refuses.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

func init() {
	testRoles["steady-output"] = writeSteadily
	testRoles["probe-health"] = probeHealth
	testRoles["reseed"] = reseedWithoutDev
	testRoles["step-clock"] = stepClocks
}

// noSync spares the machine, which others use, a sync(2) for each preparation.
const noSync = "--sync-timeout=0s"

// prepare is what the host asks for before it takes a snapshot, on a connection of its own: idle ones are being closed.
func (d *daemon) prepare(t testing.TB) {
	t.Helper()
	transport := d.http.Transport.(*http.Transport).Clone()
	transport.DisableKeepAlives = true
	request, _ := http.NewRequestWithContext(t.Context(), "POST", d.url+"/snapshot/prepare", nil)
	response, err := transport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusNoContent {
		t.Fatalf("prepare: %d", response.StatusCode)
	}
}

// keepsAlive tells whether a response leaves its connection open.
func (d *daemon) keepsAlive(t testing.TB) bool {
	t.Helper()
	request, _ := http.NewRequestWithContext(t.Context(), "GET", d.url+"/envs", nil)
	response, err := d.http.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, response.Body)
	response.Body.Close()
	return !response.Close
}

// recoveries counts them in the log.
func (d *daemon) recoveries() int { return strings.Count(d.log(), "recovered from the preparation") }

func TestPrepareAndRestore(t *testing.T) {
	t.Parallel()
	d := startDaemon(t) // with a real sync(2)
	idle, err := net.Dial("tcp", d.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer idle.Close()
	fmt.Fprintf(idle, "GET /envs HTTP/1.1\r\nHost: localhost\r\n\r\n")
	idle.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := idle.Read(make([]byte, 4096)); n == 0 {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", d.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	begun := time.Now()
	fmt.Fprintf(conn, "POST /snapshot/prepare HTTP/1.1\r\nHost: localhost\r\n\r\n")
	answer, err := io.ReadAll(conn)
	if took := time.Since(begun); took > 2900*time.Millisecond && !raceEnabled() { // 2.6 s, and a busy machine
		t.Errorf("prepare took %v", took)
	}
	for _, want := range []string{"HTTP/1.1 204 No Content\r\n", "\r\nConnection: close\r\n", "\r\nCache-Control: no-store\r\n"} {
		if strings.Count(string(answer), want) != 1 || err != nil {
			t.Errorf("prepare: %q, %v; want %q", answer, err, want)
		}
	}
	if n, err := io.Copy(io.Discard, idle); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("an idle connection was not closed: %d bytes, %v", n, err)
	}
	for range 3 { // they neither fail nor end the state
		if d.keepsAlive(t) {
			t.Error("a request between prepare and restore kept its connection")
		}
	}
	d.prepare(t)
	if n := d.recoveries(); n != 0 || d.keepsAlive(t) {
		t.Errorf("%d recoveries before anybody asked for one", n)
	}
	d.healthy(t)
	if !d.keepsAlive(t) {
		t.Error("no keep-alive after the recovery")
	}
	d.prepare(t)
	if got := d.request(t, "POST", "/init", ""); got.status != http.StatusNoContent || !d.keepsAlive(t) {
		t.Errorf("/init: %d, and it did not recover", got.status)
	}
	waitFor(t, 5*time.Second, "two recoveries in the log", func() bool { return d.recoveries() == 2 })
	for _, method := range []string{"GET", "PUT"} {
		if got := d.request(t, method, "/snapshot/prepare", ""); got.status != http.StatusMethodNotAllowed {
			t.Errorf("%s: %d", method, got.status)
		}
	}
}

// The token does not keep the host from preparing, which has none; what freezes needs it.
func TestPrepareNeedsNoToken(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, noSync)
	d.request(t, "POST", "/init", `{"accessToken":"secret"}`)
	d.prepare(t)
	d.healthy(t)
	for _, path := range []string{"/freeze", "/unfreeze", "/fsfreeze", "/fsthaw"} {
		if got := d.request(t, "POST", path, ""); got.status != http.StatusUnauthorized {
			t.Errorf("%s without the token: %d", path, got.status)
		}
	}
}

func TestRestoreOnce(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, noSync)
	rounds := 20
	for range rounds {
		var all sync.WaitGroup
		for range 2 {
			all.Go(func() { d.prepare(t) })
		}
		all.Wait()
		for i := range 64 {
			all.Go(func() {
				client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
				response, err := client.Get(d.url + "/health")
				if err != nil || response.StatusCode != http.StatusOK {
					t.Errorf("/health %d: %v", i, err)
					return
				}
				response.Body.Close()
			})
		}
		all.Wait()
		if !d.keepsAlive(t) {
			t.Error("not recovered")
		}
	}
	waitFor(t, 5*time.Second, "as many recoveries as preparations", func() bool { return d.recoveries() == rounds })
}

// ---- streams ------------------------------------------------------------------------------------------------------

// writeSteadily is a role: it writes the one stream of SEED in small pieces until its stdin ends, then how much to TOTAL.
func writeSteadily(args []string) {
	seed, _ := strconv.ParseUint(args[0], 10, 64)
	var done atomic.Bool
	go func() {
		io.Copy(io.Discard, os.Stdin)
		done.Store(true)
	}()
	source, buf, total := randomBytes(seed, 0), make([]byte, 600), 0
	for !done.Load() {
		source.Read(buf)
		if _, err := os.Stdout.Write(buf); err != nil {
			os.Exit(1)
		}
		total += len(buf)
		time.Sleep(8 * time.Millisecond)
	}
	if os.WriteFile(args[1], []byte(strconv.Itoa(total)), 0o644) != nil {
		os.Exit(1)
	}
}

// steady is a process of that role and its follower, who comes back by offset.
type steady struct {
	pid      uint32
	total    string // file
	cuts     atomic.Int64
	received atomic.Int64
	done     chan struct{}
}

func (d *daemon) startSteady(t *testing.T, seed uint64, client pb.ProcessClient) *steady {
	t.Helper()
	s := &steady{total: filepath.Join(publicDir(t), "total"), done: make(chan struct{})}
	stream := d.start(t, argv(helperBinary(t), "steady-output", strconv.FormatUint(seed, 10), s.total), withClient(client), withStdin(true))
	s.pid = stream.pid
	source, want := randomBytes(seed, 0), make([]byte, outputChunk)
	go func() {
		defer close(s.done)
		for {
			for event := stream.next(); event != nil; event = stream.next() {
				if event.GetEnd() != nil {
					if event.GetEnd().GetStatus() != "exit status 0" {
						t.Errorf("process %d: %v", s.pid, event.GetEnd())
					}
					return
				}
				data := event.GetData().GetStdout()
				source.Read(want[:len(data)])
				if !bytes.Equal(data, want[:len(data)]) {
					t.Errorf("process %d: a byte is lost, doubled or wrong within %d bytes behind %d", s.pid, len(data), s.received.Load())
					return
				}
				s.received.Add(int64(len(data)))
			}
			stream.drop()
			s.cuts.Add(1)
			for ok := false; !ok; {
				var err error
				offset := strconv.FormatInt(s.received.Load(), 10)
				stream, err = d.openConnect(t, byPid(s.pid), withClient(client), withOutputFrom(offset))
				if err != nil {
					if t.Context().Err() != nil {
						return
					}
					continue // a connection that was being reset
				}
				var event *pb.ProcessEvent
				if event, ok = stream.receive(); !ok {
					stream.drop()
				} else if event.GetStart() == nil || stream.header.Get("Envd-Output-Offset") != offset || stream.header.Get("Envd-Output-Lost") != "0" {
					t.Errorf("process %d resumed at %s: %v, %v", s.pid, offset, event, stream.header)
					return
				}
			}
		}
	}()
	return s
}

// finish lets the process end and compares what arrived with what it wrote.
func (s *steady) finish(t *testing.T, d *daemon) {
	t.Helper()
	d.closeStdin(t, byPid(s.pid))
	select {
	case <-s.done:
	case <-time.After(30 * time.Second):
		t.Fatalf("process %d: its stream does not end", s.pid)
	}
	text, _ := os.ReadFile(s.total)
	if string(text) != strconv.FormatInt(s.received.Load(), 10) {
		t.Errorf("process %d wrote %s bytes, %d arrived", s.pid, text, s.received.Load())
	}
}

// clients are one for each kind of connection.
func (d *daemon) clients() map[string]pb.ProcessClient {
	return map[string]pb.ProcessClient{
		"Connect, HTTP/1.1": d.process(), "gRPC-Web, HTTP/1.1": d.process(connect.WithGRPCWeb()),
		"Connect, h2c": pb.NewProcessClient(d.h2, d.url), "gRPC, h2c": pb.NewProcessClient(d.h2, d.url, connect.WithGRPC()),
	}
}

// Streams of before the snapshot are reset by the recovery and go on by offset; those of afterwards are left alone.
func TestStreamsAcrossSnapshots(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, noSync)
	streams := map[string]*steady{}
	for name, client := range d.clients() {
		streams[name] = d.startSteady(t, rand.Uint64(), client)
	}
	quiet := d.start(t, sh("read x; echo $x")) // nothing is written to it: only the reset tells
	for round := range int64(5) {
		for name, s := range streams {
			before := s.received.Load()
			waitFor(t, 20*time.Second, name+" goes on", func() bool { return s.received.Load() > before })
		}
		d.prepare(t)
		for name, s := range streams {
			before := s.received.Load()
			waitFor(t, 20*time.Second, name+" goes on while prepared", func() bool { return s.received.Load() > before })
			if s.cuts.Load() != round {
				t.Errorf("%s: cut before the recovery", name)
			}
		}
		d.healthy(t)
		for name, s := range streams {
			waitFor(t, 20*time.Second, name+" is cut", func() bool { return s.cuts.Load() == round+1 })
		}
	}
	if event := quiet.next(); event != nil || !errors.Is(quiet.failure(), syscall.ECONNRESET) {
		t.Errorf("a silent stream: %v, %v; want a reset", event, quiet.failure())
	}
	young := d.start(t, sh("read x; echo $x"))
	d.healthy(t)
	for _, s := range []*clientStream{young, d.connect(t, byPid(quiet.pid))} {
		d.sendStdin(t, byPid(s.pid), "hello\n")
		if r := s.collect(); string(r.stdout) != "hello\n" || r.end == nil {
			t.Errorf("%q, %v", r.stdout, r.err)
		}
	}
	for name, s := range streams {
		s.finish(t, d)
		if s.cuts.Load() != 5 {
			t.Errorf("%s was cut %d times, want 5", name, s.cuts.Load())
		}
	}
}

// What is not a connection stays as it was.
func TestWhatSurvivesASnapshot(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, noSync)
	dir := publicDir(t)
	d.request(t, "POST", "/init", `{"accessToken":"secret","envVars":{"KEPT":"yes"},"defaultWorkdir":"/usr"}`)
	token := withHeader("X-Access-Token", "secret")
	ended := d.run(t, sh("echo bye; exit 3"), withTag("ended"), token)
	plain := d.start(t, sh("read x; echo $x $KEPT $PWD"), withTag("plain"), token)
	terminal := d.start(t, argv("cat"), withPTY(90, 20), withTag("terminal"), token)
	watchRequest := connect.NewRequest(&pb.CreateWatcherRequest{Path: dir})
	watchRequest.Header().Set("X-Access-Token", "secret")
	w, err := d.filesystem().CreateWatcher(t.Context(), watchRequest)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		d.prepare(t)
		writeFile(t, filepath.Join(dir, strconv.Itoa(i)), "", 0o644)
		d.healthy(t)
	}
	send := func(tag string, input *pb.ProcessInput) {
		request := connect.NewRequest(&pb.SendInputRequest{Process: byTag(tag), Input: input})
		request.Header().Set("X-Access-Token", "secret")
		if _, err := d.process().SendInput(t.Context(), request); err != nil {
			t.Errorf("input to %s: %v", tag, err)
		}
	}
	send("plain", &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("said\n")}})
	again := d.connect(t, byTag("plain"), token)
	if r := again.collect(); again.pid != plain.pid || string(r.stdout) != "said yes /usr\n" {
		t.Errorf("pid %d, %q, %v", again.pid, r.stdout, r.err)
	}
	send("terminal", &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("typed\n")}})
	again = d.connect(t, byTag("terminal"), token)
	again.readUntil(t, "typed\r\ntyped\r\n")
	if again.pid != terminal.pid {
		t.Errorf("the terminal's pid is %d, was %d", again.pid, terminal.pid)
	}
	if r := d.connect(t, byTag("ended"), token, withOutputFrom("all")).collect(); string(r.stdout) != "bye\n" || r.pid != ended.pid {
		t.Errorf("the ended process: %q, %v", r.stdout, r.err)
	} else {
		wantEnd(t, r.end, 3, true, "exit status 3")
	}
	events := connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: w.Msg.GetWatcherId()})
	events.Header().Set("X-Access-Token", "secret")
	created := map[string]int{}
	waitFor(t, 5*time.Second, "the files that were made while prepared", func() bool {
		res, err := d.filesystem().GetWatcherEvents(t.Context(), events)
		if err != nil {
			t.Fatal(err)
		}
		for _, event := range res.Msg.GetEvents() {
			if event.GetType() == pb.EventType_EVENT_TYPE_CREATE {
				created[event.GetName()]++
			}
		}
		return len(created) == 3
	})
	if got := d.request(t, "GET", "/envs", ""); got.status != http.StatusUnauthorized {
		t.Errorf("/envs without the token: %d", got.status)
	}
}

// A snapshot that failed: the host goes on with the same sandbox and tells nobody.
func TestPreparedBackstop(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, noSync, "--prepared-timeout", "1500ms")
	stream := d.start(t, argv("sleep", "100"))
	begun := time.Now()
	d.prepare(t)
	if stream.next() != nil || !errors.Is(stream.failure(), syscall.ECONNRESET) {
		t.Errorf("the stream: %v", stream.failure())
	}
	if waited := time.Since(begun); waited < 1400*time.Millisecond {
		t.Errorf("recovered after %v", waited)
	}
	waitFor(t, 5*time.Second, "connections are kept again", func() bool { return d.keepsAlive(t) })
	d.kill(t, stream.pid)
}

// Uploads and downloads that a recovery cuts leave whole files, as any that is cut; those that are not cut go through.
func TestTransfersAcrossSnapshots(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, noSync)
	dir := publicDir(t)
	old := strings.Repeat("old ", 1<<20)
	file := writeFile(t, filepath.Join(dir, "file"), old, 0o644)
	body, feed := io.Pipe()
	request, _ := http.NewRequestWithContext(t.Context(), "POST", d.url+"/files?path="+file, body)
	request.Header.Set("Content-Type", "application/octet-stream")
	cut := make(chan error, 1)
	go func() {
		response, err := d.http.Do(request)
		if err == nil {
			response.Body.Close()
			err = fmt.Errorf("status %d", response.StatusCode)
		}
		cut <- err
	}()
	feed.Write(make([]byte, 3<<20)) // returns when the daemon has read most of it
	d.prepare(t)
	d.healthy(t)
	for i := 0; i < 1000; i++ {
		if _, err := feed.Write(make([]byte, 64<<10)); err != nil {
			break
		}
	}
	feed.CloseWithError(io.ErrUnexpectedEOF)
	if err := <-cut; err == nil || strings.HasPrefix(err.Error(), "status 2") {
		t.Errorf("the upload that was cut: %v", err)
	}
	waitFor(t, 10*time.Second, "the temporary file is gone", func() bool {
		entries, _ := os.ReadDir(dir)
		return len(entries) == 1
	})
	if text, _ := os.ReadFile(file); string(text) != old {
		t.Errorf("the old file has %d bytes and not its content", len(text))
	}
}

// ---- a disk that hangs, a kernel that refuses ---------------------------------------------------------------------

// seccompFilter is a preparation (harness_test.go): system call NUMBER, with ARG1 as its second argument unless that is 0, fails
// with ERRNO, or, where that is `hang`, never comes back: it waits for a supervisor that is there and never answers.
func seccompFilter(operand string) error {
	fields := strings.Split(operand, ":")
	number, _ := strconv.Atoi(fields[0])
	arg1, _ := strconv.ParseUint(fields[1], 0, 32)
	errno, _ := strconv.Atoi(fields[2])
	action, flags := uint32(unix.SECCOMP_RET_ERRNO|errno), 0
	if fields[2] == "hang" {
		action, flags = unix.SECCOMP_RET_USER_NOTIF, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER
	}
	const load, equal, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	program := []unix.SockFilter{
		{Code: load, K: 0}, {Code: equal, K: uint32(number), Jf: 3}, // struct seccomp_data: nr, arch, instruction, args
		{Code: load, K: 24}, {Code: equal, K: uint32(arg1), Jf: 1},
		{Code: ret, K: action},
		{Code: ret, K: unix.SECCOMP_RET_ALLOW},
	}
	if arg1 == 0 {
		program[3] = unix.SockFilter{Code: load, K: 0}
	}
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	fd, _, failure := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(flags), uintptr(unsafe.Pointer(&fprog)))
	if failure != 0 {
		return failure
	}
	if flags != 0 {
		unix.FcntlInt(fd, unix.F_SETFD, 0) // the daemon is its own supervisor
	}
	return nil
}

// syncing counts the daemon's threads in sync(2).
func (d *daemon) syncing() (n int) {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/syscall", d.pid))
	for _, file := range files {
		text, _ := os.ReadFile(file)
		if strings.HasPrefix(string(text), strconv.Itoa(unix.SYS_SYNC)+" ") {
			n++
		}
	}
	return n
}

func TestPrepareWithAHangingDisk(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemonWith(t, daemonConfig{steps: []string{"seccomp", fmt.Sprintf("%d:0:hang", unix.SYS_SYNC)}})
	quickest := time.Hour // of three: the machine may have other things to do
	for range 3 {
		begun := time.Now()
		d.prepare(t)
		took := time.Since(begun)
		if quickest = min(quickest, took); took < 2400*time.Millisecond {
			t.Errorf("prepare took %v, and the disk hangs", took)
		}
		if n := d.syncing(); n != 1 {
			t.Errorf("%d threads wait for the disk, want 1", n)
		}
		begun = time.Now()
		d.healthy(t)
		if took := time.Since(begun); took > time.Second {
			t.Errorf("/health took %v", took)
		}
	}
	if quickest > 2600*time.Millisecond && !raceEnabled() {
		t.Errorf("prepare took %v at best", quickest)
	}
	if !strings.Contains(d.log(), "not everything has been written") {
		t.Error("the log does not say that the sync did not end")
	}
}

// A host that did not wait for the preparation has taken its snapshot in the middle of it: what goes on from there ends preparing
// after the host has sent its /init, and may not wait for another.
func TestInitWhilePreparing(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemonWith(t, daemonConfig{steps: []string{"seccomp", fmt.Sprintf("%d:0:hang", unix.SYS_SYNC)}})
	prepared := make(chan error, 1)
	go func() {
		response, err := d.http.Post(d.url+"/snapshot/prepare", "", nil)
		if err == nil {
			response.Body.Close()
		}
		prepared <- err
	}()
	waitFor(t, 5*time.Second, "the preparation", func() bool { return d.syncing() == 1 })
	if got := d.request(t, "POST", "/init", ""); got.status != http.StatusNoContent {
		t.Fatalf("/init: %d %s", got.status, got.body)
	}
	if err := <-prepared; err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Error(err)
	}
	if !d.keepsAlive(t) {
		t.Error("after /init the sandbox is prepared for another snapshot")
	}
}

// guestDaemon is one that takes itself for a guest's agent, on all addresses. What is not its own it gets replaced.
func guestDaemon(t *testing.T, args []string, steps ...string) (d *daemon, files map[string]string) {
	t.Helper()
	needRoot(t)
	dir := publicDir(t)
	files = map[string]string{}
	for _, path := range []string{"/proc/sys/vm/drop_caches", "/proc/sys/fs/inotify/max_user_instances",
		"/proc/sys/fs/inotify/max_user_watches", "/proc/sys/fs/inotify/max_queued_events", "/proc/sys/fs/protected_hardlinks",
		"/proc/sys/fs/protected_symlinks", "/proc/sys/fs/protected_fifos", "/proc/sys/fs/protected_regular"} {
		files[path] = writeFile(t, filepath.Join(dir, filepath.Base(path)), "99999999", 0o644)
		steps = append(steps, "mount", files[path]+":"+path)
	}
	d = startDaemonWith(t, daemonConfig{listen: "default", args: append([]string{"--isnotfc=false"}, args...), steps: steps,
		files: map[string]string{"/etc/hostname": "guest\n"}}) // for the mount namespace
	return d, files
}

// host gives d's clients an address that is not one of the machine's own: that of a network namespace behind a veth pair.
func (d *daemon) host(t *testing.T) *daemon {
	t.Helper()
	needRoot(t)
	net24 := fmt.Sprintf("10.%d.%d", 64+rand.IntN(64), rand.IntN(256))
	name := fmt.Sprintf("lc%d", rand.IntN(1e9))
	run := func(words string) {
		fields := strings.Fields(words)
		if out, err := exec.Command(fields[0], fields[1:]...).CombinedOutput(); err != nil {
			t.Skipf("needs network namespaces: %s: %v %s", words, err, out)
		}
	}
	run("ip netns add " + name)
	t.Cleanup(func() { exec.Command("ip", "netns", "del", name).Run() })
	run(fmt.Sprintf("ip link add %sa type veth peer name eth0 netns %s", name, name))
	run(fmt.Sprintf("ip addr add %s.1/24 dev %sa", net24, name))
	run(fmt.Sprintf("ip link set %sa up", name))
	run(fmt.Sprintf("ip netns exec %s ip addr add %s.2/24 dev eth0", name, net24))
	run(fmt.Sprintf("ip netns exec %s ip link set eth0 up", name))
	ns, err := os.Open("/run/netns/" + name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	dial := func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // for good: the thread ends with the goroutine
			if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err == nil {
				conn, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, "tcp4", address)
			}
		}()
		<-done
		return conn, err
	}
	transport := &http.Transport{DialContext: dial}
	t.Cleanup(transport.CloseIdleConnections)
	return &daemon{url: fmt.Sprintf("http://%s.1:%d", net24, d.port), addr: fmt.Sprintf("%s.1:%d", net24, d.port), port: d.port,
		pid: d.pid, logFile: d.logFile, http: &http.Client{Transport: transport}}
}

// A process of the guest that loops prepare and /health neither cuts a stream nor ends what the host has prepared.
func TestHostileGuest(t *testing.T) {
	t.Parallel()
	d, files := guestDaemon(t, nil)
	host := d.host(t)
	stream := host.start(t, sh("while read x; do echo $x; done"), withStdin(true))
	attack := func() {
		for _, url := range []string{d.url, host.url} {
			for range 20 {
				request, _ := http.NewRequestWithContext(t.Context(), "POST", url+"/snapshot/prepare", nil)
				wantEnvelope(t, "prepare from inside", d.do(t, request), http.StatusForbidden, "")
				request, _ = http.NewRequestWithContext(t.Context(), "GET", url+"/health", nil)
				if got := d.do(t, request); got.status != http.StatusOK {
					t.Errorf("/health from inside: %d", got.status)
				}
			}
		}
	}
	attack()
	if !host.keepsAlive(t) {
		t.Error("the attack prepared a snapshot")
	}
	host.sendStdin(t, byPid(stream.pid), "one\n")
	stream.readUntil(t, "one\n")
	host.prepare(t)
	if text, _ := os.ReadFile(files["/proc/sys/vm/drop_caches"]); string(text) != "3" {
		t.Errorf("drop_caches was written %q, want 3", text)
	}
	attack()
	if host.keepsAlive(t) || d.recoveries() != 0 {
		t.Error("the attack ended what the host had prepared")
	}
	host.sendStdin(t, byPid(stream.pid), "two\n")
	stream.readUntil(t, "two\n")
	host.healthy(t)
	if !host.keepsAlive(t) {
		t.Error("the host's /health did not recover")
	}
	host.kill(t, stream.pid)
}

// Where the disk hangs the page cache stays, and an --isnotfc machine's stays always.
func TestNoPageCacheDropUnlessWritten(t *testing.T) {
	t.Parallel()
	d, files := guestDaemon(t, argv("--sync-timeout=300ms"), "seccomp", fmt.Sprintf("%d:0:hang", unix.SYS_SYNC))
	d.host(t).prepare(t)
	d, other := guestDaemon(t, argv("--isnotfc=true"))
	d.prepare(t)
	for _, file := range []string{files["/proc/sys/vm/drop_caches"], other["/proc/sys/vm/drop_caches"]} {
		if text, err := os.ReadFile(file); string(text) != "99999999" {
			t.Errorf("drop_caches was written: %q, %v", text, err)
		}
	}
}

// The answers of the kernel to FIFREEZE and FITHAW are the filter's: no filesystem is frozen here.
func TestFreezeFiles(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		path    string
		request uint32
		errno   syscall.Errno
		status  int
	}{
		{"/fsfreeze", fiFreeze, 0, 204}, {"/fsfreeze", fiFreeze, unix.EBUSY, 204}, {"/fsfreeze", fiFreeze, unix.EOPNOTSUPP, 500},
		{"/fsthaw", fiThaw, 0, 204}, {"/fsthaw", fiThaw, unix.EINVAL, 204}, {"/fsthaw", fiThaw, unix.EIO, 500},
	} {
		d, _ := guestDaemon(t, nil, "seccomp", fmt.Sprintf("%d:%d:%d", unix.SYS_IOCTL, test.request, test.errno))
		got := d.request(t, "POST", test.path, "")
		if got.status != test.status || got.status == 204 && got.header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s, errno %d: %d %q, want %d", test.path, test.errno, got.status, got.body, test.status)
		}
	}
	d := startDaemon(t)
	for _, path := range []string{"/fsfreeze", "/fsthaw"} {
		wantEnvelope(t, path+" under --isnotfc", d.request(t, "POST", path, ""), http.StatusForbidden, "")
	}
}

// ---- freezing -----------------------------------------------------------------------------------------------------

func (d *daemon) control(t testing.TB, path string) httpReply {
	t.Helper()
	got := d.request(t, "POST", path, "")
	if got.status == http.StatusNoContent && got.header.Get("Cache-Control") != "no-store" {
		t.Errorf("%s: no-store is missing", path)
	}
	return got
}

// frozen freezes and waits.
func (d *daemon) frozen(t testing.TB) (reply map[string]any) {
	t.Helper()
	got := d.control(t, "/freeze?mode=hierarchy&maxCgroups=100&maxWaitMs=10000")
	if err := json.Unmarshal([]byte(got.body), &reply); err != nil || got.status != http.StatusOK || reply["frozen"] != 2.0 {
		t.Fatalf("freeze: %d %q", got.status, got.body)
	}
	return reply
}

func (d *daemon) mustControl(t testing.TB, path string) {
	t.Helper()
	if got := d.control(t, path); got.status != http.StatusNoContent {
		t.Fatalf("%s: %d %q", path, got.status, got.body)
	}
}

// stands tells whether a process's output stands still.
func stands(s *steady) bool {
	for range 3 {
		before := s.received.Load()
		time.Sleep(60 * time.Millisecond)
		if s.received.Load() == before {
			return true
		}
	}
	return false
}

func TestFreeze(t *testing.T) {
	t.Parallel()
	newCgroup(t)
	d := startDaemon(t)
	d.mustControl(t, "/unfreeze") // nothing is frozen
	s := d.startSteady(t, 1, d.process())
	goesOn := func() {
		t.Helper()
		before := s.received.Load()
		waitFor(t, 10*time.Second, "the process goes on", func() bool { return s.received.Load() > before })
	}
	for name, freeze := range map[string]func(){
		"with an answer": func() {
			reply := d.frozen(t)
			for key, want := range map[string]any{"mode": "legacy", "visited": 2.0, "allowlisted": 0.0, "truncated": false, "preFrozen": 0.0,
				"requested": 2.0, "notFrozen": 0.0, "failed": 0.0, "unobservable": 0.0} {
				if got, is := reply[key]; got != want || !is {
					t.Errorf("%s is %v, want %v", key, got, want)
				}
			}
			if len(reply) != 12 {
				t.Errorf("the answer has %d fields: %v", len(reply), reply)
			}
		},
		"without": func() { d.mustControl(t, "/freeze") },
		"twice": func() {
			d.frozen(t)
			if reply := d.frozen(t); reply["preFrozen"] != 2.0 {
				t.Errorf("the second freeze: %v", reply)
			}
		},
	} {
		goesOn()
		freeze()
		if !stands(s) {
			t.Errorf("%s: the process runs on", name)
		}
		d.mustControl(t, "/unfreeze")
		d.mustControl(t, "/unfreeze")
		goesOn()
	}
	d.frozen(t)
	if got := d.request(t, "POST", "/init", ""); got.status != http.StatusNoContent {
		t.Errorf("/init: %d", got.status)
	}
	goesOn()
	s.finish(t, d)
	for _, query := range []string{"maxWaitMs=soon", "maxWaitMs=1.5", "maxWaitMs=99999999999999999999"} {
		wantEnvelope(t, query, d.request(t, "POST", "/freeze?"+query, ""), http.StatusBadRequest, "")
	}
	for _, query := range []string{"maxWaitMs=0", "maxWaitMs=-5", "maxWaitMs=", "mode=none"} {
		d.mustControl(t, "/freeze?"+query)
	}
	d.mustControl(t, "/unfreeze")
}

// Clients' deadlines and kills hold for what is frozen.
func TestKillWhileFrozen(t *testing.T) {
	t.Parallel()
	newCgroup(t)
	d := startDaemon(t)
	killed := d.start(t, sh("sleep 1000 & sleep 1000"))
	late := d.start(t, argv("sleep", "1000"), withTimeoutMs(1500))
	terminal := d.start(t, argv("cat"), withPTY(80, 24))
	d.frozen(t)
	d.kill(t, killed.pid)
	d.kill(t, terminal.pid)
	for _, s := range []*clientStream{killed, terminal} {
		r := s.collect()
		wantEnd(t, r.end, -1, false, "signal: killed")
	}
	if r := late.collect(); connect.CodeOf(r.err) != connect.CodeDeadlineExceeded {
		t.Errorf("past its deadline: %v", r.err)
	}
	waitGone(t, 5*time.Second, int(late.pid))
	if n := len(cgroupProcesses(d.cgroup)); n != 0 {
		t.Errorf("%d processes are left", n)
	}
	d.mustControl(t, "/unfreeze")
	d.output(t, argv("true"))
}

// The end of a process waits for its background children to be silent; while frozen they are not.
func TestEndWhileFrozen(t *testing.T) {
	t.Parallel()
	newCgroup(t)
	d := startDaemon(t, "--end-silence=600ms", "--end-grace=1s")
	s := d.start(t, sh("(sleep 0.3; echo late; sleep 10) & echo soon"))
	s.readUntil(t, "soon\n")
	d.frozen(t)
	time.Sleep(1500 * time.Millisecond)
	d.mustControl(t, "/unfreeze")
	if r := s.collect(); string(r.stdout) != "late\n" || r.end == nil {
		t.Errorf("%q, %v, %v", r.stdout, r.end, r.err)
	}
}

// A Start during a freeze waits for the thaw, for as long as its client does, and costs no thread.
func TestStartWhileFrozen(t *testing.T) {
	t.Parallel()
	newCgroup(t)
	d := startDaemon(t, "--start-timeout=700ms")
	for range 3 {
		var patient, impatient sync.WaitGroup
		var started atomic.Int64
		for range 16 {
			patient.Go(func() {
				for range 6 {
					if r, err := d.open(t, argv("true")); err != nil {
						t.Error(err)
					} else if end := r.collect(); end.err != nil || end.end.GetStatus() != "exit status 0" {
						t.Errorf("%v, %v", end.end, end.err)
					}
					started.Add(1)
				}
			})
		}
		waitFor(t, 10*time.Second, "some have started", func() bool { return started.Load() > 8 })
		d.frozen(t)
		threads := d.threads()
		begun := time.Now()
		for range 40 {
			impatient.Go(func() {
				if failure := d.startError(t, argv("true"), withTimeoutMs(1200)); failure.Code() != connect.CodeDeadlineExceeded {
					t.Errorf("a Start whose client waits 1.2 s: %v", failure)
				}
			})
		}
		for time.Since(begun) < 900*time.Millisecond {
			if now := d.threads(); now > threads+16 {
				t.Fatalf("%d threads, %d before: those who wait cost threads", now, threads)
			}
			time.Sleep(50 * time.Millisecond)
		}
		impatient.Wait()
		d.healthy(t)
		d.mustControl(t, "/unfreeze")
		patient.Wait()
	}
}

// A freeze that catches a child on its way to its program does not count as a start that hangs.
func TestFreezeCatchesAStart(t *testing.T) {
	t.Parallel()
	needRoot(t)
	newCgroup(t)
	program := filepath.Join(publicDir(t), "leased")
	content, err := os.ReadFile("/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, program, string(content), 0o755)
	d := startDaemon(t, "--start-timeout=1s")
	holder, says := runRole(t, nil, "hold-lease", program) // the exec waits for it
	if says != "ready" {
		t.Skipf("needs leases: %s", says)
	}
	result := make(chan error, 1)
	go func() {
		s, err := d.open(t, argv(program))
		if err == nil {
			r := s.collect()
			if err = r.err; err == nil && r.end.GetStatus() != "exit status 0" {
				err = errors.New(r.end.GetStatus())
			}
		}
		result <- err
	}()
	waitFor(t, 5*time.Second, "the child is there", func() bool { return len(cgroupProcesses(d.cgroup)) == 1 })
	d.frozen(t)
	syscall.Kill(holder, syscall.SIGKILL)
	time.Sleep(1500 * time.Millisecond)
	select {
	case err := <-result:
		t.Errorf("given up while frozen: %v", err)
	default:
		d.mustControl(t, "/unfreeze")
		if err := <-result; err != nil {
			t.Errorf("after the thaw: %v", err)
		}
	}
}

// A host that froze and was never heard of again.
func TestThawWatchdog(t *testing.T) {
	t.Parallel()
	newCgroup(t)
	d := startDaemon(t, "--thaw-timeout", "1500ms")
	s := d.startSteady(t, 2, d.process())
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan struct{})
	go func() { // it does not even wait for the answer
		defer close(stopped)
		request, _ := http.NewRequestWithContext(ctx, "POST", d.url+"/freeze?maxWaitMs=60000", nil)
		if response, err := d.http.Do(request); err == nil {
			response.Body.Close()
		}
	}()
	waitFor(t, 5*time.Second, "frozen", func() bool {
		text, _ := os.ReadFile(filepath.Join(d.cgroup, "user", "cgroup.freeze"))
		return string(text) == "1\n"
	})
	cancel()
	<-stopped
	begun := time.Now()
	if !stands(s) {
		t.Error("the process runs on")
	}
	before := s.received.Load()
	waitFor(t, 10*time.Second, "thawed by the watchdog", func() bool { return s.received.Load() > before })
	if waited := time.Since(begun); waited < 1200*time.Millisecond {
		t.Errorf("thawed after %v", waited)
	}
	s.finish(t, d)
}

// Nothing stays frozen behind a daemon that leaves, or that comes after one that was killed.
func TestNoOneLeftFrozen(t *testing.T) {
	t.Parallel()
	newCgroup(t)
	d := startDaemon(t)
	file := filepath.Join(d.cgroup, "user", "cgroup.freeze")
	d.start(t, argv("sleep", "1000"))
	waits, err := d.open(t, argv("true"), withTimeoutMs(10))
	if err == nil {
		waits.collect()
	}
	d.frozen(t)
	if err := d.stop(t); err != nil {
		t.Error(err)
	}
	if text, _ := os.ReadFile(file); string(text) != "0\n" {
		t.Errorf("behind the daemon the group is frozen: %q", text)
	}
	if err := os.WriteFile(file, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	startDaemonWith(t, daemonConfig{noCgroup: true, args: argv("--cgroup-root", d.cgroup)})
	if text, _ := os.ReadFile(file); string(text) != "0\n" {
		t.Errorf("a new daemon leaves the group frozen: %q", text)
	}
}

func TestFreezeWithoutCgroups(t *testing.T) {
	t.Parallel()
	d := startDaemonNoCgroups(t)
	wantEnvelope(t, "freeze", d.request(t, "POST", "/freeze", ""), http.StatusInternalServerError, "")
	d.mustControl(t, "/unfreeze")
	d.output(t, argv("true"))
}

// ---- randomness and time ------------------------------------------------------------------------------------------

// reseedWithoutDev is a role: it reseeds where /dev is empty.
func reseedWithoutDev([]string) {
	err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	if err == nil {
		err = unix.Mount("tmpfs", "/dev", "tmpfs", 0, "")
	}
	fmt.Println("prepared", err)
	slog.SetDefault(slog.New(slog.DiscardHandler))
	l := newLifecycle(lifecycleOptions{}, true)
	var st unix.Stat_t
	err = unix.Fstat(l.random, &st)
	fmt.Println("device", unix.Major(st.Rdev), unix.Minor(st.Rdev), err)
	n, err := unix.Write(l.random, []byte("id"))
	fmt.Println("written", n, err)
	fmt.Println("reseeded", unix.IoctlSetInt(l.random, unix.RNDRESEEDCRNG, 0))
	l.reseed([]byte("id"), []byte("time"))
	flags, err := unix.FcntlInt(uintptr(l.random), unix.F_GETFD, 0)
	fmt.Println("close-on-exec", flags == unix.FD_CLOEXEC, err)
}

func TestReseedWithoutDev(t *testing.T) {
	t.Parallel()
	needRoot(t)
	out, err := exec.Command("unshare", "-m", helperBinary(t), "reseed").CombinedOutput()
	if strings.HasPrefix(string(out), "prepared <nil>\n") == false {
		t.Skipf("needs a mount namespace: %v %s", err, out)
	}
	if want := "prepared <nil>\ndevice 1 9 <nil>\nwritten 2 <nil>\nreseeded <nil>\nclose-on-exec true <nil>\n"; string(out) != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
}

// stepClocks is a role: the kernel refuses to set the clock (a filter), which the log tells.
func stepClocks([]string) {
	runtime.LockOSThread()
	if unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != nil || seccompFilter(fmt.Sprintf("%d:0:%d", unix.SYS_CLOCK_SETTIME, unix.EPERM)) != nil {
		os.Exit(1)
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stdout, nil)))
	for _, guest := range []bool{false, true} {
		l := newLifecycle(lifecycleOptions{}, guest)
		for _, off := range []time.Duration{-time.Hour, -6 * time.Second, -4 * time.Second, 0, 20 * time.Millisecond, 200 * time.Millisecond, time.Hour} {
			fmt.Println("off", guest, off)
			l.stepClock(time.Now().Add(off))
			time.Sleep(20 * time.Millisecond) // the log is written on the side
		}
	}
}

func TestStepClock(t *testing.T) {
	t.Parallel()
	out, err := exec.Command(helperBinary(t), "step-clock").CombinedOutput()
	if err != nil && len(out) == 0 {
		t.Skipf("needs seccomp: %v", err)
	}
	var stepped []string
	for _, part := range strings.Split(string(out), "off ")[1:] {
		if strings.Contains(part, "the clock was stepped") {
			stepped = append(stepped, strings.SplitN(part, "\n", 2)[0])
			if !strings.Contains(part, "operation not permitted") {
				t.Errorf("the failure is not told: %s", part)
			}
		}
	}
	if want := []string{"true -1h0m0s", "true -6s", "true 200ms", "true 1h0m0s"}; !slices.Equal(stepped, want) {
		t.Errorf("stepped for %q, want %q\n%s", stepped, want, out)
	}
}

// ---- a thousand times ---------------------------------------------------------------------------------------------

// One daemon, prepared and recovered over and over with everything in use at once: nothing is lost and nothing grows.
func TestThousandSnapshots(t *testing.T) {
	cycles := 1000
	if testing.Short() || raceEnabled() {
		cycles = 100
	}
	d := startDaemon(t, noSync, "--output-resume=131072") // full before the first look at the memory
	dir := publicDir(t)
	var streams []*steady
	for _, client := range d.clients() {
		streams = append(streams, d.startSteady(t, rand.Uint64(), client))
	}
	terminal := d.start(t, argv("cat"), withPTY(80, 24), withTag("terminal"))
	terminal.drop()
	sleeper := d.start(t, argv("sleep", "1000"), withTag("sleeper"))
	w, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: dir}))
	if err != nil {
		t.Fatal(err)
	}
	created := map[string]int{}
	fetch := func() {
		res, err := d.filesystem().GetWatcherEvents(t.Context(), connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: w.Msg.GetWatcherId()}))
		if err != nil {
			t.Fatal(err)
		}
		for _, event := range res.Msg.GetEvents() {
			if event.GetType() == pb.EventType_EVENT_TYPE_CREATE {
				created[event.GetName()]++
			}
		}
	}
	// Uploads and a WatchDir stream go on beside; each is cut often and begins again.
	ctx, stop := context.WithCancel(t.Context())
	var beside sync.WaitGroup
	uploadDir := publicDir(t)
	uploaded, cut := 0, 0
	beside.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			// What was cut may be written on for a moment: another file then.
			file := fmt.Sprintf("%s/%d", uploadDir, cut)
			content := bytes.Repeat([]byte{byte(i)}, []int{1 << 10, 300 << 10, 2 << 20}[i%3])
			request, _ := http.NewRequestWithContext(ctx, "POST", d.url+"/files?path="+file, bytes.NewReader(content))
			request.Header.Set("Content-Type", "application/octet-stream")
			if response, err := d.http.Do(request); err == nil {
				response.Body.Close()
				uploaded++
				if text, err := os.ReadFile(file); response.StatusCode != http.StatusOK || !bytes.Equal(text, content) {
					t.Errorf("upload %d: %d, %d bytes of %d, %v", i, response.StatusCode, len(text), len(content), err)
				}
			} else {
				cut++
				os.Remove(file)
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
	beside.Go(func() {
		for ctx.Err() == nil {
			if stream, err := d.filesystem().WatchDir(ctx, connect.NewRequest(&pb.WatchDirRequest{Path: dir})); err == nil {
				for stream.Receive() {
				}
				stream.Close()
			}
		}
	})
	var early, late []int64
	begun := time.Now()
	for i := range cycles {
		writeFile(t, filepath.Join(dir, strconv.Itoa(i)), "", 0o644)
		d.prepare(t)
		switch rss := d.rss(); {
		case i >= cycles/10 && i < cycles/5:
			early = append(early, rss)
		case i >= cycles*9/10:
			late = append(late, rss)
		}
		if i%50 == 0 {
			fetch()
			if err := d.sendPTY(t, byTag("terminal"), fmt.Sprintf("line %d\n", i)); err != nil {
				t.Error(err)
			}
		}
		d.healthy(t)
	}
	took := time.Since(begun)
	stop()
	beside.Wait()
	waitFor(t, 10*time.Second, "every file told", func() bool { fetch(); return len(created) == cycles })
	for name, times := range created {
		if times != 1 {
			t.Errorf("%s was told %d times", name, times)
		}
	}
	if uploaded == 0 || cut == 0 && cycles == 1000 {
		t.Errorf("%d uploads went through, %d were cut: want some of each", uploaded, cut)
	}
	var cuts int64
	for _, s := range streams {
		s.finish(t, d)
		cuts += s.cuts.Load()
	}
	d.connect(t, byTag("terminal"), withOutputFrom("all")).readUntil(t, fmt.Sprintf("line %d\r\nline %d\r\n", (cycles-1)/50*50, (cycles-1)/50*50))
	if d.listed(t, sleeper.pid) == nil {
		t.Error("the sleeping process is gone")
	}
	growth := slices.Min(late) - slices.Min(early)
	t.Logf("%d cycles in %v; streams cut %d times; %d uploads, %d cut; RSS after prepare %d -> %d KiB", cycles, took.Round(time.Millisecond),
		cuts, uploaded, cut, slices.Min(early)>>10, slices.Min(late)>>10)
	if growth > 2<<20 && cycles == 1000 {
		t.Errorf("RSS grew by %d KiB", growth>>10)
	}
	waitFor(t, 10*time.Second, "every recovery logged", func() bool { return d.recoveries() == cycles })
	d.kill(t, sleeper.pid)
	d.signal(t, byTag("terminal"), pb.Signal_SIGNAL_SIGKILL)
	if _, err := d.filesystem().RemoveWatcher(t.Context(), connect.NewRequest(&pb.RemoveWatcherRequest{WatcherId: w.Msg.GetWatcherId()})); err != nil {
		t.Error(err)
	}
	waitFor(t, 10*time.Second, "nothing runs", func() bool { return len(d.list(t)) == 0 })
	// What is left is what a daemon has that ran one of each.
	fresh := startDaemon(t, noSync)
	for _, one := range []*daemon{fresh, d} {
		one.output(t, argv("true"))
		one.output(t, argv("true"), withPTY(80, 24))
		one.prepare(t)
		one.healthy(t)
		one.http.CloseIdleConnections()
		one.h2.CloseIdleConnections()
	}
	open := func(d *daemon) int { // leaves of the pool hold descriptors; how many, depends on what ran at once
		return len(slices.DeleteFunc(d.fds(), func(fd string) bool {
			return strings.Contains(fd, "/sys/fs/cgroup") || strings.Contains(fd, cgroupMount())
		}))
	}
	waitFor(t, 10*time.Second, "as many descriptors as a fresh daemon has", func() bool { return open(d) <= open(fresh) })
	time.Sleep(time.Second) // net/http's goroutine of a connection that ends with its answer sleeps for half of one first
	used, usedStacks := d.goroutines(t)
	unused, _ := fresh.goroutines(t)
	if used > unused {
		t.Errorf("%d goroutines, a fresh daemon has %d:\n%s", used, unused, usedStacks)
	}
}

// probeHealth is a role, since a client of the same process as the load would wait for its own turn: it prints the 99th percentile
// and the longest of 400 calls, in nanoseconds.
func probeHealth(args []string) {
	var all []time.Duration
	for range 400 {
		begun := time.Now()
		response, err := http.Get(args[0] + "/health")
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
		all = append(all, time.Since(begun))
		time.Sleep(2 * time.Millisecond)
	}
	slices.Sort(all)
	fmt.Println(int64(all[len(all)*99/100]), int64(all[len(all)-1]))
}

// /health while 16 clients start commands, upload and stream, and meanwhile snapshots are prepared. The bounds are meant for a machine
// that has nothing else to do; the log has the figures.
func TestHealthUnderLoad(t *testing.T) {
	d := startDaemon(t, noSync)
	measure := func() (p99, most time.Duration) {
		out, err := exec.Command(helperBinary(t), "probe-health", d.url).CombinedOutput()
		if _, failure := fmt.Sscan(string(out), &p99, &most); err != nil || failure != nil {
			t.Fatalf("%v %s", err, out)
		}
		return p99, most
	}
	idle, _ := measure()
	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	dir := publicDir(t)
	flood := d.start(t, argv("cat", "/dev/zero"))
	for i := range 16 {
		load.Go(func() {
			for ctx.Err() == nil {
				switch i % 3 {
				case 0:
					if s, err := d.open(t, argv("true")); err == nil {
						s.collect()
					}
				case 1:
					request, _ := http.NewRequestWithContext(ctx, "POST", fmt.Sprintf("%s/files?path=%s/%d", d.url, dir, i), bytes.NewReader(make([]byte, 1<<20)))
					request.Header.Set("Content-Type", "application/octet-stream")
					if response, err := d.http.Do(request); err == nil {
						response.Body.Close()
					}
				case 2:
					if s, err := d.openConnect(t, byPid(flood.pid), withOutputFrom("new"), withContext(ctx)); err == nil {
						for s.next() != nil && ctx.Err() == nil {
						}
						s.drop()
					}
				}
			}
		})
	}
	flood.drop()
	busy, busyMost := measure()
	preparing := make(chan struct{})
	load.Go(func() {
		defer close(preparing)
		for range 30 {
			d.prepare(t)
			time.Sleep(20 * time.Millisecond)
		}
	})
	during, duringMost := measure()
	<-preparing
	d.healthy(t)
	stop()
	d.kill(t, flood.pid)
	load.Wait()
	t.Logf("/health p99 (and longest): idle %v; under load %v (%v); under load and snapshots %v (%v)", idle, busy, busyMost, during, duringMost)
	if during > max(100*time.Millisecond, 4*busy) && !raceEnabled() {
		t.Errorf("/health p99 during prepare: %v", during)
	}
}
