// Package stats measures containers and pods for the CRI's stats RPCs, from the
// kernel's own files: cgroup v1 or v2, the pod's network interfaces, and the
// writable layers. No other process is asked.
//
// # What the numbers mean
//
// They mean what cAdvisor, and so kubelet, takes them for:
//
//   - CPU usageCoreNanoSeconds is the cgroup's CPU time, its children's too.
//     usageNanoCores is its growth between two samples that lie at least
//     [window] apart; it is absent until there are two, and kubelet then works
//     it out by itself.
//   - Memory usage is all that is charged to the cgroup; the working set is
//     usage less the inactive file cache, which the kernel would drop first
//     (what eviction looks at); RSS is anonymous memory; page faults are
//     cumulative; available is the cgroup's own limit less the working set, and
//     absent without a limit. All of them count children.
//   - Process count is pids.current: kernel tasks, threads too, which is what
//     the limit on PIDs counts.
//   - Pressure (PSI) is told by cgroup2 only, where the hybrid layout's does for
//     a machine on v1; totals are nanoseconds.
//   - Every part has the time at which it was read. What the kernel does not
//     tell is absent, never zero.
//
// A cgroup that is gone is errdefs.ErrNotFound: a container that has ended uses
// nothing, and zeros would look like one that runs.
//
// # Cost
//
// One container costs five to ten small reads below /sys/fs/cgroup, no
// directory walk and no process list, and two callers within [fresh] share them.
// Metrics, which Prometheus scrapes now and then, cost more: some twenty reads,
// and the descriptors of each process. Writable layers cost a walk of their
// files, so they are measured beside the request and at most every
// [layerAge]; a large one never holds up an answer for longer than [layerWait].
package stats

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/cni"
)

// Disk is what a writable layer takes.
type Disk struct {
	Bytes, Inodes int64
}

// Config is how a Collector is set up.
type Config struct {
	// Writable measures a container's writable layer, by container ID; nil
	// leaves writable layers out. It may be slow.
	Writable func(ctx context.Context, id string) (Disk, error)
	// Mountpoint is where the writable layers' filesystem is mounted.
	Mountpoint string
}

// Collector measures. Its methods may be called from any number of goroutines;
// it holds one CPU sample and one layer size for each ID until Forget.
type Collector struct {
	hierarchy hierarchy
	readings  readings
	rates     rates
	layers    *layers // nil without Config.Writable
	device    string  // of the layers' filesystem
}

// New finds out how the machine's cgroups are mounted.
//
// Errors: errdefs.ErrFailedPrecondition when there are none.
func New(cfg Config) (*Collector, error) {
	h, err := findHierarchy()
	if err != nil {
		return nil, err
	}
	c := &Collector{hierarchy: h}
	if cfg.Writable != nil {
		c.layers = newLayers(cfg.Writable, cfg.Mountpoint)
		c.device = deviceOf(cfg.Mountpoint)
	}
	return c, nil
}

// Close ends the measuring of layers that still runs.
func (c *Collector) Close() {
	if c.layers != nil {
		c.layers.close()
	}
}

// Forget drops what is remembered of a container or pod.
func (c *Collector) Forget(id string) {
	c.readings.forget(id)
	c.rates.forget(id)
	if c.layers != nil {
		c.layers.forget(id)
	}
}

// WritableLayers is what the layers of these containers take together, as last
// measured; those never measured count nothing yet.
func (c *Collector) WritableLayers(ids []string) Disk {
	if c.layers == nil {
		return Disk{}
	}
	return c.layers.sum(ids)
}

// ContainerInput says which container to measure.
type ContainerInput struct {
	ID string
	// CgroupPath is the spec's linux.cgroupsPath, see [Collector.Cgroup].
	CgroupPath string
	// LayerBy ends the wait for the writable layer's size, [LayerDeadline] for
	// all containers of one request.
	LayerBy time.Time
}

// LayerDeadline is until when a request that begins now waits for the sizes of
// writable layers.
func LayerDeadline() time.Time { return time.Now().Add(layerWait) }

// Container measures one running container; the caller fills in Attributes.
//
// Errors: errdefs.ErrNotFound when its cgroup is gone,
// errdefs.ErrInvalidArgument for a path that names no cgroup.
func (c *Collector) Container(ctx context.Context, in ContainerInput) (*runtime.ContainerStats, error) {
	u, err := c.usage(ctx, in.ID, in.CgroupPath, nil)
	if err != nil {
		return nil, fmt.Errorf("measure container %s: %w", in.ID, err)
	}
	s := &runtime.ContainerStats{Cpu: u.cpu, Memory: u.memory, Swap: u.swap, Io: u.io}
	if c.layers != nil {
		s.WritableLayer = c.layers.get(ctx, in.ID, in.LayerBy)
	}
	return s, nil
}

// PodInput says which pod to measure.
type PodInput struct {
	ID string
	// CgroupPath is the pod's own cgroup, the parent of its containers'.
	CgroupPath string
	// Netns is where the pod's network namespace is pinned; "" leaves the network
	// out (a pod on the host's network has no usage of its own).
	Netns string
	// Interface is the default interface, "eth0" if empty.
	Interface string
}

// Pod measures a pod as a whole; the caller fills in Containers. A network
// namespace that is gone leaves the network out.
//
// Errors: as for Container.
func (c *Collector) Pod(ctx context.Context, in PodInput) (*runtime.LinuxPodSandboxStats, error) {
	u, err := c.usage(ctx, in.ID, in.CgroupPath, func(u *usage) (err error) {
		if in.Netns == "" {
			return nil
		}
		if u.network, err = Network(in.Netns, in.Interface); errdefs.IsNotFound(err) {
			return nil
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("measure pod %s: %w", in.ID, err)
	}
	return &runtime.LinuxPodSandboxStats{
		Cpu: u.cpu, Memory: u.memory, Process: u.process, Io: u.io, Network: u.network,
	}, nil
}

// Network reads the counters of all interfaces but lo in a network namespace.
// The one named defaultName is set apart ("" is eth0), or the first where none
// has that name; nil when there is no interface at all: kubelet does not expect
// usage without a default interface, and crashes (addCRIPodNetworkStats).
//
// Errors: errdefs.ErrNotFound without such a namespace.
func Network(netns, defaultName string) (*runtime.NetworkUsage, error) {
	counters, err := interfaces(netns)
	if err != nil || len(counters) == 0 {
		return nil, err
	}
	if defaultName == "" {
		defaultName = "eth0"
	}
	first := max(0, slices.IndexFunc(counters, func(i cni.InterfaceStats) bool { return i.Name == defaultName }))
	usage := &runtime.NetworkUsage{Timestamp: time.Now().UnixNano()}
	for n, i := range counters {
		one := &runtime.NetworkInterfaceUsage{
			Name:     i.Name,
			RxBytes:  value(i.RxBytes),
			RxErrors: value(i.RxErrors),
			TxBytes:  value(i.TxBytes),
			TxErrors: value(i.TxErrors),
		}
		if n == first {
			usage.DefaultInterface = one
		} else {
			usage.Interfaces = append(usage.Interfaces, one)
		}
	}
	return usage, nil
}

// interfaces are those of a network namespace, without lo.
func interfaces(netns string) ([]cni.InterfaceStats, error) {
	all, err := cni.Stats(netns)
	return slices.DeleteFunc(all, func(i cni.InterfaceStats) bool { return i.Name == "lo" }), err
}

// usage is what one cgroup tells; nil parts are not known here.
type usage struct {
	cpu     *runtime.CpuUsage
	memory  *runtime.MemoryUsage
	swap    *runtime.SwapUsage
	process *runtime.ProcessUsage
	io      *runtime.IoUsage
	network *runtime.NetworkUsage // a pod's
}

// usage returns a reading of a cgroup that is fresh, or reads it, and what more adds.
func (c *Collector) usage(ctx context.Context, id, cgroupPath string, more func(*usage) error) (usage, error) {
	if err := ctx.Err(); err != nil {
		return usage{}, err
	}
	path, err := c.Cgroup(cgroupPath)
	if err != nil {
		return usage{}, err
	}
	return c.readings.of(id, path, func() (usage, error) {
		u, err := c.hierarchy.read(path)
		if err == nil && u.cpu != nil {
			at := time.Unix(0, u.cpu.Timestamp)
			u.cpu.UsageNanoCores = c.rates.observe(id, at, u.cpu.UsageCoreNanoSeconds.Value)
		}
		if err == nil && more != nil {
			err = more(&u)
		}
		return u, err
	})
}

func value(v uint64) *runtime.UInt64Value { return &runtime.UInt64Value{Value: v} }

// less is a-b, and 0 where two files that were read one after the other make b
// the larger.
func less(a, b uint64) uint64 {
	if b > a {
		return 0
	}
	return a - b
}

// gone tells whether a file or its cgroup is not there (any more).
func gone(err error) bool { return errdefs.IsNotFound(err) }

var errNoCgroups = errors.New("no cgroup hierarchy with cpuacct, memory or pids is mounted")
