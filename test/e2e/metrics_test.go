package e2e

import (
	"maps"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// notServed are cAdvisor's families that the runtime cannot give in its stead.
var notServed = map[string]string{
	"container_health_state": "always -1 in Kubernetes, and the CRI's values are not negative",
}

// sometimesServed are cAdvisor's families of which it has series on cgroup v2 only: pressure,
// and the costs of disks that have an io.cost model.
var sometimesServed = regexp.MustCompile(`^container_(pressure|fs_io_cost)_`)

// series is one line of /metrics/cadvisor.
type series struct {
	labels map[string]string
	value  float64
	at     time.Time // when it was read; zero where the line does not say
}

// key tells the series of one cgroup apart: the labels that only some families
// have. Those of a container (name, image, container) kubelet's cAdvisor knows
// for runtimes that it has a client of, and podshim is none.
func (s series) key() string {
	var further []string
	for k, v := range s.labels {
		if !slices.Contains(commonLabels, k) {
			further = append(further, k+"="+v)
		}
	}
	slices.Sort(further)
	return strings.Join(further, ",")
}

var commonLabels = []string{"container", "id", "image", "name", "namespace", "pod"}

// scrape reads /metrics/cadvisor: the series of each container_ family.
func (k *Kubelet) scrape(t *testing.T) map[string][]series {
	t.Helper()
	body, err := k.Get("/metrics/cadvisor")
	if err != nil {
		t.Fatal(err)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(strings.NewReader(body))
	if err != nil {
		t.Fatalf("parse /metrics/cadvisor: %v", err)
	}
	out := make(map[string][]series)
	for name, f := range families {
		if !strings.HasPrefix(name, "container_") {
			continue // machine_ and cadvisor_version_info are kubelet's own
		}
		for _, m := range f.Metric {
			s := series{labels: make(map[string]string), value: metricValue(m)}
			if m.TimestampMs != nil {
				s.at = time.UnixMilli(m.GetTimestampMs())
			}
			for _, l := range m.Label {
				s.labels[l.GetName()] = l.GetValue()
			}
			out[name] = append(out[name], s)
		}
	}
	return out
}

func metricValue(m *dto.Metric) float64 {
	switch {
	case m.Counter != nil:
		return m.Counter.GetValue()
	case m.Gauge != nil:
		return m.Gauge.GetValue()
	}
	return m.GetUntyped().GetValue()
}

// of picks the series of a cgroup, by family and key.
func of(all map[string][]series, id string) map[string]series {
	out := make(map[string]series)
	for name, list := range all {
		for _, s := range list {
			if s.labels["id"] == id {
				out[name+"{"+s.key()+"}"] = s
			}
		}
	}
	return out
}

// With PodAndContainerStatsFromCRI kubelet serves at /metrics/cadvisor what podshim
// gives: every family, label and cgroup that it serves from its own cAdvisor
// without, and the same values.
func TestMetricsAreCAdvisors(t *testing.T) {
	k := Start(t, Options{Config: "featureGates: {PodAndContainerStatsFromCRI: false}\n"})
	k.Node.CountDisk(k.Node.Root)
	// Past the page cache: on cgroup v1 the kernel counts no write of a file's pages.
	const burn = "dd if=/dev/zero of=/f bs=1M count=8 oflag=direct; dd if=/f of=/dev/null bs=1M iflag=direct; i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo done; exec sleep 1000000"
	p := k.Run("resources", "sleep 3; exec tail /dev/zero", burn)
	status := p.WaitReady()
	if !k.ask(func() bool { return strings.Contains(p.Logs("greedy"), "done") }) {
		t.Fatal("the busy container is not done")
	}
	done := time.Now()
	id, infra, bounded := status.Container("greedy").ID(), p.Sandbox(), p.Process("bounded")
	cgroup := harness.CgroupPath(k.podCgroup(status))
	var theirs map[string][]series
	if !k.ask(func() bool { // cAdvisor looks at a container every ten seconds
		theirs = k.scrape(t)
		return of(theirs, cgroup+"/"+id)["container_cpu_usage_seconds_total{cpu=total}"].at.After(done)
	}) {
		t.Fatalf("cAdvisor has not seen %s", cgroup)
	}
	// kubelet asks for the stats of no pod at all, to see whether the call is there.
	k.expect = append(k.expect, regexp.MustCompile(`pod_sandbox_id: is empty`))
	k.switchGate(t)
	ours := k.scrape(t)
	described, err := k.Node.Runtime.ListMetricDescriptors(k.Node.Context(), &cri.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	compareFamilies(t, theirs, described.Descriptors)
	for what, path := range map[string]string{"pod": cgroup, "infra": cgroup + "/" + infra, "container": cgroup + "/" + id} {
		compareSeries(t, what, of(theirs, path), of(ours, path))
	}
	compareValues(t, of(theirs, cgroup+"/"+id), of(ours, cgroup+"/"+id))
	mine := of(ours, cgroup+"/"+id)["container_memory_rss{}"].labels
	if mine["container"] != "greedy" || mine["name"] != id || !strings.Contains(mine["image"], "busybox") || mine["pod"] != "resources-"+nodeName || mine["namespace"] != "default" {
		t.Errorf("the container's labels are %v", mine)
	}
	checkNetwork(t, of(ours, cgroup+"/"+infra), bounded)
}

// switchGate starts kubelet again with the runtime's metrics.
func (k *Kubelet) switchGate(t *testing.T) {
	t.Helper()
	k.Stop()
	text, err := os.ReadFile(k.config)
	if err != nil {
		t.Fatal(err)
	}
	const off, on = "PodAndContainerStatsFromCRI: false", "PodAndContainerStatsFromCRI: true"
	if err := os.WriteFile(k.config, []byte(strings.Replace(string(text), off, on, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	k.Launch()
}

// compareFamilies: each family of cAdvisor's is described with the same labels,
// and none besides but those of sometimesServed.
func compareFamilies(t *testing.T, theirs map[string][]series, described []*cri.MetricDescriptor) {
	t.Helper()
	keys := make(map[string][]string)
	for _, d := range described {
		keys[d.Name] = slices.Sorted(slices.Values(d.LabelKeys))
	}
	for name, list := range theirs {
		if notServed[name] != "" {
			continue
		}
		have, ok := keys[name]
		if want := slices.Sorted(maps.Keys(list[0].labels)); !ok || !slices.Equal(have, want) {
			t.Errorf("%s: described with the labels %v (%v), cAdvisor's has %v", name, have, ok, want)
		}
	}
	for name := range keys {
		if _, ok := theirs[name]; !ok && !sometimesServed.MatchString(name) {
			t.Errorf("%s is described, and cAdvisor does not serve it", name)
		}
	}
	t.Logf("cAdvisor serves %d families, podshim describes %d", len(theirs), len(keys))
}

// compareSeries: what cAdvisor serves of a cgroup, podshim serves too.
func compareSeries(t *testing.T, what string, theirs, ours map[string]series) {
	t.Helper()
	if len(theirs) == 0 || len(ours) == 0 {
		t.Fatalf("%s: cAdvisor serves %d series, podshim %d", what, len(theirs), len(ours))
	}
	for key, want := range theirs {
		name, _, _ := strings.Cut(key, "{")
		got, ok := ours[key]
		switch {
		case notServed[name] != "":
		case !ok:
			t.Errorf("%s: cAdvisor serves %s, podshim does not", what, key)
		case !slices.Equal(slices.Sorted(maps.Keys(got.labels)), slices.Sorted(maps.Keys(want.labels))):
			t.Errorf("%s: %s has the labels %v, cAdvisor's %v", what, key, got.labels, want.labels)
		case got.labels["pod"] != want.labels["pod"] && want.labels["pod"] != "":
			t.Errorf("%s: %s is of pod %q, cAdvisor says %q", what, key, got.labels["pod"], want.labels["pod"])
		}
	}
	t.Logf("%s: %d series of cAdvisor's, %d of podshim's", what, len(theirs), len(ours))
}

// compareValues compares what does not change while a container sleeps, and what
// changes little. cAdvisor's may be ten seconds old.
func compareValues(t *testing.T, theirs, ours map[string]series) {
	t.Helper()
	for key, within := range map[string]float64{
		"container_cpu_usage_seconds_total{cpu=total}":                             1, // the CRI has whole seconds
		"container_cpu_user_seconds_total{}":                                       1,
		"container_cpu_system_seconds_total{}":                                     1,
		"container_cpu_cfs_throttled_seconds_total{}":                              1,
		"container_cpu_cfs_throttled_periods_total{}":                              0,
		"container_spec_cpu_quota{}":                                               0,
		"container_spec_cpu_period{}":                                              0,
		"container_spec_cpu_shares{}":                                              0,
		"container_spec_memory_limit_bytes{}":                                      0,
		"container_spec_memory_swap_limit_bytes{}":                                 0,
		"container_spec_memory_reservation_limit_bytes{}":                          0,
		"container_memory_rss{}":                                                   1 << 20,
		"container_memory_usage_bytes{}":                                           2 << 20,
		"container_memory_working_set_bytes{}":                                     2 << 20,
		"container_memory_cache{}":                                                 2 << 20,
		"container_memory_max_usage_bytes{}":                                       2 << 20,
		"container_memory_failures_total{failure_type=pgmajfault,scope=container}": 100,
		"container_processes{}":                                                    0,
		"container_threads{}":                                                      0,
		"container_threads_max{}":                                                  0,
		"container_file_descriptors{}":                                             0,
		"container_sockets{}":                                                      0,
		"container_oom_events_total{}":                                             0,
		"container_start_time_seconds{}":                                           5,
	} {
		want, ok := theirs[key]
		if !ok {
			t.Errorf("cAdvisor has no %s", key)
			continue
		}
		if got := ours[key].value; math.Abs(got-want.value) > within {
			t.Errorf("%s is %g, cAdvisor says %g", key, got, want.value)
		}
	}
	disks := 0
	for key, want := range theirs {
		if !counted.MatchString(key) {
			continue
		}
		disks++
		if got, ok := ours[key]; !ok || got.value < want.value || got.value > want.value+4<<20 {
			t.Errorf("%s is %g (%v), cAdvisor says %g", key, got.value, ok, want.value)
		}
	}
	if usage := ours["container_fs_usage_bytes{"+device(ours, "container_fs_usage_bytes")+"}"]; usage.value < 8<<20 {
		t.Errorf("the writable layer takes %g bytes, 8 MiB were written", usage.value)
	}
	if disks < 4 {
		t.Errorf("of disks cAdvisor serves %d series", disks)
	}
	t.Logf("%d series of disks compared", disks)
}

// counted are the series of what a cgroup did on a disk.
var counted = regexp.MustCompile(`^container_(fs_(reads|writes)(_bytes)?_total|blkio_device_usage_total)\{`)

// device is the key of a family's one series.
func device(all map[string]series, name string) string {
	for key := range all {
		if rest, ok := strings.CutPrefix(key, name+"{"); ok {
			return strings.TrimSuffix(rest, "}")
		}
	}
	return ""
}

// checkNetwork: the counters are those of the pod's namespace, which cAdvisor
// reads for runtimes that it knows.
func checkNetwork(t *testing.T, ours map[string]series, process harness.Process) {
	t.Helper()
	kernel := counters(process, "eth0")
	if kernel == nil {
		t.Fatal("the pod has no eth0")
	}
	for name, want := range map[string]uint64{
		"container_network_receive_bytes_total": kernel.rxBytes, "container_network_receive_packets_total": kernel.rxPackets,
		"container_network_transmit_bytes_total": kernel.txBytes, "container_network_transmit_packets_total": kernel.txPackets,
	} {
		got, ok := ours[name+"{interface=eth0}"]
		if !ok || got.value > float64(want) || got.value < float64(want)-8192 || got.value == 0 {
			t.Errorf("%s is %g (%v), /proc/net/dev says %d", name, got.value, ok, want)
		}
	}
}

// traffic is what a network device has counted.
type traffic struct{ rxBytes, rxPackets, txBytes, txPackets uint64 }

// counters are those of a device in a process's network namespace; nil if it has none.
func counters(process harness.Process, device string) *traffic {
	for line := range strings.Lines(process.Read("net/dev")) {
		fields := strings.Fields(strings.Replace(line, ":", " ", 1))
		if len(fields) < 11 || fields[0] != device {
			continue
		}
		var c traffic
		for i, n := range map[int]*uint64{1: &c.rxBytes, 2: &c.rxPackets, 9: &c.txBytes, 10: &c.txPackets} {
			*n, _ = strconv.ParseUint(fields[i], 10, 64)
		}
		return &c
	}
	return nil
}
