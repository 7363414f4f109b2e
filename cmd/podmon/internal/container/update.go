package container

import (
	"fmt"

	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// Update changes the limits that r sets and leaves the others as they are.
// Devices are never touched.
func (c *Container) Update(r *specs.LinuxResources) error {
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
	config := c.lc.Config()
	cgroup := *config.Cgroups
	resources := *cgroup.Resources
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
	resources.SkipDevices = true
	err = c.lc.Set(config)
	// libcontainer starts nothing in a container that skips devices, and keeps
	// what it was given.
	resources.SkipDevices = false
	if err != nil {
		return fmt.Errorf("update: %w", err)
	}
	return nil
}
