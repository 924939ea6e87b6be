// Who is served first: what connections and requests cost, who goes when there is no room, and the small measure of strangers.
//
// Every connection and every request is paid for from the budget (budget.go) before it is served. With a token set, who has not
// shown it is a stranger; without one, a connection counts as a stranger's while it waits for its client. In its first second, in
// which its request is on the way, a connection counts among those of clients: many may come at once. All strangers together
// have the sixteenths of the budget that are their class.
//
// With a token set, who has shown nothing takes no room from who has: a newcomer that finds none free is a stranger at once. All
// newcomers together have half of what there is for clients at most: beyond it one goes when another comes.
//
// Others who find no room take that of the peer whose connections cost most, in the same class: of these goes the one that serves
// nothing, then the one that waits for the rest of a body, the longest waiting first, then the dearest. Where the newcomer's own
// peer holds most, nothing that is being served goes, but the newcomer is refused. What strangers may do beside /health, which is
// to set the daemon up and to prepare a snapshot, is for a few at a time (measure).
//
// To close a connection is the only remedy: a handler whose client grants HTTP/2 no window, or reads nothing, hears nothing else.

package main

import (
	"cmp"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Prices, in bytes: what they cost in net/http (goroutines, buffers, the parsed header), measured and rounded up.
const (
	connectionPrice = 24 << 10
	requestPrice    = 24 << 10
)

const (
	strangerConnections = 256      // at once, with a token set
	strangerRequests    = 64       // the same, to /init and /snapshot/prepare
	largeInits          = 8        // bodies of /init above initBodySmall, strangers' or not
	metadataLookups     = 8        // of strangers' requests to /init
	peerShare           = 4        // one peer address has at most one part in so many of each
	strangerUnsent      = 64 << 10 // bytes of answers on one connection
	measurePatience     = 10 * time.Second
	strangerRefusals    = 8   // answers on one stranger's connection that refuse a request, before it is closed
	peerRefusals        = 64  // of a peer of strangers at once: they are paid by nobody; beyond it a request gets none
	clientRefusals      = 256 // of another peer
	allRefusals         = 1024
	freshTime           = time.Second
)

// connections are all that are open.
type connections struct {
	budget *budget
	token  *accessToken

	mu     sync.Mutex // protects what follows, every peer and every connection; nothing is done under it that takes time
	open   map[*connection]bool
	peers  map[netip.Addr]*peer
	number [standings]int // of connections
	unpaid int            // requests that are not paid for
}

// peer is an address from which there are connections, or requests that have not ended.
type peer struct {
	held   [budgetClasses]int64 // bytes of the budget; also of requests whose connection is closed, until they end
	unpaid int                  // requests
	open   [standings]map[*connection]bool
}

// standing is what a connection counts as.
type standing int

const (
	newcomer standing = iota // in its first second: its request is on the way
	client                   // with a token set, who has shown it; without one, who is being served
	stranger                 // every other
	standings
)

// class is that of the budget which pays for a connection.
func (s standing) class() budgetClass {
	if s == stranger {
		return forStrangers
	}
	return forRequests
}

// connection is one of a client. Nothing is read from it while a write to it hangs: the answers to what was read, those of HTTP/2
// itself (PING, SETTINGS) among them, would be held without end.
type connection struct {
	*net.TCPConn
	writes  sync.Mutex   // holds whoever writes
	limited atomic.Bool  // it has a write deadline
	yields  atomic.Bool  // it is a stranger's, with a token set: others go first
	alive   atomic.Int64 // when its client was last heard of, in nanoseconds of the Unix time

	// Under the mutex of connections:
	peer     netip.Addr // of IPv6 the network, 64 bits: who has one address there has them all
	memory   *grant
	standing standing
	held     int64 // bytes that it and its requests have, for who holds most of one peer
	shown    bool  // a request has shown the token
	requests int   // being served
	bodies   int   // of them that are not complete
	refused  int   // of them that are not paid for
	carried  int   // of them that begin or end the preparation of a snapshot
	opened   time.Time
	idle     time.Time // since when; zero: it is not
}

func (c *connection) Read(p []byte) (int, error) {
	c.writes.Lock()
	//lint:ignore SA2001 all that is wanted is to wait for a write that hangs
	c.writes.Unlock()
	n, err := c.TCPConn.Read(p)
	c.yield()
	return n, err
}

// yield lets others go first: who sends requests without waiting for their answers would be served for 10 ms on end, which for
// a hundred of them is long.
func (c *connection) yield() {
	if c.yields.Load() {
		runtime.Gosched()
	}
}

// setUnsent bounds what the kernel holds that has not been sent.
func (c *connection) setUnsent(bytes int) {
	raw, err := c.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, bytes) })
	}
}

func (c *connection) Write(p []byte) (int, error) {
	c.writes.Lock()
	defer c.writes.Unlock()
	n, err := c.TCPConn.Write(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		c.SetLinger(0)
	}
	return n, err
}

// abort closes a connection; the kernel is not to keep what its client does not take.
func (c *connection) abort() {
	c.SetLinger(0)
	c.Close()
}

func (c *connection) heard() { c.alive.Store(time.Now().UnixNano()) }

type connKey struct{}

func connOf(r *http.Request) *connection {
	conn, _ := r.Context().Value(connKey{}).(*connection)
	return conn
}

// peerOf is whom a connection is counted for.
func peerOf(remote net.Addr) netip.Addr {
	tcp, _ := remote.(*net.TCPAddr)
	if tcp == nil {
		return netip.Addr{}
	}
	addr := tcp.AddrPort().Addr().Unmap().WithZone("")
	if addr.Is6() {
		network, _ := addr.Prefix(64)
		addr = network.Addr()
	}
	return addr
}

// ---- connections ---------------------------------------------------------------------------------------------------

// accept takes a connection in, or closes it.
func (cs *connections) accept(ctx context.Context, conn net.Conn) context.Context {
	c := conn.(*connection)
	c.peer, c.memory, c.opened = peerOf(c.RemoteAddr()), cs.budget.grant(forRequests), time.Now()
	c.heard()
	cs.mu.Lock()
	defer cs.mu.Unlock()
	cs.open[c] = true
	cs.standLocked(c, newcomer)
	if cs.token.isSet() {
		c.yields.Store(true)
		c.setUnsent(strangerUnsent)
		cs.closeNewcomerLocked(c)
	}
	switch err := cs.takeLocked(c, forRequests, c.memory, connectionPrice); {
	case err == nil:
	case cs.token.isSet():
		cs.estrangeLocked(c)
	case err == errNoRoom:
		cs.closeLocked(c)
	}
	return context.WithValue(ctx, connKey{}, c)
}

// changed follows the states that net/http has a connection in.
func (cs *connections) changed(conn net.Conn, state http.ConnState) {
	c := conn.(*connection)
	c.heard()
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.idle = time.Time{}
	switch state {
	case http.StateIdle:
		c.idle = time.Now()
		if c.limited.Swap(false) {
			c.SetWriteDeadline(time.Time{})
		}
		cs.estrangeLocked(c)
	case http.StateClosed, http.StateHijacked:
		cs.forgetLocked(c)
	}
}

// estrangeLocked counts a connection among strangers that has shown nothing.
func (cs *connections) estrangeLocked(c *connection) {
	if !cs.open[c] || c.shown || c.standing == stranger {
		return
	}
	cs.payBackLocked(c)
	cs.standLocked(c, stranger)
	c.memory.become(forStrangers) // holds nothing
	if cs.token.isSet() && !c.yields.Swap(true) {
		c.setUnsent(strangerUnsent)
	}
	cs.enterLocked(c)
}

// tick has connections that have shown nothing in their first second go among strangers. It is called about once a second.
func (cs *connections) tick(now time.Time) {
	cs.each(func(c *connection) {
		if c.rank() == unused && now.Sub(c.opened) > freshTime {
			cs.estrangeLocked(c)
		}
	})
}

// enterLocked gives a connection its place among strangers, or closes it.
func (cs *connections) enterLocked(c *connection) {
	if cs.crowdedLocked(c) || cs.takeLocked(c, forStrangers, c.memory, connectionPrice) == errNoRoom {
		cs.closeLocked(c)
	}
}

func (cs *connections) each(do func(*connection)) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for c := range cs.open {
		do(c)
	}
}

// closeWaiting closes what waits for a client.
func (cs *connections) closeWaiting() {
	cs.each(func(c *connection) {
		if c.rank() != serving {
			c.Close()
		}
	})
}

func (cs *connections) forgetLocked(c *connection) {
	cs.payBackLocked(c)
	c.memory.close()
	if cs.open[c] {
		cs.leaveLocked(c)
		delete(cs.open, c)
		cs.tidyLocked(c.peer)
	}
}

// standLocked counts an open connection as what it is from now on.
func (cs *connections) standLocked(c *connection, as standing) {
	cs.leaveLocked(c)
	p := cs.peerLocked(c.peer)
	if p.open[as] == nil {
		p.open[as] = map[*connection]bool{}
	}
	p.open[as][c] = true
	c.standing = as
	cs.number[as]++
}

func (cs *connections) leaveLocked(c *connection) {
	open := cs.peerLocked(c.peer).open[c.standing]
	if open[c] {
		cs.number[c.standing]--
		delete(open, c)
	}
}

// payBackLocked gives back what a connection has, without its requests.
func (cs *connections) payBackLocked(c *connection) {
	has := c.memory.holds()
	c.memory.give(has)
	c.held -= has
	cs.countLocked(c.peer, c.standing.class(), -has)
}

func (cs *connections) peerLocked(addr netip.Addr) *peer {
	p := cs.peers[addr]
	if p == nil {
		p = &peer{}
		cs.peers[addr] = p
	}
	return p
}

// tidyLocked forgets a peer of which nothing is left.
func (cs *connections) tidyLocked(addr netip.Addr) {
	p := cs.peers[addr]
	for _, open := range p.open {
		if len(open) > 0 {
			return
		}
	}
	if p.held == [budgetClasses]int64{} && p.unpaid == 0 {
		delete(cs.peers, addr)
	}
}

func (cs *connections) countLocked(addr netip.Addr, class budgetClass, bytes int64) {
	cs.peerLocked(addr).held[class] += bytes
	cs.tidyLocked(addr)
}

func (cs *connections) closeLocked(c *connection) {
	cs.forgetLocked(c) // its requests give back what is theirs when they have ended
	if c.rank() == serving {
		c.abort()
	}
	c.Close()
}

// What a connection is doing, the least worth keeping first.
const (
	unused = iota
	incomplete
	arriving // its request is on the way
	serving
)

func (c *connection) rank() int {
	switch {
	case c.requests == 0 && c.idle.IsZero() && time.Since(c.opened) < freshTime:
		return arriving
	case c.requests == 0:
		return unused
	case c.requests == c.bodies:
		return incomplete
	}
	return serving
}

// These say why takeLocked takes nothing.
var (
	errNoRoom   = errors.New("envd has no memory left for another request from this address (--memory-limit)")
	errRoomSoon = errors.New("what the peer that holds most had is about to be given back")
)

// takeLocked takes what c, or a request on it, needs in a class, from others if need be.
func (cs *connections) takeLocked(c *connection, class budgetClass, memory *grant, bytes int64) error {
	own := cs.peerLocked(c.peer)
	for {
		from := own
		if cs.strangersShareLocked(own, class, bytes) {
			if memory.tryTake(bytes) == nil {
				c.held += bytes
				cs.countLocked(c.peer, class, bytes)
				return nil
			}
			if c.standing == newcomer && cs.token.isSet() {
				return errNoRoom
			}
			from = cs.mostLocked(own, func(p *peer) int64 { return p.held[class] })
		}
		goes := from.leastWorth(c, class)
		switch {
		case goes != nil:
			cs.closeLocked(goes)
		case from == own:
			return errNoRoom
		default:
			return errRoomSoon
		}
	}
}

// closeNewcomerLocked closes, when newcomers have more than half of what there is for clients, the one that came first from the
// address from which most others than c came.
func (cs *connections) closeNewcomerLocked(c *connection) {
	share := cs.budget.size / 16 * classShares[forRequests]
	if int64(cs.number[newcomer])*connectionPrice <= share/2 {
		return
	}
	own := cs.peerLocked(c.peer)
	most := cs.mostLocked(own, func(p *peer) int64 {
		if p == own {
			return int64(len(p.open[newcomer])) - 1
		}
		return int64(len(p.open[newcomer]))
	})
	var goes *connection
	for other := range most.open[newcomer] {
		if other != c && (goes == nil || other.opened.Before(goes.opened)) {
			goes = other
		}
	}
	if goes != nil {
		cs.closeLocked(goes)
	}
}

// strangersShareLocked tells whether a peer may have so many bytes more: of strangers one address may have a part.
func (cs *connections) strangersShareLocked(p *peer, class budgetClass, bytes int64) bool {
	if class != forStrangers || cs.budget == nil || !cs.token.isSet() {
		return true
	}
	share := cs.budget.size / 16 * classShares[forStrangers]
	return p.held[forStrangers]+bytes <= share/peerShare
}

// mostLocked is the peer that has the most by a measure, at a draw that which asks.
func (cs *connections) mostLocked(asks *peer, measure func(*peer) int64) *peer {
	most, has := asks, measure(asks)
	for _, p := range cs.peers {
		if n := measure(p); n > has {
			most, has = p, n
		}
	}
	return most
}

// leastWorth is the connection of a peer, in a class, that is to go for another one, or nil: none that serves goes for one of its
// own peer's.
func (p *peer) leastWorth(c *connection, class budgetClass) (goes *connection) {
	for as, open := range p.open {
		if standing(as).class() != class {
			continue
		}
		for other := range open {
			switch {
			case other == c, other.peer == c.peer && other.rank() == serving:
			case goes == nil || compareWorth(other, goes) < 0:
				goes = other
			}
		}
	}
	return goes
}

// compareWorth orders connections of one peer, that which goes first before the others.
func compareWorth(a, b *connection) int {
	byPrice := cmp.Compare(b.held, a.held)
	if a.rank() != serving {
		byPrice = 0
	}
	return cmp.Or(cmp.Compare(a.rank(), b.rank()), byPrice, cmp.Compare(a.alive.Load(), b.alive.Load()))
}

// crowdedLocked keeps strangers to their number; true: c has no place among them.
func (cs *connections) crowdedLocked(c *connection) bool {
	if !cs.token.isSet() {
		return false
	}
	own, number := cs.peerLocked(c.peer), func(p *peer) int64 { return int64(len(p.open[stranger])) }
	for {
		from := own
		switch {
		case number(own) > strangerConnections/peerShare:
		case cs.number[stranger] > strangerConnections:
			from = cs.mostLocked(own, number)
		default:
			return false
		}
		goes := from.leastWorth(c, forStrangers)
		if goes == nil {
			return true
		}
		cs.closeLocked(goes)
	}
}

// ---- requests ------------------------------------------------------------------------------------------------------

// admission is that of one request.
type admission struct {
	memory   *grant
	class    budgetClass // of the price; 0 is forStrangers
	stranger bool
	refusal  error // or nil
	unpaid   bool  // it is counted among those that are refused
	abort    bool  // not even the refusal can be sent
}

// begin pays for a request, which end follows in any case. It waits a moment for what others are about to give back.
func (cs *connections) begin(ctx context.Context, c *connection, shown, trusted bool) (a admission) {
	c.heard()
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.requests++
	c.shown = c.shown || shown
	if a.stranger = !trusted && !c.shown; !a.stranger {
		a.class = forRequests
		cs.trustLocked(c)
	} else {
		cs.estrangeLocked(c)
	}
	a.memory = cs.budget.grant(a.class)
	if !cs.open[c] { // it was closed, and nobody would get an answer
		a.refusal, a.abort = net.ErrClosed, true
		return a
	}
	if a.refusal = cs.takeLocked(c, a.class, a.memory, requestPrice); a.refusal == nil {
		return a
	}
	a.unpaid = true
	most := clientRefusals
	if a.stranger {
		most = peerRefusals
	}
	cs.unpaidLocked(c, 1)
	switch {
	case cs.peerLocked(c.peer).unpaid > most, cs.unpaid > allRefusals: // nor may many wait who have paid nothing
		a.abort = true
	case a.stranger && c.refused > strangerRefusals:
		cs.closeLocked(c)
	case a.refusal == errRoomSoon:
		cs.mu.Unlock()
		a.refusal = a.memory.take(ctx, requestPrice)
		cs.mu.Lock()
		if a.refusal == nil {
			a.unpaid = false
			cs.unpaidLocked(c, -1)
			c.held += requestPrice
			cs.countLocked(c.peer, a.class, requestPrice)
		}
	}
	return a
}

// unpaidLocked counts a request more, or less, of a connection that is not paid for.
func (cs *connections) unpaidLocked(c *connection, one int) {
	cs.unpaid += one
	c.refused += one
	cs.peerLocked(c.peer).unpaid += one
	cs.tidyLocked(c.peer)
}

// trustLocked counts a connection among those of clients, if there is room.
func (cs *connections) trustLocked(c *connection) {
	if !cs.open[c] || c.standing == client {
		return
	}
	if c.standing == stranger && !c.memory.become(forRequests) {
		return // it is a stranger's still
	}
	has := c.memory.holds()
	cs.countLocked(c.peer, c.standing.class(), -has)
	cs.standLocked(c, client)
	cs.countLocked(c.peer, forRequests, has)
	if c.yields.Swap(false) {
		c.setUnsent(-1) // no bound
	}
}

// vouch says that a request has shown the token in its body.
func (cs *connections) vouch(c *connection, memory *grant) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.shown = true
	cs.trustLocked(c)
	memory.become(forRequests)
}

func (cs *connections) hasShown(c *connection) bool {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	return c.shown
}

func (cs *connections) end(c *connection, a admission) {
	a.memory.close()
	c.heard()
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.requests--
	switch {
	case a.unpaid:
		cs.unpaidLocked(c, -1)
	case a.refusal == nil:
		c.held -= requestPrice
		cs.countLocked(c.peer, a.class, -requestPrice)
	}
}

// carries counts requests that begin or end the preparation of a snapshot: their connection outlives it.
func (cs *connections) carries(c *connection, one int) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.carried += one
}

// countedBody is a request's body: it tells whether its connection waits for the rest of it.
type countedBody struct {
	io.ReadCloser
	conns    *connections
	conn     *connection
	complete bool
}

func (cs *connections) countBody(c *connection, body io.ReadCloser) *countedBody {
	b := &countedBody{ReadCloser: body, conns: cs, conn: c}
	cs.mu.Lock()
	defer cs.mu.Unlock()
	c.bodies++
	return b
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if b.conn.heard(); err != nil {
		b.end()
	}
	return n, err
}

// end is called when the body is complete, and after the request, which may not have read it.
func (b *countedBody) end() {
	b.conns.mu.Lock()
	defer b.conns.mu.Unlock()
	if !b.complete {
		b.complete = true
		b.conn.bodies--
	}
}

// ---- the measure of strangers --------------------------------------------------------------------------------------

// measure is how many strangers may be at something at once, of one peer at most a part of them. Who finds all places taken gets one of
// the peer that has most, which loses its connection, if that has two more than he would have; else he waits.
type measure struct {
	conns  *connections
	places int

	mu      sync.Mutex // protects what follows; taken before that of connections
	taken   []*measured
	waiting []*measured
}

type measured struct {
	conn  *connection
	ready chan struct{} // closed when it has got its place
}

func newMeasure(conns *connections, places int) *measure {
	return &measure{conns: conns, places: places}
}

// enter is for the request of a context: it waits for a place, and answers how it is left. The error is errNoPlace, or that of the
// context. Whose connection has shown the token needs no place.
func (m *measure) enter(ctx context.Context) (leave func(), err error) {
	conn, _ := ctx.Value(connKey{}).(*connection)
	if conn == nil || m.conns.hasShown(conn) {
		return func() {}, nil
	}
	place := &measured{conn, make(chan struct{})}
	leave = func() { m.leave(place) }
	if !m.queue(place) {
		return nil, errNoPlace
	}
	patience := time.NewTimer(measurePatience)
	defer patience.Stop()
	select {
	case <-place.ready:
		return leave, nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-patience.C:
		err = errNoPlace
	}
	leave()
	return nil, err
}

func count(list []*measured, peer netip.Addr) (n int) {
	for _, p := range list {
		if p.conn.peer == peer {
			n++
		}
	}
	return n
}

// queue is false where even too many wait.
func (m *measure) queue(place *measured) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.waiting = append(m.waiting, place)
	m.settleLocked()
	last := len(m.waiting) - 1
	if last < 0 || m.waiting[last] != place || last < strangerConnections && count(m.waiting, place.conn.peer) <= m.places {
		return true
	}
	m.waiting = m.waiting[:last]
	return false
}

// settleLocked gives places to those who wait, of the peer first that has fewest.
func (m *measure) settleLocked() {
	for len(m.waiting) > 0 {
		has := map[netip.Addr]int{}
		for _, p := range m.taken {
			has[p.conn.peer]++
		}
		next := slices.MinFunc(m.waiting, func(a, b *measured) int { return cmp.Compare(has[a.conn.peer], has[b.conn.peer]) })
		its := has[next.conn.peer]
		if its >= max(1, m.places/peerShare) || len(m.taken) >= m.places && !m.displaceLocked(has, its+2) {
			return
		}
		m.taken = append(m.taken, next)
		m.waiting = slices.DeleteFunc(m.waiting, func(p *measured) bool { return p == next })
		close(next.ready)
	}
}

// displaceLocked ends the oldest of the peer that has most, if that are so many.
func (m *measure) displaceLocked(has map[netip.Addr]int, many int) bool {
	most := slices.MaxFunc(m.taken, func(a, b *measured) int { return cmp.Compare(has[a.conn.peer], has[b.conn.peer]) })
	if has[most.conn.peer] < many {
		return false
	}
	m.conns.mu.Lock()
	m.conns.closeLocked(most.conn)
	m.conns.mu.Unlock()
	m.taken = slices.DeleteFunc(m.taken, func(p *measured) bool { return p.conn == most.conn })
	return true
}

func (m *measure) leave(place *measured) {
	m.mu.Lock()
	defer m.mu.Unlock()
	same := func(p *measured) bool { return p == place }
	m.taken, m.waiting = slices.DeleteFunc(m.taken, same), slices.DeleteFunc(m.waiting, same)
	m.settleLocked()
}

// ---- answers -------------------------------------------------------------------------------------------------------

const (
	answerPiece = 64 << 10 // bytes: what a client takes in the time that it has for progress
	answerStart = 4 << 10  // bytes that are kept back in HTTP/2, so that a small answer tells its length
)

// answer is the response to a request. But for streams and transfers, a client has to take some of it within a time. In HTTP/2 it
// has been sent when finish returns, so that it is paid for until then: net/http would send the end of it after the handler.
type answer struct {
	http.ResponseWriter
	conn     *connection
	http2    bool
	patience time.Duration // 0: the client may take as long as it likes
	quiet    bool          // what is written waits for the end of the response (request.keepFlush)

	status int    // kept back with what follows
	start  []byte // of an answer in HTTP/2, until it is flushed
	sent   bool

	mu    sync.Mutex // protects what follows
	timer *time.Timer
	ended bool
	cuts  int
}

func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

func (a *answer) keepsBack() bool { return a.http2 && a.patience > 0 && !a.sent }

func (a *answer) WriteHeader(status int) {
	if a.keepsBack() && status >= 200 {
		a.status = cmp.Or(a.status, status)
		return
	}
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(p []byte) (n int, err error) {
	if a.keepsBack() {
		if len(a.start)+len(p) <= answerStart {
			a.start = append(a.start, p...)
			return len(p), nil
		}
		err = a.sendStart()
	}
	for first := true; err == nil && (first || n < len(p)); first = false {
		var written int
		a.expectProgress()
		written, err = a.ResponseWriter.Write(p[n:min(n+answerPiece, len(p))])
		n += written
	}
	return n, err
}

// sendStart is for what was kept back.
func (a *answer) sendStart() (err error) {
	a.sent = true
	if a.status != 0 {
		a.ResponseWriter.WriteHeader(a.status)
	}
	if len(a.start) > 0 {
		a.expectProgress()
		_, err = a.ResponseWriter.Write(a.start)
	}
	return err
}

func (a *answer) Flush() {
	if a.quiet {
		return
	}
	if a.keepsBack() {
		a.sendStart()
	}
	a.expectProgress()
	http.NewResponseController(a.ResponseWriter).Flush()
}

// unlimited is for streams and transfers.
func (a *answer) unlimited() { a.patience = 0 }

// finish ends a complete answer.
func (a *answer) finish() {
	if !a.http2 {
		if a.patience > 0 && !a.conn.limited.Load() { // nothing was written but the header, which net/http is to send
			a.expectProgress()
		}
		return
	}
	if a.keepsBack() {
		if len(a.start) > 0 && a.Header().Get("Content-Length") == "" {
			a.Header().Set("Content-Length", strconv.Itoa(len(a.start)))
		}
		if a.sendStart(); len(a.start) == 0 {
			return // a header waits for no window
		}
	}
	a.expectProgress()
	http.NewResponseController(a.ResponseWriter).Flush()
	a.stop()
}

// stop ends the watch over an answer's progress, also of one whose handler has panicked.
func (a *answer) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ended = true; a.timer != nil {
		a.timer.Stop()
	}
}

// expectProgress gives the client time for what is sent next. In HTTP/1 the deadline is the connection's, until that is idle. In
// HTTP/2 it is the stream's and, a second later, where not even its end can be sent, the connection's.
func (a *answer) expectProgress() {
	switch {
	case a.patience == 0:
	case !a.http2:
		a.conn.limited.Store(true)
		a.conn.SetWriteDeadline(time.Now().Add(a.patience))
	default:
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.timer == nil {
			a.timer = time.AfterFunc(a.patience, a.cut)
		} else if a.cuts == 0 {
			a.timer.Reset(a.patience)
		}
	}
}

func (a *answer) cut() {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch a.cuts++; {
	case a.ended:
	case a.cuts == 1:
		http.NewResponseController(a.ResponseWriter).SetWriteDeadline(time.Unix(1, 0))
		a.timer.Reset(time.Second)
	default:
		a.conn.abort()
	}
}
