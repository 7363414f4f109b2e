// Package janitor gives back, in the background, what an operation could not.
package janitor

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	// rest is between two tries.
	rest = 10 * time.Second
	// hands is how many leftovers are worked on at a time: one whose plugin
	// hangs must not hold back all others.
	hands = 8
)

// Janitor tries again and again until nothing is left over.
type Janitor struct {
	leftovers func() []string
	release   func(ctx context.Context, id string) error

	wake chan struct{}
	stop context.CancelFunc
	done sync.WaitGroup
}

// Start begins with what is left over now. leftovers lists IDs; release gives one
// back, and says in the log why it could not.
func Start(leftovers func() []string, release func(ctx context.Context, id string) error) *Janitor {
	ctx, stop := context.WithCancel(context.Background())
	j := &Janitor{leftovers: leftovers, release: release, wake: make(chan struct{}, 1), stop: stop}
	j.done.Go(func() { j.run(ctx) })
	return j
}

// Wake makes the janitor look again now.
func (j *Janitor) Wake() {
	select {
	case j.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// Close ends the janitor, and the try that is under way by its context.
func (j *Janitor) Close() {
	j.stop()
	j.done.Wait()
}

func (j *Janitor) run(ctx context.Context) {
	for {
		var again <-chan time.Time
		if !j.Sweep(ctx) {
			again = time.After(rest)
		}
		select {
		case <-ctx.Done():
			return
		case <-j.wake:
		case <-again:
		}
	}
}

// Sweep tries every leftover once and tells whether none remains.
func (j *Janitor) Sweep(ctx context.Context) (clean bool) {
	var g errgroup.Group
	g.SetLimit(hands)
	for _, id := range j.leftovers() {
		g.Go(func() error { return j.release(ctx, id) })
	}
	return g.Wait() == nil
}
