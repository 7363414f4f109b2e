package host

import "golang.org/x/sys/unix"

// ForgetProc has the kernel drop the entries of /proc that it has cached and that nobody holds open.
//
// /proc/sys/net is another one in each network namespace, but "ipv4" and "ipv6" of all of them are
// entries of one name in one parent, and so in one hash chain of the dentry cache, the newest first
// (proc_sys_compare in fs/proc/proc_sysctl.c). With 400 pods each path below them, the node's own above
// all, takes up to a millisecond, and a CNI plugin looks up half a dozen. A change of the file system's
// options that changes none has its unused entries dropped (reconfigure_super in fs/super.c); what is
// looked up again is made again, in microseconds.
//
// It is only advice, so there is no error: before Linux 5.2, or in a user namespace, it is not done.
func ForgetProc() {
	const at = "/proc"
	var fs unix.Statfs_t
	if unix.Statfs(at, &fs) != nil || fs.Type != unix.PROC_SUPER_MAGIC {
		return
	}
	fd, err := unix.Fspick(unix.AT_FDCWD, at, unix.FSPICK_CLOEXEC)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	_ = unix.FsconfigReconfigure(fd)
}
