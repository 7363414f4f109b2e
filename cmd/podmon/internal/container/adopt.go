package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

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
		ctx, cancel := context.WithTimeout(ctx, undoLimit)
		defer cancel()
		err := c.m.DeleteUnknown(ctx, c.ID)
		return errors.Join(wire.Errorf(wire.ClassNotFound, "container %s was never started", c.ID), err)
	}
	var reaped wire.Exit
	if ok, err := load(c.dir, reapedFile, &reaped); err != nil {
		c.log().WithError(err).Warn("load exit")
	} else if ok {
		c.reaped = &reaped
	}
	if c.cgroup, err = cgroupAt(c.rec); err != nil {
		return err
	}
	// Without state there is no container: podmon died while it removed it.
	if c.lc, err = libcontainer.Load(c.m.stateRoot(), c.ID); err != nil && !errors.Is(err, libcontainer.ErrNotExist) {
		return fmt.Errorf("load: %w", err)
	}
	if c.lc != nil {
		if err := c.hideCgroups(); err != nil {
			return fmt.Errorf("load: %w", err)
		}
	}
	if c.pidfd = files.File(wire.FilePidfd); c.pidfd == nil {
		c.pidfd, err = openPidfd(c.rec.Process)
		if err != nil && !errors.Is(err, unix.ESRCH) {
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

// resumeOutput makes ready to read where the last podmon has left off.
func (c *Container) resumeOutput(files *wire.Message) (err error) {
	var log *crilog.Log
	if c.rec.LogPath != "" {
		if log, err = crilog.Open(c.rec.LogRoot, c.rec.LogPath); err != nil {
			// The container must be drained all the same.
			c.log().WithError(err).Warn("open log; what cannot be logged is counted")
			log = crilog.Await(c.rec.LogRoot, c.rec.LogPath, err)
		}
		defer func() {
			if c.output == nil { // else it is Output's
				log.Close()
			}
		}()
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
		c.openSlave()
		c.output = c.newOutput(log, dup, nil)
		return c.output.Resume(c.m.journalOf(c.rec.Owner))
	}
	if c.rec.Discard {
		return nil
	}
	ends := map[string]*os.File{}
	for _, name := range []string{wire.FileStdout, wire.FileStderr} {
		if ends[name] = files.File(name); ends[name] == nil {
			if ends[name], err = reopenFifo(filepath.Join(c.dir, name)); err != nil {
				for _, end := range ends {
					end.Close() // of a nil file, that is nothing
				}
				return err
			}
		}
	}
	c.output = c.newOutput(log, ends[wire.FileStdout], ends[wire.FileStderr])
	return c.output.Resume(c.m.journalOf(c.rec.Owner))
}

// reopenFifo opens podmon's end. A FIFO shows its end only to those who have seen
// a writer, so there is one for a moment.
func reopenFifo(path string) (*os.File, error) {
	f, err := openFifo(path)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("open fifo %s: %w", path, err)
	}
	unix.Close(fd)
	return f, nil
}

// Release stops reading and forgets the container, which runs on; another
// podmon can adopt it when Release has returned. One that is ending is settled here
// first. As long as this process lives
// it stays the parent of PID 1, and reaps it.
func (c *Container) Release() error {
	c.mu.Lock()
	if c.exit != nil {
		c.mu.Unlock()
		c.m.forget(c)
		return nil
	}
	if c.ending {
		c.mu.Unlock()
		<-c.gone
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
	if err := c.output.Release(); err != nil {
		c.log().WithError(err).Warn("close log") // the successor reads on all the same
	}
	return nil
}
