package container

import (
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// reaper reaps children that libcontainer has lost track of.
//
// A start or an exec that is killed half way leaves helpers of nsexec behind,
// which are podmon's children (CLONE_PARENT) and which nobody waits for: runc
// would end and leave them to init. In the container's PID namespace such a zombie
// keeps PID 1 from ever ending, because the kernel lets a namespace's init go
// last (zap_pid_ns_processes).
//
// A zombie is lost when it is nobody's: not a process that is owned, and not one
// of a start or exec that was in flight when it was first seen and still is. (What
// has begun later has not made it.)
type reaper struct {
	mu       sync.Mutex
	flights  map[uint64]struct{} // numbers of the starts and execs in flight
	last     uint64
	owned    map[int]int // PIDs that somebody waits for, each how often
	until    time.Time   // look at least until then
	running  bool
	sighting map[wire.Process]uint64 // the last flight at that time; the loop's own
}

const (
	reapPause = time.Second
	// reapAfter is how long helpers of a failed start may take to end.
	reapAfter = 10 * time.Second
)

func newReaper() *reaper {
	return &reaper{flights: map[uint64]struct{}{}, owned: map[int]int{}}
}

// begin keeps the reaper from what a start or exec makes, until the returned
// function is called; what is to stay must be owned by then.
func (r *reaper) begin() (end func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last++
	n := r.last
	r.flights[n] = struct{}{}
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.flights, n)
	}
}

// own keeps the reaper from a process whose owner waits for it.
func (r *reaper) own(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.owned[pid]++
}

// disown is called when its owner has waited for the process.
func (r *reaper) disown(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.owned[pid]--; r.owned[pid] <= 0 {
		delete(r.owned, pid)
	}
}

// look has the reaper look for lost children for a while.
func (r *reaper) look() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.until = time.Now().Add(reapAfter)
	if !r.running {
		r.running = true
		go r.run()
	}
}

func (r *reaper) over() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Now().Before(r.until) {
		return false
	}
	r.running = false
	return true
}

func (r *reaper) run() {
	for !r.over() {
		for p := range r.lost(zombies()) {
			if _, err := unix.Wait4(p.PID, nil, unix.WNOHANG, nil); err == nil {
				logrus.WithField("pid", p.PID).Info("reaped a lost helper")
			}
		}
		time.Sleep(reapPause)
	}
}

// lost returns those of the zombies that are nobody's.
func (r *reaper) lost(now map[wire.Process]struct{}) map[wire.Process]struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	lost, sighting := map[wire.Process]struct{}{}, map[wire.Process]uint64{}
	for p := range now {
		if r.owned[p.PID] > 0 {
			continue
		}
		seen, before := r.sighting[p]
		if !before {
			seen = r.last
		}
		sighting[p] = seen
		if !r.flownBefore(seen) {
			lost[p] = struct{}{}
		}
	}
	r.sighting = sighting
	return lost
}

// flownBefore tells whether a flight up to that number goes on; mu is held.
func (r *reaper) flownBefore(number uint64) bool {
	for n := range r.flights {
		if n <= number {
			return true
		}
	}
	return false
}

// zombies are our children that have ended and not been waited for. Whether there
// is one at all the kernel tells without a look at every process.
func zombies() map[wire.Process]struct{} {
	found := map[wire.Process]struct{}{}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err != nil || info.Signo == 0 {
		return found
	}
	proc, err := os.Open("/proc")
	if err != nil {
		return found
	}
	defer proc.Close()
	names, _ := proc.Readdirnames(-1) // what could be read is worth a look
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		if p, ok := wire.ZombieChild(pid, os.Getpid()); ok {
			found[p] = struct{}{}
		}
	}
	return found
}
