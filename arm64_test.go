// The binary for arm64 on a machine that is none, under qemu-user: what differs is the assembly, which starts processes.

package main

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

func TestArm64(t *testing.T) {
	t.Parallel()
	if raceEnabled() || runtime.GOARCH == "arm64" {
		t.Skip("the tests of the machine's own architecture are all the others")
	}
	qemu, err := exec.LookPath("qemu-aarch64-static")
	if err != nil {
		t.Skip("needs qemu-user-static: not installed")
	}
	dir := publicDir(t)
	envd := filepath.Join(dir, "envd")
	build := exec.Command("tools/build", envd)
	build.Env = append(build.Environ(), "GOARCH=arm64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("tools/build: %v\n%s", err, out)
	}
	script := writeFile(t, filepath.Join(dir, "emulated"), fmt.Sprintf("#!/bin/sh\nexec %s %s \"$@\"\n", qemu, envd), 0o755)
	// qemu-user gives a vfork'ed child a copy of the memory, so nothing of its steps is seen; with a cgroup leaf that reads as
	// a child that never ran, and it is started again.
	d := startDaemonWith(t, daemonConfig{program: script, noCgroup: true, args: []string{"--no-cgroups"}})
	d.healthy(t)
	_, frames := d.rawStream(t, "Start", `{"process":{"cmd":"/bin/sh","args":["-c","echo out; exit 7"]},"stdin":false}`)
	var events strings.Builder
	for _, f := range frames {
		events.WriteString(f.payload)
	}
	for _, want := range []string{`"stdout":"b3V0Cg=="`, `"exitCode":7`, `"status":"exit status 7"`} {
		if !strings.Contains(strings.ReplaceAll(events.String(), " ", ""), strings.ReplaceAll(want, " ", "")) {
			t.Errorf("the stream lacks %s: %s", want, &events)
		}
	}
}
