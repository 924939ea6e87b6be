// References between the files of the daemon point only down: the floor plan of the house, and the test that keeps it.
//
// The compiler cannot see layers in a flat package. This test does: go/types says for each identifier, method and field
// that a file uses which file declares it.

package main_test

import (
	"fmt"
	"go/ast"
	"go/build"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// floors is the plan, top floor first. A room is a file without its ending; it may use rooms on lower floors only.
var floors = [][]string{
	{"main"},
	{"server", "init", "pid1"},
	{"process", "fs", "files", "ports", "snapshot", "metrics"},
	{"spawn", "watch_inotify", "pipes", "request"},
	{"output", "pty_linux", "cgroup", "path", "user", "auth", "mmds", "log", "settings", "poller", "codec"},
	{"budget", "procfs", "neighbours"},
}

// annexes are files that belong to the room of another name.
var annexes = map[string]string{"vfork_amd64": "spawn", "vfork_arm64": "spawn", "entry_amd64": "pid1", "entry_arm64": "pid1", "system": "init",
	"upload": "files", "archive": "files", "admission": "server"}

// doors are the references that are allowed between two rooms on one floor.
var doors = map[[2]string]bool{{"path", "user"}: true, {"log", "mmds"}: true}

// rpcRooms are the only ones that know the messages and the errors of the RPCs.
var rpcRooms = []string{"main", "server", "process", "fs", "codec"}

// roomOf returns the room that a file belongs to, and the floor, counted from the top.
func roomOf(file string) (room string, floor int, ok bool) {
	room = strings.TrimSuffix(filepath.Base(file), filepath.Ext(file))
	if annex, is := annexes[room]; is {
		room = annex
	}
	floor = slices.IndexFunc(floors, func(rooms []string) bool { return slices.Contains(rooms, room) })
	return room, floor, floor >= 0
}

// layerViolations type-checks one package and returns a line for each reference that the plan forbids.
func layerViolations(fset *token.FileSet, files []*ast.File, imports types.Importer) ([]string, error) {
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}}
	conf := types.Config{Importer: imports, Sizes: types.SizesFor("gc", build.Default.GOARCH)}
	pkg, err := conf.Check("envd", fset, files, info)
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	for ident, object := range info.Uses {
		if object.Pkg() != pkg {
			continue
		}
		use, declared := fset.Position(ident.Pos()), fset.Position(object.Pos())
		user, userFloor, ok1 := roomOf(use.Filename)
		owner, ownerFloor, ok2 := roomOf(declared.Filename)
		if !ok1 || !ok2 || user == owner || ownerFloor > userFloor || doors[[2]string{user, owner}] {
			continue // a file without a room is reported by strangers
		}
		direction := "upward"
		if ownerFloor == userFloor {
			direction = "sideways"
		}
		found[fmt.Sprintf("%s:%d: %s reference to %s of %s", filepath.Base(use.Filename), use.Line, direction,
			object.Name(), filepath.Base(declared.Filename))] = true
	}
	return slices.Sorted(maps.Keys(found)), nil
}

// strangers returns the files that the plan does not name.
func strangers(files []string) (unknown []string) {
	for _, file := range files {
		if _, _, ok := roomOf(file); !ok {
			unknown = append(unknown, filepath.Base(file))
		}
	}
	return unknown
}

func TestLayers(t *testing.T) {
	sources := daemonSources(t)
	for _, file := range strangers(sources) {
		t.Errorf("%s has no room: name it in floors (layers_test.go) first", file)
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, source := range sources {
		if match, err := build.Default.MatchFile(".", source); err != nil || !match || filepath.Ext(source) != ".go" {
			continue // assembly refers to nothing; a file for another architecture is checked there
		}
		file, err := parser.ParseFile(fset, source, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	violations, err := layerViolations(fset, files, dependencyImporter(t, fset))
	if err != nil {
		t.Fatal(err)
	}
	for _, violation := range violations {
		t.Error(violation)
	}
}

func TestRPCTypes(t *testing.T) {
	for _, source := range daemonSources(t) {
		if room, _, _ := roomOf(source); slices.Contains(rpcRooms, room) || filepath.Ext(source) != ".go" {
			continue
		}
		for _, path := range importsOf(t, source) {
			if path == "envd/proto" || strings.HasPrefix(path, "connectrpc.com/connect") {
				t.Errorf("%s imports %s: only %s may", source, path, strings.Join(rpcRooms, ", "))
			}
		}
	}
}

// importsOf returns the import paths of a file.
func importsOf(t *testing.T, source string) (paths []string) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), source, nil, parser.ImportsOnly)
	if err != nil {
		t.Fatal(err)
	}
	for _, spec := range file.Imports {
		path, _ := strconv.Unquote(spec.Path.Value)
		paths = append(paths, path)
	}
	return paths
}

// daemonSources lists the Go and assembly files of the daemon: every architecture, no tests.
func daemonSources(t *testing.T) (sources []string) {
	t.Helper()
	for _, pattern := range []string{"*.go", "*.s"} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		sources = append(sources, names...)
	}
	return slices.DeleteFunc(sources, func(name string) bool { return strings.HasSuffix(name, "_test.go") })
}

// dependencyImporter reads the export data in the cache of the go command: faster than type-checking net/http again.
func dependencyImporter(t *testing.T, fset *token.FileSet) types.Importer {
	t.Helper()
	exports := map[string]string{}
	for _, line := range goList(t, "-export", "-deps", "-f", "{{.ImportPath}} {{.Export}}", ".") {
		path, file, _ := strings.Cut(line, " ")
		exports[path] = file
	}
	return importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
}

// goList runs `go list` in the root module, as `make build` would see it, and returns its lines.
func goList(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %s: %v", strings.Join(args, " "), err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

// TestLayerRules feeds the checker a house with known faults.
func TestLayerRules(t *testing.T) {
	house := map[string]string{
		"main.go":    `func main() { newTable().add(1); lookup() }`,
		"process.go": `type table struct{ size int }; func newTable() *table { t := &table{}; t.add(2); fork(); return t }`,
		"fs.go":      `func (t *table) add(n int) { t.size += n }`, // sideways: the type, and a field of it
		"spawn.go":   `func fork() { log := newLog(); log.owner().size++ }`,
		"output.go":  `type log struct{ owner func() *table }; func newLog() *log { return nil }`, // upward
		"path.go":    `func resolve() string { return lookup() }`,
		"user.go":    `func lookup() string { var w writer; return w.name() }; type writer interface{ name() string }`,
		"auth.go":    `var token = lookup()`, // sideways
	}
	want := []string{
		"auth.go:2: sideways reference to lookup of user.go",
		"fs.go:2: sideways reference to size of process.go",
		"fs.go:2: sideways reference to table of process.go",
		"output.go:2: upward reference to table of process.go",
		"process.go:2: sideways reference to add of fs.go",
		"spawn.go:2: upward reference to size of process.go", // it never names the type
	}
	fset := token.NewFileSet()
	var files []*ast.File
	for _, name := range slices.Sorted(maps.Keys(house)) {
		file, err := parser.ParseFile(fset, name, "package main\n"+house[name], 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	got, err := layerViolations(fset, files, importer.Default())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
	names := []string{"main.go", "utils.go", "vfork_amd64.s", "spawn_test_helpers.go"}
	if got, want := strangers(names), []string{"utils.go", "spawn_test_helpers.go"}; !slices.Equal(got, want) {
		t.Errorf("strangers(%q) = %q, want %q", names, got, want)
	}
}
