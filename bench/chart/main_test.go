// Tests of the chart: that the committed one is the drawing of the committed figures, and what is drawn of which row.
package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
)

// TestCommittedChart keeps the picture of README.md from being anything but what a run has printed.
func TestCommittedChart(t *testing.T) {
	figures, err := os.ReadFile("../figures.json")
	if err != nil {
		t.Fatal(err)
	}
	committed, err := os.ReadFile("../figures.svg")
	if err != nil {
		t.Fatal(err)
	}
	drawn, err := picture(figures)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(drawn, committed) {
		t.Error("figures.svg is not what figures.json gives: go run ./chart figures.json figures.svg")
	}
	var r report
	if err := json.Unmarshal(figures, &r); err != nil {
		t.Fatal(err)
	}
	text := textOf(t, committed)
	for _, row := range r.Rows {
		if m := row.mark(); m != nil && !strings.Contains(text, row.Name) {
			t.Errorf("%s is not in the chart", row.Name)
		}
	}
}

// textOf is all text of a picture, which must be well-formed XML.
func textOf(t *testing.T, svg []byte) string {
	t.Helper()
	var text strings.Builder
	for d := xml.NewDecoder(bytes.NewReader(svg)); ; {
		token, err := d.Token()
		if err == io.EOF {
			return text.String()
		} else if err != nil {
			t.Fatal(err)
		}
		if data, ok := token.(xml.CharData); ok {
			text.Write(data)
		}
	}
}

func TestMark(t *testing.T) {
	for name, c := range map[string]struct{ row, want string }{
		"a cost": {`{"name": "n", "unit": "s", "text": "3.00 ms", "ours": {"median": 3}, "baseline": {"median": 2},
			"bare_handler": {"median": 5}, "ratio": {"median": 1.5, "min": 1, "max": 2}, "target": {"of": "ratio", "value": 1.75}, "met": true}`,
			`&{n  1.50x 1.5 1 2 1.75 2.5 true}`},
		"a rate is turned over": {`{"name": "n", "unit": "1/s", "ours": {"median": 3}, "ratio": {"median": 0.5, "min": 0.25, "max": 1},
			"target": {"of": "ratio", "value": 0.8}}`, `&{n  0.50x 2 1 4 1.25 0 false}`},
		"against the target": {`{"name": "n", "unit": "bytes", "text": "8.0 MiB", "ours": {"median": 8, "min": 4, "max": 12},
			"bare_handler": {"median": 32}, "target": {"of": "ours", "value": 16}, "met": true}`, `&{n  8.0 MiB 0.5 0.25 0.75 1 2 true}`},
		"the worst": {`{"name": "n", "unit": "s", "text": "t", "ours": {"median": 1, "min": 1, "max": 4}, "target": {"of": "worst", "value": 2}}`,
			`&{n  t 2 0.5 2 1 0 false}`},
		"no target":              {`{"unit": "s", "ours": {"median": 1, "min": 1, "max": 1}}`, `<nil>`},
		"nothing may be lost":    {`{"unit": "count", "ours": {"median": 0}, "target": {"of": "ours", "value": 0}}`, `<nil>`},
		"could not be measured":  {`{"unit": "s", "target": {"of": "ratio", "value": 2}, "error": "no"}`, `<nil>`},
		"no ratio to be had":     {`{"unit": "s", "ours": {"median": 1}, "target": {"of": "ratio", "value": 2}}`, `<nil>`},
		"nothing on a log scale": {`{"unit": "s", "ours": {"median": 1}, "target": {"of": "ours", "value": 2}}`, `<nil>`},
	} {
		var r row
		if err := json.Unmarshal([]byte(c.row), &r); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got := fmt.Sprint(r.mark()); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	if _, err := picture([]byte(`{"rows": []}`)); err == nil {
		t.Error("a picture of nothing")
	}
	if _, err := picture([]byte(`{`)); err == nil {
		t.Error("a picture of what is no JSON")
	}
}
