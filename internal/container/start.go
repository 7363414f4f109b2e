package container

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

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
	oci, err := m.Spec(r.ID)
	if err != nil {
		return err
	}
	if r.Target != nil {
		ns, err := m.openTarget(r.Target)
		if err != nil {
			return err
		}
		defer ns.Close()
		joinPIDNamespace(oci, ns)
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
	// It has its root. Every start copies the node's mount table, and is the longer for each
	// line in it. What stays there Remove takes away.
	if err := m.unmountRoot(r); err != nil {
		m.log(r).WithError(err).Warn("the root of a started container stays mounted on the node")
	}
	return nil
}

// openTarget opens the PID namespace of a container that runs as the process that
// it was. The PID may be another's as soon as it has ended; an open namespace is
// what it is.
func (m *Manager) openTarget(t *Target) (*os.File, error) {
	target, err := m.Get(t.ID)
	if err != nil {
		return nil, fmt.Errorf("target container: %w: %w", errdefs.ErrFailedPrecondition, err)
	}
	ns, openErr := os.Open(t.namespace())
	// After the namespace was opened: who lives now had the PID then.
	err = t.check(target.Get())
	if err == nil && openErr != nil {
		err = fmt.Errorf("target container: %w", openErr)
	}
	if err != nil {
		_ = ns.Close() // nil, or nothing was done with it
		return nil, err
	}
	return ns, nil
}

// joinPIDNamespace has the container join an open namespace, by way of this
// process's descriptor.
func joinPIDNamespace(oci *specs.Spec, ns *os.File) {
	for i := range oci.Linux.Namespaces {
		if n := &oci.Linux.Namespaces[i]; n.Type == specs.PIDNamespace {
			n.Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd())
		}
	}
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
