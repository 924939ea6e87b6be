// The command line: flags in all their spellings, what ends the program and with which status, and `--cmd`.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "envd/proto"
)

// runBinary runs the daemon's binary with flags that make it end by itself.
func runBinary(t *testing.T, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, daemonBinary(t), args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || ctx.Err() != nil) {
		t.Fatalf("envd %q: %v, stderr %q", args, err, errOut.String())
	}
	return out.String(), errOut.String(), cmd.ProcessState.ExitCode()
}

func TestVersionFlags(t *testing.T) {
	t.Parallel()
	const version = `^0\.7\.0\n$`
	const commit = `^([0-9a-f]{7,40}(-dirty)?|unknown)\n$`
	for _, test := range []struct {
		args []string
		want string
	}{
		{argv("--version"), version},
		{argv("-version"), version},
		{argv("-version=true"), version},
		{argv("--version=true"), version},
		{argv("--commit"), commit},
		{argv("-commit"), commit},
		{argv("--version", "--commit"), version},
		{argv("-commit", "-version"), version},
		{argv("--version=false", "--commit"), commit},
	} {
		stdout, stderr, code := runBinary(t, test.args...)
		if !regexp.MustCompile(test.want).MatchString(stdout) || stderr != "" || code != 0 {
			t.Errorf("%q: stdout %q, stderr %q, exit %d; want stdout %s, exit 0", test.args, stdout, stderr, code, test.want)
		}
	}
}

func TestVersionTouchesNothing(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	port := fmt.Sprint(listener.Addr().(*net.TCPAddr).Port)
	runDir := filepath.Join(t.TempDir(), "run")
	for _, flag := range []string{"--version", "--commit"} {
		stdout, stderr, code := runBinary(t, "--isnotfc", "--listen", "127.0.0.1", "--port", port, "--run-dir", runDir,
			flag)
		if code != 0 || stderr != "" || stdout == "" {
			t.Errorf("%s on a taken port: stdout %q, stderr %q, exit %d", flag, stdout, stderr, code)
		}
	}
	if _, err := os.Stat(runDir); err == nil {
		t.Error("the run directory was made")
	}
}

func TestBadFlags(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"--no-such-flag"},
		{"-no-such-flag"},
		{"--isnotfc", "--no-such-flag=1"},
		{"--host-address", "nowhere"},
		{"--host-address", "10.0.0.1/33"},
		{"--port", "abc"},
		{"--port=4x"},
		{"--port"},
		{"--isnotfc=maybe"},
		{"--end-silence", "250"},
	} {
		stdout, stderr, code := runBinary(t, args...)
		if code != 2 || stdout != "" || !strings.Contains(stderr, "-port") {
			t.Errorf("%q: exit %d, stdout %q, stderr %q; want the usage on stderr, exit 2", args, code, stdout, stderr)
		}
		if name := strings.TrimLeft(strings.SplitN(args[len(args)-1], "=", 2)[0], "-"); strings.HasPrefix(name, "no-such") {
			if !strings.Contains(strings.SplitN(stderr, "\n", 2)[0], name) {
				t.Errorf("%q: the first line does not name the flag: %q", args, stderr)
			}
		}
	}
}

func TestHelpListsFlagsInGroups(t *testing.T) {
	t.Parallel()
	stdout, stderr, code := runBinary(t, "--help")
	if code != 0 {
		t.Errorf("exit %d, want 0", code)
	}
	help := stdout + stderr
	for flag, value := range map[string]string{
		"port": "49983", "listen": "", "isnotfc": "", "version": "", "commit": "", "cmd": "",
		"cgroup-root": "/sys/fs/cgroup", "no-cgroups": "", "verbose": "", "resume-handover": "",
		"allow-origin": "", "no-local-clients": "", "run-dir": "/run/wrenn", "forward-address": "169.254.0.21",
		"output-buffer": "524288", "output-memory": "", "output-ended": "4194304",
		"end-silence": "250ms", "end-grace": "2s", "retain-time": "10m", "retain-count": "4096",
		"start-timeout": "30s", "max-processes": "4096", "stall-timeout": "1m|60s", "stall-timeout-shared": "10s",
		"keepalive-interval": "1m30s|90s", "header-timeout": "30s", "idle-timeout": "10m40s|640s", "stop-timeout": "5s",
		"answer-timeout": "30s", "host-address": "", "pids-max": "7/16", "nameservers": "8.8.8.8,1.1.1.1",
		"sync-timeout": "2.4s", "prepared-timeout": "30s", "thaw-timeout": "10m0s",
	} {
		line := regexp.MustCompile(`(?m)^\s+--?` + flag + `\b[^-\w].*(\n\s{4,}[^-\s].*)*`).FindString(help)
		if line == "" {
			t.Errorf("--help does not list --%s", flag)
		} else if !regexp.MustCompile(value).MatchString(line) {
			t.Errorf("--%s: the default %s is not told: %q", flag, value, line)
		}
	}
	if groups := regexp.MustCompile(`(?m)^\S.*:$`).FindAllString(help, -1); len(groups) < 4 {
		t.Errorf("want the flags in groups, each under a heading; headings are %q", groups)
	}
}

func TestFlagSpellings(t *testing.T) {
	t.Parallel()
	for _, spelling := range []string{"-port=%d", "--port=%d", "-port %d", "--port %d"} {
		startDaemonWith(t, daemonConfig{portFlag: spelling}).healthy(t)
	}
}

func TestPortTaken(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	port := fmt.Sprint(listener.Addr().(*net.TCPAddr).Port)
	stdout, stderr, code := runBinary(t, "--isnotfc", "--no-cgroups", "--listen", "127.0.0.1", "--port", port,
		"--run-dir", filepath.Join(t.TempDir(), "run"))
	if code != 1 || strings.Count(stdout+stderr, "\n") != 1 || !strings.Contains(stderr, port) ||
		!strings.Contains(stderr, "address already in use") {
		t.Errorf("exit %d, stdout %q, stderr %q; want exit 1 and one line on stderr that names the port and the reason",
			code, stdout, stderr)
	}
}

func TestBadListenAddress(t *testing.T) {
	t.Parallel()
	_, stderr, code := runBinary(t, "--isnotfc", "--no-cgroups", "--listen", "192.0.2.1",
		"--port", fmt.Sprint(freePort(t)), "--run-dir", filepath.Join(t.TempDir(), "run"))
	if code != 1 || !strings.Contains(stderr, "192.0.2.1") {
		t.Errorf("an address that is not ours: exit %d, stderr %q; want exit 1 and the address", code, stderr)
	}
}

func TestListenAddress(t *testing.T) {
	t.Parallel()
	reachable := func(d *daemon, host string) bool {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(host, fmt.Sprint(d.port)), 2*time.Second)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}
	everywhere := startDaemonWith(t, daemonConfig{listen: "default"})
	if !reachable(everywhere, "127.0.0.1") || !reachable(everywhere, "127.0.0.2") {
		t.Error("without --listen the daemon must listen on all interfaces")
	}
	if probe, err := net.Listen("tcp", "[::1]:0"); err == nil {
		probe.Close()
		if !reachable(everywhere, "::1") {
			t.Error("without --listen the daemon must listen on IPv6 too")
		}
	}
	if here := startDaemon(t); reachable(here, "127.0.0.2") {
		t.Error("--listen 127.0.0.1 listens on other addresses as well")
	}
}

func TestAcceptedWithoutEffect(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "-verbose", "-resume-handover")
	if got := d.output(t, argv("echo", "ok")); got != "ok\n" {
		t.Errorf("got %q", got)
	}
}

// Both SIGTERM of an idle daemon and of one with streams and a half-sent request: exit 0 in time, children live on.
func TestSigtermLeavesChildrenAlone(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(testing.TB, ...string) *daemon{
		"cgroups": startDaemon, "process groups": startDaemonNoCgroups,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := start(t)
			watched := d.start(t, argv("sleep", "300"))
			terminal := d.start(t, argv("sleep", "300"), withPTY(80, 24), withTag("t"))
			_ = terminal
			unwatched := d.start(t, argv("sleep", "300"))
			unwatched.drop()
			conn, err := net.Dial("tcp", d.addr)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprint(conn, "POST /process.Process/List HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n")
			began := time.Now()
			if err := d.stop(t); err != nil {
				t.Errorf("the daemon ended with %v, want exit status 0", err)
			}
			if took := time.Since(began); took > 5*time.Second && !raceEnabled() {
				t.Errorf("SIGTERM took %v", took)
			}
			for _, pid := range []uint32{watched.pid, unwatched.pid} {
				if !isAlive(int(pid)) {
					t.Errorf("process %d did not survive the daemon's SIGTERM", pid)
				}
				syscall.Kill(int(pid), syscall.SIGKILL)
			}
			if r := watched.collect(); r.ends != 0 {
				t.Errorf("a stream that the daemon's end cuts must not look like an end: %v", r.events)
			} else if r.err == nil {
				t.Error("a stream that the daemon's end cuts must not look like success")
			}
		})
	}
}

func TestSigtermWhileIdleIsQuick(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	d.healthy(t) // leaves an idle keep-alive connection
	began := time.Now()
	if err := d.stop(t); err != nil {
		t.Errorf("the daemon ended with %v, want exit status 0", err)
	}
	if took := time.Since(began); took > 2*time.Second && !raceEnabled() {
		t.Errorf("an idle daemon took %v to stop", took)
	}
}

func TestLogLevel(t *testing.T) {
	t.Parallel()
	logged := func(level string) string {
		d := startDaemonWith(t, daemonConfig{env: append(os.Environ(), "ENVD_LOG="+level)})
		d.run(t, argv("true"))
		d.startError(t, argv("true"), withCwd("/no/such/directory"))
		if err := d.stop(t); err != nil {
			t.Error(err)
		}
		return d.log()
	}
	debug, errorsOnly := logged("debug"), logged("error")
	if len(debug) <= len(errorsOnly) || strings.Contains(errorsOnly, "INFO") || strings.Contains(errorsOnly, "DEBUG") {
		t.Errorf("ENVD_LOG has no effect: debug printed %q, error printed %q", debug, errorsOnly)
	}
	if strings.HasPrefix(debug, "{") {
		t.Errorf("with --isnotfc the log is text: %q", debug)
	}
	if info := logged("info"); strings.Contains(info, "DEBUG") {
		t.Errorf("ENVD_LOG=info prints debug lines: %q", info)
	}
}

func TestLogHoldsNoSecrets(t *testing.T) {
	t.Parallel()
	d := startDaemonWith(t, daemonConfig{env: append(os.Environ(), "ENVD_LOG=debug")})
	const token, value, input, output = "tokentokentoken", "valuevaluevalue", "inputinputinput", "outputoutputoutput"
	d.request(t, "POST", "/init", fmt.Sprintf(`{"accessToken":%q,"envVars":{"SECRET":%q}}`, token, value))
	auth := withHeader("X-Access-Token", token)
	s := d.start(t, argv("sh", "-c", `cat; printf '%s%s%s' "$A" "$A" "$A"; echo output >&2`), withEnv("A", "output"), auth)
	d.request(t, "POST", "/process.Process/SendInput",
		fmt.Sprintf(`{"process":{"pid":%d},"input":{"stdin":"aW5wdXRpbnB1dGlucHV0"}}`, s.pid),
		"Content-Type", "application/json", "X-Access-Token", token)
	d.request(t, "POST", "/process.Process/CloseStdin", fmt.Sprintf(`{"process":{"pid":%d}}`, s.pid),
		"Content-Type", "application/json", "X-Access-Token", token)
	if r := s.collect(); string(r.stdout) != input+output {
		t.Errorf("stdout %q", r.stdout)
	}
	d.request(t, "POST", "/init", `{"accessToken":"wrongwrongwrong"}`)
	d.request(t, "GET", "/envs", "", "X-Access-Token", "wrongwrongwrong")
	if err := d.stop(t); err != nil {
		t.Error(err)
	}
	for _, secret := range []string{token, value, input, "aW5wdXRpbnB1dGlucHV0", output, "wrongwrongwrong"} {
		if strings.Contains(d.log(), secret) {
			t.Errorf("the log holds %q:\n%s", secret, d.log())
		}
	}
}

// startCmd waits for the process of --cmd and attaches to it from its first byte.
func startCmd(t *testing.T, d *daemon) *clientStream {
	t.Helper()
	var s *clientStream
	waitFor(t, 5*time.Second, "a process with the tag startCmd", func() bool {
		opened, err := d.openConnect(t, byTag("startCmd"), withOutputFrom("all"))
		if err == nil {
			if event := opened.next(); event.GetStart() != nil {
				opened.pid, s = event.GetStart().GetPid(), opened
				t.Cleanup(opened.drop)
			}
		}
		return s != nil
	})
	return s
}

func TestCmd(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat("/bin/bash"); err != nil {
		t.Skip("needs /bin/bash: that is what --cmd runs")
	}
	for _, spelling := range []string{"-cmd", "--cmd"} {
		d := startDaemon(t, spelling, `echo "$0|$PWD|$USER|$(readlink /proc/self/fd/0)|$((6*7))"
			shopt -q login_shell && echo login
			exec sleep 300`)
		s := startCmd(t, d)
		if home := "/root"; os.Geteuid() == 0 {
			if got := s.readUntil(t, "login\n").stdout; string(got) != "/bin/bash|"+home+"|root|/dev/null|42\nlogin\n" {
				t.Errorf("--cmd printed %q", got)
			}
		}
		info := d.listed(t, s.pid)
		if info == nil {
			t.Fatal("the process of --cmd is not listed")
		}
		config := info.GetConfig()
		if info.GetTag() != "startCmd" || config.GetCmd() != "/bin/bash" || len(config.GetArgs()) != 3 ||
			config.GetArgs()[0] != "-l" || config.GetArgs()[1] != "-c" {
			t.Errorf("listed as %v, want /bin/bash -l -c CMD with the tag startCmd", info)
		}
		d.kill(t, s.pid)
		wantEnd(t, s.collect().end, -1, false, "signal: killed")
	}
}

func TestCmdWithoutBash(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemonWith(t, daemonConfig{hide: argv("/bin/bash"),
		args: argv("--cmd", `echo "$0 $((6*7))"; exec sleep 300`)})
	s := startCmd(t, d)
	if got := s.readUntil(t, "\n").stdout; string(got) != "/bin/sh 42\n" {
		t.Errorf("printed %q, want what /bin/sh -c prints", got)
	}
	if config := d.listed(t, s.pid).GetConfig(); config.GetCmd() != "/bin/sh" || config.GetArgs()[0] != "-c" {
		t.Errorf("listed as %v", config)
	}
}

func TestCmdThatFailsIsNotFatal(t *testing.T) {
	t.Parallel()
	t.Run("exits", func(t *testing.T) {
		t.Parallel()
		d := startDaemon(t, "--cmd", "echo gone; exit 7")
		r := startCmd(t, d).collect()
		wantEnd(t, r.end, 7, true, "exit status 7")
		if string(r.stdout) != "gone\n" {
			t.Errorf("stdout %q", r.stdout)
		}
	})
	t.Run("no user", func(t *testing.T) {
		t.Parallel()
		needRoot(t)
		d := startDaemonWith(t, daemonConfig{args: argv("--cmd", "sleep 300"),
			files: map[string]string{"/etc/passwd": "nobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n"}})
		if processes := d.list(t); len(processes) != 0 {
			t.Errorf("started %v", processes)
		}
		waitFor(t, 5*time.Second, "the failure logged", func() bool { return strings.Contains(d.log(), "root") })
	})
	t.Run("no home", func(t *testing.T) {
		t.Parallel()
		needRoot(t)
		d := startDaemonWith(t, daemonConfig{args: argv("--cmd", `echo "$PWD"; exec sleep 300`),
			files: map[string]string{"/etc/passwd": "root:x:0:0:root:/no/such/home:/bin/sh\n"}})
		if got := startCmd(t, d).readUntil(t, "\n").stdout; string(got) != "/\n" {
			t.Errorf("works in %q, want /", got)
		}
	})
}

// A run directory that cannot be made is a warning; so is the lack of root.
func TestOrdinaryUser(t *testing.T) {
	t.Parallel()
	d := startDaemonAsNobody(t, "--run-dir", "/proc/no/such/place")
	if got := d.output(t, argv("id", "-u"), withUser("nobody"), withCwd("/")); got != "65534\n" {
		t.Errorf("uid %q", got)
	}
	failure := d.startError(t, argv("id", "-u"), withUser("daemon"), withCwd("/"))
	if failure.Code().String() != "permission_denied" || failure.Message() == "" {
		t.Errorf("another user: %v, want permission_denied", failure)
	}
	t.Run("default user", func(t *testing.T) {
		// Without a Basic user the daemon's own user is meant: `root` is the default of a guest.
		r := d.start(t, argv("id", "-u"), withCwd("/")).collect()
		if r.err != nil || string(r.stdout) != "65534\n" {
			t.Errorf("stdout %q, error %v", r.stdout, r.err)
		}
	})
	t.Run("kill", func(t *testing.T) {
		s := d.start(t, sh("sleep 300 & sleep 300"), withUser("nobody"), withCwd("/"))
		d.kill(t, s.pid)
		wantEnd(t, s.collect().end, -1, false, "signal: killed")
	})
	t.Run("terminal", func(t *testing.T) {
		r := d.run(t, argv("tty"), withUser("nobody"), withCwd("/"), withPTY(80, 24))
		if !strings.HasPrefix(string(r.pty), "/dev/pts/") {
			t.Errorf("tty printed %q", r.pty)
		}
	})
	answer := d.request(t, "POST", "/init", `{"defaultUser":"nobody","envVars":{"A":"1"}}`)
	if answer.status != http.StatusNoContent {
		t.Errorf("/init: %d %q", answer.status, answer.body)
	}
}

// Leaves below the cgroup that the daemon is in already, when no root is named.
func TestOwnCgroup(t *testing.T) {
	t.Parallel()
	needRoot(t)
	if cgroupMount() == "" {
		t.Skip("needs cgroup v2: no hierarchy that this user may write to")
	}
	d := startDaemonWith(t, daemonConfig{noCgroup: true})
	membership := func(pid int) string {
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		return regexp.MustCompile(`(?m)^0::(.*)$`).FindString(string(text))
	}
	own := membership(d.pid)
	s := d.start(t, sh("setsid sleep 300 & setsid sleep 300 & echo on; wait"))
	s.readUntil(t, "on\n")
	leaf := membership(int(s.pid))
	if !strings.HasPrefix(leaf, own+"/") {
		t.Fatalf("the process is in %s, the daemon in %s", leaf, own)
	}
	if s2 := d.start(t, argv("sleep", "300")); membership(int(s2.pid)) == leaf {
		t.Error("two processes share a leaf")
	}
	var pids []int
	waitFor(t, 5*time.Second, "both in the background started", func() bool {
		pids = descendantsOf(int(s.pid))
		return len(pids) == 2
	})
	d.kill(t, s.pid)
	waitGone(t, time.Second, append(pids, int(s.pid))...)
	wantEnd(t, s.collect().end, -1, false, "signal: killed")
	dir := filepath.Join(cgroupMount(), strings.TrimPrefix(own, "0::"))
	d.signal(t, byPid(d.list(t)[0].GetPid()), pb.Signal_SIGNAL_SIGKILL)
	waitFor(t, 5*time.Second, "no process listed", func() bool { return len(d.list(t)) == 0 })
	if err := d.stop(t); err != nil {
		t.Error(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if entry.IsDir() {
			t.Errorf("the daemon left the cgroup %s behind", entry.Name())
		}
	}
}

// A limit with which nobody could be served is raised, and that is told.
func TestSmallMemoryLimit(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--memory-limit", "64KiB")
	if got := d.output(t, argv("echo", "served")); got != "served\n" {
		t.Errorf("got %q", got)
	}
	waitFor(t, 5*time.Second, "a line in the log", func() bool { return strings.Contains(d.log(), "--memory-limit is too small") })
}
