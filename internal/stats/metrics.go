package stats

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// baseLabels are on every metric of a cgroup, as on kubelet's own of cAdvisor's.
var baseLabels = []string{"container", "id", "image", "name", "namespace", "pod"}

// Labels are the values of a cgroup's labels; its path makes the label id.
type Labels struct {
	// Container is the container's name in its pod, Image the image's and Name
	// the container's ID; a pod's own cgroup has none of them.
	Container, Image, Name string
	Namespace, Pod         string
}

// metric describes one family.
type metric struct {
	*runtime.MetricDescriptor
	kind runtime.MetricType
}

// families are all, in the order in which they were defined.
var families []*runtime.MetricDescriptor

func define(kind runtime.MetricType, name, help string, labels ...string) metric {
	keys := append(append([]string(nil), baseLabels...), labels...)
	m := metric{&runtime.MetricDescriptor{Name: name, Help: help, LabelKeys: keys}, kind}
	families = append(families, m.MetricDescriptor)
	return m
}

func counter(name, help string, labels ...string) metric {
	return define(runtime.MetricType_COUNTER, name, help, labels...)
}

func gauge(name, help string, labels ...string) metric {
	return define(runtime.MetricType_GAUGE, name, help, labels...)
}

// The families are those that kubelet serves at /metrics/cadvisor from its own
// cAdvisor, with the same labels; what is not among them:
//
//   - cadvisor_version_info and machine_*: kubelet's own, in either case;
//   - container_health_state: -1 in Kubernetes, always, and the CRI's values are
//     not negative.
//
// The CRI's values are whole numbers, so seconds are cut down to whole ones.
var (
	mLastSeen = gauge("container_last_seen", "Last time a container was seen by the exporter.")
	mCreated  = gauge("container_creation_time_seconds", "Container creation time since unix epoch in seconds.")
	mStarted  = gauge("container_start_time_seconds", "Start time of the container since unix epoch in seconds.")

	mCPUUser       = counter("container_cpu_user_seconds_total", "Cumulative user CPU time consumed in seconds.")
	mCPUSystem     = counter("container_cpu_system_seconds_total", "Cumulative system CPU time consumed in seconds.")
	mCPUUsage      = counter("container_cpu_usage_seconds_total", "Cumulative CPU time consumed in seconds.", "cpu")
	mCPUPeriods    = counter("container_cpu_cfs_periods_total", "Number of elapsed enforcement period intervals.")
	mCPUThrottled  = counter("container_cpu_cfs_throttled_periods_total", "Number of throttled period intervals.")
	mCPUThrottledS = counter("container_cpu_cfs_throttled_seconds_total", "Total time duration the container has been throttled.")
	mCPUBursts     = counter("container_cpu_cfs_burst_periods_total", "Number of periods when burst occurs.")
	mCPUBurstS     = counter("container_cpu_cfs_burst_seconds_total", "Total time duration the container has been bursted.")

	mCache        = gauge("container_memory_cache", "Number of bytes of page cache memory.")
	mRSS          = gauge("container_memory_rss", "Size of RSS in bytes.")
	mKernel       = gauge("container_memory_kernel_usage", "Size of kernel memory allocated in bytes.")
	mMapped       = gauge("container_memory_mapped_file", "Size of memory mapped files in bytes.")
	mSwap         = gauge("container_memory_swap", "Container swap usage in bytes.")
	mFailcnt      = counter("container_memory_failcnt", "Number of memory usage hits limits.")
	mUsage        = gauge("container_memory_usage_bytes", "Current memory usage in bytes, including all memory regardless of when it was accessed.")
	mMaxUsage     = gauge("container_memory_max_usage_bytes", "Maximum memory usage recorded in bytes.")
	mWorkingSet   = gauge("container_memory_working_set_bytes", "Current working set in bytes.")
	mActiveFile   = gauge("container_memory_total_active_file_bytes", "Current total active file in bytes.")
	mInactiveFile = gauge("container_memory_total_inactive_file_bytes", "Current total inactive file in bytes.")
	mFailures     = counter("container_memory_failures_total", "Cumulative count of memory allocation failures.", "failure_type", "scope")
	mEventsHigh   = counter("container_memory_events_high_total", "Cumulative count of memory.high throttle events for the container.")
	mEventsMax    = counter("container_memory_events_max_total", "Cumulative count of memory.max limit hit events for the container.")
	mDirty        = gauge("container_memory_file_dirty_bytes", "Number of bytes of file cache that has been modified but not yet written back to disk.")
	mWriteback    = gauge("container_memory_file_writeback_bytes", "Number of bytes of file cache that is currently being written back to disk.")
	mPgscan       = counter("container_memory_pgscan_total", "Cumulative number of pages scanned by the page reclaim algorithm.")
	mPgsteal      = counter("container_memory_pgsteal_total", "Cumulative number of pages reclaimed by the page reclaim algorithm.")
	mRefaultFile  = counter("container_memory_workingset_refault_file_total", "Cumulative number of refaults of previously evicted file pages.")
	mRefaultAnon  = counter("container_memory_workingset_refault_anon_total", "Cumulative number of refaults of previously evicted anonymous pages.")
	mOOMEvents    = counter("container_oom_events_total", "Count of out of memory events observed for the container.")

	mInodesFree  = gauge("container_fs_inodes_free", "Number of available Inodes.", "device")
	mInodesTotal = gauge("container_fs_inodes_total", "Number of Inodes.", "device")
	mFsLimit     = gauge("container_fs_limit_bytes", "Number of bytes that can be consumed by the container on this filesystem.", "device")
	mFsUsage     = gauge("container_fs_usage_bytes", "Number of bytes that are consumed by the container on this filesystem.", "device")

	mReadsBytes   = counter("container_fs_reads_bytes_total", "Cumulative count of bytes read.", "device")
	mReads        = counter("container_fs_reads_total", "Cumulative count of reads completed.", "device")
	mSectorReads  = counter("container_fs_sector_reads_total", "Cumulative count of sector reads completed.", "device")
	mReadsMerged  = counter("container_fs_reads_merged_total", "Cumulative count of reads merged.", "device")
	mReadSeconds  = counter("container_fs_read_seconds_total", "Cumulative count of seconds spent reading.", "device")
	mWritesBytes  = counter("container_fs_writes_bytes_total", "Cumulative count of bytes written.", "device")
	mWrites       = counter("container_fs_writes_total", "Cumulative count of writes completed.", "device")
	mSectorWrites = counter("container_fs_sector_writes_total", "Cumulative count of sector writes completed.", "device")
	mWritesMerged = counter("container_fs_writes_merged_total", "Cumulative count of writes merged.", "device")
	mWriteSeconds = counter("container_fs_write_seconds_total", "Cumulative count of seconds spent writing.", "device")
	mIOCurrent    = gauge("container_fs_io_current", "Number of I/Os currently in progress.", "device")
	mIOTime       = counter("container_fs_io_time_seconds_total", "Cumulative count of seconds spent doing I/Os.", "device")
	_             = counter("container_fs_io_time_weighted_seconds_total", "Cumulative weighted I/O time in seconds; the kernel counts it for whole disks only.", "device")
	mCostUsage    = counter("container_fs_io_cost_usage_seconds_total", "Cumulative IOCost usage in seconds.", "device")
	mCostWait     = counter("container_fs_io_cost_wait_seconds_total", "Cumulative IOCost wait in seconds.", "device")
	mCostIndebt   = counter("container_fs_io_cost_indebt_seconds_total", "Cumulative IOCost debt in seconds.", "device")
	mCostIndelay  = counter("container_fs_io_cost_indelay_seconds_total", "Cumulative IOCost delay in seconds.", "device")
	mBlkio        = counter("container_blkio_device_usage_total", "Blkio device bytes usage.", "device", "major", "minor", "operation")

	mRxBytes   = counter("container_network_receive_bytes_total", "Cumulative count of bytes received.", "interface")
	mRxPackets = counter("container_network_receive_packets_total", "Cumulative count of packets received.", "interface")
	mRxDropped = counter("container_network_receive_packets_dropped_total", "Cumulative count of packets dropped while receiving.", "interface")
	mRxErrors  = counter("container_network_receive_errors_total", "Cumulative count of errors encountered while receiving.", "interface")
	mTxBytes   = counter("container_network_transmit_bytes_total", "Cumulative count of bytes transmitted.", "interface")
	mTxPackets = counter("container_network_transmit_packets_total", "Cumulative count of packets transmitted.", "interface")
	mTxDropped = counter("container_network_transmit_packets_dropped_total", "Cumulative count of packets dropped while transmitting.", "interface")
	mTxErrors  = counter("container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting.", "interface")

	mProcesses  = gauge("container_processes", "Number of processes running inside the container.")
	mFiles      = gauge("container_file_descriptors", "Number of open file descriptors for the container.")
	mSockets    = gauge("container_sockets", "Number of open sockets for the container.")
	mThreadsMax = gauge("container_threads_max", "Maximum number of threads allowed inside the container, infinity if value is zero.")
	mThreads    = gauge("container_threads", "Number of threads running inside the container.")
	mUlimits    = gauge("container_ulimits_soft", "Soft ulimit values for the container root process.", "ulimit")

	mPressureCPUFull = counter("container_pressure_cpu_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to CPU congestion.")
	mPressureCPUSome = counter("container_pressure_cpu_waiting_seconds_total", "Total time duration tasks in the container have waited due to CPU congestion.")
	mPressureMemFull = counter("container_pressure_memory_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to memory congestion.")
	mPressureMemSome = counter("container_pressure_memory_waiting_seconds_total", "Total time duration tasks in the container have waited due to memory congestion.")
	mPressureIOFull  = counter("container_pressure_io_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to IO congestion.")
	mPressureIOSome  = counter("container_pressure_io_waiting_seconds_total", "Total time duration tasks in the container have waited due to IO congestion.")

	mSpecPeriod      = gauge("container_spec_cpu_period", "CPU period of the container.")
	mSpecQuota       = gauge("container_spec_cpu_quota", "CPU quota of the container.")
	mSpecShares      = gauge("container_spec_cpu_shares", "CPU share of the container.")
	mSpecMemory      = gauge("container_spec_memory_limit_bytes", "Memory limit for the container.")
	mSpecSwap        = gauge("container_spec_memory_swap_limit_bytes", "Memory swap limit for the container.")
	mSpecReservation = gauge("container_spec_memory_reservation_limit_bytes", "Memory reservation limit for the container.")

	mScrapeError = bare("container_scrape_error", "1 if there was an error while getting container metrics, 0 otherwise.")
)

// bare is a gauge without labels.
func bare(name, help string) metric {
	m := gauge(name, help)
	m.LabelKeys = nil
	return m
}

// Families describes all metrics there are. Read only.
func Families() []*runtime.MetricDescriptor { return families }

// ScrapeError is the metric that tells whether anything could not be measured.
func ScrapeError(failed bool) *runtime.Metric {
	s := new(series)
	if failed {
		s.add(mScrapeError, 1)
	} else {
		s.add(mScrapeError, 0)
	}
	return s.out[0]
}

// MetricsInput says which cgroup to measure.
type MetricsInput struct {
	ID         string
	CgroupPath string
	Labels     Labels
	// Created and Started; zero is when the cgroup was made.
	Created, Started time.Time
	// PID is the first process, 0 for a cgroup that has none.
	PID int
	// Layer tells that there is a writable layer.
	Layer bool
	// Netns is where the network namespace is pinned; "" leaves the network out.
	Netns string
}

// Metrics gives a cgroup's values for all families that apply to it. They are
// read now, so that they have no timestamps, except a writable layer's size.
//
// Errors: as for Container.
func (c *Collector) Metrics(ctx context.Context, in MetricsInput) ([]*runtime.Metric, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	out, err := c.metrics(in)
	if err != nil {
		return nil, fmt.Errorf("metrics of %s: %w", in.ID, err)
	}
	return out, nil
}

func (c *Collector) metrics(in MetricsInput) ([]*runtime.Metric, error) {
	path, err := c.Cgroup(in.CgroupPath)
	if err != nil {
		return nil, err
	}
	n, err := c.hierarchy.count(path)
	if err != nil {
		return nil, err
	}
	l := in.Labels
	s := &series{
		base: []string{l.Container, path, l.Image, l.Name, l.Namespace, l.Pod},
		out:  make([]*runtime.Metric, 0, len(families)),
	}
	s.times(in, n)
	s.cpu(n)
	s.memory(n)
	for d, disk := range n.disks {
		s.disk(d, disk)
	}
	s.pressure(n)
	if err := s.processes(in, n); err != nil {
		return nil, err
	}
	if in.Layer && c.layers != nil {
		s.layer(c.layers.peek(in.ID), c.layers.mountpoint, c.device)
	}
	if in.Netns == "" {
		return s.out, nil
	}
	if err := s.network(in.Netns); err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	return s.out, nil
}

// series collects the metrics of one cgroup.
type series struct {
	base []string // label values, shared by all metrics without further ones
	out  []*runtime.Metric
}

// add appends a value; labels are those the family has beside baseLabels.
func (s *series) add(m metric, v uint64, labels ...string) {
	cell := new(struct {
		metric runtime.Metric
		value  runtime.UInt64Value
	})
	cell.value.Value = v
	cell.metric.Name, cell.metric.MetricType, cell.metric.Value = m.Name, m.kind, &cell.value
	cell.metric.LabelValues = s.base
	if len(labels) > 0 {
		cell.metric.LabelValues = append(append(make([]string, 0, len(s.base)+len(labels)), s.base...), labels...)
	}
	s.out = append(s.out, &cell.metric)
}

// seconds appends nanoseconds as whole seconds.
func (s *series) seconds(m metric, nanos uint64, labels ...string) {
	s.add(m, nanos/uint64(time.Second), labels...)
}

func (s *series) times(in MetricsInput, n *counters) {
	if in.Created.IsZero() {
		in.Created = n.born
	}
	if in.Started.IsZero() {
		in.Started = n.born
	}
	s.add(mLastSeen, uint64(time.Now().Unix()))
	s.add(mCreated, uint64(max(0, in.Created.Unix())))
	s.add(mStarted, uint64(max(0, in.Started.Unix())))
}

func (s *series) cpu(n *counters) {
	s.seconds(mCPUUser, n.cpu.user)
	s.seconds(mCPUSystem, n.cpu.system)
	s.seconds(mCPUUsage, n.cpu.total, "total")
	s.add(mSpecPeriod, n.limits.period)
	s.add(mSpecShares, n.limits.shares)
	if n.limits.quota == 0 {
		return
	}
	s.add(mSpecQuota, n.limits.quota)
	s.add(mCPUPeriods, n.cpu.periods)
	s.add(mCPUThrottled, n.cpu.throttled)
	s.seconds(mCPUThrottledS, n.cpu.throttledTime)
	s.add(mCPUBursts, n.cpu.bursts)
	s.seconds(mCPUBurstS, n.cpu.burstTime)
}

func (s *series) memory(n *counters) {
	m := &n.memory
	for _, v := range []struct {
		metric metric
		value  uint64
	}{
		{mCache, m.cache}, {mRSS, m.rss}, {mKernel, m.kernel}, {mMapped, m.mapped}, {mSwap, m.swap},
		{mFailcnt, m.failures}, {mUsage, m.used}, {mMaxUsage, m.most}, {mWorkingSet, m.working},
		{mActiveFile, m.activeFile}, {mInactiveFile, m.inactiveFile},
		{mEventsHigh, m.high}, {mEventsMax, m.max}, {mDirty, m.dirty}, {mWriteback, m.writeback},
		{mPgscan, m.scanned}, {mPgsteal, m.stolen},
		{mRefaultFile, m.refaultFile}, {mRefaultAnon, m.refaultAnon}, {mOOMEvents, m.oomKills},
		{mSpecMemory, n.limits.memory}, {mSpecSwap, n.limits.swap}, {mSpecReservation, n.limits.reservation},
	} {
		s.add(v.metric, v.value)
	}
	// The kernel's numbers count children; a container has none to count apart.
	for _, scope := range []string{"container", "hierarchy"} {
		s.add(mFailures, m.faults, "pgfault", scope)
		s.add(mFailures, m.majorFaults, "pgmajfault", scope)
	}
}

func (s *series) disk(d device, n *disk) {
	name := deviceName(d)
	both := func(from map[string]uint64, read, write metric, unit uint64) {
		if from != nil {
			s.add(read, from["Read"]/unit, name)
			s.add(write, from["Write"]/unit, name)
		}
	}
	both(n.bytes, mReadsBytes, mWritesBytes, 1)
	both(n.ops, mReads, mWrites, 1)
	both(n.merged, mReadsMerged, mWritesMerged, 1)
	both(n.serviceTime, mReadSeconds, mWriteSeconds, uint64(time.Second))
	if n.sectors != nil {
		// One number for both, which cAdvisor gives twice as well.
		s.add(mSectorReads, n.sectors["Count"], name)
		s.add(mSectorWrites, n.sectors["Count"], name)
	}
	if n.queued != nil {
		s.add(mIOCurrent, n.queued["Total"], name)
	}
	if n.serviceTime != nil {
		s.seconds(mIOTime, n.serviceTime["Total"], name)
	}
	if n.costed {
		const micros = 1e6
		s.add(mCostUsage, n.usage/micros, name)
		s.add(mCostWait, n.wait/micros, name)
		s.add(mCostIndebt, n.indebt/micros, name)
		s.add(mCostIndelay, n.indelay/micros, name)
	}
	major, minor := strconv.FormatUint(uint64(d.major), 10), strconv.FormatUint(uint64(d.minor), 10)
	for operation, v := range n.bytes {
		s.add(mBlkio, v, name, major, minor, operation)
	}
}

func (s *series) pressure(n *counters) {
	if n.psi == nil {
		return
	}
	s.seconds(mPressureCPUFull, n.psi.cpuFull)
	s.seconds(mPressureCPUSome, n.psi.cpuSome)
	s.seconds(mPressureMemFull, n.psi.memoryFull)
	s.seconds(mPressureMemSome, n.psi.memorySome)
	s.seconds(mPressureIOFull, n.psi.ioFull)
	s.seconds(mPressureIOSome, n.psi.ioSome)
}

func (s *series) processes(in MetricsInput, n *counters) error {
	files, sockets, err := openFiles(n.procs)
	if err != nil {
		return err
	}
	s.add(mProcesses, uint64(len(n.procs)))
	s.add(mFiles, files)
	s.add(mSockets, sockets)
	s.add(mThreads, n.threads)
	s.add(mThreadsMax, n.threadsMax)
	if in.PID == 0 {
		return nil
	}
	limit, err := maxOpenFiles(in.PID)
	if err == nil {
		s.add(mUlimits, limit, "max_open_files")
	}
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// layer adds a writable layer and the filesystem it is on.
func (s *series) layer(usage *runtime.FilesystemUsage, mountpoint, device string) {
	var fs unix.Statfs_t
	if err := unix.Statfs(mountpoint, &fs); err == nil {
		s.add(mFsLimit, fs.Blocks*uint64(fs.Bsize), device)
		s.add(mInodesTotal, fs.Files, device)
		s.add(mInodesFree, fs.Ffree, device)
	}
	if usage != nil {
		s.add(mFsUsage, usage.GetUsedBytes().GetValue(), device)
		s.out[len(s.out)-1].Timestamp = usage.GetTimestamp()
	}
}

func (s *series) network(netns string) error {
	counters, err := interfaces(netns)
	if err != nil {
		return err
	}
	for _, i := range counters {
		for _, v := range []struct {
			metric metric
			value  uint64
		}{
			{mRxBytes, i.RxBytes}, {mRxPackets, i.RxPackets}, {mRxDropped, i.RxDropped}, {mRxErrors, i.RxErrors},
			{mTxBytes, i.TxBytes}, {mTxPackets, i.TxPackets}, {mTxDropped, i.TxDropped}, {mTxErrors, i.TxErrors},
		} {
			s.add(v.metric, v.value, i.Name)
		}
	}
	return nil
}
