// Limits of the control groups: where they are set, and what is left out where the kernel lacks a controller. That they hold is
// tested in the virtual machine (vm/), where there are controllers.

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// limitFiles are the groups' properties that the daemon sets.
var limitFiles = []string{"cpu.weight", "io.weight", "memory.high", "memory.max", "pids.max"}

// Each property is either as promised, or its file is not there and a note says so.
func TestLimits(t *testing.T) {
	t.Parallel()
	needRoot(t)
	total := kernelFigures(t)["mem_total"]
	most := fmt.Sprint(int64(total-min(total/8, 128<<20)) / 4096 * 4096) // the kernel counts pages
	number := func(file string) int {
		text, err := os.ReadFile("/proc/sys/kernel/" + file)
		if err != nil {
			t.Fatal(err)
		}
		return atoi(t, string(text))
	}
	for given, pids := range map[string]int{"": min(number("threads-max"), number("pid_max")) / 16 * 7, "--pids-max=123": 123} {
		d := startDaemonWith(t, daemonConfig{args: strings.Fields(given), env: append(os.Environ(), "ENVD_LOG=debug")})
		if d.cgroup == "" {
			t.Skip("needs cgroup v2: no hierarchy that this user may write to")
		}
		want := map[string]string{
			"user/cpu.weight": "50", "ptys/cpu.weight": "200", "user/io.weight": "default 10", "ptys/io.weight": "default 50",
			"user/memory.high": most, "ptys/memory.high": most, "user/memory.max": most, "ptys/memory.max": most,
			"user/pids.max": strconv.Itoa(pids), "ptys/pids.max": strconv.Itoa(pids),
		}
		for _, group := range []string{"user", "ptys"} {
			for _, file := range limitFiles {
				path := filepath.Join(d.cgroup, group, file)
				text, err := os.ReadFile(path)
				noted := regexp.MustCompile(`(?m)^.*level=DEBUG.*`+regexp.QuoteMeta(path)+` .*$`).FindString(d.log()) != ""
				got, _, _ := strings.Cut(string(text), "\n")
				switch {
				case errors.Is(err, fs.ErrNotExist) && !noted:
					t.Errorf("%s is not there, and nothing says so", path)
				case err == nil && (noted || got != want[group+"/"+file]):
					t.Errorf("%s is %q, want %q; a note: %v", path, got, want[group+"/"+file], noted)
				}
			}
			// What controllers there are reach the leaves.
			has, _ := os.ReadFile(filepath.Join(d.cgroup, group, "cgroup.controllers"))
			passes, _ := os.ReadFile(filepath.Join(d.cgroup, group, "cgroup.subtree_control"))
			for _, controller := range []string{"cpu", "io", "memory", "pids"} {
				if slices.Contains(strings.Fields(string(has)), controller) && !slices.Contains(strings.Fields(string(passes)), controller) {
					t.Errorf("%s keeps the controller %s from its leaves", group, controller)
				}
			}
		}
		if got := d.output(t, sh("echo fine")); got != "fine\n" {
			t.Errorf("a process printed %q", got)
		}
	}
}

// On somebody's machine nothing is limited unless a root is named.
func TestNoLimitsUnasked(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemonWith(t, daemonConfig{noCgroup: true, args: argv("--pids-max", "3"), env: append(os.Environ(), "ENVD_LOG=debug")})
	if got := d.output(t, sh("for i in 1 2 3 4 5 6; do sleep 1 & done; echo fine")); got != "fine\n" {
		t.Errorf("a process printed %q", got)
	}
	if strings.Contains(d.log(), "pids.max") {
		t.Errorf("limits were tried: %s", d.log())
	}
}
