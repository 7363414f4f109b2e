package pod

import (
	"os"
	"strings"
	"syscall"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// P2: a pod's user namespace is one for all its containers and not the host's:
// root in it is nobody special outside, on the disk neither.
func TestUserNamespace(t *testing.T) {
	for name, network := range map[string]cri.NamespaceMode{"own network": cri.NamespaceMode_POD, "host network": cri.NamespaceMode_NODE} {
		t.Run(name, func(t *testing.T) { testUserNamespace(t, network) })
	}
}

func testUserNamespace(t *testing.T, network cri.NamespaceMode) {
	const host, length = 1_000_000, 65536
	mapping := []*cri.IDMapping{{HostId: host, ContainerId: 0, Length: length}}
	options := &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: mapping, Gids: mapping}
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	p := n.RunPod(podNamespaces(&cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER, Network: network, UsernsOptions: options}))
	if s, err := n.Runtime.Status(n.Context(), &cri.StatusRequest{}); err != nil ||
		!s.GetFeatures().GetUserNamespacesHostNetwork() || !s.GetRuntimeHandlers()[0].GetFeatures().GetUserNamespaces() {
		t.Errorf("kubelet is not told that this works: %v, %v", s, err)
	}
	if own := p.Infra().Namespace("net") != self.Namespace("net"); own != (network == cri.NamespaceMode_POD) {
		t.Errorf("the pod has a network namespace of its own: %v", own)
	}
	inUser := security(func(s *cri.LinuxContainerSecurityContext) { s.NamespaceOptions.UsernsOptions = options })
	volume, err := os.MkdirTemp(n.Volumes, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(volume, 0o777); err != nil {
		t.Fatal(err)
	}
	a := p.Run(sleeper, inUser, mounts(&cri.Mount{HostPath: volume, ContainerPath: "/volume", UidMappings: mapping, GidMappings: mapping}))
	b := p.Run(sleeper, inUser)
	a.WaitLog("ready")
	b.WaitLog("ready")
	for name, process := range map[string]harness.Process{"infra": p.Infra(), "a": a.Process(), "b": b.Process()} {
		if got := process.Namespace("user"); got == self.Namespace("user") || got != p.Infra().Namespace("user") {
			t.Errorf("user namespace of %s is %s, infra's %s, the host's %s", name, got, p.Infra().Namespace("user"), self.Namespace("user"))
		}
		if got := strings.Fields(process.Read("uid_map")); strings.Join(got, " ") != "0 1000000 65536" {
			t.Errorf("uid_map of %s is %v", name, got)
		}
	}
	if got := strings.Fields(a.Process().Status("Uid")); got[0] != "1000000" {
		t.Errorf("root of the container is %s on the host", got[0])
	}
	if got := a.Output("id", "-u"); got != "0" {
		t.Errorf("in the container it is %s", got)
	}
	if got := a.Output("stat", "-c", "%u", "/bin/busybox"); got != "0" {
		t.Errorf("the image's files belong to %s", got)
	}
	if _, _, code := a.Exec("sh", "-c", "echo 1 > /proc/sys/kernel/panic"); code == 0 {
		t.Error("the container's root changes the host's sysctls")
	}
	if _, _, code := a.Exec("sh", "-c", "echo x > /sys/kernel/mm/transparent_hugepage/enabled"); code == 0 {
		t.Error("the container's root writes to the host's sysfs")
	}
	if got := strings.Fields(a.Output("cat", "/proc/self/uid_map")); strings.Join(got, " ") != "0 1000000 65536" {
		t.Errorf("uid_map of an exec is %v", got)
	}
	a.Output("touch", "/volume/made", "/made")
	if info, err := os.Stat(volume + "/made"); err != nil || info.Sys().(*syscall.Stat_t).Uid != 0 {
		t.Errorf("the volume's file belongs to another on the host: %v, %v", info, err)
	}
	if owner := a.Output("stat", "-c", "%u", "/volume/made"); owner != "0" {
		t.Errorf("file on the volume belongs to %s in the container", owner)
	}
}
