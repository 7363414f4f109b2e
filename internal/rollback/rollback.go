// Package rollback undoes what an operation has taken when a later step fails.
package rollback

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Limit is how long all undos of one operation may take together.
const Limit = time.Minute

// Stack holds the undos of the steps done so far. The zero value is empty and
// ready; it is used by one goroutine.
type Stack struct {
	undos []undo
}

type undo struct {
	what string
	run  func(context.Context) error
}

// Push registers the undo of a step that has just succeeded. Undos are the
// idempotent steps that Stop and Remove use.
func (s *Stack) Push(what string, run func(context.Context) error) {
	s.undos = append(s.undos, undo{what, run})
}

// Settle drops the undos when err is nil; otherwise it runs them, last first,
// on a context that outlives the caller's deadline, and returns err joined with
// what could not be undone.
func (s *Stack) Settle(ctx context.Context, err error) error {
	undos := s.undos
	s.undos = nil
	if err == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), Limit)
	defer cancel()
	for i := len(undos) - 1; i >= 0; i-- {
		if uerr := undos[i].run(ctx); uerr != nil {
			err = errors.Join(err, fmt.Errorf("undo (%s): %w", undos[i].what, uerr))
		}
	}
	return err
}
