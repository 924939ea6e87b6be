// Runs a command with the generated client: go run ./examples [URL]
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"

	"connectrpc.com/connect"

	pb "envd/proto"
)

func main() {
	url := append(os.Args, "http://localhost:49983")[1]
	stream, err := pb.NewProcessClient(http.DefaultClient, url).Start(context.Background(),
		connect.NewRequest(&pb.StartRequest{Process: &pb.ProcessConfig{
			Cmd: "/bin/sh", Args: []string{"-c", "echo hello from $(uname -s)"},
		}}))
	if err != nil {
		log.Fatal(err)
	}
	for stream.Receive() {
		event := stream.Msg().GetEvent()
		os.Stdout.Write(event.GetData().GetStdout())
		if end := event.GetEnd(); end != nil {
			fmt.Println("exit code", end.GetExitCode())
		}
	}
	if err := stream.Err(); err != nil {
		log.Fatal(err)
	}
}
