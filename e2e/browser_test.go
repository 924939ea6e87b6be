// examples/terminal in a real browser, from an origin that is not the daemon's.
package e2e

import (
	"bytes"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// startPage serves examples/terminal as its users do, and returns its address.
func startPage(t *testing.T) string {
	const npm = "npm --prefix ../examples/terminal "
	if err := command("sh", "-c", npm+"ci --ignore-scripts --no-audit --no-fund"); err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(freePort(t)))
	var log bytes.Buffer
	page := exec.Command("sh", "-c", "exec "+npm+"start -- --serve="+address)
	page.Stdout, page.Stderr = &log, &log
	stdin, err := page.StdinPipe() // its end would be the server's
	if err != nil {
		t.Fatal(err)
	}
	page.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := page.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdin.Close(); syscall.Kill(-page.Process.Pid, syscall.SIGKILL); page.Wait() })
	for deadline := time.Now().Add(caseTimeout); ; time.Sleep(100 * time.Millisecond) {
		resp, err := http.Get("http://" + address + "/dist/main.js")
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return "http://" + address
			}
		}
		if time.Now().After(deadline) {
			t.Fatalf("the page is not served: %v\n%s", err, log.Bytes())
		}
	}
}

// TestBrowser keeps a picture of the page where ENVD_SCREENSHOT says.
func TestBrowser(t *testing.T) {
	t.Parallel()
	installJS(t)
	chromium, err := exec.LookPath("chromium")
	if err != nil {
		t.Skipf("needs chromium: %v", err)
	}
	page := startPage(t)
	for name, token := range map[string]string{"open": "", "token": "t0ken-of-the-page"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := startDaemon(t, freePort(t))
			init := map[string]any{"envVars": map[string]string{"HOME": "/nonexistent"}}
			if token != "" {
				init["accessToken"] = token
			} else {
				t.Cleanup(func() { nothingRuns(t, url) })
			}
			post(t, url+"/init", init, nil)
			user := exec.Command("node", "browser/page.mjs", page, url, t.TempDir())
			if picture := os.Getenv("ENVD_SCREENSHOT"); picture != "" && token == "" {
				user.Args = append(user.Args, picture)
			}
			user.Env = append(os.Environ(), "CHROMIUM="+chromium, "ENVD_TOKEN="+token, "NO_PROXY=*", "HOME="+t.TempDir())
			user.WaitDelay = time.Second
			timer := time.AfterFunc(2*caseTimeout, func() { user.Process.Kill() })
			defer timer.Stop()
			if out, err := user.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", filepath.Base(user.Path), err, out)
			}
		})
	}
}
