// Logging: one JSON object a line in a guest, where the host's collector reads them; text on a developer's machine. The
// level comes from ENVD_LOG (debug, info, warn, error). Tokens, values of variables, input and output are never logged.
//
// In a guest the lines also go to the collector that the metadata name, one POST each, with the sandbox's ids in them.
//
// Rule: whoever logs never waits, neither for the collector nor for stdout, which may be a pipe that nobody reads, a
// stopped terminal or a frozen file. Lines wait in bounded buffers, from which the oldest are dropped. Those that never came
// to stdout are counted there once it takes lines again; what a POST does not deliver is lost. At rest there is no goroutine
// and no connection.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

func newLogger(out io.Writer, text bool) *slog.Logger {
	level := slog.LevelInfo
	badLevel := level.UnmarshalText([]byte(os.Getenv("ENVD_LOG"))) != nil && os.Getenv("ENVD_LOG") != ""
	logger := slog.New(newLogHandler(out, text, level))
	if badLevel {
		logger.Warn("ENVD_LOG is none of debug, info, warn, error", "logger", "envd")
	}
	return logger
}

func newLogHandler(out io.Writer, text bool, level slog.Level) slog.Handler {
	options := &slog.HandlerOptions{Level: level}
	if text {
		return slog.NewTextHandler(out, options)
	}
	// The names of the keys are those that collectors of this family of agents know.
	options.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		switch {
		case len(groups) > 0:
		case a.Key == slog.TimeKey && a.Value.Kind() == slog.KindTime:
			return slog.String("timestamp", a.Value.Time().UTC().Format(time.RFC3339Nano))
		case a.Key == slog.LevelKey:
			return slog.String("level", strings.ToLower(a.Value.String()))
		case a.Key == slog.MessageKey:
			a.Key = "message"
		}
		return a
	}
	return slog.NewJSONHandler(out, options)
}

const (
	logLineLimit = 192 << 10              // bytes; longer lines are not exported
	logBuffer    = 1 << 20                // bytes of lines that wait for the collector
	stdoutBuffer = 256 << 10              // and for stdout
	stdoutAtExit = 200 * time.Millisecond // for lines that wait when the daemon ends
)

// lineQueue hands lines on, in order, on a goroutine that is there only as long as lines wait. Who adds one does not.
type lineQueue struct {
	mu      sync.Mutex // protects what follows, and what its owner says
	lines   [][]byte
	size    int // of lines, in bytes
	lost    int // lines that were dropped since the last one was handed on
	paused  bool
	sending chan struct{} // closed when the goroutine has gone; nil: there is none
}

func (q *lineQueue) addLocked(line []byte, room int) {
	q.lines = append(q.lines, slices.Clone(line))
	for q.size += len(line); q.size > room; q.lost++ {
		q.takeLocked()
	}
}

func (q *lineQueue) takeLocked() (line []byte) {
	line, q.lines = q.lines[0], q.lines[1:]
	q.size -= len(line)
	return line
}

// startLocked has the lines handed on, each with the number of those before it that were dropped. deliver may block.
func (q *lineQueue) startLocked(deliver func(line []byte, lost int)) {
	if q.sending == nil && !q.paused && len(q.lines) > 0 {
		q.sending = make(chan struct{})
		go q.send(q.sending, deliver)
	}
}

func (q *lineQueue) send(done chan struct{}, deliver func(line []byte, lost int)) {
	defer close(done)
	for {
		q.mu.Lock()
		if len(q.lines) == 0 || q.paused {
			q.sending = nil
			q.mu.Unlock()
			return
		}
		line, lost := q.takeLocked(), q.lost
		q.lost = 0
		q.mu.Unlock()
		deliver(line, lost)
	}
}

// settle waits, until a deadline, for the goroutine to go.
func (q *lineQueue) settle(deadline time.Time) {
	q.mu.Lock()
	sending := q.sending
	q.mu.Unlock()
	if sending != nil {
		select {
		case <-sending:
		case <-time.After(time.Until(deadline)):
		}
	}
}

// stdoutLog is the writer behind the logger that prints lines.
type stdoutLog struct {
	lineQueue
	notices slog.Handler // writes at once, on the goroutine of the queue
}

func newStdoutLog(text bool) *stdoutLog {
	return &stdoutLog{notices: newLogHandler(os.Stdout, text, slog.LevelWarn)}
}

func (l *stdoutLog) Write(line []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.addLocked(line, stdoutBuffer)
	l.startLocked(l.print)
	return len(line), nil
}

// print tells what was dropped before the line. It counts a line that cannot be written, as to a full disk, among those that were dropped.
func (l *stdoutLog) print(line []byte, lost int) {
	if lost > 0 {
		notice := slog.NewRecord(time.Now(), slog.LevelWarn, fmt.Sprintf("%d lines dropped", lost), 0)
		notice.AddAttrs(slog.String("logger", "envd"), slog.Int("lines", lost))
		if l.notices.Handle(context.Background(), notice) == nil {
			lost = 0
		}
	}
	if _, err := os.Stdout.Write(line); err != nil {
		lost++
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost += lost
}

// flush waits a moment for what is still to be printed.
func (l *stdoutLog) flush() { l.settle(time.Now().Add(stdoutAtExit)) }

// logExporter is the writer behind the logger that sends lines on. Nothing in it may log.
type logExporter struct {
	lineQueue        // from the start, when nobody knows yet where they go; its lock protects what follows
	off       bool   // nobody wants them
	address   string // "" as long as it is not known
	ids       []byte // the rest of each object
}

func (e *logExporter) Write(line []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.off && len(line) <= logLineLimit {
		e.addLocked(line, logBuffer)
		e.exportLocked()
	}
	return len(line), nil
}

// redirect names the collector and the sandbox. An address that is none, or asks for https, turns the exporter off.
func (e *logExporter) redirect(address, instanceID, envID string) {
	u, err := url.Parse(address)
	ids, _ := json.Marshal(map[string]string{"instanceID": instanceID, "envID": envID})
	e.mu.Lock()
	defer e.mu.Unlock()
	e.address, e.ids = address, ids
	if e.off = err != nil || u.Scheme != "http" || u.Host == ""; e.off {
		e.address, e.lines, e.size = "", nil, 0
	}
	e.exportLocked()
}

func (e *logExporter) exportLocked() {
	if e.address != "" {
		e.startLocked(e.post)
	}
}

func (e *logExporter) post(line []byte, _ int) {
	e.mu.Lock()
	address, ids := e.address, e.ids
	e.mu.Unlock()
	body := slices.Concat(bytes.TrimSuffix(line, []byte("}\n")), []byte(","), ids[1:], []byte("\n"))
	askOnce(context.Background(), "POST", address, map[string]string{"Content-Type": "application/json"}, body)
}

// quiesce lets no line leave until resume, and waits for the one that is on its way.
func (e *logExporter) quiesce(deadline time.Time) {
	e.mu.Lock()
	e.paused = true
	e.mu.Unlock()
	e.settle(deadline)
}

func (e *logExporter) resume() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.paused = false
	e.exportLocked()
}
