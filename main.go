// envd, the guest agent of a microVM sandbox: configuration from flags, construction, start and stop. Nothing else.

package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

const version = "0.7.0"

// commit is set by `make build`.
var commit = "unknown"

const standardPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/games:/usr/local/games"

type config struct {
	server  serverOptions
	process processOptions
	life    lifecycleOptions

	port         int
	listen       string
	showVersion  bool
	showCommit   bool
	cmd          string
	cgroupRoot   string
	noCgroups    bool
	pidsMax      int
	forward      netip.Addr
	runDir       string
	nameservers  string
	ignoredWords []string
	e2bNames     bool
	stopTimeout  time.Duration
	startTimeout time.Duration
	output       outputMemory
	watcherIdle  time.Duration
	memoryLimit  byteSize
}

func parseFlags() *config {
	c := &config{server: serverOptions{version: version}}
	f := flag.NewFlagSet("envd", flag.ExitOnError)
	f.IntVar(&c.port, "port", 49983, "General: TCP `port` to listen on")
	f.StringVar(&c.listen, "listen", "", "General: `address` to listen on (default all interfaces)")
	f.BoolVar(&c.server.isnotfc, "isnotfc", false, "General: not in a Firecracker guest: a developer's machine")
	f.TextVar(&c.forward, "forward-address", netip.AddrFrom4([4]byte{169, 254, 0, 21}), "General: `address` at which ports that listen on loopback alone are reachable as well; empty: none")
	f.StringVar(&c.cmd, "cmd", "", "General: shell `command` to run at start, as the default user, with the tag startCmd")
	f.StringVar(&c.runDir, "run-dir", "/run/wrenn", "General: `directory` for the files that tell the guest about its sandbox")
	f.StringVar(&c.nameservers, "nameservers", "8.8.8.8,1.1.1.1", "As process 1: comma-separated `addresses` for an empty /etc/resolv.conf, where ip= names none")
	f.BoolVar(&c.e2bNames, "e2b-names", false, "General: E2B's names, too, for the sandbox's variables, its files and its event server")
	f.Var(&c.memoryLimit, "memory-limit", "General: `bytes` that envd holds for clients and the guest, output included, with a unit KiB, MiB or GiB, 16MiB at least (default an eighth of the memory, 32MiB to 512MiB)")
	f.BoolVar(&c.showVersion, "version", false, "General: print the version and exit")
	f.BoolVar(&c.showCommit, "commit", false, "General: print the commit and exit")
	f.Func("allow-origin", "Who may ask: comma-separated `origins` of web pages that may ask without a token under --isnotfc, and whose hosts are, beside loopback ones, names and addresses that we may be asked under (http://192.168.1.2:49983); * allows all", func(list string) error {
		c.server.allowedOrigins = strings.Split(list, ",")
		return nil
	})
	f.Func("host-address", "Who may ask: `address` or CIDR of the host of a guest, may be repeated: nobody else may prepare a snapshot, or ask at all with --no-local-clients (default everybody who has none of the guest's own addresses and is not behind its bridges and veths, but for those of the default route and of --forward-address)", func(text string) error {
		host, err := netip.ParsePrefix(text)
		if err != nil {
			var addr netip.Addr
			addr, err = netip.ParseAddr(text)
			host = netip.PrefixFrom(addr.Unmap(), addr.Unmap().BitLen())
		}
		c.server.hosts = append(c.server.hosts, host.Masked())
		return err
	})
	f.BoolVar(&c.server.noLocalClients, "no-local-clients", false, "Who may ask: refuse every peer that is on this machine or in one of its containers (--host-address)")
	f.StringVar(&c.cgroupRoot, "cgroup-root", "", "Control groups: cgroup2 `directory` for the groups of processes (default /sys/fs/cgroup; under --isnotfc envd's own)")
	f.BoolVar(&c.noCgroups, "no-cgroups", false, "Control groups: use process groups only")
	f.IntVar(&c.pidsMax, "pids-max", 0, "Control groups: `count` of processes and threads in the group of terminals, and in that of other processes (default 7/16 of the kernel's limit)")
	f.DurationVar(&c.process.endSilence, "end-silence", 250*time.Millisecond, "Processes: how long background children of an ended process must be silent before its stream ends")
	f.DurationVar(&c.process.endGrace, "end-grace", 2*time.Second, "Processes: how long they may talk on before it ends all the same")
	f.DurationVar(&c.process.retainTime, "retain-time", 10*time.Minute, "Processes: how long the status and output of an ended process are kept")
	f.IntVar(&c.process.retainCount, "retain-count", 4096, "Processes: `count` of them that are kept")
	f.DurationVar(&c.startTimeout, "start-timeout", 30*time.Second, "Processes: how long the start of a process may hang in the kernel")
	f.UintVar(&c.process.maxProcesses, "max-processes", 4096, "Processes: `count` of processes that may run at once")
	f.Int64Var(&c.output.perLog, "output-buffer", 512<<10, "Output: `bytes` of output kept of a running process that no client follows")
	f.Int64Var(&c.output.resume, "output-resume", 4<<20, "Output: `bytes` kept of what a client was sent last, for it to come back after a broken connection")
	f.Int64Var(&c.output.liveLimit, "output-memory", 0, "Output: `bytes` of output kept of all running ones together (default 3/8 of --memory-limit)")
	f.Int64Var(&c.output.endedLimit, "output-ended", 4<<20, "Output: `bytes` of output kept of all ended ones together")
	f.DurationVar(&c.output.grace, "resume-grace", 2*time.Second, "Output: how long a process with a full buffer waits for a client that lost its connection")
	f.DurationVar(&c.process.stallAlone, "stall-timeout", 60*time.Second, "Streams: how long a client may take no output before its stream is cut")
	f.DurationVar(&c.process.stallShared, "stall-timeout-shared", 10*time.Second, "Streams: the same while another client waits because of it")
	f.DurationVar(&c.process.keepAlive, "keepalive-interval", 90*time.Second, "Streams: interval of keep-alive events, where the client names none")
	f.DurationVar(&c.watcherIdle, "watcher-idle", time.Hour, "Streams: how long a polling watcher is kept that no client asks")
	f.DurationVar(&c.server.headerTimeout, "header-timeout", 30*time.Second, "Server: how long a client may take to send a request's header")
	f.DurationVar(&c.server.idleTimeout, "idle-timeout", 640*time.Second, "Server: how long a connection is kept open between requests")
	f.DurationVar(&c.server.answerTimeout, "answer-timeout", 30*time.Second, "Server: how long a client may take nothing of an answer that is no stream and no file")
	f.DurationVar(&c.stopTimeout, "stop-timeout", 5*time.Second, "Server: how long requests may take to finish after SIGTERM")
	f.DurationVar(&c.life.syncTimeout, "sync-timeout", 2400*time.Millisecond, "Snapshots: how long preparing one waits for the disk; 0s: dirty data is not written")
	f.DurationVar(&c.life.backstop, "prepared-timeout", 30*time.Second, "Snapshots: how long the sandbox stays prepared for one when nobody asks for /health or /init")
	f.DurationVar(&c.life.thawTimeout, "thaw-timeout", 10*time.Minute, "Snapshots: how long processes and files stay frozen when nobody thaws them")
	f.Uint("max-requests", 0, "Without effect: --memory-limit bounds them")
	f.Uint("max-waiting-connections", 0, "Without effect: the same")
	f.Bool("verbose", false, "Without effect: accepted for launchers of other agents")
	f.Bool("resume-handover", false, "Without effect: the same")
	f.Usage = func() { printFlags(f) }
	if os.Getpid() == 1 {
		f.Init("envd", flag.ContinueOnError)
		c.ignoredWords = parseKernelWords(f, os.Args[1:])
	} else if f.Parse(os.Args[1:]); f.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "unexpected argument: %s\n", f.Arg(0))
		f.Usage()
		os.Exit(2)
	}
	return c
}

// flagGroups are the headings of --help; each flag's text begins with one.
var flagGroups = []string{"General", "As process 1", "Who may ask", "Control groups", "Processes", "Output", "Streams", "Server", "Snapshots",
	"Without effect"}

func printFlags(f *flag.FlagSet) {
	out := f.Output()
	fmt.Fprintln(out, "Usage: envd [flags]\n\nThe guest agent of a microVM sandbox. The level of the log is set by ENVD_LOG=debug|info|warn|error.")
	for _, group := range flagGroups {
		fmt.Fprintf(out, "\n%s:\n", group)
		f.VisitAll(func(fl *flag.Flag) {
			argument, usage := flag.UnquoteUsage(fl)
			if usage, ok := strings.CutPrefix(usage, group+": "); ok {
				if fl.DefValue != "" && fl.DefValue != "false" && fl.DefValue != "0" {
					usage += " (default " + fl.DefValue + ")"
				}
				fmt.Fprintf(out, "  --%-32s %s\n", fl.Name+" "+argument, usage)
			}
		})
	}
}

func main() {
	c := parseFlags()
	switch {
	case c.showVersion:
		fmt.Println(version)
	case c.showCommit:
		fmt.Println(commit)
	default:
		os.Exit(run(c))
	}
}

// run serves until SIGTERM or SIGINT.
func run(c *config) int {
	guest, isInit := !c.server.isnotfc, os.Getpid() == 1
	ownsMachine := guest && isInit // else it is a container's process 1
	exporter, stdout := &logExporter{off: !guest}, newStdoutLog(!guest)
	defer stdout.flush()
	slog.SetDefault(newLogger(io.MultiWriter(exporter, stdout), !guest))
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // that nobody reads the log any more ends nothing
	if isInit {
		heedAsInit(signals)
	}
	var network <-chan struct{}
	if ownsMachine {
		network = boot(c.nameservers)
	}
	if len(c.ignoredWords) > 0 {
		slog.Warn("words on the command line have no effect", "logger", "init", "words", c.ignoredWords)
	}
	debug.SetGCPercent(75) // memory is dearer than time, to a point: at 50 small requests took a tenth longer
	prepareProcess(guest)
	listener, err := listen(c, signals, ownsMachine, stdout)
	poller, failure := newPoller()
	if err = cmp.Or(err, failure); err != nil {
		fmt.Fprintln(os.Stderr, "envd:", err)
		return 1
	}

	if c.memoryLimit = cmp.Or(c.memoryLimit, byteSize(defaultMemoryLimit(totalMemory()))); c.memoryLimit < memoryLimitLeast/2 {
		// Process 1 boots with whatever it is told, but with less than this it would answer nobody.
		slog.Warn("--memory-limit is too small and was raised", "logger", "envd", "asked", c.memoryLimit.String())
		c.memoryLimit = memoryLimitLeast / 2
	}
	budget := newBudget(int64(c.memoryLimit))
	// What the budget does not count, and garbage that has not been collected: beyond it the collector works harder.
	debug.SetMemoryLimit(int64(c.memoryLimit) + memoryLimitSlack)
	users, token := &userDB{}, &accessToken{}
	settings := &settings{defaultUser: "root", e2bNames: c.e2bNames, env: map[string]string{}}
	stopping, streams := make(chan struct{}), &atomic.Int64{}
	c.process.path = cmp.Or(os.Getenv("PATH"), standardPath)
	spawner := newSpawner(c.startTimeout, poller)
	ports := newPorts(c.forward, listener.Addr().(*net.TCPAddr).Port)
	defer ports.quiesce(time.Time{})
	processes := &processService{processOptions: c.process, users: users, settings: settings, spawner: spawner,
		onStart: ports.started, streams: streams, poller: poller, memory: &c.output, budget: budget, stopping: stopping, byPid: map[uint32]*process{}}
	filesystem := &fsService{users: users, settings: settings, budget: budget, keepAlive: c.process.keepAlive, idle: c.watcherIdle,
		stopping: stopping, streams: streams, watchers: map[string]*pollingWatcher{}}
	files := &fileService{users: users, token: token, settings: settings, budget: budget}
	life := newLifecycle(c.life, guest)
	metrics := &metrics{others: func() []figure {
		return []figure{
			{"envd_processes_running", "Processes that clients have started and that run.", float64(processes.running.Load())},
			{"envd_streams_open", "Streams of output, input and events that are open.", float64(streams.Load())},
			{"envd_output_lost_bytes_total", "Output that was dropped before any client had been sent it.", float64(c.output.lost.Load())},
			{"envd_watch_overflows_total", "Watchers that ended because events were lost.", float64(filesystem.overflows.Load())},
			{"envd_restores_total", "Preparations of a snapshot that the daemon has recovered from.", float64(life.restores.Load())},
		}
	}}
	initer := &initService{version: version, token: token, settings: settings, files: files, runDir: c.runDir, guest: guest,
		lock: make(chan struct{}, 1), thaw: life.thaw, setClock: life.stepClock,
		resume: func(entropy ...[]byte) { life.reseed(entropy...); life.restore(prepareWait) },
		learned: func(m metadata) {
			life.reseed([]byte(m.InstanceID), []byte(m.EnvID))
			exporter.redirect(m.Address, m.InstanceID, m.EnvID)
		},
	}
	c.server.guestAddress = c.forward
	srv := newServer(c.server, token, users, life, budget)
	initer.largeBody, initer.lookup = srv.inits.enter, srv.lookups.enter
	srv.services = sync.OnceValue(func() map[string]http.Handler {
		process, processHandler := pb.NewProcessHandler(processes, rpcOptions()...)
		fs, fsHandler := pb.NewFilesystemHandler(filesystem, append(rpcOptions(), boundFileCalls)...)
		return map[string]http.Handler{process: processHandler, fs: fsHandler}
	})
	srv.routes = []route{
		{"GET", "/health", true, srv.health},
		{"POST", "/init", true, initer.serve},
		{"POST", "/snapshot/prepare", true, srv.prepare},
		{"GET", "/envs", false, func(w http.ResponseWriter, r *http.Request) { writeJSON(w, settings.environment()) }},
		{"GET", "/metrics", false, metrics.serve},
		{"GET", "/files", true, files.download},
		{"HEAD", "/files", true, files.download},
		{"POST", "/files", true, files.upload},
		{"POST", "/files/compose", false, files.compose},
		{"POST", "/freeze", false, life.freeze},
		{"POST", "/unfreeze", false, life.control(life.thawGroups)},
		{"POST", "/fsfreeze", false, life.control(life.freezeFiles)},
		{"POST", "/fsthaw", false, life.control(life.thawFiles)},
	}
	life.hooks = []lifecycleHook{{"connections", srv.quiesce, srv.resume}, {"ports", ports.quiesce, ports.resume},
		{"metrics", nil, metrics.discard}, {"logs", exporter.quiesce, exporter.resume}}
	if guest {
		life.hooks = append(life.hooks, lifecycleHook{"metadata", initer.stopPolling, initer.pollMetadata})
	}
	if ownsMachine {
		<-network
	}
	go srv.listen(listener)

	// From here on /health is answered; other requests wait for what follows.
	if uid := os.Geteuid(); uid != 0 {
		settings.defaultUser = users.now().names.of(uint32(uid))
	}
	initer.setSystem("SANDBOX", strconv.FormatBool(guest), 0o444)
	cgroups := openCgroupRoot(c)
	defer cgroups.close()
	spawner.cgroups, life.cgroups = cgroups, cgroups
	c.output.liveLimit = cmp.Or(c.output.liveLimit, max(outputShare(int64(c.memoryLimit))-c.output.endedLimit, outputLeast))
	ticks := []func(time.Time){processes.tick, filesystem.tick, ports.tick, srv.tick, life.tick,
		(&trimmer{budget: budget}).tick}
	if guest && os.Geteuid() == 0 && ownMachine() {
		protectLinks()
		raiseWatchLimits(totalMemory())
		memoryForContent.reserve.Store(memoryReserve(totalMemory()))
		ticks = append(ticks, (&reclaimer{busy: life.preparing}).tick)
	}
	metrics.sample(time.Now())
	srv.inside.refresh(0)
	go poller.run() // this and what follows lives as long as the daemon does
	if isInit {
		go spawner.reapOrphans()
	}
	go func() {
		for now := range time.Tick(time.Second) {
			for _, tick := range ticks {
				tick(now)
			}
		}
	}()
	close(srv.ready)
	slog.Info("listening", "logger", "envd", "address", listener.Addr().String(), "version", version)
	if guest {
		initer.pollMetadata()
	}
	if c.cmd != "" {
		go processes.runAtStart(c.cmd)
	}

	reason := <-signals
	life.thaw() // what is frozen sees no signal, nor does who writes to a frozen file
	slog.Info("stopping", "logger", "envd", "signal", reason.String(), "processes_live_on", !isInit)
	if isInit {
		listener.Close()
		endProcesses()
		ctx, cancel := context.WithTimeout(context.Background(), time.Second/4) // their clients see them end
		srv.http.Shutdown(ctx)
		cancel()
		c.stopTimeout = min(c.stopTimeout, time.Second)
	}
	close(stopping)
	srv.conns.closeWaiting() // requests are waited for, but not their clients
	ctx, cancel := context.WithTimeout(context.Background(), c.stopTimeout*9/10)
	defer cancel()
	srv.http.Shutdown(ctx)
	srv.http.Close()
	if ownsMachine {
		powerOff(reason == syscall.SIGINT, stdout)
	}
	return 0
}

// listen is patient as process 1: the address may belong to a network card that is still to come.
func listen(c *config, signals <-chan os.Signal, patient bool, log *stdoutLog) (listener net.Listener, err error) {
	for said := false; ; said = true {
		listener, err = net.Listen("tcp", net.JoinHostPort(c.listen, strconv.Itoa(c.port)))
		if err == nil || !patient {
			return listener, err
		}
		if !said {
			slog.Error("cannot listen, will try again", "logger", "envd", "error", err)
		}
		select {
		case s := <-signals:
			powerOff(s == syscall.SIGINT, log)
			return nil, err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// outputLeast, in bytes, is what live output has where --output-ended takes all of its share.
const outputLeast = 4 << 20

// memoryLimitSlack, in bytes, is what the runtime may have beyond the memory limit: its own needs, and garbage.
const memoryLimitSlack = 24 << 20

// boundFileCalls bounds what file systems can make hang; the streams, which last, are no part of it.
var boundFileCalls = connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		turn := turn{ctx: ctx}
		if err := turn.take(patience); err == errFilesHang {
			return nil, connect.NewError(connect.CodeResourceExhausted, err)
		} else if err != nil {
			return nil, err
		}
		defer turn.giveUp()
		return next(ctx, req)
	}
}))

// rpcOptions are common to both services. Compressed requests are taken, but nothing is worth compressing on the way from a
// guest to its host: it would cost ten times what the transfer costs.
func rpcOptions() []connect.HandlerOption {
	return []connect.HandlerOption{connect.WithRecover(recovered), connect.WithCompressMinBytes(math.MaxInt), connect.WithReadMaxBytes(maxMessage),
		connect.WithCodec(protoCodec{}), connect.WithCodec(jsonCodec{"json"}), connect.WithCodec(jsonCodec{"json; charset=utf-8"})}
}

// recovered answers for a handler that panicked: an error of that request only.
func recovered(_ context.Context, spec connect.Spec, _ http.Header, reason any) error {
	slog.Error("a handler panicked", "logger", "envd", "method", spec.Procedure, "error", fmt.Sprint(reason), "stack", string(debug.Stack()))
	return connect.NewError(connect.CodeInternal, errors.New("internal error"))
}

// prepareProcess makes what children inherit independent of how the daemon was started.
func prepareProcess(guest bool) {
	syscall.Umask(0o022)
	unix.CloseRange(3, 1<<32-1, unix.CLOSE_RANGE_CLOEXEC)
	if os.Geteuid() == 0 {
		unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
		if guest { // the OOM killer takes anyone but the agent
			os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0)
			keepResident()
		}
	}
}

// openCgroupRoot gives nil, and a warning, where there is no cgroup2 to use.
func openCgroupRoot(c *config) (g *cgroups) {
	if c.noCgroups {
		return nil
	}
	var err error
	if c.server.isnotfc && c.cgroupRoot == "" {
		g, err = openOwnCgroups()
	} else if g, err = openCgroups(cmp.Or(c.cgroupRoot, "/sys/fs/cgroup")); err == nil {
		g.limit(totalMemory(), c.pidsMax)
	}
	if err != nil {
		slog.Warn("no cgroup leaves; process groups serve instead", "logger", "cgroup", "error", err)
		return nil
	}
	return g
}
