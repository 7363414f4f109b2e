package stats

import (
	"bytes"
	"fmt"
	"path/filepath"
)

func (h v2) count(path string) (*counters, error) {
	c := new(counters)
	dir := filepath.Join(h.root, path)
	if err := c.v2CPU(dir); err != nil {
		return nil, err // here, and only here, missing means gone
	}
	c.born = birth(dir)
	for _, read := range []func(dir string) error{c.v2Memory, c.v2Disks, c.tasks, c.processes, c.pressure} {
		if err := read(dir); err != nil && !gone(err) {
			return nil, err
		}
	}
	return c, nil
}

func (c *counters) v2CPU(dir string) error {
	cpu := &c.cpu
	if err := keyed(dir, "cpu.stat", map[string]*uint64{
		"usage_usec": &cpu.total, "user_usec": &cpu.user, "system_usec": &cpu.system,
	}); err != nil {
		return err
	}
	if err := optional(dir, "cpu.stat", map[string]*uint64{ // with the controller only
		"nr_periods": &cpu.periods, "nr_throttled": &cpu.throttled, "throttled_usec": &cpu.throttledTime,
		"nr_bursts": &cpu.bursts, "burst_usec": &cpu.burstTime,
	}); err != nil {
		return err
	}
	for _, v := range []*uint64{&cpu.total, &cpu.user, &cpu.system, &cpu.throttledTime, &cpu.burstTime} {
		*v *= 1000
	}
	var weight uint64
	if err := numbers(dir, map[string]*uint64{"cpu.weight": &weight}); err != nil {
		return err
	}
	if weight > 0 {
		// The inverse of kubelet's formula, as cAdvisor has it.
		c.limits.shares = 2 + (weight-1)*262142/9999
	}
	return c.v2Quota(dir)
}

// v2Quota reads cpu.max: "QUOTA PERIOD", where QUOTA may be "max".
func (c *counters) v2Quota(dir string) error {
	raw, err := readFile(dir, "cpu.max", nil)
	if gone(err) {
		return nil
	}
	if err != nil {
		return err
	}
	fields := bytes.Fields(raw)
	if len(fields) != 2 {
		return fmt.Errorf("read %s/cpu.max: %q is not a quota and a period", dir, raw)
	}
	if string(fields[0]) != "max" {
		if c.limits.quota, err = parseNumber(fields[0]); err != nil {
			return fmt.Errorf("read %s/cpu.max: %w", dir, err)
		}
	}
	if c.limits.period, err = parseNumber(fields[1]); err != nil {
		return fmt.Errorf("read %s/cpu.max: %w", dir, err)
	}
	return nil
}

func (c *counters) v2Memory(dir string) (err error) {
	m, l := &c.memory, &c.limits
	if m.used, err = number(dir, "memory.current"); err != nil {
		return err
	}
	if err := optional(dir, "memory.stat", map[string]*uint64{
		"file": &m.cache, "anon": &m.rss, "file_mapped": &m.mapped, "kernel": &m.kernel,
		"active_file": &m.activeFile, "inactive_file": &m.inactiveFile,
		"file_dirty": &m.dirty, "file_writeback": &m.writeback,
		"pgfault": &m.faults, "pgmajfault": &m.majorFaults, "pgscan": &m.scanned, "pgsteal": &m.stolen,
		"workingset_refault_file": &m.refaultFile, "workingset_refault_anon": &m.refaultAnon,
	}); err != nil {
		return err
	}
	m.working = less(m.used, m.inactiveFile)
	if err := optional(dir, "memory.events", map[string]*uint64{
		"high": &m.high, "max": &m.max, "oom_kill": &m.oomKills,
	}); err != nil {
		return err
	}
	m.failures = m.max
	if err := numbers(dir, map[string]*uint64{
		"memory.peak": &m.most, "memory.swap.current": &m.swap,
		"memory.max": &l.memory, "memory.swap.max": &l.swap, "memory.min": &l.reservation,
	}); err != nil {
		return err
	}
	l.dropUnlimited()
	return nil
}

// v2Disks reads io.stat: a line for each device, "MAJOR:MINOR KEY=NUMBER...".
func (c *counters) v2Disks(dir string) error {
	raw, err := readFile(dir, "io.stat", nil)
	if err != nil {
		return err
	}
	for line := range bytes.Lines(raw) {
		fields := bytes.Fields(line)
		if len(fields) < 2 {
			continue // a device that has done nothing
		}
		dev, err := parseDevice(fields[0])
		if err != nil {
			return fmt.Errorf("read %s/io.stat: %w", dir, err)
		}
		d := c.disk(dev)
		d.bytes, d.ops = make(map[string]uint64), make(map[string]uint64)
		for _, field := range fields[1:] {
			key, number, _ := bytes.Cut(field, []byte("="))
			if err := d.v2Field(string(key), number); err != nil {
				return fmt.Errorf("read %s/io.stat: %s: %w", dir, key, err)
			}
		}
	}
	return nil
}

func (d *disk) v2Field(key string, number []byte) error {
	var into *uint64
	switch key {
	case "cost.usage":
		into = &d.usage
	case "cost.wait":
		into = &d.wait
	case "cost.indebt":
		into = &d.indebt
	case "cost.indelay":
		into = &d.indelay
	case "rbytes", "wbytes", "rios", "wios":
		v, err := parseNumber(number)
		table := d.bytes
		if key[1:] == "ios" {
			table = d.ops
		}
		table[map[byte]string{'r': "Read", 'w': "Write"}[key[0]]] = v
		return err
	default:
		return nil
	}
	d.costed = true
	v, err := parseNumber(number)
	*into = v
	return err
}
