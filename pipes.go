// The daemon's ends of a process's pipes or terminal.

package main

import (
	"context"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// bigPipe is the size, in bytes, that the pipe of a process gets once it writes a lot (pipe(7), F_SETPIPE_SZ).
const bigPipe = 1 << 20

// pipe gives two blocking, close-on-exec descriptors.
func pipe() (read, write int, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return -1, -1, os.NewSyscallError("pipe2", err)
	}
	return fds[0], fds[1], nil
}

// nonblockingFile hands a descriptor to the runtime's poller.
func nonblockingFile(fd int, name string) *os.File {
	unix.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), name)
}

// outputPipe is where one of a process's output streams is read.
type outputPipe struct {
	kind   outputKind
	file   *os.File
	logged atomic.Int64 // bytes that are in the log

	mu   sync.Mutex // makes a read and its count one step
	read int64      // bytes read
}

// available counts what was read and what could be read now.
func (o *outputPipe) available() (n int64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	onDescriptor(o.file, func(fd int) error {
		readable, err := unix.IoctlGetInt(fd, unix.TIOCINQ) // FIONREAD
		n = int64(max(readable, 0))
		return err
	})
	return n + o.read
}

var readBuffers = sync.Pool{New: func() any { return new([outputChunk]byte) }}

// readInto fills the log until the end of the stream. Between reads an idle process holds no buffer.
func (o *outputPipe) readInto(log *outputLog) {
	conn, err := o.file.SyscallConn()
	if err != nil {
		return
	}
	grown := o.kind == ptyKind
	for {
		log.waitForRoom()
		var n int
		var buf *[outputChunk]byte
		waitErr := conn.Read(func(fd uintptr) bool {
			buf = readBuffers.Get().(*[outputChunk]byte)
			o.mu.Lock()
			defer o.mu.Unlock()
			for {
				if n, err = unix.Read(int(fd), buf[:]); err != unix.EINTR {
					break
				}
			}
			if err == unix.EAGAIN {
				readBuffers.Put(buf)
				return false
			}
			o.read += int64(max(n, 0))
			if !grown && n >= 64<<10 {
				unix.FcntlInt(fd, unix.F_SETPIPE_SZ, bigPipe)
				grown = true
			}
			return true
		})
		if waitErr != nil {
			return
		}
		if n <= 0 { // end of file; a terminal that nobody has open any more says EIO
			readBuffers.Put(buf)
			return
		}
		if !log.append(o.kind, buf[:], n) {
			readBuffers.Put(buf)
		}
		o.logged.Add(int64(n))
	}
}

// inputPipe is where a process gets its input. Writes keep their order and never mix.
type inputPipe struct {
	file *os.File
	turn chan struct{} // holds a value while nobody writes
}

func newInputPipe(file *os.File) *inputPipe {
	in := &inputPipe{file: file, turn: make(chan struct{}, 1)}
	in.turn <- struct{}{}
	return in
}

func (in *inputPipe) take(ctx context.Context) error {
	select {
	case <-in.turn:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// write returns when the process's pipe or terminal has taken all bytes. A client that leaves ends its write.
func (in *inputPipe) write(ctx context.Context, data []byte) error {
	if err := in.take(ctx); err != nil {
		return err
	}
	defer func() { in.turn <- struct{}{} }()
	if len(data) == 0 {
		return nil
	}
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		in.file.SetWriteDeadline(time.Unix(1, 0))
		close(expired)
	})
	_, err := in.file.Write(data)
	if !stop() {
		<-expired
		in.file.SetWriteDeadline(time.Time{})
	}
	return err
}

func (in *inputPipe) close(ctx context.Context) error {
	if err := in.take(ctx); err != nil {
		return err
	}
	defer func() { in.turn <- struct{}{} }()
	in.file.Close() // a second time: an error that says just that
	return nil
}
