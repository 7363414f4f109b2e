package cricoverage

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// unseen are the fields that cannot be set or seen here, and why.
var unseen = map[string]string{
	"PodSandboxStats.windows":                "another operating system's",
	"ContainerResources.windows":             "another operating system's",
	"RestorePodResponse.pod_sandbox_id":      "RestorePod is refused",
	"RestorePodResponse.restored_containers": "RestorePod is refused",
	"RestoredContainer.name":                 "RestorePod is refused",
	"RestoredContainer.container_id":         "RestorePod is refused",
}

// TestCoverage calls every RPC and sets every field on a podshim of its own, and
// counts: a call that is answered, a field that is accepted, refused by name, or in
// an answer. What the fields do is shown by the tests that docs/cri.md names.
func TestCoverage(t *testing.T) {
	harness.NeedRoot(t)
	o := newObserver()
	s := newScene(t, o)
	for _, step := range []func(){
		s.versionAndStatus, s.images, s.sandboxes, s.containers, s.more, s.refusals, s.lists, s.updates, s.streams, s.stats, s.readEvents, s.ends,
	} {
		step()
	}
	a := readAPI()
	var missing, none []string
	answered, fields, seen := 0, 0, 0
	for _, m := range a.methods {
		name := string(m.Name())
		switch {
		case o.answered[name]:
			answered++
		case o.refused[name]:
			none = append(none, name+" (refused, says what is missing)")
			// Refused whole: so is each of its fields.
			for i := range m.Input().Fields().Len() {
				o.fields[key(m.Input().Fields().Get(i))] = true
			}
		default:
			t.Errorf("%s was not answered", name)
		}
	}
	for _, m := range a.messages {
		for i := range m.Fields().Len() {
			if wrapped(m) {
				continue
			}
			fields++
			k := key(m.Fields().Get(i))
			switch {
			case o.fields[k]:
				seen++
				if unseen[k] != "" {
					t.Errorf("%s was seen: %q is wrong", k, unseen[k])
				}
			case unseen[k] != "":
				missing = append(missing, k+" ("+unseen[k]+")")
			case slices.Contains(s.machine, k):
				missing = append(missing, k+" (this machine has none)")
			default:
				t.Errorf("%s was neither accepted, nor refused by name, nor in an answer", k)
			}
		}
	}
	fmt.Printf("not answered: %s\nnot seen: %s\ncri-coverage: %d of %d RPCs, %d of %d fields\n",
		strings.Join(none, ", "), strings.Join(missing, ", "), answered, len(a.methods), seen, fields)
}

// scene is what the calls are made with.
type scene struct {
	t *testing.T
	o *observer
	n *harness.Node
	// machine are fields of what this machine has not: they may stay unseen.
	machine []string

	events             cri.RuntimeService_GetContainerEventsClient
	full, inUser, node *harness.Pod
	running, started   *harness.Container
	shared             string
	volume             string // an image
}

func newScene(t *testing.T, o *observer) *scene {
	n := harness.Start(t, harness.Options{
		NoNetwork: true, Image: fmt.Sprintf("pinned = [%q]", harness.Busybox), NoPull: true,
		Config: "[runtime.handlers.other]\npids_limit = 1000\n",
	})
	s := &scene{t: t, o: o, n: n}
	conn, err := o.dial(n.Socket)
	s.must(err)
	runtime, images := n.Runtime, n.Images
	t.Cleanup(func() {
		n.Runtime, n.Images = runtime, images
		conn.Close()
	})
	n.Runtime, n.Images = cri.NewRuntimeServiceClient(conn), cri.NewImageServiceClient(conn)
	if _, err := os.Stat("/proc/pressure/cpu"); err != nil || !pressureInCgroups() {
		s.machine = append(s.machine, "CpuUsage.psi", "MemoryUsage.psi", "IoUsage.psi", "PsiStats.Full", "PsiStats.Some",
			"PsiData.Total", "PsiData.Avg10", "PsiData.Avg60", "PsiData.Avg300", "LinuxPodSandboxStats.io", "ContainerStats.io", "IoUsage.timestamp")
	}
	// Claimed where the kernel was seen to do it.
	s.machine = append(s.machine, "RuntimeFeatures.user_namespaces_host_network")
	// The averages are zero, which proto3 does not send, where nobody has waited.
	s.machine = append(s.machine, "PsiData.Avg10", "PsiData.Avg60", "PsiData.Avg300")
	return s
}

// pressureInCgroups tells whether the kernel has pressure files for cgroups, which
// cgroup v2 has only.
func pressureInCgroups() bool {
	found, _ := filepath.Glob("/sys/fs/cgroup/*.pressure")
	more, _ := filepath.Glob("/sys/fs/cgroup/*/cpu.pressure")
	return len(found)+len(more) > 0
}

func (s *scene) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// mustFail is for calls that have to be refused: the observer looks whether the
// error names the field.
func (s *scene) mustFail(err error) {
	s.t.Helper()
	if err == nil {
		s.t.Error("was not refused")
	}
}

func (s *scene) versionAndStatus() {
	ctx, r := s.n.Context(), s.n.Runtime
	_, err := r.Version(ctx, &cri.VersionRequest{Version: "v1"})
	s.must(err)
	_, err = r.RuntimeConfig(ctx, &cri.RuntimeConfigRequest{})
	s.must(err)
	_, err = r.Status(ctx, &cri.StatusRequest{Verbose: true}) // says why there is no network
	s.must(err)
	_, err = r.UpdateRuntimeConfig(ctx, &cri.UpdateRuntimeConfigRequest{RuntimeConfig: &cri.RuntimeConfig{
		NetworkConfig: &cri.NetworkConfig{PodCidr: "10.1.0.0/24"}}})
	s.must(err)
	// Two families, so that pods have more than one address.
	s.must(os.WriteFile(s.n.CNIConf+"/10-test.conflist", fmt.Appendf(nil, `{"cniVersion": "1.0.0", "name": %q, "plugins": [
 {"type": "bridge", "bridge": %q, "isGateway": true,
  "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}], [{"subnet": "fd00:211::/64"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
 {"type": "portmap", "capabilities": {"portMappings": true}}]}`, s.n.Name, s.n.Bridge, s.n.IPAM, s.n.Subnet), 0o600))
	for until := time.Now().Add(harness.Limit); ; time.Sleep(5 * time.Millisecond) {
		st, err := r.Status(ctx, &cri.StatusRequest{})
		s.must(err)
		if st.Status.Conditions[1].Status {
			break
		}
		if time.Now().After(until) {
			s.t.Fatalf("no network: %v", st)
		}
	}
	s.events, err = r.GetContainerEvents(ctx, &cri.GetEventsRequest{})
	s.must(err)
	_, err = s.events.Header()
	s.must(err)
}

func (s *scene) images() {
	ctx, r := s.n.Context(), s.n.Images
	registry, err := harness.LoopbackRegistry()
	s.must(err)
	_, err = r.PullImage(ctx, &cri.PullImageRequest{
		Image: &cri.ImageSpec{Image: harness.Busybox, Annotations: map[string]string{"a": "b"}, UserSpecifiedImage: "x", RuntimeHandler: "other"},
		Auth: &cri.AuthConfig{Username: "u", Password: "p", Auth: "dTpw", ServerAddress: "http://" + registry.Addr,
			IdentityToken: "i", RegistryToken: "r"},
		SandboxConfig: s.n.PodConfig(),
	})
	s.must(err)
	for _, user := range []string{"1000", "www-data"} {
		opts := harness.ImageOptions{Files: map[string]string{"sub/file": user}}
		opts.Config.User = user
		s.volume = s.n.NewImage("user-"+user, opts)
	}
	_, err = r.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: s.volume}, Verbose: true})
	s.must(err)
}

func everyResource() *cri.LinuxContainerResources {
	return &cri.LinuxContainerResources{CpuPeriod: 100_000, CpuQuota: 50_000, CpuShares: 512, MemoryLimitInBytes: 256 << 20,
		OomScoreAdj: 500, CpusetCpus: "0", CpusetMems: "0"}
}

var mapping = []*cri.IDMapping{{HostId: 1_000_000, ContainerId: 0, Length: 1000}, {HostId: 1_001_000, ContainerId: 1000, Length: 64536}}

func (s *scene) sandboxes() {
	profile := filepath.Join(s.n.Dir, "seccomp.json")
	s.must(os.WriteFile(profile, []byte(`{"defaultAction": "SCMP_ACT_ALLOW"}`), 0o600))
	local := &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: profile}
	selinux := &cri.SELinuxOption{User: "system_u", Role: "system_r", Type: "spc_t", Level: "s0:c1,c2"}
	conf := s.n.PodConfig(func(c *cri.PodSandboxConfig) {
		c.Metadata.Attempt = 1
		c.DnsConfig.Options = []string{"ndots:5"}
		c.PortMappings = []*cri.PortMapping{{Protocol: cri.Protocol_UDP, ContainerPort: 53, HostPort: 28462, HostIp: "127.0.0.1"}}
		c.Annotations = map[string]string{"a": "b"}
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "77"}
		c.Linux.Overhead, c.Linux.Resources = everyResource(), everyResource()
		x := c.Linux.SecurityContext
		x.NamespaceOptions.Ipc = cri.NamespaceMode_NODE
		x.SelinuxOptions, x.Seccomp = selinux, local
		x.RunAsUser, x.RunAsGroup = &cri.Int64Value{Value: 1}, &cri.Int64Value{Value: 1}
		x.ReadonlyRootfs, x.Privileged = true, true
		x.SupplementalGroups, x.SupplementalGroupsPolicy = []int64{7}, cri.SupplementalGroupsPolicy_Strict
		x.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
		x.SeccompProfilePath = "runtime/default" //nolint:staticcheck // what is tested
	})
	s.full = s.n.RunConfig(conf, "other")
	s.inUser = s.n.RunPod(func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cri.UserNamespace{Uids: mapping, Gids: mapping}
	})
	s.node = s.n.RunPod(func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_NODE,
			UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_NODE}}
	})
	for _, p := range []*harness.Pod{s.full, s.node} {
		_, err := s.n.Runtime.PodSandboxStatus(s.n.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: p.ID, Verbose: true})
		s.must(err)
	}
}

var sleeper = []string{"sh", "-c", "trap 'exit 3' TERM QUIT; echo ready; sleep 100000 & wait"}

func (s *scene) containers() {
	s.shared = filepath.Join(s.n.Volumes, "shared")
	for _, err := range []error{os.Mkdir(s.shared, 0o755), unix.Mount(s.shared, s.shared, "", unix.MS_BIND, ""), unix.Mount("", s.shared, "", unix.MS_SHARED, "")} {
		s.must(err)
	}
	s.t.Cleanup(func() { _ = unix.Unmount(s.shared, unix.MNT_DETACH) })
	kind := s.cdi()
	s.running = s.full.Create(sleeper[:1], func(c *cri.ContainerConfig) {
		c.Metadata.Attempt = 1
		id := s.n.Pull(harness.Busybox)
		c.Image = &cri.ImageSpec{Image: harness.Busybox, Annotations: map[string]string{"a": "b"}, UserSpecifiedImage: "x", RuntimeHandler: "other", ImageRef: id}
		c.Args, c.WorkingDir = sleeper[1:], "/tmp"
		c.Envs = []*cri.KeyValue{{Key: "KEY", Value: []byte("value")}}
		c.Mounts = []*cri.Mount{
			{ContainerPath: "/ro", HostPath: s.n.Volumes, Readonly: true, RecursiveReadOnly: true, SelinuxRelabel: true, MountOptions: []string{"noexec"}},
			{ContainerPath: "/shared", HostPath: s.shared, Propagation: cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
			{ContainerPath: "/image", Image: &cri.ImageSpec{Image: s.volume}, ImageSubPath: "sub"},
		}
		c.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "/dev/mine", Permissions: "r"}}
		c.CDIDevices = []*cri.CDIDevice{{Name: kind + "=one"}}
		c.Labels, c.Annotations = map[string]string{"a": "b"}, map[string]string{"a": "b"}
		c.Stdin, c.StdinOnce, c.StopSignal = true, true, cri.Signal_SIGNAL_SIGQUIT
		c.Linux.Resources = everyResource()
		x := c.Linux.SecurityContext
		x.Capabilities = &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"KILL"}, AddAmbientCapabilities: []string{"CHOWN"}}
		x.SelinuxOptions = &cri.SELinuxOption{Type: "spc_t"}
		x.RunAsUser, x.RunAsGroup = &cri.Int64Value{Value: 0}, &cri.Int64Value{Value: 1}
		x.ReadonlyRootfs, x.NoNewPrivs = true, true
		x.SupplementalGroups, x.SupplementalGroupsPolicy = []int64{7}, cri.SupplementalGroupsPolicy_Strict
		x.MaskedPaths, x.ReadonlyPaths = []string{"/proc/kcore"}, []string{"/proc/sys"}
		x.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
		x.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
		x.SeccompProfilePath, x.ApparmorProfile = "unconfined", "unconfined" //nolint:staticcheck // what is tested
	})
	s.running.Start()
	s.running.WaitLog("ready")
}

// cdi describes a CDI device, and gives its kind.
func (s *scene) cdi() string {
	const dir = "/var/run/cdi"
	s.must(os.MkdirAll(dir, 0o755))
	kind := "podshim.test/c" + strconv.Itoa(os.Getpid())
	file := filepath.Join(dir, strings.ReplaceAll(kind, "/", "-")+".json")
	s.must(os.WriteFile(file, fmt.Appendf(nil, `{"cdiVersion": "0.6.0", "kind": %q, "devices": [{"name": "one", "containerEdits": {"env": ["ONE=1"]}}]}`, kind), 0o644))
	s.t.Cleanup(func() { os.Remove(file) })
	return kind
}

// more are the containers with what does not go together.
func (s *scene) more() {
	s.full.Run(sleeper, func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged, c.Tty = true, true })
	s.full.Run(sleeper, func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = "tester" })
	s.full.Run(sleeper, func(c *cri.ContainerConfig) {
		o := c.Linux.SecurityContext.NamespaceOptions
		o.Pid, o.TargetId = cri.NamespaceMode_TARGET, s.running.ID
	})
	s.inUser.Run(sleeper, func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = s.inUser.Config.Linux.SecurityContext.NamespaceOptions.UsernsOptions
		c.Mounts = []*cri.Mount{{ContainerPath: "/volume", HostPath: s.n.Volumes, UidMappings: mapping, GidMappings: mapping}}
	})
	s.started = s.full.Create([]string{"/no/such/program"})
	_, err := s.n.Runtime.StartContainer(s.n.Context(), &cri.StartContainerRequest{ContainerId: s.started.ID})
	s.mustFail(err)
}

// refusals are the fields that no machine, or not this one, can honour.
func (s *scene) refusals() {
	ctx, r := s.n.Context(), s.n.Runtime
	_, err := r.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: s.n.PodConfig(func(c *cri.PodSandboxConfig) { c.Windows = &cri.WindowsPodSandboxConfig{} })})
	s.mustFail(err)
	for name, edit := range map[string]func(*cri.ContainerConfig){
		"windows": func(c *cri.ContainerConfig) { c.Windows = &cri.WindowsContainerConfig{} },
		// Refused, or honoured, by what the machine has.
		"hugepages": func(c *cri.ContainerConfig) {
			c.Linux.Resources = &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 2 << 20}}}
		},
		"unified": func(c *cri.ContainerConfig) {
			c.Linux.Resources = &cri.LinuxContainerResources{Unified: map[string]string{"memory.high": "100000000"}}
		},
		"swap": func(c *cri.ContainerConfig) {
			c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 128 << 20}
		},
	} {
		_, err := r.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: s.full.ID, Config: s.full.ContainerConfig(sleeper, edit), SandboxConfig: s.full.Config})
		if name == "windows" {
			s.mustFail(err)
		}
	}
	_, err = r.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: s.running.ID, Windows: &cri.WindowsContainerResources{}})
	s.mustFail(err)
	_, err = r.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: s.running.ID,
		Linux: &cri.LinuxContainerResources{CpuShares: 300}, Annotations: map[string]string{"a": "b"}})
	s.mustFail(err)
	_, err = r.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{ContainerId: s.running.ID, Location: s.n.Dir + "/c.tar", Timeout: 1})
	s.mustFail(err)
	_, err = r.CheckpointPod(ctx, &cri.CheckpointPodRequest{PodSandboxId: s.full.ID, OutputPath: s.n.Dir, ContainerIds: []string{s.running.ID}, Options: map[string]string{"a": "b"}})
	s.mustFail(err)
	_, err = r.RestorePod(ctx, &cri.RestorePodRequest{CheckpointPath: s.n.Dir, Config: s.full.Config, RuntimeHandler: "other",
		Options: map[string]string{"a": "b"}, ContainerConfigs: []*cri.ContainerConfig{s.running.Config}})
	s.mustFail(err)
}

func (s *scene) updates() {
	ctx, r := s.n.Context(), s.n.Runtime
	_, err := r.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: s.running.ID, Linux: everyResource()})
	s.must(err)
	_, err = r.UpdatePodSandboxResources(ctx, &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: s.full.ID,
		Overhead: &cri.LinuxContainerResources{CpuShares: 10}, Resources: &cri.LinuxContainerResources{CpuShares: 100}})
	s.must(err)
	_, err = r.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: s.running.ID})
	s.must(err)
	_, err = r.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: s.running.ID, Verbose: true})
	s.must(err)
	// With the one that could not be started, and one of a user who is not root.
	_, err = r.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: s.full.ID})
	s.must(err)
}

func (s *scene) streams() {
	ctx, r := s.n.Context(), s.n.Runtime
	_, err := r.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: s.running.ID, Cmd: []string{"sh", "-c", "echo out; echo err >&2; exit 7"}, Timeout: 30})
	s.must(err)
	for _, tty := range []bool{false, true} {
		_, err = r.Exec(ctx, &cri.ExecRequest{ContainerId: s.running.ID, Cmd: []string{"true"}, Tty: tty, Stdin: true, Stdout: true, Stderr: !tty})
		s.must(err)
	}
	terminal := s.full.Run(sleeper, func(c *cri.ContainerConfig) { c.Tty = true })
	_, err = r.Attach(ctx, &cri.AttachRequest{ContainerId: terminal.ID, Tty: true, Stdin: true, Stdout: true})
	s.must(err)
	_, err = r.Attach(ctx, &cri.AttachRequest{ContainerId: s.running.ID, Stderr: true})
	s.must(err)
	_, err = r.PortForward(ctx, &cri.PortForwardRequest{PodSandboxId: s.full.ID, Port: []int32{80}})
	s.must(err)
}

// all reads a stream to its end.
func all[M any](s *scene, stream interface{ Recv() (*M, error) }, err error) {
	s.t.Helper()
	s.must(err)
	for {
		if _, err := stream.Recv(); err != nil {
			if err.Error() != "EOF" {
				s.t.Error(err)
			}
			return
		}
	}
}

func (s *scene) lists() {
	ctx, r := s.n.Context(), s.n.Runtime
	pods := &cri.PodSandboxFilter{Id: s.full.ID, State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_NOTREADY}, LabelSelector: map[string]string{"a": "b"}}
	containers := &cri.ContainerFilter{Id: s.running.ID, PodSandboxId: s.full.ID, LabelSelector: map[string]string{"a": "b"},
		State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}}
	image := &cri.ImageFilter{Image: &cri.ImageSpec{Image: harness.Busybox}}
	for _, f := range []*cri.PodSandboxFilter{nil, pods} {
		_, err := r.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: f})
		s.must(err)
		stream, err := r.StreamPodSandboxes(ctx, &cri.StreamPodSandboxesRequest{Filter: f})
		all(s, stream, err)
	}
	for _, f := range []*cri.ContainerFilter{nil, containers} {
		_, err := r.ListContainers(ctx, &cri.ListContainersRequest{Filter: f})
		s.must(err)
		stream, err := r.StreamContainers(ctx, &cri.StreamContainersRequest{Filter: f})
		all(s, stream, err)
	}
	for _, f := range []*cri.ImageFilter{nil, image} {
		_, err := s.n.Images.ListImages(ctx, &cri.ListImagesRequest{Filter: f})
		s.must(err)
		stream, err := s.n.Images.StreamImages(ctx, &cri.StreamImagesRequest{Filter: f})
		all(s, stream, err)
	}
	_, err := s.n.Images.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
	s.must(err)
}

func (s *scene) stats() {
	ctx, r := s.n.Context(), s.n.Runtime
	// One more interface than the default one.
	out, err := exec.Command("nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", s.full.Infra().PID), "ip", "link", "add", "more0", "type", "veth", "peer", "name", "more1").CombinedOutput()
	if err != nil {
		s.t.Fatalf("%v: %s", err, out)
	}
	for range 2 { // the second time there is a rate
		_, err = r.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: s.running.ID})
		s.must(err)
		_, err = r.PodSandboxStats(ctx, &cri.PodSandboxStatsRequest{PodSandboxId: s.full.ID})
		s.must(err)
		_ = s.running.Output("sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
		time.Sleep(time.Second)
	}
	for _, f := range []*cri.ContainerStatsFilter{nil, {Id: s.running.ID, PodSandboxId: s.full.ID, LabelSelector: map[string]string{"a": "b"}}} {
		_, err = r.ListContainerStats(ctx, &cri.ListContainerStatsRequest{Filter: f})
		s.must(err)
		stream, err := r.StreamContainerStats(ctx, &cri.StreamContainerStatsRequest{Filter: f})
		all(s, stream, err)
	}
	for _, f := range []*cri.PodSandboxStatsFilter{nil, {Id: s.full.ID, LabelSelector: s.full.Config.Labels}} {
		_, err = r.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{Filter: f})
		s.must(err)
		stream, err := r.StreamPodSandboxStats(ctx, &cri.StreamPodSandboxStatsRequest{Filter: f})
		all(s, stream, err)
	}
	_, err = r.ListMetricDescriptors(ctx, &cri.ListMetricDescriptorsRequest{})
	s.must(err)
	_, err = r.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{})
	s.must(err)
	stream, err := r.StreamPodSandboxMetrics(ctx, &cri.StreamPodSandboxMetricsRequest{})
	all(s, stream, err)
}

// ends stops and removes, and looks at what that leaves.
func (s *scene) ends() {
	ctx, r := s.n.Context(), s.n.Runtime
	_, err := r.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: s.running.ID, Timeout: 10})
	s.must(err)
	s.running.WaitExit()
	_, err = r.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: s.running.ID})
	s.must(err)
	_, err = r.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: s.inUser.ID})
	s.must(err)
	_, err = r.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: s.inUser.ID})
	s.must(err)
	_, err = r.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	s.must(err)
	_, err = r.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: s.inUser.ID})
	s.must(err)
	_, err = s.n.Images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: s.n.NewImage("to-remove", harness.ImageOptions{Files: map[string]string{"x": "y"}})}})
	s.must(err)
}

// readEvents reads until a container has started.
func (s *scene) readEvents() {
	for {
		e, err := s.events.Recv()
		s.must(err)
		if e.ContainerEventType == cri.ContainerEventType_CONTAINER_STARTED_EVENT && len(e.ContainersStatuses) > 0 {
			return
		}
	}
}
