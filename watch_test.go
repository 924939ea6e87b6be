// Watching, as clients see it: sequences of commands and the events they must give, races, limits, bursts.

package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	pb "envd/proto"
)

func (d *daemon) filesystem(options ...connect.ClientOption) pb.FilesystemClient {
	return pb.NewFilesystemClient(d.http, d.url, options...)
}

// watching is an open WatchDir stream.
type watching struct {
	events chan *pb.FilesystemEvent // closed at the end of the stream
	err    error                    // valid then
	drop   func()
}

func (d *daemon) watchDir(t testing.TB, request *pb.WatchDirRequest, headers ...string) *watching {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	call := connect.NewRequest(request)
	for i := 0; i < len(headers); i += 2 {
		call.Header().Set(headers[i], headers[i+1])
	}
	stream, err := d.filesystem().WatchDir(ctx, call)
	if err != nil {
		t.Fatal(err)
	}
	if !stream.Receive() {
		cancel()
		stream.Close()
		return &watching{err: stream.Err(), drop: func() {}}
	}
	if stream.Msg().GetStart() == nil {
		t.Fatalf("the first message is %v, want start", stream.Msg())
	}
	w := &watching{events: make(chan *pb.FilesystemEvent, 1<<20)}
	var done sync.WaitGroup
	done.Go(func() {
		defer close(w.events)
		for stream.Receive() {
			if event := stream.Msg().GetFilesystem(); event != nil {
				w.events <- event
			}
		}
		w.err = stream.Err()
	})
	w.drop = func() { cancel(); done.Wait(); stream.Close() }
	t.Cleanup(w.drop)
	return w
}

// until collects events up to the first that satisfies the condition, which is left out.
func (w *watching) until(t testing.TB, what string, last func(*pb.FilesystemEvent) bool) (events []*pb.FilesystemEvent) {
	t.Helper()
	timeout := time.After(20 * time.Second)
	for {
		select {
		case event, ok := <-w.events:
			if !ok {
				t.Fatalf("the stream ended (%v) before %s; events so far: %v", w.err, what, shortEvents(events))
			}
			if last(event) {
				return events
			}
			events = append(events, event)
		case <-timeout:
			t.Fatalf("no %s; events so far: %v", what, shortEvents(events))
		}
	}
}

// sync makes a file and collects what came before its event.
func (w *watching) sync(t testing.TB, dir string) []*pb.FilesystemEvent {
	t.Helper()
	writeFile(t, filepath.Join(dir, "sentinel"), "", 0o644)
	return w.until(t, "sentinel", func(e *pb.FilesystemEvent) bool { return e.GetName() == "sentinel" })
}

// shortEvents writes events as `CREATE f`; the same event twice in a row counts once, as the kernel may tell it.
func shortEvents(events []*pb.FilesystemEvent) []string {
	list := []string{}
	for _, event := range events {
		list = append(list, strings.TrimPrefix(event.GetType().String(), "EVENT_TYPE_")+" "+event.GetName())
	}
	return slices.Compact(list)
}

func shell(t testing.TB, dir, script string) {
	t.Helper()
	cmd := exec.Command("/bin/sh", "-ec", script)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
}

var watchSequences = []struct {
	name      string
	recursive bool
	before    string // run in the watched directory before the watch
	commands  string
	want      string // events, comma-separated
}{
	{"new file", false, "", "echo hi > f1", "CREATE f1, WRITE f1"},
	{"append", false, "echo > f1", "echo more >> f1", "WRITE f1"},
	{"overwrite", false, "echo > f1", "echo other > f1", "WRITE f1"},
	{"chmod", false, "echo > f1", "chmod 600 f1", "CHMOD f1"},
	{"chown", false, "echo > f1", "chown 1:1 f1", "CHMOD f1"},
	{"touch -d", false, "echo > f1", "touch -d 2001-01-01 f1", "CHMOD f1"},
	{"rename inside", false, "echo > f1", "mv f1 f2", "RENAME f1, CREATE f2"},
	{"remove", false, "echo > f2", "rm f2", "REMOVE f2"},
	{"mkdir", false, "", "mkdir d", "CREATE d"},
	{"touch new", false, "", "touch new", "CREATE new, CHMOD new"},
	{"move out", false, "echo > f", "mv f ../out", "RENAME f"},
	{"move in", false, "echo > ../in", "mv ../in f", "CREATE f"},
	{"hard link", false, "echo > ../in", "ln ../in l", "CREATE l"},
	{"symbolic link", false, "", "ln -s f l", "CREATE l"},
	{"replace by rename", false, "echo > a", "cp a ex; mv ex a", "CREATE ex, WRITE ex, RENAME ex, CREATE a"},
	{"read", false, "echo > a", "cat a; ls > /dev/null", ""},
	{"below, not recursive", false, "mkdir d", "echo > d/f", ""},
	{"chmod of the directory itself", false, "", "chmod 700 .", "CHMOD ."},
	{"chmod of a sub-directory", true, "mkdir d", "chmod 700 d", "CHMOD d"},
	{"file in a sub-directory", true, "mkdir d", "echo x > d/in", "CREATE d/in, WRITE d/in"},
	{"deep", true, "mkdir -p d/e/g", "rm -r d", "REMOVE d/e/g, REMOVE d/e, REMOVE d"},
	{"rename a directory, then write below", true, "mkdir d", "mv d dd; echo x > dd/after",
		"RENAME d, CREATE dd, CREATE dd/after, WRITE dd/after"},
	{"rename twice, and a level down", true, "mkdir -p d/e", "mv d dd; mv dd/e dd/ee; mkdir o; mv dd o/d; echo x > o/d/ee/f",
		"RENAME d, CREATE dd, RENAME dd/e, CREATE dd/ee, CREATE o, RENAME dd, CREATE o/d, CREATE o/d/ee/f, WRITE o/d/ee/f"},
	{"a directory that is moved out is watched no more", true, "mkdir -p d/e", "mv d ../gone; echo x > ../gone/f; echo x > ../gone/e/f",
		"RENAME d"},
	{"a directory that is moved in is watched", true, "mkdir -p ../in/e", "mv ../in d; sleep 0.1; echo x > d/e/f",
		"CREATE d, CREATE d/e, CREATE d/e/f, WRITE d/e/f"},
	{"links are not entered", true, "mkdir ../other", "ln -s ../other l; echo x > l/f", "CREATE l"},
	{"rm -rf", true, "mkdir -p d/e; echo > d/e/f", "rm -rf d", "REMOVE d/e/f, REMOVE d/e, REMOVE d"},
	{"names with spaces and newlines", false, "", "touch 'a b' 'c\nd'", "CREATE a b, CHMOD a b, CREATE c\nd, CHMOD c\nd"},
}

func TestWatchSequences(t *testing.T) {
	d := startDaemon(t)
	for _, c := range watchSequences {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(publicDir(t), "watched")
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			shell(t, dir, c.before)
			w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: c.recursive})
			polling, err := d.filesystem().CreateWatcher(t.Context(),
				connect.NewRequest(&pb.CreateWatcherRequest{Path: dir, Recursive: c.recursive}))
			if err != nil {
				t.Fatal(err)
			}
			shell(t, dir, c.commands)
			if got := strings.Join(shortEvents(w.sync(t, dir)), ", "); got != c.want {
				t.Errorf("stream:\ngot  %s\nwant %s", got, c.want)
			}
			var polled []*pb.FilesystemEvent
			waitFor(t, 5*time.Second, "the sentinel by polling", func() bool {
				polled = append(polled, d.poll(t, polling.Msg.GetWatcherId())...)
				return slices.ContainsFunc(polled, func(e *pb.FilesystemEvent) bool { return e.GetName() == "sentinel" })
			})
			end := slices.IndexFunc(polled, func(e *pb.FilesystemEvent) bool { return e.GetName() == "sentinel" })
			if got := strings.Join(shortEvents(polled[:end]), ", "); got != c.want {
				t.Errorf("polling:\ngot  %s\nwant %s", got, c.want)
			}
		})
	}
}

func (d *daemon) poll(t testing.TB, id string) []*pb.FilesystemEvent {
	t.Helper()
	response, err := d.filesystem().GetWatcherEvents(t.Context(), connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: id}))
	if err != nil {
		t.Fatal(err)
	}
	return response.Msg.GetEvents()
}

// mkdir -p races with the arming of watches: whatever the interleaving, each entry is told once.
func TestWatchNestedAtOnce(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: true})
	want := map[string]int{}
	for i := range 300 {
		path := fmt.Sprintf("a%d/b/c/d", i)
		if err := os.MkdirAll(filepath.Join(dir, path), 0o755); err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(dir, path, "f"), "x", 0o644)
		for p := path + "/f"; p != "."; p = filepath.Dir(p) {
			want[p] = 1
		}
	}
	got := map[string]int{}
	w.until(t, "last entries", func(e *pb.FilesystemEvent) bool {
		if e.GetType() == pb.EventType_EVENT_TYPE_CREATE {
			got[e.GetName()]++
		}
		return len(got) == len(want)
	})
	for _, e := range w.sync(t, dir) {
		if e.GetType() == pb.EventType_EVENT_TYPE_CREATE {
			got[e.GetName()]++
		}
	}
	for name := range want {
		if got[name] != 1 {
			t.Errorf("CREATE %s: %d times, want 1", name, got[name])
		}
	}
}

// A directory that is renamed while things are made below it loses nothing that comes after.
func TestWatchRenameRace(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: true})
	for i := range 200 {
		from, to := filepath.Join(dir, fmt.Sprintf("from%d", i)), filepath.Join(dir, fmt.Sprintf("to%d", i))
		for _, err := range []error{os.MkdirAll(from+"/x/y", 0o755), os.Rename(from, to), os.Mkdir(to+"/x/z", 0o755),
			os.Rename(to+"/x", to+"/w")} {
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	w.sync(t, dir)
	for i := range 200 {
		for _, leaf := range []string{"y", "z"} {
			name := fmt.Sprintf("to%d/w/%s/f", i, leaf)
			writeFile(t, filepath.Join(dir, name), "x", 0o644)
			w.until(t, "CREATE "+name, func(e *pb.FilesystemEvent) bool {
				return e.GetType() == pb.EventType_EVENT_TYPE_CREATE && e.GetName() == name
			})
		}
	}
}

func TestWatchBurst(t *testing.T) {
	d := startDaemon(t)
	sizes := []struct{ files, dirs int }{{5000, 200}, {20000, 2000}}
	for _, size := range sizes {
		dir := publicDir(t)
		w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: true})
		want := map[string]bool{}
		for i := range size.files {
			name := fmt.Sprintf("file%d", i)
			want[name] = true
			if f, err := os.Create(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			} else {
				f.Close()
			}
		}
		for i := range size.dirs {
			name := fmt.Sprintf("dir%d", i)
			want[name], want[name+"/in"] = true, true
			if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
				t.Fatal(err)
			}
			writeFile(t, filepath.Join(dir, name, "in"), "", 0o644)
		}
		got, doubled := map[string]bool{}, 0
		note := func(e *pb.FilesystemEvent) {
			if e.GetType() == pb.EventType_EVENT_TYPE_CREATE {
				if got[e.GetName()] {
					doubled++
				}
				got[e.GetName()] = true
			}
		}
		w.until(t, "all entries", func(e *pb.FilesystemEvent) bool { note(e); return len(got) == len(want) })
		for _, e := range w.sync(t, dir) {
			note(e)
		}
		if doubled > 0 {
			t.Errorf("%v: %d events doubled", size, doubled)
		}
	}
}

func TestWatchItselfGone(t *testing.T) {
	d := startDaemon(t)
	for _, recursive := range []bool{false, true} {
		for command, want := range map[string]string{"rmdir watched": "REMOVE .", "mv watched other": "RENAME ."} {
			base := publicDir(t)
			dir := filepath.Join(base, "watched")
			shell(t, base, "mkdir watched")
			w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: recursive})
			shell(t, base, command)
			w.until(t, want, func(e *pb.FilesystemEvent) bool { return shortEvents([]*pb.FilesystemEvent{e})[0] == want })
			shell(t, base, "mkdir -p watched other; touch watched/a other/b; chmod 700 watched other")
			select {
			case event, open := <-w.events:
				t.Errorf("%s: after %s came %v (stream open: %v, %v)", command, want, event, open, w.err)
			case <-time.After(200 * time.Millisecond):
			}
		}
	}
}

func TestWatchEntries(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	writeFile(t, filepath.Join(dir, "old"), "x", 0o644)
	w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, IncludeEntry: true})
	shell(t, dir, "echo 12345 > f; chmod 600 f; mv old new; rm new")
	for _, e := range w.sync(t, dir) {
		switch short := shortEvents([]*pb.FilesystemEvent{e})[0]; short {
		case "CREATE f", "WRITE f", "CHMOD f":
			if e.Entry.GetPath() != filepath.Join(dir, "f") || e.Entry.GetType() != pb.FileType_FILE_TYPE_FILE {
				t.Errorf("%s: entry %v", short, e.Entry)
			}
		case "RENAME old", "REMOVE new":
			if e.Entry != nil {
				t.Errorf("%s: entry %v, want none", short, e.Entry)
			}
		}
	}
}

func TestWatchErrors(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	file := writeFile(t, filepath.Join(dir, "file"), "", 0o644)
	for _, c := range []struct {
		path    string
		code    connect.Code
		message string
	}{
		{dir + "/none", connect.CodeNotFound, fmt.Sprintf("path %s/none not found: stat %s/none: no such file or directory", dir, dir)},
		{file, connect.CodeInvalidArgument, "path " + file + " not a directory"},
		{"~other", connect.CodeInvalidArgument, "failed to expand path '~other' for user 'root': cannot expand user-specific home dir"},
	} {
		wantError(t, d.watchDir(t, &pb.WatchDirRequest{Path: c.path}).err, c.code, c.message)
		_, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: c.path}))
		wantError(t, err, c.code, c.message)
	}
	_, err := d.filesystem().GetWatcherEvents(t.Context(), connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: "x"}))
	wantError(t, err, connect.CodeNotFound, "watcher with id x not found")
	_, err = d.filesystem().RemoveWatcher(t.Context(), connect.NewRequest(&pb.RemoveWatcherRequest{WatcherId: "x"}))
	wantError(t, err, connect.CodeNotFound, "watcher with id x not found")
}

// inotifies are the open descriptors of watchers. One more tells of leaves that have become empty.
func (d *daemon) inotifies() []string {
	open := slices.DeleteFunc(d.fds(), func(fd string) bool { return !strings.Contains(fd, "inotify") })
	if d.cgroup != "" && len(open) > 0 {
		open = open[1:]
	}
	return open
}

func TestWatchersAreReleased(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	inotifies := func() int { return len(d.inotifies()) }
	var ids []string
	for range 20 {
		response, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: dir, Recursive: true}))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, response.Msg.GetWatcherId())
		d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: true}).drop()
	}
	waitFor(t, 5*time.Second, "streams closed", func() bool { return inotifies() == 20 })
	for _, id := range ids {
		if _, err := d.filesystem().RemoveWatcher(t.Context(), connect.NewRequest(&pb.RemoveWatcherRequest{WatcherId: id})); err != nil {
			t.Fatal(err)
		}
	}
	if n := inotifies(); n != 0 {
		t.Errorf("%d inotify descriptors are open, want none", n)
	}
}

// A polling watcher that nobody asks keeps a bounded number of events and tells that it lost some.
func TestPollingOverflow(t *testing.T) {
	d := startDaemon(t, "--memory-limit", "64MiB")
	dir := publicDir(t)
	response, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: dir}))
	if err != nil {
		t.Fatal(err)
	}
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	writeFile(t, a, "", 0o644)
	for range 60_000 { // two events each
		if os.Rename(a, b) != nil || os.Rename(b, a) != nil {
			t.Fatal("rename")
		}
	}
	for range 2 {
		_, err = d.filesystem().GetWatcherEvents(t.Context(),
			connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: response.Msg.GetWatcherId()}))
		if connect.CodeOf(err) != connect.CodeInternal || !strings.Contains(err.Error(), "watcher error: ") {
			t.Errorf("got %v, want internal: watcher error", err)
		}
	}
	if n := d.sample(t, "envd_watch_overflows_total"); n != 1 {
		t.Errorf("%v watchers are counted that lost events, want 1", n)
	}
}

func TestWatchProc(t *testing.T) {
	d := startDaemon(t)
	for _, recursive := range []bool{false, true} {
		d.watchDir(t, &pb.WatchDirRequest{Path: "/proc", Recursive: recursive}).drop()
	}
	d.healthy(t)
}

// The limits of the kernel are clear errors.
func TestWatchLimits(t *testing.T) {
	needRoot(t)
	d := startDaemonWith(t, daemonConfig{userNS: true, steps: []string{"limit", "max_inotify_instances=8"}, args: []string{"--no-cgroups"}, noCgroup: true})
	dir := publicDir(t)
	for range 9 {
		_, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: dir}))
		if err != nil {
			if connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "fs.inotify.max_user_instances") {
				t.Errorf("got %v", err)
			}
			d.healthy(t)
			return
		}
	}
	t.Error("nine watchers where eight are allowed")
}

// The limit of watches, too: when one is created, and when a directory is made later.
func TestWatchCountLimit(t *testing.T) {
	needRoot(t)
	d := startDaemonWith(t, daemonConfig{userNS: true, steps: []string{"limit", "max_inotify_watches=8"}, args: []string{"--no-cgroups"}, noCgroup: true})
	const reached = "no more watches: the limit fs.inotify.max_user_watches is reached"
	dir := publicDir(t)
	shell(t, dir, "mkdir -p few many; cd many; mkdir 1 2 3 4 5 6 7 8 9; chmod 777 . ../few")
	wantError(t, d.watchDir(t, &pb.WatchDirRequest{Path: dir + "/many", Recursive: true}).err, connect.CodeResourceExhausted, "error creating watcher: "+reached)
	_, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: dir + "/many", Recursive: true}))
	wantError(t, err, connect.CodeResourceExhausted, "error creating watcher: "+reached)
	w := d.watchDir(t, &pb.WatchDirRequest{Path: dir + "/few", Recursive: true})
	shell(t, dir+"/few", "mkdir 1 2 3 4 5 6 7 8 9")
	for range w.events {
	}
	wantError(t, w.err, connect.CodeResourceExhausted, "watcher error: "+reached)
	w.drop()
	w = d.watchDir(t, &pb.WatchDirRequest{Path: dir + "/few"}) // what it held is free again
	shell(t, dir+"/few", "mkdir x")
	w.until(t, "CREATE x", func(e *pb.FilesystemEvent) bool { return e.GetName() == "x" })
}

// A client that does not read loses events in the kernel's queue, and is told.
func TestWatchQueueOverflow(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := d.filesystem().WatchDir(ctx, connect.NewRequest(&pb.WatchDirRequest{Path: dir}))
	if err != nil || !stream.Receive() {
		t.Fatal(err, stream.Err())
	}
	a, b := filepath.Join(dir, strings.Repeat("a", 200)), filepath.Join(dir, strings.Repeat("b", 200))
	writeFile(t, a, "", 0o644)
	for range 120_000 {
		if os.Rename(a, b) != nil || os.Rename(b, a) != nil {
			t.Fatal("rename")
		}
	}
	events := 0
	for stream.Receive() {
		events++
	}
	if err := stream.Err(); connect.CodeOf(err) != connect.CodeInternal || !strings.Contains(err.Error(), "watcher error: events were lost") {
		t.Errorf("after %d events: %v, want internal: watcher error", events, err)
	}
}

func TestWatchKeepAlive(t *testing.T) {
	d := startDaemon(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	call := connect.NewRequest(&pb.WatchDirRequest{Path: publicDir(t)})
	call.Header().Set("Keepalive-Ping-Interval", "1")
	stream, err := d.filesystem().WatchDir(ctx, call)
	if err != nil {
		t.Fatal(err)
	}
	for _, what := range []string{"start", "keepalive", "keepalive"} {
		if !stream.Receive() || (stream.Msg().GetStart() != nil) != (what == "start") || (stream.Msg().GetKeepalive() != nil) != (what == "keepalive") {
			t.Fatalf("%v %v, want %s", stream.Msg(), stream.Err(), what)
		}
	}
}

// Polling watchers that nobody asks end, those that are asked stay.
func TestPollingIdle(t *testing.T) {
	d := startDaemon(t, "--watcher-idle", "3s")
	var ids [2]string
	for i := range ids {
		response, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: publicDir(t)}))
		if err != nil {
			t.Fatal(err)
		}
		ids[i] = response.Msg.GetWatcherId()
	}
	waitFor(t, 15*time.Second, "the end of the idle watcher", func() bool {
		d.poll(t, ids[0])
		return len(d.inotifies()) == 1
	})
	d.poll(t, ids[0])
	_, err := d.filesystem().GetWatcherEvents(t.Context(), connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: ids[1]}))
	wantError(t, err, connect.CodeNotFound, "watcher with id "+ids[1]+" not found")
}

func TestWatchNetworkMount(t *testing.T) {
	needRoot(t)
	mount := filepath.Join(publicDir(t), "mount")
	if err := os.Mkdir(mount, 0o755); err != nil {
		t.Fatal(err)
	}
	abort := hungFUSE(t, mount, true, true)
	d := startDaemonWithHostile(t)
	t.Cleanup(abort) // before the daemon is told to leave
	refused := "cannot watch path on network filesystem: " + mount
	wantError(t, d.watchDir(t, &pb.WatchDirRequest{Path: mount}).err, connect.CodeInvalidArgument, refused)
	_, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: mount}))
	wantError(t, err, connect.CodeInvalidArgument, refused)
	if w := d.watchDir(t, &pb.WatchDirRequest{Path: mount, AllowNetworkMounts: true}); w.err != nil {
		t.Errorf("allowed: %v", w.err)
	}
}

// A network filesystem somewhere below is passed by, unless it is asked for. This one hangs when it is listed.
func TestWatchNetworkMountBelow(t *testing.T) {
	needRoot(t)
	base := publicDir(t)
	shell(t, base, "mkdir -p above/mount")
	abort := hungFUSE(t, base+"/above/mount", true, true)
	d := startDaemonWithHostile(t)
	t.Cleanup(abort)
	w := d.watchDir(t, &pb.WatchDirRequest{Path: base, Recursive: true})
	shell(t, base, "echo > above/f")
	w.until(t, "WRITE above/f", func(e *pb.FilesystemEvent) bool { return e.GetName() == "above/f" })
}

// A directory on a filesystem that never answers comes into a watched tree: what closes this watch waits, nobody else does.
func TestWatchHangs(t *testing.T) {
	needRoot(t)
	base := publicDir(t)
	shell(t, base, "mkdir watched other stage mount; chmod 755 .")
	// The mount is on a directory that can be renamed outside of the daemon's mount namespace, where it is none.
	renamed := make(chan error)
	rename := make(chan bool)
	go func() {
		runtime.LockOSThread()
		<-rename
		renamed <- os.Rename(base+"/stage", base+"/watched/stage")
	}()
	abort := hungFUSE(t, base+"/stage", false, false)
	d := startDaemonWithHostile(t)
	t.Cleanup(abort)
	var ids [2]string
	for i := range ids {
		response, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: base + "/watched", Recursive: true}))
		if err != nil {
			t.Fatal(err)
		}
		ids[i] = response.Msg.GetWatcherId()
	}
	before := d.threads()
	close(rename)
	if err := <-renamed; err != nil {
		t.Skipf("needs another mount namespace: %v", err)
	}
	waitFor(t, 10*time.Second, "two threads that hang", func() bool { return d.hanging() >= 2 })
	t.Logf("%d threads before, %d now", before, d.threads())
	removed := make(chan error, len(ids))
	for _, id := range ids {
		go func() {
			_, err := d.filesystem().RemoveWatcher(t.Context(), connect.NewRequest(&pb.RemoveWatcherRequest{WatcherId: id}))
			removed <- err
		}()
	}
	for range 20 {
		d.healthy(t)
		w := d.watchDir(t, &pb.WatchDirRequest{Path: base + "/other"})
		response, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: base + "/other"}))
		if err != nil {
			t.Fatal(err)
		}
		w.sync(t, base+"/other")
		if _, err := d.filesystem().RemoveWatcher(t.Context(), connect.NewRequest(&pb.RemoveWatcherRequest{WatcherId: response.Msg.GetWatcherId()})); err != nil {
			t.Error(err)
		}
		w.drop()
		os.Remove(base + "/other/sentinel")
	}
	select {
	case err := <-removed:
		t.Errorf("removed while its filesystem hangs: %v", err)
	default:
	}
	abort()
	for range ids {
		if err := <-removed; err != nil {
			t.Error(err)
		}
	}
	if left := d.inotifies(); len(left) > 0 {
		t.Errorf("left open: %v", left)
	}
}

var hangingStack = regexp.MustCompile(`fuse_|lookup|path_walk|path_openat`)

// hanging counts the daemon's threads that wait for a FUSE filesystem, or for others that do.
func (d *daemon) hanging() (n int) {
	stacks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stack", d.pid))
	for _, stack := range stacks {
		if text, _ := os.ReadFile(stack); hangingStack.Match(text) {
			n++
		}
	}
	return n
}

// After a storm of new, renamed, exchanged and removed directories, also in and out of the tree, every directory in it is
// watched, under its name, by each watcher, and none outside.
func TestWatchStorm(t *testing.T) {
	d := startDaemon(t)
	for _, exchange := range []bool{false, true} {
		dir, outside := publicDir(t), publicDir(t)
		var watchers [3]*watching
		for i := range watchers {
			watchers[i] = d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: true})
		}
		pick := func() string {
			path := dir
			if rand.IntN(8) == 0 {
				path = outside
			}
			for range 1 + rand.IntN(4) {
				path += fmt.Sprint("/d", rand.IntN(4))
			}
			return path
		}
		var storm sync.WaitGroup
		for range 4 {
			storm.Go(func() {
				for range 1500 {
					switch rand.IntN(7) {
					case 0, 1:
						os.MkdirAll(pick(), 0o755)
					case 2, 3:
						unix.Rename(pick(), pick())
					case 4:
						os.Remove(pick())
					case 5:
						if rand.IntN(4) == 0 {
							os.RemoveAll(pick())
						}
					case 6:
						if exchange {
							unix.Renameat2(unix.AT_FDCWD, pick(), unix.AT_FDCWD, pick(), unix.RENAME_EXCHANGE)
						}
					}
				}
			})
		}
		storm.Wait()
		for _, w := range watchers {
			w.sync(t, dir)
			os.Remove(dir + "/sentinel")
		}
		want := map[string]bool{}
		filepath.WalkDir(dir, func(path string, entry os.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				rel, _ := filepath.Rel(dir, path)
				want[filepath.Join(rel, "probe")] = true
				writeFile(t, path+"/probe", "", 0o644)
			}
			return nil
		})
		filepath.WalkDir(outside, func(path string, entry os.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				writeFile(t, path+"/gone", "", 0o644)
			}
			return nil
		})
		writeFile(t, dir+"/end", "", 0o644)
		for i, w := range watchers {
			missing := maps.Clone(want)
			for _, e := range w.until(t, "the end", func(e *pb.FilesystemEvent) bool { return e.GetName() == "end" }) {
				delete(missing, e.GetName())
				if filepath.Base(e.GetName()) == "gone" {
					t.Errorf("exchange %v, watcher %d: %s, which is outside", exchange, i, e.GetName())
				}
			}
			if len(missing) > 0 {
				t.Errorf("exchange %v, watcher %d: of %d directories %d are not watched under their name: %.300q", exchange, i, len(want), len(missing),
					slices.Collect(maps.Keys(missing)))
			}
			w.drop()
		}
	}
}

func TestWatchExchange(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	shell(t, dir, "mkdir a b; touch a/was-a b/was-b")
	w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: true})
	if err := unix.Renameat2(unix.AT_FDCWD, dir+"/a", unix.AT_FDCWD, dir+"/b", unix.RENAME_EXCHANGE); err != nil {
		t.Skip("needs RENAME_EXCHANGE: ", err)
	}
	shell(t, dir, "echo > a/new-in-a; mkdir b/new-in-b; rmdir b/new-in-b; mv b c; mkdir c/d")
	const want = "RENAME a, CREATE b, RENAME b, CREATE a, CREATE a/new-in-a, WRITE a/new-in-a, CREATE b/new-in-b, REMOVE b/new-in-b, RENAME b, CREATE c, CREATE c/d"
	if got := strings.Join(shortEvents(w.sync(t, dir)), ", "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// A directory that replaces an empty one is watched under the name, and when it goes on, too.
func TestWatchReplace(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	shell(t, dir, "mkdir -p a/e b")
	w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: true})
	shell(t, dir, "mv -T a b; mv b c; mkdir c/d c/e/f; mv c ../gone-$$; mkdir ../gone-$$/x; rm -r ../gone-$$")
	const want = "RENAME a, CREATE b, RENAME b, CREATE c, CREATE c/d, CREATE c/e/f, RENAME c"
	if got := strings.Join(shortEvents(w.sync(t, dir)), ", "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// A directory that is mounted again below itself is one watch, and no cycle.
func TestWatchBindLoop(t *testing.T) {
	needRoot(t)
	d := startDaemon(t)
	dir := publicDir(t)
	shell(t, dir, "mkdir -p a/b c")
	if err := unix.Mount(dir, dir+"/a/b", "", unix.MS_BIND, ""); err != nil {
		t.Skip("needs mount: ", err)
	}
	defer unix.Unmount(dir+"/a/b", unix.MNT_DETACH)
	w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: true})
	shell(t, dir, "echo > a/f; mkdir a/b/c/x; mv a/b/c a/b/d; mkdir d/y")
	const want = "CREATE a/f, WRITE a/f, CREATE c/x, RENAME c, CREATE d, CREATE d/y"
	if got := strings.Join(shortEvents(w.sync(t, dir)), ", "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// The path of a new directory leads to the one above it by the time when it is opened.
func TestWatchPathLeadsElsewhere(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: true})
	for i := range 60 {
		a, x := fmt.Sprint("a", i), fmt.Sprint("x", i)
		os.Mkdir(filepath.Join(dir, a), 0o755)
		w.until(t, "CREATE "+a, func(e *pb.FilesystemEvent) bool { return e.GetName() == a })
		unix.Mkdir(filepath.Join(dir, a, x), 0o755)
		unix.Rename(filepath.Join(dir, a), filepath.Join(dir, x))
		unix.Symlink(".", filepath.Join(dir, a)) // aN/xN is xN itself now
		w.until(t, "CREATE "+x, func(e *pb.FilesystemEvent) bool { return e.GetName() == x })
		writeFile(t, filepath.Join(dir, x, "f"), "", 0o644)
		w.until(t, "CREATE of f", func(e *pb.FilesystemEvent) bool { return e.GetName() == x+"/f" })
	}
}

// Trees that are moved into each other get no deeper than a watcher goes.
func TestWatchDepth(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	shell(t, dir, "mkdir -p deep/"+strings.Repeat("d/", 600)+" tall/"+strings.Repeat("d/", 600))
	w := d.watchDir(t, &pb.WatchDirRequest{Path: dir, Recursive: true})
	if err := os.Rename(dir+"/tall", dir+"/deep/"+strings.Repeat("d/", 600)+"tall"); err != nil {
		t.Fatal(err)
	}
	for range w.events {
	}
	if connect.CodeOf(w.err) != connect.CodeInternal || !strings.Contains(w.err.Error(), "more than 1000 levels") {
		t.Errorf("got %v", w.err)
	}
	d.healthy(t)
}

// Events that nobody fetches are bounded in bytes; the watcher that keeps most of them ends, no other.
func TestPollingBytes(t *testing.T) {
	d := startDaemon(t, "--memory-limit", "64MiB")
	quiet, dir := publicDir(t), publicDir(t)
	var ids [2]string
	for i, request := range []*pb.CreateWatcherRequest{{Path: quiet}, {Path: dir, Recursive: true, IncludeEntry: true}} {
		response, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(request))
		if err != nil {
			t.Fatal(err)
		}
		ids[i] = response.Msg.GetWatcherId()
	}
	writeFile(t, quiet+"/f", "", 0o644)
	deep := filepath.Join(dir, strings.Repeat(strings.Repeat("d", 250)+"/", 14))
	if err := os.MkdirAll(deep, 0o755); err != nil {
		t.Fatal(err)
	}
	before := d.rss()
	waitFor(t, 30*time.Second, "the end of the watcher", func() bool {
		for i := range 500 {
			file := filepath.Join(deep, fmt.Sprint(strings.Repeat("f", 240), i))
			os.WriteFile(file, nil, 0o644)
			os.Remove(file)
		}
		return d.sample(t, "envd_watch_overflows_total") == 1
	})
	if grown := d.peakRSS() - before; grown > 96<<20 {
		t.Errorf("the events of one watcher took %d MiB", grown>>20)
	}
	_, err := d.filesystem().GetWatcherEvents(t.Context(), connect.NewRequest(&pb.GetWatcherEventsRequest{WatcherId: ids[1]}))
	wantError(t, err, connect.CodeInternal, "watcher error: more events were not fetched than --memory-limit has room for")
	if events := d.poll(t, ids[0]); len(events) == 0 {
		t.Error("the other watcher has no event")
	}
}
