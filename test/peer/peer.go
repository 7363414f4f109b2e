// Package peer runs the container runtimes that podshim is compared with. Like a
// podshim of package private, each has all that it keeps below one place, on a
// socket of its own, with the same network and the same registry.
package peer

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/private"
)

// Daemon is a runtime that runs.
type Daemon struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

// start runs a daemon and waits until it accepts on the place's socket, at most
// 30 s.
func start(ctx context.Context, place *private.Place, cmd *exec.Cmd) (*Daemon, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	d := &Daemon{cmd: cmd, done: make(chan struct{})}
	go func() {
		d.err = cmd.Wait()
		close(d.done)
	}()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if conn, err := net.Dial("unix", place.Socket()); err == nil {
			return d, conn.Close()
		}
		select {
		case <-tick.C:
		case <-d.done:
			return nil, fmt.Errorf("%s ended before it served: %w", cmd.Path, d.err)
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("%s does not serve on %s: %w", cmd.Path, place.Socket(), ctx.Err()), d.Kill())
		}
	}
}

// PID of the daemon.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Stop ends the daemon; how it reports being terminated is its own affair.
func (d *Daemon) Stop() error { return d.end(unix.SIGTERM) }

// Kill ends the daemon at once.
func (d *Daemon) Kill() error { return d.end(unix.SIGKILL) }

func (d *Daemon) end(sig syscall.Signal) error {
	if err := d.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("end %s: %w", d.cmd.Path, err)
	}
	<-d.done
	return nil
}

// prepare makes the place's directories and its network configuration.
func prepare(place *private.Place, c private.Config) error {
	for _, dir := range []string{"run", "cni", "ipam", "tmp"} {
		if err := os.MkdirAll(place.Path(dir), 0o755); err != nil {
			return err
		}
	}
	return os.WriteFile(place.Path("cni", "10-private.conflist"), []byte(place.Conflist(c)), 0o644)
}
