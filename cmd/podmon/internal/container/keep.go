package container

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// libState is the file in which libcontainer has a container's state.
const libState = "state.json"

// KeepFiles writes what is missing of that by which another podmon would take the
// containers over: somebody has emptied the run directory. The paths of output FIFOs
// cannot be made again; as long as the daemon or podmon holds them nobody needs these.
func (m *Manager) KeepFiles() error {
	m.keeping.Lock()
	defer m.keeping.Unlock()
	for _, dir := range []string{m.stateRoot(), m.containerRoot(), filepath.Dir(m.journalOf(m.Owner))} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	errs := []error{m.journal.Keep(m.journalOf(m.Owner))}
	m.mu.Lock()
	var all []*Container
	for _, c := range m.containers {
		all = append(all, c)
	}
	m.mu.Unlock()
	for _, c := range all {
		select {
		case <-c.ready:
		default:
			continue // a start underway makes or misses its own
		}
		if err := c.keepFiles(); err != nil {
			errs = append(errs, fmt.Errorf("container %s: %w", c.ID, err))
		}
	}
	return errors.Join(errs...)
}

func (c *Container) keepFiles() error {
	if c.err != nil {
		return nil
	}
	c.files.Lock()
	defer c.files.Unlock()
	c.mu.Lock()
	exit, forgotten := c.exit, c.released || c.deleted
	c.mu.Unlock()
	if forgotten {
		return nil
	}
	err := keep(c.dir, recordFile, func() (any, error) { return c.rec, nil })
	if exit != nil {
		return errors.Join(err, keep(c.dir, exitFile, func() (any, error) { return exit, nil }))
	}
	return errors.Join(err, keep(filepath.Join(c.m.stateRoot(), c.ID), libState, c.libState))
}

// keep writes a file that is missing, unless there is nothing to write.
func keep(dir, name string, content func() (any, error)) error {
	if _, err := os.Lstat(filepath.Join(dir, name)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	v, err := content()
	if err != nil || v == nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return save(dir, name, v)
}

// libState is what libcontainer has to know; nil when PID 1 has ended.
func (c *Container) libState() (any, error) {
	c.life.RLock()
	defer c.life.RUnlock()
	if c.lc == nil {
		return nil, nil
	}
	state, err := c.lc.State()
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	state.CgroupPaths = c.rec.CgroupPaths // libcontainer's own may be hidden from it
	return state, nil
}
