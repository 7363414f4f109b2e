package pod

import (
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// A container that has moved its processes into cgroups of its own, as systemd or a node in
// a container does, is a cgroup that takes no process any more: commands go where PID 1 is.
func TestExecInNestedCgroups(t *testing.T) {
	harness.NeedRoot(t)
	if !harness.CgroupV2() {
		t.Skip("SKIPPED: a cgroup of v1 takes processes beside its children; see make vm")
	}
	n := harness.Shared(t)
	p := n.RunPod(func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	c := p.Shell("cd /sys/fs/cgroup && mkdir init.scope && echo $$ >init.scope/cgroup.procs && echo +memory >cgroup.subtree_control && echo moved; exec sleep 100000",
		security(func(s *cri.LinuxContainerSecurityContext) { s.Privileged = true }))
	c.WaitLog("moved")
	for range 3 {
		if got := strings.TrimSpace(c.Output("cat", "/proc/self/cgroup")); got != "0::/init.scope" {
			t.Errorf("a command is in %q", got)
		}
	}
}
