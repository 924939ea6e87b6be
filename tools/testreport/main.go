// Testreport runs the tests of Go modules and says in the end, in one line, how many passed, failed and were skipped.
// This is what `make test` runs.
//
// Before that line come the skipped tests, each with the reason that it gave, and the failed ones with their output. It
// fails when a test failed, when a package did not build or did not finish, and when nothing ran at all. With CI=true
// it also fails when a test was skipped that the file of -allow does not name.
package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

func main() {
	race := flag.Bool("race", false, "run the tests with the race detector")
	allow := flag.String("allow", "", "`file` that names the tests that may be skipped with CI=true")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: testreport [-race] [-allow FILE] MODULE-DIRECTORY...")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	var allowed map[string]string
	if *allow != "" {
		file, err := os.Open(*allow)
		if err == nil {
			allowed, err = readAllowed(file)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "testreport:", err)
			os.Exit(2)
		}
	}
	args := []string{"test", "-json", "-count=1", "-timeout=20m"}
	if *race {
		args = append(args, "-race")
	}
	r := newReport()
	for _, module := range flag.Args() {
		cmd := exec.Command("go", append(args, "./...")...)
		cmd.Dir, cmd.Stderr = module, os.Stderr
		r.run(filepath.Clean(module), cmd, os.Stdout)
	}
	if !r.print(os.Stdout, os.Getenv("CI") == "true", allowed) {
		os.Exit(1)
	}
}
