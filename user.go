// Users of the guest: the passwd and group databases, read from their files and nothing else.
//
// Images add users while they run, so each lookup checks the files' identity (device, inode, size, mtime) and reads
// them again when it changed. os/user is not used: it remembers the current user for ever and fills gaps from the
// environment. An image without /etc/passwd still has root. Formats: passwd(5), group(5).

package main

import (
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

type account struct {
	name, home, shell string
	uid, gid          uint32
	groups            []uint32 // supplementary groups and the primary one
}

// unknownUserError is the name that no passwd line carries. Clients see its text.
type unknownUserError string

func (e unknownUserError) Error() string { return "user: unknown user " + string(e) }

type fileIdentity struct {
	dev, ino    uint64
	size        int64
	mtime       syscall.Timespec
	ctime       syscall.Timespec
	unavailable bool
}

func identify(path string) fileIdentity {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		return fileIdentity{unavailable: true}
	}
	return fileIdentity{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

type userDB struct {
	passwdPath, groupPath string

	mu            sync.Mutex // protects what follows
	passwd, group fileIdentity
	accounts      map[string]account
	userNames     map[uint32]string
	groupNames    map[uint32]string
}

func newUserDB() *userDB { return &userDB{passwdPath: "/etc/passwd", groupPath: "/etc/group"} }

func (db *userDB) lookup(name string) (account, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	db.refreshLocked()
	if a, ok := db.accounts[name]; ok {
		return a, nil
	}
	return account{}, unknownUserError(name)
}

// userName and groupName give the number itself for an id without a name.
func (db *userDB) userName(uid uint32) string {
	db.mu.Lock()
	defer db.mu.Unlock()
	db.refreshLocked()
	return nameOrNumber(db.userNames, uid)
}

func (db *userDB) groupName(gid uint32) string {
	db.mu.Lock()
	defer db.mu.Unlock()
	db.refreshLocked()
	return nameOrNumber(db.groupNames, gid)
}

func nameOrNumber(names map[uint32]string, id uint32) string {
	if name, ok := names[id]; ok {
		return name
	}
	return strconv.FormatUint(uint64(id), 10)
}

func (db *userDB) refreshLocked() {
	passwd, group := identify(db.passwdPath), identify(db.groupPath)
	if db.accounts != nil && passwd == db.passwd && group == db.group {
		return
	}
	db.passwd, db.group = passwd, group
	db.accounts, db.userNames, db.groupNames = map[string]account{}, map[uint32]string{}, map[uint32]string{}
	for _, f := range databaseLines(db.passwdPath, 7) {
		uid, uidErr := strconv.ParseUint(f[2], 10, 32)
		gid, gidErr := strconv.ParseUint(f[3], 10, 32)
		if _, dup := db.accounts[f[0]]; dup || uidErr != nil || gidErr != nil {
			continue
		}
		db.accounts[f[0]] = account{name: f[0], uid: uint32(uid), gid: uint32(gid), home: f[5], shell: f[6]}
		if _, dup := db.userNames[uint32(uid)]; !dup {
			db.userNames[uint32(uid)] = f[0]
		}
	}
	if _, ok := db.accounts["root"]; !ok && passwd.unavailable {
		db.accounts["root"] = account{name: "root", home: "/root", groups: []uint32{0}}
		db.userNames[0] = "root"
	}
	members := map[string][]uint32{}
	for _, f := range databaseLines(db.groupPath, 4) {
		gid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			continue
		}
		if _, dup := db.groupNames[uint32(gid)]; !dup {
			db.groupNames[uint32(gid)] = f[0]
		}
		for _, member := range strings.Split(f[3], ",") {
			members[member] = append(members[member], uint32(gid))
		}
	}
	for name, a := range db.accounts {
		a.groups = append([]uint32{a.gid}, members[name]...)
		slices.Sort(a.groups)
		a.groups = slices.Compact(a.groups)
		db.accounts[name] = a
	}
}

// databaseLines splits a colon-separated database; lines with fewer than n fields are passed over.
func databaseLines(path string, n int) (lines [][]string) {
	text, _ := os.ReadFile(path)
	for line := range strings.SplitSeq(string(text), "\n") {
		if f := strings.Split(strings.TrimSpace(line), ":"); len(f) >= n && f[0] != "" && f[0][0] != '#' {
			lines = append(lines, f)
		}
	}
	return lines
}
