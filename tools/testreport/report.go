// From the events of `go test -json` to the report.

package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strings"
)

// event is one line of `go test -json`: see go doc test2json and go help buildjson.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build-output and build-fail
	Test        string
	Output      string
	FailedBuild string
	Elapsed     float64
}

// item is a test, or a package that failed as a whole.
type item struct {
	pkg, test string
	action    string // pass, fail, skip; empty while it runs
	output    strings.Builder
}

func (it *item) name() string {
	if it.test == "" {
		return it.pkg
	}
	return it.pkg + "." + it.test
}

// report collects the events of all modules.
type report struct {
	items    []*item // tests in order of appearance
	packages []*item
	byName   map[[2]string]*item // package and test
	builds   map[string]*strings.Builder
	shown    map[*item]bool // whose output is in the report already
}

func newReport() *report {
	return &report{byName: map[[2]string]*item{}, builds: map[string]*strings.Builder{}, shown: map[*item]bool{}}
}

// run reads what a `go test -json` prints. A command that fails without an event that says why counts as a failure.
func (r *report) run(module string, cmd *exec.Cmd, progress io.Writer) {
	failed := len(r.failures())
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err == nil {
		r.read(out, progress)
		err = cmd.Wait()
	}
	if err != nil && len(r.failures()) == failed {
		broken := &item{pkg: "module " + module, action: "fail"}
		fmt.Fprintf(&broken.output, "%s: %v\n", strings.Join(cmd.Args, " "), err)
		r.packages = append(r.packages, broken)
	}
}

// read takes events up to the end of the input. As they come, it prints a line for each failure and each package.
func (r *report) read(in io.Reader, progress io.Writer) {
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadString('\n')
		if line != "" {
			var e event
			if json.Unmarshal([]byte(line), &e) == nil {
				r.add(e, progress)
			} else {
				fmt.Fprint(progress, line) // the go command itself
			}
		}
		if err != nil {
			return
		}
	}
}

func (r *report) add(e event, progress io.Writer) {
	if e.Action == "build-output" {
		build := r.builds[e.ImportPath]
		if build == nil {
			build = &strings.Builder{}
			r.builds[e.ImportPath] = build
		}
		build.WriteString(e.Output)
		return
	}
	if e.Package == "" {
		return
	}
	it := r.item(e.Package, e.Test)
	switch e.Action {
	case "output":
		it.output.WriteString(e.Output)
	case "pass", "fail", "skip":
		if it.action != "fail" { // a test that ran twice has failed if it failed once
			it.action = e.Action
		}
		if build := r.builds[e.FailedBuild]; build != nil {
			it.output.WriteString(build.String())
		}
		if e.Action == "fail" || e.Test == "" && e.Action == "pass" {
			fmt.Fprintf(progress, "%s %s %.1fs\n", e.Action, it.name(), e.Elapsed)
		}
	}
}

// item returns the test of that name, or the package if the name is empty.
func (r *report) item(pkg, test string) *item {
	key := [2]string{pkg, test}
	it := r.byName[key]
	if it == nil {
		it = &item{pkg: pkg, test: test}
		r.byName[key] = it
		if test == "" {
			r.packages = append(r.packages, it)
		} else {
			r.items = append(r.items, it)
		}
	}
	return it
}

// result is what became of an item: one without an end (a panic, a timeout, a process that died) has failed.
func (it *item) result() string {
	if it.action == "" {
		return "fail"
	}
	return it.action
}

// counted returns the tests that are counted: those without subtests, and a parent whose failure or skip none of its
// subtests shares.
func (r *report) counted() (counted []*item) {
	parents := map[[2]string]map[string]bool{} // to the results below
	for _, it := range r.items {
		for name := it.test; ; {
			slash := strings.LastIndexByte(name, '/')
			if slash < 0 {
				break
			}
			name = name[:slash]
			key := [2]string{it.pkg, name}
			if parents[key] == nil {
				parents[key] = map[string]bool{}
			}
			parents[key][it.result()] = true
		}
	}
	for _, it := range r.items {
		below := parents[[2]string{it.pkg, it.test}]
		if below == nil || it.result() != "pass" && !below[it.result()] {
			counted = append(counted, it)
		}
	}
	return counted
}

// failures returns the counted tests that failed and the packages that failed without a failed test.
func (r *report) failures() (failures []*item) {
	explained := map[string]bool{}
	for _, it := range r.counted() {
		if it.result() == "fail" {
			failures = append(failures, it)
			explained[it.pkg] = true
		}
	}
	for _, it := range r.packages {
		if it.result() == "fail" && !explained[it.pkg] {
			failures = append(failures, it)
		}
	}
	return failures
}

// print writes the report and tells whether all is well.
func (r *report) print(w io.Writer, ci bool, allowed map[string]string) bool {
	passed := 0
	var skipped []*item
	for _, it := range r.counted() {
		switch it.result() {
		case "pass":
			passed++
		case "skip":
			skipped = append(skipped, it)
		}
	}
	failures := r.failures()
	ok := len(failures) == 0

	if len(skipped) > 0 {
		fmt.Fprintln(w, "\nSkipped:")
	}
	for _, it := range skipped {
		fmt.Fprintf(w, "  %s: %s", it.name(), it.skipReason())
		if why, may := allowed[it.name()]; ci && may {
			fmt.Fprintf(w, " (allowed: %s)", why)
		} else if ci {
			fmt.Fprint(w, " (NOT ALLOWED with CI=true: provide it, or name the test in the -allow file)")
			ok = false
		}
		fmt.Fprintln(w)
	}
	if len(failures) > 0 {
		fmt.Fprintln(w, "\nFailed:")
	}
	for _, it := range failures {
		ending := ""
		if it.action == "" {
			ending = " (did not finish)"
		}
		fmt.Fprintf(w, "  %s%s\n", it.name(), ending)
		for _, line := range r.failureOutput(it) {
			fmt.Fprintf(w, "    %s\n", line)
		}
	}
	if passed+len(failures)+len(skipped) == 0 {
		fmt.Fprintln(w, "\nNo test ran.")
		ok = false
	}
	fmt.Fprintf(w, "\n%d passed, %d failed, %d skipped\n", passed, len(failures), len(skipped))
	return ok
}

// failureOutput returns what a failed test, the tests around it and, if it did not finish, its package printed. A report
// shows the output of each once.
func (r *report) failureOutput(it *item) (lines []string) {
	sources := []*item{it}
	for name := it.test; strings.Contains(name, "/"); {
		name = name[:strings.LastIndexByte(name, '/')]
		sources = append(sources, r.item(it.pkg, name))
	}
	if it.action == "" && it.test != "" {
		sources = append(sources, r.item(it.pkg, ""))
	}
	for _, source := range sources {
		if !r.shown[source] {
			lines = append(lines, source.lines()...)
		}
		r.shown[source] = true
	}
	return lines
}

// marker is a line that go test itself adds to the output of a test.
var marker = regexp.MustCompile(`^\s*(=== (RUN|PAUSE|CONT|NAME)|--- (PASS|FAIL|SKIP|BENCH):)`)

// lines returns the output without the markers.
func (it *item) lines() []string {
	lines := strings.Split(strings.TrimRight(it.output.String(), "\n"), "\n")
	return slices.DeleteFunc(lines, func(line string) bool { return line == "" || marker.MatchString(line) })
}

// logged is the head of a line that a test logged.
var logged = regexp.MustCompile(`^\s+\S+\.go:\d+: `)

// skipReason returns the last message that a skipped test logged, in one line.
func (it *item) skipReason() string {
	var reason []string
	for _, line := range it.lines() {
		if logged.MatchString(line) {
			reason = nil
			line = logged.ReplaceAllString(line, "")
		}
		reason = append(reason, strings.TrimSpace(line))
	}
	if len(reason) == 0 {
		return "no reason given"
	}
	return strings.Join(reason, " ")
}

// readAllowed reads the tests that may be skipped in CI: a line holds a name (PACKAGE.TEST) and the reason; # is a comment.
func readAllowed(in io.Reader) (map[string]string, error) {
	allowed := map[string]string{}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, reason, _ := strings.Cut(line, " ")
		if reason = strings.TrimSpace(reason); reason == "" {
			return nil, fmt.Errorf("%s may be skipped: say why", name)
		}
		allowed[name] = reason
	}
	return allowed, lines.Err()
}
