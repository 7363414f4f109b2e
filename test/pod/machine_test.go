package pod

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
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
	for _, tc := range []struct {
		field    string
		r        *cri.LinuxContainerResources
		v1, v2   string // the file
		onV1, on string // its content
	}{
		{"hugepage_limits", &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 3 * page}}},
			"hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max", strconv.Itoa(3 * page), strconv.Itoa(3 * page)},
		{"unified", &cri.LinuxContainerResources{Unified: map[string]string{"memory.high": "100003840"}},
			"memory.high", "memory.high", "", "100003840"},
		{"memory_swap_limit_in_bytes", &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 80 << 20},
			"memory.memsw.limit_in_bytes", "memory.swap.max", strconv.Itoa(80 << 20), strconv.Itoa(16 << 20)},
	} {
		t.Run(tc.field, func(t *testing.T) {
			_, probed := p.Infra().CgroupValue(tc.v1, tc.v2)
			if probed != nil && tc.field == "hugepage_limits" {
				c := p.With(t).Create(sleeper, resources(tc.r)) // as containerd and CRI-O do
				n.WaitLog("this machine has no hugetlb controller", c.ID)
				return
			}
			if probed != nil {
				checkCode(t, create(n, p, resources(tc.r)), notNow, tc.field)
				return
			}
			c := p.With(t).Run(sleeper, resources(tc.r))
			c.WaitLog("ready")
			want := tc.onV1
			if harness.CgroupV2() {
				want = tc.on
			}
			if got := value(t, c.Process(), tc.v1, tc.v2); strings.TrimSpace(got) != want {
				t.Errorf("%s is %s, want %s", tc.v2, got, want)
			}
		})
	}
}
