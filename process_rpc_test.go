// The Process service from a client's view: what a process finds when it starts, how its end is told, keep-alives,
// deadlines, input, terminals, signals, and the exact text of every error.

package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

// ---- start, output, end -------------------------------------------------------------------------------------------

func TestStartSequence(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	r := d.run(t, sh("echo $$; echo error >&2"))
	if r.events[0].GetStart() == nil || string(r.stdout) != fmt.Sprintf("%d\n", r.pid) || string(r.stderr) != "error\n" {
		t.Errorf("pid %d, stdout %q, stderr %q: start.pid is the command's own pid", r.pid, r.stdout, r.stderr)
	}
	if len(r.pty) != 0 || r.header.Get("Envd-Output-Offset") != "0" {
		t.Errorf("pty %q, headers %v", r.pty, r.header)
	}
	// Every byte, in order within each stream, in events of at most 128 KiB.
	r = d.run(t, sh("head -c 3000000 /dev/zero | tr '\\0' x; head -c 2000000 /dev/zero | tr '\\0' y >&2"))
	if !bytes.Equal(r.stdout, bytes.Repeat([]byte("x"), 3000000)) ||
		!bytes.Equal(r.stderr, bytes.Repeat([]byte("y"), 2000000)) {
		t.Errorf("%d bytes of stdout, %d of stderr", len(r.stdout), len(r.stderr))
	}
	for _, event := range r.events {
		if n := len(event.GetData().GetStdout()) + len(event.GetData().GetStderr()); n > 131072 {
			t.Errorf("an event of %d bytes", n)
		}
	}
}

func TestEndValues(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for script, want := range map[string]struct {
		exitCode int32
		exited   bool
		status   string
	}{
		"exit 0":         {0, true, "exit status 0"},
		"exit 1":         {1, true, "exit status 1"},
		"exit 7":         {7, true, "exit status 7"},
		"exit 255":       {255, true, "exit status 255"},
		"kill -KILL $$":  {-1, false, "signal: killed"},
		"kill -TERM $$":  {-1, false, "signal: terminated"},
		"kill -SEGV $$":  {-1, false, "signal: segmentation fault"},
		"kill -ABRT $$":  {-1, false, "signal: aborted"},
		"kill -HUP $$":   {-1, false, "signal: hangup"},
		"kill -INT $$":   {-1, false, "signal: interrupt"},
		"kill -QUIT $$":  {-1, false, "signal: quit"},
		"kill -PIPE $$":  {-1, false, "signal: broken pipe"},
		"kill -USR1 $$":  {-1, false, "signal: user defined signal 1"},
		"kill -RTMIN $$": {-1, false, "signal: signal 34"},
	} {
		t.Run(script, func(t *testing.T) {
			t.Parallel()
			wantEnd(t, d.run(t, sh("ulimit -c 0; "+script)).end, want.exitCode, want.exited, want.status)
		})
	}
	t.Run("core dump", func(t *testing.T) {
		t.Parallel()
		pattern, _ := os.ReadFile("/proc/sys/kernel/core_pattern")
		if strings.HasPrefix(string(pattern), "|") || strings.HasPrefix(string(pattern), "/") {
			t.Skipf("needs a relative core_pattern: it is %s", pattern)
		}
		r := d.run(t, sh("ulimit -c unlimited && kill -SEGV $$"), withCwd(publicDir(t)))
		if r.end.GetStatus() == "exit status 2" {
			t.Skip("needs a core size limit that may be raised")
		}
		wantEnd(t, r.end, -1, false, "signal: segmentation fault (core dumped)")
	})
}

func TestExtensionsOnlyOnRequest(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	began := time.Now()
	script := sh(`i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; sleep 300 & kill -TERM $$`)
	with, without := d.run(t, script, withExtensions()).end, d.run(t, script).end
	if without.Signal != 0 || without.CpuUserUs != 0 || without.StartTime != nil || without.EndTime != nil ||
		without.MaxRssBytes != 0 || without.OutputOpen || len(without.ProtoReflect().GetUnknown()) != 0 {
		t.Errorf("extension fields that nobody asked for: %v", without)
	}
	start, end := with.StartTime.AsTime(), with.EndTime.AsTime()
	if with.Signal != 15 || with.CpuUserUs == 0 || with.OomKilled || start.Before(began.Add(-time.Second)) ||
		end.Before(start) || end.After(time.Now().Add(time.Second)) {
		t.Errorf("extension fields: %v", with)
	}
	if !with.OutputOpen {
		t.Errorf("a background child holds the pipes, yet output_open is unset: %v", with)
	}
	if r := d.run(t, argv("true"), withExtensions()); r.end.OutputOpen || r.end.Signal != 0 {
		t.Errorf("true: %v", r.end)
	}
	wantEnd(t, with, -1, false, "signal: terminated")
	// The same by Connect, later.
	if r := d.run(t, argv("true")); d.connect(t, byPid(r.pid), withExtensions()).collect().end.GetEndTime() == nil {
		t.Error("Connect to an ended process sends no extension fields")
	}
}

// What cannot be executed is not an RPC error: start, one line of reason on stderr, exit 127 or 126.
func TestLaunchFailures(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d, _ := startDaemonWithUsers(t, daemonConfig{})
	dir := publicDir(t)
	plain := writeFile(t, filepath.Join(dir, "plain"), "echo ran\n", 0o644)
	badInterpreter := writeFile(t, filepath.Join(dir, "bad-interpreter"), "#!/no/such/interpreter\necho ran\n", 0o755)
	binary := writeFile(t, filepath.Join(dir, "binary"), "\x00\x01\x02\x03 nonsense", 0o755)
	private := filepath.Join(dir, "private")
	if err := os.Mkdir(private, 0o700); err != nil {
		t.Fatal(err)
	}
	hidden := writeFile(t, filepath.Join(private, "hidden"), "#!/bin/sh\n", 0o755)
	for what, test := range map[string]struct {
		argv []string
		user string
		code int32
	}{
		"not found in PATH":          {argv("no-such-command"), "root", 127},
		"not found by path":          {argv("/no/such/command", "arg"), "root", 127},
		"not found, relative":        {argv("./no-such-command"), "root", 127},
		"below a file":               {argv(plain + "/x"), "root", 127},
		"empty command":              {argv(""), "root", 127},
		"interpreter missing":        {argv(badInterpreter), "root", 127},
		"not executable":             {argv(plain), "root", 126},
		"not executable, other user": {argv(plain), "user", 126},
		"a directory":                {argv(dir), "root", 126},
		"a directory, relative":      {argv("./"), "user", 126},
		"not a program":              {argv(binary), "root", 126},
		"not a program, other user":  {argv(binary), "user", 126},
		"no permission on the way":   {argv(hidden), "user", 126},
	} {
		for _, terminal := range []bool{false, true} {
			options := []callOption{withUser(test.user)}
			if terminal {
				options = append(options, withPTY(80, 24))
			}
			r := d.run(t, test.argv, options...)
			wantEnd(t, r.end, test.code, true, fmt.Sprintf("exit status %d", test.code))
			text := string(r.stderr)
			if terminal {
				text = strings.ReplaceAll(string(r.pty), "\r\n", "\n")
			}
			if strings.Count(text, "\n") != 1 || !strings.HasSuffix(text, "\n") || len(text) < 10 ||
				!strings.Contains(text, test.argv[0]) || len(r.stdout) != 0 {
				t.Errorf("%s: stderr %q; want one line that names the command and the reason", what, text)
			}
		}
	}
}

// A text without an interpreter line is what shells run as a script.
func TestScriptWithoutInterpreter(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	dir := publicDir(t)
	script := writeFile(t, filepath.Join(dir, "script"), `echo "ran with $# $1 $2 as $0"`+"\n", 0o755)
	if got := d.output(t, argv(script, "a b", "c")); got != "ran with 2 a b c as "+script+"\n" {
		t.Errorf("got %q", got)
	}
	if got := d.output(t, argv("script", "x"), withEnv("PATH", "/no/such:"+dir)); got != "ran with 1 x  as "+script+"\n" {
		t.Errorf("through PATH: %q", got)
	}
	if got := d.output(t, argv("./script", "x"), withCwd(dir)); got != "ran with 1 x  as ./script\n" {
		t.Errorf("relative: %q", got)
	}
	empty := writeFile(t, filepath.Join(dir, "empty"), "", 0o755)
	wantEnd(t, d.run(t, argv(empty)).end, 0, true, "exit status 0")
}

// ---- what a process finds -----------------------------------------------------------------------------------------

func TestEnvironment(t *testing.T) {
	t.Parallel()
	needRoot(t)
	lines := func(text string) []string {
		list := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
		slices.Sort(list)
		return list
	}
	d, home := startDaemonWithUsers(t, daemonConfig{
		env: argv("PATH=/usr/bin:/bin", "JUNK=1", "HOME=/junk", "USER=junk", "TERM=junk")})
	check := func(what, got string, want ...string) {
		t.Helper()
		slices.Sort(want)
		if list := lines(got); !slices.Equal(list, want) {
			t.Errorf("%s:\ngot  %q\nwant %q", what, list, want)
		}
	}
	env := argv("env")
	check("root", d.output(t, env), "PATH=/usr/bin:/bin", "HOME=/root", "USER=root", "LOGNAME=root", "PWD=/root",
		"WRENN_SANDBOX=false")
	check("user", d.output(t, env, withUser("user")), "PATH=/usr/bin:/bin", "HOME="+home, "USER=user", "LOGNAME=user",
		"PWD="+home, "WRENN_SANDBOX=false")
	terminal := d.run(t, env, withUser("user"), withPTY(80, 24), withCwd("/tmp"))
	check("terminal", strings.ReplaceAll(string(terminal.pty), "\r", ""), "PATH=/usr/bin:/bin", "HOME="+home, "USER=user",
		"LOGNAME=user", "PWD=/tmp", "WRENN_SANDBOX=false")
	global := d.request(t, "POST", "/init", `{"envVars":{"A":"global","B":"global","HOME":"/global"}}`)
	if global.status != http.StatusNoContent {
		t.Fatalf("/init: %d", global.status)
	}
	check("overrides", d.output(t, env, withEnv("B", "own"), withEnv("USER", "own"), withEnv("PWD", "/own"),
		withEnv("E", "a=b\nc"), withEnv("EMPTY", ""), withCwd("/tmp")), "PATH=/usr/bin:/bin", "HOME=/global", "USER=own",
		"LOGNAME=root", "PWD=/own", "WRENN_SANDBOX=false", "A=global", "B=own", "E=a=b", "c", "EMPTY=")
	bare, _ := startDaemonWithUsers(t, daemonConfig{env: argv("LANG=C")})
	check("no PATH", bare.output(t, env), "HOME=/root", "USER=root", "LOGNAME=root", "PWD=/root", "WRENN_SANDBOX=false",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/games:/usr/local/games")
}

func TestPathSearch(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d, _ := startDaemonWithUsers(t, daemonConfig{})
	dir := publicDir(t)
	for _, sub := range []string{"bin", "denied", "later", "closed"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	writeFile(t, filepath.Join(dir, "bin/prog"), "#!/bin/sh\necho bin $PWD\n", 0o755)
	writeFile(t, filepath.Join(dir, "later/prog"), "#!/bin/sh\necho later\n", 0o755)
	writeFile(t, filepath.Join(dir, "later/other"), "#!/bin/sh\necho other\n", 0o755)
	writeFile(t, filepath.Join(dir, "denied/prog"), "#!/bin/sh\necho denied\n", 0o644)
	writeFile(t, filepath.Join(dir, "closed/prog"), "#!/bin/sh\necho closed\n", 0o755)
	writeFile(t, filepath.Join(dir, "file"), "", 0o755)
	writeFile(t, filepath.Join(dir, "prog"), "#!/bin/sh\necho here\n", 0o755)
	if err := os.Chmod(filepath.Join(dir, "closed"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ cmd, path, user, want string }{
		{"prog", dir + "/bin", "root", "bin " + dir + "\n"},
		{"prog", "bin", "root", "bin " + dir + "\n"},                   // relative to the child's directory
		{"prog", "/no/such:bin", "user", "bin " + dir + "\n"},          // on after ENOENT
		{"prog", dir + "/denied:" + dir + "/later", "user", "later\n"}, // on after EACCES
		{"prog", dir + "/closed:" + dir + "/later", "user", "later\n"}, // on after EACCES of the directory
		{"prog", "file:later", "root", "later\n"},                      // on after ENOTDIR
		{"other", "bin:denied:later", "user", "other\n"},
		{"bin/prog", "/no/such", "root", "bin " + dir + "\n"}, // a slash: no search
		{"./prog", "", "root", "here\n"},
		{"prog", "denied", "user", ""}, // 126
	} {
		r := d.run(t, argv(test.cmd), withEnv("PATH", test.path), withCwd(dir), withUser(test.user))
		if string(r.stdout) != test.want {
			t.Errorf("%s with PATH=%s as %s: stdout %q, stderr %q; want %q", test.cmd, test.path, test.user, r.stdout, r.stderr,
				test.want)
		}
		if test.want == "" {
			wantEnd(t, r.end, 126, true, "exit status 126")
		}
	}
	wantEnd(t, d.run(t, argv("prog"), withEnv("PATH", "bin"), withCwd("/")).end, 127, true, "exit status 127")
}

func TestCredentials(t *testing.T) {
	t.Parallel()
	needRoot(t)
	// The daemon itself is in a group and at a nice value that no child may keep.
	d, _ := startDaemonWithUsers(t, daemonConfig{steps: argv("groups", "62009", "nice", "5", "nofile", "1024")})
	for user, want := range map[string]struct{ uid, groups string }{
		"root":    {"0", "0"},
		"user":    {"61000", "61000"},
		"noshell": {"61001", "61001"},
		"grouped": {"61004", "61004 62001 62002"},
		"nobody":  {"65534", "65534"},
	} {
		for _, terminal := range []bool{false, true} {
			options := []callOption{withUser(user), withCwd("/")}
			if terminal {
				options = append(options, withPTY(80, 24))
			}
			r := d.run(t, argv("cat", "/proc/self/status", "/proc/self/stat", "/proc/self/oom_score_adj"), options...)
			text := strings.ReplaceAll(string(r.stdout)+string(r.pty), "\r", "")
			field := func(name string) string {
				value := regexp.MustCompile(`(?m)^` + name + `:\s*(.*?)\s*$`).FindStringSubmatch(text)
				if value == nil {
					t.Fatalf("no %s in %q", name, text)
				}
				return strings.Join(strings.Fields(value[1]), " ")
			}
			what := fmt.Sprintf("%s, terminal %v: ", user, terminal)
			four := strings.TrimSpace(strings.Repeat(want.uid+" ", 4))
			if field("Uid") != four || field("Gid") != four {
				t.Errorf(what+"Uid %s, Gid %s, want %s", field("Uid"), field("Gid"), four)
			}
			groups := strings.Fields(field("Groups"))
			slices.Sort(groups)
			if got := strings.Join(slices.Compact(groups), " "); got != want.groups {
				t.Errorf(what+"Groups %q, want %q", got, want.groups)
			}
			if field("SigBlk") != strings.Repeat("0", 16) || field("SigIgn") != strings.Repeat("0", 16) {
				t.Errorf(what+"SigBlk %s, SigIgn %s", field("SigBlk"), field("SigIgn"))
			}
			if field("Umask") != "0022" {
				t.Errorf(what+"umask %s", field("Umask"))
			}
			if field("NoNewPrivs") != "0" {
				t.Errorf(what+"NoNewPrivs %s", field("NoNewPrivs"))
			}
			if user != "root" && field("CapEff") != strings.Repeat("0", 16) {
				t.Errorf(what+"CapEff %s", field("CapEff"))
			}
			// stat(5): pid (comm) state ppid pgrp session tty_nr ..., nice is field 19.
			stat := strings.Fields(regexp.MustCompile(`(?m)^\d+ \(cat\) .*$`).FindString(text))
			pid := fmt.Sprint(r.pid)
			if stat[0] != pid || stat[4] != pid || stat[5] != pid {
				t.Errorf(what+"pid %s (start: %s), process group %s, session %s", stat[0], pid, stat[4], stat[5])
			}
			if (stat[6] != "0") != terminal {
				t.Errorf(what+"controlling terminal %s", stat[6])
			}
			if stat[18] != "0" {
				t.Errorf(what+"nice %s", stat[18])
			}
			if lines := strings.Fields(text); lines[len(lines)-1] != "100" {
				t.Errorf(what+"oom_score_adj %s", lines[len(lines)-1])
			}
		}
		if got := d.output(t, sh("ulimit -Sn"), withUser(user), withCwd("/")); got != "1024\n" {
			t.Errorf("%s: %s open files, want the soft limit that the daemon was given", user, got)
		}
	}
}

// Default dispositions and an empty mask, also when the daemon was started by nohup or with signals blocked.
func TestSignalsAreReset(t *testing.T) {
	t.Parallel()
	needRoot(t)
	ignored := []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGPIPE, syscall.SIGUSR1, syscall.SIGTSTP}
	blocked := []syscall.Signal{syscall.SIGHUP, syscall.SIGUSR2, syscall.SIGALRM, syscall.SIGWINCH}
	d, _ := startDaemonWithUsers(t, daemonConfig{ignore: ignored, block: blocked})
	for _, options := range [][]callOption{{withUser("root")}, {withUser("user")}, {withUser("root"), withPTY(80, 24)},
		{withUser("user"), withPTY(80, 24)}} {
		r := d.run(t, argv("cat", "/proc/self/status"), append(options, withCwd("/"))...)
		text := strings.Join(regexp.MustCompile(`Sig[BIC]\w+:\s+\w+`).FindAllString(string(r.stdout)+string(r.pty), -1), "\n")
		const zero = "0000000000000000"
		if text != "SigBlk:\t"+zero+"\nSigIgn:\t"+zero+"\nSigCgt:\t"+zero {
			t.Errorf("a child has\n%s", text)
		}
	}
	// And the daemon still reaps and ends under such a mask.
	s := d.start(t, argv("sleep", "300"))
	d.kill(t, s.pid)
	wantEnd(t, s.collect().end, -1, false, "signal: killed")
}

func TestDescriptors(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d, _ := startDaemonWithUsers(t, daemonConfig{})
	for range 5 { // descriptors of others that could be inherited
		d.start(t, argv("sleep", "300"))
		d.start(t, argv("sleep", "300"), withPTY(80, 24))
	}
	open := func(pid uint32) map[string]string {
		targets := map[string]string{}
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			target, _ := os.Readlink(filepath.Join(dir, entry.Name()))
			targets[entry.Name()] = regexp.MustCompile(`\d+`).ReplaceAllString(target, "N")
		}
		return targets
	}
	pipes := map[string]string{"0": "pipe:[N]", "1": "pipe:[N]", "2": "pipe:[N]"}
	noInput := map[string]string{"0": "/dev/null", "1": "pipe:[N]", "2": "pipe:[N]"}
	terminal := map[string]string{"0": "/dev/pts/N", "1": "/dev/pts/N", "2": "/dev/pts/N"}
	for what, test := range map[string]struct {
		options []callOption
		want    map[string]string
	}{
		"stdin absent":             {nil, pipes},
		"stdin true":               {[]callOption{withStdin(true)}, pipes},
		"stdin false":              {[]callOption{withStdin(false)}, noInput},
		"terminal":                 {[]callOption{withPTY(80, 24)}, terminal},
		"terminal and stdin false": {[]callOption{withPTY(80, 24), withStdin(false)}, terminal},
	} {
		for _, user := range []string{"root", "user"} {
			s := d.start(t, argv("sleep", "300"), append(test.options, withUser(user))...)
			// The kernel wakes the parent of a vfork a moment before it closes what is close-on-exec.
			waitFor(t, time.Second, fmt.Sprintf("%s as %s: descriptors %v", what, user, test.want), func() bool {
				return maps.Equal(open(s.pid), test.want)
			})
		}
	}
}

func TestWorkingDirectory(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d, home := startDaemonWithUsers(t, daemonConfig{})
	dir := publicDir(t)
	file := writeFile(t, filepath.Join(dir, "file"), "", 0o644)
	if err := errors.Join(os.Mkdir(home+"/sub", 0o755), os.Mkdir(dir+"/private", 0o700), os.Symlink(dir, home+"/link"),
		os.Symlink("/no/such", home+"/dangling")); err != nil {
		t.Fatal(err)
	}
	for cwd, want := range map[string]string{
		"": home, "~": home, "~/": home, "~/sub": home + "/sub", "sub": home + "/sub", ".": home, "sub/../sub": home + "/sub",
		"../user/sub": home + "/sub", "/": "/", dir: dir, "link": dir, "~/link": dir, "/tmp/../tmp": "/tmp",
	} {
		if got := d.output(t, argv("/bin/pwd", "-P"), withUser("user"), withCwd(cwd)); got != want+"\n" {
			t.Errorf("cwd %q: works in %q, want %q", cwd, got, want)
		}
	}
	if got := d.output(t, argv("/bin/pwd"), withUser("emptyhome")); got != "/\n" {
		t.Errorf("an empty home: works in %q", got)
	}
	base := filepath.Dir(home)
	for _, test := range []struct {
		cwd, user string
		prefix    string
		suffix    string
	}{
		{"/no/such", "user", "cwd '/no/such' does not exist", ""},
		{"/no/such/", "root", "cwd '/no/such/' does not exist", ""},
		{"nowhere", "user", "cwd '" + home + "/nowhere' does not exist", ""},
		{"dangling", "user", "cwd '" + home + "/dangling' does not exist", ""},
		{"", "nohome", "cwd '" + base + "/nohome' does not exist", ""},
		{"~root", "user", "failed to expand path '~root' for user 'user': cannot expand user-specific home dir", ""},
		{"~root/x", "root", "failed to expand path '~root/x' for user 'root': cannot expand user-specific home dir", ""},
		{file, "user", "error starting process 'pwd -P': ", "not a directory"},
		{file + "/x", "root", "error starting process 'pwd -P': ", "not a directory"},
		{dir + "/private", "user", "error starting process 'pwd -P': ", "permission denied"},
		{dir + "/private/x", "user", "error starting process 'pwd -P': ", "permission denied"},
	} {
		failure := d.startError(t, argv("pwd", "-P"), withUser(test.user), withCwd(test.cwd))
		message := failure.Message()
		if failure.Code() != connect.CodeInvalidArgument || !strings.HasPrefix(message, test.prefix) ||
			!strings.HasSuffix(message, test.suffix) || test.suffix == "" && message != test.prefix {
			t.Errorf("cwd %q as %s: %v: %s\nwant invalid_argument: %s…%s", test.cwd, test.user, failure.Code(), message,
				test.prefix, test.suffix)
		}
	}
	failure := d.startError(t, argv("pwd", "-P"), withCwd(file), withPTY(100, 30))
	prefix := fmt.Sprintf("error starting pty with command 'pwd -P' in dir '%s' with '100' cols and '30' rows: ", file)
	if failure.Code() != connect.CodeInvalidArgument || !strings.HasPrefix(failure.Message(), prefix) ||
		!strings.HasSuffix(failure.Message(), "not a directory") {
		t.Errorf("a terminal: %v, want %s…", failure, prefix)
	}
	if processes := d.list(t); len(processes) != 0 {
		t.Errorf("left over: %v", processes)
	}
}

func TestUsersWithGaps(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d, _ := startDaemonWithUsers(t, daemonConfig{})
	for user, want := range map[string]string{"noshell": "61001", "nohome": "61002", "emptyhome": "61003"} {
		if got := d.output(t, argv("id", "-u"), withUser(user), withCwd("/")); got != want+"\n" {
			t.Errorf("%s: uid %q", user, got)
		}
	}
	d = startDaemonWith(t, daemonConfig{files: map[string]string{
		"/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nbroken:x:what:0::/:/bin/sh\nshort:x:1\n\n:x:5:5::/:/bin/sh\n"}})
	for _, user := range []string{"broken", "short"} {
		failure := d.startError(t, argv("true"), withUser(user), withCwd("/"))
		if code := failure.Code(); code != connect.CodeInternal && code != connect.CodeUnauthenticated {
			t.Errorf("%s: %v", user, failure)
		}
	}
	wantEnd(t, d.run(t, argv("true")).end, 0, true, "exit status 0")
}

func TestNUL(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for what, test := range map[string]struct {
		argv    []string
		options []callOption
	}{
		"command":       {argv("tr\x00ue"), nil},
		"argument":      {argv("echo", "a\x00b"), nil},
		"variable":      {argv("true"), []callOption{withEnv("A", "a\x00b")}},
		"variable name": {argv("true"), []callOption{withEnv("A\x00", "b")}},
		"cwd":           {argv("true"), []callOption{withCwd("/tmp\x00")}},
		"with terminal": {argv("echo", "a\x00b"), []callOption{withPTY(80, 24)}},
	} {
		if failure := d.startError(t, test.argv, test.options...); failure.Code() != connect.CodeInvalidArgument ||
			failure.Message() == "" {
			t.Errorf("NUL in the %s: %v, want invalid_argument", what, failure)
		}
	}
}

// ---- keep-alives --------------------------------------------------------------------------------------------------

func TestKeepalive(t *testing.T) {
	t.Parallel()
	d, quick := startDaemon(t), startDaemon(t, "--keepalive-interval", "200ms")
	t.Run("first tick after one interval", func(t *testing.T) {
		t.Parallel()
		began := time.Now()
		s := d.start(t, argv("sleep", "300"), withKeepalive(1))
		event := s.next()
		if took := time.Since(began); event.GetKeepalive() == nil || took < 900*time.Millisecond || took > 3*time.Second {
			t.Errorf("%v after %v, want a keepalive after 1 s", event, took)
		}
		d.kill(t, s.pid)
		wantEnd(t, s.collect().end, -1, false, "signal: killed")
	})
	t.Run("restarts on data only", func(t *testing.T) {
		t.Parallel()
		s := quick.start(t, sh("for i in 1 2 3 4 5 6 7 8 9 10 11 12; do echo $i; sleep 0.05; done; sleep 0.7; echo last"))
		r := s.collect()
		seen, before := 0, 0
		for _, event := range r.events {
			if event.GetKeepalive() != nil {
				seen++
			}
			if bytes.Contains(event.GetData().GetStdout(), []byte("12\n")) {
				before = seen
			}
		}
		if before != 0 || seen < 1 || seen > 4 {
			t.Errorf("%d keepalives while data came every 50 ms, %d in all; want 0, and 2 or 3", before, seen)
		}
	})
	t.Run("input does not restart", func(t *testing.T) {
		t.Parallel()
		s := quick.start(t, sh("exec cat >/dev/null"))
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 20 {
				if d := quick; d.sendStdin(t, byPid(s.pid), "x") != nil {
					return
				}
				time.Sleep(50 * time.Millisecond) // the pace of a typist, not a synchronisation
			}
		}()
		r := s.read(t, "two keepalives", func(r *runResult) bool { return r.keepalives == 2 })
		if len(r.stdout) != 0 {
			t.Errorf("stdout %q", r.stdout)
		}
		<-done
		quick.kill(t, s.pid)
	})
	t.Run("Connect", func(t *testing.T) {
		t.Parallel()
		s := quick.start(t, argv("sleep", "300"))
		attached := quick.connect(t, byPid(s.pid))
		attached.read(t, "a keepalive", func(r *runResult) bool { return r.keepalives == 1 })
		quick.kill(t, s.pid)
		slow := quick.start(t, argv("sleep", "0.7"), withKeepalive(50)) // the header wins
		if r := slow.collect(); r.keepalives != 0 {
			t.Errorf("%d keepalives", r.keepalives)
		}
	})
	t.Run("values without sense", func(t *testing.T) {
		t.Parallel()
		for _, value := range []string{"0", "-1", "9223372036854775807", "-9223372036854775808", "99999999999999999999",
			"1e3", "garbage", "", "1.5", " "} {
			r := d.run(t, sh("sleep 0.1"), withHeader("Keepalive-Ping-Interval", value))
			if r.keepalives != 0 {
				t.Errorf("%q: %d keepalives", value, r.keepalives)
			}
			attached := d.connect(t, byPid(r.pid), withHeader("Keepalive-Ping-Interval", value))
			wantEnd(t, attached.collect().end, 0, true, "exit status 0")
		}
		// Not positive means the default.
		for _, value := range []string{"0", "-1", "garbage", ""} {
			s := quick.start(t, argv("sleep", "300"), withHeader("Keepalive-Ping-Interval", value))
			s.read(t, "a keepalive", func(r *runResult) bool { return r.keepalives == 1 })
			quick.kill(t, s.pid)
		}
	})
}

// ---- deadlines and disconnects ------------------------------------------------------------------------------------

// background starts a shell whose children include one of another session and one that is nobody's child any more.
const background = `sleep 300 & setsid sleep 300 & (setsid sleep 300 &) ; echo ready; wait; sleep 300`

// backgroundTree starts it and answers the pids of the whole tree.
func backgroundTree(t *testing.T, d *daemon, options ...callOption) (*clientStream, []int) {
	t.Helper()
	s := d.start(t, sh(background), options...)
	s.readUntil(t, "ready\n")
	var pids []int
	if d.cgroup == "" {
		waitFor(t, 5*time.Second, "the background children", func() bool {
			pids = descendantsOf(int(s.pid))
			return len(pids) == 2
		})
		return s, append(pids, int(s.pid))
	}
	leaf, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", s.pid))
	path := regexp.MustCompile(`(?m)^0::(.*)$`).FindStringSubmatch(string(leaf))
	waitFor(t, 5*time.Second, "the background children", func() bool {
		pids = cgroupProcesses(filepath.Join(cgroupMount(), path[1]))
		return len(pids) == 4
	})
	return s, pids
}

func TestTimeoutKillsTheTree(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	t.Run("attached", func(t *testing.T) {
		t.Parallel()
		began := time.Now()
		s, pids := backgroundTree(t, d, withTimeoutMs(1000))
		other := d.connect(t, byPid(s.pid))
		r := s.collect()
		took := time.Since(began)
		wantError(t, r.err, connect.CodeDeadlineExceeded, "context deadline exceeded")
		if r.ends != 0 || took < 900*time.Millisecond || took > 3*time.Second {
			t.Errorf("%d end events, after %v", r.ends, took)
		}
		if d.cgroup == "" {
			pids = []int{int(s.pid)}
		}
		waitGone(t, time.Second, pids...)
		wantEnd(t, other.collect().end, -1, false, "signal: killed")
	})
	t.Run("client gone", func(t *testing.T) {
		t.Parallel()
		s := d.start(t, argv("sleep", "300"), withTimeoutMs(700))
		s.drop()
		other := d.connect(t, byPid(s.pid))
		if !isAlive(int(s.pid)) {
			t.Error("dead before its time")
		}
		wantEnd(t, other.collect().end, -1, false, "signal: killed")
		waitGone(t, time.Second, int(s.pid))
	})
	t.Run("terminal", func(t *testing.T) {
		t.Parallel()
		s := d.start(t, argv("sleep", "300"), withTimeoutMs(300), withPTY(80, 24))
		wantError(t, s.collect().err, connect.CodeDeadlineExceeded, "context deadline exceeded")
		waitGone(t, time.Second, int(s.pid))
	})
	t.Run("ends in time", func(t *testing.T) {
		t.Parallel()
		wantEnd(t, d.run(t, sh("echo x; exit 4"), withTimeoutMs(30000)).end, 4, true, "exit status 4")
	})
	t.Run("output before the deadline arrives", func(t *testing.T) {
		t.Parallel()
		r := d.start(t, sh("echo early; exec sleep 300"), withTimeoutMs(500)).collect()
		if string(r.stdout) != "early\n" {
			t.Errorf("stdout %q", r.stdout)
		}
	})
	t.Run("process groups", func(t *testing.T) {
		t.Parallel()
		d := startDaemonNoCgroups(t)
		s := d.start(t, sh("sleep 300 & echo ready; wait"), withTimeoutMs(500))
		s.readUntil(t, "ready\n")
		pids := append(descendantsOf(int(s.pid)), int(s.pid))
		wantError(t, s.collect().err, connect.CodeDeadlineExceeded, "context deadline exceeded")
		waitGone(t, time.Second, pids...)
	})
}

func TestTimeoutHeaderWithoutSense(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	dir := publicDir(t)
	for i, test := range []struct{ value, codes, prefix string }{
		{"garbage", "invalid_argument", "parse timeout: "},
		{"12345678901", "invalid_argument", "parse timeout: "}, // 11 digits
		{"1.5", "invalid_argument", "parse timeout: "},
		{"99999999999999999999999", "invalid_argument", "parse timeout: "},
		{"0", "deadline_exceeded", ""},
		{"-1", "deadline_exceeded invalid_argument", ""},
		{"-999999999", "deadline_exceeded invalid_argument", ""},
	} {
		marker := filepath.Join(dir, fmt.Sprint(i))
		answer, frames := d.rawStream(t, "Start", fmt.Sprintf(`{"process":{"cmd":"touch","args":[%q]}}`, marker),
			"Connect-Timeout-Ms", test.value)
		if answer.status != 200 || len(frames) != 1 || frames[0].flags != 2 {
			t.Errorf("%q: %d, frames %q; want one end-of-stream message", test.value, answer.status, frames)
			continue
		}
		var end struct {
			Error struct{ Code, Message string }
		}
		json.Unmarshal([]byte(frames[0].payload), &end)
		if !slices.Contains(strings.Fields(test.codes), end.Error.Code) || end.Error.Message == "" ||
			!strings.HasPrefix(end.Error.Message, test.prefix) {
			t.Errorf("%q: %q, want %s: %s…", test.value, frames[0].payload, test.codes, test.prefix)
		}
		if _, err := os.Stat(marker); err == nil {
			t.Errorf("%q: the process was started", test.value)
		}
	}
	if r := d.run(t, argv("true"), withTimeoutMs(9999999999)); r.ends != 1 {
		t.Errorf("ten digits: %v", r)
	}
	d.healthy(t)
}

func TestConnectTimeoutEndsTheStreamOnly(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, argv("cat"))
	attached := d.connect(t, byPid(s.pid), withTimeoutMs(300))
	r := attached.collect()
	wantError(t, r.err, connect.CodeDeadlineExceeded, "context deadline exceeded")
	if r.ends != 0 || !isAlive(int(s.pid)) {
		t.Errorf("%d ends, alive %v", r.ends, isAlive(int(s.pid)))
	}
	if err := d.sendStdin(t, byPid(s.pid), "still here\n"); err != nil {
		t.Fatal(err)
	}
	s.readUntil(t, "still here\n")
	d.kill(t, s.pid)
}

func TestDisconnectLeavesTheProcess(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh("while read line; do echo got $line; done; echo eof"), withTag("lives"))
	s.drop()
	for i := range 3 {
		if err := d.sendStdin(t, byTag("lives"), fmt.Sprintf("%d\n", i)); err != nil {
			t.Fatal(err)
		}
	}
	attached := d.connect(t, byTag("lives"))
	attached.readUntil(t, "got 2\n")
	if err := d.closeStdin(t, byPid(s.pid)); err != nil {
		t.Fatal(err)
	}
	r := attached.collect()
	if wantEnd(t, r.end, 0, true, "exit status 0"); string(r.stdout) != "eof\n" {
		t.Errorf("stdout %q", r.stdout)
	}
}

// ---- Connect, List, selectors -------------------------------------------------------------------------------------

func TestConnectShares(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh("read go; head -c 300000 /dev/zero; echo done; exit 5"))
	var attached []*clientStream
	for range 5 {
		attached = append(attached, d.connect(t, byPid(s.pid)))
	}
	if err := d.sendStdin(t, byPid(s.pid), "go\n"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	results := make([]runResult, len(attached)+1)
	for i, one := range append(attached, s) {
		wg.Go(func() { results[i] = one.collect() })
	}
	wg.Wait()
	for i, r := range results {
		wantEnd(t, r.end, 5, true, "exit status 5")
		if len(r.stdout) != 300005 || r.err != nil || r.pid != s.pid {
			t.Errorf("subscriber %d: %d bytes, error %v, pid %d", i, len(r.stdout), r.err, r.pid)
		}
	}
}

func TestConnectAfterTheEnd(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh("echo first; read x; echo second; exit 7"), withTag("ended"))
	s.readUntil(t, "first\n")
	s.drop()
	if err := d.sendStdin(t, byPid(s.pid), "\n"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 5*time.Second, "the process is gone from List", func() bool { return d.listed(t, s.pid) == nil })
	// What no client has been sent comes first; `all`, `new` and an offset choose.
	for _, selector := range []*pb.ProcessSelector{byPid(s.pid), byTag("ended")} {
		for from, want := range map[string]struct{ stdout, offset string }{
			"all": {"first\nsecond\n", "0"}, "new": {"", "13"}, "0": {"first\nsecond\n", "0"}, "3": {"st\nsecond\n", "3"},
			"13": {"", "13"},
		} {
			r := d.connect(t, selector, withOutputFrom(from)).collect()
			wantEnd(t, r.end, 7, true, "exit status 7")
			if string(r.stdout) != want.stdout || r.pid != s.pid || r.header.Get("Envd-Output-Offset") != want.offset ||
				r.header.Get("Envd-Output-Lost") != "0" {
				t.Errorf("%v from %s: stdout %q, headers %v; want %v", selector, from, r.stdout, r.header, want)
			}
		}
	}
	for _, from := range []string{"14", "-1", "x", "1.0", "18446744073709551616", "ALL!"} {
		opened, err := d.openConnect(t, byPid(s.pid), withOutputFrom(from))
		if err == nil {
			err = opened.collect().err
		}
		if connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("from %q: %v, want invalid_argument", from, err)
		}
	}
	// An ended process is no target any more.
	id := byPid(s.pid)
	message := fmt.Sprintf("process with pid %d not found", s.pid)
	wantError(t, d.signal(t, id, pb.Signal_SIGNAL_SIGKILL), connect.CodeNotFound, message)
	wantError(t, d.sendStdin(t, id, "x"), connect.CodeNotFound, message)
	wantError(t, d.closeStdin(t, id), connect.CodeNotFound, message)
	_, err := d.process().Update(t.Context(), connect.NewRequest(&pb.UpdateRequest{Process: id}))
	wantError(t, err, connect.CodeNotFound, message)
}

func TestRetentionIsBounded(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--retain-count", "3", "--retain-time", "1s")
	var pids []uint32
	for range 5 {
		pids = append(pids, d.run(t, argv("true")).pid)
	}
	gone := func(pid uint32) bool {
		s, err := d.openConnect(t, byPid(pid))
		if err == nil {
			err = s.collect().err
		}
		return connect.CodeOf(err) == connect.CodeNotFound
	}
	for i, pid := range pids {
		if gone(pid) != (i < 2) {
			t.Errorf("process %d of 5: gone %v; the three newest are kept", i, gone(pid))
		}
	}
	waitFor(t, 5*time.Second, "all forgotten after the retention time", func() bool {
		return gone(pids[4]) && gone(pids[2])
	})
}

func TestList(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	if processes := d.list(t); len(processes) != 0 {
		t.Errorf("at first: %v", processes)
	}
	plain := d.start(t, argv("sleep", "300"))
	full := d.start(t, argv("sleep", "301"), withTag("name"), withCwd("/tmp"), withEnv("A", "b"), withPTY(1, 1))
	emptyTag := d.start(t, argv("sleep", "302"), withTag(""), withCwd(""))
	d.run(t, argv("true"))
	got := map[uint32]*pb.ProcessInfo{}
	for _, info := range d.list(t) {
		got[info.GetPid()] = info
	}
	if len(got) != 3 {
		t.Errorf("%d processes: %v", len(got), got)
	}
	if info := got[plain.pid]; info.Tag != nil || info.Config.Cwd != nil || info.Config.GetCmd() != "sleep" ||
		!slices.Equal(info.Config.GetArgs(), argv("300")) || len(info.Config.GetEnvs()) != 0 {
		t.Errorf("as requested, and nothing else: %v", info)
	}
	if info := got[full.pid]; info.GetTag() != "name" || info.Config.GetCwd() != "/tmp" ||
		!maps.Equal(info.Config.GetEnvs(), map[string]string{"A": "b"}) {
		t.Errorf("with everything: %v", info)
	}
	if info := got[emptyTag.pid]; info.Tag == nil || info.Config.Cwd == nil || info.GetTag() != "" {
		t.Errorf("empty but present: %v", info)
	}
	d.kill(t, plain.pid)
	plain.collect()
	if d.listed(t, plain.pid) != nil {
		t.Error("listed after its end event")
	}
	if isAlive(int(plain.pid)) || syscall.Kill(int(plain.pid), 0) == nil {
		t.Error("not reaped after its end event")
	}
}

func TestTags(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	streams := map[string]*clientStream{}
	for _, tag := range []string{"a", "b", "c", "ü b", "1"} {
		streams[tag] = d.start(t, argv("cat"), withTag(tag))
	}
	for tag, s := range streams {
		if err := d.sendStdin(t, byTag(tag), tag+"\n"); err != nil {
			t.Errorf("tag %q: %v", tag, err)
			continue
		}
		s.readUntil(t, tag+"\n")
	}
	// Tags need not be unique; a killed one leaves the other.
	twin := d.start(t, argv("cat"), withTag("a"))
	for range 2 {
		if err := d.signal(t, byTag("a"), pb.Signal_SIGNAL_SIGKILL); err != nil {
			t.Error(err)
		}
		waitFor(t, 5*time.Second, "one less", func() bool {
			dead := 0
			for _, pid := range []uint32{twin.pid, streams["a"].pid} {
				if !isAlive(int(pid)) {
					dead++
				}
			}
			return dead > 0
		})
		if d.listed(t, twin.pid) == nil && d.listed(t, streams["a"].pid) == nil {
			break
		}
	}
	waitGone(t, 5*time.Second, int(twin.pid), int(streams["a"].pid))
	wantError(t, d.signal(t, byTag("A"), pb.Signal_SIGNAL_SIGKILL), connect.CodeNotFound, "process with tag A not found")
}

// ---- input --------------------------------------------------------------------------------------------------------

func TestSendInput(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, argv("cat"))
	id := byPid(s.pid)
	var want bytes.Buffer
	for i := range 50 {
		part := strings.Repeat(fmt.Sprintf("%02d", i), 2000)
		want.WriteString(part)
		if err := d.sendStdin(t, id, part); err != nil {
			t.Fatal(err)
		}
		if i%10 == 0 {
			if err := d.sendStdin(t, id, ""); err != nil {
				t.Errorf("empty input: %v", err)
			}
		}
	}
	if err := d.closeStdin(t, id); err != nil {
		t.Errorf("CloseStdin: %v", err)
	}
	r := s.collect()
	if wantEnd(t, r.end, 0, true, "exit status 0"); !bytes.Equal(r.stdout, want.Bytes()) {
		t.Errorf("%d bytes came back of %d", len(r.stdout), want.Len())
	}
}

// Writes of concurrent calls to one process do not mix, even when each is larger than the pipe.
func TestConcurrentInputIsSerialised(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, argv("cat"))
	const writers, size = 8, 200_000
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			if err := d.sendStdin(t, byPid(s.pid), strings.Repeat(string(rune('a'+i)), size)); err != nil {
				t.Error(err)
			}
		})
	}
	done := make(chan runResult)
	go func() { done <- s.collect() }()
	wg.Wait()
	if err := d.closeStdin(t, byPid(s.pid)); err != nil {
		t.Fatal(err)
	}
	r := <-done
	if len(r.stdout) != writers*size {
		t.Fatalf("%d bytes", len(r.stdout))
	}
	for block := range slices.Chunk(r.stdout, size) {
		if len(bytes.Trim(block, string(block[:1]))) != 0 {
			t.Fatal("the writes are mixed")
		}
	}
}

func TestStdinOff(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh("cat; echo eof; exec sleep 300"), withStdin(false))
	s.readUntil(t, "eof\n")
	id := byPid(s.pid)
	wantError(t, d.sendStdin(t, id, "x"), connect.CodeInternal, "error writing to stdin: stdin not enabled or closed")
	if err := d.closeStdin(t, id); err != nil {
		t.Errorf("CloseStdin without stdin: %v", err)
	}
	s2 := d.start(t, argv("cat"))
	if err := d.closeStdin(t, byPid(s2.pid)); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, s2.collect().end, 0, true, "exit status 0")
	s3 := d.start(t, sh("exec sleep 300"))
	for range 3 {
		if err := d.closeStdin(t, byPid(s3.pid)); err != nil {
			t.Errorf("CloseStdin: %v", err)
		}
	}
	wantError(t, d.sendStdin(t, byPid(s3.pid), "x"), connect.CodeInternal,
		"error writing to stdin: stdin not enabled or closed")
}

func TestBrokenPipe(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh("exec <&-; echo closed; exec sleep 300"))
	s.readUntil(t, "closed\n")
	err := d.sendStdin(t, byPid(s.pid), "x")
	prefix := fmt.Sprintf("error writing to stdin: error writing to stdin of process '%d': ", s.pid)
	var failure *connect.Error
	if !errors.As(err, &failure) || failure.Code() != connect.CodeInternal ||
		!strings.HasPrefix(failure.Message(), prefix) || !strings.Contains(failure.Message(), "broken pipe") {
		t.Errorf("%v, want internal: %s…broken pipe", err, prefix)
	}
	d.kill(t, s.pid)
}

// Input that a process does not take waits with its caller, holds up nothing else, and ends with the process.
func TestInputBlocksItsCallerOnly(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, argv("sleep", "300"))
	blocked := make(chan error, 1)
	go func() { blocked <- d.sendStdin(t, byPid(s.pid), strings.Repeat("x", 4<<20)) }()
	select {
	case err := <-blocked:
		t.Fatalf("4 MiB into a pipe that nobody reads: %v", err)
	case <-time.After(300 * time.Millisecond): // long enough to have been written if anything took it
	}
	d.healthy(t)
	if got := d.output(t, argv("echo", "others go on")); got != "others go on\n" {
		t.Errorf("got %q", got)
	}
	// A client that gives up frees what it holds.
	ctx, cancel := context.WithCancel(t.Context())
	gaveUp := make(chan error, 1)
	go func() {
		_, err := d.process().SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPid(s.pid),
			Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("y")}}}))
		gaveUp <- err
	}()
	cancel()
	<-gaveUp
	d.kill(t, s.pid)
	if err := <-blocked; err == nil {
		t.Error("the blocked input succeeded though the process was killed")
	}
	wantEnd(t, s.collect().end, -1, false, "signal: killed")
}

func TestStreamInput(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	one, two := d.start(t, argv("cat")), d.start(t, argv("cat"), withTag("two"))
	target := streamTarget
	ptyData := &pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("x")}}}}}
	keepalive := &pb.StreamInputRequest{Event: &pb.StreamInputRequest_Keepalive{
		Keepalive: &pb.StreamInputRequest_KeepAlive{}}}
	noInput := &pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{}}}
	emptyInput := &pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{
		Data: &pb.StreamInputRequest_DataEvent{Input: &pb.ProcessInput{}}}}
	send := func(messages ...*pb.StreamInputRequest) error {
		t.Helper()
		stream := d.process().StreamInput(t.Context())
		for _, message := range messages {
			if err := stream.Send(message); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
		}
		_, err := stream.CloseAndReceive()
		return err
	}
	ok := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	ok("an empty stream", send())
	ok("start alone", send(target(byPid(one.pid))))
	ok("data and keepalives", send(target(byPid(one.pid)), streamStdin([]byte("a")), keepalive, streamStdin([]byte("")),
		streamStdin([]byte("b\n"))))
	ok("a keepalive first", send(keepalive, target(byPid(one.pid)), streamStdin([]byte("c\n"))))
	one.readUntil(t, "ab\nc\n")
	ok("a second target", send(target(byPid(one.pid)), streamStdin([]byte("to one\n")), target(byTag("two")),
		streamStdin([]byte("to two\n"))))
	one.readUntil(t, "to one\n")
	two.readUntil(t, "to two\n")
	const invalid, noSelector = connect.CodeInvalidArgument, "invalid input type *process.ProcessSelector"
	for what, test := range map[string]struct {
		err     error
		code    connect.Code
		message string
	}{
		"data first": {send(streamStdin([]byte("x")), target(byPid(one.pid))), connect.CodeFailedPrecondition,
			"no start event received"},
		"unknown target": {send(target(byPid(4194305)), streamStdin([]byte("x"))), connect.CodeNotFound,
			"process with pid 4194305 not found"},
		"unknown tag":  {send(target(byTag("none"))), connect.CodeNotFound, "process with tag none not found"},
		"no target":    {send(target(nil)), invalid, noSelector},
		"empty target": {send(target(&pb.ProcessSelector{})), invalid, noSelector},
		"empty event":  {send(&pb.StreamInputRequest{}), invalid, "invalid event type <nil>"},
		"no input":     {send(target(byPid(one.pid)), noInput), invalid, "invalid input type <nil>"},
		"empty input":  {send(target(byPid(one.pid)), emptyInput), connect.CodeInvalidArgument, "invalid input type <nil>"},
	} {
		t.Run(what, func(t *testing.T) { wantError(t, test.err, test.code, test.message) })
	}
	if err := send(target(byPid(one.pid)), ptyData); connect.CodeOf(err) != connect.CodeInternal ||
		!strings.Contains(err.Error(), "error writing to tty: tty not assigned to process") {
		t.Errorf("terminal input to a pipe: %v", err)
	}
	// None of it closed stdin.
	if err := d.sendStdin(t, byPid(one.pid), "still open\n"); err != nil {
		t.Fatal(err)
	}
	one.readUntil(t, "still open\n")
	// What was sent before the target ended was delivered; the rest is an error, not a hang.
	short := d.start(t, argv("head", "-c", "5"))
	stream := d.process().StreamInput(t.Context())
	stream.Send(target(byPid(short.pid)))
	stream.Send(streamStdin([]byte("12345")))
	if r := short.collect(); string(r.stdout) != "12345" {
		t.Errorf("stdout %q", r.stdout)
	}
	for range 100 {
		if stream.Send(streamStdin(make([]byte, 64<<10))) != nil {
			break
		}
	}
	if _, err := stream.CloseAndReceive(); err == nil {
		t.Error("input to an ended process succeeded")
	}
}

// ---- terminals ----------------------------------------------------------------------------------------------------

func TestTerminal(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d, _ := startDaemonWithUsers(t, daemonConfig{})
	for user, uid := range map[string]string{"root": "0", "user": "61000"} {
		r := d.run(t, sh(`tty; stty size; stat -c %u "$(tty)"; echo controlling > /dev/tty; echo error >&2
			test -t 0 && test -t 1 && test -t 2 && echo all`), withUser(user), withPTY(100, 40))
		lines := strings.Split(string(r.pty), "\r\n")
		if len(lines) != 7 || !strings.HasPrefix(lines[0], "/dev/pts/") || lines[1] != "40 100" || lines[2] != uid ||
			lines[3] != "controlling" || lines[4] != "error" || lines[5] != "all" {
			t.Errorf("%s: the terminal shows %q", user, r.pty)
		}
		if len(r.stdout)+len(r.stderr) != 0 {
			t.Errorf("%s: stdout %q, stderr %q; a terminal has one output", user, r.stdout, r.stderr)
		}
	}
	noSize := d.run(t, argv("stty", "size"), func(c *clientCall) { c.request.Pty = &pb.PTY{} })
	if string(noSize.pty) != "0 0\r\n" {
		t.Errorf("without a size: %q", noSize.pty)
	}
	wantEnd(t, d.run(t, sh("exit 9"), withPTY(80, 24)).end, 9, true, "exit status 9")
}

func TestTerminalDialogue(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh(`echo ready; while read line; do echo "got $line"; stty size; done; echo eof`), withPTY(80, 24),
		withTag("terminal"))
	s.readUntil(t, "ready")
	id := byPid(s.pid)
	if err := d.sendPTY(t, id, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if got := s.readUntil(t, "got hello\r\n").pty; !bytes.HasPrefix(bytes.TrimLeft(got, "\r\n"), []byte("hello\r\n")) {
		t.Errorf("the terminal does not echo: %q", got)
	}
	update := func(selector *pb.ProcessSelector, size *pb.PTY) error {
		_, err := d.process().Update(t.Context(), connect.NewRequest(&pb.UpdateRequest{Process: selector, Pty: size}))
		return err
	}
	size := func(cols, rows uint32) *pb.PTY { return &pb.PTY{Size: &pb.PTY_Size{Cols: cols, Rows: rows}} }
	if err := update(byTag("terminal"), size(132, 50)); err != nil {
		t.Fatal(err)
	}
	d.sendPTY(t, id, "\n")
	s.readUntil(t, "50 132\r\n")
	if err := update(id, nil); err != nil {
		t.Errorf("Update without pty: %v", err)
	}
	// Values beyond 16 bits are clamped.
	if err := update(id, size(70000, 4294967295)); err != nil {
		t.Fatal(err)
	}
	d.sendPTY(t, id, "\n")
	s.readUntil(t, "65535 65535\r\n")
	// Another client sees what follows, and end of file is byte 4.
	other := d.connect(t, byTag("terminal"))
	wantError(t, d.closeStdin(t, id), connect.CodeFailedPrecondition,
		"error closing stdin: cannot close stdin for PTY process — send Ctrl+D (0x04) instead")
	d.sendPTY(t, id, "\x04")
	for _, stream := range []*clientStream{s, other} {
		r := stream.collect()
		if wantEnd(t, r.end, 0, true, "exit status 0"); !bytes.Contains(r.pty, []byte("eof\r\n")) {
			t.Errorf("the terminal shows %q", r.pty)
		}
	}
	resized := d.start(t, sh(`trap 'echo resized; exit 0' WINCH; echo ready; while :; do sleep 0.05; done`),
		withPTY(80, 24))
	resized.readUntil(t, "ready")
	if err := update(byPid(resized.pid), size(81, 24)); err != nil {
		t.Fatal(err)
	}
	if r := resized.collect(); !bytes.Contains(r.pty, []byte("resized\r\n")) {
		t.Errorf("no SIGWINCH: the terminal shows %q", r.pty)
	}
	interrupted := d.start(t, argv("cat"), withPTY(80, 24))
	d.sendPTY(t, byPid(interrupted.pid), "x\n")
	interrupted.readUntil(t, "x\r\nx\r\n")
	d.sendPTY(t, byPid(interrupted.pid), "\x03")
	wantEnd(t, interrupted.collect().end, -1, false, "signal: interrupt")
}

// ---- signals ------------------------------------------------------------------------------------------------------

func TestSignalsReachTheTree(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(testing.TB, ...string) *daemon{
		"cgroups": startDaemon, "process groups": startDaemonNoCgroups,
	} {
		for _, signal := range []pb.Signal{pb.Signal_SIGNAL_SIGKILL, pb.Signal_SIGNAL_SIGTERM} {
			t.Run(name+" "+signal.String(), func(t *testing.T) {
				t.Parallel()
				d := start(t)
				var s *clientStream
				var pids []int
				if d.cgroup != "" {
					s, pids = backgroundTree(t, d)
				} else {
					s = d.start(t, sh("sleep 300 & sleep 300 & echo ready; wait"))
					s.readUntil(t, "ready\n")
					waitFor(t, 5*time.Second, "two children", func() bool {
						pids = descendantsOf(int(s.pid))
						return len(pids) == 2
					})
					pids = append(pids, int(s.pid))
				}
				began := time.Now()
				if err := d.signal(t, byPid(s.pid), signal); err != nil {
					t.Fatal(err)
				}
				r := s.collect()
				status := map[pb.Signal]string{9: "signal: killed", 15: "signal: terminated"}[signal]
				if wantEnd(t, r.end, -1, false, status); time.Since(began) > time.Second {
					t.Errorf("end after %v", time.Since(began))
				}
				waitGone(t, time.Second, pids...)
				if d.listed(t, s.pid) != nil {
					t.Error("still listed")
				}
			})
		}
	}
}

// A background child that outlives its leader, its output pipe included: `end` comes soon, and the tree can be killed.
func TestBackgroundChild(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	began := time.Now()
	s := d.start(t, sh("sleep 300 & echo $!"), withExtensions())
	r := s.collect()
	if took := time.Since(began); took > 900*time.Millisecond {
		t.Errorf("end after %v", took)
	}
	wantEnd(t, r.end, 0, true, "exit status 0")
	child := atoi(t, string(r.stdout))
	if !isAlive(child) || !r.end.OutputOpen {
		t.Errorf("alive %v, output_open %v", isAlive(child), r.end.OutputOpen)
	}
	if d.cgroup != "" {
		if err := d.signal(t, byPid(s.pid), pb.Signal_SIGNAL_SIGKILL); err != nil {
			t.Errorf("what is left of the tree of an ended process: %v", err)
		}
		waitGone(t, time.Second, child)
	}
	syscall.Kill(child, syscall.SIGKILL)
	// The leader's own last words are never overtaken by the end.
	for range 20 {
		r := d.run(t, sh("head -c 200000 /dev/zero; echo last; (sleep 3; echo late) & exit 3"))
		if !bytes.HasSuffix(r.stdout, []byte("last\n")) || len(r.stdout) != 200005 {
			t.Fatalf("%d bytes, ending in %q", len(r.stdout), r.stdout[max(0, len(r.stdout)-10):])
		}
	}
}

func TestSIGTERMCanBeHandled(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh(`trap 'echo cleaning; exit 3' TERM; echo ready; while :; do sleep 0.05; done`))
	s.readUntil(t, "ready\n")
	if err := d.signal(t, byPid(s.pid), pb.Signal_SIGNAL_SIGTERM); err != nil {
		t.Fatal(err)
	}
	r := s.collect()
	if wantEnd(t, r.end, 3, true, "exit status 3"); !bytes.Contains(r.stdout, []byte("cleaning\n")) {
		t.Errorf("stdout %q, stderr %q", r.stdout, r.stderr)
	}
}

// After a kill the next process starts as if nothing had been, in the same leaf or another, whatever the kernel
// remembers of the kill.
func TestStartsAfterKills(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for round := range 10 {
		var streams []*clientStream
		for range 2 {
			streams = append(streams, d.start(t, argv("sleep", "300")), d.start(t, argv("sleep", "300"), withPTY(80, 24)))
		}
		for i, s := range streams {
			d.kill(t, s.pid)
			if i%2 == 0 {
				wantEnd(t, s.collect().end, -1, false, "signal: killed")
			}
		}
		for range 4 {
			for _, options := range [][]callOption{nil, {withPTY(80, 24)}} {
				r := d.run(t, sh("echo on; /bin/true; exit 3"), options...)
				wantEnd(t, r.end, 3, true, "exit status 3")
			}
		}
		if t.Failed() {
			t.Fatalf("in round %d", round)
		}
	}
}

// What a client sends to a process that has ended reaches nobody who came after it.
func TestSignalsToTheEndedHitNobodyElse(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(testing.TB, ...string) *daemon{
		"cgroups": startDaemon, "process groups": startDaemonNoCgroups,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := start(t)
			var ended []uint32
			for range 3 {
				ended = append(ended, d.run(t, argv("true")).pid)
			}
			var later []*clientStream
			for range 20 { // more than there are idle leaves
				later = append(later, d.start(t, argv("sleep", "300")))
			}
			for _, pid := range ended {
				for _, signal := range []pb.Signal{pb.Signal_SIGNAL_SIGTERM, pb.Signal_SIGNAL_SIGKILL} {
					wantError(t, d.signal(t, byPid(pid), signal), connect.CodeNotFound,
						fmt.Sprintf("process with pid %d not found", pid))
				}
			}
			for i, s := range later {
				if !isAlive(int(s.pid)) {
					t.Errorf("process %d of 20 died of a signal to an ended one", i)
				}
				d.kill(t, s.pid)
			}
		})
	}
}

// ---- errors -------------------------------------------------------------------------------------------------------

func TestErrors(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	client, ctx := d.process(), t.Context()
	pipe, terminal := d.start(t, argv("cat"), withTag("pipe")), d.start(t, argv("cat"), withPTY(80, 24))
	const noSelector, noInput = "invalid input type *process.ProcessSelector", "invalid input type <nil>"
	size := &pb.PTY{Size: &pb.PTY_Size{Cols: 1, Rows: 1}}
	type target struct {
		name     string
		selector *pb.ProcessSelector
		code     connect.Code
		message  string
	}
	targets := []target{
		{"unknown pid", byPid(4194305), connect.CodeNotFound, "process with pid 4194305 not found"},
		{"pid 0", byPid(0), connect.CodeNotFound, "process with pid 0 not found"},
		{"pid of the daemon", byPid(uint32(d.pid)), connect.CodeNotFound,
			fmt.Sprintf("process with pid %d not found", d.pid)},
		{"pid 1", byPid(1), connect.CodeNotFound, "process with pid 1 not found"},
		{"greatest pid", byPid(4294967295), connect.CodeNotFound, "process with pid 4294967295 not found"},
		{"unknown tag", byTag("T"), connect.CodeNotFound, "process with tag T not found"},
		{"empty tag", byTag(""), connect.CodeNotFound, "process with tag  not found"},
		{"no selector", nil, connect.CodeInvalidArgument, noSelector},
		{"empty selector", &pb.ProcessSelector{}, connect.CodeInvalidArgument, noSelector},
	}
	for _, target := range targets {
		for rpc, call := range map[string]func() error{
			"Update": func() error {
				_, err := client.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: target.selector, Pty: size}))
				return err
			},
			"SendInput":  func() error { return d.sendStdin(t, target.selector, "x") },
			"SendSignal": func() error { return d.signal(t, target.selector, pb.Signal_SIGNAL_SIGTERM) },
			"CloseStdin": func() error { return d.closeStdin(t, target.selector) },
			"Connect": func() error {
				s, err := d.openConnect(t, target.selector)
				if err == nil {
					err = s.collect().err
				}
				return err
			},
		} {
			t.Run(rpc+" "+target.name, func(t *testing.T) { wantError(t, call(), target.code, target.message) })
		}
	}
	input := func(selector *pb.ProcessSelector, input *pb.ProcessInput) error {
		_, err := client.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: selector, Input: input}))
		return err
	}
	for name, test := range map[string]struct {
		err    error
		code   connect.Code
		prefix string
		exact  bool
	}{
		"no signal": {d.signal(t, byPid(pipe.pid), 0), connect.CodeInvalidArgument,
			"invalid signal: SIGNAL_UNSPECIFIED", true},
		"another signal": {d.signal(t, byPid(pipe.pid), 2), connect.CodeInvalidArgument, "invalid signal: 2", true},
		"stdin to a terminal": {d.sendStdin(t, byPid(terminal.pid), "x"), connect.CodeInternal,
			"error writing to stdin: tty assigned to process", false},
		"terminal input to a pipe": {d.sendPTY(t, byPid(pipe.pid), "x"), connect.CodeInternal,
			"error writing to tty: tty not assigned to process", false},
		"no input":    {input(byPid(pipe.pid), nil), connect.CodeInvalidArgument, noInput, true},
		"empty input": {input(byPid(pipe.pid), &pb.ProcessInput{}), connect.CodeInvalidArgument, noInput, true},
		"resize without terminal": {func() error {
			_, err := client.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: byPid(pipe.pid), Pty: size}))
			return err
		}(), connect.CodeInternal, "error resizing tty: tty not assigned to process", true},
		"CloseStdin of a terminal": {d.closeStdin(t, byPid(terminal.pid)), connect.CodeFailedPrecondition,
			"error closing stdin: cannot close stdin for PTY process — send Ctrl+D (0x04) instead", true},
	} {
		var failure *connect.Error
		if !errors.As(test.err, &failure) || failure.Code() != test.code ||
			!strings.HasPrefix(failure.Message(), test.prefix) || test.exact && failure.Message() != test.prefix {
			t.Errorf("%s: got  %v\nwant %v: %s", name, test.err, test.code, test.prefix)
		}
	}
	// Update without pty does nothing to a pipe either.
	if _, err := client.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: byPid(pipe.pid)})); err != nil {
		t.Errorf("Update without pty: %v", err)
	}
	s, err := client.Start(ctx, connect.NewRequest(&pb.StartRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	for s.Receive() {
		t.Errorf("no process in the request, yet %v", s.Msg())
	}
	wantError(t, s.Err(), connect.CodeInvalidArgument, "process config required")
	// None of the errors did anything.
	if err := d.sendStdin(t, byTag("pipe"), "fine\n"); err != nil {
		t.Fatal(err)
	}
	pipe.readUntil(t, "fine\n")
}

// Selectors name processes, whoever started them; the acting user restricts nothing.
func TestControlByAnotherUser(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d, _ := startDaemonWithUsers(t, daemonConfig{})
	s := d.start(t, argv("cat"))
	request := connect.NewRequest(&pb.SendSignalRequest{Process: byPid(s.pid), Signal: pb.Signal_SIGNAL_SIGKILL})
	request.Header().Set("Authorization", basicAuth("user"))
	if _, err := d.process().SendSignal(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, s.collect().end, -1, false, "signal: killed")
}

func TestMaxProcesses(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--max-processes", "3")
	var streams []*clientStream
	for range 3 {
		streams = append(streams, d.start(t, argv("sleep", "300")))
	}
	if failure := d.startError(t, argv("true")); failure.Code() != connect.CodeResourceExhausted {
		t.Errorf("%v, want resource_exhausted", failure)
	}
	d.kill(t, streams[0].pid)
	streams[0].collect()
	d.run(t, argv("true"))
}

// ---- cgroups ------------------------------------------------------------------------------------------------------

func TestCgroupPlacement(t *testing.T) {
	t.Parallel()
	needRoot(t)
	if cgroupMount() == "" {
		t.Skip("needs cgroup v2: no hierarchy that this user may write to")
	}
	d, _ := startDaemonWithUsers(t, daemonConfig{})
	seen := map[string]bool{}
	for range 2 {
		for _, user := range []string{"root", "user"} {
			for group, options := range map[string][]callOption{"user": nil, "ptys": {withPTY(80, 24)}} {
				s := d.start(t, argv("sleep", "300"), append(options, withUser(user))...)
				text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", s.pid))
				match := regexp.MustCompile(`(?m)^0::(.*)$`).FindStringSubmatch(string(text))
				parent := filepath.Join(d.cgroup, group)
				if dir := filepath.Join(cgroupMount(), match[1]); filepath.Dir(dir) != parent || seen[dir] {
					t.Errorf("%s of %s is in %s, want a leaf of its own below %s", group, user, dir, parent)
				} else {
					seen[dir] = true
				}
			}
		}
	}
	// Leaves are used again: many processes, few directories.
	for range 60 {
		d.run(t, argv("true"))
	}
	entries, _ := os.ReadDir(filepath.Join(d.cgroup, "user"))
	leaves := 0
	for _, entry := range entries {
		if entry.IsDir() {
			leaves++
		}
	}
	if leaves > len(seen)+16 {
		t.Errorf("%d leaves after 60 processes", leaves)
	}
}

// A root that is no cgroup2 hierarchy is left alone, and the daemon works without.
func TestCgroupRootWithoutCgroup2(t *testing.T) {
	t.Parallel()
	dir := publicDir(t)
	d := startDaemonWith(t, daemonConfig{noCgroup: true, args: argv("--cgroup-root", dir)})
	d.run(t, argv("true"))
	if entries, _ := os.ReadDir(dir); len(entries) != 0 {
		t.Errorf("the daemon wrote into it: %v", entries)
	}
	var st unix.Statfs_t
	if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		t.Fatal("the test's own directory is cgroup2")
	}
}

// ---- what clients of today do -------------------------------------------------------------------------------------

// The requests of the published SDKs, byte for byte as they send them.
func TestAsSDKsDo(t *testing.T) {
	t.Parallel()
	needRoot(t)
	if _, err := os.Stat("/bin/bash"); err != nil {
		t.Skip("needs /bin/bash: SDKs run commands with it")
	}
	d, home := startDaemonWithUsers(t, daemonConfig{})
	headers := argv("Authorization", basicAuth("user"), "Keepalive-Ping-Interval", "50", "Connect-Timeout-Ms", "60000",
		"E2b-Sandbox-Id", "x", "E2b-Sandbox-Port", "49983", "User-Agent", "connect-python",
		"X-Access-Token", "ignored while unset")
	answer, frames := d.rawStream(t, "Start",
		`{"process":{"cmd":"/bin/bash","args":["-l","-c","pwd; exit 3"],"envs":{}},"stdin":false}`, headers...)
	if answer.status != 200 || len(frames) != 4 {
		t.Fatalf("%d, frames %q", answer.status, frames)
	}
	if !strings.HasPrefix(strings.ReplaceAll(frames[0].payload, " ", ""), `{"event":{"start":{"pid":`) {
		t.Errorf("the first message must be start: %q", frames[0].payload)
	}
	var data struct {
		Event struct{ Data struct{ Stdout []byte } }
	}
	if json.Unmarshal([]byte(frames[1].payload), &data); string(data.Event.Data.Stdout) != home+"\n" {
		t.Errorf("stdout %q", data.Event.Data.Stdout)
	}
	// Kill of what is gone must say not_found: SDKs answer false then.
	got := d.unary(t, "SendSignal", `{"process":{"pid":999999},"signal":"SIGNAL_SIGKILL"}`, headers...)
	if got.status != http.StatusNotFound {
		t.Errorf("%d %q", got.status, got.body)
	}
	// The host: a terminal with a tag, its stream dropped, reconnected, typed into and resized, all by tag.
	s := d.start(t, argv("/bin/bash", "-i", "-l"), withUser("user"), withPTY(80, 24), withTag("pty"),
		withEnv("TERM", "xterm-256color"), withEnv("LANG", "C.UTF-8"), withEnv("PS1", "$ "))
	s.drop()
	attached := d.connect(t, byTag("pty"))
	update := d.unary(t, "Update", `{"process":{"tag":"pty"},"pty":{"size":{"cols":100,"rows":30}}}`)
	if update.status != 200 {
		t.Errorf("Update: %d %q", update.status, update.body)
	}
	typed := base64.StdEncoding.EncodeToString([]byte("tput cols; echo $((6*7))\n"))
	input := d.unary(t, "SendInput", fmt.Sprintf(`{"process":{"tag":"pty"},"input":{"pty":%q}}`, typed))
	if input.status != 200 {
		t.Errorf("SendInput: %d %q", input.status, input.body)
	}
	attached.readUntil(t, "100\r\n42\r\n")
	if err := d.sendPTY(t, byTag("pty"), "exit\n"); err != nil {
		t.Fatal(err)
	}
	wantEnd(t, attached.collect().end, 0, true, "exit status 0")
}

func TestLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--retain-time", "100ms")
	exercise := func() {
		for i := range 20 {
			d.run(t, sh("echo x; exit 1"))
			d.run(t, argv("echo", "x"), withPTY(80, 24))
			d.run(t, argv("no-such-command"))
			d.startError(t, argv("true"), withCwd("/no/such"))
			s := d.start(t, argv("cat"), withTag(strconv.Itoa(i)))
			s.drop()
			d.kill(t, s.pid)
			d.startError(t, argv("sleep", "300"), withTimeoutMs(20))
		}
		waitFor(t, 5*time.Second, "nothing runs", func() bool { return len(d.list(t)) == 0 })
	}
	exercise()
	// Descriptors of idle cgroup leaves are kept on purpose, up to a bound.
	used := func() (open []string) {
		for _, fd := range d.fds() {
			if !strings.Contains(fd, "/cgroup") && !strings.Contains(fd, d.cgroup+"/") {
				open = append(open, fd)
			}
		}
		return open
	}
	before := used()
	exercise()
	exercise()
	for deadline := time.Now().Add(5 * time.Second); len(used()) > len(before)+5; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("descriptors:\nbefore %q\nafter  %q", before, used())
		}
	}
	// The child of a start that was given up may die after its client has its answer.
	waitFor(t, 5*time.Second, "no zombie", func() bool { return len(d.zombies()) == 0 })
}
