package sandbox

import (
	"context"
	"crypto/sha256"
	"fmt"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/host"
	"github.com/podshim/podshim/internal/ids"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/spec"
	"github.com/podshim/podshim/internal/timeline"
)

// Run makes a pod sandbox and returns its ID once it is Ready.
//
// It is idempotent: a caller that asks again, with the same config, while the
// sandbox is being made or when it is ready gets the same ID. The same metadata
// with another config is ErrAlreadyExists.
func (m *Manager) Run(ctx context.Context, cfg *runtime.PodSandboxConfig, handler string) (string, error) {
	if err := spec.ValidatePod(cfg); err != nil {
		return "", err
	}
	if _, ok := m.Handlers[handler]; !ok {
		return "", fmt.Errorf("runtime_handler: no handler %q is configured (see [runtime.handlers] in podshim's configuration): %w", handler, errdefs.ErrInvalidArgument)
	}
	if err := m.checkCgroupParent(cfg.GetLinux().GetCgroupParent()); err != nil {
		return "", err
	}
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(essence(cfg))
	if err != nil {
		return "", fmt.Errorf("encode config: %w", err)
	}
	// The request is part of the key: another config under the same name is no
	// retry, and has to see that the name is taken.
	key := fmt.Sprintf("run/%s/%s/%x", name(cfg), handler, sha256.Sum256(raw))
	return flight.Do(ctx, &m.flights, key, func(ctx context.Context) (string, error) {
		return m.run(ctx, cfg, handler)
	})
}

// essence is what makes two configs ask for the same sandbox. kubelet marks a static
// pod with the time it first read it, which is another one after its restart: it then
// asks again for what it asked for before, and did not live to get.
func essence(cfg *runtime.PodSandboxConfig) *runtime.PodSandboxConfig {
	out := proto.Clone(cfg).(*runtime.PodSandboxConfig)
	delete(out.Annotations, "kubernetes.io/config.seen")
	return out
}

func (m *Manager) run(ctx context.Context, cfg *runtime.PodSandboxConfig, handler string) (string, error) {
	r := m.newRecord(cfg, handler)
	if _, err := cniPod(r); err != nil {
		return "", err
	}
	if existing, err := m.reserve(r); err != nil || existing != "" {
		return existing, err
	}
	unlock, err := m.all.Lock(ctx, r.ID)
	if err != nil {
		m.all.Unreserve(r)
		return "", err
	}
	defer unlock()

	s := m.all.Add(r)
	process, mountLabel, err := Labels(cfg.GetLinux().GetSecurityContext().GetSelinuxOptions(), "")
	if err == nil {
		err = m.all.Update(s, func(r *Record) { r.ProcessLabel, r.MountLabel = process, mountLabel })
	}
	if err != nil {
		releaseLabels(&Record{ProcessLabel: process})
		m.all.Forget(r)
		return "", err
	}
	if err := m.build(ctx, s); err != nil {
		return "", m.all.GiveUp(ctx, s, err, m.release)
	}
	m.log(r).WithField("ips", s.Get().IPs).Info("pod sandbox is ready")
	return r.ID, nil
}

// build takes all that a sandbox holds. Its last step makes the sandbox Ready;
// whatever fails before is given back by release.
func (m *Manager) build(ctx context.Context, s *Sandbox) error {
	r := s.Get()
	if err := timeline.Do(ctx, "namespaces", func() error { return m.makeNamespaces(r) }); err != nil {
		return err
	}
	if err := m.makeCgroup(r); err != nil { // plugins may be told of it
		return err
	}
	// The network needs the namespace alone, so that it is set up while all else is
	// made and the infra container starts: the longest steps, side by side.
	var (
		network cni.Result
		infra   monitor.Process
	)
	// Neither is cut short when the other fails: both take milliseconds, and a whole one
	// is easier to give back than a half. An IPAM plugin that is killed between making
	// its reservation and saying whose it is would leave one that no DEL finds.
	var g errgroup.Group
	if !r.HostNetwork() {
		g.Go(func() error {
			pod, err := cniPod(r)
			if err != nil {
				return err
			}
			return timeline.Do(ctx, "network (CNI ADD)", func() error {
				network, err = m.Network.Add(ctx, pod)
				return err
			})
		})
	}
	g.Go(func() (err error) {
		if err := timeline.Do(ctx, "files and /dev/shm", func() error { return m.makeFiles(r) }); err != nil {
			return err
		}
		return timeline.Do(ctx, "infra container", func() error {
			infra, err = m.startInfra(ctx, r)
			return err
		})
	})
	if err := g.Wait(); err != nil {
		return err
	}
	if r.User != "" {
		// Infra is in it and holds it from now on.
		if err := cni.Remove(r.User); err != nil {
			return fmt.Errorf("unpin user namespace: %w", err)
		}
	}
	if err := m.writeHosts(r, network.IPs); err != nil {
		return err
	}
	if err := Relabel(m.dir(r.ID), r.MountLabel); err != nil {
		return err
	}
	return m.all.Move(s, Ready, func(r *Record) {
		r.Infra = infra
		r.IPs, r.Interface, r.NetworkResult = network.IPs, network.Interface, network.Raw
	})
}

func (m *Manager) newRecord(cfg *runtime.PodSandboxConfig, handler string) *Record {
	r := &Record{
		ID:           ids.New(),
		Name:         name(cfg),
		Handler:      handler,
		Config:       cfg,
		CreatedAt:    time.Now(),
		State:        Creating,
		CgroupParent: cfg.GetLinux().GetCgroupParent(),
	}
	if r.CgroupParent != "" && !m.Host.SystemdCgroup {
		r.CgroupParent = path.Join("/", r.CgroupParent)
	}
	if r.CgroupParent == "" {
		r.CgroupParent, r.OwnCgroup = m.ownCgroup(r.ID), true
	}
	if !r.HostNetwork() {
		r.Netns = m.netnsPin(r.ID)
	}
	// On the host's network infra makes its user namespace itself: there is no
	// network namespace that it has to own.
	if uids, _ := spec.IDMappings(cfg); len(uids) > 0 && !r.HostNetwork() {
		r.User = m.userPin(r.ID)
	}
	return r
}

// reserve takes the record's name. The ID of the sandbox that has it is
// returned if that is what the caller asks for.
func (m *Manager) reserve(r *Record) (existing string, err error) {
	holder, same := m.all.Reserve(r, func(old *Record) bool {
		return old.State == Ready && old.Handler == r.Handler && proto.Equal(essence(old.Config), essence(r.Config))
	})
	if holder == "" || same {
		return holder, nil
	}
	md := r.Config.GetMetadata()
	return "", fmt.Errorf("pod sandbox %s/%s (uid %s) attempt %d exists as %s: stop and remove that, or count metadata.attempt up: %w",
		md.GetNamespace(), md.GetName(), md.GetUid(), md.GetAttempt(), holder, errdefs.ErrAlreadyExists)
}

func (m *Manager) startInfra(ctx context.Context, r *Record) (monitor.Process, error) {
	handler, ok := m.Handlers[r.Handler]
	if !ok {
		return monitor.Process{}, fmt.Errorf("runtime handler %q is not configured any more: %w", r.Handler, errdefs.ErrFailedPrecondition)
	}
	uids, gids := spec.IDMappings(r.Config)
	image, err := m.Infra.Acquire(ctx, r.ID, r.MountLabel, uids, gids)
	if err != nil {
		return monitor.Process{}, fmt.Errorf("infra container's root: %w", err)
	}
	oci, err := spec.ForInfra(spec.Infra{
		Pod:            m.specPod(r),
		Rootfs:         image.Rootfs,
		Image:          image.Config,
		ImageName:      image.Name,
		User:           image.User,
		Mounts:         image.Mounts,
		ReadSeccomp:    host.ReadSeccomp,
		LoadedAppArmor: host.LoadedAppArmor,
		Host:           m.Host,
		Handler:        handler,
	})
	if err != nil {
		return monitor.Process{}, fmt.Errorf("describe infra container: %w", err)
	}
	if err := m.saveSpec(r.ID, oci); err != nil {
		return monitor.Process{}, err
	}
	p, err := m.Monitor.Start(ctx, monitor.StartRequest{ID: r.ID, Spec: oci, Discard: true, Pause: image.Config == nil && !namesSeccomp(r, handler)})
	if err != nil {
		return monitor.Process{}, fmt.Errorf("start infra container: %w", err)
	}
	return p, nil
}

// namesSeccomp tells whether the pod, or whoever has configured podshim, asks for a certain
// seccomp profile, not just for the default one.
func namesSeccomp(r *Record, handler spec.Handler) bool {
	sc := r.Config.GetLinux().GetSecurityContext()
	return handler.SeccompProfile != nil || sc.GetSeccomp().GetProfileType() == runtime.SecurityProfile_Localhost ||
		sc.GetSeccompProfilePath() != "" //nolint:staticcheck // kubelet may still send it
}

// cniPod is what the network is told of a sandbox.
func cniPod(r *Record) (cni.Pod, error) {
	md := r.Config.GetMetadata()
	p := cni.Pod{
		ID: r.ID, Name: md.GetName(), Namespace: md.GetNamespace(), UID: md.GetUid(),
		Netns:        r.Netns,
		CgroupParent: r.CgroupParent,
	}
	for key := range r.Config.GetLinux().GetSysctls() {
		// Whoever sets IPv6 up has it.
		p.IPv6 = p.IPv6 || strings.HasPrefix(strings.ReplaceAll(key, "/", "."), "net.ipv6.")
	}
	for _, pm := range r.Config.GetPortMappings() {
		if pm.GetHostPort() <= 0 {
			continue // declared only, not published
		}
		p.PortMappings = append(p.PortMappings, cni.PortMapping{
			HostPort:      pm.GetHostPort(),
			ContainerPort: pm.GetContainerPort(),
			Protocol:      strings.ToLower(pm.GetProtocol().String()),
			HostIP:        pm.GetHostIp(),
		})
	}
	if dns := r.Config.GetDnsConfig(); dns != nil {
		p.DNS = &cni.DNS{Servers: dns.GetServers(), Searches: dns.GetSearches(), Options: dns.GetOptions()}
	}
	if err := p.ReadAnnotations(r.Config.GetAnnotations()); err != nil {
		return cni.Pod{}, err
	}
	return p, nil
}

// Pod describes a sandbox to the containers that are to join it. A sandbox that
// is not ready is ErrFailedPrecondition.
func (m *Manager) Pod(s *Sandbox) (spec.Pod, error) {
	r := s.Get()
	if r.State != Ready {
		return spec.Pod{}, fmt.Errorf("pod sandbox %s is not ready (%s): %w", r.ID, r.Reason, errdefs.ErrFailedPrecondition)
	}
	if !r.Infra.Alive() {
		// Its end is about to be noted. A PID that is used again must not lend
		// a stranger's namespaces to the pod.
		return spec.Pod{}, fmt.Errorf("pod sandbox %s has no infra process any more: %w", r.ID, errdefs.ErrFailedPrecondition)
	}
	pod := m.specPod(r)
	own := spec.Own(r.Config)
	of := func(kind string) string { return fmt.Sprintf("/proc/%d/ns/%s", r.Infra.PID, kind) }
	if own.IPC {
		pod.IPC = of("ipc")
	}
	if own.PID {
		pod.PID = of("pid")
	}
	if own.UTS {
		pod.UTS = of("uts")
	}
	if own.User {
		pod.User = of("user")
	}
	return pod, nil
}

// specPod is the part of a pod's description that is there before infra is.
func (m *Manager) specPod(r *Record) spec.Pod {
	uids, gids := spec.IDMappings(r.Config)
	dir := m.dir(r.ID)
	pod := spec.Pod{
		ID: r.ID, Config: r.Config,
		Netns: r.Netns, User: r.User,
		UIDMappings: uids, GIDMappings: gids,
		Shm:          filepath.Join(m.shm(r.ID), "shm"),
		ResolvConf:   filepath.Join(dir, "resolv.conf"),
		Hostname:     filepath.Join(dir, "hostname"),
		Hosts:        filepath.Join(dir, "hosts"),
		CgroupParent: r.CgroupParent,
		ProcessLabel: r.ProcessLabel, MountLabel: r.MountLabel,
	}
	if namespaces(r.Config).GetIpc() == runtime.NamespaceMode_NODE {
		pod.Shm = "/dev/shm"
	}
	return pod
}
