package sandbox

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"golang.org/x/sys/unix"
)

// errCgroupBusy says that a pod's cgroup still has processes or children.
var errCgroupBusy = errors.New("pod cgroup is in use")

// ownCgroup names the cgroup of a pod whose client named none: a folder below
// the configured parent, or with systemd a slice of that slice.
func (m *Manager) ownCgroup(id string) string {
	if !m.Host.SystemdCgroup {
		return path.Join("/", m.CgroupParent, "pod-"+id)
	}
	// systemd reads "a-b.slice" as b within a.
	base := path.Base(m.CgroupParent)
	return base[:len(base)-len(path.Ext(base))] + "-" + id + ".slice"
}

// checkCgroupParent refuses a parent that is meant for the other cgroup driver:
// kubelet and podshim have to agree on one (CRI RuntimeConfig).
func (m *Manager) checkCgroupParent(parent string) error {
	if parent == "" || strings.HasSuffix(path.Base(parent), ".slice") == m.Host.SystemdCgroup {
		return nil
	}
	const field = "linux.cgroup_parent"
	if m.Host.SystemdCgroup {
		return fmt.Errorf("%s: %q is no slice, and podshim's cgroup driver is systemd: set the client's cgroup driver to systemd: %w", field, parent, errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("%s: %q is a systemd slice, and podshim's cgroup driver is cgroupfs: set the client's cgroup driver to cgroupfs: %w", field, parent, errdefs.ErrInvalidArgument)
}

// cgroup is a pod's own cgroup.
func (m *Manager) cgroup(parent string) (cgroups.Manager, error) {
	cg := &cgroups.Cgroup{Path: parent, Resources: &cgroups.Resources{}}
	if m.Host.SystemdCgroup {
		cg = &cgroups.Cgroup{Name: path.Base(parent), Parent: "-.slice", Systemd: true, Resources: &cgroups.Resources{}}
	}
	cm, err := manager.New(cg)
	if err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", parent, err)
	}
	return cm, nil
}

// removeCgroup removes a pod's own cgroup; the gone is success.
func (m *Manager) removeCgroup(parent string) error {
	cm, err := m.cgroup(parent)
	if err != nil {
		return err
	}
	if err := cm.Destroy(); err != nil {
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("cgroup %s: %w: %w", parent, errCgroupBusy, err)
		}
		return fmt.Errorf("cgroup %s: %w", parent, err)
	}
	return nil
}
