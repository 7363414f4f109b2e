package cni

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// DefaultNetnsDir is where network namespaces are pinned: iproute2's own
// directory, so that `ip netns exec NAME` enters a pod.
const DefaultNetnsDir = "/run/netns"

// NewNetns makes a network namespace whose lo is up and pins it at path by a
// bind mount. It lives, with no process in it, until [Remove]. The directory of
// path is made a shared mount point of its own, as `ip netns add` does.
//
// Errors: errdefs.ErrAlreadyExists when path exists (a crash may have left it:
// Remove it first). On an error nothing is left at path.
func NewNetns(path string) (err error) {
	pin, err := newPin(path)
	if err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	defer func() { err = pin.settle(err) }()

	if err := inNewNetns(func(current string) error { return pin.bind(current) }); err != nil {
		return fmt.Errorf("make network namespace %s: %w", path, err)
	}
	return nil
}

// NewUserNetns makes a user namespace with the given ID mappings and a network
// namespace that it owns, so that root inside is root over that network, and
// pins them at userPath and netPath. Both are given back by [Remove].
//
// Errors: errdefs.ErrAlreadyExists when one of the paths exists,
// errdefs.ErrInvalidArgument without mappings. On an error nothing is left.
func NewUserNetns(userPath, netPath string, uids, gids []specs.LinuxIDMapping) (err error) {
	if len(uids) == 0 || len(gids) == 0 {
		return fmt.Errorf("make user namespace: no UID or no GID mapping: %w", errdefs.ErrInvalidArgument)
	}
	userPin, err := newPin(userPath)
	if err != nil {
		return fmt.Errorf("make user namespace: %w", err)
	}
	defer func() { err = userPin.settle(err) }()
	netPin, err := newPin(netPath)
	if err != nil {
		return fmt.Errorf("make network namespace: %w", err)
	}
	defer func() { err = netPin.settle(err) }()

	err = withStoppedChild(unix.CLONE_NEWUSER|unix.CLONE_NEWNET, uids, gids, func(pid int) error {
		if err := userPin.bind(fmt.Sprintf("/proc/%d/ns/user", pid)); err != nil {
			return err
		}
		return netPin.bind(fmt.Sprintf("/proc/%d/ns/net", pid))
	})
	if err != nil {
		return fmt.Errorf("make user namespace %s: %w", userPath, err)
	}
	return Do(netPath, loopbackUp)
}

// Remove unpins the namespace at path. The gone is success, and so is a plain
// file that a crash between create and mount has left. The kernel frees the
// namespace (in the background) once nothing else holds it.
func Remove(path string) error {
	// Someone may have mounted on top of our mount: take all of them.
	const most = 64
	for range most {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err == nil {
			continue
		}
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			break // not a mount point (any more), or not there
		}
		return fmt.Errorf("unpin namespace %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("remove namespace file: %w", err)
	}
	return nil
}

// List gives the paths in dir whose file names start with prefix, sorted;
// namespaces and the plain files that crashes leave alike. A missing dir holds
// none.
func List(dir, prefix string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list namespaces: %w", err)
	}
	var paths []string
	for _, e := range entries {
		if !e.IsDir() && strings.HasPrefix(e.Name(), prefix) {
			paths = append(paths, filepath.Join(dir, e.Name()))
		}
	}
	return paths, nil
}

// Do runs f on an OS thread that is in the network namespace at path; "" is the
// namespace the daemon itself is in. What f does on other goroutines happens
// outside. A thread that cannot go back is thrown away.
//
// Errors: errdefs.ErrNotFound when there is no namespace at path, f's own.
func Do(path string, f func() error) error {
	if path == "" {
		return f()
	}
	target, err := openNamespace(path)
	if err != nil {
		return err
	}
	defer unix.Close(target)
	return onThread(func() error {
		if err := unix.Setns(target, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return f()
	})
}

// isNamespace tells whether a namespace is pinned at path.
func isNamespace(path string) bool {
	fd, err := openNamespace(path)
	if err == nil {
		unix.Close(fd)
	}
	return err == nil
}

// openNamespace opens a pinned namespace; a path that holds something else than
// a namespace holds none.
func openNamespace(path string) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return -1, fmt.Errorf("no namespace at %s: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return -1, fmt.Errorf("open namespace %s: %w", path, err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("look at namespace %s: %w", path, err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		unix.Close(fd)
		return -1, fmt.Errorf("%s is no namespace: %w", path, errdefs.ErrNotFound)
	}
	return fd, nil
}

// onThread runs f on a thread of its own and brings the thread back to the
// network namespace it came from. If that cannot be done the thread dies with
// its goroutine, which ends without unlocking it (see runtime.LockOSThread):
// no other goroutine ever runs in the wrong namespace.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		defer unix.Close(home)
		// In a defer: a panic in f must not leave the caller waiting.
		result := errors.New("the function ended its goroutine")
		defer func() {
			if unix.Setns(home, unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread()
			}
			done <- result
		}()
		result = f()
	}()
	return <-done
}

// inNewNetns runs f in a network namespace that nobody else is in yet, with lo
// up. current is the path at which f finds the namespace.
func inNewNetns(f func(current string) error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := loopbackUp(); err != nil {
			return err
		}
		return f(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()))
	})
}

// loopbackUp sets lo up in the thread's network namespace; the kernel gives it
// 127.0.0.1 and ::1 by itself.
func loopbackUp() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	// In every network namespace lo is the first interface.
	lo := &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "lo", Index: 1}}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

// pin is a file at which a namespace is being bind-mounted.
type pin string

// newPin makes the empty file to mount on.
func newPin(path string) (pin, error) {
	if err := shareDir(filepath.Dir(path)); err != nil {
		return "", err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("%s exists: %w", path, errdefs.ErrAlreadyExists)
	}
	if err != nil {
		return "", err
	}
	return pin(path), f.Close()
}

func (p pin) bind(namespace string) error {
	if err := unix.Mount(namespace, string(p), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("pin %s at %s: %w", namespace, p, err)
	}
	return nil
}

// settle takes the pin away again when err says that the whole did not work.
func (p pin) settle(err error) error {
	if err == nil {
		return nil
	}
	return errors.Join(err, Remove(string(p)))
}

// sharing serialises this process's look at a directory's mounts; flock does
// so with `ip netns add`.
var sharing sync.Mutex

// shareDir makes dir a mount point with shared propagation. Without, a mount
// namespace made meanwhile (any container's, any `ip netns exec`) would keep a
// copy of each pinned namespace, and unpinning here would not free it.
func shareDir(dir string) error {
	sharing.Lock()
	defer sharing.Unlock()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	lock, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", dir, err)
	}
	if err = setPropagation(dir, unix.MS_SHARED); !errors.Is(err, unix.EINVAL) {
		return err // nil as a rule; EINVAL: not a mount point yet
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make %s a mount point: %w", dir, err)
	}
	// Private first: the new mount would else stay in its parent's peer group.
	return errors.Join(setPropagation(dir, unix.MS_PRIVATE), setPropagation(dir, unix.MS_SHARED))
}

func setPropagation(dir string, how uintptr) error {
	if err := unix.Mount("", dir, "", how, ""); err != nil {
		return fmt.Errorf("set mount propagation of %s: %w", dir, err)
	}
	return nil
}

// withStoppedChild clones a child with new namespaces, hands its PID to f, and
// kills it. No instruction of the child's program ever runs: a traced process
// stops at the end of execve(2), which is after its namespaces and ID mappings
// stand, so this executable serves as well as any.
func withStoppedChild(flags uintptr, uids, gids []specs.LinuxIDMapping, f func(pid int) error) error {
	// ptrace(2) belongs to a thread, and PR_SET_PDEATHSIG to the thread that
	// forked: stay on it to the end.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	child, err := os.StartProcess("/proc/self/exe", []string{"podshim-userns"}, &os.ProcAttr{
		Env: []string{},
		Sys: &syscall.SysProcAttr{
			Cloneflags:                 flags,
			UidMappings:                sysMappings(uids),
			GidMappings:                sysMappings(gids),
			GidMappingsEnableSetgroups: true,
			Ptrace:                     true,
			Pdeathsig:                  syscall.SIGKILL,
		},
	})
	if err != nil {
		return fmt.Errorf("clone child: %w", err)
	}
	ferr := f(child.Pid)
	if err := child.Kill(); err != nil {
		ferr = errors.Join(ferr, fmt.Errorf("kill child: %w", err))
	}
	return errors.Join(ferr, reap(child.Pid), child.Release())
}

// reap waits until the traced child is dead; its stop may be reported before.
func reap(pid int) error {
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(pid, &status, unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("wait for child: %w", err)
		}
		if status.Exited() || status.Signaled() {
			return nil
		}
	}
}

func sysMappings(maps []specs.LinuxIDMapping) []syscall.SysProcIDMap {
	out := make([]syscall.SysProcIDMap, 0, len(maps))
	for _, m := range maps {
		out = append(out, syscall.SysProcIDMap{
			ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size),
		})
	}
	return out
}
