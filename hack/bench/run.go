package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/enclosure"
	"github.com/podshim/podshim/test/images"
	"github.com/podshim/podshim/test/peer"
	"github.com/podshim/podshim/test/private"
)

// subject is one runtime under measurement.
type subject struct {
	name    string
	version string
	place   *private.Place
	cgroup  string // of all that the runtime does, its pods' included
	rpc     runtime.RuntimeServiceClient
	images  runtime.ImageServiceClient
	pods    int // made so far
}

// bench is one run.
type bench struct {
	options
	all      *private.Place
	registry *images.Server
	large    *images.Server // nil when nothing is pulled
	subjects []*subject
	report   *report
}

// run does everything, within the namespaces.
func run(ctx context.Context, o options) (err error) {
	if err := enclosure.Settle(); err != nil {
		return err
	}
	dir := os.Getenv(placeEnv)
	b := &bench{options: o, all: &private.Place{Dir: dir, Name: filepath.Base(dir)}, report: &report{}}
	if err := b.serve(ctx); err != nil {
		return err
	}
	if !o.does("pull") && slices.Contains(o.runtimes[1:], containerdTuned) {
		fmt.Fprintf(os.Stderr, "bench: %s is left out: it takes part in pull only\n", containerdTuned)
	}
	// However this ends, the namespaces end with it, and all that is in them.
	if err := b.startThose(ctx, func(i int) bool { return !b.pullsOnly(i) }); err != nil {
		return err
	}
	for _, part := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"idle", b.idle},
		{"sequential", b.sequential},
		{"parallel", b.parallel},
		{"standing", b.standing},
		{"crowd", b.crowd},
		{"pull", b.pull},
	} {
		if !o.does(part.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: %s\n", part.name)
		if err := part.do(ctx); err != nil {
			b.report.print(os.Stdout, b.subjects) // what is measured is not lost
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	b.report.print(os.Stdout, b.subjects)
	if o.write != "" {
		return b.report.write(o.write, b.subjects)
	}
	return nil
}

// serve starts the registries; they end with the process.
func (b *bench) serve(ctx context.Context) error {
	set, err := images.Build(ctx, b.options.images)
	if err != nil {
		return err
	}
	if b.registry, err = set.Serve("127.0.0.1:0"); err != nil {
		return err
	}
	if !b.does("pull") {
		return nil
	}
	large, err := largeImages(ctx, b.options.images)
	if err != nil {
		return fmt.Errorf("make large images: %w", err)
	}
	b.large, err = large.Serve("127.0.0.1:0")
	return err
}

// pullsOnly tells whether a runtime, by its place among all, takes part in pull alone:
// containerd-tuned is nothing but containerd elsewhere. The first takes part in everything.
func (b *bench) pullsOnly(i int) bool { return i > 0 && b.runtimes[i] == containerdTuned }

// startThose starts some of the runtimes, by their place among all.
func (b *bench) startThose(ctx context.Context, which func(i int) bool) error {
	for i, name := range b.runtimes {
		if !which(i) {
			continue
		}
		s, err := b.start(ctx, i, name)
		if err != nil {
			return fmt.Errorf("start %s (its log is in %s): %w", name, b.log, err)
		}
		b.subjects = append(b.subjects, s)
	}
	return nil
}

// start sets one runtime up, in a cgroup of its own, and pulls the pods' images.
func (b *bench) start(ctx context.Context, i int, name string) (*subject, error) {
	place := nth(b.all, i)
	s := &subject{name: name, place: place}
	for _, dir := range []string{b.log, place.Dir} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	log, err := os.Create(filepath.Join(b.log, name+".log"))
	if err != nil {
		return nil, err
	}
	if err := volatile(place, "run", "state", "storage", "netns"); err != nil {
		return nil, err
	}
	for _, registry := range []*images.Server{b.registry, b.large} {
		if registry == nil {
			continue
		}
		if err := registry.WriteHosts(place.Certs()); err != nil {
			return nil, err
		}
	}
	config := private.Config{
		Podshim: b.podshim, Plugins: b.tools, Subnet: fmt.Sprintf("10.%d.0.0/16", 210+i),
		PortMappings: true, Log: log,
	}
	leave, err := enterCgroup(place.CgroupParent())
	if err != nil {
		return nil, err
	}
	s.cgroup = place.CgroupParent()
	err = b.launch(ctx, s, config)
	if err := errors.Join(err, leave()); err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(place.Endpoint(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return nil, err
	}
	s.rpc, s.images = runtime.NewRuntimeServiceClient(conn), runtime.NewImageServiceClient(conn)
	v, err := s.rpc.Version(ctx, &runtime.VersionRequest{})
	if err != nil {
		return nil, err
	}
	s.version = strings.TrimPrefix(v.GetRuntimeVersion(), "v")
	for _, image := range []string{images.Busybox, images.Pause} {
		if err := s.pullImage(ctx, image); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// volatile makes directories be in memory, as /run is: what runtimes keep there must
// not cost a disk's time.
func volatile(place *private.Place, dirs ...string) error {
	for _, dir := range dirs {
		if err := os.MkdirAll(place.Path(dir), 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", place.Path(dir), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755"); err != nil {
			return fmt.Errorf("mount tmpfs: %w", err)
		}
	}
	return nil
}

// launch starts the daemon.
func (b *bench) launch(ctx context.Context, s *subject, config private.Config) error {
	var err error
	switch s.name {
	case "podshim":
		_, err = s.place.Start(ctx, config)
	case "containerd":
		// As a node has it: igzip, which containerd takes where it finds it, is in few.
		_, err = peer.StartContainerd(ctx, b.peers, s.place, config, "", "CONTAINERD_DISABLE_IGZIP=1")
	case containerdTuned:
		if _, err := exec.LookPath("igzip"); err != nil {
			return err // containerd runs it where it is there
		}
		_, err = peer.StartContainerd(ctx, b.peers, s.place, config, tuned)
	case "crio":
		mirrors := map[string]string{"registry.k8s.io": b.registry.Addr}
		if b.large != nil {
			mirrors[largeHost] = b.large.Addr
		}
		_, err = peer.StartCRIO(ctx, b.peers, s.place, config, mirrors)
	default:
		err = fmt.Errorf("unknown runtime; there are podshim, containerd, containerd-tuned, crio")
	}
	return err
}

const containerdTuned = "containerd-tuned"

// tuned is how containerd pulls fastest.
const tuned = `[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_downloads = 8
  max_concurrent_unpacks = 8
`

// turns calls f for each runtime n times, in turn, each time beginning with
// another one.
func (b *bench) turns(ctx context.Context, n int, f func(s *subject, turn int) error) error {
	order := slices.Clone(b.subjects)
	for turn := range n {
		for _, s := range order {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := f(s, turn); err != nil {
				return fmt.Errorf("%s, turn %d: %w", s.name, turn, err)
			}
		}
		order = append(order[1:], order[0])
	}
	return nil
}
