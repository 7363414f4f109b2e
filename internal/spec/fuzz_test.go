package spec

import (
	"encoding/json"
	"errors"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// FuzzForContainer feeds configs as they come over the wire. Whatever comes:
// no panic, an error of a known class, or a spec that keeps its promises.
func FuzzForContainer(f *testing.F) {
	for _, tc := range containerCorpus {
		c := testContainer()
		tc.edit(&c)
		config, err := proto.Marshal(c.Config)
		if err != nil {
			f.Fatal(err)
		}
		pod, err := proto.Marshal(c.Pod.Config)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(config, pod, c.Image.StopSignal)
	}
	f.Fuzz(func(t *testing.T, config, pod []byte, signal string) {
		c := testContainer()
		c.Config, c.Pod.Config = &runtime.ContainerConfig{}, &runtime.PodSandboxConfig{}
		if proto.Unmarshal(config, c.Config) != nil || proto.Unmarshal(pod, c.Pod.Config) != nil {
			t.Skip()
		}
		c.Image.StopSignal = signal
		c.Pod.PID, c.TargetPID, c.Pod.User = "/proc/7/ns/pid", "/proc/8/ns/pid", "/proc/7/ns/user"
		c.ReadSeccomp = func(string) ([]byte, error) { return []byte(`{"defaultAction":"SCMP_ACT_ALLOW"}`), nil }
		if s := StopSignal(c.Config, c.Image); s < 1 || s > sigRTMax {
			t.Errorf("stop signal %d", s)
		}
		valid := ValidateContainer(c.Config, c.Pod.Config)
		spec, err := ForContainer(c)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotImplemented(err) {
				t.Errorf("an error of no class: %v", err)
			}
			return
		}
		if valid != nil {
			t.Errorf("described, but invalid: %v", valid)
		}
		checkSpec(t, spec, c)

		podErr := ValidatePod(c.Pod.Config)
		i := testInfra()
		i.Pod.Config = c.Pod.Config
		i.ReadSeccomp, i.LoadedAppArmor = c.ReadSeccomp, c.LoadedAppArmor
		if _, err := ForInfra(i); err == nil && podErr != nil {
			t.Errorf("infra described, but invalid: %v", podErr)
		} else if err != nil && podErr == nil && errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("valid, but infra refused: %v", err)
		}
	})
}

// checkSpec holds what must be true of any container's spec.
func checkSpec(t *testing.T, spec *specs.Spec, c Container) {
	t.Helper()
	if _, err := json.Marshal(spec); err != nil {
		t.Error(err)
	}
	seen := make(map[string]bool)
	for _, m := range spec.Mounts {
		if !path.IsAbs(m.Destination) || path.Clean(m.Destination) != m.Destination || seen[m.Destination] {
			t.Errorf("destination %q is not clean, or twice there", m.Destination)
		}
		seen[m.Destination] = true
	}
	for _, name := range spec.Process.Capabilities.Bounding {
		if !slices.Contains(c.Host.Capabilities, name) {
			t.Errorf("%s is more than the runtime has", name)
		}
	}
	for _, kv := range spec.Process.Env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" || hasNUL(kv) {
			t.Errorf("environment %q", kv)
		}
	}
	if len(spec.Process.Args) == 0 || spec.Process.Args[0] == "" || !path.IsAbs(spec.Process.Cwd) {
		t.Errorf("args %q in %q", spec.Process.Args, spec.Process.Cwd)
	}
	if !privileged(c.Config) && slices.ContainsFunc(spec.Linux.Resources.Devices, func(r specs.LinuxDeviceCgroup) bool {
		return r.Allow && r.Type == ""
	}) {
		t.Error("an ordinary container may use every device")
	}
}

func BenchmarkForContainer(b *testing.B) {
	for b.Loop() {
		containerCorpus[1].built(b)
	}
}
