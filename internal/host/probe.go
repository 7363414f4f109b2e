package host

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// probeRRO makes a detached copy of a mount recursively read-only. Nobody sees
// the copy, and it is gone with its descriptor.
func probeRRO() error {
	tree, err := detached("/proc/self")
	if err != nil {
		return err
	}
	defer tree.Close()
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
	if err := unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, attr); err != nil {
		return fmt.Errorf("mount_setattr (Linux 5.12 has it): %w", err)
	}
	return nil
}

// probeIDMap id-maps a detached copy of the mount that dir is on, which tells
// of the kernel and of the file system at once.
func probeIDMap(dir string) error {
	_, err := IDMappable(dir)
	return err
}

// IDMappable tries to id-map a private copy of the mount at each of the paths. The
// error, an ErrFailedPrecondition, is that of path i, the first that cannot be.
func IDMappable(paths ...string) (i int, err error) {
	if len(paths) == 0 {
		return 0, nil
	}
	userns, err := mappedUserns()
	if err != nil {
		return 0, fmt.Errorf("make user namespace: %w", err)
	}
	defer userns.Close()
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())}
	for i, path := range paths {
		tree, err := detached(path)
		if err != nil {
			return i, err
		}
		err = unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH, attr)
		_ = tree.Close() // the copy goes with it
		if err != nil {
			return i, fmt.Errorf("mounts of %s cannot be id-mapped (%w): its file system, or this kernel, does not know how: %w", path, err, errdefs.ErrFailedPrecondition)
		}
	}
	return 0, nil
}

// detached is a private copy of the mount at path.
func detached(path string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("open_tree %s (Linux 5.2 and CAP_SYS_ADMIN have it): %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// mappedUserns is a user namespace with a mapping. It takes a process to make
// one: a child that is stopped by ptrace at its first instruction, so that it
// never runs, and killed as soon as its namespace is open.
func mappedUserns() (_ *os.File, err error) {
	// The tracer is a thread, and Pdeathsig means its death too.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 65536, Size: 65536}}
	child := exec.Command("/proc/self/exe")
	child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: ids, GidMappings: ids,
		Ptrace: true, Pdeathsig: syscall.SIGKILL,
	}
	if err := child.Start(); err != nil {
		return nil, err
	}
	defer func() {
		_ = child.Process.Kill()
		_ = child.Wait() // always "signal: killed"
	}()
	return os.Open(fmt.Sprintf("/proc/%d/ns/user", child.Process.Pid))
}
