package harness

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/cgroups/systemd"
	"golang.org/x/sys/unix"
)

// Systemd tells that the nodes use the systemd cgroup driver, as on most of the
// machines there are; the usual one here is cgroupfs. The environment variable
// PODSHIM_TEST_CGROUP_DRIVER says which.
var Systemd = os.Getenv("PODSHIM_TEST_CGROUP_DRIVER") == "systemd"

// CgroupPath is where a cgroup parent as CRI names it lies below a hierarchy's
// root: a path is itself, a slice is below the slices in its name.
func CgroupPath(parent string) string {
	if !strings.HasSuffix(parent, ".slice") {
		return parent
	}
	dir, err := systemd.ExpandSlice(filepath.Base(parent))
	if err != nil {
		return parent
	}
	return dir
}

// cgroup names a cgroup of the node below another one of it, or below the node's
// own for "": what a client gives as cgroup parent.
func (d *daemon) cgroup(above, name string) string {
	if !Systemd {
		return filepath.Join("/", d.Name, strings.TrimPrefix(above, "/"+d.Name), name)
	}
	if above == "" {
		above = d.Name + ".slice"
	}
	return strings.TrimSuffix(above, ".slice") + "-" + name + ".slice"
}

// cgroupTops are the directories that hold all cgroups of the node.
func (d *daemon) cgroupTops() []string {
	var tops []string
	for _, h := range hierarchies() {
		tops = append(tops, filepath.Join(h.root, d.Name))
		if Systemd {
			tops = append(tops, filepath.Join(h.root, CgroupPath(d.Name+".slice")))
		}
	}
	return tops
}

// PodCgroup makes a cgroup for a pod, as kubelet does before it asks for the
// sandbox. It goes with the test.
func (n *Node) PodCgroup(name string) (parent string) {
	n.t.Helper()
	parent = n.cgroup(n.PodsCgroup, "pod"+strings.NewReplacer("-", "_", "/", "_").Replace(name))
	if err := MakeCgroup(parent); err != nil {
		n.t.Fatalf("make a pod's cgroup: %v", err)
	}
	n.t.Cleanup(func() {
		if err := RemoveCgroup(parent); err != nil {
			n.t.Errorf("remove the pod's cgroup: %v", err)
		}
	})
	return parent
}

// slice is a systemd slice, for cgroups' own systemd driver.
func slice(name string) (cgroups.Manager, error) {
	return manager.New(&cgroups.Cgroup{Name: name, Systemd: true, Resources: &cgroups.Resources{}})
}

// hierarchy is one mounted cgroup filesystem.
type hierarchy struct {
	root string
	// controllers are the v1 controllers; empty on v2 and for name=systemd.
	controllers []string
	v2          bool
}

// hierarchies reads which cgroup filesystems this machine has.
func hierarchies() []hierarchy {
	data, _ := os.ReadFile("/proc/self/mountinfo")
	var found []hierarchy
	for _, m := range parseMounts(string(data)) {
		switch m.Type {
		case "cgroup2":
			found = append(found, hierarchy{root: m.Point, v2: true})
		case "cgroup":
			found = append(found, hierarchy{root: m.Point, controllers: m.Super})
		}
	}
	return found
}

// CgroupV2 tells whether the controllers are in the unified hierarchy.
func CgroupV2() bool {
	var st unix.Statfs_t
	return unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// unifiedRoot is where cgroup2 is mounted, with controllers or without.
func unifiedRoot() (string, error) {
	for _, h := range hierarchies() {
		if h.v2 {
			return h.root, nil
		}
	}
	return "", errors.New("no cgroup2 is mounted")
}

// MakeCgroup makes a cgroup in every hierarchy, the way kubelet makes the
// cgroup of a pod before it asks for the sandbox. The path starts at the
// hierarchy's root; a slice is asked of systemd.
func MakeCgroup(path string) error {
	if strings.HasSuffix(path, ".slice") {
		m, err := slice(path)
		if err != nil {
			return err
		}
		return m.Apply(-1)
	}
	for _, h := range hierarchies() {
		if err := makeCgroupIn(h, path); err != nil {
			return fmt.Errorf("make cgroup %s in %s: %w", path, h.root, err)
		}
	}
	return nil
}

func makeCgroupIn(h hierarchy, path string) error {
	dir := h.root
	for _, name := range strings.Split(strings.Trim(path, "/"), "/") {
		parent := dir
		dir = filepath.Join(dir, name)
		if h.v2 {
			enableControllers(parent)
		}
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := inheritCpuset(parent, dir); err != nil {
			return err
		}
	}
	return nil
}

// enableControllers hands every controller down one level. One that cannot be
// handed down (the cpu controller beside real-time processes) is left out.
func enableControllers(dir string) {
	list, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	for _, name := range strings.Fields(string(list)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+name), 0)
	}
}

// inheritCpuset fills in what a new cpuset v1 cgroup lacks: it starts empty and
// takes no process before it has CPUs and memory nodes.
func inheritCpuset(parent, dir string) error {
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		have, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil || strings.TrimSpace(string(have)) != "" {
			continue
		}
		above, err := os.ReadFile(filepath.Join(parent, file))
		if err != nil || len(strings.TrimSpace(string(above))) == 0 {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, file), above, 0); err != nil {
			return err
		}
	}
	return nil
}

// RemoveCgroup removes a cgroup and those below it from every hierarchy.
// Processes in it make it fail; a cgroup that is not there is success.
func RemoveCgroup(path string) error {
	if strings.HasSuffix(path, ".slice") {
		m, err := slice(path)
		if err != nil {
			return err
		}
		return m.Destroy()
	}
	var errs []error
	for _, h := range hierarchies() {
		dirs := cgroupsBelow(filepath.Join(h.root, path))
		for i := len(dirs) - 1; i >= 0; i-- {
			if err := os.Remove(dirs[i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// CgroupDirs are the directories of a cgroup, in each hierarchy that has it.
func CgroupDirs(path string) []string {
	var dirs []string
	for _, h := range hierarchies() {
		if dir := filepath.Join(h.root, path); isDir(dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}

// cgroupsBelow lists dir and the directories below it, parents first.
func cgroupsBelow(dir string) []string {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return fs.SkipDir
		}
		if e.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	return dirs
}

// CgroupDir is the directory of the process's cgroup for a controller; on v2
// the controller does not matter.
func (p Process) CgroupDir(controller string) (string, error) {
	for line := range strings.Lines(p.Cgroup) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		if CgroupV2() && parts[0] == "0" {
			return filepath.Join("/sys/fs/cgroup", parts[2]), nil
		}
		for _, name := range strings.Split(parts[1], ",") {
			if name == controller && name != "" {
				return filepath.Join(controllerRoot(name), parts[2]), nil
			}
		}
	}
	return "", fmt.Errorf("%v has no cgroup of controller %s", p, controller)
}

func controllerRoot(controller string) string {
	for _, h := range hierarchies() {
		for _, name := range h.controllers {
			if name == controller {
				return h.root
			}
		}
	}
	return "/sys/fs/cgroup/" + controller
}

// CgroupValue reads a file of the process's cgroup, blanks around cut off. v1
// and v2 name the file; on v1 the part before the first dot is the controller
// (cpu,cpuacct files too).
func (p Process) CgroupValue(v1, v2 string) (string, error) {
	file := v1
	if CgroupV2() {
		file = v2
	}
	controller, _, _ := strings.Cut(v1, ".")
	dir, err := p.CgroupDir(controller)
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(filepath.Join(dir, file))
	return strings.TrimSpace(string(data)), err
}

// CountDisk has the kernel count, for every cgroup, what is done on the disk that a
// path is on, and returns the disk's number, "MAJOR:MINOR". On cgroup v1, and since
// Linux 6.10, it counts from the first limit of that disk on (blk_throtl_init): one
// that holds nothing up is set and taken away.
func (n *Node) CountDisk(path string) string {
	n.t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		n.t.Fatalf("disk of %s: %v", path, err)
	}
	disk := fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))
	if CgroupV2() {
		return disk
	}
	file := filepath.Join(controllerRoot("blkio"), n.Name, "blkio.throttle.read_bps_device")
	for _, limit := range []string{" 1099511627776", " 0"} {
		if err := os.WriteFile(file, []byte(disk+limit), 0); err != nil {
			n.t.Fatalf("limit of disk %s, for it to be counted: %v", disk, err)
		}
	}
	return disk
}
