package e2e

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// Who a container runs as, and who is not let run.
func testNonRoot(t *testing.T, k *Kubelet) {
	p := k.Run("non-root")
	status := p.Wait("running what may run, with the rest refused", func(s PodStatus) bool {
		return s.Container("by-image").State.Running != nil && s.Container("by-pod").State.Running != nil &&
			s.Container("root").State.Waiting != nil && s.Container("nameless").State.Waiting != nil &&
			s.Container("root").State.Waiting.Message != "" && s.Container("nameless").State.Waiting.Message != ""
	})
	// kubelet hands on the image's user and not its group, which is then root's.
	for name, want := range map[string][2]string{"by-image": {"1003", "0"}, "by-pod": {"1005", "1006"}} {
		c := p.Process(name)
		if uid, gid := strings.Fields(c.Status("Uid"))[1], strings.Fields(c.Status("Gid"))[1]; uid != want[0] || gid != want[1] {
			t.Errorf("%s runs as %s:%s, want %v", name, uid, gid, want)
		}
	}
	// kubelet goes by what podshim says of the image's user.
	for name, want := range map[string]string{
		"root":     "container has runAsNonRoot and image will run as root",
		"nameless": "container has runAsNonRoot and image has non-numeric user (www-data)",
	} {
		w := status.Container(name).State.Waiting
		if w.Reason != "CreateContainerConfigError" || !strings.Contains(w.Message, want) || status.Container(name).ID() != "" {
			t.Errorf("%v, want it not created: %s", status.Container(name), want)
		}
	}
}

// System call filters: one from a file of the node's, and the runtime's own.
func testSeccomp(t *testing.T, k *Kubelet) {
	err := os.MkdirAll(k.Root+"/seccomp", 0o755)
	if err == nil {
		err = os.WriteFile(k.Root+"/seccomp/no-directories.json", []byte(`{"defaultAction": "SCMP_ACT_ALLOW",
			"syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}`), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	p := k.Run("seccomp")
	p.WaitReady()
	if log := p.WaitLog("filtered", "/file\n"); !strings.Contains(log, "mkdir: can't create directory '/dir': Operation not supported") {
		t.Errorf("the filter is not in force:\n%s", log)
	}
	if log := p.WaitLog("usual", "unshare: "); !strings.Contains(log, "/dir\n") || !strings.Contains(log, "not permitted") {
		t.Errorf("under the runtime's own filter:\n%s", log)
	}
	for _, name := range []string{"filtered", "usual"} {
		if got := p.Process(name).Status("Seccomp"); got != "2" {
			t.Errorf("Seccomp of %s is %s, want 2 (a filter)", name, got)
		}
	}
}

// What a mount does not allow.
func testMountOptions(t *testing.T, k *Kubelet) {
	p := k.Run("mount-options")
	p.WaitReady()
	if log := p.WaitLog("look", "looked\n"); !strings.HasPrefix(log, "ran\n") || !strings.Contains(log, "/strict/echo: Permission denied") {
		t.Errorf("the container says\n%s", log)
	}
	look := p.Process("look")
	for _, option := range []string{"noexec", "nodev", "nosuid"} {
		strict, _ := look.MountAt("/strict")
		data, _ := look.MountAt("/data")
		if !slices.Contains(strict.Options, option) || slices.Contains(data.Options, option) {
			t.Errorf("/strict is mounted %v, /data %v; want %s in the first only", strict.Options, data.Options, option)
		}
	}
	// The pod says no sysctl of its own: it has kubelet's.
	if got := p.Exec("look", "cat", "/proc/sys/net/ipv4/ip_local_port_range"); got != "30000\t30999\n" {
		t.Errorf("the pod's ports are %q, want kubelet's defaultPodSysctls", got)
	}
}

// The host's network without the host's users.
func testHostNetworkUsers(t *testing.T, k *Kubelet) {
	p := k.Run("host-network-users")
	p.WaitReady()
	if log := p.WaitLog("look", "looked\n"); !strings.HasPrefix(log, "0\n") || !strings.Contains(log, "not permitted") {
		t.Errorf("root with NET_ADMIN in the pod says\n%s", log)
	}
	look, host := p.Process("look"), self(t)
	if look.Namespace("net") != host.Namespace("net") || look.Namespace("user") == host.Namespace("user") {
		t.Errorf("namespaces are %s and %s, the host's %s and %s; want its network and users of the pod's own",
			look.Namespace("net"), look.Namespace("user"), host.Namespace("net"), host.Namespace("user"))
	}
}
