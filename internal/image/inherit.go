package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/rootfs"
)

// inherit gives the directories that a layer implies but does not describe the
// owner, mode, times and xattrs they have in the layers below (lowers, topmost
// first): an archive with tmp/x and no tmp/ must not make /tmp lose its sticky bit.
func (st *staged) inherit(lowers []string) error {
	for _, dir := range st.implied {
		if err := inheritDir(st.fs(), dir, lowers); err != nil {
			return fmt.Errorf("take attributes of %s from the layers below: %w", dir, err)
		}
	}
	return nil
}

// chainDirs returns the directories of a committed snapshot and its ancestors,
// topmost first.
func (s *Store) chainDirs(ctx context.Context, name string) (dirs []string, err error) {
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		for name != "" {
			id, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return fmt.Errorf("find layer %s: %w", name, err)
			}
			dirs = append(dirs, filepath.Join(s.snapshotDir(id), "fs"))
			name = info.Parent
		}
		return nil
	})
	return dirs, err
}

func inheritDir(upper, dir string, lowers []string) error {
	dst, err := openDir(upper, dir)
	if err != nil {
		return ignore(err, unix.ENOENT, unix.ENOTDIR, unix.ELOOP) // the archive put something else there
	}
	defer dst.Close()
	for _, lower := range lowers {
		src, err := openDir(lower, dir)
		if err == nil {
			defer src.Close()
			return rootfs.CopyAttributes(dst, src)
		}
		if !errors.Is(err, unix.ENOENT) {
			return ignore(err, unix.ENOTDIR, unix.ELOOP) // hidden from here on: a whiteout, a file, a link
		}
		if isOpaque(lower, dir) {
			return nil
		}
	}
	return nil
}

// openDir opens root/dir if all of it is real directories. Images are not
// trusted: no symlink is followed.
func openDir(root, dir string) (*os.File, error) {
	rootFD, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root, err)
	}
	defer unix.Close(rootFD)
	fd, err := unix.Openat2(rootFD, dir, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC | unix.O_NOFOLLOW,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), filepath.Join(root, dir)), nil
}

// isOpaque tells whether a layer hides dir in the layers below it, by an opaque
// directory on the way to it.
func isOpaque(layer, dir string) bool {
	for dir = path.Dir(dir); dir != "."; dir = path.Dir(dir) {
		f, err := openDir(layer, dir)
		if err != nil {
			continue
		}
		var v [1]byte
		n, err := unix.Fgetxattr(int(f.Fd()), "trusted.overlay.opaque", v[:])
		f.Close()
		if err == nil && n == 1 && v[0] == 'y' {
			return true
		}
	}
	return false
}

func ignore(err error, fine ...unix.Errno) error {
	for _, f := range fine {
		if errors.Is(err, f) {
			return nil
		}
	}
	return err
}
