package pod

import (
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// P13: each container's state, code and reason are its own; removing the pod
// removes all.
func TestStatesAreApart(t *testing.T) {
	n, p := start(t)
	crashed, done, running, created := p.Shell("exit 41"), p.Shell("exit 0"), p.Run(sleeper), p.Create(sleeper)
	missing := p.Create([]string{"/no/such/program"})
	_, err := n.Runtime.StartContainer(n.Context(), &cri.StartContainerRequest{ContainerId: missing.ID})
	if err == nil {
		t.Error("starting a program that does not exist succeeds")
	}
	want := []struct {
		c      *harness.Container
		state  cri.ContainerState
		code   int32
		reason string
	}{
		{crashed, cri.ContainerState_CONTAINER_EXITED, 41, "Error"},
		{done, cri.ContainerState_CONTAINER_EXITED, 0, "Completed"},
		{running, cri.ContainerState_CONTAINER_RUNNING, 0, ""},
		{created, cri.ContainerState_CONTAINER_CREATED, 0, ""},
		{missing, cri.ContainerState_CONTAINER_EXITED, 128, "StartError"},
	}
	for _, c := range []*harness.Container{crashed, done} {
		c.WaitExit()
	}
	for _, w := range want {
		s := w.c.Status()
		if s.State != w.state || s.ExitCode != w.code || s.Reason != w.reason {
			t.Errorf("%s: %v, code %d, reason %q; want %v, %d, %q",
				w.c.Config.Metadata.Name, s.State, s.ExitCode, s.Reason, w.state, w.code, w.reason)
		}
		times := []int64{s.CreatedAt, s.StartedAt, s.FinishedAt}
		exited := w.state == cri.ContainerState_CONTAINER_EXITED
		if times[0] == 0 || (times[2] != 0) != exited || exited && times[2] < times[0] {
			t.Errorf("%s: created, started, finished at %v", w.c.Config.Metadata.Name, times)
		}
	}
	if s := missing.Status(); !strings.Contains(s.Message, "/no/such/program") {
		t.Errorf("message does not say what is missing: %q", s.Message)
	}
	process, infra := running.Process(), p.Infra()
	if _, err := n.Runtime.RemovePodSandbox(n.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		t.Fatalf("remove a running pod: %v", err)
	}
	if process.Alive() || infra.Alive() {
		t.Error("processes outlive the removal")
	}
	list, err := n.Runtime.ListContainers(n.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.ID}})
	if err != nil || len(list.Containers) != 0 {
		t.Errorf("containers after the removal: %v, %v", list.GetContainers(), err)
	}
}

func value(t *testing.T, p harness.Process, v1, v2 string) string {
	t.Helper()
	got, err := p.CgroupValue(v1, v2)
	if err != nil {
		t.Fatalf("cgroup file %s: %v", v1, err)
	}
	return got
}

// weight is what OCI runtimes make of cpu.shares on v2: the curve through the ends of
// both ranges and their defaults, 1024 and 100 (KEP-2254).
func weight(shares int64) string {
	l := math.Log2(float64(shares))
	return strconv.Itoa(int(math.Ceil(math.Pow(10, (l*l+125*l)/612-7.0/34))))
}

// P14: limits are in the files of the container's cgroup, which is below the pod's.
func TestLimitsAreInTheCgroup(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	parent := n.PodCgroup(t.Name())
	below := harness.CgroupPath(parent) + "/"
	p := n.RunPod(func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	c := p.Run(sleeper, resources(&cri.LinuxContainerResources{
		CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 64 << 20, CpusetCpus: "0", OomScoreAdj: 500,
	}))
	c.WaitLog("ready")
	process := c.Process()
	for _, controller := range []string{"memory", "cpu", "pids"} {
		dir, err := process.CgroupDir(controller)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(dir, below) || !strings.Contains(dir, c.ID) {
			t.Errorf("%s cgroup is %s, want below %s", controller, dir, parent)
		}
		if dir, err = p.Infra().CgroupDir(controller); err != nil || !strings.Contains(dir, below) {
			t.Errorf("infra's %s cgroup is %s, %v", controller, dir, err)
		}
	}
	checkLimits(t, process, "50000", 512, 64<<20)
	if got := value(t, process, "cpuset.cpus", "cpuset.cpus"); got != "0" {
		t.Errorf("cpuset is %q", got)
	}
	if got := strings.TrimSpace(process.Read("oom_score_adj")); got != "500" {
		t.Errorf("oom_score_adj is %s", got)
	}

	// UpdateContainerResources changes them under the running process.
	if _, err := n.Runtime.UpdateContainerResources(n.Context(), &cri.UpdateContainerResourcesRequest{
		ContainerId: c.ID, Linux: &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 20000, CpuShares: 256, MemoryLimitInBytes: 96 << 20},
	}); err != nil {
		t.Fatalf("update resources: %v", err)
	}
	checkLimits(t, process, "20000", 256, 96<<20)
	if !process.Alive() {
		t.Error("container did not survive the update")
	}
	r := c.Status().GetResources().GetLinux()
	if r.GetCpuQuota() != 20000 || r.GetCpuShares() != 256 || r.GetMemoryLimitInBytes() != 96<<20 {
		t.Errorf("status says %v", r)
	}
}

func checkLimits(t *testing.T, p harness.Process, quota string, shares int64, memory int) {
	t.Helper()
	wantQuota, wantShares := quota, strconv.FormatInt(shares, 10)
	if harness.CgroupV2() {
		wantQuota, wantShares = quota+" 100000", weight(shares)
	}
	if got := value(t, p, "cpu.cfs_quota_us", "cpu.max"); got != wantQuota {
		t.Errorf("quota is %q, want %q", got, wantQuota)
	}
	if got := value(t, p, "cpu.shares", "cpu.weight"); got != wantShares {
		t.Errorf("shares are %q, want %q", got, wantShares)
	}
	if got := value(t, p, "memory.limit_in_bytes", "memory.max"); got != strconv.Itoa(memory) {
		t.Errorf("memory limit is %q, want %d", got, memory)
	}
}

// P14: exceeding the memory limit ends in OOMKilled, 137.
func TestOutOfMemory(t *testing.T) {
	_, p := start(t)
	limit := resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 32 << 20})
	const eat = "dd if=/dev/zero of=/dev/null bs=200M count=1"
	cases := map[string]struct {
		command []string
		code    int32
		reason  string
	}{
		"PID 1":                        {strings.Fields(eat), 137, "OOMKilled"},
		"child, PID 1 goes on":         {[]string{"sh", "-c", eat + "; exit 0"}, 0, "Completed"},
		"child, PID 1 passes the code": {[]string{"sh", "-c", eat + "; exit $?"}, 137, "OOMKilled"},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			c := p.With(t).Run(tc.command, limit)
			s := c.WaitExit()
			if s.ExitCode != tc.code || s.Reason != tc.reason {
				t.Errorf("code %d, reason %q; want %d, %q", s.ExitCode, s.Reason, tc.code, tc.reason)
			}
		})
	}
}

// The stats are those of the cgroup.
func TestStats(t *testing.T) {
	n, p := start(t)
	c := p.Shell("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; dd if=/dev/zero of=/written bs=1M count=8; echo ready; sleep 100000")
	c.WaitLog("ready")
	awaitLayer(t, n, c, 8<<20)
	process := c.Process()
	resp, err := n.Runtime.ContainerStats(n.Context(), &cri.ContainerStatsRequest{ContainerId: c.ID})
	if err != nil {
		t.Fatal(err)
	}
	s := resp.Stats
	if s.GetAttributes().GetId() != c.ID || s.Attributes.GetMetadata().GetName() != c.Config.Metadata.Name {
		t.Errorf("attributes %v", s.Attributes)
	}
	if !harness.CgroupV2() {
		kernel, _ := strconv.ParseUint(value(t, process, "cpuacct.usage", ""), 10, 64)
		if got := s.GetCpu().GetUsageCoreNanoSeconds().GetValue(); got == 0 || got > kernel || kernel-got > 100e6 {
			t.Errorf("CPU usage %d ns, the cgroup says %d", got, kernel)
		}
	}
	usage, _ := strconv.ParseUint(value(t, process, "memory.usage_in_bytes", "memory.current"), 10, 64)
	set := s.GetMemory().GetWorkingSetBytes().GetValue()
	if set == 0 || set > usage+1<<20 {
		t.Errorf("working set %d, the cgroup's usage %d", set, usage)
	}
	if got := s.GetWritableLayer(); got.GetUsedBytes().GetValue() < 8<<20 || got.GetInodesUsed().GetValue() == 0 {
		t.Errorf("writable layer %v, 8 MiB were written", got)
	}
	podResp, err := n.Runtime.PodSandboxStats(n.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: p.ID})
	if err != nil {
		t.Fatal(err)
	}
	ps := podResp.Stats.GetLinux()
	if len(ps.GetContainers()) != 1 || ps.Containers[0].GetAttributes().GetId() != c.ID {
		t.Errorf("pod's containers %v", ps.GetContainers())
	}
	if ps.GetNetwork().GetDefaultInterface().GetName() != "eth0" {
		t.Errorf("pod's network %v", ps.GetNetwork())
	}
	if got := ps.GetProcess().GetProcessCount().GetValue(); got < 2 {
		t.Errorf("pod has %d processes, want infra and two of the container's", got)
	}
	list, err := n.Runtime.ListContainerStats(n.Context(), &cri.ListContainerStatsRequest{Filter: &cri.ContainerStatsFilter{PodSandboxId: p.ID}})
	if err != nil || len(list.Stats) != 1 {
		t.Errorf("ListContainerStats of the pod: %v, %v", list.GetStats(), err)
	}
	pods, err := n.Runtime.ListPodSandboxStats(n.Context(), &cri.ListPodSandboxStatsRequest{Filter: &cri.PodSandboxStatsFilter{Id: p.ID}})
	if err != nil || len(pods.Stats) != 1 {
		t.Errorf("ListPodSandboxStats of the pod: %v, %v", pods.GetStats(), err)
	}
}

// A pod whose client names no cgroup parent gets one of podshim's own, which goes
// with it.
func TestOwnCgroupParent(t *testing.T) {
	n, p := start(t, func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = "" })
	c := p.Run(sleeper)
	dir, err := c.Process().CgroupDir("memory")
	if err != nil || !strings.Contains(dir, harness.CgroupPath(n.OwnCgroup)+"/") {
		t.Fatalf("memory cgroup is %s, %v; want below %s", dir, err, n.OwnCgroup)
	}
	if err := p.StopAndRemove(); err != nil {
		t.Fatal(err)
	}
	for ; filepath.Base(dir) != filepath.Base(harness.CgroupPath(n.OwnCgroup)); dir = filepath.Dir(dir) {
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("left: %s", dir)
		}
	}
}
