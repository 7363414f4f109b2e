package pod

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	grpcstatus "google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

const (
	invalid  = "InvalidArgument"
	notFound = "NotFound"
	notNow   = "FailedPrecondition"
	unknown  = "f00df00df00df00df00df00df00df00df00df00df00df00df00df00df00df00d"
)

// scene is a node with a pod in every state that bad input can be about.
type scene struct {
	n *harness.Node
	// pod is ready; gone is stopped, not removed.
	pod, gone *harness.Pod
	// running, created and exited are containers of pod.
	running, created, exited *harness.Container
}

func newScene(t *testing.T) *scene {
	n := harness.Start(t, harness.Options{})
	s := &scene{n: n, pod: n.RunPod(), gone: n.RunPod()}
	if _, err := n.Runtime.StopPodSandbox(n.Context(), &cri.StopPodSandboxRequest{PodSandboxId: s.gone.ID}); err != nil {
		t.Fatal(err)
	}
	s.running, s.created = s.pod.Run(sleeper), s.pod.Create(sleeper)
	s.exited = s.pod.Shell("exit 1")
	s.running.WaitLog("ready")
	s.exited.WaitExit()
	return s
}

// badCase is one call that must fail.
type badCase struct {
	name string
	call func(context.Context) error
	// code is the gRPC code's name; alternatives are separated by |.
	code string
	// word must be in the message: the field, or the value that is wrong.
	word string
}

// call makes a CRI method of one type a case.
func bad[Q, R any](name, code, word string, method func(context.Context, Q, ...grpc.CallOption) (R, error), request Q) badCase {
	return badCase{name, func(ctx context.Context) error { _, err := method(ctx, request); return err }, code, word}
}

// Every RPC refuses input that makes no sense: with a fitting code, a message that
// says which field, and nothing changed on the machine or in the lists.
func TestBadInput(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	s := newScene(t)
	groups := map[string][]badCase{
		"sandbox": s.sandboxCases(), "container": s.containerCases(), "life": s.lifeCases(),
		"stream": s.streamCases(), "stats": s.statsCases(), "image": s.imageCases(),
	}
	for group, cases := range groups {
		for _, c := range cases {
			t.Run(group+"/"+c.name, func(t *testing.T) {
				n := s.n.With(t)
				before := n.State()
				err := c.call(n.Context())
				checkCode(t, err, c.code, c.word)
				// The files of a discarded snapshot are deleted behind the call.
				var lost, added []string
				if !eventually(func() bool {
					lost, added = difference(before, n.State())
					return len(lost)+len(added) == 0
				}) {
					t.Errorf("changed:\n- %s\n+ %s", strings.Join(lost, "\n- "), strings.Join(added, "\n+ "))
				}
			})
		}
	}
	// The daemon is as good as new: the same scene's objects still work.
	if got := s.running.Output("echo", "works"); got != "works" {
		t.Errorf("exec afterwards gives %q", got)
	}
	s.n.RunPod().Run(sleeper).WaitLog("ready")
}

func checkCode(t *testing.T, err error, code, word string) {
	t.Helper()
	if err == nil {
		t.Errorf("no error, want %s", code)
		return
	}
	got := grpcstatus.Convert(err)
	if !slices.Contains(strings.Split(code, "|"), got.Code().String()) {
		t.Errorf("code %v, want %s: %s", got.Code(), code, got.Message())
	}
	if !strings.Contains(strings.ToLower(got.Message()), strings.ToLower(word)) {
		t.Errorf("message does not say %q: %s", word, got.Message())
	}
}

// difference is what was lost and what was added between two sorted lists.
func difference(before, after []string) (lost, added []string) {
	only := func(in, out []string) (found []string) {
		for _, line := range in {
			if _, ok := slices.BinarySearch(out, line); !ok {
				found = append(found, line)
			}
		}
		return found
	}
	return only(before, after), only(after, before)
}

func (s *scene) sandboxCases() []badCase {
	run := func(name, code, word string, edit func(*cri.PodSandboxConfig)) badCase {
		conf := s.n.PodConfig()
		edit(conf)
		return bad(name, code, word, s.n.Runtime.RunPodSandbox, &cri.RunPodSandboxRequest{Config: conf})
	}
	options := func(c *cri.PodSandboxConfig) *cri.NamespaceOption { return c.Linux.SecurityContext.NamespaceOptions }
	return []badCase{
		bad("no config", invalid, "config", s.n.Runtime.RunPodSandbox, &cri.RunPodSandboxRequest{}),
		run("no metadata", invalid, "metadata", func(c *cri.PodSandboxConfig) { c.Metadata = nil }),
		run("no name", invalid, "name", func(c *cri.PodSandboxConfig) { c.Metadata.Name = "" }),
		run("no namespace", invalid, "namespace", func(c *cri.PodSandboxConfig) { c.Metadata.Namespace = "" }),
		run("no uid", invalid, "uid", func(c *cri.PodSandboxConfig) { c.Metadata.Uid = "" }),
		bad("unknown handler", invalid+"|"+notFound, "no-such-handler", s.n.Runtime.RunPodSandbox,
			&cri.RunPodSandboxRequest{Config: s.n.PodConfig(), RuntimeHandler: "no-such-handler"}),
		run("sysctl of the host", invalid, "kernel.panic", func(c *cri.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"kernel.panic": "1"} }),
		run("sysctl that is none", invalid, "../x", func(c *cri.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"net.../x": "1"} }),
		run("network sysctl on the host's network", invalid, "net.ipv4", func(c *cri.PodSandboxConfig) {
			options(c).Network = cri.NamespaceMode_NODE
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1"}
		}),
		run("log directory relative", invalid, "log_directory", func(c *cri.PodSandboxConfig) { c.LogDirectory = "logs" }),
		run("host name too long", invalid, "hostname", func(c *cri.PodSandboxConfig) { c.Hostname = strings.Repeat("x", 65) }),
		run("port out of range", invalid, "port", func(c *cri.PodSandboxConfig) {
			c.PortMappings = []*cri.PortMapping{{ContainerPort: 70000, HostPort: 80}}
		}),
		run("port's protocol", invalid, "protocol", func(c *cri.PodSandboxConfig) {
			c.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 80, Protocol: 9}}
		}),
		run("port's address", invalid, "host_ip", func(c *cri.PodSandboxConfig) {
			c.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: 80, HostIp: "not-an-ip"}}
		}),
		run("pid target", invalid, "pid", func(c *cri.PodSandboxConfig) { options(c).Pid = cri.NamespaceMode_TARGET }),
		run("network of a container", invalid, "network", func(c *cri.PodSandboxConfig) { options(c).Network = cri.NamespaceMode_CONTAINER }),
		run("ipc of a container", invalid, "ipc", func(c *cri.PodSandboxConfig) { options(c).Ipc = cri.NamespaceMode_CONTAINER }),
		run("user namespace without mappings", invalid+"|Unimplemented", "userns", func(c *cri.PodSandboxConfig) {
			options(c).UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_POD}
		}),
		run("seccomp profile missing", invalid+"|"+notFound, "/no/such/profile.json", func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "/no/such/profile.json"}
		}),
		run("cgroup parent climbs", invalid, "cgroup_parent", func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = "/../../etc" }),
		run("cgroup parent is a slice", invalid, "cgroup", func(c *cri.PodSandboxConfig) { c.Linux.CgroupParent = "/" + s.n.Name + "/kubepods-pod1.slice" }),
		run("DNS server with a newline", invalid, "dns", func(c *cri.PodSandboxConfig) { c.DnsConfig.Servers = []string{"1.1.1.1\noptions x"} }),
		run("group without user", invalid, "run_as_group", func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: 5}
		}),
		run("too big", "ResourceExhausted", "larger", func(c *cri.PodSandboxConfig) {
			c.Annotations = map[string]string{"big": strings.Repeat("x", 17<<20)}
		}),
		{"name taken", func(ctx context.Context) error {
			conf := proto.Clone(s.pod.Config).(*cri.PodSandboxConfig)
			conf.Hostname = "other"
			_, err := s.n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: conf})
			return err
		}, "AlreadyExists", s.pod.Config.Metadata.Name},
		bad("stop nothing", invalid, "pod_sandbox_id", s.n.Runtime.StopPodSandbox, &cri.StopPodSandboxRequest{}),
		bad("remove nothing", invalid, "pod_sandbox_id", s.n.Runtime.RemovePodSandbox, &cri.RemovePodSandboxRequest{}),
		bad("status of nothing", invalid, "pod_sandbox_id", s.n.Runtime.PodSandboxStatus, &cri.PodSandboxStatusRequest{}),
		bad("status of the unknown", notFound, unknown, s.n.Runtime.PodSandboxStatus, &cri.PodSandboxStatusRequest{PodSandboxId: unknown}),
	}
}

func (s *scene) containerCases() []badCase {
	request := func(edit func(*cri.ContainerConfig)) *cri.CreateContainerRequest {
		return &cri.CreateContainerRequest{PodSandboxId: s.pod.ID, SandboxConfig: s.pod.Config, Config: s.pod.ContainerConfig(sleeper, edit)}
	}
	create := func(name, code, word string, edit func(*cri.ContainerConfig)) badCase {
		return bad(name, code, word, s.n.Runtime.CreateContainer, request(edit))
	}
	secure := func(name, code, word string, edit func(*cri.LinuxContainerSecurityContext)) badCase {
		return create(name, code, word, security(edit))
	}
	limited := func(name, word string, r *cri.LinuxContainerResources) badCase {
		return create(name, invalid+"|"+notNow, word, resources(r))
	}
	in := func(pod string) *cri.CreateContainerRequest {
		r := request(func(*cri.ContainerConfig) {})
		r.PodSandboxId = pod
		if pod == s.gone.ID {
			r.SandboxConfig = s.gone.Config
		}
		return r
	}
	return []badCase{
		bad("no sandbox", invalid, "pod_sandbox_id", s.n.Runtime.CreateContainer, in("")),
		bad("unknown sandbox", notFound, unknown, s.n.Runtime.CreateContainer, in(unknown)),
		bad("stopped sandbox", notNow, "ready", s.n.Runtime.CreateContainer, in(s.gone.ID)),
		bad("no config", invalid, "config", s.n.Runtime.CreateContainer, &cri.CreateContainerRequest{PodSandboxId: s.pod.ID, SandboxConfig: s.pod.Config}),
		create("no metadata", invalid, "metadata", func(c *cri.ContainerConfig) { c.Metadata = nil }),
		create("no name", invalid, "name", func(c *cri.ContainerConfig) { c.Metadata.Name = "" }),
		create("name taken", "AlreadyExists", s.running.Config.Metadata.Name, func(c *cri.ContainerConfig) {
			c.Metadata.Name = s.running.Config.Metadata.Name
			c.Command = []string{"another"}
		}),
		create("no image", invalid, "image", func(c *cri.ContainerConfig) { c.Image = nil }),
		create("empty image", invalid, "image", func(c *cri.ContainerConfig) { c.Image.Image = "" }),
		create("unknown image", notFound, "no-such-image", image(harness.RegistryHost+"/no-such-image:1")),
		create("bad image reference", invalid+"|"+notFound, "image", image("UPPER CASE")),
		create("nothing to run", invalid, "command", func(c *cri.ContainerConfig) { c.Command = nil }),
		create("NUL in an argument", invalid, "args", func(c *cri.ContainerConfig) { c.Args = []string{"a\x00b"} }),
		create("relative directory", invalid, "working_dir", func(c *cri.ContainerConfig) { c.WorkingDir = "tmp" }),
		create("variable without a name", invalid, "env", func(c *cri.ContainerConfig) { c.Envs = []*cri.KeyValue{{Value: []byte("x")}} }),
		create("equals sign in a variable's name", invalid, "env", func(c *cri.ContainerConfig) { c.Envs = []*cri.KeyValue{{Key: "A=B", Value: []byte("x")}} }),
		create("NUL in a variable", invalid, "env", func(c *cri.ContainerConfig) { c.Envs = []*cri.KeyValue{{Key: "A", Value: []byte("x\x00y")}} }),
		create("log climbs", invalid, "log_path", func(c *cri.ContainerConfig) { c.LogPath = "../../x.log" }),
		create("log absolute", invalid, "log_path", func(c *cri.ContainerConfig) { c.LogPath = "/tmp/x.log" }),
		create("mount without a source", invalid, "host_path", mounts(&cri.Mount{ContainerPath: "/x"})),
		create("mount without a place", invalid, "container_path", mounts(&cri.Mount{HostPath: s.n.Volumes})),
		create("mount source missing", invalid+"|"+notFound+"|"+notNow, "/no/such/source", mounts(&cri.Mount{HostPath: "/no/such/source", ContainerPath: "/x"})),
		create("mount source relative", invalid, "host_path", mounts(&cri.Mount{HostPath: "relative", ContainerPath: "/x"})),
		create("mount propagation", invalid, "propagation", mounts(&cri.Mount{HostPath: s.n.Volumes, ContainerPath: "/x", Propagation: 9})),
		create("recursive read-only, but writable", invalid, "recursive_read_only", mounts(&cri.Mount{HostPath: s.n.Volumes, ContainerPath: "/x", RecursiveReadOnly: true})),
		create("recursive read-only with propagation", invalid, "recursive_read_only", mounts(&cri.Mount{HostPath: s.n.Volumes, ContainerPath: "/x",
			Readonly: true, RecursiveReadOnly: true, Propagation: cri.MountPropagation_PROPAGATION_BIDIRECTIONAL})),
		create("image mount unknown", notFound, "no-such-image", mounts(&cri.Mount{ContainerPath: "/x", Image: &cri.ImageSpec{Image: harness.RegistryHost + "/no-such-image:1"}})),
		create("device missing", invalid+"|"+notFound, "/dev/no-such-device", func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/dev/no-such-device", ContainerPath: "/dev/x", Permissions: "r"}}
		}),
		create("device permissions", invalid, "permissions", func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "xyz"}}
		}),
		create("CDI device unknown", invalid+"|"+notFound, "example.com/no=such", func(c *cri.ContainerConfig) {
			c.CDIDevices = []*cri.CDIDevice{{Name: "example.com/no=such"}}
		}),
		create("stop signal", invalid, "stop_signal", func(c *cri.ContainerConfig) { c.StopSignal = 999 }),
		secure("capability", invalid, "NO_SUCH", func(x *cri.LinuxContainerSecurityContext) {
			x.Capabilities = &cri.Capability{AddCapabilities: []string{"NO_SUCH"}}
		}),
		secure("user name unknown", invalid+"|"+notFound, "nobody-here", func(x *cri.LinuxContainerSecurityContext) { x.RunAsUsername = "nobody-here" }),
		secure("user negative", invalid, "run_as_user", func(x *cri.LinuxContainerSecurityContext) { x.RunAsUser = &cri.Int64Value{Value: -1} }),
		secure("group without user", invalid, "run_as_group", func(x *cri.LinuxContainerSecurityContext) { x.RunAsGroup = &cri.Int64Value{Value: 1} }),
		secure("user and user name", invalid, "run_as_user", func(x *cri.LinuxContainerSecurityContext) {
			x.RunAsUser, x.RunAsUsername = &cri.Int64Value{Value: 1}, "tester"
		}),
		secure("supplemental group negative", invalid, "supplemental_groups", func(x *cri.LinuxContainerSecurityContext) { x.SupplementalGroups = []int64{-5} }),
		secure("target unknown", invalid+"|"+notFound, "target", func(x *cri.LinuxContainerSecurityContext) {
			x.NamespaceOptions.Pid, x.NamespaceOptions.TargetId = cri.NamespaceMode_TARGET, unknown
		}),
		secure("target not running", invalid+"|"+notFound+"|"+notNow, "target", func(x *cri.LinuxContainerSecurityContext) {
			x.NamespaceOptions.Pid, x.NamespaceOptions.TargetId = cri.NamespaceMode_TARGET, s.exited.ID
		}),
		secure("host network in a pod without", invalid, "network", func(x *cri.LinuxContainerSecurityContext) { x.NamespaceOptions.Network = cri.NamespaceMode_NODE }),
		secure("host IPC in a pod without", invalid, "ipc", func(x *cri.LinuxContainerSecurityContext) { x.NamespaceOptions.Ipc = cri.NamespaceMode_NODE }),
		secure("privileged in a pod that is not", invalid+"|"+notNow+"|PermissionDenied", "privileged", func(x *cri.LinuxContainerSecurityContext) { x.Privileged = true }),
		secure("seccomp profile missing", invalid+"|"+notFound, "/no/such/profile.json", func(x *cri.LinuxContainerSecurityContext) {
			x.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "/no/such/profile.json"}
		}),
		limited("memory negative", "memory", &cri.LinuxContainerResources{MemoryLimitInBytes: -5}),
		limited("quota negative", "cpu_quota", &cri.LinuxContainerResources{CpuQuota: -5, CpuPeriod: 100000}),
		limited("period of a microsecond", "cpu_period", &cri.LinuxContainerResources{CpuQuota: 5000, CpuPeriod: 1}),
		limited("shares negative", "cpu_shares", &cri.LinuxContainerResources{CpuShares: -2}),
		limited("CPU set", "cpuset_cpus", &cri.LinuxContainerResources{CpusetCpus: "no-cpus"}),
		limited("OOM score", "oom_score_adj", &cri.LinuxContainerResources{OomScoreAdj: 5000}),
		limited("huge page size", "huge", &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "3MB", Limit: 1}}}),
	}
}

func (s *scene) lifeCases() []badCase {
	r := s.n.Runtime
	return []badCase{
		bad("start nothing", invalid, "container_id", r.StartContainer, &cri.StartContainerRequest{}),
		bad("start the unknown", notFound, unknown, r.StartContainer, &cri.StartContainerRequest{ContainerId: unknown}),
		bad("start the exited", notNow, "exited", r.StartContainer, &cri.StartContainerRequest{ContainerId: s.exited.ID}),
		bad("stop nothing", invalid, "container_id", r.StopContainer, &cri.StopContainerRequest{}),
		bad("remove nothing", invalid, "container_id", r.RemoveContainer, &cri.RemoveContainerRequest{}),
		bad("status of nothing", invalid, "container_id", r.ContainerStatus, &cri.ContainerStatusRequest{}),
		bad("status of the unknown", notFound, unknown, r.ContainerStatus, &cri.ContainerStatusRequest{ContainerId: unknown}),
		bad("update nothing", invalid, "container_id", r.UpdateContainerResources, &cri.UpdateContainerResourcesRequest{Linux: &cri.LinuxContainerResources{CpuShares: 2}}),
		bad("update the unknown", notFound, unknown, r.UpdateContainerResources, &cri.UpdateContainerResourcesRequest{ContainerId: unknown, Linux: &cri.LinuxContainerResources{CpuShares: 2}}),
		bad("update without resources", invalid, "linux", r.UpdateContainerResources, &cri.UpdateContainerResourcesRequest{ContainerId: s.running.ID}),
		bad("update to nonsense", invalid, "memory", r.UpdateContainerResources, &cri.UpdateContainerResourcesRequest{ContainerId: s.running.ID, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: -7}}),
		bad("update the exited", notNow, "exited", r.UpdateContainerResources, &cri.UpdateContainerResourcesRequest{ContainerId: s.exited.ID, Linux: &cri.LinuxContainerResources{CpuShares: 2}}),
		bad("reopen nothing", invalid, "container_id", r.ReopenContainerLog, &cri.ReopenContainerLogRequest{}),
		bad("reopen the unknown", notFound, unknown, r.ReopenContainerLog, &cri.ReopenContainerLogRequest{ContainerId: unknown}),
		bad("reopen the exited", notNow, "running", r.ReopenContainerLog, &cri.ReopenContainerLogRequest{ContainerId: s.exited.ID}),
	}
}

func (s *scene) streamCases() []badCase {
	r := s.n.Runtime
	exec := func(edit func(*cri.ExecRequest)) *cri.ExecRequest {
		q := &cri.ExecRequest{ContainerId: s.running.ID, Cmd: []string{"true"}, Stdout: true}
		edit(q)
		return q
	}
	attach := func(edit func(*cri.AttachRequest)) *cri.AttachRequest {
		q := &cri.AttachRequest{ContainerId: s.running.ID, Stdout: true}
		edit(q)
		return q
	}
	return []badCase{
		bad("exec sync in nothing", invalid, "container_id", r.ExecSync, &cri.ExecSyncRequest{Cmd: []string{"true"}}),
		bad("exec sync in the unknown", notFound, unknown, r.ExecSync, &cri.ExecSyncRequest{ContainerId: unknown, Cmd: []string{"true"}}),
		bad("exec sync of nothing", invalid, "cmd", r.ExecSync, &cri.ExecSyncRequest{ContainerId: s.running.ID}),
		bad("exec sync in the created", notNow, "running", r.ExecSync, &cri.ExecSyncRequest{ContainerId: s.created.ID, Cmd: []string{"true"}}),
		bad("exec sync in the exited", notNow, "running", r.ExecSync, &cri.ExecSyncRequest{ContainerId: s.exited.ID, Cmd: []string{"true"}}),
		bad("exec sync for negative time", invalid, "timeout", r.ExecSync, &cri.ExecSyncRequest{ContainerId: s.running.ID, Cmd: []string{"true"}, Timeout: -1}),
		bad("exec sync of no program", invalid+"|"+notFound, "/no/such/program", r.ExecSync, &cri.ExecSyncRequest{ContainerId: s.running.ID, Cmd: []string{"/no/such/program"}}),
		bad("exec in nothing", invalid, "container_id", r.Exec, exec(func(q *cri.ExecRequest) { q.ContainerId = "" })),
		bad("exec in the unknown", notFound, unknown, r.Exec, exec(func(q *cri.ExecRequest) { q.ContainerId = unknown })),
		bad("exec in the exited", notNow, "running", r.Exec, exec(func(q *cri.ExecRequest) { q.ContainerId = s.exited.ID })),
		bad("exec of nothing", invalid, "cmd", r.Exec, exec(func(q *cri.ExecRequest) { q.Cmd = nil })),
		bad("exec without streams", invalid, "stdout", r.Exec, exec(func(q *cri.ExecRequest) { q.Stdout = false })),
		bad("exec with terminal and stderr", invalid, "terminal", r.Exec, exec(func(q *cri.ExecRequest) { q.Tty, q.Stderr = true, true })),
		bad("attach to nothing", invalid, "container_id", r.Attach, attach(func(q *cri.AttachRequest) { q.ContainerId = "" })),
		bad("attach to the unknown", notFound, unknown, r.Attach, attach(func(q *cri.AttachRequest) { q.ContainerId = unknown })),
		bad("attach to the exited", notNow, "running", r.Attach, attach(func(q *cri.AttachRequest) { q.ContainerId = s.exited.ID })),
		bad("attach without streams", invalid, "stdout", r.Attach, attach(func(q *cri.AttachRequest) { q.Stdout = false })),
		bad("attach with terminal and stderr", invalid, "terminal", r.Attach, attach(func(q *cri.AttachRequest) { q.Tty, q.Stderr = true, true })),
		bad("forward to nothing", invalid, "pod_sandbox_id", r.PortForward, &cri.PortForwardRequest{Port: []int32{80}}),
		bad("forward to the unknown", notFound, unknown, r.PortForward, &cri.PortForwardRequest{PodSandboxId: unknown, Port: []int32{80}}),
		bad("forward to the stopped", notNow, "ready", r.PortForward, &cri.PortForwardRequest{PodSandboxId: s.gone.ID, Port: []int32{80}}),
		bad("forward a port that is none", invalid, "port", r.PortForward, &cri.PortForwardRequest{PodSandboxId: s.pod.ID, Port: []int32{70000}}),
	}
}

func (s *scene) statsCases() []badCase {
	r := s.n.Runtime
	return []badCase{
		bad("of no container", invalid, "container_id", r.ContainerStats, &cri.ContainerStatsRequest{}),
		bad("of the unknown container", notFound, unknown, r.ContainerStats, &cri.ContainerStatsRequest{ContainerId: unknown}),
		bad("of no sandbox", invalid, "pod_sandbox_id", r.PodSandboxStats, &cri.PodSandboxStatsRequest{}),
		bad("of the unknown sandbox", notFound, unknown, r.PodSandboxStats, &cri.PodSandboxStatsRequest{PodSandboxId: unknown}),
		bad("of a container that has ended", notNow, s.exited.ID, r.ContainerStats, &cri.ContainerStatsRequest{ContainerId: s.exited.ID}),
		bad("of a container that was never started", notNow, s.created.ID, r.ContainerStats, &cri.ContainerStatsRequest{ContainerId: s.created.ID}),
		bad("of a sandbox that was stopped", notNow, s.gone.ID, r.PodSandboxStats, &cri.PodSandboxStatsRequest{PodSandboxId: s.gone.ID}),
	}
}

func (s *scene) imageCases() []badCase {
	pull := func(name, code, word, ref string) badCase {
		return bad(name, code, word, s.n.Images.PullImage, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	}
	return []badCase{
		bad("pull nothing", invalid, "image", s.n.Images.PullImage, &cri.PullImageRequest{}),
		pull("pull an empty name", invalid, "image", ""),
		pull("pull a bad name", invalid, "UPPER", harness.RegistryHost+"/UPPER:1"),
		pull("pull a bad tag", invalid, "tag", harness.RegistryHost+"/busybox:a tag"),
		pull("pull a bad digest", invalid, "sha256:12", harness.RegistryHost+"/busybox@sha256:12"),
		pull("pull an unknown repository", notFound, "no-such-image", harness.RegistryHost+"/no-such-image:1"),
		pull("pull an unknown tag", notFound, "no-such-tag", harness.RegistryHost+"/busybox:no-such-tag"),
		pull("pull an unknown digest", notFound, "0000", harness.RegistryHost+"/busybox@sha256:"+strings.Repeat("0", 64)),
		bad("status of nothing", invalid, "image", s.n.Images.ImageStatus, &cri.ImageStatusRequest{}),
		bad("status of an empty name", invalid, "image", s.n.Images.ImageStatus, &cri.ImageStatusRequest{Image: &cri.ImageSpec{}}),
		bad("remove nothing", invalid, "image", s.n.Images.RemoveImage, &cri.RemoveImageRequest{}),
		bad("remove an empty name", invalid, "image", s.n.Images.RemoveImage, &cri.RemoveImageRequest{Image: &cri.ImageSpec{}}),
	}
}

// Registries that answer garbage, lie about digests, refuse or hang: the pull
// ends with a fitting code, in time, and leaves no image.
func TestBadRegistries(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{NoPull: true})
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	const empty = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	manifest := fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","size":2,"digest":%q},"layers":[]}`, manifestType, empty)
	hang := make(chan struct{})
	release := sync.OnceFunc(func() { close(hang) })
	cases := []struct {
		name, code, word string
		answer           http.HandlerFunc
	}{
		{"error", "Unavailable|Internal|Unknown", "500", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }},
		{"no manifest", "Internal|Unknown|" + invalid + "|" + notNow + "|DataLoss", "manifest", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", manifestType)
			_, _ = w.Write([]byte("<html>this is no manifest</html>"))
		}},
		{"refuses", "Unauthenticated|PermissionDenied", "authori", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(401)
		}},
		{"lies about a blob", "Internal|Unknown|" + notNow + "|DataLoss|" + invalid, "digest", func(w http.ResponseWriter, r *http.Request) {
			if strings.Contains(r.URL.Path, "/blobs/") {
				_, _ = w.Write([]byte("{}"))
				return
			}
			w.Header().Set("Content-Type", manifestType)
			_, _ = w.Write([]byte(manifest))
		}},
		{"hangs", "DeadlineExceeded", "", func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-hang:
			case <-r.Context().Done():
			}
		}},
	}
	for i, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			n := n.With(t)
			server := httptest.NewServer(tc.answer)
			defer server.Close()
			// A pull may go on, and try again, for the sake of a caller's retry.
			defer server.CloseClientConnections()
			if tc.name == "hangs" {
				defer release()
			}
			host := fmt.Sprintf("bad%d.test", i)
			if err := n.WriteHosts(host, server.URL); err != nil {
				t.Fatal(err)
			}
			before := n.State()
			ctx, cancel := context.WithTimeout(n.Context(), 5*time.Second)
			defer cancel()
			_, err := n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: host + "/image:1"}})
			checkCode(t, err, tc.code, tc.word)
			lost, added := difference(before, n.State())
			for _, line := range append(lost, added...) {
				// Content fetched before the failure may stay for the next try until it
				// is collected; an image may not.
				if !strings.HasPrefix(line, "file "+n.Root) {
					t.Errorf("changed: %s", line)
				}
			}
		})
	}
}
