package container

import (
	"context"
	"fmt"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

// Stop asks a container to end, and kills it when grace is over. It returns when
// the container has ended; one that is not running, or gone, is success.
//
// Each caller has its own grace: a second Stop with a shorter one is not held up
// by the first. No lock is held meanwhile, so that everything else goes on.
func (m *Manager) Stop(ctx context.Context, id string, grace time.Duration) error {
	c, err := m.Get(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	// A Start that is under way ends first.
	unlock, err := m.all.Lock(ctx, c.Get().ID)
	if err != nil {
		return err
	}
	r := c.Get()
	unlock()
	switch r.State {
	case Running:
	case Created:
		return m.abandon(ctx, c)
	default:
		return m.stopLost(ctx, r)
	}
	if grace > 0 {
		if ended, err := m.ask(ctx, c, grace); err != nil || ended {
			return err
		}
	}
	return m.kill(ctx, c)
}

// ask sends a container its stop signal and waits until it has ended. Both have
// the grace in all: a process that cannot take the signal yet, because its program
// comes from a disk that hangs, is not waited for any longer than one that will not.
func (m *Manager) ask(ctx context.Context, c *Container, grace time.Duration) (ended bool, err error) {
	r := c.Get()
	within, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	err = m.Monitor.Signal(within, r.ID, r.StopSignal, false)
	if err != nil && !errdefs.IsNotFound(err) && within.Err() == nil {
		return false, fmt.Errorf("stop container %s with %s: %w", r.ID, r.StopSignal, err)
	}
	select {
	case <-c.Done():
		return true, nil
	case <-within.Done():
	}
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	m.log(r).WithField("grace", grace).Info("container did not end within its grace: killing it")
	return false, nil
}

// kill ends every process of a container and waits for its end to be published.
// Processes in uninterruptible sleep make it fail after killLimit: they are the
// kernel's, and only this container waits for them.
func (m *Manager) kill(ctx context.Context, c *Container) error {
	id := c.Get().ID
	ctx, cancel := context.WithTimeoutCause(ctx, killLimit, errStillThere(id))
	defer cancel()
	err := m.Monitor.Signal(ctx, id, syscall.SIGKILL, true)
	if errdefs.IsNotFound(err) {
		err = nil // it has ended; that is about to be published
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("kill container %s: %w", id, err)
	}
	select {
	case <-c.Done():
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// killLimit is how long a killed container may take to be gone.
const killLimit = time.Minute

// abandon ends a container that was never started. Nothing has to be waited for.
func (m *Manager) abandon(ctx context.Context, c *Container) error {
	unlock, err := m.all.Lock(ctx, c.Get().ID)
	if err != nil {
		return err
	}
	defer unlock()
	if c.Get().State != Created {
		return nil
	}
	err = m.all.Move(c, Exited, func(r *Record) {
		r.FinishedAt = time.Now()
		r.ExitCode = startErrorCode
		r.Reason = ReasonStartError
		r.Message = "stopped before it was started"
	})
	if err != nil {
		return err
	}
	return m.unmountRoot(c.Get())
}

// StopPod kills what runs in a sandbox and stops the sandbox. kubelet has given
// the containers their grace before (CRI StopPodSandbox).
func (m *Manager) StopPod(ctx context.Context, sandboxID string) error {
	s, err := m.Sandboxes.Quiesce(ctx, sandboxID, "stopped")
	if err != nil {
		return err
	}
	id := sandboxID // of containers whose sandbox's record is lost
	if s != nil {
		id = s.Get().ID
	}
	var g errgroup.Group
	for _, c := range m.all.In(id) {
		g.Go(func() error { return m.stopNow(ctx, c) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return m.Sandboxes.Stop(ctx, id)
}

// stopNow kills a container of a pod that is stopped, once the operation that
// runs on it is over. One that was not started cannot be any more.
func (m *Manager) stopNow(ctx context.Context, c *Container) error {
	unlock, err := m.all.Lock(ctx, c.Get().ID)
	if err != nil {
		return err
	}
	r := c.Get()
	unlock()
	if r.State != Running {
		return m.stopLost(ctx, r)
	}
	return m.kill(ctx, c)
}

// stopLost ends a container that has ended for all that is known of it, and whose
// process runs: podmon has lost it.
func (m *Manager) stopLost(ctx context.Context, r *Record) error {
	if r.Process.PID == 0 || !r.Process.Alive() {
		return nil
	}
	m.log(r).WithField("pid", r.Process.PID).Warn("podmon does not know this container, and it runs: ending it")
	return m.endProcesses(ctx, r)
}

// RemovePod removes a sandbox with all its containers, running or not.
func (m *Manager) RemovePod(ctx context.Context, sandboxID string) error {
	if err := m.StopPod(ctx, sandboxID); err != nil {
		return err
	}
	id := sandboxID
	if s, err := m.Sandboxes.Get(sandboxID); err == nil {
		id = s.Get().ID
	} else if !errdefs.IsNotFound(err) {
		return err
	}
	var g errgroup.Group
	for _, c := range m.all.In(id) {
		g.Go(func() error { return m.Remove(ctx, c.Get().ID) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return m.Sandboxes.Remove(ctx, id)
}
