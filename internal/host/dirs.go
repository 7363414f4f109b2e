package host

import (
	"fmt"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// PrivateDir makes a directory that nobody but root gets through: what lies below
// may hold setuid programs and secrets of a container, and must not be had from
// the host by others (CVE-2021-41103). The group of a user namespace's root
// (gids, nil without one) gets through as well, since that root has to.
func PrivateDir(path string, gids []specs.LinuxIDMapping) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	for _, id := range gids {
		if id.ContainerID != 0 {
			continue
		}
		if err := os.Chown(path, 0, int(id.HostID)); err != nil {
			return err
		}
		if err := os.Chmod(path, 0o710); err != nil {
			return fmt.Errorf("open %s to the user namespace: %w", path, err)
		}
	}
	return nil
}

// topDir is FS_TOPDIR_FL (include/uapi/linux/fs.h, chattr +T).
const topDir = 0x00020000

// Spread tells the file system that what is made in dir has nothing to do with each other: one
// container's files are near their own and far from the others'. ext4 takes the hint (the Orlov
// allocator, fs/ext4/ialloc.c); others need none, so there is no error.
//
// Without it all containers of a node are made in the same few block groups. A new file then has
// to be found a place among those that another container has just left, and ext4 without a journal
// takes none of these for a minute or more (recently_deleted): milliseconds for a container.
func Spread(dir string) {
	f, err := os.Open(dir)
	if err != nil {
		return
	}
	defer f.Close()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil || fs.Type != unix.EXT4_SUPER_MAGIC {
		return
	}
	flags, err := unix.IoctlGetInt(int(f.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil || flags&topDir != 0 {
		return
	}
	_ = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, flags|topDir)
}
