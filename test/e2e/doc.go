// Package e2e runs a real kubelet on a private podshim, without an API server: it
// drops manifests of examples/pods into kubelet's directory of static pods and
// then looks at what kubelet reports and at the machine itself. [StartCluster] has
// an API server too, for examples/cluster.
//
// Kubelet's word is that of its HTTPS endpoints: /pods, /stats/summary,
// /metrics/cadvisor, /containerLogs, /exec, /attach, /run, /portForward. The
// machine's word is /proc, the cgroup files and the namespaces. podshim's own word
// is asked for one thing only: which container ID is a pod's infra container, which
// kubelet does not tell.
//
// [Start] makes a podshim ([harness.Start]), a registry with the images of
// test/images, and a kubelet with directories, ports and a cgroup root of its own.
// Everything goes when the test ends, and what is left over is an error, as is a
// line that kubelet logged as an error and that no entry of harmless explains.
//
// kubelet is hack/kubelet's, built by `make kubelet`, and the API server and kubectl
// with it by `make kube`; without them (or without root) the tests skip. What this package needs besides: see package harness.
package e2e
