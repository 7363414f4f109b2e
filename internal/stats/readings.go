package stats

import (
	"sync"
	"time"
)

// fresh is how long a reading of a cgroup's files does for the next caller:
// kubelet's eviction, summary and metrics ask for the same pods at about the
// same moment. The timestamps are those of the reading.
const fresh = 200 * time.Millisecond

// readings remembers the last reading of each cgroup. Callers that come while
// one is read wait for it and share it. The zero value is ready.
type readings struct {
	mu   sync.Mutex
	byID map[string]*reading
}

type reading struct {
	mu    sync.Mutex // held while the files are read
	at    time.Time  // when they were; zero: never
	path  string
	usage usage
}

// of returns what read gave for id and path, if that is fresh, or has it give
// something anew. Errors are not remembered. The result is shared: read only.
func (r *readings) of(id, path string, read func() (usage, error)) (usage, error) {
	one := r.get(id)
	one.mu.Lock()
	defer one.mu.Unlock()
	// Without a CPU rate kubelet makes one of two readings, and complains of two
	// with the same time.
	rated := one.usage.cpu == nil || one.usage.cpu.UsageNanoCores != nil
	if rated && one.path == path && !one.at.IsZero() && time.Since(one.at) < fresh {
		return one.usage, nil
	}
	u, err := read()
	if err != nil {
		return usage{}, err
	}
	one.at, one.path, one.usage = time.Now(), path, u
	return u, nil
}

func (r *readings) get(id string) *reading {
	r.mu.Lock()
	defer r.mu.Unlock()
	one := r.byID[id]
	if one == nil {
		if r.byID == nil {
			r.byID = make(map[string]*reading)
		}
		one = new(reading)
		r.byID[id] = one
	}
	return one
}

func (r *readings) forget(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byID, id)
}
