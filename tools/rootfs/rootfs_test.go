// Images are built, updated and read back without mounting them.
package rootfs

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

func TestMain(m *testing.M) {
	os.Setenv("PATH", os.Getenv("PATH")+":/usr/sbin:/sbin")
	os.Exit(m.Run())
}

func run(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	return string(out), err
}

func mustRun(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := run(t, name, args...)
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

// envd writes something of its size.
func envd(t *testing.T, word string) string {
	t.Helper()
	for _, tool := range []string{"mkfs.ext4", "debugfs", "e2fsck"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("needs e2fsprogs: %v", err)
		}
	}
	path := filepath.Join(t.TempDir(), "envd with a blank")
	if err := os.WriteFile(path, bytes.Repeat([]byte(word), 8<<20/len(word)), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t *testing.T, image, path string) string {
	t.Helper()
	return command(t, image, "cat "+path)
}

// command is what a command of debugfs prints.
func command(t *testing.T, image, line string) string {
	t.Helper()
	out, err := exec.Command("debugfs", "-R", line, image).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// check looks at an image that has this envd and is whole.
func check(t *testing.T, image, envd string) {
	t.Helper()
	want, err := os.ReadFile(envd)
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, image, "/usr/local/bin/envd"); got != string(want) {
		t.Errorf("envd in the image has %d bytes that are not the %d of the file", len(got), len(want))
	}
	stat := command(t, image, "stat /usr/local/bin/envd")
	for _, fact := range []string{`Type: regular`, `Mode: +0755`, `User: +0 +Group: +0`, `Links: 1`} {
		if !regexp.MustCompile(fact).MatchString(stat) {
			t.Errorf("envd in the image is not %s:\n%s", fact, stat)
		}
	}
	if list := command(t, image, "ls /usr/local/bin"); strings.Contains(list, ".envd-new") {
		t.Errorf("left over: %s", list)
	}
	for _, dir := range []string{"dev", "proc", "sys", "run", "tmp", "etc", "root"} {
		if stat := command(t, image, "stat /"+dir); !strings.Contains(stat, "Type: directory") {
			t.Errorf("/%s: %s", dir, stat)
		}
	}
	mustRun(t, "e2fsck", "-fn", image)
}

func TestAlone(t *testing.T) {
	t.Parallel()
	first, second := envd(t, "first "), envd(t, "second ")
	image := filepath.Join(t.TempDir(), "an image")
	mustRun(t, "./build", first, image)
	check(t, image, first)
	if init := command(t, image, "stat /sbin/init"); !strings.Contains(init, `"/usr/local/bin/envd"`) {
		t.Errorf("/sbin/init: %s", init)
	}
	mustRun(t, "./update", second, image)
	check(t, image, second)
	mustRun(t, "./update", second, image)
	check(t, image, second)
}

func TestOnTop(t *testing.T) {
	t.Parallel()
	binary := envd(t, "envd ")
	base := t.TempDir()
	for _, dir := range []string{"usr/sbin", "usr/local/bin", "etc"} {
		if err := os.MkdirAll(filepath.Join(base, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// As in distributions of today; an absolute link must not lead out of the image.
	elsewhere := t.TempDir()
	for link, target := range map[string]string{"sbin": "usr/sbin", "usr/local/bin/envd": filepath.Join(elsewhere, "envd")} {
		if err := os.Symlink(target, filepath.Join(base, link)); err != nil {
			t.Fatal(err)
		}
	}
	for file, content := range map[string]string{"etc/motd": "hello\n", "usr/sbin/init": "theirs\n"} {
		if err := os.WriteFile(filepath.Join(base, file), []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	tarball := filepath.Join(t.TempDir(), "base.tar.gz")
	mustRun(t, "tar", "-czf", tarball, "-C", base, ".")
	for i, from := range []string{base, tarball} {
		image := filepath.Join(t.TempDir(), fmt.Sprint("image", i))
		mustRun(t, "./build", binary, image, from)
		check(t, image, binary)
		if got := read(t, image, "/etc/motd"); got != "hello\n" {
			t.Errorf("%s: /etc/motd is %q", from, got)
		}
		if got := read(t, image, "/usr/sbin/init"); got != "theirs\n" {
			t.Errorf("%s: the init of the base is %q", from, got)
		}
	}
	if left, _ := os.ReadDir(elsewhere); len(left) != 0 {
		t.Errorf("written outside of the image: %v", left)
	}
}

func TestSize(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "image")
	mustRun(t, "./build", envd(t, "envd "), image, "", "100M")
	if st, err := os.Stat(image); err != nil || st.Size() != 100<<20 {
		t.Errorf("%v, %v", st, err)
	}
}

// A new envd that does not fit leaves the old one.
func TestNoRoom(t *testing.T) {
	t.Parallel()
	small, image := envd(t, "small "), filepath.Join(t.TempDir(), "image")
	large := filepath.Join(t.TempDir(), "large")
	if err := os.WriteFile(large, make([]byte, 200<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := os.OpenFile(large, os.O_WRONLY, 0); err != nil {
		t.Fatal(err)
	} else if _, err := f.Write(bytes.Repeat([]byte("x"), 200<<20)); err != nil {
		t.Fatal(err)
	} else {
		f.Close()
	}
	mustRun(t, "./build", small, image)
	if out, err := run(t, "./update", large, image); err == nil || !strings.Contains(out, "does not fit") {
		t.Errorf("%v: %s", err, out)
	}
	check(t, image, small)
}

func TestNoImage(t *testing.T) {
	t.Parallel()
	binary := envd(t, "envd ")
	if out, err := run(t, "./update", binary, filepath.Join(t.TempDir(), "none")); err == nil || !strings.Contains(out, "no image") {
		t.Errorf("%v: %s", err, out)
	}
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("this is no file system"), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := run(t, "./update", binary, text); err == nil || out == "" {
		t.Errorf("%v: %s", err, out)
	}
	if got, _ := os.ReadFile(text); string(got) != "this is no file system" {
		t.Errorf("the file is now %q", got)
	}
}
