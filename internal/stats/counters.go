package stats

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// counters are what the files of one cgroup tell, for metrics. Times are in
// nanoseconds, sizes in bytes. What the kernel does not count is zero here, as
// in cAdvisor, whose metrics these become.
type counters struct {
	cpu    cpuCounters
	memory memoryCounters
	limits limits
	disks  map[device]*disk
	// pids.current and pids.max, 0 without a limit; procs are the processes in
	// this very cgroup.
	threads, threadsMax uint64
	procs               []int
	psi                 *psiTotals // nil where the kernel measures no pressure
	born                time.Time  // of the cgroup
}

type cpuCounters struct {
	total, user, system uint64
	// The rest is of the CFS quota.
	periods, throttled, throttledTime, bursts, burstTime uint64
}

type memoryCounters struct {
	cache, rss, kernel, mapped, swap           uint64
	used, most, working                        uint64
	activeFile, inactiveFile, dirty, writeback uint64
	faults, majorFaults                        uint64
	failures, high, max, oomKills              uint64
	scanned, stolen, refaultFile, refaultAnon  uint64
}

// limits are what the cgroup is held to; 0 is no limit.
type limits struct {
	shares, period, quota     uint64 // quota 0: none
	memory, swap, reservation uint64
}

type device struct{ major, minor uint32 }

// disk holds what a cgroup did on one device, by operation as in blkio's files
// ("Read", "Write", "Total"...; nil where the kernel does not count it).
type disk struct {
	bytes, ops                   map[string]uint64
	queued, sectors, merged      map[string]uint64
	serviceTime, waitTime        map[string]uint64
	usage, wait, indebt, indelay uint64 // io.cost, microseconds
	costed                       bool   // io.cost is on
}

// psiTotals are stall times in nanoseconds.
type psiTotals struct {
	cpuSome, cpuFull, memorySome, memoryFull, ioSome, ioFull uint64
}

func (c *counters) disk(d device) *disk {
	if c.disks == nil {
		c.disks = make(map[device]*disk)
	}
	if c.disks[d] == nil {
		c.disks[d] = new(disk)
	}
	return c.disks[d]
}

// pressure reads the PSI files of a cgroup2 directory.
func (c *counters) pressure(dir string) error {
	var t psiTotals
	for name, into := range map[string][2]*uint64{
		"cpu.pressure":    {&t.cpuSome, &t.cpuFull},
		"memory.pressure": {&t.memorySome, &t.memoryFull},
		"io.pressure":     {&t.ioSome, &t.ioFull},
	} {
		psi, err := optionalPressure(dir, name)
		if err != nil {
			return err
		}
		if psi != nil {
			*into[0], *into[1] = psi.GetSome().GetTotal(), psi.GetFull().GetTotal()
			c.psi = &t
		}
	}
	return nil
}

// processes reads cgroup.procs of a directory.
func (c *counters) processes(dir string) error {
	raw, err := readFile(dir, "cgroup.procs", nil)
	if err != nil {
		return err
	}
	for field := range bytes.FieldsSeq(raw) {
		pid, err := strconv.Atoi(string(field))
		if err != nil {
			return fmt.Errorf("read %s/cgroup.procs: %w", dir, err)
		}
		c.procs = append(c.procs, pid)
	}
	return nil
}

// tasks reads the pids controller, the same on v1 and v2.
func (c *counters) tasks(dir string) (err error) {
	if c.threads, err = number(dir, "pids.current"); err != nil {
		return err
	}
	limit, err := number(dir, "pids.max")
	if err != nil && !gone(err) {
		return err
	}
	if limit < unlimited {
		c.threadsMax = limit
	}
	return nil
}

// birth is about when a cgroup was made: its directory changes with its
// children, its files do not.
func birth(dir string) time.Time {
	var at time.Time
	for _, path := range []string{dir, filepath.Join(dir, "cgroup.procs")} {
		if info, err := os.Stat(path); err == nil && (at.IsZero() || info.ModTime().Before(at)) {
			at = info.ModTime()
		}
	}
	return at
}

// numbers reads files that hold one number each; one that is not there leaves
// its number as it is.
func numbers(dir string, into map[string]*uint64) error {
	for name, target := range into {
		v, err := number(dir, name)
		switch {
		case err == nil:
			*target = v
		case !gone(err):
			return err
		}
	}
	return nil
}

// optional is keyed without the demand that every key is there, nor the file.
func optional(dir, name string, into map[string]*uint64) error {
	err := keyed(dir, name, into)
	if errors.Is(err, errMissingKeys) || gone(err) {
		return nil
	}
	return err
}

// openFiles counts the descriptors of processes, and the sockets among them; a
// process that has ended has none.
func openFiles(pids []int) (files, sockets uint64, err error) {
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		names, err := readNames(dir)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return 0, 0, fmt.Errorf("count descriptors: %w", err)
		}
		for _, name := range names {
			target, err := os.Readlink(dir + "/" + name)
			if err != nil {
				continue // closed since
			}
			files++
			if strings.HasPrefix(target, "socket:") {
				sockets++
			}
		}
	}
	return files, sockets, nil
}

func readNames(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return f.Readdirnames(-1)
}

// maxOpenFiles is a process's soft RLIMIT_NOFILE.
//
// Errors: errdefs.ErrNotFound without such a process.
func maxOpenFiles(pid int) (uint64, error) {
	var limit unix.Rlimit
	err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit)
	if errors.Is(err, unix.ESRCH) {
		return 0, fmt.Errorf("limits of process %d: %w: %w", pid, err, errdefs.ErrNotFound)
	}
	return limit.Cur, err
}

// deviceNames remembers "/dev/NAME" of block devices, by number.
var deviceNames sync.Map

// deviceName is a block device's name, "" for one that has none (any more).
func deviceName(d device) string {
	if name, ok := deviceNames.Load(d); ok {
		return name.(string)
	}
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", d.major, d.minor))
	if err != nil {
		return ""
	}
	name := "/dev/" + filepath.Base(link)
	deviceNames.Store(d, name)
	return name
}

// deviceOf is the block device that a path's filesystem is on, "" if on none.
func deviceOf(path string) string {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return ""
	}
	return deviceName(device{unix.Major(st.Dev), unix.Minor(st.Dev)})
}
