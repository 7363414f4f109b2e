package fault

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// network is a node whose pods get their network from a plugin that breaks where
// it is told to. Otherwise it is the bridge plugin.
type network struct {
	*harness.Node
	t       *testing.T
	dir     string        // of the files that tell the plugin what to do
	timeout time.Duration // podshim's plugin_timeout
}

// faultyPlugin does what the files in its directory say. What goes wrong before the
// bridge plugin has run has taken nothing, what goes wrong after it an IP, a veth
// pair and a route.
const faultyPlugin = `#!/bin/sh
cd %[1]q
echo "$CNI_COMMAND $CNI_CONTAINERID" >> calls
fail() { echo "{\"cniVersion\": \"1.0.0\", \"code\": 100, \"msg\": \"$1\"}"; exit 1; }
case $CNI_COMMAND in
ADD)
	[ ! -e add-fails ] || fail 'told to fail'
	[ ! -e add-hangs ] || sleep 100000
	# In the middle: it has the namespace open, and is about to take an IP.
	exec 9< "$CNI_NETNS"
	while [ -e add-waits ]; do sleep 0.02; done
	CNI_NETNS=/proc/$$/fd/9
	# The IPAM plugin alone, as a plugin that has an IP and then no device.
	[ ! -e add-takes-ip ] || { %[2]s/host-local > /dev/null; fail 'told to fail with an IP'; }
	result=$(%[2]s/bridge) || { echo "$result"; exit 1; }
	[ ! -e add-fails-late ] || fail 'told to fail when all was done'
	[ ! -e add-hangs-late ] || sleep 100000
	echo "$result" ;;
DEL)
	[ ! -e del-hangs ] || sleep 100000
	for once in del-fails/*; do rm "$once" 2> /dev/null && fail 'told to fail'; break; done
	exec %[2]s/bridge ;;
*)
	exec %[2]s/bridge ;;
esac
`

// startNetwork starts the node.
func startNetwork(t *testing.T, timeout time.Duration) *network {
	t.Helper()
	harness.NeedRoot(t)
	tools, err := harness.Tools()
	if err != nil {
		t.Fatal(err)
	}
	w := &network{t: t, dir: t.TempDir(), timeout: timeout}
	plugins := t.TempDir()
	script := fmt.Sprintf(faultyPlugin, w.dir, tools)
	if err := os.WriteFile(filepath.Join(plugins, "faulty"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	w.Node = start(t, harness.Options{PluginDirs: []string{plugins}, PluginTimeout: timeout.String(), NoNetwork: true})
	w.configure()
	w.waitReady(true)
	return w
}

// configure writes the network's configuration, as an installer does.
func (w *network) configure() {
	w.t.Helper()
	conf := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": %q, "plugins": [
 {"type": "faulty", "bridge": %q, "isGateway": true,
  "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]]}}]}
`, w.Name, w.Bridge, w.IPAM, w.Subnet)
	if err := os.MkdirAll(w.CNIConf, 0o755); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(w.CNIConf, "10-faulty.conflist"), []byte(conf), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// tell has the plugin do a thing from now on; the result takes it back.
func (w *network) tell(what string) (stop func()) {
	w.t.Helper()
	path := filepath.Join(w.dir, what)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		w.t.Fatal(err)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			w.t.Error(err)
		}
	}
}

// failDels has the next DELs fail.
func (w *network) failDels(count int) {
	w.t.Helper()
	if err := os.MkdirAll(filepath.Join(w.dir, "del-fails"), 0o755); err != nil {
		w.t.Fatal(err)
	}
	for i := range count {
		w.tell(fmt.Sprintf("del-fails/%d", i))
	}
}

// calls are the verbs that the plugin was called with.
func (w *network) calls(verb string) int {
	raw, _ := os.ReadFile(filepath.Join(w.dir, "calls"))
	count := 0
	for line := range strings.Lines(string(raw)) {
		if strings.HasPrefix(line, verb+" ") {
			count++
		}
	}
	return count
}

// ready is NetworkReady of Status.
func (w *network) ready() (bool, string) {
	w.t.Helper()
	answer, err := w.Runtime.Status(w.Context(), &cri.StatusRequest{})
	if err != nil {
		w.t.Fatalf("Status: %v", err)
	}
	for _, c := range answer.Status.Conditions {
		if c.Type == "NetworkReady" {
			return c.Status, c.Message
		}
	}
	w.t.Fatalf("Status tells no NetworkReady: %v", answer)
	return false, ""
}

// waitReady returns how long it took until NetworkReady was as wanted.
func (w *network) waitReady(want bool) time.Duration {
	w.t.Helper()
	start := time.Now()
	asked(w.t, fmt.Sprintf("NetworkReady is %v", want), func() bool {
		is, _ := w.ready()
		return is == want
	})
	return time.Since(start)
}

// in is the same network as a subtest sees it.
func (w *network) in(t *testing.T) *network { return &network{w.With(t), t, w.dir, w.timeout} }

func (w *network) run(ctx context.Context, conf *cri.PodSandboxConfig) (string, error) {
	answer, err := w.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: conf})
	return answer.GetPodSandboxId(), err
}

// undisturbed has others use the runtime while f runs: Status is asked all the
// time, and pods on the node's network come and go. None of it may fail, and no Status
// may take half as long as a plugin that hangs. Beside each Status, Version is asked, for
// which the daemon looks at nothing: what takes long there, the machine takes.
func (w *network) undisturbed(f func()) {
	w.t.Helper()
	done := make(chan struct{})
	var others sync.WaitGroup
	var statuses, versions []time.Duration
	pods := 0
	over := func() bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	}
	others.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for ; ; <-tick.C {
			start := time.Now()
			if _, err := w.Runtime.Status(w.Context(), &cri.StatusRequest{}); err != nil {
				w.t.Errorf("Status beside a broken network: %v", err)
				return
			}
			statuses = append(statuses, time.Since(start))
			start = time.Now()
			if _, err := w.Runtime.Version(w.Context(), &cri.VersionRequest{}); err != nil {
				w.t.Errorf("Version: %v", err)
			}
			versions = append(versions, time.Since(start))
			if over() {
				return
			}
		}
	})
	others.Go(func() {
		for {
			if err := w.hostPod(); err != nil {
				w.t.Errorf("a pod on the node's network, beside a broken one: %v", err)
				return
			}
			pods++
			if over() {
				return
			}
		}
	})
	f()
	close(done)
	others.Wait()
	figures(w.t, "meanwhile %d Status, at most %v (of 99 in 100 %v, median %v), as many Version, at most %v (%v, %v); %d pods on the node's network",
		len(statuses), worst(statuses), p99(statuses), median(statuses), worst(versions), p99(versions), median(versions), pods)
	if len(statuses) == 0 || pods == 0 {
		w.t.Errorf("%d Status and %d pods beside a broken network", len(statuses), pods)
	}
	if worst(statuses) > w.timeout/2 {
		w.t.Errorf("Status has waited for a plugin: %v", worst(statuses))
	}
}

// serves has Status and a pod on the node's network served, both before it returns.
func (w *network) serves(when string) {
	w.t.Helper()
	if _, err := w.Runtime.Status(w.Context(), &cri.StatusRequest{}); err != nil {
		w.t.Errorf("Status %s: %v", when, err)
	}
	if err := w.hostPod(); err != nil {
		w.t.Errorf("a pod on the node's network, %s: %v", when, err)
	}
}

// besideHanging makes a call that waits for a plugin which hangs. Others are served before
// the plugin's end.
func (w *network) besideHanging(verb string, call func() error) error {
	w.t.Helper()
	called := w.calls(verb)
	ended := make(chan error, 1)
	go func() { ended <- call() }()
	asked(w.t, verb+" hangs", func() bool { return w.calls(verb) > called })
	w.serves("while " + verb + " hangs")
	if len(ended) > 0 {
		w.t.Errorf("others were served only when %s had been given up", verb)
	}
	return <-ended
}

func (w *network) hostPod() error {
	id, err := w.run(w.Context(), w.PodConfig(onNode))
	if err != nil {
		return err
	}
	if _, err := w.Runtime.StopPodSandbox(w.Context(), &cri.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err = w.Runtime.RemovePodSandbox(w.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}

func onNode(conf *cri.PodSandboxConfig) {
	conf.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_NODE
}

// wantOnly tells what is on the machine now and was not before.
func (w *network) wantOnly(before []string, when string) {
	w.t.Helper()
	for _, line := range lasting(w.Node) {
		// The first pod makes the network's own files.
		if !slices.Contains(before, line) && !strings.Contains(line, "last_reserved_ip") {
			w.t.Errorf("%s there is %s", when, line)
		}
	}
}

// However ADD goes wrong, the pod is not run, the error is the plugin's, nothing of
// the pod is left, and the same request succeeds once the plugin works.
func TestNetworkAddGoesWrong(t *testing.T) {
	w := startNetwork(t, promised(5*time.Second))
	noAnswer := "no answer in " + w.timeout.String()
	for _, fault := range []struct{ file, says string }{
		{"add-fails", "told to fail"},
		{"add-takes-ip", "told to fail with an IP"},
		{"add-fails-late", "told to fail when all was done"},
		{"add-hangs", noAnswer},
		{"add-hangs-late", noAnswer},
	} {
		t.Run(fault.file, func(t *testing.T) {
			w := w.in(t)
			before := lasting(w.Node)
			conf := w.PodConfig()
			works := w.tell(fault.file)
			_, err := w.run(w.Context(), conf)
			if err == nil || !strings.Contains(err.Error(), fault.says) {
				t.Errorf("RunPodSandbox: %v, want an error that says %q", err, fault.says)
			}
			w.wantOnly(before, "after a failed ADD")
			w.undisturbed(func() {
				run := func() error {
					_, err := w.run(w.Context(), conf)
					return err
				}
				if fault.says == noAnswer {
					err = w.besideHanging("ADD", run)
				} else {
					err = run()
				}
				if err == nil {
					t.Error("RunPodSandbox works while ADD does not")
				}
			})
			works()
			w.RunConfig(conf, "")
		})
	}
}

// While DEL fails or hangs, Stop says so, and the address and the namespace stay, which the
// next DEL needs; when it works all is given back.
func TestNetworkDelFailsManyTimes(t *testing.T) {
	w := startNetwork(t, promised(5*time.Second))
	before := lasting(w.Node)
	const tries = 20
	conf := w.PodConfig()
	p := w.RunConfig(conf, "")
	infra := p.Infra()
	stop := func() error {
		_, err := w.Runtime.StopPodSandbox(w.Context(), &cri.StopPodSandboxRequest{PodSandboxId: p.ID})
		return err
	}
	w.failDels(tries)
	w.undisturbed(func() {
		for try := range tries {
			if try == tries/2 {
				w.serves("while DEL fails")
			}
			if err := stop(); err == nil || !strings.Contains(err.Error(), "told to fail") {
				t.Errorf("StopPodSandbox while DEL fails: %v", err)
			}
			if !held(lasting(w.Node), "network namespace", "podshim-"+p.ID[:16]) || !held(lasting(w.Node), "IP reservation", "") {
				t.Error("the namespace or the address is gone before DEL has worked")
			}
		}
	})
	if infra.Alive() {
		t.Error("the infra container runs on in a stopped pod")
	}
	works := w.tell("del-hangs")
	if err := w.besideHanging("DEL", stop); err == nil || !strings.Contains(err.Error(), "no answer in "+w.timeout.String()) {
		t.Errorf("StopPodSandbox while DEL hangs: %v", err)
	}
	works()
	if err := stop(); err != nil {
		t.Errorf("StopPodSandbox when DEL works: %v", err)
	}
	w.wantOnly(append(before, "sandbox "+p.ID+" SANDBOX_NOTREADY"), "after DEL has worked")
	if err := p.StopAndRemove(); err != nil {
		t.Error(err)
	}
	w.wantOnly(before, "after the pod")
}

// held tells whether a line of State names the kind and the name.
func held(state []string, kind, name string) bool {
	return slices.ContainsFunc(state, func(line string) bool {
		return strings.HasPrefix(line, kind) && strings.Contains(line, name)
	})
}

// A failed ADD whose DEL fails as well does not stand in the way of the same pod's
// next try, and is given back without anybody asking.
func TestNetworkFailsBothWays(t *testing.T) {
	w := startNetwork(t, 2*time.Second)
	before := lasting(w.Node)
	conf := w.PodConfig()
	works := w.tell("add-fails-late")
	w.failDels(3)
	if _, err := w.run(w.Context(), conf); err == nil {
		t.Error("RunPodSandbox works while ADD does not")
	}
	if !held(lasting(w.Node), "IP reservation", "") {
		t.Error("the address is gone, whose DEL has failed")
	}
	works()
	p := w.RunConfig(conf, "")
	if err := p.StopAndRemove(); err != nil {
		t.Error(err)
	}
	asked(t, "what the failed pod holds is given back", func() bool { return !held(lasting(w.Node), "IP reservation", "") })
	asked(t, "the failed pod is forgotten", func() bool { return !held(lasting(w.Node), "sandbox", "") })
	w.wantOnly(before, "in the end")
}

// A plugin that is in the middle of ADD when the daemon is killed goes on. The next
// daemon must not give back what the plugin is only about to take; one that hangs
// it ends.
func TestNetworkAddOutlivesTheDaemon(t *testing.T) {
	w := startNetwork(t, 2*time.Second)
	for _, fault := range []string{"add-waits", "add-hangs"} {
		t.Run(fault, func(t *testing.T) {
			w := w.in(t)
			before := lasting(w.Node)
			conf := w.PodConfig()
			called := w.calls("ADD")
			goOn := w.tell(fault)
			lost := make(chan error, 1)
			go func() {
				_, err := w.run(w.Context(), conf)
				lost <- err
			}()
			asked(t, "ADD runs", func() bool { return w.calls("ADD") == called+1 })
			w.Kill()
			if err := <-lost; err == nil {
				t.Error("a call to a killed daemon was answered")
			}
			w.Resume()
			goOn()
			p := w.RunConfig(conf, "")
			if err := p.StopAndRemove(); err != nil {
				t.Error(err)
			}
			asked(t, "the pod of the killed daemon is forgotten", func() bool { return !held(lasting(w.Node), "sandbox", "") })
			w.wantOnly(before, "in the end")
		})
	}
}

// Without a configuration no pod gets a network, Status says so within 5 s, and
// pods that have one can be taken down; when it is back pods run again.
func TestNetworkConfigurationComesAndGoes(t *testing.T) {
	w := startNetwork(t, time.Minute) // nothing hangs here
	before := lasting(w.Node)
	var gone, back []time.Duration
	for range times(10, 2) {
		old := w.RunPod()
		conf := w.PodConfig()
		w.undisturbed(func() {
			if err := os.RemoveAll(w.CNIConf); err != nil {
				t.Fatal(err)
			}
			gone = append(gone, w.waitReady(false))
			if _, why := w.ready(); !strings.Contains(why, w.CNIConf) {
				t.Errorf("NetworkReady does not name the missing directory: %s", why)
			}
			if _, err := w.run(w.Context(), conf); err == nil || !strings.Contains(err.Error(), w.CNIConf) {
				t.Errorf("RunPodSandbox without a network: %v", err)
			}
			w.serves("while there is no network")
			if err := old.StopAndRemove(); err != nil {
				t.Errorf("take a pod down whose network's configuration is gone: %v", err)
			}
			w.configure()
			back = append(back, w.waitReady(true))
		})
		if err := w.RunConfig(conf, "").StopAndRemove(); err != nil {
			t.Error(err)
		}
		w.wantOnly(before, "after the pods")
	}
	figures(t, "%d times NetworkReady: false after %v (median %v), true after %v (median %v)",
		len(gone), worst(gone), median(gone), worst(back), median(back))
	if most := max(worst(gone), worst(back)); most > promised(5*time.Second) {
		t.Errorf("NetworkReady was wrong for %v", most)
	}
}
