// Size tells what makes the binary as large as it is: its sections, then for each package the bytes of its code and data, its largest
// symbol, and through which packages that came in: the way on which the linker first reached it. This is what `make size` runs.
//
//	size [-top N] BUILD
//
// BUILD is tools/build. The figures are those of a build that differs from the shipped one by its symbols only. What Go keeps of
// every function for stack traces, inlined calls and the garbage collector, .gopclntab, is not divided among packages.
package main

import (
	"bytes"
	"cmp"
	"debug/elf"
	"debug/gosym"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

func main() {
	top := flag.Int("top", 40, "`count` of packages to show")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: size [-top N] BUILD")
		os.Exit(2)
	}
	if err := run(os.Stdout, flag.Arg(0), *top); err != nil {
		fmt.Fprintln(os.Stderr, "size:", err)
		os.Exit(1)
	}
}

func run(out io.Writer, build string, top int) error {
	dir, err := os.MkdirTemp("", "envd-size-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	shipped, symbols := filepath.Join(dir, "shipped"), filepath.Join(dir, "symbols")
	if text, err := exec.Command(build, shipped).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", build, err, text)
	}
	cmd := exec.Command(build, symbols)
	cmd.Env = append(os.Environ(), "STRIP=-dumpdep")
	var reached bytes.Buffer
	cmd.Stderr = &reached
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", build, err, tail(reached.String()))
	}
	whole, err := os.Stat(shipped)
	if err != nil {
		return err
	}
	file, err := elf.Open(symbols)
	if err != nil {
		return err
	}
	defer file.Close()
	packages, err := packagesOf(file)
	if err != nil {
		return err
	}
	from := reachedFrom(reached.String())

	fmt.Fprintf(out, "%9d  the binary as it is shipped\n", whole.Size())
	for _, s := range file.Sections {
		if s.Flags&elf.SHF_ALLOC != 0 && s.Type != elf.SHT_NOBITS && s.Size >= 4096 {
			fmt.Fprintf(out, "%9d  %s\n", s.Size, s.Name)
		}
	}
	fmt.Fprintf(out, "\n%9s %9s  %-60s %s\n", "code", "data", "package, in the binary through", "largest symbol")
	for i, p := range packages {
		if i == top {
			fmt.Fprintf(out, "and %d more packages\n", len(packages)-top)
			break
		}
		fmt.Fprintf(out, "%9d %9d  %-60s %s, %d\n", p.code, p.data, cmp.Or(strings.Join(way(from, p.largest), " < "), p.name),
			p.largest, p.largestSize)
	}
	return nil
}

func tail(text string) string { return text[max(0, len(text)-2000):] }

type pkg struct {
	name        string
	code, data  uint64
	largest     string
	largestSize uint64
}

// packagesOf adds up the symbols of each package, the largest package first.
func packagesOf(file *elf.File) ([]*pkg, error) {
	symbols, err := file.Symbols()
	if err != nil {
		return nil, err
	}
	byName := map[string]*pkg{}
	for _, s := range symbols {
		if int(s.Section) >= len(file.Sections) || file.Sections[s.Section].Type == elf.SHT_NOBITS || strings.HasPrefix(s.Name, "go:func.") {
			continue
		}
		name := packageOf(s.Name)
		p := byName[name]
		if p == nil {
			p = &pkg{name: name}
			byName[name] = p
		}
		if elf.ST_TYPE(s.Info) == elf.STT_FUNC {
			p.code += s.Size
		} else {
			p.data += s.Size
		}
		if s.Size > p.largestSize {
			p.largest, p.largestSize = s.Name, s.Size
		}
	}
	packages := make([]*pkg, 0, len(byName))
	for _, p := range byName {
		packages = append(packages, p)
	}
	slices.SortFunc(packages, func(a, b *pkg) int {
		return cmp.Or(cmp.Compare(b.code+b.data, a.code+a.data), cmp.Compare(a.name, b.name))
	})
	return packages, nil
}

func packageOf(symbol string) string {
	for _, made := range []string{"type:.eq.", "type:.hash.", "go:itab.", "type:"} {
		symbol = strings.TrimPrefix(symbol, made)
	}
	symbol = strings.TrimLeft(symbol, "*[]")
	if name := (&gosym.Sym{Name: symbol}).PackageName(); name != "" {
		return name
	}
	return "(made by the compiler)"
}

// reachedFrom reads the linker's -dumpdep: a line `FROM -> TO` for each symbol when it is first reached.
func reachedFrom(text string) map[string]string {
	from := map[string]string{}
	for line := range strings.Lines(text) {
		a, b, ok := strings.Cut(strings.TrimSpace(line), " -> ")
		a, _, _ = strings.Cut(a, " <")
		b, _, _ = strings.Cut(b, " <")
		if _, known := from[b]; ok && !known {
			from[b] = a
		}
	}
	return from
}

// way gives the packages on the way to a symbol, its own first, up to main or to the start of the program.
func way(from map[string]string, symbol string) (packages []string) {
	for steps := 0; symbol != "" && steps < 1000; steps++ {
		p := packageOf(symbol)
		if !slices.Contains(packages, p) && !strings.HasPrefix(p, "(") {
			packages = append(packages, p)
		}
		if p == "main" {
			break
		}
		symbol = from[symbol]
	}
	return packages
}
