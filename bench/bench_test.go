// Tests of the benchmark: the arithmetic of the table, the readers, and one small run against the real daemon.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestPercentile(t *testing.T) {
	samples := []float64{5, 1, 4, 2, 3}
	for p, want := range map[float64]float64{0: 1, 25: 2, 50: 3, 90: 4.6, 100: 5} {
		if got := percentile(samples, p); math.Abs(got-want) > 1e-9 {
			t.Errorf("percentile %g of %v: %g, want %g", p, samples, got, want)
		}
	}
	if samples[0] != 5 {
		t.Error("the samples were reordered")
	}
	if got := percentile([]float64{1, 2}, 50); got != 1.5 {
		t.Errorf("median of 1 and 2: %g", got)
	}
	if !math.IsNaN(percentile(nil, 50)) {
		t.Error("a percentile of nothing is a number")
	}
}

// TestRatio holds that a ratio is made inside a repetition: with a machine that slows to a tenth for one of them, the
// ratio stays.
func TestRatio(t *testing.T) {
	r := &row{rowSpec: rowSpec{"x", seconds, ratioAtMost(2)}}
	for _, slow := range []float64{1, 10, 1, 10, 10} {
		r.add(1.5*slow, 1*slow, none)
	}
	s := summarise(r.ratios)
	if s.Median != 1.5 || s.Min != 1.5 || s.Max != 1.5 {
		t.Errorf("ratio %+v, want 1.5 throughout", s)
	}
	if o := summarise(r.ours); o.Median != 15 || o.Min != 1.5 || o.Max != 15 {
		t.Errorf("ours %+v", o)
	}
	r = &row{rowSpec: rowSpec{"x", perSecond, atMost(8)}}
	for _, ours := range []float64{8, 7.9, 9} {
		r.add(ours, 0, none)
	}
	if s := summarise(r.ratios); s.Samples != nil || !r.met() {
		t.Errorf("against a baseline of nothing: %+v, met %v", s, r.met())
	}
	if bare := summarise(r.bare); !math.IsNaN(bare.Median) {
		t.Errorf("a bare handler that was not measured: %+v", bare)
	}
	if !r.met() {
		t.Error("1.5 is not at most 2")
	}
}

func TestTargets(t *testing.T) {
	for _, c := range []struct {
		target         target
		ours, baseline []float64
		met            bool
	}{
		{ratioAtMost(1.9), []float64{19}, []float64{10}, true},
		{ratioAtMost(1.9), []float64{19.1}, []float64{10}, false},
		{ratioAtLeast(0.5), []float64{5}, []float64{10}, true},
		{ratioAtLeast(0.5), []float64{4.9}, []float64{10}, false},
		{ratioAtLeast(0.5), []float64{9, 1, 9}, []float64{10, 10, 10}, true}, // the median
		{ratioAtLeast(0.5), []float64{5}, []float64{none}, false},
		{under(32), []float64{31, 90, 31}, []float64{none, none, none}, true},
		{under(32), []float64{32}, []float64{none}, false},
		{never(50), []float64{1, 50, 1}, []float64{none, none, none}, true},
		{never(50), []float64{1, 51, 1}, []float64{none, none, none}, false}, // the worst
		{exactly(0), []float64{0, 0, 0}, []float64{none, none, none}, true},
		{exactly(0), []float64{0, 0, 1}, []float64{none, none, none}, false}, // the worst
		{exactly(0), []float64{0, -1, 0}, []float64{none, none, none}, false},
		{exactly(0), nil, nil, false},
	} {
		r := &row{rowSpec: rowSpec{"x", count, c.target}}
		for i := range c.ours {
			r.add(c.ours[i], c.baseline[i], none)
		}
		if r.met() != c.met {
			t.Errorf("%s of %v against %v: met is %v", c.target.format(count), c.ours, c.baseline, r.met())
		}
	}
	failed := &row{rowSpec: rowSpec{"x", count, exactly(0)}, err: fmt.Errorf("no")}
	failed.add(0, none, none)
	if failed.met() {
		t.Error("a row that could not be measured is met")
	}
}

func TestFormat(t *testing.T) {
	for want, s := range map[string]string{
		"770 us (765-1200)":  summary{Median: 770e-6, Min: 765e-6, Max: 1200e-6}.format(seconds),
		"1.50 ms":            summary{Median: 1.5e-3, Min: 1.5e-3, Max: 1.5e-3}.format(seconds),
		"2.0 MiB (1.0-3.0)":  summary{Median: 2 << 20, Min: 1 << 20, Max: 3 << 20}.format(bytesSize),
		"1.69x (1.60-1.80)":  summary{Median: 1.69, Min: 1.6, Max: 1.8}.formatRatio(),
		"-":                  summary{Median: none}.format(seconds),
		"<= 1.9x":            ratioAtMost(1.9).format(seconds),
		"< 32.0 MiB":         under(32 << 20).format(bytesSize),
		"always <= 50.00 ms": never(0.05).format(seconds),
		"0":                  exactly(0).format(count),
		"512 MiB/s (5-1024)": summary{Median: 512 << 20, Min: 5 << 20, Max: 1 << 30}.format(throughput),
	} {
		if s != want {
			t.Errorf("%q, want %q", s, want)
		}
	}
}

var testSizes = sizes{runs: 2, execs: 40, parallel: 64, stdout: 8 << 20, json: 4 << 20, stdin: 4 << 20, keys: 60,
	stalled: 8 << 20, stall: 100 * time.Millisecond, burst: 64, boots: 2, healths: 100, small: 400, lists: 2,
	text: 4 << 20, forward: 16 << 20, streams: 20, load: 200 * time.Millisecond, calm: 10 * time.Millisecond,
	idleBefore: 10 * time.Millisecond, restBefore: 10 * time.Millisecond, rest: 2200 * time.Millisecond}

// TestRun makes a small run against the real daemon and holds that every row is there with sane values, that all bytes
// arrived, and that nothing is left behind.
func TestRun(t *testing.T) {
	about, rows, err := run(t.Context(), options{testSizes, "", "", regexp.MustCompile("")}, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	var table bytes.Buffer
	printTable(&table, rows)
	t.Logf("%s\n%s", strings.Join(about, "\n"), &table)

	byName := map[string]*row{}
	for _, r := range rows {
		byName[r.name] = r
	}
	hasBaseline := map[string]bool{"exec": true, "exec-user": true, "rate": true, "json": true, "stdin": true,
		"echo": true, "poll": true, "boot": true, "idle": true, "health": true, "forward": true}
	for _, f := range figures {
		for _, spec := range f.rows {
			r := byName[spec.name]
			if r == nil {
				t.Errorf("no row %q", spec.name)
				continue
			}
			if r.err != nil {
				if f.name == "exec-user" && os.Geteuid() != 0 {
					continue
				}
				t.Errorf("%s: %v", r.name, r.err)
				continue
			}
			if !strings.Contains(table.String(), spec.name) {
				t.Errorf("%s is not in the printed table", spec.name)
			}
			if len(r.ours) != testSizes.runs {
				t.Errorf("%s: %d values for %d runs", r.name, len(r.ours), testSizes.runs)
			}
			for i, v := range r.ours {
				if math.IsNaN(v) || math.IsInf(v, 0) || spec.unit != count && v <= 0 {
					t.Errorf("%s: %g", r.name, v)
				}
				if hasBaseline[f.name] && !(r.baseline[i] > 0 && r.ratios[i] == v/r.baseline[i]) {
					t.Errorf("%s: %g against %g is %g", r.name, v, r.baseline[i], r.ratios[i])
				}
			}
		}
	}
	for _, name := range []string{"500 streams of sleep, RSS", "/health p99 at full load, against idle",
		"RSS 5 s after the whole load", "size of the binary", "stdout, raw reader", "raw upload to tmpfs"} {
		if r := byName[name]; r != nil && !(summarise(r.bare).Min > 0) {
			t.Errorf("%s: the bare handler has %v", name, r.bare)
		}
	}
	for _, name := range []string{"stalled reader, bytes lost", "burst of true, streams without exactly one end",
		"burst of true, zombies"} {
		if r := byName[name]; r != nil && !r.met() {
			t.Errorf("%s: %v", name, r.ours)
		}
	}

	var out bytes.Buffer
	if err := writeJSON(&out, about, rows); err != nil {
		t.Fatal(err)
	}
	var back struct{ Rows []jsonRow }
	if err := json.Unmarshal(out.Bytes(), &back); err != nil {
		t.Fatal(err)
	}
	if len(back.Rows) != len(rows) {
		t.Errorf("%d rows in the JSON, %d in the table", len(back.Rows), len(rows))
	}
	for _, r := range back.Rows {
		if r.Error == "" && (r.Ours == nil || r.Text == "" || r.Ours.Median != summarise(byName[r.Name].ours).Median) {
			t.Errorf("%s: %+v in the JSON", r.Name, r.Ours)
		}
	}

	if root := writableCgroup2(); root != "" {
		left, _ := filepath.Glob(filepath.Join(root, fmt.Sprintf("envd-bench-%d-*", os.Getpid())))
		if len(left) > 0 {
			t.Errorf("left behind: %v", left)
		}
	}
	children, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range children {
		if pids, err := os.ReadFile(path); err == nil && len(bytes.TrimSpace(pids)) > 0 {
			t.Errorf("processes left behind: %s", pids)
		}
	}
}
