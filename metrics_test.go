// GET /metrics against the kernel's own figures, read at the same time or made up and mounted in their place; and the
// reclaimer. What Prometheus' own parser says of the text is tested in e2e.

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func init() { testRoles["reclaim"], testRoles["cpu-share"] = reclaimRole, cpuShareRole }

// metrics asks for the JSON, whose values are all numbers.
func (d *daemon) metrics(t testing.TB) map[string]float64 {
	t.Helper()
	got := d.request(t, "GET", "/metrics", "")
	values := map[string]float64{}
	if err := json.Unmarshal([]byte(got.body), &values); err != nil || got.status != 200 {
		t.Fatalf("/metrics: %d %q: %v", got.status, got.body, err)
	}
	return values
}

// sample asks for one figure of the Prometheus text.
func (d *daemon) sample(t testing.TB, name string) float64 {
	t.Helper()
	got := d.request(t, "GET", "/metrics", "", "Accept", "text/plain")
	for line := range strings.Lines(got.body) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no %s in %d %q", name, got.status, got.body)
	return 0
}

// kernelFigures reads with the tools of others what /metrics must tell.
func kernelFigures(t testing.TB) map[string]float64 {
	t.Helper()
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	kib := map[string]float64{}
	for line := range strings.Lines(string(text)) {
		var name string
		var n float64
		fmt.Sscanf(line, "%s %f", &name, &n)
		kib[strings.TrimSuffix(name, ":")] = n
	}
	var disk unix.Statfs_t
	if err := unix.Statfs("/", &disk); err != nil {
		t.Fatal(err)
	}
	size, total, used := float64(disk.Bsize), kib["MemTotal"]*1024, (kib["MemTotal"]-kib["MemAvailable"])*1024
	return map[string]float64{"mem_total": total, "mem_used": used, "mem_cache": (kib["Cached"] + kib["SReclaimable"]) * 1024,
		"mem_total_mib": float64(int(total) >> 20), "mem_used_mib": float64(int(used) >> 20),
		"disk_total": float64(disk.Blocks) * size, "disk_used": float64(disk.Blocks-disk.Bavail) * size,
		"cpu_count": float64(onlineCPUs(t)), "ts": float64(time.Now().Unix())}
}

func onlineCPUs(t testing.TB) int {
	t.Helper()
	text, err := os.ReadFile("/sys/devices/system/cpu/online") // such as 0-3,6
	if err != nil {
		return runtime.NumCPU()
	}
	n := 0
	for _, part := range strings.Split(strings.TrimSpace(string(text)), ",") {
		first, last, isRange := strings.Cut(part, "-")
		if n++; isRange {
			n += atoi(t, last) - atoi(t, first)
		}
	}
	return n
}

// Each figure lies between what the kernel says before the request and after it. Others use the machine meanwhile, so that
// a figure may go up and down between the two: then it is asked again. A wrong formula is wrong each time.
func TestMetricsValues(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	got := d.request(t, "GET", "/metrics", "")
	if got.status != 200 || got.header.Get("Content-Type") != "application/json" || got.header.Get("Cache-Control") != "no-store" {
		t.Errorf("%d, %v", got.status, got.header)
	}
	open := []string{"ts", "cpu_count", "mem_total_mib", "mem_used_mib", "mem_total", "mem_used", "mem_cache", "disk_used", "disk_total"}
	for range 500 {
		before, answer, after := kernelFigures(t), d.metrics(t), kernelFigures(t)
		if keys := slices.Sorted(maps.Keys(answer)); len(keys) != len(before)+1 {
			t.Fatalf("keys %q", keys)
		}
		if pct, ok := answer["cpu_used_pct"]; !ok || pct < 0 || pct > 100 {
			t.Fatalf("cpu_used_pct %v", pct)
		}
		open = slices.DeleteFunc(open, func(key string) bool {
			return answer[key] >= min(before[key], after[key]) && answer[key] <= max(before[key], after[key])
		})
		if len(open) == 0 {
			return
		}
	}
	t.Errorf("never as the kernel says: %q; %v, want %v", open, d.metrics(t), kernelFigures(t))
}

// statText is a /proc/stat of so many CPUs; the first line is padded, for poke.
func statText(cpus int, times ...int) string {
	text := fmt.Sprintf("cpu  %-120s\n", strings.Trim(fmt.Sprint(times), "[]"))
	for i := range cpus {
		text += fmt.Sprintf("cpu%d %s\n", i, "1 2 3 4 5 6 7 8 9 10")
	}
	return text + "intr 1 2 3\nctxt 99\nprocs_running 1\n"
}

// The sampler at work, on a file as large as that of a machine with 512 CPUs.
func TestMetricsSampler(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemonWith(t, daemonConfig{files: map[string]string{"/proc/stat": statText(512, 10, 0, 0, 10, 0, 0, 0, 0, 0, 0)}})
	if got := d.metrics(t); got["cpu_used_pct"] != 0 || got["cpu_count"] != 512 {
		t.Errorf("before the second sample: %v", got)
	}
	poke(t, filepath.Join(filepath.Dir(d.runDir), "stat"), statText(512, 11, 0, 0, 13, 0, 0, 0, 0, 0, 0))
	for _, pct := range []float64{25, 0} { // one sample sees it, in the next one nothing has moved
		waitFor(t, 3*time.Second, fmt.Sprintf("cpu_used_pct %v", pct), func() bool { return d.metrics(t)["cpu_used_pct"] == pct })
	}
}

// poke overwrites a file in one piece with a text of the same length, so that no reader sees half of it.
func poke(t testing.TB, file, text string) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(text), 0); err != nil {
		t.Fatal(err)
	}
}

// inRole runs the helper with files of the test's own mounted over the kernel's.
func inRole(t *testing.T, role string, mounts map[string]string) {
	t.Helper()
	needRoot(t)
	config := daemonConfig{files: map[string]string{"/proc/version": ""}} // asks for a mount namespace
	args := []string{role}
	for _, target := range slices.Sorted(maps.Keys(mounts)) {
		config.steps = append(config.steps, "mount", mounts[target]+":"+target)
		args = append(args, mounts[target])
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := prepared(t, publicDir(t), config, helperBinary(t), args)
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	out, err := cmd.CombinedOutput()
	if strings.Contains(string(out), cannotPrepare) {
		t.Skipf("needs what this machine lacks: %s", out)
	} else if err != nil || !strings.Contains("\n"+string(out), "\nas promised\n") {
		t.Errorf("%v: %s", err, out)
	}
}

func roleFails(format string, a ...any) {
	fmt.Printf(format+"\n", a...)
	os.Exit(1)
}

func TestMetricsCPUShare(t *testing.T) {
	t.Parallel()
	inRole(t, "cpu-share", map[string]string{"/proc/stat": writeFile(t, filepath.Join(publicDir(t), "stat"), "", 0o644)})
}

func cpuShareRole(args []string) {
	m, now := &metrics{}, time.Now()
	sum := [10]int{1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000}
	for i, step := range []struct {
		add  [10]int // to user nice system idle iowait irq softirq steal guest guest_nice
		want float64
	}{
		{[10]int{}, 0}, // the first one
		{[10]int{1, 2, 3, 81, 9, 1, 1, 2, 50, 50}, 10},
		{[10]int{0, 0, 0, 100, 0, 0, 0, 0, 0, 0}, 0},
		{[10]int{0, 0, 1, 2, 0, 0, 0, 0, 0, 0}, 33.33},
		{[10]int{0, 0, 2, 1, 0, 0, 0, 0, 0, 0}, 66.67},
		{[10]int{100, 0, 0, 0, 0, 0, 0, 0, 100, 0}, 100},
		{[10]int{0, 0, 0, 0, 77, 0, 0, 0, 0, 0}, 0},
		{[10]int{0, 0, 0, 0, 0, 0, 0, 40, 0, 0}, 100},
		{[10]int{50, 0, 0, 0, -20, 0, 0, 0, 0, 0}, 100}, // iowait went back
		{[10]int{-50, 0, 0, 80, 0, 0, 0, 0, 0, 0}, 0},   // busy did
		{[10]int{0, 0, 0, -500, 0, 0, 0, 0, 0, 0}, 0},   // all of it
		{[10]int{}, 0}, // no time has passed
		{[10]int{0, 0, 30, 60, 10, 0, 0, 0, 0, 0}, 30},
		{[10]int{1, 0, 0, 19999, 0, 0, 0, 0, 0, 0}, 0.01}, // rounded up
	} {
		for i, n := range step.add {
			sum[i] += n
		}
		if err := os.WriteFile(args[0], []byte(statText(3, sum[:]...)), 0); err != nil {
			roleFails("%v", err)
		}
		now = now.Add(time.Second / 2)
		if m.sample(now); math.Round(1e4*m.share)/100 != step.want || m.cpus != 3 {
			roleFails("step %d: %v of %d CPUs, want %v %% of 3", i, m.share, m.cpus, step.want)
		}
	}
	// After a restore the first sample only begins a new row.
	m.discard()
	for _, want := range []float64{0, 0, 0.5} {
		if m.share != want {
			roleFails("after the restore: %v, want %v", m.share, want)
		}
		sum[0], sum[3] = sum[0]+10, sum[3]+10
		os.WriteFile(args[0], []byte(statText(3, sum[:]...)), 0)
		now = now.Add(time.Second / 2)
		m.sample(now)
	}
	m.sample(now.Add(time.Second/2 - 1)) // is none
	if m.share != 0.5 {
		roleFails("soon after: %v", m.share)
	}
	fmt.Println("as promised")
}

// With a busy loop for each CPU nothing is idle: one tick of 100 a second and CPU may fall on either side of a sample.
func TestMetricsBusyLoop(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	for range onlineCPUs(t) {
		d.start(t, argv("nice", "-n", "19", "sh", "-c", "while :; do :; done"))
	}
	waitFor(t, 10*time.Second, "all CPUs busy", func() bool { return d.metrics(t)["cpu_used_pct"] >= 98 })
	for range 10 { // several clients do not disturb each other: a share of no time would be 0
		if pct := d.metrics(t)["cpu_used_pct"]; pct < 90 {
			t.Errorf("cpu_used_pct %v, right after another poll", pct)
		}
	}
}

func TestMetricsAccept(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	const text, inJSON = "text/plain; version=0.0.4; charset=utf-8", "application/json"
	for accept, want := range map[string]string{
		"":                                   inJSON,
		"*/*":                                inJSON,
		"application/json":                   inJSON,
		"text/plain":                         text,
		"TEXT/Plain ; Q=0.5":                 text,
		"text/*":                             text,
		"text/plain;version=0.0.4":           text,
		"text/plain, application/json":       inJSON,
		"application/json, text/plain, */*":  inJSON,
		"text/plain, */*":                    inJSON, // both 1
		"text/plain, */*;q=0.9":              text,
		"text/plain;q=0.5, */*;q=0.5":        inJSON,
		"text/plain;q=0.4, */*;q=0.5":        inJSON,
		"text/*;q=0.5, application/*;q=0.4":  text,
		"text/*, text/plain;q=0.1, */*;q=.2": inJSON, // the closest range decides
		"*/*, application/json;q=0.5":        text,
		"*/*;q=0.5, application/json":        inJSON,
		"text/plain;q=0":                     inJSON,
		"text/plain;q=0, */*":                inJSON,
		"text/plain;q=oops":                  text, // as if it were not there
		"text/html":                          inJSON,
		"text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8": inJSON, // a browser
		"application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5," +
			"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2": text, // Prometheus 3
		"application/openmetrics-text; version=0.0.1,text/plain;version=0.0.4;q=0.5,*/*;q=0.1": text, // Prometheus 2
		",,;q,;=": inJSON,
	} {
		headers := argv("Accept", accept)
		if accept == "" {
			headers = nil
		}
		got := d.request(t, "GET", "/metrics", "", headers...)
		if got.status != 200 || got.header.Get("Content-Type") != want || got.header.Get("Cache-Control") != "no-store" {
			t.Errorf("Accept: %s: %d %q, want %q", accept, got.status, got.header.Get("Content-Type"), want)
		}
	}
	// Two lines are as good as one.
	request, _ := http.NewRequest("GET", d.url+"/metrics", nil)
	request.Header["Accept"] = argv("*/*;q=0.1", "text/plain")
	if got := d.do(t, request); got.header.Get("Content-Type") != text {
		t.Errorf("two lines of Accept: %q", got.header.Get("Content-Type"))
	}
}

func TestMetricsUnreadable(t *testing.T) {
	t.Parallel()
	needRoot(t)
	for file, content := range map[string]string{"/proc/meminfo": "", "/proc/stat": "", "/proc/stat ": "garbage\n"} {
		d := startDaemonWith(t, daemonConfig{files: map[string]string{strings.TrimSpace(file): content}})
		for _, accept := range []string{"application/json", "text/plain"} {
			got := d.request(t, "GET", "/metrics", "", "Accept", accept)
			if got.status != 500 || got.body != "" || got.header.Get("Cache-Control") != "no-store" {
				t.Errorf("without %s: %d %q %v, want 500 and nothing", file, got.status, got.body, got.header)
			}
		}
		d.healthy(t)
	}
	// It comes back when the source does.
	d := startDaemonWith(t, daemonConfig{files: map[string]string{"/proc/stat": ""}})
	writeFile(t, filepath.Join(filepath.Dir(d.runDir), "stat"), "cpu  1 1 1 1 1 1 1 1 1 1\ncpu0 1 1 1 1 1 1 1 1 1 1\n", 0o644)
	waitFor(t, 5*time.Second, "metrics again", func() bool { return d.request(t, "GET", "/metrics", "").status == 200 })
}

func TestMetricsCounters(t *testing.T) {
	t.Parallel()
	needRoot(t)
	d := startDaemonWith(t, daemonConfig{args: argv("--output-buffer", "65536", "--resume-grace", "10ms"),
		files: map[string]string{"/proc/vmstat": "nr_free_pages 5\noom_kill_disable 9\noom_kill 7\nhtlb 1\n"}})
	want := func(when string, figures map[string]float64) {
		t.Helper()
		for name, value := range figures {
			waitFor(t, 5*time.Second, fmt.Sprintf("%s is %v %s", name, value, when), func() bool { return d.sample(t, name) == value })
		}
	}
	none := map[string]float64{"envd_processes_running": 0, "envd_streams_open": 0, "envd_output_lost_bytes_total": 0, "envd_oom_kills_total": 7}
	want("at first", none)
	first := d.start(t, argv("sleep", "1000"))
	second := d.start(t, sh("read x; head -c 1000000 /dev/zero; exec sleep 1000"))
	follower := d.connect(t, byPid(second.pid))
	want("with two processes and three streams", map[string]float64{"envd_processes_running": 2, "envd_streams_open": 3})
	waitFor(t, 5*time.Second, "as many descriptors as /proc says", func() bool {
		before, told, after := len(d.fds()), d.sample(t, "envd_open_fds"), len(d.fds())
		return before == after && told == float64(after)
	})
	if told, has := d.sample(t, "envd_resident_memory_bytes"), d.rss(); told < float64(has)/2 || told > float64(has)*2 {
		t.Errorf("resident memory %v, /proc says %d", told, has) // the answer itself takes some
	}

	follower.drop()
	second.drop()
	want("after two clients left", map[string]float64{"envd_processes_running": 2, "envd_streams_open": 1, "envd_output_lost_bytes_total": 0})
	time.Sleep(20 * time.Millisecond) // the grace of those who may come back
	if err := d.sendStdin(t, byPid(second.pid), "\n"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 5*time.Second, "output lost", func() bool {
		return 1_000_000-d.sample(t, "envd_output_lost_bytes_total") <= 128<<10+65536 // all that is kept is a chunk too many
	})
	lost := d.sample(t, "envd_output_lost_bytes_total")
	back := d.connect(t, byPid(second.pid))
	if told := back.header.Get("Envd-Output-Lost"); told != fmt.Sprint(lost) {
		t.Errorf("%v bytes lost, the client is told %s", lost, told)
	}
	back.drop()

	first.drop()
	for _, pid := range []uint32{first.pid, second.pid} {
		d.kill(t, pid)
	}
	none["envd_output_lost_bytes_total"] = lost
	want("at last", none)
}

// The reclaimer, with a memory that is made up and a FIFO in place of the kernel's file, so that a write to it hangs.
func TestReclaimer(t *testing.T) {
	t.Parallel()
	base := publicDir(t)
	fifo := filepath.Join(base, "drop_caches")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	inRole(t, "reclaim", map[string]string{"/proc/meminfo": writeFile(t, filepath.Join(base, "meminfo"), "", 0o644),
		"/proc/sys/vm/drop_caches": fifo})
}

func reclaimRole(args []string) {
	memory := func(available int) {
		if err := os.WriteFile(args[0], fmt.Appendf(nil, "MemTotal: 1000 kB\nMemAvailable: %d kB\nCached: 10 kB\n", available), 0); err != nil {
			roleFails("%v", err)
		}
	}
	busy := false
	r := &reclaimer{busy: func() bool { return busy }}
	now := time.Now()
	// dropped tells whether a tick makes somebody write to the FIFO, and waits for the end of that.
	dropped := func() bool {
		r.tick(now)
		if !r.running.Load() {
			return false
		}
		text, err := os.ReadFile(args[1]) // until the writer has closed it
		if err != nil || string(text) != "3" {
			roleFails("written: %q, %v", text, err)
		}
		for r.running.Load() {
			time.Sleep(time.Millisecond)
		}
		return true
	}
	for i, step := range []struct {
		after     time.Duration
		available int
		busy      bool
		want      bool
	}{
		{0, 201, false, false}, // 79.9 % are 79
		{5 * time.Second, 200, false, false},
		{5 * time.Second, 200, false, true},
		{9 * time.Second, 0, false, false},
		{time.Second, 0, false, true},
		{10 * time.Second, 0, true, false},
		{time.Second, 0, false, true}, // as soon as it may
		{9 * time.Second, 0, false, false},
		{time.Second, 1000, false, false},
	} {
		memory(step.available)
		busy, now = step.busy, now.Add(step.after)
		if got := dropped(); got != step.want {
			roleFails("step %d: dropped %v, want %v", i, got, step.want)
		}
	}
	// One that hangs is not followed by another, and holds up nobody.
	memory(0)
	for range 5 {
		now = now.Add(10 * time.Second)
		r.tick(now)
	}
	if !r.running.Load() {
		roleFails("nothing was dropped")
	}
	fd, err := unix.Open(args[1], unix.O_RDONLY, 0) // lets it go on
	var buf [16]byte
	total := 0
	for n := 1; err == nil && n > 0; total += max(n, 0) {
		n, err = unix.Read(fd, buf[:])
	}
	if err != nil || total != 1 {
		roleFails("%d bytes were written, %v; want 1", total, err)
	}
	fmt.Println("as promised")
}

// TestMemoryIsHandedBack: seconds after a burst the daemon has little more memory than after one of its requests.
func TestMemoryIsHandedBack(t *testing.T) {
	if raceEnabled() {
		t.Skip("the race detector's memory is its own")
	}
	d := startDaemon(t)
	dir := publicDir(t)
	shell(t, dir, `for i in $(seq 3000); do echo > $i; done; head -c 20000000 /dev/zero | tr '\0' x > text; head -c 20000000 /dev/urandom > noise`)
	one := func() {
		d.request(t, "POST", "/filesystem.Filesystem/ListDir", `{"path":"`+dir+`","depth":1}`, "Content-Type", "application/json")
		d.request(t, "GET", "/files?username=root&path="+dir+"/text", "", "Accept-Encoding", "gzip")
		d.run(t, argv("true"))
	}
	burst := func() {
		var clients sync.WaitGroup
		for range 24 {
			clients.Go(one)
		}
		clients.Wait()
	}
	one() // the code is in memory from here on
	before := d.rss()
	var peak int64
	for range 3 {
		burst()
		peak = max(peak, d.rss())
	}
	// The last ones hold theirs for a while in which little is allocated, which looks like rest.
	var stalled []*http.Response
	for range 24 {
		request, _ := http.NewRequestWithContext(t.Context(), "GET", d.url+"/files?username=root&path="+dir+"/noise", nil)
		request.Header.Set("Accept-Encoding", "gzip")
		response, err := d.http.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		stalled = append(stalled, response)
	}
	time.Sleep(3 * time.Second)
	for _, response := range stalled {
		io.Copy(io.Discard, response.Body)
	}
	d.http.CloseIdleConnections()
	const allowed = 3 << 20 // beside what one of each kind of request leaves
	defer func() { t.Logf("RSS %d KiB before, %d after the burst, %d now", before>>10, peak>>10, d.rss()>>10) }()
	waitFor(t, 8*time.Second, "memory to be handed back", func() bool { return d.rss() < before+allowed })
	if peak < before+2*allowed {
		t.Errorf("the burst took no more than %d KiB", peak>>10)
	}
}
