package pod

import (
	"os"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// P2: a pod's user namespace is one for all its containers and not the host's:
// root in it is nobody special outside, on the disk neither.
func TestUserNamespace(t *testing.T) {
	const host, length = 1_000_000, 65536
	mapping := []*cri.IDMapping{{HostId: host, ContainerId: 0, Length: length}}
	options := &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: mapping, Gids: mapping}
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	p := n.RunPod(podNamespaces(&cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER, UsernsOptions: options}))
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
	a.Output("touch", "/volume/made", "/made")
	if owner := a.Output("stat", "-c", "%u", "/volume/made"); owner != "0" {
		t.Errorf("file on the volume belongs to %s in the container", owner)
	}
}
