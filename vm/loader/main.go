// The loader is /init of the test's initramfs: it loads the kernel modules of the archive, changes to the root filesystem
// that the test wants, and becomes the agent, with the arguments that the kernel gave it.
//
// It does what a distribution's initramfs does, because the kernel of a distribution has its drivers as modules. The
// kernel ignores words with a dot in them, so the loader's own are:
//
//	loader.root=rw|ro   the root filesystem is /dev/vda (absent: the initramfs itself)
//	loader.dirs=yes     the root filesystem has the directories that others are mounted on
//	loader.exec=PATH    what it becomes (absent: /envd)
//	loader.ip=DEVICE,ADDRESS,NETMASK,GATEWAY  what a kernel's ip= does
//	loader.mounts=yes   mount tmpfs on /run and /tmp, each with a file, and /proc
//	loader.init=yes     mount /proc, /sys, /dev, /run, /tmp and cgroup2 and configure the network, for a program that does not
package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if err := boot(); err != nil {
		fmt.Println("loader:", err)
		time.Sleep(100 * time.Millisecond) // the console takes its time
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
}

func boot() error {
	os.Mkdir("/proc", 0o755)
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return err
	}
	words := map[string]string{}
	line, _ := os.ReadFile("/proc/cmdline")
	for word := range strings.FieldsSeq(string(line)) {
		name, value, _ := strings.Cut(word, "=")
		words[name] = value
	}
	modules, _ := filepath.Glob("/modules/*")
	for _, path := range modules {
		file, err := os.Open(path)
		if err == nil {
			err = unix.FinitModule(int(file.Fd()), "", 0)
			file.Close()
		}
		if err != nil && err != unix.EEXIST && err != unix.ENODEV { // crc32c_intel says ENODEV without the instruction
			fmt.Printf("loader: %s: %v\n", path, err)
		}
		os.Remove(path)
	}
	os.Remove("/modules")
	accountKernelMemory()
	unix.Unmount("/proc", 0)
	os.Remove("/proc")
	if mode := words["loader.root"]; mode != "" {
		if err := changeRoot(mode == "ro", words["loader.dirs"] != ""); err != nil {
			return fmt.Errorf("root: %w", err)
		}
	}
	if words["loader.init"] != "" {
		prepare()
	}
	if words["loader.mounts"] != "" {
		mounts()
	}
	if ip := strings.Split(words["loader.ip"], ","); len(ip) == 4 {
		if err := configure(ip[0], ip[1], ip[2], ip[3]); err != nil {
			return fmt.Errorf("%s: %w", words["loader.ip"], err)
		}
	}
	path := words["loader.exec"]
	if path == "" {
		path = "/envd"
	}
	// The test takes the time from here: it is the whole of what the loader says if all goes well.
	fmt.Println("loader: " + path)
	return unix.Exec(path, append([]string{path}, os.Args[1:]...), os.Environ())
}

// accountKernelMemory makes the first cgroup that has a memory controller, and removes it. With the first one the kernel patches its
// own code: it writes a breakpoint over a jump in the allocator, then the jump's new form. A processor that runs this code
// meanwhile returns from the breakpoint to what is there by then. QEMU's emulated one (7.2, with a thread for each processor) may
// have kept its translation of the breakpoint, and takes it for ever: one boot in 200 on a busy machine ended in `soft lockup`, in
// asm_exc_int3 with a nop at RIP. Here, no other processor has anything to run. guest.go forbids the other patch, of the sockets.
func accountKernelMemory() {
	const dir = "/cgroup"
	os.Mkdir(dir, 0o755)
	defer os.Remove(dir)
	if unix.Mount("cgroup2", dir, "cgroup2", 0, "") != nil {
		return
	}
	defer unix.Unmount(dir, 0)
	control := dir + "/cgroup.subtree_control"
	if os.WriteFile(control, []byte("+memory"), 0) == nil { // else it is disabled
		os.Mkdir(dir+"/first", 0o755)
		os.Remove(dir + "/first")
		os.WriteFile(control, []byte("-memory"), 0)
	}
}

// changeRoot leaves the agent what a kernel without an initramfs would: the root filesystem, mounted, and nothing else.
func changeRoot(readOnly, withDirs bool) error {
	os.Mkdir("/dev", 0o755)
	os.Mkdir("/root", 0o755)
	if err := unix.Mount("devtmpfs", "/dev", "devtmpfs", 0, ""); err != nil {
		return err
	}
	flags := uintptr(0)
	if readOnly && !withDirs {
		flags = unix.MS_RDONLY
	}
	var err error
	for range 500 { // the driver finds the disk a little later than it is loaded
		if err = unix.Mount("/dev/vda", "/root", "ext4", flags, ""); err != unix.ENOENT {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	if withDirs {
		for _, dir := range []string{"proc", "sys", "dev", "run", "tmp", "etc"} {
			os.Mkdir("/root/"+dir, 0o755)
		}
		if readOnly {
			if err := unix.Mount("", "/root", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				return err
			}
		}
	}
	unix.Unmount("/dev", unix.MNT_DETACH)
	os.Remove("/init")
	if err := os.Chdir("/root"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return os.Chdir("/")
}

// prepare does what an init does that is not the agent itself.
func prepare() {
	for _, m := range []struct{ fstype, dir string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"devpts", "/dev/pts"},
		{"tmpfs", "/run"}, {"tmpfs", "/tmp"}, {"cgroup2", "/sys/fs/cgroup"}} {
		os.MkdirAll(m.dir, 0o755)
		if err := unix.Mount(m.fstype, m.dir, m.fstype, 0, ""); err != nil && err != unix.EBUSY {
			fmt.Printf("loader: %s: %v\n", m.dir, err)
		}
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = address(s, "lo", "127.0.0.1", "255.0.0.0")
	}
	if err == nil {
		err = address(s, "eth0", "169.254.0.21", "255.255.255.252")
	}
	if err != nil {
		fmt.Println("loader: network:", err)
	}
	unix.Close(s)
}

// mounts leaves the agent something to find.
func mounts() {
	for _, dir := range []string{"/run", "/tmp"} {
		os.Mkdir(dir, 0o755)
		unix.Mount("tmpfs", dir, "tmpfs", 0, "")
		os.WriteFile(dir+"/kept", []byte(dir), 0o644)
	}
	os.Mkdir("/proc", 0o755)
	unix.Mount("proc", "/proc", "proc", 0, "")
}

// configure gives a device an address, and the guest its way out.
func configure(device, local, mask, gateway string) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	if err := address(s, device, local, mask); err != nil {
		return err
	}
	any4 := unix.RawSockaddrInet4{Family: unix.AF_INET}
	route := struct { // struct rtentry, linux/route.h
		_                     uintptr
		dst, gateway, netmask unix.RawSockaddrInet4
		flags                 uint16
		_                     [6]uintptr
	}{dst: any4, gateway: any4, netmask: any4, flags: unix.RTF_UP | unix.RTF_GATEWAY}
	copy(route.gateway.Addr[:], net.ParseIP(gateway).To4())
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCADDRT, uintptr(unsafe.Pointer(&route))); errno != 0 {
		return errno
	}
	return nil
}

func address(socket int, name, address, mask string) error {
	var err error
	for range 500 { // as with the disk
		ifr, _ := unix.NewIfreq(name)
		ifr.SetInet4Addr(net.ParseIP(address).To4())
		if err = unix.IoctlIfreq(socket, unix.SIOCSIFADDR, ifr); err == unix.ENODEV {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		ifr.SetInet4Addr(net.ParseIP(mask).To4())
		unix.IoctlIfreq(socket, unix.SIOCSIFNETMASK, ifr)
		unix.IoctlIfreq(socket, unix.SIOCGIFFLAGS, ifr)
		ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
		return unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, ifr)
	}
	return err
}
