// Watching directories, recursively, on raw inotify(7).
//
// A watcher reads its inotify descriptor on one goroutine and hands on batches of events; whoever takes none holds it up
// until the kernel's queue overflows, which ends the watcher with an error. Names are relative to the watched directory,
// `.` is the directory itself.
//
// Of a new directory, what was in it before its watch was armed becomes CREATE events, once: arm, then list, then pass
// over those CREATE events of listed names that were in the queue by the end of the listing (the kernel queues the event
// of an entry before it lets anyone list it). Directories are a tree of nodes, so that one that is renamed takes
// those below it along.

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

type watchOp uint8

const (
	watchCreate watchOp = iota + 1
	watchWrite
	watchRemove
	watchRename
	watchChmod
)

type watchEvent struct {
	name string
	op   watchOp
}

// watchBits maps what the kernel says to events, in the order in which an event with several bits is told.
var watchBits = []struct {
	mask uint32
	op   watchOp
}{
	{unix.IN_CREATE | unix.IN_MOVED_TO, watchCreate},
	{unix.IN_MOVED_FROM | unix.IN_MOVE_SELF, watchRename},
	{unix.IN_ATTRIB, watchChmod},
	{unix.IN_MODIFY, watchWrite},
	{unix.IN_DELETE | unix.IN_DELETE_SELF, watchRemove},
}

const watchMask = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_MOVE_SELF | unix.IN_ATTRIB |
	unix.IN_MODIFY | unix.IN_DELETE | unix.IN_DELETE_SELF | unix.IN_ONLYDIR

var (
	errWatchLimit    = errors.New("no more watches: the limit fs.inotify.max_user_watches is reached")
	errInstanceLimit = errors.New("no more watchers: the limit fs.inotify.max_user_instances, or that of open files, is reached")
	errWatchOverflow = errors.New("events were lost: more than fs.inotify.max_queued_events were waiting")
)

// watchedDir is a directory under watch. Its path is that of its parent and its name.
type watchedDir struct {
	wd       int32
	parent   *watchedDir // nil for the root, and for one that was moved away
	name     string
	children map[string]*watchedDir
	missed   map[string]bool // new directories that could not be opened: something above them had just been renamed
	listed   map[string]bool // names whose CREATE event was made up
	horizon  int64           // and up to where in the queue the kernel's own is passed over
}

func (d *watchedDir) path(name string) string {
	for ; d != nil; d = d.parent {
		name = filepath.Join(d.name, name)
	}
	return name
}

type watcher struct {
	events chan []watchEvent // closed at the end; err says then why
	err    error

	root      string
	recursive bool
	inotify   *os.File
	fd        int // its descriptor
	dirs      map[int32]*watchedDir
	moved     map[uint32]*watchedDir // between its two events, by cookie
	batch     []watchEvent
	running   bool          // false: nobody takes batches yet
	listings  []*watchedDir // those with listed names, by horizon
	taken     int64         // bytes of the queue that were processed
	queued    int           // bytes read and not yet processed
	stop      chan struct{}
	stopped   atomic.Bool
}

// newWatcher watches a directory from now on. Events from before its return are not told.
func newWatcher(root string, recursive bool) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err == unix.EMFILE || err == unix.ENFILE {
		return nil, errInstanceLimit
	} else if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	w := &watcher{events: make(chan []watchEvent), root: root, recursive: recursive, fd: fd,
		inotify: os.NewFile(uintptr(fd), "inotify"), dirs: map[int32]*watchedDir{}, moved: map[uint32]*watchedDir{},
		stop: make(chan struct{})}
	buf := make([]byte, 64<<10)
	err = w.arm(nil, unix.AT_FDCWD, root, true, 0)
	for horizon := w.waiting(); err == nil && w.taken < horizon; w.batch = w.batch[:0] {
		err = w.read(buf)
	}
	if err != nil {
		w.inotify.Close()
		return nil, err
	}
	go w.run(buf)
	return w, nil
}

// close ends the watcher; events is closed when it returns.
func (w *watcher) close() {
	if !w.stopped.Swap(true) {
		close(w.stop)
		w.inotify.Close()
	}
	for range w.events {
	}
}

func (w *watcher) run(buf []byte) {
	defer close(w.events)
	w.running = true
	for {
		err := w.read(buf)
		w.flush()
		if err != nil {
			w.err = err
			w.inotify.Close()
			return
		}
	}
}

func (w *watcher) flush() {
	if len(w.batch) > 0 {
		select {
		case w.events <- w.batch:
		case <-w.stop:
		}
		w.batch = nil
	}
}

// waiting is how far the queue reaches, the events included that were read already.
func (w *watcher) waiting() int64 {
	n, _ := unix.IoctlGetInt(w.fd, unix.TIOCINQ)
	return w.taken + int64(w.queued) + int64(n)
}

// read waits for events and processes them into the batch.
func (w *watcher) read(buf []byte) error {
	n, err := w.inotify.Read(buf)
	if err != nil {
		return err
	}
	for buf = buf[:n]; len(buf) > 0; {
		wd, mask := int32(binary.NativeEndian.Uint32(buf)), binary.NativeEndian.Uint32(buf[4:])
		cookie, size := binary.NativeEndian.Uint32(buf[8:]), unix.SizeofInotifyEvent+int(binary.NativeEndian.Uint32(buf[12:]))
		name, _, _ := bytes.Cut(buf[unix.SizeofInotifyEvent:size], []byte{0})
		buf = buf[size:]
		w.queued = len(buf)
		w.expire(w.taken)
		w.taken += int64(size)
		if err := w.process(wd, mask, cookie, string(name)); err != nil {
			return err
		}
	}
	w.expire(w.taken)
	return nil
}

// expire drops the names listed in directories whose horizon the queue has passed.
func (w *watcher) expire(taken int64) {
	for len(w.listings) > 0 && w.listings[0].horizon <= taken {
		w.listings[0].listed = nil
		w.listings = w.listings[1:]
	}
}

func (w *watcher) process(wd int32, mask, cookie uint32, name string) error {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		return errWatchOverflow
	}
	d := w.dirs[wd]
	isRoot := d != nil && d.parent == nil && d.name == ""
	switch {
	case d == nil:
		return nil
	case mask&unix.IN_IGNORED != 0:
		delete(w.dirs, wd)
		d.leave()
		return nil
	case name == "" && !isRoot: // its parent tells the same, except that it has left the tree
		if mask&unix.IN_MOVE_SELF != 0 && d.parent == nil {
			w.abandon(d)
		}
		return nil
	case name == "" && mask&unix.IN_MOVE_SELF != 0:
		w.emit(d, ".", mask)
		w.abandon(d)
		return nil
	case name == "":
		name = "."
	}
	made := mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0
	known := d.listed[name]
	if made || mask&(unix.IN_DELETE|unix.IN_MOVED_FROM) != 0 {
		delete(d.listed, name)
		delete(d.missed, name)
	}
	if made && known {
		delete(w.moved, cookie)
		return nil
	}
	w.emit(d, name, mask)
	if !w.recursive || mask&unix.IN_ISDIR == 0 {
		return nil
	}
	child := d.children[name]
	switch {
	case mask&unix.IN_MOVED_FROM != 0 && child != nil:
		child.leave()
		child.parent, child.name = nil, d.path(name) // its own events may come before the new name does
		w.moved[cookie] = child
	case mask&unix.IN_MOVED_TO != 0 && w.moved[cookie] != nil:
		child = w.moved[cookie]
		delete(w.moved, cookie)
		d.adopt(child, name)
		return w.retryMissed(child)
	case made:
		return w.arm(d, unix.AT_FDCWD, filepath.Join(w.root, d.path(name)), false, 0)
	}
	return nil
}

func (w *watcher) emit(d *watchedDir, name string, mask uint32) {
	for _, bit := range watchBits {
		if mask&bit.mask != 0 {
			w.batch = append(w.batch, watchEvent{d.path(name), bit.op})
		}
	}
	if w.running && len(w.batch) >= 1024 {
		w.flush()
	}
}

func (d *watchedDir) adopt(child *watchedDir, name string) {
	child.leave()
	child.parent, child.name = d, name
	if d.children == nil {
		d.children = map[string]*watchedDir{}
	}
	d.children[name] = child
}

func (d *watchedDir) leave() {
	if d.parent != nil && d.parent.children[d.name] == d {
		delete(d.parent.children, d.name)
	}
}

// abandon ends the watches of a directory and of all below it.
func (w *watcher) abandon(d *watchedDir) {
	unix.InotifyRmWatch(w.fd, uint32(d.wd))
	delete(w.dirs, d.wd)
	for cookie, moved := range w.moved {
		if moved == d {
			delete(w.moved, cookie)
		}
	}
	for _, child := range d.children {
		w.abandon(child)
	}
}

// retryMissed arms what could not be opened while a directory above it had its old name in our tree.
func (w *watcher) retryMissed(d *watchedDir) error {
	for name := range d.missed {
		delete(d.missed, name)
		if err := w.arm(d, unix.AT_FDCWD, filepath.Join(w.root, d.path(name)), false, 0); err != nil {
			return err
		}
	}
	for _, child := range d.children {
		if err := w.retryMissed(child); err != nil {
			return err
		}
	}
	return nil
}

// arm watches a directory and, in a recursive watcher, those below it; path is relative to the descriptor at, its last
// element the name below parent. What a new directory holds is told, what was there from the beginning is quiet.
func (w *watcher) arm(parent *watchedDir, at int, path string, quiet bool, depth int) error {
	flags := unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NONBLOCK | unix.O_CLOEXEC
	if parent != nil {
		flags |= unix.O_NOFOLLOW
	}
	name := ""
	if parent != nil {
		name = filepath.Base(path)
	}
	if depth > maxDepth {
		return fmt.Errorf("cannot watch %s: more than %d levels", path, maxDepth)
	}
	fd, err := unix.Openat(at, path, flags, 0)
	switch {
	case parent == nil && err != nil:
		return &os.PathError{Op: "open", Path: path, Err: err}
	case err == unix.ENOENT && at == unix.AT_FDCWD:
		if parent.missed == nil {
			parent.missed = map[string]bool{}
		}
		parent.missed[name] = true
		return nil
	case err == unix.EMFILE || err == unix.ENFILE:
		return &os.PathError{Op: "open", Path: path, Err: err}
	case err != nil: // gone, no directory any more, or closed to an ordinary user
		return nil
	}
	dir := os.NewFile(uintptr(fd), filepath.Join(w.root, parent.path(name)))
	defer dir.Close()
	// By the descriptor: the directory that is listed is the one that is watched, whatever it is called by now.
	wd, err := unix.InotifyAddWatch(w.fd, fmt.Sprintf("/proc/self/fd/%d", fd), watchMask)
	if err == unix.ENOENT {
		wd, err = unix.InotifyAddWatch(w.fd, path, watchMask) // no /proc
	}
	switch {
	case err == unix.ENOSPC:
		return errWatchLimit
	case err != nil && parent == nil:
		return os.NewSyscallError("inotify_add_watch", err)
	case err != nil:
		return nil
	}
	d := w.dirs[int32(wd)]
	if d == nil {
		d = &watchedDir{wd: int32(wd)}
		w.dirs[d.wd] = d
	}
	if parent != nil {
		parent.adopt(d, name)
	}
	if !w.recursive {
		return nil
	}
	for {
		entries, err := dir.ReadDir(512)
		for _, entry := range entries {
			if !quiet {
				if d.listed == nil {
					d.listed = map[string]bool{}
				}
				d.listed[entry.Name()] = true
				w.emit(d, entry.Name(), unix.IN_CREATE)
			}
			if entry.IsDir() {
				if err := w.arm(d, fd, entry.Name(), quiet, depth+1); err != nil {
					return err
				}
			}
		}
		if err != nil {
			d.horizon = w.waiting()
			if d.listed != nil {
				w.listings = append(w.listings, d)
			}
			if err != io.EOF && !errors.Is(err, unix.ENOENT) {
				return err
			}
			return nil
		}
	}
}

// raiseWatchLimits gives a guest the watches that its memory allows; the kernel's limits are meant for many users.
func raiseWatchLimits() {
	for name, value := range map[string]int{"max_user_instances": 8192, "max_user_watches": 1 << 20, "max_queued_events": 1 << 18} {
		file := "/proc/sys/fs/inotify/" + name
		text, _ := os.ReadFile(file)
		if limit, err := strconv.Atoi(string(bytes.TrimSpace(text))); err == nil && limit < value {
			os.WriteFile(file, []byte(strconv.Itoa(value)), 0)
		}
	}
}
