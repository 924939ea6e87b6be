// cgroup v2: a leaf for each started process, so that what it starts can be killed, counted and limited as a whole.
//
// Leaves lie in the groups `user` and `ptys` below the root. Making one costs far more than looking whether it is empty, so
// they are used again. Controllers may be missing one by one; where there is no cgroup2, or the kernel cannot clone into
// it, there are no leaves and process groups serve instead. Source: Documentation/admin-guide/cgroup-v2.rst.
// Kernel: CLONE_INTO_CGROUP since 5.7, cgroup.kill since 5.14.

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

	"golang.org/x/sys/unix"
)

// leafPool is how many empty leaves of a group are kept.
const leafPool = 16

// cgroups makes leaves. The nil *cgroups makes none.
type cgroups struct {
	root string
	own  bool // the root was made by this daemon and goes with it

	mu     sync.Mutex // protects what follows, and every leaf
	next   int
	idle   map[string][]*cgroupDir // by group
	filled []*cgroupLeaf           // released while background children were in them
}

// cgroupDir is a leaf's directory.
type cgroupDir struct {
	path      string
	fd        int    // for CLONE_INTO_CGROUP
	events    int    // cgroup.events
	peak      int    // memory.peak, -1 without the memory controller
	oomBefore uint64 // count of OOM kills at the start of its present use
	killed    bool   // had a cgroup.kill
}

// cgroupLeaf is one process's use of a directory.
type cgroupLeaf struct {
	groups *cgroups
	group  string
	dir    *cgroupDir // nil once the last process has gone and the directory serves another
}

// openCgroups takes a root in a cgroup2 hierarchy, or makes it there; it must be writable.
func openCgroups(root string) (*cgroups, error) {
	if isCgroup2(filepath.Dir(root)) {
		os.Mkdir(root, 0o755)
	}
	if !isCgroup2(root) {
		return nil, fmt.Errorf("%s is not in a cgroup2 hierarchy", root)
	}
	for _, group := range []string{"user", "ptys"} {
		if err := os.MkdirAll(filepath.Join(root, group), 0o755); err != nil {
			return nil, err
		}
		sweep(filepath.Join(root, group, "[0-9]*"))
	}
	return &cgroups{root: root, idle: map[string][]*cgroupDir{}}, nil
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

// acquire gives an empty leaf in the group, or nil.
func (g *cgroups) acquire(group string) *cgroupLeaf {
	if g == nil {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.recycleLocked()
	if idle := g.idle[group]; len(idle) > 0 {
		g.idle[group] = idle[:len(idle)-1]
		return &cgroupLeaf{groups: g, group: group, dir: idle[len(idle)-1]}
	}
	dir, err := g.makeLocked(group)
	if err != nil {
		slog.Warn("no cgroup for a process", "logger", "cgroup", "error", err)
		return nil
	}
	return &cgroupLeaf{groups: g, group: group, dir: dir}
}

func (g *cgroups) makeLocked(group string) (_ *cgroupDir, err error) {
	d := &cgroupDir{fd: -1, events: -1}
	for err = fs.ErrExist; errors.Is(err, fs.ErrExist); g.next++ { // a leaf of an earlier daemon may still be in use
		d.path = filepath.Join(g.root, group, strconv.Itoa(g.next))
		err = os.Mkdir(d.path, 0o755)
	}
	if err != nil {
		return nil, err
	}
	if d.fd, err = unix.Open(d.path, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		d.events, err = unix.Open(d.path+"/cgroup.events", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	d.peak, _ = unix.Open(d.path+"/memory.peak", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		d.remove()
	}
	return d, err
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

func (g *cgroups) recycleLocked() {
	g.filled = slices.DeleteFunc(g.filled, func(l *cgroupLeaf) bool {
		if !l.dir.empty() {
			return false
		}
		if len(g.idle[l.group]) < leafPool && l.dir.renew() {
			g.idle[l.group] = append(g.idle[l.group], l.dir)
		} else {
			l.dir.remove()
		}
		l.dir = nil
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
	g.recycleLocked()
	for _, idle := range g.idle {
		for _, d := range idle {
			d.remove()
		}
	}
	g.idle = map[string][]*cgroupDir{}
	if g.own {
		sweep(g.root)
	}
}

func (d *cgroupDir) remove() {
	for _, fd := range []int{d.fd, d.events, d.peak} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	syscall.Rmdir(d.path)
}

// renew prepares an empty directory for its next use, if it can have one. memory.peak can be reset since 6.12. Linux 6.18
// kills whatever is cloned into a cgroup that was ever killed: it compares the kill counts of two different cgroups.
func (d *cgroupDir) renew() bool {
	d.oomBefore = d.oomKills()
	if d.peak >= 0 {
		if _, err := unix.Pwrite(d.peak, []byte("0"), 0); err != nil {
			return false
		}
	}
	return !d.killed
}

// empty tells whether no process is left here or below.
func (d *cgroupDir) empty() bool {
	var buf [64]byte
	n, err := unix.Pread(d.events, buf[:], 0)
	return err != nil || strings.Contains(string(buf[:max(n, 0)]), "populated 0")
}

// signal reaches every process of the leaf; ok is false when there is none, or no leaf. SIGKILL takes all at once, those
// that are just being forked included.
func (l *cgroupLeaf) signal(sig syscall.Signal) (ok bool) {
	if l == nil {
		return false
	}
	l.groups.mu.Lock()
	defer l.groups.mu.Unlock()
	d := l.dir
	if d == nil || d.empty() {
		return false
	}
	if sig == syscall.SIGKILL && os.WriteFile(d.path+"/cgroup.kill", []byte("1"), 0) == nil {
		d.killed = true
		return true
	}
	// A pid that is free again in between is not hit: what is signalled is a pidfd whose pid is in the leaf after it was opened.
	fds := map[int]int{}
	for _, pid := range d.pids() {
		if fd, err := unix.PidfdOpen(pid, 0); err == nil {
			fds[pid] = fd
			defer unix.Close(fd)
		}
	}
	for _, pid := range d.pids() {
		if fd, opened := fds[pid]; opened {
			unix.PidfdSendSignal(fd, sig, nil, 0)
		}
	}
	return true
}

func (d *cgroupDir) pids() (pids []int) {
	for _, dir := range cgroupTree(d.path) {
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
	if l == nil || l.dir.peak < 0 {
		return false, 0
	}
	var buf [32]byte
	n, _ := unix.Pread(l.dir.peak, buf[:], 0)
	peak, _ = strconv.ParseUint(strings.TrimSpace(string(buf[:max(n, 0)])), 10, 64)
	return l.dir.oomKills() > l.dir.oomBefore, peak
}

// oomKills is a counter that never goes back.
func (d *cgroupDir) oomKills() uint64 {
	if d.peak < 0 {
		return 0
	}
	text, _ := os.ReadFile(d.path + "/memory.events")
	_, count, _ := strings.Cut(string(text), "oom_kill ")
	count, _, _ = strings.Cut(count, "\n")
	n, _ := strconv.ParseUint(count, 10, 64)
	return n
}
