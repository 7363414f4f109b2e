package monitor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// Exec is a process started in a running container. It is killed when the
// connection to podmon ends, and its exit is then not known: Wait returns
// Unavailable.
type Exec struct {
	PID int
	// Console is the pseudo terminal's master; nil without a terminal. The caller closes it.
	Console *os.File

	l  *link
	id uint64
}

// Exec starts a process in a running container. FailedPrecondition when the
// container has exited; ErrNoExecutable and ErrNotExecutable tell what a shell
// would say with 127 and 126. When ctx ends first, the process is killed as soon
// as it is there.
func (m *Monitor) Exec(ctx context.Context, r ExecRequest) (*Exec, error) {
	if err := m.known(r.ContainerID); err != nil {
		return nil, err
	}
	l, err := m.route(ctx, r.ContainerID)
	if err != nil {
		return nil, err
	}
	type result struct {
		x   *Exec
		err error
	}
	done := make(chan result, 1)
	if !m.spawn(func() { // ends with the answer, or the link
		x, err := startExec(context.WithoutCancel(ctx), l, r)
		done <- result{x, err}
	}) {
		return nil, errLost
	}
	select {
	case got := <-done:
		return got.x, got.err
	case <-ctx.Done():
		m.spawn(func() { // when closed, the link ends, and the exec with it
			if got := <-done; got.err == nil {
				got.x.discard()
			}
		})
		return nil, ctx.Err()
	}
}

func startExec(ctx context.Context, l *link, r ExecRequest) (*Exec, error) {
	answer, err := l.call(ctx, wire.OpExec, r, func(msg *wire.Message) error {
		return errors.Join(msg.Attach(wire.FileStdin, r.Stdin),
			msg.Attach(wire.FileStdout, r.Stdout), msg.Attach(wire.FileStderr, r.Stderr))
	})
	if err != nil {
		return nil, err
	}
	defer answer.Close()
	var started wire.ExecStarted
	if err := wire.Decode(answer.Body, &started); err != nil {
		return nil, err
	}
	return &Exec{
		PID: started.Process.PID, Console: answer.File(wire.FileConsole), l: l, id: started.Exec,
	}, nil
}

// discard ends a process that nobody waits for any more.
func (e *Exec) discard() {
	if e.Console != nil {
		e.Console.Close()
	}
	if e.Kill(syscall.SIGKILL) == nil {
		_, _ = e.Wait(context.Background()) // podmon forgets it then
	}
}

// Wait returns how the process ended. After a Wait that returned an exit the
// Exec is used up.
func (e *Exec) Wait(ctx context.Context) (Exit, error) {
	var exit Exit
	if err := e.l.request(ctx, wire.OpExecWait, wire.ExecRef{Exec: e.id}, &exit); err != nil {
		return Exit{}, fmt.Errorf("wait for exec: %w", err)
	}
	return exit, nil
}

// Kill sends sig to the process; the gone is success.
func (e *Exec) Kill(sig syscall.Signal) error {
	ctx, cancel := context.WithTimeout(context.Background(), readyLimit)
	defer cancel()
	err := e.l.request(ctx, wire.OpExecKill, wire.ExecRef{Exec: e.id, Signal: int(sig)}, nil)
	if errors.Is(err, classes[wire.ClassNotFound]) || errors.Is(err, errLost) {
		return nil // an exec does not outlive its connection
	}
	return err
}
