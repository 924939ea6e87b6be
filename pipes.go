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

// pipe gives two close-on-exec descriptors that block. The pipe belongs to the user, who may open /dev/stdout again.
func pipe(user account) (read, write int, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return -1, -1, os.NewSyscallError("pipe2", err)
	}
	if user.uid != 0 {
		unix.Fchown(fds[0], int(user.uid), int(user.gid)) // both ends are one inode
	}
	return fds[0], fds[1], nil
}

// outputPipe is one of a process's output streams. The poller's goroutine reads it, and, at full speed, a subscriber's.
type outputPipe struct {
	kind   outputKind
	log    *outputLog
	poller *poller
	watch  watch
	atEnd  func()

	reader reader
	logged atomic.Int64 // bytes
	paused atomic.Bool  // the poller does not report it

	mu    sync.Mutex // makes reading and logging one step
	grown bool       // the pipe is a big one
	eof   bool
}

// newOutputPipe starts to read.
func newOutputPipe(kind outputKind, fd int, log *outputLog, p *poller, atEnd func()) (*outputPipe, error) {
	o := &outputPipe{kind: kind, log: log, poller: p, atEnd: atEnd, watch: watch{fd: fd}}
	o.watch.ready = func() { o.read() }
	o.reader = reader{o.hold, o.resume, o.pull}
	err := p.add(&o.watch)
	if err != nil {
		unix.Close(fd)
	}
	return o, err
}

// close gives up reading before the end.
func (o *outputPipe) close() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.eof = true
	o.poller.remove(&o.watch)
}

// drain reads what is there when the process has exited, and the end if that comes next. It tells how many bytes must be in
// the log before the process can be said to have ended.
func (o *outputPipe) drain() (target int64) {
	o.mu.Lock()
	target = o.logged.Load() + o.readableLocked()
	o.mu.Unlock()
	for o.logged.Load() < target && o.read() {
	}
	o.read()
	return target
}

// readable counts the bytes that could be read now.
func (o *outputPipe) readable() int64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.readableLocked()
}

func (o *outputPipe) readableLocked() int64 {
	if o.eof {
		return 0
	}
	n, _ := unix.IoctlGetInt(o.watch.fd, unix.TIOCINQ) // FIONREAD; 0 with an error
	return int64(n)
}

// read moves one piece into the log. It tells whether there may be more at once.
func (o *outputPipe) read() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return !o.paused.Load() && o.readLocked(o.log.room(&o.reader))
}

// pull reads for a subscriber and leaves the pipe out of the poller as long as that suffices.
func (o *outputPipe) pull(most int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.readLocked(most) || o.log.room(&o.reader) > 0 {
		o.resume()
	}
}

func (o *outputPipe) readLocked(most int) (more bool) {
	if o.eof || most == 0 {
		return false
	}
	buf := readBuffers.Get().(*[outputChunk]byte)
	n, err := unix.Read(o.watch.fd, buf[:most])
	for err == unix.EINTR {
		n, err = unix.Read(o.watch.fd, buf[:most])
	}
	if n <= 0 || !o.log.append(o.kind, buf[:], n) {
		readBuffers.Put(buf)
	}
	switch {
	case n > 0:
		o.logged.Add(int64(n))
		if !o.grown && n >= 64<<10 {
			unix.FcntlInt(uintptr(o.watch.fd), unix.F_SETPIPE_SZ, bigPipe)
			o.grown = true
		}
	case err != unix.EAGAIN: // end of file; a terminal that nobody has open any more says EIO
		o.eof = true
		o.poller.remove(&o.watch)
		o.atEnd()
	}
	return n > 0
}

// hold and resume are called by the log, under its lock, too.
func (o *outputPipe) hold() {
	if !o.paused.Swap(true) {
		o.poller.pause(&o.watch)
	}
}

func (o *outputPipe) resume() {
	if o.paused.Swap(false) {
		o.poller.resume(&o.watch)
	}
}

// inputPipe is where a process gets its input. Writes keep their order and never mix.
type inputPipe struct {
	turn chan struct{} // holds a value while nobody writes

	mu     sync.Mutex // protects what follows
	fd     int
	file   *os.File // fd's owner from the first write on: many processes never get input
	grown  bool     // the pipe is a big one
	closed bool
}

func newInputPipe(fd int) *inputPipe {
	in := &inputPipe{fd: fd, turn: make(chan struct{}, 1)}
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

// open gives the file for a write of n bytes.
func (in *inputPipe) open(n int) (*os.File, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return nil, os.ErrClosed
	}
	if in.file == nil {
		unix.SetNonblock(in.fd, true) // asks os.NewFile for the runtime's poller
		in.file = os.NewFile(uintptr(in.fd), "input")
	}
	if n >= 32<<10 && !in.grown {
		unix.FcntlInt(uintptr(in.fd), unix.F_SETPIPE_SZ, bigPipe)
		in.grown = true
	}
	return in.file, nil
}

// write returns when the process's pipe or terminal has taken all bytes. A client that leaves ends its write.
func (in *inputPipe) write(ctx context.Context, data []byte) error {
	if err := in.take(ctx); err != nil {
		return err
	}
	defer func() { in.turn <- struct{}{} }()
	file, err := in.open(len(data))
	if err != nil || len(data) == 0 {
		return err
	}
	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		file.SetWriteDeadline(time.Unix(1, 0))
		close(expired)
	})
	_, err = file.Write(data)
	if !stop() {
		<-expired
		file.SetWriteDeadline(time.Time{})
	}
	return err
}

// resize is for a terminal.
func (in *inputPipe) resize(cols, rows uint32) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed {
		return os.ErrClosed
	}
	return resizePTY(in.fd, cols, rows)
}

// closeInTurn lets writes that came before finish.
func (in *inputPipe) closeInTurn(ctx context.Context) error {
	if err := in.take(ctx); err != nil {
		return err
	}
	defer func() { in.turn <- struct{}{} }()
	in.close()
	return nil
}

// close is for good; a write that waits fails.
func (in *inputPipe) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	switch {
	case in.closed:
	case in.file != nil:
		in.file.Close()
	default:
		unix.Close(in.fd)
	}
	in.closed = true
}
