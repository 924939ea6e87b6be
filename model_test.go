// Random clients against the real daemon, compared with a model of what they do.
//
// A seed is a small world: one to three clients that start, feed, follow, signal and end processes of their own, all at once, beside
// other worlds on the same daemon. The model knows of each process what it was told, so what it prints and how it ends; that byte
// number o is the same in every stream; who bears a tag; and what each misuse is answered. One daemon is left alone, one has its
// processes frozen and thawed meanwhile, one its snapshots prepared and resumed, one has no cgroups. A seed that fails is printed with
// what it did; replayed (-seed, with -count for more than once), it makes the same choices, though at other moments.

package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	pb "envd/proto"
)

// modelDaemon is a daemon with what is done to it meanwhile.
type modelDaemon struct {
	*daemon
	name    string
	meddle  func(choose *rand.Rand) // once; nil: it is left alone
	breaks  bool                    // streams break
	calls   sync.RWMutex            // read-held during calls whose outcome the client must learn; held while a snapshot is made
	unary   []pb.ProcessClient
	clients []pb.ProcessClient // for streams
	meddled atomic.Int64

	mu    sync.Mutex               // protects what follows
	byPid map[uint32]*modelProcess // the newest
}

func newModelDaemon(t *testing.T, name string) *modelDaemon {
	m := &modelDaemon{name: name, byPid: map[uint32]*modelProcess{}}
	args := []string{noSync, "--output-ended", fmt.Sprint(256 << 20)}
	if name == "no cgroups" {
		m.daemon = startDaemonNoCgroups(t, args...)
	} else {
		m.daemon = startDaemon(t, args...)
	}
	m.clients = slices.Collect(maps.Values(m.daemon.clients()))
	m.unary = append(m.clients, m.process(connect.WithProtoJSON()))
	switch name {
	case "frozen now and then":
		m.meddle = func(choose *rand.Rand) {
			m.control(t, "/freeze?maxWaitMs=20")
			time.Sleep(time.Duration(choose.IntN(10)) * time.Millisecond)
			m.control(t, "/unfreeze")
		}
	case "resumed now and then":
		m.breaks = true
		// On a connection of before the snapshot a call would fail without anybody's knowing whether it was heard.
		lone := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		m.unary = []pb.ProcessClient{pb.NewProcessClient(lone, m.url), pb.NewProcessClient(lone, m.url, connect.WithProtoJSON())}
		m.meddle = func(choose *rand.Rand) {
			m.calls.Lock()
			defer m.calls.Unlock()
			m.prepare(t)
			time.Sleep(time.Duration(choose.IntN(10)) * time.Millisecond)
			response, err := lone.Get(m.url + "/health")
			if err != nil {
				t.Errorf("/health: %v", err)
				return
			}
			response.Body.Close()
		}
	}
	return m
}

func (m *modelDaemon) control(t *testing.T, path string) {
	if response, err := m.http.Post(m.url+path, "", nil); err != nil {
		t.Errorf("%s: %v", path, err)
	} else if response.Body.Close(); response.StatusCode >= 300 {
		t.Errorf("%s: %s", path, response.Status)
	}
}

// modelKind is what a process does with its input.
type modelKind int

const (
	scripted  modelKind = iota // reads lines that say what to do
	echoing                    // cat
	terminal                   // scripted, on a terminal that echoes nothing
	quick                      // does something at once, without input
	misspelt                   // a command that does not exist
	kindCount = iota
)

// modelScript prints, sets traps and ends as its input says; at the end of that it exits with 7.
const modelScript = `while read -r op a b; do case $op in
o) printf %s "$a" ;;
e) printf %s "$a" >&2 ;;
m) while [ $b -gt 0 ]; do printf %s "$a"; b=$((b-1)); done ;;
i) trap "" TERM; printf i ;;
h) trap "exit 42" TERM; printf h ;;
s) stty size; printf . ;; # the signal that comes when that is seen hits nobody but the shell
x) exit $a ;;
k) kill -$a $$ ;;
esac; done; exit 7`

const (
	modelRuns   = iota
	modelEnding // it was told to
	modelEnded  // a client has seen it
)

type modelProcess struct {
	n      int
	kind   modelKind
	pid    uint32
	tag    string // "": none
	config *pb.ProcessConfig

	state     atomic.Int32
	forgotten atomic.Bool // its tag was given to another after its end
	perhaps   atomic.Bool // the same, but it may have ended later
	replaced  atomic.Bool // its pid was given to another

	use     sync.Mutex            // held by the client that does something with it; protects what follows
	want    map[outputKind][]byte // what it prints
	total   int64                 // all of that
	partial bool                  // it may have been killed before it printed all
	closed  bool                  // its stdin
	onTERM  string                // how it ends by SIGTERM; "": it does not
	size    [2]uint32             // of its terminal
	ends    []string              // the statuses it may end with

	mu     sync.Mutex // protects what follows
	record []uint16   // of each byte that some stream had: its kind+1 and itself; 0: none had it
	length int64      // where the streams ended; -1: none has
}

func (p *modelProcess) is(state int32) bool { return p.state.Load() == state }

// expect adds to what the process will print.
func (p *modelProcess) expect(kind outputKind, text ...byte) {
	if p.kind == terminal {
		kind = ptyKind
	}
	p.want[kind] = append(p.want[kind], text...)
	p.total += int64(len(text))
}

func (p *modelProcess) String() string {
	return fmt.Sprintf("process %d (kind %d, pid %d, tag %q, state %d, %d bytes)", p.n, p.kind, p.pid, p.tag, p.state.Load(), p.total)
}

type modelWorld struct {
	t       *testing.T
	d       *modelDaemon
	seed    uint64
	counts  *modelCounts
	readers sync.WaitGroup
	tags    sync.RWMutex // held while a tag is given away; read-held during calls by pid or tag

	mu        sync.Mutex // protects what follows
	processes []*modelProcess
	trace     []string
	fault     string
}

type modelCounts struct {
	mu                                                sync.Mutex
	operations                                        map[string]int // guarded by mu
	processes, streams, broken, bytes, ends, notFound atomic.Int64
}

func (w *modelWorld) note(operation, format string, args ...any) {
	w.counts.mu.Lock()
	w.counts.operations[operation]++
	w.counts.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.trace = append(w.trace, operation+" "+fmt.Sprintf(format, args...))
}

func (w *modelWorld) fail(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fault == "" {
		w.fault = fmt.Sprintf(format, args...) + "\n  " + strings.Join(w.trace, "\n  ")
	}
}

// failOf is for what is not so once the pid is another's; that one's client may be about to learn it.
func (w *modelWorld) failOf(p *modelProcess, format string, args ...any) {
	for range 20 {
		if p.replaced.Load() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	w.fail("%v: %s", p, fmt.Sprintf(format, args...))
}

func (w *modelWorld) failed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fault != "" || w.t.Context().Err() != nil
}

func (w *modelWorld) all() []*modelProcess {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.processes)
}

// wantCode compares an error's code, and its text if one is given.
func (w *modelWorld) wantCode(what string, err error, code connect.Code, text string) {
	var failure *connect.Error
	if err == nil || !errors.As(err, &failure) || failure.Code() != code || text != "" && failure.Message() != text {
		w.fail("%s: %v, want %v: %s", what, err, code, text)
	}
}

func TestModel(t *testing.T) {
	names := []string{"left alone", "resumed now and then", "no cgroups", "frozen now and then"}
	if cgroupMount() == "" {
		names = names[:3] // nothing can be frozen
	}
	var daemons []*modelDaemon
	for _, name := range names {
		daemons = append(daemons, newModelDaemon(t, name))
	}
	ctx, stop := context.WithCancel(t.Context())
	var meddlers, worlds sync.WaitGroup
	for i, m := range daemons {
		if m.meddle != nil {
			meddlers.Go(func() {
				for choose := rand.New(rand.NewPCG(uint64(i), 5)); ctx.Err() == nil; m.meddled.Add(1) {
					m.meddle(choose)
					time.Sleep(time.Duration(20+choose.IntN(200)) * time.Millisecond)
				}
			})
		}
	}
	counts := &modelCounts{operations: map[string]int{}}
	begun := time.Now()
	var seeds atomic.Int64
	source := seedSource(15 * time.Second)
	for range 12 {
		worlds.Go(func() {
			for seed, ok := source(); ok && !t.Failed(); seed, ok = source() {
				w := &modelWorld{t: t, d: daemons[seed%uint64(len(daemons))], seed: seed, counts: counts}
				if w.run(); w.fault != "" {
					seedFailed(t, seed, fmt.Sprintf("daemon %s: %s", w.d.name, w.fault))
				}
				seeds.Add(1)
			}
		})
	}
	worlds.Wait()
	took := time.Since(begun)
	stop()
	meddlers.Wait()
	t.Logf("%d seeds in %v: %d processes, %d streams, %d of them broken by a snapshot or a reset, %d bytes compared, %d ends compared, "+
		"%d answers that a process is not there; frozen %d times, resumed %d times", seeds.Load(), took.Round(time.Millisecond),
		counts.processes.Load(), counts.streams.Load(), counts.broken.Load(), counts.bytes.Load(), counts.ends.Load(), counts.notFound.Load(),
		daemons[len(daemons)-1].meddled.Load(), daemons[1].meddled.Load())
	var operations []string
	for _, name := range slices.Sorted(maps.Keys(counts.operations)) {
		operations = append(operations, fmt.Sprintf("%s %d", name, counts.operations[name]))
	}
	t.Logf("operations: %s", strings.Join(operations, ", "))
	for _, m := range daemons {
		if !t.Failed() {
			waitFor(t, 10*time.Second, "nothing runs on the daemon "+m.name, func() bool {
				text := m.request(t, "GET", "/metrics", "", "Accept", "text/plain").body
				return len(m.list(t)) == 0 && len(m.zombies()) == 0 && strings.Contains(text, "\nenvd_processes_running 0\n") &&
					strings.Contains(text, "\nenvd_streams_open 0\n")
			})
		}
	}
}

func (w *modelWorld) run() {
	choose := rand.New(rand.NewPCG(w.seed, 31))
	var clients sync.WaitGroup
	for id := range 1 + choose.IntN(3) {
		steps := 5 + choose.IntN(15)
		clients.Go(func() {
			for step := 0; step < steps && !w.failed(); step++ {
				// Numbers of its own for each step: what one finds otherwise than the last time changes no other.
				c := &modelClient{w: w, choose: rand.New(rand.NewPCG(w.seed, uint64(id<<16|step)))}
				c.step()
			}
		})
	}
	clients.Wait()
	last := &modelClient{w: w, choose: rand.New(rand.NewPCG(w.seed, 32))}
	for _, p := range w.all() {
		last.finish(p)
	}
	if !w.failed() {
		last.call(last.list)
	}
	for _, p := range w.all() { // nothing of a seed that failed may outlive it
		if w.failed() && !p.is(modelEnded) {
			w.d.signal(w.t, byPid(p.pid), pb.Signal_SIGNAL_SIGKILL)
		}
	}
	w.readers.Wait()
}

type modelClient struct {
	w      *modelWorld
	choose *rand.Rand
}

func (c *modelClient) unary() pb.ProcessClient { return c.w.d.unary[c.choose.IntN(len(c.w.d.unary))] }

// call makes calls that must not meet a snapshot.
func (c *modelClient) call(do func()) {
	c.w.d.calls.RLock()
	defer c.w.d.calls.RUnlock()
	do()
}

func (c *modelClient) step() {
	steps := []struct {
		weight int
		do     func()
	}{
		{16, c.start}, {24, c.input}, {20, c.attach}, {6, c.list}, {5, c.closeStdin}, {8, c.signal}, {5, c.update}, {12, c.misuse},
		{8, c.catchUp}, {2, c.timeout}, {3, c.useEnded},
	}
	if len(c.w.all()) == 0 {
		steps = steps[:1]
	}
	sum := 0
	for _, s := range steps {
		sum += s.weight
	}
	for n, i := c.choose.IntN(sum), 0; ; i++ {
		if n -= steps[i].weight; n < 0 {
			c.call(steps[i].do)
			return
		}
	}
}

// hold gives a process that no other client uses, in one of the states; nil: there is none. The caller unlocks its use.
func (c *modelClient) hold(states ...int32) *modelProcess {
	all := c.w.all()
	for _, i := range c.choose.Perm(len(all)) {
		p := all[i]
		if !p.use.TryLock() {
			continue
		}
		if slices.Contains(states, p.state.Load()) {
			return p
		}
		p.use.Unlock()
	}
	return nil
}

// selector names a held process by its tag, if that is sure to mean it, or by its pid.
func (c *modelClient) selector(p *modelProcess) *pb.ProcessSelector {
	if p.tag == "" || c.choose.IntN(2) == 0 || p.perhaps.Load() {
		return byPid(p.pid)
	}
	for _, other := range c.w.all() { // oldest first
		switch {
		case other.tag != p.tag || other.forgotten.Load():
		case other == p && !p.is(modelEnding):
			if p.is(modelRuns) {
				return byTag(p.tag) // it is the oldest that runs
			}
		case other.is(modelEnded) && p.is(modelRuns):
		default:
			return byPid(p.pid)
		}
	}
	if p.is(modelRuns) {
		return byPid(p.pid)
	}
	for _, other := range c.w.all() { // p has ended: no other may bear the tag
		if other != p && other.tag == p.tag && !other.forgotten.Load() {
			return byPid(p.pid)
		}
	}
	return byTag(p.tag)
}

// ---- operations -----------------------------------------------------------------------------------------------------

var modelLetters = []byte("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/=_-.,:;")

func (c *modelClient) word(n int) string {
	text := make([]byte, 1+c.choose.IntN(n))
	for i := range text {
		text[i] = modelLetters[c.choose.IntN(len(modelLetters))]
	}
	return string(text)
}

func (c *modelClient) start() {
	w := c.w
	if len(w.all()) >= 8 {
		return
	}
	p := &modelProcess{kind: modelKind(c.choose.IntN(kindCount)), want: map[outputKind][]byte{}, onTERM: "signal: terminated", length: -1}
	p.use.Lock()
	defer p.use.Unlock()
	options := []callOption{withClient(c.unary()), withEnv("MODEL", fmt.Sprintf("%d %d", w.seed, c.choose.Uint64()))}
	var words []string
	switch p.kind {
	case scripted:
		words = sh(modelScript)
	case echoing:
		words = argv("/bin/cat")
	case terminal:
		words = sh("stty raw -echo; printf R; " + modelScript)
		p.size = [2]uint32{uint32(1 + c.choose.IntN(300)), uint32(1 + c.choose.IntN(300))}
		options = append(options, withPTY(p.size[0], p.size[1]))
		p.expect(ptyKind, 'R')
	case quick:
		out, wrong, code := c.word(3000), c.word(300), c.choose.IntN(256)
		words = sh(fmt.Sprintf("printf %%s '%s' >&2; printf %%s '%s'; exit %d", wrong, out, code))
		options = append(options, withStdin(false))
		p.expect(stdoutKind, []byte(out)...)
		p.expect(stderrKind, []byte(wrong)...)
		p.ends = []string{fmt.Sprintf("exit status %d", code)}
	case misspelt:
		words = argv("no-such-command-" + c.word(5))
		p.expect(stderrKind, []byte(words[0]+": command not found\n")...)
		p.ends = []string{"exit status 127"}
	}
	if c.choose.IntN(2) == 0 {
		p.tag = fmt.Sprintf("model %d %d", w.seed, c.choose.IntN(3))
		options = append(options, withTag(p.tag))
		w.tags.Lock()
		defer w.tags.Unlock()
	} else {
		w.tags.RLock()
		defer w.tags.RUnlock()
	}
	follow := c.reader(p, &options)
	p.config = w.d.call(w.t, words, options).request.GetProcess()
	predecessors := w.bearers(p.tag)
	s, err := w.d.open(w.t, words, options...)
	var event *pb.ProcessEvent
	if err == nil {
		if event, _ = s.receive(); event == nil {
			err = s.failure()
		}
	}
	w.note("Start", "kind %d tag %q: %v %v", p.kind, p.tag, event, err)
	if event.GetStart() == nil {
		w.fail("Start: %v, %v", event, err)
		return
	}
	p.pid = event.GetStart().GetPid()
	if len(p.ends) > 0 {
		p.state.Store(modelEnding)
	}
	w.adopt(p, predecessors)
	follow.follow(s, 0, func() bool { return p.kind == terminal && p.known() == 0 })
}

// bearers gives those that bear a tag and have ended, or may have.
func (w *modelWorld) bearers(tag string) (ended map[*modelProcess]bool) {
	ended = map[*modelProcess]bool{}
	for _, p := range w.all() {
		if tag != "" && p.tag == tag && !p.is(modelRuns) {
			ended[p] = p.is(modelEnded)
		}
	}
	return ended
}

// adopt gives a new process its tag and its pid, which others may have had.
func (w *modelWorld) adopt(p *modelProcess, predecessors map[*modelProcess]bool) {
	w.counts.processes.Add(1)
	w.d.mu.Lock()
	if old := w.d.byPid[p.pid]; old != nil {
		old.replaced.Store(true)
	}
	w.d.byPid[p.pid] = p
	w.d.mu.Unlock()
	for old, ended := range predecessors {
		old.perhaps.Store(true)
		if ended {
			old.forgotten.Store(true)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	p.n = len(w.processes)
	w.processes = append(w.processes, p)
}

// input sends a process something to do.
func (c *modelClient) input() {
	p := c.hold(modelRuns)
	if p == nil {
		return
	}
	defer p.use.Unlock()
	if p.closed || p.total > 300_000 {
		return
	}
	if p.kind == echoing {
		text := make([]byte, c.choose.IntN(40_000)>>c.choose.IntN(8))
		for i := range text {
			text[i] = byte(c.choose.Uint32())
		}
		p.expect(stdoutKind, text...)
		c.send(p, text)
		return
	}
	lines := ""
	for range c.choose.IntN(4) {
		switch c.choose.IntN(12) {
		default:
			word := c.word(300)
			lines += "o " + word + "\n"
			p.expect(stdoutKind, []byte(word)...)
		case 0, 1, 2:
			word := c.word(300)
			lines += "e " + word + "\n"
			p.expect(stderrKind, []byte(word)...)
		case 3:
			word, times := c.word(200), 1+c.choose.IntN(100)
			lines += fmt.Sprintf("m %s %d\n", word, times)
			p.expect(stdoutKind, bytes.Repeat([]byte(word), times)...)
		case 4:
			lines += "i\n"
			p.expect(stdoutKind, 'i')
			p.onTERM = ""
		case 5:
			lines += "h\n"
			p.expect(stdoutKind, 'h')
			p.onTERM = "exit status 42"
		}
	}
	end := c.choose.IntN(14)
	switch {
	case end == 0:
		code := c.choose.IntN(256)
		lines += fmt.Sprintf("x %d\n", code)
		p.ends = []string{fmt.Sprintf("exit status %d", code)}
	case end == 1:
		signals := map[int]string{1: "hangup", 2: "interrupt", 9: "killed", 10: "user defined signal 1"}
		number := slices.Sorted(maps.Keys(signals))[c.choose.IntN(4)]
		lines += fmt.Sprintf("k %d\n", number)
		p.ends = []string{"signal: " + signals[number]}
	}
	if len(p.ends) > 0 {
		p.state.Store(modelEnding)
	}
	c.send(p, []byte(lines))
}

// send writes a text to the input of a held process that runs, at once or in pieces.
func (c *modelClient) send(p *modelProcess, text []byte) {
	w := c.w
	w.tags.RLock()
	defer w.tags.RUnlock()
	input := func(part []byte) *pb.ProcessInput {
		if p.kind == terminal {
			return &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: part}}
		}
		return &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: part}}
	}
	// The last piece alone may end it: then what comes behind is not for a process that is there.
	selector := c.selector(p)
	if p.is(modelEnding) {
		selector = byPid(p.pid)
	}
	if c.choose.IntN(3) > 0 || len(text) == 0 {
		_, err := c.unary().SendInput(w.t.Context(), connect.NewRequest(&pb.SendInputRequest{Process: selector, Input: input(text)}))
		w.note("SendInput", "%v by %v: %.300q: %v", p, selector, text, err)
		if err != nil {
			w.fail("SendInput to %v by %v: %v", p, selector, err)
		}
		return
	}
	stream := c.unary().StreamInput(w.t.Context())
	err := stream.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Start{Start: &pb.StreamInputRequest_StartEvent{Process: selector}}})
	for rest := text; len(rest) > 0 && err == nil; {
		n := 1 + c.choose.IntN(len(rest))
		if n < len(rest) && c.choose.IntN(4) == 0 {
			err = stream.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Keepalive{Keepalive: &pb.StreamInputRequest_KeepAlive{}}})
		}
		if err == nil {
			err = stream.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{
				Data: &pb.StreamInputRequest_DataEvent{Input: input(rest[:n])}}})
		}
		rest = rest[n:]
	}
	if _, failure := stream.CloseAndReceive(); failure != nil {
		err = failure
	}
	w.note("StreamInput", "%v by %v: %.300q: %v", p, selector, text, err)
	if err != nil {
		w.fail("StreamInput to %v by %v: %v", p, selector, err)
	}
}

func (c *modelClient) closeStdin() {
	p := c.hold(modelRuns)
	if p == nil {
		return
	}
	defer p.use.Unlock()
	if p.kind == terminal {
		return
	}
	c.close(p)
}

func (c *modelClient) close(p *modelProcess) {
	w := c.w
	w.tags.RLock()
	defer w.tags.RUnlock()
	selector := c.selector(p)
	p.ends = []string{map[modelKind]string{scripted: "exit status 7", echoing: "exit status 0"}[p.kind]}
	p.state.Store(modelEnding)
	p.closed = true
	_, err := c.unary().CloseStdin(w.t.Context(), connect.NewRequest(&pb.CloseStdinRequest{Process: selector}))
	w.note("CloseStdin", "%v by %v: %v", p, selector, err)
	if err != nil {
		w.fail("CloseStdin of %v by %v: %v", p, selector, err)
	}
}

func (c *modelClient) signal() {
	p := c.hold(modelRuns)
	if p == nil {
		return
	}
	defer p.use.Unlock()
	c.kill(p, c.choose.IntN(2) == 0)
}

// kill sends SIGTERM or SIGKILL, at any moment, or when all has been printed: then nothing of it may be missing.
func (c *modelClient) kill(p *modelProcess, term bool) {
	w := c.w
	if p.onTERM != "signal: terminated" && term || c.choose.IntN(2) == 0 {
		c.readAll(p) // so that its trap is set
	} else {
		p.partial = true
	}
	w.tags.RLock()
	defer w.tags.RUnlock()
	selector, signal, status := c.selector(p), pb.Signal_SIGNAL_SIGKILL, "signal: killed"
	if term {
		signal, status = pb.Signal_SIGNAL_SIGTERM, p.onTERM
	}
	if status != "" {
		p.ends = []string{status}
		p.state.Store(modelEnding)
	}
	_, err := c.unary().SendSignal(w.t.Context(), connect.NewRequest(&pb.SendSignalRequest{Process: selector, Signal: signal}))
	w.note("SendSignal", "%v to %v by %v: %v", signal, p, selector, err)
	if err != nil {
		w.fail("%v to %v by %v: %v", signal, p, selector, err)
	}
}

func (c *modelClient) update() {
	p := c.hold(modelRuns)
	if p == nil {
		return
	}
	defer p.use.Unlock()
	w := c.w
	request := &pb.UpdateRequest{}
	if c.choose.IntN(5) > 0 {
		request.Pty = &pb.PTY{Size: &pb.PTY_Size{Cols: uint32(1 + c.choose.IntN(300)), Rows: uint32(1 + c.choose.IntN(300))}}
	}
	w.tags.RLock()
	request.Process = c.selector(p)
	_, err := c.unary().Update(w.t.Context(), connect.NewRequest(request))
	w.tags.RUnlock()
	w.note("Update", "%v: %v", request, err)
	switch {
	case request.Pty == nil || p.kind == terminal:
		if err != nil {
			w.fail("Update of %v by %v: %v", p, request.Process, err)
			return
		}
	default:
		w.wantCode("Update of what has no terminal", err, connect.CodeInternal, "error resizing tty: tty not assigned to process")
	}
	if p.kind == terminal {
		if request.Pty != nil {
			p.size = [2]uint32{request.Pty.Size.Cols, request.Pty.Size.Rows}
		}
		p.expect(ptyKind, fmt.Appendf(nil, "%d %d\n.", p.size[1], p.size[0])...)
		c.send(p, []byte("s\n"))
		c.readAll(p) // before another size
	}
}

// list compares who runs. What starts or ends meanwhile may be there or not.
func (c *modelClient) list() {
	w := c.w
	before := map[*modelProcess]int32{}
	for _, p := range w.all() {
		before[p] = p.state.Load()
	}
	response, err := c.unary().List(w.t.Context(), connect.NewRequest(&pb.ListRequest{}))
	w.note("List", "%v", err)
	if err != nil {
		w.fail("List: %v", err)
		return
	}
	for p, state := range before {
		i := slices.IndexFunc(response.Msg.GetProcesses(), func(info *pb.ProcessInfo) bool {
			return info.GetPid() == p.pid && info.GetConfig().GetEnvs()["MODEL"] == p.config.GetEnvs()["MODEL"]
		})
		switch {
		case i < 0 && state == modelRuns && p.is(modelRuns):
			w.fail("%v is not listed", p)
		case i >= 0 && state == modelEnded:
			w.fail("%v is listed, but it has ended", p)
		case i >= 0:
			info := response.Msg.GetProcesses()[i]
			if !proto.Equal(info.GetConfig(), p.config) || info.GetTag() != p.tag || (info.Tag != nil) != (p.tag != "") {
				w.fail("%v is listed as %v, want %v", p, info, p.config)
			}
		}
	}
}

// timeout starts something for which there is too little time.
func (c *modelClient) timeout() {
	w := c.w
	p := &modelProcess{want: map[outputKind][]byte{}, kind: quick, ends: []string{"signal: killed"}, length: -1}
	p.use.Lock()
	defer p.use.Unlock()
	client := c.w.d.unary[len(c.w.d.unary)-1] // its protocol is Connect, which the header is of
	options := []callOption{withClient(client), withTimeoutMs(1 + c.choose.IntN(60)), withEnv("MODEL", fmt.Sprint(w.seed, c.choose.Uint64()))}
	p.config = w.d.call(w.t, argv("/bin/sleep", "1000"), options).request.GetProcess()
	s, err := w.d.open(w.t, argv("/bin/sleep", "1000"), options...)
	var r runResult
	if err == nil {
		r = s.collect()
		err = r.err
	}
	w.note("Start with a timeout", "pid %d: %v", r.pid, err)
	w.wantCode("Start with a timeout", err, connect.CodeDeadlineExceeded, "")
	if r.ends > 0 {
		w.fail("a timeout ended with %v", r.end)
	}
	if r.pid != 0 {
		p.pid = r.pid
		p.state.Store(modelEnding)
		w.adopt(p, nil)
	}
}

// misuse calls what cannot be done, and compares what it is answered.
func (c *modelClient) misuse() {
	w, ctx := c.w, c.w.t.Context()
	const nobody = 1 << 22 // beyond every pid_max
	client := c.unary()
	stdin := &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte("x")}}
	pty := &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("x")}}
	sendTo := func(selector *pb.ProcessSelector, input *pb.ProcessInput) error {
		_, err := client.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: selector, Input: input}))
		return err
	}
	signal := func(selector *pb.ProcessSelector, signal pb.Signal) error {
		_, err := client.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{Process: selector, Signal: signal}))
		return err
	}
	which := c.choose.IntN(12)
	w.note("misuse", "%d", which)
	switch which {
	case 0:
		w.wantCode("SendInput to nobody", sendTo(byPid(nobody), stdin), connect.CodeNotFound, fmt.Sprintf("process with pid %d not found", nobody))
		return
	case 1:
		w.wantCode("SendSignal to nobody", signal(byTag("nobody's"), pb.Signal_SIGNAL_SIGKILL), connect.CodeNotFound, "process with tag nobody's not found")
		return
	case 2:
		w.wantCode("SendSignal without a selector", signal(nil, pb.Signal_SIGNAL_SIGKILL), connect.CodeInvalidArgument,
			"invalid input type *process.ProcessSelector")
		return
	case 3:
		_, err := w.d.openConnect(w.t, byPid(nobody), withClient(client))
		if err == nil {
			s, _ := w.d.openConnect(w.t, byPid(nobody), withClient(client))
			s.next()
			err = s.failure()
			s.drop()
		}
		w.wantCode("Connect to nobody", err, connect.CodeNotFound, fmt.Sprintf("process with pid %d not found", nobody))
		return
	case 4:
		s, err := w.d.open(w.t, argv("true"), withCwd("/no/such"), withClient(client))
		if err == nil {
			s.next()
			err = s.failure()
			s.drop()
		}
		w.wantCode("Start in no directory", err, connect.CodeInvalidArgument, "cwd '/no/such' does not exist")
		return
	case 5:
		stream := client.StreamInput(ctx)
		stream.Send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{Input: stdin}}})
		_, err := stream.CloseAndReceive()
		w.wantCode("StreamInput to nobody", err, connect.CodeFailedPrecondition, "no start event received")
		return
	}
	p := c.hold(modelRuns)
	if p == nil {
		return
	}
	defer p.use.Unlock()
	w.tags.RLock()
	defer w.tags.RUnlock()
	selector := c.selector(p)
	switch {
	case which < 8:
		w.wantCode("SendSignal of no signal", signal(selector, pb.Signal_SIGNAL_UNSPECIFIED), connect.CodeInvalidArgument,
			"invalid signal: SIGNAL_UNSPECIFIED")
	case which < 9:
		w.wantCode("SendInput of nothing", sendTo(selector, nil), connect.CodeInvalidArgument, "invalid input type <nil>")
	case p.kind == terminal && which < 11:
		w.wantCode("stdin to a terminal", sendTo(selector, stdin), connect.CodeInternal,
			fmt.Sprintf("error writing to stdin: tty assigned to process %d, which takes its input as pty", p.pid))
	case p.kind == terminal:
		_, err := client.CloseStdin(ctx, connect.NewRequest(&pb.CloseStdinRequest{Process: selector}))
		w.wantCode("CloseStdin of a terminal", err, connect.CodeFailedPrecondition,
			"error closing stdin: cannot close stdin for PTY process — send Ctrl+D (0x04) instead")
	default:
		w.wantCode("pty to what has none", sendTo(selector, pty), connect.CodeInternal,
			fmt.Sprintf("error writing to tty: tty not assigned to process %d, which takes its input as stdin", p.pid))
	}
}

// useEnded calls what only a running process takes.
func (c *modelClient) useEnded() {
	if p := c.hold(modelEnded); p != nil {
		c.ended(p)
		p.use.Unlock()
	}
}

func (c *modelClient) ended(p *modelProcess) {
	w, ctx, client := c.w, c.w.t.Context(), c.unary()
	forgotten := p.forgotten.Load()
	var err error
	switch c.choose.IntN(4) {
	case 0:
		_, err = client.SendInput(ctx, connect.NewRequest(&pb.SendInputRequest{Process: byPid(p.pid), Input: &pb.ProcessInput{}}))
	case 1:
		_, err = client.CloseStdin(ctx, connect.NewRequest(&pb.CloseStdinRequest{Process: byPid(p.pid)}))
	case 2:
		_, err = client.SendSignal(ctx, connect.NewRequest(&pb.SendSignalRequest{Process: byPid(p.pid), Signal: pb.Signal_SIGNAL_UNSPECIFIED}))
		if connect.CodeOf(err) == connect.CodeInvalidArgument && !forgotten {
			return // it is known, and the signal comes first
		}
	case 3:
		_, err = client.Update(ctx, connect.NewRequest(&pb.UpdateRequest{Process: byPid(p.pid)}))
	}
	w.note("call to the ended", "%v: %v", p, err)
	w.counts.notFound.Add(1)
	if want := fmt.Sprintf("process with pid %d not found", p.pid); connect.CodeOf(err) != connect.CodeNotFound || !strings.HasSuffix(err.Error(), want) {
		w.failOf(p, "%v, want that it is not found", err)
	}
}

// ---- streams ----------------------------------------------------------------------------------------------------------

// modelFollower follows a process in its own way.
type modelFollower struct {
	c          *modelClient
	p          *modelProcess
	choose     *rand.Rand
	extensions bool
	keepalives bool
	leave      int // after so many events; -1: not before the end
}

// reader makes one, and adds what its stream asks for to the options.
func (c *modelClient) reader(p *modelProcess, options *[]callOption) *modelFollower {
	f := &modelFollower{c: c, p: p, choose: rand.New(rand.NewPCG(c.choose.Uint64(), 1)), leave: -1,
		extensions: c.choose.IntN(3) == 0, keepalives: c.choose.IntN(8) == 0}
	if c.choose.IntN(3) == 0 {
		f.leave = c.choose.IntN(6)
	}
	if f.extensions {
		*options = append(*options, withExtensions())
	}
	if f.keepalives {
		*options = append(*options, withKeepalive(1))
	}
	return f
}

// attach connects to a process, from anywhere in its output.
func (c *modelClient) attach() {
	p := c.hold(modelRuns, modelEnding, modelEnded)
	if p == nil {
		return
	}
	defer p.use.Unlock()
	w := c.w
	known := p.known()
	from, offset := "all", int64(0)
	switch c.choose.IntN(10) {
	case 0, 1, 2:
		offset = c.choose.Int64N(known + 1)
		from = fmt.Sprint(offset)
	case 3:
		from = ""
	case 4:
		from = "new"
	case 5:
		from = fmt.Sprint(p.total + 1 + c.choose.Int64N(1000))
	case 6:
		from = []string{"x", "-1", "1.5", "99999999999999999999"}[c.choose.IntN(4)]
	}
	s, follow, err := c.open(p, from)
	bad := from != "" && from != "all" && from != "new"
	if n, failure := strconv.ParseInt(from, 10, 64); failure == nil && n >= 0 && n <= p.total {
		bad = false
	}
	switch {
	case connect.CodeOf(err) == connect.CodeNotFound && err != nil:
		if !p.perhaps.Load() && !p.forgotten.Load() {
			w.failOf(p, "Connect: %v", err)
		}
		w.counts.notFound.Add(1)
	case p.forgotten.Load():
		w.failOf(p, "Connect: %v, although its tag is another's", err)
		if err == nil {
			s.drop()
		}
	case bad:
		if connect.CodeOf(err) != connect.CodeInvalidArgument || err == nil {
			w.fail("Connect to %v from %q: %v", p, from, err)
		}
	case err != nil:
		w.fail("Connect to %v from %q: %v", p, from, err)
	default:
		at, failure := strconv.ParseInt(s.header.Get("Envd-Output-Offset"), 10, 64)
		wrong := failure != nil || at > p.total || s.header.Get("Envd-Output-Lost") != "0"
		if from == "new" {
			wrong = wrong || at < known
		} else if from != "" {
			wrong = wrong || at != offset
		}
		if wrong {
			w.failOf(p, "Connect from %q: %v; %d bytes are known", from, s.header, known)
		}
		follow.follow(s, at, nil)
	}
}

// open begins a stream and reads its start event.
func (c *modelClient) open(p *modelProcess, from string) (*clientStream, *modelFollower, error) {
	w := c.w
	client := w.d.clients[c.choose.IntN(len(w.d.clients))]
	if w.d.breaks {
		client = c.unary()
	}
	options := []callOption{withClient(client)}
	if from != "" {
		options = append(options, withOutputFrom(from))
	}
	f := c.reader(p, &options)
	w.tags.RLock()
	defer w.tags.RUnlock()
	selector := c.selector(p)
	s, err := w.d.openConnect(w.t, selector, options...)
	if err == nil {
		event := s.next()
		if event == nil {
			err = cmp.Or(s.failure(), errors.New("an empty stream"))
			s.drop()
		} else if event.GetStart().GetPid() != p.pid {
			w.fail("Connect to %v by %v: %v", p, selector, event)
		}
	}
	w.note("Connect", "%v by %v from %q: %v", p, selector, from, err)
	return s, f, err
}

// follow reads a stream beside everything else; as long as the condition holds, before it returns.
func (f *modelFollower) follow(s *clientStream, at int64, here func() bool) {
	w := f.c.w
	w.counts.streams.Add(1)
	for here != nil && here() && !w.failed() {
		if !f.event(s.next(), &at) {
			w.fail("%v: the stream ended at %d: %v", f.p, at, s.failure())
		}
	}
	w.readers.Go(func() {
		defer func() { s.drop() }()
		for events := 0; !w.failed(); events++ {
			if events == f.leave {
				return
			}
			if f.choose.IntN(10) == 0 {
				time.Sleep(time.Duration(f.choose.IntN(3000)) * time.Microsecond)
			}
			event := s.next()
			if event == nil && w.d.breaks {
				w.counts.broken.Add(1)
				s.drop()
				if f.leave >= 0 || f.p.forgotten.Load() || f.p.perhaps.Load() {
					return
				}
				var err error
				f.c.call(func() { s, _, err = f.resume(at) })
				if err != nil {
					if connect.CodeOf(err) != connect.CodeNotFound || !f.p.forgotten.Load() && !f.p.perhaps.Load() {
						w.failOf(f.p, "resuming at %d: %v", at, err)
					}
					s = &clientStream{drop: func() {}}
					return
				}
				continue
			}
			if event.GetEnd() != nil {
				f.end(event.GetEnd(), at)
				if again := s.next(); again != nil || s.failure() != nil && !w.d.breaks {
					w.fail("%v: after its end %v, %v", f.p, again, s.failure())
				}
				return
			}
			if !f.event(event, &at) {
				w.fail("%v: the stream ended at %d: %v", f.p, at, s.failure())
				return
			}
		}
	})
}

// resume comes back at an offset, with options of the same kind.
func (f *modelFollower) resume(at int64) (s *clientStream, _ *modelFollower, err error) {
	w := f.c.w
	options := []callOption{withOutputFrom(fmt.Sprint(at)), withClient(w.d.unary[f.choose.IntN(len(w.d.unary))])}
	if f.extensions {
		options = append(options, withExtensions())
	}
	if f.keepalives {
		options = append(options, withKeepalive(1))
	}
	s, err = w.d.openConnect(w.t, byPid(f.p.pid), options...)
	if err == nil {
		if event := s.next(); event.GetStart() == nil {
			err = cmp.Or(s.failure(), errors.New("an empty stream"))
			s.drop()
		} else if s.header.Get("Envd-Output-Offset") != fmt.Sprint(at) || s.header.Get("Envd-Output-Lost") != "0" {
			w.failOf(f.p, "resumed at %d: %v", at, s.header)
		}
	}
	w.note("resume", "%v at %d: %v", f.p.n, at, err)
	return s, f, err
}

// event compares one that is not the last.
func (f *modelFollower) event(event *pb.ProcessEvent, at *int64) (ok bool) {
	w := f.c.w
	switch data := event.GetData(); {
	case event == nil:
		return false
	case event.GetKeepalive() != nil:
		if !f.keepalives {
			w.fail("%v: a keep-alive that nobody asked for", f.p)
		}
	case len(data.GetStdout()) > 0:
		f.data(at, stdoutKind, data.GetStdout())
	case len(data.GetStderr()) > 0:
		f.data(at, stderrKind, data.GetStderr())
	case len(data.GetPty()) > 0:
		f.data(at, ptyKind, data.GetPty())
	default:
		w.fail("%v: %v", f.p, event)
	}
	return true
}

func (f *modelFollower) data(at *int64, kind outputKind, data []byte) {
	p := f.p
	f.c.w.counts.bytes.Add(int64(len(data)))
	p.mu.Lock()
	defer p.mu.Unlock()
	if missing := int(*at) + len(data) - len(p.record); missing > 0 {
		p.record = append(p.record, make([]uint16, missing)...)
	}
	for i, b := range data {
		value := uint16(kind+1)<<8 | uint16(b)
		if had := &p.record[int(*at)+i]; *had == 0 {
			*had = value
		} else if *had != value {
			f.c.w.fail("process %d: the byte at %d is %#x, in another stream %#x", p.n, *at+int64(i), value, *had)
			return
		}
	}
	*at += int64(len(data))
}

// known is how many bytes some stream had.
func (p *modelProcess) known() int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return int64(len(p.record))
}

// end compares how a process ended. What ends is allowed is complete before anything ends it.
func (f *modelFollower) end(end *pb.ProcessEvent_EndEvent, at int64) {
	p, w := f.p, f.c.w
	w.counts.ends.Add(1)
	p.mu.Lock()
	if p.length < 0 {
		p.length = at
	}
	length := p.length
	p.mu.Unlock()
	if at != length || at < p.known() {
		w.failOf(p, "the end at %d; another stream ended at %d, %d bytes are known", at, length, p.known())
	}
	if p.is(modelRuns) {
		w.failOf(p, "it ended by itself: %v", end)
	}
	if !slices.Contains(p.ends, end.GetStatus()) {
		w.failOf(p, "%v, want one of %q", end, p.ends)
	}
	code, exited := -1, false
	if number, ok := strings.CutPrefix(end.GetStatus(), "exit status "); ok {
		code, _ = strconv.Atoi(number)
		exited = true
	}
	if int(end.GetExitCode()) != code || end.GetExited() != exited || (end.Error != nil) != (code != 0) || code != 0 && end.GetError() != end.GetStatus() {
		w.failOf(p, "inconsistent: %v", end)
	}
	if f.extensions != (end.GetStartTime() != nil && end.GetEndTime() != nil) || !f.extensions && (end.Signal != 0 || end.CpuUserUs != 0) ||
		f.extensions && (end.Signal == 0) != exited {
		w.failOf(p, "extensions asked for: %v, given: %v", f.extensions, end)
	}
	p.state.Store(modelEnded)
}

// catchUp reads what a process has printed, all of it and no more.
func (c *modelClient) catchUp() {
	if p := c.hold(modelRuns); p != nil {
		c.readAll(p)
		p.use.Unlock()
	}
}

func (c *modelClient) readAll(p *modelProcess) {
	w := c.w
	at := c.choose.Int64N(p.known() + 1)
	s, f, err := c.open(p, fmt.Sprint(at))
	if err != nil {
		w.failOf(p, "Connect from %d: %v", at, err)
		return
	}
	defer s.drop()
	for at < p.total && !w.failed() {
		if event := s.next(); event.GetEnd() != nil || !f.event(event, &at) {
			w.failOf(p, "%v at %d: %v", event, at, s.failure())
		}
	}
	if at != p.total {
		w.failOf(p, "it printed %d bytes, want %d", at, p.total)
	}
}

// finish ends a process, reads all of it, and compares.
func (c *modelClient) finish(p *modelProcess) {
	w := c.w
	if w.failed() {
		return
	}
	p.use.Lock()
	defer p.use.Unlock()
	c.call(func() {
		switch choice := c.choose.IntN(3); {
		case !p.is(modelRuns):
		case choice == 0 && p.kind != terminal:
			c.close(p)
		case choice == 1 && p.onTERM != "":
			c.kill(p, true)
		default:
			c.kill(p, false)
		}
	})
	var at int64
	for broken := 0; !w.failed(); broken++ {
		var s *clientStream
		var f *modelFollower
		var err error
		c.call(func() { s, f, err = c.open(p, fmt.Sprint(at)) })
		switch {
		case err != nil && connect.CodeOf(err) == connect.CodeNotFound && (p.forgotten.Load() || p.perhaps.Load()):
			w.counts.notFound.Add(1)
			p.state.Store(modelEnded)
			return
		case err != nil:
			w.failOf(p, "Connect after the end: %v", err)
			return
		}
		event := s.next()
		for ; event != nil && event.GetEnd() == nil; event = s.next() {
			f.event(event, &at)
		}
		s.drop()
		if event.GetEnd() != nil {
			f.end(event.GetEnd(), at)
			break
		}
		w.counts.broken.Add(1)
		if !w.d.breaks || broken > 1000 {
			w.failOf(p, "the stream ended at %d: %v", at, s.failure())
		}
	}
	got := map[outputKind][]byte{}
	p.mu.Lock()
	for _, value := range p.record {
		kind := outputKind(value>>8) - 1
		got[kind] = append(got[kind], byte(value))
	}
	p.mu.Unlock()
	for _, kind := range []outputKind{stdoutKind, stderrKind, ptyKind} {
		if !bytes.Equal(got[kind], p.want[kind]) && !(p.partial && bytes.HasPrefix(p.want[kind], got[kind])) {
			w.failOf(p, "it printed %d bytes of kind %d, want %d: %.100q, want %.100q", len(got[kind]), kind, len(p.want[kind]), got[kind], p.want[kind])
		}
	}
	c.call(func() { c.ended(p) })
}
