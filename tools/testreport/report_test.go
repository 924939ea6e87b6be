package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// events makes the lines of `go test -json` from a short form: ACTION TEST OUTPUT; a test of - is the package.
func events(short string) string {
	var lines strings.Builder
	for line := range strings.Lines(short) {
		fields := strings.SplitN(strings.TrimRight(line, "\n"), " ", 3)
		test := strings.TrimPrefix(fields[1], "-")
		output := ""
		if len(fields) == 3 {
			output = fields[2] + "\n"
		}
		fmt.Fprintf(&lines, `{"Action":%q,"Package":"p","Test":%q,"Output":%q}`+"\n", fields[0], test, output)
	}
	return lines.String()
}

func TestReport(t *testing.T) {
	for _, test := range []struct {
		name, events string
		ci           bool
		allowed      map[string]string
		ok           bool
		summary      string
		says         []string // what the report contains besides
	}{
		{name: "green", ok: true, summary: "2 passed, 0 failed, 0 skipped",
			events: events("run TestA\npass TestA\nrun TestB\npass TestB\npass -")},
		{name: "leaves count", ok: true, summary: "2 passed, 0 failed, 0 skipped",
			events: events("run TestA\nrun TestA/x\nrun TestA/y/z\npass TestA/y/z\npass TestA/y\npass TestA/x\n" +
				"pass TestA\npass -")},
		{name: "a failure with its output and its parent's", summary: "1 passed, 1 failed, 0 skipped",
			events: events("run TestA\noutput TestA     a_test.go:1: above\nrun TestA/x\noutput TestA/x === RUN   TestA/x\n" +
				"output TestA/x     a_test.go:2: broken\noutput TestA/x     --- FAIL: TestA/x (0.00s)\nfail TestA/x\n" +
				"pass TestA/y\nfail TestA\nfail -"),
			says: []string{"Failed:\n  p.TestA/x\n        a_test.go:2: broken\n        a_test.go:1: above\n\n"}},
		{name: "a parent's output is shown once", summary: "0 passed, 2 failed, 0 skipped",
			events: events("output TestA above\nfail TestA/x\nfail TestA/y\nfail TestA\nfail -"),
			says:   []string{"Failed:\n  p.TestA/x\n    above\n  p.TestA/y\n\n"}},
		{name: "a parent that fails by itself", summary: "1 passed, 1 failed, 0 skipped",
			events: events("pass TestA/x\nfail TestA\nfail -"), says: []string{"p.TestA\n"}},
		{name: "failed once of twice", summary: "0 passed, 1 failed, 0 skipped",
			events: events("fail TestA\npass TestA\nfail -")},
		{name: "a skip with its reason", ok: true, summary: "1 passed, 0 failed, 1 skipped",
			events: events("pass TestA\noutput TestB     b_test.go:7: trying\noutput TestB     b_test.go:9: needs fuse:\n" +
				"output TestB         no /dev/fuse\noutput TestB --- SKIP: TestB (0.00s)\nskip TestB\npass -"),
			says: []string{"Skipped:\n  p.TestB: needs fuse: no /dev/fuse\n\n"}},
		{name: "a skip without a reason", ok: true, summary: "0 passed, 0 failed, 1 skipped",
			events: events("output TestB --- SKIP: TestB (0.00s)\nskip TestB\npass -"),
			says:   []string{"p.TestB: no reason given\n"}},
		{name: "a skip in CI", ci: true, summary: "1 passed, 0 failed, 1 skipped",
			events: events("pass TestA\nskip TestB/x\npass TestB\npass -"),
			says:   []string{"p.TestB/x: no reason given (NOT ALLOWED"}},
		{name: "an allowed skip in CI", ci: true, allowed: map[string]string{"p.TestB/x": "only arm64"}, ok: true,
			summary: "1 passed, 0 failed, 1 skipped",
			events:  events("pass TestA\nskip TestB/x\npass TestB\npass -"), says: []string{"(allowed: only arm64)\n"}},
		{name: "a panic", summary: "1 passed, 1 failed, 0 skipped",
			events: events("pass TestA\nrun TestB\nrun TestB/x\noutput TestB/x panic: index out of range\nfail -"),
			says:   []string{"p.TestB/x (did not finish)\n    panic: index out of range\n"}},
		{name: "a process that died", summary: "0 passed, 1 failed, 0 skipped",
			events: events("run TestA\noutput - signal: killed"), says: []string{"p.TestA (did not finish)\n    signal: killed\n"}},
		{name: "a package that fails after its tests", summary: "1 passed, 1 failed, 0 skipped",
			events: events("pass TestA\noutput - exit status 3\nfail -"), says: []string{"Failed:\n  p\n    exit status 3\n"}},
		{name: "a package that does not build", summary: "0 passed, 1 failed, 0 skipped",
			events: `{"Action":"build-output","ImportPath":"p [p.test]","Output":"x.go:1: undefined: y\n"}` + "\n" +
				`{"Action":"build-fail","ImportPath":"p [p.test]"}` + "\n" +
				`{"Action":"output","Package":"p","Output":"FAIL\tp [build failed]\n"}` + "\n" +
				`{"Action":"fail","Package":"p","FailedBuild":"p [p.test]"}` + "\n",
			says: []string{"  p\n    FAIL\tp [build failed]\n    x.go:1: undefined: y\n"}},
		{name: "a package without tests", ok: true, summary: "1 passed, 0 failed, 0 skipped",
			events: events("pass TestA\npass -") + `{"Action":"skip","Package":"q"}`},
		{name: "nothing ran", summary: "0 passed, 0 failed, 0 skipped", says: []string{"No test ran."},
			events: `{"Action":"skip","Package":"q"}`},
		{name: "no events at all", summary: "0 passed, 0 failed, 0 skipped", events: "go: cannot find main module\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newReport()
			r.read(strings.NewReader(test.events), io.Discard)
			var out strings.Builder
			if ok := r.print(&out, test.ci, test.allowed); ok != test.ok {
				t.Errorf("ok = %t, want %t", ok, test.ok)
			}
			lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
			if last := lines[len(lines)-1]; last != test.summary {
				t.Errorf("summary %q, want %q", last, test.summary)
			}
			for _, want := range test.says {
				if !strings.Contains(out.String(), want) {
					t.Errorf("the report lacks %q", want)
				}
			}
			if t.Failed() {
				t.Log("\n" + out.String())
			}
		})
	}
}

// TestGoTest has the go command produce the events, of one module with every kind of trouble.
func TestGoTest(t *testing.T) {
	dir := t.TempDir()
	for name, source := range map[string]string{
		"go.mod":            "module m\n\ngo 1.26\n",
		"good/a_test.go":    "func TestPass(t *testing.T) {}\nfunc TestSkip(t *testing.T) { t.Skip(`needs luck`) }",
		"bad/a_test.go":     "func TestFail(t *testing.T) { t.Run(`sub`, func(t *testing.T) { t.Error(`not so`) }) }",
		"panic/a_test.go":   "func TestPanic(t *testing.T) { go func() { panic(`ouch`) }(); select {} }",
		"build/a_test.go":   "func TestBuild(t *testing.T) { undefined() }",
		"nothing/a_test.go": "var _ testing.T",
	} {
		if strings.HasSuffix(name, ".go") {
			source = "package p\n\nimport \"testing\"\n\n" + source + "\n"
		}
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(source), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) (string, bool) {
		cmd := exec.Command("go", append([]string{"test", "-json"}, args...)...)
		cmd.Dir = dir
		r := newReport()
		r.run("m", cmd, io.Discard)
		var out strings.Builder
		ok := r.print(&out, false, nil)
		return out.String(), ok
	}
	for _, test := range []struct {
		args []string
		ok   bool
		says []string
	}{
		{[]string{"./good", "./nothing"}, true, []string{"m/good.TestSkip: needs luck\n", "\n1 passed, 0 failed, 1 skipped\n"}},
		{[]string{"./..."}, false, []string{"m/bad.TestFail/sub\n", "not so", "m/panic.TestPanic", "panic: ouch", "  m/build\n",
			"undefined: undefined", "\n1 passed, 3 failed, 1 skipped\n"}},
		{[]string{"./absent"}, false, []string{"0 passed, 1 failed, 0 skipped\n"}},
		{[]string{"-mod=nonsense", "./good"}, false, []string{"module m\n", "exit status", "0 passed, 1 failed, 0 skipped\n"}},
	} {
		out, ok := run(test.args...)
		if ok != test.ok {
			t.Errorf("go test %q: ok = %t, want %t", test.args, ok, test.ok)
		}
		for _, want := range test.says {
			if !strings.Contains(out, want) {
				t.Errorf("go test %q: the report lacks %q:\n%s", test.args, want, out)
			}
		}
	}
}

func TestReadAllowed(t *testing.T) {
	allowed, err := readAllowed(strings.NewReader("# comment\n\nenvd.TestA/x  there is no FUSE in it\n"))
	if err != nil || len(allowed) != 1 || allowed["envd.TestA/x"] != "there is no FUSE in it" {
		t.Errorf("got %q, %v", allowed, err)
	}
	if _, err := readAllowed(strings.NewReader("envd.TestA\n")); err == nil {
		t.Error("a name without a reason: no error")
	}
}
