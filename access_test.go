// Every way in, with every wrong key. The ways are read from the source and from the descriptors of the services, so that a new one is
// tried as soon as it is there.

package main

import (
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "envd/proto"
)

// door is a method and a path, and whether the token is not asked for before the handler is.
type door struct {
	method, path string
	open         bool
}

func doors(t *testing.T) (list []door) {
	t.Helper()
	sources, _ := filepath.Glob("*.go")
	for _, file := range sources {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\{"([A-Z]+)", "(/[^"]*)", (true|false), `).FindAllStringSubmatch(string(text), -1) {
			list = append(list, door{m[1], m[2], m[3] == "true"})
		}
	}
	if len(list) < 13 {
		t.Fatalf("%d routes were found: %v", len(list), list)
	}
	methods := 0
	for _, file := range []protoreflect.FileDescriptor{pb.File_process_proto, pb.File_filesystem_proto} {
		for i := range file.Services().Len() {
			service := file.Services().Get(i)
			for j := range service.Methods().Len() {
				list = append(list, door{method: "POST", path: fmt.Sprintf("/%s/%s", service.FullName(), service.Methods().Get(j).Name())})
				methods++
			}
		}
	}
	if methods < 17 {
		t.Fatalf("%d methods of services were found", methods)
	}
	return list
}

func TestWhoGetsIn(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	setToken(t, d, "secret")
	signed := url.Values{"path": {"/etc/hostname"}, "username": {"root"}, "signature": {"v1_x"}, "signature_expiration": {"99999999999"}}
	keys := map[string]struct {
		query   string
		headers []string
	}{
		"nothing":             {},
		"another token":       {headers: argv("X-Access-Token", "secreT")},
		"the token and more":  {headers: argv("X-Access-Token", "secret ,secret")},
		"a part of the token": {headers: argv("X-Access-Token", "secre")},
		"no token":            {headers: argv("X-Access-Token", "")},
		"a bearer":            {headers: argv("Authorization", "Bearer secret")},
		"a user's password":   {headers: argv("Authorization", "Basic cm9vdDpzZWNyZXQ=")},
		"a query":             {query: "?access_token=secret&X-Access-Token=secret"},
		"a cookie":            {headers: argv("Cookie", "X-Access-Token=secret")},
		"its hash":            {headers: argv("X-Access-Token", "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b")},
		"a wrong signature":   {query: "?" + signed.Encode()},
	}
	open := map[string]int{"GET /health": 200, "POST /snapshot/prepare": 204} // that is the contract; SECURITY.md says what it means
	for _, door := range doors(t) {
		for what, key := range keys {
			what = fmt.Sprintf("%s %s with %s", door.method, door.path, what)
			body := `{"accessToken":"mine"}`
			got := d.request(t, door.method, door.path+key.query, body, append(key.headers, "Content-Type", "application/json")...)
			switch want := open[door.method+" "+door.path]; {
			case want != 0:
				if got.status != want {
					t.Errorf("%s: %d %q, want %d", what, got.status, got.body, want)
				}
			case got.status != http.StatusUnauthorized:
				t.Errorf("%s: %d %q", what, got.status, got.body)
			case door.method != "HEAD" && !door.open && got.body != unauthorized:
				t.Errorf("%s: %q", what, got.body)
			}
			if strings.Contains(got.body, "secret") || strings.Contains(fmt.Sprint(got.header), "secret") {
				t.Errorf("%s: the token is told: %v %q", what, got.header, got.body)
			}
		}
	}
	t.Logf("%d ways in, each tried with %d wrong keys", len(doors(t)), len(keys))
	if got := d.request(t, "GET", "/envs", "", "X-Access-Token", "secret"); got.status != http.StatusOK {
		t.Errorf("with the token: %d %q", got.status, got.body)
	}
	if strings.Contains(d.log(), "secre") {
		t.Errorf("the token is in the log: %s", d.log())
	}
}

// TestNobodyHereGetsIn: with --no-local-clients no door opens for who is on this machine, token or not.
func TestNobodyHereGetsIn(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--no-local-clients")
	for _, door := range append(doors(t), door{method: "GET", path: "/nowhere"}, door{method: "POST", path: "/process.Process/Nothing"}) {
		if got := d.request(t, door.method, door.path, `{}`, "Content-Type", "application/json"); got.status != http.StatusForbidden {
			t.Errorf("%s %s: %d %q", door.method, door.path, got.status, got.body)
		}
	}
}

// How long a comparison takes does not tell how much of a guess is right. Medians of guesses in turn; a busy machine has several tries.
func TestComparisonsTakeTheSameTime(t *testing.T) {
	token := &accessToken{}
	token.set(strings.Repeat("t", 64))
	guesses := []string{strings.Repeat("x", 64), strings.Repeat("t", 63) + "x", "x" + strings.Repeat("t", 63)}
	var medians []time.Duration
	for range 20 {
		took := make([][]time.Duration, len(guesses))
		for range 5000 {
			for i, guess := range guesses {
				began := time.Now()
				right := token.matches(guess)
				took[i] = append(took[i], time.Since(began))
				if right {
					t.Fatalf("%q is taken for the token", guess)
				}
			}
		}
		medians = nil
		for _, d := range took {
			slices.Sort(d)
			medians = append(medians, d[len(d)/2])
		}
		if slices.Max(medians)-slices.Min(medians) <= slices.Min(medians)/20 {
			t.Logf("nothing right, all but the end right, all but the beginning right: %v", medians)
			return
		}
	}
	t.Errorf("medians: %v", medians)
}

func init() { testRoles["peek"] = peek }

// peek is a role: it tells what it gets at of a process and of its directory, which should be nothing.
func peek(args []string) {
	pid, _ := strconv.Atoi(args[0])
	for _, name := range []string{"environ", "mem", "maps", "fd/0", "cwd/.", "root/.", "exe", "io", "stack"} {
		if fd, err := unix.Open(fmt.Sprintf("/proc/%d/%s", pid, name), unix.O_RDONLY, 0); err == nil {
			unix.Close(fd)
			fmt.Print(name + " ")
		}
	}
	var buf [1]byte
	iovec := []unix.Iovec{{Base: &buf[0], Len: 1}}
	if _, err := unix.ProcessVMReadv(pid, iovec, []unix.RemoteIovec{{Base: 0x400000, Len: 1}}, 0); err != unix.EPERM {
		fmt.Print("process_vm_readv ")
	}
	if _, _, err := syscall.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(pid), 0, 0, 0, 0); err != unix.EPERM {
		fmt.Print("ptrace ")
	}
	if err := unix.Kill(pid, 0); err != unix.EPERM {
		fmt.Print("kill ")
	}
	for _, dir := range args[1:] {
		if os.WriteFile(dir+"/mine", nil, 0o600) == nil {
			fmt.Print(dir + " ")
		}
	}
	fmt.Println("and nothing else")
}

// The daemon's memory, descriptors and directory are closed to other users, and it dumps no core: of a process that does, the files in
// /proc belong to its group; of one that does not, to root's (proc(5), prctl(2) PR_SET_DUMPABLE).
func TestDaemonIsClosedToUsers(t *testing.T) {
	t.Parallel()
	needRoot(t)
	const group = 12345
	d := startDaemonWith(t, daemonConfig{as: &syscall.Credential{Gid: group}})
	setToken(t, d, "secret")
	if _, got := runRole(t, &syscall.Credential{Uid: 65534, Gid: 65534}, "peek", strconv.Itoa(d.pid), d.runDir); got != "and nothing else" {
		t.Errorf("nobody gets at %s", got)
	}
	control := exec.Command("sleep", "60")
	control.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Gid: group}}
	if err := control.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { control.Process.Kill(); control.Wait() }()
	for pid, want := range map[int]uint32{control.Process.Pid: group, d.pid: 0} {
		waitFor(t, 5*time.Second, fmt.Sprintf("/proc/%d/environ of group %d", pid, want), func() bool {
			var st unix.Stat_t
			return unix.Stat(fmt.Sprintf("/proc/%d/environ", pid), &st) == nil && st.Gid == want
		})
	}
}
