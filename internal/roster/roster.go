// Package roster keeps what a manager manages, be it sandboxes or containers: the
// record of each as last published, the names they have reserved, and the order of
// the operations on each.
//
//	         commit            end
//	Making ---------> ... --------------> End
//	   |                                   | Drop
//	   | GiveUp                            v
//	   +-----------------------------> (forgotten)
//
// A change of a record is made on a copy, which is written before it is published:
// memory is never ahead of what a restart would find. The one exception is an end.
// That is a fact, not a wish, and on a full disk too it must be seen, or what has
// ended could not be removed; a restart finds it out again.
//
// Locks: mu guards the indexes and is never held over I/O. Lock orders the
// operations on one ID, and whoever calls Update, Move, GiveUp or Drop holds it.
// Readers take neither: they read the last published record.
package roster

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/ids"
	"github.com/podshim/podshim/internal/janitor"
	"github.com/podshim/podshim/internal/keylock"
	"github.com/podshim/podshim/internal/state"
)

// Records keep what must outlive the daemon; *state.Store does.
type Records interface {
	Put(kind state.Kind, id string, value []byte) error
	Delete(kind state.Kind, id string) error
	Take(kind state.Kind) map[string][]byte
}

// Class is what a Roster has to know of its records, R, and their states, S.
type Class[R any, S ~string] struct {
	Kind state.Kind
	Noun string // what messages call one
	// Making is the state before the commit, End that of what has ended, and Next
	// holds every legal move.
	Making, End S
	Next        map[S][]S
	// Fields points at what every record has.
	Fields func(*R) Fields[S]
	// Parent is what In finds entries by; nil where nothing is looked for so.
	Parent func(*R) string
	// Shown tells whether clients see it.
	Shown     func(*R) bool
	Encode    func(*R) ([]byte, error)
	Decode    func([]byte) (*R, error)
	LogFields func(*R) logrus.Fields
}

// Fields are those of a record that a Roster reads and sets.
type Fields[S ~string] struct {
	ID, Name string
	State    *S
	// Failed is set where making it did not succeed: its name is free, and what it
	// holds is still to be given back. Why says, for operators, why it has ended.
	Failed *bool
	Why    *string
}

// Config is what a Roster is made of.
type Config[R any, S ~string] struct {
	Class   Class[R, S]
	Records Records
	// Changed is called, if set, after an entry has got a new record, or nil when
	// it was removed; it must not block.
	Changed func(before, after *R)
	// Forgotten, if set, gives back what is the process's own with the last record.
	Forgotten func(*R)
	Log       *logrus.Entry
}

// Entry is one sandbox or container.
type Entry[R any] struct {
	record atomic.Pointer[R]
	once   sync.Once
	ended  chan struct{}
}

// Get returns the record as last published; nobody changes it.
func (e *Entry[R]) Get() *R { return e.record.Load() }

// Done is closed when the end has been published, or the entry is forgotten.
func (e *Entry[R]) Done() <-chan struct{} { return e.ended }

func (e *Entry[R]) end() { e.once.Do(func() { close(e.ended) }) }

// Roster holds all entries of a class.
type Roster[R any, S ~string] struct {
	cfg     Config[R, S]
	ops     keylock.Locker
	janitor *janitor.Janitor

	mu       sync.RWMutex // guards what follows
	byID     map[string]*Entry[R]
	byParent map[string]map[string]*Entry[R]
	names    map[string]string // reserved name to ID
	// unreadable are the IDs of records that make no sense: what they stand for
	// may run, and is nobody else's.
	unreadable map[string]bool
}

// New returns an empty Roster; Load fills it.
func New[R any, S ~string](cfg Config[R, S]) *Roster[R, S] {
	return &Roster[R, S]{
		cfg:        cfg,
		byID:       make(map[string]*Entry[R]),
		byParent:   make(map[string]map[string]*Entry[R]),
		names:      make(map[string]string),
		unreadable: make(map[string]bool),
	}
}

// Load takes over the records. What was being made has failed, and is left to the
// janitor; recheck brings every other entry up to what happened meanwhile.
func (r *Roster[R, S]) Load(recheck func(*Entry[R]) error) error {
	c := &r.cfg.Class
	for id, raw := range r.cfg.Records.Take(c.Kind) {
		rec, err := c.Decode(raw)
		if err == nil && c.Fields(rec).ID != id {
			err = fmt.Errorf("it is the record of %q", c.Fields(rec).ID)
		}
		if err != nil {
			r.cfg.Log.WithError(err).WithField("id", id).Errorf("the record of a %s cannot be read: what it stands for is left alone", c.Noun)
			r.unreadable[id] = true
			continue
		}
		e := r.Add(rec)
		f := c.Fields(rec)
		if *f.State == c.Making {
			err = r.Update(e, func(rec *R) { r.fail(rec, "podshim was stopped while it made this") })
		} else {
			if !*f.Failed {
				r.names[f.Name] = id
			}
			err = recheck(e)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fail makes a record that of something whose making did not succeed.
func (r *Roster[R, S]) fail(rec *R, why string) {
	f := r.cfg.Class.Fields(rec)
	*f.State, *f.Failed, *f.Why = r.cfg.Class.End, true, why
}

// StartJanitor has what still holds something given back in the background, again
// and again until it is. The caller closes the Janitor.
func (r *Roster[R, S]) StartJanitor(leftover func(*R) bool, release func(context.Context, *Entry[R]) error) *janitor.Janitor {
	list := func() (found []string) {
		for _, e := range r.All() {
			if leftover(e.Get()) {
				found = append(found, r.id(e.Get()))
			}
		}
		return found
	}
	r.janitor = janitor.Start(list, func(ctx context.Context, id string) error {
		e := r.Exact(id)
		if e == nil {
			return nil
		}
		err := release(ctx, e)
		if err != nil && ctx.Err() == nil {
			r.log(e.Get()).WithError(err).Warnf("what a failed %s holds is not all released: will be tried again", r.cfg.Class.Noun)
		}
		return err
	})
	return r.janitor
}

func (r *Roster[R, S]) log(rec *R) *logrus.Entry {
	return r.cfg.Log.WithFields(r.cfg.Class.LogFields(rec))
}

func (r *Roster[R, S]) id(rec *R) string { return r.cfg.Class.Fields(rec).ID }

// Lock waits until no other operation runs on id, or ctx ends.
func (r *Roster[R, S]) Lock(ctx context.Context, id string) (unlock func(), err error) {
	return r.ops.Lock(ctx, id)
}

// Get returns the entry with this ID or unique prefix of an ID, if clients see it.
func (r *Roster[R, S]) Get(id string) (*Entry[R], error) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return ids.Find(r.byID, id, r.cfg.Class.Noun, func(e *Entry[R]) bool { return r.cfg.Class.Shown(e.Get()) })
}

// Exact returns the entry with this ID, also one that clients do not see, or nil.
func (r *Roster[R, S]) Exact(id string) *Entry[R] {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.byID[id]
}

// All returns all entries, in no order.
func (r *Roster[R, S]) All() []*Entry[R] {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return values(r.byID)
}

// In returns all entries of a parent, in no order.
func (r *Roster[R, S]) In(parent string) []*Entry[R] {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return values(r.byParent[parent])
}

// Visible returns the records of those entries that clients see.
func (r *Roster[R, S]) Visible(entries []*Entry[R]) []*R {
	out := make([]*R, 0, len(entries))
	for _, e := range entries {
		if rec := e.Get(); r.cfg.Class.Shown(rec) {
			out = append(out, rec)
		}
	}
	return out
}

func values[R any](m map[string]*Entry[R]) []*Entry[R] {
	all := make([]*Entry[R], 0, len(m))
	for _, e := range m {
		all = append(all, e)
	}
	return all
}

// Owns tells whether id has an entry, or a record that cannot be read.
func (r *Roster[R, S]) Owns(id string) bool {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.byID[id] != nil || r.unreadable[id]
}

// Unreadable returns the IDs of the records that cannot be read.
func (r *Roster[R, S]) Unreadable() []string {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return slices.Collect(maps.Keys(r.unreadable))
}

// Records returns the records of all entries, in no order.
func (r *Roster[R, S]) Records() []*R {
	all := r.All()
	records := make([]*R, len(all))
	for i, e := range all {
		records[i] = e.Get()
	}
	return records
}

// Reserve takes the record's name, or returns the ID of the entry that has it,
// and whether that one is the same by what the caller asks for.
func (r *Roster[R, S]) Reserve(rec *R, same func(held *R) bool) (holder string, isSame bool) {
	f := r.cfg.Class.Fields(rec)
	r.mu.Lock()
	defer r.mu.Unlock()
	holder, taken := r.names[f.Name]
	if !taken {
		r.names[f.Name] = f.ID
		return "", false
	}
	e := r.byID[holder]
	return holder, e != nil && same(e.Get())
}

// Add enters a record. It is not on file before the first Update.
func (r *Roster[R, S]) Add(rec *R) *Entry[R] {
	e := &Entry[R]{ended: make(chan struct{})}
	e.record.Store(rec)
	c := &r.cfg.Class
	f := c.Fields(rec)
	if *f.State == c.End {
		e.end()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.byID[f.ID] = e
	if c.Parent != nil {
		parent := c.Parent(rec)
		if r.byParent[parent] == nil {
			r.byParent[parent] = make(map[string]*Entry[R])
		}
		r.byParent[parent][f.ID] = e
	}
	return e
}

// Unreserve frees the record's name, if it is still this record's.
func (r *Roster[R, S]) Unreserve(rec *R) {
	f := r.cfg.Class.Fields(rec)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.names[f.Name] == f.ID {
		delete(r.names, f.Name)
	}
}

// Forget takes a record out of the indexes and frees its name.
func (r *Roster[R, S]) Forget(rec *R) {
	r.Unreserve(rec)
	id := r.id(rec)
	r.mu.Lock()
	e := r.byID[id]
	delete(r.byID, id)
	if c := &r.cfg.Class; c.Parent != nil {
		parent := c.Parent(rec)
		delete(r.byParent[parent], id)
		if len(r.byParent[parent]) == 0 {
			delete(r.byParent, parent)
		}
	}
	r.mu.Unlock()
	if e != nil {
		e.end()
	}
	if r.cfg.Forgotten != nil {
		r.cfg.Forgotten(rec)
	}
}
