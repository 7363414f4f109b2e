package monitor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	csystemd "github.com/opencontainers/cgroups/systemd"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// EndLost ends a container that no podmon knows any more, as after somebody emptied the
// run directory: its first process, if that runs still, and what else is in its cgroup,
// which is removed. path is the OCI cgroupsPath, and bears the container's ID. The gone
// is success. A record may be of an earlier boot, in which another process had the same
// PID and start time: only what is in the cgroup is ended.
func EndLost(ctx context.Context, p Process, path string, systemd bool) error {
	if path == "" {
		return nil // it was never made
	}
	if p.PID != 0 && p.Alive() && inCgroup(p.PID, path) {
		if err := killAndWait(ctx, p); err != nil {
			return fmt.Errorf("end lost process %d: %w", p.PID, err)
		}
	}
	cg := &cgroups.Cgroup{Path: path, Resources: &cgroups.Resources{}}
	if parts := strings.Split(path, ":"); systemd && len(parts) == 3 {
		cg = &cgroups.Cgroup{Parent: parts[0], ScopePrefix: parts[1], Name: parts[2], Systemd: true, Resources: &cgroups.Resources{}}
	}
	if systemd && !csystemd.IsRunningSystemd() {
		return nil // nobody has made it
	}
	cm, err := manager.New(cg)
	if err != nil {
		return fmt.Errorf("cgroup %s: %w", path, err)
	}
	for cm.Exists() {
		pids, err := cm.GetAllPids()
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
			break // it has been removed meanwhile
		}
		if err != nil {
			return fmt.Errorf("processes in cgroup %s: %w", path, err)
		}
		if len(pids) == 0 {
			break
		}
		for _, pid := range pids {
			other, err := wire.Identify(pid)
			if err != nil || !inCgroup(pid, path) { // gone, perhaps with another one of its PID
				continue
			}
			if err := killAndWait(ctx, other); err != nil {
				return fmt.Errorf("end process %d in cgroup %s: %w", pid, path, err)
			}
		}
	}
	if !cm.Exists() {
		return nil
	}
	if err := cm.Destroy(); err != nil {
		return fmt.Errorf("cgroup %s: %w", path, err)
	}
	return nil
}

// inCgroup tells whether a process is in the cgroup that a cgroupsPath names, or below
// it: the path's last part is an ID, which no other cgroup's path has.
func inCgroup(pid int, path string) bool {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	id := path[strings.LastIndexAny(path, ":/")+1:]
	return err == nil && id != "" && bytes.Contains(raw, []byte(id))
}

// killAndWait kills a process and returns when it has ended; the gone is success.
func killAndWait(ctx context.Context, p Process) error {
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if !p.Alive() { // the descriptor may be of another process that got its PID
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	for ctx.Err() == nil {
		// Readable when it has ended (pidfd_open(2)); ctx is looked at in between.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return context.Cause(ctx)
}
