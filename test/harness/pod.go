package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pod is a sandbox of a test; it is removed, and searched for leaks, when the
// test ends.
type Pod struct {
	ID     string
	Config *cri.PodSandboxConfig
	// Handler is the runtime handler it was made with.
	Handler string
	n       *Node
	// containers counts those made, for the next one's name.
	containers *atomic.Int32
}

// PodConfig is a plain pod's config with a name of its own and a log directory
// made as kubelet makes it.
func (n *Node) PodConfig(edits ...func(*cri.PodSandboxConfig)) *cri.PodSandboxConfig {
	n.t.Helper()
	uid := randomHex(8)
	conf := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: "pod-" + uid[:6], Namespace: "test", Uid: uid},
		Hostname:     "host-" + uid[:6],
		LogDirectory: filepath.Join(n.LogRoot, uid),
		Labels:       map[string]string{"test": strings.ReplaceAll(n.t.Name(), "/", ".")},
		DnsConfig:    &cri.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"test.local"}},
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent:    n.PodsCgroup,
			SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}},
		},
	}
	for _, edit := range edits {
		edit(conf)
	}
	if conf.LogDirectory != "" {
		if err := os.MkdirAll(conf.LogDirectory, 0o755); err != nil {
			n.t.Fatalf("make log directory: %v", err)
		}
	}
	return conf
}

// RunPod runs a pod of PodConfig.
func (n *Node) RunPod(edits ...func(*cri.PodSandboxConfig)) *Pod {
	n.t.Helper()
	return n.RunConfig(n.PodConfig(edits...), "")
}

// RunConfig runs a pod of a whole config under a runtime handler.
func (n *Node) RunConfig(conf *cri.PodSandboxConfig, handler string) *Pod {
	n.t.Helper()
	resp, err := n.Runtime.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: conf, RuntimeHandler: handler})
	if err != nil {
		n.t.Fatalf("run pod %s: %v\n%s", conf.GetMetadata().GetName(), err, n.tail(20))
	}
	p := &Pod{ID: resp.PodSandboxId, Config: conf, Handler: handler, n: n, containers: new(atomic.Int32)}
	n.t.Cleanup(p.end)
	return p
}

// With is the same pod as a subtest sees it; it stays its parent's to remove.
func (p *Pod) With(t TB) *Pod {
	sub := *p
	sub.n = p.n.With(t)
	return &sub
}

// end removes the pod and finds what it has left.
func (p *Pod) end() {
	t := p.n.t
	ids := append([]string{p.ID}, p.containerIDs()...)
	if t.Failed() {
		t.Logf("%s", p.n.tail(40, ids...))
	}
	if err := p.StopAndRemove(); err != nil {
		t.Errorf("remove pod %s: %v", p.ID, err)
	}
	for _, leak := range p.n.leftovers(ids) {
		t.Errorf("left by pod %s: %s", p.ID, leak)
	}
}

// StopAndRemove is what kubelet does with a pod it no longer wants.
func (p *Pod) StopAndRemove() error {
	ctx := p.n.Context()
	if _, err := p.n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return fmt.Errorf("stop: %w", err)
	}
	if _, err := p.n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	return nil
}

// containerIDs lists the containers the runtime knows of the pod.
func (p *Pod) containerIDs() []string {
	resp, err := p.n.Runtime.ListContainers(p.n.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.ID}})
	if err != nil {
		return nil
	}
	var ids []string
	for _, c := range resp.Containers {
		ids = append(ids, c.Id)
	}
	return ids
}

// Infra is the infra container's process.
func (p *Pod) Infra() Process {
	p.n.t.Helper()
	return p.n.firstProcess(p.ID)
}

// Status is the runtime's word on the sandbox.
func (p *Pod) Status() *cri.PodSandboxStatus {
	p.n.t.Helper()
	resp, err := p.n.Runtime.PodSandboxStatus(p.n.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.ID})
	if err != nil {
		p.n.t.Fatalf("status of pod %s: %v", p.ID, err)
	}
	return resp.Status
}

// WaitNotReady returns when the runtime says that the sandbox is not ready, as
// kubelet finds out: by asking.
func (p *Pod) WaitNotReady() {
	p.n.t.Helper()
	if !p.n.ask(func() bool { return p.Status().State == cri.PodSandboxState_SANDBOX_NOTREADY }) {
		p.n.t.Fatalf("pod %s is still ready after %v", p.ID, Limit)
	}
}

// Container is a container of a test's pod.
type Container struct {
	ID     string
	Config *cri.ContainerConfig
	Pod    *Pod
	n      *Node
}

// ContainerConfig is a busybox container's config with a name of its own.
func (p *Pod) ContainerConfig(command []string, edits ...func(*cri.ContainerConfig)) *cri.ContainerConfig {
	name := fmt.Sprintf("c%d", p.containers.Add(1))
	conf := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name},
		Image:    &cri.ImageSpec{Image: Busybox},
		Command:  command,
		LogPath:  name + ".log",
		Linux: &cri.LinuxContainerConfig{
			Resources: &cri.LinuxContainerResources{},
			SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{
					Pid:     p.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid(),
					Network: p.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork(),
					Ipc:     p.Config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetIpc(),
				},
			},
		},
	}
	for _, edit := range edits {
		edit(conf)
	}
	return conf
}

// Create makes a container without starting it.
func (p *Pod) Create(command []string, edits ...func(*cri.ContainerConfig)) *Container {
	p.n.t.Helper()
	conf := p.ContainerConfig(command, edits...)
	resp, err := p.n.Runtime.CreateContainer(p.n.Context(), &cri.CreateContainerRequest{
		PodSandboxId: p.ID, Config: conf, SandboxConfig: p.Config,
	})
	if err != nil {
		p.n.t.Fatalf("create container %s: %v\n%s", conf.Metadata.Name, err, p.n.tail(20))
	}
	return &Container{ID: resp.ContainerId, Config: conf, Pod: p, n: p.n}
}

// Run makes and starts a container.
func (p *Pod) Run(command []string, edits ...func(*cri.ContainerConfig)) *Container {
	p.n.t.Helper()
	c := p.Create(command, edits...)
	c.Start()
	return c
}

// Shell runs a container whose process is a shell with the given script.
func (p *Pod) Shell(script string, edits ...func(*cri.ContainerConfig)) *Container {
	p.n.t.Helper()
	return p.Run([]string{"sh", "-c", script}, edits...)
}

// Start starts the container.
func (c *Container) Start() {
	c.n.t.Helper()
	if _, err := c.n.Runtime.StartContainer(c.n.Context(), &cri.StartContainerRequest{ContainerId: c.ID}); err != nil {
		c.n.t.Fatalf("start container %s: %v\npinned namespaces: %q\n%s", c.Config.Metadata.Name, err, c.n.pins(), c.n.tail(20))
	}
}

// Stop stops the container within a grace period of whole seconds.
func (c *Container) Stop(grace time.Duration) {
	c.n.t.Helper()
	if _, err := c.n.Runtime.StopContainer(c.n.Context(), &cri.StopContainerRequest{
		ContainerId: c.ID, Timeout: int64(grace.Seconds()),
	}); err != nil {
		c.n.t.Fatalf("stop container %s: %v", c.Config.Metadata.Name, err)
	}
}

// Remove removes the container.
func (c *Container) Remove() {
	c.n.t.Helper()
	if _, err := c.n.Runtime.RemoveContainer(c.n.Context(), &cri.RemoveContainerRequest{ContainerId: c.ID}); err != nil {
		c.n.t.Fatalf("remove container %s: %v", c.Config.Metadata.Name, err)
	}
}

// Process is the container's PID 1.
func (c *Container) Process() Process {
	c.n.t.Helper()
	return c.n.firstProcess(c.ID)
}

// Processes are all processes in the container's cgroup, oldest first.
func (c *Container) Processes() []Process { return processesOf(c.ID) }

// Status is the runtime's word on the container.
func (c *Container) Status() *cri.ContainerStatus {
	c.n.t.Helper()
	resp, err := c.n.Runtime.ContainerStatus(c.n.Context(), &cri.ContainerStatusRequest{ContainerId: c.ID})
	if err != nil {
		c.n.t.Fatalf("status of container %s: %v", c.Config.Metadata.Name, err)
	}
	return resp.Status
}

// WaitExit returns the status once the container's end is known to the runtime.
// The kernel is waited for, by pidfd, then the runtime is asked as kubelet asks.
func (c *Container) WaitExit() *cri.ContainerStatus {
	c.n.t.Helper()
	if all := processesOf(c.ID); len(all) > 0 {
		if err := all[0].WaitGone(Limit); err != nil {
			c.n.t.Fatalf("wait for the end of container %s: %v", c.Config.Metadata.Name, err)
		}
	}
	var status *cri.ContainerStatus
	if !c.n.ask(func() bool {
		status = c.Status()
		return status.State == cri.ContainerState_CONTAINER_EXITED
	}) {
		c.n.t.Fatalf("container %s has ended, but is %v for the runtime", c.Config.Metadata.Name, status.State)
	}
	return status
}

// Exec runs a command in the container and returns what it wrote and its code.
func (c *Container) Exec(command ...string) (stdout, stderr string, code int32) {
	c.n.t.Helper()
	resp, err := c.n.Runtime.ExecSync(c.n.Context(), &cri.ExecSyncRequest{
		ContainerId: c.ID, Cmd: command, Timeout: int64(Limit.Seconds()),
	})
	if err != nil {
		c.n.t.Fatalf("exec %q in %s: %v\n%s", command, c.Config.Metadata.Name, err, c.n.tail(10, c.ID))
	}
	return string(resp.Stdout), string(resp.Stderr), resp.ExitCode
}

// Output is the standard output of a command that must succeed, blanks around
// cut off.
func (c *Container) Output(command ...string) string {
	c.n.t.Helper()
	stdout, stderr, code := c.Exec(command...)
	if code != 0 {
		c.n.t.Fatalf("exec %q in %s: exit code %d\n%s%s", command, c.Config.Metadata.Name, code, stdout, stderr)
	}
	return strings.TrimSpace(stdout)
}

// Touch makes a file that the container waits for. It may end at once, and the command that
// makes the file with it.
func (c *Container) Touch(path string) {
	c.n.t.Helper()
	if stdout, stderr, code := c.Exec("touch", path); code != 0 && code != 137 {
		c.n.t.Fatalf("touch %s in %s: exit code %d\n%s%s", path, c.Config.Metadata.Name, code, stdout, stderr)
	}
}

// ask repeats a question to the runtime until the answer is yes: CRI has no
// call that waits, kubelet asks as well.
func (n *Node) ask(question func() bool) bool {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for until := time.Now().Add(Limit); time.Now().Before(until); <-tick.C {
		if question() {
			return true
		}
	}
	return false
}

// processesOf lists the processes whose cgroup bears the ID, oldest first.
func processesOf(id string) []Process {
	found := Processes(func(p Process) bool { return p.State != "Z" && strings.Contains(p.Cgroup, id) })
	slices.SortFunc(found, func(a, b Process) int {
		if a.StartTime != b.StartTime {
			return int(int64(a.StartTime) - int64(b.StartTime))
		}
		return a.PID - b.PID
	})
	return found
}

// firstProcess is the oldest process of a container or sandbox: what the monitor
// started as its PID 1.
func (n *Node) firstProcess(id string) Process {
	n.t.Helper()
	all := processesOf(id)
	if len(all) == 0 {
		n.t.Fatalf("no process has a cgroup of %s\n%s", id, n.tail(10, id))
	}
	return all[0]
}
