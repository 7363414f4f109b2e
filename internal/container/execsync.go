package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/spec"
)

// Output is what a command has written and how it has ended.
type Output struct {
	Stdout, Stderr []byte
	ExitCode       int32
}

// ExecSync runs a command in a running container and collects its output.
//
// The command's own end is what counts: a process that it has left in the
// background with its output open is not waited for. A timeout of 0 is none;
// one that is over kills the command and is context.DeadlineExceeded, as kubelet
// expects of a probe. Output beyond the limit is thrown away and the command goes
// on, as the CRI has it (ExecSyncResponse.stdout).
func (m *Manager) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (*Output, error) {
	r, err := m.running(id)
	if err != nil {
		return nil, err
	}
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, timeout, fmt.Errorf("command did not end within %s: %w", timeout, context.DeadlineExceeded))
		defer cancel()
	}
	c := &collector{limit: int64(m.ExecSyncLimit)}
	stdout, err := c.stream()
	if err != nil {
		return nil, err
	}
	defer stdout.close()
	stderr, err := c.stream()
	if err != nil {
		return nil, err
	}
	defer stderr.close()

	process, err := m.execProcess(r.ID, cmd, false)
	if err != nil {
		return nil, err
	}
	e, err := m.Monitor.Exec(ctx, monitor.ExecRequest{
		ContainerID: r.ID, Process: process, Stdout: stdout.write, Stderr: stderr.write,
	})
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", r.ID, err)
	}
	stdout.start()
	stderr.start()
	exit, err := m.await(ctx, e)
	stdout.finish()
	stderr.finish()
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", r.ID, err)
	}
	return &Output{bytes.Join(stdout.parts, nil), bytes.Join(stderr.parts, nil), exit.Code}, nil
}

// await waits for an exec's end; when ctx ends first it kills the process, and
// returns the context's cause once it is gone.
func (m *Manager) await(ctx context.Context, e *monitor.Exec) (monitor.Exit, error) {
	exit, err := e.Wait(ctx)
	if err == nil && !exit.Known {
		err = fmt.Errorf("exit code is not known: podmon was replaced meanwhile: %w", errdefs.ErrUnavailable)
	}
	if ctx.Err() == nil || err == nil {
		return exit, err
	}
	cause := context.Cause(ctx)
	if err := e.Kill(syscall.SIGKILL); err != nil && !errdefs.IsNotFound(err) {
		return exit, errors.Join(cause, fmt.Errorf("kill it: %w", err))
	}
	gone, cancel := context.WithTimeout(context.WithoutCancel(ctx), killLimit)
	defer cancel()
	if _, err := e.Wait(gone); err != nil {
		return exit, errors.Join(cause, fmt.Errorf("await its end: %w", err))
	}
	return exit, cause
}

// running returns the record of a container that runs.
func (m *Manager) running(id string) (*Record, error) {
	c, err := m.Get(id)
	if err != nil {
		return nil, err
	}
	r := c.Get()
	if r.State != Running {
		return nil, fmt.Errorf("container %s is %s, not running: %w", r.ID, r.State, errdefs.ErrFailedPrecondition)
	}
	return r, nil
}

// collector gathers the output of one command, up to a limit for all streams.
type collector struct {
	limit int64
	taken atomic.Int64
}

// stream is one output of a command.
type stream struct {
	c           *collector
	read, write *os.File
	parts       [][]byte // full but the last: one buffer would be copied, and let go, each time that it grows
	reader      sync.WaitGroup
}

func (c *collector) stream() (*stream, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe: %w", err)
	}
	return &stream{c: c, read: r, write: w}, nil
}

// start reads what the command writes. The command has its own copy of the
// write end now.
func (s *stream) start() {
	s.write.Close()
	s.reader.Go(func() {
		// io.Copy would hand the pipe to Buffer.ReadFrom, which knows no limit.
		_, err := io.Copy(struct{ io.Writer }{s}, s.read)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			s.drain()
		}
	})
}

// partSize is that of a stream's parts, bytes. A command may write single ones.
const partSize = 32 << 10

// Write keeps what is within the limit.
func (s *stream) Write(p []byte) (int, error) {
	over := s.c.taken.Add(int64(len(p))) - s.c.limit
	keep := p[:max(0, int64(len(p))-max(0, over))]
	for len(keep) > 0 {
		last := len(s.parts) - 1
		if last < 0 || len(s.parts[last]) == partSize {
			s.parts = append(s.parts, nil)
			last++
		}
		n := min(len(keep), partSize-len(s.parts[last]))
		s.parts[last] = append(s.parts[last], keep[:n]...)
		keep = keep[n:]
	}
	return len(p), nil
}

// finish ends the reading. What the command wrote before its end is in the pipe; a
// process that it left behind may keep the pipe open for ever.
func (s *stream) finish() {
	// Wakes the reader, which then drains the pipe.
	if err := s.read.SetReadDeadline(time.Now()); err != nil {
		s.read.Close()
	}
	s.reader.Wait()
}

// drain reads what is in the pipe without waiting for more, and no more than it
// holds: what the command has left behind may go on writing.
func (s *stream) drain() {
	raw, err := s.read.SyscallConn()
	if err != nil {
		return
	}
	buf := make([]byte, 64<<10)
	// Control does not care for the deadline, as Read would.
	_ = raw.Control(func(fd uintptr) {
		left, err := unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0)
		for err == nil && left > 0 {
			var n int
			n, err = unix.Read(int(fd), buf[:min(left, len(buf))])
			switch {
			case errors.Is(err, unix.EINTR):
				err = nil
			case n <= 0:
				return
			default:
				_, err = s.Write(buf[:n])
				left -= n
			}
		}
	})
}

func (s *stream) close() {
	s.write.Close()
	s.read.Close()
}

// execProcess describes a process that joins the container.
func (m *Manager) execProcess(id string, cmd []string, tty bool) (*specs.Process, error) {
	if len(cmd) == 0 {
		return nil, fmt.Errorf("cmd: is empty: %w", errdefs.ErrInvalidArgument)
	}
	var own struct {
		Process *specs.Process `json:"process"`
	}
	if err := m.readSpec(id, &own); err != nil {
		return nil, err
	}
	if own.Process == nil {
		return nil, fmt.Errorf("spec of container %s has no process: %w", id, errdefs.ErrDataLoss)
	}
	return spec.ForExec(own.Process, cmd, tty), nil
}
