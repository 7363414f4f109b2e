package cri

import (
	"context"
	"fmt"
	goruntime "runtime"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/stats"
)

// ContainerStats measures one running container.
func (s *runtimeService) ContainerStats(ctx context.Context, req *runtime.ContainerStatsRequest) (*runtime.ContainerStatsResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	c, err := s.Containers.Get(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	r := c.Get()
	if r.State != container.Running {
		return nil, fmt.Errorf("container %s is %s: only a running one can be measured: %w", r.ID, r.State, errdefs.ErrFailedPrecondition)
	}
	measured, err := s.measureContainer(ctx, r, stats.LayerDeadline())
	if err != nil {
		return nil, err
	}
	return &runtime.ContainerStatsResponse{Stats: measured}, nil
}

// ListContainerStats measures the running containers that pass a filter.
func (s *runtimeService) ListContainerStats(ctx context.Context, req *runtime.ListContainerStatsRequest) (*runtime.ListContainerStatsResponse, error) {
	measured, err := s.measureContainers(ctx, s.measurable(req.GetFilter()), stats.LayerDeadline())
	if err != nil {
		return nil, err
	}
	return &runtime.ListContainerStatsResponse{Stats: measured}, nil
}

// PodSandboxStats measures one ready pod with its containers.
func (s *runtimeService) PodSandboxStats(ctx context.Context, req *runtime.PodSandboxStatsRequest) (*runtime.PodSandboxStatsResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sb, err := s.Sandboxes.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	r := sb.Get()
	if r.State != sandbox.Ready {
		return nil, fmt.Errorf("pod sandbox %s is not ready (%s): only a ready one can be measured: %w", r.ID, r.Reason, errdefs.ErrFailedPrecondition)
	}
	measured, err := s.measurePod(ctx, r, stats.LayerDeadline())
	if err != nil {
		return nil, err
	}
	return &runtime.PodSandboxStatsResponse{Stats: measured}, nil
}

// ListPodSandboxStats measures the ready pods that pass a filter.
func (s *runtimeService) ListPodSandboxStats(ctx context.Context, req *runtime.ListPodSandboxStatsRequest) (*runtime.ListPodSandboxStatsResponse, error) {
	layersBy := stats.LayerDeadline()
	pods := s.measurablePods(req.GetFilter())
	measured := make([]*runtime.PodSandboxStats, len(pods))
	// As many at a time as there are processors: it is system calls only.
	var g errgroup.Group
	g.SetLimit(goruntime.GOMAXPROCS(0))
	for i, r := range pods {
		g.Go(func() error {
			measured[i] = s.listedPodStats(ctx, r, layersBy)
			return nil
		})
	}
	_ = g.Wait() // they have no errors: a pod that cannot be measured is left out
	left := slices.DeleteFunc(measured, func(p *runtime.PodSandboxStats) bool { return p == nil })
	return &runtime.ListPodSandboxStatsResponse{Stats: left}, ctx.Err()
}

// measurable returns the containers that pass a filter of stats.
func (s *runtimeService) measurable(f *runtime.ContainerStatsFilter) []*container.Record {
	return s.containers(&runtime.ContainerFilter{
		Id: f.GetId(), PodSandboxId: f.GetPodSandboxId(), LabelSelector: f.GetLabelSelector(),
	})
}

// measurablePods returns the sandboxes that pass a filter of stats.
func (s *runtimeService) measurablePods(f *runtime.PodSandboxStatsFilter) []*sandbox.Record {
	return s.sandboxes(&runtime.PodSandboxFilter{Id: f.GetId(), LabelSelector: f.GetLabelSelector()})
}

// listedPodStats measures a pod for a list; nil leaves it out.
func (s *runtimeService) listedPodStats(ctx context.Context, r *sandbox.Record, layersBy time.Time) *runtime.PodSandboxStats {
	if r.State != sandbox.Ready {
		return nil
	}
	measured, err := s.measurePod(ctx, r, layersBy)
	if s.leaveOut(ctx, "sandbox", r.ID, err) {
		return nil
	}
	return measured
}

func (s *runtimeService) measurePod(ctx context.Context, r *sandbox.Record, layersBy time.Time) (*runtime.PodSandboxStats, error) {
	linux, err := s.Stats.Pod(ctx, stats.PodInput{
		ID: r.ID, CgroupPath: r.CgroupParent, Netns: r.Netns, Interface: r.Interface,
	})
	if err != nil {
		return nil, err
	}
	if linux.Containers, err = s.measureContainers(ctx, s.Containers.InSandbox(r.ID), layersBy); err != nil {
		return nil, err
	}
	return &runtime.PodSandboxStats{
		Attributes: &runtime.PodSandboxAttributes{
			Id: r.ID, Metadata: r.Config.GetMetadata(),
			Labels: r.Config.GetLabels(), Annotations: r.Config.GetAnnotations(),
		},
		Linux: linux,
	}, nil
}

// measureContainers measures those that run; one that ends meanwhile is left out.
func (s *runtimeService) measureContainers(ctx context.Context, records []*container.Record, layersBy time.Time) ([]*runtime.ContainerStats, error) {
	var out []*runtime.ContainerStats
	for _, r := range records {
		if measured := s.listedContainerStats(ctx, r, layersBy); measured != nil {
			out = append(out, measured)
		}
	}
	return out, ctx.Err()
}

// listedContainerStats measures a container for a list; nil leaves it out.
func (s *runtimeService) listedContainerStats(ctx context.Context, r *container.Record, layersBy time.Time) *runtime.ContainerStats {
	if r.State != container.Running {
		return nil
	}
	measured, err := s.measureContainer(ctx, r, layersBy)
	if s.leaveOut(ctx, "container", r.ID, err) {
		return nil
	}
	return measured
}

// leaveOut tells whether something that could not be measured is left out of a
// list: one bad cgroup must not hide the node's other pods. What has ended since
// it was listed is no news.
func (s *runtimeService) leaveOut(ctx context.Context, kind, id string, err error) bool {
	if err != nil && !errdefs.IsNotFound(err) && ctx.Err() == nil {
		s.Log.WithError(err).WithField(kind, id).Warn("left out of a list of stats")
	}
	return err != nil
}

func (s *runtimeService) measureContainer(ctx context.Context, r *container.Record, layersBy time.Time) (*runtime.ContainerStats, error) {
	measured, err := s.Stats.Container(ctx, stats.ContainerInput{ID: r.ID, CgroupPath: r.CgroupsPath, LayerBy: layersBy})
	if err != nil {
		return nil, err
	}
	measured.Attributes = &runtime.ContainerAttributes{
		Id: r.ID, Metadata: r.Config.GetMetadata(),
		Labels: r.Config.GetLabels(), Annotations: r.Config.GetAnnotations(),
	}
	return measured, nil
}
