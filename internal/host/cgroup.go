package host

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// The cgroup drivers, by the names kubelet uses.
const (
	DriverCgroupfs = "cgroupfs"
	DriverSystemd  = "systemd"
)

func (r *reader) cgroups(driver string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &fs); err != nil {
		return fmt.Errorf("%w: %w", errNoCgroups, err)
	}
	r.host.CgroupV2 = fs.Type == unix.CGROUP2_SUPER_MAGIC
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return fmt.Errorf("read mounts: %w", err)
	}
	if len(mounts) == 0 {
		return errNoCgroups
	}
	why := "cgroup2 is mounted at " + cgroupRoot
	if !r.host.CgroupV2 {
		why = "the controllers are mounted as cgroup v1"
	}
	r.say("CgroupV2", r.host.CgroupV2, "%s", why)
	if err := r.driver(driver); err != nil {
		return err
	}
	r.mountOptions(mounts)
	r.swap(mounts)
	r.hugepages(mounts)
	return nil
}

// driver follows kubelet's default: systemd where systemd manages a v2 tree
// (two managers of one tree undo each other's work), cgroupfs elsewhere.
func (r *reader) driver(want string) error {
	// The test of sd_booted(3): the directory exists early in boot and only
	// under systemd as PID 1.
	_, err := os.Lstat("/run/systemd/system")
	booted := err == nil
	switch want {
	case DriverCgroupfs:
		r.say("SystemdCgroup", false, "configured")
	case DriverSystemd:
		if !booted {
			return fmt.Errorf("cgroup driver systemd: PID 1 is not systemd; set cgroup.driver to \"cgroupfs\", and kubelet's cgroupDriver with it: %w", errdefs.ErrFailedPrecondition)
		}
		r.host.SystemdCgroup = true
		r.say("SystemdCgroup", true, "configured")
	case "":
		r.host.SystemdCgroup = booted && r.host.CgroupV2
		why := "systemd manages the cgroup2 tree"
		if !booted {
			why = "PID 1 is not systemd"
		} else if !r.host.CgroupV2 {
			why = "cgroup v1"
		}
		r.say("SystemdCgroup", r.host.SystemdCgroup, "%s", why)
	default:
		return fmt.Errorf("cgroup driver %q is not %s or %s: %w", want, DriverCgroupfs, DriverSystemd, errdefs.ErrInvalidArgument)
	}
	return nil
}

// mountOptions keeps what a container's mount of the shared cgroup2 superblock
// must repeat, or the host loses it.
func (r *reader) mountOptions(mounts []*mountinfo.Info) {
	for _, m := range mounts {
		if m.Mountpoint != cgroupRoot || m.FSType != "cgroup2" {
			continue
		}
		for o := range strings.SplitSeq(m.VFSOptions, ",") {
			if o == "nsdelegate" || o == "memory_recursiveprot" {
				r.host.CgroupMountOptions = append(r.host.CgroupMountOptions, o)
			}
		}
	}
	r.say("CgroupMountOptions", strings.Join(r.host.CgroupMountOptions, ","), "of cgroup2 at %s", cgroupRoot)
}

// controllerMount is where a v1 controller is mounted, empty without it.
func controllerMount(mounts []*mountinfo.Info, controller string) string {
	for _, m := range mounts {
		if m.FSType == "cgroup" && slices.Contains(strings.Split(m.VFSOptions, ","), controller) {
			return m.Mountpoint
		}
	}
	return ""
}

// swap: v1 has the file in its root when swap accounting is on, v2 in every
// cgroup but the root.
func (r *reader) swap(mounts []*mountinfo.Info) {
	file := filepath.Join(controllerMount(mounts, "memory"), "memory.memsw.limit_in_bytes")
	if r.host.CgroupV2 {
		found, _ := filepath.Glob(filepath.Join(cgroupRoot, "*", "memory.swap.max"))
		file = filepath.Join(cgroupRoot, "*", "memory.swap.max")
		if len(found) > 0 {
			file = found[0]
		}
	}
	_, err := os.Stat(file)
	r.host.Swap = err == nil
	r.say("Swap", r.host.Swap, "%s", because(err, file))
}

func (r *reader) hugepages(mounts []*mountinfo.Info) {
	r.host.Hugetlb = controllerMount(mounts, "hugetlb") != ""
	if r.host.CgroupV2 {
		controllers, _ := os.ReadFile(filepath.Join(cgroupRoot, "cgroup.controllers"))
		r.host.Hugetlb = slices.Contains(strings.Fields(string(controllers)), "hugetlb")
	}
	why := "containers' huge pages are limited"
	if !r.host.Hugetlb {
		why = "the controller is missing: containers' huge pages are not limited"
	}
	r.say("Hugetlb", r.host.Hugetlb, "%s", why)
	dirs, err := filepath.Glob("/sys/kernel/mm/hugepages/hugepages-*kB")
	for _, dir := range dirs {
		if size, ok := pageSize(filepath.Base(dir)); ok {
			r.host.HugepageSizes = append(r.host.HugepageSizes, size)
		}
	}
	r.say("HugepageSizes", strings.Join(r.host.HugepageSizes, ","), "%s", because(err, "/sys/kernel/mm/hugepages"))
}

// pageSize turns "hugepages-2048kB" into the "2MB" of hugetlb's file names
// (hugetlb_cgroup.c, mem_fmt).
func pageSize(name string) (string, bool) {
	digits := strings.TrimSuffix(strings.TrimPrefix(name, "hugepages-"), "kB")
	kb, err := strconv.ParseUint(digits, 10, 64)
	switch {
	case err != nil:
		return "", false
	case kb >= 1<<20:
		return fmt.Sprintf("%dGB", kb>>20), true
	case kb >= 1<<10:
		return fmt.Sprintf("%dMB", kb>>10), true
	}
	return fmt.Sprintf("%dKB", kb), true
}
