// Paths as clients name them, and the way there. What is written, created, removed or replaced is reached by a walk on
// descriptors, one component after the other (O_PATH|O_NOFOLLOW), which follows links itself.
//
// A link confers only its owner's power. The daemon works as root, the guest's users make links: from the first link on
// that root does not own, the rest of the walk and what is done at its end run with the filesystem credentials of the
// link's owner (setfsuid(2), setfsgid(2) and groups, all of one thread, which is thrown away), so that the kernel decides.
// A `..` out of a directory counts as a link of that directory's owner, who can have moved it; a FUSE file system is all of
// who mounted it. A hard link that another one can have made is refused. Reading follows links as every program does. Linux 3.12.

package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"
	"unsafe"

	"golang.org/x/sys/unix"
)

var (
	errUserSpecificHome = errors.New("cannot expand user-specific home dir")
	errNUL              = errors.New("a NUL byte in it")
	errLeased           = fmt.Errorf("another program has a lease on it: %w", unix.EAGAIN)
	errFilesHang        = errors.New("too many requests wait for file systems that do not answer")
	errKernelFile       = fmt.Errorf("a link of another user's leads to the kernel's: %w", unix.EACCES)
)

const patience = 2 * time.Second // of what another program, or a file system, keeps waiting

// inTime waits for what a file system can make hang, but not for ever.
func inTime(step string, patience time.Duration, do func()) {
	done := make(chan struct{})
	go func() {
		do()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(patience):
		slog.Warn("a file system does not answer", "logger", "init", "step", step)
	}
}

// atFiles are the requests whose system calls on files can hang, each with a thread, a listing with two.
var atFiles = make(chan struct{}, 256)

// turn is one request's place among them, which it has but while its client is waited for.
type turn struct {
	ctx   context.Context
	taken bool
}

func (t *turn) take(patience time.Duration) error {
	if t.taken = t.taken || enter(atFiles, t.ctx.Done(), patience); !t.taken {
		return cmp.Or(t.ctx.Err(), errFilesHang)
	}
	return nil
}

// enter takes one of the places that a channel has, unless none gets free in time.
func enter(places chan struct{}, gone <-chan struct{}, patience time.Duration) bool {
	select {
	case places <- struct{}{}:
		return true
	default:
	}
	select {
	case places <- struct{}{}:
		return true
	case <-gone:
	case <-time.After(patience):
	}
	return false
}

func (t *turn) giveUp() {
	if t.taken {
		t.taken = false
		<-atFiles
	}
}

// transfer gives the place up until end is called, or the client has left and only a call that hangs remains.
func (t *turn) transfer() (end func()) {
	t.giveUp()
	ended := make(chan struct{})
	stop := context.AfterFunc(t.ctx, func() {
		select {
		case atFiles <- struct{}{}:
			<-ended
			<-atFiles
		case <-ended:
		}
	})
	return func() {
		stop()
		close(ended)
	}
}

// fileID is what a file is known by while somebody has it open, whatever its names.
type fileID struct{ device, inode uint64 }

func idOf(st *unix.Stat_t) fileID { return fileID{uint64(st.Dev), st.Ino} }

// fileLocks keep apart those who write to one file, or make directories in one.
type fileLocks struct {
	mu    sync.Mutex // protects what follows
	users map[fileID]*fileLock
}

type fileLock struct {
	held  chan struct{} // of one place
	users int           // who have it or wait for it
}

// lock waits for a file's lock, but not for ever.
func (l *fileLocks) lock(id fileID, patience time.Duration) (unlock func(), ok bool) {
	l.mu.Lock()
	lock := l.users[id]
	if lock == nil {
		lock = &fileLock{held: make(chan struct{}, 1)}
		l.users[id] = lock
	}
	lock.users++
	l.mu.Unlock()
	leave := func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if lock.users--; lock.users == 0 {
			delete(l.users, id)
		}
	}
	if !enter(lock.held, nil, patience) {
		leave()
		return nil, false
	}
	return func() { <-lock.held; leave() }, true
}

var locks = &fileLocks{users: map[fileID]*fileLock{}}

// accessList is the attribute that says who else may do what with a file. A new one has it from its directory's default.
const accessList = "system.posix_acl_access"

// resolvePath turns a client's path into an absolute one. An empty path means the default working directory; `~` the
// home; an absolute path stays exactly as it was sent; a relative one starts at the home and may climb out of it.
func resolvePath(path, home, defaultWorkdir string) (string, error) {
	if path == "" {
		path = defaultWorkdir
	}
	switch {
	case strings.IndexByte(path, 0) >= 0:
		return "", errNUL
	case strings.HasPrefix(path, "~"):
		rest := path[1:]
		if rest != "" && rest[0] != '/' && rest[0] != '\\' {
			return "", errUserSpecificHome
		}
		path = filepath.Join(home, rest)
	case !filepath.IsAbs(path):
		path = filepath.Join("/", home, path)
	}
	if len(path) >= unix.PathMax {
		return "", unix.ENAMETOOLONG
	}
	return path, nil
}

// A tree deeper than this is neither made nor removed nor watched nor packed: each level holds a descriptor.
const maxDepth = 1000

// fileInWay is the path of a file where a directory is needed.
type fileInWay string

func (e fileInWay) Error() string { return "path is a file: " + string(e) }
func (e fileInWay) Unwrap() error { return syscall.ENOTDIR }

// place is where a path leads: a name in an open directory.
type place struct {
	dir  int    // O_PATH descriptor
	name string // "" when the path leads to the directory itself
	path string // links resolved as far as they were followed
	as   *account
	dirs unix.Stat_t // of the directory
	made bool        // the directory, by this walk
	st   unix.Stat_t // of what has the name; all zero when nothing has
}

func (p *place) close()       { unix.Close(p.dir) }
func (p *place) exists() bool { return p.st.Mode != 0 }
func (p *place) kind() uint32 { return p.st.Mode & unix.S_IFMT }

// do runs f, a few system calls, with the power that the way here left.
func (p *place) do(f func() error) error {
	if p.as == nil {
		return f()
	}
	return actAs(p.as, f)
}

// hidden is a new name in the same directory.
func (p *place) hidden() *place {
	return &place{dir: p.dir, name: ".envd-" + rand.Text(), path: p.path, as: p.as}
}

func (p *place) unlink() error {
	return p.do(func() error { return unix.Unlinkat(p.dir, p.name, 0) })
}

// retry calls again what a signal interrupted; the runtime sends itself some.
func retry(f func() error) (err error) {
	for err = unix.EINTR; err == unix.EINTR; {
		err = f()
	}
	return err
}

// openAt opens without waiting for anything, whatever has the name by now.
func openAt(dir int, name string, flags int, mode uint32) (fd int, err error) {
	err = retry(func() (err error) {
		fd, err = unix.Openat(dir, name, flags|unix.O_NONBLOCK|unix.O_CLOEXEC, mode)
		return err
	})
	return fd, err
}

// unleased opens again what another program has a lease on, which the kernel is taking back, after 45 s by force.
func unleased(patience time.Duration, gone <-chan struct{}, open func() error) error {
	for end := time.Now().Add(patience); ; {
		if err := open(); !errors.Is(err, unix.EAGAIN) {
			return err
		}
		select {
		case <-gone:
			return errLeased
		case <-time.After(20 * time.Millisecond):
			if time.Now().After(end) {
				return errLeased
			}
		}
	}
}

// shared says that others than its owner can make names in a directory.
func shared(dirs *unix.Stat_t) bool { return dirs.Mode&0o022 != 0 }

// mayBeForeign says that another one than the owner can have made a name: where others may write, or in a directory of
// somebody else's. Directories have one name.
func mayBeForeign(dirs, st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT != unix.S_IFDIR && (shared(dirs) || dirs.Uid != 0 && st.Uid != dirs.Uid)
}

// foreign says that such a name is a hard link.
func foreign(dirs, st *unix.Stat_t) bool { return st.Nlink > 1 && mayBeForeign(dirs, st) }

// refuseForeign does so with what was opened by a name before st was taken. Who made a hard link can take it away right after
// it was opened, and the count is that of an honest file: so the very name that was opened must still be there, which the
// kernel says of what is open (proc_pid_fd(5)). unlink(2) lowers the count first and marks the name then, with the directory
// locked, which getdents(2) waits for.
func refuseForeign(fd, dir int, name string, dirs, st *unix.Stat_t) error {
	if !mayBeForeign(dirs, st) {
		return nil
	} else if st.Nlink > 1 || strings.HasSuffix(name, " (deleted)") { // which the kernel adds to a name that has gone
		return unix.EPERM
	}
	list, err := unix.Openat(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	unix.Getdents(list, make([]byte, 512)) // whatever it finds
	unix.Close(list)
	below, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(dir))
	if err != nil {
		return err
	}
	if now, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd)); err != nil {
		return err
	} else if now != filepath.Join(below, name) {
		return unix.EPERM
	}
	return nil
}

// kernels are the file systems in which the kernel shows itself, and asks for other rights than those that actAs gives up.
var kernels = []int64{unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC,
	unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, configfsMagic, unix.BPF_FS_MAGIC, unix.PSTOREFS_MAGIC,
	unix.EFIVARFS_MAGIC, fusectlMagic, unix.BINFMTFS_MAGIC, unix.RDTGROUP_SUPER_MAGIC, unix.NSFS_MAGIC, unix.SELINUX_MAGIC,
	unix.SMACK_MAGIC, unix.AAFS_MAGIC, unix.XENFS_SUPER_MAGIC}

const configfsMagic, fusectlMagic = 0x62656570, 0x65735543

// isKernels tells it of what is open; of what does not tell, yes.
func isKernels(fd int) bool {
	var fs unix.Statfs_t
	return unix.Fstatfs(fd, &fs) != nil || slices.Contains(kernels, int64(fs.Type))
}

// openFd opens what has the name, without following a link and without waiting for anything; st is of what was opened then.
// What was there before is a regular file still, and not another owner's by way of a hard link.
func (p *place) openFd(flags int, mode uint32) (fd int, err error) {
	err = unleased(patience, nil, func() error {
		return p.do(func() (err error) {
			fd, err = openAt(p.dir, p.name, flags|unix.O_NOFOLLOW, mode)
			return err
		})
	})
	if err == nil {
		existed := p.exists()
		err = unix.Fstat(fd, &p.st)
		if err == nil && existed && p.kind() != unix.S_IFREG {
			err = unix.EPERM
		} else if err == nil && existed && p.as == nil {
			err = refuseForeign(fd, p.dir, p.name, &p.dirs, &p.st)
		} else if err == nil && p.as != nil && isKernels(fd) { // mounted over a file
			err = errKernelFile
		}
		if err != nil {
			unix.Close(fd)
			if flags&unix.O_EXCL != 0 {
				p.unlink()
			}
		}
	}
	if err != nil {
		err = &os.PathError{Op: "open", Path: p.path, Err: err}
	}
	return fd, err
}

// openIn opens what has a name in a directory, without following a link.
func openIn(dir int, name, path string, flags int) (*os.File, error) {
	fd, err := openAt(dir, name, flags|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (p *place) open(flags int, mode uint32) (*os.File, error) {
	fd, err := p.openFd(flags, mode)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), p.path), nil
}

// actAs runs f with the filesystem credentials of an account, or, for nil, the daemon's own.
func actAs(who *account, f func() error) error {
	done := make(chan error, 1)
	go func() {
		if who != nil {
			runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
			groups := append(who.groups[:len(who.groups):len(who.groups)], who.gid)
			_, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(&groups[0])), 0)
			unix.SetfsgidRetGid(int(who.gid))
			unix.SetfsuidRetUid(int(who.uid))
			// What is left are capabilities that are not about files, and still let a file of /proc be read.
			err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &new([2]unix.CapUserData)[0])
			gid, _ := unix.SetfsgidRetGid(-1)
			uid, _ := unix.SetfsuidRetUid(-1)
			if errno != 0 || err != nil || uid != int(who.uid) || gid != int(who.gid) {
				done <- os.NewSyscallError("setfsuid", syscall.EPERM)
				return
			}
		}
		done <- f()
	}()
	return <-done
}

// walk is a way on descriptors.
type walk struct {
	place
	users   *userDB
	mkdirs  *account // missing directories are made, and made this account's
	follow  bool     // a link in the last place, too
	noLinks bool     // no link at all
	rest    []string // what is still to go
	linked  int      // how many of them come from links
	links   int      // followed so far
}

// walkPath walks an absolute path. A path that ends in a slash leads to a directory itself, name "".
func walkPath(w walk, path string) (*place, error) {
	w.path = "/"
	return w.begin(unix.AT_FDCWD, "/", path)
}

// walkBelow walks a relative path from a place that is a directory itself.
func walkBelow(w walk, from *place, path string) (*place, error) {
	w.path, w.as = from.path, from.as
	return w.begin(from.dir, ".", path)
}

func (w *walk) begin(at int, base, path string) (*place, error) {
	if len(w.path)+len(path) >= unix.PathMax || strings.Count(path, "/") > maxDepth {
		return nil, &os.PathError{Op: "open", Path: w.path, Err: unix.ENAMETOOLONG}
	}
	const flags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
	err := error(unix.ENOTSUP)
	if i := strings.LastIndexByte(path, '/'); i > 0 && !strings.Contains(path, "..") {
		// The usual case in one call (Linux 5.6): everything above the last name is there, and no link.
		err = w.do(func() (err error) {
			how := &unix.OpenHow{Flags: flags, Resolve: unix.RESOLVE_NO_SYMLINKS}
			w.dir, err = unix.Openat2(at, base+"/"+path[:i], how)
			return err
		})
		if err == nil {
			if err = unix.Fstat(w.dir, &w.dirs); err == nil && isFresh(&w.dirs) {
				err = unix.EAGAIN // awaitMade
			}
			if err != nil {
				unix.Close(w.dir)
			} else {
				w.path, path = filepath.Join(w.path, path[:i]), path[i+1:]
			}
		}
	}
	if err != nil {
		if w.dir, err = unix.Openat(at, base, flags, 0); err != nil {
			return nil, &os.PathError{Op: "open", Path: w.path, Err: err}
		}
		err = unix.Fstat(w.dir, &w.dirs)
	}
	if w.rest = strings.Split(path, "/"); err == nil {
		err = w.do(w.run)
	}
	if err == nil && w.as != nil && isKernels(w.dir) {
		err = &os.PathError{Op: "open", Path: w.path, Err: errKernelFile}
	}
	if err != nil {
		w.close()
		return nil, err
	}
	return &w.place, nil
}

func (w *walk) run() error {
	for len(w.rest) > 0 {
		name, last, fromLink := w.rest[0], len(w.rest) == 1, w.linked > 0
		w.rest, w.linked = w.rest[1:], max(w.linked-1, 0)
		if name == "" || name == "." {
			continue
		}
		if name == ".." && w.becomeOwner(w.dir, &w.dirs) {
			w.rest = append([]string{name}, w.rest...)
			return actAs(w.as, w.run)
		}
		at, made, op := filepath.Join(w.path, name), false, "open"
		if len(at) >= unix.PathMax { // by way of links
			return &os.PathError{Op: op, Path: w.path, Err: unix.ENAMETOOLONG}
		}
		if last {
			err := unix.Fstatat(w.dir, name, &w.st, unix.AT_SYMLINK_NOFOLLOW)
			if err != nil && err != unix.ENOENT {
				return &os.PathError{Op: op, Path: at, Err: err}
			}
			if err != nil || !(w.follow && w.kind() == unix.S_IFLNK) {
				w.name, w.path = name, at
				return nil
			}
			w.st = unix.Stat_t{}
		}
		fd, err := unix.Openat(w.dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.ENOENT && w.mkdirs != nil && !last {
			if fromLink { // as mkdir(2) says of a link that leads nowhere
				return &os.PathError{Op: "mkdir", Path: at, Err: unix.EEXIST}
			}
			op = "mkdir"
			fd, made, err = w.mkdir(name)
		}
		var st unix.Stat_t
		if err == nil {
			if err = cmp.Or(unix.Fstat(fd, &st), w.awaitMade(fd, &st)); err != nil {
				unix.Close(fd)
			}
		}
		if err != nil {
			return &os.PathError{Op: op, Path: at, Err: err}
		}
		switch {
		case st.Mode&unix.S_IFMT == unix.S_IFLNK:
			became, err := w.followLink(fd, &st, at)
			unix.Close(fd)
			if err != nil {
				return &os.PathError{Op: "open", Path: at, Err: err}
			}
			if became {
				return actAs(w.as, w.run)
			}
		case last: // it was a link just now
			unix.Close(fd)
			w.name, w.path, w.st = name, at, st
		case st.Mode&unix.S_IFMT != unix.S_IFDIR:
			unix.Close(fd)
			return fileInWay(at)
		default:
			unix.Close(w.dir)
			w.dir, w.dirs, w.path, w.made = fd, st, at, made
		}
	}
	return nil
}

const nobody = 65534

// becomeOwner gives up the daemon's power for that of a link's owner. The first link decides.
func (w *walk) becomeOwner(fd int, link *unix.Stat_t) bool {
	if w.as != nil || os.Geteuid() != 0 {
		return false
	}
	uid := ownerOf(fd, link)
	if uid == 0 {
		return false
	}
	owner, err := w.users.lookup(w.users.now().names.of(uid))
	if err != nil || owner.uid != uid {
		owner = account{uid: uid, gid: nobody}
	}
	w.as = &owner
	return true
}

// ownerOf is whose a file is. What FUSE says of owners is the word of who mounted it: user_id. Virtiofs, which the host
// serves, has none.
func ownerOf(fd int, st *unix.Stat_t) uint32 {
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) == nil && fs.Type != unix.FUSE_SUPER_MAGIC {
		return st.Uid
	}
	device := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) >= 10 && f[2] == device {
			_, option, _ := strings.Cut(","+f[len(f)-1], ",user_id=")
			id, _, _ := strings.Cut(option, ",")
			return cmp.Or(number(id), st.Uid)
		}
	}
	return nobody
}

func (w *walk) followLink(fd int, st *unix.Stat_t, at string) (became bool, err error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if w.links++; err == nil && (w.noLinks || w.links > 40) {
		err = unix.ELOOP
	} else if err == nil && w.as == nil {
		err = refuseForeign(fd, w.dir, filepath.Base(at), &w.dirs, st)
	}
	if err != nil {
		return false, err
	}
	became, target := w.becomeOwner(fd, st), string(buf[:n])
	if filepath.IsAbs(target) {
		root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return false, err
		}
		unix.Close(w.dir)
		w.dir, w.path = root, "/"
		if err := unix.Fstat(root, &w.dirs); err != nil {
			return false, err
		}
	}
	parts := strings.Split(target, "/")
	w.linked += len(parts)
	w.rest = append(parts, w.rest...)
	return became, nil
}

// fresh is the mode of a directory between mkdir(2) and the moment when its new owner gets it.
const fresh = unix.S_ISVTX | 0o700

// isFresh says that a directory may be one that this daemon is making, with whichever power.
func isFresh(st *unix.Stat_t) bool { return st.Mode&(unix.S_IFMT|0o1777) == unix.S_IFDIR|fresh }

// awaitMade waits until a directory that may be in the making belongs to whom it is made for.
func (w *walk) awaitMade(fd int, st *unix.Stat_t) error {
	if !isFresh(st) {
		return nil
	}
	unlock, ok := locks.lock(idOf(&w.dirs), 2*patience)
	if !ok {
		return errFilesHang
	}
	unlock()
	return unix.Fstat(fd, st)
}

// mkdir makes a directory, mode 0755, and opens it. The lock is of the directory above: no other walk enters the new one
// before it is handed over.
func (w *walk) mkdir(name string) (fd int, made bool, err error) {
	if w.as != nil && isKernels(w.dir) {
		return -1, false, errKernelFile
	}
	unlock, ok := locks.lock(idOf(&w.dirs), 2*patience)
	if !ok {
		return -1, false, errFilesHang
	}
	defer unlock()
	err = unix.Mkdirat(w.dir, name, fresh)
	made = err == nil
	if err != nil && err != unix.EEXIST {
		return -1, false, err
	}
	fd, err = unix.Openat(w.dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == unix.ENOTDIR {
		err = unix.EEXIST
	}
	if err != nil || !made {
		return fd, false, err
	}
	if made, err = w.handOver(fd); err != nil {
		unix.Close(fd)
		unix.Unlinkat(w.dir, name, unix.AT_REMOVEDIR)
		return -1, false, os.NewSyscallError("chown", err)
	}
	return fd, made, nil
}

// handOver gives a new directory to whom it is made for. Whoever may write to the directory above can put another one in its
// place at any time, with links to what is not his. So only one with its mode and owner changes hands, and it must be empty
// when nobody but root can put anything into it any more.
func (w *walk) handOver(fd int) (made bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || !isFresh(&st) || int(st.Uid) != w.uid() {
		return false, err
	}
	err = actAs(nil, func() error {
		now := st
		if w.as != nil && st.Uid != w.mkdirs.uid {
			now.Uid, now.Gid = 0, 0
			if err := cmp.Or(unix.Fchown(fd, 0, 0), unix.Fchmod(fd, fresh)); err != nil {
				return err
			}
		}
		to, mode := *w.mkdirs, st.Mode&unix.S_ISGID|0o755
		if made = isEmpty(fd); !made {
			to, mode = account{uid: st.Uid, gid: st.Gid}, st.Mode&0o7777
		}
		return cmp.Or(chown(fd, &now, nil, to), unix.Fchmod(fd, mode))
	})
	return made && err == nil, err
}

// isEmpty looks into an open directory that nothing has been read of yet.
func isEmpty(dir int) bool {
	entries := make([]byte, 4096) // more than . and .. take
	n, err := unix.Getdents(dir, entries)
	if err != nil {
		return false
	}
	_, _, names := unix.ParseDirent(entries[:n], -1, nil)
	return len(names) == 0
}

func (p *place) uid() int {
	if p.as != nil {
		return int(p.as.uid)
	}
	return os.Geteuid()
}

// chown gives what is open to an account. What a link's owner has, or what was just made in his name, the daemon gives
// away; for the rest the kernel decides what he may.
func chown(fd int, st *unix.Stat_t, as *account, to account) error {
	if st.Uid == to.uid && st.Gid == to.gid {
		return nil
	}
	if as != nil && as.uid == st.Uid {
		as = nil
	}
	return actAs(as, func() error { return unix.Fchownat(fd, "", int(to.uid), int(to.gid), unix.AT_EMPTY_PATH) })
}

// ---- metadata: extended attributes ---------------------------------------------------------------------------------

const metadataPrefix = "user.e2b."

// attributeBytes is what is read of a file's attributes: the list of their names and the values that are kept. Some file
// systems hold any number of them.
const attributeBytes = 64 << 10

// xattrs reads the extended attributes that keep accepts; list and get are the f or l variants of the system calls. What
// would be more than attributeBytes is left out.
func xattrs(list func([]byte) (int, error), get func(string, []byte) (int, error), keep func(string) bool) map[string]string {
	room := attributeBytes
	read := func(call func([]byte) (int, error)) ([]byte, error) {
		n, err := call(nil)
		if err == nil && n > room {
			err = unix.E2BIG
		}
		if err != nil || n == 0 {
			return nil, err
		}
		text := make([]byte, min(n+256, room)) // more may come in between
		n, err = call(text)
		room -= max(n, 0)
		return text[:max(n, 0)], err
	}
	names, _ := read(list)
	if len(names) == 0 {
		return nil
	}
	found := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		if name != "" && keep(name) {
			if value, err := read(func(b []byte) (int, error) { return get(name, b) }); err == nil {
				found[name] = string(value)
			}
		}
	}
	return found
}

func fileXattrs(fd int, keep func(string) bool) map[string]string {
	return xattrs(func(b []byte) (int, error) { return unix.Flistxattr(fd, b) },
		func(name string, b []byte) (int, error) { return unix.Fgetxattr(fd, name, b) }, keep)
}

func isMetadata(name string) bool { return strings.HasPrefix(name, metadataPrefix) }

// metadataOf gives the attributes that clients see as metadata.
func metadataOf(attributes map[string]string) map[string]string {
	var metadata map[string]string
	for name, value := range attributes {
		if key := strings.TrimPrefix(name, metadataPrefix); key != name && utf8.ValidString(key) && utf8.ValidString(value) {
			if metadata == nil {
				metadata = map[string]string{}
			}
			metadata[key] = value
		}
	}
	return metadata
}
