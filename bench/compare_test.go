// Tests of the comparison of two builds: on made-up samples, and one small run of a build against itself and another one.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
)

// made is a row of which the repetitions of the other build are `base`, each with ours `times` as much.
func made(u unit, t target, base []float64, times ...float64) *row {
	r := &row{rowSpec: rowSpec{"made", u, t}, base: base}
	for i, v := range base {
		r.add(v*times[i%len(times)], none, none)
	}
	return r
}

func TestCompare(t *testing.T) {
	five := []float64{1, 1.3, 0.9, 5, 1.1} // a machine that was slow once was so for both
	ones := []float64{1, 1, 1, 1, 1}
	for name, c := range map[string]struct {
		row     *row
		verdict string
	}{
		"slower, though the machine varies":     {made(seconds, target{}, five, 1.10, 1.11, 1.09), worse},
		"quicker":                               {made(seconds, target{}, five, 0.90, 0.91, 0.89), better},
		"more throughput":                       {made(throughput, target{}, five, 1.10, 1.11, 1.09), better},
		"a lower rate":                          {made(perSecond, target{}, five, 0.90, 0.91, 0.89), worse},
		"more memory":                           {made(bytesSize, target{}, five, 1.10, 1.11, 1.09), worse},
		"fewer wake-ups":                        {made(wakeups, target{}, five, 0.90, 0.91, 0.89), better},
		"equal":                                 {made(seconds, target{}, five, 1), ""},
		"noise":                                 {made(seconds, target{}, five, 1.2, 0.8, 1.3, 0.9, 1.1), ""},
		"slower in all repetitions, but noisy":  {made(seconds, target{}, five, 1.02, 2, 1.1, 3, 1.3), ""},
		"without any noise":                     {made(bytesSize, target{}, ones, 1.02), worse},
		"without any noise, but a page or two":  {made(bytesSize, target{}, ones, 1.004), ""},
		"one repetition":                        {made(seconds, target{}, []float64{1}, 3), ""},
		"nothing to divide by":                  {made(count, target{}, []float64{0, 0, 0}, 1), ""},
		"bytes lost":                            {&row{rowSpec: rowSpec{"x", count, exactly(0)}, ours: []float64{0, 1}, base: []float64{0, 0}}, worse},
		"bytes no longer lost":                  {&row{rowSpec: rowSpec{"x", count, exactly(0)}, ours: []float64{0, 0}, base: []float64{7, 0}}, better},
		"bytes lost by both":                    {&row{rowSpec: rowSpec{"x", count, exactly(0)}, ours: []float64{0, 1}, base: []float64{7, 0}}, ""},
		"nothing measured, nothing to compare":  {&row{rowSpec: rowSpec{"x", seconds, target{}}, err: fmt.Errorf("no")}, ""},
		"exact, and nothing to compare it with": {&row{rowSpec: rowSpec{"x", count, exactly(0)}, ours: []float64{0}}, ""},
	} {
		compare([]*row{c.row})
		verdict := ""
		if c.row.change != nil {
			verdict = c.row.change.Verdict
		}
		if verdict != c.verdict {
			t.Errorf("%s: %q, want %q: %+v", name, verdict, c.verdict, c.row.change)
		}
	}
}

// TestCompareEqualBuilds draws the samples of two builds from the same distributions, with the long tails that latencies have:
// a run in twenty may show a difference.
func TestCompareEqualBuilds(t *testing.T) {
	const comparisons = 400
	source := rand.New(rand.NewPCG(1, 2))
	different := 0
	for range comparisons {
		var rows []*row
		for range 50 {
			r := &row{rowSpec: rowSpec{"made", seconds, target{}}}
			for range 6 {
				r.base = append(r.base, 1+0.1*source.ExpFloat64())
				r.add(1+0.1*source.ExpFloat64(), none, none)
			}
			rows = append(rows, r)
		}
		var table bytes.Buffer
		if printComparison(&table, rows) > 0 || !strings.Contains(table.String(), "better: 0\n") {
			different++
		}
	}
	t.Logf("%d comparisons of %d showed a difference between equal builds", different, comparisons)
	if different > comparisons/20 {
		t.Error("that is more than one of twenty")
	}
}

// TestCompareRun holds that both builds are measured as often, that equal ones have equal sizes, and what JSON and table tell.
func TestCompareRun(t *testing.T) {
	envd, err := build(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	about, rows, err := run(t.Context(), options{testSizes, envd, envd, regexp.MustCompile("^(size|boot|idle)$")}, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	if text := strings.Join(about, "\n"); !strings.Contains(text, "\ncompared with envd ") {
		t.Errorf("about: %s", text)
	}
	var table, out bytes.Buffer
	printComparison(&table, rows)
	t.Logf("\n%s", &table)
	if err := writeJSON(&out, about, rows); err != nil {
		t.Fatal(err)
	}
	var back struct{ Rows []jsonRow }
	if err := json.Unmarshal(out.Bytes(), &back); err != nil {
		t.Fatal(err)
	}
	for _, r := range back.Rows {
		if strings.HasPrefix(r.Name, "lines of") { // a binary has none
			if r.Ours != nil || r.Change != nil {
				t.Errorf("%+v", r)
			}
			continue
		}
		if r.Base == nil || len(r.Base.Samples) != testSizes.runs || r.Change == nil {
			t.Errorf("%s has no change: %+v", r.Name, r)
		} else if r.Figure == "size" && (r.Change.Ratio != 1 || r.Change.Verdict != "") {
			t.Errorf("%s of a build and itself: %+v", r.Name, r.Change)
		}
		if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(r.Name) + ` .*x \(.*%`).Match(table.Bytes()) {
			t.Errorf("%s: no ratio and noise in the table", r.Name)
		}
	}
}
