// Logging: one JSON object a line in a guest, where the host's collector reads them; text on a developer's machine. The
// level comes from ENVD_LOG (debug, info, warn, error). Tokens, values of variables, input and output are never logged.

package main

import (
	"io"
	"log/slog"
	"os"
	"strings"
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
			case a.Key == slog.TimeKey:
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
