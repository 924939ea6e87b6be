// The guest's last memory: content for file systems in memory is refused while little is available. That it helps is shown in
// a virtual machine (vm/memory_test.go); here the kernel's figures are made up.

package main

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// shmDir is a directory in memory that anyone may write to.
func shmDir(t *testing.T) string {
	t.Helper()
	var st unix.Statfs_t
	if unix.Statfs("/dev/shm", &st) != nil || st.Type != unix.TMPFS_MAGIC {
		t.Skip("needs a tmpfs at /dev/shm")
	}
	dir, err := os.MkdirTemp("/dev/shm", "envd-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestContentIsRefusedForWantOfMemory(t *testing.T) {
	t.Parallel()
	meminfo := writeFile(t, filepath.Join(publicDir(t), "meminfo"), "", 0o644)
	available := func(mib int) {
		t.Helper()
		text := fmt.Sprintf("MemTotal: %d kB\nMemAvailable: %d kB\nCached: 0 kB\n", 32<<20, mib<<10)
		if err := os.WriteFile(meminfo, []byte(text), 0); err != nil { // in place: it is mounted
			t.Fatal(err)
		}
		time.Sleep(gatePeriod * 3 / 2) // figures are looked at so often
	}
	available(30 << 10)
	d, _ := guestDaemon(t, nil, "mount", meminfo+":/proc/meminfo")
	shm, disk := shmDir(t), publicDir(t)
	small, large := strings.Repeat("x", 10_000), strings.Repeat("y", 3<<20)
	uploads := map[string]func(dir string) httpReply{
		"raw, small": func(dir string) httpReply { return d.upload(t, filesPath("path", dir+"/new"), small) },
		"raw, large": func(dir string) httpReply { return d.upload(t, filesPath("path", dir+"/new"), large) },
		"over a smaller file": func(dir string) httpReply {
			return d.upload(t, filesPath("path", dir+"/old"), small)
		},
		"large, over a smaller file": func(dir string) httpReply {
			return d.upload(t, filesPath("path", dir+"/old"), large)
		},
		"form": func(dir string) httpReply {
			return d.uploadForm(t, filesPath("path", dir+"/new"), formPart{field: "file", filename: "x", content: small})
		},
		"archive": func(dir string) httpReply {
			content := archive(t, tarEntry{name: "new", content: small})
			return d.request(t, "POST", filesPath("path", dir), content, "Content-Type", "application/x-tar")
		},
		"compose": func(dir string) httpReply {
			writeFile(t, disk+"/piece", large, 0o644)
			body := fmt.Sprintf(`{"source_paths":["%s/piece"],"destination":"%s/new"}`, disk, dir)
			return d.request(t, "POST", "/files/compose", body)
		},
	}
	for name, upload := range uploads {
		for _, dir := range []string{shm, disk} {
			for _, mib := range []int{10, 127, 30 << 10} { // an eighth of this machine, or 128 MiB, is kept
				available(mib)
				os.Remove(dir + "/new")
				writeFile(t, dir+"/old", "old", 0o644)
				got := upload(dir)
				what := fmt.Sprintf("%s to %s with %d MiB", name, dir, mib)
				if dir == disk || mib > 128 {
					if got.status != http.StatusOK {
						t.Errorf("%s: %d %s", what, got.status, got.body)
					}
					continue
				}
				if got.status != http.StatusInsufficientStorage || !strings.Contains(got.body, "memory") {
					t.Errorf("%s: %d %s", what, got.status, got.body)
				}
				wantContent(t, dir+"/old", "old")
				if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
					t.Errorf("%s: left are %v, %v", what, entries, err)
				}
			}
		}
	}
	// What takes no more memory than before is no question of memory.
	writeFile(t, shm+"/old", small, 0o644)
	available(10)
	if got := d.upload(t, filesPath("path", shm+"/old"), strings.ToUpper(small)); got.status != http.StatusOK {
		t.Errorf("as much as before: %d %s", got.status, got.body)
	}
	wantContent(t, shm+"/old", strings.ToUpper(small))
	d.healthy(t)
}

// On a developer's machine memory is not envd's business.
func TestContentOnAMachineOfOthers(t *testing.T) {
	t.Parallel()
	needRoot(t)
	meminfo := writeFile(t, filepath.Join(publicDir(t), "meminfo"), "MemTotal: 999999 kB\nMemAvailable: 1 kB\n", 0o644)
	d := startDaemonWith(t, daemonConfig{steps: argv("mount", meminfo+":/proc/meminfo")})
	if got := d.upload(t, filesPath("path", shmDir(t)+"/new"), "x"); got.status != http.StatusOK {
		t.Errorf("%d %s", got.status, got.body)
	}
}

func TestMemoryReserve(t *testing.T) {
	t.Parallel()
	for memory, want := range map[uint64]uint64{96: 32, 192: 56, 256: 56, 512: 64, 1024: 128, 65536: 128} {
		if got := memoryReserve(memory << 20); got != want<<20 {
			t.Errorf("of %d MiB %d bytes are kept, want %d MiB", memory, got, want)
		}
	}
}
