// Command bench measures the real envd binary from outside and prints a table: for each figure ours, the baseline
// measured in the same run, the ratio, the target, and whether it is met; medians of the repetitions with the spread.
//
//	cd bench && go run . [-quick] [-only REGEXP] [-runs N] [-settle DURATION] [-json FILE] [-envd PATH] [-base PATH]
//
// With -base it measures two builds in turn and prints how they differ instead. It fails when a figure could not be measured or
// has become worse than that of the other build. `go run ./chart FILE PICTURE` draws what -json wrote.
//
// What a figure is measured against:
//
//	exec     /bin/true by Start to the end of the stream, against os.StartProcess + Wait, descriptors on /dev/null
//	rate     the same from 16 goroutines
//	stdout   `head -c N /dev/zero` by Start, against `head -c N /dev/zero | cat > /dev/null`
//	json     the same with the JSON codec, against our own binary codec
//	stdin    N bytes by StreamInput into `cat > /dev/null` until it has ended, against a pipe into the same
//	forward  N bytes through a forwarded port, against a connection to the port itself
//	echo     a byte by SendInput until it is back on the stream, against a PTY of this process's own
//	poll     /metrics, against the empty answer of the plain server
//	rest     the daemon left alone, against the plain server left alone for the same time
//	load     /health while 16 clients exec, upload and stream, against /health of the same daemon before
//
// size, boot, idle and health have the plain server as their baseline: net/http and nothing else (plain/), built with the same
// flags. The bare handler is the least that answers Start with connect-go (bare/); its column is there for comparison.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	pb "envd/proto"
)

// options are what the command line says.
type options struct {
	sizes
	envd, base string         // binaries; "": build one, and none to compare with
	wanted     *regexp.Regexp // figures or rows
}

func main() {
	var o options
	flag.StringVar(&o.envd, "envd", "", "measure the binary at `PATH` instead of building one")
	flag.StringVar(&o.base, "base", "", "compare with the binary at `PATH`")
	quick := flag.Bool("quick", false, "fewer and smaller runs")
	runs := flag.Int("runs", 0, "repetitions of each figure (0: 5, or 3 with -quick; 3 more with -base)")
	only := flag.String("only", "", "only the rows whose figure or name matches `REGEXP`")
	patience := flag.Duration("settle", 0, "wait up to `DURATION` before each repetition for an idle machine")
	jsonFile := flag.String("json", "", "also write the table to `FILE` as JSON")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	var err error
	if o.wanted, err = regexp.Compile(*only); err != nil {
		fmt.Fprintln(os.Stderr, "bench: -only:", err)
		os.Exit(2)
	}
	o.sizes = fullSizes
	if *quick {
		o.sizes = quickSizes
	}
	if o.base != "" {
		o.runs += 3 // the fewer, the larger a difference must be to be told from the noise
	}
	if *runs > 0 {
		o.runs = *runs
	}
	o.patience = *patience
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	start := time.Now()
	about, rows, err := run(ctx, o, os.Stderr)
	if err == nil {
		about = append(about, fmt.Sprintf("all of it took %.0f s", time.Since(start).Seconds()))
		fmt.Println(strings.Join(about, "\n") + "\n")
		if o.base == "" {
			printTable(os.Stdout, rows)
		} else if n := printComparison(os.Stdout, rows); n > 0 {
			err = fmt.Errorf("worse than the other build in %d figures", n)
		}
		err = errors.Join(err, saveJSON(*jsonFile, about, rows))
	}
	for _, r := range rows {
		if r.err != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", r.name, r.err))
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run measures every figure that is wanted. The error is about the benchmark itself; a figure that could not be
// measured has its error in its rows.
func run(interrupted context.Context, o options, progress io.Writer) (about []string, rows []*row, err error) {
	dir, err := os.MkdirTemp("", "envd-bench-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	b := &bench{sizes: o.sizes, dir: dir, envd: o.envd, cgroup2: writableCgroup2(), servers: map[string]*daemon{}}
	fmt.Fprintln(progress, "building")
	if err := buildHelpers(interrupted, dir); err != nil {
		return nil, nil, err
	}
	if o.envd == "" {
		b.ofSources = true
		if b.envd, err = build(interrupted, dir); err != nil {
			return nil, nil, err
		}
	} else if b.envd, err = filepath.Abs(o.envd); err != nil {
		return nil, nil, err
	}
	if b.null, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
		return nil, nil, err
	}
	defer b.null.Close()
	if os.Geteuid() == 0 {
		b.user = ordinaryUser()
	}
	defer func() { err = errors.Join(err, b.stopServers()) }()
	if about, err = b.about(interrupted); err != nil {
		return nil, nil, err
	}
	builds := []*bench{b}
	if o.base != "" {
		base := *b
		base.isBase, base.ofSources = true, false
		if base.envd, err = filepath.Abs(o.base); err != nil {
			return nil, nil, err
		}
		aboutBase, err := base.about(interrupted)
		if err != nil {
			return nil, nil, err
		}
		about = append(about, "compared with "+aboutBase[0])
		builds = append(builds, &base)
	}
	var busy []float64
	for _, f := range figures {
		ofFigure := map[string]*row{}
		for _, spec := range f.rows {
			if o.wanted.MatchString(f.name) || o.wanted.MatchString(spec.name) {
				r := &row{rowSpec: spec, figure: f.name}
				ofFigure[spec.name] = r
				rows = append(rows, r)
			}
		}
		if len(ofFigure) == 0 {
			continue
		}
		begun := time.Now()
		for i := range o.runs {
			err := f.repeat(interrupted, builds, ofFigure, &busy)
			if err := interrupted.Err(); err != nil {
				return about, rows, err
			}
			if err != nil {
				for r := range maps.Values(ofFigure) {
					r.err = err
				}
				break
			}
			slices.Reverse(builds) // what comes first has no advantage
			fmt.Fprintf(progress, "%s, run %d of %d, %.1f s so far\n", f.name, i+1, o.runs, time.Since(begun).Seconds())
		}
	}
	noise := summarise(busy)
	about = append(about, fmt.Sprintf("the machine before each run: %.0f%% busy with other things (%.0f-%.0f)",
		100*noise.Median, 100*noise.Min, 100*noise.Max))
	return about, rows, nil
}

// repeat is one repetition of a figure, for each build.
func (f figure) repeat(interrupted context.Context, builds []*bench, rows map[string]*row, busy *[]float64) error {
	for _, b := range builds {
		runtime.GC()
		*busy = append(*busy, settle(interrupted, b.patience))
		ctx, cancel := context.WithTimeout(interrupted, 3*time.Minute)
		err := f.measure(ctx, b, func(name string, ours, baseline, bare float64) {
			if r := rows[name]; r != nil && b.isBase {
				r.base = append(r.base, ours)
			} else if r != nil {
				r.add(ours, baseline, bare)
			}
		})
		cancel()
		if err != nil && b.isBase {
			err = fmt.Errorf("the build to compare with: %w", err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// about says what was measured, on what, and how.
func (b *bench) about(ctx context.Context) ([]string, error) {
	version, err := exec.Command(b.envd, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --version: %w", b.envd, err)
	}
	commit, _ := exec.Command(b.envd, "--commit").Output()
	d, err := b.shared(ctx)
	if err != nil {
		return nil, err
	}
	lines := []string{
		fmt.Sprintf("envd %s (%s), %s, %d CPUs, Linux %s", bytes.TrimSpace(version), bytes.TrimSpace(commit),
			runtime.Version(), runtime.NumCPU(), kernel()),
		fmt.Sprintf("%d runs: median (lowest-highest); a ratio is the median of the runs' ratios", b.runs),
		"clients: connect-go or, where said, a raw reader of envelopes; Connect, HTTP/1.1, keep-alive, no compression",
	}
	where, err := placement(ctx, d)
	if err != nil {
		return nil, err
	}
	if b.cgroup2 == "" {
		where += " (no writable cgroup v2: processes have no leaf)"
	}
	lines = append(lines, "cgroup of a started process: "+where)
	if b.user != "" {
		lines = append(lines, "ordinary user: "+b.user)
	}
	return lines, nil
}

// placement asks a process that the daemon started in which cgroup v2 group it is.
func placement(ctx context.Context, d *daemon) (string, error) {
	c := newClient(d.url, "")
	defer c.close()
	var out []byte
	_, err := c.run(ctx, c.proc, command("/bin/cat", "/proc/self/cgroup"), func(event *pb.ProcessEvent) {
		out = append(out, event.GetData().GetStdout()...)
	})
	for line := range strings.Lines(string(out)) {
		if group, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return group, err
		}
	}
	return "none", err
}

func kernel() string {
	var u syscall.Utsname
	if syscall.Uname(&u) != nil {
		return "?"
	}
	var release []byte
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		release = append(release, byte(c))
	}
	return string(release)
}

func saveJSON(path string, about []string, rows []*row) error {
	if path == "" {
		return nil
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(writeJSON(f, about, rows), f.Close())
}
