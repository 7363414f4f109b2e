package stats

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/cni"
)

// helperEnv makes the test binary a process to be measured: see helper.
const helperEnv = "PODSHIM_TEST_STATS_HELPER"

func TestMain(m *testing.M) {
	if os.Getenv(helperEnv) != "" {
		helper()
	}
	os.Exit(m.Run())
}

// helper obeys lines of stdin: "alloc" takes 64 MiB, "burn" uses 300 ms of CPU
// time; each is answered with "done". It ends with stdin.
func helper() {
	var held []byte
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		switch in.Text() {
		case "alloc":
			held = make([]byte, 64<<20)
			for i := 0; i < len(held); i += 4096 {
				held[i] = 1
			}
		case "burn":
			for start := cpuTime(); cpuTime()-start < 300*time.Millisecond; {
			}
		}
		fmt.Println("done")
	}
	_ = held
	os.Exit(0)
}

func cpuTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_PROCESS_CPUTIME_ID, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

// process is a helper inside a cgroup.
type process struct {
	t   testing.TB
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Scanner
}

func (p *process) do(what string) {
	p.t.Helper()
	fmt.Fprintln(p.in, what)
	if !p.out.Scan() {
		p.t.Fatalf("helper ended: %v", p.out.Err())
	}
}

func (p *process) end() {
	p.in.Close()
	_ = p.cmd.Wait()
}

// newCgroup makes a cgroup of the test's own in each of the mounts, with a
// helper in it, and gives its path.
func newCgroup(t testing.TB, mounts ...string) (string, *process) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes a cgroup")
	}
	path := fmt.Sprintf("/podshim-stats-test-%d-%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-"))
	for _, m := range mounts {
		dir := filepath.Join(m, path)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		})
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &process{t: t, cmd: exec.Command(exe)}
	p.cmd.Env = []string{helperEnv + "=1", "GOMAXPROCS=1"}
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewScanner(out)
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.end) // before the cgroups are removed
	for _, m := range mounts {
		procs := filepath.Join(m, path, "cgroup.procs")
		if err := os.WriteFile(procs, []byte(strconv.Itoa(p.cmd.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	return path, p
}

func machineV1(t testing.TB) (*Collector, v1) {
	t.Helper()
	c, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	h, ok := c.hierarchy.(v1)
	if !ok {
		t.Skip("needs a machine with cgroup v1")
	}
	return c, h
}

func raw(t testing.TB, elem ...string) uint64 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(elem...))
	if err != nil {
		t.Fatal(err)
	}
	v, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func rawStat(t testing.TB, file, key string) uint64 {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == key {
			v, err := strconv.ParseUint(f[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("%s has no %s", file, key)
	return 0
}

// counted waits until memory.stat of v1 has what "alloc" took. The kernel adds up what each CPU
// has counted when somebody reads it, but not while another reader, of any cgroup above, has
// it half done (mm/memcontrol.c, mem_cgroup_css_rstat_flush: the count of what is due is zero
// from the first CPU on); that one's every two seconds at the latest.
func counted(t testing.TB, dir string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); rawStat(t, filepath.Join(dir, "memory.stat"), "total_rss") < 60<<20; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("memory.stat does not count what a process has used for ten seconds")
		}
	}
}

// between checks a number against the same number of the kernel's, read before
// and after.
func between(t *testing.T, what string, before uint64, got *runtime.UInt64Value, after uint64) {
	t.Helper()
	if got == nil {
		t.Errorf("%s is absent", what)
		return
	}
	if got.Value < min(before, after) || got.Value > max(before, after) {
		t.Errorf("%s is %d, the kernel's files said %d and then %d", what, got.Value, before, after)
	}
}

func TestV1AgreesWithTheKernel(t *testing.T) {
	c, h := machineV1(t)
	path, p := newCgroup(t, h.cpuacct, h.memory, h.pids)
	mem, cpu := filepath.Join(h.memory, path), filepath.Join(h.cpuacct, path)
	const limit = 256 << 20
	if err := os.WriteFile(filepath.Join(mem, "memory.limit_in_bytes"), []byte(strconv.Itoa(limit)), 0); err != nil {
		t.Fatal(err)
	}
	p.do("alloc")
	counted(t, mem)
	type numbers struct{ cpu, used, rss, inactive, faults, major uint64 }
	look := func() numbers {
		stat := filepath.Join(mem, "memory.stat")
		return numbers{
			cpu: raw(t, cpu, "cpuacct.usage"), used: raw(t, mem, "memory.usage_in_bytes"),
			rss: rawStat(t, stat, "total_rss"), inactive: rawStat(t, stat, "total_inactive_file"),
			faults: rawStat(t, stat, "total_pgfault"), major: rawStat(t, stat, "total_pgmajfault"),
		}
	}
	start := time.Now().UnixNano()
	before := look()
	s, err := c.Container(t.Context(), ContainerInput{ID: "a", CgroupPath: path})
	if err != nil {
		t.Fatal(err)
	}
	after := look()
	end := time.Now().UnixNano()

	between(t, "usageCoreNanoSeconds", before.cpu, s.Cpu.UsageCoreNanoSeconds, after.cpu)
	m := s.Memory
	between(t, "usageBytes", before.used, m.UsageBytes, after.used)
	between(t, "rssBytes", before.rss, m.RssBytes, after.rss)
	between(t, "workingSetBytes", before.used-before.inactive, m.WorkingSetBytes, after.used-after.inactive)
	between(t, "pageFaults", before.faults, m.PageFaults, after.faults)
	between(t, "majorPageFaults", before.major, m.MajorPageFaults, after.major)
	if m.RssBytes.Value < 60<<20 {
		t.Errorf("rss is %d with 64 MiB in use", m.RssBytes.Value)
	}
	if got := m.AvailableBytes.GetValue() + m.WorkingSetBytes.Value; got != limit {
		t.Errorf("available and working set make %d, the limit is %d", got, limit)
	}
	if s.Cpu.UsageNanoCores != nil {
		t.Errorf("a rate from one sample: %d", s.Cpu.UsageNanoCores.Value)
	}
	if s.WritableLayer != nil || s.Io != nil {
		t.Errorf("invented: %v, %v", s.WritableLayer, s.Io)
	}
	for what, at := range map[string]int64{"cpu": s.Cpu.Timestamp, "memory": m.Timestamp} {
		if at < start || at > end {
			t.Errorf("%s timestamp %d is not in [%d, %d] ns", what, at, start, end)
		}
	}
	if _, err := os.Stat(filepath.Join(mem, "memory.memsw.limit_in_bytes")); err == nil && s.Swap.GetSwapUsageBytes() == nil {
		t.Error("swap is counted here, its usage is absent")
	}

	pod, err := c.Pod(t.Context(), PodInput{ID: "pod", CgroupPath: path})
	if err != nil {
		t.Fatal(err)
	}
	pids := raw(t, h.pids, path, "pids.current")
	if pids == 0 || pod.Process.ProcessCount.GetValue() != pids {
		t.Errorf("process count %v, the kernel says %d", pod.Process.ProcessCount, pids)
	}
	if pod.Network != nil {
		t.Errorf("a pod on the host's network has its own: %v", pod.Network)
	}

	p.end()
	for _, mount := range []string{h.cpuacct, h.memory, h.pids} {
		if err := os.Remove(filepath.Join(mount, path)); err != nil {
			t.Fatal(err)
		}
	}
	c.Forget("a") // and what was read a moment ago
	c.Forget("pod")
	if s, err := c.Container(t.Context(), ContainerInput{ID: "a", CgroupPath: path}); !errdefs.IsNotFound(err) {
		t.Errorf("a removed cgroup: %v, %v; want NotFound", s, err)
	}
	if s, err := c.Pod(t.Context(), PodInput{ID: "pod", CgroupPath: path}); !errdefs.IsNotFound(err) {
		t.Errorf("a removed pod cgroup: %v, %v; want NotFound", s, err)
	}
}

func TestV1CountsChildren(t *testing.T) {
	c, h := machineV1(t)
	path, p := newCgroup(t, h.cpuacct, h.memory, h.pids)
	child := path + "/container"
	for _, mount := range []string{h.cpuacct, h.memory, h.pids} {
		dir := filepath.Join(mount, child)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.end(); os.Remove(dir) })
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(p.cmd.Process.Pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	p.do("alloc")
	counted(t, filepath.Join(h.memory, path))
	p.do("burn")
	pod, err := c.Pod(t.Context(), PodInput{ID: "pod", CgroupPath: path})
	if err != nil {
		t.Fatal(err)
	}
	if pod.Memory.RssBytes.Value < 60<<20 || pod.Memory.PageFaults.Value < 1000 {
		t.Errorf("the pod's memory leaves out its container's: %v", pod.Memory)
	}
	if pod.Cpu.UsageCoreNanoSeconds.Value < 300e6 {
		t.Errorf("the pod's CPU leaves out its container's: %v", pod.Cpu)
	}
	if pod.Process.ProcessCount.Value == 0 {
		t.Error("the pod has no processes")
	}
	if pod.Memory.AvailableBytes != nil {
		t.Errorf("available without a limit: %v", pod.Memory.AvailableBytes)
	}
}

// busyIsVisible burns 300 ms of CPU time and wants them in total and rate.
func busyIsVisible(t *testing.T, c *Collector, path string, p *process) {
	t.Helper()
	in := ContainerInput{ID: "busy", CgroupPath: path}
	first, err := c.Container(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	p.do("burn")
	second, err := c.Container(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	grown := second.Cpu.UsageCoreNanoSeconds.Value - first.Cpu.UsageCoreNanoSeconds.Value
	if grown < 290e6 || grown > 600e6 {
		t.Errorf("CPU time grew by %d ns, 300 ms were burnt", grown)
	}
	want := float64(grown) / (float64(second.Cpu.Timestamp-first.Cpu.Timestamp) / 1e9)
	if got := float64(second.Cpu.UsageNanoCores.GetValue()); math.Abs(got-want) > want/100 {
		t.Errorf("usageNanoCores is %.0f, the growth over the time is %.0f", got, want)
	}
	c.Forget("busy")
	third, err := c.Container(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	if third.Cpu.UsageNanoCores != nil {
		t.Error("a rate after Forget")
	}
}

func TestV1BusyProcess(t *testing.T) {
	c, h := machineV1(t)
	path, p := newCgroup(t, h.cpuacct, h.memory, h.pids)
	busyIsVisible(t, c, path, p)
}

// TestV2BusyProcess measures a real cgroup2, with the hybrid layout's if the
// machine is on v1: that one has CPU time and pressure, and no controllers.
func TestV2BusyProcess(t *testing.T) {
	var root string
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
			root = dir
		}
	}
	if root == "" {
		t.Skip("needs a cgroup2 mount")
	}
	path, p := newCgroup(t, root)
	c := &Collector{hierarchy: v2{root: root}}
	busyIsVisible(t, c, path, p)
	s, err := c.Container(t.Context(), ContainerInput{ID: "x", CgroupPath: path})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(filepath.Join(root, path, "cpu.pressure")); err == nil && s.Cpu.Psi.GetSome() == nil {
		t.Error("the kernel measures pressure here, it is absent")
	}
	p.end()
	if err := os.Remove(filepath.Join(root, path)); err != nil {
		t.Fatal(err)
	}
	c.Forget("x")
	if _, err := c.Container(t.Context(), ContainerInput{ID: "x", CgroupPath: path}); !errdefs.IsNotFound(err) {
		t.Errorf("a removed cgroup: %v, want NotFound", err)
	}
}

func TestV2Files(t *testing.T) {
	c := &Collector{hierarchy: v2{root: "testdata/v2"}}
	s, err := c.Container(t.Context(), ContainerInput{ID: "a", CgroupPath: "kubepods-burstable-pod1.slice:podshim:full"})
	if err != nil {
		t.Fatal(err)
	}
	for what, got := range map[string]struct {
		v    *runtime.UInt64Value
		want uint64
	}{
		"usageCoreNanoSeconds": {s.Cpu.UsageCoreNanoSeconds, 7412583 * 1000},
		"usageBytes":           {s.Memory.UsageBytes, 52428800},
		"workingSetBytes":      {s.Memory.WorkingSetBytes, 52428800 - 8392704},
		"availableBytes":       {s.Memory.AvailableBytes, 134217728 - (52428800 - 8392704)},
		"rssBytes":             {s.Memory.RssBytes, 39845888},
		"pageFaults":           {s.Memory.PageFaults, 48211},
		"majorPageFaults":      {s.Memory.MajorPageFaults, 17},
		"swapUsageBytes":       {s.Swap.SwapUsageBytes, 4096000},
		"swapAvailableBytes":   {s.Swap.SwapAvailableBytes, 67108864 - 4096000},
	} {
		if got.v == nil || got.v.Value != got.want {
			t.Errorf("%s is %v, want %d", what, got.v, got.want)
		}
	}
	want := &runtime.PsiData{Total: 1893402000, Avg10: 1.53, Avg60: 0.87, Avg300: 0.21}
	if got := s.Cpu.Psi.Some; got.String() != want.String() {
		t.Errorf("CPU pressure %v, want %v", got, want)
	}
	if s.Memory.Psi.Full.Total != 4711000 || s.Io.Psi.Some.Total != 90210000 {
		t.Errorf("memory and I/O pressure: %v, %v", s.Memory.Psi, s.Io.Psi)
	}
	pod, err := c.Pod(t.Context(), PodInput{ID: "p", CgroupPath: "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/podshim-full.scope"})
	if err != nil || pod.Process.ProcessCount.GetValue() != 12 {
		t.Errorf("pod %v, %v; want 12 processes", pod, err)
	}

	// No limits, no swap accounting, no PSI.
	s, err = c.Container(t.Context(), ContainerInput{ID: "b", CgroupPath: "/bare"})
	if err != nil {
		t.Fatal(err)
	}
	if s.Memory.AvailableBytes != nil || s.Memory.Psi != nil || s.Cpu.Psi != nil || s.Swap != nil || s.Io != nil {
		t.Errorf("invented: %v", s)
	}
	if s.Memory.WorkingSetBytes.Value != 0 {
		t.Errorf("working set %d with more inactive than used, want 0", s.Memory.WorkingSetBytes.Value)
	}
	if s, err := c.Container(t.Context(), ContainerInput{ID: "c", CgroupPath: "/absent"}); !errdefs.IsNotFound(err) {
		t.Errorf("absent: %v, %v; want NotFound", s, err)
	}
	for _, bad := range []string{"/garbage", "/empty"} {
		if s, err := c.Container(t.Context(), ContainerInput{ID: "d", CgroupPath: bad}); err == nil || errdefs.IsNotFound(err) {
			t.Errorf("%s: %v, %v; want an error of its own", bad, s, err)
		}
	}
}

func TestCgroupNames(t *testing.T) {
	c := &Collector{}
	for in, want := range map[string]string{
		"/kubepods/pod1/abc":             "/kubepods/pod1/abc",
		"/../../etc":                     "/etc",
		"a-b-c.slice:podshim:x1":         "/a.slice/a-b.slice/a-b-c.slice/podshim-x1.scope",
		":podshim:x1":                    "/system.slice/podshim-x1.scope",
		"-.slice:podshim:x1":             "/podshim-x1.scope",
		"a.slice::x.slice":               "/a.slice/x.slice",
		"kubepods-besteffort-podu.slice": "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podu.slice",
	} {
		if got, err := c.Cgroup(in); err != nil || got != want {
			t.Errorf("%s: %s, %v; want %s", in, got, err, want)
		}
	}
	for _, in := range []string{"", "relative/path", "a--b.slice", "-a.slice", ".slice", "a/b.slice:p:x", "a.slice:p:../x", "a:b:c:d"} {
		if got, err := c.Cgroup(in); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %s, %v; want InvalidArgument", in, got, err)
		}
	}
}

func TestRates(t *testing.T) {
	var r rates
	start := time.Unix(1000, 0)
	for _, step := range []struct {
		at    time.Duration
		total uint64
		want  string // "" is none
	}{
		{0, 5e9, ""},
		{50 * time.Millisecond, 5.05e9, ""},            // too early for the first
		{200 * time.Millisecond, 5.1e9, "500000000"},   // half a core
		{300 * time.Millisecond, 5.2e9, "500000000"},   // within the window: the last again
		{1200 * time.Millisecond, 7.1e9, "2000000000"}, // two cores since the last
		{11200 * time.Millisecond, 7.1e9, "0"},         // idle is a real zero
		{12200 * time.Millisecond, 1e9, ""},            // the counter began anew
		{12200 * time.Millisecond, 1e9, ""},            // no time has passed
		{13200 * time.Millisecond, 1.25e9, "250000000"},
	} {
		got := ""
		if v := r.observe("a", start.Add(step.at), step.total); v != nil {
			got = strconv.FormatUint(v.Value, 10)
		}
		if got != step.want {
			t.Errorf("at %s: rate %q, want %q", step.at, got, step.want)
		}
	}
}

func TestNetworkOfAPod(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	dir := filepath.Join(t.TempDir(), "netns")
	path := filepath.Join(dir, "pod")
	t.Cleanup(func() {
		if err := cni.Remove(path); err != nil {
			t.Error(err)
		}
		_ = unix.Unmount(dir, unix.MNT_DETACH)
	})
	if err := cni.NewNetns(path); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"link", "add", "eth0", "type", "veth", "peer", "name", "net1"},
		{"link", "set", "eth0", "up"}, {"link", "set", "net1", "up"}, {"addr", "add", "10.213.99.1/24", "dev", "eth0"},
	} {
		err := cni.Do(path, func() error {
			out, err := exec.Command("ip", args...).CombinedOutput()
			if err != nil {
				return fmt.Errorf("ip %v: %w: %s", args, err, out)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	before, err := Network(path, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := cni.Do(path, func() error {
		// A broadcast goes out at once, with no neighbour to be asked for.
		lc := net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) (err error) {
			return errors.Join(conn.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
			}), err)
		}}
		c, err := lc.ListenPacket(t.Context(), "udp4", "10.213.99.1:0")
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.WriteTo(make([]byte, 1000), &net.UDPAddr{IP: net.IPv4(255, 255, 255, 255), Port: 9})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	after, err := Network(path, "")
	if err != nil {
		t.Fatal(err)
	}
	d := after.DefaultInterface
	if d == nil || d.Name != "eth0" || d.RxErrors == nil || d.TxErrors == nil {
		t.Fatalf("default interface %v", d)
	}
	if got := d.TxBytes.Value - before.DefaultInterface.TxBytes.Value; got < 1042 {
		t.Errorf("eth0 sent %d bytes more, want at least 1042", got)
	}
	if len(after.Interfaces) != 1 || after.Interfaces[0].Name != "net1" {
		t.Errorf("other interfaces %v, want net1 alone", after.Interfaces)
	}
	if after.Timestamp < before.Timestamp {
		t.Error("timestamps go backwards")
	}
	// kubelet crashes on usage without a default interface.
	if other, err := Network(path, "absent0"); err != nil || other.DefaultInterface == nil || len(other.Interfaces) != 1 {
		t.Errorf("default interface of another name: %v, %v; want one of the two", other, err)
	}
	alone := filepath.Join(dir, "alone")
	t.Cleanup(func() {
		if err := cni.Remove(alone); err != nil {
			t.Error(err)
		}
	})
	if err := cni.NewNetns(alone); err != nil {
		t.Fatal(err)
	}
	if none, err := Network(alone, ""); err != nil || none != nil {
		t.Errorf("a namespace with lo alone: %v, %v; want nothing", none, err)
	}
	if _, err := Network(path+"x", ""); !errdefs.IsNotFound(err) {
		t.Errorf("no namespace: %v, want NotFound", err)
	}
}

func TestSlowLayerHoldsNobodyUp(t *testing.T) {
	release := make(chan struct{})
	var walks atomic.Int32
	l := newLayers(func(ctx context.Context, id string) (Disk, error) {
		walks.Add(1)
		switch id {
		case "slow":
			select {
			case <-release:
			case <-ctx.Done():
				return Disk{}, ctx.Err()
			}
			return Disk{Bytes: 7, Inodes: 1}, nil
		case "broken":
			return Disk{}, errors.New("gone")
		}
		return Disk{Bytes: 4096, Inodes: 3}, nil
	}, "/var/lib/podshim")
	defer l.close()
	got := l.get(t.Context(), "quick", LayerDeadline())
	if got.GetUsedBytes().GetValue() != 4096 || got.InodesUsed.Value != 3 || got.FsId.Mountpoint != "/var/lib/podshim" || got.Timestamp == 0 {
		t.Errorf("layer %v", got)
	}
	if got := l.get(t.Context(), "broken", LayerDeadline()); got != nil {
		t.Errorf("a layer that cannot be measured: %v", got)
	}
	start := time.Now()
	for range 2 {
		if got := l.get(t.Context(), "slow", LayerDeadline()); got != nil {
			t.Errorf("a layer that is still being measured: %v", got)
		}
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("two requests took %s", took)
	}
	running := l.refresh("slow")
	close(release)
	<-running
	if got := l.get(t.Context(), "slow", LayerDeadline()); got.GetUsedBytes().GetValue() != 7 {
		t.Errorf("after the measurement: %v", got)
	}
	l.get(t.Context(), "quick", LayerDeadline())
	if n := walks.Load(); n != 3 {
		t.Errorf("%d walks for three layers, want 3: each is fresh for %s", n, layerAge)
	}
}

func TestCloseEndsWalks(t *testing.T) {
	started := make(chan struct{}, 1)
	c := &Collector{layers: newLayers(func(ctx context.Context, _ string) (Disk, error) {
		started <- struct{}{}
		<-ctx.Done()
		return Disk{}, ctx.Err()
	}, "/")}
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-started; cancel() }()
	c.layers.get(ctx, "a", LayerDeadline())
	c.Close()
	if got := c.layers.get(t.Context(), "b", LayerDeadline()); got != nil {
		t.Errorf("measured after Close: %v", got)
	}
}

// Two callers at a moment share one reading, and a later one gets another.
func TestReadingsAreShared(t *testing.T) {
	var r readings
	reads, rate := 0, (*runtime.UInt64Value)(nil)
	read := func() (usage, error) {
		reads++
		return usage{cpu: &runtime.CpuUsage{Timestamp: int64(reads), UsageNanoCores: rate}}, nil
	}
	ask := func(path string) int64 {
		u, err := r.of("a", path, read)
		if err != nil {
			t.Fatal(err)
		}
		return u.cpu.Timestamp
	}
	if ask("/a") != 1 || ask("/a") != 2 {
		t.Error("a reading without a CPU rate was shared")
	}
	rate = value(1)
	if ask("/a") != 3 || ask("/a") != 3 {
		t.Error("the second caller had the files read again")
	}
	if ask("/b") != 4 {
		t.Error("another cgroup got the first one's reading")
	}
	r.byID["a"].at = time.Now().Add(-fresh)
	if ask("/b") != 5 {
		t.Error("an old reading was given again")
	}
	if _, err := r.of("b", "/c", func() (usage, error) { return usage{}, errNoCgroups }); !errors.Is(err, errNoCgroups) {
		t.Errorf("error %v", err)
	}
	if u, err := r.of("b", "/c", read); err != nil || u.cpu.Timestamp != 6 {
		t.Errorf("after an error: %v, %v; want a new reading", u, err)
	}
}

func BenchmarkContainerV1(b *testing.B) {
	c, h := machineV1(b)
	path, _ := newCgroup(b, h.cpuacct, h.memory, h.pids)
	b.ReportAllocs()
	for b.Loop() {
		c.readings.forget("a") // or all but the first would be shared
		if _, err := c.Container(b.Context(), ContainerInput{ID: "a", CgroupPath: path}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkContainerV2Files(b *testing.B) {
	c := &Collector{hierarchy: v2{root: "testdata/v2"}}
	b.ReportAllocs()
	for b.Loop() {
		c.readings.forget("a")
		if _, err := c.Container(b.Context(), ContainerInput{ID: "a", CgroupPath: "kubepods-burstable-pod1.slice:podshim:full"}); err != nil {
			b.Fatal(err)
		}
	}
}
