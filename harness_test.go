// The test bench: starts the real binary on a free port, with a run directory, a cgroup and, on demand, a user database
// of its own, talks to it as a client does, and takes everything away again. A daemon that dies, panics, races or
// does not leave within 5 s of SIGTERM fails the test that started it.
//
// The test binary has other roles too (a process that replaces /etc/passwd before it becomes envd, a child that ignores
// signals, ...): a copy of it named `envd-test-helper` runs the role that its first argument names.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
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

const helperName = "envd-test-helper"

// testRoles are what the helper can be. Test files add theirs in an init function.
var testRoles = map[string]func(args []string){
	"exec-prepared": execPrepared,
}

// suiteDir holds what all tests share: world-readable, so that daemons and children of other users can work in it.
var suiteDir string

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == helperName {
		role := testRoles[os.Args[1]]
		if role == nil {
			fmt.Fprintf(os.Stderr, "no role %q\n", os.Args[1])
			os.Exit(2)
		}
		role(os.Args[2:])
		os.Exit(0)
	}
	dir, err := os.MkdirTemp("", "envd-test-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	suiteDir = dir
	// A daemon that believes to be in a guest raises the machine's limits, and protects links.
	limits := map[string][]byte{}
	files, _ := filepath.Glob("/proc/sys/fs/inotify/max_*")
	links, _ := filepath.Glob("/proc/sys/fs/protected_*")
	for _, file := range append(files, links...) {
		limits[file], _ = os.ReadFile(file)
	}
	code := m.Run()
	for file, limit := range limits {
		os.WriteFile(file, limit, 0)
	}
	os.RemoveAll(dir)
	os.Exit(code)
}

// raceEnabled tells whether the tests were built with -race; then the daemon is too.
var raceEnabled = sync.OnceValue(func() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
})

var buildDaemon = sync.OnceValues(func() (string, error) {
	path := filepath.Join(suiteDir, "envd")
	build := exec.Command("tools/build", path) // the binary that `make build` makes
	if raceEnabled() {
		build.Args = append(build.Args, "-race")
	}
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("tools/build: %v\n%s", err, out)
	}
	return path, nil
})

// daemonBinary is the daemon under test, built once.
func daemonBinary(t testing.TB) string {
	t.Helper()
	path, err := buildDaemon()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

var copyHelper = sync.OnceValues(func() (string, error) {
	path := filepath.Join(suiteDir, helperName)
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return "", err
	}
	defer self.Close()
	file, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(file, self)
	return path, errors.Join(err, file.Close())
})

// helperBinary is a copy of the test binary that anyone may execute; its first argument is the role.
func helperBinary(t testing.TB) string {
	t.Helper()
	path, err := copyHelper()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// publicDir is t.TempDir for other users: every directory above it can be entered by anyone, and it is theirs to write.
func publicDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(suiteDir, "dir-")
	if err == nil {
		err = os.Chmod(dir, 0o777)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func writeFile(t testing.TB, path, content string, mode os.FileMode) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil { // past the umask
		t.Fatal(err)
	}
	return path
}

// waitFor polls until the condition holds and fails the test when it does not in time.
func waitFor(t testing.TB, timeout time.Duration, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", timeout, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the daemon starts processes of other users")
	}
}

// ---- the cgroup of a test -----------------------------------------------------------------------------------------

// cgroupMount is a cgroup v2 hierarchy, or "" when there is none that we may write to.
var cgroupMount = sync.OnceValue(func() string {
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	for line := range strings.Lines(string(mounts)) {
		before, after, _ := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if len(fields) < 5 || !strings.HasPrefix(after, "cgroup2 ") {
			continue
		}
		probe := filepath.Join(fields[4], fmt.Sprintf("envd-test-probe-%d", os.Getpid()))
		if os.Mkdir(probe, 0o755) == nil {
			os.Remove(probe)
			return fields[4]
		}
	}
	return ""
})

var cgroupSerial atomic.Int64

// newCgroup makes a cgroup for one test. At the end what runs in it is killed and the whole tree removed.
func newCgroup(t testing.TB) string {
	t.Helper()
	if cgroupMount() == "" {
		t.Skip("needs cgroup v2: no hierarchy that this user may write to")
	}
	dir := filepath.Join(cgroupMount(), fmt.Sprintf("envd-test-%d-%d", os.Getpid(), cgroupSerial.Add(1)))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
		waitFor(t, 5*time.Second, "cgroup removed: "+dir, func() bool { return removeCgroups(dir) == nil })
	})
	return dir
}

// removeCgroups removes a cgroup and those below it; it fails as long as anything runs there.
func removeCgroups(dir string) error {
	entries, _ := os.ReadDir(dir)
	for _, entry := range entries {
		if entry.IsDir() {
			removeCgroups(filepath.Join(dir, entry.Name()))
		}
	}
	if err := syscall.Rmdir(dir); err != nil && err != syscall.ENOENT {
		return err
	}
	return nil
}

// cgroupProcesses lists the pids in a cgroup and below it.
func cgroupProcesses(dir string) (pids []int) {
	filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
		if err == nil && entry.Name() == "cgroup.procs" {
			text, _ := os.ReadFile(path)
			for _, word := range strings.Fields(string(text)) {
				pid, _ := strconv.Atoi(word)
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

// ---- the daemon ---------------------------------------------------------------------------------------------------

// daemonConfig says how a daemon differs from the usual one.
type daemonConfig struct {
	args     []string            // further flags
	noCgroup bool                // no --cgroup-root: with --no-cgroups in args, process groups carry the signals
	program  string              // another build, or a script that becomes one
	as       *syscall.Credential // run it as an ordinary user
	env      []string            // its environment; nil: the test's own
	files    map[string]string   // path -> content, mounted over in a mount namespace of the daemon's own
	ignore   []syscall.Signal    // signals that it inherits as ignored
	block    []syscall.Signal    // signals that it inherits as blocked
	hide     []string            // files that do not exist for it (overlay, in a mount namespace of its own)
	steps    []string            // further preparations for execPrepared
	userNS   bool                // root of a user namespace of its own, in which limits (/proc/sys/user) can be set
	listen   string              // for --listen; "": 127.0.0.1; "default": the flag is not given
	portFlag string              // another spelling of `--port %d`
	netns    *netns              // where it runs and is talked to
	stdout   *os.File            // instead of the log, which then holds stderr alone
}

type daemon struct {
	url    string // http://127.0.0.1:PORT
	addr   string // 127.0.0.1:PORT
	port   int
	pid    int
	cmd    *exec.Cmd
	cgroup string // the --cgroup-root, or ""
	runDir string
	netns  *netns       // or nil
	dial   dialFunc     // from its network namespace
	http   *http.Client // HTTP/1.1
	h2     *http.Client // HTTP/2 with prior knowledge

	logFile string
	exited  chan struct{} // closed when the daemon has been waited for
	waitErr error         // valid once exited is closed
	stopped atomic.Bool   // its end is wanted
}

// startDaemon starts a daemon that leaves with the test.
func startDaemon(t testing.TB, args ...string) *daemon {
	t.Helper()
	return startDaemonWith(t, daemonConfig{args: args})
}

// startDaemonNoCgroups starts one whose signals go to process groups.
func startDaemonNoCgroups(t testing.TB, args ...string) *daemon {
	t.Helper()
	return startDaemonWith(t, daemonConfig{args: append([]string{"--no-cgroups"}, args...), noCgroup: true})
}

// startDaemonAsNobody starts one as an ordinary user.
func startDaemonAsNobody(t testing.TB, args ...string) *daemon {
	t.Helper()
	needRoot(t)
	return startDaemonWith(t, daemonConfig{args: args, noCgroup: true, as: &syscall.Credential{Uid: 65534, Gid: 65534}})
}

// The users of startDaemonWithUsers: name, uid, supplementary groups beyond the primary one (whose gid is the uid).
const (
	uidUser, uidNoShell, uidNoHome, uidEmptyHome, uidGrouped = 61000, 61001, 61002, 61003, 61004
)

// startDaemonWithUsers starts one that sees a user database of its own: `user` (a home below a temporary directory, a
// shell), `noshell`, `nohome` (its home does not exist), `emptyhome` (the field is empty), `grouped` (in two more
// groups), `nobody` and `root`. It answers the home of `user` as well.
func startDaemonWithUsers(t testing.TB, config daemonConfig) (d *daemon, home string) {
	t.Helper()
	needRoot(t)
	base := publicDir(t)
	for name, uid := range map[string]int{"user": uidUser, "noshell": uidNoShell, "grouped": uidGrouped} {
		dir := filepath.Join(base, name)
		if err := errors.Join(os.Mkdir(dir, 0o755), os.Chown(dir, uid, uid)); err != nil {
			t.Fatal(err)
		}
	}
	config.files = map[string]string{
		"/etc/passwd": fmt.Sprintf(`root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
user:x:%d:%d::%s/user:/bin/sh
noshell:x:%d:%d::%s/noshell:
nohome:x:%d:%d::%s/nohome:/bin/sh
emptyhome:x:%d:%d:::/bin/sh
grouped:x:%d:%d::%s/grouped:/bin/sh
`, uidUser, uidUser, base, uidNoShell, uidNoShell, base, uidNoHome, uidNoHome, base,
			uidEmptyHome, uidEmptyHome, uidGrouped, uidGrouped, base),
		"/etc/group": fmt.Sprintf(`root:x:0:
nogroup:x:65534:
user:x:%d:
noshell:x:%d:
nohome:x:%d:
emptyhome:x:%d:
grouped:x:%d:
first:x:62001:user2,grouped
second:x:62002:grouped,other
third:x:62003:other
`, uidUser, uidNoShell, uidNoHome, uidEmptyHome, uidGrouped),
	}
	return startDaemonWith(t, config), filepath.Join(base, "user")
}

func startDaemonWith(t testing.TB, config daemonConfig) *daemon {
	t.Helper()
	program := config.program
	if program == "" {
		program = daemonBinary(t)
	}
	base := publicDir(t)
	d := &daemon{runDir: filepath.Join(base, "run"), logFile: filepath.Join(base, "log"), dial: new(net.Dialer).DialContext}
	if config.netns != nil {
		d.netns, d.dial = config.netns, config.netns.dial
		config.steps = append(config.steps, "netns", config.netns.path())
	}

	// The daemon itself goes into a cgroup of the test's, so that whatever it leaves behind can be found and killed.
	var agentCgroup *os.File
	if os.Geteuid() == 0 && cgroupMount() != "" {
		group := newCgroup(t)
		for _, name := range []string{"agent", "root"} {
			if err := os.Mkdir(filepath.Join(group, name), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		var err error
		if agentCgroup, err = os.Open(filepath.Join(group, "agent")); err != nil {
			t.Fatal(err)
		}
		defer agentCgroup.Close()
		if !config.noCgroup {
			d.cgroup = filepath.Join(group, "root")
		}
	}

	log, err := os.Create(d.logFile)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()

	for attempt := 1; ; attempt++ {
		d.port = freePort(t)
		d.addr = fmt.Sprintf("127.0.0.1:%d", d.port)
		d.url = "http://" + d.addr
		portFlag := cmp.Or(config.portFlag, "--port %d")
		args := append(strings.Fields(fmt.Sprintf(portFlag, d.port)), "--isnotfc", "--run-dir", d.runDir)
		switch config.listen {
		case "":
			args = append(args, "--listen", "127.0.0.1")
		case "default":
		default:
			args = append(args, "--listen", config.listen)
		}
		if d.cgroup != "" {
			args = append(args, "--cgroup-root", d.cgroup)
		}
		args = append(args, config.args...)
		d.cmd = prepared(t, base, config, program, args)
		d.cmd.Stdout, d.cmd.Stderr = cmp.Or(config.stdout, log), log
		if agentCgroup != nil {
			d.cmd.SysProcAttr.UseCgroupFD, d.cmd.SysProcAttr.CgroupFD = true, int(agentCgroup.Fd())
		}
		if err := d.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		d.pid = d.cmd.Process.Pid
		d.exited = make(chan struct{})
		go func(cmd *exec.Cmd, exited chan struct{}) {
			d.waitErr = cmd.Wait()
			close(exited)
		}(d.cmd, d.exited)
		if d.answers(15 * time.Second) {
			break
		}
		if attempt == 3 || !strings.Contains(d.log(), "address already in use") {
			d.cmd.Process.Kill()
			<-d.exited
			if strings.Contains(d.log(), cannotPrepare) {
				t.Skipf("needs what this machine lacks: %s", d.log())
			}
			t.Fatalf("the daemon did not start: %v\n%s", d.waitErr, d.log())
		}
	}
	d.http = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, DialContext: d.dial}}
	h2 := &http.Transport{Protocols: new(http.Protocols), DialContext: d.dial}
	h2.Protocols.SetUnencryptedHTTP2(true)
	d.h2 = &http.Client{Transport: h2}
	t.Cleanup(func() { d.end(t) })
	return d
}

// answers polls /envs, which waits until all is ready, until it says 200; false when the daemon is gone or the time is up.
func (d *daemon) answers(timeout time.Duration) bool {
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: d.dial}, Timeout: time.Second}
	for deadline := time.Now().Add(timeout); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if d.gone() {
			return false
		}
		if response, err := client.Get(d.url + "/envs"); err == nil {
			response.Body.Close()
			if response.StatusCode == http.StatusOK || response.StatusCode == http.StatusForbidden { // --no-local-clients
				return true
			}
		}
	}
	return false
}

func (d *daemon) gone() bool {
	select {
	case <-d.exited:
		return true
	default:
		return false
	}
}

// log is what the daemon has printed so far.
func (d *daemon) log() string {
	text, _ := os.ReadFile(d.logFile)
	return string(text)
}

// stopPatience is a moment more than the 5 s that are promised; the race detector slows the daemon far more than that.
func stopPatience() time.Duration {
	if raceEnabled() {
		return 20 * time.Second
	}
	return 5500 * time.Millisecond
}

// stop sends SIGTERM and answers how the daemon ended; the cleanup then leaves it alone.
func (d *daemon) stop(t testing.TB) error {
	t.Helper()
	d.stopped.Store(true)
	d.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-d.exited:
	case <-time.After(stopPatience()):
		d.cmd.Process.Signal(syscall.SIGQUIT) // the goroutines show in the log
		select {
		case <-d.exited:
		case <-time.After(2 * time.Second):
			d.cmd.Process.Kill()
			<-d.exited
		}
		t.Errorf("the daemon did not leave within 5 s of SIGTERM")
	}
	return d.waitErr
}

func (d *daemon) end(t testing.TB) {
	d.http.CloseIdleConnections()
	d.h2.CloseIdleConnections()
	if d.gone() && !d.stopped.Load() {
		t.Errorf("the daemon died during the test: %v", d.waitErr)
	}
	var left []int
	if cgroupMount() == "" || os.Geteuid() != 0 { // else the cgroup's removal finds them
		left = descendantsOf(d.pid)
	}
	if !d.gone() {
		if err := d.stop(t); err != nil {
			t.Errorf("SIGTERM: the daemon ended with %v, want exit status 0", err)
		}
	}
	for _, pid := range left {
		syscall.Kill(pid, syscall.SIGKILL)
	}
	log := d.log()
	for _, sign := range []string{"panic: ", "panic serving", "fatal error: ", "DATA RACE", "goroutine 1 ["} {
		if strings.Contains(log, sign) {
			t.Errorf("the daemon's log holds %q", sign)
			break
		}
	}
	if t.Failed() {
		const most = 64 << 10
		if len(log) > most {
			log = log[:most/2] + "\n[...]\n" + log[len(log)-most/2:]
		}
		t.Logf("log of the daemon:\n%s", log)
	}
}

var (
	portsMu   sync.Mutex
	portsUsed = map[int]bool{} // guarded by portsMu
)

// freePort picks a port below the ephemeral range, where no outgoing connection can take it in the meantime.
func freePort(t testing.TB) int {
	t.Helper()
	portsMu.Lock()
	defer portsMu.Unlock()
	for range 1000 {
		port := 10000 + rand.IntN(22000)
		if portsUsed[port] {
			continue
		}
		portsUsed[port] = true
		if listener, err := net.Listen("tcp", fmt.Sprintf(":%d", port)); err == nil {
			listener.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return 0
}

// ---- roles of the helper ------------------------------------------------------------------------------------------

// prepared makes the command that starts the daemon; what Go cannot ask of the kernel by SysProcAttr is done by the
// helper, which then becomes the daemon.
func prepared(t testing.TB, base string, config daemonConfig, program string, args []string) *exec.Cmd {
	t.Helper()
	var steps []string
	for path, content := range config.files {
		copied := writeFile(t, filepath.Join(base, filepath.Base(path)), content, 0o644)
		steps = append(steps, "mount", copied+":"+path)
	}
	for _, signal := range config.ignore {
		steps = append(steps, "ignore", strconv.Itoa(int(signal)))
	}
	for _, signal := range config.block {
		steps = append(steps, "block", strconv.Itoa(int(signal)))
	}
	for _, path := range config.hide {
		steps = append(steps, "hide", path)
	}
	steps = append(steps, config.steps...)
	if len(steps) > 0 {
		args = slices.Concat([]string{"exec-prepared"}, steps, []string{"--", program}, args)
		program = helperBinary(t)
	}
	cmd := exec.Command(program, args...)
	cmd.Env = config.env
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: config.as}
	if slices.Contains(steps, "mount") || slices.Contains(steps, "hide") {
		cmd.SysProcAttr.Unshareflags = syscall.CLONE_NEWNS // Go makes the mounts private as well
	}
	if config.userNS {
		cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{Size: 1}}
	}
	return cmd
}

// ---- the client ---------------------------------------------------------------------------------------------------

// process is a client of the Process service: Connect over HTTP/1.1 with proto unless options say otherwise.
func (d *daemon) process(options ...connect.ClientOption) pb.ProcessClient {
	return pb.NewProcessClient(d.http, d.url, options...)
}

// call is one Start or Connect on its way.
type clientCall struct {
	ctx     context.Context
	client  pb.ProcessClient
	header  http.Header
	request *pb.StartRequest
}

type callOption func(*clientCall)

func withContext(ctx context.Context) callOption { return func(c *clientCall) { c.ctx = ctx } }
func withClient(p pb.ProcessClient) callOption   { return func(c *clientCall) { c.client = p } }
func withHeader(key, value string) callOption {
	return func(c *clientCall) { c.header.Set(key, value) }
}
func withUser(name string) callOption { return withHeader("Authorization", basicAuth(name)) }
func withTimeoutMs(n int) callOption  { return withHeader("Connect-Timeout-Ms", strconv.Itoa(n)) }
func withKeepalive(seconds int) callOption {
	return withHeader("Keepalive-Ping-Interval", strconv.Itoa(seconds))
}
func withExtensions() callOption            { return withHeader("Envd-Extensions", "1") }
func withOutputFrom(from string) callOption { return withHeader("Envd-Output-From", from) }
func withTag(tag string) callOption         { return func(c *clientCall) { c.request.Tag = &tag } }
func withCwd(dir string) callOption         { return func(c *clientCall) { c.request.Process.Cwd = &dir } }
func withStdin(on bool) callOption          { return func(c *clientCall) { c.request.Stdin = &on } }
func withPTY(cols, rows uint32) callOption {
	return func(c *clientCall) { c.request.Pty = &pb.PTY{Size: &pb.PTY_Size{Cols: cols, Rows: rows}} }
}
func withEnv(key, value string) callOption {
	return func(c *clientCall) {
		if c.request.Process.Envs == nil {
			c.request.Process.Envs = map[string]string{}
		}
		c.request.Process.Envs[key] = value
	}
}

func basicAuth(user string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"))
}

func argv(words ...string) []string { return words }
func sh(script string) []string     { return []string{"/bin/sh", "-c", script} }
func byPid(pid uint32) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: pid}}
}
func byTag(tag string) *pb.ProcessSelector {
	return &pb.ProcessSelector{Selector: &pb.ProcessSelector_Tag{Tag: tag}}
}

// stream is the answer of Start or Connect. Nothing is read ahead: who does not call next is a slow reader.
type clientStream struct {
	pid    uint32      // of the start event
	header http.Header // of the response

	receive func() (*pb.ProcessEvent, bool)
	failure func() error
	drop    func() // ends the stream from the client's side
}

// result is a stream read to its end.
type runResult struct {
	pid                 uint32
	stdout, stderr, pty []byte
	keepalives          int
	end                 *pb.ProcessEvent_EndEvent // the last one; nil when there was none
	ends                int
	events              []*pb.ProcessEvent // all of them, start included
	err                 error              // how the stream failed, or nil
	header              http.Header
}

func (d *daemon) call(t testing.TB, argv []string, options []callOption) *clientCall {
	c := &clientCall{ctx: t.Context(), header: http.Header{}, request: &pb.StartRequest{Process: &pb.ProcessConfig{}}}
	if len(argv) > 0 {
		c.request.Process.Cmd, c.request.Process.Args = argv[0], argv[1:]
	}
	for _, option := range options {
		option(c)
	}
	if c.client == nil {
		c.client = d.process()
	}
	return c
}

// A stream that outlives this, and an attack on demand, hangs; the tests' contexts carry no deadline, which a client would send to the daemon.
func streamWatchdog() time.Duration { return time.Minute + *attackFlag }

// open starts a process and reads nothing yet.
func (d *daemon) open(t testing.TB, argv []string, options ...callOption) (*clientStream, error) {
	t.Helper()
	c := d.call(t, argv, options)
	request := connect.NewRequest(c.request)
	for key, values := range c.header {
		request.Header()[key] = values
	}
	ctx, cancel := context.WithCancelCause(c.ctx)
	watchdog := time.AfterFunc(streamWatchdog(), func() { cancel(errors.New("the stream hangs")) })
	response, err := c.client.Start(ctx, request)
	if err != nil {
		cancel(nil)
		watchdog.Stop()
		return nil, err
	}
	return &clientStream{
		header: response.ResponseHeader(),
		receive: func() (*pb.ProcessEvent, bool) {
			if !response.Receive() {
				return nil, false
			}
			return response.Msg().GetEvent(), true
		},
		failure: response.Err,
		drop:    func() { watchdog.Stop(); cancel(nil); response.Close() },
	}, nil
}

// start starts a process and reads the start event, which must be the first.
func (d *daemon) start(t testing.TB, argv []string, options ...callOption) *clientStream {
	t.Helper()
	s, err := d.open(t, argv, options...)
	if err != nil {
		t.Fatalf("Start %q: %v", argv, err)
	}
	return s.started(t)
}

// connect attaches to a process and reads the start event.
func (d *daemon) connect(t testing.TB, selector *pb.ProcessSelector, options ...callOption) *clientStream {
	t.Helper()
	s, err := d.openConnect(t, selector, options...)
	if err != nil {
		t.Fatalf("Connect %v: %v", selector, err)
	}
	return s.started(t)
}

func (d *daemon) openConnect(t testing.TB, selector *pb.ProcessSelector, options ...callOption) (*clientStream, error) {
	t.Helper()
	c := d.call(t, nil, options)
	request := connect.NewRequest(&pb.ConnectRequest{Process: selector})
	for key, values := range c.header {
		request.Header()[key] = values
	}
	ctx, cancel := context.WithCancelCause(c.ctx)
	watchdog := time.AfterFunc(streamWatchdog(), func() { cancel(errors.New("the stream hangs")) })
	response, err := c.client.Connect(ctx, request)
	if err != nil {
		cancel(nil)
		watchdog.Stop()
		return nil, err
	}
	return &clientStream{
		header: response.ResponseHeader(),
		receive: func() (*pb.ProcessEvent, bool) {
			if !response.Receive() {
				return nil, false
			}
			return response.Msg().GetEvent(), true
		},
		failure: response.Err,
		drop:    func() { watchdog.Stop(); cancel(nil); response.Close() },
	}, nil
}

func (s *clientStream) started(t testing.TB) *clientStream {
	t.Helper()
	t.Cleanup(s.drop)
	event, ok := s.receive()
	if !ok {
		t.Fatalf("the stream ended before its start event: %v", s.failure())
	}
	if event.GetStart() == nil {
		t.Fatalf("the first event is %v, want start", event)
	}
	s.pid = event.GetStart().GetPid()
	return s
}

// next is the next event; nil at the end of the stream, whose failure then tells how it ended.
func (s *clientStream) next() *pb.ProcessEvent {
	event, _ := s.receive()
	return event
}

// collect reads to the end of the stream.
func (s *clientStream) collect() runResult {
	r := runResult{pid: s.pid, header: s.header}
	if s.pid != 0 {
		r.events = append(r.events, &pb.ProcessEvent{Event: &pb.ProcessEvent_Start{
			Start: &pb.ProcessEvent_StartEvent{Pid: s.pid}}})
	}
	for event := s.next(); event != nil; event = s.next() {
		r.add(event)
	}
	r.err = s.failure()
	s.drop()
	return r
}

func (r *runResult) add(event *pb.ProcessEvent) {
	r.events = append(r.events, event)
	switch e := event.Event.(type) {
	case *pb.ProcessEvent_Start:
		r.pid = e.Start.GetPid()
	case *pb.ProcessEvent_Data:
		r.stdout = append(r.stdout, e.Data.GetStdout()...)
		r.stderr = append(r.stderr, e.Data.GetStderr()...)
		r.pty = append(r.pty, e.Data.GetPty()...)
	case *pb.ProcessEvent_Keepalive:
		r.keepalives++
	case *pb.ProcessEvent_End:
		r.end = e.End
		r.ends++
	}
}

// read collects events until the output so far satisfies the condition; the stream goes on.
func (s *clientStream) read(t testing.TB, what string, enough func(r *runResult) bool) *runResult {
	t.Helper()
	r := &runResult{pid: s.pid, header: s.header}
	for !enough(r) {
		event := s.next()
		if event == nil {
			t.Fatalf("the stream ended (%v) before %s; stdout %q stderr %q pty %q", s.failure(), what, r.stdout, r.stderr, r.pty)
		}
		r.add(event)
	}
	return r
}

// readUntil reads until stdout or the terminal has shown a text.
func (s *clientStream) readUntil(t testing.TB, text string) *runResult {
	t.Helper()
	return s.read(t, fmt.Sprintf("output %q", text), func(r *runResult) bool {
		return bytes.Contains(r.stdout, []byte(text)) || bytes.Contains(r.pty, []byte(text))
	})
}

// run starts a process and reads its stream to the end, which must be a proper one.
func (d *daemon) run(t testing.TB, argv []string, options ...callOption) runResult {
	t.Helper()
	r := d.start(t, argv, options...).collect()
	if r.err != nil {
		t.Fatalf("%q: the stream failed: %v", argv, r.err)
	}
	if r.ends != 1 || r.events[len(r.events)-1].GetEnd() == nil {
		t.Fatalf("%q: %d end events, want exactly one, as the last event: %v", argv, r.ends, r.events)
	}
	return r
}

// output is the stdout of a command that must succeed.
func (d *daemon) output(t testing.TB, argv []string, options ...callOption) string {
	t.Helper()
	r := d.run(t, argv, options...)
	if r.end.GetStatus() != "exit status 0" {
		t.Fatalf("%q: %s, stderr %q", argv, r.end.GetStatus(), r.stderr)
	}
	return string(r.stdout)
}

// startError starts what cannot be started and answers the error of the stream.
func (d *daemon) startError(t testing.TB, argv []string, options ...callOption) *connect.Error {
	t.Helper()
	s, err := d.open(t, argv, options...)
	if err == nil {
		r := s.collect()
		if err = r.err; err == nil {
			t.Fatalf("Start %q succeeded: %v", argv, r.events)
		}
	}
	var failure *connect.Error
	if !errors.As(err, &failure) {
		t.Fatalf("Start %q: %v is no connect error", argv, err)
	}
	return failure
}

// wantError compares code and message of a call's error.
func wantError(t testing.TB, err error, code connect.Code, message string) {
	t.Helper()
	var failure *connect.Error
	switch {
	case err == nil:
		t.Errorf("no error, want %v: %s", code, message)
	case !errors.As(err, &failure):
		t.Errorf("%v is no connect error, want %v: %s", err, code, message)
	case failure.Code() != code || failure.Message() != message:
		t.Errorf("got  %v: %s\nwant %v: %s", failure.Code(), failure.Message(), code, message)
	}
}

// wantEnd compares an end event's four fields of the common contract.
func wantEnd(t testing.TB, end *pb.ProcessEvent_EndEvent, exitCode int32, exited bool, status string) {
	t.Helper()
	var failure *string
	if status != "exit status 0" {
		failure = &status
	}
	if end == nil {
		t.Errorf("no end event, want %s", status)
		return
	}
	sameFailure := (end.Error == nil) == (failure == nil) && (failure == nil || end.GetError() == *failure)
	if end.GetExitCode() != exitCode || end.GetExited() != exited || end.GetStatus() != status || !sameFailure {
		t.Errorf("end is {%v}, want exit_code %d, exited %v, status %q, error %v",
			end, exitCode, exited, status, failure != nil)
	}
}

// reply is a plain HTTP answer, read whole.
type httpReply struct {
	status int
	header http.Header
	body   string
}

// request sends a plain HTTP request; headers come as key, value, key, value.
func (d *daemon) request(t testing.TB, method, path, body string, headers ...string) httpReply {
	t.Helper()
	var reader io.Reader
	if body != "" {
		reader = strings.NewReader(body)
	}
	request, err := http.NewRequestWithContext(t.Context(), method, d.url+path, reader)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		request.Header.Add(headers[i], headers[i+1])
	}
	return d.do(t, request)
}

func (d *daemon) do(t testing.TB, request *http.Request) httpReply {
	t.Helper()
	response, err := d.http.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return httpReply{response.StatusCode, response.Header, string(content)}
}

// healthy fails the test unless the daemon serves the next request.
func (d *daemon) healthy(t testing.TB) {
	t.Helper()
	if got := d.request(t, "GET", "/health", ""); got.status != http.StatusOK {
		t.Fatalf("/health: %d %q", got.status, got.body)
	}
}

// list answers the running processes.
func (d *daemon) list(t testing.TB) []*pb.ProcessInfo {
	t.Helper()
	response, err := d.process().List(t.Context(), connect.NewRequest(&pb.ListRequest{}))
	if err != nil {
		t.Fatal(err)
	}
	return response.Msg.GetProcesses()
}

func (d *daemon) listed(t testing.TB, pid uint32) *pb.ProcessInfo {
	t.Helper()
	for _, info := range d.list(t) {
		if info.GetPid() == pid {
			return info
		}
	}
	return nil
}

func (d *daemon) signal(t testing.TB, selector *pb.ProcessSelector, signal pb.Signal) error {
	t.Helper()
	_, err := d.process().SendSignal(t.Context(),
		connect.NewRequest(&pb.SendSignalRequest{Process: selector, Signal: signal}))
	return err
}

func (d *daemon) kill(t testing.TB, pid uint32) {
	t.Helper()
	if err := d.signal(t, byPid(pid), pb.Signal_SIGNAL_SIGKILL); err != nil {
		t.Fatalf("SIGKILL to %d: %v", pid, err)
	}
}

func (d *daemon) sendStdin(t testing.TB, selector *pb.ProcessSelector, data string) error {
	t.Helper()
	_, err := d.process().SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: selector,
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte(data)}}}))
	return err
}

func (d *daemon) sendPTY(t testing.TB, selector *pb.ProcessSelector, data string) error {
	t.Helper()
	_, err := d.process().SendInput(t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: selector,
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte(data)}}}))
	return err
}

func (d *daemon) closeStdin(t testing.TB, selector *pb.ProcessSelector) error {
	t.Helper()
	_, err := d.process().CloseStdin(t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: selector}))
	return err
}

// frame is one envelope of a Connect stream: a flag byte and a payload.
type frame struct {
	flags   byte
	payload string
}

func (f frame) bytes() string {
	return string(binary.BigEndian.AppendUint32([]byte{f.flags}, uint32(len(f.payload)))) + f.payload
}

// rawStream calls a streaming method as an SDK does, in JSON over HTTP/1.1, and answers what came over the wire.
func (d *daemon) rawStream(t testing.TB, method, message string, headers ...string) (httpReply, []frame) {
	t.Helper()
	answer := d.request(t, "POST", "/process.Process/"+method, frame{0, message}.bytes(),
		append([]string{"Content-Type", "application/connect+json", "Connect-Protocol-Version", "1"}, headers...)...)
	var frames []frame
	for rest := answer.body; answer.status == http.StatusOK && rest != ""; {
		if len(rest) < 5 || len(rest)-5 < int(binary.BigEndian.Uint32([]byte(rest[1:5]))) {
			t.Fatalf("the stream is cut within a frame: %q", rest)
		}
		length := int(binary.BigEndian.Uint32([]byte(rest[1:5])))
		frames = append(frames, frame{rest[0], rest[5 : 5+length]})
		rest = rest[5+length:]
	}
	return answer, frames
}

// unary calls a unary method in JSON.
func (d *daemon) unary(t testing.TB, method, message string, headers ...string) httpReply {
	t.Helper()
	return d.request(t, "POST", "/process.Process/"+method, message,
		append([]string{"Content-Type", "application/json"}, headers...)...)
}

// wantJSON compares a JSON text with the expected one, whatever their spacing and order.
func wantJSON(t testing.TB, what, got, want string) {
	t.Helper()
	var g, w any
	if err := json.Unmarshal([]byte(want), &w); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(got), &g); err != nil || !reflect.DeepEqual(g, w) {
		t.Errorf("%s: got  %q\nwant %s", what, got, want)
	}
}

// ---- what can be seen of a process from outside -------------------------------------------------------------------

// fds lists what the daemon has open, as `number -> target`.
func (d *daemon) fds() (open []string) {
	dir := fmt.Sprintf("/proc/%d/fd", d.pid)
	entries, _ := os.ReadDir(dir)
	for _, entry := range entries {
		if target, err := os.Readlink(filepath.Join(dir, entry.Name())); err == nil {
			open = append(open, entry.Name()+" -> "+target)
		}
	}
	return open
}

func (d *daemon) threads() int   { return int(d.statusNumber("Threads:")) }
func (d *daemon) rss() int64     { return d.statusNumber("VmRSS:") << 10 } // bytes
func (d *daemon) peakRSS() int64 { return d.statusNumber("VmHWM:") << 10 } // bytes
func (d *daemon) statusNumber(field string) int64 {
	n, _ := strconv.ParseInt(strings.TrimSuffix(statusField(d.pid, field), " kB"), 10, 64)
	return n
}

// statusField reads one line of /proc/PID/status; the field's name ends in a colon.
func statusField(pid int, field string) string {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, field); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// zombies counts the daemon's children that ended and were not waited for.
func (d *daemon) zombies() (pids []int) {
	for _, pid := range everyPid() {
		if state, parent := processState(pid); state == 'Z' && parent == d.pid {
			pids = append(pids, pid)
		}
	}
	return pids
}

func everyPid() (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}

func processState(pid int) (state byte, parent int) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:])) // the name may hold anything
	if err != nil || len(fields) < 2 {
		return 0, 0
	}
	parent, _ = strconv.Atoi(fields[1])
	return fields[0][0], parent
}

func descendantsOf(root int) (pids []int) {
	children := map[int][]int{}
	for _, pid := range everyPid() {
		_, parent := processState(pid)
		children[parent] = append(children[parent], pid)
	}
	for queue := children[root]; len(queue) > 0; queue = queue[1:] {
		pids = append(pids, queue[0])
		queue = append(queue, children[queue[0]]...)
	}
	return pids
}

// alive tells whether a process runs; a zombie does not.
func isAlive(pid int) bool {
	state, _ := processState(pid)
	return state != 0 && state != 'Z' && state != 'X'
}

func waitGone(t testing.TB, timeout time.Duration, pids ...int) {
	t.Helper()
	waitFor(t, timeout, fmt.Sprintf("processes %v gone", pids), func() bool { return !slices.ContainsFunc(pids, isAlive) })
}

func atoi(t testing.TB, text string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// cannotPrepare opens the line of a preparation that the kernel refuses; the test is skipped then.
const cannotPrepare = "test preparation failed: "

// execPrepared prepares a process as its arguments say (pairs of a word and its operand, then `--`) and becomes the
// program that follows.
func execPrepared(args []string) {
	runtime.LockOSThread() // the signal mask is the thread's
	var blocked unix.Sigset_t
	for args[0] != "--" {
		number, _ := strconv.Atoi(args[1])
		var err error
		switch args[0] {
		case "mount": // FROM:TO
			from, to, _ := strings.Cut(args[1], ":")
			err = unix.Mount(from, to, "", unix.MS_BIND, "")
		case "read-only": // PATH, a mount
			err = unix.Mount("", args[1], "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
		case "user": // UID and GID, the last step of those that need root
			err = errors.Join(syscall.Setgroups(nil), syscall.Setgid(number), syscall.Setuid(number))
		case "hide": // PATH
			err = hideFile(args[1])
		case "ignore": // SIGNAL
			signal.Ignore(syscall.Signal(number))
		case "block": // SIGNAL
			blocked.Val[0] |= 1 << (number - 1)
		case "umask": // OCTAL
			mask, _ := strconv.ParseUint(args[1], 8, 32)
			syscall.Umask(int(mask))
		case "nice":
			err = unix.Setpriority(unix.PRIO_PROCESS, 0, number)
		case "oom_score_adj":
			err = os.WriteFile("/proc/self/oom_score_adj", []byte(args[1]), 0)
		case "nofile": // the soft limit
			var limit syscall.Rlimit
			syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
			limit.Cur = uint64(number)
			err = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
		case "nofile-max": // both limits
			err = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(number), Max: uint64(number)})
		case "netns": // PATH
			err = enterNetns(args[1])
		case "no-netlink": // PROTOCOL
			err = forbidNetlink(uint32(number))
		case "seccomp": // NUMBER:ARG1:ERRNO (seccompFilter)
			err = seccompFilter(args[1])
		case "supervised": // SOCKET:NUMBER,... (supervised_test.go)
			err = supervisedBy(args[1])
		case "limit": // NAME=VALUE, of the user namespace
			name, value, _ := strings.Cut(args[1], "=")
			err = os.WriteFile("/proc/sys/user/"+name, []byte(value), 0)
		case "groups": // GID, the only supplementary one
			err = syscall.Setgroups([]int{number})
		default:
			err = errors.New("no such preparation")
		}
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s%s %s: %v\n", cannotPrepare, args[0], args[1], err)
			os.Exit(1)
		}
		args = args[2:]
	}
	err := unix.PthreadSigmask(unix.SIG_BLOCK, &blocked, nil)
	if err == nil {
		err = syscall.Exec(args[1], args[1:], os.Environ())
	}
	fmt.Fprintf(os.Stderr, "%s%s: %v\n", cannotPrepare, args[1], err)
	os.Exit(1)
}

// hideFile makes a file vanish: an overlay whose upper layer holds a whiteout (a character device 0:0) of its name.
func hideFile(path string) error {
	path, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil // there is none
	}
	dir, name := filepath.Split(path)
	layer, err := os.MkdirTemp("", "envd-test-layer-")
	if err != nil {
		return err
	}
	defer os.Remove(layer) // the mount keeps its content
	if err := unix.Mount("tmpfs", layer, "tmpfs", 0, ""); err != nil {
		return err
	}
	defer unix.Unmount(layer, unix.MNT_DETACH)
	err = unix.Mknod(filepath.Join(layer, name), unix.S_IFCHR, 0)
	if err == nil {
		err = unix.Mount("overlay", dir, "overlay", unix.MS_RDONLY, "lowerdir="+layer+":"+filepath.Clean(dir))
	}
	return err
}
