package container

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/crilog"
	"github.com/podshim/podshim/cmd/podmon/internal/stage"
	"github.com/podshim/podshim/cmd/podmon/internal/stdio"
	"github.com/podshim/podshim/internal/monitor/wire"
)

// Start creates a container and runs its PID 1. On an error nothing is left.
func (m *Manager) Start(ctx context.Context, r wire.StartRequest) (*Container, error) {
	if r.Spec == nil || r.Spec.Process == nil || r.Spec.Root == nil || r.Spec.Linux == nil {
		return nil, wire.Errorf(wire.ClassInvalid, "start %s: spec has no process, root or linux part", r.ID)
	}
	if !slices.ContainsFunc(r.Spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.MountNamespace && ns.Path == ""
	}) {
		// It is also what tells a process in the container from one on the host.
		return nil, wire.Errorf(wire.ClassInvalid, "start %s: spec has no mount namespace of its own", r.ID)
	}
	c, err := m.claim(r.ID)
	if err != nil {
		return nil, err
	}
	end := m.reaper.begin()
	err = c.start(r)
	end()
	m.settle(c, err)
	if err != nil {
		return nil, err
	}
	go c.watch()
	return c, nil
}

func (c *Container) start(r wire.StartRequest) (err error) {
	c.rec.Systemd = c.m.SystemdCgroup
	process, err := newProcess(r.Spec.Process)
	if err != nil {
		return err
	}
	process.Init = true
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return wire.Errorf(wire.ClassExists, "container %s already exists in %s", c.ID, c.dir)
		}
		return err
	}
	clean := true // else the record stays, by which Delete finds what is left
	defer func() {
		if err != nil && clean {
			err = errors.Join(err, c.m.removeFiles(c.ID))
		}
	}()
	config, err := c.configure(r)
	if err != nil {
		return err
	}
	var plain *plainInit
	var f *filtered
	bare := config
	if !r.Spec.Process.Terminal && !isPause(r) {
		plain = c.plainInit(config, process)
	}
	if plain == nil {
		if f, err = c.takeFilter(process, config); err != nil {
			return err
		}
	}
	if f != nil {
		defer f.close()
		process, bare = f.process, f.bare
	}
	if err := c.create(r, bare); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			c.handles.close()
			c.showCgroups()
			derr := c.lc.Destroy()
			clean = derr == nil
			err = errors.Join(err, derr)
		}
	}()
	if isPause(r) {
		return c.startPause(r.Spec, config)
	}
	ends, err := c.openStdio(r, process)
	if err != nil {
		return err
	}
	defer ends.close()
	var init initProcess = process
	if plain != nil {
		plain.giveStdio(process)
		init, err = c.startPlainInit(plain, config.Cgroups)
		if errors.Is(err, stage.ErrLeft) {
			plain, init, err = nil, process, c.createAgain(r, config)
		}
	}
	if plain == nil && err == nil {
		if err = c.run(process, f); err != nil {
			c.terminate(process)
			c.endFifoWait()
		}
	}
	if err != nil {
		err, known := classify("start", err)
		if !known {
			c.m.reaper.look()
		}
		return err
	}
	return c.own(init, func() error { return c.readOutput(r, ends) })
}

// initProcess is a PID 1 that podmon is the parent of.
type initProcess interface {
	Pid() (int, error)
	Signal(os.Signal) error
	Wait() (*os.ProcessState, error)
}

// own makes the process the container's PID 1, for good, or ends it.
func (c *Container) own(process initProcess, last func() error) error {
	c.process = process
	if err := c.identify(process); err != nil {
		c.terminate(process)
		return err
	}
	if err := last(); err != nil {
		c.pidfd.Close()
		c.terminate(process)
		return err
	}
	c.m.reaper.own(c.rec.Process.PID)
	return nil
}

// configure is the spec as libcontainer has it.
func (c *Container) configure(r wire.StartRequest) (*configs.Config, error) {
	limitHooks(r.Spec.Hooks)
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName: c.ID, UseSystemdCgroup: c.m.SystemdCgroup, Spec: r.Spec,
	})
	if err != nil {
		return nil, wire.Errorf(wire.ClassInvalid, "spec: %w", err)
	}
	if config.OomScoreAdj == nil {
		config.OomScoreAdj = &c.m.OOMScoreAdj
	}
	return config, nil
}

// create makes libcontainer's container and records it.
func (c *Container) create(r wire.StartRequest, config *configs.Config) (err error) {
	lc, err := libcontainer.Create(c.m.stateRoot(), c.ID, config)
	if err != nil {
		if errors.Is(err, libcontainer.ErrExist) {
			return wire.Errorf(wire.ClassExists, "create: %w", err)
		}
		return fmt.Errorf("create: %w", err)
	}
	c.lc = lc
	state, err := lc.State()
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	c.rec = record{
		Owner: c.m.Owner, LogRoot: r.LogRoot, LogPath: r.LogPath, Discard: r.Discard,
		Terminal: r.Spec.Process.Terminal, Systemd: c.m.SystemdCgroup, CgroupPaths: maps.Clone(state.CgroupPaths),
	}
	// A manager of its own, also when it looks at the same cgroup: libcontainer changes its
	// config and its paths under locks of its own.
	if c.cgroup, err = cgroupAt(c.rec); err != nil {
		return err
	}
	c.mu.Lock()
	c.begun = c.cgroup
	c.mu.Unlock()
	if c.rec.Init, err = identifyFile("/proc/self/exe"); err != nil {
		return fmt.Errorf("identify podmon's program: %w", err)
	}
	if err := save(c.dir, recordFile, c.rec); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	return nil
}

// createAgain makes libcontainer's container anew, whose first process has ended.
func (c *Container) createAgain(r wire.StartRequest, config *configs.Config) error {
	c.showCgroups()
	c.hidden = nil
	if err := c.lc.Destroy(); err != nil {
		return err
	}
	return c.create(r, config)
}

// hookLimit is for hooks that say none, in seconds: a hook that hangs would hold
// the start up for ever.
const hookLimit = 120

func limitHooks(h *specs.Hooks) {
	if h == nil {
		return
	}
	limit := hookLimit
	//nolint:staticcheck // Prestart is deprecated, and run all the same
	for _, list := range [][]specs.Hook{h.Prestart, h.CreateRuntime, h.CreateContainer, h.StartContainer, h.Poststart, h.Poststop} {
		for i := range list {
			if list[i].Timeout == nil || *list[i].Timeout <= 0 {
				list[i].Timeout = &limit
			}
		}
	}
}

// identify notes who PID 1 is, for good.
func (c *Container) identify(process initProcess) error {
	pid, err := process.Pid()
	if err != nil {
		return err
	}
	if c.rec.Process, err = wire.Identify(pid); err != nil {
		return fmt.Errorf("identify PID 1: %w", err)
	}
	if c.pidfd, err = openPidfd(c.rec.Process); err != nil {
		return err
	}
	if err := save(c.dir, recordFile, c.rec); err != nil {
		c.pidfd.Close()
		return fmt.Errorf("record: %w", err)
	}
	return nil
}

// endFifoWait ends the wait for a PID 1 that died before it opened the FIFO by which
// libcontainer starts it: a thread of ours is in open(2) there, and would be for ever.
func (c *Container) endFifoWait() {
	fd, err := unix.Open(filepath.Join(c.m.stateRoot(), c.ID, "exec.fifo"), unix.O_WRONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == nil { // ENXIO: nobody waits
		unix.Close(fd)
	}
}

// terminate ends what a failed start has begun.
func (c *Container) terminate(process initProcess) {
	if err := process.Signal(unix.SIGKILL); err == nil {
		_, _ = process.Wait()
	}
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	if err := killAll(ctx, c.cgroup); err != nil {
		c.log().WithError(err).Warn("kill leftovers of a failed start")
	}
}

// ends are the sides of a container's stdio that podmon needs only until the
// container has them.
type ends struct {
	log            *crilog.Log
	stdout, stderr *os.File // our read ends, given to output in the end
	console        *consoleSocket
	child          []*os.File
}

// close closes what is still ours.
func (e *ends) close() {
	for _, f := range append(e.child, e.stdout, e.stderr) {
		if f != nil {
			f.Close()
		}
	}
	if e.console != nil {
		e.console.close()
	}
	if e.log != nil {
		e.log.Close()
	}
}

// openStdio opens the log and makes the pipes the request asks for.
func (c *Container) openStdio(r wire.StartRequest, process *libcontainer.Process) (_ *ends, err error) {
	e := &ends{}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if r.LogPath != "" {
		if e.log, err = crilog.Open(r.LogRoot, r.LogPath); err != nil {
			return nil, err
		}
	}
	if r.Spec.Process.Terminal {
		e.console, err = newConsoleSocket(process)
		return e, err
	}
	config := c.lc.Config()
	uid, err := config.HostRootUID()
	if err != nil {
		return nil, err
	}
	gid, err := config.HostRootGID()
	if err != nil {
		return nil, err
	}
	if !r.Discard {
		var out, errout *os.File
		if e.stdout, out, err = c.fifo("stdout"); err != nil {
			return nil, err
		}
		e.child = append(e.child, out)
		if e.stderr, errout, err = c.fifo("stderr"); err != nil {
			return nil, err
		}
		e.child = append(e.child, errout)
		process.Stdout, process.Stderr = out, errout
	}
	if r.Stdin {
		var pipe [2]int
		if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
			return nil, fmt.Errorf("stdin: %w", err)
		}
		in := os.NewFile(uintptr(pipe[0]), "stdin")
		e.child = append(e.child, in)
		process.Stdin, c.handles.stdin = in, pipe[1]
	}
	for _, f := range e.child {
		// The container's root owns its stdio, also in a user namespace.
		if err := f.Chown(uid, gid); err != nil {
			return nil, fmt.Errorf("own stdio: %w", err)
		}
	}
	return e, nil
}

// fifo makes a FIFO in the container's directory, and returns podmon's end and
// the container's. The latter is read-write; see the package comment.
func (c *Container) fifo(name string) (ours, theirs *os.File, err error) {
	path := filepath.Join(c.dir, name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, nil, fmt.Errorf("make fifo %s: %w", name, err)
	}
	if ours, err = openFifo(path); err != nil {
		return nil, nil, err
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		ours.Close()
		return nil, nil, fmt.Errorf("open fifo %s: %w", name, err)
	}
	return ours, os.NewFile(uintptr(fd), name), nil
}

func openFifo(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open fifo %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// readOutput begins reading; from here on Output owns the log and the read ends.
func (c *Container) readOutput(r wire.StartRequest, e *ends) (err error) {
	if r.Spec.Process.Terminal {
		if c.handles.console, err = e.console.receive(); err != nil {
			return err
		}
		if e.stdout, err = duplicate(c.handles.console); err != nil {
			return fmt.Errorf("duplicate console: %w", err)
		}
		c.openSlave()
	}
	c.output = c.newOutput(e.log, e.stdout, e.stderr)
	e.log, e.stdout, e.stderr = nil, nil, nil
	if c.output != nil {
		c.output.Read()
	}
	return nil
}

// newOutput owns the log and the files; nil ones are left out.
func (c *Container) newOutput(log *crilog.Log, stdout, stderr *os.File) *stdio.Output {
	if stdout == nil && stderr == nil {
		if log != nil {
			log.Close()
		}
		return nil
	}
	out := stdio.New(c.ID, c.dir, c.m.journal, log)
	if stdout != nil {
		out.Add(wire.FileStdout, stdout, c.rec.Terminal)
	}
	if stderr != nil {
		out.Add(wire.FileStderr, stderr, false)
	}
	return out
}
