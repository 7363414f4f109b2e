package cni

import (
	"context"
	"sync"
)

// gate lets any number of ADDs and DELs in together, and GC in alone, as the
// CNI spec asks. Who waits for GC's turn holds nobody up: a GC that never finds
// a quiet moment gives up at its deadline, the pods go on.
type gate struct {
	mu      sync.Mutex
	inside  int           // -1: one alone
	changed chan struct{} // closed and replaced when inside falls to 0
}

// enter waits until nobody is inside alone.
func (g *gate) enter(ctx context.Context) error {
	return g.wait(ctx, func() bool { return g.inside >= 0 }, func() { g.inside++ })
}

// enterAlone waits until nobody is inside.
func (g *gate) enterAlone(ctx context.Context) error {
	return g.wait(ctx, func() bool { return g.inside == 0 }, func() { g.inside = -1 })
}

func (g *gate) wait(ctx context.Context, free func() bool, take func()) error {
	for {
		g.mu.Lock()
		if free() {
			take()
			g.mu.Unlock()
			return nil
		}
		if g.changed == nil {
			g.changed = make(chan struct{})
		}
		changed := g.changed
		g.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// leave undoes either way of entering.
func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.inside--; g.inside < 0 {
		g.inside = 0
	}
	if g.inside == 0 && g.changed != nil {
		close(g.changed)
		g.changed = nil
	}
}

// podLocks holds one lock for each pod that is being worked on.
type podLocks struct {
	mu   sync.Mutex
	held map[string]chan struct{} // closed on unlock
}

// lock waits for the pod's lock, and gives its unlock.
func (l *podLocks) lock(ctx context.Context, id string) (unlock func(), err error) {
	for {
		l.mu.Lock()
		busy, taken := l.held[id]
		if !taken {
			mine := make(chan struct{})
			if l.held == nil {
				l.held = make(map[string]chan struct{})
			}
			l.held[id] = mine
			l.mu.Unlock()
			return func() {
				l.mu.Lock()
				delete(l.held, id)
				l.mu.Unlock()
				close(mine)
			}, nil
		}
		l.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
