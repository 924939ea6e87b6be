// The process table against a model of it: who is found by pid and by tag, who is listed, who is forgotten. Pids and tags are few and
// used again, also, as can happen, before the table has been told that their last bearer is dead.

package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

// tableEntry is what the model knows of a process.
type tableEntry struct {
	p           *process
	exited, out bool // out of the table: neither pid nor tag leads to it
	end         time.Time
}

func (e *tableEntry) tagged(tag string) bool { return e.p.hasTag(tag) }

type tableWorld struct {
	s      *processService
	now    time.Time
	all    []*tableEntry // in order of start
	ended  []*tableEntry // in order of exit, until they are forgotten
	choose *rand.Rand
	counts *tableCounts
}

type tableCounts struct{ steps, starts, reused, forgotten, lookups int }

func TestProcessTable(t *testing.T) {
	t.Parallel()
	var counts tableCounts
	begun, seeds, source := time.Now(), 0, seedSource(2*time.Second)
	for seed, ok := source(); ok && !t.Failed(); seed, ok = source() {
		if fault := runTableHistory(seed, &counts); fault != "" {
			seedFailed(t, seed, fault)
		}
		seeds++
	}
	t.Logf("%d histories in %v: %d steps, %d starts, %d of them with a pid of before, %d processes forgotten, %d look-ups compared", seeds,
		time.Since(begun).Round(time.Millisecond), counts.steps, counts.starts, counts.reused, counts.forgotten, counts.lookups)
}

func runTableHistory(seed uint64, counts *tableCounts) (fault string) {
	choose := rand.New(rand.NewPCG(seed, 61))
	memory := &outputMemory{perLog: 1 << 20, liveLimit: 1 << 30, endedLimit: 1 << 30}
	w := &tableWorld{now: time.Unix(1e9, 0), choose: choose, counts: counts, s: &processService{
		processOptions: processOptions{retainTime: time.Duration(1+choose.IntN(60)) * time.Second, retainCount: 1 + choose.IntN(12)},
		memory:         memory, spawner: &spawner{}, byPid: map[uint32]*process{},
	}}
	pids, tags := uint32(2+choose.IntN(10)), 1+choose.IntN(4)
	for range 50 + choose.IntN(250) {
		counts.steps++
		w.now = w.now.Add(time.Duration(1+choose.IntN(2000)) * time.Millisecond)
		switch choose.IntN(5) {
		case 0, 1:
			var tag *string
			if choose.IntN(3) > 0 {
				tag = new(fmt.Sprint("tag ", choose.IntN(tags)))
			}
			w.start(uint32(1+choose.IntN(int(pids))), tag)
		case 2, 3:
			if running := w.running(); len(running) > 0 {
				w.exit(running[choose.IntN(len(running))])
			}
		case 4:
			w.s.tick(w.now)
			for len(w.ended) > 0 && w.now.Sub(w.ended[0].end) > w.s.retainTime {
				w.forget(w.ended[0])
			}
		}
		for pid := range pids {
			w.lookUp(&fault, byPid(pid+1), func(e *tableEntry) bool { return e.p.pid == pid+1 })
		}
		for i := range tags {
			tag := fmt.Sprint("tag ", i)
			w.lookUp(&fault, byTag(tag), func(e *tableEntry) bool { return e.tagged(tag) })
		}
		w.list(&fault)
		if fault != "" {
			return fault
		}
	}
	for _, e := range w.running() {
		w.exit(e)
	}
	w.s.tick(w.now.Add(time.Hour))
	if w.s.running.Load() != 0 || len(w.s.byPid)+len(w.s.ended)+len(memory.logs) > 0 || memory.live+memory.ended != 0 {
		return fmt.Sprintf("left are %d processes, %d logs with %d bytes", len(w.s.byPid)+len(w.s.ended), len(memory.logs), memory.live+memory.ended)
	}
	return ""
}

func (w *tableWorld) running() []*tableEntry {
	return slices.DeleteFunc(slices.Clone(w.all), func(e *tableEntry) bool { return e.exited })
}

func (w *tableWorld) start(pid uint32, tag *string) {
	w.counts.starts++
	// Whoever has the pid is dead, but only one of them can be so without anybody's knowing.
	for _, old := range w.all {
		if !old.out && old.p.pid == pid {
			w.counts.reused++
			w.forget(old)
		}
		if tag != nil && old.exited && old.tagged(*tag) {
			w.forget(old)
		}
	}
	p := &process{config: &pb.ProcessConfig{}, pid: pid, tag: tag, child: &child{}, log: w.s.memory.newLog(), started: w.now}
	w.s.running.Add(1)
	w.s.register(p)
	p.log.append(stdoutKind, []byte("output"), 6)
	w.all = append(w.all, &tableEntry{p: p})
}

func (w *tableWorld) exit(e *tableEntry) {
	e.exited, e.end = true, w.now
	e.p.child.status, e.p.child.end = syscall.WaitStatus(w.choose.IntN(256)<<8), w.now
	w.s.hasExited(e.p)
	if w.ended = append(w.ended, e); len(w.ended) > w.s.retainCount {
		w.forget(w.ended[0])
	}
}

func (w *tableWorld) forget(e *tableEntry) {
	if !e.out {
		w.counts.forgotten++
	}
	e.out = true
	w.ended = without(w.ended, e)
}

// lookUp compares whom a selector finds: the oldest that runs, else, for those who may also have one that has ended, the oldest.
func (w *tableWorld) lookUp(fault *string, selector *pb.ProcessSelector, fits func(*tableEntry) bool) {
	for _, alsoEnded := range []bool{false, true} {
		w.counts.lookups++
		var want *process
		for _, wantExited := range []bool{false, true} {
			for _, e := range w.all {
				if want == nil && !e.out && fits(e) && e.exited == wantExited && (alsoEnded || !e.exited) {
					want = e.p
				}
			}
		}
		got, err := w.s.find(selector, alsoEnded)
		if got != want || (err == nil) != (want != nil) || err != nil && (connect.CodeOf(err) != connect.CodeNotFound || !strings.HasSuffix(err.Error(), " not found")) {
			*fault = fmt.Sprintf("%v, also ended: %v: %v, %v, want %v", selector, alsoEnded, got, err, want)
		}
	}
}

func (w *tableWorld) list(fault *string) {
	want := map[uint32]bool{}
	running := int64(0)
	for _, e := range w.all {
		if !e.exited {
			running++
			want[e.p.pid] = want[e.p.pid] || !e.out
		}
	}
	response, _ := w.s.List(context.Background(), nil)
	got := response.Msg.GetProcesses()
	for _, info := range got {
		if !want[info.GetPid()] {
			*fault = fmt.Sprintf("listed is %v", info)
		}
		delete(want, info.GetPid())
	}
	for pid, there := range want {
		if there {
			*fault = fmt.Sprintf("pid %d is not listed", pid)
		}
	}
	if n := w.s.running.Load(); n != running {
		*fault = fmt.Sprintf("%d run, counted are %d", running, n)
	}
}
