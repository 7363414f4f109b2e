package enclosure

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// Reap runs this program again as a child and is an init to it: it hands on
// SIGINT and SIGTERM, and collects whatever ends, until the child does. It returns
// the child's exit code. For the first process of a PID namespace.
func Reap() (int, error) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	child, err := syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2},
	})
	if err != nil {
		return 1, fmt.Errorf("run %s again: %w", os.Args[0], err)
	}
	go func() {
		for sig := range signals {
			_ = unix.Kill(child, sig.(syscall.Signal)) // gone already: nothing to stop
		}
	}()
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 1, fmt.Errorf("wait: %w", err)
		case pid != child:
		case status.Exited():
			return status.ExitStatus(), nil
		default:
			return 128 + int(status.Signal()), nil
		}
	}
}
