package stage

import (
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

var (
	emptying sync.Mutex
	empty    *os.File
)

// Empty is a mount namespace in which there is nothing but a directory for a root to be
// mounted on. It is made once.
func Empty() (*os.File, error) {
	emptying.Lock()
	defer emptying.Unlock()
	if empty != nil {
		return empty, nil
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the function
		var err error
		empty, err = makeEmpty()
		done <- err
	}()
	if err := <-done; err != nil {
		empty = nil
		return nil, fmt.Errorf("make the empty mount namespace: %w", err)
	}
	return empty, nil
}

// makeEmpty moves the thread into it.
func makeEmpty() (ns *os.File, err error) {
	if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS); err != nil {
		return nil, err
	}
	if ns, err = os.Open("/proc/thread-self/ns/mnt"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			ns.Close()
		}
	}()
	const at = "/proc" // any directory that is there
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("make all mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755,size=64k"); err != nil {
		return nil, fmt.Errorf("mount tmpfs: %w", err)
	}
	if err := os.Mkdir(at+"/root", 0o755); err != nil {
		return nil, err
	}
	if err := unix.Chdir(at); err != nil {
		return nil, err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return nil, fmt.Errorf("change the root: %w", err)
	}
	return ns, unix.Unmount(".", unix.MNT_DETACH)
}
