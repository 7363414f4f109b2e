package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/podshim/podshim/test/harness"
)

// TestClusterKubeadm has kubeadm read the configuration of docs/kubelet.md and look at podshim as
// it does before it makes a node of a machine. That it does not do here.
func TestClusterKubeadm(t *testing.T) {
	kubeadm := filepath.Join(filepath.Dir(find(t)), "kubeadm")
	if _, err := os.Stat(kubeadm); err != nil {
		t.Skipf("SKIPPED: %v (`make kube` builds it)", err)
	}
	n := harness.Start(t, harness.Options{NoPull: true})
	doc, err := os.ReadFile("../../docs/kubelet.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(doc), "\n```yaml\napiVersion: kubeadm.k8s.io/")
	text, _, found := strings.Cut(text, "```")
	const socket = "/run/podshim/podshim.sock"
	if !found || !strings.Contains(text, "unix://"+socket) {
		t.Fatalf("docs/kubelet.md has no configuration for kubeadm with podshim's socket:\n%s", text)
	}
	config := filepath.Join(t.TempDir(), "kubeadm.yaml")
	text = "apiVersion: kubeadm.k8s.io/" + strings.ReplaceAll(text, socket, n.Socket) +
		// or kubeadm asks the internet which one is the newest
		"---\napiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\nkubernetesVersion: v1.37.0\n"
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(kubeadm, append(args, "--config", config)...)
		cmd.Env = []string{"PATH=" + filepath.Dir(kubeadm) + ":" + os.Getenv("PATH"), "KUBEADM_INIT_DRYRUN_DIR=" + t.TempDir()}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("kubeadm %q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	if out := run("config", "validate"); strings.TrimSpace(out) != "ok" {
		t.Errorf("kubeadm says of the configuration:\n%s", out)
	}
	// This machine is no node: kubeadm has complaints. None must be of the runtime.
	preflight := []string{"init", "phase", "preflight", "--dry-run", "--ignore-preflight-errors", "all"}
	ofRuntime := regexp.MustCompile(`(?m)^.*(\bCRI\]|ContainerRuntimeVersion|runtime).*$`)
	if out := run(preflight...); !strings.Contains(out, "[preflight] Running pre-flight checks") || ofRuntime.MatchString(out) {
		t.Errorf("kubeadm says of this machine:\n%s", out)
	}
	n.Kill()
	if out := run(preflight...); !ofRuntime.MatchString(out) {
		t.Errorf("kubeadm does not notice that there is no podshim:\n%s", out)
	}
	n.Resume()
}
