package fault

import (
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// The kernel's OOM killer is told from everything else that ends with 137, however
// soon it comes; and an end with 0 is none, whatever befell a child.
func TestOOMKilled(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	p := n.RunPod()
	limited := func(c *cri.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = 24 << 20 }
	const eat = "dd if=/dev/zero of=/dev/null bs=200M count=1"
	type verdict struct {
		code   int32
		reason string
	}
	got := map[string]map[verdict]int{}
	count := func(name string, s *cri.ContainerStatus) {
		if got[name] == nil {
			got[name] = map[verdict]int{}
		}
		got[name][verdict{s.ExitCode, s.Reason}]++
	}
	rounds, others := times(200, 5), times(50, 5)
	for i := range rounds {
		for name, script := range map[string]string{
			"PID 1": "exec " + eat, "a child, then 0": eat + "; exit 0", "a child, then 3": eat + "; exit 3",
		} {
			if i >= others && name != "PID 1" {
				continue
			}
			c := p.Shell(script, limited)
			count(name, c.WaitExit())
			c.Remove()
		}
	}
	// What ends PID 1 later need not be what had ended a child.
	for range others {
		c := p.Shell(eat+"; echo survived; exec sleep 1000000", limited)
		c.WaitLog("survived")
		if err := unix.Kill(c.Process().PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		count("a child, then somebody's SIGKILL", c.WaitExit())
		c.Remove()
	}
	for name, want := range map[string]verdict{
		"PID 1": {137, "OOMKilled"}, "a child, then 0": {0, "Completed"}, "a child, then 3": {3, "Error"},
		"a child, then somebody's SIGKILL": {137, "Error"},
	} {
		runs := others
		if name == "PID 1" {
			runs = rounds
		}
		if got[name][want] != runs {
			t.Errorf("%s: %v, want %d times %v", name, got[name], runs, want)
		}
	}
	figures(t, "%v", got)
}
