package container

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/spec"
)

// UpdateResources changes the limits of a created or running container. What
// the request leaves at zero stays as it is (CRI UpdateContainerResources).
func (m *Manager) UpdateResources(ctx context.Context, id string, want *runtime.LinuxContainerResources) error {
	c, err := m.Get(id)
	if err != nil {
		return err
	}
	unlock, err := m.all.Lock(ctx, c.Get().ID)
	if err != nil {
		return err
	}
	defer unlock()
	r := c.Get()
	if r.State != Running && r.State != Created {
		return fmt.Errorf("container %s is %s: its resources cannot be changed: %w", r.ID, r.State, errdefs.ErrFailedPrecondition)
	}
	oci, err := m.Spec(r.ID)
	if err != nil {
		return err
	}
	resources, err := spec.Resources(want, m.Host, oci.Linux.Resources)
	if err != nil {
		return err
	}
	m.warnHugepages(r, want)
	var adj *int
	if want.GetOomScoreAdj() != 0 {
		adj = spec.OOMScoreAdj(want, m.Host)
		oci.Process.OOMScoreAdj = adj
	}
	if r.State == Running {
		if err := m.Monitor.Update(ctx, r.ID, resources, adj); err != nil {
			return fmt.Errorf("update resources of container %s: %w", r.ID, err)
		}
	}
	oci.Linux.Resources = resources
	if err := m.saveSpec(r.ID, oci); err != nil {
		return err
	}
	kept, err := keptOf(oci)
	if err != nil {
		return err
	}
	return m.all.Update(c, func(r *Record) {
		r.Kept = kept
		r.Resources = merge(r.CurrentResources(), want)
		if m := resources.Memory; m != nil && m.Swap != nil && r.Resources.GetMemorySwapLimitInBytes() != 0 {
			r.Resources.MemorySwapLimitInBytes = *m.Swap // moved with the memory limit
		}
	})
}

// warnHugepages says in the log which limits the machine does not keep.
func (m *Manager) warnHugepages(r *Record, want *runtime.LinuxContainerResources) {
	if sizes := spec.HugepagesUnlimited(want, m.Host); len(sizes) > 0 {
		m.log(r).WithField("page_sizes", sizes).Warn("this machine has no hugetlb controller: the container's huge pages are not limited")
	}
}

// merge lays what a request sets over what was in force. Hugepage limits are set
// by page size, as package spec does.
func merge(old, want *runtime.LinuxContainerResources) *runtime.LinuxContainerResources {
	out := new(runtime.LinuxContainerResources)
	if old != nil {
		proto.Merge(out, old)
	}
	limits := out.HugepageLimits
	out.HugepageLimits = nil
	proto.Merge(out, want)
	for _, l := range limits {
		if !slices.ContainsFunc(out.HugepageLimits, func(w *runtime.HugepageLimit) bool { return w.GetPageSize() == l.GetPageSize() }) {
			out.HugepageLimits = append(out.HugepageLimits, l)
		}
	}
	return out
}

// ReopenLog makes the log's writer open its file anew, after kubelet has moved
// it away (CRI ReopenContainerLog).
func (m *Manager) ReopenLog(ctx context.Context, id string) error {
	r, err := m.running(id)
	if err != nil {
		return err
	}
	if err := m.Monitor.ReopenLog(ctx, r.ID); err != nil {
		return fmt.Errorf("reopen log of container %s: %w", r.ID, err)
	}
	return nil
}
