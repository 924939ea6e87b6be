// The output log against a model: a slice of bytes for each process, and what the rules at the head of output.go say of it.
//
// Each seed is one history of several logs that share a memory: writers that write, end and are forgotten, streams that begin
// anywhere, take pieces, stall, leave and are cut. Time is the bubble's of testing/synctest, so that a history with hours of waiting
// takes a millisecond. After each step everything that the rules promise is compared.

package main

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// How many seeds the model tests run, and which: a failing one is printed, and run alone by `go test -run TestX -seed N`.
var (
	seedCount = flag.Int("seeds", 0, "`count` of seeds of each model test (default: as many as fit into some seconds)")
	oneSeed   = flag.Uint64("seed", 0, "the only `seed` that model tests run")
)

// seedSource gives seeds from 1 up: as many as the flags say, or for a time.
func seedSource(most time.Duration) func() (seed uint64, ok bool) {
	var next atomic.Uint64
	if raceEnabled() {
		most *= 2
	}
	begun := time.Now()
	return func() (uint64, bool) {
		seed := next.Add(1)
		switch {
		case *oneSeed > 0:
			return *oneSeed, seed == 1
		case *seedCount > 0:
			return seed, seed <= uint64(*seedCount)
		}
		return seed, time.Since(begun) < most
	}
}

// seedFailed tells how to see it again.
func seedFailed(t *testing.T, seed uint64, fault string) {
	t.Helper()
	t.Errorf("seed %d: %s\nreplay: go test -run '^%s$' . -seed %[1]d", seed, fault, t.Name())
}

// logText is what all logs hold: the byte at offset o of log n is the one at (o + n*logStride) % logPeriod.
const logPeriod, logStride = 65537, 7919

var logText = func() []byte {
	text := pattern(1, logPeriod)
	return append(slices.Repeat(text, 1+2*outputChunk/logPeriod), text...)
}()

// logModel is what the test knows of one log.
type logModel struct {
	n        int
	log      *outputLog
	kinds    []kindRun
	end      int64 // behind the newest byte
	sent     int64
	atLeast  int64 // bytes from here on must be there, but for the budgets
	first    int64 // as seen last
	backward bool  // it was larger before
	lost     int64 // bytes that went before anybody had been sent them
	finished int64 // offset of the process's end; -1: it runs
	forgot   bool
	removed  bool
	readers  []*modelReader
	subs     []*modelSub
	left     []time.Time // when streams left that may come back
}

// kindRun says that bytes before end, and behind those of the run before, are of a kind.
type kindRun struct {
	end  int64
	kind outputKind
}

func (m *logModel) text(from int64, n int) []byte {
	at := (from + int64(m.n)*logStride) % logPeriod
	return logText[at : at+int64(n)]
}

// kindAt gives the kind of the byte at an offset, and how many of that kind follow in a row.
func (m *logModel) kindAt(offset int64) (kind outputKind, run int64) {
	i, _ := slices.BinarySearchFunc(m.kinds, offset+1, func(r kindRun, at int64) int { return int(r.end - at) })
	return m.kinds[i].kind, m.kinds[i].end - offset
}

// modelReader plays an outputPipe: what is in its pipe has been written by a process.
type modelReader struct {
	m     *logModel
	kind  outputKind
	pipe  int // bytes in it
	buf   *[outputChunk]byte
	armed bool
}

func (r *modelReader) arm() { r.armed = true }

func (r *modelReader) ready() {
	if most := r.m.log.room(r); most > 0 {
		r.pull(most)
	}
}

func (r *modelReader) pull(most int) {
	n := min(most, r.pipe)
	if n > 0 {
		if r.buf == nil {
			r.buf = readBuffers.Get().(*[outputChunk]byte)
		}
		copy(r.buf[:], r.m.text(r.m.end, n))
		m := r.m
		if last := len(m.kinds) - 1; last >= 0 && m.kinds[last].kind == r.kind {
			m.kinds[last].end += int64(n)
		} else {
			m.kinds = append(m.kinds, kindRun{m.end + int64(n), r.kind})
		}
		m.end += int64(n)
		r.pipe -= n
		if m.log.append(r.kind, r.buf[:], n) {
			r.buf = nil // it is the log's
		}
		m.note(m.log.m)
	}
	if n == 0 || r.m.log.room(r) > 0 {
		r.arm()
	}
}

// modelSub is a stream, with the piece that it is sending.
type modelSub struct {
	m     *logModel
	sub   *subscriber
	pos   int64
	piece []byte
	cut   bool // as onCut was told
	told  bool // that there is no more
	took  time.Time
}

type logWorld struct {
	memory  *outputMemory
	choose  *rand.Rand
	logs    []*logModel
	pressed bool // a budget was exceeded: the oldest may be gone
	counts  *logCounts
	ending  bool
	fault   string
}

type logCounts struct{ steps, bytes, streams, cuts, held, lost int64 }

func (w *logWorld) fail(m *logModel, format string, args ...any) {
	if w.fault == "" {
		w.fault = fmt.Sprintf("log %d (end %d, sent %d): %s", m.n, m.end, m.sent, fmt.Sprintf(format, args...))
	}
}

func TestOutputLogModel(t *testing.T) {
	t.Parallel()
	var counts logCounts
	begun := time.Now()
	seeds, source := 0, seedSource(3*time.Second)
	for seed, ok := source(); ok && !t.Failed(); seed, ok = source() {
		synctest.Test(t, func(t *testing.T) {
			if fault := runLogHistory(seed, &counts); fault != "" {
				seedFailed(t, seed, fault)
			}
		})
		seeds++
	}
	t.Logf("%d histories in %v: %d steps, %d bytes compared, %d streams, %d cut, %d readers held, %d bytes lost and counted", seeds,
		time.Since(begun).Round(time.Millisecond), counts.steps, counts.bytes, counts.streams, counts.cuts, counts.held, counts.lost)
}

func runLogHistory(seed uint64, counts *logCounts) string {
	choose := rand.New(rand.NewPCG(seed, 21))
	size := func(most int64) int64 { return choose.Int64N(most) >> choose.IntN(10) }
	memory := &outputMemory{perLog: 1 + size(512<<10), resume: size(1 << 20), liveLimit: 1 << 40, endedLimit: 1 << 40, grace: 2 * time.Second}
	if choose.IntN(2) == 0 {
		memory.liveLimit, memory.endedLimit = 1+size(2<<20), size(1<<20)
	}
	w := &logWorld{memory: memory, choose: choose, counts: counts}
	largest := 1 + size(300<<10) // of a write
	for steps := 20 + choose.IntN(200); steps > 0 && w.fault == ""; steps-- {
		counts.steps++
		w.step(largest)
		w.check()
	}
	if w.fault == "" {
		w.end()
	}
	return w.fault
}

func (w *logWorld) step(largest int64) {
	choice := w.choose.IntN(100)
	switch {
	case choice < 6 && len(w.logs) < 6 || len(w.logs) == 0:
		m := &logModel{n: w.choose.IntN(1000), log: w.memory.newLog(), finished: -1}
		for kind := range outputKind(1 + w.choose.IntN(2)) {
			m.readers = append(m.readers, &modelReader{m: m, kind: kind, armed: true})
		}
		w.logs = append(w.logs, m)
		if w.choose.IntN(4) > 0 {
			w.subscribe(m, 0)
		}
		return
	case choice < 14:
		time.Sleep(time.Duration(w.choose.Int64N(int64(3 * time.Second))))
		synctest.Wait()
		return
	case choice < 17:
		w.cutStalled()
		return
	}
	m := w.logs[w.choose.IntN(len(w.logs))]
	var s *modelSub
	if len(m.subs) > 0 {
		s = m.subs[w.choose.IntN(len(m.subs))]
	}
	switch {
	case choice < 45: // the process, or a background child of it, writes, and the poller looks
		r := m.readers[w.choose.IntN(len(m.readers))]
		if r.pipe == 0 {
			r.pipe = int(1 + w.choose.Int64N(largest))
		}
		w.poll(r)
	case choice < 50:
		for _, r := range m.readers {
			w.poll(r)
		}
	case choice < 58 && len(m.subs) < 4:
		from := []int64{fromUnsent, fromNow, 0, w.choose.Int64N(m.end + 1), m.sent, m.end + 1}[w.choose.IntN(6)]
		w.subscribe(m, from)
	case choice < 63 && s != nil:
		w.detach(s)
	case choice < 65 && m.finished < 0:
		m.log.finish()
		m.finished = m.end
	case choice < 67 && m.finished >= 0 && !m.forgot:
		m.log.forget()
		m.forgot = true
	case s != nil && w.choose.IntN(3) == 0:
		for w.take(s) && w.fault == "" {
		}
	case s != nil:
		w.take(s)
	}
}

func (w *logWorld) poll(r *modelReader) {
	for r.armed && r.pipe > 0 {
		r.armed = false
		r.ready()
	}
	if !r.armed {
		w.counts.held++
	}
}

func (w *logWorld) subscribe(m *logModel, from int64) {
	s := &modelSub{m: m, took: time.Now()}
	s.sub = m.log.subscribe(from, func() { s.cut = true; m.note(w.memory) })
	asked := map[int64]int64{fromUnsent: m.sent, fromNow: m.end}
	want, special := asked[from]
	if !special {
		want = from
	}
	if want > m.end {
		if s.sub != nil {
			w.fail(m, "a stream from %d, past the end", want)
		}
		return
	}
	if s.sub == nil {
		w.fail(m, "no stream from %d", want)
		return
	}
	if s.pos = s.sub.pos; s.sub.lost != s.pos-want || s.pos < want || s.pos > want && s.pos != m.log.first {
		w.fail(m, "asked for %d, the stream begins at %d and says that %d are lost; the log has those from %d", want, s.pos, s.sub.lost, m.log.first)
	}
	if s.pos > max(want, m.atLeast) && !w.pressed {
		w.fail(m, "asked for %d, the stream begins at %d; from %d on nothing may be gone", want, s.pos, m.atLeast)
	}
	m.subs = append(m.subs, s)
	w.counts.streams++
}

// take gets a piece or says that the last one has been sent; it tells whether there may be more.
func (w *logWorld) take(s *modelSub) (more bool) {
	m := s.m
	if s.piece != nil {
		if !bytes.Equal(s.piece, m.text(s.pos, len(s.piece))) {
			w.fail(m, "the %d bytes at %d changed while they were being sent", len(s.piece), s.pos)
		}
		n := len(s.piece)
		m.note(w.memory)
		s.pos, s.piece, s.took = s.pos+int64(n), nil, time.Now()
		m.sent = max(m.sent, s.pos)
		s.sub.sent(n)
		m.note(w.memory)
		return true
	}
	kind, data, done, cut := s.sub.next()
	limit := m.end
	if s.sub.limit >= 0 {
		limit = s.sub.limit
	}
	switch {
	case cut != s.cut:
		w.fail(m, "a stream is cut: %v, but onCut was called: %v", cut, s.cut)
	case cut:
		w.counts.cuts++
		w.detach(s)
	case done && (m.finished < 0 || s.pos < m.finished):
		w.fail(m, "the end at %d; the process ended at %d", s.pos, m.finished)
	case done && !s.told && !w.ending && w.choose.IntN(3) == 0:
		s.told = true // and hangs with its last message
	case done:
		w.detach(s)
	case data == nil && s.pos < limit:
		w.fail(m, "nothing to send at %d of %d", s.pos, limit)
	case data == nil && m.finished >= 0:
		w.fail(m, "no end at %d; the process ended at %d", s.pos, m.finished)
	case data != nil:
		wantKind, run := m.kindAt(s.pos)
		if kind != wantKind || int64(len(data)) > run || s.pos+int64(len(data)) > limit || !bytes.Equal(data, m.text(s.pos, len(data))) {
			w.fail(m, "%d bytes of kind %d at %d; want at most %d of kind %d, before %d", len(data), kind, s.pos, run, wantKind, limit)
		}
		s.piece = data
		w.counts.bytes += int64(len(data))
		return true
	}
	return false
}

func (w *logWorld) detach(s *modelSub) {
	if !s.cut && !(s.sub.limit >= 0 && s.pos >= s.sub.limit && s.sub.done) {
		s.m.left = append(s.m.left, time.Now())
	}
	s.sub.detach()
	s.m.subs = without(s.m.subs, s)
	s.m.note(w.memory)
}

// cutStalled compares who is cut with who has had something to take for too long.
func (w *logWorld) cutStalled() {
	const alone, shared = 5 * time.Second, 2 * time.Second
	now := time.Now()
	type stalled struct {
		s         *modelSub
		must, may bool
	}
	var all []stalled
	for _, m := range w.logs {
		for _, s := range m.subs {
			if s.cut || m.removed {
				continue
			}
			took := now.Sub(s.sub.progress)
			hangs := s.pos < m.end || s.told
			all = append(all, stalled{s, hangs && took > alone, hangs && took > shared})
		}
	}
	w.memory.cutStalled(now, alone, shared)
	for _, one := range all {
		if s := one.s; s.cut && !one.may || !s.cut && one.must {
			w.fail(s.m, "a stream at %d that took nothing for %v is cut: %v", s.pos, now.Sub(s.took), s.cut)
		}
	}
}

// note looks, after each change, what has been lost, and has the rules say who follows the log, and from where on it keeps its bytes.
func (m *logModel) note(memory *outputMemory) (following []*modelSub, attended bool, slowest, keep int64) {
	m.lost += max(0, m.log.first-max(m.first, m.sent))
	m.backward = m.backward || m.log.first < m.first
	m.first = m.log.first
	m.left = slices.DeleteFunc(m.left, func(at time.Time) bool { return !time.Now().Before(at.Add(memory.grace)) })
	slowest = m.sent
	for _, s := range m.subs {
		if s.cut {
			continue
		}
		if slowest = min(slowest, s.pos); len(following) == 0 {
			slowest = s.pos
		}
		following = append(following, s)
	}
	gone := m.forgot && m.finished >= 0 && len(following) == 0
	attended = len(following) > 0 || len(m.left) > 0 && !gone && memory.live+memory.ended <= memory.liveLimit
	switch {
	case gone:
		keep = m.end
	case attended:
		keep = slowest - memory.resume
	case m.finished < 0:
		keep = m.end - memory.perLog
	}
	m.atLeast = max(m.atLeast, keep)
	return following, attended, slowest, keep
}

// check compares what holds after each step.
func (w *logWorld) check() {
	memory := w.memory
	memory.mu.Lock()
	defer memory.mu.Unlock()
	var live, ended, lost int64
	if memory.live > memory.liveLimit || memory.ended > memory.endedLimit {
		w.pressed = true
	}
	// What was freed for a budget within a step shows in no sum: with a limit that was ever near, the oldest may be gone.
	w.pressed = w.pressed || memory.liveLimit < 1<<40
	for _, m := range w.logs {
		l := m.log
		following, attended, slowest, keep := m.note(memory)
		if l.missed != len(m.left) {
			w.fail(m, "%d streams may come back, want %d", l.missed, len(m.left))
		}
		if l.end != m.end || l.sent != m.sent || m.backward || l.first > l.end || l.finished != (m.finished >= 0) {
			w.fail(m, "the log says first %d (it went back: %v), sent %d, end %d, finished %v", l.first, m.backward, l.sent, l.end, l.finished)
		}
		lost += m.lost
		at, held := l.first, int64(0)
		for _, c := range l.chunks {
			if c.off != at || len(c.data) == 0 {
				w.fail(m, "a chunk of %d bytes at %d, want one at %d", len(c.data), c.off, at)
			}
			at += int64(len(c.data))
			held += int64(cap(c.data))
		}
		if at != l.end {
			w.fail(m, "the chunks end at %d", at)
		}
		if l.budget == &memory.ended {
			ended += held
		} else {
			live += held
		}
		gone := keep == m.end && m.forgot && m.finished >= 0 && len(following) == 0
		m.removed = m.removed || gone // a stream that comes later finds nothing, and is no reason to count the log again
		if there := slices.Contains(memory.logs, l); there == m.removed {
			w.fail(m, "among the logs: %v", there)
		}
		switch {
		case len(following) > 0 && l.first > slowest:
			w.fail(m, "a stream is at %d, but the log has only what comes from %d on", slowest, l.first)
		case l.first > max(m.atLeast, 0) && !w.pressed:
			w.fail(m, "kept from %d on; want all from %d", l.first, m.atLeast)
		case len(l.chunks) > 0 && len(m.left) == 0 && !(m.finished >= 0 && !gone) && l.chunks[0].end() <= keep && (!attended || l.chunks[0].end() <= slowest):
			w.fail(m, "kept from %d on, with a chunk that ends at %d; want only what comes from %d on", l.first, l.chunks[0].end(), keep)
		case memory.live > memory.liveLimit && !m.removed && l.budget == &memory.live && len(l.chunks) > 0 && (!attended || l.chunks[0].end() <= slowest):
			w.fail(m, "%d bytes are held, %d over the limit, and the oldest chunk, which ends at %d, is in nobody's way", memory.live,
				memory.live-memory.liveLimit, l.chunks[0].end())
		}
		// A process with somebody to read its output, or with nobody, is not held for longer than it takes.
		if len(l.waiting) > 0 && len(following) == 0 && len(m.left) == 0 {
			w.fail(m, "%d readers are held although nobody follows", len(l.waiting))
		}
		if len(l.waiting) > 0 && len(following) > 0 && slowest == m.end {
			w.fail(m, "%d readers are held although every stream has all", len(l.waiting))
		}
	}
	if live != memory.live || ended != memory.ended {
		w.fail(w.logs[0], "%d and %d bytes are held, counted are %d and %d", live, ended, memory.live, memory.ended)
	}
	if memory.ended > memory.endedLimit {
		for _, m := range w.logs {
			if !m.removed && m.log.budget == &memory.ended && len(m.log.chunks) > 0 && m.log.droppableLocked() {
				w.fail(m, "%d bytes of ended ones are held, the limit is %d", memory.ended, memory.endedLimit)
			}
		}
	}
	if counted := memory.lost.Load(); counted != lost {
		w.fail(w.logs[0], "%d bytes were lost, counted are %d", lost, counted)
	}
	w.counts.lost = max(w.counts.lost, lost)
}

// end: every process ends, every stream is read to its end, everything is forgotten, and nothing is left.
func (w *logWorld) end() {
	w.ending = true
	for _, m := range w.logs {
		for rounds := 0; w.fault == ""; rounds++ {
			busy := false
			for _, r := range m.readers {
				w.poll(r)
				busy = busy || r.pipe > 0
			}
			for _, s := range slices.Clone(m.subs) {
				for w.take(s) && w.fault == "" {
				}
			}
			w.check()
			if !busy {
				break
			}
			if rounds > 10_000 {
				w.fail(m, "%d and more bytes are never read", m.readers[0].pipe)
			}
			if len(m.subs) == 0 {
				time.Sleep(w.memory.grace) // the longest that a process waits for those who left
				synctest.Wait()
			}
		}
		if m.finished < 0 {
			m.log.finish()
			m.finished = m.end
		}
		for _, s := range slices.Clone(m.subs) {
			for w.take(s) && w.fault == "" {
			}
		}
		if len(m.subs) > 0 {
			w.fail(m, "%d streams do not end", len(m.subs))
		}
		m.log.forget()
		m.forgot = true
		w.check()
	}
	time.Sleep(w.memory.grace)
	synctest.Wait()
	if memory := w.memory; w.fault == "" && (memory.live != 0 || memory.ended != 0 || len(memory.logs) != 0) {
		w.fail(w.logs[0], "%d logs, %d and %d bytes are left", len(memory.logs), memory.live, memory.ended)
	}
}
