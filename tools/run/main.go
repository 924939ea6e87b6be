// Run shows what envd does: it starts the daemon on the loopback address, has it run a command, prints what the command
// printed, and keeps the daemon until Ctrl-C. This is what `make run` runs.
package main

import (
	"context"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

// The command tells who and where it is, and writes to both outputs.
const command = `echo "Hello from process $$, user $(id -un), on $(uname -sr)."
echo "This line went to standard error." >&2`

func main() {
	port := flag.Int("port", 49983, "where the daemon listens")
	once := flag.Bool("once", false, "stop the daemon after the command")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: run [-once] [-port N] ENVD")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, flag.Arg(0), *port, *once); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, "run:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, envd string, port int, once bool) error {
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	// Another daemon on the port would answer in the place of ours.
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("%w (another port: make run PORT=50000)", err)
	}
	listener.Close()

	daemon := exec.Command(envd, "--isnotfc", "--listen", "127.0.0.1", "--port", strconv.Itoa(port))
	daemon.Stdout, daemon.Stderr = os.Stdout, os.Stderr
	daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is ours; the daemon gets a SIGTERM
	fmt.Println("$", strings.Join(daemon.Args, " "))
	if err := daemon.Start(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	gone := make(chan struct{})
	go func() {
		defer close(gone)
		cancel(fmt.Errorf("the daemon ended: %v", daemon.Wait()))
	}()
	defer func() {
		daemon.Process.Signal(syscall.SIGTERM)
		<-gone
	}()

	if err := waitHealthy(ctx, "http://"+address); err != nil {
		return err
	}
	if err := runCommand(ctx, "http://"+address); err != nil {
		return err
	}
	if once {
		return nil
	}
	fmt.Printf("\nenvd listens on http://%s. Ctrl-C stops it.\n", address)
	<-ctx.Done()
	return context.Cause(ctx)
}

// waitHealthy returns when the daemon answers.
func waitHealthy(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Second, errors.New("no answer from the daemon in 10 s"))
	defer cancel()
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/health", nil)
		if err != nil {
			return err
		}
		response, err := http.DefaultClient.Do(request)
		if err == nil {
			response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// runCommand starts the command and prints its output as it arrives, then its exit status.
func runCommand(ctx context.Context, url string) error {
	process := &pb.ProcessConfig{Cmd: "/bin/sh", Args: []string{"-c", command}, Cwd: new("/")}
	request := connect.NewRequest(&pb.StartRequest{Process: process})
	if self, err := user.Current(); err == nil { // a daemon that is not root runs commands as its own user only
		request.Header().Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(self.Username+":")))
	}
	stream, err := pb.NewProcessClient(http.DefaultClient, url).Start(ctx, request)
	if err != nil {
		return err
	}
	defer stream.Close()
	fmt.Printf("\nPOST %s%s\n/bin/sh -c '%s'\n\n", url, pb.ProcessStartProcedure, command)
	for stream.Receive() {
		event := stream.Msg().GetEvent()
		os.Stdout.Write(event.GetData().GetStdout())
		os.Stderr.Write(event.GetData().GetStderr())
		if end := event.GetEnd(); end != nil {
			fmt.Println(end.GetStatus())
			if end.GetExitCode() != 0 {
				return fmt.Errorf("the command failed: %s", end.GetStatus())
			}
			return nil
		}
	}
	return fmt.Errorf("the stream ended before the command: %v", stream.Err())
}
