// What the control plane sets through /init: the environment that every process gets, the default user and directory.

package main

import (
	"maps"
	"sync"
)

// systemVariables are the daemon's own; no client changes them.
var systemVariables = map[string]bool{
	"WRENN_SANDBOX": true, "WRENN_SANDBOX_ID": true, "WRENN_TEMPLATE_ID": true, "WRENN_EVENTS_ADDRESS": true,
}

type settings struct {
	mu             sync.RWMutex // protects what follows
	env            map[string]string
	defaultUser    string
	defaultWorkdir string
}

// merge adds a client's variables; what is not named stays.
func (s *settings) merge(env map[string]string, defaultUser, defaultWorkdir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, value := range env {
		if !systemVariables[name] {
			s.env[name] = value
		}
	}
	if defaultUser != "" {
		s.defaultUser = defaultUser
	}
	if defaultWorkdir != "" {
		s.defaultWorkdir = defaultWorkdir
	}
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
