// The HTTP surface: who may ask (origin, token, user), where a request goes, and the small endpoints.
//
// Order of checks: CORS, local clients and origin, token, user, route. Everything is on one port: HTTP/1.1 and h2c, Connect,
// gRPC and gRPC-Web, proto and JSON.

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

type serverOptions struct {
	version        string
	isnotfc        bool
	allowedOrigins []string
	noLocalClients bool
	hosts          []netip.Prefix // who is the host; none: everybody who is not inside
	guestAddress   netip.Addr     // at which the host reaches a guest
	headerTimeout  time.Duration
	idleTimeout    time.Duration
	answerTimeout  time.Duration
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
	strangers *measure // requests to /init and /snapshot/prepare
	inits     *measure // large bodies of /init
	lookups   *measure // in the host's metadata, of requests to /init
	inside    neighbours
	http      *http.Server
}

func newServer(o serverOptions, token *accessToken, users *userDB, lifecycle *lifecycle, budget *budget) *server {
	s := &server{serverOptions: o, token: token, users: users, lifecycle: lifecycle, budget: budget, ready: make(chan struct{})}
	s.conns = connections{budget: budget, token: token, open: map[*connection]bool{}, peers: map[netip.Addr]*peer{}}
	s.strangers, s.inits = newMeasure(&s.conns, strangerRequests), newMeasure(&s.conns, largeInits)
	s.lookups, s.inside.outward = newMeasure(&s.conns, metadataLookups), o.guestAddress
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	// No IdleTimeout: its timer would hold each HTTP/2 connection that breaks with open streams in memory until it fires
	// (closeStream of net/http sets it once more). tick does it.
	s.http = &http.Server{
		Handler: s, Protocols: &protocols, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 1000,
			MaxReceiveBufferPerConnection: receiveBuffer, MaxReceiveBufferPerStream: receiveBuffer, MaxReadFrameSize: 16 << 10},
		ReadHeaderTimeout: s.headerTimeout, MaxHeaderBytes: 16 << 10, // net/http takes up to 30 times as much
		ConnState: s.conns.changed, ConnContext: s.conns.accept,
	}
	return s
}

// receiveBuffer bounds, in bytes, what of bodies in HTTP/2 has come and is not read; as much as HTTP/2 lets a client begin with.
const receiveBuffer = 64 << 10

// streamSendBuffer bounds, in bytes, what the kernel holds of a stream: what is lost in it when a connection breaks must still
// be in the output log. The kernel doubles the figure for its own overhead (socket(7), SO_SNDBUF).
const streamSendBuffer = 64 << 10

// ServeHTTP pays for a request (admission.go) and lets it be answered.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	conn := connOf(r)
	who := s.credentials(r)
	admission := s.conns.begin(r.Context(), conn, who.token, who.trusted)
	defer s.conns.end(conn, admission)
	if admission.abort {
		panic(http.ErrAbortHandler)
	}
	answer := &answer{ResponseWriter: w, conn: conn, http2: r.ProtoMajor == 2, patience: s.answerTimeout}
	defer answer.stop()
	req := &request{memory: admission.memory, vouch: func() { s.conns.vouch(conn, admission.memory) }, keepFlush: func() { answer.quiet = true },
		breakStream: func() { http.NewResponseController(w).SetWriteDeadline(time.Unix(1, 0)) }}
	// From here on it is a copy: in net/http's own request its own body must stay, by which it sees that one was not read to
	// its end, and that what follows on the connection is no request.
	r = r.WithContext(context.WithValue(r.Context(), requestKey{}, req))
	if r.ContentLength != 0 {
		body := s.conns.countBody(conn, r.Body)
		defer body.end()
		r.Body = body
	}
	s.serve(answer, r, who.token, admission)
	answer.finish()
	conn.yield()
}

// credentials are what a request has shown.
type credentials struct {
	token   bool // the access token
	trusted bool // the token, or a signature that stands for it, or there is no token
}

func (s *server) credentials(r *http.Request) (c credentials) {
	header := r.Header.Get("X-Access-Token")
	c.token = header != "" && s.token.matches(header)
	if c.trusted = c.token || !s.token.isSet(); !c.trusted && r.URL.Path == "/files" && strings.Contains(r.URL.RawQuery, "signature=") {
		operation := "read"
		if r.Method == http.MethodPost {
			operation = "write"
		}
		status, _ := s.token.refuseFile(header, r.URL.Query(), operation, time.Now())
		c.trusted = status == 0
	}
	return c
}

func (s *server) serve(w *answer, r *http.Request, token bool, admitted admission) {
	if s.cors(w, r) {
		return
	}
	if err := admitted.refusal; err != nil {
		jsonError(w, http.StatusServiceUnavailable, err.Error())
		return
	}
	if r.URL.Path != "/health" {
		select {
		case <-s.ready:
		case <-r.Context().Done(): // its client has not waited
			return
		}
	}
	if s.noLocalClients && s.fromInside(r) {
		jsonError(w, http.StatusForbidden, "clients on this machine are refused (--no-local-clients)")
		return
	}
	if s.isnotfc && !s.token.isSet() {
		if err := s.checkPage(r); err != nil {
			jsonError(w, http.StatusForbidden, err.Error())
			return
		}
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
	if s.token.isSet() && (found == nil || !found.open) && !token {
		jsonError(w, http.StatusUnauthorized,
			"unauthorized access, please provide a valid access token or method signing if supported")
		return
	}
	if name, _, named := r.BasicAuth(); named {
		user, err := s.users.lookup(name)
		if err != nil {
			connect.NewErrorWriter().Write(w, r, wireError(connect.CodeUnauthenticated, "invalid username: '%s'", name))
			return
		}
		requestOf(r.Context()).user = &user
	}
	switch {
	case found != nil:
		s.serveRoute(w, r, found, admitted.stranger)
	case others != nil:
		w.Header()["Allow"] = others
		w.WriteHeader(http.StatusMethodNotAllowed)
	default:
		s.serveRPC(w, r)
	}
}

func (s *server) serveRoute(w *answer, r *http.Request, found *route, stranger bool) {
	switch found.path {
	case "/files":
		if stranger { // who will get an error
			break
		}
		w.unlimited()
		if !w.http2 {
			found.handler(w.ResponseWriter, r) // by sendfile
			return
		}
	case "/init", "/snapshot/prepare":
		if stranger {
			leave, err := s.strangers.enter(r.Context())
			if err != nil {
				jsonError(w, http.StatusServiceUnavailable, err.Error())
				return
			}
			defer leave()
		}
		fallthrough
	case "/health": // whoever sends one of these is alive
		s.conns.carries(w.conn, 1)
		defer s.conns.carries(w.conn, -1)
	}
	found.handler(w, r)
}

// streams are what last as long as their clients like, who may take them as slowly as they like.
var streams = []string{pb.ProcessStartProcedure, pb.ProcessConnectProcedure, pb.ProcessStreamInputProcedure, pb.FilesystemWatchDirProcedure}

func (s *server) serveRPC(w *answer, r *http.Request) {
	service := s.services()[r.URL.Path[:strings.LastIndexByte(r.URL.Path, '/')+1]]
	if service == nil {
		http.NotFound(w, r)
		return
	}
	w.conn.SetWriteBuffer(streamSendBuffer)
	if slices.Contains(streams, r.URL.Path) {
		w.unlimited()
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

// checkPage refuses what a web page could have made a developer's browser send, who has no token: any page that is visited could
// run commands otherwise. A page of this machine may ask, and one that --allow-origin names. Others show by their Origin; where
// a browser sends none (for a script, an image, a link) by Sec-Fetch-Site; after DNS rebinding, which makes them look like our
// own, by the name that they have us for, which is then no loopback one.
func (s *server) checkPage(r *http.Request) error {
	origin := r.Header.Get("Origin")
	site := r.Header.Get("Sec-Fetch-Site")
	switch {
	case slices.Contains(s.allowedOrigins, "*"):
	case origin != "" && !s.originAllowed(origin):
		return fmt.Errorf("origin %s is not allowed (--allow-origin)", origin)
	case origin == "" && (site == "cross-site" || site == "same-site"):
		return errors.New("another page's request without an Origin is not allowed (Sec-Fetch-Site)")
	case !s.hostAllowed(r.Host):
		return fmt.Errorf("host %s is not allowed: it is no loopback name or address, and --allow-origin does not name it", r.Host)
	}
	return nil
}

func (s *server) originAllowed(origin string) bool {
	if slices.Contains(s.allowedOrigins, origin) {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && isLoopbackName(u.Hostname())
}

// hostAllowed is for the header Host. Who sends none (HTTP/1.0) is no browser.
func (s *server) hostAllowed(host string) bool {
	u := url.URL{Host: host}
	return host == "" || isLoopbackName(u.Hostname()) || slices.ContainsFunc(s.allowedOrigins, func(origin string) bool {
		allowed, err := url.Parse(origin)
		return err == nil && allowed.Host != "" && strings.EqualFold(allowed.Hostname(), u.Hostname())
	})
}

// isLoopbackName tells whether a name or an address can only mean this machine (RFC 6761, section 6.3).
func isLoopbackName(name string) bool {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	ip := net.ParseIP(name)
	return name == "localhost" || strings.HasSuffix(name, ".localhost") || ip != nil && ip.IsLoopback()
}

// fromInside tells whether the peer is on this machine, or in one of its containers, and not the host.
func (s *server) fromInside(r *http.Request) bool {
	from, _ := netip.ParseAddrPort(r.RemoteAddr) // with a zone, where it is a link's
	peer := from.Addr()
	if len(s.hosts) > 0 {
		return !slices.ContainsFunc(s.hosts, func(host netip.Prefix) bool { return host.Contains(peer.Unmap().WithZone("")) })
	}
	local, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return ok && local.AddrPort().Addr().Unmap() == peer.Unmap() || s.inside.inside(peer)
}

// health is also how the host says that it goes on after a snapshot. It waits for no lock that other work could hold.
func (s *server) health(w http.ResponseWriter, r *http.Request) {
	if s.lifecycle.state.Load() >= statePrepared && (s.isnotfc || !s.fromInside(r)) { // else a guest could end what its host has prepared
		s.lifecycle.restore(restoreWait, []byte(r.RemoteAddr), fmt.Append(nil, r.Header))
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	fmt.Fprintf(w, "{\"version\":%q}\n", s.version) // at the start encoding/json would take a tenth of the time until the first answer
}

func (s *server) prepare(w http.ResponseWriter, r *http.Request) {
	if !s.isnotfc && s.fromInside(r) {
		jsonError(w, http.StatusForbidden, "a sandbox cannot prepare its own snapshot")
		return
	}
	s.lifecycle.prepare(w, r)
}

// quiesce and resume are the hooks of the lifecycle: no idle connection gets into a snapshot; those that get there because they
// are in use are dead when it is resumed, and reset, so that no handler waits for a client that is gone.
func (s *server) quiesce(time.Time) {
	s.http.SetKeepAlivesEnabled(false) // closes what is idle, but for HTTP/2
	s.conns.each(func(c *connection) {
		if !c.idle.IsZero() {
			c.Close()
		}
	})
}

func (s *server) resume() {
	s.conns.each(func(c *connection) {
		if c.opened.Before(*s.lifecycle.since.Load()) && c.carried == 0 {
			c.SetLinger(0)
			c.Close()
		}
	})
	s.http.SetKeepAlivesEnabled(true)
}

// listen serves what comes to a listener of TCP, until that is closed.
func (s *server) listen(listener net.Listener) error { return s.http.Serve(tireless{listener}) }

// tireless goes on whatever accept(2), or a full epoll set (ENOSPC), fails with: for most of it net/http would stop serving.
type tireless struct{ net.Listener }

func (l tireless) Accept() (net.Conn, error) {
	for said := false; ; said = true {
		conn, err := l.Listener.Accept()
		if err == nil {
			return &connection{TCPConn: conn.(*net.TCPConn)}, nil
		} else if errors.Is(err, net.ErrClosed) {
			return nil, err
		}
		if !said {
			slog.Warn("a connection was not accepted", "logger", "envd", "error", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// tick is called about once a second.
func (s *server) tick(now time.Time) {
	s.inside.refresh(neighboursRefresh)
	s.conns.tick(now)
	s.conns.each(func(c *connection) {
		if !c.idle.IsZero() && now.Sub(c.idle) >= s.idleTimeout {
			c.Close()
		}
	})
}
