// The Filesystem service: stat, list, make, move, remove; watching as a stream and by polling.
//
// A name that is not UTF-8, which a protobuf string cannot carry, is told with U+FFFD in place of its bad bytes.

package main

import (
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
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "envd/proto"
)

const (
	pollingEvents = 100_000   // kept for all polling watchers together
	pollingIdle   = time.Hour // after which one that nobody asks is closed
)

type fsService struct {
	users     *userDB
	settings  *settings
	keepAlive time.Duration
	stopping  <-chan struct{}

	kept atomic.Int64 // events of polling watchers

	mu       sync.Mutex // protects watchers
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
	if strings.IndexByte(resolved, 0) >= 0 {
		err = connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("a NUL byte in path %q", path))
	} else if err != nil {
		err = connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("failed to expand path '%s' for user '%s': %w", path, user.name, err))
	}
	return user, resolved, err
}

// fsError is the wire error for one of the kernel's: missing says what stands before ENOENT, "" that it is like any other.
func fsError(err error, missing, other string) error {
	code, prefix := connect.CodeInternal, other
	var inWay fileInWay
	switch {
	case missing != "" && errors.Is(err, syscall.ENOENT):
		code, prefix = connect.CodeNotFound, missing
	case errors.As(err, &inWay):
		return connect.NewError(code, inWay)
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM):
		code = connect.CodeResourceExhausted
	}
	return connect.NewError(code, fmt.Errorf("%s: %w", prefix, err))
}

// ---- entries -------------------------------------------------------------------------------------------------------

// entries makes EntryInfo messages; what repeats from entry to entry is looked up once.
type entries struct {
	users          *userDB
	owners, groups map[uint32]string
	permissions    map[uint32]string
}

func (s *fsService) entries() *entries {
	return &entries{s.users, map[uint32]string{}, map[uint32]string{}, map[uint32]string{}}
}

func once(known map[uint32]string, key uint32, find func(uint32) string) string {
	value, ok := known[key]
	if !ok {
		value = valid(find(key))
		known[key] = value
	}
	return value
}

// permissionText writes a mode as Go does.
func permissionText(mode uint32) string {
	m := os.FileMode(mode & 0o777)
	for _, bit := range []struct {
		mask, value uint32
		is          os.FileMode
	}{{unix.S_IFMT, unix.S_IFDIR, os.ModeDir}, {unix.S_IFMT, unix.S_IFLNK, os.ModeSymlink}, {unix.S_IFMT, unix.S_IFIFO, os.ModeNamedPipe},
		{unix.S_IFMT, unix.S_IFSOCK, os.ModeSocket}, {unix.S_IFMT, unix.S_IFBLK, os.ModeDevice}, {unix.S_IFMT, unix.S_IFCHR, os.ModeDevice | os.ModeCharDevice},
		{unix.S_ISUID, unix.S_ISUID, os.ModeSetuid}, {unix.S_ISGID, unix.S_ISGID, os.ModeSetgid}, {unix.S_ISVTX, unix.S_ISVTX, os.ModeSticky}} {
		if mode&bit.mask == bit.value {
			m |= bit.is
		}
	}
	return m.String()
}

func (e *entries) stat(path string) (*pb.EntryInfo, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return nil, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return e.entry(filepath.Base(path), path, path, &st), nil
}

// entry describes what is at a path; shown is the path as the client knows it.
func (e *entries) entry(name, path, shown string, st *unix.Stat_t) *pb.EntryInfo {
	entry := &pb.EntryInfo{Name: valid(name), Path: valid(shown), Size: st.Size, Permissions: once(e.permissions, st.Mode, permissionText),
		Owner: once(e.owners, st.Uid, e.users.userName), Group: once(e.groups, st.Gid, e.users.groupName)}
	if st.Mtim.Nano() != 0 {
		entry.ModifiedTime = &timestamppb.Timestamp{Seconds: st.Mtim.Sec, Nanos: int32(st.Mtim.Nsec)}
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
	if entry.Type == pb.FileType_FILE_TYPE_UNSPECIFIED || entry.SymlinkTarget != nil {
		return entry
	}
	if n, err := unix.Llistxattr(path, nil); err == nil && n > 0 {
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
	entry, err := s.entries().stat(path)
	if err != nil {
		return nil, fsError(err, "file not found", "error getting file info")
	}
	return connect.NewResponse(&pb.StatResponse{Entry: entry}), nil
}

func (s *fsService) ListDir(ctx context.Context, req *connect.Request[pb.ListDirRequest]) (*connect.Response[pb.ListDirResponse], error) {
	_, path, err := s.resolve(ctx, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil && (strings.Contains(err.Error(), "too many links") || errors.Is(err, syscall.ELOOP)) {
		return nil, connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("cyclic symlink or chain >255 links at %q", path))
	} else if err != nil {
		return nil, fsError(err, "path not found", "error resolving symlink")
	}
	info, err := os.Stat(resolved)
	if err != nil {
		return nil, fsError(err, "path not found", "error getting file info")
	} else if !info.IsDir() {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path is not a directory: %s", resolved))
	}
	res := &pb.ListDirResponse{}
	err = s.entries().list(ctx, resolved, filepath.Clean(path), max(req.Msg.GetDepth(), 1), &res.Entries)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	} else if err != nil {
		return nil, fsError(err, "", "error reading directory "+path)
	}
	return connect.NewResponse(res), nil
}

// list appends what is in a directory, in the order of a walk; the entries' paths begin with shown.
func (e *entries) list(ctx context.Context, dir, shown string, depth uint32, to *[]*pb.EntryInfo) error {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return err
	}
	slices.Sort(names)
	*to = slices.Grow(*to, len(names))
	for _, name := range names {
		var st unix.Stat_t
		if unix.Fstatat(int(f.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
			continue // gone by now
		}
		path, shownPath := strings.TrimSuffix(dir, "/")+"/"+name, ""
		if shownPath = path; dir != shown {
			shownPath = filepath.Join(shown, name)
		}
		*to = append(*to, e.entry(name, path, shownPath, &st))
		if st.Mode&unix.S_IFMT == unix.S_IFDIR && depth > 1 {
			err := e.list(ctx, path, shownPath, depth-1, to)
			if err != nil && !errors.Is(err, syscall.ENOENT) && !errors.Is(err, syscall.ENOTDIR) {
				return err
			}
		}
	}
	return ctx.Err()
}

// ---- changes -------------------------------------------------------------------------------------------------------

func (s *fsService) MakeDir(ctx context.Context, req *connect.Request[pb.MakeDirRequest]) (*connect.Response[pb.MakeDirResponse], error) {
	user, path, err := s.resolve(ctx, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	if info, err := os.Stat(path); err == nil && info.IsDir() {
		return nil, connect.NewError(connect.CodeAlreadyExists, fmt.Errorf("directory already exists: %s", path))
	} else if err == nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path already exists but it is not a directory: %s", path))
	} else if !errors.Is(err, syscall.ENOENT) {
		return nil, fsError(err, "", "error getting file info")
	}
	place, err := walkPath(walk{users: s.users, mkdirs: &user}, path+"/")
	if err != nil {
		return nil, fsError(err, "", "failed to create directory")
	}
	place.close()
	entry, err := s.entries().stat(path)
	if err != nil {
		return nil, fsError(err, "file not found", "error getting file info")
	}
	return connect.NewResponse(&pb.MakeDirResponse{Entry: entry}), nil
}

func (s *fsService) Move(ctx context.Context, req *connect.Request[pb.MoveRequest]) (*connect.Response[pb.MoveResponse], error) {
	_, from, err := s.resolve(ctx, req.Msg.GetSource())
	if err != nil {
		return nil, err
	}
	user, to, err := s.resolve(ctx, req.Msg.GetDestination())
	if err != nil {
		return nil, err
	}
	if err := s.move(&user, from, to); err != nil {
		return nil, fsError(err, "source file not found", "error renaming")
	}
	entry, err := s.entries().stat(to)
	if err != nil {
		return nil, fsError(err, "file not found", "error getting file info")
	}
	return connect.NewResponse(&pb.MoveResponse{Entry: entry}), nil
}

func (s *fsService) move(user *account, from, to string) error {
	renameError := func(err error) error {
		var inWay fileInWay
		if err == nil || errors.As(err, &inWay) {
			return err
		}
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: errnoOf(err)}
	}
	source, err := walkPath(walk{users: s.users}, strings.TrimRight(from, "/"))
	if errors.Is(err, syscall.ENOTDIR) {
		err = syscall.ENOTDIR
	}
	if err != nil {
		return renameError(err)
	}
	defer source.close()
	if source.name != "" && !source.exists() {
		return renameError(unix.ENOENT)
	}
	target, err := walkPath(walk{users: s.users, mkdirs: user}, strings.TrimRight(to, "/"))
	if err != nil {
		return renameError(err)
	}
	defer target.close()
	sameFile := source.st.Ino == target.st.Ino && source.st.Dev == target.st.Dev
	switch {
	case source.name == "" || target.name == "" || source.name == ".." || target.name == "..":
		return renameError(unix.EBUSY)
	case target.kind() == unix.S_IFDIR && !(sameFile && from != to):
		return renameError(unix.EEXIST)
	}
	weaker := source
	if source.as == nil {
		weaker = target
	} else if target.as != nil && target.as.uid != source.as.uid {
		return renameError(unix.EACCES)
	}
	return renameError(weaker.do(func() error { return unix.Renameat(source.dir, source.name, target.dir, target.name) }))
}

func errnoOf(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

func (s *fsService) Remove(ctx context.Context, req *connect.Request[pb.RemoveRequest]) (*connect.Response[pb.RemoveResponse], error) {
	_, path, err := s.resolve(ctx, req.Msg.GetPath())
	if err != nil {
		return nil, err
	}
	trimmed := strings.TrimRight(path, "/")
	if base := trimmed[strings.LastIndexByte(trimmed, '/')+1:]; base == "" || base == "." || base == ".." {
		return nil, fsError(&os.PathError{Op: "RemoveAll", Path: path, Err: unix.EINVAL}, "", "error removing file or directory")
	}
	place, err := walkPath(walk{users: s.users}, trimmed)
	if err == nil {
		defer place.close()
		err = place.do(func() error { return removeAll(ctx, place.dir, place.name, place.path, 0) })
	}
	if err != nil && !errors.Is(err, syscall.ENOENT) {
		return nil, fsError(err, "", "error removing file or directory")
	}
	return connect.NewResponse(&pb.RemoveResponse{}), nil
}

// removeAll removes what has a name in a directory, on descriptors: links are removed, never followed.
func removeAll(ctx context.Context, dir int, name, path string, depth int) error {
	err := unix.Unlinkat(dir, name, 0)
	if err == nil || err == unix.ENOENT {
		return nil
	}
	if err != unix.EISDIR && err != unix.EPERM {
		return &os.PathError{Op: "unlinkat", Path: path, Err: err}
	}
	fd, openErr := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if openErr == unix.ENOTDIR {
		openErr = err // a file that may not be removed
	}
	if depth > maxDepth {
		openErr = unix.ENAMETOOLONG
	}
	if openErr != nil {
		return &os.PathError{Op: "unlinkat", Path: path, Err: openErr}
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	for {
		names, readErr := f.Readdirnames(1024)
		for _, child := range names {
			if err := removeAll(ctx, fd, child, path+"/"+child, depth+1); err != nil {
				return err
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if len(names) > 0 {
			// Some filesystems skip entries when others are removed meanwhile.
			if _, err := f.Seek(0, io.SeekStart); err == nil {
				continue
			}
		}
		if err := unix.Unlinkat(dir, name, unix.AT_REMOVEDIR); err != nil && err != unix.ENOENT {
			return &os.PathError{Op: "unlinkat", Path: path, Err: errors.Join(err, ignoreEOF(readErr))}
		}
		return nil
	}
}

func ignoreEOF(err error) error {
	if err == io.EOF {
		return nil
	}
	return err
}

// ---- watching ------------------------------------------------------------------------------------------------------

type pollingWatcher struct {
	*watcher
	root         string
	includeEntry bool

	mu    sync.Mutex // protects what follows
	kept  []watchEvent
	err   error
	asked time.Time
}

var eventTypes = map[watchOp]pb.EventType{watchCreate: pb.EventType_EVENT_TYPE_CREATE, watchWrite: pb.EventType_EVENT_TYPE_WRITE,
	watchRemove: pb.EventType_EVENT_TYPE_REMOVE, watchRename: pb.EventType_EVENT_TYPE_RENAME, watchChmod: pb.EventType_EVENT_TYPE_CHMOD}

var networkFilesystems = []int64{unix.NFS_SUPER_MAGIC, 0xFF534D42 /* CIFS */, unix.SMB_SUPER_MAGIC, unix.SMB2_SUPER_MAGIC, unix.FUSE_SUPER_MAGIC}

type watchRequest interface {
	GetPath() string
	GetRecursive() bool
	GetAllowNetworkMounts() bool
}

func (s *fsService) watch(ctx context.Context, req watchRequest) (*watcher, string, error) {
	_, path, err := s.resolve(ctx, req.GetPath())
	if err != nil {
		return nil, "", err
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, "", fsError(err, fmt.Sprintf("path %s not found", path), "error getting path info")
	} else if !info.IsDir() {
		return nil, "", connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("path %s not a directory", path))
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err == nil && !req.GetAllowNetworkMounts() && slices.Contains(networkFilesystems, int64(uint32(fs.Type))) {
		return nil, "", connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("cannot watch path on network filesystem: %s", path))
	}
	w, err := newWatcher(path, req.GetRecursive())
	if errors.Is(err, errInstanceLimit) || errors.Is(err, errWatchLimit) {
		return nil, "", connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("error creating watcher: %w", err))
	} else if err != nil {
		return nil, "", fsError(err, fmt.Sprintf("path %s not found", path), fmt.Sprintf("error adding path %s to watcher", path))
	}
	return w, path, nil
}

func watchError(err error) error {
	code := connect.CodeInternal
	if errors.Is(err, errWatchLimit) {
		code = connect.CodeResourceExhausted
	}
	return connect.NewError(code, fmt.Errorf("watcher error: %w", err))
}

// tell makes the message of an event; its entry is what is there now.
func (s *fsService) tell(event watchEvent, root string, includeEntry bool, e *entries) *pb.FilesystemEvent {
	message := &pb.FilesystemEvent{Name: valid(event.name), Type: eventTypes[event.op]}
	if includeEntry && event.op != watchRemove && event.op != watchRename {
		message.Entry, _ = e.stat(filepath.Join(root, event.name))
	}
	return message
}

func (s *fsService) WatchDir(ctx context.Context, req *connect.Request[pb.WatchDirRequest], stream *connect.ServerStream[pb.WatchDirResponse]) error {
	w, root, err := s.watch(ctx, req.Msg)
	if err != nil {
		return err
	}
	defer w.close()
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
				return watchError(w.err)
			}
			e := s.entries()
			for _, event := range batch {
				message := s.tell(event, root, req.Msg.GetIncludeEntry(), e)
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
			return connect.NewError(connect.CodeUnavailable, errors.New("envd is stopping"))
		}
		keepAlive.Reset(interval)
	}
}

func (s *fsService) CreateWatcher(ctx context.Context, req *connect.Request[pb.CreateWatcherRequest]) (*connect.Response[pb.CreateWatcherResponse], error) {
	w, root, err := s.watch(ctx, req.Msg)
	if err != nil {
		return nil, err
	}
	p := &pollingWatcher{watcher: w, root: root, includeEntry: req.Msg.GetIncludeEntry(), asked: time.Now()}
	id := "w" + strings.ToLower(rand.Text()[:20])
	s.mu.Lock()
	s.watchers[id] = p
	s.mu.Unlock()
	go s.keep(p)
	return connect.NewResponse(&pb.CreateWatcherResponse{WatcherId: id}), nil
}

// keep collects a polling watcher's events until it ends.
func (s *fsService) keep(p *pollingWatcher) {
	for batch := range p.events {
		p.mu.Lock()
		if s.kept.Add(int64(len(batch))) <= pollingEvents && p.err == nil {
			p.kept = append(p.kept, batch...)
		} else {
			s.kept.Add(-int64(len(batch)))
			s.endLocked(p, fmt.Errorf("more than %d events were not fetched", pollingEvents))
		}
		p.mu.Unlock()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	s.endLocked(p, p.watcher.err)
}

func (s *fsService) endLocked(p *pollingWatcher, err error) {
	if p.err == nil {
		s.kept.Add(-int64(len(p.kept)))
		p.kept, p.err = nil, err
	}
}

func (s *fsService) watcher(id string, remove bool) (*pollingWatcher, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.watchers[id]
	if p == nil {
		return nil, connect.NewError(connect.CodeNotFound, fmt.Errorf("watcher with id %s not found", id))
	}
	if remove {
		delete(s.watchers, id)
	}
	return p, nil
}

func (s *fsService) GetWatcherEvents(ctx context.Context, req *connect.Request[pb.GetWatcherEventsRequest]) (*connect.Response[pb.GetWatcherEventsResponse], error) {
	p, err := s.watcher(req.Msg.GetWatcherId(), false)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	events, failure := p.kept, p.err
	p.kept, p.asked = nil, time.Now()
	p.mu.Unlock()
	s.kept.Add(-int64(len(events)))
	if failure != nil {
		return nil, watchError(failure)
	}
	res, e := &pb.GetWatcherEventsResponse{}, s.entries()
	for _, event := range events {
		res.Events = append(res.Events, s.tell(event, p.root, p.includeEntry, e))
	}
	return connect.NewResponse(res), nil
}

func (s *fsService) RemoveWatcher(ctx context.Context, req *connect.Request[pb.RemoveWatcherRequest]) (*connect.Response[pb.RemoveWatcherResponse], error) {
	p, err := s.watcher(req.Msg.GetWatcherId(), true)
	if err != nil {
		return nil, err
	}
	p.close()
	return connect.NewResponse(&pb.RemoveWatcherResponse{}), nil
}

// tick closes polling watchers that nobody asks any more; it is called about once a second.
func (s *fsService) tick(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, p := range s.watchers {
		p.mu.Lock()
		idle := now.Sub(p.asked) > pollingIdle
		p.mu.Unlock()
		if idle {
			delete(s.watchers, id)
			go p.close()
		}
	}
}
