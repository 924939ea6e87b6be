// The output log of a process: what it wrote, in arrival order, under absolute byte offsets.
//
// Rules. With a subscriber attached nothing is dropped: nobody reads the pipe while no subscriber could take more, so that
// the pipe fills and the child blocks. With nobody attached the oldest bytes go and are counted, so that
// an unattended process runs on; only for a short grace after its last subscriber left does it wait, because a client
// that lost its connection comes back for the bytes that were on their way to it. For the same reason bytes that were
// handed to a connection stay for a while: they may still be in the socket buffers of both sides, the client's above all,
// which Linux lets grow to some 3 MiB for a fast reader (tcp(7), tcp_rmem).
//
// All logs share one mutex and one memory budget; nothing is done under it but moving bytes.

package main

import (
	"cmp"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
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
	lost       atomic.Int64 // bytes that were dropped before any client had been sent them

	mu          sync.Mutex // protects everything below, and every log and subscriber
	live, ended int64      // buffer bytes held by logs that have ended and that nobody follows, and by all others
	short       bool       // readers are held because live is at its limit
	seq         uint64
	logs        []*outputLog
}

type outputLog struct {
	m          *outputMemory
	budget     *int64 // m.live or m.ended
	chunks     []chunk
	first, end int64 // offsets of the oldest byte kept and behind the newest
	sent       int64 // offset behind the last byte that any client was sent
	subs       []*subscriber
	missed     int      // subscribers that left before the end a moment ago, and may come back
	waiting    []reader // those that are held
	finished   bool
	cut        bool // a subscriber was cut, and may have a piece in hand for ever
	forgotten  bool // nobody will come back
}

// A subscriber is one stream that follows a log. Only its own goroutine calls its methods.
type subscriber struct {
	log      *outputLog
	pos      int64         // everything before was sent
	lost     int64         // bytes between what was asked for and the first pos that are gone
	limit    int64         // where this stream ends, once the process has ended; -1 before
	notify   chan struct{} // holds a value when there may be something new
	progress time.Time     // when it last took something, or when something to take first appeared
	given    time.Time     // when it last got something to send
	slow     bool          // gets small pieces, so that its progress shows
	done     bool          // told that there is no more
	cut      bool
	onCut    func()
}

func (m *outputMemory) newLog() *outputLog {
	l := &outputLog{m: m, budget: &m.live}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.logs = append(m.logs, l)
	return l
}

// reader is what reads a pipe into the log.
type reader interface {
	arm()           // has it read by itself, once; called under the log's lock
	pull(bytes int) // reads now: a subscriber has nothing left to send
}

// room tells how many bytes may be read next. If none, the reader is held until some may: then it is armed.
func (l *outputLog) room(r reader) (bytes int) {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	if !l.fullLocked() {
		return l.m.pieceLocked()
	}
	if !slices.Contains(l.waiting, r) {
		l.waiting = append(l.waiting, r)
	}
	return 0
}

// pieceLocked is how many bytes a reader may take at once: where memory is short, thousands of stalled streams must not
// hold a large piece each.
func (m *outputMemory) pieceLocked() int {
	if m.live > m.liveLimit {
		return 4 << 10
	}
	return outputChunk
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

// state is for the end of a process: how far the output goes, and whether a reader waits for a subscriber.
func (l *outputLog) state() (end int64, held bool) {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	return l.end, len(l.waiting) > 0
}

// attendedLocked: followed, or left so recently that the client may come back; not where memory is short.
func (l *outputLog) attendedLocked() bool {
	return len(l.subs) > 0 || l.missed > 0 && !l.goneLocked() && l.m.live+l.m.ended <= l.m.liveLimit
}

// goneLocked: nobody follows the log, nor will.
func (l *outputLog) goneLocked() bool { return l.forgotten && l.finished && len(l.subs) == 0 }

// slowestLocked is the offset up to which every subscriber has been served.
func (l *outputLog) slowestLocked() int64 {
	if len(l.subs) == 0 {
		return l.sent
	}
	return slices.MinFunc(l.subs, func(a, b *subscriber) int { return cmp.Compare(a.pos, b.pos) }).pos
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
	if len(data) > 0 {
		if kept = n >= keepWhole; !kept {
			// Room for what follows: a command that writes line by line must not cost a buffer a line.
			size := 512
			if last := len(l.chunks) - 1; last >= 0 {
				size = max(size, min(2*len(l.chunks[last].data), 32<<10))
			}
			data = append(make([]byte, 0, max(size, len(data))), data...)
		}
		l.chunks = append(l.chunks, chunk{kind: kind, off: l.end, seq: m.seq, data: data})
		l.end += int64(len(data))
		*l.budget += int64(cap(data))
	}
	for _, s := range l.subs {
		s.wakeLocked()
	}
	l.settleLocked()
	return kept
}

// settleLocked follows each change. An ended log that nobody will come back to soon moves to the budget of the ended ones, a
// forgotten one goes; this log, then all of them together, come back to their bounds; held readers go on where there is room.
func (l *outputLog) settleLocked() {
	m := l.m
	if l.goneLocked() {
		m.logs = without(m.logs, l)
	} else if l.finished && l.budget == &m.live && !l.attendedLocked() {
		for _, c := range l.chunks {
			m.live -= int64(cap(c.data))
			m.ended += int64(cap(c.data))
		}
		l.budget = &m.ended
	}
	for l.droppableLocked() && l.chunks[0].end() <= l.keepFromLocked() {
		l.dropLocked()
	}
	m.shrinkLocked(&m.live, m.liveLimit)
	m.shrinkLocked(&m.ended, m.endedLimit)
	changed := []*outputLog{l}
	if m.short && m.live <= m.liveLimit {
		m.short, changed = false, append(changed, m.logs...) // the one that goes is no longer among them
	}
	for _, o := range changed {
		if len(o.waiting) > 0 && !o.fullLocked() {
			for _, r := range o.waiting {
				r.arm()
			}
			o.waiting = nil
		}
	}
}

// shrinkLocked frees chunks until a budget is kept: of unattended logs first, then by age.
func (m *outputMemory) shrinkLocked(budget *int64, limit int64) {
	for *budget > limit {
		var oldest *outputLog
		for _, o := range m.logs {
			if o.budget == budget && o.droppableLocked() && (oldest == nil || o.ageLocked() < oldest.ageLocked()) {
				oldest = o
			}
		}
		if oldest == nil {
			return
		}
		oldest.dropLocked()
	}
}

// keepFromLocked is the offset from which this log keeps its bytes, as far as the common budget allows.
func (l *outputLog) keepFromLocked() int64 {
	switch {
	case l.goneLocked():
		return l.end
	case l.budget == &l.m.ended:
		return l.first
	case l.attendedLocked():
		return l.slowestLocked() - l.m.resume
	}
	return l.end - l.m.perLog
}

// droppableLocked tells whether the oldest chunk may go: nobody is attached, or all who are have been sent it.
func (l *outputLog) droppableLocked() bool {
	return len(l.chunks) > 0 && (!l.attendedLocked() || l.chunks[0].end() <= l.slowestLocked())
}

func (l *outputLog) ageLocked() uint64 {
	if l.attendedLocked() {
		return l.chunks[0].seq | 1<<63
	}
	return l.chunks[0].seq
}

func (l *outputLog) dropLocked() {
	c := l.chunks[0]
	l.chunks[0] = chunk{}
	l.chunks = l.chunks[1:]
	if cap(c.data) == outputChunk && !l.cut {
		readBuffers.Put((*[outputChunk]byte)(c.data[:outputChunk])) // no subscriber has it in hand
	}
	l.first = c.end()
	l.m.lost.Add(max(0, c.end()-max(c.off, l.sent)))
	*l.budget -= int64(cap(c.data))
}

// Where a subscription begins: at an offset, or at one of these.
const (
	fromUnsent int64 = -1 - iota // at the first byte that no client has been sent
	fromNow
)

// subscribe attaches a stream, unless the offset lies past the end.
func (l *outputLog) subscribe(from int64, onCut func()) *subscriber {
	l.m.mu.Lock()
	defer l.m.mu.Unlock()
	switch from {
	case fromUnsent:
		from = l.sent
	case fromNow:
		from = l.end
	}
	if from > l.end {
		return nil
	}
	pos := max(from, l.first)
	s := &subscriber{log: l, pos: pos, lost: pos - from, limit: -1, notify: make(chan struct{}, 1), onCut: onCut,
		progress: time.Now()}
	if l.finished {
		s.limit = l.end
	}
	l.subs = append(l.subs, s)
	l.settleLocked()
	return s
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
	c := &l.chunks[sort.Search(len(l.chunks), func(i int) bool { return l.chunks[i].end() > s.pos })]
	data = c.data[s.pos-c.off:]
	if s.given = time.Now(); s.slow {
		data = data[:min(len(data), 8<<10)]
	}
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
	took := s.progress.Sub(s.given)
	s.slow = took > time.Second || s.slow && took > 50*time.Millisecond
	l.sent = max(l.sent, s.pos)
	var pull []reader
	if s.pos == l.end && !l.fullLocked() {
		pull, l.waiting = l.waiting, nil
	}
	l.settleLocked()
	piece := l.m.pieceLocked()
	l.m.mu.Unlock()
	for _, r := range pull {
		r.pull(piece)
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
		l.missed++
		time.AfterFunc(l.m.grace, func() {
			l.m.mu.Lock()
			defer l.m.mu.Unlock()
			l.missed--
			l.settleLocked()
		})
	}
	l.subs = without(l.subs, s)
	l.settleLocked()
}

func without[T comparable](list []T, gone T) []T {
	if i := slices.Index(list, gone); i >= 0 {
		return slices.Delete(list, i, i+1)
	}
	return list
}

// cutStalled detaches the subscribers that took nothing for `alone`, or for `shared` while another one waits because of
// them. Their connections are broken by onCut, so that a stream without `end` tells the client to come back.
func (m *outputMemory) cutStalled(now time.Time, alone, shared time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, l := range slices.Clone(m.logs) {
		for _, s := range slices.Clone(l.subs) {
			waits := func(o *subscriber) bool { return o.pos == l.end }
			switch stalled := now.Sub(s.progress); {
			case s.pos == l.end && !s.done: // else it hangs with its last message
				s.progress = now
			case stalled > alone, stalled > shared && len(l.waiting) > 0 && slices.ContainsFunc(l.subs, waits):
				s.cut, l.cut = true, true
				l.subs = without(l.subs, s)
				l.settleLocked()
				s.wakeLocked()
				s.onCut()
			}
		}
	}
}
