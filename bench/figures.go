// The figures: what is measured, in which rows it shows, and what each row must show.
//
// A measurement is one repetition. It measures ours and the baseline next to each other, in turn (latencies in blocks
// of a few calls), because the machine is noisy, and adds one value to each of its rows.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/user"
	"runtime"
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
	streams    int
	sleep      time.Duration
	burst      int
	healths    int
	idleBefore time.Duration // RSS is read
	patience   time.Duration // with a busy machine
}

var (
	fullSizes = sizes{runs: 5, execs: 1000, parallel: 2000, stdout: 512 << 20, json: 128 << 20, stdin: 64 << 20, keys: 600,
		stalled: 256 << 20, stall: 5 * time.Second, streams: 500, sleep: 3 * time.Second, burst: 2000, healths: 4000,
		idleBefore: time.Second}
	quickSizes = sizes{runs: 3, execs: 200, parallel: 480, stdout: 128 << 20, json: 32 << 20, stdin: 32 << 20, keys: 300,
		stalled: 64 << 20, stall: time.Second, streams: 500, sleep: 3 * time.Second, burst: 480, healths: 1000,
		idleBefore: 200 * time.Millisecond}
)

const (
	clients    = 16
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
		{"exec as root, p50", seconds, ratioAtMost(1.9)},
		{"exec as root, p90", seconds, target{}},
	}, func(ctx context.Context, b *bench, add add) error {
		return measureExec(ctx, b, "", "exec as root", add)
	}},
	{"exec-user", []rowSpec{
		{"exec as a user, p50", seconds, ratioAtMost(3.2)},
		{"exec as a user, p90", seconds, target{}},
	}, func(ctx context.Context, b *bench, add add) error {
		if b.user == "" {
			return errors.New("needs root and a user in /etc/passwd")
		}
		return measureExec(ctx, b, b.user, "exec as a user", add)
	}},
	{"rate", []rowSpec{
		{"exec rate, 16 clients", perSecond, ratioAtLeast(0.5)},
	}, measureRate},
	{"stdout", []rowSpec{
		{"stdout, connect-go client", throughput, ratioAtLeast(0.18)},
		{"stdout, raw reader", throughput, ratioAtLeast(0.18)},
		{"stdout, peak RSS", bytesSize, under(32 << 20)},
	}, measureStdout},
	{"json", []rowSpec{
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
	{"streams", []rowSpec{
		{"500 streams of sleep, RSS", bytesSize, under(40 << 20)},
		{"500 streams of sleep, last start", seconds, target{}},
	}, measureStreams},
	{"burst", []rowSpec{
		{"burst of true, streams without exactly one end", count, exactly(0)},
		{"burst of true, zombies", count, exactly(0)},
		{"burst of true, fds grown", count, exactly(0)},
		{"burst of true, threads grown", count, target{}},
	}, measureBurst},
	{"idle", []rowSpec{
		{"/health, p50", seconds, target{}},
		{"/health, p99", seconds, target{}},
		{"/health rate, 16 clients", perSecond, target{}},
		{"from exec to the first /health", seconds, target{}},
		{"RSS when idle", bytesSize, target{}},
		{"size of the binary", bytesSize, target{}},
	}, measureIdle},
}

// bench is what the measurements share.
type bench struct {
	sizes
	dir     string
	envd    string
	cgroup2 string // a writable cgroup v2 mount, or ""
	user    string // an ordinary user, or ""
	null    *os.File
	servers map[string]*daemon
}

// server returns the running envd or bare handler that most measurements share.
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
	return b.server(ctx, "envd", b.startEnvd)
}
func (b *bench) bare(ctx context.Context) (*daemon, error) { return b.server(ctx, "bare", startBare) }

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

// inTurn calls each side n times, in blocks that alternate, after some calls that are not counted.
func inTurn(n int, sides []func() (time.Duration, error)) ([][]float64, error) {
	took := make([][]float64, len(sides))
	for _, side := range sides {
		for range warmUp {
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
	local := func() (float64, error) {
		took, err := localStdout(b.stdout)
		return float64(b.stdout) / took.Seconds(), err
	}
	base1, err := local()
	if err != nil {
		return err
	}
	viaConnect, err := through(b.stdout, func() (ending, error) { return c.run(ctx, c.proc, zeros(b.stdout), nil) })
	if err != nil {
		return err
	}
	bareConnect, err := through(b.stdout, func() (ending, error) {
		return bareClient.run(ctx, bareClient.proc, zeros(b.stdout), nil)
	})
	if err != nil {
		return err
	}
	base2, err := local()
	if err != nil {
		return err
	}
	viaRaw, err := through(b.stdout, func() (ending, error) { return c.runRaw(ctx, "proto", zeros(b.stdout)) })
	if err != nil {
		return err
	}
	bareRaw, err := through(b.stdout, func() (ending, error) { return bareClient.runRaw(ctx, "proto", zeros(b.stdout)) })
	if err != nil {
		return err
	}
	peak, err := d.status("VmHWM")
	if err != nil {
		return err
	}
	add("stdout, connect-go client", viaConnect, base1, bareConnect)
	add("stdout, raw reader", viaRaw, base2, bareRaw)
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
	var rates []float64
	for _, run := range []func() (ending, error){
		func() (ending, error) { return c.run(ctx, c.json, msg, nil) },
		func() (ending, error) { return c.run(ctx, c.proc, msg, nil) },
		func() (ending, error) { return c.runRaw(ctx, "json", msg) },
		func() (ending, error) { return c.runRaw(ctx, "proto", msg) },
	} {
		rate, err := through(b.json, run)
		if err != nil {
			return err
		}
		rates = append(rates, rate)
	}
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

func measureStreams(ctx context.Context, b *bench, add add) (err error) {
	local, err := localSleeps(b.null, b.streams, b.sleep)
	if err != nil {
		return err
	}
	d, err := b.startEnvd(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	c := newClient(d.url, "")
	defer c.close()
	started := make(chan struct{}, b.streams)
	done := make(chan error, b.streams)
	start := time.Now()
	for range b.streams {
		go func() {
			e, err := c.run(ctx, c.proc, command("/bin/sleep", sleepArgument(b.sleep)), func(event *pb.ProcessEvent) {
				if event.GetStart() != nil {
					started <- struct{}{}
				}
			})
			if err == nil {
				err = e.check(0)
			}
			done <- err
		}()
	}
	for range b.streams {
		select {
		case <-started:
		case err := <-done:
			return fmt.Errorf("a stream ended before the last one had started: %v", err)
		}
	}
	took := time.Since(start)
	// The plateau lasts until the first sleep ends; the highest value in it counts.
	var rss float64
	var ended int
	for plateau := true; plateau; {
		now, err := d.status("VmRSS")
		if err != nil {
			return err
		}
		rss = max(rss, now)
		select {
		case err := <-done:
			if err != nil {
				return err
			}
			ended, plateau = 1, false
		case <-time.After(20 * time.Millisecond):
		}
	}
	for ; ended < b.streams; ended++ {
		if err := <-done; err != nil {
			return err
		}
	}
	add("500 streams of sleep, RSS", rss, none, none)
	add("500 streams of sleep, last start", took.Seconds(), local.Seconds(), none)
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

func (c *client) health(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, "GET", c.url+"/health", nil)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return err
	}
	var body [1024]byte
	for err == nil {
		_, err = resp.Body.Read(body[:])
	}
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("/health: %s", resp.Status)
	}
	return nil
}

func measureIdle(ctx context.Context, b *bench, add add) (err error) {
	d, err := b.startEnvd(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	select {
	case <-time.After(b.idleBefore):
	case <-ctx.Done():
		return ctx.Err()
	}
	rss, err := d.status("VmRSS")
	if err != nil {
		return err
	}
	c := newClient(d.url, "")
	defer c.close()
	took, err := inTurn(b.healths, []func() (time.Duration, error){func() (time.Duration, error) {
		start := time.Now()
		err := c.health(ctx)
		return time.Since(start), err
	}})
	if err != nil {
		return err
	}
	all, err := inParallel(clients, b.healths, func() error { return c.health(ctx) })
	if err != nil {
		return err
	}
	binary, err := os.Stat(b.envd)
	if err != nil {
		return err
	}
	add("/health, p50", percentile(took[0], 50), none, none)
	add("/health, p99", percentile(took[0], 99), none, none)
	add("/health rate, 16 clients", float64(b.healths)/all.Seconds(), none, none)
	add("from exec to the first /health", d.boot.Seconds(), none, none)
	add("RSS when idle", rss, none, none)
	add("size of the binary", float64(binary.Size()), none, none)
	return nil
}
