package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/config"
)

// hierarchy is how cgroups are mounted on a machine.
type hierarchy struct {
	// unified is where cgroup v2 is mounted, "" if it is not.
	unified string
	// controllers maps each controller to the directory of its hierarchy.
	controllers map[string]string
	// v1 tells that controllers are those of cgroup v1.
	v1 bool
}

func cgroup(_ context.Context, cfg *config.Config) []Finding {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return []Finding{failure("layout", err.Error(), "no container can be bounded", "")}
	}
	h, err := readHierarchy(mounts)
	if err != nil {
		return []Finding{failure("layout", err.Error(), "no container can be bounded", "")}
	}
	findings := []Finding{h.layout()}
	findings = append(findings, h.judgeControllers()...)
	if len(h.controllers) > 0 {
		findings = append(findings, h.writable())
	}
	return append(findings, driver(cfg.Cgroup.Driver, "/"))
}

// readHierarchy finds out from the cgroup mounts who has the controllers.
func readHierarchy(mounts []*mountinfo.Info) (hierarchy, error) {
	h := hierarchy{controllers: map[string]string{}}
	for _, m := range mounts {
		if m.FSType == "cgroup2" {
			h.unified = m.Mountpoint
			continue
		}
		for name := range strings.SplitSeq(m.VFSOptions, ",") {
			// Super options are the controllers, among rw, xattr, name=systemd...
			if known := slices.Contains(allControllers, name); known {
				h.controllers[name], h.v1 = m.Mountpoint, true
			}
		}
	}
	if h.v1 || h.unified == "" {
		return h, nil
	}
	list, err := os.ReadFile(filepath.Join(h.unified, "cgroup.controllers"))
	if err != nil {
		return h, err
	}
	for _, name := range strings.Fields(string(list)) {
		h.controllers[name] = h.unified
	}
	return h, nil
}

var allControllers = []string{"cpu", "cpuacct", "cpuset", "memory", "devices", "freezer", "blkio", "pids", "hugetlb", "net_cls", "net_prio", "perf_event", "rdma", "misc"}

func (h hierarchy) layout() Finding {
	switch {
	case h.v1:
		found := "v1"
		if h.unified != "" {
			found = "hybrid: controllers on v1, v2 without controllers at " + h.unified
		}
		return warning("layout", found, "it works, but kubelet refuses cgroup v1 unless its configuration says failCgroupV1: false",
			"boot with systemd.unified_cgroup_hierarchy=1 (or cgroup_no_v1=all) to have cgroup v2")
	case h.unified != "":
		return ok("layout", "v2 at %s", h.unified)
	}
	return failure("layout", "no cgroup filesystem is mounted", "no container can be bounded",
		"mount -t cgroup2 none /sys/fs/cgroup")
}

func (h hierarchy) judgeControllers() []Finding {
	needed, wanted := []string{"cpu", "memory", "pids"}, []string{"cpuset", "io"}
	if h.v1 {
		needed, wanted = append(needed, "cpuacct", "devices", "freezer"), []string{"cpuset", "blkio"}
	}
	var have []string
	for name := range h.controllers {
		have = append(have, name)
	}
	slices.Sort(have)
	findings := []Finding{ok("controllers", "%s", strings.Join(have, ", "))}
	if missing := without(needed, h.controllers); len(missing) > 0 {
		findings[0] = failure("controllers", "missing: "+strings.Join(missing, ", "),
			"pods and containers cannot be bounded and counted",
			"look at /proc/cgroups, and for cgroup_disable= in /proc/cmdline")
	}
	if missing := without(wanted, h.controllers); len(missing) > 0 {
		findings = append(findings, warning("controllers", "missing: "+strings.Join(missing, ", "),
			"limits of these kinds are refused; kubelet wants cpuset",
			"look at /proc/cgroups, and for cgroup_disable= in /proc/cmdline"))
	}
	return findings
}

func without(names []string, have map[string]string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return have[n] != "" })
}

// writable says whether cgroups can be made: in a container without privileges
// the hierarchies are read-only.
func (h hierarchy) writable() Finding {
	var errs []error
	seen := map[string]bool{}
	for _, dir := range h.controllers {
		if seen[dir] {
			continue
		}
		seen[dir] = true
		if err := unix.Access(dir, unix.W_OK); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", dir, err))
		}
	}
	return need("writable", errors.Join(errs...), "cgroups of pods cannot be made",
		"run podshim as root of the host; in a container: privileged, with the host's /sys/fs/cgroup")
}

// driver says whether the completed configuration's driver fits the machine
// whose root directory is root.
func driver(name, root string) Finding {
	_, err := os.Stat(filepath.Join(root, "run/systemd/system"))
	booted := err == nil
	if name == config.DriverSystemd {
		if !booted {
			return failure("driver", "systemd, which is not the init here", "cgroups of pods cannot be made", "set cgroup.driver to auto or cgroupfs")
		}
		for _, socket := range []string{"run/systemd/private", "run/dbus/system_bus_socket"} {
			if _, err := os.Stat(filepath.Join(root, socket)); err == nil {
				return ok("driver", "systemd, by /%s", socket)
			}
		}
		return failure("driver", "systemd, but neither its private socket nor the system bus is there",
			"cgroups of pods cannot be made", "install dbus")
	}
	if booted {
		return warning("driver", "cgroupfs beside systemd", "two programs manage one hierarchy: systemd may move or remove what it does not know",
			"set cgroup.driver to auto or systemd")
	}
	return ok("driver", "cgroupfs")
}
