// The Process service: from a request to a process, from a process to its clients.
//
// A process is in one of two tables: running, by pid; or ended, kept for a while so that clients that lost their stream
// can come back for output and exit status. It moves when it has been reaped. The poller fills its output log and sees
// its end; a goroutine of its own it has only while background children hold its output open.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "envd/proto"
)

type processOptions struct {
	endSilence, endGrace    time.Duration
	retainTime              time.Duration
	retainCount             int
	maxProcesses            int
	stallAlone, stallShared time.Duration
	keepAlive               time.Duration
	path                    string // PATH of children, unless a variable says otherwise
}

type processService struct {
	processOptions
	users    *userDB
	settings *settings
	spawner  *spawner
	poller   *poller
	memory   *outputMemory
	stopping <-chan struct{}

	mu      sync.Mutex // protects the tables and the count
	running map[uint32]*process
	ended   []*process // oldest first
	count   int        // running ones and those being started
}

type process struct {
	config   *pb.ProcessConfig
	tag      *string
	pid      uint32
	child    *child
	log      *outputLog
	outputs  []*outputPipe
	terminal bool
	input    *inputPipe // nil: /dev/null
	started  time.Time
	signaled atomic.Bool // by a client or its timeout: then nobody waits for background children
	timedOut atomic.Bool
	timeout  *time.Timer
	open     atomic.Int32              // outputs that have not been read to their end
	eof      chan struct{}             // closed when there are none
	end      *pb.ProcessEvent_EndEvent // set before the log is finished
}

// tick is called about once a second.
func (s *processService) tick(now time.Time) {
	s.memory.cutStalled(now, s.stallAlone, s.stallShared)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropEndedLocked(func(p *process) bool { return now.Sub(p.child.end) > s.retainTime })
}

func (s *processService) List(context.Context, *connect.Request[pb.ListRequest]) (*connect.Response[pb.ListResponse], error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	res := &pb.ListResponse{}
	for _, p := range s.running {
		res.Processes = append(res.Processes, &pb.ProcessInfo{Config: p.config, Pid: p.pid, Tag: p.tag})
	}
	return connect.NewResponse(res), nil
}

func (s *processService) Start(ctx context.Context, req *connect.Request[pb.StartRequest], stream *connect.ServerStream[pb.StartResponse]) error {
	p, sub, err := s.start(ctx, req.Msg)
	if err != nil {
		return err
	}
	f := follower{s, ctx, p, sub, req.Header(), true}
	res := &pb.StartResponse{}
	return f.run(stream.ResponseHeader(), 0, func(event *pb.ProcessEvent) error {
		res.Event = event
		return stream.Send(res)
	})
}

func (s *processService) Connect(ctx context.Context, req *connect.Request[pb.ConnectRequest], stream *connect.ServerStream[pb.ConnectResponse]) error {
	p, err := s.find(req.Msg.GetProcess(), true)
	if err != nil {
		return err
	}
	from, err := outputFrom(req.Header().Get("Envd-Output-From"))
	if err != nil {
		return err
	}
	sub, lost, ok := p.log.subscribe(from, requestOf(ctx).breakStream)
	if !ok {
		return wireError(connect.CodeInvalidArgument, "Envd-Output-From: offset %d is past the end of the output", from)
	}
	f := follower{s, ctx, p, sub, req.Header(), false}
	res := &pb.ConnectResponse{}
	return f.run(stream.ResponseHeader(), lost, func(event *pb.ProcessEvent) error {
		res.Event = event
		return stream.Send(res)
	})
}

// outputFrom reads the header Envd-Output-From.
func outputFrom(value string) (int64, error) {
	switch value {
	case "":
		return fromUnsent, nil
	case "new":
		return fromNow, nil
	case "all":
		return 0, nil
	}
	offset, err := strconv.ParseUint(value, 10, 63)
	if err != nil {
		return 0, wireError(connect.CodeInvalidArgument, "Envd-Output-From: %q is none of an offset, all, new", value)
	}
	return int64(offset), nil
}

// follower sends a process to one client: start, output, end. Its goroutine is the only one that writes to the stream.
type follower struct {
	service *processService
	ctx     context.Context
	p       *process
	sub     *subscriber
	request http.Header
	starter bool // this stream's deadline is the process's
}

func (f *follower) run(response http.Header, lost int64, send func(*pb.ProcessEvent) error) error {
	defer f.sub.detach()
	response.Set("Envd-Output-Offset", strconv.FormatInt(f.sub.pos, 10))
	response.Set("Envd-Output-Lost", strconv.FormatInt(lost, 10))
	start := &pb.ProcessEvent_StartEvent{Pid: f.p.pid}
	if err := send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Start{Start: start}}); err != nil {
		return err
	}
	interval := keepAliveInterval(f.request, f.service.keepAlive)
	keepAlive := time.NewTimer(interval)
	defer keepAlive.Stop()
	ctxDone := f.ctx.Done()
	var lastWords <-chan time.Time // runs from the starter's deadline until its stream must end
	for {
		kind, data, done, cut := f.sub.next()
		switch {
		case cut:
			return wireError(connect.CodeAborted, "the client has not taken output for too long; resume by offset")
		case done && f.starter && f.p.timedOut.Load():
			return context.DeadlineExceeded
		case done:
			requestOf(f.ctx).keepFlush()
			return send(&pb.ProcessEvent{Event: &pb.ProcessEvent_End{End: f.p.endFor(f.request)}})
		case data != nil && !f.starter && f.ctx.Err() != nil:
			return f.ctx.Err()
		case data != nil:
			if err := send(dataEvent(kind, data)); err != nil {
				return err
			}
			f.sub.sent(len(data))
			keepAlive.Reset(interval)
			continue
		}
		select {
		case <-f.sub.notify:
		case <-keepAlive.C:
			if err := send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Keepalive{Keepalive: &pb.ProcessEvent_KeepAlive{}}}); err != nil {
				return err
			}
			keepAlive.Reset(interval)
		case <-ctxDone:
			if !f.starter || !errors.Is(f.ctx.Err(), context.DeadlineExceeded) {
				return f.ctx.Err()
			}
			// The process is being killed. What it wrote before goes out first.
			ctxDone, lastWords = nil, time.After(time.Second)
		case <-lastWords:
			return context.DeadlineExceeded
		case <-f.service.stopping:
			return wireError(connect.CodeUnavailable, "envd is stopping")
		}
	}
}

func dataEvent(kind outputKind, data []byte) *pb.ProcessEvent {
	event := &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Pty{Pty: data}}
	switch kind {
	case stdoutKind:
		event.Output = &pb.ProcessEvent_DataEvent_Stdout{Stdout: data}
	case stderrKind:
		event.Output = &pb.ProcessEvent_DataEvent_Stderr{Stderr: data}
	}
	return &pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: event}}
}

// endFor strips what the client has not asked for.
func (p *process) endFor(header http.Header) *pb.ProcessEvent_EndEvent {
	if header.Get("Envd-Extensions") == "1" {
		return p.end
	}
	return &pb.ProcessEvent_EndEvent{ExitCode: p.end.ExitCode, Exited: p.end.Exited, Status: p.end.Status, Error: p.end.Error}
}

// keepAliveInterval reads Keepalive-Ping-Interval, in seconds.
func keepAliveInterval(header http.Header, standard time.Duration) time.Duration {
	seconds, err := strconv.ParseInt(header.Get("Keepalive-Ping-Interval"), 10, 64)
	if err != nil || seconds <= 0 {
		return standard
	}
	return time.Duration(min(seconds, 86400)) * time.Second
}

// plan says what a request means: what to start, as whom and where.
func (s *processService) plan(ctx context.Context, req *pb.StartRequest) (*spawnSpec, error) {
	config := req.GetProcess()
	if config == nil {
		return nil, wireError(connect.CodeInvalidArgument, "process config required")
	}
	defaultUser, defaultWorkdir := s.settings.defaults()
	user, err := actingUser(ctx, s.users, defaultUser)
	if err != nil {
		return nil, wireError(connect.CodeUnauthenticated, "%w", err)
	}
	if euid := os.Geteuid(); euid != 0 && uint32(euid) != user.uid {
		return nil, wireError(connect.CodePermissionDenied,
			"cannot act as user '%s': envd runs as uid %d and can start processes only for it", user.name, euid)
	}
	dir, err := resolvePath(config.GetCwd(), user.home, defaultWorkdir)
	if err != nil {
		return nil, wireError(connect.CodeInvalidArgument, "failed to expand path '%s' for user '%s': %w", config.GetCwd(), user.name, err)
	}
	// What every process has, then the global variables, then the request's own; later ones win.
	env := map[string]string{"PATH": s.path, "HOME": user.home, "USER": user.name, "LOGNAME": user.name, "PWD": dir}
	maps.Copy(env, s.settings.environment())
	maps.Copy(env, config.GetEnvs())
	spec := &spawnSpec{argv: append([]string{config.GetCmd()}, config.GetArgs()...), dir: dir, user: user,
		fds: [3]int{-1, -1, -1}, terminal: req.Pty != nil}
	for name, value := range env {
		spec.env = append(spec.env, name+"="+value)
	}
	for _, text := range slices.Concat(spec.argv, spec.env, []string{dir}) {
		if strings.IndexByte(text, 0) >= 0 {
			return nil, startError(req, dir, errors.New("a NUL byte in the command, its arguments, variables or directory"))
		}
	}
	return spec, ctx.Err()
}

// start starts a request's process and subscribes to all of its output.
func (s *processService) start(ctx context.Context, req *pb.StartRequest) (_ *process, _ *subscriber, err error) {
	spec, err := s.plan(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	p := &process{config: req.Process, tag: req.Tag, terminal: req.Pty != nil, log: s.memory.newLog(), started: time.Now(), eof: make(chan struct{})}
	// Subscribed before anything runs: no byte is older than the stream.
	sub, _, _ := p.log.subscribe(0, requestOf(ctx).breakStream)
	if !s.admit(1) {
		err = errTooManyProcesses
	} else if err = p.openFiles(req, spec, s.poller); err != nil {
		spec.closeFds()
	} else {
		p.child, err = s.spawner.start(ctx, spec)
	}
	if err != nil {
		s.admit(-1)
		sub.detach()
		for _, out := range p.outputs {
			out.close()
		}
		if p.input != nil {
			p.input.close()
		}
		p.log.finish()
		p.log.forget()
		return nil, nil, startError(req, spec.dir, err)
	}
	p.pid = uint32(p.child.pid())
	s.mu.Lock()
	s.dropEndedLocked(func(o *process) bool {
		return o.pid == p.pid || p.tag != nil && o.tag != nil && *o.tag == *p.tag
	})
	s.running[p.pid] = p
	s.mu.Unlock()
	if deadline, ok := ctx.Deadline(); ok {
		p.timeout = time.AfterFunc(time.Until(deadline), func() {
			p.timedOut.Store(true)
			s.signal(p, syscall.SIGKILL)
		})
	}
	s.spawner.awaitExit(p.child, func() { s.exited(p) })
	slog.Debug("process started", "logger", "process", "event_type", "process_start", "pid", p.pid, "username", spec.user.name)
	return p, sub, nil
}

// admit counts running processes, those that are being started among them.
func (s *processService) admit(n int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count += n
	return s.count <= s.maxProcesses
}

var errTooManyProcesses = errors.New("too many processes are running (--max-processes)")

// startError is the wire error for a process that could not be started.
func startError(req *pb.StartRequest, dir string, err error) error {
	var launch *launchError
	code := connect.CodeInvalidArgument
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, errLaunchTimeout):
		code = connect.CodeDeadlineExceeded
	case isExhausted(err):
		code = connect.CodeResourceExhausted
	case errors.As(err, &launch) && launch.stage == "chdir":
		if launch.errno == syscall.ENOENT {
			return wireError(code, "cwd '%s' does not exist", dir)
		}
		err = &os.PathError{Op: "chdir", Path: dir, Err: launch.errno}
	case launch != nil:
		code = connect.CodeInternal
	}
	command := strings.Join(append([]string{req.GetProcess().GetCmd()}, req.GetProcess().GetArgs()...), " ")
	if req.Pty != nil {
		return wireError(code, "error starting pty with command '%s' in dir '%s' with '%d' cols and '%d' rows: %w",
			command, dir, req.Pty.GetSize().GetCols(), req.Pty.GetSize().GetRows(), err)
	}
	return wireError(code, "error starting process '%s': %w", command, err)
}

// isExhausted tells a lack of descriptors, memory or processes from other errors.
func isExhausted(err error) bool {
	return errors.Is(err, errTooManyProcesses) || errors.Is(err, errTooManyLaunches) || errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) ||
		errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.EAGAIN) || errors.Is(err, syscall.ENOSPC)
}

// openFiles makes the process's side of stdin, stdout and stderr, or its terminal, and the daemon's side of them.
func (p *process) openFiles(req *pb.StartRequest, spec *spawnSpec, poller *poller) (err error) {
	output := func(kind outputKind, fd int) error {
		unix.SetNonblock(fd, true)
		out, err := newOutputPipe(kind, fd, p.log, poller, p.outputAtEnd)
		p.outputs = append(p.outputs, out)
		p.open.Add(1)
		return err
	}
	if req.Pty != nil {
		size := req.Pty.GetSize()
		master, slave, err := openPTY(size.GetCols(), size.GetRows(), int(spec.user.uid))
		if err != nil {
			return err
		}
		spec.fds[0] = slave
		if err := output(ptyKind, master); err != nil {
			return err
		}
		for i := 1; i < 3; i++ {
			if spec.fds[i], err = dup(slave); err != nil {
				return err
			}
		}
		// A descriptor of its own, so that the two sides can be closed one without the other.
		fd, err := dup(master)
		if err != nil {
			return err
		}
		p.input = newInputPipe(fd)
		return nil
	}
	if req.Stdin == nil || req.GetStdin() {
		read, write, err := pipe(spec.user)
		if err != nil {
			return err
		}
		spec.fds[0], p.input = read, newInputPipe(write)
	} else if spec.fds[0], err = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return &os.PathError{Op: "open", Path: "/dev/null", Err: err}
	}
	for i, kind := range []outputKind{stdoutKind, stderrKind} {
		read, write, err := pipe(spec.user)
		if err != nil {
			return err
		}
		spec.fds[1+i] = write
		if err := output(kind, read); err != nil {
			return err
		}
	}
	return nil
}

func (p *process) outputAtEnd() {
	if p.open.Add(-1) == 0 {
		close(p.eof)
	}
}

// dropEndedLocked forgets ended processes; streams that still follow one are served to their end.
func (s *processService) dropEndedLocked(which func(*process) bool) {
	s.ended = slices.DeleteFunc(s.ended, func(p *process) bool {
		if which(p) {
			p.log.forget()
			return true
		}
		return false
	})
}

// exited carries a process on from its exit. It runs on the poller's goroutine: what the process wrote has been, or is
// here, read before, so that as a rule the process has ended, too.
func (s *processService) exited(p *process) {
	if p.timeout != nil {
		p.timeout.Stop()
	}
	targets := make([]int64, len(p.outputs))
	for i, out := range p.outputs {
		targets[i] = out.drain()
	}
	s.mu.Lock()
	if s.running[p.pid] == p { // else the pid has a new owner
		delete(s.running, p.pid)
	}
	p.config = nil // may be large
	s.count--
	if s.ended = append(s.ended, p); len(s.ended) > s.retainCount {
		s.ended[0].log.forget()
		s.ended = slices.Delete(s.ended, 0, 1)
	}
	s.mu.Unlock()
	if p.input != nil {
		p.input.close()
	}
	if p.open.Load() == 0 {
		s.finish(p)
		return
	}
	go func() {
		p.linger(targets, s.endSilence, s.endGrace)
		s.finish(p)
	}()
}

// finish makes the `end`.
func (s *processService) finish(p *process) {
	p.end = endEvent(p.child)
	p.end.StartTime, p.end.EndTime = timestamppb.New(p.started), timestamppb.New(p.child.end)
	p.end.OutputOpen = p.open.Load() > 0
	p.log.finish()
	s.spawner.cgroups.release(p.child.leaf)
	slog.Debug("process ended", "logger", "process", "event_type", "process_end", "pid", p.pid, "status", p.end.Status)
}

// linger waits until the output is complete, as far as anyone can tell: at the end of every pipe; or when what was in them
// at the exit has been read, and background children that hold them open have been silent for a while, or have talked for
// too long, or the process was killed. While a client is what the pipes wait for, nobody is silent.
func (p *process) linger(targets []int64, silence, grace time.Duration) {
	const step = 5 * time.Millisecond
	tick := time.NewTicker(step)
	defer tick.Stop()
	var quiet, total time.Duration
	var last int64
	for {
		select {
		case <-p.eof:
			return
		case <-tick.C:
		}
		complete, sum := true, int64(0)
		for i, out := range p.outputs {
			n := out.logged.Load()
			complete = complete && (n >= targets[i] || out.readable() == 0) // somebody else may read a pipe, too
			sum += n
		}
		if !complete {
			continue
		}
		if total += step; sum != last || p.log.held() {
			quiet, last = 0, sum
		}
		quiet += step
		if p.signaled.Load() || quiet > silence || total >= grace {
			return
		}
	}
}

// endEvent tells how a process ended, in the words of Go's os.ProcessState.
func endEvent(c *child) *pb.ProcessEvent_EndEvent {
	end := &pb.ProcessEvent_EndEvent{ExitCode: -1}
	if c.status.Exited() {
		end.ExitCode, end.Exited = int32(c.status.ExitStatus()), true
		end.Status = "exit status " + strconv.Itoa(c.status.ExitStatus())
	} else {
		end.Signal = int32(c.status.Signal())
		end.Status = "signal: " + c.status.Signal().String()
		if c.status.CoreDump() {
			end.Status += " (core dumped)"
		}
	}
	if end.ExitCode != 0 {
		end.Error = proto.String(end.Status)
	}
	end.CpuUserUs, end.CpuSystemUs = uint64(c.usage.Utime.Nano()/1000), uint64(c.usage.Stime.Nano()/1000)
	end.OomKilled, end.MaxRssBytes = c.leaf.memory()
	var own syscall.Rusage
	if end.MaxRssBytes == 0 && syscall.Getrusage(syscall.RUSAGE_SELF, &own) == nil && c.usage.Maxrss > own.Maxrss {
		// A vforked child starts with the daemon's own peak: below it the figure says nothing. Unit: KiB, getrusage(2).
		end.MaxRssBytes = uint64(c.usage.Maxrss) << 10
	}
	return end
}

// find gives the process that a client selected: a running one, or also an ended one.
func (s *processService) find(selector *pb.ProcessSelector, alsoEnded bool) (*process, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var matches func(p *process) bool
	var name string
	switch sel := selector.GetSelector().(type) {
	case *pb.ProcessSelector_Pid:
		matches = func(p *process) bool { return p.pid == sel.Pid }
		name = fmt.Sprintf("pid %d", sel.Pid)
	case *pb.ProcessSelector_Tag:
		matches = func(p *process) bool { return p.tag != nil && *p.tag == sel.Tag }
		name = "tag " + sel.Tag
	default:
		return nil, wireError(connect.CodeInvalidArgument, "invalid input type *process.ProcessSelector")
	}
	var found *process
	for _, p := range s.running {
		if matches(p) && (found == nil || p.started.Before(found.started)) {
			found = p
		}
	}
	if found == nil && alsoEnded {
		for _, p := range s.ended {
			if matches(p) {
				found = p
			}
		}
	}
	if found == nil {
		return nil, wireError(connect.CodeNotFound, "process with %s not found", name)
	}
	return found, nil
}

// reply is the answer of a call that has nothing to tell but whether it failed.
func reply[T any](err error) (*connect.Response[T], error) {
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(new(T)), nil
}

func (s *processService) Update(_ context.Context, req *connect.Request[pb.UpdateRequest]) (*connect.Response[pb.UpdateResponse], error) {
	p, err := s.find(req.Msg.GetProcess(), false)
	if size := req.Msg.GetPty().GetSize(); err == nil && size != nil {
		if !p.terminal {
			err = wireError(connect.CodeInternal, "error resizing tty: tty not assigned to process")
		} else if failure := p.input.resize(size.GetCols(), size.GetRows()); failure != nil {
			err = wireError(connect.CodeInternal, "error resizing tty: %w", failure)
		}
	}
	return reply[pb.UpdateResponse](err)
}

func (s *processService) SendInput(ctx context.Context, req *connect.Request[pb.SendInputRequest]) (*connect.Response[pb.SendInputResponse], error) {
	p, err := s.find(req.Msg.GetProcess(), false)
	if err == nil {
		err = p.write(ctx, req.Msg.GetInput())
	}
	return reply[pb.SendInputResponse](err)
}

func (s *processService) StreamInput(ctx context.Context, stream *connect.ClientStream[pb.StreamInputRequest]) (*connect.Response[pb.StreamInputResponse], error) {
	var p *process
	for stream.Receive() {
		var err error
		switch event := stream.Msg().GetEvent().(type) {
		case *pb.StreamInputRequest_Start:
			p, err = s.find(event.Start.GetProcess(), false)
		case *pb.StreamInputRequest_Data:
			if p == nil {
				return nil, wireError(connect.CodeFailedPrecondition, "no start event received")
			}
			err = p.write(ctx, event.Data.GetInput())
			if stdin := event.Data.GetInput().GetStdin(); cap(stdin) > 0 {
				inputBuffers.Put(&stdin)
			}
		case *pb.StreamInputRequest_Keepalive:
		default:
			err = wireError(connect.CodeInvalidArgument, "invalid event type <nil>")
		}
		if err != nil {
			return nil, err
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return connect.NewResponse(&pb.StreamInputResponse{}), nil
}

// write passes on what a client sent to the stdin or the terminal of the process.
func (p *process) write(ctx context.Context, input *pb.ProcessInput) error {
	fail := func(to, format string, args ...any) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return wireError(connect.CodeInternal, "error writing to "+to+": "+format, args...)
	}
	switch in := input.GetInput().(type) {
	case *pb.ProcessInput_Stdin:
		if p.terminal {
			return fail("stdin", "tty assigned to process %d, which takes its input as pty", p.pid)
		}
		if p.input == nil {
			return fail("stdin", "stdin not enabled or closed")
		}
		if err := p.input.write(ctx, in.Stdin); errors.Is(err, os.ErrClosed) {
			return fail("stdin", "stdin not enabled or closed")
		} else if err != nil {
			return fail("stdin", "error writing to stdin of process '%d': %w", p.pid, err)
		}
	case *pb.ProcessInput_Pty:
		if !p.terminal {
			return fail("tty", "tty not assigned to process %d, which takes its input as stdin", p.pid)
		}
		if err := p.input.write(ctx, in.Pty); err != nil {
			return fail("tty", "error writing to tty of process '%d': %w", p.pid, err)
		}
	default:
		return wireError(connect.CodeInvalidArgument, "invalid input type <nil>")
	}
	return nil
}

func (s *processService) CloseStdin(ctx context.Context, req *connect.Request[pb.CloseStdinRequest]) (*connect.Response[pb.CloseStdinResponse], error) {
	p, err := s.find(req.Msg.GetProcess(), false)
	switch {
	case err != nil:
	case p.terminal:
		err = wireError(connect.CodeFailedPrecondition,
			"error closing stdin: cannot close stdin for PTY process — send Ctrl+D (0x04) instead")
	case p.input != nil:
		err = p.input.closeInTurn(ctx)
	}
	return reply[pb.CloseStdinResponse](err)
}

func (s *processService) SendSignal(_ context.Context, req *connect.Request[pb.SendSignalRequest]) (*connect.Response[pb.SendSignalResponse], error) {
	p, err := s.find(req.Msg.GetProcess(), true)
	sig := req.Msg.GetSignal()
	switch {
	case err != nil:
	case sig != pb.Signal_SIGNAL_SIGKILL && sig != pb.Signal_SIGNAL_SIGTERM:
		err = wireError(connect.CodeInvalidArgument, "invalid signal: %s", sig)
	default:
		if failure := s.signal(p, syscall.Signal(sig)); failure == os.ErrProcessDone {
			_, err = s.find(req.Msg.GetProcess(), false) // nothing is left of its tree: for clients it is gone
		} else if failure != nil {
			err = wireError(connect.CodeInternal, "error sending signal: %w", failure)
		}
	}
	return reply[pb.SendSignalResponse](err)
}

func (s *processService) signal(p *process, sig syscall.Signal) error {
	p.signaled.Store(true)
	return s.spawner.signal(p.child, sig)
}

// runAtStart runs the operator's --cmd. It has no client; a failure is logged.
func (s *processService) runAtStart(command string) {
	config := &pb.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-l", "-c", command}}
	if _, err := os.Stat(config.Cmd); err != nil {
		config.Cmd, config.Args = "/bin/sh", config.Args[1:]
	}
	name, workdir := s.settings.defaults()
	user, _ := s.users.lookup(name)
	if _, err := os.Stat(filepath.Join("/", user.home)); workdir == "" && err != nil {
		config.Cwd = proto.String("/")
	}
	_, sub, err := s.start(context.Background(), &pb.StartRequest{Process: config, Tag: proto.String("startCmd"), Stdin: proto.Bool(false)})
	if err != nil {
		slog.Error("the command given by --cmd was not started", "logger", "process", "error", err)
		return
	}
	sub.detach()
}

// wireError is an error as an RPC client sees it.
func wireError(code connect.Code, format string, args ...any) error {
	return connect.NewError(code, fmt.Errorf(format, args...))
}
