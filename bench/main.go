// Command bench measures the real envd binary from outside and prints a table: for each figure ours, the baseline
// measured in the same run, the ratio, the target, and whether it is met; medians of the repetitions with the spread.
//
//	cd bench && go run . [-quick] [-only REGEXP] [-runs N] [-settle DURATION] [-json FILE] [-envd PATH]
//
// What a figure is measured against:
//
//	exec     /bin/true by Start to the end of the stream, against os.StartProcess + Wait, descriptors on /dev/null
//	rate     the same from 16 goroutines
//	stdout   `head -c N /dev/zero` by Start, against `head -c N /dev/zero | cat > /dev/null`
//	json     the same with the JSON codec, against our own binary codec
//	stdin    N bytes by StreamInput into `cat > /dev/null` until it has ended, against a pipe into the same
//	echo     a byte by SendInput until it is back on the stream, against a PTY of this process's own
//
// The bare handler is the least that answers Start with connect-go (bare.go); its column is there for comparison.
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
	"strings"
	"syscall"
	"time"

	pb "envd/proto"
)

func main() {
	serveBareIfAsked()
	envd := flag.String("envd", "", "measure the binary at `PATH` instead of building one")
	quick := flag.Bool("quick", false, "fewer and smaller runs")
	runs := flag.Int("runs", 0, "repetitions of each figure (0: 5, or 3 with -quick)")
	only := flag.String("only", "", "only the rows whose figure or name matches `REGEXP`")
	patience := flag.Duration("settle", 0, "wait up to `DURATION` before each repetition for an idle machine")
	jsonFile := flag.String("json", "", "also write the table to `FILE` as JSON")
	flag.Parse()
	if flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	wanted, err := regexp.Compile(*only)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench: -only:", err)
		os.Exit(2)
	}
	s := fullSizes
	if *quick {
		s = quickSizes
	}
	if *runs > 0 {
		s.runs = *runs
	}
	s.patience = *patience
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	about, rows, err := run(ctx, *envd, s, wanted, os.Stderr)
	if err == nil {
		for _, line := range about {
			fmt.Println(line)
		}
		fmt.Println()
		printTable(os.Stdout, rows)
		err = saveJSON(*jsonFile, about, rows)
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
func run(interrupted context.Context, envd string, s sizes, wanted *regexp.Regexp, progress io.Writer) (about []string,
	rows []*row, err error) {
	dir, err := os.MkdirTemp("", "envd-bench-")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	if envd == "" {
		fmt.Fprintln(progress, "building envd")
		if envd, err = build(interrupted, dir); err != nil {
			return nil, nil, err
		}
	} else if envd, err = filepath.Abs(envd); err != nil {
		return nil, nil, err
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, nil, err
	}
	defer null.Close()
	b := &bench{sizes: s, dir: dir, envd: envd, cgroup2: writableCgroup2(), null: null, servers: map[string]*daemon{}}
	if os.Geteuid() == 0 {
		b.user = ordinaryUser()
	}
	defer func() { err = errors.Join(err, b.stopServers()) }()
	if about, err = b.about(interrupted); err != nil {
		return nil, nil, err
	}
	var busy []float64
	for _, f := range figures {
		ofFigure := map[string]*row{}
		for _, spec := range f.rows {
			if wanted.MatchString(f.name) || wanted.MatchString(spec.name) {
				r := &row{rowSpec: spec, figure: f.name}
				ofFigure[spec.name] = r
				rows = append(rows, r)
			}
		}
		if len(ofFigure) == 0 {
			continue
		}
		for i := range s.runs {
			fmt.Fprintf(progress, "%s, run %d of %d\n", f.name, i+1, s.runs)
			runtime.GC()
			busy = append(busy, settle(interrupted, s.patience))
			ctx, cancel := context.WithTimeout(interrupted, 2*time.Minute)
			err := f.measure(ctx, b, func(name string, ours, baseline, bare float64) {
				if r := ofFigure[name]; r != nil {
					r.add(ours, baseline, bare)
				}
			})
			cancel()
			if err := interrupted.Err(); err != nil {
				return about, rows, err
			}
			if err != nil {
				for r := range maps.Values(ofFigure) {
					r.err = err
				}
				break
			}
		}
	}
	noise := summarise(busy)
	about = append(about, fmt.Sprintf("the machine before each run: %.0f%% busy with other things (%.0f-%.0f)",
		100*noise.Median, 100*noise.Min, 100*noise.Max))
	return about, rows, nil
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
