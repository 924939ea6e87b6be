// /files and /files/compose: download, upload, and putting pieces together.
//
// A file is replaced so that it stays as it was until its new content is complete. Up to wholeUpload bytes are read
// first and written in place, where inode, links and watchers see what they always saw: room is made (fallocate), then
// written, then cut to length. More goes to a hidden file beside the target, which takes on its mode, owner and
// attributes and then its name. Neither touches the content before owner and metadata are set.

package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime"
	"mime/multipart"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	wholeUpload  = 1 << 20  // bytes of an upload that are read before its target is touched
	wholeUploads = 16 << 20 // and of all of them together
)

type fileService struct {
	users    *userDB
	token    *accessToken
	settings *settings
	held     atomic.Int64 // bytes of uploads in memory
}

// httpError is an error with its status.
type httpError struct {
	status int
	text   string
}

func (e *httpError) Error() string { return e.text }

func httpErrorf(status int, format string, args ...any) error {
	return &httpError{status, fmt.Sprintf(format, args...)}
}

// answer sends what was done, or an error, the kernel's with the status that belongs to it.
func (s *fileService) answer(w http.ResponseWriter, done any, err error) {
	status := http.StatusInternalServerError
	var known *httpError
	switch {
	case err == nil:
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(done)
		return
	case errors.As(err, &known):
		status = known.status
	case isFull(err):
		status = http.StatusInsufficientStorage
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.ENOMEM):
		status = http.StatusServiceUnavailable
	}
	jsonError(w, status, err.Error())
}

func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// acting checks the credentials of a request for a file and answers whom it acts as; check comes before the lookup.
func (s *fileService) acting(r *http.Request, query url.Values, operation string, check func() error) (account, error) {
	if status, reason := s.token.refuseFile(r.Header.Get("X-Access-Token"), query, operation, time.Now()); status != 0 {
		return account{}, httpErrorf(status, "%s", reason)
	}
	return s.user(query.Get("username"), check)
}

// user is the one that a request names, else the default one.
func (s *fileService) user(name string, check func() error) (user account, err error) {
	if name == "" {
		name, _ = s.settings.defaults()
	}
	if name == "" {
		return user, httpErrorf(http.StatusBadRequest, "username not provided")
	}
	if err = check(); err != nil {
		return user, err
	}
	if user, err = s.users.lookup(name); err != nil {
		err = httpErrorf(http.StatusUnauthorized, "error looking up user '%s': %v", name, err)
	}
	return user, err
}

func nothing() error { return nil }

func (s *fileService) resolve(user account, path string) (string, error) {
	_, workdir := s.settings.defaults()
	resolved, err := resolvePath(path, user.home, workdir)
	if strings.IndexByte(resolved, 0) >= 0 {
		err = httpErrorf(http.StatusBadRequest, "a NUL byte in path %q", path)
	} else if err != nil {
		err = httpErrorf(http.StatusBadRequest, "error expanding and resolving path '%s': failed to expand path '' for user '%s': %v",
			path, user.name, err)
	}
	return resolved, err
}

// ---- download ------------------------------------------------------------------------------------------------------

func (s *fileService) download(w http.ResponseWriter, r *http.Request) {
	f, info, path, err := s.openDownload(r)
	if err != nil {
		s.answer(w, nil, err)
		return
	}
	defer f.Close()
	h := w.Header()
	h.Add("Vary", "Accept-Encoding")
	if info.IsDir() {
		h.Set("Content-Type", "application/x-tar")
		if r.Method != http.MethodHead {
			s.sendTar(w, f)
		}
		return
	}
	encoding, err := negotiate(r.Header)
	if err != nil {
		s.answer(w, nil, err)
		return
	}
	h.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}))
	contentType := contentTypes[strings.ToLower(filepath.Ext(path))]
	if encoding == "gzip" {
		h.Set("Content-Type", cmp.Or(contentType, "application/octet-stream"))
		h.Set("Content-Encoding", "gzip")
		if r.Method != http.MethodHead {
			sendGzip(w, f)
		}
		return
	}
	if contentType == "" {
		var start [512]byte
		n, _ := f.ReadAt(start[:], 0)
		contentType = http.DetectContentType(start[:n])
	}
	h.Set("Content-Type", contentType)
	http.ServeContent(w, r, "", info.ModTime(), f)
}

func (s *fileService) openDownload(r *http.Request) (f *os.File, info os.FileInfo, path string, err error) {
	query := r.URL.Query()
	user, err := s.acting(r, query, "read", nothing)
	if err == nil {
		path, err = s.resolve(user, query.Get("path"))
	}
	if err != nil {
		return nil, nil, "", err
	}
	info, err = os.Stat(path)
	switch {
	case errors.Is(err, syscall.ENOENT):
		err = httpErrorf(http.StatusNotFound, "path '%s' does not exist", path)
	case err != nil:
		err = fmt.Errorf("error checking if path exists '%s': %w", path, err)
	case info.IsDir() && !accepts(r.Header.Values("Accept"), "application/x-tar"):
		err = httpErrorf(http.StatusBadRequest, "path '%s' is a directory", path)
	case !info.IsDir() && !info.Mode().IsRegular():
		err = httpErrorf(http.StatusBadRequest, "path '%s' is not a regular file", path)
	default:
		if f, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil { // never waits, whatever has the name by now
			break
		}
		was := info.Mode().Type()
		if info, err = f.Stat(); err == nil && info.Mode().Type() == was {
			return f, info, path, nil
		}
		f.Close()
		err = cmp.Or(err, error(unix.EAGAIN))
	}
	var known *httpError
	if err != nil && info != nil && !errors.As(err, &known) {
		err = fmt.Errorf("error opening file '%s': %w", path, err)
	}
	return nil, nil, "", err
}

func accepts(headers []string, mediaType string) bool {
	return slices.ContainsFunc(strings.Split(strings.Join(headers, ","), ","), func(item string) bool {
		name, params, err := mime.ParseMediaType(item)
		q, badQ := strconv.ParseFloat(params["q"], 64)
		return err == nil && name == mediaType && (badQ != nil || q > 0)
	})
}

// negotiate chooses between identity and gzip; whoever asks for a part, or on a condition, gets identity.
func negotiate(h http.Header) (string, error) {
	refused, encoding := acceptEncoding(strings.Join(h.Values("Accept-Encoding"), ","))
	for _, name := range []string{"Range", "If-Modified-Since", "If-None-Match", "If-Range"} {
		if h.Get(name) == "" {
			continue
		}
		if refused {
			return "", httpErrorf(http.StatusNotAcceptable, "identity encoding not acceptable for Range or conditional request")
		}
		return "identity", nil
	}
	if encoding == "" {
		return "", httpErrorf(http.StatusNotAcceptable, "error parsing Accept-Encoding: no acceptable encoding found, supported: [gzip]")
	}
	return encoding, nil
}

// acceptEncoding reads Accept-Encoding: whether identity is refused, and what serves best, "" if nothing does.
func acceptEncoding(header string) (identityRefused bool, best string) {
	type item struct {
		name string
		q    float64
	}
	var items []item
	refused := map[string]bool{}
	for part := range strings.SplitSeq(header, ",") {
		name, parameters, _ := strings.Cut(part, ";")
		i := item{strings.ToLower(strings.TrimSpace(name)), 1}
		for parameter := range strings.SplitSeq(parameters, ";") {
			if value, ok := strings.CutPrefix(strings.ToLower(strings.TrimSpace(parameter)), "q="); ok {
				if q, err := strconv.ParseFloat(value, 64); err == nil {
					i.q = q
				}
			}
		}
		if i.name != "" {
			items = append(items, i)
			refused[i.name] = i.q <= 0
		}
	}
	identity, named := refused["identity"]
	identityRefused = identity || refused["*"] && !named
	slices.SortStableFunc(items, func(a, b item) int { return cmp.Compare(b.q, a.q) })
	for _, i := range items {
		switch {
		case i.q <= 0:
		case i.name == "gzip", i.name == "*" && identityRefused:
			return identityRefused, "gzip"
		case i.name == "identity", i.name == "*":
			return identityRefused, "identity"
		}
	}
	if identityRefused {
		return true, ""
	}
	return false, "identity"
}

var gzipWriters = sync.Pool{New: func() any {
	w, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	return w
}}

var copyBuffers = sync.Pool{New: func() any { return new([256 << 10]byte) }}

// copyAll copies with a large buffer and nothing clever.
func copyAll(dst io.Writer, src io.Reader) (int64, error) {
	buf := copyBuffers.Get().(*[256 << 10]byte)
	defer copyBuffers.Put(buf)
	return io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, buf[:])
}

func sendGzip(w http.ResponseWriter, f *os.File) {
	z := gzipWriters.Get().(*gzip.Writer)
	defer gzipWriters.Put(z)
	z.Reset(w)
	_, err := copyAll(z, f)
	if err == nil {
		err = z.Close()
	}
	if err != nil {
		panic(http.ErrAbortHandler) // a download that is cut is not to look like a complete one
	}
}

// contentTypes are by extension: the guest's own tables are not asked.
var contentTypes = func() map[string]string {
	types := map[string]string{}
	for line := range strings.Lines(`txt text log conf cfg ini=text/plain; charset=utf-8
html htm=text/html; charset=utf-8|css=text/css; charset=utf-8|csv=text/csv; charset=utf-8|xml=text/xml; charset=utf-8
md markdown=text/markdown; charset=utf-8|js mjs=text/javascript; charset=utf-8|json map=application/json
pdf=application/pdf|wasm=application/wasm|zip=application/zip|gz tgz=application/gzip|tar=application/x-tar
bz2=application/x-bzip2|xz=application/x-xz|zst=application/zstd|woff=font/woff|woff2=font/woff2
avif=image/avif|gif=image/gif|jpg jpeg=image/jpeg|png=image/png|svg=image/svg+xml|webp=image/webp|ico=image/x-icon
mp3=audio/mpeg|ogg=audio/ogg|wav=audio/wav|mp4=video/mp4|webm=video/webm`) {
		for group := range strings.SplitSeq(strings.TrimSpace(line), "|") {
			extensions, contentType, _ := strings.Cut(group, "=")
			for extension := range strings.FieldsSeq(extensions) {
				types["."+extension] = contentType
			}
		}
	}
	return types
}()

// ---- upload --------------------------------------------------------------------------------------------------------

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
	user     account
	query    url.Values
	metadata map[string]string // attribute names and values
	body     io.Reader
	length   int64
	files    []written
}

func (s *fileService) upload(w http.ResponseWriter, r *http.Request) {
	u, err := s.beginUpload(r)
	if err == nil {
		err = u.receive(r.Header.Get("Content-Type"))
	}
	s.answer(w, u.files, err)
}

func (s *fileService) beginUpload(r *http.Request) (*uploadRequest, error) {
	u := &uploadRequest{fileService: s, query: r.URL.Query(), body: r.Body, length: r.ContentLength, files: []written{}}
	var err error
	u.user, err = s.acting(r, u.query, "write", func() (err error) {
		coding, _, _ := strings.Cut(r.Header.Get("Content-Encoding"), ";")
		switch coding = strings.ToLower(strings.TrimSpace(coding)); coding {
		case "", "identity":
		case "gzip":
			if u.body, err = gzip.NewReader(r.Body); err != nil {
				err = httpErrorf(http.StatusBadRequest, "error decompressing request body: failed to create gzip reader: %v", err)
			}
		default:
			err = httpErrorf(http.StatusBadRequest, "error decompressing request body: unsupported Content-Encoding: %s, supported: [gzip]", coding)
		}
		return err
	})
	if err == nil {
		u.metadata, err = requestMetadata(r.Header)
	}
	return u, err
}

// requestMetadata reads the X-Metadata- headers as attributes.
func requestMetadata(h http.Header) (map[string]string, error) {
	metadata, total := map[string]string{}, 0
	bad := func(format string, args ...any) (map[string]string, error) {
		return nil, httpErrorf(http.StatusBadRequest, "invalid metadata: "+format, args...)
	}
	for _, name := range slices.Sorted(maps.Keys(h)) {
		key, ok := strings.CutPrefix(strings.ToLower(name), "x-metadata-")
		if !ok || key == "" {
			continue
		}
		value := h[name][0]
		if len(key) > 246 {
			return bad("metadata key \"%s\" exceeds 246 bytes", key)
		}
		for i := range len(value) {
			if value[i] < 0x20 || value[i] > 0x7e {
				return bad("metadata value for key \"%s\" contains non-printable-ASCII byte 0x%02X at offset %d", key, value[i], i)
			}
		}
		metadata[metadataPrefix+key] = value
		total += len(metadataPrefix) + len(key) + len(value)
	}
	if total > 4096 {
		return bad("total metadata size %d exceeds 4096 bytes", total)
	}
	return metadata, nil
}

func (u *uploadRequest) receive(contentType string) error {
	mediaType, params, err := mime.ParseMediaType(contentType)
	switch {
	case strings.HasPrefix(mediaType, "multipart/"):
		if params["boundary"] == "" {
			return fmt.Errorf("error parsing multipart form: %w", http.ErrMissingBoundary)
		}
		return u.receiveParts(multipart.NewReader(u.body, params["boundary"]))
	case mediaType == "application/octet-stream":
		if !u.query.Has("path") {
			return httpErrorf(http.StatusBadRequest, "path query parameter is required for raw body upload")
		}
		return u.receiveFile(u.query.Get("path"), u.body)
	case mediaType == "application/x-tar":
		return u.receiveTar()
	case err != nil && strings.HasPrefix(contentType, "multipart/"):
		return fmt.Errorf("error parsing multipart form: %w", err)
	}
	return httpErrorf(http.StatusBadRequest, "unsupported content type: %s, expected multipart/form-data or application/octet-stream", contentType)
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
				return httpErrorf(http.StatusBadRequest, "error getting multipart custom part file name: filename not found in Content-Disposition header")
			}
		}
		if err := u.receiveFile(path, part); err != nil {
			return err
		}
	}
}

func (u *uploadRequest) receiveFile(path string, body io.Reader) error {
	path, err := u.resolve(u.user, path)
	if err != nil {
		return err
	}
	if slices.ContainsFunc(u.files, func(f written) bool { return f.Path == path }) {
		text := fmt.Sprintf("you cannot upload multiple files to the same path '%s' in one upload request, only the first specified file was uploaded", path)
		var others []string
		for _, f := range u.files {
			if f.Path != path {
				others = append(others, f.Path)
			}
		}
		if len(others) > 1 {
			text += ", also the following files were uploaded: " + strings.Join(others, ", ")
		}
		return httpErrorf(http.StatusBadRequest, "%s", text)
	}
	metadata, err := u.put(path, body)
	var known *httpError
	switch {
	case isFull(err) && !errors.As(err, &known) && u.length > 0:
		return httpErrorf(http.StatusInsufficientStorage, "attempted to write %d bytes: not enough disk space available", u.length)
	case isFull(err) && !errors.As(err, &known):
		return httpErrorf(http.StatusInsufficientStorage, "not enough disk space available")
	case err != nil:
		return err
	}
	u.files = append(u.files, written{Path: path, Name: filepath.Base(path), Type: "file", Metadata: metadata})
	return nil
}

// ---- replacing a file ----------------------------------------------------------------------------------------------

// errNotInPlace says that a filesystem cannot make room for content beforehand.
var errNotInPlace = errors.New("no fallocate here")

// put makes what a reader gives the content of a file and answers the file's metadata, as it is on disk then.
func (u *uploadRequest) put(path string, body io.Reader) (map[string]string, error) {
	content, whole, err := u.readWhole(body)
	defer func() { u.held.Add(-int64(cap(content))) }()
	if err != nil {
		return nil, fmt.Errorf("error writing file: %w", err)
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
			err = r.beside(func(f *os.File) error {
				_, err := f.Write(content)
				if err == nil && !whole {
					_, err = copyAll(f, body)
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

// readWhole reads a body into memory, as far as it and all others may be there. What it gives counts in held.
func (u *uploadRequest) readWhole(body io.Reader) (content []byte, whole bool, err error) {
	size := 8 << 10
	if 0 < u.length && u.length < int64(size) {
		size = int(u.length) + 1
	}
	for ; ; size = min(cap(content)*2, wholeUpload+1) {
		if grown := int64(size - cap(content)); grown == 0 || u.held.Add(grown) > wholeUploads {
			u.held.Add(-grown)
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
	p, err := walkPath(walk{users: s.users, mkdirs: &owner, follow: true}, path)
	switch {
	case err != nil:
		return nil, fmt.Errorf("error ensuring directories: %w", err)
	case p.name == "" || p.kind() == unix.S_IFDIR:
		err = httpErrorf(http.StatusBadRequest, "path is a directory: %s", path)
	case p.exists() && p.kind() != unix.S_IFREG:
		err = httpErrorf(http.StatusBadRequest, "path '%s' is not a regular file", path)
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

// inPlace writes n bytes over what is there, or into a new file.
func (r *replacement) inPlace(content io.Reader, n int64) error {
	flags := os.O_WRONLY
	if !r.exists() {
		flags |= os.O_CREATE | os.O_EXCL
	}
	fd, err := r.openFd(flags, 0o666)
	if err != nil && isFull(err) {
		return httpErrorf(http.StatusInsufficientStorage, "not enough inodes available: %v", err)
	} else if err != nil {
		return fmt.Errorf("error opening file: %w", err)
	}
	defer unix.Close(fd)
	if r.exists() {
		if err := r.checkOpened(fd); err != nil {
			return err
		}
	}
	size := r.st.Size
	undo, err := r.dressed(fd)
	if err == nil && r.exists() && n > 0 {
		err = retry(func() error { return unix.Fallocate(fd, 0, 0, n) }) // tmpfs breaks off for any signal
		if err == unix.EOPNOTSUPP || err == unix.ENOSYS {
			if err = nil; !r.forced {
				err = errNotInPlace
			}
		} else if err != nil {
			unix.Ftruncate(fd, size)
		}
	}
	if err == nil {
		undo = func() {} // from here on the old content is gone
		if _, err = io.Copy(fdWriter(fd), content); err == nil && n < size {
			err = unix.Ftruncate(fd, n)
		}
		if err != nil {
			err = fmt.Errorf("error writing file: %w", err)
		}
	}
	if err != nil {
		undo()
		if !r.exists() {
			r.unlink()
		}
		return err
	}
	if len(r.metadata) > 0 {
		r.stored = metadataOf(fileXattrs(fd, isMetadata))
	}
	return nil
}

type fdWriter int

func (fd fdWriter) Write(p []byte) (done int, err error) {
	for done < len(p) && err == nil {
		err = retry(func() error {
			n, err := unix.Write(int(fd), p[done:])
			done += max(n, 0)
			return err
		})
	}
	return done, err
}

// checkOpened looks at what was opened by name: a regular file still, and not another owner's by way of a hard link.
func (r *replacement) checkOpened(fd int) error {
	if err := unix.Fstat(fd, &r.st); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	foreign := r.st.Nlink > 1 && r.as == nil && r.dirs.Uid != 0 && r.st.Uid != r.dirs.Uid
	if r.kind() != unix.S_IFREG || foreign {
		return &os.PathError{Op: "open", Path: r.path, Err: unix.EPERM}
	}
	return nil
}

// dressed gives an open file its owner and metadata. What it did can be undone.
func (r *replacement) dressed(fd int) (undo func(), err error) {
	var st unix.Stat_t
	if r.dress != nil {
		return func() {}, r.dress(fd)
	}
	if err := unix.Fstat(fd, &st); err != nil {
		return func() {}, os.NewSyscallError("fstat", err)
	}
	if err := chown(fd, &st, r.as, r.owner); err != nil {
		return func() {}, fmt.Errorf("error changing file ownership: %w", err)
	}
	old := fileXattrs(fd, isMetadata)
	undo = func() {
		setXattrs(fd, old, r.metadata)
		chown(fd, &unix.Stat_t{Uid: r.owner.uid, Gid: r.owner.gid}, nil, account{uid: st.Uid, gid: st.Gid})
		unix.Fchmod(fd, st.Mode&0o7777) // a change of owner takes the special bits away
	}
	if r.metadata == nil {
		return undo, nil
	}
	if err = setXattrs(fd, r.metadata, old); err != nil && isFull(err) {
		err = httpErrorf(http.StatusInsufficientStorage, "not enough space for file metadata: %v", err)
	} else if err == unix.EOPNOTSUPP {
		slog.Warn("no extended attributes here; metadata is ignored", "logger", "files", "path", r.path)
		err = nil
	} else if err != nil {
		err = fmt.Errorf("error setting file metadata: %w", err)
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
func (r *replacement) beside(fill func(f *os.File) error) error {
	temp := r.hidden()
	f, err := temp.open(os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil && isFull(err) {
		return httpErrorf(http.StatusInsufficientStorage, "not enough inodes available: %v", err)
	} else if err != nil {
		return fmt.Errorf("error opening file: %w", err)
	}
	defer f.Close()
	defer func() {
		if temp != nil {
			temp.unlink()
		}
	}()
	if err := fill(f); err != nil {
		return fmt.Errorf("error writing file: %w", err)
	}
	if r.st.Nlink <= 1 {
		if r.exists() {
			err = r.copyAttributes(int(f.Fd()))
		}
		if err == nil {
			_, err = r.dressed(int(f.Fd()))
		}
		if err == nil && r.exists() {
			err = unix.Fchmod(int(f.Fd()), r.st.Mode&0o777)
		}
		if err != nil {
			return err
		}
		if len(r.metadata) > 0 {
			r.stored = metadataOf(fileXattrs(int(f.Fd()), isMetadata))
		}
		err = r.do(func() error { return unix.Renameat(temp.dir, temp.name, r.dir, r.name) })
		if err == nil {
			temp = nil
			return nil
		}
		if !r.exists() || isFull(err) {
			return &os.PathError{Op: "rename", Path: r.path, Err: err}
		}
	}
	// The target cannot be replaced: hard links, a mount on it, a sticky directory.
	n, err := f.Seek(0, io.SeekEnd)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err == nil {
		r.forced = true
		err = r.inPlace(f, n)
	}
	return err
}

// copyAttributes gives a new file the old one's access list, security labels and attributes.
func (r *replacement) copyAttributes(fd int) error {
	f, err := r.open(os.O_RDONLY, 0)
	if err != nil {
		return nil // not readable for the link's owner: nothing of it is known to him
	}
	defer f.Close()
	if err := r.checkOpened(int(f.Fd())); err != nil {
		return err
	}
	const acl = "system.posix_acl_access"
	for name, value := range fileXattrs(int(f.Fd()), func(name string) bool {
		return name == acl || strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "security.") && name != "security.capability"
	}) {
		if err := unix.Fsetxattr(fd, name, []byte(value), 0); err != nil && (isFull(err) || name == acl) {
			return os.NewSyscallError("fsetxattr", err)
		}
	}
	return nil
}

// ---- compose -------------------------------------------------------------------------------------------------------

func (s *fileService) compose(w http.ResponseWriter, r *http.Request) {
	var req composeRequest
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 16<<20)).Decode(&req)
	switch {
	case err != nil:
		err = httpErrorf(http.StatusBadRequest, "invalid request body: %v", err)
	case len(req.SourcePaths) == 0:
		err = httpErrorf(http.StatusBadRequest, "source_paths must not be empty")
	case req.Destination == "":
		err = httpErrorf(http.StatusBadRequest, "destination is required")
	default:
		if err = s.composeFile(&req); isFull(err) {
			err = httpErrorf(http.StatusInsufficientStorage, "not enough disk space available")
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
	user, err := s.user(req.Username, nothing)
	if err != nil {
		return err
	}
	_, workdir := s.settings.defaults()
	resolved := make([]string, len(req.SourcePaths)+1)
	for i, path := range append(req.SourcePaths, req.Destination) {
		if resolved[i], err = resolvePath(path, user.home, workdir); err != nil {
			return httpErrorf(http.StatusBadRequest, "error resolving path '%s': %v", path, err)
		}
	}
	sources := resolved[:len(req.SourcePaths)]
	req.Destination = resolved[len(sources)]
	for i, source := range sources {
		if filepath.Clean(source) == filepath.Clean(req.Destination) {
			return httpErrorf(http.StatusBadRequest, "source path \"%s\" cannot be the same as destination", req.SourcePaths[i])
		}
		f, err := s.openSource(source)
		if err != nil {
			return err
		}
		f.Close()
	}
	r, err := s.target(req.Destination, user, nil)
	if err != nil {
		return err
	}
	defer r.close()
	err = r.beside(func(to *os.File) error {
		for _, path := range sources {
			from, err := s.openSource(path)
			if err != nil {
				return err
			}
			_, err = io.Copy(to, from) // copy_file_range(2)
			from.Close()
			if err != nil {
				return err
			}
		}
		return nil
	})
	for _, path := range sources {
		if err != nil {
			break
		}
		source, walkErr := walkPath(walk{users: s.users}, path)
		if err = walkErr; err == nil {
			err = source.do(func() error { return unix.Unlinkat(source.dir, source.name, 0) })
			source.close()
		}
		if errors.Is(err, unix.ENOENT) {
			err = nil // named twice
		} else if err != nil {
			err = fmt.Errorf("%s is complete, but its source %s could not be removed: %w", req.Destination, path, err)
		}
	}
	return err
}

// openSource opens what is to be moved into another file: with no more power than removing it takes.
func (s *fileService) openSource(path string) (*os.File, error) {
	p, err := walkPath(walk{users: s.users, follow: true}, path)
	if err == nil {
		defer p.close()
	}
	switch {
	case errors.Is(err, syscall.ENOENT), err == nil && p.name != "" && !p.exists():
		return nil, httpErrorf(http.StatusNotFound, "source file not found: %s", path)
	case err != nil:
		return nil, fmt.Errorf("error opening source file: %w", err)
	case p.kind() != unix.S_IFREG:
		return nil, httpErrorf(http.StatusBadRequest, "source path is not a regular file: %s", path)
	}
	f, err := p.open(os.O_RDONLY, 0)
	if err != nil {
		return nil, fmt.Errorf("error opening source file: %w", err)
	}
	r := replacement{place: p}
	if err := r.checkOpened(int(f.Fd())); err != nil {
		f.Close()
		return nil, fmt.Errorf("error opening source file: %w", err)
	}
	return f, nil
}

// ---- whole directories ---------------------------------------------------------------------------------------------

const tarXattr = "SCHILY.xattr." // before an attribute's name in a PAX record

func isUserXattr(name string) bool { return strings.HasPrefix(name, "user.") }

type tarSender struct {
	*tar.Writer
	users *userDB
	links map[[2]uint64]string // files with several names: the first one sent
}

// sendTar sends what is in a directory: directories, files, links. Sockets, FIFOs and devices are left out.
func (s *fileService) sendTar(w http.ResponseWriter, dir *os.File) {
	t := &tarSender{tar.NewWriter(w), s.users, map[[2]uint64]string{}}
	err := t.send(dir, "", 0)
	if err == nil {
		err = t.Close()
	}
	if err != nil {
		slog.Warn("an archive was cut", "logger", "files", "path", dir.Name(), "error", err)
		panic(http.ErrAbortHandler) // it is not to look like a complete one
	}
}

func (t *tarSender) send(dir *os.File, prefix string, depth int) error {
	names, err := dir.Readdirnames(-1)
	if depth > maxDepth {
		err = unix.ENAMETOOLONG
	}
	slices.Sort(names)
	for _, name := range names {
		if err == nil {
			err = t.sendEntry(int(dir.Fd()), name, prefix+name, depth)
		}
	}
	return err
}

func (t *tarSender) sendEntry(dir int, name, path string, depth int) error {
	var st unix.Stat_t
	if unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return nil // gone by now
	}
	var f *os.File
	var target string
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(dir, name, buf)
		if err != nil {
			return nil
		}
		target = string(buf[:n])
	case unix.S_IFDIR, unix.S_IFREG:
		fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err == unix.ENOENT || err == unix.ELOOP {
			return nil
		} else if err != nil {
			return &os.PathError{Op: "open", Path: path, Err: err}
		}
		f = os.NewFile(uintptr(fd), path)
		defer f.Close()
		if err := unix.Fstat(fd, &st); err != nil {
			return err
		}
	}
	h := &tar.Header{Format: tar.FormatPAX, Name: path, Linkname: target, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid),
		Gid: int(st.Gid), Uname: t.users.userName(st.Uid), Gname: t.users.groupName(st.Gid), ModTime: time.Unix(st.Mtim.Unix())}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, path+"/"
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
		if id := [2]uint64{uint64(st.Dev), st.Ino}; st.Nlink > 1 {
			if first := t.links[id]; first != "" {
				h.Typeflag, h.Size, h.Linkname = tar.TypeLink, 0, first
			} else {
				t.links[id] = path
			}
		}
	default:
		return nil
	}
	if f != nil && h.Typeflag != tar.TypeLink {
		for name, value := range fileXattrs(int(f.Fd()), isUserXattr) {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords[tarXattr+name] = value
		}
	}
	err := t.WriteHeader(h)
	if err == nil && h.Typeflag == tar.TypeReg {
		_, err = copyAll(t, io.LimitReader(f, st.Size))
	} else if err == nil && h.Typeflag == tar.TypeDir {
		err = t.send(f, path+"/", depth+1)
	}
	return err
}

// unpacker puts the entries of an archive below a directory. Nothing below it is reached through a link.
type unpacker struct {
	*uploadRequest
	top  *place
	open []openDir // new directories whose entries may still come, the innermost last
}

type openDir struct {
	*place
	header *tar.Header
}

func (u *uploadRequest) receiveTar() error {
	if !u.query.Has("path") {
		return httpErrorf(http.StatusBadRequest, "path query parameter is required for an archive")
	}
	path, err := u.resolve(u.user, u.query.Get("path"))
	if err != nil {
		return err
	}
	top, err := walkPath(walk{users: u.users, mkdirs: &u.user}, path+"/")
	if err != nil {
		return fmt.Errorf("error ensuring directories: %w", err)
	}
	defer top.close()
	x := &unpacker{uploadRequest: u, top: top}
	defer x.leave("")
	index := map[string]int{}
	for archive := tar.NewReader(u.body); ; {
		h, err := archive.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("error reading archive: %w", err)
		}
		name := filepath.Clean(h.Name)
		x.leave(name)
		var refused *httpError
		if err := x.unpack(h, name, archive); errors.Is(err, unix.ELOOP) {
			return httpErrorf(http.StatusBadRequest, "archive entry '%s' leads through a link", h.Name)
		} else if errors.As(err, &refused) {
			return err
		} else if err != nil {
			return fmt.Errorf("error unpacking '%s': %w", h.Name, err)
		}
		first, _, below := strings.Cut(name, "/")
		if _, known := index[first]; !known && first != "." && h.Typeflag != tar.TypeXGlobalHeader {
			index[first] = len(u.files)
			u.files = append(u.files, written{Path: filepath.Join(path, first), Name: first, Type: "file"})
		}
		if first != "." && (below || h.Typeflag == tar.TypeDir) {
			u.files[index[first]].Type = "dir"
		}
	}
}

// leave finishes the directories that are not above the next entry: from here on nothing changes their time any more.
func (x *unpacker) leave(next string) {
	for len(x.open) > 0 {
		d := x.open[len(x.open)-1]
		if next != "" && strings.HasPrefix(next, filepath.Clean(d.header.Name)+"/") {
			return
		}
		if fd, err := unix.Openat(d.dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			if err := x.dress(fd, d.header); err != nil {
				slog.Warn("attributes of a directory could not be set", "logger", "files", "path", d.path, "error", err)
			}
			unix.Close(fd)
		}
		d.close()
		x.open = x.open[:len(x.open)-1]
	}
}

// dress gives something new its owner, mode, attributes and time. The archive's owner counts only for root.
func (x *unpacker) dress(fd int, h *tar.Header) error {
	owner := account{uid: uint32(h.Uid), gid: uint32(h.Gid)}
	if x.user.uid != 0 {
		owner = x.user
	}
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && (st.Uid != owner.uid || st.Gid != owner.gid) {
		err = unix.Fchownat(fd, "", int(owner.uid), int(owner.gid), unix.AT_EMPTY_PATH)
	}
	if err == nil && h.Typeflag != tar.TypeSymlink {
		err = unix.Fchmod(fd, uint32(h.Mode)&0o7777)
		for record, value := range h.PAXRecords {
			if name, ok := strings.CutPrefix(record, tarXattr); ok && isUserXattr(name) && err == nil {
				if err = unix.Fsetxattr(fd, name, []byte(value), 0); err == unix.EOPNOTSUPP {
					err = nil
				}
			}
		}
	}
	if err == nil {
		mtime := unix.NsecToTimespec(h.ModTime.UnixNano())
		err = unix.UtimesNanoAt(fd, "", []unix.Timespec{mtime, mtime}, unix.AT_EMPTY_PATH)
	}
	return os.NewSyscallError("set attributes", err)
}

func (x *unpacker) unpack(h *tar.Header, name string, content io.Reader) error {
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeDir, tar.TypeReg, tar.TypeGNUSparse, tar.TypeSymlink, tar.TypeLink:
	default:
		return httpErrorf(http.StatusBadRequest, "archive entry '%s' is a device or FIFO, or of an unknown type", h.Name)
	}
	if !filepath.IsLocal(name) || h.Typeflag == tar.TypeLink && !filepath.IsLocal(h.Linkname) {
		return httpErrorf(http.StatusBadRequest, "archive entry '%s' leads out of the directory", h.Name)
	}
	if name == "." {
		return nil
	}
	way := walk{users: x.users, mkdirs: &x.user, noLinks: true}
	if h.Typeflag == tar.TypeDir {
		name += "/"
	}
	at, err := walkBelow(way, x.top, name)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		if !at.made { // one that was there stays as it is
			at.close()
		} else {
			x.open = append(x.open, openDir{at, h})
		}
		return nil
	}
	defer at.close()
	if at.kind() == unix.S_IFDIR {
		return httpErrorf(http.StatusBadRequest, "path is a directory: %s", at.path)
	}
	switch h.Typeflag {
	case tar.TypeLink:
		return x.unpackLink(h, at, way)
	case tar.TypeSymlink:
		return x.unpackSymlink(h, at)
	}
	at.st = unix.Stat_t{} // the name is replaced: nothing of what has it now matters
	r := &replacement{place: at, dress: func(fd int) error { return x.dress(fd, h) }}
	return r.beside(func(f *os.File) error {
		_, err := copyAll(f, content)
		return err
	})
}

func (x *unpacker) unpackSymlink(h *tar.Header, at *place) error {
	temp := at.hidden()
	err := at.do(func() error { return unix.Symlinkat(h.Linkname, at.dir, temp.name) })
	if err != nil {
		return err
	}
	fd, err := unix.Openat(at.dir, temp.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == nil {
		var st unix.Stat_t
		if unix.Fstat(fd, &st); st.Mode&unix.S_IFMT == unix.S_IFLNK && int(st.Uid) == at.uid() {
			err = x.dress(fd, h)
		}
		unix.Close(fd)
	}
	if err == nil {
		err = at.do(func() error { return unix.Renameat(at.dir, temp.name, at.dir, at.name) })
	}
	if err != nil {
		temp.unlink()
	}
	return err
}

func (x *unpacker) unpackLink(h *tar.Header, at *place, way walk) error {
	way.mkdirs = nil
	old, err := walkBelow(way, x.top, filepath.Clean(h.Linkname))
	if err != nil {
		return err
	}
	defer old.close()
	return at.do(func() error {
		if at.st.Ino == old.st.Ino && at.st.Dev == old.st.Dev && at.exists() {
			return nil
		}
		if err := unix.Unlinkat(at.dir, at.name, 0); err != nil && err != unix.ENOENT {
			return err
		}
		return os.NewSyscallError("linkat", unix.Linkat(old.dir, old.name, at.dir, at.name, 0))
	})
}
