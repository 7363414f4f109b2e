package timeline

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestOperationWithAStepThatFails(t *testing.T) {
	var b Book
	ctx, end := b.Begin(context.Background(), "RunPodSandbox", Subject{Pod: "a"})
	if found := b.Find(func(s Subject) bool { return s.Pod == "a" }); len(found) != 1 || !found[0].Running {
		t.Errorf("while it runs: %+v", found)
	}
	_ = Do(ctx, "files", func() error { return nil })
	broken := errors.New("no route")
	end(Do(ctx, "network", func() error { return broken }))
	found := b.Find(func(s Subject) bool { return s.Pod == "a" })
	if len(found) != 1 || found[0].Running || found[0].Error != "no route" || len(found[0].Steps) != 2 {
		t.Fatalf("%+v", found)
	}
	if s := found[0].Steps[1]; s.Name != "network" || s.Error != "no route" || s.After < found[0].Steps[0].Took {
		t.Errorf("%+v", s)
	}
}

func TestBounded(t *testing.T) {
	var b Book
	for i := range most + 10 {
		_, end := b.Begin(context.Background(), "x", Subject{ID: fmt.Sprint(i)})
		end(nil)
	}
	all := b.Find(func(Subject) bool { return true })
	if len(all) != most || all[0].ID != "10" {
		t.Errorf("%d remembered, the oldest is %s", len(all), all[0].ID)
	}
}

func TestNobodyRemembers(t *testing.T) {
	var b *Book
	ctx, end := b.Begin(context.Background(), "x", Subject{})
	end(Do(ctx, "step", func() error { return nil }))
}
