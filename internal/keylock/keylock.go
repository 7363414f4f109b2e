// Package keylock serializes the operations on one ID without holding up those
// on any other.
package keylock

import (
	"context"
	"sync"
)

// Locker is a set of locks by key. The zero value is ready; a key costs nothing
// while nobody holds or awaits it.
type Locker struct {
	mu   sync.Mutex // guards keys and every entry's users
	keys map[string]*entry
}

type entry struct {
	held  chan struct{} // holds one token while locked
	users int           // holders and waiters
}

// Lock waits for key until ctx ends, and returns the function that gives it
// back. The error is the context's.
func (l *Locker) Lock(ctx context.Context, key string) (unlock func(), err error) {
	l.mu.Lock()
	e := l.keys[key]
	if e == nil {
		if l.keys == nil {
			l.keys = make(map[string]*entry)
		}
		e = &entry{held: make(chan struct{}, 1)}
		l.keys[key] = e
	}
	e.users++
	l.mu.Unlock()

	select {
	case e.held <- struct{}{}:
		return func() { <-e.held; l.leave(key, e) }, nil
	case <-ctx.Done():
		l.leave(key, e)
		return nil, context.Cause(ctx)
	}
}

func (l *Locker) leave(key string, e *entry) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e.users--; e.users == 0 {
		delete(l.keys, key)
	}
}
