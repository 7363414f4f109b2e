package fault

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// Stop means stopped: PID 1 ignores SIGTERM and has 200 children in sessions of their
// own. When the call returns, within a second after the grace, nothing of them is left.
func TestStopLeavesNothing(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	const grace = 2 * time.Second
	p := n.RunPod()
	var over []time.Duration
	for i := range times(200, 3) {
		took := stopStubborn(t, p, grace)
		if took > grace+promised(time.Second) {
			t.Errorf("stop %d took %v", i, took)
		}
		over = append(over, took-grace)
	}
	figures(t, "%d stops in a row of %d processes each, with a grace of %v; they took at most %v longer (of 99 in 100 %v, median %v)",
		len(over), children+1, grace, worst(over), p99(over), median(over))
}

// children are those of a container's first process that must be killed with it.
const children = 200

// stopStubborn stops a container that does not end by itself, and returns how long the
// call took.
func stopStubborn(t *testing.T, p *harness.Pod, grace time.Duration) time.Duration {
	c := p.Shell(fmt.Sprintf("trap '' TERM; for i in $(seq %d); do setsid sleep 100000 & done; echo ready; while :; do sleep 1000; done", children))
	c.WaitLog("ready")
	asked(t, "the children run", func() bool { return len(c.Processes()) > children })
	process := c.Process()
	began := time.Now()
	c.Stop(grace)
	took := time.Since(began)
	if left := c.Processes(); len(left) > 0 {
		t.Errorf("%d processes are left, such as %v", len(left), left[0])
	}
	if process.Alive() {
		t.Errorf("%v is alive", process)
	}
	if s := c.Status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 137 {
		t.Errorf("the container is %v with %d, want 137", s.State, s.ExitCode)
	}
	if took < grace {
		t.Errorf("the grace was cut by %v", grace-took)
	}
	c.Remove()
	return took
}

// Processes that no signal ends, as those in uninterruptible sleep are, delay their own
// container and nothing else; once they can end, the same call succeeds. A frozen
// cgroup above the container's, which podmon does not thaw, makes such ones.
func TestStopOfWhatCannotEnd(t *testing.T) {
	harness.NeedRoot(t)
	if harness.CgroupV2() {
		t.Skip("SKIPPED: SIGKILL ends frozen processes on cgroup v2")
	}
	n := start(t, harness.Options{})
	other := n.RunPod().Shell(counter(""))
	stuck := n.RunPod(func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = n.PodCgroup("stuck") })
	c := stuck.Shell("echo it runs; sleep 100000")
	// Before that PID 1 is about to execute it, in a process of several threads: a kernel
	// that freezes one of them waits for ever in de_thread (fs/exec.c) for its end.
	c.WaitLog("it runs")
	dir, err := c.Process().CgroupDir("freezer")
	if err != nil {
		t.Fatal(err)
	}
	freezer := filepath.Join(filepath.Dir(dir), "freezer.state")
	// A cgroup in which a process forks can stay in FREEZING: it has to be asked anew.
	set := func(state string) {
		asked(t, "the cgroup is "+state, func() bool {
			if err := os.WriteFile(freezer, []byte(state), 0); err != nil {
				t.Errorf("write %s: %v", freezer, err)
				return true
			}
			b, err := os.ReadFile(freezer)
			return err == nil && strings.TrimSpace(string(b)) == state
		})
		if t.Failed() {
			t.Fatalf("what is there:\n%s", frozen(filepath.Dir(freezer)))
		}
	}
	set("FROZEN")
	thaw := func() { set("THAWED") }
	thawed := false
	defer func() {
		if !thawed {
			thaw()
		}
	}()
	impatient, cancel := context.WithCancel(context.Background())
	stopped := make(chan error, 1)
	go func() {
		_, err := n.Runtime.StopContainer(impatient, &cri.StopContainerRequest{ContainerId: c.ID, Timeout: 0})
		stopped <- err
	}()
	asked(t, "SIGKILL is sent", func() bool {
		return !strings.HasSuffix(c.Process().Status("ShdPnd"), "0000000000000000") || !strings.HasSuffix(c.Process().Status("SigPnd"), "0000000000000000")
	})

	// Everything else goes on, several times over.
	var execs, pods []time.Duration
	for range times(20, 3) {
		began := time.Now()
		other.Output("true")
		execs = append(execs, time.Since(began))
		began = time.Now()
		p := n.RunPod()
		p.Shell("exit 3").WaitExit()
		if err := p.StopAndRemove(); err != nil {
			t.Errorf("remove another pod: %v", err)
		}
		pods = append(pods, time.Since(began))
	}
	look(t, n, []*harness.Container{c, other})
	select {
	case err := <-stopped:
		t.Fatalf("the stop of what cannot end has ended: %v", err)
	default:
	}
	cancel()
	if err := <-stopped; err == nil {
		t.Error("the stop of what cannot end succeeds")
	}
	if s := c.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container is %v, and its process is there", s.State)
	}
	thaw()
	thawed = true
	c.Stop(0)
	if left := c.Processes(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	c.Remove()
	other.Stop(30 * time.Second)
	counted(t, other.LogPath(), "stdout")
	figures(t, "meanwhile: exec in another pod %v (median %v); another pod up, ended and removed in %v (median %v)",
		worst(execs), median(execs), worst(pods), median(pods))
}

// frozen is what the kernel says of the v1 freezer cgroups below a directory and of the
// threads in them.
func frozen(dir string) string {
	var b strings.Builder
	read := func(name string) string {
		content, err := os.ReadFile(name)
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(string(content))
	}
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		fmt.Fprintf(&b, "%s: %s, itself %s, by its parent %s\n", path, read(path+"/freezer.state"),
			read(path+"/freezer.self_freezing"), read(path+"/freezer.parent_freezing"))
		for _, tid := range strings.Fields(read(path + "/tasks")) {
			fmt.Fprintf(&b, "  %s\n  wchan %s\n  %s\n", read("/proc/"+tid+"/stat"), read("/proc/"+tid+"/wchan"), read("/proc/"+tid+"/stack"))
		}
		return nil
	})
	return b.String()
}
