// Ports that listen on the guest's loopback alone, reached from the host at the guest's address.

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() {
	testRoles["listen-later"] = listenLater
	testRoles["quiesce-ports"] = quiescePorts
}

// startGuest starts a daemon in a guest of its own.
func startGuest(t testing.TB, args ...string) (d *daemon, guest, host *netns) {
	t.Helper()
	guest, host = newGuest(t)
	return startDaemonWith(t, daemonConfig{netns: guest, args: args}), guest, host
}

// greet accepts connections, says a word on each and closes it when the client has.
func greet(l net.Listener, word string) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close()
			io.WriteString(conn, word)
			io.Copy(io.Discard, conn)
		}()
	}
}

// word is what a port of the guest's address says, or "".
func (n *netns) word(port int) string {
	conn, err := n.dial(context.Background(), "tcp", fmt.Sprintf("%s:%d", guestAddress, port))
	if err != nil {
		return ""
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	conn.(*net.TCPConn).CloseWrite()
	word, _ := io.ReadAll(conn)
	return string(word)
}

func (n *netns) waitWord(t testing.TB, port int, word string) {
	t.Helper()
	waitFor(t, 5*time.Second, fmt.Sprintf("port %d says %q", port, word), func() bool { return n.word(port) == word })
}

// connect is a connection that must come about.
func (n *netns) connect(t testing.TB, port int) *net.TCPConn {
	t.Helper()
	conn, err := n.dial(t.Context(), "tcp", fmt.Sprintf("%s:%d", guestAddress, port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	return conn.(*net.TCPConn)
}

// listening lists what listens in the namespace, as `address:port` in the kernel's hexadecimal.
func (n *netns) listening() (addresses []string) {
	n.do(func() {
		for _, path := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
			text, _ := os.ReadFile(path)
			for line := range strings.Lines(string(text)) {
				if fields := strings.Fields(line); fields[3] == "0A" {
					addresses = append(addresses, fields[1])
				}
			}
		}
	})
	return addresses
}

// forwarded lists the ports that somebody listens on at the guest's address.
func (n *netns) forwarded(t testing.TB) (ports []int) {
	t.Helper()
	for _, address := range n.listening() {
		if port, ok := strings.CutPrefix(address, "1500FEA9:"); ok {
			number, err := strconv.ParseUint(port, 16, 16)
			if err != nil {
				t.Fatal(err)
			}
			ports = append(ports, int(number))
		}
	}
	slices.Sort(ports)
	return ports
}

func wantReset(t testing.TB, what string, err error) {
	t.Helper()
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("%s: %v, want a reset", what, err)
	}
}

// pairThrough is a connection from the host to a listener on the guest's loopback, and its other end.
func pairThrough(t testing.TB, guest, host *netns) (client, server *net.TCPConn, port int) {
	t.Helper()
	port = freePort(t)
	l := guest.listen(t, fmt.Sprintf("127.0.0.1:%d", port))
	waitFor(t, 5*time.Second, "the port forwarded", func() bool { return slices.Contains(guest.forwarded(t), port) })
	client = host.connect(t, port)
	accepted, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { accepted.Close() })
	accepted.SetDeadline(time.Now().Add(30 * time.Second))
	return client, accepted.(*net.TCPConn), port
}

// ---- from when to when ---------------------------------------------------------------------------------------------

func TestPortsSoonAfterListening(t *testing.T) {
	t.Parallel()
	d, guest, host := startGuest(t)
	const n = 9
	appears, goes := make([]time.Duration, n), make([]time.Duration, n)
	for i := range n {
		port := freePort(t)
		phase := time.Duration(i) * time.Second / n // of the second in which a scan falls
		time.Sleep(phase)
		l := guest.listen(t, fmt.Sprintf("127.0.0.1:%d", port))
		began := time.Now()
		go greet(l, "hello")
		host.waitWord(t, port, "hello")
		appears[i] = time.Since(began)
		time.Sleep(phase)
		l.Close()
		began = time.Now()
		waitFor(t, 5*time.Second, "the port closed", func() bool { return !slices.Contains(guest.forwarded(t), port) })
		goes[i] = time.Since(began)
		if word := host.word(port); word != "" {
			t.Errorf("a port that is gone says %q", word)
		}
	}
	slices.Sort(appears)
	slices.Sort(goes)
	t.Logf("reachable after %v, gone after %v", appears, goes)
	if median := max(appears[n/2], goes[n/2]); median > 1100*time.Millisecond {
		t.Errorf("median %v, want at most 1.1 s", median)
	}
	d.healthy(t)
}

// listenLater listens on its first argument after a while, says when, and greets with the second.
func listenLater(args []string) {
	time.Sleep(300 * time.Millisecond)
	l, err := net.Listen("tcp", args[0])
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(time.Now().UnixNano())
	greet(l, args[1])
}

func TestPortsSoonAfterProcessStart(t *testing.T) {
	t.Parallel()
	d, _, host := startGuest(t)
	var took []time.Duration
	for range 9 {
		port := freePort(t)
		s := d.start(t, argv(helperBinary(t), "listen-later", fmt.Sprintf("127.0.0.1:%d", port), "hello"))
		host.waitWord(t, port, "hello")
		reached := time.Now().UnixNano()
		began, err := strconv.ParseInt(strings.TrimSpace(string(s.readUntil(t, "\n").stdout)), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Duration(reached-began))
		d.kill(t, s.pid)
	}
	slices.Sort(took)
	t.Logf("reachable after %v", took)
	if median := took[len(took)/2]; median > 200*time.Millisecond {
		t.Errorf("median %v, want at most 200 ms", median)
	}
}

// ---- what is forwarded, what is not --------------------------------------------------------------------------------

func TestPortsFamilies(t *testing.T) {
	t.Parallel()
	d, guest, host := startGuest(t)
	port4, port6, both := freePort(t), freePort(t), freePort(t)
	serve := func(address string, port int, word string) net.Listener {
		l := guest.listen(t, fmt.Sprintf("%s:%d", address, port))
		go greet(l, word)
		return l
	}
	serve("127.0.0.1", port4, "four")
	serve("[::1]", port6, "six")
	six := serve("[::1]", both, "six of both")
	host.waitWord(t, both, "six of both")
	four := serve("127.0.0.1", both, "four of both")
	host.waitWord(t, port4, "four")
	host.waitWord(t, port6, "six")
	host.waitWord(t, both, "four of both")
	want := []int{port4, port6, both}
	slices.Sort(want)
	if got := guest.forwarded(t); !slices.Equal(got, want) {
		t.Errorf("forwarded are %d, want each of %d once", got, want)
	}
	four.Close()
	host.waitWord(t, both, "six of both")
	six.Close()
	waitFor(t, 5*time.Second, "the port that neither has closed", func() bool { return !slices.Contains(guest.forwarded(t), both) })
	d.healthy(t)
}

func TestPortsThatStayInside(t *testing.T) {
	t.Parallel()
	d, guest, host := startGuest(t) // which itself listens on 127.0.0.1
	for _, address := range []string{"127.0.0.53", "127.0.0.2", "0.0.0.0", "[::]"} {
		guest.listen(t, fmt.Sprintf("%s:%d", address, freePort(t)))
	}
	guest.do(func() { // net.Listen would make an IPv4 socket of it
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			t.Cleanup(func() { unix.Close(fd) })
			mapped := &unix.SockaddrInet6{Port: freePort(t), Addr: netip.MustParseAddr("::ffff:127.0.0.1").As16()}
			err = errors.Join(unix.Bind(fd, mapped), unix.Listen(fd, 1))
		}
		if err != nil {
			t.Error(err)
		}
	})
	connected, _, port := pairThrough(t, guest, host) // a later listener: the others had their scan
	if got := guest.forwarded(t); !slices.Equal(got, []int{port}) {
		t.Errorf("forwarded are %d, want %d alone", got, port)
	}
	if host.word(d.port) != "" {
		t.Error("the daemon's own port is forwarded")
	}
	if count := len(guest.listening()); count != 8 { // five above, the daemon, the last listener, its forwarder
		t.Errorf("%d sockets listen: %q", count, guest.listening())
	}
	connected.Close()
}

func TestPortsOff(t *testing.T) {
	t.Parallel()
	_, guest, host := startGuest(t, "--forward-address", "")
	port := freePort(t)
	go greet(guest.listen(t, fmt.Sprintf("127.0.0.1:%d", port)), "hello")
	_, guest2, host2 := startGuest(t)
	port2 := freePort(t)
	go greet(guest2.listen(t, fmt.Sprintf("127.0.0.1:%d", port2)), "hello")
	host2.waitWord(t, port2, "hello") // which shows how long it takes
	if host.word(port) != "" {
		t.Error("forwarded all the same")
	}
}

func TestPortsForwardAddress(t *testing.T) {
	t.Parallel()
	guest := newNetns(t)
	startDaemonWith(t, daemonConfig{netns: guest, args: argv("--forward-address", "127.0.0.1")})
	port := freePort(t)
	go greet(guest.listen(t, fmt.Sprintf("[::1]:%d", port)), "six")
	at := fmt.Sprintf("127.0.0.1:%d", port)
	waitFor(t, 5*time.Second, "::1 reached at 127.0.0.1", func() bool {
		conn, err := guest.dial(t.Context(), "tcp", at)
		if err != nil {
			return false
		}
		defer conn.Close()
		word := make([]byte, 3)
		io.ReadFull(conn, word)
		return string(word) == "six"
	})
}

// The address comes to the interface late.
func TestPortsWithoutAddress(t *testing.T) {
	t.Parallel()
	guest := newNetns(t)
	d := startDaemonWith(t, daemonConfig{netns: guest})
	port := freePort(t)
	go greet(guest.listen(t, fmt.Sprintf("127.0.0.1:%d", port)), "hello")
	d.healthy(t)
	before := d.sockets()
	d.run(t, argv("sleep", "1.5"))
	if strings.Contains(d.log(), "port-forwarder") {
		t.Error("the log is not quiet")
	}
	if got := guest.forwarded(t); len(got) != 0 {
		t.Errorf("forwarded: %d", got)
	}
	if after := d.sockets(); after > before {
		t.Errorf("%d sockets, before %d", after, before)
	}
	guest.ip(t, "address add "+guestAddress+"/32 dev lo")
	guest.waitWord(t, port, "hello")
}

func TestPortsBindIsRetried(t *testing.T) {
	t.Parallel()
	d, guest, host := startGuest(t)
	port := freePort(t)
	other := guest.listen(t, fmt.Sprintf("%s:%d", guestAddress, port))
	go greet(other, "other")
	go greet(guest.listen(t, fmt.Sprintf("127.0.0.1:%d", port)), "hello")
	d.run(t, argv("sleep", "1.2"))
	if word := host.word(port); word != "other" {
		t.Errorf("the port says %q", word)
	}
	other.Close()
	waitFor(t, 10*time.Second, "the port forwarded", func() bool { return host.word(port) == "hello" })
}

func TestPortsWithoutSockDiag(t *testing.T) {
	t.Parallel()
	guest, host := newGuest(t)
	d := startDaemonWith(t, daemonConfig{netns: guest, steps: argv("no-netlink", strconv.Itoa(unix.NETLINK_SOCK_DIAG))})
	for _, fd := range d.fds() {
		_, inode, _ := strings.Cut(fd, "socket:[")
		sockets, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/netlink", d.pid))
		if err != nil || strings.Contains(string(sockets), " "+strings.TrimSuffix(inode, "]")+" ") && inode != "" {
			t.Fatalf("%v, or a netlink socket: %s", err, fd)
		}
	}
	port4, port6 := freePort(t), freePort(t)
	four, six := guest.listen(t, fmt.Sprintf("127.0.0.1:%d", port4)), guest.listen(t, fmt.Sprintf("[::1]:%d", port6))
	guest.listen(t, fmt.Sprintf("127.0.0.53:%d", freePort(t)))
	guest.listen(t, fmt.Sprintf("[::]:%d", freePort(t)))
	go greet(four, "four")
	go greet(six, "six")
	host.waitWord(t, port4, "four")
	host.waitWord(t, port6, "six")
	want := []int{port4, port6}
	slices.Sort(want)
	if got := guest.forwarded(t); !slices.Equal(got, want) {
		t.Errorf("forwarded are %d, want %d", got, want)
	}
	four.Close()
	six.Close()
	waitFor(t, 5*time.Second, "nothing forwarded", func() bool { return len(guest.forwarded(t)) == 0 })
}

// ---- connections ---------------------------------------------------------------------------------------------------

func TestPortsHalfClose(t *testing.T) {
	t.Parallel()
	_, guest, host := startGuest(t)
	t.Run("client first", func(t *testing.T) {
		client, server, _ := pairThrough(t, guest, host)
		testHalfClose(t, client, server)
	})
	t.Run("server first", func(t *testing.T) {
		client, server, _ := pairThrough(t, guest, host)
		testHalfClose(t, server, client)
	})
}

// testHalfClose has one side say all that it has, and the other answer only after the end of it.
func testHalfClose(t *testing.T, first, second *net.TCPConn) {
	question, answer := make([]byte, 3<<20), make([]byte, 5<<20)
	rand.Read(question)
	rand.Read(answer)
	say := func(conn *net.TCPConn, what []byte) {
		if _, err := conn.Write(what); err != nil {
			t.Error(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Error(err)
		}
	}
	go say(first, question)
	if got, err := io.ReadAll(second); err != nil || !bytes.Equal(got, question) {
		t.Errorf("the question: %d bytes, %v", len(got), err)
	}
	go say(second, answer)
	if got, err := io.ReadAll(first); err != nil || !bytes.Equal(got, answer) {
		t.Errorf("the answer: %d bytes, %v", len(got), err)
	}
}

func TestPortsReset(t *testing.T) {
	t.Parallel()
	d, guest, host := startGuest(t)
	t.Run("by the server", func(t *testing.T) {
		client, server, _ := pairThrough(t, guest, host)
		reset(server)
		_, err := io.Copy(io.Discard, client)
		wantReset(t, "the client", err)
	})
	t.Run("by the client", func(t *testing.T) {
		client, server, _ := pairThrough(t, guest, host)
		reset(client)
		_, err := io.Copy(io.Discard, server)
		wantReset(t, "the server", err)
	})
	t.Run("answer to a client that still sends", func(t *testing.T) {
		client, server, _ := pairThrough(t, guest, host)
		endless := make(chan error)
		go func() {
			var err error
			for piece := make([]byte, 64<<10); err == nil; {
				_, err = client.Write(piece)
			}
			endless <- err
		}()
		io.CopyN(io.Discard, server, 1<<20)
		io.WriteString(server, "too much")
		server.Close() // with more to read: the kernel sends a reset
		answer := make([]byte, 8)
		if _, err := io.ReadFull(client, answer); err != nil || string(answer) != "too much" {
			t.Errorf("the answer is %q, %v", answer, err)
		}
		if err := <-endless; !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
			t.Errorf("sending on: %v", err)
		}
	})
	t.Run("listener gone, not seen yet", func(t *testing.T) {
		port := freePort(t)
		l := guest.listen(t, fmt.Sprintf("127.0.0.1:%d", port))
		waitFor(t, 5*time.Second, "the port forwarded", func() bool { return slices.Contains(guest.forwarded(t), port) })
		l.Close()
		conn, err := host.dial(t.Context(), "tcp", fmt.Sprintf("%s:%d", guestAddress, port))
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
			conn.Close()
		}
		if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%v, want a reset", err)
		}
	})
	t.Run("listener gone, connection there", func(t *testing.T) {
		port := freePort(t)
		l := guest.listen(t, fmt.Sprintf("127.0.0.1:%d", port))
		waitFor(t, 5*time.Second, "the port forwarded", func() bool { return slices.Contains(guest.forwarded(t), port) })
		client := host.connect(t, port)
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		l.Close()
		_, err = io.Copy(io.Discard, client)
		wantReset(t, "the client", err)
		_, err = io.Copy(io.Discard, server)
		wantReset(t, "the server", err)
	})
	t.Run("daemon gone", func(t *testing.T) {
		client, server, _ := pairThrough(t, guest, host)
		if err := d.stop(t); err != nil {
			t.Error(err)
		}
		_, err := io.Copy(io.Discard, client)
		wantReset(t, "the client", err)
		_, err = io.Copy(io.Discard, server)
		wantReset(t, "the server", err)
	})
}

// What is forwarded does not pass through the daemon's memory.
func TestPortsSplice(t *testing.T) {
	t.Parallel()
	d, guest, host := startGuest(t)
	client, server, _ := pairThrough(t, guest, host)
	readByDaemon := func() (n int64) {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", d.pid))
		if err != nil {
			t.Skipf("needs the count of bytes read: %v", err)
		}
		fmt.Sscanf(string(text), "rchar: %d", &n)
		return n
	}
	before := readByDaemon()
	const much = 256 << 20
	for _, way := range [][2]*net.TCPConn{{client, server}, {server, client}} {
		go func() {
			piece := make([]byte, 1<<20)
			for range much / len(piece) {
				if _, err := way[0].Write(piece); err != nil {
					t.Error(err)
				}
			}
			way[0].CloseWrite()
		}()
		if n, err := io.Copy(io.Discard, way[1]); n != much || err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
	}
	if read := readByDaemon() - before; read > 1<<20 {
		t.Errorf("the daemon itself read %d bytes of %d", read, 2*much)
	}
}

// ---- bounds --------------------------------------------------------------------------------------------------------

func TestPortsManyConnections(t *testing.T) {
	t.Parallel()
	d, guest, host := startGuest(t)
	port := freePort(t)
	go greet(guest.listen(t, fmt.Sprintf("127.0.0.1:%d", port)), "hello")
	host.waitWord(t, port, "hello")
	d.healthy(t)
	fds, sockets := len(d.fds()), d.sockets()
	var conns []net.Conn
	for range maxForwarded {
		conn := host.connect(t, port)
		word := make([]byte, 5)
		if _, err := io.ReadFull(conn, word); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	for range 8 {
		conn, err := host.dial(t.Context(), "tcp", fmt.Sprintf("%s:%d", guestAddress, port))
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
			conn.Close()
		}
		wantReset(t, "a connection too many", err)
	}
	t.Logf("%d connections: descriptors %d -> %d, RSS %d KiB", maxForwarded, fds, len(d.fds()), d.rss()>>10)
	d.healthy(t)
	for _, conn := range conns {
		conn.Close()
	}
	waitFor(t, 5*time.Second, "sockets as before", func() bool { return d.sockets() <= sockets })
	host.waitWord(t, port, "hello")
}

// sockets counts the daemon's. Pipes for splice(2) go later: the runtime keeps them until it collects garbage.
func (d *daemon) sockets() (n int) {
	for _, fd := range d.fds() {
		if strings.Contains(fd, "socket:") {
			n++
		}
	}
	return n
}

func TestPortsManyListeners(t *testing.T) {
	t.Parallel()
	d, guest, host := startGuest(t)
	d.healthy(t)
	sockets, before := d.sockets(), d.rss()
	var listeners []int // descriptors
	closeAll := func() {
		for _, fd := range listeners {
			unix.Close(fd)
		}
		listeners = nil
	}
	defer closeAll()
	guest.do(func() {
		for port := 20001; len(listeners) < 10000; port++ {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Errorf("needs 10,000 descriptors: %v", err)
				return
			}
			listeners = append(listeners, fd)
			err = errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: port}), unix.Listen(fd, 1))
			if err != nil && port != d.port {
				t.Error(err)
			}
		}
	})
	waitFor(t, 5*time.Second, "as many forwarders as may be", func() bool { return len(guest.forwarded(t)) == maxForwarders })
	cpu := d.cpuTime(t)
	d.run(t, argv("sleep", "2")) // scans at full speed
	spent := d.cpuTime(t) - cpu
	d.healthy(t)
	t.Logf("10,000 listeners: %v CPU in 2 s of fast scans, RSS %d -> %d KiB", spent, before>>10, d.rss()>>10)
	if grown := d.rss() - before; grown > 12<<20 && !raceEnabled() { // 512 forwarders take 6 MiB; tables kept of 20 scans would take more
		t.Errorf("RSS grew by %d KiB", grown>>10)
	}
	if got := len(guest.forwarded(t)); got != maxForwarders {
		t.Errorf("%d forwarders, want %d", got, maxForwarders)
	}
	if strings.Count(d.log(), "too many ports") != 1 {
		t.Error("the log does not tell once that ports were left out")
	}
	closeAll()
	waitFor(t, 5*time.Second, "no forwarder left", func() bool { return len(guest.forwarded(t)) == 0 })
	waitFor(t, 5*time.Second, "sockets as before", func() bool { return d.sockets() <= sockets })
	port := freePort(t)
	go greet(guest.listen(t, fmt.Sprintf("127.0.0.1:%d", port)), "hello")
	host.waitWord(t, port, "hello")
}

// One user's listeners, however many, leave room for those of others; what is forwarded stays.
func TestPortsOfOneUser(t *testing.T) {
	t.Parallel()
	needRoot(t)
	for name, steps := range map[string][]string{"sock_diag": nil, "proc": argv("no-netlink", strconv.Itoa(unix.NETLINK_SOCK_DIAG))} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			guest, _ := newGuest(t)
			d := startDaemonWith(t, daemonConfig{netns: guest, steps: steps})
			const mallory, alice = 61000, 61001
			listenAs := func(uid int, ports ...int) {
				guest.do(func() {
					unix.Setfsuid(uid) // the thread ends with this function
					for _, port := range ports {
						fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
						if err != nil {
							t.Error(err)
							return
						}
						t.Cleanup(func() { unix.Close(fd) })
						if err = errors.Join(unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: port}), unix.Listen(fd, 1)); err != nil {
							t.Error(err)
						}
					}
				})
			}
			steady := 40001
			listenAs(mallory, steady)
			waitFor(t, 5*time.Second, "mallory's first port", func() bool { return slices.Contains(guest.forwarded(t), steady) })
			var more []int
			for port := steady + 1; port < steady+700; port++ {
				more = append(more, port)
			}
			listenAs(mallory, more...)
			waitFor(t, 5*time.Second, "mallory's share", func() bool { return len(guest.forwarded(t)) == maxOfOneUser })
			listenAs(alice, 41001)
			listenAs(0, 41002)
			waitFor(t, 5*time.Second, "the ports of others", func() bool {
				got := guest.forwarded(t)
				return slices.Contains(got, 41001) && slices.Contains(got, 41002)
			})
			if got := guest.forwarded(t); len(got) != maxOfOneUser+2 || !slices.Contains(got, steady) {
				t.Errorf("%d ports are forwarded, the first one among them: %t", len(got), slices.Contains(got, steady))
			}
			d.healthy(t)
		})
	}
}

// cpuTime is what the daemon has used so far.
func (d *daemon) cpuTime(t testing.TB) time.Duration {
	t.Helper()
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", d.pid))
	var total time.Duration
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil {
			total += time.Duration(atoi(t, strings.Fields(string(text))[0]))
		}
	}
	if total == 0 {
		t.Skip("needs schedstat: the kernel does not count")
	}
	return total
}

func TestPortsFlapping(t *testing.T) {
	t.Parallel()
	d, guest, host := startGuest(t)
	steady := freePort(t)
	go greet(guest.listen(t, fmt.Sprintf("127.0.0.1:%d", steady)), "steady")
	host.waitWord(t, steady, "steady")
	conn := host.connect(t, steady)
	if _, err := io.ReadFull(conn, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	d.healthy(t)
	sockets, cpu := d.sockets(), d.cpuTime(t)
	d.run(t, argv("true")) // scans at full speed
	port, flaps := freePort(t), 0
	for began := time.Now(); time.Since(began) < 5*time.Second; {
		var l net.Listener
		var err error
		guest.do(func() { l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)) })
		time.Sleep(50 * time.Millisecond)
		if err == nil { // else another test's child, not exec'ed yet, still has the last one
			l.Close()
			flaps++
		}
		time.Sleep(50 * time.Millisecond)
	}
	spent := d.cpuTime(t) - cpu
	t.Logf("%d times, %v CPU in 5 s", flaps, spent)
	if spent > 500*time.Millisecond && !raceEnabled() {
		t.Errorf("%v CPU in 5 s", spent)
	}
	d.healthy(t)
	waitFor(t, 5*time.Second, "sockets as before", func() bool { return d.sockets() <= sockets })
	conn.CloseWrite()
	if rest, err := io.ReadAll(conn); len(rest) != 0 || err != nil {
		t.Errorf("the connection of another port: %q, %v", rest, err)
	}
}

// ---- before a snapshot and after it --------------------------------------------------------------------------------

func TestPortsQuiesce(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	n.do(func() {
		if out, err := exec.Command(helperBinary(t), "quiesce-ports").CombinedOutput(); err != nil || string(out) != "done\n" {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

// quiescePorts has a network namespace for itself.
func quiescePorts([]string) {
	check := func(ok bool, what string) {
		if !ok {
			fmt.Println("not so:", what)
			os.Exit(1)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:20000")
	check(err == nil, "listening")
	go greet(l, "hello")
	self := &daemon{pid: os.Getpid()}
	p := newPorts(netip.MustParseAddr("127.0.0.2"), 0)
	before, goroutines := self.sockets(), runtime.NumGoroutine()
	connect := func() (net.Conn, error) {
		conn, err := net.Dial("tcp", "127.0.0.2:20000")
		if err == nil {
			_, err = io.ReadFull(conn, make([]byte, 5))
		}
		return conn, err
	}
	for range 100 {
		p.tick(time.Now())
		var conns []net.Conn
		for range 5 {
			conn, err := connect()
			check(err == nil, "reached")
			conns = append(conns, conn)
		}
		p.started() // and the fast scans are under way
		p.quiesce(time.Now().Add(time.Second))
		check(len(p.forwarders) == 0 && p.conns.Load() == 0, "nothing is left after quiesce")
		for _, conn := range conns {
			_, err := conn.Read(make([]byte, 1))
			check(errors.Is(err, syscall.ECONNRESET), "the connection is reset")
			conn.Close()
		}
		p.tick(time.Now())
		p.started()
		_, err := connect()
		check(errors.Is(err, syscall.ECONNREFUSED), "nothing is reached after quiesce")
		p.quiesce(time.Time{}) // a second time
		p.resume()
		conn, err := connect()
		check(err == nil, "reached at once after resume")
		conn.Close()
		p.resume() // a second time
	}
	l.Close()
	p.started()
	deadline := time.Now().Add(5 * time.Second)
	for (self.sockets() >= before || runtime.NumGoroutine() >= goroutines) && time.Now().Before(deadline) { // l is closed, too
		time.Sleep(10 * time.Millisecond)
	}
	check(self.sockets() < before, "sockets as before")
	check(runtime.NumGoroutine() < goroutines, "goroutines as before")
	fmt.Println("done")
}
