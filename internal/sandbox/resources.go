package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/cgroups"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/spec"
)

// UpdateResources notes what a pod may use from now on (CRI
// UpdatePodSandboxResources); nil leaves a part as it is. A cgroup that podshim
// has made for the pod is held to it. One that the client named is the client's:
// kubelet asks first, as a runtime may say no, and then writes the pod's cgroup.
func (m *Manager) UpdateResources(ctx context.Context, id string, overhead, resources *runtime.LinuxContainerResources) error {
	s, err := m.Get(id)
	if err != nil {
		return err
	}
	if err := spec.ValidatePodResources(overhead, resources); err != nil {
		return err
	}
	unlock, err := m.all.Lock(ctx, s.Get().ID)
	if err != nil {
		return err
	}
	defer unlock()
	r := s.Get()
	if r.State != Ready {
		return fmt.Errorf("pod sandbox %s is not ready (%s): its resources cannot be changed: %w", r.ID, r.Reason, errdefs.ErrFailedPrecondition)
	}
	linux := proto.CloneOf(r.linux())
	if overhead != nil {
		linux.Overhead = proto.CloneOf(overhead)
	}
	if resources != nil {
		linux.Resources = proto.CloneOf(resources)
	}
	if !r.OwnCgroup {
		return m.all.Update(s, func(r *Record) { r.Updated = linux })
	}
	if err := m.limitCgroup(r.CgroupParent, r.linux(), linux); err != nil {
		return err
	}
	if err := m.all.Update(s, func(r *Record) { r.Updated = linux }); err != nil {
		// A call that fails, on a full disk for example, changes nothing.
		return errors.Join(err, m.limitCgroup(r.CgroupParent, linux, r.linux()))
	}
	return nil
}

// CurrentConfig is the config with the resources in force.
func (r *Record) CurrentConfig() *runtime.PodSandboxConfig {
	if r.Updated == nil {
		return r.Config
	}
	config := proto.CloneOf(r.Config)
	if config.Linux == nil {
		config.Linux = new(runtime.LinuxPodSandboxConfig)
	}
	config.Linux.Overhead, config.Linux.Resources = r.Updated.Overhead, r.Updated.Resources
	return config
}

// linux is the part of the config that has the resources in force.
func (r *Record) linux() *runtime.LinuxPodSandboxConfig {
	linux := r.CurrentConfig().GetLinux()
	return &runtime.LinuxPodSandboxConfig{Overhead: linux.GetOverhead(), Resources: linux.GetResources()}
}

// makeCgroup makes a pod's own cgroup and holds it to the config's resources, so
// that not even the infra container runs without. A pod that has none gets its
// cgroup with its first container.
func (m *Manager) makeCgroup(r *Record) error {
	if linux := r.linux(); !r.OwnCgroup || linux.Overhead == nil && linux.Resources == nil {
		return nil
	}
	cm, err := m.cgroup(r.CgroupParent)
	if err != nil {
		return err
	}
	if err := cm.Apply(-1); err != nil {
		return fmt.Errorf("make pod cgroup %s: %w", r.CgroupParent, err)
	}
	return m.limitCgroup(r.CgroupParent, nil, r.linux())
}

// limitCgroup moves a pod's own cgroup from one set of limits to another; an
// error leaves the first.
func (m *Manager) limitCgroup(parent string, from, to *runtime.LinuxPodSandboxConfig) error {
	cm, err := m.cgroup(parent)
	if err != nil {
		return err
	}
	limits, err := m.podLimits(to)
	if err != nil {
		return err
	}
	// What is given up goes back to the kernel's default.
	before, err := m.podLimits(from)
	if err != nil {
		return err
	}
	if err := cm.Set(withDefaults(limits, before)); err != nil {
		back := cm.Set(withDefaults(before, limits))
		return errors.Join(fmt.Errorf("pod cgroup %s: %w", parent, cgroupError(err)), back)
	}
	return nil
}

// podLimits are the limits of a pod: its containers' together and the overhead.
func (m *Manager) podLimits(linux *runtime.LinuxPodSandboxConfig) (*cgroups.Resources, error) {
	r, o := linux.GetResources(), linux.GetOverhead()
	if r == nil {
		r = new(runtime.LinuxContainerResources)
	}
	oci, err := spec.Resources(r, m.Host, nil)
	if err != nil {
		return nil, err
	}
	out := &cgroups.Resources{SkipDevices: true, SkipFreezeOnSet: true, MemoryCheckBeforeUpdate: true}
	if cpu := oci.CPU; cpu != nil {
		if cpu.Shares != nil {
			out.CpuShares = min(*cpu.Shares+uint64(o.GetCpuShares()), 262_144)
			out.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(out.CpuShares)
		}
		if cpu.Period != nil {
			out.CpuPeriod = *cpu.Period
		}
		if cpu.Quota != nil {
			out.CpuQuota = *cpu.Quota + overheadQuota(r, o)
		}
		out.CpusetCpus, out.CpusetMems = cpu.Cpus, cpu.Mems
	}
	if memory := oci.Memory; memory != nil {
		add := func(limit *int64, over int64) int64 {
			switch {
			case limit == nil:
				return 0
			case *limit == spec.Unlimited:
				return spec.Unlimited
			}
			return *limit + max(0, over)
		}
		over := o.GetMemoryLimitInBytes()
		out.Memory, out.MemorySwap = add(memory.Limit, over), add(memory.Swap, over)
	}
	for _, h := range oci.HugepageLimits {
		out.HugetlbLimit = append(out.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	out.Unified = oci.Unified
	return out, nil
}

// overheadQuota is the overhead's quota over the period of the containers'; 0
// where either has none.
func overheadQuota(r, o *runtime.LinuxContainerResources) int64 {
	if r.GetCpuQuota() <= 0 || o.GetCpuQuota() <= 0 {
		return 0
	}
	const usual = 100_000 // the kernel's period, us
	period := func(v int64) int64 {
		if v == 0 {
			return usual
		}
		return v
	}
	return o.GetCpuQuota() * period(r.GetCpuPeriod()) / period(o.GetCpuPeriod())
}

// withDefaults adds the kernel's default for what only other names: what is not
// named would stay.
func withDefaults(limits, other *cgroups.Resources) *cgroups.Resources {
	out := *limits
	if out.CpuShares == 0 && other.CpuShares != 0 {
		out.CpuShares, out.CpuWeight = 1024, 100
	}
	if out.CpuQuota == 0 && other.CpuQuota != 0 {
		out.CpuQuota = spec.Unlimited
	}
	if out.CpuPeriod == 0 && other.CpuPeriod != 0 {
		out.CpuPeriod = 100_000
	}
	if out.Memory == 0 && other.Memory != 0 {
		out.Memory = spec.Unlimited
	}
	if out.MemorySwap == 0 && other.MemorySwap != 0 {
		out.MemorySwap = spec.Unlimited
	}
	return &out
}

// cgroupError classes what the kernel has refused.
func cgroupError(err error) error {
	var at *fs.PathError
	switch {
	case strings.HasPrefix(err.Error(), "unable to set memory limit"), strings.HasPrefix(err.Error(), "rejecting memory"):
		return fmt.Errorf("resources.memory_limit_in_bytes: the pod uses more than that and cannot give it back: %w: %w", err, errdefs.ErrFailedPrecondition)
	case errors.As(err, &at) && errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("resources: %w: %w", err, errdefs.ErrFailedPrecondition)
	case errors.As(err, &at):
		return fmt.Errorf("resources: the kernel refuses one: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}
