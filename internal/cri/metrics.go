package cri

import (
	"context"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/spec"
	"github.com/podshim/podshim/internal/stats"
)

// ListMetricDescriptors describes the metrics of ListPodSandboxMetrics.
func (s *runtimeService) ListMetricDescriptors(context.Context, *runtime.ListMetricDescriptorsRequest) (*runtime.ListMetricDescriptorsResponse, error) {
	return &runtime.ListMetricDescriptorsResponse{Descriptors: stats.Families()}, nil
}

// ListPodSandboxMetrics gives the metrics of all ready pods.
func (s *runtimeService) ListPodSandboxMetrics(ctx context.Context, _ *runtime.ListPodSandboxMetricsRequest) (*runtime.ListPodSandboxMetricsResponse, error) {
	resp := new(runtime.ListPodSandboxMetricsResponse)
	err := s.eachPodMetrics(ctx, func(m *runtime.PodSandboxMetrics) error {
		resp.PodMetrics = append(resp.PodMetrics, m)
		return nil
	})
	return resp, err
}

// StreamPodSandboxMetrics gives the same a pod at a time, so that neither side
// holds those of all pods at once.
func (s *runtimeService) StreamPodSandboxMetrics(_ *runtime.StreamPodSandboxMetricsRequest, stream grpc.ServerStreamingServer[runtime.StreamPodSandboxMetricsResponse]) error {
	return s.eachPodMetrics(stream.Context(), func(m *runtime.PodSandboxMetrics) error {
		return stream.Send(&runtime.StreamPodSandboxMetricsResponse{PodSandboxMetrics: []*runtime.PodSandboxMetrics{m}})
	})
}

// eachPodMetrics measures one ready pod after the other. Whether something had to
// be left out is told in the last pod's metrics.
func (s *runtimeService) eachPodMetrics(ctx context.Context, yield func(*runtime.PodSandboxMetrics) error) error {
	var last *runtime.PodSandboxMetrics
	failed := false
	for _, r := range s.sandboxes(nil) {
		if r.State != sandbox.Ready {
			continue
		}
		m := s.podMetrics(ctx, r, &failed)
		if err := ctx.Err(); err != nil {
			return err
		}
		if m == nil {
			continue
		}
		if last != nil {
			if err := yield(last); err != nil {
				return err
			}
		}
		last = m
	}
	if last == nil {
		return nil
	}
	last.Metrics = append(last.Metrics, stats.ScrapeError(failed))
	return yield(last)
}

// podMetrics measures the pod's cgroup, its infra container with the network, and
// the containers that run. Nil is a pod that has ended since it was listed;
// failed is set for anything that cannot be measured.
func (s *runtimeService) podMetrics(ctx context.Context, r *sandbox.Record, failed *bool) *runtime.PodSandboxMetrics {
	measure := func(kind string, in stats.MetricsInput) []*runtime.Metric {
		out, err := s.Stats.Metrics(ctx, in)
		s.leaveOut(ctx, kind, in.ID, err)
		*failed = *failed || err != nil && !errdefs.IsNotFound(err)
		return out
	}
	labels := stats.Labels{Namespace: r.Config.GetMetadata().GetNamespace(), Pod: r.Config.GetMetadata().GetName()}
	m := &runtime.PodSandboxMetrics{PodSandboxId: r.ID}
	m.Metrics = measure("sandbox", stats.MetricsInput{ID: r.ID, CgroupPath: r.CgroupParent, Labels: labels})
	labels.Name = r.ID
	m.Metrics = append(m.Metrics, measure("sandbox", stats.MetricsInput{
		ID: r.ID, CgroupPath: spec.CgroupsPath(r.CgroupParent, r.ID, s.Host.SystemdCgroup),
		Labels: labels, Created: r.CreatedAt, PID: r.Infra.PID, Netns: r.Netns,
	})...)
	if len(m.Metrics) == 0 {
		return nil
	}
	for _, c := range s.Containers.InSandbox(r.ID) {
		if c.State != container.Running {
			continue
		}
		labels.Container, labels.Name, labels.Image = c.Config.GetMetadata().GetName(), c.ID, imageLabel(c)
		metrics := measure("container", stats.MetricsInput{
			ID: c.ID, CgroupPath: c.CgroupsPath, Labels: labels,
			Created: c.CreatedAt, Started: c.StartedAt, PID: c.Process.PID, Layer: true,
		})
		if len(metrics) > 0 {
			m.ContainerMetrics = append(m.ContainerMetrics, &runtime.ContainerMetrics{ContainerId: c.ID, Metrics: metrics})
		}
	}
	return m
}

// imageLabel is the image as the pod's author wrote it, which kubelet resolves to
// an ID before it asks for a container.
func imageLabel(c *container.Record) string {
	if name := c.Config.GetImage().GetUserSpecifiedImage(); name != "" {
		return name
	}
	return c.Config.GetImage().GetImage()
}
