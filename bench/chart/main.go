// Command chart draws what bench -json wrote: every row that has a target, against its baseline or, where it has none, against
// the target. Costs (time, memory, and one over a rate) are drawn, so that less is better everywhere.
//
//	chart FIGURES.json PICTURE.svg
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"image/color"
	"log"
	"os"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// report is the part of the JSON that is drawn.
type report struct {
	About []string
	Rows  []row
}

type row struct {
	Name, Unit, Text      string
	Ours, Ratio, Baseline *samples
	Bare                  *samples `json:"bare_handler"`
	Met                   bool
	Target                *struct {
		Of    string
		Value float64
	}
}

const line = vg.Length(14) // the height of a row

type samples struct{ Median, Min, Max float64 }

// mark is a row as it is drawn: everything divided by the baseline or by the target, which is 1 then.
type mark struct {
	label                           string
	median, low, high, target, bare float64 // bare 0: there is none
	met                             bool
}

func main() {
	if len(os.Args) != 3 {
		log.Fatal("usage: chart FIGURES.json PICTURE.svg")
	}
	text, err := os.ReadFile(os.Args[1])
	if err == nil {
		text, err = picture(text)
	}
	if err == nil {
		err = os.WriteFile(os.Args[2], text, 0o644)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// mark is nil for a row that is not drawn.
func (r row) mark() *mark {
	if r.Target == nil || r.Ours == nil || r.Target.Value <= 0 {
		return nil
	}
	m := &mark{label: fmt.Sprintf("%s  %s", r.Name, r.Text), met: r.Met}
	if r.Target.Of == "ratio" {
		if r.Ratio == nil {
			return nil
		}
		m.median, m.low, m.high, m.target = r.Ratio.Median, r.Ratio.Min, r.Ratio.Max, r.Target.Value
		m.label = fmt.Sprintf("%s  %.2fx", r.Name, m.median)
		if r.Bare != nil && r.Baseline != nil {
			m.bare = r.Bare.Median / r.Baseline.Median
		}
	} else {
		m.median, m.low, m.high, m.target = r.Ours.Median/r.Target.Value, r.Ours.Min/r.Target.Value, r.Ours.Max/r.Target.Value, 1
		if r.Target.Of == "worst" {
			m.median = m.high
		}
		if r.Bare != nil {
			m.bare = r.Bare.Median / r.Target.Value
		}
	}
	if r.Unit == "bytes/s" || r.Unit == "1/s" {
		m.median, m.low, m.high, m.target = 1/m.median, 1/m.high, 1/m.low, 1/m.target
		if m.bare > 0 {
			m.bare = 1 / m.bare
		}
	}
	if m.low <= 0 {
		return nil
	}
	return m
}

func picture(figures []byte) ([]byte, error) {
	var r report
	if err := json.Unmarshal(figures, &r); err != nil {
		return nil, err
	}
	var lines []*mark // from top to bottom; one without a median is a heading
	for _, ratio := range []bool{true, false} {
		lines = append(lines, &mark{label: map[bool]string{true: "AGAINST THE BASELINE, WHICH IS AT 1",
			false: "AGAINST THE TARGET, WHICH IS AT 1"}[ratio]})
		for _, row := range r.Rows {
			if m := row.mark(); m != nil && (row.Target.Of == "ratio") == ratio {
				lines = append(lines, m)
			}
		}
	}
	plot.DefaultFont.Variant = "Sans"
	p := plot.New()
	p.Title.Text = strings.Join(r.About, "\n")
	if n := len(r.About); n > 3 { // what was measured, how busy the machine was, and how long it took
		p.Title.Text = strings.Join([]string{r.About[0], r.About[n-2], r.About[n-1]}, "\n")
	}
	p.Title.Padding = line
	p.X.Label.Text = "less is better"
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	p.Y.Width, p.Y.Tick.Length, p.Y.Padding = 0, 0, 2*line // room for labels in another font, which may be wider
	p.Legend.Top, p.Legend.Left = true, true
	var labels plot.ConstantTicks
	groups := []struct {
		name  string
		glyph draw.GlyphStyle
		at    plotter.XYs
	}{
		{"target met", draw.GlyphStyle{Color: color.RGBA{0, 114, 178, 255}, Radius: 4, Shape: draw.CircleGlyph{}}, nil},
		{"target missed", draw.GlyphStyle{Color: color.RGBA{213, 94, 0, 255}, Radius: 4, Shape: draw.BoxGlyph{}}, nil},
		{"target", draw.GlyphStyle{Color: color.Black, Radius: 5, Shape: draw.PlusGlyph{}}, nil},
		{"bare handler", draw.GlyphStyle{Color: color.Gray{96}, Radius: 4, Shape: draw.RingGlyph{}}, nil},
	}
	var spread spreads
	for i, m := range lines {
		y := float64(len(lines) - i)
		labels = append(labels, plot.Tick{Value: y, Label: m.label})
		if m.median == 0 {
			continue
		}
		which := &groups[1]
		if m.met {
			which = &groups[0]
		}
		which.at = append(which.at, plotter.XY{X: m.median, Y: y})
		groups[2].at = append(groups[2].at, plotter.XY{X: m.target, Y: y})
		if m.bare > 0 {
			groups[3].at = append(groups[3].at, plotter.XY{X: m.bare, Y: y})
		}
		spread.XYs = append(spread.XYs, plotter.XY{X: m.median, Y: y})
		spread.XErrors = append(spread.XErrors, struct{ Low, High float64 }{m.median - m.low, m.high - m.median})
	}
	if spread.XYs == nil {
		return nil, fmt.Errorf("no row has a target")
	}
	p.Y.Tick.Marker = labels
	bars, err := plotter.NewXErrorBars(spread)
	if err != nil {
		return nil, err
	}
	bars.CapWidth = 0
	one, err := plotter.NewLine(plotter.XYs{{X: 1, Y: 0.5}, {X: 1, Y: float64(len(lines)) + 0.5}})
	if err != nil {
		return nil, err
	}
	one.Color = color.Gray{160}
	p.Add(plotter.NewGrid(), one, bars)
	p.Y.Max = float64(len(lines)) + 5.5 // room for the legend
	for _, g := range groups {
		points, err := plotter.NewScatter(g.at)
		if g.at == nil {
			continue
		} else if err != nil {
			return nil, err
		}
		points.GlyphStyle = g.glyph
		p.Add(points)
		p.Legend.Add(g.name, points)
	}
	canvas := vgsvg.New(50*line, vg.Length(len(lines)+13)*line)
	p.Draw(draw.New(canvas))
	var out bytes.Buffer
	_, err = canvas.WriteTo(&out)
	// Where that font is not installed, these have its widths.
	return bytes.ReplaceAll(out.Bytes(), []byte("Liberation Sans"), []byte("Liberation Sans,Arial,Helvetica,sans-serif")), err
}

type spreads struct {
	plotter.XYs
	plotter.XErrors
}
