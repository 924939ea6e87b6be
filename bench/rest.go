// At rest, and while the host polls: the CPU time and the context switches of the daemon, against the plain
// server, over the same time.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// effort is what a process has cost so far.
type effort struct {
	cpu      float64 // seconds
	switches float64
}

// effort sums over the threads; schedstat counts nanoseconds, where stat has clock ticks of 10 ms.
func (d *daemon) effort() (e effort, err error) {
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", d.pid()))
	for _, thread := range threads {
		var ran float64
		text, readErr := os.ReadFile(thread + "/schedstat")
		if readErr != nil {
			return e, readErr
		}
		fmt.Sscan(string(text), &ran)
		e.cpu += ran / 1e9
		status, readErr := os.ReadFile(thread + "/status")
		err = errors.Join(err, readErr)
		for line := range strings.Lines(string(status)) {
			if name, value, _ := strings.Cut(line, ":"); strings.HasSuffix(name, "voluntary_ctxt_switches") {
				var n float64
				fmt.Sscan(value, &n)
				e.switches += n
			}
		}
	}
	return e, err
}

// measureRest lets both sides alone, side by side: it begins a while after /init, as in a guest.
func measureRest(ctx context.Context, b *bench, add add) error {
	plain, err := b.plain(ctx)
	if err != nil {
		return err
	}
	d, err := b.server(ctx, "rest "+b.envd, func(ctx context.Context) (*daemon, error) {
		d, err := b.startEnvd(ctx)
		if err != nil {
			return nil, err
		}
		c := newClient(d.url, "")
		_, err = c.send(ctx, "POST", d.url+"/init", nil)
		c.close()
		if err = errors.Join(err, pause(ctx, b.restBefore)); err != nil {
			err = errors.Join(err, d.stop())
		}
		return d, err
	})
	if err != nil {
		return err
	}
	sides := []*daemon{d, plain}
	var before, spent [2]effort
	for _, wait := range []time.Duration{0, b.rest} {
		if err := pause(ctx, wait); err != nil {
			return err
		}
		for i, side := range sides {
			now, err := side.effort()
			if err != nil {
				return err
			}
			spent[i] = effort{now.cpu - before[i].cpu, now.switches - before[i].switches}
			before[i] = now
		}
	}
	for i := range spent {
		spent[i].cpu /= b.rest.Seconds()
		spent[i].switches /= b.rest.Seconds()
	}
	add("at rest, CPU time per second", spent[0].cpu, spent[1].cpu, none)
	add("at rest, context switches per second", spent[0].switches, spent[1].switches, none)
	return nil
}

// measurePoll asks as the host does, on one connection that stays open.
func measurePoll(ctx context.Context, b *bench, add add) error {
	d, err := b.shared(ctx)
	if err != nil {
		return err
	}
	plain, err := b.plain(ctx)
	if err != nil {
		return err
	}
	ours, baseline := newClient(d.url, ""), newClient(plain.url, "")
	defer ours.close()
	defer baseline.close()
	var before, after [2]effort
	count := func(into *[2]effort) (err error) {
		for i, side := range []*daemon{d, plain} {
			if into[i], err = side.effort(); err != nil {
				return err
			}
		}
		return nil
	}
	poll := func(c *client, path string) func() (time.Duration, error) {
		return func() (time.Duration, error) {
			start := time.Now()
			_, err := c.send(ctx, "GET", c.url+path, nil)
			return time.Since(start), err
		}
	}
	if err := count(&before); err != nil {
		return err
	}
	took, err := inTurn(b.healths, []func() (time.Duration, error){poll(ours, "/metrics"), poll(baseline, "/empty")})
	if err != nil {
		return err
	}
	if err := count(&after); err != nil {
		return err
	}
	polls := float64(b.healths + warmUps(b.healths))
	add("/metrics, p50, against an empty answer", percentile(took[0], 50), percentile(took[1], 50), none)
	add("/metrics, CPU time, against an empty answer", (after[0].cpu-before[0].cpu)/polls, (after[1].cpu-before[1].cpu)/polls, none)
	return nil
}
