// The life of the sandbox around a snapshot, and the control side that freezes it.
//
//	running --prepare--> preparing --> prepared --/health, /init or the backstop--> restoring --> running
//
// The host calls prepare, takes the snapshot and, after a time or on another machine, any number of times, goes on with
// /health. Prepare has done all its work when it answers, whatever the disk does. Recovery touches nothing that a guest can
// make hang, and /health waits for it a moment at most. If no one comes (the snapshot failed and the host goes on with the
// same sandbox), the backstop recovers; it counts the guest's monotonic time, which stands still with the guest.
//
// Frozen processes are thawed by /unfreeze, /init, or a watchdog. Kernel: RNDRESEEDCRNG since 4.14, a devtmpfs without a mount
// point since 5.2, cgroup.freeze since 5.2.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The values of lifecycle.state.
const (
	stateRunning = iota
	statePreparing
	statePrepared
	stateRestoring
)

const (
	quiesceTimeout = time.Second             // for the hooks of prepare together
	prepareWait    = 2500 * time.Millisecond // of prepare for another one, or a recovery, to end; of /init for both
	restoreWait    = 40 * time.Millisecond   // of /health for the recovery, which goes on all the same
	turnTimeout    = 2 * time.Second         // for another change of what is frozen
)

type lifecycleOptions struct {
	backstop    time.Duration
	syncTimeout time.Duration
	thawTimeout time.Duration
}

// lifecycleHook is one subsystem. Both functions may come twice in a row; quiesce, if any, ends by its deadline, resume does not block.
type lifecycleHook struct {
	name    string
	quiesce func(deadline time.Time)
	resume  func()
}

type lifecycle struct {
	lifecycleOptions
	guest   bool            // not --isnotfc
	cgroups *cgroups        // this and hooks are complete before the first request but /health
	hooks   []lifecycleHook // in order of start, which is that of resuming; they quiesce the other way round

	state    atomic.Int32
	since    atomic.Pointer[time.Time] // when it was prepared
	syncs    jobQueue                  // one sync at a time, for disks that hang for good
	random   int                       // a descriptor, or -1; ptp too
	ptp      int
	restores atomic.Int64

	turn        chan struct{}             // holds whoever freezes or thaws
	groupsSince atomic.Pointer[time.Time] // when the processes were frozen; nil: they are not
	filesSince  atomic.Pointer[time.Time] // the same of the root filesystem
}

func newLifecycle(o lifecycleOptions, guest bool) *lifecycle {
	l := &lifecycle{lifecycleOptions: o, guest: guest, random: openRandom(), ptp: -1, turn: make(chan struct{}, 1)}
	if os.Getpid() == 1 { // elsewhere the clock is the business of whoever is
		l.ptp, _ = unix.Open("/dev/ptp0", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	return l
}

// move is the one transition function.
func (l *lifecycle) move(from, to int32) bool { return l.state.CompareAndSwap(from, to) }
func (l *lifecycle) is(state int32) bool      { return l.state.Load() == state }

// preparing tells whether a snapshot may be taken at any moment: no time for work that can wait.
func (l *lifecycle) preparing() bool { return !l.is(stateRunning) }

// prepare answers POST /snapshot/prepare. Of two requests at once the second one prepares again what has happened since.
func (l *lifecycle) prepare(w http.ResponseWriter, r *http.Request) {
	begun := time.Now()
	for !l.move(stateRunning, statePreparing) && !l.move(statePrepared, statePreparing) {
		if time.Since(begun) > prepareWait {
			jsonError(w, http.StatusServiceUnavailable, "another preparation, or the recovery from the last snapshot, has not ended")
			return
		}
		time.Sleep(time.Millisecond)
	}
	l.quiet(begun)
	now := time.Now()
	l.since.Store(&now)
	l.move(statePreparing, statePrepared)
	w.Header().Set("Connection", "close")
	noContent(w)
	http.NewResponseController(w).Flush()
}

// quiet stops what can be stopped, gives memory back and writes what is dirty, so that the snapshot is small.
func (l *lifecycle) quiet(begun time.Time) {
	deadline := begun.Add(quiesceTimeout)
	for _, hook := range slices.Backward(l.hooks) {
		if hook.quiesce == nil {
			continue
		}
		hook.quiesce(deadline)
		if time.Now().After(deadline) {
			slog.Warn("took too long to stop", "logger", "snapshot", "what", hook.name)
		}
	}
	runtime.GC() // twice in all: the first only marks what pools hold
	debug.FreeOSMemory()
	if l.syncTimeout <= 0 {
		return
	}
	// An earlier sync that hangs may miss what was written since it began, so it is followed by another.
	deadline = begun.Add(l.syncTimeout)
	synced := make(chan struct{})
	l.syncs.do("sync", func() {
		defer close(synced)
		unix.Sync()
		if l.guest && os.Geteuid() == 0 && l.is(statePreparing) && time.Now().Before(deadline) {
			os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0) // which the snapshot of a guest's disk has already
		}
	})
	select {
	case <-synced:
	case <-time.After(time.Until(deadline)):
		slog.Warn("prepared, but not everything has been written to disk in time", "logger", "snapshot")
	}
}

// restore recovers from a snapshot, once, if one is prepared by then, and waits for the recovery, whoever runs it, no longer
// either: a host that gave up on the preparation has taken its snapshot in the middle of it. Otherwise it costs a load.
func (l *lifecycle) restore(patience time.Duration, entropy ...[]byte) {
	for begun := time.Now(); l.preparing() && time.Since(begun) < patience; time.Sleep(time.Millisecond) {
		if l.is(statePrepared) && l.move(statePrepared, stateRestoring) {
			go l.wake(entropy)
		}
	}
}

func (l *lifecycle) wake(entropy [][]byte) {
	if l.ptp >= 0 {
		var now unix.Timespec
		if unix.ClockGettime(int32(^l.ptp<<3|3), &now) == nil { // clock_getres(2), dynamic clocks
			l.stepClock(time.Unix(now.Unix()))
		}
	}
	l.reseed(entropy...)
	for _, hook := range l.hooks {
		hook.resume()
	}
	l.restores.Add(1)
	l.move(stateRestoring, stateRunning)
	slog.Info("recovered from the preparation of a snapshot", "logger", "snapshot")
}

// tick is called about once a second.
func (l *lifecycle) tick(now time.Time) {
	if l.is(statePrepared) && now.Sub(*l.since.Load()) > l.backstop {
		l.restore(restoreWait)
	}
	for _, since := range []*atomic.Pointer[time.Time]{&l.groupsSince, &l.filesSince} {
		if at := since.Load(); at != nil && now.Sub(*at) > l.thawTimeout {
			slog.Warn("frozen for too long", "logger", "snapshot")
			go l.thaw()
			return
		}
	}
}

// ---- randomness and time ------------------------------------------------------------------------------------------

// openRandom opens the kernel's pool before a guest can put anything in its place. Where /dev does not have it, a devtmpfs does
// that is mounted nowhere: no node need be made. Without either the descriptor is -1.
func openRandom() int {
	const flags = unix.O_WRONLY | unix.O_NONBLOCK | unix.O_CLOEXEC
	fd, _ := unix.Open("/dev/urandom", flags, 0)
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || st.Rdev != unix.Mkdev(1, 9) {
		unix.Close(fd)
		fs, _ := unix.Fsopen("devtmpfs", unix.FSOPEN_CLOEXEC)
		unix.FsconfigCreate(fs)
		mount, _ := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
		fd, _ = unix.Openat(mount, "urandom", flags, 0)
		unix.Close(mount)
		unix.Close(fs)
	}
	return fd
}

// reseed makes what clones of one snapshot draw differ from here on: what tells them apart is mixed into the kernel's pool, then
// the generator takes a new key from it (random(4)). The latter only root may ask for; crypto/rand follows it.
func (l *lifecycle) reseed(parts ...[]byte) {
	var boot unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
	var usage unix.Rusage
	unix.Getrusage(unix.RUSAGE_SELF, &usage)
	mix := fmt.Appendf(nil, "%d %d %v", time.Now().UnixNano(), boot.Nano(), usage)
	for _, part := range parts {
		mix = append(mix, part...)
	}
	unix.Write(l.random, mix)
	unix.IoctlSetInt(l.random, unix.RNDRESEEDCRNG, 0)
}

// stepClock sets the clock when it is clearly wrong; less is left to whoever keeps it.
func (l *lifecycle) stepClock(to time.Time) {
	off := time.Until(to.Round(0)) // how far the clock is behind
	if !l.guest || !clearlyWrong(off) {
		return
	}
	ts := unix.Timespec{Sec: to.Unix(), Nsec: int64(to.Nanosecond())}
	err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
	slog.Info("the clock was stepped", "logger", "snapshot", "by", off.String(), "error", err)
}

func clearlyWrong(off time.Duration) bool { return off >= 50*time.Millisecond || off <= -5*time.Second }

// ---- freezing -----------------------------------------------------------------------------------------------------

// inTurn has something frozen or thawed, by one at a time.
func (l *lifecycle) inTurn(ctx context.Context, change func() error) error {
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
		return change()
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(turnTimeout):
		return errTurn
	}
}

var errTurn = errors.New("another request that freezes or thaws has not ended")

// answers gives the answer to a change that has failed, or that has nothing to tell.
func answers(w http.ResponseWriter, err error) {
	switch {
	case err == nil:
		noContent(w)
	case err == errTurn:
		jsonError(w, http.StatusServiceUnavailable, err.Error())
	case errors.Is(err, os.ErrPermission):
		jsonError(w, http.StatusForbidden, err.Error())
	default:
		jsonError(w, http.StatusInternalServerError, err.Error())
	}
}

func noContent(w http.ResponseWriter) {
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

// control makes the handler of a change.
func (l *lifecycle) control(change func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) { answers(w, l.inTurn(r.Context(), change)) }
}

// freeze answers POST /freeze: every group, whatever mode is asked for. A host that gives a time is told how many of them
// stand still by then.
func (l *lifecycle) freeze(w http.ResponseWriter, r *http.Request) {
	asked, before, all := r.URL.Query().Get("maxWaitMs"), 0, len(cgroupNames)
	most, err := strconv.Atoi(asked)
	if err != nil && asked != "" {
		jsonError(w, http.StatusBadRequest, fmt.Sprintf("maxWaitMs is no integer: '%s'", asked))
		return
	}
	most = min(most, 60_000)
	begun := time.Now()
	err = l.inTurn(r.Context(), func() error {
		before = l.cgroups.frozenGroups()
		l.groupsSince.Store(&begun) // though it may fail for one of them, and to thaw the other as well
		if err := l.cgroups.freeze(true); err != nil {
			return errors.Join(err, l.thawGroups())
		}
		return nil
	})
	if err != nil || most <= 0 {
		answers(w, err)
		return
	}
	for swept := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		frozen, waited := l.cgroups.frozenGroups(), time.Since(swept).Milliseconds()
		if frozen == all || waited >= int64(most) || r.Context().Err() != nil {
			writeJSON(w, map[string]any{"mode": "legacy", "visited": all, "allowlisted": 0, "truncated": false, "preFrozen": before,
				"requested": all, "frozen": frozen, "notFrozen": all - frozen, "failed": 0, "unobservable": 0,
				"sweepMs": swept.Sub(begun).Milliseconds(), "waitMs": waited})
			return
		}
	}
}

func (l *lifecycle) thawGroups() error {
	err := l.cgroups.freeze(false)
	if err == nil {
		l.groupsSince.Store(nil)
	}
	return err
}

// The root filesystem, ioctl_fsfreeze(2).
const fiFreeze, fiThaw = 0xC0045877, 0xC0045878

func (l *lifecycle) freezeFiles() error {
	now := time.Now()
	return l.rootIoctl(fiFreeze, unix.EBUSY, &now) // it is frozen already
}

func (l *lifecycle) thawFiles() error { return l.rootIoctl(fiThaw, unix.EINVAL, nil) } // it was not frozen

func (l *lifecycle) rootIoctl(request uint, fine error, since *time.Time) error {
	if !l.guest {
		return fmt.Errorf("under --isnotfc the root filesystem is not that of a sandbox: %w", os.ErrPermission)
	}
	fd, err := unix.Open("/", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		defer unix.Close(fd)
		err = unix.IoctlSetInt(fd, request, 0)
	}
	if err != nil && err != fine {
		return &os.PathError{Op: "freeze or thaw", Path: "/", Err: err}
	}
	l.filesSince.Store(since)
	return nil
}

// thaw undoes what was frozen: for a request that would hang otherwise, and for the watchdog.
func (l *lifecycle) thaw() {
	if l.groupsSince.Load() == nil && l.filesSince.Load() == nil {
		return
	}
	err := l.inTurn(context.Background(), func() (err error) {
		if l.filesSince.Load() != nil {
			err = l.thawFiles()
		}
		return errors.Join(err, l.thawGroups())
	})
	if err != nil {
		slog.Error("cannot thaw", "logger", "snapshot", "error", err)
	}
}

// ---- work on the side ---------------------------------------------------------------------------------------------

// jobQueue runs jobs, those of one name one after the other. Of those that wait only the newest is kept.
type jobQueue struct {
	mu   sync.Mutex // protects next
	next map[string]func()
}

const maxJobs = 32 // names at once

// do is false when too many jobs run.
func (q *jobQueue) do(name string, job func()) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.next == nil {
		q.next = map[string]func(){}
	}
	if _, runs := q.next[name]; runs {
		q.next[name] = job
		return true
	}
	if len(q.next) == maxJobs {
		return false
	}
	q.next[name] = nil
	go func() {
		for job != nil {
			job()
			q.mu.Lock()
			if job, q.next[name] = q.next[name], nil; job == nil {
				delete(q.next, name)
			}
			q.mu.Unlock()
		}
	}()
	return true
}
