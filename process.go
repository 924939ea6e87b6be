// The Process service: from a request to a process, from a process to its clients.
//
// A process that has been reaped is kept for a while, so that clients that lost their stream can come back for output and
// exit status. The poller fills its output log and sees its end; a goroutine of its own it has only while background
// children hold its output open.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
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

// What a process costs, in bytes, as long as it is known, and each text that List tells of it beside its length.
const (
	processMemory = 600
	textMemory    = 64
)

type processOptions struct {
	endSilence, endGrace    time.Duration
	retainTime              time.Duration
	retainCount             int
	maxProcesses            uint
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
	budget   *budget
	stopping <-chan struct{}
	streams  *atomic.Int64 // open ones, those of other services included
	onStart  func()

	running     atomic.Int64 // processes, those being started among them
	descriptors descriptors

	mu    sync.Mutex // protects what follows and each process's exited
	byPid map[uint32]*process
	ended []*process // those that have exited, oldest first
}

type process struct {
	config   *pb.ProcessConfig // nil once it has exited
	tag      *string
	memory   *grant // for the config, the tag and this
	held     int64  // descriptors until it exits, beside its outputs, which each give back their own
	pid      uint32
	child    *child
	log      *outputLog
	outputs  []*outputPipe
	terminal bool
	input    *inputPipe // nil: /dev/null
	started  time.Time
	exited   bool
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
	for len(s.ended) > 0 && now.Sub(s.ended[0].child.end) > s.retainTime {
		s.forgetLocked(s.ended[0])
	}
}

// forgetLocked forgets an ended process; streams that still follow it are served to their end.
func (s *processService) forgetLocked(p *process) {
	s.ended = without(s.ended, p)
	if s.byPid[p.pid] == p {
		delete(s.byPid, p.pid)
	}
	p.memory.close()
	p.log.forget()
}

// List takes memory for the encoded answer, which grows while it is made, before it returns.
func (s *processService) List(ctx context.Context, _ *connect.Request[pb.ListRequest]) (*connect.Response[pb.ListResponse], error) {
	res, size := s.listed()
	if err := requestOf(ctx).memory.take(ctx, 2*size); err != nil {
		return nil, memoryError(err)
	}
	return connect.NewResponse(res), nil
}

func (s *processService) listed() (res *pb.ListResponse, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	res = &pb.ListResponse{}
	for _, p := range s.byPid {
		if !p.exited {
			res.Processes = append(res.Processes, &pb.ProcessInfo{Config: p.config, Pid: p.pid, Tag: p.tag})
			size += p.memory.holds()
		}
	}
	return res, size
}

// memoryError is the wire error for what there is no memory for.
func memoryError(err error) error {
	if refused := (*budgetError)(nil); errors.As(err, &refused) {
		return wireError(connect.CodeResourceExhausted, "%w", err)
	}
	return err
}

// keep takes the memory of a process that is to be started. Where a little is lacking, ended ones are forgotten, the oldest first.
func (s *processService) keep(size int64) (*grant, error) {
	class := forProcesses
	if size > grantSmall {
		class = forConfigs
	}
	memory := s.budget.grant(class)
	for {
		err := memory.tryTake(size)
		if err == nil {
			return memory, nil
		}
		s.mu.Lock()
		none := len(s.ended) == 0 || size > grantSmall
		if !none {
			s.forgetLocked(s.ended[0])
		}
		s.mu.Unlock()
		if none {
			return nil, memoryError(err)
		}
	}
}

// configMemory is what List tells of a process.
func configMemory(config *pb.ProcessConfig) (bytes int64) {
	bytes = int64(len(config.GetCmd()) + len(config.GetCwd()))
	for _, arg := range config.GetArgs() {
		bytes += int64(len(arg)) + textMemory
	}
	for name, value := range config.GetEnvs() {
		bytes += int64(len(name)+len(value)) + 2*textMemory
	}
	return bytes
}

func (s *processService) Start(ctx context.Context, req *connect.Request[pb.StartRequest], stream *connect.ServerStream[pb.StartResponse]) error {
	p, sub, err := s.start(ctx, req.Msg)
	if err != nil {
		return err
	}
	return s.follow(ctx, p, sub, true, stream.Conn(), func(event *pb.ProcessEvent) any { return &pb.StartResponse{Event: event} })
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
	sub := p.log.subscribe(from, requestOf(ctx).breakStream)
	if sub == nil {
		return wireError(connect.CodeInvalidArgument, "Envd-Output-From: offset %d is past the end of the output", from)
	}
	return s.follow(ctx, p, sub, false, stream.Conn(), func(event *pb.ProcessEvent) any { return &pb.ConnectResponse{Event: event} })
}

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

// follow sends a process to one client: start, output, end. Its goroutine is the only one that writes to the stream. The
// deadline of the starter's stream is the process's.
func (s *processService) follow(ctx context.Context, p *process, sub *subscriber, starter bool,
	stream connect.StreamingHandlerConn, message func(*pb.ProcessEvent) any) error {
	defer sub.detach()
	s.streams.Add(1)
	defer s.streams.Add(-1)
	stream.ResponseHeader().Set("Envd-Output-Offset", strconv.FormatInt(sub.pos, 10))
	stream.ResponseHeader().Set("Envd-Output-Lost", strconv.FormatInt(sub.lost, 10))
	send := func(event *pb.ProcessEvent) error { return stream.Send(message(event)) }
	if err := send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Start{Start: &pb.ProcessEvent_StartEvent{Pid: p.pid}}}); err != nil {
		return err
	}
	output := &pb.ProcessEvent_DataEvent{} // the same for every piece
	outputMessage := message(&pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: output}})
	interval := keepAliveInterval(stream.RequestHeader(), s.keepAlive)
	keepAlive := time.NewTimer(interval)
	defer keepAlive.Stop()
	ctxDone := ctx.Done()
	var lastWords <-chan time.Time // runs from the starter's deadline until its stream must end
	for {
		kind, data, done, cut := sub.next()
		switch {
		case cut:
			return wireError(connect.CodeAborted, "the client has not taken output for too long; resume by offset")
		case done && starter && p.timedOut.Load():
			return context.DeadlineExceeded
		case done:
			requestOf(ctx).keepFlush()
			return send(&pb.ProcessEvent{Event: &pb.ProcessEvent_End{End: p.endFor(stream.RequestHeader())}})
		case data != nil && !starter && ctx.Err() != nil:
			return ctx.Err()
		case data != nil:
			setOutput(output, kind, data)
			if err := stream.Send(outputMessage); err != nil {
				return err
			}
			sub.sent(len(data))
			keepAlive.Reset(interval)
			continue
		}
		select {
		case <-sub.notify:
		case <-keepAlive.C:
			if err := send(&pb.ProcessEvent{Event: &pb.ProcessEvent_Keepalive{Keepalive: &pb.ProcessEvent_KeepAlive{}}}); err != nil {
				return err
			}
			keepAlive.Reset(interval)
		case <-ctxDone:
			if !starter || !errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return ctx.Err()
			}
			// The process is being killed. What it wrote before goes out first.
			ctxDone, lastWords = nil, time.After(time.Second)
		case <-lastWords:
			return context.DeadlineExceeded
		case <-s.stopping:
			return wireError(connect.CodeUnavailable, "envd is stopping")
		}
	}
}

func setOutput(event *pb.ProcessEvent_DataEvent, kind outputKind, data []byte) {
	switch kind {
	case stdoutKind:
		event.Output = &pb.ProcessEvent_DataEvent_Stdout{Stdout: data}
	case stderrKind:
		event.Output = &pb.ProcessEvent_DataEvent_Stderr{Stderr: data}
	default:
		event.Output = &pb.ProcessEvent_DataEvent_Pty{Pty: data}
	}
}

// endFor strips what the client has not asked for.
func (p *process) endFor(header http.Header) *pb.ProcessEvent_EndEvent {
	if header.Get("Envd-Extensions") == "1" {
		return p.end
	}
	return &pb.ProcessEvent_EndEvent{ExitCode: p.end.ExitCode, Exited: p.end.Exited, Status: p.end.Status, Error: p.end.Error}
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
	if slices.Contains(append([]uint32{user.uid, user.gid}, user.groups...), math.MaxUint32) {
		return nil, wireError(connect.CodeUnauthenticated, "user '%s' has an id that is none: %d", user.name, uint32(math.MaxUint32))
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
	spec := &spawnSpec{argv: append([]string{config.GetCmd()}, config.GetArgs()...), path: env["PATH"], dir: dir, user: user,
		fds: [3]int{-1, -1, -1}, terminal: req.Pty != nil}
	for name, value := range env {
		spec.env = append(spec.env, name+"="+value)
	}
	for _, text := range slices.Concat(spec.argv, spec.env, []string{dir}) {
		if strings.IndexByte(text, 0) >= 0 {
			return nil, startError(req, dir, errors.New("a NUL byte in the command, its arguments, variables or directory"))
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	memory := s.budget.grant(forRequests)
	spec.closed = memory.close
	return spec, memoryError(memory.take(ctx, spec.launchMemory()))
}

// start starts a request's process and subscribes to all of its output.
func (s *processService) start(ctx context.Context, req *pb.StartRequest) (_ *process, _ *subscriber, err error) {
	spec, err := s.plan(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	memory, err := s.keep(processMemory + int64(len(req.GetTag())) + configMemory(req.Process))
	if err != nil {
		spec.close()
		return nil, nil, err
	}
	p := &process{config: req.Process, tag: req.Tag, memory: memory, terminal: req.Pty != nil, log: s.memory.newLog(),
		started: time.Now(), eof: make(chan struct{})}
	// Subscribed before anything runs: no byte is older than the stream.
	sub := p.log.subscribe(0, requestOf(ctx).breakStream)
	if s.running.Add(1) > int64(s.maxProcesses) {
		err = errTooManyProcesses
	} else {
		err = s.openFiles(p, req, spec)
	}
	if err != nil {
		spec.close()
	} else {
		p.child, err = s.spawner.start(ctx, spec)
	}
	if err != nil {
		s.running.Add(-1)
		sub.detach()
		p.input.close()
		s.descriptors.give(p.held)
		p.memory.close()
		p.log.finish()
		p.log.forget()
		return nil, nil, startError(req, spec.dir, err)
	}
	p.pid = uint32(p.child.pid.Load())
	s.onStart()
	s.register(p)
	if deadline, ok := ctx.Deadline(); ok {
		p.timeout = time.AfterFunc(time.Until(deadline), func() {
			p.timedOut.Store(true)
			s.signal(p, syscall.SIGKILL)
		})
	}
	s.spawner.awaitExit(p.child, func() { s.hasExited(p) })
	slog.Debug("process started", "logger", "process", "event_type", "process_start", "pid", p.pid, "username", spec.user.name)
	return p, sub, nil
}

// register gives a process its pid, and its tag, which those that had them before it lose.
func (s *processService) register(p *process) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.byPid[p.pid]; old != nil {
		s.forgetLocked(old)
	}
	for _, old := range slices.Backward(s.ended) {
		if p.tag != nil && old.hasTag(*p.tag) {
			s.forgetLocked(old)
		}
	}
	s.byPid[p.pid] = p
}

var errTooManyProcesses = errors.New("too many processes are running (--max-processes)")

var exhausted = []error{errTooManyProcesses, errTooManyLaunches,
	syscall.EMFILE, syscall.ENFILE, syscall.ENOMEM, syscall.EAGAIN, syscall.ENOSPC}

// startError is the wire error for a process that could not be started.
func startError(req *pb.StartRequest, dir string, err error) error {
	var failed *os.SyscallError
	code := connect.CodeInvalidArgument
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, errLaunchTimeout):
		code = connect.CodeDeadlineExceeded
	case slices.ContainsFunc(exhausted, func(lack error) bool { return errors.Is(err, lack) }):
		code = connect.CodeResourceExhausted
	case errors.As(err, &failed) && failed.Syscall == "chdir":
		if failed.Err == syscall.ENOENT {
			return wireError(code, "cwd '%s' does not exist", dir)
		}
		err = &os.PathError{Op: "chdir", Path: dir, Err: failed.Err}
	case failed != nil:
		code = connect.CodeInternal
	}
	command := strings.Join(append([]string{req.GetProcess().GetCmd()}, req.GetProcess().GetArgs()...), " ")
	if req.Pty != nil {
		return wireError(code, "error starting pty with command '%s' in dir '%s' with '%d' cols and '%d' rows: %w",
			command, dir, req.Pty.GetSize().GetCols(), req.Pty.GetSize().GetRows(), err)
	}
	return wireError(code, "error starting process '%s': %w", command, err)
}

// openFiles makes the process's side of stdin, stdout and stderr, or its terminal, and the daemon's side of them.
func (s *processService) openFiles(p *process, req *pb.StartRequest, spec *spawnSpec) (err error) {
	if err := s.descriptors.take(descriptorsOfAProcess + descriptorsOfAStart); err != nil {
		return err
	}
	p.held = descriptorsOfAProcess
	freeMemory := spec.closed
	spec.closed = func() {
		freeMemory()
		s.descriptors.give(descriptorsOfAStart)
	}
	output := func(kind outputKind, fd int) error {
		p.open.Add(1)
		out, err := newOutputPipe(kind, fd, p.log, s.poller, func() {
			s.descriptors.give(1)
			if p.open.Add(-1) == 0 {
				close(p.eof)
			}
		})
		if err == nil {
			p.outputs = append(p.outputs, out)
			p.held-- // it is given back at the output's end
		}
		return err
	}
	if size := req.Pty.GetSize(); req.Pty != nil {
		master, slave, err := openPTY(size.GetCols(), size.GetRows(), int(spec.user.uid))
		if err != nil {
			return err
		}
		spec.fds = [3]int{slave, slave, slave}
		if err := output(ptyKind, master); err != nil {
			return err
		}
		// A descriptor of its own, so that the two sides can be closed one without the other.
		fd, err := unix.FcntlInt(uintptr(master), unix.F_DUPFD_CLOEXEC, 3)
		if err == nil {
			p.input = newInputPipe(fd)
		}
		return os.NewSyscallError("fcntl", err)
	}
	var ours int
	if req.Stdin != nil && !req.GetStdin() {
		if spec.fds[0], err = unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
			return &os.PathError{Op: "open", Path: "/dev/null", Err: err}
		}
		s.descriptors.give(1)
		p.held--
	} else if spec.fds[0], ours, err = pipe(spec.user); err != nil {
		return err
	} else {
		p.input = newInputPipe(ours)
	}
	for i, kind := range []outputKind{stdoutKind, stderrKind} {
		if ours, spec.fds[1+i], err = pipe(spec.user); err == nil {
			err = output(kind, ours)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// hasExited carries a process on from its exit. It runs on the poller's goroutine: what the process wrote has been, or is
// here, read before, so that as a rule the process has ended, too.
func (s *processService) hasExited(p *process) {
	if p.timeout != nil {
		p.timeout.Stop()
	}
	for _, out := range p.outputs {
		out.drain()
	}
	s.mu.Lock()
	p.memory.give(configMemory(p.config))
	p.exited, p.config = true, nil // which may be large
	s.running.Add(-1)
	s.descriptors.give(p.held)
	if s.ended = append(s.ended, p); len(s.ended) > s.retainCount {
		s.forgetLocked(s.ended[0])
	}
	s.mu.Unlock()
	p.input.close() // for good: a write that waits fails
	if p.open.Load() == 0 {
		s.finish(p)
	} else {
		go s.linger(p)
	}
}

func (s *processService) finish(p *process) {
	p.end = endEvent(p.child)
	p.end.StartTime, p.end.EndTime = timestamppb.New(p.started), timestamppb.New(p.child.end)
	p.end.OutputOpen = p.open.Load() > 0
	p.outputs = nil // there may be thousands of ended processes
	s.spawner.cgroups.release(p.child.leaf)
	p.log.finish() // last, so that whom it wakes has the thread
	slog.Debug("process ended", "logger", "process", "event_type", "process_end", "pid", p.pid, "status", p.end.Status)
}

// linger finishes a process once its output is complete, as far as anyone can tell: at the end of every pipe; or when what was in them
// at the exit has been read, and background children that hold them open have been silent for a while, or have talked for
// too long, or the process was killed. While a client is what the pipes wait for, nobody is silent.
func (s *processService) linger(p *process) {
	defer s.finish(p)
	const step = 5 * time.Millisecond
	ticks := time.Tick(step)
	var quiet, total time.Duration
	for last := int64(-1); ; {
		select {
		case <-p.eof:
			return
		case <-ticks:
		}
		signaled, waits := p.signaled.Load(), func(o *outputPipe) bool { return !o.drained() }
		if slices.ContainsFunc(p.outputs, waits) || s.spawner.cgroups.frozen() && !signaled {
			continue
		}
		end, held := p.log.state()
		if end != last || held {
			quiet, last = 0, end
		}
		quiet, total = quiet+step, total+step
		if signaled || quiet > s.endSilence || total >= s.endGrace {
			return
		}
	}
}

// endEvent tells how a process ended, in the words of Go's os.ProcessState.
func endEvent(c *child) *pb.ProcessEvent_EndEvent {
	end := &pb.ProcessEvent_EndEvent{ExitCode: -1}
	switch {
	case c.status.Exited():
		end.ExitCode, end.Exited = int32(c.status.ExitStatus()), true
		end.Status = "exit status " + strconv.Itoa(c.status.ExitStatus())
	case c.status == statusUnknown:
		end.Status = "unknown: a tracer keeps it"
	default:
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
	var name string
	var found *process
	switch sel := selector.GetSelector().(type) {
	case *pb.ProcessSelector_Pid:
		name, found = fmt.Sprintf("pid %d", sel.Pid), s.byPid[sel.Pid]
	case *pb.ProcessSelector_Tag:
		name = "tag " + sel.Tag
		for _, p := range s.byPid {
			if p.hasTag(sel.Tag) && (found == nil || found.exited && !p.exited ||
				found.exited == p.exited && p.started.Before(found.started)) {
				found = p
			}
		}
	default:
		return nil, wireError(connect.CodeInvalidArgument, "invalid input type *process.ProcessSelector")
	}
	if found == nil || found.exited && !alsoEnded {
		return nil, wireError(connect.CodeNotFound, "process with %s not found", name)
	}
	return found, nil
}

func (p *process) hasTag(tag string) bool { return p.tag != nil && *p.tag == tag }

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
		} else if failure := p.input.control(func(fd uintptr) error {
			return resizePTY(int(fd), size.GetCols(), size.GetRows())
		}); failure != nil {
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
	s.streams.Add(1)
	defer s.streams.Add(-1)
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
	return reply[pb.StreamInputResponse](stream.Err())
}

// write passes on what a client sent to the stdin or the terminal of the process.
func (p *process) write(ctx context.Context, input *pb.ProcessInput) error {
	to, err := "stdin", os.ErrClosed
	switch in := input.GetInput().(type) {
	case *pb.ProcessInput_Stdin:
		if p.terminal {
			return wireError(connect.CodeInternal,
				"error writing to stdin: tty assigned to process %d, which takes its input as pty", p.pid)
		}
		if p.input != nil {
			err = p.input.write(ctx, in.Stdin)
		}
	case *pb.ProcessInput_Pty:
		if !p.terminal {
			return wireError(connect.CodeInternal,
				"error writing to tty: tty not assigned to process %d, which takes its input as stdin", p.pid)
		}
		to, err = "tty", p.input.write(ctx, in.Pty)
	default:
		return wireError(connect.CodeInvalidArgument, "invalid input type <nil>")
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case to == "stdin" && (errors.Is(err, os.ErrClosed) || err == os.ErrInvalid):
		return wireError(connect.CodeInternal, "error writing to stdin: stdin not enabled or closed")
	}
	return wireError(connect.CodeInternal, "error writing to %s: error writing to %[1]s of process '%[2]d': %[3]w", to, p.pid, err)
}

func (s *processService) CloseStdin(ctx context.Context, req *connect.Request[pb.CloseStdinRequest]) (*connect.Response[pb.CloseStdinResponse], error) {
	p, err := s.find(req.Msg.GetProcess(), false)
	switch {
	case err != nil:
	case p.terminal:
		err = wireError(connect.CodeFailedPrecondition,
			"error closing stdin: cannot close stdin for PTY process — send Ctrl+D (0x04) instead")
	case p.input != nil:
		err = p.input.inTurn(ctx, func() error { p.input.close(); return nil })
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
