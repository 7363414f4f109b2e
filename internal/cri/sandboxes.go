package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/spec"
)

// RunPodSandbox makes a sandbox and returns once it is ready.
func (s *runtimeService) RunPodSandbox(ctx context.Context, req *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	id, err := s.Sandboxes.Run(ctx, req.GetConfig(), req.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	return &runtime.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// StopPodSandbox ends what runs in a sandbox and takes its network down.
func (s *runtimeService) StopPodSandbox(ctx context.Context, req *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if err := s.Containers.StopPod(ctx, req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return &runtime.StopPodSandboxResponse{}, nil
}

// RemovePodSandbox removes a sandbox with all its containers.
func (s *runtimeService) RemovePodSandbox(ctx context.Context, req *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if err := s.Containers.RemovePod(ctx, req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return &runtime.RemovePodSandboxResponse{}, nil
}

// UpdatePodSandboxResources notes what a pod may use, and holds it to that where
// its cgroup is podshim's own.
func (s *runtimeService) UpdatePodSandboxResources(ctx context.Context, req *runtime.UpdatePodSandboxResourcesRequest) (*runtime.UpdatePodSandboxResourcesResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if req.GetOverhead() == nil && req.GetResources() == nil {
		return nil, fmt.Errorf("resources: overhead and resources are missing: %w", errdefs.ErrInvalidArgument)
	}
	if err := s.Sandboxes.UpdateResources(ctx, req.GetPodSandboxId(), req.GetOverhead(), req.GetResources()); err != nil {
		return nil, err
	}
	return &runtime.UpdatePodSandboxResourcesResponse{}, nil
}

// PodSandboxStatus tells all of one sandbox, and of its containers.
func (s *runtimeService) PodSandboxStatus(_ context.Context, req *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sb, err := s.Sandboxes.Get(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	r := sb.Get()
	resp := &runtime.PodSandboxStatusResponse{
		Status:    sandboxStatus(r),
		Timestamp: time.Now().UnixNano(),
	}
	for _, c := range s.Containers.InSandbox(r.ID) {
		resp.ContainersStatuses = append(resp.ContainersStatuses, s.containerStatus(c))
	}
	if req.GetVerbose() {
		if resp.Info, err = s.sandboxInfo(r); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// ListPodSandbox lists sandboxes, newest first.
func (s *runtimeService) ListPodSandbox(_ context.Context, req *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	resp := new(runtime.ListPodSandboxResponse)
	for _, r := range s.sandboxes(req.GetFilter()) {
		resp.Items = append(resp.Items, listedSandbox(r))
	}
	return resp, nil
}

func listedSandbox(r *sandbox.Record) *runtime.PodSandbox {
	return &runtime.PodSandbox{
		Id:             r.ID,
		Metadata:       r.Config.GetMetadata(),
		State:          sandboxState(r),
		CreatedAt:      r.CreatedAt.UnixNano(),
		Labels:         r.Config.GetLabels(),
		Annotations:    r.Config.GetAnnotations(),
		RuntimeHandler: r.Handler,
	}
}

// sandboxes returns the records that pass a filter, newest first.
func (s *runtimeService) sandboxes(f *runtime.PodSandboxFilter) []*sandbox.Record {
	var out []*sandbox.Record
	for _, r := range s.Sandboxes.List() {
		switch {
		case !strings.HasPrefix(r.ID, f.GetId()):
		case f.GetState() != nil && f.GetState().GetState() != sandboxState(r):
		case !r.HasLabels(f.GetLabelSelector()):
		default:
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b *sandbox.Record) int { return b.CreatedAt.Compare(a.CreatedAt) })
	return out
}

func sandboxState(r *sandbox.Record) runtime.PodSandboxState {
	if r.State == sandbox.Ready {
		return runtime.PodSandboxState_SANDBOX_READY
	}
	return runtime.PodSandboxState_SANDBOX_NOTREADY
}

func sandboxStatus(r *sandbox.Record) *runtime.PodSandboxStatus {
	out := &runtime.PodSandboxStatus{
		Id:             r.ID,
		Metadata:       r.Config.GetMetadata(),
		State:          sandboxState(r),
		CreatedAt:      r.CreatedAt.UnixNano(),
		Labels:         r.Config.GetLabels(),
		Annotations:    r.Config.GetAnnotations(),
		RuntimeHandler: r.Handler,
		Network:        &runtime.PodSandboxNetworkStatus{},
		Linux: &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{
			Options: r.Config.GetLinux().GetSecurityContext().GetNamespaceOptions(),
		}},
	}
	// A pod whose network is taken down has no IP to be reached at.
	if r.State == sandbox.Ready && len(r.IPs) > 0 {
		out.Network.Ip = r.IPs[0].String()
		for _, ip := range r.IPs[1:] {
			out.Network.AdditionalIps = append(out.Network.AdditionalIps, &runtime.PodIP{Ip: ip.String()})
		}
	}
	return out
}

// sandboxInfo is the verbose information. The names are those of containerd, for
// which operators' jq and go-template paths are written (.info.pid,
// .info.runtimeSpec.linux.namespaces).
func (s *runtimeService) sandboxInfo(r *sandbox.Record) (map[string]string, error) {
	type details struct {
		PID            int                       `json:"pid"`
		ProcessStatus  string                    `json:"processStatus"`
		Reason         string                    `json:"reason,omitempty"`
		NetNS          string                    `json:"netNamespace,omitempty"`
		NetNSClosed    bool                      `json:"netNamespaceClosed"`
		Image          string                    `json:"image"`
		CgroupParent   string                    `json:"cgroupParent"`
		CgroupsPath    string                    `json:"cgroupsPath,omitempty"`
		RuntimeHandler string                    `json:"runtimeHandler"`
		RuntimeType    string                    `json:"runtimeType"`
		Config         *runtime.PodSandboxConfig `json:"config"`
		RuntimeSpec    any                       `json:"runtimeSpec,omitempty"`
		CNIResult      json.RawMessage           `json:"cniResult,omitempty"`
	}
	d := details{
		ProcessStatus: "exited", Reason: r.Reason,
		NetNS: r.Netns, NetNSClosed: r.Released,
		CgroupParent:   r.CgroupParent,
		RuntimeHandler: r.Handler, RuntimeType: runtimeName,
		Config: r.CurrentConfig(), CNIResult: r.NetworkResult,
	}
	if r.State == sandbox.Ready {
		d.PID, d.ProcessStatus = r.Infra.PID, "running"
	}
	// Gone with a stop and with a reboot.
	if oci, err := s.Sandboxes.Spec(r.ID); err == nil {
		d.RuntimeSpec, d.CgroupsPath, d.Image = oci, oci.Linux.CgroupsPath, spec.SandboxImage(oci)
	}
	return info("info", d)
}
