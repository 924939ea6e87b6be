// What an auditor does with a release, and what is in one. The empty cache, with which two builds are really two, is TestBuild's and
// `make release`'s; here all comes from the cache that is there.

package main_test

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// buildCache is the cache of this machine, in the place of an empty one.
func buildCache(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func withCommit(commit, name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Env = append(cleanMakeEnv(), "COMMIT="+commit)
	return cmd
}

func TestVerify(t *testing.T) {
	t.Parallel()
	cache, envd := buildCache(t), filepath.Join(t.TempDir(), "envd")
	if out, err := withCommit("abc1234", "tools/build", envd).CombinedOutput(); err != nil {
		t.Fatalf("tools/build: %v\n%s", err, out)
	}
	if out, err := withCommit("abc1234", "tools/verify", envd, cache).CombinedOutput(); err != nil || !bytes.Contains(out, []byte("the same to the bit")) {
		t.Errorf("what was built a moment ago is not found the same: %v\n%s", err, out)
	}
	if out, err := withCommit("abc1235", "tools/verify", envd, cache).CombinedOutput(); err == nil {
		t.Errorf("a binary of another commit is found the same:\n%s", out)
	}
	content, err := os.ReadFile(envd)
	if err != nil {
		t.Fatal(err)
	}
	content[len(content)/2] ^= 1
	if err := os.WriteFile(envd, content, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := withCommit("abc1234", "tools/verify", envd, cache).CombinedOutput(); err == nil {
		t.Errorf("a binary with one bit changed is found the same:\n%s", out)
	}
}

func TestRelease(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "release")
	if out, err := withCommit("abc1234", "tools/release", dir, buildCache(t)).CombinedOutput(); err != nil {
		t.Fatalf("tools/release: %v\n%s", err, out)
	}
	check := exec.Command("sha256sum", "--check", "--strict", "SHA256SUMS")
	check.Dir = dir
	if out, err := check.CombinedOutput(); err != nil || bytes.Count(out, []byte(": OK\n")) != 4 {
		t.Errorf("sha256sum --check: %v\n%s", err, out)
	}
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		file, err := elf.Open(filepath.Join(dir, "envd-linux-"+arch))
		if err != nil {
			t.Fatal(err)
		}
		if file.Machine != machine || file.Section(".interp") != nil || file.Section(".symtab") != nil {
			t.Errorf("%s: %v, or it is not static and stripped", arch, file.Machine)
		}
		file.Close()
		text, err := os.ReadFile(filepath.Join(dir, "envd-linux-"+arch+".cdx.json"))
		if err != nil {
			t.Fatal(err)
		}
		var bill struct{ Components []struct{ Name string } }
		if err := json.Unmarshal(text, &bill); err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, c := range bill.Components {
			names = append(names, c.Name)
		}
		if slices.Sort(names); !slices.Equal(names, slices.Sorted(slices.Values(append([]string{"std"}, modules...)))) {
			t.Errorf("%s: the bill names %q", arch, names)
		}
	}
}
