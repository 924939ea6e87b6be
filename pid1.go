// Being init: what envd does in its own person when it is process 1 of a guest whose image may hold nothing else.
//
// Rules: every step of the boot is best effort, and a line in the log when it fails; what is there already (a mount, an
// address, a name, a file) stays. What no namespace isolates, sysctls and file systems, is touched only in the machine's own
// pid namespace. The end is orderly: processes, file systems, power. A crash is a kernel panic and ends the machine, which is
// meant: an agent that came back would have no token. With --isnotfc (a container on a developer's machine) only processes are
// init's business: reaped, and asked to leave before envd does.
// Sources: bootparam(7), reboot(2), pid_namespaces(7), Documentation/admin-guide/nfs/nfsroot.rst (ip=). Linux 4.14 or newer.

package main

import (
	"bytes"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const termPatience = 5 * time.Second // between SIGTERM and SIGKILL

// bootMounts in their order. A row whose directory has a mount is skipped: /dev is a tmpfs only without devtmpfs.
//
// share is the part of the memory, in per cent, that a file system in memory may have. Beyond it come inodes, one for each
// page, so that only empty files meet that bound; each takes a KiB. All together stay under half of the memory.
var bootMounts = []struct {
	dir, fs, options string
	flags            uintptr
	share            uint64
}{
	{"/dev", "devtmpfs", "mode=0755", unix.MS_NOSUID, 0},
	{"/dev", "tmpfs", "mode=0755", unix.MS_NOSUID, 1},
	{"/dev/pts", "devpts", "mode=0620,ptmxmode=0666,gid=5", unix.MS_NOSUID | unix.MS_NOEXEC, 0},
	{"/dev/shm", "tmpfs", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV, 10},
	{"/proc", "proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, 0},
	{"/sys", "sysfs", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, 0},
	{"/sys/fs/cgroup", "cgroup2", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, 0},
	{"/run", "tmpfs", "mode=0755", unix.MS_NOSUID | unix.MS_NODEV, 4},
	{"/tmp", "tmpfs", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV, 24},
}

// bootDevices and bootLinks are what devtmpfs does not bring along, or a tmpfs in its place.
var bootDevices = []struct {
	name               string
	mode, major, minor uint32
}{{"null", 0o666, 1, 3}, {"zero", 0o666, 1, 5}, {"full", 0o666, 1, 7}, {"random", 0o666, 1, 8}, {"urandom", 0o666, 1, 9},
	{"tty", 0o666, 5, 0}, {"console", 0o600, 5, 1}}

var bootLinks = [][2]string{{"fd", "/proc/self/fd"}, {"stdin", "fd/0"}, {"stdout", "fd/1"}, {"stderr", "fd/2"}, {"ptmx", "pts/ptmx"}}

// parseKernelWords parses the command line of process 1. The kernel hands it the words that it does not know itself and
// what follows `--`; none of them may keep a machine from booting, so what is no flag is returned and has no effect.
func parseKernelWords(f *flag.FlagSet, args []string) (ignored []string) {
	f.SetOutput(io.Discard)
	for len(args) > 0 {
		err := f.Parse(args)
		rest := f.Args()
		switch {
		case err != nil:
			ignored = append(ignored, err.Error())
			rest = rest[max(0, 1+len(rest)-len(args)):] // what has no flag's form is still there
		case len(rest) > 0 && (len(rest[0]) < 2 || rest[0][0] != '-'): // else a `--` was in between
			ignored, rest = append(ignored, rest[0]), rest[1:]
		}
		args = rest
	}
	return ignored
}

// heedAsInit keeps signals from ending process 1, and with it the machine: the kernel drops those that have no handler, but
// the Go runtime has one for each. They go to a channel that nobody reads; to ignore them would be inherited. signals also
// gets what UPS daemons and hypervisors send for a power failure.
func heedAsInit(signals chan<- os.Signal) {
	signal.Notify(signals, syscall.SIGPWR)
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGILL, syscall.SIGTRAP, syscall.SIGABRT,
		syscall.SIGBUS, syscall.SIGFPE, syscall.SIGSEGV, syscall.SIGSTKFLT, syscall.SIGSYS)
}

// boot makes a bare root file system a place to live in. The network, for which the kernel takes its time, is up at the latest
// when the channel that it returns is closed.
func boot(nameservers string) <-chan struct{} {
	began := time.Now()
	unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF) // Ctrl-Alt-Del is a SIGINT to process 1 from here on
	syscall.Umask(0)                           // the modes here are meant as they stand
	for i, m := range bootMounts {
		if i == 2 {
			fillDev()
		}
		os.MkdirAll(m.dir, 0o755)
		var dir, above unix.Stat_t
		if unix.Stat(m.dir, &dir) != nil || unix.Stat(m.dir+"/..", &above) != nil || dir.Dev == above.Dev { // nothing is mounted there
			if m.share > 0 {
				pages := totalMemory() / 100 * m.share >> 12
				m.options += fmt.Sprintf(",size=%dk,nr_inodes=%d", pages<<2, pages)
			}
			note("mount "+m.fs+" at "+m.dir, unix.Mount(m.fs, m.dir, m.fs, m.flags, m.options))
		}
	}
	network := make(chan struct{})
	go func() {
		defer close(network)
		note("lo", configureInterface("lo", nil)) // the kernel has an address for it
		configureEth0(10 * time.Second)           // it may be found late
	}()
	files := max(nofile.Max, 1<<20) // the kernel gives init 4,096; processes start with childNofile all the same
	err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: files, Max: files})
	if note("open files", err); err == nil {
		nofile.Max = files
	}
	note("home", os.Mkdir("/root", 0o700))
	note("host name", nameHost())
	note("resolv.conf", nameServers(nameservers))
	slog.Info("booted", "logger", "init", "ms", float64(time.Since(began).Microseconds())/1000)
	return network
}

// protectLinks keeps links and files of others in directories like /tmp from being traps. The kernel's own defaults are 0.
func protectLinks() {
	for _, name := range []string{"hardlinks", "symlinks", "fifos", "regular"} {
		if name = "fs/protected_" + name; sysctl(name) < 1 {
			note("sysctl", os.WriteFile("/proc/sys/"+name, []byte("1"), 0))
		}
	}
}

func note(step string, err error) {
	if err != nil && !errors.Is(err, fs.ErrExist) {
		slog.Warn("a step of the boot failed", "logger", "init", "step", step, "error", err)
	}
}

// ownMachine tells whether this is the machine's first pid namespace, whose inode is fixed (PID_NS_INIT_INO, linux/nsfs.h).
func ownMachine() bool {
	ns, err := os.Readlink("/proc/self/ns/pid")
	return err == nil && ns == "pid:[4026531836]"
}

// fillDev also replaces what entry_$GOARCH.s has put in the place of closed descriptors, so that there is somewhere to log to.
func fillDev() {
	for _, d := range bootDevices {
		note("mknod "+d.name, unix.Mknod("/dev/"+d.name, unix.S_IFCHR|d.mode, int(unix.Mkdev(d.major, d.minor))))
	}
	for _, l := range bootLinks {
		note("symlink", os.Symlink(l[1], "/dev/"+l[0]))
	}
	for _, name := range []string{"/dev/console", "/dev/null"} { // a kernel may be without a console
		file, err := unix.Open(name, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		for fd := range 3 {
			var st unix.Stat_t
			if err == nil && unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
				unix.Dup3(file, fd, 0)
			}
		}
		unix.Close(file)
	}
}

// configureInterface takes a card up by the ioctls of netdevice(7) and gives it an address of a network of four with the way out
// by the next one, as hosts of such agents have it. What the kernel's ip= has done stays, on this card and on others.
func configureInterface(name string, address []byte) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, _ := unix.NewIfreq(name)
	if address != nil {
		if err := unix.IoctlIfreq(fd, unix.SIOCGIFADDR, r); err != unix.EADDRNOTAVAIL {
			return err // or nil
		}
		r.SetInet4Addr(address)
		err = unix.IoctlIfreq(fd, unix.SIOCSIFADDR, r)
		r.SetInet4Addr([]byte{255, 255, 255, 252})
		err = errors.Join(err, unix.IoctlIfreq(fd, unix.SIOCSIFNETMASK, r))
	}
	err = errors.Join(err, unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, r))
	r.SetUint16(r.Uint16() | unix.IFF_UP)
	if err = errors.Join(err, unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r)); err != nil || address == nil {
		return err
	}
	any4 := unix.RawSockaddrInet4{Family: unix.AF_INET}
	route := struct { // struct rtentry, linux/route.h
		_                     uintptr
		dst, gateway, netmask unix.RawSockaddrInet4
		flags                 uint16
		_                     [2]uintptr
		metric                int16 // large: others come first
		_                     [4]uintptr
	}{dst: any4, gateway: any4, netmask: any4, flags: unix.RTF_UP | unix.RTF_GATEWAY, metric: 1024}
	copy(route.gateway.Addr[:], address)
	route.gateway.Addr[3]++
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCADDRT, uintptr(unsafe.Pointer(&route))); errno != 0 {
		return errno
	}
	return nil
}

// configureEth0 tries again, for a while, where there is no such card yet. It asks for all of them: for a name that it does not
// know, an ioctl has the kernel start modprobe.
func configureEth0(patience time.Duration) {
	const again = 50 * time.Millisecond
	_, err := net.InterfaceByName("eth0")
	if err != nil && patience > 0 {
		time.AfterFunc(again, func() { configureEth0(patience - again) })
		return
	}
	if err == nil {
		err = configureInterface("eth0", []byte{169, 254, 0, 21})
	}
	note("eth0", err)
}

// nameHost keeps a name that ip= gave; where that names none, the kernel makes one of the address.
func nameHost() error {
	name, err := os.Hostname()
	if err == nil && (slices.Contains([]string{"", "(none)", "localhost"}, name) || net.ParseIP(name) != nil) {
		text, _ := os.ReadFile("/etc/hostname")
		name = cmp.Or(strings.TrimSpace(string(text)), "capsule")
		err = os.NewSyscallError("sethostname", unix.Sethostname([]byte(name)))
	}
	text, _ := os.ReadFile("/etc/hosts")
	if hosts := strings.TrimRight(string(text), "\n"); !slices.Contains(strings.Fields(hosts), name) {
		err = errors.Join(err, provide("/etc/hosts", cmp.Or(hosts, "127.0.0.1\tlocalhost")+"\n127.0.1.1\t"+name+"\n"))
	}
	return err
}

// nameServers prefers what ip= or its DHCP gave: /proc/net/pnp has the form of the file.
func nameServers(fallback string) error {
	if text, _ := os.ReadFile("/etc/resolv.conf"); len(bytes.TrimSpace(text)) > 0 || fallback == "" {
		return nil
	}
	conf := "nameserver " + strings.ReplaceAll(fallback, ",", "\nnameserver ") + "\n"
	if pnp, _ := os.ReadFile("/proc/net/pnp"); bytes.Contains(pnp, []byte("\nnameserver ")) {
		conf = string(pnp)
	}
	return provide("/etc/resolv.conf", conf)
}

// provide writes a file, also through a link into a /run that is still empty. On a read-only file system it goes over the old one.
func provide(path, content string) error {
	target, _ := os.Readlink(path)
	if !filepath.IsAbs(target) {
		target = filepath.Join(filepath.Dir(path), target)
	}
	os.MkdirAll(filepath.Dir(path), 0o755)
	os.MkdirAll(filepath.Dir(target), 0o755)
	err := os.WriteFile(path, []byte(content), 0o644)
	copied := filepath.Join("/run", filepath.Base(path))
	if errors.Is(err, unix.EROFS) && os.WriteFile(copied, []byte(content), 0o644) == nil {
		err = os.NewSyscallError("mount", unix.Mount(copied, path, "", unix.MS_BIND, ""))
	}
	return err
}

// endProcesses asks everyone to leave, then makes them. At terminals, shells ignore SIGTERM: who leads a session and has a
// terminal is hung up (proc_pid_stat(5)).
func endProcesses() {
	syscall.Kill(-1, syscall.SIGTERM)
	syscall.Kill(-1, syscall.SIGCONT)
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range files {
		pid := strings.Split(file, "/")[2]
		text, _ := os.ReadFile(file)
		f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:])) // the name may hold anything
		if n, err := strconv.Atoi(pid); err == nil && len(f) > 4 && f[3] == pid && f[4] != "0" {
			syscall.Kill(n, syscall.SIGHUP)
		}
	}
	awaitNobody(termPatience)
	syscall.Kill(-1, syscall.SIGKILL)
	awaitNobody(time.Second / 2)
}

// awaitNobody waits until process 1 has no child, which all descend from but the kernel's own threads and, in a container, who
// came in from outside.
func awaitNobody(patience time.Duration) {
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		alone := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil) == unix.ECHILD
		if alone && ownMachine() || syscall.Kill(-1, 0) == syscall.ESRCH {
			return
		}
	}
}

// powerOff does not return, unless envd has no power over the machine: then its exit is what ends the container.
// A reboot= on the kernel's command line says that the host waits for a reset: Firecracker has no power switch, it exits when
// its guest resets itself. Inside a pid namespace a reset ends the namespace as if by SIGHUP, power-off as if by SIGINT.
func powerOff(restart bool, log *stdoutLog) {
	how := unix.LINUX_REBOOT_CMD_POWER_OFF
	cmdline, _ := os.ReadFile("/proc/cmdline")
	if restart || strings.Contains(" "+string(cmdline), " reboot=") {
		how = unix.LINUX_REBOOT_CMD_RESTART
	}
	inTime("sync", 15*time.Second, unix.Sync) // a dead server of files takes for ever
	mounts, _ := os.ReadFile("/proc/self/mounts")
	own := ownMachine() // nobody can tell any more once /proc is unmounted
	for _, line := range slices.Backward(strings.Split(string(mounts), "\n")) {
		if f := strings.Fields(line); own && len(f) > 1 {
			dir := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(f[1])
			inTime("unmount "+dir, patience, func() {
				if unix.Unmount(dir, unix.UMOUNT_NOFOLLOW) != nil { // it is in use; the root becomes read-only by this alone
					unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
				}
			})
		}
	}
	log.flush()
	slog.Warn("no power over the machine", "logger", "init", "error", unix.Reboot(how))
}
