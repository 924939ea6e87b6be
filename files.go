// /files and /files/compose: who may ask for what, and the download. upload.go replaces files, archive.go has directories.

package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type fileService struct {
	users    *userDB
	token    *accessToken
	settings *settings
	budget   *budget
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

func badRequest(format string, args ...any) error {
	return httpErrorf(http.StatusBadRequest, format, args...)
}

// answer sends what was done, or an error, the kernel's with the status that belongs to it.
func (s *fileService) answer(w http.ResponseWriter, done any, err error) {
	status := http.StatusInternalServerError
	var known *httpError
	var refusal *budgetError
	switch {
	case err == nil:
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(done)
		return
	case errors.As(err, &known): // whatever was on its way when it happened
		status, err = known.status, known
	case isFull(err):
		status = http.StatusInsufficientStorage
	case errors.As(err, &refusal):
		status, err = http.StatusServiceUnavailable, refusal
	case slices.ContainsFunc([]error{syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, errLeased, errFilesHang},
		func(passing error) bool { return errors.Is(err, passing) }):
		status = http.StatusServiceUnavailable
	}
	jsonError(w, status, err.Error())
}

func isFull(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// mayStore refuses content that would take the guest's last memory.
func mayStore(fd int, bytes int64) error {
	if memoryForContent.admits(fd, bytes) {
		return nil
	}
	return httpErrorf(http.StatusInsufficientStorage, "not enough memory available: this file system is in memory, "+
		"of which the guest keeps %d MiB for itself", memoryReserve(totalMemory())>>20)
}

// storing writes content to a file as long as it may.
type storing struct{ file *os.File }

func (s storing) Write(p []byte) (int, error) {
	if err := mayStore(int(s.file.Fd()), int64(len(p))); err != nil {
		return 0, err
	}
	return s.file.Write(p)
}

// ReadFrom leaves the work to the kernel where it can, as copy_file_range(2).
func (s storing) ReadFrom(from io.Reader) (total int64, err error) {
	const piece = 1 << 20
	for n := int64(piece); n == piece && err == nil; total += n {
		if err = mayStore(int(s.file.Fd()), piece); err != nil {
			return total, err
		}
		n, err = s.file.ReadFrom(io.LimitReader(from, piece))
	}
	return total, err
}

// acting checks the credentials of a request for a file and answers the name of the user that it acts as.
func (s *fileService) acting(r *http.Request, query url.Values, operation string) (name string, err error) {
	if status, reason := s.token.refuseFile(r.Header.Get("X-Access-Token"), query, operation, time.Now()); status != 0 {
		return "", httpErrorf(status, "%s", reason)
	}
	defaultUser, _ := s.settings.defaults()
	if name = cmp.Or(query.Get("username"), defaultUser); name == "" {
		err = badRequest("username not provided")
	}
	return name, err
}

// mayArchive refuses a whole directory to a signed URL, which stands for one file.
func (s *fileService) mayArchive(r *http.Request) error {
	if s.token.isSet() && !s.token.matches(r.Header.Get("X-Access-Token")) {
		return httpErrorf(http.StatusForbidden,
			"an archive needs the access token in X-Access-Token: a signed URL stands for one file")
	}
	return nil
}

func (s *fileService) user(name string) (account, error) {
	user, err := s.users.lookup(name)
	if err != nil {
		err = httpErrorf(http.StatusUnauthorized, "error looking up user '%s': %v", name, err)
	}
	return user, err
}

func (s *fileService) resolve(user account, path string) (string, error) {
	_, workdir := s.settings.defaults()
	resolved, err := resolvePath(path, user.home, workdir)
	if err != nil {
		err = badRequest("error expanding and resolving path '%s': failed to expand path '' for user '%s': %v", path, user.name, err)
	}
	return resolved, err
}

// ---- download ------------------------------------------------------------------------------------------------------

func (s *fileService) download(w http.ResponseWriter, r *http.Request) {
	if err := s.send(w, r); err != nil {
		s.answer(w, nil, err)
	}
}

func (s *fileService) send(w http.ResponseWriter, r *http.Request) error {
	query := r.URL.Query()
	name, err := s.acting(r, query, "read")
	if err != nil {
		return err
	}
	user, err := s.user(name)
	if err != nil {
		return err
	}
	path, err := s.resolve(user, query.Get("path"))
	if err != nil {
		return err
	}
	turn := turn{ctx: r.Context()}
	if err := turn.take(patience); err != nil {
		return err
	}
	defer turn.giveUp()
	// First what does not touch what is there: to open a device is to do something to it.
	var st unix.Stat_t
	at, err := openAt(unix.AT_FDCWD, path, unix.O_PATH, 0)
	if err == nil {
		defer unix.Close(at)
		err = unix.Fstat(at, &st)
	}
	kind := st.Mode & unix.S_IFMT
	compressed, refusal := negotiate(r.Header)
	wantsTar := func(w weight) bool { return w.name == "application/x-tar" && w.q > 0 }
	switch {
	case err == unix.ENOENT:
		return httpErrorf(http.StatusNotFound, "path '%s' does not exist", path)
	case err != nil:
		return fmt.Errorf("error checking if path exists '%s': stat %s: %w", path, path, err)
	case kind == unix.S_IFDIR && !slices.ContainsFunc(weights(r.Header.Values("Accept")), wantsTar):
		return badRequest("path '%s' is a directory", path)
	case kind == unix.S_IFDIR && s.mayArchive(r) != nil:
		return s.mayArchive(r)
	case kind != unix.S_IFDIR && kind != unix.S_IFREG:
		return badRequest("path '%s' is not a regular file", path)
	case kind == unix.S_IFREG && refusal != nil:
		return refusal
	}
	var fd int
	err = unleased(patience, r.Context().Done(), func() (err error) {
		fd, err = openAt(unix.AT_FDCWD, "/proc/self/fd/"+strconv.Itoa(at), unix.O_RDONLY, 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("error opening file '%s': open %s: %w", path, path, err)
	}
	h := w.Header()
	h.Add("Vary", "Accept-Encoding")
	if kind == unix.S_IFDIR {
		dir := os.NewFile(uintptr(fd), path)
		defer dir.Close()
		if err := requestOf(r.Context()).memory.take(r.Context(), tarSendPrice); err != nil {
			return err
		}
		h.Set("Content-Type", "application/x-tar")
		defer turn.transfer()()
		if r.Method != http.MethodHead {
			s.sendTar(r.Context(), w, dir)
		}
		return nil
	}
	h.Set("Content-Disposition", mime.FormatMediaType("inline", map[string]string{"filename": filepath.Base(path)}))
	const startBytes = 4096
	size := int64(startBytes)
	if 0 < st.Size && st.Size < size {
		size = st.Size + 1
	}
	start := make([]byte, size)
	n, _ := unix.Pread(fd, start, 0)
	start = start[:max(n, 0)]
	// Where there is no room for compressing it, a file is sent as it is.
	compressed = compressed && requestOf(r.Context()).memory.tryTake(gzipPrice) == nil
	contentType := contentTypes[strings.ToLower(filepath.Ext(path))]
	if compressed {
		h.Set("Content-Encoding", "gzip")
		contentType = cmp.Or(contentType, "application/octet-stream")
	} else if contentType == "" {
		contentType = http.DetectContentType(start)
	}
	h.Set("Content-Type", contentType)
	mendRange(r.Header, st.Size)
	if st.Size == int64(len(start)) && !compressed {
		unix.Close(fd)
		turn.giveUp()
		// Without ReadFrom the header goes with the content, in one packet.
		http.ServeContent(struct{ http.ResponseWriter }{w}, r, "", time.Unix(st.Mtim.Unix()), bytes.NewReader(start))
		return nil
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	defer turn.transfer()()
	if st.Size > 0 && len(start) == startBytes && !compressed {
		http.ServeContent(w, r, "", time.Unix(st.Mtim.Unix()), f)
	} else if r.Method != http.MethodHead { // compressed, or a file of the kernel's, whose size means nothing
		stream(w, r, f, compressed)
	}
	return nil
}

// negotiate chooses between identity and gzip; whoever asks for a part, or on a condition, gets identity.
func negotiate(h http.Header) (compressed bool, err error) {
	list := weights(h.Values("Accept-Encoding"))
	named := func(name string, refused bool) bool {
		return slices.ContainsFunc(list, func(w weight) bool { return w.name == name && (w.q <= 0) == refused })
	}
	mustCompress := named("identity", true) || named("*", true) && !named("identity", false)
	if h.Get("Range")+h.Get("If-Modified-Since")+h.Get("If-None-Match")+h.Get("If-Range") != "" {
		if mustCompress {
			err = httpErrorf(http.StatusNotAcceptable, "identity encoding not acceptable for Range or conditional request")
		}
		return false, err
	}
	slices.SortStableFunc(list, func(a, b weight) int { return cmp.Compare(b.q, a.q) })
	for _, w := range list {
		switch {
		case w.q <= 0:
		case w.name == "identity", w.name == "*" && !mustCompress:
			return false, nil
		case w.name == "gzip", w.name == "*":
			return true, nil
		}
	}
	if mustCompress {
		err = httpErrorf(http.StatusNotAcceptable, "error parsing Accept-Encoding: no acceptable encoding found, supported: [gzip]")
	}
	return false, err
}

// mendRange keeps from net/http what it answers with a part that ends before it begins: any part of an empty file, and the last
// 0 bytes of another, which RFC 9110 section 14.1.2 counts as what begins after the end.
func mendRange(h http.Header, size int64) {
	unit, list, _ := strings.Cut(h.Get("Range"), "=")
	specs := strings.Split(list, ",")
	for i, spec := range specs {
		first, last, _ := strings.Cut(spec, "-")
		if n, err := strconv.Atoi(strings.TrimSpace(last)); n == 0 && err == nil && strings.TrimSpace(first) == "" {
			specs[i] = strconv.FormatInt(size, 10) + "-"
		}
	}
	if h.Set("Range", unit+"="+strings.Join(specs, ",")); size == 0 || list == "" {
		h.Del("Range")
	}
}

var gzipWriters = sync.Pool{New: func() any {
	w, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	return w
}}

// gzipPrice is what compressing takes, in bytes: tables and windows.
const gzipPrice = 1300 << 10

const (
	largeBuffer = 256 << 10
	smallBuffer = 32 << 10 // where there is no room for a large one
)

var copyBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

// copyAll copies with a large buffer and nothing clever.
func copyAll(ctx context.Context, dst io.Writer, src io.Reader) error {
	memory := requestOf(ctx).memory
	var buffer []byte
	if memory.tryTake(largeBuffer) == nil {
		pooled := copyBuffers.Get().(*[largeBuffer]byte)
		defer copyBuffers.Put(pooled)
		buffer = pooled[:]
	} else if err := memory.take(ctx, smallBuffer); err == nil {
		buffer = make([]byte, smallBuffer)
	} else {
		return err
	}
	_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, buffer)
	memory.give(int64(len(buffer)))
	return err
}

// stream sends a file up to its end, which some of the kernel's do not have, or until the client leaves.
func stream(w http.ResponseWriter, r *http.Request, f *os.File, compressed bool) {
	defer context.AfterFunc(r.Context(), func() { f.SetReadDeadline(time.Unix(1, 0)) })()
	var err error
	if compressed {
		z := gzipWriters.Get().(*gzip.Writer)
		defer gzipWriters.Put(z)
		z.Reset(w)
		if err = copyAll(r.Context(), z, f); err == nil {
			err = z.Close()
		}
	} else {
		err = copyAll(r.Context(), w, f)
	}
	if err != nil {
		panic(http.ErrAbortHandler) // a download that is cut is not to look like a complete one
	}
}

// contentTypes are by extension: the guest's own tables are not asked.
var contentTypes = func() map[string]string {
	types := map[string]string{}
	for contentType, extensions := range map[string]string{
		"text/plain; charset=utf-8": ".txt .text .log .conf .cfg .ini", "text/html; charset=utf-8": ".html .htm",
		"text/css; charset=utf-8": ".css", "text/csv; charset=utf-8": ".csv", "text/xml; charset=utf-8": ".xml",
		"text/markdown; charset=utf-8": ".md .markdown", "text/javascript; charset=utf-8": ".js .mjs",
		"application/json": ".json .map", "application/pdf": ".pdf", "application/wasm": ".wasm", "application/zip": ".zip",
		"application/gzip": ".gz .tgz", "application/x-tar": ".tar", "application/x-bzip2": ".bz2", "application/x-xz": ".xz",
		"application/zstd": ".zst", "font/woff": ".woff", "font/woff2": ".woff2", "image/avif": ".avif", "image/gif": ".gif",
		"image/jpeg": ".jpg .jpeg", "image/png": ".png", "image/svg+xml": ".svg", "image/webp": ".webp", "image/x-icon": ".ico",
		"audio/mpeg": ".mp3", "audio/ogg": ".ogg", "audio/wav": ".wav", "video/mp4": ".mp4", "video/webm": ".webm"} {
		for extension := range strings.FieldsSeq(extensions) {
			types[extension] = contentType
		}
	}
	return types
}()
