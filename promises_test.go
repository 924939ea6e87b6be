// Promises P2 to P5: no exit status is lost, killed means gone, a command returns when it ends, memory and everything
// else that is counted stays bounded. (P1: resume_test.go. What must not hang: hang_test.go.)

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

func init() {
	testRoles["burn"] = burn
}

// burn is a role: it uses MEMORY bytes and MILLISECONDS of CPU time, then exits with STATUS.
func burn(args []string) {
	memory, _ := strconv.Atoi(args[0])
	milliseconds, _ := strconv.Atoi(args[1])
	status, _ := strconv.Atoi(args[2])
	touched := make([]byte, memory)
	var usage syscall.Rusage
	for i := 0; ; i += 4096 {
		touched[i%memory]++
		if i%(64*4096) == 0 {
			syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
			if i >= memory && time.Duration(usage.Utime.Nano()) >= time.Duration(milliseconds)*time.Millisecond {
				os.Exit(status)
			}
		}
	}
}

// sendLine makes a process that reads lines go on.
func (d *daemon) sendLine(t *testing.T, pid uint32) {
	t.Helper()
	if err := d.sendStdin(t, byPid(pid), "\n"); err != nil {
		t.Fatal(err)
	}
}

func (d *daemon) waitEnded(t *testing.T, pid uint32) {
	t.Helper()
	waitFor(t, 10*time.Second, fmt.Sprintf("process %d has ended", pid), func() bool { return d.listed(t, pid) == nil })
}

// knows tells whether Connect still finds a process.
func (d *daemon) knows(t *testing.T, selector *pb.ProcessSelector) bool {
	t.Helper()
	s, err := d.openConnect(t, selector)
	if err == nil {
		defer s.drop()
		if s.next() != nil {
			return true
		}
		err = s.failure()
	}
	if connect.CodeOf(err) != connect.CodeNotFound {
		t.Fatalf("Connect: %v, want not_found", err)
	}
	return false
}

// ---- P2 -------------------------------------------------------------------------------------------------------------

func TestExitStatusAfterTheStreamWasDropped(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh("echo early; read x; echo late; echo err >&2; exit 7"), withTag("tagged"))
	s.readUntil(t, "early\n")
	s.drop()
	d.sendLine(t, s.pid)
	d.waitEnded(t, s.pid)
	for i, selector := range []*pb.ProcessSelector{byPid(s.pid), byPid(s.pid), byTag("tagged")} {
		r := d.connect(t, selector, withOutputFrom("all")).collect()
		if r.pid != s.pid || string(r.stdout) != "early\nlate\n" || string(r.stderr) != "err\n" || r.ends != 1 ||
			r.err != nil {
			t.Errorf("Connect number %d: pid %d, stdout %q, stderr %q, %d ends, %v", i, r.pid, r.stdout, r.stderr, r.ends, r.err)
		}
		wantEnd(t, r.end, 7, true, "exit status 7")
	}
}

// Without being asked, by any word of the header but 1, `end` has no field that other agents do not send.
func TestEndWithoutExtensions(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	no, empty := withHeader("Envd-Extensions", "0"), withHeader("Envd-Extensions", "")
	for _, options := range [][]callOption{nil, {no}, {empty}} {
		r := d.run(t, sh("sleep 1000 & kill -9 $$"), options...)
		end := r.end
		if end.Signal != 0 || end.OomKilled || end.CpuUserUs != 0 || end.CpuSystemUs != 0 || end.MaxRssBytes != 0 ||
			end.StartTime != nil || end.EndTime != nil || end.OutputOpen || len(end.ProtoReflect().GetUnknown()) != 0 {
			t.Errorf("end is %v", end)
		}
	}
}

func TestExtensions(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	const memory = 96 << 20 // above the daemon's own
	before := time.Now()
	r := d.run(t, argv(helperBinary(t), "burn", fmt.Sprint(memory), "300", "3"), withExtensions())
	after := time.Now()
	wantEnd(t, r.end, 3, true, "exit status 3")
	end := r.end
	if end.Signal != 0 || end.OomKilled || end.OutputOpen {
		t.Errorf("end is %v", end)
	}
	if end.CpuUserUs < 280_000 || end.CpuUserUs > 3_000_000 || end.CpuSystemUs > 2_000_000 {
		t.Errorf("CPU time %d and %d us, want some 300 ms and little", end.CpuUserUs, end.CpuSystemUs)
	}
	// The kernel hands the peak of whoever starts a program on to it, so that this test's own may hide the child's.
	var own syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &own)
	hidden := end.MaxRssBytes == 0 && own.Maxrss<<10 >= memory
	if (end.MaxRssBytes < memory || end.MaxRssBytes > 4*memory) && !hidden {
		t.Errorf("max_rss_bytes %d, want a little more than %d", end.MaxRssBytes, memory)
	}
	const slack = 20 * time.Millisecond // the kernel's coarse clocks
	started, ended := end.StartTime.AsTime(), end.EndTime.AsTime()
	if started.Before(before.Add(-slack)) || ended.After(after.Add(slack)) || ended.Sub(started) < 250*time.Millisecond {
		t.Errorf("ran from %v to %v, want something within %v and %v", started, ended, before, after)
	}

	// The peak of a small command must not be that of the daemon, which a vforked child inherits.
	end = d.run(t, argv("/bin/true"), withExtensions()).end
	if end.MaxRssBytes > 8<<20 || end.CpuUserUs+end.CpuSystemUs > 500_000 {
		t.Errorf("/bin/true: %v", end)
	}

	for _, test := range []struct {
		signal pb.Signal
		status string
	}{{pb.Signal_SIGNAL_SIGKILL, "signal: killed"}, {pb.Signal_SIGNAL_SIGTERM, "signal: terminated"}} {
		s := d.start(t, argv("/bin/sleep", "1000"), withExtensions())
		if err := d.signal(t, byPid(s.pid), test.signal); err != nil {
			t.Fatal(err)
		}
		r := s.collect()
		wantEnd(t, r.end, -1, false, test.status)
		if r.end.GetSignal() != int32(test.signal) || r.end.GetOutputOpen() {
			t.Errorf("after %v: %v", test.signal, r.end)
		}
		late := d.connect(t, byPid(s.pid), withExtensions()).collect().end
		if late.GetSignal() != int32(test.signal) || !late.GetEndTime().AsTime().Equal(r.end.GetEndTime().AsTime()) {
			t.Errorf("later: %v, at first: %v", late, r.end)
		}
		if plain := d.connect(t, byPid(s.pid)).collect().end; plain.GetSignal() != 0 || plain.GetEndTime() != nil {
			t.Errorf("a client that did not ask: %v", plain)
		}
	}
}

func TestRetentionByCount(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--retain-count", "3")
	tag := func(i int) string { return fmt.Sprintf("number-%d", i) }
	for i := range 6 {
		d.run(t, sh(fmt.Sprintf("exit %d", i)), withTag(tag(i)))
	}
	for i := range 6 {
		if got, want := d.knows(t, byTag(tag(i))), i >= 3; got != want {
			t.Errorf("process number %d of 6 known: %v, want %v", i, got, want)
		}
	}
	r := d.connect(t, byTag(tag(3))).collect()
	wantEnd(t, r.end, 3, true, "exit status 3")
}

func TestRetentionByTime(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--retain-time", "1s")
	start := time.Now()
	pid := d.run(t, argv("/bin/false")).pid
	ended := time.Now()
	if !d.knows(t, byPid(pid)) && time.Since(start) < time.Second {
		t.Error("forgotten at once")
	}
	waitFor(t, 10*time.Second, "forgotten", func() bool { return !d.knows(t, byPid(pid)) })
	if kept := time.Since(start); kept < time.Second {
		t.Errorf("forgotten after %v", kept)
	}
	if kept := time.Since(ended); kept > 3*time.Second {
		t.Errorf("forgotten only after %v", kept)
	}
}

func TestReusedTag(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	first := d.run(t, sh("exit 1"), withTag("same"))
	second := d.start(t, sh("read x; exit 2"), withTag("same"))
	now := d.connect(t, byTag("same"))
	if now.pid != second.pid {
		t.Errorf("Connect by a reused tag: pid %d, want the running %d, not the ended %d", now.pid, second.pid, first.pid)
	}
	d.sendLine(t, second.pid)
	wantEnd(t, now.collect().end, 2, true, "exit status 2")
}

// The output of ended processes has a budget for all of them; the oldest pay first, and it is told.
func TestEndedOutputBudget(t *testing.T) {
	t.Parallel()
	const budget, each = 256 << 10, 100_000
	d := startDaemon(t, "--output-ended", fmt.Sprint(budget))
	var pids []uint32
	for i := range 6 {
		r := d.run(t, argv(helperBinary(t), "pattern", fmt.Sprint(i), fmt.Sprint(each), "/dev/null"), withStdin(false))
		pids = append(pids, r.pid)
	}
	kept := 0
	for i, pid := range pids {
		r := d.connect(t, byPid(pid), withOutputFrom("all")).collect()
		offset, _ := strconv.ParseInt(r.header.Get("Envd-Output-Offset"), 10, 64)
		wantOffset(t, r.header, offset, offset)
		if !bytes.Equal(r.stdout, pattern(uint64(i), each)[offset:]) || r.err != nil {
			t.Errorf("process %d: %d bytes from %d on, %v", i, len(r.stdout), offset, r.err)
		}
		wantEnd(t, r.end, 0, true, "exit status 0")
		if i == 0 && len(r.stdout) > 0 {
			t.Errorf("the oldest still has %d bytes", len(r.stdout))
		}
		if i == len(pids)-1 && offset != 0 {
			t.Errorf("the newest lost %d bytes", offset)
		}
		kept += len(r.stdout)
	}
	if kept > budget || kept < each {
		t.Errorf("%d bytes kept, the budget is %d", kept, budget)
	}
	t.Logf("%d of %d bytes kept with a budget of %d", kept, 6*each, budget)
}

// ---- P3 -------------------------------------------------------------------------------------------------------------

// Each process of the tree prints its name and its pid.
const treeScript = `
sleep 1000 & echo plain $!
sh -c 'sleep 1000 & echo nested $!; wait' &
setsid sh -c 'echo session $$; exec sleep 1000' &
setsid sh -c 'sh -c "echo orphan \$\$; exec sleep 1000" & exit' &
echo shell $$
wait
`

// startTree starts the tree and answers its pids by name.
func startTree(t *testing.T, d *daemon, script string, names int, options ...callOption) (s *clientStream,
	tree map[string]int) {
	t.Helper()
	s, tree = d.start(t, sh(script), options...), map[string]int{}
	s.read(t, "the pids of the tree", func(r *runResult) bool {
		if !bytes.HasSuffix(r.stdout, []byte("\n")) {
			return false
		}
		for line := range strings.Lines(string(r.stdout)) {
			name, pid, _ := strings.Cut(strings.TrimSpace(line), " ")
			tree[name] = atoi(t, pid)
		}
		return len(tree) == names
	})
	return s, tree
}

func survivors(tree map[string]int) (names []string) {
	for name, pid := range tree {
		if isAlive(pid) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func TestKilledMeansGone(t *testing.T) {
	t.Parallel()
	const names = 5
	kills := map[string]func(t *testing.T, d *daemon, s *clientStream) (status string){
		"SIGKILL": func(t *testing.T, d *daemon, s *clientStream) string {
			d.kill(t, s.pid)
			return "signal: killed"
		},
		"SIGTERM": func(t *testing.T, d *daemon, s *clientStream) string {
			if err := d.signal(t, byPid(s.pid), pb.Signal_SIGNAL_SIGTERM); err != nil {
				t.Fatal(err)
			}
			return "signal: terminated"
		},
		"timeout": func(t *testing.T, d *daemon, s *clientStream) string { return "" },
	}
	for name, kill := range kills {
		for _, cgroups := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, cgroups %v", name, cgroups), func(t *testing.T) {
				t.Parallel()
				start := startDaemonNoCgroups
				if cgroups {
					if cgroupMount() == "" || os.Geteuid() != 0 {
						t.Skip("needs cgroup v2: no hierarchy that this user may write to")
					}
					start = startDaemon
				}
				d := start(t)
				var options []callOption
				if name == "timeout" {
					options = append(options, withTimeoutMs(1000))
				}
				s, tree := startTree(t, d, treeScript, names, options...)
				if cgroups && len(cgroupProcesses(d.cgroup)) < names {
					t.Errorf("only %v in the leaf, want at least %v", cgroupProcesses(d.cgroup), tree)
				}
				begin := time.Now()
				status := kill(t, d, s)
				r := s.collect()
				if name == "timeout" {
					if connect.CodeOf(r.err) != connect.CodeDeadlineExceeded || r.ends != 0 {
						t.Errorf("%v, %d ends, want deadline_exceeded", r.err, r.ends)
					}
				} else {
					wantEnd(t, r.end, -1, false, status)
					if took := time.Since(begin); took > time.Second {
						t.Errorf("`end` came %v after %s", took, name)
					}
				}
				if cgroups {
					waitFor(t, time.Second, fmt.Sprintf("no survivors of %v", tree), func() bool {
						return len(survivors(tree)) == 0 && len(cgroupProcesses(d.cgroup)) == 0
					})
					return
				}
				// Without cgroups the process group is what there is; those who left it live on.
				waitFor(t, time.Second, fmt.Sprintf("no survivors in the group of %v", tree), func() bool {
					left := survivors(tree)
					return !slices.Contains(left, "shell") && !slices.Contains(left, "plain") && !slices.Contains(left, "nested")
				})
				if left := survivors(tree); !slices.Equal(left, []string{"orphan", "session"}) {
					t.Errorf("%v live on; these tests think that setsid leaves a process group", left)
				}
				for _, name := range survivors(tree) {
					syscall.Kill(tree[name], syscall.SIGKILL)
				}
			})
		}
	}
}

// A leader is gone, its children are not: a signal to its pid or tag still reaches them where there is a leaf. Without
// one the process group is not signalled any more: its number may be another's by now.
func TestSignalAfterTheLeaderIsGone(t *testing.T) {
	t.Parallel()
	for _, signal := range []pb.Signal{pb.Signal_SIGNAL_SIGTERM, pb.Signal_SIGNAL_SIGKILL} {
		t.Run(signal.String(), func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t)
			if d.cgroup == "" {
				t.Skip("needs cgroup v2: no hierarchy that this user may write to")
			}
			const script = "sleep 1000 & echo plain $!; setsid sh -c 'echo session $$; exec sleep 1000' & sleep 0.1"
			s, tree := startTree(t, d, script, 2, withTag("gone"), withExtensions())
			r := s.collect()
			wantEnd(t, r.end, 0, true, "exit status 0")
			if !r.end.GetOutputOpen() {
				t.Error("output_open is false although children hold the pipes")
			}
			if left := survivors(tree); len(left) != 2 {
				t.Fatalf("%v live on behind their leader, want all of %v", left, tree)
			}
			d.run(t, argv("/bin/true")) // whatever is reaped or reused meanwhile
			if err := d.signal(t, byTag("gone"), signal); err != nil {
				t.Errorf("%v to what is left: %v", signal, err)
			}
			waitFor(t, time.Second, fmt.Sprintf("no survivors of %v", tree), func() bool { return len(survivors(tree)) == 0 })
			waitFor(t, time.Second, "not_found for a signal to nobody", func() bool {
				err := d.signal(t, byPid(s.pid), signal)
				return err != nil && connect.CodeOf(err) == connect.CodeNotFound
			})
		})
	}
	t.Run("without cgroups", func(t *testing.T) {
		t.Parallel()
		d := startDaemonNoCgroups(t)
		s, tree := startTree(t, d, "sleep 1000 & echo plain $!", 1)
		wantEnd(t, s.collect().end, 0, true, "exit status 0")
		err := d.signal(t, byPid(s.pid), pb.Signal_SIGNAL_SIGKILL)
		if err == nil || connect.CodeOf(err) != connect.CodeNotFound {
			t.Errorf("a signal to a leader that is gone: %v, want not_found", err)
		}
		if len(survivors(tree)) != 1 {
			t.Error("a process group was signalled whose leader had been reaped")
		}
		syscall.Kill(tree["plain"], syscall.SIGKILL)
	})
}

// A background process must not get a signal that is meant for the next process in a reused leaf.
func TestLeavesAreNotMixedUp(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	_, tree := startTree(t, d, "setsid sleep 1000 & echo background $!", 1)
	for range 40 {
		s := d.start(t, argv("/bin/sleep", "1000"))
		d.kill(t, s.pid)
		s.collect()
	}
	if left := survivors(tree); len(left) != 1 {
		t.Error("a background process was killed with another command")
	}
}

// ---- P4 -------------------------------------------------------------------------------------------------------------

func TestCommandReturnsWhenItEnds(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	fifo := filepath.Join(publicDir(t), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	r := d.run(t, sh(fmt.Sprintf("(read x < %s; echo late; exec sleep 1000) & echo started", fifo)), withExtensions())
	if took := time.Since(start); took > time.Second {
		t.Errorf("`end` came after %v", took)
	}
	wantEnd(t, r.end, 0, true, "exit status 0")
	if string(r.stdout) != "started\n" || !r.end.GetOutputOpen() {
		t.Errorf("stdout %q, output_open %v", r.stdout, r.end.GetOutputOpen())
	}
	if plain := d.run(t, sh("echo alone"), withExtensions()); plain.end.GetOutputOpen() {
		t.Error("output_open although nobody holds the pipes")
	}

	// What the background process writes later goes on into the log; whoever connects then sees it.
	got := d.connect(t, byPid(r.pid), withOutputFrom("all")).collect()
	if string(got.stdout) != "started\n" || got.ends != 1 {
		t.Errorf("at first: %q, %d ends", got.stdout, got.ends)
	}
	if err := os.WriteFile(fifo, []byte("\n"), 0); err != nil {
		t.Fatal(err)
	}
	waitFor(t, 5*time.Second, "the late line in the log", func() bool {
		got := d.connect(t, byPid(r.pid)).collect()
		wantEnd(t, got.end, 0, true, "exit status 0")
		return string(got.stdout) == "late\n"
	})
	if got := d.connect(t, byPid(r.pid), withOutputFrom("3")).collect(); string(got.stdout) != "rted\nlate\n" {
		t.Errorf("from offset 3: %q", got.stdout)
	}
	d.kill(t, r.pid)
}

// A background child that never stops writing delays `end` by --end-grace and no longer.
func TestEndGrace(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		args        []string
		script      string
		least, most time.Duration
	}{
		{nil, "while :; do echo x; sleep 0.05; done & sleep 0.1; echo done", 2 * time.Second, 3 * time.Second},
		{[]string{"--end-grace", "500ms"}, "while :; do echo x; sleep 0.05; done & sleep 0.1; echo done",
			500 * time.Millisecond, 1300 * time.Millisecond},
		{[]string{"--end-grace", "500ms"}, "yes & sleep 0.1; echo done", 500 * time.Millisecond, 2 * time.Second},
		{[]string{"--end-silence", "1s"}, "sleep 1000 & echo done", time.Second, 1800 * time.Millisecond},
		{nil, "sleep 1000 & echo done", 250 * time.Millisecond, time.Second},
	} {
		t.Run(fmt.Sprint(test.args, " ", test.script), func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t, test.args...)
			timely(t, func() error {
				start := time.Now()
				r := d.run(t, sh(test.script), withExtensions())
				took := time.Since(start)
				wantEnd(t, r.end, 0, true, "exit status 0")
				if !bytes.Contains(r.stdout, []byte("done\n")) || !r.end.GetOutputOpen() {
					t.Errorf("output_open %v, %d bytes of output", r.end.GetOutputOpen(), len(r.stdout))
				}
				d.kill(t, r.pid)
				if took < test.least {
					t.Errorf("`end` came after %v, want at least %v", took, test.least)
				}
				if took > test.most {
					return fmt.Errorf("`end` came after %v, want at most %v", took, test.most)
				}
				return nil
			})
		})
	}
}

// A background child that writes faster than the client reads does not hold `end` up for ever either: what the leader
// wrote has been read by then, and the rest is not its own.
func TestEndGraceWithASlowReader(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--end-grace", "500ms")
	// 5 MiB/s: enough for the pipe's and the sockets' content, nothing against what `yes` writes.
	client, closeAll := wire{protocol: "connect"}.client(d, 64<<10, func(net.Conn) (int64, error) {
		time.Sleep(12 * time.Millisecond)
		return 64 << 10, nil
	})
	defer closeAll()
	start := time.Now()
	s := d.start(t, sh("yes & sleep 0.1; echo done"), withStdin(false), withClient(client), withExtensions())
	ended := make(chan runResult, 1)
	go func() { ended <- s.collect() }()
	select {
	case r := <-ended:
		wantEnd(t, r.end, 0, true, "exit status 0")
		if !bytes.Contains(r.stdout, []byte("done\n")) || !r.end.GetOutputOpen() {
			t.Errorf("output_open %v, %d bytes of output", r.end.GetOutputOpen(), len(r.stdout))
		}
		t.Logf("`end` after %v and %d bytes", time.Since(start).Round(time.Millisecond), len(r.stdout))
	case <-time.After(8 * time.Second):
		t.Error("no `end` after 8 s")
		s.drop()
	}
	d.kill(t, s.pid)
}

// The leader's last words come before `end`, however slow the reader and whoever else holds the pipes.
func TestLastWordsPrecedeEnd(t *testing.T) {
	t.Parallel()
	const total, seed = 8<<20 + 60<<10, 21
	want := pattern(seed, total)
	var wait sync.WaitGroup
	defer wait.Wait()
	for _, test := range []struct {
		name, script string
		wire         wire
	}{
		{"alone", "", wire{protocol: "connect"}},
		{"small window", "", wire{protocol: "connect", receiveBuffer: 4096}},
		{"a background child", "sleep 1000 &", wire{protocol: "connect"}},
		{"a background child, small window", "sleep 1000 &", wire{protocol: "connect", receiveBuffer: 4096}},
		{"a background child, gRPC", "sleep 1000 &", wire{protocol: "grpc"}},
	} {
		d := startDaemon(t)
		stalls := 0
		client, closeAll := test.wire.client(d, 100<<10, func(net.Conn) (int64, error) {
			// Twice for longer than --end-grace: with much and with little to come.
			stalls++
			time.Sleep(2500 * time.Millisecond)
			if stalls == 1 {
				return total - 200<<10, nil
			}
			return unmetered, nil
		})
		script := fmt.Sprintf("%s exec %s pattern %d %d /dev/null", test.script, helperBinary(t), seed, total)
		s := d.start(t, sh(script), withStdin(false), withClient(client))
		wait.Go(func() {
			defer closeAll()
			r := s.collect()
			if !bytes.Equal(r.stdout, want) || r.ends != 1 || r.err != nil {
				t.Errorf("%s: %d bytes of %d before `end` (%d), %v", test.name, len(r.stdout), total, r.ends, r.err)
			}
			if stalls != 2 {
				t.Errorf("%s: the reader stalled %d times", test.name, stalls)
			}
		})
	}
}

// ---- deadlines and keep-alives --------------------------------------------------------------------------------------

// The deadline of a Start outlives its client.
func TestDeadlineAfterTheClientLeft(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{"connect", "grpc", "grpcweb"} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			d := startDaemon(t)
			client, closeAll := wire{protocol: protocol}.client(d, unmetered, nil)
			defer closeAll()
			timeout := withTimeoutMs(1500)
			if protocol != "connect" {
				timeout = withHeader("Grpc-Timeout", "1500m")
			}
			start := time.Now()
			s := d.start(t, sh("sleep 1000 & echo $!; wait"), withClient(client), timeout)
			background := atoi(t, string(s.readUntil(t, "\n").stdout))
			other := d.connect(t, byPid(s.pid))
			s.drop()
			r := other.collect()
			if took := time.Since(start); took < 1400*time.Millisecond || took > 2500*time.Millisecond {
				t.Errorf("the process was killed after %v, want 1.5 s", took)
			}
			wantEnd(t, r.end, -1, false, "signal: killed")
			if r.err != nil {
				t.Errorf("the other subscriber: %v", r.err)
			}
			waitGone(t, time.Second, int(s.pid), background)
			wantEnd(t, d.connect(t, byPid(s.pid)).collect().end, -1, false, "signal: killed")
		})
	}
}

// A deadline strikes also while the sending goroutine is stuck in a connection that takes nothing.
func TestDeadlineWhileTheReaderStalls(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	var released atomic.Bool
	client, closeAll := wire{protocol: "connect"}.client(d, 64<<10, func(net.Conn) (int64, error) {
		waitFor(t, 20*time.Second, "released", released.Load)
		return unmetered, nil
	})
	defer closeAll()
	start := time.Now()
	s := d.start(t, argv("/usr/bin/yes"), withClient(client), withTimeoutMs(1000))
	done := make(chan runResult, 1)
	go func() { done <- s.collect() }()
	waitGone(t, 5*time.Second, int(s.pid))
	if took := time.Since(start); took < 900*time.Millisecond || took > 2*time.Second {
		t.Errorf("killed after %v, want 1 s", took)
	}
	released.Store(true)
	if r := <-done; r.ends != 0 || r.err == nil {
		t.Errorf("%d ends, %v", r.ends, r.err)
	}
}

// The deadline of a Connect is its own affair.
func TestDeadlineOfConnect(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, sh("read x; exit 4"))
	start := time.Now()
	r := d.connect(t, byPid(s.pid), withTimeoutMs(500)).collect()
	took := time.Since(start)
	if connect.CodeOf(r.err) != connect.CodeDeadlineExceeded || took < 400*time.Millisecond || took > 2*time.Second {
		t.Errorf("Connect with a deadline of 500 ms: %v after %v", r.err, took)
	}
	d.sendLine(t, s.pid)
	wantEnd(t, s.collect().end, 4, true, "exit status 4")
}

func TestKeepalives(t *testing.T) {
	t.Parallel()
	d := startDaemon(t, "--keepalive-interval", "2s")
	var wait sync.WaitGroup
	defer wait.Wait()
	for _, test := range []struct {
		name, script string
		options      []callOption
		want         int
	}{
		{"each interval", "sleep 3.5", []callOption{withKeepalive(1)}, 3},
		{"restarts on data", "for i in 1 2 3 4 5 6 7; do echo $i; sleep 0.5; done", []callOption{withKeepalive(1)}, 0},
		{"restarts on data, then comes", "sleep 0.6; echo; sleep 0.6; echo; sleep 1.5", []callOption{withKeepalive(1)}, 1},
		{"the daemon's interval", "sleep 3.5", nil, 1},
		{"zero is the daemon's interval", "sleep 3.5", []callOption{withKeepalive(0)}, 1},
		{"not a number", "sleep 3.5", []callOption{withHeader("Keepalive-Ping-Interval", "soon")}, 1},
		{"huge", "sleep 3.5", []callOption{withHeader("Keepalive-Ping-Interval", "9223372036854775807")}, 0},
	} {
		s := d.start(t, sh(test.script), test.options...)
		for _, s := range []*clientStream{s, d.connect(t, byPid(s.pid), test.options...)} {
			wait.Go(func() {
				if r := s.collect(); r.keepalives != test.want || r.err != nil || r.ends != 1 {
					t.Errorf("%s: %d keep-alives, want %d; %v", test.name, r.keepalives, test.want, r.err)
				}
			})
		}
	}
}

func TestKeepaliveTimes(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	s := d.start(t, argv("/bin/sleep", "3.5"), withKeepalive(1))
	last := time.Now()
	for event := s.next(); event.GetKeepalive() != nil; event = s.next() {
		if passed := time.Since(last); passed < 900*time.Millisecond || passed > 1900*time.Millisecond {
			t.Errorf("a keep-alive after %v, want 1 s", passed)
		}
		last = time.Now()
	}
}

// ---- P5: what is counted stays bounded ------------------------------------------------------------------------------

func TestStalledReaderMemory(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{"connect", "grpc", "json"} {
		t.Run(protocol, func(t *testing.T) {
			t.Parallel()
			const total = 256 << 20
			size := int64(total)
			if protocol != "connect" {
				size = 32 << 20
			}
			d := startDaemon(t)
			stalled := false
			client, closeAll := wire{protocol: protocol}.client(d, size/2, func(net.Conn) (int64, error) {
				stalled = true
				time.Sleep(5 * time.Second)
				return unmetered, nil
			})
			defer closeAll()
			s := d.start(t, argv("/usr/bin/head", "-c", fmt.Sprint(size), "/dev/zero"), withStdin(false), withClient(client))
			var received int64
			ends := 0
			for event := s.next(); event != nil; event = s.next() {
				received += int64(len(event.GetData().GetStdout()))
				if event.GetEnd() != nil {
					ends++
				}
			}
			if received != size || ends != 1 || s.failure() != nil || !stalled {
				t.Errorf("%d bytes of %d, %d ends, %v, stalled %v", received, size, ends, s.failure(), stalled)
			}
			peak := d.peakRSS()
			t.Logf("peak RSS %.1f MiB", float64(peak)/(1<<20))
			if peak > 24<<20 && !raceEnabled() {
				t.Errorf("peak RSS %d bytes, want less than 24 MiB", peak)
			}
		})
	}
}

func TestFiveHundredStreams(t *testing.T) {
	d := startDaemon(t)
	const streams = 500
	var open []*clientStream
	for range streams {
		open = append(open, d.start(t, argv("/bin/sleep", "3"), withStdin(false)))
	}
	rss := d.rss()
	t.Logf("RSS %.1f MiB, %d threads with %d streams", float64(rss)/(1<<20), d.threads(), streams)
	if n := len(d.list(t)); n > streams {
		t.Errorf("%d processes listed", n)
	}
	if rss > 40<<20 && !raceEnabled() {
		t.Errorf("RSS %d bytes with %d streams, want less than 40 MiB", rss, streams)
	}
	for _, s := range open {
		if r := s.collect(); r.ends != 1 || r.err != nil {
			t.Fatalf("%d ends, %v", r.ends, r.err)
		}
	}
	if peak := d.peakRSS(); peak > 40<<20 && !raceEnabled() {
		t.Errorf("peak RSS %d bytes with %d streams, want less than 40 MiB", peak, streams)
	}
}

// leaves counts the cgroup leaves of a daemon.
func (d *daemon) leaves() int {
	leaves, _ := filepath.Glob(filepath.Join(d.cgroup, "*", "[0-9]*"))
	return len(leaves)
}

// ownDescriptors lists what the daemon has open, without the pool of leaves and connections that idle.
func (d *daemon) ownDescriptors() []string {
	d.http.CloseIdleConnections()
	return slices.DeleteFunc(d.fds(), func(fd string) bool { return d.cgroup != "" && strings.Contains(fd, d.cgroup) })
}

// descriptorsReturn waits until there are no more than before, when the daemon had done nothing yet.
func (d *daemon) descriptorsReturn(t *testing.T, before []string) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for ; len(d.ownDescriptors()) > len(before); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("open are\n%q, before\n%q", d.ownDescriptors(), before)
			return
		}
	}
}

func TestTwoThousandCommands(t *testing.T) {
	d := startDaemon(t)
	before := d.ownDescriptors()
	run := func(n int) {
		var next atomic.Int64
		var wait sync.WaitGroup
		for range 16 {
			wait.Go(func() {
				for next.Add(1) <= int64(n) {
					s, err := d.open(t, argv("/bin/true"))
					if err != nil {
						t.Errorf("Start: %v", err)
						return
					}
					r := s.collect()
					starts := 0
					for _, event := range r.events {
						if event.GetStart() != nil {
							starts++
						}
					}
					if starts != 1 || r.ends != 1 || r.err != nil || len(r.events) != 2 || r.end.GetStatus() != "exit status 0" {
						t.Errorf("events %v, %v", r.events, r.err)
					}
				}
			})
		}
		wait.Wait()
	}
	run(200)
	threads := d.threads()
	start := time.Now()
	run(2000)
	t.Logf("2,000 commands in %v, 16 at a time; %d threads, RSS %.1f MiB, %d descriptors, %d leaves",
		time.Since(start).Round(time.Millisecond), d.threads(), float64(d.rss())/(1<<20), len(d.fds()), d.leaves())
	waitFor(t, 5*time.Second, "no process listed, no zombie, no child", func() bool {
		return len(d.list(t)) == 0 && len(d.zombies()) == 0 && len(descendantsOf(d.pid)) == 0
	})
	if zombies := d.zombies(); len(zombies) > 0 {
		t.Errorf("zombies %v", zombies)
	}
	d.descriptorsReturn(t, before)
	if now := d.threads(); now > threads+16 {
		t.Errorf("%d threads, before %d", now, threads)
	}
	if d.cgroup != "" && d.leaves() > 16 {
		t.Errorf("%d cgroup leaves, want at most 16 in the pool", d.leaves())
	}
	if left, stacks := d.goroutines(t); left > 38 {
		t.Errorf("%d goroutines after 2,000 commands:\n%s", left, stacks)
	}
}

// goroutines ends the daemon with SIGQUIT, which makes the runtime print their stacks, and counts them, but for the workers of the
// garbage collector, which come one by one when there is that much to do.
func (d *daemon) goroutines(t *testing.T) (n int, stacks string) {
	t.Helper()
	d.http.CloseIdleConnections()
	d.stopped.Store(true)
	d.cmd.Process.Signal(syscall.SIGQUIT)
	select {
	case <-d.exited:
	case <-time.After(5 * time.Second):
		t.Fatal("the daemon survived SIGQUIT")
	}
	stacks = d.log()
	if err := os.Truncate(d.logFile, 0); err != nil { // else they would be taken for those of a crash
		t.Fatal(err)
	}
	return strings.Count(stacks, "\ngoroutine ") - strings.Count(stacks, "\ncreated by runtime.gcBgMarkStartWorkers "), stacks
}

// Leaves that still hold background processes are given back once these have gone.
func TestLeavesOfBackgroundProcesses(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	if d.cgroup == "" {
		t.Skip("needs cgroup v2: no hierarchy that this user may write to")
	}
	var trees []map[string]int
	var pids []uint32
	for range 40 {
		s, tree := startTree(t, d, "setsid sleep 1000 >/dev/null 2>&1 & echo background $!", 1)
		s.collect()
		trees, pids = append(trees, tree), append(pids, s.pid)
	}
	if n := d.leaves(); n < 40 || n > 40+16 {
		t.Errorf("%d leaves with 40 background processes", n)
	}
	for i, tree := range trees {
		if len(survivors(tree)) != 1 {
			t.Fatalf("background process %d is gone", i)
		}
		d.kill(t, pids[i])
	}
	waitFor(t, 5*time.Second, "at most the pool is left", func() bool {
		d.run(t, argv("/bin/true"))
		return d.leaves() <= 16
	})
}

// Clients that fall away in all kinds of ways leave nothing behind.
func TestDroppedStreamsLeaveNothing(t *testing.T) {
	t.Parallel()
	d := startDaemon(t)
	d.run(t, argv("/bin/true"))
	s := d.start(t, argv("/usr/bin/yes"))
	keep := d.connect(t, byPid(s.pid), withOutputFrom("new")) // the process is attended throughout
	fds := len(d.fds())
	var wait sync.WaitGroup
	for i := range 100 {
		wait.Go(func() {
			w := wire{protocol: []string{"connect", "grpc", "grpcweb", "json"}[i%4]}
			client, closeAll := w.client(d, int64(1000+i*3000), resetConn)
			defer closeAll()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			other, err := d.openConnect(t, byPid(s.pid), withClient(client), withContext(ctx), withOutputFrom("new"))
			if err == nil {
				r := other.collect()
				if err = r.err; r.ends != 0 {
					t.Error("an end")
				}
			}
			if err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("stream %d: %v", i, err)
			}
		})
	}
	stop := make(chan struct{})
	go func() {
		for keep.next() != nil {
		}
		close(stop)
	}()
	s.drop()
	wait.Wait()
	waitFor(t, 5*time.Second, "descriptors as before", func() bool { return len(d.fds()) <= fds+2 })
	d.kill(t, s.pid)
	<-stop
	if left, stacks := d.goroutines(t); left > 38 {
		t.Errorf("%d goroutines after 100 broken streams:\n%s", left, stacks)
	}
}
