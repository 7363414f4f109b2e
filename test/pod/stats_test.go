package pod

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// kernelNumber reads a cgroup file that holds one number.
func kernelNumber(t *testing.T, dir, file string) uint64 {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	v, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// cpuNanos is the CPU time of a cgroup by its files.
func cpuNanos(t *testing.T, p harness.Process) uint64 {
	t.Helper()
	dir, err := p.CgroupDir("cpuacct")
	if err != nil {
		t.Fatal(err)
	}
	if !harness.CgroupV2() {
		return kernelNumber(t, dir, "cpuacct.usage")
	}
	data, err := os.ReadFile(filepath.Join(dir, "cpu.stat"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "usage_usec "); ok {
			v, err := strconv.ParseUint(value, 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return v * 1000
		}
	}
	t.Fatalf("no usage_usec in %s/cpu.stat", dir)
	return 0
}

// within checks a number that grows against what the kernel said before and after.
func within(t *testing.T, what string, before uint64, got *cri.UInt64Value, after uint64) {
	t.Helper()
	if got == nil || got.Value < before || got.Value > after {
		t.Errorf("%s is %v, the kernel said %d before and %d after", what, got, before, after)
	}
}

// Stats of a pod and its containers are those of the kernel: cgroups and network
// namespace.
func TestStatsAreTheKernels(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	parent := n.PodCgroup(t.Name())
	p := n.RunPod(func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	c := p.Shell("i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo ready; sleep 100000",
		resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20}))
	c.WaitLog("ready")
	process := c.Process()
	c.Output("sh", "-c", "arping -c 3 -w 3 -I eth0 "+gateway(n)+" || true; ping -c 1 -w 1 "+gateway(n)+" || true")

	before := cpuNanos(t, process)
	resp, err := n.Runtime.PodSandboxStats(n.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: p.ID})
	if err != nil {
		t.Fatal(err)
	}
	after := cpuNanos(t, process)
	linux := resp.Stats.GetLinux()
	if len(linux.GetContainers()) != 1 {
		t.Fatalf("containers %v", linux.GetContainers())
	}
	s := linux.Containers[0]
	within(t, "CPU time", before, s.GetCpu().GetUsageCoreNanoSeconds(), after)
	if got := linux.GetCpu().GetUsageCoreNanoSeconds().GetValue(); got < before {
		t.Errorf("the pod's CPU time %d is less than its container's %d", got, before)
	}
	dir, err := process.CgroupDir("memory")
	if err != nil {
		t.Fatal(err)
	}
	memory := s.GetMemory()
	if got := memory.GetAvailableBytes().GetValue() + memory.GetWorkingSetBytes().GetValue(); got != 64<<20 {
		t.Errorf("available and working set are %d together, the limit is %d", got, 64<<20)
	}
	used := "memory.usage_in_bytes"
	if harness.CgroupV2() {
		used = "memory.current"
	}
	if got, kernel := memory.GetUsageBytes().GetValue(), kernelNumber(t, dir, used); got == 0 || got > kernel+4<<20 || kernel > got+4<<20 {
		t.Errorf("memory usage %d, the kernel says %d", got, kernel)
	}
	if memory.GetRssBytes().GetValue() == 0 || memory.GetPageFaults().GetValue() == 0 {
		t.Errorf("memory %v", memory)
	}
	if got, want := linux.GetProcess().GetProcessCount().GetValue(), uint64(len(c.Processes())+1); got != want {
		t.Errorf("%d processes in the pod, /proc has %d", got, want)
	}
	checkPressure(t, process, s)
	checkInterface(t, process, linux.GetNetwork())
}

// awaitLayer waits until podshim has measured what a container has written: it keeps a
// size for ten seconds, and any other test that lists stats may have asked before.
func awaitLayer(t *testing.T, n *harness.Node, c *harness.Container, bytes uint64) {
	t.Helper()
	for end := time.Now().Add(harness.Limit); ; time.Sleep(100 * time.Millisecond) {
		resp, err := n.Runtime.ContainerStats(n.Context(), &cri.ContainerStatsRequest{ContainerId: c.ID})
		if err != nil {
			t.Fatal(err)
		}
		got := resp.Stats.GetWritableLayer().GetUsedBytes().GetValue()
		if got >= bytes {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the writable layer has %d bytes, %d were written", got, bytes)
		}
	}
}

func gateway(n *harness.Node) string {
	return strings.Replace(n.Subnet, ".0/24", ".1", 1)
}

// checkPressure: where the kernel measures it for the container's cgroup, it is told.
func checkPressure(t *testing.T, p harness.Process, s *cri.ContainerStats) {
	t.Helper()
	measured := false
	for line := range strings.Lines(p.Cgroup) {
		path, unified := strings.CutPrefix(strings.TrimSpace(line), "0::")
		for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
			_, err := os.ReadFile(filepath.Join(root, path, "cpu.pressure"))
			measured = measured || unified && err == nil
		}
	}
	if got := s.GetCpu().GetPsi().GetSome() != nil; got != measured {
		t.Errorf("CPU pressure %v; the kernel measures it: %v", s.GetCpu().GetPsi(), measured)
	}
	if got := s.GetIo().GetPsi().GetFull() != nil; got != measured {
		t.Errorf("I/O pressure %v; the kernel measures it: %v", s.GetIo(), measured)
	}
}

// checkInterface: the default interface's counters are those in the pod's namespace.
func checkInterface(t *testing.T, p harness.Process, usage *cri.NetworkUsage) {
	t.Helper()
	i := usage.GetDefaultInterface()
	if i.GetName() != "eth0" || usage.GetTimestamp() == 0 {
		t.Fatalf("network %v", usage)
	}
	for line := range strings.Lines(p.Read("net/dev")) {
		fields := strings.Fields(strings.Replace(line, ":", " ", 1))
		if len(fields) < 10 || fields[0] != "eth0" {
			continue
		}
		// The bridge goes on sending router solicitations and the like.
		for what, pair := range map[string][2]any{
			"received": {fields[1], i.GetRxBytes().GetValue()}, "sent": {fields[9], i.GetTxBytes().GetValue()},
		} {
			kernel, err := strconv.ParseUint(pair[0].(string), 10, 64)
			if got := pair[1].(uint64); err != nil || got == 0 || got > kernel || kernel-got > 4096 {
				t.Errorf("%s: %d bytes, /proc/net/dev says %d (%v)", what, got, kernel, err)
			}
		}
		return
	}
	t.Error("no eth0 in /proc/net/dev")
}

// A filter leaves the others out: by ID, by prefix, by pod, by label.
func TestStatsFilters(t *testing.T) {
	n, p := start(t)
	label := func(v string) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) { c.Labels = map[string]string{"filter": v + p.ID} }
	}
	a, b := p.Run(sleeper, label("a")), p.Run(sleeper, label("b"))
	p.Create(sleeper, label("a")) // created only: nothing to measure
	ended := p.Shell("exit 0", label("a"))
	ended.WaitExit()
	other := n.RunPod().Run(sleeper, label("a"))
	for name, tc := range map[string]struct {
		filter *cri.ContainerStatsFilter
		want   []string
	}{
		"ID":               {&cri.ContainerStatsFilter{Id: a.ID}, []string{a.ID}},
		"prefix":           {&cri.ContainerStatsFilter{Id: a.ID[:20]}, []string{a.ID}},
		"pod":              {&cri.ContainerStatsFilter{PodSandboxId: p.ID}, []string{a.ID, b.ID}},
		"label":            {&cri.ContainerStatsFilter{LabelSelector: map[string]string{"filter": "a" + p.ID}}, []string{a.ID, other.ID}},
		"label and pod":    {&cri.ContainerStatsFilter{PodSandboxId: p.ID, LabelSelector: map[string]string{"filter": "a" + p.ID}}, []string{a.ID}},
		"one that ended":   {&cri.ContainerStatsFilter{Id: ended.ID}, nil},
		"ID of another":    {&cri.ContainerStatsFilter{Id: other.ID, PodSandboxId: p.ID}, nil},
		"label of nothing": {&cri.ContainerStatsFilter{LabelSelector: map[string]string{"filter": "none" + p.ID}}, nil},
	} {
		resp, err := n.Runtime.ListContainerStats(n.Context(), &cri.ListContainerStatsRequest{Filter: tc.filter})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, s := range resp.Stats {
			got = append(got, s.GetAttributes().GetId())
		}
		slices.Sort(got)
		slices.Sort(tc.want)
		if !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
	if s, err := n.Runtime.ContainerStats(n.Context(), &cri.ContainerStatsRequest{ContainerId: ended.ID}); err == nil {
		t.Errorf("stats of a container that ended: %v", s)
	}
}

// Metrics of a pod: as described, one of each, unary and streamed, with the
// values of the kernel and the labels of the pod's parts.
func TestMetrics(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	parent := n.PodCgroup(t.Name())
	p := n.RunPod(func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	c := p.Shell("dd if=/dev/zero of=/written bs=1M count=8; echo ready; sleep 100000",
		resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, CpuPeriod: 100000, CpuQuota: 50000}),
		func(c *cri.ContainerConfig) { c.Image.UserSpecifiedImage = "example.test/box:1" })
	c.WaitLog("ready")
	awaitLayer(t, n, c, 8<<20)
	described, err := n.Runtime.ListMetricDescriptors(n.Context(), &cri.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	keys := make(map[string][]string)
	for _, d := range described.Descriptors {
		keys[d.Name] = d.LabelKeys
	}
	unary, err := n.Runtime.ListPodSandboxMetrics(n.Context(), &cri.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	stream, err := n.Runtime.StreamPodSandboxMetrics(n.Context(), &cri.StreamPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var streamed []*cri.PodSandboxMetrics
	for {
		resp, err := stream.Recv()
		if err != nil {
			break
		}
		streamed = append(streamed, resp.PodSandboxMetrics...)
	}
	for how, pods := range map[string][]*cri.PodSandboxMetrics{"unary": unary.PodMetrics, "streamed": streamed} {
		i := slices.IndexFunc(pods, func(m *cri.PodSandboxMetrics) bool { return m.PodSandboxId == p.ID })
		if i < 0 {
			t.Fatalf("%s: pod is not among %d", how, len(pods))
		}
		checkMetrics(t, how, keys, pods[i], p, c, harness.CgroupPath(parent))
	}
}

// What a container does on a disk is what the kernel counts for its cgroup.
func TestDiskMetrics(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	parent := n.PodCgroup(t.Name())
	p := n.RunPod(func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	disk := n.CountDisk(n.Volumes)
	// Past the page cache, whose writes cgroup v1 counts for nobody.
	c := p.Shell("dd if=/dev/zero of=/volume/$HOSTNAME bs=64k count=64 oflag=direct && dd if=/volume/$HOSTNAME of=/dev/null bs=64k iflag=direct && echo ready; exec sleep 100000",
		mounts(&cri.Mount{HostPath: n.Volumes, ContainerPath: "/volume"}))
	c.WaitLog("ready")
	dir, err := c.Process().CgroupDir("blkio")
	if harness.CgroupV2() {
		dir, err = c.Process().CgroupDir("io")
	}
	if err != nil {
		t.Fatal(err)
	}
	kernel := diskCounts(t, dir, disk)
	if kernel["container_fs_writes_bytes_total"] < 4<<20 || kernel["container_fs_reads_bytes_total"] < 4<<20 {
		t.Fatalf("the kernel has counted %v", kernel)
	}
	resp, err := n.Runtime.ListPodSandboxMetrics(n.Context(), &cri.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]uint64{}
	for _, pod := range resp.PodMetrics {
		for _, of := range pod.ContainerMetrics {
			for _, m := range of.Metrics {
				if _, counted := kernel[m.Name]; counted && of.ContainerId == c.ID {
					got[m.Name] += m.Value.GetValue() // of all disks: there is one
				}
			}
		}
	}
	if !maps.Equal(got, kernel) {
		t.Errorf("metrics are %v, the kernel's counts %v", got, kernel)
	}
}

// diskCounts are a cgroup's bytes and operations on a disk, by the metrics' names.
func diskCounts(t *testing.T, dir, disk string) map[string]uint64 {
	t.Helper()
	counts := map[string]uint64{}
	add := func(metric, number string) {
		v, err := strconv.ParseUint(number, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		counts[metric] = v
	}
	names := map[string]string{ // io.stat's, and those of blkio's files
		"rbytes": "container_fs_reads_bytes_total", "wbytes": "container_fs_writes_bytes_total",
		"rios": "container_fs_reads_total", "wios": "container_fs_writes_total",
		"io_service_bytes Read": "container_fs_reads_bytes_total", "io_service_bytes Write": "container_fs_writes_bytes_total",
		"io_serviced Read": "container_fs_reads_total", "io_serviced Write": "container_fs_writes_total",
	}
	for _, file := range []string{"io.stat", "blkio.throttle.io_service_bytes_recursive", "blkio.throttle.io_serviced_recursive"} {
		data, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			fields := strings.Fields(line)
			if len(fields) < 2 || fields[0] != disk {
				continue
			}
			for _, field := range fields[1:] {
				if name, number, ok := strings.Cut(field, "="); ok && names[name] != "" {
					add(names[name], number)
				}
			}
			if of := strings.TrimSuffix(strings.TrimPrefix(file, "blkio.throttle."), "_recursive"); len(fields) == 3 && names[of+" "+fields[1]] != "" {
				add(names[of+" "+fields[1]], fields[2])
			}
		}
	}
	return counts
}

// Metrics too large for a message are refused with the call that has them whatever
// their size, a pod in a message.
func TestMetricsOfAnySize(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	const limit = 64 << 10
	n := harness.Start(t, harness.Options{CRI: fmt.Sprintf("max_message_size = %d\nexec_sync_output_limit = 1024", limit)})
	pods := map[string]bool{}
	for range 4 {
		p := n.RunPod()
		p.Run(sleeper).WaitLog("ready")
		pods[p.ID] = true
	}
	s, err := n.Runtime.StreamPodSandboxMetrics(n.Context(), &cri.StreamPodSandboxMetricsRequest{})
	all, messages, largest := drain(t, s, err, (*cri.StreamPodSandboxMetricsResponse).GetPodSandboxMetrics)
	t.Logf("%d pods of one container in %d messages of at most %d bytes", len(all), messages, largest)
	for _, m := range all {
		if !pods[m.PodSandboxId] || len(m.ContainerMetrics) != 1 {
			t.Errorf("pod %s, with %d containers, is in the stream again, or none of these", m.PodSandboxId, len(m.ContainerMetrics))
		}
		delete(pods, m.PodSandboxId)
	}
	if len(pods) > 0 || messages != 4 {
		t.Errorf("%d messages, pods left out: %v", messages, pods)
	}
	_, err = n.Runtime.ListPodSandboxMetrics(n.Context(), &cri.ListPodSandboxMetricsRequest{})
	if largest*4 < limit {
		t.Fatalf("4 pods of %d bytes fit into a message: the test needs more", largest)
	}
	checkCode(t, err, "ResourceExhausted", "StreamPodSandboxMetrics")
}

func checkMetrics(t *testing.T, how string, keys map[string][]string, pod *cri.PodSandboxMetrics, p *harness.Pod, c *harness.Container, parent string) {
	t.Helper()
	if len(pod.ContainerMetrics) != 1 || pod.ContainerMetrics[0].ContainerId != c.ID {
		t.Fatalf("%s: containers %v", how, pod.ContainerMetrics)
	}
	seen := make(map[string]uint64)
	for _, m := range append(pod.Metrics, pod.ContainerMetrics[0].Metrics...) {
		if len(keys[m.Name]) != len(m.LabelValues) {
			t.Fatalf("%s: %s has labels %v, described are %v", how, m.Name, m.LabelValues, keys[m.Name])
		}
		labels := make(map[string]string)
		for i, k := range keys[m.Name] {
			labels[k] = m.LabelValues[i]
		}
		if labels["pod"] != p.Config.Metadata.Name && m.Name != "container_scrape_error" {
			t.Errorf("%s: %s is of pod %q", how, m.Name, labels["pod"])
		}
		// What it is of: the pod's cgroup, the infra container, or the container.
		key := fmt.Sprintf("%s %s|%s|%s", m.Name, labels["name"], labels["container"], labels["image"])
		for _, further := range []string{"interface", "failure_type", "scope"} {
			if labels[further] != "" {
				key += "|" + labels[further]
			}
		}
		seen[key] = m.Value.GetValue()
	}
	of := c.ID + "|" + c.Config.Metadata.Name + "|example.test/box:1"
	for key, ok := range map[string]func(uint64) bool{
		"container_memory_usage_bytes ||":                              func(v uint64) bool { return v > 8<<20 },
		"container_network_transmit_bytes_total " + p.ID + "|||eth0":   func(v uint64) bool { return v > 0 },
		"container_processes " + p.ID + "||":                           func(v uint64) bool { return v == 1 },
		"container_processes " + of:                                    func(v uint64) bool { return v == uint64(len(c.Processes())) },
		"container_spec_memory_limit_bytes " + of:                      func(v uint64) bool { return v == 64<<20 },
		"container_spec_cpu_quota " + of:                               func(v uint64) bool { return v == 50000 },
		"container_fs_usage_bytes " + of:                               func(v uint64) bool { return v >= 8<<20 },
		"container_fs_limit_bytes " + of:                               func(v uint64) bool { return v > 8<<20 },
		"container_ulimits_soft " + of:                                 func(v uint64) bool { return v > 0 },
		"container_start_time_seconds " + of:                           func(v uint64) bool { return v == uint64(c.Status().StartedAt/1e9) },
		"container_memory_failures_total " + of + "|pgfault|hierarchy": func(v uint64) bool { return v > 0 },
	} {
		if v, has := seen[key]; !has || !ok(v) {
			t.Errorf("%s: %s is %d (%v)", how, key, v, has)
		}
	}
	if failed, told := seen["container_scrape_error ||"]; told && failed != 0 {
		t.Errorf("%s: a scrape error", how)
	}
}
