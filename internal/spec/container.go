package spec

import (
	"errors"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ForContainer describes a container of a pod. The config is validated first,
// so that a spec never comes of a config that ValidateContainer refuses.
func ForContainer(c Container) (*specs.Spec, error) {
	if c.Config == nil || c.Pod.Config == nil {
		return nil, invalid("config", "is missing")
	}
	if err := ValidateContainer(c.Config, c.Pod.Config); err != nil {
		return nil, err
	}
	if c.ID == "" || c.Rootfs == "" {
		return nil, errors.New("describe container: ID and rootfs are needed")
	}
	sc := c.Config.GetLinux().GetSecurityContext()
	process, err := containerProcess(c)
	if err != nil {
		return nil, err
	}
	spec := &specs.Spec{
		Version: specs.Version,
		Process: process,
		Root:    &specs.Root{Path: c.Rootfs, Readonly: sc.GetReadonlyRootfs()},
		Linux: &specs.Linux{
			CgroupsPath: CgroupsPath(c.Pod.CgroupParent, c.ID, c.Host.SystemdCgroup),
			MountLabel:  firstOf(c.MountLabel, c.Pod.MountLabel),
		},
		Annotations: containerAnnotations(c),
	}
	if !sc.GetPrivileged() {
		spec.Linux.MaskedPaths = slices.Clone(sc.GetMaskedPaths())
		spec.Linux.ReadonlyPaths = slices.Clone(sc.GetReadonlyPaths())
	}
	if spec.Linux.Namespaces, err = containerNamespaces(c); err != nil {
		return nil, err
	}
	if spec.Mounts, spec.Linux.RootfsPropagation, err = containerMounts(c); err != nil {
		return nil, err
	}
	if spec.Linux.Resources, err = Resources(c.Config.GetLinux().GetResources(), c.Host, nil); err != nil {
		return nil, err
	}
	if limit := c.Handler.PidsLimit; limit > 0 && spec.Linux.Resources.Pids == nil {
		spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: &limit}
	}
	spec.Linux.Devices, spec.Linux.Resources.Devices = containerDevices(c)
	if err := applyClasses(c, spec.Linux); err != nil {
		return nil, err
	}
	if spec.Linux.Seccomp, err = seccompFor(containerSeccomp(c, spec)); err != nil {
		return nil, err
	}
	return spec, nil
}

// containerProcess is the container's PID 1 as image, config and handler say.
func containerProcess(c Container) (*specs.Process, error) {
	sc := c.Config.GetLinux().GetSecurityContext()
	args, err := processArgs(c.Config, c.Image)
	if err != nil {
		return nil, err
	}
	env, err := processEnv(c)
	if err != nil {
		return nil, err
	}
	caps, err := containerCapabilities(sc, c.Handler, c.Host)
	if err != nil {
		return nil, err
	}
	apparmor, err := containerAppArmor(sc, c.LoadedAppArmor, c.Host)
	if err != nil {
		return nil, err
	}
	label := firstOf(c.ProcessLabel, c.Pod.ProcessLabel)
	if sc.GetPrivileged() {
		label = "" // the CRI: SELinux restrictions are not applied
	}
	return &specs.Process{
		Terminal:        c.Config.GetTty(),
		User:            processUser(c),
		Args:            args,
		Env:             env,
		Cwd:             processCwd(c.Config, c.Image),
		Capabilities:    caps,
		Rlimits:         nofile(c.Handler, c.Host),
		NoNewPrivileges: sc.GetNoNewPrivs(),
		ApparmorProfile: apparmor,
		OOMScoreAdj:     OOMScoreAdj(c.Config.GetLinux().GetResources(), c.Host),
		SelinuxLabel:    label,
	}, nil
}

// containerSeccomp gathers what seccompFor must know. The deprecated path
// counts only when the profile message is absent.
func containerSeccomp(c Container, spec *specs.Spec) seccompRequest {
	sc := c.Config.GetLinux().GetSecurityContext()
	return seccompRequest{
		field:      "linux.security_context",
		profile:    sc.GetSeccomp(),
		deprecated: sc.GetSeccompProfilePath(), //nolint:staticcheck // kubelet may still send it
		privileged: sc.GetPrivileged(),
		handler:    c.Handler,
		host:       c.Host,
		read:       c.ReadSeccomp,
		spec:       spec,
	}
}

// privileged tells whether the container asks for everything.
func privileged(config *runtime.ContainerConfig) bool {
	return config.GetLinux().GetSecurityContext().GetPrivileged()
}

// firstOf returns the first of its arguments that is not empty.
func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
