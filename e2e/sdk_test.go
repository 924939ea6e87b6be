// Runs the published E2B SDKs, unchanged and of exact versions, against the real daemon: e2e/js with npm's `e2b`,
// e2e/python with PyPI's `e2b`. Each of their cases is a subtest here:
//
//	go test -v -run TestJS/terminal/resize
//	go test -v -run TestPython/^sync/commands
//
// The SDKs are installed below this folder on first use, and again when the pinned versions change. A machine without
// node or python3 skips what needs them.
package e2e

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// A case that takes longer has failed; the slowest take a few seconds.
const caseTimeout = 60 * time.Second

func TestJS(t *testing.T) {
	t.Parallel()
	installJS(t)
	testSDK(t, exec.Command("node", "js/runner.mjs"))
}

func TestPython(t *testing.T) {
	t.Parallel()
	testSDK(t, exec.Command(installPython(t), "python/runner.py"))
}

// testSDK makes a subtest of each case of a runner (js/runner.mjs says how one is spoken to).
func testSDK(t *testing.T, command *exec.Cmd) {
	open, secure := startDaemon(t, freePort(t)), startDaemon(t, freePort(t))
	api := controlPlane(t, secure)
	// The SDKs start login shells. Without a home these pass over the profile of whoever runs the tests.
	post(t, open+"/init", map[string]any{"envVars": map[string]string{"HOME": "/nonexistent"}}, nil)
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	command.Env = append(os.Environ(), "NO_PROXY=*", "PYTHONDONTWRITEBYTECODE=1",
		"E2B_DEBUG=true", "E2B_SANDBOX_URL="+open, "E2B_API_KEY=e2b_0000",
		"ENVD_E2E_SECURE_URL="+secure, "ENVD_E2E_API_URL="+api,
		"ENVD_E2E_USER="+me.Username, "ENVD_E2E_OTHER_USER="+otherUser())
	r := startRunner(t, command)
	t.Cleanup(func() { nothingRuns(t, open) })
	for _, name := range r.Cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r.run(t, name)
		})
	}
}

// otherUser names a user that is not the daemon's own, or nothing where the daemon may not act for another.
func otherUser() string {
	if os.Getuid() == 0 {
		for _, name := range []string{"nobody", "daemon"} {
			if _, err := user.Lookup(name); err == nil {
				return name
			}
		}
	}
	return ""
}

// controlPlane sets an access token on the daemon at url, as a control plane does when a sandbox starts, and serves the
// one call by which an SDK learns the daemon's version and the token.
func controlPlane(t *testing.T, url string) string {
	const token = "e2e-access-token"
	resp, err := http.Get(url + "/health")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var health struct{ Version string }
	if err := json.NewDecoder(resp.Body).Decode(&health); err != nil {
		t.Fatal(err)
	}
	post(t, url+"/init", map[string]string{"accessToken": token}, nil)

	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "POST" || !strings.HasSuffix(r.URL.Path, "/sandboxes") {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		json.NewEncoder(w).Encode(map[string]string{
			"sandboxID": "e2e", "templateID": "e2e", "clientID": "e2e",
			"envdVersion": health.Version, "envdAccessToken": token,
		})
	}))
	t.Cleanup(server.Close)
	return server.URL
}

type result struct {
	Name, Error, Skipped string
}

// A runner is the process in which the cases of one SDK run.
type runner struct {
	Cases []string // what its first line says
	SDK   string

	stderr bytes.Buffer // complete once ended is closed
	ended  chan struct{}

	mu      sync.Mutex // protects what follows
	stdin   io.WriteCloser
	waiting map[string]chan<- result
}

func startRunner(t *testing.T, command *exec.Cmd) *runner {
	t.Helper()
	r := &runner{ended: make(chan struct{}), waiting: make(map[string]chan<- result)}
	var err error
	if r.stdin, err = command.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	command.Stderr = &r.stderr
	command.WaitDelay = time.Second
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewReader(stdout)
	first, err := lines.ReadBytes('\n')
	go func() {
		r.deliver(lines)
		command.Wait()
		close(r.ended)
	}()
	t.Cleanup(func() {
		r.stdin.Close()
		select {
		case <-r.ended:
		case <-time.After(10 * time.Second):
			command.Process.Kill()
			<-r.ended
		}
		if t.Failed() && r.stderr.Len() > 0 {
			t.Logf("standard error of %v:\n%s", command, r.stderr.Bytes())
		}
	})
	if err == nil {
		err = json.Unmarshal(first, r)
	}
	if err != nil || len(r.Cases) == 0 {
		t.Fatalf("%v names no cases: %v", command, err)
	}
	t.Log(r.SDK)
	return r
}

// deliver hands each result to the subtest that waits for it, until the runner ends.
func (r *runner) deliver(lines *bufio.Reader) {
	for {
		line, err := lines.ReadBytes('\n')
		if err != nil {
			return
		}
		var res result
		if err := json.Unmarshal(line, &res); err != nil {
			return // not ours: the subtests that wait fail by the end of the runner
		}
		r.mu.Lock()
		if c := r.waiting[res.Name]; c != nil {
			delete(r.waiting, res.Name)
			c <- res // has room for it
		}
		r.mu.Unlock()
	}
}

func (r *runner) run(t *testing.T, name string) {
	c := make(chan result, 1)
	r.mu.Lock()
	r.waiting[name] = c
	_, err := fmt.Fprintln(r.stdin, name)
	r.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	select {
	case res := <-c:
		switch {
		case res.Skipped != "":
			t.Skip(res.Skipped)
		case res.Error != "":
			t.Fatal(res.Error)
		}
	case <-r.ended:
		t.Fatal("the runner ended before the case did")
	case <-time.After(caseTimeout):
		t.Fatalf("not over after %v", caseTimeout)
	}
}

// needs skips the test where a program is missing.
func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, program := range programs {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("needs %s: %v", program, err)
		}
	}
}

// installJS makes node_modules what package-lock.json says.
func installJS(t *testing.T) {
	t.Helper()
	needs(t, "node", "npm")
	version := output(t, "node", "--version")
	var major, minor int
	if fmt.Sscanf(version, "v%d.%d", &major, &minor); major < 20 || major == 20 && minor < 18 {
		t.Skipf("needs node: 20.18 or newer, this is %s", version)
	}
	install(t, "node_modules", version, "package-lock.json", func() error {
		return command("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	})
}

// installPython makes .venv what the file of requirements says, and returns its interpreter.
func installPython(t *testing.T) string {
	t.Helper()
	needs(t, "python3")
	version := output(t, "python3", "-c", "import sys; print(sys.version, sys.base_prefix)")
	var major, minor int
	fmt.Sscanf(version, "%d.%d", &major, &minor)
	requirements := "requirements.txt"
	switch {
	case major != 3 || minor < 9:
		t.Skipf("needs python3: 3.9 or newer, this is %s", version)
	case minor < 11:
		requirements = "requirements-3.9.txt" // the newest SDK that runs there
	}
	if err := exec.Command("python3", "-c", "import venv, ensurepip").Run(); err != nil {
		t.Skip("needs python3: the modules venv and ensurepip (package python3-venv)")
	}
	python := filepath.Join(".venv", "bin", "python")
	install(t, ".venv", version, requirements, func() error {
		if err := command("python3", "-m", "venv", "--clear", ".venv"); err != nil {
			return err
		}
		return command(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", requirements)
	})
	return python
}

// install runs the step unless dir is there as the same step of an earlier run left it: same lock file, same version of
// what runs it. Several test runs may want to at once, so they take turns.
func install(t *testing.T, dir, version, lockFile string, step func() error) {
	t.Helper()
	lock, err := os.Open(lockFile)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	pinned, err := io.ReadAll(lock)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(append(pinned, version...))
	want := []byte(hex.EncodeToString(sum[:]) + "\n")
	stamp := filepath.Join(dir, ".installed")
	if have, err := os.ReadFile(stamp); err == nil && bytes.Equal(have, want) {
		return
	}
	if err := step(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(stamp, want, 0o644); err != nil {
		t.Fatal(err)
	}
}

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
	return strings.TrimSpace(string(out))
}
