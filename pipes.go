// The daemon's ends of a process's pipes or terminal.

package main

import (
	"context"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	bigPipe    = 1 << 20  // bytes that the pipe of a process gets once it writes a lot (pipe(7), F_SETPIPE_SZ)
	ptyBuffers = 64 << 10 // and more than the kernel has room for in a terminal
)

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

	mu     sync.Mutex // makes reading and logging one step
	logged int64      // bytes
	atExit int64      // logged once all that was there at the exit of the process is
	grown  bool       // the pipe is a big one
	eof    bool
}

func newOutputPipe(kind outputKind, fd int, log *outputLog, p *poller, atEnd func()) (*outputPipe, error) {
	unix.SetNonblock(fd, true)
	o := &outputPipe{kind: kind, log: log, poller: p, atEnd: atEnd, watch: watch{fd: fd}}
	o.watch.ready = o.read
	err := p.add(&o.watch)
	if err != nil {
		unix.Close(fd)
	}
	return o, err
}

// drain reads what is there when the process has exited, and the end if that comes next.
func (o *outputPipe) drain() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.atExit = o.logged + o.readableLocked()
	for o.logged <= o.atExit && o.readLocked(o.log.room(o)) {
	}
}

// drained tells whether what was there is in the log. Somebody else may read a pipe, too.
func (o *outputPipe) drained() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.logged >= o.atExit || o.readableLocked() == 0
}

func (o *outputPipe) readableLocked() int64 {
	if o.eof {
		return 0
	} else if o.kind == ptyKind { // of which the kernel tells at most 4 KiB, and none while more is on its way, for which poll(2) waits
		fds := []unix.PollFd{{Fd: int32(o.watch.fd), Events: unix.POLLIN}}
		unix.Poll(fds, 0)
		return int64(fds[0].Revents&unix.POLLIN) * ptyBuffers
	}
	n, _ := unix.IoctlGetInt(o.watch.fd, unix.TIOCINQ) // FIONREAD; 0 with an error
	return int64(n)
}

// read is for the poller. Without room the log has the pipe armed later.
func (o *outputPipe) read() {
	if most := o.log.room(o); most > 0 {
		o.pull(most)
	}
}

// pull leaves the pipe out of the poller while a subscriber has something to send: it pulls again when it has sent that.
func (o *outputPipe) pull(most int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.readLocked(most) || o.log.room(o) > 0 {
		o.arm()
	}
}

func (o *outputPipe) arm() { o.poller.arm(&o.watch) }

// readLocked moves one piece into the log. It tells whether there may be more at once.
func (o *outputPipe) readLocked(most int) (more bool) {
	if o.eof || most == 0 {
		return false
	}
	buf := readBuffers.Get().(*[outputChunk]byte)
	n, err := unix.Read(o.watch.fd, buf[:most])
	if n <= 0 || !o.log.append(o.kind, buf[:], n) {
		readBuffers.Put(buf)
	}
	switch {
	case n > 0:
		o.logged += int64(n)
		if !o.grown && n >= 64<<10 {
			unix.FcntlInt(uintptr(o.watch.fd), unix.F_SETPIPE_SZ, bigPipe)
			o.grown = true
		}
	case err != unix.EAGAIN && err != unix.EINTR: // end of file; a terminal that nobody has open any more says EIO
		o.eof = true
		o.poller.remove(&o.watch)
		o.atEnd()
	}
	return n > 0
}

// inputPipe is where a process gets its input. Writes keep their order and never mix.
type inputPipe struct {
	fd    int
	once  sync.Once     // for opened
	file  *os.File      // nil: closed before anybody wrote, as most are, so that the runtime's poller need not know of them
	turn  chan struct{} // holds a value while somebody writes
	grown bool          // the pipe is a big one; belongs to whoever's turn it is
}

func newInputPipe(fd int) *inputPipe { return &inputPipe{fd: fd, turn: make(chan struct{}, 1)} }

func (in *inputPipe) opened() *os.File {
	in.once.Do(func() {
		unix.SetNonblock(in.fd, true) // asks os.NewFile for the runtime's poller
		in.file = os.NewFile(uintptr(in.fd), "input")
	})
	return in.file
}

func (in *inputPipe) close() {
	if in == nil {
		return
	}
	in.once.Do(func() { unix.Close(in.fd) })
	in.file.Close()
}

// control runs f with the descriptor, which is not closed meanwhile.
func (in *inputPipe) control(f func(fd uintptr) error) (err error) {
	conn, closed := in.opened().SyscallConn()
	if closed != nil || conn.Control(func(fd uintptr) { err = f(fd) }) != nil {
		return os.ErrClosed
	}
	return err
}

// inTurn runs f once the writes that came before have finished.
func (in *inputPipe) inTurn(ctx context.Context, f func() error) error {
	select {
	case in.turn <- struct{}{}:
		defer func() { <-in.turn }()
		return f()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// write returns when the process's pipe or terminal has taken all bytes. A client that leaves ends its write.
func (in *inputPipe) write(ctx context.Context, data []byte) error {
	return in.inTurn(ctx, func() error {
		if len(data) >= 32<<10 && !in.grown {
			in.grown = true
			in.control(func(fd uintptr) error { _, err := unix.FcntlInt(fd, unix.F_SETPIPE_SZ, bigPipe); return err })
		}
		expired := make(chan struct{})
		stop := context.AfterFunc(ctx, func() {
			in.opened().SetWriteDeadline(time.Unix(1, 0))
			close(expired)
		})
		_, err := in.opened().Write(data)
		if !stop() {
			<-expired
			in.opened().SetWriteDeadline(time.Time{})
		}
		return err
	})
}
