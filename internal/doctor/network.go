package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/sandbox"
)

// lookAtNetwork lists pinned namespaces, what pods are attached with, their
// addresses and their interfaces on the node's side.
func (d *Doctor) lookAtNetwork(_ context.Context, m *machineView, _ []string) ([]Finding, error) {
	survey, err := cni.Look(d.CNI)
	if err != nil {
		return nil, err
	}
	var found []Finding
	for _, id := range survey.Attached {
		found = append(found, Finding{
			Kind: Attachment, Name: id, ID: id,
			Why:    "no record has the pod that this network was set up for",
			Remedy: "DEL, with the configuration that it was set up with",
			there:  exists(filepath.Join(d.CNI.CacheDir, "attachments", id+".json")),
			repair: func(ctx context.Context) error { return d.Network.Del(ctx, cni.Pod{ID: id}) },
		})
	}
	for _, r := range survey.Reserved {
		if m.elsewhere(r.PodID) {
			continue
		}
		f := Finding{
			Kind: Reservation, Name: r.IP, ID: r.PodID,
			Why:    fmt.Sprintf("%s keeps it for pod %q, which no record has", r.Path, r.PodID),
			Remedy: "DEL for that pod, by which the plugin frees it",
			there:  r.Held,
			repair: func(ctx context.Context) error { return d.Network.Free(ctx, r) },
		}
		if r.PodID == "" {
			f.ID, f.Why = "nobody", r.Path+" is empty: the plugin was killed before it wrote for which pod it keeps it"
			f.Remedy = "remove the file"
		}
		found = append(found, f)
	}
	for _, path := range survey.Results {
		if id := anyID.FindString(filepath.Base(path)); id != "" {
			found = append(found, Finding{
				Kind: Result, Name: path, ID: id,
				Why:    "it is of a pod that no record has",
				Remedy: "remove it",
				there:  exists(path),
				repair: func(context.Context) error { return remove(path) },
			})
		}
	}
	pins, err := d.lookAtPins(m)
	if err != nil {
		return nil, err
	}
	veths, err := d.lookAtVeths(survey.Bridges)
	return slices.Concat(found, pins, veths), err
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// elsewhere tells whether a pod of this ID runs and is not podshim's: another
// runtime may use the same network.
func (m *machineView) elsewhere(id string) bool {
	return id != "" && slices.ContainsFunc(m.processes, func(p process) bool {
		return !p.ours && slices.Contains(p.ids(), id)
	})
}

// lookAtPins lists pinned namespaces that no process of others is in.
func (d *Doctor) lookAtPins(m *machineView) ([]Finding, error) {
	pins, err := cni.List(d.NetnsDir, sandbox.PinPrefix)
	if err != nil {
		return nil, err
	}
	var found []Finding
	for _, path := range pins {
		users, others := m.users(path)
		id := sandbox.PinnedFor(path)
		if others || id == "" {
			continue
		}
		found = append(found, Finding{
			Kind: Netns, Name: path, ID: id,
			Why:    "no record has a pod whose ID begins so",
			Remedy: "unpin it; the kernel frees it with what is in it",
			users:  users,
			there:  exists(path),
			repair: func(context.Context) error { return cni.Remove(path) },
		})
	}
	return found, nil
}

// users are podshim's processes that are in the namespace; others tells whether
// somebody else's are.
func (m *machineView) users(pin string) (users []process, others bool) {
	ns, err := inode(pin)
	for _, p := range m.processes {
		if err == nil && slices.Contains(p.spaces[:], ns[1]) {
			others = others || !p.ours
			users = append(users, p)
		}
	}
	return users, others
}

// vethName is how the plugins name the node's end of a pod's interface.
var vethName = regexp.MustCompile(`^veth[0-9a-f]{8}$`)

// lookAtVeths lists the interfaces on pods' bridges whose other end is in no
// namespace that anybody has.
func (d *Doctor) lookAtVeths(bridges []string) ([]Finding, error) {
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	masters := map[int]string{}
	for _, l := range links {
		if slices.Contains(bridges, l.Attrs().Name) {
			masters[l.Attrs().Index] = l.Attrs().Name
		}
	}
	var veths []netlink.Link
	for _, l := range links {
		if l.Type() == "veth" && masters[l.Attrs().MasterIndex] != "" && vethName.MatchString(l.Attrs().Name) {
			veths = append(veths, l)
		}
	}
	if len(veths) == 0 {
		return nil, nil
	}
	// After the interfaces: a pod that is made meanwhile is not among them.
	known, err := d.namespaceIDs()
	if err != nil {
		return nil, err
	}
	var found []Finding
	for _, l := range veths {
		a := l.Attrs()
		if known[a.NetNsID] {
			continue
		}
		found = append(found, Finding{
			Kind: Veth, Name: a.Name,
			Why:    fmt.Sprintf("it is on the pods' bridge %s, and its other end is in no pod's network namespace", masters[a.MasterIndex]),
			Remedy: "delete it, and with it its other end",
			there:  func() bool { return sameLink(a) },
			repair: func(context.Context) error { return deleteLink(a) },
		})
	}
	return found, nil
}

// namespaceIDs are the numbers by which this network namespace knows those that
// are pods', pinned by others, or that a process is in.
func (d *Doctor) namespaceIDs() (map[int]bool, error) {
	owned := d.claims().ids
	known := map[int]bool{}
	for _, dir := range []string{d.NetnsDir, cni.DefaultNetnsDir} {
		pins, err := cni.List(dir, "")
		if err != nil {
			return nil, err
		}
		for _, path := range pins {
			if id := sandbox.PinnedFor(path); id != "" && dir == d.NetnsDir && !owned[id] {
				continue
			}
			if fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err == nil {
				if id, err := netlink.GetNetNsIdByFd(fd); err == nil && id >= 0 {
					known[id] = true
				}
				unix.Close(fd)
			}
		}
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	seen := map[[2]uint64]bool{}
	for _, dir := range processes {
		ns, err := inode(filepath.Join(dir, "ns", "net"))
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if id, err := netlink.GetNetNsIdByPid(pid); err == nil && id >= 0 {
			known[id] = true
		}
	}
	return known, nil
}

// sameLink tells whether the interface is there still.
func sameLink(a *netlink.LinkAttrs) bool {
	l, err := netlink.LinkByIndex(a.Index)
	return err == nil && l.Attrs().Name == a.Name
}

func deleteLink(a *netlink.LinkAttrs) error {
	if !sameLink(a) {
		return nil
	}
	if err := netlink.LinkDel(&netlink.Dummy{LinkAttrs: *a}); err != nil && sameLink(a) {
		return fmt.Errorf("delete %s: %w", a.Name, err)
	}
	return nil
}
