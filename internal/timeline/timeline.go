// Package timeline remembers how the last operations on pods, containers and images
// went: each step with its time, and the error of the one that failed. It is kept in
// memory, the newest few hundred, so that also what left nothing behind, a pod that
// could not be made, can be explained for a while.
package timeline

import (
	"context"
	"slices"
	"sync"
	"time"
)

// most is how many operations are remembered.
const most = 512

// Subject is what an operation is about; what does not apply is empty.
type Subject struct {
	Namespace string `json:"namespace,omitempty"`
	Pod       string `json:"pod,omitempty"`
	Container string `json:"container,omitempty"`
	Image     string `json:"image,omitempty"`
	// ID is the sandbox's or container's.
	ID string `json:"id,omitempty"`
}

// Operation is one call from its beginning to its end.
type Operation struct {
	Name string `json:"name"`
	Subject
	Began time.Time `json:"began"`
	// Took is zero, and Running set, until it has ended.
	Took    time.Duration `json:"took_ns"`
	Running bool          `json:"running,omitempty"`
	Error   string        `json:"error,omitempty"`
	Steps   []Step        `json:"steps,omitempty"`
}

// Step is a part of an operation; steps may run side by side.
type Step struct {
	Name  string        `json:"name"`
	After time.Duration `json:"after_ns"` // since the operation began
	Took  time.Duration `json:"took_ns"`
	Error string        `json:"error,omitempty"`
}

// Book holds the operations. A nil Book remembers nothing.
type Book struct {
	mu  sync.Mutex // guards what follows, and what it points to
	all []*Operation
}

type entry struct {
	book *Book
	op   *Operation
}

type key struct{}

// Begin opens an operation; Do on the context adds its steps, and the function
// returned ends it.
func (b *Book) Begin(ctx context.Context, name string, about Subject) (context.Context, func(error)) {
	if b == nil {
		return ctx, func(error) {}
	}
	op := &Operation{Name: name, Subject: about, Began: time.Now(), Running: true}
	b.mu.Lock()
	b.all = append(b.all, op)
	if len(b.all) > most {
		b.all = slices.Clone(b.all[len(b.all)-most:])
	}
	b.mu.Unlock()
	return context.WithValue(ctx, key{}, entry{b, op}), func(err error) {
		b.mu.Lock()
		defer b.mu.Unlock()
		op.Running, op.Took = false, time.Since(op.Began)
		if err != nil {
			op.Error = err.Error()
		}
	}
}

// Do runs f as a step of the context's operation, if it has one.
func Do(ctx context.Context, name string, f func() error) error {
	e, ok := ctx.Value(key{}).(entry)
	if !ok {
		return f()
	}
	began := time.Now()
	err := f()
	s := Step{Name: name, After: began.Sub(e.op.Began), Took: time.Since(began)}
	if err != nil {
		s.Error = err.Error()
	}
	e.book.mu.Lock()
	defer e.book.mu.Unlock()
	e.op.Steps = append(e.op.Steps, s)
	return err
}

// Find returns the operations about which is true, oldest first.
func (b *Book) Find(about func(Subject) bool) []Operation {
	b.mu.Lock()
	defer b.mu.Unlock()
	var found []Operation
	for _, op := range b.all {
		if about(op.Subject) {
			o := *op
			o.Steps = slices.Clone(op.Steps)
			found = append(found, o)
		}
	}
	return found
}
