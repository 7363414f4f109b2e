package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// Exec is a process started in a running container.
type Exec struct {
	Process wire.Process
	// Console is the master of its terminal, for the daemon; nil without one.
	Console *os.File

	process initProcess
	pidfd   *os.File
	done    chan struct{}
	exit    wire.Exit // once done is closed
}

// Exec runs a process in the container's namespaces and cgroup, with the given
// stdio; nil is /dev/null. It waits for PID 1's own program.
func (c *Container) Exec(ctx context.Context, r wire.ExecRequest) (_ *Exec, err error) {
	if c.hasExited() {
		return nil, wire.Errorf(wire.ClassPrecondition, "exec: container %s has exited", c.ID)
	}
	if err := c.awaitProgram(ctx); err != nil {
		return nil, fmt.Errorf("exec: %w", err)
	}
	lp, err := newProcess(r.Process)
	if err != nil {
		return nil, err
	}
	var socket *consoleSocket
	if r.Process.Terminal {
		if socket, err = newConsoleSocket(lp); err != nil {
			return nil, err
		}
		defer socket.close()
	} else {
		giveStdio(lp, r)
	}
	end := c.m.reaper.begin()
	defer end()
	process, err := c.runExec(ctx, lp, r)
	if err != nil {
		return nil, err
	}
	c.m.execs.Add(1)
	e := &Exec{process: process, done: make(chan struct{})}
	defer func() {
		if err != nil {
			_ = process.Signal(unix.SIGKILL)
			_, _ = process.Wait()
			c.m.execs.Add(-1)
		}
	}()
	pid, err := process.Pid()
	if err != nil {
		return nil, err
	}
	if e.Process, err = wire.Identify(pid); err != nil {
		return nil, err
	}
	if e.pidfd, err = openPidfd(e.Process); err != nil {
		return nil, err
	}
	if socket != nil {
		fd, err := socket.receive()
		if err != nil {
			e.pidfd.Close()
			return nil, err
		}
		e.Console = os.NewFile(uintptr(fd), "console")
	}
	c.m.reaper.own(pid)
	go e.watch(c.m)
	return e, nil
}

// runExec starts the process: by itself what is plain, else by libcontainer.
func (c *Container) runExec(ctx context.Context, lp *libcontainer.Process, r wire.ExecRequest) (initProcess, error) {
	c.life.RLock()
	defer c.life.RUnlock()
	if c.lc == nil || c.ended() {
		return nil, wire.Errorf(wire.ClassPrecondition, "exec: container %s has exited", c.ID)
	}
	var process initProcess = lp
	var err error
	config := c.lc.Config()
	if plain := c.plainExec(&config, lp, r); plain != nil {
		process, err = c.startPlain(ctx, plain)
	} else {
		err = c.startExec(lp)
	}
	if err != nil {
		err, known := classify("exec", err)
		if !known {
			c.m.reaper.look()
		}
		// The kernel kills the new process before PID 1 has ended, as podmon may.
		if c.killed.Load() || c.rec.Process.Ending() {
			return nil, wire.Errorf(wire.ClassPrecondition, "exec: container %s has exited: %w", c.ID, err)
		}
		return nil, err
	}
	return process, c.confined(process)
}

// ended tells whether PID 1 is dead, reaped or not.
func (c *Container) ended() bool {
	gone := true
	_ = control(c.pidfd, func(fd int) error { gone = ended(fd); return nil }) // closed: gone
	return gone
}

// confined makes sure that a process was not started on the host, and kills it
// otherwise. Every container has a mount namespace of its own.
func (c *Container) confined(process initProcess) error {
	pid, err := process.Pid()
	if err != nil {
		return err
	}
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return nil // it has ended
	}
	if ours != theirs {
		return nil
	}
	_ = process.Signal(unix.SIGKILL)
	_, _ = process.Wait()
	return fmt.Errorf("exec: process of container %s was not confined, and has been killed", c.ID)
}

// giveStdio hands the request's files to the process.
func giveStdio(process *libcontainer.Process, r wire.ExecRequest) {
	// Typed nils would not be nil to libcontainer.
	if r.Stdin != nil {
		process.Stdin = r.Stdin
	}
	if r.Stdout != nil {
		process.Stdout = r.Stdout
	}
	if r.Stderr != nil {
		process.Stderr = r.Stderr
	}
}

func (e *Exec) watch(m *Manager) {
	at, _ := awaitPidfd(e.pidfd)
	var status syscall.WaitStatus
	state, _ := e.process.Wait() // its error is a non-zero exit
	m.reaper.disown(e.Process.PID)
	known := false
	if state != nil {
		status, known = state.Sys().(syscall.WaitStatus)
	}
	e.exit = exitOf(status, known, at)
	m.execs.Add(-1)
	close(e.done)
	e.pidfd.Close() // after done: Kill tells by it why the pidfd is closed
}

// Done is closed when the process has ended.
func (e *Exec) Done() <-chan struct{} { return e.done }

// Exit returns how it ended, after Done.
func (e *Exec) Exit() wire.Exit { return e.exit }

// Kill sends a signal; the gone is success.
func (e *Exec) Kill(sig syscall.Signal) error {
	err := control(e.pidfd, func(fd int) error { return unix.PidfdSendSignal(fd, sig, nil, 0) })
	select {
	case <-e.done:
		return nil
	default:
	}
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}
