// cgroup v2: a leaf for each started process, so that what it starts can be killed, counted and limited as a whole.
//
// Leaves lie in the groups `user` and `ptys` below the root. Making one costs far more than looking whether it is empty, so
// they are used again. A leaf in which background children are left is looked at no more until the kernel tells that it is empty:
// inotify(7) on its cgroup.events, one descriptor for all. Its files are opened when they are read. Controllers may be missing one by one; where there is no cgroup2, or the kernel cannot clone into
// it, there are no leaves and process groups serve instead. Source: Documentation/admin-guide/cgroup-v2.rst.
// Kernel: cgroup.freeze since 5.2, CLONE_INTO_CGROUP since 5.7, cgroup.kill since 5.14.

package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// leafPool is how many empty leaves of a group are kept.
const leafPool = 16

var cgroupNames = []string{"user", "ptys"}

// cgroups makes leaves. The nil *cgroups makes none.
type cgroups struct {
	root string
	own  bool // the root was made by this daemon and goes with it

	mu      sync.Mutex // protects what follows, and every leaf
	next    int
	idle    map[string][]*cgroupLeaf // by group
	filled  map[int]*cgroupLeaf      // released while background children were in them, by their inotify watch
	askable []*cgroupLeaf            // the same, where no watch was to be had
	notices int                      // inotify descriptor, or -1
	thawed  chan struct{}            // closed by the thaw; nil while the groups are not frozen
}

// cgroupLeaf is one process's use of a leaf.
type cgroupLeaf struct {
	groups    *cgroups
	group     string
	path      string
	dir       int    // for CLONE_INTO_CGROUP, -1 but during the start
	peak      int    // memory.peak, -1 in a leaf's first use: it is reset for one descriptor alone
	oomBefore uint64 // count of OOM kills at the start of this use
	killed    bool   // had a cgroup.kill
	left      bool   // the last process has gone, and the directory may serve another
}

// openCgroups takes a root in a cgroup2 hierarchy, or makes it there; it must be writable.
func openCgroups(root string) (*cgroups, error) {
	if !isCgroup2(root) && !isCgroup2(filepath.Dir(root)) {
		return nil, fmt.Errorf("%s is not in a cgroup2 hierarchy", root)
	}
	for _, group := range cgroupNames {
		if err := os.MkdirAll(filepath.Join(root, group), 0o755); err != nil {
			return nil, err
		}
		os.WriteFile(filepath.Join(root, group, "cgroup.freeze"), []byte("0"), 0) // an earlier daemon may have left it so
		sweep(filepath.Join(root, group, "[0-9]*"))
		for _, dir := range []string{root, filepath.Join(root, group)} {
			file := filepath.Join(dir, "cgroup.subtree_control")
			// At once, since each write waits for all CPUs; or else as far as there are any.
			for _, controllers := range []string{"+memory +cpu +io +pids", "+memory", "+cpu", "+io", "+pids"} {
				if os.WriteFile(file, []byte(controllers), 0) == nil && len(controllers) > len("+memory") {
					break
				}
			}
		}
	}
	notices, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		slog.Warn("which cgroups become empty is asked, not told", "logger", "cgroup", "error", os.NewSyscallError("inotify_init1", err))
	}
	return &cgroups{root: root, idle: map[string][]*cgroupLeaf{}, filled: map[int]*cgroupLeaf{}, notices: notices}, nil
}

// limit bounds what started processes take from the machine, as far as its kernel has the means. The agent itself stays in
// the root group, which has no limits and whose threads weigh 100 each. A group at its limit gives up its own pages first, the
// OOM killer passes over the agent (prepareProcess), and the agent's program stays in memory (keepResident), which the root group has no
// other floor for. memory.oom.group stays off, so that a shell outlives its command.
//
// processes bounds each group's processes and threads; 0 means 7/16 of what the kernel can make. A fork bomb of root, who is the
// default user, is not held by RLIMIT_NPROC; it would use up kernel.threads-max (1 for each 128 KiB of memory) or kernel.pid_max,
// and then the Go runtime, which ends the program when it gets no thread. With both groups full an eighth is left.
//
// Of memory the reserve is left for the rest.
func (g *cgroups) limit(memory uint64, processes int) {
	most := strconv.FormatUint(memory-memoryReserve(memory), 10)
	if processes == 0 {
		processes = min(sysctl("kernel/threads-max"), sysctl("kernel/pid_max")) / 16 * 7
	}
	pids := strconv.Itoa(processes)
	for group, weights := range map[string][2]string{"user": {"50", "default 10"}, "ptys": {"200", "default 50"}} {
		for file, value := range map[string]string{"cpu.weight": weights[0], "io.weight": weights[1], "pids.max": pids,
			"memory.high": most, "memory.max": most} {
			file = filepath.Join(g.root, group, file)
			if err := os.WriteFile(file, []byte(value), 0); err != nil {
				slog.Debug("no such limit here", "logger", "cgroup", "file", file, "error", err)
			}
		}
	}
}

// openOwnCgroups is for a machine that is not envd's: leaves below the cgroup that it already is in, and no limits.
func openOwnCgroups() (*cgroups, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	_, own, _ := strings.Cut("\n"+string(text), "\n0::")
	own, _, _ = strings.Cut(own, "\n")
	for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		dir := filepath.Join(mount, own)
		if !isCgroup2(dir) {
			continue
		}
		dead, _ := filepath.Glob(filepath.Join(dir, "envd-*"))
		for _, d := range dead {
			if pid, err := strconv.Atoi(filepath.Base(d)[len("envd-"):]); err == nil && syscall.Kill(pid, 0) == syscall.ESRCH {
				sweep(d)
			}
		}
		g, err := openCgroups(filepath.Join(dir, "envd-"+strconv.Itoa(os.Getpid())))
		if err == nil {
			g.own = true
		}
		return g, err
	}
	return nil, errors.New("no cgroup2 hierarchy")
}

func isCgroup2(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// sweep removes the cgroups that match, and all below them, as far as they are empty.
func sweep(pattern string) {
	matches, _ := filepath.Glob(pattern)
	for _, match := range matches {
		for _, dir := range slices.Backward(cgroupTree(match)) {
			syscall.Rmdir(dir)
		}
	}
}

// cgroupTree lists a cgroup and all below it, parents first.
func cgroupTree(root string) (dirs []string) {
	filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	return dirs
}

// acquire gives an empty leaf, or nil.
func (g *cgroups) acquire(terminal bool) *cgroupLeaf {
	if g == nil {
		return nil
	}
	group := "user"
	if terminal {
		group = "ptys"
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.collectLocked()
	for last := len(g.idle[group]) - 1; last >= 0; last-- {
		l := g.idle[group][last]
		g.idle[group] = g.idle[group][:last]
		if l.reopen() == nil {
			return l
		}
		l.remove() // somebody else may have done so
	}
	l, err := g.makeLocked(group)
	if err != nil {
		slog.Warn("no cgroup for a process", "logger", "cgroup", "error", err)
	}
	return l
}

func (g *cgroups) makeLocked(group string) (_ *cgroupLeaf, err error) {
	l := &cgroupLeaf{groups: g, group: group, dir: -1, peak: -1}
	for err = fs.ErrExist; errors.Is(err, fs.ErrExist); g.next++ { // a leaf of an earlier daemon may still be in use
		l.path = filepath.Join(g.root, group, strconv.Itoa(g.next))
		err = os.Mkdir(l.path, 0o755)
	}
	if err != nil {
		return nil, err
	}
	if l.dir, err = l.open("", unix.O_DIRECTORY|unix.O_RDONLY); err != nil {
		l.remove()
		return nil, err
	}
	return l, nil
}

// reopen makes an empty leaf ready for its next use. memory.peak can be reset since 6.12.
func (l *cgroupLeaf) reopen() (err error) {
	if l.dir, err = l.open("", unix.O_DIRECTORY|unix.O_RDONLY); err != nil {
		return err
	}
	if l.peak, err = l.open("/memory.peak", unix.O_RDWR); err == nil {
		_, err = unix.Pwrite(l.peak, []byte("0"), 0)
	} else if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	l.oomBefore = l.oomKills()
	return err
}

func (l *cgroupLeaf) open(file string, flags int) (int, error) {
	fd, err := unix.Open(l.path+file, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: l.path + file, Err: err}
	}
	return fd, nil
}

// launched says that nothing more is cloned into the leaf.
func (l *cgroupLeaf) launched() {
	if l != nil {
		closeOnce(&l.dir)
	}
}

func closeOnce(fd *int) {
	if *fd >= 0 {
		unix.Close(*fd)
	}
	*fd = -1
}

// release takes a leaf back. One that still holds processes is kept aside until it is empty.
func (g *cgroups) release(l *cgroupLeaf) {
	if l == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	closeOnce(&l.dir)
	closeOnce(&l.peak)
	if l.empty() {
		g.recycleLocked(l)
		return
	}
	watch, err := unix.InotifyAddWatch(g.notices, l.path+"/cgroup.events", unix.IN_MODIFY)
	if err != nil {
		g.askable = append(g.askable, l)
		return
	}
	g.filled[watch] = l
	g.lookLocked(watch) // it may have become empty before it was watched
}

// collectLocked takes in the leaves that have become empty. Of those that nobody tells about it asks one, in turn.
func (g *cgroups) collectLocked() {
	var buf [4096]byte
	for {
		n, _ := unix.Read(g.notices, buf[:])
		for rest := buf[:max(n, 0)]; len(rest) >= unix.SizeofInotifyEvent; rest = rest[unix.SizeofInotifyEvent:] { // no event has a name
			watch, mask := int(int32(binary.NativeEndian.Uint32(rest))), binary.NativeEndian.Uint32(rest[4:])
			if mask&unix.IN_Q_OVERFLOW == 0 {
				g.lookLocked(watch)
				continue
			}
			for watch := range g.filled {
				g.lookLocked(watch)
			}
		}
		if n <= 0 {
			break
		}
	}
	if len(g.askable) > 0 {
		first := g.askable[0]
		if g.askable = g.askable[1:]; first.empty() {
			g.recycleLocked(first)
		} else {
			g.askable = append(g.askable, first)
		}
	}
}

func (g *cgroups) lookLocked(watch int) {
	if l := g.filled[watch]; l != nil && l.empty() {
		unix.InotifyRmWatch(g.notices, uint32(watch))
		delete(g.filled, watch)
		g.recycleLocked(l)
	}
}

// recycleLocked keeps an empty leaf for its next use, or removes it. Linux 6.18 kills whatever is cloned into a cgroup that was
// ever killed: it compares the kill counts of two different cgroups.
func (g *cgroups) recycleLocked(l *cgroupLeaf) {
	l.left = true
	if len(g.idle[l.group]) >= leafPool || l.killed {
		l.remove()
		return
	}
	g.idle[l.group] = append(g.idle[l.group], &cgroupLeaf{groups: g, group: l.group, path: l.path, dir: -1, peak: -1})
}

// freeze stops every process in the groups, or lets them go on. SIGKILL reaches a frozen process.
func (g *cgroups) freeze(on bool) (err error) {
	if g == nil && !on {
		return nil
	} else if g == nil {
		return errors.New("there are no cgroups to freeze")
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, group := range cgroupNames {
		failure := os.WriteFile(filepath.Join(g.root, group, "cgroup.freeze"), []byte(map[bool]string{false: "0", true: "1"}[on]), 0)
		if on || !errors.Is(failure, fs.ErrNotExist) { // a group that somebody removed is not frozen
			err = errors.Join(err, failure)
		}
	}
	switch {
	case on && g.thawed == nil: // though it failed: it may have succeeded for one of them
		g.thawed = make(chan struct{})
	case !on && err == nil && g.thawed != nil:
		close(g.thawed)
		g.thawed = nil
	}
	return err
}

// frozenGroups counts the groups in which every process stands still.
func (g *cgroups) frozenGroups() (n int) {
	for _, group := range cgroupNames {
		if g != nil {
			if text, _ := os.ReadFile(filepath.Join(g.root, group, "cgroup.events")); strings.Contains(string(text), "frozen 1") {
				n++
			}
		}
	}
	return n
}

// frozen tells whether a freeze has not been followed by a thaw.
func (g *cgroups) frozen() bool { return g.untilThaw() != nil }

// untilThaw is closed by the thaw; it is nil while the groups are not frozen.
func (g *cgroups) untilThaw() chan struct{} {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.thawed
}

// awaitThaw returns when the groups are not frozen. A process that is started into a frozen one hangs before its exec, and
// would cost a thread.
func (g *cgroups) awaitThaw(ctx context.Context) error {
	for thawed := g.untilThaw(); thawed != nil; thawed = g.untilThaw() {
		select {
		case <-thawed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// close removes what is empty. Processes live on in the rest.
func (g *cgroups) close() {
	if g == nil {
		return
	}
	for _, group := range cgroupNames {
		sweep(filepath.Join(g.root, group, "[0-9]*"))
	}
	if g.own {
		sweep(g.root)
	}
}

func (l *cgroupLeaf) remove() {
	closeOnce(&l.dir)
	closeOnce(&l.peak)
	syscall.Rmdir(l.path)
}

// read gives what a file of the leaf holds.
func (l *cgroupLeaf) read(file string) (string, error) {
	fd, err := l.open(file, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	return readLeafFile(fd)
}

func readLeafFile(fd int) (string, error) {
	var buf [256]byte
	n, err := unix.Pread(fd, buf[:], 0)
	return string(buf[:max(n, 0)]), err
}

// empty tells whether no process is left here or below.
func (l *cgroupLeaf) empty() bool {
	text, err := l.read("/cgroup.events")
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) || err == unix.ENODEV // removed; else there may be no descriptor
	}
	return !strings.Contains(text, "populated 1")
}

// signal reaches every process of the leaf; ok is false when there is none, or no leaf. SIGKILL takes all at once, those
// that are just being forked included.
func (l *cgroupLeaf) signal(sig syscall.Signal) (ok bool) {
	if l == nil {
		return false
	}
	l.groups.mu.Lock()
	defer l.groups.mu.Unlock()
	if l.left || l.empty() {
		return false
	}
	if sig == syscall.SIGKILL && os.WriteFile(l.path+"/cgroup.kill", []byte("1"), 0) == nil {
		l.killed = true
		return true
	}
	// A pid that is free again in between is not hit: what is signalled is a pidfd whose pid is in the leaf after it was opened.
	for some := range slices.Chunk(l.pids(), 1024) {
		fds := map[int]int{}
		for _, pid := range some {
			if fd, err := unix.PidfdOpen(pid, 0); err == nil {
				fds[pid] = fd
			}
		}
		for _, pid := range l.pids() {
			if fd, opened := fds[pid]; opened && unix.PidfdSendSignal(fd, sig, nil, 0) == nil {
				ok = true
			}
		}
		for _, fd := range fds {
			unix.Close(fd)
		}
	}
	return ok // not where there is no descriptor
}

func (l *cgroupLeaf) pids() (pids []int) {
	for _, dir := range cgroupTree(l.path) {
		text, _ := os.ReadFile(dir + "/cgroup.procs")
		for field := range strings.FieldsSeq(string(text)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// killTracer kills the process that traces pid, if it is one of the leaf: then it is part of what has been started.
func (l *cgroupLeaf) killTracer(pid, tracer int) {
	if l == nil {
		return
	}
	process := statusNumber(tracer, "Tgid") // a tracer is a thread
	fd, err := unix.PidfdOpen(process, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if slices.Contains(l.pids(), process) && statusNumber(pid, "TracerPid") == tracer {
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

// statusNumber reads a field of /proc/PID/status; 0 if there is none.
func statusNumber(pid int, field string) (n int) {
	text, _ := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	_, value, _ := strings.Cut(string(text), "\n"+field+":")
	fmt.Sscan(value, &n)
	return n
}

// memory tells, of a leaf that has not been released, whether the OOM killer struck in it, and the most bytes that it held
// at once; 0 where the kernel does not count.
func (l *cgroupLeaf) memory() (oomKilled bool, peak uint64) {
	if l == nil {
		return false, 0
	}
	var text string
	if l.peak >= 0 {
		text, _ = readLeafFile(l.peak)
	} else {
		text, _ = l.read("/memory.peak")
	}
	peak, _ = strconv.ParseUint(strings.TrimSpace(text), 10, 64)
	return l.oomKills() > l.oomBefore, peak
}

// oomKills is a counter that never goes back.
func (l *cgroupLeaf) oomKills() uint64 {
	text, _ := l.read("/memory.events")
	_, count, _ := strings.Cut(text, "oom_kill ")
	count, _, _ = strings.Cut(count, "\n")
	n, _ := strconv.ParseUint(count, 10, 64)
	return n
}
