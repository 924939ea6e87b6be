// The figures of files: download, upload, gzip, small files, listings.
//
//	download  against http.ServeFile of the bare handler
//	upload    against a TCP connection that a Go program copies to a file
//	gzip      against compress/gzip at its default level, in this process
//	small     1 KiB files, 8 clients, against plain writes and reads of such files by 8 goroutines
//	list      ListDir against a walk with lstat
//	watch     a recursive WatchDir while files and directories with a file each are made at once
//
//	          the last event is late against a raw inotify reader of the top directory
//
// Everything is on tmpfs, but for the uploads to disk, which nobody syncs.
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
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	pb "envd/proto"
)

const (
	filesListed  = 20_000
	filesClients = 8
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
		}, func(ctx context.Context, b *bench, add add) error {
			return measureUpload(ctx, b, "tmpfs", memoryDir, add)
		}},
		figure{"files-upload-disk", []rowSpec{
			{"raw upload to disk", throughput, target{}},
			{"multipart upload to disk", throughput, target{}},
		}, func(ctx context.Context, b *bench, add add) error { return measureUpload(ctx, b, "disk", diskDir, add) }},
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
}

// How many bytes a run moves: 1 GiB down, 512 MiB up; less in quicker runs.
func (b *bench) downloadSize() int64 { return int64(2 * b.stdout) }
func (b *bench) uploadSize() int64   { return int64(b.stdout) }

// memoryDir makes a directory on tmpfs.
func memoryDir() (string, func(), error) {
	dir, err := os.MkdirTemp("/dev/shm", "envd-bench-")
	return dir, func() { os.RemoveAll(dir) }, err
}

// diskDir makes a directory on a disk: below the working directory when the one for temporary files is in memory.
func diskDir() (string, func(), error) {
	for _, base := range []string{os.TempDir(), "."} {
		var fs unix.Statfs_t
		if unix.Statfs(base, &fs) == nil && fs.Type != unix.TMPFS_MAGIC && fs.Type != unix.RAMFS_MAGIC {
			dir, err := os.MkdirTemp(base, "envd-bench-")
			if err == nil {
				dir, err = filepath.Abs(dir)
			}
			return dir, func() { os.RemoveAll(dir) }, err
		}
	}
	return "", nil, errors.New("no directory on a disk")
}

// exchange sends one request by hand, its body from a reader, and reads the answer; everything is counted, nothing kept.
func exchange(addr, head string, body io.Reader, answer func(*http.Response) error) error {
	conn, err := net.Dial("tcp", strings.TrimPrefix(addr, "http://"))
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, head+"Host: localhost\r\nConnection: close\r\n\r\n"); err != nil {
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
	bare, err := b.bare(ctx)
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
	speeds := [2]float64{} // of three each, in turn: one of each says more about the machine than about either
	for range 3 {
		for i, side := range []func() (float64, error){
			func() (float64, error) { return get(d, "/files", "", b.downloadSize()) },
			func() (float64, error) { return get(bare, "/file", "", b.downloadSize()) },
		} {
			speed, err := side()
			if err != nil {
				return err
			}
			speeds[i] += 1 / speed
		}
	}
	rss, err := d.status("VmHWM")
	if err != nil {
		return err
	}
	add("download from tmpfs", 3/speeds[0], 3/speeds[1], none)
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

func measureUpload(ctx context.Context, b *bench, where string, newDir func() (string, func(), error), add add) (err error) {
	dir, clean, err := newDir()
	if err != nil {
		return err
	}
	defer clean()
	d, err := b.startEnvd(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.stop()) }()
	bare, err := b.bare(ctx)
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
	add("raw upload to "+where, speeds[1], speeds[0], speeds[3])
	add("multipart upload to "+where, speeds[2], speeds[0], none)
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
	if err := writeText(file, b.text); err != nil {
		return err
	}
	ours, err := timed(int64(b.text), func() error {
		return exchange(d.url, "GET "+filesURL("/files", file)+" HTTP/1.1\r\nAccept-Encoding: gzip\r\n", nil, swallow(1000))
	})
	if err != nil {
		return err
	}
	baseline, err := timed(int64(b.text), func() error {
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
	bare, err := b.bare(ctx)
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
			answer, err := c.send(ctx, method, address+filesURL(route, name()), body)
			if err == nil && method == "GET" && len(answer) != len(content) {
				err = fmt.Errorf("%d bytes instead of %d", len(answer), len(content))
			}
			return err
		}
	}
	rates := func(row string, sides ...func() error) error {
		var total [3]time.Duration
		for range 4 {
			for i, side := range sides {
				n := b.small / 4
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
		files := float64(b.small)
		add(row, files/total[0].Seconds(), 4*files/total[1].Seconds(), files/total[2].Seconds())
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
	took, err := inTurn(b.lists, []func() (time.Duration, error){
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
	bare, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return err
	}
	inotify := os.NewFile(uintptr(bare), "inotify")
	defer inotify.Close()
	if _, err := unix.InotifyAddWatch(bare, dir, unix.IN_CREATE); err != nil {
		return err
	}
	plain := make(chan time.Time, 1)
	go func() { // what it takes without an agent
		buf := make([]byte, 64<<10)
		for {
			if n, err := inotify.Read(buf); err != nil || bytes.Contains(buf[:n], []byte("last\x00")) {
				plain <- time.Now()
				return
			}
		}
	}()
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
	add("burst of 20,000 files and 2,000 directories, last event after the last change", late.Sub(last).Seconds(), (<-plain).Sub(last).Seconds(), none)
	return nil
}
