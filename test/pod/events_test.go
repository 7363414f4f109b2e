package pod

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
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

// frozen is a connection that is not read any more once it is told so, as that of a
// client that is stopped (SIGSTOP) or hangs; and read again after thaw.
type frozen struct {
	net.Conn
	stop, thaw chan struct{}
}

func (f frozen) Read(b []byte) (int, error) {
	select {
	case <-f.stop:
		<-f.thaw
	default:
	}
	return f.Conn.Read(b)
}

// One subscriber does not read, while there are more events than podshim keeps for
// one: another has every one of them, the daemon does not grow, and the slow one,
// when it reads again, gets the first of them in order and is then told to subscribe
// and list anew.
func TestSubscriberThatNeverReads(t *testing.T) {
	harness.NeedRoot(t)
	if harness.Limit > time.Minute {
		t.Skip("SKIPPED: thousands of containers take too long on an emulated machine")
	}
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	p := n.RunPod()
	ctx, cancel := context.WithTimeout(context.Background(), 5*harness.Limit)
	defer cancel()
	f := frozen{stop: make(chan struct{}), thaw: make(chan struct{})}
	conn, err := grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, "unix", n.Socket)
			f.Conn = c
			return f, err
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	slow, err := cri.NewRuntimeServiceClient(conn).GetContainerEvents(ctx, &cri.GetEventsRequest{})
	if err == nil {
		_, err = slow.Header()
	}
	if err != nil {
		t.Fatal(err)
	}
	close(f.stop)
	reader, err := subscribe(ctx, n)
	if err != nil {
		t.Fatal(err)
	}
	before := daemonRSS(t, n)

	const events, workers = 4800, 8
	var made sync.Map
	var work sync.WaitGroup
	for w := range workers {
		work.Go(func() {
			for i := range events / 2 / workers {
				conf := p.ContainerConfig(sleeper, func(c *cri.ContainerConfig) { c.Metadata.Name = fmt.Sprintf("w%d-%d", w, i) })
				c, err := n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.ID, Config: conf, SandboxConfig: p.Config})
				if err == nil {
					made.Store(c.ContainerId, true)
					_, err = n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: c.ContainerId})
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	kinds := map[string][]cri.ContainerEventType{}
	for range events {
		e, err := reader.Recv()
		if err != nil {
			t.Fatalf("the client that reads, after %d containers: %v", len(kinds), err)
		}
		kinds[e.ContainerId] = append(kinds[e.ContainerId], e.ContainerEventType)
	}
	work.Wait()
	want := []cri.ContainerEventType{cri.ContainerEventType_CONTAINER_CREATED_EVENT, cri.ContainerEventType_CONTAINER_DELETED_EVENT}
	made.Range(func(id, _ any) bool {
		if got := kinds[id.(string)]; !slices.Equal(got, want) {
			t.Errorf("of container %s the client that reads had %v", id, got)
		}
		return true
	})
	if after := daemonRSS(t, n); after > before+64<<10 {
		t.Errorf("podshim grew from %d to %d MiB", before>>10, after>>10)
	}

	close(f.thaw)
	last, had := int64(0), 0
	for ; err == nil; had++ {
		var e *cri.ContainerEventResponse
		if e, err = slow.Recv(); err == nil && e.CreatedAt < last {
			t.Errorf("event %d of the slow client is older than the one before", had)
		}
		last = e.GetCreatedAt()
	}
	checkCode(t, err, "ResourceExhausted", "subscribe and list anew")
	if had >= events {
		t.Errorf("the slow client had %d events: nothing bounds what is kept for it", had)
	}
	t.Logf("the slow client had %d of %d events, then: %v", had-1, events, err)
}

func daemonRSS(t *testing.T, n *harness.Node) int {
	t.Helper()
	p, err := harness.ReadProcess(n.PID())
	if err != nil {
		t.Fatal(err)
	}
	return rss(t, p)
}
