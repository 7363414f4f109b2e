package spec

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// refused checks that err is of the class and names the field first.
func refused(t *testing.T, err, class error, field string) {
	t.Helper()
	if !errors.Is(err, class) {
		t.Fatalf("error %v, want %v", err, class)
	}
	if !strings.HasPrefix(err.Error(), field+": ") {
		t.Errorf("error %q does not begin with the field %q", err, field)
	}
}

func TestValidatePodRefuses(t *testing.T) {
	type config = runtime.PodSandboxConfig
	ns := func(p *config) *runtime.NamespaceOption { return p.Linux.SecurityContext.NamespaceOptions }
	userns := func(mode runtime.NamespaceMode, uids, gids []*runtime.IDMapping) func(*config) {
		return func(p *config) { ns(p).UsernsOptions = &runtime.UserNamespace{Mode: mode, Uids: uids, Gids: gids} }
	}
	const options = "linux.security_context.namespace_options"
	for _, tc := range []struct {
		field string
		edit  func(*config)
	}{
		{"metadata", func(p *config) { p.Metadata = nil }},
		{"metadata.name", func(p *config) { p.Metadata.Name = "" }},
		{"metadata.name", func(p *config) { p.Metadata.Name = "../evil" }},
		{"metadata.name", func(p *config) { p.Metadata.Name = strings.Repeat("x", 254) }},
		{"metadata.namespace", func(p *config) { p.Metadata.Namespace = "a\nb" }},
		{"metadata.uid", func(p *config) { p.Metadata.Uid = "" }},
		{"hostname", func(p *config) { p.Hostname = strings.Repeat("h", 65) }},
		{"hostname", func(p *config) { p.Hostname = "two words" }},
		{"log_directory", func(p *config) { p.LogDirectory = "var/log" }},
		{"windows", func(p *config) { p.Windows = &runtime.WindowsPodSandboxConfig{} }},
		{"dns_config.servers[0]", func(p *config) { p.DnsConfig = &runtime.DNSConfig{Servers: []string{"banana"}} }},
		{"dns_config.searches[1]", func(p *config) { p.DnsConfig = &runtime.DNSConfig{Searches: []string{"a", "b\nnameserver 6.6.6.6"}} }},
		{"dns_config.options[0]", func(p *config) { p.DnsConfig = &runtime.DNSConfig{Options: []string{""}} }},
		{"port_mappings[0].container_port", func(p *config) { p.PortMappings = []*runtime.PortMapping{{ContainerPort: 70000}} }},
		{"port_mappings[0].host_port", func(p *config) { p.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: -1}} }},
		{"port_mappings[0].host_ip", func(p *config) { p.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostIp: "x"}} }},
		{"port_mappings[0].protocol", func(p *config) { p.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, Protocol: 9}} }},
		{"port_mappings[1].host_port", func(p *config) {
			p.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: 8080}, {ContainerPort: 81, HostPort: 8080}}
		}},
		{"linux.cgroup_parent", func(p *config) { p.Linux.CgroupParent = "/kubepods/../.." }},
		{"linux.cgroup_parent", func(p *config) { p.Linux.CgroupParent = "a.slice:b:c" }},
		{options + ".network", func(p *config) { ns(p).Network = runtime.NamespaceMode_CONTAINER }},
		{options + ".ipc", func(p *config) { ns(p).Ipc = runtime.NamespaceMode_TARGET }},
		{options + ".pid", func(p *config) { ns(p).Pid = runtime.NamespaceMode_TARGET }},
		{options + ".pid", func(p *config) { ns(p).Pid = 17 }},
		{options + ".target_id", func(p *config) { ns(p).TargetId = "x" }},
		{options + ".userns_options.mode", userns(runtime.NamespaceMode_CONTAINER, nil, nil)},
		{options + ".userns_options.mode", userns(runtime.NamespaceMode_NODE, testIDs, testIDs)},
		{options + ".userns_options.uids", userns(runtime.NamespaceMode_POD, nil, testIDs)},
		{options + ".userns_options.gids", userns(runtime.NamespaceMode_POD, testIDs, []*runtime.IDMapping{{ContainerId: 1, HostId: 1, Length: 1}})},
		{options + ".userns_options.uids[0].length", userns(runtime.NamespaceMode_POD, []*runtime.IDMapping{{}}, testIDs)},
		{options + ".userns_options.uids[0].length", userns(runtime.NamespaceMode_POD, []*runtime.IDMapping{{HostId: 1<<32 - 1, Length: 2}}, testIDs)},
		{options + ".userns_options.uids[1]", userns(runtime.NamespaceMode_POD, []*runtime.IDMapping{{Length: 10}, {ContainerId: 9, HostId: 100, Length: 10}}, testIDs)},
		{options + ".pid", func(p *config) {
			userns(runtime.NamespaceMode_POD, testIDs, testIDs)(p)
			ns(p).Pid = runtime.NamespaceMode_NODE
		}},
		{`linux.sysctls["vm.swappiness"]`, func(p *config) { p.Linux.Sysctls = map[string]string{"vm.swappiness": "0"} }},
		{`linux.sysctls["kernel.hostname"]`, func(p *config) { p.Linux.Sysctls = map[string]string{"kernel.hostname": "x"} }},
		{`linux.sysctls["user.max_user_namespaces"]`, func(p *config) { p.Linux.Sysctls = map[string]string{"user.max_user_namespaces": "1"} }},
		{`linux.sysctls["net/ipv4/ip_forward"]`, func(p *config) {
			p.Linux.Sysctls = map[string]string{"net/ipv4/ip_forward": "1"}
			ns(p).Network = runtime.NamespaceMode_NODE
		}},
		{`linux.sysctls["kernel.shmmax"]`, func(p *config) {
			p.Linux.Sysctls = map[string]string{"kernel.shmmax": "1"}
			ns(p).Ipc = runtime.NamespaceMode_NODE
		}},
		{"linux.security_context.run_as_group", func(p *config) { p.Linux.SecurityContext.RunAsGroup = &runtime.Int64Value{Value: 1} }},
		{"linux.security_context.run_as_user", func(p *config) { p.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: -1} }},
		{"linux.security_context.seccomp.localhost_ref", func(p *config) {
			p.Linux.SecurityContext.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "relative"}
		}},
		{"linux.overhead.cpu_shares", func(p *config) { p.Linux.Overhead = &runtime.LinuxContainerResources{CpuShares: 1} }},
		{"linux.resources.memory_limit_in_bytes", func(p *config) { p.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: -2} }},
	} {
		t.Run(tc.field, func(t *testing.T) {
			p := testPod()
			if err := ValidatePod(p.Config); err != nil {
				t.Fatal(err)
			}
			tc.edit(p.Config)
			refused(t, ValidatePod(p.Config), errdefs.ErrInvalidArgument, tc.field)
			// What validation refuses never becomes a spec.
			i := testInfra()
			i.Pod.Config = p.Config
			if _, err := ForInfra(i); !errors.Is(err, errdefs.ErrInvalidArgument) {
				t.Errorf("ForInfra: %v", err)
			}
		})
	}
	refused(t, ValidatePod(nil), errdefs.ErrInvalidArgument, "config")
}

func TestValidateContainerRefuses(t *testing.T) {
	mount := func(edit func(*runtime.Mount)) func(*Container) {
		return func(c *Container) {
			m := &runtime.Mount{ContainerPath: "/data", HostPath: "/srv"}
			edit(m)
			c.Config.Mounts = []*runtime.Mount{m}
		}
	}
	resources := func(r *runtime.LinuxContainerResources) func(*Container) {
		return func(c *Container) { c.Config.Linux.Resources = r }
	}
	options := func(o *runtime.NamespaceOption) func(*Container) {
		return func(c *Container) { c.security().NamespaceOptions = o }
	}
	const sc = "linux.security_context"
	for _, tc := range []struct {
		field string
		edit  func(*Container)
	}{
		{"metadata", func(c *Container) { c.Config.Metadata = nil }},
		{"metadata.name", func(c *Container) { c.Config.Metadata.Name = ".." }},
		{"image.image", func(c *Container) { c.Config.Image = nil }},
		{"windows", func(c *Container) { c.Config.Windows = &runtime.WindowsContainerConfig{} }},
		{"command[1]", func(c *Container) { c.Config.Command = []string{"a", "b\x00"} }},
		{"working_dir", func(c *Container) { c.Config.WorkingDir = "data" }},
		{"envs[0].key", func(c *Container) { c.Config.Envs = []*runtime.KeyValue{{Key: "A=B"}} }},
		{"envs[0].value", func(c *Container) { c.Config.Envs = []*runtime.KeyValue{{Key: "A", Value: []byte("x\x00")}} }},
		{"envs[0].value", func(c *Container) { c.Config.Envs = []*runtime.KeyValue{{Key: "A", Value: []byte("\xff")}} }},
		{"mounts[0].container_path", mount(func(m *runtime.Mount) { m.ContainerPath = "data" })},
		{"mounts[0].container_path", mount(func(m *runtime.Mount) { m.ContainerPath = "/x/.." })},
		{"mounts[0].host_path", mount(func(m *runtime.Mount) { m.HostPath = "" })},
		{"mounts[0].host_path", mount(func(m *runtime.Mount) { m.Image = &runtime.ImageSpec{Image: "x"} })},
		{"mounts[0].image.image", mount(func(m *runtime.Mount) { m.Image, m.HostPath = &runtime.ImageSpec{}, "" })},
		{"mounts[0].image_sub_path", mount(func(m *runtime.Mount) {
			m.Image, m.HostPath, m.ImageSubPath = &runtime.ImageSpec{Image: "x"}, "", "a/../../b"
		})},
		{"mounts[0].propagation", mount(func(m *runtime.Mount) { m.Propagation = 9 })},
		{"mounts[0].recursive_read_only", mount(func(m *runtime.Mount) { m.RecursiveReadOnly = true })},
		{"mounts[0].recursive_read_only", mount(func(m *runtime.Mount) {
			m.RecursiveReadOnly, m.Readonly = true, true
			m.Propagation = runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		})},
		{"mounts[0].mount_options[0]", mount(func(m *runtime.Mount) { m.MountOptions = []string{"size=1"} })},
		{"mounts[0].gidMappings", mount(func(m *runtime.Mount) { m.UidMappings = testIDs })},
		{"mounts[1].container_path", func(c *Container) {
			c.Config.Mounts = []*runtime.Mount{{ContainerPath: "/a", HostPath: "/x"}, {ContainerPath: "/a/", HostPath: "/y"}}
		}},
		{"devices[0].host_path", func(c *Container) { c.Config.Devices = []*runtime.Device{{HostPath: "sda"}} }},
		{"devices[0].permissions", func(c *Container) { c.Config.Devices = []*runtime.Device{{HostPath: "/dev/sda", Permissions: "x"}} }},
		{"CDI_devices[0].name", func(c *Container) { c.Config.CDIDevices = []*runtime.CDIDevice{{Name: "gpu"}} }},
		{"log_path", func(c *Container) { c.Config.LogPath = "../../etc/passwd" }},
		{"log_path", func(c *Container) { c.Config.LogPath = "/etc/passwd" }},
		{"stop_signal", func(c *Container) { c.Config.StopSignal = 99 }},
		{sc + ".privileged", func(c *Container) { c.security().Privileged = true }},
		{sc + ".namespace_options.network", options(&runtime.NamespaceOption{Network: runtime.NamespaceMode_NODE})},
		{sc + ".namespace_options.ipc", options(&runtime.NamespaceOption{Ipc: runtime.NamespaceMode_CONTAINER})},
		{sc + ".namespace_options.pid", options(&runtime.NamespaceOption{Pid: runtime.NamespaceMode_NODE})},
		{sc + ".namespace_options.pid", options(&runtime.NamespaceOption{Pid: runtime.NamespaceMode_POD})},
		{sc + ".namespace_options.target_id", options(&runtime.NamespaceOption{Pid: runtime.NamespaceMode_TARGET})},
		{sc + ".namespace_options.target_id", options(&runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER, TargetId: "x"})},
		{sc + ".namespace_options.userns_options", options(&runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER,
			UsernsOptions: &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: testIDs, Gids: testIDs}})},
		{sc + ".run_as_group", func(c *Container) { c.security().RunAsGroup = &runtime.Int64Value{} }},
		{sc + ".run_as_username", func(c *Container) {
			c.security().RunAsUser, c.security().RunAsUsername = &runtime.Int64Value{}, "root"
		}},
		{sc + ".supplemental_groups[0]", func(c *Container) { c.security().SupplementalGroups = []int64{1 << 32} }},
		{sc + ".supplemental_groups_policy", func(c *Container) { c.security().SupplementalGroupsPolicy = 5 }},
		{sc + ".capabilities.add_capabilities", func(c *Container) {
			c.security().Capabilities = &runtime.Capability{AddCapabilities: []string{"FLY"}}
		}},
		{sc + ".masked_paths[0]", func(c *Container) { c.security().MaskedPaths = []string{"proc"} }},
		{sc + ".seccomp.localhost_ref", func(c *Container) {
			c.security().Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost}
		}},
		{sc + ".seccomp.localhost_ref", func(c *Container) { c.security().Seccomp = &runtime.SecurityProfile{LocalhostRef: "/x"} }},
		{sc + ".seccomp_profile_path", func(c *Container) { c.security().SeccompProfilePath = "nonsense" }}, //nolint:staticcheck // what is tested
		{sc + ".apparmor_profile", func(c *Container) { c.security().ApparmorProfile = "nonsense" }},        //nolint:staticcheck // what is tested
		{sc + ".apparmor.profile_type", func(c *Container) { c.security().Apparmor = &runtime.SecurityProfile{ProfileType: 7} }},
		{sc + ".selinux_options.type", func(c *Container) { c.security().SelinuxOptions = &runtime.SELinuxOption{Type: "a:b"} }},
		{"linux.resources.cpu_period", resources(&runtime.LinuxContainerResources{CpuPeriod: 10})},
		{"linux.resources.cpu_quota", resources(&runtime.LinuxContainerResources{CpuQuota: -2})},
		{"linux.resources.cpu_quota", resources(&runtime.LinuxContainerResources{CpuQuota: 10})},
		{"linux.resources.cpuset_cpus", resources(&runtime.LinuxContainerResources{CpusetCpus: "all"})},
		{"linux.resources.oom_score_adj", resources(&runtime.LinuxContainerResources{OomScoreAdj: 1001})},
		{"linux.resources.hugepage_limits[0].page_size", resources(&runtime.LinuxContainerResources{HugepageLimits: []*runtime.HugepageLimit{{}}})},
		{`linux.resources.unified["../../x"]`, resources(&runtime.LinuxContainerResources{Unified: map[string]string{"../../x": "1"}})},
		{`linux.resources.unified["cgroup.procs"]`, resources(&runtime.LinuxContainerResources{Unified: map[string]string{"cgroup.procs": "1"}})},
		{"linux.resources.memory_swap_limit_in_bytes", resources(&runtime.LinuxContainerResources{MemorySwapLimitInBytes: 1})},
		{"linux.resources.memory_swap_limit_in_bytes", resources(&runtime.LinuxContainerResources{MemoryLimitInBytes: 2, MemorySwapLimitInBytes: 1})},
		{"command", func(c *Container) { c.Image.Entrypoint, c.Image.Cmd = nil, nil }},
		{"command", func(c *Container) { c.Config.Command = []string{""} }},
	} {
		t.Run(tc.field, func(t *testing.T) {
			c := testContainer()
			tc.edit(&c)
			_, err := ForContainer(c)
			refused(t, err, errdefs.ErrInvalidArgument, tc.field)
		})
	}
	refused(t, ValidateContainer(nil, testPod().Config), errdefs.ErrInvalidArgument, "config")
	refused(t, ValidateContainer(testContainer().Config, nil), errdefs.ErrInvalidArgument, "sandbox_config")
}

// TestMachineRefuses: sound configs that this or that machine cannot honour.
func TestMachineRefuses(t *testing.T) {
	const sc = "linux.security_context"
	for _, tc := range []struct {
		field string
		class error
		edit  func(*Container)
	}{
		{sc + ".capabilities.add_capabilities", errdefs.ErrFailedPrecondition, func(c *Container) {
			c.security().Capabilities = &runtime.Capability{AddCapabilities: []string{"SYS_RESOURCE"}}
		}},
		{sc + ".seccomp", errdefs.ErrFailedPrecondition, func(c *Container) {
			c.Host.Seccomp = false
			c.security().Seccomp = &runtime.SecurityProfile{}
		}},
		{sc + ".apparmor", errdefs.ErrFailedPrecondition, func(c *Container) { c.security().Apparmor = &runtime.SecurityProfile{} }},
		{sc + ".apparmor", errdefs.ErrFailedPrecondition, func(c *Container) {
			c.Host.AppArmor = true
			c.security().Apparmor = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "not-there"}
		}},
		{sc + ".namespace_options.target_id", errdefs.ErrInvalidArgument, func(c *Container) {
			c.security().NamespaceOptions = &runtime.NamespaceOption{Pid: runtime.NamespaceMode_TARGET, TargetId: "x"}
		}},
		{"mounts[0].uidMappings", errdefs.ErrFailedPrecondition, func(c *Container) {
			c.Host.IDMapMounts = false
			c.Config.Mounts = []*runtime.Mount{{ContainerPath: "/a", HostPath: "/b", UidMappings: testIDs, GidMappings: testIDs}}
		}},
		{"mounts[0].propagation", errdefs.ErrFailedPrecondition, func(c *Container) {
			c.Sources = map[string]Source{"/b": {Path: "/b", Slave: true}}
			c.Config.Mounts = []*runtime.Mount{{ContainerPath: "/a", HostPath: "/b", Propagation: runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL}}
		}},
		{"mounts[0].image", errdefs.ErrFailedPrecondition, func(c *Container) {
			c.Config.Mounts = []*runtime.Mount{{ContainerPath: "/a", Image: &runtime.ImageSpec{Image: "x"}}}
		}},
		{"linux.resources.unified", errdefs.ErrFailedPrecondition, func(c *Container) {
			c.Config.Linux.Resources = &runtime.LinuxContainerResources{Unified: map[string]string{"memory.high": "1"}}
		}},
		{"linux.resources.hugepage_limits[0].page_size", errdefs.ErrFailedPrecondition, func(c *Container) {
			c.Config.Linux.Resources = &runtime.LinuxContainerResources{HugepageLimits: []*runtime.HugepageLimit{{PageSize: "1GB", Limit: 1}}}
		}},
		{"linux.resources.memory_swap_limit_in_bytes", errdefs.ErrFailedPrecondition, func(c *Container) {
			c.Host.Swap = false
			c.Config.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 1, MemorySwapLimitInBytes: 2}
		}},
		{`annotations["` + rdtContainer + `"]`, errdefs.ErrNotImplemented, func(c *Container) {
			c.Config.Annotations = map[string]string{rdtContainer: "gold"}
		}},
		{`annotations["` + blockioPod + `pod"]`, errdefs.ErrNotImplemented, func(c *Container) {
			c.Pod.Config.Annotations = map[string]string{blockioPod + "pod": "slow"}
		}},
	} {
		t.Run(tc.field, func(t *testing.T) {
			c := testContainer()
			tc.edit(&c)
			_, err := ForContainer(c)
			refused(t, err, tc.class, tc.field)
		})
	}
}

// TestRROUnsupported: kubelet finds this refusal by its string.
func TestRROUnsupported(t *testing.T) {
	c := testContainer()
	c.Host.RRO = false
	c.Config.Mounts = []*runtime.Mount{{ContainerPath: "/a", HostPath: "/b", Readonly: true, RecursiveReadOnly: true}}
	_, err := ForContainer(c)
	refused(t, err, errdefs.ErrFailedPrecondition, "RROUnsupported")
}

func TestNumberLists(t *testing.T) {
	for s, want := range map[string]bool{
		"": true, "0": true, "0-3": true, "0-2,5,7-7": true,
		"1-0": false, "-": false, "1-": false, ",": false, "0,": false, "a": false, "0-1-2": false, " 0": false, "99999999": false,
	} {
		if got := isNumberList(s); got != want {
			t.Errorf("%q: %v, want %v", s, got, want)
		}
	}
}
