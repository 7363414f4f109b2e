package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// errNoCheckpoints is what the three calls for checkpoints answer. Nothing of
// their requests is looked at: there is nothing that it could change.
func errNoCheckpoints(call string) error {
	return fmt.Errorf("%s: podshim cannot freeze the memory and the open files of running processes into files yet (its monitor has no CRIU), "+
		"and has no archive format to restore a pod from: stop the pod and run it anew instead: %w", call, errdefs.ErrNotImplemented)
}

// CheckpointContainer is not there yet.
func (s *runtimeService) CheckpointContainer(context.Context, *runtime.CheckpointContainerRequest) (*runtime.CheckpointContainerResponse, error) {
	return nil, errNoCheckpoints("checkpoint container")
}

// CheckpointPod is not there yet.
func (s *runtimeService) CheckpointPod(context.Context, *runtime.CheckpointPodRequest) (*runtime.CheckpointPodResponse, error) {
	return nil, errNoCheckpoints("checkpoint pod")
}

// RestorePod is not there yet.
func (s *runtimeService) RestorePod(context.Context, *runtime.RestorePodRequest) (*runtime.RestorePodResponse, error) {
	return nil, errNoCheckpoints("restore pod")
}
