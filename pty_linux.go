// Pseudo-terminals: opening a pair, sizing it. pty(7), ioctl_tty(2).

package main

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// openPTY gives the master, and the slave as a descriptor, owned by the user that will have it as its terminal.
func openPTY(cols, rows uint32, uid int) (master *os.File, slave int, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, -1, err
	}
	defer func() {
		if err != nil {
			master.Close()
		}
	}()
	if err = resizePTY(master, cols, rows); err != nil {
		return nil, -1, err
	}
	err = onDescriptor(master, func(fd int) (err error) {
		if err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return os.NewSyscallError("TIOCSPTLCK", err)
		}
		n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
		if err != nil {
			return os.NewSyscallError("TIOCGPTN", err)
		}
		path := "/dev/pts/" + strconv.Itoa(n)
		slave, err = unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: path, Err: err}
		}
		return nil
	})
	if err != nil {
		return nil, -1, err
	}
	// Group and mode stay as the mount options of devpts have them (gid 5, 0620 as a rule).
	if err = unix.Fchown(slave, uid, -1); err != nil && os.Geteuid() == 0 {
		unix.Close(slave)
		return nil, -1, os.NewSyscallError("fchown", err)
	}
	return master, slave, nil
}

// resizePTY clamps to what struct winsize holds.
func resizePTY(master *os.File, cols, rows uint32) error {
	size := unix.Winsize{Col: uint16(min(cols, 1<<16-1)), Row: uint16(min(rows, 1<<16-1))}
	return onDescriptor(master, func(fd int) error {
		return os.NewSyscallError("TIOCSWINSZ", unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &size))
	})
}

// onDescriptor runs f on the descriptor without taking the file away from the runtime's poller, as Fd would.
func onDescriptor(file *os.File, f func(fd int) error) error {
	conn, err := file.SyscallConn()
	if err != nil {
		return err
	}
	ctlErr := conn.Control(func(fd uintptr) { err = f(int(fd)) })
	if ctlErr != nil {
		return ctlErr
	}
	return err
}
