package cri

import (
	"slices"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/sandbox"
)

const (
	created = runtime.ContainerEventType_CONTAINER_CREATED_EVENT
	started = runtime.ContainerEventType_CONTAINER_STARTED_EVENT
	stopped = runtime.ContainerEventType_CONTAINER_STOPPED_EVENT
	deleted = runtime.ContainerEventType_CONTAINER_DELETED_EVENT
)

func noPod(string) (*sandbox.Record, []*container.Record) { return nil, nil }

// live runs a container through its life.
func live(e *Events, id string) {
	state := func(s container.State) *container.Record {
		return &container.Record{ID: id, SandboxID: "pod", State: s}
	}
	e.Container(state(container.Creating), state(container.Creating), noPod)
	e.Container(state(container.Creating), state(container.Created), noPod)
	e.Container(state(container.Created), state(container.Created), noPod) // resources changed
	e.Container(state(container.Created), state(container.Running), noPod)
	e.Container(state(container.Running), state(container.Exited), noPod)
	e.Container(state(container.Exited), nil, noPod)
}

// kubelet logs an error for each event without a sandbox.
func TestRemovedSandboxIsTold(t *testing.T) {
	var e Events
	s, err := e.subscribe()
	if err != nil {
		t.Fatal(err)
	}
	last := &sandbox.Record{ID: "pod", State: sandbox.NotReady}
	e.Sandbox(last, nil, noPod)
	if c := <-s.queue; c.kind != deleted || c.sandbox != last {
		t.Errorf("the removal is told as %v with sandbox %v, want its last record", c.kind, c.sandbox)
	}
}

func kinds(s *subscriber) (all []runtime.ContainerEventType) {
	for len(s.queue) > 0 {
		all = append(all, (<-s.queue).kind)
	}
	return all
}

func TestEventsOfALife(t *testing.T) {
	var e Events
	live(&e, "unheard") // nobody listens: no harm
	one, err := e.subscribe()
	if err != nil {
		t.Fatal(err)
	}
	two, err := e.subscribe()
	if err != nil {
		t.Fatal(err)
	}
	pod := func(s sandbox.State) *sandbox.Record { return &sandbox.Record{ID: "pod", State: s} }
	e.Sandbox(pod(sandbox.Creating), pod(sandbox.Ready), noPod)
	live(&e, "c")
	e.Sandbox(pod(sandbox.Ready), pod(sandbox.NotReady), noPod)
	e.Sandbox(pod(sandbox.NotReady), nil, noPod)
	want := []runtime.ContainerEventType{created, started, created, started, stopped, deleted, stopped, deleted}
	for i, s := range []*subscriber{one, two} {
		if got := kinds(s); !slices.Equal(got, want) {
			t.Errorf("subscriber %d got %v, want %v", i, got, want)
		}
	}
	e.unsubscribe(one)
	live(&e, "c")
	if got := kinds(one); len(got) > 0 {
		t.Errorf("after unsubscribing: %v", got)
	}
	e.Close()
	for range two.queue {
		// What was queued is still told; then the queue ends.
	}
	if _, err := e.subscribe(); err == nil {
		t.Error("subscribed after Close")
	}
}

func TestFailedCreationsAreNotTold(t *testing.T) {
	var e Events
	s, err := e.subscribe()
	if err != nil {
		t.Fatal(err)
	}
	failed := &container.Record{ID: "c", State: container.Exited, Failed: true}
	e.Container(&container.Record{ID: "c", State: container.Creating}, failed, noPod)
	e.Container(failed, nil, noPod)
	if got := kinds(s); len(got) > 0 {
		t.Errorf("told %v", got)
	}
}

func TestSlowSubscriberDelaysNobody(t *testing.T) {
	var e Events
	slow, err := e.subscribe()
	if err != nil {
		t.Fatal(err)
	}
	for range backlog/4 + 1 {
		live(&e, "c")
	}
	select {
	case <-slow.slow:
	default:
		t.Error("a subscriber with a full queue was not cut off")
	}
	e.unsubscribe(slow) // after the cut: no harm
	next, err := e.subscribe()
	if err != nil {
		t.Fatal(err)
	}
	live(&e, "c")
	if n := len(kinds(next)); n != 4 {
		t.Errorf("%d events after the slow one was cut off, want 4", n)
	}
}
