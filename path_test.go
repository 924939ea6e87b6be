// Path resolution as a table, and the property that guarded walks hold: a link confers only its owner's power.

package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

var resolutions = []struct{ path, workdir, want string }{
	{"", "", "/home/user"},
	{"", "/tmp", "/tmp"},
	{"", "~/w", "/home/user/w"},
	{"", "rel", "/home/user/rel"},
	{"x", "/tmp", "/home/user/x"},
	{"./x/", "", "/home/user/x"},
	{"../x", "", "/home/x"},
	{"../../../../x", "", "/x"},
	{"~", "/tmp", "/home/user"},
	{"~/a/../b", "", "/home/user/b"},
	{`~\a`, "", `/home/user/\a`},
	{"/a/../b", "", "/a/../b"},
	{"/a/", "", "/a/"},
	{"/", "", "/"},
	{"a~", "", "/home/user/a~"},
}

func TestResolvePath(t *testing.T) {
	for _, c := range resolutions {
		if got, err := resolvePath(c.path, "/home/user", c.workdir); got != c.want || err != nil {
			t.Errorf("resolvePath(%q), working directory %q: %q, %v; want %q", c.path, c.workdir, got, err, c.want)
		}
	}
	for _, path := range []string{"~other", "~other/x"} {
		if _, err := resolvePath(path, "/home/user", ""); err != errUserSpecificHome {
			t.Errorf("resolvePath(%q): %v", path, err)
		}
	}
}

// FuzzResolvePath: what is resolved is absolute, and stays as it is when it is resolved again.
func FuzzResolvePath(f *testing.F) {
	for _, c := range resolutions {
		f.Add(c.path, c.workdir)
	}
	f.Fuzz(func(t *testing.T, path, workdir string) {
		resolved, err := resolvePath(path, "/home/user", workdir)
		if err != nil {
			return
		}
		if again, err := resolvePath(resolved, "/home/other", "/elsewhere"); again != resolved || err != nil {
			t.Errorf("%q resolves to %q, and that to %q, %v", path, resolved, again, err)
		}
	})
}

func TestWalk(t *testing.T) {
	needRoot(t)
	dir := publicDir(t)
	shell(t, dir, `mkdir -p a/b; echo > a/b/f; ln -s a/b rootlink; ln -s nowhere dangling; ln -s loop loop; ln -s a/b/f last
		ln -s `+dir+`/a userlink; chown -h 61000:61000 userlink; mkdir mine; chown 61000 mine; chmod 755 a`)
	maker := account{uid: 61001, gid: 61001}
	for _, c := range []struct {
		path   string
		way    walk
		want   string // where it leads, relative to dir
		as     int    // the uid it has then, 0: the daemon's
		failed string // how the error ends
	}{
		{path: "/a/b/f", want: "a/b/f"},
		{path: "/a/./b//f", want: "a/b/f"},
		{path: "/a/b/new", want: "a/b/new"},
		{path: "/a/../a/b/f", want: "a/b/f"},
		{path: "/mine/../a/b/f", want: "a/b/f", as: 61000},
		{path: "/a/b/", want: "a/b"},
		{path: "/rootlink/f", want: "a/b/f"},
		{path: "/userlink/b/f", want: "a/b/f", as: 61000},
		{path: "/userlink", want: "userlink"},
		{path: "/userlink", way: walk{follow: true}, want: "a", as: 61000},
		{path: "/last", way: walk{follow: true}, want: "a/b/f"},
		{path: "/dangling", want: "dangling"},
		{path: "/dangling", way: walk{follow: true}, want: "nowhere"},
		{path: "/dangling/", failed: "no such file or directory"},
		{path: "/dangling/x", way: walk{mkdirs: &maker}, failed: "file exists"},
		{path: "/loop/x", failed: "too many levels of symbolic links"},
		{path: "/rootlink/f", way: walk{noLinks: true}, failed: "too many levels of symbolic links"},
		{path: "/a/b/f/x", failed: "path is a file: " + dir + "/a/b/f"},
		{path: "/none/x", failed: "no such file or directory"},
		{path: "/made/here/x", way: walk{mkdirs: &maker}, want: "made/here/x"},
		{path: "/userlink/new/x", way: walk{mkdirs: &maker}, failed: "permission denied"},
		{path: "/" + strings.Repeat("n", 256), failed: "file name too long"},
	} {
		c.way.users = &userDB{}
		p, err := walkPath(c.way, dir+c.path)
		if c.failed != "" {
			if err == nil || !strings.HasSuffix(err.Error(), c.failed) {
				t.Errorf("%s: %v, want %s", c.path, err, c.failed)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.path, err)
			continue
		}
		uid := 0
		if p.as != nil {
			uid = int(p.as.uid)
		}
		if p.path != filepath.Join(dir, c.want) || uid != c.as {
			t.Errorf("%s leads to %s as %d, want %s/%s as %d", c.path, p.path, uid, dir, c.want, c.as)
		}
		p.close()
	}
	info, err := os.Stat(filepath.Join(dir, "made/here"))
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != maker.uid || info.Mode() != os.ModeDir|0o755 {
		t.Errorf("made/here: %v %v", info.Mode(), err)
	}
	if fds, _ := os.ReadDir("/proc/self/fd"); len(fds) > 20 {
		t.Errorf("%d descriptors are open", len(fds))
	}
}
