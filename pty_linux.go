// Pseudo-terminals: opening a pair, sizing it. pty(7), ioctl_tty(2).

package main

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// openPTY gives the descriptors of a pair; the slave is owned by the user that will have it as its terminal.
func openPTY(cols, rows uint32, uid int) (master, slave int, err error) {
	master, err = unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, -1, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	slave = -1
	defer func() {
		if err != nil {
			unix.Close(master)
			if slave >= 0 {
				unix.Close(slave)
			}
		}
	}()
	if err = resizePTY(master, cols, rows); err != nil {
		return -1, -1, err
	}
	if err = unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0); err != nil {
		return -1, -1, os.NewSyscallError("TIOCSPTLCK", err)
	}
	n, err := unix.IoctlGetInt(master, unix.TIOCGPTN)
	if err != nil {
		return -1, -1, os.NewSyscallError("TIOCGPTN", err)
	}
	path := "/dev/pts/" + strconv.Itoa(n)
	if slave, err = unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0); err != nil {
		return -1, -1, &os.PathError{Op: "open", Path: path, Err: err}
	}
	// Group and mode stay as the mount options of devpts have them (gid 5, 0620 as a rule).
	if err = unix.Fchown(slave, uid, -1); err != nil && os.Geteuid() == 0 {
		return -1, -1, os.NewSyscallError("fchown", err)
	}
	return master, slave, nil
}

// resizePTY clamps to what struct winsize holds.
func resizePTY(master int, cols, rows uint32) error {
	size := unix.Winsize{Col: uint16(min(cols, 1<<16-1)), Row: uint16(min(rows, 1<<16-1))}
	return os.NewSyscallError("TIOCSWINSZ", unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, &size))
}

func dup(fd int) (int, error) {
	d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	return d, os.NewSyscallError("fcntl", err)
}
