// Package cni gives pods their network: libcni behind Add, Del, Check, GC and
// Status, and the network namespaces themselves.
//
// # Namespaces
//
// [NewNetns] makes a network namespace with lo up and pins it at a path, below
// [DefaultNetnsDir] as a rule, so that `ip netns` sees it; [NewUserNetns] makes
// one that belongs to a user namespace of its own. [Remove] unpins, [List] finds
// leftovers, [Do] runs a function inside, [Dial] connects to a pod's localhost,
// [Stats] reads its interfaces' counters. No process lives in a namespace for
// its sake, no plugin is run for lo.
//
// # Networks
//
// A [Network] watches the configuration directory and attaches each pod to the
// first network found there, in lexical order of the files. What a pod was
// attached with (the whole configuration and arguments) is written below
// CacheDir before the first plugin runs and is what DEL, CHECK and GC use: the
// configuration may change or vanish while pods run, the daemon may die in the
// middle of an ADD, and everything taken can still be given back.
//
// Plugins are programs of others. Each run has a time limit, after which its
// whole process group is killed, and bounded output. A failed, hung or abandoned
// ADD is undone by DEL at once. One slow plugin holds up its own pod only;
// Status never waits for a plugin.
//
// [Network.SetPodCIDRs] makes a network from an operator's template, for the range
// of addresses that kubelet tells.
//
// Capabilities offered to plugins that declare them: portMappings, bandwidth,
// ips, mac, dns, cgroupPath and io.kubernetes.cri.pod-annotations (the name that
// containerd and CRI-O use). See [Pod.ReadAnnotations].
package cni

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/sirupsen/logrus"
)

// ifName is the pods' default interface.
const ifName = "eth0"

// Config is how a [Network] is set up. Zero values mean the defaults.
type Config struct {
	// ConfDir holds the network configurations (default /etc/cni/net.d). It may
	// come and go.
	ConfDir string
	// ConfTemplate is a text/template of a configuration list, from which
	// SetPodCIDRs makes a file in ConfDir; empty is none.
	ConfTemplate string
	// BinDirs hold the plugins (default /opt/cni/bin, /usr/lib/cni).
	BinDirs []string
	// CacheDir is ours alone (default /var/lib/podshim/cni): what pods were
	// attached with. It must survive a reboot as the plugins' own records do.
	CacheDir string
	// PluginTimeout bounds each run of a plugin (default 30 s).
	PluginTimeout time.Duration
	// IdlePlugins has plugins started that have nothing to do for a pod (idle.go).
	IdlePlugins bool
	// IdleIPv6 leaves IPv6 on in pods that are given IPv4 addresses only (ipv6.go).
	IdleIPv6 bool
	// Network is the name of the pods' network; empty is the first file's.
	Network string
	Log     *logrus.Entry
}

// withDefaults fills in what was left out.
func (c Config) withDefaults() Config {
	if c.ConfDir == "" {
		c.ConfDir = "/etc/cni/net.d"
	}
	if len(c.BinDirs) == 0 {
		c.BinDirs = []string{"/opt/cni/bin", "/usr/lib/cni"}
	}
	if c.CacheDir == "" {
		c.CacheDir = "/var/lib/podshim/cni"
	}
	if c.PluginTimeout <= 0 {
		c.PluginTimeout = 30 * time.Second
	}
	if c.Log == nil {
		c.Log = logrus.NewEntry(logrus.StandardLogger())
	}
	return c
}

// Network attaches pods to the configured network. Its methods may be called
// from any number of goroutines; operations on one pod take turns.
type Network struct {
	cfg    Config
	runner *runner
	cni    *libcni.CNIConfig

	making sync.Mutex                     // held by SetPodCIDRs
	ranges atomic.Pointer[[]netip.Prefix] // of SetPodCIDRs, nil before
	look   chan chan struct{}             // asks the watcher to look now; it closes what it got

	current atomic.Pointer[loaded] // never nil
	health  atomic.Pointer[health] // nil before the plugins' first answer
	asked   atomic.Bool            // Status was called since STATUS last ran

	added      atomic.Uint64 // pods that plugins were asked to attach
	forgetting atomic.Bool   // see forgetProc

	gate gate
	pods podLocks

	mu sync.Mutex
	// live are the pods attached (or being attached) by this process: to GC
	// they are valid whatever its caller knew when it made its list.
	live map[string]struct{}
	// orphans are the plugins of earlier daemons that were not seen to end.
	orphans orphans

	stop context.CancelFunc
	done sync.WaitGroup
}

// New reads the configuration directory, which may be missing, and watches it
// until Close. No network is no error: Status tells.
func New(cfg Config) (*Network, error) {
	cfg = cfg.withDefaults()
	for _, dir := range []string{"attachments", "results"} {
		if err := os.MkdirAll(filepath.Join(cfg.CacheDir, dir), 0o700); err != nil {
			return nil, fmt.Errorf("make CNI cache directory: %w", err)
		}
	}
	// Records that a crash has left half written: nothing was attached yet.
	half, _ := filepath.Glob(filepath.Join(cfg.CacheDir, "attachments", "*.new"))
	for _, path := range half {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("clean CNI cache directory: %w", err)
		}
	}
	r := &runner{limit: cfg.PluginTimeout}
	// Read when it is used; a bad one is better known now.
	if _, err := readTemplate(cfg.ConfTemplate); err != nil {
		return nil, err
	}
	n := &Network{
		cfg: cfg, runner: r, look: make(chan chan struct{}),
		cni:  libcni.NewCNIConfigWithCacheDir(cfg.BinDirs, cfg.CacheDir, r),
		live: make(map[string]struct{}),
	}
	attached, err := n.attachments()
	if err != nil {
		return nil, err
	}
	if n.orphans, err = findOrphans(attached); err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	n.stop = stop
	w := newWatch(n)
	w.reload(ctx)
	n.done.Go(func() { w.run(ctx) })
	return n, nil
}

// Close ends the watching. Operations that run go on to their end.
func (n *Network) Close() {
	n.stop()
	n.done.Wait()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.orphans.close()
}

// Status says why pods can get no network, or nil. It tells what the watcher
// has found and never waits for a plugin or a disk.
//
// Errors: errdefs.ErrUnavailable.
func (n *Network) Status() error {
	n.asked.Store(true)
	if err := n.current.Load().err; err != nil {
		return unavailable{err}
	}
	h := n.health.Load()
	if h == nil {
		return unavailable{errors.New("the network's plugins have not answered STATUS yet")}
	}
	if h.err != nil {
		return unavailable{h.err}
	}
	return nil
}

// unavailable gives an error the class errdefs.ErrUnavailable without adding
// the word to a message that operators read.
type unavailable struct{ error }

func (u unavailable) Unwrap() []error { return []error{u.error, errdefs.ErrUnavailable} }

// Info tells what is loaded and from where. It is as quick as Status.
func (n *Network) Info() Info {
	l := n.current.Load()
	info := Info{
		ConfDir: n.cfg.ConfDir, BinDirs: n.cfg.BinDirs,
		File: l.file, Files: slices.Clone(l.files), LoadedAt: l.at,
	}
	if ranges := n.ranges.Load(); ranges != nil {
		for _, r := range *ranges {
			info.PodCIDRs = append(info.PodCIDRs, r.String())
		}
	}
	if l.list != nil {
		info.Network, info.CNIVersion = l.list.Name, l.list.CNIVersion
		for _, p := range l.list.Plugins {
			info.Plugins = append(info.Plugins, p.Network.Type)
		}
	}
	if err := n.Status(); err != nil {
		info.Error = err.Error()
	}
	return info
}

// Check runs CHECK for an attached pod. A network that cannot be checked
// (before CNI 0.4, or disableCheck) passes.
//
// Errors: errdefs.ErrNotFound for a pod that is not attached, *PluginError.
func (n *Network) Check(ctx context.Context, pod Pod) error {
	unlock, err := n.pods.lock(ctx, pod.ID)
	if err != nil {
		return fmt.Errorf("check network of pod %s: %w", pod.ID, err)
	}
	defer unlock()
	a, err := n.readAttachment(pod.ID)
	if err != nil {
		return err
	}
	err = n.cni.CheckNetworkList(ctx, a.list, a.runtimeConf())
	if errors.Is(err, libcni.ErrorCheckNotSupp) {
		return nil
	}
	return a.failure("check", err)
}

// GC gives back what pods that are neither in valid nor attached by this
// process still hold: DEL for each that CacheDir knows, then the GC verb of
// plugins that have it (CNI 1.1). The latter runs while no ADD and no DEL does,
// for which it waits until ctx ends; ADDs that come meanwhile wait for it.
//
// Errors: all that went wrong, joined; one pod's failure stops no other's.
func (n *Network) GC(ctx context.Context, valid []Pod) error {
	keep := make(map[string]struct{}, len(valid))
	for _, p := range valid {
		keep[p.ID] = struct{}{}
	}
	ids, err := n.attachments()
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range ids {
		if _, ok := keep[id]; ok || n.isLive(id) {
			continue
		}
		n.cfg.Log.WithField("sandbox", id).Info("detaching a pod that is gone from its network")
		errs = append(errs, n.Del(ctx, Pod{ID: id}))
	}
	return errors.Join(append(errs, n.gcPlugins(ctx, keep))...)
}

// gcPlugins runs the GC verb. Pods whose DEL has failed are valid still: their
// records are what the next DEL needs.
func (n *Network) gcPlugins(ctx context.Context, keep map[string]struct{}) error {
	l := n.current.Load()
	if l.err != nil {
		return nil
	}
	if has, err := version.GreaterThanOrEqualTo(l.list.CNIVersion, "1.1.0"); err != nil || !has {
		return nil
	}
	if err := n.gate.enterAlone(ctx); err != nil {
		return fmt.Errorf("collect leftovers of network %q: %w", l.list.Name, err)
	}
	defer n.gate.leave()
	ids, err := n.attachments()
	if err != nil {
		return err
	}
	for _, id := range ids {
		keep[id] = struct{}{}
	}
	if err := n.cni.GCNetworkList(ctx, l.list, &libcni.GCArgs{ValidAttachments: gcAttachments(keep)}); err != nil {
		return fmt.Errorf("collect leftovers of network %q: %w", l.list.Name, err)
	}
	return nil
}

func (n *Network) isLive(id string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.live[id]
	return ok
}

func (n *Network) setLive(id string, live bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if live {
		n.live[id] = struct{}{}
	} else {
		delete(n.live, id)
	}
}
