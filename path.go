// Paths as clients name them, and the way there. What is written, created, removed or replaced is reached by a walk on
// descriptors, one component after the other (O_PATH|O_NOFOLLOW), which follows links itself.
//
// A link confers only its owner's power. The daemon works as root, the guest's users make links: from the first link on
// that root does not own, the rest of the walk and what is done at its end run with the filesystem credentials of the
// link's owner (setfsuid(2), setfsgid(2) and groups, all of one thread, which is thrown away), so that the kernel decides.
// A `..` out of a directory counts as a link of that directory's owner, who can have moved it. Reading follows links as
// every program does. Linux 3.6 or newer.

package main

import (
	"cmp"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"unicode/utf8"
	"unsafe"

	"golang.org/x/sys/unix"
)

var errUserSpecificHome = errors.New("cannot expand user-specific home dir")

// resolvePath turns a client's path into an absolute one. An empty path means the default working directory; `~` the
// home; an absolute path stays exactly as it was sent; a relative one starts at the home and may climb out of it.
func resolvePath(path, home, defaultWorkdir string) (string, error) {
	if path == "" {
		path = defaultWorkdir
	}
	switch {
	case strings.HasPrefix(path, "~"):
		rest := path[1:]
		if rest != "" && rest[0] != '/' && rest[0] != '\\' {
			return "", errUserSpecificHome
		}
		return filepath.Join(home, rest), nil
	case filepath.IsAbs(path):
		return path, nil
	default:
		return filepath.Join("/", home, path), nil
	}
}

// A tree deeper than this is neither removed nor watched nor packed: each level holds a descriptor.
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

// openFd opens what has the name, without following a link and without waiting for anything.
func (p *place) openFd(flags int, mode uint32) (fd int, err error) {
	err = p.do(func() error {
		return retry(func() (err error) {
			fd, err = unix.Openat(p.dir, p.name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, mode)
			return err
		})
	})
	if err != nil {
		err = &os.PathError{Op: "open", Path: p.path, Err: err}
	}
	return fd, err
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
			gid, _ := unix.SetfsgidRetGid(-1)
			uid, _ := unix.SetfsuidRetUid(-1)
			if errno != 0 || uid != int(who.uid) || gid != int(who.gid) {
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
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: "/", Err: err}
	}
	w.dir, w.path = root, "/"
	return w.walkRest(path)
}

// walkBelow walks a relative path from a place that is a directory itself.
func walkBelow(w walk, from *place, path string) (*place, error) {
	dir, err := unix.FcntlInt(uintptr(from.dir), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	w.dir, w.path, w.as = dir, from.path, from.as
	return w.walkRest(path)
}

func (w *walk) walkRest(path string) (*place, error) {
	if i := strings.LastIndexByte(path, '/'); i > 0 && !strings.Contains(path, "..") {
		// The usual case in one call (Linux 5.6): everything above the last name is there, and no link.
		how := &unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS}
		above := strings.TrimLeft(path[:i], "/")
		if fd, err := unix.Openat2(w.dir, cmp.Or(above, "."), how); err == nil {
			unix.Close(w.dir)
			w.dir, w.path, path = fd, filepath.Join(w.path, above), path[i+1:]
		}
	}
	w.rest = strings.Split(path, "/")
	err := unix.Fstat(w.dir, &w.dirs)
	if err == nil {
		err = w.do(w.run)
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
		if fromLink {
			w.linked--
		}
		w.rest = w.rest[1:]
		if name == "" || name == "." {
			continue
		}
		if name == ".." && w.becomeOwner(&w.dirs) {
			w.rest = append([]string{name}, w.rest...)
			return actAs(w.as, w.run)
		}
		at, made, op := filepath.Join(w.path, name), false, "open"
		fd, err := unix.Openat(w.dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err == unix.ENOENT {
			switch {
			case last:
				w.name, w.path = name, at
				return nil
			case w.mkdirs != nil && fromLink: // as mkdir(2) says of a link that leads nowhere
				return &os.PathError{Op: "mkdir", Path: at, Err: unix.EEXIST}
			case w.mkdirs != nil:
				op = "mkdir"
				fd, made, err = w.mkdir(name)
			}
		}
		if err != nil {
			return &os.PathError{Op: op, Path: at, Err: err}
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			unix.Close(fd)
			return &os.PathError{Op: "stat", Path: at, Err: err}
		}
		link := st.Mode&unix.S_IFMT == unix.S_IFLNK
		switch {
		case last && !(link && w.follow):
			unix.Close(fd)
			w.name, w.path, w.st = name, at, st
			return nil
		case link:
			became, err := w.followLink(fd, &st, at)
			unix.Close(fd)
			if err != nil {
				return &os.PathError{Op: "open", Path: at, Err: err}
			}
			if became {
				return actAs(w.as, w.run)
			}
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

// becomeOwner gives up the daemon's power for that of a link's owner. The first link decides.
func (w *walk) becomeOwner(link *unix.Stat_t) bool {
	if w.as != nil || link.Uid == 0 || os.Geteuid() != 0 {
		return false
	}
	owner, err := w.users.lookup(w.users.userName(link.Uid))
	if err != nil {
		owner = account{uid: link.Uid, gid: link.Gid}
	}
	w.as = &owner
	return true
}

func (w *walk) followLink(fd int, st *unix.Stat_t, at string) (became bool, err error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if w.links++; err == nil && (w.noLinks || w.links > 40) {
		err = unix.ELOOP
	}
	if err != nil {
		return false, err
	}
	target := string(buf[:n])
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
	return w.becomeOwner(st), nil
}

// mkdir makes a directory, mode 0755, and opens it. Whoever may write to the directory above can put another one in its
// place at any time; only the new one, known by a mode that nobody else gives, changes hands.
func (w *walk) mkdir(name string) (fd int, made bool, err error) {
	const fresh = unix.S_ISVTX | 0o700
	if err := unix.Mkdirat(w.dir, name, fresh); err != nil && err != unix.EEXIST {
		return -1, false, err
	}
	fd, err = unix.Openat(w.dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == unix.ENOTDIR {
		err = unix.EEXIST
	}
	var st unix.Stat_t
	if err != nil || unix.Fstat(fd, &st) != nil || st.Mode&0o1777 != fresh || int(st.Uid) != w.uid() {
		return fd, false, err
	}
	err = chown(fd, &st, w.as, *w.mkdirs)
	if err == nil {
		err = actAs(nil, func() error { return unix.Fchmod(fd, st.Mode&unix.S_ISGID|0o755) })
	}
	if err != nil {
		unix.Close(fd)
		unix.Unlinkat(w.dir, name, unix.AT_REMOVEDIR)
		return -1, false, os.NewSyscallError("chown", err)
	}
	return fd, true, nil
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
	return actAs(as, func() error { return unix.Fchown(fd, int(to.uid), int(to.gid)) })
}

// ---- metadata: extended attributes ---------------------------------------------------------------------------------

const metadataPrefix = "user.e2b."

// xattrs reads the extended attributes that keep accepts; list and get are the f or l variants of the system calls.
func xattrs(list func([]byte) (int, error), get func(string, []byte) (int, error), keep func(string) bool) map[string]string {
	found := map[string]string{}
	n, err := list(nil)
	if err != nil || n == 0 {
		return found
	}
	names := make([]byte, n+256) // more may come in between
	if n, err = list(names); err != nil || n == 0 {
		return found
	}
	for name := range strings.SplitSeq(string(names[:n-1]), "\x00") {
		if !keep(name) {
			continue
		}
		if n, err = get(name, nil); err == nil {
			value := make([]byte, n)
			if n, err = get(name, value); err == nil {
				found[name] = string(value[:n])
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
