// Credentials: the access token, how it is compared, and signatures of URLs that stand for it.

package main

import (
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"sync/atomic"
	"time"
)

// accessToken is the one optional secret of the daemon. Unset, everything is open.
type accessToken struct{ value atomic.Value }

func (t *accessToken) get() string {
	token, _ := t.value.Load().(string)
	return token
}

func (t *accessToken) set(token string) { t.value.Store(token) }
func (t *accessToken) isSet() bool      { return t.get() != "" }

// matches compares in constant time: digests, so that not even the length of the token shows. Without a token nothing matches.
func (t *accessToken) matches(candidate string) bool {
	token := t.get()
	got, want := sha256.Sum256([]byte(candidate)), sha256.Sum256([]byte(token))
	return subtle.ConstantTimeCompare(got[:], want[:]) == 1 && token != ""
}

var (
	errTokenReset = errors.New("access token reset not authorized")
	errTokenWrong = errors.New("access token validation failed")
)

// mayInit says whether the token of a request to /init, "" where it has none, may replace the one that is set. Its holder may
// give it again. The host vouches for a new one, and by the hash of "" for its removal, with a hash in the metadata (SHA-512 in
// lower-case hex); where there is no hash, "", anyone may set the first one.
func (t *accessToken) mayInit(token, hash string) error {
	sum := sha512.Sum512([]byte(token))
	vouched := subtle.ConstantTimeCompare([]byte(hex.EncodeToString(sum[:])), []byte(hash)) == 1
	switch {
	case t.matches(token), vouched, hash == "" && !t.isSet():
		return nil
	case token == "":
		return errTokenReset
	}
	return errTokenWrong
}

// refuseFile says with which status and why a request for a file is refused: it needs the token in its header, or a
// signature of what it asks for. Status 0: it is not.
func (t *accessToken) refuseFile(header string, query url.Values, operation string, now time.Time) (status int, reason string) {
	expires, err := strconv.ParseInt(query.Get("signature_expiration"), 10, 64)
	if err != nil && query.Has("signature_expiration") {
		return http.StatusBadRequest, fmt.Sprintf("signature_expiration is no integer: '%s'", query.Get("signature_expiration"))
	}
	token := t.get()
	if token == "" || t.matches(header) {
		return 0, ""
	}
	text := fmt.Sprintf("%s:%s:%s:%s", query.Get("path"), operation, query.Get("username"), token)
	if query.Has("signature_expiration") {
		text += fmt.Sprintf(":%d", expires)
	}
	sum := sha256.Sum256([]byte(text))
	signature := "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
	switch {
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
