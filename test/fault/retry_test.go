package fault

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// A caller that gives up on RunPodSandbox, since its network takes long, and asks
// again gets the sandbox that was being made all the while.
func TestRetryJoinsTheSlow(t *testing.T) {
	w := startNetwork(t, time.Minute)
	before := lasting(w.Node)
	conf := w.PodConfig()
	goOn := w.tell("add-waits")
	slow := time.Duration(times(30, 3)) * time.Second
	defer time.AfterFunc(slow, goOn).Stop()
	gaveUp := 0
	var id string
	for id == "" {
		ctx, cancel := context.WithTimeout(w.Context(), slow/6) // kubelet's would be 2 min
		var err error
		id, err = w.run(ctx, conf)
		cancel()
		if err != nil && status.Code(err) != codes.DeadlineExceeded {
			t.Fatalf("RunPodSandbox: %v", err)
		}
		if err != nil {
			gaveUp++
		}
	}
	if adds := w.calls("ADD"); gaveUp == 0 || adds != 1 {
		t.Errorf("the caller gave up %d times, ADD was run %d times", gaveUp, adds)
	}
	p := w.RunConfig(conf, "")
	if p.ID != id {
		t.Errorf("asked again, the sandbox is %s, and was %s", p.ID, id)
	}
	if state := p.Status().State; state != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("the sandbox is %v", state)
	}
	if err := p.StopAndRemove(); err != nil {
		t.Error(err)
	}
	w.wantOnly(before, "after the pod")
}

// The same of CreateContainer, whose snapshot takes long to be mounted.
func TestRetryJoinsTheSlowCreate(t *testing.T) {
	harness.NeedRoot(t)
	trap := &trap{t: t}
	n := start(t, harness.Options{Spawn: trap.spawn})
	trap.n = n
	s := &subject{n: n, config: n.PodConfig()}
	s.sandbox = n.RunConfig(s.config, "").ID
	before := lasting(n)
	sprung, release := trap.arm("podshim mount RUN/containers/ID/rootfs", false)
	slow := time.Duration(times(30, 3)) * time.Second
	defer time.AfterFunc(slow, release).Stop()
	defer release()
	gaveUp := 0
	for s.container == "" {
		ctx, cancel := context.WithTimeout(n.Context(), slow/6)
		err := s.createWithin(ctx)
		cancel()
		if err != nil && status.Code(err) != codes.DeadlineExceeded {
			t.Fatalf("CreateContainer: %v", err)
		}
		if err != nil {
			gaveUp++
		}
	}
	if mounts := slices.Index(trap.disarm(), "podshim mount RUN/containers/ID/rootfs (2)"); !isClosed(sprung) || gaveUp == 0 || mounts >= 0 {
		t.Errorf("the caller gave up %d times; mounted more than once: %v", gaveUp, mounts >= 0)
	}
	first := s.container
	if err := s.create(); err != nil || s.container != first {
		t.Errorf("asked again, the container is %s, and was %s: %v", s.container, first, err)
	}
	if err := errors.Join(s.start(), s.done("StartContainer"), s.remove()); err != nil {
		t.Error(err)
	}
	(&steps{n: n}).nothingSince(t, before, "after the container")
}

// Stop and Remove of a pod and its containers succeed in any order, in any number
// and at the same time, and leave nothing.
func TestStopsAndRemovalsInAnyOrder(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	w := &network{Node: n, t: t}
	before := lasting(n)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range times(100, 10) {
		conf := n.PodConfig()
		sandbox, err := w.run(n.Context(), conf)
		if err != nil {
			t.Fatal(err)
		}
		c := &churner{t: t, n: n, k: new(killer), volumes: t.TempDir()}
		pod := &churned{config: conf, id: sandbox, volume: t.TempDir()}
		container, err := c.container(pod, "steady", "sleep 100000")
		if err != nil {
			t.Fatal(err)
		}
		var callers sync.WaitGroup
		for range 8 {
			order := random.Perm(8)
			callers.Go(func() {
				for _, i := range order {
					if err := takeDown(n, i%4, sandbox, container); err != nil {
						t.Errorf("in the order %v: %v", order, err)
					}
				}
			})
		}
		callers.Wait()
		(&steps{n: n}).nothingSince(t, before, "after the pod") // snapshots' directories go a moment later
	}
}

// takeDown makes one of the four calls.
func takeDown(n *harness.Node, which int, sandbox, container string) error {
	var err error
	var name string
	switch ctx := n.Context(); which {
	case 0:
		name = "StopContainer"
		_, err = n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: container})
	case 1:
		name = "RemoveContainer"
		_, err = n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: container})
	case 2:
		name = "StopPodSandbox"
		_, err = n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: sandbox})
	case 3:
		name = "RemovePodSandbox"
		_, err = n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: sandbox})
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
