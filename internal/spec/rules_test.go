package spec

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestProcessArgs(t *testing.T) {
	words := strings.Fields
	for _, tc := range []struct {
		name                            string
		command, args, entry, cmd, want []string
	}{
		{"image alone", nil, nil, words("e"), words("c"), words("e c")},
		{"command drops cmd", words("C"), nil, words("e"), words("c"), words("C")},
		{"command and args", words("C"), words("A"), words("e"), words("c"), words("C A")},
		{"args replace cmd", nil, words("A"), words("e"), words("c"), words("e A")},
		{"cmd alone", nil, nil, nil, words("c d"), words("c d")},
		{"empty entrypoint is none", nil, nil, []string{""}, words("c"), words("c")},
		{"args alone", nil, words("A"), nil, nil, words("A")},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := processArgs(&runtime.ContainerConfig{Command: tc.command, Args: tc.args},
				ocispec.ImageConfig{Entrypoint: tc.entry, Cmd: tc.cmd})
			if err != nil || !slices.Equal(got, tc.want) {
				t.Errorf("%v, %v; want %v", got, err, tc.want)
			}
		})
	}
}

func TestProcessEnv(t *testing.T) {
	c := testContainer()
	c.Config.Tty = true
	c.Pod.Config.Hostname = ""
	c.Home = ""
	c.Image.Env = []string{"A=1", "nonsense", "=x", "B=2", "TERM=vt100"}
	c.Config.Envs = []*runtime.KeyValue{{Key: "B", Value: []byte("3")}, {Key: "PATH", Value: []byte("/p")}, {Key: "AB"}}
	got, err := processEnv(c)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"PATH=/p", "HOSTNAME=node-1", "TERM=vt100", "A=1", "B=3", "AB=", "HOME=/"}
	if !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	c.Config.Envs = append(c.Config.Envs, &runtime.KeyValue{Key: "HOME", Value: []byte("/h")})
	if got, _ = processEnv(c); !slices.Contains(got, "HOME=/h") || slices.Contains(got, "HOME=/") {
		t.Errorf("HOME of the config does not win: %q", got)
	}
}

func TestCwd(t *testing.T) {
	for _, tc := range []struct{ config, image, want string }{
		{"", "", "/"}, {"", "srv", "/srv"}, {"", "../x", "/x"}, {"/a/", "/srv", "/a"},
	} {
		got := processCwd(&runtime.ContainerConfig{WorkingDir: tc.config}, ocispec.ImageConfig{WorkingDir: tc.image})
		if got != tc.want {
			t.Errorf("%q over %q is %q, want %q", tc.config, tc.image, got, tc.want)
		}
	}
}

func TestNofile(t *testing.T) {
	for _, tc := range []struct {
		name               string
		soft, hard, host   uint64
		wantSoft, wantHard uint64
	}{
		{"as given", 1024, 524288, 1 << 20, 1024, 524288},
		{"hard clamped", 1024, 524288, 4096, 1024, 4096},
		{"both clamped", 1024, 524288, 512, 512, 512},
		{"host unknown", 1024, 524288, 0, 1024, 524288},
		{"hard alone", 0, 2048, 1 << 20, 2048, 2048},
		{"soft alone", 2048, 0, 1 << 20, 2048, 2048},
	} {
		got := nofile(Handler{NofileSoft: tc.soft, NofileHard: tc.hard}, Host{NofileHard: tc.host})
		if len(got) != 1 || got[0].Soft != tc.wantSoft || got[0].Hard != tc.wantHard {
			t.Errorf("%s: %+v, want %d:%d", tc.name, got, tc.wantSoft, tc.wantHard)
		}
	}
	if got := nofile(Handler{}, Host{NofileHard: 1}); got != nil {
		t.Errorf("unset limits give %+v", got)
	}
}

func TestCapabilities(t *testing.T) {
	host := Host{Capabilities: []string{"CAP_CHOWN", "CAP_KILL", "CAP_NET_ADMIN"}}
	handler := Handler{DefaultCapabilities: []string{"CAP_KILL", "CAP_SYS_RESOURCE"}}
	for _, tc := range []struct {
		name               string
		add, drop, ambient string
		privileged         bool
		want, wantAmbient  string
	}{
		{name: "defaults are clamped", want: "CAP_KILL"},
		{name: "add", add: "chown", want: "CAP_CHOWN CAP_KILL"},
		{name: "prefixed", add: "CAP_CHOWN", want: "CAP_CHOWN CAP_KILL"},
		{name: "drop", drop: "kill"},
		{name: "add all drop one", add: "ALL", drop: "KILL", want: "CAP_CHOWN CAP_NET_ADMIN"},
		{name: "drop all add one", add: "NET_ADMIN", drop: "all", want: "CAP_NET_ADMIN"},
		{name: "drop wins over add", add: "CHOWN", drop: "CHOWN", want: "CAP_KILL"},
		{name: "all and all", add: "ALL CHOWN", drop: "ALL", want: "CAP_CHOWN"},
		{name: "privileged", privileged: true, drop: "KILL", want: "CAP_CHOWN CAP_KILL CAP_NET_ADMIN"},
		{name: "ambient", ambient: "CHOWN", want: "CAP_CHOWN CAP_KILL", wantAmbient: "CAP_CHOWN"},
		{name: "ambient all but", ambient: "ALL", drop: "CHOWN", want: "CAP_KILL CAP_NET_ADMIN", wantAmbient: "CAP_KILL CAP_NET_ADMIN"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := containerCapabilities(&runtime.LinuxContainerSecurityContext{
				Privileged: tc.privileged,
				Capabilities: &runtime.Capability{
					AddCapabilities: strings.Fields(tc.add), DropCapabilities: strings.Fields(tc.drop),
					AddAmbientCapabilities: strings.Fields(tc.ambient),
				},
			}, handler, host)
			if err != nil {
				t.Fatal(err)
			}
			for kind, set := range map[string][]string{"bounding": got.Bounding, "permitted": got.Permitted, "effective": got.Effective} {
				if strings.Join(set, " ") != tc.want {
					t.Errorf("%s %v, want %s", kind, set, tc.want)
				}
			}
			for kind, set := range map[string][]string{"inheritable": got.Inheritable, "ambient": got.Ambient} {
				if strings.Join(set, " ") != tc.wantAmbient {
					t.Errorf("%s %v, want %q", kind, set, tc.wantAmbient)
				}
			}
		})
	}
}

// allowed tells whether the filter lets a system call through unconditionally.
func allowed(f *specs.LinuxSeccomp, name string) bool {
	return slices.ContainsFunc(f.Syscalls, func(s specs.LinuxSyscall) bool {
		return s.Action == specs.ActAllow && len(s.Args) == 0 && slices.Contains(s.Names, name)
	})
}

func TestSeccomp(t *testing.T) {
	local := filepath.Join(t.TempDir(), "profile.json")
	if err := os.WriteFile(local, []byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	runtimeDefault := &runtime.SecurityProfile{}
	build := func(t *testing.T, edit func(*Container)) (*specs.LinuxSeccomp, error) {
		c := testContainer()
		edit(&c)
		spec, err := ForContainer(c)
		if err != nil {
			return nil, err
		}
		return spec.Linux.Seccomp, nil
	}
	t.Run("default depends on capabilities", func(t *testing.T) {
		plain, err := build(t, func(c *Container) { c.security().Seccomp = runtimeDefault })
		if err != nil {
			t.Fatal(err)
		}
		admin, err := build(t, func(c *Container) {
			c.security().Seccomp = runtimeDefault
			c.security().Capabilities = &runtime.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
		})
		if err != nil {
			t.Fatal(err)
		}
		if !allowed(plain, "read") || allowed(plain, "mount") || !allowed(admin, "mount") {
			t.Errorf("read %v mount %v, with CAP_SYS_ADMIN mount %v", allowed(plain, "read"), allowed(plain, "mount"), allowed(admin, "mount"))
		}
	})
	t.Run("localhost", func(t *testing.T) {
		for _, edit := range []func(*Container){
			func(c *Container) {
				c.security().Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: local}
			},
			func(c *Container) { c.security().SeccompProfilePath = "localhost/" + local }, //nolint:staticcheck // what is tested
		} {
			f, err := build(t, edit)
			if err != nil || f.DefaultAction != specs.ActAllow || f.Syscalls[0].Names[0] != "mkdir" {
				t.Errorf("%+v, %v", f, err)
			}
		}
	})
	t.Run("localhost missing", func(t *testing.T) {
		_, err := build(t, func(c *Container) {
			c.security().Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: local + "x"}
		})
		if !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	for name, edit := range map[string]func(*Container){
		"unset": func(*Container) {},
		"unconfined": func(c *Container) {
			c.security().Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
		},
		"privileged": func(c *Container) {
			c.podSecurity().Privileged, c.security().Privileged = true, true
			c.security().Seccomp = runtimeDefault
		},
		"unset where the kernel has none": func(c *Container) { c.Handler.UnsetSeccomp, c.Host.Seccomp = runtimeDefault, false },
	} {
		t.Run(name, func(t *testing.T) {
			if f, err := build(t, edit); f != nil || err != nil {
				t.Errorf("%v, %v, want none", f, err)
			}
		})
	}
	t.Run("handler's profiles", func(t *testing.T) {
		mine := []byte(`{"defaultAction": "SCMP_ACT_LOG"}`)
		f, err := build(t, func(c *Container) { c.Handler.SeccompProfile, c.Handler.UnsetSeccomp = mine, runtimeDefault })
		if err != nil || f == nil || f.DefaultAction != specs.ActLog {
			t.Errorf("%v, %v", f, err)
		}
	})
}

func TestAppArmor(t *testing.T) {
	on := Host{AppArmor: true}
	profile := func(kind runtime.SecurityProfile_ProfileType, ref string) *runtime.SecurityProfile {
		return &runtime.SecurityProfile{ProfileType: kind, LocalhostRef: ref}
	}
	for _, tc := range []struct {
		name string
		sc   *runtime.LinuxContainerSecurityContext
		host Host
		want string
	}{
		{"unset, off", &runtime.LinuxContainerSecurityContext{}, Host{}, ""},
		{"unset, on", &runtime.LinuxContainerSecurityContext{}, on, DefaultAppArmor},
		{"unset, privileged", &runtime.LinuxContainerSecurityContext{Privileged: true}, on, ""},
		{"default", &runtime.LinuxContainerSecurityContext{Apparmor: profile(0, "")}, on, DefaultAppArmor},
		{"default, privileged", &runtime.LinuxContainerSecurityContext{Apparmor: profile(0, ""), Privileged: true}, on, ""},
		{"unconfined, off", &runtime.LinuxContainerSecurityContext{Apparmor: profile(runtime.SecurityProfile_Unconfined, "")}, Host{}, ""},
		{"localhost", &runtime.LinuxContainerSecurityContext{Apparmor: profile(runtime.SecurityProfile_Localhost, "localhost/mine")}, on, "mine"},
		{"localhost, privileged", &runtime.LinuxContainerSecurityContext{Apparmor: profile(runtime.SecurityProfile_Localhost, "mine"), Privileged: true}, on, "mine"},
		{"deprecated", &runtime.LinuxContainerSecurityContext{ApparmorProfile: "unconfined"}, on, ""},
	} {
		got, err := containerAppArmor(tc.sc, loaded, tc.host)
		if err != nil || got != tc.want {
			t.Errorf("%s: %q, %v, want %q", tc.name, got, err, tc.want)
		}
	}
}

func TestUpdateResources(t *testing.T) {
	host := Host{Swap: true, CgroupV2: true, HugepageSizes: []string{"2MB", "1GB"}, Hugetlb: true}
	type R = runtime.LinuxContainerResources
	old, err := Resources(&R{
		CpuShares: 100, CpuQuota: 10000, CpuPeriod: 20000, CpusetCpus: "0", MemoryLimitInBytes: 100, MemorySwapLimitInBytes: 150,
		HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 1}},
		Unified:        map[string]string{"memory.high": "90"},
	}, host, nil)
	if err != nil {
		t.Fatal(err)
	}
	old.Devices = []specs.LinuxDeviceCgroup{{Access: "rwm"}}
	got, err := Resources(&R{
		CpuShares: 200, MemoryLimitInBytes: 200,
		HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 2}, {PageSize: "1GB", Limit: 3}},
		Unified:        map[string]string{"memory.min": "10"},
	}, host, old)
	if err != nil {
		t.Fatal(err)
	}
	if *got.CPU.Shares != 200 || *got.CPU.Quota != 10000 || *got.CPU.Period != 20000 || got.CPU.Cpus != "0" {
		t.Errorf("cpu %+v", got.CPU)
	}
	if *got.Memory.Limit != 200 || *got.Memory.Swap != 250 {
		t.Errorf("memory %d, swap %d: 50 of swap on top stay", *got.Memory.Limit, *got.Memory.Swap)
	}
	if len(got.HugepageLimits) != 2 || got.HugepageLimits[0].Limit != 2 || len(got.Unified) != 2 || len(got.Devices) != 1 {
		t.Errorf("%+v", got)
	}
	if *old.CPU.Shares != 100 || *old.Memory.Limit != 100 || old.HugepageLimits[0].Limit != 1 || len(old.Unified) != 1 {
		t.Errorf("the old resources were changed: %+v", old)
	}
}

func TestHugepages(t *testing.T) {
	r := &runtime.LinuxContainerResources{HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}, {PageSize: "1GB", Limit: 0}}}
	for _, tc := range []struct {
		name            string
		sizes           []string
		kept, unlimited []string
	}{
		{"a machine with both sizes", []string{"2MB", "1GB"}, []string{"2MB", "1GB"}, nil},
		{"one that has not got what is not asked for", []string{"2MB"}, []string{"2MB"}, nil},
		{"one without the controller", []string{"2MB", "1GB"}, nil, []string{"2MB"}},
	} {
		host := Host{HugepageSizes: tc.sizes, Hugetlb: tc.kept != nil}
		got, err := Resources(r, host, nil)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		var kept []string
		for _, h := range got.HugepageLimits {
			kept = append(kept, h.Pagesize)
		}
		if !slices.Equal(kept, tc.kept) || !slices.Equal(HugepagesUnlimited(r, host), tc.unlimited) {
			t.Errorf("%s: limits of %v, without a limit %v; want %v and %v", tc.name, kept, HugepagesUnlimited(r, host), tc.kept, tc.unlimited)
		}
	}
}

func TestSwap(t *testing.T) {
	for _, tc := range []struct {
		name        string
		limit, swap int64
		accounted   bool
		want        int64 // 0 is unset
	}{
		{"none by default", 100, 0, true, 100},
		{"given", 100, 300, true, 300},
		{"unlimited", 100, -1, true, -1},
		{"all unlimited", -1, 0, true, -1},
		{"not accounted", 100, 0, false, 0},
		{"not accounted, none wanted", 100, 100, false, 0},
	} {
		got, err := Resources(&runtime.LinuxContainerResources{MemoryLimitInBytes: tc.limit, MemorySwapLimitInBytes: tc.swap},
			Host{Swap: tc.accounted}, nil)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		swap := int64(0)
		if got.Memory.Swap != nil {
			swap = *got.Memory.Swap
		}
		if swap != tc.want {
			t.Errorf("%s: swap %d, want %d", tc.name, swap, tc.want)
		}
	}
}

func TestOOMScoreAdj(t *testing.T) {
	host := Host{MinOOMScoreAdj: -100}
	if OOMScoreAdj(nil, host) != nil {
		t.Error("no resources, but a score")
	}
	for in, want := range map[int64]int{-998: -100, -100: -100, 0: 0, 1000: 1000} {
		if got := OOMScoreAdj(&runtime.LinuxContainerResources{OomScoreAdj: in}, host); *got != want {
			t.Errorf("%d becomes %d, want %d", in, *got, want)
		}
	}
}

func TestCgroupsPath(t *testing.T) {
	for _, tc := range []struct {
		parent  string
		systemd bool
		want    string
	}{
		{"/kubepods/pod1", false, "/kubepods/pod1/id"},
		{"kubepods", false, "/kubepods/id"},
		{"", false, "/podshim/id"},
		{"/kubepods.slice/kubepods-pod1.slice", true, "kubepods-pod1.slice:podshim:id"},
		{"", true, "system.slice:podshim:id"},
	} {
		if got := CgroupsPath(tc.parent, "id", tc.systemd); got != tc.want {
			t.Errorf("%q: %q, want %q", tc.parent, got, tc.want)
		}
	}
}

func TestStopSignal(t *testing.T) {
	for _, tc := range []struct {
		config runtime.Signal
		image  string
		want   syscall.Signal
	}{
		{0, "", syscall.SIGTERM},
		{0, "SIGQUIT", syscall.SIGQUIT},
		{0, "int", syscall.SIGINT},
		{0, "9", syscall.SIGKILL},
		{0, "SIGRTMIN+3", 37},
		{0, "nonsense", syscall.SIGTERM},
		{0, "900", syscall.SIGTERM},
		{0, "SIGRTMIN+900", syscall.SIGTERM},
		{runtime.Signal_SIGNAL_SIGUSR1, "SIGQUIT", syscall.SIGUSR1},
		{runtime.Signal_SIGNAL_SIGRTMIN, "", 34},
		{runtime.Signal_SIGNAL_SIGRTMAXMINUS14, "", 50},
	} {
		if got := StopSignal(&runtime.ContainerConfig{StopSignal: tc.config}, ocispec.ImageConfig{StopSignal: tc.image}); got != tc.want {
			t.Errorf("%s over %q: %d, want %d", tc.config, tc.image, got, tc.want)
		}
	}
	// Every signal of the CRI has a number, and comes back from it.
	for v := runtime.Signal_SIGNAL_SIGABRT; v <= runtime.Signal_SIGNAL_SIGRTMAX; v++ {
		n, ok := signalNumber(signalName(v))
		if !ok {
			t.Errorf("%s has no number", v)
			continue
		}
		if back := CRISignal(n); back != v && StopSignal(&runtime.ContainerConfig{StopSignal: back}, ocispec.ImageConfig{}) != n {
			t.Errorf("%s is %d, which is %s", v, n, back)
		}
	}
	for _, none := range []syscall.Signal{-1, 0, 32, 65} {
		if v := CRISignal(none); v != runtime.Signal_SIGNAL_RUNTIME_DEFAULT {
			t.Errorf("%d is %s", none, v)
		}
	}
}

func TestResolvConf(t *testing.T) {
	if ResolvConf(nil) != nil {
		t.Error("no DNS config must be nil: the host's file is copied")
	}
	got := string(ResolvConf(&runtime.DNSConfig{Servers: []string{"10.0.0.1", "fd00::1"}, Searches: []string{"a", "b"}, Options: []string{"ndots:5"}}))
	if want := "search a b\nnameserver 10.0.0.1\nnameserver fd00::1\noptions ndots:5\n"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestForExec(t *testing.T) {
	spec, _ := containerCorpus[1].built(t) // kubelet's
	before := slices.Clone(spec.Process.Env)
	p := ForExec(spec.Process, []string{"ps"}, true)
	if !slices.Equal(p.Args, []string{"ps"}) || !p.Terminal || !slices.Contains(p.Env, "TERM=xterm") {
		t.Errorf("%+v", p)
	}
	if p.User.UID != 1000 || p.Cwd != "/data" || !p.NoNewPrivileges || len(p.Capabilities.Bounding) != 1 {
		t.Errorf("not the container's own: %+v", p)
	}
	if !slices.Equal(spec.Process.Env, before) || spec.Process.Terminal || spec.Process.Args[0] != "/app" {
		t.Errorf("the container's spec was changed: %+v", spec.Process)
	}
	tty, _ := containerCorpus[2].built(t)
	if p := ForExec(tty.Process, []string{"ps"}, false); p.Terminal {
		t.Error("a terminal nobody asked for")
	}
}

func TestOwn(t *testing.T) {
	node := runtime.NamespaceMode_NODE
	for _, tc := range []struct {
		name     string
		hostname string
		options  *runtime.NamespaceOption
		want     Namespaces
	}{
		{"unset", "", nil, Namespaces{Net: true, IPC: true, UTS: true, PID: true}},
		{"kubelet", "h", &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}, Namespaces{Net: true, IPC: true, UTS: true}},
		{"host", "", &runtime.NamespaceOption{Network: node, Ipc: node, Pid: node}, Namespaces{}},
		{"host network, own name", "h", &runtime.NamespaceOption{Network: node}, Namespaces{IPC: true, UTS: true, PID: true}},
		{"user", "", &runtime.NamespaceOption{UsernsOptions: &runtime.UserNamespace{Uids: testIDs, Gids: testIDs}},
			Namespaces{Net: true, IPC: true, UTS: true, PID: true, User: true}},
	} {
		got := Own(&runtime.PodSandboxConfig{Hostname: tc.hostname, Linux: &runtime.LinuxPodSandboxConfig{
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: tc.options}}})
		if got != tc.want {
			t.Errorf("%s: %+v, want %+v", tc.name, got, tc.want)
		}
	}
}

// TestPodWithoutOptions: crictl's short configs have no namespace options, and
// the container then follows whatever its pod has.
func TestPodWithoutOptions(t *testing.T) {
	for _, tc := range []struct {
		pod  runtime.NamespaceMode
		path string
		want []string // the paths of PID namespaces in the spec
	}{
		{runtime.NamespaceMode_CONTAINER, "", []string{""}},
		{runtime.NamespaceMode_POD, "/proc/7/ns/pid", []string{"/proc/7/ns/pid"}},
		{runtime.NamespaceMode_NODE, "", nil},
	} {
		c := testContainer()
		c.podSecurity().NamespaceOptions.Pid = tc.pod
		c.Pod.PID = tc.path
		spec, err := ForContainer(c)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, ns := range spec.Linux.Namespaces {
			if ns.Type == specs.PIDNamespace {
				got = append(got, ns.Path)
			}
		}
		if !slices.Equal(got, tc.want) {
			t.Errorf("pod %s: %q, want %q", tc.pod, got, tc.want)
		}
	}
}
