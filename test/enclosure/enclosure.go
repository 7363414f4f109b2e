// Package enclosure runs a program again in namespaces of its own, so that what it
// does to networks, mounts and processes is gone with it, however it ends.
//
//	if !enclosure.Inside() {
//		os.Exit(enclosure.Enter(0))
//	}
//	err := enclosure.Settle()
package enclosure

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/machine"
)

// inside marks the process that is in the namespaces.
const inside = "PODSHIM_ENCLOSED"

// Inside tells whether this process is the one in the namespaces.
func Inside() bool { return os.Getenv(inside) != "" }

// Enter runs this program again, with the same arguments, in network, mount and
// IPC namespaces of its own, and in those that the flags (CLONE_NEWPID) add. It
// returns its exit code. The inner process gets SIGINT and SIGTERM from here, and
// is killed when this one dies. With a PID namespace everything that it started
// is dead when Enter returns.
func Enter(flags uintptr, env ...string) int {
	code, err := enter(flags, env)
	if err != nil {
		fmt.Fprintln(os.Stderr, "enter namespaces (root is needed):", err)
	}
	return code
}

func enter(flags uintptr, env []string) (int, error) {
	self, err := os.Executable()
	if err != nil {
		return 1, err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(append(os.Environ(), inside+"=1"), env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | flags,
		Setpgid:    true,
	}
	return run(cmd)
}

// run starts the command, hands it the signals that ask to end, and returns its
// exit code.
func run(cmd *exec.Cmd) (int, error) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	done := make(chan struct{})
	go func() {
		for {
			select {
			case sig := <-signals:
				_ = cmd.Process.Signal(sig) // gone already: nothing to stop
			case <-done:
				return
			}
		}
	}()
	err := cmd.Wait()
	close(done)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		return exit.ExitCode(), nil
	default:
		return 1, err
	}
}

// Settle makes the new namespaces look like a host's: loopback up, mounts
// shared (mount propagation needs it) but not with the real host, and this
// process the parent of everything that gets orphaned.
func Settle() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("detach mounts from the host: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share mounts: %w", err)
	}
	// /sys shows the network namespace of whoever mounted it; the cgroup mounts
	// below it must stay, so it is left as it is and only loopback is set up.
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return machine.Adopt()
}
