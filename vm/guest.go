// One guest: QEMU with the images, its console, its disk, and the ways to save it, load it and end it.
//
// The machine is q35 with software emulation, which works everywhere; KVM only if it has been seen to run a guest. A
// guest that was saved goes on in a new QEMU, as one that Firecracker restored does.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	pb "envd/proto"
)

// patience bounds what only a broken guest does not do in time; emulation on a busy machine is slow.
const patience = 90 * time.Second

type options struct {
	cpus, memory int    // 2, 256 MiB
	root         string // "rw" or "ro": the disk; "": the initramfs
	exec         string // "": the agent
	prepared     bool   // the loader does what init does
	words        []string
	args         []string // of the agent
	accel        string   // "": the best that works
	noCard       bool     // no network card
	twoCards     bool     // eth1 leads nowhere
	nfs          bool     // its kernel can mount NFS
	address      string   // "": guestAddress
	slowDisk     bool     // takes 2 MiB/s
	rtc          string   // what its clock shows at the start, UTC; "": the time

	disk     string // "": a copy of the image
	discard  bool   // leave the disk as it is
	incoming string // go on from this file, stopped
}

type guest struct {
	options
	images  *images
	network *network
	qemu    *exec.Cmd
	qmp     *qmp
	console *console
	keys    io.WriteCloser // what is typed at the console
	gone    chan struct{}  // closed when QEMU has ended
	files   []string       // removed when the guest is closed

	mu      sync.Mutex
	conns   map[net.Conn]bool // that were dialled, as long as they are open
	isCut   context.Context   // over when cut was called
	callCut context.CancelFunc

	http *http.Client
	url  string
	proc pb.ProcessClient
	fs   pb.FilesystemClient
}

var guests atomic.Int32

// accelerators are tried once.
var accelerator = "tcg,thread=multi"

// start starts QEMU; the guest runs, unless it is incoming.
func (i *images) start(o options) (_ *guest, err error) {
	if o.cpus == 0 {
		o.cpus = 2
	}
	if o.memory == 0 {
		o.memory = 256
	}
	if o.accel == "" {
		o.accel = accelerator
	}
	if o.address == "" {
		o.address = guestAddress
	}
	g := &guest{options: o, images: i, console: newConsole(), gone: make(chan struct{}), conns: map[net.Conn]bool{}}
	g.isCut, g.callCut = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			g.close()
		}
	}()
	if g.network, err = newNetwork(o.incoming == ""); err != nil {
		return nil, err
	}
	number := guests.Add(1)
	socket := i.path(fmt.Sprintf("qmp%d", number))
	g.files = append(g.files, socket)
	initramfs := "initramfs"
	words := append([]string{"console=ttyS0", "panic=-1", "loglevel=4", "no_timer_check", "cgroup.memory=nosocket"}, o.words...)
	if o.nfs {
		initramfs = "initramfs-nfs"
	}
	if o.root == "" {
		initramfs = "initramfs-whole"
	} else {
		words = append(words, "loader.root="+o.root)
	}
	if o.exec != "" {
		words = append(words, "loader.exec="+o.exec)
	}
	if o.prepared {
		words = append(words, "loader.init=yes")
	}
	if len(o.args) > 0 {
		words = append(append(words, "--"), o.args...)
	}
	args := []string{"-M", "q35", "-accel", o.accel, "-m", fmt.Sprint(o.memory), "-smp", fmt.Sprint(o.cpus), "-nodefaults",
		"-no-user-config", "-display", "none", "-no-reboot", "-kernel", i.kernel, "-initrd", i.path(initramfs),
		"-append", strings.Join(words, " "), "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-qmp", "unix:" + socket + ",server=on,wait=off"}
	if !o.noCard {
		args = append(args, "-netdev", "tap,id=n,ifname="+tapName+",script=no,downscript=no",
			"-device", "virtio-net-pci,netdev=n,romfile=,mac="+guestMAC.String())
	}
	if o.rtc != "" {
		args = append(args, "-rtc", "base="+o.rtc)
	}
	if o.twoCards {
		args = append(args, "-netdev", "hubport,id=m,hubid=1", "-device", "virtio-net-pci,netdev=m,romfile=")
	}
	if o.accel == "kvm" {
		args = append(args, "-cpu", "host")
	}
	if o.root != "" {
		if g.disk == "" {
			g.disk = i.path(fmt.Sprintf("disk%d", number))
			g.files = append(g.files, g.disk)
			if err := copyFile(i.path("disk"), g.disk, 0o600); err != nil {
				return nil, err
			}
		}
		drive := "if=none,id=d,format=raw,file=" + g.disk
		if o.slowDisk {
			drive += ",throttling.bps-write=2097152"
		}
		if o.discard {
			drive += ",snapshot=on"
		}
		args = append(args, "-drive", drive, "-device", "virtio-blk-pci,drive=d")
	}
	if o.incoming != "" {
		args = append(args, "-S", "-incoming", "exec:cat "+o.incoming)
	}
	qemu := exec.Command("qemu-system-x86_64", args...)
	qemu.Stdout, qemu.Stderr = g.console, g.console
	qemu.Env = append(os.Environ(), "TMPDIR="+i.dir)
	if g.keys, err = qemu.StdinPipe(); err != nil {
		return nil, err
	}
	qemu.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := g.network.onThread(qemu.Start); err != nil {
		return nil, err
	}
	g.qemu = qemu
	go func() {
		qemu.Wait()
		g.console.end()
		close(g.gone)
	}()
	if g.qmp, err = connectQMP(socket, g.gone); err != nil {
		return nil, g.explain(err)
	}
	g.connect()
	return g, nil
}

func (g *guest) connect() {
	g.http = &http.Client{Transport: &http.Transport{DialContext: g.dial, DisableCompression: true}}
	g.url = "http://" + g.address + ":49983"
	g.proc = pb.NewProcessClient(g.http, g.url)
	g.fs = pb.NewFilesystemClient(g.http, g.url)
}

// tracked is a connection that cut breaks.
type tracked struct {
	net.Conn
	g *guest
}

func (c tracked) Close() error {
	c.g.mu.Lock()
	delete(c.g.conns, c.Conn)
	c.g.mu.Unlock()
	return c.Conn.Close()
}

type bootingKey struct{}

func (g *guest) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if booting, _ := ctx.Value(bootingKey{}).(bool); booting {
		// A guest whose interface is down answers nothing: the kernel's second try would come after a second.
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(g.isCut, cancel)()
	conn, err := g.network.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conns == nil {
		conn.Close()
		return nil, errors.New("the guest is cut off")
	}
	g.conns[conn] = true
	return tracked{conn, g}, nil
}

// cut breaks all connections, for ever: a guest that is restored has new peers.
func (g *guest) cut() {
	g.mu.Lock()
	conns := g.conns
	g.conns = nil
	g.mu.Unlock()
	g.callCut()
	for conn := range conns {
		conn.Close()
	}
}

// explain adds what the console shows.
func (g *guest) explain(err error) error {
	return fmt.Errorf("%w\nthe guest's console:\n%s", err, g.console.text())
}

// close ends QEMU, if it has not ended, and removes what the guest had.
func (g *guest) close() {
	g.callCut()
	if g.http != nil {
		g.http.CloseIdleConnections()
	}
	if g.qemu != nil {
		g.qemu.Process.Kill()
		<-g.gone
	}
	if g.qmp != nil {
		g.qmp.conn.Close()
	}
	if g.network != nil {
		g.network.close()
	}
	for _, name := range g.files {
		os.Remove(name)
	}
}

// healthy waits until GET /health is answered and returns how long that took.
func (g *guest) healthy() (time.Duration, error) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(context.WithValue(context.Background(), bootingKey{}, true), patience)
	defer cancel()
	for {
		request, err := http.NewRequestWithContext(ctx, "GET", g.url+"/health", nil)
		if err != nil {
			return 0, err
		}
		resp, err := g.http.Do(request)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return time.Since(start), nil
			}
			err = errors.New(resp.Status)
		}
		select {
		case <-g.gone:
			return 0, g.explain(errors.New("QEMU ended before /health was answered"))
		case <-time.After(5 * time.Millisecond):
		}
		if time.Since(start) > patience {
			return 0, g.explain(fmt.Errorf("/health: %w", err))
		}
	}
}

// boot starts a guest and waits for its agent.
func (i *images) boot(o options) (*guest, error) {
	g, err := i.start(o)
	if err != nil {
		return nil, err
	}
	if _, err := g.healthy(); err != nil {
		g.close()
		return nil, err
	}
	return g, nil
}

// save stops the guest, writes its state to a file, cuts its connections, and ends QEMU. After an error it is stopped.
func (g *guest) save(path string) error {
	if _, err := g.qmp.command("stop", nil); err != nil {
		return err
	}
	if _, err := g.qmp.command("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 40}); err != nil {
		return err
	}
	if _, err := g.qmp.command("migrate", map[string]any{"uri": "exec:cat >" + path}); err != nil {
		return err
	}
	err := g.waitStatus("query-migrate", func(status string) (bool, error) {
		if status == "failed" || status == "cancelled" {
			return false, errors.New("the migration failed")
		}
		return status == "completed", nil
	})
	if err == nil {
		g.cut()
		g.qmp.command("quit", nil)
		<-g.gone
	}
	return err
}

func (g *guest) waitStatus(query string, reached func(string) (bool, error)) error {
	for deadline := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		status, err := g.qmp.status(query)
		if err == nil {
			var ok bool
			if ok, err = reached(status); ok {
				return nil
			}
		}
		if err == nil && time.Now().After(deadline) {
			err = errors.New("took too long")
		}
		if err != nil {
			return g.explain(fmt.Errorf("%s: %w, status %q", query, err, status))
		}
	}
}

// load gives the saved guest, in a new QEMU and a new network, on the same disk or one that others may share because nothing
// is written to it; cont lets it go on.
func (g *guest) load(path string, discard bool) (*guest, error) {
	o := g.options
	o.disk, o.incoming, o.discard = g.disk, path, discard
	next, err := g.images.start(o)
	if err != nil {
		return nil, err
	}
	if err := next.waitStatus("query-status", func(status string) (bool, error) { return status != "inmigrate", nil }); err != nil {
		next.close()
		return nil, err
	}
	return next, nil
}

// inherit takes the disk over from the guest that was saved, and closes that.
func (g *guest) inherit(saved *guest) {
	g.files = append(g.files, saved.files...)
	saved.files = nil
	saved.close()
}

// cont lets a stopped guest go on.
func (g *guest) cont() error {
	_, err := g.qmp.command("cont", nil)
	return err
}

// worked is the CPU time of QEMU: proc(5), /proc/PID/task/TID/schedstat.
func (g *guest) worked() (total time.Duration) {
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", g.qemu.Process.Pid))
	for _, file := range threads {
		text, _ := os.ReadFile(file)
		var nanos int64
		fmt.Sscan(string(text), &nanos)
		total += time.Duration(nanos)
	}
	return total
}

// ended waits for QEMU to end by the guest's own doing and returns why: guest-shutdown, guest-reset, guest-panic.
func (g *guest) ended() (reason string, err error) {
	select {
	case <-g.gone:
	case <-time.After(patience):
		return "", g.explain(errors.New("the guest goes on"))
	}
	for e := range g.qmp.events {
		if e.Event == "SHUTDOWN" {
			reason = e.Data.Reason
		}
	}
	if strings.Contains(g.console.text(), "Kernel panic") { // by panic=-1 it ends like a restart
		reason = "guest-panic"
	}
	return reason, nil
}

// console keeps what the guest prints.
type console struct {
	mu      sync.Mutex
	changed *sync.Cond
	buf     bytes.Buffer
	ended   bool
	tee     io.Writer
}

func newConsole() *console {
	c := &console{}
	c.changed = sync.NewCond(&c.mu)
	return c
}

func (c *console) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changed.Broadcast()
	if c.tee != nil {
		c.tee.Write(p)
	}
	return c.buf.Write(p)
}

func (c *console) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	c.changed.Broadcast()
}

func (c *console) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.ReplaceAll(c.buf.String(), "\r\n", "\n")
}

// wait returns the time at which the text was there; it is looked for in what has been printed so far too.
func (c *console) wait(text string) (time.Time, error) {
	late := time.AfterFunc(patience, c.changed.Broadcast)
	defer late.Stop()
	start := time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	for !bytes.Contains(c.buf.Bytes(), []byte(text)) {
		if c.ended || time.Since(start) >= patience {
			return time.Time{}, fmt.Errorf("%q is not printed on the console:\n%s", text, c.buf.String())
		}
		c.changed.Wait()
	}
	return time.Now(), nil
}

// kvmRuns tells whether KVM runs a guest here: the device alone does not say.
func (i *images) kvmRuns() bool {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		return false
	} else {
		f.Close()
	}
	g, err := i.start(options{accel: "kvm", exec: "/bare", prepared: true})
	if err != nil {
		return false
	}
	defer g.close()
	healthy := make(chan error, 1)
	go func() { _, err := g.healthy(); healthy <- err }()
	select {
	case err = <-healthy:
	case <-time.After(20 * time.Second):
		g.qemu.Process.Kill()
		err = <-healthy
	}
	return err == nil
}

// scratch makes the directory for everything of this run.
func scratch() (string, error) {
	dir, err := os.MkdirTemp("", "envd-vm-")
	if err != nil {
		return "", err
	}
	return filepath.EvalSymlinks(dir)
}
