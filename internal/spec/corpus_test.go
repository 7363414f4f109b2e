package spec

import (
	"fmt"
	"os"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testHost is a machine that can do everything, but for CAP_SYS_RESOURCE.
func testHost() Host {
	return Host{
		Hostname: "node-1",
		Capabilities: []string{
			"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL",
			"CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID",
			"CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
		},
		Seccomp: true, Swap: true, RRO: true, IDMapMounts: true,
		HugepageSizes: []string{"2MB"}, Hugetlb: true,
		NofileHard: 1 << 20,
		Devices: []specs.LinuxDevice{
			{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229},
			{Path: "/dev/kvm", Type: "c", Major: 10, Minor: 232},
		},
	}
}

func testHandler() Handler {
	return Handler{NofileSoft: DefaultNofileSoft, NofileHard: DefaultNofileHard}
}

func testPod() Pod {
	return Pod{
		ID: "pod1",
		Config: &runtime.PodSandboxConfig{
			Metadata: &runtime.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "u-1"},
			Hostname: "web",
			Linux: &runtime.LinuxPodSandboxConfig{
				CgroupParent: "/kubepods/pod1",
				SecurityContext: &runtime.LinuxSandboxSecurityContext{
					NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER},
				},
			},
		},
		Netns: "/run/netns/pod1", IPC: "/proc/7/ns/ipc", UTS: "/proc/7/ns/uts",
		Shm: "/run/podshim/pod1/shm", ResolvConf: "/run/podshim/pod1/resolv.conf", Hostname: "/run/podshim/pod1/hostname",
		CgroupParent: "/kubepods/pod1",
	}
}

func testContainer() Container {
	return Container{
		ID: "ctr1",
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: "app"},
			Image:    &runtime.ImageSpec{Image: "sha256:abc", UserSpecifiedImage: "example.com/app:1"},
			Linux:    &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{}},
		},
		Pod: testPod(),
		Image: ocispec.ImageConfig{
			Entrypoint: []string{"/entry"}, Cmd: []string{"serve"}, Env: []string{"PATH=/bin", "A=image"},
			WorkingDir: "/srv", StopSignal: "SIGQUIT",
		},
		Rootfs: "/var/lib/podshim/rootfs/ctr1",
		User:   specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{50000}},
		Home:   "/home/app",
		Host:   testHost(), Handler: testHandler(),
		ReadSeccomp: os.ReadFile, LoadedAppArmor: loaded,
	}
}

// loaded is a machine with one AppArmor profile of the operator's.
func loaded(profile string) error {
	if profile != DefaultAppArmor && profile != "mine" {
		return fmt.Errorf("profile %q: %w", profile, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// security is the container's security context, there to be edited.
func (c *Container) security() *runtime.LinuxContainerSecurityContext {
	return c.Config.Linux.SecurityContext
}

// podSecurity is the pod's.
func (c *Container) podSecurity() *runtime.LinuxSandboxSecurityContext {
	return c.Pod.Config.Linux.SecurityContext
}

// containerCase is one container that a golden describes and the fuzzer starts from.
type containerCase struct {
	name string
	edit func(*Container)
}

var testIDs = []*runtime.IDMapping{{ContainerId: 0, HostId: 65536, Length: 65536}}

var containerCorpus = []containerCase{
	{"minimal", func(*Container) {}},
	{"kubelet", func(c *Container) {
		c.Config.Command, c.Config.Args = []string{"/app"}, []string{"--listen", ":80"}
		c.Config.WorkingDir = "/data/"
		c.Config.Envs = []*runtime.KeyValue{{Key: "A", Value: []byte("config")}, {Key: "data-1", Value: []byte("x=y")}}
		c.Config.Mounts = []*runtime.Mount{
			{ContainerPath: "/var/log/app", HostPath: "/var/lib/kubelet/pods/u-1/volumes/logs"},
			{ContainerPath: "/etc/hosts", HostPath: "/var/lib/kubelet/pods/u-1/etc-hosts"},
			{ContainerPath: "/dev/termination-log", HostPath: "/var/lib/kubelet/pods/u-1/termination"},
			{ContainerPath: "/var", HostPath: "/srv/var", Readonly: true},
		}
		s := c.security()
		s.RunAsUser = &runtime.Int64Value{Value: 1000}
		s.SupplementalGroups = []int64{7, 50000}
		s.MaskedPaths, s.ReadonlyPaths = []string{"/proc/kcore"}, []string{"/proc/sys"}
		s.NoNewPrivs, s.ReadonlyRootfs = true, true
		s.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}
		s.Capabilities = &runtime.Capability{AddCapabilities: []string{"net_admin"}, DropCapabilities: []string{"ALL"}}
		s.NamespaceOptions = &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}
		c.Config.Linux.Resources = &runtime.LinuxContainerResources{
			CpuShares: 512, CpuQuota: 50000, CpuPeriod: 100000, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 985,
			CpusetCpus: "0-1", HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 0}, {PageSize: "1GB", Limit: 0}},
		}
	}},
	{"tty", func(c *Container) { c.Config.Tty, c.Config.Stdin = true, true }},
	{"privileged", func(c *Container) {
		c.podSecurity().Privileged = true
		c.security().Privileged = true
		c.security().MaskedPaths = []string{"/proc/kcore"}
		c.security().Seccomp = &runtime.SecurityProfile{}
		c.Devices = []Device{{LinuxDevice: specs.LinuxDevice{Path: "/dev/kvm", Type: "c", Major: 1, Minor: 3}}}
	}},
	{"cgroup-v2-systemd", func(c *Container) {
		c.Host.CgroupV2, c.Host.SystemdCgroup = true, true
		c.Pod.CgroupParent = "/kubepods.slice/kubepods-pod1.slice"
		c.Config.Linux.Resources = &runtime.LinuxContainerResources{
			MemoryLimitInBytes: 1 << 20, MemorySwapLimitInBytes: 3 << 20,
			Unified: map[string]string{"memory.oom.group": "1", "memory.high": "900000"},
		}
	}},
	{"cgroup-v2-privileged", func(c *Container) {
		c.Host.CgroupV2 = true
		c.Host.CgroupMountOptions = []string{"nsdelegate", "memory_recursiveprot"}
		c.podSecurity().Privileged = true
		c.security().Privileged = true
	}},
	{"host-everything", func(c *Container) {
		o := &runtime.NamespaceOption{
			Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_NODE, Ipc: runtime.NamespaceMode_NODE,
		}
		c.podSecurity().NamespaceOptions, c.security().NamespaceOptions = o, o
		c.Pod.Config.Hostname = ""
		c.Pod.Netns, c.Pod.IPC, c.Pod.UTS, c.Pod.Shm = "", "", "", ""
	}},
	{"pod-pid", func(c *Container) {
		c.podSecurity().NamespaceOptions.Pid = runtime.NamespaceMode_POD
		c.Pod.PID = "/proc/7/ns/pid"
	}},
	{"target-pid", func(c *Container) {
		c.security().NamespaceOptions = &runtime.NamespaceOption{Pid: runtime.NamespaceMode_TARGET, TargetId: "ctr0"}
		c.TargetPID = "/proc/9/ns/pid"
	}},
	{"user-namespace", func(c *Container) {
		o := &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: testIDs, Gids: testIDs}
		c.podSecurity().NamespaceOptions.UsernsOptions = o
		c.security().NamespaceOptions = &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER, UsernsOptions: o}
		c.Pod.User = "/proc/7/ns/user"
		c.Config.Mounts = []*runtime.Mount{{ContainerPath: "/data", HostPath: "/srv/data", UidMappings: testIDs, GidMappings: testIDs}}
	}},
	{"user-namespace-host-network", func(c *Container) {
		c.podSecurity().NamespaceOptions = &runtime.NamespaceOption{
			Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_CONTAINER,
			UsernsOptions: &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: testIDs, Gids: testIDs},
		}
		c.Pod.User, c.Pod.Netns = "/proc/7/ns/user", ""
	}},
	{"mounts", func(c *Container) {
		c.Config.Mounts = []*runtime.Mount{
			{ContainerPath: "/a/b/c", HostPath: "/link", Propagation: runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL},
			{ContainerPath: "/a", HostPath: "/srv/a", Propagation: runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
			{ContainerPath: "/a/ro", HostPath: "/srv/ro", Readonly: true, RecursiveReadOnly: true},
			// kubelet sets image_sub_path beside image mounts, whatever the mount's own kind.
			{ContainerPath: "/a/opts", HostPath: "/srv/opts", ImageSubPath: "opts", MountOptions: []string{"noexec", "nosuid"}},
			{ContainerPath: "/etc/resolv.conf", HostPath: "/srv/resolv.conf"},
			{ContainerPath: "/model", Image: &runtime.ImageSpec{Image: "sha256:def"}, ImageSubPath: "weights", MountOptions: []string{"noexec"}},
			{ContainerPath: "/dev", HostPath: "/dev"},
		}
		c.Sources = map[string]Source{
			"/link": {Path: "/srv/real", Shared: true}, "/srv/a": {Path: "/srv/a", Slave: true},
		}
		c.Volumes = []specs.Mount{
			{Destination: "/model/", Type: "bind", Source: "/var/lib/podshim/images/def/weights", Options: []string{"rbind", "ro"}},
			{Destination: "/cache", Type: "bind", Source: "/var/lib/podshim/volumes/cache", Options: []string{"rbind", "rw"}},
			{Destination: "/a", Type: "bind", Source: "/var/lib/podshim/volumes/a", Options: []string{"rbind", "rw"}},
		}
	}},
	{"devices", func(c *Container) {
		c.Config.Devices = []*runtime.Device{{HostPath: "/dev/fuse", ContainerPath: "/dev/fuse", Permissions: "rw"}}
		c.Devices = []Device{{LinuxDevice: specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, Access: "rw"}}
	}},
	{"strict-groups", func(c *Container) {
		c.security().SupplementalGroupsPolicy = runtime.SupplementalGroupsPolicy_Strict
		c.security().SupplementalGroups = []int64{9, 3, 9}
	}},
	{"ambient", func(c *Container) {
		c.security().Capabilities = &runtime.Capability{
			DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"NET_BIND_SERVICE"},
		}
	}},
	{"deprecated-profiles", func(c *Container) {
		c.security().SeccompProfilePath = "localhost/testdata/seccomp.json" //nolint:staticcheck // what is tested
		c.security().SeccompProfilePath = "runtime/default"                 //nolint:staticcheck // what is tested
		c.security().ApparmorProfile = "localhost/mine"                     //nolint:staticcheck // what is tested
		c.Host.AppArmor = true
	}},
	{"selinux", func(c *Container) {
		c.Pod.ProcessLabel, c.Pod.MountLabel = "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"
		c.MountLabel = "system_u:object_r:container_file_t:s0:c3,c4"
	}},
	{"stop-signal-and-rdt", func(c *Container) {
		c.Config.StopSignal = runtime.Signal_SIGNAL_SIGRTMINPLUS3
		c.Config.Annotations = map[string]string{rdtContainer: "gold"}
		c.Host.RDT = true
	}},
}

// infraCase is the same for infra containers.
type infraCase struct {
	name string
	edit func(*Infra)
}

var infraCorpus = []infraCase{
	{"infra-minimal", func(*Infra) {}},
	{"infra-sysctls-shared-pid", func(i *Infra) {
		i.Pod.Config.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1", "kernel.shmmax": "1000"}
		i.Pod.Config.Linux.SecurityContext.NamespaceOptions.Pid = runtime.NamespaceMode_POD
		i.Pod.Config.Linux.SecurityContext.Seccomp = &runtime.SecurityProfile{}
		i.Pod.Config.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: 65535}
		i.Host.MinOOMScoreAdj = -500
	}},
	{"infra-host-everything", func(i *Infra) {
		i.Pod.Config.Hostname = ""
		i.Pod.Netns = ""
		i.Pod.Config.Linux.SecurityContext.NamespaceOptions = &runtime.NamespaceOption{
			Network: runtime.NamespaceMode_NODE, Pid: runtime.NamespaceMode_NODE, Ipc: runtime.NamespaceMode_NODE,
		}
	}},
	{"infra-host-network-own-hostname", func(i *Infra) {
		i.Pod.Netns = ""
		i.Pod.Config.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	}},
	{"infra-user-namespace", func(i *Infra) {
		i.Pod.Config.Linux.SecurityContext.NamespaceOptions.UsernsOptions =
			&runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: testIDs, Gids: testIDs}
		i.Pod.UIDMappings, i.Pod.GIDMappings = IDMappings(i.Pod.Config)
	}},
	{"infra-image", func(i *Infra) {
		i.Image = &ocispec.ImageConfig{Entrypoint: []string{"/pause"}, Env: []string{"X=1"}, WorkingDir: "run"}
		i.ImageName = "registry.k8s.io/pause:3.10"
		i.User = specs.User{UID: 65535, GID: 65535}
	}},
}

func testInfra() Infra {
	p := testPod()
	p.IPC, p.UTS = "", "" // the infra container makes them
	return Infra{Pod: p, Rootfs: "/run/podshim/infra", Host: testHost(), Handler: testHandler(), ReadSeccomp: os.ReadFile, LoadedAppArmor: loaded}
}

// built is a corpus case's spec.
func (tc containerCase) built(t testing.TB) (*specs.Spec, Container) {
	t.Helper()
	c := testContainer()
	tc.edit(&c)
	spec, err := ForContainer(c)
	if err != nil {
		t.Fatal(err)
	}
	return spec, c
}
