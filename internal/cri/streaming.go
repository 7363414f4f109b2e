package cri

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/sandbox"
)

// Exec returns the URL at which a client runs a command with streams.
func (s *runtimeService) Exec(_ context.Context, req *runtime.ExecRequest) (*runtime.ExecResponse, error) {
	if err := s.mustRun(req.GetContainerId()); err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, fmt.Errorf("cmd: is empty: %w", errdefs.ErrInvalidArgument)
	}
	return s.Streaming.GetExec(req)
}

// Attach returns the URL at which a client gets a container's own streams.
func (s *runtimeService) Attach(_ context.Context, req *runtime.AttachRequest) (*runtime.AttachResponse, error) {
	if err := s.mustRun(req.GetContainerId()); err != nil {
		return nil, err
	}
	c, err := s.Containers.Get(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if has := c.Get().Config.GetTty(); has && !req.GetTty() {
		return nil, fmt.Errorf("tty: is false, but container %s has a terminal: attach with one (crictl attach -t): %w", c.Get().ID, errdefs.ErrInvalidArgument)
	} else if !has && req.GetTty() {
		return nil, fmt.Errorf("tty: is true, but container %s has no terminal: attach without one: %w", c.Get().ID, errdefs.ErrInvalidArgument)
	}
	return s.Streaming.GetAttach(req)
}

// PortForward returns the URL at which a client reaches the pod's ports.
func (s *runtimeService) PortForward(_ context.Context, req *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sb, err := s.Sandboxes.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if r := sb.Get(); r.State != sandbox.Ready {
		return nil, fmt.Errorf("pod sandbox %s is not ready (%s): %w", r.ID, r.Reason, errdefs.ErrFailedPrecondition)
	}
	return s.Streaming.GetPortForward(req)
}

func (s *runtimeService) mustRun(id string) error {
	if err := required("container_id", id); err != nil {
		return err
	}
	c, err := s.Containers.Get(id)
	if err != nil {
		return err
	}
	if r := c.Get(); r.State != container.Running {
		return fmt.Errorf("container %s is %s, not running: %w", r.ID, r.State, errdefs.ErrFailedPrecondition)
	}
	return nil
}
