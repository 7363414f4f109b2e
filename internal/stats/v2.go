package stats

import (
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// v2 is the unified hierarchy, mounted at root. cpu.stat is there in every
// cgroup; the files of a controller only where it is turned on.
type v2 struct {
	root string
}

func (h v2) read(path string) (u usage, err error) {
	dir := filepath.Join(h.root, path)
	if err := u.v2CPU(dir); err != nil {
		return usage{}, err // here, and only here, missing means gone
	}
	for _, read := range []func(dir string) error{u.v2Memory, u.v2Swap, u.processes, u.pressure} {
		if err := read(dir); err != nil && !gone(err) {
			return usage{}, err
		}
	}
	if u.memory == nil {
		// Not turned on here, or removed since cpu.stat was read.
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil {
			return usage{}, fileError(dir, err)
		}
	}
	return u, nil
}

func (u *usage) v2CPU(dir string) error {
	var micros uint64
	if err := keyed(dir, "cpu.stat", map[string]*uint64{"usage_usec": &micros}); err != nil {
		return err
	}
	u.cpu = &runtime.CpuUsage{Timestamp: time.Now().UnixNano(), UsageCoreNanoSeconds: value(micros * 1000)}
	return nil
}

func (u *usage) v2Memory(dir string) error {
	used, err := number(dir, "memory.current")
	if err != nil {
		return err
	}
	limit, err := number(dir, "memory.max")
	if err != nil {
		return err
	}
	var m memoryStat
	if err := keyed(dir, "memory.stat", map[string]*uint64{
		"anon":          &m.rss,
		"inactive_file": &m.inactiveFile,
		"pgfault":       &m.faults,
		"pgmajfault":    &m.majorFaults,
	}); err != nil {
		return err
	}
	u.memory = m.usage(used, limit)
	return nil
}

func (u *usage) v2Swap(dir string) error {
	used, err := number(dir, "memory.swap.current")
	if err != nil {
		return err
	}
	limit, err := number(dir, "memory.swap.max")
	if err != nil {
		return err
	}
	u.swap = swapUsage(used, limit)
	return nil
}

// optionalPressure is nil where the kernel measures no pressure (built without
// PSI, psi=0, cgroup.pressure 0).
func optionalPressure(dir, name string) (*runtime.PsiStats, error) {
	psi, err := pressure(dir, name)
	if gone(err) {
		return nil, nil
	}
	return psi, err
}
