// What is promised of the source and of the binary made from it, apart from what it does: imports, size, form, how it is
// built, the targets of the Makefile.

package main_test

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// lineBudget keeps the daemon from growing unnoticed; it goes up only with faults that were mended. The aim was 4,000, see README.md.
const lineBudget = 11700

// modules is all that the daemon may require.
var modules = []string{"connectrpc.com/connect", "golang.org/x/sys", "google.golang.org/protobuf"}

// forbidden packages must not be in the daemon, not even through a package that it imports.
// As it is built here, hash/maphash reads randomness before main: in a guest without any that waits for a second.
var forbidden = []string{"C", "hash/maphash", "net/http/pprof", "os/exec", "plugin", "runtime/cgo", "text/template"}

func TestImports(t *testing.T) {
	for _, source := range daemonSources(t) {
		if filepath.Ext(source) != ".go" {
			continue
		}
		for _, path := range importsOf(t, source) {
			if slices.Contains(forbidden, path) || !mayImport(path) {
				t.Errorf("%s imports %s", source, path)
			}
		}
	}
	for _, path := range goList(t, "-deps", ".") {
		if slices.Contains(forbidden, path) {
			t.Errorf("%s is in the daemon; go list -deps -json tells through which package", path)
		}
	}
}

// mayImport tells whether an import path is of the standard library, of one of the modules, or generated here.
func mayImport(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	inModule := func(module string) bool { return path == module || strings.HasPrefix(path, module+"/") }
	return path == "envd/proto" || first != "envd" && !strings.Contains(first, ".") || slices.ContainsFunc(modules, inModule)
}

func TestMayImport(t *testing.T) {
	for path, want := range map[string]bool{
		"os": true, "net/http": true, "golang.org/x/sys/unix": true, "connectrpc.com/connect": true, "envd/proto": true,
		"envd/utils": false, "golang.org/x/system": false, "golang.org/x/net/http2": false, "github.com/a/b": false,
	} {
		if got := mayImport(path); got != want {
			t.Errorf("mayImport(%q) = %t", path, got)
		}
	}
}

func TestRequirements(t *testing.T) {
	out, err := exec.Command("go", "mod", "edit", "-json").Output()
	if err != nil {
		t.Fatal(err)
	}
	var mod struct {
		Require   []struct{ Path string }
		Replace   []struct{}
		Toolchain string
	}
	if err := json.Unmarshal(out, &mod); err != nil {
		t.Fatal(err)
	}
	var required []string
	for _, r := range mod.Require {
		required = append(required, r.Path)
	}
	slices.Sort(required)
	if !slices.Equal(required, modules) {
		t.Errorf("go.mod requires %q, want %q", required, modules)
	}
	if len(mod.Replace) != 0 || mod.Toolchain == "" {
		t.Errorf("go.mod: %d replacements, toolchain %q; want none, and a toolchain", len(mod.Replace), mod.Toolchain)
	}
}

func TestLineBudget(t *testing.T) {
	total := 0
	for _, source := range daemonSources(t) {
		content, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		total += bytes.Count(content, []byte("\n"))
	}
	t.Logf("%d lines of Go and assembly", total)
	if total > lineBudget {
		t.Errorf("the daemon has %d lines, the budget is %d", total, lineBudget)
	}
}

// TestForm checks the Go files of every module: formatted as gofmt does, and in the root each opens with a comment.
func TestForm(t *testing.T) {
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && path != "." && (strings.HasPrefix(entry.Name(), ".") || entry.Name() == "node_modules") {
			return fs.SkipDir
		}
		if entry.IsDir() || filepath.Ext(path) != ".go" {
			return nil
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if formatted, err := format.Source(content); err != nil {
			t.Errorf("%s: %v", path, err)
		} else if !bytes.Equal(formatted, content) {
			t.Errorf("%s: not formatted, run gofmt", path)
		}
		if !strings.Contains(path, "/") && !opensWithComment(content) {
			t.Errorf("%s: does not open with a comment that says what it is for", path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// opensWithComment tells whether the first thing in a file is prose: a build constraint or a directive is none.
func opensWithComment(content []byte) bool {
	return regexp.MustCompile(`^(// +\S|/\*)`).Match(content) && !bytes.HasPrefix(content, []byte("// +build"))
}

func TestOpensWithComment(t *testing.T) {
	for content, want := range map[string]bool{
		"// The table.\n\npackage main\n": true, "/* The table. */\npackage main\n": true,
		"package main\n": false, "//go:build linux\n\npackage main\n": false, "//\npackage main\n": false,
		"\n// Late.\npackage main\n": false, "// +build linux\n\npackage main\n": false,
	} {
		if got := opensWithComment([]byte(content)); got != want {
			t.Errorf("opensWithComment(%q) = %t", content, got)
		}
	}
}

func TestVet(t *testing.T) {
	mods, err := filepath.Glob("*/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	for _, mod := range append(mods, "go.mod") {
		cmd := exec.Command("go", "vet", "./...")
		cmd.Dir = filepath.Dir(mod)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("go vet in %s: %v\n%s", cmd.Dir, err, out)
		}
	}
}

// TestBuild has two copies of the tree built, one of them with an empty build cache, and looks at what came out.
func TestBuild(t *testing.T) {
	if testing.Short() {
		t.Skip("not in short mode: compiles the standard library anew")
	}
	var binaries [2][]byte
	for i, env := range [][]string{nil, {"GOCACHE=" + t.TempDir()}} {
		tree := copyTree(t)
		cmd := exec.Command("make", "--silent", "build", "COMMIT=abc1234")
		cmd.Dir = tree
		cmd.Env = append(cleanMakeEnv(), env...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("make build: %v\n%s", err, out)
		}
		binary := filepath.Join(tree, "bin", "envd")
		content, err := os.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		binaries[i] = content
		if commit, err := exec.Command(binary, "--commit").Output(); err != nil || string(commit) != "abc1234\n" {
			t.Errorf("envd --commit: %q, %v", commit, err)
		}
		if bytes.Contains(content, []byte(tree)) {
			t.Errorf("the binary names the directory that it was built in")
		}
	}
	if !bytes.Equal(binaries[0], binaries[1]) {
		t.Errorf("two builds differ: %d and %d bytes", len(binaries[0]), len(binaries[1]))
	}
	file, err := elf.NewFile(bytes.NewReader(binaries[0]))
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range file.Progs {
		if program.Type == elf.PT_INTERP || program.Type == elf.PT_DYNAMIC {
			t.Errorf("the binary is not static: it has a segment %v", program.Type)
		}
	}
	if libraries, err := file.ImportedLibraries(); err == nil && len(libraries) > 0 {
		t.Errorf("the binary needs %q", libraries)
	}
}

// copyTree copies what `make build` needs into a new directory.
func copyTree(t *testing.T) string {
	t.Helper()
	tree := t.TempDir()
	names := append(daemonSources(t), "Makefile", "go.mod", "go.sum", "tools/build")
	generated, err := filepath.Glob("proto/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"proto", "tools"} {
		if err := os.Mkdir(filepath.Join(tree, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range append(names, generated...) {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tree, name), content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return tree
}

// cleanMakeEnv is the environment without what `make test` tells its own children.
func cleanMakeEnv() []string {
	return slices.DeleteFunc(os.Environ(), func(variable string) bool {
		name, _, _ := strings.Cut(variable, "=")
		return slices.Contains([]string{"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}, name)
	})
}

// TestMakeHelp compares the targets of the Makefile with the lines of `make help`.
func TestMakeHelp(t *testing.T) {
	makefile, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	phony := regexp.MustCompile(`(?m)^\.PHONY: (.*)$`).FindSubmatch(makefile)
	if phony == nil {
		t.Fatal("the Makefile has no .PHONY line")
	}
	targets := strings.Fields(string(phony[1]))
	for _, match := range regexp.MustCompile(`(?m)^([a-z-]+):`).FindAllSubmatch(makefile, -1) {
		if target := string(match[1]); !slices.Contains(targets, target) {
			t.Errorf("the target %s is not in .PHONY", target)
		}
	}
	for _, target := range strings.Fields("build run test check bench size profile release verify vm proto fuzz clean help") {
		if !slices.Contains(targets, target) {
			t.Errorf("there is no target %s", target)
		}
	}
	cmd := exec.Command("make", "--silent", "help")
	cmd.Env = cleanMakeEnv()
	help, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("make help: %v\n%s", err, help)
	}
	for _, target := range targets {
		if lines := regexp.MustCompile(`(?m)^make `+target+` +\S.*$`).FindAll(help, -1); len(lines) != 1 {
			t.Errorf("make help has %d lines for %s, want 1:\n%s", len(lines), target, help)
		}
	}
}

// TestGeneratedFilesOnlyInProto keeps generated code, which the line budget leaves out, in the one place for it.
func TestGeneratedFilesOnlyInProto(t *testing.T) {
	for _, source := range daemonSources(t) {
		if filepath.Ext(source) != ".go" {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), source, nil, parser.ParseComments|parser.PackageClauseOnly)
		if err != nil {
			t.Fatal(err)
		}
		if ast.IsGenerated(file) {
			t.Errorf("%s is generated: it belongs in proto/", source)
		}
	}
}
