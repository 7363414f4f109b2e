package image

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// Mount makes target (mode 0755, which the caller's parent directory keeps
// private) and mounts a snapshot on it. All its files have the SELinux label, where
// one is given. A bind mount shows the labels that are there, so that the view of an
// image of one layer becomes an overlay of it and of the empty target.
func Mount(mounts []mount.Mount, target, label string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return fmt.Errorf("make mount point: %w", err)
	}
	for _, m := range mounts {
		if label != "" {
			m = labelled(m, target, label)
		}
		m = volatile(m)
		if err := mountOne(m, target); err != nil {
			return errors.Join(fmt.Errorf("mount snapshot on %s: %w", target, err), Unmount(target))
		}
	}
	return nil
}

// volatile is m without syncs. Without it the kernel writes all that is dirty on the
// whole filesystem to the disk, other pods' data too, whenever a container's root is
// unmounted (ovl_sync_fs), and the removal waits for that. What a container has written to
// its root is of no use after a power cut, for it does not run then and is made anew; so
// its own fsync has nothing to keep either. Such a snapshot can be mounted once only. When
// the disk below fails a write, fsync fails (EIO) in every container that was mounted
// before, until it is made anew (the kernel's overlayfs.rst, "Volatile mount").
func volatile(m mount.Mount) mount.Mount {
	if m.Type == "overlay" && slices.ContainsFunc(m.Options, func(o string) bool { return strings.HasPrefix(o, "upperdir=") }) {
		m.Options = append(slices.Clone(m.Options), "volatile")
	}
	return m
}

// labelled is m with an SELinux label for all its files. Of bind mounts only
// read-only ones can have it, which is what snapshots are bind mounted as; but not
// ID-mapped ones: containerd's library maps the directory that an overlay's layers
// have in common, and the target is on another file system.
func labelled(m mount.Mount, target, label string) mount.Mount {
	options := slices.Clone(m.Options)
	if m.Type == "bind" && m.ReadOnly() && !slices.ContainsFunc(options, isIDMap) {
		options = slices.DeleteFunc(options, func(o string) bool { return o == "ro" || o == "bind" || o == "rbind" })
		options = append(options, fmt.Sprintf("lowerdir=%s:%s", m.Source, target))
		m.Type, m.Source = "overlay", "overlay"
	}
	if m.Type == "overlay" {
		m.Options = append(options, fmt.Sprintf("context=%q", label))
	}
	return m
}

// mountOne mounts m. Of a read-only bind mount (the view of an image of one
// layer) containerd's library forgets the ID mapping, so that one is mapped first
// and made read-only then.
func mountOne(m mount.Mount, target string) error {
	readOnly := m.Type == "bind" && m.ReadOnly() && slices.ContainsFunc(m.Options, isIDMap)
	if readOnly {
		m.Options = slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "ro" })
	}
	if err := m.Mount(target); err != nil || !readOnly {
		return err
	}
	return unix.Mount("", target, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
}

func isIDMap(option string) bool { return strings.HasPrefix(option, "uidmap=") }

// Unmount undoes Mount, all mounts on top of each other, and leaves the directory.
// What is not mounted, or gone, is success.
//
// Mounts are detached (MNT_DETACH): the container's processes are gone by now, or have it in
// a mount namespace of their own, and whoever else still has a file open there (a backup, an
// operator's shell) must not keep a pod from being removed. The kernel drops the mount for good
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
