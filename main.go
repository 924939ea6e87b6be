// envd, the guest agent of a microVM sandbox: configuration from flags, construction, start and stop. Nothing else.

package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
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

	port          int
	listen        string
	showVersion   bool
	showCommit    bool
	cmd           string
	cgroupRoot    string
	cgroupRootSet bool
	noCgroups     bool
	runDir        string
	allowOrigin   string
	stopTimeout   time.Duration
	startTimeout  time.Duration
	output        outputMemory
}

func parseFlags(args []string, errOut io.Writer) (*config, error) {
	c := &config{}
	f := flag.NewFlagSet("envd", flag.ContinueOnError)
	f.SetOutput(errOut)
	var ignored bool
	f.IntVar(&c.port, "port", 49983, "General: TCP `port` to listen on")
	f.StringVar(&c.listen, "listen", "", "General: `address` to listen on (default all interfaces)")
	f.BoolVar(&c.server.isnotfc, "isnotfc", false, "General: not in a Firecracker guest: a developer's machine")
	f.StringVar(&c.cmd, "cmd", "", "General: shell `command` to run at start, as the default user, with the tag startCmd")
	f.StringVar(&c.runDir, "run-dir", "/run/wrenn", "General: `directory` for the files that tell the guest about its sandbox")
	f.BoolVar(&c.showVersion, "version", false, "General: print the version and exit")
	f.BoolVar(&c.showCommit, "commit", false, "General: print the commit and exit")
	f.StringVar(&c.allowOrigin, "allow-origin", "", "Who may ask: comma-separated `origins` of web pages that may ask without a token under --isnotfc; * allows all")
	f.BoolVar(&c.server.noLocalClients, "no-local-clients", false, "Who may ask: refuse every peer that has one of this machine's own addresses")
	f.StringVar(&c.cgroupRoot, "cgroup-root", "/sys/fs/cgroup", "Control groups: cgroup2 `directory` for the groups of processes; under --isnotfc only if given")
	f.BoolVar(&c.noCgroups, "no-cgroups", false, "Control groups: use process groups only")
	f.DurationVar(&c.process.endSilence, "end-silence", 250*time.Millisecond, "Processes: how long background children of an ended process must be silent before its stream ends")
	f.DurationVar(&c.process.endGrace, "end-grace", 2*time.Second, "Processes: how long they may talk on before it ends all the same")
	f.DurationVar(&c.process.retainTime, "retain-time", 10*time.Minute, "Processes: how long the status and output of an ended process are kept")
	f.IntVar(&c.process.retainCount, "retain-count", 4096, "Processes: `count` of them that are kept")
	f.DurationVar(&c.startTimeout, "start-timeout", 30*time.Second, "Processes: how long the start of a process may hang in the kernel")
	f.IntVar(&c.process.maxProcesses, "max-processes", 4096, "Processes: `count` of processes that may run at once")
	f.Int64Var(&c.output.perLog, "output-buffer", 512<<10, "Output: `bytes` of output kept of a running process that no client follows")
	f.Int64Var(&c.output.resume, "output-resume", 4<<20, "Output: `bytes` kept of what a client was sent last, for it to come back after a broken connection")
	f.Int64Var(&c.output.liveLimit, "output-memory", 0, "Output: `bytes` of output kept of all running ones together (default 1/16 of the memory)")
	f.Int64Var(&c.output.endedLimit, "output-ended", 4<<20, "Output: `bytes` of output kept of all ended ones together")
	f.DurationVar(&c.output.grace, "resume-grace", 2*time.Second, "Output: how long a process with a full buffer waits for a client that lost its connection")
	f.DurationVar(&c.process.stallAlone, "stall-timeout", 60*time.Second, "Streams: how long a client may take no output before its stream is cut")
	f.DurationVar(&c.process.stallShared, "stall-timeout-shared", 10*time.Second, "Streams: the same while another client waits because of it")
	f.DurationVar(&c.process.keepAlive, "keepalive-interval", 90*time.Second, "Streams: interval of keep-alive events, where the client names none")
	f.DurationVar(&c.server.headerTimeout, "header-timeout", 30*time.Second, "Server: how long a client may take to send a request's header")
	f.DurationVar(&c.server.idleTimeout, "idle-timeout", 640*time.Second, "Server: how long a connection is kept open between requests")
	f.IntVar(&c.server.maxWaiting, "max-waiting-connections", 512, "Server: `count` of connections that may wait for a request or the rest of one; beyond it the oldest is closed")
	f.IntVar(&c.server.maxRequests, "max-requests", 8192, "Server: `count` of requests, streams among them, that may be served at once")
	f.DurationVar(&c.stopTimeout, "stop-timeout", 5*time.Second, "Server: how long requests may take to finish after SIGTERM")
	f.BoolVar(&ignored, "verbose", false, "Without effect: accepted for launchers of other agents")
	f.BoolVar(&ignored, "resume-handover", false, "Without effect: the same")
	f.Usage = func() { printFlags(f) }
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	f.Visit(func(fl *flag.Flag) { c.cgroupRootSet = c.cgroupRootSet || fl.Name == "cgroup-root" })
	if f.NArg() > 0 {
		err := fmt.Errorf("unexpected argument: %s", f.Arg(0))
		fmt.Fprintln(errOut, err)
		f.Usage()
		return nil, err
	}
	return c, nil
}

// flagGroups are the headings of --help; each flag's text begins with one.
var flagGroups = []string{"General", "Who may ask", "Control groups", "Processes", "Output", "Streams", "Server", "Without effect"}

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
	c, err := parseFlags(os.Args[1:], os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return
	case err != nil:
		os.Exit(2)
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
	slog.SetDefault(newLogger(os.Stdout, c.server.isnotfc))
	debug.SetGCPercent(50) // memory is dearer than time: the live heap is a few MiB, mostly output
	prepareProcess()
	listener, err := net.Listen("tcp", net.JoinHostPort(c.listen, strconv.Itoa(c.port)))
	if err != nil {
		fmt.Fprintln(os.Stderr, "envd:", err)
		return 1
	}

	users := &userDB{}
	token := &accessToken{}
	settings := newSettings(startUser(users))
	settings.setSystem("WRENN_SANDBOX", strconv.FormatBool(!c.server.isnotfc))
	writeRunDir(c)
	poller, err := newPoller()
	if err != nil {
		fmt.Fprintln(os.Stderr, "envd:", err)
		return 1
	}
	spawner := newSpawner(c.startTimeout, poller)
	spawner.cgroups = openCgroupRoot(c, spawner.canUse)
	defer spawner.cgroups.close()
	stopping := make(chan struct{})
	memory := &c.output
	if memory.liveLimit == 0 {
		memory.liveLimit = int64(totalMemory() / 16)
	}
	if c.process.path = os.Getenv("PATH"); c.process.path == "" {
		c.process.path = standardPath
	}
	processes := &processService{processOptions: c.process, users: users, settings: settings, spawner: spawner,
		poller: poller, memory: memory, stopping: stopping, running: map[uint32]*process{}}

	c.server.version = version
	c.server.allowedOrigins = strings.Split(c.allowOrigin, ",")
	srv := newServer(c.server, token, settings, users)
	initer := &initService{version: version, token: token, settings: settings}
	srv.handle(route{"POST", "/init", true, initer.serve})
	srv.service(pb.NewProcessHandler(processes, rpcOptions...))
	if !c.server.isnotfc && os.Geteuid() == 0 {
		raiseWatchLimits()
	}
	filesystem := &fsService{users: users, settings: settings, keepAlive: c.process.keepAlive, stopping: stopping,
		watchers: map[string]*pollingWatcher{}}
	srv.service(pb.NewFilesystemHandler(filesystem, rpcOptions...))
	files := &fileService{users: users, token: token, settings: settings}
	srv.handle(route{"GET", "/files", true, files.download})
	srv.handle(route{"HEAD", "/files", true, files.download})
	srv.handle(route{"POST", "/files", true, files.upload})
	srv.handle(route{"POST", "/files/compose", false, files.compose})
	httpServer := srv.httpServer()

	stopMachinery, machinery := make(chan struct{}), make(chan struct{}, 2)
	go func() { poller.run(); machinery <- struct{}{} }()
	if os.Getpid() == 1 {
		go spawner.reapOrphans(stopMachinery)
	}
	go func() {
		tickSeconds(func(now time.Time) { processes.tick(now); filesystem.tick(now) }, stopMachinery)
		machinery <- struct{}{}
	}()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	failed := make(chan error, 1)
	go func() { failed <- httpServer.Serve(listener) }()
	slog.Info("listening", "logger", "envd", "address", listener.Addr().String(), "version", version)
	if c.cmd != "" {
		go processes.runAtStart(c.cmd)
	}

	code := 0
	select {
	case s := <-signals:
		slog.Info("stopping; processes live on", "logger", "envd", "signal", s.String())
	case err := <-failed:
		slog.Error("serving failed", "logger", "envd", "error", err)
		code = 1
	}
	close(stopping)
	srv.waiting.closeAll()
	ctx, cancel := context.WithTimeout(context.Background(), c.stopTimeout*9/10)
	defer cancel()
	if err := httpServer.Shutdown(ctx); err != nil {
		httpServer.Close()
	}
	close(stopMachinery)
	poller.close()
	<-machinery
	<-machinery
	return code
}

// rpcOptions are common to both services. Compressed requests are taken, but nothing is worth compressing on the way from a
// guest to its host: it would cost ten times what the transfer costs.
var rpcOptions = []connect.HandlerOption{connect.WithRecover(recovered), connect.WithCompressMinBytes(math.MaxInt),
	connect.WithCodec(protoCodec{}), connect.WithCodec(jsonCodec{"json"}), connect.WithCodec(jsonCodec{"json; charset=utf-8"})}

// recovered answers for a handler that panicked: an error of that request only.
func recovered(_ context.Context, spec connect.Spec, _ http.Header, reason any) error {
	slog.Error("a handler panicked", "logger", "envd", "method", spec.Procedure, "error", fmt.Sprint(reason), "stack", string(debug.Stack()))
	return connect.NewError(connect.CodeInternal, errors.New("internal error"))
}

func tickSeconds(tick func(time.Time), stop <-chan struct{}) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case now := <-ticker.C:
			tick(now)
		case <-stop:
			return
		}
	}
}

// prepareProcess makes what children inherit independent of how the daemon was started.
func prepareProcess() {
	syscall.Umask(0o022)
	unix.CloseRange(3, 1<<32-1, unix.CLOSE_RANGE_CLOEXEC)
	if os.Geteuid() == 0 {
		unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	}
}

// startUser is the default user until /init names one: root, or whoever runs the daemon.
func startUser(users *userDB) string {
	if uid := os.Geteuid(); uid != 0 {
		return users.userName(uint32(uid))
	}
	return "root"
}

// writeRunDir tells the guest that it is (or is not) a sandbox.
func writeRunDir(c *config) {
	file := filepath.Join(c.runDir, ".WRENN_SANDBOX")
	err := os.MkdirAll(c.runDir, 0o755)
	if err == nil {
		os.Remove(file)
		err = os.WriteFile(file, []byte(strconv.FormatBool(!c.server.isnotfc)), 0o444)
	}
	if err != nil {
		slog.Warn("the run directory is not writable", "logger", "envd", "error", err)
	}
}

// openCgroupRoot gives nil, and a warning, where there is no cgroup2 to use.
func openCgroupRoot(c *config, canUse func(*cgroupLeaf) bool) *cgroups {
	if c.noCgroups {
		return nil
	}
	open := func() (*cgroups, error) { return openCgroups(c.cgroupRoot) }
	if c.server.isnotfc && !c.cgroupRootSet {
		open = openOwnCgroups
	}
	cg, err := open()
	if err == nil {
		leaf := cg.acquire("user")
		if !canUse(leaf) {
			err = errors.New("the kernel kills what is cloned into a cgroup")
			defer cg.close()
		}
		cg.release(leaf)
	}
	if err != nil {
		slog.Warn("no cgroup leaves; process groups serve instead", "logger", "cgroup", "error", err)
		return nil
	}
	return cg
}

func totalMemory() uint64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 1 << 30
	}
	return info.Totalram * uint64(info.Unit)
}
