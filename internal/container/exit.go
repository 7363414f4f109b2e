package container

import (
	"context"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/monitor"
)

// Exited takes note that a container has ended, and gives back what only a
// running one needs. It waits for the operation that runs on the container.
func (m *Manager) Exited(ctx context.Context, e monitor.Event) error {
	unlock, err := m.all.Lock(ctx, e.ID)
	if err != nil {
		return err
	}
	defer unlock()
	c := m.all.Exact(e.ID)
	if c == nil || c.Get().State != Running {
		return nil // removed, or its Start failed and said so
	}
	return m.exited(c, e.Exit, "")
}

// exited publishes how a container has ended. Its lock is held, or nobody else
// knows the Manager yet.
func (m *Manager) exited(c *Container, exit monitor.Exit, message string) error {
	code, reason := verdict(exit)
	err := m.all.Move(c, Exited, func(r *Record) {
		r.FinishedAt = exit.At
		if r.FinishedAt.Before(r.StartedAt) {
			r.FinishedAt = r.StartedAt
		}
		r.ExitCode, r.Reason, r.Message = code, reason, message
	})
	if err != nil {
		return err
	}
	r := c.Get()
	m.log(r).WithFields(logrus.Fields{"code": code, "reason": reason}).Info("container has ended")
	// The snapshot stays until Remove: it is a dead container's filesystem that
	// somebody may want to look at. Its mount is not needed for that.
	if err := m.unmountRoot(r); err != nil {
		m.log(r).WithError(err).Warn("root of an ended container")
	}
	return nil
}

// verdict is what CRI says of an end.
func verdict(exit monitor.Exit) (code int32, reason string) {
	switch {
	case !exit.Known:
		return unknownCode, ReasonUnknown
	case exit.OOMKilled:
		return exit.Code, ReasonOOMKilled
	case exit.Code == 0:
		return 0, ReasonCompleted
	default:
		return exit.Code, ReasonError
	}
}

// startTime is when a process was started that only its identity is known of.
func startTime(p monitor.Process) time.Time {
	at, err := p.StartedAt()
	if err != nil {
		return time.Now() // it has ended: no later than now
	}
	return at
}

// errStillThere tells of processes that even SIGKILL does not end.
func errStillThere(id string) error {
	return fmt.Errorf("container %s was killed and has processes that do not end (in uninterruptible sleep?): %w", id, context.DeadlineExceeded)
}
