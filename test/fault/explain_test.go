package fault

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

type explanation struct {
	Pod, ID, State, Why string
	IPs, Node           []string
	Containers          []struct {
		Name, State, Why string
		Shares, Own      []string
	}
	Calls []remembered
}

type remembered struct {
	Name, Container, Error string
	Steps                  []struct{ Name, Error string }
}

func explain(t *testing.T, n *harness.Node, what string) explanation {
	t.Helper()
	out, err := n.Podshim("explain", "--json", what).Output()
	var all []explanation
	if jerr := json.Unmarshal(out, &all); err != nil || jerr != nil || len(all) != 1 {
		t.Fatalf("explain %s: %v, %v\n%s", what, err, jerr, out)
	}
	return all[0]
}

// steps are the names of the steps of the last call of a name.
func (e explanation) steps(call string) (names []string, failed string) {
	for _, c := range e.Calls {
		if c.Name != call {
			continue
		}
		names, failed = nil, ""
		for _, s := range c.Steps {
			names = append(names, s.Name)
			if s.Error != "" {
				failed = s.Name
			}
		}
	}
	return names, failed
}

func TestExplain(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})

	t.Run("a pod that runs", func(t *testing.T) {
		p := n.With(t).RunPod()
		c := p.Run([]string{"sleep", "100000"})
		for _, what := range []string{p.Config.Metadata.Name, "test/" + p.Config.Metadata.Name, p.ID[:12], c.ID[:12]} {
			e := explain(t, n, what)
			if e.ID != p.ID || e.State != "ready" || len(e.IPs) != 1 || len(e.Containers) != 1 || e.Containers[0].State != "running" {
				t.Fatalf("%s: %+v", what, e)
			}
			// The kernel's word on what is shared.
			for _, kind := range []string{"net", "ipc", "uts", "pid", "user", "mnt"} {
				same := c.Process().Namespace(kind) == p.Infra().Namespace(kind)
				if slices.Contains(e.Containers[0].Shares, kind) != same || slices.Contains(e.Containers[0].Own, kind) == same {
					t.Errorf("%s is shared: %v; said to be shared: %v", kind, same, e.Containers[0].Shares)
				}
				node, err := os.Readlink("/proc/self/ns/" + kind)
				if err != nil {
					t.Fatal(err)
				}
				if is := p.Infra().Namespace(kind) == node; slices.Contains(e.Node, kind) != is {
					t.Errorf("%s of the pod is the node's: %v; said to be: %v", kind, is, e.Node)
				}
			}
			for call, want := range map[string]string{"RunPodSandbox": "network (CNI ADD)", "CreateContainer": "snapshot", "StartContainer": "process (podmon)"} {
				if steps, _ := e.steps(call); !slices.Contains(steps, want) {
					t.Errorf("%s: the steps of %s are %q", what, call, steps)
				}
			}
			for _, call := range e.Calls {
				if call.Name == "StartContainer" && call.Container != c.Config.Metadata.Name {
					t.Errorf("%s: the start of %s is said to be of %q", what, c.Config.Metadata.Name, call.Container)
				}
			}
		}
	})
	t.Run("a pod that was made at the second try, and removed", func(t *testing.T) {
		pod := n.With(t).PodConfig()
		if _, err := n.Runtime.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: pod, RuntimeHandler: "no-such"}); err == nil {
			t.Fatal("a handler that is not there")
		}
		if e := explain(t, n, "test/"+pod.Metadata.Name); !strings.Contains(e.Why, "no-such") {
			t.Errorf("the first try: %+v", e)
		}
		r, err := n.Runtime.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: pod})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := n.Runtime.RemovePodSandbox(n.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
			t.Fatal(err)
		}
		if e := explain(t, n, "test/"+pod.Metadata.Name); e.State != "not there" || !strings.Contains(e.Why, "removed since") {
			t.Errorf("the removed pod: %+v", e)
		}
	})
	t.Run("a container that runs out of memory", func(t *testing.T) {
		p := n.With(t).RunPod()
		c := p.Shell("tail /dev/zero", func(c *cri.ContainerConfig) {
			c.Linux.Resources.MemoryLimitInBytes = 16 << 20
		})
		c.WaitExit()
		e := explain(t, n, c.ID[:12])
		if len(e.Containers) != 1 || e.Containers[0].Why != "OOMKilled, exit code 137" {
			t.Errorf("%+v", e.Containers)
		}
	})
	t.Run("an image that cannot be pulled", func(t *testing.T) {
		p := n.With(t).RunPod()
		ref := harness.RegistryHost + "/no-such-image:1"
		_, err := n.Images.PullImage(n.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, SandboxConfig: p.Config})
		if err == nil {
			t.Fatal("pulled what is not there")
		}
		e := explain(t, n, p.ID)
		if !slices.ContainsFunc(e.Calls, func(c remembered) bool {
			return c.Name == "PullImage" && strings.Contains(c.Error, ref)
		}) {
			t.Errorf("no word of the pull: %+v", e.Calls)
		}
	})
	t.Run("a pod whose network plugin fails", func(t *testing.T) {
		conf := n.CNIConf + "/10-test.conflist"
		good, err := os.ReadFile(conf)
		if err != nil {
			t.Fatal(err)
		}
		bad := strings.Replace(string(good), fmt.Sprintf("%q", n.Bridge), `"a-name-too-long-for-a-bridge"`, 1)
		if err := os.WriteFile(conf, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		var pod *cri.PodSandboxConfig
		asked(t, "the network is read again", func() bool {
			pod = n.With(t).PodConfig()
			r, err := n.Runtime.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: pod})
			if err != nil {
				return true
			}
			if _, err := n.Runtime.RemovePodSandbox(n.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: r.PodSandboxId}); err != nil {
				t.Fatal(err)
			}
			return false
		})
		e := explain(t, n, "test/"+pod.Metadata.Name)
		if _, failed := e.steps("RunPodSandbox"); e.State != "not there" || failed != "network (CNI ADD)" || !strings.Contains(e.Why, "plugin bridge") {
			t.Errorf("failed step %q: %+v", failed, e)
		}
	})
}
