package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
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
	infra, _ := p.Infra()
	for _, c := range []harness.Process{bounded, infra} {
		if !strings.Contains(c.Cgroup, ":"+harness.CgroupPath(k.podCgroup(status))+"/") {
			t.Errorf("%v is not in the pod's cgroup %s, it is in\n%s", c, k.podCgroup(status), c.Cgroup)
		}
	}
	if log := p.Logs("bounded"); !strings.Contains(log, "33554432") {
		t.Errorf("the container itself sees %q", log)
	}
}

// P14: the classes of pods, in cgroups and in who is spared when memory runs out.
func testClasses(t *testing.T, k *Kubelet) {
	guaranteed := k.Run("guaranteed")
	modest := k.Run("best-effort")
	infraScore := func(p *Pod) string { infra, _ := p.Infra(); return infra.Read("oom_score_adj") }
	for _, want := range []struct {
		pod   *Pod
		class string
		score int // of oom_score_adj, where the machine lets it be lowered
	}{{guaranteed, "Guaranteed", -997}, {modest, "BestEffort", 1000}} {
		status := want.pod.WaitReady()
		c := want.pod.Process("one")
		if status.Status.QOSClass != want.class || !strings.Contains(c.Cgroup, ":"+harness.CgroupPath(k.podCgroup(status))+"/") {
			t.Errorf("%s is %s, want %s; its cgroups are\n%s", want.pod.Name, status.Status.QOSClass, want.class, c.Cgroup)
		}
		// A machine whose root may not lower it gives what it has itself.
		own, _ := strconv.Atoi(strings.TrimSpace(self(t).Read("oom_score_adj")))
		if got, err := strconv.Atoi(strings.TrimSpace(c.Read("oom_score_adj"))); err != nil || (got != want.score && got != max(own, want.score)) {
			t.Errorf("oom_score_adj of %s is %d, %v; want %d", want.pod.Name, got, err, want.score)
		}
		if score, _ := strconv.Atoi(strings.TrimSpace(infraScore(want.pod))); score > max(own, -998) {
			t.Errorf("oom_score_adj of the infra container of %s is %d", want.pod.Name, score)
		}
	}
	for name, want := range map[string]struct{ memory, quota string }{"one": {"33554432", "5000"}, "two": {"16777216", "10000"}} {
		c := guaranteed.Process(name)
		memory, _ := c.CgroupValue("memory.limit_in_bytes", "memory.max")
		quota, _ := c.CgroupValue("cpu.cfs_quota_us", "cpu.max")
		if quota, _, _ = strings.Cut(quota, " "); memory != want.memory || quota != want.quota {
			t.Errorf("%s has %s bytes and a quota of %s, want %v", name, memory, quota, want)
		}
	}
	if got := guaranteed.Cgroup("memory.limit_in_bytes", "memory.max"); got != "50331648" {
		t.Errorf("the pod may take %s bytes of memory, want 48 Mi", got)
	}
}

// P14: limits of the pod as a whole.
func testPodResources(t *testing.T, k *Kubelet) {
	p := k.Run("pod-resources")
	modest := p.Wait("running", func(s PodStatus) bool { return s.Container("modest").State.Running != nil }).Container("modest")
	if got := p.Cgroup("memory.limit_in_bytes", "memory.max"); got != "50331648" {
		t.Errorf("the pod may take %s bytes of memory, want 48 Mi", got)
	}
	if got := p.Cgroup("cpu.cfs_quota_us", "cpu.max"); !strings.HasPrefix(got, "50000") {
		t.Errorf("the pod's CPU quota is %s, want 50000", got)
	}
	status := p.Wait("with the greedy one killed", func(s PodStatus) bool { return s.Container("greedy").LastState.Terminated != nil })
	if end := status.Container("greedy").LastState.Terminated; end.Reason != "OOMKilled" || end.ExitCode != 137 {
		t.Errorf("the greedy one ended with %d %s, want 137 OOMKilled", end.ExitCode, end.Reason)
	}
	if now := p.Status().Container("modest"); now.ID() != modest.ID() || now.RestartCount != 0 {
		t.Errorf("the modest one is %v", now)
	}
}

// Probes: what kubelet asks, podshim carries; a failed liveness probe restarts.
func testProbes(t *testing.T, k *Kubelet) {
	p := k.Run("probes", "sleep 20", "sleep 4", "timeoutSeconds: 1", "timeoutSeconds: 60",
		"\nspec:\n", "\nspec:\n  terminationGracePeriodSeconds: 20\n")
	status := p.WaitReady()
	web := status.Container("web")
	if web.Started == nil || !*web.Started || !web.Ready {
		t.Errorf("web is %v, want started and ready", web)
	}
	sandbox := p.Sandbox()
	// A page that is gone makes it unready and no more than that; with the page it is ready again.
	const page, away = "/usr/share/nginx/html/index.html", "/tmp/index.html"
	p.Exec("web", "mv", page, away)
	p.Wait("unready by its readiness probe", func(s PodStatus) bool {
		return !s.Container("web").Ready && s.Condition("Ready") == "False"
	})
	p.Exec("web", "mv", away, page)
	p.Wait("ready again", func(s PodStatus) bool { return s.Container("web").Ready })
	after := p.Wait("restarted by its liveness probe", func(s PodStatus) bool {
		return s.Container("fading").RestartCount > 0 && s.Container("fading").State.Running != nil
	})
	if c := after.Container("web"); c.ID() != web.ID() || c.RestartCount != 0 {
		t.Errorf("web was restarted with the other: %v", c)
	}
	if now := p.Sandbox(); now != sandbox || after.Status.PodIP != status.Status.PodIP {
		t.Errorf("sandbox %s became %s, IP %s became %s", sandbox, now, status.Status.PodIP, after.Status.PodIP)
	}
	if log := p.WaitLog("fading", "stopping\n", "previous=true"); log != "stopping\n" {
		t.Errorf("the preStop hook left %q in the log of the instance before", log)
	}
}

// P14: a child that takes too much memory is killed; its container is not, where
// the kernel kills single processes.
func testChildOOM(t *testing.T, k *Kubelet) {
	p := k.Run("child-oom")
	if harness.CgroupV2() {
		p.Wait("killed as a whole", func(s PodStatus) bool {
			end := s.Container("parent").LastState.Terminated
			return end != nil && end.Reason == "OOMKilled"
		})
		return
	}
	p.WaitReady()
	parent := p.Process("parent")
	if log := p.WaitLog("parent", "child ended"); !strings.Contains(log, "child ended with 137\n") {
		t.Errorf("the parent says %q", log)
	}
	c := p.Status().Container("parent")
	if !parent.Alive() || c.State.Running == nil || c.RestartCount != 0 || c.LastState.Terminated != nil {
		t.Errorf("the parent is %v, want it running as before", c)
	}
}

// podPids is the limit of processes that [TestPods]' kubelet gives each pod.
const podPids = 200

// P14: a pod's processes are limited.
func testPIDLimit(t *testing.T, k *Kubelet) {
	p := k.Run("pid-limit")
	p.WaitLog("forker", "can't fork")
	status := p.Status()
	if got := k.podCgroupValue(t, status, "pids.max"); got != fmt.Sprint(podPids) {
		t.Errorf("the pod may have %s processes, want %d", got, podPids)
	}
}

// podCgroupValue is the value of a file of a pod's cgroup, which is there as long as kubelet
// has the pod, with processes or without. The file has the same name on v1 and v2.
func (k *Kubelet) podCgroupValue(t *testing.T, status PodStatus, file string) string {
	t.Helper()
	controller, _, _ := strings.Cut(file, ".")
	root := "/sys/fs/cgroup"
	if !harness.CgroupV2() {
		root = filepath.Join(root, controller)
	}
	data, err := os.ReadFile(filepath.Join(root, harness.CgroupPath(k.podCgroup(status)), file))
	if err != nil {
		t.Errorf("cgroup of pod: %v", err)
	}
	return strings.TrimSpace(string(data))
}

// hugePages gives the machine some huge pages for as long as the test; false where it
// has none to give.
func hugePages(t TB, count int) bool {
	const file = "/proc/sys/vm/nr_hugepages"
	before, err := os.ReadFile(file)
	if err != nil {
		return false
	}
	t.Cleanup(func() { _ = os.WriteFile(file, before, 0) })
	if err := os.WriteFile(file, []byte(fmt.Sprint(count)), 0); err != nil {
		return false
	}
	now, err := os.ReadFile(file)
	return err == nil && strings.TrimSpace(string(now)) == fmt.Sprint(count)
}

// P14: huge pages are a resource and a volume.
func testHugePages(t *testing.T, k *Kubelet) {
	if free, _ := os.ReadFile("/proc/sys/vm/nr_hugepages"); strings.TrimSpace(string(free)) == "0" {
		t.Skip("SKIPPED: this machine gives no huge pages")
	}
	p := k.Run("huge-pages")
	p.WaitReady()
	log := p.WaitLog("huge", "looked\n")
	for _, want := range []string{"hugetlbfs", "4194304", "HugePages_Free:        2\n"} {
		if !strings.Contains(log, want) {
			t.Errorf("the container does not say %q:\n%s", want, log)
		}
	}
	if got := strings.Contains(log, "got more"); got == hugetlb() {
		t.Errorf("the container got a page more than its limit: %v; the machine limits them: %v", got, hugetlb())
	}
	if !hugetlb() {
		return
	}
	if got, err := p.Process("huge").CgroupValue("hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"); err != nil || got != "4194304" {
		t.Errorf("the container's limit of huge pages is %s, %v; want 4194304", got, err)
	}
}

// hugetlb tells whether this machine has the controller for huge pages mounted.
func hugetlb() bool {
	if harness.CgroupV2() {
		controllers, _ := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		return strings.Contains(string(controllers), "hugetlb")
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	return strings.Contains(linesWith(string(mounts), "cgroup "), "hugetlb")
}

// gRPC probes go to the pod's IP, past podshim; that they arrive is its network.
func testGRPCProbe(t *testing.T, k *Kubelet) {
	p := k.Run("grpc-probe")
	p.WaitReady()
	k.wantMetric("/metrics/probes", `prober_probe_total{container="etcd",namespace="default",pod="grpc-probe-node",pod_uid="`+
		p.Status().Metadata.UID+`",probe_type="Readiness",result="successful"}`)
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
		PodRef  struct{ Name, UID string }
		CPU     *cpuStats
		Memory  *memoryStats
		Network *struct {
			Name             string
			RxBytes, TxBytes *uint64
		}
		Containers []struct {
			Name         string
			CPU          *cpuStats
			Memory       *memoryStats
			Rootfs, Logs *fsStats
		}
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
		s, err := k.summary()
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

// summary is kubelet's /stats/summary.
func (k *Kubelet) summary() (s summary, err error) {
	body, err := k.Get("/stats/summary")
	if err == nil {
		err = json.Unmarshal([]byte(body), &s)
	}
	return s, err
}

// checkPodNetwork: what the summary tells of a pod's traffic is what its network namespace has
// counted, of before kubelet's and podshim's last look.
func checkPodNetwork(t *testing.T, p *Pod) {
	t.Helper()
	infra, _ := p.Infra()
	before := counters(infra, "eth0")
	if before == nil {
		t.Fatal("the pod has no eth0")
	}
	var got string
	if !p.k.ask(func() bool {
		s, err := p.k.summary()
		now := counters(infra, "eth0")
		got = fmt.Sprint(err)
		for _, pod := range s.Pods {
			if n := pod.Network; pod.PodRef.Name == p.FullName() && n != nil && n.RxBytes != nil && n.TxBytes != nil {
				got = fmt.Sprintf("%s received %d, sent %d", n.Name, *n.RxBytes, *n.TxBytes)
				return n.Name == "eth0" && before.rxBytes <= *n.RxBytes && *n.RxBytes <= now.rxBytes &&
					before.txBytes <= *n.TxBytes && *n.TxBytes <= now.txBytes
			}
		}
		return false
	}) {
		t.Errorf("the summary says %s; the pod's device had counted %+v, and has %+v", got, *before, *counters(infra, "eth0"))
	}
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
