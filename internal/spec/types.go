// Package spec turns CRI configs into OCI runtime-spec descriptions. It is pure:
// what it must know of the host, the image or the rootfs is in its input, and
// the same input gives the same spec.
package spec

import (
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pod is what a sandbox gives to its containers.
type Pod struct {
	ID     string
	Config *runtime.PodSandboxConfig
	// Namespace paths to join; empty is the host's namespace (net, ipc, uts,
	// user) or, for PID, "not shared by the pod".
	Netns, IPC, UTS, PID, User string
	// UIDMappings and GIDMappings are those of User.
	UIDMappings, GIDMappings []specs.LinuxIDMapping
	// Host paths of the pod's files: bind mounted into each container unless
	// the container's config mounts something else there. Empty: no mount.
	Shm, ResolvConf, Hostname string
	// CgroupParent as kubelet gave it, or the runtime's own pod cgroup.
	CgroupParent string
	// Labels are the SELinux process and mount label of the pod ("" without SELinux).
	ProcessLabel, MountLabel string
}

// Container is everything CreateContainer knows.
type Container struct {
	ID     string
	Config *runtime.ContainerConfig
	Pod    Pod
	// Image is the image's config; Rootfs the mounted writable snapshot.
	Image  ocispec.ImageConfig
	Rootfs string
	// User is resolved against the rootfs's /etc/passwd and /etc/group.
	User specs.User
	Home string
	// Volumes are the mounts for the image's VOLUMEs, image mounts and others
	// that the caller has prepared; a mount of the config at the same
	// destination wins.
	Volumes []specs.Mount
	// TargetPID is the PID namespace to join in PID mode TARGET.
	TargetPID string
	Host      Host
	Handler   Handler
}

// Infra is everything RunPodSandbox knows of its infra container.
type Infra struct {
	Pod    Pod
	Rootfs string
	// Args, Env, Cwd, User are those of infra_image; with none, the embedded pause.
	Image *ocispec.ImageConfig
	User  specs.User
	// UserNS is set when the infra container is to make or join a user namespace.
	Host    Host
	Handler Handler
}

// Host is what this machine allows; read once at start.
type Host struct {
	// Capabilities the runtime itself has (its bounding set), "CAP_..." names.
	Capabilities []string
	// Seccomp and AppArmor tell whether the kernel has them (and AppArmor is on).
	Seccomp, AppArmor, SELinux bool
	// CgroupV2 is the unified hierarchy; SystemdCgroup the driver.
	CgroupV2, SystemdCgroup bool
	// Swap tells whether swap limits can be set.
	Swap bool
	// HugepageSizes in the kernel's notation ("2MB").
	HugepageSizes []string
	// MinOOMScoreAdj is the lowest value the kernel lets us set.
	MinOOMScoreAdj int
	// NofileHard is the highest RLIMIT_NOFILE the kernel lets us set.
	NofileHard uint64
	// RRO tells whether the kernel makes mounts recursively read-only (5.12).
	RRO bool
	// IDMapMounts tells whether mounts can be id-mapped (5.12 and the filesystem).
	IDMapMounts bool
	// Devices are the host's devices, for privileged containers.
	Devices []specs.LinuxDevice
}

// Handler is one configured runtime handler's defaults.
type Handler struct {
	Name string
	// Nofile is the soft RLIMIT_NOFILE a container starts with (hard: Host.NofileHard
	// at most). 0 leaves the runtime's own.
	NofileSoft, NofileHard uint64
	// DefaultCapabilities before add and drop of the config.
	DefaultCapabilities []string
	// SeccompProfile is the profile for RuntimeDefault; nil is the built-in one.
	SeccompProfile *specs.LinuxSeccomp
	// UnsetSeccomp is what a container with no profile in its config gets.
	PrivilegedWithoutHostDevices bool
}
