// The output log of a process: what it wrote, in arrival order, under absolute byte offsets.
//
// Rules. With a subscriber attached nothing is dropped: nobody reads the pipe while no subscriber could take more, so that the pipe fills and the child blocks. With nobody attached the oldest bytes go and are counted, so that
// an unattended process runs on; only for a short grace after its last subscriber left does it wait, because a client
// that lost its connection comes back for the bytes that were on their way to it. For the same reason bytes that were
// handed to a connection stay for a while: they may still be in the socket buffers of both sides, the client's above all,
// which Linux lets grow to some 3 MiB for a fast reader (tcp(7), tcp_rmem).
//
// All logs share one mutex and one memory budget; nothing is done under it but moving bytes.

package main

import (
	"slices"
	"sync"
	"time"
)

type outputKind uint8

const (
	stdoutKind outputKind = iota
	stderrKind
	ptyKind
)

const (
	// outputChunk is the largest piece that is read, kept and sent at once.
	outputChunk = 128 << 10
	// outputPending is how far, in bytes, the slowest of several subscribers may be behind before all have to wait.
	outputPending = 256 << 10
	// keepWhole is the size from which a read buffer becomes a chunk as it is instead of being copied.
	keepWhole = 96 << 10
)

var readBuffers = sync.Pool{New: func() any { return new([outputChunk]byte) }}

type chunk struct {
	kind outputKind
	off  int64
	seq  uint64 // age among the chunks of all logs
	data []byte // append-only: what a subscriber was given never changes
}

func (c *chunk) end() int64 { return c.off + int64(len(c.data)) }

// outputMemory is the budget of all logs, in bytes.
type outputMemory struct {
	perLog     int64 // of a process that nobody follows
	resume     int64 // behind what the slowest follower was sent
	liveLimit  int64
	endedLimit int64
	grace      time.Duration

	mu          sync.Mutex // protects everything below, and every log and subscriber
	live, ended int64      // buffer bytes held by endedLogs and by all others
	short       bool       // readers are held because live is at its limit
	seq         uint64
	liveLogs    []*outputLog
	endedLogs   []*outputLog // that nobody follows; the longest ended first
}

type outputLog struct {
	m          *outputMemory
	chunks     []chunk
	first, end int64 // offsets of the oldest byte kept and behind the newest
	sent       int64 // offset behind the last byte that any client was sent
	subs       []*subscriber
	graceUntil time.Time
	waiting    []*reader // those that are held
	finished   bool
	cut        bool // a subscriber was cut, and may have a piece in hand for ever
	settled    bool // in the budget of the ended ones
	forgotten  bool
}

// A subscriber is one stream that follows a log. Only its own goroutine calls its methods.
type subscriber struct {
	log      *outputLog
	pos      int64         // everything before was sent
	limit    int64         // where this stream ends, once the process has ended; -1 before
	notify   chan struct{} // holds a value when there may be something new
	progress time.Time     // when it last took something, or when something to take first appeared
	done     bool          // told that there is no more
	cut      bool
	onCut    func()
}

func (m *outputMemory) newLog() *outputLog {
	l := &outputLog{m: m}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.liveLogs = append(m.liveLogs, l)
	return l
}

// reader is what reads a pipe into the log.
type reader struct {
	hold, resume func() // stop and go on reading by itself; called under the log's lock
	pull         func() // read now: a subscriber has nothing left to send
}

// room tells whether the next piece may be read. If not, the reader is held until it may.
func (l *outputLog) room(r *reader) bool {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if !l.fullLocked() {
		return true
	}
	r.hold()
	l.waiting = append(l.waiting, r)
	return false
}

// fullLocked: with nobody ready to take more, reading on would only make small pieces of what the pipe could gather.
func (l *outputLog) fullLocked() bool {
	if !l.attendedLocked() {
		return false
	}
	pending := l.end - l.slowestLocked()
	if len(l.subs) == 0 {
		return pending >= l.m.perLog
	}
	ready := func(s *subscriber) bool { return s.pos == l.end }
	if pending > 0 && l.m.live > l.m.liveLimit {
		l.m.short = true
		return true
	}
	return pending >= outputPending || !slices.ContainsFunc(l.subs, ready)
}

// held tells whether a reader waits for a subscriber: then the clocks at the end of a process stand still.
func (l *outputLog) held() bool {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	return len(l.waiting) > 0
}

// attendedLocked: followed, or left so recently that the client may come back; not where memory is short.
func (l *outputLog) attendedLocked() bool {
	return len(l.subs) > 0 || l.m.live+l.m.ended <= l.m.liveLimit && time.Now().Before(l.graceUntil)
}

// slowestLocked is the offset up to which every subscriber has been served.
func (l *outputLog) slowestLocked() int64 {
	if len(l.subs) == 0 {
		return l.sent
	}
	pos := l.subs[0].pos
	for _, s := range l.subs[1:] {
		pos = min(pos, s.pos)
	}
	return pos
}

// append adds what was read. It tells whether the log keeps buf itself, so that the reader takes another one.
func (l *outputLog) append(kind outputKind, buf []byte, n int) (kept bool) {
	m := l.m
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seq++
	data := buf[:n]
	if last := len(l.chunks) - 1; n < keepWhole && last >= 0 && l.chunks[last].kind == kind {
		c := &l.chunks[last]
		fits := min(n, cap(c.data)-len(c.data))
		c.data = append(c.data, data[:fits]...)
		l.end += int64(fits)
		data = data[fits:]
	}
	switch {
	case len(data) == 0:
	case l.forgotten && l.finished && len(l.subs) == 0:
		l.end += int64(len(data))
		l.first = l.end
	default:
		kept = len(data) == n && n >= keepWhole
		if !kept {
			// Room for what follows: a command that writes line by line must not cost a buffer a line.
			size := 512
			if last := len(l.chunks) - 1; last >= 0 {
				size = min(2*cap(l.chunks[last].data), 32<<10)
			}
			data = append(make([]byte, 0, max(size, len(data))), data...)
		}
		l.chunks = append(l.chunks, chunk{kind: kind, off: l.end, seq: m.seq, data: data})
		l.end += int64(len(data))
		l.accountLocked(int64(cap(data)))
	}
	for _, s := range l.subs {
		s.wakeLocked()
	}
	l.trimLocked()
	return kept
}

func (l *outputLog) accountLocked(bytes int64) {
	if l.settled {
		l.m.ended += bytes
	} else {
		l.m.live += bytes
	}
}

// trimLocked brings this log, then all of them together, back to their bounds.
func (l *outputLog) trimLocked() {
	m := l.m
	for l.droppableLocked() && l.chunks[0].end() <= l.keepFromLocked() {
		l.dropLocked()
	}
	for m.live > m.liveLimit {
		var oldest *outputLog
		for _, o := range m.liveLogs {
			if o.droppableLocked() && (oldest == nil || o.olderLocked(oldest)) {
				oldest = o
			}
		}
		if oldest == nil {
			break
		}
		oldest.dropLocked()
	}
	for i := 0; m.ended > m.endedLimit && i < len(m.endedLogs); {
		if o := m.endedLogs[i]; o.droppableLocked() {
			o.dropLocked()
		} else {
			i++
		}
	}
}

// keepFromLocked is the offset from which this log keeps its bytes, as far as the common budget allows.
func (l *outputLog) keepFromLocked() int64 {
	if l.attendedLocked() {
		return l.slowestLocked() - l.m.resume
	}
	return l.end - l.m.perLog
}

// droppableLocked tells whether the oldest chunk may go: nobody is attached, or all who are have been sent it.
func (l *outputLog) droppableLocked() bool {
	return len(l.chunks) > 0 && (!l.attendedLocked() || l.chunks[0].end() <= l.slowestLocked())
}

// olderLocked orders the logs that may drop something: unattended ones first, then by age.
func (l *outputLog) olderLocked(o *outputLog) bool {
	if a, b := l.attendedLocked(), o.attendedLocked(); a != b {
		return b
	}
	return l.chunks[0].seq < o.chunks[0].seq
}

func (l *outputLog) dropLocked() {
	c := l.chunks[0]
	l.chunks[0] = chunk{}
	l.chunks = l.chunks[1:]
	if cap(c.data) == outputChunk && !l.cut {
		readBuffers.Put((*[outputChunk]byte)(c.data[:outputChunk])) // no subscriber has it in hand
	}
	l.first = c.end()
	l.accountLocked(-int64(cap(c.data)))
}

// Where a subscription begins: at an offset, or at one of these.
const (
	fromUnsent int64 = -1 - iota // at the first byte that no client has been sent
	fromNow
)

// subscribe attaches a stream. It tells the offset of the stream's first byte and how many of the bytes that were asked
// for are gone; ok is false when the offset lies past the end.
func (l *outputLog) subscribe(from int64, onCut func()) (s *subscriber, lost int64, ok bool) {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	switch from {
	case fromUnsent:
		from = l.sent
	case fromNow:
		from = l.end
	}
	if from > l.end {
		return nil, 0, false
	}
	s = &subscriber{log: l, pos: max(from, l.first), limit: -1, notify: make(chan struct{}, 1), onCut: onCut,
		progress: time.Now()}
	if l.finished {
		s.limit = l.end
	}
	l.subs = append(l.subs, s)
	l.roomLocked()
	return s, s.pos - from, true
}

// finish says that the process has ended: each stream ends at the byte that is the newest now.
func (l *outputLog) finish() {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	l.finished = true
	for _, s := range l.subs {
		s.limit = l.end
		s.wakeLocked()
	}
	l.settleLocked()
}

// forget frees the log once it has ended and nobody follows it any more. What background children still write is then
// read and dropped.
func (l *outputLog) forget() {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	l.forgotten = true
	l.settleLocked()
}

// settleLocked follows each change of who follows the log: an ended one that nobody will come back to soon moves to the
// budget of the ended ones, a forgotten one goes, and readers that were held look again.
func (l *outputLog) settleLocked() {
	m := l.m
	switch {
	case !l.finished || len(l.subs) > 0:
	case l.forgotten:
		for len(l.chunks) > 0 {
			l.dropLocked()
		}
		m.liveLogs, m.endedLogs = without(m.liveLogs, l), without(m.endedLogs, l)
	case !l.settled && !l.attendedLocked():
		for _, c := range l.chunks {
			m.live -= int64(cap(c.data))
			m.ended += int64(cap(c.data))
		}
		l.settled = true
		m.liveLogs, m.endedLogs = without(m.liveLogs, l), append(m.endedLogs, l)
	}
	l.trimLocked()
	l.roomLocked()
}

// roomLocked lets readers go on where there is room: this log's, and others that waited for the shared budget.
func (l *outputLog) roomLocked() {
	l.resumeLocked()
	if l.m.short && l.m.live <= l.m.liveLimit {
		l.m.short = false
		for _, o := range l.m.liveLogs {
			o.resumeLocked()
		}
	}
}

func (l *outputLog) resumeLocked() {
	if len(l.waiting) == 0 || l.fullLocked() {
		return
	}
	for _, r := range l.waiting {
		r.resume()
	}
	l.waiting = nil
}

func (s *subscriber) wakeLocked() {
	select {
	case s.notify <- struct{}{}:
	default:
	}
}

// next gives what is to be sent now. With no data, done says that all has been sent and the process has ended; cut that
// this subscriber was too slow.
func (s *subscriber) next() (kind outputKind, data []byte, done, cut bool) {
	l := s.log
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if s.cut {
		return 0, nil, false, true
	}
	if s.pos >= l.end || s.limit >= 0 && s.pos >= s.limit {
		s.done = s.limit >= 0
		return 0, nil, s.done, false
	}
	i, _ := slices.BinarySearchFunc(l.chunks, s.pos, func(c chunk, pos int64) int {
		if c.end() <= pos {
			return -1
		}
		return 1
	})
	c := &l.chunks[i]
	data = c.data[s.pos-c.off:]
	if s.limit >= 0 {
		data = data[:min(int64(len(data)), s.limit-s.pos)]
	}
	return c.kind, data, false, false
}

// sent says that n more bytes are in the hands of the connection. With nothing left to send it has the held readers read:
// at full speed all work is done on the subscriber's goroutine.
func (s *subscriber) sent(n int) {
	l := s.log
	l.m.mu.Lock()
	s.pos += int64(n)
	s.progress = time.Now()
	l.sent = max(l.sent, s.pos)
	l.trimLocked()
	var pull []*reader
	if s.pos == l.end && !l.fullLocked() {
		pull, l.waiting = l.waiting, nil
	}
	l.roomLocked()
	l.m.mu.Unlock()
	for _, r := range pull {
		r.pull()
	}
}

// detach ends a subscription. If that was before its end, the client may come back.
func (s *subscriber) detach() {
	l := s.log
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if s.cut {
		return
	}
	if !s.done {
		l.graceUntil = time.Now().Add(l.m.grace)
		time.AfterFunc(l.m.grace, func() {
			l.m.mu.Lock()
			defer l.m.mu.Unlock()
			l.settleLocked()
		})
	}
	l.removeLocked(s)
}

func (l *outputLog) removeLocked(s *subscriber) {
	l.subs = without(l.subs, s)
	l.settleLocked()
}

func without[T comparable](list []T, gone T) []T {
	return slices.DeleteFunc(list, func(e T) bool { return e == gone })
}

// cutStalled detaches the subscribers that took nothing for `alone`, or for `shared` while another one waits because of
// them. Their connections are broken by onCut, so that a stream without `end` tells the client to come back.
func (m *outputMemory) cutStalled(now time.Time, alone, shared time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range slices.Concat(m.liveLogs, m.endedLogs) {
		for _, s := range slices.Clone(l.subs) {
			waits := func(o *subscriber) bool { return o.pos == l.end }
			switch stalled := now.Sub(s.progress); {
			case s.pos == l.end:
				s.progress = now
			case stalled > alone, stalled > shared && len(l.waiting) > 0 && slices.ContainsFunc(l.subs, waits):
				s.cutLocked()
			}
		}
	}
}

func (s *subscriber) cutLocked() {
	s.cut, s.log.cut = true, true
	s.log.removeLocked(s)
	s.wakeLocked()
	s.onCut()
}
