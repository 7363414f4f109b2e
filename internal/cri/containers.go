package cri

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/spec"
)

// required refuses an empty field.
func required(field, value string) error {
	if value == "" {
		return fmt.Errorf("%s: is empty: %w", field, errdefs.ErrInvalidArgument)
	}
	return nil
}

// CreateContainer makes a container in a sandbox.
func (s *runtimeService) CreateContainer(ctx context.Context, req *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
	if err := required("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	id, err := s.Containers.Create(ctx, req.GetPodSandboxId(), req.GetConfig(), req.GetSandboxConfig())
	if err != nil {
		return nil, err
	}
	return &runtime.CreateContainerResponse{ContainerId: id}, nil
}

// StartContainer runs a created container.
func (s *runtimeService) StartContainer(ctx context.Context, req *runtime.StartContainerRequest) (*runtime.StartContainerResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if err := s.Containers.Start(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	return &runtime.StartContainerResponse{}, nil
}

// StopContainer asks a container to end and kills it after the timeout.
func (s *runtimeService) StopContainer(ctx context.Context, req *runtime.StopContainerRequest) (*runtime.StopContainerResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	grace, err := seconds("timeout", req.GetTimeout())
	if err != nil {
		return nil, err
	}
	if err := s.Containers.Stop(ctx, req.GetContainerId(), grace); err != nil {
		return nil, err
	}
	return &runtime.StopContainerResponse{}, nil
}

// RemoveContainer removes a container, running or not.
func (s *runtimeService) RemoveContainer(ctx context.Context, req *runtime.RemoveContainerRequest) (*runtime.RemoveContainerResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if err := s.Containers.Remove(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	return &runtime.RemoveContainerResponse{}, nil
}

// ListContainers lists containers, newest first.
func (s *runtimeService) ListContainers(_ context.Context, req *runtime.ListContainersRequest) (*runtime.ListContainersResponse, error) {
	resp := new(runtime.ListContainersResponse)
	for _, r := range s.containers(req.GetFilter()) {
		resp.Containers = append(resp.Containers, listedContainer(r))
	}
	return resp, nil
}

func listedContainer(r *container.Record) *runtime.Container {
	return &runtime.Container{
		Id:           r.ID,
		PodSandboxId: r.SandboxID,
		Metadata:     r.Config.GetMetadata(),
		Image:        r.Config.GetImage(),
		ImageRef:     r.ImageRef,
		ImageId:      r.ImageID,
		State:        containerState(r),
		CreatedAt:    r.CreatedAt.UnixNano(),
		Labels:       r.Config.GetLabels(),
		Annotations:  r.Config.GetAnnotations(),
	}
}

// containers returns the records that pass a filter, newest first.
func (s *runtimeService) containers(f *runtime.ContainerFilter) []*container.Record {
	var out []*container.Record
	for _, r := range s.Containers.List() {
		switch {
		case !strings.HasPrefix(r.ID, f.GetId()):
		case !strings.HasPrefix(r.SandboxID, f.GetPodSandboxId()):
		case f.GetState() != nil && f.GetState().GetState() != containerState(r):
		case !r.HasLabels(f.GetLabelSelector()):
		default:
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b *container.Record) int { return b.CreatedAt.Compare(a.CreatedAt) })
	return out
}

// ContainerStatus tells all of one container.
func (s *runtimeService) ContainerStatus(_ context.Context, req *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	c, err := s.Containers.Get(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &runtime.ContainerStatusResponse{Status: s.containerStatus(c.Get())}
	if req.GetVerbose() {
		if resp.Info, err = s.containerInfo(c.Get()); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

func containerState(r *container.Record) runtime.ContainerState {
	switch r.State {
	case container.Created:
		return runtime.ContainerState_CONTAINER_CREATED
	case container.Running:
		return runtime.ContainerState_CONTAINER_RUNNING
	case container.Exited:
		return runtime.ContainerState_CONTAINER_EXITED
	default:
		return runtime.ContainerState_CONTAINER_UNKNOWN
	}
}

func (s *runtimeService) containerStatus(r *container.Record) *runtime.ContainerStatus {
	out := &runtime.ContainerStatus{
		Id:          r.ID,
		Metadata:    r.Config.GetMetadata(),
		State:       containerState(r),
		CreatedAt:   r.CreatedAt.UnixNano(),
		StartedAt:   nanos(r.StartedAt),
		FinishedAt:  nanos(r.FinishedAt),
		ExitCode:    r.ExitCode,
		Reason:      r.Reason,
		Message:     r.Message,
		Image:       r.Config.GetImage(),
		ImageRef:    r.ImageRef,
		ImageId:     r.ImageID,
		Labels:      r.Config.GetLabels(),
		Annotations: r.Config.GetAnnotations(),
		Mounts:      mounts(r),
		LogPath:     r.LogFile(),
		StopSignal:  spec.CRISignal(r.StopSignal),
		User:        &runtime.ContainerUser{Linux: linuxUser(r)},
	}
	if res := r.CurrentResources(); res != nil {
		out.Resources = &runtime.ContainerResources{Linux: res}
	}
	return out
}

// mounts are the config's, with what the images among them turned out to be.
func mounts(r *container.Record) []*runtime.Mount {
	if len(r.VolumeRefs) == 0 {
		return r.Config.GetMounts()
	}
	out := slices.Clone(r.Config.GetMounts())
	for i, ref := range r.VolumeRefs {
		out[i] = proto.CloneOf(out[i])
		out[i].Image.ImageRef = ref
	}
	return out
}

func linuxUser(r *container.Record) *runtime.LinuxContainerUser {
	u := &runtime.LinuxContainerUser{Uid: int64(r.User.UID), Gid: int64(r.User.GID)}
	for _, gid := range r.User.AdditionalGids {
		u.SupplementalGroups = append(u.SupplementalGroups, int64(gid))
	}
	return u
}

// containerInfo is the verbose information, with containerd's names as sandboxInfo.
func (s *runtimeService) containerInfo(r *container.Record) (map[string]string, error) {
	type details struct {
		SandboxID   string                   `json:"sandboxID"`
		PID         int                      `json:"pid"`
		CgroupsPath string                   `json:"cgroupsPath"`
		SnapshotKey string                   `json:"snapshotKey"`
		Snapshotter string                   `json:"snapshotter"`
		RuntimeType string                   `json:"runtimeType"`
		Config      *runtime.ContainerConfig `json:"config"`
		RuntimeSpec any                      `json:"runtimeSpec,omitempty"`
	}
	d := details{
		SandboxID: r.SandboxID, CgroupsPath: r.CgroupsPath,
		SnapshotKey: r.ID, Snapshotter: "overlayfs", RuntimeType: runtimeName, Config: r.Config,
	}
	if r.State == container.Running {
		d.PID = r.Process.PID
	}
	// After a reboot a container is on record and its spec is not.
	if oci, err := s.Containers.Spec(r.ID); err == nil {
		d.RuntimeSpec = oci
	}
	return info("info", d)
}

// ExecSync runs a command in a container and returns its output.
func (s *runtimeService) ExecSync(ctx context.Context, req *runtime.ExecSyncRequest) (*runtime.ExecSyncResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	timeout, err := seconds("timeout", req.GetTimeout())
	if err != nil {
		return nil, err
	}
	out, err := s.Containers.ExecSync(ctx, req.GetContainerId(), req.GetCmd(), timeout)
	if err != nil {
		return nil, err
	}
	return &runtime.ExecSyncResponse{Stdout: out.Stdout, Stderr: out.Stderr, ExitCode: out.ExitCode}, nil
}

// UpdateContainerResources changes a container's limits.
func (s *runtimeService) UpdateContainerResources(ctx context.Context, req *runtime.UpdateContainerResourcesRequest) (*runtime.UpdateContainerResourcesResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if req.GetWindows() != nil {
		return nil, fmt.Errorf("windows: this is Linux: %w", errdefs.ErrInvalidArgument)
	}
	if len(req.GetAnnotations()) > 0 {
		return nil, fmt.Errorf("annotations: podshim knows none that change resources: %w", errdefs.ErrNotImplemented)
	}
	if req.GetLinux() == nil {
		return nil, fmt.Errorf("linux: is missing: %w", errdefs.ErrInvalidArgument)
	}
	if err := s.Containers.UpdateResources(ctx, req.GetContainerId(), req.GetLinux()); err != nil {
		return nil, err
	}
	return &runtime.UpdateContainerResourcesResponse{}, nil
}

// ReopenContainerLog opens a container's log anew after it was moved away.
func (s *runtimeService) ReopenContainerLog(ctx context.Context, req *runtime.ReopenContainerLogRequest) (*runtime.ReopenContainerLogResponse, error) {
	if err := required("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if err := s.Containers.ReopenLog(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	return &runtime.ReopenContainerLogResponse{}, nil
}

// nanos is a time in CRI's unit; a time that is not set is 0.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

// seconds reads a field that counts seconds.
func seconds(field string, n int64) (time.Duration, error) {
	if n < 0 {
		return 0, fmt.Errorf("%s: %d seconds is less than none: %w", field, n, errdefs.ErrInvalidArgument)
	}
	if n > math.MaxInt64/int64(time.Second) {
		return math.MaxInt64, nil
	}
	return time.Duration(n) * time.Second, nil
}
