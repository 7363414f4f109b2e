package pod

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// Labels, annotations and the rest of a config come back as they were sent, byte
// for byte, in lists and statuses, and after a restart.
func TestConfigComesBack(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	odd := map[string]string{
		"": "empty key", "empty": "", "lines": "a\nb\r\n\tc\x00d", "unicode": "ÄÖ 漢字 \U0001f433 \u202e",
		"json": `{"a": "b\\\"c"}`, "Key/With-Case.and_dots": "x", "large": strings.Repeat("0123456789", 20_000),
	}
	p := n.RunPod(func(c *cri.PodSandboxConfig) { c.Annotations = odd; maps.Copy(c.Labels, odd) })
	c := p.Create(sleeper, func(c *cri.ContainerConfig) {
		c.Annotations, c.Labels = odd, odd
		c.Image.UserSpecifiedImage, c.Image.Annotations = "what the user wrote", odd
		c.Mounts = []*cri.Mount{{HostPath: n.Volumes, ContainerPath: "/volumes", Readonly: true, MountOptions: []string{"noexec"}}}
		c.StopSignal = cri.Signal_SIGNAL_SIGQUIT
	})
	for _, when := range []string{"at once", "after a restart"} {
		same := func(what string, got, want proto.Message) {
			if !proto.Equal(got, want) {
				t.Errorf("%s: %s came back as\n%v\nwant\n%v", when, what, got, want)
			}
		}
		equal := func(what string, got, want map[string]string) {
			if !maps.Equal(got, want) {
				t.Errorf("%s: %s came back changed", when, what)
			}
		}
		s := p.Status()
		pods, err := n.Runtime.ListPodSandbox(n.Context(), &cri.ListPodSandboxRequest{})
		if err != nil || len(pods.Items) != 1 {
			t.Fatalf("%v, %v", pods, err)
		}
		same("sandbox metadata", s.Metadata, p.Config.Metadata)
		same("sandbox metadata, listed", pods.Items[0].Metadata, p.Config.Metadata)
		same("namespace options", s.GetLinux().GetNamespaces().GetOptions(), p.Config.Linux.SecurityContext.NamespaceOptions)
		equal("sandbox annotations", s.Annotations, odd)
		equal("sandbox annotations, listed", pods.Items[0].Annotations, odd)
		equal("sandbox labels", s.Labels, p.Config.Labels)
		equal("sandbox labels, listed", pods.Items[0].Labels, p.Config.Labels)
		cs := c.Status()
		list, err := n.Runtime.ListContainers(n.Context(), &cri.ListContainersRequest{})
		if err != nil || len(list.Containers) != 1 {
			t.Fatalf("%v, %v", list, err)
		}
		same("container metadata", cs.Metadata, c.Config.Metadata)
		same("container metadata, listed", list.Containers[0].Metadata, c.Config.Metadata)
		same("image", cs.Image, c.Config.Image)
		same("image, listed", list.Containers[0].Image, c.Config.Image)
		equal("container annotations", cs.Annotations, odd)
		equal("container annotations, listed", list.Containers[0].Annotations, odd)
		equal("container labels", cs.Labels, odd)
		equal("container labels, listed", list.Containers[0].Labels, odd)
		if len(cs.Mounts) != 1 {
			t.Fatalf("mounts are %v", cs.Mounts)
		}
		same("mount", cs.Mounts[0], c.Config.Mounts[0])
		if cs.StopSignal != c.Config.StopSignal || cs.LogPath != filepath.Join(p.Config.LogDirectory, c.Config.LogPath) {
			t.Errorf("%s: stop signal %v, log %s", when, cs.StopSignal, cs.LogPath)
		}
		if id := n.Pull(harness.Busybox); cs.ImageId != id || list.Containers[0].ImageId != id || list.Containers[0].PodSandboxId != p.ID ||
			!strings.Contains(cs.ImageRef, "@sha256:") || cs.ImageRef != list.Containers[0].ImageRef {
			t.Errorf("%s: image %s of pull %s, by name %s", when, cs.ImageId, id, cs.ImageRef)
		}
		n.Restart()
	}
}

// IDs may be cut short as long as they say which one is meant.
func TestIDPrefixes(t *testing.T) {
	n, p := start(t)
	other := n.RunPod()
	running := p.Run(sleeper)
	running.WaitLog("ready")
	// Among 17 IDs two begin with the same digit.
	byDigit := map[byte][]string{}
	for range 17 {
		id := other.Create(sleeper).ID
		byDigit[id[0]] = append(byDigit[id[0]], id)
	}
	ctx := n.Context()
	for digit, ids := range byDigit {
		if len(ids) < 2 {
			continue
		}
		prefix := string(digit)
		for i := 0; ids[0][i] == ids[1][i]; i++ {
			prefix = ids[0][:i+1]
		}
		_, err := n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: prefix})
		checkCode(t, err, invalid, strconv.Quote(prefix))
		_, err = n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: prefix})
		checkCode(t, err, invalid, strconv.Quote(prefix))
		break
	}
	short, pod := running.ID[:20], p.ID[:20]
	if s, err := n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: short}); err != nil || s.Status.Id != running.ID {
		t.Errorf("status by prefix: %v, %v", s, err)
	}
	if s, err := n.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: pod}); err != nil || s.Status.Id != p.ID {
		t.Errorf("status of sandbox by prefix: %v, %v", s, err)
	}
	if r, err := n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: short, Cmd: []string{"echo", "hello"}}); err != nil || string(r.Stdout) != "hello\n" {
		t.Errorf("exec by prefix: %v, %v", r, err)
	}
	if r, err := n.Runtime.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: short}); err != nil || r.Stats.Attributes.Id != running.ID {
		t.Errorf("stats by prefix: %v, %v", r, err)
	}
	process := running.Process()
	if _, err := n.Runtime.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: short, Timeout: 10}); err != nil {
		t.Error(err)
	}
	if err := process.WaitGone(harness.Limit); err != nil {
		t.Error(err)
	}
	if _, err := n.Runtime.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: short}); err != nil {
		t.Error(err)
	}
	_, err := n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: running.ID})
	checkCode(t, err, notFound, running.ID)
	if _, err := n.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
	if _, err := n.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
	_, err = n.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: p.ID})
	checkCode(t, err, notFound, p.ID)
}

// The verbose information has what operators read out of containerd's: what it
// says is what the kernel says.
func TestInspect(t *testing.T) {
	n, p := start(t)
	c := p.Run(sleeper, mounts(&cri.Mount{HostPath: n.Volumes, ContainerPath: "/volumes"}))
	c.WaitLog("ready")
	inspect := func(command, id, template string) string {
		t.Helper()
		stdout, stderr, err := output(t, n.Crictl(command, "-o", "go-template", "--template", template, id), nil)
		if err != nil {
			t.Fatalf("crictl %s %s: %v %s", command, template, err, stderr)
		}
		return strings.TrimSpace(stdout)
	}
	pid, infra := strconv.Itoa(c.Process().PID), strconv.Itoa(p.Infra().PID)
	// As the OCI spec has it, and below the hierarchies' roots: systemd has its own way for both.
	cgroup := func(id string) (spec, path string) {
		if harness.Systemd {
			return n.PodsCgroup + ":podshim:" + id, harness.CgroupPath(n.PodsCgroup) + "/podshim-" + id + ".scope"
		}
		return n.PodsCgroup + "/" + id, n.PodsCgroup + "/" + id
	}
	specOfC, pathOfC := cgroup(c.ID)
	specOfP, pathOfP := cgroup(p.ID)
	for template, want := range map[string]string{
		"{{.info.pid}}":                      pid,
		"{{.info.sandboxID}}":                p.ID,
		"{{.info.runtimeSpec.process.args}}": "[sh -c " + sleeper[2] + "]",
		"{{.info.config.metadata.name}}":     c.Config.Metadata.Name,
		"{{.info.snapshotKey}}":              c.ID,
		"{{.info.snapshotter}}":              "overlayfs",
		"{{.info.cgroupsPath}}":              specOfC,
		"{{range .info.runtimeSpec.mounts}}{{if eq .destination \"/volumes\"}}{{.source}}{{end}}{{end}}": n.Volumes,
		"{{.status.state}}": "CONTAINER_RUNNING",
	} {
		if got := inspect("inspect", c.ID, template); got != want {
			t.Errorf("inspect %s is %q, want %q", template, got, want)
		}
	}
	netns := inspect("inspectp", p.ID, `{{range .info.runtimeSpec.linux.namespaces}}{{if eq .type "network"}}{{.path}}{{end}}{{end}}`)
	var st unix.Stat_t
	if err := unix.Stat(netns, &st); err != nil || fmt.Sprintf("net:[%d]", st.Ino) != p.Infra().Namespace("net") {
		t.Errorf("network namespace %s: %v, inode %d; infra has %s", netns, err, st.Ino, p.Infra().Namespace("net"))
	}
	for template, want := range map[string]string{
		"{{.info.pid}}":                             infra,
		"{{.info.processStatus}}":                   "running",
		"{{.info.netNamespaceClosed}}":              "false",
		"{{.info.runtimeType}}":                     "podshim",
		"{{.info.config.metadata.uid}}":             p.Config.Metadata.Uid,
		"{{.info.runtimeSpec.annotations}}":         inspect("inspectp", p.ID, "{{.info.runtimeSpec.annotations}}"),
		"{{(index .info.cniResult.ips 0).address}}": p.Status().Network.Ip + "/24",
		"{{.info.cgroupsPath}}":                     specOfP,
	} {
		if got := inspect("inspectp", p.ID, template); got != want {
			t.Errorf("inspectp %s is %q, want %q", template, got, want)
		}
	}
	if !strings.Contains(p.Infra().Cgroup, pathOfP) || !strings.Contains(c.Process().Cgroup, pathOfC) {
		t.Errorf("cgroups are %s and %s", p.Infra().Cgroup, c.Process().Cgroup)
	}
	c.Stop(0)
	if got := inspect("inspect", c.ID, "{{.info.pid}}"); got != "0" {
		t.Errorf("an ended container has PID %s", got)
	}
	if _, err := n.Runtime.StopPodSandbox(n.Context(), &cri.StopPodSandboxRequest{PodSandboxId: p.ID}); err != nil {
		t.Fatal(err)
	}
	if got := inspect("inspectp", p.ID, "{{.info.pid}} {{.info.processStatus}} {{.info.netNamespaceClosed}}"); got != "0 exited true" {
		t.Errorf("of a stopped sandbox crictl says %q", got)
	}
	stdout, stderr, err := output(t, n.Crictl("inspecti", "-o", "go-template", "--template", "{{.info.imageSpec.config.Env}}", harness.Busybox), nil)
	if err != nil || !strings.Contains(stdout, "PATH=") {
		t.Errorf("inspecti: %v, %s%s", err, stdout, stderr)
	}
	stdout, stderr, err = output(t, n.Crictl("info"), nil)
	var info struct {
		Config struct{ Root string }
		CNI    struct{ Network string }
		Host   struct{ RRO, Seccomp bool }
	}
	if err == nil {
		err = json.Unmarshal([]byte(stdout), &info)
	}
	if err != nil || info.Config.Root != n.Root || info.CNI.Network != n.Name || !info.Host.Seccomp {
		t.Errorf("info: %v, %+v\n%s%s", err, info, stdout, stderr)
	}
}

// The config's stop signal is what the container gets, also a real-time one, and
// it stands above the image's.
func TestStopSignalOfTheConfig(t *testing.T) {
	n, p := start(t)
	opts := harness.ImageOptions{}
	opts.Config.StopSignal = "SIGUSR1"
	ref := n.NewImage("stopsignal-config", opts)
	for signal, trap := range map[cri.Signal]string{
		cri.Signal_SIGNAL_SIGUSR2:        "USR2",
		cri.Signal_SIGNAL_SIGHUP:         "HUP",
		cri.Signal_SIGNAL_SIGRTMINPLUS3:  "37",
		cri.Signal_SIGNAL_SIGRTMAXMINUS1: "63",
	} {
		t.Run(trap, func(t *testing.T) {
			c := p.With(t).Shell("trap 'echo wrong; exit 1' USR1 TERM; trap 'exit 42' "+trap+"; echo ready; sleep 100000 & wait", image(ref),
				func(c *cri.ContainerConfig) { c.StopSignal = signal })
			c.WaitLog("ready")
			c.Stop(30 * time.Second)
			if s := c.WaitExit(); s.ExitCode != 42 || s.StopSignal != signal {
				t.Errorf("exit code %d, stop signal %v; want 42 and %v", s.ExitCode, s.StopSignal, signal)
			}
		})
	}
}

// Options of a mount are those of the mount in the container, also on what is
// mounted below it, where the option says so.
func TestMountOptions(t *testing.T) {
	n, p := start(t)
	host := sharedDir(t, n)
	if err := unix.Mount("tmpfs", host+"/from-host", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	c := p.Run(sleeper, mounts(
		&cri.Mount{HostPath: host, ContainerPath: "/some", MountOptions: []string{"noexec", "nosuid", "nodev", "noatime"}},
		&cri.Mount{HostPath: host, ContainerPath: "/deep", MountOptions: []string{"rnoexec"}},
		&cri.Mount{HostPath: host, ContainerPath: "/plain"},
	))
	c.WaitLog("ready")
	for point, want := range map[string][]string{"/some": {"rw", "nosuid", "nodev", "noexec", "noatime"}, "/deep": {"noexec"}, "/deep/from-host": {"noexec"}} {
		m, ok := c.Process().MountAt(point)
		for _, o := range want {
			if !ok || !slices.Contains(m.Options, o) {
				t.Errorf("%s has the options %q, want %s", point, m.Options, o)
			}
		}
	}
	c.Output("cp", "/bin/busybox", "/plain/true")
	c.Output("cp", "/bin/busybox", "/plain/from-host/true")
	c.Output("/plain/true")
	for _, program := range []string{"/some/true", "/deep/true", "/deep/from-host/true"} {
		if stdout, _, code := c.Exec("sh", "-c", program); code != 126 {
			t.Errorf("%s runs on a mount with noexec: %d %s", program, code, stdout)
		}
	}
}

// An image as a volume: its files or a part of them, read-only, and the status
// says which image it is.
func TestImageMounts(t *testing.T) {
	n, p := start(t)
	ref := n.NewImage("as-a-volume", harness.ImageOptions{Files: map[string]string{
		"models/one/weights": "heavy", "models/two/weights": "light", "readme": "read me"}})
	id := n.Pull(ref)
	c := p.Run(sleeper, mounts(
		&cri.Mount{ContainerPath: "/all", Image: &cri.ImageSpec{Image: id, UserSpecifiedImage: ref}},
		&cri.Mount{ContainerPath: "/part", Image: &cri.ImageSpec{Image: ref}, ImageSubPath: "models/two", MountOptions: []string{"noexec"}},
		&cri.Mount{ContainerPath: "/host", HostPath: n.Volumes},
	))
	c.WaitLog("ready")
	if got := c.Output("cat", "/all/readme", "/all/models/one/weights", "/part/weights"); got != "read meheavylight" {
		t.Errorf("the volumes hold %q", got)
	}
	for _, point := range []string{"/all", "/part"} {
		m, ok := c.Process().MountAt(point)
		if options := m.Options; !ok || !slices.Contains(options, "ro") || (point == "/part") != slices.Contains(options, "noexec") {
			t.Errorf("%s is mounted with %q", point, m.Options)
		}
		if _, _, code := c.Exec("touch", point+"/new"); code == 0 {
			t.Errorf("%s can be written to", point)
		}
	}
	s := c.Status().Mounts
	if len(s) != 3 || !strings.HasPrefix(s[0].GetImage().GetImageRef(), harness.RegistryHost+"/as-a-volume@sha256:") ||
		s[1].GetImage().GetImageRef() != s[0].GetImage().GetImageRef() || s[2].GetImage() != nil || s[0].GetImage().GetUserSpecifiedImage() != ref {
		t.Errorf("status has the mounts %v", s)
	}
	// Asked for by its digest, it is that one or none.
	p.Create(sleeper, mounts(&cri.Mount{ContainerPath: "/x", Image: &cri.ImageSpec{Image: ref, ImageRef: s[0].Image.ImageRef}}))
	for name, tc := range map[string]struct {
		mount      *cri.Mount
		code, word string
	}{
		"no such path":  {&cri.Mount{ContainerPath: "/x", Image: &cri.ImageSpec{Image: ref}, ImageSubPath: "models/three"}, invalid, "models/three"},
		"path leaves":   {&cri.Mount{ContainerPath: "/x", Image: &cri.ImageSpec{Image: ref}, ImageSubPath: "../../etc"}, invalid, "image_sub_path"},
		"other digest":  {&cri.Mount{ContainerPath: "/x", Image: &cri.ImageSpec{Image: ref, ImageRef: "sha256:0123"}}, invalid, "image_ref"},
		"other handler": {&cri.Mount{ContainerPath: "/x", Image: &cri.ImageSpec{Image: ref, RuntimeHandler: "nobody"}}, invalid, "runtime_handler"},
		"also a path":   {&cri.Mount{ContainerPath: "/x", HostPath: "/tmp", Image: &cri.ImageSpec{Image: ref}}, invalid, "host_path"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{
				PodSandboxId: p.ID, Config: p.ContainerConfig(sleeper, mounts(tc.mount)), SandboxConfig: p.Config})
			checkCode(t, err, tc.code, tc.word)
		})
	}
}

// A device by its CDI name, from the field and from a device plugin's annotation.
func TestCDIDevices(t *testing.T) {
	_, p := start(t)
	const dir = "/var/run/cdi" // where the CDI specification has it
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	kind := "podshim.test/t" + strconv.Itoa(os.Getpid())
	file := filepath.Join(dir, strings.ReplaceAll(kind, "/", "-")+".json")
	conf := fmt.Sprintf(`{"cdiVersion": "0.6.0", "kind": %q, "devices": [
 {"name": "one", "containerEdits": {"env": ["ONE=1"], "deviceNodes": [{"path": "/dev/cdi-one", "hostPath": "/dev/zero"}]}},
 {"name": "two", "containerEdits": {"env": ["TWO=2"], "mounts": [{"hostPath": %q, "containerPath": "/cdi", "options": ["ro", "bind"]}]}}]}`,
		kind, filepath.Dir(p.Config.LogDirectory))
	if err := os.WriteFile(file, []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(file)
	c := p.Run(sleeper, func(c *cri.ContainerConfig) {
		c.CDIDevices = []*cri.CDIDevice{{Name: kind + "=one"}}
		c.Annotations = map[string]string{"cdi.k8s.io/plugin": kind + "=two"}
	})
	c.WaitLog("ready")
	if got := c.Output("sh", "-c", "echo $ONE $TWO"); got != "1 2" {
		t.Errorf("environment has %q", got)
	}
	var st unix.Stat_t
	if err := unix.Stat(c.Process().Path("root/dev/cdi-one"), &st); err != nil || st.Rdev != unix.Mkdev(1, 5) {
		t.Errorf("/dev/cdi-one: %v, device %d", err, st.Rdev)
	}
	c.Output("sh", "-c", "head -c 1 /dev/cdi-one > /dev/null")
	if m, ok := c.Process().MountAt("/cdi"); !ok || !slices.Contains(m.Options, "ro") {
		t.Errorf("/cdi is %v", m)
	}
}

// The deprecated fields mean what their successors do, and count when those are
// absent.
func TestDeprecatedFields(t *testing.T) {
	n, p := start(t)
	seccomp := func(edit func(*cri.LinuxContainerSecurityContext)) string {
		t.Helper()
		c := p.Run(sleeper, security(edit))
		c.WaitLog("ready")
		return c.Process().Status("Seccomp")
	}
	for want, edit := range map[string]func(*cri.LinuxContainerSecurityContext){
		"2": func(s *cri.LinuxContainerSecurityContext) { s.SeccompProfilePath = "runtime/default" }, //nolint:staticcheck // what is tested
		"0": func(s *cri.LinuxContainerSecurityContext) { s.SeccompProfilePath = "unconfined" },      //nolint:staticcheck // what is tested
	} {
		if got := seccomp(edit); got != want {
			t.Errorf("seccomp mode is %s, want %s", got, want)
		}
	}
	if got := seccomp(func(s *cri.LinuxContainerSecurityContext) {
		s.SeccompProfilePath = "runtime/default" //nolint:staticcheck // what is tested
		s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
	}); got != "0" {
		t.Errorf("the deprecated field counts beside its successor: mode %s", got)
	}
	infra := n.RunPod(func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.SeccompProfilePath = "runtime/default" //nolint:staticcheck // what is tested
	})
	if got := infra.Infra().Status("Seccomp"); got != "2" {
		t.Errorf("infra's seccomp mode is %s", got)
	}
	seccomp(func(s *cri.LinuxContainerSecurityContext) { s.ApparmorProfile = "unconfined" }) //nolint:staticcheck // what is tested
}

// Capabilities of a user who is not root come by the ambient set only.
func TestAmbientCapabilities(t *testing.T) {
	_, p := start(t)
	c := p.Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) {
		s.RunAsUser = &cri.Int64Value{Value: 1000}
		s.Capabilities = &cri.Capability{
			DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"CHOWN"}, AddAmbientCapabilities: []string{"NET_BIND_SERVICE"},
		}
	}))
	c.WaitLog("ready")
	const chown, bind = 1 << unix.CAP_CHOWN, 1 << unix.CAP_NET_BIND_SERVICE
	for set, want := range map[string]int64{"CapBnd": chown | bind, "CapEff": bind, "CapPrm": bind, "CapInh": bind, "CapAmb": bind} {
		if got, err := strconv.ParseInt(c.Process().Status(set), 16, 64); err != nil || got != want {
			t.Errorf("%s is %x, want %x (%v)", set, got, want, err)
		}
	}
}

// What infra is made as: the user, groups and root file system of the sandbox's
// own security context.
func TestSandboxSecurityContext(t *testing.T) {
	_, p := start(t, func(c *cri.PodSandboxConfig) {
		s := c.Linux.SecurityContext
		s.RunAsUser, s.RunAsGroup = &cri.Int64Value{Value: 4321}, &cri.Int64Value{Value: 1234}
		s.SupplementalGroups, s.SupplementalGroupsPolicy = []int64{77, 88}, cri.SupplementalGroupsPolicy_Strict
		s.ReadonlyRootfs = true
		s.Seccomp = &cri.SecurityProfile{}
	})
	infra := p.Infra()
	for field, want := range map[string]string{"Uid": "4321", "Gid": "1234", "Groups": "77 88", "Seccomp": "2", "CapEff": "0000000000000000", "NoNewPrivs": "1"} {
		got := strings.Join(strings.Fields(infra.Status(field)), " ")
		if got != want && got != strings.TrimSpace(strings.Repeat(want+" ", 4)) {
			t.Errorf("%s of infra is %q, want %q", field, got, want)
		}
	}
	if m, ok := infra.MountAt("/"); !ok || !slices.Contains(m.Options, "ro") {
		t.Errorf("infra's root is mounted with %q", m.Options)
	}
}

// A host name of its own for a pod on the node's network, in every place.
func TestHostnameOnTheNodesNetwork(t *testing.T) {
	_, p := start(t, podNamespaces(&cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER}),
		func(c *cri.PodSandboxConfig) { c.Hostname = "of-its-own" })
	c := p.Run(sleeper)
	c.WaitLog("ready")
	if got := c.Output("sh", "-c", "hostname; cat /etc/hostname; echo $HOSTNAME"); got != "of-its-own\nof-its-own\nof-its-own" {
		t.Errorf("names are %q", got)
	}
}

// A handler that is not configured is refused wherever one can be named.
func TestUnknownHandlerIsRefused(t *testing.T) {
	n, p := start(t)
	ctx := n.Context()
	_, err := n.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: n.PodConfig(), RuntimeHandler: "nobody"})
	checkCode(t, err, invalid, "nobody")
	_, err = n.Images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: harness.Busybox, RuntimeHandler: "nobody"}})
	checkCode(t, err, invalid, "runtime_handler")
	_, err = n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: p.ID, SandboxConfig: p.Config,
		Config: p.ContainerConfig(sleeper, func(c *cri.ContainerConfig) { c.Image.RuntimeHandler = "nobody" })})
	checkCode(t, err, invalid, "image.runtime_handler")
}

// A client that is wrong about the terminal is told when it asks, not by a
// stream that breaks.
func TestAttachNeedsTheRightTerminal(t *testing.T) {
	n, p := start(t)
	for _, tty := range []bool{false, true} {
		c := p.Run(sleeper, func(c *cri.ContainerConfig) { c.Tty = tty })
		_, err := n.Runtime.Attach(n.Context(), &cri.AttachRequest{ContainerId: c.ID, Stdout: true, Tty: !tty})
		checkCode(t, err, invalid, "tty")
		if _, err := n.Runtime.Attach(n.Context(), &cri.AttachRequest{ContainerId: c.ID, Stdout: true, Tty: tty}); err != nil {
			t.Error(err)
		}
	}
}

// A container of another pod, or another attempt of it, is refused.
func TestSandboxConfigMustBeThePods(t *testing.T) {
	n, p := start(t)
	other := proto.CloneOf(p.Config)
	other.Metadata.Uid = "another"
	_, err := n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{PodSandboxId: p.ID, SandboxConfig: other, Config: p.ContainerConfig(sleeper)})
	checkCode(t, err, invalid, "sandbox_config.metadata")
}
