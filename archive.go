// Whole directories: sent and unpacked as archives (POSIX pax; attributes as GNU tar and star have them).

package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const tarXattr = "SCHILY.xattr." // before an attribute's name in a PAX record, in which GNU tar escapes what may not be there

var tarEscape, tarUnescape = strings.NewReplacer("%", "%25", "=", "%3D"), strings.NewReplacer("%25", "%", "%3D", "=")

func isUserXattr(name string) bool { return strings.HasPrefix(name, "user.") }

type tarSender struct {
	*tar.Writer
	users *users
	links map[[2]uint64]string // files with several names: the first one sent
	gone  <-chan struct{}      // closed when the client is
}

// sendTar sends what is in a directory: directories, files, links. Sockets, FIFOs and devices are left out.
func (s *fileService) sendTar(w http.ResponseWriter, dir *os.File, gone <-chan struct{}) {
	t := &tarSender{tar.NewWriter(w), s.users.now(), map[[2]uint64]string{}, gone}
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
	for {
		names, err := dir.Readdirnames(4096) // there may be millions
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
	err := unleased(time.Minute, t.gone, func() (err error) {
		f, err = openIn(int(dir.Fd()), name, path, 0)
		return err
	})
	if err != nil {
		return err
	}
	defer f.Close()
	h.PAXRecords = map[string]string{}
	attributes, room := fileXattrs(int(f.Fd()), isUserXattr), 960<<10 // archive/tar makes headers of a MiB at most
	for _, name := range slices.Sorted(maps.Keys(attributes)) {
		record := tarXattr + tarEscape.Replace(name)
		if room -= len(record) + len(attributes[name]) + 16; room >= 0 {
			h.PAXRecords[record] = attributes[name]
		}
	}
	if err = t.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag == tar.TypeDir {
		return t.send(f, path+"/", depth+1)
	}
	if st.Nlink > 1 {
		t.links[id] = path
	}
	return copyAll(t, io.LimitReader(io.MultiReader(f, zeros{}), st.Size)) // its size has been told; it may have shrunk since
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
	top  *place
	open []openDir // new directories whose entries may still come, the innermost last
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
	if err := u.take(patience); err != nil {
		return err
	}
	top, err := walkPath(walk{users: u.users, mkdirs: &u.user}, path+"/")
	if err != nil {
		return fmt.Errorf("error ensuring directories: %w", err)
	}
	defer top.close()
	x := &unpacker{uploadRequest: u, top: top}
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
		x.open = x.open[:len(x.open)-1]
	}
}

// dress gives something new its owner, mode, attributes and time. The archive's owner counts only for root.
func (x *unpacker) dress(fd int, h *tar.Header) error {
	owner := account{uid: uint32(h.Uid), gid: uint32(h.Gid)}
	if x.user.uid != 0 {
		owner = x.user
	}
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil {
		err = chown(fd, &st, nil, owner)
	}
	if err == nil && h.Typeflag != tar.TypeSymlink {
		mode := uint32(h.Mode) & 0o7777
		if as := x.top.as; as != nil && as.uid != x.user.uid { // he may have the file open, mapped even, and put a program of his into it
			mode &^= unix.S_ISUID | unix.S_ISGID
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
	if h.Typeflag == tar.TypeDir {
		at, err := walkBelow(way, x.top, name+"/")
		if err == nil && at.made { // one that was there stays as it is
			x.open = append(x.open, openDir{at, h})
		} else if err == nil {
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
		return x.replaceLink(at, h, func(temp *place) error { return unix.Linkat(old.dir, old.name, temp.dir, temp.name, 0) })
	}
	at.st = unix.Stat_t{} // the name is replaced: nothing of what has it now matters
	r := &replacement{place: at, dress: func(fd int) error { return x.dress(fd, h) }}
	return r.beside(func(f storing) error { return copyAll(f, content) })
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
