// /init beyond the token and the environment of an open daemon: who may set the token in a guest, the event server's name,
// certificates, volumes, the clock, the order of effects, and bodies of every kind.

package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// ---- the token -----------------------------------------------------------------------------------------------------

func TestTokenMatrix(t *testing.T) {
	t.Parallel()
	const stored, other, failed, noReset = "stored", "other", "access token validation failed", "access token reset not authorized"
	d, mmds := startGuestDaemon(t, daemonConfig{})
	vouch := func(hash string) { mmds.put(fmt.Sprintf(`{"instanceID":"cl-1","accessTokenHash":%q}`, hash)) }
	sent := func(token string) string {
		if token == "" {
			return "{}"
		}
		return fmt.Sprintf(`{"accessToken":%q}`, token)
	}
	vouched, none := hashOf, ""
	for _, row := range []struct{ stored, request, hash, refused, after string }{
		// no hash
		{"", "", none, "", ""}, {"", other, none, "", other}, {stored, stored, none, "", stored},
		{stored, other, none, failed, stored}, {stored, "", none, noReset, stored},
		// the hash of what is asked for
		{"", other, vouched(other), "", other}, {stored, other, vouched(other), "", other}, {stored, stored, vouched(stored), "", stored},
		{"", "", vouched(""), "", ""}, {stored, "", vouched(""), "", ""},
		// another hash
		{"", other, vouched("x"), failed, ""}, {"", "", vouched("x"), noReset, ""}, {stored, other, vouched("x"), failed, stored},
		{stored, "", vouched("x"), noReset, stored}, {stored, stored, vouched("x"), "", stored},
		{"", other, vouched(""), failed, ""}, {stored, other, vouched(""), failed, stored}, {stored, stored, vouched(""), "", stored},
		{stored, "", vouched(stored), noReset, stored}, {stored, other, vouched(stored), failed, stored}, {"", "", vouched(other), noReset, ""},
		// no hash at all, but something in its place: it vouches for nobody
		{"", other, strings.ToUpper(hashOf(other)), failed, ""}, {"", other, " ", failed, ""}, {stored, other, other, failed, stored},
		{"", other, hashOf(other) + " ", failed, ""},
	} {
		what := fmt.Sprintf("stored %q, sent %q, hash %.8q", row.stored, row.request, row.hash)
		vouch(hashOf(row.stored))
		d.initialise(t, sent(row.stored))
		vouch(row.hash)
		body := sent(row.request)
		got := d.request(t, "POST", "/init", strings.Replace(body, "}", `,"envVars":{"MARK":"1"}}`, 1), "X-Access-Token", other)
		if row.request == "" {
			got = d.request(t, "POST", "/init", `{"envVars":{"MARK":"1"}}`, "X-Access-Token", stored)
		}
		want := map[bool]int{true: 204, false: 401}[row.refused == ""]
		if got.status != want || strings.TrimSpace(got.body) != row.refused || got.header.Get("X-Envd-Version") != version ||
			want == 401 && !strings.HasPrefix(got.header.Get("Content-Type"), "text/plain") {
			t.Errorf("%s: %d %q %v, want %d %q", what, got.status, got.body, got.header, want, row.refused)
		}
		for token, opens := range map[string]bool{"": row.after == "", stored: row.after == stored || row.after == "", other: row.after == other || row.after == ""} {
			var headers []string
			if token != "" {
				headers = argv("X-Access-Token", token)
			}
			if got := d.request(t, "GET", "/envs", "", headers...); (got.status == 200) != opens {
				t.Errorf("%s: then %q opens: %d, want %t", what, token, got.status, opens)
			}
		}
	}
	// The holder is not looked up.
	vouch(hashOf(stored))
	d.initialise(t, sent(stored))
	waitEnvWith(t, d, stored)
	asked := mmds.asked.Load()
	mmds.misbehave(silence)
	began := time.Now()
	d.initialise(t, sent(stored))
	if took := time.Since(began); took > time.Second {
		t.Errorf("the holder waited %v for the metadata service", took)
	}
	if again := mmds.asked.Load() - asked; again > 1 { // the poll for new ids
		t.Errorf("asked %d times", again)
	}
}

// waitEnvWith waits until the poll of the last /init has ended.
func waitEnvWith(t testing.TB, d *daemon, token string) {
	t.Helper()
	lines := func() int { return strings.Count(d.log(), "the host named the sandbox") }
	before := lines()
	d.initialise(t, fmt.Sprintf(`{"accessToken":%q}`, token))
	waitFor(t, 5*time.Second, "the ids once more", func() bool { return lines() > before })
	waitFor(t, 5*time.Second, "no more polls", func() bool { n := lines(); time.Sleep(3 * mmdsInterval); return n == lines() })
}

// ---- bodies --------------------------------------------------------------------------------------------------------

func TestInitTypes(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	values := map[string]string{"number": "7", "true": "true", "string": `"text"`, "array": `["a"]`, "object": `{"a":"b"}`, "float": "1e999"}
	fits := map[string][]string{"accessToken": {"string"}, "envVars": {"object"}, "defaultUser": {"string"}, "defaultWorkdir": {"string"},
		"hyperloopIP": {"string"}, "HyperloopIp": {"string"}, "timestamp": {}, "volumeMounts": {}, "lifecycleID": {"string"}, "caBundle": {}}
	for field, ok := range fits {
		for name, value := range values {
			if slices.Contains(ok, name) {
				continue
			}
			body := fmt.Sprintf(`{"envVars":{"LEAKED":"1"},%q:%s}`, field, value)
			if field == "envVars" {
				body = fmt.Sprintf(`{"defaultUser":"leaked",%q:%s}`, field, value)
			}
			got := d.request(t, "POST", "/init", body)
			wantEnvelope(t, "/init "+body, got, http.StatusBadRequest, "")
			if name != "float" && !strings.Contains(strings.ToLower(got.body), strings.ToLower(field)) {
				t.Errorf("/init %s: %q does not name the field", body, got.body)
			}
		}
		d.initialise(t, fmt.Sprintf(`{%q:null}`, field))
	}
	many := strings.Repeat(`{"nfs_target":"a:/b","path":"/c"},`, maxJobs)
	for _, body := range []string{
		`{"volumeMounts":[7]}`, `{"volumeMounts":[null]}`, `{"volumeMounts":[{}]}`, `{"volumeMounts":[{"nfs_target":"a:/b"}]}`,
		`{"volumeMounts":[{"nfs_target":"a:/b","path":""}]}`, `{"volumeMounts":[{"nfs_target":"a:/b","path":"c"}]}`,
		`{"volumeMounts":[{"nfs_target":"a:/b","path":"./c"}]}`, `{"volumeMounts":[{"nfs_target":"a:/b","path":"~/c"}]}`,
		`{"volumeMounts":[{"nfs_target":7,"path":"/c"}]}`, `{"volumeMounts":[{"nfs_target":"a:/b","path":["/c"]}]}`,
		`{"volumeMounts":[{"nfs_target":"a:/b","path":"/c\u0000d"}]}`, `{"volumeMounts":{"nfs_target":"a:/b","path":"/c"}}`,
		`{"volumeMounts":[` + many + `{"nfs_target":"a:/b","path":"/c"}]}`,
		`{"caBundle":"none"}`, `{"caBundle":"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}`,
		`{"caBundle":"-----BEGIN CERTIFICATE-----\n"}`, `{"caBundle":"-----BEGIN RSA PRIVATE KEY-----\nAAAA\n-----END RSA PRIVATE KEY-----\n"}`,
		`{"envVars":{"A":"` + strings.Repeat("x", 128<<10) + `"}}`, `{"envVars":{"A":"` + strings.Repeat("x", 10<<20) + `"}}`,
		`{"envVars":{"A":"1"}` + strings.Repeat(" ", 10<<20) + `}`, `{"defaultUser":"` + strings.Repeat("x", 10<<20) + `"}`,
		`{"envVars":` + strings.Repeat(`{"A":`, 100_000) + `}`, `{"volumeMounts":` + strings.Repeat(`[`, 100_000) + `}`,
	} {
		wantEnvelope(t, fmt.Sprintf("/init %.100s", body), d.request(t, "POST", "/init", body), http.StatusBadRequest, "")
	}
	wantJSON(t, "/envs", d.request(t, "GET", "/envs", "").body, `{"WRENN_SANDBOX":"false"}`)
	// The largest variable that is taken can be given to a program.
	d.initialise(t, `{"envVars":{"A":"`+strings.Repeat("x", variableLimit-len("A="))+`"}}`)
	if got := d.output(t, sh("echo ${#A}")); got != fmt.Sprintln(variableLimit-2) {
		t.Errorf("a process sees a variable of %q bytes", got)
	}
}

// What is accepted has been understood: put into a body again, it is accepted as the same.
func FuzzInit(f *testing.F) {
	for _, seed := range []string{``, `{}`, `{"accessToken":"a","envVars":{"A":"1"},"timestamp":"2025-01-01T00:00:00.5+02:00"}`,
		`{"hyperloopIp":"::1","volumeMounts":[{"nfs_target":"[::1]:/x","path":"/y"}],"lifecycleID":"x"}`,
		`{"defaultUser":"u","defaultWorkdir":"~/w","unknown":[{}]}`, "{\"caBundle\":\"-----BEGIN CERTIFICATE-----\\nAAAA\\n\"}"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		req, err := parseInit(body)
		if err != nil {
			if err.Error() == "" || len(err.Error()) > 1000 {
				t.Errorf("%q", err)
			}
			return
		}
		fields := map[string]any{"envVars": req.env, "defaultUser": req.DefaultUser, "defaultWorkdir": req.DefaultWorkdir,
			"hyperloopIP": req.HyperloopIP, "volumeMounts": req.VolumeMounts, "caBundle": req.CABundle}
		if req.Timestamp != nil {
			fields["timestamp"] = *req.Timestamp
		}
		for name, value := range req.env {
			if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
				t.Errorf("a variable %q=%q", name, value)
			}
		}
		again, err := json.Marshal(fields)
		if err != nil {
			t.Fatal(err)
		}
		req2, err := parseInit(again)
		if err != nil || !maps.Equal(req2.env, req.env) || req2.CABundle != req.CABundle || !req2.timestamp.Equal(req.timestamp) ||
			!slices.Equal(req2.VolumeMounts, req.VolumeMounts) || req2.HyperloopIP != req.HyperloopIP {
			t.Errorf("%q: %v, %+v; was %+v", again, err, req2, req)
		}
	})
}

// ---- order of effects, clock, lock ---------------------------------------------------------------------------------

// bareInit is the service without a daemon around it; what it calls is recorded.
func bareInit(t testing.TB, guest bool) (s *initService, events *[]string) {
	s = &initService{version: version, token: &accessToken{}, settings: &settings{env: map[string]string{}}, files: &fileService{users: &userDB{}},
		runDir: t.TempDir(), guest: guest, lock: make(chan struct{}, 1), learned: func(metadata) {}}
	events = &[]string{}
	note := func(event string) { *events = append(*events, event) }
	s.thaw = func() { note(fmt.Sprintf("thaw %v", s.settings.env)) }
	s.setClock = func(to time.Time) { note("clock " + to.UTC().Format(time.DateOnly)) }
	s.lookup = func(context.Context) (leave func(), err error) { return func() {}, nil }
	s.resume = func(parts ...[]byte) { note(fmt.Sprintf("resume %q", parts)) }
	return s, events
}

func TestOrderOfEffects(t *testing.T) {
	t.Parallel()
	s, events := bareInit(t, true)
	s.token.set("secret")
	s.settings.setSystem("SANDBOX_ID", "cl-1")
	do := func(body string) error {
		req, err := parseInit([]byte(body))
		if err != nil {
			t.Fatal(err)
		}
		*events = nil
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return s.process(ctx, req, time.Now())
	}
	newer, older := `{"accessToken":"secret","timestamp":"2035-01-01T00:00:00Z","envVars":{"A":"1"}}`, `{"accessToken":"secret","timestamp":"2034-01-01T00:00:00Z","envVars":{"A":"2"}}`
	for _, step := range []struct {
		body string
		want []string
	}{
		{newer, argv("thaw map[WRENN_SANDBOX_ID:cl-1]", "clock 2035-01-01", fmt.Sprintf(`resume ["cl-1" "" "2035-01-01 00:00:00 +0000 UTC" %q]`, newer))},
		{older, argv("thaw map[A:1 WRENN_SANDBOX_ID:cl-1]", fmt.Sprintf(`resume ["cl-1" "" "2034-01-01 00:00:00 +0000 UTC" %q]`, older))}, // stale: neither clock nor data
	} {
		if err := do(step.body); err != nil || !slices.Equal(*events, step.want) {
			t.Errorf("%s: %v\n%q, want\n%q", step.body, err, *events, step.want)
		}
	}
	if got := s.settings.environment()["A"]; got != "1" {
		t.Errorf("A=%s", got)
	}
	s.stopPolling(time.Time{})
	s.guest = false // no metadata, no clock
	if err := do(newer); err != nil || len(*events) != 2 {
		t.Errorf("%v, %q", err, *events)
	}
	if err := do(`{"accessToken":"wrong"}`); err == nil || len(*events) != 0 {
		t.Errorf("refused: %v, %q", err, *events)
	}
	// Who cannot have the lock in time is told so.
	s.lock <- struct{}{}
	req, _ := parseInit([]byte(newer))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.process(ctx, req, time.Now()); !errors.Is(err, errBusy) {
		t.Errorf("without the lock: %v", err)
	}
}

func TestClockThresholds(t *testing.T) {
	t.Parallel()
	for skew, stepped := range map[time.Duration]bool{0: false, -30 * time.Millisecond: false, 30 * time.Millisecond: false, 4 * time.Second: false,
		-100 * time.Millisecond: true, -time.Hour: true, 6 * time.Second: true, time.Hour: true} {
		s, _ := bareInit(t, true)
		var to time.Time
		s.setClock = func(at time.Time) {
			if clearlyWrong(time.Until(at)) {
				to = at
			}
		}
		s.token.set("secret")
		arrived := time.Now().Add(-3 * time.Second) // it waited for its turn, which is no skew
		host := arrived.Add(-skew).Round(0)
		req := &initRequest{token: "secret", timestamp: host, Timestamp: new(string)}
		if err := s.apply(t.Context(), req, arrived); err != nil {
			t.Fatal(err)
		}
		if to.IsZero() == stepped {
			t.Errorf("the guest is %v ahead: stepped %t, want %t", skew, !to.IsZero(), stepped)
		}
		if off := time.Since(to) - skew; stepped && (off < -time.Second || off > time.Second) {
			t.Errorf("the guest is %v ahead: stepped to %v, %v off", skew, to, off)
		}
	}
}

// ---- the event server's name ---------------------------------------------------------------------------------------

var hostsTable = []struct{ name, before, ip, after string }{
	{"empty", "", "10.0.0.1", "10.0.0.1\tevents.wrenn.local\n"},
	{"others stay", "127.0.0.1 localhost\n::1\tlocalhost ip6-localhost # loop\n", "10.0.0.1", "127.0.0.1 localhost\n::1\tlocalhost ip6-localhost # loop\n10.0.0.1\tevents.wrenn.local\n"},
	{"no newline at the end", "127.0.0.1 localhost", "10.0.0.1", "127.0.0.1 localhost\n10.0.0.1\tevents.wrenn.local\n"},
	{"already so", "10.0.0.1  \tevents.wrenn.local  # x\n# end", "10.0.0.1", "10.0.0.1  \tevents.wrenn.local  # x\n# end"},
	{"already so, in other letters", "10.0.0.1 a Events.Wrenn.Local\n", "10.0.0.1", "10.0.0.1 a Events.Wrenn.Local\n"},
	{"another address", "10.0.0.9\tevents.wrenn.local\n127.0.0.1 a\n", "10.0.0.1", "127.0.0.1 a\n10.0.0.1\tevents.wrenn.local\n"},
	{"another address, more names", "10.0.0.9 a events.wrenn.local b # c\n", "10.0.0.1", "10.0.0.9\ta b # c\n10.0.0.1\tevents.wrenn.local\n"},
	{"another address, comment", "10.0.0.9 events.wrenn.local # c\n", "10.0.0.1", " # c\n10.0.0.1\tevents.wrenn.local\n"},
	{"several", "10.0.0.9 events.wrenn.local\n10.0.0.1 events.wrenn.local\n10.0.0.8 events.wrenn.local\n", "10.0.0.1", "10.0.0.1 events.wrenn.local\n"},
	{"the other family stays", "fe80::1 events.wrenn.local\n10.0.0.9 events.wrenn.local\n", "10.0.0.1", "fe80::1 events.wrenn.local\n10.0.0.1\tevents.wrenn.local\n"},
	{"IPv6", "fd00::9 events.wrenn.local\n10.0.0.9 events.wrenn.local\n", "fd00::1", "10.0.0.9 events.wrenn.local\nfd00::1\tevents.wrenn.local\n"},
	{"IPv6, other spelling", "fd00:0::0:1 events.wrenn.local\n", "fd00::1", "fd00:0::0:1 events.wrenn.local\n"},
	{"IPv4 in IPv6", "10.0.0.9 events.wrenn.local\n", "::ffff:10.0.0.1", "10.0.0.1\tevents.wrenn.local\n"},
	{"only in a comment", "# 10.0.0.9 events.wrenn.local\n10.0.0.9 a # events.wrenn.local\n", "10.0.0.1", "# 10.0.0.9 events.wrenn.local\n10.0.0.9 a # events.wrenn.local\n10.0.0.1\tevents.wrenn.local\n"},
	{"part of a name", "10.0.0.9 xevents.wrenn.local events.wrenn.locals\n", "10.0.0.1", "10.0.0.9 xevents.wrenn.local events.wrenn.locals\n10.0.0.1\tevents.wrenn.local\n"},
	{"nonsense", "\x00\xff events.wrenn.local\nevents.wrenn.local\n\n", "10.0.0.1", "\x00\xff events.wrenn.local\nevents.wrenn.local\n\n10.0.0.1\tevents.wrenn.local\n"},
}

func TestHyperloop(t *testing.T) {
	t.Parallel()
	needRoot(t)
	for _, e2b := range []bool{false, true} {
		d := startDaemonWith(t, daemonConfig{args: argv(fmt.Sprintf("--e2b-names=%t", e2b)), files: map[string]string{"/etc/hosts": ""}})
		file := filepath.Join(filepath.Dir(d.logFile), "hosts") // mounted over /etc/hosts: it cannot be replaced
		for i, c := range hostsTable {
			d.initialise(t, `{"hyperloopIP":"192.0.2.1"}`)
			waitEnv(t, d, "WRENN_EVENTS_ADDRESS", "http://192.0.2.1")
			writeFile(t, file, c.before, 0o644)
			ip := netip.MustParseAddr(c.ip).Unmap()
			url := "http://" + ip.String()
			if ip.Is6() {
				url = "http://[" + ip.String() + "]"
			}
			d.initialise(t, fmt.Sprintf(`{%q:%q}`, []string{"hyperloopIP", "hyperloopIp", "HYPERLOOPIP"}[i%3], c.ip))
			waitEnv(t, d, "WRENN_EVENTS_ADDRESS", url)
			if e2b {
				waitEnv(t, d, "E2B_EVENTS_ADDRESS", url)
				if text, _ := os.ReadFile(file); strings.Count(string(text), ip.String()+"\tevents.e2b.local\n") != 1 {
					t.Errorf("%s: %q", c.name, text)
				}
				continue
			}
			if text, err := os.ReadFile(file); err != nil || string(text) != c.after {
				t.Errorf("%s: %q, %v; want %q", c.name, text, err, c.after)
			}
			if got := pointHost(c.after, "events.wrenn.local", ip); got != c.after {
				t.Errorf("%s: once more: %q", c.name, got)
			}
		}
	}
	// No address: logged, and nothing else happens. No file: the variable is not set.
	d := startDaemonWith(t, daemonConfig{files: map[string]string{"/etc/hosts": "", "/etc/group": ""}})
	for _, bad := range []string{"x", "10.0.0", "10.0.0.1:80", "fe80::1%eth0", "10.0.0.1 evil", "10.0.0.1\n10.0.0.2 x"} {
		text, _ := json.Marshal(map[string]string{"hyperloopIP": bad})
		d.initialise(t, string(text))
	}
	writeFile(t, filepath.Join(filepath.Dir(d.logFile), "hosts"), strings.Repeat("#", systemFileLimit), 0o644)
	d.initialise(t, `{"hyperloopIP":"10.0.0.1"}`)
	waitFor(t, 5*time.Second, "the failure logged", func() bool { return strings.Contains(d.log(), "the event server has no name") })
	if got := d.envs(t)["WRENN_EVENTS_ADDRESS"]; got != "" {
		t.Errorf("WRENN_EVENTS_ADDRESS=%s", got)
	}
	if got := strings.Count(d.log(), "hyperloopIP is no address"); got != 6 {
		t.Errorf("%d complaints, want 6:\n%s", got, d.log())
	}
}

type hostsMapping struct{ address, name string }

// concerns tells whether it gives the name an address of that family.
func (m hostsMapping) concerns(name string, ip netip.Addr) bool {
	at, err := netip.ParseAddr(m.address)
	return err == nil && at.Unmap().Is4() == ip.Is4() && strings.EqualFold(m.name, name)
}

// hostsMeaning is what a hosts file says: each mapping, and how often.
func hostsMeaning(text string) map[hostsMapping]int {
	meaning := map[hostsMapping]int{}
	for line := range strings.Lines(text) {
		entry, _, _ := strings.Cut(line, "#")
		fields := strings.Fields(entry)
		for _, name := range fields[min(1, len(fields)):] {
			meaning[hostsMapping{fields[0], name}]++
		}
	}
	return meaning
}

func othersMeaning(text, name string, ip netip.Addr) map[hostsMapping]int {
	meaning := hostsMeaning(text)
	maps.DeleteFunc(meaning, func(m hostsMapping, _ int) bool { return m.concerns(name, ip) })
	return meaning
}

// Whatever the file holds: afterwards the name has one address of that family, every other name has what it had, and a second time
// changes nothing.
func FuzzPointHost(f *testing.F) {
	for _, c := range hostsTable {
		f.Add(c.before, c.ip)
	}
	f.Fuzz(func(t *testing.T, before, address string) {
		ip, err := netip.ParseAddr(address)
		if ip = ip.Unmap(); err != nil || ip.Zone() != "" {
			return
		}
		const name = "events.wrenn.local"
		after := pointHost(before, name, ip)
		if again := pointHost(after, name, ip); again != after {
			t.Errorf("once more: %q, first %q", again, after)
		}
		if meant, means := othersMeaning(before, name, ip), othersMeaning(after, name, ip); !maps.Equal(meant, means) {
			t.Errorf("%q became %q", before, after)
		}
		has := hostsMeaning(after)
		maps.DeleteFunc(has, func(m hostsMapping, _ int) bool { return !m.concerns(name, ip) })
		if len(has) == 0 {
			t.Errorf("%q: the name has no address", after)
		}
		for m := range has {
			if at, _ := netip.ParseAddr(m.address); at.Unmap() != ip {
				t.Errorf("%q: the name has another address", after)
			}
		}
	})
}

// ---- certificates --------------------------------------------------------------------------------------------------

func newCA(t testing.TB, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour), IsCA: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// startDaemonWithCerts starts one whose directories of certificates are the test's: those of the bundle, and of what is added.
func startDaemonWithCerts(t testing.TB, steps ...string) (d *daemon, certs, added string) {
	t.Helper()
	needRoot(t)
	certs, added = publicDir(t), publicDir(t)
	if err := os.MkdirAll("/usr/local/share/ca-certificates", 0o755); err != nil {
		t.Fatal(err)
	}
	return startDaemonWith(t, daemonConfig{files: map[string]string{"/etc/hosts": ""},
		steps: append([]string{"mount", certs + ":/etc/ssl/certs", "mount", added + ":/usr/local/share/ca-certificates"}, steps...)}), certs, added
}

func TestCABundle(t *testing.T) {
	t.Parallel()
	d, certs, added := startDaemonWithCerts(t)
	bundle, note := filepath.Join(certs, "ca-certificates.crt"), filepath.Join(added, "e2b-ca.crt")
	a, b, c := newCA(t, "a"), newCA(t, "b"), newCA(t, "c")
	distribution := "# of the distribution\n" + newCA(t, "d")
	install := func(ca, wantBundle, wantNote string) {
		t.Helper()
		text, _ := json.Marshal(map[string]string{"caBundle": ca})
		d.initialise(t, string(text))
		wantFile(t, bundle, wantBundle)
		waitFor(t, 5*time.Second, "noted", func() bool { got, _ := os.ReadFile(note); return string(got) == wantNote })
	}
	install(a, "\n"+a, a) // there was none
	writeFile(t, bundle, distribution, 0o640)
	os.Remove(note)
	install(a, distribution+a, a)
	before, _ := os.Stat(bundle)
	install(a, distribution+a, a) // the same: nothing is written
	if after, _ := os.Stat(bundle); !os.SameFile(before, after) || !after.ModTime().Equal(before.ModTime()) || after.Mode() != 0o640 {
		t.Errorf("written again: %v, %v", before, after)
	}
	install(strings.ReplaceAll("some text\n\n"+b+"\n\n"+c+"\n\n", "\n", "\r\n"), distribution+b+c, b+c) // a is gone
	install("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"+b, distribution+b, b)      // a key is nobody's to read
	install(b+"-----BEGIN CERTIFICATE-----\ncut", distribution+b, b)                                    // would end the bundle for its readers
	if err := d.stop(t); err != nil {
		t.Error(err)
	}
	entries, _ := os.ReadDir(certs)
	if len(entries) != 1 {
		t.Errorf("left beside the bundle: %v", entries)
	}
}

// The bundle is never broken: not by a mount on it, a link, a daemon that knows nothing of the one before, or a full disk.
func TestCABundleElsewhere(t *testing.T) {
	t.Parallel()
	a, b, distribution := newCA(t, "a"), newCA(t, "b"), newCA(t, "d")
	body := func(ca string) string {
		text, _ := json.Marshal(map[string]string{"caBundle": ca})
		return string(text)
	}
	t.Run("mount", func(t *testing.T) {
		t.Parallel()
		file := writeFile(t, filepath.Join(publicDir(t), "bundle"), distribution, 0o644)
		certs := publicDir(t)
		target := writeFile(t, filepath.Join(certs, "ca-certificates.crt"), "", 0o644)
		d, added := (*daemon)(nil), publicDir(t)
		d = startDaemonWith(t, daemonConfig{files: map[string]string{"/etc/hosts": ""}, steps: argv("mount", file+":"+target,
			"mount", target+":"+target, "mount", added+":/usr/local/share/ca-certificates", "mount", certs+":/etc/ssl/certs", "mount", file+":/etc/ssl/certs/ca-certificates.crt")})
		d.initialise(t, body(a))
		wantFile(t, file, distribution+a)
	})
	t.Run("link", func(t *testing.T) {
		t.Parallel()
		d, certs, _ := startDaemonWithCerts(t)
		real := writeFile(t, filepath.Join(publicDir(t), "tls.pem"), distribution, 0o644)
		if err := os.Symlink(real, filepath.Join(certs, "ca-certificates.crt")); err != nil {
			t.Fatal(err)
		}
		d.initialise(t, body(a))
		wantFile(t, real, distribution+a)
	})
	t.Run("restarted", func(t *testing.T) {
		t.Parallel()
		d, certs, added := startDaemonWithCerts(t)
		writeFile(t, filepath.Join(certs, "ca-certificates.crt"), distribution+a, 0o644)
		writeFile(t, filepath.Join(added, "e2b-ca.crt"), a, 0o644)
		d.initialise(t, body(b))
		wantFile(t, filepath.Join(certs, "ca-certificates.crt"), distribution+b)
	})
	t.Run("the distribution's own", func(t *testing.T) {
		t.Parallel()
		d, certs, _ := startDaemonWithCerts(t)
		bundle := writeFile(t, filepath.Join(certs, "ca-certificates.crt"), distribution, 0o644)
		d.initialise(t, body(distribution))
		d.initialise(t, body(b))
		wantFile(t, bundle, distribution+b)
	})
	t.Run("read-only", func(t *testing.T) {
		t.Parallel()
		d, certs, _ := startDaemonWithCerts(t)
		if err := os.Mkdir(filepath.Join(certs, "ca-certificates.crt"), 0o755); err != nil {
			t.Fatal(err)
		}
		got := d.request(t, "POST", "/init", `{"envVars":{"LEAKED":"1"},`+body(a)[1:])
		if got.status != 400 || !strings.HasPrefix(got.header.Get("Content-Type"), "text/plain") || !strings.Contains(got.body, "ca-certificates.crt") {
			t.Errorf("/init: %d %q", got.status, got.body)
		}
		wantJSON(t, "/envs", d.request(t, "GET", "/envs", "").body, `{"WRENN_SANDBOX":"false"}`)
	})
}

// ---- volumes -------------------------------------------------------------------------------------------------------

func TestNFSTargets(t *testing.T) {
	for target, host := range map[string]string{
		"server:/export": "server", "server:/": "server", "10.0.0.1:/a b/c:/d": "10.0.0.1", "[fd00::1]:/x": "fd00::1", "a.b.c:/x,y=z": "a.b.c",
		"": "", ":/x": "", "server": "", "server:": "", "server:export": "", "/export": "", "fd00::1:/x": "", "[fd00::1:/x": "", "fd00::1]:/x": "",
		"[server]:/x": "", "[10.0.0.1]:/x": "", "[]:/x": "", "a/b:/x": "", "a b:/x": "", "a\x00:/x": "", "a:/x\x00": "", "a:/" + strings.Repeat("x", unix.PathMax): "",
	} {
		got, err := volumeMount{target, "/mnt"}.server()
		if got != host || (err == nil) != (host != "") || err != nil && len(err.Error()) > 300 {
			t.Errorf("%.50q: %q, %v; want %q", target, got, err, host)
		}
	}
	for ip, want := range map[string]string{
		"10.0.0.1": "mountproto=tcp,mountport=2049,proto=tcp,port=2049,nfsvers=3,noacl,nolock,addr=10.0.0.1,mountaddr=10.0.0.1",
		"fd00::1":  "mountproto=tcp6,mountport=2049,proto=tcp6,port=2049,nfsvers=3,noacl,nolock,addr=fd00::1,mountaddr=fd00::1",
	} {
		if got := nfsOptions(netip.MustParseAddr(ip)); got != want {
			t.Errorf("%s: %s", ip, got)
		}
	}
}

// The last line of a path is what is topmost there. Kernel: fs/proc_namespace.c, show_mountinfo.
func TestIsMounted(t *testing.T) {
	const table = `21 1 254:0 / / rw - ext4 /dev/root rw
30 21 0:40 / /vol rw,relatime shared:1 - nfs 10.0.0.1:/a rw,vers=3
31 21 0:41 / /root rw - nfs4 10.0.0.1:/ rw
32 21 0:42 / /with\040space\134 rw - nfs 10.0.0.1:/a\040b rw
33 21 0:43 / /covered rw - nfs 10.0.0.1:/a rw
34 33 0:44 / /covered rw - tmpfs tmpfs rw
35 21 0:45 / /bare rw - tmpfs 10.0.0.1:/a rw
36 21 0:46 / /again rw - tmpfs tmpfs rw
37 36 0:47 / /again rw master:1 propagate_from:2 - nfs 10.0.0.1:/a rw
short
`
	for _, c := range []struct {
		target, path string
		want         bool
	}{
		{"10.0.0.1:/a", "/vol", true}, {"10.0.0.1:/a/", "/vol", true}, {"10.0.0.1:/b", "/vol", false}, {"10.0.0.2:/a", "/vol", false},
		{"10.0.0.1:/a", "/vo", false}, {"10.0.0.1:/a", "/vol/x", false}, {"10.0.0.1:/", "/root", true}, {`10.0.0.1:/a b`, `/with space\`, true},
		{"10.0.0.1:/a", "/covered", false}, {"10.0.0.1:/a", "/bare", false}, {"10.0.0.1:/a", "/again", true}, {"/dev/root", "/", false},
	} {
		if got := isMounted(table, c.target, c.path); got != c.want {
			t.Errorf("%s on %s: %t", c.target, c.path, got)
		}
	}
	if mountTable() == "" {
		t.Error("no table")
	}
}

// Servers that refuse, are nowhere, or take a connection and say nothing: /init answers at once, once more at the same path as well.
func TestNFSNeverHoldsInitUp(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	n.ip(t, "link add hole type veth peer name deep")
	n.ip(t, "link set deep up")
	n.ip(t, "link set hole up")
	n.ip(t, "route add 10.0.0.0/8 dev hole")
	n.ip(t, "neighbour add 10.0.0.1 lladdr 02:00:00:00:00:01 dev hole")
	d := startDaemonWith(t, daemonConfig{netns: n})
	base := publicDir(t)
	for i := range 100 {
		target := []string{"10.0.0.1:/x", "127.0.0.1:/x", "[::1]:/x", "192.0.2.1:/x", "no.such.host:/x"}[i%5]
		began := time.Now()
		d.initialise(t, fmt.Sprintf(`{"volumeMounts":[{"nfs_target":%q,"path":"%s/%d"}]}`, target, base, i%60))
		if took := time.Since(began); took > 2*time.Second {
			t.Errorf("/init took %v", took)
		}
	}
	d.healthy(t)
	if entries, _ := os.ReadDir(base); len(entries) != 0 {
		t.Errorf("made for servers that are not there: %v", entries)
	}
	if !strings.Contains(d.log(), "too many volumes are being mounted") || d.threads() > 60 {
		t.Errorf("%d threads", d.threads())
	}
}

// As far as a kernel without NFS goes: the server has been found and the directory made; mount(2) says what it lacks.
func TestNFSMount(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	n.listen(t, "127.0.0.1:2049")
	n.listen(t, "[::1]:2049")
	d := startDaemonWith(t, daemonConfig{netns: n})
	base := publicDir(t)
	link := filepath.Join(base, "link")
	if err := errors.Join(os.Symlink("/etc", link), os.Lchown(link, uidUser, uidUser)); err != nil {
		t.Fatal(err)
	}
	d.initialise(t, fmt.Sprintf(`{"volumeMounts":[{"nfs_target":"127.0.0.1:/x","path":"%s/a/b/"},{"nfs_target":"[::1]:/x","path":"%[1]s/c"},
		{"nfs_target":"127.0.0.1:/x","path":"%[1]s/link/x"}]}`, base))
	waitFor(t, 5*time.Second, "the link refused", func() bool {
		return strings.Contains(d.log(), "the way leads over a link") || strings.Contains(d.log(), "link/x")
	})
	if _, err := os.Stat("/etc/x"); err == nil {
		t.Error("/etc/x was made by way of a link")
	}
	for _, dir := range []string{"a/b", "c"} {
		waitFor(t, 5*time.Second, "made: "+dir, func() bool { info, err := os.Stat(filepath.Join(base, dir)); return err == nil && info.IsDir() })
	}
	systems, err := os.ReadFile("/proc/filesystems")
	if err != nil || strings.Contains(string(systems), "nfs") {
		return // it is waiting for a server that says nothing
	}
	waitFor(t, 5*time.Second, "mount(2) called", func() bool { return strings.Count(d.log(), "mount: no such device") == 2 })
}

// ---- files that never answer ---------------------------------------------------------------------------------------

// A file system that hangs under /etc holds up neither /init nor anybody else: certificates are refused for the time being, the
// event server's name waits.
func TestInitOnAHangingFilesystem(t *testing.T) {
	needRoot(t)
	dir := publicDir(t)
	abort := hungFUSE(t, dir, true, false)
	d := startDaemonWith(t, daemonConfig{files: map[string]string{"/etc/group": ""},
		steps: argv("mount", dir+":/etc/ssl/certs", "mount", dir+":/usr/local/share")})
	t.Cleanup(abort)
	text, _ := json.Marshal(map[string]string{"caBundle": newCA(t, "a")})
	for range 2 {
		began := time.Now()
		got := make(chan httpReply)
		go func() { got <- d.request(t, "POST", "/init", string(text)) }()
		time.Sleep(100 * time.Millisecond) // it hangs by now
		health := time.Now()
		d.healthy(t)
		if took := time.Since(health); took > time.Second {
			t.Errorf("/health took %v", took)
		}
		reply := <-got
		if took := time.Since(began); reply.status != http.StatusServiceUnavailable || took > filePatience+2*time.Second {
			t.Errorf("after %v: %d %q", took, reply.status, reply.body)
		}
	}
	threads := d.threads()
	for range 20 {
		began := time.Now()
		d.initialise(t, `{"envVars":{"A":"1"}}`)
		if took := time.Since(began); took > time.Second {
			t.Errorf("/init without certificates took %v", took)
		}
	}
	if now := d.threads(); now > threads+5 {
		t.Errorf("%d threads, %d before", now, threads)
	}
	abort() // the file system is gone, and so is what waited
	waitFor(t, 10*time.Second, "certificates are tried again", func() bool { return d.request(t, "POST", "/init", string(text)).status == http.StatusBadRequest })
}
