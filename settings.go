// What the control plane sets through /init: the environment that every process gets, the default user and directory.

package main

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"sync"
)

// systemVariables are the daemon's own, without their prefix; no client changes them.
var systemVariables = []string{"SANDBOX", "SANDBOX_ID", "TEMPLATE_ID", "EVENTS_ADDRESS"}

type settings struct {
	e2bNames bool // system variables go by their E2B_ names as well

	mu             sync.RWMutex // protects what follows
	env            map[string]string
	defaultUser    string
	defaultWorkdir string
}

func (s *settings) isSystem(name string) bool {
	prefix, rest, _ := strings.Cut(name, "_")
	return slices.Contains(systemVariables, rest) && (prefix == "WRENN" || prefix == "E2B" && s.e2bNames)
}

// setSystem sets one of the daemon's own variables, named without its prefix.
func (s *settings) setSystem(name, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.env["WRENN_"+name] = value
	if s.e2bNames {
		s.env["E2B_"+name] = value
	}
}

// merge adds a client's variables; what is not named stays.
func (s *settings) merge(env map[string]string, defaultUser, defaultWorkdir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, value := range env {
		if !s.isSystem(name) {
			s.env[name] = value
		}
	}
	s.defaultUser = cmp.Or(defaultUser, s.defaultUser)
	s.defaultWorkdir = cmp.Or(defaultWorkdir, s.defaultWorkdir)
}

// sizeWith is what all variables take, in bytes, with a client's.
func (s *settings) sizeWith(env map[string]string) (size int) {
	all := s.environment()
	maps.Copy(all, env)
	for name, value := range all {
		size += len(name) + len("=\x00") + len(value)
	}
	return size
}

func (s *settings) environment() map[string]string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return maps.Clone(s.env)
}

func (s *settings) defaults() (user, workdir string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.defaultUser, s.defaultWorkdir
}
