package pod

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// apparmor is an edit that gives a container a profile.
func apparmor(kind cri.SecurityProfile_ProfileType, name string) func(*cri.ContainerConfig) {
	return security(func(s *cri.LinuxContainerSecurityContext) {
		s.Apparmor = &cri.SecurityProfile{ProfileType: kind, LocalhostRef: name}
	})
}

// confinement is the security module's label of a process, as the kernel has it.
func confinement(p harness.Process) string {
	return strings.TrimRight(p.Read("attr/current"), "\n\x00")
}

// Processes run under the profile that the config names, and the default one where
// it names none; infra, which does nothing, only if the pod names one. What a
// profile forbids is forbidden.
func TestAppArmorConfines(t *testing.T) {
	if _, err := os.Stat("/sys/kernel/security/apparmor"); err != nil {
		t.Skip("SKIPPED: this machine has no AppArmor; see TestAppArmorIsEnforcedOrRefused, and make vm")
	}
	harness.NeedRoot(t)
	// Not beside others: the default profile is taken away for a moment.
	n := harness.Shared(t)
	mine := fmt.Sprintf("podshim-test-%d", os.Getpid())
	file := filepath.Join(t.TempDir(), "profile")
	text := fmt.Sprintf("profile %s flags=(attach_disconnected,mediate_deleted) {\n file,\n capability,\n network,\n signal,\n deny /etc/shadow r,\n deny /secret/** rw,\n}\n", mine)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	parser := func(args ...string) {
		t.Helper()
		if out, err := exec.Command("apparmor_parser", args...).CombinedOutput(); err != nil {
			t.Fatalf("apparmor_parser %q: %v\n%s", args, err, out)
		}
	}
	parser("-Kr", file)
	defer parser("-R", file)

	p := n.RunPod()
	if got := confinement(p.Infra()); got != "unconfined" {
		t.Errorf("infra of a pod without a profile is %q", got)
	}
	// mount(2) is what the default profile forbids to those who have the capability.
	mayMount := func(c *harness.Container) bool {
		_, _, code := c.Exec("mount", "-t", "tmpfs", "x", "/tmp")
		return code == 0
	}
	admin := security(func(s *cri.LinuxContainerSecurityContext) {
		s.Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
	})
	const ofDefault = "podshim-default (enforce)"
	for name, tc := range map[string]struct {
		edit  func(*cri.ContainerConfig)
		label string
		mount bool
	}{
		"unset":      {func(*cri.ContainerConfig) {}, ofDefault, false},
		"default":    {apparmor(cri.SecurityProfile_RuntimeDefault, ""), ofDefault, false},
		"unconfined": {apparmor(cri.SecurityProfile_Unconfined, ""), "unconfined", true},
		"localhost":  {apparmor(cri.SecurityProfile_Localhost, mine), mine + " (enforce)", false},
		"deprecated": {security(func(s *cri.LinuxContainerSecurityContext) { s.ApparmorProfile = "localhost/" + mine }), mine + " (enforce)", false}, //nolint:staticcheck // what is tested
	} {
		for mode, filter := range map[string]cri.SecurityProfile_ProfileType{
			"0": cri.SecurityProfile_Unconfined, "2": cri.SecurityProfile_RuntimeDefault, // podmon's own start
		} {
			t.Run(name+", seccomp "+filter.String(), func(t *testing.T) {
				c := p.With(t).Run(sleeper, tc.edit, admin, security(func(s *cri.LinuxContainerSecurityContext) {
					s.Seccomp = &cri.SecurityProfile{ProfileType: filter}
				}))
				c.WaitLog("ready")
				if got := confinement(c.Process()); got != tc.label {
					t.Errorf("PID 1 runs as %q, want %q", got, tc.label)
				}
				if got := c.Output("cat", "/proc/self/attr/current"); got != tc.label {
					t.Errorf("a command runs as %q, want %q", got, tc.label)
				}
				if got := mayMount(c); got != tc.mount {
					t.Errorf("may mount: %v, want %v", got, tc.mount)
				}
				if got := c.Process().Status("Seccomp"); got != mode {
					t.Errorf("seccomp mode %s, want %s", got, mode)
				}
				if got := strings.Fields(c.Output("grep", "Seccomp:", "/proc/self/status")); len(got) != 2 || got[1] != mode {
					t.Errorf("a command's is %q, want mode %s", got, mode)
				}
			})
		}
	}
	t.Run("privileged", func(t *testing.T) {
		p := n.With(t).RunPod(func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
		c := p.Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) { s.Privileged = true }))
		c.WaitLog("ready")
		if got := confinement(c.Process()); got != "unconfined" {
			t.Errorf("a privileged container runs as %q", got)
		}
	})
	t.Run("the pod's", func(t *testing.T) {
		p := n.With(t).RunPod(func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{} })
		if got := confinement(p.Infra()); got != ofDefault {
			t.Errorf("infra runs as %q, want %q", got, ofDefault)
		}
	})
	t.Run("missing", func(t *testing.T) {
		_, err := n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{PodSandboxId: p.ID, SandboxConfig: p.Config,
			Config: p.ContainerConfig(sleeper, apparmor(cri.SecurityProfile_Localhost, "nobodys"))})
		checkCode(t, err, notNow, `profile "nobodys" is not loaded`)
		conf := n.PodConfig(func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "nobodys"}
		})
		_, err = n.Runtime.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: conf})
		checkCode(t, err, notNow, `profile "nobodys" is not loaded`)
	})
	t.Run("taken away", func(t *testing.T) {
		if err := os.WriteFile("/sys/kernel/security/apparmor/.remove", []byte("podshim-default"), 0); err != nil {
			t.Fatal(err)
		}
		c := p.With(t).Run(sleeper)
		c.WaitLog("ready")
		if got := confinement(c.Process()); got != ofDefault {
			t.Errorf("after the default profile was removed a new container runs as %q", got)
		}
	})
}

// A profile that the kernel cannot enforce is refused by name, not left out.
func TestAppArmorIsEnforcedOrRefused(t *testing.T) {
	n, p := start(t)
	if _, err := os.Stat("/sys/kernel/security/apparmor"); err == nil {
		t.Skip("SKIPPED: this machine has AppArmor")
	}
	for name, edit := range map[string]func(*cri.LinuxContainerSecurityContext){
		"localhost": func(s *cri.LinuxContainerSecurityContext) {
			s.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "mine"}
		},
		"default":    func(s *cri.LinuxContainerSecurityContext) { s.Apparmor = &cri.SecurityProfile{} },
		"deprecated": func(s *cri.LinuxContainerSecurityContext) { s.ApparmorProfile = "localhost/mine" }, //nolint:staticcheck // what is tested
	} {
		t.Run(name, func(t *testing.T) {
			_, err := n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{
				PodSandboxId: p.ID, Config: p.ContainerConfig(sleeper, security(edit)), SandboxConfig: p.Config})
			checkCode(t, err, notNow, "AppArmor is not enabled")
		})
	}
	conf := n.PodConfig(func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{} })
	_, err := n.Runtime.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: conf})
	checkCode(t, err, notNow, "AppArmor is not enabled")
	c := p.Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) {
		s.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
	}))
	c.WaitLog("ready")
}

// fileLabel is a file's SELinux label. A path's last element is not followed: of a
// root below /proc it has to be "/.".
func fileLabel(t *testing.T, path string) string {
	t.Helper()
	buf := make([]byte, 256)
	n, err := unix.Lgetxattr(path, "security.selinux", buf)
	if err != nil {
		t.Fatalf("label of %s: %v", path, err)
	}
	return strings.TrimRight(string(buf[:n]), "\x00")
}

// Where SELinux is on, every process of a pod and every file it may use has the
// label that the pod's and the container's options make, and what they leave open
// is the policy's, with categories that no other pod has.
func TestSELinuxLabels(t *testing.T) {
	if _, err := os.Stat("/sys/fs/selinux/enforce"); err != nil {
		t.Skip("SKIPPED: SELinux is off; see TestSELinuxOptions, and make vm LSM=selinux")
	}
	n, p := start(t, func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Level: "s0:c11,c22"}
	})
	volumes := map[string]string{}
	for _, name := range []string{"relabelled", "as-it-is"} {
		volumes[name] = filepath.Join(n.Volumes, p.Config.Metadata.Uid+"-"+name)
		if err := os.MkdirAll(volumes[name]+"/below", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	before := fileLabel(t, volumes["as-it-is"])
	c := p.Run(sleeper, mounts(
		&cri.Mount{HostPath: volumes["relabelled"], ContainerPath: "/relabelled", SelinuxRelabel: true},
		&cri.Mount{HostPath: volumes["as-it-is"], ContainerPath: "/as-it-is"},
		&cri.Mount{ContainerPath: "/image", Image: &cri.ImageSpec{Image: harness.Busybox}}, // of one layer
	))
	c.WaitLog("ready")
	const process, files = "system_u:system_r:container_t:s0:c11,c22", "system_u:object_r:container_file_t:s0:c11,c22"
	for what, got := range map[string]string{
		"infra": confinement(p.Infra()), "PID 1": confinement(c.Process()), "a command": c.Output("cat", "/proc/self/attr/current"),
	} {
		if strings.TrimRight(got, "\x00") != process {
			t.Errorf("%s runs as %q, want %q", what, got, process)
		}
	}
	for path, want := range map[string]string{
		"/.": files, "/bin/busybox": files, "/dev/shm": files, "/dev/mqueue": files, "/dev/null": files, "/etc/resolv.conf": files, "/etc/hosts": files,
		"/image": files, "/image/bin/busybox": files, "/relabelled": files, "/relabelled/below": files, "/as-it-is": before, "/as-it-is/below": before,
	} {
		if got := fileLabel(t, c.Process().Path("root")+path); got != want {
			t.Errorf("%s has the label %q, want %q", path, got, want)
		}
	}
	// All pods share infra's root, so that it has no pod's categories.
	for _, path := range []string{"/.", "/pause"} {
		if got := fileLabel(t, p.Infra().Path("root")+path); got != "system_u:object_r:container_ro_file_t:s0" {
			t.Errorf("%s of infra has the label %q", path, got)
		}
	}

	own := p.Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) {
		s.SelinuxOptions = &cri.SELinuxOption{Level: "s0:c33,c44", Type: "spc_t"}
	}))
	own.WaitLog("ready")
	if got := confinement(own.Process()); got != "system_u:system_r:spc_t:s0:c33,c44" {
		t.Errorf("a container with options of its own runs as %q", got)
	}
	if got := fileLabel(t, own.Process().Path("root/bin/busybox")); !strings.HasSuffix(got, ":s0:c33,c44") {
		t.Errorf("its root has the label %q", got)
	}

	// Without options: the policy's, and no two pods the same.
	a, b := confinement(n.RunPod().Infra()), confinement(n.RunPod().Infra())
	if a == b || !strings.HasPrefix(a, "system_u:system_r:container_t:s0:c") || !strings.HasPrefix(b, "system_u:system_r:container_t:s0:c") {
		t.Errorf("two pods without options run as %q and %q", a, b)
	}

	privileged := n.RunPod(func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }).
		Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) { s.Privileged = true }))
	privileged.WaitLog("ready")
	if got := confinement(privileged.Process()); strings.Contains(got, ":container_t:") {
		t.Errorf("a privileged container runs as %q", got)
	}

	_, err := n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{PodSandboxId: p.ID, SandboxConfig: p.Config,
		Config: p.ContainerConfig(sleeper, security(func(s *cri.LinuxContainerSecurityContext) { s.SelinuxOptions = &cri.SELinuxOption{Type: "nobodys_t"} }))})
	checkCode(t, err, notNow, "selinux_options")
}

// SELinux options have no effect where SELinux is off, as Kubernetes has it: pods
// that name them run on every node.
func TestSELinuxOptions(t *testing.T) {
	if _, err := os.Stat("/sys/fs/selinux/enforce"); err == nil {
		t.Skip("SKIPPED: SELinux is on")
	}
	options := &cri.SELinuxOption{User: "system_u", Role: "system_r", Type: "spc_t", Level: "s0:c1,c2"}
	n, p := start(t, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.SelinuxOptions = options })
	c := p.Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) { s.SelinuxOptions = options }),
		mounts(&cri.Mount{HostPath: n.Volumes, ContainerPath: "/volumes", SelinuxRelabel: true}))
	c.WaitLog("ready")
	_, err := n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{
		PodSandboxId: p.ID, SandboxConfig: p.Config, Config: p.ContainerConfig(sleeper,
			security(func(s *cri.LinuxContainerSecurityContext) { s.SelinuxOptions = &cri.SELinuxOption{Type: "a:b"} }))})
	checkCode(t, err, invalid, "selinux_options.type")
}
