// Logging: one JSON object a line in a guest, where the host's collector reads them; text on a developer's machine. The
// level comes from ENVD_LOG (debug, info, warn, error). Tokens, values of variables, input and output are never logged.
//
// In a guest the lines also go to the collector that the metadata name, one POST each, with the sandbox's ids in them. Whoever
// logs never waits for it: lines wait in a bounded buffer, from which the oldest are dropped, and what a POST does not deliver is
// lost. At rest there is no goroutine and no connection.

package main

import (
	"bytes"
	"context"
	"encoding/json"
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
	options := &slog.HandlerOptions{Level: level}
	var handler slog.Handler
	if text {
		handler = slog.NewTextHandler(out, options)
	} else {
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
		handler = slog.NewJSONHandler(out, options)
	}
	logger := slog.New(handler)
	if badLevel {
		logger.Warn("ENVD_LOG is none of debug, info, warn, error", "logger", "envd")
	}
	return logger
}

const (
	logLineLimit = 192 << 10 // bytes; longer lines are not exported
	logBuffer    = 1 << 20   // bytes of lines that wait
)

// logExporter is the writer behind the logger that sends lines on. Nothing in it may log.
type logExporter struct {
	mu      sync.Mutex // protects what follows
	lines   [][]byte   // kept from the start, when nobody knows yet where they go
	size    int        // of lines, in bytes
	off     bool       // nobody wants them
	address string     // "" as long as it is not known
	ids     []byte     // the rest of each object
	paused  bool
	sending chan struct{} // closed when the goroutine that sends has gone; nil: there is none
}

func (e *logExporter) Write(line []byte) (int, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.off && len(line) <= logLineLimit {
		e.lines = append(e.lines, slices.Clone(line))
		for e.size += len(line); e.size > logBuffer; {
			e.takeLocked()
		}
		e.startLocked()
	}
	return len(line), nil
}

func (e *logExporter) takeLocked() (line []byte) {
	line, e.lines = e.lines[0], e.lines[1:]
	e.size -= len(line)
	return line
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
	e.startLocked()
}

func (e *logExporter) startLocked() {
	if e.sending == nil && e.address != "" && !e.paused && len(e.lines) > 0 {
		e.sending = make(chan struct{})
		go e.send(e.sending)
	}
}

func (e *logExporter) send(done chan struct{}) {
	defer close(done)
	for {
		e.mu.Lock()
		if len(e.lines) == 0 || e.paused {
			e.sending = nil
			e.mu.Unlock()
			return
		}
		line, address, ids := e.takeLocked(), e.address, e.ids
		e.mu.Unlock()
		body := slices.Concat(bytes.TrimSuffix(line, []byte("}\n")), []byte(","), ids[1:], []byte("\n"))
		askOnce(context.Background(), "POST", address, map[string]string{"Content-Type": "application/json"}, body)
	}
}

// quiesce lets no line leave until resume, and waits for the one that is on its way.
func (e *logExporter) quiesce(deadline time.Time) {
	e.mu.Lock()
	e.paused = true
	sending := e.sending
	e.mu.Unlock()
	if sending != nil {
		select {
		case <-sending:
		case <-time.After(time.Until(deadline)):
		}
	}
}

func (e *logExporter) resume() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.paused = false
	e.startLocked()
}
