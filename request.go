// What the HTTP surface tells the services about a request, beside the request itself.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
)

type request struct {
	memory *grant   // what the daemon holds for this request; closed after its answer
	user   *account // named by Basic authentication, which is identification only; nil: none named
	// breakStream makes the write that hangs on this request's connection fail, and every later one. Nothing else frees a
	// handler whose client has stopped reading.
	breakStream func()
	// keepFlush lets what is written from now on wait for the end of the response: one packet and one wake-up of the client less.
	keepFlush func()
	// vouch says that the body has shown the access token: neither the request nor its connection is a stranger's any more.
	vouch func()
}

// errNoPlace says that others are at what a request is for (measure), and have been for long.
var errNoPlace = errors.New("too many requests that have not shown the access token are being served")

type requestKey struct{}

func requestOf(ctx context.Context) *request {
	if r, ok := ctx.Value(requestKey{}).(*request); ok {
		return r
	}
	return &request{breakStream: func() {}, keepFlush: func() {}, vouch: func() {}}
}

// actingUser is the account that a request acts as: the one it names, else the default one.
func actingUser(ctx context.Context, users *userDB, defaultUser string) (account, error) {
	if r := requestOf(ctx); r.user != nil {
		return *r.user, nil
	}
	if defaultUser == "" {
		return account{}, errors.New("no user specified")
	}
	a, err := users.lookup(defaultUser)
	if err != nil {
		return a, fmt.Errorf("invalid default user: '%s'", defaultUser)
	}
	return a, nil
}

// keepAliveInterval reads Keepalive-Ping-Interval, in seconds.
func keepAliveInterval(header http.Header, standard time.Duration) time.Duration {
	seconds, err := strconv.ParseInt(header.Get("Keepalive-Ping-Interval"), 10, 64)
	if err != nil || seconds <= 0 {
		return standard
	}
	return time.Duration(min(seconds, 86400)) * time.Second
}

// weight is an element of a header such as Accept: a name, in lower case, and its q (RFC 9110, section 12.4.2).
type weight struct {
	name string
	q    float64
}

func weights(header []string) (list []weight) {
	for part := range strings.SplitSeq(strings.Join(header, ","), ",") {
		name, parameters, _ := mime.ParseMediaType(part)
		w := weight{name, 1}
		if q, err := strconv.ParseFloat(parameters["q"], 64); err == nil {
			w.q = q
		}
		if name != "" {
			list = append(list, w)
		}
	}
	return list
}

// weightOf is how welcome a media type is. The range that names it most closely decides; what is not named is not welcome.
func weightOf(accept []weight, mediaType string) float64 {
	family, _, _ := strings.Cut(mediaType, "/")
	for _, name := range []string{mediaType, family + "/*", "*/*"} {
		q := -1.0
		for _, w := range accept {
			if w.name == name {
				q = max(q, w.q)
			}
		}
		if q >= 0 {
			return q
		}
	}
	return 0
}

func writeJSON(w http.ResponseWriter, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	json.NewEncoder(w).Encode(value)
}

// jsonError is the envelope of every error of a plain HTTP endpoint.
func jsonError(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(struct {
		Code    int    `json:"code"`
		Message string `json:"message"`
	}{status, message})
}
