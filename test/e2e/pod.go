package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// PodStatus is what these tests read of kubelet's v1.Pod.
type PodStatus struct {
	Metadata struct{ Name, Namespace, UID string }
	Status   struct {
		Phase, Reason, Message, PodIP, HostIP, QOSClass string
		Conditions                                      []Condition
		InitContainerStatuses, ContainerStatuses        []ContainerStatus
	}
}

// Condition is a v1.PodCondition.
type Condition struct{ Type, Status, Reason, Message string }

// ContainerStatus is a v1.ContainerStatus.
type ContainerStatus struct {
	Name, ContainerID, Image, ImageID string
	Ready                             bool
	Started                           *bool
	RestartCount                      int
	State, LastState                  ContainerState
}

// ContainerState is a v1.ContainerState: one of its members is set.
type ContainerState struct {
	Running    *struct{ StartedAt time.Time }
	Waiting    *struct{ Reason, Message string }
	Terminated *struct {
		ExitCode              int
		Reason, Message       string
		StartedAt, FinishedAt time.Time
		ContainerID           string
	}
}

// ID is the container's ID without the runtime's name.
func (c ContainerStatus) ID() string {
	_, id, _ := strings.Cut(c.ContainerID, "://")
	return id
}

// String is for failures: the state in short.
func (c ContainerStatus) String() string {
	show := func(s ContainerState) string {
		switch {
		case s.Running != nil:
			return "running"
		case s.Terminated != nil:
			return fmt.Sprintf("terminated %d %s %s", s.Terminated.ExitCode, s.Terminated.Reason, s.Terminated.Message)
		case s.Waiting != nil:
			return "waiting " + s.Waiting.Reason + " " + s.Waiting.Message
		}
		return "-"
	}
	return fmt.Sprintf("%s: %s (before: %s), ready %v, %d restarts", c.Name, show(c.State), show(c.LastState), c.Ready, c.RestartCount)
}

func (p PodStatus) String() string {
	s := fmt.Sprintf("%s: %s %s %s IP %s", p.Metadata.Name, p.Status.Phase, p.Status.Reason, p.Status.Message, p.Status.PodIP)
	for _, c := range append(slices.Clone(p.Status.InitContainerStatuses), p.Status.ContainerStatuses...) {
		s += "\n  " + c.String()
	}
	return s
}

// Container is the status of a container of the pod; a zero one when kubelet has
// none yet.
func (p PodStatus) Container(name string) ContainerStatus {
	for _, c := range append(slices.Clone(p.Status.InitContainerStatuses), p.Status.ContainerStatuses...) {
		if c.Name == name {
			return c
		}
	}
	return ContainerStatus{Name: name}
}

// Condition is the status of a condition: "True", "False", or "".
func (p PodStatus) Condition(kind string) string {
	for _, c := range p.Status.Conditions {
		if c.Type == kind {
			return c.Status
		}
	}
	return ""
}

// Ready tells that the pod runs and all its containers are ready.
func (p PodStatus) Ready() bool {
	return p.Status.Phase == "Running" && p.Condition("Ready") == "True"
}

// pods is what kubelet says of its pods; nil when it does not answer.
func (k *kubelet) pods() []PodStatus {
	body, err := k.Get("/pods")
	if err != nil {
		return nil
	}
	var list struct{ Items []PodStatus }
	if err := json.Unmarshal([]byte(body), &list); err != nil {
		return nil
	}
	return list.Items
}

// ask repeats a question until the answer is yes. kubelet has no call that waits.
func (k *kubelet) ask(question func() bool) bool {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for until := time.Now().Add(Limit); time.Now().Before(until); <-tick.C {
		if question() {
			return true
		}
	}
	return false
}

// Pod is a static pod of a test.
type Pod struct {
	// Name is the manifest's; kubelet appends that of the node.
	Name string
	k    *Kubelet
	file string
	// remove takes away a pod that the API server has, and that has no file.
	remove func()
}

// Run drops a manifest of examples/pods into kubelet's directory; the pod goes
// with the test. Edits are pairs of an old and a new text, for what a test wants
// faster or smaller than a reader; each old one must be there.
func (k *Kubelet) Run(example string, edits ...string) *Pod {
	k.t.Helper()
	manifest := k.example("pods/"+example, edits...)
	if !strings.Contains(manifest, "terminationGracePeriodSeconds") {
		// A shell that is PID 1 ignores SIGTERM; the tests need not wait 30 seconds.
		manifest = strings.Replace(manifest, "\nspec:\n", "\nspec:\n  terminationGracePeriodSeconds: 1\n", 1)
	}
	return k.RunManifest(manifest)
}

var manifestName = regexp.MustCompile(`(?m)^  name: (\S+)$`)

// RunManifest drops a manifest's text.
func (k *Kubelet) RunManifest(manifest string) *Pod {
	k.t.Helper()
	match := manifestName.FindStringSubmatch(manifest)
	if match == nil {
		k.t.Fatalf("manifest without a name:\n%s", manifest)
	}
	p := &Pod{Name: match[1], k: k, file: filepath.Join(k.Manifests, match[1]+".yaml")}
	p.write(manifest)
	k.t.Cleanup(p.end)
	return p
}

// write puts the manifest where kubelet finds it, at once as a whole.
func (p *Pod) write(manifest string) {
	p.k.t.Helper()
	tmp := p.k.Dir + "/" + p.Name + ".tmp"
	err := os.WriteFile(tmp, []byte(manifest), 0o600)
	if err == nil {
		err = os.Rename(tmp, p.file)
	}
	if err != nil {
		p.k.t.Fatalf("write manifest: %v", err)
	}
}

// Remove removes the manifest, or the API server's pod; kubelet then takes the pod down.
func (p *Pod) Remove() {
	p.k.t.Helper()
	if p.remove != nil {
		p.remove()
		return
	}
	if err := os.Remove(p.file); err != nil && !os.IsNotExist(err) {
		p.k.t.Errorf("remove manifest: %v", err)
	}
}

func (p *Pod) end() {
	if p.k.t.Failed() {
		status, _ := p.status()
		p.k.t.Logf("pod %v\nkubelet's log:\n%s", status, p.k.tail(25, p.FullName()))
	}
	p.Remove()
}

// FullName is the pod's name for kubelet, which appends the node's to that of a
// manifest.
func (p *Pod) FullName() string {
	if p.remove != nil {
		return p.Name
	}
	return p.Name + "-" + nodeName
}

func (p *Pod) status() (PodStatus, bool) {
	for _, s := range p.k.pods() {
		if s.Metadata.Name == p.FullName() {
			return s, true
		}
	}
	return PodStatus{}, false
}

// Status is kubelet's word on the pod, which must be there.
func (p *Pod) Status() PodStatus {
	p.k.t.Helper()
	return p.Wait("known to kubelet", func(PodStatus) bool { return true })
}

// Wait returns the pod's status once it is as wanted; what says what that is.
func (p *Pod) Wait(what string, wanted func(PodStatus) bool) PodStatus {
	p.k.t.Helper()
	var last PodStatus
	if !p.k.ask(func() bool {
		s, ok := p.status()
		last = s
		return ok && wanted(s)
	}) {
		p.k.t.Fatalf("pod %s is not %s after %v; kubelet says:\n%v", p.Name, what, Limit, last)
	}
	return last
}

// WaitReady returns the status of the running pod.
func (p *Pod) WaitReady() PodStatus {
	p.k.t.Helper()
	return p.Wait("ready", PodStatus.Ready)
}

// Infra is the process of the pod's infra container, and the sandbox's ID.
func (p *Pod) Infra() (harness.Process, string) {
	p.k.t.Helper()
	id := p.Sandbox()
	return p.k.process(id), id
}

// Sandbox is the ID of the pod's one ready sandbox, as podshim says.
func (p *Pod) Sandbox() string {
	p.k.t.Helper()
	resp, err := p.k.Node.Runtime.ListPodSandbox(p.k.Node.Context(), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{
		State:         &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY},
		LabelSelector: map[string]string{"io.kubernetes.pod.name": p.FullName()},
	}})
	if err != nil || len(resp.Items) != 1 {
		p.k.t.Fatalf("pod %s has %d ready sandboxes, %v", p.Name, len(resp.GetItems()), err)
	}
	return resp.Items[0].Id
}

// Process is a container's PID 1.
func (p *Pod) Process(container string) harness.Process {
	p.k.t.Helper()
	id := p.Status().Container(container).ID()
	if id == "" {
		p.k.t.Fatalf("container %s of pod %s has no ID", container, p.Name)
	}
	return p.k.process(id)
}

// process is PID 1 of a container or sandbox, the oldest process in its cgroup, once it
// runs the container's own program: for a moment after the start it still is the runtime's.
func (k *Kubelet) process(id string) harness.Process {
	k.t.Helper()
	var all []harness.Process
	k.ask(func() bool {
		all = processesOf(id)
		return len(all) == 0 || !strings.HasPrefix(all[0].Name, "runc:[")
	})
	if len(all) == 0 {
		k.t.Fatalf("no process has a cgroup of %s", id)
	}
	return all[0]
}

// processesOf lists the processes whose cgroup bears the ID, oldest first.
func processesOf(id string) []harness.Process {
	found := harness.Processes(func(p harness.Process) bool { return p.State != "Z" && strings.Contains(p.Cgroup, id) })
	slices.SortFunc(found, func(a, b harness.Process) int {
		if a.StartTime != b.StartTime {
			return int(int64(a.StartTime) - int64(b.StartTime))
		}
		return a.PID - b.PID
	})
	return found
}

// Logs is what kubelet's /containerLogs gives of a container; "" when kubelet has
// no log yet. Options are query parameters, such as "previous=true".
func (p *Pod) Logs(container string, options ...string) string {
	body, err := p.k.Get("/containerLogs/default/" + p.FullName() + "/" + container + "?" + strings.Join(options, "&"))
	if err != nil {
		return ""
	}
	return body
}

// WaitLog returns a container's log once it contains a text; options are those of Logs.
func (p *Pod) WaitLog(container, text string, options ...string) string {
	p.k.t.Helper()
	var log string
	if !p.k.ask(func() bool {
		log = p.Logs(container, options...)
		return strings.Contains(log, text)
	}) {
		p.k.t.Fatalf("log of %s in pod %s does not contain %q after %v:\n%s", container, p.Name, text, Limit, log)
	}
	return log
}

// Exec runs a command in a container through kubelet's /run, which is CRI's
// ExecSync, and returns its output; the command must succeed.
func (p *Pod) Exec(container string, command ...string) string {
	p.k.t.Helper()
	out, err := p.TryExec(container, command...)
	if err != nil {
		p.k.t.Fatalf("exec %q in %s: %v", command, container, err)
	}
	return out
}

// Cgroup is the value of a file of the pod's cgroup: v1 names its controller before
// the first dot.
func (p *Pod) Cgroup(v1, v2 string) string {
	p.k.t.Helper()
	infra, _ := p.Infra()
	controller, _, _ := strings.Cut(v1, ".")
	dir, err := infra.CgroupDir(controller)
	if err != nil {
		p.k.t.Fatalf("cgroup of pod %s: %v", p.Name, err)
	}
	file := v1
	if harness.CgroupV2() {
		file = v2
	}
	data, err := os.ReadFile(filepath.Join(filepath.Dir(dir), file))
	if err != nil {
		p.k.t.Fatalf("cgroup of pod %s: %v", p.Name, err)
	}
	return strings.TrimSpace(string(data))
}
