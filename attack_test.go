// Attacks of a user of the guest who would have more power than is his, by way of envd: each for 20 seconds, or for as long
// as -attack says. What must be none: files of root's touched, set-ID programs made, commands with another uid.
//
// The attackers are programs of the user's (testRoles); some need fs.protected_hardlinks to be 0, which is the kernel's default.

package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
)

var attackFlag = flag.Duration("attack", 0, "how `long` each attack goes on (default 20s, 5s with -short)")

// attackTime is how long an attack of this run goes on.
func attackTime(t testing.TB) time.Duration {
	switch {
	case *attackFlag > 0:
		return *attackFlag
	case testing.Short():
		return 5 * time.Second
	}
	return 20 * time.Second
}

func init() {
	testRoles["setid-attacker"], testRoles["mkdir-attacker"], testRoles["swap-attacker"] = setIDAttacker, mkdirAttacker, swapAttacker
	testRoles["passing-attacker"] = passingAttacker
}

// attackWith runs an attacker as the user until the work of the clients ends, and gives what it printed.
func attackWith(t *testing.T, role, home string, args []string, clients ...func(round int)) (rounds int64, printed string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), attackTime(t))
	defer cancel()
	attacker := exec.Command(helperBinary(t), append([]string{role, home}, args...)...)
	stdin, err := attacker.StdinPipe() // when it is closed the attacker ends
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	attacker.Stdout = &out
	if err := attacker.Start(); err != nil {
		t.Fatal(err)
	}
	var wait sync.WaitGroup
	var done atomic.Int64
	for _, client := range clients {
		wait.Go(func() {
			for round := 0; ctx.Err() == nil && !t.Failed(); round++ {
				client(round)
				done.Add(1)
			}
		})
	}
	wait.Wait()
	stdin.Close()
	if err := attacker.Wait(); err != nil {
		t.Errorf("%s: %v", role, err)
	}
	return done.Load(), out.String()
}

// untilEOF is closed when the test has no more use for an attacker.
func untilEOF() <-chan struct{} {
	ended := make(chan struct{})
	go func() {
		io.Copy(io.Discard, os.Stdin)
		close(ended)
	}()
	return ended
}

func isOver(ended <-chan struct{}) bool {
	select {
	case <-ended:
		return true
	default:
		return false
	}
}

// lendsPower says that a file runs as another one than the user who wrote its content. It looks twice: stat(2) reads mode and
// owner one after the other, without the lock that chown(2) changes both under.
func lendsPower(stat func(st *unix.Stat_t) error, user uint32) bool {
	var st unix.Stat_t
	for range 2 {
		if stat(&st) != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
			return false
		}
		asOwner := st.Mode&unix.S_ISUID != 0 && st.Uid != user
		if inGroup := st.Mode&(unix.S_ISGID|0o010) == unix.S_ISGID|0o010 && st.Gid != user; !asOwner && !inGroup {
			return false
		}
	}
	return true
}

// setIDAttacker keeps its files f and g, two names of one, set-ID and without room for attributes, and looks whether any that it
// has open becomes somebody else's and stays so.
func setIDAttacker(args []string) {
	becomeUser(args[0])
	ended, kept, made := untilEOF(), []int{}, 0
	for n := 0; !isOver(ended); n++ {
		fd, err := unix.Open("new", unix.O_RDWR|unix.O_CREAT|unix.O_EXCL, 0o666)
		if err != nil {
			os.Remove("new")
			continue
		}
		unix.Write(fd, []byte("#!/bin/sh\nid\n"))
		for size := 4096; size > 0; size /= 2 {
			unix.Fsetxattr(fd, fmt.Sprint("user.", size), make([]byte, size-1), 0)
		}
		unix.Fchmod(fd, 0o6777)
		os.Remove("newg")
		os.Link("new", "newg")
		os.Rename("new", "f")
		os.Rename("newg", "g")
		kept = append(kept, fd)
		for end := time.Now().Add(time.Duration(n%5) * time.Millisecond); time.Now().Before(end); {
			unix.Fchmod(fd, 0o6777)
		}
		for _, fd := range kept {
			if lendsPower(func(st *unix.Stat_t) error { return unix.Fstat(fd, st) }, uidUser) {
				made++
			}
		}
		if len(kept) > 32 {
			unix.Close(kept[0])
			kept = kept[1:]
		}
	}
	fmt.Print(made)
}

// Row 1: uploads of one file by two names, of which some fail in the middle.
func TestAttackSetID(t *testing.T) {
	d, home := startDaemonWithUsers(t, daemonConfig{})
	seen := atomic.Int64{}
	upload := func(name, user, content string, headers ...string) {
		request := append([]string{"Content-Type", "application/octet-stream"}, headers...)
		d.try("POST", filesPath("path", home+"/"+name, "username", user), request[1], content, headers...)
		entries, _ := os.ReadDir(home)
		for _, entry := range entries {
			path := filepath.Join(home, entry.Name())
			if lendsPower(func(st *unix.Stat_t) error { return unix.Lstat(path, st) }, uidUser) {
				seen.Add(1)
				st := lstat(t, path)
				t.Errorf("%s: mode %o, owner %d:%d", path, st.Mode, st.Uid, st.Gid)
			}
		}
	}
	metadata := []string{"X-Metadata-A", strings.Repeat("m", 3000)}
	large := strings.Repeat("large", 300_000)
	rounds, made := attackWith(t, "setid-attacker", home, nil,
		func(int) { upload("f", "root", "one", metadata...) },
		func(int) { upload("g", "root", "another") },
		func(round int) {
			upload([]string{"f", "g"}[round%2], []string{"root", "noshell"}[round/2%2], "x", metadata[:round%2*2]...)
		},
		func(round int) { upload([]string{"f", "new"}[round%2], "root", large) },
	)
	t.Logf("%d uploads; set-ID files seen by them %d, by the attacker %s", rounds, seen.Load(), made)
	if made != "0" {
		t.Errorf("%s files of others are set-ID and have the attacker's content", made)
	}
}

// What an upload does to a file that runs as its owner, whatever becomes of the upload.
func TestUploadTakesSetIDBits(t *testing.T) {
	t.Parallel()
	s := supervise(t, []uintptr{unix.SYS_WRITE})
	d, home := startDaemonWithUsers(t, daemonConfig{steps: s.steps()})
	file := home + "/f"
	for what, c := range map[string]struct {
		content string
		fails   bool
		headers []string
	}{
		"small":                 {content: "new"},
		"large":                 {content: strings.Repeat("new", 1<<19)},
		"a write that fails":    {content: "new", fails: true, headers: []string{"X-Metadata-K", "new"}},
		"attributes, and fails": {content: "new", headers: []string{"X-Metadata-K", strings.Repeat("m", 3000)}},
	} {
		for _, mode := range []uint32{0o6755, 0o2644, 0o4600} {
			os.Remove(file)
			writeFile(t, file, "the old content", 0o600)
			unix.Setxattr(file, "user.e2b.k", []byte("old"), 0)
			full := strings.HasPrefix(what, "attributes")
			if full {
				for size := 4096; size > 0; size /= 2 {
					unix.Setxattr(file, fmt.Sprint("user.", size), make([]byte, size-1), 0)
				}
			}
			if err := cmpOr(os.Chown(file, uidUser, uidUser), unix.Chmod(file, mode)); err != nil {
				t.Fatal(err)
			}
			s.judge(func(call *systemCall) verdict {
				if c.fails && call.concerns(home) {
					return failsWith(unix.EIO)
				}
				return letPass
			})
			got := d.try("POST", filesPath("path", file, "username", "root"), "application/octet-stream", c.content, c.headers...)
			s.judge(nil)
			var st unix.Stat_t
			unix.Lstat(file, &st)
			value := make([]byte, 9)
			n, _ := unix.Getxattr(file, "user.e2b.k", value)
			state := fmt.Sprintf("%d %o %s", st.Uid, st.Mode&0o7777, value[:max(n, 0)])
			content, _ := os.ReadFile(file)
			wanted, kept := fmt.Sprintf("0 %o ", mode&0o777), string(content) == "the old content"
			switch {
			case full && got.ok:
				t.Skip("needs a file system on which attributes use up their room")
			case full:
				wanted = fmt.Sprintf("%d %o old", uidUser, mode)
			case c.fails:
				wanted += "old"
			}
			if c.fails && !strings.Contains(got.told, "input/output error; it has lost its set-ID bits; its owner is 0:0 now") {
				t.Errorf("%s, mode %o: %d %s", what, mode, got.code, got.told)
			}
			if state != wanted || kept != (full || c.fails) || got.ok != !(full || c.fails) {
				t.Errorf("%s, mode %o: owner, mode and metadata are %q, want %q; content as it was: %t; %d %s", what, mode, state, wanted, kept, got.code, got.told)
			}
		}
	}
}

func cmpOr(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// ---- hard links ----------------------------------------------------------------------------------------------------

// unprotectedHardLinks lets users link what is not theirs, as the kernel does by default, until the test ends. The setting is
// the machine's: a lock keeps the tests of other processes away.
func unprotectedHardLinks(t *testing.T) {
	t.Helper()
	needRoot(t)
	const setting = "/proc/sys/fs/protected_hardlinks"
	lock, err := os.OpenFile(filepath.Join(os.TempDir(), "envd-test-hardlinks.lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(setting)
	if err == nil {
		err = os.WriteFile(setting, []byte("0"), 0)
	}
	if err != nil {
		lock.Close()
		t.Skip("needs to change ", setting, ": ", err)
	}
	t.Cleanup(func() {
		os.WriteFile(setting, before, 0)
		lock.Close()
	})
}

// mkdirAttacker puts a directory with a link to root's file in the place of each that is made in its own.
func mkdirAttacker(args []string) {
	becomeUser(args[0])
	ended, won := untilEOF(), 0
	prepare := func(n int) string {
		dir := fmt.Sprint("prepared", n)
		os.Mkdir(dir, 0o700)
		if err := os.Link(args[1], dir+"/f"); err != nil {
			fmt.Print("cannot link: ", err)
			os.Exit(0)
		}
		unix.Chmod(dir, 0o1700)
		return dir
	}
	prepared := prepare(0)
	var seen string
	for n := 0; !isOver(ended); {
		names, _ := os.ReadDir("real")
		for _, entry := range names {
			name := "real/" + entry.Name()
			if name == seen {
				continue
			}
			var st unix.Stat_t
			if unix.Rename(name, fmt.Sprint("stolen", n)) != nil || unix.Rename(prepared, name) != nil {
				continue
			}
			seen = name
			for range 200 { // until it has changed hands
				unix.Chmod(name, 0o1700)
				if unix.Lstat(name, &st) == nil && st.Uid != uidUser {
					won++
					break
				}
			}
			n++
			prepared = prepare(n)
			if n > 10 {
				os.RemoveAll(fmt.Sprint("stolen", n-10))
			}
		}
	}
	fmt.Print(won)
}

// Row 5 (a): a directory in the place of one that the daemon has just made behind the attacker's link.
func TestAttackMadeDirectories(t *testing.T) {
	unprotectedHardLinks(t)
	d, home := startDaemonWithUsers(t, daemonConfig{})
	roots, untouched := rootsOwn(t)
	shell(t, home, "mkdir real; ln -s real l; chown -h 61000:61000 real l")
	var given atomic.Int64
	rounds, won := attackWith(t, "mkdir-attacker", home, []string{roots + "/file"}, func(round int) {
		name := fmt.Sprint("/new", round)
		d.upload(t, filesPath("path", home+"/l"+name+"/x", "username", "root"), "x")
		var st unix.Stat_t
		if unix.Lstat(home+"/real"+name, &st) == nil && st.Uid == 0 {
			if _, err := os.Lstat(home + "/real" + name + "/f"); err == nil {
				given.Add(1)
				t.Errorf("%s has a link to root's file in it, and has become root's", name)
			}
		}
		uploadSmall(d, t, home+"/real"+name+"/f")
		d.upload(t, filesPath("path", home+"/real"+name+"/f", "username", "noshell"), "attack")
		untouched(name)
		os.RemoveAll(home + "/real" + name)
	})
	if strings.HasPrefix(won, "cannot link") {
		t.Skip(won)
	}
	t.Logf("%d directories made; %d prepared ones became root's with a link in them; the attacker saw %s change hands", rounds, given.Load(), won)
}

// passingAttacker makes a link to root's file, and takes it away again, all the time.
func passingAttacker(args []string) {
	becomeUser(args[0])
	ended := untilEOF()
	for n := 0; !isOver(ended); n++ {
		if n%8 == 0 { // else there would be nothing that may be written to
			os.WriteFile("f", []byte("own"), 0o644)
			os.Remove("f")
		}
		os.Link(args[1], "f")
		if n%2 == 0 {
			os.Remove("f")
		} else {
			os.WriteFile("over", nil, 0o644)
			os.Rename("over", "f")
			os.Remove("f")
		}
	}
}

// Row 5: a hard link that is gone when its file is looked at, which has one name then.
func TestAttackPassingLinks(t *testing.T) {
	unprotectedHardLinks(t)
	d, home := startDaemonWithUsers(t, daemonConfig{})
	roots, untouched := rootsOwn(t)
	rounds, _ := attackWith(t, "passing-attacker", home, []string{roots + "/file"}, func(round int) {
		d.upload(t, filesPath("path", home+"/f", "username", []string{"user", "root"}[round%2]), "attack")
		untouched(home + "/f")
	})
	t.Logf("%d uploads", rounds)
}

// swapAttacker exchanges its own file and a hard link to root's.
func swapAttacker(args []string) {
	becomeUser(args[0])
	ended := untilEOF()
	for n := 0; !isOver(ended); n++ {
		if n%16 == 0 {
			os.WriteFile("own", []byte("own"), 0o644)
			os.Link("own", "swap")
			os.Remove("own")
			os.Link(args[1], "link")
		}
		unix.Renameat2(unix.AT_FDCWD, "swap", unix.AT_FDCWD, "link", unix.RENAME_EXCHANGE)
	}
}

// Row 5 (b): a hard link of the attacker's is moved, or linked by an archive, into a directory of root's.
func TestAttackMovedLinks(t *testing.T) {
	unprotectedHardLinks(t)
	d, home := startDaemonWithUsers(t, daemonConfig{})
	roots, untouched := rootsOwn(t)
	to := filepath.Dir(roots) + "/to"
	shell(t, home, fmt.Sprintf("ln %s/file still; mkdir %s sub", roots, to))
	linked := archive(t, tarEntry{name: "sub/h", kind: tar.TypeLink, link: "still"})
	if _, err := d.fsCall(t, "root", "Move", home+"/still", to+"/still"); err == nil {
		t.Error("a hard link was moved to root's")
	}
	if got := d.request(t, "POST", filesPath("path", home, "username", "root"), linked, "Content-Type", "application/x-tar"); got.status == 200 {
		t.Error("a hard link was linked to root's")
	}
	for _, path := range []string{to + "/still", home + "/sub/h"} {
		d.upload(t, filesPath("path", path, "username", "noshell"), "attack")
	}
	untouched("a link that stays")
	os.Remove(home + "/still")
	swapped := archive(t, tarEntry{name: "sub/h", kind: tar.TypeLink, link: "swap"})
	var moved atomic.Int64
	rounds, _ := attackWith(t, "swap-attacker", home, []string{roots + "/file"}, func(round int) {
		path := fmt.Sprint(to, "/", round)
		if round%2 == 0 {
			if _, err := d.fsCall(t, "root", "Move", home+"/swap", path); err == nil {
				moved.Add(1)
			}
		} else {
			path = home + "/sub/h"
			d.request(t, "POST", filesPath("path", home, "username", "root"), swapped, "Content-Type", "application/x-tar")
		}
		d.upload(t, filesPath("path", path, "username", "noshell"), "attack")
		untouched(path)
		os.Remove(path)
	})
	t.Logf("%d rounds, %d files moved", rounds, moved.Load())
	if left := temporaryFiles(to); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// Row 5 (c): whoever may write into somebody's directory, by a group that has the number of its user even, may have linked.
func TestGroupIsOthers(t *testing.T) {
	t.Parallel()
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, `echo own > .bashrc; mkdir -m 775 shared; ln .bashrc shared/data; chown -R 61000:61000 .bashrc shared`)
	if !uploadSmall(d, t, home+"/shared/data") || !uploadLarge(d, t, home+"/shared/data") {
		t.Error("not refused")
	}
	wantContent(t, home+"/.bashrc", "own\n")
}

// What is honest about hard links goes on: archives with several names of one file, moves of what has one name.
func TestHonestLinks(t *testing.T) {
	t.Parallel()
	d, home := startDaemonWithUsers(t, daemonConfig{})
	for _, user := range []string{"user", "root"} {
		links := archive(t, tarEntry{name: user + "/a", content: "x"}, tarEntry{name: user + "/b", kind: tar.TypeLink, link: user + "/a"},
			tarEntry{name: user + "/c", kind: tar.TypeLink, link: user + "/a"}, tarEntry{name: "d" + user, kind: tar.TypeLink, link: user + "/b"})
		for range 2 {
			got := d.request(t, "POST", filesPath("path", home, "username", user), links, "Content-Type", "application/x-tar")
			if got.status != 200 {
				t.Errorf("%s: %d %s", user, got.status, got.body)
			}
		}
		if st := lstat(t, home+"/"+user+"/a"); st.Nlink != 4 {
			t.Errorf("%s: %d names", user, st.Nlink)
		}
	}
	to := publicDir(t) + "/to"
	shell(t, home, "mkdir "+to+"; echo x > file; mkdir -p dir/sub; echo y > own1; ln own1 own2; chown -R 61000:61000 file dir own1 own2")
	for _, name := range []string{"file", "dir", "own1", "own2"} {
		if _, err := d.fsCall(t, "root", "Move", home+"/"+name, to+"/"+name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	noTemporaryFiles(t, to)
	noTemporaryFiles(t, home)
	if _, err := d.fsCall(t, "root", "Move", to+"/own1", home+"/own2"); err != nil {
		t.Error(err)
	}
}

// Many clients make one directory, and files in it, at once: by its own name, and by a link.
func TestMadeTogether(t *testing.T) {
	t.Parallel()
	d, home := startDaemonWithUsers(t, daemonConfig{})
	shell(t, home, "mkdir real; ln -s real l; chown -h 61000:61000 real l")
	for round := range 10 {
		for _, base := range []string{home, home + "/l"} {
			var wait sync.WaitGroup
			for i := range 16 {
				wait.Go(func() {
					path := fmt.Sprintf("%s/made%d/a/%d/f%d", base, round, i%3, i)
					if got := d.upload(t, filesPath("path", path, "username", "user"), "x"); got.status != 200 {
						t.Errorf("%s: %d %s", path, got.status, got.body)
					}
				})
			}
			wait.Wait()
			for _, dir := range []string{"", "/a", "/a/0", "/a/1", "/a/2"} {
				if st := lstat(t, fmt.Sprintf("%s/made%d%s", base, round, dir)); st.Uid != uidUser || st.Mode&0o7777 != 0o755 {
					t.Errorf("%s: owner %d, mode %o", dir, st.Uid, st.Mode)
				}
			}
		}
	}
}

// ---- archives ------------------------------------------------------------------------------------------------------

// Row 9: a signed URL stands for one file, whatever is asked of it.
func TestSignedURLIsOneFile(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	setToken(t, d, "secret")
	dir := publicDir(t)
	writeFile(t, dir+"/f", "x", 0o644)
	signed := func(operation, path string) string {
		sum := sha256.Sum256(fmt.Appendf(nil, "%s:%s:root:secret", path, operation))
		return filesPath("path", path, "username", "root", "signature", "v1_"+base64.RawStdEncoding.EncodeToString(sum[:]))
	}
	var text bytes.Buffer
	w := tar.NewWriter(&text)
	w.WriteHeader(&tar.Header{Name: "su", Mode: 0o4755})
	w.Close()
	const refusal = "an archive needs the access token in X-Access-Token: a signed URL stands for one file"
	asTar := []string{"Content-Type", "application/x-tar", "Accept", "application/x-tar"}
	set := 0
	for _, path := range []string{dir, dir + "/", dir + "/new", dir + "/f"} {
		for _, contentType := range []string{"application/x-tar", "APPLICATION/X-TAR; x=y"} {
			got := d.request(t, "POST", signed("write", path), text.String(), "Content-Type", contentType)
			wantFailure(t, "unpack to "+path, got, 403, refusal)
		}
		if _, err := os.Lstat(path + "/su"); err == nil {
			set++
		}
	}
	if set > 0 {
		t.Errorf("%d set-ID files were made", set)
	}
	wantFailure(t, "pack", d.request(t, "GET", signed("read", dir), "", asTar...), 403, refusal)
	wantFailure(t, "no archive", d.request(t, "GET", signed("read", dir), ""), 400, "path '"+dir+"' is a directory")
	wantFailure(t, "another token", d.request(t, "GET", signed("read", dir), "", append(asTar, "X-Access-Token", "other")...), 401,
		"access token present in header but does not match")
	if got := d.request(t, "GET", signed("read", dir+"/f"), "", asTar...); got.status != 200 || got.body != "x" {
		t.Errorf("one file: %d %s", got.status, got.body)
	}
	for _, method := range []string{"GET", "POST"} {
		if got := d.request(t, method, filesPath("path", dir), text.String(), append(asTar, "X-Access-Token", "secret")...); got.status != 200 {
			t.Errorf("%s with the token: %d %s", method, got.status, got.body)
		}
	}
}

// The owners and modes of an archive that root unpacks: nobody's number, and set-group-ID for whom is not in the group.
func TestArchiveOwners(t *testing.T) {
	t.Parallel()
	d, home := startDaemonWithUsers(t, daemonConfig{})
	unpack := func(h tar.Header) attempted {
		var text bytes.Buffer
		w := tar.NewWriter(&text)
		h.Format = tar.FormatGNU
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		w.Close()
		return d.try("POST", filesPath("path", home+"/a", "username", "root"), "application/x-tar", text.String())
	}
	for _, id := range []int{-1, 1<<32 - 1, 1 << 32, 1<<32 + uidUser} {
		for _, h := range []tar.Header{{Uid: id}, {Gid: id}, {Uid: id, Typeflag: tar.TypeDir}, {Gid: id, Typeflag: tar.TypeSymlink, Linkname: "x"}} {
			h.Name = "nobodys"
			if got := unpack(h); got.code != 400 || !strings.Contains(got.told, "has an owner that nobody can be") {
				t.Errorf("%d:%d: %d %s", h.Uid, h.Gid, got.code, got.told)
			}
			if _, err := os.Lstat(home + "/a/nobodys"); err == nil {
				t.Errorf("%d:%d: it was made", h.Uid, h.Gid)
			}
		}
	}
	for _, c := range []struct {
		uid, gid   int
		mode, want uint32
	}{
		{0, 0, 0o6755, 0o6755}, {0, 62001, 0o2755, 0o2755}, {uidUser, uidUser, 0o6755, 0o6755}, {uidUser, 0, 0o6755, 0o4755},
		{uidGrouped, 62001, 0o2755, 0o2755}, {uidUser, 62001, 0o2755, 0o755}, {54321, 54321, 0o6755, 0o4755},
	} {
		name := fmt.Sprintf("%d-%d", c.uid, c.gid)
		got := unpack(tar.Header{Name: name, Uid: c.uid, Gid: c.gid, Mode: int64(c.mode)})
		st := lstat(t, home+"/a/"+name)
		if !got.ok || st.Mode&0o7777 != c.want || int(st.Uid) != c.uid || int(st.Gid) != c.gid {
			t.Errorf("%s: %d %s; mode %o, want %o, owner %d:%d", name, got.code, got.told, st.Mode, c.want, st.Uid, st.Gid)
		}
	}
}

// A set-ID program that an archive makes is nobody's to write by way of his directory's default access list.
func TestArchiveInADirectoryWithAccessList(t *testing.T) {
	t.Parallel()
	d, home := startDaemonWithUsers(t, daemonConfig{})
	entry := func(tag, permissions uint16, id uint32) (b []byte) {
		b = binary.LittleEndian.AppendUint16(b, tag)
		return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint16(b, permissions), id)
	}
	list := slices.Concat([]byte{2, 0, 0, 0}, entry(1, 7, 1<<32-1), entry(2, 7, uidUser), entry(4, 5, 1<<32-1), entry(16, 7, 1<<32-1), entry(32, 5, 1<<32-1))
	if err := unix.Setxattr(home, "system.posix_acl_default", list, 0); err != nil {
		t.Skip("needs access lists: ", err)
	}
	var text bytes.Buffer
	w := tar.NewWriter(&text)
	w.WriteHeader(&tar.Header{Name: "su", Mode: 0o4775})
	w.Close()
	got := d.request(t, "POST", filesPath("path", home, "username", "root"), text.String(), "Content-Type", "application/x-tar")
	if n, err := unix.Getxattr(home+"/su", "system.posix_acl_access", nil); err != unix.ENODATA {
		t.Errorf("the user may write to a set-ID program of root's: an access list of %d bytes, %v", n, err)
	}
	if mode := lstat(t, home+"/su").Mode & 0o7777; got.status != 200 || mode != 0o4775 {
		t.Errorf("%d %s; mode %o", got.status, got.body, mode)
	}
}

// ---- the kernel's files --------------------------------------------------------------------------------------------

// Row 17: what a link of a user's leads to on the kernel's own file systems is refused, whatever the kernel itself would ask for.
func TestLinksToKernelFiles(t *testing.T) {
	t.Parallel()
	d, home := startDaemonWithUsers(t, daemonConfig{})
	const setting = "/proc/sys/fs/protected_hardlinks" // 0600
	before := lstat(t, setting).Mode
	links := map[string]string{"setting": setting, "dir": "/proc/sys/fs", "proc": "/proc", "sys": "/sys", "cgroup": cgroupMount()}
	for name, target := range links {
		if target != "" {
			shell(t, home, fmt.Sprintf("ln -s %s %s; chown -h 61000:61000 %s", target, name, name))
		}
	}
	shell(t, home, "echo own > own; chown 61000:61000 own")
	var read, wrote int
	for _, path := range []string{"setting", "dir/protected_hardlinks", "proc/sys/fs/protected_hardlinks", "sys/kernel/profiling", "cgroup/cgroup.procs"} {
		body := fmt.Sprintf(`{"source_paths":["%s/%s"],"destination":"stolen","username":"user"}`, home, path)
		if got := d.request(t, "POST", "/files/compose", body); got.status < 400 {
			t.Errorf("compose from %s: %d", path, got.status)
		}
		if text, err := os.ReadFile(home + "/stolen"); err == nil {
			read++
			t.Errorf("%s: read %q", path, text)
			os.Remove(home + "/stolen")
		}
		if !uploadSmall(d, t, home+"/"+path) || !uploadLarge(d, t, home+"/"+path) {
			wrote++
			t.Errorf("%s: written", path)
		}
	}
	for _, path := range []string{"cgroup/made", "proc/made", "sys/kernel/made"} {
		if _, err := d.fsCall(t, "user", "MakeDir", home+"/"+path); err == nil {
			t.Errorf("%s was made", path)
			os.Remove(home + "/" + path)
		}
	}
	if read+wrote > 0 || lstat(t, setting).Mode != before {
		t.Errorf("%d read, %d written", read, wrote)
	}
	wantContent(t, home+"/own", "own\n")
}

// ---- accounts ------------------------------------------------------------------------------------------------------

// startDaemonWithAccounts starts one with these passwd and group files.
func startDaemonWithAccounts(t *testing.T, passwd, group string) *daemon {
	t.Helper()
	needRoot(t)
	return startDaemonWith(t, daemonConfig{files: map[string]string{"/etc/passwd": passwd, "/etc/group": group}})
}

// Row 19: a number that means "as it is" to the kernel is nobody's, nor any that does not fit.
func TestAttackIDs(t *testing.T) {
	ids := []string{"4294967295", "-1", "4294967296", "18446744073709551615", "0xffffffff", "037777777777", ""}
	passwd, group := "root:x:0:0:root:/root:/bin/sh\nok:x:61000:61000::/tmp:/bin/sh\n", "ok:x:61000:\nnone:x:4294967295:ok\nreal:x:62001:ok\n"
	for i, id := range ids {
		passwd += fmt.Sprintf("u%d:x:%s:61000::/tmp:/bin/sh\ng%d:x:61000:%s::/tmp:/bin/sh\n", i, id, i, id)
	}
	d := startDaemonWithAccounts(t, passwd, group)
	dir := publicDir(t)
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	wrong, tries := 0, 0
	for end := time.Now().Add(attackTime(t)); time.Now().Before(end) && wrong == 0; {
		for i := range ids {
			for _, name := range []string{fmt.Sprint("u", i), fmt.Sprint("g", i)} {
				tries++
				var ran runResult
				s, err := d.open(t, sh("id -u; id -g"), withUser(name))
				if err == nil {
					ran = s.collect()
					err = ran.err
				}
				if err == nil {
					wrong++
					t.Errorf("%s (%q): a command ran: %q", name, ids[i], ran.stdout)
				} else if code := connect.CodeOf(err); code != connect.CodeUnauthenticated {
					t.Errorf("%s: %v", name, err)
				}
				got := d.upload(t, filesPath("path", dir+"/"+name, "username", name), "x")
				if _, err := os.Lstat(dir + "/" + name); got.status != 401 || err == nil {
					t.Errorf("%s: upload: %d %s", name, got.status, got.body)
				}
			}
		}
	}
	if got := strings.TrimSpace(d.output(t, sh("id -u; id -G"), withUser("ok"))); got != "61000\n61000 62001" {
		t.Errorf("a user who is also in the group 4294967295: %q", got)
	}
	t.Logf("%d commands tried, %d with a wrong uid", tries, wrong)
}

// Row 20: each line of passwd has its own groups, also where two have one name.
func TestNameTwiceInPasswd(t *testing.T) {
	t.Parallel()
	d := startDaemonWithAccounts(t, "root:x:0:0:root:/root:/bin/sh\ntwice:x:61000:61000::/tmp:/bin/sh\ntwice:x:61001:42::/tmp:/bin/sh\n",
		"shadow:x:42:\na:x:62001:twice\nb:x:62002:twice\nc:x:62003:twice\ntwice:x:61000:\n")
	groups := strings.Fields(d.output(t, sh("id -G"), withUser("twice")))
	slices.Sort(groups)
	if want := []string{"61000", "62001", "62002", "62003"}; !slices.Equal(groups, want) {
		t.Errorf("groups %q, want %q", groups, want)
	}
}

// ---- attributes ----------------------------------------------------------------------------------------------------

// Row 7: of a file's attributes at most 64 KiB are read, and an upload never loses the others.
func TestManyAttributes(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	dir, _ := muchMetadata(t) // 40 of 60 KiB
	file := dir + "/file"
	entry, err := d.fsCall(t, "root", "Stat", file)
	if err != nil {
		t.Fatal(err)
	}
	if size := len(fmt.Sprint(entry)); size < 60<<10 || size > 80<<10 {
		t.Errorf("Stat tells %d bytes", size)
	}
	got := d.request(t, "GET", filesPath("path", dir), "", "Accept", "application/x-tar")
	if got.status != 200 || len(got.body) > 200<<10 {
		t.Errorf("an archive has %d bytes", len(got.body))
	}
	file = writeFile(t, dir+"/other", "content", 0o644)
	for i := range 40 {
		if err := unix.Setxattr(file, fmt.Sprint("user.a", i), bytes.Repeat([]byte("v"), 60<<10), 0); err != nil {
			t.Fatal(err)
		}
	}
	before := lstat(t, file)
	large := strings.Repeat("new", 1<<19)
	if got := d.upload(t, filesPath("path", file, "username", "root"), large); got.status != 200 {
		t.Errorf("%d %s", got.status, got.body)
	}
	wantContent(t, file, large)
	if lstat(t, file).Ino != before.Ino {
		t.Error("the file was replaced")
	}
	for i := range 40 {
		if n, err := unix.Getxattr(file, fmt.Sprint("user.a", i), nil); n != 60<<10 || err != nil {
			t.Errorf("attribute %d: %d bytes, %v", i, n, err)
		}
	}
	noTemporaryFiles(t, dir)
}

// A file of the kernel's and a program that runs can be written, too.
func TestUploadToOddFiles(t *testing.T) {
	t.Parallel()
	d, home := startDaemonWithUsers(t, daemonConfig{})
	program := exec.Command("sleep", "1000")
	if err := program.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { program.Process.Kill(); program.Wait() }()
	score := fmt.Sprintf("/proc/%d/oom_score_adj", program.Process.Pid)
	if got := d.upload(t, filesPath("path", score, "username", "root"), "321"); got.status != 200 {
		t.Errorf("%s: %d %s", score, got.status, got.body)
	}
	wantContent(t, score, "321\n")
	shell(t, home, "cp $(command -v sleep) busy; chown 61000:61000 busy")
	busy := exec.Command(home+"/busy", "1000")
	if err := busy.Start(); err != nil {
		t.Skip(err)
	}
	defer func() { busy.Process.Signal(syscall.SIGKILL); busy.Wait() }()
	if got := d.upload(t, filesPath("path", home+"/busy", "username", "user"), "new"); got.status != 200 {
		t.Errorf("a program that runs: %d %s", got.status, got.body)
	}
	wantContent(t, home+"/busy", "new")
	if st := lstat(t, home+"/busy"); st.Mode&0o777 != 0o755 || st.Uid != uidUser {
		t.Errorf("mode %o, owner %d", st.Mode, st.Uid)
	}
	noTemporaryFiles(t, home)
}
