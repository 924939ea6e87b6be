// What the HTTP surface tells the services about a request, beside the request itself.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"
)

type request struct {
	user    string // from Basic authentication; identification only
	hasUser bool
	// breakStream makes the write that hangs on this request's connection fail, and every later one. Nothing else frees a
	// handler whose client has stopped reading.
	breakStream func()
	// keepFlush lets what is written from now on wait for the end of the response: one packet and one wake-up of the client less.
	keepFlush func()
}

type requestKey struct{}

func withRequest(ctx context.Context, r *request) context.Context {
	return context.WithValue(ctx, requestKey{}, r)
}

func requestOf(ctx context.Context) *request {
	if r, ok := ctx.Value(requestKey{}).(*request); ok {
		return r
	}
	return &request{breakStream: func() {}, keepFlush: func() {}}
}

// actingUser is the account that a request acts as: the one it names, else the default one.
func actingUser(ctx context.Context, users *userDB, defaultUser string) (account, error) {
	if r := requestOf(ctx); r.hasUser {
		a, err := users.lookup(r.user)
		if err != nil {
			return a, fmt.Errorf("invalid username: '%s'", r.user)
		}
		return a, nil
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
