package container

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/fscommon"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// fields names the field of the CRI's LinuxContainerResources that decides a
// cgroup file, by the beginning of the file's name.
var fields = []struct{ file, field string }{
	{"cpu.shares", "cpu_shares"}, {"cpu.weight", "cpu_shares"},
	{"cpu.cfs_period_us", "cpu_period"}, {"cpu.cfs_quota_us", "cpu_quota"}, {"cpu.max", "cpu_quota"},
	{"cpuset.cpus", "cpuset_cpus"}, {"cpuset.mems", "cpuset_mems"},
	{"memory.memsw.limit_in_bytes", "memory_swap_limit_in_bytes"}, {"memory.swap.max", "memory_swap_limit_in_bytes"},
	{"memory.limit_in_bytes", "memory_limit_in_bytes"}, {"memory.max", "memory_limit_in_bytes"},
	{"hugetlb.", "hugepage_limits"},
}

// refused says which field the kernel has refused, and why: ClassInvalid for a
// value that it takes from nobody here, ClassPrecondition for one that it does
// not take now.
func refused(err error, asked *specs.LinuxResources) error {
	const memory = "linux.memory_limit_in_bytes"
	if strings.HasPrefix(err.Error(), "unable to set memory limit") { // libcontainer's word for EBUSY
		return wire.Errorf(wire.ClassPrecondition, "%s: the container uses more than that and cannot give it back: %w", memory, err)
	}
	var at *fs.PathError
	if !errors.As(err, &at) {
		return err
	}
	file := filepath.Base(at.Path)
	field := fieldOf(file, asked)
	if field == "" {
		return err
	}
	switch {
	case errors.Is(err, unix.ENOENT):
		return wire.Errorf(wire.ClassPrecondition, "%s: this machine's cgroups have no %s: %w", field, file, err)
	case errors.Is(err, unix.EBUSY):
		return wire.Errorf(wire.ClassPrecondition, "%s: the kernel cannot now: %w", field, err)
	case strings.HasPrefix(file, "cpu.cfs_") && errors.Is(err, unix.EINVAL):
		return wire.Errorf(wire.ClassInvalid, "%s: more CPU time than the pod's cgroup has (its quota over its period), or less than a container's below has: %w", field, err)
	case strings.HasPrefix(file, "cpuset."):
		return wire.Errorf(wire.ClassInvalid, "%s: not among those of the pod's cgroup and this machine: %w", field, err)
	default:
		return wire.Errorf(wire.ClassInvalid, "%s: the kernel refuses it: %w", field, err)
	}
}

func fieldOf(file string, asked *specs.LinuxResources) string {
	if _, unified := asked.Unified[file]; unified {
		return fmt.Sprintf("linux.unified[%q]", file)
	}
	for _, f := range fields {
		if strings.HasPrefix(file, f.file) {
			return "linux." + f.field
		}
	}
	return ""
}

// checkShrink refuses a memory limit below what the cgroup holds and could not
// give back. On v1 the kernel does; on v2 it would kill instead.
func checkShrink(dir string, limit int64) error {
	if limit <= 0 {
		return nil
	}
	used, err := fscommon.GetCgroupParamUint(dir, "memory.current")
	if err != nil {
		return nil // no memory controller, or no v2: nothing to be killed for
	}
	var spare uint64 // what the kernel drops or writes out when it must
	for _, key := range []string{"active_file", "inactive_file", "slab_reclaimable"} {
		if v, err := fscommon.GetValueByKey(dir, "memory.stat", key); err == nil {
			spare += v
		}
	}
	if room, err := fscommon.GetCgroupParamUint(dir, "memory.swap.max"); err == nil {
		swapped, _ := fscommon.GetCgroupParamUint(dir, "memory.swap.current")
		spare += min(room-min(room, swapped), freeSwap())
	}
	if used-min(used, spare) > uint64(limit) {
		return wire.Errorf(wire.ClassPrecondition,
			"linux.memory_limit_in_bytes: the container uses %d bytes and can give back %d of them: it would be killed at %d", used, spare, limit)
	}
	return nil
}

// freeSwap is the machine's, bytes.
func freeSwap() uint64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return info.Freeswap * uint64(info.Unit)
}

// undo describes the limits that were in force before failed was tried.
// libcontainer leaves what a description does not name, so what failed named
// first is given the kernel's default.
func undo(before cgroups.Resources, failed *cgroups.Resources) *cgroups.Resources {
	if before.CpuShares == 0 && failed.CpuShares != 0 {
		before.CpuShares, before.CpuWeight = 1024, 100
	}
	if before.CpuPeriod == 0 && failed.CpuPeriod != 0 {
		before.CpuPeriod = 100_000
	}
	if before.CpuQuota == 0 && failed.CpuQuota != 0 {
		before.CpuQuota = -1
	}
	if before.Memory == 0 && failed.Memory != 0 {
		before.Memory = -1
	}
	if before.MemorySwap == 0 && failed.MemorySwap != 0 {
		before.MemorySwap = -1
	}
	before.SkipDevices = true
	return &before
}

// saved are the contents of cgroup files, by path.
type saved map[string]string

// save reads the files for which the kernel's default is not one value.
func (c *Container) save(r *specs.LinuxResources) saved {
	s := make(saved)
	keep := func(controller, file string) {
		path := filepath.Join(c.cgroup.Path(controller), file)
		if data, err := os.ReadFile(path); err == nil {
			s[path] = string(data)
		}
	}
	if r.CPU != nil && r.CPU.Cpus != "" {
		keep("cpuset", "cpuset.cpus")
	}
	if r.CPU != nil && r.CPU.Mems != "" {
		keep("cpuset", "cpuset.mems")
	}
	for key := range r.Unified {
		keep("", key)
	}
	for _, h := range r.HugepageLimits {
		keep("hugetlb", "hugetlb."+h.Pagesize+".limit_in_bytes")
		keep("", "hugetlb."+h.Pagesize+".max")
	}
	return s
}

// restore writes back what has changed since.
func (s saved) restore() error {
	var errs []error
	for path, content := range s {
		if now, err := os.ReadFile(path); err == nil && string(now) == content {
			continue
		}
		errs = append(errs, os.WriteFile(path, []byte(content), 0))
	}
	return errors.Join(errs...)
}

// setOOMScore gives all processes of the container a score, and what they start
// from then on. It returns that of PID 1 before.
func (c *Container) setOOMScore(adj int) (before int, err error) {
	if before, err = c.oomScore(); err != nil {
		return 0, fmt.Errorf("linux.oom_score_adj: %w", err)
	}
	// One that forks while the list is read hands the old score on.
	const passes = 10
	for range passes {
		changed, err := c.setOOMScores(adj)
		switch {
		case errors.Is(err, fs.ErrPermission):
			return before, wire.Errorf(wire.ClassPrecondition, "linux.oom_score_adj: the kernel does not let podmon lower it that far (CAP_SYS_RESOURCE): %w", err)
		case err != nil:
			return before, fmt.Errorf("linux.oom_score_adj: %w", err)
		case !changed:
			return before, nil
		}
	}
	return before, nil
}

// oomScore is PID 1's.
func (c *Container) oomScore() (int, error) {
	p := c.Status().Process
	f, err := openOOMScore(p.PID)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if !p.Exists() { // the file is of another process that got its PID
		return 0, unix.ESRCH
	}
	return readOOMScore(f)
}

// setOOMScores goes once through the processes, and tells whether it has changed one.
// Each score is written through a file that is open before the process is found in the
// cgroup once more: a PID may be another process's by the time it is opened, and the
// file stays that of its process.
func (c *Container) setOOMScores(adj int) (changed bool, err error) {
	pids, err := processes(c.cgroup)
	if err != nil {
		return false, err
	}
	for some := range slices.Chunk(pids, 256) { // so that few files are open
		of, err := c.setSomeOOMScores(some, adj)
		changed = changed || of
		if err != nil {
			return changed, err
		}
	}
	return changed, nil
}

func (c *Container) setSomeOOMScores(pids []int, adj int) (changed bool, err error) {
	files := make(map[int]*os.File)
	for _, pid := range pids {
		f, err := openOOMScore(pid)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return false, err
		}
		defer f.Close()
		files[pid] = f
	}
	now, err := processes(c.cgroup)
	if err != nil {
		return false, err
	}
	for _, pid := range now {
		f := files[pid]
		if f == nil {
			continue
		}
		if have, err := readOOMScore(f); err != nil || have == adj {
			continue // gone, or done
		}
		changed = true
		if _, err := f.WriteAt([]byte(strconv.Itoa(adj)), 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return changed, err
		}
	}
	return changed, nil
}

func openOOMScore(pid int) (*os.File, error) {
	return os.OpenFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid), os.O_RDWR, 0)
}

func readOOMScore(f *os.File) (int, error) {
	b := make([]byte, 16)
	n, err := f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b[:n])))
}
