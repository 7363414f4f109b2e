package roster

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
)

// ReleaseLimit bounds how long what a failed operation has taken may take to give
// back, before that is left to the janitor.
const ReleaseLimit = 2 * time.Minute

// Update changes an entry's record: a copy is edited, written, and then published.
func (r *Roster[R, S]) Update(e *Entry[R], edit func(*R)) error {
	c := &r.cfg.Class
	before := e.Get()
	after := new(R)
	*after = *before
	edit(after)
	f := c.Fields(after)
	raw, err := c.Encode(after)
	if err == nil {
		err = r.cfg.Records.Put(c.Kind, f.ID, raw)
	}
	if err != nil && *f.State != c.End {
		return err
	}
	if err != nil {
		r.log(after).WithError(err).Errorf("the end of a %s could not be recorded", c.Noun)
	}
	e.record.Store(after)
	if *f.State == c.End {
		e.end()
	}
	if r.cfg.Changed != nil {
		r.cfg.Changed(before, after)
	}
	return nil
}

// Move is an Update that takes the entry to another state, if it may go there.
func (r *Roster[R, S]) Move(e *Entry[R], to S, edit func(*R)) error {
	c := &r.cfg.Class
	f := c.Fields(e.Get())
	if !slices.Contains(c.Next[*f.State], to) {
		return fmt.Errorf("%s %s cannot go from %s to %s: %w", c.Noun, f.ID, *f.State, to, errdefs.ErrFailedPrecondition)
	}
	return r.Update(e, func(rec *R) {
		*c.Fields(rec).State = to
		if edit != nil {
			edit(rec)
		}
	})
}

// Drop forgets an entry for good, whose things are given back.
func (r *Roster[R, S]) Drop(e *Entry[R]) error {
	rec := e.Get()
	if err := r.cfg.Records.Delete(r.cfg.Class.Kind, r.id(rec)); err != nil {
		return err
	}
	known := r.Exact(r.id(rec)) != nil
	r.Forget(rec)
	if known && r.cfg.Changed != nil {
		r.cfg.Changed(rec, nil)
	}
	return nil
}

// GiveUp releases what an entry has taken that could not be made, forgets it, and
// returns the cause. Where the release fails its name is free, and the janitor
// goes on with it.
func (r *Roster[R, S]) GiveUp(ctx context.Context, e *Entry[R], cause error, release func(context.Context, *R) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), ReleaseLimit)
	defer cancel()
	c := &r.cfg.Class
	rec := e.Get()
	err := release(ctx, rec)
	if err == nil {
		err = r.cfg.Records.Delete(c.Kind, r.id(rec))
	}
	if err == nil {
		r.Forget(rec)
		return cause
	}
	r.Unreserve(rec)
	r.log(rec).WithError(err).Errorf("what a failed %s holds is not all released: will be tried again", c.Noun)
	if uerr := r.Update(e, func(rec *R) { r.fail(rec, cause.Error()) }); uerr != nil {
		r.log(rec).WithError(uerr).Errorf("record of a failed %s", c.Noun)
	}
	r.janitor.Wake()
	return cause
}
