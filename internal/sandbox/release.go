package sandbox

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/spec"
)

// Quiesce makes the sandbox NotReady, so that nothing starts in it any more. The
// gone is success, and gives nil.
func (m *Manager) Quiesce(ctx context.Context, id, reason string) (*Sandbox, error) {
	s, err := m.Get(id)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	unlock, err := m.all.Lock(ctx, s.Get().ID)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if s.Get().State != Ready {
		return s, nil
	}
	return s, m.all.Move(s, NotReady, func(r *Record) { r.Reason = reason })
}

// Stop gives back everything that the sandbox holds but its record: the infra
// container, the network and the namespaces. Its containers have ended before.
func (m *Manager) Stop(ctx context.Context, id string) error {
	_, err := flight.Do(ctx, &m.flights, "stop/"+id, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, m.stop(ctx, id)
	})
	return err
}

func (m *Manager) stop(ctx context.Context, id string) error {
	s, err := m.Quiesce(ctx, id, "stopped")
	if err != nil || s == nil {
		return err
	}
	unlock, err := m.all.Lock(ctx, s.Get().ID)
	if err != nil {
		return err
	}
	defer unlock()
	if s.Get().Released {
		return nil
	}
	if err := m.release(ctx, s.Get()); err != nil {
		return fmt.Errorf("stop pod sandbox %s: %w", s.Get().ID, err)
	}
	m.log(s.Get()).Info("pod sandbox is stopped")
	return m.all.Update(s, func(r *Record) { r.Released = true })
}

// Remove stops the sandbox and forgets it. Its containers are removed before.
func (m *Manager) Remove(ctx context.Context, id string) error {
	_, err := flight.Do(ctx, &m.flights, "remove/"+id, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, m.remove(ctx, id)
	})
	return err
}

func (m *Manager) remove(ctx context.Context, id string) error {
	s, err := m.Get(id)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	id = s.Get().ID
	if err := m.stop(ctx, id); err != nil {
		return err
	}
	unlock, err := m.all.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	return m.discard(s)
}

// discard forgets a sandbox whose things are given back. Its lock is held.
func (m *Manager) discard(s *Sandbox) error {
	r := s.Get()
	if r.OwnCgroup {
		// Its last container is gone only now.
		if err := m.removeCgroup(r.CgroupParent); err != nil {
			return fmt.Errorf("remove pod cgroup: %w", err)
		}
	}
	return m.all.Drop(s)
}

// release gives back all that a sandbox may hold, whatever of it was taken. It
// goes on after an error: each thing is worth having back.
func (m *Manager) release(ctx context.Context, r *Record) error {
	// The network's removal is the long one; it needs no live process.
	network := make(chan error, 1)
	go func() {
		if r.HostNetwork() {
			network <- nil
			return
		}
		pod, err := cniPod(r)
		if err == nil {
			err = m.Network.Del(ctx, pod)
		}
		network <- err
	}()
	var errs []error
	err := m.Monitor.Delete(ctx, r.ID)
	if err == nil || errdefs.IsNotFound(err) {
		// One that podmon has lost it does not end.
		err = monitor.EndLost(ctx, r.Infra, spec.CgroupsPath(r.CgroupParent, r.ID, m.Host.SystemdCgroup), m.Host.SystemdCgroup)
	}
	if err != nil {
		errs = append(errs, fmt.Errorf("remove infra container: %w", err))
	}
	if err := m.Infra.Release(ctx, r.ID); err != nil {
		errs = append(errs, fmt.Errorf("release infra container's root: %w", err))
	}
	if err := <-network; err != nil {
		errs = append(errs, err)
	} else if err := removePins(r); err != nil {
		// Not before the plugins are done: they find the pod's devices by it.
		errs = append(errs, err)
	}
	if err := m.removeFiles(r); err != nil {
		errs = append(errs, err)
	}
	if r.OwnCgroup {
		if err := m.removeCgroup(r.CgroupParent); err != nil && !errors.Is(err, errCgroupBusy) {
			errs = append(errs, fmt.Errorf("remove pod cgroup: %w", err))
		}
	}
	return errors.Join(errs...)
}
