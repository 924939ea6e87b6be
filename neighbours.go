// Who is inside: which addresses are this machine's own, and which networks lie behind its own bridges and veths, where its
// containers are. rtnetlink(7); what was read last is kept where nothing can be read (no descriptors).

package main

import (
	"encoding/binary"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// neighbours knows the interfaces of the machine.
type neighbours struct {
	outward netip.Addr // the interface that has it leads to the host, whatever its kind: so does the one of the default route

	mu     sync.Mutex // protects what follows
	known  []network
	readAt time.Time
}

// network is an address of an interface, and what lies behind it.
type network struct {
	prefix netip.Prefix // with the address itself
	card   string       // name and index of the interface
	index  int32
	inner  bool // everybody in this network is inside
}

// After these they are read again: where somebody asks, and by the tick, for the time when nothing can be read.
const (
	neighboursAge     = time.Second
	neighboursRefresh = 10 * time.Second
)

// inside tells whether a peer is on this machine, or in a container of it. Where nothing is known everybody is.
func (n *neighbours) inside(peer netip.Addr) bool {
	zone := peer.Zone()
	peer = peer.Unmap().WithZone("")
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refreshLocked(neighboursAge)
	if n.known == nil || !peer.IsValid() || peer.IsLoopback() {
		return true
	}
	return slices.ContainsFunc(n.known, func(net network) bool {
		behind := net.inner && net.prefix.Contains(peer) && (zone == "" || zone == net.card || zone == strconv.Itoa(int(net.index)))
		return behind || net.prefix.Addr() == peer
	})
}

// refresh reads them again when they are older.
func (n *neighbours) refresh(age time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.refreshLocked(age)
}

func (n *neighbours) refreshLocked(age time.Duration) {
	if n.known != nil && time.Since(n.readAt) < age {
		return
	}
	n.readAt = time.Now()
	if known, err := readNetworks(n.outward); err == nil {
		n.known = known
	}
}

// readNetworks asks the kernel. The headers are struct ifinfomsg, rtmsg and ifaddrmsg.
func readNetworks(outward netip.Addr) (known []network, err error) {
	type link struct {
		name  string
		inner bool
	}
	known = []network{}
	links, uplinks := map[int32]link{}, map[int32]bool{}
	err = readRouting(unix.RTM_GETLINK, unix.SizeofIfInfomsg, func(header []byte, attributes map[uint16][]byte) {
		l := link{name: strings.TrimRight(string(attributes[unix.IFLA_IFNAME]), "\x00")}
		kind := strings.TrimRight(string(parseAttributes(attributes[unix.IFLA_LINKINFO])[unix.IFLA_INFO_KIND]), "\x00")
		l.inner = kind == "bridge" || kind == "veth"
		links[int32At(header, 4)] = l
	})
	if err != nil {
		return nil, err
	}
	err = readRouting(unix.RTM_GETROUTE, unix.SizeofRtMsg, func(header []byte, attributes map[uint16][]byte) {
		if out := attributes[unix.RTA_OIF]; header[1] == 0 && header[7] == unix.RTN_UNICAST && len(out) >= 4 { // to everywhere
			uplinks[int32At(out, 0)] = true
		}
	})
	if err != nil {
		return nil, err
	}
	err = readRouting(unix.RTM_GETADDR, unix.SizeofIfAddrmsg, func(header []byte, attributes map[uint16][]byte) {
		local := attributes[unix.IFA_LOCAL] // of a link from point to point the other one is the peer's
		if local == nil {
			local = attributes[unix.IFA_ADDRESS]
		}
		addr, ok := netip.AddrFromSlice(local)
		if !ok {
			return
		}
		index := int32At(header, 4)
		uplinks[index] = uplinks[index] || addr == outward
		known = append(known, network{prefix: netip.PrefixFrom(addr, int(header[1])), card: links[index].name, index: index})
	})
	for i, net := range known {
		known[i].inner = links[net.index].inner && !uplinks[net.index]
	}
	return known, err
}

// readRouting calls each for each entry of one of the kernel's tables.
func readRouting(table, headerSize int, each func(header []byte, attributes map[uint16][]byte)) error {
	answer, err := syscall.NetlinkRIB(table, unix.AF_UNSPEC)
	if err != nil {
		return err
	}
	messages, err := syscall.ParseNetlinkMessage(answer)
	for _, message := range messages {
		if len(message.Data) >= headerSize && message.Header.Type != unix.NLMSG_DONE {
			each(message.Data[:headerSize], parseAttributes(message.Data[headerSize:]))
		}
	}
	return err
}

// parseAttributes is by type; netlink(7), struct nlattr.
func parseAttributes(data []byte) map[uint16][]byte {
	attributes := map[uint16][]byte{}
	for len(data) >= unix.SizeofNlAttr {
		size, kind := int(binary.NativeEndian.Uint16(data)), binary.NativeEndian.Uint16(data[2:])
		if size < unix.SizeofNlAttr || size > len(data) {
			break
		}
		attributes[kind&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER)] = data[unix.SizeofNlAttr:size]
		data = data[min((size+3)&^3, len(data)):]
	}
	return attributes
}

func int32At(data []byte, offset int) int32 { return int32(binary.NativeEndian.Uint32(data[offset:])) }
