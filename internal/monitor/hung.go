package monitor

import (
	"context"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// killHung ends a podmon that accepts connections and answers none. Who listens
// on the socket is known from the kernel alone.
func killHung(dir string) error {
	addr, d, err := wire.Address(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	c, err := net.DialUnix("unix", nil, addr)
	if errors.Is(err, unix.ECONNREFUSED) {
		return nil // dead already
	}
	if err != nil {
		return err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil {
		return cerr
	}
	if err != nil {
		return fmt.Errorf("peer of hung podmon: %w", err)
	}
	fd, err := unix.PidfdOpen(int(cred.Pid), 0)
	if err == unix.ESRCH {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd of hung podmon: %w", err)
	}
	l := &link{pidfd: fd}
	defer unix.Close(fd)
	return l.kill(context.Background())
}
