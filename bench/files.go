// The figures of files: download, upload, gzip, small files, listings.
//
//	download  against http.ServeFile of a bare Go server
//	upload    against a TCP connection that a Go program copies to a file
//	gzip      against compress/gzip at its default level, in this process
//	small     1 KiB files, 8 clients, against plain writes and reads of such files by 8 goroutines
//	list      ListDir against a walk with lstat
//	watch     a recursive WatchDir while files and directories with a file each are made at once
//
// The bare server runs in a process of its own: this binary, started with bareFilesVariable set. Everything is on tmpfs.
package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	pb "envd/proto"
)

const (
	bareFilesVariable = "ENVD_BENCH_BARE_FILES_PORT"
	filesSmall        = 8000
	filesListed       = 20_000
	filesClients      = 8
)

func init() {
	figures = append(figures,
		figure{"files-download", []rowSpec{
			{"download from tmpfs", throughput, ratioAtLeast(0.93)},
			{"download, peak RSS", bytesSize, under(16 << 20)},
			{"range of 1 MiB, p50", seconds, target{}},
		}, measureDownload},
		figure{"files-upload", []rowSpec{
			{"raw upload to tmpfs", throughput, ratioAtLeast(0.88)},
			{"multipart upload to tmpfs", throughput, ratioAtLeast(0.33)},
			{"upload, peak RSS", bytesSize, under(16 << 20)},
		}, measureUpload},
		figure{"files-gzip", []rowSpec{
			{"gzip download of text", throughput, ratioAtLeast(2.2)},
		}, measureGzip},
		figure{"files-small", []rowSpec{
			{"uploads of 1 KiB, 8 clients", perSecond, ratioAtLeast(0.1)},
			{"downloads of 1 KiB, 8 clients", perSecond, ratioAtLeast(0.1)},
		}, measureSmall},
		figure{"files-list", []rowSpec{
			{"ListDir of 20,000 files", seconds, ratioAtMost(1.6)},
			{"ListDir, peak RSS", bytesSize, under(36 << 20)},
		}, measureList},
		figure{"files-watch", []rowSpec{
			{"burst of 20,000 files and 2,000 directories, events missing", count, exactly(0)},
			{"burst of 20,000 files and 2,000 directories, events doubled", count, exactly(0)},
			{"burst of 20,000 files and 2,000 directories, last event after the last change", seconds, target{}},
		}, measureWatch})
	if port := os.Getenv(bareFilesVariable); port != "" {
		serveBareFiles(port)
	}
}

// serveBareFiles: GET /file serves one, PUT /file copies the body to one; a method COPY hands over the connection,
// whose bytes go to the file until it ends.
func serveBareFiles(port string) {
	http.ListenAndServe("127.0.0.1:"+port, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		path := r.URL.Query().Get("path")
		switch {
		case r.URL.Path == "/health":
		case r.Method == "GET":
			http.ServeFile(w, r, path)
		case r.Method == "COPY":
			conn, buffered, err := w.(http.Hijacker).Hijack()
			if err != nil {
				return
			}
			defer conn.Close()
			f, err := os.Create(path)
			if err == nil {
				_, err = io.CopyN(f, buffered, int64(buffered.Reader.Buffered()))
			}
			if err == nil {
				_, err = io.Copy(f, conn)
			}
			if err == nil && f.Close() == nil {
				conn.Write([]byte("ok"))
			}
		default:
			f, err := os.Create(path)
			if err == nil {
				_, err = io.Copy(f, r.Body)
				err = errors.Join(err, f.Close())
			}
			if err != nil {
				http.Error(w, err.Error(), 500)
			}
		}
	}))
	os.Exit(1)
}

func (b *bench) bareFiles(ctx context.Context) (*daemon, error) {
	return b.server(ctx, "bare files", func(ctx context.Context) (*daemon, error) {
		self, err := os.Executable()
		if err != nil {
			return nil, err
		}
		d := &daemon{}
		return d, d.run(ctx, func(port string) *exec.Cmd {
			cmd := exec.Command(self)
			cmd.Env = append(os.Environ(), bareFilesVariable+"="+port)
			return cmd
		})
	})
}

// How many bytes a run moves: 1 GiB down, 512 MiB up, 256 MiB of text; less in quicker runs.
func (b *bench) downloadSize() int64 { return int64(2 * b.stdout) }
func (b *bench) uploadSize() int64   { return int64(b.stdout) }
func (b *bench) textSize() int       { return b.stdout / 2 }

// memoryDir makes a directory on tmpfs.
func memoryDir() (string, func(), error) {
	dir, err := os.MkdirTemp("/dev/shm", "envd-bench-")
	return dir, func() { os.RemoveAll(dir) }, err
}

// exchange sends one request by hand, its body from a reader, and reads the answer; everything is counted, nothing kept.
func exchange(addr, head string, body io.Reader, answer func(*http.Response) error) error {
	conn, err := net.Dial("tcp", strings.TrimPrefix(addr, "http://"))
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, head+"Host: bench\r\nConnection: close\r\n\r\n"); err != nil {
		return err
	}
	if body != nil {
		if _, err := io.CopyBuffer(struct{ io.Writer }{conn}, body, make([]byte, 256<<10)); err != nil {
			return err
		}
	}
	r := bufio.NewReaderSize(conn, 64<<10)
	response, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	if response.StatusCode/100 != 2 {
		text, _ := io.ReadAll(response.Body)
		return fmt.Errorf("%s: %s", response.Status, text)
	}
	return answer(response)
}

// swallow reads a body of at least n bytes.
func swallow(n int64) func(*http.Response) error {
	return func(response *http.Response) error {
		buf, got := make([]byte, 256<<10), int64(0)
		for {
			m, err := response.Body.Read(buf)
			got += int64(m)
			if err == io.EOF && got >= n {
				return nil
			} else if err != nil {
				return fmt.Errorf("%w after %d bytes of %d", err, got, n)
			}
		}
	}
}

type zeroReader struct{ left int64 }

func (z *zeroReader) Read(p []byte) (int, error) {
	if z.left == 0 {
		return 0, io.EOF
	}
	n := min(int64(len(p)), z.left)
	z.left -= n
	return int(n), nil
}

func timed(n int64, do func() error) (float64, error) {
	runtime.GC()
	start := time.Now()
	err := do()
	return float64(n) / time.Since(start).Seconds(), err
}

func filesURL(route, path string) string { return route + "?path=" + url.QueryEscape(path) }

func measureDownload(ctx context.Context, b *bench, add add) (err error) {
	dir, clean, err := memoryDir()
	if err != nil {
		return err
	}
	defer clean()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, bytes.Repeat([]byte("0123456789abcdef"), int(b.downloadSize()/16)), 0o644); err != nil {
		return err
	}
	d, err := b.startEnvd(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	bare, err := b.bareFiles(ctx)
	if err != nil {
		return err
	}
	get := func(d *daemon, route, extra string, n int64) (float64, error) {
		return timed(n, func() error {
			return exchange(d.url, "GET "+filesURL(route, file)+" HTTP/1.1\r\n"+extra, nil, swallow(n))
		})
	}
	if _, err := get(bare, "/file", "", b.downloadSize()); err != nil {
		return err
	}
	ours, err := get(d, "/files", "", b.downloadSize())
	if err != nil {
		return err
	}
	baseline, err := get(bare, "/file", "", b.downloadSize())
	if err != nil {
		return err
	}
	rss, err := d.status("VmHWM")
	if err != nil {
		return err
	}
	add("download from tmpfs", ours, baseline, none)
	add("download, peak RSS", rss, none, none)
	took, err := inTurn(100, []func() (time.Duration, error){
		func() (time.Duration, error) {
			start := time.Now()
			_, err := get(d, "/files", "Range: bytes=1000000-2048575\r\n", 1<<20)
			return time.Since(start), err
		},
		func() (time.Duration, error) {
			start := time.Now()
			_, err := get(bare, "/file", "Range: bytes=1000000-2048575\r\n", 1<<20)
			return time.Since(start), err
		},
	})
	if err == nil {
		add("range of 1 MiB, p50", percentile(took[0], 50), percentile(took[1], 50), none)
	}
	return err
}

func measureUpload(ctx context.Context, b *bench, add add) (err error) {
	dir, clean, err := memoryDir()
	if err != nil {
		return err
	}
	defer clean()
	d, err := b.startEnvd(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	bare, err := b.bareFiles(ctx)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "f")
	put := func(d *daemon, head string, before, after string) (float64, error) {
		os.Remove(file)
		n := int64(len(before)+len(after)) + b.uploadSize()
		return timed(b.uploadSize(), func() error {
			return exchange(d.url, fmt.Sprintf("%sContent-Length: %d\r\n", head, n),
				io.MultiReader(strings.NewReader(before), &zeroReader{b.uploadSize()}, strings.NewReader(after)), swallow(0))
		})
	}
	raw := func() (float64, error) {
		return put(d, "POST "+filesURL("/files", file)+" HTTP/1.1\r\nContent-Type: application/octet-stream\r\n", "", "")
	}
	form := func() (float64, error) {
		return put(d, "POST "+filesURL("/files", file)+" HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=b\r\n",
			"--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"f\"\r\n\r\n", "\r\n--b--\r\n")
	}
	handler := func() (float64, error) { return put(bare, "PUT "+filesURL("/file", file)+" HTTP/1.1\r\n", "", "") }
	tcp := func() (float64, error) {
		os.Remove(file)
		return timed(b.uploadSize(), func() error {
			conn, err := net.Dial("tcp", strings.TrimPrefix(bare.url, "http://"))
			if err != nil {
				return err
			}
			defer conn.Close()
			io.WriteString(conn, "COPY "+filesURL("/file", file)+" HTTP/1.1\r\nHost: x\r\n\r\n")
			if _, err := io.CopyBuffer(struct{ io.Writer }{conn}, &zeroReader{b.uploadSize()}, make([]byte, 256<<10)); err != nil {
				return err
			}
			conn.(*net.TCPConn).CloseWrite()
			_, err = io.ReadAll(conn)
			return err
		})
	}
	var speeds [4]float64
	for i, side := range []func() (float64, error){tcp, raw, form, handler} {
		if speeds[i], err = side(); err != nil {
			return err
		}
		if info, err := os.Stat(file); err != nil || info.Size() != b.uploadSize() {
			return fmt.Errorf("side %d: %v %v", i, info, err)
		}
	}
	rss, err := d.status("VmHWM")
	add("raw upload to tmpfs", speeds[1], speeds[0], speeds[3])
	add("multipart upload to tmpfs", speeds[2], speeds[0], none)
	add("upload, peak RSS", rss, none, none)
	return err
}

func measureGzip(ctx context.Context, b *bench, add add) error {
	dir, clean, err := memoryDir()
	if err != nil {
		return err
	}
	defer clean()
	d, err := b.shared(ctx)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "text")
	if err := writeText(file, b.textSize()); err != nil {
		return err
	}
	ours, err := timed(int64(b.textSize()), func() error {
		return exchange(d.url, "GET "+filesURL("/files", file)+" HTTP/1.1\r\nAccept-Encoding: gzip\r\n", nil, swallow(1000))
	})
	if err != nil {
		return err
	}
	baseline, err := timed(int64(b.textSize()), func() error {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		z := gzip.NewWriter(io.Discard)
		_, err = io.Copy(z, f)
		return errors.Join(err, z.Close())
	})
	add("gzip download of text", ours, baseline, none)
	return err
}

// writeText writes something like a log: lines that are alike and never the same.
func writeText(path string, n int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	seed := uint64(1)
	words := strings.Fields("request answer user file watch process error warning started stopped listening memory disk network packet")
	for written := 0; written < n; {
		seed = seed*6364136223846793005 + 1442695040888963407
		m, _ := fmt.Fprintf(w, "2026-01-02T03:04:%02d.%06dZ %s %s id=%d took %dus\n", seed>>58, seed>>44&0xfffff,
			words[seed>>33%uint64(len(words))], words[seed>>23%uint64(len(words))], seed>>40, seed>>50)
		written += m
	}
	return w.Flush()
}

func measureSmall(ctx context.Context, b *bench, add add) error {
	dir, clean, err := memoryDir()
	if err != nil {
		return err
	}
	defer clean()
	d, err := b.shared(ctx)
	if err != nil {
		return err
	}
	bare, err := b.bareFiles(ctx)
	if err != nil {
		return err
	}
	c := newClient(d.url, "")
	defer c.close()
	content := bytes.Repeat([]byte("x"), 1024)
	var serial atomic.Int64
	name := func() string { return filepath.Join(dir, fmt.Sprintf("f%d", serial.Add(1)%1000)) }
	request := func(method, address, route string) func() error {
		return func() error {
			var body io.Reader
			if method != "GET" {
				body = bytes.NewReader(content)
			}
			r, err := http.NewRequestWithContext(ctx, method, address+filesURL(route, name()), body)
			if err != nil {
				return err
			}
			r.Header.Set("Content-Type", "application/octet-stream")
			response, err := c.http.Do(r)
			if err != nil {
				return err
			}
			defer response.Body.Close()
			got, err := io.ReadAll(response.Body)
			if response.StatusCode != 200 || method == "GET" && len(got) != 1024 {
				err = fmt.Errorf("%s: %s", response.Status, got)
			}
			return err
		}
	}
	rates := func(row string, sides ...func() error) error {
		var total [3]time.Duration
		for range 4 {
			for i, side := range sides {
				n := filesSmall / 4
				if i == 1 {
					n *= 4 // the plain files are much quicker
				}
				took, err := inParallel(filesClients, n, side)
				if err != nil {
					return err
				}
				total[i] += took
			}
		}
		add(row, filesSmall/total[0].Seconds(), 4*filesSmall/total[1].Seconds(), filesSmall/total[2].Seconds())
		return nil
	}
	err = rates("uploads of 1 KiB, 8 clients", request("POST", d.url, "/files"),
		func() error { return os.WriteFile(name(), content, 0o644) }, request("PUT", bare.url, "/file"))
	if err == nil {
		err = rates("downloads of 1 KiB, 8 clients", request("GET", d.url, "/files"),
			func() error { _, err := os.ReadFile(name()); return err }, request("GET", bare.url, "/file"))
	}
	return err
}

func measureList(ctx context.Context, b *bench, add add) (err error) {
	dir, clean, err := memoryDir()
	if err != nil {
		return err
	}
	defer clean()
	for i := range filesListed {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("file-%d", i)), nil, 0o644); err != nil {
			return err
		}
	}
	d, err := b.startEnvd(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	message, err := proto.Marshal(&pb.ListDirRequest{Path: dir})
	if err != nil {
		return err
	}
	took, err := inTurn(block, []func() (time.Duration, error){
		func() (time.Duration, error) {
			start := time.Now()
			err := exchange(d.url, fmt.Sprintf("POST /filesystem.Filesystem/ListDir HTTP/1.1\r\nContent-Type: application/proto\r\nContent-Length: %d\r\n", len(message)),
				bytes.NewReader(message), swallow(filesListed*50))
			return time.Since(start), err
		},
		func() (time.Duration, error) {
			start, n := time.Now(), 0
			err := filepath.WalkDir(dir, func(_ string, entry os.DirEntry, err error) error {
				if err == nil {
					_, err = entry.Info()
				}
				n++
				return err
			})
			if n != filesListed+1 {
				err = fmt.Errorf("%d entries", n)
			}
			return time.Since(start), err
		},
	})
	if err != nil {
		return err
	}
	rss, err := d.status("VmHWM")
	add("ListDir of 20,000 files", percentile(took[0], 50), percentile(took[1], 50), none)
	add("ListDir, peak RSS", rss, none, none)
	return err
}

// measureWatch makes files, and directories with a file each, as fast as it can and counts the CREATE events of each.
func measureWatch(ctx context.Context, b *bench, add add) error {
	dir, clean, err := memoryDir()
	if err != nil {
		return err
	}
	defer clean()
	d, err := b.shared(ctx)
	if err != nil {
		return err
	}
	c := newClient(d.url, "")
	defer c.close()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	stream, err := pb.NewFilesystemClient(c.http, d.url).WatchDir(ctx, connect.NewRequest(&pb.WatchDirRequest{Path: dir, Recursive: true}))
	if err != nil {
		return err
	}
	defer stream.Close()
	if !stream.Receive() || stream.Msg().GetStart() == nil {
		return fmt.Errorf("no start: %v", stream.Err())
	}
	made := make(chan error, 1)
	var last time.Time
	go func() {
		var err error
		for i := 0; i < 20_000 && err == nil; i++ {
			err = os.WriteFile(filepath.Join(dir, fmt.Sprintf("file%d", i)), nil, 0o644)
		}
		for i := 0; i < 2000 && err == nil; i++ {
			sub := filepath.Join(dir, fmt.Sprintf("dir%d", i))
			if err = os.Mkdir(sub, 0o755); err == nil {
				err = os.WriteFile(filepath.Join(sub, "in"), nil, 0o644)
			}
		}
		last = time.Now()
		made <- errors.Join(err, os.WriteFile(filepath.Join(dir, "last"), nil, 0o644))
	}()
	seen := map[string]int{}
	// Events of a directory come in the order of its changes; those made up for new directories come before what follows.
	for seen["last"] == 0 && stream.Receive() {
		if event := stream.Msg().GetFilesystem(); event.GetType() == pb.EventType_EVENT_TYPE_CREATE {
			seen[event.GetName()]++
		}
	}
	late := time.Now()
	if err := errors.Join(<-made, stream.Err()); err != nil {
		return err
	}
	doubled := 0
	for _, times := range seen {
		doubled += times - 1
	}
	add("burst of 20,000 files and 2,000 directories, events missing", float64(20_000+2*2000+1-len(seen)), none, none)
	add("burst of 20,000 files and 2,000 directories, events doubled", float64(doubled), none, none)
	add("burst of 20,000 files and 2,000 directories, last event after the last change", late.Sub(last).Seconds(), none, none)
	return nil
}
