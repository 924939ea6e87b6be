// Everything at once, for as long as one likes: `go test -run TestSoak -v -timeout 0 . -soak 30m`. Commands, streams that break and come back,
// terminals, uploads and downloads, archives, watches, forwarded ports, metrics, kills, freezes and snapshots go on side by side on one
// daemon. What each of them gets is compared, byte by byte; at the end it is counted what is left: there must be nothing.

package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

var soakTime = flag.Duration("soak", 0, "how `long` TestSoak runs (default 20s; 2m with CI=true)")

// soak is one run, with what all its jobs share.
type soak struct {
	*daemon
	t           *testing.T
	guest, host *netns
	dir         string
	calls       sync.RWMutex // read-held during what a snapshot must not cut; held while one is made
	jobs        map[string]*atomic.Int64
	compared    atomic.Int64 // bytes
	cuts        atomic.Int64 // streams that were broken, and came back
	kept        atomic.Int64 // files that a broken upload left as they were
}

// safely runs what no snapshot may cut.
func (s *soak) safely(do func()) {
	s.calls.RLock()
	defer s.calls.RUnlock()
	do()
}

func (s *soak) errorf(format string, args ...any) { s.t.Errorf(format, args...) }

// soakJob is done over and over by one goroutine, which has a name of its own.
type soakJob struct {
	name  string
	hands int           // how many do it at once
	pause time.Duration // between two
	do    func(s *soak, name string, choose *rand.Rand)
}

var soakJobs = []soakJob{
	{"commands", 3, 0, (*soak).command},
	{"streams with resets", 2, 0, (*soak).resets},
	{"terminals", 1, 0, (*soak).terminal},
	{"files", 2, 5 * time.Millisecond, (*soak).files},
	{"broken uploads", 1, 20 * time.Millisecond, (*soak).brokenUpload},
	{"archives", 1, 100 * time.Millisecond, (*soak).archive},
	{"polling watchers", 1, 20 * time.Millisecond, (*soak).poll},
	{"watch streams", 1, 20 * time.Millisecond, (*soak).watch},
	{"forwarded ports", 1, 50 * time.Millisecond, (*soak).port},
	{"metrics and lists", 1, 50 * time.Millisecond, (*soak).look},
	{"dropped clients", 1, 20 * time.Millisecond, (*soak).drop},
	{"killed trees", 1, 50 * time.Millisecond, (*soak).tree},
	{"freezes", 1, time.Second, (*soak).freeze},
}

func (s *soak) text(choose *rand.Rand, most int) []byte {
	return pattern(choose.Uint64(), 1+choose.IntN(most)>>choose.IntN(8))
}

func (s *soak) same(what string, got, want []byte) {
	s.compared.Add(int64(len(got)))
	if !bytes.Equal(got, want) {
		s.errorf("%s: %d bytes, want %d; SHA-256 %x, want %x", what, len(got), len(want), sha256.Sum256(got), sha256.Sum256(want))
	}
}

// run starts something, reads it to its end and compares. The tag, which the next one takes over, keeps ended ones from adding up.
func (s *soak) run(what string, words []string, status string, options ...callOption) (r runResult) {
	stream, err := s.open(s.t, words, append(options, withTag(what))...)
	if err != nil {
		s.errorf("%s: %v", what, err)
		return
	}
	if r = stream.collect(); r.err != nil || r.ends != 1 || status != "" && r.end.GetStatus() != status {
		s.errorf("%s: %v, %d ends: %v, want %s", what, r.err, r.ends, r.end, status)
	}
	return r
}

func (s *soak) command(name string, choose *rand.Rand) {
	s.safely(func() {
		switch choose.IntN(5) {
		case 0:
			s.run(name, argv("no-such-command"), "exit status 127")
		case 1:
			code := choose.IntN(256)
			s.run(name, sh(fmt.Sprintf("exit %d", code)), fmt.Sprintf("exit status %d", code), withStdin(false))
		case 2:
			s.run(name, sh("kill -9 $$"), "signal: killed", withExtensions())
		default:
			word := fmt.Sprint(choose.Uint64())
			r := s.run(name, argv("/bin/echo", word), "exit status 0")
			s.same(name, r.stdout, []byte(word+"\n"))
		}
	})
}

// dialed is a client with one connection, which is reset when it has read a number of bytes.
func (s *soak) dialed(protocol string, after int64) (pb.ProcessClient, func()) {
	return wire{protocol: protocol, receiveBuffer: 32 << 10}.client(s.daemon, after, resetConn)
}

// resets follows two streams of output through one reset after the other.
func (s *soak) resets(name string, choose *rand.Rand) {
	seed, total := uint64(choose.Uint32()), 1+choose.Int64N(2<<20)
	output := newSplitOutput(seed)
	follow := func(stream *clientStream) (ended bool) {
		defer stream.drop()
		for event := stream.next(); event != nil; event = stream.next() {
			if event.GetData() != nil {
				output.add(event.GetData())
			}
			if end := event.GetEnd(); end != nil {
				if end.GetStatus() != "exit status 0" {
					s.errorf("%s: %v", name, end)
				}
				return true
			}
		}
		s.cuts.Add(1)
		return false
	}
	var stream *clientStream
	var err error
	client, closeAll := s.dialed("connect", 4096+choose.Int64N(total))
	s.safely(func() {
		if stream, err = s.open(s.t, argv(helperBinary(s.t), "random-output", fmt.Sprint(seed), fmt.Sprint(total)), withTag(name), withClient(client)); err == nil {
			err = startOf(stream)
		}
	})
	if err != nil {
		s.errorf("%s: Start: %v", name, err)
		return
	}
	ended := follow(stream)
	closeAll()
	for tries := 0; !ended && output.wrong == "" && tries < 1000; tries++ {
		after := int64(unmetered)
		if choose.IntN(3) > 0 {
			after = 1 + choose.Int64N(total)
		}
		client, closeAll := s.dialed([]string{"connect", "json", "grpc", "grpcweb"}[choose.IntN(4)], after)
		if stream, err = s.openConnect(s.t, byTag(name), withOutputFrom(fmt.Sprint(output.received)), withClient(client)); err == nil {
			if header := stream.header; header.Get("Envd-Output-Offset") != "" {
				wantOffset(s.t, header, output.received, 0)
			}
			ended = follow(stream)
			err = stream.failure()
		}
		closeAll()
		if code := connect.CodeOf(err); err != nil && (code == connect.CodeNotFound || code == connect.CodeInvalidArgument) {
			s.errorf("%s: resuming at %d: %v", name, output.received, err)
			return
		}
	}
	output.check(s.t, seed, total)
	s.compared.Add(output.received)
}

// startOf reads the start event, which must be the first.
func startOf(stream *clientStream) error {
	event := stream.next()
	if event.GetStart() == nil {
		return errors.Join(fmt.Errorf("the first event is %v", event), stream.failure())
	}
	stream.pid = event.GetStart().GetPid()
	return nil
}

func (s *soak) terminal(name string, choose *rand.Rand) {
	s.safely(func() {
		stream, err := s.open(s.t, sh("stty raw -echo; echo ready; cat"), withPTY(80, 24), withTag(name))
		if err == nil {
			err = startOf(stream)
		}
		if err != nil {
			s.errorf("%s: %v", name, err)
			return
		}
		defer stream.drop()
		want := []byte("ready\n")
		var got []byte
		for round := range 4 {
			for len(got) < len(want) {
				event := stream.next()
				if event == nil {
					s.errorf("%s: the stream ended: %v", name, stream.failure())
					return
				}
				got = append(got, event.GetData().GetPty()...)
			}
			text := s.text(choose, 20_000)
			if round < 3 {
				want = append(want, text...)
				if err := s.sendPTY(s.t, byTag(name), string(text)); err != nil {
					s.errorf("%s: %v", name, err)
				}
			}
			_, err := s.process().Update(s.t.Context(), connect.NewRequest(&pb.UpdateRequest{Process: byTag(name),
				Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: uint32(1 + choose.IntN(300)), Rows: 5}}}))
			if err != nil {
				s.errorf("%s: Update: %v", name, err)
			}
		}
		s.same(name, got, want)
		if err := s.signal(s.t, byTag(name), pb.Signal_SIGNAL_SIGTERM); err != nil {
			s.errorf("%s: SIGTERM: %v", name, err)
		}
		if r := stream.collect(); r.err != nil || r.end.GetStatus() != "signal: terminated" {
			s.errorf("%s: %v, %v", name, r.end, r.err)
		}
	})
}

// files are uploaded in each way and size, downloaded, whole, in part and compressed, and removed.
func (s *soak) files(name string, choose *rand.Rand) {
	path := filepath.Join(s.dir, name, fmt.Sprint(choose.IntN(5)), "file")
	text := s.text(choose, 3<<20)
	s.safely(func() {
		var got httpReply
		if choose.IntN(2) == 0 {
			got = s.upload(s.t, filesPath("path", path), string(text), "X-Metadata-Purpose", "soak")
		} else {
			got = s.uploadForm(s.t, filesPath("path", path), formPart{"file", "x", string(text)})
		}
		if got.status != http.StatusOK {
			s.errorf("%s: upload: %d %s", name, got.status, got.body)
		}
		got = s.request(s.t, "GET", filesPath("path", path), "")
		s.same(name, []byte(got.body), text)
		from := choose.IntN(len(text))
		got = s.request(s.t, "GET", filesPath("path", path), "", "Range", fmt.Sprintf("bytes=%d-", from))
		s.same(name+" in part", []byte(got.body), text[from:])
		if choose.IntN(3) == 0 {
			if _, err := s.filesystem().Remove(s.t.Context(), connect.NewRequest(&pb.RemoveRequest{Path: filepath.Dir(path)})); err != nil {
				s.errorf("%s: Remove: %v", name, err)
			}
		}
	})
}

// brokenUpload ends before its body does: the file is what it was.
func (s *soak) brokenUpload(name string, choose *rand.Rand) {
	path := filepath.Join(s.dir, name, "file")
	old, part := s.text(choose, 100_000), s.text(choose, 3<<20)
	s.safely(func() {
		if got := s.upload(s.t, filesPath("path", path), string(old)); got.status != http.StatusOK {
			s.errorf("%s: %d %s", name, got.status, got.body)
		}
		body, feed := io.Pipe()
		request, _ := http.NewRequestWithContext(s.t.Context(), "POST", s.url+filesPath("path", path), body)
		request.Header.Set("Content-Type", "application/octet-stream")
		go func() {
			feed.Write(part)
			feed.CloseWithError(errors.New("broken by the test"))
		}()
		if response, err := s.http.Do(request); err == nil {
			response.Body.Close()
			s.errorf("%s: answered %s", name, response.Status)
		}
		got := s.request(s.t, "GET", filesPath("path", path), "")
		s.same(name, []byte(got.body), old)
		s.kept.Add(1)
	})
}

// archive sends a directory out as tar and back to another place.
func (s *soak) archive(name string, choose *rand.Rand) {
	from, to := filepath.Join(s.dir, name+" from"), filepath.Join(s.dir, name+" to")
	files := map[string][]byte{}
	for i := range 5 {
		files[fmt.Sprintf("d%d/f", i)] = s.text(choose, 200_000)
	}
	s.safely(func() {
		for path, text := range files {
			if got := s.upload(s.t, filesPath("path", filepath.Join(from, path)), string(text)); got.status != http.StatusOK {
				s.errorf("%s: %d %s", name, got.status, got.body)
			}
		}
		tar := s.request(s.t, "GET", filesPath("path", from), "", "Accept", "application/x-tar")
		if got := s.request(s.t, "POST", filesPath("path", to), tar.body, "Content-Type", "application/x-tar"); got.status != http.StatusOK {
			s.errorf("%s: %d %s", name, got.status, got.body)
		}
		for path, text := range files {
			got, _ := os.ReadFile(filepath.Join(to, path))
			s.same(name, got, text)
		}
		for _, dir := range []string{from, to} {
			if _, err := s.filesystem().Remove(s.t.Context(), connect.NewRequest(&pb.RemoveRequest{Path: dir})); err != nil {
				s.errorf("%s: Remove: %v", name, err)
			}
		}
	})
}

func (s *soak) poll(name string, choose *rand.Rand) {
	dir := filepath.Join(s.dir, name)
	os.MkdirAll(dir, 0o755)
	client, ctx := s.filesystem(), s.t.Context()
	s.safely(func() {
		watcher, err := client.CreateWatcher(ctx, connect.NewRequest(&pb.CreateWatcherRequest{Path: dir, Recursive: choose.IntN(2) == 0}))
		if err != nil {
			s.errorf("%s: %v", name, err)
			return
		}
		id, want, got := watcher.Msg.GetWatcherId(), 1+choose.IntN(20), 0
		for i := range want {
			os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o644)
		}
		for begun := time.Now(); got < want && time.Since(begun) < 20*time.Second; time.Sleep(time.Millisecond) {
			events, err := client.GetWatcherEvents(ctx, connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: id}))
			if err != nil {
				s.errorf("%s: %v", name, err)
				break
			}
			for _, event := range events.Msg.GetEvents() {
				if event.GetType() == pb.EventType_EVENT_TYPE_CREATE {
					got++
				}
			}
		}
		if got != want {
			s.errorf("%s: told of %d new files, want %d", name, got, want)
		}
		if _, err := client.RemoveWatcher(ctx, connect.NewRequest(&pb.RemoveWatcherRequest{WatcherId: id})); err != nil {
			s.errorf("%s: %v", name, err)
		}
	})
	os.RemoveAll(dir)
}

func (s *soak) watch(name string, choose *rand.Rand) {
	dir := filepath.Join(s.dir, name)
	os.MkdirAll(dir, 0o755)
	defer os.RemoveAll(dir)
	s.safely(func() {
		ctx, cancel := context.WithTimeout(s.t.Context(), 30*time.Second)
		defer cancel()
		// A timeout of the context's would be sent; the daemon ends the stream then all the same.
		stream, err := s.filesystem().WatchDir(ctx, connect.NewRequest(&pb.WatchDirRequest{Path: dir}))
		if err != nil || !stream.Receive() {
			s.errorf("%s: %v", name, err)
			return
		}
		defer stream.Close()
		defer cancel() // before Close, which reads to the end
		os.WriteFile(filepath.Join(dir, "new"), nil, 0o644)
		for stream.Receive() {
			if stream.Msg().GetFilesystem().GetName() == "new" {
				return
			}
		}
		s.errorf("%s: %v", name, stream.Err())
	})
}

// port has a server listen on the guest's loopback, and talks to it from the host.
func (s *soak) port(name string, choose *rand.Rand) {
	var listener net.Listener
	var err error
	s.guest.do(func() { listener, err = net.Listen("tcp", "127.0.0.1:0") })
	if err != nil {
		s.errorf("%s: %v", name, err)
		return
	}
	defer listener.Close()
	go func() { // an echo
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				io.Copy(conn, conn)
			}()
		}
	}()
	text := s.text(choose, 1<<20)
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		done := false
		s.safely(func() {
			conn, err := s.host.dial(s.t.Context(), "tcp", fmt.Sprintf("%s:%d", guestAddress, listener.Addr().(*net.TCPAddr).Port))
			if err != nil {
				return
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(20 * time.Second))
			go func() {
				conn.Write(text)
				conn.(*net.TCPConn).CloseWrite()
			}()
			got, _ := io.ReadAll(conn)
			s.same(name, got, text)
			done = true
		})
		if done {
			return
		}
		if time.Since(begun) > 20*time.Second {
			s.errorf("%s: not forwarded within 20 s", name)
			return
		}
	}
}

func (s *soak) look(name string, _ *rand.Rand) {
	s.safely(func() {
		if got := s.request(s.t, "GET", "/metrics", ""); got.status != http.StatusOK || !strings.Contains(got.body, `"mem_used"`) {
			s.errorf("%s: %d %s", name, got.status, got.body)
		}
		if got := s.request(s.t, "GET", "/metrics", "", "Accept", "text/plain"); !strings.Contains(got.body, "\nenvd_processes_running ") {
			s.errorf("%s: %d %s", name, got.status, got.body)
		}
		s.list(s.t)
		res, err := s.filesystem().ListDir(s.t.Context(), connect.NewRequest(&pb.ListDirRequest{Path: s.dir}))
		if err != nil || len(res.Msg.GetEntries()) == 0 {
			s.errorf("%s: ListDir: %v", name, err)
		}
	})
}

// drop leaves a process that never stops writing, and comes back to kill it.
func (s *soak) drop(name string, choose *rand.Rand) {
	client, closeAll := s.dialed([]string{"connect", "json", "grpcweb"}[choose.IntN(3)], 4096+choose.Int64N(300_000))
	defer closeAll()
	s.safely(func() {
		stream, err := s.open(s.t, argv("/usr/bin/yes"), withTag(name), withClient(client))
		if err == nil {
			err = startOf(stream)
		}
		if err != nil {
			s.errorf("%s: %v", name, err)
			return
		}
		if r := stream.collect(); r.ends > 0 || r.err == nil {
			s.errorf("%s: %v", name, r.end)
		}
		if err := s.signal(s.t, byTag(name), pb.Signal_SIGNAL_SIGKILL); err != nil {
			s.errorf("%s: %v", name, err)
		}
		stream, err = s.openConnect(s.t, byTag(name), withOutputFrom("new"))
		if err != nil {
			s.errorf("%s: %v", name, err)
			return
		}
		if r := stream.collect(); r.ends != 1 || r.end.GetStatus() != "signal: killed" {
			s.errorf("%s: %v, %v", name, r.end, r.err)
		}
	})
}

// tree kills a process with children of its own; none is left.
func (s *soak) tree(name string, _ *rand.Rand) {
	if s.cgroup == "" {
		return // sessions of their own would be left
	}
	s.safely(func() {
		stream, err := s.open(s.t, sh(treeScript), withTag(name))
		if err == nil {
			err = startOf(stream)
		}
		if err != nil {
			s.errorf("%s: %v", name, err)
			return
		}
		defer stream.drop()
		var out []byte
		for bytes.Count(out, []byte("\n")) < 5 {
			event := stream.next()
			if event == nil {
				s.errorf("%s: %v", name, stream.failure())
				return
			}
			out = append(out, event.GetData().GetStdout()...)
		}
		if err := s.signal(s.t, byTag(name), pb.Signal_SIGNAL_SIGKILL); err != nil {
			s.errorf("%s: %v", name, err)
		}
		if r := stream.collect(); r.end.GetStatus() != "signal: killed" {
			s.errorf("%s: %v, %v", name, r.end, r.err)
		}
		var pids []int
		for line := range strings.Lines(string(out)) {
			_, pid, _ := strings.Cut(strings.TrimSpace(line), " ")
			pids = append(pids, atoi(s.t, pid))
		}
		waitGone(s.t, 10*time.Second, pids...)
	})
}

func (s *soak) freeze(name string, choose *rand.Rand) {
	if s.cgroup == "" {
		return
	}
	s.safely(func() {
		for _, path := range []string{"/freeze?maxWaitMs=20", "/unfreeze"} {
			if got := s.request(s.t, "POST", path, ""); got.status >= 300 {
				s.errorf("%s: %d %s", path, got.status, got.body)
			}
			time.Sleep(time.Duration(choose.IntN(20)) * time.Millisecond)
		}
	})
}

// snapshot is prepared and resumed at once; it tells how much memory was left in between.
func (s *soak) snapshot() (rss int64) {
	s.calls.Lock()
	defer s.calls.Unlock()
	s.prepare(s.t)
	rss = s.rss()
	s.healthy(s.t)
	return rss
}

// leftovers are what can leak, counted.
type leftovers struct {
	descriptors, threads, leaves, watches, mounts, hidden, zombies, children int
}

func (s *soak) count() (n leftovers) {
	n = leftovers{descriptors: len(s.ownDescriptors()), threads: s.threads(), zombies: len(s.zombies())}
	if s.cgroup != "" {
		n.leaves = s.leaves()
	}
	infos, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fdinfo/*", s.pid))
	for _, info := range infos {
		text, _ := os.ReadFile(info)
		n.watches += bytes.Count(text, []byte("inotify wd:"))
	}
	mounts, _ := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", s.pid))
	n.mounts = bytes.Count(mounts, []byte("\n"))
	filepath.WalkDir(s.dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(entry.Name(), ".") {
			n.hidden++
		}
		return nil
	})
	n.children = len(descendantsOf(s.pid))
	return n
}

func TestSoak(t *testing.T) {
	length := *soakTime
	if length == 0 {
		length = 20 * time.Second
		if os.Getenv("CI") == "true" {
			length = 2 * time.Minute
		}
	}
	guest, host := newGuest(t)
	config := daemonConfig{netns: guest, args: []string{noSync, "--output-resume=1048576"}} // which is full soon; the clients' buffers are small
	s := &soak{daemon: startDaemonWith(t, config), t: t, guest: guest, host: host, dir: publicDir(t), jobs: map[string]*atomic.Int64{"snapshots": {}}}
	// A connection of before a snapshot may be reset while the client takes it for idle.
	s.http = &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: s.dial}}
	for i, job := range soakJobs { // each once, so that what is made at the first use is there
		s.jobs[job.name] = &atomic.Int64{}
		job.do(s, job.name+" 0", rand.New(rand.NewPCG(uint64(i), 0)))
	}
	s.snapshot()
	waitFor(t, 20*time.Second, "nothing runs", func() bool { n := s.count(); return n.children == 0 && n.watches == 0 })
	before := s.count()

	ctx, stop := context.WithCancel(t.Context())
	var hands sync.WaitGroup
	for i, job := range soakJobs {
		for hand := range job.hands {
			hands.Go(func() {
				choose := rand.New(rand.NewPCG(uint64(i), uint64(1+hand)))
				for ctx.Err() == nil && !t.Failed() {
					job.do(s, fmt.Sprintf("%s %d", job.name, hand), choose)
					s.jobs[job.name].Add(1)
					time.Sleep(job.pause)
				}
			})
		}
	}
	var steadies []*steady
	for seed, client := range slices.Collect(maps.Values(s.clients())) {
		steadies = append(steadies, s.startSteady(t, uint64(seed), client))
	}
	var early, late []int64 // memory after the preparation of a snapshot
	var peak int
	begun := time.Now()
	for time.Since(begun) < length && !t.Failed() {
		rss := s.snapshot()
		switch spent := time.Since(begun); {
		case spent > length*2/5 && spent < length*3/5:
			early = append(early, rss)
		case spent > length*4/5:
			late = append(late, rss)
		}
		peak = max(peak, s.threads())
		s.jobs["snapshots"].Add(1)
		time.Sleep(300 * time.Millisecond)
	}
	stop()
	hands.Wait()
	for _, one := range steadies {
		one.finish(t, s.daemon)
		s.cuts.Add(one.cuts.Load())
		s.compared.Add(one.received.Load())
	}
	took := time.Since(begun)
	var done []string
	for _, name := range slices.Sorted(maps.Keys(s.jobs)) {
		done = append(done, fmt.Sprintf("%d %s", s.jobs[name].Load(), name))
	}
	t.Logf("%v: %s", took.Round(time.Second), strings.Join(done, ", "))
	t.Logf("%d bytes compared, none lost; %d streams broken and resumed; %d broken uploads left the file as it was", s.compared.Load(),
		s.cuts.Load(), s.kept.Load())
	if t.Failed() {
		return
	}

	// Everything has ended: what is there now is what was there before.
	s.snapshot()
	var after leftovers
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if after = s.count(); after.descriptors <= before.descriptors && after.watches == 0 && after.zombies == 0 && after.children == 0 {
			break
		}
	}
	text := s.request(t, "GET", "/metrics", "", "Accept", "text/plain").body
	for _, line := range []string{"envd_processes_running 0", "envd_streams_open 0"} {
		if !strings.Contains(text, "\n"+line+"\n") {
			t.Errorf("not in the metrics: %s", line)
		}
	}
	t.Logf("before %+v", before)
	t.Logf("after  %+v, at most %d threads", after, peak)
	if after.descriptors > before.descriptors || after.watches+after.zombies+after.children+after.hidden > 0 || after.mounts != before.mounts {
		t.Errorf("left over: %+v, before %+v; open are\n%q", after, before, s.fds())
	}
	if after.leaves > 2*16 {
		t.Errorf("%d cgroup leaves, want at most 16 in the pool of each group", after.leaves)
	}
	if after.threads > 64 || peak > 128 {
		t.Errorf("%d threads, %d at once", after.threads, peak)
	}
	if len(early) > 0 && len(late) > 0 {
		growth := slices.Min(late) - slices.Min(early)
		t.Logf("RSS after prepare: %d KiB at first, %d KiB at last", slices.Min(early)>>10, slices.Min(late)>>10)
		if growth > 3<<20 && !raceEnabled() {
			t.Errorf("RSS grew by %d KiB", growth>>10)
		}
	}
	waitFor(t, 20*time.Second, "the daemon at rest", func() bool {
		tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", s.pid))
		return len(s.ownDescriptors()) <= before.descriptors && !slices.ContainsFunc(tasks, func(task string) bool {
			state, _ := processState(atoi(t, filepath.Base(task)))
			return state != 'S' // it may be about to end a goroutine
		})
	})
	used, stacks := s.goroutines(t)
	fresh := startDaemonWith(t, config)
	fresh.output(t, argv("true"))
	fresh.output(t, argv("true"), withPTY(80, 24))
	fresh.prepare(t)
	fresh.healthy(t)
	unused, _ := fresh.goroutines(t)
	t.Logf("%d goroutines, a fresh daemon has %d", used, unused)
	if used > unused {
		t.Errorf("%d goroutines, a fresh daemon has %d:\n%s", used, unused, stacks)
	}
}
