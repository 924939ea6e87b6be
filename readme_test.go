// What README.md and SECURITY.md say is run and looked up: commands and their output, examples, names of tests, files and
// identifiers.

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// block is a fenced block of a Markdown file.
type block struct{ language, text string }

func blocks(t *testing.T, file string) (list []block) {
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("(?ms)^```(\\w+)\n(.*?)^```$").FindAllStringSubmatch(string(text), -1) {
		list = append(list, block{m[1], m[2]})
	}
	if len(list) == 0 {
		t.Fatalf("%s has no blocks", file)
	}
	return list
}

// The sessions show what really comes out. Only the address is another one.
func TestReadmeSessions(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("needs curl: not installed")
	}
	d := startDaemon(t)
	run := 0
	for _, b := range blocks(t, "README.md") {
		if b.language != "console" {
			continue
		}
		for _, step := range strings.Split("\n"+b.text, "\n$ ")[1:] {
			command, want, _ := strings.Cut(step, "\n")
			command = strings.ReplaceAll(command, "http://127.0.0.1:49983", d.url)
			command = regexp.MustCompile(`(e2e/examples/run\.sh)$`).ReplaceAllString(command, "$1 "+d.url)
			out, err := exec.Command("sh", "-c", command).CombinedOutput()
			if got := strings.TrimSuffix(string(out), "\n"); err != nil || got != strings.TrimSuffix(want, "\n") {
				t.Errorf("$ %s\n%s\n(%v), want\n%s", command, got, err, want)
			}
			run++
		}
	}
	if run < 5 {
		t.Errorf("%d commands were found", run)
	}
}

// `make run` is what a newcomer does first. `make test` is what runs this.
func TestReadmeMakeRun(t *testing.T) {
	t.Parallel()
	out, err := exec.Command("make", "run", "ONCE=1", "PORT="+strconv.Itoa(freePort(t))).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Hello from process") {
		t.Errorf("make run ONCE=1: %v\n%s", err, out)
	}
}

// An auditor's commands, in a clean clone, with a binary that was released from it. Only the cache is not empty.
func TestReadmeAudit(t *testing.T) {
	t.Parallel()
	audit := slices.IndexFunc(blocks(t, "README.md"), func(b block) bool { return strings.Contains(b.text, "make verify") })
	if audit < 0 {
		t.Fatal("README.md does not say how a binary is verified")
	}
	clone := filepath.Join(t.TempDir(), "clone")
	if out, err := exec.Command("git", "clone", "--quiet", ".", clone).CombinedOutput(); err != nil {
		t.Skipf("needs a git repository: %s", out)
	}
	script := `set -e
commit=$(git rev-parse --short=12 HEAD)
COMMIT=$commit tools/build envd-linux-amd64
sha256sum envd-linux-amd64 >SHA256SUMS
export CACHE=$(go env GOCACHE)
` + blocks(t, "README.md")[audit].text
	cmd := exec.Command("sh", "-c", script)
	cmd.Dir = clone
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "the same to the bit") {
		t.Errorf("the auditor's commands: %v\n%s", err, out)
	}
}

// Each example is a file that e2e runs, shown without its first line.
func TestReadmeExamples(t *testing.T) {
	t.Parallel()
	shown := blocks(t, "README.md")
	files, err := filepath.Glob("e2e/examples/*")
	if err != nil || len(files) < 4 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		_, body, _ := strings.Cut(string(text), "\n")
		if !slices.ContainsFunc(shown, func(b block) bool { return b.text == body }) {
			t.Errorf("README.md does not show %s as it is", file)
		}
	}
}

// Names in backticks must be those of something: a test, a file, a flag, a function.
func TestDocumentsNameWhatThereIs(t *testing.T) {
	t.Parallel()
	var source strings.Builder
	files, _ := filepath.Glob("*")
	more, _ := filepath.Glob("*/*.go")
	for _, file := range append(files, more...) {
		if text, err := os.ReadFile(file); err == nil && !strings.HasSuffix(file, ".md") {
			source.Write(text)
		}
	}
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	security, err := os.ReadFile("SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	text := regexp.MustCompile("(?ms)^```.*?^```$").ReplaceAllString(string(readme)+string(security), "")
	quoted := regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(text, -1)
	if len(quoted) < 50 {
		t.Fatalf("%d names were found", len(quoted))
	}
	for _, m := range quoted {
		name := strings.TrimSuffix(m[1], "/")
		known := false
		switch {
		case regexp.MustCompile(`^Test\w+$`).MatchString(name):
			known = strings.Contains(source.String(), "func "+name+"(")
		case strings.HasPrefix(name, "--"):
			known = strings.Contains(source.String(), `"`+strings.Fields(name[2:])[0]+`"`)
		case regexp.MustCompile(`^[\w/.]+\.(go|s|md|sh|py|mjs|mod|sum)$`).MatchString(name):
			_, err := os.Stat(name)
			known = err == nil || name == "go.mod" || name == "go.sum"
		case regexp.MustCompile(`^[a-z]\w*(\.[a-z]\w*)?$`).MatchString(name):
			function := name[strings.LastIndexByte(name, '.')+1:]
			known = regexp.MustCompile(`\b` + function + `\b`).MatchString(source.String())
		default:
			known = true // a header, a path, a command
		}
		if !known {
			t.Errorf("`%s` is nowhere", m[1])
		}
	}
}
