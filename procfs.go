// What the kernel tells of itself in files of /proc, and the part of the guest's memory that is not for clients.
//
// Sources: proc_meminfo(5), statfs(2), Documentation/filesystems/tmpfs.rst.

package main

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// readProc gives "" for what is not readable. For os.ReadFile the runtime's poller would wake a thread each time.
func readProc(path string) string {
	var text []byte
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	for n := 1; err == nil && n > 0; {
		text = slices.Grow(text, 4<<10)
		n, err = unix.Read(fd, text[len(text):cap(text)])
		text = text[:len(text)+max(n, 0)]
	}
	unix.Close(fd)
	return string(text)
}

// procNumber reads the number behind a name at the beginning of a line.
func procNumber(text, name string) uint64 {
	_, rest, _ := strings.Cut("\n"+text, "\n"+name)
	value, _, _ := strings.Cut(rest, "\n")
	n, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
	return n
}

// readMemory gives bytes; a total of 0 where /proc/meminfo is not readable. Used is what could not be had even if all caches
// were given up.
func readMemory() (total, used, cache uint64) {
	text := readProc("/proc/meminfo")
	bytes := func(name string) uint64 { return procNumber(text, name) << 10 }
	total = bytes("MemTotal:")
	return total, total - min(bytes("MemAvailable:"), total), bytes("Cached:") + bytes("SReclaimable:")
}

// sysctl gives a large number for what is not readable.
func sysctl(name string) int {
	n := 1 << 15
	text, _ := os.ReadFile("/proc/sys/" + name)
	fmt.Sscan(string(text), &n)
	return n
}

// keepResident keeps the pages of the program in memory once they are there. Where processes take all that they may have, and file
// systems in memory hold the rest, those pages are what the kernel can have back at once: without this the daemon was seen to
// stand still for 26 s, fetching them again and again. mlock2(2), Linux 4.4.
func keepResident() {
	const onFault = 1 // MLOCK_ONFAULT: what is not there yet is not fetched for this
	for line := range strings.Lines(readProc("/proc/self/maps")) {
		f := strings.Fields(line)
		if len(f) < 6 || !strings.HasPrefix(f[5], "/") { // no other file is mapped than the program
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 == nil && err2 == nil {
			unix.Syscall(unix.SYS_MLOCK2, uintptr(start), uintptr(end-start), onFault)
		}
	}
}

func totalMemory() uint64 {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return 1 << 30
	}
	return info.Totalram * uint64(info.Unit)
}

// memoryReserve is what of so many bytes of memory is left for the kernel and the agent: an eighth, at most 128 MiB, as with
// agents of today; of a small guest's 56 MiB or a third. With 24 MiB of 192 the agent's own text was evicted, and it stood
// still for 26 s.
func memoryReserve(memory uint64) uint64 { return max(min(memory/8, 128<<20), min(memory/3, 56<<20)) }

// memoryGate keeps content that clients send from taking the reserve. What goes to a file system in memory is charged to the
// agent's own group, which has no limit, and no OOM killer frees it again. Of a disk the kernel takes its cache back by
// itself, so content for it passes. Processes have limits of their own (cgroup.go). The zero gate is open.
type memoryGate struct {
	reserve atomic.Uint64 // bytes that must stay available

	mu     sync.Mutex // protects what follows
	passes uint64     // bytes that may go through before the next look at the memory
	until  time.Time  // when that look is due in any case
}

const (
	gatePeriod = time.Second / 10
	gatePasses = 16 << 20 // bytes, at most
)

// memoryForContent is the one gate of the daemon.
var memoryForContent memoryGate

// admits tells whether so many bytes may be written to the file system of an open file. Of a large file they are pieces, so
// that many who write at once share what there is.
func (g *memoryGate) admits(fd int, bytes int64) bool {
	reserve, wanted := g.reserve.Load(), uint64(bytes)
	if reserve == 0 || bytes <= 0 || !inMemory(fd) {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if now := time.Now(); wanted > g.passes || now.After(g.until) {
		total, used, _ := readMemory()
		if total > 0 && total-used < reserve+wanted {
			return false
		}
		g.passes, g.until = max(min((total-used-reserve)/4, gatePasses), wanted), now.Add(gatePeriod)
	}
	g.passes -= wanted
	return true
}

// inMemory tells whether content of an open file's file system stays in memory for good. An overlay tells the size of its
// upper layer, but not what that is: one that is no larger than the memory counts. A file system may make this hang.
func inMemory(fd int) bool {
	var fs unix.Statfs_t
	if unix.Fstatfs(fd, &fs) != nil {
		return false
	}
	switch int64(fs.Type) {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		return true
	case unix.OVERLAYFS_SUPER_MAGIC:
		return fs.Blocks*uint64(fs.Bsize) <= totalMemory()
	}
	return false
}
