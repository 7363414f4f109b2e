// Package harness drives a private podshim: what a test needs to run real pods on
// this machine, look at them with the kernel's eyes, and be sure that nothing of
// them is left.
//
// A [Node] is one daemon with everything of its own: root and run directory, CNI
// network (a bridge with an unused 10.21x.y.0/24), directory of pinned network
// namespaces, cgroup in every hierarchy, and a registry on loopback. [Start]
// makes one for a single test; [Main] and [Shared] make one that the parallel
// tests of a package use together. Root is needed: [NeedRoot] skips visibly.
//
//	n := harness.Shared(t)
//	pod := n.RunPod()
//	c := pod.Run([]string{"sh", "-c", "echo ready; sleep 1000"})
//	c.WaitLog("ready")
//	if c.Process().Namespace("net") != pod.Infra().Namespace("net") { ... }
//
// Helpers end the test when a call fails that the test relies on; what a test is
// about is called through Node.Runtime and Node.Images, the plain CRI clients.
//
// When the test ends its pods are removed, and processes, mounts, cgroups, files
// and IP reservations that still bear their IDs are errors. When the node ends
// everything that is left below its directories, in its cgroups or on its bridge
// is an error, and is then taken away.
//
// Environment: PODSHIM_TEST_CGROUP_DRIVER is cgroupfs (if unset) or systemd;
// PODSHIM_BIN_DIR holds podshim and podmon (otherwise they are
// built once per test process); PODSHIM_TOOLS_DIR holds the CNI plugins and
// crictl (otherwise <repository>/_artifacts/tools, see `make tools`).
package harness
