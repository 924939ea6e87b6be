// Faults: every system call fails once, writes are short, the daemon is killed at each step, and descriptors, processes, memory
// and room on the disk run out. Nothing of that ends the daemon, loses an old file, or leaves anything behind.

package main

import (
	"archive/tar"
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

var everyFault = flag.Bool("every-fault", false, "have each system call fail with several errors in turn")

// attempted is what became of an operation: ok, and what it then gave, or what was told in place of that.
type attempted struct {
	ok   bool
	code int // of HTTP; 0: the connection broke
	told string
}

// try sends a request that may fail in any way.
func (d *daemon) try(method, path, contentType, body string, headers ...string) attempted {
	request, err := http.NewRequest(method, d.url+path, strings.NewReader(body))
	if err != nil {
		return attempted{told: err.Error()}
	}
	request.Header.Set("Content-Type", contentType)
	for i := 0; i < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	response, err := d.http.Do(request)
	if err != nil {
		return attempted{told: err.Error()}
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return attempted{told: err.Error()}
	}
	return attempted{response.StatusCode == http.StatusOK, response.StatusCode, string(text)}
}

func (d *daemon) tryRPC(method, message string) attempted {
	return d.try("POST", "/filesystem.Filesystem/"+method, "application/json", message)
}

// What the directory of fileOperations holds beforehand.
var (
	oldSmall, newSmall = strings.Repeat("old small ", 100), strings.Repeat("new small ", 300)
	oldLarge, newLarge = strings.Repeat("old large ", 2000), strings.Repeat("new large ", 110_000) // more than wholeUpload
)

func layOut(t testing.TB, dir string) {
	t.Helper()
	entries, _ := os.ReadDir(dir)
	for _, entry := range entries {
		os.RemoveAll(filepath.Join(dir, entry.Name()))
	}
	for name, content := range map[string]string{"small": oldSmall, "large": oldLarge, "a": "first half", "b": "second half"} {
		file := writeFile(t, filepath.Join(dir, name), content, 0o640)
		if err := os.Chown(file, uidUser, uidUser); err != nil {
			t.Fatal(err)
		}
		unix.Setxattr(file, "user.e2b.k", []byte("old"), 0)
	}
	for _, name := range []string{"tree/1/2", "tree/3"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, name, "f"), "x", 0o644)
	}
}

// fileOperation is one thing that clients do to files, with all the states in which it may leave them.
type fileOperation struct {
	name    string
	do      func(d *daemon, dir string) attempted
	before  map[string]string // what the names hold that it changes; absent: "-"
	after   map[string]string // and when it has succeeded
	answers string            // of reading ones: what a good answer holds
}

// operationsWork does each operation and counts them.
func operationsWork(t *testing.T, d *daemon, dir string) (done int) {
	t.Helper()
	for _, o := range fileOperations(t) {
		layOut(t, dir)
		got := o.do(d, dir)
		if wrong := o.left(dir, got, false); wrong != "" || !got.ok {
			t.Errorf("%s: %s %d %.200s", o.name, wrong, got.code, got.told)
		}
		done++
	}
	return done
}

func fileOperations(t testing.TB) []fileOperation {
	raw := func(name, content string) func(*daemon, string) attempted {
		return func(d *daemon, dir string) attempted {
			return d.try("POST", filesPath("path", dir+"/"+name), "application/octet-stream", content, "X-Metadata-K", "new")
		}
	}
	rpc := func(method, format string, names ...any) func(*daemon, string) attempted {
		return func(d *daemon, dir string) attempted {
			paths := make([]any, len(names))
			for i, name := range names {
				paths[i] = fmt.Sprint(dir, "/", name)
			}
			return d.tryRPC(method, fmt.Sprintf(format, paths...))
		}
	}
	get := func(name string, headers ...string) func(*daemon, string) attempted {
		return func(d *daemon, dir string) attempted {
			return d.try("GET", filesPath("path", dir+"/"+name), "", "", headers...)
		}
	}
	packed := archive(t, tarEntry{name: "d/", kind: tar.TypeDir}, tarEntry{name: "d/f", content: newSmall}, tarEntry{name: "large", content: newLarge},
		tarEntry{name: "s", kind: tar.TypeSymlink, link: "small"}, tarEntry{name: "h", kind: tar.TypeLink, link: "large"})
	return []fileOperation{
		{name: "upload in place", do: raw("small", newSmall), before: map[string]string{"small": oldSmall}, after: map[string]string{"small": newSmall}},
		{name: "upload of a new file in new directories", do: raw("n/m/f", newSmall), before: map[string]string{"n/m/f": "-"}, after: map[string]string{"n/m/f": newSmall}},
		{name: "large upload", do: raw("large", newLarge), before: map[string]string{"large": oldLarge}, after: map[string]string{"large": newLarge}},
		{name: "large upload of a new file", do: raw("n", newLarge), before: map[string]string{"n": "-"}, after: map[string]string{"n": newLarge}},
		{name: "form", do: func(d *daemon, dir string) attempted {
			body, contentType := form(t, formPart{"file", dir + "/small", newSmall}, formPart{"file", dir + "/large", newLarge}, formPart{"file", dir + "/n/f", newSmall})
			return d.try("POST", "/files", contentType, body)
		}, before: map[string]string{"small": oldSmall, "large": oldLarge, "n/f": "-"}, after: map[string]string{"small": newSmall, "large": newLarge, "n/f": newSmall}},
		{name: "archive", do: func(d *daemon, dir string) attempted {
			return d.try("POST", filesPath("path", dir), "application/x-tar", packed)
		}, before: map[string]string{"d/f": "-", "large": oldLarge, "s": "-", "h": "-"}, after: map[string]string{"d/f": newSmall, "large": newLarge, "s": "-> small", "h": newLarge}},
		{name: "compose", do: func(d *daemon, dir string) attempted {
			return d.try("POST", "/files/compose", "application/json", fmt.Sprintf(`{"source_paths":["%[1]s/a","%[1]s/b"],"destination":"%[1]s/small"}`, dir))
		}, before: map[string]string{"small": oldSmall}, after: map[string]string{"small": "first halfsecond half"}},
		{name: "MakeDir", do: rpc("MakeDir", `{"path":"%s"}`, "m/n"), before: map[string]string{"m/n": "-"}, after: map[string]string{"m/n": "dir"}},
		{name: "Move", do: rpc("Move", `{"source":"%s","destination":"%s"}`, "large", "m/moved"), before: map[string]string{"large": oldLarge, "m/moved": "-"},
			after: map[string]string{"large": "-", "m/moved": oldLarge}},
		{name: "Remove", do: rpc("Remove", `{"path":"%s"}`, "tree"), before: map[string]string{"tree/1/2/f": "x", "tree/3/f": "x", "tree": "dir"},
			after: map[string]string{"tree/1/2/f": "-", "tree/3/f": "-", "tree": "-"}},
		{name: "Stat", do: rpc("Stat", `{"path":"%s"}`, "small"), answers: `"size":"1000"`},
		{name: "ListDir", do: rpc("ListDir", `{"path":"%s","depth":4}`, "tree"), answers: `"name":"1"`},
		{name: "download", do: get("small"), answers: oldSmall},
		{name: "large download", do: get("large"), answers: oldLarge},
		{name: "compressed download", do: get("large", "Accept-Encoding", "gzip"), answers: "\x1f\x8b"},
		{name: "download of a directory", do: get("tree", "Accept", "application/x-tar"), answers: "1/2/f"},
	}
}

// stateOf is what a name holds.
func stateOf(path string) string {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return "-"
	case err != nil:
		return err.Error()
	case info.IsDir():
		return "dir"
	case info.Mode()&fs.ModeSymlink != 0:
		target, _ := os.Readlink(path)
		return "-> " + target
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(content)
}

// left says what is wrong with what an operation has left; "" nothing.
func (o *fileOperation) left(dir string, got attempted, killed bool) string {
	if got.ok && !strings.Contains(got.told, o.answers) {
		return fmt.Sprintf("an answer without %q: %.200q", o.answers, got.told)
	}
	for name, before := range o.before {
		state := stateOf(filepath.Join(dir, name))
		if killed && before == "-" && state == "" {
			continue // made, and to be written in place: SECURITY.md
		}
		if state != o.after[name] && (got.ok || state != before) {
			return fmt.Sprintf("%s is neither as it was nor as it should be: %d bytes, %.40q", name, len(state), state)
		}
	}
	if !got.ok || !strings.HasPrefix(o.name, "upload in place") && !strings.HasPrefix(o.name, "large upload") {
		return ""
	}
	for name := range o.after { // owner, mode and metadata, too
		var st syscall.Stat_t
		value := make([]byte, 10)
		n, _ := unix.Getxattr(filepath.Join(dir, name), "user.e2b.k", value)
		syscall.Stat(filepath.Join(dir, name), &st)
		wantMode := uint32(0o640)
		if o.before[name] == "-" {
			wantMode = 0o644
		}
		if st.Uid != 0 || st.Mode&0o7777 != wantMode || string(value[:max(n, 0)]) != "new" {
			return fmt.Sprintf("%s: owner %d, mode %o, metadata %q", name, st.Uid, st.Mode, value[:max(n, 0)])
		}
	}
	return ""
}

func temporaryFiles(dir string) (found []string) {
	filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if strings.HasPrefix(filepath.Base(path), ".envd-") {
			found = append(found, path)
		}
		return nil
	})
	return found
}

// Each system call on a file that an operation makes fails once, with each of these errors: then the operation has failed, and says why,
// or has succeeded in full.
func TestEveryCallOnFilesFails(t *testing.T) {
	t.Parallel()
	s := supervise(t, slices.Concat(onFile, onName))
	d := startDaemonWith(t, daemonConfig{steps: s.steps(), args: []string{"--forward-address", ""}})
	dir := publicDir(t) + "/files"
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	d.healthy(t)
	before := d.ownDescriptors()
	faults, failures := 0, 0
	errnos := []syscall.Errno{unix.EIO}
	if *everyFault {
		errnos = append(errnos, unix.ENOSPC, unix.EMFILE, unix.EINTR)
	}
	for _, o := range fileOperations(t) {
		for _, errno := range errnos {
			for k := 1; ; k++ {
				layOut(t, dir)
				var hit *systemCall
				n := 0
				s.judge(func(c *systemCall) verdict {
					if !c.concerns(dir) {
						return letPass
					}
					if n++; n == k {
						hit = c
						return failsWith(errno)
					}
					return letPass
				})
				got := o.do(d, dir)
				s.judge(nil)
				if hit == nil {
					break
				}
				faults++
				what := fmt.Sprintf("%s, call %d (%d) fails with %v: ", o.name, k, hit.nr, errno)
				if wrong := o.left(dir, got, false); wrong != "" {
					t.Errorf("%s%s; told: %d %.200s", what, wrong, got.code, got.told)
				}
				if left := temporaryFiles(dir); len(left) > 0 {
					t.Errorf("%s%q was left; told: %d %.200s", what, left, got.code, got.told)
				}
				if got.ok {
					continue
				}
				failures++
				if !strings.Contains(got.told, errno.Error()) && !strings.Contains(got.told, "not enough") && !strings.Contains(got.told, "EOF") {
					t.Errorf("%sit says %d %.200q", what, got.code, got.told)
				}
			}
		}
	}
	t.Logf("%d faults, of which %d were an operation's failure", faults, failures)
	servesOn(t, d)
	d.descriptorsReturn(t, before)
}

// Each system call of a recursive watcher's beginning fails once for lack of memory: then it has failed, or it sees what happens in
// every directory.
func TestEveryCallOfAWatchFails(t *testing.T) {
	t.Parallel()
	s := supervise(t, append([]uintptr{unix.SYS_INOTIFY_ADD_WATCH, unix.SYS_INOTIFY_INIT1}, slices.Concat(onFile, onName)...))
	d := startDaemonWith(t, daemonConfig{steps: s.steps(), args: []string{"--forward-address", ""}})
	dir := publicDir(t)
	layOut(t, dir)
	d.healthy(t)
	before := d.ownDescriptors()
	faults, failures := 0, 0
	for k := 1; ; k++ {
		var hit *systemCall
		n := 0
		s.judge(func(c *systemCall) verdict {
			if !c.concerns(dir) && uintptr(c.nr) != unix.SYS_INOTIFY_INIT1 || uintptr(c.nr) == unix.SYS_FSTAT {
				return letPass
			}
			if n++; n == k {
				hit = c
				return failsWith(unix.ENOMEM)
			}
			return letPass
		})
		made := d.tryRPC("CreateWatcher", fmt.Sprintf(`{"path":"%s","recursive":true}`, dir))
		s.judge(nil)
		if hit != nil {
			faults++
		}
		if !made.ok {
			if failures++; !strings.Contains(made.told, "cannot allocate memory") || !strings.Contains(made.told, "resource_exhausted") {
				t.Errorf("call %d (%d): %d %s", k, hit.nr, made.code, made.told)
			}
			continue
		}
		var answer struct{ WatcherID string }
		if err := json.Unmarshal([]byte(made.told), &answer); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"tree/1/2", "tree/3", "tree"} {
			file := writeFile(t, fmt.Sprintf("%s/%s/new%d", dir, name, k), "", 0o644)
			var got attempted
			events := ""
			deadline := time.Now().Add(3 * time.Second)
			for !strings.Contains(events, strings.TrimPrefix(file, dir+"/")) && time.Now().Before(deadline) {
				got = d.tryRPC("GetWatcherEvents", fmt.Sprintf(`{"watcherId":"%s"}`, answer.WatcherID))
				events += strings.TrimPrefix(got.told, "{}")
			}
			if time.Now().After(deadline) {
				t.Errorf("call %d fails: nothing of %s: %s", k, file, events)
			}
		}
		d.tryRPC("RemoveWatcher", fmt.Sprintf(`{"watcherId":"%s"}`, answer.WatcherID))
		if hit == nil {
			break
		}
	}
	t.Logf("%d faults, of which %d were a watcher's failure", faults, failures)
	servesOn(t, d)
	d.descriptorsReturn(t, before)
}

// Every other call that can be interrupted is interrupted, before it has done anything. Nobody notices.
func TestInterruptedCalls(t *testing.T) {
	t.Parallel()
	s := supervise(t, []uintptr{unix.SYS_READ, unix.SYS_WRITE, unix.SYS_ACCEPT4, unix.SYS_EPOLL_PWAIT, unix.SYS_WAIT4, unix.SYS_WAITID})
	d := startDaemonWith(t, daemonConfig{steps: s.steps()})
	dir := publicDir(t)
	calls := 0
	s.judge(func(c *systemCall) verdict {
		if !c.isOf(d.pid) {
			return letPass
		}
		if calls++; calls%2 == 0 {
			return failsWith(unix.EINTR)
		}
		return letPass
	})
	defer s.judge(nil)
	for i := range 10 {
		r := d.run(t, sh("head -c 1000000 /dev/zero; exit 3"), withStdin(i%2 == 0))
		if wantEnd(t, r.end, 3, true, "exit status 3"); len(r.stdout) != 1_000_000 {
			t.Errorf("%d bytes of 1,000,000", len(r.stdout))
		}
		stream := d.start(t, sh("read line; echo $line"), withPTY(80, 24))
		if err := d.sendPTY(t, byPid(stream.pid), "typed\n"); err != nil {
			t.Error(err)
		}
		stream.readUntil(t, "typed\r\ntyped\r\n")
		wantEnd(t, stream.collect().end, 0, true, "exit status 0")
	}
	operationsWork(t, d, dir)
	s.judge(nil)
	t.Logf("%d calls, every other interrupted", calls)
	servesOn(t, d)
}

// Every write to a file, and every copy from one to another, takes a part of what it was given only, and every third of them is
// interrupted before it has taken anything.
func TestShortWrites(t *testing.T) {
	t.Parallel()
	s := supervise(t, []uintptr{unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_COPY_FILE_RANGE})
	d := startDaemonWith(t, daemonConfig{steps: s.steps()})
	dir := publicDir(t)
	calls, short, interrupted := 0, 0, 0
	s.judge(func(c *systemCall) verdict {
		switch {
		case !c.concerns(dir) && !(uintptr(c.nr) == unix.SYS_COPY_FILE_RANGE && strings.HasPrefix(c.file(2), dir)):
			return letPass
		case calls%3 == 2:
			calls++
			interrupted++
			return failsWith(unix.EINTR)
		}
		calls++
		short++
		return c.shorter(d.pid)
	})
	operationsWork(t, d, dir)
	s.judge(nil)
	t.Logf("%d writes were short, %d interrupted", short, interrupted)
	if short < 20 || interrupted < 10 {
		t.Error("nothing was tested")
	}
	servesOn(t, d)
}

// The daemon is killed at each system call on a file that an operation makes. What it was about to replace is as it was, or as it
// should be; the only thing that may be left is a hidden file, and it is in nobody's way.
func TestKilledAtEveryCall(t *testing.T) {
	t.Parallel()
	kills, hidden := 0, 0
	for _, o := range fileOperations(t) {
		if o.answers != "" || o.name == "Remove" {
			continue
		}
		step := 1
		if !*everyFault && o.name != "upload in place" {
			step = 4
		}
		for k := 1; ; k += step {
			killed := false
			t.Run(fmt.Sprint(o.name, "/", k), func(t *testing.T) {
				s := supervise(t, slices.Concat(onFile, onName))
				d := startDaemonWith(t, daemonConfig{steps: s.steps(), noCgroup: true, args: []string{"--no-cgroups"}})
				dir := publicDir(t)
				layOut(t, dir)
				n := 0
				s.judge(func(c *systemCall) verdict {
					if !c.concerns(dir) {
						return letPass
					}
					if n++; n != k {
						return letPass
					}
					killed = true
					d.stopped.Store(true)
					syscall.Kill(d.pid, syscall.SIGKILL)
					return never
				})
				got := o.do(d, dir)
				if !killed {
					return
				}
				<-d.exited
				kills++
				if wrong := o.left(dir, got, true); wrong != "" || got.ok {
					t.Errorf("%s; told: %d %.100s", wrong, got.code, got.told)
				}
				left := temporaryFiles(dir)
				hidden += len(left)
				again := startDaemonWith(t, daemonConfig{noCgroup: true, args: []string{"--no-cgroups"}})
				if wrong := o.left(dir, o.do(again, dir), false); wrong != "" {
					t.Errorf("again: %s", wrong)
				}
				if now := temporaryFiles(dir); !slices.Equal(now, left) {
					t.Errorf("hidden files %q, before %q", now, left)
				}
			})
			if !killed {
				break
			}
		}
	}
	t.Logf("killed at %d calls; %d hidden files were left", kills, hidden)
}

// ---- processes -----------------------------------------------------------------------------------------------------

var onStart = []uintptr{unix.SYS_PIPE2, unix.SYS_CLONE3, unix.SYS_PIDFD_OPEN, unix.SYS_EPOLL_CTL, unix.SYS_FCNTL, unix.SYS_IOCTL, unix.SYS_OPENAT,
	unix.SYS_MKDIRAT, unix.SYS_FCHOWN, unix.SYS_WAIT4, unix.SYS_SETSID, unix.SYS_DUP3, unix.SYS_PRLIMIT64, unix.SYS_SETGROUPS, unix.SYS_SETRESGID,
	unix.SYS_SETRESUID, unix.SYS_CHDIR, unix.SYS_EXECVE, unix.SYS_CLOSE_RANGE, unix.SYS_SETPRIORITY, unix.SYS_RT_SIGACTION}

// Each system call of the start of a process fails once, those of the child before its exec among them: then the start has failed, and
// says why, or the process has run, and its output and status are its own.
func TestEveryCallOfAStartFails(t *testing.T) {
	t.Parallel()
	s := supervise(t, onStart)
	d := startDaemonWith(t, daemonConfig{steps: s.steps(), args: []string{"--forward-address", ""}})
	daemonExe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", d.pid))
	if err != nil {
		t.Fatal(err)
	}
	d.run(t, sh("echo hi"))
	before := d.ownDescriptors()
	errnos := []syscall.Errno{unix.EAGAIN}
	if *everyFault {
		errnos = append(errnos, unix.EMFILE, unix.ENOMEM, unix.EIO, unix.EINTR, unix.ENOSPC)
	}
	faults, failures := 0, 0
	for what, options := range map[string][]callOption{"pipes": {withUser("nobody"), withCwd("/")}, "no input": {withStdin(false)}, "terminal": {withPTY(80, 24)}} {
		for _, errno := range errnos {
			for k := 1; ; k++ {
				var hit *systemCall
				n := 0
				s.judge(func(c *systemCall) verdict {
					exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", c.tid))
					socket := uintptr(c.nr) == unix.SYS_EPOLL_CTL && strings.HasPrefix(c.file(2), "socket:")
					if exe != daemonExe || socket || uintptr(c.nr) == unix.SYS_OPENAT && strings.HasPrefix(c.text(1), "/proc/") {
						return letPass
					}
					if n++; n == k {
						hit = c
						return failsWith(errno)
					}
					return letPass
				})
				r := runResult{}
				stream, err := d.open(t, sh("echo hi; exit 3"), options...)
				if err == nil {
					r = stream.collect()
					err = r.err
				}
				s.judge(nil)
				if hit == nil {
					break
				}
				faults++
				output := string(r.stdout) + strings.ReplaceAll(string(r.pty), "\r", "")
				ran := err == nil && output == "hi\n" && r.end.GetStatus() == "exit status 3" && r.ends == 1
				notRun := err == nil && output != "hi\n" && r.end.GetExitCode() >= 126 && r.ends == 1 && strings.Contains(output+string(r.stderr), errno.Error())
				if err != nil || notRun {
					failures++
				}
				if err != nil && !strings.Contains(err.Error(), errno.Error()) || err == nil && !ran && !notRun {
					t.Errorf("%s, call %d (%d) fails with %v: %v; output %q %q, end %v", what, k, hit.nr, errno, err, output, r.stderr, r.end)
				}
			}
		}
	}
	t.Logf("%d faults, of which %d were a start's failure", faults, failures)
	waitFor(t, 5*time.Second, "nothing runs, nothing waits to be reaped", func() bool {
		return len(d.list(t)) == 0 && len(d.zombies()) == 0 && len(descendantsOf(d.pid)) == 0
	})
	servesOn(t, d)
	d.descriptorsReturn(t, before)
}

// Whatever accept(2), or making the connection's place in an epoll set, fails with, the daemon goes on serving.
func TestAcceptFails(t *testing.T) {
	t.Parallel()
	s := supervise(t, []uintptr{unix.SYS_ACCEPT4, unix.SYS_EPOLL_CTL})
	d := startDaemonWith(t, daemonConfig{steps: s.steps()})
	faults := 0
	for _, nr := range []int32{unix.SYS_ACCEPT4, unix.SYS_EPOLL_CTL} {
		for _, errno := range []syscall.Errno{unix.EINTR, unix.ECONNABORTED, unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ENOSPC, unix.EPROTO,
			unix.EPERM, unix.ENETDOWN, unix.EHOSTUNREACH, unix.EIO} {
			left := 1
			s.judge(func(c *systemCall) verdict {
				if c.nr != nr || left == 0 || nr == unix.SYS_EPOLL_CTL && !strings.HasPrefix(c.file(2), "socket:") {
					return letPass
				}
				left--
				faults++
				return failsWith(errno)
			})
			conn, err := net.Dial("tcp", d.addr)
			if err != nil {
				t.Fatalf("after %v: %v", errno, err)
			}
			io.WriteString(conn, "GET /health HTTP/1.0\r\n\r\n")
			io.ReadAll(conn) // an answer, or the end of a connection that could not be taken
			conn.Close()
			s.judge(nil)
			d.http.CloseIdleConnections()
			if d.gone() {
				t.Fatalf("call %d fails with %v: the daemon has gone: %v", nr, errno, d.waitErr)
			}
			d.healthy(t)
		}
	}
	t.Logf("%d connections could not be accepted", faults)
	servesOn(t, d)
}

// ---- what runs out -------------------------------------------------------------------------------------------------

// controlled makes a cgroup in which a controller can limit a process, in whichever hierarchy has it. At the end the processes
// in it, which are the caller's to end, go back to its parent.
func controlled(t testing.TB, controller string) (dir string) {
	t.Helper()
	needRoot(t)
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(line, " - ")
		at := strings.Fields(before)[4]
		fields := strings.Fields(after)
		enabled, _ := os.ReadFile(at + "/cgroup.subtree_control")
		first := fields[0] == "cgroup" && slices.Contains(strings.Split(fields[2], ","), controller)
		if !first && !(fields[0] == "cgroup2" && slices.Contains(strings.Fields(string(enabled)), controller)) {
			continue
		}
		dir = fmt.Sprintf("%s/envd-test-%s-%d-%d", at, controller, os.Getpid(), cgroupSerial.Add(1))
		if err := os.Mkdir(dir, 0o755); err != nil {
			continue
		}
		t.Cleanup(func() {
			waitFor(t, 5*time.Second, "cgroup removed: "+dir, func() bool { return removeCgroups(dir) == nil })
		})
		return dir
	}
	t.Skip("needs a cgroup hierarchy with the controller " + controller)
	return ""
}

func cgroupNumber(t testing.TB, dir, file string) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	return atoi(t, string(text))
}

// With no place for another process or thread, starts are refused; all else goes on in the threads that the daemon has.
func TestOutOfProcesses(t *testing.T) {
	t.Parallel()
	group := controlled(t, "pids")
	program := leasedProgram(t)
	d := startDaemonNoCgroups(t) // its children are in its own cgroup
	var wait sync.WaitGroup
	for range 24 { // as many starts that hang leave as many threads
		wait.Go(func() {
			if s, err := d.open(t, argv(program), withTimeoutMs(700)); err == nil {
				s.collect()
			}
		})
	}
	wait.Wait()
	stream := d.start(t, sh("while read line; do echo $line; done; exit 5"))
	writeFile(t, group+"/cgroup.procs", fmt.Sprint(d.pid), 0o644)
	waitFor(t, 5*time.Second, "no child that hangs", func() bool { return len(d.list(t)) == 1 })
	threads := cgroupNumber(t, group, "pids.current")
	writeFile(t, group+"/pids.max", fmt.Sprint(threads), 0o644)
	dir := publicDir(t)
	refused, done := 0, 0
	for i := range 8 {
		err := d.startError(t, sh("true"))
		wantError(t, err, connect.CodeResourceExhausted, "error starting process '/bin/sh -c true': fork: resource temporarily unavailable")
		refused++
		done += operationsWork(t, d, dir)
		if err := d.sendStdin(t, byPid(stream.pid), fmt.Sprintln("line", i)); err != nil {
			t.Error(err)
		}
		stream.readUntil(t, fmt.Sprintln("line", i))
	}
	writeFile(t, group+"/pids.max", "max", 0o644)
	d.closeStdin(t, byPid(stream.pid))
	wantEnd(t, stream.collect().end, 5, true, "exit status 5")
	t.Logf("%d threads: %d starts refused, %d operations on files done", threads, refused, done)
	servesOn(t, d)
}

// However few descriptors are left, each request is served or refused with a reason, and nothing is half done. A connection that
// there is no descriptor for waits until there is one.
func TestOutOfDescriptors(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemon(t, "--forward-address", "")
	dir := publicDir(t)
	layOut(t, dir)
	for _, o := range fileOperations(t) { // what the daemon keeps open once it has been used
		o.do(d, dir)
	}
	d.run(t, sh("true"), withPTY(80, 24))
	before := d.ownDescriptors()
	d.http = &http.Client{Transport: &http.Transport{MaxConnsPerHost: 1}, Timeout: 20 * time.Second}
	limit := func(free int) { // new descriptors have the lowest numbers that are free, which must be below the limit
		t.Helper()
		open := map[int]bool{}
		for _, fd := range d.fds() {
			number, _, _ := strings.Cut(fd, " ")
			open[atoi(t, number)] = true
		}
		to := 0
		for ; free > 0 || open[to]; to++ {
			if !open[to] {
				free--
			}
		}
		if err := unix.Prlimit(d.pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(to), Max: 20_000}, nil); err != nil {
			t.Fatal(err)
		}
	}
	served, refused := 0, 0
	for free := range 16 {
		for _, o := range fileOperations(t) {
			layOut(t, dir)
			d.healthy(t) // there is a connection
			limit(free)
			got := o.do(d, dir)
			if wrong := o.left(dir, got, false); wrong != "" || len(temporaryFiles(dir)) > 0 {
				t.Errorf("%d descriptors, %s: %s, %q; %d %.200s", free, o.name, wrong, temporaryFiles(dir), got.code, got.told)
			}
			if got.ok {
				served++
			} else if refused++; !strings.Contains(got.told, "too many open files") && !strings.Contains(got.told, "EOF") {
				t.Errorf("%d descriptors, %s: %d %.200s", free, o.name, got.code, got.told)
			}
		}
		for _, options := range [][]callOption{nil, {withPTY(80, 24)}, {withStdin(false)}} {
			d.healthy(t)
			limit(free)
			s, err := d.open(t, sh("echo hi; exit 3"), options...)
			var r runResult
			if err == nil {
				r = s.collect()
				err = r.err
			}
			if err != nil {
				refused++
				if connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "too many open files") {
					t.Errorf("%d descriptors: %v", free, err)
				}
			} else if served++; r.end.GetStatus() != "exit status 3" || !strings.Contains(string(r.stdout)+string(r.pty), "hi") {
				t.Errorf("%d descriptors: %q, %v", free, r.stdout, r.end)
			}
		}
	}
	limit(0)
	var waiting []net.Conn
	for range 20 {
		conn, err := net.Dial("tcp", d.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		io.WriteString(conn, "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
		waiting = append(waiting, conn)
	}
	limit(1000)
	for i, conn := range waiting {
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		if n, err := conn.Read(make([]byte, 100)); n == 0 {
			t.Fatalf("connection %d: %v", i, err)
		}
		conn.Close()
	}
	t.Logf("%d requests served, %d refused; %d connections waited for a descriptor", served, refused, len(waiting))
	servesOn(t, d)
	d.descriptorsReturn(t, before)
	if n := strings.Count(d.log(), "a connection was not accepted"); n == 0 || n > 20 {
		t.Errorf("the log has %d lines of connections that were not accepted", n)
	}
}

// However little room a disk has, and however few inodes, each change is made or refused with 507 or its reason, and nothing is half done.
func TestNoRoom(t *testing.T) {
	t.Parallel()
	dir := mounted(t, "tmpfs", "size=4m,nr_inodes=200,mode=777")
	d := startDaemon(t)
	done, refused := 0, 0
	for round := range 16 {
		pages, inodes := round*24, 1000
		if round%2 == 1 {
			pages, inodes = 1000, round/2
		}
		for _, o := range fileOperations(t) {
			layOut(t, dir)
			fill(t, dir, pages, inodes)
			got := o.do(d, dir)
			if wrong := o.left(dir, got, false); wrong != "" || len(temporaryFiles(dir)) > 0 {
				t.Errorf("%d pages, %d inodes, %s: %s, %q; %d %.200s", pages, inodes, o.name, wrong, temporaryFiles(dir), got.code, got.told)
			}
			if got.ok {
				done++
			} else if refused++; !strings.Contains(got.told, "not enough") && !strings.Contains(got.told, "no space left on device") {
				t.Errorf("%d pages, %d inodes, %s: %d %.200s", pages, inodes, o.name, got.code, got.told)
			}
		}
	}
	layOut(t, dir)
	other := writeFile(t, publicDir(t)+"/f", "whole", 0o644)
	_, err := d.fsCall(t, "", "Move", other, dir+"/f")
	wantError(t, err, connect.CodeInternal, fmt.Sprintf("error renaming: rename %s %s/f: invalid cross-device link", other, dir))
	wantContent(t, other, "whole")
	t.Logf("%d changes and readings done, %d refused", done, refused)
	servesOn(t, d)
}

// fill leaves so many pages and inodes of a tmpfs.
func fill(t testing.TB, dir string, pages, inodes int) {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	for i := range max(0, int(fs.Ffree)-inodes-1) {
		writeFile(t, fmt.Sprintf("%s/fill%d", dir, i), "", 0o600)
	}
	filler := writeFile(t, dir+"/filler", "", 0o600)
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filler, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n := int64(fs.Bavail) - int64(pages); n > 0 {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, n*fs.Bsize); err != nil {
			t.Fatal(err)
		}
	}
}

// A group whose memory is all taken: the OOM killer takes the child that takes it, and `end` tells how that ended. What clients make the
// daemon hold meanwhile is less. (In a guest it is never taken: oom_score_adj.)
func TestOutOfMemory(t *testing.T) {
	t.Parallel()
	if raceEnabled() {
		t.Skip("needs a daemon of its usual size")
	}
	const limit = 256 << 20
	group := controlled(t, "memory")
	d := startDaemonNoCgroups(t, "--output-memory", "16777216")
	for _, file := range []string{"memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max", "memory.swap.max"} {
		if _, err := os.Stat(group + "/" + file); err == nil {
			os.WriteFile(group+"/"+file, fmt.Append(nil, map[bool]int{false: limit, true: 0}[file == "memory.swap.max"]), 0)
		}
	}
	writeFile(t, group+"/cgroup.procs", fmt.Sprint(d.pid), 0o644)
	dir := publicDir(t)
	killed, uploads := 0, 0
	for range 6 {
		var wait sync.WaitGroup
		var stalled []*clientStream
		for range 20 { // nobody reads what these write
			stalled = append(stalled, d.start(t, argv("head", "-c", "20000000", "/dev/zero"), withStdin(false)))
		}
		for i := range 8 {
			wait.Go(func() {
				if got := d.upload(t, filesPath("path", fmt.Sprint(dir, "/f", i)), strings.Repeat("x", 3<<20)); got.status != 200 {
					t.Errorf("%d %.200s", got.status, got.body)
				}
			})
			uploads++
		}
		r := d.run(t, argv("tail", "/dev/zero")) // keeps all that it reads
		wantEnd(t, r.end, -1, false, "signal: killed")
		killed++
		wait.Wait()
		for _, s := range stalled {
			d.signal(t, byPid(s.pid), pb.Signal_SIGNAL_SIGKILL)
			s.drop()
		}
		servesOn(t, d)
	}
	t.Logf("%d MiB for all: %d children killed, %d uploads done; peak RSS of the daemon %d MiB", limit>>20, killed, uploads, d.peakRSS()>>20)
}

// ---- signals -------------------------------------------------------------------------------------------------------

// Children are stopped, continued, terminated and killed at random, by clients and past the daemon, while their output streams: each
// stream has all output up to its end, one end, and the status that the kernel told.
func TestSignalStorm(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--forward-address", "")
	before := d.ownDescriptors()
	const rounds, streams = 6, 40
	statuses := map[string]int{}
	signals := 0
	for range rounds {
		var wait sync.WaitGroup
		var mu sync.Mutex
		running := map[int]bool{}
		for i := range streams {
			options := []callOption{withStdin(i%2 == 0)}
			if i%5 == 0 {
				options = []callOption{withPTY(80, 24)}
			}
			s := d.start(t, sh("trap 'exit 9' TERM; i=0; while [ $i -lt 4000 ]; do echo $i; i=$((i+1)); done; exit 7"), options...)
			mu.Lock()
			running[int(s.pid)] = true
			mu.Unlock()
			wait.Go(func() {
				r := s.collect()
				mu.Lock()
				defer mu.Unlock()
				delete(running, int(s.pid))
				status := r.end.GetStatus()
				if r.err != nil || r.ends != 1 || r.events[len(r.events)-1].GetEnd() == nil {
					t.Errorf("stream %d: %d ends, %v", i, r.ends, r.err)
				}
				statuses[status]++
				lines := strings.Fields(string(r.stdout) + string(r.pty))
				for n, line := range lines {
					if line != fmt.Sprint(n) && n < len(lines)-1 {
						t.Errorf("stream %d: line %d is %q", i, n, line)
						break
					}
				}
				if status == "exit status 7" && len(lines) != 4000 {
					t.Errorf("stream %d: %d lines of 4,000 before %s", i, len(lines), status)
				}
			})
		}
		stop := make(chan struct{})
		var storm sync.WaitGroup
		storm.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				mu.Lock()
				for pid := range running { // in an order of chance
					if state, parent := processState(pid); parent != d.pid || state == 'Z' {
						continue
					}
					switch signals++; rand.IntN(24) {
					case 0:
						syscall.Kill(pid, syscall.SIGKILL)
					case 1:
						syscall.Kill(pid, syscall.SIGTERM)
					case 2, 3, 4:
						syscall.Kill(pid, syscall.SIGSTOP)
					default:
						syscall.Kill(pid, syscall.SIGCONT)
					}
					break
				}
				mu.Unlock()
			}
		})
		wait.Wait()
		close(stop)
		storm.Wait()
	}
	for status := range statuses {
		if !slices.Contains([]string{"exit status 7", "exit status 9", "signal: killed", "signal: terminated"}, status) {
			t.Errorf("status %q", status)
		}
	}
	t.Logf("%d signals to %d processes: %v", signals, rounds*streams, statuses)
	waitFor(t, 5*time.Second, "nothing runs, nothing waits to be reaped", func() bool {
		return len(d.list(t)) == 0 && len(d.zombies()) == 0 && len(descendantsOf(d.pid)) == 0
	})
	servesOn(t, d)
	d.descriptorsReturn(t, before)
}

// ---- clients -------------------------------------------------------------------------------------------------------

// Clients that send a byte now and then, never read, or send without end: each is cut off at its bound, nobody else waits, and the
// memory that they took is given back.
func TestHostileClients(t *testing.T) {
	d := startDaemon(t, "--header-timeout", "2s")
	servesOn(t, d)
	before, rss := d.ownDescriptors(), d.rss()
	head := func(rest string) string { return "POST /process.Process/Start HTTP/1.1\r\nHost: localhost\r\n" + rest }
	const megabyte = 1 << 20
	var sent atomic.Int64
	flood := func(what, beginning, piece string) {
		conn, err := net.Dial("tcp", d.addr)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(30 * time.Second))
		io.WriteString(conn, beginning)
		for n := 0; n < 100*megabyte; n += len(piece) {
			if _, err := io.WriteString(conn, piece); err != nil {
				return
			}
			sent.Add(int64(len(piece)))
		}
		if answer, _ := io.ReadAll(conn); !strings.HasPrefix(string(answer), "HTTP/1.1 4") && !strings.Contains(string(answer), `"resource_exhausted"`) {
			t.Errorf("%s: 100 MiB were taken: %.200q", what, answer)
		}
	}
	var wait sync.WaitGroup
	for range 3 {
		wait.Go(func() {
			flood("headers", head(""), "X-"+strings.Repeat("a", 1000)+": "+strings.Repeat("b", 64<<10)+"\r\n")
		})
		wait.Go(func() { flood("one header", head("X: "), strings.Repeat("b", 64<<10)) })
		wait.Go(func() {
			flood("one message", head("Connection: close\r\nContent-Type: application/connect+json\r\nContent-Length: 104857605\r\n\r\n\x00\x06\x40\x00\x00"), strings.Repeat(" ", 64<<10))
		})
		wait.Go(func() {
			flood("chunked unary", head("Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"), "10000\r\n"+strings.Repeat(" ", 64<<10)+"\r\n")
		})
		wait.Go(func() {
			flood("init", "POST /init HTTP/1.1\r\nHost: localhost\r\nContent-Length: 104857600\r\n\r\n", strings.Repeat(" ", 64<<10))
		})
	}
	dropped := atomic.Int64{}
	for range 50 { // a byte each tenth of a second: the header's time is up before it is complete
		wait.Go(func() {
			conn, err := net.Dial("tcp", d.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			began := time.Now()
			for time.Since(began) < 20*time.Second {
				if _, err := io.WriteString(conn, "G"); err != nil {
					dropped.Add(1)
					return
				}
				conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
				if _, err := conn.Read(make([]byte, 1000)); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
					dropped.Add(1)
					return
				}
			}
		})
	}
	for range 50 { // half-closed right after the request, and never read
		wait.Go(func() {
			conn, err := net.Dial("tcp", d.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			io.WriteString(conn, strings.Repeat("GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n", 2000))
			conn.(*net.TCPConn).CloseWrite()
			time.Sleep(time.Second)
			conn.(*net.TCPConn).SetLinger(0)
		})
	}
	for range 10 {
		servesOn(t, d)
	}
	wait.Wait()
	if dropped.Load() != 50 {
		t.Errorf("%d of 50 slow clients were cut off", dropped.Load())
	}
	peak := d.peakRSS()
	t.Logf("%d MiB of 1500 were taken from the socket; RSS %d MiB, peak %d MiB; %d slow clients cut off", sent.Load()>>20, rss>>20, peak>>20, dropped.Load())
	if peak > 200<<20 && !raceEnabled() {
		t.Errorf("peak RSS %d MiB", peak>>20)
	}
	servesOn(t, d)
	d.descriptorsReturn(t, before)
	if raceEnabled() {
		return
	}
	waitFor(t, 20*time.Second, "the memory is given back", func() bool { return d.rss() < rss+16<<20 })
}

// Whoever reads the daemon's log goes away: it goes on, and children have SIGPIPE as it was.
func TestLogGoesNowhere(t *testing.T) {
	t.Parallel()
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{port: freePort(t), runDir: t.TempDir(), dial: new(net.Dialer).DialContext, exited: make(chan struct{})}
	d.addr = fmt.Sprintf("127.0.0.1:%d", d.port)
	d.url, d.http = "http://"+d.addr, &http.Client{}
	d.cmd = exec.Command(daemonBinary(t), "--isnotfc", "--listen", "127.0.0.1", "--port", fmt.Sprint(d.port), "--run-dir", d.runDir, "--no-cgroups")
	d.cmd.Env = append(os.Environ(), "ENVD_LOG=debug")
	d.cmd.Stdout, d.cmd.Stderr = writer, writer
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	d.pid = d.cmd.Process.Pid
	go func() { d.waitErr = d.cmd.Wait(); close(d.exited) }()
	t.Cleanup(func() {
		if d.gone() {
			t.Errorf("the daemon died: %v", d.waitErr)
		} else if err := d.stop(t); err != nil {
			t.Errorf("SIGTERM: %v", err)
		}
	})
	writer.Close()
	if !d.answers(15 * time.Second) {
		t.Fatal("the daemon does not answer")
	}
	reader.Close()
	for range 3 {
		servesOn(t, d)
	}
	wantEnd(t, d.run(t, sh("kill -PIPE $$")).end, -1, false, "signal: broken pipe")
}

// More connections than may wait: each is answered, and of those that then wait for their next request the newest are kept, as many as
// the bound says. One that is in use is not among those that are closed.
func TestConnectionsBeyondTheBound(t *testing.T) {
	const bound = 512
	count := 3000
	if *everyFault {
		count = 10_000
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < uint64(count)+1000 {
		t.Skipf("needs more open files: RLIMIT_NOFILE is %d", limit.Cur)
	}
	d := startDaemon(t, "--memory-limit", "88MiB") // of which 10 are for those that wait, at 24 KiB each: 440
	servesOn(t, d)
	before, rss := d.ownDescriptors(), d.rss()
	stream := d.start(t, sh("while read line; do echo $line; done; exit 5"))
	const request = "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
	ask := func(conn net.Conn) error {
		conn.SetDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.WriteString(conn, request); err != nil {
			return err
		}
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil {
			_, err = io.Copy(io.Discard, response.Body)
		}
		return err
	}
	var conns []net.Conn
	defer func() {
		for _, conn := range conns {
			conn.Close()
		}
	}()
	for i := range count {
		conn, err := net.Dial("tcp", d.addr)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
		if err := ask(conn); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	grown := d.rss() - rss
	open := map[int]bool{}
	for i := range conns {
		open[i] = true
	}
	// The daemon may have sent an answer and not yet got to counting the connection as one that waits: at its pace it does.
	waitFor(t, 10*time.Second, "no more connections than the bound", func() bool {
		for i := range open {
			conns[i].SetReadDeadline(time.Now().Add(time.Millisecond))
			if _, err := conns[i].Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				delete(open, i)
			}
		}
		return len(open) <= bound
	})
	for i := range conns[:bound-100] {
		if newest := count - 1 - i; !open[newest] {
			t.Errorf("connection %d of %d was closed", newest, count)
		}
	}
	if err := ask(conns[count-1]); err != nil {
		t.Errorf("the newest: %v", err)
	}
	if err := d.sendStdin(t, byPid(stream.pid), "still here\n"); err != nil {
		t.Error(err)
	}
	stream.readUntil(t, "still here\n")
	d.closeStdin(t, byPid(stream.pid))
	wantEnd(t, stream.collect().end, 5, true, "exit status 5")
	for _, conn := range conns {
		conn.Close()
	}
	t.Logf("%d connections, all answered: %d kept, %d closed by the daemon; RSS %d KiB and %d KiB", count, len(open), count-len(open), rss>>10, grown>>10)
	d.descriptorsReturn(t, before)
	if grown > 40<<20 && !raceEnabled() {
		t.Errorf("RSS grew by %d MiB", grown>>20)
	}
}
