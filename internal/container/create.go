package container

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/host"
	"github.com/podshim/podshim/internal/ids"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/rootfs"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/spec"
	"github.com/podshim/podshim/internal/spec/cdi"
	"github.com/podshim/podshim/internal/timeline"
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
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(essence(cfg))
	if err != nil {
		return "", fmt.Errorf("encode config: %w", err)
	}
	key := fmt.Sprintf("create/%s/%x", name(sandboxID, cfg), sha256.Sum256(raw))
	return flight.Do(ctx, &m.flights, key, func(ctx context.Context) (string, error) {
		return m.create(ctx, s, cfg)
	})
}

// essence is what makes two configs ask for the same container. kubelet orders
// the environment anew each time that it builds a config, and gives every try
// its own file for the termination message, so that its retries never have equal
// bytes.
func essence(cfg *runtime.ContainerConfig) *runtime.ContainerConfig {
	out := proto.Clone(cfg).(*runtime.ContainerConfig)
	slices.SortStableFunc(out.Envs, func(a, b *runtime.KeyValue) int { return strings.Compare(a.GetKey(), b.GetKey()) })
	termination := cfg.GetAnnotations()["io.kubernetes.container.terminationMessagePath"]
	for _, m := range out.Mounts {
		if termination != "" && m.GetContainerPath() == termination {
			m.HostPath = ""
		}
	}
	return out
}

// samePod refuses a container meant for another pod than its sandbox is of, or
// for another attempt. kubelet sends the pod's config again (CRI
// CreateContainerRequest.sandbox_config); podshim goes by the one the sandbox was
// made with.
func samePod(again, original *runtime.PodSandboxConfig) error {
	if again.GetMetadata() == nil || proto.Equal(again.GetMetadata(), original.GetMetadata()) {
		return nil
	}
	return fmt.Errorf("sandbox_config.metadata: %v is not the sandbox's %v: %w", again.GetMetadata(), original.GetMetadata(), errdefs.ErrInvalidArgument)
}

func (m *Manager) create(ctx context.Context, s *sandbox.Sandbox, cfg *runtime.ContainerConfig) (string, error) {
	img, err := m.image("image", cfg.GetImage())
	if err != nil {
		return "", err
	}
	r := &Record{
		ID:        ids.New(),
		SandboxID: s.Get().ID,
		Name:      name(s.Get().ID, cfg),
		Config:    cfg,
		ImageID:   img.ID,
		ImageRef:  imageRef(img),
		State:     Creating,
		CreatedAt: time.Now(),
	}
	// Without a directory there is no log, as crictl's users have it.
	if cfg.GetLogPath() != "" && s.Get().Config.GetLogDirectory() != "" {
		r.LogRoot, r.LogPath = s.Get().Config.GetLogDirectory(), cfg.GetLogPath()
	}
	existing, err := m.reserve(r)
	if err != nil || existing != "" {
		return existing, err
	}
	unlock, err := m.all.Lock(ctx, r.ID)
	if err != nil {
		m.all.Unreserve(r)
		return "", err
	}
	defer unlock()
	// In the index before the sandbox is seen to be ready: a sandbox that is
	// stopped from here on finds the container, or the container finds it stopped.
	c := m.all.Add(r)
	pod, err := m.Sandboxes.Pod(s)
	if err == nil {
		err = m.all.Update(c, func(*Record) {})
	}
	if err != nil {
		m.all.Forget(r)
		return "", err
	}
	if err := m.build(ctx, c, pod, s.Get().Handler, img); err != nil {
		return "", m.all.GiveUp(ctx, c, err, m.release)
	}
	m.log(r).WithField("image", img.ID).Info("container is created")
	return r.ID, nil
}

// image finds the image that a spec of the config, called field, names.
func (m *Manager) image(field string, want *runtime.ImageSpec) (image.Image, error) {
	if h := want.GetRuntimeHandler(); h != "" {
		if _, ok := m.Handlers[h]; !ok {
			return image.Image{}, fmt.Errorf("%s.runtime_handler: no handler %q is configured: %w", field, h, errdefs.ErrInvalidArgument)
		}
	}
	img, err := m.Images.Get(want.GetImage())
	if err != nil {
		if errors.Is(err, errdefs.ErrNotFound) {
			return image.Image{}, fmt.Errorf("%s.image: pull it before it is used: %w", field, err)
		}
		return image.Image{}, fmt.Errorf("%s.image: %w", field, err)
	}
	if ref := want.GetImageRef(); ref != "" && ref != img.ID && !slices.Contains(img.RepoDigests, ref) {
		return image.Image{}, fmt.Errorf("%s.image_ref: image %q is %s, not %q: %w", field, want.GetImage(), imageRef(img), ref, errdefs.ErrInvalidArgument)
	}
	return img, nil
}

// build takes what a container holds before it runs. Its last step makes the
// container Created; whatever fails before is given back by release.
func (m *Manager) build(ctx context.Context, c *Container, pod spec.Pod, handler string, img image.Image) error {
	r := c.Get()
	h, ok := m.Handlers[handler]
	if !ok {
		return fmt.Errorf("runtime handler %q of the sandbox is not configured any more: %w", handler, errdefs.ErrFailedPrecondition)
	}
	root := m.rootfs(r.ID)
	for _, dir := range []string{m.runDir(r.ID), m.rootDir(r.ID)} {
		if err := host.PrivateDir(dir, pod.GIDMappings); err != nil {
			return fmt.Errorf("make container directory: %w", err)
		}
	}
	sc := r.Config.GetLinux().GetSecurityContext()
	processLabel, mountLabel := pod.ProcessLabel, pod.MountLabel
	if o := sc.GetSelinuxOptions(); o != nil {
		var err error
		if processLabel, mountLabel, err = sandbox.Labels(o, pod.ProcessLabel); err != nil {
			return err
		}
	}
	err := timeline.Do(ctx, "snapshot", func() error {
		mounts, err := m.Images.Prepare(ctx, r.ID, img, idMapping(pod)...)
		if err != nil {
			return fmt.Errorf("prepare snapshot: %w", err)
		}
		if err := image.Mount(mounts, root, mountLabel); err != nil {
			return fmt.Errorf("mount snapshot: %w", err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	user, err := rootfs.LookupUser(root, userRequest(sc, img.Config.User))
	if err != nil {
		return fmt.Errorf("linux.security_context: user of the container: %w", err)
	}
	sources, err := host.Sources(r.Config.GetMounts())
	if err != nil {
		return err
	}
	if err := idMappable(r.Config.GetMounts(), sources); err != nil {
		return err
	}
	devices, err := host.Devices(r.Config)
	if err != nil {
		return err
	}
	volumes, refs, err := m.volumes(ctx, r, root, pod, img, mountLabel)
	if err != nil {
		return err
	}
	for i, mount := range r.Config.GetMounts() {
		if !mount.GetSelinuxRelabel() || mount.GetImage() != nil {
			continue // an image is mounted with the label
		}
		if err := sandbox.Relabel(sources[mount.GetHostPath()].Path, mountLabel); err != nil {
			return fmt.Errorf("mounts[%d].selinux_relabel: %w", i, err)
		}
	}
	target, err := m.target(r)
	if err != nil {
		return err
	}
	oci, err := spec.ForContainer(spec.Container{
		ID: r.ID, Config: r.Config, Pod: pod,
		Image: img.Config, Rootfs: root,
		User: specs.User{UID: user.UID, GID: user.GID, AdditionalGids: user.AdditionalGIDs}, Home: user.Home,
		Volumes:      volumes,
		Sources:      sources,
		Devices:      devices,
		TargetPID:    target.namespace(),
		ProcessLabel: processLabel, MountLabel: mountLabel,
		ReadSeccomp:    host.ReadSeccomp,
		LoadedAppArmor: host.LoadedAppArmor,
		Host:           m.Host,
		Handler:        h,
	})
	if err != nil {
		return err
	}
	m.warnHugepages(r, r.Config.GetLinux().GetResources())
	if err := cdi.Inject(oci, r.Config, cdi.Dirs); err != nil {
		return err
	}
	if err := m.saveSpec(r.ID, oci); err != nil {
		return err
	}
	kept, err := keptOf(oci)
	if err != nil {
		return err
	}
	return m.all.Move(c, Created, func(r *Record) {
		r.Kept = kept
		r.CgroupsPath = oci.Linux.CgroupsPath
		r.User = oci.Process.User
		r.StopSignal = spec.StopSignal(r.Config, img.Config)
		r.Target = target
		r.VolumeRefs = refs
	})
}

// reserve takes the record's name. The ID of the container that has it is
// returned if that is what the caller asks for.
func (m *Manager) reserve(r *Record) (existing string, err error) {
	holder, same := m.all.Reserve(r, func(old *Record) bool {
		return old.State == Created && old.ImageID == r.ImageID && proto.Equal(essence(old.Config), essence(r.Config))
	})
	if holder == "" || same {
		return holder, nil
	}
	md := r.Config.GetMetadata()
	return "", fmt.Errorf("container %q attempt %d exists in the sandbox as %s: remove that, or count metadata.attempt up: %w",
		md.GetName(), md.GetAttempt(), holder, errdefs.ErrAlreadyExists)
}

// target is the container whose PID namespace is to be joined in mode TARGET; nil
// in the other modes.
func (m *Manager) target(r *Record) (*Target, error) {
	ns := r.Config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if ns.GetPid() != runtime.NamespaceMode_TARGET {
		return nil, nil
	}
	const field = "linux.security_context.namespace_options.target_id"
	c, err := m.Get(ns.GetTargetId())
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", field, errdefs.ErrInvalidArgument, err)
	}
	if c.Get().SandboxID != r.SandboxID {
		return nil, fmt.Errorf("%s: container %s is of another pod: %w", field, c.Get().ID, errdefs.ErrInvalidArgument)
	}
	t := &Target{ID: c.Get().ID, Process: c.Get().Process}
	if err := t.check(c.Get()); err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return t, nil
}

// check makes sure that the target still runs as the process that it was.
func (t *Target) check(now *Record) error {
	if now.State != Running || now.Process != t.Process || !now.Process.Alive() {
		return fmt.Errorf("target container %s is not running (any more): %w", t.ID, errdefs.ErrFailedPrecondition)
	}
	return nil
}

func (t *Target) namespace() string {
	if t == nil {
		return ""
	}
	return fmt.Sprintf("/proc/%d/ns/pid", t.Process.PID)
}

func idMapping(pod spec.Pod) []image.SnapshotOpt {
	if len(pod.UIDMappings) == 0 {
		return nil
	}
	return []image.SnapshotOpt{image.WithIDMap(pod.UIDMappings, pod.GIDMappings)}
}

// idMappable refuses ID mappings of mounts whose file systems cannot have any, which
// would otherwise come out when the container is started.
func idMappable(mounts []*runtime.Mount, sources map[string]spec.Source) error {
	var paths, fields []string
	for i, m := range mounts {
		if len(m.GetUidMappings()) > 0 && m.GetImage() == nil {
			paths = append(paths, sources[m.GetHostPath()].Path)
			fields = append(fields, fmt.Sprintf("mounts[%d].uidMappings", i))
		}
	}
	if i, err := host.IDMappable(paths...); err != nil {
		return fmt.Errorf("%s: %w", fields[i], err)
	}
	return nil
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
	// Renamed into place: execs read it at any time.
	early := m.specPath(id) + ".new"
	err = os.WriteFile(early, raw, 0o600)
	if err == nil {
		err = os.Rename(early, m.specPath(id))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write spec: %w", err), os.RemoveAll(early))
	}
	return nil
}

// keptOf is what Record.Kept has of a spec.
func keptOf(oci *specs.Spec) (json.RawMessage, error) {
	kept := specs.Spec{Version: oci.Version, Process: oci.Process, Linux: &specs.Linux{CgroupsPath: oci.Linux.CgroupsPath, Resources: oci.Linux.Resources}}
	raw, err := json.Marshal(kept)
	if err != nil {
		return nil, fmt.Errorf("encode spec: %w", err)
	}
	return raw, nil
}

// Spec returns the OCI description a container was made with, or what is kept of it
// when its file is gone and the container runs.
func (m *Manager) Spec(id string) (*specs.Spec, error) {
	var oci specs.Spec
	if err := m.readSpec(id, &oci); err != nil {
		return nil, err
	}
	return &oci, nil
}

// readSpec decodes what a caller wants of it.
func (m *Manager) readSpec(id string, into any) error {
	raw, err := os.ReadFile(m.specPath(id))
	if c := m.all.Exact(id); errors.Is(err, os.ErrNotExist) && c != nil && c.Get().State == Running && c.Get().Kept != nil {
		raw, err = c.Get().Kept, nil
	}
	if err != nil {
		return fmt.Errorf("read spec of container %s: %w", id, err)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return fmt.Errorf("decode spec of container %s: %w", id, err)
	}
	return nil
}
