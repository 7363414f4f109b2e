package container

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/host"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/rootfs"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/spec"
	"github.com/podshim/podshim/internal/spec/cdi"
	"github.com/podshim/podshim/internal/state"
)

// Create makes a container in a sandbox and returns its ID once it can be started.
//
// It is idempotent: a caller that asks again, with the same config, before the
// container was started gets the same ID. The same metadata with another config
// is ErrAlreadyExists.
func (m *Manager) Create(ctx context.Context, sandboxID string, cfg *runtime.ContainerConfig, podConfig *runtime.PodSandboxConfig) (string, error) {
	s, err := m.Sandboxes.Get(sandboxID)
	if err != nil {
		return "", err
	}
	sandboxID = s.Get().ID
	if err := spec.ValidateContainer(cfg, s.Get().Config); err != nil {
		return "", err
	}
	if err := samePod(podConfig, s.Get().Config); err != nil {
		return "", err
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(cfg)
	if err != nil {
		return "", fmt.Errorf("encode config: %w", err)
	}
	key := fmt.Sprintf("create/%s/%x", name(sandboxID, cfg), sha256.Sum256(raw))
	return flight.Do(ctx, &m.flights, key, func(ctx context.Context) (string, error) {
		return m.create(ctx, s, cfg)
	})
}

// samePod refuses a container meant for another pod than its sandbox is of.
// kubelet sends the pod's config again (CRI CreateContainerRequest.sandbox_config);
// podshim goes by the one the sandbox was made with.
func samePod(again, original *runtime.PodSandboxConfig) error {
	if again.GetMetadata() == nil {
		return nil
	}
	if again.GetMetadata().GetUid() != original.GetMetadata().GetUid() {
		return fmt.Errorf("sandbox_config.metadata.uid: %q is not the sandbox's pod %q: %w",
			again.GetMetadata().GetUid(), original.GetMetadata().GetUid(), errdefs.ErrInvalidArgument)
	}
	return nil
}

func (m *Manager) create(ctx context.Context, s *sandbox.Sandbox, cfg *runtime.ContainerConfig) (string, error) {
	img, err := m.Images.Get(cfg.GetImage().GetImage())
	if err != nil {
		return "", fmt.Errorf("image.image: %w", err)
	}
	r := &Record{
		ID:        newID(),
		SandboxID: s.Get().ID,
		Name:      name(s.Get().ID, cfg),
		Config:    cfg,
		ImageID:   img.ID,
		ImageRef:  imageRef(img),
		State:     Creating,
		CreatedAt: time.Now(),
	}
	if cfg.GetLogPath() != "" {
		r.LogRoot, r.LogPath = s.Get().Config.GetLogDirectory(), cfg.GetLogPath()
	}
	existing, err := m.reserve(r)
	if err != nil || existing != "" {
		return existing, err
	}
	unlock, err := m.ops.Lock(ctx, r.ID)
	if err != nil {
		m.unreserve(r)
		return "", err
	}
	defer unlock()
	c := newContainer(r)
	// In the index before the sandbox is seen to be ready: a sandbox that is
	// stopped from here on finds the container, or the container finds it stopped.
	m.index(c)
	pod, err := m.Sandboxes.Pod(s)
	if err == nil {
		err = m.update(c, func(*Record) {})
	}
	if err != nil {
		m.forget(r)
		return "", err
	}
	if err := m.build(ctx, c, pod, s.Get().Handler, img); err != nil {
		return "", m.giveUp(ctx, c, err)
	}
	m.log(r).WithField("image", img.ID).Info("container is created")
	return r.ID, nil
}

// build takes what a container holds before it runs. Its last step makes the
// container Created; whatever fails before is given back by release.
func (m *Manager) build(ctx context.Context, c *Container, pod spec.Pod, handler string, img image.Image) error {
	r := c.Get()
	root := m.rootfs(r.ID)
	// Traversable, as the sandbox's folder is.
	if err := os.MkdirAll(root, 0o711); err != nil {
		return fmt.Errorf("make container directory: %w", err)
	}
	mounts, err := m.Images.Prepare(ctx, r.ID, img, idMapping(pod)...)
	if err != nil {
		return fmt.Errorf("prepare snapshot: %w", err)
	}
	if err := image.Mount(mounts, root); err != nil {
		return fmt.Errorf("mount snapshot: %w", err)
	}
	sc := r.Config.GetLinux().GetSecurityContext()
	user, err := rootfs.LookupUser(root, userRequest(sc, img.Config.User))
	if err != nil {
		return fmt.Errorf("linux.security_context: user of the container: %w", err)
	}
	sources, err := host.Sources(r.Config.GetMounts())
	if err != nil {
		return err
	}
	devices, err := host.Devices(r.Config)
	if err != nil {
		return err
	}
	volumes, err := m.volumes(ctx, r, root, pod, img)
	if err != nil {
		return err
	}
	target, err := m.targetPID(r)
	if err != nil {
		return err
	}
	oci, err := spec.ForContainer(spec.Container{
		ID: r.ID, Config: r.Config, Pod: pod,
		Image: img.Config, Rootfs: root,
		User: specs.User{UID: user.UID, GID: user.GID, AdditionalGids: user.AdditionalGIDs}, Home: user.Home,
		Volumes:     volumes,
		Sources:     sources,
		Devices:     devices,
		TargetPID:   target,
		ReadSeccomp: host.ReadSeccomp,
		Host:        m.Host,
		Handler:     m.Handlers[handler],
	})
	if err != nil {
		return err
	}
	if err := cdi.Inject(oci, r.Config, cdi.Dirs); err != nil {
		return err
	}
	if err := m.saveSpec(r.ID, oci); err != nil {
		return err
	}
	return m.transition(c, Created, func(r *Record) {
		r.CgroupsPath = oci.Linux.CgroupsPath
		r.User = oci.Process.User
		r.StopSignal = spec.StopSignal(r.Config, img.Config)
	})
}

// giveUp releases what a failed Create has taken and returns its error; what
// cannot be released now the janitor goes on with.
func (m *Manager) giveUp(ctx context.Context, c *Container, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseLimit)
	defer cancel()
	r := c.Get()
	err := m.release(ctx, r)
	if err == nil {
		err = m.Records.Delete(state.Containers, r.ID)
	}
	if err == nil {
		m.forget(r)
		c.close()
		return cause
	}
	m.unreserve(r)
	m.log(r).WithError(err).Error("what a failed container holds is not all released: will be tried again")
	if uerr := m.transition(c, Exited, func(r *Record) { r.Failed, r.Message = true, cause.Error() }); uerr != nil {
		m.log(r).WithError(uerr).Error("record of a failed container")
	}
	m.wakeJanitor()
	return cause
}

// reserve takes the record's name. The ID of the container that has it is
// returned if that is what the caller asks for.
func (m *Manager) reserve(r *Record) (existing string, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	holder, taken := m.names[r.Name]
	if !taken {
		m.names[r.Name] = r.ID
		return "", nil
	}
	if c := m.byID[holder]; c != nil {
		old := c.Get()
		if old.State == Created && old.ImageID == r.ImageID && proto.Equal(old.Config, r.Config) {
			return holder, nil
		}
	}
	md := r.Config.GetMetadata()
	return "", fmt.Errorf("container %q attempt %d exists in the sandbox as %s: remove that, or count metadata.attempt up: %w",
		md.GetName(), md.GetAttempt(), holder, errdefs.ErrAlreadyExists)
}

// targetPID is the PID namespace to join in mode TARGET.
func (m *Manager) targetPID(r *Record) (string, error) {
	ns := r.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if ns.GetPid() != runtime.NamespaceMode_TARGET {
		return "", nil
	}
	const field = "linux.security_context.namespace_options.target_id"
	t, err := m.Get(ns.GetTargetId())
	if err != nil {
		return "", fmt.Errorf("%s: %w: %w", field, errdefs.ErrInvalidArgument, err)
	}
	target := t.Get()
	if target.SandboxID != r.SandboxID {
		return "", fmt.Errorf("%s: container %s is of another pod: %w", field, target.ID, errdefs.ErrInvalidArgument)
	}
	if target.State != Running {
		return "", fmt.Errorf("%s: container %s is not running: %w", field, target.ID, errdefs.ErrFailedPrecondition)
	}
	return fmt.Sprintf("/proc/%d/ns/pid", target.Process.PID), nil
}

func idMapping(pod spec.Pod) []image.SnapshotOpt {
	if len(pod.UIDMappings) == 0 {
		return nil
	}
	return []image.SnapshotOpt{image.WithIDMap(pod.UIDMappings, pod.GIDMappings)}
}

func userRequest(sc *runtime.LinuxContainerSecurityContext, imageUser string) rootfs.UserRequest {
	u := rootfs.UserRequest{
		Image:         imageUser,
		RunAsUsername: sc.GetRunAsUsername(),
		// The config's own supplemental groups package spec adds.
		Strict: sc.GetSupplementalGroupsPolicy() == runtime.SupplementalGroupsPolicy_Strict,
	}
	if v := sc.GetRunAsUser(); v != nil {
		u.RunAsUser = &v.Value
	}
	if v := sc.GetRunAsGroup(); v != nil {
		u.RunAsGroup = &v.Value
	}
	return u
}

func imageRef(img image.Image) string {
	if len(img.RepoDigests) > 0 {
		return img.RepoDigests[0]
	}
	return img.ID
}

func (m *Manager) specPath(id string) string { return filepath.Join(m.runDir(id), "config.json") }

func (m *Manager) saveSpec(id string, oci *specs.Spec) error {
	raw, err := json.Marshal(oci)
	if err != nil {
		return fmt.Errorf("encode spec: %w", err)
	}
	if err := os.WriteFile(m.specPath(id), raw, 0o600); err != nil {
		return fmt.Errorf("write spec: %w", err)
	}
	return nil
}

// Spec returns the OCI description a container was made with.
func (m *Manager) Spec(id string) (*specs.Spec, error) {
	raw, err := os.ReadFile(m.specPath(id))
	if err != nil {
		return nil, fmt.Errorf("read spec of container %s: %w", id, err)
	}
	var oci specs.Spec
	if err := json.Unmarshal(raw, &oci); err != nil {
		return nil, fmt.Errorf("decode spec of container %s: %w", id, err)
	}
	return &oci, nil
}
