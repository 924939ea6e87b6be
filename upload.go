// Uploads, and putting pieces together: how a file is replaced.
//
// It stays as it was until its new content is complete. Up to wholeUpload bytes are read first and written in place, where
// inode, links and watchers see what they always saw: room is made (fallocate, which leaves the size: a write that fails at once has
// changed nothing), then written, then cut to length. More goes to a hidden file beside the target, which takes on its mode, owner
// and attributes and then its name. Neither touches the content before owner and metadata are set. No upload leaves a set-ID
// bit, and none puts an owner or a mode back.

package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	wholeUpload = 1 << 20 // bytes of an upload that are read before its target is touched
	partBuffer  = 64 << 10
)

// written is what the answer to an upload says of one file.
type written struct {
	Path     string            `json:"path"`
	Name     string            `json:"name"`
	Type     string            `json:"type"`
	Metadata map[string]string `json:"metadata,omitempty"`
}

// uploadRequest is one request's part in all files it uploads.
type uploadRequest struct {
	*fileService
	turn
	memory   *grant // of content that is kept before its target is touched
	user     account
	query    url.Values
	metadata map[string]string // attribute names and values
	body     io.Reader
	length   int64
	files    []written
}

func (s *fileService) upload(w http.ResponseWriter, r *http.Request) {
	u := &uploadRequest{fileService: s, turn: turn{ctx: r.Context()}, query: r.URL.Query(), files: []written{}}
	u.memory = s.budget.grant(forFiles)
	defer u.memory.close()
	defer u.giveUp()
	err := u.receive(r)
	s.answer(w, u.files, err)
}

// pacedBody is read without a place among atFiles: the client sets the pace.
type pacedBody struct {
	io.Reader
	turn *turn
}

func (b pacedBody) Read(p []byte) (n int, err error) {
	if !b.turn.taken {
		return b.Reader.Read(p)
	}
	b.turn.giveUp()
	n, err = b.Reader.Read(p)
	return n, cmp.Or(b.turn.take(time.Minute), err)
}

// requestMetadata reads the X-Metadata- headers as attributes.
func requestMetadata(h http.Header) (map[string]string, error) {
	metadata, total := map[string]string{}, 0
	for name, values := range h {
		key, ok := strings.CutPrefix(strings.ToLower(name), "x-metadata-")
		if !ok || key == "" {
			continue
		}
		value := values[0]
		if len(key) > 246 {
			return nil, badRequest("invalid metadata: metadata key \"%s\" exceeds 246 bytes", key)
		}
		for i := range len(value) {
			if value[i] < 0x20 || value[i] > 0x7e {
				return nil, badRequest("invalid metadata: metadata value for key \"%s\" contains "+
					"non-printable-ASCII byte 0x%02X at offset %d", key, value[i], i)
			}
		}
		metadata[metadataPrefix+key] = value
		total += len(metadataPrefix) + len(key) + len(value)
	}
	if total > 4096 {
		return nil, badRequest("invalid metadata: total metadata size %d exceeds 4096 bytes", total)
	}
	return metadata, nil
}

func (u *uploadRequest) receive(r *http.Request) error {
	name, err := u.acting(r, u.query, "write")
	if err != nil {
		return err
	}
	u.body, u.length = pacedBody{r.Body, &u.turn}, r.ContentLength
	coding, _, _ := strings.Cut(r.Header.Get("Content-Encoding"), ";")
	switch coding = strings.ToLower(strings.TrimSpace(coding)); coding {
	case "", "identity":
	case "gzip":
		if u.body, err = gzip.NewReader(u.body); err != nil {
			return badRequest("error decompressing request body: failed to create gzip reader: %v", err)
		}
	default:
		return badRequest("error decompressing request body: unsupported Content-Encoding: %s, supported: [gzip]", coding)
	}
	if u.user, err = u.fileService.user(name); err != nil {
		return err
	}
	if u.metadata, err = requestMetadata(r.Header); err != nil {
		return err
	}
	contentType := r.Header.Get("Content-Type")
	mediaType, params, err := mime.ParseMediaType(contentType)
	raw, archive := mediaType == "application/octet-stream", mediaType == "application/x-tar"
	switch {
	case strings.HasPrefix(mediaType, "multipart/") && params["boundary"] == "":
		return fmt.Errorf("error parsing multipart form: %w", http.ErrMissingBoundary)
	case strings.HasPrefix(mediaType, "multipart/"):
		if u.length < 0 || u.length > partBuffer {
			u.body = bufio.NewReaderSize(u.body, partBuffer) // the multipart reader takes 4 KiB at a time, and each costs a turn
		}
		return u.receiveParts(multipart.NewReader(u.body, params["boundary"]))
	case archive && u.mayArchive(r) != nil:
		return u.mayArchive(r)
	case (raw || archive) && !u.query.Has("path"):
		return badRequest("path query parameter is required for raw body upload")
	case raw:
		return u.receiveFile(u.query.Get("path"), u.body)
	case archive:
		return u.receiveTar()
	case err != nil && strings.HasPrefix(contentType, "multipart/"):
		return fmt.Errorf("error parsing multipart form: %w", err)
	}
	return badRequest("unsupported content type: %s, expected multipart/form-data or application/octet-stream", contentType)
}

func (u *uploadRequest) receiveParts(parts *multipart.Reader) error {
	for {
		part, err := parts.NextPart()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("error reading form: %w", err)
		}
		if part.FormName() != "file" {
			continue // NextPart passes over what is left of it
		}
		path := u.query.Get("path")
		if !u.query.Has("path") {
			// Part.FileName would leave out the directories.
			_, params, _ := mime.ParseMediaType(part.Header.Get("Content-Disposition"))
			if path = params["filename"]; path == "" {
				return badRequest("error getting multipart custom part file name: filename not found in Content-Disposition header")
			}
		}
		if err := u.receiveFile(path, gathered{part}); err != nil {
			return err
		}
	}
}

// gathered makes large pieces of the 4 KiB that a part gives at a time.
type gathered struct{ *multipart.Part }

func (g gathered) Read(p []byte) (n int, err error) {
	for n <= len(p)/2 && err == nil {
		var more int
		more, err = g.Part.Read(p[n:])
		n += more
	}
	return n, err
}

func (u *uploadRequest) receiveFile(path string, body io.Reader) error {
	path, err := u.resolve(u.user, path)
	if err != nil {
		return err
	}
	same := func(f written) bool { return f.Path == path }
	if slices.ContainsFunc(u.files, same) {
		text := fmt.Sprintf("you cannot upload multiple files to the same path '%s' in one upload request, "+
			"only the first specified file was uploaded", path)
		var others []string
		for _, f := range slices.DeleteFunc(u.files, same) {
			others = append(others, f.Path)
		}
		if len(others) > 1 {
			text += ", also the following files were uploaded: " + strings.Join(others, ", ")
		}
		return badRequest("%s", text)
	}
	metadata, err := u.put(path, body)
	if isFull(err) && u.length > 0 {
		return diskFull(err, "attempted to write %d bytes: "+textDiskFull, u.length)
	} else if isFull(err) {
		return diskFull(err, textDiskFull)
	} else if err != nil {
		return err
	}
	u.files = append(u.files, written{Path: path, Name: filepath.Base(path), Type: "file", Metadata: metadata})
	return nil
}

// ---- replacing a file ----------------------------------------------------------------------------------------------

var (
	errNotInPlace  = errors.New("no fallocate here") // the filesystem cannot make room for content beforehand
	errNotByRename = errors.New("the file cannot be replaced")
)

const textDiskFull = "not enough disk space available"

// put makes what a reader gives the content of a file and answers the file's metadata, as it is on disk then.
func (u *uploadRequest) put(path string, body io.Reader) (map[string]string, error) {
	content, whole, err := u.readWhole(body)
	defer func() { u.memory.give(int64(cap(content))) }()
	if err != nil {
		return nil, fmt.Errorf("error writing file: %w", err)
	}
	if err := u.take(patience); err != nil {
		return nil, err
	}
	for attempt := 0; ; attempt++ {
		r, err := u.target(path, u.user, u.metadata)
		if err != nil {
			return nil, err
		}
		err = errNotInPlace
		if whole {
			err = r.inPlace(bytes.NewReader(content), int64(len(content)))
		}
		if errors.Is(err, errNotInPlace) {
			err = r.beside(func(f storing) error {
				_, err := f.Write(content)
				if err == nil && !whole {
					u.memory.give(int64(cap(content)))
					content = nil
					err = copyAll(u.ctx, f, body)
				}
				return err
			})
		}
		r.close()
		// Others make and remove files, too: what was read whole can be tried again.
		if raced := errors.Is(err, unix.EEXIST) || errors.Is(err, unix.ENOENT); !raced || !whole || attempt == 3 {
			return r.stored, err
		}
	}
}

// readWhole reads a body into memory, as far as there is some for it. What it gives is taken from the request's grant.
func (u *uploadRequest) readWhole(body io.Reader) (content []byte, whole bool, err error) {
	size := 8 << 10
	if 0 < u.length && u.length < int64(size) {
		size = int(u.length) + 1
	}
	for ; ; size = min(cap(content)*2, wholeUpload+1) {
		if grown := int64(size - cap(content)); grown == 0 || u.memory.tryTake(grown) != nil {
			return content, false, nil
		}
		content = append(make([]byte, 0, size), content...)
		for len(content) < size {
			n, err := body.Read(content[len(content):size])
			content = content[:len(content)+n]
			if err == io.EOF {
				return content, true, nil
			} else if err != nil {
				return content, false, err
			}
		}
	}
}

// target goes to a file that is to be replaced or made.
func (s *fileService) target(path string, owner account, metadata map[string]string) (*replacement, error) {
	if name := path[strings.LastIndexByte(path, '/')+1:]; name == "" || name == "." || name == ".." {
		return nil, badRequest("path is a directory: %s", path) // before any is made
	}
	p, err := walkPath(walk{users: s.users, mkdirs: &owner, follow: true}, path)
	switch {
	case err != nil:
		return nil, fmt.Errorf("error ensuring directories: %w", err)
	case p.name == "" || p.kind() == unix.S_IFDIR:
		err = badRequest("path is a directory: %s", path)
	case p.exists() && p.kind() != unix.S_IFREG:
		err = badRequest("path '%s' is not a regular file", path)
	}
	if err != nil {
		p.close()
		return nil, err
	}
	return &replacement{place: p, owner: owner, metadata: metadata}, nil
}

// replacement is a file that is being replaced, or made.
type replacement struct {
	*place
	owner    account
	metadata map[string]string  // nil: as it is
	stored   map[string]string  // the metadata afterwards
	dress    func(fd int) error // instead of owner and metadata
	forced   bool               // in place, even where no room can be made beforehand
}

// inPlace writes n bytes over what is there, or into a new file. It does not wait for ever for another one who does.
//
// The order is what keeps a failure from leaving power: of all that is done before the content only attributes are undone.
// Who has had the file open, mapped even, can write a program into it at any time, so an owner or a mode that were put
// back might meet what another upload, or another one's chmod(2), has made of it meanwhile.
func (r *replacement) inPlace(content io.Reader, n int64) error {
	if err := mayStore(r.dir, n-r.st.Blocks*512); err != nil {
		return err
	}
	flags, existed := os.O_WRONLY, r.exists()
	if !existed {
		flags |= os.O_CREATE | os.O_EXCL
	}
	fd, err := r.openFd(flags, 0o666)
	if errors.Is(err, unix.ETXTBSY) && !r.forced {
		return errNotInPlace
	} else if err != nil {
		return openError(err)
	}
	defer unix.Close(fd)
	unlock, ok := locks.lock(idOf(&r.st), 2*patience)
	if !ok && r.forced {
		return httpErrorf(http.StatusServiceUnavailable, "path '%s' is being written", r.path)
	} else if !ok {
		return errNotInPlace
	}
	defer unlock()
	if err = unix.Fstat(fd, &r.st); err != nil {
		err = openError(err)
	} else {
		existed = existed || r.st.Size > 0 // by now
		err = r.overwrite(fd, existed, content, n)
	}
	if err != nil && !existed {
		r.unlink()
	}
	return err
}

// overwrite takes the steps on the open file, which is locked.
func (r *replacement) overwrite(fd int, existed bool, content io.Reader, n int64) error {
	undo, err := r.withMetadata(fd)
	if err == nil && existed {
		err = r.makeRoom(fd, n)
	}
	var left string
	if err == nil {
		left, err = give(fd, r.as, r.owner)
	}
	var wrote int64
	if err == nil {
		if wrote, err = io.Copy(fdWriter(fd), content); err == nil && n < r.st.Size {
			err = unix.Ftruncate(fd, n)
		}
		if err == nil {
			return nil
		}
		err = fmt.Errorf("error writing file: %w", err)
	}
	if wrote > 0 {
		left += fmt.Sprintf("; %d bytes of the new content are written over the old", wrote)
	} else {
		undo()
	}
	if !existed || left == "" {
		return err
	}
	return &failedUpload{err, left}
}

// failedUpload is an error with what is left of an upload that failed: what could not be put back.
type failedUpload struct {
	error
	left string
}

func (e *failedUpload) Error() string { return e.error.Error() + e.left }
func (e *failedUpload) Unwrap() error { return e.error }

// diskFull is the error for the client, and still says what is left.
func diskFull(err error, format string, args ...any) error {
	if failed, ok := errors.AsType[*failedUpload](err); ok {
		format, args = format+"%s", append(args, failed.left)
	}
	return httpErrorf(http.StatusInsufficientStorage, format, args...)
}

// makeRoom reserves what n bytes need, and leaves the size as it is.
func (r *replacement) makeRoom(fd int, n int64) error {
	if n == 0 {
		return nil
	}
	err := retry(func() error { return unix.Fallocate(fd, unix.FALLOC_FL_KEEP_SIZE, 0, n) }) // tmpfs breaks off for any signal
	switch {
	case err == nil:
		return nil
	case err != unix.EOPNOTSUPP && err != unix.ENOSYS:
		unix.Ftruncate(fd, r.st.Size) // what there was of it goes
		return err
	case r.forced || isKernels(fd):
		return nil
	}
	return errNotInPlace
}

const setIDs = unix.S_ISUID | unix.S_ISGID

// give makes an open file an account's, for good. Its set-ID bits go before it changes hands, and once more after: its old
// owner may have set them again meanwhile. It says what it has changed.
func give(fd int, as *account, to account) (done string, err error) {
	for range 2 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return done, os.NewSyscallError("fstat", err)
		}
		if st.Mode&setIDs != 0 {
			if err := unix.Fchmod(fd, st.Mode&0o7777&^setIDs); err != nil {
				return done, fmt.Errorf("error clearing set-ID bits: %w", err)
			}
			done += "; it has lost its set-ID bits"
		}
		if st.Uid == to.uid && st.Gid == to.gid {
			return done, nil
		}
		if err := chown(fd, &st, as, to); err != nil {
			return done, fmt.Errorf("error changing file ownership: %w", err)
		}
		done += fmt.Sprintf("; its owner is %d:%d now", to.uid, to.gid)
	}
	return done, nil
}

func openError(err error) error {
	if isFull(err) {
		return httpErrorf(http.StatusInsufficientStorage, "not enough inodes available: %v", err)
	}
	return fmt.Errorf("error opening file: %w", err)
}

// fdWriter is a file without the system calls that os.NewFile makes.
type fdWriter int

func (fd fdWriter) Write(p []byte) (done int, err error) {
	for n := 1; done < len(p) && n > 0 || err == unix.EINTR; { // FUSE may take nothing without an error; io.Copy has one for that
		n, err = unix.Write(int(fd), p[done:])
		done += max(n, 0)
	}
	return done, err
}

// withMetadata gives an open file its metadata, which can be undone.
func (r *replacement) withMetadata(fd int) (undo func(), err error) {
	if r.metadata == nil {
		return func() {}, nil
	}
	old := fileXattrs(fd, isMetadata)
	undo = func() { setXattrs(fd, old, r.metadata) }
	if err = setXattrs(fd, r.metadata, old); err != nil && isFull(err) {
		err = httpErrorf(http.StatusInsufficientStorage, "not enough space for file metadata: %v", err)
	} else if err == unix.EOPNOTSUPP {
		slog.Warn("no extended attributes here; metadata is ignored", "logger", "files", "path", r.path)
		err = nil
	} else if err != nil {
		err = fmt.Errorf("error setting file metadata: %w", err)
	}
	if len(r.metadata) > 0 {
		r.stored = metadataOf(fileXattrs(fd, isMetadata))
	}
	return undo, err
}

// setXattrs sets the wanted attributes, then takes away those of the old that are not wanted.
func setXattrs(fd int, wanted, old map[string]string) error {
	for name, value := range wanted {
		if was, is := old[name]; is && was == value {
			continue
		}
		if err := unix.Fsetxattr(fd, name, []byte(value), 0); err != nil {
			return err
		}
	}
	for name := range old {
		if _, is := wanted[name]; !is {
			unix.Fremovexattr(fd, name)
		}
	}
	return nil
}

// beside fills a hidden file in the same directory and gives it the target's name.
func (r *replacement) beside(fill func(f storing) error) error {
	temp := r.hidden()
	mode := uint32(0o600) // nobody else reads what is for a file that he may not read
	if !r.exists() && r.dress == nil {
		mode = 0o666
	}
	f, err := temp.open(os.O_RDWR|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return openError(err)
	}
	defer f.Close()
	defer temp.unlink() // once it is renamed nothing has this name
	if err := fill(storing{f}); err != nil {
		return fmt.Errorf("error writing file: %w", err)
	}
	if r.st.Nlink <= 1 {
		if err := r.replaceBy(temp, int(f.Fd())); err != errNotByRename {
			return err
		}
	}
	// The target cannot be replaced: hard links, a mount on it, a sticky directory, more attributes than are copied.
	n, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return os.NewSyscallError("lseek", err)
	}
	r.forced = true
	return r.inPlace(io.NewSectionReader(f, 0, n), n)
}

// replaceBy makes a complete file all that the target is to be, but never set-ID, and gives it the target's name.
func (r *replacement) replaceBy(temp *place, fd int) error {
	switch {
	case r.dress != nil:
		if err := r.dress(fd); err != nil {
			return err
		}
	case r.exists():
		if err := r.copyAttributes(fd); err != nil {
			return err
		}
	}
	if r.dress == nil {
		_, err := r.withMetadata(fd)
		if err == nil {
			_, err = give(fd, r.as, r.owner)
		}
		if err == nil && r.exists() {
			err = unix.Fchmod(fd, r.st.Mode&0o777)
		}
		if err != nil {
			return err
		}
	}
	err := r.do(func() error { return unix.Renameat(temp.dir, temp.name, r.dir, r.name) })
	switch {
	case err == nil:
		return nil
	case !r.exists() || isFull(err):
		return &os.PathError{Op: "rename", Path: r.path, Err: err}
	}
	return errNotByRename
}

// copyAttributes gives a new file the old one's access list, security labels and attributes. It would rather have the old
// file written in place than lose some.
func (r *replacement) copyAttributes(fd int) error {
	unix.Fremovexattr(fd, accessList) // a directory's default one is for files that are new
	f, err := r.open(os.O_RDONLY, 0)
	if slices.ContainsFunc([]error{os.ErrPermission, errLeased, os.ErrNotExist, unix.ELOOP}, func(e error) bool { return errors.Is(err, e) }) {
		return nil // not for the link's owner to know, held by somebody, or gone by now
	} else if err != nil {
		return openError(err)
	}
	defer f.Close()
	wanted := 0
	found := fileXattrs(int(f.Fd()), func(name string) bool {
		copied := name == accessList || strings.HasPrefix(name, "user.") ||
			strings.HasPrefix(name, "security.") && name != "security.capability"
		if copied {
			wanted++
		}
		return copied
	})
	if names, _ := unix.Flistxattr(int(f.Fd()), nil); len(found) < wanted || names > attributeBytes {
		return errNotByRename
	}
	for name, value := range found {
		if err := unix.Fsetxattr(fd, name, []byte(value), 0); err != nil && (isFull(err) || name == accessList) {
			return os.NewSyscallError("fsetxattr", err)
		}
	}
	return nil
}

// ---- compose -------------------------------------------------------------------------------------------------------

func (s *fileService) compose(w http.ResponseWriter, r *http.Request) {
	var req composeRequest
	err := json.NewDecoder(meterJSON(r, requestOf(r.Context()).memory)).Decode(&req)
	var refusal *budgetError
	switch {
	case errors.As(err, &refusal): // it was not read to its end
		w.Header().Set("Connection", "close")
	case err != nil:
		err = badRequest("invalid request body: %v", err)
	case len(req.SourcePaths) == 0:
		err = badRequest("source_paths must not be empty")
	case req.Destination == "":
		err = badRequest("destination is required")
	default:
		turn := turn{ctx: r.Context()}
		if err = turn.take(patience); err == nil {
			err = s.composeFile(&req)
			turn.giveUp()
		}
		if isFull(err) {
			err = diskFull(err, textDiskFull)
		}
	}
	s.answer(w, written{Path: req.Destination, Name: filepath.Base(req.Destination), Type: "file"}, err)
}

type composeRequest struct {
	SourcePaths []string `json:"source_paths"`
	Destination string   `json:"destination"`
	Username    string   `json:"username"`
}

// composeFile puts the sources, one after the other, in the place of the destination, and removes them.
func (s *fileService) composeFile(req *composeRequest) error {
	defaultUser, workdir := s.settings.defaults()
	user, err := s.user(cmp.Or(req.Username, defaultUser))
	if err != nil {
		return err
	}
	resolved := make([]string, len(req.SourcePaths)+1)
	for i, path := range append(req.SourcePaths, req.Destination) {
		if resolved[i], err = resolvePath(path, user.home, workdir); err != nil {
			return badRequest("error resolving path '%s': %v", path, err)
		}
	}
	sources := resolved[:len(req.SourcePaths)]
	req.Destination = resolved[len(sources)]
	var r *replacement
	eachSource := func(do func(from *os.File) error) error {
		for i, path := range sources {
			from, p, err := s.openSource(path)
			if err != nil {
				return err
			}
			if filepath.Clean(path) == filepath.Clean(req.Destination) || r != nil && p.st.Ino == r.st.Ino && p.st.Dev == r.st.Dev {
				err = badRequest("source path \"%s\" cannot be the same as destination", req.SourcePaths[i])
			} else {
				err = do(from)
			}
			if from.Close(); err != nil {
				return err
			}
		}
		return nil
	}
	if err = eachSource(func(*os.File) error { return nil }); err != nil {
		return err
	}
	if r, err = s.target(req.Destination, user, nil); err != nil {
		return err
	}
	defer r.close()
	err = r.beside(func(to storing) error {
		return eachSource(func(from *os.File) error {
			_, err := io.Copy(to, from) // copy_file_range(2)
			return err
		})
	})
	if err != nil {
		return err
	}
	for _, path := range sources {
		source, err := walkPath(walk{users: s.users}, path)
		if err == nil {
			err = source.unlink()
			source.close()
		}
		if err != nil && !errors.Is(err, unix.ENOENT) { // it may be named twice
			return fmt.Errorf("%s is complete, but its source %s could not be removed: %w", req.Destination, path, err)
		}
	}
	return nil
}

// openSource opens what is to be moved into another file: with no more power than removing it takes.
func (s *fileService) openSource(path string) (*os.File, *place, error) {
	p, err := walkPath(walk{users: s.users, follow: true}, path)
	if err == nil {
		defer p.close()
	}
	switch {
	case errors.Is(err, syscall.ENOENT), err == nil && p.name != "" && !p.exists():
		return nil, nil, httpErrorf(http.StatusNotFound, "source file not found: %s", path)
	case err == nil && p.kind() != unix.S_IFREG:
		return nil, nil, badRequest("source path is not a regular file: %s", path)
	}
	var f *os.File
	if err == nil {
		f, err = p.open(os.O_RDONLY, 0)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("error opening source file: %w", err)
	}
	return f, p, nil
}
