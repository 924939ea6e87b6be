// Metadata: a service of the test's own on the real address, in a network namespace; what the daemon makes of it, and of one
// that means harm.

package main

import (
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// testMMDS is a metadata service, version 2, that the test fills. hostile answers in its place.
type testMMDS struct {
	t        testing.TB
	netns    *netns
	asked    atomic.Int64 // for a token
	mu       sync.Mutex   // protects what follows
	data     string       // "": 404, as before the host has put anything there
	hostile  http.HandlerFunc
	sessions map[string]bool
}

func startMMDS(t testing.TB, n *netns) *testMMDS {
	t.Helper()
	n.ip(t, "address add 169.254.169.254/32 dev lo")
	m := &testMMDS{t: t, netns: n, sessions: map[string]bool{"token": true}}
	server := &http.Server{Handler: m}
	listener := n.listen(t, "169.254.169.254:80")
	go server.Serve(listener)
	t.Cleanup(func() { server.Close() })
	return m
}

func (m *testMMDS) put(data string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.data, m.hostile = data, nil
}

func (m *testMMDS) misbehave(h http.HandlerFunc) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.hostile = h
}

func (m *testMMDS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.Method == "PUT" {
		m.asked.Add(1)
	}
	if h := m.hostile; h != nil {
		m.mu.Unlock()
		defer m.mu.Lock()
		h(w, r)
		return
	}
	if !r.Close {
		m.t.Errorf("%s %s: the connection is to be kept", r.Method, r.URL)
	}
	switch r.Method + " " + r.URL.Path {
	case "PUT /latest/api/token":
		if got := r.Header.Get("X-metadata-token-ttl-seconds"); got != "60" {
			m.t.Errorf("a token for %q seconds", got)
		}
		token := strconv.Itoa(len(m.sessions))
		m.sessions[token] = true
		io.WriteString(w, token)
	case "GET /":
		if !m.sessions[r.Header.Get("X-metadata-token")] || r.Header.Get("Accept") != "application/json" {
			m.t.Errorf("the metadata were asked for with %v", r.Header)
		}
		if m.data == "" {
			http.NotFound(w, r)
			return
		}
		io.WriteString(w, m.data)
	default:
		m.t.Errorf("unexpected: %s %s", r.Method, r.URL)
	}
}

func hashOf(token string) string {
	sum := sha512.Sum512([]byte(token))
	return hex.EncodeToString(sum[:])
}

// startGuestDaemon starts one that takes itself to be in a Firecracker guest, with its own network and metadata service.
func startGuestDaemon(t testing.TB, config daemonConfig) (*daemon, *testMMDS) {
	t.Helper()
	config.netns = newNetns(t)
	mmds := startMMDS(t, config.netns)
	config.args = append([]string{"--isnotfc=false"}, config.args...)
	return startDaemonWith(t, config), mmds
}

func (d *daemon) envs(t testing.TB, headers ...string) map[string]string {
	t.Helper()
	var envs map[string]string
	got := d.request(t, "GET", "/envs", "", headers...)
	if err := json.Unmarshal([]byte(got.body), &envs); err != nil {
		t.Fatalf("/envs: %d %q", got.status, got.body)
	}
	return envs
}

func (d *daemon) initialise(t testing.TB, body string) {
	t.Helper()
	if got := d.request(t, "POST", "/init", body); got.status != http.StatusNoContent {
		t.Fatalf("/init %.200s: %d %q", body, got.status, got.body)
	}
}

func waitEnv(t testing.TB, d *daemon, name, value string) {
	t.Helper()
	waitFor(t, 15*time.Second, name+"="+value, func() bool { return d.envs(t)[name] == value })
}

func wantFile(t testing.TB, path, content string) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || string(got) != content {
		t.Errorf("%s: %q, %v; want %q", path, got, err, content)
	}
}

func TestMMDS(t *testing.T) {
	t.Parallel()
	for _, e2b := range []bool{false, true} {
		t.Run(fmt.Sprintf("e2b names %t", e2b), func(t *testing.T) {
			t.Parallel()
			d, mmds := startGuestDaemon(t, daemonConfig{args: argv(fmt.Sprintf("--e2b-names=%t", e2b))})
			wantNames := func(values map[string]string) {
				t.Helper()
				want := map[string]string{}
				for name, value := range values {
					want["WRENN_"+name] = value
					wantFile(t, filepath.Join(d.runDir, ".WRENN_"+name), value)
					mirror := filepath.Join(filepath.Dir(d.runDir), "e2b", ".E2B_"+name)
					if e2b {
						want["E2B_"+name] = value
						wantFile(t, mirror, value)
					} else if _, err := os.Stat(mirror); err == nil {
						t.Errorf("there is %s", mirror)
					}
				}
				text, _ := json.Marshal(want)
				wantJSON(t, "/envs", d.request(t, "GET", "/envs", "").body, string(text))
			}
			// Before the host has said anything, and when it says nothing of use, the daemon serves and asks on.
			for _, data := range []string{"", "{}", `{"instanceID":""}`, `{"envID":"tmpl"}`, "null"} {
				mmds.put(data)
				before := mmds.asked.Load()
				waitFor(t, 5*time.Second, "asked again", func() bool { return mmds.asked.Load() > before+2 })
			}
			wantNames(map[string]string{"SANDBOX": "true"})
			mmds.put(`{"instanceID":"cl-1","envID":"tmpl","what":["ever"]}`)
			waitEnv(t, d, "WRENN_SANDBOX_ID", "cl-1")
			waitFor(t, 5*time.Second, "both files", func() bool { return strings.Contains(d.log(), `"sandbox":"cl-1"`) })
			wantNames(map[string]string{"SANDBOX": "true", "SANDBOX_ID": "cl-1", "TEMPLATE_ID": "tmpl"})
			for name, mode := range map[string]os.FileMode{".WRENN_SANDBOX": 0o444, ".WRENN_SANDBOX_ID": 0o644} {
				if info, err := os.Stat(filepath.Join(d.runDir, name)); err != nil || info.Mode() != mode {
					t.Errorf("%s: %v, want mode %v", name, info.Mode(), mode)
				}
			}
			asked := mmds.asked.Load()
			time.Sleep(4 * mmdsInterval) // nothing may happen
			if again := mmds.asked.Load() - asked; again != 0 {
				t.Errorf("asked %d times more after it was answered", again)
			}
			// A clone is told new ids; its host calls /init, maybe before it has them.
			mmds.put("")
			d.initialise(t, "")
			mmds.put(`{"instanceID":"cl-2","envID":""}`)
			waitEnv(t, d, "WRENN_SANDBOX_ID", "cl-2")
			waitFor(t, 5*time.Second, "both files", func() bool { return strings.Contains(d.log(), `"sandbox":"cl-2"`) })
			wantNames(map[string]string{"SANDBOX": "true", "SANDBOX_ID": "cl-2", "TEMPLATE_ID": ""})
			if got := d.output(t, sh("echo $WRENN_SANDBOX_ID$E2B_SANDBOX_ID")); got != map[bool]string{false: "cl-2\n", true: "cl-2cl-2\n"}[e2b] {
				t.Errorf("a process sees %q", got)
			}
			// The names are the daemon's; E2B's are anyone's where they mean nothing.
			d.initialise(t, `{"envVars":{"WRENN_SANDBOX_ID":"x","WRENN_TEMPLATE_ID":"x","WRENN_SANDBOX":"x","WRENN_EVENTS_ADDRESS":"x","E2B_SANDBOX_ID":"x"}}`)
			envs := d.envs(t)
			if envs["WRENN_SANDBOX_ID"] != "cl-2" || envs["WRENN_SANDBOX"] != "true" || envs["WRENN_EVENTS_ADDRESS"] != "" ||
				envs["E2B_SANDBOX_ID"] != map[bool]string{false: "x", true: "cl-2"}[e2b] {
				t.Errorf("/envs: %v", envs)
			}
		})
	}
}

// Without a guest nobody is asked, and nobody waits.
func TestNoMetadataOutsideAGuest(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	mmds := startMMDS(t, n)
	mmds.put(`{"instanceID":"cl-1","accessTokenHash":"` + hashOf("other") + `"}`)
	d := startDaemonWith(t, daemonConfig{netns: n})
	d.initialise(t, `{"accessToken":"secret"}`)
	time.Sleep(4 * mmdsInterval) // nothing may happen
	if asked := mmds.asked.Load(); asked != 0 {
		t.Errorf("asked %d times", asked)
	}
}

func trickle(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body) // else the server does not notice that the client leaves
	for r.Context().Err() == nil {
		io.WriteString(w, " ")
		http.NewResponseController(w).Flush()
		time.Sleep(100 * time.Millisecond)
	}
}

func flood(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	for r.Context().Err() == nil {
		w.Write(make([]byte, 64<<10))
	}
}

func silence(w http.ResponseWriter, r *http.Request) {
	io.Copy(io.Discard, r.Body)
	<-r.Context().Done()
}

// onlyData misbehaves for the data; a token is given out.
func onlyData(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "PUT" {
			io.WriteString(w, "token")
			return
		}
		h(w, r)
	}
}

func says(status int, text string, headers ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		for i := 0; i < len(headers); i += 2 {
			w.Header()[headers[i]] = []string{headers[i+1]}
		}
		w.WriteHeader(status)
		io.WriteString(w, text)
	}
}

func TestHostileMMDS(t *testing.T) {
	t.Parallel()
	const good = `{"instanceID":"wrong","envID":"wrong"}`
	raw := func(text string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			conn, _, _ := http.NewResponseController(w).Hijack()
			defer conn.Close()
			io.WriteString(conn, text)
		}
	}
	for name, h := range map[string]http.HandlerFunc{
		"endless token": flood, "slow token": trickle, "no answer": silence, "no token": says(200, ""), "500": says(500, good),
		"redirected token": says(307, "", "Location", "http://169.254.169.254/else"),
		"bad token":        says(200, "a\r\nX-Evil: 1"),
		"endless data":     onlyData(flood), "slow data": onlyData(trickle), "no data": onlyData(silence),
		"redirect to itself": onlyData(says(302, good, "Location", "/")),
		"redirect": onlyData(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path == "/else" {
				io.WriteString(w, good)
				return
			}
			http.Redirect(w, r, "/else", http.StatusFound)
		}),
		"404": onlyData(says(404, good)), "201": onlyData(says(201, good)), "500 for data": onlyData(says(500, good)),
		"array": onlyData(says(200, "["+good+"]")), "number": onlyData(says(200, "7")), "cut": onlyData(says(200, good[:20])),
		"two":   onlyData(says(200, good+good)),
		"types": onlyData(says(200, `{"instanceID":7}`)), "types of others": onlyData(says(200, `{"instanceID":"wrong","address":[]}`)),
		"control characters": onlyData(says(200, `{"instanceID":"a\u0000b"}`)),
		"more than it may":   onlyData(says(200, strings.Repeat(" ", mmdsLimit)+good)),
		"gzip":               onlyData(says(200, "\x1f\x8b\x08", "Content-Encoding", "gzip")),
		"endless header":     raw("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<20)), "no HTTP": raw("ssh\n"),
		"closed": raw(""), "many early answers": raw(strings.Repeat("HTTP/1.1 103 Early Hints\r\n\r\n", 1000)),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			config := daemonConfig{netns: newNetns(t), args: argv("--isnotfc=false")}
			mmds := startMMDS(t, config.netns)
			mmds.misbehave(h)
			d := startDaemonWith(t, config)
			waitFor(t, 5*time.Second, "asked", func() bool { return mmds.asked.Load() > 0 })
			// /init waits for the hash, but not for ever, and then there is none.
			answered := make(chan httpReply, 1)
			go func() { answered <- d.request(t, "POST", "/init", `{"envVars":{"A":"1"}}`) }()
			var got httpReply
			for waiting := true; waiting; {
				select {
				case got = <-answered:
					waiting = false
				case <-time.After(10 * time.Millisecond):
					began := time.Now()
					d.healthy(t)
					if took := time.Since(began); took > time.Second {
						t.Errorf("/health took %v", took)
					}
				}
			}
			if got.status != http.StatusNoContent {
				t.Errorf("/init: %d %q", got.status, got.body)
			}
			wantJSON(t, "/envs", d.request(t, "GET", "/envs", "").body, `{"WRENN_SANDBOX":"true","A":"1"}`)
			if peak := d.peakRSS(); peak > 80<<20 && !raceEnabled() {
				t.Errorf("the daemon took %d MiB", peak>>20)
			}
			mmds.put(`{"instanceID":"right"}`)
			d.initialise(t, "")
			waitEnv(t, d, "WRENN_SANDBOX_ID", "right")
		})
	}
}

func cpuTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if err != nil || len(fields) < 13 {
		t.Fatal(err)
	}
	return time.Duration(atoi(t, fields[11])+atoi(t, fields[12])) * 10 * time.Millisecond // USER_HZ is 100
}

// While nobody answers, asking costs next to nothing.
func TestPollingIsCheap(t *testing.T) {
	t.Parallel()
	for name, setUp := range map[string]func(n *netns){
		"no route": func(n *netns) {},
		"refused":  func(n *netns) { n.ip(t, "address add 169.254.169.254/32 dev lo") },
		"black hole": func(n *netns) {
			n.ip(t, "link add hole type veth peer name deep")
			n.ip(t, "link set deep up")
			n.ip(t, "link set hole up")
			n.ip(t, "route add 169.254.169.254/32 dev hole")
			n.ip(t, "neighbour add 169.254.169.254 lladdr 02:00:00:00:00:01 dev hole")
		},
		"nothing there yet": func(n *netns) { startMMDS(t, n) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNetns(t)
			setUp(n)
			d := startDaemonWith(t, daemonConfig{netns: n, args: argv("--isnotfc=false")})
			before, began := cpuTime(t, d.pid), time.Now()
			time.Sleep(3 * time.Second) // what it costs then is measured
			used, share := cpuTime(t, d.pid)-before, 0.0
			share = 100 * float64(used) / float64(time.Since(began))
			t.Logf("%v of CPU in %v: %.1f%%", used, time.Since(began).Round(time.Millisecond), share)
			if share > 8 && !raceEnabled() {
				t.Errorf("polling takes %.1f%% of a CPU", share)
			}
		})
	}
}

// Whoever has no token cannot hold up whoever has it by making the daemon ask a service that does not answer.
func TestSlowMMDSHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	d, mmds := startGuestDaemon(t, daemonConfig{})
	mmds.put(`{"instanceID":"cl-1"}`)
	d.initialise(t, `{"accessToken":"secret"}`)
	mmds.misbehave(silence)
	const crowd = 20
	var strangers sync.WaitGroup
	for range crowd {
		strangers.Go(func() {
			if got := d.request(t, "POST", "/init", `{"accessToken":"guess"}`); got.status != 401 && got.status != 503 {
				t.Errorf("a stranger: %d %q", got.status, got.body)
			}
		})
	}
	before := mmds.asked.Load()
	waitFor(t, 5*time.Second, "asked for the strangers", func() bool { return mmds.asked.Load() >= before+2 }) // a quarter of 8 is for one address
	for range 10 {
		began := time.Now()
		d.initialise(t, `{"accessToken":"secret","envVars":{"A":"1"}}`)
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("/init with the token took %v", took)
		}
	}
	mmds.put(`{"instanceID":"cl-1"}`)
	strangers.Wait()
	// A client that leaves does not set a token by leaving.
	mmds.put(`{"instanceID":"cl-1","accessTokenHash":"` + hashOf("") + `"}`)
	d.initialise(t, "")
	mmds.misbehave(silence)
	before = mmds.asked.Load()
	conn, err := d.dial(t.Context(), "tcp", d.addr)
	if err != nil {
		t.Fatal(err)
	}
	const body = `{"accessToken":"left"}`
	fmt.Fprintf(conn, "POST /init HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	waitFor(t, 5*time.Second, "asked", func() bool { return mmds.asked.Load() > before })
	conn.(*net.TCPConn).SetLinger(0)
	conn.Close()
	mmds.put(`{"instanceID":"cl-1"}`)
	d.initialise(t, "")
	if got := d.request(t, "GET", "/envs", ""); got.status != http.StatusOK {
		t.Errorf("/envs: %d", got.status)
	}
}
