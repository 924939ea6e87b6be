// Whole directories: sent and unpacked as archives (POSIX pax; attributes as GNU tar and star have them).

package main

import (
	"archive/tar"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const linkedBytes = 64 // an entry of unpacker.linked

const tarXattr = "SCHILY.xattr." // before an attribute's name in a PAX record, in which GNU tar escapes what may not be there

var tarEscape, tarUnescape = strings.NewReplacer("%", "%25", "=", "%3D"), strings.NewReplacer("%25", "%", "%3D", "=")

func isUserXattr(name string) bool { return strings.HasPrefix(name, "user.") }

// Prices in bytes.
const (
	tarSendPrice   = 256 << 10 // headers and their encoding, of which attributes are the largest part
	tarUnpackPrice = 3 << 20   // archive/tar reads headers of up to a MiB, and makes strings of them
	tarEntryPrice  = 256       // what is kept of an entry, its name besides
	tarBatch       = 1024      // entries of a directory that are looked at together: there may be millions
)

type tarSender struct {
	*tar.Writer
	ctx    context.Context // done when the client is gone
	memory *grant
	users  *users
	links  map[[2]uint64]string // files with several names: the first one sent
	linked *grant               // for them
}

// sendTar sends what is in a directory: directories, files, links. Sockets, FIFOs and devices are left out.
func (s *fileService) sendTar(ctx context.Context, w http.ResponseWriter, dir *os.File) {
	t := &tarSender{tar.NewWriter(w), ctx, requestOf(ctx).memory, s.users.now(), map[[2]uint64]string{},
		s.budget.grant(forLinks)}
	defer t.linked.close()
	err := t.send(dir, "", 0)
	if err == nil {
		err = t.Close()
	}
	if err != nil {
		slog.Warn("an archive was cut", "logger", "files", "path", dir.Name(), "error", err)
		panic(http.ErrAbortHandler) // it is not to look like a complete one
	}
}

func (t *tarSender) send(dir *os.File, prefix string, depth int) error {
	if depth > maxDepth {
		return unix.ENAMETOOLONG
	}
	var price int64 // of the names
	defer func() { t.memory.give(price) }()
	for {
		names, err := dir.Readdirnames(tarBatch)
		more := int64(len(strings.Join(names, "")) + stringSize*len(names))
		if failure := t.memory.take(t.ctx, more-price); failure != nil {
			return failure
		}
		price = max(price, more)
		slices.Sort(names)
		for i := 0; i < len(names) && err == nil; i++ {
			if err = t.sendEntry(dir, names[i], prefix+names[i], depth); errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ELOOP) {
				err = nil // gone by now, or another thing
			}
		}
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func (t *tarSender) sendEntry(dir *os.File, name, path string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	h := &tar.Header{Format: tar.FormatPAX, Name: path, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		Uname: t.users.names.of(st.Uid), Gname: t.users.groupNames.of(st.Gid), ModTime: time.Unix(st.Mtim.Unix())}
	id := [2]uint64{uint64(st.Dev), st.Ino}
	switch kind := st.Mode & unix.S_IFMT; {
	case kind == unix.S_IFLNK:
		target := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(dir.Fd()), name, target)
		if err != nil {
			return err
		}
		h.Typeflag, h.Linkname = tar.TypeSymlink, string(target[:n])
	case kind == unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, path+"/"
	case kind != unix.S_IFREG:
		return nil
	case t.links[id] != "":
		h.Typeflag, h.Linkname = tar.TypeLink, t.links[id]
	default:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	}
	if h.Linkname != "" {
		return t.WriteHeader(h)
	}
	var f *os.File
	err := unleased(time.Minute, t.ctx.Done(), func() (err error) {
		f, err = openIn(int(dir.Fd()), name, path, 0)
		return err
	})
	if err != nil {
		return err
	}
	defer f.Close()
	h.PAXRecords = map[string]string{}
	for name, value := range fileXattrs(int(f.Fd()), isUserXattr) {
		h.PAXRecords[tarXattr+tarEscape.Replace(name)] = value
	}
	if err = t.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		return t.send(f, path+"/", depth+1)
	}
	// Where there is no room to remember it, its other names are sent as files of their own.
	if st.Nlink > 1 && t.linked.tryTake(int64(tarEntryPrice+len(path))) == nil {
		t.links[id] = path
	}
	return copyAll(t.ctx, t, io.LimitReader(io.MultiReader(f, zeros{}), st.Size)) // its size has been told; it may have shrunk since
}

// zeros are endless.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// unpacker puts the entries of an archive below a directory. Nothing below it is reached through a link.
type unpacker struct {
	*uploadRequest
	top    *place
	open   []openDir       // new directories whose entries may still come, the innermost last
	linked map[fileID]bool // files that this archive has given further names
}

type openDir struct {
	*place
	header *tar.Header
}

func (u *uploadRequest) receiveTar() error {
	path, err := u.resolve(u.user, u.query.Get("path"))
	if err != nil {
		return err
	}
	if err := cmp.Or(u.take(patience), u.memory.take(u.ctx, tarUnpackPrice)); err != nil {
		return err
	}
	top, err := walkPath(walk{users: u.users, mkdirs: &u.user}, path+"/")
	if err != nil {
		return fmt.Errorf("error ensuring directories: %w", err)
	}
	defer top.close()
	x := &unpacker{uploadRequest: u, top: top, linked: map[fileID]bool{}}
	defer x.leave("")
	index := map[string]int{}
	for archive := tar.NewReader(u.body); ; {
		h, err := archive.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("error reading archive: %w", err)
		}
		name := filepath.Clean(h.Name)
		x.leave(name)
		if err := x.unpack(h, name, archive); errors.Is(err, unix.ELOOP) {
			return badRequest("archive entry '%s' leads through a link", h.Name)
		} else if err != nil {
			return fmt.Errorf("error unpacking '%s': %w", h.Name, err)
		}
		if first, _, below := strings.Cut(name, "/"); first != "." && h.Typeflag != tar.TypeXGlobalHeader {
			if _, known := index[first]; !known {
				if err := u.memory.take(u.ctx, int64(tarEntryPrice+2*len(path)+4*len(first))); err != nil {
					return err
				}
				index[first] = len(u.files)
				u.files = append(u.files, written{Path: filepath.Join(path, first), Name: first, Type: "file"})
			}
			if below || h.Typeflag == tar.TypeDir {
				u.files[index[first]].Type = "dir"
			}
		}
	}
}

// leave finishes the directories that are not above the next entry: from here on nothing changes their time any more.
func (x *unpacker) leave(next string) {
	for len(x.open) > 0 {
		d := x.open[len(x.open)-1]
		if next != "" && strings.HasPrefix(next, filepath.Clean(d.header.Name)+"/") {
			return
		}
		if fd, err := unix.Openat(d.dir, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			if err := x.dress(fd, d.header); err != nil {
				slog.Warn("attributes of a directory could not be set", "logger", "files", "path", d.path, "error", err)
			}
			unix.Close(fd)
		}
		d.close()
		x.memory.give(priceOf(d.header))
		x.open = x.open[:len(x.open)-1]
	}
}

// priceOf is what a header holds while its directory is open.
func priceOf(h *tar.Header) int64 {
	price := tarEntryPrice + len(h.Name)
	for name, value := range h.PAXRecords {
		price += tarEntryPrice + len(name) + len(value)
	}
	return int64(price)
}

// owner is whose an entry becomes. The archive's owner counts only for root.
func (x *unpacker) owner(h *tar.Header) account {
	if x.user.uid != 0 {
		return x.user
	}
	return account{uid: uint32(h.Uid), gid: uint32(h.Gid)} // unpack has checked them
}

// mode is what an entry may have of its mode. Whoever had a file as his own for a moment can have it open, mapped even, and
// put a program of his into it: with a set-ID bit it runs as nobody but himself, in no group but his own.
func (x *unpacker) mode(h *tar.Header, owner account, isDir bool) uint32 {
	mode := uint32(h.Mode) & 0o7777
	if as := x.top.as; as != nil && as.uid != x.user.uid {
		mode &^= setIDs // it was made in the name of a link's owner
	}
	if mode&unix.S_ISGID != 0 && !isDir && owner.uid != 0 {
		known, err := x.users.lookup(x.users.now().names.of(owner.uid))
		if err != nil || !slices.Contains(known.groups, owner.gid) {
			mode &^= unix.S_ISGID
		}
	}
	return mode
}

// dress gives something new its owner, mode, attributes and time.
func (x *unpacker) dress(fd int, h *tar.Header) error {
	owner := x.owner(h)
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil {
		err = chown(fd, &st, nil, owner)
	}
	if err == nil && h.Typeflag != tar.TypeSymlink {
		mode := x.mode(h, owner, st.Mode&unix.S_IFMT == unix.S_IFDIR)
		if mode&setIDs != 0 { // its owner alone says who may write to it
			unix.Fremovexattr(fd, accessList)
		}
		err = unix.Fchmod(fd, mode)
		for record, value := range h.PAXRecords {
			if name, ok := strings.CutPrefix(record, tarXattr); ok && isUserXattr(name) && err == nil {
				if err = unix.Fsetxattr(fd, tarUnescape.Replace(name), []byte(value), 0); err == unix.EOPNOTSUPP {
					err = nil
				}
			}
		}
	}
	if err == nil {
		mtime := unix.Timespec{Sec: h.ModTime.Unix(), Nsec: int64(h.ModTime.Nanosecond())}
		err = unix.UtimesNanoAt(fd, "", []unix.Timespec{mtime, mtime}, unix.AT_EMPTY_PATH)
	}
	return os.NewSyscallError("set attributes", err)
}

func (x *unpacker) unpack(h *tar.Header, name string, content io.Reader) error {
	way := walk{users: x.users, mkdirs: &x.user, noLinks: true}
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeDir, tar.TypeReg, tar.TypeGNUSparse, tar.TypeSymlink, tar.TypeLink:
	default:
		return badRequest("archive entry '%s' is a device or FIFO, or of an unknown type", h.Name)
	}
	if !filepath.IsLocal(name) || h.Typeflag == tar.TypeLink && !filepath.IsLocal(h.Linkname) {
		return badRequest("archive entry '%s' leads out of the directory", h.Name)
	}
	if name == "." {
		return nil
	}
	if x.user.uid == 0 && (h.Uid < 0 || h.Uid >= noID || h.Gid < 0 || h.Gid >= noID) {
		return badRequest("archive entry '%s' has an owner that nobody can be: %d:%d", h.Name, h.Uid, h.Gid)
	}
	if h.Typeflag == tar.TypeDir {
		at, err := walkBelow(way, x.top, name+"/")
		if err == nil && at.made { // one that was there stays as it is
			if err = x.memory.take(x.ctx, priceOf(h)); err == nil {
				x.open = append(x.open, openDir{at, h})
				return nil
			}
		}
		if at != nil {
			at.close()
		}
		return err
	}
	at, err := walkBelow(way, x.top, name)
	if err != nil {
		return err
	}
	defer at.close()
	switch {
	case at.kind() == unix.S_IFDIR:
		return badRequest("path is a directory: %s", at.path)
	case h.Typeflag == tar.TypeSymlink:
		return x.replaceLink(at, h, func(temp *place) error { return unix.Symlinkat(h.Linkname, temp.dir, temp.name) })
	case h.Typeflag == tar.TypeLink:
		way.mkdirs = nil
		old, err := walkBelow(way, x.top, filepath.Clean(h.Linkname))
		if err != nil {
			return err
		}
		defer old.close()
		return x.replaceLink(at, h, func(temp *place) error { return x.hardLink(old, temp) })
	}
	at.st = unix.Stat_t{} // the name is replaced: nothing of what has it now matters
	r := &replacement{place: at, dress: func(fd int) error { return x.dress(fd, h) }}
	return r.beside(func(f storing) error { return copyAll(x.ctx, f, content) })
}

// hardLink gives a file one more name, unless it can be another one's by way of a hard link. A file that this archive has
// linked before is not asked about again.
func (x *unpacker) hardLink(old, temp *place) error {
	if old.as != nil { // the kernel decides
		return unix.Linkat(old.dir, old.name, temp.dir, temp.name, 0)
	}
	fd, err := unix.Openat(old.dir, old.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if id := idOf(&st); !x.linked[id] {
		if err := refuseForeign(fd, old.dir, old.name, &old.dirs, &st); err != nil {
			return err
		} else if err := x.memory.tryTake(linkedBytes); err != nil {
			return err
		}
		x.linked[id] = true
	}
	return unix.Linkat(fd, "", temp.dir, temp.name, unix.AT_EMPTY_PATH)
}

// replaceLink makes a link of either kind under a hidden name and gives it its own.
func (x *unpacker) replaceLink(at *place, h *tar.Header, link func(temp *place) error) error {
	temp := at.hidden()
	defer temp.unlink() // also after rename(2), which does nothing when both are the same file
	err := at.do(func() error { return link(temp) })
	if err == nil && h.Typeflag == tar.TypeSymlink {
		var fd int
		if fd, err = unix.Openat(at.dir, temp.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0); err == nil {
			var st unix.Stat_t
			if unix.Fstat(fd, &st); st.Mode&unix.S_IFMT == unix.S_IFLNK && int(st.Uid) == at.uid() {
				err = x.dress(fd, h)
			}
			unix.Close(fd)
		}
	}
	if err == nil {
		err = at.do(func() error { return unix.Renameat(at.dir, temp.name, at.dir, at.name) })
	}
	return os.NewSyscallError("link", err)
}
