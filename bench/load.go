// Under load: 500 streams at once, then 16 clients that exec, upload and stream as fast as they can; what memory is kept once they
// have gone; then snapshots, prepared and restored. And how quickly /health is answered meanwhile. The bare handler does the
// same, but for the snapshots.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	pb "envd/proto"
)

const (
	uploaded = 4 << 20 // bytes in one upload under load
	streamed = 8 << 20 // bytes in one stream under load
)

// underLoad is what one side shows.
type underLoad struct {
	streamsRSS, started float64
	loaded              float64 // p99 of /health, as in the next two, which are ours alone
	idle, snapshot      float64
	prepared            float64 // the slowest answer to prepare; ours alone
	after               float64 // RSS
}

func measureLoad(ctx context.Context, b *bench, add add) (err error) {
	dir, clean, err := memoryDir()
	if err != nil {
		return err
	}
	defer clean()
	local, err := localSleeps(b.null, b.streams)
	if err != nil {
		return err
	}
	ours, err := b.startEnvd(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ours.stop()) }()
	bare, err := b.startHelper(ctx, "bare")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bare.stop()) }()
	var seen [2]underLoad
	sides := []*daemon{ours, bare}
	u := &seen[0]
	if u.idle, err = b.healthP99(ctx, ours); err != nil {
		return err
	}
	for i, d := range sides {
		u, c := &seen[i], newClient(d.url, "")
		defer c.close()
		if u.streamsRSS, u.started, err = b.manyStreams(ctx, d, c); err != nil {
			return err
		}
		stop := startWorkers(ctx, b.loadOf(ctx, d, c, dir, i == 0))
		u.loaded, err = b.healthP99(ctx, d)
		if err = errors.Join(err, stop()); err != nil {
			return err
		}
		c.close()
	}
	if err := pause(ctx, b.calm); err != nil {
		return err
	}
	for i, d := range sides {
		if seen[i].after, err = d.status("VmRSS"); err != nil {
			return err
		}
	}
	stop := startWorkers(ctx, []func() error{func() error {
		took, err := ours.prepare(ctx)
		u.prepared = max(u.prepared, took.Seconds())
		return err
	}})
	u.snapshot, err = b.healthP99(ctx, ours)
	if err = errors.Join(err, stop()); err != nil {
		return err
	}
	add("500 streams of sleep, RSS", u.streamsRSS, none, seen[1].streamsRSS)
	add("500 streams of sleep, last start", u.started, local.Seconds(), seen[1].started)
	add("/health p99 at full load, against idle", u.loaded, u.idle, seen[1].loaded)
	add("/health p99 at full load, worst run", u.loaded, none, seen[1].loaded)
	add("/health p99 in prepare and restore, against idle", u.snapshot, u.idle, none)
	add("/health p99 in prepare and restore, worst run", u.snapshot, none, none)
	add("prepare answered, slowest", u.prepared, none, none)
	add("RSS 5 s after the whole load", u.after, none, seen[1].after)
	return nil
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
	return ctx.Err()
}

// manyStreams holds a stream of a sleep for each of b.streams and returns the highest RSS meanwhile and the seconds until
// the last one had started.
func (b *bench) manyStreams(ctx context.Context, d *daemon, c *client) (rss, started float64, err error) {
	pids := make(chan int, b.streams)
	done := make(chan error, b.streams)
	start := time.Now()
	for range b.streams {
		go func() {
			e, err := c.run(ctx, c.proc, command("/bin/sleep", sleepTime), func(event *pb.ProcessEvent) {
				if s := event.GetStart(); s != nil {
					pids <- int(s.GetPid())
				}
			})
			if err == nil && (e.starts != 1 || e.ends != 1) {
				err = e.check(0)
			}
			done <- err
		}()
	}
	var running []int
	defer func() {
		for _, pid := range running {
			err = errors.Join(err, unix.Kill(pid, unix.SIGKILL))
		}
		for range running {
			err = errors.Join(err, <-done)
		}
	}()
	for range b.streams {
		select {
		case pid := <-pids:
			running = append(running, pid)
		case err := <-done:
			return 0, 0, fmt.Errorf("a stream ended before the last one had started: %w", err)
		}
	}
	started = time.Since(start).Seconds()
	for range 10 {
		now, err := d.status("VmRSS")
		if err = errors.Join(err, pause(ctx, 20*time.Millisecond)); err != nil {
			return 0, 0, err
		}
		rss = max(rss, now)
	}
	return rss, started, nil
}

// healthP99 asks for /health from another process for a while.
func (b *bench) healthP99(ctx context.Context, d *daemon) (float64, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(b.dir, "probe"), d.addr, b.load.String()).Output()
	if err != nil {
		return 0, fmt.Errorf("asking for /health: %w\n%s\n%s", err, out, d.output.String())
	}
	var took []float64
	err = json.Unmarshal(out, &took)
	return percentile(took, 99), err
}

// startWorkers calls each function again and again until the returned one is called. Every one must have succeeded at least once
// by then, and always.
func startWorkers(ctx context.Context, work []func() error) (stop func() error) {
	enough := make(chan struct{})
	errs := make(chan error, len(work))
	for _, do := range work {
		go func() {
			for {
				if err := errors.Join(do(), ctx.Err()); err != nil {
					errs <- err
					return
				}
				select {
				case <-enough:
					errs <- nil
					return
				default:
				}
			}
		}()
	}
	return func() (err error) {
		close(enough)
		for range work {
			err = errors.Join(err, <-errs)
		}
		return err
	}
}

// loadOf is what the clients do: a third of them each exec, upload and stream.
func (b *bench) loadOf(ctx context.Context, d *daemon, c *client, dir string, agent bool) (work []func() error) {
	content := make([]byte, uploaded)
	for i := range clients {
		method, target := "PUT", filesURL("/file", filepath.Join(dir, fmt.Sprint(i)))
		if agent {
			method, target = "POST", filesURL("/files", filepath.Join(dir, fmt.Sprint(i)))
		}
		work = append(work, []func() error{
			func() error { _, err := c.exec(ctx); return err },
			func() error { _, err := c.send(ctx, method, d.url+target, bytes.NewReader(content)); return err },
			func() error {
				e, err := c.runRaw(ctx, "proto", zeros(streamed))
				return errors.Join(err, e.check(streamed))
			},
		}[i%3])
	}
	return work
}

// send makes a request, whose body may be nil, and returns what was answered.
func (c *client) send(ctx context.Context, method, url string, body io.Reader) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	r.Header.Set("Content-Type", "application/octet-stream")
	response, err := c.http.Do(r)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode/100 != 2 {
		err = fmt.Errorf("%s %s: %s: %s", method, url, response.Status, answer)
	}
	return answer, err
}

// prepare prepares a snapshot, on a connection of its own, and leaves a moment for /health to restore.
func (d *daemon) prepare(ctx context.Context) (time.Duration, error) {
	c := newClient(d.url, "")
	defer c.close()
	start := time.Now()
	_, err := c.send(ctx, "POST", d.url+"/snapshot/prepare", nil)
	took := time.Since(start)
	return took, errors.Join(err, pause(ctx, 5*time.Millisecond))
}
