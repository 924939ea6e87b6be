// Programs, directories and processes that make an exec hang (DESIGN.md 4.1): a write lease, a loop of SIGSTOP, a FUSE
// filesystem that does not answer. None of them may slow the daemon or other starts down, and what hangs ends at its
// deadline, with its client, or after --start-timeout.

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

func init() {
	testRoles["hold-lease"] = holdLease
	testRoles["stop-everybody"] = stopEverybody
	testRoles["serve-nothing"] = serveNothing
}

// ---- what makes an exec hang ----------------------------------------------------------------------------------------

// holdLease is a role: it holds write leases on files of its own until stdin ends. Whoever opens one waits until the
// kernel breaks the lease, which takes fs.lease-break-time (45 s).
func holdLease(paths []string) {
	signal.Ignore(syscall.SIGIO) // "give the lease back"
	for _, path := range paths {
		fd, err := unix.Open(path, unix.O_RDONLY, 0)
		if err == nil {
			_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
		}
		if err != nil {
			fmt.Printf("%s: %v\n", path, err)
			os.Exit(1)
		}
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
}

// stopEverybody is a role: it sends SIGSTOP to whatever it may, again and again, until stdin ends.
func stopEverybody([]string) {
	go func() {
		io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println("ready")
	for {
		unix.Kill(-1, unix.SIGSTOP)
	}
}

// serveNothing is a role: an HTTP server with nothing else to do, until stdin ends. What it takes to answer is the
// machine's share of what the daemon takes.
func serveNothing([]string) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	go http.Serve(listener, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	fmt.Println(listener.Addr())
	io.Copy(io.Discard, os.Stdin)
}

// hostileUID is the acting user of these tests, and nobody else's: the loop of SIGSTOP stops all that it runs.
var hostileUID = 64000 + os.Getpid()%1000

// runAsHostile runs a role as that user until the test ends.
func runAsHostile(t *testing.T, role ...string) (pid int) {
	t.Helper()
	hostile := uint32(hostileUID)
	pid, says := runRole(t, &syscall.Credential{Uid: hostile, Gid: hostile}, role...)
	if says != "ready" {
		t.Fatalf("%q says %q", role, says)
	}
	return pid
}

// runRole runs a role until the test ends and answers its first line.
func runRole(t *testing.T, as *syscall.Credential, role ...string) (pid int, says string) {
	t.Helper()
	cmd := exec.Command(helperBinary(t), role...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as}
	stdin, err1 := cmd.StdinPipe()
	stdout, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	line, _ := bufio.NewReader(stdout).ReadString('\n')
	return cmd.Process.Pid, strings.TrimSpace(line)
}

// leasedProgram is an executable that nobody can execute: the hostile user owns it and holds a lease on it.
func leasedProgram(t *testing.T) string {
	t.Helper()
	program := filepath.Join(publicDir(t), "leased")
	content, err := os.ReadFile("/bin/true")
	if err == nil {
		err = errors.Join(os.WriteFile(program, content, 0o755), os.Chmod(program, 0o755),
			os.Chown(program, hostileUID, hostileUID))
	}
	if err != nil {
		t.Fatal(err)
	}
	runAsHostile(t, "hold-lease", program)
	return program
}

// startDaemonWithHostile starts one that knows the users root and hostile.
func startDaemonWithHostile(t *testing.T, args ...string) *daemon {
	t.Helper()
	needRoot(t)
	return startDaemonWith(t, daemonConfig{args: args, files: map[string]string{
		"/etc/passwd": fmt.Sprintf("root:x:0:0:root:/root:/bin/sh\nhostile:x:%d:%d::/:/bin/sh\n", hostileUID, hostileUID),
		"/etc/group":  fmt.Sprintf("root:x:0:\nhostile:x:%d:\n", hostileUID),
	}})
}

// hostileProcesses lists what runs as the hostile user, but for its own tools.
func hostileProcesses(except ...int) (pids []int) {
	for _, pid := range everyPid() {
		var st syscall.Stat_t
		if syscall.Stat(fmt.Sprintf("/proc/%d", pid), &st) == nil && int(st.Uid) == hostileUID && isAlive(pid) &&
			!slices.Contains(except, pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// hungFUSE mounts a filesystem at dir that shows its root, if it answers at all, and never answers anything else. With
// `takes` it accepts the requests that it leaves unanswered: then the kernel does not even let go of a killed process.
// The goroutine of the test gets a mount namespace of its own for it, so that nobody else on the machine runs into it.
func hungFUSE(t *testing.T, dir string, answers, takes bool) (abort func()) {
	t.Helper()
	runtime.LockOSThread() // for good: the thread ends with the test
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err != nil {
		t.Skipf("needs a mount namespace: %v", err)
	}
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skipf("needs /dev/fuse: %v", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other", fd)
	if err := unix.Mount("envd-test", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		unix.Close(fd)
		t.Fatalf("mount fuse: %v", err)
	}
	device := os.NewFile(uintptr(fd), "/dev/fuse") // only now: before the mount it polls as broken
	abort = sync.OnceFunc(func() {
		unix.Unmount(dir, unix.MNT_DETACH)
		device.Close() // the last descriptor: aborts the connection, which wakes all who wait for an answer
	})
	t.Cleanup(abort)
	if answers {
		ready := make(chan struct{})
		go serveFUSERoot(device, takes, ready)
		select {
		case <-ready:
		case <-time.After(5 * time.Second):
			t.Fatal("the kernel did not say FUSE_INIT")
		}
	}
	return abort
}

// serveFUSERoot answers FUSE_INIT and what concerns the root directory. Layout: include/uapi/linux/fuse.h.
func serveFUSERoot(device *os.File, takes bool, ready chan<- struct{}) {
	const (
		getattr, statfs, initialise, opendir, access = 3, 17, 26, 27, 34
		rootNode                                     = 1
	)
	request := make([]byte, 1<<20)
	for {
		n, err := device.Read(request)
		if err != nil || n < 40 {
			return
		}
		opcode, unique := binary.NativeEndian.Uint32(request[4:]), binary.NativeEndian.Uint64(request[8:])
		node := binary.NativeEndian.Uint64(request[16:])
		var answer []byte
		switch {
		case opcode == initialise:
			answer = make([]byte, 64)                        // struct fuse_init_out
			binary.NativeEndian.PutUint32(answer[0:], 7)     // major
			binary.NativeEndian.PutUint32(answer[4:], 31)    // minor
			binary.NativeEndian.PutUint32(answer[20:], 4096) // max_write
		case opcode == getattr && node == rootNode:
			answer = make([]byte, 16+88)                                // struct fuse_attr_out, valid for ever
			binary.NativeEndian.PutUint64(answer[0:], 1<<31)            // attr_valid
			binary.NativeEndian.PutUint64(answer[16:], rootNode)        // ino
			binary.NativeEndian.PutUint32(answer[16+60:], 0o40755)      // mode
			binary.NativeEndian.PutUint32(answer[16+64:], 2)            // nlink
			binary.NativeEndian.PutUint32(answer[16+80:], uint32(4096)) // blksize
		case opcode == statfs && node == rootNode:
			answer = make([]byte, 80) // struct fuse_statfs_out
		case opcode == opendir && node == rootNode:
			answer = make([]byte, 16) // struct fuse_open_out
		case opcode == access && node == rootNode:
		default:
			continue // never
		}
		reply := binary.NativeEndian.AppendUint32(nil, uint32(16+len(answer)))
		reply = binary.NativeEndian.AppendUint32(reply, 0)
		reply = append(binary.NativeEndian.AppendUint64(reply, unique), answer...)
		if _, err := device.Write(reply); err != nil {
			return
		}
		if opcode == initialise {
			close(ready)
			if !takes {
				return
			}
		}
	}
}

// ---- what must go on meanwhile --------------------------------------------------------------------------------------

// timely runs what has times to keep, up to three times: a machine that is busy with other things must not fail a test.
func timely(t *testing.T, measure func() error) {
	t.Helper()
	for attempt := 1; ; attempt++ {
		err := measure()
		if err == nil || t.Failed() {
			return
		}
		if attempt == 3 {
			t.Errorf("three times: %v", err)
			return
		}
		t.Logf("once more: %v", err)
	}
}

// unharmed lets the daemon work, with much garbage to collect, while `hang` runs; /health and other starts must stay
// quick.
func unharmed(t *testing.T, d *daemon, hang func() error) error {
	t.Helper()
	slowestHealth, slowestStart := 50*time.Millisecond, time.Second
	if raceEnabled() {
		slowestHealth, slowestStart = 400*time.Millisecond, 4*time.Second
	}
	_, control := runRole(t, nil, "serve-nothing")
	stop := make(chan struct{})
	var health, idle, starts, forks []time.Duration
	var calls int
	var wait sync.WaitGroup
	loop := func(f func()) {
		wait.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					f()
				}
			}
		})
	}
	loop(func() {
		for url, times := range map[string]*[]time.Duration{d.url + "/health": &health, "http://" + control: &idle} {
			start := time.Now()
			response, err := d.http.Get(url)
			if err != nil {
				t.Errorf("%s: %v", url, err)
				return
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			if response.StatusCode != http.StatusOK {
				t.Errorf("%s: %s", url, response.Status)
			}
			*times = append(*times, time.Since(start))
			time.Sleep(time.Millisecond)
		}
	})
	loop(func() {
		start := time.Now()
		s, err := d.open(t, argv("/bin/true"))
		if err != nil {
			t.Errorf("Start of /bin/true: %v", err)
			return
		}
		if r := s.collect(); r.err != nil || r.ends != 1 {
			t.Errorf("Start of /bin/true: %v, %d ends", r.err, r.ends)
		}
		starts = append(starts, time.Since(start))
		start = time.Now()
		fork := exec.Command("/bin/true")
		fork.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a scheduling group of its own, as the daemon's children
		if err := fork.Run(); err != nil {
			t.Errorf("/bin/true: %v", err)
		}
		forks = append(forks, time.Since(start))
		time.Sleep(5 * time.Millisecond)
	})
	loop(func() { // megabytes of output: a collection every few of them
		s, err := d.open(t, argv("/usr/bin/head", "-c", "4194304", "/dev/zero"), withClient(d.process(connect.WithProtoJSON(),
			connect.WithAcceptCompression("gzip", nil, nil))))
		if err != nil {
			t.Errorf("Start of head: %v", err)
			return
		}
		if r := s.collect(); r.err != nil || len(r.stdout) != 4<<20 {
			t.Errorf("Start of head: %v, %d bytes", r.err, len(r.stdout))
		}
		if _, err := d.process().List(t.Context(), connect.NewRequest(&pb.ListRequest{})); err != nil {
			t.Errorf("List: %v", err)
		}
		calls++
	})
	err := hang()
	close(stop)
	wait.Wait()
	for _, times := range [][]time.Duration{health, idle, starts, forks} {
		slices.Sort(times)
	}
	if len(health) < 20 || len(starts) < 5 || calls < 1 {
		return errors.Join(err, fmt.Errorf("only %d /health, %d starts of true, %d of head meanwhile", len(health),
			len(starts), calls))
	}
	// What the machine is too busy for, the daemon cannot do either: an idle server, a fork without a daemon.
	p99, idleP99 := health[len(health)*99/100], idle[len(idle)*99/100]
	worst, worstFork := starts[len(starts)-1], forks[len(forks)-1]
	t.Logf("/health %d times: p50 %v, p99 %v (an idle server %v), worst %v; /bin/true %d times: p50 %v, worst %v "+
		"(a fork %v); %d times 4 MiB", len(health), health[len(health)/2], p99, idleP99, health[len(health)-1],
		len(starts), starts[len(starts)/2], worst, worstFork, calls)
	if slowestHealth = max(slowestHealth, 3*idleP99); p99 > slowestHealth {
		err = errors.Join(err, fmt.Errorf("/health p99 %v, want less than %v", p99, slowestHealth))
	}
	if slowestStart = max(slowestStart, 3*worstFork); worst > slowestStart {
		err = errors.Join(err, fmt.Errorf("a start of /bin/true took %v, want less than %v", worst, slowestStart))
	}
	return err
}

// endsAtDeadline starts something that hangs and expects deadline_exceeded; when that came too late, it says so.
func endsAtDeadline(t *testing.T, d *daemon, command []string, deadline time.Duration, options ...callOption) error {
	t.Helper()
	start := time.Now()
	r := runResult{}
	s, err := d.open(t, command, append(options, withTimeoutMs(int(deadline.Milliseconds())))...)
	if err == nil {
		r = s.collect()
		err = r.err
	}
	took := time.Since(start)
	if connect.CodeOf(err) != connect.CodeDeadlineExceeded || err == nil || r.ends != 0 {
		t.Errorf("%q: %v, %d ends, want deadline_exceeded", command, err, r.ends)
	}
	if took < deadline-10*time.Millisecond {
		t.Errorf("%q with a deadline of %v ended after %v", command, deadline, took)
	}
	if took > deadline+time.Second {
		return fmt.Errorf("%q with a deadline of %v ended after %v", command, deadline, took)
	}
	return nil
}

// hangs is a way to make an exec hang: what to start, as whom, and how many at once.
type hangs struct {
	command []string
	options []callOption
	tools   []int // pids of the hostile user's own tools
}

// manyHang lets n starts hang until their deadlines, which come one after the other, while the daemon works.
func manyHang(t *testing.T, d *daemon, h hangs, n int, first, last time.Duration) {
	t.Helper()
	timely(t, func() error {
		return unharmed(t, d, func() error {
			late := make([]error, n)
			var wait sync.WaitGroup
			for i := range n {
				deadline := first + (last-first)*time.Duration(i)/time.Duration(n)
				wait.Go(func() { late[i] = endsAtDeadline(t, d, h.command, deadline, h.options...) })
			}
			wait.Wait()
			for _, err := range late {
				if err != nil {
					return err // one will do
				}
			}
			return nil
		})
	})
}

// leavesNothing expects that no child is left of what hung.
func leavesNothing(t *testing.T, d *daemon, h hangs) {
	t.Helper()
	waitFor(t, 10*time.Second, "the children that hung are gone", func() bool {
		return len(hostileProcesses(h.tools...)) == 0 && len(descendantsOf(d.pid)) == 0
	})
	if list := d.list(t); len(list) != 0 {
		t.Errorf("still listed: %v", list)
	}
}

// clientLeaves expects that a hanging child goes with its client.
func clientLeaves(t *testing.T, d *daemon, h hangs) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	done := make(chan error, 1)
	go func() {
		s, err := d.open(t, h.command, append(h.options, withContext(ctx))...)
		if err == nil {
			err = s.collect().err
		}
		done <- err
	}()
	waitFor(t, 5*time.Second, "a child that hangs", func() bool { return len(descendantsOf(d.pid)) > 0 })
	select {
	case err := <-done:
		t.Fatalf("%q did not hang: %v", h.command, err)
	case <-time.After(300 * time.Millisecond):
	}
	cancel()
	if err := <-done; connect.CodeOf(err) != connect.CodeCanceled {
		t.Errorf("the client sees %v", err)
	}
	leavesNothing(t, d, h)
}

func TestHangingExec(t *testing.T) {
	needRoot(t)
	t.Run("write lease", func(t *testing.T) {
		for _, user := range []string{"root", "hostile"} {
			t.Run("as "+user, func(t *testing.T) {
				program := leasedProgram(t)
				d := startDaemonWithHostile(t)
				h := hangs{command: argv(program), options: []callOption{withUser(user), withCwd("/")}}
				h.tools = hostileProcesses()
				manyHang(t, d, h, 10, time.Second, 3*time.Second)
				leavesNothing(t, d, h)
				clientLeaves(t, d, h)
			})
		}
		t.Run("a hundred at once", func(t *testing.T) {
			program := leasedProgram(t)
			d := startDaemonWithHostile(t)
			h := hangs{argv(program), []callOption{withUser("hostile"), withCwd("/")}, hostileProcesses()}
			before := d.ownDescriptors()
			manyHang(t, d, h, 100, 2*time.Second, 3*time.Second)
			leavesNothing(t, d, h)
			d.descriptorsReturn(t, before)
			t.Logf("%d threads, RSS %d MiB afterwards", d.threads(), d.rss()>>20)
		})
		// A child that hangs before its exec still has the daemon's descriptors, unless it lets go of them first.
		t.Run("holds nothing of others", func(t *testing.T) {
			program := leasedProgram(t)
			d := startDaemonWithHostile(t)
			cat := d.start(t, argv("/bin/cat"))
			connection, err := net.Dial("tcp", d.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer connection.Close()
			for request := range 2 {
				if request == 1 {
					ctx, cancel := context.WithCancel(t.Context())
					t.Cleanup(cancel)
					go d.open(t, argv(program), withUser("hostile"), withCwd("/"), withContext(ctx))
					waitFor(t, 5*time.Second, "a child that hangs", func() bool { return len(descendantsOf(d.pid)) == 2 })
				}
				header := []string{"keep-alive", "close"}[request]
				fmt.Fprintf(connection, "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: %s\r\n\r\n", header)
				if n, err := connection.Read(make([]byte, 4096)); n == 0 {
					t.Fatal(err)
				}
			}
			connection.SetReadDeadline(time.Now().Add(time.Second))
			if n, err := connection.Read(make([]byte, 4096)); err != io.EOF {
				t.Errorf("a connection that the daemon has closed: %d bytes, %v, want EOF", n, err)
			}
			start := time.Now()
			if err := d.closeStdin(t, byPid(cat.pid)); err != nil {
				t.Fatal(err)
			}
			ended := make(chan runResult, 1)
			go func() { ended <- cat.collect() }()
			select {
			case r := <-ended:
				wantEnd(t, r.end, 0, true, "exit status 0")
				if took := time.Since(start); took > 200*time.Millisecond {
					t.Errorf("cat ended %v after CloseStdin", took)
				}
			case <-time.After(2 * time.Second):
				t.Error("cat does not see the end of its stdin while another start hangs")
			}
		})
		t.Run("start timeout", func(t *testing.T) {
			program := leasedProgram(t)
			d := startDaemonWithHostile(t, "--start-timeout", "1s")
			h := hangs{tools: hostileProcesses()}
			start := time.Now()
			failure := d.startError(t, argv(program), withUser("hostile"), withCwd("/"))
			if took := time.Since(start); took < 900*time.Millisecond || took > 2*time.Second {
				t.Errorf("a start without a deadline ended after %v, want 1 s", took)
			}
			t.Logf("the client sees %v", failure)
			leavesNothing(t, d, h)
			d.healthy(t)
		})
	})

	t.Run("loop of SIGSTOP", func(t *testing.T) {
		d := startDaemonWithHostile(t)
		tool := runAsHostile(t, "stop-everybody")
		h := hangs{argv("/bin/sleep", "1000"), []callOption{withUser("hostile"), withCwd("/")}, []int{tool}}
		manyHang(t, d, h, 10, time.Second, 3*time.Second)
		leavesNothing(t, d, h)

		// A command that would end by itself has mostly been stopped first, before its exec or behind it.
		var wait sync.WaitGroup
		for range 20 {
			wait.Go(func() {
				s, err := d.open(t, argv("/bin/true"), append(h.options, withTimeoutMs(700))...)
				if err == nil {
					err = s.collect().err
				}
				if err != nil && connect.CodeOf(err) != connect.CodeDeadlineExceeded {
					t.Errorf("/bin/true, stopped: %v", err)
				}
			})
		}
		wait.Wait()
		leavesNothing(t, d, h)
	})

	t.Run("FUSE", func(t *testing.T) {
		for _, test := range []struct {
			name           string
			answers, takes bool
			where          string // below the mount
		}{
			{"silent", false, false, "."},
			{"silent", false, false, "sub"},
			{"answers for its root only", true, false, "sub"},
			{"takes requests and never answers", true, true, "sub"},
		} {
			for _, use := range []string{"as directory", "as program"} {
				for _, user := range []string{"root", "hostile"} {
					if user == "hostile" && !test.takes {
						continue
					}
					t.Run(fmt.Sprintf("%s, %s of it %s of %s", test.name, test.where, use, user), func(t *testing.T) {
						dir := publicDir(t)
						mount := filepath.Join(dir, "mount")
						if err := os.Mkdir(mount, 0o755); err != nil {
							t.Fatal(err)
						}
						abort := hungFUSE(t, mount, test.answers, test.takes)
						// Its mount namespace is a copy of this thread's.
						d := startDaemonWithHostile(t)
						t.Cleanup(abort) // before the daemon is told to leave: nobody leaves while the kernel holds him
						place := filepath.Join(mount, test.where)
						h := hangs{command: argv("/bin/true"), options: []callOption{withUser(user), withCwd(place)}}
						if use == "as program" {
							h = hangs{command: argv(place + "/program"), options: []callOption{withUser(user), withCwd("/")}}
						}
						threads := d.threads()
						manyHang(t, d, h, 10, 500*time.Millisecond, 1500*time.Millisecond)
						t.Logf("%d threads before, %d while the filesystem hangs", threads, d.threads())
						if !test.takes {
							leavesNothing(t, d, h)
						} else if user == "root" {
							// The kernel keeps these children. They must not keep the daemon: d.stop wants it gone within 5 s.
							d.stop(t)
							return
						}
						abort()
						leavesNothing(t, d, h)
						d.run(t, argv("/bin/true"))
					})
				}
			}
		}
	})
}

// More starts hang than the daemon lets hang at once: what is too much is refused, and the rest of the daemon works.
func TestTooManyHangingStarts(t *testing.T) {
	needRoot(t)
	program := leasedProgram(t)
	d := startDaemonWithHostile(t)
	h := hangs{tools: hostileProcesses()}
	var hung, refused atomic.Int64
	var wait sync.WaitGroup
	begin := time.Now()
	for range 400 {
		wait.Go(func() {
			s, err := d.open(t, argv(program), withUser("hostile"), withCwd("/"), withTimeoutMs(4000))
			if err == nil {
				err = s.collect().err
			}
			switch connect.CodeOf(err) {
			case connect.CodeDeadlineExceeded:
				hung.Add(1)
			case connect.CodeResourceExhausted:
				refused.Add(1)
			default:
				t.Errorf("%v", err)
			}
		})
	}
	waitFor(t, 4*time.Second, "many that hang", func() bool { return len(descendantsOf(d.pid)) > 50 })
	d.healthy(t)
	s, err := d.open(t, argv("/bin/true")) // may have to wait for those that hang, or be refused; not more
	if err == nil {
		err = s.collect().err
	}
	if err != nil && connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("/bin/true meanwhile: %v", err)
	}
	t.Logf("/bin/true meanwhile: %v, %v after the first start", err, time.Since(begin).Round(time.Millisecond))
	d.healthy(t)
	wait.Wait()
	took := time.Since(begin).Round(time.Millisecond)
	t.Logf("%d hung, %d were refused, all within %v", hung.Load(), refused.Load(), took)
	if hung.Load() < 100 {
		t.Errorf("only %d starts could hang at once", hung.Load())
	}
	leavesNothing(t, d, h)
	d.run(t, argv("/bin/true"))
}
