// Who tries to make the daemon hold more than --memory-limit: each way by itself, then all at once, while an honest client with
// the token goes on. `go test -run TestBloat -v .` prints what was seen; -bloat TIME has all at once go on for so long.
//
// What is asserted is what no busy machine excuses: no request of the honest client fails, the peak of the memory stays within
// the limit and a fixed sum, and the memory is back some seconds after. How long the honest client waits is printed.

package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

var bloatTime = flag.Duration("bloat", 0, "how `long` all attacks of TestBloat go on at once (default 15s)")

const (
	bloatToken = "bloat-token"
	bloatLimit = 64 << 20 // bytes, --memory-limit
	bloatSlack = 48 << 20 // beyond it, for the binary, its runtime and garbage
	bloatRest  = 24 << 20 // afterwards: 13 to 21 were seen
	threadRest = 48 << 10 // of each thread beyond 20: their stacks, which Go keeps
)

// bloated is a daemon under attack.
type bloated struct {
	*daemon
	t      *testing.T
	dir    string // with the prepared trees
	client *http.Client
}

// asAttacker comes from an address of its own.
func asAttacker(ctx context.Context, network, address string) (net.Conn, error) {
	return (&net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 2)}}).DialContext(ctx, network, address)
}

// post sends a request with the token and drops the answer; any answer will do.
func (b *bloated) post(ctx context.Context, path, contentType string, body io.Reader, headers ...string) {
	request, err := http.NewRequestWithContext(ctx, "POST", b.url+path, body)
	if err != nil {
		b.t.Error(err)
		return
	}
	request.Header.Set("Content-Type", contentType)
	request.Header.Set("X-Access-Token", bloatToken)
	for i := 0; i < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	if response, err := b.client.Do(request); err == nil {
		io.Copy(io.Discard, response.Body)
		response.Body.Close()
	}
}

// atOnce runs many, and waits for them.
func atOnce(n int, do func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { do(i) })
	}
	all.Wait()
}

// jsonEnvelope puts a message of JSON into an envelope of Connect's.
func jsonEnvelope(text string) io.Reader {
	head := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(text)))
	return io.MultiReader(bytes.NewReader(head), strings.NewReader(text))
}

func (b *bloated) startRaw(ctx context.Context, process string) {
	b.post(ctx, "/process.Process/Start", "application/connect+json", jsonEnvelope(`{"process":`+process+`,"stdin":false}`))
}

var bloatAttacks = []struct {
	name    string
	prepare func(b *bloated)
	attack  func(b *bloated, ctx context.Context)
}{
	{"long names in a long PATH", nil, func(b *bloated, ctx context.Context) {
		process := fmt.Sprintf(`{"cmd":%q,"envs":{"PATH":%q}}`, strings.Repeat("c", 60_000), strings.Repeat(":", 131_072))
		atOnce(4, func(int) { b.startRaw(ctx, process) })
		process = fmt.Sprintf(`{"cmd":%q,"envs":{"PATH":%q}}`, strings.Repeat("c", 250), strings.Repeat(":", 131_072))
		atOnce(4, func(int) { b.startRaw(ctx, process) })
	}},
	{"HTTP/2 without a window", nil, func(b *bloated, ctx context.Context) {
		atOnce(100, func(int) { b.openStreams(ctx, 1000) })
	}},
	{"HTTP/1 pipelines that nobody reads", nil, func(b *bloated, ctx context.Context) {
		pipeline := bytes.Repeat([]byte("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"), 2000)
		atOnce(1200, func(int) {
			conn, err := asAttacker(ctx, "tcp", b.addr)
			if err != nil {
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(2 * time.Second))
			conn.Write(pipeline)
			<-ctx.Done()
		})
	}},
	{"archives of hard links", (*bloated).makeLinks, func(b *bloated, ctx context.Context) {
		atOnce(4, func(int) {
			request, _ := http.NewRequestWithContext(ctx, "GET", b.url+"/files?path="+b.dir+"/links", nil)
			request.Header.Set("Accept", "application/x-tar")
			request.Header.Set("X-Access-Token", bloatToken)
			if response, err := b.client.Do(request); err == nil {
				io.Copy(io.Discard, response.Body)
				response.Body.Close()
			}
		})
	}},
	{"a file with much metadata", (*bloated).makeAttributes, func(b *bloated, ctx context.Context) {
		atOnce(8, func(int) {
			b.post(ctx, "/filesystem.Filesystem/Stat", "application/json", strings.NewReader(`{"path":"`+b.dir+`/attributes/f"}`))
			b.post(ctx, "/filesystem.Filesystem/ListDir", "application/json", strings.NewReader(`{"path":"`+b.dir+`/attributes"}`))
		})
	}},
	{"small bodies that unpack to large ones", nil, func(b *bloated, ctx context.Context) {
		var packed bytes.Buffer
		z := gzip.NewWriter(&packed)
		io.WriteString(z, `{"process":{"pid":1},"input":{"stdin":"`)
		z.Write(bytes.Repeat([]byte("QUFB"), 4<<20-64))
		io.WriteString(z, `"}}`)
		z.Close()
		atOnce(100, func(int) {
			b.post(ctx, "/process.Process/SendInput", "application/json", bytes.NewReader(packed.Bytes()), "Content-Encoding", "gzip")
		})
	}},
	{"input that is not taken", nil, func(b *bloated, ctx context.Context) {
		s, err := b.open(b.t, argv("/bin/sleep", "600"), withStdin(true), withHeader("X-Access-Token", bloatToken))
		if err != nil {
			return // the others have all memory just now
		}
		event := s.next()
		pid := event.GetStart().GetPid()
		body := fmt.Sprintf(`{"process":{"pid":%d},"input":{"stdin":"%s"}}`, pid, strings.Repeat("QUFB", 5<<20))
		atOnce(60, func(int) { b.post(ctx, "/process.Process/SendInput", "application/json", strings.NewReader(body)) })
		s.drop()
		b.killAll()
	}},
	{"processes with many variables, and List", nil, func(b *bloated, ctx context.Context) {
		envs := make([]string, 17)
		for i := range envs {
			envs[i] = fmt.Sprintf(`"V%d":%q`, i, strings.Repeat("v", 100_000))
		}
		process := `{"cmd":"/bin/sleep","args":["600"],"envs":{` + strings.Join(envs, ",") + `}}`
		starts, cancel := context.WithTimeout(ctx, 6*time.Second)
		defer cancel()
		atOnce(8, func(int) {
			for range 38 {
				each, cancel := context.WithTimeout(starts, 500*time.Millisecond)
				b.startRaw(each, process)
				cancel()
			}
		})
		atOnce(8, func(int) { b.post(ctx, "/process.Process/List", "application/json", strings.NewReader("{}")) })
		b.killAll()
	}},
	{"long lists to compose", nil, func(b *bloated, ctx context.Context) {
		body := `{"destination":"/nowhere/d","source_paths":["` + strings.Repeat(`a","`, 3_750_000) + `a"]}`
		atOnce(10, func(int) { b.post(ctx, "/files/compose", "application/json", strings.NewReader(body)) })
	}},
	{"watches of many directories", (*bloated).makeDirectories, func(b *bloated, ctx context.Context) {
		atOnce(2, func(int) {
			b.post(ctx, "/filesystem.Filesystem/WatchDir", "application/connect+json",
				jsonEnvelope(`{"path":"`+b.dir+`/directories","recursive":true}`))
		})
	}},
	{"polling watchers without number", nil, func(b *bloated, ctx context.Context) {
		atOnce(16, func(int) {
			for range 250 {
				b.post(ctx, "/filesystem.Filesystem/CreateWatcher", "application/json", strings.NewReader(`{"path":"`+b.dir+`"}`))
			}
		})
	}},
	{"a large directory", (*bloated).makeEntries, func(b *bloated, ctx context.Context) {
		atOnce(4, func(int) {
			b.post(ctx, "/filesystem.Filesystem/ListDir", "application/json", strings.NewReader(`{"path":"`+b.dir+`/entries"}`))
			b.post(ctx, "/filesystem.Filesystem/ListDir", "application/proto",
				bytes.NewReader(append([]byte{0x0a, byte(len(b.dir) + 8)}, b.dir+"/entries"...)))
		})
	}},
	{"connections that hold memory and are closed", nil, func(b *bloated, ctx context.Context) {
		atOnce(60, func(int) {
			conn, err := asAttacker(ctx, "tcp", b.addr)
			if err != nil {
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(2 * time.Second))
			fmt.Fprintf(conn, "POST /process.Process/SendInput HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"+
				"X-Access-Token: %s\r\nContent-Length: 16000000\r\n\r\n", bloatToken)
			conn.Write(bytes.Repeat([]byte("x"), 12_000_000))
		})
	}},
}

// killAll ends what attacks have started.
func (b *bloated) killAll() {
	for _, pid := range descendantsOf(b.pid) {
		if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(comm) == "sleep\n" { // else it is the honest client's
			unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// openStreams asks for /health on each of so many streams of one connection that has no window for answers.
func (b *bloated) openStreams(ctx context.Context, streams int) {
	conn, err := asAttacker(ctx, "tcp", b.addr)
	if err != nil {
		return
	}
	defer conn.Close()
	frame := func(kind, flags byte, stream uint32, payload string) []byte {
		head := []byte{byte(len(payload) >> 16), byte(len(payload) >> 8), byte(len(payload)), kind, flags}
		return append(binary.BigEndian.AppendUint32(head, stream), payload...)
	}
	const settings, headers, endStreamAndHeaders = 4, 1, 5
	out := append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), frame(settings, 0, 0, "\x00\x04\x00\x00\x00\x00")...) // INITIAL_WINDOW_SIZE 0
	out = append(out, frame(settings, 1, 0, "")...)
	// :method GET, :scheme http, :path /health, :authority localhost (RFC 7541, literals without indexing)
	const block = "\x82\x86\x04\x07/health\x01\x09localhost"
	for i := range streams {
		out = append(out, frame(headers, endStreamAndHeaders, uint32(2*i+1), block)...)
	}
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	conn.Write(out)
	<-ctx.Done()
}

// ---- what attackers prepare ----------------------------------------------------------------------------------------

func (b *bloated) makeLinks() {
	part := strings.Repeat("d", 250)
	dir := filepath.Join(b.dir, "links", strings.Repeat(part+"/", 14))
	outside := filepath.Join(b.dir, "outside")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		b.t.Fatal(err)
	}
	os.Mkdir(outside, 0o755)
	here, err := os.Getwd()
	if err != nil {
		b.t.Fatal(err)
	}
	os.Chdir(dir) // its path is longer than a system call takes
	defer os.Chdir(here)
	for i := range 60_000 {
		name := fmt.Sprintf("%s%d", strings.Repeat("n", 200), i)
		if unix.Mknod(name, unix.S_IFREG|0o644, 0) != nil || os.Link(name, filepath.Join(outside, fmt.Sprint(i))) != nil {
			b.t.Fatal("cannot make links")
		}
	}
}

func (b *bloated) makeAttributes() {
	dir := filepath.Join(b.dir, "attributes")
	os.Mkdir(dir, 0o755)
	file := writeFile(b.t, filepath.Join(dir, "f"), "", 0o644)
	value := bytes.Repeat([]byte("v"), 64<<10)
	for i := range 1600 {
		if err := unix.Setxattr(file, fmt.Sprintf("user.e2b.%d", i), value, 0); err != nil {
			b.t.Logf("a file has %d attributes of 64 KiB here: %v", i, err)
			return
		}
	}
}

func (b *bloated) makeDirectories() {
	for i := range 80 {
		for k := range 1000 {
			if err := os.MkdirAll(filepath.Join(b.dir, "directories", fmt.Sprint(i), fmt.Sprint(k)), 0o755); err != nil {
				b.t.Fatal(err)
			}
		}
	}
}

func (b *bloated) makeEntries() {
	dir := filepath.Join(b.dir, "entries")
	os.Mkdir(dir, 0o755)
	for i := range 150_000 {
		if err := unix.Mknod(filepath.Join(dir, fmt.Sprint("entry-", i)), unix.S_IFREG|0o644, 0); err != nil {
			b.t.Fatal(err)
		}
	}
}

// ---- the honest client ---------------------------------------------------------------------------------------------

// honest is what a client with the token sees meanwhile.
type honest struct {
	mu             sync.Mutex
	asked          int
	failures       []string
	health, starts []time.Duration
}

func (h *honest) note(took *[]time.Duration, began time.Time, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked++
	*took = append(*took, time.Since(began))
	if err != nil {
		h.failures = append(h.failures, fmt.Sprintf("after %v: %v", time.Since(began).Round(time.Millisecond), err))
	}
}

// enough tells whether there is something to judge by.
func (h *honest) enough() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.health) >= 10 && len(h.starts) >= 10
}

func (b *bloated) healthOnce() error {
	response, err := b.http.Get(b.url + "/health")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("/health: %s: %s", response.Status, body)
	}
	return err
}

func (b *bloated) startOnce(ctx context.Context, client pb.ProcessClient) error {
	request := connect.NewRequest(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/true"}, Stdin: new(bool)})
	request.Header().Set("X-Access-Token", bloatToken)
	stream, err := client.Start(ctx, request)
	if err != nil {
		return err
	}
	defer stream.Close()
	ended := false
	for stream.Receive() {
		ended = ended || stream.Msg().GetEvent().GetEnd().GetExited()
	}
	if err := stream.Err(); err != nil || !ended {
		return fmt.Errorf("a start of /bin/true: ended %v, %w", ended, err)
	}
	return nil
}

// goOn asks again and again until stop is closed.
func (b *bloated) goOn(h *honest, stop <-chan struct{}) {
	client := b.process()
	every := func(interval time.Duration, took *[]time.Duration, do func() error) func() {
		return func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(interval):
					began := time.Now()
					h.note(took, began, do())
				}
			}
		}
	}
	var both sync.WaitGroup
	both.Go(every(20*time.Millisecond, &h.health, b.healthOnce))
	both.Go(every(50*time.Millisecond, &h.starts, func() error { return b.startOnce(context.Background(), client) }))
	both.Wait()
}

// under runs an attack for so long beside the honest client and looks at what it did.
func (b *bloated) under(t *testing.T, duration time.Duration, attack func(ctx context.Context)) {
	os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", b.pid), []byte("5"), 0) // the peak begins anew: proc_pid_clear_refs(5)
	h, stop, stopped := &honest{}, make(chan struct{}), make(chan struct{})
	go func() {
		b.goOn(h, stop)
		close(stopped)
	}()
	ctx, cancel := context.WithTimeout(t.Context(), duration)
	attack(ctx)
	cancel()
	waitFor(t, 20*time.Second, "the honest client was served", h.enough)
	peak := b.peakRSS()
	close(stop)
	<-stopped
	b.client.CloseIdleConnections()
	began := time.Now()
	rest := func() int64 { return bloatRest + threadRest*int64(max(b.threads()-20, 0)) } // watchers that end take some
	for b.rss() > rest() && time.Since(began) < 30*time.Second {
		time.Sleep(100 * time.Millisecond)
	}
	back := time.Since(began)
	slices.Sort(h.health)
	slices.Sort(h.starts)
	t.Logf("peak %.0f MiB, %.1f MiB after %.1f s; %d requests of the honest client, %d failed; worst /health %v, Start %v",
		float64(peak)/(1<<20), float64(b.rss())/(1<<20), back.Seconds(), h.asked, len(h.failures),
		h.health[len(h.health)-1].Round(time.Millisecond), h.starts[len(h.starts)-1].Round(time.Millisecond))
	if len(h.failures) > 0 {
		t.Errorf("%d requests of the honest client failed, the first %s", len(h.failures), h.failures[0])
	}
	if raceEnabled() {
		return
	}
	if peak > bloatLimit+bloatSlack {
		t.Errorf("peak RSS %d MiB, want at most %d", peak>>20, (bloatLimit+bloatSlack)>>20)
	}
	if b.rss() > rest() {
		t.Errorf("%d MiB are held 30 s after, want at most %d: %s anonymous, %s of files, %d threads, %d descriptors", b.rss()>>20, rest()>>20,
			statusField(b.pid, "RssAnon:"), statusField(b.pid, "RssFile:"), b.threads(), len(b.fds()))
	}
}

func TestBloat(t *testing.T) {
	needRoot(t)
	dir, err := os.MkdirTemp("/dev/shm", "envd-test-")
	if err != nil {
		t.Skip("needs tmpfs: " + err.Error())
	}
	b := &bloated{t: t, dir: dir, daemon: startDaemon(t, "--memory-limit", "64MiB", "--watcher-idle", "3s")}
	b.client = &http.Client{Transport: &http.Transport{DialContext: asAttacker, MaxIdleConnsPerHost: 10}}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if got := b.request(t, "POST", "/init", `{"accessToken":"`+bloatToken+`"}`); got.status != http.StatusNoContent {
		t.Fatalf("/init: %d %s", got.status, got.body)
	}
	for _, a := range bloatAttacks {
		if a.prepare != nil {
			a.prepare(b)
		}
	}
	for _, a := range bloatAttacks {
		t.Run(a.name, func(t *testing.T) {
			b.under(t, 8*time.Second, func(ctx context.Context) { a.attack(b, ctx) })
		})
	}
	t.Run("all at once", func(t *testing.T) {
		duration := *bloatTime
		if duration == 0 {
			duration = 15 * time.Second
		}
		b.under(t, duration, func(ctx context.Context) {
			atOnce(len(bloatAttacks), func(i int) {
				for ctx.Err() == nil {
					bloatAttacks[i].attack(b, ctx)
				}
			})
		})
	})
}
