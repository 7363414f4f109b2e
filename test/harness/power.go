package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// LosePower does to the node what a power cut does: every process is gone at once,
// and so is all that lives in memory, which are mounts, namespaces, links, cgroups
// and the run directory. The root directory, logs and IP reservations stay as they
// are. [Node.Resume] is the next boot's start.
func (n *Node) LosePower() {
	n.t.Helper()
	n.Kill()
	err := n.halt(n.RunDir, n.NetnsDir, n.Root)
	for _, dir := range []string{n.RunDir, n.NetnsDir} {
		if err == nil {
			err = os.RemoveAll(dir)
		}
		if err == nil {
			err = os.Mkdir(dir, 0o755)
		}
	}
	// What the kernel's boot ID would tell: the last daemon ran in another boot.
	if err == nil {
		err = os.WriteFile(filepath.Join(n.Root, "boot"), []byte(`{"boot":"before-the-power-cut"}`), 0o600)
	}
	if err == nil {
		err = n.makeCgroups()
	}
	if err != nil {
		n.t.Fatalf("power cut: %v", err)
	}
}

// halt ends all that the node has in memory: processes, mounts below the given
// directories, links and cgroups.
func (d *daemon) halt(dirs ...string) error {
	all := d.processes()
	for _, p := range all {
		_ = p.Kill(unix.SIGKILL)
	}
	for _, p := range all {
		if err := p.WaitGone(Limit); err != nil {
			return err
		}
	}
	for _, m := range slices.Backward(machineMounts()) {
		if slices.ContainsFunc(dirs, func(dir string) bool { return strings.HasPrefix(m.Point+"/", dir+"/") }) && m.Point != d.Root {
			if err := unix.Unmount(m.Point, unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", m.Point, err)
			}
		}
	}
	for _, name := range d.ports() {
		if l, err := netlink.LinkByName(name); err == nil {
			_ = netlink.LinkDel(l)
		}
	}
	if l, err := netlink.LinkByName(d.Bridge); err == nil {
		if err := netlink.LinkDel(l); err != nil {
			return fmt.Errorf("delete bridge: %w", err)
		}
	}
	if err := RemoveCgroup("/" + d.Name); err != nil {
		return err
	}
	if Systemd {
		for _, name := range []string{d.PodsCgroup, d.OwnCgroup, d.Name + ".slice"} {
			if err := RemoveCgroup(name); err != nil {
				return err
			}
		}
	}
	return nil
}
