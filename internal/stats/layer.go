package stats

import (
	"context"
	"sync"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// layerAge is how old a layer's size may be before it is measured again, and
	// layerShare the part of the time that one layer's measurements may take: a
	// layer of a million files is measured less often.
	layerAge   = 10 * time.Second
	layerShare = 20
	// layerWait is how long one request waits for measurements, however many
	// layers it asks for; later requests get what they find.
	layerWait = 200 * time.Millisecond
	// layerWalks is how many layers are measured at a time.
	layerWalks = 2
)

// layers remembers the sizes of writable layers.
type layers struct {
	measure    func(context.Context, string) (Disk, error)
	mountpoint string
	slots      chan struct{}

	ctx  context.Context // ends with close; bounds the walks, which outlive requests
	stop context.CancelFunc
	done sync.WaitGroup

	mu     sync.Mutex
	closed bool
	byID   map[string]*layer
}

type layer struct {
	last    *runtime.FilesystemUsage // nil before the first measurement
	due     time.Time                // when to measure again
	running chan struct{}            // closed when the measurement under way ends; nil without
}

func newLayers(measure func(context.Context, string) (Disk, error), mountpoint string) *layers {
	ctx, stop := context.WithCancel(context.Background())
	return &layers{
		measure: measure, mountpoint: mountpoint, slots: make(chan struct{}, layerWalks),
		ctx: ctx, stop: stop, byID: make(map[string]*layer),
	}
}

// get gives the last known size, measured anew if it is old and that is done by
// the given time; nil when it was never measured. The result is shared: read only.
func (l *layers) get(ctx context.Context, id string, by time.Time) *runtime.FilesystemUsage {
	running := l.refresh(id)
	if running != nil {
		wait := time.NewTimer(time.Until(by))
		defer wait.Stop()
		select {
		case <-running:
		case <-wait.C:
		case <-ctx.Done():
		}
	}
	return l.last(id)
}

// peek gives the last known size, and has an old one measured anew meanwhile; it
// waits only for the first of all, and no longer than layerWait.
func (l *layers) peek(id string) *runtime.FilesystemUsage {
	running := l.refresh(id)
	if last := l.last(id); last != nil || running == nil {
		return last
	}
	return l.get(l.ctx, id, time.Now().Add(layerWait))
}

func (l *layers) last(id string) *runtime.FilesystemUsage {
	l.mu.Lock()
	defer l.mu.Unlock()
	if one := l.byID[id]; one != nil {
		return one.last
	}
	return nil
}

// sum adds up the last known sizes of some layers, and has old ones measured
// anew meanwhile; it waits for none.
func (l *layers) sum(ids []string) Disk {
	var total Disk
	for _, id := range ids {
		l.refresh(id)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, id := range ids {
		if one := l.byID[id]; one != nil && one.last != nil {
			total.Bytes += int64(one.last.GetUsedBytes().GetValue())
			total.Inodes += int64(one.last.GetInodesUsed().GetValue())
		}
	}
	return total
}

// refresh starts a measurement if the last one is old, and gives the channel
// that its end closes; nil when there is nothing to wait for.
func (l *layers) refresh(id string) chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	one := l.byID[id]
	if one == nil {
		one = &layer{}
		l.byID[id] = one
	}
	if one.running != nil || l.closed || time.Now().Before(one.due) {
		return one.running
	}
	running := make(chan struct{})
	one.running = running
	l.done.Go(func() { l.walk(id, one, running) })
	return running
}

// walk measures one layer. An error leaves the last size: the layer is being
// removed, as a rule, and the next measurement tells.
func (l *layers) walk(id string, one *layer, running chan struct{}) {
	defer close(running)
	var disk Disk
	var err error
	var took time.Duration
	select {
	case l.slots <- struct{}{}:
		start := time.Now()
		disk, err = l.measure(l.ctx, id)
		took = time.Since(start)
		<-l.slots
	case <-l.ctx.Done():
		err = l.ctx.Err()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	one.running = nil
	one.due = time.Now().Add(max(layerAge, layerShare*took))
	if err != nil {
		return
	}
	one.last = &runtime.FilesystemUsage{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &runtime.FilesystemIdentifier{Mountpoint: l.mountpoint},
		UsedBytes:  value(uint64(max(disk.Bytes, 0))),
		InodesUsed: value(uint64(max(disk.Inodes, 0))),
	}
}

func (l *layers) forget(id string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.byID, id)
}

func (l *layers) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.stop()
	l.done.Wait()
}
