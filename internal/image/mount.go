package image

import (
	"errors"
	"fmt"
	"os"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// Mount makes target (mode 0755, which the caller's parent directory keeps
// private) and mounts a snapshot on it.
func Mount(mounts []mount.Mount, target string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	if err := mount.All(mounts, target); err != nil {
		return errors.Join(fmt.Errorf("mount snapshot on %s: %w", target, err), Unmount(target))
	}
	return nil
}

// Unmount undoes Mount, all mounts on top of each other, and leaves the directory.
// What is not mounted, or gone, is success.
//
// Mounts are detached (MNT_DETACH): the container's processes are gone by now,
// and whoever else still has a file open there (a backup, an operator's shell)
// must not keep a pod from being removed. The kernel drops the mount for good
// when the last of them lets go.
func Unmount(target string) error {
	for {
		err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT): // nothing (more) is mounted there
			return nil
		case err != nil:
			return fmt.Errorf("unmount %s: %w", target, err)
		}
	}
}
