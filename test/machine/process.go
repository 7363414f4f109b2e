package machine

import (
	"errors"
	"fmt"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Kill ends a process and waits until it is gone, or a zombie, at most for
// limit. The process that has ended meanwhile is success.
func Kill(pid int, limit time.Duration) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pidfd of %d: %w", pid, err)
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill %d: %w", pid, err)
	}
	deadline := time.Now().Add(limit)
	for {
		left := time.Until(deadline)
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(max(0, left.Milliseconds())))
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return fmt.Errorf("await end of %d: %w", pid, err)
		case n == 0:
			return fmt.Errorf("process %d is still there %s after SIGKILL", pid, limit)
		default:
			return nil
		}
	}
}

// Reap collects all children of this process that have ended, orphans that it
// has adopted among them. Not to be called while an exec.Cmd is waited for.
func Reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
	}
}

// Descendants are the pids of all processes that come from parent.
func Descendants(parent int) ([]int, error) {
	things, err := Scope{Parent: parent}.processes()
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, t := range things {
		var pid int
		if _, err := fmt.Sscan(t.Name, &pid); err != nil {
			return nil, fmt.Errorf("process %q: %w", t.Name, err)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// Sweep kills every descendant of this process and collects what it adopted:
// for the end of a run that went wrong. At most 20 s.
//
// All are killed before any is waited for: the first process of a PID
// namespace is gone only when everything in it has been collected.
func Sweep() error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		Reap()
		pids, err := Descendants(unix.Getpid())
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("processes %v are still there 20 s after SIGKILL", pids)
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill %d: %w", pid, err)
			}
		}
	}
}

// Adopt makes this process the parent of whatever its descendants orphan, so
// that nothing they started can slip away.
func Adopt() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	return nil
}
