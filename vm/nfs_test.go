// Volumes: a guest mounts NFS 3 from a server on its host's side.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-git/go-billy/v5"
	"github.com/go-git/go-billy/v5/osfs"
	nfs "github.com/willscott/go-nfs"
	"github.com/willscott/go-nfs/helpers"
)

// nfsServer serves the directories of one, each an export. It can hold all answers back.
type nfsServer struct {
	nfs.Handler
	dir  string
	gate sync.RWMutex // held by the test while nothing is answered
}

func (s *nfsServer) Mount(_ context.Context, _ net.Conn, request nfs.MountRequest) (nfs.MountStatus, billy.Filesystem, []nfs.AuthFlavor) {
	s.gate.RLock()
	defer s.gate.RUnlock()
	dir := filepath.Join(s.dir, filepath.Clean("/"+string(request.Dirpath)))
	status := nfs.MountStatusOk
	if _, err := os.Stat(dir); err != nil {
		status = nfs.MountStatusErrNoEnt
	}
	return status, changeable{osfs.New(dir)}, []nfs.AuthFlavor{nfs.AuthFlavorNull}
}

func (s *nfsServer) FromHandle(handle []byte) (billy.Filesystem, []string, error) {
	s.gate.RLock()
	defer s.gate.RUnlock()
	return s.Handler.FromHandle(handle)
}

func (s *nfsServer) Change(fs billy.Filesystem) billy.Change { return fs.(changeable) }

// changeable gives a directory what a client may change of a file.
type changeable struct{ billy.Filesystem }

func (c changeable) at(name string) string                     { return c.Join(c.Root(), name) }
func (c changeable) Chmod(name string, m os.FileMode) error    { return os.Chmod(c.at(name), m) }
func (c changeable) Lchown(name string, uid, gid int) error    { return os.Lchown(c.at(name), uid, gid) }
func (c changeable) Chown(name string, uid, gid int) error     { return os.Chown(c.at(name), uid, gid) }
func (c changeable) Chtimes(name string, a, m time.Time) error { return os.Chtimes(c.at(name), a, m) }

// serveNFS starts a server of these exports, each with a file that names it.
func serveNFS(t *testing.T, g *guest, address string, exports ...string) *nfsServer {
	t.Helper()
	nfs.Log.SetLevel(nfs.PanicLevel)
	s := &nfsServer{dir: t.TempDir()}
	s.Handler = helpers.NewCachingHandler(helpers.NewNullAuthHandler(nil), 4096)
	for _, export := range exports {
		dir := filepath.Join(s.dir, export)
		if err := errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, "which"), []byte(export), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	go nfs.Serve(g.listen(t, address+":2049"), s)
	return s
}

// listen is net.Listen on the host's side.
func (g *guest) listen(t *testing.T, address string) (l net.Listener) {
	t.Helper()
	err := g.network.inside(func() (err error) {
		l, err = net.Listen("tcp4", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// mount asks for volumes, pairs of a target and a path, as a host does. The answer must not wait for any server.
func (g *guest) mount(t *testing.T, volumes ...string) {
	t.Helper()
	type volume struct {
		Target string `json:"nfs_target"`
		Path   string `json:"path"`
	}
	var list []volume
	for i := 0; i < len(volumes); i += 2 {
		list = append(list, volume{volumes[i], volumes[i+1]})
	}
	body, _ := json.Marshal(map[string]any{"volumeMounts": list})
	began := time.Now()
	g.init(t, string(body))
	if took := time.Since(began); took > 5*time.Second { // a server is waited for longer
		t.Errorf("/init took %v", took)
	}
}

// mounts counts what is mounted at a path.
func (g *guest) mounts(t *testing.T, path string) int {
	t.Helper()
	return strings.Count(g.mustRun(t, "/workload", "cat", "/proc/mounts"), " "+path+" nfs ")
}

func (g *guest) waitContent(t *testing.T, path, want string) {
	t.Helper()
	waitFor(t, path, func() error {
		content, err := g.download(path)
		if err == nil && string(content) != want {
			err = fmt.Errorf("%s holds %q, want %q", path, content, want)
		}
		return err
	})
}

// TestNFS: volumes are mounted by /init, once, and again when it names another; files there are as they are elsewhere. A server
// that does not answer, from the first or from some moment on, holds up those who use its files alone, and not the end.
func TestNFS(t *testing.T) {
	g := boot(t, options{root: "rw", nfs: true})
	s := serveNFS(t, g, hostAddress, "one", "two")
	serveNFS(t, g, otherAddress, "other")
	g.listen(t, mmdsAddress+":2049") // nobody accepts
	const one, two, other, dead = hostAddress + ":/one", hostAddress + ":/two", otherAddress + ":/other", mmdsAddress + ":/dead"
	g.mount(t, one, "/mnt/one", dead, "/mnt/dead")
	g.waitContent(t, "/mnt/one/which", "one")

	// Through the agent, and by a process.
	large := bytes.Repeat([]byte("0123456789abcdef"), 3<<16)
	for name, content := range map[string][]byte{"small": []byte("small"), "large": large, "small again": []byte("again"), "sub/dir/file": []byte("deep")} {
		name = strings.TrimSuffix(name, " again")
		if err := g.upload("/mnt/one/"+name, content); err != nil {
			t.Error(err)
		}
		if got, err := os.ReadFile(filepath.Join(s.dir, "one", name)); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: the server has %d bytes of it, %v", name, len(got), err)
		}
		if got, err := g.download("/mnt/one/" + name); err != nil || !bytes.Equal(got, content) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	g.mustRun(t, "/workload", "dirty", "/mnt/one/dirty", "1")
	if got := g.mustRun(t, "/workload", "cat", "/mnt/one/dirty"); len(got) != 1<<20 {
		t.Errorf("what a process wrote has %d bytes", len(got))
	}
	if got := g.mustRun(t, "/workload", "ls", "/mnt/one"); got != "dirty\nlarge\nsmall\nsub\nwhich\n" {
		t.Errorf("the directory: %q", got)
	}

	// The same once more changes nothing; another target takes the place of the first.
	g.mount(t, one, "/mnt/one", two, "/mnt/two", one, "/mnt/one/", dead, "/mnt/dead")
	g.waitContent(t, "/mnt/two/which", "two")
	if n := g.mounts(t, "/mnt/one"); n != 1 {
		t.Errorf("mounted %d times at /mnt/one", n)
	}
	g.mount(t, two, "/mnt/one")
	g.waitContent(t, "/mnt/one/which", "two")
	if one, two := g.mounts(t, "/mnt/one"), g.mounts(t, "/mnt/two"); one != 1 || two != 1 {
		t.Errorf("mounted %d times at /mnt/one, %d at /mnt/two", one, two)
	}
	g.mount(t, hostAddress+":/none", "/mnt/none")
	if _, err := g.console.wait("a volume is not mounted"); err != nil {
		t.Error(err)
	}

	// From now on one of the servers answers nothing. Its volumes can be replaced all the same.
	s.gate.Lock()
	stop := watchHealth(t, g, 10*time.Second)
	answered := make(chan error, 1)
	go func() { answered <- g.upload("/mnt/one/late", []byte("late")) }()
	for range 3 {
		g.mount(t, two, "/mnt/one", other, "/mnt/two", one, "/mnt/three", dead, "/mnt/dead")
		g.mustRun(t, "/workload", "exit", "0")
	}
	g.waitContent(t, "/mnt/two/which", "other")
	select {
	case err := <-answered:
		t.Errorf("an upload ended although no server answers: %v", err)
	default:
	}
	stop()
	s.gate.Unlock()
	if err := <-answered; err != nil {
		t.Error(err)
	}
	g.waitContent(t, "/mnt/three/which", "one")

	// What is dirty there is lost with the server, and nothing else.
	writer, err := g.background("open", "/workload", "dirty", "/mnt/one/lost", "1", "when told")
	if err != nil {
		t.Fatal(err)
	}
	s.gate.Lock()
	defer s.gate.Unlock()
	g.mustRun(t, "/workload", "kill", fmt.Sprint(writer), "10")
	waitFor(t, "dirty pages", func() error {
		if info := g.mustRun(t, "/workload", "cat", "/proc/meminfo"); procFigure(t, info, "Dirty")+procFigure(t, info, "Writeback") < 1<<20 {
			return errors.New("none yet")
		}
		return nil
	})
	g.mustRun(t, "/workload", "dirty", "/dirty", "4")
	began := time.Now()
	g.run("/workload", "kill", "1", "15")
	reason, err := g.ended()
	took := time.Since(began)
	t.Logf("with a server that does not answer: %s after %v", reason, took.Round(time.Millisecond))
	if err != nil || reason != "guest-shutdown" || took > 35*time.Second { // 22.5 s are given to what hangs
		t.Errorf("with a server that does not answer it ended after %v by %s, %v", took, reason, err)
	}
	g.leftClean(t, "/dirty", 4<<20)
}
