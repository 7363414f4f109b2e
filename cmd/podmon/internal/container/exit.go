package container

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// openPidfd opens a pidfd that Go's poller can wait on, so that waiting costs
// no thread. ESRCH when the process is gone, not when that cannot be told.
func openPidfd(p wire.Process) (*os.File, error) {
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("pidfd of %d: %w", p.PID, err)
	}
	// Only now is the PID ours to compare: it cannot be reused while we look.
	now, err := wire.Identify(p.PID)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || err == nil && now != p {
		err = unix.ESRCH
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("pidfd of %d: %w", p.PID, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// awaitPidfd returns when the process has ended, with the time of that.
func awaitPidfd(pidfd *os.File) (time.Time, error) {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return time.Time{}, err
	}
	err = raw.Read(func(fd uintptr) bool { return ended(int(fd)) })
	return time.Now(), err
}

// ended tells whether a pidfd's process is dead (a zombie, or reaped).
func ended(fd int) bool {
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		if err != unix.EINTR {
			return n > 0 || err != nil
		}
	}
}

// control runs f on the file's descriptor without changing its blocking mode.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	cerr := raw.Control(func(fd uintptr) { err = f(int(fd)) })
	return errors.Join(cerr, err)
}

// foreignStatus returns the wait status of a process that has ended and is
// another's child. Linux 6.15 keeps it with every pidfd that was open when the
// parent reaped it; a zombie shows it in /proc/PID/stat.
func (c *Container) foreignStatus() (syscall.WaitStatus, bool) {
	for range 2 { // it may be reaped between the two looks
		if c.pidfd != nil {
			if status, ok := pidfdStatus(c.pidfd); ok {
				return status, true
			}
		}
		if status, ok := c.rec.Process.ZombieStatus(); ok {
			return syscall.WaitStatus(status), true
		}
	}
	return 0, false
}

func pidfdStatus(pidfd *os.File) (syscall.WaitStatus, bool) {
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	err := control(pidfd, func(fd int) error { return unix.IoctlPidfdInfo(fd, &info) })
	if err != nil || info.Mask&unix.PIDFD_INFO_EXIT == 0 {
		return 0, false
	}
	return syscall.WaitStatus(info.Exit_code), true
}

// KeepsExitInfo tells whether this kernel gives exit codes to non-parents. It
// goes by the version: a living process does not show whether the flag is known.
func KeepsExitInfo() bool {
	var uts unix.Utsname
	if unix.Uname(&uts) != nil {
		return false
	}
	var major, minor int
	if _, err := fmt.Sscanf(unix.ByteSliceToString(uts.Release[:]), "%d.%d", &major, &minor); err != nil {
		return false
	}
	return major > 6 || (major == 6 && minor >= 15)
}

// exitOf turns a wait status into an Exit.
func exitOf(status syscall.WaitStatus, known bool, at time.Time) wire.Exit {
	e := wire.Exit{Known: known, At: at}
	switch {
	case !known:
	case status.Signaled():
		e.Code = 128 + int32(status.Signal())
	default:
		e.Code = int32(status.ExitStatus())
	}
	return e
}
