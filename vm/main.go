// Command vm boots a Linux guest that holds nothing but envd and a helper, runs commands in it through the agent, shows
// what goes on, and powers it off. This is what `make vm` runs; the tests of this module use the same guests.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

func main() {
	verbose := flag.Bool("console", false, "show the guest's console")
	prepared := flag.Bool("prepared", false, "the loader mounts and configures the network")
	flag.Parse()
	dir, err := scratch()
	if err == nil {
		var tee io.Writer
		if *verbose {
			tee = os.Stdout
		}
		err = show(dir, tee, *prepared)
		os.RemoveAll(dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		os.Exit(1)
	}
}

func show(dir string, tee io.Writer, prepared bool) error {
	images, err := buildImages(dir)
	if err != nil {
		return err
	}
	how := "software emulation: KVM runs no guest here"
	if images.kvmRuns() {
		accelerator, how = "kvm", "KVM"
	}
	fmt.Printf("booting a guest of 2 CPUs and 256 MiB (%s)\n", how)
	start := time.Now()
	g, err := images.start(options{root: "rw", prepared: prepared})
	if err != nil {
		return err
	}
	defer g.close()
	g.console.tee = tee
	if _, err := g.healthy(); err != nil {
		return err
	}
	fmt.Printf("GET /health is answered after %.1f s\n", time.Since(start).Seconds())
	for _, command := range [][]string{
		{"/workload", "cat", "/proc/version"},
		{"/workload", "cat", "/proc/mounts"},
		{"/workload", "orphans", "200"},
		{"/workload", "processes"},
		{"/workload", "exit", "7"},
		{"/workload", "segv"},
		{"no-such-program"},
	} {
		fmt.Printf("\n$ %s\n", strings.Join(command, " "))
		r, err := g.run(command[0], command[1:]...)
		if err != nil {
			return g.explain(err)
		}
		lines := strings.SplitAfter(r.stdout.String()+r.stderr.String(), "\n")
		for i, line := range lines {
			if strings.Contains(line, " 2 S ") || strings.Contains(line, " 2 I ") {
				continue // a kernel thread
			}
			fmt.Print(lines[i])
		}
		fmt.Printf("[%s, %.0f ms of CPU]\n", r.end.Status, float64(r.end.CpuUserUs+r.end.CpuSystemUs)/1000)
	}
	fmt.Println("\nSIGTERM to PID 1")
	start = time.Now()
	if _, err := g.run("/workload", "kill", "1", "15"); err != nil {
		fmt.Println("(the stream ended with the guest)")
	}
	reason, err := g.ended()
	if err != nil {
		return err
	}
	fmt.Printf("the guest is off after %.1f s: %s\n", time.Since(start).Seconds(), reason)
	if reason != "guest-shutdown" {
		return g.explain(fmt.Errorf("it ended by %s", reason))
	}
	return nil
}
