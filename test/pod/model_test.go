package pod

import (
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// P1: the infra container is there before any other, its process shows in ps, it
// is the smallest on the node and holds the namespaces.
func TestInfraIsFirstAndTiny(t *testing.T) {
	_, p := start(t)
	infra := p.Infra()
	if len(p.Config.Labels) == 0 || !infra.Alive() {
		t.Fatalf("no infra process before any container: %v", infra)
	}
	// The monitor's init becomes pause by an execve that nothing waits for.
	if !eventually(func() bool { return strings.Contains(infra.Read("cmdline"), "pause") }) {
		t.Errorf("ps shows infra as %q %q, want pause", infra.Name, infra.Read("cmdline"))
	}
	begun := cpuTicks(t, infra) // until then it was the monitor's init
	c := p.Run(sleeper)
	c.WaitLog("ready")
	first := c.Process()
	if infra.StartTime > first.StartTime {
		t.Errorf("infra started at %d, after the container (%d)", infra.StartTime, first.StartTime)
	}
	infraKB, containerKB := rss(t, infra), rss(t, first)
	if infraKB >= containerKB || infraKB > 200 {
		t.Errorf("infra takes %d kB of memory, the container's shell %d kB; want infra smallest and below 200", infraKB, containerKB)
	}
	if ticks := cpuTicks(t, infra) - begun; ticks > 1 {
		t.Errorf("infra has used %d clock ticks of CPU, want it asleep", ticks)
	}
	if got := infra.Status("State"); !strings.HasPrefix(got, "S") {
		t.Errorf("infra's state is %q, want sleeping", got)
	}
	if infra.Namespace("net") == self.Namespace("net") {
		t.Error("infra is in the host's network namespace")
	}
}

var self, _ = harness.ReadProcess(os.Getpid())

// rss is what the process has resident, kB. Its own anonymous and file pages.
func rss(t *testing.T, p harness.Process) int {
	t.Helper()
	kb, err := strconv.Atoi(strings.TrimSuffix(p.Status("VmRSS"), " kB"))
	if err != nil {
		t.Fatalf("VmRSS of %v: %v", p, err)
	}
	return kb
}

// cpuTicks is user and system time.
func cpuTicks(t *testing.T, p harness.Process) int {
	t.Helper()
	stat := p.Read("stat")
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	user, _ := strconv.Atoi(fields[11])
	system, _ := strconv.Atoi(fields[12])
	return user + system
}

// P2: every process of the pod has the pod's net, ipc, uts and user namespace,
// and a mnt, pid and cgroup of its own.
func TestNamespacesOfAPod(t *testing.T) {
	_, p := start(t)
	a, b := p.Run(sleeper), p.Run(sleeper)
	infra := p.Infra()
	processes := map[string]harness.Process{"a": a.Process(), "b": b.Process()}
	for _, kind := range []string{"net", "ipc", "uts", "user"} {
		for name, process := range processes {
			if got, want := process.Namespace(kind), infra.Namespace(kind); got != want {
				t.Errorf("%s namespace of %s is %s, infra's is %s", kind, name, got, want)
			}
		}
	}
	for _, kind := range []string{"net", "ipc", "uts", "mnt", "pid"} {
		if infra.Namespace(kind) == self.Namespace(kind) {
			t.Errorf("infra has the host's %s namespace", kind)
		}
	}
	for _, kind := range []string{"mnt", "pid"} {
		seen := map[string]string{self.Namespace(kind): "the host", infra.Namespace(kind): "infra"}
		for name, process := range processes {
			if other, taken := seen[process.Namespace(kind)]; taken {
				t.Errorf("%s has the %s namespace of %s", name, kind, other)
			}
			seen[process.Namespace(kind)] = name
		}
	}
}

// P2: the node's namespaces when the pod asks for them.
func TestHostNamespaces(t *testing.T) {
	cases := map[string]*cri.NamespaceOption{
		"net": {Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER},
		"pid": {Pid: cri.NamespaceMode_NODE},
		"ipc": {Ipc: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER},
	}
	for kind, option := range cases {
		t.Run(kind, func(t *testing.T) {
			_, p := start(t, podNamespaces(option), func(c *cri.PodSandboxConfig) {
				if kind == "net" {
					c.Hostname = ""
				}
			})
			c := p.Run(sleeper)
			for _, other := range []string{"net", "pid", "ipc"} {
				shared := c.Process().Namespace(other) == self.Namespace(other)
				if shared != (other == kind) {
					t.Errorf("host's %s namespace: %v, asked for %s only", other, shared, kind)
				}
			}
			if ip := p.Status().GetNetwork().GetIp(); (ip == "") != (kind == "net") {
				t.Errorf("pod's IP is %q", ip)
			}
		})
	}
}

// P3: containers meet on localhost, see the same devices and have one IP.
func TestLocalhostAndOneIP(t *testing.T) {
	n, p := start(t)
	server := p.Shell("mkdir -p /tmp/www; echo hello from a > /tmp/www/index.html; httpd -p 127.0.0.1:8080 -h /tmp/www; echo serving; sleep 100000")
	client := p.Run(sleeper)
	server.WaitLog("serving")
	if got := client.Output("wget", "-q", "-O", "-", "http://127.0.0.1:8080/"); got != "hello from a" {
		t.Errorf("over localhost came %q", got)
	}
	inA, inB := server.Output("ip", "addr"), client.Output("ip", "addr")
	if inA != inB {
		t.Errorf("ip addr differs:\n%s\n%s", inA, inB)
	}
	ip, err := netip.ParseAddr(p.Status().GetNetwork().GetIp())
	if err != nil {
		t.Fatalf("pod's IP: %v", err)
	}
	if !netip.MustParsePrefix(n.Subnet).Contains(ip) {
		t.Errorf("IP %v is not of the network %s", ip, n.Subnet)
	}
	if !strings.Contains(inA, ip.String()+"/24") || !strings.Contains(inA, "eth0") {
		t.Errorf("containers do not have the pod's %v on eth0:\n%s", ip, inA)
	}
	if !strings.Contains(inA, "127.0.0.1/8") {
		t.Errorf("no loopback:\n%s", inA)
	}
	if reserved, _ := filepath.Glob(n.IPAM + "/*/" + ip.String()); len(reserved) != 1 {
		t.Errorf("host-local has not reserved %v: %v", ip, reserved)
	}
}

// P4: killing A changes neither the pod's IP nor B, and A comes back into the
// same namespaces.
func TestPodOutlivesItsContainers(t *testing.T) {
	_, p := start(t)
	a, b := p.Run(sleeper), p.Run(sleeper)
	b.WaitLog("ready")
	ip, old, inB := p.Status().Network.Ip, a.Process(), b.Process()
	if err := old.Kill(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if s := a.WaitExit(); s.ExitCode != 137 {
		t.Errorf("killed container's exit code is %d, want 137", s.ExitCode)
	}
	if !inB.Alive() {
		t.Error("B died with A")
	}
	again := p.Run(sleeper, func(c *cri.ContainerConfig) {
		c.Metadata.Name, c.Metadata.Attempt = a.Config.Metadata.Name, 1
	})
	again.WaitLog("ready")
	for _, kind := range []string{"net", "ipc", "uts"} {
		if got := again.Process().Namespace(kind); got != inB.Namespace(kind) {
			t.Errorf("restarted A has %s, B has %s", got, inB.Namespace(kind))
		}
	}
	s := p.Status()
	if s.State != cri.PodSandboxState_SANDBOX_READY || s.Network.Ip != ip {
		t.Errorf("pod is %v with IP %s, was ready with %s", s.State, s.Network.Ip, ip)
	}
	if got := again.Output("ip", "-4", "addr", "show", "eth0"); !strings.Contains(got, ip) {
		t.Errorf("restarted A sees %s, the pod's IP is %s", got, ip)
	}
}

// P4: the pod ends with its infra container.
func TestPodEndsWithInfra(t *testing.T) {
	_, p := start(t)
	c := p.Run(sleeper)
	c.WaitLog("ready")
	if err := p.Infra().Kill(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	p.WaitNotReady()
	if !c.Process().Alive() && c.Status().State == cri.ContainerState_CONTAINER_RUNNING {
		t.Error("container's process is gone but it is said to run")
	}
	// kubelet now stops the sandbox and makes a new one with the same name.
	if err := p.StopAndRemove(); err != nil {
		t.Fatal(err)
	}
}

// P5: containers of a pod start, stop and start again in any order.
func TestContainersArePeers(t *testing.T) {
	for _, order := range [][2]int{{0, 1}, {1, 0}} {
		t.Run(strconv.Itoa(order[0])+" first", func(t *testing.T) {
			_, p := start(t)
			pair := []*harness.Container{p.Create(sleeper), p.Create(sleeper)}
			for _, i := range order {
				pair[i].Start()
				pair[i].WaitLog("ready")
			}
			pair[order[0]].Stop(10e9)
			if s := pair[order[0]].Status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 0 {
				t.Errorf("stopped container is %v with code %d", s.State, s.ExitCode)
			}
			if !pair[order[1]].Process().Alive() {
				t.Error("the other one ended too")
			}
			third := p.Run(sleeper)
			third.WaitLog("ready")
			pair[order[1]].Stop(10e9)
			if !third.Process().Alive() || p.Status().State != cri.PodSandboxState_SANDBOX_READY {
				t.Error("pod or third container ended with the second")
			}
		})
	}
}

// P6: the network is there before any container, set up in a namespace whose only
// process has a root filesystem with nothing but pause in it.
func TestNetworkNeedsNothingInAContainer(t *testing.T) {
	n, p := start(t)
	infra := p.Infra()
	ip := p.Status().GetNetwork().GetIp()
	if ip == "" {
		t.Fatal("no IP before the first container")
	}
	if reserved, _ := filepath.Glob(n.IPAM + "/*/" + ip); len(reserved) != 1 {
		t.Fatalf("no reservation of %s before the first container", ip)
	}
	// /proc/PID/net is that of the process's network namespace.
	if routes := infra.Read("net/fib_trie"); !strings.Contains(routes, ip) {
		t.Errorf("%s is not in infra's namespace", ip)
	}
	var files []string
	root := infra.Path("root") + "/." // through the link
	err := filepath.WalkDir(root, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		switch rel {
		case "dev", "proc", "sys": // the kernel's own
			return filepath.SkipDir
		}
		if !e.IsDir() {
			files = append(files, rel)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(files) != 1 || filepath.Base(files[0]) != "pause" {
		t.Errorf("infra's root filesystem holds %q, want nothing but pause", files)
	}
	if info, err := os.Stat(filepath.Join(root, files[0])); err == nil && info.Size() > 20000 {
		t.Errorf("pause is %d bytes", info.Size())
	}
}

// P7: one host directory, mounted by each container that declares it.
func TestVolumeIsThePods(t *testing.T) {
	n, p := start(t)
	host, err := os.MkdirTemp(n.Volumes, "")
	if err != nil {
		t.Fatal(err)
	}
	a := p.Shell("echo from a > /volume/file; echo written; sleep 100000", mounts(&cri.Mount{HostPath: host, ContainerPath: "/volume"}))
	a.WaitLog("written")
	b := p.Run(sleeper, mounts(&cri.Mount{HostPath: host, ContainerPath: "/elsewhere", Readonly: true}))
	other := p.Run(sleeper)
	if got := b.Output("cat", "/elsewhere/file"); got != "from a" {
		t.Errorf("B reads %q", got)
	}
	if data, err := os.ReadFile(host + "/file"); err != nil || string(data) != "from a\n" {
		t.Errorf("host has %q, %v", data, err)
	}
	if _, _, code := b.Exec("touch", "/elsewhere/x"); code == 0 {
		t.Error("B writes to a read-only mount")
	}
	if m, ok := other.Process().MountAt("/volume"); ok {
		t.Errorf("a container that declares no volume has %v", m)
	}
}
