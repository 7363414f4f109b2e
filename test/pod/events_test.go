package pod

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// subscribe opens a stream of events. When it returns, every later change is told.
func subscribe(ctx context.Context, n *harness.Node) (cri.RuntimeService_GetContainerEventsClient, error) {
	s, err := n.Runtime.GetContainerEvents(ctx, &cri.GetEventsRequest{}, grpc.WaitForReady(true))
	if err == nil {
		_, err = s.Header()
	}
	return s, err
}

// A pod's whole life, told to several subscribers alike: each event once, in order,
// with what is true at that moment. One that never reads holds nobody up.
func TestEvents(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), harness.Limit)
	defer cancel()
	if _, err := subscribe(ctx, n); err != nil { // never read
		t.Fatal(err)
	}
	const subscribers = 5
	streams := make([]cri.RuntimeService_GetContainerEventsClient, subscribers)
	for i := range streams {
		var err error
		if streams[i], err = subscribe(ctx, n); err != nil {
			t.Fatal(err)
		}
	}
	begin := time.Now().UnixNano()
	p := n.RunPod(func(c *cri.PodSandboxConfig) { c.Annotations = map[string]string{"example.com/of": "the pod"} })
	ip := p.Status().GetNetwork().GetIp()
	first := p.Shell("exit 7", func(c *cri.ContainerConfig) { c.Labels = map[string]string{"of": "the container"} })
	first.WaitExit()
	second := p.Run(sleeper)
	second.WaitLog("ready")
	first.Remove()
	second.Stop(10 * time.Second)
	if err := p.StopAndRemove(); err != nil {
		t.Fatal(err)
	}
	name := map[string]string{p.ID: "pod", first.ID: "first", second.ID: "second"}
	want := []string{
		"pod CREATED", "pod STARTED",
		"first CREATED", "first STARTED", "first STOPPED",
		"second CREATED", "second STARTED",
		"first DELETED", "second STOPPED",
		"pod STOPPED", "second DELETED", "pod DELETED",
	}
	for i, s := range streams {
		var got []string
		last := begin
		for !slices.Contains(got, "pod DELETED") {
			e, err := s.Recv()
			if err != nil {
				t.Fatalf("subscriber %d after %q: %v", i, got, err)
			}
			if name[e.ContainerId] == "" {
				continue // another test's
			}
			kind := strings.TrimSuffix(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"), "_EVENT")
			event := name[e.ContainerId] + " " + kind
			got = append(got, event)
			if e.CreatedAt < last || e.CreatedAt > time.Now().UnixNano() {
				t.Errorf("%s has the time %d, after one of %d", event, e.CreatedAt, last)
			}
			last = e.CreatedAt
			checkEvent(t, event, e, p, ip)
		}
		if !slices.Equal(got, want) {
			t.Errorf("subscriber %d got %q, want %q", i, got, want)
		}
	}
}

// checkEvent holds an event to what is true when it happens.
func checkEvent(t *testing.T, event string, e *cri.ContainerEventResponse, p *harness.Pod, ip string) {
	t.Helper()
	s := e.PodSandboxStatus
	if s.GetId() != p.ID || !proto.Equal(s.GetMetadata(), p.Config.Metadata) || !maps.Equal(s.GetAnnotations(), p.Config.Annotations) {
		t.Errorf("%s has the sandbox %v", event, s)
	}
	ready := cri.PodSandboxState_SANDBOX_READY
	if event == "pod STOPPED" || event == "second DELETED" || event == "pod DELETED" {
		ready = cri.PodSandboxState_SANDBOX_NOTREADY
	}
	if s.GetState() != ready || (ready == cri.PodSandboxState_SANDBOX_READY && s.GetNetwork().GetIp() != ip) {
		t.Errorf("%s: the sandbox is %v with address %q", event, s.GetState(), s.GetNetwork().GetIp())
	}
	state := map[string]string{}
	for _, c := range e.ContainersStatuses {
		state[c.Id] = strings.TrimPrefix(c.State.String(), "CONTAINER_")
		if c.Metadata.GetName() == "c1" && (c.Labels["of"] != "the container" || c.ImageRef == "" || c.CreatedAt == 0) {
			t.Errorf("%s: status is not whole: %v", event, c)
		}
		if c.Metadata.GetName() == "c1" && c.State == cri.ContainerState_CONTAINER_EXITED && (c.ExitCode != 7 || c.FinishedAt == 0 || c.Reason == "") {
			t.Errorf("%s: ended as %v", event, c)
		}
	}
	now, there := state[e.ContainerId]
	switch kind := event[strings.Index(event, " ")+1:]; {
	case strings.HasPrefix(event, "pod "):
	case kind == "CREATED" && now == "CREATED", kind == "STARTED" && now != "CREATED", kind == "STOPPED" && now == "EXITED", kind == "DELETED" && !there:
	default:
		t.Errorf("%s: the container is %q", event, now)
	}
}

// view is what a client knows that lists and follows events.
type view struct {
	mu     sync.Mutex
	states map[string]cri.ContainerState
	lists  int
}

// follow keeps the view until ctx ends: subscribe, list, follow, and all anew when
// the stream breaks, as every client of the CRI has to.
func (v *view) follow(ctx context.Context, n *harness.Node) error {
	for ctx.Err() == nil {
		s, err := subscribe(ctx, n)
		if err != nil {
			continue // the daemon went away meanwhile; WaitForReady waits for the next
		}
		all, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{}, grpc.WaitForReady(true))
		if err != nil {
			continue
		}
		v.mu.Lock()
		v.states = map[string]cri.ContainerState{}
		for _, c := range all.Containers {
			v.states[c.Id] = c.State
		}
		v.lists++
		v.mu.Unlock()
		for {
			e, err := s.Recv()
			if err != nil {
				break
			}
			v.apply(e)
		}
	}
	return nil
}

func (v *view) apply(e *cri.ContainerEventResponse) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case e.ContainerId == e.PodSandboxStatus.GetId():
	case e.ContainerEventType == cri.ContainerEventType_CONTAINER_DELETED_EVENT:
		delete(v.states, e.ContainerId)
	case e.ContainerEventType == cri.ContainerEventType_CONTAINER_STOPPED_EVENT:
		v.states[e.ContainerId] = cri.ContainerState_CONTAINER_EXITED
	case e.ContainerEventType == cri.ContainerEventType_CONTAINER_STARTED_EVENT:
		v.states[e.ContainerId] = cri.ContainerState_CONTAINER_RUNNING
	case v.states[e.ContainerId] == 0:
		v.states[e.ContainerId] = cri.ContainerState_CONTAINER_CREATED
	}
}

func (v *view) now() (map[string]cri.ContainerState, int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return maps.Clone(v.states), v.lists
}

// The daemon is killed and started again while containers start and end: a client
// that subscribes and lists anew misses nothing.
func TestEventsAcrossRestarts(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	p := n.RunPod()
	ctx, cancel := context.WithCancel(context.Background())
	var v view
	var follower sync.WaitGroup
	follower.Go(func() { _ = v.follow(ctx, n) })
	defer func() {
		cancel()
		follower.Wait()
	}()
	var alive []*harness.Container
	for round := range 3 {
		ends := p.Run(sleeper)    // while no daemon runs
		removed := p.Run(sleeper) // after the restart
		stays := p.Run(sleeper)
		for _, c := range []*harness.Container{ends, removed, stays} {
			c.WaitLog("ready")
		}
		alive = append(alive, stays)
		if round == 1 {
			n.Stop()
		} else {
			n.Kill()
		}
		process := ends.Process()
		if err := process.Kill(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := process.WaitGone(harness.Limit); err != nil {
			t.Fatal(err)
		}
		n.Resume()
		removed.Stop(time.Second)
		removed.Remove()
		p.Shell("exit 0").WaitExit()
	}
	alive[0].Stop(time.Second)
	// The client comes to know what is so, with no further change.
	var want, got map[string]cri.ContainerState
	var lists int
	if !eventually(func() bool {
		all, err := n.Runtime.ListContainers(n.Context(), &cri.ListContainersRequest{})
		if err != nil {
			t.Fatal(err)
		}
		want = map[string]cri.ContainerState{}
		for _, c := range all.Containers {
			want[c.Id] = c.State
		}
		got, lists = v.now()
		return maps.Equal(got, want)
	}) {
		t.Errorf("the client knows\n%v\nbut there is\n%v", got, want)
	}
	count := map[cri.ContainerState]int{}
	for _, state := range want {
		count[state]++
	}
	if lists < 4 || count[cri.ContainerState_CONTAINER_RUNNING] != 2 || count[cri.ContainerState_CONTAINER_EXITED] != 7 {
		t.Errorf("listed %d times, containers by state: %v; want 4 lists, 2 running and 7 exited", lists, count)
	}
}
