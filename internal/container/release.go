package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"

	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/state"
)

const (
	// releaseLimit bounds the release of a failed operation.
	releaseLimit = 2 * time.Minute
	// janitorRest is between the janitor's tries.
	janitorRest = 10 * time.Second
)

// Remove ends a container if need be, gives back all it holds and forgets it.
// The gone is success. The log stays: it is kubelet's.
func (m *Manager) Remove(ctx context.Context, id string) error {
	m.mu.RLock()
	c := m.byID[id] // a failed one, which clients do not see, too
	m.mu.RUnlock()
	if c == nil {
		var err error
		if c, err = m.Get(id); errdefs.IsNotFound(err) {
			return nil
		} else if err != nil {
			return err
		}
	}
	id = c.Get().ID
	_, err := flight.Do(ctx, &m.flights, "remove/"+id, func(ctx context.Context) (struct{}, error) {
		return struct{}{}, m.remove(ctx, c)
	})
	return err
}

func (m *Manager) remove(ctx context.Context, c *Container) error {
	if err := m.stopNow(ctx, c); err != nil {
		return err
	}
	id := c.Get().ID
	unlock, err := m.ops.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	r := c.Get()
	m.mu.RLock()
	_, known := m.byID[id]
	m.mu.RUnlock()
	if !known {
		return nil
	}
	if err := m.release(ctx, r); err != nil {
		return fmt.Errorf("remove container %s: %w", id, err)
	}
	if err := m.Records.Delete(state.Containers, id); err != nil {
		return err
	}
	m.forget(r)
	c.close()
	if m.Changed != nil {
		m.Changed(r, nil)
	}
	m.log(r).Info("container is removed")
	return nil
}

// release gives back all that a container may hold, whatever of it was taken.
// It goes on after an error: each thing is worth having back.
func (m *Manager) release(ctx context.Context, r *Record) error {
	var errs []error
	if err := m.Monitor.Delete(ctx, r.ID); err != nil && !errdefs.IsNotFound(err) {
		// Its processes may run in the root: that must not go from under them.
		return fmt.Errorf("end its processes: %w", err)
	}
	if err := m.releaseImages(ctx, r); err != nil {
		errs = append(errs, fmt.Errorf("image mounts: %w", err))
	}
	if err := m.unmountRoot(r); err != nil {
		errs = append(errs, err)
	} else if err := m.Images.RemoveSnapshot(ctx, r.ID); err != nil {
		errs = append(errs, fmt.Errorf("snapshot: %w", err))
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	// Only with nothing mounted below.
	for _, dir := range []string{m.runDir(r.ID), m.rootDir(r.ID)} {
		if err := os.RemoveAll(dir); err != nil {
			return fmt.Errorf("remove container directory: %w", err)
		}
	}
	return nil
}

func (m *Manager) unmountRoot(r *Record) error {
	if err := image.Unmount(m.rootfs(r.ID)); err != nil {
		return fmt.Errorf("unmount root: %w", err)
	}
	return nil
}

func (m *Manager) wakeJanitor() {
	select {
	case m.leftovers <- struct{}{}:
	default:
	}
}

// releaseLeftovers gives back what failed and interrupted Creates still hold,
// until all is given back.
func (m *Manager) releaseLeftovers(ctx context.Context) {
	for {
		var retry <-chan time.Time
		if !m.sweep(ctx) {
			retry = time.After(janitorRest)
		}
		select {
		case <-ctx.Done():
			return
		case <-m.leftovers:
		case <-retry:
		}
	}
}

// sweep tries all leftovers once and tells whether none remains.
func (m *Manager) sweep(ctx context.Context) (clean bool) {
	m.mu.RLock()
	var failed []*Container
	for _, c := range m.byID {
		if c.Get().Failed {
			failed = append(failed, c)
		}
	}
	m.mu.RUnlock()
	clean = true
	for _, c := range failed {
		if ctx.Err() != nil {
			break
		}
		if err := m.Remove(ctx, c.Get().ID); err != nil {
			clean = false
			m.log(c.Get()).WithError(err).Warn("what a failed container holds is not all released: will be tried again")
		}
	}
	return clean
}
