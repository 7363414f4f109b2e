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

// Whatever is restarted or killed of kubelet and podshim: no container is restarted
// because of it, and no line of a log is lost.
func TestRestarts(t *testing.T) {
	t.Parallel()
	k := Start(t, Options{})
	k.expect = append(k.expect, regexp.MustCompile(`code = Unavailable|error reading from server: (EOF|connection reset by peer)|Unable to authenticate|context deadline exceeded|container runtime is down|"Failed to stop sandbox" podSandboxID=`))
	pods := []*Pod{k.Run("localhost"), k.Run("log-sidecar"), k.Run("probes", "rm /tmp/live", "true", "timeoutSeconds: 1", "timeoutSeconds: 60"), k.Run("native-sidecar"), k.Run("user-namespace")}
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
		do   func()
	}{
		{"podshim restarted", k.Node.Restart},
		{"podshim killed", func() { k.Node.Kill(); k.Node.Resume() }},
		{"kubelet restarted", func() { k.Stop(); k.Launch() }},
		{"kubelet killed", func() { k.Kill(); k.Launch() }},
		{"both killed, podshim back first", func() { k.Kill(); k.Node.Kill(); k.Node.Resume(); k.Launch() }},
		{"podmon killed", k.killMonitors},
		{"podshim and podmon killed", func() { k.Node.Kill(); k.killMonitors(); k.Node.Resume() }},
		{"all three killed", func() { k.Kill(); k.Node.Kill(); k.killMonitors(); k.Node.Resume(); k.Launch() }},
		{"podshim away while kubelet goes on", func() { k.Node.Kill(); k.waitNoRuntime(); k.Node.Resume() }},
	} {
		step.do()
		for _, p := range pods {
			status := p.WaitReady()
			for _, c := range append(status.Status.InitContainerStatuses, status.Status.ContainerStatuses...) {
				if _, ok := before[p.Name+"/"+c.Name+" "+c.ID()]; !ok || c.RestartCount != 0 {
					t.Errorf("%s: container was restarted: %v", step.name, c)
				}
			}
			// kubelet's gRPC client takes its time to try a runtime again that was away.
			if !k.ask(func() bool {
				out, err := p.TryExec(status.Status.ContainerStatuses[0].Name, "echo", "here")
				return err == nil && out == "here\n"
			}) {
				t.Errorf("%s: no exec in pod %s", step.name, p.Name)
			}
		}
		for name, process := range before {
			if !process.Alive() {
				t.Errorf("%s: %s (%v) is gone", step.name, name, process)
			}
		}
		if t.Failed() {
			return
		}
	}
	k.killWhileStarting(t)
	// A line a second, from the first to the last, with nothing missing or twice.
	log := pods[1].Logs("forwarder")
	for n, line := range slices.Collect(strings.Lines(log)) {
		if line != fmt.Sprintf("request %d\n", n+1) {
			t.Fatalf("line %d of the log is %q", n+1, line)
		}
	}
}

// killWhileStarting kills podshim when it has begun with some pods, and again when it
// has begun to take them down; kubelet goes on. They come up, and go, nevertheless.
func (k *Kubelet) killWhileStarting(t *testing.T) {
	var pods []*Pod
	for _, example := range []string{"init", "volume", "shared-pid", "names"} {
		pods = append(pods, k.Run(example))
	}
	if !k.ask(func() bool { return len(k.sandboxes()) > 5 }) {
		t.Fatal("podshim has begun with no pod")
	}
	k.Node.Kill()
	k.Node.Resume()
	uids := map[string]bool{}
	for _, p := range pods {
		uids[p.WaitReady().Metadata.UID] = true
	}
	begun := len(k.sandboxes())
	for _, p := range pods {
		p.Remove()
	}
	if !k.ask(func() bool { return len(k.sandboxes()) < begun }) {
		t.Fatal("podshim has taken down no pod")
	}
	k.Node.Kill()
	k.Node.Resume()
	if !k.ask(func() bool {
		return !slices.ContainsFunc(k.podDirs(), func(uid string) bool { return uids[uid] })
	}) {
		t.Errorf("pods %v are still there, of %v", k.podDirs(), uids)
	}
	for uid := range uids {
		if left := processesOf(uid); len(left) != 0 {
			t.Errorf("pod %s has left %v", uid, left)
		}
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

// killMonitors kills every podmon of the node.
func (k *Kubelet) killMonitors() {
	k.t.Helper()
	monitors := k.Node.Monitors()
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
`})
	k.expect = append(k.expect,
		// kubelet asks for a sandbox that it has not made yet.
		regexp.MustCompile(`"PodSandbox from runtime service failed" .* podSandboxID=""`),
		// kubelet 1.37 looks for a volume's name among the mounts that CRI tells of, which have none.
		regexp.MustCompile(`err="image was not found" pod="volumes-node"`))
	t.Run("stats", func(t *testing.T) {
		t.Parallel()
		k := k.With(t)
		testStats(t, k)
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
	})
}
