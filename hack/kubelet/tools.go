//go:build tools

// Package tools pins kubelet, which test/e2e runs on podshim. It is a module of
// its own because of the replacements that building Kubernetes from the module
// proxy needs: its staging modules are at v0.0.0 in its go.mod, and published as
// v0.37.0 for Kubernetes v1.37.0. `make kubelet` builds the program.
package tools

import _ "k8s.io/kubernetes/cmd/kubelet"
