// The comparison of two builds. Both are measured in turn, in each repetition the other one first; what counts is the ratio
// inside a repetition. Whether it differs from 1 by more than the noise is Student's test on the logarithms of these ratios, at
// 5% for all rows together: of two equal builds one run of twenty shows a difference in any row.
package main

import (
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"

	"gonum.org/v1/gonum/stat"
	"gonum.org/v1/gonum/stat/distuv"
)

// worthwhile is the least change that is marked: addresses and page boundaries alone move figures by less.
const worthwhile = 0.01

// unknown is noise beyond which its size, a logarithm, tells nothing any more: a factor of 100. Two repetitions come to that.
var unknown = math.Log(100)

// change is how a row differs from the same row of the build it is compared with.
type change struct {
	Ratio   float64 `json:"ratio"` // ours / theirs, the geometric mean of the repetitions'
	Min     float64 `json:"min"`
	Max     float64 `json:"max"`
	Noise   float64 `json:"noise"` // the ratio is known within a factor of 1 + noise
	Verdict string  `json:"verdict,omitempty"`
}

const better, worse = "better", "worse"

func (u unit) moreIsBetter() bool { return u == throughput || u == perSecond }

// compare gives each row its change, as far as it has samples of both builds that have a ratio.
func compare(rows []*row) {
	comparable := 0
	for _, r := range rows {
		if r.logRatios() != nil {
			comparable++
		}
	}
	for _, r := range rows {
		logs := r.logRatios()
		if r.target.Op == "==" {
			r.change = r.compareExactly()
		} else if logs != nil {
			mean, deviation := stat.MeanStdDev(logs, nil)
			t := distuv.StudentsT{Sigma: 1, Nu: float64(len(logs) - 1)}.Quantile(1 - 0.05/2/float64(comparable))
			noise := t * deviation / math.Sqrt(float64(len(logs)))
			s := summarise(logs)
			r.change = &change{Ratio: math.Exp(mean), Min: math.Exp(s.Min), Max: math.Exp(s.Max), Noise: math.Expm1(min(noise, unknown))}
			if math.Abs(mean) > max(noise, math.Log1p(worthwhile)) {
				r.change.Verdict = map[bool]string{true: better, false: worse}[mean > 0 == r.unit.moreIsBetter()]
			}
		}
	}
}

// logRatios is nil unless every repetition has a ratio and there are enough of them to have a spread.
func (r *row) logRatios() (logs []float64) {
	if len(r.ours) != len(r.base) || len(r.ours) < 2 || r.err != nil || r.target.Op == "==" {
		return nil
	}
	for i, ours := range r.ours {
		if !(ours > 0 && r.base[i] > 0) {
			return nil
		}
		logs = append(logs, math.Log(ours/r.base[i]))
	}
	return logs
}

// compareExactly is about rows that must have one value, where there is no noise: one build keeps to it and the other does not.
func (r *row) compareExactly() *change {
	if r.err != nil || len(r.base) == 0 {
		return nil
	}
	theirs := *r
	theirs.ours = r.base
	switch ours := r.met(); {
	case ours == theirs.met():
		return nil
	case ours:
		return &change{Verdict: better}
	}
	return &change{Verdict: worse}
}

// printComparison prints a row for each figure and returns how many are worse.
func printComparison(w io.Writer, rows []*row) int {
	compare(rows)
	named := map[string][]string{}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "figure\tthis build\tthe other\tratio\tnoise\tchange")
	for _, r := range rows {
		ratio, noise, verdict := "-", "-", "-"
		if c := r.change; c != nil {
			if c.Ratio > 0 {
				ratio, noise = fmt.Sprintf("%.3fx (%.3f-%.3f)", c.Ratio, c.Min, c.Max), fmt.Sprintf("%.1f%%", 100*c.Noise)
			}
			if c.Verdict != "" {
				verdict = strings.ToUpper(c.Verdict)
				named[c.Verdict] = append(named[c.Verdict], r.name)
			}
		}
		if r.err != nil {
			verdict = "not measured"
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", r.name, summarise(r.ours).format(r.unit), summarise(r.base).format(r.unit),
			ratio, noise, verdict)
	}
	tw.Flush()
	for _, verdict := range []string{better, worse} {
		fmt.Fprintf(w, "\n%s: %d", verdict, len(named[verdict]))
		for _, name := range named[verdict] {
			fmt.Fprintf(w, "\n  %s", name)
		}
	}
	fmt.Fprintln(w)
	return len(named[worse])
}
