// Package rootfs reads from a container's root filesystem before anything of the
// container runs: its users, and what an image's VOLUME holds.
//
// The root filesystem comes from an image nobody vouches for. Every path in it is
// resolved as if the root filesystem were "/" (openat2 with RESOLVE_IN_ROOT), so
// that no symlink leads to the host's files; only regular files are read, and
// only up to a limit.
package rootfs

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"
)

// maxFile bounds /etc/passwd and /etc/group, bytes.
const maxFile = 4 << 20

// readFile reads a small regular file. One that does not exist is empty.
func readFile(rootfs, path string) ([]byte, error) {
	// The handle is O_PATH: to open a device or a FIFO already does something.
	handle, err := pathrs.OpenInRoot(rootfs, path)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open %s in the image: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	defer handle.Close()
	if st, err := handle.Stat(); err != nil {
		return nil, fmt.Errorf("stat %s in the image: %w", path, err)
	} else if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s in the image is not a regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	f, err := pathrs.Reopen(handle, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open %s in the image: %w", path, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s in the image: %w", path, err)
	}
	if len(data) > maxFile {
		return nil, fmt.Errorf("%s in the image is larger than %d bytes: %w", path, maxFile, errdefs.ErrInvalidArgument)
	}
	return data, nil
}
