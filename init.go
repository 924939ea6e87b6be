// POST /init: the control plane gives the sandbox its token, environment and defaults.

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"
)

// initBodyLimit bounds the body, in bytes; 10 MiB of environment is far beyond what execve(2) takes.
const initBodyLimit = 16 << 20

type initService struct {
	version  string
	token    *accessToken
	settings *settings

	mu   sync.Mutex // serialises whole requests and protects last
	last time.Time  // greatest timestamp applied
}

// initRequest has every field as raw JSON first, so that each error can name its field. encoding/json ignores the case of
// keys and treats null as absent.
type initRequest struct {
	AccessToken    *json.RawMessage            `json:"accessToken"`
	EnvVars        map[string]*json.RawMessage `json:"envVars"`
	DefaultUser    string                      `json:"defaultUser"`
	DefaultWorkdir string                      `json:"defaultWorkdir"`
	Timestamp      *string                     `json:"timestamp"`

	token     string
	hasToken  bool
	env       map[string]string
	timestamp time.Time
}

func parseInit(body io.Reader) (*initRequest, error) {
	text, err := io.ReadAll(body)
	if err != nil {
		return nil, fmt.Errorf("cannot read the body: %w", err)
	}
	req := &initRequest{}
	if text = bytes.TrimSpace(text); len(text) == 0 {
		return req, nil
	}
	if text[0] != '{' {
		return nil, errors.New("the body is not a JSON object")
	}
	if err := json.Unmarshal(text, req); err != nil {
		return nil, fmt.Errorf("invalid body: %w", err)
	}
	if req.AccessToken != nil {
		raw := *req.AccessToken
		if bytes.IndexByte(raw, '\\') >= 0 || json.Unmarshal(raw, &req.token) != nil || req.token == "" {
			return nil, errors.New("accessToken must be a non-empty string without escapes")
		}
		req.hasToken = true
	}
	req.env = make(map[string]string, len(req.EnvVars))
	for name, raw := range req.EnvVars {
		var value string
		if raw == nil || json.Unmarshal(*raw, &value) != nil {
			return nil, fmt.Errorf("envVars: the value of %q is not a string", name)
		}
		if name == "" || strings.ContainsAny(name, "=\x00") || strings.Contains(value, "\x00") {
			return nil, fmt.Errorf("envVars: %q cannot be a variable's name, or its value has a NUL byte", name)
		}
		req.env[name] = value
	}
	if req.Timestamp != nil {
		if req.timestamp, err = time.Parse(time.RFC3339Nano, *req.Timestamp); err != nil {
			return nil, fmt.Errorf("timestamp is not RFC 3339: %q", *req.Timestamp)
		}
	}
	return req, nil
}

// authorize compares with the token that is set. Only its holder may give it again; nobody may change or clear it.
func (s *initService) authorize(req *initRequest) error {
	switch {
	case !s.token.isSet():
	case !req.hasToken:
		return errors.New("access token reset not authorized")
	case !s.token.matches(req.token):
		return errors.New("access token validation failed")
	}
	return nil
}

func (s *initService) serve(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("X-Envd-Version", s.version)
	req, err := parseInit(http.MaxBytesReader(w, r.Body, initBodyLimit))
	if err != nil {
		jsonError(w, http.StatusBadRequest, err.Error())
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.authorize(req); err != nil {
		http.Error(w, err.Error(), http.StatusUnauthorized)
		return
	}
	// A request that was overtaken by a newer one changes nothing; an equal timestamp is a retry.
	if req.Timestamp == nil || !req.timestamp.Before(s.last) {
		if req.Timestamp != nil {
			s.last = req.timestamp
		}
		s.settings.merge(req.env, req.DefaultUser, req.DefaultWorkdir)
		if req.hasToken {
			s.token.set(req.token)
		}
	}
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}
