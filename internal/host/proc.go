package host

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// ForgetProc has the kernel drop the entries of /proc that it has cached and that nobody holds open.
// What is looked up again is made again, in microseconds.
//
// It is for /proc/sys/net: in each network namespace other directories "ipv4" and "ipv6" are seen
// there, but all of them are entries of one name in one parent, and so in one hash chain of the dentry
// cache, the newest first (proc_sys_compare in fs/proc/proc_sysctl.c). With 400 pods, whose entries are
// no longer in the processor's caches, looking up a path of the node's below them took 0.4 to 0.8 ms
// where it had been 0.02, and a CNI plugin looks up five.
//
// A change of the file system's options that changes none has its unused entries dropped
// (reconfigure_super in fs/super.c, shrink_dcache_sb in fs/dcache.c), those of processes too. It takes
// the longer the more there are, and cannot be cut short. It is EPERM in a user namespace.
func ForgetProc() error {
	const at = "/proc"
	var fs unix.Statfs_t
	if err := unix.Statfs(at, &fs); err != nil {
		return fmt.Errorf("statfs %s: %w", at, err)
	}
	if fs.Type != unix.PROC_SUPER_MAGIC {
		return fmt.Errorf("%s is no procfs", at)
	}
	fd, err := unix.Fspick(unix.AT_FDCWD, at, unix.FSPICK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fspick %s: %w", at, err)
	}
	defer unix.Close(fd)
	if err := unix.FsconfigReconfigure(fd); err != nil {
		return fmt.Errorf("reconfigure %s: %w", at, err)
	}
	return nil
}
