package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// topDir is FS_TOPDIR_FL (include/uapi/linux/fs.h; chattr's T).
const topDir = 0x00020000

// Spread has ext4 without a journal look for a new place for each directory that is made in dir, in
// a block group that has few. Else it is put beside its parent, and all containers of a node, or all
// layers of an image, are in the same few groups. Without a journal ext4 takes no inode that was
// deleted within the last minute, or six minutes until it is written, and for every new file passes
// by all of those first (recently_deleted in fs/ext4/ialloc.c): with pods that come and go, a third of
// CreateContainer.
//
// With a journal it does not, and directories side by side touch fewer groups on a cold disk: those
// and other file systems are left as they are. It is only advice, so there is no error.
func Spread(dir string) {
	f, err := os.Open(dir)
	if err != nil {
		return
	}
	defer f.Close()
	fd := int(f.Fd())
	if !unjournalled(fd) {
		return
	}
	if flags, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS); err == nil && flags&topDir == 0 {
		_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(flags|topDir))
	}
}

// unjournalled tells of ext4 that says that it has no journal (since Linux 5.1).
func unjournalled(fd int) bool {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if unix.Fstatfs(fd, &fs) != nil || fs.Type != unix.EXT4_SUPER_MAGIC || unix.Fstat(fd, &st) != nil {
		return false
	}
	device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return false
	}
	task, err := os.ReadFile(filepath.Join("/sys/fs/ext4", filepath.Base(device), "journal_task"))
	return err == nil && strings.TrimSpace(string(task)) == "<none>"
}
