// Credentials: the access token and how it is compared.

package main

import (
	"crypto/sha256"
	"crypto/subtle"
	"sync"
)

// accessToken is the one optional secret of the daemon. Unset, everything is open.
type accessToken struct {
	mu    sync.RWMutex // protects token
	token string
}

func (t *accessToken) isSet() bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.token != ""
}

// matches compares in constant time: digests, so that not even the length of the token shows. Without a token nothing
// matches.
func (t *accessToken) matches(candidate string) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	got, want := sha256.Sum256([]byte(candidate)), sha256.Sum256([]byte(t.token))
	return subtle.ConstantTimeCompare(got[:], want[:]) == 1 && t.token != ""
}

func (t *accessToken) set(token string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.token = token
}
