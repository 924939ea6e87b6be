// The host's agent: it creates sandboxes, pauses, resumes and clones them, and asks each for its metrics once a second.
//
// It knows what a host knows and asks what a host asks, in the same order and with the same patience, but for a start, which takes
// longer in an emulator. What a host only logs when it fails is only logged here.

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"time"
)

type host struct {
	images  *images
	log     func(format string, args ...any)
	prepare time.Duration // how long preparing may take; 0: 3 s
	freezes bool          // processes and files are frozen in place of the preparation
}

type sandbox struct {
	*guest
	ids     map[string]string
	version string
	control *http.Client // has connections of its own

	sampled, missed atomic.Int64 // answers to /metrics, and requests without one
	endSampler      func()
}

// The body of an /init that is not sent; "" is one without a body.
const noInit = "none"

func ids(instance, template string) map[string]string {
	return map[string]string{"instanceID": instance, "envID": template}
}

func newSandbox(g *guest, ids map[string]string) *sandbox {
	g.network.mmds.set(ids)
	return &sandbox{guest: g, ids: ids, control: &http.Client{Timeout: 2 * time.Minute,
		Transport: &http.Transport{DialContext: g.dial, ResponseHeaderTimeout: 30 * time.Second}}}
}

// create boots a sandbox, whose metadata are there before the kernel is.
func (h *host) create(o options, ids map[string]string, init string) (*sandbox, error) {
	g, err := h.images.start(o)
	if err != nil {
		return nil, err
	}
	s := newSandbox(g, ids)
	err = errors.Join(s.ready(), s.readVersion())
	if err == nil && init != noInit {
		err = s.tell(30*time.Second, "/init", init, http.StatusNoContent)
	}
	if err != nil {
		s.destroy()
		return nil, err
	}
	s.sample()
	return s, nil
}

// pause writes the sandbox's state to a file and ends it, and leaves its disk. If it fails the same machine goes on, and nobody
// tells its agent.
func (h *host) pause(s *sandbox, path string) error {
	s.endSampler()
	s.drain()
	patience := h.prepare
	if patience == 0 {
		patience = 3 * time.Second
	}
	var err error
	if h.freezes {
		err = errors.Join(s.freeze(), s.tell(patience, "/fsfreeze", "", http.StatusNoContent))
	} else {
		err = s.tell(patience, "/snapshot/prepare", "", http.StatusNoContent)
	}
	if err != nil {
		h.log("pausing goes on: %v", err)
	}
	if err := s.save(path); err != nil {
		err = errors.Join(err, s.cont())
		s.sample()
		return err
	}
	return nil
}

// resume lets a paused sandbox go on in a new machine and a new network.
func (h *host) resume(paused *sandbox, path, init string) (*sandbox, error) {
	s, err := h.restore(paused, path, paused.ids, init, false)
	if err == nil {
		s.inherit(paused.guest)
	}
	return s, err
}

// clone makes one more sandbox of a paused one, which stays as it is.
func (h *host) clone(template *sandbox, path string, ids map[string]string, init string) (*sandbox, error) {
	return h.restore(template, path, ids, init, true)
}

func (h *host) restore(from *sandbox, path string, ids map[string]string, init string, discard bool) (*sandbox, error) {
	g, err := from.load(path, discard)
	if err != nil {
		return nil, err
	}
	err = g.cont()
	s := newSandbox(g, ids)
	if err == nil {
		err = s.ready()
	}
	if err == nil && h.freezes && init == noInit { // which would thaw
		for _, path := range []string{"/fsthaw", "/unfreeze"} {
			err = errors.Join(err, s.tell(30*time.Second, path, "", http.StatusNoContent))
		}
	}
	if err == nil && init != noInit {
		if err := s.tell(30*time.Second, "/init", init, http.StatusNoContent); err != nil {
			h.log("resuming goes on: %v", err)
		}
	}
	if err == nil {
		err = s.readVersion()
	}
	if err != nil {
		s.destroy()
		return nil, err
	}
	s.sample()
	return s, nil
}

func (s *sandbox) destroy() {
	if s.endSampler != nil {
		s.endSampler()
	}
	s.control.CloseIdleConnections()
	s.close()
}

// tell sends a request, which must be answered so.
func (s *sandbox) tell(timeout time.Duration, path, body string, want int) error {
	_, err := s.answer(timeout, "POST", path, body, want)
	return err
}

func (s *sandbox) answer(timeout time.Duration, method, path, body string, want int) (text []byte, err error) {
	ctx, cancel := context.WithTimeout(context.WithValue(context.Background(), bootingKey{}, path == "/health"), timeout)
	defer cancel()
	var content io.Reader
	if body != "" {
		content = strings.NewReader(body)
	}
	request, err := http.NewRequestWithContext(ctx, method, s.url+path, content)
	if err != nil {
		return nil, err
	}
	response, err := s.control.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	text, err = io.ReadAll(response.Body)
	if err == nil && response.StatusCode != want {
		err = fmt.Errorf("%s %s: %s, want %d: %s", method, path, response.Status, want, bytes.TrimSpace(text))
	}
	return text, err
}

// ready asks for /health every 100 ms until it is answered.
func (s *sandbox) ready() error {
	for began := time.Now(); ; time.Sleep(100 * time.Millisecond) {
		_, err := s.answer(30*time.Second, "GET", "/health", "", http.StatusOK)
		if err == nil {
			return nil
		}
		select {
		case <-s.gone:
		default:
			if time.Since(began) < patience {
				continue
			}
		}
		return s.explain(err)
	}
}

func (s *sandbox) readVersion() error {
	text, err := s.answer(30*time.Second, "GET", "/health", "", http.StatusOK)
	var health struct{ Version string }
	if err == nil {
		err = json.Unmarshal(text, &health)
	}
	s.version = health.Version
	return err
}

// sample asks for the metrics once a second, without a token.
func (s *sandbox) sample() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	s.endSampler = func() { cancel(); <-done }
	go func() {
		defer close(done)
		for {
			text, err := s.answer(2*time.Minute, "GET", "/metrics", "", http.StatusOK)
			var metrics struct {
				Used int64 `json:"mem_used"`
			}
			if err == nil && json.Unmarshal(text, &metrics) == nil && metrics.Used > 0 {
				s.sampled.Add(1)
			} else {
				s.missed.Add(1)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
		}
	}()
}

// drain closes connections that carry no request, and gives the others 2 s to end.
func (s *sandbox) drain() {
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		s.http.CloseIdleConnections()
		s.control.CloseIdleConnections()
		s.mu.Lock()
		open := len(s.conns)
		s.mu.Unlock()
		if open == 0 {
			return
		}
	}
}

// freeze waits for all of the guest's processes to stand still.
func (s *sandbox) freeze() error {
	text, err := s.answer(30*time.Second, "POST", "/freeze?maxWaitMs=5000", "", http.StatusOK)
	var report struct{ Requested, Frozen, NotFrozen int }
	if err == nil {
		err = json.Unmarshal(text, &report)
	}
	if err == nil && (report.Requested == 0 || report.Frozen != report.Requested || report.NotFrozen != 0) {
		err = fmt.Errorf("not all groups are frozen: %s", text)
	}
	return err
}
