// What /init changes in the guest's system: the event server's line in the hosts file, trusted certificates, NFS volumes.
//
// No program is executed: NFS is mounted by mount(2), nfs(5) lists the options. Formats: hosts(5), RFC 7468 (PEM).

package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// systemFileLimit bounds, in bytes, the files that are edited here.
const systemFileLimit = 16 << 20

// editFile changes a file of the system: in place, for it may be a mount, or as a whole, so that nobody ever reads half of it.
func (s *initService) editFile(path string, whole bool, edit func(old string) string) error {
	t, err := s.files.target(path, account{uid: uint32(os.Geteuid()), gid: uint32(os.Getegid())}, nil)
	if err != nil {
		return err
	}
	defer t.close()
	var old []byte
	if t.exists() {
		t.owner = account{uid: t.st.Uid, gid: t.st.Gid}
		f, err := t.open(os.O_RDONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if old, err = io.ReadAll(io.LimitReader(f, systemFileLimit)); err == nil && len(old) == systemFileLimit {
			err = fmt.Errorf("%s is too large to be edited", path)
		}
		if err != nil {
			return err
		}
	}
	text := edit(string(old))
	switch {
	case text == string(old):
		return nil
	case whole:
		return t.beside(func(f storing) error { _, err := io.WriteString(f, text); return err })
	}
	t.forced = true
	return t.inPlace(strings.NewReader(text), int64(len(text)))
}

// setHyperloop makes the event server known by name, and where that worked by a variable.
func (s *initService) setHyperloop(text string) {
	ip, err := netip.ParseAddr(text)
	if ip = ip.Unmap(); err != nil || ip.Zone() != "" {
		slog.Warn("hyperloopIP is no address", "logger", "envd", "value", text)
		return
	}
	url := "http://" + strings.TrimSuffix(netip.AddrPortFrom(ip, 0).String(), ":0")
	s.work.do("hosts", func() {
		err := s.editFile("/etc/hosts", false, func(old string) string {
			if s.settings.e2bNames {
				old = pointHost(old, "events.e2b.local", ip)
			}
			return pointHost(old, "events.wrenn.local", ip)
		})
		if err != nil {
			slog.Warn("the event server has no name", "logger", "envd", "error", err)
			return
		}
		s.settings.setSystem("EVENTS_ADDRESS", url)
	})
}

// pointHost maps a name to an address in the text of a hosts file, and to no other one of the same family. Other lines stay as
// they are, and other names on their lines.
func pointHost(text, name string, ip netip.Addr) string {
	var out strings.Builder
	mapped := false
	for line := range strings.Lines(text) {
		entry, comment, commented := strings.Cut(line, "#")
		fields := strings.Fields(entry)
		others := slices.DeleteFunc(slices.Clone(fields), func(f string) bool { return strings.EqualFold(f, name) })
		at, err := netip.ParseAddr(append(fields, "")[0])
		at, named := at.Unmap(), len(others) < len(fields)
		mapped = mapped || named && at == ip
		if !named || err != nil || at.Is4() != ip.Is4() || at == ip {
			out.WriteString(line)
			continue
		}
		if len(others) > 1 {
			out.WriteString(others[0] + "\t" + strings.Join(others[1:], " "))
			comment = cmp.Or(comment, "\n")
		}
		if commented {
			out.WriteString(" #")
		}
		out.WriteString(comment)
	}
	if mapped {
		return out.String()
	}
	if out.Len() > 0 && !strings.HasSuffix(out.String(), "\n") {
		out.WriteString("\n")
	}
	return out.String() + ip.String() + "\t" + name + "\n"
}

const (
	caBundleFile = "/etc/ssl/certs/ca-certificates.crt"
	caFile       = "/usr/local/share/ca-certificates/e2b-ca.crt" // what was added last, for update-ca-certificates(8)
)

// certificates gives the certificates in a text and nothing else of it: what the bundle is given must not end it for its readers.
func certificates(text string) (string, error) {
	var out []byte
	failure, sound := errors.New("no certificate in PEM"), false
	for block, rest := pem.Decode([]byte(text)); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			_, failure = x509.ParseCertificate(block.Bytes)
			sound = sound || failure == nil
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})...)
		}
	}
	if !sound {
		return "", failure
	}
	return string(out), nil
}

// installCA adds certificates to those that the system trusts, once, in place of those that it added before.
func (s *initService) installCA(ctx context.Context, text string) error {
	ctx, cancel := context.WithTimeout(ctx, filePatience)
	defer cancel()
	done := make(chan error, 1)
	s.work.do("ca", func() {
		previous := ""
		err := s.editFile(caFile, true, func(old string) string {
			previous, _ = certificates(old)
			return old
		})
		added := false
		if err == nil {
			err = s.editFile(caBundleFile, true, func(old string) string {
				if previous != "" && previous != text {
					old = strings.ReplaceAll(old, previous, "")
				}
				if added = !strings.Contains(old, text); !added {
					return old
				}
				return strings.TrimSuffix(old, "\n") + "\n" + text
			})
		}
		done <- err
		if err == nil && added {
			err = s.editFile(caFile, true, func(string) string { return text })
		}
		if err != nil {
			slog.Warn("certificates are not installed, or not noted", "logger", "envd", "error", err)
		}
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("certificates are still being installed: %w", errBusy)
	}
}

// ---- volumes -------------------------------------------------------------------------------------------------------

type volumeMount struct {
	Target string `json:"nfs_target"` // HOST:/PATH, an IPv6 address in brackets
	Path   string `json:"path"`
}

// server is the host part of a sound target.
func (m volumeMount) server() (string, error) {
	host, export, found := strings.Cut(m.Target, ":/")
	literal, bracketed := strings.CutPrefix(host, "[")
	if bracketed {
		literal, bracketed = strings.CutSuffix(literal, "]")
		if ip, err := netip.ParseAddr(literal); err != nil || !ip.Is6() {
			literal = ""
		}
	}
	switch {
	case !filepath.IsAbs(m.Path) || strings.Contains(m.Path, "\x00"):
		return "", fmt.Errorf("path %.100q is not absolute", m.Path)
	case !found || literal == "" || strings.ContainsAny(literal, "[]/ \t\n") || strings.Contains(literal, ":") && !bracketed ||
		strings.Contains(m.Target, "\x00") || len(m.Target)+len(export) > unix.PathMax:
		return "", fmt.Errorf("nfs_target %.100q is not HOST:/PATH", m.Target)
	}
	return literal, nil
}

func (s *initService) mountNFS(m volumeMount) error {
	host, err := m.server()
	if err != nil || isMounted(mountTable(), m.Target, filepath.Clean(m.Path)) { // before a path is walked whose server may hang
		return err
	}
	ip, err := reachNFS(host)
	if err != nil {
		return err
	}
	s.unmountNFS(filepath.Clean(m.Path))
	p, err := walkPath(walk{users: s.files.users, mkdirs: &account{}, follow: true}, m.Path+"/")
	if err != nil {
		return err
	}
	defer p.close()
	if p.as != nil {
		return fmt.Errorf("the way leads over a link of uid %d", p.as.uid)
	}
	if isMounted(mountTable(), m.Target, p.path) {
		return nil
	}
	return os.NewSyscallError("mount", unix.Mount(m.Target, fmt.Sprintf("/proc/self/fd/%d", p.dir), "nfs", 0, nfsOptions(ip)))
}

// unmountNFS takes a volume away whose place another one is to have: the kernel mounts nothing of the same server over it, and
// where its server is dead even a look at the path hangs. The unmounting may hang as well, after it has left its place.
func (s *initService) unmountNFS(path string) {
	p, err := walkPath(walk{users: s.files.users, follow: true}, filepath.Dir(path)+"/")
	if err != nil {
		return // the way is still to be made
	}
	if at := filepath.Join(p.path, filepath.Base(path)); p.as == nil && isMounted(mountTable(), "", at) {
		inTime("unmount "+at, patience, func() {
			unix.Unmount(fmt.Sprintf("/proc/self/fd/%d/%s", p.dir, filepath.Base(path)), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		})
	}
	p.close() // a call that hangs has found its way
}

// reachNFS finds the address at which a server answers. It tries as long as mount(8) does: the network may be about to come up.
func reachNFS(host string) (netip.Addr, error) {
	dialer := net.Dialer{Timeout: 10 * time.Second}
	for began := time.Now(); ; time.Sleep(time.Second) {
		conn, err := dialer.Dial("tcp", net.JoinHostPort(host, "2049"))
		if err == nil {
			defer conn.Close()
			return conn.RemoteAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(), nil
		}
		if time.Since(began) > 2*time.Minute {
			return netip.Addr{}, err
		}
	}
}

// nfsOptions are what mount.nfs(8) would pass. There is no lock daemon in a guest.
func nfsOptions(ip netip.Addr) string {
	proto := "tcp"
	if ip.Is6() {
		proto = "tcp6"
	}
	return fmt.Sprintf("mountproto=%s,mountport=2049,proto=%[1]s,port=2049,nfsvers=3,noacl,nolock,addr=%s,mountaddr=%[2]s", proto, ip)
}

func mountTable() string { return readProc("/proc/self/mountinfo") }

// isMounted looks at what is topmost at a path: proc(5), mountinfo. No target stands for any volume.
func isMounted(table, target, path string) (same bool) {
	escape := strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`)
	for line := range strings.Lines(table) {
		before, after, _ := strings.Cut(line, " - ")
		where, what := strings.Fields(before), strings.Fields(after)
		if len(where) > 4 && len(what) > 1 && where[4] == escape.Replace(path) {
			source := strings.TrimRight(escape.Replace(target), "/")
			same = strings.HasPrefix(what[0], "nfs") && (target == "" || strings.TrimRight(what[1], "/") == source)
		}
	}
	return same
}
