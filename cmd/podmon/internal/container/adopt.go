package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/crilog"
	"github.com/podshim/podshim/internal/monitor/wire"
)

// Adopt takes over a container from a podmon that died or released it. The files
// are duplicates that the daemon kept; those that are missing are opened anew
// where that is possible (output FIFOs, the pidfd), and gone where it is not
// (standard input, a terminal).
//
// A container whose start was cut short is killed and removed, and
// the answer is NotFound. One that has exited keeps its exit.
func (m *Manager) Adopt(ctx context.Context, id string, files *wire.Message) (*Container, error) {
	c, err := m.claim(id)
	if err != nil && wire.ToError(err).Class == wire.ClassExists {
		return m.Get(ctx, id) // by an earlier request, whose answer nobody has heard
	}
	if err != nil {
		return nil, err
	}
	err = c.adopt(ctx, files)
	m.settle(c, err)
	if err != nil {
		return nil, fmt.Errorf("adopt %s: %w", id, err)
	}
	if !c.hasExited() {
		go c.watch()
	}
	return c, nil
}

func (c *Container) adopt(ctx context.Context, files *wire.Message) (err error) {
	defer func() {
		if err != nil {
			c.dismiss()
		}
	}()
	found, err := load(c.dir, recordFile, &c.rec)
	if err != nil {
		return err
	}
	var exit wire.Exit
	if ok, err := load(c.dir, exitFile, &exit); err != nil {
		return err
	} else if ok {
		c.exit = &exit
		close(c.gone)
		return nil
	}
	if !found || c.rec.Process.PID == 0 {
		err := c.m.DeleteUnknown(ctx, c.ID)
		return errors.Join(wire.Errorf(wire.ClassNotFound, "container %s was never started", c.ID), err)
	}
	if c.cgroup, err = cgroupAt(c.rec); err != nil {
		return err
	}
	if c.lc, err = libcontainer.Load(c.m.stateRoot(), c.ID); err != nil {
		if !errors.Is(err, libcontainer.ErrNotExist) {
			return fmt.Errorf("load: %w", err)
		}
		return c.lost(ctx) // podmon died between removing the state and recording the exit
	}
	if c.pidfd = files.File(wire.FilePidfd); c.pidfd == nil {
		if c.pidfd, err = openPidfd(c.rec.Process); errors.Is(err, unix.ESRCH) {
			return c.lost(ctx)
		} else if err != nil {
			return err // it may well be running
		}
	}
	if err := c.resumeOutput(files); err != nil {
		return err
	}
	// From here on the old journal must not be looked at again. A container runs
	// on without that, so a full run directory must not keep it from us.
	c.rec.Owner = c.m.Owner
	if err := save(c.dir, recordFile, c.rec); err != nil {
		c.log().WithError(err).Warn("record new owner")
	}
	if c.output != nil {
		c.output.Read()
	}
	return nil
}

// dismiss closes all that a failed adoption has opened or been given.
func (c *Container) dismiss() {
	c.handles.close()
	if c.pidfd != nil {
		c.pidfd.Close()
	}
	if c.output != nil {
		c.output.Drop()
	}
}

// lost settles a container that ended while nobody watched, so that its exit
// code is not known.
func (c *Container) lost(ctx context.Context) error {
	exit := wire.Exit{At: time.Now()}
	if status, ok := c.rec.Process.ZombieStatus(); ok {
		exit.Known = true
		exit = exitOf(syscall.WaitStatus(status), true, exit.At)
	}
	if err := killAll(ctx, c.cgroup); err != nil {
		return err
	}
	c.drainLost()
	var err error
	if c.lc != nil {
		err = c.lc.Destroy()
	} else {
		err = c.cgroup.Destroy()
	}
	if err != nil {
		return fmt.Errorf("remove container: %w", err)
	}
	if err := save(c.dir, exitFile, exit); err != nil {
		return fmt.Errorf("record exit: %w", err)
	}
	c.exit = &exit
	close(c.gone)
	return nil
}

// drainLost writes what the files still hold to the log.
func (c *Container) drainLost() {
	if err := c.resumeOutput(&wire.Message{}); err != nil {
		c.log().WithError(err).Warn("read remaining output")
		return
	}
	if c.output != nil {
		c.output.Read()
		if err := c.output.Drain(drainLimit); err != nil {
			c.log().WithError(err).Warn("close log")
		}
	}
}

// resumeOutput makes ready to read where the last podmon has left off.
func (c *Container) resumeOutput(files *wire.Message) (err error) {
	var log *crilog.Log
	if c.rec.LogPath != "" {
		if log, err = crilog.Open(c.rec.LogRoot, c.rec.LogPath); err != nil {
			// The container must be drained all the same.
			c.log().WithError(err).Warn("open log")
		}
	}
	c.handles.stdin = files.Fd(wire.FileStdin)
	c.handles.console = files.Fd(wire.FileConsole)
	if c.rec.Terminal {
		if c.handles.console < 0 {
			return nil // both its holders died, and the terminal with them
		}
		dup, err := duplicate(c.handles.console)
		if err != nil {
			return fmt.Errorf("duplicate console: %w", err)
		}
		c.output = c.newOutput(log, dup, nil)
		return c.output.Resume(c.m.journalOf(c.rec.Owner))
	}
	if c.rec.Discard {
		return nil
	}
	ends := map[string]*os.File{}
	for _, name := range []string{wire.FileStdout, wire.FileStderr} {
		if ends[name] = files.File(name); ends[name] == nil {
			if ends[name], err = openFifo(filepath.Join(c.dir, name)); err != nil {
				if log != nil {
					log.Close()
				}
				return err
			}
		}
	}
	c.output = c.newOutput(log, ends[wire.FileStdout], ends[wire.FileStderr])
	return c.output.Resume(c.m.journalOf(c.rec.Owner))
}

// Release stops reading and forgets the container, which runs on; another
// podmon can adopt it when Release has returned. As long as this process lives
// it stays the parent of PID 1, and reaps it.
func (c *Container) Release() error {
	c.mu.Lock()
	if c.exit != nil {
		c.mu.Unlock()
		c.m.forget(c)
		return nil
	}
	c.released = true
	c.handles.close()
	c.mu.Unlock()
	c.m.forget(c)
	if c.output == nil {
		return nil
	}
	return c.output.Release()
}
