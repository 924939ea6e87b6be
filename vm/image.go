// What a guest consists of: the kernel of tools/kernel, an initramfs with the loader and the kernel's modules, and a root
// filesystem that holds the agent and the test's helper and nothing else.

package main

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// wantedModules are loaded with what they depend on, as far as they are not built into the kernel.
var wantedModules = []string{"virtio_pci", "virtio_blk", "virtio_net", "crc32c_generic", "crc32c_intel", "ext4", "tcp_diag",
	"atkbd", "i8042", "overlay"}

// nfsModules are loaded in guests that want them: it takes a while.
var nfsModules = []string{"nfsv3"}

// images is a directory with everything that guests are made of.
type images struct {
	dir, kernel string
}

func (i *images) path(name string) string { return filepath.Join(i.dir, name) }

// buildImages compiles the agent as `make build` does, and the helpers, and packs them.
func buildImages(dir string) (*images, error) {
	i := &images{dir: dir, kernel: filepath.Join("..", "bin", "kernel", "vmlinuz")}
	if _, err := os.Stat(i.kernel); err != nil {
		return nil, fmt.Errorf("no kernel for the guest (as root, tools/setup fetches it): %w", err)
	}
	for _, b := range []struct{ from, to string }{{"..", "envd"}, {"./loader", "loader"}, {"./workload", "workload"}, {"./bare", "bare"}} {
		if b.to == "envd" && os.Getenv("ENVD_BIN") != "" {
			if err := copyFile(os.Getenv("ENVD_BIN"), i.path(b.to), 0o755); err != nil {
				return nil, err
			}
			continue
		}
		build := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", i.path(b.to), ".")
		if b.to == "envd" {
			build = exec.Command("tools/build", i.path(b.to))
		}
		build.Dir = b.from
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("go build %s: %w\n%s", b.from, err, out)
		}
	}
	// The kernel finds /init, which is the loader, and in guests without a disk the rest too.
	for name, wanted := range map[string][]string{"initramfs": wantedModules, "initramfs-whole": wantedModules,
		"initramfs-nfs": slices.Concat(wantedModules, nfsModules)} {
		modules, err := orderedModules(filepath.Join("..", "bin", "kernel", "modules"), wanted)
		if err != nil {
			return nil, err
		}
		var out bytes.Buffer
		c := cpio{w: &out}
		c.add("init", 0o100755, i.path("loader"))
		c.directory("modules")
		for n, path := range modules {
			c.add(fmt.Sprintf("modules/%03d-%s", n, filepath.Base(path)), 0o100644, path)
		}
		if name == "initramfs-whole" {
			for _, name := range []string{"envd", "workload", "bare"} {
				c.add(name, 0o100755, i.path(name))
			}
		}
		c.end()
		if err := errors.Join(c.err, os.WriteFile(i.path(name), out.Bytes(), 0o644)); err != nil {
			return nil, err
		}
	}
	return i, i.makeDisk()
}

// makeDisk makes the root filesystem: the agent, the helper, the bare server, and not one more name.
func (i *images) makeDisk() error {
	root := i.path("root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"envd", "workload", "bare"} {
		if err := copyFile(i.path(name), filepath.Join(root, name), 0o755); err != nil {
			return err
		}
	}
	mkfs := exec.Command("mkfs.ext4", "-q", "-F", "-b", "4096", "-d", root, i.path("disk"), "96M")
	mkfs.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	if out, err := mkfs.CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w\n%s", err, out)
	}
	return nil
}

// copyFile copies with copy_file_range where it can; holes stay holes where the filesystem shares extents.
func copyFile(from, to string, mode os.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// orderedModules returns the files of the wanted modules and of those that they depend on, dependencies first. What is
// not there is taken to be built into the kernel.
func orderedModules(dir string, wanted []string) (paths []string, err error) {
	index := map[string]string{}
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if name, _, ok := strings.Cut(filepath.Base(path), ".ko"); ok {
			index[strings.ReplaceAll(name, "-", "_")] = path
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var visit func(name string) error
	visit = func(name string) error {
		path := index[name]
		if path == "" || seen[name] {
			return nil
		}
		seen[name] = true
		image, err := readModule(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		file, err := elf.NewFile(bytes.NewReader(image))
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if section := file.Section(".modinfo"); section != nil {
			info, _ := section.Data()
			for line := range strings.SplitSeq(string(info), "\x00") {
				if list, ok := strings.CutPrefix(line, "depends="); ok && list != "" {
					for dependency := range strings.SplitSeq(list, ",") {
						if err := visit(strings.ReplaceAll(dependency, "-", "_")); err != nil {
							return err
						}
					}
				}
			}
		}
		paths = append(paths, path)
		return nil
	}
	for _, name := range wanted {
		if err := visit(name); err != nil {
			return nil, err
		}
	}
	return paths, nil
}

// readModule returns a module's ELF image, which some distributions compress.
func readModule(path string) ([]byte, error) {
	switch filepath.Ext(path) {
	case ".xz":
		return exec.Command("xz", "-dc", path).Output()
	case ".zst":
		return exec.Command("zstd", "-dcq", path).Output()
	case ".gz":
		return exec.Command("gzip", "-dc", path).Output()
	}
	return os.ReadFile(path)
}

// cpio writes an archive in the format `newc`, uncompressed: an emulated guest takes longer to unpack it than QEMU to read it.
// Source: Documentation/driver-api/early-userspace/buffer-format.rst.
type cpio struct {
	w   *bytes.Buffer
	ino int
	err error
}

func (c *cpio) entry(name string, mode int, content []byte) {
	c.ino++
	nlink := 1
	if mode&0o170000 == 0o040000 {
		nlink = 2
	}
	fmt.Fprintf(c.w, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		c.ino, mode, 0, 0, nlink, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	c.pad()
	c.w.Write(content)
	c.pad()
}

func (c *cpio) pad() {
	for c.w.Len()%4 != 0 {
		c.w.WriteByte(0)
	}
}

func (c *cpio) directory(name string) { c.entry(name, 0o040755, nil) }

// add takes a file from the disk; a module goes in decompressed.
func (c *cpio) add(name string, mode int, path string) {
	content, err := readModule(path)
	if err != nil {
		c.err = errors.Join(c.err, err)
		return
	}
	for _, suffix := range []string{".xz", ".zst", ".gz"} {
		name = strings.TrimSuffix(name, suffix)
	}
	c.entry(name, mode, content)
}

func (c *cpio) end() { c.entry("TRAILER!!!", 0, nil) }
