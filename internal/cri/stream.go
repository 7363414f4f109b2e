package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/stats"
)

// The Stream calls are the List calls in many messages (KEP 5825). Which items
// there are is settled when the call begins, by the same code as for the list;
// each is made when its turn comes and is in one message. So a stream holds one
// message at a time, however long the list is and however slow its reader.

// batchSize is about how large a message of a stream becomes, bytes: a single
// item may be larger.
const batchSize = 64 << 10

// sendAll sends what item makes of each record, in order and in batches. An item
// that is nil is left out.
func sendAll[R any, T interface {
	comparable
	proto.Message
}](ctx context.Context, records []R, item func(R) T, send func([]T) error) error {
	var (
		batch []T
		size  int
		none  T
	)
	for _, r := range records {
		if err := ctx.Err(); err != nil {
			return err
		}
		it := item(r)
		if it == none {
			continue
		}
		n := proto.Size(it)
		if size+n > batchSize && len(batch) > 0 {
			if err := send(batch); err != nil {
				return err
			}
			// A new one: the transport may still read the old.
			batch, size = nil, 0
		}
		batch, size = append(batch, it), size+n
	}
	if len(batch) == 0 {
		return ctx.Err()
	}
	return send(batch)
}

// StreamPodSandboxes is ListPodSandbox in many messages.
func (s *runtimeService) StreamPodSandboxes(req *runtime.StreamPodSandboxesRequest, stream grpc.ServerStreamingServer[runtime.StreamPodSandboxesResponse]) error {
	return sendAll(stream.Context(), s.sandboxes(req.GetFilter()), listedSandbox, func(items []*runtime.PodSandbox) error {
		return stream.Send(&runtime.StreamPodSandboxesResponse{PodSandboxes: items})
	})
}

// StreamContainers is ListContainers in many messages.
func (s *runtimeService) StreamContainers(req *runtime.StreamContainersRequest, stream grpc.ServerStreamingServer[runtime.StreamContainersResponse]) error {
	return sendAll(stream.Context(), s.containers(req.GetFilter()), listedContainer, func(items []*runtime.Container) error {
		return stream.Send(&runtime.StreamContainersResponse{Containers: items})
	})
}

// StreamContainerStats is ListContainerStats in many messages.
func (s *runtimeService) StreamContainerStats(req *runtime.StreamContainerStatsRequest, stream grpc.ServerStreamingServer[runtime.StreamContainerStatsResponse]) error {
	ctx, layersBy := stream.Context(), stats.LayerDeadline()
	item := func(r *container.Record) *runtime.ContainerStats { return s.listedContainerStats(ctx, r, layersBy) }
	return sendAll(ctx, s.measurable(req.GetFilter()), item, func(items []*runtime.ContainerStats) error {
		return stream.Send(&runtime.StreamContainerStatsResponse{ContainerStats: items})
	})
}

// StreamPodSandboxStats is ListPodSandboxStats in many messages.
func (s *runtimeService) StreamPodSandboxStats(req *runtime.StreamPodSandboxStatsRequest, stream grpc.ServerStreamingServer[runtime.StreamPodSandboxStatsResponse]) error {
	ctx, layersBy := stream.Context(), stats.LayerDeadline()
	item := func(r *sandbox.Record) *runtime.PodSandboxStats { return s.listedPodStats(ctx, r, layersBy) }
	return sendAll(ctx, s.measurablePods(req.GetFilter()), item, func(items []*runtime.PodSandboxStats) error {
		return stream.Send(&runtime.StreamPodSandboxStatsResponse{PodSandboxStats: items})
	})
}

// StreamImages is ListImages in many messages.
func (s *imageService) StreamImages(req *runtime.StreamImagesRequest, stream grpc.ServerStreamingServer[runtime.StreamImagesResponse]) error {
	images, err := s.images(req.GetFilter())
	if err != nil {
		return err
	}
	item := func(img image.Image) *runtime.Image { return criImage(img) }
	return sendAll(stream.Context(), images, item, func(items []*runtime.Image) error {
		return stream.Send(&runtime.StreamImagesResponse{Images: items})
	})
}

// streamOf is the call that gives in many messages what a list gives in one.
var streamOf = map[string]string{
	runtime.RuntimeService_ListPodSandbox_FullMethodName:        "StreamPodSandboxes",
	runtime.RuntimeService_ListContainers_FullMethodName:        "StreamContainers",
	runtime.RuntimeService_ListContainerStats_FullMethodName:    "StreamContainerStats",
	runtime.RuntimeService_ListPodSandboxStats_FullMethodName:   "StreamPodSandboxStats",
	runtime.RuntimeService_ListPodSandboxMetrics_FullMethodName: "StreamPodSandboxMetrics",
	runtime.ImageService_ListImages_FullMethodName:              "StreamImages",
}

// fits refuses an answer that is too large for one message, with what to call
// instead: gRPC's own error would not say.
func fits(method string, resp any, limit int) error {
	m, ok := resp.(proto.Message)
	if !ok {
		return nil
	}
	size := proto.Size(m)
	if size <= limit {
		return nil
	}
	instead := "cri.max_message_size raises the limit"
	if stream := streamOf[method]; stream != "" {
		instead = "call " + stream + " (kubelet's feature gate CRIListStreaming), or filter"
	}
	return fmt.Errorf("the answer is %d bytes, a message may have %d: %s: %w", size, limit, instead, errdefs.ErrResourceExhausted)
}
