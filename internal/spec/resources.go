package spec

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Unlimited is how the CRI and the kernel write "no limit" (CPU quota, memory, swap).
const Unlimited = -1

// Resources turns a CRI message into an OCI one. The message's zero values mean
// "not specified": what old has there stays, which is what
// UpdateContainerResources wants; for a new container old is nil. Old is not
// changed, and its fields that no CRI message knows (devices, pids...) stay.
//
// On a machine that accounts swap, a memory limit without a swap limit allows
// no swap; an update that moves the memory limit alone keeps the swap that the
// old limits left on top. Nil is an empty message.
func Resources(r *runtime.LinuxContainerResources, host Host, old *specs.LinuxResources) (*specs.LinuxResources, error) {
	const field = "linux.resources"
	if err := validateResources(field, r); err != nil {
		return nil, err
	}
	out := &specs.LinuxResources{}
	if old != nil {
		*out = *old
	}
	out.CPU = cpuResources(r, out.CPU)
	memory, err := memoryResources(field, r, host, out.Memory)
	if err != nil {
		return nil, err
	}
	out.Memory = memory
	if out.HugepageLimits, err = hugepages(field, r, host, out.HugepageLimits); err != nil {
		return nil, err
	}
	if len(r.GetUnified()) > 0 {
		if !host.CgroupV2 {
			return nil, unable(field+".unified", "this machine has cgroup v1")
		}
		unified := maps.Clone(out.Unified)
		if unified == nil {
			unified = make(map[string]string)
		}
		maps.Copy(unified, r.GetUnified())
		out.Unified = unified
	}
	return out, nil
}

// OOMScoreAdj is what the container's processes get; nil leaves the monitor's
// own. Below what the kernel lets the runtime set (lowering needs
// CAP_SYS_RESOURCE) it is cut to that.
func OOMScoreAdj(r *runtime.LinuxContainerResources, host Host) *int {
	if r == nil {
		return nil
	}
	adj := max(int(r.GetOomScoreAdj()), host.MinOOMScoreAdj)
	return &adj
}

func cpuResources(r *runtime.LinuxContainerResources, old *specs.LinuxCPU) *specs.LinuxCPU {
	cpu := &specs.LinuxCPU{}
	if old != nil {
		*cpu = *old
	}
	if v := uint64(r.GetCpuShares()); v != 0 {
		cpu.Shares = &v
	}
	if v := r.GetCpuQuota(); v != 0 {
		cpu.Quota = &v
	}
	if v := uint64(r.GetCpuPeriod()); v != 0 {
		cpu.Period = &v
	}
	cpu.Cpus = firstOf(r.GetCpusetCpus(), cpu.Cpus)
	cpu.Mems = firstOf(r.GetCpusetMems(), cpu.Mems)
	if *cpu == (specs.LinuxCPU{}) {
		return nil
	}
	return cpu
}

// memoryResources merges the memory limits. A swap limit in the CRI, as in the
// OCI and cgroup v1, is that of memory and swap together.
func memoryResources(field string, r *runtime.LinuxContainerResources, host Host, old *specs.LinuxMemory) (*specs.LinuxMemory, error) {
	limit, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	if limit == 0 && swap == 0 {
		return old, nil
	}
	memory := &specs.LinuxMemory{}
	if old != nil {
		*memory = *old
	}
	if limit != 0 {
		memory.Limit = &limit
	}
	if swap == 0 {
		swap = keptSwap(limit, old)
	}
	if swap > 0 && (memory.Limit == nil || *memory.Limit == Unlimited) {
		return nil, invalid(field+".memory_swap_limit_in_bytes", "needs memory_limit_in_bytes: it limits both together")
	}
	if swap > 0 && swap < *memory.Limit {
		return nil, invalid(field+".memory_swap_limit_in_bytes", "%d is below the memory limit %d: it limits both together", swap, *memory.Limit)
	}
	switch {
	case host.Swap:
		memory.Swap = &swap
	case swap > 0 && swap > *memory.Limit:
		return nil, unable(field+".memory_swap_limit_in_bytes", "the kernel does not account swap")
	}
	return memory, nil
}

// keptSwap is the swap limit that goes with a new memory limit when none is
// given: as much swap on top as there was, which at first is none.
func keptSwap(limit int64, old *specs.LinuxMemory) int64 {
	if limit == Unlimited {
		return Unlimited
	}
	if old == nil || old.Swap == nil || old.Limit == nil || *old.Limit == Unlimited {
		return limit
	}
	if *old.Swap == Unlimited {
		return Unlimited
	}
	return limit + *old.Swap - *old.Limit
}

// hugepages merges limits by page size. A size that the machine does not have is
// refused, unless the limit is zero, which takes nothing away. On a machine without
// the hugetlb controller nobody keeps a limit, and they are left out (see
// HugepagesUnlimited): kubelet shares the machine's pages out by what pods request.
func hugepages(field string, r *runtime.LinuxContainerResources, host Host, old []specs.LinuxHugepageLimit) ([]specs.LinuxHugepageLimit, error) {
	out := slices.Clone(old)
	for i, h := range r.GetHugepageLimits() {
		if !slices.Contains(host.HugepageSizes, h.GetPageSize()) {
			if h.GetLimit() == 0 {
				continue
			}
			return nil, unable(fmt.Sprintf("%s.hugepage_limits[%d].page_size", field, i),
				"this machine has no pages of %q (it has: %s)", h.GetPageSize(), strings.Join(host.HugepageSizes, ", "))
		}
		if !host.Hugetlb {
			continue
		}
		out = slices.DeleteFunc(out, func(o specs.LinuxHugepageLimit) bool { return o.Pagesize == h.GetPageSize() })
		out = append(out, specs.LinuxHugepageLimit{Pagesize: h.GetPageSize(), Limit: h.GetLimit()})
	}
	return out, nil
}

// HugepagesUnlimited are the page sizes whose limits the machine does not keep: it has
// no hugetlb controller.
func HugepagesUnlimited(r *runtime.LinuxContainerResources, host Host) (sizes []string) {
	if host.Hugetlb {
		return nil
	}
	for _, h := range r.GetHugepageLimits() {
		if h.GetLimit() > 0 {
			sizes = append(sizes, h.GetPageSize())
		}
	}
	return sizes
}
