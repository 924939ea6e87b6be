// Pseudo-terminals: opening a pair, sizing it. pty(7), ioctl_tty(2).

package main

import (
	"os"

	"golang.org/x/sys/unix"
)

// openPTY gives the descriptors of a pair; the slave is owned by the user that will have it as its terminal.
func openPTY(cols, rows uint32, uid int) (master, slave int, err error) {
	const flags = unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC
	master, err = unix.Open("/dev/ptmx", flags, 0)
	if err != nil {
		return -1, -1, &os.PathError{Op: "open", Path: "/dev/ptmx", Err: err}
	}
	if err = resizePTY(master, cols, rows); err == nil {
		err = os.NewSyscallError("TIOCSPTLCK", unix.IoctlSetPointerInt(master, unix.TIOCSPTLCK, 0))
	}
	if err == nil {
		fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(master), unix.TIOCGPTPEER, flags)
		if errno == 0 {
			unix.Fchown(int(fd), uid, -1) // group and mode stay as the mount options of devpts have them (gid 5, 0620 as a rule)
			return master, int(fd), nil
		}
		err = os.NewSyscallError("TIOCGPTPEER", errno)
	}
	unix.Close(master)
	return -1, -1, err
}

// resizePTY clamps to what struct winsize holds.
func resizePTY(master int, cols, rows uint32) error {
	size := unix.Winsize{Col: uint16(min(cols, 1<<16-1)), Row: uint16(min(rows, 1<<16-1))}
	return os.NewSyscallError("TIOCSWINSZ", unix.IoctlSetWinsize(master, unix.TIOCSWINSZ, &size))
}
