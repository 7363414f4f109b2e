// Package flight runs an operation once for all who ask for it at the same time,
// and to its end even when they stop waiting.
//
// A kubelet gives up on a call after two minutes and asks again. The operation
// it gave up on must neither be cut in two nor run beside its own retry: the
// retry joins it.
package flight

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
)

// Group is a set of operations by key. Its zero value has no time limit.
type Group struct {
	// Limit bounds each operation, which no caller's deadline does.
	Limit time.Duration

	group singleflight.Group

	mu      sync.Mutex    // guards what follows
	waiting int           // callers whose operation is not over, those that gave up too
	idle    chan struct{} // closed when waiting falls to 0; nil unless somebody waits for that
}

func (g *Group) enter() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.waiting++
}

func (g *Group) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.waiting--; g.waiting == 0 && g.idle != nil {
		close(g.idle)
		g.idle = nil
	}
}

// Do runs fn, or joins the fn that runs under the same key, and waits for its
// result until ctx ends. fn gets a context with the caller's values and without
// its deadline.
func Do[T any](ctx context.Context, g *Group, key string, fn func(context.Context) (T, error)) (T, error) {
	g.enter()
	done := g.group.DoChan(key, func() (any, error) {
		ctx := context.WithoutCancel(ctx)
		if g.Limit > 0 {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, g.Limit)
			defer cancel()
		}
		return fn(ctx)
	})
	result := make(chan singleflight.Result, 1)
	go func() {
		defer g.leave()
		result <- <-done
	}()
	select {
	case r := <-result:
		v, _ := r.Val.(T)
		return v, r.Err
	case <-ctx.Done():
		var zero T
		return zero, context.Cause(ctx)
	}
}

// Wait returns when no operation runs any more, or with the context's error.
func (g *Group) Wait(ctx context.Context) error {
	g.mu.Lock()
	if g.waiting == 0 {
		g.mu.Unlock()
		return nil
	}
	if g.idle == nil {
		g.idle = make(chan struct{})
	}
	idle := g.idle
	g.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
