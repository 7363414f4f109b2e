package stats

import (
	"sync"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// window is the shortest time that a CPU rate is averaged over. Several
	// callers poll at once (kubelet's eviction and summary, crictl): a rate over
	// the milliseconds between two of them would be noise.
	window = time.Second
	// firstWindow does for the first rate of all, which is worth having early.
	firstWindow = 100 * time.Millisecond
)

// rates turns CPU time into CPU rates. The zero value is ready.
type rates struct {
	mu   sync.Mutex
	byID map[string]*sample
}

// sample is where the next rate counts from, and the last rate.
type sample struct {
	at    time.Time
	total uint64 // nanoseconds
	rate  *uint64
}

// observe notes a reading and gives the rate in nanoseconds a second: the growth
// since the last sample, or the last rate again while that sample is younger
// than window. nil means there is none yet.
func (r *rates) observe(id string, at time.Time, total uint64) *runtime.UInt64Value {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, ok := r.byID[id]
	if !ok || total < s.total { // new, or a cgroup made anew under the same ID
		if r.byID == nil {
			r.byID = make(map[string]*sample)
		}
		r.byID[id] = &sample{at: at, total: total}
		return nil
	}
	elapsed := at.Sub(s.at)
	if elapsed >= window || (s.rate == nil && elapsed >= firstWindow) {
		rate := uint64(float64(total-s.total) / elapsed.Seconds())
		s.at, s.total, s.rate = at, total, &rate
	}
	if s.rate == nil {
		return nil
	}
	return value(*s.rate)
}

func (r *rates) forget(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.byID, id)
}
