// One goroutine that waits for all processes: for their output and for their exit.
//
// The runtime's own poller would wake a goroutine a pipe, and a signal two more a process; on a small guest those wake-ups
// are most of what starting a short command costs. Here an epoll descriptor of our own, itself watched by the runtime's
// poller, collects them, and their handlers run one after the other: they must not block. A handler that has been called
// is not called again until its descriptor is armed again: epoll(7), EPOLLONESHOT.

package main

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

type poller struct {
	epfd int
	file *os.File // the same, for the runtime's poller

	mu      sync.Mutex
	watches map[int32]*watch // by descriptor
}

// watch is one descriptor with its handler.
type watch struct {
	fd    int
	ready func()
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	unix.SetNonblock(fd, true) // asks os.NewFile for the runtime's poller
	return &poller{epfd: fd, file: os.NewFile(uintptr(fd), "epoll"), watches: map[int32]*watch{}}, nil
}

// add has w.ready called, on the poller's goroutine, when w.fd is readable or at its end. It may be called in vain, if the
// descriptor had another owner a moment ago.
func (p *poller) add(w *watch) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	err := p.controlLocked(unix.EPOLL_CTL_ADD, w)
	if err == nil {
		p.watches[int32(w.fd)] = w
	}
	return err
}

// arm has it called once more.
func (p *poller) arm(w *watch) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.watches[int32(w.fd)] == w { // else its descriptor is closed, and may be another file by now
		p.controlLocked(unix.EPOLL_CTL_MOD, w)
	}
}

// remove forgets a descriptor and closes it, once. Closing alone would leave it in the epoll set while anyone has a copy: a
// child that has not exec'ed yet, or the input side of a terminal.
func (p *poller) remove(w *watch) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.watches[int32(w.fd)] == w {
		delete(p.watches, int32(w.fd))
		p.controlLocked(unix.EPOLL_CTL_DEL, w)
		unix.Close(w.fd)
	}
}

func (p *poller) controlLocked(op int, w *watch) error {
	event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(w.fd)}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(p.epfd, op, w.fd, &event))
}

// run serves for as long as the daemon lives.
func (p *poller) run() {
	conn, _ := p.file.SyscallConn() // fails for a nil file alone
	events := make([]unix.EpollEvent, 64)
	conn.Read(func(uintptr) bool {
		for {
			n, err := unix.EpollWait(p.epfd, events, 0)
			if n <= 0 && err != unix.EINTR {
				return false
			}
			for _, event := range events[:max(n, 0)] {
				p.mu.Lock()
				w := p.watches[event.Fd]
				p.mu.Unlock()
				if w != nil {
					w.ready()
				}
			}
		}
	})
}

// descriptors counts those that processes hold, their clients' connections included. The rest of what the daemon may open is for
// accepting and answering, and for files: without it nobody would be told why nothing is started any more.
type descriptors struct{ held atomic.Int64 }

const (
	descriptorReserve     = 64 // at least, and a quarter of the limit
	descriptorsUncounted  = 1 << 20
	descriptorsOfAProcess = 6 // its three streams, a pidfd, its leaf's memory.peak, the connection of its client
	descriptorsOfAStart   = 4 // while it lasts: the process's ends of its streams, the leaf
)

func (d *descriptors) take(n int64) error {
	var limit unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_NOFILE, &limit)
	most := int64(min(limit.Cur, descriptorsUncounted))
	if d.held.Add(n) <= most-max(most/4, descriptorReserve) {
		return nil
	}
	d.held.Add(-n)
	return fmt.Errorf("%w: processes hold as many as they may (three quarters of RLIMIT_NOFILE, which is %d)", unix.EMFILE, most)
}

func (d *descriptors) give(n int64) { d.held.Add(-n) }
