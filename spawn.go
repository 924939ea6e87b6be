// Starting, waiting for and killing processes: the only place that forks.
//
// A fork must not be able to stop the daemon. syscall.ForkExec is a vfork: until the child has exec'ed, the calling
// thread keeps its P, so that the next garbage collection, and with it every request, waits for a program on a hung FUSE
// mount, for a lease break, or for a child that somebody stopped. Here the same vfork (no page tables are copied, so
// it is as fast) is made as a system call that blocks: the runtime takes the P away (entersyscall). The child shares the
// daemon's memory until it execs, so it must not run Go code: vfork_$GOARCH.s makes the system calls of a list prepared
// beforehand, in registers alone, and notes each result where the daemon finds it. What hangs costs one of launchesMax threads.
//
// No thread waits for the end of a process: the poller tells that it is dead, and then wait4(2) is asked. A tracer, which is
// anybody of the same uid, comes first and may keep a dead process for as long as it likes (ptrace(2)): such a child is looked
// at again from time to time, and after a while it has ended for its clients all the same.
//
// What the shared memory does not lend: a child that has changed its uid cannot be traced by that uid before exec, since
// changing credentials makes the memory undumpable (ptrace(2), "ptrace access mode checking"; not with fs.suid_dumpable at
// 1, which is for debugging, and SECURITY.md has a word on 2).
//
// Kernel: 4.14; pidfd_open since 5.3, cgroup leaves as cgroup.go says.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// step is one system call of a child between vfork and exec. Its layout is read by vfork_$GOARCH.s.
type step struct {
	nr     uintptr
	arg    [4]uintptr
	passes uint64 // bit N: error N (modulo 64) does not end the child, the next step is tried
	want   uintptr
	mask   uintptr // the bits in which the result must be as want, or the child ends
	result uintptr
}

const (
	anyError   = ^uint64(0)
	noProgram  = 1<<unix.ENOENT | 1<<unix.EACCES | 1<<unix.ENOTDIR // with these the search in PATH goes on
	notReached = 1 << 32                                           // a result that no step has

	launchSlots = 16                     // starts at once that do not hang
	launchHangs = 100 * time.Millisecond // a start that takes longer hangs, and another has its slot
	launchesMax = 272                    // starts at once, those that hang among them
	childNofile = 1024                   // soft limit of open files that programs expect; the Go runtime has raised the daemon's own

	zombiePatience = 5 * time.Second // a tracer's, to let go of a dead child
	killPatience   = time.Second     // the same after a kill
	firstLook      = 10 * time.Millisecond
	lastLook       = time.Second // intervals of looking at a child that cannot be reaped yet: they double

	statusUnknown = syscall.WaitStatus(0x7f) // of a child whose tracer keeps it: what wait(2) has for a stop, which is no end
)

// Constants of the child's first steps. Package variables never move.
var (
	everySignal = ^uint64(0)
	noSignal    uint64
	defaultHow  [4]uintptr // struct sigaction: SIG_DFL, no flags, empty mask
	nofile      = func() (limit unix.Rlimit) {
		unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
		limit.Cur = min(childNofile, limit.Max)
		return limit
	}()
	oomScore     = []byte("100")
	oomScorePath = []byte("/proc/self/oom_score_adj\x00")
)

// spawnSpec says what to start. No text in it holds a NUL.
type spawnSpec struct {
	argv, env []string
	path      string // where argv[0] is searched when it has no slash
	dir       string
	user      account
	fds       [3]int // become 0 to 2; closed by start
	terminal  bool   // fds[0], the same as the others, becomes the controlling terminal
	closed    func() // called by close: what the start held is free again
}

// launchMemory is what starting takes beside the spec, in bytes: the texts once more as C has them, the candidates twice.
func (spec *spawnSpec) launchMemory() (bytes int64) {
	for _, text := range slices.Concat(spec.argv, spec.env) {
		bytes += int64(len(text)) + 16
	}
	if isSearched(spec.argv[0]) {
		n := int64(1 + strings.Count(searchPath(spec.path), ":"))
		bytes += 2*(n*int64(len(spec.argv[0])+2)+int64(len(spec.path))) + n*int64(unsafe.Sizeof(step{})+32)
	}
	return bytes
}

// close is called once, by start if it has been called.
func (spec *spawnSpec) close() {
	defer spec.closed()
	for i, fd := range spec.fds {
		if fd >= 0 && !slices.Contains(spec.fds[:i], fd) {
			syscall.Close(fd)
		}
	}
}

// child is a process that is being started, runs or has been reaped.
type child struct {
	leaf   *cgroupLeaf        // nil: it is in the daemon's cgroup
	pid    atomic.Int32       // written by the kernel as the process is made, before it runs; 0 until then
	doomed atomic.Bool        // nobody waits for its start any more
	failed syscall.WaitStatus // as a shell would have it, where the command could not be executed; else 0

	// Protected by spawner.mu; the last three do not change any more once the child has ended:
	reaped  bool      // its pid may be another process's
	ended   bool      // for its clients: reaped, or kept by a tracer for too long
	looking bool      // look calls itself
	killed  time.Time // when it was sent SIGKILL; zero: it was not
	dead    time.Time // when it was first seen dead and not to be had; zero: it was not
	exited  func()    // to be called when it has ended; nil before awaitExit and after the call
	status  syscall.WaitStatus
	usage   syscall.Rusage
	end     time.Time
}

var (
	errTooManyLaunches = errors.New("too many starts hang in the kernel")
	errLaunchTimeout   = errors.New("the command was not executed in time")
)

type spawner struct {
	launchTimeout time.Duration
	poller        *poller
	cgroups       *cgroups
	launches      chan struct{} // holds a value for each start
	slots         chan struct{} // for each that has not been found to hang

	mu       sync.Mutex // protects what follows and every child: registration, delivery and kill exclude each other
	children map[*child]struct{}
}

func newSpawner(launchTimeout time.Duration, p *poller) *spawner {
	return &spawner{launchTimeout: launchTimeout, poller: p, slots: make(chan struct{}, launchSlots),
		launches: make(chan struct{}, launchesMax), children: map[*child]struct{}{}}
}

// awaitExit calls exited, as a rule on the poller's goroutine, once the child has ended.
func (s *spawner) awaitExit(c *child, exited func()) {
	s.mu.Lock()
	c.exited = exited
	s.mu.Unlock()
	if s.reap(c) { // else its pid may be somebody else's by now
		s.tell(c)
		return
	}
	fd, err := unix.PidfdOpen(int(c.pid.Load()), 0)
	w := &watch{fd: fd}
	w.ready = func() {
		s.poller.remove(w)
		s.look(c, firstLook)
	}
	if err == nil && s.poller.add(w) == nil {
		return
	}
	unix.Close(fd) // no descriptor was to be had
	s.look(c, firstLook)
}

// look reaps a child that is dead. Where that cannot be done yet, because its tracer comes first, it looks again and again.
func (s *spawner) look(c *child, interval time.Duration) {
	reaped := s.reap(c)
	if tracer := s.endUnreaped(c); tracer != 0 {
		c.leaf.killTracer(int(c.pid.Load()), tracer)
	}
	s.tell(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	if reaped || c.looking {
		return
	}
	c.looking = true
	time.AfterFunc(interval, func() {
		s.mu.Lock()
		c.looking = false
		s.mu.Unlock()
		s.look(c, min(2*interval, lastLook))
	})
}

// tell calls exited once.
func (s *spawner) tell(c *child) {
	s.mu.Lock()
	exited := c.exited
	if !c.ended || exited == nil {
		s.mu.Unlock()
		return
	}
	c.exited = nil
	s.mu.Unlock()
	exited()
}

// endUnreaped ends a child for its clients that has a tracer which does not let go of it. It keeps its pid until it can be
// reaped after all. The tracer is returned.
func (s *spawner) endUnreaped(c *child) (tracer int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.reaped || c.ended {
		return 0
	}
	pid, now := int(c.pid.Load()), time.Now()
	stat, tracer := readStat(pid), statusNumber(pid, "TracerPid")
	killed := !c.killed.IsZero() && now.Sub(c.killed) >= killPatience
	if dead := stat.state == 'Z' && stat.threads <= 1; !dead {
		c.dead = time.Time{}
	} else if c.dead.IsZero() {
		c.dead = now
	}
	switch {
	case !c.dead.IsZero() && now.Sub(c.dead) >= zombiePatience:
	case killed && (stat.state == 'Z' || tracer != 0): // it may be stopped on its way out, too, or a thread of it is what is traced
	default:
		return 0
	}
	if stat.state != 'Z' {
		stat.status = syscall.WaitStatus(syscall.SIGKILL)
	}
	c.endLocked(stat.status, stat.usage)
	return tracer
}

// endLocked says how a child has ended, unless that has been said.
func (c *child) endLocked(status syscall.WaitStatus, usage syscall.Rusage) {
	if !c.ended {
		c.status, c.usage, c.end, c.ended = cmp.Or(c.failed, status), usage, time.Now(), true
	}
}

// procStat is what /proc/PID/stat tells of a dead process.
type procStat struct {
	state   byte
	threads int
	status  syscall.WaitStatus
	usage   syscall.Rusage // processor times
}

func readStat(pid int) (stat procStat) {
	text, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:])) // from the third on, proc_pid_stat(5)
	if len(fields) < 50 {
		return stat
	}
	number := func(field int) int64 { n, _ := strconv.ParseInt(fields[field-3], 10, 64); return n }
	stat.state, stat.threads, stat.status = fields[0][0], int(number(20)), syscall.WaitStatus(number(52))
	if stat.status == 0 && os.Geteuid() != 0 { // also what the kernel says to whom it does not want to tell
		stat.status = statusUnknown
	}
	const tick = 10 * 1000 * 1000 // nanoseconds; USER_HZ is 100 on both architectures
	stat.usage.Utime, stat.usage.Stime = syscall.NsecToTimeval(number(14)*tick), syscall.NsecToTimeval(number(15)*tick)
	return stat
}

// reap takes the status of a child that is dead, or of any, without one, and tells whether it has it.
func (s *spawner) reap(c *child) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	which := -1
	if c != nil && c.reaped {
		return true
	} else if c != nil {
		which = int(c.pid.Load())
	}
	var status syscall.WaitStatus
	var usage syscall.Rusage
	pid, err := syscall.Wait4(which, &status, syscall.WNOHANG, &usage)
	if c != nil && err == syscall.ECHILD { // nobody knows how it ended
		pid, err, status = which, nil, statusUnknown
	}
	if err != nil || pid <= 0 {
		return false
	}
	if c == nil {
		for other := range s.children {
			if int(other.pid.Load()) == pid {
				c = other
			}
		}
	}
	if c != nil {
		delete(s.children, c)
		c.reaped = true
		c.endLocked(status, usage)
	}
	return true
}

// disown leaves what a child was until now to itself, so that c can stand for the next attempt.
func (s *spawner) disown(c *child) {
	s.mu.Lock()
	rest := &child{reaped: c.reaped, ended: c.ended}
	rest.pid.Store(c.pid.Swap(0))
	delete(s.children, c)
	if !rest.reaped {
		s.children[rest] = struct{}{}
	}
	s.mu.Unlock()
	s.awaitExit(rest, func() {})
}

// reapOrphans is init's duty: it takes the status of every process that has lost its parent. The children of envd among
// them get theirs delivered.
func (s *spawner) reapOrphans() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGCHLD)
	for ; ; <-signals {
		for s.reap(nil) {
		}
	}
}

// start returns when the command is being executed, or has turned out not to be executable: then its reason stands on
// its stderr, and it has exited with 126 or 127, as a shell would have it. A launch that hangs is given up, and its child
// killed, when ctx ends or after launchTimeout.
func (s *spawner) start(ctx context.Context, spec *spawnSpec) (*child, error) {
	err := s.cgroups.awaitThaw(ctx)
	if err == nil {
		select {
		case s.launches <- struct{}{}:
		case <-ctx.Done():
			err = ctx.Err()
		case <-time.After(s.launchTimeout):
			err = errTooManyLaunches
		}
	}
	if err != nil {
		spec.close()
		return nil, err
	}
	c, launched := &child{}, make(chan error, 1)
	go func() {
		s.slots <- struct{}{}
		c.leaf = s.cgroups.acquire(spec.terminal)
		hangs := time.AfterFunc(launchHangs, func() { <-s.slots })
		err := s.launch(c, spec)
		if hangs.Stop() {
			<-s.slots
		}
		<-s.launches
		spec.close()
		c.leaf.launched()
		if err != nil {
			s.cgroups.release(c.leaf)
		}
		launched <- err
	}()
	ticks := time.Tick(launchHangs)
	for left := s.launchTimeout; err == nil; {
		select {
		case err := <-launched:
			return c, err
		case <-ctx.Done():
			err = ctx.Err()
		case <-ticks:
			if s.cgroups.frozen() {
				continue // on its way the child may have been frozen, too: its time stands still
			}
			if left -= launchHangs; left <= 0 {
				err = errLaunchTimeout
			}
		}
	}
	go func() {
		for {
			s.doom(c) // again and again: the child may not have been there yet
			select {
			case err := <-launched:
				if err == nil { // it came to be all the same
					s.signal(c, syscall.SIGKILL)
					s.awaitExit(c, func() { s.cgroups.release(c.leaf) })
				}
				return
			case <-ticks:
			}
		}
	}()
	return nil, err
}

// doom kills what a launch that nobody waits for has made so far.
func (s *spawner) doom(c *child) {
	c.doomed.Store(true)
	s.kill(c, 1, syscall.SIGKILL)
}

func (s *spawner) launch(c *child, spec *spawnSpec) error {
	argv := spec.argv
	err := s.attempt(c, spec, candidates(argv[0], spec.path), argv)
	failed, _ := err.(*os.PathError)
	if failed != nil && failed.Err == syscall.ENOEXEC && isText(spec.dir, failed.Path) {
		s.disown(c)
		again := s.attempt(c, spec, []string{"/bin/sh"}, append([]string{"/bin/sh", failed.Path}, argv[1:]...))
		if _, noShell := again.(*os.PathError); !noShell {
			return again
		}
	}
	if failed == nil {
		return err
	}
	code, reason := 126, failed.Err.Error()
	switch {
	case failed.Err == syscall.ENOENT, failed.Err == syscall.ENOTDIR:
		code, reason = 127, "command not found"
	case failed.Err == syscall.ENAMETOOLONG && !strings.Contains(argv[0], "/"):
		code = 127
	}
	c.failed = syscall.WaitStatus(code << 8)
	syscall.Write(spec.fds[2], []byte(argv[0][:min(len(argv[0]), 1024)]+": "+reason+"\n")) // into an empty pipe: cannot block
	return nil
}

// attempt forks once. A PathError says why no candidate could be executed.
func (s *spawner) attempt(c *child, spec *spawnSpec, paths, argv []string) error {
	if c.doomed.Load() {
		return context.Canceled
	}
	s.mu.Lock()
	s.children[c] = struct{}{}
	s.mu.Unlock()
	list, errno := runSteps(c, spec, paths, argv)
	if errno != 0 {
		s.mu.Lock()
		delete(s.children, c)
		s.mu.Unlock()
	}
	if leaf := c.leaf; leaf != nil && errno != syscall.EAGAIN && errno != syscall.ENOMEM && list[0].result == notReached {
		// Somebody removed the leaf, or the kernel kills what is cloned into it (cgroups.recycleLocked says why). EAGAIN is another
		// matter: its group is full (pids.max), and what does not fit there must not run beside it without limits.
		if errno == 0 {
			s.disown(c)
		}
		c.leaf, leaf.killed = nil, true
		s.cgroups.release(leaf)
		return s.attempt(c, spec, paths, argv)
	}
	if errno != 0 {
		return os.NewSyscallError("fork", errno)
	}
	err := outcome(list, paths)
	if _, notExecuted := err.(*os.PathError); err != nil && !notExecuted {
		s.disown(c)
	}
	return err
}

// outcome reads what the child noted of its steps.
func outcome(list []step, paths []string) (err error) {
	for _, st := range list {
		errno := syscall.Errno(-st.result)
		switch {
		case st.result == notReached:
			return nil // the exec that succeeded, or a child that was killed on the way
		case (st.result^st.want)&st.mask != 0:
			return os.NewSyscallError("setting up the process", syscall.EPERM)
		case st.result <= ^uintptr(4095), st.passes == anyError:
			continue
		case st.nr == unix.SYS_CHDIR:
			return os.NewSyscallError("chdir", errno)
		case st.nr != unix.SYS_EXECVE:
			return os.NewSyscallError("setting up the process", errno)
		case st.passes>>(errno%64)&1 == 0:
			return &os.PathError{Op: "exec", Path: paths[0], Err: errno}
		case !errors.Is(err, syscall.EACCES): // what exists but may not be run is the better reason
			err = &os.PathError{Op: "exec", Path: paths[0], Err: errno}
		}
		paths = paths[1:]
	}
	return err
}

// isText tells a script from a binary as shells do: no NUL where its first line would be.
func isText(dir, path string) bool {
	if !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	// No link leads the daemon, which may be root, to a device in place of the file.
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{
		Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err != nil {
		return true // let the shell find out
	}
	defer syscall.Close(fd)
	head := make([]byte, 256)
	n, err := syscall.Read(fd, head)
	return err == nil && bytes.IndexByte(head[:max(n, 0)], 0) < 0
}

// candidates are the paths to try for a command, relative to the child's directory (execvp(3)).
func candidates(cmd, path string) (paths []string) {
	if len(cmd) > unix.NAME_MAX && !strings.Contains(cmd, "/") {
		return []string{"/" + cmd} // no directory has such a file: the kernel says so at once
	} else if !isSearched(cmd) {
		return []string{cmd}
	}
	for dir := range strings.SplitSeq(searchPath(path), ":") {
		paths = append(paths, cmp.Or(dir, ".")+"/"+cmd)
	}
	return paths
}

func isSearched(cmd string) bool {
	return cmd != "" && len(cmd) <= unix.NAME_MAX && !strings.Contains(cmd, "/")
}

// searchPath is as much of the variable PATH as execve(2) takes.
func searchPath(path string) string { return path[:min(len(path), 128<<10)] }

// childSteps lists what a child does between vfork and exec. Pointers are handed to it as numbers: what they point to must be
// on the heap, where nothing moves, and outlive the child's use of it, which is what keep is for.
func childSteps(spec *spawnSpec, paths, argv []string) (list []step, keep [3][]*byte) {
	list = make([]step, 0, 32)
	add := func(passes uint64, nr uintptr, args ...uintptr) {
		list = append(list, step{nr: nr, passes: passes, result: notReached})
		copy(list[len(list)-1].arg[:], args)
	}
	for i, texts := range [][]string{append(paths, spec.dir), argv, spec.env} {
		keep[i], _ = syscall.SlicePtrFromStrings(texts) // fails for a NUL alone
	}
	// Default dispositions first. clone3 has reset what the daemon handles; what it was started with as ignored, under nohup
	// say, exec would keep.
	for sig := uintptr(1); sig <= 64; sig++ {
		if clone3Flags == 0 || ignoredAtStart>>(sig-1)&1 == 1 {
			add(anyError, unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&defaultHow)), 0, 8)
		}
	}
	add(0, unix.SYS_SETSID)
	add(anyError, unix.SYS_CLOSE, 0) // so that the next descriptor is 0
	add(anyError, unix.SYS_OPENAT, ^uintptr(99), uintptr(unsafe.Pointer(&oomScorePath[0])), unix.O_WRONLY)
	add(anyError, unix.SYS_WRITE, 0, uintptr(unsafe.Pointer(&oomScore[0])), uintptr(len(oomScore)))
	for fd, f := range spec.fds {
		add(0, unix.SYS_DUP3, uintptr(f), uintptr(fd), 0)
	}
	// A child that hangs must not hold what others wait to see closed: its copies of sockets and pipes.
	add(anyError, unix.SYS_CLOSE_RANGE, 3, 1<<32-1, 0)
	if spec.terminal {
		add(0, unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0)
	}
	add(anyError, unix.SYS_SETPRIORITY, unix.PRIO_PROCESS, 0, 0)
	add(anyError, unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, uintptr(unsafe.Pointer(&nofile)), 0)
	if os.Geteuid() == 0 {
		uid, gid, groups := uintptr(spec.user.uid), uintptr(spec.user.gid), spec.user.groups // the primary group is among them
		add(0, unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(&groups[0])))
		add(0, unix.SYS_SETRESGID, gid, gid, gid)
		add(0, unix.SYS_SETRESUID, uid, uid, uid)
		// Once more, since what follows from an id that changed nothing, or from a filter that only says yes, is a command of root's.
		verify := func(want, nr uintptr) {
			add(0, nr)
			list[len(list)-1].want, list[len(list)-1].mask = want, 1<<32-1
		}
		verify(uid, unix.SYS_GETUID)
		verify(uid, unix.SYS_GETEUID)
		verify(gid, unix.SYS_GETGID)
		verify(gid, unix.SYS_GETEGID)
		verify(uintptr(len(groups)), unix.SYS_GETGROUPS)
	}
	add(0, unix.SYS_CHDIR, uintptr(unsafe.Pointer(keep[0][len(paths)])))
	add(anyError, unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&noSignal)), 0, 8)
	for i := range paths {
		add(noProgram, unix.SYS_EXECVE, uintptr(unsafe.Pointer(keep[0][i])),
			uintptr(unsafe.Pointer(&keep[1][0])), uintptr(unsafe.Pointer(&keep[2][0])))
	}
	return append(list, step{nr: unix.SYS_EXIT_GROUP, arg: [4]uintptr{127}}), keep
}

// cloneArgs is struct clone_args of clone(2).
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// clone3Flags is CLONE_CLEAR_SIGHAND (5.5), or 0 where clone3 lacks that or CLONE_INTO_CGROUP (5.7). A kernel that knows the
// latter finds that there is no such descriptor; CLONE_VM spares it the copy of the memory.
var clone3Flags = func() uint64 {
	args := cloneArgs{flags: unix.CLONE_INTO_CGROUP | unix.CLONE_VM, exitSignal: uint64(unix.SIGCHLD), cgroup: 1<<31 - 1}
	_, _, errno := syscall.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
	if errno != syscall.EBADF {
		return 0
	}
	return unix.CLONE_CLEAR_SIGHAND
}()

// ignoredAtStart has bit N-1 set if signal N was ignored when the daemon was started. Reading /proc/self/status takes ten times as long.
var ignoredAtStart = func() (ignored uint64) {
	for i := range uintptr(64) {
		var action [4]uintptr // struct sigaction; SIG_IGN is 1
		syscall.RawSyscall6(unix.SYS_RT_SIGACTION, i+1, 0, uintptr(unsafe.Pointer(&action)), 8, 0, 0)
		if action[0] == 1 {
			ignored |= 1 << i
		}
	}
	return ignored
}()

// runSteps forks a child that runs the steps and returns when it has exec'ed or exited.
func runSteps(c *child, spec *spawnSpec, paths, argv []string) ([]step, syscall.Errno) {
	const flags = unix.CLONE_VM | unix.CLONE_VFORK | unix.CLONE_PARENT_SETTID
	list, keep := childSteps(spec, paths, argv)
	nr, a0, a1, a2 := uintptr(unix.SYS_CLONE), uintptr(flags|unix.SIGCHLD), uintptr(0), uintptr(unsafe.Pointer(&c.pid))
	args := &cloneArgs{flags: flags | clone3Flags, parentTID: uint64(a2), exitSignal: uint64(unix.SIGCHLD)}
	if c.leaf != nil {
		args.flags, args.cgroup = args.flags|unix.CLONE_INTO_CGROUP, uint64(c.leaf.dir)
	}
	if clone3Flags != 0 {
		nr, a0, a1 = unix.SYS_CLONE3, uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args)
	}
	r := vfork(nr, a0, a1, a2, &list[0])
	runtime.KeepAlive([]any{spec, keep, args})
	if r > ^uintptr(4095) {
		return list, syscall.Errno(-r)
	}
	c.pid.Store(int32(r)) // where vfork is emulated by fork, as in qemu-user, nobody else has
	return list, 0
}

// vfork blocks all signals around the clone, since a handler that ran in the child would run in the daemon's memory. The
// mask is put back before exitsyscall, after which the goroutine may be on another thread.
//
//go:nosplit
//go:norace
func vfork(nr, a0, a1, a2 uintptr, first *step) (r uintptr) {
	var mask uint64
	entersyscall()
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&everySignal)),
		uintptr(unsafe.Pointer(&mask)), 8, 0, 0)
	r = vforkSteps(nr, a0, a1, a2, first)
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&mask)), 0, 8, 0, 0)
	exitsyscall()
	return r
}

//go:noescape
func vforkSteps(nr, a0, a1, a2 uintptr, steps *step) (ret uintptr)

// The two ends of a blocking system call, as the runtime gives them to package syscall and, for good, to gVisor
// (go.dev/issue/67401).
//
//go:linkname entersyscall runtime.entersyscall
func entersyscall()

//go:linkname exitsyscall runtime.exitsyscall
func exitsyscall()

// signal reaches the whole tree: all of the leaf, or else the process group of a child that has not been reaped.
func (s *spawner) signal(c *child, sig syscall.Signal) error {
	if sig == syscall.SIGKILL {
		s.mu.Lock()
		if c.killed.IsZero() && !c.reaped {
			c.killed = time.Now()
			time.AfterFunc(killPatience, func() { s.look(c, lastLook) }) // a tracer may stop it on its way out
		}
		s.mu.Unlock()
	}
	if c.leaf.signal(sig) {
		return nil
	}
	return s.kill(c, -1, sig)
}

// kill signals a child, or its process group (sign -1), unless the pid is free again.
func (s *spawner) kill(c *child, sign int, sig syscall.Signal) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	pid := int(c.pid.Load())
	if c.reaped || pid == 0 {
		return os.ErrProcessDone
	}
	err := syscall.Kill(sign*pid, sig)
	if c.ended {
		return os.ErrProcessDone // for its clients
	}
	return err
}
