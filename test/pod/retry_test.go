package pod

import (
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// wantCode checks an error's gRPC code by name and that its message says a word;
// "" wants no word.
func wantCode(t *testing.T, err error, code, word string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want %s", code)
		return
	}
	s := status.Convert(err)
	if s.Code().String() != code {
		t.Errorf("code %v, want %s: %s", s.Code(), code, s.Message())
	}
	if !strings.Contains(strings.ToLower(s.Message()), strings.ToLower(word)) {
		t.Errorf("message does not say %q: %s", word, s.Message())
	}
}

// Stopping and removing twice, or what never was, succeeds.
func TestRemovalsAreIdempotent(t *testing.T) {
	n, p := start(t)
	c := p.Run(sleeper)
	ctx := n.Context()
	const unknown = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	calls := map[string]func(sandbox, container string) error{
		"1 StopContainer": func(_, c string) error {
			_, err := n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: c})
			return err
		},
		"2 RemoveContainer": func(_, c string) error {
			_, err := n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: c})
			return err
		},
		"3 StopPodSandbox": func(s, _ string) error {
			_, err := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: s})
			return err
		},
		"4 RemovePodSandbox": func(s, _ string) error {
			_, err := n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: s})
			return err
		},
	}
	for _, name := range []string{"1 StopContainer", "2 RemoveContainer", "3 StopPodSandbox", "4 RemovePodSandbox"} {
		for range 3 {
			if err := calls[name](p.ID, c.ID); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if err := calls[name](unknown, unknown); err != nil {
			t.Errorf("%s of the unknown: %v", name, err)
		}
	}
	_, err := n.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.ID})
	wantCode(t, err, "NotFound", p.ID)
	_, err = n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.ID})
	wantCode(t, err, "NotFound", c.ID)
}

// A retried RunPodSandbox or CreateContainer gives what the first one made; the
// same name with another config is AlreadyExists and changes nothing.
func TestRetriesJoin(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	conf := n.PodConfig()
	ids := atOnce(4, func() (string, error) {
		resp, err := n.Runtime.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: conf})
		return resp.GetPodSandboxId(), err
	}, t)
	p := n.RunConfig(conf, "")
	for _, id := range ids {
		if id != p.ID {
			t.Errorf("retries made %s and %s", id, p.ID)
		}
	}
	other := proto.Clone(conf).(*cri.PodSandboxConfig)
	other.Hostname = "another"
	_, err := n.Runtime.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: other})
	wantCode(t, err, "AlreadyExists", conf.Metadata.Name)

	containerConf := p.ContainerConfig(sleeper)
	create := func(conf *cri.ContainerConfig) (string, error) {
		resp, err := n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{PodSandboxId: p.ID, Config: conf, SandboxConfig: p.Config})
		return resp.GetContainerId(), err
	}
	containers := atOnce(4, func() (string, error) { return create(containerConf) }, t)
	for _, id := range containers {
		if id != containers[0] {
			t.Errorf("retries made containers %v", containers)
		}
	}
	changed := proto.Clone(containerConf).(*cri.ContainerConfig)
	changed.Command = []string{"true"}
	_, err = create(changed)
	wantCode(t, err, "AlreadyExists", containerConf.Metadata.Name)
	list, err := n.Runtime.ListContainers(n.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.ID}})
	if err != nil || len(list.Containers) != 1 {
		t.Errorf("containers are %v, %v", list.GetContainers(), err)
	}
	// The next attempt is another container.
	next := proto.Clone(containerConf).(*cri.ContainerConfig)
	next.Metadata.Attempt = 1
	if id, err := create(next); err != nil || id == containers[0] {
		t.Errorf("next attempt: %s, %v", id, err)
	}
}

// Starting what runs already is the retry of a start whose answer was lost.
func TestStartTwice(t *testing.T) {
	n, p := start(t)
	c := p.Run(sleeper)
	c.WaitLog("ready")
	first := c.Process()
	if _, err := n.Runtime.StartContainer(n.Context(), &cri.StartContainerRequest{ContainerId: c.ID}); err != nil {
		t.Errorf("start again: %v", err)
	}
	if again := c.Process(); again.PID != first.PID || !first.Alive() {
		t.Errorf("process was %v, is %v", first, again)
	}
}

// atOnce calls f several times at once; every call must succeed.
func atOnce(times int, f func() (string, error), t *testing.T) []string {
	t.Helper()
	ids, errs := make([]string, times), make([]error, times)
	var all sync.WaitGroup
	for i := range times {
		all.Go(func() { ids[i], errs[i] = f() })
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			t.Errorf("call: %v (%v)", err, status.Code(err) == codes.Unknown)
		}
	}
	return ids
}

// Lists find by ID, its prefix, state and labels.
func TestFilters(t *testing.T) {
	n, p := start(t, func(c *cri.PodSandboxConfig) { c.Labels["only"] = "this-pod" })
	c := p.Run(sleeper, func(c *cri.ContainerConfig) { c.Labels = map[string]string{"only": "this-container"} })
	pods := map[string]*cri.PodSandboxFilter{
		"label": {LabelSelector: map[string]string{"only": "this-pod"}},
		"id":    {Id: p.ID},
		"short": {Id: p.ID[:13]},
		"state": {State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}, Id: p.ID},
	}
	for name, filter := range pods {
		list, err := n.Runtime.ListPodSandbox(n.Context(), &cri.ListPodSandboxRequest{Filter: filter})
		if err != nil || len(list.Items) != 1 || list.Items[0].Id != p.ID {
			t.Errorf("sandboxes by %s: %v, %v", name, list.GetItems(), err)
		}
	}
	containers := map[string]*cri.ContainerFilter{
		"label": {LabelSelector: map[string]string{"only": "this-container"}},
		"id":    {Id: c.ID},
		"short": {Id: c.ID[:13]},
		"pod":   {PodSandboxId: p.ID},
		"state": {State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}, Id: c.ID},
	}
	for name, filter := range containers {
		list, err := n.Runtime.ListContainers(n.Context(), &cri.ListContainersRequest{Filter: filter})
		if err != nil || len(list.Containers) != 1 || list.Containers[0].Id != c.ID {
			t.Errorf("containers by %s: %v, %v", name, list.GetContainers(), err)
		}
	}
	none, err := n.Runtime.ListContainers(n.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
		Id: c.ID, State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_EXITED},
	}})
	if err != nil || len(none.Containers) != 0 {
		t.Errorf("exited containers: %v, %v", none.GetContainers(), err)
	}
}
