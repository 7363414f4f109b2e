package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/podshim/podshim/internal/boot"
	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/config"
	"github.com/podshim/podshim/internal/container"
	"github.com/podshim/podshim/internal/cri"
	"github.com/podshim/podshim/internal/doctor"
	"github.com/podshim/podshim/internal/host"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/metrics"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/spec"
	"github.com/podshim/podshim/internal/state"
	"github.com/podshim/podshim/internal/stats"
	"github.com/podshim/podshim/internal/streaming"
	"github.com/podshim/podshim/internal/timeline"
)

const (
	// operationLimit bounds what no client's deadline does: an operation goes on
	// when its caller has given up, so that the retry finds it done.
	operationLimit = 10 * time.Minute
	// shutdownLimit is how long calls may take to end when podshim is stopped.
	shutdownLimit = 10 * time.Second
	// collectLimit bounds what is cleaned up at the start. While plugins collect,
	// no pod gets a network, so it is short; the next start goes on.
	collectLimit = 5 * time.Second
)

// serve builds the daemon's parts, serves until ctx ends, and takes the parts
// down in reverse. Containers run on.
func serve(ctx context.Context, cfg *config.Config, log *logrus.Logger) (err error) {
	streaming.RouteKlog(log.WithField("part", "streaming"))
	d := &parts{cfg: cfg, log: log}
	defer func() { err = errors.Join(err, d.close()) }()
	if err := d.build(ctx, append(d.steps(), step{"metrics", d.openMetrics}, step{"serve CRI", d.openServer}, step{"serve podshim's commands", d.openAdmin})); err != nil {
		return errors.Join(err, d.dismissPodmon(ctx))
	}
	listener, err := listen(cfg.CRI)
	if err != nil {
		return errors.Join(err, d.dismissPodmon(ctx))
	}
	served := make(chan error, 1)
	go func() { served <- d.server.Serve(listener) }()
	log.WithFields(logrus.Fields{
		"socket": cfg.CRI.Socket, "version": thisBuild().Version,
		"pods": len(d.sandboxes.List()), "containers": len(d.containers.List()),
	}).Info("podshim is ready")
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		log.WithError(err).Warn("tell systemd")
	}
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", cfg.CRI.Socket, err)
	case <-ctx.Done():
		log.Info("podshim stops; containers run on")
		return nil
	}
}

// parts are the daemon's, in the order in which they are built.
type parts struct {
	cfg *config.Config
	log *logrus.Logger

	boot       boot.Last
	marked     bool // boot is this daemon's
	records    *state.Store
	host       spec.Host
	handlers   map[string]spec.Handler
	sandboxes  *sandbox.Manager
	containers *container.Manager
	images     *image.Store
	network    *cni.Network
	monitor    *monitor.Monitor
	stats      *stats.Collector
	observer   cri.Observer // nil unless metrics are served
	changes    cri.Events
	timeline   timeline.Book
	server     *grpc.Server

	events  sync.WaitGroup
	closers []func() error
}

func (d *parts) entry(part string) *logrus.Entry { return d.log.WithField("part", part) }

// onClose registers what takes a part down.
func (d *parts) onClose(f func() error) { d.closers = append(d.closers, f) }

func (d *parts) close() error {
	var errs []error
	for i := len(d.closers) - 1; i >= 0; i-- {
		errs = append(errs, d.closers[i]())
	}
	return errors.Join(errs...)
}

// step is one part's making.
type step struct {
	what string
	do   func(context.Context) error
}

// steps make the parts that hold pods; nothing is served yet.
func (d *parts) steps() []step {
	return []step{
		{"make directories", d.makeDirs},
		{"run directory", d.lockRun},
		{"last boot", d.readBoot},
		{"look at this machine", d.lookAtHost},
		{"images", d.openImages},
		{"network", d.openNetwork},
		{"monitor", d.openMonitor},
		{"stats", d.openStats},
		{"pods", d.openPods},
		{"mark the boot", d.markBoot},
	}
}

func (d *parts) build(ctx context.Context, steps []step) error {
	for _, step := range steps {
		start := time.Now()
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", step.what, err)
		}
		d.log.WithField("took", time.Since(start).Round(time.Microsecond)).Debugf("start: %s", step.what)
	}
	return nil
}

func (d *parts) run(name string) string  { return filepath.Join(d.cfg.Run, name) }
func (d *parts) root(name string) string { return filepath.Join(d.cfg.Root, name) }

func (d *parts) makeDirs(context.Context) error {
	// A user namespace's root must get through to what is its own; every pod's and
	// container's directory below lets nobody else in (host.PrivateDir).
	for dir, mode := range map[string]os.FileMode{
		d.cfg.Root: 0o711, d.cfg.Run: 0o711,
		d.run("infra"): 0o711, d.run("sandboxes"): 0o711, d.root("sandboxes"): 0o711,
		d.run("containers"): 0o711, d.root("containers"): 0o711,
	} {
		if err := os.MkdirAll(dir, mode); err != nil {
			return err
		}
		if err := os.Chmod(dir, mode); err != nil { // in spite of the umask, or an older version
			return err
		}
	}
	for _, dir := range []string{"sandboxes", "containers"} {
		host.Spread(d.root(dir))
		host.Spread(d.run(dir))
	}
	return nil
}

// lockRun makes sure that no other podshim uses the run directory: it would take
// the socket and the monitors of this one. The kernel lets go of the lock with
// the process. A child that a killed podshim has just forked, to run a CNI plugin,
// has it too until it is the plugin.
func (d *parts) lockRun(ctx context.Context) error {
	lock, err := os.OpenFile(d.run("lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	try := func() error { return unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB) }
	err = try()
	for until := time.Now().Add(lockLimit); errors.Is(err, unix.EWOULDBLOCK) && time.Now().Before(until) && ctx.Err() == nil; err = try() {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		pid, _ := io.ReadAll(io.LimitReader(lock, 32))
		return errors.Join(fmt.Errorf("another podshim (pid %s) uses %s: each needs a run and a root directory of its own: %w",
			strings.TrimSpace(string(pid)), d.cfg.Run, err), lock.Close())
	}
	d.onClose(lock.Close)
	if err := lock.Truncate(0); err != nil {
		return err
	}
	_, err = fmt.Fprintln(lock, os.Getpid())
	return err
}

// lockLimit is how long the forked children of a killed podshim may take to become
// what they are to be.
const lockLimit = 2 * time.Second

func (d *parts) readBoot(context.Context) (err error) {
	d.boot, err = boot.Read(d.root("boot"))
	// True when all later parts are down, and not any more when another podshim has
	// the lock.
	d.onClose(func() error {
		if !d.marked {
			return nil
		}
		return d.boot.MarkStopped(d.root("boot"))
	})
	return err
}

// markBoot tells the next daemon that this one ran in this boot; not before it knows
// everything that the last one left.
func (d *parts) markBoot(context.Context) error {
	d.marked = true
	return d.boot.MarkStarted(d.root("boot"))
}

func (d *parts) lookAtHost(context.Context) (err error) {
	d.host, _, err = host.Facts(host.Options{CgroupDriver: d.cfg.Cgroup.Driver, Dir: d.cfg.Root})
	if err != nil {
		return err
	}
	d.handlers, err = handlers(d.cfg.Runtime)
	return err
}

func (d *parts) openImages(context.Context) (err error) {
	d.images, err = image.Open(image.Config{
		Root:                   d.root("images"),
		HostsDirs:              d.cfg.Image.CertsDirs,
		Pinned:                 pinned(d.cfg.Image),
		MaxConcurrentDownloads: d.cfg.Image.MaxConcurrentDownloads,
		NoProgressTimeout:      d.cfg.Image.PullProgressTimeout.Std(),
		Restarted:              d.boot.Restarted(),
		Crashed:                d.boot.Crashed(),
		Log:                    d.entry("image"),
	})
	if err == nil {
		d.onClose(d.images.Close)
	}
	return err
}

// pinned are the images that kubelet's collector leaves alone: infra_image too, or
// the next pod would have to wait for it.
func pinned(cfg config.Image) []string {
	if cfg.InfraImage == "" {
		return cfg.Pinned
	}
	return append([]string{cfg.InfraImage}, cfg.Pinned...)
}

func (d *parts) openNetwork(context.Context) (err error) {
	conf := doctor.ConfigOf(d.cfg).CNI
	conf.Log = d.entry("cni")
	d.network, err = cni.New(conf)
	if err == nil {
		d.onClose(func() error { d.network.Close(); return nil })
	}
	return err
}

func (d *parts) openMonitor(ctx context.Context) error {
	binary, err := d.cfg.MonitorBinary()
	if err != nil {
		return err
	}
	d.monitor, err = monitor.New(ctx, monitor.Options{
		RunDir:        d.run("monitor"),
		Binary:        binary,
		SystemdCgroup: d.host.SystemdCgroup,
		Log:           d.entry("monitor"),
	})
	if err == nil {
		d.onClose(d.monitor.Close)
	}
	return err
}

// dismissPodmon ends a podmon that was started for nothing.
func (d *parts) dismissPodmon(ctx context.Context) error {
	if d.monitor == nil {
		return nil
	}
	// Also when it is given up because ctx has ended.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dismissLimit)
	defer cancel()
	return d.monitor.Dismiss(ctx)
}

// dismissLimit is how long the end of an idle podmon may be waited for.
const dismissLimit = 5 * time.Second

// openPods reads what pods there are and goes on with them where the last
// podshim has left off.
func (d *parts) openPods(context.Context) error {
	var err error
	d.records, err = state.Open(state.Config{
		Database: d.root("state.db"), RunDir: d.run("state"), Boot: d.boot, Log: d.entry("state"),
	})
	if err != nil {
		return err
	}
	d.onClose(d.records.Close)
	exits, stop := context.WithCancel(context.Background())
	// Taken down after the managers: what they wait for are exits.
	d.onClose(func() error {
		stop()
		d.events.Wait()
		return nil
	})
	infra, err := d.infraRoot()
	if err != nil {
		return err
	}
	d.sandboxes, err = sandbox.NewManager(sandbox.Config{
		RunDir:         d.run("sandboxes"),
		RootDir:        d.root("sandboxes"),
		NetnsDir:       d.cfg.Network.NetnsDir,
		CgroupParent:   d.cfg.Cgroup.Parent,
		OperationLimit: operationLimit,
		Host:           d.host,
		Handlers:       d.handlers,
		Records:        d.records,
		Monitor:        d.monitor,
		Network:        d.network,
		Infra:          infra,
		Changed:        d.sandboxChanged,
		Log:            d.entry("sandbox"),
	})
	if err != nil {
		return err
	}
	d.onClose(within(d.sandboxes.Close))
	d.containers, err = container.NewManager(container.Config{
		RunDir:         d.run("containers"),
		RootDir:        d.root("containers"),
		OperationLimit: operationLimit,
		ExecSyncLimit:  d.cfg.CRI.ExecSyncOutputLimit,
		Host:           d.host,
		Handlers:       d.handlers,
		Records:        d.records,
		Monitor:        d.monitor,
		Images:         d.images,
		Sandboxes:      d.sandboxes,
		Changed:        d.containerChanged,
		Log:            d.entry("container"),
	})
	if err != nil {
		return err
	}
	d.onClose(within(d.containers.Close))
	d.watchExits(exits)
	d.events.Go(func() { d.collectNetworks(exits) })
	d.events.Go(func() { d.mend(exits) }) // nothing waits: what it kills may be beyond killing
	return nil
}

func (d *parts) infraRoot() (sandbox.InfraRoot, error) {
	if ref := d.cfg.Image.InfraImage; ref != "" {
		return &sandbox.ImageInfra{Images: d.images, Ref: ref, Dir: d.run("infra")}, nil
	}
	return sandbox.NewEmbeddedInfra(d.run("infra"))
}

// watchExits hands every end of a container to whose it is, until ctx ends.
// Each waits for the operation that runs on that container,
// so they do not wait for each other.
func (d *parts) watchExits(ctx context.Context) {
	d.events.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case e, ok := <-d.monitor.Events():
				if !ok {
					return
				}
				d.events.Go(func() { d.exited(ctx, e) })
			}
		}
	})
}

// within gives a part's Close the time that a shutdown may take.
func within(end func(context.Context) error) func() error {
	return func() error {
		ctx, cancel := context.WithTimeout(context.Background(), shutdownLimit)
		defer cancel()
		return end(ctx)
	}
}

func (d *parts) exited(ctx context.Context, e monitor.Event) {
	note := d.containers.Exited
	if d.sandboxes.Owns(e.ID) {
		note = d.sandboxes.Exited
	}
	if err := note(ctx, e); err != nil && ctx.Err() == nil {
		d.log.WithError(err).WithField("container", e.ID).Error("note the end of a container")
	}
}

// sandboxChanged and containerChanged tell the parts that follow what happens.
func (d *parts) sandboxChanged(before, after *sandbox.Record) {
	if after == nil {
		d.stats.Forget(before.ID)
	}
	d.changes.Sandbox(before, after, d.pod)
}

func (d *parts) containerChanged(before, after *container.Record) {
	if after == nil {
		d.stats.Forget(before.ID)
	}
	d.changes.Container(before, after, d.pod)
}

// pod is a pod as it is now; the sandbox is nil when it is gone.
func (d *parts) pod(id string) (*sandbox.Record, []*container.Record) {
	s, err := d.sandboxes.Get(id)
	if err != nil {
		return nil, nil
	}
	return s.Get(), d.containers.InSandbox(id)
}

// collectNetworks gives back the addresses of pods that no record knows: those
// of a power cut's last moment. Nothing waits for it.
func (d *parts) collectNetworks(ctx context.Context) {
	ids, more := d.records.Damage(state.Sandboxes)
	if more {
		d.log.Warn("the networks of unknown pods are not given back: they may be those of damaged records")
		return
	}
	pods := d.sandboxes.Networked()
	for _, id := range ids {
		pods = append(pods, cni.Pod{ID: id})
	}
	ctx, cancel := context.WithTimeout(ctx, collectLimit)
	defer cancel()
	if err := d.network.GC(ctx, pods); err != nil && ctx.Err() == nil {
		d.log.WithError(err).Warn("give back the networks of unknown pods")
	}
}

func (d *parts) openServer(context.Context) error {
	stream, err := streaming.Listen(streaming.Config{
		Addr:        net.JoinHostPort(d.cfg.CRI.StreamAddress, strconv.Itoa(d.cfg.CRI.StreamPort)),
		IdleTimeout: d.cfg.CRI.StreamIdleTimeout.Std(),
		Log:         d.entry("streaming"),
	}, d.containers)
	if err != nil {
		return err
	}
	d.onClose(stream.Close)
	d.server = cri.NewServer(cri.Config{
		Version:    thisBuild().Version,
		Sandboxes:  d.sandboxes,
		Containers: d.containers,
		Images:     d.images,
		Network:    d.network,
		Stats:      d.stats,
		Streaming:  stream,
		Events:     &d.changes,
		Runtime:    d.monitor.Health,
		Host:       d.host,
		Handlers:   d.handlers,
		Effective:  d.cfg,
		Observer:   d.observer,
		Timeline:   &d.timeline,
		MaxMessage: d.cfg.CRI.MaxMessageSize,
		Log:        d.entry("cri"),
	})
	d.onClose(func() error {
		d.changes.Close() // its subscribers would keep the server from stopping
		stopServer(d.server)
		return nil
	})
	return nil
}

// openMetrics serves podshim's own metrics where an address is configured.
func (d *parts) openMetrics(context.Context) error {
	if d.cfg.Metrics.Address == "" {
		return nil
	}
	m := metrics.New(metrics.Sources{
		Pods: func() map[string]int {
			n := make(map[string]int)
			for _, r := range d.sandboxes.List() {
				n[string(r.State)]++
			}
			return n
		},
		Containers: func() map[string]int {
			n := make(map[string]int)
			for _, r := range d.containers.List() {
				n[string(r.State)]++
			}
			return n
		},
		Podmons: d.monitor.Started,
		Version: thisBuild().Version,
	})
	stop, err := m.Listen(d.cfg.Metrics.Address)
	if err == nil {
		d.observer = m
		d.onClose(stop)
	}
	return err
}

func (d *parts) openStats(context.Context) (err error) {
	d.stats, err = stats.New(stats.Config{Writable: d.writableLayer, Mountpoint: d.root("images")})
	if err == nil {
		d.onClose(func() error { d.stats.Close(); return nil })
	}
	return err
}

func (d *parts) writableLayer(ctx context.Context, id string) (stats.Disk, error) {
	u, err := d.images.Usage(ctx, id)
	return stats.Disk{Bytes: u.Bytes, Inodes: u.Inodes}, err
}

// stopServer lets the calls that run end, within limits.
func stopServer(s *grpc.Server) {
	hard := time.AfterFunc(shutdownLimit, s.Stop)
	defer hard.Stop()
	s.GracefulStop()
}

// handlers resolves the configured runtime handlers; "" is always one.
func handlers(cfg config.Runtime) (map[string]spec.Handler, error) {
	out := make(map[string]spec.Handler)
	names := []string{""}
	for name := range cfg.Handlers {
		names = append(names, name)
	}
	for _, name := range names {
		r, ok := cfg.Handler(name)
		if !ok {
			return nil, fmt.Errorf("runtime.default_handler: there is no handler %q", cfg.DefaultHandler)
		}
		h := spec.Handler{
			Name:       r.Name,
			NofileSoft: r.NofileSoft, NofileHard: r.NofileHard,
			PidsLimit:                    r.PidsLimit,
			DefaultCapabilities:          r.DefaultCapabilities,
			PrivilegedWithoutHostDevices: r.PrivilegedWithoutHostDevices,
		}
		if r.SeccompProfile != "" {
			profile, err := os.ReadFile(r.SeccompProfile)
			if err != nil {
				return nil, fmt.Errorf("runtime.seccomp_profile: %w", err)
			}
			h.SeccompProfile = profile
		}
		out[name] = h
	}
	return out, nil
}

// socketGroup is the group that may use the socket besides root; "" is none.
func socketGroup(name string) (gid int, err error) {
	if name == "" {
		return 0, nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("cri.socket_group: %w", err)
	}
	return strconv.Atoi(g.Gid)
}

// listen opens the CRI socket: root's, and a configured group's.
func listen(cfg config.CRI) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(cfg.Socket), 0o711); err != nil {
		return nil, fmt.Errorf("make socket directory: %w", err)
	}
	gid, err := socketGroup(cfg.SocketGroup)
	if err != nil {
		return nil, err
	}
	return openSocket(cfg.Socket, gid, 0o660)
}

// openSocket listens at path, in place of a socket that the last podshim left. The
// run directory's lock has told that no other one is alive.
func openSocket(path string, gid int, mode os.FileMode) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	// Bound under another name and moved when its mode is right: nobody finds
	// it with any other.
	early := filepath.Join(filepath.Dir(path), ".new")
	if err := os.Remove(early); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("remove old socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: early, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	l.SetUnlinkOnClose(false)
	err = os.Chown(early, 0, gid)
	if err == nil {
		err = os.Chmod(early, mode)
	}
	if err == nil {
		err = os.Rename(early, path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open socket %s: %w", path, err), l.Close())
	}
	return l, nil
}
