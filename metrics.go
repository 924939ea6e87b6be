// Metrics: GET /metrics tells what the machine has and what of it is used, as JSON for the host, which asks once a second, or
// in Prometheus' text format for who prefers that; and what hands memory back: the guest's page cache where it runs short, envd's own heap
// after a burst.
//
// Figures are read when they are asked for. The share of the CPU needs two readings: it is that of the time since somebody last
// asked, but of half a second at least, so that clients do not disturb each other. Figures of other rooms are given by main.
// Sources: proc_stat(5), proc_meminfo(5), proc_vmstat(5), proc_pid_statm(5), statfs(2). Kernel: 4.13, for OOM kills.

package main

import (
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

type metrics struct {
	others func() []figure

	mu    sync.Mutex // protects what follows
	taken time.Time  // the last sample
	cpus  int        // 0: /proc/stat is not readable
	busy  uint64     // clock ticks
	total uint64     // 0: there is no sample
	share float64    // of the CPU that was used between the last two
}

// figure is a sample in Prometheus' text: a counter if its name ends in _total, else a gauge.
type figure struct {
	name, help string
	value      float64
}

// sample takes one, unless the last one is fresh.
func (m *metrics) sample(now time.Time) (cpus int, share float64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now.Sub(m.taken) >= time.Second/2 {
		busy, total, cpus := readCPU()
		if m.share = 0; m.total > 0 && total > m.total {
			m.share = min(max(float64(int64(busy-m.busy))/float64(total-m.total), 0), 1) // iowait and steal can go back: proc_stat(5)
		}
		m.taken, m.busy, m.total, m.cpus = now, busy, total, cpus
	}
	return m.cpus, m.share
}

// discard forgets the last sample: a pause would count as part of the second that it fell into.
func (m *metrics) discard() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.taken, m.total, m.share = time.Time{}, 0, 0
}

// readCPU sums the time of all CPUs and counts those that are online. The fields behind steal are left out: what virtual
// machines in this one use is in user already.
func readCPU() (busy, total uint64, cpus int) {
	for line := range strings.Lines(readProc("/proc/stat")) {
		fields := strings.Fields(line)
		if !strings.HasPrefix(line, "cpu") {
			break
		} else if fields[0] != "cpu" {
			cpus++
			continue
		}
		for i, field := range fields[1:min(len(fields), 9)] {
			n, _ := strconv.ParseUint(field, 10, 64)
			if total += n; i != 3 && i != 4 { // idle, iowait
				busy += n
			}
		}
	}
	return busy, total, cpus
}

func (m *metrics) serve(w http.ResponseWriter, r *http.Request) {
	cpus, share := m.sample(time.Now())
	memTotal, memUsed, memCache := readMemory()
	var disk unix.Statfs_t
	err := unix.Statfs("/", &disk)
	w.Header().Set("Cache-Control", "no-store")
	if err != nil || cpus == 0 || memTotal == 0 {
		slog.Warn("no metrics", "logger", "metrics", "statfs", err, "stat", cpus > 0, "meminfo", memTotal > 0)
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	diskTotal := disk.Blocks * uint64(disk.Bsize)
	diskUsed := diskTotal - min(disk.Bavail*uint64(disk.Bsize), diskTotal) // with what is kept for root: it is not to be had
	accept := weights(r.Header.Values("Accept"))
	if weightOf(accept, "text/plain") <= weightOf(accept, "application/json") {
		writeJSON(w, map[string]any{"ts": time.Now().Unix(), "cpu_count": cpus, "cpu_used_pct": math.Round(1e4*share) / 100,
			"mem_total_mib": memTotal >> 20, "mem_used_mib": memUsed >> 20, "mem_total": memTotal, "mem_used": memUsed,
			"mem_cache": memCache, "disk_used": diskUsed, "disk_total": diskTotal})
		return
	}
	files, _ := os.ReadDir("/proc/self/fd")
	figures := []figure{
		{"envd_cpus", "CPUs that are online.", float64(cpus)},
		{"envd_cpu_used_ratio", "Share of the time of all CPUs that was used since this was last asked for, 0 to 1.", share},
		{"envd_memory_size_bytes", "Memory of the machine.", float64(memTotal)},
		{"envd_memory_used_bytes", "Memory that is not available to new programs.", float64(memUsed)},
		{"envd_memory_cache_bytes", "Page cache and reclaimable slabs.", float64(memCache)},
		{"envd_disk_size_bytes", "Size of the root file system.", float64(diskTotal)},
		{"envd_disk_used_bytes", "What of it is not available to ordinary users.", float64(diskUsed)},
		{"envd_oom_kills_total", "Processes of the machine that the OOM killer has killed.", float64(procNumber(readProc("/proc/vmstat"), "oom_kill "))},
		{"envd_open_fds", "Open file descriptors of envd.", float64(max(len(files)-1, 0))}, // less the one that lists them
		{"envd_resident_memory_bytes", "Resident memory of envd.", float64(procNumber(readProc("/proc/self/status"), "VmRSS:") << 10)},
	}
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	for _, f := range append(figures, m.others()...) {
		kind := "gauge"
		if strings.HasSuffix(f.name, "_total") {
			kind = "counter"
		}
		fmt.Fprintf(w, "# HELP %s %s\n# TYPE %[1]s %[3]s\n%[1]s %[4]s\n", f.name, f.help, kind, strconv.FormatFloat(f.value, 'f', -1, 64))
	}
}

// reclaimer gives up the page cache and reclaimable slabs while little memory is available; a host can take back what is free.
type reclaimer struct {
	busy    func() bool // a snapshot is being prepared
	next    time.Time
	running atomic.Bool
}

const (
	reclaimEvery = 10 * time.Second
	reclaimAt    = 80 // per cent used
)

// tick is called about once a second. Dropping can take long, so it has a goroutine of its own, one at a time.
func (r *reclaimer) tick(now time.Time) {
	if now.Before(r.next) || r.busy() {
		return
	}
	r.next = now.Add(reclaimEvery)
	total, used, cache := readMemory()
	if total == 0 || used*100/total < reclaimAt || r.busy() || !r.running.CompareAndSwap(false, true) {
		return
	}
	go func() {
		defer r.running.Store(false)
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			slog.Debug("the page cache was not dropped", "logger", "metrics", "error", err)
			return
		}
		_, _, left := readMemory()
		slog.Info("page cache dropped", "logger", "metrics", "used_pct", used*100/total, "freed_mib", int64(cache-left)>>20)
	}()
}

// trimmer gives memory back once the load that needed it is over. The runtime collects when much has been allocated since the last
// time, and at rest nothing is: what a burst left would stay for minutes. The budget tells of a load: something is given back to it
// by every request, stream, connection and watcher that ends. Its threads do stay: Go ends who needs one and gets none.
type trimmer struct {
	budget    *budget
	seen      int64  // times that something was given back
	due       bool   // there was a load since the last look at rest
	allocated uint64 // bytes, since the start
	kept      uint64 // bytes, by the last trim, or less
	keptUse   int64  // bytes of the budget that were in use then
}

const (
	trimAbove = 2 << 20 // bytes
	restBelow = 1 << 20 // bytes allocated in a second
)

// tick is called about once a second. To look stops the world and wakes a thread, which at rest nothing is to do.
func (t *trimmer) tick(time.Time) {
	used, returns := t.budget.inUse()
	t.due, t.seen = t.due || returns != t.seen, returns
	if t.keptUse > 0 && 2*used <= t.keptUse { // what was kept was theirs
		t.kept, t.keptUse = 0, used
	}
	if !t.due {
		return
	}
	allocated, held := readHeap()
	t.due = allocated-t.allocated >= restBelow
	t.allocated, t.kept = allocated, min(t.kept, held)
	if !t.due && held > t.kept+trimAbove {
		runtime.GC() // pools drop what they hold at the second collection
		debug.FreeOSMemory()
		t.keptUse = used
		_, t.kept = readHeap()
	}
}

func readHeap() (allocated, held uint64) {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc, m.HeapInuse + m.HeapIdle - m.HeapReleased
}
