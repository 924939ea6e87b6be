// Watching, as clients see it: sequences of commands and the events they must give, races, limits, bursts.

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

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

func TestWatchersAreReleased(t *testing.T) {
	d := startDaemon(t)
	dir := publicDir(t)
	inotifies := func() int {
		return len(slices.DeleteFunc(d.fds(), func(fd string) bool { return !strings.Contains(fd, "inotify") }))
	}
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
	d := startDaemon(t)
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
	d := startDaemonWith(t, daemonConfig{steps: []string{"nofile", "64"}})
	dir := publicDir(t)
	for range 200 {
		_, err := d.filesystem().CreateWatcher(t.Context(), connect.NewRequest(&pb.CreateWatcherRequest{Path: dir}))
		if err != nil {
			if connect.CodeOf(err) != connect.CodeResourceExhausted || !strings.Contains(err.Error(), "fs.inotify.max_user_instances") {
				t.Errorf("got %v", err)
			}
			d.healthy(t)
			return
		}
	}
	t.Skip("needs a limit: the daemon raises the number of open files")
}
