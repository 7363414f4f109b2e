package pod

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

func asUser(uid int64) func(*cri.ContainerConfig) {
	return security(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = &cri.Int64Value{Value: uid} })
}

// What is run, with which arguments, environment and directory: command replaces
// the entrypoint and drops the image's arguments, args replace the image's.
func TestCommandEnvAndDirectory(t *testing.T) {
	n, p := start(t)
	opts := harness.ImageOptions{}
	opts.Config.Entrypoint = []string{"sh", "-c", `echo "$0|$*|$PWD|$FROM_IMAGE|$BOTH|$HOME|$PATH"; env`}
	opts.Config.Cmd = []string{"image-cmd"}
	opts.Config.WorkingDir = "/made/by/podshim"
	opts.Config.Env = []string{"FROM_IMAGE=yes", "BOTH=image"}
	ref := n.NewImage("command", opts)
	cases := map[string]struct {
		edit func(*cri.ContainerConfig)
		want string
	}{
		"image's own": {func(*cri.ContainerConfig) {}, "image-cmd||/made/by/podshim|yes|image|/root|"},
		"args":        {func(c *cri.ContainerConfig) { c.Args = []string{"my", "args"} }, "my|args|/made/by/podshim|yes|image|/root|"},
		"command": {func(c *cri.ContainerConfig) {
			c.Command = []string{"sh", "-c", `echo "[$0|$*]"`}
		}, "[sh|]"},
		"environment": {func(c *cri.ContainerConfig) {
			c.Envs = []*cri.KeyValue{{Key: "BOTH", Value: []byte("config")}, {Key: "HOME", Value: []byte("/here")}}
		}, "image-cmd||/made/by/podshim|yes|config|/here|"},
		"directory": {func(c *cri.ContainerConfig) { c.WorkingDir = "/tmp" }, "image-cmd||/tmp|yes|image|/root|"},
		"home of a user": {func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000}
		}, "image-cmd||/made/by/podshim|yes|image|/home/tester|"},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			c := p.With(t).Run(nil, image(ref), tc.edit)
			if s := c.WaitExit(); s.ExitCode != 0 {
				t.Errorf("exit code %d\n%s", s.ExitCode, c.LogText("stderr"))
			}
			first, _, _ := strings.Cut(c.LogText("stdout"), "\n")
			if !strings.HasPrefix(first, tc.want) {
				t.Errorf("got %q, want %q", first, tc.want)
			}
			if name == "image's own" && !strings.HasSuffix(first, "|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin") {
				t.Errorf("no default PATH: %q", first)
			}
		})
	}
}

// Who the process is, by its own /proc/PID/status.
func TestUser(t *testing.T) {
	n, p := start(t)
	withUser := func(user string) string {
		opts := harness.ImageOptions{}
		opts.Config.User = user
		return n.NewImage("user-"+strings.ReplaceAll(user, ":", "-"), opts)
	}
	numeric, named, both := withUser("1000"), withUser("www-data"), withUser("1003:1004")
	cases := map[string]struct {
		image    string
		edit     func(*cri.LinuxContainerSecurityContext)
		uid, gid string
		groups   []string
	}{
		"root":                   {harness.Busybox, nil, "0", "0", []string{"0"}},
		"image's number":         {numeric, nil, "1000", "1000", []string{"1000", "50000"}},
		"image's name":           {named, nil, "33", "33", []string{"33"}},
		"image's user and group": {both, nil, "1003", "1004", []string{"1004"}},
		"number": {harness.Busybox, func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUser = &cri.Int64Value{Value: 2000}
		}, "2000", "0", []string{"0"}},
		"number over image's": {named, func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUser = &cri.Int64Value{Value: 0}
		}, "0", "0", []string{"0"}},
		"user and group": {harness.Busybox, func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = &cri.Int64Value{Value: 2000}, &cri.Int64Value{Value: 3000}
		}, "2000", "3000", []string{"3000"}},
		"name": {harness.Busybox, func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUsername = "tester"
		}, "1000", "1000", []string{"1000", "50000"}},
		"supplemental, merged": {harness.Busybox, func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups = &cri.Int64Value{Value: 1000}, []int64{4000}
		}, "1000", "1000", []string{"1000", "4000", "50000"}},
		"supplemental, strict": {harness.Busybox, func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUser, s.SupplementalGroups = &cri.Int64Value{Value: 1000}, []int64{4000}
			s.SupplementalGroupsPolicy = cri.SupplementalGroupsPolicy_Strict
		}, "1000", "1000", []string{"1000", "4000"}},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			c := p.With(t).Run(sleeper, image(tc.image), func(c *cri.ContainerConfig) {
				if tc.edit != nil {
					tc.edit(c.Linux.SecurityContext)
				}
			})
			c.WaitLog("ready")
			process := c.Process()
			wantIDs := func(field, id string) {
				if got := strings.Fields(process.Status(field)); slices.ContainsFunc(got, func(g string) bool { return g != id }) || len(got) != 4 {
					t.Errorf("%s is %v, want %s", field, got, id)
				}
			}
			wantIDs("Uid", tc.uid)
			wantIDs("Gid", tc.gid)
			got := strings.Fields(process.Status("Groups"))
			slices.Sort(got)
			slices.Sort(tc.groups)
			if !slices.Equal(got, tc.groups) {
				t.Errorf("groups %v, want %v", got, tc.groups)
			}
			user := c.Status().GetUser().GetLinux()
			if strconv.FormatInt(user.GetUid(), 10) != tc.uid || strconv.FormatInt(user.GetGid(), 10) != tc.gid {
				t.Errorf("status says %v", user)
			}
		})
	}
}

const (
	netAdmin = 1 << unix.CAP_NET_ADMIN
	chown    = 1 << unix.CAP_CHOWN
	netRaw   = 1 << unix.CAP_NET_RAW
	sysAdmin = 1 << unix.CAP_SYS_ADMIN
)

func capabilities(t *testing.T, p harness.Process, set string) uint64 {
	t.Helper()
	caps, err := strconv.ParseUint(p.Status(set), 16, 64)
	if err != nil {
		t.Fatalf("%s of %v: %v", set, p, err)
	}
	return caps
}

// Rights of the process: capabilities, seccomp, no_new_privs.
func TestRights(t *testing.T) {
	_, p := start(t)
	cases := map[string]struct {
		edit          func(*cri.LinuxContainerSecurityContext)
		has, lacks    uint64
		seccomp, nnp  string
		ambient       uint64
		privilegedSys bool
	}{
		"default": {edit: nil, has: chown | netRaw, lacks: netAdmin | sysAdmin, seccomp: "0", nnp: "0"},
		"add": {edit: func(s *cri.LinuxContainerSecurityContext) {
			s.Capabilities = &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}}
		}, has: chown | netAdmin, lacks: sysAdmin, seccomp: "0", nnp: "0"},
		"drop all, add one": {edit: func(s *cri.LinuxContainerSecurityContext) {
			s.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"CHOWN"}}
		}, has: chown, lacks: netRaw | netAdmin, seccomp: "0", nnp: "0"},
		"drop": {edit: func(s *cri.LinuxContainerSecurityContext) {
			s.Capabilities = &cri.Capability{DropCapabilities: []string{"NET_RAW"}}
		}, has: chown, lacks: netRaw, seccomp: "0", nnp: "0"},
		"seccomp default": {edit: func(s *cri.LinuxContainerSecurityContext) {
			s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
		}, has: chown, lacks: sysAdmin, seccomp: "2", nnp: "0"},
		"seccomp unconfined": {edit: func(s *cri.LinuxContainerSecurityContext) {
			s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
		}, has: chown, lacks: sysAdmin, seccomp: "0", nnp: "0"},
		"no new privileges": {edit: func(s *cri.LinuxContainerSecurityContext) { s.NoNewPrivs = true }, has: chown, seccomp: "0", nnp: "1"},
		"privileged": {edit: func(s *cri.LinuxContainerSecurityContext) { s.Privileged = true },
			has: chown | netAdmin | sysAdmin, seccomp: "0", nnp: "0", privilegedSys: true},
	}
	privileged := harness.Shared(t).RunPod(func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			pod := p
			if tc.privilegedSys {
				pod = privileged
			}
			c := pod.With(t).Run(sleeper, func(c *cri.ContainerConfig) {
				if tc.edit != nil {
					tc.edit(c.Linux.SecurityContext)
				}
			})
			c.WaitLog("ready")
			process := c.Process()
			for _, set := range []string{"CapBnd", "CapEff", "CapPrm"} {
				caps := capabilities(t, process, set)
				if caps&tc.has != tc.has || caps&tc.lacks != 0 {
					t.Errorf("%s is %x, want all of %x and none of %x", set, caps, tc.has, tc.lacks)
				}
			}
			if got := process.Status("Seccomp"); got != tc.seccomp {
				t.Errorf("Seccomp is %s, want %s", got, tc.seccomp)
			}
			if got := process.Status("NoNewPrivs"); got != tc.nnp {
				t.Errorf("NoNewPrivs is %s, want %s", got, tc.nnp)
			}
			sys, ok := process.MountAt("/sys")
			if writable := slices.Contains(sys.Options, "rw"); !ok || writable != tc.privilegedSys {
				t.Errorf("/sys is mounted %v", sys)
			}
			// An exec has the container's rights, not the runtime's.
			if got := c.Output("grep", "CapEff", "/proc/self/status"); !strings.HasSuffix(got, process.Status("CapEff")) {
				t.Errorf("exec has %s, container %s", got, process.Status("CapEff"))
			}
			if got := c.Output("grep", "Seccomp:", "/proc/self/status"); !strings.HasSuffix(got, tc.seccomp) {
				t.Errorf("exec has %s", got)
			}
		})
	}
}

// A user who is not root has the added capabilities in the bounding set only.
func TestCapabilitiesOfAUser(t *testing.T) {
	_, p := start(t)
	c := p.Run(sleeper, asUser(1000), security(func(s *cri.LinuxContainerSecurityContext) {
		s.Capabilities = &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}}
	}))
	c.WaitLog("ready")
	if got := capabilities(t, c.Process(), "CapEff"); got != 0 {
		t.Errorf("CapEff is %x, want none", got)
	}
	if got := capabilities(t, c.Process(), "CapBnd"); got&netAdmin == 0 {
		t.Errorf("CapBnd is %x, want NET_ADMIN in it", got)
	}
}

// A seccomp profile of the node.
func TestSeccompLocalhost(t *testing.T) {
	n, p := start(t)
	profile := filepath.Join(n.Dir, "no-mkdir.json")
	const text = `{"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
 "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]}`
	if err := os.WriteFile(profile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c := p.Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) {
		s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: profile}
	}))
	c.WaitLog("ready")
	if _, stderr, code := c.Exec("mkdir", "/tmp/x"); code == 0 || !strings.Contains(stderr, "not implemented") {
		t.Errorf("mkdir: code %d, %q; want the profile's ENOSYS", code, stderr)
	}
}

// The root filesystem, read-only.
func TestReadonlyRootfs(t *testing.T) {
	_, p := start(t)
	c := p.Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true }))
	c.WaitLog("ready")
	if _, stderr, code := c.Exec("touch", "/data/x"); code == 0 || !strings.Contains(stderr, "Read-only") {
		t.Errorf("touch: code %d, %q", code, stderr)
	}
	if root, _ := c.Process().MountAt("/"); !slices.Contains(root.Options, "ro") {
		t.Errorf("/ is mounted %v", root)
	}
	c.Output("touch", "/dev/shm/x")
}

// Masked and read-only paths are those of the config.
func TestMaskedAndReadonlyPaths(t *testing.T) {
	_, p := start(t)
	c := p.Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) {
		s.MaskedPaths = []string{"/proc/interrupts", "/etc/group", "/data"}
		s.ReadonlyPaths = []string{"/proc/sys", "/tmp"}
	}))
	c.WaitLog("ready")
	for _, masked := range []string{"/proc/interrupts", "/etc/group"} {
		if got := c.Output("head", "-c", "10", masked); got != "" {
			t.Errorf("%s can be read: %q", masked, got)
		}
	}
	if _, _, code := c.Exec("touch", "/data/x"); code == 0 {
		t.Error("masked directory can be written")
	}
	for _, readonly := range []string{"/tmp/x", "/proc/sys/kernel/hostname"} {
		if _, _, code := c.Exec("sh", "-c", "echo x > "+readonly); code == 0 {
			t.Errorf("%s can be written", readonly)
		}
	}
	plain := p.Run(sleeper)
	plain.WaitLog("ready")
	if got := plain.Output("cat", "/etc/group"); got == "" {
		t.Error("a path masked in one container is masked in another")
	}
}

// What every container of a pod has: /dev/shm, resolv.conf, host name.
func TestPodFiles(t *testing.T) {
	_, p := start(t, func(c *cri.PodSandboxConfig) {
		c.Hostname = "my-pod"
		c.DnsConfig = &cri.DNSConfig{Servers: []string{"192.0.2.1", "192.0.2.2"}, Searches: []string{"a.test", "b.test"}, Options: []string{"ndots:5"}}
	})
	a, b := p.Run(sleeper), p.Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true }))
	a.Output("sh", "-c", "echo shared > /dev/shm/file")
	if got := b.Output("cat", "/dev/shm/file"); got != "shared" {
		t.Errorf("/dev/shm has %q in B", got)
	}
	for _, c := range []*harness.Container{a, b} {
		if got := c.Output("cat", "/etc/resolv.conf"); got != "search a.test b.test\nnameserver 192.0.2.1\nnameserver 192.0.2.2\noptions ndots:5" {
			t.Errorf("resolv.conf is %q", got)
		}
		if got := c.Output("hostname"); got != "my-pod" {
			t.Errorf("host name is %q", got)
		}
		if got := c.Output("cat", "/etc/hostname"); got != "my-pod" {
			t.Errorf("/etc/hostname is %q", got)
		}
		if m, ok := c.Process().MountAt("/dev/shm"); !ok || m.Type != "tmpfs" {
			t.Errorf("/dev/shm is %v", m)
		}
	}
	if host, _ := os.Hostname(); host == "my-pod" {
		t.Error("the machine's own host name was changed")
	}
}

// Mount propagation: what is mounted later on the host shows up or not, and the
// other way round.
func TestPropagation(t *testing.T) {
	n, p := start(t, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	cases := map[string]struct {
		mode           cri.MountPropagation
		toCont, toHost bool
	}{
		"private":       {cri.MountPropagation_PROPAGATION_PRIVATE, false, false},
		"from host":     {cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, true, false},
		"bidirectional": {cri.MountPropagation_PROPAGATION_BIDIRECTIONAL, true, true},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			host := sharedDir(t, n)
			c := p.With(t).Run(sleeper, mounts(&cri.Mount{HostPath: host, ContainerPath: "/mnt-test", Propagation: tc.mode}),
				security(func(s *cri.LinuxContainerSecurityContext) { s.Privileged = true }))
			c.WaitLog("ready")
			if err := unix.Mount("tmpfs", host+"/from-host", "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
			if _, ok := c.Process().MountAt("/mnt-test/from-host"); ok != tc.toCont {
				t.Errorf("the host's mount is in the container: %v", ok)
			}
			c.Output("mount", "-t", "tmpfs", "tmpfs", "/mnt-test/from-container")
			if _, ok := self.MountAt(host + "/from-container"); ok != tc.toHost {
				t.Errorf("the container's mount is on the host: %v", ok)
			}
			c.Stop(0)
			c.Remove()
		})
	}
}

// sharedDir is a host directory on a shared mount of its own.
func sharedDir(t *testing.T, n *harness.Node) string {
	t.Helper()
	host, err := os.MkdirTemp(n.Volumes, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, step := range []error{
		unix.Mount(host, host, "", unix.MS_BIND, ""), unix.Mount("", host, "", unix.MS_SHARED, ""),
		os.Mkdir(host+"/from-host", 0o755), os.Mkdir(host+"/from-container", 0o755),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	t.Cleanup(func() {
		for _, dir := range []string{"/from-host", "/from-container", ""} {
			_ = unix.Unmount(host+dir, unix.MNT_DETACH)
		}
	})
	return host
}

// A recursively read-only mount is read-only below its submounts as well.
func TestRecursiveReadOnly(t *testing.T) {
	n, p := start(t)
	host := sharedDir(t, n)
	if err := unix.Mount("tmpfs", host+"/from-host", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	c := p.Run(sleeper, mounts(
		&cri.Mount{HostPath: host, ContainerPath: "/plain", Readonly: true},
		&cri.Mount{HostPath: host, ContainerPath: "/deep", Readonly: true, RecursiveReadOnly: true},
	))
	c.WaitLog("ready")
	if _, _, code := c.Exec("touch", "/plain/x"); code == 0 {
		t.Error("read-only mount can be written")
	}
	c.Output("touch", "/plain/from-host/x")
	if _, _, code := c.Exec("touch", "/deep/from-host/y"); code == 0 {
		t.Error("submount of a recursively read-only mount can be written")
	}
	if handlers, err := n.Runtime.Status(n.Context(), &cri.StatusRequest{}); err != nil || len(handlers.RuntimeHandlers) == 0 ||
		!handlers.RuntimeHandlers[0].GetFeatures().GetRecursiveReadOnlyMounts() {
		t.Errorf("kubelet is not told of recursive read-only mounts: %v, %v", handlers.GetRuntimeHandlers(), err)
	}
}

// Devices of the config with the permissions of the config, and no others.
func TestDevices(t *testing.T) {
	const device = "/dev/fuse" // opens without any privilege of its own
	var host, inside unix.Stat_t
	if err := unix.Stat(device, &host); err != nil {
		t.Skipf("SKIPPED: %s: %v", device, err)
	}
	_, p := start(t)
	c := p.Run(sleeper, func(c *cri.ContainerConfig) {
		c.Devices = []*cri.Device{{HostPath: device, ContainerPath: "/dev/mine", Permissions: "r"}}
	})
	c.WaitLog("ready")
	if err := unix.Stat(c.Process().Path("root/dev/mine"), &inside); err != nil || inside.Rdev != host.Rdev {
		t.Errorf("device in the container: %v, %d, want %d", err, inside.Rdev, host.Rdev)
	}
	c.Output("sh", "-c", ": < /dev/mine")
	if _, _, code := c.Exec("sh", "-c", ": > /dev/mine"); code == 0 {
		t.Error("a device with permission r can be opened for writing")
	}
	c.Output("sh", "-c", "echo x > /dev/null; head -c 1 /dev/urandom > /dev/null; test -c /dev/tty")
	plain := p.Run(sleeper)
	plain.WaitLog("ready")
	plain.Output("mknod", "/tmp/mine", "c", strconv.Itoa(int(unix.Major(host.Rdev))), strconv.Itoa(int(unix.Minor(host.Rdev))))
	if _, stderr, code := plain.Exec("sh", "-c", ": < /tmp/mine"); code == 0 || !strings.Contains(stderr, "not permitted") {
		t.Errorf("a device that was not given: code %d, %q", code, stderr)
	}
}

// Sysctls are the pod's, not the host's.
func TestSysctls(t *testing.T) {
	const name = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
	before, _ := os.ReadFile(name)
	_, p := start(t, func(c *cri.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "77", "kernel.shm_rmid_forced": "1"}
	})
	c := p.Run(sleeper)
	if got := c.Output("cat", name, "/proc/sys/kernel/shm_rmid_forced"); got != "77\n1" {
		t.Errorf("in the container they are %q", got)
	}
	if after, _ := os.ReadFile(name); string(after) != string(before) {
		t.Errorf("the host's went from %s to %s", before, after)
	}
}

// RLIMIT_NOFILE is sane whatever the daemon's own is.
func TestNofile(t *testing.T) {
	_, p := start(t)
	c := p.Run(sleeper)
	c.WaitLog("ready")
	for line := range strings.Lines(c.Process().Read("limits")) {
		if !strings.HasPrefix(line, "Max open files") {
			continue
		}
		fields := strings.Fields(line)
		soft, _ := strconv.Atoi(fields[3])
		hard, _ := strconv.Atoi(fields[4])
		if soft != 1024 || hard < soft || hard > 1<<20 {
			t.Errorf("limits are %d and %d", soft, hard)
		}
		return
	}
	t.Error("no limit in /proc/PID/limits")
}

// A privileged container has the host's devices.
func TestPrivilegedDevices(t *testing.T) {
	_, p := start(t, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	c := p.Run(sleeper, security(func(s *cri.LinuxContainerSecurityContext) { s.Privileged = true }))
	c.WaitLog("ready")
	c.Output("test", "-c", "/dev/kmsg")
	c.Output("sh", "-c", "head -c 0 /dev/kmsg")
}

// What an image declares as VOLUME is a directory with the image's content in it,
// gone with the container.
func TestImageVolumes(t *testing.T) {
	n, p := start(t)
	opts := harness.ImageOptions{Files: map[string]string{"vol/file": "from the image"}}
	opts.Config.Volumes = map[string]struct{}{"/vol": {}}
	c := p.Run(sleeper, image(n.NewImage("volume", opts)))
	c.WaitLog("ready")
	if got := c.Output("cat", "/vol/file"); got != "from the image" {
		t.Errorf("volume has %q", got)
	}
	if _, ok := c.Process().MountAt("/vol"); !ok {
		t.Error("/vol is not a mount")
	}
	c.Output("touch", "/vol/new")
}

// A host port leads to the pod, from the host's own address, and ends with it.
func TestHostPort(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	const port = 28461
	p := n.RunPod(func(c *cri.PodSandboxConfig) {
		c.PortMappings = []*cri.PortMapping{{ContainerPort: 80, HostPort: port}}
	})
	c := p.Shell("mkdir -p /tmp/www; echo through the port > /tmp/www/index.html; httpd -p 80 -h /tmp/www; echo serving; sleep 100000")
	c.WaitLog("serving")
	client := n.RunPod().Run(sleeper)
	gateway := client.Output("sh", "-c", "ip route | sed -n 's/default via \\([0-9.]*\\).*/\\1/p'")
	if got := client.Output("wget", "-q", "-O", "-", "http://"+gateway+":"+strconv.Itoa(port)+"/"); got != "through the port" {
		t.Errorf("through the host port came %q", got)
	}
	if err := p.StopAndRemove(); err != nil {
		t.Fatal(err)
	}
	if _, _, code := client.Exec("wget", "-q", "-T", "2", "-O", "-", "http://"+gateway+":"+strconv.Itoa(port)+"/"); code == 0 {
		t.Error("the host port outlives the pod")
	}
}
