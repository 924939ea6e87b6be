// The HTTP surface: who may ask (origin, token, user), where a request goes, and the small endpoints.
//
// Order of checks: CORS, local clients and origin, token, user, route. Everything is on one port: HTTP/1.1 and h2c, Connect,
// gRPC and gRPC-Web, proto and JSON.

package main

import (
	"container/list"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
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
	maxWaiting     int
	maxRequests    int
}

type route struct {
	method, path string
	open         bool // does its own check of credentials, if any
	handler      http.HandlerFunc
}

type server struct {
	serverOptions
	token    *accessToken
	settings *settings
	users    *userDB
	routes   map[string][]route // by path
	services map[string]http.Handler
	rpcError *connect.ErrorWriter
	waiting  waitingConns
	requests atomic.Int64
}

func newServer(o serverOptions, token *accessToken, settings *settings, users *userDB) *server {
	s := &server{serverOptions: o, token: token, settings: settings, users: users, routes: map[string][]route{},
		services: map[string]http.Handler{}, rpcError: connect.NewErrorWriter()}
	s.waiting = waitingConns{max: o.maxWaiting, conns: map[net.Conn]*list.Element{}}
	s.handle(route{"GET", "/health", true, s.health})
	s.handle(route{"GET", "/envs", false, s.envs})
	return s
}

func (s *server) handle(r route) { s.routes[r.path] = append(s.routes[r.path], r) }

// service adds an RPC service under its path prefix, as connect's constructors give them.
func (s *server) service(prefix string, h http.Handler) { s.services[prefix] = h }

func (s *server) httpServer() *http.Server {
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{
		Handler: s, Protocols: &protocols, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 1000},
		ReadHeaderTimeout: s.headerTimeout, IdleTimeout: s.idleTimeout, MaxHeaderBytes: 1 << 20,
		ConnState: s.waiting.changed,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
	}
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
	defer s.requests.Add(-1)
	if s.requests.Add(1) > int64(s.maxRequests) && r.URL.Path != "/health" {
		jsonError(w, http.StatusServiceUnavailable, "too many requests are being served (--max-requests)")
		return
	}
	if conn := connOf(r); r.ProtoMajor == 1 && r.ContentLength != 0 {
		s.waiting.set(conn, true)
		r.Body = &countedBody{r.Body, func() { s.waiting.set(conn, false) }}
	}
	if reason := s.refusal(r); reason != "" {
		jsonError(w, http.StatusForbidden, reason)
		return
	}
	routes := s.routes[r.URL.Path]
	i := slices.IndexFunc(routes, func(o route) bool { return o.method == r.Method })
	exempt := i >= 0 && routes[i].open
	if s.token.isSet() && !exempt && !s.token.matches(r.Header.Get("X-Access-Token")) {
		jsonError(w, http.StatusUnauthorized,
			"unauthorized access, please provide a valid access token or method signing if supported")
		return
	}
	flusher := &heldWriter{ResponseWriter: w}
	req := &request{breakStream: func() { http.NewResponseController(w).SetWriteDeadline(time.Unix(1, 0)) },
		keepFlush: func() { flusher.held = true }}
	if req.user, _, req.hasUser = r.BasicAuth(); req.hasUser {
		if _, err := s.users.lookup(req.user); err != nil {
			s.rpcError.Write(w, r, connect.NewError(connect.CodeUnauthenticated, fmt.Errorf("invalid username: '%s'", req.user)))
			return
		}
	}
	r = r.WithContext(withRequest(r.Context(), req))
	switch {
	case i >= 0:
		routes[i].handler(w, r)
	case len(routes) > 0:
		for _, other := range routes {
			w.Header().Add("Allow", other.method)
		}
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
	slash := strings.LastIndexByte(r.URL.Path, '/')
	service := s.services[r.URL.Path[:slash+1]]
	if service == nil {
		http.NotFound(w, r)
		return
	}
	if conn, ok := connOf(r).(*net.TCPConn); ok {
		conn.SetWriteBuffer(streamSendBuffer)
	}
	service.ServeHTTP(w, r)
}

var exposedHeaders = strings.Join([]string{"Grpc-Status", "Grpc-Message", "Grpc-Status-Details-Bin", "Location", "Cache-Control",
	"X-Content-Type-Options", "Connect-Content-Encoding", "Connect-Protocol-Version", "Grpc-Encoding", "Envd-Output-Offset",
	"Envd-Output-Lost"}, ", ")

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
	switch method {
	case "HEAD", "GET", "POST", "PUT", "PATCH", "DELETE":
		if origin == "" {
			break
		}
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

// refusal says why this peer or page may not ask at all.
func (s *server) refusal(r *http.Request) string {
	if s.noLocalClients && s.fromHere(r) {
		return "clients on this machine are refused (--no-local-clients)"
	}
	if origin := r.Header.Get("Origin"); origin != "" && s.isnotfc && !s.token.isSet() && !s.originAllowed(origin) {
		// Any page that a developer visits could run commands otherwise.
		return fmt.Sprintf("origin %s is not allowed (--allow-origin)", origin)
	}
	return ""
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
func (s *server) fromHere(r *http.Request) bool {
	host, _, _ := net.SplitHostPort(r.RemoteAddr)
	peer := net.ParseIP(host)
	if peer == nil || peer.IsLoopback() {
		return true
	}
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok && local.IP.Equal(peer) {
		return true
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return true
	}
	return slices.ContainsFunc(addrs, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.Equal(peer)
	})
}

// health answers without a lock that other work could hold.
func (s *server) health(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, map[string]string{"version": s.version})
}

func (s *server) envs(w http.ResponseWriter, r *http.Request) {
	writeJSON(w, s.settings.environment())
}

// waitingConns bounds the HTTP/1 connections that wait for their client: for a request, half-open ones among them, or for the
// rest of its body. Each costs some 20 KiB. Beyond the bound the one that has waited longest is closed.
type waitingConns struct {
	max int

	mu    sync.Mutex // protects what follows
	order list.List  // of net.Conn, the longest waiting first
	conns map[net.Conn]*list.Element
}

func (wc *waitingConns) changed(c net.Conn, state http.ConnState) {
	wc.set(c, state == http.StateNew || state == http.StateIdle)
}

func (wc *waitingConns) set(c net.Conn, waits bool) {
	wc.mu.Lock()
	defer wc.mu.Unlock()
	wc.removeLocked(c)
	if waits {
		wc.conns[c] = wc.order.PushBack(c)
	}
	if wc.order.Len() > wc.max {
		oldest := wc.order.Front().Value.(net.Conn)
		wc.removeLocked(oldest)
		oldest.Close()
	}
}

func (wc *waitingConns) removeLocked(c net.Conn) {
	if e := wc.conns[c]; e != nil {
		wc.order.Remove(e)
		delete(wc.conns, c)
	}
}

// closeAll is for the end, which waits for requests but not for their clients.
func (wc *waitingConns) closeAll() {
	wc.mu.Lock()
	defer wc.mu.Unlock()
	for c := range wc.conns {
		c.Close()
	}
}

// countedBody is a request's body; while it is not complete the connection counts as waiting.
type countedBody struct {
	io.ReadCloser
	complete func()
}

func (b *countedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.complete()
	}
	return n, err
}
