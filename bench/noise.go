// The noise: how busy the machine is when nothing is being measured. A ratio survives a machine that is slow for both
// sides; it does not survive one whose CPUs are wanted by others, because more of our processes then wait their turn.
package main

import (
	"context"
	"os"
	"strconv"
	"strings"
	"time"
)

// settle waits, at most for `patience`, until the machine is idle, and returns how busy it was at last, 0 to 1.
func settle(ctx context.Context, patience time.Duration) float64 {
	const idleEnough = 0.1
	for deadline := time.Now().Add(patience); ; {
		before, total := cpuTime()
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return none
		}
		after, totalAfter := cpuTime()
		busy := 1 - float64(after-before)/float64(max(1, totalAfter-total))
		if busy < idleEnough || time.Now().After(deadline) {
			return busy
		}
	}
}

// cpuTime reads the idle and the whole time of all CPUs, in ticks (proc_stat(5)).
func cpuTime() (idle, total int) {
	text, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(text), "\n")
	for i, field := range strings.Fields(line) {
		ticks, err := strconv.Atoi(field)
		if err != nil || i > 8 { // the name of the line; guest time, which is in user time already
			continue
		}
		total += ticks
		if i == 4 || i == 5 { // idle, iowait
			idle += ticks
		}
	}
	return idle, total
}
