// Watching directories, recursively, on raw inotify(7).
//
// A watcher reads its inotify descriptor on one goroutine and hands on batches of events; whoever takes none holds it up
// until the kernel's queue overflows, which ends the watcher with an error. Names are relative to the watched directory,
// `.` is the directory itself.
//
// Of a new directory, what was in it before its watch was armed becomes CREATE events, once: arm, then list, then pass
// over those CREATE events of listed names that were in the queue by the end of the listing (the kernel queues the event
// of an entry before it lets anyone list it).
//
// Directories are a tree of nodes, one for each watch descriptor, so that one that is renamed takes those below it along.
// A node gets its place by a pair of rename events, or because it was seen there: opened from a descriptor of its parent,
// which is known by device and inode. What was seen is ahead of the queue: rename events from before do not undo it.
// Whatever a guest does, no node gets below itself or deeper than maxDepth. Events that do not fit the tree leave a doubt:
// once the queue is empty the directories are looked at, all get the places that they have, and what was not seen is let go.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

type watchOp uint8 // numbered as on the wire

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

// Prices in bytes.
const (
	watcherPrice    = 32 << 10 // two goroutines, the buffer, events on their way
	watchedDirPrice = 1 << 10  // a directory in two maps
	listedPrice     = 64       // a name in a map, and its bytes besides

	watchBuffer = 8 << 10 // for events from the kernel
	batchEvents = 256     // and batchBytes of names: what is handed on at once
	batchBytes  = 16 << 10
)

var networkFilesystems = []int64{unix.NFS_SUPER_MAGIC, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC,
	0xFF534D42 /* CIFS */}

func isNetwork(path string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(path, &fs) == nil && slices.Contains(networkFilesystems, int64(uint32(fs.Type)))
}

// watchedDir is a directory under watch. Its path is that of its parent and its name.
type watchedDir struct {
	wd       int32
	dev, ino uint64
	parent   *watchedDir // nil for the root, and for one that was moved away
	name     string
	depth    int   // below the root, 0 for this alone
	seen     int64 // up to where in the queue its place is newer than the events
	cookie   uint32
	replaced *watchedDir // whose name another one has just taken, by exchange or for good
	was      string      // its name then
	children map[string]*watchedDir
	listed   map[string]bool // names whose CREATE event was made up
	price    int64           // of them
	horizon  int64           // and up to where in the queue the kernel's own is passed over
}

func (d *watchedDir) path(name string) string {
	for ; d != nil && d.name != ""; d = d.parent {
		name = d.name + "/" + name
	}
	return strings.TrimSuffix(name, "/")
}

type watcher struct {
	events chan []watchEvent // closed at the end; err says then why
	err    error

	memory    *grant // for directories
	root      string
	recursive bool
	network   bool // network filesystems below the root, too
	inotify   *os.File
	fd        int // its descriptor
	dirs      map[int32]*watchedDir
	moved     map[uint32]*watchedDir // between its two events, by cookie
	top       *watchedDir
	doubt     bool // events did not fit the tree
	batch     []watchEvent
	named     int             // bytes of names in it
	running   bool            // false: nobody is told yet
	listings  []*watchedDir   // those with listed names, by horizon
	taken     int64           // bytes of the queue that were processed
	queued    int             // bytes read and not yet processed
	stop      context.Context // done: nobody takes events any more
	cancel    func()
}

// newWatcher watches a directory from now on. Events from before its return are not told. The grant is closed with the watcher.
func newWatcher(root string, recursive, network bool, memory *grant) (_ *watcher, err error) {
	defer func() {
		if err != nil {
			memory.close()
		}
	}()
	if err := memory.tryTake(watcherPrice); err != nil {
		return nil, err
	}
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err == unix.EMFILE || err == unix.ENFILE {
		return nil, errInstanceLimit
	} else if err != nil {
		return nil, os.NewSyscallError("inotify_init1", err)
	}
	w := &watcher{events: make(chan []watchEvent), memory: memory, root: root, recursive: recursive, network: network, fd: fd,
		inotify: os.NewFile(uintptr(fd), "inotify"), dirs: map[int32]*watchedDir{}, moved: map[uint32]*watchedDir{}}
	w.stop, w.cancel = context.WithCancel(context.Background())
	buf := make([]byte, watchBuffer)
	err = w.arm(nil, unix.AT_FDCWD, "", false)
	for horizon := w.waiting(); err == nil && w.taken < horizon; {
		err = w.read(buf)
	}
	if err != nil {
		w.inotify.Close()
		return nil, err
	}
	go w.run(buf)
	return w, nil
}

// close ends the watcher; events is closed when it returns. It waits where the filesystem makes the watcher wait.
func (w *watcher) close() {
	w.cancel()
	w.inotify.SetReadDeadline(time.Unix(1, 0))
	for range w.events {
	}
}

// run alone closes the descriptor, which it uses by number: that number never means another file.
func (w *watcher) run(buf []byte) {
	defer close(w.events)
	defer w.memory.close()
	defer w.inotify.Close()
	w.running = true
	for w.err == nil {
		w.err = w.read(buf)
		w.flush()
	}
}

func (w *watcher) flush() {
	if len(w.batch) > 0 {
		select {
		case w.events <- w.batch:
		case <-w.stop.Done():
		}
		w.batch, w.named = nil, 0
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
	if w.doubt && w.waiting() == w.taken {
		w.doubt = false
		return w.verify()
	}
	return nil
}

// verify gives all directories the places that they have, and ends the watches of those that are not in the tree.
func (w *watcher) verify() error {
	start := w.taken
	dir, err := w.open(w.top)
	if err != nil {
		return nil // moved just now, which the queue will tell
	}
	defer dir.Close()
	if err := w.list(w.top, dir, false, true); err != nil {
		return err
	}
	for _, d := range w.dirs {
		if d != w.top && d.seen < start {
			w.abandon(d)
		}
	}
	return nil
}

// expire drops the names listed in directories whose horizon the queue has passed.
func (w *watcher) expire(taken int64) {
	for len(w.listings) > 0 && w.listings[0].horizon <= taken {
		first := w.listings[0]
		w.memory.give(first.price)
		first.listed, first.price = nil, 0
		w.listings = w.listings[1:]
	}
}

func (w *watcher) process(wd int32, mask, cookie uint32, name string) error {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		return errWatchOverflow
	}
	d := w.dirs[wd]
	switch {
	case d == nil:
		return nil
	case mask&unix.IN_IGNORED != 0:
		w.forget(d)
		d.leave()
		return nil
	case name == "" && d.depth > 0: // its parent tells the same, except that it has left the tree
		switch moved := mask&unix.IN_MOVE_SELF != 0; {
		case moved && d.parent == nil, mask&unix.IN_ATTRIB != 0 && d.was != "": // the second: no links are left, replaced for good
			w.abandon(d)
		case moved:
			delete(w.moved, d.cookie)
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
	known := made && d.listed[name]
	child, moved := d.children[name], w.moved[cookie]
	if made || mask&(unix.IN_DELETE|unix.IN_MOVED_FROM) != 0 {
		delete(d.listed, name)
		if old := d.replaced; old != nil && old.was == name && mask&unix.IN_MOVED_FROM != 0 && mask&unix.IN_ISDIR != 0 {
			child, old.was = old, ""
		}
		d.replaced = nil
	}
	if !known {
		w.emit(d, name, mask)
	}
	if !w.recursive || mask&unix.IN_ISDIR == 0 {
		return nil
	}
	rename := mask&(unix.IN_MOVED_FROM|unix.IN_MOVED_TO) != 0
	current := child == nil || w.taken > child.seen
	w.doubt = w.doubt || rename && !current || mask&unix.IN_MOVED_FROM != 0 && child == nil || moved != nil && moved.parent != nil
	switch {
	case mask&unix.IN_MOVED_FROM != 0 && child != nil && current:
		child.leave()
		child.cookie, w.moved[cookie] = cookie, child
	case mask&unix.IN_DELETE != 0 && child != nil && current: // who has it open holds up its own last event
		child.leave()
	case mask&unix.IN_MOVED_TO != 0 && moved != nil && moved.parent == nil && current:
		if child != nil {
			child.leave()
			d.replaced, child.was, w.doubt = child, name, true
		}
		return w.adopt(d, moved, name)
	case made && (!known || child == nil):
		return w.look(d, name)
	}
	return nil
}

func (w *watcher) emit(d *watchedDir, name string, mask uint32) {
	if !w.running {
		return
	}
	name = d.path(name)
	for _, bit := range watchBits {
		if mask&bit.mask != 0 {
			w.batch = append(w.batch, watchEvent{name, bit.op})
			w.named += len(name)
		}
	}
	if len(w.batch) >= batchEvents || w.named >= batchBytes {
		w.flush()
	}
}

// adopt gives a directory its place, unless that is below it in the tree: something in between has moved, which the queue
// will tell.
func (w *watcher) adopt(d, child *watchedDir, name string) error {
	if child.parent == d && child.name == name {
		return nil
	}
	for above := d; above != nil; above = above.parent {
		if above == child || child == w.top {
			w.doubt = true
			return nil
		}
	}
	child.leave()
	if old := d.children[name]; old != nil {
		old.leave()
	}
	if d.children == nil {
		d.children = map[string]*watchedDir{}
	}
	child.parent, child.name, d.children[name] = d, name, child
	return w.settle(child)
}

// settle counts anew how deep directories are.
func (w *watcher) settle(d *watchedDir) error {
	if d.depth = d.parent.depth + 1; d.depth > maxDepth {
		return fmt.Errorf("cannot watch %s: more than %d levels", d.path(""), maxDepth)
	}
	for _, child := range d.children {
		if err := w.settle(child); err != nil {
			return err
		}
	}
	return nil
}

// leave takes a directory out of the tree. Its events may come before its new place does: they are told under the old one.
func (d *watchedDir) leave() {
	if d.parent != nil {
		delete(d.parent.children, d.name)
		d.parent, d.name = nil, d.path("")
	}
}

// abandon ends the watches of a directory and of all below it.
func (w *watcher) abandon(d *watchedDir) {
	d.leave()
	unix.InotifyRmWatch(w.fd, uint32(d.wd))
	w.forget(d)
	delete(w.moved, d.cookie)
	d.was = ""
	for _, child := range d.children {
		w.abandon(child)
	}
}

// forget says that a directory is no longer under watch.
func (w *watcher) forget(d *watchedDir) {
	if w.dirs[d.wd] == d {
		delete(w.dirs, d.wd)
		w.memory.give(watchedDirPrice)
	}
}

func (d *watchedDir) is(st *unix.Stat_t) bool { return d.dev == uint64(st.Dev) && d.ino == st.Ino }

// open opens a directory of the tree by its path; another one that has the path by now does not count.
func (w *watcher) open(d *watchedDir) (*os.File, error) {
	dir, err := openIn(unix.AT_FDCWD, w.root+"/"+d.path(""), d.path(""), unix.O_DIRECTORY)
	if err == nil {
		var st unix.Stat_t
		if err = unix.Fstat(int(dir.Fd()), &st); err == nil && d.is(&st) {
			return dir, nil
		}
		dir.Close()
	}
	return nil, cmp.Or(err, error(unix.ENOENT))
}

// look arms the directory that has a name in d by now.
func (w *watcher) look(d *watchedDir, name string) error {
	dir, err := w.open(d)
	switch {
	case err == nil:
		defer dir.Close()
		return w.arm(d, int(dir.Fd()), name, false)
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM):
		return err
	}
	w.doubt = true // something above it has just been renamed
	return nil
}

// arm watches the directory that has a name in parent, whose descriptor is at, and, in a recursive watcher, those below it,
// also below one that is watched already when it is to look again.
func (w *watcher) arm(parent *watchedDir, at int, name string, again bool) error {
	seen, path, flags := w.waiting(), w.root, unix.O_DIRECTORY // not later: what happens meanwhile is news
	if parent != nil {
		path, flags = name, flags|unix.O_NOFOLLOW
	}
	fd, err := openAt(at, path, flags, 0)
	switch {
	case err == nil:
	case parent == nil, err == unix.EMFILE, err == unix.ENFILE, err == unix.ENOMEM:
		return &os.PathError{Op: "open", Path: path, Err: err}
	default: // gone, no directory any more, or closed to an ordinary user
		return nil
	}
	dir := os.NewFile(uintptr(fd), parent.path(name))
	defer dir.Close()
	// By the descriptor: the directory that is listed is the one that is watched, whatever it is called by now.
	self := fmt.Sprintf("/proc/self/fd/%d", fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil && parent == nil {
		return &os.PathError{Op: "fstat", Path: path, Err: err}
	} else if err != nil || parent != nil && !w.network && uint64(st.Dev) != parent.dev && isNetwork(self) {
		return nil
	}
	wd, err := unix.InotifyAddWatch(w.fd, self, watchMask)
	switch {
	case err == unix.ENOSPC:
		return errWatchLimit
	case err != nil && parent == nil, err == unix.ENOMEM:
		return os.NewSyscallError("inotify_add_watch", err)
	case err != nil:
		return nil
	}
	d, known := w.dirs[int32(wd)]
	if !known {
		if err := w.memory.tryTake(watchedDirPrice); err != nil {
			unix.InotifyRmWatch(w.fd, uint32(wd))
			return err
		}
		d = &watchedDir{wd: int32(wd), dev: uint64(st.Dev), ino: st.Ino}
		w.dirs[d.wd] = d
	}
	if parent == nil {
		w.top = d
	} else if err := w.adopt(parent, d, name); err != nil || d.parent != parent || d.name != name {
		return err
	}
	if d.seen = seen; w.recursive && (!known || again) {
		return w.list(d, dir, !known, again)
	}
	return nil
}

// list arms the directories in one. What a new one holds is told, but for what was there from the beginning.
func (w *watcher) list(d *watchedDir, dir *os.File, isNew, again bool) error {
	var entries []os.DirEntry
	var err error
	for err == nil {
		entries, err = dir.ReadDir(512)
		for _, entry := range entries {
			if isNew && w.running {
				if d.listed == nil {
					d.listed = map[string]bool{}
				}
				price := int64(listedPrice + len(entry.Name()))
				if err := w.memory.tryTake(price); err != nil {
					return err
				}
				d.listed[entry.Name()] = true
				d.price += price
				w.emit(d, entry.Name(), unix.IN_CREATE)
			}
			if entry.IsDir() {
				if err := w.arm(d, int(dir.Fd()), entry.Name(), again); err != nil {
					return err
				}
			}
		}
	}
	if isNew && d.listed != nil {
		d.horizon = w.waiting()
		w.listings = append(w.listings, d)
		w.expire(w.taken) // as a rule nothing waits, and the names of a whole tree are not held
	}
	if err == io.EOF || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// raiseWatchLimits is for guests; the kernel's own limits are meant for many users. With the directory that it keeps in memory a watch
// takes about 1 KiB: all watches together take 1/32 of the memory at most, as a full queue of events takes 1/64.
func raiseWatchLimits(memory uint64) {
	for name, value := range map[string]uint64{"max_user_instances": min(8192, memory>>17), "max_user_watches": min(1<<20, memory>>15),
		"max_queued_events": min(1<<18, memory>>15)} {
		if name = "fs/inotify/" + name; uint64(sysctl(name)) < value {
			os.WriteFile("/proc/sys/"+name, strconv.AppendUint(nil, value, 10), 0)
		}
	}
}
