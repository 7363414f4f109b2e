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
// the code, because a child of its has. kills is its cgroup's oom_kill counter; it is
// not counted where systemd has removed the cgroup already, with its last process.
//
// The counter does not tell whom the kernel has killed: an earlier one may have been a
// child, and PID 1's SIGKILL somebody else's. The kernel's log does. Where it cannot be
// read the counter has to do.
func (c *Container) killedByOOM(status syscall.WaitStatus, kills uint64, counted bool) bool {
	pid := func(text []byte) bool { return isVictim(text, c.rec.Process.PID) }
	inCgroup := func(text []byte) bool { return isVictimOf(text, c.ID) }
	var victim func(text []byte) bool
	switch {
	case c.killed.Load() || counted && kills == 0:
		return false
	case status.Signaled() && status.Signal() == unix.SIGKILL:
		victim = pid
	case status.Exited() && status.ExitStatus() == 128+int(unix.SIGKILL):
		if counted {
			return true
		}
		victim = inCgroup
	default:
		return false
	}
	found, err := kernelLogs(victim)
	if err != nil {
		c.log().WithError(err).Info("the OOM killer's victim is told by oom_kill alone")
		return counted
	}
	return found
}

// initialPIDNamespace is the kernel's PROC_PID_INIT_INO: the kernel logs PIDs of it.
const initialPIDNamespace = "pid:[4026531836]"

// kernelLogs tells whether the kernel has logged a line that match is true of. Whom its
// OOM killer has killed it has logged by the time that the process can be waited for:
// __oom_kill_process holds the victim's task lock, which exit_mm needs, until then.
func kernelLogs(match func(text []byte) bool) (bool, error) {
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
		case match(kernelText(record[:n])):
			return true, nil
		}
	}
}

// kernelText is what a record of /dev/kmsg, "priority,number,time,flags;text", says if it
// is the kernel's own; nil for what a process has written there.
func kernelText(record []byte) []byte {
	head, text, _ := bytes.Cut(record, []byte(";"))
	priority, _, _ := bytes.Cut(head, []byte(","))
	const severities = 8 // the rest is the facility, 0 for what no process has written
	if n, err := strconv.Atoi(string(priority)); err != nil || n >= severities {
		return nil
	}
	return text
}

// isVictim tells whether a line says that the OOM killer killed the process.
func isVictim(text []byte, pid int) bool {
	return bytes.Contains(text, []byte("Killed process "+strconv.Itoa(pid)+" ("))
}

// isVictimOf tells whether a line says that it killed one in the cgroup of the container
// (Linux 4.19 and later: mm/oom_kill.c, dump_oom_summary). A task's name, which is its
// own choice, comes after the cgroup.
func isVictimOf(text []byte, id string) bool {
	before, _, found := bytes.Cut(text, []byte(",task="))
	_, cgroup, within := bytes.Cut(before, []byte(",task_memcg="))
	return found && within && bytes.HasPrefix(text, []byte("oom-kill:")) && bytes.Contains(cgroup, []byte(id))
}
