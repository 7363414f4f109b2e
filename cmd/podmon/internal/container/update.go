package container

import (
	"errors"
	"fmt"

	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// Update changes the limits that r sets, and with adj the processes'
// oom_score_adj, and leaves the others as they are. Devices are never touched. An
// error has changed nothing.
func (c *Container) Update(r *specs.LinuxResources, adj *int) error {
	if r == nil {
		return wire.Errorf(wire.ClassInvalid, "update: no resources")
	}
	asked := *r
	asked.Devices = nil
	parsed, err := specconv.CreateCgroupConfig(&specconv.CreateOpts{
		CgroupName: c.ID,
		Spec:       &specs.Spec{Linux: &specs.Linux{Resources: &asked}},
	}, nil)
	if err != nil {
		return wire.Errorf(wire.ClassInvalid, "update: %w", err)
	}
	c.life.Lock()
	defer c.life.Unlock()
	if c.lc == nil {
		return wire.Errorf(wire.ClassNotFound, "update: container %s has exited", c.ID)
	}
	c.showCgroups()
	defer func() { clear(c.hidden) }()
	config := c.lc.Config()
	cgroup := *config.Cgroups
	before := *cgroup.Resources
	resources := before
	cgroup.Resources = &resources
	config.Cgroups = &cgroup
	from := parsed.Resources

	if m := r.Memory; m != nil {
		if m.Limit != nil {
			resources.Memory = from.Memory
		}
		if m.Reservation != nil {
			resources.MemoryReservation = from.MemoryReservation
		}
		if m.Swap != nil {
			resources.MemorySwap = from.MemorySwap
		}
	}
	if cpu := r.CPU; cpu != nil {
		if cpu.Shares != nil {
			resources.CpuShares, resources.CpuWeight = from.CpuShares, from.CpuWeight
		}
		if cpu.Quota != nil {
			resources.CpuQuota = from.CpuQuota
		}
		if cpu.Period != nil {
			resources.CpuPeriod = from.CpuPeriod
		}
		if cpu.Burst != nil {
			resources.CpuBurst = from.CpuBurst
		}
		if cpu.Idle != nil {
			resources.CPUIdle = from.CPUIdle
		}
		if cpu.Cpus != "" {
			resources.CpusetCpus = from.CpusetCpus
		}
		if cpu.Mems != "" {
			resources.CpusetMems = from.CpusetMems
		}
	}
	if r.Pids != nil && r.Pids.Limit != nil {
		resources.PidsLimit = from.PidsLimit
	}
	if len(r.HugepageLimits) > 0 {
		resources.HugetlbLimit = from.HugetlbLimit
	}
	if len(r.Unified) > 0 {
		resources.Unified = from.Unified
	}
	if resources.Memory != before.Memory {
		if err := checkShrink(c.cgroup.Path(""), resources.Memory); err != nil {
			return err
		}
	}
	score := 0
	if adj != nil {
		if score, err = c.setOOMScore(*adj); err != nil {
			return err
		}
	}
	files := c.save(r)
	resources.SkipDevices = true
	err = c.lc.Set(config)
	if err != nil {
		cgroup.Resources = undo(before, &resources)
		back := errors.Join(c.lc.Set(config), files.restore())
		if adj != nil {
			_, oomErr := c.setOOMScore(score)
			back = errors.Join(back, oomErr)
		}
		if back != nil {
			c.log().WithError(back).Error("limits that were refused are not all taken back")
		}
	}
	// libcontainer starts nothing in a container that skips devices, and keeps
	// what it was given.
	cgroup.Resources.SkipDevices = false
	if err != nil {
		return fmt.Errorf("update: %w", refused(err, r))
	}
	return nil
}
