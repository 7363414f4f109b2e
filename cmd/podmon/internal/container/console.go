package container

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"
)

// consoleSocket is where "podmon init" sends the master of the terminal that it
// has made inside the container.
type consoleSocket struct {
	ours, theirs *os.File
}

func newConsoleSocket(process *libcontainer.Process) (*consoleSocket, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	s := &consoleSocket{
		ours:   os.NewFile(uintptr(fds[0]), "console"),
		theirs: os.NewFile(uintptr(fds[1]), "console"),
	}
	process.ConsoleSocket = s.theirs
	return s, nil
}

func (s *consoleSocket) close() {
	s.ours.Close()
	s.theirs.Close()
}

// receive returns the master, non-blocking. The process has started, so it has
// sent it already; a second is for a machine that crawls.
func (s *consoleSocket) receive() (fd int, err error) {
	oob := make([]byte, unix.CmsgSpace(4))
	var name [4096]byte
	var oobn int
	err = control(s.ours, func(fd int) error {
		limit := unix.NsecToTimeval(time.Second.Nanoseconds())
		if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
			return err
		}
		var err error
		_, oobn, _, _, err = unix.Recvmsg(fd, name[:], oob, unix.MSG_CMSG_CLOEXEC)
		return err
	})
	if err != nil {
		return -1, fmt.Errorf("receive console: %w", err)
	}
	scms, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(scms) != 1 {
		return -1, errors.New("receive console: no descriptor")
	}
	fds, err := unix.ParseUnixRights(&scms[0])
	if err != nil || len(fds) != 1 {
		return -1, errors.New("receive console: no descriptor")
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return -1, fmt.Errorf("console: %w", err)
	}
	return fds[0], nil
}

// openSlave opens podmon's own end of the terminal; see handles.
func (c *Container) openSlave() {
	const flags = unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC
	fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.handles.console), unix.TIOCGPTPEER, flags)
	if errno != 0 {
		c.log().WithError(errno).Warn("hold terminal open")
		return
	}
	c.handles.slave = int(fd)
}

// closeSlave lets the terminal end once nobody in the container has it open.
func (c *Container) closeSlave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.handles.slave >= 0 {
		unix.Close(c.handles.slave)
		c.handles.slave = -1
	}
}

// duplicate makes a file of a copy of fd.
func duplicate(fd int) (*os.File, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(dup), "console"), nil
}
