package main

import (
	"bytes"
	"debug/buildinfo"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestProfile does what `make profile` does. What it finds under the load is the daemon's own.
func TestProfile(t *testing.T) {
	dir := t.TempDir()
	var out strings.Builder
	loads := []string{"health", "start", "output", "upload", "form", "small", "list", "echo"}
	if err := run(&out, "../build", dir, loads, 2*time.Second); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"cpu.pprof", "heap.pprof", "goroutine.pprof", "Type: inuse_space", "Type: goroutine", " main.", "runtime."} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q", want)
		}
	}
	if info, err := buildinfo.ReadFile(filepath.Join(dir, "envd")); err != nil || info.Path != "envd" {
		t.Errorf("the binary that was profiled: %v, %v", info, err)
	}
	if t.Failed() {
		t.Logf("\n%s", &out)
	}
}

// TestShippedHasNoProfiler: the overlay is in no other build.
func TestShippedHasNoProfiler(t *testing.T) {
	envd := filepath.Join(t.TempDir(), "envd")
	if out, err := exec.Command("../build", envd).CombinedOutput(); err != nil {
		t.Fatalf("tools/build: %v\n%s", err, out)
	}
	content, err := os.ReadFile(envd)
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"runtime/pprof.", "ENVD_PROFILE"} {
		if bytes.Contains(content, []byte(word)) {
			t.Errorf("the binary contains %q", word)
		}
	}
}
