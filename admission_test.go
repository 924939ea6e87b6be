// Who is served first: what peers without the token do, with all that HTTP/1 and HTTP/2 let them, and what its holder notices of it.
// The attackers come from other loopback addresses than the host.

package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

// ---- attackers ------------------------------------------------------------------------------------------------------

// attackers make connections from one loopback address each, and begin them again when they are closed.
type attackers struct {
	d      *daemon
	ctx    context.Context
	wait   sync.WaitGroup
	dialed atomic.Int64
}

// attack runs what the host does meanwhile, and ends the attack after it.
func attack(t *testing.T, d *daemon, begin func(a *attackers), meanwhile func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	a := &attackers{d: d, ctx: ctx}
	begin(a)
	meanwhile()
	cancel()
	a.wait.Wait()
	t.Logf("%d connections of attackers", a.dialed.Load())
}

// loop keeps a connection open on which do has been done: do returns when there is nothing more to send.
func (a *attackers) loop(from string, pause time.Duration, do func(net.Conn)) {
	a.wait.Go(func() {
		for a.ctx.Err() == nil {
			a.once(from, do)
			select {
			case <-a.ctx.Done():
			case <-time.After(pause):
			}
		}
	})
}

func (a *attackers) once(from string, do func(net.Conn)) {
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 10 * time.Second}
	conn, err := dialer.DialContext(a.ctx, "tcp", a.d.addr)
	if err != nil {
		return
	}
	defer conn.Close()
	a.dialed.Add(1)
	conn.(*net.TCPConn).SetLinger(0)
	defer context.AfterFunc(a.ctx, func() { conn.Close() })()
	do(conn)
}

// stay returns when the daemon has closed the connection, and takes what comes until then.
func stay(conn net.Conn) { io.Copy(io.Discard, conn) }

// stayDeaf takes nothing, but notices the end.
func stayDeaf(ctx context.Context, conn net.Conn) {
	for ctx.Err() == nil {
		time.Sleep(500 * time.Millisecond)
		if _, err := conn.Write(nil); err != nil || closedByPeer(conn) {
			return
		}
	}
}

func closedByPeer(conn net.Conn) (closed bool) {
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return true
	}
	const established = 1 // TCP_ESTABLISHED
	raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		closed = err != nil || info.State != established
	})
	return closed
}

// ---- frames of HTTP/2 (RFC 9113), headers without compression (RFC 7541, 6.2.2) --------------------------------------

const (
	h2Headers  = 1
	h2Settings = 4
	h2Ping     = 6

	h2EndStream, h2EndHeaders = 1, 4
)

func h2Frame(kind, flags byte, stream uint32, payload []byte) []byte {
	frame := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	frame = binary.BigEndian.AppendUint32(append(frame, flags), stream)
	return append(frame, payload...)
}

// h2Preface begins a connection whose streams may be sent so many bytes before they ask for more.
func h2Preface(window uint32) []byte {
	setting := binary.BigEndian.AppendUint32([]byte{0, 4}, window)
	return append([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), h2Frame(h2Settings, 0, 0, setting)...)
}

func h2Request(stream uint32, flags byte, method, path string, headers ...string) []byte {
	var block []byte
	for i, field := range append([]string{":method", method, ":scheme", "http", ":path", path, ":authority", "localhost"}, headers...) {
		if i%2 == 0 {
			block = append(block, 0)
		}
		block = append(append(block, byte(len(field))), field...)
	}
	return h2Frame(h2Headers, flags|h2EndHeaders, stream, block)
}

// h2Flood opens streams, one after the other, all with the same request.
func h2Flood(conn net.Conn, window uint32, streams int, flags byte, method, path string) {
	text := h2Preface(window)
	for i := range streams {
		text = append(text, h2Request(uint32(2*i+1), flags, method, path)...)
	}
	conn.Write(text)
}

// ---- the host -------------------------------------------------------------------------------------------------------

// hostReport is what the host saw of a daemon in the time of an attack.
type hostReport struct {
	mu       sync.Mutex
	requests int
	failures []string
	health   time.Duration // the worst
	idle     time.Duration // the worst of a server that does nothing, meanwhile
	start    time.Duration
}

func (r *hostReport) add(what string, took time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.requests++
	if err != nil {
		r.failures = append(r.failures, fmt.Sprintf("%s: %v after %v", what, err, took.Round(time.Millisecond)))
	}
	switch what {
	case "idle":
		r.idle = max(r.idle, took)
	case "health":
		r.health = max(r.health, took)
	case "start":
		r.start = max(r.start, took)
	}
}

// asHost does what a host does, for a time, from 127.0.0.1: half of it on connections that are new.
func asHost(t *testing.T, d *daemon, token string, duration time.Duration) *hostReport {
	t.Helper()
	r := &hostReport{}
	_, control := runRole(t, nil, "serve-nothing")
	end := time.Now().Add(duration)
	var wait sync.WaitGroup
	loop := func(f func(client *http.Client)) {
		for _, fresh := range []bool{false, true} {
			client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: fresh}}
			wait.Go(func() {
				defer client.CloseIdleConnections()
				for time.Now().Before(end) {
					f(client)
					time.Sleep(5 * time.Millisecond)
				}
			})
		}
	}
	ask := func(client *http.Client, method, path, body string, want int, headers ...string) error {
		request, _ := http.NewRequestWithContext(t.Context(), method, d.url+path, strings.NewReader(body))
		for i := 0; i < len(headers); i += 2 {
			request.Header.Set(headers[i], headers[i+1])
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		text, err := io.ReadAll(response.Body)
		if err == nil && response.StatusCode != want {
			err = fmt.Errorf("%d %.200q", response.StatusCode, text)
		}
		return err
	}
	loop(func(client *http.Client) {
		began := time.Now()
		response, err := client.Get("http://" + control)
		if err == nil {
			response.Body.Close()
		}
		r.add("idle", time.Since(began), err)
	})
	loop(func(client *http.Client) {
		began := time.Now()
		err := ask(client, "GET", "/health", "", http.StatusOK)
		r.add("health", time.Since(began), err)
	})
	loop(func(client *http.Client) {
		began := time.Now()
		err := ask(client, "POST", "/init", fmt.Sprintf(`{"accessToken":%q}`, token), http.StatusNoContent)
		r.add("init", time.Since(began), err)
	})
	large := fmt.Sprintf(`{"accessToken":%q,"lifecycleID":"%s"}`, token, strings.Repeat("x", 200<<10))
	loop(func(client *http.Client) {
		began := time.Now()
		err := ask(client, "POST", "/init", large, http.StatusNoContent)
		r.add("large init", time.Since(began), err)
		time.Sleep(100 * time.Millisecond)
	})
	loop(func(client *http.Client) {
		began := time.Now()
		err := ask(client, "GET", "/envs", "", http.StatusOK, "X-Access-Token", token)
		r.add("envs", time.Since(began), err)
	})
	loop(func(client *http.Client) {
		began := time.Now()
		s, err := d.open(t, argv("/bin/true"), withClient(pb.NewProcessClient(client, d.url)), withHeader("X-Access-Token", token))
		if err == nil {
			result := s.collect()
			if err = result.err; err == nil && result.ends != 1 {
				err = errors.New("no end")
			}
		}
		r.add("start", time.Since(began), err)
	})
	wait.Wait()
	return r
}

func (r *hostReport) check(t *testing.T) {
	t.Helper()
	t.Logf("%d requests of the host, %d failed; worst /health %v (an idle server %v), worst Start %v", r.requests, len(r.failures),
		r.health.Round(time.Millisecond), r.idle.Round(time.Millisecond), r.start.Round(time.Millisecond))
	for i, failure := range r.failures {
		if i == 10 {
			break
		}
		t.Errorf("%s", failure)
	}
}

// strangersFor is some seconds, or as long as -attack says.
func strangersFor(short time.Duration) time.Duration { return cmp.Or(*attackFlag, short) }

// startLocked starts a daemon whose token is "secret".
func startLocked(t *testing.T, args ...string) *daemon {
	t.Helper()
	d := startDaemon(t, args...)
	setToken(t, d, "secret")
	d.http.CloseIdleConnections()
	return d
}

// ---- the attacks ----------------------------------------------------------------------------------------------------

// Requests that wait for their bodies, thousands of them on few connections, keep nobody out.
func TestStrangersStreams(t *testing.T) {
	for what, addresses := range map[string]int{"from one address": 1, "from nine addresses": 9} {
		t.Run(what, func(t *testing.T) {
			d := startLocked(t)
			attack(t, d, func(a *attackers) {
				for i := range 9 {
					a.loop(fmt.Sprintf("127.0.0.%d", 2+i%addresses), 20*time.Millisecond, func(conn net.Conn) {
						h2Flood(conn, 65535, 1000, 0, "POST", "/init")
						stay(conn)
					})
				}
			}, func() {
				time.Sleep(500 * time.Millisecond)
				asHost(t, d, "secret", strangersFor(4*time.Second)).check(t)
			})
		})
	}
}

// Bodies that come slowly, all of them large, do not keep the host's own large ones out.
func TestStrangersLargeBodies(t *testing.T) {
	for what, addresses := range map[string]int{"from one address": 1, "from six addresses": 6} {
		t.Run(what, func(t *testing.T) {
			d := startLocked(t)
			attack(t, d, func(a *attackers) {
				for i := range 24 {
					a.loop(fmt.Sprintf("127.0.0.%d", 2+i%addresses), 20*time.Millisecond, func(conn net.Conn) {
						fmt.Fprintf(conn, "POST /init HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{%s", strings.Repeat(" ", 80<<10))
						go func() {
							for a.ctx.Err() == nil {
								if _, err := io.WriteString(conn, " "); err != nil {
									return
								}
								time.Sleep(200 * time.Millisecond)
							}
						}()
						stay(conn)
					})
				}
			}, func() {
				time.Sleep(500 * time.Millisecond)
				asHost(t, d, "secret", strangersFor(4*time.Second)).check(t)
			})
		})
	}
}

// A flood of connections, half of them with half a request, cuts neither a slow upload nor a slow StreamInput of the host.
func TestStrangersConnections(t *testing.T) {
	d := startLocked(t)
	duration := strangersFor(6 * time.Second)
	attack(t, d, func(a *attackers) {
		for i := range 6 {
			for range 8 {
				a.wait.Go(func() { // as many as the daemon keeps open, and more
					var open []net.Conn
					defer func() {
						for _, conn := range open {
							conn.Close()
						}
					}()
					for a.ctx.Err() == nil {
						dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i))}, Timeout: 10 * time.Second}
						conn, err := dialer.DialContext(a.ctx, "tcp", d.addr)
						if err != nil {
							time.Sleep(10 * time.Millisecond)
							continue
						}
						a.dialed.Add(1)
						conn.(*net.TCPConn).SetLinger(0)
						if len(open)%2 == 0 {
							io.WriteString(conn, "POST /init HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
						}
						if open = append(open, conn); len(open) > 200 {
							open[0].Close()
							open = open[1:]
						}
					}
				})
			}
		}
	}, func() {
		time.Sleep(200 * time.Millisecond)
		var wait sync.WaitGroup
		wait.Go(func() { slowUpload(t, d, duration) })
		wait.Go(func() { slowInput(t, d, duration) })
		asHost(t, d, "secret", duration).check(t)
		wait.Wait()
	})
}

// slowUpload sends a file in small pieces.
func slowUpload(t *testing.T, d *daemon, duration time.Duration) {
	path := publicDir(t) + "/slow"
	body, pieces := io.Pipe()
	end := time.Now().Add(duration)
	var sent int
	go func() {
		for time.Now().Before(end) {
			n, _ := io.WriteString(pieces, "slow ")
			sent += n
			time.Sleep(100 * time.Millisecond)
		}
		pieces.Close()
	}()
	request, _ := http.NewRequestWithContext(t.Context(), "POST", d.url+filesPath("path", path), body)
	request.Header.Set("Content-Type", "application/octet-stream")
	request.Header.Set("X-Access-Token", "secret")
	response, err := d.http.Do(request)
	if err != nil {
		t.Errorf("the slow upload: %v", err)
		return
	}
	defer response.Body.Close()
	if text, _ := io.ReadAll(response.Body); response.StatusCode != http.StatusOK {
		t.Errorf("the slow upload: %d %s", response.StatusCode, text)
	}
}

// slowInput streams a line now and then.
func slowInput(t *testing.T, d *daemon, duration time.Duration) {
	s := d.start(t, argv("/bin/cat"), withHeader("X-Access-Token", "secret"))
	input := d.process().StreamInput(t.Context())
	input.RequestHeader().Set("X-Access-Token", "secret")
	err := input.Send(streamTarget(byPid(s.pid)))
	lines := 0
	for end := time.Now().Add(duration); err == nil && time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		err = input.Send(streamStdin([]byte("a line\n")))
		lines++
	}
	if err == nil {
		_, err = input.CloseAndReceive()
	}
	if err != nil {
		t.Errorf("the slow input: %v", err)
		return
	}
	request := connect.NewRequest(&pb.CloseStdinRequest{Process: byPid(s.pid)})
	request.Header().Set("X-Access-Token", "secret")
	if _, err := d.process().CloseStdin(t.Context(), request); err != nil {
		t.Errorf("CloseStdin: %v", err)
	}
	if r := s.collect(); r.err != nil || len(r.stdout) != lines*len("a line\n") {
		t.Errorf("%d lines were sent, %d bytes came back, %v", lines, len(r.stdout), r.err)
	}
}

// Answers that nobody takes stay within the budget, and keep nobody else waiting.
func TestStrangersTakeNothing(t *testing.T) {
	const limit, slack = 64 << 20, 48 << 20
	for what, begin := range map[string]func(a *attackers){
		"HTTP/2 without a window": func(a *attackers) {
			for i := range 100 {
				a.loop(fmt.Sprintf("127.0.0.%d", 2+i%2), 50*time.Millisecond, func(conn net.Conn) {
					h2Flood(conn, 0, 1000, h2EndStream, "GET", "/health")
					stay(conn)
				})
			}
		},
		"HTTP/2 whose frames nobody reads": func(a *attackers) {
			for i := range 100 {
				a.loop(fmt.Sprintf("127.0.0.%d", 2+i%2), 50*time.Millisecond, func(conn net.Conn) {
					conn.Write(h2Preface(65535))
					pings := []byte(strings.Repeat(string(h2Frame(h2Ping, 0, 0, make([]byte, 8))), 1000))
					for range 1000 {
						conn.SetWriteDeadline(time.Now().Add(5 * time.Second))
						if _, err := conn.Write(pings); err != nil {
							break
						}
					}
					stayDeaf(a.ctx, conn)
				})
			}
		},
		"pipelines of HTTP/1": func(a *attackers) {
			pipeline := strings.Repeat("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 20_000)
			for i := range 3600 {
				a.loop(fmt.Sprintf("127.0.0.%d", 2+i%2), time.Second, func(conn net.Conn) {
					conn.SetWriteDeadline(time.Now().Add(time.Minute))
					io.WriteString(conn, pipeline)
					stayDeaf(a.ctx, conn)
				})
			}
		},
		"bodies in HTTP/2 that wait": func(a *attackers) {
			for i := range 100 {
				a.loop(fmt.Sprintf("127.0.0.%d", 2+i%10), 50*time.Millisecond, func(conn net.Conn) {
					h2Flood(conn, 65535, 100, 0, "POST", "/init")
					data := h2Frame(0, 0, 1, make([]byte, 16<<10))
					for i := range 400 {
						binary.BigEndian.PutUint32(data[5:], uint32(2*(i%100)+1))
						if _, err := conn.Write(data); err != nil {
							break
						}
					}
					stay(conn)
				})
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			needNoRace(t)
			d := startLocked(t, "--memory-limit", "64MiB")
			timely(t, func() error {
				var report *hostReport
				attack(t, d, begin, func() { report = asHost(t, d, "secret", strangersFor(5*time.Second)) })
				report.check(t)
				if report.health > max(250*time.Millisecond, 3*report.idle) { // what the machine is too busy for, the daemon cannot do either
					return fmt.Errorf("/health took %v, an idle server %v", report.health, report.idle)
				}
				return nil
			})
			peak := d.peakRSS()
			t.Logf("peak RSS %d MiB", peak>>20)
			if peak > limit+slack {
				t.Errorf("peak RSS %d MiB, want less than %d", peak>>20, (limit+slack)>>20)
			}
			time.Sleep(5 * time.Second)
			t.Logf("5 s later: RSS %d MiB", d.rss()>>20)
		})
	}
}

// A client that takes nothing of an answer for a time is cut; one that takes it slowly is not.
func TestAnswerTimeout(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--answer-timeout", "1s")
	deaf := func(text []byte) {
		t.Helper()
		conn, err := net.Dial("tcp", d.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.(*net.TCPConn).SetReadBuffer(4096)
		go conn.Write(text)
		waitFor(t, 15*time.Second, "the connection is cut", func() bool { return closedByPeer(conn) })
	}
	variable := fmt.Sprintf(`{"envVars":{"LARGE":"%s"}}`, strings.Repeat("x", 120_000))
	if got := d.request(t, "POST", "/init", variable); got.status != http.StatusNoContent {
		t.Fatalf("%d %s", got.status, got.body)
	}
	deaf([]byte(strings.Repeat("GET /envs HTTP/1.1\r\nHost: localhost\r\n\r\n", 500)))
	// In HTTP/2 the stream is reset, and the rest of the connection goes on.
	conn, err := net.Dial("tcp", d.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	h2Flood(conn, 0, 1, h2EndStream, "GET", "/health")
	conn.SetDeadline(time.Now().Add(15 * time.Second))
	for reader := bufio.NewReader(conn); ; {
		head := make([]byte, 9)
		if _, err := io.ReadFull(reader, head); err != nil {
			t.Fatalf("no reset: %v", err)
		}
		reader.Discard(int(binary.BigEndian.Uint32(head) >> 8))
		if reset := byte(3); head[3] == reset {
			break
		}
	}
	// Slowly: a large answer, taken a little each half second.
	dir := publicDir(t)
	for i := range 300 {
		writeFile(t, fmt.Sprintf("%s/%s-%d", dir, strings.Repeat("n", 200), i), "", 0o644)
	}
	slow, err := net.Dial("tcp", d.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	slow.(*net.TCPConn).SetReadBuffer(4096)
	body := fmt.Sprintf(`{"path":%q,"depth":1}`, dir)
	fmt.Fprintf(slow, "POST /filesystem.Filesystem/ListDir HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		len(body), body)
	slow.SetReadDeadline(time.Now().Add(60 * time.Second))
	got := 0
	for piece := make([]byte, 16<<10); ; time.Sleep(100 * time.Millisecond) {
		n, err := slow.Read(piece)
		if got += n; err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("after %d bytes: %v", got, err)
		}
	}
	if got < 100<<10 {
		t.Errorf("%d bytes", got)
	}
}

// ---- who may ask, and who is the host -------------------------------------------------------------------------------

// A web page that a developer visits can ask for nothing: neither under a name of its own that leads to this machine (DNS
// rebinding), nor by a script, an image or a link.
func TestPagesOfOthers(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	allowing := startDaemon(t, "--allow-origin", "https://a.example,http://192.168.1.2:8080")
	all := startDaemon(t, "--allow-origin", "*")
	locked := startDaemon(t)
	setToken(t, locked, "secret")
	secret := writeFile(t, publicDir(t)+"/secret", "secret", 0o600)
	ask := func(d *daemon, client *http.Client, host string, headers ...string) int {
		request, err := http.NewRequestWithContext(t.Context(), "GET", d.url+filesPath("path", secret), nil)
		if err != nil {
			t.Fatal(err)
		}
		request.Host = host
		for i := 0; i < len(headers); i += 2 {
			request.Header.Set(headers[i], headers[i+1])
		}
		request.Header.Set("X-Access-Token", "secret")
		response, err := client.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		io.Copy(io.Discard, response.Body)
		return response.StatusCode
	}
	const site = "Sec-Fetch-Site"
	for _, test := range []struct {
		host                          string
		headers                       []string
		plain, allowing, all, locked_ int
	}{
		{"", nil, 200, 200, 200, 200}, // 127.0.0.1 with its port
		{"localhost", nil, 200, 200, 200, 200},
		{"LOCALHOST.:49983", nil, 200, 200, 200, 200},
		{"envd.localhost:49983", nil, 200, 200, 200, 200},
		{"127.1.2.3", nil, 200, 200, 200, 200},
		{"[::1]:49983", nil, 200, 200, 200, 200},
		{"evil.example", nil, 403, 403, 200, 200},
		{"evil.example:49983", argv(site, "same-origin"), 403, 403, 200, 200},
		{"localhost.evil.example", nil, 403, 403, 200, 200},
		{"0.0.0.0:49983", nil, 403, 403, 200, 200},
		{"192.168.1.3:49983", nil, 403, 403, 200, 200},
		{"192.168.1.2:49983", nil, 403, 200, 200, 200},
		{"a.example", nil, 403, 200, 200, 200},
		{"localhost", argv(site, "cross-site"), 403, 403, 200, 200},
		{"localhost", argv(site, "same-site"), 403, 403, 200, 200},
		{"localhost", argv(site, "same-origin"), 200, 200, 200, 200},
		{"localhost", argv(site, "none"), 200, 200, 200, 200},
		{"localhost", argv(site, "same-site", "Origin", "http://localhost:8000"), 200, 200, 200, 200}, // examples/terminal
		{"localhost", argv(site, "cross-site", "Origin", "http://127.0.0.1:8000"), 200, 200, 200, 200},
		{"localhost", argv(site, "cross-site", "Origin", "https://a.example"), 403, 200, 200, 200},
		{"localhost", argv(site, "cross-site", "Origin", "null"), 403, 403, 200, 200},
		{"evil.example", argv(site, "same-origin", "Origin", "http://evil.example"), 403, 403, 200, 200},
	} {
		for want, d := range map[*int]*daemon{&test.plain: d, &test.allowing: allowing, &test.all: all, &test.locked_: locked} {
			for what, client := range map[string]*http.Client{"HTTP/1": d.http, "HTTP/2": d.h2} {
				if got := ask(d, client, test.host, test.headers...); got != *want {
					t.Errorf("%s, Host %q, %q: %d, want %d", what, test.host, test.headers, got, *want)
				}
			}
		}
	}
	// Who sends no Host at all is no browser.
	if got := exchange(t, d, false, "GET /health HTTP/1.0\r\n\r\n"); !strings.HasPrefix(got, "HTTP/1.0 200") {
		t.Errorf("HTTP/1.0: %q", got)
	}
}

// A container in the guest, behind a bridge or a veth of its own, is not the host; --host-address says who is.
func TestContainersAreNotTheHost(t *testing.T) {
	t.Parallel()
	guest, host := newGuest(t)
	bridged, veth, routed := newNetns(t), newNetns(t), newNetns(t)
	guest.ip(t, "link add br0 type bridge")
	guest.ip(t, "address add 172.30.0.1/24 dev br0")
	guest.ip(t, "link set br0 up")
	guest.ip(t, "link add port0 type veth peer name eth0 netns "+bridged.path())
	guest.ip(t, "link set port0 master br0 up")
	bridged.ip(t, "address add 172.30.0.2/24 dev eth0")
	bridged.ip(t, "link set eth0 up")
	guest.ip(t, "link add veth0 type veth peer name eth0 netns "+veth.path())
	guest.ip(t, "address add 172.31.0.1/24 dev veth0")
	guest.ip(t, "link set veth0 up")
	veth.ip(t, "address add 172.31.0.2/24 dev eth0")
	veth.ip(t, "link set eth0 up")
	// In a container the way to the host is a veth, too.
	guest.ip(t, "link add eth1 type veth peer name eth0 netns "+routed.path())
	guest.ip(t, "address add 172.29.0.2/24 dev eth1")
	guest.ip(t, "link set eth1 up")
	routed.ip(t, "address add 172.29.0.1/24 dev eth0")
	routed.ip(t, "link set eth0 up")
	guest.ip(t, "route add default via 172.29.0.1")

	ask := func(d *daemon, from *netns, address, method, path string) (status int) {
		t.Helper()
		waitFor(t, 20*time.Second, "an answer from "+address, func() bool {
			request, _ := http.NewRequestWithContext(t.Context(), method, fmt.Sprintf("http://%s:%d%s", address, d.port, path), nil)
			response, err := from.client().Do(request)
			if err == nil {
				response.Body.Close()
				status = response.StatusCode
			}
			return err == nil
		})
		return status
	}
	peers := []struct {
		what    string
		from    *netns
		address string
		inside  bool
	}{
		{"the host", host, guestAddress, false}, {"the gateway", routed, "172.29.0.2", false}, {"behind a bridge", bridged, "172.30.0.1", true},
		{"behind a veth", veth, "172.31.0.1", true}, {"the guest", guest, "127.0.0.1", true}, {"the guest's own address", guest, guestAddress, true},
	}
	d := startDaemonWith(t, daemonConfig{netns: guest, listen: "default", args: argv("--isnotfc=false")})
	refusing := startDaemonWith(t, daemonConfig{netns: guest, listen: "default", args: argv("--isnotfc=false", "--no-local-clients")})
	named := startDaemonWith(t, daemonConfig{netns: guest, listen: "default",
		args: argv("--isnotfc=false", "--host-address", "10.9.9.9", "--host-address", "172.30.0.0/24")})
	for _, peer := range peers {
		want, access := http.StatusNoContent, http.StatusOK
		if peer.inside {
			want, access = http.StatusForbidden, http.StatusForbidden
		}
		if got := ask(d, peer.from, peer.address, "POST", "/snapshot/prepare"); got != want {
			t.Errorf("prepare of %s: %d, want %d", peer.what, got, want)
		}
		if got := ask(refusing, peer.from, peer.address, "GET", "/envs"); got != access {
			t.Errorf("--no-local-clients, %s: %d, want %d", peer.what, got, access)
		}
		want = http.StatusForbidden
		if peer.from == bridged {
			want = http.StatusNoContent
		}
		if got := ask(named, peer.from, peer.address, "POST", "/snapshot/prepare"); got != want {
			t.Errorf("--host-address, prepare of %s: %d, want %d", peer.what, got, want)
		}
	}
	// Only the host's /health ends what it has prepared.
	ask(d, host, guestAddress, "POST", "/snapshot/prepare")
	restored := func() int { return strings.Count(d.log(), "recovered from the preparation") }
	before := restored()
	ask(d, bridged, "172.30.0.1", "GET", "/health")
	if restored() != before {
		t.Error("a container has ended the host's preparation")
	}
	ask(d, host, guestAddress, "GET", "/health")
	waitFor(t, 10*time.Second, "the recovery", func() bool { return restored() > before })
}

// Without a free descriptor nothing new can be learned of the interfaces, and the host stays the host.
func TestHostWithoutDescriptors(t *testing.T) {
	t.Parallel()
	guest, host := newGuest(t)
	d := startDaemonWith(t, daemonConfig{netns: guest, listen: "default", args: argv("--isnotfc=false", "--sync-timeout", "0s")})
	client := host.client()
	url := fmt.Sprintf("http://%s:%d", guestAddress, d.port)
	response, err := client.Get(url + "/health") // the connection stays
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, response.Body)
	response.Body.Close()
	used := len(d.ownDescriptors())
	limit := unix.Rlimit{Cur: uint64(used), Max: uint64(used)}
	if err := unix.Prlimit(d.pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond) // what was known is old by then
	response, err = client.Post(url+"/snapshot/prepare", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusNoContent {
		t.Errorf("prepare of the host: %s", response.Status)
	}
}

// What a handler leaves unread of a body is not taken for requests.
func TestUnreadBodyIsNoRequest(t *testing.T) {
	d := startDaemon(t, "--memory-limit", "32MiB")
	conn, err := net.Dial("tcp", d.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	inside := strings.Repeat("GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", 300_000)
	go fmt.Fprintf(conn, "POST /process.Process/SendInput HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"+
		"Content-Length: %d\r\n\r\n%s", len(inside), inside) // more than there is memory for
	conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	answers, _ := io.ReadAll(conn) // a reset may end it
	if n := strings.Count(string(answers), "HTTP/1.1 "); n != 1 || !strings.HasPrefix(string(answers), "HTTP/1.1 429 ") {
		t.Errorf("%d answers to one request, the first %.60q", n, answers)
	}
}

// Many connections that come at once are not taken for those of strangers before their first request has been read.
func TestManyConnectionsWithTheToken(t *testing.T) {
	for _, c := range []struct {
		limit   string
		streams int
	}{{"64MiB", 300}, {"256MiB", 500}} {
		t.Run(c.limit, func(t *testing.T) {
			d := startLocked(t, "--memory-limit", c.limit)
			var all sync.WaitGroup
			var good atomic.Int64
			for range c.streams {
				all.Go(func() {
					client := &http.Client{Transport: &http.Transport{DialContext: d.dial, DisableKeepAlives: true}}
					request := connect.NewRequest(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/sleep", Args: []string{"3"}}, Stdin: new(bool)})
					request.Header().Set("X-Access-Token", "secret")
					stream, err := pb.NewProcessClient(client, d.url).Start(t.Context(), request)
					if err != nil {
						t.Error(err)
						return
					}
					defer stream.Close()
					ended := false
					for stream.Receive() {
						ended = ended || stream.Msg().GetEvent().GetEnd().GetExited()
					}
					if stream.Err() == nil && ended {
						good.Add(1)
					} else {
						t.Error(stream.Err())
					}
				})
			}
			all.Wait()
			if n := good.Load(); n != int64(c.streams) {
				t.Errorf("%d of %d streams came to their end", n, c.streams)
			}
		})
	}
}

// accepted is a connection from a loopback address, as the server has it.
func accepted(t *testing.T, cs *connections, listener net.Listener, from net.IP) (*connection, context.Context) {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: from}}
	client, err := dialer.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	conn, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := &connection{TCPConn: conn.(*net.TCPConn)}
	return c, cs.accept(t.Context(), c)
}

// newConnections has a token and a budget, and a listener for its connections.
func newConnections(t *testing.T, limit int64) (*connections, net.Listener) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	cs := &connections{budget: newBudget(limit), token: &accessToken{}, open: map[*connection]bool{}, peers: map[netip.Addr]*peer{}}
	cs.token.set("secret")
	return cs, listener
}

// Whatever peers connect, from however many addresses: who has shown the token keeps its connections, and finds room for requests.
func TestNewcomersDisplaceNobody(t *testing.T) {
	cs, listener := newConnections(t, 16<<20)
	host := net.IPv4(127, 0, 0, 1)
	var served []*connection
	request := func(c *connection, ctx context.Context) {
		t.Helper()
		a := cs.begin(ctx, c, true, true)
		if a.refusal != nil {
			t.Fatalf("the host's request beside %d newcomers: %v", len(cs.open)-len(served), a.refusal)
		}
		t.Cleanup(func() { cs.end(c, a) })
	}
	for range 4 {
		c, ctx := accepted(t, cs, listener, host)
		for range 10 {
			request(c, ctx)
		}
		served = append(served, c)
	}
	for i := range 400 {
		accepted(t, cs, listener, net.IPv4(127, 0, 1, byte(1+i%250)))
		if i%40 == 0 { // the host comes, too
			c, ctx := accepted(t, cs, listener, host)
			request(c, ctx)
			served = append(served, c)
		}
	}
	if len(cs.open) >= 400 {
		t.Fatalf("%d connections are open: there was room for all", len(cs.open))
	}
	for i, c := range served {
		if !cs.open[c] {
			t.Errorf("the host's connection %d was closed for one that has shown nothing", i)
		}
	}
}

// A client that takes all that there is for clients keeps no other out.
func TestClientsDisplaceNoNewcomer(t *testing.T) {
	cs, listener := newConnections(t, 16<<20)
	hog, ctx := accepted(t, cs, listener, net.IPv4(127, 0, 0, 2))
	ask := func(c *connection, ctx context.Context, shown bool) error {
		a := cs.begin(ctx, c, shown, shown)
		t.Cleanup(func() { cs.end(c, a) })
		return a.refusal
	}
	first := cs.begin(ctx, hog, true, true)
	for ask(hog, ctx, true) == nil {
	}
	cs.end(hog, first)
	c, ctxOf := accepted(t, cs, listener, net.IPv4(127, 0, 0, 1)) // it has the last room
	if ask(hog, ctx, true) == nil {
		t.Error("the hog has room again")
	}
	accepted(t, cs, listener, net.IPv4(127, 0, 0, 2))
	accepted(t, cs, listener, net.IPv4(127, 0, 0, 3))
	if !cs.open[c] {
		t.Fatal("a connection was closed before its request came, for others")
	}
	if err := ask(c, ctxOf, false); err != nil {
		t.Errorf("a request without the token: %v", err)
	}
	if !cs.open[hog] {
		t.Error("the hog was displaced by one who has shown nothing")
	}
	if err := ask(c, ctxOf, true); err != nil && err != errRoomSoon {
		t.Errorf("a request with the token: %v", err)
	}
}

// A place that is given up goes to the peer that has fewest, not to who has waited longest.
func TestMeasureIsSharedByPeers(t *testing.T) {
	cs, listener := newConnections(t, 64<<20)
	m := newMeasure(cs, 8)
	place := func(from net.IP) *measured {
		t.Helper()
		c, _ := accepted(t, cs, listener, from)
		p := &measured{c, make(chan struct{})}
		if !m.queue(p) {
			t.Fatal("too many wait")
		}
		return p
	}
	has := func(p *measured) bool {
		select {
		case <-p.ready:
			return true
		default:
			return false
		}
	}
	for i := range 24 { // six peers: two places each at most, eight in all
		place(net.IPv4(127, 0, 0, byte(2+i%6)))
	}
	host := net.IPv4(127, 0, 0, 1)
	first := place(host)
	second := place(host)
	if !has(first) || len(m.taken) != 8 {
		t.Fatalf("the host has no place of %d", len(m.taken))
	}
	if has(second) {
		t.Fatal("the host has two places, while six peers have to share six")
	}
	m.leave(first)
	if !has(second) {
		t.Error("the host's place went to a peer that had one")
	}
	if len(m.taken) != 8 {
		t.Errorf("%d places are taken", len(m.taken))
	}
}

// What is counted for a peer is given back, whatever its requests and connections have shown meanwhile.
func TestPeersAreCountedInBalance(t *testing.T) {
	cs, listener := newConnections(t, 64<<20)
	for order := range 4 {
		c, ctx := accepted(t, cs, listener, net.IPv4(127, 0, 0, 1))
		requests := []admission{cs.begin(ctx, c, false, order&1 == 0), cs.begin(ctx, c, false, order&1 == 1), cs.begin(ctx, c, order&2 == 0, false)}
		if order == 3 {
			cs.vouch(c, requests[0].memory)
		}
		for _, a := range requests {
			if a.refusal != nil {
				t.Errorf("refused: %v", a.refusal)
			}
			cs.end(c, a)
		}
		cs.changed(c, http.StateIdle)
		cs.changed(c, http.StateClosed)
		c.Close()
	}
	if used, _ := cs.budget.inUse(); used != 0 || len(cs.peers) != 0 || cs.number != [standings]int{} || cs.unpaid != 0 {
		t.Errorf("nothing is open, and %d bytes are used, %d peers known, %d connections, %d refused", used, len(cs.peers), cs.number, cs.unpaid)
	}
}
