// POST /init: the control plane gives the sandbox its token, environment and defaults, the address of its event server, a
// certificate authority, volumes, the time, and the sign that it has been resumed or cloned.
//
// Whole requests take effect one after the other, each checked before any of it does: the token first, then whether a newer request
// was faster. What can hang waits in the background, one of a kind at a time: a file system, a server of files, the metadata
// service. system.go has what is done to the system's files and mounts.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of the body, in bytes: anyone may send one, and it is read before its token is known. 1 MiB of environment is what
// execve(2) takes at best, and 128 KiB of one variable. Few of the larger bodies are read at a time. What is decoded takes a few
// times the body.
const (
	initBodyLimit = 1 << 20
	initBodySmall = 64 << 10
	initDecoded   = 4
	variableLimit = 128<<10 - 1

	initReadTimeout = 30 * time.Second // for the body

	initPatience = 20 * time.Second // for the lock and what is done under it
	filePatience = 5 * time.Second  // for the bundle of certificates
)

type initService struct {
	version  string
	token    *accessToken
	settings *settings
	files    *fileService
	runDir   string // of the files that tell the guest about its sandbox
	guest    bool   // of Firecracker: the clock is ours, and there is a metadata service

	// These wait for a place in a measure of strangers.
	largeBody, lookup func(context.Context) (leave func(), err error)

	thaw     func() // undoes a freeze: before anything is written
	setClock func(time.Time)
	resume   func(entropy ...[]byte)            // what a snapshot or a clone left to do
	learned  func(m metadata)                   // the host has named the sandbox
	lock     chan struct{}                      // holds whoever serves a request; protects last
	last     time.Time                          // greatest timestamp applied
	work     jobQueue                           // files and polls
	mounts   jobQueue                           // by path
	endPoll  atomic.Pointer[context.CancelFunc] // of the newest poll
}

// ---- the request ---------------------------------------------------------------------------------------------------

// initRequest has some fields as raw JSON first, so that each error can name its field. encoding/json ignores the case of
// keys and treats null as absent.
type initRequest struct {
	AccessToken    *json.RawMessage            `json:"accessToken"`
	EnvVars        map[string]*json.RawMessage `json:"envVars"`
	DefaultUser    string                      `json:"defaultUser"`
	DefaultWorkdir string                      `json:"defaultWorkdir"`
	HyperloopIP    string                      `json:"hyperloopIP"`
	Timestamp      *string                     `json:"timestamp"`
	VolumeMounts   []volumeMount               `json:"volumeMounts"`
	LifecycleID    string                      `json:"lifecycleID"` // without effect: volumes are not unmounted
	CABundle       string                      `json:"caBundle"`

	body      []byte
	token     string // "" for none
	env       map[string]string
	timestamp time.Time
}

// readInit reads the body. What it returns is held by the memory that it returns; a large one has a place until leave is called,
// and memory that is not of the strangers' share, which two of them would take.
func (s *initService) readInit(w http.ResponseWriter, r *http.Request) (text []byte, memory *grant, leave func(), err error) {
	leave = func() {}
	memory = requestOf(r.Context()).memory
	body := http.MaxBytesReader(w, r.Body, initBodyLimit)
	if text, err = io.ReadAll(io.LimitReader(body, initBodySmall)); len(text) == initBodySmall {
		place, refusal := s.largeBody(r.Context())
		if refusal != nil {
			return nil, memory, leave, refusal
		}
		memory = memory.sibling(forRequests)
		leave = sync.OnceFunc(func() {
			memory.close()
			place()
		})
		size := int64(initBodyLimit)
		if r.ContentLength >= 0 {
			size = min(size, r.ContentLength)
		}
		if err := memory.take(r.Context(), size); err != nil {
			return nil, memory, leave, err
		}
		http.NewResponseController(w).SetReadDeadline(time.Now().Add(initReadTimeout))
		whole := bytes.NewBuffer(append(make([]byte, 0, initBodyLimit+bytes.MinRead), text...))
		_, err = whole.ReadFrom(body)
		text = whole.Bytes()
	} else if err == nil {
		err = memory.take(r.Context(), int64(len(text)))
	}
	if err != nil {
		err = fmt.Errorf("cannot read the body: %w", err)
	}
	return text, memory, leave, err
}

// tokenOf is the token of a body that may be worth nothing else.
func tokenOf(body []byte) (token string) {
	var req struct {
		AccessToken string `json:"accessToken"`
	}
	json.Unmarshal(body, &req)
	return req.AccessToken
}

func parseInit(text []byte) (req *initRequest, err error) {
	req = &initRequest{body: text}
	if text = bytes.TrimSpace(text); len(text) == 0 {
		return req, nil
	}
	if text[0] != '{' {
		return nil, errors.New("the body is not a JSON object")
	}
	var mismatch *json.UnmarshalTypeError
	if err := json.Unmarshal(text, req); errors.As(err, &mismatch) {
		return nil, fmt.Errorf("%s cannot be a JSON %s", mismatch.Field, mismatch.Value)
	} else if err != nil {
		return nil, fmt.Errorf("invalid body: %w", err)
	}
	if raw := req.AccessToken; raw != nil &&
		(bytes.IndexByte(*raw, '\\') >= 0 || json.Unmarshal(*raw, &req.token) != nil || req.token == "") {
		return nil, errors.New("accessToken must be a non-empty string without escapes")
	}
	req.env = make(map[string]string, len(req.EnvVars))
	for name, raw := range req.EnvVars {
		var value string
		if raw == nil || json.Unmarshal(*raw, &value) != nil {
			return nil, fmt.Errorf("envVars: the value of %.100q is not a string", name)
		}
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return nil, fmt.Errorf("envVars: %.100q cannot be a variable's name, or its value has a NUL byte", name)
		}
		if len(name)+len("=")+len(value) > variableLimit {
			return nil, fmt.Errorf("envVars: %.100q is larger than a variable can be, %d bytes", name, variableLimit)
		}
		req.env[name] = value
	}
	if req.Timestamp != nil {
		if req.timestamp, err = time.Parse(time.RFC3339Nano, *req.Timestamp); err != nil {
			return nil, fmt.Errorf("timestamp is not RFC 3339: %.100q", *req.Timestamp)
		}
	}
	if len(req.VolumeMounts) > maxJobs {
		return nil, fmt.Errorf("volumeMounts: %d of them, at most %d can be mounted at once", len(req.VolumeMounts), maxJobs)
	}
	for _, m := range req.VolumeMounts {
		if _, err := m.server(); err != nil {
			return nil, fmt.Errorf("volumeMounts: %w", err)
		}
	}
	if req.CABundle != "" {
		if req.CABundle, err = certificates(req.CABundle); err != nil {
			return nil, fmt.Errorf("caBundle: %w", err)
		}
	}
	return req, nil
}

var errBusy = errors.New("another request holds this one up")

func (s *initService) serve(w http.ResponseWriter, r *http.Request) {
	arrived := time.Now()
	w.Header().Set("X-Envd-Version", s.version)
	http.NewResponseController(w).SetReadDeadline(arrived.Add(initReadTimeout))
	text, memory, leave, err := s.readInit(w, r)
	defer leave()
	var req *initRequest
	if err == nil {
		if s.token.matches(tokenOf(text)) {
			requestOf(r.Context()).vouch()
		}
		if err = memory.take(r.Context(), initDecoded*int64(len(text))); err == nil {
			req, err = parseInit(text)
		}
	}
	leave() // what is kept of it is small, or the settings'
	if err != nil {
		status := http.StatusBadRequest
		if known := (*budgetError)(nil); errors.As(err, &known) || errors.Is(err, errNoPlace) {
			status = http.StatusServiceUnavailable
		}
		jsonError(w, status, err.Error())
		return
	}
	err = s.process(r.Context(), req, arrived)
	w.Header().Set("Cache-Control", "no-store")
	switch {
	case err == nil:
		if req.token != "" {
			requestOf(r.Context()).vouch()
		}
		w.WriteHeader(http.StatusNoContent)
	case err == errTokenWrong, err == errTokenReset:
		http.Error(w, err.Error(), http.StatusUnauthorized)
	case errors.Is(err, errBusy):
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
	default:
		http.Error(w, err.Error(), http.StatusBadRequest)
	}
}

func (s *initService) process(ctx context.Context, req *initRequest, arrived time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, initPatience)
	defer cancel()
	var host metadata
	if s.guest && !s.token.matches(req.token) {
		// Not under the lock: who has no token holds up nobody who has it.
		leave, err := s.lookup(ctx)
		if err != nil {
			return errBusy
		}
		host, _ = fetchMetadata(ctx)
		leave()
		if ctx.Err() != nil {
			return errBusy
		}
	}
	select {
	case s.lock <- struct{}{}:
		defer func() { <-s.lock }()
	case <-ctx.Done():
		return errBusy
	}
	if err := s.token.mayInit(req.token, host.AccessTokenHash); err != nil {
		return err
	}
	s.thaw()
	// A request that was overtaken by a newer one changes nothing; an equal timestamp is a retry.
	if req.Timestamp == nil || !req.timestamp.Before(s.last) {
		if err := s.apply(ctx, req, arrived); err != nil {
			return err
		}
	}
	if s.guest {
		s.pollMetadata()
	}
	env := s.settings.environment()
	s.resume([]byte(env["WRENN_SANDBOX_ID"]), []byte(env["WRENN_TEMPLATE_ID"]), []byte(req.timestamp.String()), req.body)
	return nil
}

// apply does first what can fail.
func (s *initService) apply(ctx context.Context, req *initRequest, arrived time.Time) error {
	if size := s.settings.sizeWith(req.env); size > max(initBodyLimit, s.settings.sizeWith(nil)) {
		return fmt.Errorf("envVars: all variables together would have %d bytes, at most %d are kept", size, initBodyLimit)
	}
	if req.Timestamp != nil && s.guest {
		s.setClock(req.timestamp.Add(time.Since(arrived)))
	}
	if req.CABundle != "" {
		if err := s.installCA(ctx, req.CABundle); err != nil {
			return err
		}
	}
	if req.Timestamp != nil {
		s.last = req.timestamp
	}
	s.settings.merge(req.env, req.DefaultUser, req.DefaultWorkdir)
	s.token.set(req.token)
	if req.HyperloopIP != "" {
		s.setHyperloop(req.HyperloopIP)
	}
	for _, m := range req.VolumeMounts {
		log := slog.With("logger", "envd", "target", m.Target, "path", m.Path)
		if !s.mounts.do(filepath.Clean(m.Path), func() {
			if err := s.mountNFS(m); err != nil {
				log.Warn("a volume is not mounted", "error", err)
			}
		}) {
			log.Warn("too many volumes are being mounted")
		}
	}
	return nil
}

// ---- metadata ------------------------------------------------------------------------------------------------------

// pollMetadata asks for the sandbox's ids, from the start if that goes on already; for a minute when they have been known before:
// a host need not set them again.
func (s *initService) pollMetadata() {
	ctx, cancel := context.WithCancel(context.Background())
	if s.settings.environment()["WRENN_SANDBOX_ID"] != "" {
		ctx, cancel = context.WithTimeout(ctx, time.Minute)
	}
	if end := s.endPoll.Swap(&cancel); end != nil {
		(*end)()
	}
	s.work.do("metadata", func() {
		defer cancel()
		m, err := pollMetadata(ctx)
		if err != nil {
			return
		}
		s.setSystem("SANDBOX_ID", m.InstanceID, 0o666)
		s.setSystem("TEMPLATE_ID", m.EnvID, 0o666)
		s.learned(m)
		slog.Info("the host named the sandbox", "logger", "envd", "sandbox", m.InstanceID, "template", m.EnvID)
	})
}

func (s *initService) stopPolling(time.Time) {
	if end := s.endPoll.Load(); end != nil {
		(*end)()
	}
}

// setSystem sets one of the daemon's own variables, named without its prefix, and replaces its files: who reads one sees the
// old value or the new one.
func (s *initService) setSystem(name, value string, mode os.FileMode) {
	s.settings.setSystem(name, value)
	files := []string{filepath.Join(s.runDir, ".WRENN_"+name)}
	if s.settings.e2bNames {
		files = append(files, filepath.Join(filepath.Dir(filepath.Clean(s.runDir)), "e2b", ".E2B_"+name))
	}
	for _, file := range files {
		os.MkdirAll(filepath.Dir(file), 0o755) // where this fails, the rest does
		os.Remove(file + ".new")
		err := os.WriteFile(file+".new", []byte(value), mode)
		if err == nil {
			err = os.Rename(file+".new", file)
		}
		if err != nil {
			slog.Warn("the run directory is not writable", "logger", "envd", "error", err)
		}
	}
}
