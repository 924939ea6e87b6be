// The workload is the one program in the guest besides the agent: its first argument says what it plays.
//
//	cat [PATH]             copy a file, or stdin
//	exit N; sleep SECONDS
//	run CMD ARGS...        be a shell around a command: wait for it, exit with its status
//	stubborn               ignore SIGTERM
//	segv [WHEN]            die of a signal; given WHEN, with a core dump
//	write PATH TEXT
//	count                  print how many threads the kernel has
//	kill PID SIGNAL
//	orphans N              leave N grandchildren behind, who end one after the other
//	processes              list pid, parent, state and name of all processes
//	hog MIB; hold MIB      take memory and end; and stay
//	forkbomb               fork, as do the children, until nobody can any more
//	output BYTES [PAUSE]   write records: at the offset o stands o, in 16 bytes; 0: for ever; PAUSE ms after each 4 KiB
//	ls PATH; mkdir PATH
//	memory MIB             check over and over that memory holds what was put there; complain and exit 3 if it does not
//	oracle                 answer on UDP port 9999: the clock, random bytes, a UUID
//	dirty PATH MIB [WHEN]  write a file, synchronise nothing; given WHEN, after SIGUSR1
//	fill PATH              write until the filesystem is full
//	listen ADDRESS         echo on a TCP address
//	clock SECONDS          set the clock forward, or back
package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) < 2 {
		os.Exit(2)
	}
	args := os.Args[2:]
	if err := play(os.Args[1], args); err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		os.Exit(1)
	}
}

func number(args []string, i int) int {
	if i >= len(args) {
		return 0
	}
	n, err := strconv.Atoi(args[i])
	if err != nil {
		panic(err)
	}
	return n
}

func play(what string, args []string) error {
	switch what {
	case "cat":
		if len(args) == 0 {
			_, err := io.Copy(os.Stdout, os.Stdin)
			return err
		}
		text, err := os.ReadFile(args[0])
		os.Stdout.Write(text)
		return err
	case "exit":
		os.Exit(number(args, 0))
	case "sleep":
		fmt.Println("sleeping")
		time.Sleep(time.Duration(number(args, 0)) * time.Second)
	case "run":
		return run(args)
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("stubborn")
		time.Sleep(time.Hour)
	case "write":
		return os.WriteFile(args[0], []byte(args[1]), 0o644)
	case "count":
		var info unix.Sysinfo_t
		err := unix.Sysinfo(&info)
		fmt.Println(info.Procs)
		return err
	case "segv":
		if len(args) > 0 {
			unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{Cur: 1 << 30, Max: 1 << 30})
		}
		var defaults [4]uint64 // sigaction: Go has a handler of its own
		unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGSEGV), uintptr(unsafe.Pointer(&defaults)), 0, 8, 0, 0)
		unix.Kill(os.Getpid(), unix.SIGSEGV)
		time.Sleep(time.Hour)
	case "kill":
		return unix.Kill(number(args, 0), syscall.Signal(number(args, 1)))
	case "orphans":
		return orphans(number(args, 0))
	case "processes":
		return processes()
	case "hog":
		return hog(number(args, 0))
	case "hold":
		err := hog(number(args, 0))
		time.Sleep(time.Hour)
		return err
	case "forkbomb":
		return forkbomb()
	case "output":
		return output(number(args, 0), time.Duration(number(args, 1))*time.Millisecond)
	case "mkdir":
		return os.Mkdir(args[0], 0o755)
	case "ls":
		entries, err := os.ReadDir(args[0])
		for _, e := range entries {
			fmt.Println(e.Name())
		}
		return err
	case "memory":
		return memory(number(args, 0))
	case "oracle":
		return oracle()
	case "dirty":
		return dirty(args[0], number(args, 1), len(args) > 2)
	case "fill":
		return fill(args[0])
	case "listen":
		return listen(args[0])
	case "clock":
		now := unix.NsecToTimeval(time.Now().Add(time.Duration(number(args, 0)) * time.Second).UnixNano())
		return unix.Settimeofday(&now)
	default:
		return errors.New("plays no such thing: " + what)
	}
	return nil
}

func run(args []string) error {
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	var exit *exec.ExitError
	switch err := cmd.Run(); {
	case errors.As(err, &exit):
		status := exit.Sys().(syscall.WaitStatus)
		if status.Signaled() {
			os.Exit(128 + int(status.Signal()))
		}
		os.Exit(status.ExitStatus())
	case err != nil:
		return err
	}
	return nil
}

// fork is fork(2). The child has one thread and may make raw system calls only.
//
//go:norace
func fork() (uintptr, syscall.Errno) {
	pid, _, errno := syscall.RawSyscall(unix.SYS_FORK, 0, 0, 0)
	return pid, errno
}

// orphans: each child forks once more and ends. The grandchildren belong to PID 1 then; each ends a little later than the
// one before.
func orphans(n int) error {
	for i := range n {
		pause := unix.NsecToTimespec(int64(i) * 2e6)
		pid, errno := fork()
		if pid == 0 && errno == 0 {
			if pid, _ := fork(); pid == 0 {
				syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&pause)), 0, 0)
			}
			for {
				syscall.RawSyscall(unix.SYS_EXIT_GROUP, uintptr(i&0x7f), 0, 0)
			}
		}
		if errno != 0 {
			return fmt.Errorf("fork %d: %w", i, errno)
		}
		var status unix.WaitStatus
		for {
			if _, err := unix.Wait4(int(pid), &status, 0, nil); err != unix.EINTR {
				break
			}
		}
	}
	fmt.Println("left", n)
	return nil
}

func processes() error {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		end := bytes.LastIndexByte(text, ')')
		start := bytes.IndexByte(text, '(')
		f := strings.Fields(string(text[end+1:]))
		fmt.Printf("%s %s %s %s\n", strings.Fields(string(text))[0], f[1], f[0], text[start+1:end])
	}
	return nil
}

// hog maps outside Go's heap, so that no collector thinks about it.
func hog(mib int) error {
	for i := range mib {
		m, err := unix.Mmap(-1, 0, 1<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			return err
		}
		for page := 0; page < len(m); page += 4096 {
			m[page] = byte(i) | 1
		}
	}
	fmt.Println("has", mib)
	return nil
}

// forkbomb counts in memory that all of them share.
func forkbomb() error {
	shared, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	failed := &shared[0]
	pause := unix.NsecToTimespec(20e6)
	parent := true
	for {
		pid, errno := fork()
		if errno != 0 {
			*failed = 1
			if parent {
				break
			}
			syscall.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&pause)), 0, 0)
		} else if pid == 0 {
			parent = false
		}
	}
	fmt.Println("fork: refused")
	time.Sleep(time.Hour)
	return nil
}

const record = 16

func output(bytes int, pause time.Duration) error {
	out := bufio.NewWriterSize(os.Stdout, 256*record)
	for offset := 0; bytes == 0 || offset < bytes; offset += record {
		if pause > 0 && out.Available() < record {
			if err := out.Flush(); err != nil {
				return err
			}
			time.Sleep(pause)
		}
		if _, err := fmt.Fprintf(out, "%015d\n", offset); err != nil {
			return err
		}
	}
	return out.Flush()
}

func memory(mib int) error {
	block := make([]byte, mib<<20)
	for i := range block {
		block[i] = byte(i * 2654435761 >> 13)
	}
	want := sha256.Sum256(block)
	fmt.Println("checking", mib)
	for round := 1; ; round++ {
		for begin := 0; begin < len(block); begin += 1 << 20 { // with pauses: others need the CPU too
			time.Sleep(50 * time.Millisecond)
			for i := begin; i < begin+1<<20; i += 64 {
				if block[i] != byte(i*2654435761>>13) {
					fmt.Printf("FAULT at %d in round %d\n", i, round)
					os.Exit(3)
				}
			}
		}
		if round%8 == 0 && sha256.Sum256(block) != want {
			fmt.Printf("FAULT in the sum in round %d\n", round)
			os.Exit(3)
		}
	}
}

func oracle() error {
	conn, err := net.ListenPacket("udp4", ":9999")
	if err != nil {
		return err
	}
	random, err := os.Open("/dev/urandom")
	if err != nil {
		return err
	}
	fmt.Println("ready")
	buf := make([]byte, 1500)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		answer := "no such question"
		switch string(buf[:n]) {
		case "clock":
			answer = strconv.FormatInt(time.Now().UnixNano(), 10)
		case "urandom":
			var b [32]byte
			if _, err := io.ReadFull(random, b[:]); err != nil {
				return err
			}
			answer = hex.EncodeToString(b[:])
		case "getrandom":
			var b [32]byte
			unix.Getrandom(b[:], 0)
			answer = hex.EncodeToString(b[:])
		case "uuid":
			text, err := os.ReadFile("/proc/sys/kernel/random/uuid")
			if err != nil {
				return err
			}
			answer = strings.TrimSpace(string(text))
		}
		conn.WriteTo([]byte(answer), from)
	}
}

func dirty(path string, mib int, whenTold bool) error {
	told := make(chan os.Signal, 1)
	signal.Notify(told, syscall.SIGUSR1)
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	if whenTold {
		fmt.Println("open")
		<-told
	}
	out := bufio.NewWriterSize(file, 1<<20)
	for offset := 0; offset < mib<<20; offset += record {
		fmt.Fprintf(out, "%015d\n", offset)
	}
	if err := out.Flush(); err != nil {
		return err
	}
	fmt.Println("dirty", mib)
	return file.Close()
}

func fill(path string) error {
	file, err := os.Create(path)
	for size := 1 << 20; err == nil && size > 0; {
		if _, err = file.Write(make([]byte, size)); errors.Is(err, unix.ENOSPC) {
			err, size = nil, size/2
		}
	}
	if err == nil {
		err = file.Sync()
	}
	return err
}

func listen(address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	fmt.Println("listening")
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			io.Copy(conn, conn)
			conn.(*net.TCPConn).CloseWrite()
		}()
	}
}
