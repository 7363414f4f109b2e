package rootfs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"
)

// maxDepth bounds the directories in directories that CopyUp goes down: it holds
// two descriptors for each.
const maxDepth = 256

// CopyUp copies what the image has at path, a VOLUME of it, into the host
// directory dst, which exists and is empty: owners, modes, times, xattrs, hard
// links, devices, and symlinks as symlinks. dst gets the attributes of the image's
// directory. Where the image has nothing, dst stays as it is. A path that is no
// directory is errdefs.ErrInvalidArgument.
//
// No path is resolved twice: everything goes by descriptor and name, and no
// symlink is followed, neither out of the root filesystem nor in dst. On a snapshot
// that is id-mapped for a user namespace the owners are those seen from the host,
// and so are the copies'.
func CopyUp(rootfs, path, dst string) error {
	handle, err := pathrs.OpenInRoot(rootfs, path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open volume %s in the image: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	defer handle.Close()
	if st, err := handle.Stat(); err != nil {
		return fmt.Errorf("stat volume %s in the image: %w", path, err)
	} else if !st.IsDir() {
		return fmt.Errorf("volume %s is not a directory in the image: %w", path, errdefs.ErrInvalidArgument)
	}
	src, err := pathrs.Reopen(handle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open volume %s in the image: %w", path, err)
	}
	defer src.Close()
	to, err := openAt(unix.AT_FDCWD, dst, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", dst, err)
	}
	defer to.Close()
	c := copier{root: to, links: map[inode]string{}}
	if err := c.dir(to, src, ".", 0); err != nil {
		return fmt.Errorf("copy volume %s of the image: %w", path, err)
	}
	return nil
}

type inode struct{ dev, ino uint64 }

// copier copies one tree.
type copier struct {
	root  *os.File         // of the copy
	links map[inode]string // files with several names: where in the copy the first is
}

// dir copies what is in src into dst, then src's attributes. rel is where dst is
// in the copy.
func (c *copier) dir(dst, src *os.File, rel string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("%s: more than %d directories deep: %w", rel, maxDepth, errdefs.ErrInvalidArgument)
	}
	for {
		names, err := src.Readdirnames(256)
		for _, name := range names {
			if err := c.entry(dst, src, name, filepath.Join(rel, name), depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("%s: read directory: %w", rel, err)
		}
	}
	if err := CopyAttributes(dst, src); err != nil {
		return fmt.Errorf("%s: %w", rel, err)
	}
	return nil
}

func (c *copier) entry(dst, src *os.File, name, rel string, depth int) error {
	var st unix.Stat_t
	err := unix.Fstatat(int(src.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil {
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			return c.subdir(dst, src, name, rel, depth)
		case unix.S_IFREG:
			err = c.file(dst, src, name, rel, &st)
		case unix.S_IFLNK:
			err = copySymlink(dst, src, name, &st)
		default:
			err = makeNode(dst, name, &st)
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", rel, err)
	}
	return nil
}

func (c *copier) subdir(dst, src *os.File, name, rel string, depth int) error {
	from, err := openAt(int(src.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("%s: open: %w", rel, err)
	}
	defer from.Close()
	if err := unix.Mkdirat(int(dst.Fd()), name, 0o700); err != nil {
		return fmt.Errorf("%s: make directory: %w", rel, err)
	}
	to, err := openAt(int(dst.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("%s: open copy: %w", rel, err)
	}
	defer to.Close()
	return c.dir(to, from, rel, depth+1)
}

func (c *copier) file(dst, src *os.File, name, rel string, st *unix.Stat_t) error {
	if st.Nlink > 1 {
		id := inode{uint64(st.Dev), st.Ino}
		if first, ok := c.links[id]; ok {
			return unix.Linkat(int(c.root.Fd()), first, int(dst.Fd()), name, 0)
		}
		c.links[id] = rel
	}
	from, err := openAt(int(src.Fd()), name, unix.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := openAt(int(dst.Fd()), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(to, from)
	if err == nil {
		err = CopyAttributes(to, from)
	}
	return errors.Join(err, to.Close())
}

func copySymlink(dst, src *os.File, name string, st *unix.Stat_t) error {
	target := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(src.Fd()), name, target)
	if err != nil {
		return err
	}
	if err := unix.Symlinkat(string(target[:n]), int(dst.Fd()), name); err != nil {
		return err
	}
	return ownAndDate(dst, name, st)
}

// makeNode makes a FIFO, socket or device.
func makeNode(dst *os.File, name string, st *unix.Stat_t) error {
	if err := unix.Mknodat(int(dst.Fd()), name, st.Mode, int(st.Rdev)); err != nil {
		return err
	}
	if err := ownAndDate(dst, name, st); err != nil {
		return err
	}
	return unix.Fchmodat(int(dst.Fd()), name, st.Mode&0o7777, 0)
}

func ownAndDate(dst *os.File, name string, st *unix.Stat_t) error {
	if err := unix.Fchownat(int(dst.Fd()), name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	return unix.UtimesNanoAt(int(dst.Fd()), name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}

// openAt opens name in a directory and follows no symlink at its end.
func openAt(dir int, name string, flags int, mode uint32) (*os.File, error) {
	fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC|unix.O_NONBLOCK, mode)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}
