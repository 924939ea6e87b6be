// The table: rows of samples, their medians and spreads, ratios, targets, and the two ways to print them.
//
// A ratio is taken inside one repetition (ours / baseline, measured next to each other) and the median is taken of
// the ratios, not of the two columns: a machine that is slow for a second is slow for both.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"text/tabwriter"
)

// unit says how a value is printed; values are kept in seconds, bytes, or plain counts.
type unit string

const (
	seconds    unit = "s"
	bytesSize  unit = "bytes"
	throughput unit = "bytes/s"
	perSecond  unit = "1/s"        // of work: more is better
	wakeups    unit = "switches/s" // less is better
	count      unit = "count"
)

// scale is how values of about v are written: what to divide by, the decimals, and the name behind the number.
func (u unit) scale(v float64) (by float64, decimals int, name string) {
	switch u {
	case seconds:
		switch {
		case v < 1e-3:
			return 1e-6, 0, " us"
		case v < 1:
			return 1e-3, 2, " ms"
		}
		return 1, 2, " s"
	case bytesSize:
		return 1 << 20, 1, " MiB"
	case throughput:
		return 1 << 20, 0, " MiB/s"
	case perSecond, wakeups:
		if v < 100 {
			return 1, 1, "/s"
		}
		return 1, 0, "/s"
	}
	return 1, 0, ""
}

func (u unit) format(v float64) string {
	if math.IsNaN(v) {
		return "-"
	}
	by, decimals, name := u.scale(v)
	return fmt.Sprintf("%.*f%s", decimals, v/by, name)
}

// target is what a row must show. The zero target means that the row only informs.
type target struct {
	Of    string  `json:"of"` // "ratio", "ours", or "worst": ours in the worst repetition
	Op    string  `json:"op"` // "<=", ">=", "<", "=="
	Value float64 `json:"value"`
}

func ratioAtMost(v float64) target  { return target{"ratio", "<=", v} }
func ratioAtLeast(v float64) target { return target{"ratio", ">=", v} }
func atMost(v float64) target       { return target{"ours", "<=", v} }
func never(v float64) target        { return target{"worst", "<=", v} } // above it
func under(v float64) target        { return target{"ours", "<", v} }
func exactly(v float64) target      { return target{"ours", "==", v} }

func (t target) format(u unit) string {
	switch t.Of {
	case "":
		return "-"
	case "ratio":
		return fmt.Sprintf("%s %gx", t.Op, t.Value)
	}
	if t.Op == "==" {
		return u.format(t.Value)
	}
	if t.Of == "worst" {
		return "always <= " + u.format(t.Value)
	}
	return t.Op + " " + u.format(t.Value)
}

// rowSpec is what is known of a row before it is measured.
type rowSpec struct {
	name   string
	unit   unit
	target target
}

// row is one line of the table: a value for each repetition, NaN where a column does not apply.
type row struct {
	rowSpec
	figure               string
	ours, baseline, bare []float64
	ratios               []float64
	base                 []float64 // the build to compare with
	change               *change   // from it; nil: not known
	err                  error     // why the row could not be measured
}

// none marks a column that does not apply.
var none = math.NaN()

func (r *row) add(ours, baseline, bare float64) {
	r.ours = append(r.ours, ours)
	r.baseline = append(r.baseline, baseline)
	r.bare = append(r.bare, bare)
	ratio := ours / baseline
	if baseline == 0 {
		ratio = none
	}
	r.ratios = append(r.ratios, ratio)
}

// met tells whether the target holds. A count that must be exact is judged by its worst repetition, since one lost
// byte in five runs is a lost byte; everything else by the median.
func (r *row) met() bool {
	if r.err != nil || len(r.ours) == 0 {
		return false
	}
	values := r.ours
	if r.target.Of == "ratio" {
		values = r.ratios
	}
	s := summarise(values)
	if r.target.Of == "worst" {
		return s.Max <= r.target.Value
	}
	switch r.target.Op {
	case "<=":
		return s.Median <= r.target.Value
	case "<":
		return s.Median < r.target.Value
	case ">=":
		return s.Median >= r.target.Value
	case "==":
		return s.Min == r.target.Value && s.Max == r.target.Value
	}
	return true
}

// summary is the median and the spread of the samples that apply.
type summary struct {
	Median  float64   `json:"median"`
	Min     float64   `json:"min"`
	Max     float64   `json:"max"`
	Samples []float64 `json:"samples"`
}

func summarise(samples []float64) summary {
	var known []float64
	for _, v := range samples {
		if !math.IsNaN(v) {
			known = append(known, v)
		}
	}
	if len(known) == 0 {
		return summary{Median: none, Min: none, Max: none}
	}
	return summary{Median: percentile(known, 50), Min: slices.Min(known), Max: slices.Max(known), Samples: known}
}

// percentile is the p-th percentile, between the two nearest samples where it falls between them.
func percentile(samples []float64, p float64) float64 {
	if len(samples) == 0 {
		return none
	}
	sorted := slices.Sorted(slices.Values(samples))
	at := p / 100 * float64(len(sorted)-1)
	low := int(at)
	if low+1 == len(sorted) {
		return sorted[low]
	}
	return sorted[low] + (at-float64(low))*(sorted[low+1]-sorted[low])
}

func (s summary) format(u unit) string {
	if math.IsNaN(s.Median) {
		return "-"
	}
	if s.Min == s.Max {
		return u.format(s.Median)
	}
	by, decimals, name := u.scale(s.Median)
	return fmt.Sprintf("%.*f%s (%.*f-%.*f)", decimals, s.Median/by, name, decimals, s.Min/by, decimals, s.Max/by)
}

func (s summary) formatRatio() string {
	if math.IsNaN(s.Median) {
		return "-"
	}
	return fmt.Sprintf("%.2fx (%.2f-%.2f)", s.Median, s.Min, s.Max)
}

func printTable(w io.Writer, rows []*row) {
	targets := map[bool]int{}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(tw, "figure\tours\tbaseline\tratio\ttarget\tverdict\tbare handler")
	for _, r := range rows {
		met := "-"
		if r.target.Of != "" {
			met = map[bool]string{true: "met", false: "MISSED"}[r.met()]
			targets[r.met()]++
		}
		if r.err != nil {
			fmt.Fprintf(tw, "%s\tnot measured\t-\t-\t%s\t%s\t-\n", r.name, r.target.format(r.unit), met)
			continue
		}
		bare := summarise(r.bare)
		bareText := bare.format(r.unit)
		if base := summarise(r.baseline); !math.IsNaN(bare.Median) && !math.IsNaN(base.Median) {
			bareText = fmt.Sprintf("%s, %.2fx", r.unit.format(bare.Median), bare.Median/base.Median)
		}
		fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.name, summarise(r.ours).format(r.unit),
			summarise(r.baseline).format(r.unit), summarise(r.ratios).formatRatio(), r.target.format(r.unit), met, bareText)
	}
	tw.Flush()
	fmt.Fprintf(w, "\n%d targets met, %d missed\n", targets[true], targets[false])
}

// jsonRow is a row for machines: values in seconds, bytes, bytes per second, or counts; absent columns are left out.
type jsonRow struct {
	Figure   string   `json:"figure"`
	Name     string   `json:"name"`
	Unit     unit     `json:"unit"`
	Text     string   `json:"text,omitempty"` // ours, to be read
	Ours     *summary `json:"ours,omitempty"`
	Baseline *summary `json:"baseline,omitempty"`
	Bare     *summary `json:"bare_handler,omitempty"`
	Ratio    *summary `json:"ratio,omitempty"`
	Base     *summary `json:"base_build,omitempty"`
	Change   *change  `json:"change,omitempty"`
	Target   *target  `json:"target,omitempty"`
	Met      *bool    `json:"met,omitempty"`
	Error    string   `json:"error,omitempty"`
}

func (r *row) forMachines() jsonRow {
	known := func(samples []float64) *summary {
		if s := summarise(samples); s.Samples != nil {
			return &s
		}
		return nil
	}
	j := jsonRow{Figure: r.figure, Name: r.name, Unit: r.unit, Ours: known(r.ours), Baseline: known(r.baseline),
		Bare: known(r.bare), Ratio: known(r.ratios), Base: known(r.base), Change: r.change}
	if j.Ours != nil {
		j.Text = r.unit.format(j.Ours.Median)
		if r.target.Of == "worst" {
			j.Text = r.unit.format(j.Ours.Max)
		}
	}
	if r.target.Of != "" {
		met := r.met()
		j.Target, j.Met = &r.target, &met
	}
	if r.err != nil {
		j.Error = r.err.Error()
	}
	return j
}

func writeJSON(w io.Writer, about []string, rows []*row) error {
	out := struct {
		About []string  `json:"about"`
		Rows  []jsonRow `json:"rows"`
	}{About: about}
	for _, r := range rows {
		out.Rows = append(out.Rows, r.forMachines())
	}
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(out)
}
