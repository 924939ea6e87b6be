// Promise P1: no byte of output is lost silently. Connections are reset at random places and resumed by offset, readers
// stall, slow and stale subscribers share a process with quick ones, and a few hundred random histories are compared
// with a model in which each byte is a function of its offset.

package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

func init() {
	testRoles["random-output"] = writeRandomOutput
	testRoles["pattern"] = writePattern
}

// ---- output that the reader can compute -----------------------------------------------------------------------------

func randomBytes(seed uint64, stream byte) *rand.ChaCha8 {
	return rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24), stream})
}

// splitRandomly gives total bytes away in random pieces: to stdout (1) or stderr (2).
func splitRandomly(seed uint64, total int64, write func(stream byte, n int)) {
	choose := rand.New(rand.NewPCG(seed, 7))
	for total > 0 {
		n := min(1+choose.Int64N(64<<10), total)
		write(byte(1+choose.IntN(2)), int(n))
		total -= n
	}
}

// writeRandomOutput is a role: SEED and TOTAL name what it writes to stdout and stderr.
func writeRandomOutput(args []string) {
	seed, _ := strconv.ParseUint(args[0], 10, 64)
	total, _ := strconv.ParseInt(args[1], 10, 64)
	files := map[byte]*os.File{1: os.Stdout, 2: os.Stderr}
	sources := map[byte]*rand.ChaCha8{1: randomBytes(seed, 1), 2: randomBytes(seed, 2)}
	buf := make([]byte, 64<<10)
	splitRandomly(seed, total, func(stream byte, n int) {
		sources[stream].Read(buf[:n])
		if _, err := files[stream].Write(buf[:n]); err != nil {
			os.Exit(1)
		}
	})
}

// pattern is the one stream of a seed, from offset 0 to n.
func pattern(seed uint64, n int) []byte {
	data := make([]byte, n)
	randomBytes(seed, 0).Read(data)
	return data
}

// writePattern is a role: it waits for a line on stdin, writes pattern(SEED, N) to stdout, creates the file DONE and
// waits for the end of stdin.
func writePattern(args []string) {
	seed, _ := strconv.ParseUint(args[0], 10, 64)
	n, _ := strconv.Atoi(args[1])
	one := make([]byte, 1)
	os.Stdin.Read(one)
	os.Stdout.Write(pattern(seed, n))
	os.WriteFile(args[2], nil, 0o644)
	for {
		if n, _ := os.Stdin.Read(one); n == 0 {
			return
		}
	}
}

// splitOutput counts and hashes what a client received, and compares each byte with what was written.
type splitOutput struct {
	received       int64
	sums           map[byte]hash.Hash
	expected       map[byte]*rand.ChaCha8
	wrong          string // the first difference
	scratch        []byte
	perStreamBytes map[byte]int64
}

func newSplitOutput(seed uint64) *splitOutput {
	return &splitOutput{
		sums:           map[byte]hash.Hash{1: sha256.New(), 2: sha256.New()},
		expected:       map[byte]*rand.ChaCha8{1: randomBytes(seed, 1), 2: randomBytes(seed, 2)},
		perStreamBytes: map[byte]int64{},
	}
}

func (o *splitOutput) add(data *pb.ProcessEvent_DataEvent) {
	for stream, piece := range map[byte][]byte{1: data.GetStdout(), 2: data.GetStderr()} {
		o.scratch = slices.Grow(o.scratch[:0], len(piece))[:len(piece)]
		o.expected[stream].Read(o.scratch)
		if o.wrong == "" && !bytes.Equal(piece, o.scratch) {
			o.wrong = fmt.Sprintf("stream %d differs within the %d bytes behind its offset %d (offset %d of the log)",
				stream, len(piece), o.perStreamBytes[stream], o.received)
		}
		o.sums[stream].Write(piece)
		o.received += int64(len(piece))
		o.perStreamBytes[stream] += int64(len(piece))
	}
}

// check compares the SHA-256 of both streams with those of what the generator computes.
func (o *splitOutput) check(t *testing.T, seed uint64, total int64) {
	t.Helper()
	sums := map[byte]hash.Hash{1: sha256.New(), 2: sha256.New()}
	sources := map[byte]*rand.ChaCha8{1: randomBytes(seed, 1), 2: randomBytes(seed, 2)}
	buf := make([]byte, 64<<10)
	splitRandomly(seed, total, func(stream byte, n int) {
		sources[stream].Read(buf[:n])
		sums[stream].Write(buf[:n])
	})
	if o.received != total {
		t.Errorf("%d bytes arrived, want %d", o.received, total)
	}
	for stream, sum := range sums {
		if got, want := o.sums[stream].Sum(nil), sum.Sum(nil); !bytes.Equal(got, want) {
			t.Errorf("SHA-256 of stream %d is %x, want %x", stream, got, want)
		}
	}
	if o.wrong != "" {
		t.Error(o.wrong)
	}
}

// ---- connections that break or stall ------------------------------------------------------------------------------

// meteredConn lets the client read `left` bytes from the socket and then asks what to do: an error ends the connection,
// a number is how many more bytes to let through.
type meteredConn struct {
	net.Conn
	left int64
	then func(net.Conn) (more int64, err error)
}

func (c *meteredConn) Read(p []byte) (int, error) {
	if c.left == 0 {
		more, err := c.then(c.Conn)
		if err != nil {
			return 0, err
		}
		c.left = more
	}
	n, err := c.Conn.Read(p[:min(int64(len(p)), c.left)])
	c.left -= int64(n)
	return n, err
}

const unmetered = math.MaxInt64

// resetConn makes the kernel send RST.
func resetConn(conn net.Conn) (int64, error) {
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
	return 0, errors.New("reset by the test")
}

// wire is how a client talks to the daemon in one of these tests.
type wire struct {
	protocol      string // connect, json, grpc, grpcweb
	receiveBuffer int    // SO_RCVBUF, which the kernel doubles; 0: its default
}

// client makes one with a connection of its own, on which `then` runs when `after` bytes have been read.
func (w wire) client(d *daemon, after int64, then func(net.Conn) (int64, error)) (_ pb.ProcessClient, closeAll func()) {
	dialer := &net.Dialer{}
	dial := dialer.DialContext
	if d.netns != nil {
		dial = d.netns.dialWith(dialer)
	}
	if w.receiveBuffer > 0 {
		dialer.Control = func(_, _ string, raw syscall.RawConn) error {
			return raw.Control(func(fd uintptr) {
				if syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUFFORCE, w.receiveBuffer) != nil {
					syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, w.receiveBuffer)
				}
			})
		}
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &meteredConn{Conn: conn, left: after, then: then}, nil
	}}
	options := []connect.ClientOption{connect.WithAcceptCompression("gzip", nil, nil)} // random bytes do not shrink
	switch w.protocol {
	case "json":
		options = append(options, connect.WithProtoJSON())
	case "grpc":
		options = append(options, connect.WithGRPC())
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetUnencryptedHTTP2(true)
	case "grpcweb":
		options = append(options, connect.WithGRPCWeb())
	}
	return pb.NewProcessClient(&http.Client{Transport: transport}, d.url, options...), transport.CloseIdleConnections
}

// wantOffset compares the headers that say where a stream begins. A connection that broke before them says nothing.
func wantOffset(t *testing.T, header http.Header, offset, lost int64) {
	t.Helper()
	want := [2]string{strconv.FormatInt(offset, 10), strconv.FormatInt(lost, 10)}
	if got := [2]string{header.Get("Envd-Output-Offset"), header.Get("Envd-Output-Lost")}; got != want {
		t.Errorf("Envd-Output-Offset and -Lost are %q, want %q", got, want)
	}
}

// ---- resuming -------------------------------------------------------------------------------------------------------

func TestResumeAfterResets(t *testing.T) {
	for _, test := range []struct {
		wire   wire
		total  int64
		resets int
		stall  time.Duration // before each reset
	}{
		{wire{protocol: "connect"}, 64 << 20, 1000, 0},
		{wire{protocol: "json"}, 8 << 20, 100, 0},
		{wire{protocol: "grpc"}, 8 << 20, 100, 0},
		{wire{protocol: "grpcweb"}, 8 << 20, 100, 0},
		{wire{protocol: "connect", receiveBuffer: 4096}, 2 << 20, 50, 0},
		// Long enough for the windows of a connection to grow; and with full sockets at the reset, of a size that does not
		// depend on what this machine's tcp_rmem allows.
		{wire{protocol: "connect"}, 64 << 20, 16, 0},
		{wire{protocol: "connect", receiveBuffer: 1 << 20}, 64 << 20, 16, 100 * time.Millisecond},
		{wire{protocol: "grpc", receiveBuffer: 1 << 20}, 64 << 20, 16, 100 * time.Millisecond},
	} {
		name := fmt.Sprintf("%s %d resets in %d MiB", test.wire.protocol, test.resets, test.total>>20)
		if test.wire.receiveBuffer > 0 {
			name += fmt.Sprintf(", receive buffer %d", test.wire.receiveBuffer)
		}
		if test.stall > 0 {
			name += " after stalls"
		}
		t.Run(name, func(t *testing.T) {
			if test.resets < 1000 {
				t.Parallel()
			}
			resumeAfterResets(t, test.wire, test.total, test.resets, test.stall)
		})
	}
}

func resumeAfterResets(t *testing.T, w wire, total int64, resets int, stall time.Duration) {
	d := startDaemon(t)
	const seed = 20240601
	output, ends, done := newSplitOutput(seed), 0, 0
	choose := rand.New(rand.NewPCG(uint64(resets), uint64(total)))
	var pid uint32
	start := time.Now()
	for ; done < resets; done++ {
		// Together the resets take most of the output; each may come anywhere, in the headers as well as in a message.
		budget := 1 + choose.Int64N(2*(total-output.received)/(int64(resets-done)*9/8+8)+16<<10)
		if done == 0 {
			budget += 4096 // the process must have started
		}
		client, closeAll := w.client(d, budget, func(conn net.Conn) (int64, error) {
			time.Sleep(stall)
			return resetConn(conn)
		})
		var s *clientStream
		var err error
		if done == 0 {
			s, err = d.open(t, argv(helperBinary(t), "random-output", fmt.Sprint(seed), fmt.Sprint(total)),
				withTag("generator"), withClient(client))
		} else {
			s, err = d.openConnect(t, byTag("generator"), withOutputFrom(fmt.Sprint(output.received)), withClient(client))
		}
		if err == nil {
			if s.header.Get("Envd-Output-Offset") != "" {
				wantOffset(t, s.header, output.received, 0)
			}
			for event := s.next(); event != nil; event = s.next() {
				if event.GetStart() != nil {
					pid = event.GetStart().GetPid()
				}
				if event.GetData() != nil {
					if s.header.Get("Envd-Output-Offset") == "" {
						t.Error("output without Envd-Output-Offset")
					}
					output.add(event.GetData())
				}
				if event.GetEnd() != nil {
					t.Fatalf("`end` after %d bytes and %d resets", output.received, done)
				}
			}
			if s.failure() == nil {
				t.Fatal("a reset stream ended without an error")
			}
			var failure *connect.Error
			if errors.As(s.failure(), &failure) && failure.Code() == connect.CodeNotFound {
				t.Fatal(failure)
			}
			s.drop()
		}
		closeAll()
		if t.Failed() || output.wrong != "" {
			t.Fatalf("after %d resets and %d bytes: %s", done, output.received, output.wrong)
		}
	}
	t.Logf("%d resets took %v; %d of %d bytes arrived meanwhile", resets, time.Since(start).Round(time.Millisecond),
		output.received, total)

	// The last connection stalls within the last 64 KiB, until the process is long gone.
	before := output.received
	remaining := total - before
	stalled := false
	client, closeAll := w.client(d, max(remaining-32<<10, 1), func(net.Conn) (int64, error) {
		stalled = true
		waitFor(t, 10*time.Second, "the leader has written everything and is gone", func() bool { return !isAlive(int(pid)) })
		if resets == 1000 {
			time.Sleep(5 * time.Second)
		} else {
			time.Sleep(time.Second)
		}
		return unmetered, nil
	})
	defer closeAll()
	s := d.connect(t, byTag("generator"), withOutputFrom(fmt.Sprint(before)), withClient(client))
	wantOffset(t, s.header, before, 0)
	for event := s.next(); event != nil; event = s.next() {
		switch {
		case ends > 0:
			t.Errorf("%v after `end`", event)
		case event.GetData() != nil:
			output.add(event.GetData())
		case event.GetEnd() != nil:
			wantEnd(t, event.GetEnd(), 0, true, "exit status 0")
			ends++
		}
	}
	if s.failure() != nil || ends != 1 {
		t.Errorf("the stream failed: %v; %d ends", s.failure(), ends)
	}
	if !stalled {
		t.Error("the reader did not stall")
	}
	output.check(t, seed, total)
}

// ---- where a stream begins ----------------------------------------------------------------------------------------

func TestOutputOffsets(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	const script = `printf 0123456789; read x; printf abcde; read x; printf fgh; read x; printf end; exit 3`
	s := d.start(t, sh(script))
	if got := s.header.Get("Envd-Output-Offset"); got != "0" {
		t.Errorf("Start says Envd-Output-Offset %q, want 0", got)
	}
	pid := byPid(s.pid)
	s.readUntil(t, "0123456789")
	s.drop()

	// Each of these attaches, reads up to a mark and leaves.
	read := func(from string, offset int64, want string) {
		t.Helper()
		var options []callOption
		if from != "" {
			options = append(options, withOutputFrom(from))
		}
		s := d.connect(t, pid, options...)
		wantOffset(t, s.header, offset, 0)
		if got := s.read(t, want, func(r *runResult) bool { return len(r.stdout) >= len(want) }); string(got.stdout) != want {
			t.Errorf("Envd-Output-From %q: read %q, want %q", from, got.stdout, want)
		}
		s.drop()
	}
	write := func() {
		t.Helper()
		if err := d.sendStdin(t, pid, "\n"); err != nil {
			t.Fatal(err)
		}
	}
	refuse := func(from string) {
		t.Helper()
		s, err := d.openConnect(t, pid, withOutputFrom(from))
		if err == nil {
			err = s.collect().err
		}
		if connect.CodeOf(err) != connect.CodeInvalidArgument || err == nil {
			t.Errorf("Envd-Output-From %q: %v, want invalid_argument", from, err)
		}
	}

	// A piece counts as sent a moment after the client has it.
	allSent := func(offset int64) {
		t.Helper()
		waitFor(t, 5*time.Second, fmt.Sprintf("everything before %d counts as sent", offset), func() bool {
			s := d.connect(t, pid)
			defer s.drop()
			return s.header.Get("Envd-Output-Offset") == fmt.Sprint(offset)
		})
	}

	read("all", 0, "0123456789")
	read("0", 0, "0123456789")
	read("3", 3, "3456789")
	read("10", 10, "")
	read("new", 10, "")
	allSent(10)
	read("", 10, "")
	for _, from := range []string{"x", "-1", "-0", "1.5", "0x3", "5 6", "1e1", "all,5", "11", "9223372036854775807",
		"9223372036854775808", "18446744073709551626", "99999999999999999999999"} {
		refuse(from)
	}

	// `new` begins at the end of what there is: what is written later, and only that, comes.
	fresh := d.connect(t, pid, withOutputFrom("new"))
	wantOffset(t, fresh.header, 10, 0)
	write()
	if got := fresh.readUntil(t, "abcde").stdout; string(got) != "abcde" {
		t.Errorf("Envd-Output-From new: read %q", got)
	}
	fresh.drop()
	read("new", 15, "")
	allSent(15)

	// Nobody is attached when this is written: it waits for the next client that does not say where to begin, once.
	write()
	read("", 15, "fgh")
	allSent(18)
	read("all", 0, "0123456789abcdefgh")
	read("12", 12, "cdefgh")

	// The same holds for a process that has ended.
	write()
	waitFor(t, 5*time.Second, "the process is gone", func() bool { return d.listed(t, pid.GetPid()) == nil })
	for _, test := range []struct {
		from   string
		offset int64
		want   string
	}{{"", 18, "end"}, {"all", 0, "0123456789abcdefghend"}, {"20", 20, "d"}, {"21", 21, ""}, {"new", 21, ""}} {
		var options []callOption
		if test.from != "" {
			options = append(options, withOutputFrom(test.from))
		}
		r := d.connect(t, pid, options...).collect()
		wantOffset(t, r.header, test.offset, 0)
		wantEnd(t, r.end, 3, true, "exit status 3")
		if string(r.stdout) != test.want || r.err != nil {
			t.Errorf("Envd-Output-From %q after the end: %q, %v, want %q", test.from, r.stdout, r.err, test.want)
		}
	}
	refuse("22")
	refuse("-1")
}

// A terminal gives its scrollback back; its bytes are counted like those of pipes.
func TestTerminalScrollback(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh("echo hello; read x; echo bye; exit 6"), withPTY(80, 24))
	shown := string(s.readUntil(t, "hello\r\n").pty)
	s.drop()
	if err := d.sendPTY(t, byPid(s.pid), "\n"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 5*time.Second, "the process is gone", func() bool { return d.listed(t, s.pid) == nil })
	all := d.connect(t, byPid(s.pid), withOutputFrom("all")).collect()
	wantOffset(t, all.header, 0, 0)
	wantEnd(t, all.end, 6, true, "exit status 6")
	if want := shown + "\r\nbye\r\n"; string(all.pty) != want || len(all.stdout) > 0 {
		t.Errorf("scrollback %q, want %q", all.pty, want)
	}
	rest := d.connect(t, byPid(s.pid), withOutputFrom(fmt.Sprint(len(shown)))).collect()
	if want := "\r\nbye\r\n"; string(rest.pty) != want {
		t.Errorf("behind offset %d: %q, want %q", len(shown), rest.pty, want)
	}
}

// What nobody reads is kept as far as the buffer goes; the rest is counted, and the process never waits.
func TestUnattendedOutputIsCounted(t *testing.T) {
	t.Parallel()
	const buffer, total, seed = 64 << 10, 5_000_000, 11
	d := startDaemon(t, "--output-buffer", fmt.Sprint(buffer))
	done := filepath.Join(publicDir(t), "done")
	s := d.start(t, argv(helperBinary(t), "pattern", fmt.Sprint(seed), fmt.Sprint(total), done))
	pid := byPid(s.pid)
	s.drop()
	if err := d.sendStdin(t, pid, "\n"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 10*time.Second, "everything written although nobody reads", func() bool {
		_, err := os.Stat(done)
		return err == nil
	})
	want := pattern(seed, total)

	// The last bytes may still be on their way from the pipe to the log.
	var first int64
	waitFor(t, 5*time.Second, "the log holds the last byte", func() bool {
		s, err := d.openConnect(t, pid, withOutputFrom(fmt.Sprint(total)))
		if err != nil {
			return false
		}
		defer s.drop()
		event := s.next()
		return event.GetStart() != nil
	})
	for _, from := range []string{"0", "all", "100", ""} {
		var options []callOption
		if from != "" {
			options = append(options, withOutputFrom(from))
		}
		asked, _ := strconv.ParseInt(from, 10, 64)
		s := d.connect(t, pid, options...)
		offset, err := strconv.ParseInt(s.header.Get("Envd-Output-Offset"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		if from == "" && first > 0 {
			wantOffset(t, s.header, total, 0) // sent by now
			continue
		}
		wantOffset(t, s.header, offset, offset-asked)
		if offset > total-buffer {
			t.Errorf("only %d bytes were kept, the buffer has %d", total-offset, buffer)
		}
		if most := int64(buffer + 2*128<<10); total-offset > most {
			t.Errorf("%d bytes were kept, more than %d", total-offset, most)
		}
		r := s.read(t, "the rest", func(r *runResult) bool { return len(r.stdout) >= int(total-offset) })
		if !bytes.Equal(r.stdout, want[offset:]) {
			t.Errorf("Envd-Output-From %q: the %d bytes from %d on differ", from, len(r.stdout), offset)
		}
		s.drop()
		first = cmp.Or(first, offset)
		if offset != first {
			t.Errorf("Envd-Output-From %q: begins at %d, earlier at %d", from, offset, first)
		}
	}
	if err := d.closeStdin(t, pid); err != nil {
		t.Error(err)
	}
	r := d.connect(t, pid).collect()
	wantEnd(t, r.end, 0, true, "exit status 0")
	wantOffset(t, r.header, total, 0)
}

// ---- several subscribers ------------------------------------------------------------------------------------------

func TestEverySubscriberGetsEverything(t *testing.T) {
	t.Parallel()
	const total, seed = 16 << 20, 12
	d := startDaemon(t)
	first := d.start(t, argv(helperBinary(t), "pattern", fmt.Sprint(seed), fmt.Sprint(total), "/dev/null"))
	streams := []*clientStream{first}
	for _, protocol := range []string{"connect", "json", "grpc", "grpcweb"} {
		client, closeAll := wire{protocol: protocol}.client(d, unmetered, nil)
		defer closeAll()
		streams = append(streams, d.connect(t, byPid(first.pid), withClient(client)))
	}
	if err := errors.Join(d.sendStdin(t, byPid(first.pid), "\n"), d.closeStdin(t, byPid(first.pid))); err != nil {
		t.Fatal(err)
	}
	want := sha256.Sum256(pattern(seed, total))
	var wait sync.WaitGroup
	for i, s := range streams {
		wait.Go(func() {
			r := s.collect()
			if got := sha256.Sum256(r.stdout); got != want || r.ends != 1 || r.err != nil {
				t.Errorf("subscriber %d: %d bytes of %d, %d ends, %v", i, len(r.stdout), total, r.ends, r.err)
			}
		})
	}
	wait.Wait()
}

// A subscriber that takes nothing is cut for the sake of another one; that one misses nothing. The stale one sees a
// broken stream and resumes, or is told what is gone.
func TestStalledSubscriberIsCut(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{"connect", "grpc", "grpcweb", "json"} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			const total, seed = 32 << 20, 13
			d := startDaemon(t, "--stall-timeout", "30s", "--stall-timeout-shared", "500ms")
			reader := d.start(t, argv(helperBinary(t), "pattern", fmt.Sprint(seed), fmt.Sprint(total), "/dev/null"))
			var released atomic.Bool
			client, closeAll := wire{protocol: protocol}.client(d, 256<<10, func(net.Conn) (int64, error) {
				waitFor(t, 20*time.Second, "the other subscriber has all", released.Load)
				return unmetered, nil
			})
			defer closeAll()
			stale := d.connect(t, byPid(reader.pid), withClient(client))
			if err := errors.Join(d.sendStdin(t, byPid(reader.pid), "\n"), d.closeStdin(t, byPid(reader.pid))); err != nil {
				t.Fatal(err)
			}
			want := pattern(seed, total)
			staleResult := make(chan runResult, 1)
			go func() { staleResult <- stale.collect() }()
			start := time.Now()
			r := reader.collect()
			t.Logf("the reader had everything after %v", time.Since(start).Round(time.Millisecond))
			released.Store(true)
			if !bytes.Equal(r.stdout, want) || r.ends != 1 || r.err != nil {
				t.Errorf("the reader got %d bytes of %d, %d ends, %v", len(r.stdout), total, r.ends, r.err)
			}
			cut := <-staleResult
			if cut.err == nil || cut.ends != 0 {
				t.Errorf("the stalled stream: error %v, %d ends; want a broken stream without `end`", cut.err, cut.ends)
			}
			if len(cut.stdout) >= total || !bytes.HasPrefix(want, cut.stdout) {
				t.Errorf("the stalled stream gave %d bytes; they are not the beginning of the output", len(cut.stdout))
			}
			back := d.connect(t, byPid(reader.pid), withOutputFrom(fmt.Sprint(len(cut.stdout)))).collect()
			offset, _ := strconv.ParseInt(back.header.Get("Envd-Output-Offset"), 10, 64)
			wantOffset(t, back.header, offset, offset-int64(len(cut.stdout)))
			if !bytes.Equal(back.stdout, want[offset:]) || back.ends != 1 {
				t.Errorf("resumed at %d, lost %s: %d bytes, %d ends", len(cut.stdout), back.header.Get("Envd-Output-Lost"),
					len(back.stdout), back.ends)
			}
		})
	}
}

// Alone, a stalled subscriber holds its process up for the longer time only.
func TestStalledSubscriberAloneIsCut(t *testing.T) {
	t.Parallel()
	const total, seed = 32 << 20, 14
	d := startDaemon(t, "--stall-timeout", "1s", "--stall-timeout-shared", "100ms")
	var released atomic.Bool
	client, closeAll := wire{protocol: "connect"}.client(d, 256<<10, func(net.Conn) (int64, error) {
		waitFor(t, 20*time.Second, "the process has ended", released.Load)
		return unmetered, nil
	})
	defer closeAll()
	s := d.start(t, argv(helperBinary(t), "pattern", fmt.Sprint(seed), fmt.Sprint(total), "/dev/null"), withClient(client))
	if err := errors.Join(d.sendStdin(t, byPid(s.pid), "\n"), d.closeStdin(t, byPid(s.pid))); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	got := make(chan runResult, 1)
	go func() { got <- s.collect() }()
	waitFor(t, 10*time.Second, "the process ran on and ended", func() bool { return d.listed(t, s.pid) == nil })
	if held := time.Since(start); held < 900*time.Millisecond {
		t.Errorf("the process ended after %v: the subscriber was cut too early, or did not hold it", held)
	}
	released.Store(true)
	cut := <-got
	if cut.err == nil || cut.ends != 0 {
		t.Errorf("the stalled stream: error %v, %d ends; want a broken stream without `end`", cut.err, cut.ends)
	}
	want := pattern(seed, total)
	back := d.connect(t, byPid(s.pid), withOutputFrom(fmt.Sprint(len(cut.stdout)))).collect()
	offset, _ := strconv.ParseInt(back.header.Get("Envd-Output-Offset"), 10, 64)
	wantOffset(t, back.header, offset, offset-int64(len(cut.stdout)))
	if offset == int64(len(cut.stdout)) || !bytes.Equal(back.stdout, want[offset:]) || back.ends != 1 {
		t.Errorf("resumed at %d, offset %d: %d bytes, %d ends", len(cut.stdout), offset, len(back.stdout), back.ends)
	}
}

// Who reads slowly but reads is never cut, whatever the kernel buffers between the two.
func TestSlowSubscriberIsNotCut(t *testing.T) {
	t.Parallel()
	const total, seed = 4 << 20, 15
	want := sha256.Sum256(pattern(seed, total))
	var wait sync.WaitGroup
	defer wait.Wait()
	for _, test := range []struct {
		wire   wire
		shared bool
	}{
		{wire{protocol: "connect"}, false},
		{wire{protocol: "connect", receiveBuffer: 4096}, false},
		{wire{protocol: "grpc"}, false},
		{wire{protocol: "connect"}, true},
		{wire{protocol: "connect", receiveBuffer: 4096}, true},
	} {
		d := startDaemon(t, "--stall-timeout", "2s", "--stall-timeout-shared", "2s")
		// 64 KiB from the socket every 200 ms: in proportion to the timeout a client of 10 KiB/s at the default of 60 s.
		client, closeAll := test.wire.client(d, 64<<10, func(net.Conn) (int64, error) {
			time.Sleep(200 * time.Millisecond)
			return 64 << 10, nil
		})
		slow := d.start(t, argv(helperBinary(t), "pattern", fmt.Sprint(seed), fmt.Sprint(total), "/dev/null"),
			withClient(client))
		streams := []*clientStream{slow}
		if test.shared {
			streams = append(streams, d.connect(t, byPid(slow.pid)))
		}
		if err := errors.Join(d.sendStdin(t, byPid(slow.pid), "\n"), d.closeStdin(t, byPid(slow.pid))); err != nil {
			t.Fatal(err)
		}
		for i, s := range streams {
			wait.Go(func() {
				start := time.Now()
				r := s.collect()
				if got := sha256.Sum256(r.stdout); got != want || r.ends != 1 || r.err != nil {
					t.Errorf("%+v: subscriber %d after %v: %d bytes of %d, %d ends, %v", test, i, time.Since(start), len(r.stdout),
						total, r.ends, r.err)
				}
				if s == slow {
					closeAll()
				}
			})
		}
	}
}

// ---- random histories -----------------------------------------------------------------------------------------------

// Writers write, readers stall, leave, are reset and come back wherever they like, many at a time. The model: byte
// number o of a process is byte o of its pattern, a stream has no holes, what its headers say is true, and nothing is
// gone that the buffer had room for.
func TestRandomHistories(t *testing.T) {
	const histories, atOnce, buffer = 300, 12, 64 << 10
	d := startDaemon(t, "--output-buffer", fmt.Sprint(buffer), "--output-resume", fmt.Sprint(2*buffer), "--output-ended",
		fmt.Sprint(1<<30))
	helper := make(chan struct{}, atOnce)
	var wait sync.WaitGroup
	start := time.Now()
	var total historyCounts
	for seed := range uint64(histories) {
		helper <- struct{}{}
		wait.Go(func() {
			defer func() { <-helper }()
			runHistory(t, d, seed, buffer, &total)
		})
		if t.Failed() {
			break
		}
	}
	wait.Wait()
	t.Logf("%d histories in %v: %d streams, %d of them broken, %d bytes read, %d bytes counted as lost", histories,
		time.Since(start).Round(time.Millisecond), total.streams.Load(), total.broken.Load(), total.read.Load(),
		total.lost.Load())
}

type historyCounts struct{ streams, broken, read, lost atomic.Int64 }

func runHistory(t *testing.T, d *daemon, seed uint64, buffer int64, counts *historyCounts) {
	choose := rand.New(rand.NewPCG(seed, 99))
	want := pattern(seed, choose.IntN(768<<10))
	total := int64(len(want))
	tag := fmt.Sprintf("history-%d", seed)
	fail := func(format string, args ...any) {
		t.Errorf("seed %d (%d bytes): %s", seed, total, fmt.Sprintf(format, args...))
	}

	var written, received atomic.Int64 // how far the process can have written at most, and how far some client has read
	first, err := d.open(t, argv("/bin/cat"), withTag(tag))
	if err == nil && first.next().GetStart() == nil {
		err = first.failure()
	}
	if err != nil {
		fail("Start: %v", err)
		return
	}
	defer first.drop()

	var wait sync.WaitGroup
	defer wait.Wait()
	writerChoose := rand.New(rand.NewPCG(seed, 100))
	wait.Go(func() {
		for written.Load() < total {
			n := min(1+writerChoose.Int64N(48<<10), total-written.Load())
			from := written.Add(n) - n
			if err := d.sendStdin(t, byTag(tag), string(want[from:from+n])); err != nil {
				fail("SendInput at %d: %v", from, err)
				return
			}
			if writerChoose.IntN(8) == 0 {
				time.Sleep(time.Duration(writerChoose.IntN(5000)) * time.Microsecond)
			}
		}
		if err := d.closeStdin(t, byTag(tag)); err != nil {
			fail("CloseStdin: %v", err)
		}
	})

	for reader := range 1 + choose.IntN(3) {
		readerChoose := rand.New(rand.NewPCG(seed, uint64(200+reader)))
		wait.Go(func() {
			h := historyReader{t: t, d: d, tag: tag, want: want, buffer: buffer, choose: readerChoose,
				written: &written, received: &received, counts: counts, fail: fail}
			ended := false
			if reader == 0 {
				ended = h.follow(first, 0)
			}
			for streams := 0; !ended && !t.Failed(); streams++ {
				ended = h.attach(streams > 40)
			}
		})
	}
}

type historyReader struct {
	t                 *testing.T
	d                 *daemon
	tag               string
	want              []byte
	buffer            int64
	pos               int64 // behind the last byte that this reader has received in a row
	choose            *rand.Rand
	written, received *atomic.Int64
	counts            *historyCounts
	fail              func(string, ...any)
}

// attach opens a stream somewhere and follows it; with patience to its end.
func (h *historyReader) attach(patient bool) (ended bool) {
	budget := int64(unmetered)
	if !patient && h.choose.IntN(2) == 0 {
		budget = 1 + h.choose.Int64N(200<<10)
	}
	w := wire{protocol: []string{"connect", "connect", "json", "grpcweb", "grpc"}[h.choose.IntN(5)]}
	client, closeAll := w.client(h.d, budget, resetConn)
	defer closeAll()
	from, receivedBefore := fmt.Sprint(h.pos), h.received.Load()
	options := []callOption{withClient(client)}
	switch h.choose.IntN(10) {
	case 0:
		from = "all"
	case 1:
		from = "new"
	case 2:
		from = ""
	case 3:
		from = fmt.Sprint(h.choose.Int64N(h.pos + 1))
	}
	if from != "" {
		options = append(options, withOutputFrom(from))
	}
	s, err := h.d.openConnect(h.t, byTag(h.tag), options...)
	if err != nil {
		h.counts.broken.Add(1)
		return false
	}
	defer s.drop()
	if s.header.Get("Envd-Output-Offset") == "" {
		if s.next() != nil || budget == unmetered {
			h.fail("a stream without Envd-Output-Offset: %v", s.failure())
		}
		h.counts.broken.Add(1)
		return false
	}
	offset, errOffset := strconv.ParseInt(s.header.Get("Envd-Output-Offset"), 10, 64)
	lost, errLost := strconv.ParseInt(s.header.Get("Envd-Output-Lost"), 10, 64)
	written := h.written.Load()
	asked := offset - lost
	h.counts.lost.Add(lost)
	switch {
	case errOffset != nil || errLost != nil || offset < 0 || lost < 0:
		h.fail("headers %v", s.header)
	case from == "all" && asked != 0,
		from == "new" && (lost != 0 || offset < receivedBefore),
		from == "" && asked < receivedBefore-128<<10, // a piece counts as sent a moment after the client has it
		from != "all" && from != "new" && from != "" && fmt.Sprint(asked) != from:
		h.fail("asked for %q: offset %d, lost %d; a client had received up to %d", from, offset, lost, receivedBefore)
	case offset > max(asked, written-h.buffer) || offset > written:
		h.fail("asked for %q: offset %d, lost %d, but only %d bytes were written", from, offset, lost, written)
	}
	return h.follow(s, offset)
}

// follow reads a stream that begins at an offset, until it breaks, the reader leaves, or it ends.
func (h *historyReader) follow(s *clientStream, offset int64) (ended bool) {
	h.counts.streams.Add(1)
	leave := -1
	if h.choose.IntN(3) == 0 {
		leave = h.choose.IntN(8)
	}
	h.pos = offset
	for events := 0; ; events++ {
		if h.choose.IntN(6) == 0 {
			time.Sleep(time.Duration(h.choose.IntN(8000)) * time.Microsecond)
		}
		event := s.next()
		if event == nil {
			h.counts.broken.Add(1)
			if s.failure() == nil {
				h.fail("a stream without `end` that did not fail")
			}
			return false
		}
		if data := event.GetData().GetStdout(); len(data) > 0 {
			if h.pos+int64(len(data)) > int64(len(h.want)) || !bytes.Equal(data, h.want[h.pos:h.pos+int64(len(data))]) {
				h.fail("the %d bytes at %d, in a stream that began at %d, are wrong", len(data), h.pos, offset)
				return true
			}
			h.pos += int64(len(data))
			h.counts.read.Add(int64(len(data)))
			for seen := h.received.Load(); h.pos > seen && !h.received.CompareAndSwap(seen, h.pos); seen = h.received.Load() {
			}
		}
		if event.GetEnd() != nil {
			if h.pos != int64(len(h.want)) || event.GetEnd().GetStatus() != "exit status 0" {
				h.fail("%v at %d of %d", event.GetEnd(), h.pos, len(h.want))
			}
			if again := s.next(); again != nil || s.failure() != nil {
				h.fail("after `end`: %v, %v", again, s.failure())
			}
			return true
		}
		if events == leave {
			s.drop()
			return false
		}
	}
}
