// Fuzz targets, beside those in the tests of init.go and path.go: what a client or a guest can write, and what has to be true of the
// outcome. `make fuzz` runs each for a while; `go test` runs their seeds.
//
// Where the whole daemon is the target it runs as nobody, once for all of the fuzzer's processes, and sees a temporary directory in
// which only the suite's own can be written to: paths are among what is varied.

package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/big"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fuzzedDaemon is the address of a daemon and a directory of its user. The fuzzer's other processes get those of the first.
func fuzzedDaemon(f *testing.F) (addr, dir string) {
	f.Helper()
	const variable = "ENVD_FUZZED"
	if addr, dir, known := strings.Cut(os.Getenv(variable), " "); known {
		return addr, dir
	}
	dir = publicDir(f)
	if err := os.Chown(dir, 65534, 65534); err != nil {
		f.Skipf("needs root: %v", err)
	}
	tmp := filepath.Dir(suiteDir)
	addr = startDaemonWith(f, daemonConfig{noCgroup: true, steps: argv("mount", tmp+":"+tmp, "mount", suiteDir+":"+suiteDir,
		"read-only", tmp, "user", "65534")}).addr
	f.Setenv(variable, addr+" "+dir)
	return addr, dir
}

// sendRaw sends a text on a connection of its own and gives what comes back until the daemon closes it or says nothing more.
func sendRaw(t *testing.T, addr, request string) string {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatalf("the daemon is gone: %v", err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(300 * time.Millisecond))
	io.WriteString(conn, request)
	conn.(*net.TCPConn).CloseWrite()
	var reply bytes.Buffer
	io.Copy(&reply, io.LimitReader(conn, 1<<20))
	return reply.String()
}

func fuzzHealthy(t *testing.T, addr string) {
	t.Helper()
	resp, err := (&http.Client{Timeout: 5 * time.Second}).Get("http://" + addr + "/health")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("/health: %s", resp.Status)
	}
}

func envelope(flags byte, message string) string {
	return string(binary.BigEndian.AppendUint32([]byte{flags}, uint32(len(message)))) + message
}

// FuzzRequest: whatever is sent, the daemon answers by HTTP or not at all, never with a failure of its own, and is well afterwards.
func FuzzRequest(f *testing.F) {
	addr, dir := fuzzedDaemon(f)
	post := func(path, contentType, body string, headers ...string) {
		f.Add(fmt.Sprintf("POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\n%sContent-Length: %d\r\n\r\n%s", path, contentType,
			strings.Join(append(headers, ""), "\r\n"), len(body), body))
	}
	f.Add("GET /files?path=" + dir + "/f&username=nobody HTTP/1.1\r\nHost: localhost\r\nRange: bytes=0-1,5-\r\nAccept-Encoding: gzip;q=0.5,*;q=0\r\n\r\n")
	f.Add("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x04\x01\x04\x00\x00\x00\x01")
	f.Add("OPTIONS /process.Process/Start HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nAccess-Control-Request-Method: POST\r\n\r\n")
	f.Add("GET /metrics HTTP/1.1\r\nHost: localhost\r\nAccept: text/plain;version=0.0.4;q=0.5\r\n\r\nGET /envs HTTP/1.0\r\n\r\n")
	post("/process.Process/Start", "application/connect+json", envelope(0, `{"process":{"cmd":"/bin/true"},"pty":{"size":{"cols":80}}}`),
		"Connect-Timeout-Ms: 100", "Keepalive-Ping-Interval: 1")
	post("/process.Process/StreamInput", "application/connect+json", envelope(0, `{"start":{"process":{"tag":"x"}}}`)+envelope(2, `{}`))
	post("/process.Process/List", "application/json", `{}`)
	post("/process.Process/SendSignal", "application/proto", "\x0a\x02\x08\x01\x10\x0f")
	post("/process.Process/Connect", "application/grpc-web+proto", envelope(0, "\x0a\x03\x12\x01x"))
	post("/filesystem.Filesystem/ListDir", "application/json", `{"path":"`+dir+`","depth":2}`, "Authorization: Basic bm9ib2R5Og==")
	post("/filesystem.Filesystem/WatchDir", "application/connect+proto", envelope(1, "\x0a\x01/"), "Connect-Content-Encoding: gzip")
	post("/files?path="+dir+"/g", "application/octet-stream", "content", "X-Metadata-A: b")
	post("/files/compose", "application/json", `{"source_paths":["`+dir+`/f"],"destination":"`+dir+`/h"}`)
	post("/init", "application/json", `{"envVars":{"A":"b"},"timestamp":"2020-01-01T00:00:00Z"}`)
	f.Fuzz(func(t *testing.T, request string) {
		if strings.Contains(request, "accessToken") || strings.Contains(request, "/prepare") {
			return // would change what later requests get
		}
		reply := sendRaw(t, addr, request)
		if reply == "" || strings.HasPrefix(request, "PRI ") {
			return
		}
		status := regexp.MustCompile(`^HTTP/1\.[01] ([1-5]\d\d) `).FindStringSubmatch(reply)
		if status == nil {
			t.Fatalf("%q", reply)
		}
		// 500 is what the contract says for a file of another user, a file system that is read-only and a body that is broken.
		if status[1] == "500" && !regexp.MustCompile(`permission|read-only file system|"message":"error (writing file|reading form|parsing multipart form|unpacking) *`).MatchString(reply) {
			t.Errorf("%q", reply)
		}
		fuzzHealthy(t, addr)
	})
}

// FuzzEnvelopes: any bytes in a stream of messages end in an error or a process's end, in each of the protocols. With which code is
// up to connect-go, which has "internal" for some of what a client gets wrong.
func FuzzEnvelopes(f *testing.F) {
	addr, _ := fuzzedDaemon(f)
	kinds := []string{"application/connect+json", "application/connect+proto", "application/grpc-web+proto", "application/grpc-web-text"}
	methods := []string{"process.Process/Start", "process.Process/Connect", "process.Process/StreamInput", "filesystem.Filesystem/WatchDir"}
	f.Add(uint8(0), uint8(0), envelope(0, `{"process":{"cmd":"/bin/echo","args":["a"]}}`))
	f.Add(uint8(1), uint8(0), envelope(0, "\x0a\x0b\x0a\x09/bin/true"))
	f.Add(uint8(2), uint8(1), envelope(0, "\x0a\x02\x08\x01"))
	f.Add(uint8(0), uint8(2), envelope(0, `{"start":{"process":{"pid":1}}}`)+envelope(0, `{"data":{"input":{"stdin":"YQ=="}}}`))
	f.Add(uint8(0), uint8(3), envelope(0, `{"path":"/","recursive":false}`))
	f.Add(uint8(1), uint8(0), "\x01\xff\xff\xff\xff")
	client := &http.Client{Timeout: 5 * time.Second}
	f.Fuzz(func(t *testing.T, kind, method uint8, body string) {
		request, err := http.NewRequest("POST", "http://"+addr+"/"+methods[method%4], strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		request.Header.Set("Content-Type", kinds[kind%4])
		request.Header.Set("Connect-Timeout-Ms", "100")
		request.Header.Set("Grpc-Timeout", "100m")
		resp, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		reply, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(reply, []byte("panic")) {
			t.Errorf("%q", reply)
		}
	})
}

// FuzzDownload: whatever part of a file is asked for in whatever encoding, what comes is that part.
func FuzzDownload(f *testing.F) {
	addr, dir := fuzzedDaemon(f)
	content := []byte(strings.Repeat("0123456789abcdef", 1000))
	path := filepath.Join(dir, "download")
	if _, err := os.Stat(path); err != nil {
		writeFile(f, path, string(content), 0o644)
	}
	for _, seed := range [][3]string{{"", "gzip", ""}, {"bytes=0-9", "", ""}, {"bytes=5-,-3, 0-0", "identity;q=0.1", ""},
		{"bytes=-0", "*;q=0", ""}, {"bytes=1-, -+0", "", ""}, {"bytes=99999-", "gzip;q=0,identity;q=0", ""}, {"", "br, *", "\"x\""}, {"items=0-1", "identity;q=0", ""}} {
		f.Add(seed[0], seed[1], seed[2])
	}
	client := &http.Client{Transport: &http.Transport{DisableCompression: true}, Timeout: 5 * time.Second}
	f.Fuzz(func(t *testing.T, ranges, encodings, match string) {
		request, _ := http.NewRequest("GET", "http://"+addr+"/files?username=nobody&path="+url.QueryEscape(path), nil)
		for name, value := range map[string]string{"Range": ranges, "Accept-Encoding": encodings, "If-None-Match": match} {
			if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r > '~' }) {
				return // what the client does not send
			}
			if value != "" {
				request.Header.Set(name, value)
			}
		}
		resp, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		part := func(contentRange string, got []byte) {
			var first, last, size int
			if n, _ := fmt.Sscanf(contentRange, "bytes %d-%d/%d", &first, &last, &size); n != 3 || size != len(content) ||
				first > last || last >= size || !bytes.Equal(got, content[first:last+1]) {
				t.Errorf("%q: %d bytes that are not those", contentRange, len(got))
			}
		}
		switch resp.StatusCode {
		case http.StatusOK:
			if resp.Header.Get("Content-Encoding") == "gzip" {
				z, err := gzip.NewReader(bytes.NewReader(body))
				if err != nil {
					t.Fatal(err)
				}
				if body, err = io.ReadAll(z); err != nil {
					t.Fatal(err)
				}
				if !strings.Contains(strings.ToLower(encodings), "gzip") && !strings.Contains(encodings, "*") {
					t.Errorf("gzip for %q", encodings)
				}
			}
			if !bytes.Equal(body, content) {
				t.Errorf("%d bytes that are not the file's", len(body))
			}
		case http.StatusPartialContent:
			mediaType, params, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
			if mediaType != "multipart/byteranges" {
				part(resp.Header.Get("Content-Range"), body)
				return
			}
			parts := multipart.NewReader(bytes.NewReader(body), params["boundary"])
			for {
				p, err := parts.NextPart()
				if err == io.EOF {
					return
				} else if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(p)
				if err != nil {
					t.Fatal(err)
				}
				part(p.Header.Get("Content-Range"), got)
			}
		case http.StatusNotAcceptable, http.StatusRequestedRangeNotSatisfiable, http.StatusPreconditionFailed, http.StatusNotModified:
		default:
			t.Errorf("%s: %s", resp.Status, body)
		}
	})
}

// outside is a directory that an upload into `in` may not change.
func outside(t *testing.T, dir string) (in string, unchanged func()) {
	t.Helper()
	out, err := os.MkdirTemp(dir, "")
	if err == nil {
		in = filepath.Join(out, "in")
		err = os.Mkdir(in, 0o755)
	}
	canary := filepath.Join(out, "canary")
	if err == nil {
		err = os.WriteFile(canary, []byte("alive"), 0o600)
	}
	for _, path := range []string{out, in, canary} {
		if err == nil {
			err = os.Chown(path, 65534, 65534)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(out) })
	return in, func() {
		t.Helper()
		entries, _ := os.ReadDir(out)
		content, err := os.ReadFile(canary)
		st, err2 := os.Stat(canary)
		if len(entries) != 2 || err != nil || string(content) != "alive" || err2 != nil || st.Mode() != 0o600 {
			t.Errorf("outside: %v, %q, %v", entries, content, err)
		}
	}
}

func upload(t *testing.T, addr, path, contentType string, body []byte) (status int) {
	t.Helper()
	client := &http.Client{Timeout: 5 * time.Second}
	resp, err := client.Post("http://"+addr+"/files?username=nobody&path="+url.QueryEscape(path), contentType, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK && (resp.StatusCode < 400 || len(text) == 0) {
		t.Errorf("%s: %q", resp.Status, text)
	}
	return resp.StatusCode
}

// FuzzTar: no archive reaches what is not below the directory that it is unpacked into.
func FuzzTar(f *testing.F) {
	addr, dir := fuzzedDaemon(f)
	f.Add("a/b", "", uint8('0'), "sub", "../../canary", uint8('2'), int64(0o644))
	f.Add("../canary", "", uint8('0'), "/etc/passwd", "", uint8('0'), int64(0o4755))
	f.Add("link", "..", uint8('2'), "link/canary", "", uint8('0'), int64(0o644))
	f.Add("link", "../canary", uint8('1'), "link", "", uint8('0'), int64(0))
	f.Add("d", "", uint8('5'), "d", "/", uint8('2'), int64(0o777))
	f.Add("fifo", "", uint8('6'), "dev", "", uint8('3'), int64(0o666))
	f.Fuzz(func(t *testing.T, name1, link1 string, kind1 uint8, name2, link2 string, kind2 uint8, mode int64) {
		in, unchanged := outside(t, dir)
		var archive bytes.Buffer
		w := tar.NewWriter(&archive)
		for _, h := range []*tar.Header{{Name: name1, Linkname: link1, Typeflag: kind1}, {Name: name2, Linkname: link2, Typeflag: kind2},
			{Name: name2 + "/x", Typeflag: '0'}} {
			h.Mode = mode
			if h.Typeflag == '0' {
				h.Size = 3
			}
			if w.WriteHeader(h) == nil && h.Size > 0 {
				io.WriteString(w, "new")
			}
		}
		w.Close()
		upload(t, addr, in, "application/x-tar", archive.Bytes())
		unchanged()
	})
}

// FuzzForm: neither does a form, when its parts are named by no path of their own.
func FuzzForm(f *testing.F) {
	addr, dir := fuzzedDaemon(f)
	f.Add(`form-data; name="file"; filename="a"`, "content", []byte(nil))
	f.Add(`form-data; name="file"; filename="../canary"`, "content", []byte("--x\r\n\r\n\r\n--x--"))
	f.Add(`form-data; name="other"`, "", []byte("--x\r\nContent-Disposition: form-data; name=\"file\"\r\n\r\n"))
	f.Fuzz(func(t *testing.T, disposition, content string, rest []byte) {
		in, unchanged := outside(t, dir)
		var form bytes.Buffer
		w := multipart.NewWriter(&form)
		w.SetBoundary("x")
		part, _ := w.CreatePart(textproto.MIMEHeader{"Content-Disposition": {disposition}})
		io.WriteString(part, content)
		if form.WriteString("\r\n"); len(rest) > 0 {
			form.Write(rest)
		} else {
			w.Close()
		}
		upload(t, addr, filepath.Join(in, "f"), `multipart/form-data; boundary=x`, form.Bytes())
		unchanged()
	})
}

// FuzzMetadata: what is taken can be stored and sent back.
func FuzzMetadata(f *testing.F) {
	f.Add("purpose", "example", "other", "")
	f.Add(strings.Repeat("k", 247), "v", "K", "\x7f")
	f.Fuzz(func(t *testing.T, key1, value1, key2, value2 string) {
		h := http.Header{}
		h.Set("X-Metadata-"+key1, value1)
		h.Set("X-Metadata-"+key2, value2)
		metadata, err := requestMetadata(h)
		if err != nil {
			return
		}
		total := 0
		for name, value := range metadata {
			total += len(name) + len(value)
			if !strings.HasPrefix(name, metadataPrefix) || len(name) > 255 || name != strings.ToLower(name) ||
				strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r > '~' }) {
				t.Errorf("%q=%q", name, value)
			}
		}
		if total > 4096 {
			t.Errorf("%d bytes", total)
		}
	})
}

// FuzzSignature: a signature opens what it was made for, until it expires, and nothing else.
func FuzzSignature(f *testing.F) {
	f.Add("/a", "user", "token", "1700000000", "/b")
	f.Add("/a:read", "", "t", "", "/a")
	f.Fuzz(func(t *testing.T, path, user, secret, expires, other string) {
		if secret == "" {
			return
		}
		var token accessToken
		token.set(secret)
		text := path + ":read:" + user + ":" + secret
		query := url.Values{"path": {path}, "username": {user}}
		end, err := strconv.ParseInt(expires, 10, 64)
		if expires != "" {
			text += ":" + strconv.FormatInt(end, 10)
			query.Set("signature_expiration", expires)
		}
		sum := sha256.Sum256([]byte(text))
		query.Set("signature", "v1_"+base64.RawStdEncoding.EncodeToString(sum[:]))
		now := time.Unix(1700000000, 0)
		status, reason := token.refuseFile("", query, "read", now)
		if opened, want := status == 0, expires == "" || err == nil && end >= now.Unix(); opened != want {
			t.Errorf("%v: %d %s", query, status, reason)
		}
		for _, changed := range []struct{ name, value string }{{"path", other}, {"username", other}, {"signature", other}} {
			forged := url.Values{}
			for name := range query {
				forged.Set(name, query.Get(name))
			}
			forged.Set(changed.name, changed.value)
			if status, _ := token.refuseFile("", forged, "read", now); status == 0 && forged.Get(changed.name) != query.Get(changed.name) {
				t.Errorf("%v opens too", forged)
			}
		}
		if status, _ := token.refuseFile("", query, "write", now); status == 0 {
			t.Errorf("%v opens for writing", query)
		}
	})
}

// FuzzUserDatabase: of any text the lines are taken that have a name and numbers, and the first of equal names.
func FuzzUserDatabase(f *testing.F) {
	f.Add("0::0::::\n0::0:0:::")
	f.Add("root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:\nuser:x:1001:1001::/:\n")
	f.Add("# a comment\n+::::::\nx:x:-1:0::/:\ny:x:4294967296:0::/:\n:x:0:0::/:\nshort:x:1\n\x00:x:1:1::/:")
	f.Fuzz(func(t *testing.T, text string) {
		path := writeFile(t, filepath.Join(t.TempDir(), "passwd"), text, 0o600)
		got, want := map[string]string{}, map[string]string{}
		readDatabase(path, 7, func(fields []string) { got[fields[0]] = strings.Join(fields, ":") })
		for line := range strings.SplitSeq(text, "\n") {
			line = strings.TrimSpace(line)
			fields := strings.Split(line, ":")
			if len(fields) < 7 || fields[0] == "" || fields[0][0] == '#' || want[fields[0]] != "" {
				continue
			}
			id := func(text string) bool {
				n, ok := new(big.Int).SetString(text, 10)
				return ok && regexp.MustCompile(`^\d+$`).MatchString(text) && n.BitLen() <= 32
			}
			if id(fields[2]) && id(fields[3]) {
				want[fields[0]] = line
			}
		}
		if !maps.Equal(got, want) {
			t.Errorf("%q, want %q", got, want)
		}
	})
}

// FuzzListeners: of a table of sockets, those of loopback that listen are found, and no others.
func FuzzListeners(f *testing.F) {
	const line = "   0: 0100007F:%s 00000000:0000 %s 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0\n"
	f.Add("  sl  local_address rem_address   st\n"+fmt.Sprintf(line, "1F90", "0A")+fmt.Sprintf(line, "1F91", "01"), uint8(1))
	f.Add("0: 0100007F:0\v0 0A\n", uint8(1))
	f.Add("0: 0100007F: 0A 0A 0A\n1: 0100007F:FFFFF 0 0A\n2: 0100007F:-1 0 0A\n", uint8(3))
	f.Fuzz(func(t *testing.T, table string, copies uint8) {
		table = strings.Repeat(table, int(copies%4))
		path := writeFile(t, filepath.Join(t.TempDir(), "tcp"), table, 0o600)
		if err := readTable(path, "0100007F:", loopback4, func(address netip.Addr, port uint16, _ uint32) {
			if address != loopback4 || !regexp.MustCompile(fmt.Sprintf(`(?i)0100007F:0*%x[\s\v\x{85}\pZ]`, port)).MatchString(table) {
				t.Errorf("%v listens nowhere on port %d", address, port)
			}
		}); err != nil && err != bufio.ErrTooLong {
			t.Fatal(err)
		}
	})
}

// FuzzKernelWords: whatever the kernel was started with, the flags that are some are set and the rest is reported.
func FuzzKernelWords(f *testing.F) {
	f.Add("quiet\n--port\n1\nsplash")
	f.Add("--\n-x\n---\n-\n--port=x\n=\n--port=7")
	f.Fuzz(func(t *testing.T, words string) {
		args := strings.Split(words, "\n")
		flags := flag.NewFlagSet("", flag.ContinueOnError)
		port := flags.Int("port", 49983, "")
		flags.Bool("isnotfc", false, "")
		ignored := parseKernelWords(flags, slices.Clone(args))
		if len(ignored) > len(args) {
			t.Errorf("%d words, of which %d are ignored", len(args), len(ignored))
		}
		if *port != 49983 && !strings.Contains(words, "port") {
			t.Errorf("port %d", *port)
		}
		if last := args[len(args)-1]; last == "--port=1234" && *port != 1234 {
			t.Errorf("%q was ignored: %q", last, ignored)
		}
	})
}

// FuzzWatch: the tree of a watcher stays one, whatever events its guest makes the kernel queue. Each event is a directory, a kind, a
// cookie and a name.
func FuzzWatch(f *testing.F) {
	masks := []uint32{unix.IN_CREATE, unix.IN_DELETE, unix.IN_MOVED_FROM, unix.IN_MOVED_TO, unix.IN_MOVE_SELF, unix.IN_DELETE_SELF,
		unix.IN_IGNORED, unix.IN_ATTRIB, unix.IN_MODIFY, unix.IN_UNMOUNT}
	f.Add([]byte("\x00\x00\x01a\x01\x02\x01a\x02\x03\x01b"))
	f.Add([]byte("\x00\x02\x01a\x01\x03\x01a\x01\x02\x02b\x00\x03\x02c\x02\x04\x00\x00\x02\x06\x00\x00"))
	queue, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC) // to close one takes long; its own events are not read
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, events []byte) {
		root := t.TempDir()
		for _, dir := range []string{"a/b/c", "b/c/a", "c"} {
			if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		w := &watcher{root: root, recursive: true, fd: queue, dirs: map[int32]*watchedDir{}, moved: map[uint32]*watchedDir{}}
		if w.err = w.arm(nil, unix.AT_FDCWD, "", true); w.err != nil {
			t.Fatal(w.err)
		}
		defer func() { w.abandon(w.top) }()
		for ; len(events) >= 4 && w.err == nil; events = events[4:] {
			mask := masks[events[1]%10]
			name := string('a' + rune(events[3]%4))
			if mask&(unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO) == 0 {
				name = ""
			} else if events[1] < 128 {
				mask |= unix.IN_ISDIR
			}
			w.taken += 32
			watched := slices.Sorted(maps.Keys(w.dirs))
			if len(watched) == 0 {
				return
			}
			w.err = w.process(watched[int(events[0])%len(watched)], mask, uint32(events[2]), name)
			if w.err == nil && w.doubt && events[2]%2 == 0 {
				w.doubt = false
				w.err = w.verify()
			}
			for wd, d := range w.dirs {
				depth := 0
				for at := d; at.parent != nil; at = at.parent {
					if at.parent.children[at.name] != at {
						t.Fatalf("%q is no child of its parent", at.name)
					}
					if depth++; depth > maxDepth {
						t.Fatalf("a cycle at %q", d.name)
					}
				}
				if d.wd != wd || d.depth > maxDepth {
					t.Fatalf("%d is watched as %d, depth %d", d.wd, wd, d.depth)
				}
			}
		}
	})
}
