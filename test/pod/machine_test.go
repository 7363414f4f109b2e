package pod

import (
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// create asks for a container that may be refused.
func create(n *harness.Node, p *harness.Pod, edits ...func(*cri.ContainerConfig)) error {
	_, err := n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{
		PodSandboxId: p.ID, Config: p.ContainerConfig(sleeper, edits...), SandboxConfig: p.Config})
	return err
}

// A class of memory bandwidth or disk I/O that the machine has not is refused by
// the annotation that names it, the container's or its pod's.
func TestClassesAreRefused(t *testing.T) {
	if _, err := os.Stat("/sys/fs/resctrl/schemata"); err == nil {
		t.Skip("SKIPPED: this machine has resctrl")
	}
	n, p := start(t)
	for _, key := range []string{"io.kubernetes.cri.rdt-class", "io.kubernetes.cri.blockio-class"} {
		checkCode(t, create(n, p, func(c *cri.ContainerConfig) { c.Annotations = map[string]string{key: "gold"} }), "Unimplemented", key)
	}
	for _, key := range []string{"rdt.resources.beta.kubernetes.io/pod", "blockio.resources.beta.kubernetes.io/container.c1"} {
		all := n.RunPod(func(c *cri.PodSandboxConfig) { c.Annotations = map[string]string{key: "gold"} })
		checkCode(t, create(n, all), "Unimplemented", key)
		if of, err := n.Runtime.ListContainers(n.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: all.ID}}); err != nil || len(of.Containers) > 0 {
			t.Errorf("refused, and there is %v (%v)", of, err)
		}
	}
}

// A mount with ID mappings in a pod without a user namespace: on the disk IDs are
// the ones of the container_id side, in the container those of the host_id side.
func TestMountIDMappings(t *testing.T) {
	n, p := start(t)
	volume := filepath.Join(n.Volumes, p.Config.Metadata.Uid)
	for _, dir := range []string{volume, volume + "/plain"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, 5, 6); err != nil {
			t.Fatal(err)
		}
	}
	const base = 70_000
	uids := []*cri.IDMapping{{ContainerId: 0, HostId: base, Length: 1000}}
	gids := []*cri.IDMapping{{ContainerId: 0, HostId: 2 * base, Length: 1000}}
	user := security(func(s *cri.LinuxContainerSecurityContext) {
		s.RunAsUser, s.RunAsGroup = &cri.Int64Value{Value: base + 5}, &cri.Int64Value{Value: 2*base + 6}
	})
	c := p.Run(sleeper, user, mounts(
		&cri.Mount{HostPath: volume, ContainerPath: "/mapped", UidMappings: uids, GidMappings: gids},
		&cri.Mount{HostPath: volume + "/plain", ContainerPath: "/plain"},
	))
	c.WaitLog("ready")
	if c.Process().Namespace("user") != self.Namespace("user") {
		t.Fatal("the container has a user namespace")
	}
	if got := c.Output("stat", "-c", "%u:%g", "/mapped"); got != "70005:140006" {
		t.Errorf("what is 5:6 on the disk is %s in the container, want 70005:140006", got)
	}
	if got := c.Output("stat", "-c", "%u:%g", "/plain"); got != "5:6" {
		t.Errorf("a mount without mappings shows %s for 5:6", got)
	}
	c.Output("touch", "/mapped/made")
	info, err := os.Stat(volume + "/made")
	if err != nil {
		t.Fatal(err)
	}
	if st := info.Sys().(*syscall.Stat_t); st.Uid != 5 || st.Gid != 6 {
		t.Errorf("what the container made is %d:%d on the disk, want 5:6", st.Uid, st.Gid)
	}
	// A file system that cannot: the kernel's own ones.
	checkCode(t, create(n, p, mounts(&cri.Mount{HostPath: "/proc/sys", ContainerPath: "/mapped", UidMappings: uids, GidMappings: gids})), notNow, "mounts[0].uidMappings")
}

// Limits that not every machine has: in the cgroup where it has, refused by name
// where not, but for huge pages, of which the log warns.
func TestLimitsOfSomeMachines(t *testing.T) {
	n, p := start(t)
	const page = 2 << 20
	huge := func(pages uint64) *cri.LinuxContainerResources {
		return &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: pages * page}}}
	}
	high := func(bytes string) *cri.LinuxContainerResources {
		return &cri.LinuxContainerResources{Unified: map[string]string{"memory.high": bytes}}
	}
	swap := func(mib int64) *cri.LinuxContainerResources {
		return &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: mib << 20}
	}
	number := strconv.Itoa
	for _, tc := range []struct {
		field         string
		first, second *cri.LinuxContainerResources // at the creation, and updated to
		v1, v2        string                       // the file
		onV1, onV2    [2]string                    // its content, then and then
	}{
		{"hugepage_limits", huge(3), huge(5), "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max",
			[2]string{number(3 * page), number(5 * page)}, [2]string{number(3 * page), number(5 * page)}},
		{"unified", high("100003840"), high("50003968"), "memory.high", "memory.high",
			[2]string{}, [2]string{"100003840", "50003968"}},
		{"memory_swap_limit_in_bytes", swap(80), swap(96), "memory.memsw.limit_in_bytes", "memory.swap.max",
			[2]string{number(80 << 20), number(96 << 20)}, [2]string{number(16 << 20), number(32 << 20)}},
	} {
		t.Run(tc.field, func(t *testing.T) {
			_, lacks := p.Infra().CgroupValue(tc.v1, tc.v2)
			switch {
			case lacks != nil && tc.field == "hugepage_limits":
				const warning = "this machine has no hugetlb controller"
				c := p.With(t).Create(sleeper, resources(tc.first)) // as containerd and CRI-O do
				n.WaitLog(warning, c.ID)
				c = p.With(t).Create(sleeper)
				if err := update(n, c, tc.second); err != nil {
					t.Fatal(err)
				}
				n.WaitLog(warning, c.ID)
				return
			case lacks != nil:
				checkCode(t, create(n, p, resources(tc.first)), notNow, tc.field)
				return
			}
			c := p.With(t).Run(sleeper, resources(tc.first))
			c.WaitLog("ready")
			want := tc.onV1
			if harness.CgroupV2() {
				want = tc.onV2
			}
			if got := value(t, c.Process(), tc.v1, tc.v2); got != want[0] {
				t.Errorf("%s is %s, want %s", tc.v2, got, want[0])
			}
			if err := update(n, c, tc.second); err != nil {
				t.Fatal(err)
			}
			if got := value(t, c.Process(), tc.v1, tc.v2); got != want[1] {
				t.Errorf("after the update %s is %s, want %s", tc.v2, got, want[1])
			}
		})
	}
}
