package main

import (
	"context"
	"fmt"
	"os"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/images"
)

// pod is one pod of one runtime, made the way kubelet makes it: in a cgroup that
// is there already, with a log.
type pod struct {
	s       *subject
	config  *runtime.PodSandboxConfig
	sandbox string
	ids     []string
}

// timer takes what a step has taken.
type timer func(step string, d time.Duration)

func (t timer) time(step string, do func() error) error {
	start := time.Now()
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", step, err)
	}
	if t != nil {
		t(step, time.Since(start))
	}
	return nil
}

// newPod describes a pod; hostNetwork is without CNI.
func (s *subject) newPod(hostNetwork bool) (*pod, error) {
	s.pods++
	name := fmt.Sprintf("bench-%d", s.pods)
	ns := &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}
	hostname := name
	if hostNetwork {
		ns.Network, hostname = runtime.NamespaceMode_NODE, ""
	}
	p := &pod{s: s, config: &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: name + "-" + s.place.Name},
		Hostname:     hostname,
		LogDirectory: s.place.Path("logs", name),
		DnsConfig:    &runtime.DNSConfig{Servers: []string{"10.96.0.10"}, Searches: []string{"bench.svc.cluster.local"}},
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent:    s.cgroup + "/pods/" + name,
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: ns},
		},
	}}
	if err := os.MkdirAll(p.config.LogDirectory, 0o755); err != nil {
		return nil, err
	}
	return p, podCgroup(p.config.Linux.CgroupParent)
}

// up runs the pod with as many containers as wanted.
func (p *pod) up(ctx context.Context, t timer, containers int) error {
	return t.time("pod up", func() error {
		err := t.time("RunPodSandbox", func() error {
			r, err := p.s.rpc.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: p.config})
			p.sandbox = r.GetPodSandboxId()
			return err
		})
		for i := 0; err == nil && i < containers; i++ {
			err = p.container(ctx, t, fmt.Sprintf("c%d", i))
		}
		return err
	})
}

// container creates and starts one container.
func (p *pod) container(ctx context.Context, t timer, name string) error {
	ns := p.config.Linux.SecurityContext.NamespaceOptions
	var id string
	err := t.time("CreateContainer", func() error {
		r, err := p.s.rpc.CreateContainer(ctx, &runtime.CreateContainerRequest{
			PodSandboxId: p.sandbox, SandboxConfig: p.config,
			Config: &runtime.ContainerConfig{
				Metadata: &runtime.ContainerMetadata{Name: name},
				Image:    &runtime.ImageSpec{Image: images.Busybox, UserSpecifiedImage: images.Busybox},
				Command:  []string{"sleep", "100000"},
				LogPath:  name + ".log",
				Linux: &runtime.LinuxContainerConfig{
					Resources:       &runtime.LinuxContainerResources{CpuShares: 2, OomScoreAdj: 1000},
					SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: ns},
				},
			},
		})
		id = r.GetContainerId()
		return err
	})
	if err != nil {
		return err
	}
	p.ids = append(p.ids, id)
	return t.time("StartContainer", func() error {
		_, err := p.s.rpc.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: id})
		return err
	})
}

// exec runs true in the first container.
func (p *pod) exec(ctx context.Context, t timer) error {
	return t.time("ExecSync true", func() error {
		r, err := p.s.rpc.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: p.ids[0], Cmd: []string{"true"}, Timeout: 60})
		if err == nil && r.GetExitCode() != 0 {
			err = fmt.Errorf("exit code %d", r.GetExitCode())
		}
		return err
	})
}

// down stops and removes everything.
func (p *pod) down(ctx context.Context, t timer) error {
	err := t.time("pod down", func() error {
		for _, id := range p.ids {
			err := t.time("stop + remove container", func() error {
				err := t.time("StopContainer", func() error {
					_, err := p.s.rpc.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: id})
					return err
				})
				if err != nil {
					return err
				}
				return t.time("RemoveContainer", func() error {
					_, err := p.s.rpc.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id})
					return err
				})
			})
			if err != nil {
				return err
			}
		}
		err := t.time("StopPodSandbox", func() error {
			_, err := p.s.rpc.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.sandbox})
			return err
		})
		if err != nil {
			return err
		}
		return t.time("RemovePodSandbox", func() error {
			_, err := p.s.rpc.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.sandbox})
			return err
		})
	})
	removeCgroup(p.config.Linux.CgroupParent)
	return err
}

func (s *subject) pullImage(ctx context.Context, image string) error {
	_, err := s.images.PullImage(ctx, &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: image}})
	if err != nil {
		return fmt.Errorf("pull %s: %w", image, err)
	}
	return nil
}
