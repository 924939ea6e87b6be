// /files and /files/compose: every status and header, negotiation, signatures, safe replacement, archives.

package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"mime/multipart"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
)

// files builds the URL path of a request for files; parameters come as name, value.
func filesPath(parameters ...string) string {
	query := url.Values{}
	for i := 0; i < len(parameters); i += 2 {
		query.Set(parameters[i], parameters[i+1])
	}
	return "/files?" + query.Encode()
}

type formPart struct{ field, filename, content string }

// form makes a multipart body; a part without a filename is a text field.
func form(t testing.TB, parts ...formPart) (body, contentType string) {
	t.Helper()
	var buf bytes.Buffer
	w := multipart.NewWriter(&buf)
	for _, p := range parts {
		header := textproto.MIMEHeader{"Content-Disposition": {fmt.Sprintf(`form-data; name="%s"`, p.field)}}
		if p.filename != "" {
			header.Set("Content-Disposition", fmt.Sprintf(`form-data; name="%s"; filename="%s"`, p.field, p.filename))
		}
		part, err := w.CreatePart(header)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(part, p.content)
	}
	w.Close()
	return buf.String(), w.FormDataContentType()
}

func (d *daemon) upload(t testing.TB, path, content string, headers ...string) httpReply {
	t.Helper()
	return d.request(t, "POST", path, content, append([]string{"Content-Type", "application/octet-stream"}, headers...)...)
}

func (d *daemon) uploadForm(t testing.TB, path string, parts ...formPart) httpReply {
	t.Helper()
	body, contentType := form(t, parts...)
	return d.request(t, "POST", path, body, "Content-Type", contentType)
}

func wantFailure(t testing.TB, what string, got httpReply, status int, message string) {
	t.Helper()
	want := fmt.Sprintf("{\"code\":%d,\"message\":%s}\n", status, mustJSON(message))
	if got.status != status || got.body != want {
		t.Errorf("%s:\ngot  %d %s\nwant %d %s", what, got.status, got.body, status, want)
	}
	if ct := got.header.Get("Content-Type"); ct != "application/json; charset=utf-8" {
		t.Errorf("%s: Content-Type %q", what, ct)
	}
}

func mustJSON(value any) string {
	var b strings.Builder
	json.NewEncoder(&b).Encode(value)
	return strings.TrimSpace(b.String())
}

func wantContent(t testing.TB, path, want string) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || string(got) != want {
		t.Errorf("%s: %.60q %v, want %.60q", path, got, err, want)
	}
}

var acceptEncodings = []struct{ header, plain, ranged string }{ // what serves; "": 406
	{"", "identity", "identity"},
	{"identity", "identity", "identity"},
	{"*", "identity", "identity"},
	{"br", "identity", "identity"},
	{"deflate, br", "identity", "identity"},
	{"gzip", "gzip", "identity"},
	{"gzip, deflate, br", "gzip", "identity"},
	{"GZIP", "gzip", "identity"},
	{"br, gzip;q=0.1", "gzip", "identity"},
	{"gzip;q=0.5, identity", "identity", "identity"},
	{"gzip;q=0.5, identity;q=0.1", "gzip", "identity"},
	{"gzip;q=x", "gzip", "identity"},
	{"*;q=0, gzip", "gzip", ""},
	{"identity;q=0, *", "gzip", ""},
	{"gzip;q=0", "identity", "identity"},
	{"identity;q=0", "", ""},
	{"br, *;q=0", "", ""},
	{"*;q=0, identity;q=0.1", "identity", "identity"},
	{"identity;q=0, gzip;q=0.5", "gzip", ""},
}

func TestAcceptEncoding(t *testing.T) {
	d := startDaemon(t)
	file := writeFile(t, filepath.Join(publicDir(t), "f.txt"), strings.Repeat("0123456789", 1000), 0o644)
	path := filesPath("path", file)
	for _, c := range acceptEncodings {
		for _, ranged := range []bool{false, true} {
			headers, want, status := []string{"Accept-Encoding", c.header}, c.plain, 200
			message := "error parsing Accept-Encoding: no acceptable encoding found, supported: [gzip]"
			if ranged {
				headers, want, status = append(headers, "Range", "bytes=0-9"), c.ranged, 206
				message = "identity encoding not acceptable for Range or conditional request"
			}
			got := d.request(t, "GET", path, "", headers...)
			encoding := got.header.Get("Content-Encoding")
			switch {
			case want == "":
				wantFailure(t, c.header, got, 406, message)
			case got.status != status || (encoding == "gzip") != (want == "gzip"):
				t.Errorf("%q, ranged %v: %d %q, want %d %s", c.header, ranged, got.status, encoding, status, want)
			}
		}
	}
}

func TestDownloadFailures(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "mkdir dir; echo > f; mkfifo fifo; ln -s loop loop; ln -s nowhere dangling")
	listener, err := net.Listen("unix", filepath.Join(home, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	for _, c := range []struct {
		path, user string
		status     int
		message    string
	}{
		{"f", "ghost", 401, "error looking up user 'ghost': user: unknown user ghost"},
		{"~other", "user", 400, "error expanding and resolving path '~other': failed to expand path '' for user 'user': cannot expand user-specific home dir"},
		{"none", "user", 404, "path 'HOME/none' does not exist"},
		{"dangling", "user", 404, "path 'HOME/dangling' does not exist"},
		{"f/x", "user", 500, "error checking if path exists 'HOME/f/x': stat HOME/f/x: not a directory"},
		{"loop", "user", 500, "error checking if path exists 'HOME/loop': stat HOME/loop: too many levels of symbolic links"},
		{"dir", "user", 400, "path 'HOME/dir' is a directory"},
		{"", "user", 400, "path 'HOME' is a directory"},
		{"fifo", "user", 400, "path 'HOME/fifo' is not a regular file"},
		{"sock", "user", 400, "path 'HOME/sock' is not a regular file"},
		{"/dev/zero", "user", 400, "path '/dev/zero' is not a regular file"},
	} {
		got := d.request(t, "GET", filesPath("path", c.path, "username", c.user), "")
		wantFailure(t, c.path, got, c.status, strings.ReplaceAll(c.message, "HOME", home))
	}
	d.request(t, "POST", "/init", `{"defaultUser":"gone"}`)
	wantFailure(t, "default user", d.request(t, "GET", filesPath("path", "x"), ""), 401, "error looking up user 'gone': user: unknown user gone")
	wantFailure(t, "expiration", d.request(t, "GET", filesPath("path", "x", "signature_expiration", "soon"), ""), 400, "signature_expiration is no integer: 'soon'")
}

func TestDownload(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	content := strings.Repeat("0123456789", 10)
	for _, c := range []struct{ name, content, disposition, contentType string }{
		{"f.txt", content, "inline; filename=f.txt", "text/plain; charset=utf-8"},
		{"a b.html", content, `inline; filename="a b.html"`, "text/html; charset=utf-8"},
		{"ü.JSON", content, "inline; filename*=utf-8''%C3%BC.JSON", "application/json"},
		{"x.tar.gz", content, "inline; filename=x.tar.gz", "application/gzip"},
		{"index.html", content, "inline; filename=index.html", "text/html; charset=utf-8"},
		{"noext", content, "inline; filename=noext", "text/plain; charset=utf-8"},
		{"bin", "\x00\x01\x02", "inline; filename=bin", "application/octet-stream"},
		{"empty.unknown", "", "inline; filename=empty.unknown", "text/plain; charset=utf-8"},
	} {
		writeFile(t, filepath.Join(home, c.name), c.content, 0o600)
		for _, method := range []string{"GET", "HEAD"} {
			got := d.request(t, method, filesPath("path", c.name, "username", "user"), "", "Accept-Encoding", "identity")
			want := http.Header{"Content-Disposition": {c.disposition}, "Content-Type": {c.contentType}, "Accept-Ranges": {"bytes"},
				"Content-Length": {strconv.Itoa(len(c.content))}, "Vary": {"Origin", "Accept-Encoding"}}
			for name, values := range want {
				if !slices.Equal(got.header[name], values) {
					t.Errorf("%s %s: %s %q, want %q", method, c.name, name, got.header[name], values)
				}
			}
			if got.header.Get("Last-Modified") == "" || got.header.Get("ETag") != "" || got.header.Get("Cache-Control") != "" || got.status != 200 ||
				method == "GET" && got.body != c.content || method == "HEAD" && got.body != "" {
				t.Errorf("%s %s: %d %v %q", method, c.name, got.status, got.header, got.body)
			}
		}
	}
	modified := lstat(t, home+"/f.txt").Mtim
	date := time.Unix(modified.Unix()).UTC().Format(http.TimeFormat)
	for _, c := range []struct {
		header, value string
		status        int
		contentRange  string
		body          string
	}{
		{"Range", "bytes=0-4", 206, "bytes 0-4/100", "01234"},
		{"Range", "bytes=-3", 206, "bytes 97-99/100", "789"},
		{"Range", "bytes=200-", 416, "bytes */100", "invalid range: failed to overlap\n"},
		{"Range", "bytes=-0", 416, "bytes */100", "invalid range: failed to overlap\n"},
		{"Range", "bytes= - +00 , -0", 416, "bytes */100", "invalid range: failed to overlap\n"},
		{"Range", "bytes=-0,-3", 206, "bytes 97-99/100", "789"},
		{"If-Modified-Since", date, 304, "", ""},
		{"If-Modified-Since", "Mon, 01 Jan 2001 00:00:00 GMT", 200, "", content},
		{"If-None-Match", `"x"`, 200, "", content},
	} {
		got := d.request(t, "GET", filesPath("path", "f.txt", "username", "user"), "", c.header, c.value, "Accept-Encoding", "identity")
		if got.status != c.status || got.header.Get("Content-Range") != c.contentRange || got.body != c.body {
			t.Errorf("%s: %s: %d %q %.40q", c.header, c.value, got.status, got.header.Get("Content-Range"), got.body)
		}
	}
	got := d.request(t, "GET", filesPath("path", "f.txt", "username", "user"), "", "Range", "bytes=0-1,5-6")
	if got.status != 206 || !strings.HasPrefix(got.header.Get("Content-Type"), "multipart/byteranges") {
		t.Errorf("two ranges: %d %v", got.status, got.header)
	}
	got = d.request(t, "GET", filesPath("path", "f.txt", "username", "user"), "", "Range", "bytes="+strings.Repeat("0-0,", 1000)+"0-1")
	if got.status != 200 && got.status != 206 {
		t.Errorf("1,000 ranges: %d", got.status)
	}
	got = d.request(t, "GET", filesPath("path", "empty.unknown", "username", "user"), "", "Range", "bytes=-5")
	if got.status != 200 || got.body != "" || got.header.Get("Content-Range") != "" {
		t.Errorf("the last bytes of an empty file: %d %v", got.status, got.header)
	}
	got = d.request(t, "GET", filesPath("path", "f.txt", "username", "user"), "", "Range", "bytes=0-1", "If-Range", date)
	if got.status != 206 || got.body != "01" {
		t.Errorf("If-Range: %d %q", got.status, got.body)
	}
	got = d.request(t, "GET", filesPath("path", "f.txt", "username", "user"), "", "Range", "bytes=0-1", "If-Range", "Mon, 01 Jan 2001 00:00:00 GMT")
	if got.status != 200 || got.body != content {
		t.Errorf("If-Range, changed since: %d %q", got.status, got.body)
	}
	got = d.request(t, "GET", filesPath("path", "noext", "username", "user"), "", "Accept-Encoding", "gzip")
	z, err := gzip.NewReader(strings.NewReader(got.body))
	if err != nil {
		t.Fatal(err)
	}
	plain, err := io.ReadAll(z)
	if err != nil || string(plain) != content || got.header.Get("Content-Type") != "application/octet-stream" || got.header.Get("Last-Modified") != "" || got.header.Get("Accept-Ranges") != "" {
		t.Errorf("gzip: %v %v", got.header, err)
	}
}

// ---- signatures ----------------------------------------------------------------------------------------------------

const longToken = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestSignatures(t *testing.T) {
	for _, c := range []struct{ path, operation, user, token, expiration, signature, refusal string }{
		{"/home/user/hello.txt", "read", "user", "test-access-token", "", "v1_3OZkxbjWAQlC1yGkqxvUGPQ3ro8JmVx0tdR1wNM7vTA", ""},
		{"hello.txt", "read", "-", "test-access-token", "", "v1_Ld8gLy5iV+lAv8Lp0i+p1V97DoRJnssjzOIkwmXix+Y", ""},
		{"/home/user/hello.txt", "write", "root", "test-access-token", "1735689600", "v1_5WzanDAOVPB1CUjXi8M7SrsDbPcuGeBKOrZrY5ZPCgU", "signature is already expired"},
		{"-", "write", "-", "test-access-token", "", "v1_/XNIEdSf0pcozh4RDjCf46t/sV8bikS4rjFrwlu6r6I", ""},
		{"/tmp/a b/ü.txt", "read", "user", longToken, "4102444800", "v1_d9Hf3iy++cBtIerZrCcySEo2bko471bGmpE2xImHhaA", ""},
		{"/tmp/x.txt", "read", "root", longToken, "", "v1_vFLHyUJPt/wJLgID35NxkGVdOm+8b912ZwsT6lptMwI", ""},
		{"/tmp/x.txt", "write", "root", longToken, "", "v1_vFLHyUJPt/wJLgID35NxkGVdOm+8b912ZwsT6lptMwI", "invalid signature"},
		{"/tmp/x.txt", "read", "root", longToken, "", "", "invalid signature"},
		{"/tmp/x.txt", "read", "root", longToken, "", "-", "missing signature query parameter"},
		{"/tmp/x.txt", "read", "root", longToken, "1", "v1_wrong", "invalid signature"},
	} {
		query := url.Values{}
		for name, value := range map[string]string{"path": c.path, "username": c.user, "signature": c.signature} {
			if value != "-" {
				query.Set(name, value)
			}
		}
		if c.expiration != "" {
			query.Set("signature_expiration", c.expiration)
		}
		token := &accessToken{}
		token.set(c.token)
		status, got := token.refuseFile("", query, c.operation, time.Now())
		if got != c.refusal || (status != 0) != (c.refusal != "") {
			t.Errorf("%s %s: %d %q, want %q", c.operation, c.path, status, got, c.refusal)
		}
		if _, got := token.refuseFile(c.token, url.Values{"signature": {"bad"}}, c.operation, time.Now()); got != "" {
			t.Errorf("token in the header, bad signature: %q", got)
		}
		if _, got := token.refuseFile("other", query, c.operation, time.Now()); got != "access token present in header but does not match" {
			t.Errorf("another token in the header: %q", got)
		}
		if _, got := (&accessToken{}).refuseFile("other", url.Values{}, c.operation, time.Now()); got != "" {
			t.Errorf("no token set: %q", got)
		}
	}
}

func TestSignedRequests(t *testing.T) {
	d := startDaemon(t)
	d.request(t, "POST", "/init", `{"accessToken":"secret"}`)
	file := writeFile(t, filepath.Join(publicDir(t), "f"), "x", 0o644)
	sign := func(operation string, expires int64) string {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s:%s:root:secret:%d", file, operation, expires))
		return filesPath("path", file, "username", "root", "signature_expiration", strconv.FormatInt(expires, 10),
			"signature", "v1_"+base64.RawStdEncoding.EncodeToString(sum[:]))
	}
	later := time.Now().Unix() + 100
	for _, method := range []string{"GET", "HEAD"} {
		if got := d.request(t, method, sign("read", later), ""); got.status != 200 {
			t.Errorf("%s: %d %s", method, got.status, got.body)
		}
	}
	if got := d.uploadForm(t, sign("write", later), formPart{"file", "", "text field"}); got.status != 200 {
		t.Errorf("browser form: %d %s", got.status, got.body)
	}
	wantContent(t, file, "text field")
	wantFailure(t, "expired", d.request(t, "GET", sign("read", 1), ""), 401, "signature is already expired")
	wantFailure(t, "operation", d.request(t, "GET", sign("write", later), ""), 401, "invalid signature")
	wantFailure(t, "none", d.upload(t, filesPath("path", file), "x"), 401, "missing signature query parameter")
	if got := d.request(t, "POST", "/files/compose", `{}`); got.status != 401 {
		t.Errorf("compose without the token: %d", got.status)
	}
	if got := d.request(t, "GET", filesPath("path", file), "", "X-Access-Token", "secret"); got.status != 200 {
		t.Errorf("token: %d", got.status)
	}
}

// ---- upload --------------------------------------------------------------------------------------------------------

func TestUpload(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	large := strings.Repeat("large!", 1<<18) // 1.5 MiB
	if got := d.uploadForm(t, filesPath("username", "user"), formPart{"file", "dir/x.txt", "relative"}, formPart{"other", "skipped", "?"},
		formPart{"file", home + "/abs", "absolute"}, formPart{"file", "large", large}); got.status != 200 || got.header.Get("Content-Type") != "application/json" {
		t.Errorf("%d %s", got.status, got.body)
	} else {
		wantJSON(t, "answer", got.body, fmt.Sprintf(`[{"path":"%[1]s/dir/x.txt","name":"x.txt","type":"file"},
			{"path":"%[1]s/abs","name":"abs","type":"file"},{"path":"%[1]s/large","name":"large","type":"file"}]`, home))
	}
	for name, content := range map[string]string{"dir/x.txt": "relative", "abs": "absolute", "large": large} {
		wantContent(t, filepath.Join(home, name), content)
		if st := lstat(t, filepath.Join(home, name)); st.Uid != uidUser || st.Gid != uidUser || st.Mode != unix.S_IFREG|0o644 {
			t.Errorf("%s: %d:%d %o", name, st.Uid, st.Gid, st.Mode)
		}
	}
	if st := lstat(t, home+"/dir"); st.Uid != uidUser || st.Mode != unix.S_IFDIR|0o755 {
		t.Errorf("dir: %d %o", st.Uid, st.Mode)
	}

	// What is replaced keeps mode, inode (in place), links and attributes, and changes its owner.
	for _, content := range []string{"", "short", large} {
		file := filepath.Join(home, "kept")
		os.Remove(file)
		writeFile(t, file, "old old old", 0o600)
		unix.Setxattr(file, "user.other", []byte("kept"), 0)
		before := lstat(t, file)
		if got := d.upload(t, filesPath("path", "kept", "username", "user"), content); got.status != 200 {
			t.Errorf("%d %s", got.status, got.body)
		}
		wantContent(t, file, content)
		after := lstat(t, file)
		if after.Uid != uidUser || after.Mode != unix.S_IFREG|0o600 || len(content) < 1000 && after.Ino != before.Ino {
			t.Errorf("%d bytes: %d %o, inode %d and %d", len(content), after.Uid, after.Mode, before.Ino, after.Ino)
		}
		value := make([]byte, 10)
		if n, err := unix.Getxattr(file, "user.other", value); err != nil || string(value[:n]) != "kept" {
			t.Errorf("%d bytes: user.other %q %v", len(content), value[:max(n, 0)], err)
		}
		// A hard link goes on naming the same file.
		os.Remove(home + "/hard")
		if err := os.Link(file, home+"/hard"); err != nil {
			t.Fatal(err)
		}
		if got := d.upload(t, filesPath("path", "kept", "username", "user"), content+large); got.status != 200 {
			t.Errorf("%d %s", got.status, got.body)
		}
		wantContent(t, home+"/hard", content+large)
	}

	// Links are followed, dangling ones too.
	shell(t, home, "ln -s target l1; ln -s dir/made l2")
	for link, target := range map[string]string{"l1": "target", "l2": "dir/made"} {
		if got := d.upload(t, filesPath("path", filepath.Join(home, link), "username", "root"), large); got.status != 200 {
			t.Errorf("%d %s", got.status, got.body)
		}
		wantContent(t, filepath.Join(home, target), large)
		if lstat(t, filepath.Join(home, link)).Mode&unix.S_IFMT != unix.S_IFLNK {
			t.Errorf("%s is no link any more", link)
		}
	}

	// gzip applies to the whole body.
	var zipped bytes.Buffer
	z := gzip.NewWriter(&zipped)
	body, contentType := form(t, formPart{"file", "gz", large})
	io.WriteString(z, body)
	z.Close()
	if got := d.request(t, "POST", filesPath("username", "user"), zipped.String(), "Content-Type", contentType, "Content-Encoding", "GZIP"); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	wantContent(t, home+"/gz", large)
	noTemporaryFiles(t, home)
}

func noTemporaryFiles(t testing.TB, dir string) {
	t.Helper()
	filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if strings.HasPrefix(filepath.Base(path), ".envd-") {
			t.Errorf("%s was left behind", path)
		}
		return nil
	})
}

func TestUploadFailures(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "mkdir dir; echo > f; mkfifo fifo")
	part := func(field, filename string) (string, string) { return form(t, formPart{field, filename, "content"}) }
	plain, plainType := part("file", "new")
	noName, noNameType := part("file", "")
	twice, twiceType := form(t, formPart{"file", "t1", "1"}, formPart{"file", "t2", "2"}, formPart{"file", "t1", "3"})
	often, oftenType := form(t, formPart{"file", "t1", "1"}, formPart{"file", "t2", "2"}, formPart{"file", "t3", "2"}, formPart{"file", "./t1", "3"})
	broken := plain[:len(plain)-20]
	binary := "application/octet-stream"
	for _, c := range []struct {
		what, query, contentType, body string
		headers                        []string
		status                         int
		message                        string
	}{
		{"empty user", "username=&path=dir", "", "x", nil, 400, "unsupported content type: , expected multipart/form-data or application/octet-stream"},
		{"encoding before user", "username=ghost", plainType, plain, []string{"Content-Encoding", "br"}, 400, "error decompressing request body: unsupported Content-Encoding: br, supported: [gzip]"},
		{"user before metadata", "username=ghost", plainType, plain, []string{"X-Metadata-K", "aü"}, 401, "error looking up user 'ghost': user: unknown user ghost"},
		{"metadata before type", "username=user", "text/plain", plain, []string{"X-Metadata-K", "aü"}, 400, "invalid metadata: metadata value for key \"k\" contains non-printable-ASCII byte 0xC3 at offset 1"},
		{"user", "username=ghost", plainType, plain, nil, 401, "error looking up user 'ghost': user: unknown user ghost"},
		{"home", "username=user&path=~other", plainType, plain, nil, 400, "error expanding and resolving path '~other': failed to expand path '' for user 'user': cannot expand user-specific home dir"},
		{"no path", "username=user", binary, "x", nil, 400, "path query parameter is required for raw body upload"},
		{"type", "username=user&path=f", "text/plain", "x", nil, 400, "unsupported content type: text/plain, expected multipart/form-data or application/octet-stream"},
		{"no type", "username=user&path=f", "", "x", nil, 400, "unsupported content type: , expected multipart/form-data or application/octet-stream"},
		{"encoding", "username=user&path=f", binary, "x", []string{"Content-Encoding", "br"}, 400, "error decompressing request body: unsupported Content-Encoding: br, supported: [gzip]"},
		{"no gzip", "username=user&path=f", binary, "plainly no gzip", []string{"Content-Encoding", "gzip"}, 400, "error decompressing request body: failed to create gzip reader: gzip: invalid header"},
		{"no filename", "username=user", noNameType, noName, nil, 400, "error getting multipart custom part file name: filename not found in Content-Disposition header"},
		{"directory", "username=user&path=dir", plainType, plain, nil, 400, "path is a directory: HOME/dir"},
		{"empty path", "username=user&path=", plainType, plain, nil, 400, "path is a directory: HOME"},
		{"fifo", "username=user&path=fifo", binary, "x", nil, 400, "path 'HOME/fifo' is not a regular file"},
		{"device", "username=user&path=/dev/null", binary, "x", nil, 400, "path '/dev/null' is not a regular file"},
		{"below a file", "username=user&path=f/x", binary, "x", nil, 500, "error ensuring directories: path is a file: HOME/f"},
		{"boundary", "username=user", "multipart/form-data", plain, nil, 500, "error parsing multipart form: no multipart boundary param in Content-Type"},
		{"cut form", "username=user", plainType, plain[:10], nil, 500, "error reading form: multipart: NextPart: EOF"},
		{"cut part", "username=user", plainType, broken, nil, 500, "error writing file: unexpected EOF"},
		{"twice", "username=user", twiceType, twice, nil, 400, "you cannot upload multiple files to the same path 'HOME/t1' in one upload request, only the first specified file was uploaded"},
		{"often", "username=user", oftenType, often, nil, 400, "you cannot upload multiple files to the same path 'HOME/t1' in one upload request, only the first specified file was uploaded, also the following files were uploaded: HOME/t2, HOME/t3"},
		{"metadata key", "username=user&path=f", binary, "x", []string{"X-Metadata-" + strings.Repeat("K", 247), "v"}, 400, "invalid metadata: metadata key \"" + strings.Repeat("k", 247) + "\" exceeds 246 bytes"},
		{"metadata value", "username=user&path=f", binary, "x", []string{"X-Metadata-K", "aü"}, 400, "invalid metadata: metadata value for key \"k\" contains non-printable-ASCII byte 0xC3 at offset 1"},
		{"metadata size", "username=user&path=f", binary, "x", []string{"X-Metadata-K", strings.Repeat("v", 4087)}, 400, "invalid metadata: total metadata size 4097 exceeds 4096 bytes"},
		{"long name", "username=user&path=" + strings.Repeat("n", 256), binary, "x", nil, 500, "error ensuring directories: open HOME/" + strings.Repeat("n", 256) + ": file name too long"},
	} {
		var headers []string
		if c.contentType != "" {
			headers = []string{"Content-Type", c.contentType}
		}
		got := d.request(t, "POST", "/files?"+c.query, c.body, append(headers, c.headers...)...)
		wantFailure(t, c.what, got, c.status, strings.ReplaceAll(c.message, "HOME", home))
	}
	wantContent(t, home+"/f", "\n")
	body, contentType := part("other", "x")
	if got := d.request(t, "POST", filesPath("username", "user"), body, "Content-Type", contentType); got.status != 200 || strings.TrimSpace(got.body) != "[]" {
		t.Errorf("no file part: %d %s", got.status, got.body)
	}
}

func TestMetadata(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	path := filesPath("path", "m", "username", "user")
	for _, content := range []string{"small", strings.Repeat("x", 2<<20)} {
		got := d.upload(t, path, content, "X-Metadata-Foo", "bar", "X-Metadata-Empty", "")
		if strings.Contains(got.body, "metadata") == false {
			t.Skip("needs user.* extended attributes")
		}
		wantJSON(t, "upload", got.body, fmt.Sprintf(`[{"path":"%s/m","name":"m","type":"file","metadata":{"foo":"bar","empty":""}}]`, home))
		got = d.upload(t, path, content, "X-Metadata-Foo", "other", "X-Metadata-B", "2")
		wantJSON(t, "replace", got.body, fmt.Sprintf(`[{"path":"%s/m","name":"m","type":"file","metadata":{"foo":"other","b":"2"}}]`, home))
		for _, method := range []string{"Stat", "ListDir"} {
			entries, err := d.fsCall(t, "user", method, map[string]string{"Stat": "m", "ListDir": ""}[method])
			if err != nil || len(entries) != 1 || len(entries[0].GetMetadata()) != 2 || entries[0].GetMetadata()["foo"] != "other" {
				t.Errorf("%s: %v %v", method, entries, err)
			}
		}
		got = d.upload(t, path, content)
		wantJSON(t, "clear", got.body, fmt.Sprintf(`[{"path":"%s/m","name":"m","type":"file"}]`, home))
	}
}

// An upload that breaks, at whatever point, leaves the old file and no temporary one.
func TestBrokenUploads(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	file := filepath.Join(dir, "f")
	old := strings.Repeat("the old content\n", 10_000)
	writeFile(t, file, old, 0o600)
	before := lstat(t, file)
	content := bytes.Repeat([]byte("new"), 2<<20)
	rounds := 1000
	if testing.Short() {
		rounds = 50
	}
	for i := range rounds {
		size := []int{100, 500_000, 3 << 20, 6 << 20}[i%4]
		conn, err := net.Dial("tcp", d.addr)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n", filesPath("path", file), size)
		conn.Write(content[:rand.IntN(size)])
		if i%2 == 0 {
			conn.(*net.TCPConn).SetLinger(0)
		}
		conn.Close()
	}
	waitFor(t, 10*time.Second, "all uploads broken off", func() bool {
		entries, _ := os.ReadDir(dir)
		return len(entries) == 1
	})
	wantContent(t, file, old)
	if after := lstat(t, file); after.Ino != before.Ino || after.Mode != before.Mode || after.Mtim != before.Mtim {
		t.Errorf("the old file was touched")
	}
}

// A disk that fills up leaves the old file and no temporary one, and says so.
func TestDiskFull(t *testing.T) {
	needRoot(t)
	dir := publicDir(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m,mode=777"); err != nil {
		t.Skip("needs mount: " + err.Error())
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	d := startDaemon(t)
	file := filepath.Join(dir, "f")
	for i := range 100 {
		old := strings.Repeat("old", 100_000+rand.IntN(100_000))
		writeFile(t, file, old, 0o644)
		filler := writeFile(t, filepath.Join(dir, "filler"), "", 0o644)
		var fs unix.Statfs_t
		unix.Statfs(dir, &fs)
		if err := os.Truncate(filler, 0); err != nil {
			t.Fatal(err)
		}
		free := int(fs.Bavail) * int(fs.Bsize)
		room := rand.IntN(100_000)
		if err := os.WriteFile(filler, make([]byte, free-room), 0o644); err != nil {
			t.Fatal(err)
		}
		size := len(old) + room + 8192 + rand.IntN(3<<20)
		got := d.upload(t, filesPath("path", file), strings.Repeat("n", size))
		wantFailure(t, fmt.Sprint(i), got, 507, fmt.Sprintf("attempted to write %d bytes: not enough disk space available", size))
		wantContent(t, file, old)
		got = d.upload(t, filesPath("path", filepath.Join(dir, "new")), strings.Repeat("n", size))
		if got.status != 507 {
			t.Errorf("a new file: %d", got.status)
		}
		os.Remove(filler)
		if entries, _ := os.ReadDir(dir); len(entries) != 1 {
			t.Fatalf("%d files, want 1", len(entries))
		}
	}
	// A gzip bomb is bounded by the disk, never by memory.
	var zipped bytes.Buffer
	z, _ := gzip.NewWriterLevel(&zipped, gzip.BestSpeed)
	for range 512 {
		z.Write(make([]byte, 1<<20))
	}
	z.Close()
	if got := d.upload(t, filesPath("path", file), zipped.String(), "Content-Encoding", "gzip"); got.status != 507 {
		t.Errorf("gzip bomb: %d %s", got.status, got.body)
	}
	if rss := d.peakRSS() >> 20; rss > 64 && !raceEnabled() {
		t.Errorf("peak RSS %d MiB", rss)
	}
	noTemporaryFiles(t, dir)
}

func TestManyParts(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	parts := make([]formPart, 10_000)
	for i := range parts {
		parts[i] = formPart{"file", fmt.Sprintf("%s/p%d", dir, i%5000), "x"}
	}
	if got := d.uploadForm(t, "/files", parts[:5000]...); got.status != 200 || strings.Count(got.body, `"file"`) != 5000 {
		t.Errorf("%d %.100s", got.status, got.body)
	}
	if got := d.uploadForm(t, "/files", parts...); got.status != 400 {
		t.Errorf("10,000 parts, the second half to the same paths: %d %.100s", got.status, got.body)
	}
	body, contentType := form(t, formPart{"file", strings.Repeat("n", 1<<20), "x"})
	if got := d.request(t, "POST", "/files", body, "Content-Type", contentType); got.status != 400 {
		t.Errorf("a part header of 1 MiB: %d %.100s", got.status, got.body)
	}
	d.healthy(t)
}

// Uploads of one file at once: one of them wins, directories included.
func TestConcurrentUploads(t *testing.T) {
	d := startDaemon(t)
	base := publicDir(t)
	for round := range 60 {
		file := fmt.Sprintf("%s/%d/dir/f", base, round/30)
		var wait sync.WaitGroup
		for i := range 8 {
			wait.Go(func() {
				content := strings.Repeat(string(rune('a'+i)), 1000+i*100_000)
				if got := d.upload(t, filesPath("path", file), content); got.status != 200 {
					t.Errorf("%d %s", got.status, got.body)
				}
			})
		}
		wait.Wait()
		text, _ := os.ReadFile(file)
		if len(text) == 0 || len(text) != 1000+int(text[0]-'a')*100_000 || string(text) != strings.Repeat(string(text[:1]), len(text)) {
			t.Fatalf("round %d: %d bytes that nobody has uploaded", round, len(text))
		}
	}
}

// Large uploads that take their time hold none of the memory that lets small ones be written in place. What they write is
// as private as the file that they will replace.
func TestLargeUploadsUnderWay(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	var wait sync.WaitGroup
	var feeds []*io.PipeWriter
	for i := range 40 {
		body, feed := io.Pipe()
		feeds = append(feeds, feed)
		file := writeFile(t, fmt.Sprint(dir, "/large", i), "old", 0o600)
		wait.Go(func() {
			response, err := http.Post(d.url+filesPath("path", file), "application/octet-stream", body)
			if err != nil {
				t.Error(err)
				return
			}
			response.Body.Close()
		})
		wait.Go(func() { feed.Write(make([]byte, 3<<20)) })
	}
	waitFor(t, 20*time.Second, "all of them", func() bool {
		hidden, _ := filepath.Glob(dir + "/.envd-*")
		return len(hidden) == 40 && !slices.ContainsFunc(hidden, func(name string) bool { return lstat(t, name).Size < 2<<20 })
	})
	hidden, _ := filepath.Glob(dir + "/.envd-*")
	if mode := lstat(t, hidden[0]).Mode & 0o777; mode != 0o600 {
		t.Errorf("the hidden file of a target of mode 0600 has %o", mode)
	}
	file := writeFile(t, dir+"/small", "old", 0o644)
	inode := lstat(t, file).Ino
	d.upload(t, filesPath("path", file), strings.Repeat("new", 100_000))
	if lstat(t, file).Ino != inode {
		t.Error("a small file was replaced, not written in place")
	}
	for _, feed := range feeds {
		feed.Close()
	}
	wait.Wait()
	if st := lstat(t, dir+"/large0"); st.Mode&0o777 != 0o600 || st.Size != 3<<20 {
		t.Errorf("mode %o, %d bytes", st.Mode, st.Size)
	}
}

func TestRefusedUploadMakesNothing(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	for _, path := range []string{"new/", "new/.", "new/x/.."} {
		got := d.upload(t, filesPath("path", dir+"/"+path), "x")
		wantFailure(t, path, got, 400, "path is a directory: "+dir+"/"+path)
		if entries, _ := os.ReadDir(dir); len(entries) > 0 {
			t.Errorf("%s: there is %v", path, entries)
		}
	}
}

// leaseHolder keeps a lease on a file of its own, and gives it back half a second after it is asked to, when asked to.
func leaseHolder(args []string) {
	becomeUser(args[0])
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGIO)
	f, err := os.OpenFile(args[1], os.O_RDWR, 0)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	}
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("ready")
	if <-asked; args[2] == "yields" {
		time.Sleep(500 * time.Millisecond)
		f.Close()
	}
	time.Sleep(time.Minute)
}

// A lease, which any user can have on a file of his own, keeps an open waiting, but no handler for long.
func TestLeases(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "echo x > a; echo leased > kept; echo leased > yields; echo x > z; chown 61000 *")
	hold := func(name string) {
		holder := exec.Command(helperBinary(t), "lease-holder", home, name, name)
		out, _ := holder.StdoutPipe()
		if err := holder.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { holder.Process.Kill(); holder.Wait() })
		if line, _ := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
			t.Skip("needs leases: " + line)
		}
	}
	hold("kept")
	const refusal = "another program has a lease on it: resource temporarily unavailable"
	got := d.upload(t, filesPath("path", home+"/kept", "username", "user"), "x")
	wantFailure(t, "upload", got, 503, "error opening file: open "+home+"/kept: "+refusal)
	got = d.request(t, "GET", filesPath("path", home+"/kept", "username", "user"), "")
	wantFailure(t, "download", got, 503, fmt.Sprintf("error opening file '%[1]s/kept': open %[1]s/kept: %s", home, refusal))
	os.Remove(home + "/kept")
	hold("yields")
	got = d.request(t, "GET", filesPath("path", home), "", "Accept", "application/x-tar")
	if names := tarNames(t, got.body); !slices.Equal(names, []string{"a", "yields", "z"}) {
		t.Errorf("an archive has %q", names)
	}
}

// deviceAttacker swaps a file and a link to a device.
func deviceAttacker(args []string) {
	becomeUser(args[0])
	os.WriteFile("f", []byte("x"), 0o644)
	os.Symlink(args[1], "l")
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
		unix.Renameat2(unix.AT_FDCWD, "f", unix.AT_FDCWD, "l", unix.RENAME_EXCHANGE)
	}
}

// To open a device is to do something to it: to rewind a tape, to start a watchdog that resets the guest.
func TestDeviceIsNotOpened(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	device := publicDir(t) + "/device"
	if err := unix.Mknod(device, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		t.Skip("needs to make devices: ", err)
	}
	watch, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Skip("needs inotify: ", err)
	}
	defer unix.Close(watch)
	if _, err := unix.InotifyAddWatch(watch, device, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	attacker := exec.Command(helperBinary(t), "device-attacker", home, device)
	if err := attacker.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- attacker.Wait() }()
	var wait sync.WaitGroup
	var downloads, stop atomic.Int64
	for range 4 {
		wait.Go(func() {
			for ; stop.Load() == 0; downloads.Add(1) {
				d.request(t, "GET", filesPath("path", home+"/f", "username", "user"), "")
			}
		})
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	stop.Store(1)
	wait.Wait()
	if n, _ := unix.Read(watch, make([]byte, 4096)); n > 0 {
		t.Errorf("during %d downloads the device was opened as root", downloads.Load())
	}
}

// ---- compose -------------------------------------------------------------------------------------------------------

func TestCompose(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	compose := func(body string) httpReply { return d.request(t, "POST", "/files/compose", body) }
	shell(t, home, "echo one > a; echo two > b; mkdir dir; echo old > dest; chmod 600 dest; ln -s a link")
	got := compose(`{"source_paths":["a","` + home + `/b"],"destination":"new/dest","username":"user"}`)
	wantJSON(t, "compose", got.body, `{"path":"`+home+`/new/dest","name":"dest","type":"file"}`)
	wantContent(t, home+"/new/dest", "one\ntwo\n")
	if st := lstat(t, home+"/new/dest"); st.Uid != uidUser || st.Mode&0o777 != 0o644 {
		t.Errorf("%d %o", st.Uid, st.Mode)
	}
	for _, name := range []string{"a", "b"} {
		if _, err := os.Lstat(filepath.Join(home, name)); err == nil {
			t.Errorf("%s is still there", name)
		}
	}
	for _, c := range []struct {
		body    string
		status  int
		message string
	}{
		{`{`, 400, "invalid request body: unexpected EOF"},
		{`{"destination":"x"}`, 400, "source_paths must not be empty"},
		{`{"source_paths":["x"]}`, 400, "destination is required"},
		{`{"source_paths":["~other"],"destination":"d","username":"user"}`, 400, "error resolving path '~other': cannot expand user-specific home dir"},
		{`{"source_paths":["dest"],"destination":"~other","username":"user"}`, 400, "error resolving path '~other': cannot expand user-specific home dir"},
		{`{"source_paths":["dest"],"destination":"dir","username":"user"}`, 400, "path is a directory: HOME/dir"},
		{`{"source_paths":["dest"],"destination":"dest/x","username":"user"}`, 500, "error ensuring directories: path is a file: HOME/dest"},
		{`{"source_paths":["dest/x"],"destination":"x","username":"user"}`, 500, "error opening source file: path is a file: HOME/dest"},
		{`{"source_paths":["/dev/null"],"destination":"d","username":"user"}`, 400, "source path is not a regular file: /dev/null"},
		{`{"source_paths":["none"],"destination":"d","username":"user"}`, 404, "source file not found: HOME/none"},
		{`{"source_paths":["dir"],"destination":"d","username":"user"}`, 400, "source path is not a regular file: HOME/dir"},
		{`{"source_paths":["dest"],"destination":"dir/../dest","username":"user"}`, 400, `source path "dest" cannot be the same as destination`},
		{`{"source_paths":["dest"],"destination":"d","username":"ghost"}`, 401, "error looking up user 'ghost': user: unknown user ghost"},
	} {
		wantFailure(t, c.body, compose(c.body), c.status, strings.ReplaceAll(c.message, "HOME", home))
	}
	wantContent(t, home+"/dest", "old\n")
	noTemporaryFiles(t, home)
}

// ---- the hostile guest ---------------------------------------------------------------------------------------------

// attack is what the daemon is asked to do through a link that leads to root's directory or file.
var attacks = []struct {
	what, path string
	ask        func(d *daemon, t testing.TB, path string) bool
}{
	{"upload", "dirlink/file", uploadSmall},
	{"upload large", "dirlink/file", uploadLarge},
	{"upload to a link", "filelink", uploadSmall},
	{"upload large to a link", "filelink", uploadLarge},
	{"upload new", "dirlink/new", uploadSmall},
	{"upload below", "dirlink/newdir/new", uploadSmall},
	{"upload through two links", "chain/file", uploadSmall},
	{"upload dot dot", "dirlink/sub/../file", uploadSmall},
	{"upload through a dangling link", "dangling", uploadSmall},
	{"hard link", "hardlink", uploadSmall},
	{"hard link, large", "hardlink", uploadLarge},
	{"MakeDir", "dirlink/made/deep", func(d *daemon, t testing.TB, path string) bool {
		_, err := d.fsCall(t, "user", "MakeDir", path)
		return err != nil
	}},
	{"Remove", "dirlink/file", remove},
	{"Remove a directory", "dirlink/sub", remove},
	{"Move from", "dirlink/file", func(d *daemon, t testing.TB, path string) bool {
		_, err := d.fsCall(t, "user", "Move", path, "taken")
		return err != nil
	}},
	{"Move to", "dirlink/file", func(d *daemon, t testing.TB, path string) bool {
		_, err := d.fsCall(t, "user", "Move", "own", path)
		return err != nil
	}},
	{"compose to", "dirlink/file", func(d *daemon, t testing.TB, path string) bool {
		return d.request(t, "POST", "/files/compose", `{"source_paths":["own"],"destination":"`+path+`","username":"user"}`).status >= 400
	}},
	{"compose from", "dirlink/secret", func(d *daemon, t testing.TB, path string) bool {
		return d.request(t, "POST", "/files/compose", `{"source_paths":["`+path+`"],"destination":"stolen","username":"user"}`).status >= 400
	}},
	{"compose from a link", "secretlink", func(d *daemon, t testing.TB, path string) bool {
		return d.request(t, "POST", "/files/compose", `{"source_paths":["`+path+`"],"destination":"stolen","username":"user"}`).status >= 400
	}},
	{"unpack", "dirlink", func(d *daemon, t testing.TB, path string) bool {
		return d.request(t, "POST", filesPath("path", path, "username", "user"), archive(t, tarEntry{name: "file", content: "x"}),
			"Content-Type", "application/x-tar").status >= 400
	}},
	{"unpack below a link", ".", func(d *daemon, t testing.TB, path string) bool {
		return d.request(t, "POST", filesPath("path", path, "username", "user"), archive(t, tarEntry{name: "dirlink/file", content: "x"}),
			"Content-Type", "application/x-tar").status >= 400
	}},
}

func uploadSmall(d *daemon, t testing.TB, path string) bool {
	return d.upload(t, filesPath("path", path, "username", "user"), "attack").status >= 400
}

func uploadLarge(d *daemon, t testing.TB, path string) bool {
	return d.upload(t, filesPath("path", path, "username", "user"), strings.Repeat("attack", 1<<19)).status >= 400
}

func remove(d *daemon, t testing.TB, path string) bool {
	_, err := d.fsCall(t, "user", "Remove", path)
	return err != nil
}

// rootsOwn makes a directory of root's and answers a function that fails the test when anything in it was touched.
func rootsOwn(t testing.TB) (dir string, untouched func(what string) bool) {
	t.Helper()
	dir = filepath.Join(publicDir(t), "roots")
	shell(t, filepath.Dir(dir), "chmod 755 .; mkdir -p roots/sub; echo root > roots/file; echo root > roots/sub/f; echo secret > roots/secret; chmod 600 roots/file roots/secret")
	list := func() string {
		var b strings.Builder
		filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
			st := lstat(t, path)
			fmt.Fprintln(&b, path, st.Uid, st.Gid, st.Mode, st.Size, st.Mtim, st.Ino)
			return nil
		})
		return b.String()
	}
	before := list()
	return dir, func(what string) bool {
		if after := list(); after != before {
			t.Errorf("%s: root's files were touched:\nbefore\n%safter\n%s", what, before, after)
			before = after
			return false
		}
		return true
	}
}

func TestLinksLendNoPower(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	roots, untouched := rootsOwn(t)
	shell(t, home, fmt.Sprintf(`ln -s %[1]s dirlink; ln -s %[1]s/file filelink; ln -s %[1]s/new dangling; ln -s dirlink chain; ln -s %[1]s/secret secretlink
		chown -h 61000:61000 dirlink filelink dangling chain secretlink; ln %[1]s/file hardlink; echo own > own; chown 61000 own`, roots))
	if lstat(t, roots+"/file").Nlink != 2 {
		t.Fatal("no hard link")
	}
	for _, attack := range attacks {
		if refused := attack.ask(d, t, filepath.Join(home, attack.path)); !refused {
			t.Errorf("%s: not refused", attack.what)
		}
		untouched(attack.what)
	}
	if _, err := os.Lstat(home + "/stolen"); err == nil {
		t.Error("root's file was copied to the user")
	}
	// Root's links, and links to what is the user's, go on working.
	shell(t, home, "mkdir vol; chown 61000:61000 vol; ln -s vol mine; chown -h 61000 mine; ln -s "+roots+" rootslink; ln -s vol theirs; chown -h 61001 theirs")
	for _, user := range []string{"user", "root", "noshell"} {
		for path, content := range map[string]string{"mine/a/f": "x", "mine/b": strings.Repeat("x", 2<<20)} {
			for range 2 {
				got := d.upload(t, filesPath("path", filepath.Join(home, path), "username", user), content)
				if got.status != 200 && user == "user" {
					t.Errorf("%s as %s: %d %s", path, user, got.status, got.body)
				}
			}
		}
		os.RemoveAll(home + "/vol/a")
		os.RemoveAll(home + "/vol/b")
	}
	if got := d.upload(t, filesPath("path", home+"/rootslink/new", "username", "root"), "x"); got.status != 200 {
		t.Errorf("root's own link: %d %s", got.status, got.body)
	}
	if got := d.upload(t, filesPath("path", home+"/theirs/new", "username", "user"), "x"); got.status != 500 {
		t.Errorf("a link of someone who may not write there: %d %s", got.status, got.body)
	}
	noTemporaryFiles(t, home)
	noTemporaryFiles(t, roots)
}

// raceAttacker swaps a directory and a link to root's, as fast as it can, as the user.
func raceAttacker(args []string) {
	home, roots := args[0], args[1]
	swaps, _ := strconv.Atoi(args[2])
	becomeUser(home)
	os.Mkdir("real", 0o755)
	os.Symlink(roots, "link")
	os.Symlink(roots+"/file", "flink")
	os.WriteFile("plain", nil, 0o644)
	unix.Rename("real", "swap")
	for range swaps {
		unix.Renameat2(unix.AT_FDCWD, "swap", unix.AT_FDCWD, "link", unix.RENAME_EXCHANGE)
		unix.Renameat2(unix.AT_FDCWD, "plain", unix.AT_FDCWD, "flink", unix.RENAME_EXCHANGE)
	}
}

func init() {
	testRoles["race-attacker"], testRoles["hidden-attacker"] = raceAttacker, hiddenAttacker
	testRoles["device-attacker"], testRoles["lease-holder"] = deviceAttacker, leaseHolder
}

func becomeUser(dir string) {
	syscall.Setgroups(nil)
	syscall.Setgid(uidUser)
	if syscall.Setuid(uidUser) != nil || os.Chdir(dir) != nil {
		os.Exit(1)
	}
}

func TestRacingAttacker(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	roots, untouched := rootsOwn(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	swaps := 100_000
	if testing.Short() {
		swaps = 20_000
	}
	attacker := exec.CommandContext(ctx, helperBinary(t), "race-attacker", home, roots, strconv.Itoa(swaps))
	if err := attacker.Start(); err != nil {
		t.Fatal(err)
	}
	finished := make(chan error)
	go func() { finished <- attacker.Wait() }()
	waitFor(t, 5*time.Second, "the attacker", func() bool { _, err := os.Lstat(home + "/swap"); return err == nil })
	var refused, done int
	for i := 0; ; i++ {
		select {
		case err := <-finished:
			if err != nil {
				t.Error(err)
			}
			untouched("the race")
			t.Logf("%d refused, %d done during %d swaps", refused, done, swaps)
			return
		default:
		}
		var no bool
		switch i % 6 {
		case 0:
			no = uploadSmall(d, t, home+"/swap/file")
		case 1:
			no = uploadSmall(d, t, home+"/plain")
		case 2:
			no = remove(d, t, home+"/swap/file")
		case 3:
			_, err := d.fsCall(t, "user", "MakeDir", home+"/swap/made/deep")
			no = err != nil
		case 4:
			_, err := d.fsCall(t, "user", "Move", home+"/swap/file", home+"/swap/secret")
			no = err != nil
		case 5:
			no = d.request(t, "POST", filesPath("path", home+"/swap", "username", "user"), archive(t, tarEntry{name: "sub/f", content: "x"}, tarEntry{name: "file", content: "x"}),
				"Content-Type", "application/x-tar").status >= 400
			remove(d, t, home+"/swap/sub")
			remove(d, t, home+"/swap/made")
		}
		if no {
			refused++
		} else {
			done++
		}
		if i%100 == 99 && !untouched(fmt.Sprint("round ", i)) {
			cancel()
			<-finished
			return
		}
	}
}

// hiddenAttacker replaces whatever the daemon makes in the user's directory by links to root's.
func hiddenAttacker(args []string) {
	home, roots := args[0], args[1]
	seconds, _ := strconv.Atoi(args[2])
	becomeUser(home)
	os.Symlink(roots+"/file", "tofile")
	os.Symlink(roots, "todir")
	won := 0
	for n, end := 0, time.Now().Add(time.Duration(seconds)*time.Second); time.Now().Before(end); {
		f, err := os.Open(".")
		if err != nil {
			continue
		}
		names, _ := f.Readdirnames(-1)
		f.Close()
		for _, name := range names {
			hidden, made := strings.HasPrefix(name, ".envd-"), strings.HasPrefix(name, "made")
			if !hidden && !made {
				continue
			}
			n++
			if unix.Rename(name, fmt.Sprint("stolen", n)) != nil {
				continue
			}
			won++
			switch n % 5 {
			case 0:
				os.Symlink(roots+"/file", name)
			case 1:
				os.Symlink(roots, name)
			case 2:
				os.Mkdir(name, 0o1700)
				os.Chmod(name, 0o1700|os.ModeSticky)
				os.Symlink(roots+"/file", name+"/x")
			case 3:
				unix.Mkfifo(name, 0o644)
			case 4:
				os.WriteFile(name, nil, 0o600)
			}
			if n > 50 {
				os.RemoveAll(fmt.Sprint("stolen", n-50))
			}
		}
	}
	fmt.Println(won)
}

func TestHiddenFileAttacker(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	roots, untouched := rootsOwn(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	attacker := exec.CommandContext(ctx, helperBinary(t), "hidden-attacker", home, roots, "3")
	out, _ := attacker.StdoutPipe()
	if err := attacker.Start(); err != nil {
		t.Fatal(err)
	}
	finished := make(chan string)
	go func() {
		text, _ := io.ReadAll(out)
		attacker.Wait()
		finished <- string(text)
	}()
	var stop atomic.Bool
	var wait sync.WaitGroup
	for worker := range 4 {
		wait.Go(func() {
			for i := 0; !stop.Load(); i++ {
				user := []string{"user", "root"}[i%2]
				switch worker {
				case 0:
					d.upload(t, filesPath("path", home+"/plain", "username", user), strings.Repeat("attack", 1<<19))
				case 1:
					body := archive(t, tarEntry{name: "s", kind: tar.TypeSymlink, link: "x"}, tarEntry{name: "made-d/", kind: tar.TypeDir}, tarEntry{name: "made-d/x", content: "attack"},
						tarEntry{name: "h", content: "attack"}, tarEntry{name: "made-l", kind: tar.TypeLink, link: "h"})
					d.request(t, "POST", filesPath("path", home, "username", user), body, "Content-Type", "application/x-tar")
				case 2:
					d.upload(t, filesPath("path", fmt.Sprintf("%s/made%d/a/x", home, i), "username", user), "attack")
				case 3:
					d.upload(t, filesPath("path", home+"/src", "username", user), "attack")
					d.request(t, "POST", "/files/compose", fmt.Sprintf(`{"source_paths":["%s/src"],"destination":"%s/made-c%d","username":"%s"}`, home, home, i%3, user))
				}
			}
		})
	}
	won := <-finished
	stop.Store(true)
	wait.Wait()
	untouched("the race")
	if strings.TrimSpace(won) == "0" {
		t.Log("the attacker never took a name away")
	}
}

// ---- archives ------------------------------------------------------------------------------------------------------

type tarEntry struct {
	name, content, link string
	kind                byte
}

func archive(t testing.TB, entries ...tarEntry) string {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		if e.kind == 0 {
			e.kind = tar.TypeReg
		}
		h := &tar.Header{Name: e.name, Typeflag: e.kind, Linkname: e.link, Size: int64(len(e.content)), Mode: 0o644, Uid: 61001, Gid: 61001}
		if e.kind == tar.TypeDir {
			h.Mode = 0o755
		}
		err := w.WriteHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(w, e.content)
	}
	w.Close()
	return buf.String()
}

func TestUnpackRefusals(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "mkdir out; echo > outside")
	for _, c := range []struct {
		what    string
		entry   tarEntry
		message string
	}{
		{"absolute", tarEntry{name: "/etc/x"}, "archive entry '/etc/x' leads out of the directory"},
		{"dot dot", tarEntry{name: "a/../../x"}, "archive entry 'a/../../x' leads out of the directory"},
		{"hard link out", tarEntry{name: "l", kind: tar.TypeLink, link: "../outside"}, "archive entry 'l' leads out of the directory"},
		{"FIFO", tarEntry{name: "p", kind: tar.TypeFifo}, "archive entry 'p' is a device or FIFO, or of an unknown type"},
		{"device", tarEntry{name: "c", kind: tar.TypeChar}, "archive entry 'c' is a device or FIFO, or of an unknown type"},
		{"through a link", tarEntry{name: "esc/x", content: "x"}, "archive entry 'esc/x' leads through a link"},
	} {
		shell(t, home, "rm -rf dir")
		body := archive(t, tarEntry{name: "first", content: "1"}, tarEntry{name: "esc", kind: tar.TypeSymlink, link: home + "/out"}, c.entry, tarEntry{name: "after", content: "2"})
		got := d.request(t, "POST", filesPath("path", "dir", "username", "user"), body, "Content-Type", "application/x-tar")
		wantFailure(t, c.what, got, 400, c.message)
		wantContent(t, home+"/dir/first", "1")
		if _, err := os.Lstat(home + "/dir/after"); err == nil {
			t.Errorf("%s: what comes after was unpacked", c.what)
		}
	}
	if entries, _ := os.ReadDir(home + "/out"); len(entries) > 0 {
		t.Errorf("something got out: %v", entries)
	}
	noTemporaryFiles(t, home)
}

// Odd archives: each entry is unpacked as tar does it, or refused; no hidden file is left.
func TestUnpackOddities(t *testing.T) {
	base := mounted(t, "tmpfs", "size=16m,mode=777")
	d := startDaemon(t)
	for _, c := range []struct {
		what    string
		entries []tarEntry
		status  int
	}{
		{"same name twice", []tarEntry{{name: "a", content: "1"}, {name: "a", content: "2"}}, 200},
		{"file then directory", []tarEntry{{name: "b", content: "1"}, {name: "b/", kind: tar.TypeDir}}, 500},
		{"directory then file", []tarEntry{{name: "c/", kind: tar.TypeDir}, {name: "c", content: "1"}}, 400},
		{"directory, link over it", []tarEntry{{name: "e/", kind: tar.TypeDir}, {name: "e", kind: tar.TypeSymlink, link: "/etc"}}, 400},
		{"link, then through it", []tarEntry{{name: "l", kind: tar.TypeSymlink, link: "/"}, {name: "l/tmp/x", content: "1"}}, 400},
		{"link, then directory of that name", []tarEntry{{name: "l2", kind: tar.TypeSymlink, link: "/tmp"}, {name: "l2/", kind: tar.TypeDir}, {name: "l2/x", content: "1"}}, 400},
		{"hard link to a link", []tarEntry{{name: "l3", kind: tar.TypeSymlink, link: "/etc/passwd"}, {name: "h3", kind: tar.TypeLink, link: "l3"}, {name: "h3", content: "x"}}, 200},
		{"hard link through a link", []tarEntry{{name: "l4", kind: tar.TypeSymlink, link: "/etc"}, {name: "h4", kind: tar.TypeLink, link: "l4/passwd"}}, 400},
		{"not UTF-8", []tarEntry{{name: "\xff\xfe", content: "1"}}, 200},
		{"newline", []tarEntry{{name: "a\nb", content: "1"}}, 200},
		{"long name", []tarEntry{{name: strings.Repeat("n", 300), content: "1"}}, 500},
		{"empty", nil, 200},
		{"dot", []tarEntry{{name: "./", kind: tar.TypeDir}, {name: "./f", content: "1"}}, 200},
		{"hard link to itself", []tarEntry{{name: "self", kind: tar.TypeLink, link: "self"}}, 500},
		{"hard link to the directory", []tarEntry{{name: "hd", kind: tar.TypeLink, link: "."}}, 500},
		{"hard link to nothing, over a file", []tarEntry{{name: "f", kind: tar.TypeLink, link: "missing"}}, 500},
		{"hard link to a directory, over a file", []tarEntry{{name: "f", kind: tar.TypeLink, link: "c"}}, 500},
	} {
		got := d.request(t, "POST", filesPath("path", base+"/t"), archive(t, c.entries...), "Content-Type", "application/x-tar")
		if got.status != c.status {
			t.Errorf("%s: %d %.150s, want %d", c.what, got.status, got.body, c.status)
		}
		noTemporaryFiles(t, base)
	}
	wantContent(t, base+"/t/a", "2")
	wantContent(t, base+"/t/f", "1")
	var b strings.Builder
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "far", Typeflag: tar.TypeReg, Mode: 0o644, ModTime: time.Unix(1<<40, 0), Format: tar.FormatPAX})
	w.Close()
	d.request(t, "POST", filesPath("path", base+"/t"), b.String(), "Content-Type", "application/x-tar")
	if st := lstat(t, base+"/t/far"); st.Mtim.Sec != 1<<40 {
		t.Errorf("a time beyond 2262: %d", st.Mtim.Sec)
	}
	source := publicDir(t)
	shell(t, source, "truncate -s 1T sparse")
	for _, format := range []string{"gnu", "pax"} {
		out, err := exec.Command("tar", "-C", source, "-cS", "--format="+format, "sparse").Output()
		if err != nil {
			t.Skip("needs GNU tar: ", err)
		}
		got := d.request(t, "POST", filesPath("path", base+"/t"), string(out), "Content-Type", "application/x-tar")
		if got.status != 507 {
			t.Errorf("1 TiB of holes, %s: %d %.100s", format, got.status, got.body)
		}
		noTemporaryFiles(t, base)
	}
}

// A PAX record's name has no equals sign. Names come back as they were, and GNU tar reads them, too.
func TestTarAttributeNames(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	names := []string{"user.a=b", "user.100%", "user.%3D", "user.plain"}
	os.Mkdir(dir+"/from", 0o755)
	writeFile(t, dir+"/from/a", "x", 0o644)
	for _, name := range names {
		if err := unix.Setxattr(dir+"/from/a", name, []byte(name), 0); err != nil {
			t.Skip("needs extended attributes: ", err)
		}
	}
	got := d.request(t, "GET", filesPath("path", dir+"/from"), "", "Accept", "application/x-tar")
	if got = d.request(t, "POST", filesPath("path", dir+"/to"), got.body, "Content-Type", "application/x-tar"); got.status != 200 {
		t.Fatalf("%d %s", got.status, got.body)
	}
	for _, name := range names {
		value := make([]byte, 64)
		if n, err := unix.Getxattr(dir+"/to/a", name, value); err != nil || string(value[:n]) != name {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func tarNames(t testing.TB, text string) (names []string) {
	t.Helper()
	for r := tar.NewReader(strings.NewReader(text)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return names
		} else if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
}

// A tree comes back as it was: content, mode, owner, time, attributes, links.
func TestTarRoundTrip(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	files := 20_000
	if testing.Short() {
		files = 500
	}
	if dir, err := os.MkdirTemp("/dev/shm", "envd-test-"); err == nil { // quicker than most disks
		t.Cleanup(func() { os.RemoveAll(dir) })
		os.Chmod(dir, 0o755)
		home = dir
	}
	from, to, again := filepath.Join(home, "from"), filepath.Join(home, "to"), filepath.Join(home, "again")
	for i := range files {
		dir := filepath.Join(from, fmt.Sprintf("d%d/e%d", i%40, i%7))
		writeFile(t, mkdirFor(t, dir)+fmt.Sprintf("/f%d", i), strings.Repeat("x", i%3000), os.FileMode([]uint32{0o644, 0o600, 0o755, 0o400}[i%4]))
	}
	shell(t, from, `chown 61001:62001 d1/e1/*; touch -d '2001-02-03 04:05:06.123456789' d2/e2/*; chmod 4755 d4/e4/f4; ln -s nowhere l; ln d3/e3/f3 hard; ln d3/e3/f3 d3/hard2
		chown -h 61001 l; touch -hd '2002-02-02 02:02:02.22' l; mkdir empty; chmod 1700 empty; echo x > "$(printf 'bad\377')"; echo y > 'new
line'; touch -d 2003-03-03 d2/e2 d2; chmod 500 d5`)
	unix.Setxattr(from+"/d0/e0/f0", "user.note", []byte("binary\x00\xff"), 0)
	unix.Setxattr(from+"/empty", "user.e2b.k", []byte("v"), 0)
	got := d.request(t, "GET", filesPath("path", from, "username", "root"), "", "Accept", "application/x-tar")
	if got.status != 200 || got.header.Get("Content-Type") != "application/x-tar" {
		t.Fatalf("%d %s", got.status, got.body)
	}
	up := d.request(t, "POST", filesPath("path", to, "username", "root"), got.body, "Content-Type", "application/x-tar")
	if up.status != 200 {
		t.Fatalf("%d %s", up.status, up.body)
	}
	t.Logf("%d MiB, peak RSS %d MiB", len(got.body)>>20, d.peakRSS()>>20)
	var answer []written
	if err := json.Unmarshal([]byte(up.body), &answer); err != nil || len(answer) != min(files, 40)+5 {
		t.Errorf("%d top-level entries, %v", len(answer), err)
	}
	describe := func(dir string) (list []string, links map[string]uint64) {
		links = map[string]uint64{}
		filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
			name, st := strings.TrimPrefix(path, dir), lstat(t, path)
			if name == "" {
				return nil
			}
			content := ""
			switch st.Mode & unix.S_IFMT {
			case unix.S_IFLNK:
				content, _ = os.Readlink(path)
			case unix.S_IFREG:
				bytes, _ := os.ReadFile(path)
				content = fmt.Sprint(len(bytes), sha256.Sum256(bytes))
				links[name] = st.Ino
			}
			attributes := xattrs(func(b []byte) (int, error) { return unix.Llistxattr(path, b) },
				func(n string, b []byte) (int, error) { return unix.Lgetxattr(path, n, b) }, isUserXattr)
			list = append(list, fmt.Sprintf("%q %o %d:%d %d.%09d %d %s %q", name, st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, st.Nlink, content, attributes))
			return nil
		})
		return list, links
	}
	want, _ := describe(from)
	have, inodes := describe(to)
	if !slices.Equal(want, have) {
		for i := range min(len(want), len(have)) {
			if want[i] != have[i] {
				t.Errorf("the first difference:\nwas %s\nis  %s", want[i], have[i])
				break
			}
		}
		t.Errorf("%d entries came back of %d", len(have), len(want))
	}
	if inodes["/hard"] != inodes["/d3/hard2"] || inodes["/hard"] != inodes["/d3/e3/f3"] {
		t.Error("hard links are separate files")
	}
	// For anyone but root everything is the acting user's; unpacking over what is there replaces it.
	for range 2 {
		if up = d.request(t, "POST", filesPath("path", again, "username", "user"), got.body, "Content-Type", "application/x-tar"); up.status != 200 {
			t.Fatalf("%d %s", up.status, up.body)
		}
	}
	if st := lstat(t, again+"/d1/e1"); st.Uid != uidUser {
		t.Errorf("uid %d", st.Uid)
	}
	noTemporaryFiles(t, home)
}

func TestTarCut(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	old := writeFile(t, filepath.Join(dir, "f"), "old", 0o644)
	body := archive(t, tarEntry{name: "f", content: strings.Repeat("new", 10_000)})
	got := d.request(t, "POST", filesPath("path", dir), body[:5000], "Content-Type", "application/x-tar")
	wantFailure(t, "cut", got, 500, "error unpacking 'f': error writing file: unexpected EOF")
	wantContent(t, old, "old")
	noTemporaryFiles(t, dir)
}

// An ordinary user's daemon does for this user what root's does.
func TestFilesAsOrdinaryUser(t *testing.T) {
	d := startDaemonAsNobody(t)
	dir := publicDir(t)
	for _, content := range []string{"small", strings.Repeat("large", 1<<19)} {
		for range 2 {
			if got := d.upload(t, filesPath("path", dir+"/sub/f"), content); got.status != 200 {
				t.Errorf("%d %s", got.status, got.body)
			}
		}
		wantContent(t, dir+"/sub/f", content)
	}
	got := d.request(t, "POST", filesPath("path", dir+"/tar"), archive(t, tarEntry{name: "d/", kind: tar.TypeDir}, tarEntry{name: "d/f", content: "x"},
		tarEntry{name: "l", kind: tar.TypeSymlink, link: "d"}), "Content-Type", "application/x-tar")
	if got.status != 200 || lstat(t, dir+"/tar/d/f").Uid != 65534 {
		t.Errorf("%d %s", got.status, got.body)
	}
	root := writeFile(t, filepath.Join(publicDir(t), "root"), "root", 0o644)
	if got := d.upload(t, filesPath("path", root), "x"); got.status != 500 {
		t.Errorf("root's file: %d %s", got.status, got.body)
	}
	wantContent(t, root, "root")
	got = d.upload(t, filesPath("path", dir+"/theirs", "username", "root"), "x")
	wantFailure(t, "another user", got, 500, "error changing file ownership: operation not permitted")
	if _, err := os.Lstat(dir + "/theirs"); err == nil {
		t.Error("a file for another user was left behind")
	}
	for method, paths := range map[string][]string{"MakeDir": {dir + "/x/y"}, "Move": {dir + "/sub", dir + "/moved"}, "ListDir": {dir}, "Stat": {dir}, "Remove": {dir + "/tar"}} {
		if _, err := d.fsCall(t, "", method, paths...); err != nil {
			t.Errorf("%s: %v", method, err)
		}
	}
}

// Filesystems that can do less: no room can be made beforehand, there are no attributes (ramfs).
func TestFilesOnRamfs(t *testing.T) {
	dir := mounted(t, "ramfs", "")
	d := startDaemon(t)
	for _, content := range []string{"small", "", strings.Repeat("large", 1<<19), "again"} {
		got := d.upload(t, filesPath("path", dir+"/f"), content, "X-Metadata-K", "v")
		wantJSON(t, "upload", got.body, fmt.Sprintf(`[{"path":"%s/f","name":"f","type":"file"}]`, dir))
		wantContent(t, dir+"/f", content)
	}
	shell(t, dir, "chmod 600 f; ln f hard")
	before := lstat(t, dir+"/f")
	for _, content := range []string{"small", strings.Repeat("large", 1<<19), "again"} {
		if got := d.upload(t, filesPath("path", dir+"/f"), content); got.status != 200 {
			t.Errorf("%d %s", got.status, got.body)
		}
		wantContent(t, dir+"/hard", content)
		if after := lstat(t, dir+"/f"); after.Ino != before.Ino || after.Mode != before.Mode {
			t.Errorf("inode %d and %d, mode %o", before.Ino, after.Ino, after.Mode)
		}
	}
	os.Remove(dir + "/hard")
	writeFile(t, dir+"/f", "old", 0o644)
	cut := archive(t, tarEntry{name: "x", content: strings.Repeat("x", 100_000)})[:50_000]
	wantFailure(t, "cut", d.request(t, "POST", filesPath("path", dir+"/f"), zipped(t, cut)[:100], "Content-Type", "application/octet-stream", "Content-Encoding", "gzip"),
		500, "error writing file: unexpected EOF")
	wantContent(t, dir+"/f", "old")
	noTemporaryFiles(t, dir)
}

// mounted makes a filesystem of the test's own.
func mounted(t testing.TB, kind, options string) (dir string) {
	t.Helper()
	needRoot(t)
	dir = publicDir(t)
	if err := unix.Mount(kind, dir, kind, 0, options); err != nil {
		t.Skipf("needs %s: %v", kind, err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func zipped(t testing.TB, content string) string {
	t.Helper()
	var buf bytes.Buffer
	z := gzip.NewWriter(&buf)
	io.WriteString(z, content)
	z.Close()
	return buf.String()
}

// What is short is inodes, or room for attributes: 507, and nothing has changed.
func TestInodesFull(t *testing.T) {
	dir := mounted(t, "tmpfs", "size=16m,nr_inodes=16,mode=777")
	d := startDaemon(t)
	file := writeFile(t, dir+"/f", "old", 0o640)
	if err := unix.Setxattr(file, "user.e2b.k", []byte("old"), 0); err != nil {
		t.Skip("needs user.* attributes on tmpfs")
	}
	before := lstat(t, file)
	for n := 0; ; n++ {
		if f, err := os.Create(fmt.Sprintf("%s/filler%d", dir, n)); err != nil {
			break
		} else {
			f.Close()
		}
	}
	large := strings.Repeat("n", 2<<20)
	for _, content := range []string{"new", large} {
		got := d.upload(t, filesPath("path", dir+"/new"), content)
		if got.status != 507 || !strings.Contains(got.body, "not enough inodes available: open "+dir+"/new: no space left on device") {
			t.Errorf("a new file: %d %s", got.status, got.body)
		}
	}
	if got := d.upload(t, filesPath("path", dir+"/new/dir/f"), "x"); got.status != 507 {
		t.Errorf("a new directory: %d %s", got.status, got.body)
	}
	got := d.upload(t, filesPath("path", file), "new", "X-Metadata-K", strings.Repeat("v", 4000), "X-Metadata-L", "x")
	if got.status != 507 || !strings.Contains(got.body, "not enough space for file metadata: no space left on device") {
		t.Errorf("metadata: %d %s", got.status, got.body)
	}
	wantContent(t, file, "old")
	value := make([]byte, 10)
	if n, err := unix.Getxattr(file, "user.e2b.k", value); err != nil || string(value[:n]) != "old" {
		t.Errorf("user.e2b.k: %q %v", value[:max(n, 0)], err)
	}
	if after := lstat(t, file); after.Mode != before.Mode || after.Uid != before.Uid || after.Mtim != before.Mtim {
		t.Error("the old file was touched")
	}
	os.Remove(dir + "/filler0") // room for a temporary file, but not for its metadata
	if got := d.upload(t, filesPath("path", file), large, "X-Metadata-K", strings.Repeat("v", 4000)); got.status != 507 {
		t.Errorf("metadata of a large file: %d %s", got.status, got.body)
	}
	wantContent(t, file, "old")
	noTemporaryFiles(t, dir)
}

// What a gzip body can be: cut, damaged, several members, with parameters behind its name.
func TestGzipBodies(t *testing.T) {
	d := startDaemon(t)
	file := writeFile(t, publicDir(t)+"/f", "old", 0o644)
	for _, size := range []int{5000, 3 << 20} {
		content := strings.Repeat("content", size/7)
		whole := zipped(t, content)
		damaged := []byte(whole)
		damaged[len(damaged)-6] ^= 1
		for body, failure := range map[string]string{whole: "", whole + whole: "", whole[:len(whole)/2]: "unexpected EOF",
			string(damaged): "gzip: invalid checksum", whole + "trailing garbage": "gzip: invalid header"} {
			writeFile(t, file, "old", 0o644)
			got := d.upload(t, filesPath("path", file), body, "Content-Encoding", " GZip;q=1")
			if failure != "" {
				wantFailure(t, failure, got, 500, "error writing file: "+failure)
				wantContent(t, file, "old")
			} else if got.status != 200 {
				t.Errorf("%d %s", got.status, got.body)
			} else {
				wantContent(t, file, strings.Repeat(content, len(body)/len(whole)))
			}
		}
	}
	noTemporaryFiles(t, filepath.Dir(file))
}

// Metadata that comes in odd ways: the first of several values counts, an empty key does not, what is not UTF-8 is not told.
func TestOddMetadata(t *testing.T) {
	d := startDaemon(t)
	file := publicDir(t) + "/f"
	got := d.uploadForm(t, filesPath("path", file), formPart{"file", "x", "y"})
	got = d.upload(t, filesPath("path", file), "x", "X-Metadata-", "none", "x-METADATA-Key", "first", "X-Metadata-key", "second",
		"X-Metadata-"+strings.Repeat("k", 246), "v")
	wantJSON(t, "upload", got.body, fmt.Sprintf(`[{"path":"%s","name":"f","type":"file","metadata":{"key":"first","%s":"v"}}]`, file, strings.Repeat("k", 246)))
	for name, value := range map[string]string{"user.e2b.bad": "\xff", "user.e2b.ba\xffd": "v"} {
		if err := unix.Setxattr(file, name, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := d.fsCall(t, "", "Stat", file)
	if err != nil || len(entries[0].GetMetadata()) != 2 || entries[0].GetMetadata()["key"] != "first" {
		t.Errorf("%v %v", entries, err)
	}
}

// Files of the kernel's that say nothing, or something else, about their length.
func TestDownloadOfKernelFiles(t *testing.T) {
	d := startDaemon(t)
	for _, file := range []string{"/proc/version", "/proc/self/environ", "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/kernel/kexec_loaded"} {
		want, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for _, encoding := range []string{"identity", "gzip"} {
			got := d.request(t, "GET", filesPath("path", file), "", "Accept-Encoding", encoding)
			if encoding == "gzip" && got.status == 200 {
				z, err := gzip.NewReader(strings.NewReader(got.body))
				if err != nil {
					t.Fatal(err)
				}
				plain, _ := io.ReadAll(z)
				got.body = string(plain)
			}
			if got.status != 200 || got.body == "" || file != "/proc/self/environ" && got.body != string(want) {
				t.Errorf("%s, %s: %d %q, want %q", file, encoding, got.status, got.body, want)
			}
		}
	}
}

// A file of the kernel's that has no end is sent until the client leaves.
func TestDownloadWithoutEnd(t *testing.T) {
	needRoot(t)
	d := startDaemon(t)
	for _, encoding := range []string{"identity", "gzip"} {
		ctx, cancel := context.WithCancel(t.Context())
		request, _ := http.NewRequestWithContext(ctx, "GET", d.url+filesPath("path", "/proc/kmsg"), nil)
		request.Header.Set("Accept-Encoding", encoding)
		done := make(chan error, 1)
		go func() {
			response, err := d.http.Do(request)
			if err == nil {
				_, err = io.Copy(io.Discard, response.Body)
				response.Body.Close()
			}
			done <- err
		}()
		open := func() bool {
			return slices.ContainsFunc(d.fds(), func(fd string) bool { return strings.Contains(fd, "kmsg") })
		}
		select {
		case err := <-done:
			t.Logf("%s: it had an end: %v", encoding, err)
		case <-time.After(300 * time.Millisecond):
			t.Logf("%s: open: %v", encoding, open())
		}
		cancel()
		waitFor(t, 5*time.Second, "the file closed", func() bool { return !open() })
	}
}

// A name that no JSON can carry.
func TestNameNotUTF8(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	name := dir + "/b\xff\nd"
	if got := d.upload(t, filesPath("path", name), "content"); got.status != 200 || !strings.Contains(got.body, `b\ufffd\nd`) {
		t.Errorf("%d %s", got.status, got.body)
	}
	wantContent(t, name, "content")
	got := d.request(t, "GET", filesPath("path", name), "", "Accept-Encoding", "identity")
	if got.status != 200 || got.body != "content" || got.header.Get("Content-Disposition") != "inline; filename*=utf-8''b%FF%0Ad" {
		t.Errorf("%d %q %v", got.status, got.body, got.header)
	}
	for _, path := range []string{dir + "/a\x00b", "~/\x00"} {
		for what, got := range map[string]httpReply{"download": d.request(t, "GET", filesPath("path", path), ""), "upload": d.upload(t, filesPath("path", path), ""),
			"compose": d.request(t, "POST", "/files/compose", `{"source_paths":[`+mustJSON(path)+`],"destination":"x"}`)} {
			if got.status != 400 || !strings.Contains(got.body, "a NUL byte in it") {
				t.Errorf("%s: %d %s", what, got.status, got.body)
			}
		}
		_, err := d.fsCall(t, "", "Stat", path)
		wantError(t, err, connect.CodeInvalidArgument, fmt.Sprintf("failed to expand path '%s' for user 'root': a NUL byte in it", path))
	}
}

// Whatever the destination of a compose is called: when it is one of the sources, nothing is lost.
func TestComposeOntoItself(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	os.Chmod(dir, 0o755) // in a shared directory hard links are refused
	for _, c := range []struct{ sources, destination string }{{"a", "link"}, {"a", "sub/../a"}, {"a", "dirlink/a"}, {"dirlink/a", "a"}, {"b a", "link"}, {"link", "a"}, {"a", "hard"}} {
		shell(t, dir, "rm -rf *; echo A > a; echo B > b; ln -s a link; ln -s . dirlink; ln a hard; mkdir sub")
		var sources []string
		for _, source := range strings.Fields(c.sources) {
			sources = append(sources, dir+"/"+source)
		}
		got := d.request(t, "POST", "/files/compose", fmt.Sprintf(`{"source_paths":%s,"destination":"%s/%s"}`, mustJSON(sources), dir, c.destination))
		wantFailure(t, c.sources+" "+c.destination, got, 400, fmt.Sprintf(`source path "%s" cannot be the same as destination`, sources[len(sources)-1]))
		wantContent(t, dir+"/a", "A\n")
		wantContent(t, dir+"/b", "B\n")
	}
	// A source named twice counts twice; a link as source is removed, not what it leads to.
	got := d.request(t, "POST", "/files/compose", fmt.Sprintf(`{"source_paths":["%[1]s/link","%[1]s/b","%[1]s/b"],"destination":"%[1]s/new"}`, dir))
	wantJSON(t, "twice", got.body, fmt.Sprintf(`{"path":"%s/new","name":"new","type":"file"}`, dir))
	wantContent(t, dir+"/new", "A\nB\nB\n")
	wantContent(t, dir+"/a", "A\n")
}

func TestComposeFull(t *testing.T) {
	dir := mounted(t, "tmpfs", "size=1m,mode=777")
	d := startDaemon(t)
	for name, size := range map[string]int{"a": 300 << 10, "b": 300 << 10, "dest": 100 << 10} {
		writeFile(t, dir+"/"+name, strings.Repeat(name, size), 0o644)
	}
	got := d.request(t, "POST", "/files/compose", fmt.Sprintf(`{"source_paths":["%[1]s/a","%[1]s/b"],"destination":"%[1]s/dest"}`, dir))
	wantFailure(t, "full", got, 507, "not enough disk space available")
	wantContent(t, dir+"/a", strings.Repeat("a", 300<<10))
	wantContent(t, dir+"/dest", strings.Repeat("dest", 100<<10))
	noTemporaryFiles(t, dir)
}

// Uploads, downloads and listings on a filesystem that never answers wait; nobody else does.
func TestFilesHang(t *testing.T) {
	needRoot(t)
	base := publicDir(t)
	mount := filepath.Join(base, "mount")
	if err := os.Mkdir(mount, 0o755); err != nil {
		t.Fatal(err)
	}
	abort := hungFUSE(t, mount, true, true)
	d := startDaemonWithHostile(t)
	t.Cleanup(abort)
	ctx, cancel := context.WithCancel(t.Context())
	answers := make(chan error)
	ask := func(method, path, contentType, body string) {
		request, _ := http.NewRequestWithContext(ctx, method, d.url+path, strings.NewReader(body))
		request.Header.Set("Content-Type", contentType)
		response, err := d.http.Do(request)
		if err == nil {
			response.Body.Close()
			err = fmt.Errorf("%s %s: %s", method, path, response.Status)
		}
		answers <- err
	}
	n := 0
	for range 10 {
		for _, rpc := range []string{"Stat", "MakeDir", "Remove", "ListDir", "CreateWatcher"} {
			go ask("POST", "/filesystem.Filesystem/"+rpc, "application/json", fmt.Sprintf(`{"path":"%s/f"}`, mount))
		}
		go ask("POST", filesPath("path", mount+"/f"), "application/octet-stream", "content")
		go ask("POST", filesPath("path", mount+"/f"), "application/x-tar", archive(t, tarEntry{name: "f"}))
		go ask("GET", filesPath("path", mount+"/f"), "", "")
		go ask("POST", "/files/compose", "application/json", fmt.Sprintf(`{"source_paths":["%s/f"],"destination":"%s/g"}`, mount, base))
		n += 9
	}
	waitFor(t, 10*time.Second, "all of them", func() bool { return d.hanging() >= n })
	for i := range 20 {
		d.healthy(t)
		file := fmt.Sprintf("%s/f%d", base, i)
		if got := d.upload(t, filesPath("path", file), "x"); got.status != 200 {
			t.Errorf("%d %s", got.status, got.body)
		}
		if got := d.request(t, "GET", filesPath("path", file), ""); got.status != 200 {
			t.Errorf("%d %s", got.status, got.body)
		}
		if _, err := d.fsCall(t, "", "Remove", file); err != nil {
			t.Error(err)
		}
	}
	cancel()
	for range n {
		if err := <-answers; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	abort()
	waitFor(t, 10*time.Second, "nothing that hangs", func() bool { return d.hanging() == 0 })
}
