package doctor

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// machineView is this machine's processes and mounts at one moment.
type machineView struct {
	processes []process
	mounts    []*mountinfo.Info
}

// process is one process as /proc shows it.
type process struct {
	wire.Process
	parent int
	name   string
	cgroup string    // a line for each hierarchy
	spaces [2]uint64 // inodes of its network and user namespaces
	mounts uint64    // and of its mount namespace
	podmon bool      // is one of this podshim
	// ours: its root filesystem is podshim's, a container's or infra's; rootID is
	// whose, as long as that is mounted on the node, and snapshot the directory it is
	// written to. A started container's is not mounted there any more.
	ours             bool
	rootID, snapshot string
}

func readMachine(run, root string) (*machineView, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	m := &machineView{mounts: mounts}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	roots := rootsBelow(run)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, err := readProcess(pid); err == nil { // else it has ended meanwhile
			p.podmon = p.isPodmon(run)
			p.onRoot(roots, filepath.Join(root, "images", "snapshots"))
			m.processes = append(m.processes, p)
		}
	}
	return m, nil
}

func readProcess(pid int) (process, error) {
	id, err := wire.Identify(pid)
	if err != nil {
		return process{}, err
	}
	p := process{Process: id}
	stat, err := os.ReadFile(p.path("stat"))
	if err != nil {
		return p, err
	}
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[end+1:]))
	if open < 0 || end < open || len(fields) < 2 {
		return p, fmt.Errorf("stat of %d", pid)
	}
	p.name = string(stat[open+1 : end])
	if p.parent, err = strconv.Atoi(fields[1]); err != nil {
		return p, err
	}
	cgroup, err := os.ReadFile(p.path("cgroup"))
	if err != nil {
		return p, err
	}
	p.cgroup = string(cgroup)
	if ns, err := inode(p.path("ns/mnt")); err == nil {
		p.mounts = ns[1]
	}
	for i, kind := range []string{"net", "user"} {
		if ns, err := inode(p.path("ns/" + kind)); err == nil {
			p.spaces[i] = ns[1]
		}
	}
	return p, nil
}

func (p process) path(name string) string {
	return filepath.Join("/proc", strconv.Itoa(p.PID), name)
}

// isPodmon goes by the arguments that the daemon starts it with.
func (p process) isPodmon(run string) bool {
	args, err := os.ReadFile(p.path("cmdline"))
	words := strings.Split(string(args), "\x00")
	return err == nil && len(words) > 2 && words[1] == "serve" && words[2] == filepath.Join(run, "monitor")
}

// rootsBelow are the root filesystems that are mounted for containers, and that of
// infra containers, which is nobody's in particular.
func rootsBelow(run string) map[[2]uint64]string {
	roots := map[[2]uint64]string{}
	for _, pattern := range []string{"containers/*/rootfs", "infra/*/rootfs", "infra/rootfs"} {
		paths, _ := filepath.Glob(filepath.Join(run, pattern)) // the pattern is good
		for _, path := range paths {
			if root, err := inode(path); err == nil {
				roots[root] = anyID.FindString(path)
			}
		}
	}
	return roots
}

// onRoot notes whether the process sees one of these root filesystems as its own, or one
// that is written to a snapshot.
func (p *process) onRoot(roots map[[2]uint64]string, snapshots string) {
	if root, err := inode(p.path("root")); err == nil {
		if p.rootID, p.ours = roots[root]; p.ours {
			return
		}
	}
	f, err := os.Open(p.path("mountinfo"))
	if err != nil {
		return
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != "/" || m.FSType != "overlay", false
	})
	if err != nil || len(mounts) == 0 {
		return
	}
	for option := range strings.SplitSeq(mounts[len(mounts)-1].VFSOptions, ",") {
		if dir, ok := strings.CutPrefix(option, "upperdir="+snapshots+"/"); ok {
			p.ours = true
			p.snapshot, _, _ = strings.Cut(dir, "/")
		}
	}
}

// inode is what tells files apart: device and number.
func inode(path string) ([2]uint64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return [2]uint64{}, err
	}
	return [2]uint64{st.Dev, st.Ino}, nil
}

// ids are the IDs in the names of the process's cgroups.
func (p process) ids() []string { return anyID.FindAllString(p.cgroup, -1) }

// mountsBelow lists what is mounted at path or below it, now.
func mountsBelow(path string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(path))
	if err != nil {
		return nil, fmt.Errorf("read mounts: %w", err)
	}
	var points []string
	for _, m := range mounts {
		points = append(points, m.Mountpoint)
	}
	return points, nil
}

func isMounted(point string) bool {
	mounts, err := mountinfo.GetMounts(mountinfo.SingleEntryFilter(point))
	return err != nil || len(mounts) > 0
}
