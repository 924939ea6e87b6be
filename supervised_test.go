// A supervisor of the daemon's system calls: seccomp_unotify(2). The kernel asks it about each call of a list before the call
// is made; it lets the call pass, has it fail with an error of its choice, makes it itself in part, or kills the daemon there.
// Needs Linux 5.14, and root.

package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// systemCall is struct seccomp_notif.
type systemCall struct {
	id    uint64
	tid   uint32
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

// verdict is struct seccomp_notif_resp.
type verdict struct {
	id    uint64
	val   int64
	errno int32
	flags uint32
}

var letPass = verdict{flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}

func failsWith(errno syscall.Errno) verdict { return verdict{errno: -int32(errno)} }

// never leaves the call where it is.
var never = verdict{val: -1, flags: 1 << 31}

type supervisor struct {
	socket string
	listed []uintptr
	done   chan struct{}

	mu     sync.Mutex // held while a call is judged
	decide func(c *systemCall) verdict
}

// supervise makes a supervisor of some system calls. It lets all pass until it is told otherwise.
func supervise(t testing.TB, listed []uintptr) *supervisor {
	t.Helper()
	needRoot(t)
	s := &supervisor{socket: filepath.Join(publicDir(t), "supervisor"), listed: listed, done: make(chan struct{})}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	go s.serve(listener)
	t.Cleanup(func() { // when the daemon and its children have gone
		listener.Close()
		<-s.done
	})
	return s
}

// steps are for daemonConfig.
func (s *supervisor) steps() []string {
	var numbers []string
	for _, nr := range s.listed {
		numbers = append(numbers, strconv.Itoa(int(nr)))
	}
	return []string{"supervised", s.socket + ":" + strings.Join(numbers, ",")}
}

// supervisedBy is a preparation (harness_test.go): from here on the calls wait for the supervisor, also those of children.
func supervisedBy(operand string) error {
	socket, numbers, _ := strings.Cut(operand, ":")
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return err
	}
	program := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}} // nr is the first of struct seccomp_data
	for field := range strings.SplitSeq(numbers, ",") {
		nr, _ := strconv.ParseUint(field, 10, 32)
		program = append(program, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: uint32(nr), Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
	}
	program = append(program, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	runtime.LockOSThread()
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&fprog)))
	if errno != 0 {
		return errno
	}
	_, _, err = conn.WriteMsgUnix([]byte{0}, unix.UnixRights(int(fd)), nil)
	return errors.Join(err, conn.Close(), unix.Close(int(fd)))
}

func (s *supervisor) serve(listener *net.UnixListener) {
	defer close(s.done)
	conn, err := listener.AcceptUnix()
	if err != nil {
		return
	}
	rights := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 1), rights)
	conn.Close()
	if err != nil {
		return
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil || len(messages) == 0 {
		return
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return
	}
	listen := fds[0]
	defer unix.Close(listen)
	for {
		events := []unix.PollFd{{Fd: int32(listen), Events: unix.POLLIN}}
		if _, err := unix.Poll(events, -1); err == unix.EINTR {
			continue
		} else if err != nil || events[0].Revents&unix.POLLIN == 0 { // POLLHUP: nobody is left
			return
		}
		var call systemCall
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(listen), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&call))); errno != 0 {
			continue // a signal came first
		}
		s.mu.Lock()
		answer := letPass
		if s.decide != nil {
			answer = s.decide(&call)
		}
		s.mu.Unlock()
		if answer != never {
			answer.id = call.id
			unix.Syscall(unix.SYS_IOCTL, uintptr(listen), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&answer)))
		}
	}
}

// judge has calls judged; nil lets all pass. It returns when no call is being judged by the one before.
func (s *supervisor) judge(decide func(c *systemCall) verdict) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.decide = decide
}

// text reads a string of the caller's; the name of one of its descriptors counts as what that is open for.
func (c *systemCall) text(arg int) string {
	buf := make([]byte, unix.PathMax)
	n := c.memory(c.args[arg], buf)
	cut, _, _ := bytes.Cut(buf[:n], []byte{0})
	text := string(cut)
	if fd, ok := strings.CutPrefix(text, "/proc/self/fd/"); ok {
		text, _ = os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", c.tid, fd))
	}
	return text
}

func (c *systemCall) memory(address uint64, buf []byte) (n int) {
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", c.tid))
	if err != nil {
		return 0
	}
	defer mem.Close()
	n, _ = mem.ReadAt(buf, int64(address))
	return n
}

// file is the path of an open file of the caller's.
func (c *systemCall) file(arg int) string {
	path, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", c.tid, int32(c.args[arg])))
	return path
}

// isOf tells whether the caller is a thread of a process.
func (c *systemCall) isOf(pid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d/task/%d", pid, c.tid))
	return err == nil
}

// The system calls that have a file as their first argument, and, of the second list, a name in that directory as their second.
var (
	onFile = []uintptr{unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_READ, unix.SYS_PREAD64, unix.SYS_FALLOCATE, unix.SYS_FTRUNCATE,
		unix.SYS_FCHMOD, unix.SYS_FSTAT, unix.SYS_FSETXATTR, unix.SYS_FGETXATTR, unix.SYS_FLISTXATTR, unix.SYS_FREMOVEXATTR,
		unix.SYS_LSEEK, unix.SYS_GETDENTS64, unix.SYS_FSTATFS, unix.SYS_COPY_FILE_RANGE, unix.SYS_FCHOWN}
	onName = []uintptr{unix.SYS_OPENAT, unix.SYS_OPENAT2, unix.SYS_NEWFSTATAT, unix.SYS_MKDIRAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT,
		unix.SYS_RENAMEAT2, unix.SYS_LINKAT, unix.SYS_SYMLINKAT, unix.SYS_READLINKAT, unix.SYS_FCHOWNAT, unix.SYS_UTIMENSAT, unix.SYS_STATX}
)

// concerns tells whether a call is about a directory, or what is below it, by descriptor or by name.
func (c *systemCall) concerns(dir string) bool {
	for i := range c.args[:2] {
		if strings.HasPrefix(c.file(i), dir) {
			return true
		}
	}
	return strings.HasPrefix(c.text(1), dir) || strings.HasPrefix(c.text(0), dir)
}

// shorter makes a write, or a copy from file to file, itself, but only a part of it.
func (c *systemCall) shorter(pid int) verdict {
	process, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return letPass
	}
	defer unix.Close(process)
	took := func(arg int) int {
		fd, _, errno := unix.Syscall(unix.SYS_PIDFD_GETFD, uintptr(process), uintptr(c.args[arg]), 0)
		if errno != 0 {
			return -1
		}
		return int(fd)
	}
	fd := took(0)
	defer unix.Close(fd)
	var n int
	if uintptr(c.nr) == unix.SYS_COPY_FILE_RANGE {
		to := took(2)
		defer unix.Close(to)
		n, err = unix.CopyFileRange(fd, nil, to, nil, int(c.args[4]/3+1), 0)
	} else {
		buf := make([]byte, c.args[2]/3+1)
		buf = buf[:c.memory(c.args[1], buf)]
		n, err = unix.Write(fd, buf)
	}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return failsWith(errno)
	}
	return verdict{val: int64(n)}
}
