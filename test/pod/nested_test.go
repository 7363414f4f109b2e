package pod

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/podshim/podshim/test/harness"
)

// A container whose processes are in a cgroup below its own, with a controller for it, as
// systemd or a node in a container has them, is a cgroup that takes no process any more:
// commands go where PID 1 is.
func TestExecInNestedCgroups(t *testing.T) {
	harness.NeedRoot(t)
	if !harness.CgroupV2() {
		t.Skip("SKIPPED: a cgroup of v1 takes processes beside its children; see make vm")
	}
	n := harness.Shared(t)
	c := n.RunPod().Run(sleeper)
	c.WaitLog("ready")
	own, err := c.Process().CgroupDir("")
	if err != nil {
		t.Fatal(err)
	}
	inner := filepath.Join(own, "init.scope")
	if err := os.Mkdir(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, p := range c.Processes() {
		if err := os.WriteFile(filepath.Join(inner, "cgroup.procs"), []byte(strconv.Itoa(p.PID)), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(own, "cgroup.subtree_control"), []byte("+memory"), 0); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if got := strings.TrimSpace(c.Output("cat", "/proc/self/cgroup")); got != "0::/init.scope" {
			t.Errorf("a command is in %q", got)
		}
	}
}
