package pod

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

func update(n *harness.Node, c *harness.Container, r *cri.LinuxContainerResources) error {
	_, err := n.Runtime.UpdateContainerResources(n.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: c.ID, Linux: r})
	return err
}

// limitFiles are the cgroup files that UpdateContainerResources decides, v1's and
// v2's names by turns.
var limitFiles = [][2]string{
	{"cpu.shares", "cpu.weight"}, {"cpu.cfs_quota_us", "cpu.max"}, {"cpu.cfs_period_us", "cpu.max"},
	{"cpuset.cpus", "cpuset.cpus"}, {"cpuset.mems", "cpuset.mems"},
	{"memory.limit_in_bytes", "memory.max"}, {"memory.memsw.limit_in_bytes", "memory.swap.max"},
}

// limits is the content of all of them, and the score.
func limits(t *testing.T, p harness.Process) string {
	t.Helper()
	var b strings.Builder
	for _, f := range limitFiles {
		got, err := p.CgroupValue(f[0], f[1])
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		b.WriteString(f[0] + "=" + got + " ")
	}
	return b.String() + "oom_score_adj=" + strings.TrimSpace(p.Read("oom_score_adj"))
}

// Every field reaches the kernel, for all of the container's processes.
func TestUpdateAllFields(t *testing.T) {
	n, p := start(t)
	c := p.Shell("sleep 100001 & sleep 100002 & echo ready; wait", resources(&cri.LinuxContainerResources{OomScoreAdj: 300, MemoryLimitInBytes: 64 << 20}))
	c.WaitLog("ready")
	process := c.Process()
	if err := update(n, c, &cri.LinuxContainerResources{
		CpuShares: 300, CpuQuota: 30000, CpuPeriod: 60000, CpusetCpus: "0", CpusetMems: "0",
		MemoryLimitInBytes: 80 << 20, MemorySwapLimitInBytes: 100 << 20, OomScoreAdj: 700,
	}); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[[2]string][2]string{
		limitFiles[0]: {"300", weight(300)}, limitFiles[1]: {"30000", "30000 60000"}, limitFiles[2]: {"60000", "30000 60000"},
		limitFiles[3]: {"0", "0"}, limitFiles[4]: {"0", "0"},
		limitFiles[5]: {strconv.Itoa(80 << 20), strconv.Itoa(80 << 20)}, limitFiles[6]: {strconv.Itoa(100 << 20), strconv.Itoa(20 << 20)},
	} {
		w := want[0]
		if harness.CgroupV2() {
			w = want[1]
		}
		got, err := process.CgroupValue(file[0], file[1])
		if os.IsNotExist(err) && strings.Contains(file[0], "memsw") {
			continue // the kernel does not account swap
		}
		if err != nil || got != w {
			t.Errorf("%s is %q, %v; want %q", file[0], got, err, w)
		}
	}
	if all := c.Processes(); len(all) != 3 {
		t.Errorf("processes %v", all)
	}
	for _, one := range c.Processes() {
		if got := strings.TrimSpace(one.Read("oom_score_adj")); got != "700" {
			t.Errorf("%v has oom_score_adj %s", one, got)
		}
	}
	// What a request leaves at zero stays; the swap limit moves with the memory's.
	if err := update(n, c, &cri.LinuxContainerResources{MemoryLimitInBytes: 90 << 20}); err != nil {
		t.Fatal(err)
	}
	r := c.Status().GetResources().GetLinux()
	if r.GetCpuQuota() != 30000 || r.GetMemoryLimitInBytes() != 90<<20 || r.GetMemorySwapLimitInBytes() != 110<<20 || r.GetOomScoreAdj() != 700 {
		t.Errorf("status says %v", r)
	}
	if got := value(t, process, "memory.limit_in_bytes", "memory.max"); got != strconv.Itoa(90<<20) {
		t.Errorf("memory limit is %s", got)
	}
	n.Runtime.StopContainer(n.Context(), &cri.StopContainerRequest{ContainerId: c.ID})
	c.WaitExit()
	if err := update(n, c, &cri.LinuxContainerResources{CpuShares: 10}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("update of a container that ended: %v", err)
	}
}

// What cannot be is refused with the field's name, and changes nothing: not the
// kernel's files, not the status.
func TestUpdateRefusals(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	parent := n.PodCgroup(t.Name())
	p := n.RunPod(func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	// What dd writes first, it writes with its buffer full; nobody reads the rest.
	c := p.Shell("dd if=/dev/zero bs=24M count=1 2>/dev/null | { head -c 1 >/dev/null; echo ready; sleep 100000; }",
		resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 128 << 20}))
	c.WaitLog("ready")
	process := c.Process()
	setPodQuota(t, p, parent)
	type refusal struct {
		r     *cri.LinuxContainerResources
		code  codes.Code
		field string
	}
	cases := map[string]refusal{
		"CPU that is not there":  {&cri.LinuxContainerResources{CpuShares: 77, CpuQuota: 10000, CpusetCpus: "4000"}, codes.InvalidArgument, "cpuset_cpus"},
		"node that is not there": {&cri.LinuxContainerResources{CpuShares: 77, CpusetMems: "60"}, codes.InvalidArgument, "cpuset_mems"},
		"no list":                {&cri.LinuxContainerResources{CpusetCpus: "1-0"}, codes.InvalidArgument, "cpuset_cpus"},
		"quota too small":        {&cri.LinuxContainerResources{CpuQuota: 10}, codes.InvalidArgument, "cpu_quota"},
		"period too long":        {&cri.LinuxContainerResources{CpuPeriod: 2_000_000}, codes.InvalidArgument, "cpu_period"},
		"memory below use":       {&cri.LinuxContainerResources{CpuShares: 77, MemoryLimitInBytes: 8 << 20, OomScoreAdj: 900}, codes.FailedPrecondition, "memory_limit_in_bytes"},
		"swap below memory":      {&cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 63 << 20}, codes.InvalidArgument, "memory_swap_limit_in_bytes"},
		"page size of nobody":    {&cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "3MB", Limit: 1}}}, codes.FailedPrecondition, "hugepage_limits"},
		"score out of range":     {&cri.LinuxContainerResources{OomScoreAdj: -2000}, codes.InvalidArgument, "oom_score_adj"},
		"file of the runtime":    {&cri.LinuxContainerResources{Unified: map[string]string{"cgroup.procs": "1"}}, codes.InvalidArgument, "unified"},
		"no such file":           {&cri.LinuxContainerResources{CpuShares: 77, Unified: map[string]string{"memory.nonesuch": "1"}}, codes.FailedPrecondition, "unified"},
	}
	if !harness.CgroupV2() { // v2 lets a child have more and holds it to the parent's
		cases["more than the pod's"] = refusal{&cri.LinuxContainerResources{CpuShares: 77, CpuQuota: 90000, CpuPeriod: 100000}, codes.InvalidArgument, "cpu_quota"}
	}
	before, told := limits(t, process), c.Status().GetResources().String()
	for name, tc := range cases {
		err := update(n, c, tc.r)
		if status.Code(err) != tc.code || !strings.Contains(status.Convert(err).Message(), tc.field) {
			t.Errorf("%s: %v; want %v that names %s", name, err, tc.code, tc.field)
		}
		if now := limits(t, process); now != before {
			t.Errorf("%s: the kernel's files say\n%s, before\n%s", name, now, before)
		}
		if now := c.Status().GetResources().String(); now != told {
			t.Errorf("%s: the status says %s, before %s", name, now, told)
		}
	}
	if !process.Alive() {
		t.Error("the container did not survive")
	}
	for field, req := range map[string]*cri.UpdateContainerResourcesRequest{
		"annotations": {Linux: &cri.LinuxContainerResources{CpuShares: 77}, Annotations: map[string]string{"a": "b"}},
		"windows":     {Linux: &cri.LinuxContainerResources{CpuShares: 77}, Windows: &cri.WindowsContainerResources{CpuShares: 1}},
		"linux":       {},
	} {
		req.ContainerId = c.ID
		_, err := n.Runtime.UpdateContainerResources(n.Context(), req)
		if err == nil || !strings.HasPrefix(status.Convert(err).Message(), field+": ") {
			t.Errorf("%s: %v", field, err)
		}
	}
	// Nothing of it is in the way of what can be.
	if err := update(n, c, &cri.LinuxContainerResources{CpuQuota: 40000, CpuPeriod: 100000, MemoryLimitInBytes: 96 << 20}); err != nil {
		t.Errorf("a good update after the bad ones: %v", err)
	}
}

// setPodQuota holds the pod's own cgroup to half a CPU, as kubelet would.
func setPodQuota(t *testing.T, p *harness.Pod, parent string) {
	t.Helper()
	dir, err := p.Infra().CgroupDir("cpu")
	if err != nil || !strings.HasSuffix(filepath.Dir(dir), harness.CgroupPath(parent)) {
		t.Fatalf("infra's cgroup is %s, %v", dir, err)
	}
	file, quota := "cpu.cfs_quota_us", "50000"
	if harness.CgroupV2() {
		file, quota = "cpu.max", "50000 100000"
	}
	if err := os.WriteFile(filepath.Join(filepath.Dir(dir), file), []byte(quota), 0); err != nil {
		t.Fatal(err)
	}
}

// Below what is used but can be dropped (file cache) a limit is taken.
func TestUpdateShrinksCache(t *testing.T) {
	n, p := start(t)
	c := p.Shell("dd if=/dev/zero of=/file bs=1M count=48 && sync; cat /file >/dev/null; echo ready; sleep 100000 & wait",
		resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 128 << 20}))
	c.WaitLog("ready")
	if used := value(t, c.Process(), "memory.usage_in_bytes", "memory.current"); len(used) < len("40000000") {
		t.Fatalf("the cgroup uses %s", used)
	}
	if err := update(n, c, &cri.LinuxContainerResources{MemoryLimitInBytes: 24 << 20}); err != nil {
		t.Fatal(err)
	}
	if got := value(t, c.Process(), "memory.limit_in_bytes", "memory.max"); got != strconv.Itoa(24<<20) {
		t.Errorf("limit is %s", got)
	}
	if !c.Process().Alive() || c.Output("echo", "alive") != "alive" {
		t.Error("the container did not survive")
	}
}

// A container that is not started yet starts with what it was updated to.
func TestUpdateBeforeStart(t *testing.T) {
	n, p := start(t)
	c := p.Create(sleeper, resources(&cri.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 << 20}))
	if err := update(n, c, &cri.LinuxContainerResources{CpuShares: 256, CpuQuota: 20000, CpuPeriod: 100000, OomScoreAdj: 400, MemoryLimitInBytes: 96 << 20}); err != nil {
		t.Fatal(err)
	}
	if err := update(n, c, &cri.LinuxContainerResources{CpusetCpus: "x"}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("nonsense: %v", err)
	}
	c.Start()
	c.WaitLog("ready")
	checkLimits(t, c.Process(), "20000", 256, 96<<20)
	if got := strings.TrimSpace(c.Process().Read("oom_score_adj")); got != "400" {
		t.Errorf("oom_score_adj is %s", got)
	}
}

// podLimits reads a pod's cgroup: quota, shares and memory limit.
func podLimits(t *testing.T, p *harness.Pod) [3]string {
	t.Helper()
	var got [3]string
	for i, f := range [][2]string{{"cpu.cfs_quota_us", "cpu.max"}, {"cpu.shares", "cpu.weight"}, {"memory.limit_in_bytes", "memory.max"}} {
		controller, _, _ := strings.Cut(f[0], ".")
		dir, err := p.Infra().CgroupDir(controller)
		if err != nil {
			t.Fatal(err)
		}
		file := f[0]
		if harness.CgroupV2() {
			file = f[1]
		}
		data, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
		if err != nil {
			t.Fatal(err)
		}
		got[i] = strings.TrimSpace(string(data))
	}
	return got
}

func verboseConfig(t *testing.T, n *harness.Node, p *harness.Pod) string {
	t.Helper()
	resp, err := n.Runtime.PodSandboxStatus(n.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.ID, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		Config struct {
			Linux struct{ Resources, Overhead json.RawMessage }
		}
	}
	if err := json.Unmarshal([]byte(resp.Info["info"]), &info); err != nil {
		t.Fatal(err)
	}
	return string(info.Config.Linux.Resources) + " + " + string(info.Config.Linux.Overhead)
}

// A pod whose cgroup is podshim's own is held to its resources and overhead from
// its start, and to what they are updated to.
func TestPodResources(t *testing.T) {
	n, p := start(t, func(c *cri.PodSandboxConfig) {
		c.Linux.CgroupParent = ""
		c.Linux.Resources = &cri.LinuxContainerResources{CpuShares: 1000, CpuQuota: 100000, CpuPeriod: 100000, MemoryLimitInBytes: 256 << 20}
		c.Linux.Overhead = &cri.LinuxContainerResources{CpuShares: 24, CpuQuota: 10000, CpuPeriod: 100000, MemoryLimitInBytes: 32 << 20}
	})
	want := func(what, quota string, shares int64, memory int) {
		t.Helper()
		w := [3]string{quota, strconv.FormatInt(shares, 10), strconv.Itoa(memory)}
		got := podLimits(t, p)
		if harness.CgroupV2() {
			w[0] += " 100000"
			got[1], w[1] = "", "" // two formulas are in use for the weight
		}
		if got != w {
			t.Errorf("%s: the pod's cgroup has %v, want %v", what, got, w)
		}
	}
	want("at the start", "110000", 1024, 288<<20)
	c := p.Run(sleeper, resources(&cri.LinuxContainerResources{CpuQuota: 60000, CpuPeriod: 100000}))
	c.WaitLog("ready")
	ask := func(overhead, r *cri.LinuxContainerResources) error {
		_, err := n.Runtime.UpdatePodSandboxResources(n.Context(), &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: p.ID, Overhead: overhead, Resources: r})
		return err
	}
	if err := ask(nil, &cri.LinuxContainerResources{CpuShares: 2000, CpuQuota: 150000, CpuPeriod: 100000, MemoryLimitInBytes: 128 << 20}); err != nil {
		t.Fatal(err)
	}
	want("updated", "160000", 2024, 160<<20)
	if got := verboseConfig(t, n, p); !strings.Contains(got, "150000") || !strings.Contains(got, "10000") {
		t.Errorf("the status says %s", got)
	}
	for name, bad := range map[string]*cri.LinuxContainerResources{
		"memory below use":     {CpuShares: 3000, MemoryLimitInBytes: -7},
		"unlike a cpuset":      {CpuShares: 3000, CpusetCpus: "a"},
		"CPU that nobody has":  {CpuShares: 3000, CpusetCpus: "4000"},
		"period of a lifetime": {CpuPeriod: 9_000_000},
	} {
		if err := ask(nil, bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v; want InvalidArgument", name, err)
		}
		want("after "+name, "160000", 2024, 160<<20)
	}
	if err := ask(nil, nil); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no resources: %v", err)
	}
	// None at all is no limit.
	if err := ask(&cri.LinuxContainerResources{}, &cri.LinuxContainerResources{}); err != nil {
		t.Fatal(err)
	}
	if got := podLimits(t, p); !strings.HasPrefix(got[0], "-1") && !strings.HasPrefix(got[0], "max") {
		t.Errorf("without limits the pod's cgroup has %v", got)
	}
}

// The cgroup of a client is the client's: kubelet asks, and then writes it.
func TestPodResourcesOfAClient(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	parent := n.PodCgroup(t.Name())
	p := n.RunPod(func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = parent })
	before := podLimits(t, p)
	if _, err := n.Runtime.UpdatePodSandboxResources(n.Context(), &cri.UpdatePodSandboxResourcesRequest{
		PodSandboxId: p.ID, Resources: &cri.LinuxContainerResources{CpuShares: 123, MemoryLimitInBytes: 77 << 20},
	}); err != nil {
		t.Fatal(err)
	}
	if now := podLimits(t, p); now != before {
		t.Errorf("the client's cgroup had %v and has %v", before, now)
	}
	n.Restart()
	if got := verboseConfig(t, n, p); !strings.Contains(got, strconv.Itoa(77<<20)) {
		t.Errorf("after a restart the status says %s", got)
	}
}
