// Logging: the form of the lines, and the exporter against collectors of every kind.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// collector keeps the bodies of what is posted to it.
type collector struct {
	mu     sync.Mutex // protects bodies
	bodies []string
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bodies = append(c.bodies, fmt.Sprintf("%s %s %s %s", r.Method, r.URL.Path, r.Header.Get("Content-Type"), body))
}

func (c *collector) got() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.bodies)
}

func (e *logExporter) atRest() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.sending == nil
}

func (e *logExporter) waits() (lines, size int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.lines), e.size
}

// In a guest: JSON lines with the names that collectors know, on stdout and, from the first on, at the collector.
func TestLogInAGuest(t *testing.T) {
	t.Parallel()
	c := &collector{}
	d, mmds := startGuestDaemon(t, daemonConfig{})
	d.initialise(t, `{"hyperloopIP":"first"}`) // nobody knows yet where its line goes
	listener := mmds.netns.listen(t, "127.0.0.1:0")
	server := &http.Server{Handler: c}
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	mmds.put(fmt.Sprintf(`{"instanceID":"cl-\"1","envID":"tmpl","address":"http://%s/logs"}`, listener.Addr()))
	waitEnv(t, d, "WRENN_SANDBOX_ID", `cl-"1`)
	d.initialise(t, `{"hyperloopIP":"last"}`)
	waitFor(t, 5*time.Second, "the last line at the collector", func() bool { return strings.Contains(strings.Join(c.got(), ""), `"last"`) })
	var seen []string
	for _, body := range c.got() {
		text, ok := strings.CutPrefix(body, "POST /logs application/json ")
		var line map[string]any
		if err := json.Unmarshal([]byte(text), &line); !ok || err != nil || strings.Count(text, "\n") != 1 {
			t.Errorf("posted %q: %v", body, err)
		}
		if line["instanceID"] != `cl-"1` || line["envID"] != "tmpl" {
			t.Errorf("posted %q without the ids", body)
		}
		seen = append(seen, fmt.Sprint(line["message"], line["value"]))
	}
	for i, line := range strings.Split(strings.TrimSpace(d.log()), "\n") {
		var object map[string]any
		if err := json.Unmarshal([]byte(line), &object); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		for _, key := range []string{"level", "timestamp", "message", "logger"} {
			if _, is := object[key].(string); !is {
				t.Errorf("%q has no %s", line, key)
			}
		}
		if level := object["level"]; level != "info" && level != "warn" && level != "error" {
			t.Errorf("level %v", level)
		}
		if _, err := time.Parse(time.RFC3339Nano, fmt.Sprint(object["timestamp"])); err != nil {
			t.Error(err)
		}
		if i < len(seen) && seen[i] != fmt.Sprint(object["message"], object["value"]) {
			t.Errorf("line %d is %q, posted as %q", i, line, seen[i])
		}
	}
}

// A collector that takes nothing, or that answers without end, costs a bounded buffer and nobody's time.
func TestBadCollectors(t *testing.T) {
	t.Parallel()
	deaf, err := net.Listen("tcp", "127.0.0.1:0") // never accepted
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { deaf.Close() })
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()
	elsewhere := &collector{}
	away := httptest.NewServer(elsewhere)
	t.Cleanup(away.Close)
	addresses := map[string]string{"deaf": "http://" + deaf.Addr().String(), "dead": "http://" + gone.Addr().String()}
	for name, h := range map[string]http.HandlerFunc{"silent": silence, "endless": flood, "trickling": trickle, "500": says(500, "no"),
		"redirecting": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, away.URL, http.StatusTemporaryRedirect)
		}} {
		server := httptest.NewServer(h)
		t.Cleanup(func() { server.CloseClientConnections(); server.Close() })
		addresses[name] = server.URL
	}
	for name, address := range addresses {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := &logExporter{}
			e.redirect(address, "cl-1", "tmpl")
			line := []byte(fmt.Sprintf("{\"message\":%q}\n", strings.Repeat("x", 1000)))
			const lines = 20_000
			var slowest time.Duration
			for range lines {
				began := time.Now()
				if n, err := e.Write(line); n != len(line) || err != nil {
					t.Fatal(n, err)
				}
				slowest = max(slowest, time.Since(began))
			}
			if _, size := e.waits(); size > logBuffer || slowest > time.Second {
				t.Errorf("%d bytes wait; the slowest line took %v", size, slowest)
			}
			// Another sandbox's collector gets what is left and what comes.
			c := &collector{}
			server := httptest.NewServer(c)
			defer server.Close()
			e.redirect(server.URL+"/new", "cl-2", "")
			e.Write([]byte("{\"message\":\"last\"}\n"))
			waitFor(t, 30*time.Second, "the last line at the new collector", func() bool {
				got := c.got()
				return len(got) > 0 && got[len(got)-1] == `POST /new application/json {"message":"last","envID":"","instanceID":"cl-2"}`+"\n"
			})
			waitFor(t, 5*time.Second, "no goroutine", e.atRest)
		})
	}
	t.Cleanup(func() {
		if got := elsewhere.got(); len(got) > 0 {
			t.Errorf("a redirect was followed with %q", got)
		}
	})
}

func TestLogBuffer(t *testing.T) {
	t.Parallel()
	e := &logExporter{}
	line := func(i int) []byte { return fmt.Appendf(nil, "{\"n\":%d,\"x\":%q}\n", i, strings.Repeat("x", 10_000)) }
	for i := range 1000 {
		e.Write(line(i))
	}
	e.Write(append(line(1000), make([]byte, logLineLimit)...)) // too long
	n, size := e.waits()
	if size > logBuffer || size < logBuffer-20_000 {
		t.Errorf("%d bytes wait, want nearly %d", size, logBuffer)
	}
	c := &collector{}
	server := httptest.NewServer(c)
	defer server.Close()
	for _, none := range []string{"", "x", "ftp://host/", "file:///etc/passwd", "http://", "//host", "http://a b/", "unix:/run/x", "\x00"} {
		off := &logExporter{}
		off.Write(line(0))
		off.redirect(none, "", "")
		off.Write(line(1))
		if lines, size := off.waits(); lines != 0 || size != 0 || !off.atRest() {
			t.Errorf("address %q: %d lines, %d bytes wait", none, lines, size)
		}
	}
	e.quiesce(time.Now().Add(time.Second))
	e.redirect(server.URL, "i", "e")
	e.Write(line(1001))
	n, _ = e.waits() // the oldest may have gone for it
	if !e.atRest() {
		t.Error("sends while it is to be still")
	}
	e.resume()
	waitFor(t, 30*time.Second, "all sent", func() bool { return len(c.got()) == n })
	waitFor(t, 5*time.Second, "no goroutine", e.atRest)
	for i, body := range c.got()[:n-1] {
		if want := fmt.Sprintf(`{"n":%d,`, 1001-n+i); !strings.Contains(body, want) { // the newest, in order
			t.Fatalf("line %d is %.80q, want %s", i, body, want)
		}
	}
}

func TestQuiesceWaitsForTheLineOnItsWay(t *testing.T) {
	t.Parallel()
	hold := make(chan struct{})
	arrived := make(chan struct{}, 10)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { arrived <- struct{}{}; <-hold }))
	defer server.Close()
	e := &logExporter{}
	e.redirect(server.URL, "i", "e")
	e.Write([]byte("{\"n\":1}\n"))
	e.Write([]byte("{\"n\":2}\n"))
	<-arrived
	e.quiesce(time.Now().Add(50 * time.Millisecond)) // the deadline comes first
	close(hold)
	e.quiesce(time.Now().Add(10 * time.Second))
	if lines, _ := e.waits(); lines != 1 || !e.atRest() {
		t.Errorf("%d lines wait, at rest: %t; want the second one, true", lines, e.atRest())
	}
	e.resume()
	<-arrived
	waitFor(t, 5*time.Second, "at rest", e.atRest)
}

func TestLoggerForms(t *testing.T) {
	out := func(text bool) string {
		var b strings.Builder
		newLogger(&b, text).Error("message", "logger", "envd", "time", "no time")
		return b.String()
	}
	var object map[string]string
	if err := json.Unmarshal([]byte(out(false)), &object); err != nil || object["message"] != "message" {
		t.Errorf("%q: %v, %v", out(false), slices.Sorted(maps.Keys(object)), err)
	}
	if os.Getenv("ENVD_LOG") == "" && !strings.Contains(out(true), "level=ERROR msg=message logger=envd") {
		t.Errorf("text: %q", out(true))
	}
}

// fullPipe gives a pipe that takes no more bytes until somebody reads.
func fullPipe(t *testing.T) (reader, writer *os.File) {
	t.Helper()
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	unix.SetNonblock(fds[1], true)
	for n := 4096; n > 0; n, _ = unix.Write(fds[1], make([]byte, 4096)) {
	}
	unix.SetNonblock(fds[1], false)
	reader, writer = os.NewFile(uintptr(fds[0]), "pipe"), os.NewFile(uintptr(fds[1]), "pipe")
	t.Cleanup(func() { reader.Close(); writer.Close() })
	return reader, writer
}

// stoppedTerminal gives one whose user has pressed Ctrl-S.
func stoppedTerminal(t *testing.T) *os.File {
	t.Helper()
	master, slave, err := openPTY(80, 24, os.Getuid())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(master) })
	file := os.NewFile(uintptr(slave), "terminal")
	t.Cleanup(func() { file.Close() })
	if err := unix.IoctlSetInt(slave, unix.TCXONC, unix.TCOOFF); err != nil {
		t.Fatal(err)
	}
	return file
}

// logMuch makes the daemon log numbered lines, one a request, in which a number stands as <N>.
func logMuch(t *testing.T, d *daemon, lines int) {
	t.Helper()
	for n := range lines {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		body := fmt.Sprintf(`{"hyperloopIP":"-%d-%s"}`, n, strings.Repeat("x", 1000))
		request, err := http.NewRequestWithContext(ctx, "POST", d.url+"/init", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		got := d.do(t, request)
		cancel()
		if got.status != http.StatusNoContent {
			t.Fatalf("/init %d: %d %s", n, got.status, got.body)
		}
	}
}

// Nobody waits for the log: with a stdout that takes nothing, from the start or from later on, everything is served, and SIGTERM
// ends the daemon in time (which end() looks at).
func TestLogThatNobodyReads(t *testing.T) {
	t.Parallel()
	for name, stdout := range map[string]func(t *testing.T) *os.File{
		"full pipe":        func(t *testing.T) *os.File { _, w := fullPipe(t); return w },
		"stopped terminal": stoppedTerminal,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := startDaemonWith(t, daemonConfig{stdout: stdout(t)})
			logMuch(t, d, 20)
			d.healthy(t)
			d.run(t, argv("true"))
			if err := d.stop(t); err != nil {
				t.Errorf("SIGTERM: %v", err)
			}
		})
	}
}

// Lines for which there was no room are counted, exactly, before those that came after them.
func TestLogCountsWhatItDropped(t *testing.T) {
	t.Parallel()
	reader, writer := fullPipe(t)
	d := startDaemonWith(t, daemonConfig{stdout: writer})
	const lines = 600
	logMuch(t, d, lines)
	var mu sync.Mutex // protects printed
	var printed []byte
	go func() {
		buf := make([]byte, 64<<10)
		for n, err := 1, error(nil); n > 0 && err == nil; n, err = reader.Read(buf) {
			mu.Lock()
			printed = append(printed, buf[:n]...)
			mu.Unlock()
			clear(buf)
		}
	}()
	text := func() string {
		mu.Lock()
		defer mu.Unlock()
		return strings.ReplaceAll(string(printed), "\x00", "")
	}
	waitFor(t, 20*time.Second, "the last line", func() bool { return strings.Contains(text(), fmt.Sprintf("-%d-", lines-1)) })
	numbered, number := regexp.MustCompile(`value=-(\d+)-`), -1
	seen, dropped := 0, 0
	for _, line := range strings.Split(text(), "\n") {
		if m := regexp.MustCompile(`msg="(\d+) lines dropped"`).FindStringSubmatch(line); m != nil {
			dropped += atoi(t, m[1])
		} else if m := numbered.FindStringSubmatch(line); m != nil {
			if n := atoi(t, m[1]); n <= number {
				t.Errorf("line %d after line %d", n, number)
			} else {
				number = n
			}
			seen++
		} else if line != "" {
			seen++
		}
	}
	// Beside the numbered lines there is the one that says that the daemon listens.
	if seen+dropped != lines+1 || dropped < lines/3 || number != lines-1 {
		t.Errorf("%d lines printed, %d dropped, of %d; the last one is %d", seen, dropped, lines+1, number)
	}
	if got := d.rss(); got > 30<<20 && !raceEnabled() {
		t.Errorf("RSS is %d MiB", got>>20)
	}
}

// A line that is logged last is printed before the daemon ends.
func TestLogIsFlushedAtTheEnd(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	if err := d.stop(t); err != nil || !strings.Contains(d.log(), "stopping") {
		t.Errorf("%v, log %q", err, d.log())
	}
}
