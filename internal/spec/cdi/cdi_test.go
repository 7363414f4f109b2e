package cdi

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const vendorFile = `{
  "cdiVersion": "0.6.0",
  "kind": "example.com/gadget",
  "devices": [{"name": "one", "containerEdits": {
    "env": ["GADGET=one"],
    "deviceNodes": [{"path": "/dev/gadget", "hostPath": "/dev/null"}]}}]
}`

func TestInject(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "vendor.json"), []byte(vendorFile), 0o644); err != nil {
		t.Fatal(err)
	}
	field := func(names ...string) *runtime.ContainerConfig {
		c := &runtime.ContainerConfig{}
		for _, n := range names {
			c.CDIDevices = append(c.CDIDevices, &runtime.CDIDevice{Name: n})
		}
		return c
	}
	both := field("example.com/gadget=one")
	both.Annotations = map[string]string{"cdi.k8s.io/plugin_0": "example.com/gadget=one"}
	for _, tc := range []struct {
		name    string
		config  *runtime.ContainerConfig
		devices int
		err     error
	}{
		{"none", field(), 0, nil},
		{"field", field("example.com/gadget=one"), 1, nil},
		{"annotation", &runtime.ContainerConfig{Annotations: map[string]string{"cdi.k8s.io/plugin_0": "example.com/gadget=one"}}, 1, nil},
		{"both are one", both, 1, nil},
		{"unknown", field("example.com/gadget=one", "example.com/gadget=two"), 0, errdefs.ErrNotFound},
		{"bad annotation", &runtime.ContainerConfig{Annotations: map[string]string{"cdi.k8s.io/plugin_0": "nonsense"}}, 0, errdefs.ErrInvalidArgument},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{Resources: &specs.LinuxResources{}}}
			err := Inject(spec, tc.config, []string{dir})
			if !errors.Is(err, tc.err) {
				t.Fatalf("error %v, want %v", err, tc.err)
			}
			if len(spec.Linux.Devices) != tc.devices || len(spec.Linux.Resources.Devices) != tc.devices {
				t.Errorf("devices %v, rules %v, want %d of each", spec.Linux.Devices, spec.Linux.Resources.Devices, tc.devices)
			}
			if got := slices.Contains(spec.Process.Env, "GADGET=one"); got != (tc.devices > 0) {
				t.Errorf("environment %v", spec.Process.Env)
			}
		})
	}
}
