// The figures: what is measured, in which rows it shows, and what each row must show.
//
// A measurement is one repetition. It measures ours and the baseline next to each other, in turn (latencies in blocks
// of a few calls), because the machine is noisy, and adds one value to each of its rows.
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	pb "envd/proto"
)

// sizes is how much is done in one repetition.
type sizes struct {
	runs       int
	execs      int // one after the other
	parallel   int // in all, by 16 clients
	stdout     int
	json       int
	stdin      int
	keys       int // typed into a terminal; a terminal's line holds 4095
	stalled    int
	stall      time.Duration
	burst      int
	boots      int
	healths    int
	small      int           // files up and down
	lists      int           // of a large directory
	text       int           // bytes compressed
	forward    int           // each way
	idleBefore time.Duration // RSS is read
	streams    int           // at once
	load       time.Duration // how long /health is asked for in each of four situations
	calm       time.Duration // after the load
	restBefore time.Duration // after /init
	rest       time.Duration
	patience   time.Duration // with a busy machine
}

var (
	fullSizes = sizes{runs: 5, execs: 1000, parallel: 2000, stdout: 512 << 20, json: 128 << 20, stdin: 64 << 20, keys: 600,
		stalled: 256 << 20, stall: 5 * time.Second, burst: 2000, boots: 40, healths: 20_000, small: 8000, lists: 20,
		text: 256 << 20, forward: 1 << 30, streams: 500, load: 10 * time.Second, calm: 5 * time.Second,
		idleBefore: time.Second, restBefore: 10 * time.Second, rest: 60 * time.Second}
	quickSizes = sizes{runs: 3, execs: 200, parallel: 480, stdout: 64 << 20, json: 32 << 20, stdin: 32 << 20, keys: 200,
		stalled: 64 << 20, stall: time.Second, burst: 480, boots: 10, healths: 4000, small: 2000, lists: 5,
		text: 16 << 20, forward: 128 << 20, streams: 500, load: time.Second, calm: 5 * time.Second,
		idleBefore: 200 * time.Millisecond, restBefore: 6 * time.Second, rest: 4 * time.Second}
)

const (
	clients    = 16
	polling    = 32 // connections that ask for /health at once
	block      = 20 // calls to one side before the other has its turn
	warmUp     = 20
	warmUpKeys = 20
	// betweenKeys lets both sides fall idle before each key, as they are when a person types. Without it a local echo
	// takes either 8 us or 32 us, depending on which CPU still happens to be awake.
	betweenKeys = time.Millisecond
	stdinTurns  = 5
	stdinChunk  = 64 << 10 // bytes in one message of StreamInput, and in one write of the baseline
)

// figure is one measurement and its rows.
type figure struct {
	name    string
	rows    []rowSpec
	measure func(context.Context, *bench, add) error
}

// add takes one repetition's values of a row; `none` where a column does not apply.
type add func(row string, ours, baseline, bare float64)

var figures = []figure{
	{"exec", []rowSpec{
		{"exec as root, p50", seconds, ratioAtMost(1.75)},
		{"exec as root, p90", seconds, target{}},
	}, func(ctx context.Context, b *bench, add add) error {
		return measureExec(ctx, b, "", "exec as root", add)
	}},
	{"exec-user", []rowSpec{
		{"exec as a user, p50", seconds, ratioAtMost(2.6)},
		{"exec as a user, p90", seconds, target{}},
	}, func(ctx context.Context, b *bench, add add) error {
		if b.user == "" {
			return errors.New("needs root and a user in /etc/passwd")
		}
		return measureExec(ctx, b, b.user, "exec as a user", add)
	}},
	{"rate", []rowSpec{
		{"exec rate, 16 clients", perSecond, ratioAtLeast(0.6)},
	}, measureRate},
	{"stdout", []rowSpec{
		{"stdout, connect-go client", throughput, ratioAtLeast(0.18)},
		{"stdout, raw reader", throughput, ratioAtLeast(0.25)},
		{"stdout, peak RSS", bytesSize, under(32 << 20)},
	}, measureStdout},
	{"json", []rowSpec{
		{"stdout as JSON, raw reader", throughput, ratioAtLeast(0.07)},
		{"stdout as JSON against binary, connect-go client", throughput, ratioAtLeast(0.3)},
		{"stdout as JSON against binary, raw reader", throughput, ratioAtLeast(0.3)},
	}, measureJSON},
	{"stdin", []rowSpec{
		{"stdin by StreamInput, connect-go client", throughput, ratioAtLeast(0.45)},
		{"stdin by StreamInput, raw writer", throughput, ratioAtLeast(0.45)},
	}, measureStdin},
	{"echo", []rowSpec{
		{"PTY echo p50, connect-go client", seconds, ratioAtMost(3.5)},
		{"PTY echo p50, raw client", seconds, ratioAtMost(3.5)},
	}, measureEcho},
	{"stall", []rowSpec{
		{"stalled reader, bytes lost", count, exactly(0)},
		{"stalled reader, peak RSS", bytesSize, under(24 << 20)},
	}, measureStall},
	{"burst", []rowSpec{
		{"burst of true, streams without exactly one end", count, exactly(0)},
		{"burst of true, zombies", count, exactly(0)},
		{"burst of true, fds grown", count, exactly(0)},
		{"burst of true, threads grown", count, target{}},
	}, measureBurst},
	{"size", []rowSpec{
		{"size of the binary", bytesSize, ratioAtMost(1.58)},
		{"lines of Go and assembly, neither test nor generated", count, atMost(4000)},
	}, measureSize},
	{"boot", []rowSpec{
		{"from exec to the first /health", seconds, ratioAtMost(1.5)},
	}, measureBoot},
	{"idle", []rowSpec{
		{"RSS when idle", bytesSize, ratioAtMost(1.65)},
		{"threads when idle", count, atMost(6)},
	}, measureIdle},
	{"health", []rowSpec{
		{"/health, p50", seconds, target{}},
		{"/health, p99", seconds, target{}},
		{"/health rate, 32 connections", perSecond, ratioAtLeast(0.85)},
	}, measureHealth},
	{"load", []rowSpec{
		{"500 streams of sleep, RSS", bytesSize, atMost(36 << 20)},
		{"500 streams of sleep, last start", seconds, ratioAtMost(2)},
		{"/health p99 at full load, against idle", seconds, ratioAtMost(10)},
		{"/health p99 at full load, worst run", seconds, never(0.05)},
		{"/health p99 in prepare and restore, against idle", seconds, ratioAtMost(10)},
		{"/health p99 in prepare and restore, worst run", seconds, never(0.05)},
		{"prepare answered, slowest", seconds, never(2.6)},
		{"RSS 5 s after the whole load", bytesSize, atMost(14 << 20)},
	}, measureLoad},
	{"poll", []rowSpec{
		{"/metrics, p50, against an empty answer", seconds, target{}},
		{"/metrics, CPU time, against an empty answer", seconds, target{}},
	}, measurePoll},
	{"rest", []rowSpec{
		{"at rest, CPU time per second", seconds, atMost(1e-3)},
		{"at rest, context switches per second", wakeups, atMost(8)},
	}, measureRest},
}

// bench is what the measurements share.
type bench struct {
	sizes
	dir       string
	envd      string
	isBase    bool   // envd is the build to compare with
	ofSources bool   // envd was built from the sources around
	cgroup2   string // a writable cgroup v2 mount, or ""
	user      string // an ordinary user, or ""
	null      *os.File
	servers   map[string]*daemon
}

// server returns a running server that several measurements share.
func (b *bench) server(ctx context.Context, name string,
	start func(context.Context) (*daemon, error)) (*daemon, error) {
	if d := b.servers[name]; d != nil {
		return d, nil
	}
	d, err := start(ctx)
	if err == nil {
		b.servers[name] = d
	}
	return d, err
}

func (b *bench) shared(ctx context.Context) (*daemon, error) {
	return b.server(ctx, b.envd, func(ctx context.Context) (*daemon, error) { return b.startEnvd(ctx) })
}
func (b *bench) bare(ctx context.Context) (*daemon, error)  { return b.helper(ctx, "bare") }
func (b *bench) plain(ctx context.Context) (*daemon, error) { return b.helper(ctx, "plain") }

func (b *bench) helper(ctx context.Context, name string) (*daemon, error) {
	return b.server(ctx, name, func(ctx context.Context) (*daemon, error) { return b.startHelper(ctx, name) })
}

func (b *bench) stopServers() (err error) {
	for _, d := range b.servers {
		err = errors.Join(err, d.stop())
	}
	clear(b.servers)
	return err
}

// ordinaryUser is the user of the figures that are not root's: `user` as in a sandbox, else nobody, else whoever.
func ordinaryUser() string {
	for _, name := range []string{"user", "nobody", "daemon"} {
		if u, err := user.Lookup(name); err == nil && u.Uid != "0" {
			return name
		}
	}
	return ""
}

func measureExec(ctx context.Context, b *bench, as, row string, add add) error {
	d, err := b.shared(ctx)
	if err != nil {
		return err
	}
	bare, err := b.bare(ctx)
	if err != nil {
		return err
	}
	ours, bareClient := newClient(d.url, as), newClient(bare.url, "")
	defer ours.close()
	defer bareClient.close()
	sides := []func() (time.Duration, error){
		func() (time.Duration, error) { return ours.exec(ctx) },
		func() (time.Duration, error) { return localExec(b.null) },
		func() (time.Duration, error) { return bareClient.exec(ctx) },
	}
	took, err := inTurn(b.execs, sides)
	if err != nil {
		return err
	}
	for _, p := range []float64{50, 90} {
		add(fmt.Sprintf("%s, p%g", row, p), percentile(took[0], p), percentile(took[1], p), percentile(took[2], p))
	}
	return nil
}

// warmUps is how many calls before n of them are not counted.
func warmUps(n int) int { return min(warmUp, n/4) }

// inTurn calls each side n times, in blocks that alternate, after some calls that are not counted.
func inTurn(n int, sides []func() (time.Duration, error)) ([][]float64, error) {
	took := make([][]float64, len(sides))
	for _, side := range sides {
		for range warmUps(n) {
			if _, err := side(); err != nil {
				return nil, err
			}
		}
	}
	for done := 0; done < n; done += block {
		for i, side := range sides {
			for range min(block, n-done) {
				t, err := side()
				if err != nil {
					return nil, err
				}
				took[i] = append(took[i], t.Seconds())
			}
		}
	}
	return took, nil
}

func measureRate(ctx context.Context, b *bench, add add) error {
	d, err := b.shared(ctx)
	if err != nil {
		return err
	}
	bare, err := b.bare(ctx)
	if err != nil {
		return err
	}
	ours, bareClient := newClient(d.url, ""), newClient(bare.url, "")
	defer ours.close()
	defer bareClient.close()
	sides := []func() error{
		func() error { _, err := ours.exec(ctx); return err },
		func() error { return forkExecWait(b.null) },
		func() error { _, err := bareClient.exec(ctx); return err },
	}
	var total [3]time.Duration
	for _, side := range sides {
		if _, err := inParallel(clients, 2*clients, side); err != nil {
			return err
		}
	}
	const slices = 4
	for range slices {
		for i, side := range sides {
			took, err := inParallel(clients, b.parallel/slices, side)
			if err != nil {
				return err
			}
			total[i] += took
		}
	}
	rate := func(t time.Duration) float64 { return float64(b.parallel/slices*slices) / t.Seconds() }
	add("exec rate, 16 clients", rate(total[0]), rate(total[1]), rate(total[2]))
	return nil
}

// zeros is a command that writes n bytes.
func zeros(n int) *pb.StartRequest { return command("/usr/bin/head", "-c", fmt.Sprint(n), "/dev/zero") }

// through times one run of n bytes and checks that all of them arrived.
func through(n int, run func() (ending, error)) (float64, error) {
	runtime.GC()
	start := time.Now()
	e, err := run()
	took := time.Since(start)
	if err == nil {
		err = e.check(n)
	}
	return float64(n) / took.Seconds(), err
}

// amidLocal measures each side with `head | cat` before and after it, whose spread is large: its median counts.
func amidLocal(n int, sides []func() (float64, error)) (rates []float64, local float64, err error) {
	var locals []float64
	for i := 0; ; i++ {
		took, err := localStdout(n)
		if err != nil {
			return nil, 0, err
		}
		locals = append(locals, float64(n)/took.Seconds())
		if i == len(sides) {
			return rates, percentile(locals, 50), nil
		}
		rate, err := sides[i]()
		if err != nil {
			return nil, 0, err
		}
		rates = append(rates, rate)
	}
}

func measureStdout(ctx context.Context, b *bench, add add) (err error) {
	d, err := b.startEnvd(ctx) // fresh, so that the peak is this one's
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	bare, err := b.bare(ctx)
	if err != nil {
		return err
	}
	c, bareClient := newClient(d.url, ""), newClient(bare.url, "")
	defer c.close()
	defer bareClient.close()
	sides := []func() (float64, error){
		func() (float64, error) {
			return through(b.stdout, func() (ending, error) { return c.run(ctx, c.proc, zeros(b.stdout), nil) })
		},
		func() (float64, error) {
			return through(b.stdout, func() (ending, error) { return bareClient.run(ctx, bareClient.proc, zeros(b.stdout), nil) })
		},
		func() (float64, error) {
			return through(b.stdout, func() (ending, error) { return c.runRaw(ctx, "proto", zeros(b.stdout)) })
		},
		func() (float64, error) {
			return through(b.stdout, func() (ending, error) { return bareClient.runRaw(ctx, "proto", zeros(b.stdout)) })
		},
	}
	rates, local, err := amidLocal(b.stdout, sides)
	if err != nil {
		return err
	}
	peak, err := d.status("VmHWM")
	if err != nil {
		return err
	}
	add("stdout, connect-go client", rates[0], local, rates[1])
	add("stdout, raw reader", rates[2], local, rates[3])
	add("stdout, peak RSS", peak, none, none)
	return nil
}

func measureJSON(ctx context.Context, b *bench, add add) error {
	d, err := b.shared(ctx)
	if err != nil {
		return err
	}
	c := newClient(d.url, "")
	defer c.close()
	msg := zeros(b.json)
	var sides []func() (float64, error)
	for _, run := range []func() (ending, error){
		func() (ending, error) { return c.run(ctx, c.json, msg, nil) },
		func() (ending, error) { return c.run(ctx, c.proc, msg, nil) },
		func() (ending, error) { return c.runRaw(ctx, "json", msg) },
		func() (ending, error) { return c.runRaw(ctx, "proto", msg) },
	} {
		sides = append(sides, func() (float64, error) { return through(b.json, run) })
	}
	rates, local, err := amidLocal(b.json, sides)
	if err != nil {
		return err
	}
	add("stdout as JSON, raw reader", rates[2], local, none)
	add("stdout as JSON against binary, connect-go client", rates[0], rates[1], none)
	add("stdout as JSON against binary, raw reader", rates[2], rates[3], none)
	return nil
}

func measureStdin(ctx context.Context, b *bench, add add) error {
	d, err := b.shared(ctx)
	if err != nil {
		return err
	}
	c := newClient(d.url, "")
	defer c.close()
	for _, by := range []struct {
		name string
		send func(context.Context, *pb.ProcessSelector, int) error
	}{{"connect-go client", c.sendInput}, {"raw writer", c.sendInputRaw}} {
		// A local pipe moves 1 or 4 GiB/s, depending on which CPUs the two sides land on: several short turns tell more than
		// a long one.
		var ours, local []float64
		for range stdinTurns {
			took, err := localStdin(b.stdin, stdinChunk)
			if err != nil {
				return err
			}
			local = append(local, float64(b.stdin)/took.Seconds())
			if took, err = c.streamInput(ctx, b.stdin, by.send); err != nil {
				return fmt.Errorf("%s: %w", by.name, err)
			}
			ours = append(ours, float64(b.stdin)/took.Seconds())
		}
		add("stdin by StreamInput, "+by.name, percentile(ours, 50), percentile(local, 50), none)
	}
	return nil
}

// streamInput sends n bytes to a cat and waits for its end, which comes after it has taken them all.
func (c *client) streamInput(ctx context.Context, n int,
	send func(context.Context, *pb.ProcessSelector, int) error) (time.Duration, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	msg := command("/bin/sh", "-c", "exec cat > /dev/null")
	msg.Stdin = proto.Bool(true)
	process, done := c.follow(ctx, msg, nil)
	var selector *pb.ProcessSelector
	select {
	case selector = <-process:
	case end := <-done:
		return 0, fmt.Errorf("no process: %+v, %v", end.ending, end.err)
	}
	start := time.Now()
	if err := send(ctx, selector, n); err != nil {
		return 0, err
	}
	closeStdin := connect.NewRequest(&pb.CloseStdinRequest{Process: selector})
	c.authorise(closeStdin.Header())
	if _, err := c.proc.CloseStdin(ctx, closeStdin); err != nil {
		return 0, err
	}
	end := <-done
	took := time.Since(start)
	return took, errors.Join(end.err, end.check(0))
}

func measureEcho(ctx context.Context, b *bench, add add) error {
	d, err := b.shared(ctx)
	if err != nil {
		return err
	}
	c := newClient(d.url, "")
	defer c.close()
	for _, by := range []struct {
		name string
		keys func(context.Context, *pb.ProcessSelector) (key func() error, done func(), err error)
	}{{"connect-go client", c.keys}, {"raw client", c.keysRaw}} {
		var ours, local []float64
		const slices = 5
		for range slices {
			l, err := localEcho(b.keys / slices)
			if err != nil {
				return err
			}
			o, err := c.echo(ctx, b.keys/slices, by.keys)
			if err != nil {
				return fmt.Errorf("%s: %w", by.name, err)
			}
			local, ours = append(local, l...), append(ours, o...)
		}
		add("PTY echo p50, "+by.name, percentile(ours, 50), percentile(local, 50), none)
	}
	return nil
}

// echo types n bytes into a terminal with cat in it, each with a SendInput of its own, and returns how long each took
// from the call until its echo arrived on the stream.
func (c *client) echo(ctx context.Context, n int,
	keys func(context.Context, *pb.ProcessSelector) (func() error, func(), error)) ([]float64, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	msg := command("/bin/cat")
	msg.Stdin, msg.Pty = nil, &pb.PTY{Size: &pb.PTY_Size{Cols: 80, Rows: 24}}
	arrived := make(chan time.Time, n+warmUpKeys)
	process, ended := c.follow(ctx, msg, func(event *pb.ProcessEvent) {
		now := time.Now()
		for range event.GetData().GetPty() {
			arrived <- now
		}
	})
	var selector *pb.ProcessSelector
	select {
	case selector = <-process:
	case end := <-ended:
		return nil, fmt.Errorf("no process: %+v, %v", end.ending, end.err)
	}
	key, done, err := keys(ctx, selector)
	if err != nil {
		return nil, err
	}
	defer done()
	var took []float64
	for i := range n + warmUpKeys {
		time.Sleep(betweenKeys)
		start := time.Now()
		if err := key(); err != nil {
			return nil, fmt.Errorf("byte %d: %w", i, err)
		}
		select {
		case at := <-arrived:
			if i >= warmUpKeys {
				took = append(took, at.Sub(start).Seconds())
			}
		case end := <-ended:
			return nil, fmt.Errorf("ended before the echo: %+v, %v", end.ending, end.err)
		}
	}
	kill := connect.NewRequest(&pb.SendSignalRequest{Process: selector, Signal: pb.Signal_SIGNAL_SIGKILL})
	c.authorise(kill.Header())
	if _, err := c.proc.SendSignal(ctx, kill); err != nil {
		return nil, fmt.Errorf("ending cat: %w", err)
	}
	return took, (<-ended).err
}

func measureStall(ctx context.Context, b *bench, add add) (err error) {
	d, err := b.startEnvd(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	c := newClient(d.url, "")
	defer c.close()
	seen, stalled := 0, false
	e, err := c.run(ctx, c.proc, zeros(b.stalled), func(event *pb.ProcessEvent) {
		if seen += len(event.GetData().GetStdout()); !stalled && seen > b.stalled/4 {
			stalled = true
			select {
			case <-time.After(b.stall):
			case <-ctx.Done():
			}
		}
	})
	if err != nil {
		return err
	}
	peak, err := d.status("VmHWM")
	if err != nil {
		return err
	}
	add("stalled reader, bytes lost", float64(b.stalled-e.bytes), none, none)
	add("stalled reader, peak RSS", peak, none, none)
	return nil
}

func measureBurst(ctx context.Context, b *bench, add add) (err error) {
	d, err := b.startEnvd(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	c := newClient(d.url, "")
	var wrong atomic.Int64
	one := func() error {
		e, err := c.run(ctx, c.proc, command("/bin/true"), nil)
		if err != nil || e.check(0) != nil {
			wrong.Add(1)
		}
		return ctx.Err()
	}
	count := func() (fds, threads float64, err error) {
		c.close()
		n, err := d.openFiles()
		if err != nil {
			return 0, 0, err
		}
		threads, err = d.status("Threads")
		return float64(n), threads, err
	}
	// A burst beforehand, as large: what the daemon keeps for the next ones, it has then.
	if _, err := inParallel(clients, b.burst, one); err != nil {
		return err
	}
	fds, threads, err := count()
	if err != nil {
		return err
	}
	if _, err := inParallel(clients, b.burst, one); err != nil {
		return err
	}
	fdsAfter, threadsAfter, err := count()
	if err != nil {
		return err
	}
	add("burst of true, streams without exactly one end", float64(wrong.Load()), none, none)
	add("burst of true, zombies", float64(d.zombiesLeft()), none, none)
	add("burst of true, fds grown", fdsAfter-fds, none, none)
	add("burst of true, threads grown", threadsAfter-threads, none, none)
	return nil
}

// measureSize counts the sources as well, where they are those of the binary.
func measureSize(ctx context.Context, b *bench, add add) error {
	var sizes []float64
	for _, path := range []string{b.envd, filepath.Join(b.dir, "plain"), filepath.Join(b.dir, "bare")} {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		sizes = append(sizes, float64(info.Size()))
	}
	add("size of the binary", sizes[0], sizes[1], sizes[2])
	if !b.ofSources {
		return nil
	}
	lines := 0
	for _, pattern := range []string{"../*.go", "../*.s"} {
		sources, _ := filepath.Glob(pattern)
		for _, source := range sources {
			text, err := os.ReadFile(source)
			if err != nil {
				return err
			}
			if !strings.HasSuffix(source, "_test.go") {
				lines += bytes.Count(text, []byte("\n"))
			}
		}
	}
	add("lines of Go and assembly, neither test nor generated", float64(lines), none, none)
	return nil
}

func measureBoot(ctx context.Context, b *bench, add add) error {
	var took [3][]float64
	for range b.boots {
		for i, start := range []func() (*daemon, error){
			func() (*daemon, error) { return b.startEnvd(ctx) },
			func() (*daemon, error) { return b.startHelper(ctx, "plain") },
			func() (*daemon, error) { return b.startHelper(ctx, "bare") },
		} {
			d, err := start()
			if err == nil {
				took[i] = append(took[i], d.boot.Seconds())
				err = d.stop()
			}
			if err != nil {
				return err
			}
		}
	}
	add("from exec to the first /health", percentile(took[0], 50), percentile(took[1], 50), percentile(took[2], 50))
	return nil
}

func measureIdle(ctx context.Context, b *bench, add add) (err error) {
	var sides []*daemon
	defer func() {
		for _, d := range sides {
			err = errors.Join(err, d.stop())
		}
	}()
	for _, start := range []func() (*daemon, error){
		func() (*daemon, error) { return b.startEnvd(ctx) },
		func() (*daemon, error) { return b.startHelper(ctx, "plain") },
		func() (*daemon, error) { return b.startHelper(ctx, "bare") },
	} {
		d, err := start()
		if err != nil {
			return err
		}
		sides = append(sides, d)
	}
	if err := pause(ctx, b.idleBefore); err != nil {
		return err
	}
	for row, field := range map[string]string{"RSS when idle": "VmRSS", "threads when idle": "Threads"} {
		var values []float64
		for _, d := range sides {
			value, err := d.status(field)
			if err != nil {
				return err
			}
			values = append(values, value)
		}
		add(row, values[0], values[1], values[2])
	}
	return nil
}

func measureHealth(ctx context.Context, b *bench, add add) error {
	d, err := b.shared(ctx)
	if err != nil {
		return err
	}
	plain, err := b.plain(ctx)
	if err != nil {
		return err
	}
	var alone []func() (time.Duration, error)
	var together []func() error
	for _, side := range []*daemon{d, plain} {
		c := newClient(side.url, "")
		free := make(chan func() error, polling)
		for range polling {
			get, done, err := c.getter(ctx, "/health")
			if err != nil {
				return err
			}
			defer done()
			free <- get
		}
		one := func() error {
			get := <-free
			defer func() { free <- get }()
			return get()
		}
		together = append(together, one)
		alone = append(alone, func() (time.Duration, error) {
			start := time.Now()
			err := one()
			return time.Since(start), err
		})
	}
	took, err := inTurn(b.healths, alone)
	if err != nil {
		return err
	}
	var total [2]time.Duration
	const slices = 4
	for range slices {
		for i, side := range together {
			took, err := inParallel(polling, b.healths, side)
			if err != nil {
				return err
			}
			total[i] += took
		}
	}
	add("/health, p50", percentile(took[0], 50), percentile(took[1], 50), none)
	add("/health, p99", percentile(took[0], 99), percentile(took[1], 99), none)
	rate := func(t time.Duration) float64 { return slices * float64(b.healths) / t.Seconds() }
	add("/health rate, 32 connections", rate(total[0]), rate(total[1]), none)
	return nil
}
