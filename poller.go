// One goroutine that waits for all processes: for their output and for their exit.
//
// The runtime's own poller would wake a goroutine a pipe, and a signal two more a process; on a small guest those wake-ups
// are most of what starting a short command costs. Here an epoll descriptor of our own, itself watched by the runtime's
// poller, collects them, and their handlers run one after the other: they must not block. epoll(7), level-triggered.

package main

import (
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

type poller struct {
	epfd int
	file *os.File // the same, for the runtime's poller

	mu       sync.Mutex // protects what follows
	last     int32
	handlers map[int32]*watch
}

// watch is one descriptor with its handler.
type watch struct {
	fd    int
	ready func()
	key   int32 // unlike descriptors never used twice at a time: an event of a closed one finds nobody
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	unix.SetNonblock(fd, true) // asks os.NewFile for the runtime's poller
	return &poller{epfd: fd, file: os.NewFile(uintptr(fd), "epoll"), handlers: map[int32]*watch{}}, nil
}

// add has w.ready called, on the poller's goroutine, whenever w.fd is readable or at its end.
func (p *poller) add(w *watch) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.last++; p.handlers[p.last] != nil; p.last++ {
	}
	w.key = p.last
	err := p.controlLocked(unix.EPOLL_CTL_ADD, w)
	if err == nil {
		p.handlers[w.key] = w
	}
	return err
}

// pause and resume keep a descriptor from being reported. A mask of no events would not do: the end is always reported.
func (p *poller) pause(w *watch) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.handlers[w.key] == w {
		p.controlLocked(unix.EPOLL_CTL_DEL, w)
	}
}

func (p *poller) resume(w *watch) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.handlers[w.key] == w { // else its descriptor is closed, and may be another file by now
		p.controlLocked(unix.EPOLL_CTL_ADD, w)
	}
}

// remove forgets a descriptor and closes it, once, which takes it out of the epoll set.
func (p *poller) remove(w *watch) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.handlers[w.key] == w {
		delete(p.handlers, w.key)
		unix.Close(w.fd)
	}
}

func (p *poller) controlLocked(op int, w *watch) error {
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(p.epfd, op, w.fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: w.key}))
}

// run serves until close.
func (p *poller) run() {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return
	}
	events := make([]unix.EpollEvent, 64)
	conn.Read(func(uintptr) bool {
		for {
			n, err := unix.EpollWait(p.epfd, events, 0)
			if err == unix.EINTR {
				continue
			}
			if n <= 0 {
				return false
			}
			for _, event := range events[:n] {
				p.mu.Lock()
				w := p.handlers[event.Fd]
				p.mu.Unlock()
				if w != nil {
					w.ready()
				}
			}
		}
	})
}

// close makes run return.
func (p *poller) close() { p.file.Close() }
