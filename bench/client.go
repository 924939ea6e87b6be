// The clients: connect-go's, as a host agent would use it, and a raw reader that parses envelopes and nothing else, so
// that what it measures is the daemon.
//
// Both speak Connect over HTTP/1.1 with keep-alive and without compression, which is what every SDK of this family
// does.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "envd/proto"
)

// client is one HTTP client with its own connections.
type client struct {
	http *http.Client
	url  string
	proc pb.ProcessClient
	json pb.ProcessClient
	user string // the acting user; "" is the daemon's default
}

func newClient(url, user string) *client {
	c := &client{url: url, user: user, http: &http.Client{Transport: &http.Transport{
		MaxIdleConnsPerHost: 1024,
		DisableCompression:  true,
		ReadBufferSize:      64 << 10,
		WriteBufferSize:     64 << 10,
	}}}
	plain := connect.WithAcceptCompression("gzip", nil, nil)
	c.proc = pb.NewProcessClient(c.http, url, plain)
	c.json = pb.NewProcessClient(c.http, url, plain, connect.WithProtoJSON())
	return c
}

func (c *client) close() { c.http.CloseIdleConnections() }

func (c *client) authorise(h http.Header) {
	if c.user != "" {
		h.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(c.user+":")))
	}
}

// command is a Start request in / without standard input: what the SDKs send, but for the shell.
func command(cmd string, args ...string) *pb.StartRequest {
	return &pb.StartRequest{
		Process: &pb.ProcessConfig{Cmd: cmd, Args: args, Cwd: proto.String("/")},
		Stdin:   proto.Bool(false),
	}
}

// ending is what a stream held.
type ending struct {
	bytes  int // of output
	starts int
	ends   int
	status string
}

func (e *ending) take(event *pb.ProcessEvent) {
	switch v := event.GetEvent().(type) {
	case *pb.ProcessEvent_Start:
		e.starts++
	case *pb.ProcessEvent_Data:
		e.bytes += len(v.Data.GetStdout()) + len(v.Data.GetStderr()) + len(v.Data.GetPty())
	case *pb.ProcessEvent_End:
		e.ends++
		e.status = v.End.GetStatus()
	}
}

// check wants one start, n bytes of output, and the end of a process that succeeded.
func (e ending) check(n int) error {
	if e.starts != 1 || e.ends != 1 || e.status != "exit status 0" || e.bytes != n {
		return fmt.Errorf("%d start, %d end (%q), %d bytes of %d", e.starts, e.ends, e.status, e.bytes, n)
	}
	return nil
}

// run starts a process and reads its stream to the end; each, when not nil, sees every event.
func (c *client) run(ctx context.Context, proc pb.ProcessClient, msg *pb.StartRequest,
	each func(*pb.ProcessEvent)) (ending, error) {
	var e ending
	req := connect.NewRequest(msg)
	c.authorise(req.Header())
	stream, err := proc.Start(ctx, req)
	if err != nil {
		return e, err
	}
	for stream.Receive() {
		event := stream.Msg().GetEvent()
		e.take(event)
		if each != nil {
			each(event)
		}
	}
	return e, errors.Join(stream.Err(), stream.Close())
}

// followed is how a stream that follow reads has ended.
type followed struct {
	ending
	err error
}

// follow runs a process in the background. The first channel gives it once it has started, the second its end.
func (c *client) follow(ctx context.Context, msg *pb.StartRequest, each func(*pb.ProcessEvent)) (
	<-chan *pb.ProcessSelector, <-chan followed) {
	process, done := make(chan *pb.ProcessSelector, 1), make(chan followed, 1)
	go func() {
		e, err := c.run(ctx, c.proc, msg, func(event *pb.ProcessEvent) {
			if s := event.GetStart(); s != nil {
				process <- &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: s.GetPid()}}
			}
			if each != nil {
				each(event)
			}
		})
		done <- followed{e, err}
	}()
	return process, done
}

// sendInput sends n bytes by one StreamInput and returns when the process's pipe has taken them.
func (c *client) sendInput(ctx context.Context, to *pb.ProcessSelector, n int) error {
	input := c.proc.StreamInput(ctx)
	c.authorise(input.RequestHeader())
	err := input.Send(inputStart(to))
	piece := make([]byte, stdinChunk)
	for sent := 0; sent < n && err == nil; sent += len(piece) {
		err = input.Send(inputData(piece[:min(stdinChunk, n-sent)]))
	}
	_, closeErr := input.CloseAndReceive() // tells why, when a Send failed
	return errors.Join(err, closeErr)
}

func inputStart(to *pb.ProcessSelector) *pb.StreamInputRequest {
	return &pb.StreamInputRequest{Event: &pb.StreamInputRequest_Start{
		Start: &pb.StreamInputRequest_StartEvent{Process: to}}}
}

func inputData(p []byte) *pb.StreamInputRequest {
	return &pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: p}}}}}
}

// sendInputRaw does what sendInput does with one buffer made beforehand and plain writes to a socket.
func (c *client) sendInputRaw(ctx context.Context, to *pb.ProcessSelector, n int) error {
	start, err := envelope(proto.Marshal, inputStart(to))
	if err != nil {
		return err
	}
	piece, err := envelope(proto.Marshal, inputData(make([]byte, stdinChunk)))
	if err != nil {
		return err
	}
	pieces := n / stdinChunk
	if pieces*stdinChunk != n {
		return fmt.Errorf("%d bytes are not a multiple of %d", n, stdinChunk)
	}
	conn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write(c.requestText(pb.ProcessStreamInputProcedure, "application/connect+proto", start,
		pieces*len(piece)))
	for i := 0; i < pieces && err == nil; i++ {
		_, err = conn.Write(piece)
	}
	if err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	r := bufio.NewReader(resp.Body)
	for {
		flags, payload, err := readEnvelope(r)
		if err != nil {
			return fmt.Errorf("StreamInput: %s: %w", resp.Status, err)
		}
		if flags == endOfStream {
			return endError(payload)
		}
	}
}

func inputKey(to *pb.ProcessSelector) *pb.SendInputRequest {
	return &pb.SendInputRequest{Process: to, Input: &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte{'x'}}}}
}

// keys gives a function that types one byte into a terminal.
func (c *client) keys(ctx context.Context, to *pb.ProcessSelector) (key func() error, done func(), err error) {
	key = func() error {
		req := connect.NewRequest(inputKey(to))
		c.authorise(req.Header())
		_, err := c.proc.SendInput(ctx, req)
		return err
	}
	return key, func() {}, nil
}

// keysRaw does what keys does with a request made beforehand.
func (c *client) keysRaw(ctx context.Context, to *pb.ProcessSelector) (key func() error, done func(), err error) {
	payload, err := proto.Marshal(inputKey(to))
	if err != nil {
		return nil, nil, err
	}
	return c.repeater(ctx, c.requestText(pb.ProcessSendInputProcedure, "application/proto", payload, 0))
}

// getter gives a function that gets path, which has a short answer.
func (c *client) getter(ctx context.Context, path string) (get func() error, done func(), err error) {
	return c.repeater(ctx, fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", path))
}

// repeater gives a function that makes the same request again and again, by one write and one read on a socket of its own.
func (c *client) repeater(ctx context.Context, request []byte) (repeat func() error, done func(), err error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, nil, err
	}
	answer := make([]byte, 4096)
	repeat = func() error {
		if _, err := conn.Write(request); err != nil {
			return err
		}
		n, err := conn.Read(answer) // its few header lines and the short message are one segment
		if err == nil && !bytes.HasPrefix(answer[:n], []byte("HTTP/1.1 2")) {
			err = fmt.Errorf("%q answered %q", request, answer[:n])
		}
		return err
	}
	return repeat, func() { conn.Close() }, nil
}

// dial opens a connection that breaks when ctx ends.
func (c *client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", strings.TrimPrefix(c.url, "http://"))
	if err == nil {
		context.AfterFunc(ctx, func() { conn.Close() })
	}
	return conn, err
}

// requestText is a request as it goes over the wire, with the first part of its body; `more` bytes of it are to follow.
func (c *client) requestText(procedure, contentType string, body []byte, more int) []byte {
	header := http.Header{}
	connectHeaders(header, contentType)
	c.authorise(header)
	var text bytes.Buffer
	fmt.Fprintf(&text, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n", procedure,
		strings.TrimPrefix(c.url, "http://"), len(body)+more)
	header.Write(&text)
	text.WriteString("\r\n")
	text.Write(body)
	return text.Bytes()
}

// exec runs /bin/true to the end of its stream.
func (c *client) exec(ctx context.Context) (time.Duration, error) {
	start := time.Now()
	e, err := c.run(ctx, c.proc, command("/bin/true"), nil)
	took := time.Since(start)
	if err == nil {
		err = e.check(0)
	}
	return took, err
}

// runRaw does what run does with the raw reader. The codec is "proto" or "json".
func (c *client) runRaw(ctx context.Context, codec string, msg *pb.StartRequest) (ending, error) {
	var e ending
	marshal := proto.Marshal
	if codec == "json" {
		marshal = protojson.Marshal
	}
	body, err := envelope(marshal, msg)
	if err != nil {
		return e, err
	}
	req, err := http.NewRequestWithContext(ctx, "POST", c.url+pb.ProcessStartProcedure, bytes.NewReader(body))
	if err != nil {
		return e, err
	}
	connectHeaders(req.Header, "application/connect+"+codec)
	c.authorise(req.Header)
	resp, err := c.http.Do(req)
	if err != nil {
		return e, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return e, fmt.Errorf("start: %s", resp.Status)
	}
	r := bufio.NewReaderSize(resp.Body, 64<<10)
	for {
		head, err := r.Peek(5)
		if err != nil {
			return e, fmt.Errorf("the stream broke: %w", err)
		}
		if n := int(binary.BigEndian.Uint32(head[1:])); head[0] == 0 && n > small {
			take := e.takeLargeProto
			if codec == "json" {
				take = e.takeLargeJSON
			}
			r.Discard(5)
			if err := take(r, n); err != nil {
				return e, err
			}
			continue
		}
		flags, payload, err := readEnvelope(r)
		if err != nil {
			return e, err
		}
		if flags == endOfStream {
			_, err := io.Copy(io.Discard, r) // the last chunk, so that the connection is kept
			return e, errors.Join(endError(payload), err)
		}
		var m pb.StartResponse
		unmarshal := proto.Unmarshal
		if codec == "json" {
			unmarshal = protojson.Unmarshal
		}
		if err := unmarshal(payload, &m); err != nil {
			return e, err
		}
		e.take(m.GetEvent())
	}
}

func connectHeaders(h http.Header, contentType string) {
	h.Set("Content-Type", contentType)
	h.Set("Connect-Protocol-Version", "1")
}

// envelope frames a message as Connect's streams do: flags, length, payload.
func envelope(marshal func(proto.Message) ([]byte, error), msg proto.Message) ([]byte, error) {
	payload, err := marshal(msg)
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(payload))), payload...), err
}

// endOfStream is the flag of the last envelope, which is JSON.
const endOfStream = 2

func readEnvelope(r *bufio.Reader) (flags byte, payload []byte, err error) {
	var head [5]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return 0, nil, fmt.Errorf("the stream broke: %w", err)
	}
	payload = make([]byte, binary.BigEndian.Uint32(head[1:]))
	if _, err := io.ReadFull(r, payload); err != nil {
		return 0, nil, fmt.Errorf("the stream broke: %w", err)
	}
	if head[0] != 0 && head[0] != endOfStream {
		return 0, nil, fmt.Errorf("an envelope with flags %#x", head[0])
	}
	return head[0], payload, nil
}

func endError(payload []byte) error {
	var end struct {
		Error *struct{ Code, Message string }
	}
	err := json.Unmarshal(payload, &end)
	if err == nil && end.Error != nil {
		err = fmt.Errorf("%s: %s", end.Error.Code, end.Error.Message)
	}
	return err
}

// small is the size up to which an envelope is decoded whole. Only output is larger, and of that the raw reader looks
// at no more than the frame around the bytes.
const small = 1024

func (e *ending) takeLargeProto(r *bufio.Reader, n int) error {
	frame, err := r.Peek(32)
	if err != nil {
		return err
	}
	var length uint64
	for _, field := range []protowire.Number{1, 2, 0} { // event, data, any output
		number, kind, used := protowire.ConsumeTag(frame)
		if used < 0 || kind != protowire.BytesType || field != 0 && number != field {
			return errors.New("a large message that is not output")
		}
		frame = frame[used:]
		if length, used = protowire.ConsumeVarint(frame); used < 0 {
			return errors.New("a large message that is not output")
		}
		frame = frame[used:]
	}
	e.bytes += int(length)
	_, err = r.Discard(n)
	return err
}

// takeLargeJSON counts what base64 stands for between the last quoted value's quotes.
func (e *ending) takeLargeJSON(r *bufio.Reader, n int) error {
	frame, err := r.Peek(256)
	if err != nil {
		return err
	}
	at := bytes.Index(frame, []byte(`"stdout"`))
	if at < 0 {
		return errors.New("a large message that is not stdout")
	}
	at += len(`"stdout"`)
	open := bytes.IndexByte(frame[at:], '"')
	if open < 0 {
		return errors.New("a large message that is not stdout")
	}
	skip := at + open + 1
	if _, err := r.Discard(skip); err != nil {
		return err
	}
	const tail = 16 // holds the closing quote, the braces and what spaces may be between them
	if _, err := r.Discard(n - skip - tail); err != nil {
		return err
	}
	end, err := r.Peek(tail)
	if err != nil {
		return err
	}
	quote := bytes.IndexByte(end, '"')
	if quote < 0 {
		return errors.New("a large message that is not stdout")
	}
	characters := n - skip - tail + quote
	padding := bytes.Count(end[:quote], []byte("="))
	e.bytes += characters/4*3 - padding
	_, err = r.Discard(tail)
	return err
}
