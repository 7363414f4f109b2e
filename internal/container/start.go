package container

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/roster"
	"github.com/podshim/podshim/internal/timeline"
)

// Start runs a created container. One that is running already was started by
// the caller's earlier try: that is success.
func (m *Manager) Start(ctx context.Context, id string) error {
	c, err := m.Get(id)
	if err != nil {
		return err
	}
	id = c.Get().ID
	_, err = flight.Do(ctx, &m.flights, "start/"+id, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, m.start(ctx, c)
	})
	return err
}

func (m *Manager) start(ctx context.Context, c *Container) error {
	r := c.Get()
	unlock, err := m.all.Lock(ctx, r.ID)
	if err != nil {
		return err
	}
	defer unlock()
	r = c.Get()
	switch r.State {
	case Running:
		return nil
	case Created:
	default:
		return fmt.Errorf("container %s is %s: only a created container can be started: %w", r.ID, r.State, errdefs.ErrFailedPrecondition)
	}
	s, err := m.Sandboxes.Get(r.SandboxID)
	if err != nil {
		return err
	}
	if _, err := m.Sandboxes.Pod(s); err != nil {
		return err
	}
	if r.Target != nil {
		target, err := m.Get(r.Target.ID)
		if err != nil {
			return fmt.Errorf("target container: %w: %w", errdefs.ErrFailedPrecondition, err)
		}
		if err := r.Target.check(target.Get()); err != nil {
			return err
		}
	}
	oci, err := m.Spec(r.ID)
	if err != nil {
		return err
	}
	var p monitor.Process
	err = timeline.Do(ctx, "process (podmon)", func() (err error) {
		p, err = m.Monitor.Start(ctx, monitor.StartRequest{
			ID: r.ID, Spec: oci,
			Stdin:   r.Config.GetStdin(),
			LogRoot: r.LogRoot, LogPath: r.LogPath,
		})
		return err
	})
	if err != nil {
		return m.startFailed(ctx, c, err)
	}
	err = m.all.Move(c, Running, func(r *Record) {
		r.Process, r.StartedAt = p, time.Now()
	})
	if err != nil {
		return m.startFailed(ctx, c, err)
	}
	m.log(r).WithField("pid", p.PID).Info("container is started")
	return nil
}

// startFailed makes a container that could not be started Exited, and gives back
// what the try has taken; what cannot be given back now the janitor goes on with.
// It returns the cause.
func (m *Manager) startFailed(ctx context.Context, c *Container, cause error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), roster.ReleaseLimit)
	defer cancel()
	r := c.Get()
	m.log(r).WithError(cause).Warn("container could not be started")
	ended := m.end(ctx, r)
	err := m.all.Move(c, Exited, func(r *Record) {
		r.FinishedAt = time.Now()
		r.ExitCode = startErrorCode
		r.Reason = ReasonStartError
		r.Message = cause.Error()
		r.Unended = ended != nil
	})
	if err != nil {
		m.log(r).WithError(err).Error("record of a container that did not start")
	}
	if ended != nil {
		m.log(r).WithError(ended).Error("what a container that did not start holds is not all released: will be tried again")
		m.janitor.Wake()
	}
	return fmt.Errorf("start container %s: %w", r.ID, cause)
}

// end ends every process of a container and lets go of what only a running one
// needs.
func (m *Manager) end(ctx context.Context, r *Record) error {
	if err := m.endProcesses(ctx, r); err != nil {
		return err
	}
	// Not from under a process.
	return m.unmountRoot(r)
}
