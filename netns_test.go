// Network namespaces of a test's own: a guest with its loopback, joined by a veth pair to the host that looks after it.

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

type dialFunc = func(ctx context.Context, network, address string) (net.Conn, error)

// netns is a network namespace; it goes with the test.
type netns struct{ file *os.File }

const guestAddress, hostAddress = "169.254.0.21", "169.254.0.22"

// newNetns makes one whose loopback interface is up.
func newNetns(t testing.TB) *netns {
	t.Helper()
	needRoot(t)
	if _, err := exec.LookPath("ip"); err != nil {
		t.Skip("needs ip (iproute2): not installed")
	}
	n, failed := &netns{}, make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			n.file, err = os.Open("/proc/thread-self/ns/net")
		}
		failed <- err
	}()
	if err := <-failed; err != nil {
		t.Skipf("needs network namespaces: %v", err)
	}
	t.Cleanup(func() { n.file.Close() })
	n.ip(t, "link set lo up")
	return n
}

// newGuest makes two: a guest that has the address of one, and the host at the other end.
func newGuest(t testing.TB) (guest, host *netns) {
	t.Helper()
	guest, host = newNetns(t), newNetns(t)
	guest.ip(t, "link add eth0 type veth peer name tap0 netns "+host.path())
	guest.ip(t, "address add "+guestAddress+"/30 dev eth0")
	host.ip(t, "address add "+hostAddress+"/30 dev tap0")
	guest.ip(t, "link set eth0 up")
	host.ip(t, "link set tap0 up")
	return guest, host
}

func (n *netns) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.file.Fd()) }

// do runs f in the namespace; sockets that it makes itself stay there, goroutines that it starts are not.
func (n *netns) do(f func()) {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock
		err := unix.Setns(int(n.file.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		panic(err) // a descriptor of our own
	}
}

func (n *netns) ip(t testing.TB, arguments string) {
	t.Helper()
	n.do(func() {
		if out, err := exec.Command("ip", strings.Fields(arguments)...).CombinedOutput(); err != nil {
			t.Errorf("ip %s: %v\n%s", arguments, err, out)
		}
	})
}

func (n *netns) dial(ctx context.Context, network, address string) (net.Conn, error) {
	return n.dialWith(new(net.Dialer))(ctx, network, address)
}

func (n *netns) dialWith(dialer *net.Dialer) dialFunc {
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		n.do(func() { conn, err = dialer.DialContext(ctx, network, address) })
		return conn, err
	}
}

func (n *netns) client() *http.Client {
	return &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64, DialContext: n.dial}}
}

// listen is for addresses that need no resolver. The listener is closed with the test at the latest.
func (n *netns) listen(t testing.TB, address string) (l net.Listener) {
	t.Helper()
	var err error
	n.do(func() { l, err = net.Listen("tcp", address) })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// ---- for execPrepared ----------------------------------------------------------------------------------------------

func enterNetns(path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Setns(fd, unix.CLONE_NEWNET)
	}
	return err
}

// forbidNetlink makes socket(AF_NETLINK, _, protocol) fail as it does where the kernel lacks the protocol: seccomp(2).
func forbidNetlink(protocol uint32) error {
	number, domain, third := uint32(0), uint32(16), uint32(32) // struct seccomp_data, low words
	filter := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_SOCKET, Jf: 5},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: domain},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AF_NETLINK, Jf: 3},
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: third},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: protocol, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPROTONOSUPPORT)},
		{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	}
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0)
}
