// The guest's world: a network namespace with a tap device, the host's address, and a metadata server (MMDS v2).
//
// The namespace has no name and the tap device lives in it, so both are gone when this process and its QEMU are. QEMU is
// started from the namespace's own thread and dies with it.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"runtime"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	guestAddress = "169.254.0.21"
	hostAddress  = "169.254.0.22"
	mmdsAddress  = "169.254.169.254"
	otherAddress = "192.0.2.1" // of the host, for more servers
	tapName      = "tap0"
)

var guestMAC = net.HardwareAddr{0x06, 0x00, 0xa9, 0xfe, 0x00, 0x15}

type network struct {
	ns   *os.File
	work chan func() // done on the thread that was born with the namespace and lives as long as the network
	done chan struct{}
	once sync.Once
	mmds *metadata
}

// newNetwork makes one. For a guest that is about to boot the host knows its hardware address: it would else ask for it once
// a second only. For one that goes on after a snapshot it has to ask, and so tells the guest its own, which is a new one.
func newNetwork(boots bool) (*network, error) {
	n := &network{work: make(chan func()), done: make(chan struct{}), mmds: &metadata{}}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		defer close(n.done)
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			n.ns, err = os.Open("/proc/thread-self/ns/net")
		}
		if err == nil {
			err = configure(boots)
		}
		ready <- err
		for f := range n.work {
			f()
		}
	}()
	err := <-ready
	if err == nil {
		err = n.mmds.listen(n)
	}
	if err != nil {
		n.close()
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	return n, nil
}

func (n *network) close() {
	n.once.Do(func() {
		n.mmds.close()
		close(n.work)
		<-n.done
		if n.ns != nil {
			n.ns.Close()
		}
	})
}

// onThread runs f on the namespace's own thread.
func (n *network) onThread(f func() error) error {
	result := make(chan error)
	n.work <- func() { result <- f() }
	return <-result
}

// inside runs f, which may block, on a thread in the namespace that ends afterwards.
func (n *network) inside(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(int(n.ns.Fd()), unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

// dial is a DialContext for addresses that are IP literals.
func (n *network) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = n.inside(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// configure makes the tap device, the addresses, and the guest's entry in the ARP table.
func configure(neighbour bool) error {
	tun, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/net/tun: %w", err)
	}
	defer unix.Close(tun)
	ifr, _ := unix.NewIfreq(tapName)
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(tun, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	if err := unix.IoctlSetInt(tun, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("TUNSETPERSIST: %w", err)
	}
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	for _, i := range []struct{ name, address, mask string }{
		{tapName, hostAddress, "255.255.255.252"},
		{tapName + ":1", "10.7.7.1", "255.255.255.0"}, // for a guest of another address
		{"lo", "127.0.0.1", "255.0.0.0"},
		{"lo:1", mmdsAddress, "255.255.255.255"},
		{"lo:2", otherAddress, "255.255.255.255"},
	} {
		if err := setAddress(s, i.name, i.address, i.mask); err != nil {
			return fmt.Errorf("%s: %w", i.name, err)
		}
	}
	if !neighbour {
		return nil
	}
	arp := struct { // arpreq of net/if_arp.h
		protocol unix.RawSockaddrInet4
		hardware unix.RawSockaddr
		flags    int32
		mask     unix.RawSockaddr
		dev      [16]byte
	}{flags: 0x02 | 0x04} // ATF_COM, ATF_PERM
	arp.protocol.Family = unix.AF_INET
	copy(arp.protocol.Addr[:], net.ParseIP(guestAddress).To4())
	arp.hardware.Family = unix.ARPHRD_ETHER
	for i, b := range guestMAC {
		arp.hardware.Data[i] = int8(b)
	}
	copy(arp.dev[:], tapName)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCSARP, uintptr(unsafe.Pointer(&arp))); errno != 0 {
		return fmt.Errorf("SIOCSARP: %w", errno)
	}
	return nil
}

// setAddress gives an interface an IPv4 address and takes it up.
func setAddress(socket int, name, address, mask string) error {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	for _, set := range []struct {
		request uint
		address string
	}{{unix.SIOCSIFADDR, address}, {unix.SIOCSIFNETMASK, mask}} {
		if err := ifr.SetInet4Addr(net.ParseIP(set.address).To4()); err != nil {
			return err
		}
		if err := unix.IoctlIfreq(socket, set.request, ifr); err != nil {
			return err
		}
	}
	if err := unix.IoctlIfreq(socket, unix.SIOCGIFFLAGS, ifr); err != nil {
		return err
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	return unix.IoctlIfreq(socket, unix.SIOCSIFFLAGS, ifr)
}

// metadata is a server of MMDS, version 2: a token is fetched with PUT, the data with GET and the token.
type metadata struct {
	mu       sync.Mutex
	data     map[string]string // nil: none yet, as before a host has set any
	requests int               // for data, with the token
	silent   bool              // takes requests and never answers

	server *http.Server
}

func (m *metadata) set(data map[string]string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.data = data
}

// beSilent makes it take requests and never answer.
func (m *metadata) beSilent() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.silent = true
}

func (m *metadata) asked() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.requests
}

func (m *metadata) listen(n *network) error {
	var l net.Listener
	err := n.inside(func() (err error) {
		l, err = net.Listen("tcp4", mmdsAddress+":80")
		return err
	})
	if err != nil {
		return err
	}
	m.server = &http.Server{Handler: m}
	go m.server.Serve(l)
	return nil
}

func (m *metadata) close() {
	if m.server != nil {
		m.server.Close()
	}
}

func (m *metadata) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	const token = "a-token-of-the-metadata-server"
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.silent {
		m.requests++
		m.mu.Unlock()
		<-r.Context().Done()
		m.mu.Lock()
		return
	}
	switch {
	case r.Method == "PUT" && r.URL.Path == "/latest/api/token" && r.Header.Get("X-metadata-token-ttl-seconds") != "":
		fmt.Fprint(w, token)
	case r.Method != "GET":
		http.Error(w, "no such method here", http.StatusMethodNotAllowed)
	case r.Header.Get("X-metadata-token") != token:
		http.Error(w, "no token", http.StatusUnauthorized)
	case m.data == nil:
		http.Error(w, "no data", http.StatusNotFound)
	default:
		m.requests++
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(m.data)
	}
}
