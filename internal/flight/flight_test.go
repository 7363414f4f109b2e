package flight

import (
	"context"
	"errors"
	"sync"
	"testing"
)

func TestRetryJoinsWhatItsCallerGaveUp(t *testing.T) {
	var (
		g       Group
		started = make(chan struct{})
		release = make(chan struct{})
		runs    int
	)
	op := func(ctx context.Context) (string, error) {
		runs++
		close(started)
		<-release
		return "id", ctx.Err()
	}
	ctx, cancel := context.WithCancel(context.Background())
	gaveUp := make(chan error, 1)
	go func() {
		_, err := Do(ctx, &g, "run/a", op)
		gaveUp <- err
	}()
	<-started
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Fatalf("caller got %v", err)
	}
	// Do has joined the operation by the time that it waits on its context.
	var once sync.Once
	id, err := Do(onWait{context.Background(), func() { once.Do(func() { close(release) }) }}, &g, "run/a", op)
	if err != nil || id != "id" || runs != 1 {
		t.Fatalf("id %q, %v, after %d runs", id, err, runs)
	}
	if err := g.Wait(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// onWait is a context that tells when somebody waits on it.
type onWait struct {
	context.Context
	waited func()
}

func (c onWait) Done() <-chan struct{} {
	c.waited()
	return c.Context.Done()
}
