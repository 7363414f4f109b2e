package e2e

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/podshim/podshim/test/harness"
	"github.com/podshim/podshim/test/images"
)

// Whatever is restarted or killed of kubelet and podshim: no container is restarted
// because of it, and no line of a log is lost.
func TestRestarts(t *testing.T) {
	t.Parallel()
	k := Start(t, Options{})
	k.expect = append(k.expect, regexp.MustCompile(`code = Unavailable|Unable to authenticate|context deadline exceeded`))
	pods := []*Pod{k.Run("localhost"), k.Run("log-sidecar"), k.Run("probes", "rm /tmp/live", "true"), k.Run("native-sidecar"), k.Run("user-namespace")}
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
	// A line a second, from the first to the last, with nothing missing or twice.
	log := pods[1].Logs("forwarder")
	for n, line := range slices.Collect(strings.Lines(log)) {
		if line != fmt.Sprintf("request %d\n", n+1) {
			t.Fatalf("line %d of the log is %q", n+1, line)
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
	// Those of kubelet's QoS classes come when it likes.
	state := func() []string {
		return slices.DeleteFunc(k.Node.State(), func(line string) bool {
			return strings.HasSuffix(line, "/kubepods") || strings.HasSuffix(line, "/besteffort") || strings.HasSuffix(line, "/burstable")
		})
	}
	before := state()
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
	// kubelet removes dead sandboxes once a minute.
	var after []string
	if !k.ask(func() bool {
		after = state()
		return slices.Equal(before, after)
	}) {
		t.Errorf("what the pods have left:\n%s\nwhat is missing:\n%s", strings.Join(less(after, before), "\n"), strings.Join(less(before, after), "\n"))
	}
	if dirs := k.podDirs(); len(dirs) != 0 {
		t.Errorf("kubelet's directories of pods are still there: %v", dirs)
	}
	if logs := filesBelow(k.Logs); len(logs) != 0 {
		t.Errorf("logs are still there: %v", logs)
	}
}

// less is a without what b has.
func less(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}

// Feature gates that talk to the runtime.
func TestGates(t *testing.T) {
	t.Parallel()
	k := Start(t, Options{Config: `featureGates:
  EventedPLEG: true
  CRIListStreaming: true
  PodAndContainerStatsFromCRI: true
  ContainerStopSignals: true
`})
	k.expect = append(k.expect,
		// podshim has no ListMetricDescriptors and ListPodSandboxMetrics yet; kubelet then
		// has no metrics of containers at /metrics/cadvisor.
		regexp.MustCompile(`method ListMetricDescriptors not implemented`),
		// kubelet asks for a sandbox that it has not made yet.
		regexp.MustCompile(`"PodSandbox from runtime service failed" .* podSandboxID=""`))
	t.Run("stats", func(t *testing.T) {
		t.Parallel()
		testStats(t, k.With(t))
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
		if err := usr1.WaitGone(harness.Limit / 2); err != nil {
			t.Error(err)
		}
		if got := k.lastLog(log); got != "ready\ngot SIGUSR1\n" {
			t.Errorf("last words are %q", got)
		}
	})
	t.Run("evented-pleg", func(t *testing.T) {
		t.Parallel()
		k := k.With(t)
		testLifetimes(t, k)
		k.wantMetric("/metrics", "kubelet_evented_pleg_connection_success_count 1")
	})
}
