// The baselines: the same work without an agent, in the plainest way that Go or the shell has.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// forkExecWait runs /bin/true with os.StartProcess, all three descriptors on /dev/null, and waits for it: no pipe, no
// goroutine, no lookup in PATH.
func forkExecWait(null *os.File) error {
	p, err := os.StartProcess("/bin/true", []string{"true"}, &os.ProcAttr{Dir: "/", Env: []string{},
		Files: []*os.File{null, null, null}})
	if err != nil {
		return err
	}
	state, err := p.Wait()
	if err == nil && !state.Success() {
		err = fmt.Errorf("/bin/true: %v", state)
	}
	return err
}

func localExec(null *os.File) (time.Duration, error) {
	start := time.Now()
	err := forkExecWait(null)
	return time.Since(start), err
}

// inParallel calls do n times on `workers` goroutines and returns how long all of it took.
func inParallel(workers, n int, do func() error) (time.Duration, error) {
	var next atomic.Int64
	errs := make(chan error, workers)
	start := time.Now()
	for range workers {
		go func() {
			for next.Add(1) <= int64(n) {
				if err := do(); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	var err error
	for range workers {
		err = errors.Join(err, <-errs)
	}
	return time.Since(start), err
}

// localStdout moves n bytes from head to cat through a pipe.
func localStdout(n int) (time.Duration, error) {
	start := time.Now()
	err := exec.Command("/bin/sh", "-c", fmt.Sprintf("head -c %d /dev/zero | cat > /dev/null", n)).Run()
	return time.Since(start), err
}

// localStdin writes n bytes in pieces of `chunk` to the pipe of a cat and waits until it has taken all and ended.
func localStdin(n, chunk int) (time.Duration, error) {
	cmd := exec.Command("/bin/sh", "-c", "exec cat > /dev/null")
	in, err := cmd.StdinPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	piece := make([]byte, chunk)
	start := time.Now()
	for sent := 0; sent < n && err == nil; sent += len(piece) {
		_, err = in.Write(piece[:min(chunk, n-sent)])
	}
	err = errors.Join(err, in.Close(), cmd.Wait())
	return time.Since(start), err
}

// localEcho types n bytes into a terminal whose foreground process is cat, one after the other, and returns how long
// each echo took. It is what a terminal server without the network would be: a goroutine that waits in the runtime's
// poller for what the terminal says, and another one that types.
func localEcho(n int) ([]float64, error) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	slave, err := openSlave(master)
	if err != nil {
		master.Close()
		return nil, err
	}
	cmd := exec.Command("/bin/cat")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	err = cmd.Start()
	slave.Close()
	if err != nil {
		master.Close()
		return nil, err
	}
	arrived := make(chan time.Time, n+warmUpKeys)
	go func() {
		defer close(arrived)
		var buf [4096]byte
		for {
			got, err := master.Read(buf[:])
			now := time.Now()
			for range got {
				arrived <- now
			}
			if err != nil {
				return
			}
		}
	}()
	var took []float64
	for i := range n + warmUpKeys {
		time.Sleep(betweenKeys)
		start := time.Now()
		if _, err = master.Write([]byte{'x'}); err != nil {
			break
		}
		at, ok := <-arrived
		if !ok {
			err = errors.New("the local terminal ended")
			break
		}
		if i >= warmUpKeys {
			took = append(took, at.Sub(start).Seconds())
		}
	}
	cmd.Process.Kill()
	cmd.Wait()
	master.Close()
	for range arrived { // until its reader has gone
	}
	return took, err
}

func openSlave(master *os.File) (*os.File, error) {
	raw, err := master.SyscallConn()
	if err != nil {
		return nil, err
	}
	var number int
	var ioctlErr error
	err = raw.Control(func(fd uintptr) {
		if ioctlErr = unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); ioctlErr == nil {
			number, ioctlErr = unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		}
	})
	if err := errors.Join(err, ioctlErr); err != nil {
		return nil, err
	}
	return os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
}

// localSleeps starts n sleeps from n goroutines at once and returns the time until the last has been started. They
// are killed then.
func localSleeps(null *os.File, n int) (time.Duration, error) {
	var wg sync.WaitGroup
	processes := make([]*os.Process, n)
	errs := make([]error, n)
	start := time.Now()
	for i := range n {
		wg.Go(func() {
			processes[i], errs[i] = os.StartProcess("/bin/sleep", []string{"sleep", sleepTime},
				&os.ProcAttr{Files: []*os.File{null, null, null}})
		})
	}
	wg.Wait()
	took := time.Since(start)
	for _, p := range processes {
		if p != nil {
			p.Kill()
			p.Wait()
		}
	}
	runtime.GC() // what n goroutines left is not to be collected within the next measurement
	return took, errors.Join(errs...)
}

// sleepTime is longer than any measurement: what sleeps is killed.
const sleepTime = "600"
