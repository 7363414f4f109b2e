package stats

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// values are a cgroup's metrics by name and the labels beside the common ones.
func values(t *testing.T, metrics []*runtime.Metric) map[string]uint64 {
	t.Helper()
	described := make(map[string]*runtime.MetricDescriptor)
	for _, f := range Families() {
		if described[f.Name] != nil {
			t.Fatalf("%s is described twice", f.Name)
		}
		described[f.Name] = f
	}
	out := make(map[string]uint64)
	for _, m := range metrics {
		d := described[m.Name]
		if d == nil {
			t.Fatalf("%s is not described: kubelet would drop it", m.Name)
		}
		if len(d.LabelKeys) != len(m.LabelValues) {
			t.Fatalf("%s has the labels %v, described are %v", m.Name, m.LabelValues, d.LabelKeys)
		}
		key := m.Name
		if further := m.LabelValues[len(baseLabels):]; len(further) > 0 {
			key += fmt.Sprint(further)
		}
		if _, twice := out[key]; twice {
			t.Fatalf("%s is given twice: kubelet's registry would refuse all", key)
		}
		if counter := strings.HasSuffix(m.Name, "_total") || m.Name == "container_memory_failcnt"; counter != (m.MetricType == runtime.MetricType_COUNTER) {
			t.Errorf("%s is a %s", m.Name, m.MetricType)
		}
		out[key] = m.Value.Value
	}
	return out
}

func wantValues(t *testing.T, got map[string]uint64, want map[string]uint64) {
	t.Helper()
	for key, w := range want {
		if v, ok := got[key]; !ok || v != w {
			t.Errorf("%s is %d (%v), want %d", key, v, ok, w)
		}
	}
}

func TestMetricsOfV2Files(t *testing.T) {
	c := &Collector{hierarchy: v2{root: "testdata/v2"}}
	labels := Labels{Container: "web", Image: "nginx:1", Name: "full", Namespace: "default", Pod: "shop"}
	out, err := c.Metrics(t.Context(), MetricsInput{
		ID: "full", CgroupPath: "kubepods-burstable-pod1.slice:podshim:full", Labels: labels,
		Created: time.Unix(1000, 0), Started: time.Unix(1003, 0),
	})
	if err != nil {
		t.Fatal(err)
	}
	path := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/podshim-full.scope"
	if got, want := fmt.Sprint(out[0].LabelValues), fmt.Sprint([]string{"web", path, "nginx:1", "full", "default", "shop"}); got != want {
		t.Errorf("labels %v, want %v", got, want)
	}
	disk := deviceName(device{254, 0})
	wantValues(t, values(t, out), map[string]uint64{
		"container_cpu_usage_seconds_total[total]":                     7,
		"container_cpu_user_seconds_total":                             5,
		"container_cpu_system_seconds_total":                           2,
		"container_cpu_cfs_periods_total":                              1931,
		"container_cpu_cfs_throttled_periods_total":                    12,
		"container_cpu_cfs_throttled_seconds_total":                    0,
		"container_spec_cpu_quota":                                     50000,
		"container_spec_cpu_period":                                    100000,
		"container_spec_cpu_shares":                                    2 + 19*262142/9999,
		"container_memory_usage_bytes":                                 52428800,
		"container_memory_working_set_bytes":                           52428800 - 8392704,
		"container_memory_max_usage_bytes":                             61341696,
		"container_memory_cache":                                       11051008,
		"container_memory_rss":                                         39845888,
		"container_memory_kernel_usage":                                1458176,
		"container_memory_mapped_file":                                 5406720,
		"container_memory_swap":                                        4096000,
		"container_memory_failcnt":                                     21,
		"container_memory_events_high_total":                           3,
		"container_memory_events_max_total":                            21,
		"container_memory_file_dirty_bytes":                            4096,
		"container_memory_workingset_refault_file_total":               211,
		"container_memory_total_inactive_file_bytes":                   8392704,
		"container_memory_failures_total[pgfault hierarchy]":           48211,
		"container_memory_failures_total[pgmajfault container]":        17,
		"container_oom_events_total":                                   1,
		"container_spec_memory_limit_bytes":                            134217728,
		"container_spec_memory_swap_limit_bytes":                       67108864,
		"container_spec_memory_reservation_limit_bytes":                33554432,
		"container_fs_reads_bytes_total[" + disk + "]":                 1048576,
		"container_fs_writes_total[" + disk + "]":                      5,
		"container_fs_io_cost_usage_seconds_total[" + disk + "]":       2,
		"container_blkio_device_usage_total[" + disk + " 254 0 Write]": 20480,
		"container_threads":                                            12,
		"container_threads_max":                                        100,
		"container_pressure_cpu_waiting_seconds_total":                 1,
		"container_pressure_io_stalled_seconds_total":                  0,
		"container_creation_time_seconds":                              1000,
		"container_start_time_seconds":                                 1003,
	})

	// No limits, no controllers but memory, no PSI: none of it is invented.
	out, err = c.Metrics(t.Context(), MetricsInput{ID: "bare", CgroupPath: "/bare"})
	if err != nil {
		t.Fatal(err)
	}
	for key := range values(t, out) {
		for _, absent := range []string{"container_cpu_cfs_", "container_spec_cpu_quota", "container_fs_", "container_blkio_", "container_pressure_", "container_network_"} {
			if strings.HasPrefix(key, absent) {
				t.Errorf("invented: %s", key)
			}
		}
	}
	if _, err := c.Metrics(t.Context(), MetricsInput{ID: "c", CgroupPath: "/absent"}); !errdefs.IsNotFound(err) {
		t.Errorf("absent: %v, want NotFound", err)
	}
}

func TestMetricsOfV1Files(t *testing.T) {
	root := "testdata/v1/"
	c := &Collector{hierarchy: v1{cpu: root + "cpu", cpuacct: root + "cpuacct", memory: root + "memory", blkio: root + "blkio", pids: root + "pids"}}
	out, err := c.Metrics(t.Context(), MetricsInput{ID: "abc", CgroupPath: "/pod1/abc"})
	if err != nil {
		t.Fatal(err)
	}
	disk := deviceName(device{8, 0})
	got := values(t, out)
	wantValues(t, got, map[string]uint64{
		"container_cpu_usage_seconds_total[total]":           3,
		"container_cpu_user_seconds_total":                   2,
		"container_cpu_system_seconds_total":                 1,
		"container_spec_cpu_shares":                          512,
		"container_memory_usage_bytes":                       20971520,
		"container_memory_working_set_bytes":                 20971520 - 2097152,
		"container_memory_max_usage_bytes":                   25165824,
		"container_memory_rss":                               12582912,
		"container_memory_kernel_usage":                      1310720,
		"container_memory_failcnt":                           4,
		"container_memory_events_max_total":                  4,
		"container_memory_file_dirty_bytes":                  8192,
		"container_memory_pgscan_total":                      0,
		"container_memory_failures_total[pgfault container]": 999,
		"container_oom_events_total":                         2,
		"container_spec_memory_limit_bytes":                  67108864,
		"container_spec_memory_swap_limit_bytes":             0,
		"container_threads":                                  7,
		"container_threads_max":                              0,
		// BFQ's numbers, not the throttler's.
		"container_fs_reads_bytes_total[" + disk + "]":              4096,
		"container_fs_sector_reads_total[" + disk + "]":             9,
		"container_fs_read_seconds_total[" + disk + "]":             2,
		"container_fs_io_time_seconds_total[" + disk + "]":          2,
		"container_blkio_device_usage_total[" + disk + " 8 0 Sync]": 4608,
	})
	if _, has := got["container_spec_cpu_quota"]; has {
		t.Error("a quota of -1 is shown as one")
	}
}

// The metrics of a process are those of the kernel's files.
func TestV1MetricsAgreeWithTheKernel(t *testing.T) {
	_, h := machineV1(t)
	c := &Collector{hierarchy: h}
	path, p := newCgroup(t, h.cpu, h.cpuacct, h.memory, h.pids, h.blkio)
	p.do("alloc")
	counted(t, filepath.Join(h.memory, path))
	for range 5 {
		p.do("burn")
	}
	in := MetricsInput{ID: "a", CgroupPath: path, PID: p.cmd.Process.Pid}
	before := raw(t, h.cpuacct, path, "cpuacct.usage")
	out, err := c.Metrics(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	after := raw(t, h.cpuacct, path, "cpuacct.usage")
	got := values(t, out)
	if v := got["container_cpu_usage_seconds_total[total]"]; v == 0 || v < before/1e9 || v > after/1e9 {
		t.Errorf("CPU time %d s, the kernel's files said %d ns and then %d", v, before, after)
	}
	if v := got["container_memory_rss"]; v < 60<<20 {
		t.Errorf("rss is %d with 64 MiB in use", v)
	}
	wantValues(t, got, map[string]uint64{
		"container_processes":       1,
		"container_threads":         raw(t, h.pids, path, "pids.current"),
		"container_spec_cpu_shares": raw(t, h.cpu, path, "cpu.shares"),
	})
	var limit unix.Rlimit
	if err := unix.Prlimit(in.PID, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		t.Fatal(err)
	}
	wantValues(t, got, map[string]uint64{"container_ulimits_soft[max_open_files]": limit.Cur})
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", in.PID))
	if err != nil {
		t.Fatal(err)
	}
	wantValues(t, got, map[string]uint64{"container_file_descriptors": uint64(len(entries)), "container_sockets": 0})
	if v := got["container_creation_time_seconds"]; time.Since(time.Unix(int64(v), 0)) > 10*time.Minute {
		t.Errorf("the cgroup was made %s", time.Unix(int64(v), 0))
	}
}

func TestOpenFiles(t *testing.T) {
	before, sockets, err := openFiles([]int{os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	after, more, err := openFiles([]int{os.Getpid(), 1 << 30})
	if err != nil || after < before+1 || more != sockets+1 {
		t.Errorf("%d descriptors and %d sockets, then a socket more: %d and %d, %v", before, sockets, after, more, err)
	}
}

// On the hybrid layout the pressure of a container is in cgroup2's tree.
func TestV1Pressure(t *testing.T) {
	_, h := machineV1(t)
	if h.unified == "" {
		t.Skip("needs the hybrid layout")
	}
	path, _ := newCgroup(t, h.cpu, h.cpuacct, h.memory, h.pids, h.unified)
	if _, err := os.ReadFile(filepath.Join(h.unified, path, "cpu.pressure")); err != nil {
		t.Skipf("the kernel measures no pressure: %v", err)
	}
	c := &Collector{hierarchy: h}
	s, err := c.Container(t.Context(), ContainerInput{ID: "a", CgroupPath: path})
	if err != nil {
		t.Fatal(err)
	}
	if s.Cpu.Psi.GetSome() == nil || s.Memory.Psi.GetFull() == nil || s.Io.GetPsi().GetSome() == nil || s.Io.Timestamp == 0 {
		t.Errorf("pressure of CPU %v, memory %v, I/O %v", s.Cpu.Psi, s.Memory.Psi, s.Io)
	}
	out, err := c.Metrics(t.Context(), MetricsInput{ID: "a", CgroupPath: path})
	if err != nil {
		t.Fatal(err)
	}
	if _, has := values(t, out)["container_pressure_cpu_waiting_seconds_total"]; !has {
		t.Error("no metric of pressure")
	}
}

func BenchmarkMetricsV1(b *testing.B) {
	_, h := machineV1(b)
	c := &Collector{hierarchy: h}
	path, p := newCgroup(b, h.cpu, h.cpuacct, h.memory, h.pids, h.blkio)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Metrics(b.Context(), MetricsInput{ID: "a", CgroupPath: path, PID: p.cmd.Process.Pid}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMetricsV2Files(b *testing.B) {
	c := &Collector{hierarchy: v2{root: "testdata/v2"}}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.Metrics(b.Context(), MetricsInput{ID: "a", CgroupPath: "kubepods-burstable-pod1.slice:podshim:full"}); err != nil {
			b.Fatal(err)
		}
	}
}
