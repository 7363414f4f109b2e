package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/podshim/podshim/test/harness"
)

// P14: requests and limits are in the cgroup files, of the container and of the pod
// around it; too much memory ends in OOMKilled.
func testResources(t *testing.T, k *Kubelet) {
	p := k.Run("resources")
	status := p.Wait("running what is bounded, with the greedy one killed", func(s PodStatus) bool {
		return s.Container("bounded").State.Running != nil && s.Container("greedy").LastState.Terminated != nil
	})
	end := status.Container("greedy").LastState.Terminated
	if end.Reason != "OOMKilled" || end.ExitCode != 137 {
		t.Errorf("the greedy one ended with %d %s, want 137 OOMKilled", end.ExitCode, end.Reason)
	}
	if status.Status.QOSClass != "Burstable" {
		t.Errorf("QoS class is %q", status.Status.QOSClass)
	}
	bounded := p.Process("bounded")
	for _, want := range []struct{ v1, one, v2, two string }{
		{"memory.limit_in_bytes", "33554432", "memory.max", "33554432"},
		{"cpu.cfs_quota_us", "10000", "cpu.max", "10000 100000"},
		{"cpu.shares", "51", "cpu.weight", ""},
	} {
		got, err := bounded.CgroupValue(want.v1, want.v2)
		expect := want.one
		if harness.CgroupV2() {
			expect = want.two
		}
		if expect != "" && (err != nil || got != expect) {
			t.Errorf("container's %s is %q, %v; want %s", want.v1, got, err, expect)
		}
	}
	if got := p.Cgroup("memory.limit_in_bytes", "memory.max"); got != "67108864" {
		t.Errorf("the pod may take %s bytes of memory, want 64 Mi", got)
	}
	if got := p.Cgroup("cpu.cfs_quota_us", "cpu.max"); !strings.HasPrefix(got, "60000") {
		t.Errorf("the pod's CPU quota is %s, want 60000", got)
	}
	if !strings.Contains(bounded.Cgroup, k.CgroupRoot+"/kubepods/burstable/pod"+status.Metadata.UID+"/") {
		t.Errorf("the container's cgroups are\n%s", bounded.Cgroup)
	}
	infra, _ := p.Infra()
	if !strings.Contains(infra.Cgroup, "/kubepods/burstable/pod"+status.Metadata.UID+"/") {
		t.Errorf("infra's cgroups are\n%s", infra.Cgroup)
	}
	if log := p.Logs("bounded"); !strings.Contains(log, "33554432") {
		t.Errorf("the container itself sees %q", log)
	}
}

// Probes: what kubelet asks, podshim carries; a failed liveness probe restarts.
func testProbes(t *testing.T, k *Kubelet) {
	p := k.Run("probes", "sleep 20", "sleep 4")
	status := p.WaitReady()
	web := status.Container("web")
	if web.Started == nil || !*web.Started || !web.Ready {
		t.Errorf("web is %v, want started and ready", web)
	}
	sandbox := p.Sandbox()
	after := p.Wait("restarted by its liveness probe", func(s PodStatus) bool {
		return s.Container("fading").RestartCount > 0 && s.Container("fading").State.Running != nil
	})
	if c := after.Container("web"); c.ID() != web.ID() {
		t.Errorf("web was restarted with the other: %v", c)
	}
	if now := p.Sandbox(); now != sandbox || after.Status.PodIP != status.Status.PodIP {
		t.Errorf("sandbox %s became %s, IP %s became %s", sandbox, now, status.Status.PodIP, after.Status.PodIP)
	}
	if log := p.Logs("fading", "previous=true"); log != "stopping\n" {
		t.Errorf("the preStop hook left %q in the log of the instance before", log)
	}
}

// summary is what these tests read of kubelet's /stats/summary.
type summary struct {
	Node struct {
		Runtime struct {
			ImageFs     *fsStats
			ContainerFs *fsStats
		}
	}
	Pods []struct {
		PodRef     struct{ Name, UID string }
		CPU        *cpuStats
		Memory     *memoryStats
		Network    *struct{ RxBytes, TxBytes *uint64 }
		Containers []struct {
			Name         string
			CPU          *cpuStats
			Memory       *memoryStats
			Rootfs, Logs *fsStats
		}
		ProcessStats *struct {
			ProcessCount *uint64 `json:"process_count"`
		} `json:"process_stats"`
	}
}

type cpuStats struct{ UsageNanoCores, UsageCoreNanoSeconds *uint64 }
type memoryStats struct{ UsageBytes, WorkingSetBytes, RSSBytes *uint64 }
type fsStats struct{ UsedBytes, CapacityBytes, InodesUsed *uint64 }

// What kubelet tells of a pod's use: for the horizontal autoscaler, for `kubectl
// top`, for eviction.
func testStats(t *testing.T, k *Kubelet) {
	p := k.RunManifest(`apiVersion: v1
kind: Pod
metadata:
  name: stats
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: busy
    image: registry.k8s.io/e2e-test-images/busybox:1.29-2
    command: [sh, -c, "dd if=/dev/zero of=/file bs=1M count=5; while true; do :; done"]
    resources: {limits: {cpu: 100m}}
  - name: idle
    image: registry.k8s.io/e2e-test-images/busybox:1.29-2
    command: [sleep, "1000000"]
`)
	p.WaitReady()
	var got string
	complete := func() bool {
		body, err := k.Get("/stats/summary")
		var s summary
		if err == nil {
			err = json.Unmarshal([]byte(body), &s)
		}
		if err != nil {
			got = err.Error()
			return false
		}
		missing := missingStats(s, p.FullName())
		got = fmt.Sprintf("missing %q", missing)
		return len(missing) == 0
	}
	if !k.ask(complete) {
		t.Errorf("/stats/summary is not complete: %s", got)
	}
	k.wantMetric("/metrics/resource", `container_cpu_usage_seconds_total{container="busy",namespace="default",pod="stats-node"}`)
}

// missingStats names what the summary does not tell of the pod of testStats.
func missingStats(s summary, name string) []string {
	var missing []string
	want := func(what string, ok bool) {
		if !ok {
			missing = append(missing, what)
		}
	}
	some := func(n *uint64) bool { return n != nil && *n > 0 }
	want("image filesystem", s.Node.Runtime.ImageFs != nil && some(s.Node.Runtime.ImageFs.UsedBytes))
	found := false
	for _, p := range s.Pods {
		if p.PodRef.Name != name {
			continue
		}
		found = true
		want("pod CPU", p.CPU != nil && some(p.CPU.UsageCoreNanoSeconds))
		want("pod memory", p.Memory != nil && some(p.Memory.WorkingSetBytes))
		want("two containers", len(p.Containers) == 2)
		for _, c := range p.Containers {
			want(c.Name+" memory", c.Memory != nil && some(c.Memory.WorkingSetBytes))
			want(c.Name+" rootfs", c.Rootfs != nil && c.Rootfs.UsedBytes != nil && some(c.Rootfs.InodesUsed))
			want(c.Name+" logs", c.Logs != nil && c.Logs.UsedBytes != nil)
			if c.Name != "busy" {
				continue
			}
			want("5 MiB written", c.Rootfs != nil && some(c.Rootfs.UsedBytes) && *c.Rootfs.UsedBytes >= 5<<20)
			// A tenth of a CPU, give or take what sampling makes of it.
			want("CPU in use", c.CPU != nil && some(c.CPU.UsageCoreNanoSeconds) && some(c.CPU.UsageNanoCores) &&
				*c.CPU.UsageNanoCores > 50e6 && *c.CPU.UsageNanoCores < 150e6)
		}
	}
	want("pod", found)
	return missing
}

// wantMetric waits until one of kubelet's metrics endpoints has a sample whose line
// begins so.
func (k *Kubelet) wantMetric(path, prefix string) {
	k.t.Helper()
	var body string
	if !k.ask(func() bool {
		body, _ = k.Get(path)
		return strings.Contains("\n"+body, "\n"+prefix)
	}) {
		k.t.Errorf("%s has no %s:\n%s", path, prefix, linesWith(body, `pod="`))
	}
}

func linesWith(text, word string) string {
	var kept strings.Builder
	for line := range strings.Lines(text) {
		if strings.Contains(line, word) {
			kept.WriteString(line)
		}
	}
	return kept.String()
}
