// Package machine lists what a container runtime may have left behind on this
// machine: processes, mounts, network namespaces, links, cgroups, IP
// reservations, firewall rules, files.
//
// It asks the kernel and the file system, never the runtime. A Scope says
// which part of the machine belongs to the run; Held lists everything in it.
// What is held after a run and was not before is a leak:
//
//	before, err := scope.Held()
//	... run ...
//	after, err := scope.Held()
//	leaks := machine.Leaks(before, after)
package machine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"github.com/vishvananda/netlink"
)

// Scope is the part of the machine that one run may use. A zero field leaves
// that kind out.
type Scope struct {
	// Parent is a process whose descendants are the run's. It should be a
	// child subreaper (prctl PR_SET_CHILD_SUBREAPER), so that what the run
	// orphans stays its descendant.
	Parent int
	// Except are descendants that are meant to be there; their own
	// descendants are not excepted.
	Except []int
	// Dir is the run's own directory: mounts below it and mounts made from
	// files in it are the run's.
	Dir string
	// NetnsDir holds the run's pinned network namespaces.
	NetnsDir string
	// Bridge is the run's bridge; its ports are the run's veths.
	Bridge string
	// CgroupParent is a cgroup path below the root of every hierarchy; the
	// directories in it (not itself) are the run's.
	CgroupParent string
	// Files are directories in which every file is the run's: IP
	// reservations, the run directory, snapshots.
	Files []string
	// Ignore drops a file from Files; of a directory that is ignored, what is
	// in it still counts.
	Ignore func(path string) bool
	// Whole takes every mount, link and firewall rule of the caller's
	// namespaces as the run's. For callers in namespaces of their own.
	Whole bool
}

// Thing is something that is held: its kind and what identifies it.
type Thing struct{ Kind, Name string }

func (t Thing) String() string { return t.Kind + " " + t.Name }

// Leaks is what after has and before has not.
func Leaks(before, after []Thing) []Thing {
	had := map[Thing]bool{}
	for _, t := range before {
		had[t] = true
	}
	return slices.DeleteFunc(slices.Clone(after), func(t Thing) bool { return had[t] })
}

// Held lists the things of the scope, sorted by kind.
func (s Scope) Held() ([]Thing, error) {
	var things []Thing
	for _, list := range []func() ([]Thing, error){
		s.processes, s.mounts, s.netns, s.links, s.cgroups, s.files, s.firewall,
	} {
		found, err := list()
		if err != nil {
			return nil, err
		}
		things = append(things, found...)
	}
	return things, nil
}

// processes lists the descendants of Parent.
func (s Scope) processes() ([]Thing, error) {
	if s.Parent == 0 {
		return nil, nil
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	parents, names := map[int]int{}, map[int]string{}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue // gone meanwhile
		}
		// The command is in parentheses and may hold any byte.
		open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
		if open < 0 || end < open {
			continue
		}
		fields := strings.Fields(string(stat[end+1:]))
		if len(fields) < 2 {
			continue
		}
		parents[pid], _ = strconv.Atoi(fields[1])
		names[pid] = fmt.Sprintf("%d (%s, state %s)", pid, stat[open+1:end], fields[0])
	}
	var things []Thing
	for pid, name := range names {
		if !slices.Contains(s.Except, pid) && s.descends(pid, parents) {
			things = append(things, Thing{"process", name})
		}
	}
	slices.SortFunc(things, func(a, b Thing) int { return strings.Compare(a.Name, b.Name) })
	return things, nil
}

// descends tells whether a process comes from Parent.
func (s Scope) descends(pid int, parents map[int]int) bool {
	for hops := 0; pid > 1 && hops < len(parents); hops++ {
		pid = parents[pid]
		if pid == s.Parent {
			return true
		}
	}
	return false
}

// mounts lists mounts of the caller's mount namespace.
func (s Scope) mounts() ([]Thing, error) {
	if s.Dir == "" && !s.Whole {
		return nil, nil
	}
	infos, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	var things []Thing
	for _, m := range infos {
		if m.Mountpoint == s.NetnsDir {
			continue // made once, as `ip netns` does, so that pins propagate; no pod's
		}
		ours := s.Whole
		for _, text := range []string{m.Mountpoint, m.Root, m.Source, m.VFSOptions} {
			ours = ours || s.Dir != "" && strings.Contains(text, s.Dir)
		}
		if ours {
			things = append(things, Thing{"mount", m.Mountpoint + " (" + m.FSType + ")"})
		}
	}
	return things, nil
}

// netns lists pinned network namespaces.
func (s Scope) netns() ([]Thing, error) {
	if s.NetnsDir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(s.NetnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var things []Thing
	for _, e := range entries {
		things = append(things, Thing{"network namespace", filepath.Join(s.NetnsDir, e.Name())})
	}
	return things, nil
}

// links lists the bridge's ports, or every link but the bridge.
func (s Scope) links() ([]Thing, error) {
	if s.Bridge == "" && !s.Whole {
		return nil, nil
	}
	all, err := netlink.LinkList()
	for errors.Is(err, netlink.ErrDumpInterrupted) { // a change of another's: links may be missing
		all, err = netlink.LinkList()
	}
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	bridge := -1
	for _, l := range all {
		if l.Attrs().Name == s.Bridge {
			bridge = l.Attrs().Index
		}
	}
	var things []Thing
	for _, l := range all {
		if l.Attrs().Index != bridge && (s.Whole || bridge >= 0 && l.Attrs().MasterIndex == bridge) {
			things = append(things, Thing{"link", l.Attrs().Name + " (" + l.Type() + ")"})
		}
	}
	return things, nil
}

// cgroups lists the directories below CgroupParent in every hierarchy.
func (s Scope) cgroups() ([]Thing, error) {
	if s.CgroupParent == "" {
		return nil, nil
	}
	roots, err := CgroupRoots()
	if err != nil {
		return nil, err
	}
	var things []Thing
	for _, root := range roots {
		top := filepath.Join(root, s.CgroupParent)
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if err == nil && d.IsDir() && path != top {
				things = append(things, Thing{"cgroup", path})
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list cgroups: %w", err)
		}
	}
	return things, nil
}

// CgroupRoots are the mount points of the cgroup hierarchies, v1 and v2.
func CgroupRoots() ([]string, error) {
	infos, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "cgroup" && m.FSType != "cgroup2", false
	})
	if err != nil {
		return nil, fmt.Errorf("list cgroup mounts: %w", err)
	}
	var roots []string
	for _, m := range infos {
		if !slices.Contains(roots, m.Mountpoint) {
			roots = append(roots, m.Mountpoint)
		}
	}
	return roots, nil
}

// files lists what is in the Files directories, empty directories included.
func (s Scope) files() ([]Thing, error) {
	var things []Thing
	for _, top := range s.Files {
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil
			case err != nil:
				return err
			case path != top && (s.Ignore == nil || !s.Ignore(path)):
				things = append(things, Thing{"file", path})
			}
			if slices.Contains([]string{"fs", "work", "rootfs"}, d.Name()) && d.IsDir() {
				return fs.SkipDir // a container's files, not the runtime's
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list files: %w", err)
		}
	}
	return things, nil
}

// firewall lists the rules of nftables, which hold those of Debian's iptables
// too. What the portmap plugin sets up once for all pods (its chains named
// CNI-HOSTPORT-*, and the jumps to them) is no pod's and left out.
func (s Scope) firewall() ([]Thing, error) {
	if !s.Whole {
		return nil, nil
	}
	out, err := exec.Command("nft", "--json", "list", "ruleset").Output()
	if err != nil {
		return nil, fmt.Errorf("list firewall rules: nft: %w", err)
	}
	var set struct {
		Nftables []struct {
			Chain *struct{ Family, Table, Name string }
			Rule  *struct {
				Family, Table, Chain string
				Expr                 json.RawMessage
			}
		}
	}
	if err := json.Unmarshal(out, &set); err != nil {
		return nil, fmt.Errorf("parse firewall rules: %w", err)
	}
	var things []Thing
	for _, o := range set.Nftables {
		switch {
		case o.Chain != nil && strings.HasPrefix(o.Chain.Name, "CNI-") && !portmapBase(o.Chain.Name):
			things = append(things, Thing{"firewall chain", o.Chain.Family + " " + o.Chain.Table + " " + o.Chain.Name})
		case o.Rule != nil && !portmapOwn(o.Rule.Chain, string(o.Rule.Expr)):
			things = append(things, Thing{"firewall rule",
				fmt.Sprintf("%s %s %s %s", o.Rule.Family, o.Rule.Table, o.Rule.Chain, o.Rule.Expr)})
		}
	}
	return things, nil
}

func portmapBase(chain string) bool { return strings.HasPrefix(chain, "CNI-HOSTPORT-") }

// portmapOwn tells a rule that portmap needs for any pod from one pod's rule:
// those of a pod name its chain, CNI-DN-HASH.
func portmapOwn(chain, expr string) bool {
	return !strings.Contains(expr, "CNI-DN-") && (portmapBase(chain) || strings.Contains(expr, "CNI-HOSTPORT-"))
}
