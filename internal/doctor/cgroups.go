package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/systemd"
	"golang.org/x/sys/unix"
)

// killLimit is how long what is killed may take to be gone. Only processes in
// uninterruptible sleep take longer than milliseconds.
const killLimit = 10 * time.Second

// lookAtCgroups lists pods' and containers' cgroups, in every hierarchy, and the
// processes that are in them or on podshim's root filesystems.
func (d *Doctor) lookAtCgroups(ctx context.Context, m *machineView, parents []string) ([]Finding, error) {
	dirs := map[string][]string{} // by the path within a hierarchy
	for _, mount := range m.mounts {
		if mount.FSType != "cgroup" && mount.FSType != "cgroup2" {
			continue
		}
		for _, parent := range parents {
			if err := cgroupsBelow(mount.Mountpoint, d.cgroupPath(parent), dirs); err != nil {
				return nil, err
			}
		}
	}
	found, err := d.lookAtProcesses(ctx, m, dirs)
	if err != nil {
		return nil, err
	}
	for path, places := range dirs {
		found = append(found, Finding{
			Kind: Cgroup, Name: path, ID: lastID(path), mortal: isContainers(path),
			Why:    fmt.Sprintf("nothing that runs has its ID; it is in %d hierarchies, the first at %s", len(places), places[0]),
			Remedy: "kill what is in it and remove it",
			there:  func() bool { return slices.ContainsFunc(places, isDir) },
			repair: func(ctx context.Context) error { return removeCgroups(ctx, places) },
		})
	}
	return found, nil
}

// cgroupPath is where a parent is within a hierarchy: a slice's path is in its name.
func (d *Doctor) cgroupPath(parent string) string {
	if d.SystemdCgroup {
		if path, err := systemd.ExpandSlice(filepath.Base(parent)); err == nil {
			return path
		}
	}
	return filepath.Join("/", parent)
}

// cgroupsBelow adds the cgroups below root/parent that are named for an ID. A
// container's own are its business, and not looked into.
func cgroupsBelow(root, parent string, dirs map[string][]string) error {
	top := filepath.Join(root, parent)
	return filepath.WalkDir(top, func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil && isGone(err):
			return nil
		case err != nil:
			return err
		case !e.IsDir() || path == top:
			return nil
		}
		name := e.Name()
		id := anyID.FindString(name)
		if id == "" {
			return nil
		}
		within := strings.TrimPrefix(path, root)
		if places := dirs[within]; !slices.Contains(places, path) {
			dirs[within] = append(places, path)
		}
		if isContainers(name) {
			return fs.SkipDir
		}
		return nil
	})
}

// isContainers tells a container's cgroup from a pod's.
func isContainers(path string) bool {
	name := filepath.Base(path)
	return anyID.FindString(name) == name || strings.HasSuffix(name, ".scope")
}

// isGone tells that a cgroup vanished while it was looked at (ENODEV from its
// files, ENOENT from its directory).
func isGone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}

func lastID(path string) string {
	ids := anyID.FindAllString(path, -1)
	return ids[len(ids)-1]
}

// lookAtProcesses lists the processes in those cgroups, and those on podshim's
// roots. What podmon has as a child is podmon's to end: an exec that is being
// started is in no cgroup of its container yet.
func (d *Doctor) lookAtProcesses(ctx context.Context, m *machineView, dirs map[string][]string) ([]Finding, error) {
	var keys map[string]string
	if d.Images != nil {
		var err error
		if keys, err = d.Images.SnapshotDirs(ctx); err != nil {
			return nil, err
		}
	}
	podmons := map[int]bool{}
	for _, p := range m.processes {
		podmons[p.PID] = podmons[p.PID] || p.podmon
	}
	// Whoever sees the mounts of a container's processes belongs to it.
	sees := map[uint64][]string{}
	nodes, err := inode("/proc/self/ns/mnt")
	if err != nil {
		return nil, err
	}
	for _, p := range m.processes {
		if within := p.cgroupIn(dirs); within != "" && p.mounts != 0 && p.mounts != nodes[1] {
			sees[p.mounts] = append(sees[p.mounts], lastID(within))
		}
	}
	var found []Finding
	for _, p := range m.processes {
		within := p.cgroupIn(dirs)
		if podmons[p.parent] || p.podmon || within == "" && !p.ours {
			continue
		}
		if key, ok := keys[p.snapshot]; ok {
			p.rootID = ownerOf(key)
		} else if p.snapshot != "" && d.Images == nil && within == "" {
			continue // nobody can tell whose root it is
		}
		f := Finding{
			Kind: Process, Name: fmt.Sprintf("%d (%s)", p.PID, p.name),
			Remedy: "kill it", process: p,
			there:  p.Alive,
			repair: func(ctx context.Context) error { return kill(ctx, p) },
		}
		if within != "" {
			f.ID, f.others, f.mortal = lastID(within), []string{p.rootID}, isContainers(within)
			f.Why = fmt.Sprintf("it is in a cgroup of %s, and nothing that runs has that ID", f.ID)
		} else {
			f.ID, f.others = p.rootID, append(p.ids(), sees[p.mounts]...)
			f.Why = "its root filesystem is podshim's, and neither that nor its cgroup is of a container on record"
		}
		found = append(found, f)
	}
	return found, nil
}

// cgroupIn is the process's cgroup among dirs, or the one above it; "" is none.
func (p process) cgroupIn(dirs map[string][]string) string {
	for line := range strings.Lines(p.cgroup) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		for path := parts[2]; path != "/" && path != "."; path = filepath.Dir(path) {
			if _, ok := dirs[path]; ok {
				return path
			}
		}
	}
	return ""
}

// kill ends a process through a pidfd, which can be no other's.
func kill(ctx context.Context, p process) error {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pidfd of %d: %w", p.PID, err)
	}
	defer unix.Close(fd)
	if !p.Alive() {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill %d: %w", p.PID, err)
	}
	return awaitEnd(ctx, fd, p.PID)
}

func awaitEnd(ctx context.Context, pidfd, pid int) error {
	for end := time.Now().Add(killLimit); time.Now().Before(end) && ctx.Err() == nil; {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 100)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return fmt.Errorf("process %d does not end (in uninterruptible sleep?): %w", pid, context.Cause(ctx))
}

// removeCgroups kills what is in cgroups and those below them, and removes them.
// A new process can only come from one that is there, so this ends.
func removeCgroups(ctx context.Context, dirs []string) error {
	for _, dir := range dirs {
		if state := filepath.Join(dir, "freezer.state"); exists(state)() {
			// A frozen process of cgroup v1 does not die.
			if err := os.WriteFile(state, []byte("THAWED"), 0); err != nil && !isGone(err) {
				return fmt.Errorf("thaw %s: %w", dir, err)
			}
		}
	}
	for _, dir := range dirs {
		for {
			pids, err := cgroups.GetAllPids(dir)
			if err != nil && !isGone(err) {
				return fmt.Errorf("processes of %s: %w", dir, err)
			}
			if len(pids) == 0 {
				break
			}
			for _, pid := range pids {
				p, err := readProcess(pid)
				if err != nil || !slices.Contains(p.ids(), lastID(dir)) {
					continue // it has ended, or left
				}
				if err := kill(ctx, p); err != nil {
					return err
				}
			}
		}
		if err := cgroups.RemovePath(dir); err != nil {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
	return nil
}
