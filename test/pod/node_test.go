package pod

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// The network is ready when there is a CNI configuration: it appears, vanishes and
// comes back without a restart. Host network pods need none.
func TestNetworkReadiness(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{NoNetwork: true})
	conf := n.PodConfig()
	for range 2 {
		waitNetwork(t, n, false)
		_, err := n.Runtime.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: conf})
		if err == nil || !strings.Contains(err.Error(), n.CNIConf) {
			t.Errorf("a pod without a network: %v; want an error that names %s", err, n.CNIConf)
		}
		n.RunPod(podNamespaces(&cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER}))
		if err := n.WriteNetwork(); err != nil {
			t.Fatal(err)
		}
		waitNetwork(t, n, true)
		// What could not run without a network runs now, under the same name.
		p := n.RunConfig(conf, "")
		if p.Status().GetNetwork().GetIp() == "" {
			t.Error("pod has no IP")
		}
		if err := p.StopAndRemove(); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(n.CNIConf + "/10-test.conflist"); err != nil {
			t.Fatal(err)
		}
	}
}

// waitNetwork waits for a network, or for none, which must be told with why and where.
func waitNetwork(t *testing.T, n *harness.Node, ready bool) {
	t.Helper()
	waitCondition(t, n, "RuntimeReady", true)
	last := waitCondition(t, n, "NetworkReady", ready)
	if !ready && (last.Reason == "" || !strings.Contains(last.Message, n.CNIConf)) {
		t.Errorf("condition does not say why and where: %v", last)
	}
}

// The network made from a template for the range that kubelet tells: pods get
// addresses of it, a new range replaces it, and a file of somebody else wins.
func TestPodCIDR(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	dir := t.TempDir()
	write := func(template string) {
		if err := os.WriteFile(dir+"/template", []byte(template), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("{}")
	n := harness.Start(t, harness.Options{NoNetwork: true, Network: fmt.Sprintf("conf_template = %q", dir+"/template")})
	tell := func(cidr string) error {
		_, err := n.Runtime.UpdateRuntimeConfig(n.Context(), &cri.UpdateRuntimeConfigRequest{
			RuntimeConfig: &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{PodCidr: cidr}}})
		return err
	}
	checkCode(t, tell("10.0.0.0/33"), invalid, "pod_cidr")
	checkCode(t, tell(n.Subnet+",,"), invalid, "pod_cidr")
	checkCode(t, tell(n.Subnet), notNow, dir+"/template") // it gives no network
	waitNetwork(t, n, false)
	write(fmt.Sprintf(`{"cniVersion": "1.0.0", "name": %q, "plugins": [
 {"type": "bridge", "bridge": %q, "isGateway": true, "forceAddress": true, "ipam": {"type": "host-local", "dataDir": %q,
  "ranges": [{{range $i, $r := .PodCIDRRanges}}{{if $i}},{{end}}[{"subnet": "{{$r}}"}]{{end}}],
  "routes": [{{range $i, $r := .Routes}}{{if $i}},{{end}}{"dst": "{{$r}}"}{{end}}]}}]}`, n.Name, n.Bridge, n.IPAM))
	inside := func(p *harness.Pod, prefix string) {
		t.Helper()
		ip, err := netip.ParseAddr(p.Status().GetNetwork().GetIp())
		if err != nil || !netip.MustParsePrefix(prefix).Contains(ip) {
			t.Errorf("pod has %v (%v), want an address of %s", ip, err, prefix)
		}
	}
	half := func(bits string) string { return strings.Replace(n.Subnet, "0/24", bits, 1) }
	for _, cidr := range []string{half("0/25"), half("0/25"), half("128/25")} {
		if err := tell(cidr); err != nil {
			t.Fatal(err)
		}
		// At once: the answer comes when the network is there.
		p := n.RunPod()
		inside(p, cidr)
		if err := p.StopAndRemove(); err != nil {
			t.Fatal(err)
		}
	}
	// Both families, as kubelet sends them for a dual-stack node.
	if err := tell(half("0/25") + ", fd00:210::/64"); err != nil {
		t.Fatal(err)
	}
	p := n.RunPod()
	inside(p, half("0/25"))
	if more := p.Status().GetNetwork().GetAdditionalIps(); len(more) != 1 || !strings.HasPrefix(more[0].Ip, "fd00:210:") {
		t.Errorf("additional addresses are %v, want one of fd00:210::/64", more)
	}
	// The daemon starts again with what it has made.
	n.Restart()
	waitNetwork(t, n, true)
	inside(n.RunPod(), half("0/25"))
	// Somebody installs a network: kubelet's range is theirs to use.
	if err := os.Remove(n.CNIConf + "/10-podshim-pod-cidr.conflist"); err != nil {
		t.Fatal(err)
	}
	if err := n.WriteNetwork(); err != nil {
		t.Fatal(err)
	}
	waitNetwork(t, n, true)
	if err := tell("10.99.0.0/24"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(n.CNIConf + "/10-podshim-pod-cidr.conflist"); !os.IsNotExist(err) {
		t.Errorf("the template was used beside a network that is there: %v", err)
	}
	stdout, stderr, err := output(t, n.Crictl("info", "-o", "go-template", "--template", "{{.cni.podCIDRs}}"), nil)
	if err != nil || strings.TrimSpace(stdout) != "[10.99.0.0/24]" {
		t.Errorf("crictl info tells the range %q, %v %s", stdout, err, stderr)
	}
}

// What podshim cannot do it says by name.
func TestCheckpointsAreRefused(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	r := n.Runtime
	for _, c := range []badCase{
		bad("container", "Unimplemented", "CRIU", r.CheckpointContainer, &cri.CheckpointContainerRequest{ContainerId: unknown, Location: t.TempDir() + "/c.tar", Timeout: 1}),
		bad("pod", "Unimplemented", "CRIU", r.CheckpointPod, &cri.CheckpointPodRequest{PodSandboxId: unknown, OutputPath: t.TempDir(), ContainerIds: []string{unknown}}),
		bad("restore", "Unimplemented", "CRIU", r.RestorePod, &cri.RestorePodRequest{CheckpointPath: t.TempDir(), Config: n.PodConfig()}),
	} {
		checkCode(t, c.call(n.Context()), c.code, c.word)
	}
}

// What kubelet asks first.
func TestNodeAnswers(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	v, err := n.Runtime.Version(n.Context(), &cri.VersionRequest{Version: "0.1.0"})
	if err != nil || v.RuntimeName != "podshim" || v.RuntimeApiVersion != "v1" || v.RuntimeVersion == "" {
		t.Errorf("version: %v, %v", v, err)
	}
	c, err := n.Runtime.RuntimeConfig(n.Context(), &cri.RuntimeConfigRequest{})
	driver := cri.CgroupDriver_CGROUPFS // as the node's configuration says
	if harness.Systemd {
		driver = cri.CgroupDriver_SYSTEMD
	}
	if err != nil || c.GetLinux().GetCgroupDriver() != driver {
		t.Errorf("runtime config: %v, %v; want %v", c, err, driver)
	}
	s, err := n.Runtime.Status(n.Context(), &cri.StatusRequest{Verbose: true})
	if err != nil || len(s.Info) == 0 {
		t.Fatalf("verbose status: %v, %v", s, err)
	}
	for key, value := range s.Info {
		if !json.Valid([]byte(value)) && strings.HasPrefix(value, "{") {
			t.Errorf("info %s is no JSON: %s", key, value)
		}
	}
	info, err := os.Stat(n.Socket)
	if err != nil || info.Mode().Perm() != 0o660 || info.Mode()&os.ModeSocket == 0 {
		t.Errorf("socket is %v, %v", info.Mode(), err)
	}
	var st unix.Stat_t
	if err := unix.Stat(n.Root+"/images", &st); err == nil && st.Mode&0o007 != 0 && st.Mode&0o007 != 0o001 {
		t.Errorf("image store is %o", st.Mode)
	}
}

// A configuration that names no cgroup driver has the one that goes with the machine's
// init, and kubelet is told it.
func TestCgroupDriverIsDetected(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{NoPull: true})
	path := n.Dir + "/config.toml"
	config, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	without := regexp.MustCompile(`(?m)^(driver|parent) = .*\n`).ReplaceAll(config, nil)
	if len(without) == len(config) {
		t.Fatalf("the node's configuration names no driver:\n%s", config)
	}
	if err := os.WriteFile(path, without, 0o600); err != nil {
		t.Fatal(err)
	}
	n.Restart()
	init, err := os.ReadFile("/proc/1/comm")
	if err != nil {
		t.Fatal(err)
	}
	want := cri.CgroupDriver_CGROUPFS
	if string(init) == "systemd\n" {
		want = cri.CgroupDriver_SYSTEMD
	}
	c, err := n.Runtime.RuntimeConfig(n.Context(), &cri.RuntimeConfigRequest{})
	if err != nil || c.GetLinux().GetCgroupDriver() != want {
		t.Errorf("runtime config: %v, %v; want %v, PID 1 is %s", c, err, want, init)
	}
}

// The runtime is not ready while no podmon answers and none can be started, and says why;
// what runs goes on, and what is asked for meanwhile is had afterwards.
func TestRuntimeReadiness(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	old := n.Podmon()
	n.InstallPodmon()
	n.Restart()
	if err := old.WaitGone(harness.Limit); err != nil {
		t.Fatal(err)
	}
	running := n.RunPod().Run(sleeper)
	running.WaitLog("ready")
	process := running.Process()
	for name, sig := range map[string]unix.Signal{"killed": unix.SIGKILL, "stopped": unix.SIGSTOP} {
		waitCondition(t, n, "RuntimeReady", true)
		podmon := n.Podmon()
		mend := n.SpoilPodmon()
		if err := podmon.Kill(sig); err != nil {
			t.Fatal(err)
		}
		c := waitCondition(t, n, "RuntimeReady", false)
		if c.Reason != "MonitorNotReady" || !strings.Contains(c.Message, "podmon") {
			t.Errorf("%s: the condition does not say why: %v", name, c)
		}
		mend()
		c = waitCondition(t, n, "RuntimeReady", true)
		if c.Reason != "" || c.Message != "" {
			t.Errorf("%s: ready, and %v", name, c)
		}
		if got := running.Output("echo", "works"); got != "works" || !process.Alive() {
			t.Errorf("%s: exec gives %q; the container's process runs: %v", name, got, process.Alive())
		}
		n.RunPod().Run(sleeper).WaitLog("ready")
	}
}

// waitCondition waits until a condition is met, or is not, by asking, and returns it.
func waitCondition(t *testing.T, n *harness.Node, kind string, met bool) (last *cri.RuntimeCondition) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(harness.Limit); time.Now().Before(end); <-tick.C {
		s, err := n.Runtime.Status(n.Context(), &cri.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range s.Status.Conditions {
			if c.Type == kind {
				last = c
			}
		}
		if last.GetStatus() == met {
			return last
		}
	}
	t.Fatalf("condition stays %v", last)
	return nil
}

// Runtime handlers of the configuration select their settings, each its own; the
// default one stays as it is.
func TestRuntimeHandler(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{Config: "[runtime.handlers.few-files]\nnofile_soft = 77\nnofile_hard = 88\n" +
		"[runtime.handlers.bare]\ndefault_capabilities = [\"CAP_KILL\"]\n"})
	few := n.RunConfig(n.PodConfig(), "few-files").Run(sleeper)
	few.WaitLog("ready")
	if limits := few.Process().Read("limits"); !strings.Contains(strings.Join(strings.Fields(limits), " "), "Max open files 77 88") {
		t.Errorf("limits are\n%s", limits)
	}
	bare := n.RunConfig(n.PodConfig(), "bare").Run(sleeper)
	bare.WaitLog("ready")
	plain := n.RunPod().Run(sleeper)
	plain.WaitLog("ready")
	if got := bare.Process().Status("CapBnd"); got != fmt.Sprintf("%016x", 1<<unix.CAP_KILL) {
		t.Errorf("the bare handler's capabilities are %s", got)
	}
	for name, c := range map[string]*harness.Container{"few-files": few, "default": plain} {
		if got := c.Process().Status("CapBnd"); got == bare.Process().Status("CapBnd") {
			t.Errorf("the %s handler has the bare one's capabilities", name)
		}
	}
	if limits := bare.Process().Read("limits"); strings.Contains(strings.Join(strings.Fields(limits), " "), "Max open files 77 88") {
		t.Error("the bare handler has the other's limits")
	}
	if limits := plain.Process().Read("limits"); strings.Contains(strings.Join(strings.Fields(limits), " "), "Max open files 77 88") {
		t.Error("the default handler has the other's limits")
	}
	s, err := n.Runtime.Status(n.Context(), &cri.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, h := range s.RuntimeHandlers {
		names = append(names, h.Name)
	}
	if joined := "|" + strings.Join(names, "|") + "|"; !strings.Contains(joined, "|bare|few-files|") || !strings.Contains(joined, "||") {
		t.Errorf("kubelet is told of handlers %q", names)
	}
}

// What an operator types.
func TestCrictl(t *testing.T) {
	harness.NeedRoot(t)
	n := harness.Start(t, harness.Options{})
	p := n.RunPod()
	c := p.Shell("echo a line in the log; sleep 100000")
	c.WaitLog("a line in the log")
	cases := []struct {
		args string
		want string
	}{
		{"version", "podshim"},
		{"info", "NetworkReady"},
		{"pods", p.ID[:13]},
		{"ps -a", c.ID[:13]},
		{"ps -q", c.ID},
		{"images", harness.RegistryHost + "/busybox"},
		{"imagefsinfo", "usedBytes"},
		{"inspect " + c.ID, c.Config.Metadata.Name},
		{"inspectp " + p.ID, p.Config.Metadata.Uid},
		{"inspecti " + harness.Busybox, "sha256:"},
		{"stats " + c.ID, c.ID[:13]},
		{"statsp " + p.ID, p.ID[:13]},
		{"logs " + c.ID, "a line in the log"},
		{"exec " + c.ID + " hostname", p.Config.Hostname},
		{"update --cpu-share 300 " + c.ID, c.ID},
		{"stop " + c.ID, c.ID},
		{"rm " + c.ID, c.ID},
		{"rmp -f " + p.ID, p.ID},
		{"rmi " + harness.Busybox, "busybox"},
		{"pods -q", ""},
		{"ps -aq", ""},
		{"images -q", ""},
	}
	for _, tc := range cases {
		stdout, stderr, err := output(t, n.Crictl(strings.Fields(tc.args)...), nil)
		if err != nil || !strings.Contains(stdout, tc.want) || tc.want == "" && len(bytes.TrimSpace([]byte(stdout))) != 0 {
			t.Errorf("crictl %s: %v, want %q\n%s%s", tc.args, err, tc.want, stdout, stderr)
		}
	}
}
