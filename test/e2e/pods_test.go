package e2e

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/podshim/podshim/test/harness"
)

// TestMain has the pods of a kubelet run side by side whatever the number of CPUs:
// most of a test's time is waiting. All at once would make each wait for the others.
func TestMain(m *testing.M) {
	parallel := flag.Lookup("test.parallel")
	parallel.DefValue = "12"
	_ = parallel.Value.Set(parallel.DefValue)
	flag.Parse()
	restore := keepSysctls()
	code := m.Run()
	restore()
	os.Exit(code)
}

// keepSysctls returns what gives back the values of those that kubelet sets for the
// whole machine at its start.
func keepSysctls() (restore func()) {
	values := map[string][]byte{}
	for _, name := range []string{
		"vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops",
		"kernel/keys/root_maxkeys", "kernel/keys/root_maxbytes",
	} {
		path := "/proc/sys/" + name
		if value, err := os.ReadFile(path); err == nil {
			values[path] = value
		}
	}
	return func() {
		for path, value := range values {
			if now, err := os.ReadFile(path); err == nil && !bytes.Equal(now, value) {
				_ = os.WriteFile(path, value, 0)
			}
		}
	}
}

// TestPods runs the examples side by side on one kubelet, a row of the pod model
// each, and more of what a cluster's users do all day.
func TestPods(t *testing.T) {
	hugePages(t, 4)
	k := Start(t, Options{Config: fmt.Sprintf("podPidsLimit: %d\ncontainerLogMaxSize: 300Ki\ncontainerLogMaxFiles: 100\ncontainerLogMonitorInterval: 3s\n", podPids)})
	for _, row := range []struct {
		name string
		test func(*testing.T, *Kubelet)
	}{
		{"localhost", testLocalhost},
		{"shared-pid", testSharedPID},
		{"init", testInit},
		{"init-retry", testInitRetry},
		{"native-sidecar", testNativeSidecar},
		{"log-sidecar", testLogSidecar},
		{"network-sidecar", testNetworkSidecar},
		{"lifetimes", testLifetimes},
		{"pid1", testPID1},
		{"hooks", testHooks},
		{"resources", testResources},
		{"classes", testClasses},
		{"pod-resources", testPodResources},
		{"probes", testProbes},
		{"host-namespaces", testHostNamespaces},
		{"restricted", testRestricted},
		{"non-root", testNonRoot},
		{"seccomp", testSeccomp},
		{"names", testNames},
		{"user-namespace", testUserNamespace},
		{"volume", testVolume},
		{"volumes", testVolumes},
		{"host-paths", testHostPaths},
		{"block-device", testBlockDevice},
		{"ports", testPorts},
		{"fqdn", testFQDN},
		{"groups", testGroups},
		{"sysctls", testSysctls},
		{"capabilities", testCapabilities},
		{"proc-mount", testProcMount},
		{"redirect-sidecar", testRedirectSidecar},
		{"child-oom", testChildOOM},
		{"pid-limit", testPIDLimit},
		{"huge-pages", testHugePages},
		{"grpc-probe", testGRPCProbe},
		{"exit-codes", testExitCodes},
		{"on-failure", testOnFailure},
		{"restart-rules", testRestartRules},
		{"init-system", testInitSystem},
		{"log-rotation", testLogRotation},
		{"streams", testStreams},
		{"stats", testStats},
	} {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			row.test(t, k.With(t))
		})
	}
}

// P2, P3, P5: two containers are one machine to each other.
func testLocalhost(t *testing.T, k *Kubelet) {
	p := k.Run("localhost")
	status := p.WaitReady()
	infra, sandbox := p.Infra()
	web, client := p.Process("web"), p.Process("client")
	for _, kind := range []string{"net", "ipc", "uts", "user"} {
		if w, c, i := web.Namespace(kind), client.Namespace(kind), infra.Namespace(kind); w != i || c != i {
			t.Errorf("%s namespaces: infra %s, web %s, client %s; want one", kind, i, w, c)
		}
	}
	for _, kind := range []string{"mnt", "pid"} {
		if w, c := web.Namespace(kind), client.Namespace(kind); w == c {
			t.Errorf("web and client have one %s namespace %s", kind, w)
		}
	}
	if infra.Namespace("net") == self(t).Namespace("net") {
		t.Error("the pod has the host's network namespace")
	}
	log := p.WaitLog("client", "<!DOCTYPE html>")
	if ip := status.Status.PodIP; ip == "" || !strings.Contains(log, "inet "+ip+"/") {
		t.Errorf("kubelet says IP %q, the client sees\n%s", ip, log)
	}
	var web1, client1 string
	if !k.ask(func() bool { // a new address is "tentative" at first, perhaps for one of the two looks only
		web1, client1 = p.Exec("web", "ip", "addr"), p.Exec("client", "ip", "addr")
		return web1 == client1
	}) || !strings.Contains(web1, "eth0") {
		t.Errorf("devices in web:\n%s\nin client:\n%s", web1, client1)
	}
	if infra.StartTime > web.StartTime || infra.StartTime > client.StartTime {
		t.Errorf("infra of sandbox %s is not the oldest process", sandbox)
	}
}

// P11: one PID namespace, infra is PID 1 in it and reaps orphans.
func testSharedPID(t *testing.T, k *Kubelet) {
	p := k.Run("shared-pid")
	p.WaitReady()
	infra, _ := p.Infra()
	for _, name := range []string{"web", "orphan", "watcher"} {
		if c := p.Process(name); c.Namespace("pid") != infra.Namespace("pid") {
			t.Errorf("container %s has PID namespace %s, infra %s", name, c.Namespace("pid"), infra.Namespace("pid"))
		}
	}
	if nspid := strings.Fields(infra.Status("NSpid")); nspid[len(nspid)-1] != "1" {
		t.Errorf("infra's PIDs are %v, want 1 in the pod", nspid)
	}
	for _, want := range []string{"sleep 2", "nginx: master", "pause", "ps"} {
		p.WaitLog("watcher", want)
	}
	// The orphan's parent is infra, and it goes without leaving a zombie.
	var orphan harness.Process
	if !k.ask(func() bool {
		children := harness.Processes(func(c harness.Process) bool { return c.Parent == infra.PID && c.Name == "sleep" })
		if len(children) > 0 {
			orphan = children[0]
		}
		return len(children) > 0
	}) {
		t.Fatal("no orphan became infra's child")
	}
	if err := orphan.WaitGone(harness.Limit); err != nil {
		t.Error(err)
	}
	if !k.ask(func() bool {
		now, err := harness.ReadProcess(orphan.PID)
		return err != nil || now.StartTime != orphan.StartTime
	}) {
		t.Errorf("%v is still there as a zombie", orphan)
	}
}

// self is this process, which is in the host's namespaces.
func self(t *testing.T) harness.Process {
	t.Helper()
	p, err := harness.ReadProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	return p
}
