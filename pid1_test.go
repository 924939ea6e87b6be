// envd as process 1: of namespaces of its own (pid, mount, network, host name, IPC, cgroup), in a root file system that
// holds nothing but its binary. The helper is the launcher, which becomes envd. What no namespace isolates (sysctls, sync,
// unmounting, power) is tested in a virtual machine.

package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	testRoles["process-1"] = becomeProcess1
	testRoles["orphans"] = makeOrphans
	testRoles["sleep"] = func(args []string) { d, _ := time.ParseDuration(args[0]); time.Sleep(d) }
	testRoles["exit"] = func(args []string) { code, _ := strconv.Atoi(args[0]); os.Exit(code) }
	testRoles["signal"] = func(args []string) { n, _ := strconv.Atoi(args[0]); syscall.Kill(1, syscall.Signal(n)) }
	testRoles["deaf"] = func(args []string) {
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("deaf")
		time.Sleep(time.Hour)
	}
	testRoles["facts"] = func([]string) {
		name, _ := os.Hostname()
		dir, _ := os.Getwd()
		fmt.Println(name, dir, os.Getenv("HOME"), os.Getenv("PATH"))
	}
}

// becomeProcess1 prepares a root file system by pairs of a word and its operand, then `--`, and becomes its /init.
func becomeProcess1(args []string) {
	runtime.LockOSThread()
	check := func(what string, err error) {
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s%s: %v\n", cannotPrepare, what, err)
			os.Exit(1)
		}
	}
	check("cgroup namespace", unix.Unshare(unix.CLONE_NEWCGROUP))
	check("private mounts", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	root, program := args[0], args[1]
	check("root", unix.Mount("tmpfs", root, "tmpfs", 0, "mode=0755"))
	copyFile := func(from, to string) {
		content, err := os.ReadFile(from)
		check(from, err)
		check(to, os.WriteFile(filepath.Join(root, to), content, 0o755))
	}
	copyFile(program, "init")
	check("hostname", unix.Sethostname([]byte("(none)")))
	closed := false
	for args = args[2:]; args[0] != "--"; args = args[2:] {
		left, right, _ := strings.Cut(args[1], ":")
		switch args[0] {
		case "copy": // FROM:TO
			copyFile(left, right)
		case "dir":
			check(left, os.MkdirAll(filepath.Join(root, left), 0o755))
		case "file": // PATH:CONTENT
			check(left, os.WriteFile(filepath.Join(root, left), []byte(right), 0o644))
		case "link": // PATH:TARGET
			check(left, os.Symlink(right, filepath.Join(root, left)))
		case "mount": // TYPE:DIR
			check(right, unix.Mount(left, filepath.Join(root, right), left, 0, ""))
		case "over": // PATH:CONTENT, a file mounted over it
			check(left, os.WriteFile(root+"/.over", []byte(right), 0o644))
			check(left, unix.Mount(root+"/.over", filepath.Join(root, left), "", unix.MS_BIND, ""))
		case "hostname":
			check(left, unix.Sethostname([]byte(left)))
		case "readonly":
			check(left, unix.Mount("", root, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		case "close":
			closed = true
		default:
			check(args[0], errors.New("no such preparation"))
		}
	}
	check("chroot", unix.Chroot(root))
	check("chdir", unix.Chdir("/"))
	for fd := 0; closed && fd < 3; fd++ {
		unix.CloseOnExec(fd)
	}
	check("exec", syscall.Exec("/init", append([]string{"/init"}, args[1:]...), []string{"HOME=/", "TERM=linux"}))
}

// makeOrphans starts helpers that start helpers and leave: N of the latter, each to exit soon with some status.
func makeOrphans(args []string) {
	n, _ := strconv.Atoi(args[0])
	start := func(args ...string) {
		_, err := os.StartProcess("/"+helperName, append([]string{helperName}, args...), &os.ProcAttr{Sys: &syscall.SysProcAttr{Setsid: true}})
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	for ; n > 10; n -= 10 {
		start("orphans", "10")
	}
	if args[0] == "10" {
		for i := range n {
			start("exit", strconv.Itoa(i))
		}
		return
	}
	start("orphans", "10")
}

// staticHelper is the helper for a root file system without libraries.
var staticHelper = sync.OnceValues(func() (string, error) {
	path := filepath.Join(suiteDir, "static-"+helperName)
	build := exec.Command("go", "test", "-c", "-o", path, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go test -c: %v\n%s", err, out)
	}
	return path, nil
})

type initConfig struct {
	words  []string // command line of process 1
	steps  []string // pairs for becomeProcess1
	helper bool     // /envd-test-helper is there
	user   bool     // in a user namespace too: root without power over the machine
	netns  *netns   // instead of a new one

	address string          // where it listens; "": 127.0.0.1
	stdout  *os.File        // instead of the log
	started func(d *daemon) // called once it is there, before it serves
}

// startInit starts envd as process 1; it is talked to inside its network namespace.
func startInit(t *testing.T, config initConfig) *daemon {
	t.Helper()
	needRoot(t)
	base := publicDir(t)
	root := filepath.Join(base, "root")
	if err := errors.Join(os.Mkdir(root, 0o755), os.Chmod(base, 0o755)); err != nil {
		t.Fatal(err)
	}
	args := []string{"process-1", root, daemonBinary(t)}
	if config.helper {
		helper, err := staticHelper()
		if err != nil {
			t.Fatal(err)
		}
		args = append(args, "copy", helper+":"+helperName)
	}
	args = slices.Concat(args, config.steps, []string{"--"}, config.words)
	d := &daemon{addr: cmp.Or(config.address, "127.0.0.1") + ":49983", port: 49983, exited: make(chan struct{}),
		logFile: filepath.Join(base, "log"), cmd: exec.Command(helperBinary(t), args...)}
	d.url = "http://" + d.addr
	log, err := os.Create(d.logFile)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	d.cmd.Stdout, d.cmd.Stderr = cmp.Or(config.stdout, log), log
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC}
	d.cmd.SysProcAttr = attr
	if cgroupMount() != "" {
		group := newCgroup(t)
		dir, err := os.Open(group)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close()
		attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())
	}
	if config.user {
		attr.Cloneflags |= unix.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}
		attr.GidMappings = attr.UidMappings
		attr.Credential = &syscall.Credential{}
		if err := os.Chmod(root, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	if config.netns == nil {
		attr.Cloneflags |= unix.CLONE_NEWNET
		err = d.cmd.Start()
	} else {
		config.netns.do(func() { err = d.cmd.Start() })
	}
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSYS) || errors.Is(err, syscall.ENOSPC) {
		t.Skipf("needs namespaces: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	d.pid = d.cmd.Process.Pid
	go func() {
		d.waitErr = d.cmd.Wait()
		close(d.exited)
	}()
	if config.started != nil {
		config.started(d)
	}
	inside := &netns{open(t, fmt.Sprintf("/proc/%d/ns/net", d.pid))}
	d.http = inside.client()
	d.h2 = d.http
	t.Cleanup(func() {
		if d.gone() && !d.stopped.Load() {
			t.Errorf("process 1 ended: %v", d.waitErr)
		}
		d.cmd.Process.Kill()
		<-d.exited
		d.http.CloseIdleConnections()
		if t.Failed() {
			t.Logf("log of process 1:\n%s", d.log())
		}
	})
	waitFor(t, 20*time.Second, "/health of process 1", func() bool {
		if d.gone() {
			d.stopped.Store(true)
			if strings.Contains(d.log(), cannotPrepare) {
				t.Skipf("needs what this machine lacks: %s", d.log())
			}
			t.Fatalf("process 1 ended: %v\n%s", d.waitErr, d.log())
		}
		response, err := d.http.Get(d.url + "/health")
		if err != nil {
			return false
		}
		response.Body.Close()
		return response.StatusCode == http.StatusOK
	})
	return d
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

// inside is a path in the guest's root file system.
func (d *daemon) inside(path string) string { return fmt.Sprintf("/proc/%d/root%s", d.pid, path) }

func (d *daemon) insideText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(d.inside(path))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// power is what the guest does at its end: in a pid namespace, SIGHUP is a reset and SIGINT is power-off (reboot(2)).
func (d *daemon) power(t *testing.T, within time.Duration) syscall.Signal {
	t.Helper()
	d.stopped.Store(true)
	select {
	case <-d.exited:
	case <-time.After(within):
		t.Fatalf("the end took more than %v", within)
	}
	var exit *exec.ExitError
	if !errors.As(d.waitErr, &exit) || !exit.Sys().(syscall.WaitStatus).Signaled() {
		t.Fatalf("process 1 ended with %v, want a signal", d.waitErr)
	}
	return exit.Sys().(syscall.WaitStatus).Signal()
}

// A console that takes nothing from the start on keeps process 1 neither from booting nor from ending.
func TestProcess1LogThatNobodyReads(t *testing.T) {
	t.Parallel()
	_, full := fullPipe(t)
	d := startInit(t, initConfig{helper: true, stdout: full, steps: []string{"dir", "/proc", "mount", "proc:/proc", "over", "/proc/cmdline:\n"}})
	logMuch(t, d, 10)
	d.run(t, argv("/"+helperName, "exit", "0"))
	syscall.Kill(d.pid, syscall.SIGTERM)
	if got := d.power(t, 8*time.Second); got != syscall.SIGINT {
		t.Errorf("the end is %v, want power-off", got)
	}
}

// What process 1 mounts in memory takes, when all of it is full, less than half of that.
func TestProcess1MemoryOfMounts(t *testing.T) {
	t.Parallel()
	d := startInit(t, initConfig{})
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	memory := info.Totalram * uint64(info.Unit)
	sum := memory / 100 * 125 / 100 // of /dev, were it no devtmpfs
	for _, dir := range []string{"/tmp", "/dev/shm", "/run"} {
		var st unix.Statfs_t
		if err := unix.Statfs(d.inside(dir), &st); err != nil || st.Type != unix.TMPFS_MAGIC {
			t.Fatalf("%s: %v, type %x", dir, err, st.Type)
		}
		size, inodes := st.Blocks*uint64(st.Bsize), st.Files
		t.Logf("%s: %d MiB of %d, %d inodes", dir, size>>20, memory>>20, inodes)
		if size < memory/32 || inodes < size>>12 {
			t.Errorf("%s has %d bytes and %d inodes: too few", dir, size, inodes)
		}
		sum += size + inodes<<10
	}
	if sum >= memory/2 {
		t.Errorf("together they may have %d bytes of %d", sum, memory)
	}
}

// In every guest links of others are no traps, and the kernel's limits for watches are raised by the memory, never lowered.
func TestKernelSettings(t *testing.T) {
	t.Parallel()
	needRoot(t)
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		t.Fatal(err)
	}
	memory := info.Totalram * uint64(info.Unit)
	for _, guest := range []bool{true, false} {
		start := map[string]string{"protected_hardlinks": "0", "protected_symlinks": "0", "protected_fifos": "2", "protected_regular": "0",
			"inotify/max_user_instances": "128", "inotify/max_user_watches": "8192", "inotify/max_queued_events": "99999999"}
		want := maps.Clone(start)
		if guest {
			for _, name := range []string{"hardlinks", "symlinks", "regular"} {
				want["protected_"+name] = "1"
			}
			want["inotify/max_user_watches"] = fmt.Sprint(max(8192, min(1<<20, memory/32>>10)))
			want["inotify/max_user_instances"] = fmt.Sprint(max(128, min(8192, memory>>17)))
		}
		dir := publicDir(t)
		var steps []string
		for name, value := range start {
			file := writeFile(t, filepath.Join(dir, filepath.Base(name)), value, 0o644)
			steps = append(steps, "mount", file+":/proc/sys/fs/"+name)
		}
		startDaemonWith(t, daemonConfig{args: argv("--isnotfc=" + strconv.FormatBool(!guest)), steps: steps})
		for name, value := range want {
			if got, err := os.ReadFile(filepath.Join(dir, filepath.Base(name))); err != nil || string(got) != value {
				t.Errorf("guest %t: fs/%s is %q, %v, want %s", guest, name, got, err, value)
			}
		}
	}
}

// Nothing but the binary, and a network card that comes late.
func TestProcess1Alone(t *testing.T) {
	t.Parallel()
	d := startInit(t, initConfig{helper: true})
	mounts := d.insideText(t, "/proc/1/mounts")
	for _, m := range bootMounts {
		if m.dir == "/dev" && m.fs == "tmpfs" {
			continue // what there is where there is no devtmpfs
		}
		if cgroupMount() == "" && m.fs == "cgroup2" {
			continue
		}
		if !regexp.MustCompile(`(?m)^\S+ ` + m.dir + ` ` + m.fs + ` `).MatchString(mounts) {
			t.Errorf("%s is not mounted at %s:\n%s", m.fs, m.dir, mounts)
		}
	}
	for path, mode := range map[string]os.FileMode{"/tmp": 0o777 | os.ModeSticky, "/dev/shm": 0o777 | os.ModeSticky, "/run": 0o755,
		"/root": 0o700, "/etc": 0o755} {
		if st, err := os.Stat(d.inside(path)); err != nil || st.Mode()&^os.ModeDir != mode {
			t.Errorf("%s: %v, %v; want %v", path, st.Mode(), err, mode)
		}
	}
	for link, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "", "stdout": "", "stderr": ""} {
		got, err := os.Readlink(d.inside("/dev/" + link))
		if err != nil || target != "" && got != target {
			t.Errorf("/dev/%s -> %q, %v", link, got, err)
		}
	}
	if got := d.insideText(t, "/etc/resolv.conf"); got != "nameserver 8.8.8.8\nnameserver 1.1.1.1\n" {
		t.Errorf("/etc/resolv.conf: %q", got)
	}
	if got := d.insideText(t, "/etc/hosts"); got != "127.0.0.1\tlocalhost\n127.0.1.1\tcapsule\n" {
		t.Errorf("/etc/hosts: %q", got)
	}
	if got, want := d.output(t, argv("/"+helperName, "facts")), "capsule /root /root "+standardPath+"\n"; got != want {
		t.Errorf("a process sees %q, want %q", got, want)
	}
	if got := d.run(t, argv("/"+helperName, "facts"), withPTY(80, 24)); !strings.Contains(string(got.pty), "capsule") {
		t.Errorf("at a terminal: %q, %v", got.pty, got.end)
	}
	limits := d.insideText(t, "/proc/1/limits")
	t.Log(regexp.MustCompile(`Max open files.*`).FindString(limits))

	// The way to the host.
	host := newNetns(t)
	host.ip(t, fmt.Sprintf("link add veth0 type veth peer name eth0 netns %d", d.pid))
	host.ip(t, "addr add 169.254.0.22/30 dev veth0")
	host.ip(t, "link set veth0 up")
	outside := host.client()
	outside.Timeout = time.Second
	waitFor(t, 15*time.Second, "/health at 169.254.0.21", func() bool {
		response, err := outside.Get("http://169.254.0.21:49983/health")
		if err == nil {
			response.Body.Close()
		}
		return err == nil && response.StatusCode == http.StatusOK
	})
	if routes, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/route", d.pid)); err != nil ||
		!regexp.MustCompile(`(?m)^eth0\t00000000\t1600FEA9\t0003\t`).Match(routes) ||
		!regexp.MustCompile(`(?m)^eth0\t1400FEA9\t00000000\t0001\t.*\tFCFFFFFF\t`).Match(routes) {
		t.Errorf("routes: %v\n%s", err, routes)
	}
	if strings.Contains(d.log(), `"step":"mount `) && cgroupMount() != "" {
		t.Error("a mount failed")
	}
}

func TestProcess1Reaps(t *testing.T) {
	t.Parallel()
	d := startInit(t, initConfig{helper: true})
	orphans := d.start(t, argv("/"+helperName, "orphans", "200"))
	var wg sync.WaitGroup
	for i := range 60 {
		wg.Go(func() {
			s, err := d.open(t, argv("/"+helperName, "exit", strconv.Itoa(i)))
			if err != nil {
				t.Error(err)
				return
			}
			if r := s.collect(); r.err != nil || r.end.GetExitCode() != int32(i) {
				t.Errorf("exit %d: %v, %v", i, r.end, r.err)
			}
		})
	}
	wg.Wait()
	if r := orphans.collect(); r.err != nil || r.end.GetExitCode() != 0 {
		t.Errorf("orphans: %v, %v, %s", r.end, r.err, r.stderr)
	}
	waitFor(t, 30*time.Second, "nobody left", func() bool { return len(descendantsOf(d.pid)) == 0 })
	if made := atoi(t, strings.Fields(d.insideText(t, "/proc/loadavg"))[4]); made < 280 {
		t.Errorf("the last pid is %d: where were the orphans?", made)
	}
}

// Words that the kernel hands on keep nothing from starting; flags among them work.
func TestProcess1Words(t *testing.T) {
	t.Parallel()
	d := startInit(t, initConfig{helper: true, words: []string{"splash", "--no-such-flag", "--retain-count=many", "-", "3", "--",
		"--nameservers", "192.0.2.1", "--", "-cmd", "exec /" + helperName + " sleep 1h", "auto"}})
	if got := d.insideText(t, "/etc/resolv.conf"); got != "nameserver 192.0.2.1\n" {
		t.Errorf("/etc/resolv.conf: %q", got)
	}
	for _, word := range []string{"splash", "-no-such-flag", "many", `"-"`, `"3"`, "auto"} {
		if !strings.Contains(d.log(), word) {
			t.Errorf("the log does not name %s", word)
		}
	}
}

func TestParseKernelWords(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		words   string
		port    int
		ignored int
	}{
		{"", 1, 0},
		{"splash", 1, 1},
		{"splash 3 single", 1, 3},
		{"--port 2", 2, 0},
		{"-- --port 2", 2, 0},
		{"a -port=2 b", 2, 2},
		{"--port x --port 2", 2, 1},
		{"-- -- - -- --port 2", 2, 1},
		{"--bogus --port 2", 2, 1},
		{"--port 2 --port", 2, 1},
		{"---port --=3 -=", 1, 3},
		{"--help -h --port 2", 2, 2},
	} {
		f := flag.NewFlagSet("", flag.ContinueOnError)
		port := f.Int("port", 1, "")
		if ignored := parseKernelWords(f, strings.Fields(test.words)); *port != test.port || len(ignored) != test.ignored {
			t.Errorf("%q: port %d, ignored %q", test.words, *port, ignored)
		}
	}
}

func TestProcess1ReadOnlyRoot(t *testing.T) {
	t.Parallel()
	dirs := []string{}
	for _, dir := range []string{"/dev", "/proc", "/sys", "/run", "/tmp", "/etc"} {
		dirs = append(dirs, "dir", dir)
	}
	t.Run("with mount points", func(t *testing.T) {
		t.Parallel()
		d := startInit(t, initConfig{helper: true, steps: slices.Concat(dirs, []string{"file", "/etc/resolv.conf:", "file", "/etc/hosts:", "readonly", "/"})})
		if got := d.insideText(t, "/etc/resolv.conf"); !strings.HasPrefix(got, "nameserver ") {
			t.Errorf("/etc/resolv.conf: %q", got)
		}
		if got := d.insideText(t, "/etc/hosts"); !strings.Contains(got, "capsule") {
			t.Errorf("/etc/hosts: %q", got)
		}
		if got := d.output(t, argv("/"+helperName, "facts"), withCwd("/tmp")); !strings.HasPrefix(got, "capsule /tmp") {
			t.Errorf("a process sees %q", got)
		}
		if got := d.insideText(t, "/run/wrenn/.WRENN_SANDBOX"); got != "true" {
			t.Errorf("the run directory: %q", got)
		}
		syscall.Kill(d.pid, syscall.SIGTERM)
		d.power(t, 5*time.Second)
	})
	t.Run("with nothing", func(t *testing.T) {
		t.Parallel()
		d := startInit(t, initConfig{steps: []string{"readonly", "/"}})
		d.healthy(t)
	})
}

// A kernel without a console, and nowhere a /dev/null for the Go runtime.
func TestProcess1ClosedFiles(t *testing.T) {
	t.Parallel()
	if raceEnabled() {
		t.Skip("not with -race: its binary starts in the C library")
	}
	for name, steps := range map[string][]string{
		"no /dev":           nil,
		"read-only":         {"readonly", "/"},
		"an empty tmpfs":    {"dir", "/dev", "mount", "tmpfs:/dev"},
		"a user's own /dev": {"dir", "/dev", "mount", "tmpfs:/dev", "file", "/dev/null:"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := startInit(t, initConfig{helper: true, steps: append([]string{"close", ""}, steps...)})
			if name == "read-only" {
				d.healthy(t)
				return
			}
			for fd := range 3 {
				target, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", d.pid, fd))
				if err != nil || !strings.HasPrefix(filepath.Base(target), "console") && filepath.Base(target) != "null" {
					t.Errorf("descriptor %d is %s, %v", fd, target, err)
				}
			}
			d.output(t, argv("/"+helperName, "facts"))
		})
	}
}

// A /dev without devtmpfs gets the devices that programs expect.
func TestProcess1Devices(t *testing.T) {
	t.Parallel()
	d := startInit(t, initConfig{helper: true, steps: []string{"dir", "/dev", "mount", "tmpfs:/dev"}})
	for _, dev := range bootDevices {
		var st unix.Stat_t
		if err := unix.Stat(d.inside("/dev/"+dev.name), &st); err != nil || st.Mode != unix.S_IFCHR|dev.mode ||
			st.Rdev != unix.Mkdev(dev.major, dev.minor) {
			t.Errorf("/dev/%s: mode %o, device %x, %v", dev.name, st.Mode, st.Rdev, err)
		}
	}
	if got := d.run(t, argv("/"+helperName, "facts"), withPTY(80, 24)); !strings.Contains(string(got.pty), "capsule") {
		t.Errorf("at a terminal: %q, %v", got.pty, got.end)
	}
}

// Whatever an image or the kernel has set up stays.
func TestProcess1LeavesWhatIsThere(t *testing.T) {
	t.Parallel()
	guest := newNetns(t)
	guest.ip(t, "link add veth0 type veth peer name eth0")
	guest.ip(t, "addr add 192.0.2.7/24 dev eth0")
	guest.ip(t, "link set eth0 up")
	d := startInit(t, initConfig{helper: true, netns: guest, steps: []string{
		"dir", "/etc", "file", "/etc/resolv.conf:nameserver 192.0.2.53\n", "file", "/etc/hosts:192.0.2.7 mine localhost", "hostname", "mine",
		"dir", "/run", "mount", "tmpfs:/run", "file", "/run/kept:kept", "dir", "/tmp", "mount", "tmpfs:/tmp", "file", "/tmp/kept:kept",
		"dir", "/proc", "mount", "proc:/proc"}})
	for path, want := range map[string]string{"/run/kept": "kept", "/tmp/kept": "kept", "/etc/resolv.conf": "nameserver 192.0.2.53\n",
		"/etc/hosts": "192.0.2.7 mine localhost"} {
		if got := d.insideText(t, path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	if got := d.output(t, argv("/"+helperName, "facts")); !strings.HasPrefix(got, "mine ") {
		t.Errorf("the host name: %q", got)
	}
	if n := strings.Count(d.insideText(t, "/proc/1/mounts"), " /proc proc "); n != 1 {
		t.Errorf("/proc is mounted %d times", n)
	}
	routes, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/route", d.pid))
	if strings.Contains(string(routes), "FEA9") {
		t.Errorf("eth0 had an address and got another:\n%s", routes)
	}
}

func TestProcess1Names(t *testing.T) {
	t.Parallel()
	d := startInit(t, initConfig{helper: true, steps: []string{"hostname", "169.254.0.21", "dir", "/etc", "file", "/etc/hostname:pod\n",
		"file", "/etc/hosts:127.0.0.1 localhost", "link", "/etc/resolv.conf:../run/systemd/resolve/stub-resolv.conf"}})
	if got := d.output(t, argv("/"+helperName, "facts")); !strings.HasPrefix(got, "pod ") {
		t.Errorf("the host name: %q", got)
	}
	if got := d.insideText(t, "/etc/hosts"); got != "127.0.0.1 localhost\n127.0.1.1\tpod\n" {
		t.Errorf("/etc/hosts: %q", got)
	}
	if got := d.insideText(t, "/run/systemd/resolve/stub-resolv.conf"); !strings.HasPrefix(got, "nameserver 8.8.8.8\n") {
		t.Errorf("behind the link: %q", got)
	}
}

// --listen names the address of a card that is still to come.
func TestProcess1ListensLater(t *testing.T) {
	t.Parallel()
	if raceEnabled() {
		t.Skip("not with -race: its binary needs a dynamic linker, which the guest has not")
	}
	guest := newNetns(t) // with an address: where none ever was, every one can be bound
	d := startInit(t, initConfig{netns: guest, address: "169.254.0.21", words: []string{"--listen", "169.254.0.21"}, started: func(d *daemon) {
		waitFor(t, 10*time.Second, "a failed listen", func() bool { return strings.Contains(d.log(), "cannot listen") })
		guest.ip(t, "link add veth0 type veth peer name eth0")
	}})
	if n := strings.Count(d.log(), "cannot listen"); n != 1 {
		t.Errorf("the log says %d times that it cannot listen", n)
	}
}

// A container that may do next to nothing.
func TestProcess1WithoutPower(t *testing.T) {
	t.Parallel()
	d := startInit(t, initConfig{user: true, steps: []string{"dir", "/dev"}})
	d.healthy(t)
}

func TestProcess1Signals(t *testing.T) {
	t.Parallel()
	d := startInit(t, initConfig{helper: true})
	for n := syscall.Signal(1); n < 32; n++ {
		if slices.Contains([]syscall.Signal{syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGTERM, syscall.SIGINT, syscall.SIGPWR}, n) {
			continue
		}
		d.run(t, argv("/"+helperName, "signal", strconv.Itoa(int(n))))
		if n != syscall.SIGTSTP && n != syscall.SIGTTIN && n != syscall.SIGTTOU { // from outside these would stop it, as they do everyone
			syscall.Kill(d.pid, n)
		}
		d.healthy(t)
	}
}

func TestProcess1End(t *testing.T) {
	t.Parallel()
	cmdline := func(words string) []string {
		return []string{"dir", "/proc", "mount", "proc:/proc", "over", "/proc/cmdline:" + words + "\n"}
	}
	for name, test := range map[string]struct {
		signal syscall.Signal
		steps  []string
		role   []string
		want   syscall.Signal
		least  time.Duration
		most   time.Duration
	}{
		"SIGTERM":               {syscall.SIGTERM, cmdline("console=ttyS0 panic=1"), argv("sleep", "1h"), syscall.SIGINT, 0, 2 * time.Second},
		"SIGTERM, reboot=k":     {syscall.SIGTERM, cmdline("console=ttyS0 reboot=k"), argv("sleep", "1h"), syscall.SIGHUP, 0, 2 * time.Second},
		"SIGTERM, noreboot=k":   {syscall.SIGTERM, cmdline("noreboot=k"), argv("sleep", "1h"), syscall.SIGINT, 0, 2 * time.Second},
		"SIGPWR":                {syscall.SIGPWR, cmdline(""), argv("sleep", "1h"), syscall.SIGINT, 0, 2 * time.Second},
		"SIGINT":                {syscall.SIGINT, cmdline(""), argv("sleep", "1h"), syscall.SIGHUP, 0, 2 * time.Second},
		"nobody else":           {syscall.SIGTERM, cmdline(""), nil, syscall.SIGINT, 0, 2 * time.Second},
		"deaf to SIGTERM":       {syscall.SIGTERM, cmdline(""), argv("deaf"), syscall.SIGINT, termPatience, termPatience + 3*time.Second},
		"deaf, at a terminal":   {syscall.SIGTERM, cmdline(""), argv("deaf", "pty"), syscall.SIGINT, 0, 2 * time.Second},
		"stopped":               {syscall.SIGTERM, cmdline(""), argv("sleep", "1h", "stopped"), syscall.SIGINT, 0, 2 * time.Second},
		"with a half-sent body": {syscall.SIGTERM, cmdline(""), argv("sleep", "1h", "body"), syscall.SIGINT, 0, 3 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := startInit(t, initConfig{helper: true, steps: test.steps})
			var stream *clientStream
			if len(test.role) > 0 {
				options := []callOption{}
				if slices.Contains(test.role, "pty") {
					options = append(options, withPTY(80, 24))
				}
				stream = d.start(t, append(argv("/"+helperName), test.role...), options...)
				if test.role[0] == "deaf" {
					stream.readUntil(t, "deaf")
				}
			}
			switch {
			case slices.Contains(test.role, "stopped"):
				for _, pid := range descendantsOf(d.pid) {
					syscall.Kill(pid, syscall.SIGSTOP)
				}
			case slices.Contains(test.role, "body"):
				reader, writer := io.Pipe()
				defer writer.Close()
				go d.http.Post(d.url+"/files?path=/half", "application/octet-stream", reader)
				writer.Write(make([]byte, 1000))
			}
			began := time.Now()
			syscall.Kill(d.pid, test.signal)
			if got := d.power(t, 20*time.Second); got != test.want {
				t.Errorf("the end is %v, want %v", got, test.want)
			}
			took := time.Since(began)
			t.Logf("took %v", took)
			if took < test.least || took > test.most && !raceEnabled() {
				t.Errorf("took %v, want %v to %v", took, test.least, test.most)
			}
			if stream != nil && test.least == 0 {
				if r := stream.collect(); r.end == nil || r.end.GetExited() {
					t.Errorf("the stream of what was running: %v, %v; want its end by a signal", r.events, r.err)
				}
			}
		})
	}
}

// A container on a developer's machine: nothing is mounted or configured; the end is an exit with status 0.
func TestProcess1OfAContainer(t *testing.T) {
	t.Parallel()
	guest := newNetns(t)
	d := startInit(t, initConfig{helper: true, netns: guest, words: []string{"--isnotfc"}, steps: []string{
		"dir", "/proc", "mount", "proc:/proc", "dir", "/dev", "mount", "devtmpfs:/dev"}})
	if n := strings.Count(d.insideText(t, "/proc/1/mounts"), "\n"); n != 3 {
		t.Errorf("mounts:\n%s", d.insideText(t, "/proc/1/mounts"))
	}
	s := d.start(t, argv("/"+helperName, "sleep", "1h"), withCwd("/"))
	d.stopped.Store(true)
	began := time.Now()
	syscall.Kill(d.pid, syscall.SIGTERM)
	<-d.exited
	if d.waitErr != nil || time.Since(began) > 2*time.Second {
		t.Errorf("ended with %v after %v", d.waitErr, time.Since(began))
	}
	if r := s.collect(); r.end.GetStatus() != "signal: terminated" {
		t.Errorf("the process ended with %v, %v", r.end, r.err)
	}
}
