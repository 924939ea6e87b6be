// RPC errors, and the two codecs of RPC messages, as connect has them, with a short way for those that carry most bytes: output as JSON,
// whose base64 protojson would look through three times more, and streamed stdin, which would be a new allocation a message.

package main

import (
	"encoding/base64"
	"errors"
	"fmt"
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
