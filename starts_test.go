// What a start may cost, whatever is in its way: the search in PATH, tracers, ids that change nothing, leaves that are not empty,
// descriptors and memory that are at their end.

package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

func init() {
	testRoles["seize"] = seize
	testRoles["seize-parent"] = seizeParent
	testRoles["die-seized"] = dieSeized
}

// begin starts a process and reads the start event, or why there is none.
func begin(t *testing.T, d *daemon, command []string, options ...callOption) (*clientStream, error) {
	s, err := d.open(t, command, options...)
	if err != nil {
		return nil, err
	}
	event := s.next()
	if event == nil {
		err = s.failure()
		s.drop()
		return nil, err
	}
	s.pid = event.GetStart().GetPid()
	t.Cleanup(s.drop)
	return s, nil
}

// ---- memory -------------------------------------------------------------------------------------------------------------

// The search in PATH is bounded: each candidate costs memory before the child is there.
func TestManyCandidates(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemon(t, "--memory-limit", "64MiB")
	colons := strings.Repeat(":", 131072)
	search := func(name, path string) (end *pb.ProcessEvent_EndEvent, err error) {
		s, err := d.open(t, argv(name), withEnv("PATH", path), withCwd("/"), withTimeoutMs(60_000))
		if err == nil {
			r := s.collect()
			end, err = r.end, r.err
		}
		return end, err
	}
	end, err := search(strings.Repeat("x", 60_000), colons)
	if err != nil || end.GetExitCode() != 127 {
		t.Errorf("a name of 60,000 bytes: %v, %v, want exit status 127", end, err)
	}
	if _, err = search(strings.Repeat("x", 255), colons); connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "--memory-limit") {
		t.Errorf("a name of 255 bytes: %v, want resource_exhausted and --memory-limit", err)
	}
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			end, err := search("x", colons)
			if connect.CodeOf(err) != connect.CodeResourceExhausted && (err != nil || end.GetExitCode() != 127) {
				t.Errorf("a short name: %v, %v", end, err)
			}
		})
	}
	wait.Wait()
	// An honest one is searched to its end.
	dir := publicDir(t)
	writeFile(t, filepath.Join(dir, "found"), "#!/bin/sh\necho found\n", 0o755)
	path := strings.Repeat("/no/such/directory:", 200) + dir
	if got := d.output(t, argv("found"), withEnv("PATH", path), withCwd("/")); got != "found\n" {
		t.Errorf("found in the last directory: %q", got)
	}
	if peak := d.peakRSS() >> 20; peak > 64+48 && !raceEnabled() {
		t.Errorf("at most %d MiB were held, want less than 112", peak)
	} else {
		t.Logf("at most %d MiB", peak)
	}
}

// What List tells of processes is counted: much of it is refused, ended ones that keep a little go first, and all is given back.
func TestKeptConfigsAreCounted(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--memory-limit", "64MiB")
	large := make([]callOption, 0, 16)
	for i := range 14 {
		large = append(large, withEnv("V"+strconv.Itoa(i), strings.Repeat("v", 120<<10)))
	}
	var pids []uint32
	var refusal error
	for range 40 {
		s, err := begin(t, d, argv("sleep", "1000"), large...)
		if err != nil {
			refusal = err
			break
		}
		pids = append(pids, s.pid)
	}
	if connect.CodeOf(refusal) != connect.CodeResourceExhausted || !strings.Contains(fmt.Sprint(refusal), "--memory-limit") {
		t.Errorf("after %d processes with 1.7 MB of variables: %v, want resource_exhausted and --memory-limit", len(pids), refusal)
	}
	d.run(t, argv("true"))
	if got := len(d.list(t)); got != len(pids) {
		t.Errorf("List has %d processes, want %d", got, len(pids))
	}
	for _, pid := range pids {
		d.kill(t, pid)
	}
	waitFor(t, 10*time.Second, "a place for a large one", func() bool {
		s, err := begin(t, d, argv("true"), large...)
		return err == nil && s.collect().err == nil
	})
	// Tags are kept after the end.
	tag := strings.Repeat("t", 50<<10)
	for i := range 400 {
		if end := d.run(t, argv("true"), withTag(tag+strconv.Itoa(i))).end; end.GetStatus() != "exit status 0" {
			t.Fatalf("true with a long tag, number %d: %v", i, end)
		}
	}
	last := d.connect(t, byTag(tag+"399"))
	wantEnd(t, last.collect().end, 0, true, "exit status 0")
	if err := connectError(t, d, byTag(tag+"0")); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("the oldest of 400 with a long tag: %v, want not_found", err)
	}
	if peak := d.peakRSS() >> 20; peak > 64+48 && !raceEnabled() {
		t.Errorf("at most %d MiB were held, want less than 112", peak)
	} else {
		t.Logf("at most %d MiB, with %d large processes", peak, len(pids))
	}
}

func connectError(t *testing.T, d *daemon, selector *pb.ProcessSelector) error {
	s, err := d.openConnect(t, selector)
	if err == nil {
		err = s.collect().err
	}
	return err
}

// ---- tracers ------------------------------------------------------------------------------------------------------------

// seize is a role: it traces the processes that stdin names, one a line, and never waits for them. A line that begins with `!` has it
// stopped on its way out as well; one that begins with `-` kills what it names.
func seize([]string) {
	runtime.LockOSThread() // the tracer is a thread
	fmt.Println("ready")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		word := lines.Text()
		pid, _ := strconv.Atoi(strings.TrimLeft(word, "!-"))
		if word[0] == '-' {
			fmt.Println(syscall.Kill(pid, syscall.SIGKILL))
			continue
		}
		options := 0
		if word[0] == '!' {
			options = unix.PTRACE_O_TRACEEXIT
		}
		_, _, errno := syscall.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, uintptr(options), 0, 0)
		fmt.Println(errno)
	}
}

// dieSeized is a role: it starts a tracer of itself and ends.
func dieSeized([]string) {
	tracer := exec.Command("/proc/self/exe", "seize-parent")
	tracer.Args[0] = helperName
	out, err := tracer.StdoutPipe()
	if err == nil {
		err = tracer.Start()
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	fmt.Println(tracer.Process.Pid, err, line)
	os.Exit(7)
}

func seizeParent([]string) {
	runtime.LockOSThread()
	_, _, errno := syscall.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(os.Getppid()), 0, 0, 0, 0)
	fmt.Println(errno)
	os.Stdout.Close()
	time.Sleep(time.Hour)
}

// hostileTracer is the role `seize` of the hostile user, and how to talk to it.
func hostileTracer(t *testing.T) (ask func(word string) string, leave func()) {
	t.Helper()
	cmd := exec.Command(helperBinary(t), "seize")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(hostileUID), Gid: uint32(hostileUID)}}
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	leave = sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	t.Cleanup(leave)
	says := bufio.NewReader(stdout)
	answer := func() string {
		line, _ := says.ReadString('\n')
		return strings.TrimSpace(line)
	}
	if got := answer(); got != "ready" {
		t.Fatalf("the tracer says %q", got)
	}
	return func(word string) string {
		io.WriteString(stdin, word+"\n")
		return answer()
	}, leave
}

// Whoever is traced by somebody who never waits costs no thread, and keeps no place: it ends for its clients with the status that it
// had, or at its deadline.
func TestTracedCommands(t *testing.T) {
	needRoot(t)
	const count = 1000
	d := startDaemonWithHostile(t)
	ask, leave := hostileTracer(t)
	type told struct {
		pid  uint32
		kind int // what it is to meet: 0 its own end, 1 a kill, 2 its deadline, 3 its deadline while it is stopped on its way out
		r    runResult
	}
	streams := make(chan *told, count)
	client := d.process(connect.WithProtoJSON())
	var all []*told
	var starters, readers sync.WaitGroup
	next := make(chan int, count)
	for i := range count {
		next <- i
	}
	close(next)
	for range 3 {
		starters.Go(func() {
			for i := range next {
				p := &told{kind: i % 4}
				seconds := "1000"
				options := []callOption{withUser("hostile"), withCwd("/"), withStdin(false), withClient(client)}
				if p.kind == 0 {
					seconds = "15"
				} else if p.kind > 1 {
					options = append(options, withTimeoutMs(20_000))
				}
				s, err := begin(t, d, argv("/bin/sleep", seconds), options...)
				if err != nil {
					t.Errorf("start %d: %v", i, err)
					continue
				}
				p.pid = s.pid
				readers.Go(func() { p.r = s.collect() })
				streams <- p
			}
		})
	}
	go func() {
		starters.Wait()
		close(streams)
	}()
	seized := 0
	for p := range streams {
		all = append(all, p)
		word := []string{"", "", "", "!"}[p.kind] + strconv.Itoa(int(p.pid))
		if got := ask(word); got == "errno 0" {
			seized++
		} else {
			t.Logf("the tracer of %s, number %d: %s", word, len(all), got)
		}
		if p.kind == 1 && p.pid > 1 {
			ask("-" + strconv.Itoa(int(p.pid)))
		}
	}
	running := func() bool {
		return !strings.Contains(d.request(t, "GET", "/metrics", "", "Accept", "text/plain").body, "\nenvd_processes_running 0\n")
	}
	waitFor(t, 60*time.Second, "no place is held", func() bool { return !running() })
	readers.Wait()
	if t.Failed() {
		return
	}
	ends, deadlines := 0, 0
	for _, p := range all {
		switch {
		case p.kind == 0 && p.r.err == nil && p.r.end.GetStatus() == "exit status 0",
			p.kind == 1 && p.r.err == nil && p.r.end.GetStatus() == "signal: killed":
			ends++
		case p.kind > 1 && connect.CodeOf(p.r.err) == connect.CodeDeadlineExceeded:
			deadlines++
		default:
			t.Errorf("pid %d, kind %d: %v, %v", p.pid, p.kind, p.r.end, p.r.err)
		}
	}
	threads, zombies := d.threads(), len(d.zombies())
	t.Logf("%d traced; %d ends, %d deadlines; %d threads, %d zombies", seized, ends, deadlines, threads, zombies)
	if threads >= 24 {
		t.Errorf("%d threads, want less than 24", threads)
	}
	if seized < count*9/10 || zombies < count*6/10 {
		t.Errorf("%d traced, %d kept by their tracer: the test has not met what it is for", seized, zombies)
	}
	d.run(t, argv("/bin/true"))
	leave()
	waitFor(t, 10*time.Second, "nothing is left of them", func() bool { return len(descendantsOf(d.pid)) == 0 })
	servesOn(t, d)
}

// A process that is traced by one of its own keeps nothing either; that one is killed.
func TestTracerOfItsOwn(t *testing.T) {
	t.Parallel()
	d := startDaemonWithHostile(t)
	if d.cgroup == "" {
		t.Skip("needs cgroup v2: no hierarchy that this user may write to")
	}
	r := d.run(t, argv(helperBinary(t), "die-seized"), withUser("hostile"), withCwd("/"))
	fields := strings.Fields(string(r.stdout))
	if len(fields) < 4 || fields[3] != "0" {
		t.Skipf("needs ptrace: %q", r.stdout)
	}
	wantEnd(t, r.end, 7, true, "exit status 7")
	waitGone(t, 10*time.Second, atoi(t, fields[0]))
	waitFor(t, 10*time.Second, "no zombie", func() bool { return len(d.zombies()) == 0 })
}

// ---- ids ----------------------------------------------------------------------------------------------------------------

// A command whose process has not become who it should be is not executed.
func TestIdsAreVerified(t *testing.T) {
	t.Parallel()
	needRoot(t)
	for name, nr := range map[string]int{"setgroups": unix.SYS_SETGROUPS, "setresgid": unix.SYS_SETRESGID, "setresuid": unix.SYS_SETRESUID} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// The call says that it has succeeded and does nothing.
			d, _ := startDaemonWithUsers(t, daemonConfig{steps: []string{"seccomp", fmt.Sprintf("%d:0:0", nr)}})
			s, err := begin(t, d, argv("id"), withUser("grouped"), withCwd("/"))
			if err == nil {
				r := s.collect()
				t.Fatalf("the command ran: %s%s", r.stdout, r.stderr)
			}
			if connect.CodeOf(err) != connect.CodeInternal || !strings.Contains(err.Error(), "setting up the process") {
				t.Errorf("%v, want internal and the reason", err)
			}
			if n := len(d.list(t)); n != 0 {
				t.Errorf("%d processes listed", n)
			}
		})
	}
}

// 4294967295 is what the kernel has for "leave it as it is".
func TestNoAccountHasTheLastId(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemonWith(t, daemonConfig{files: map[string]string{
		"/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nuid:x:4294967295:61000::/:/bin/sh\ngid:x:61000:4294967295::/:/bin/sh\n" +
			"member:x:61001:61001::/:/bin/sh\n",
		"/etc/group": "root:x:0:\nlast:x:4294967295:member\n",
	}})
	for _, name := range []string{"uid", "gid"} {
		s, err := begin(t, d, argv("id"), withUser(name), withCwd("/"))
		if err == nil {
			r := s.collect()
			t.Errorf("as %s: %s%s", name, r.stdout, r.stderr)
		} else if connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("as %s: %v, want unauthenticated", name, err)
		}
	}
	s, err := begin(t, d, argv("id", "-u"), withUser("member"), withCwd("/")) // refused, or without that group
	if err == nil {
		if r := s.collect(); string(r.stdout) != "61001\n" {
			t.Errorf("as member: %q", r.stdout)
		}
	}
}

// ---- leaves -------------------------------------------------------------------------------------------------------------

// Leaves in which background children are left cost later starts nothing.
func TestStartsBesideFilledLeaves(t *testing.T) {
	needNoRace(t)
	needRoot(t)
	const count = 1500
	d, alone := startDaemon(t), startDaemon(t)
	if d.cgroup == "" {
		t.Skip("needs cgroup v2: no hierarchy that this user may write to")
	}
	before := len(d.fds())
	var wait sync.WaitGroup
	for range 3 {
		wait.Go(func() {
			for range count / 3 {
				if end := d.run(t, sh("sleep 1000 >/dev/null 2>&1 &"), withStdin(false)).end; end.GetStatus() != "exit status 0" {
					t.Errorf("a command with a background child: %v", end)
				}
			}
		})
	}
	wait.Wait()
	if n := d.leaves(); n < count {
		t.Fatalf("%d leaves with %d background children", n, count)
	}
	if now := len(d.fds()); now > before+30 {
		t.Errorf("%d descriptors, %d before", now, before)
	}
	once := func(d *daemon) time.Duration {
		start := time.Now()
		d.run(t, argv("/bin/true"), withStdin(false))
		return time.Since(start)
	}
	timely(t, func() error {
		var here, there []time.Duration
		for range 300 {
			here, there = append(here, once(d)), append(there, once(alone))
		}
		slices.Sort(here)
		slices.Sort(there)
		ratio := float64(here[len(here)/2]) / float64(there[len(there)/2])
		t.Logf("start p50 %v with %d such leaves, %v without: %.2fx", here[len(here)/2], count, there[len(there)/2], ratio)
		if ratio > 2 {
			return fmt.Errorf("%.2f times as long, want at most 2", ratio)
		}
		return nil
	})
	os.WriteFile(filepath.Join(d.cgroup, "cgroup.kill"), []byte("1"), 0)
	waitFor(t, 30*time.Second, "at most the pool is left", func() bool {
		d.run(t, argv("/bin/true"))
		return d.leaves() <= 16
	})
}

// ---- descriptors --------------------------------------------------------------------------------------------------------

// More processes are started than there are descriptors for: each start is answered, the daemon as well.
func TestMoreProcessesThanDescriptors(t *testing.T) {
	needRoot(t)
	limits := []int{256, 1024}
	if *everyFault { // thousands of processes
		limits = append(limits, 20_000)
	}
	for _, limit := range limits {
		t.Run(strconv.Itoa(limit), func(t *testing.T) {
			timely(t, func() error { return startsBeyond(t, limit) })
		})
	}
}

func startsBeyond(t *testing.T, limit int) error {
	d := startDaemonWith(t, daemonConfig{steps: []string{"nofile-max", strconv.Itoa(limit)}, args: []string{"--forward-address", ""}})
	defer d.end(t)
	health := &http.Client{Transport: &http.Transport{}}
	get := func() time.Duration {
		start := time.Now()
		response, err := health.Get(d.url + "/health")
		if err != nil {
			t.Fatalf("/health: %v", err)
		}
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
		return time.Since(start)
	}
	get()
	before := len(d.fds())
	started, refused := 0, 0
	var slowest time.Duration
	var refusal error
	var times []time.Duration
	for i := range limit/6 + 60 {
		begun := time.Now()
		_, err := begin(t, d, argv("sleep", "1000"), withStdin(false))
		slowest = max(slowest, time.Since(begun))
		if err == nil {
			started++
		} else {
			refused, refusal = refused+1, err
		}
		if connect.CodeOf(err) != connect.CodeResourceExhausted && err != nil {
			t.Fatalf("start %d: %v", i, err)
		}
		times = append(times, get())
	}
	for range 200 {
		times = append(times, get())
	}
	slices.Sort(times)
	p99 := times[len(times)*99/100]
	each := float64(len(d.fds())-before) / float64(max(started, 1))
	t.Logf("%d started, %d refused; slowest answer %v; /health p99 %v; %.2f descriptors a process", started, refused, slowest, p99, each)
	if started < limit/12 || refused < 10 || !strings.Contains(fmt.Sprint(refusal), "RLIMIT_NOFILE") {
		t.Errorf("%d started, %d refused: %v", started, refused, refusal)
	}
	if each > 5 {
		t.Errorf("%.2f descriptors a process, want at most 5", each)
	}
	// What has ended makes room.
	for _, p := range d.list(t)[:5] {
		d.kill(t, p.Pid)
	}
	waitFor(t, 10*time.Second, "room for another one", func() bool {
		_, err := begin(t, d, argv("sleep", "1000"), withStdin(false))
		return err == nil
	})
	if slowest > time.Second || p99 > 50*time.Millisecond {
		return fmt.Errorf("slowest answer %v, /health p99 %v", slowest, p99)
	}
	return nil
}
