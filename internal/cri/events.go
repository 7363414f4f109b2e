package cri

import (
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/sandbox"
)

// backlog is how many events a subscriber may be behind before it is cut off: it
// then subscribes and lists anew, as after a restart of podshim.
const backlog = 4096

// Events tells subscribers of what happens to containers and sandboxes, each in
// the order in which it happened. The zero value is ready.
type Events struct {
	mu          sync.Mutex // guards what follows, and orders events
	subscribers map[*subscriber]struct{}
	closed      bool
}

// lastEvents is how long a subscriber may take for what it has not read when podshim
// stops.
const lastEvents = time.Second

type subscriber struct {
	queue chan change
	slow  chan struct{} // closed when the queue has overflown
	over  chan struct{} // closed when podshim stops
}

// change is one event before it is told.
type change struct {
	id, sandboxID string
	kind          runtime.ContainerEventType
	at            time.Time
	// sandbox and containers are the pod at that time, or the sandbox's last record
	// when it is gone: kubelet complains of events without.
	sandbox    *sandbox.Record
	containers []*container.Record
}

// Container takes note of a container's change; pod is what its pod is then.
func (e *Events) Container(before, after *container.Record, pod func(id string) (*sandbox.Record, []*container.Record)) {
	kind, ok := containerEvent(before, after)
	if !ok {
		return
	}
	e.publish(change{id: before.ID, sandboxID: before.SandboxID, kind: kind}, pod)
}

// Sandbox takes note of a sandbox's change.
func (e *Events) Sandbox(before, after *sandbox.Record, pod func(id string) (*sandbox.Record, []*container.Record)) {
	for _, kind := range sandboxEvents(before, after) {
		e.publish(change{id: before.ID, sandboxID: before.ID, kind: kind, sandbox: before}, pod)
	}
}

func containerEvent(before, after *container.Record) (kind runtime.ContainerEventType, ok bool) {
	switch {
	case before.Failed || (after != nil && after.Failed):
		return 0, false // never shown to clients
	case after == nil:
		return runtime.ContainerEventType_CONTAINER_DELETED_EVENT, true
	case before.State == after.State:
		return 0, false
	case after.State == container.Created:
		return runtime.ContainerEventType_CONTAINER_CREATED_EVENT, true
	case after.State == container.Running:
		return runtime.ContainerEventType_CONTAINER_STARTED_EVENT, true
	case after.State == container.Exited:
		return runtime.ContainerEventType_CONTAINER_STOPPED_EVENT, true
	}
	return 0, false
}

func sandboxEvents(before, after *sandbox.Record) []runtime.ContainerEventType {
	switch {
	case before.Failed || (after != nil && after.Failed):
		return nil
	case after == nil:
		return []runtime.ContainerEventType{runtime.ContainerEventType_CONTAINER_DELETED_EVENT}
	case before.State == after.State:
		return nil
	case after.State == sandbox.Ready:
		return []runtime.ContainerEventType{
			runtime.ContainerEventType_CONTAINER_CREATED_EVENT,
			runtime.ContainerEventType_CONTAINER_STARTED_EVENT,
		}
	case after.State == sandbox.NotReady:
		return []runtime.ContainerEventType{runtime.ContainerEventType_CONTAINER_STOPPED_EVENT}
	}
	return nil
}

// publish queues an event for every subscriber; it waits for none.
func (e *Events) publish(c change, pod func(id string) (*sandbox.Record, []*container.Record)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.subscribers) == 0 {
		return
	}
	c.at = time.Now()
	if now, containers := pod(c.sandboxID); now != nil {
		c.sandbox, c.containers = now, containers
	}
	for s := range e.subscribers {
		select {
		case s.queue <- c:
		default:
			close(s.slow)
			delete(e.subscribers, s)
		}
	}
}

func (e *Events) subscribe() (*subscriber, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, fmt.Errorf("podshim is being stopped: %w", errdefs.ErrUnavailable)
	}
	s := &subscriber{queue: make(chan change, backlog), slow: make(chan struct{}), over: make(chan struct{})}
	if e.subscribers == nil {
		e.subscribers = make(map[*subscriber]struct{})
	}
	e.subscribers[s] = struct{}{}
	return s, nil
}

func (e *Events) unsubscribe(s *subscriber) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.subscribers, s)
}

// Close ends all subscriptions, so that a server with subscribers can stop.
func (e *Events) Close() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	for s := range e.subscribers {
		close(s.queue)
		close(s.over)
		delete(e.subscribers, s)
	}
}

// GetContainerEvents tells what happens from now on, until the client goes away.
// The stream's header says that "now" has come: who waits for it and then lists
// knows all that was and misses nothing that will be.
func (s *runtimeService) GetContainerEvents(_ *runtime.GetEventsRequest, stream runtime.RuntimeService_GetContainerEventsServer) error {
	sub, err := s.Events.subscribe()
	if err != nil {
		return err
	}
	defer s.Events.unsubscribe(sub)
	// From here on nothing is missed: a client that has the header may list.
	if err := stream.SendHeader(nil); err != nil {
		return err
	}
	// A client that does not read blocks what is sent, and must not hold up more. What
	// is blocked ends with the stream, that is, when this returns.
	sent := make(chan error, 1)
	queue, over := sub.queue, sub.over
	var limit <-chan time.Time
	for {
		select {
		case c, ok := <-queue:
			if !ok {
				return fmt.Errorf("podshim is being stopped: %w", errdefs.ErrUnavailable)
			}
			queue = nil
			event := s.event(c)
			go func() { sent <- stream.Send(event) }()
		case err := <-sent:
			if err != nil {
				return err
			}
			queue = sub.queue
		case <-over:
			over, limit = nil, time.After(lastEvents)
		case <-limit:
			return fmt.Errorf("podshim is being stopped, and the client does not read: %w", errdefs.ErrUnavailable)
		case <-sub.slow:
			return fmt.Errorf("client is %d events behind: subscribe and list anew: %w", backlog, errdefs.ErrResourceExhausted)
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func (s *runtimeService) event(c change) *runtime.ContainerEventResponse {
	resp := &runtime.ContainerEventResponse{
		ContainerId:        c.id,
		ContainerEventType: c.kind,
		CreatedAt:          c.at.UnixNano(),
	}
	if c.sandbox != nil {
		resp.PodSandboxStatus = sandboxStatus(c.sandbox)
	}
	for _, r := range c.containers {
		resp.ContainersStatuses = append(resp.ContainersStatuses, s.containerStatus(r))
	}
	return resp
}
