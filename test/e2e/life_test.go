package e2e

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
	"github.com/podshim/podshim/test/images"
)

// counting has a shell write a line, with its number, five times a second.
const counting = "n=0; while true; do n=$((n+1)); echo line $n; sleep 0.2; done"

// Whatever is restarted or killed of kubelet and podshim: no container is restarted
// because of it, and no line of a log is lost.
func TestRestarts(t *testing.T) {
	t.Parallel()
	k := Start(t, Options{})
	// kubelet's clients may need some seconds more to see that podshim is back.
	k.expect = append(k.expect, regexp.MustCompile(`code = Unavailable|error reading from server: (EOF|connection reset by peer)|Unable to authenticate|container runtime is down|"Failed to stop sandbox" podSandboxID=`))
	pods := []*Pod{
		k.Run("localhost"), k.Run("log-sidecar"),
		k.Run("probes", "sleep 20; rm /tmp/live; while true; do sleep 1; done", counting, "timeoutSeconds: 1", "timeoutSeconds: 60"),
		k.Run("native-sidecar", "while true; do sleep 0.1; done", counting, "timeoutSeconds: 10", "timeoutSeconds: 60"),
		k.Run("user-namespace", "exec sleep 1000000", counting),
	}
	before := map[string]harness.Process{}
	for _, p := range pods {
		status := p.WaitReady()
		for _, c := range append(status.Status.InitContainerStatuses, status.Status.ContainerStatuses...) {
			before[p.Name+"/"+c.Name+" "+c.ID()] = k.process(c.ID())
		}
		infra, sandbox := p.Infra()
		before[p.Name+"/infra "+sandbox] = infra
	}
	for _, step := range []struct {
		name string
		away bool // podshim does not answer for a while
		do   func()
	}{
		{"podshim restarted", true, k.Node.Restart},
		{"podshim killed", true, func() { k.Node.Kill(); k.Node.Resume() }},
		{"kubelet restarted", false, func() { k.Stop(); k.Launch() }},
		{"kubelet killed", false, func() { k.Kill(); k.Launch() }},
		{"both killed, podshim back first", true, func() { k.Kill(); k.Node.Kill(); k.Node.Resume(); k.Launch() }},
		{"podmon killed", false, k.killMonitors},
		{"podshim and podmon killed", true, func() { k.Node.Kill(); k.killMonitors(); k.Node.Resume() }},
		{"all three killed", true, func() { k.Kill(); k.Node.Kill(); k.killMonitors(); k.Node.Resume(); k.Launch() }},
		{"podshim away while kubelet goes on", true, func() { k.Node.Kill(); k.waitNoRuntime(); k.Node.Resume() }},
	} {
		k.awayDuring(step.away, func() {
			step.do()
			k.checkRestart(t, step.name, pods, before)
		})
		if t.Failed() {
			return
		}
	}
	for _, who := range []struct {
		name string
		away bool
		kill func()
	}{
		{"podshim", true, func() { k.Node.Kill(); k.Node.Resume() }},
		{"kubelet", false, func() { k.Kill(); k.Launch() }},
		{"both", true, func() { k.Kill(); k.Node.Kill(); k.Node.Resume(); k.Launch() }},
	} {
		k.awayDuring(who.away, func() {
			k.killInTheMidst(t, who.name, who.kill)
			k.checkRestart(t, "in the midst of starts and removals, killed: "+who.name, pods, before)
		})
	}
	checkRestartLogs(t, pods)
}

// awayDuring runs something; what kubelet says of calls that had no answer, or none in time,
// is allowed meanwhile if podshim is away in it, and at no other time.
func (k *Kubelet) awayDuring(away bool, do func()) {
	if away {
		k.expectDuring(regexp.MustCompile(`context deadline exceeded|transport: Error while dialing|error reading from server`), do)
	} else {
		do()
	}
}

// checkRestart: all runs as before, and podshim carries kubelet's calls.
func (k *Kubelet) checkRestart(t *testing.T, step string, pods []*Pod, before map[string]harness.Process) {
	t.Helper()
	for _, p := range pods {
		status := p.WaitReady()
		for _, c := range append(status.Status.InitContainerStatuses, status.Status.ContainerStatuses...) {
			if _, ok := before[p.Name+"/"+c.Name+" "+c.ID()]; !ok || c.RestartCount != 0 {
				t.Errorf("%s: container was restarted: %v", step, c)
			}
		}
		// kubelet's gRPC client takes its time to try a runtime again that was away.
		if !k.ask(func() bool {
			out, err := p.TryExec(status.Status.ContainerStatuses[0].Name, "echo", "here")
			return err == nil && out == "here\n"
		}) {
			t.Errorf("%s: no exec in pod %s", step, p.Name)
		}
	}
	for name, process := range before {
		if !process.Alive() {
			t.Errorf("%s: %s (%v) is gone", step, name, process)
		}
	}
}

// checkRestartLogs: each line has the next number, from the first to the last; and the
// web server has written of each call of its client.
func checkRestartLogs(t *testing.T, pods []*Pod) {
	t.Helper()
	localhost, logSidecar, probes, sidecar, users := pods[0], pods[1], pods[2], pods[3], pods[4]
	for _, c := range []struct {
		pod        *Pod
		name, line string
	}{
		{logSidecar, "forwarder", "request"}, {probes, "fading", "line"}, {sidecar, "sidecar", "line"},
		{sidecar, "app", "line"}, {users, "one", "line"}, {users, "two", "line"},
	} {
		n := 0
		for line := range strings.Lines(c.pod.Logs(c.name)) {
			if n == 0 && line != c.line+" 1\n" {
				continue // what the container says first
			}
			if n++; line != fmt.Sprintf("%s %d\n", c.line, n) {
				t.Errorf("line %d of %s in pod %s is %q", n, c.name, c.pod.Name, line)
				break
			}
		}
		if n < 30 {
			t.Errorf("%s in pod %s has written %d lines", c.name, c.pod.Name, n)
		}
	}
	pages := strings.Count(localhost.Logs("client"), "<!DOCTYPE html>\n")
	served := strings.Count(localhost.Logs("web"), `"GET / HTTP`)
	if pages < 6 || served < pages || served > pages+2 { // the second log is read later
		t.Errorf("the web server has written of %d calls, its client of %d", served, pages)
	}
}

// killInTheMidst kills one or two of podshim and kubelet, and starts them again, when
// podshim has begun with some pods, again when a first container runs, and again when it has
// begun to take them down. They come up, and go, nevertheless, and what runs runs on.
func (k *Kubelet) killInTheMidst(t *testing.T, who string, kill func()) {
	t.Helper()
	idle := len(k.sandboxes())
	var pods []*Pod
	for _, example := range []string{"init", "volume", "shared-pid", "names"} {
		pods = append(pods, k.Run(example))
	}
	if !k.ask(func() bool { return len(k.sandboxes()) > idle }) {
		t.Fatalf("%s: podshim has begun with no pod", who)
	}
	kill()
	var running map[string]string
	if !k.ask(func() bool { running = k.running(pods); return len(running) > 0 }) {
		t.Fatalf("%s: podshim has started no container", who)
	}
	kill()
	uids := map[string]bool{}
	for _, p := range pods {
		status := p.WaitReady()
		uids[status.Metadata.UID] = true
		for _, c := range status.Status.ContainerStatuses {
			if id, ok := running[p.FullName()+"/"+c.Name]; ok && id != c.ID() {
				t.Errorf("%s: container %s ran, and %v came in its place", who, id, c)
			}
		}
	}
	for _, p := range pods {
		p.Remove()
	}
	if !k.ask(func() bool { return len(k.sandboxes()) < idle+len(pods) }) {
		t.Fatalf("%s: podshim has taken down no pod", who)
	}
	kill()
	if !k.ask(func() bool {
		return !slices.ContainsFunc(k.podDirs(), func(uid string) bool { return uids[uid] })
	}) {
		t.Errorf("%s: pods %v are still there, of %v", who, k.podDirs(), uids)
	}
	// kubelet that was killed has begun anew with what it no longer knows as pods.
	var left []harness.Process
	if !k.ask(func() bool {
		left = nil
		for uid := range uids {
			left = append(left, processesOf(uid)...)
		}
		return len(left) == 0
	}) {
		t.Errorf("%s: the pods have left %v", who, left)
	}
}

// sandboxes are the IDs of those that are ready.
func (k *Kubelet) sandboxes() (ids []string) {
	k.t.Helper()
	list, err := k.Node.Runtime.ListPodSandbox(k.Node.Context(), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{
		State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY},
	}})
	if err != nil {
		k.t.Fatalf("list sandboxes: %v", err)
	}
	for _, item := range list.Items {
		ids = append(ids, item.Id)
	}
	return ids
}

// running are the IDs of the pods' containers that run, by the names of pod and container.
func (k *Kubelet) running(pods []*Pod) map[string]string {
	k.t.Helper()
	list, err := k.Node.Runtime.ListContainers(k.Node.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
		State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING},
	}})
	if err != nil {
		k.t.Fatalf("list containers: %v", err)
	}
	ids := map[string]string{}
	for _, c := range list.Containers {
		name := c.Labels["io.kubernetes.pod.name"]
		if slices.ContainsFunc(pods, func(p *Pod) bool { return p.FullName() == name }) {
			ids[name+"/"+c.Metadata.Name] = c.Id
		}
	}
	return ids
}

// killMonitors kills every podmon of the node.
func (k *Kubelet) killMonitors() {
	k.t.Helper()
	monitors := k.Node.Podmons()
	if len(monitors) == 0 {
		k.t.Errorf("the node has no podmon to be killed")
	}
	for _, p := range monitors {
		err := p.Kill(sigkill)
		if err == nil {
			err = p.WaitGone(Limit)
		}
		if err != nil {
			k.t.Errorf("kill podmon: %v", err)
		}
	}
}

// waitNoRuntime returns when kubelet has noticed that its runtime does not answer.
func (k *Kubelet) waitNoRuntime() {
	k.t.Helper()
	seen := strings.Count(k.Log(), `Unavailable`)
	if !k.ask(func() bool { return strings.Count(k.Log(), `Unavailable`) > seen }) {
		k.t.Fatalf("kubelet does not notice that podshim is away")
	}
}

// P13: with the manifest goes all of the pod: processes, mounts, cgroups,
// namespaces, addresses, files, records.
func TestRemoval(t *testing.T) {
	t.Parallel()
	k := Start(t, Options{})
	for _, ref := range []string{images.Busybox, images.Nginx, images.Httpd} {
		k.Node.Pull(ref)
	}
	before := k.state()
	var pods []*Pod
	for _, example := range []string{"localhost", "shared-pid", "init", "resources", "user-namespace", "lifetimes", "host-namespaces", "volume", "native-sidecar"} {
		pods = append(pods, k.Run(example))
	}
	for _, p := range pods {
		switch p.Name {
		case "resources":
			p.Wait("out of memory", func(s PodStatus) bool { return s.Container("greedy").RestartCount > 0 })
		case "lifetimes":
			p.Wait("crashed", func(s PodStatus) bool { return s.Container("crashing").RestartCount > 0 })
		default:
			p.WaitReady()
		}
	}
	for _, p := range pods {
		p.Remove()
	}
	// kubelet removes dead sandboxes once a minute, and their logs after them.
	var after, dirs, logs []string
	if !k.ask(func() bool {
		after, dirs, logs = k.state(), k.podDirs(), filesBelow(k.Logs)
		return slices.Equal(before, after) && len(dirs)+len(logs) == 0
	}) {
		t.Errorf("what the pods have left:\n%s\nwhat is missing:\n%s\nkubelet's directories: %v, logs: %v",
			strings.Join(less(after, before), "\n"), strings.Join(less(before, after), "\n"), dirs, logs)
	}
}

// state is the node's, without the cgroups of QoS classes, which kubelet makes when it
// likes.
func (k *Kubelet) state() []string {
	k.t.Helper()
	return slices.DeleteFunc(k.Node.State(), func(line string) bool {
		for _, class := range [][]string{{"kubepods"}, {"kubepods", "besteffort"}, {"kubepods", "burstable"}} {
			if strings.HasSuffix(line, harness.CgroupPath(k.cgroup(class...))) {
				return true
			}
		}
		return false
	})
}

// less is a without what b has.
func less(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}

// Feature gates that talk to the runtime.
func TestGates(t *testing.T) {
	t.Parallel()
	k := Start(t, Options{Config: `featureGates:
  AllBeta: true # what a newer kubelet may have on by default
  EventedPLEG: true
  CRIListStreaming: true
  PodAndContainerStatsFromCRI: true
  ContainerStopSignals: true
  VolumeBindMountOptions: true
  UserNamespacesHostNetworkSupport: true
  ImageVolumeWithDigest: true
  RuntimeClassInImageCriApi: true
  DefaultPodSysctls: true
defaultPodSysctls: {net.ipv4.ip_local_port_range: "30000 30999"}
logging: {vmodule: [{filePattern: evented, verbosity: 4}]} # it then tells of each event that it goes by
`})
	k.expect = append(k.expect,
		// kubelet asks for a sandbox that it has not made yet.
		regexp.MustCompile(`"PodSandbox from runtime service failed" .* podSandboxID=""`),
		// kubelet 1.37 looks for a volume's name among the mounts that CRI tells of, which have none.
		regexp.MustCompile(`err="image was not found" pod="volumes-node"`))
	t.Cleanup(func() {
		if lines := linesWith(k.Log(), "not implemented, falling back"); lines != "" {
			t.Errorf("kubelet does without the gates' calls:\n%s", lines)
		}
	})
	t.Run("stats", func(t *testing.T) {
		t.Parallel()
		k := k.With(t)
		testStats(t, k)
		checkPodNetwork(t, &Pod{Name: "stats", k: k})
		k.wantMetric("/metrics/cadvisor", `container_memory_working_set_bytes{container="busy",`)
	})
	t.Run("stop-signal", func(t *testing.T) {
		t.Parallel()
		k := k.With(t)
		p := k.Run("stop-signal")
		p.WaitReady()
		usr1, log := p.Process("usr1"), p.logFile("usr1")
		// The kernel drops a signal that its shell has not asked for yet.
		p.WaitLog("usr1", "ready\n")
		p.Remove()
		// Also a kill at the end of the grace would end it: the last words tell.
		if err := usr1.WaitGone(Limit); err != nil {
			t.Error(err)
		}
		if got := k.lastLog(log); got != "ready\ngot SIGUSR1\n" {
			t.Errorf("last words are %q", got)
		}
	})
	t.Run("mount-options", func(t *testing.T) {
		t.Parallel()
		testMountOptions(t, k.With(t))
	})
	t.Run("host-network-users", func(t *testing.T) {
		t.Parallel()
		testHostNetworkUsers(t, k.With(t))
	})
	t.Run("volumes", func(t *testing.T) {
		t.Parallel()
		testVolumes(t, k.With(t))
	})
	t.Run("long-line", func(t *testing.T) {
		t.Parallel()
		testLongLine(t, k.With(t))
	})
	t.Run("evented-pleg", func(t *testing.T) {
		t.Parallel()
		k := k.With(t)
		testLifetimes(t, k)
		k.wantMetric("/metrics", "kubelet_evented_pleg_connection_success_count 1")
		// Of an end that kubelet has seen, podshim has told it as well.
		p := &Pod{Name: "lifetimes", k: k}
		end := p.Wait("crashed", func(s PodStatus) bool { return s.Container("crashing").LastState.Terminated != nil }).
			Container("crashing").LastState.Terminated
		_, id, _ := strings.Cut(end.ContainerID, "://")
		if !k.ask(func() bool {
			return strings.Contains(linesWith(k.Log(), "requested pod relist after container termination"), `containerID="`+id+`"`)
		}) {
			t.Errorf("no event came of the end of container %s:\n%s", id, linesWith(k.Log(), "Evented PLEG"))
		}
	})
}
