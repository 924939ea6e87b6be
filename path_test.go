// Path resolution as a table, and the property that guarded walks hold: a link confers only its owner's power.

package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
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
	for _, path := range []string{strings.Repeat("x", 4095-len("/home/user/")+1), "/" + strings.Repeat("x", 4095)} {
		if resolved, err := resolvePath(path, "/home/user", ""); err != syscall.ENAMETOOLONG {
			t.Errorf("a path of %d bytes: %v", len(resolved), err)
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

// What can be made by one request can be removed by one, and a path that is too long costs nothing.
func TestDeepPaths(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	for levels, status := range map[int]int{950: 200, 1500: 500, 3000: 400, 20_000: 431} {
		got := d.upload(t, filesPath("path", dir+"/"+strings.Repeat("d/", levels)+"f"), "x")
		if got.status != status {
			t.Errorf("%d levels: %d %.100s", levels, got.status, got.body)
		}
		if _, err := d.fsCall(t, "", "Remove", dir+"/d"); err != nil {
			t.Errorf("%d levels: %.100v", levels, err)
		}
		if _, err := os.Lstat(dir + "/d"); err == nil {
			t.Errorf("something is left of %d levels", levels)
		}
	}
	_, err := d.fsCall(t, "", "Move", "/etc/passwd-", dir+"/"+strings.Repeat("d/", 200_000)+"f")
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("Move to 200,000 levels: %.100v", err)
	}
	got := d.request(t, "POST", filesPath("path", dir), archive(t, tarEntry{name: strings.Repeat("d/", 2500) + "f"}), "Content-Type", "application/x-tar")
	if entries, _ := os.ReadDir(dir); got.status != 500 || len(entries) > 0 {
		t.Errorf("an archive of 2,500 levels: %d, and there is %v", got.status, entries)
	}
}

// ---- whose power ---------------------------------------------------------------------------------------------------

// A user can link any file into a directory that he may write to, where fs.protected_hardlinks is 0, as it is without
// systemd. The links here are made by root, which comes to the same.
func TestHardLinksLendNoPower(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	roots, untouched := rootsOwn(t)
	base := filepath.Dir(roots)
	shell(t, base, fmt.Sprintf(`mkdir -m 1777 tmp; mkdir -m 775 staff; chgrp 61002 staff; ln -s %[1]s/file tofile; ln -s %[1]s todir
		echo own > %[2]s/own; chown 61000:61000 %[2]s/own; ln %[2]s/own %[2]s/own2
		for dir in tmp staff %[2]s; do ln %[1]s/file $dir/f; ln -P tofile $dir/l; ln -P todir $dir/d; done; echo other > other; chown 61001 other; ln other tmp/other`, roots, home))
	before := lstat(t, base+"/other").Ctim
	for _, dir := range []string{base + "/tmp", base + "/staff", home} {
		for _, name := range []string{"/f", "/l", "/d/new", "/d/sub/f"} {
			if !uploadSmall(d, t, dir+name) || !uploadLarge(d, t, dir+name) {
				t.Errorf("%s%s: not refused", dir, name)
			}
			d.request(t, "POST", "/files/compose", fmt.Sprintf(`{"source_paths":["%s"],"destination":"stolen","username":"user"}`, dir+name))
		}
		if !remove(d, t, dir+"/d/sub") {
			t.Errorf("%s/d/sub: removed", dir)
		}
		untouched(dir)
	}
	if _, err := os.Lstat(home + "/stolen"); err == nil {
		t.Error("root's file was composed into the user's")
	}
	if !uploadSmall(d, t, base+"/tmp/other") || lstat(t, base+"/other").Ctim != before {
		t.Error("a user was given another one's file")
	}
	for _, path := range []string{home + "/own", home + "/own2"} { // his files in his directory
		if uploadSmall(d, t, path) || uploadLarge(d, t, path) {
			t.Errorf("%s: refused", path)
		}
	}
}

// A link's owner who is in no passwd file has no group: the link has that of the setgid directory in which it was made.
func TestLinkOwnerWithoutAccount(t *testing.T) {
	d, _ := startDaemonWithUsers(t, daemonConfig{})
	base := publicDir(t)
	shell(t, base, `mkdir -m 770 closed; chgrp 62003 closed; echo score > closed/f; ln -s closed l; chown -h 54321:62003 l`)
	if _, err := d.fsCall(t, "user", "Remove", base+"/l/f"); connect.CodeOf(err) != connect.CodeInternal {
		t.Error(err)
	}
	wantContent(t, base+"/closed/f", "score\n")
}

// Acting for a link's owner takes more than his filesystem uid: capabilities that are not about files would remain.
func TestLinkToProcOfRoot(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, fmt.Sprintf("ln -s /proc/%d/maps l; chown -h %d l", os.Getpid(), uidUser))
	got := d.request(t, "POST", "/files/compose", `{"source_paths":["l"],"destination":"maps","username":"user"}`)
	if text, err := os.ReadFile(home + "/maps"); err == nil && len(text) > 0 {
		t.Errorf("%d: the user was given the memory map of a process of root: %d bytes", got.status, len(text))
	}
}

// ---- FUSE ----------------------------------------------------------------------------------------------------------

type fuseNode struct {
	mode, uid uint32
	link      string
	hang      bool // it is never found
	stuck     bool // it is never listed
	children  map[string]uint64
}

func inMountNamespace(pid int, f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
		if err == nil {
			defer ns.Close()
			err = unix.Unshare(unix.CLONE_FS)
		}
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS)
		}
		if err == nil {
			err = f()
		}
		done <- err
	}()
	return <-done
}

// serveFUSE mounts a file system of the user's, as fusermount does, and answers for it. Node 1 is its root.
func serveFUSE(t testing.TB, d *daemon, dir string, nodes map[uint64]*fuseNode) (abort func()) {
	t.Helper()
	needRoot(t)
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skip("needs /dev/fuse: ", err)
	}
	options := fmt.Sprintf("fd=%d,rootmode=40755,user_id=%d,group_id=%d,allow_other", fd, uidUser, uidUser)
	err = inMountNamespace(d.pid, func() error { return unix.Mount("fuse-test", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options) })
	if err != nil {
		unix.Close(fd)
		t.Skip("needs FUSE: ", err)
	}
	unix.SetNonblock(fd, true)
	f := os.NewFile(uintptr(fd), "fuse")
	abort = sync.OnceFunc(func() {
		f.Close()
		inMountNamespace(d.pid, func() error { return unix.Unmount(dir, unix.MNT_DETACH) })
	})
	t.Cleanup(abort)
	le := binary.LittleEndian
	attr := func(b []byte, id uint64) []byte {
		n := nodes[id]
		b = le.AppendUint64(b, id)
		for range 5 {
			b = le.AppendUint64(b, 0)
		}
		b = append(b, make([]byte, 12)...)
		b = le.AppendUint32(b, n.mode)
		b = le.AppendUint32(b, 1)
		b = le.AppendUint32(b, n.uid)
		b = le.AppendUint32(b, n.uid)
		return append(b, make([]byte, 12)...)
	}
	go func() {
		buf := make([]byte, 1<<20)
		for {
			n, err := f.Read(buf)
			if err != nil {
				return
			}
			op, unique, node := le.Uint32(buf[4:]), le.Uint64(buf[8:]), le.Uint64(buf[16:])
			body := buf[40:n]
			var out []byte
			errno := unix.Errno(0)
			switch op {
			case 26: // INIT
				out = le.AppendUint32(le.AppendUint32(nil, 7), 31)
				out = append(out, make([]byte, 64-8)...)
				le.PutUint32(out[20:], 1<<17)
			case 1: // LOOKUP
				name := strings.TrimRight(string(body), "\x00")
				child := nodes[node].children[name]
				if child == 0 {
					errno = unix.ENOENT
					break
				}
				if nodes[child].hang {
					continue
				}
				out = le.AppendUint64(out, child)
				out = append(out, make([]byte, 32)...)
				out = attr(out, child)
			case 3: // GETATTR
				out = attr(make([]byte, 16), node)
			case 5: // READLINK
				out = []byte(nodes[node].link)
			case 14, 27: // OPEN, OPENDIR
				out = make([]byte, 16)
			case 28, 15: // READDIR, READ
				if nodes[node].stuck {
					continue
				}
			case 17: // STATFS
				out = make([]byte, 80)
			case 18, 29, 25: // RELEASE, RELEASEDIR, FLUSH
			case 2, 36, 42: // FORGET, INTERRUPT, BATCH_FORGET
				continue
			default:
				errno = unix.ENOSYS
			}
			answer := le.AppendUint32(nil, uint32(16+len(out)))
			answer = le.AppendUint32(answer, uint32(-int32(errno)))
			answer = le.AppendUint64(answer, unique)
			f.Write(append(answer, out...))
		}
	}()
	return abort
}

// What a user's FUSE file system says of owners is his word.
func TestFUSELendsNoPower(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	roots, untouched := rootsOwn(t)
	shell(t, home, "mkdir mnt vol; chown 61000 mnt vol; mkdir ../noshell/vol; chown 61001 ../noshell/vol")
	serveFUSE(t, d, home+"/mnt", map[uint64]*fuseNode{
		1: {mode: unix.S_IFDIR | 0o755, children: map[string]uint64{"f": 2, "d": 3, "other": 4, "vol": 5, "dir": 6}},
		2: {mode: unix.S_IFLNK | 0o777, link: roots + "/file"},
		3: {mode: unix.S_IFLNK | 0o777, link: roots},
		4: {mode: unix.S_IFLNK | 0o777, uid: uidNoShell, link: filepath.Dir(home) + "/noshell/vol"},
		5: {mode: unix.S_IFLNK | 0o777, link: home + "/vol"},
		6: {mode: unix.S_IFDIR | 0o755},
	})
	for _, path := range []string{"f", "d/new", "other/new", "dir/" + strings.Repeat("../", 20) + roots + "/file"} {
		if !uploadSmall(d, t, home+"/mnt/"+path) || !uploadLarge(d, t, home+"/mnt/"+path) {
			t.Errorf("%s: not refused", path)
		}
	}
	if !remove(d, t, home+"/mnt/d/sub") {
		t.Error("removed")
	}
	d.request(t, "POST", "/files/compose", `{"source_paths":["`+home+`/mnt/d/secret"],"destination":"stolen","username":"user"}`)
	if _, err := os.Lstat(home + "/stolen"); err == nil {
		t.Error("root's secret was composed into the user's file")
	}
	untouched("links on FUSE")
	if uploadSmall(d, t, home+"/mnt/vol/new") {
		t.Error("what the user may do is refused")
	}
}

// Requests that a file system never answers are bounded, those whose clients have left included. What is beyond is told so.
func TestManyRequestsHang(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "mkdir mnt; chown 61000 mnt; ln -s mnt/hang/x l; chown -h 61000 l")
	abort := serveFUSE(t, d, home+"/mnt", map[uint64]*fuseNode{
		1: {mode: unix.S_IFDIR | 0o755, uid: uidUser, children: map[string]uint64{"hang": 2}},
		2: {mode: unix.S_IFDIR | 0o755, hang: true},
	})
	threads := d.threads()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	var wait sync.WaitGroup
	for i := range 600 {
		wait.Go(func() {
			call := []struct{ method, path, contentType, body string }{
				{"GET", filesPath("path", home+"/mnt/hang", "username", "user"), "", ""},
				{"POST", filesPath("path", home+"/l", "username", "user"), "application/octet-stream", "x"},
				{"POST", "/filesystem.Filesystem/Stat", "application/json", `{"path":"` + home + `/mnt/hang"}`},
				{"POST", "/files/compose", "application/json", `{"source_paths":["` + home + `/mnt/hang"],"destination":"/x","username":"user"}`},
			}[i%4]
			request, _ := http.NewRequestWithContext(ctx, call.method, d.url+call.path, strings.NewReader(call.body))
			request.Header.Set("Content-Type", call.contentType)
			if response, err := client.Do(request); err == nil {
				response.Body.Close()
			}
		})
	}
	file := filesPath("path", home+"/f", "username", "user")
	waitFor(t, 30*time.Second, "a refusal", func() bool { // a new connection can be cut in such a crowd
		response, err := client.Post(d.url+file, "application/octet-stream", strings.NewReader("x"))
		if err != nil {
			return false
		}
		response.Body.Close()
		return response.StatusCode == http.StatusServiceUnavailable
	})
	cancel()
	wait.Wait()
	d.healthy(t)
	wantFailure(t, "one more", d.request(t, "GET", file, ""), 503, errFilesHang.Error())
	if _, err := d.fsCall(t, "user", "Stat", home+"/f"); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("Stat: %v", err)
	}
	if more := d.threads() - threads; more > cap(atFiles)+50 {
		t.Errorf("600 requests whose clients have left: %d threads more", more)
	}
	abort()
	waitFor(t, 10*time.Second, "an upload as before", func() bool { return d.upload(t, file, "x").status == 200 })
}

// A transfer takes no place, whatever it takes of time; one that hangs when its client has left does.
func TestAbandonedTransfersHang(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "mkdir mnt; chown 61000 mnt")
	abort := serveFUSE(t, d, home+"/mnt", map[uint64]*fuseNode{
		1: {mode: unix.S_IFDIR | 0o755, uid: uidUser, children: map[string]uint64{"stuck": 2, "hang": 3}},
		2: {mode: unix.S_IFDIR | 0o755, uid: uidUser, stuck: true},
		3: {mode: unix.S_IFDIR | 0o755, hang: true},
	})
	threads := d.threads()
	client := &http.Client{Timeout: 500 * time.Millisecond, Transport: &http.Transport{DisableKeepAlives: true}}
	file := filesPath("path", home+"/f", "username", "user")
	ask := func(i int) {
		request, _ := http.NewRequest("GET", d.url+filesPath("path", home+"/mnt/stuck"), nil)
		request.Header.Set("Accept", "application/x-tar")
		if i%8 == 1 { // of these, which need more memory, fewer may be under way
			body := archive(t, tarEntry{name: "hang/x", content: strings.Repeat("x", 100_000)})
			request, _ = http.NewRequest("POST", d.url+filesPath("path", home+"/mnt"), strings.NewReader(body))
			request.Header.Set("Content-Type", "application/x-tar")
		}
		if response, err := client.Do(request); err == nil {
			response.Body.Close()
		}
	}
	for wave := 0; d.upload(t, file, "x").status == 200; wave++ {
		if wave == 20 {
			t.Fatalf("%d requests have been abandoned, and more are taken: %d threads more", wave*60, d.threads()-threads)
		}
		var wait sync.WaitGroup
		for i := range 60 {
			wait.Go(func() { ask(i) })
		}
		wait.Wait()
	}
	if more := d.threads() - threads; more > cap(atFiles)+120 {
		t.Errorf("%d threads more", more)
	}
	abort()
	waitFor(t, 10*time.Second, "an upload as before", func() bool { return d.upload(t, file, "x").status == 200 })
}
