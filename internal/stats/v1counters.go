package stats

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strconv"
)

// ticks is USER_HZ, in which cpuacct.stat counts: 100 on every architecture that
// Go runs on (time(7)).
const ticks = 100

func (h v1) count(path string) (*counters, error) {
	c := new(counters)
	for _, part := range []struct {
		mount string
		read  func(dir string) error
	}{
		{h.cpuacct, c.v1CPU}, {h.cpu, c.v1Scheduler}, {h.memory, c.v1Memory},
		{h.blkio, c.v1Disks}, {h.pids, c.tasks}, {h.unified, c.pressure},
	} {
		if part.mount == "" {
			continue
		}
		if err := part.read(filepath.Join(part.mount, path)); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func (c *counters) v1CPU(dir string) (err error) {
	if c.cpu.total, err = number(dir, "cpuacct.usage"); err != nil {
		return err
	}
	err = keyed(dir, "cpuacct.stat", map[string]*uint64{"user": &c.cpu.user, "system": &c.cpu.system})
	c.cpu.user *= 1e9 / ticks
	c.cpu.system *= 1e9 / ticks
	return err
}

// v1Scheduler reads the cpu controller, in whose cgroup the processes are counted
// too. Files are missing where the kernel has no CFS bandwidth control.
func (c *counters) v1Scheduler(dir string) error {
	c.born = birth(dir)
	if err := optional(dir, "cpu.stat", map[string]*uint64{
		"nr_periods": &c.cpu.periods, "nr_throttled": &c.cpu.throttled, "throttled_time": &c.cpu.throttledTime,
		"nr_bursts": &c.cpu.bursts, "burst_time": &c.cpu.burstTime,
	}); err != nil {
		return err
	}
	if err := numbers(dir, map[string]*uint64{"cpu.shares": &c.limits.shares, "cpu.cfs_period_us": &c.limits.period}); err != nil {
		return err
	}
	raw, err := readFile(dir, "cpu.cfs_quota_us", nil)
	if err == nil && !bytes.HasPrefix(raw, []byte("-")) {
		c.limits.quota, err = parseNumber(bytes.TrimSpace(raw))
	}
	if err != nil && !gone(err) {
		return fmt.Errorf("read %s/cpu.cfs_quota_us: %w", dir, err)
	}
	return c.processes(dir)
}

func (c *counters) v1Memory(dir string) (err error) {
	m, l := &c.memory, &c.limits
	if m.used, err = number(dir, "memory.usage_in_bytes"); err != nil {
		return err
	}
	if err := optional(dir, "memory.stat", map[string]*uint64{
		"total_cache": &m.cache, "total_rss": &m.rss, "total_mapped_file": &m.mapped, "total_swap": &m.swap,
		"total_active_file": &m.activeFile, "total_inactive_file": &m.inactiveFile,
		"total_dirty": &m.dirty, "total_writeback": &m.writeback,
		"total_pgfault": &m.faults, "total_pgmajfault": &m.majorFaults,
		"total_workingset_refault_file": &m.refaultFile, "total_workingset_refault_anon": &m.refaultAnon,
	}); err != nil {
		return err
	}
	m.working = less(m.used, m.inactiveFile)
	if err := optional(dir, "memory.oom_control", map[string]*uint64{"oom_kill": &m.oomKills}); err != nil {
		return err
	}
	if err := numbers(dir, map[string]*uint64{
		"memory.max_usage_in_bytes": &m.most, "memory.kmem.usage_in_bytes": &m.kernel, "memory.failcnt": &m.failures,
		"memory.limit_in_bytes": &l.memory, "memory.memsw.limit_in_bytes": &l.swap, "memory.soft_limit_in_bytes": &l.reservation,
	}); err != nil {
		return err
	}
	m.max = m.failures
	l.dropUnlimited()
	return nil
}

func (l *limits) dropUnlimited() {
	for _, v := range []*uint64{&l.memory, &l.swap, &l.reservation} {
		if *v >= unlimited {
			*v = 0
		}
	}
}

// v1Disks reads blkio's files: those of the BFQ scheduler where a device has
// it, else those of the throttler, which counts for every scheduler.
func (c *counters) v1Disks(dir string) error {
	for _, scheduler := range []string{"bfq", "throttle"} {
		for name, of := range map[string]func(*disk) *map[string]uint64{
			"io_service_bytes": func(d *disk) *map[string]uint64 { return &d.bytes },
			"io_serviced":      func(d *disk) *map[string]uint64 { return &d.ops },
			"io_queued":        func(d *disk) *map[string]uint64 { return &d.queued },
			"sectors":          func(d *disk) *map[string]uint64 { return &d.sectors },
			"io_merged":        func(d *disk) *map[string]uint64 { return &d.merged },
			"io_service_time":  func(d *disk) *map[string]uint64 { return &d.serviceTime },
			"io_wait_time":     func(d *disk) *map[string]uint64 { return &d.waitTime },
		} {
			if scheduler == "throttle" && name != "io_service_bytes" && name != "io_serviced" {
				continue
			}
			if err := c.blkio(dir, "blkio."+scheduler+"."+name+"_recursive", of); err != nil && !gone(err) {
				return err
			}
		}
		if len(c.disks) > 0 {
			return nil
		}
	}
	return nil
}

// blkio reads lines of "MAJOR:MINOR [OPERATION] NUMBER"; a line with no device is
// the sum of all.
func (c *counters) blkio(dir, name string, of func(*disk) *map[string]uint64) error {
	raw, err := readFile(dir, name, nil)
	if err != nil {
		return err
	}
	for line := range bytes.Lines(raw) {
		fields := bytes.Fields(line)
		if len(fields) < 2 || !bytes.Contains(fields[0], []byte(":")) {
			continue
		}
		d, err := parseDevice(fields[0])
		if err != nil {
			return fmt.Errorf("read %s/%s: %w", dir, name, err)
		}
		operation := "Count"
		if len(fields) == 3 {
			operation = string(fields[1])
		}
		v, err := parseNumber(fields[len(fields)-1])
		if err != nil {
			return fmt.Errorf("read %s/%s: %w", dir, name, err)
		}
		into := of(c.disk(d))
		if *into == nil {
			*into = make(map[string]uint64)
		}
		(*into)[operation] = v
	}
	return nil
}

func parseDevice(s []byte) (device, error) {
	major, minor, ok := bytes.Cut(s, []byte(":"))
	a, errA := strconv.ParseUint(string(major), 10, 32)
	b, errB := strconv.ParseUint(string(minor), 10, 32)
	if !ok || errA != nil || errB != nil {
		return device{}, fmt.Errorf("%q is no device", s)
	}
	return device{uint32(a), uint32(b)}, nil
}
