// The bare handler: the least that answers Start with connect-go, as a second thing to compare with. It forks with
// os/exec, copies the output with its 32 KiB buffers, waits, and does nothing else: no leaf, no user, no retention.
//
// It runs in a process of its own, which is this binary started again with bareVariable set.
package main

import (
	"context"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"

	"connectrpc.com/connect"

	pb "envd/proto"
)

const bareVariable = "ENVD_BENCH_BARE_PORT"

type bareHandler struct{ pb.UnimplementedProcessHandler }

// eventWriter sends what is written to it as one event.
type eventWriter struct {
	mu     *sync.Mutex // serialises the two writers of a stream
	stream *connect.ServerStream[pb.StartResponse]
	wrap   func([]byte) *pb.ProcessEvent_DataEvent
}

func (w eventWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.stream.Send(&pb.StartResponse{Event: &pb.ProcessEvent{Event: &pb.ProcessEvent_Data{Data: w.wrap(p)}}})
	return len(p), err
}

func (bareHandler) Start(_ context.Context, req *connect.Request[pb.StartRequest],
	stream *connect.ServerStream[pb.StartResponse]) error {
	var mu sync.Mutex
	cmd := exec.Command(req.Msg.GetProcess().GetCmd(), req.Msg.GetProcess().GetArgs()...)
	cmd.Dir = req.Msg.GetProcess().GetCwd()
	cmd.Stdout = eventWriter{&mu, stream, func(p []byte) *pb.ProcessEvent_DataEvent {
		return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stdout{Stdout: p}}
	}}
	cmd.Stderr = eventWriter{&mu, stream, func(p []byte) *pb.ProcessEvent_DataEvent {
		return &pb.ProcessEvent_DataEvent{Output: &pb.ProcessEvent_DataEvent_Stderr{Stderr: p}}
	}}
	mu.Lock() // the start event comes first
	err := cmd.Start()
	if err == nil {
		err = stream.Send(&pb.StartResponse{Event: &pb.ProcessEvent{Event: &pb.ProcessEvent_Start{
			Start: &pb.ProcessEvent_StartEvent{Pid: uint32(cmd.Process.Pid)}}}})
	}
	mu.Unlock()
	if err != nil {
		return err
	}
	cmd.Wait()
	return stream.Send(&pb.StartResponse{Event: &pb.ProcessEvent{Event: &pb.ProcessEvent_End{
		End: &pb.ProcessEvent_EndEvent{ExitCode: int32(cmd.ProcessState.ExitCode()), Exited: cmd.ProcessState.Exited(),
			Status: cmd.ProcessState.String()}}}})
}

// serveBareIfAsked turns this process into the bare handler when it was started as one.
func serveBareIfAsked() {
	port := os.Getenv(bareVariable)
	if port == "" {
		return
	}
	mux := http.NewServeMux()
	mux.Handle(pb.NewProcessHandler(bareHandler{}))
	mux.HandleFunc("GET /health", func(http.ResponseWriter, *http.Request) {})
	http.ListenAndServe(net.JoinHostPort("127.0.0.1", port), mux)
	os.Exit(1)
}

func startBare(ctx context.Context) (*daemon, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	d := &daemon{}
	return d, d.run(ctx, func(port string) *exec.Cmd {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), bareVariable+"="+port)
		return cmd
	})
}
