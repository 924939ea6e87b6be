// RPC errors, what a message costs, and the two codecs of RPC messages.
//
// Each message is paid for before it is read: its body goes through a meter, which takes from the request's grant what the
// message will need in all. Compressed messages are unpacked by the meter, so that their real size counts.
//
// The codecs are those that connect has, with a short way for the messages that carry most bytes: output as JSON, whose base64
// protojson would look through three times more, and streamed stdin, which would be a new allocation a message.

package main

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	pb "envd/proto"
)

type jsonCodec struct{ name string }

func (c jsonCodec) Name() string                  { return c.name }
func (c jsonCodec) Marshal(m any) ([]byte, error) { return c.MarshalAppend(nil, m) }

func (jsonCodec) MarshalAppend(b []byte, m any) ([]byte, error) {
	eventOf, ok := m.(interface{ GetEvent() *pb.ProcessEvent })
	if !ok || eventOf.GetEvent().GetData() == nil {
		return protojson.MarshalOptions{}.MarshalAppend(b, m.(proto.Message))
	}
	var name string
	var output []byte
	switch o := eventOf.GetEvent().GetData().Output.(type) {
	case *pb.ProcessEvent_DataEvent_Stdout:
		name, output = "stdout", o.Stdout
	case *pb.ProcessEvent_DataEvent_Stderr:
		name, output = "stderr", o.Stderr
	case *pb.ProcessEvent_DataEvent_Pty:
		name, output = "pty", o.Pty
	}
	b = append(append(append(b, `{"event":{"data":{"`...), name...), `":"`...)
	return append(base64.StdEncoding.AppendEncode(b, output), `"}}}`...), nil
}

func (jsonCodec) Unmarshal(b []byte, m any) error {
	if len(b) == 0 {
		return errors.New("zero-length payload is not a valid JSON object")
	}
	return protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(b, m.(proto.Message))
}

type protoCodec struct{}

func (protoCodec) Name() string                  { return "proto" }
func (protoCodec) Marshal(m any) ([]byte, error) { return proto.Marshal(m.(proto.Message)) }

func (protoCodec) MarshalAppend(b []byte, m any) ([]byte, error) {
	return proto.MarshalOptions{}.MarshalAppend(b, m.(proto.Message))
}

// inputBuffers hold streamed stdin until it has been written.
var inputBuffers = sync.Pool{New: func() any { return new([]byte) }}

func (protoCodec) Unmarshal(b []byte, m any) error {
	req, ok := m.(*pb.StreamInputRequest)
	stdin := b
	for _, field := range []protowire.Number{2, 2, 1} { // StreamInputRequest.data, DataEvent.input, ProcessInput.stdin
		number, kind, n := protowire.ConsumeTag(stdin)
		if ok = ok && number == field && kind == protowire.BytesType; ok {
			value, m := protowire.ConsumeBytes(stdin[n:])
			stdin, ok = value, n+m == len(stdin) // nothing but this field
		}
	}
	if !ok {
		return proto.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(b, m.(proto.Message))
	}
	buf := inputBuffers.Get().(*[]byte)
	*buf = append((*buf)[:0], stdin...)
	req.Event = &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{
		Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: *buf}}}}
	return nil
}

// wireError is an error as an RPC client sees it.
func wireError(code connect.Code, format string, args ...any) error {
	return connect.NewError(code, fmt.Errorf(format, args...))
}

// ---- what a message costs ------------------------------------------------------------------------------------------

const (
	// maxMessage bounds a request's message, in bytes, decompressed.
	maxMessage = 16 << 20
	// messagePrice is what a byte of a message takes at most while it is read: a buffer that has grown by doubling, the
	// decoded bytes, and with JSON a copy of the text in between.
	messagePrice = 4
	// bufferPrice is what of that is free again when the message is decoded.
	bufferPrice = 2
	// elementPrice is what each string of a message takes besides its text, in bytes: its header in a slice or a map that
	// has grown.
	elementPrice = 32
	// gunzipPrice is what unpacking takes, in bytes: a window and tables.
	gunzipPrice = 48 << 10
)

// payment is what the message of a request costs that is being read, or was read last.
type payment struct {
	ctx     context.Context
	memory  *grant
	isJSON  bool
	isInput bool  // of a process
	size    int64 // bytes of the message that were read
	prepaid int64 // bytes of it that were not, but are paid for
	paid    int64 // bytes of the budget
	buffer  int64 // what of them can be given back when the message is decoded
}

// prepay is for a message whose size is known: who waits for memory holds none of it yet. What is too large will be refused,
// and is not kept.
func (p *payment) prepay(bytes int64) error {
	if bytes <= 0 || bytes > maxMessage {
		return nil
	}
	err := p.charge(messagePrice * bytes)
	if err == nil {
		p.prepaid = bytes
		p.buffer += bufferPrice * bytes
	}
	return err
}

// count pays for what was read, and for the strings in it: there are no more of them than quotes in JSON, or else than tags of
// the fields 1 to 3, which all that repeats has.
func (p *payment) count(read []byte) error {
	elements := bytes.Count(read, []byte{'"'})
	if p.isInput { // one string, whatever is in it
		elements = 0
	} else if !p.isJSON {
		elements = bytes.Count(read, []byte{0x0a}) + bytes.Count(read, []byte{0x12}) + bytes.Count(read, []byte{0x1a})
	}
	n := int64(len(read))
	if p.size += n; p.size > maxMessage {
		return nil
	}
	unpaid := max(n-p.prepaid, 0)
	p.prepaid -= n - unpaid
	err := p.charge(messagePrice*unpaid + elementPrice*int64(elements))
	if err == nil {
		p.buffer += bufferPrice * unpaid
	}
	return err
}

func (p *payment) charge(bytes int64) error {
	err := p.memory.take(p.ctx, bytes)
	if refusal := (*budgetError)(nil); errors.As(err, &refusal) {
		return connect.NewError(connect.CodeResourceExhausted, err)
	}
	if err == nil {
		p.paid += bytes
	}
	return err
}

// decoded gives back what only the reading of the message took.
func (p *payment) decoded() {
	p.memory.give(p.buffer)
	p.paid, p.buffer = p.paid-p.buffer, 0
}

// next gives back all that the last message took.
func (p *payment) next() {
	p.memory.give(p.paid)
	p.size, p.prepaid, p.paid, p.buffer = 0, 0, 0, 0
}

// meterRPC has the messages of a call paid for as they are read. Of a unary call of Connect's the body is the message; other
// calls put an envelope around each.
func meterRPC(r *http.Request, memory *grant) {
	contentType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	cost := &payment{ctx: r.Context(), memory: memory, isJSON: strings.HasSuffix(contentType, "json"),
		isInput: r.URL.Path == pb.ProcessSendInputProcedure || r.URL.Path == pb.ProcessStreamInputProcedure}
	encoding := "Content-Encoding"
	switch {
	case strings.HasPrefix(contentType, "application/connect+"):
		encoding = "Connect-Content-Encoding"
	case strings.HasPrefix(contentType, "application/grpc"):
		encoding = "Grpc-Encoding"
	case r.Header.Get(encoding) == "gzip":
		r.Header.Del(encoding) // connect is given what is unpacked
		r.Body = &meter{payment: cost, source: &gunzip{packed: r.Body}, body: r.Body}
		return
	default:
		r.Body = &meter{payment: cost, source: r.Body, body: r.Body, expected: r.ContentLength}
		return
	}
	r.Body = &envelopes{payment: cost, body: r.Body, gzipped: r.Header.Get(encoding) == "gzip",
		passing: r.URL.Path == pb.ProcessStreamInputProcedure || r.URL.Path == pb.ProcessStartProcedure}
}

// payAnswer takes for the encoded answer of a unary call before it is made: JSON is longer, and grows in its buffer.
func payAnswer(ctx context.Context, memory *grant, header http.Header, answer proto.Message) error {
	price := int64(proto.Size(answer))
	if contentType, _, _ := strings.Cut(header.Get("Content-Type"), ";"); strings.HasSuffix(contentType, "json") {
		price *= 6
	}
	return memory.take(ctx, price)
}

// meterJSON is the body of a request that is no RPC.
func meterJSON(r *http.Request, memory *grant) io.Reader {
	cost := &payment{ctx: r.Context(), memory: memory, isJSON: true}
	return &meter{payment: cost, source: r.Body, body: r.Body, expected: r.ContentLength}
}

// meter is one message that is paid for as it is read.
type meter struct {
	*payment
	source   io.Reader
	body     io.Closer
	expected int64 // bytes, if positive; 0 from the first Read on
}

func (m *meter) Close() error { return m.body.Close() }

func (m *meter) Read(p []byte) (int, error) {
	expected := m.expected
	m.expected = 0
	if err := m.prepay(expected); err != nil {
		return 0, err
	}
	n, err := m.source.Read(p)
	if failure := m.count(p[:n]); failure != nil {
		return 0, failure
	}
	if err == io.EOF {
		m.decoded()
	}
	return n, err
}

// gunzip unpacks; nothing is read before somebody wants to.
type gunzip struct {
	packed io.Reader
	reader *gzip.Reader
}

func (g *gunzip) Read(p []byte) (n int, err error) {
	if g.reader == nil {
		g.reader, err = gzip.NewReader(g.packed)
	}
	if err == nil {
		n, err = g.reader.Read(p)
	}
	if err != nil && err != io.EOF {
		err = wireError(connect.CodeInvalidArgument, "decompress: %w", err)
	}
	return n, err
}

// envelopes is a body of messages in envelopes, each of which begins with a byte of flags and four of length, big-endian.
// Compressed ones are passed on unpacked.
type envelopes struct {
	*payment
	body    io.ReadCloser
	gzipped bool
	passing bool   // when more is asked for, a message is done with, or its handler has paid for what it keeps
	head    []byte // what goes out before more is read
	left    int64  // bytes of the envelope that have not been read
}

const (
	envelopeHead       = 5
	envelopeCompressed = 1 // flag
)

func (e *envelopes) Close() error { return e.body.Close() }

func (e *envelopes) Read(p []byte) (n int, err error) {
	if len(e.head) == 0 && e.left == 0 {
		if err = e.open(); err != nil {
			return 0, err
		}
	}
	if n = copy(p, e.head); n > 0 {
		e.head = e.head[n:]
		return n, nil
	}
	n, err = e.body.Read(p[:min(int64(len(p)), e.left)])
	if e.left -= int64(n); err == io.EOF && e.left == 0 {
		err = nil // the next one will find it
	}
	if failure := e.count(p[:n]); failure != nil {
		return 0, failure
	}
	return n, err
}

// open reads the beginning of the next envelope.
func (e *envelopes) open() error {
	if e.decoded(); e.passing {
		e.next()
	}
	head := make([]byte, envelopeHead)
	n, err := io.ReadFull(e.body, head)
	if err == io.ErrUnexpectedEOF {
		e.head = head[:n] // connect has the words for it
		return nil
	} else if err != nil {
		return err
	}
	e.next()
	size := int64(binary.BigEndian.Uint32(head[1:]))
	if head[0]&envelopeCompressed != 0 && e.gzipped && size <= maxMessage {
		return e.unpack(head[0], size)
	}
	e.head, e.left = head, size
	return e.prepay(size)
}

// unpack reads a compressed message and hands it out as if it had come so.
func (e *envelopes) unpack(flags byte, size int64) error {
	packed := io.LimitReader(e.body, size)
	if err := e.charge(gunzipPrice); err != nil {
		return err
	}
	whole := bytes.NewBuffer(make([]byte, envelopeHead))
	if size > 0 { // connect takes an empty message for one without fields, compressed or not
		source := &meter{payment: e.payment, source: &gunzip{packed: packed}}
		if _, err := whole.ReadFrom(io.LimitReader(source, maxMessage+1)); err != nil {
			return err
		}
	}
	if e.size > maxMessage {
		return wireError(connect.CodeResourceExhausted, "message is larger than configured max %d", maxMessage)
	}
	if _, err := io.Copy(io.Discard, packed); err != nil {
		return err
	}
	e.head = whole.Bytes()
	e.head[0] = flags &^ envelopeCompressed
	binary.BigEndian.PutUint32(e.head[1:], uint32(len(e.head)-envelopeHead))
	return e.charge(bufferPrice * e.size) // for it is held twice: here, and in connect's buffer
}
