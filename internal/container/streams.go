package container

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/streaming"
)

// drainLimit is how long the output of what an exec has left running is passed
// on after the command's own end.
const drainLimit = time.Second

// Exec runs a command in a running container with a client's streams. Its exit
// code, when it is not 0, comes as a streaming.ExitError.
func (m *Manager) Exec(ctx context.Context, id string, cmd []string, s streaming.Streams) error {
	r, err := m.running(id)
	if err != nil {
		return err
	}
	process, err := m.execProcess(r.ID, cmd, s.TTY)
	if err != nil {
		return err
	}
	b := streaming.NewBridge(s)
	defer b.Close()
	req := monitor.ExecRequest{ContainerID: r.ID, Process: process}
	if !s.TTY {
		if req.Stdin, req.Stdout, req.Stderr, err = b.Pipes(); err != nil {
			return err
		}
	}
	e, err := m.Monitor.Exec(ctx, req)
	if err != nil {
		return fmt.Errorf("exec in container %s: %w", r.ID, err)
	}
	if s.TTY {
		console, err := pollable(e.Console)
		if err != nil {
			return errors.Join(err, e.Kill(unix.SIGKILL))
		}
		b.Terminal(console)
	}
	b.Started()
	exit, err := m.await(ctx, e)
	b.Drain(drainLimit)
	if err != nil {
		return fmt.Errorf("exec in container %s: %w", r.ID, err)
	}
	return streaming.ExitError(exit.Code)
}

// Attach joins a client's streams with those of a container's PID 1, until the
// container ends or the client leaves. While podmon is replaced it waits and
// goes on. The container never waits for the client.
func (m *Manager) Attach(ctx context.Context, id string, s streaming.Streams) error {
	r, err := m.running(id)
	if err != nil {
		return err
	}
	if s.TTY != r.Config.GetTty() {
		return fmt.Errorf("tty: container %s has tty %t: %w", r.ID, r.Config.GetTty(), errdefs.ErrInvalidArgument)
	}
	b := streaming.NewBridge(s)
	defer b.Close()
	if s.Stdin != nil && r.Config.GetStdin() && r.Config.GetStdinOnce() {
		// However the first client leaves (CRI ContainerConfig.stdin_once). After
		// the Bridge has closed its duplicate, or the end would not be seen.
		defer func() {
			b.Close()
			m.closeStdin(ctx, r)
		}()
	}
	stdout, stderr, err := b.Outputs()
	if err != nil {
		return err
	}
	// Not before the output is attached: the answer to the first line of input could
	// be over by then.
	input := func() error { return m.attachInput(ctx, r, b, s) }
	err = m.attachOutput(ctx, r.ID, stdout, stderr, input)
	b.Drain(drainLimit)
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("attach to container %s: %w", r.ID, err)
	}
	return nil
}

// reattachPause keeps a monitor that is not available from being asked without
// end; what the container writes meanwhile is in its log, as ever.
const reattachPause = 100 * time.Millisecond

// attachOutput has a container's output copied until the container ends, or ctx.
// It calls attached once, as soon as nothing of the output is missed any more; an
// error of that ends it.
func (m *Manager) attachOutput(ctx context.Context, id string, stdout, stderr *os.File, attached func() error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var first sync.Once
	request := monitor.AttachRequest{ContainerID: id, Stdout: stdout, Stderr: stderr, Attached: func() {
		first.Do(func() {
			if err := attached(); err != nil {
				cancel(err)
			}
		})
	}}
	for {
		began := time.Now()
		err := m.Monitor.Attach(ctx, request)
		if cause := context.Cause(ctx); cause != nil && cause != ctx.Err() {
			return cause
		}
		if !errdefs.IsUnavailable(err) || ctx.Err() != nil {
			return err
		}
		if _, gone := m.running(id); gone != nil {
			return nil
		}
		select {
		case <-time.After(reattachPause - time.Since(began)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// attachInput gives a client the container's standard input, or its terminal.
func (m *Manager) attachInput(ctx context.Context, r *Record, b *streaming.Bridge, s streaming.Streams) error {
	if s.TTY {
		console, err := m.Monitor.Console(r.ID)
		if err != nil {
			return err
		}
		if console, err = pollable(console); err != nil {
			return err
		}
		b.Input(console, func() {})
		b.Resize(console)
		return nil
	}
	if s.Stdin == nil {
		return nil
	}
	if !r.Config.GetStdin() {
		return s.Stdin.Close() // discards it: unread, it would hold up the connection
	}
	stdin, err := m.Monitor.Stdin(r.ID)
	if errdefs.IsFailedPrecondition(err) {
		return s.Stdin.Close() // the first client has had it
	}
	if err != nil {
		return err
	}
	if stdin, err = pollable(stdin); err != nil {
		return err
	}
	b.Input(stdin, func() {
		if r.Config.GetStdinOnce() {
			stdin.Close()
			m.closeStdin(ctx, r)
		}
	})
	return nil
}

// closeStdin ends a container's standard input for good.
func (m *Manager) closeStdin(ctx context.Context, r *Record) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
	defer cancel()
	if err := m.Monitor.CloseStdin(ctx, r.ID); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
		m.log(r).WithError(err).Warn("close standard input after the first attached client")
	}
}

// PortForward joins a connection with a port on the pod's localhost.
func (m *Manager) PortForward(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error {
	s, err := m.Sandboxes.Get(sandboxID)
	if err != nil {
		return err
	}
	r := s.Get()
	if r.State != sandbox.Ready {
		return fmt.Errorf("pod sandbox %s is not ready (%s): %w", r.ID, r.Reason, errdefs.ErrFailedPrecondition)
	}
	conn, err := cni.Dial(ctx, r.Netns, "tcp", int(port))
	if err != nil {
		return fmt.Errorf("forward to port %d of pod sandbox %s: %w", port, r.ID, err)
	}
	return streaming.Forward(ctx, stream, conn)
}

// pollable makes a descriptor one that a Close wakes the readers of. What the
// runtime makes of a descriptor depends on its mode when the file is made.
func pollable(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	name := f.Name()
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", name, err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("make %s non-blocking: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
