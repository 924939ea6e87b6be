// cgroup v2: a leaf for each started process, so that what it starts can be killed, counted and limited as a whole.
//
// Leaves lie in the groups `user` and `ptys` below the root. Making one costs far more than looking whether it is empty, so
// they are used again. Controllers may be missing one by one; where there is no cgroup2, or the kernel cannot clone into
// it, there are no leaves and process groups serve instead. Source: Documentation/admin-guide/cgroup-v2.rst.
// Kernel: cgroup.freeze since 5.2, CLONE_INTO_CGROUP since 5.7, cgroup.kill since 5.14.

package main

import (
	"context"
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

	mu     sync.Mutex // protects what follows, and every leaf
	next   int
	idle   map[string][]*cgroupLeaf // by group
	filled []*cgroupLeaf            // released while background children were in them
	thawed chan struct{}            // closed by the thaw; nil while the groups are not frozen
}

// cgroupLeaf is one process's use of a leaf.
type cgroupLeaf struct {
	groups    *cgroups
	group     string
	path      string
	fd        int    // for CLONE_INTO_CGROUP
	events    int    // cgroup.events
	memEvents int    // memory.events, -1 without the memory controller
	memPeak   int    // memory.peak
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
	return &cgroups{root: root, idle: map[string][]*cgroupLeaf{}}, nil
}

// limit bounds what started processes take from the machine, as far as its kernel has the means. The agent itself stays in
// the root group, which has no limits and whose threads weigh 100 each. No floor under its memory is needed there: a group at
// its limit gives up its own pages, and the OOM killer passes over the agent (prepareProcess). memory.oom.group stays off, so
// that a shell outlives its command.
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
	g.recycleLocked()
	if last := len(g.idle[group]) - 1; last >= 0 {
		l := g.idle[group][last]
		g.idle[group] = g.idle[group][:last]
		return l
	}
	l, err := g.makeLocked(group)
	if err != nil {
		slog.Warn("no cgroup for a process", "logger", "cgroup", "error", err)
	}
	return l
}

func (g *cgroups) makeLocked(group string) (_ *cgroupLeaf, err error) {
	l := &cgroupLeaf{groups: g, group: group}
	for err = fs.ErrExist; errors.Is(err, fs.ErrExist); g.next++ { // a leaf of an earlier daemon may still be in use
		l.path = filepath.Join(g.root, group, strconv.Itoa(g.next))
		err = os.Mkdir(l.path, 0o755)
	}
	if err != nil {
		return nil, err
	}
	var failure error
	l.fd, err = unix.Open(l.path, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	l.events, failure = unix.Open(l.path+"/cgroup.events", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	l.memPeak, _ = unix.Open(l.path+"/memory.peak", unix.O_RDWR|unix.O_CLOEXEC, 0)
	err = errors.Join(err, failure)
	if l.memEvents, failure = unix.Open(l.path+"/memory.events", unix.O_RDONLY|unix.O_CLOEXEC, 0); failure != unix.ENOENT {
		err = errors.Join(err, failure)
	}
	if err != nil {
		l.remove()
		return nil, err
	}
	return l, nil
}

// release takes a leaf back. One that still holds processes is kept aside until it is empty.
func (g *cgroups) release(l *cgroupLeaf) {
	if l == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.filled = append(g.filled, l)
	g.recycleLocked()
}

// recycleLocked makes empty directories ready for their next use. memory.peak can be reset since 6.12. Linux 6.18 kills
// whatever is cloned into a cgroup that was ever killed: it compares the kill counts of two different cgroups.
func (g *cgroups) recycleLocked() {
	g.filled = slices.DeleteFunc(g.filled, func(l *cgroupLeaf) bool {
		if !l.empty() {
			return false
		}
		l.left = true
		reusable := len(g.idle[l.group]) < leafPool && !l.killed
		if reusable && l.memPeak >= 0 {
			_, err := unix.Pwrite(l.memPeak, []byte("0"), 0)
			reusable = err == nil
		}
		if !reusable {
			l.remove()
			return true
		}
		next := *l
		next.left, next.oomBefore = false, l.oomKills()
		g.idle[l.group] = append(g.idle[l.group], &next)
		return true
	})
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
	for _, fd := range []int{l.fd, l.events, l.memEvents, l.memPeak} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	syscall.Rmdir(l.path)
}

// readLeafFile gives "" for what is not there, or no more.
func readLeafFile(fd int) string {
	var buf [256]byte
	n, _ := unix.Pread(fd, buf[:], 0)
	return string(buf[:max(n, 0)])
}

// empty tells whether no process is left here or below.
func (l *cgroupLeaf) empty() bool { return !strings.Contains(readLeafFile(l.events), "populated 1") }

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

// memory tells, of a leaf that has not been released, whether the OOM killer struck in it, and the most bytes that it held
// at once; 0 where the kernel does not count.
func (l *cgroupLeaf) memory() (oomKilled bool, peak uint64) {
	if l == nil {
		return false, 0
	}
	peak, _ = strconv.ParseUint(strings.TrimSpace(readLeafFile(l.memPeak)), 10, 64)
	return l.oomKills() > l.oomBefore, peak
}

// oomKills is a counter that never goes back.
func (l *cgroupLeaf) oomKills() uint64 {
	_, count, _ := strings.Cut(readLeafFile(l.memEvents), "oom_kill ")
	count, _, _ = strings.Cut(count, "\n")
	n, _ := strconv.ParseUint(count, 10, 64)
	return n
}
