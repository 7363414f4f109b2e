package janitor

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
)

// shelf holds what is left over.
type shelf struct {
	mu   sync.Mutex
	left []string
}

func (s *shelf) list() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.left)
}

func (s *shelf) change(f func([]string) []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = f(s.left)
}

// One leftover that hangs holds back no other; a wake-up finds new ones; Close
// ends what hangs.
func TestJanitor(t *testing.T) {
	s := &shelf{left: []string{"hangs", "a", "b"}}
	given := make(chan string, 10)
	j := Start(s.list, func(ctx context.Context, id string) error {
		if id == "hangs" {
			<-ctx.Done()
			return ctx.Err()
		}
		s.change(func(left []string) []string { return slices.DeleteFunc(left, func(l string) bool { return l == id }) })
		given <- id
		return nil
	})
	if got := []string{<-given, <-given}; !slices.Contains(got, "a") || !slices.Contains(got, "b") {
		t.Errorf("given back %q while one hangs", got)
	}
	j.Close()
	if left := s.list(); !slices.Equal(left, []string{"hangs"}) {
		t.Errorf("left over: %q", left)
	}
}

func TestWake(t *testing.T) {
	s := new(shelf)
	given := make(chan string)
	j := Start(s.list, func(_ context.Context, id string) error {
		s.change(func([]string) []string { return nil })
		given <- id
		return nil
	})
	defer j.Close()
	s.change(func([]string) []string { return []string{"late"} })
	j.Wake()
	if id := <-given; id != "late" {
		t.Errorf("given back %q", id)
	}
}

func TestSweepTellsWhatRemains(t *testing.T) {
	works := false
	j := &Janitor{leftovers: func() []string { return []string{"x"} }, release: func(context.Context, string) error {
		if !works {
			return errors.New("not yet")
		}
		return nil
	}}
	if j.Sweep(t.Context()) {
		t.Error("a failed release counts as done")
	}
	if works = true; !j.Sweep(t.Context()) {
		t.Error("a good release counts as failed")
	}
}
