// Ports: what listens on the guest's loopback alone is reachable at the guest's own address too, on the same port.
//
// A scan asks the kernel for the listening TCP sockets: once a second by the shared tick, every 100 ms for 5 s after a process
// was started. A port that listens on exactly 127.0.0.1 or ::1 gets a forwarder, which goes, and its connections with it,
// when a scan no longer finds the port. No user but root gets more than a quarter of the forwarders that there may be. Bytes
// are spliced, they never enter the daemon; the end of one direction is passed on as such, and a reset as a reset. What cannot
// be bound, as where no interface has the address, is tried again within 10 s.
//
// Sources: sock_diag(7), linux/inet_diag.h (a kernel without has /proc/net/tcp read, once a second), splice(2).

package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	fastScan    = 100 * time.Millisecond
	fastScans   = 50
	maxBackOff  = 10 * time.Second // after a bind that failed; the first one is a second
	dialTimeout = 10 * time.Second
	resetGrace  = 200 * time.Millisecond // for what is left of one direction when the other has failed

	// A forwarder holds one descriptor, a connection six: two sockets and a pipe for each direction.
	maxForwarders = 512
	maxOfOneUser  = maxForwarders / 4 // of them; root may have all
	maxForwarded  = 512               // connections; fewer where they could take more than 3/8 of the daemon's descriptors

	// The kernel would let the loopback side have MiBs on their way, which leave the CPU's cache before they are read.
	socketBuffer = 128 << 10
)

var loopback4, loopback6 = netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()

type ports struct {
	address  netip.Addr // the guest's; the zero address turns all off
	own      uint16     // the daemon's own port
	maxConns int64

	conns    atomic.Int64
	running  sync.WaitGroup // accepting loops and connections
	fastLeft atomic.Int32   // scans
	fast     *time.Timer    // calls the next of them; stands still otherwise

	mu         sync.Mutex // protects what follows; held throughout a scan
	quiesced   bool
	diag       int // the netlink socket; -1 without
	buf        [8 << 10]byte
	full       bool // has been told
	forwarders map[uint16]*forwarder
}

// listening is what a scan finds out about a port.
type listening struct {
	four bool   // 127.0.0.1 listens; else ::1 does
	uid  uint32 // of the socket that connections go to
}

// forwarder has a port of the guest's address.
type forwarder struct {
	port     uint16
	six      atomic.Bool // ::1 listens, 127.0.0.1 does not
	backOff  time.Duration
	retry    time.Time
	listener *net.TCPListener // nil: not bound
	ctx      context.Context  // its connections'
	cancel   context.CancelFunc
}

func newPorts(address netip.Addr, own int) *ports {
	p := &ports{address: address, own: uint16(own), forwarders: map[uint16]*forwarder{}}
	p.diag, _ = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	var limit unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	p.maxConns = int64(min(maxForwarded, limit.Cur/16))
	p.fast = time.AfterFunc(time.Hour, func() {
		p.look(true)
		if p.fastLeft.Add(-1) > 0 {
			p.fast.Reset(fastScan)
		}
	})
	p.fast.Stop()
	return p
}

func (p *ports) tick(time.Time) { p.look(false) }

// started is told of each start of a process, which may soon listen.
func (p *ports) started() {
	if p.fastLeft.Swap(fastScans) <= 0 {
		p.fast.Reset(0)
	}
}

// quiesce returns when no forwarder and no connection is left.
func (p *ports) quiesce(time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.quiesced = true
	p.fastLeft.Store(0)
	p.fast.Stop()
	p.updateLocked(nil)
	p.running.Wait() // takes no time: all that they could wait for is closed
}

func (p *ports) resume() {
	p.mu.Lock()
	p.quiesced = false
	p.mu.Unlock()
	p.look(false)
}

func (p *ports) look(fast bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.quiesced || !p.address.IsValid() || fast && p.diag < 0 {
		return
	}
	found := map[uint16]listening{}
	add := func(address netip.Addr, port uint16, uid uint32) { // forwarders themselves listen on p.address
		loopback := address == loopback4 || address == loopback6
		if loopback && address != p.address && port != p.own && !found[port].four {
			found[port] = listening{address == loopback4, uid}
		}
	}
	if p.diag >= 0 {
		if err := p.dumpLocked(add); err != nil {
			slog.Info("no sock_diag; /proc/net serves instead", "logger", "port-forwarder", "error", err)
			unix.Close(p.diag)
			p.diag = -1 // for good: to ask again could make the kernel look for a module each time
		}
	}
	if p.diag < 0 {
		if err := errors.Join(readTable("/proc/net/tcp", "0100007F:", loopback4, add),
			readTable("/proc/net/tcp6", "00000000000000000000000001000000:", loopback6, add)); err != nil {
			slog.Debug("listening sockets are unknown", "logger", "port-forwarder", "error", err)
			return
		}
	}
	p.updateLocked(found)
}

// dumpLocked calls add for each listening socket. The oldest of the requests is the only one that asks for both families.
func (p *ports) dumpLocked(add func(netip.Addr, uint16, uint32)) error {
	const getSock = 18   // TCPDIAG_GETSOCK
	var request [76]byte // struct nlmsghdr, struct inet_diag_req
	binary.NativeEndian.PutUint32(request[0:], uint32(len(request)))
	binary.NativeEndian.PutUint16(request[4:], getSock)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	binary.NativeEndian.PutUint32(request[68:], 1<<unix.BPF_TCP_LISTEN) // idiag_states
	err := unix.Sendto(p.diag, request[:], 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	for err == nil {
		var n int
		var messages []syscall.NetlinkMessage
		err = retry(func() (err error) { n, err = unix.Read(p.diag, p.buf[:]); return err }) // never waits
		if err == nil {
			messages, err = syscall.ParseNetlinkMessage(p.buf[:n])
		}
		for _, m := range messages {
			switch {
			case m.Header.Type == unix.NLMSG_DONE || m.Header.Type == unix.NLMSG_ERROR:
				if errno := -int32(binary.NativeEndian.Uint32(m.Data)); errno != 0 {
					return os.NewSyscallError("sock_diag", syscall.Errno(errno))
				}
				return nil
			case len(m.Data) >= 72: // struct inet_diag_msg
				address := netip.AddrFrom16([16]byte(m.Data[8:]))
				if m.Data[0] == unix.AF_INET {
					address = netip.AddrFrom4([4]byte(m.Data[8:]))
				}
				add(address, binary.BigEndian.Uint16(m.Data[4:]), binary.NativeEndian.Uint32(m.Data[64:]))
			}
		}
	}
	return os.NewSyscallError("sock_diag", err)
}

// readTable does the same with a table of proc(5), which has addresses as little-endian words; state 0A is LISTEN.
func readTable(path, prefix string, address netip.Addr, add func(netip.Addr, uint16, uint32)) error {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) > 7 && f[3] == "0A" && strings.HasPrefix(f[1], prefix) {
			port, err := strconv.ParseUint(f[1][len(prefix):], 16, 16)
			uid, failure := strconv.ParseUint(f[7], 10, 32)
			if err == nil && failure == nil {
				add(address, uint16(port), uint32(uid))
			}
		}
	}
	return lines.Err()
}

// updateLocked has a forwarder for each port that listens, as far as there may be so many, and for no other.
func (p *ports) updateLocked(found map[uint16]listening) {
	ofUser := map[uint32]int{}
	for port, f := range p.forwarders {
		if l, listens := found[port]; listens {
			ofUser[l.uid]++
			continue
		}
		delete(p.forwarders, port)
		if f.listener != nil {
			f.cancel()
			f.listener.Close()
			slog.Debug("no longer forwarded", "logger", "port-forwarder", "port", port)
		}
	}
	for port, l := range found {
		f := p.forwarders[port]
		if f == nil && (len(p.forwarders) == maxForwarders || l.uid != 0 && ofUser[l.uid] >= maxOfOneUser) {
			if !p.full {
				p.full = true
				slog.Warn("too many ports listen; some are not forwarded", "logger", "port-forwarder", "bound", maxForwarders,
					"of_one_user", maxOfOneUser, "uid", l.uid)
			}
			continue
		} else if f == nil {
			f = &forwarder{port: port, backOff: time.Second}
			p.forwarders[port] = f
			ofUser[l.uid]++
		}
		f.six.Store(!l.four)
		if f.listener == nil && time.Now().After(f.retry) {
			p.openLocked(f)
		}
	}
}

func (p *ports) openLocked(f *forwarder) {
	listener, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(p.address, f.port)))
	if err == nil {
		slog.Debug("forwarded", "logger", "port-forwarder", "port", f.port)
		f.listener = listener
		f.ctx, f.cancel = context.WithCancel(context.Background())
		p.running.Go(func() { p.accept(f) })
	} else {
		slog.Debug("not forwarded", "logger", "port-forwarder", "port", f.port, "error", err)
		f.retry = time.Now().Add(f.backOff)
		f.backOff = min(2*f.backOff, maxBackOff)
	}
}

func (p *ports) accept(f *forwarder) {
	for f.ctx.Err() == nil {
		client, err := f.listener.AcceptTCP()
		if err != nil { // closed, or no descriptor is left
			select {
			case <-f.ctx.Done():
			case <-time.After(fastScan):
			}
		} else if p.conns.Add(1) > p.maxConns {
			p.conns.Add(-1)
			reset(client)
		} else {
			p.running.Go(func() {
				defer p.conns.Add(-1)
				p.forward(f, client)
			})
		}
	}
}

// forward returns when both directions have ended.
func (p *ports) forward(f *forwarder, client *net.TCPConn) {
	address := loopback4
	if f.six.Load() {
		address = loopback6
	}
	dialer := net.Dialer{Timeout: dialTimeout, KeepAlive: -1}
	server, err := dialer.DialTCP(f.ctx, "tcp", netip.AddrPort{}, netip.AddrPortFrom(address, f.port))
	if err != nil {
		reset(client)
		return
	}
	server.SetReadBuffer(socketBuffer)
	server.SetWriteBuffer(socketBuffer)
	cut := func() { reset(client); reset(server) }
	defer context.AfterFunc(f.ctx, cut)()
	up := make(chan error, 1)
	go func() { up <- relay(server, client) }()
	if errors.Join(relay(client, server), <-up) != nil {
		cut()
	}
	client.Close()
	server.Close()
}

// relay moves one direction. When it fails the other may still bring what its sender had sent before, but not for long.
func relay(to, from *net.TCPConn) error {
	_, err := io.Copy(to, from) // splice(2)
	if err == nil {
		err = to.CloseWrite()
	}
	if err != nil {
		soon := time.Now().Add(resetGrace)
		to.SetDeadline(soon)
		from.SetDeadline(soon)
	}
	return err
}

// reset closes a connection so that its peer cannot take this for a proper end.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}
