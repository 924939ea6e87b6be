// Bad input of every kind: each gets a clear error, nothing is half done, and the daemon serves the next request.

package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

// servesOn is what follows every bad input: the next request, and a command, are served.
func servesOn(t *testing.T, d *daemon) {
	t.Helper()
	d.healthy(t)
	wantEnd(t, d.run(t, argv("true"), withCwd("/")).end, 0, true, "exit status 0")
}

// exchange sends raw bytes, closes the sending side when asked to, and reads what comes back.
func exchange(t *testing.T, d *daemon, halfClose bool, parts ...string) string {
	t.Helper()
	conn, err := net.Dial("tcp", d.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	for _, part := range parts {
		if _, err := io.WriteString(conn, part); err != nil {
			break // the server may have heard enough
		}
	}
	if halfClose {
		conn.(*net.TCPConn).CloseWrite()
	}
	answer, _ := io.ReadAll(conn)
	return string(answer)
}

func TestHeadersWithoutSense(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for _, header := range []struct{ name, value string }{
		{"Keepalive-Ping-Interval", "0"}, {"Keepalive-Ping-Interval", "-1"},
		{"Keepalive-Ping-Interval", "9223372036854775807"},
		{"Keepalive-Ping-Interval", "99999999999999999999999999"}, {"Keepalive-Ping-Interval", "\xff"},
		{"Connect-Timeout-Ms", "garbage"}, {"Connect-Timeout-Ms", "0"}, {"Connect-Timeout-Ms", "-1"},
		{"Connect-Timeout-Ms", "99999999999"}, {"Grpc-Timeout", "garbage"}, {"Grpc-Timeout", "99999999999H"},
		{"Envd-Output-From", "garbage"}, {"Envd-Extensions", "garbage"}, {"Authorization", "Basic \x80"},
		{"Authorization", "Basic"}, {"Content-Encoding", "gzip"}, {"Connect-Content-Encoding", "br"},
		{"Connect-Protocol-Version", "2"}, {"Content-Length", "0"}, {"Origin", "\x80"}, {"Expect", "nonsense"},
	} {
		for _, method := range []string{"Start", "Connect"} {
			body := frame{0, `{"process":{"cmd":"true"}}`}.bytes()
			request, err := http.NewRequestWithContext(t.Context(), "POST", d.url+"/process.Process/"+method,
				strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			request.Header.Set("Content-Type", "application/connect+json")
			if header.name == "Content-Length" {
				request.Body, request.ContentLength = http.NoBody, 0
			} else {
				request.Header.Set(header.name, header.value)
			}
			response, err := d.http.Do(request)
			if err != nil {
				t.Errorf("%s with %s: %q: the connection broke: %v", method, header.name, header.value, err)
				continue
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
		}
		d.healthy(t)
	}
	servesOn(t, d)
}

func TestManyArguments(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	args := argv("sh", "-c", `printf '%s' "$*" | wc -c`, "sh")
	for range 1024 {
		args = append(args, strings.Repeat("a", 1023))
	}
	r := d.run(t, args)
	if got := strings.TrimSpace(string(r.stdout)); got != "1048575" {
		t.Errorf("1 MiB of arguments: %q, stderr %q, %v", got, r.stderr, r.end)
	}
	servesOn(t, d)
	// What the kernel refuses (one argument of more than 128 KiB, more than a quarter of the stack limit) is told as such.
	for what, args := range map[string][]string{
		"one argument of 1 MiB": argv("true", strings.Repeat("a", 1<<20)),
		"12 MiB in all":         append(argv("true"), slices.Repeat(argv(strings.Repeat("a", 100_000)), 120)...),
	} {
		s, err := d.open(t, args)
		var r runResult
		if err == nil {
			r = s.collect()
			err = r.err
		}
		told := string(r.stderr)
		if err != nil {
			told = err.Error()
		}
		asError := connect.CodeOf(err) == connect.CodeInvalidArgument || connect.CodeOf(err) == connect.CodeResourceExhausted
		asEnd := err == nil && r.end.GetExitCode() == 126
		if !strings.Contains(strings.ToLower(told), "argument list too long") || !asError && !asEnd || len(told) > 4096 {
			t.Errorf("%s: %.300s, %v; want \"argument list too long\"", what, told, r.end)
		}
		servesOn(t, d)
	}
	r = d.run(t, sh(`echo ${#LONG}`), withEnv("LONG", strings.Repeat("x", 100_000)))
	if string(r.stdout) != "100000\n" {
		t.Errorf("a variable of 100 kB: %q, stderr %q", r.stdout, r.stderr)
	}
}

func TestHugeTerminals(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for size, want := range map[[2]uint32]string{
		{0, 0}: "0 0", {65535, 65535}: "65535 65535", {65536, 65536}: "65535 65535", {4294967295, 4294967295}: "65535 65535",
		{1, 65536}: "65535 1",
	} {
		r := d.run(t, argv("stty", "size"), withPTY(size[0], size[1]))
		if string(r.pty) != want+"\r\n" {
			t.Errorf("%d columns, %d rows: stty says %q, want %s", size[0], size[1], r.pty, want)
		}
	}
	s := d.start(t, argv("cat"), withPTY(0, 0))
	for _, size := range []*pb.PTY{{}, {Size: &pb.PTY_Size{}}, {Size: &pb.PTY_Size{Cols: 65536, Rows: 65536}}} {
		_, err := d.process().Update(t.Context(), connect.NewRequest(&pb.UpdateRequest{Process: byPid(s.pid), Pty: size}))
		if err != nil {
			t.Errorf("Update to %v: %v", size, err)
		}
	}
	d.kill(t, s.pid)
	servesOn(t, d)
}

// `kill -9 0` reaches the sender's process group. In a child of root that must not be the daemon's.
func TestKillZero(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(testing.TB, ...string) *daemon{
		"cgroups": startDaemon, "process groups": startDaemonNoCgroups,
	} {
		d := start(t)
		bystander := d.start(t, argv("sleep", "300"))
		for _, options := range [][]callOption{nil, {withPTY(80, 24)}} {
			for _, signal := range []string{"KILL", "TERM", "HUP", "STOP"} {
				s := d.start(t, sh("kill -"+signal+" 0; exit 1"), options...)
				if signal == "STOP" {
					waitFor(t, 5*time.Second, "the child stopped", func() bool {
						state, _ := processState(int(s.pid))
						return state == 'T'
					})
					d.kill(t, s.pid)
				}
				status := map[string]string{"KILL": "signal: killed", "TERM": "signal: terminated", "HUP": "signal: hangup",
					"STOP": "signal: killed"}[signal]
				wantEnd(t, s.collect().end, -1, false, status)
			}
		}
		if !isAlive(int(bystander.pid)) {
			t.Errorf("%s: another process died too", name)
		}
		d.kill(t, bystander.pid)
		servesOn(t, d)
	}
}

// A child that is stopped, or that stops its own parent's other children, holds nobody up.
func TestStoppedChildren(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	var streams []*clientStream
	for range 10 {
		s := d.start(t, sh("kill -STOP $$; echo on; exit 2"))
		streams = append(streams, s)
		waitFor(t, 5*time.Second, "stopped", func() bool { state, _ := processState(int(s.pid)); return state == 'T' })
	}
	servesOn(t, d)
	for _, s := range streams {
		syscall.Kill(int(s.pid), syscall.SIGCONT)
		r := s.collect()
		if wantEnd(t, r.end, 2, true, "exit status 2"); string(r.stdout) != "on\n" {
			t.Errorf("stdout %q", r.stdout)
		}
	}
}

func TestBodyCutInTheMiddle(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	dir := publicDir(t)
	start := func(marker string) string {
		return frame{0, fmt.Sprintf(`{"process":{"cmd":"touch","args":[%q]}}`, filepath.Join(dir, marker))}.bytes()
	}
	head := func(method, contentType string, rest string) string {
		return fmt.Sprintf("POST /process.Process/%s HTTP/1.1\r\nHost: localhost\r\nContent-Type: %s\r\n%s\r\n\r\n", method,
			contentType, rest)
	}
	const init = "POST /init HTTP/1.1\r\nHost: localhost\r\n"
	const stream, unary = "application/connect+json", "application/json"
	whole := start("cut")
	length := func(n int) string { return fmt.Sprintf("Content-Length: %d", n) }
	for what, parts := range map[string][]string{
		"within the envelope's head": {head("Start", stream, length(len(whole))), whole[:3]},
		"within the message":         {head("Start", stream, length(len(whole))), whole[:20]},
		"a byte short":               {head("Start", stream, length(len(whole))), whole[:len(whole)-1]},
		"Content-Length too small":   {head("Start", stream, "Content-Length: 20"), whole[:20]},
		"chunked":                    {head("Start", stream, "Transfer-Encoding: chunked"), "ff\r\n", whole[:20]},
		"chunked, bad size":          {head("Start", stream, "Transfer-Encoding: chunked"), "zz\r\n", whole},
		"chunked, ends early": {head("Start", stream, "Transfer-Encoding: chunked"), "14\r\n", whole[:20],
			"\r\n0\r\n\r\n"},
		"unary":           {head("List", unary, "Content-Length: 100"), "{"},
		"StreamInput":     {head("StreamInput", stream, "Transfer-Encoding: chunked"), "a\r\n", start("x")[:10]},
		"length of 4 GiB": {head("Start", stream, "Content-Length: 30"), "\x00\xff\xff\xff\xff" + whole[:25]},
		"init":            {init + "Content-Length: 100\r\n\r\n", `{"envVars":{"CUT":"1"}}`},
		"init, chunked":   {init + "Transfer-Encoding: chunked\r\n\r\n17\r\n", `{"envVars":{"CUT":"1"}}`},
		"gzip that is not": {head("Start", stream, "Connect-Content-Encoding: gzip\r\nContent-Length: 30"),
			"\x01" + whole[1:30]},
		"unknown flags":              {head("Start", stream, length(len(whole))), "\xf4" + whole[1:]},
		"gzip of no kind":            {head("Start", stream, length(len(whole))), "\x01" + whole[1:]},
		"unary gzip that is not":     {head("List", unary, "Content-Encoding: gzip\r\nContent-Length: 2"), "{}"},
		"unary, unknown compression": {head("List", unary, "Content-Encoding: br\r\nContent-Length: 2"), "{}"},
		"proto garbage": {head("Start", "application/connect+proto", "Content-Length: 13"),
			"\x00\x00\x00\x00\x08" + strings.Repeat("\xff", 8)},
		"empty stream": {head("Start", stream, "Content-Length: 0")},
		"two messages": {head("Start", stream, length(2*len(whole))), whole, whole},
	} {
		answer := exchange(t, d, true, parts...)
		if strings.Contains(answer, `"start"`) {
			t.Errorf("%s: a process was started: %q", what, answer)
		}
		if !strings.HasPrefix(answer, "HTTP/1.1 ") && !strings.Contains(answer, "\r\nHTTP/1.1 ") {
			t.Errorf("%s: no answer: %q", what, answer)
		}
		d.healthy(t)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("a cut request was carried out: %v", entries)
	}
	wantJSON(t, "/envs", d.request(t, "GET", "/envs", "").body, `{"WRENN_SANDBOX":"false"}`)
	// A reset instead of an orderly close.
	for range 20 {
		conn, err := net.Dial("tcp", d.addr)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, head("Start", stream, "Content-Length: 1000")+whole[:20])
		conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	}
	servesOn(t, d)
}

func TestNotHTTP(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--header-timeout", "1s")
	const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
	const settings = "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	for what, bytes := range map[string]string{
		"nothing":               "",
		"zeros":                 strings.Repeat("\x00", 4096),
		"TLS":                   "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + strings.Repeat("A", 500),
		"text":                  "hello\r\n\r\n",
		"HTTP/9":                "GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
		"no host":               "GET /health HTTP/1.1\r\n\r\n",
		"a long line":           "GET /" + strings.Repeat("a", 2<<20) + " HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"many headers":          "GET /health HTTP/1.1\r\nHost: localhost\r\n" + strings.Repeat("X-A: b\r\n", 300_000) + "\r\n",
		"a bad header":          "GET /health HTTP/1.1\r\nHost: localhost\r\n: b\r\n\x00\r\n\r\n",
		"two lengths":           "POST /init HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
		"negative length":       "POST /init HTTP/1.1\r\nHost: localhost\r\nContent-Length: -2\r\n\r\n{}",
		"preface and garbage":   preface + strings.Repeat("\xff", 4096),
		"preface alone":         preface,
		"endless settings":      preface + strings.Repeat(settings, 20_000),
		"pings":                 preface + settings + strings.Repeat("\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678", 20_000),
		"frame of 16 MiB":       preface + settings + "\xff\xff\xff\x00\x00\x00\x00\x00\x01" + strings.Repeat("x", 1<<20),
		"path of dots":          "GET /../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
		"absolute":              "GET http://127.0.0.1:1/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
		"CONNECT":               "CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"OPTIONS *":             "OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
		"an escape in the path": "GET /%00%ff HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
	} {
		answer := exchange(t, d, true, bytes)
		if strings.Contains(answer, "root:") {
			t.Errorf("%s: %q", what, answer)
		}
		d.healthy(t)
	}
	servesOn(t, d)
}

func TestJSONWithoutSense(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	everywhere := []string{
		"", "null", "7", `""`, "[]", "{", "}", "\xff", `{"process":7}`, `{"process":[]}`,
		strings.Repeat(`{"process":`, 20_000), strings.Repeat("[", 1<<20), `{"x":` + strings.Repeat("[", 1<<20),
	}
	selecting := []string{
		`{"process":{"pid":-1}}`, `{"process":{"pid":4294967296}}`, `{"process":{"pid":1.5}}`, `{"process":{"tag":7}}`,
		`{"process":{"pid":1,"tag":"x"}}`, `{"process":{"tag":"\ud800"}}`, `{"signal":{}}`, `{"signal":99999999999}`,
		`{"input":{"stdin":"not base64!"}}`, `{"input":{"stdin":"","pty":""}}`,
	}
	for _, body := range slices.Concat(everywhere, selecting) {
		for _, method := range []string{"SendSignal", "SendInput", "Update", "CloseStdin"} {
			got := d.unary(t, method, body)
			if got.status < 400 || got.status >= 500 || !strings.HasPrefix(got.body, `{"code":`) {
				t.Errorf("%s %.40q: %d %q, want a 4xx with a code", method, body, got.status, got.body)
			}
		}
		d.healthy(t)
	}
	starting := []string{
		`{}`, `{"process":null}`, `{"process":{"cmd":7}}`, `{"process":{"cmd":"true","args":"x"}}`, `{"pty":7}`,
		`{"process":{"cmd":"true","args":[null]}}`, `{"process":{"cmd":"true","envs":{"A":1}}}`,
		`{"process":{"cmd":"true"},"pty":{"size":{"cols":-1}}}`, `{"process":{"cmd":"true"},"stdin":"no"}`,
		`{"process":{"cmd":"true"},"tag":["x"]}`, `{"process":{"cmd":"\ud800"}}`,
	}
	for _, body := range slices.Concat(everywhere, starting) {
		answer, frames := d.rawStream(t, "Start", body)
		if answer.status != 200 || len(frames) != 1 || frames[0].flags != 2 ||
			!strings.Contains(frames[0].payload, `"code":"invalid_argument"`) {
			t.Errorf("Start %.60q: %d %.200q, want invalid_argument", body, answer.status, answer.body)
		}
		d.healthy(t)
	}
	// invalid UTF-8 cannot be a protobuf string.
	if failure := d.startError(t, argv("echo", "a\xff")); failure == nil {
		t.Error("no error")
	}
	servesOn(t, d)
}

func TestConfigurationsWithoutSense(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	r := d.run(t, argv("env"), withEnv("", "empty name"), withEnv("A=B", "equals sign"), withEnv("ok", "1"))
	if !bytes.Contains(r.stdout, []byte("ok=1\n")) {
		t.Errorf("stdout %q", r.stdout)
	}
	for _, cwd := range []string{strings.Repeat("d", 5000), "/" + strings.Repeat("d/", 5000), "/proc/self/fd",
		"/proc/1/cwd/nope"} {
		s, err := d.open(t, argv("true"), withCwd(cwd))
		if err == nil {
			r := s.collect()
			err = r.err
			if err == nil && r.ends != 1 {
				t.Errorf("cwd %.20q: %d ends", cwd, r.ends)
			}
		}
		if err != nil && connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("cwd %.20q: %v, want invalid_argument", cwd, err)
		}
	}
	long := strings.Repeat("t", 100<<10)
	s := d.start(t, argv("cat"), withTag(long))
	if err := d.sendStdin(t, byTag(long), "by a long tag\n"); err != nil {
		t.Error(err)
	}
	s.readUntil(t, "by a long tag\n")
	d.kill(t, s.pid)
	// A variable that no process can be started with is refused, not kept: it would spoil every later Start.
	for _, body := range []string{`{"envVars":{"A\u0000":"b"}}`, `{"envVars":{"GOOD":"1","C":"d\u0000"}}`} {
		wantEnvelope(t, "/init "+body, d.request(t, "POST", "/init", body), http.StatusBadRequest, "")
	}
	wantJSON(t, "/envs", d.request(t, "GET", "/envs", "").body, `{"WRENN_SANDBOX":"false"}`)
	for _, body := range []string{`{"envVars":{"":"x"}}`, `{"envVars":{"=":"x","A=B":"y"}}`} {
		if got := d.request(t, "POST", "/init", body); got.status >= 500 {
			t.Errorf("/init %s: %d %q", body, got.status, got.body)
		}
	}
	servesOn(t, d)
}

// A process that takes its own executable, its directory or its terminal away ends like any other.
func TestHostileProcesses(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	dir := publicDir(t)
	inside := filepath.Join(dir, "inside")
	if err := os.Mkdir(inside, 0o755); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, d.run(t, sh("rmdir ../inside; exit 3"), withCwd(inside)).end, 3, true, "exit status 3")
	wantEnd(t, d.run(t, sh("exec >&- 2>&- <&-; sleep 0.2; exit 4")).end, 4, true, "exit status 4")
	wantEnd(t, d.run(t, sh("exec >&- 2>&- <&-; sleep 0.2; exit 5"), withPTY(80, 24)).end, 5, true, "exit status 5")
	wantEnd(t, d.run(t, sh("stty raw -echo; trap '' HUP; exit 6"), withPTY(80, 24)).end, 6, true, "exit status 6")
	wantEnd(t, d.run(t, argv("setsid", "-w", "sh", "-c", "exit 8")).end, 8, true, "exit status 8")
	// Thousands of short-lived orphans.
	r := d.run(t, sh(`i=0; while [ $i -lt 300 ]; do (true &) ; i=$((i+1)); done; exit 7`))
	wantEnd(t, r.end, 7, true, "exit status 7")
	waitFor(t, 5*time.Second, "no zombies", func() bool { return len(d.zombies()) == 0 })
	// A name that confuses readers of /proc/PID/stat.
	odd := filepath.Join(dir, "a) Z 1 (b")
	content, err := os.ReadFile("/bin/sleep")
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, odd, string(content), 0o755)
	s := d.start(t, argv(odd, "300"))
	d.kill(t, s.pid)
	wantEnd(t, s.collect().end, -1, false, "signal: killed")
	servesOn(t, d)
}

// Streams that break off at any point leave nothing behind that the daemon would trip over.
func TestClientsThatVanish(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeoutCause(t.Context(), time.Duration(i)*time.Millisecond, nil)
			defer cancel()
			plain, release := context.WithCancel(t.Context()) // without a deadline that the client would send on
			defer release()
			context.AfterFunc(ctx, release)
			s, err := d.open(t, sh("head -c 10000000 /dev/zero; exec sleep 0.1"), withContext(plain))
			if err != nil {
				return
			}
			for s.next() != nil {
			}
			s.drop()
		})
	}
	wg.Wait()
	waitFor(t, 10*time.Second, "every process ended", func() bool { return len(d.list(t)) == 0 })
	servesOn(t, d)
}

// crowd opens connections that each send one of the beginnings and then nothing, and answers by how many bytes the
// daemon's memory grew. /health must answer throughout.
func crowd(t *testing.T, d *daemon, count int, beginnings ...string) (grown int64) {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < uint64(count)+1000 {
		t.Skipf("needs more open files: RLIMIT_NOFILE is %d", limit.Cur)
	}
	servesOn(t, d)
	before := d.rss()
	var slowest time.Duration
	conns := make([]net.Conn, 0, count)
	t.Cleanup(func() {
		for _, conn := range conns {
			conn.(*net.TCPConn).SetLinger(0)
			conn.Close()
		}
	})
	for i := range count {
		conn, err := net.DialTimeout("tcp", d.addr, 5*time.Second)
		if err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
		io.WriteString(conn, beginnings[i%len(beginnings)])
		conns = append(conns, conn)
		if i%500 == 499 {
			began := time.Now()
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}
			response, err := client.Get(d.url + "/health")
			if err != nil {
				t.Fatalf("/health with %d connections: %v", len(conns), err)
			}
			response.Body.Close()
			if response.StatusCode != http.StatusOK {
				t.Fatalf("/health with %d connections: %d", len(conns), response.StatusCode)
			}
			slowest = max(slowest, time.Since(began))
		}
	}
	servesOn(t, d)
	grown = d.rss() - before
	t.Logf("%d connections: RSS %d KiB + %d KiB, slowest /health %v, %d descriptors, %d threads", count, before>>10,
		grown>>10, slowest, len(d.fds()), d.threads())
	if slowest > 3*time.Second && !raceEnabled() {
		t.Errorf("/health took %v", slowest)
	}
	return grown
}

// 10,000 connections on which no whole request header ever arrives.
func TestHalfOpenConnections(t *testing.T) {
	if testing.Short() {
		t.Skip("needs 10,000 connections: not with -short")
	}
	d := startDaemon(t, "--memory-limit", "64MiB") // of which those that wait have 10 MiB
	grown := crowd(t, d, 10_000, "GET /hea", "POST /process.Process/Start HTTP/1.1\r\nHost: localhost\r\nContent-Ty", "",
		"PRI * HTTP/2.0\r\n\r\nS")
	const bound = 40 << 20
	if grown > bound && !raceEnabled() { // the race detector's shadow memory counts too
		t.Errorf("RSS grew by %d MiB, want less than %d", grown>>20, bound>>20)
	}
	// A connection that is being used is not cut, however many crowd around it.
	conn, err := net.Dial("tcp", d.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	reader := bufio.NewReader(conn)
	for range 3 {
		io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, response.Body)
	}
}

// As many as may wait, each with a header of the shortest lines that goes on until the daemon takes no more of it. A line takes many
// times its size in net/http.
func TestHeadersOfManyLines(t *testing.T) {
	d := startDaemon(t)
	var lines strings.Builder
	for i := range 150_000 {
		fmt.Fprintf(&lines, "%x:\r\n", i)
	}
	const bound = 160 << 20
	if grown := crowd(t, d, 256, "POST /init HTTP/1.1\r\nHost: localhost\r\n"+lines.String()[:15<<10], "POST /init HTTP/1.1\r\nHost: localhost\r\n"+lines.String()); grown > bound && !raceEnabled() {
		t.Errorf("RSS grew by %d MiB, want less than %d", grown>>20, bound>>20)
	}
	conn, err := net.Dial("tcp", d.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	go io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: localhost\r\n"+lines.String()+"\r\n")
	if response, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || response.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("a header too large: %v, %v", response, err)
	}
}

// The same with whole headers, announcing bodies that never come: each is a request in progress.
func TestUnfinishedBodies(t *testing.T) {
	if testing.Short() {
		t.Skip("needs 10,000 connections: not with -short")
	}
	d := startDaemon(t, "--memory-limit", "48MiB")
	const rest = " HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\nContent-Type: application/"
	grown := crowd(t, d, 10_000, "POST /init"+rest+"json\r\n\r\n{", "POST /process.Process/List"+rest+"json\r\n\r\n{",
		"POST /process.Process/Start"+rest+"connect+json\r\n\r\n\x00\x00",
		"POST /process.Process/StreamInput"+rest+"connect+json\r\n\r\n")
	const bound = 40 << 20
	if grown > bound && !raceEnabled() {
		t.Errorf("RSS grew by %d MiB, want less than %d", grown>>20, bound>>20)
	}
}
