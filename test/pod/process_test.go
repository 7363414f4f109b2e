package pod

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

var sharedPID = podNamespaces(&cri.NamespaceOption{Pid: cri.NamespaceMode_POD})

// P11: in a shared PID namespace infra is PID 1, containers see each other's
// processes, and infra reaps what nobody waits for.
func TestSharedPIDNamespace(t *testing.T) {
	_, p := start(t, sharedPID)
	infra := p.Infra()
	a := p.Run(sleeper)
	a.WaitLog("ready")
	b := p.Run(sleeper)
	b.WaitLog("ready")
	for _, c := range []*harness.Container{a, b} {
		if got := c.Process().Namespace("pid"); got != infra.Namespace("pid") {
			t.Errorf("container's pid namespace is %s, infra's %s", got, infra.Namespace("pid"))
		}
	}
	if got := innerPID(t, infra); got != 1 {
		t.Errorf("infra is PID %d in the pod's namespace, want 1", got)
	}
	inA := strconv.Itoa(innerPID(t, a.Process()))
	if ps := b.Output("ps", "-o", "pid,args"); !slices.ContainsFunc(strings.Split(ps, "\n"), func(l string) bool {
		return strings.HasPrefix(strings.TrimSpace(l), inA+" ")
	}) {
		t.Errorf("ps in B does not show A's process %s:\n%s", inA, ps)
	}
	// The subshell ends at once: its child is an orphan, infra's from then on.
	a.Output("sh", "-c", "(sleep 0.2 & echo $! > /tmp/orphan)")
	inner := a.Output("cat", "/tmp/orphan")
	if orphan, ok := byInnerPID(infra.Namespace("pid"), inner); ok {
		if err := orphan.WaitGone(harness.Limit); err != nil {
			t.Fatal(err)
		}
	}
	if !eventually(func() bool { return len(zombies(infra.Namespace("pid"))) == 0 }) {
		t.Errorf("zombies in the pod: %v", zombies(infra.Namespace("pid")))
	}
}

// eventually waits, by the machine's own clock of 1 ms, for what raises no event:
// the reaping of a zombie.
func eventually(done func() bool) bool {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for until := time.Now().Add(10 * time.Second); time.Now().Before(until); <-tick.C {
		if done() {
			return true
		}
	}
	return false
}

func zombies(pidns string) []harness.Process {
	return harness.Processes(func(p harness.Process) bool { return p.State == "Z" && p.Namespace("pid") == pidns })
}

// innerPID is the process's number in its own PID namespace.
func innerPID(t *testing.T, p harness.Process) int {
	t.Helper()
	all := strings.Fields(p.Status("NSpid"))
	if len(all) == 0 {
		t.Fatalf("no NSpid of %v", p)
	}
	pid, err := strconv.Atoi(all[len(all)-1])
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

func byInnerPID(pidns, inner string) (harness.Process, bool) {
	found := harness.Processes(func(p harness.Process) bool {
		all := strings.Fields(p.Status("NSpid"))
		return p.Namespace("pid") == pidns && len(all) > 0 && all[len(all)-1] == inner
	})
	if len(found) != 1 {
		return harness.Process{}, false
	}
	return found[0], true
}

// P11: without sharing, each container's process is PID 1 of its own.
func TestOwnPIDNamespace(t *testing.T) {
	_, p := start(t)
	a := p.Run(sleeper)
	a.WaitLog("ready")
	if got := innerPID(t, a.Process()); got != 1 {
		t.Errorf("container's process is PID %d", got)
	}
	if ps := a.Output("ps", "-o", "args"); strings.Contains(ps, "pause") {
		t.Errorf("container sees infra:\n%s", ps)
	}
}

// P11: an ephemeral debug container joins the PID namespace of its target.
func TestTargetPIDNamespace(t *testing.T) {
	n, p := start(t)
	target := p.Run(sleeper)
	target.WaitLog("ready")
	debug := p.Run([]string{"sleep", "100000"}, security(func(s *cri.LinuxContainerSecurityContext) {
		s.NamespaceOptions.Pid, s.NamespaceOptions.TargetId = cri.NamespaceMode_TARGET, target.ID
	}))
	if got, want := debug.Process().Namespace("pid"), target.Process().Namespace("pid"); got != want {
		t.Fatalf("debug container's pid namespace is %s, target's %s", got, want)
	}
	if ps := debug.Output("ps", "-o", "pid,args"); !strings.Contains(ps, "sleep 100000 & wait") {
		t.Errorf("ps in the debug container does not show the target:\n%s", ps)
	}
	debug.Stop(0)
	if !target.Process().Alive() {
		t.Error("target ended with its debug container")
	}
	other := n.RunPod().Run(sleeper)
	conf := p.ContainerConfig(sleeper, security(func(s *cri.LinuxContainerSecurityContext) {
		s.NamespaceOptions.Pid, s.NamespaceOptions.TargetId = cri.NamespaceMode_TARGET, other.ID
	}))
	created, err := n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{PodSandboxId: p.ID, Config: conf, SandboxConfig: p.Config})
	if err == nil {
		t.Errorf("a target in another pod is accepted: %s", created.ContainerId)
	}
}

// P12: SIGTERM reaches PID 1, which may shut down in its own way.
func TestStopLetsShutDown(t *testing.T) {
	_, p := start(t)
	c := p.Shell("trap 'echo goodbye; exit 7' TERM; echo ready; sleep 100000 & wait")
	c.WaitLog("ready")
	c.Stop(30 * time.Second)
	s := c.Status()
	if s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 7 || s.Reason != "Error" {
		t.Errorf("status %v, code %d, reason %q; want exited, 7, Error", s.State, s.ExitCode, s.Reason)
	}
	if out := c.LogText("stdout"); out != "ready\ngoodbye\n" {
		t.Errorf("log is %q", out)
	}
}

// P12: the image's stop signal is sent instead of SIGTERM.
func TestStopSignalOfTheImage(t *testing.T) {
	n, p := start(t)
	opts := harness.ImageOptions{}
	opts.Config.StopSignal = "SIGUSR1"
	ref := n.NewImage("stopsignal", opts)
	c := p.Shell("trap 'echo term; exit 1' TERM; trap 'echo usr1; exit 0' USR1; echo ready; sleep 100000 & wait", image(ref))
	c.WaitLog("ready")
	c.Stop(30 * time.Second)
	if out := c.LogText("stdout"); out != "ready\nusr1\n" {
		t.Errorf("log is %q", out)
	}
}

// P12: a PID 1 that ignores SIGTERM is killed when the grace period is over, and
// with it everything it started.
func TestStopKillsWhoIgnoresIt(t *testing.T) {
	_, p := start(t)
	c := p.Shell("trap '' TERM; setsid sleep 100001 & echo ready; sleep 100000")
	c.WaitLog("ready")
	all := c.Processes()
	begin := time.Now()
	c.Stop(time.Second)
	if took := time.Since(begin); took < 900*time.Millisecond || took > 15*time.Second {
		t.Errorf("stop with a grace period of 1 s took %v", took)
	}
	if s := c.Status(); s.ExitCode != 137 {
		t.Errorf("exit code %d, want 137", s.ExitCode)
	}
	allGone(t, all)
}

func allGone(t *testing.T, all []harness.Process) {
	t.Helper()
	if len(all) < 2 {
		t.Errorf("test saw only %v", all)
	}
	for _, p := range all {
		if p.Alive() {
			t.Errorf("left: %v", p)
		}
	}
}

// P12: when PID 1 has exited nothing is left of the container, neither children
// in sessions of their own, nor double forks, nor what exec had started; in a
// PID namespace of its own, in the pod's and in the host's.
func TestNothingOutlivesPID1(t *testing.T) {
	for name, mode := range map[string]cri.NamespaceMode{
		"own": cri.NamespaceMode_CONTAINER, "pod": cri.NamespaceMode_POD, "host": cri.NamespaceMode_NODE,
	} {
		t.Run(name, func(t *testing.T) {
			_, p := start(t, podNamespaces(&cri.NamespaceOption{Pid: mode}))
			c := p.Shell("setsid sleep 100001 & (setsid sleep 100002 &) ; echo ready; while [ ! -e /tmp/end ]; do sleep 0.02; done; exit 3")
			c.WaitLog("ready")
			c.Output("sh", "-c", "setsid sleep 100003 >/dev/null 2>&1 & (sleep 100004 >/dev/null 2>&1 &)")
			var all []harness.Process
			if !eventually(func() bool {
				all = nil
				for _, process := range c.Processes() {
					if strings.Contains(process.Read("cmdline"), "sleep\x0010000") {
						all = append(all, process)
					}
				}
				return len(all) == 4
			}) {
				t.Fatalf("want four sleepers in the container's cgroup, have %v", all)
			}
			c.Touch("/tmp/end")
			s := c.WaitExit()
			if s.ExitCode != 3 {
				t.Errorf("exit code %d, want 3", s.ExitCode)
			}
			// The runtime says exited: from now on nothing may be left.
			allGone(t, all)
			if left := c.Processes(); len(left) > 0 {
				t.Errorf("left in the cgroup: %v", left)
			}
			if !p.Infra().Alive() {
				t.Error("infra ended with the container")
			}
		})
	}
}

// P12: an exec whose time is up is killed with everything it started.
func TestExecTimeout(t *testing.T) {
	n, p := start(t)
	c := p.Run(sleeper)
	c.WaitLog("ready")
	begin := time.Now()
	_, err := n.Runtime.ExecSync(n.Context(), &cri.ExecSyncRequest{
		ContainerId: c.ID, Cmd: []string{"sh", "-c", "trap '' TERM; sleep 100077"}, Timeout: 1,
	})
	wantCode(t, err, "DeadlineExceeded", "")
	if took := time.Since(begin); took > 15*time.Second {
		t.Errorf("a time limit of 1 s took %v", took)
	}
	if !eventually(func() bool {
		for _, process := range c.Processes() {
			if strings.Contains(process.Read("cmdline"), "100077") {
				return false
			}
		}
		return true
	}) {
		t.Error("the exec's processes are left")
	}
	if !c.Process().Alive() {
		t.Error("the container ended with the exec")
	}
}

// P12: a container killed from outside is seen, with its code.
func TestSignalFromOutside(t *testing.T) {
	_, p := start(t)
	c := p.Run([]string{"sleep", "100000"})
	if err := c.Process().Kill(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if s := c.WaitExit(); s.ExitCode != 137 || s.Reason != "Error" {
		t.Errorf("code %d, reason %q; want 137, Error", s.ExitCode, s.Reason)
	}
}

// What a command writes beyond the limit is thrown away; the command goes on to
// its own end (CRI ExecSyncResponse).
func TestExecOutputLimit(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	const limit = 1 << 20
	n := harness.Start(t, harness.Options{CRI: fmt.Sprintf("exec_sync_output_limit = %d", limit)})
	c := n.RunPod().Run(sleeper)
	c.WaitLog("ready")
	stdout, stderr, code := c.Exec("sh", "-c", "echo first >&2; head -c 5000000 /dev/zero; echo last >&2; touch /tmp/end; exit 7")
	if len(stdout)+len(stderr) != limit || !strings.HasPrefix(stderr, "first\n") || strings.Trim(stdout, "\x00") != "" || code != 7 {
		t.Errorf("%d and %d bytes, %.20q, code %d; want %d bytes together, beginning with first, and 7", len(stdout), len(stderr), stderr, code, limit)
	}
	c.Output("test", "-e", "/tmp/end")
	if stdout, stderr, code := c.Exec("sh", "-c", fmt.Sprintf("head -c %d /dev/zero", limit)); len(stdout) != limit || stderr != "" || code != 0 {
		t.Errorf("at the limit: %d and %d bytes, code %d", len(stdout), len(stderr), code)
	}
}
