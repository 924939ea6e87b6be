// Credentials: the access token, how it is compared, and signatures of URLs that stand for it.

package main

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"
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

// refuseFile says with which status and why a request for a file is refused: it needs the token in its header, or a
// signature of what it asks for. Status 0: it is not.
func (t *accessToken) refuseFile(header string, query url.Values, operation string, now time.Time) (status int, reason string) {
	expires, err := strconv.ParseInt(query.Get("signature_expiration"), 10, 64)
	if err != nil && query.Has("signature_expiration") {
		return http.StatusBadRequest, fmt.Sprintf("signature_expiration is no integer: '%s'", query.Get("signature_expiration"))
	}
	t.mu.RLock()
	token := t.token
	t.mu.RUnlock()
	text := fmt.Sprintf("%s:%s:%s:%s", query.Get("path"), operation, query.Get("username"), token)
	if query.Has("signature_expiration") {
		text += fmt.Sprintf(":%d", expires)
	}
	sum := sha256.Sum256([]byte(text))
	signature := "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
	switch {
	case token == "" || t.matches(header):
		return 0, ""
	case header != "":
		return http.StatusUnauthorized, "access token present in header but does not match"
	case !query.Has("signature"):
		return http.StatusUnauthorized, "missing signature query parameter"
	case subtle.ConstantTimeCompare([]byte(query.Get("signature")), []byte(signature)) != 1:
		return http.StatusUnauthorized, "invalid signature"
	case query.Has("signature_expiration") && expires < now.Unix():
		return http.StatusUnauthorized, "signature is already expired"
	}
	return 0, ""
}
