// The HTTP surface: who may ask (origin, token, user), where a request goes, and the small endpoints.
//
// Order of checks: CORS, local clients and origin, token, user, route. Everything is on one port: HTTP/1.1 and h2c, Connect,
// gRPC and gRPC-Web, proto and JSON.

package main

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
)

type serverOptions struct {
	version        string
	isnotfc        bool
	allowedOrigins []string
	noLocalClients bool
	headerTimeout  time.Duration
	idleTimeout    time.Duration
	maxWaiting     uint
	maxRequests    uint
}

type route struct {
	method, path string
	open         bool // does its own check of credentials, if any
	handler      http.HandlerFunc
}

type server struct {
	serverOptions
	token     *accessToken
	users     *userDB
	lifecycle *lifecycle
	budget    *budget
	routes    []route
	services  func() map[string]http.Handler // by path prefix; made at the first call, which is later than the first /health
	ready     chan struct{}                  // closed when all that requests may need is there
	conns     connections
	requests  atomic.Int64 // being served
	http      *http.Server
}

func newServer(o serverOptions, token *accessToken, users *userDB, lifecycle *lifecycle, budget *budget) *server {
	s := &server{serverOptions: o, token: token, users: users, lifecycle: lifecycle, budget: budget, ready: make(chan struct{})}
	s.conns = connections{max: o.maxWaiting, open: map[net.Conn]*connection{}}
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	// No IdleTimeout: its timer would hold each HTTP/2 connection that breaks with open streams in memory until it fires
	// (closeStream of net/http sets it once more). tick does it.
	s.http = &http.Server{
		Handler: s, Protocols: &protocols, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 1000},
		ReadHeaderTimeout: s.headerTimeout, MaxHeaderBytes: 16 << 10, // net/http takes up to 30 times as much
		ConnState:   s.conns.changed,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
	}
	return s
}

type connKey struct{}

func connOf(r *http.Request) net.Conn {
	conn, _ := r.Context().Value(connKey{}).(net.Conn)
	return conn
}

// streamSendBuffer bounds, in bytes, what the kernel holds of a stream: what is lost in it when a connection breaks must still
// be in the output log. The kernel doubles the figure for its own overhead (socket(7), SO_SNDBUF).
const streamSendBuffer = 64 << 10

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.cors(w, r) {
		return
	}
	requests := s.requests.Add(1)
	defer s.requests.Add(-1)
	if r.URL.Path != "/health" {
		if requests > int64(s.maxRequests) {
			jsonError(w, http.StatusServiceUnavailable, "too many requests are being served (--max-requests)")
			return
		}
		select {
		case <-s.ready:
		case <-r.Context().Done(): // its client has not waited
			return
		}
	}
	conn := connOf(r)
	if r.ProtoMajor == 1 && r.ContentLength != 0 {
		s.conns.waits(conn, true)
		r.Body = &countedBody{r.Body, func(more bool) { s.conns.waits(conn, more) }}
	}
	if s.noLocalClients && fromHere(r) {
		jsonError(w, http.StatusForbidden, "clients on this machine are refused (--no-local-clients)")
		return
	}
	if origin := r.Header.Get("Origin"); origin != "" && s.isnotfc && !s.token.isSet() && !s.originAllowed(origin) {
		// Any page that a developer visits could run commands otherwise.
		jsonError(w, http.StatusForbidden, fmt.Sprintf("origin %s is not allowed (--allow-origin)", origin))
		return
	}
	var found *route
	var others []string
	for i, o := range s.routes {
		if o.path == r.URL.Path && o.method == r.Method {
			found = &s.routes[i]
		} else if o.path == r.URL.Path {
			others = append(others, o.method)
		}
	}
	if s.token.isSet() && (found == nil || !found.open) && !s.token.matches(r.Header.Get("X-Access-Token")) {
		jsonError(w, http.StatusUnauthorized,
			"unauthorized access, please provide a valid access token or method signing if supported")
		return
	}
	flusher := &heldWriter{ResponseWriter: w}
	memory := s.budget.grant(forRequests)
	defer memory.close()
	req := &request{memory: memory, breakStream: func() { http.NewResponseController(w).SetWriteDeadline(time.Unix(1, 0)) },
		keepFlush: func() { flusher.held = true }}
	if name, _, named := r.BasicAuth(); named {
		user, err := s.users.lookup(name)
		if err != nil {
			connect.NewErrorWriter().Write(w, r, wireError(connect.CodeUnauthenticated, "invalid username: '%s'", name))
			return
		}
		req.user = &user
	}
	r = r.WithContext(context.WithValue(r.Context(), requestKey{}, req))
	switch {
	case found != nil:
		if found.open && r.URL.Path != "/files" { // /health, /init, prepare: whoever sends one is alive
			s.conns.with(conn, func(o *connection) { o.carried++ })
			defer s.conns.with(conn, func(o *connection) { o.carried-- })
		}
		found.handler(w, r)
	case others != nil:
		w.Header()["Allow"] = others
		w.WriteHeader(http.StatusMethodNotAllowed)
	default:
		s.serveRPC(flusher, r)
	}
}

// heldWriter can leave out the flush that connect makes after each message.
type heldWriter struct {
	http.ResponseWriter
	held bool
}

func (w *heldWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *heldWriter) Flush() {
	if !w.held {
		http.NewResponseController(w.ResponseWriter).Flush()
	}
}

func (s *server) serveRPC(w http.ResponseWriter, r *http.Request) {
	service := s.services()[r.URL.Path[:strings.LastIndexByte(r.URL.Path, '/')+1]]
	if service == nil {
		http.NotFound(w, r)
		return
	}
	if conn, ok := connOf(r).(*net.TCPConn); ok {
		conn.SetWriteBuffer(streamSendBuffer)
	}
	meterRPC(r, requestOf(r.Context()).memory)
	service.ServeHTTP(w, r)
}

const exposedHeaders = "Grpc-Status, Grpc-Message, Grpc-Status-Details-Bin, Location, Cache-Control, X-Content-Type-Options, " +
	"Connect-Content-Encoding, Connect-Protocol-Version, Grpc-Encoding, Envd-Output-Offset, Envd-Output-Lost"

// cors lets every origin in, without credentials; it answers preflights itself and tells so. Fetch standard, section 3.2.
func (s *server) cors(w http.ResponseWriter, r *http.Request) (answered bool) {
	h, origin := w.Header(), r.Header.Get("Origin")
	method := r.Header.Get("Access-Control-Request-Method")
	if r.Method != http.MethodOptions || method == "" {
		h.Add("Vary", "Origin")
		if origin != "" {
			h.Set("Access-Control-Allow-Origin", "*")
			h.Set("Access-Control-Expose-Headers", exposedHeaders)
		}
		return false
	}
	h.Add("Vary", "Origin, Access-Control-Request-Method, Access-Control-Request-Headers")
	if origin != "" && slices.Contains([]string{"HEAD", "GET", "POST", "PUT", "PATCH", "DELETE"}, method) {
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("Access-Control-Allow-Methods", method)
		if headers := r.Header.Get("Access-Control-Request-Headers"); headers != "" {
			h.Set("Access-Control-Allow-Headers", headers)
		}
		h.Set("Access-Control-Max-Age", "7200")
	}
	w.WriteHeader(http.StatusNoContent)
	return true
}

func (s *server) originAllowed(origin string) bool {
	if slices.Contains(s.allowedOrigins, origin) || slices.Contains(s.allowedOrigins, "*") {
		return true
	}
	u, err := url.Parse(origin)
	if err != nil {
		return false
	}
	ip := net.ParseIP(u.Hostname())
	return u.Hostname() == "localhost" || ip != nil && ip.IsLoopback()
}

// fromHere tells whether the peer's address is one of this machine's own.
func fromHere(r *http.Request) bool {
	from, _ := netip.ParseAddrPort(r.RemoteAddr) // with a zone, where it is a link's
	peer := net.IP(from.Addr().AsSlice())
	addrs, err := net.InterfaceAddrs()
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
		addrs = append(addrs, &net.IPNet{IP: local.IP})
	}
	return err != nil || peer == nil || peer.IsLoopback() || slices.ContainsFunc(addrs, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.Equal(peer)
	})
}

// health is also how the host says that it goes on after a snapshot. It waits for no lock that other work could hold.
func (s *server) health(w http.ResponseWriter, r *http.Request) {
	if s.lifecycle.state.Load() >= statePrepared && (s.isnotfc || !fromHere(r)) { // else a guest could end what its host has prepared
		s.lifecycle.restore(restoreWait, []byte(r.RemoteAddr), fmt.Append(nil, r.Header))
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	fmt.Fprintf(w, "{\"version\":%q}\n", s.version) // at the start encoding/json would take a tenth of the time until the first answer
}

func (s *server) prepare(w http.ResponseWriter, r *http.Request) {
	if !s.isnotfc && fromHere(r) {
		jsonError(w, http.StatusForbidden, "a sandbox cannot prepare its own snapshot")
		return
	}
	s.lifecycle.prepare(w, r)
}

// quiesce and resume are the hooks of the lifecycle: no idle connection gets into a snapshot; those that get there because they
// are in use are dead when it is resumed, and reset, so that no handler waits for a client that is gone.
func (s *server) quiesce(time.Time) {
	s.http.SetKeepAlivesEnabled(false) // closes what is idle, but for HTTP/2
	s.conns.each(func(c net.Conn, o *connection) {
		if !o.idle.IsZero() {
			c.Close()
		}
	})
}

func (s *server) resume() {
	s.conns.each(func(c net.Conn, o *connection) {
		if o.opened.Before(*s.lifecycle.since.Load()) && o.carried == 0 {
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
	})
	s.http.SetKeepAlivesEnabled(true)
}

// tireless goes on whatever accept(2), or a full epoll set (ENOSPC), fails with: for most of it net/http would stop serving.
type tireless struct{ net.Listener }

func (l tireless) Accept() (conn net.Conn, err error) {
	for said := false; ; said = true {
		if conn, err = l.Listener.Accept(); err == nil || errors.Is(err, net.ErrClosed) {
			return conn, err
		}
		if !said {
			slog.Warn("a connection was not accepted", "logger", "envd", "error", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// tick is called about once a second.
func (s *server) tick(now time.Time) {
	s.conns.each(func(c net.Conn, o *connection) {
		if !o.idle.IsZero() && now.Sub(o.idle) >= s.idleTimeout {
			c.Close()
		}
	})
}

// connections are all that are open. It bounds those of HTTP/1 that wait for their client: for a request, half-open ones among
// them, or for the rest of its body. Each costs some 20 KiB. Beyond the bound the one that has waited longest is closed.
type connections struct {
	max uint

	mu      sync.Mutex // protects what follows, and every connection; nothing is done under it that takes time
	open    map[net.Conn]*connection
	waiting list.List // of net.Conn, the longest waiting first
}

type connection struct {
	place   *list.Element // in waiting, or nil
	idle    time.Time     // since when; zero: it is not
	opened  time.Time
	carried int // requests that begin or end the preparation of a snapshot
}

func (cs *connections) each(do func(net.Conn, *connection)) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	for c, o := range cs.open {
		do(c, o)
	}
}

func (cs *connections) changed(c net.Conn, state http.ConnState) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if state == http.StateNew {
		cs.open[c] = &connection{opened: time.Now()}
	}
	if o := cs.open[c]; o != nil {
		if o.idle = (time.Time{}); state == http.StateIdle {
			o.idle = time.Now()
		}
		cs.waitsLocked(c, o, state == http.StateIdle || state == http.StateNew)
	}
	if state == http.StateClosed || state == http.StateHijacked {
		delete(cs.open, c)
	}
}

func (cs *connections) with(c net.Conn, do func(*connection)) {
	cs.mu.Lock()
	defer cs.mu.Unlock()
	if o := cs.open[c]; o != nil {
		do(o)
	}
}

func (cs *connections) waits(c net.Conn, waits bool) {
	cs.with(c, func(o *connection) { cs.waitsLocked(c, o, waits) })
}

func (cs *connections) waitsLocked(c net.Conn, o *connection, waits bool) {
	if o.place != nil {
		cs.waiting.Remove(o.place)
		o.place = nil
	}
	if waits {
		o.place = cs.waiting.PushBack(c)
	}
	if uint(cs.waiting.Len()) > cs.max {
		oldest := cs.waiting.Front().Value.(net.Conn)
		cs.waitsLocked(oldest, cs.open[oldest], false)
		oldest.Close()
	}
}

// countedBody is a request's body; while it is not complete the connection counts as waiting.
type countedBody struct {
	io.ReadCloser
	progress func(more bool)
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.progress(err == nil)
	return n, err
}
