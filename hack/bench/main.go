// Bench drives any number of CRI runtimes with the same work, interleaved pod by
// pod, and prints the median and the 99th percentile of each step, and the ratio
// of each runtime's median to the first one's.
//
//	go run ./hack/bench -pods 50 -image IMAGE podshim=unix:///run/podshim/podshim.sock containerd=unix:///run/containerd/containerd.sock
//
// The image must be pulled already on each of them.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func main() {
	pods := flag.Int("pods", 30, "pods to run on each runtime")
	image := flag.String("image", "registry.k8s.io/e2e-test-images/busybox:1.29-2", "image of the container")
	hostNetwork := flag.Bool("host-network", false, "pods on the node's network, without CNI")
	flag.Parse()
	if err := run(*pods, *image, *hostNetwork, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// peer is one runtime under test.
type peer struct {
	name  string
	rpc   runtime.RuntimeServiceClient
	times map[string][]time.Duration
}

// steps in the order in which they are printed.
var steps = []string{"RunPodSandbox", "CreateContainer", "StartContainer", "pod up", "ExecSync true", "StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox", "pod down"}

func run(pods int, image string, hostNetwork bool, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("name at least one runtime: NAME=unix:///SOCKET")
	}
	var peers []*peer
	for _, arg := range args {
		name, address, ok := strings.Cut(arg, "=")
		if !ok {
			return fmt.Errorf("%q is not NAME=ADDRESS", arg)
		}
		conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		defer conn.Close()
		peers = append(peers, &peer{name: name, rpc: runtime.NewRuntimeServiceClient(conn), times: make(map[string][]time.Duration)})
	}
	for i := range pods {
		for _, p := range peers {
			if err := p.pod(context.Background(), i, image, hostNetwork); err != nil {
				return fmt.Errorf("%s, pod %d: %w", p.name, i, err)
			}
		}
	}
	report(peers)
	return nil
}

// pod runs one pod of one container from its beginning to its end.
func (p *peer) pod(ctx context.Context, i int, image string, hostNetwork bool) error {
	ns := &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}
	if hostNetwork {
		ns.Network = runtime.NamespaceMode_NODE
	}
	name := fmt.Sprintf("bench-%d", i)
	pod := &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: fmt.Sprintf("%s-%d", name, time.Now().UnixNano())},
		Linux:    &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: ns}},
	}
	container := &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: "c"},
		Image:    &runtime.ImageSpec{Image: image},
		Command:  []string{"sleep", "100000"},
		Linux:    &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: ns}},
	}
	var sandboxID, id string
	up := time.Now()
	err := p.time("RunPodSandbox", func() error {
		r, err := p.rpc.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: pod})
		sandboxID = r.GetPodSandboxId()
		return err
	})
	if err != nil {
		return err
	}
	err = p.time("CreateContainer", func() error {
		r, err := p.rpc.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: sandboxID, Config: container, SandboxConfig: pod})
		id = r.GetContainerId()
		return err
	})
	if err != nil {
		return err
	}
	err = p.time("StartContainer", func() error {
		_, err := p.rpc.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: id})
		return err
	})
	if err != nil {
		return err
	}
	p.add("pod up", time.Since(up))
	err = p.time("ExecSync true", func() error {
		r, err := p.rpc.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}, Timeout: 10})
		if err == nil && r.GetExitCode() != 0 {
			err = fmt.Errorf("exec: exit code %d", r.GetExitCode())
		}
		return err
	})
	if err != nil {
		return err
	}
	down := time.Now()
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"StopContainer", func() error {
			_, err := p.rpc.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: id})
			return err
		}},
		{"RemoveContainer", func() error {
			_, err := p.rpc.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id})
			return err
		}},
		{"StopPodSandbox", func() error {
			_, err := p.rpc.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: sandboxID})
			return err
		}},
		{"RemovePodSandbox", func() error {
			_, err := p.rpc.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: sandboxID})
			return err
		}},
	} {
		if err := p.time(step.name, step.do); err != nil {
			return err
		}
	}
	p.add("pod down", time.Since(down))
	return nil
}

func (p *peer) time(step string, do func() error) error {
	start := time.Now()
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", step, err)
	}
	p.add(step, time.Since(start))
	return nil
}

func (p *peer) add(step string, d time.Duration) { p.times[step] = append(p.times[step], d) }

func report(peers []*peer) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprint(w, "ms\t")
	for _, p := range peers {
		fmt.Fprintf(w, "%s p50\tp99\tratio\t", p.name)
	}
	fmt.Fprintln(w)
	for _, step := range steps {
		fmt.Fprintf(w, "%s\t", step)
		base := quantile(peers[0].times[step], 0.5)
		for _, p := range peers {
			p50 := quantile(p.times[step], 0.5)
			fmt.Fprintf(w, "%.1f\t%.1f\t%.1f\t", ms(p50), ms(quantile(p.times[step], 0.99)), float64(p50)/float64(base))
		}
		fmt.Fprintln(w)
	}
	w.Flush()
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// quantile returns the nearest-rank quantile.
func quantile(d []time.Duration, q float64) time.Duration {
	if len(d) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(d))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}
