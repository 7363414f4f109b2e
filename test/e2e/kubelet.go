package e2e

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/podshim/podshim/test/harness"
	"github.com/podshim/podshim/test/images"
)

// Limit bounds every wait: kubelet's own clocks (probes, back-off, collection once
// a minute) make some things take that long.
var Limit = 4 * harness.Limit

// Kubelet is a kubelet and its podshim as one test sees them.
type Kubelet struct {
	*kubelet
	t TB
	// Node is the podshim.
	Node *harness.Node
}

// TB is what this package needs of a test.
type TB interface {
	harness.TB
	Skipf(format string, args ...any)
}

// kubelet is the process and what it has on the machine.
type kubelet struct {
	// Manifests is the directory of static pods, Root kubelet's own, Logs that of
	// container logs; all are below Dir.
	Dir, Manifests, Root, Logs string
	// CgroupRoot is the cgroup below which kubelet makes kubepods. With the systemd driver
	// it is the root: kubelet wants all controllers there, and systemd takes away from a
	// slice what no unit of it has asked for. Two kubelets would be in each other's way.
	CgroupRoot string
	// Addr is host:port of the HTTPS endpoints.
	Addr string

	// expect are errors in kubelet's log that the test itself brings about.
	expect []*regexp.Regexp
	// expectIn are those that it brings about for some time only.
	expectIn []passage

	program    string
	config     string
	kubeconfig string // of the API server, if there is one
	client     *http.Client

	mu     sync.Mutex
	cmd    *exec.Cmd
	exited chan struct{}
}

// Options say how a kubelet differs from the usual one.
type Options struct {
	// Config are lines of YAML for the KubeletConfiguration.
	Config string
	// Eviction is evictionHard; "" is what this machine will not come to.
	Eviction string
	// Node are the options of the podshim.
	Node harness.Options
}

// clusterDomain is the end of the pods' full names.
const clusterDomain = "cluster.test"

// nodeName is kubelet's, and the end of the name of each of its static pods.
const nodeName = "node"

// Start runs a podshim and a kubelet for a test.
func Start(t TB, opts Options) *Kubelet {
	t.Helper()
	k := newKubelet(t, opts)
	t.Cleanup(k.end)
	k.Launch()
	return k
}

// newKubelet makes all but the process.
func newKubelet(t TB, opts Options) *Kubelet {
	t.Helper()
	program := find(t)
	// As podshim has it by default: many pods at once wait for each other's plugins.
	opts.Node.PluginTimeout = cmp.Or(opts.Node.PluginTimeout, harness.Limit.String())
	n := harness.Start(t, opts.Node)
	serveImages(t, n)
	k := &Kubelet{kubelet: &kubelet{
		Dir: n.Dir, Root: n.Dir + "/kubelet", Manifests: n.Dir + "/manifests", Logs: n.Dir + "/pods",
		CgroupRoot: n.PodsCgroup, program: program, config: n.Dir + "/kubelet.yaml",
	}, t: t, Node: n}
	if harness.Systemd {
		k.CgroupRoot = "/"
	}
	if opts.Node.SmallRoot != "" { // kubelet and podshim have one disk, as is usual
		k.Root = n.Root + "/kubelet"
	}
	if err := k.prepare(n, opts); err != nil {
		t.Fatalf("prepare kubelet: %v", err)
	}
	return k
}

// With is the same kubelet as a subtest sees it.
func (k *Kubelet) With(t TB) *Kubelet { return &Kubelet{k.kubelet, t, k.Node.With(t)} }

// find is the kubelet program; the test is skipped where there is none.
func find(t TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skipf("SKIPPED: needs root (namespaces, cgroups, mounts)")
	}
	tools, err := harness.Tools()
	if err != nil {
		t.Skipf("SKIPPED: %v", err)
	}
	program := filepath.Join(tools, "kubelet")
	if _, err := os.Stat(program); err != nil {
		t.Skipf("SKIPPED: %v (`make kubelet` builds it)", err)
	}
	return program
}

// serveImages puts the images of test/images where the node's podshim pulls them.
func serveImages(t TB, n *harness.Node) {
	t.Helper()
	set, err := images.Build(context.Background(), "../../_artifacts/images")
	if err != nil {
		t.Fatalf("build images: %v", err)
	}
	server, err := set.Serve("127.0.0.1:0")
	if err != nil {
		t.Fatalf("serve images: %v", err)
	}
	t.Cleanup(func() { _ = server.Close() })
	if err := server.WriteHosts(n.CertsD); err != nil {
		t.Fatalf("point podshim at the images: %v", err)
	}
}

func (k *kubelet) prepare(n *harness.Node, opts Options) error {
	for _, dir := range []string{k.Manifests, k.Root, k.Logs, k.Dir + "/volume-plugins"} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	// A user namespace's root must be able to walk to its volumes.
	if err := os.Chmod(k.Dir, 0o711); err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	k.Addr = fmt.Sprintf("127.0.0.1:%d", port)
	k.client = &http.Client{Transport: &http.Transport{
		// kubelet signs its certificate itself; it is our own child on loopback.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}, Timeout: harness.Limit}
	resolv := k.Dir + "/resolv.conf"
	if err := os.WriteFile(resolv, []byte("nameserver 192.0.2.53\nsearch test.local\n"), 0o644); err != nil {
		return err
	}
	return os.WriteFile(k.config, []byte(k.configuration(n, port, resolv, cmp.Or(opts.Eviction, noEviction))+opts.Config), 0o600)
}

// noEviction: whatever else fills this machine must not evict the pods of a test.
const noEviction = "{memory.available: 20Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%, imagefs.inodesFree: 1%}"

// configuration is docs/kubelet.md's, with names, ports and limits that keep it
// apart from everything else on the machine.
func (k *kubelet) configuration(n *harness.Node, port int, resolv, eviction string) string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://%s
staticPodPath: %s
fileCheckFrequency: 1s
podLogsDir: %s
volumePluginDir: %s/volume-plugins
address: 127.0.0.1
port: %d
healthzPort: 0
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupRoot: %s
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
makeIPTablesUtilChains: false
resolvConf: %s
clusterDomain: `+clusterDomain+`
evictionHard: %s
crashLoopBackOff: {maxContainerRestartPeriod: 1s}
`, n.Socket, k.Manifests, k.Logs, k.Dir, port, k.CgroupRoot, resolv, eviction)
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// Launch starts the process and returns when it answers; after Stop or Kill, again.
func (k *Kubelet) Launch() {
	k.t.Helper()
	if err := k.start(); err != nil {
		k.t.Fatalf("start kubelet: %v\n%s", err, k.tail(30))
	}
}

func (k *kubelet) start() error {
	logs, err := os.OpenFile(k.logPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer logs.Close()
	cmd := exec.Command(k.program, "--config", k.config, "--root-dir", k.Root, "--cert-dir", k.Dir+"/pki",
		"--hostname-override", nodeName, "--v=2")
	if k.kubeconfig != "" {
		cmd.Args = append(cmd.Args, "--kubeconfig", k.kubeconfig)
	}
	cmd.Stdout, cmd.Stderr = logs, logs
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/root"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(exited)
	}()
	k.mu.Lock()
	k.cmd, k.exited = cmd, exited
	k.mu.Unlock()
	return k.waitHealthy(exited)
}

func (k *kubelet) waitHealthy(exited chan struct{}) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(Limit)
	for {
		if body, err := k.Get("/healthz"); err == nil && body == "ok" {
			return nil
		}
		select {
		case <-tick.C: // there is no event to wait for: kubelet just begins to listen
		case <-exited:
			return errors.New("kubelet has ended")
		case <-limit:
			return fmt.Errorf("no answer from %s after %v", k.Addr, Limit)
		}
	}
}

// Kill ends kubelet with SIGKILL, Stop with SIGTERM; pods run on.
func (k *Kubelet) Kill() { k.t.Helper(); k.signal(syscall.SIGKILL) }

// Stop ends kubelet as a service manager does; pods run on.
func (k *Kubelet) Stop() { k.t.Helper(); k.signal(syscall.SIGTERM) }

func (k *Kubelet) signal(sig syscall.Signal) {
	k.t.Helper()
	k.mu.Lock()
	process, exited := k.cmd, k.exited
	k.cmd = nil
	k.mu.Unlock()
	if process == nil {
		return
	}
	if err := process.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		k.t.Fatalf("signal kubelet: %v", err)
	}
	select {
	case <-exited:
	case <-time.After(Limit):
		_ = process.Process.Kill()
		k.t.Fatalf("kubelet has not ended %v after %v", Limit, sig)
	}
	k.client.CloseIdleConnections()
}

// Get is the body of one of kubelet's endpoints.
func (k *kubelet) Get(path string) (string, error) {
	resp, err := k.client.Get("https://" + k.Addr + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode/100 != 2 {
		err = fmt.Errorf("GET %s: %s: %s", path, resp.Status, strings.TrimSpace(string(body)))
	}
	return string(body), err
}
