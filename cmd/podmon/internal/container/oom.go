package container

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// killedByOOM tells whether PID 1 has ended by the kernel's OOM killer, or, passing on
// the code, because a child of its has. kills is its cgroup's oom_kill counter.
//
// The counter does not tell whom the kernel has killed: an earlier one may have been a
// child, and PID 1's SIGKILL somebody else's. The kernel's log does. Where it cannot be
// read the counter has to do.
func (c *Container) killedByOOM(status syscall.WaitStatus, kills uint64) bool {
	switch {
	case kills == 0 || c.killed.Load():
		return false
	case !status.Signaled():
		return status.ExitStatus() == 128+int(unix.SIGKILL)
	case status.Signal() != unix.SIGKILL:
		return false
	}
	victim, err := oomVictim(c.rec.Process.PID)
	if err != nil {
		c.log().WithError(err).Info("the OOM killer's victim is told by oom_kill alone")
		return true
	}
	return victim
}

// initialPIDNamespace is the kernel's PROC_PID_INIT_INO: the kernel logs PIDs of it.
const initialPIDNamespace = "pid:[4026531836]"

// oomVictim tells whether the kernel has logged that its OOM killer killed the process.
// It has by the time the process can be waited for: __oom_kill_process holds the
// victim's task lock, which exit_mm needs, until it has logged.
func oomVictim(pid int) (bool, error) {
	if ns, err := os.Readlink("/proc/self/ns/pid"); err != nil || ns != initialPIDNamespace {
		return false, fmt.Errorf("read the kernel's log: its PIDs are not those of PID namespace %s: %w", ns, errors.Join(err, unix.ENOTSUP))
	}
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, fmt.Errorf("read the kernel's log: %w", err)
	}
	defer unix.Close(fd)
	record := make([]byte, 16<<10) // a read gets one, of 8 KiB and less
	for {
		n, err := unix.Read(fd, record)
		switch {
		case err == unix.EAGAIN:
			return false, nil // that was all
		case err == unix.EPIPE || err == unix.EINTR:
			continue // overwritten before it was read
		case err != nil:
			return false, fmt.Errorf("read the kernel's log: %w", err)
		case tellsVictim(record[:n], pid):
			return true, nil
		}
	}
}

// tellsVictim tells whether a record of /dev/kmsg, "priority,number,time,flags;text", is
// the kernel's own and says that the OOM killer killed the process.
func tellsVictim(record []byte, pid int) bool {
	head, text, _ := bytes.Cut(record, []byte(";"))
	priority, _, _ := bytes.Cut(head, []byte(","))
	n, err := strconv.Atoi(string(priority))
	const severities = 8 // the rest is the facility, 0 for what no process has written
	return err == nil && n < severities && bytes.Contains(text, []byte("Killed process "+strconv.Itoa(pid)+" ("))
}
