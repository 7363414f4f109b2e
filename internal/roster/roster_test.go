package roster

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/state"
)

type step string

type thing struct {
	ID, Name, Of string
	State        step
	Failed       bool
	Why          string
}

var class = Class[thing, step]{
	Kind: "things", Noun: "thing",
	Making: "making", End: "ended",
	Next: map[step][]step{"making": {"up", "ended"}, "up": {"ended"}},
	Fields: func(t *thing) Fields[step] {
		return Fields[step]{ID: t.ID, Name: t.Name, State: &t.State, Failed: &t.Failed, Why: &t.Why}
	},
	Parent: func(t *thing) string { return t.Of },
	Shown:  func(t *thing) bool { return t.State != "making" },
	Encode: func(t *thing) ([]byte, error) { return json.Marshal(t) },
	Decode: func(raw []byte) (*thing, error) {
		t := new(thing)
		return t, json.Unmarshal(raw, t)
	},
	LogFields: func(t *thing) logrus.Fields { return logrus.Fields{"thing": t.ID} },
}

var errFull = errors.New("full")

// files are records that can be made to fail.
type files struct {
	mu   sync.Mutex
	full bool
	raw  map[string][]byte
}

func (f *files) Put(_ state.Kind, id string, value []byte) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.full {
		return errFull
	}
	f.raw[id] = value
	return nil
}

func (f *files) Delete(_ state.Kind, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.raw, id)
	return nil
}

func (f *files) Take(state.Kind) map[string][]byte { return f.raw }

func (f *files) has(id string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.raw[id] != nil
}

func newRoster(f *files, changed func(before, after *thing)) *Roster[thing, step] {
	log := logrus.New()
	log.SetOutput(io.Discard)
	return New(Config[thing, step]{Class: class, Records: f, Changed: changed, Log: logrus.NewEntry(log)})
}

func never(*thing) bool { return false }

func done[R any](e *Entry[R]) bool {
	select {
	case <-e.Done():
		return true
	default:
		return false
	}
}

// What cannot be written is not published, but for an end: that is a fact.
func TestMemoryIsNotAheadOfTheFiles(t *testing.T) {
	f := &files{raw: map[string][]byte{}}
	var seen []step
	r := newRoster(f, func(_, after *thing) { seen = append(seen, after.State) })
	e := r.Add(&thing{ID: "a", State: "making"})
	f.full = true
	if err := r.Move(e, "up", nil); !errors.Is(err, errFull) || e.Get().State != "making" {
		t.Errorf("on a full disk: %v, and it is %s", err, e.Get().State)
	}
	f.full = false
	if err := r.Move(e, "up", nil); err != nil || done(e) {
		t.Errorf("%v, ended %t", err, done(e))
	}
	f.full = true
	if err := r.Move(e, "ended", nil); err != nil || e.Get().State != "ended" || !done(e) {
		t.Errorf("the end on a full disk: %v, and it is %s, ended %t", err, e.Get().State, done(e))
	}
	if err := r.Move(e, "up", nil); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("from the end: %v", err)
	}
	if !slices.Equal(seen, []step{"up", "ended"}) {
		t.Errorf("published %q", seen)
	}
}

func TestNames(t *testing.T) {
	r := newRoster(&files{raw: map[string][]byte{}}, nil)
	a, b := &thing{ID: "a", Name: "n"}, &thing{ID: "b", Name: "n"}
	if holder, _ := r.Reserve(a, never); holder != "" {
		t.Fatalf("a free name is %q's", holder)
	}
	r.Add(a)
	if holder, same := r.Reserve(b, never); holder != "a" || same {
		t.Errorf("a taken name: %q, %t", holder, same)
	}
	if holder, same := r.Reserve(b, func(held *thing) bool { return held == a }); holder != "a" || !same {
		t.Errorf("a retry: %q, %t", holder, same)
	}
	r.Unreserve(b) // not b's to free
	if holder, _ := r.Reserve(b, never); holder != "a" {
		t.Error("the name was freed by another one")
	}
	r.Forget(a)
	if holder, _ := r.Reserve(b, never); holder != "" {
		t.Error("a forgotten one's name is taken")
	}
}

func TestFindingEntries(t *testing.T) {
	f := &files{raw: map[string][]byte{}}
	r := newRoster(f, nil)
	for _, rec := range []*thing{{ID: "abc", Of: "p", State: "up"}, {ID: "abd", Of: "p", State: "making"}, {ID: "b", Of: "q", State: "up"}} {
		if err := r.Update(r.Add(rec), func(*thing) {}); err != nil {
			t.Fatal(err)
		}
	}
	if e, err := r.Get("a"); err != nil || e.Get().ID != "abc" {
		t.Errorf("by the prefix that one visible entry has: %v", err)
	}
	if _, err := r.Get("abd"); !errdefs.IsNotFound(err) {
		t.Errorf("one that is being made: %v", err)
	}
	if all, in := r.All(), r.In("p"); len(all) != 3 || len(in) != 2 || len(r.Visible(in)) != 1 || r.Exact("abd") == nil {
		t.Errorf("all %d, in p %d, of those visible %d", len(all), len(in), len(r.Visible(in)))
	}
	if err := r.Drop(r.Exact("b")); err != nil {
		t.Fatal(err)
	}
	if r.Exact("b") != nil || len(r.In("q")) != 0 || f.has("b") {
		t.Error("a dropped entry is there")
	}
}

// The next daemon: what was being made has failed and is given back, its name is
// free; what cannot be read is nobody else's.
func TestLoad(t *testing.T) {
	f := &files{raw: map[string][]byte{
		"up":     []byte(`{"ID":"up","Name":"u","State":"up"}`),
		"making": []byte(`{"ID":"making","Name":"m","State":"making"}`),
		"bad":    []byte(`{`),
	}}
	r := newRoster(f, nil)
	var rechecked []string
	if err := r.Load(func(e *Entry[thing]) error { rechecked = append(rechecked, e.Get().ID); return nil }); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(rechecked, []string{"up"}) {
		t.Errorf("compared %q with the machine", rechecked)
	}
	if !r.Owns("bad") || len(r.Unreadable()) != 1 || r.Exact("bad") != nil {
		t.Error("a record that cannot be read stands for nothing")
	}
	if got := r.Exact("making").Get(); got.State != "ended" || !got.Failed || got.Why == "" {
		t.Errorf("what was being made is %+v", got)
	}
	if holder, _ := r.Reserve(&thing{ID: "x", Name: "m"}, never); holder != "" {
		t.Error("the name of what was being made is taken")
	}
	if holder, _ := r.Reserve(&thing{ID: "x", Name: "u"}, never); holder != "up" {
		t.Error("the name of what is up is free")
	}
	given := make(chan string, 1)
	j := r.StartJanitor(func(t *thing) bool { return t.Failed }, func(_ context.Context, e *Entry[thing]) error {
		err := r.Drop(e)
		given <- e.Get().ID
		return err
	})
	defer j.Close()
	if id := <-given; id != "making" {
		t.Errorf("given back %q", id)
	}
}

// What cannot be given back at once frees its name and stays with the janitor.
func TestGiveUp(t *testing.T) {
	f := &files{raw: map[string][]byte{}}
	r := newRoster(f, nil)
	given := make(chan string, 1)
	j := r.StartJanitor(func(t *thing) bool { return t.Failed }, func(_ context.Context, e *Entry[thing]) error {
		err := r.Drop(e)
		given <- e.Get().ID
		return err
	})
	defer j.Close()
	cause := errors.New("cause")
	for _, tc := range []struct {
		id      string
		release error
	}{{"clean", nil}, {"stuck", errFull}} {
		rec := &thing{ID: tc.id, Name: "n", State: "making"}
		if holder, _ := r.Reserve(rec, never); holder != "" {
			t.Fatalf("the name is %s's", holder)
		}
		e := r.Add(rec)
		if err := r.Update(e, func(*thing) {}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // the caller has left: that must not stop the release
		err := r.GiveUp(ctx, e, cause, func(ctx context.Context, _ *thing) error { return errors.Join(ctx.Err(), tc.release) })
		if !errors.Is(err, cause) || errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", tc.id, err)
		}
		if tc.release != nil {
			if id := <-given; id != tc.id {
				t.Errorf("the janitor was given %s", id)
			}
			if got := e.Get(); !got.Failed || got.Why != "cause" {
				t.Errorf("its record is %+v", got)
			}
		}
		if !done(e) || f.has(tc.id) || r.Exact(tc.id) != nil {
			t.Errorf("%s is still there", tc.id)
		}
	}
}
