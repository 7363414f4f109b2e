package container

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"

	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/monitor"
)

// Remove ends a container if need be, gives back all it holds and forgets it.
// The gone is success. The log stays: it is kubelet's.
func (m *Manager) Remove(ctx context.Context, id string) error {
	c := m.all.Exact(id) // a failed one, which clients do not see, too
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
	unlock, err := m.all.Lock(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	r := c.Get()
	if m.all.Exact(id) == nil {
		return nil
	}
	if err := m.release(ctx, r); err != nil {
		return fmt.Errorf("remove container %s: %w", id, err)
	}
	if err := m.all.Drop(c); err != nil {
		return err
	}
	m.log(r).Info("container is removed")
	return nil
}

// release gives back all that a container may hold, whatever of it was taken.
// It goes on after an error: each thing is worth having back.
func (m *Manager) release(ctx context.Context, r *Record) error {
	var errs []error
	if err := m.endProcesses(ctx, r); err != nil {
		return err // they may run in the root: that must not go from under them
	}
	if err := m.releaseImages(ctx, r); err != nil {
		errs = append(errs, fmt.Errorf("image mounts: %w", err))
	}
	if err := m.unmountRoot(r); err != nil {
		errs = append(errs, err)
	} else {
		m.Images.DiscardSnapshot(r.ID)
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

// endProcesses ends every process of a container, one too that podmon has lost.
func (m *Manager) endProcesses(ctx context.Context, r *Record) error {
	err := m.Monitor.Delete(ctx, r.ID)
	if err == nil || errdefs.IsNotFound(err) {
		err = monitor.EndLost(ctx, r.Process, r.CgroupsPath, m.Host.SystemdCgroup)
	}
	if err != nil {
		return fmt.Errorf("end its processes: %w", err)
	}
	return nil
}

func (m *Manager) unmountRoot(r *Record) error {
	if err := image.Unmount(m.rootfs(r.ID)); err != nil {
		return fmt.Errorf("unmount root: %w", err)
	}
	return nil
}

// giveBack removes what clients never saw, and ends what they saw fail.
func (m *Manager) giveBack(ctx context.Context, c *Container) error {
	if c.Get().Failed {
		return m.Remove(ctx, c.Get().ID)
	}
	unlock, err := m.all.Lock(ctx, c.Get().ID)
	if err != nil {
		return err
	}
	defer unlock()
	if !c.Get().Unended {
		return nil
	}
	if err := m.end(ctx, c.Get()); err != nil {
		return err
	}
	return m.all.Update(c, func(r *Record) { r.Unended = false })
}
