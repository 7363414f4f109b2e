// Package pod tests that podshim's pods are what a pod is. Every test speaks CRI
// v1 to a real daemon and then looks at the machine: /proc, cgroup files,
// namespaces, mounts, the files of the CNI plugins. The claims P1 to P14 are
// those of the project's model of a pod:
//
//	model_test.go      P1 to P7: infra container, shared namespaces, network, volumes
//	process_test.go    P11, P12: PID namespaces, the life and end of processes
//	resources_test.go  P13, P14: states apart, cgroups, out of memory, stats
//	container_test.go  what a container gets: user, rights, mounts, devices...
//	stream_test.go     exec, attach and port-forward by crictl, over SPDY and WebSocket
//	websocket_test.go  the same over WebSocket v4
//	log_test.go        CRI logs
//	image_test.go      images
//	restart_test.go    the daemon's plain restart and kill
//	retry_test.go      repeated and retried calls
//	userns_test.go     P2: the pod's user namespace
//	fields_test.go     fields of the configs that no other file is about
//	lsm_test.go        AppArmor profiles and SELinux labels, or that they are refused
//	list_test.go       lists and streams of any length
//	events_test.go     GetContainerEvents
//	node_test.go       readiness, handlers, what crictl shows
//	badinput_test.go   every RPC with input that makes no sense
//
// Root is needed; see package harness for what else.
package pod

import (
	"os"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m, harness.Options{})) }

// sleeper is a command that does nothing until it is told to end.
var sleeper = []string{"sh", "-c", "trap 'exit 0' TERM; echo ready; sleep 100000 & wait"}

// start is what nearly every test begins with: a node and one plain pod.
func start(t *testing.T, edits ...func(*cri.PodSandboxConfig)) (*harness.Node, *harness.Pod) {
	t.Helper()
	n := harness.Shared(t)
	t.Parallel()
	return n, n.RunPod(edits...)
}

func podNamespaces(o *cri.NamespaceOption) func(*cri.PodSandboxConfig) {
	return func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = o }
}

func security(edit func(*cri.LinuxContainerSecurityContext)) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) { edit(c.Linux.SecurityContext) }
}

func resources(r *cri.LinuxContainerResources) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) { c.Linux.Resources = r }
}

func image(ref string) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) { c.Image.Image = ref }
}

func mounts(m ...*cri.Mount) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) { c.Mounts = append(c.Mounts, m...) }
}
