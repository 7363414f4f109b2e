package spec

import (
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Namespaces tells which namespaces a pod has of its own; the others are the
// host's, or (PID) each container's.
type Namespaces struct {
	Net, IPC, UTS, PID, User bool
}

// Own reads a pod's config for the namespaces to make for it. A pod on the
// host's network has the host's UTS namespace as well, unless it names a
// hostname of its own.
func Own(config *runtime.PodSandboxConfig) Namespaces {
	ns := podNamespaces(config)
	net := ns.GetNetwork() != runtime.NamespaceMode_NODE
	return Namespaces{
		Net:  net,
		IPC:  ns.GetIpc() != runtime.NamespaceMode_NODE,
		UTS:  net || config.GetHostname() != "",
		PID:  ns.GetPid() == runtime.NamespaceMode_POD,
		User: hasUserns(config),
	}
}

// IDMappings are the user namespace mappings of a pod's config, empty without one.
func IDMappings(config *runtime.PodSandboxConfig) (uids, gids []specs.LinuxIDMapping) {
	if !hasUserns(config) {
		return nil, nil
	}
	o := podNamespaces(config).GetUsernsOptions()
	return idMappings(o.GetUids()), idMappings(o.GetGids())
}

func podNamespaces(config *runtime.PodSandboxConfig) *runtime.NamespaceOption {
	return config.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

func hasUserns(config *runtime.PodSandboxConfig) bool {
	o := podNamespaces(config).GetUsernsOptions()
	return o != nil && o.GetMode() == runtime.NamespaceMode_POD
}

// containerNamespaces are those a container joins or makes. Network, IPC, UTS
// and user are always the pod's; a container has its own mount namespace, and
// its own cgroup namespace on v2 unless it is privileged. On v1 containers see
// the host's cgroup namespace, as every runtime has had it there: images find
// their cgroup by the path in /proc/self/cgroup.
func containerNamespaces(c Container) ([]specs.LinuxNamespace, error) {
	out := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	for _, ns := range []specs.LinuxNamespace{
		{Type: specs.NetworkNamespace, Path: c.Pod.Netns},
		{Type: specs.IPCNamespace, Path: c.Pod.IPC},
		{Type: specs.UTSNamespace, Path: c.Pod.UTS},
		{Type: specs.UserNamespace, Path: c.Pod.User},
	} {
		if ns.Path != "" {
			out = append(out, ns)
		}
	}
	pid, err := containerPID(c)
	if err != nil {
		return nil, err
	}
	if pid != nil {
		out = append(out, *pid)
	}
	if ownCgroupns(c) {
		out = append(out, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return out, nil
}

// containerPID is the PID namespace of a container, nil for the host's.
func containerPID(c Container) (*specs.LinuxNamespace, error) {
	switch pidMode(c.Config, c.Pod.Config) {
	case runtime.NamespaceMode_NODE:
		return nil, nil
	case runtime.NamespaceMode_TARGET:
		if c.TargetPID == "" {
			return nil, invalid("linux.security_context.namespace_options.target_id",
				"container %q has no PID namespace to join", c.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetTargetId())
		}
		return &specs.LinuxNamespace{Type: specs.PIDNamespace, Path: c.TargetPID}, nil
	case runtime.NamespaceMode_POD:
		if c.Pod.PID == "" {
			return nil, unable("linux.security_context.namespace_options.pid", "the pod's PID namespace is gone")
		}
		return &specs.LinuxNamespace{Type: specs.PIDNamespace, Path: c.Pod.PID}, nil
	default:
		return &specs.LinuxNamespace{Type: specs.PIDNamespace}, nil
	}
}

// pidMode is a container's PID mode. Without namespace options it is the pod's;
// POD in a pod on the host's PIDs means the host's, since that is what the pod has.
func pidMode(config *runtime.ContainerConfig, pod *runtime.PodSandboxConfig) runtime.NamespaceMode {
	podMode := podNamespaces(pod).GetPid()
	o := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	if o == nil || (o.GetPid() == runtime.NamespaceMode_POD && podMode == runtime.NamespaceMode_NODE) {
		return podMode
	}
	return o.GetPid()
}

// ownCgroupns tells whether the container gets a cgroup namespace.
func ownCgroupns(c Container) bool { return c.Host.CgroupV2 && !privileged(c.Config) }

func idMappings(in []*runtime.IDMapping) []specs.LinuxIDMapping {
	var out []specs.LinuxIDMapping
	for _, m := range in {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
	}
	return out
}
