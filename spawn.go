// Starting, waiting for and killing processes: the only place that forks.
//
// A fork must not be able to stop the daemon. syscall.ForkExec is a vfork: until the child has exec'ed, the calling
// thread keeps its P, so that the next garbage collection, and with it every request, waits for a program on a hung FUSE
// mount, for a lease break, or for a child that somebody stopped. Here the same vfork (no page tables are copied, so
// it is as fast) is made as a system call that blocks: the runtime takes the P away (entersyscall). The child shares the
// daemon's memory until it execs, so it must not run Go code: vfork_$GOARCH.s makes the system calls of a list prepared
// beforehand, in registers alone, and notes each result where the daemon finds it. What hangs costs one thread;
// launchesHung bounds them.
//
// What the shared memory does not lend: a child that has changed its uid cannot be traced by that uid before exec, since
// changing credentials makes the memory undumpable (ptrace(2), "ptrace access mode checking"; not with fs.suid_dumpable at
// 1, which is for debugging, and SECURITY.md has a word on 2).
//
// Kernel: 4.14; pidfd_open since 5.3, cgroup leaves as cgroup.go says.

package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
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
	mode   uintptr
	result uintptr
}

// Modes of a step; without any, a failure ends the child.
const (
	mayFailBit = iota
	searchesBit
	onLastResultBit

	mayFail      = 1 << mayFailBit
	searches     = 1 << searchesBit     // an exec: after ENOENT, EACCES and ENOTDIR the next step is tried
	onLastResult = 1 << onLastResultBit // the first argument is the result of the step before
)

const (
	noMoreSteps = ^uintptr(0)
	notReached  = 1 << 32 // a result that no step has

	launchSlots  = 16                     // starts at once
	launchHangs  = 100 * time.Millisecond // a start that takes longer hangs, and another may have its slot
	launchesHung = 256                    // so many may hang without one
	childNofile  = 1024                   // soft limit of open files that programs expect; the Go runtime has raised the daemon's own
)

// steps lists system calls and keeps alive what they point to.
type steps struct {
	list []step
	keep []any
}

func (s *steps) add(mode, nr uintptr, args ...uintptr) {
	st := step{nr: nr, mode: mode, result: notReached}
	copy(st.arg[:], args)
	s.list = append(s.list, st)
}

// Pointers are handed to the child as numbers, so what they point to must be on the heap, where nothing moves.
func (s *steps) str(text string) uintptr {
	b := append([]byte(text), 0)
	s.keep = append(s.keep, b)
	return uintptr(unsafe.Pointer(&b[0]))
}

func (s *steps) strs(texts []string) uintptr {
	pointers := make([]uintptr, len(texts)+1)
	for i, text := range texts {
		pointers[i] = s.str(text)
	}
	s.keep = append(s.keep, pointers)
	return uintptr(unsafe.Pointer(&pointers[0]))
}

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

// spawnSpec says what to start.
type spawnSpec struct {
	argv, env []string // argv[0] is searched in the PATH of env when it has no slash
	dir       string
	user      account
	fds       [3]int      // become 0 to 2; closed by start
	terminal  bool        // fds[0] becomes the controlling terminal
	leaf      *cgroupLeaf // found by start; nil: stays in the daemon's cgroup
}

func (spec *spawnSpec) closeFds() {
	for _, fd := range spec.fds {
		if fd >= 0 {
			syscall.Close(fd)
		}
	}
}

// child is a started process.
type child struct {
	leaf   *cgroupLeaf
	exited chan struct{} // closed when it has been reaped; status and usage are valid then
	status syscall.WaitStatus
	usage  syscall.Rusage
	end    time.Time

	pidSlot int32 // written by the kernel as the child is made, before it runs
	reaped  bool  // protected by spawner.mu
}

// launch is a start in progress.
type launch struct {
	spec  *spawnSpec
	begun time.Time
	// Protected by spawner.mu:
	slotless bool
	current  *child // the one between clone and the return of vfork
	doomed   bool   // nobody waits for it any more
}

func (c *child) pid() int { return int(atomic.LoadInt32(&c.pidSlot)) }

// launchError is a failure before the exec, at the named stage.
type launchError struct {
	stage string
	errno syscall.Errno
}

func (e *launchError) Error() string { return e.stage + ": " + e.errno.Error() }
func (e *launchError) Unwrap() error { return e.errno }

var (
	errTooManyLaunches = errors.New("too many starts hang in the kernel")
	errLaunchTimeout   = errors.New("the command was not executed in time")
)

type spawner struct {
	launchTimeout time.Duration
	poller        *poller
	cgroups       *cgroups
	slots         chan struct{} // holds a value for each start that has a slot

	mu       sync.Mutex // protects what follows and every child's reaped: registration, delivery and kill exclude each other
	children map[int]*child
	launches map[*launch]struct{}
	hung     int // launches without a slot
}

func newSpawner(launchTimeout time.Duration, p *poller) *spawner {
	return &spawner{launchTimeout: launchTimeout, poller: p, slots: make(chan struct{}, launchSlots),
		children: map[int]*child{}, launches: map[*launch]struct{}{}}
}

// awaitExit calls exited, as a rule on the poller's goroutine, once the child has been reaped.
func (s *spawner) awaitExit(c *child, exited func()) {
	select {
	case <-c.exited: // it could not be executed; its pid may be somebody else's by now
		go exited()
		return
	default:
	}
	if fd, err := unix.PidfdOpen(c.pid(), 0); err == nil {
		w := &watch{fd: fd}
		w.ready = func() {
			s.poller.remove(w)
			if s.reap(c) {
				exited()
			} else { // its tracer comes first: ptrace(2)
				go s.waitFor(c, exited)
			}
		}
		if s.poller.add(w) == nil {
			return
		}
		unix.Close(fd)
	}
	go s.waitFor(c, exited) // no descriptor to be had, or a kernel before 5.3: this child costs a thread
}

func (s *spawner) waitFor(c *child, exited func()) {
	s.wait(c)
	exited()
}

// wait blocks until the child has been reaped.
func (s *spawner) wait(c *child) {
	for {
		err := unix.Waitid(unix.P_PID, c.pid(), nil, unix.WEXITED|unix.WNOWAIT, nil)
		if s.reap(c) || err != nil && err != unix.EINTR {
			return
		}
	}
}

// reap takes the status of a child that is dead, and tells whether it has it.
func (s *spawner) reap(c *child) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	var status syscall.WaitStatus
	var usage syscall.Rusage
	if !c.reaped {
		if pid, err := syscall.Wait4(c.pid(), &status, syscall.WNOHANG, &usage); err == nil && pid > 0 {
			s.deliverLocked(c, status, usage)
		}
	}
	return c.reaped
}

func (s *spawner) deliverLocked(c *child, status syscall.WaitStatus, usage syscall.Rusage) {
	delete(s.children, c.pid())
	c.status, c.usage, c.end, c.reaped = status, usage, time.Now(), true
	close(c.exited)
}

// reapOrphans is init's duty: it takes the status of every process that has lost its parent. The children of envd among
// them get theirs delivered.
func (s *spawner) reapOrphans() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGCHLD)
	for ; ; <-signals {
		for s.reapAny() {
		}
	}
}

func (s *spawner) reapAny() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	var status syscall.WaitStatus
	var usage syscall.Rusage
	pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, &usage)
	if err == syscall.EINTR {
		return true
	}
	if err != nil || pid <= 0 {
		return false
	}
	c := s.children[pid]
	for l := range s.launches {
		if l.current != nil && l.current.pid() == pid {
			c = l.current
		}
	}
	if c != nil {
		s.deliverLocked(c, status, usage)
	}
	return true
}

// start returns when the command is being executed, or has turned out not to be executable: then its reason stands on
// its stderr, and it has exited with 126 or 127, as a shell would have it. A launch that hangs is given up, and its child
// killed, when ctx ends or after launchTimeout.
func (s *spawner) start(ctx context.Context, spec *spawnSpec) (*child, error) {
	timer := time.NewTimer(s.launchTimeout)
	defer timer.Stop()
	var err error
	if err := s.takeSlot(ctx, timer.C); err != nil {
		spec.closeFds()
		return nil, err
	}
	group := "user"
	if spec.terminal {
		group = "ptys"
	}
	spec.leaf = s.cgroups.acquire(group)
	type result struct {
		c   *child
		err error
	}
	l, launched := &launch{spec: spec, begun: time.Now()}, make(chan result, 1)
	go func() {
		c, err := s.launch(l)
		spec.closeFds()
		if err != nil {
			s.cgroups.release(spec.leaf)
		}
		s.mu.Lock()
		if l.slotless {
			s.hung--
		} else {
			<-s.slots
		}
		s.mu.Unlock()
		launched <- result{c, err}
	}()
	select {
	case r := <-launched:
		return r.c, r.err
	case <-ctx.Done():
		err = ctx.Err()
	case <-timer.C:
		err = errLaunchTimeout
	}
	s.doom(l)
	go func() {
		again := time.NewTicker(launchHangs) // the child may not have been there yet
		defer again.Stop()
		for {
			select {
			case r := <-launched:
				if r.err == nil { // it came to be all the same
					s.signal(r.c, syscall.SIGKILL)
					s.wait(r.c)
					s.cgroups.release(r.c.leaf)
				}
				return
			case <-again.C:
				s.doom(l)
			}
		}
	}()
	return nil, err
}

func (s *spawner) takeSlot(ctx context.Context, timeout <-chan time.Time) error {
	for {
		select {
		case s.slots <- struct{}{}:
			return nil
		default:
			s.takeSlotsBack()
		}
		select {
		case s.slots <- struct{}{}:
			return nil
		case <-time.After(launchHangs / 4):
		case <-ctx.Done():
			return ctx.Err()
		case <-timeout:
			return errTooManyLaunches
		}
	}
}

// takeSlotsBack takes the slots of launches that hang.
func (s *spawner) takeSlotsBack() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for l := range s.launches {
		if !l.slotless && s.hung < launchesHung && time.Since(l.begun) > launchHangs {
			l.slotless = true
			s.hung++
			<-s.slots
		}
	}
}

// doom kills what a launch that nobody waits for has made so far.
func (s *spawner) doom(l *launch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l.doomed = true
	if l.current != nil {
		s.signalLocked(l.current, l.current.pid(), syscall.SIGKILL)
	}
}

func (s *spawner) launch(l *launch) (*child, error) {
	paths, argv := candidates(l.spec.argv[0], l.spec.env), l.spec.argv
	c, failed, err := s.attempt(l, paths, argv)
	if err == nil && failed.errno == syscall.ENOEXEC && isText(l.spec.dir, failed.path) {
		binary := failed
		c, failed, err = s.attempt(l, []string{"/bin/sh"}, append([]string{"/bin/sh", failed.path}, argv[1:]...))
		if failed.errno != 0 {
			failed = binary // no shell here
		}
	}
	if err == nil && failed.errno != 0 {
		code, reason := 126, failed.errno.Error()
		if failed.errno == syscall.ENOENT || failed.errno == syscall.ENOTDIR {
			code, reason = 127, "command not found"
		}
		c.status = syscall.WaitStatus(code << 8)
		syscall.Write(l.spec.fds[2], []byte(l.spec.argv[0]+": "+reason+"\n")) // into an empty pipe: cannot block
	}
	return c, err
}

// failedExec says why no candidate could be executed; errno 0: one was.
type failedExec struct {
	path  string
	errno syscall.Errno
}

// attempt forks once.
func (s *spawner) attempt(l *launch, paths, argv []string) (*child, failedExec, error) {
	list := childSteps(l.spec, paths, argv)
	c := &child{leaf: l.spec.leaf, exited: make(chan struct{})}
	s.mu.Lock()
	if l.doomed {
		s.mu.Unlock()
		return nil, failedExec{}, context.Canceled
	}
	l.current = c
	s.launches[l] = struct{}{}
	s.mu.Unlock()

	pid, errno := runSteps(list, l.spec.leaf, &c.pidSlot)

	s.mu.Lock()
	delete(s.launches, l)
	if errno == 0 && !c.reaped {
		s.children[pid] = c
		if l.doomed {
			s.signalLocked(c, pid, syscall.SIGKILL)
		}
	}
	s.mu.Unlock()
	if leaf := l.spec.leaf; leaf != nil && list.list[0].result == notReached {
		// Somebody removed the leaf, or the kernel kills what is cloned into it (cgroupDir.renew says why).
		if errno == 0 {
			s.wait(c)
		}
		l.spec.leaf = nil
		s.cgroups.discard(leaf)
		return s.attempt(l, paths, argv)
	}
	if errno != 0 {
		return nil, failedExec{}, &launchError{"fork", errno}
	}
	failed, err := list.outcome(paths)
	if err != nil || failed.errno != 0 {
		s.wait(c)
	}
	return c, failed, err
}

// outcome reads what the child noted of its steps.
func (s *steps) outcome(paths []string) (failed failedExec, err error) {
	for _, st := range s.list {
		if st.result == notReached {
			return failedExec{}, nil // the exec that succeeded, or a child that was killed on the way
		}
		if st.result <= ^uintptr(4095) || st.mode&mayFail != 0 {
			continue
		}
		errno := syscall.Errno(-st.result)
		switch {
		case st.nr == unix.SYS_CHDIR:
			return failedExec{}, &launchError{"chdir", errno}
		case st.nr != unix.SYS_EXECVE:
			return failedExec{}, &launchError{"setting up the process", errno}
		case !goesOn(errno):
			return failedExec{paths[0], errno}, nil
		case failed.errno != syscall.EACCES: // what exists but may not be run is the better reason
			failed = failedExec{paths[0], errno}
		}
		paths = paths[1:]
	}
	return failed, nil
}

// goesOn tells whether the search in PATH goes on after a failed exec; vforkSteps has the same list.
func goesOn(errno syscall.Errno) bool {
	return errno == syscall.ENOENT || errno == syscall.EACCES || errno == syscall.ENOTDIR
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

// childSteps lists what a child does between vfork and exec.
func childSteps(spec *spawnSpec, paths, argv []string) *steps {
	s := &steps{list: make([]step, 0, 96), keep: []any{spec}}
	ptr := func(p unsafe.Pointer) uintptr { return uintptr(p) }
	// Default dispositions first. clone3 has reset what the daemon handles; what it was started with as ignored, under nohup
	// say, exec would keep.
	for sig := uintptr(1); sig <= 64; sig++ {
		if clone3Flags == 0 || ignoredAtStart>>(sig-1)&1 == 1 {
			s.add(mayFail, unix.SYS_RT_SIGACTION, sig, ptr(unsafe.Pointer(&defaultHow)), 0, 8)
		}
	}
	s.add(0, unix.SYS_SETSID)
	for fd, f := range spec.fds {
		s.add(0, unix.SYS_DUP3, uintptr(f), uintptr(fd), 0)
	}
	// A child that hangs must not hold what others wait to see closed: its copies of sockets and pipes.
	s.add(mayFail, unix.SYS_CLOSE_RANGE, 3, 1<<32-1, 0)
	if spec.terminal {
		s.add(0, unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0)
	}
	s.add(mayFail, unix.SYS_OPENAT, ^uintptr(99), ptr(unsafe.Pointer(&oomScorePath[0])), unix.O_WRONLY|unix.O_CLOEXEC)
	s.add(mayFail|onLastResult, unix.SYS_WRITE, 0, ptr(unsafe.Pointer(&oomScore[0])), uintptr(len(oomScore)))
	s.add(mayFail, unix.SYS_SETPRIORITY, unix.PRIO_PROCESS, 0, 0)
	s.add(mayFail, unix.SYS_PRLIMIT64, 0, unix.RLIMIT_NOFILE, ptr(unsafe.Pointer(&nofile)), 0)
	if os.Geteuid() == 0 {
		groups := spec.user.groups // never empty: the primary group is among them, and the spec keeps them alive
		s.add(0, unix.SYS_SETGROUPS, uintptr(len(groups)), ptr(unsafe.Pointer(&groups[0])))
		s.add(0, unix.SYS_SETRESGID, uintptr(spec.user.gid), uintptr(spec.user.gid), uintptr(spec.user.gid))
		s.add(0, unix.SYS_SETRESUID, uintptr(spec.user.uid), uintptr(spec.user.uid), uintptr(spec.user.uid))
	}
	s.add(0, unix.SYS_CHDIR, s.str(spec.dir))
	s.add(mayFail, unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, ptr(unsafe.Pointer(&noSignal)), 0, 8)
	argvPtr, envPtr := s.strs(argv), s.strs(spec.env)
	for _, path := range paths {
		s.add(searches, unix.SYS_EXECVE, s.str(path), argvPtr, envPtr)
	}
	s.list = append(s.list, step{nr: noMoreSteps})
	return s
}

// candidates are the paths to try for a command, relative to the child's directory (execvp(3)).
func candidates(cmd string, env []string) (paths []string) {
	if cmd == "" || strings.Contains(cmd, "/") {
		return []string{cmd}
	}
	for _, variable := range env {
		list, ok := strings.CutPrefix(variable, "PATH=")
		if !ok {
			continue
		}
		for dir := range strings.SplitSeq(list, ":") {
			if dir == "" {
				dir = "."
			}
			paths = append(paths, dir+"/"+cmd)
		}
	}
	return paths
}

// cloneArgs is struct clone_args of clone(2).
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// clone3Flags is CLONE_CLEAR_SIGHAND (5.5), or 0 where clone3 lacks that or CLONE_INTO_CGROUP (5.7). A kernel that knows the
// latter finds that there is no such descriptor.
var clone3Flags = func() uint64 {
	args := cloneArgs{flags: unix.CLONE_INTO_CGROUP, exitSignal: uint64(unix.SIGCHLD), cgroup: 1<<31 - 1}
	_, _, errno := syscall.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
	if errno != syscall.EBADF {
		return 0
	}
	return unix.CLONE_CLEAR_SIGHAND
}()

// ignoredAtStart has bit N-1 set if signal N was ignored when the daemon was started (proc_pid_status(5), SigIgn).
var ignoredAtStart = func() uint64 {
	status, _ := os.ReadFile("/proc/self/status")
	_, mask, _ := strings.Cut(string(status), "SigIgn:\t")
	ignored, _ := strconv.ParseUint(mask[:min(16, len(mask))], 16, 64)
	return ignored
}()

// runSteps forks a child that runs the steps and returns when it has exec'ed or exited.
func runSteps(s *steps, leaf *cgroupLeaf, pidSlot *int32) (pid int, errno syscall.Errno) {
	const flags = unix.CLONE_VM | unix.CLONE_VFORK | unix.CLONE_PARENT_SETTID
	nr, a0, a1, a2 := uintptr(unix.SYS_CLONE), uintptr(flags|unix.SIGCHLD), uintptr(0), uintptr(unsafe.Pointer(pidSlot))
	args := &cloneArgs{flags: flags | clone3Flags, parentTID: uint64(a2), exitSignal: uint64(unix.SIGCHLD)}
	if leaf != nil {
		args.flags, args.cgroup = args.flags|unix.CLONE_INTO_CGROUP, uint64(leaf.dir.fd)
	}
	if clone3Flags != 0 {
		nr, a0, a1 = unix.SYS_CLONE3, uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args)
	}
	r := vfork(nr, a0, a1, a2, &s.list[0])
	runtime.KeepAlive(s)
	runtime.KeepAlive(args)
	runtime.KeepAlive(pidSlot)
	if r > ^uintptr(4095) {
		return 0, syscall.Errno(-r)
	}
	atomic.StoreInt32(pidSlot, int32(r)) // where vfork is emulated by fork, as in qemu-user, nobody else has
	return int(r), 0
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
	r = vforkSteps(nr, a0, a1, a2, 0, 0, first)
	syscall.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&mask)), 0, 8, 0, 0)
	exitsyscall()
	return r
}

//go:noescape
func vforkSteps(nr, a0, a1, a2, a3, a4 uintptr, steps *step) (ret uintptr)

// The two ends of a blocking system call, as the runtime gives them to package syscall and, for good, to gVisor
// (go.dev/issue/67401).
//
//go:linkname entersyscall runtime.entersyscall
func entersyscall()

//go:linkname exitsyscall runtime.exitsyscall
func exitsyscall()

// signal reaches the whole tree: all of the leaf, or else the process group of a child that has not been reaped.
func (s *spawner) signal(c *child, sig syscall.Signal) error {
	if c.leaf.signal(sig) {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.signalLocked(c, -c.pid(), sig)
}

// signalLocked signals a child, or its process group, unless the pid is free again.
func (s *spawner) signalLocked(c *child, pid int, sig syscall.Signal) error {
	if c.reaped || pid == 0 {
		return os.ErrProcessDone
	}
	return syscall.Kill(pid, sig)
}
