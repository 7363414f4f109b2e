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
	wg    sync.WaitGroup
}

// Do runs fn, or joins the fn that runs under the same key, and waits for its
// result until ctx ends. fn gets a context with the caller's values and without
// its deadline.
func Do[T any](ctx context.Context, g *Group, key string, fn func(context.Context) (T, error)) (T, error) {
	g.wg.Add(1)
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
		defer g.wg.Done()
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
	idle := make(chan struct{})
	go func() {
		g.wg.Wait()
		close(idle)
	}()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
