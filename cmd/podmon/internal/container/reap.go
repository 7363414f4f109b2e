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
// A zombie somebody waits for is gone within microseconds. So what is a zombie
// at two looks reapPause apart is waited for by nobody.
type reaper struct {
	mu       sync.Mutex
	suspects map[*Container]struct{} // running, with an exec that failed oddly
	until    time.Time               // look at least until then
	running  bool
}

const (
	reapPause = time.Second
	// reapAfter is how long helpers of a failed start may take to end.
	reapAfter = 10 * time.Second
)

// suspect has the reaper look for lost children of c until c has exited, and
// for a while in any case.
func (r *reaper) suspect(c *Container) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.suspects == nil {
		r.suspects = map[*Container]struct{}{}
	}
	r.suspects[c] = struct{}{}
	r.until = time.Now().Add(reapAfter)
	if !r.running {
		r.running = true
		go r.run()
	}
}

// clear ends the suspicion against a container that has exited, or never began.
func (r *reaper) clear(c *Container) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.suspects, c)
}

func (r *reaper) over() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.suspects) > 0 || time.Now().Before(r.until) {
		return false
	}
	r.running = false
	return true
}

func (r *reaper) run() {
	var before map[wire.Process]struct{}
	for !r.over() {
		now := zombies()
		for p := range now {
			if _, still := before[p]; !still {
				continue
			}
			if _, err := unix.Wait4(p.PID, nil, unix.WNOHANG, nil); err == nil {
				logrus.WithField("pid", p.PID).Info("reaped a lost helper")
			}
		}
		before = now
		time.Sleep(reapPause)
	}
}

// zombies are our children that have ended and not been waited for.
func zombies() map[wire.Process]struct{} {
	found := map[wire.Process]struct{}{}
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
