// Users of the guest: the passwd and group databases, read from their files and nothing else.
//
// Images add users while they run, so whoever asks looks whether the files are still the same, and reads them again when not.
// os/user is not used: it remembers the current user for ever and fills gaps from the environment. Formats: passwd(5), group(5).

package main

import (
	"cmp"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
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

// idNames gives the number itself for an id without a name.
type idNames map[uint32]string

func (names idNames) of(id uint32) string {
	if name, ok := names[id]; ok {
		return name
	}
	return strconv.FormatUint(uint64(id), 10)
}

// users are those of one state of the files. Nobody changes them.
type users struct {
	passwd, group     syscall.Stat_t // of the files; zero where there is none
	accounts          map[string]account
	names, groupNames idNames
}

type userDB struct{ last atomic.Pointer[users] }

func identify(path string) (st syscall.Stat_t) {
	syscall.Stat(path, &st)
	st.Atim = syscall.Timespec{} // reading is no change
	return st
}

func (db *userDB) lookup(name string) (account, error) {
	if a, ok := db.now().accounts[name]; ok {
		return a, nil
	}
	return account{}, unknownUserError(name)
}

func (db *userDB) now() *users {
	passwd, group := identify("/etc/passwd"), identify("/etc/group")
	if last := db.last.Load(); last != nil && last.passwd == passwd && last.group == group {
		return last
	}
	u := &users{passwd, group, map[string]account{}, idNames{}, idNames{}}
	members := map[string][]uint32{}
	err := readDatabase("/etc/group", 4, func(f []string) {
		gid := number(f[2])
		u.groupNames[gid] = f[0]
		for member := range strings.SplitSeq(f[3], ",") {
			members[member] = append(members[member], gid)
		}
	})
	err = cmp.Or(err, readDatabase("/etc/passwd", 7, func(f []string) {
		a := account{name: f[0], uid: number(f[2]), gid: number(f[3]), home: f[5]}
		a.groups = append(slices.Clone(members[a.name]), a.gid) // the name may be there twice
		slices.Sort(a.groups)
		a.groups = slices.Compact(a.groups)
		u.accounts[a.name], u.names[a.uid] = a, a.name
	}))
	// Whoever runs envd can be acted for without a line of its own; root only where there is no database at all.
	self := account{name: strconv.Itoa(os.Geteuid()), home: "/", uid: uint32(os.Geteuid()), gid: uint32(os.Getegid())}
	if _, err := os.Stat("/root"); self.uid == 0 && err == nil {
		self.home = "/root"
	}
	if self.uid == 0 {
		self.name = "root"
	}
	if _, known := u.names[self.uid]; !known && (self.uid != 0 || passwd.Nlink == 0) {
		self.groups = []uint32{self.gid}
		u.accounts[self.name], u.names[self.uid] = self, self.name
	}
	last := db.last.Load()
	if err == nil {
		db.last.Store(u)
	} else if last != nil { // there is no descriptor, perhaps
		return last
	}
	return u
}

// noID is what setresuid(2), chown(2) and their like take for "as it is": who had it would be whoever envd is.
const noID = 1<<32 - 1

// isID says whether a text is the number of a user or a group.
func isID(text string) bool {
	n, err := strconv.ParseUint(text, 10, 32)
	return err == nil && n != noID
}

// number reads an id that readDatabase has checked.
func number(text string) uint32 {
	n, _ := strconv.ParseUint(text, 10, 32)
	return uint32(n)
}

// readDatabase calls line with the fields of each valid line, the last one first, so that the first of equal ones stays.
func readDatabase(path string, fields int, line func([]string)) error {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	for _, l := range slices.Backward(strings.Split(string(text), "\n")) {
		f := strings.Split(strings.TrimSpace(l), ":")
		if len(f) < fields || f[0] == "" || f[0][0] == '#' {
			continue
		}
		if isID(f[2]) && (fields == 4 || isID(f[3])) {
			line(f)
		}
	}
	return err
}
