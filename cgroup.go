// cgroup v2: a leaf for each started process, so that what it starts can be killed, counted and limited as a whole.
//
// Leaves lie in groups (`user`, `ptys`) below the root and are used again: making one costs far more than looking whether
// it is empty. Controllers may be missing one by one; without cgroup2 there are no leaves at all and process groups serve
// instead. Source: Documentation/admin-guide/cgroup-v2.rst. Kernel: cgroup.kill since 5.14, CLONE_INTO_CGROUP since 5.7.

package main

import (
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
	"unsafe"

	"golang.org/x/sys/unix"
)

const leafPool = 16

// cgroups makes leaves. The nil *cgroups makes none.
type cgroups struct {
	root      string
	cloneInto bool // the kernel has CLONE_INTO_CGROUP
	removable bool // the root is envd's own and goes with it

	mu     sync.Mutex // protects what follows
	next   int
	idle   map[string][]*cgroupLeaf // by group
	filled []*cgroupLeaf            // released while background children were in them
}

type cgroupLeaf struct {
	group, path string
	dir         int // descriptor, for CLONE_INTO_CGROUP
	procs       int // cgroup.procs, for kernels without it
	events      int // cgroup.events
	cloneInto   bool
	oomBefore   uint64
	peak        int // memory.peak, -1 without the memory controller
}

// openCgroups takes a root in a cgroup2 hierarchy, or makes it there; it must be writable.
func openCgroups(root string, removable bool) (*cgroups, error) {
	var st unix.Statfs_t
	if unix.Statfs(filepath.Dir(root), &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		os.Mkdir(root, 0o755)
	}
	if err := unix.Statfs(root, &st); err != nil {
		return nil, &os.PathError{Op: "statfs", Path: root, Err: err}
	}
	if st.Type != unix.CGROUP2_SUPER_MAGIC {
		return nil, fmt.Errorf("%s is not a cgroup2 hierarchy", root)
	}
	g := &cgroups{root: root, removable: removable, cloneInto: hasCloneInto(), idle: map[string][]*cgroupLeaf{}}
	for _, group := range []string{"user", "ptys"} {
		dir := filepath.Join(root, group)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		// Leaves of an earlier daemon that have emptied since; rmdir leaves the others alone.
		stale, _ := filepath.Glob(filepath.Join(dir, "[0-9]*"))
		for _, leaf := range stale {
			syscall.Rmdir(leaf)
		}
	}
	return g, nil
}

// openOwnCgroups is for a machine that is not envd's: leaves below the cgroup that it already is in, and no limits.
func openOwnCgroups() (*cgroups, error) {
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	var own string
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			own = path
		}
	}
	for _, mount := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		dir := filepath.Join(mount, own)
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		sweepOwn(dir)
		root := filepath.Join(dir, "envd-"+strconv.Itoa(os.Getpid()))
		if err := os.Mkdir(root, 0o755); err != nil {
			return nil, err
		}
		return openCgroups(root, true)
	}
	return nil, errors.New("no cgroup2 hierarchy")
}

// sweepOwn removes what daemons that are gone left behind, as far as it is empty.
func sweepOwn(dir string) {
	dirs, _ := filepath.Glob(filepath.Join(dir, "envd-*"))
	for _, d := range dirs {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(d), "envd-"))
		if err == nil && syscall.Kill(pid, 0) == syscall.ESRCH {
			removeTree(d)
		}
	}
}

// removeTree removes the empty cgroups of a tree, the deepest first.
func removeTree(root string) {
	dirs := cgroupTree(root)
	slices.Reverse(dirs)
	for _, dir := range dirs {
		syscall.Rmdir(dir)
	}
}

func cgroupTree(root string) (dirs []string) {
	filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	return dirs
}

// cloneArgs is struct clone_args of clone(2).
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// hasCloneInto asks clone3 for a cgroup that cannot be: a kernel that knows the flag says EBADF.
func hasCloneInto() bool {
	args := cloneArgs{flags: unix.CLONE_INTO_CGROUP, exitSignal: uint64(unix.SIGCHLD), cgroup: 1<<31 - 1}
	_, _, errno := syscall.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&args)), unsafe.Sizeof(args), 0)
	return errno == syscall.EBADF
}

// acquire gives an empty leaf in the group, or nil.
func (g *cgroups) acquire(group string) *cgroupLeaf {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.retryLocked()
	if idle := g.idle[group]; len(idle) > 0 {
		leaf := idle[len(idle)-1]
		g.idle[group] = idle[:len(idle)-1]
		return leaf
	}
	leaf, err := g.makeLocked(group)
	if err != nil {
		slog.Warn("no cgroup for a process", "logger", "cgroup", "error", err)
		return nil
	}
	return leaf
}

func (g *cgroups) makeLocked(group string) (_ *cgroupLeaf, err error) {
	l := &cgroupLeaf{group: group, cloneInto: g.cloneInto, dir: -1, procs: -1, events: -1, peak: -1}
	for {
		g.next++
		l.path = filepath.Join(g.root, group, strconv.Itoa(g.next))
		if err = os.Mkdir(l.path, 0o755); !errors.Is(err, fs.ErrExist) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			l.remove()
		}
	}()
	open := func(name string, flags int) (fd int) {
		if err == nil {
			fd, err = unix.Open(filepath.Join(l.path, name), flags|unix.O_CLOEXEC, 0)
		}
		return fd
	}
	l.dir = open("", unix.O_DIRECTORY|unix.O_RDONLY)
	l.events = open("cgroup.events", unix.O_RDONLY)
	if !g.cloneInto {
		l.procs = open("cgroup.procs", unix.O_WRONLY)
	}
	if fd, peakErr := unix.Open(filepath.Join(l.path, "memory.peak"), unix.O_RDWR|unix.O_CLOEXEC, 0); peakErr == nil {
		l.peak = fd
	}
	return l, err
}

// release takes a leaf back. One that still holds processes is kept aside until it is empty.
func (g *cgroups) release(l *cgroupLeaf) {
	if l == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.filled = append(g.filled, l)
	g.retryLocked()
}

func (g *cgroups) retryLocked() {
	g.filled = slices.DeleteFunc(g.filled, func(l *cgroupLeaf) bool {
		if !l.empty() {
			return false
		}
		if len(g.idle[l.group]) < leafPool && l.renew() {
			g.idle[l.group] = append(g.idle[l.group], l)
		} else {
			l.remove()
		}
		return true
	})
}

// close removes what is empty. Processes live on in the rest.
func (g *cgroups) close() {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.retryLocked()
	for _, idle := range g.idle {
		for _, l := range idle {
			l.remove()
		}
	}
	g.idle = nil
	if g.removable {
		removeTree(g.root)
	}
}

func (l *cgroupLeaf) remove() {
	for _, fd := range []int{l.dir, l.events, l.procs, l.peak} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	syscall.Rmdir(l.path)
}

// renew prepares an empty leaf for its next process. memory.peak can be reset since 6.12.
func (l *cgroupLeaf) renew() bool {
	l.oomBefore = l.oomKills()
	if l.peak >= 0 {
		if _, err := unix.Pwrite(l.peak, []byte("0"), 0); err != nil {
			return false
		}
	}
	return true
}

// empty tells whether no process is left in the leaf or below it.
func (l *cgroupLeaf) empty() bool {
	var buf [64]byte
	n, err := unix.Pread(l.events, buf[:], 0)
	return err != nil || strings.Contains(string(buf[:max(n, 0)]), "populated 0")
}

// kill sends SIGKILL to all processes of the leaf at once, those that are being forked included.
func (l *cgroupLeaf) kill() error {
	err := os.WriteFile(filepath.Join(l.path, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return l.signal(syscall.SIGKILL)
	}
	return err
}

// signal reaches each process of the leaf. A pid that was free again in between is not hit: what is signalled is a pidfd
// whose pid was in the leaf also after it had been opened.
func (l *cgroupLeaf) signal(sig syscall.Signal) error {
	fds := map[int]int{}
	for _, pid := range l.pids() {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			fds[pid] = fd
			defer unix.Close(fd)
		}
	}
	for _, pid := range l.pids() {
		if fd, ok := fds[pid]; ok {
			unix.PidfdSendSignal(fd, sig, nil, 0)
		}
	}
	return nil
}

func (l *cgroupLeaf) pids() (pids []int) {
	for _, dir := range cgroupTree(l.path) {
		text, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		for field := range strings.FieldsSeq(string(text)) {
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// oomKills counts the processes of the leaf that the OOM killer took. The counter never goes back.
func (l *cgroupLeaf) oomKills() uint64 {
	text, _ := os.ReadFile(filepath.Join(l.path, "memory.events"))
	for line := range strings.Lines(string(text)) {
		if count, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(count), 10, 64)
			return n
		}
	}
	return 0
}

func (l *cgroupLeaf) oomKilled() bool { return l.oomKills() > l.oomBefore }

// peakMemory is the most bytes that the leaf held at once, 0 where the kernel does not tell.
func (l *cgroupLeaf) peakMemory() uint64 {
	if l.peak < 0 {
		return 0
	}
	var buf [32]byte
	n, err := unix.Pread(l.peak, buf[:], 0)
	if err != nil {
		return 0
	}
	peak, _ := strconv.ParseUint(strings.TrimSpace(string(buf[:n])), 10, 64)
	return peak
}
