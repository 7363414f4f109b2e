//go:build tools

// Package tools pins the programs of Kubernetes that test/e2e runs with podshim:
// kubelet, and for the tests of a whole cluster its API server, kubectl and kubeadm. It is a
// module of its own because of the replacements that building Kubernetes from the
// module proxy needs: its staging modules are at v0.0.0 in its go.mod, and published
// as v0.37.0 for Kubernetes v1.37.0. `make kube` builds the programs.
package tools

import (
	_ "k8s.io/kubernetes/cmd/kube-apiserver"
	_ "k8s.io/kubernetes/cmd/kubeadm"
	_ "k8s.io/kubernetes/cmd/kubectl"
	_ "k8s.io/kubernetes/cmd/kubelet"
)
