package pod

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/state"
	"github.com/podshim/podshim/test/harness"
)

// drain reads a stream to its end: the items of all its messages, how many
// messages there were and how large the largest was.
func drain[M any, T any](t *testing.T, stream grpc.ServerStreamingClient[M], err error, items func(*M) []T) (all []T, messages, largest int) {
	t.Helper()
	for err == nil {
		var m *M
		if m, err = stream.Recv(); err != nil {
			break
		}
		if len(items(m)) == 0 {
			t.Error("a message of a stream holds nothing")
		}
		all = append(all, items(m)...)
		messages++
		largest = max(largest, proto.Size(any(m).(proto.Message)))
	}
	if !errors.Is(err, io.EOF) {
		t.Fatalf("after %d items: %v", len(all), err)
	}
	return all, messages, largest
}

// same compares what a list and a stream have said, by one word for each item.
func same[T any](t *testing.T, what string, list, stream []T, word func(T) string) {
	t.Helper()
	var a, b []string
	for _, it := range list {
		a = append(a, word(it))
	}
	for _, it := range stream {
		b = append(b, word(it))
	}
	if !slices.Equal(a, b) {
		t.Errorf("%s: the list has\n%s\nand the stream\n%s", what, strings.Join(a, "\n"), strings.Join(b, "\n"))
	}
}

// Each Stream call gives what its List call gives, under every filter.
func TestStreamsAreTheLists(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	labelled := func(v string) func(*cri.PodSandboxConfig) {
		return func(c *cri.PodSandboxConfig) { c.Labels["which"] = v }
	}
	a, b, stopped := n.RunPod(labelled("a")), n.RunPod(labelled("b")), n.RunPod(labelled("b"))
	if _, err := n.Runtime.StopPodSandbox(n.Context(), &cri.StopPodSandboxRequest{PodSandboxId: stopped.ID}); err != nil {
		t.Fatal(err)
	}
	running := a.Run(sleeper, func(c *cri.ContainerConfig) { c.Labels = map[string]string{"which": "a"} })
	other := b.Run(sleeper, func(c *cri.ContainerConfig) { c.Labels = map[string]string{"which": "b"} })
	exited := b.Shell("exit 3")
	created := a.Create(sleeper)
	running.WaitLog("ready")
	other.WaitLog("ready")
	exited.WaitExit()
	n.NewImage("second", harness.ImageOptions{Files: map[string]string{"/second": "x"}})
	ctx := n.Context()

	for name, f := range map[string]*cri.PodSandboxFilter{
		"none": nil, "empty": {}, "id": {Id: a.ID}, "prefix": {Id: a.ID[:12]}, "unknown": {Id: unknown},
		"ready":     {State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}},
		"not ready": {State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_NOTREADY}},
		"label":     {LabelSelector: map[string]string{"which": "b"}},
		"two":       {LabelSelector: map[string]string{"which": "b"}, State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}},
	} {
		list, err := n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		s, err := n.Runtime.StreamPodSandboxes(ctx, &cri.StreamPodSandboxesRequest{Filter: f})
		items, _, _ := drain(t, s, err, (*cri.StreamPodSandboxesResponse).GetPodSandboxes)
		same(t, "sandboxes, filter "+name, list.Items, items, (*cri.PodSandbox).String)
		want := map[string]int{"none": 3, "empty": 3, "id": 1, "prefix": 1, "unknown": 0, "ready": 2, "not ready": 1, "label": 2, "two": 1}
		if len(items) != want[name] {
			t.Errorf("filter %s: %d sandboxes, want %d", name, len(items), want[name])
		}
	}
	for name, f := range map[string]*cri.ContainerFilter{
		"none": nil, "id": {Id: running.ID}, "prefix": {Id: running.ID[:12]}, "unknown": {Id: unknown},
		"pod": {PodSandboxId: b.ID}, "pod prefix": {PodSandboxId: b.ID[:12]},
		"running": {State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}},
		"exited":  {State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_EXITED}},
		"created": {State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_CREATED}},
		"label":   {LabelSelector: map[string]string{"which": "a"}},
		"all":     {Id: other.ID, PodSandboxId: b.ID, LabelSelector: map[string]string{"which": "b"}, State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}},
	} {
		list, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		s, err := n.Runtime.StreamContainers(ctx, &cri.StreamContainersRequest{Filter: f})
		items, _, _ := drain(t, s, err, (*cri.StreamContainersResponse).GetContainers)
		same(t, "containers, filter "+name, list.Containers, items, (*cri.Container).String)
		want := map[string]int{"none": 4, "id": 1, "prefix": 1, "unknown": 0, "pod": 2, "pod prefix": 2, "running": 2, "exited": 1, "created": 1, "label": 1, "all": 1}
		if len(items) != want[name] {
			t.Errorf("filter %s: %d containers, want %d", name, len(items), want[name])
		}
		if name == "created" && items[0].Id != created.ID {
			t.Errorf("the created container is %s, want %s", items[0].Id, created.ID)
		}
	}
	for name, f := range map[string]*cri.ContainerStatsFilter{
		"none": nil, "id": {Id: running.ID}, "pod": {PodSandboxId: b.ID}, "exited": {Id: exited.ID},
		"label": {LabelSelector: map[string]string{"which": "a"}},
	} {
		list, err := n.Runtime.ListContainerStats(ctx, &cri.ListContainerStatsRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		s, err := n.Runtime.StreamContainerStats(ctx, &cri.StreamContainerStatsRequest{Filter: f})
		items, _, _ := drain(t, s, err, (*cri.StreamContainerStatsResponse).GetContainerStats)
		same(t, "container stats, filter "+name, list.Stats, items, func(s *cri.ContainerStats) string { return s.Attributes.String() })
		want := map[string]int{"none": 2, "id": 1, "pod": 1, "exited": 0, "label": 1}
		if len(items) != want[name] {
			t.Errorf("filter %s: stats of %d containers, want %d", name, len(items), want[name])
		}
		for _, it := range items {
			if it.GetCpu().GetUsageCoreNanoSeconds().GetValue() == 0 || it.GetMemory().GetUsageBytes().GetValue() == 0 {
				t.Errorf("filter %s: no usage of %s", name, it.Attributes.Id)
			}
		}
	}
	for name, f := range map[string]*cri.PodSandboxStatsFilter{
		"none": nil, "id": {Id: a.ID}, "stopped": {Id: stopped.ID}, "label": {LabelSelector: map[string]string{"which": "b"}},
	} {
		list, err := n.Runtime.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		s, err := n.Runtime.StreamPodSandboxStats(ctx, &cri.StreamPodSandboxStatsRequest{Filter: f})
		items, _, _ := drain(t, s, err, (*cri.StreamPodSandboxStatsResponse).GetPodSandboxStats)
		same(t, "sandbox stats, filter "+name, list.Stats, items, func(s *cri.PodSandboxStats) string {
			return fmt.Sprint(s.Attributes, len(s.GetLinux().GetContainers()))
		})
		want := map[string]int{"none": 2, "id": 1, "stopped": 0, "label": 1}
		if len(items) != want[name] {
			t.Errorf("filter %s: stats of %d sandboxes, want %d", name, len(items), want[name])
		}
	}
	for name, f := range map[string]*cri.ImageFilter{
		"none": nil, "name": {Image: &cri.ImageSpec{Image: harness.Busybox}},
		"unknown": {Image: &cri.ImageSpec{Image: harness.RegistryHost + "/no-such:1"}},
	} {
		list, err := n.Images.ListImages(ctx, &cri.ListImagesRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		s, err := n.Images.StreamImages(ctx, &cri.StreamImagesRequest{Filter: f})
		items, _, _ := drain(t, s, err, (*cri.StreamImagesResponse).GetImages)
		same(t, "images, filter "+name, list.Images, items, (*cri.Image).String)
		if want := map[string]int{"none": 2, "name": 1, "unknown": 0}; len(items) != want[name] {
			t.Errorf("filter %s: %d images, want %d", name, len(items), want[name])
		}
	}
	bad := &cri.ImageFilter{Image: &cri.ImageSpec{Image: "UPPER:!"}}
	s, err := n.Images.StreamImages(ctx, &cri.StreamImagesRequest{Filter: bad})
	if err == nil {
		_, err = s.Recv()
	}
	checkCode(t, err, invalid, "UPPER")
}

// A node with 20,000 ended containers: the list is too large for a message and
// says what to do; the stream has them all, each once, in small messages. So many
// are made by copying the record of one, while no daemon runs.
func TestListsOfAnySize(t *testing.T) {
	harness.NeedRoot(t)
	if harness.Limit > time.Minute {
		t.Skip("SKIPPED: 20,000 records take too long on an emulated machine")
	}
	n := harness.Start(t, harness.Options{})
	p := n.RunPod()
	c := p.Shell("exit 0", func(c *cri.ContainerConfig) {
		c.Annotations = map[string]string{"filler": strings.Repeat("f", 1024)}
	})
	c.WaitExit()
	const many = 20_000
	n.Stop()
	ids := multiply(t, n, c.ID, many)
	n.Resume()
	defer func() { // or the pod's removal would take minutes
		n.Stop()
		forget(t, n, ids)
		n.Resume()
	}()

	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	start := time.Now()
	_, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	if s := grpcstatus.Convert(err); s.Code() != codes.ResourceExhausted || !strings.Contains(s.Message(), "StreamContainers") {
		t.Fatalf("the list of %d: %v; want ResourceExhausted that names StreamContainers", many, err)
	}
	t.Logf("list refused in %v: %v", time.Since(start), err)
	start = time.Now()
	s, err := n.Runtime.StreamContainers(ctx, &cri.StreamContainersRequest{})
	all, messages, largest := drain(t, s, err, (*cri.StreamContainersResponse).GetContainers)
	t.Logf("%d containers in %d messages of at most %d bytes, in %v", len(all), messages, largest, time.Since(start))
	seen := make(map[string]int)
	for _, c := range all {
		seen[c.Id]++
		if c.State != cri.ContainerState_CONTAINER_EXITED || len(c.Annotations["filler"]) != 1024 {
			t.Fatalf("container %s is %v with %d annotations", c.Id, c.State, len(c.Annotations))
		}
	}
	for _, id := range append(ids, c.ID) {
		if seen[id] != 1 {
			t.Fatalf("container %s is in the stream %d times", id, seen[id])
		}
	}
	if len(all) != many+1 || largest > 1<<20 {
		t.Errorf("%d containers, largest message %d bytes", len(all), largest)
	}
	// A filter makes the list small again.
	one, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{Id: c.ID}})
	if err != nil || len(one.Containers) != 1 {
		t.Errorf("filtered: %v, %v", one, err)
	}
}

// records opens the records of a node whose daemon does not run.
func records(t *testing.T, n *harness.Node) *state.Store {
	t.Helper()
	quiet := logrus.New()
	quiet.Out = io.Discard
	s, err := state.Open(state.Config{Database: n.Root + "/state.db", RunDir: n.RunDir + "/state", Log: logrus.NewEntry(quiet)})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// multiply copies the record of a container and returns the copies' IDs.
func multiply(t *testing.T, n *harness.Node, id string, copies int) (ids []string) {
	t.Helper()
	s := records(t, n)
	var original map[string]json.RawMessage
	if err := json.Unmarshal(s.Take(state.Containers)[id], &original); err != nil {
		t.Fatal(err)
	}
	var raw []byte
	config := new(cri.ContainerConfig)
	if err := errors.Join(json.Unmarshal(original["config"], &raw), proto.Unmarshal(raw, config)); err != nil {
		t.Fatal(err)
	}
	for i := range copies {
		config.Metadata.Attempt = uint32(i + 1)
		raw, err := proto.Marshal(config)
		if err != nil {
			t.Fatal(err)
		}
		copied := maps.Clone(original)
		next := fmt.Sprintf("%024d%s", i, id[24:])
		for key, value := range map[string]any{"id": next, "name": "copy " + next, "config": raw} {
			if copied[key], err = json.Marshal(value); err != nil {
				t.Fatal(err)
			}
		}
		record, err := json.Marshal(copied)
		if err == nil {
			err = s.Put(state.Containers, next, record)
		}
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, next)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return ids
}

// forget takes records away again.
func forget(t *testing.T, n *harness.Node, ids []string) {
	t.Helper()
	s := records(t, n)
	for _, id := range ids {
		if err := s.Delete(state.Containers, id); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
