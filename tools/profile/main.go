// Profile starts a daemon that can be profiled, puts loads on it, and shows what it was at work with. The shipped binary has no
// profiler: _overlay/profile.go is laid over the source for this build alone. This is what `make profile` runs.
//
//	profile [-for DURATION] [-load NAME,NAME...] BUILD DIRECTORY
//
// Each load has one client, which does one thing after the other: health, start (/bin/true), output (64 MiB), upload (64 MiB to
// memory, raw), form (the same as multipart), small (1 KiB up and down), list (20,000 files), echo (a byte in a terminal).
//
// BUILD is tools/build. In DIRECTORY are left cpu.pprof, heap.pprof and goroutine.pprof, for `go tool pprof`, and the binary.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"mime/multipart"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"connectrpc.com/connect"

	pb "envd/proto"
)

func main() {
	duration := flag.Duration("for", 10*time.Second, "`duration` of the load")
	names := flag.String("load", "health,start,output", "comma-separated `names` of loads")
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "usage: profile [-for DURATION] [-load NAME,NAME...] BUILD DIRECTORY")
		os.Exit(2)
	}
	if err := run(os.Stdout, flag.Arg(0), flag.Arg(1), strings.Split(*names, ","), *duration); err != nil {
		fmt.Fprintln(os.Stderr, "profile:", err)
		os.Exit(1)
	}
}

func run(out io.Writer, build, dir string, names []string, duration time.Duration) error {
	files, err := os.MkdirTemp("/dev/shm", "envd-profile-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(files)
	var loads []func(string) error
	for _, name := range names {
		load, err := newLoad(name, files)
		if err != nil {
			return err
		}
		loads = append(loads, load)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
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
	if err := wait(func() bool { return ask("GET", url+"/health", "", nil) == nil }); err != nil {
		return fmt.Errorf("the daemon: %w", err)
	}

	ctx, cancel := context.WithTimeout(context.Background(), duration)
	defer cancel()
	var users sync.WaitGroup
	counts := make([]atomic.Int64, len(loads))
	var failed atomic.Pointer[error]
	for i, use := range loads {
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
	for i, name := range names {
		fmt.Fprintf(out, "%s: %d in %v\n", name, counts[i].Load(), duration)
	}
	for _, view := range [][2]string{{"cpu", "-flat"}, {"cpu", "-cum"}, {"heap", "-flat"}, {"goroutine", "-flat"}} {
		file := filepath.Join(dir, view[0]+".pprof")
		text, err := exec.Command("go", "tool", "pprof", "-top", view[1], "-nodecount=30", binary, file).CombinedOutput()
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

const large, listed = 64 << 20, 20_000

// newLoad makes a load by its name; its files lie in dir.
func newLoad(name, dir string) (func(url string) error, error) {
	files := "/files?username=" + me() + "&path=" + dir
	switch name {
	case "health":
		return func(url string) error { return ask("GET", url+"/health", "", nil) }, nil
	case "start":
		return start("/bin/true"), nil
	case "output":
		return start("/usr/bin/head", "-c", strconv.Itoa(large), "/dev/zero"), nil
	case "upload":
		content := make([]byte, large)
		return func(url string) error { return ask("POST", url+files+"/raw", "application/octet-stream", content) }, nil
	case "form":
		var body bytes.Buffer
		form := multipart.NewWriter(&body)
		part, err := form.CreateFormFile("file", "form")
		if err == nil {
			part.Write(make([]byte, large))
			err = form.Close()
		}
		return func(url string) error {
			return ask("POST", url+files+"/form", form.FormDataContentType(), body.Bytes())
		}, err
	case "small":
		content := make([]byte, 1<<10)
		return func(url string) error {
			return errors.Join(ask("POST", url+files+"/small", "application/octet-stream", content), ask("GET", url+files+"/small", "", nil))
		}, nil
	case "list":
		list := filepath.Join(dir, "list")
		err := os.Mkdir(list, 0o755)
		for i := 0; i < listed && err == nil; i++ {
			err = os.WriteFile(filepath.Join(list, strconv.Itoa(i)), nil, 0o644)
		}
		return func(url string) error {
			_, err := pb.NewFilesystemClient(http.DefaultClient, url).ListDir(context.Background(), request(&pb.ListDirRequest{Path: list}))
			return err
		}, err
	case "echo":
		return (&terminal{}).echo, nil
	}
	return nil, fmt.Errorf("there is no load %q", name)
}

func me() string {
	if self, err := user.Current(); err == nil {
		return self.Username
	}
	return "root"
}

// request names the user: a daemon that is not root acts as its own user only.
func request[T any](message *T) *connect.Request[T] {
	r := connect.NewRequest(message)
	r.Header().Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(me()+":")))
	return r
}

// ask makes a request of plain HTTP.
func ask(method, url, contentType string, body []byte) error {
	r, err := http.NewRequest(method, url, bytes.NewReader(body))
	if err != nil {
		return err
	}
	r.Header.Set("Content-Type", contentType)
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s %s: %s: %.200s", method, url, response.Status, text)
	}
	return err
}

// terminal runs cat in a raw terminal, which ends with the daemon: it is hung up then.
type terminal struct {
	stream *connect.ServerStreamForClient[pb.StartResponse]
	pid    uint32
}

// echo sends a byte and waits for it.
func (t *terminal) echo(url string) error {
	client := pb.NewProcessClient(http.DefaultClient, url)
	if t.stream == nil {
		var err error
		t.stream, err = client.Start(context.Background(), request(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: "/bin/sh",
			Args: []string{"-c", "stty raw -echo; echo; exec cat"}},
			Pty: &pb.PTY{Size: &pb.PTY_Size{Cols: 80, Rows: 24}}}))
		if err != nil {
			return err
		}
		t.stream.Receive()
		t.pid = t.stream.Msg().GetEvent().GetStart().GetPid()
		t.stream.Receive() // the terminal is raw now
	}
	_, err := client.SendInput(context.Background(), request(&pb.SendInputRequest{
		Process: &pb.ProcessSelector{Selector: &pb.ProcessSelector_Pid{Pid: t.pid}},
		Input:   &pb.ProcessInput{Input: &pb.ProcessInput_Pty{Pty: []byte("x")}}}))
	if err == nil && !t.stream.Receive() {
		err = cmp.Or(t.stream.Err(), io.ErrUnexpectedEOF)
	}
	return err
}

// start gives a function that runs a command and takes its output.
func start(command string, args ...string) func(url string) error {
	return func(url string) error {
		stream, err := pb.NewProcessClient(http.DefaultClient, url).Start(context.Background(),
			request(&pb.StartRequest{Process: &pb.ProcessConfig{Cmd: command, Args: args}}))
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
