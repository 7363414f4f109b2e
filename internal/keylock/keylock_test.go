package keylock

import (
	"context"
	"errors"
	"sync"
	"testing"
)

func TestLockExcludesOneKeyOnly(t *testing.T) {
	var l Locker
	ctx := context.Background()
	unlock, err := l.Lock(ctx, "a")
	if err != nil {
		t.Fatal(err)
	}
	other, err := l.Lock(ctx, "b")
	if err != nil {
		t.Fatal(err)
	}
	other()
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := l.Lock(gone, "a"); !errors.Is(err, context.Canceled) {
		t.Fatalf("a held key was locked again: %v", err)
	}
	unlock()
	if len(l.keys) != 0 {
		t.Fatalf("keys left: %v", l.keys)
	}
}

func TestLockCounts(t *testing.T) {
	var (
		l  Locker
		n  int
		wg sync.WaitGroup
	)
	for range 50 {
		wg.Go(func() {
			unlock, err := l.Lock(context.Background(), "k")
			if err != nil {
				t.Error(err)
				return
			}
			defer unlock()
			n++
		})
	}
	wg.Wait()
	if n != 50 || len(l.keys) != 0 {
		t.Fatalf("n = %d, keys = %d", n, len(l.keys))
	}
}
