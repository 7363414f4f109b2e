package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"
	"golang.org/x/sync/errgroup"
)

// The Debian release whose packages fill the images, and the packages beyond
// Debian's required ones. Pinned, so that the images do not change with the
// release of the machine they are built on.
const (
	suite    = "bookworm"
	packages = "busybox,procps,nginx-light,apache2-bin,etcd-server,dumb-init,iptables"
)

// debian is a directory tree of unpacked Debian packages. Nothing of it is
// ever configured or run in a chroot: images take single files out of it.
type debian struct{ root string }

// fetchDebian returns the unpacked packages below dir, downloading them with
// debootstrap (which verifies Debian's signatures) when they are not there.
// About 20 s and 240 MB; the tree appears under its final name only when
// complete.
func fetchDebian(ctx context.Context, dir string) (*debian, error) {
	// Other packages are another tree: an older one lacks what was added since.
	key := sha256.Sum256([]byte(packages))
	final := filepath.Join(dir, fmt.Sprintf("debian-%s-%s-%x", suite, runtime.GOARCH, key[:4]))
	if _, err := os.Stat(final); err == nil {
		return &debian{root: final}, nil
	}
	work, err := os.MkdirTemp(dir, "debootstrap-")
	if err != nil {
		return nil, fmt.Errorf("create work directory: %w", err)
	}
	defer os.RemoveAll(work)

	download := exec.CommandContext(ctx, "debootstrap", "--download-only", "--variant=minbase",
		"--include="+packages, suite, filepath.Join(work, "download"))
	if out, err := download.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("download Debian packages: debootstrap: %w: %s", err, tail(out))
	}
	debs, err := filepath.Glob(filepath.Join(work, "download/var/cache/apt/archives/*.deb"))
	if err != nil {
		return nil, fmt.Errorf("list downloaded packages: %w", err)
	}
	if len(debs) == 0 {
		return nil, errors.New("download Debian packages: debootstrap left no package")
	}
	root := filepath.Join(work, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return nil, fmt.Errorf("create package tree: %w", err)
	}
	if err := unpackDebs(ctx, debs, root); err != nil {
		return nil, err
	}
	if err := os.Rename(root, final); err != nil {
		return nil, fmt.Errorf("publish package tree: %w", err)
	}
	return &debian{root: final}, nil
}

// unpackDebs extracts the archives into root, as many at a time as there are
// processors. Packages of one release do not share files, only directories.
func unpackDebs(ctx context.Context, debs []string, root string) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(runtime.NumCPU())
	for _, deb := range debs {
		group.Go(func() error {
			out, err := exec.CommandContext(ctx, "dpkg-deb", "--extract", deb, root).CombinedOutput()
			if err != nil {
				return fmt.Errorf("unpack %s: %w: %s", filepath.Base(deb), err, tail(out))
			}
			return nil
		})
	}
	return group.Wait()
}

// path is where the file that name means inside the tree lies on this
// machine, symlinks followed as if the tree were the root.
func (d *debian) path(name string) (string, error) {
	p, err := securejoin.SecureJoin(d.root, name)
	if err != nil {
		return "", fmt.Errorf("resolve %s: %w", name, err)
	}
	return p, nil
}

// read returns a file of the tree.
func (d *debian) read(name string) ([]byte, error) {
	p, err := d.path(name)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(p)
}

// binary is an ELF file of the tree together with everything the dynamic
// loader will want: path in the image to path in the tree. The loader keeps
// the name the binary asks for, libraries keep their soname.
func (d *debian) binary(name string) (map[string]string, error) {
	need := map[string]string{name: name}
	for queue := []string{name}; len(queue) > 0; queue = queue[1:] {
		interpreter, libraries, err := d.links(queue[0])
		if err != nil {
			return nil, err
		}
		if interpreter != "" {
			need[interpreter] = interpreter
		}
		for _, soname := range libraries {
			at, err := d.library(soname)
			if err != nil {
				return nil, fmt.Errorf("library of %s: %w", queue[0], err)
			}
			if _, ok := need[at]; !ok {
				need[at] = at
				queue = append(queue, at)
			}
		}
	}
	return need, nil
}

// links reads what an ELF file asks the kernel and the loader for.
func (d *debian) links(name string) (interpreter string, libraries []string, err error) {
	p, err := d.path(name)
	if err != nil {
		return "", nil, err
	}
	f, err := elf.Open(p)
	if err != nil {
		return "", nil, fmt.Errorf("read ELF headers of %s: %w", name, err)
	}
	defer f.Close()
	for _, prog := range f.Progs {
		if prog.Type != elf.PT_INTERP {
			continue
		}
		text := make([]byte, prog.Filesz)
		if _, err := prog.ReadAt(text, 0); err != nil {
			return "", nil, fmt.Errorf("read interpreter of %s: %w", name, err)
		}
		interpreter = string(bytes.TrimRight(text, "\x00"))
	}
	libraries, err = f.ImportedLibraries()
	if err != nil {
		return "", nil, fmt.Errorf("read libraries of %s: %w", name, err)
	}
	return interpreter, libraries, nil
}

// libraryDirs are the directories of the tree that Debian's loader searches
// without being told, relative to the root.
func (d *debian) libraryDirs() ([]string, error) {
	var dirs []string
	for _, pattern := range []string{"lib/*-linux-gnu*", "usr/lib/*-linux-gnu*", "lib64"} {
		found, err := filepath.Glob(filepath.Join(d.root, pattern))
		if err != nil {
			return nil, err
		}
		for _, dir := range found {
			dirs = append(dirs, strings.TrimPrefix(dir, d.root))
		}
	}
	slices.Sort(dirs)
	return dirs, nil
}

// library finds a shared library by its soname.
func (d *debian) library(soname string) (string, error) {
	dirs, err := d.libraryDirs()
	if err != nil {
		return "", err
	}
	for _, dir := range dirs {
		at := filepath.Join(dir, soname)
		p, err := d.path(at)
		if err != nil {
			return "", err
		}
		if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() {
			return at, nil
		}
	}
	return "", fmt.Errorf("%s is in none of %s", soname, strings.Join(dirs, ", "))
}

// applets asks the tree's busybox which programs it can be. It runs through
// the tree's own loader and libraries, so that the machine's do not matter.
func (d *debian) applets(ctx context.Context) ([]string, error) {
	loader, _, err := d.links("/bin/busybox")
	if err != nil {
		return nil, err
	}
	ld, err := d.path(loader)
	if err != nil {
		return nil, err
	}
	dirs, err := d.libraryDirs()
	if err != nil {
		return nil, err
	}
	for i := range dirs {
		dirs[i] = filepath.Join(d.root, dirs[i])
	}
	out, err := exec.CommandContext(ctx, ld, "--library-path", strings.Join(dirs, ":"),
		filepath.Join(d.root, "bin/busybox"), "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox applets: %w", err)
	}
	return strings.Fields(string(out)), nil
}

// tail is the end of a program's output, enough to see why it gave up.
func tail(out []byte) string {
	out = bytes.TrimSpace(out)
	if len(out) > 600 {
		out = out[len(out)-600:]
	}
	return string(out)
}
