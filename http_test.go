// The HTTP surface: /health, /envs, /init, CORS, who may ask and in which order that is checked, and the protocols and
// codecs in which the Process service answers.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

const (
	unauthorized = `{"code":401,"message":"unauthorized access, please provide a valid access token or method signing ` +
		`if supported"}` + "\n"
	notFound = "404 page not found\n"
)

// wantEnvelope checks an error of a plain HTTP endpoint; message "" stands for any text.
func wantEnvelope(t *testing.T, what string, got httpReply, status int, message string) {
	t.Helper()
	var envelope map[string]any
	if err := json.Unmarshal([]byte(got.body), &envelope); err != nil || !strings.HasSuffix(got.body, "}\n") {
		t.Errorf("%s: %d, body %q is no envelope", what, got.status, got.body)
		return
	}
	text, _ := envelope["message"].(string)
	if got.status != status || envelope["code"] != float64(status) || len(envelope) != 2 ||
		text == "" || message != "" && text != message {
		t.Errorf("%s: %d %q, want %d with message %q", what, got.status, got.body, status, message)
	}
	if got.header.Get("Content-Type") != "application/json; charset=utf-8" ||
		got.header.Get("X-Content-Type-Options") != "nosniff" {
		t.Errorf("%s: headers %v", what, got.header)
	}
}

func setToken(t *testing.T, d *daemon, token string) {
	t.Helper()
	if got := d.request(t, "POST", "/init", fmt.Sprintf(`{"accessToken":%q}`, token)); got.status != http.StatusNoContent {
		t.Fatalf("/init: %d %q", got.status, got.body)
	}
}

func TestHealth(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for _, client := range []*http.Client{d.http, d.h2} {
		response, err := client.Get(d.url + "/health")
		if err != nil {
			t.Fatal(err)
		}
		var body bytes.Buffer
		body.ReadFrom(response.Body)
		response.Body.Close()
		if response.StatusCode != 200 || body.String() != `{"version":"0.7.0"}`+"\n" {
			t.Errorf("%s: %d %q", response.Proto, response.StatusCode, body.String())
		}
		if response.Header.Get("Content-Type") != "application/json" || response.Header.Get("Cache-Control") != "no-store" {
			t.Errorf("%s: headers %v", response.Proto, response.Header)
		}
	}
	if got := d.request(t, "GET", "/health?x=1", ""); got.status != 200 {
		t.Errorf("with a query: %d", got.status)
	}
}

func TestEnvs(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	got := d.request(t, "GET", "/envs", "")
	wantJSON(t, "/envs", got.body, `{"WRENN_SANDBOX":"false"}`)
	if got.status != 200 || got.header.Get("Content-Type") != "application/json" ||
		got.header.Get("Cache-Control") != "no-store" {
		t.Errorf("%d, headers %v", got.status, got.header)
	}
}

func TestUnknownRoutesAndMethods(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for _, request := range []string{"GET /", "GET /nope", "POST /nope", "GET /health/", "POST /process.Process/Nope",
		"POST /no.Service/List", "GET /process.Process/", "DELETE /nope", "POST /process.Process"} {
		method, path, _ := strings.Cut(request, " ")
		got := d.request(t, method, path, "")
		if got.status != 404 || got.body != notFound || !strings.HasPrefix(got.header.Get("Content-Type"), "text/plain") {
			t.Errorf("%s: %d %q %v, want 404 text/plain %q", request, got.status, got.body, got.header, notFound)
		}
	}
	for request, allow := range map[string]string{
		"POST /health": "GET", "PUT /envs": "GET", "HEAD /metrics": "GET", "GET /init": "POST", "DELETE /init": "POST", "OPTIONS /init": "POST",
		"GET /process.Process/List": "POST", "PUT /process.Process/Start": "POST", "GET /process.Process/Start": "POST",
	} {
		method, path, _ := strings.Cut(request, " ")
		got := d.request(t, method, path, "")
		if got.status != 405 || !slices.Contains(got.header.Values("Allow"), allow) {
			t.Errorf("%s: %d, Allow %q; want 405 and a line %q", request, got.status, got.header.Values("Allow"), allow)
		}
	}
	for request := range maps.Keys(map[string]bool{"POST /health": true, "GET /init": true}) {
		method, path, _ := strings.Cut(request, " ")
		got := d.request(t, method, path, "")
		if got.body != "" && !strings.HasPrefix(got.header.Get("Content-Type"), "text/plain") {
			t.Errorf("%s: %q as %s, want an empty body or text", request, got.body, got.header.Get("Content-Type"))
		}
	}
}

// ---- CORS ---------------------------------------------------------------------------------------------------------

func TestPreflight(t *testing.T) {
	t.Parallel()
	open, locked := startDaemon(t), startDaemon(t)
	setToken(t, locked, "secret")
	const origin = "http://localhost:3000"
	for _, path := range []string{"/health", "/envs", "/init", "/nope", "/process.Process/Start", "/files"} {
		for name, d := range map[string]*daemon{"open": open, "token": locked} {
			for _, method := range []string{"HEAD", "GET", "POST", "PUT", "PATCH", "DELETE"} {
				got := d.request(t, "OPTIONS", path, "", "Origin", origin, "Access-Control-Request-Method", method,
					"Access-Control-Request-Headers", "x-access-token,content-type,X-Whatever")
				want := map[string]string{
					"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": method,
					"Access-Control-Allow-Headers": "x-access-token,content-type,X-Whatever", "Access-Control-Max-Age": "7200",
				}
				checkPreflight(t, name+" "+method+" "+path, got, want)
			}
			checkPreflight(t, name+" "+path+": no headers asked for",
				d.request(t, "OPTIONS", path, "", "Origin", origin, "Access-Control-Request-Method", "POST"),
				map[string]string{"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "POST",
					"Access-Control-Max-Age": "7200"})
			checkPreflight(t, name+" "+path+": method not allowed",
				d.request(t, "OPTIONS", path, "", "Origin", origin, "Access-Control-Request-Method", "TRACE"), nil)
			checkPreflight(t, name+" "+path+": no origin",
				d.request(t, "OPTIONS", path, "", "Access-Control-Request-Method", "POST"), nil)
		}
	}
	// From anywhere once there is a token, and with a user that does not exist: preflights never reach a check.
	checkPreflight(t, "foreign", locked.request(t, "OPTIONS", "/envs", "", "Origin", "https://app.example",
		"Access-Control-Request-Method", "GET", "Authorization", basicAuth("nosuch")), map[string]string{
		"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "GET", "Access-Control-Max-Age": "7200"})
}

func checkPreflight(t *testing.T, what string, got httpReply, want map[string]string) {
	t.Helper()
	if got.status != http.StatusNoContent || got.body != "" {
		t.Errorf("%s: %d %q, want 204", what, got.status, got.body)
	}
	headers := map[string]string{}
	for key, values := range got.header {
		if strings.HasPrefix(key, "Access-Control-") {
			headers[key] = strings.Join(values, ", ")
		}
	}
	if !maps.Equal(headers, want) {
		t.Errorf("%s: %v, want %v", what, headers, want)
	}
	vary := tokens(got.header.Values("Vary"))
	for _, name := range []string{"origin", "access-control-request-method", "access-control-request-headers"} {
		if !slices.Contains(vary, name) {
			t.Errorf("%s: Vary %q lacks %s", what, vary, name)
		}
	}
}

// tokens splits list headers, in lower case.
func tokens(values []string) (list []string) {
	for word := range strings.SplitSeq(strings.Join(values, ","), ",") {
		list = append(list, strings.ToLower(strings.TrimSpace(word)))
	}
	return list
}

func TestCORSOnAnswers(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	setToken(t, d, "secret")
	const token = "X-Access-Token"
	for _, test := range []struct {
		request, body string
		status        int
		headers       []string
	}{
		{"GET /health", "", 200, nil},
		{"GET /envs", "", 200, argv(token, "secret")},
		{"GET /envs", "", 401, nil},
		{"GET /nope", "", 404, argv(token, "secret")},
		{"POST /init", "{", 400, nil},
		{"POST /process.Process/List", "{}", 200, argv(token, "secret", "Content-Type", "application/json")},
		{"POST /process.Process/List", "{}", 401, argv("Content-Type", "application/json")},
		{"GET /health", "", 401, argv("Authorization", basicAuth("nosuch"))},
		{"OPTIONS /health", "", 401, nil}, // without Access-Control-Request-Method a request like any other
		{"OPTIONS /health", "", 405, argv(token, "secret")},
	} {
		method, path, _ := strings.Cut(test.request, " ")
		with := d.request(t, method, path, test.body, append(argv("Origin", "https://app.example"), test.headers...)...)
		without := d.request(t, method, path, test.body, test.headers...)
		what := fmt.Sprintf("%s %v", test.request, test.headers)
		if with.status != test.status || without.status != test.status {
			t.Errorf("%s: %d with an origin, %d without, want %d", what, with.status, without.status, test.status)
		}
		if got := with.header.Values("Access-Control-Allow-Origin"); !slices.Equal(got, []string{"*"}) {
			t.Errorf("%s: Access-Control-Allow-Origin %q", what, got)
		}
		if without.header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s: Access-Control-Allow-Origin without Origin", what)
		}
		if with.header.Get("Access-Control-Allow-Credentials") != "" {
			t.Errorf("%s: credentials allowed", what)
		}
		exposed := tokens(with.header.Values("Access-Control-Expose-Headers"))
		for _, name := range []string{"grpc-status", "grpc-message", "grpc-status-details-bin", "location", "cache-control",
			"x-content-type-options", "connect-content-encoding", "connect-protocol-version", "grpc-encoding",
			"envd-output-offset", "envd-output-lost"} {
			if !slices.Contains(exposed, name) {
				t.Errorf("%s: %s is not exposed: %q", what, name, exposed)
			}
		}
		for _, answer := range []httpReply{with, without} {
			if !slices.Contains(tokens(answer.header.Values("Vary")), "origin") {
				t.Errorf("%s: Vary %q lacks Origin", what, answer.header.Values("Vary"))
			}
		}
	}
}

// ---- who may ask --------------------------------------------------------------------------------------------------

func TestOriginRule(t *testing.T) {
	t.Parallel()
	open, locked := startDaemon(t), startDaemon(t)
	allowing := startDaemon(t, "--allow-origin", "https://a.example,https://b.example:8443")
	setToken(t, locked, "secret")
	get := func(d *daemon, origin string) httpReply {
		return d.request(t, "GET", "/envs", "", "Origin", origin, "X-Access-Token", "secret")
	}
	for _, origin := range []string{"http://localhost", "http://localhost:3000", "https://localhost:3000",
		"http://127.0.0.1:8080", "http://127.9.9.9", "http://[::1]:3000", "http://[::1]"} {
		if got := get(open, origin); got.status != 200 {
			t.Errorf("loopback origin %s: %d %q, want 200", origin, got.status, got.body)
		}
	}
	for _, origin := range []string{"https://a.example", "http://localhost.a.example", "http://127.0.0.1.a.example",
		"http://10.0.0.1", "null", "http://a.example:49983", "http://localhost@a.example", "file://", "nonsense"} {
		wantEnvelope(t, "origin "+origin, get(open, origin), http.StatusForbidden, "")
		if got := get(locked, origin); got.status != 200 {
			t.Errorf("origin %s with the token: %d, want 200", origin, got.status)
		}
	}
	for origin, status := range map[string]int{"https://a.example": 200, "https://b.example:8443": 200,
		"http://a.example": 403, "https://b.example": 403, "https://c.example": 403, "http://localhost:1": 200} {
		if got := get(allowing, origin); got.status != status {
			t.Errorf("--allow-origin, origin %s: %d, want %d", origin, got.status, status)
		}
	}
	// The rule covers what matters: no command by a foreign page.
	marker := publicDir(t) + "/ran"
	got := open.request(t, "POST", "/process.Process/Start",
		frame{0, fmt.Sprintf(`{"process":{"cmd":"touch","args":[%q]}}`, marker)}.bytes(),
		"Content-Type", "application/connect+json", "Origin", "https://a.example")
	if _, err := os.Stat(marker); got.status != http.StatusForbidden || err == nil {
		t.Errorf("Start with a foreign origin: %d, command ran: %v", got.status, err == nil)
	}
}

func TestNoLocalClients(t *testing.T) {
	t.Parallel()
	d := startDaemonWith(t, daemonConfig{listen: "default", args: argv("--no-local-clients")})
	hosts := []string{"127.0.0.1"}
	addresses, _ := net.InterfaceAddrs()
	for _, address := range addresses {
		if prefix, ok := address.(*net.IPNet); ok && prefix.IP.To4() != nil && !prefix.IP.IsLoopback() {
			hosts = append(hosts, prefix.IP.String())
		}
	}
	for _, host := range hosts {
		base := fmt.Sprintf("http://%s:%d", host, d.port)
		_, err := pb.NewProcessClient(d.http, base).List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
		if connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("a client at %s: %v, want 403", host, err)
		}
		request, _ := http.NewRequestWithContext(t.Context(), "GET", base+"/envs", nil)
		wantEnvelope(t, "a client at "+host, d.do(t, request), http.StatusForbidden, "")
	}
}

func TestAccessToken(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	setToken(t, d, "secret")
	for _, request := range []string{"GET /envs", "GET /nope", "HEAD /health", "POST /health", "GET /health/", "GET /init",
		"GET /metrics", "PUT /files", "POST /files/compose", "GET /files/", "GET /snapshot/prepare", "OPTIONS /health",
		"POST /process.Process/List", "POST /process.Process/Start", "POST /process.Process/Nope"} {
		method, path, _ := strings.Cut(request, " ")
		for what, headers := range map[string][]string{
			"no token": nil, "a wrong one": argv("X-Access-Token", "secreT"), "a longer one": argv("X-Access-Token", "secret1"),
			"an empty one": argv("X-Access-Token", ""), "as bearer": argv("Authorization", "Bearer secret"),
		} {
			got := d.request(t, method, path, "", headers...)
			what = request + " with " + what
			if method == "HEAD" {
				if got.status != 401 {
					t.Errorf("%s: %d, want 401", what, got.status)
				}
			} else if got.body != unauthorized {
				t.Errorf("%s: %d %q, want 401 %q", what, got.status, got.body, unauthorized)
			} else {
				wantEnvelope(t, what, got, 401, "")
			}
		}
	}
	// Exempt, whatever answers them.
	for _, request := range []string{"GET /health", "GET /health?x=1", "POST /init"} {
		method, path, _ := strings.Cut(request, " ")
		got := d.request(t, method, path, `{"accessToken":"secret"}`)
		if got.body == unauthorized {
			t.Errorf("%s is not exempt: %d %q", request, got.status, got.body)
		}
	}
	got := d.request(t, "GET", "/envs", "", "X-Access-Token", "secret")
	if got.status != 200 {
		t.Errorf("with the token: %d %q", got.status, got.body)
	}
	// A plain 401, also for streams; clients make `unauthenticated` of it.
	stream, frames := d.rawStream(t, "Start", `{"process":{"cmd":"true"}}`)
	if stream.status != 401 || stream.body != unauthorized || len(frames) != 0 {
		t.Errorf("a stream without the token: %d %q", stream.status, stream.body)
	}
	if failure := d.startError(t, argv("true")); failure.Code() != connect.CodeUnauthenticated {
		t.Errorf("a client without the token: %v", failure)
	}
	wantEnd(t, d.run(t, argv("true"), withHeader("X-Access-Token", "secret")).end, 0, true, "exit status 0")
}

// CORS, then the token, then the Basic user, then the route.
func TestOrderOfChecks(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	setToken(t, d, "secret")
	const unknown = `{"code":"unauthenticated","message":"invalid username: 'nosuch'"}`
	for _, path := range []string{"/nope", "/envs", "/process.Process/List"} {
		got := d.request(t, "GET", path, "", "Authorization", basicAuth("nosuch"))
		if got.body != unauthorized {
			t.Errorf("%s, no token, no such user: %d %q, want the token's message", path, got.status, got.body)
		}
		got = d.request(t, "GET", path, "", "Authorization", basicAuth("nosuch"), "X-Access-Token", "secret")
		if got.status != 401 {
			t.Errorf("%s, no such user: %d, want 401", path, got.status)
		}
		wantJSON(t, path+", no such user", got.body, unknown)
	}
	if got := d.request(t, "GET", "/nope", "", "X-Access-Token", "secret"); got.status != 404 {
		t.Errorf("unknown route: %d, want 404", got.status)
	}
}

func TestActingUser(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d, _ := startDaemonWithUsers(t, daemonConfig{})
	unknown := func(name string) string {
		return fmt.Sprintf(`{"code":"unauthenticated","message":"invalid username: '%s'"}`, name)
	}
	for _, name := range []string{"nosuch", "", "61000", "user ", "root:x"} {
		shown := strings.SplitN(name, ":", 2)[0]
		if shown == "root" {
			continue // the password is ignored
		}
		for _, request := range []string{"GET /health", "GET /envs", "POST /init", "GET /nope"} {
			method, path, _ := strings.Cut(request, " ")
			got := d.request(t, method, path, "", "Authorization", basicAuth(name))
			if got.status != 401 || !strings.HasPrefix(got.header.Get("Content-Type"), "application/json") {
				t.Errorf("%s as %q: %d %v, want 401", request, name, got.status, got.header)
			}
			wantJSON(t, request+" as "+name, got.body, unknown(shown))
		}
		got := d.unary(t, "List", "{}", "Authorization", basicAuth(name))
		wantJSON(t, "List as "+name, got.body, unknown(shown))
		stream, frames := d.rawStream(t, "Start", `{"process":{"cmd":"true"}}`, "Authorization", basicAuth(name))
		if stream.status != 200 || len(frames) != 1 || frames[0].flags != 2 {
			t.Errorf("Start as %q: %d %q, want 200 and one end-of-stream message", name, stream.status, stream.body)
			continue
		}
		wantJSON(t, "Start as "+name, frames[0].payload, `{"error":`+unknown(shown)+`}`)
	}
	for name, client := range map[string]pb.ProcessClient{
		"gRPC":     pb.NewProcessClient(d.h2, d.url, connect.WithGRPC()),
		"gRPC-Web": pb.NewProcessClient(d.http, d.url, connect.WithGRPCWeb()),
		"Connect":  d.process(),
	} {
		failure := d.startError(t, argv("true"), withClient(client), withUser("nosuch"))
		wantError(t, failure, connect.CodeUnauthenticated, "invalid username: 'nosuch'")
		if connect.CodeOf(failure) != connect.CodeUnauthenticated {
			t.Errorf("over %s", name)
		}
		request := connect.NewRequest(&pb.ListRequest{})
		request.Header().Set("Authorization", basicAuth("nosuch"))
		_, err := client.List(t.Context(), request)
		wantError(t, err, connect.CodeUnauthenticated, "invalid username: 'nosuch'")
	}
	for header, uid := range map[string]string{
		basicAuth("user"): "61000", basicAuth("user:password"): "61000", basicAuth("root"): "0",
		basicAuth("grouped"): "61004",
		"Basic !!!":          "0", "Basic " + "dXNlcg==": "0" /* no colon */, "Bearer user": "0", "": "0",
	} {
		if got := d.output(t, argv("id", "-u"), withHeader("Authorization", header)); got != uid+"\n" {
			t.Errorf("Authorization %q: uid %q, want %s", header, got, uid)
		}
	}
}

func TestDefaultUser(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d, home := startDaemonWithUsers(t, daemonConfig{})
	where := func() string { return d.output(t, sh("id -u; pwd")) }
	if got := where(); got != "0\n/root\n" {
		t.Errorf("at first: %q", got)
	}
	initialise := func(body string) {
		t.Helper()
		if got := d.request(t, "POST", "/init", body); got.status != http.StatusNoContent {
			t.Errorf("/init %s: %d %q", body, got.status, got.body)
		}
	}
	initialise(`{"defaultUser":"user"}`)
	if got := where(); got != "61000\n"+home+"\n" {
		t.Errorf("after defaultUser: %q", got)
	}
	if got := d.output(t, argv("id", "-u"), withUser("root")); got != "0\n" {
		t.Errorf("Basic does not override the default: %q", got)
	}
	initialise(`{"defaultWorkdir":"/tmp"}`)
	initialise(`{"defaultUser":"","defaultWorkdir":""}`)
	initialise(`{"defaultUser":null,"defaultWorkdir":null}`)
	initialise(``)
	if got := where(); got != "61000\n/tmp\n" {
		t.Errorf("after defaultWorkdir: %q", got)
	}
	if err := os.Mkdir(home+"/below", 0o755); err != nil {
		t.Fatal(err)
	}
	if got := d.output(t, argv("pwd"), withCwd("below")); got != home+"/below\n" {
		t.Errorf("relative paths start at the home, not at the default workdir: %q", got)
	}
	if got := d.output(t, argv("pwd"), withCwd("")); got != "/tmp\n" {
		t.Errorf("an empty cwd: %q", got)
	}
	initialise(`{"defaultWorkdir":"~/below"}`)
	if got := where(); got != "61000\n"+home+"/below\n" {
		t.Errorf("with a workdir below ~: %q", got)
	}
	initialise(`{"defaultUser":"ghost"}`)
	wantError(t, d.startError(t, argv("true")), connect.CodeUnauthenticated, "invalid default user: 'ghost'")
	d.healthy(t)
	if got := d.output(t, argv("id", "-u"), withUser("user")); got != "61000\n" {
		t.Errorf("with a Basic user: %q", got)
	}
}

// Users that appear while the daemon runs are found: the database is looked at on every request.
func TestUserAddedAtRunTime(t *testing.T) {
	t.Parallel()
	needRoot(t)
	base := publicDir(t)
	passwd := "root:x:0:0:root:/root:/bin/sh\n"
	d := startDaemonWith(t, daemonConfig{files: map[string]string{"/etc/passwd": passwd, "/etc/group": "root:x:0:\n"}})
	wantError(t, d.startError(t, argv("true"), withUser("late")), connect.CodeUnauthenticated, "invalid username: 'late'")
	file := fmt.Sprintf("/proc/%d/root/etc/passwd", d.pid)
	if err := os.WriteFile(file, []byte(passwd+"late:x:61009:61009::"+base+":/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := d.output(t, sh("id -u; pwd"), withUser("late")); got != "61009\n"+base+"\n" {
		t.Errorf("got %q", got)
	}
}

// ---- /init --------------------------------------------------------------------------------------------------------

func TestInit(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for what, body := range map[string]string{
		"no body": "", "empty object": "{}", "unknown keys": `{"what":1,"ever":{"a":[]}}`,
		"nulls": `{"accessToken":null,"envVars":null,"timestamp":null,"defaultUser":null,"volumeMounts":null}`,
		"space": " \n{}\n ",
	} {
		for _, contentType := range []string{"", "application/json", "text/plain", "nonsense"} {
			var headers []string
			if contentType != "" {
				headers = argv("Content-Type", contentType)
			}
			got := d.request(t, "POST", "/init", body, headers...)
			if got.status != http.StatusNoContent || got.body != "" || got.header.Get("Cache-Control") != "no-store" ||
				got.header.Get("X-Envd-Version") != "0.7.0" {
				t.Errorf("%s as %q: %d %q %v", what, contentType, got.status, got.body, got.header)
			}
		}
	}
}

func TestInitBadInput(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	const more = `"envVars":{"LEAKED":"1"},"defaultUser":"leaked"`
	for _, body := range []string{
		`{`, `[]`, `"text"`, `7`, `{"envVars":{"A":"1"}`, "\x00", `{} {}`, `{}x`,
		`{"accessToken":"",` + more + `}`,
		`{"accessToken":7,` + more + `}`,
		`{"accessToken":["a"],` + more + `}`,
		`{"accessToken":"a\\b",` + more + `}`,
		`{"accessToken":"a\"b",` + more + `}`,
		`{"accessToken":"\u0061bc",` + more + `}`,
		`{"accessToken":"a\nb",` + more + `}`,
		`{"ACCESSTOKEN":"a\u0061",` + more + `}`,
		`{"envVars":{"LEAKED":1}}`, `{"envVars":{"LEAKED":"1","B":{}}}`, `{"envVars":["LEAKED"]}`, `{"envVars":"LEAKED"}`,
		`{"envVars":{"LEAKED":true}}`,
		`{"defaultUser":7,"envVars":{"LEAKED":"1"}}`,
		`{"defaultWorkdir":{},"envVars":{"LEAKED":"1"}}`,
		`{"timestamp":"yesterday",` + more + `}`,
		`{"timestamp":1735689600,` + more + `}`,
		`{"timestamp":"",` + more + `}`,
		`{"timestamp":"2025-01-01",` + more + `}`,
		`{"timestamp":"2025-01-01T00:00:00",` + more + `}`, // no offset
	} {
		got := d.request(t, "POST", "/init", body)
		wantEnvelope(t, "/init "+body, got, http.StatusBadRequest, "")
		if got.header.Get("X-Envd-Version") != "0.7.0" {
			t.Errorf("/init %s: X-Envd-Version %q", body, got.header.Get("X-Envd-Version"))
		}
	}
	// Nothing half done: the good parts of bad requests had no effect, and no token was set.
	wantJSON(t, "/envs", d.request(t, "GET", "/envs", "").body, `{"WRENN_SANDBOX":"false"}`)
	d.run(t, argv("true"))
}

func TestInitToken(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	initialise := func(body string, status int, text string, headers ...string) {
		t.Helper()
		got := d.request(t, "POST", "/init", body, headers...)
		if got.status != status || strings.TrimSuffix(got.body, "\n") != text || got.header.Get("X-Envd-Version") != "0.7.0" {
			t.Errorf("/init %s: %d %q, X-Envd-Version %q; want %d %q", body, got.status, got.body,
				got.header.Get("X-Envd-Version"), status, text)
		}
		if status == 401 && !strings.HasPrefix(got.header.Get("Content-Type"), "text/plain") {
			t.Errorf("/init %s: Content-Type %q, want text/plain", body, got.header.Get("Content-Type"))
		}
	}
	const failed, noReset = "access token validation failed", "access token reset not authorized"
	initialise(`{}`, 204, "")                      // unset, any: ok
	initialise(`{"accessToken":"first"}`, 204, "") // first-time setup
	initialise(`{"accessToken":"first"}`, 204, "") // equal
	initialise(`{"accesstoken":"first"}`, 204, "") // keys in any case
	initialise(`{"accessToken":"other"}`, 401, failed)
	initialise(`{"accessToken":"first1"}`, 401, failed)
	initialise(`{}`, 401, noReset)
	initialise(``, 401, noReset)
	initialise(`{"accessToken":null}`, 401, noReset)
	initialise(``, 401, noReset, "X-Access-Token", "first")                       // the header plays no role
	initialise(`{"accessToken":"first"}`, 204, "", "X-Access-Token", "something") // in either direction
	initialise(`{"accessToken":"other","envVars":{"LEAKED":"1"}}`, 401, failed)   // applies nothing
	initialise(`{"envVars":{"LEAKED":"1"},"defaultUser":"ghost"}`, 401, noReset)  // applies nothing
	initialise(`{"accessToken":"first","envVars":{"KEPT":"1"}}`, 204, "")
	got := d.request(t, "GET", "/envs", "", "X-Access-Token", "first")
	wantJSON(t, "/envs", got.body, `{"WRENN_SANDBOX":"false","KEPT":"1"}`)
	if got := d.request(t, "GET", "/envs", ""); got.body != unauthorized {
		t.Errorf("the token was cleared: %d %q", got.status, got.body)
	}
	d.healthy(t)
}

func TestInitEnvVars(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	step := func(body, envs string) {
		t.Helper()
		if got := d.request(t, "POST", "/init", body); got.status != http.StatusNoContent {
			t.Errorf("/init %s: %d %q", body, got.status, got.body)
		}
		wantJSON(t, "/envs after "+body, d.request(t, "GET", "/envs", "").body, envs)
	}
	step(`{"envVars":{"A":"1","B":"x=y z"}}`, `{"WRENN_SANDBOX":"false","A":"1","B":"x=y z"}`)
	step(`{"envVars":{"A":"2","C":""}}`, `{"WRENN_SANDBOX":"false","A":"2","B":"x=y z","C":""}`)
	step(`{"envVars":{}}`, `{"WRENN_SANDBOX":"false","A":"2","B":"x=y z","C":""}`)
	step(`{"ENVVARS":{"D":"ü"}}`, `{"WRENN_SANDBOX":"false","A":"2","B":"x=y z","C":"","D":"ü"}`)
	step(`{"envVars":{"WRENN_SANDBOX":"true"}}`, `{"WRENN_SANDBOX":"false","A":"2","B":"x=y z","C":"","D":"ü"}`)
	if got := d.output(t, sh(`echo "$A|$B|$C|$D|$WRENN_SANDBOX"`)); got != "2|x=y z||ü|false\n" {
		t.Errorf("a process sees %q", got)
	}
	own := d.output(t, sh(`echo "$A|$WRENN_SANDBOX"`), withEnv("A", "3"), withEnv("WRENN_SANDBOX", "own"))
	if got := own; got != "3|own\n" {
		t.Errorf("the request's variables come last: %q", got)
	}
	if got := d.output(t, sh(`echo "$A"`)); got != "2\n" {
		t.Errorf("a request's variables are its own: %q", got)
	}
}

func TestInitTimestamp(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	seen := ""
	step := func(timestamp, value string, applied bool) {
		t.Helper()
		stamp := ""
		if timestamp != "" {
			stamp = fmt.Sprintf(`,"timestamp":%q`, timestamp)
		}
		body := fmt.Sprintf(`{"envVars":{"V":%q},"accessToken":"secret"%s}`, value, stamp)
		got := d.request(t, "POST", "/init", body)
		if got.status != http.StatusNoContent || got.body != "" {
			t.Errorf("/init %s: %d %q, want 204", body, got.status, got.body)
		}
		if applied {
			seen = value
		}
		envs := d.request(t, "GET", "/envs", "", "X-Access-Token", "secret").body
		wantJSON(t, "/envs after "+timestamp, envs, fmt.Sprintf(`{"WRENN_SANDBOX":"false","V":%q}`, seen))
	}
	step("2025-06-01T12:00:00Z", "a", true)
	step("2025-06-01T11:59:59.999999999Z", "b", false)
	step("2025-06-01T12:00:00Z", "c", true)           // equal: an idempotent retry
	step("2025-06-01T14:00:00+02:00", "d", true)      // the same instant
	step("2025-06-01T12:59:59+02:00", "e", false)     // earlier, whatever the digits say
	step("", "f", true)                               // without: always
	step("2025-06-01T12:00:00.000000001Z", "g", true) // a nanosecond later
	step("2025-06-01T12:00:00Z", "h", false)          // now that one is stale
	// A refused request moves nothing, and a stale one is checked all the same.
	for _, stamp := range []string{"2031-01-01T00:00:00Z", "1999-01-01T00:00:00Z"} {
		got := d.request(t, "POST", "/init", fmt.Sprintf(`{"accessToken":"wrong","timestamp":%q}`, stamp))
		if got.status != 401 {
			t.Errorf("wrong token, timestamp %s: %d, want 401", stamp, got.status)
		}
	}
	step("2026-01-01T00:00:00Z", "i", true)
}

// ---- protocols ----------------------------------------------------------------------------------------------------

func TestProtocols(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	protocols := map[string][]connect.ClientOption{
		"connect": nil, "grpc": {connect.WithGRPC()}, "grpc-web": {connect.WithGRPCWeb()},
	}
	for protocol, options := range protocols {
		for transport, client := range map[string]*http.Client{"h1": d.http, "h2c": d.h2} {
			if protocol == "grpc" && transport == "h1" {
				continue // gRPC needs HTTP/2
			}
			for codec, more := range map[string][]connect.ClientOption{
				"proto": nil, "json": {connect.WithProtoJSON()}, "proto gzip": {connect.WithSendGzip()},
				"json gzip": {connect.WithProtoJSON(), connect.WithSendGzip()},
			} {
				t.Run(protocol+" "+transport+" "+codec, func(t *testing.T) {
					t.Parallel()
					exerciseProtocol(t, d, pb.NewProcessClient(client, d.url, slices.Concat(options, more)...))
				})
			}
		}
	}
}

func exerciseProtocol(t *testing.T, d *daemon, client pb.ProcessClient) {
	via := withClient(client)
	// Server streaming, in both directions of time: output, then input by a unary call, then the end.
	tag := "tag of " + t.Name()
	s := d.start(t, sh(`echo begun; echo err >&2; exec cat`), via, withTag(tag), withEnv("X", strings.Repeat("x", 5000)))
	s.readUntil(t, "begun\n")
	listed, err := client.List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(listed.Msg.GetProcesses(), func(info *pb.ProcessInfo) bool {
		return info.GetPid() == s.pid && info.GetTag() == tag && info.GetConfig().GetCmd() == "/bin/sh"
	}) {
		t.Errorf("not listed: %v", listed.Msg)
	}
	second := d.connect(t, byTag(tag), via)
	if second.pid != s.pid {
		t.Errorf("Connect by tag: pid %d, want %d", second.pid, s.pid)
	}
	// Client streaming.
	input := client.StreamInput(t.Context())
	payload := bytes.Repeat([]byte("0123456789abcdef"), 4096)
	send := func(message *pb.StreamInputRequest) {
		t.Helper()
		if err := input.Send(message); err != nil {
			t.Fatal(err)
		}
	}
	send(streamTarget(byPid(s.pid)))
	send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Keepalive{Keepalive: &pb.StreamInputRequest_KeepAlive{}}})
	send(streamStdin(payload))
	if _, err := input.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	_, err = client.CloseStdin(t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: byPid(s.pid)}))
	if err != nil {
		t.Fatal(err)
	}
	for name, got := range map[string]runResult{"Start": s.collect(), "Connect": second.collect()} {
		wantEnd(t, got.end, 0, true, "exit status 0")
		if got.err != nil || !bytes.HasSuffix(got.stdout, payload) {
			t.Errorf("%s: %d bytes, error %v", name, len(got.stdout), got.err)
		}
	}
	// Errors, unary and at the end of a stream.
	_, err = client.SendSignal(t.Context(),
		connect.NewRequest(&pb.SendSignalRequest{Process: byTag("no " + tag), Signal: 9}))
	wantError(t, err, connect.CodeNotFound, "process with tag no "+tag+" not found")
	wantError(t, d.startError(t, argv("true"), via, withCwd("/no/such")), connect.CodeInvalidArgument,
		"cwd '/no/such' does not exist")
	// Offsets are told in every protocol.
	attached, err := d.openConnect(t, byPid(s.pid), via, withOutputFrom("all"))
	if err != nil {
		t.Fatal(err)
	}
	again := attached.collect()
	if again.header.Get("Envd-Output-Offset") != "0" || again.header.Get("Envd-Output-Lost") != "0" {
		t.Errorf("Connect: offset %q, lost %q; want 0 and 0", again.header.Get("Envd-Output-Offset"),
			again.header.Get("Envd-Output-Lost"))
	}
}

func streamTarget(selector *pb.ProcessSelector) *pb.StreamInputRequest {
	return &pb.StreamInputRequest{Event: &pb.StreamInputRequest_Start{
		Start: &pb.StreamInputRequest_StartEvent{Process: selector}}}
}

func streamStdin(data []byte) *pb.StreamInputRequest {
	return &pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: data}}}}}
}

// A deadline kills the command in every protocol, gRPC's own header included.
func TestTimeoutInEveryProtocol(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for name, client := range map[string]pb.ProcessClient{
		"connect":  d.process(),
		"grpc":     pb.NewProcessClient(d.h2, d.url, connect.WithGRPC()),
		"grpc-web": pb.NewProcessClient(d.http, d.url, connect.WithGRPCWeb()),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			defer cancel() // the client sends the deadline as its protocol does
			s := d.start(t, argv("sleep", "300"), withClient(client), withContext(ctx))
			r := s.collect()
			if connect.CodeOf(r.err) != connect.CodeDeadlineExceeded || r.ends != 0 {
				t.Errorf("the stream ends with %v and %d end events: %v", r.err, r.ends, r.events)
			}
			waitGone(t, 2*time.Second, int(s.pid))
		})
	}
}

func TestUnaryOverTheWire(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	got := d.unary(t, "List", "{}")
	if got.status != 200 || got.header.Get("Content-Type") != "application/json" ||
		got.header.Get("Accept-Encoding") != "gzip" {
		t.Errorf("List: %d %v, want application/json and Accept-Encoding: gzip", got.status, got.header)
	}
	wantJSON(t, "List", got.body, "{}")
	for what, test := range map[string]struct {
		method, body string
		status       int
		want         string
	}{
		"malformed JSON": {"SendSignal", `{"process":`, 400, ""},
		"no object":      {"SendSignal", `[]`, 400, ""},
		"wrong type":     {"SendSignal", `{"process":{"pid":"x"}}`, 400, ""},
		"unknown fields": {"List", `{"what":{"ever":1}}`, 200, `{}`},
		"proto field names": {"SendSignal", `{"process":{"pid":4194305},"signal":"SIGNAL_SIGKILL"}`, 404,
			`{"code":"not_found","message":"process with pid 4194305 not found"}`},
		"unknown enum string": {"SendSignal", `{"process":{"pid":4194305},"signal":"SIGNAL_WHAT"}`, 0, ""},
		"no selector": {"SendSignal", `{"signal":"SIGNAL_SIGKILL"}`, 400,
			`{"code":"invalid_argument","message":"invalid input type *process.ProcessSelector"}`},
	} {
		got := d.unary(t, test.method, test.body)
		if test.status != 0 && got.status != test.status || got.header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d %q %v, want %d", what, got.status, got.body, got.header, test.status)
		}
		if test.want != "" {
			wantJSON(t, what, got.body, test.want)
		} else if test.status == 400 && !strings.HasPrefix(got.body, `{"code":"invalid_argument"`) {
			t.Errorf("%s: %q", what, got.body)
		}
	}
	for _, method := range []string{"List", "Start"} {
		for _, contentType := range []string{"text/plain", "", "application/xml"} {
			got := d.request(t, "POST", "/process.Process/"+method, "{}", "Content-Type", contentType)
			if got.status != http.StatusUnsupportedMediaType || got.body != "" {
				t.Errorf("%s as %q: %d %q, want 415 and no body", method, contentType, got.status, got.body)
			}
			if accepted := tokens(got.header.Values("Accept-Post")); len(accepted) < 4 {
				t.Errorf("%s as %q: Accept-Post %q", method, contentType, accepted)
			}
		}
	}
}

func TestStreamOverTheWire(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	answer, frames := d.rawStream(t, "Start",
		`{"process":{"cmd":"/bin/sh","args":["-c","printf hi; printf no >&2; exit 3"]}}`)
	if answer.status != 200 || answer.header.Get("Content-Type") != "application/connect+json" ||
		answer.header.Get("Connect-Accept-Encoding") != "gzip" || answer.header.Get("Envd-Output-Offset") != "0" {
		t.Errorf("%d, headers %v", answer.status, answer.header)
	}
	if len(frames) < 5 {
		t.Fatalf("frames %q", frames)
	}
	var start struct {
		Event struct{ Start struct{ Pid int } }
	}
	if json.Unmarshal([]byte(frames[0].payload), &start); start.Event.Start.Pid < 2 {
		t.Errorf("the first frame is %q, want start with a pid", frames[0])
	}
	data := frames[1].payload + frames[2].payload
	for _, want := range []string{"aGk=", "bm8="} { // "hi", "no"
		if !strings.Contains(data, want) {
			t.Errorf("the data frames are %q", data)
		}
	}
	wantJSON(t, "end", frames[3].payload,
		`{"event":{"end":{"exitCode":3,"exited":true,"status":"exit status 3","error":"exit status 3"}}}`)
	if last := frames[4]; last.flags != 2 || len(frames) != 5 {
		t.Errorf("the last frame is %q of %d", last, len(frames))
	} else {
		wantJSON(t, "end of stream", last.payload, "{}")
	}
	// Zero values are omitted, as SDKs expect.
	for script, end := range map[string]string{
		"exit 0":     `{"event":{"end":{"exited":true,"status":"exit status 0"}}}`,
		"kill -9 $$": `{"event":{"end":{"exitCode":-1,"status":"signal: killed","error":"signal: killed"}}}`,
	} {
		_, frames := d.rawStream(t, "Start", fmt.Sprintf(`{"process":{"cmd":"/bin/sh","args":["-c",%q]}}`, script))
		if len(frames) != 3 {
			t.Errorf("%s: frames %q", script, frames)
			continue
		}
		wantJSON(t, script, frames[1].payload, end)
	}
	_, frames = d.rawStream(t, "Connect", `{"process":{"pid":4194305}}`)
	if len(frames) != 1 || frames[0].flags != 2 {
		t.Fatalf("Connect to nothing: %q", frames)
	}
	wantJSON(t, "Connect to nothing", frames[0].payload,
		`{"error":{"code":"not_found","message":"process with pid 4194305 not found"}}`)
}

// An HTTP/2 connection is made only with prior knowledge; the upgrade header of HTTP/1.1 is ignored.
func TestUpgradeHeaderIgnored(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	got := d.request(t, "GET", "/health", "", "Connection", "Upgrade, HTTP2-Settings", "Upgrade", "h2c",
		"HTTP2-Settings", "AAMAAABkAAQAoAAAAAIAAAAA")
	if got.status != 200 {
		t.Errorf("%d %q", got.status, got.body)
	}
}

// One HTTP/2 connection carries many streams at once, and none of them starves /health.
func TestManyStreamsOnOneConnection(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	client := pb.NewProcessClient(d.h2, d.url, connect.WithGRPC())
	var streams []*clientStream
	for range 100 {
		streams = append(streams, d.start(t, argv("cat"), withClient(client)))
	}
	response, err := d.h2.Get(d.url + "/health")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	for _, s := range streams {
		if err := d.closeStdin(t, byPid(s.pid)); err != nil {
			t.Fatal(err)
		}
		r := s.collect()
		if r.err != nil || r.ends != 1 {
			t.Fatalf("error %v, %d ends", r.err, r.ends)
		}
	}
}

// A connection that is idle, or whose header does not come, is closed by the server in time.
func TestServerTimeouts(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--header-timeout", "300ms", "--idle-timeout", "600ms")
	dial := func(text string) net.Conn {
		conn, err := net.Dial("tcp", d.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		fmt.Fprint(conn, text)
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		return conn
	}
	for what, text := range map[string]string{
		"half a header":          "GET /health HTTP/1.1\r\nHost:",
		"idle after an answer":   "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"nothing at all":         "",
		"half an HTTP/2 preface": "PRI * HTTP/2.0\r\n\r\nSM",
	} {
		conn := dial(text)
		var answer bytes.Buffer
		if _, err := answer.ReadFrom(conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection is open after 5 s; it carried %q", what, answer.String())
		}
	}
	// None of this touches a stream.
	s := d.start(t, argv("sleep", "1.5"), withHeader("Connection", "keep-alive"))
	wantEnd(t, s.collect().end, 0, true, "exit status 0")
}

// While the daemon is still being put together /health is answered, and every other request waits.
func TestHealthComesFirst(t *testing.T) {
	t.Parallel()
	s := newServer(serverOptions{version: "1"}, &accessToken{}, &userDB{}, newLifecycle(lifecycleOptions{}, false), nil)
	s.services = func() map[string]http.Handler { return nil }
	s.routes = []route{{"GET", "/health", true, s.health}}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go s.listen(listener)
	defer s.http.Close()
	status := func(path string) int {
		answer, err := http.Get("http://" + listener.Addr().String() + path)
		if err != nil {
			t.Error(err)
			return 0
		}
		answer.Body.Close()
		return answer.StatusCode
	}
	others := make(chan int, 3)
	for _, path := range []string{"/nothing", "/process.Process/List", "/health/"} {
		go func() { others <- status(path) }()
	}
	waitFor(t, 5*time.Second, "three requests", func() bool {
		requests := 0
		s.conns.each(func(c *connection) { requests += c.requests })
		return requests == 3
	})
	for range 20 {
		if got := status("/health"); got != http.StatusOK {
			t.Errorf("/health: %d", got)
		}
	}
	if n := len(others); n != 0 {
		t.Errorf("%d requests did not wait", n)
	}
	close(s.ready)
	for range 3 {
		if got := <-others; got != http.StatusNotFound {
			t.Errorf("after the wait: %d", got)
		}
	}
}
