// grpc-go, the client that most programs in Go use, over h2c.
package e2e

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "envd/proto"
)

func dialGRPC(t *testing.T, url string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+strings.TrimPrefix(url, "http://"),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func start(ctx context.Context, conn *grpc.ClientConn, script string) (grpc.ServerStreamingClient[pb.StartResponse], error) {
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/process.Process/Start")
	if err != nil {
		return nil, err
	}
	client := &grpc.GenericClientStream[pb.StartRequest, pb.StartResponse]{ClientStream: stream}
	request := &pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", script}}}
	if err := errors.Join(client.ClientStream.SendMsg(request), client.CloseSend()); err != nil {
		return nil, err
	}
	return client, nil
}

// follow reads a stream to its end and gives the output and the exit code.
func follow(stream grpc.ServerStreamingClient[pb.StartResponse], output io.Writer) (exit int32, err error) {
	exit = -1
	for {
		response, err := stream.Recv()
		switch {
		case err == io.EOF:
			return exit, nil
		case err != nil:
			return exit, err
		}
		output.Write(response.GetEvent().GetData().GetStdout())
		if end := response.GetEvent().GetEnd(); end != nil {
			exit = end.GetExitCode()
		}
	}
}

// TestGRPCStreams runs 500 commands at once on one connection. A tenth of the streams is not read until all others have ended: their
// windows are full, and they may hold up nobody else.
func TestGRPCStreams(t *testing.T) {
	const streams, lines = 500, 20_000
	url := startDaemon(t, freePort(t))
	conn := dialGRPC(t, url)
	ctx, cancel := context.WithTimeout(context.Background(), 2*caseTimeout)
	defer cancel()

	var quick, slow sync.WaitGroup
	run := func(i int, group *sync.WaitGroup) {
		stream, err := start(ctx, conn, fmt.Sprintf(`i=%d; yes "stream $i" | head -n %d; exit $((i %% 7))`, i, lines))
		if err != nil {
			t.Errorf("stream %d: %v", i, err)
			group.Done()
			return
		}
		go func() {
			defer group.Done()
			if group == &slow {
				quick.Wait()
			}
			var output strings.Builder
			exit, err := follow(stream, &output)
			if want := strings.Repeat(fmt.Sprintf("stream %d\n", i), lines); err != nil || exit != int32(i%7) || output.String() != want {
				t.Errorf("stream %d: exit code %d, %d bytes of %d, %v", i, exit, output.Len(), len(want), err)
			}
		}()
	}
	for i := range streams {
		group := &quick
		if i%10 == 0 {
			group = &slow
		}
		group.Add(1)
		run(i, group)
	}
	slow.Wait()
	nothingRuns(t, url)
}

// TestGRPC has what else a client of gRPC relies on: status codes, deadlines, cancellation, a client's stream of input.
func TestGRPC(t *testing.T) {
	t.Parallel()
	url := startDaemon(t, freePort(t))
	t.Cleanup(func() { nothingRuns(t, url) })
	conn := dialGRPC(t, url)
	ctx, cancel := context.WithTimeout(context.Background(), caseTimeout)
	defer cancel()
	code := func(err error, want codes.Code) {
		t.Helper()
		if status.Code(err) != want {
			t.Errorf("%v, want %v", err, want)
		}
	}
	call := func(method string, request, response any) error {
		return conn.Invoke(ctx, method, request, response)
	}

	code(call("/process.Process/SendSignal", &pb.SendSignalRequest{Process: &pb.ProcessSelector{
		Selector: &pb.ProcessSelector_Tag{Tag: "nobody"}}, Signal: pb.Signal_SIGNAL_SIGTERM}, &pb.SendSignalResponse{}), codes.NotFound)
	code(call("/process.Process/NoSuchMethod", &pb.ListRequest{}, &pb.ListResponse{}), codes.Unimplemented)
	code(call("/filesystem.Filesystem/Stat", &pb.StatRequest{Path: "/no/such"}, &pb.StatResponse{}), codes.NotFound)
	stranger := metadata.AppendToOutgoingContext(ctx, "authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte("no-such-user:")))
	code(conn.Invoke(stranger, "/filesystem.Filesystem/Stat", &pb.StatRequest{Path: "/"}, &pb.StatResponse{}), codes.Unauthenticated)

	short, cancelShort := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancelShort()
	stream, err := start(short, conn, "sleep 60")
	if err == nil {
		_, err = follow(stream, io.Discard)
	}
	code(err, codes.DeadlineExceeded)

	// Input in a stream of the client's own; the process ends with its input.
	stream, err = start(ctx, conn, "cat; exit 5")
	if err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	process := &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: first.GetEvent().GetStart().GetPid()}}
	input, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, "/process.Process/StreamInput")
	if err != nil {
		t.Fatal(err)
	}
	send := func(m *pb.StreamInputRequest) {
		if err := input.SendMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Start{Start: &pb.StreamInputRequest_StartEvent{Process: process}}})
	var want strings.Builder
	for i := range 1000 {
		line := fmt.Sprintf("line %d\n", i)
		want.WriteString(line)
		send(&pb.StreamInputRequest{Event: &pb.StreamInputRequest_Data{Data: &pb.StreamInputRequest_DataEvent{
			Input: &pb.ProcessInput{Input: &pb.ProcessInput_Stdin{Stdin: []byte(line)}}}}})
	}
	if err := errors.Join(input.CloseSend(), input.RecvMsg(&pb.StreamInputResponse{})); err != nil {
		t.Fatal(err)
	}
	if err := call("/process.Process/CloseStdin", &pb.CloseStdinRequest{Process: process}, &pb.CloseStdinResponse{}); err != nil {
		t.Fatal(err)
	}
	var output strings.Builder
	if exit, err := follow(stream, &output); err != nil || exit != 5 || output.String() != want.String() {
		t.Errorf("exit code %d, %v; %d bytes came back of %d", exit, err, output.Len(), want.Len())
	}
}
