package stats

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// hierarchy reads the cgroups of one machine.
type hierarchy interface {
	// read measures the cgroup at an absolute path below the hierarchy's root.
	read(path string) (usage, error)
	// count reads the same cgroup's files for metrics.
	count(path string) (*counters, error)
}

// findHierarchy looks at what is mounted: cgroup2 at /sys/fs/cgroup is v2, else
// the v1 controllers count, as in libcontainer (the hybrid layout's cgroup2 at
// /sys/fs/cgroup/unified has no controllers).
func findHierarchy() (hierarchy, error) {
	const root = "/sys/fs/cgroup"
	var fs unix.Statfs_t
	if err := unix.Statfs(root, &fs); err != nil {
		return nil, fmt.Errorf("look at %s: %w: %w", root, err, errdefs.ErrFailedPrecondition)
	}
	if fs.Type == unix.CGROUP2_SUPER_MAGIC {
		return v2{root: root}, nil
	}
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	h := v1{
		cpu:     controllerMount(mounts, "cpu"),
		cpuacct: controllerMount(mounts, "cpuacct"),
		memory:  controllerMount(mounts, "memory"),
		pids:    controllerMount(mounts, "pids"),
		blkio:   controllerMount(mounts, "blkio"),
		unified: unifiedMount(mounts),
	}
	if h.cpuacct == "" && h.memory == "" && h.pids == "" {
		return nil, fmt.Errorf("%w: %w", errNoCgroups, errdefs.ErrFailedPrecondition)
	}
	return h, nil
}

// unifiedMount is where the hybrid layout has its cgroup2, "" if nowhere.
// libcontainer puts containers there as well, by the same path.
func unifiedMount(mounts []*mountinfo.Info) string {
	for _, m := range mounts {
		if m.FSType == "cgroup2" {
			return m.Mountpoint
		}
	}
	return ""
}

// controllerMount is where a v1 controller is mounted, "" if nowhere.
func controllerMount(mounts []*mountinfo.Info, controller string) string {
	for _, m := range mounts {
		if m.FSType == "cgroup" && slices.Contains(strings.Split(m.VFSOptions, ","), controller) {
			return m.Mountpoint
		}
	}
	return ""
}

// Cgroup translates the ways in which kubelet and the OCI spec name a cgroup to
// its path below the root of the hierarchy:
//
//   - "/kubepods/pod1/abc": that path (cgroupfs driver);
//   - "kubepods-pod1.slice:podshim:abc": the unit podshim-abc.scope in that
//     slice (systemd driver, libcontainer's form SLICE:PREFIX:NAME);
//   - "kubepods-pod1.slice": the slice (systemd driver, a pod's own cgroup).
//
// Errors: errdefs.ErrInvalidArgument for anything else.
func (c *Collector) Cgroup(name string) (string, error) {
	switch {
	case strings.HasPrefix(name, "/"):
		return path.Clean(name), nil
	case strings.Count(name, ":") == 2:
		parts := strings.Split(name, ":")
		slice := parts[0]
		if slice == "" {
			slice = "system.slice"
		}
		dir, err := slicePath(slice)
		if err != nil {
			return "", err
		}
		unit := parts[2]
		if !strings.HasSuffix(unit, ".slice") {
			unit = parts[1] + "-" + parts[2] + ".scope"
		}
		if strings.Contains(unit, "/") {
			return "", fmt.Errorf("cgroup %q: a unit has no slash: %w", name, errdefs.ErrInvalidArgument)
		}
		return path.Join(dir, unit), nil
	case strings.HasSuffix(name, ".slice"):
		return slicePath(name)
	}
	return "", fmt.Errorf("cgroup %q is neither a path from the root, nor SLICE:PREFIX:NAME, nor a slice: %w", name, errdefs.ErrInvalidArgument)
}

// slicePath is where systemd puts a slice: "a-b.slice" lies in "a.slice"
// (systemd.slice(5)); "-.slice" is the root.
func slicePath(slice string) (string, error) {
	name, ok := strings.CutSuffix(slice, ".slice")
	if name == "-" && ok {
		return "/", nil
	}
	parts := strings.Split(name, "-")
	if !ok || strings.Contains(name, "/") || slices.Contains(parts, "") {
		return "", fmt.Errorf("%q is no systemd slice: %w", slice, errdefs.ErrInvalidArgument)
	}
	dir := "/"
	for i := range parts {
		dir = path.Join(dir, strings.Join(parts[:i+1], "-")+".slice")
	}
	return dir, nil
}

// maxFile bounds one cgroup file. memory.stat, the longest, has about 2 KB.
const maxFile = 64 << 10

// readFile reads a kernel file into buf's spare room, or more if it must.
//
// Errors: errdefs.ErrNotFound when the file is not there, its cgroup was removed
// while it was open (ENODEV), or the kernel was told not to measure that
// (EOPNOTSUPP: PSI turned off).
func readFile(dir, name string, buf []byte) ([]byte, error) {
	return readUntil(dir, name, buf, func(n, _ int) bool { return n == 0 })
}

// readShown is readFile for a file whose content the kernel makes in one piece (a
// seq_show of kernfs, as all but the lists of processes have): a read that does not
// fill the buffer has all of it, and need not be followed by one that says so.
func readShown(dir, name string, buf []byte) ([]byte, error) {
	return readUntil(dir, name, buf, func(n, room int) bool { return n < room })
}

func readUntil(dir, name string, buf []byte, ended func(n, room int) bool) ([]byte, error) {
	file := filepath.Join(dir, name)
	fd, err := unix.Open(file, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fileError(file, err)
	}
	defer unix.Close(fd)
	buf = buf[:0]
	for {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, max(4096, cap(buf)))
		}
		room := cap(buf) - len(buf)
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, fileError(file, err)
		}
		if buf = buf[:len(buf)+n]; len(buf) > maxFile {
			return nil, fmt.Errorf("read %s: more than %d bytes", file, maxFile)
		}
		if ended(n, room) {
			return buf, nil
		}
	}
}

func fileError(file string, err error) error {
	for _, missing := range []error{unix.ENOENT, unix.ENODEV, unix.ENOTDIR, unix.EOPNOTSUPP} {
		if errors.Is(err, missing) {
			return fmt.Errorf("read %s: %w: %w", file, err, errdefs.ErrNotFound)
		}
	}
	return fmt.Errorf("read %s: %w", file, err)
}
