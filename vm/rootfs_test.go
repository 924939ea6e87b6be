// The images of `make rootfs` and `make update-rootfs` boot.

package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func tool(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(filepath.Join("..", "tools", "rootfs", name), args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

// TestRootfsAlone: an image of envd alone, whose /sbin/init and only program it is.
func TestRootfsAlone(t *testing.T) {
	i := needGuests(t)
	image := filepath.Join(t.TempDir(), "image")
	tool(t, "build", i.path("envd"), image)
	g := boot(t, options{root: "rw", disk: image, exec: "/sbin/init"})
	if got := g.mustRun(t, "envd", "-version"); got == "" {
		t.Error("the agent, as a command, prints nothing")
	}
	kept := bytes.Repeat(fmt.Appendf(nil, "%015d\n", 1<<20-record), 1<<20/record)
	if err := g.upload("/etc/kept", kept); err != nil {
		t.Error(err)
	}
	pressCtrlAltDel(t, g)
	if reason, err := g.ended(); err != nil || reason != "guest-reset" {
		t.Errorf("it ended by %q, %v", reason, err)
	}
	g.leftClean(t, "/etc/kept", 1<<20)
}

// TestRootfsUpdated: an image on top of a directory that gets another envd, and boots that.
func TestRootfsUpdated(t *testing.T) {
	i := needGuests(t)
	dir := t.TempDir()
	image, base, other := filepath.Join(dir, "image"), filepath.Join(dir, "base"), filepath.Join(dir, "envd")
	content, err := os.ReadFile(i.path("envd"))
	if err == nil {
		content = append(content, "another build\n"...)
		err = os.WriteFile(other, content, 0o755)
	}
	if err == nil {
		err = os.Mkdir(base, 0o755)
	}
	if err == nil {
		err = copyFile(i.path("workload"), filepath.Join(base, "workload"), 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	tool(t, "build", i.path("envd"), image, base)
	tool(t, "update", other, image)
	g := boot(t, options{root: "rw", disk: image, exec: "/sbin/init"})
	g.lives(t)
	if got, err := g.download("/proc/1/exe"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("process 1 is a file of %d bytes, want the new envd's %d (%v)", len(got), len(content), err)
	}
	g.mustRun(t, "/workload", "dirty", "/dirty", "1")
	g.run("/workload", "kill", "1", "15")
	if reason, err := g.ended(); err != nil || reason != "guest-shutdown" {
		t.Errorf("it ended by %q, %v", reason, err)
	}
	g.leftClean(t, "/dirty", 1<<20)
}
