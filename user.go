// Users of the guest: the passwd and group databases, read from their files and nothing else.
//
// Images add users while they run, so each lookup checks whether the files are still the same (device, inode, size, mtime,
// ctime) and reads them again when not. os/user is not used: it remembers the current user for ever and fills gaps from
// the environment. An image without /etc/passwd still has root. Formats: passwd(5), group(5).

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
	name, home string
	uid, gid   uint32
	groups     []uint32 // supplementary groups and the primary one
}

// unknownUserError is the name that no passwd line carries. Clients see its text.
type unknownUserError string

func (e unknownUserError) Error() string { return "user: unknown user " + string(e) }

type userDB struct {
	mu                    sync.Mutex // protects what follows
	passwd, group         fileIdentity
	accounts              map[string]account
	userNames, groupNames map[uint32]string
}

type fileIdentity struct {
	dev, ino     uint64
	size         int64
	mtime, ctime syscall.Timespec
}

func identify(path string) fileIdentity {
	var st syscall.Stat_t
	if syscall.Stat(path, &st) != nil {
		return fileIdentity{size: -1}
	}
	return fileIdentity{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}

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
	passwd, group := identify("/etc/passwd"), identify("/etc/group")
	if db.accounts != nil && passwd == db.passwd && group == db.group {
		return
	}
	db.passwd, db.group = passwd, group
	db.accounts, db.userNames, db.groupNames = map[string]account{}, map[uint32]string{}, map[uint32]string{}
	members := map[string][]uint32{}
	readDatabase("/etc/group", 4, func(f []string) {
		gid := number(f[2])
		db.groupNames[gid] = f[0]
		for member := range strings.SplitSeq(f[3], ",") {
			members[member] = append(members[member], gid)
		}
	})
	readDatabase("/etc/passwd", 7, func(f []string) {
		a := account{name: f[0], uid: number(f[2]), gid: number(f[3]), home: f[5]}
		a.groups = append(members[a.name], a.gid)
		slices.Sort(a.groups)
		a.groups = slices.Compact(a.groups)
		db.accounts[a.name], db.userNames[a.uid] = a, a.name
	})
	if passwd.size < 0 {
		db.accounts["root"], db.userNames[0] = account{name: "root", home: "/root", groups: []uint32{0}}, "root"
	}
}

// number reads an id that readDatabase has checked.
func number(text string) uint32 {
	n, _ := strconv.ParseUint(text, 10, 32)
	return uint32(n)
}

// readDatabase calls line with the fields of each valid line, the last one first, so that the first of equal ones stays.
func readDatabase(path string, fields int, line func([]string)) {
	text, _ := os.ReadFile(path)
	for _, l := range slices.Backward(strings.Split(string(text), "\n")) {
		f := strings.Split(strings.TrimSpace(l), ":")
		if len(f) < fields || f[0] == "" || f[0][0] == '#' {
			continue
		}
		if _, err := strconv.ParseUint(f[2], 10, 32); err == nil {
			if _, err := strconv.ParseUint(f[3], 10, 32); err == nil || fields == 4 {
				line(f)
			}
		}
	}
}
