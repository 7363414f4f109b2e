package spec

import (
	"errors"
	"maps"
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PausePath is where the embedded pause program lies in its root filesystem.
const PausePath = "/pause"

// infraOOMScoreAdj makes the infra container nearly the last process of the
// node to be killed for memory, as kubelet and containerd have it: its death
// takes the pod down.
const infraOOMScoreAdj = -998

// infraCPUShares is the kernel's minimum: pause sleeps.
const infraCPUShares = 2

// ForInfra describes the infra container of a pod: a process that does nothing,
// with no capabilities, a read-only root and no mounts but those given, in
// whose namespaces the pod lives. It makes the pod's IPC, UTS and PID namespace
// (containers join the last only when it is shared), joins the network namespace made beforehand, and sets the
// pod's hostname and sysctls in them.
func ForInfra(i Infra) (*specs.Spec, error) {
	if i.Pod.Config == nil {
		return nil, invalid("config", "is missing")
	}
	if err := ValidatePod(i.Pod.Config); err != nil {
		return nil, err
	}
	if i.Pod.ID == "" || i.Rootfs == "" {
		return nil, errors.New("describe infra container: ID and rootfs are needed")
	}
	process, err := infraProcess(i)
	if err != nil {
		return nil, err
	}
	shares := uint64(infraCPUShares)
	spec := &specs.Spec{
		Version: specs.Version,
		Process: process,
		Root:    &specs.Root{Path: i.Rootfs, Readonly: true},
		Mounts:  slices.Clone(i.Mounts),
		Linux: &specs.Linux{
			Namespaces:  infraNamespaces(i.Pod),
			CgroupsPath: CgroupsPath(i.Pod.CgroupParent, i.Pod.ID, i.Host.SystemdCgroup),
			MountLabel:  i.Pod.MountLabel,
			Sysctl:      maps.Clone(i.Pod.Config.GetLinux().GetSysctls()),
			Resources: &specs.LinuxResources{
				CPU:     &specs.LinuxCPU{Shares: &shares},
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: fullAccess}},
			},
		},
		Annotations: infraAnnotations(i),
	}
	own := Own(i.Pod.Config)
	if own.User && i.Pod.User == "" {
		// A namespace that is joined has its mappings already, and the OCI
		// runtime wants them given one way only.
		spec.Linux.UIDMappings = slices.Clone(i.Pod.UIDMappings)
		spec.Linux.GIDMappings = slices.Clone(i.Pod.GIDMappings)
	}
	if own.UTS {
		spec.Hostname = i.Pod.Config.GetHostname()
	}
	sc := i.Pod.Config.GetLinux().GetSecurityContext()
	spec.Linux.Seccomp, err = seccompFor(seccompRequest{
		field:      "linux.security_context",
		profile:    sc.GetSeccomp(),
		deprecated: sc.GetSeccompProfilePath(), //nolint:staticcheck // kubelet may still send it
		privileged: sc.GetPrivileged(),
		handler:    i.Handler,
		host:       i.Host,
		read:       i.ReadSeccomp,
		spec:       spec,
	})
	if err != nil {
		return nil, err
	}
	return spec, nil
}

func infraProcess(i Infra) (*specs.Process, error) {
	sc := i.Pod.Config.GetLinux().GetSecurityContext()
	args, env, cwd := []string{PausePath}, []string{"PATH=" + DefaultPath}, "/"
	if i.Image != nil {
		var err error
		if args, err = processArgs(&runtime.ContainerConfig{}, *i.Image); err != nil {
			return nil, err
		}
		for _, kv := range i.Image.Env {
			env = setEnv(env, kv)
		}
		cwd = processCwd(&runtime.ContainerConfig{}, *i.Image)
	}
	apparmor, err := infraAppArmor(sc, i.LoadedAppArmor, i.Host)
	if err != nil {
		return nil, err
	}
	adj := max(infraOOMScoreAdj, i.Host.MinOOMScoreAdj)
	return &specs.Process{
		User:            infraUser(sc, i.User),
		Args:            args,
		Env:             env,
		Cwd:             cwd,
		Capabilities:    &specs.LinuxCapabilities{},
		NoNewPrivileges: true,
		ApparmorProfile: apparmor,
		OOMScoreAdj:     &adj,
		SelinuxLabel:    i.Pod.ProcessLabel,
	}, nil
}

// infraAppArmor follows a profile the sandbox names; without one the infra
// container, which does nothing, is confined by nothing.
func infraAppArmor(sc *runtime.LinuxSandboxSecurityContext, loaded func(string) error, host Host) (string, error) {
	if sc.GetApparmor() == nil {
		return "", nil
	}
	return containerAppArmor(&runtime.LinuxContainerSecurityContext{
		Apparmor: sc.GetApparmor(), Privileged: sc.GetPrivileged(),
	}, loaded, host)
}

// infraUser is the user the pod's security context gives to sandbox processes.
func infraUser(sc *runtime.LinuxSandboxSecurityContext, user specs.User) specs.User {
	if sc.GetRunAsUser() != nil {
		user.UID = uint32(sc.GetRunAsUser().GetValue())
		user.GID = uint32(sc.GetRunAsGroup().GetValue())
	}
	var groups []uint32
	if sc.GetSupplementalGroupsPolicy() == runtime.SupplementalGroupsPolicy_Merge {
		groups = slices.Clone(user.AdditionalGids)
	}
	for _, g := range sc.GetSupplementalGroups() {
		groups = append(groups, uint32(g))
	}
	slices.Sort(groups)
	user.AdditionalGids = slices.Compact(groups)
	return user
}

// infraNamespaces: what the pod has of its own is made, or joined where the
// path exists already.
func infraNamespaces(p Pod) []specs.LinuxNamespace {
	own := Own(p.Config)
	// Its own even where the pod's containers do not share it: a process that
	// only sleeps has no business with the host's.
	pid := podNamespaces(p.Config).GetPid() != runtime.NamespaceMode_NODE
	out := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	for _, ns := range []struct {
		kind specs.LinuxNamespaceType
		own  bool
		path string
	}{
		{specs.NetworkNamespace, own.Net, p.Netns},
		{specs.IPCNamespace, own.IPC, p.IPC},
		{specs.UTSNamespace, own.UTS, p.UTS},
		{specs.PIDNamespace, pid, p.PID},
		{specs.UserNamespace, own.User, p.User},
	} {
		if ns.own {
			out = append(out, specs.LinuxNamespace{Type: ns.kind, Path: ns.path})
		}
	}
	return out
}

func infraAnnotations(i Infra) map[string]string {
	a := podAnnotations(i.Pod, "sandbox")
	a[annotationLogDir] = i.Pod.Config.GetLogDirectory()
	if i.ImageName != "" {
		a[annotationSandboxImage] = i.ImageName
	}
	return a
}
