package stats

import (
	"path/filepath"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// v1 holds where the controllers are mounted; "" for one that is not. A cgroup
// exists in all of cpuacct, memory and pids, or has ended. unified is the hybrid
// layout's cgroup2, which has no controllers but tells pressure.
type v1 struct {
	cpu, cpuacct, memory, pids, blkio, unified string
}

func (h v1) read(path string) (u usage, err error) {
	for _, c := range []struct {
		mount string
		read  func(dir string) error
	}{{h.cpuacct, u.v1CPU}, {h.memory, u.v1Memory}, {h.pids, u.processes}} {
		if c.mount == "" {
			continue
		}
		if err := c.read(filepath.Join(c.mount, path)); err != nil {
			return usage{}, err
		}
	}
	if h.unified != "" {
		err = u.pressure(filepath.Join(h.unified, path))
	}
	return u, err
}

// pressure adds what a cgroup2 tells of it to the parts that are there.
func (u *usage) pressure(dir string) (err error) {
	if u.cpu != nil {
		if u.cpu.Psi, err = optionalPressure(dir, "cpu.pressure"); err != nil {
			return err
		}
	}
	if u.memory != nil {
		if u.memory.Psi, err = optionalPressure(dir, "memory.pressure"); err != nil {
			return err
		}
	}
	psi, err := optionalPressure(dir, "io.pressure")
	if psi != nil {
		u.io = &runtime.IoUsage{Timestamp: time.Now().UnixNano(), Psi: psi}
	}
	return err
}

func (u *usage) v1CPU(dir string) error {
	total, err := number(dir, "cpuacct.usage")
	if err != nil {
		return err
	}
	u.cpu = &runtime.CpuUsage{Timestamp: time.Now().UnixNano(), UsageCoreNanoSeconds: value(total)}
	return nil
}

// v1Memory takes the total_ counters of memory.stat, those that count children.
func (u *usage) v1Memory(dir string) error {
	used, err := number(dir, "memory.usage_in_bytes")
	if err != nil {
		return err
	}
	limit, err := number(dir, "memory.limit_in_bytes")
	if err != nil {
		return err
	}
	// memsw counts memory and swap together; without swap accounting
	// (swapaccount=0) there is no such file, and no total_swap.
	both, err := number(dir, "memory.memsw.limit_in_bytes")
	if err != nil && !gone(err) {
		return err
	}
	swaps := err == nil
	var m memoryStat
	var swapped uint64
	wanted := map[string]*uint64{
		"total_rss":           &m.rss,
		"total_inactive_file": &m.inactiveFile,
		"total_pgfault":       &m.faults,
		"total_pgmajfault":    &m.majorFaults,
	}
	if swaps {
		wanted["total_swap"] = &swapped
	}
	if err := keyed(dir, "memory.stat", wanted); err != nil { // once: it is dear
		return err
	}
	u.memory = m.usage(used, limit)
	if !swaps {
		return nil
	}
	u.swap = swapUsage(swapped, unlimited)
	if both < unlimited && limit < unlimited {
		u.swap = swapUsage(swapped, less(both, limit))
	}
	return nil
}

// processes is the same on v1 and v2.
func (u *usage) processes(dir string) error {
	n, err := number(dir, "pids.current")
	if err != nil {
		return err
	}
	u.process = &runtime.ProcessUsage{Timestamp: time.Now().UnixNano(), ProcessCount: value(n)}
	return nil
}

// memoryStat is what is wanted of memory.stat.
type memoryStat struct {
	rss, inactiveFile, faults, majorFaults uint64
}

func (m memoryStat) usage(used, limit uint64) *runtime.MemoryUsage {
	working := less(used, m.inactiveFile)
	out := &runtime.MemoryUsage{
		Timestamp:       time.Now().UnixNano(),
		WorkingSetBytes: value(working),
		UsageBytes:      value(used),
		RssBytes:        value(m.rss),
		PageFaults:      value(m.faults),
		MajorPageFaults: value(m.majorFaults),
	}
	if limit < unlimited {
		out.AvailableBytes = value(less(limit, working))
	}
	return out
}

func swapUsage(used, limit uint64) *runtime.SwapUsage {
	s := &runtime.SwapUsage{Timestamp: time.Now().UnixNano(), SwapUsageBytes: value(used)}
	if limit < unlimited {
		s.SwapAvailableBytes = value(less(limit, used))
	}
	return s
}
