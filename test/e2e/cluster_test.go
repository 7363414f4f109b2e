package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/podshim/podshim/test/harness"
	"github.com/podshim/podshim/test/images"
)

// TestCluster is what takes an API server: the examples of examples/cluster, and kubectl
// in a user's hands.
func TestCluster(t *testing.T) {
	t.Parallel()
	c := StartCluster(t, Options{
		Config: "syncFrequency: 5s\nvolumeStatsAggPeriod: 5s\n",
		Node:   harness.Options{Config: "[runtime.handlers.files]\nnofile_soft = 4242\n"},
	})
	c.expect = append(c.expect,
		// The pod of testUnknownClass.
		regexp.MustCompile(`(?i)runtime handler.*"unknown"|no handler \\*"unknown\\*" is configured`))
	c.checkNode(t)
	t.Run("pods", func(t *testing.T) {
		for _, row := range []struct {
			name string
			test func(*testing.T, *Cluster)
		}{
			{"resize", testResize},
			{"config", testConfig},
			{"read-only-mounts", testReadOnlyMounts},
			{"full-volume", testFullVolume},
			{"full-layer", testFullLayer},
			{"runtime-class", testRuntimeClass},
			{"unknown-class", testUnknownClass},
			{"kubectl", testKubectl},
		} {
			t.Run(row.name, func(t *testing.T) {
				t.Parallel()
				row.test(t, c.With(t))
			})
		}
	})
}

// checkNode looks at what kubelet tells the API server of its runtime.
func (c *Cluster) checkNode(t *testing.T) {
	text, err := c.call(http.MethodGet, "/api/v1/nodes/"+nodeName, "", "")
	var node struct {
		Status struct {
			NodeInfo        struct{ ContainerRuntimeVersion string }
			RuntimeHandlers []struct {
				Name     string
				Features struct{ RecursiveReadOnlyMounts, UserNamespaces bool }
			}
			Features struct{ SupplementalGroupsPolicy bool }
		}
	}
	if err == nil {
		err = json.Unmarshal([]byte(text), &node)
	}
	if err != nil {
		t.Fatal(err)
	}
	if v := node.Status.NodeInfo.ContainerRuntimeVersion; !strings.HasPrefix(v, "podshim://") {
		t.Errorf("the node's runtime is %q", v)
	}
	var names []string
	for _, handler := range node.Status.RuntimeHandlers {
		names = append(names, handler.Name)
		if !handler.Features.RecursiveReadOnlyMounts || !handler.Features.UserNamespaces {
			t.Errorf("the node's handler %q has %+v", handler.Name, handler.Features)
		}
	}
	slices.Sort(names)
	if !slices.Contains(names, "") || !slices.Contains(names, "files") {
		t.Errorf("the node's handlers are %q, want the default and the configured one", names)
	}
	if !node.Status.Features.SupplementalGroupsPolicy {
		t.Error("the node does not have supplementalGroupsPolicy")
	}
}

// P14: new limits are in the cgroup files of a container that goes on, and of its pod.
func testResize(t *testing.T, c *Cluster) {
	p := c.Apply("resize")
	before := p.WaitReady()
	steady, restarted := p.Process("steady"), p.Process("restarted")
	for _, want := range []struct{ cpu, memory, quota, bytes, shares, podBytes string }{
		{"200m", "64Mi", "20000", "67108864", "204", "100663296"}, // up
		{"100m", "24Mi", "10000", "25165824", "102", "58720256"},  // and down
	} {
		c.Kubectl("patch", "pod", p.Name, "--subresource", "resize", "--patch", fmt.Sprintf(
			`{"spec": {"containers": [{"name": "steady", "resources": {"requests": {"cpu": %[1]q}, "limits": {"cpu": %[1]q, "memory": %[2]q}}}]}}`,
			want.cpu, want.memory))
		var got [4]string
		if !c.ask(func() bool {
			got[0], _ = steady.CgroupValue("memory.limit_in_bytes", "memory.max")
			got[1], _ = steady.CgroupValue("cpu.cfs_quota_us", "cpu.max")
			got[2], _ = steady.CgroupValue("cpu.shares", "cpu.weight")
			got[3] = p.Cgroup("memory.limit_in_bytes", "memory.max")
			quota, _, _ := strings.Cut(got[1], " ")
			return got[0] == want.bytes && quota == want.quota && (harness.CgroupV2() || got[2] == want.shares) && got[3] == want.podBytes
		}) {
			t.Fatalf("the cgroups have %v, want %+v\n%v", got, want, p.Status())
		}
		p.Wait("with no resize under way", func(s PodStatus) bool {
			return s.Condition("PodResizeInProgress") != "True" && s.Condition("PodResizePending") != "True"
		})
	}
	c.Kubectl("patch", "pod", p.Name, "--subresource", "resize", "--patch",
		`{"spec": {"containers": [{"name": "restarted", "resources": {"limits": {"memory": "48Mi"}}}]}}`)
	after := p.Wait("restarted in the one that asked for it", func(s PodStatus) bool {
		return s.Container("restarted").RestartCount == 1 && s.Container("restarted").State.Running != nil
	})
	if restarted.Alive() || !steady.Alive() || after.Container("steady").ID() != before.Container("steady").ID() {
		t.Errorf("steady is alive %v, the first restarted one %v:\n%v", steady.Alive(), restarted.Alive(), after)
	}
	if got, err := p.Process("restarted").CgroupValue("memory.limit_in_bytes", "memory.max"); got != "50331648" {
		t.Errorf("the restarted one may have %s, %v; want 48 Mi", got, err)
	}
}

// Config maps, secrets, tokens, the pod's own description; and a change of one.
func testConfig(t *testing.T, c *Cluster) {
	p := c.Apply("config")
	p.WaitReady()
	app := p.Process("app")
	for path, want := range map[string]string{
		"/config/colour": "blue", "/colour": "blue", "/secret/password": "correct horse",
		"/all/colour": "blue", "/all/password": "correct horse", "/all/labels": `shape="round"`,
	} {
		if got := p.Exec("app", "cat", path); got != want {
			t.Errorf("%s holds %q, want %q", path, got, want)
		}
	}
	if token := p.Exec("app", "cat", "/all/token"); strings.Count(token, ".") != 2 {
		t.Errorf("the token is %q", token)
	}
	if got := p.Exec("app", "sh", "-c", "echo $COLOUR, $PASSWORD, $NODE; stat -L -c %a /secret/password"); got != "blue, correct horse, node\n400\n" {
		t.Errorf("variables and mode are %q", got)
	}
	if _, err := p.TryExec("app", "touch", "/config/x"); err == nil {
		t.Error("a config map may be written to")
	}
	for _, point := range []string{"/secret", "/all"} {
		if m, ok := app.MountAt(point); !ok || m.Type != "tmpfs" || m.Options[0] != "ro" {
			t.Errorf("%s is %+v, want a read-only tmpfs", point, m)
		}
	}
	c.Kubectl("patch", "configmap", "config", "--patch", `{"data": {"colour": "green"}}`)
	if !c.ask(func() bool {
		return p.Exec("app", "cat", "/config/colour") == "green" && p.Exec("app", "cat", "/all/colour") == "green"
	}) {
		t.Error("the change has not reached the files")
	}
	if got := p.Exec("app", "sh", "-c", "cat /colour; echo $COLOUR"); got != "blueblue\n" {
		t.Errorf("by subPath and as a variable it is %q", got)
	}
	if !app.Alive() {
		t.Error("the container was restarted")
	}
}

// Read-only mounts, with what is mounted below and without.
func testReadOnlyMounts(t *testing.T, c *Cluster) {
	host := c.Dir + "/read-only"
	shareDir(t, host)
	shareDir(t, host+"/below")
	p := c.Apply("read-only-mounts", "/tmp/podshim-read-only-example", host)
	p.WaitReady()
	shallow, deep := p.WaitLog("shallow", "wrote below\n"), p.WaitLog("deep", "refused below\n")
	for name, log := range map[string]string{"shallow": shallow, "deep": deep} {
		if !strings.Contains(log, "touch: /host/file: Read-only file system") {
			t.Errorf("%s says\n%s", name, log)
		}
	}
	if exists(host+"/file") || exists(host+"/below/deep") || !exists(host+"/below/shallow") {
		t.Errorf("on the host there is %v", filesBelow(host))
	}
}

// waitEvicted returns when kubelet has ended a pod that takes too much of the disk.
func (p *Pod) waitEvicted(message string) {
	p.k.t.Helper()
	status := p.Wait("evicted", func(s PodStatus) bool { return s.Status.Phase == "Failed" })
	if status.Status.Reason != "Evicted" || !strings.Contains(status.Status.Message, message) {
		p.k.t.Errorf("the pod ended as %s: %s; want it evicted: %s", status.Status.Reason, status.Status.Message, message)
	}
	// kubelet may tell of the end before it comes.
	var left []harness.Process
	if !p.k.ask(func() bool { left = processesOf(status.Metadata.UID); return len(left) == 0 }) {
		p.k.t.Errorf("the evicted pod has left %v", left)
	}
}

func testFullVolume(t *testing.T, c *Cluster) {
	c.Apply("full-volume").waitEvicted(`Usage of EmptyDir volume "small" exceeds the limit "5Mi"`)
}

func testFullLayer(t *testing.T, c *Cluster) {
	c.Apply("full-layer").waitEvicted(`Container app exceeded its local ephemeral storage limit "10Mi"`)
}

// P15: the handler that a RuntimeClass names.
func testRuntimeClass(t *testing.T, c *Cluster) {
	p := c.Apply("runtime-class")
	p.WaitReady()
	if limits := p.Process("app").Read("limits"); !regexp.MustCompile(`Max open files +4242 `).MatchString(limits) {
		t.Errorf("the container's limits are\n%s\nwant the handler's 4242 open files", limits)
	}
}

func testUnknownClass(t *testing.T, c *Cluster) {
	p := c.Apply("unknown-class")
	if !c.ask(func() bool {
		events := c.Kubectl("get", "events", "--field-selector", "involvedObject.name="+p.Name, "-o", "jsonpath={.items[*].message}")
		return strings.Contains(events, "unknown")
	}) {
		t.Error("no event tells that the handler is unknown")
	}
	if status := p.Status(); status.Status.Phase != "Pending" || status.Container("app").ID() != "" {
		t.Errorf("the pod is %v", status)
	}
}

// kubectl in a user's hands.
func testKubectl(t *testing.T, c *Cluster) {
	p := c.Apply("web")
	p.WaitReady()
	for name, test := range map[string]func(*testing.T, *Cluster, *Pod){
		"exec": kubectlExec, "cp": kubectlCopy, "attach": kubectlAttach, "port-forward": kubectlForward, "debug": kubectlDebug,
	} {
		t.Run(name, func(t *testing.T) {
			sub := *p
			k := c.With(t)
			sub.k = k.Kubelet
			test(t, k, &sub)
		})
	}
}

func kubectlExec(t *testing.T, c *Cluster, p *Pod) {
	cmd := c.kubectlCommand("exec", "-i", p.Name, "-c", "nginx", "--", "sh", "-c", "cat; echo oops >&2; exit 6")
	cmd.Stdin = strings.NewReader("typed\n")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if string(out) != "typed\n" || !strings.HasPrefix(stderr.String(), "oops\n") || cmd.ProcessState.ExitCode() != 6 {
		t.Errorf("kubectl exec wrote %q and %q, and ended with %v", out, stderr.String(), err)
	}
}

func kubectlCopy(t *testing.T, c *Cluster, p *Pod) {
	from, back := filepath.Join(t.TempDir(), "from"), filepath.Join(t.TempDir(), "back")
	data := bytes.Repeat([]byte("a file of the user's\n"), 100_000)
	if err := os.WriteFile(from, data, 0o600); err != nil {
		t.Fatal(err)
	}
	c.Kubectl("cp", from, p.Name+":/tmp/there", "-c", "nginx")
	c.Kubectl("cp", p.Name+":/tmp/there", back, "-c", "nginx")
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d bytes of %d came back, %v", len(got), len(data), err)
	}
}

// background starts a command that goes on until the test ends.
func background(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
}

func kubectlAttach(t *testing.T, c *Cluster, p *Pod) {
	follow := c.kubectlCommand("logs", "-f", p.Name, "-c", "reader")
	out, err := follow.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	background(t, follow)
	attach := c.kubectlCommand("attach", "-i", p.Name, "-c", "reader")
	in, err := attach.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	background(t, attach)
	if _, err := io.WriteString(in, "what was typed\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "read what was typed\n" {
		t.Errorf("kubectl logs -f shows %q, %v", line, err)
	}
}

var forwarding = regexp.MustCompile(`Forwarding from 127\.0\.0\.1:(\d+)`)

func kubectlForward(t *testing.T, c *Cluster, p *Pod) {
	cmd := c.kubectlCommand("port-forward", p.Name, ":80")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	background(t, cmd)
	line, err := bufio.NewReader(out).ReadString('\n')
	match := forwarding.FindStringSubmatch(line)
	if match == nil {
		t.Fatalf("kubectl port-forward says %q, %v", line, err)
	}
	go func() { _, _ = io.Copy(io.Discard, out) }() // ends with the command
	for range 10 {
		resp, err := http.Get("http://127.0.0.1:" + match[1] + "/")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || !strings.Contains(string(body), "Welcome to nginx") {
			t.Errorf("the forwarded port answers %q, %v", body, err)
		}
	}
}

// P11: an ephemeral container in the PID namespace of the one to be debugged.
func kubectlDebug(t *testing.T, c *Cluster, p *Pod) {
	c.Kubectl("debug", p.Name, "--image", images.Busybox, "--target", "nginx", "-c", "debugger", "--", "sh", "-c", "ps; exec sleep 1000000")
	p.WaitLog("debugger", "nginx: master process")
	nginx := p.Process("nginx")
	var id string
	if !c.ask(func() bool { // kubelet tells the API server after it has started it
		var status struct {
			Status struct{ EphemeralContainerStatuses []ContainerStatus }
		}
		if err := json.Unmarshal([]byte(c.Kubectl("get", "pod", p.Name, "-o", "json")), &status); err != nil {
			t.Fatal(err)
		}
		if debuggers := status.Status.EphemeralContainerStatuses; len(debuggers) == 1 && debuggers[0].State.Running != nil {
			id = debuggers[0].ID()
		}
		return id != ""
	}) {
		t.Fatal("the pod has no running ephemeral container")
	}
	debugger := c.process(id)
	for kind, same := range map[string]bool{"pid": true, "net": true, "ipc": true, "mnt": false} {
		if (nginx.Namespace(kind) == debugger.Namespace(kind)) != same {
			t.Errorf("%s namespaces are %s and %s, want the same: %v", kind, nginx.Namespace(kind), debugger.Namespace(kind), same)
		}
	}
}
