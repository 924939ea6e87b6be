// Command bare is the bare handler: the least that does an agent's work with the same libraries, as a second thing to compare
// with. It answers Start by forking with os/exec, copies the output with its 32 KiB buffers, waits, and does nothing else: no
// leaf, no user, no retention. GET /file serves a file, PUT /file copies the body to one; a method COPY hands over the
// connection, whose bytes go to the file until it ends.
package main

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"

	"connectrpc.com/connect"

	pb "envd/proto"
)

type handler struct{ pb.UnimplementedProcessHandler }

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

func (handler) Start(_ context.Context, req *connect.Request[pb.StartRequest],
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

func file(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Query().Get("path")
	if r.Method == "GET" {
		http.ServeFile(w, r, path)
		return
	}
	f, err := os.Create(path)
	if err == nil {
		_, err = io.Copy(f, r.Body)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		http.Error(w, err.Error(), 500)
	}
}

func copyConnection(w http.ResponseWriter, r *http.Request) {
	conn, buffered, err := w.(http.Hijacker).Hijack()
	if err != nil {
		return
	}
	defer conn.Close()
	f, err := os.Create(r.URL.Query().Get("path"))
	if err == nil {
		_, err = io.CopyN(f, buffered, int64(buffered.Reader.Buffered()))
	}
	if err == nil {
		_, err = io.Copy(f, conn)
	}
	if err == nil && f.Close() == nil {
		conn.Write([]byte("ok"))
	}
}

func main() {
	http.Handle(pb.NewProcessHandler(handler{}))
	http.HandleFunc("GET /health", func(http.ResponseWriter, *http.Request) {})
	http.HandleFunc("/file", file)
	http.HandleFunc("COPY /file", copyConnection)
	log.Fatal(http.ListenAndServe(net.JoinHostPort("127.0.0.1", os.Args[1]), nil))
}
