package container

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// takeHierarchies takes the mount of cgroup v1 at /sys/fs/cgroup out of a config, for podmon
// to make it when everything else is mounted (view.mount); nil when that is left to
// libcontainer.
//
// It is a tmpfs with one mount for each hierarchy, a dozen. libcontainer looks for the
// hierarchies in the mount table of the node, which has some lines for every pod, and mounts
// each with its defence against what an image may have put in the way: together a quarter of
// the time of a start. Nothing can be in the way in what has just been mounted.
func (c *Container) takeHierarchies(config *configs.Config) *configs.Mount {
	if !c.joins() || hasHooks(config) || config.MountLabel != "" || config.RootPropagation&unix.MS_SHARED != 0 ||
		config.Namespaces.Contains(configs.NEWUSER) || config.Namespaces.Contains(configs.NEWCGROUP) {
		return nil
	}
	at := slices.IndexFunc(config.Mounts, func(m *configs.Mount) bool { return m.Device == "cgroup" })
	if at < 0 || config.Mounts[at].Destination != cgroupRoot {
		return nil
	}
	sysfs := false
	for i, m := range config.Mounts {
		// What is mounted later may be above it or below.
		dest := path.Clean("/" + m.Destination)
		switch {
		case i < at && dest == "/sys":
			sysfs = m.Device == "sysfs"
		case i != at && (within(cgroupRoot, dest) && dest != "/" || within(dest, cgroupRoot)):
			return nil
		}
	}
	for _, p := range slices.Concat(config.MaskPaths, config.ReadonlyPaths) {
		if within(path.Clean(p), cgroupRoot) || within(cgroupRoot, path.Clean(p)) {
			return nil
		}
	}
	if !sysfs || len(hierarchies()) == 0 {
		return nil
	}
	m := config.Mounts[at]
	config.Mounts = slices.Delete(slices.Clone(config.Mounts), at, at+1)
	return m
}

// within tells whether a clean path is dir or below it.
func within(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

// hierarchies are the node's, as libcontainer finds them; none where they are not where they
// are expected, or not all that is needed here can be done (before Linux 5.12, or under a
// seccomp filter around podmon). They are looked for once: a hierarchy that is mounted later
// has no cgroup of podmon's making.
var hierarchies = sync.OnceValue(func() []hierarchy {
	all, err := cgroups.GetCgroupMounts(false)
	if err != nil || len(all) == 0 {
		return nil
	}
	for _, h := range all {
		if filepath.Dir(h.Mountpoint) != cgroupRoot {
			return nil
		}
	}
	top, err := newTmpfs()
	if err != nil {
		return nil
	}
	defer unix.Close(top)
	fd, err := cloneMount(all[0].Mountpoint, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	if err != nil {
		return nil
	}
	unix.Close(fd)
	found := make([]hierarchy, len(all))
	for i, h := range all {
		found[i] = hierarchy{h}
	}
	return found
})

// hierarchy is one of them, as it is mounted on the node.
type hierarchy struct{ cgroups.Mount }

// cloneMount makes a mount like that of the directory, nowhere yet.
func cloneMount(dir string, attr *unix.MountAttr) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("clone mount %s: %w", dir, err)
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, attr); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("set attributes of %s: %w", dir, err)
	}
	return fd, nil
}

// view is that mount, nowhere yet, with the container's cgroup of each hierarchy.
type view struct {
	top   int // of a tmpfs
	trees []tree
}

// newView prepares it for cgroups that are there, beside the first steps of the container's
// process. paths are keyed as cgroups.Manager has them.
func newView(m *configs.Mount, paths map[string]string) (_ *view, err error) {
	v := &view{}
	if v.top, err = newTmpfs(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			v.close()
		}
	}()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, Propagation: unix.MS_PRIVATE}
	if m.Flags&unix.MS_RDONLY != 0 {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	own, err := cgroups.ParseCgroupFile("/proc/self/cgroup") // where it has none, it is in podmon's
	if err != nil {
		return nil, err
	}
	for _, h := range hierarchies() {
		dir, err := h.directory(paths, own)
		if err != nil {
			return nil, err
		}
		fd, err := cloneMount(dir, &attr)
		if err != nil {
			return nil, err
		}
		v.trees = append(v.trees, tree{filepath.Base(h.Mountpoint), fd})
	}
	for _, t := range v.trees {
		if err := unix.Mkdirat(v.top, t.name, 0o755); err != nil {
			return nil, fmt.Errorf("make %s in tmpfs: %w", t.name, err)
		}
		if !strings.Contains(t.name, ",") {
			continue
		}
		for alias := range strings.SplitSeq(t.name, ",") {
			if err := unix.Symlinkat(t.name, v.top, alias); err != nil && !errors.Is(err, unix.EEXIST) {
				return nil, fmt.Errorf("make link %s in tmpfs: %w", alias, err)
			}
		}
	}
	return v, nil
}

func (v *view) close() {
	unix.Close(v.top)
	for _, t := range v.trees {
		unix.Close(t.fd)
	}
}

// directory is the container's cgroup in the hierarchy.
func (h hierarchy) directory(paths, own map[string]string) (string, error) {
	for _, subsystem := range h.Subsystems { // a named one has lost its prefix
		for _, key := range []string{subsystem, cgroups.CgroupNamePrefix + subsystem} {
			if dir, ok := paths[key]; ok {
				return dir, nil
			}
		}
	}
	dir, err := h.GetOwnCgroup(own)
	if err != nil {
		return "", err
	}
	rel, err := filepath.Rel(h.Root, dir)
	if err != nil {
		return "", err
	}
	return filepath.Join(h.Mountpoint, rel), nil
}

// mount mounts it on the sysfs of a container whose program is not executed yet.
func (v *view) mount(process initProcess) error {
	pid, err := process.Pid()
	if err != nil {
		return err
	}
	covered, err := sysfsCovered(pid)
	if err == nil && !covered {
		err = inMountNamespace(pid, v.attach)
	}
	if err != nil {
		return fmt.Errorf("mount cgroups: %w", err)
	}
	return nil
}

// sysfsCovered tells whether there is something else above or below /sys/fs/cgroup than the
// sysfs at /sys. A volume gets there where the image, or another volume, has a symbolic
// link in the volume's path; it would hide what is mounted before it. The kernel says so:
// to look at the path itself could be to wait for a volume's server.
func sysfsCovered(pid int) (bool, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return false, err
	}
	defer f.Close()
	all, err := mountinfo.GetMountsFromReader(f, func(i *mountinfo.Info) (skip, stop bool) {
		return i.Mountpoint == "/" || !within(cgroupRoot, i.Mountpoint) && !within(i.Mountpoint, cgroupRoot), false
	})
	if err != nil {
		return false, err
	}
	return len(all) != 1 || all[0].Mountpoint != "/sys" || all[0].FSType != "sysfs", nil
}

// tree is a mount that is nowhere yet.
type tree struct {
	name string
	fd   int
}

func newTmpfs() (int, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err == nil {
		defer unix.Close(fs)
		err = errors.Join(
			unix.FsconfigSetString(fs, "source", "tmpfs"), unix.FsconfigSetString(fs, "mode", "755"), unix.FsconfigCreate(fs))
	}
	var fd int
	if err == nil {
		fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	}
	if err != nil {
		return -1, fmt.Errorf("make tmpfs: %w", err)
	}
	return fd, nil
}

// attach puts it where it belongs, in the mount namespace of the thread.
func (v *view) attach() error {
	at, err := unix.Openat2(unix.AT_FDCWD, cgroupRoot, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return &os.PathError{Op: "open", Path: cgroupRoot, Err: err}
	}
	defer unix.Close(at)
	const both = unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_EMPTY_PATH
	if err := unix.MoveMount(v.top, "", at, "", both); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", cgroupRoot, err)
	}
	for _, t := range v.trees {
		if err := unix.MoveMount(t.fd, "", v.top, t.name, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("mount %s/%s: %w", cgroupRoot, t.name, err)
		}
	}
	return nil
}

// inMountNamespace runs f on a thread in the process's mount namespace, at its root. The
// thread ends with it.
func inMountNamespace(pid int, f func() error) error {
	name := fmt.Sprintf("/proc/%d/ns/mnt", pid)
	ns, err := os.Open(name)
	if err != nil {
		return err
	}
	defer ns.Close()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good
		err := unix.Unshare(unix.CLONE_FS)
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS)
		}
		if err != nil {
			done <- fmt.Errorf("join %s: %w", name, err)
			return
		}
		done <- f()
	}()
	return <-done
}
