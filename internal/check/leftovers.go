package check

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"path/filepath"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/config"
	"github.com/podshim/podshim/internal/monitor/wire"
)

// netnsPrefix is what podshim's network namespaces are called: podshim-<ID>.
const netnsPrefix = "podshim-"

// leftovers looks for what a podshim that is gone has left: network namespaces,
// mounts and cgroups. While a podshim or one of its podmons runs, all of it is
// in use.
func leftovers(ctx context.Context, cfg *config.Config) []Finding {
	if answers(ctx, cfg.CRI.Socket) {
		return []Finding{ok("podshim", "running on %s; what it holds is its own", cfg.CRI.Socket)}
	}
	if sock := runningMonitor(ctx, cfg.Run); sock != "" {
		return []Finding{ok("podmon", "running without podshim (%s); podshim takes its containers up when it starts", sock)}
	}
	findings := []Finding{
		leftover("network namespaces", "umount %[1]s; rm %[1]s", func() ([]string, error) {
			return cni.List(cfg.Network.NetnsDir, netnsPrefix)
		}),
		leftover("mounts", "umount -l %s", func() ([]string, error) {
			return mountsBeneath(cfg.Run, cfg.Root)
		}),
		leftover("cgroups", "rmdir %s, when no process is in it", func() ([]string, error) {
			return cgroupsBeneath(cfg.Cgroup.Parent)
		}),
	}
	return findings
}

// leftover lists one kind of thing; remedy is a format that takes one of them.
func leftover(name, remedy string, list func() ([]string, error)) Finding {
	found, err := list()
	if err != nil {
		return warning(name, err.Error(), "whether something is left is not known", "")
	}
	if len(found) == 0 {
		return ok(name, "none left")
	}
	const shown = 3
	text := strings.Join(found[:min(shown, len(found))], ", ")
	if len(found) > shown {
		text += fmt.Sprintf(" and %d more", len(found)-shown)
	}
	return warning(name, fmt.Sprintf("%d left: %s", len(found), text), "a podshim that is gone has left them",
		"start podshim, which removes what it has records of; for what remains, "+fmt.Sprintf(remedy, found[0]))
}

// answers reports whether somebody listens on a unix socket.
func answers(ctx context.Context, socket string) bool {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// runningMonitor returns the directory of a podmon that listens beneath run
// (RUN/monitor/podmon/NAME/sock, see cmd/podmon), or "". Podmon serves any
// number of connections and does not mind one that says nothing.
func runningMonitor(ctx context.Context, run string) string {
	sockets, err := filepath.Glob(filepath.Join(run, "monitor", "podmon", "*", "sock"))
	if err != nil {
		return ""
	}
	for _, s := range sockets {
		dir := filepath.Dir(s)
		addr, held, err := wire.Address(dir)
		if err != nil {
			continue
		}
		listens := answers(ctx, addr.Name)
		held.Close()
		if listens {
			return dir
		}
	}
	return ""
}

// mountsBeneath lists mount points in the given directories, deepest first,
// which is the order to unmount them in. A directory that is a mount itself is
// the operator's.
func mountsBeneath(dirs ...string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return !slices.ContainsFunc(dirs, func(dir string) bool {
			return strings.HasPrefix(m.Mountpoint, filepath.Clean(dir)+"/")
		}), false
	})
	if err != nil {
		return nil, err
	}
	var points []string
	for _, m := range slices.Backward(mounts) {
		points = append(points, m.Mountpoint)
	}
	return points, nil
}

// cgroupsBeneath lists the cgroups below parent in every hierarchy. A slice is
// found wherever systemd keeps it.
func cgroupsBeneath(parent string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, m := range mounts {
		found, err := directoriesBelow(filepath.Join(m.Mountpoint, parent))
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, found...)
	}
	return dirs, nil
}

// directoriesBelow lists directories within dir, without dir, deepest first. A
// missing dir holds none.
func directoriesBelow(dir string) ([]string, error) {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if isGone(err) {
				return nil
			}
			return err
		}
		if d.IsDir() && path != dir {
			dirs = append(dirs, path)
		}
		return nil
	})
	slices.Reverse(dirs)
	return dirs, err
}

// isGone tells that a cgroup vanished while it was looked at (ENODEV from its
// files, ENOENT from its directory).
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}
