// Clients that misuse HTTP/2, frame by frame: what they can make the daemon hold is bounded, and nobody else waits for them.
package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	pb "envd/proto"
	"google.golang.org/protobuf/proto"
)

// frames is a connection on which a test sends what frames it likes.
type frames struct {
	*http2.Framer
	conn   net.Conn
	buf    bytes.Buffer // written in one piece by flush
	header bytes.Buffer
	hpack  *hpack.Encoder
	heard  chan string // closed when the daemon has hung up; nil: nothing is read yet
}

// dialFrames makes a connection with a client's preface.
func dialFrames(t *testing.T, url string, reads bool, settings ...http2.Setting) *frames {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	f := &frames{conn: conn}
	f.Framer = http2.NewFramer(&f.buf, conn)
	f.AllowIllegalWrites = true
	f.hpack = hpack.NewEncoder(&f.header)
	f.buf.WriteString(http2.ClientPreface)
	f.WriteSettings(settings...)
	if reads {
		f.heard = make(chan string, 1)
		go f.listen()
	}
	return f
}

// listen waits for the answer to the PING that settle sends.
func (f *frames) listen() {
	defer close(f.heard)
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return
		}
		if ping, ok := frame.(*http2.PingFrame); ok && ping.IsAck() && ping.Data == settlePing {
			f.heard <- "took all"
		}
	}
}

// settle returns when the daemon has taken all that was sent, or has hung up, and tells which.
func (f *frames) settle(err error) string {
	if f.heard == nil {
		f.heard = make(chan string, 1)
		go f.listen()
	}
	f.WritePing(false, settlePing)
	if err == nil {
		err = f.flush()
	}
	if told := <-f.heard; err == nil && told != "" {
		return told
	}
	return "hung up"
}

var settlePing = [8]byte{'s', 'e', 't', 't', 'l', 'e'}

// flush sends what was written so far; an error says that the daemon has hung up.
func (f *frames) flush() error {
	_, err := f.conn.Write(f.buf.Bytes())
	f.buf.Reset()
	return err
}

func (f *frames) headers(pairs ...string) []byte {
	f.header.Reset()
	for i := 0; i < len(pairs); i += 2 {
		f.hpack.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]})
	}
	return f.header.Bytes()
}

func (f *frames) startRequest(id uint32) {
	f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, EndHeaders: true, BlockFragment: f.headers(":method", "POST", ":scheme", "http",
		":authority", "localhost", ":path", "/process.Process/Start", "content-type", "application/connect+proto")})
}

// start asks for a process in one stream.
func (f *frames) start(id uint32, args ...string) {
	off := false
	message, _ := proto.Marshal(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: args[0], Args: args[1:]}, Stdin: &off})
	f.startRequest(id)
	f.WriteData(id, true, append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(message))), message...))
}

// figure reads one of the daemon's metrics.
func figure(t *testing.T, url, name string) float64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	request, _ := http.NewRequestWithContext(ctx, "GET", url+"/metrics", nil)
	request.Header.Set("Accept", "text/plain")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, _ := io.ReadAll(response.Body)
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			n, _ := strconv.ParseFloat(strings.TrimSpace(value), 64)
			return n
		}
	}
	t.Fatalf("no %s in %s", name, text)
	return 0
}

// eventually waits until nothing runs and no stream is open any more.
func eventually(t *testing.T, url string) {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		running, open := figure(t, url, "envd_processes_running"), figure(t, url, "envd_streams_open")
		if running == 0 && open == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v processes run, %v streams are open", running, open)
		}
	}
}

// TestHTTP2Misuse floods a daemon with one kind of frames after the other.
func TestHTTP2Misuse(t *testing.T) {
	t.Parallel()
	url := startDaemon(t, freePort(t))
	t.Cleanup(func() { nothingRuns(t, url) })
	post(t, url+"/process.Process/List", struct{}{}, nil)
	const bound = 80 << 20
	for _, misuse := range []struct {
		name  string
		reads bool
		send  func(f *frames) (sent int, err error)
	}{
		{"10,000 requests, each reset at once", true, func(f *frames) (sent int, err error) {
			for ; sent < 10_000 && err == nil; sent++ {
				f.startRequest(uint32(2*sent + 1))
				f.WriteRSTStream(uint32(2*sent+1), http2.ErrCodeCancel)
				if sent%100 == 99 {
					err = f.flush()
				}
			}
			return sent, err
		}},
		{"2,000 starts, each reset at once", true, func(f *frames) (sent int, err error) {
			for ; sent < 2000 && err == nil; sent++ {
				f.start(uint32(2*sent+1), "/bin/true")
				f.WriteRSTStream(uint32(2*sent+1), http2.ErrCodeCancel)
				err = f.flush()
			}
			return sent, err
		}},
		{"100 MiB of CONTINUATION", true, func(f *frames) (sent int, err error) {
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: f.headers(":method", "GET", ":scheme", "http", ":authority", "localhost", ":path", "/health")})
			for ; sent < 10_000 && err == nil; sent++ {
				f.WriteContinuation(1, false, f.headers("x-"+strings.Repeat("a", 4000), strings.Repeat("b", 6000)))
				err = f.flush()
			}
			return sent, err
		}},
		{"200,000 empty CONTINUATION", true, func(f *frames) (sent int, err error) {
			f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: f.headers(":method", "GET", ":scheme", "http", ":authority", "localhost", ":path", "/health")})
			for ; sent < 200_000 && err == nil; sent++ {
				f.WriteContinuation(1, false, nil)
				if sent%1000 == 999 {
					err = f.flush()
				}
			}
			return sent, err
		}},
		{"200,000 SETTINGS whose answers nobody reads", false, func(f *frames) (sent int, err error) {
			for ; sent < 200_000 && err == nil; sent++ {
				f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: uint32(sent)})
				if sent%1000 == 999 {
					err = f.flush()
				}
			}
			return sent, err
		}},
		{"200,000 PING whose answers nobody reads", false, func(f *frames) (sent int, err error) {
			for ; sent < 200_000 && err == nil; sent++ {
				f.WritePing(false, [8]byte{1})
				if sent%1000 == 999 {
					err = f.flush()
				}
			}
			return sent, err
		}},
		{"200,000 empty DATA", true, func(f *frames) (sent int, err error) {
			f.startRequest(1)
			for ; sent < 200_000 && err == nil; sent++ {
				f.WriteData(1, false, nil)
				if sent%1000 == 999 {
					err = f.flush()
				}
			}
			return sent, err
		}},
		{"200,000 PRIORITY of streams that are not", true, func(f *frames) (sent int, err error) {
			for ; sent < 200_000 && err == nil; sent++ {
				f.WritePriority(uint32(2*sent+1), http2.PriorityParam{StreamDep: uint32(2*sent + 3)})
				if sent%1000 == 999 {
					err = f.flush()
				}
			}
			return sent, err
		}},
		{"1,500 requests that never end", true, func(f *frames) (sent int, err error) {
			for ; sent < 1500 && err == nil; sent++ {
				f.startRequest(uint32(2*sent + 1))
				err = f.flush()
			}
			return sent, err
		}},
	} {
		t.Run(misuse.name, func(t *testing.T) {
			var slowest atomic.Int64
			done := make(chan struct{})
			var wait sync.WaitGroup
			wait.Go(func() { // others are served all the while
				for {
					begin := time.Now()
					figure(t, url, "envd_streams_open")
					slowest.Store(max(slowest.Load(), int64(time.Since(begin))))
					select {
					case <-done:
						return
					case <-time.After(10 * time.Millisecond):
					}
				}
			})
			f := dialFrames(t, url, misuse.reads)
			sent, err := misuse.send(f)
			end := f.settle(err)
			close(done)
			wait.Wait()
			rss := figure(t, url, "envd_resident_memory_bytes")
			t.Logf("%d sent, the daemon %s; RSS %.0f MiB; slowest answer to another %v", sent, end, rss/(1<<20), time.Duration(slowest.Load()).Round(time.Millisecond))
			if rss > bound {
				t.Errorf("RSS %.0f bytes, want less than %d", rss, bound)
			}
			f.conn.Close()
			eventually(t, url)
		})
	}
}

// TestHTTP2ZeroWindow has 100 processes write without end to a client that grants nothing: they wait, the daemon holds little of what they
// wrote, and others are served.
func TestHTTP2ZeroWindow(t *testing.T) {
	t.Parallel()
	const streams = 100
	url := startDaemon(t, freePort(t))
	t.Cleanup(func() { nothingRuns(t, url) })
	f := dialFrames(t, url, true, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0})
	for i := range streams {
		f.start(uint32(2*i+1), "/usr/bin/yes", "zero window")
	}
	if err := f.flush(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); figure(t, url, "envd_processes_running") < streams; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%v processes run", figure(t, url, "envd_processes_running"))
		}
	}
	for i := range 20 {
		post(t, url+"/process.Process/List", struct{}{}, nil)
		if rss := figure(t, url, "envd_resident_memory_bytes"); rss > 100<<20 {
			t.Fatalf("RSS %.0f MiB", rss/(1<<20))
		} else if i == 19 {
			t.Logf("%d streams without a window: RSS %.0f MiB", streams, rss/(1<<20))
		}
	}
	var list struct{ Processes []struct{ Pid int } }
	post(t, url+"/process.Process/List", struct{}{}, &list)
	for _, p := range list.Processes {
		post(t, url+"/process.Process/SendSignal", map[string]any{"process": map[string]any{"pid": p.Pid}, "signal": "SIGNAL_SIGKILL"}, nil)
	}
	f.conn.Close()
	eventually(t, url)
}
