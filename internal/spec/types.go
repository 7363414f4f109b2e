// Package spec turns CRI configs into OCI runtime-spec descriptions. It is pure:
// what it must know of the host, the image or the rootfs is in its input, and
// the same input gives the same spec (package host gathers the facts).
//
// The way of a request through it:
//
//	ValidatePod, ValidateContainer   refuse nonsense before anything is taken
//	ForInfra                         RunPodSandbox: the pod's infra container
//	ForContainer                     CreateContainer
//	ForExec                          Exec, ExecSync: a process in a container
//	Resources, OOMScoreAdj           UpdateContainerResources
//	StopSignal, ResolvConf, Own      what the daemon must know beside the spec
//	cdi.Inject                       CDI devices, a step of its own after ForContainer
//
// What a config leaves open is filled from the image, then from the handler,
// then from the defaults in this package. What the machine cannot do is either
// clamped, where the config did not ask for it by name (the capabilities of a
// privileged container, oom_score_adj, the default nofile), or refused with an
// error that names the field. No field is dropped silently.
//
// Errors are classed: errdefs.ErrInvalidArgument for a config that makes no
// sense, errdefs.ErrFailedPrecondition for one that this machine cannot honour,
// errdefs.ErrNotImplemented for one that podshim cannot.
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
	// user) or, for PID, "not shared by the pod". Own tells which of them the
	// pod's config asks for.
	Netns, IPC, UTS, PID, User string
	// UIDMappings and GIDMappings are those of User. For an infra container
	// with no User path they are what its new user namespace is made of.
	UIDMappings, GIDMappings []specs.LinuxIDMapping
	// Host paths of the pod's files: bind mounted into each container unless
	// the container's config mounts something else there. Empty: no mount,
	// except /dev/shm of a pod with the host's IPC, which is the host's.
	Shm, ResolvConf, Hostname, Hosts string
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
	// User is resolved against the rootfs's /etc/passwd and /etc/group. Its
	// AdditionalGids are the groups that policy Merge takes from the image;
	// ForContainer drops them under policy Strict and adds the config's own
	// supplemental groups under both.
	User specs.User
	// Home is the user's home directory by /etc/passwd; empty is "/".
	Home string
	// Volumes are the mounts for the image's VOLUMEs, image mounts and others
	// that the caller has prepared; a mount of the config at the same
	// destination wins. A config mount with an image finds here, at its
	// container_path, the directory where the image (or its sub path) is.
	Volumes []specs.Mount
	// Sources tells, by a config mount's host_path, what is there. A host path
	// that is not in it is taken as it stands and its propagation is not checked.
	Sources map[string]Source
	// Devices are the config's devices, looked up on the host: a host_path that
	// is a directory stands for every device in it. Order is the config's.
	Devices []Device
	// TargetPID is the PID namespace to join in PID mode TARGET.
	TargetPID string
	// ProcessLabel and MountLabel are set when the container has SELinux options
	// of its own; empty is the pod's.
	ProcessLabel, MountLabel string
	// ReadSeccomp reads a Localhost seccomp profile; nil refuses them.
	ReadSeccomp func(path string) ([]byte, error)
	// LoadedAppArmor returns nil when the kernel has the AppArmor profile, which
	// for DefaultAppArmor it sees to.
	LoadedAppArmor func(profile string) error
	Host           Host
	Handler        Handler
}

// Source is what a host path turned out to be.
type Source struct {
	// Path is the host path with symbolic links followed.
	Path string
	// Shared and Slave are the propagation of the mount that Path is on
	// ("shared:" and "master:" in /proc/self/mountinfo).
	Shared, Slave bool
}

// Device is one device node to make in the container and the access its cgroup
// grants to it ("r", "w", "m").
type Device struct {
	specs.LinuxDevice
	Access string
}

// Infra is everything RunPodSandbox knows of its infra container.
type Infra struct {
	Pod    Pod
	Rootfs string
	// Image is the config of infra_image; nil is the embedded pause, which is
	// /pause in Rootfs.
	Image *ocispec.ImageConfig
	// ImageName is the name of infra_image, for the annotations; "" for pause.
	ImageName string
	// User is the user of infra_image; the pod's run_as_user and run_as_group win.
	User specs.User
	// Mounts is what libcontainer needs mounted to start the pause program;
	// the pause itself needs nothing.
	Mounts []specs.Mount
	// ReadSeccomp reads a Localhost seccomp profile; nil refuses them.
	ReadSeccomp func(path string) ([]byte, error)
	// LoadedAppArmor returns nil when the kernel has the AppArmor profile, which
	// for DefaultAppArmor it sees to.
	LoadedAppArmor func(profile string) error
	Host           Host
	Handler        Handler
}

// Host is what this machine allows; read once at start (package host).
type Host struct {
	// Hostname is what a pod without one of its own sees in HOSTNAME.
	Hostname string
	// Capabilities the runtime itself has (its bounding set), "CAP_..." names.
	Capabilities []string
	// Seccomp and AppArmor tell whether the kernel has them (and AppArmor is on,
	// with its user space).
	Seccomp, AppArmor, SELinux bool
	// CgroupV2 is the unified hierarchy; SystemdCgroup the driver.
	CgroupV2, SystemdCgroup bool
	// CgroupMountOptions are the superblock options of the host's cgroup2 mount
	// that a mount without a cgroup namespace would take away from the host
	// (nsdelegate, memory_recursiveprot): there is one superblock for all.
	CgroupMountOptions []string
	// Swap tells whether swap limits can be set.
	Swap bool
	// HugepageSizes of the kernel, in its notation ("2MB"); Hugetlb tells whether the
	// controller that limits them is there.
	HugepageSizes []string
	Hugetlb       bool
	// MinOOMScoreAdj is the lowest value the kernel lets us set.
	MinOOMScoreAdj int
	// NofileHard is the highest RLIMIT_NOFILE the kernel lets us set; 0 is unknown.
	NofileHard uint64
	// RRO tells whether the kernel makes mounts recursively read-only (5.12).
	RRO bool
	// IDMapMounts tells whether mounts can be id-mapped (5.12 and the filesystem),
	// the layers of images among them (5.19).
	IDMapMounts bool
	// RDT tells whether resctrl is mounted and usable.
	RDT bool
	// Devices are the host's devices, for privileged containers.
	Devices []specs.LinuxDevice
	// Kernel is the release, as of uname -r.
	Kernel string
}

// Handler is one configured runtime handler's defaults.
type Handler struct {
	Name string
	// NofileSoft and NofileHard are the RLIMIT_NOFILE a container starts with
	// (Host.NofileHard at most). 0 leaves the runtime's own; see DefaultNofileSoft.
	NofileSoft, NofileHard uint64
	// DefaultCapabilities before add and drop of the config; nil is
	// DefaultCapabilities of this package.
	DefaultCapabilities []string
	// SeccompProfile is the profile for RuntimeDefault, JSON in Docker's format
	// or the OCI's; nil is the built-in one.
	SeccompProfile []byte
	// PidsLimit is the most processes a container may have; 0 is no limit of
	// its own (kubelet limits the pod's).
	PidsLimit int64
	// UnsetSeccomp is what a container with no profile in its config gets; nil
	// is Unconfined, as the CRI says of an empty profile.
	UnsetSeccomp *runtime.SecurityProfile
	// PrivilegedWithoutHostDevices keeps the host's devices out of privileged
	// containers; their cgroup allows all devices nevertheless.
	PrivilegedWithoutHostDevices bool
	// CgroupWritable mounts /sys/fs/cgroup read-write where the container has a
	// cgroup namespace of its own (an init system as PID 1 wants it).
	CgroupWritable bool
	// BlockIO are the blockio classes that annotations may name.
	BlockIO map[string]*specs.LinuxBlockIO
}
