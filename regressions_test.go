// Faults that a review of the daemon found, each as it was seen.

package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
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
		fmt.Fprintf(conn, "POST /init HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{%s", strings.Repeat(" ", 900_000))
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

// ---- of November 2026 ----------------------------------------------------------------------------------------------

// withoutDescriptors does something while the daemon can open nothing; one connection is there.
func (d *daemon) withoutDescriptors(t *testing.T, do func()) {
	t.Helper()
	d.http = &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}, Timeout: 20 * time.Second}
	d.healthy(t)
	var was unix.Rlimit
	limit := unix.Rlimit{Cur: 3}
	if err := unix.Prlimit(d.pid, unix.RLIMIT_NOFILE, nil, &was); err != nil {
		t.Fatal(err)
	}
	limit.Max = was.Max
	unix.Prlimit(d.pid, unix.RLIMIT_NOFILE, &limit, nil)
	do()
	if err := unix.Prlimit(d.pid, unix.RLIMIT_NOFILE, &was, nil); err != nil {
		t.Fatal(err)
	}
}

// A process is killed even where its cgroup cannot be opened.
func TestKillWithoutDescriptors(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemon(t)
	s := d.start(t, sh("sleep 1000 & sleep 1000"))
	s.drop() // there is no other connection for the rest
	d.withoutDescriptors(t, func() {
		d.kill(t, s.pid)
		waitGone(t, 5*time.Second, int(s.pid))
	})
}

// What could not be read of the users is read again.
func TestUsersUnreadOnce(t *testing.T) {
	t.Parallel()
	d, home := startDaemonWithUsers(t, daemonConfig{})
	path := writeFile(t, filepath.Join(home, "f"), "content", 0o644)
	passwd := fmt.Sprintf("/proc/%d/root/etc/passwd", d.pid)
	text, err := os.ReadFile(passwd)
	if err != nil {
		t.Fatal(err)
	}
	get := func() httpReply { return d.request(t, "GET", filesPath("path", path, "username", "user"), "") }
	if got := get(); got.status != http.StatusOK {
		t.Fatalf("%d %s", got.status, got.body)
	}
	d.withoutDescriptors(t, func() {
		if err := os.WriteFile(passwd, append(text, "another:x:65000:65000::/:/bin/sh\n"...), 0o644); err != nil {
			t.Fatal(err)
		}
		get()
	})
	if got := get(); got.status != http.StatusOK {
		t.Errorf("descriptors are back: %d %s", got.status, got.body)
	}
}

// Neither leaves a freeze that fails anything frozen, even where it cannot be undone at once.
func TestFreezeFails(t *testing.T) {
	t.Parallel()
	newCgroup(t)
	d := startDaemon(t, "--thaw-timeout=500ms")
	d.withoutDescriptors(t, func() {
		if got := d.request(t, "POST", "/freeze", ""); got.status != http.StatusInternalServerError {
			t.Errorf("/freeze: %d %s", got.status, got.body)
		}
	})
	wantEnd(t, d.run(t, argv("true"), withTimeoutMs(10_000)).end, 0, true, "exit status 0")
}

// The watchdog thaws though the log cannot be written: it may be a file of the root filesystem.
func TestThawWithAHangingLog(t *testing.T) {
	t.Parallel()
	newCgroup(t)
	fifo := filepath.Join(publicDir(t), "log")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(fifo, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	script := writeFile(t, filepath.Join(publicDir(t), "envd"), fmt.Sprintf("#!/bin/sh\nexec %s \"$@\" >%s\n", daemonBinary(t), fifo), 0o755)
	d := startDaemonWith(t, daemonConfig{program: script, args: argv("--thaw-timeout=500ms")})
	defer func() { go io.Copy(io.Discard, log) }() // what it says at its end
	d.http.CloseIdleConnections()
	d.frozen(t)
	raw, err := log.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		for _, size := range []int{4096, 1} {
			for err = nil; err == nil; {
				_, err = unix.Write(int(fd), make([]byte, size))
			}
		}
	})
	freeze := filepath.Join(d.cgroup, "user", "cgroup.freeze")
	waitFor(t, 5*time.Second, "the groups to be thawed", func() bool {
		text, err := os.ReadFile(freeze)
		return err == nil && string(text) == "0\n"
	})
}

// Who comes by a link-local address of IPv6, which has a zone, is not taken for somebody on this machine.
func TestPeerWithAZone(t *testing.T) {
	t.Parallel()
	if l, err := net.Listen("tcp", "[::1]:0"); err != nil {
		t.Skipf("needs IPv6: %v", err)
	} else {
		l.Close()
	}
	guest, host := newGuest(t)
	d := startDaemonWith(t, daemonConfig{netns: guest, listen: "default", args: argv("--no-local-clients", "--allow-origin", "*")})
	var address string
	waitFor(t, 10*time.Second, "a link-local address", func() bool {
		guest.do(func() {
			card, err := net.InterfaceByName("eth0")
			if err != nil {
				return
			}
			addrs, _ := card.Addrs()
			for _, a := range addrs {
				if ip := a.(*net.IPNet).IP; ip.To4() == nil && ip.IsLinkLocalUnicast() {
					address = ip.String()
				}
			}
		})
		return address != ""
	})
	url := fmt.Sprintf("http://[%s%%25tap0]:%d/envs", address, d.port)
	var status string
	waitFor(t, 30*time.Second, "an answer", func() bool { // both addresses are tentative for a while
		response, err := host.client().Get(url)
		if err == nil {
			response.Body.Close()
			status = response.Status
		}
		return err == nil
	})
	if status != "200 OK" {
		t.Errorf("the host: %s", status)
	}
}

// A connection that comes while a snapshot is being prepared, and has no more peer when it is resumed, is cut then as those are that
// were there before.
func TestConnectionsDuringPrepare(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemonWith(t, daemonConfig{steps: []string{"seccomp", fmt.Sprintf("%d:0:hang", unix.SYS_SYNC)}})
	prepared := make(chan struct{})
	go func() {
		defer close(prepared)
		d.prepare(t)
	}()
	waitFor(t, 5*time.Second, "the preparation", func() bool { return d.syncing() == 1 })
	s := d.start(t, argv("sleep", "1000"))
	<-prepared
	d.healthy(t)
	begun := time.Now()
	if r := s.collect(); r.err == nil || time.Since(begun) > 10*time.Second {
		t.Errorf("after %v the stream ended: %v, %v", time.Since(begun), r.err, r.end)
	}
	if d.listed(t, s.pid) == nil {
		t.Error("the process is gone")
	}
	d.kill(t, s.pid)
}

// Little output stays little, in whatever turns it is written to both pipes.
func TestOutputInTurns(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh("for i in $(seq 300); do echo o; sleep .003; echo e >&2; sleep .003; done"))
	s.drop()
	waitFor(t, 30*time.Second, "the end", func() bool { return d.listed(t, s.pid) == nil })
	again := d.connect(t, byPid(s.pid), withOutputFrom("all"))
	r := again.collect()
	if len(r.stdout) != 600 || len(r.stderr) != 600 {
		t.Errorf("of 600 bytes each %d and %d are kept", len(r.stdout), len(r.stderr))
	}
}

// What a terminal still holds is known, though FIONREAD tells of little of it, and of nothing after a read.
func TestWhatATerminalHolds(t *testing.T) {
	t.Parallel()
	master, slave, err := openPTY(80, 24, os.Geteuid())
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(master)
	defer unix.Close(slave)
	unix.SetNonblock(slave, true)
	wrote := 0
	for err = nil; err == nil; {
		var n int
		n, err = unix.Write(slave, bytes.Repeat([]byte("x"), 100))
		wrote += max(n, 0)
	}
	o := &outputPipe{kind: ptyKind, watch: watch{fd: master}}
	for read := 0; read < wrote; {
		if o.readableLocked() == 0 {
			t.Fatalf("%d bytes of %d were read, and no more is told to be there", read, wrote)
		}
		n, err := unix.Read(master, make([]byte, 4096))
		if err != nil {
			t.Fatal(err)
		}
		read += n
	}
	if n := o.readableLocked(); n != 0 {
		t.Errorf("all was read, and %d bytes are told to be there", n)
	}
}

// A search path takes no more memory than a variable can, and a name that cannot be executed no more of stderr than its pipe has room for.
func TestLongPathAndName(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	_, err := d.open(t, argv("true"), withEnv("PATH", strings.Repeat(":", 12<<20)))
	if peak := d.peakRSS(); peak > 200<<20 && !raceEnabled() {
		t.Errorf("peak RSS %d MiB; %v", peak>>20, err)
	}
	for _, options := range [][]callOption{nil, {withPTY(80, 24)}} {
		s := d.start(t, argv(strings.Repeat("/", 2<<20)+"x"), append(options, withTimeoutMs(10_000))...)
		wantEnd(t, s.collect().end, 126, true, "exit status 126")
	}
}

// Nothing of an archive that is unpacked through a link of a user's runs as somebody else: he may have it open for writing.
func TestArchiveThroughALink(t *testing.T) {
	t.Parallel()
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "mkdir real; chown 61000:61000 real; ln -s real app; chown -h 61000:61000 app")
	var text bytes.Buffer
	w := tar.NewWriter(&text)
	for _, name := range []string{"bin/", "su"} {
		h := &tar.Header{Name: name, Mode: 0o7755}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	got := d.request(t, "POST", filesPath("path", home+"/app", "username", "root"), text.String(), "Content-Type", "application/x-tar")
	if got.status != http.StatusOK {
		t.Fatalf("%d %s", got.status, got.body)
	}
	for _, name := range []string{"bin", "su"} {
		if mode := lstat(t, home+"/real/"+name).Mode & 0o7777; mode != 0o1755 {
			t.Errorf("%s has mode %o", name, mode)
		}
	}
}

// muchMetadata makes a file with more metadata than a client can set, and names for it.
func muchMetadata(t *testing.T) (dir string, link func(n int)) {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "envd-test-")
	if err != nil {
		t.Skipf("needs /dev/shm: %v", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := writeFile(t, filepath.Join(dir, "file"), "content", 0o644)
	for i := range 40 {
		if err := unix.Setxattr(file, fmt.Sprintf("user.e2b.%d", i), bytes.Repeat([]byte("v"), 60<<10), 0); err != nil {
			t.Skipf("needs user attributes on tmpfs, Linux 6.6: %v", err)
		}
	}
	return dir, func(n int) {
		for i := range n {
			if err := os.Link(file, fmt.Sprintf("%s/link%d", dir, i)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestMuchMetadata(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--memory-limit", "128MiB")
	dir, link := muchMetadata(t)
	id, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: dir, IncludeEntry: true}))
	if err != nil {
		t.Fatal(err)
	}
	link(1600) // of each 64 KiB are told
	waitFor(t, 10*time.Second, "the events", func() bool {
		events, err := d.filesystem().GetWatcherEvents(t.Context(), connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: id.Msg.GetWatcherId()}))
		return err == nil && len(events.Msg.GetEvents()) > 0
	})
	if _, err := d.filesystem().ListDir(t.Context(), connect.NewRequest(&pb.ListDirRequest{Path: dir})); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("ListDir: %v", err)
	}
	// So is one of directories with two entries each.
	for i := range 800 {
		sub := fmt.Sprintf("%s/sub/%d", dir, i)
		err := os.MkdirAll(sub, 0o755)
		for _, name := range []string{"/a", "/b"} {
			err = errors.Join(err, os.Link(dir+"/file", sub+name))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := d.filesystem().ListDir(t.Context(), connect.NewRequest(&pb.ListDirRequest{Path: dir + "/sub", Depth: 2})); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("ListDir of many directories: %v", err)
	}
	if peak := d.peakRSS(); peak > 176<<20 && !raceEnabled() {
		t.Errorf("peak RSS %d MiB", peak>>20)
	}
	os.RemoveAll(dir + "/sub")
	// An archive has room for some of it, and is whole.
	got := d.request(t, "GET", filesPath("path", dir), "", "Accept", "application/x-tar")
	r, n := tar.NewReader(strings.NewReader(got.body)), 0
	for ; err == nil; n++ {
		_, err = r.Next()
	}
	if err != io.EOF || n != 1602 {
		t.Errorf("%d entries, %v", n, err)
	}
}

// An archive is whole though a file in it shrinks while it is sent.
func TestFileShrinksInAnArchive(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	dir := publicDir(t)
	writeFile(t, dir+"/a", strings.Repeat("x", 64<<20), 0o644)
	writeFile(t, dir+"/b", "after it", 0o644)
	request, _ := http.NewRequestWithContext(t.Context(), "GET", d.url+filesPath("path", dir), nil)
	request.Header.Set("Accept", "application/x-tar")
	response, err := d.http.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	r := tar.NewReader(response.Body)
	if _, err := r.Next(); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(dir+"/a", 1000); err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, r); n != 64<<20 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	if h, err := r.Next(); err != nil || h.Name != "b" {
		t.Errorf("the next: %v, %v", h, err)
	}
}

// A file of the kernel's is sent to its end also when it has more than a page.
func TestLongKernelFile(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, argv("sleep", "1000"), withEnv("LONG", strings.Repeat("x", 100_000)))
	got := d.request(t, "GET", filesPath("path", fmt.Sprintf("/proc/%d/environ", s.pid)), "", "Accept-Encoding", "identity")
	want, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", s.pid))
	if err != nil || got.status != http.StatusOK || got.body != string(want) {
		t.Errorf("%d, %d bytes of %d, %v", got.status, len(got.body), len(want), err)
	}
	d.kill(t, s.pid)
}

// Who could not read a file cannot read what takes its place, whatever its directory gives to new files.
func TestReplacedFileGetsNoDefaultACL(t *testing.T) {
	t.Parallel()
	d, home := startDaemonWithUsers(t, daemonConfig{})
	path := writeFile(t, filepath.Join(home, "secret"), "old", 0o640)
	acl := []byte{2, 0, 0, 0} // struct posix_acl_xattr_header and entries (linux/posix_acl_xattr.h): tag, permissions, id
	for _, e := range [][3]uint32{{1, 7, ^uint32(0)}, {2, 6, 61001}, {4, 5, ^uint32(0)}, {16, 7, ^uint32(0)}, {32, 0, ^uint32(0)}} {
		acl = binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(acl, uint16(e[0])), uint16(e[1]))
		acl = binary.LittleEndian.AppendUint32(acl, e[2])
	}
	if err := unix.Setxattr(home, "system.posix_acl_default", acl, 0); err != nil {
		t.Skipf("needs access control lists: %v", err)
	}
	if got := d.upload(t, filesPath("path", path, "username", "root"), strings.Repeat("new", 1<<20)); got.status != http.StatusOK {
		t.Fatalf("%d %s", got.status, got.body)
	}
	if n, err := unix.Getxattr(path, "system.posix_acl_access", make([]byte, 1000)); err != unix.ENODATA {
		t.Errorf("an access control list of %d bytes, %v", n, err)
	}
	if mode := lstat(t, path).Mode & 0o777; mode != 0o640 {
		t.Errorf("mode %o", mode)
	}
}

// A file system that takes nothing without an error, as FUSE may, fails an upload, which does not try for ever.
func TestWriteOfNothing(t *testing.T) {
	t.Parallel()
	s := supervise(t, []uintptr{unix.SYS_WRITE})
	d := startDaemonWith(t, daemonConfig{steps: s.steps()})
	path := filepath.Join(publicDir(t), "new")
	s.judge(func(c *systemCall) verdict {
		if c.file(0) == path {
			return verdict{}
		}
		return letPass
	})
	d.http.Timeout = 10 * time.Second
	if got := d.upload(t, filesPath("path", path), "content"); got.status != http.StatusInternalServerError {
		t.Errorf("%d %s", got.status, got.body)
	}
}

// However often and with whatever names /init comes, the variables stay few enough for a process to be started with them.
func TestVariablesAreBounded(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	before, refused := "", false
	for i := range 12 {
		var body strings.Builder
		for k := range 900 {
			fmt.Fprintf(&body, `,"V%d_%d":"%s"`, i, k, strings.Repeat("v", 200))
		}
		got := d.request(t, "POST", "/init", `{"defaultWorkdir":"/tmp","envVars":{`+body.String()[1:]+`}}`)
		envs := d.request(t, "GET", "/envs", "").body
		if refused = got.status == http.StatusBadRequest; refused {
			if !strings.Contains(got.body, "envVars") || envs != before {
				t.Errorf("%.200s; %d bytes of variables before, %d now", got.body, len(before), len(envs))
			}
			break
		}
		before = envs
	}
	if !refused {
		t.Errorf("%d bytes of variables are kept", len(before))
	}
	d.output(t, argv("true"))
}
