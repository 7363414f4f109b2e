package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"time"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// killAll kills every process in the cgroup and returns when none is left.
//
// cgroup v2 does it in the kernel (cgroup.kill, Linux 5.14). Elsewhere a process
// that forks faster than it is killed would escape a list of PIDs, so from the
// second round on the cgroup is frozen while the list is worked through.
func killAll(ctx context.Context, cg cgroups.Manager) error {
	for round := 0; ; round++ {
		pids, err := processes(cg)
		if err != nil {
			return fmt.Errorf("processes of cgroup: %w", err)
		}
		if len(pids) == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("kill %d processes of cgroup: %w", len(pids), err)
		}
		if err := killRound(cg, pids, round > 0); err != nil {
			return err
		}
		awaitDeath(ctx, pids)
	}
}

func killRound(cg cgroups.Manager, pids []int, freeze bool) error {
	if cgroups.IsCgroup2UnifiedMode() {
		err := cgroups.WriteFile(cg.Path(""), "cgroup.kill", "1")
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if freeze {
		// Best effort: a process in uninterruptible sleep does not freeze, and
		// is killed when it wakes.
		_ = cg.Freeze(cgroups.Frozen)
		pids, _ = processes(cg)
	}
	if err := signalEach(cg, pids, unix.SIGKILL); err != nil {
		return err
	}
	if freeze {
		_ = cg.Freeze(cgroups.Thawed) // thaw tells
	}
	return thaw(cg)
}

// thaw lets killed processes die: on cgroup v1 a frozen one does not. Others may
// have frozen them, in cgroups of their own below the container's.
func thaw(cg cgroups.Manager) error {
	if cgroups.IsCgroup2UnifiedMode() {
		return nil
	}
	root := cg.Path("freezer")
	if root == "" {
		return nil
	}
	err := filepath.WalkDir(root, func(dir string, e fs.DirEntry, err error) error {
		if err == nil && e.IsDir() {
			err = cgroups.WriteFile(dir, "freezer.state", string(cgroups.Thawed))
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			return nil // gone
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("thaw: %w", err)
	}
	return nil
}

// signalEach signals those of the processes that are in the cgroup, and no other
// one that has got the PID of one that was: what a pidfd stands for cannot change,
// so the cgroup is looked at again when all of them are open.
func signalEach(cg cgroups.Manager, pids []int, sig unix.Signal) error {
	for some := range slices.Chunk(pids, 256) {
		if err := signalSome(cg, some, sig); err != nil {
			return err
		}
	}
	return nil
}

func signalSome(cg cgroups.Manager, pids []int, sig unix.Signal) error {
	pidfds := map[int]int{}
	defer func() {
		for _, fd := range pidfds {
			unix.Close(fd)
		}
	}()
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if err == unix.ESRCH {
			continue
		}
		if err != nil {
			return fmt.Errorf("pidfd of %d: %w", pid, err)
		}
		pidfds[pid] = fd
	}
	now, err := processes(cg)
	if err != nil {
		return fmt.Errorf("processes of cgroup: %w", err)
	}
	for _, pid := range now {
		fd, ok := pidfds[pid]
		if !ok {
			continue
		}
		if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil && err != unix.ESRCH {
			return fmt.Errorf("signal %d to %d: %w", sig, pid, err)
		}
	}
	return nil
}

// awaitDeath waits for the processes to end, for a second at most: another
// round then looks again.
func awaitDeath(ctx context.Context, pids []int) {
	deadline := time.Now().Add(time.Second)
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
		if err != nil {
			continue // gone
		}
		left := time.Until(deadline).Milliseconds()
		if left > 0 && ctx.Err() == nil {
			_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left))
		}
		unix.Close(fd)
	}
}

// processes lists the cgroup and those below; a cgroup that is gone is empty.
func processes(cg cgroups.Manager) ([]int, error) {
	pids, err := cg.GetAllPids()
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return nil, nil
	}
	return pids, err
}
