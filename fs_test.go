// The Filesystem service, as clients see it: entries, listings, changes, every row of the error table.

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

// fsCall makes one unary call as a user; "" is nobody in particular.
func (d *daemon) fsCall(t testing.TB, user, method string, paths ...string) (entries []*pb.EntryInfo, err error) {
	t.Helper()
	one := func(entry *pb.EntryInfo) []*pb.EntryInfo {
		if entry == nil {
			return nil
		}
		return []*pb.EntryInfo{entry}
	}
	client := d.filesystem(connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
		if user == "" {
			return next
		}
		return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
			req.Header().Set("Authorization", basicAuth(user))
			return next(ctx, req)
		}
	})))
	switch method {
	case "Stat":
		response, err := client.Stat(t.Context(), connect.NewRequest(&pb.StatRequest{Path: paths[0]}))
		if err != nil {
			return nil, err
		}
		return one(response.Msg.GetEntry()), nil
	case "MakeDir":
		response, err := client.MakeDir(t.Context(), connect.NewRequest(&pb.MakeDirRequest{Path: paths[0]}))
		if err != nil {
			return nil, err
		}
		return one(response.Msg.GetEntry()), nil
	case "Move":
		response, err := client.Move(t.Context(), connect.NewRequest(&pb.MoveRequest{Source: paths[0], Destination: paths[1]}))
		if err != nil {
			return nil, err
		}
		return one(response.Msg.GetEntry()), nil
	case "Remove":
		_, err := client.Remove(t.Context(), connect.NewRequest(&pb.RemoveRequest{Path: paths[0]}))
		return nil, err
	case "ListDir":
		request := &pb.ListDirRequest{Path: paths[0]}
		if len(paths) > 1 {
			request.Depth = uint32(atoi(t, paths[1]))
		}
		response, err := client.ListDir(t.Context(), connect.NewRequest(request))
		if err != nil {
			return nil, err
		}
		return response.Msg.GetEntries(), nil
	}
	t.Fatalf("no method %s", method)
	return nil, nil
}

func TestFilesystemErrors(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "mkdir -p dir/sub; echo > file; ln -s loop loop; ln -s nowhere dangling; mkdir full; echo > full/f; ln -s file link; ln -s dir chain0; for i in $(seq 300); do ln -s chain$((i-1)) chain$i; done")
	long := strings.Repeat("n", 256)
	for _, c := range []struct {
		method, paths string // paths separated by spaces; HOME is replaced
		code          connect.Code
		message       string
	}{
		{"Stat", "~other", connect.CodeInvalidArgument, "failed to expand path '~other' for user 'user': cannot expand user-specific home dir"},
		{"Stat", "none", connect.CodeNotFound, "file not found: lstat HOME/none: no such file or directory"},
		{"Stat", "file/x", connect.CodeInternal, "error getting file info: lstat HOME/file/x: not a directory"},
		{"Stat", long, connect.CodeInternal, "error getting file info: lstat HOME/" + long + ": file name too long"},
		{"MakeDir", "dir", connect.CodeAlreadyExists, "directory already exists: HOME/dir"},
		{"MakeDir", "file", connect.CodeInvalidArgument, "path already exists but it is not a directory: HOME/file"},
		{"MakeDir", "link", connect.CodeInvalidArgument, "path already exists but it is not a directory: HOME/link"},
		{"MakeDir", "file/x", connect.CodeInternal, "error getting file info: stat HOME/file/x: not a directory"},
		{"MakeDir", "loop", connect.CodeInternal, "error getting file info: stat HOME/loop: too many levels of symbolic links"},
		{"MakeDir", "dangling", connect.CodeInternal, "failed to create directory: mkdir HOME/nowhere: file exists"},
		{"MakeDir", "new/" + long, connect.CodeInternal, "failed to create directory: open HOME/new/" + long + ": file name too long"},
		{"Move", "none there", connect.CodeNotFound, "source file not found: rename HOME/none HOME/there: no such file or directory"},
		{"Move", "file file/x/y", connect.CodeInternal, "path is a file: HOME/file"},
		{"Move", "file dir", connect.CodeInternal, "error renaming: rename HOME/file HOME/dir: file exists"},
		{"Move", "dir full", connect.CodeInternal, "error renaming: rename HOME/dir HOME/full: file exists"},
		{"Move", "dir file", connect.CodeInternal, "error renaming: rename HOME/dir HOME/file: not a directory"},
		{"Move", "dir dir/sub/x", connect.CodeInternal, "error renaming: rename HOME/dir HOME/dir/sub/x: invalid argument"},
		{"Move", "file /dev/shm/envd-test-cross", connect.CodeInternal, "error renaming: rename HOME/file /dev/shm/envd-test-cross: invalid cross-device link"},
		{"Move", "file/x there", connect.CodeInternal, "error renaming: rename HOME/file/x HOME/there: not a directory"},
		{"ListDir", "none", connect.CodeNotFound, "path not found: lstat HOME/none: no such file or directory"},
		{"ListDir", "dangling", connect.CodeNotFound, "path not found: lstat HOME/nowhere: no such file or directory"},
		{"ListDir", "loop", connect.CodeFailedPrecondition, `cyclic symlink or chain >255 links at "HOME/loop"`},
		{"ListDir", "chain300", connect.CodeFailedPrecondition, `cyclic symlink or chain >255 links at "HOME/chain300"`},
		{"ListDir", "file/x", connect.CodeInternal, "error resolving symlink: not a directory"},
		{"ListDir", "link", connect.CodeInvalidArgument, "path is not a directory: HOME/file"},
		{"Remove", "HOME/dir/.", connect.CodeInternal, "error removing file or directory: RemoveAll HOME/dir/.: invalid argument"},
		{"Remove", "HOME/dir/..", connect.CodeInternal, "error removing file or directory: RemoveAll HOME/dir/..: invalid argument"},
		{"Remove", "/", connect.CodeInternal, "error removing file or directory: RemoveAll /: invalid argument"},
		{"Remove", "/proc/1/status", connect.CodeInternal, "error removing file or directory: unlinkat /proc/1/status: operation not permitted"},
	} {
		expand := strings.NewReplacer("HOME", home)
		_, err := d.fsCall(t, "user", c.method, strings.Fields(expand.Replace(c.paths))...)
		if t.Run(c.method+" "+c.paths[:min(len(c.paths), 20)], func(t *testing.T) { wantError(t, err, c.code, expand.Replace(c.message)) }); err == nil {
			os.Remove("/dev/shm/envd-test-cross")
		}
	}
	if entries, err := d.fsCall(t, "user", "ListDir", "chain200"); err != nil || len(entries) != 1 || entries[0].GetPath() != home+"/chain200/sub" {
		t.Errorf("a chain of 200 links: %v %v", entries, err)
	}
	_, err := d.fsCall(t, "ghost", "Stat", "x")
	wantError(t, err, connect.CodeUnauthenticated, "invalid username: 'ghost'")
	if _, err := d.fsCall(t, "user", "Remove", "none"); err != nil {
		t.Errorf("Remove of what is not there: %v", err)
	}
}

func TestEntryInfo(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, `echo 12345 > f; chmod 640 f; chown 61004:62001 f; touch -d '2001-02-03 04:05:06.789 UTC' f
		mkdir d; chmod 1777 d; echo > s; chown 54321:54321 s; chmod 4755 s; echo > g; chmod 2755 g; mkfifo p; chmod 644 p
		ln -s f lf; ln -s d ld; ln -s nowhere lb; ln -s lc lc; touch -d @0 g; mknod null c 1 3; chmod 666 null; mknod block b 7 0; chmod 660 block`)
	socket, err := net.Listen("unix", home+"/sock")
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	for _, c := range []struct {
		path, name, permissions, owner, group, target string
		kind                                          pb.FileType
		mode                                          uint32
		size                                          int64
	}{
		{"f", "f", "-rw-r-----", "grouped", "first", "", pb.FileType_FILE_TYPE_FILE, 0o640, 6},
		{home + "/./f", "f", "-rw-r-----", "grouped", "first", "", pb.FileType_FILE_TYPE_FILE, 0o640, 6},
		{"d", "d", "dtrwxrwxrwx", "root", "root", "", pb.FileType_FILE_TYPE_DIRECTORY, 0o777, -1},
		{home + "/d/", "d", "dtrwxrwxrwx", "root", "root", "", pb.FileType_FILE_TYPE_DIRECTORY, 0o777, -1},
		{"s", "s", "urwxr-xr-x", "54321", "54321", "", pb.FileType_FILE_TYPE_FILE, 0o755, 1},
		{"g", "g", "grwxr-xr-x", "root", "root", "", pb.FileType_FILE_TYPE_FILE, 0o755, 1},
		{"p", "p", "prw-r--r--", "root", "root", "", pb.FileType_FILE_TYPE_UNSPECIFIED, 0o644, 0},
		{"null", "null", "Dcrw-rw-rw-", "root", "root", "", pb.FileType_FILE_TYPE_UNSPECIFIED, 0o666, 0},
		{"block", "block", "Drw-rw----", "root", "root", "", pb.FileType_FILE_TYPE_UNSPECIFIED, 0o660, 0},
		{"sock", "sock", "Srwxr-xr-x", "root", "root", "", pb.FileType_FILE_TYPE_UNSPECIFIED, 0o755, 0},
		{"lf", "lf", "Lrwxrwxrwx", "root", "root", home + "/f", pb.FileType_FILE_TYPE_FILE, 0o640, 1},
		{"ld", "ld", "Lrwxrwxrwx", "root", "root", home + "/d", pb.FileType_FILE_TYPE_DIRECTORY, 0o777, 1},
		{"lb", "lb", "Lrwxrwxrwx", "root", "root", home + "/lb", pb.FileType_FILE_TYPE_UNSPECIFIED, 0, 7},
		{"lc", "lc", "Lrwxrwxrwx", "root", "root", home + "/lc", pb.FileType_FILE_TYPE_UNSPECIFIED, 0, 2},
		{"/", "/", "drwxr-xr-x", "root", "root", "", pb.FileType_FILE_TYPE_DIRECTORY, 0o755, -1},
	} {
		entries, err := d.fsCall(t, "user", "Stat", c.path)
		if err != nil {
			t.Errorf("%s: %v", c.path, err)
			continue
		}
		e, path := entries[0], c.path
		if !filepath.IsAbs(path) {
			path = filepath.Join(home, path)
		}
		if c.size < 0 {
			c.size = e.GetSize()
		}
		if e.GetName() != c.name || e.GetPath() != path || e.GetType() != c.kind || e.GetMode() != c.mode || e.GetPermissions() != c.permissions ||
			e.GetOwner() != c.owner || e.GetGroup() != c.group || e.GetSymlinkTarget() != c.target || e.GetSize() != c.size {
			t.Errorf("got  %v\nwant %+v", e, c)
		}
		if (e.SymlinkTarget != nil) != (c.target != "") {
			t.Errorf("%s: symlink target %v", c.path, e.SymlinkTarget)
		}
		switch c.path {
		case "f":
			if got := e.GetModifiedTime().AsTime(); !got.Equal(time.Date(2001, 2, 3, 4, 5, 6, 789e6, time.UTC)) {
				t.Errorf("modified %v", got)
			}
		case "g":
			if e.ModifiedTime != nil {
				t.Errorf("modified %v, want none", e.ModifiedTime)
			}
		}
	}
}

func TestListDir(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "mkdir -p t/b/c/d t/B t/empty; echo > t/a; echo > t/b/f1; echo > t/b/c/x; echo > t/.hidden; ln -s b t/lb; ln -s t link; mkfifo t/p")
	list := func(path, depth string) string {
		t.Helper()
		entries, err := d.fsCall(t, "user", "ListDir", path, depth)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range entries {
			names = append(names, strings.TrimPrefix(e.GetPath(), home+"/"))
		}
		return strings.Join(names, " ")
	}
	for _, c := range []struct{ path, depth, want string }{
		{"t", "0", "t/.hidden t/B t/a t/b t/empty t/lb t/p"},
		{"t", "1", "t/.hidden t/B t/a t/b t/empty t/lb t/p"},
		{"t", "2", "t/.hidden t/B t/a t/b t/b/c t/b/f1 t/empty t/lb t/p"},
		{"t", "3", "t/.hidden t/B t/a t/b t/b/c t/b/c/d t/b/c/x t/b/f1 t/empty t/lb t/p"},
		{"t", "4294967295", "t/.hidden t/B t/a t/b t/b/c t/b/c/d t/b/c/x t/b/f1 t/empty t/lb t/p"},
		{"t/empty", "3", ""},
		{"link", "1", "link/.hidden link/B link/a link/b link/empty link/lb link/p"},
		{home + "/t/../t/", "1", "t/.hidden t/B t/a t/b t/empty t/lb t/p"},
	} {
		if got := list(c.path, c.depth); got != c.want {
			t.Errorf("ListDir %s, depth %s:\ngot  %s\nwant %s", c.path, c.depth, got, c.want)
		}
	}
	if got := d.request(t, "POST", "/filesystem.Filesystem/ListDir", `{"path":"/","depth":-1}`, "Content-Type", "application/json"); got.status != 400 || !strings.Contains(got.body, "invalid_argument") {
		t.Errorf("depth -1: %d %s", got.status, got.body)
	}
}

// Names that a protobuf string cannot carry, names with newlines, the longest name, a deep tree.
func TestOddNames(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	dir := filepath.Join(home, "odd")
	long := strings.Repeat("n", 255)
	for _, name := range []string{"bad\xffname", "new\nline", long, "ü"} {
		writeFile(t, mkdirFor(t, dir)+"/"+name, "x", 0o644)
	}
	entries, err := d.fsCall(t, "user", "ListDir", dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.GetName())
	}
	if got, want := strings.Join(names, "|"), "bad\uFFFDname|new\nline|"+long+"|ü"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	deep := strings.Repeat("d/", 99) + "d"
	if _, err := d.fsCall(t, "user", "MakeDir", "odd/"+deep); err != nil {
		t.Error(err)
	}
	if entries, err = d.fsCall(t, "user", "ListDir", "odd", "200"); err != nil || len(entries) != 104 {
		t.Errorf("%d entries, %v", len(entries), err)
	}
	if _, err := d.fsCall(t, "user", "Remove", "odd"); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("still there: %v", err)
	}
}

func mkdirFor(t testing.TB, dir string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestChanges(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	entries, err := d.fsCall(t, "user", "MakeDir", "a/b/c")
	if err != nil || entries[0].GetPath() != home+"/a/b/c" || entries[0].GetOwner() != "user" || entries[0].GetGroup() != "user" || entries[0].GetMode() != 0o755 {
		t.Errorf("MakeDir: %v %v", entries, err)
	}
	for _, dir := range []string{"a", "a/b"} {
		if st := lstat(t, filepath.Join(home, dir)); st.Uid != uidUser || st.Mode&0o7777 != 0o755 {
			t.Errorf("%s: uid %d, mode %o", dir, st.Uid, st.Mode)
		}
	}
	shell(t, home, "echo one > f1; echo two > f2; setfattr -n user.e2b.k -v v f1 2>/dev/null || true; ln -s f2 lnk; mkdir e")
	entries, err = d.fsCall(t, "user", "Move", "f1", "f2")
	if content, _ := os.ReadFile(home + "/f2"); err != nil || string(content) != "one\n" || entries[0].GetPath() != home+"/f2" {
		t.Errorf("Move over a file: %v %v %q", entries, err, content)
	}
	if _, err = d.fsCall(t, "user", "Move", "lnk", "new/parents/lnk"); err != nil || lstat(t, home+"/new/parents").Uid != uidUser {
		t.Errorf("Move of a link: %v", err)
	}
	if target, _ := os.Readlink(home + "/new/parents/lnk"); target != "f2" {
		t.Errorf("the link leads to %q", target)
	}
	if _, err = d.fsCall(t, "user", "Move", "e", "e2"); err != nil {
		t.Errorf("Move of a directory: %v", err)
	}
	if _, err = d.fsCall(t, "user", "Remove", "new/parents/lnk"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(home + "/f2"); err != nil {
		t.Errorf("Remove of a link took its target: %v", err)
	}
	for _, path := range []string{"a", "e2/", "f2"} {
		if _, err = d.fsCall(t, "user", "Remove", path); err != nil {
			t.Errorf("Remove %s: %v", path, err)
		}
		if _, err := os.Lstat(filepath.Join(home, path)); !os.IsNotExist(err) {
			t.Errorf("%s is still there", path)
		}
	}
}

func lstat(t testing.TB, path string) *syscall.Stat_t {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t)
}

// A directory of 100,000 entries is listed and removed. Many listings at once are refused rather than kept in memory.
func TestManyEntries(t *testing.T) {
	d := startDaemon(t)
	dir, err := os.MkdirTemp("/dev/shm", "envd-test-")
	if err != nil {
		t.Skip("needs tmpfs: " + err.Error())
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for i := range 100_000 {
		if err := unix.Mknod(fmt.Sprintf("%s/f%d", dir, i), unix.S_IFREG|0o644, 0); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := d.fsCall(t, "", "ListDir", dir)
	if err != nil || len(entries) != 100_000 {
		t.Errorf("%d entries, %v", len(entries), err)
	}
	t.Logf("peak RSS %d MiB", d.peakRSS()>>20)
	var status [600]atomic.Int64
	var clients sync.WaitGroup
	for range 32 {
		clients.Go(func() {
			response, err := d.http.Post(d.url+"/filesystem.Filesystem/ListDir", "application/json", strings.NewReader(`{"path":"`+dir+`"}`))
			if err != nil {
				t.Error(err)
				return
			}
			io.Copy(io.Discard, response.Body)
			response.Body.Close()
			status[response.StatusCode].Add(1)
		})
	}
	clients.Wait()
	done, refused := status[200].Load(), status[429].Load()
	t.Logf("32 at once: %d done, %d refused, peak RSS %d MiB", done, refused, d.peakRSS()>>20)
	if done < 1 || done+refused != 32 || d.peakRSS() > 512<<20 && !raceEnabled() {
		t.Errorf("32 at once: %d done, %d refused, peak RSS %d MiB", done, refused, d.peakRSS()>>20)
	}
	if entries, err = d.fsCall(t, "", "ListDir", dir); err != nil || len(entries) != 100_000 {
		t.Errorf("after that: %d entries, %v", len(entries), err)
	}
	if _, err := d.fsCall(t, "", "Remove", dir); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("still there: %v", err)
	}
}

// What an ordinary user's daemon may not do is said, and nothing is half done.
func TestFilesystemErrorsAsNobody(t *testing.T) {
	d := startDaemonAsNobody(t)
	dir := publicDir(t)
	shell(t, dir, "chmod 755 .; mkdir closed; echo > closed/f; chmod 700 closed; mkdir open; mkdir open/a open/closed; chmod 700 open/closed; echo > file")
	for _, c := range []struct {
		method, paths string
		code          connect.Code
		message       string
	}{
		{"Stat", "closed/f", connect.CodeInternal, "error getting file info: lstat DIR/closed/f: permission denied"},
		{"ListDir", "closed", connect.CodeInternal, "error reading directory DIR/closed: open DIR/closed: permission denied"},
		{"ListDir", "open 2", connect.CodeInternal, "error reading directory DIR/open: open DIR/open/closed: permission denied"},
		{"MakeDir", "new", connect.CodeInternal, "failed to create directory: mkdir DIR/new: permission denied"},
		{"Move", "file new", connect.CodeInternal, "error renaming: rename DIR/file DIR/new: permission denied"},
		{"Remove", "file", connect.CodeInternal, "error removing file or directory: unlinkat DIR/file: permission denied"},
	} {
		paths := strings.Fields(c.paths)
		for i := range paths {
			if paths[i] != "2" {
				paths[i] = dir + "/" + paths[i]
			}
		}
		_, err := d.fsCall(t, "", c.method, paths...)
		t.Run(c.method+" "+c.paths, func(t *testing.T) { wantError(t, err, c.code, strings.ReplaceAll(c.message, "DIR", dir)) })
	}
	wantFailure(t, "download", d.request(t, "GET", filesPath("path", dir+"/closed/f"), ""), 500,
		fmt.Sprintf("error checking if path exists '%[1]s/closed/f': stat %[1]s/closed/f: permission denied", dir))
	os.Chmod(dir+"/file", 0o600)
	wantFailure(t, "download", d.request(t, "GET", filesPath("path", dir+"/file"), ""), 500,
		fmt.Sprintf("error opening file '%[1]s/file': open %[1]s/file: permission denied", dir))
	for _, path := range []string{"/closed", "/none"} {
		w := d.watchDir(t, &pb.WatchDirRequest{Path: dir + path})
		if (connect.CodeOf(w.err) == connect.CodeNotFound) != (path == "/none") || w.err == nil {
			t.Errorf("watch %s: %v", path, w.err)
		}
	}
}

// A listing that takes long, for links that are slow to resolve, ends with its client.
func TestListDirClientLeaves(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	hop := strings.Repeat("d/../", 800)
	shell(t, dir, "mkdir d list; ln -s . h200")
	for i := range 200 {
		os.Symlink(hop+fmt.Sprint("h", i+1), fmt.Sprint(dir, "/h", i))
	}
	for i := range 1000 {
		os.Symlink("../h0", fmt.Sprint(dir, "/list/", i))
	}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	_, err := d.filesystem().ListDir(ctx, connect.NewRequest(&pb.ListDirRequest{Path: dir + "/list"}))
	if err == nil {
		return // a fast machine: all links are resolved
	}
	waitFor(t, 10*time.Second, "an idle daemon", func() bool {
		before := d.cpuTime(t)
		time.Sleep(200 * time.Millisecond)
		return d.cpuTime(t)-before < 20*time.Millisecond
	})
}

// A time that JSON cannot say, before year 1 or after 9999 (tmpfs keeps 64 bits), is left out.
func TestTimeBeyondJSON(t *testing.T) {
	d := startDaemon(t)
	dir, err := os.MkdirTemp("/dev/shm", "envd-test-")
	if err != nil {
		t.Skip("needs tmpfs: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for seconds, told := range map[int64]string{253402300799: "9999-12-31T23:59:59Z", 253402300800: "", 1 << 60: "", -62135596800: "0001-01-01T00:00:00Z", -62135596801: ""} {
		file := writeFile(t, dir+"/f", "x", 0o644)
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, file, []unix.Timespec{{Sec: seconds}, {Sec: seconds}}, 0); err != nil || lstat(t, file).Mtim.Sec != seconds {
			t.Logf("no such time here: %d, %v", seconds, err)
			continue
		}
		for method, path := range map[string]string{"ListDir": dir, "Stat": file} {
			got := d.request(t, "POST", "/filesystem.Filesystem/"+method, fmt.Sprintf(`{"path":%q}`, path), "Content-Type", "application/json")
			if got.status != 200 || strings.Contains(got.body, "modifiedTime") != (told != "") || !strings.Contains(got.body, told) {
				t.Errorf("%s with mtime %d: %d %.300s, want %q", method, seconds, got.status, got.body, told)
			}
		}
	}
}

// An empty path means the default directory where something is looked at, and is refused where something would be gone.
func TestEmptyPath(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "echo > f")
	for _, c := range [][]string{{"Remove", ""}, {"Move", "", "x"}, {"Move", "f", ""}} {
		_, err := d.fsCall(t, "user", c[0], c[1:]...)
		wantError(t, err, connect.CodeInvalidArgument, "refused to move or remove an empty path, which means the default directory")
	}
	if _, err := os.Lstat(home + "/f"); err != nil {
		t.Error(err)
	}
	for _, method := range []string{"Stat", "ListDir"} {
		if entries, err := d.fsCall(t, "user", method, ""); err != nil || len(entries) == 0 {
			t.Errorf("%s: %v %v", method, entries, err)
		}
	}
	_, err := d.fsCall(t, "user", "MakeDir", "")
	wantError(t, err, connect.CodeAlreadyExists, "directory already exists: "+home)
}
