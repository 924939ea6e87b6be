// Profile starts a daemon that can be profiled, loads it with starts, output and requests for /health, and shows what it was at work
// with. The shipped binary has no profiler: _overlay/profile.go is laid over the source for this build alone. This is what
// `make profile` runs.
//
//	profile [-for DURATION] BUILD DIRECTORY
//
// BUILD is tools/build. In DIRECTORY are left cpu.pprof, heap.pprof and goroutine.pprof, for `go tool pprof`, and the binary.
package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

func main() {
	duration := flag.Duration("for", 10*time.Second, "`duration` of the load")
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "usage: profile [-for DURATION] BUILD DIRECTORY")
		os.Exit(2)
	}
	if err := run(os.Stdout, flag.Arg(0), flag.Arg(1), *duration); err != nil {
		fmt.Fprintln(os.Stderr, "profile:", err)
		os.Exit(1)
	}
}

func run(out io.Writer, build, dir string, duration time.Duration) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	binary := filepath.Join(dir, "envd")
	if err := compile(build, binary); err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	os.Remove(filepath.Join(dir, "done"))
	daemon := exec.Command(binary, "--isnotfc", "--listen", "127.0.0.1", "--port", port, "--run-dir", filepath.Join(dir, "run"))
	daemon.Env = append(os.Environ(), "ENVD_PROFILE="+dir, "ENVD_LOG=error")
	daemon.Stderr = os.Stderr
	if err := daemon.Start(); err != nil {
		return err
	}
	defer daemon.Wait()
	defer daemon.Process.Signal(syscall.SIGTERM)
	url := "http://127.0.0.1:" + port
	if err := wait(func() bool { return health(url) == nil }); err != nil {
		return fmt.Errorf("the daemon: %w", err)
	}

	ctx, cancel := context.WithTimeout(context.Background(), duration)
	defer cancel()
	var users sync.WaitGroup
	var counts [3]atomic.Int64
	var failed atomic.Pointer[error]
	for i, use := range []func(string) error{health, start("/bin/true"), start("/usr/bin/head", "-c", "64M", "/dev/zero")} {
		users.Go(func() {
			for ctx.Err() == nil {
				if err := use(url); err != nil {
					failed.Store(&err)
					cancel()
				}
				counts[i].Add(1)
			}
		})
	}
	daemon.Process.Signal(syscall.SIGUSR1)
	<-ctx.Done()
	daemon.Process.Signal(syscall.SIGUSR1)
	err = wait(func() bool { _, err := os.Stat(filepath.Join(dir, "done")); return err == nil })
	users.Wait()
	if failure := failed.Load(); failure != nil {
		return *failure
	}
	if err != nil {
		return fmt.Errorf("the profiles: %w", err)
	}
	fmt.Fprintf(out, "%v: %d x /health, %d x /bin/true, %d x 64 MiB of output\n", duration, counts[0].Load(), counts[1].Load(), counts[2].Load())
	for _, name := range []string{"cpu", "heap", "goroutine"} {
		file := filepath.Join(dir, name+".pprof")
		text, err := exec.Command("go", "tool", "pprof", "-top", "-nodecount=15", binary, file).CombinedOutput()
		if err != nil {
			return fmt.Errorf("pprof %s: %w\n%s", file, err, text)
		}
		fmt.Fprintf(out, "\n%s\n%s", file, text)
	}
	return nil
}

// compile builds the daemon with the profiler laid over it and symbols left in.
func compile(build, binary string) error {
	tools, err := filepath.Abs(filepath.Dir(build))
	if err != nil {
		return err
	}
	overlay, err := json.Marshal(map[string]map[string]string{"Replace": {
		filepath.Join(filepath.Dir(tools), "profile.go"): filepath.Join(tools, "profile", "_overlay", "profile.go")}})
	if err != nil {
		return err
	}
	file := binary + ".overlay.json"
	if err := os.WriteFile(file, overlay, 0o644); err != nil {
		return err
	}
	defer os.Remove(file)
	cmd := exec.Command(build, binary, "-overlay="+file)
	cmd.Env = append(os.Environ(), "STRIP=")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", build, err, text)
	}
	return nil
}

func health(url string) error {
	response, err := http.Get(url + "/health")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	_, err = io.Copy(io.Discard, response.Body)
	return err
}

// start gives a function that runs a command and takes its output.
func start(command string, args ...string) func(url string) error {
	return func(url string) error {
		request := connect.NewRequest(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: command, Args: args}})
		if self, err := user.Current(); err == nil { // a daemon that is not root runs commands as its own user only
			request.Header().Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(self.Username+":")))
		}
		stream, err := pb.NewProcessClient(http.DefaultClient, url).Start(context.Background(), request)
		if err != nil {
			return err
		}
		defer stream.Close()
		for stream.Receive() {
			if end := stream.Msg().GetEvent().GetEnd(); end != nil && end.GetStatus() != "exit status 0" {
				return fmt.Errorf("%s: %s", command, end.GetStatus())
			}
		}
		return stream.Err()
	}
}

func wait(condition func() bool) error {
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			return errors.New("not within a minute")
		}
	}
	return nil
}

func freePort() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer listener.Close()
	return strconv.Itoa(listener.Addr().(*net.TCPAddr).Port), nil
}
