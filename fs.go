// The Filesystem service: stat, list, make, move, remove; watching as a stream and by polling.
//
// A name that is not UTF-8, which a protobuf string cannot carry, is told with U+FFFD in place of its bad bytes.

package main

import (
	"archive/tar"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "envd/proto"
)

// Prices in bytes, names and paths besides.
const (
	eventPrice = 160 // an event that is kept
	entryPrice = 384 // an entry of a listing
)

var errNotFetched = errors.New("more events were not fetched than --memory-limit has room for")

type fsService struct {
	users     *userDB
	settings  *settings
	budget    *budget
	keepAlive time.Duration
	idle      time.Duration // after which a polling watcher that nobody asks is closed
	stopping  <-chan struct{}
	streams   *atomic.Int64 // open ones, those of other services included

	overflows atomic.Int64 // watchers that ended because events were lost

	mu       sync.Mutex // protects what follows
	watchers map[string]*pollingWatcher
}

// resolve gives the acting user, and the path that a client means.
func (s *fsService) resolve(ctx context.Context, path string) (account, string, error) {
	defaultUser, defaultWorkdir := s.settings.defaults()
	user, err := actingUser(ctx, s.users, defaultUser)
	if err != nil {
		return user, "", connect.NewError(connect.CodeUnauthenticated, err)
	}
	resolved, err := resolvePath(path, user.home, defaultWorkdir)
	if err != nil {
		err = wireError(connect.CodeInvalidArgument, "failed to expand path '%s' for user '%s': %w", path, user.name, err)
	}
	return user, resolved, err
}

// fsError is the wire error for one of the kernel's: missing says what stands before ENOENT, "" that it is like any other.
func fsError(err error, missing, other string) error {
	code, prefix := connect.CodeInternal, other
	var inWay fileInWay
	var refusal *budgetError
	switch {
	case missing != "" && errors.Is(err, syscall.ENOENT):
		code, prefix = connect.CodeNotFound, missing
	case errors.As(err, &inWay):
		return connect.NewError(code, inWay)
	case errors.As(err, &refusal),
		slices.ContainsFunc([]error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, errWatchLimit, errInstanceLimit},
			func(limit error) bool { return errors.Is(err, limit) }):
		code = connect.CodeResourceExhausted
	}
	return wireError(code, "%s: %w", prefix, err)
}

// ---- entries -------------------------------------------------------------------------------------------------------

func (s *fsService) stat(path string) (*pb.EntryInfo, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, fsError(&os.PathError{Op: "lstat", Path: path, Err: err}, "file not found", "error getting file info")
	}
	return entryOf(filepath.Base(path), path, path, &st, s.users.now()), nil
}

// entryOf describes what is at a path; shown is the path as the client knows it.
func entryOf(name, path, shown string, st *unix.Stat_t, users *users) *pb.EntryInfo {
	header := tar.Header{Mode: int64(st.Mode)} // has the kernel's bits
	entry := &pb.EntryInfo{Name: valid(name), Path: valid(shown), Size: st.Size, Permissions: header.FileInfo().Mode().String(),
		Owner: valid(users.names.of(st.Uid)), Group: valid(users.groupNames.of(st.Gid))}
	modified := &timestamppb.Timestamp{Seconds: st.Mtim.Sec, Nanos: int32(st.Mtim.Nsec)}
	if st.Mtim != (unix.Timespec{}) && modified.IsValid() { // JSON has no others
		entry.ModifiedTime = modified
	}
	mode := st.Mode
	if mode&unix.S_IFMT == unix.S_IFLNK {
		var there unix.Stat_t
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			target = shown
		} else if unix.Stat(path, &there) != nil {
			there.Mode = 0
		}
		target, mode = valid(target), there.Mode
		entry.SymlinkTarget = &target
	}
	entry.Mode = mode & 0o777
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		entry.Type = pb.FileType_FILE_TYPE_DIRECTORY
	case unix.S_IFREG:
		entry.Type = pb.FileType_FILE_TYPE_FILE
	}
	if entry.Type != pb.FileType_FILE_TYPE_UNSPECIFIED && entry.SymlinkTarget == nil {
		entry.Metadata = metadataOf(xattrs(func(b []byte) (int, error) { return unix.Llistxattr(path, b) },
			func(name string, b []byte) (int, error) { return unix.Lgetxattr(path, name, b) }, isMetadata))
	}
	return entry
}

func valid(text string) string { return strings.ToValidUTF8(text, "\uFFFD") }

func (s *fsService) Stat(ctx context.Context, req *connect.Request[pb.StatRequest]) (*connect.Response[pb.StatResponse], error) {
	_, path, err := s.resolve(ctx, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	entry, err := s.stat(path)
	return connect.NewResponse(&pb.StatResponse{Entry: entry}), err
}

func (s *fsService) ListDir(ctx context.Context, req *connect.Request[pb.ListDirRequest]) (*connect.Response[pb.ListDirResponse], error) {
	_, path, err := s.resolve(ctx, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil && (strings.Contains(err.Error(), "too many links") || errors.Is(err, syscall.ELOOP)) {
		return nil, wireError(connect.CodeFailedPrecondition, "cyclic symlink or chain >255 links at %q", path)
	} else if err != nil {
		return nil, fsError(err, "path not found", "error resolving symlink")
	}
	info, err := os.Stat(resolved)
	if err != nil {
		return nil, fsError(err, "path not found", "error getting file info")
	} else if !info.IsDir() {
		return nil, wireError(connect.CodeInvalidArgument, "path is not a directory: %s", resolved)
	}
	l := &listing{ctx: ctx, memory: requestOf(ctx).memory, users: s.users.now()}
	err = l.add(resolved, filepath.Clean(path), max(req.Msg.GetDepth(), 1))
	res := &pb.ListDirResponse{Entries: l.entries}
	if err == nil {
		err = payAnswer(ctx, l.memory, req.Header(), res)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	} else if err != nil {
		return nil, fsError(err, "", "error reading directory "+path)
	}
	return connect.NewResponse(res), nil
}

// listing is the answer to one ListDir, as far as it was made. What it holds is the request's.
type listing struct {
	ctx     context.Context
	memory  *grant
	users   *users
	entries []*pb.EntryInfo
}

// hold pays for some more, unless the client has left.
func (l *listing) hold(bytes int) error {
	return cmp.Or(l.ctx.Err(), l.memory.take(l.ctx, int64(bytes)))
}

// add appends what is in a directory, in the order of a walk; the entries' paths begin with shown.
func (l *listing) add(dir, shown string, depth uint32) error {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var names []string
	for err == nil {
		var more []string
		more, err = f.Readdirnames(4096)
		names = append(names, more...)
		// Each name is there three times, in a name, a path and a string of its own.
		bytes := len(more)*(entryPrice+len(shown)) + 3*len(strings.Join(more, ""))
		if failure := l.hold(bytes); failure != nil {
			return failure
		}
	}
	if err != io.EOF {
		return err
	}
	slices.Sort(names)
	dir, shown = strings.TrimSuffix(dir, "/")+"/", strings.TrimSuffix(shown, "/")+"/"
	entries, err := l.describe(int(f.Fd()), names, dir, shown)
	if err != nil {
		return err
	}
	for i, entry := range entries {
		if entry == nil {
			continue
		}
		l.entries = append(l.entries, entry)
		if entry.Type == pb.FileType_FILE_TYPE_DIRECTORY && entry.SymlinkTarget == nil && depth > 1 {
			err := l.add(dir+names[i], shown+names[i], depth-1)
			if err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ENOTDIR) {
				return err
			}
		}
	}
	return nil
}

// describe makes the entries of a directory's names; nil for what has gone by now.
func (l *listing) describe(fd int, names []string, dir, shown string) ([]*pb.EntryInfo, error) {
	entries := make([]*pb.EntryInfo, len(names))
	var failures [2]error
	var both sync.WaitGroup
	for first := range failures { // nearly all of it is system calls, two an entry
		both.Go(func() {
			for i := first; i < len(names) && failures[first] == nil; i += len(failures) {
				var st unix.Stat_t
				if unix.Fstatat(fd, names[i], &st, unix.AT_SYMLINK_NOFOLLOW) == unix.ENOENT {
					continue // of what tells nothing else, a dead FUSE mount say, the name is told
				}
				entries[i] = entryOf(names[i], dir+names[i], shown+names[i], &st, l.users)
				more := 2 * len(entries[i].GetSymlinkTarget()) // than what was known before
				for key, value := range entries[i].Metadata {
					more += len(key) + len(value) + 4*stringSize
				}
				failures[first] = l.hold(more)
			}
		})
	}
	both.Wait()
	return entries, cmp.Or(failures[0], failures[1])
}

// ---- changes -------------------------------------------------------------------------------------------------------

func (s *fsService) MakeDir(ctx context.Context, req *connect.Request[pb.MakeDirRequest]) (*connect.Response[pb.MakeDirResponse], error) {
	user, path, err := s.resolve(ctx, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return nil, wireError(connect.CodeAlreadyExists, "directory already exists: %s", path)
	} else if err == nil {
		return nil, wireError(connect.CodeInvalidArgument, "path already exists but it is not a directory: %s", path)
	} else if !errors.Is(err, syscall.ENOENT) {
		return nil, fsError(err, "", "error getting file info")
	}
	place, err := walkPath(walk{users: s.users, mkdirs: &user}, path+"/")
	if err != nil {
		return nil, fsError(err, "", "failed to create directory")
	}
	place.close()
	entry, err := s.stat(path)
	return connect.NewResponse(&pb.MakeDirResponse{Entry: entry}), err
}

// taken resolves what is moved or removed: an empty path, elsewhere the default directory, is a variable without value here.
func (s *fsService) taken(ctx context.Context, path string) (account, string, error) {
	if path == "" {
		return account{}, "", wireError(connect.CodeInvalidArgument, "refused to move or remove an empty path, which means the default directory")
	}
	return s.resolve(ctx, path)
}

func (s *fsService) Move(ctx context.Context, req *connect.Request[pb.MoveRequest]) (*connect.Response[pb.MoveResponse], error) {
	_, from, err := s.taken(ctx, req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	user, to, err := s.taken(ctx, req.Msg.GetDestination())
	if err != nil {
		return nil, err
	}
	if err := s.move(&user, from, to); err != nil {
		return nil, fsError(err, "source file not found", "error renaming")
	}
	entry, err := s.stat(to)
	return connect.NewResponse(&pb.MoveResponse{Entry: entry}), err
}

func (s *fsService) move(user *account, from, to string) (err error) {
	defer func() {
		errno, isErrno := errors.AsType[syscall.Errno](err)
		if _, inWay := errors.AsType[fileInWay](err); isErrno && !inWay {
			err = &os.LinkError{Op: "rename", Old: from, New: to, Err: errno}
		}
	}()
	source, err := walkPath(walk{users: s.users}, strings.TrimRight(from, "/"))
	if errors.Is(err, syscall.ENOTDIR) {
		return syscall.ENOTDIR
	} else if err != nil {
		return err
	}
	defer source.close()
	if source.name != "" && !source.exists() {
		return unix.ENOENT
	}
	target, err := walkPath(walk{users: s.users, mkdirs: user}, strings.TrimRight(to, "/"))
	if err != nil {
		return err
	}
	defer target.close()
	weaker, sameFile := source, source.st.Ino == target.st.Ino && source.st.Dev == target.st.Dev
	if source.as == nil {
		weaker = target
	}
	switch {
	case source.name == "" || target.name == "" || source.name == ".." || target.name == "..":
		return unix.EBUSY
	case source.as == nil && foreign(&source.dirs, &source.st):
		return unix.EPERM
	case target.kind() == unix.S_IFDIR && !(sameFile && from != to):
		return unix.EEXIST
	case source.as != nil && target.as != nil && target.as.uid != source.as.uid:
		return unix.EACCES
	}
	if source.kind() == unix.S_IFDIR {
		source.name += "/" // nothing else that is put in its place meanwhile is moved
	}
	exposed := shared(&source.dirs) || source.dirs.Uid != 0 && source.dirs.Uid != target.dirs.Uid
	elsewhere := !sameFile && idOf(&source.dirs) != idOf(&target.dirs)
	if exposed && elsewhere && source.as == nil && source.kind() != unix.S_IFDIR {
		return moveChecked(source, target, weaker)
	}
	return weaker.do(func() error { return rename(source, target) })
}

func rename(from, to *place) error { return unix.Renameat(from.dir, from.name, to.dir, to.name) }

// moveChecked moves out of a directory where somebody else can put a hard link to what is not his in the place of what was
// looked at. It is looked at again under a hidden name in the target's directory, where it is not his to change any more.
func moveChecked(source, target, weaker *place) error {
	hidden := target.hidden()
	return weaker.do(func() error {
		if err := rename(source, hidden); err != nil {
			return err
		}
		err := unix.Fstatat(hidden.dir, hidden.name, &hidden.st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && foreign(&source.dirs, &hidden.st) {
			err = unix.EPERM
		}
		if err == nil {
			err = rename(hidden, target)
		}
		if err != nil {
			rename(hidden, source)
		}
		return err
	})
}

func (s *fsService) Remove(ctx context.Context, req *connect.Request[pb.RemoveRequest]) (*connect.Response[pb.RemoveResponse], error) {
	_, path, err := s.taken(ctx, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	place, err := walkPath(walk{users: s.users}, strings.TrimRight(path, "/"))
	if err == nil {
		defer place.close()
		if err = (&os.PathError{Op: "RemoveAll", Path: path, Err: unix.EINVAL}); place.name != "" && place.name != ".." {
			err = place.do(func() error { return removeAll(ctx, place.dir, place.name, place.path, 0) })
		}
	}
	if err != nil && !errors.Is(err, syscall.ENOENT) {
		return nil, fsError(err, "", "error removing file or directory")
	}
	return connect.NewResponse(&pb.RemoveResponse{}), nil
}

// removeAll removes what has a name in a directory, on descriptors: links are removed, never followed.
func removeAll(ctx context.Context, dir int, name, path string, depth int) error {
	err := unix.Unlinkat(dir, name, 0)
	if err == unix.EISDIR || err == unix.EPERM { // the second may also mean a file that may not be removed
		f, openErr := openIn(dir, name, path, unix.O_DIRECTORY)
		if openErr == nil {
			openErr = empty(ctx, f, depth)
			f.Close()
		}
		if openErr == nil {
			err = unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
		} else if !errors.Is(openErr, unix.ENOTDIR) {
			return openErr
		}
	}
	if err == nil || err == unix.ENOENT {
		return nil
	}
	return &os.PathError{Op: "unlinkat", Path: path, Err: err}
}

func empty(ctx context.Context, dir *os.File, depth int) error {
	if depth > maxDepth {
		return &os.PathError{Op: "unlinkat", Path: dir.Name(), Err: unix.ENAMETOOLONG}
	}
	for {
		names, err := dir.Readdirnames(1024)
		if err == io.EOF {
			return ctx.Err()
		}
		for i := 0; i < len(names) && err == nil; i++ {
			err = removeAll(ctx, int(dir.Fd()), names[i], dir.Name()+"/"+names[i], depth+1)
		}
		if err == nil {
			_, err = dir.Seek(0, io.SeekStart) // some filesystems skip entries when others are removed meanwhile
		}
		if err = cmp.Or(err, ctx.Err()); err != nil {
			return err
		}
	}
}

// ---- watching ------------------------------------------------------------------------------------------------------

// pollingWatcher collects events for a client that asks for them. The service's mutex protects it.
type pollingWatcher struct {
	*watcher
	includeEntry bool
	kept         []watchEvent
	memory       *grant // for them
	failure      error
	asked        time.Time
}

func (s *fsService) watch(ctx context.Context, path string, recursive, networkMounts bool) (*watcher, error) {
	_, path, err := s.resolve(ctx, path)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return nil, fsError(err, fmt.Sprintf("path %s not found", path), "error getting path info")
	case !info.IsDir():
		return nil, wireError(connect.CodeInvalidArgument, "path %s not a directory", path)
	case !networkMounts && isNetwork(path):
		return nil, wireError(connect.CodeInvalidArgument, "cannot watch path on network filesystem: %s", path)
	}
	w, err := newWatcher(path, recursive, networkMounts, s.budget.grant(forWatches))
	if err != nil {
		return nil, fsError(err, fmt.Sprintf("path %s not found", path), "error creating watcher")
	}
	return w, nil
}

// ended counts a watcher that has lost events.
func (s *fsService) ended(err error) error {
	if errors.Is(err, errWatchOverflow) || errors.Is(err, errNotFetched) {
		s.overflows.Add(1)
	}
	return err
}

// tell makes the message of an event; its entry is what is there now.
func (s *fsService) tell(event watchEvent, root string, includeEntry bool) *pb.FilesystemEvent {
	message := &pb.FilesystemEvent{Name: valid(event.name), Type: pb.EventType(event.op)}
	if includeEntry && event.op != watchRemove && event.op != watchRename {
		message.Entry, _ = s.stat(filepath.Join(root, event.name))
	}
	return message
}

func (s *fsService) WatchDir(ctx context.Context, req *connect.Request[pb.WatchDirRequest], stream *connect.ServerStream[pb.WatchDirResponse]) error {
	w, err := s.watch(ctx, req.Msg.GetPath(), req.Msg.GetRecursive(), req.Msg.GetAllowNetworkMounts())
	if err != nil {
		return err
	}
	defer w.close()
	s.streams.Add(1)
	defer s.streams.Add(-1)
	if err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Start{Start: &pb.WatchDirResponse_StartEvent{}}}); err != nil {
		return err
	}
	interval := keepAliveInterval(req.Header(), s.keepAlive)
	keepAlive := time.NewTimer(interval)
	defer keepAlive.Stop()
	for {
		select {
		case batch, more := <-w.events:
			if !more {
				return fsError(s.ended(w.err), "", "watcher error")
			}
			for _, event := range batch {
				message := s.tell(event, w.root, req.Msg.GetIncludeEntry())
				if err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Filesystem{Filesystem: message}}); err != nil {
					return err
				}
			}
		case <-keepAlive.C:
			if err := stream.Send(&pb.WatchDirResponse{Event: &pb.WatchDirResponse_Keepalive{Keepalive: &pb.WatchDirResponse_KeepAlive{}}}); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		case <-s.stopping:
			return wireError(connect.CodeUnavailable, "envd is stopping")
		}
		keepAlive.Reset(interval)
	}
}

func (s *fsService) CreateWatcher(ctx context.Context, req *connect.Request[pb.CreateWatcherRequest]) (*connect.Response[pb.CreateWatcherResponse], error) {
	w, err := s.watch(ctx, req.Msg.GetPath(), req.Msg.GetRecursive(), req.Msg.GetAllowNetworkMounts())
	if err != nil {
		return nil, err
	}
	p := &pollingWatcher{watcher: w, includeEntry: req.Msg.GetIncludeEntry(), asked: time.Now(),
		memory: s.budget.grant(forWatches)}
	id := "w" + strings.ToLower(rand.Text()[:20])
	s.mu.Lock()
	s.watchers[id] = p
	s.mu.Unlock()
	go s.keep(p)
	return connect.NewResponse(&pb.CreateWatcherResponse{WatcherId: id}), nil
}

// keep collects a polling watcher's events until it ends. When there is no room for them, the watcher that keeps most ends.
func (s *fsService) keep(p *pollingWatcher) {
	for batch := range p.events {
		price := 0
		for _, event := range batch {
			price += eventPrice + len(event.name)
		}
		s.mu.Lock()
		for p.failure == nil && p.memory.tryTake(int64(price)) != nil {
			s.failLocked(s.keepsMostLocked(p), errNotFetched)
		}
		if p.failure == nil {
			p.kept = append(p.kept, batch...)
		}
		s.mu.Unlock()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failLocked(p, p.err)
}

// keepsMostLocked gives p, unless another one keeps more.
func (s *fsService) keepsMostLocked(p *pollingWatcher) *pollingWatcher {
	for _, other := range s.watchers {
		if other.memory.holds() > p.memory.holds() {
			p = other
		}
	}
	return p
}

// takeLocked gives what a polling watcher has kept.
func (s *fsService) takeLocked(p *pollingWatcher) (events []watchEvent) {
	events, p.kept = p.kept, nil
	p.memory.give(p.memory.holds())
	return events
}

func (s *fsService) failLocked(p *pollingWatcher, err error) {
	if s.takeLocked(p); p.failure == nil {
		p.failure = s.ended(err)
	}
}

func (s *fsService) GetWatcherEvents(ctx context.Context, req *connect.Request[pb.GetWatcherEventsRequest]) (*connect.Response[pb.GetWatcherEventsResponse], error) {
	memory := requestOf(ctx).memory
	s.mu.Lock()
	p := s.watchers[req.Msg.GetWatcherId()]
	s.mu.Unlock()
	if p == nil {
		return nil, wireError(connect.CodeNotFound, "watcher with id %s not found", req.Msg.GetWatcherId())
	}
	if err := memory.take(ctx, 2*p.memory.holds()); err != nil { // the events stay
		return nil, fsError(err, "", "cannot fetch events")
	}
	s.mu.Lock()
	events, failure := s.takeLocked(p), p.failure
	p.asked = time.Now()
	s.mu.Unlock()
	if failure != nil {
		return nil, fsError(failure, "", "watcher error")
	}
	res := &pb.GetWatcherEventsResponse{}
	entries := p.includeEntry
	for _, event := range events {
		message := s.tell(event, p.root, entries)
		if entry := message.Entry; entry != nil && memory.take(ctx, int64(entryPrice+3*proto.Size(entry))) != nil {
			message.Entry, entries = nil, false // there is no room for this and those that follow
		}
		res.Events = append(res.Events, message)
	}
	return connect.NewResponse(res), nil
}

func (s *fsService) RemoveWatcher(ctx context.Context, req *connect.Request[pb.RemoveWatcherRequest]) (*connect.Response[pb.RemoveWatcherResponse], error) {
	s.mu.Lock()
	p := s.watchers[req.Msg.GetWatcherId()]
	delete(s.watchers, req.Msg.GetWatcherId())
	s.mu.Unlock()
	if p == nil {
		return nil, wireError(connect.CodeNotFound, "watcher with id %s not found", req.Msg.GetWatcherId())
	}
	p.close()
	return connect.NewResponse(&pb.RemoveWatcherResponse{}), nil
}

// tick closes polling watchers that nobody asks any more; it is called about once a second.
func (s *fsService) tick(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, p := range s.watchers {
		if now.Sub(p.asked) > s.idle {
			delete(s.watchers, id)
			go p.close()
		}
	}
}
