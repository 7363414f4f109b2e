// Package container runs containers with libcontainer. It is the only part of
// podshim that links it.
//
// A container's life here:
//
//	Start ----> running --(PID 1 ends)--> exited ----> Delete
//	Adopt ----/       \--(Release)--> another podmon's
//
// What must outlive podmon is in files: libcontainer's state in RunDir/state,
// and for each container a directory RunDir/containers/ID with the record, the
// FIFOs of its output, incomplete lines, and in the end the exit.
//
// The container holds its output FIFOs open for reading and writing. So writing
// never raises SIGPIPE, not even while no podmon and no daemon is there: the
// writer waits when the FIFO is full, and the next podmon opens the same FIFO by
// its path and goes on reading.
//
// The daemon holds the other descriptors as well, so all of this goes on when
// podmon alone dies. When both die at once, standard input is at its end for the
// container, a terminal hangs up (SIGHUP), and what a container that has ended
// meanwhile had written last, and nobody had read, is lost with the FIFO.
package container

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // lets cgroup managers set device rules
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/filter"
	"github.com/podshim/podshim/cmd/podmon/internal/stdio"
	"github.com/podshim/podshim/internal/monitor/wire"
)

const (
	// killLimit is how long killing what is left of a container may take. Only
	// processes in uninterruptible sleep take longer than milliseconds.
	killLimit = 30 * time.Second
	// drainLimit is how long output may stay open after the last process of the
	// container has ended: a descriptor was passed elsewhere.
	drainLimit = 2 * time.Second
	// abortPause is between the rounds in which an unfinished start is killed.
	abortPause = 50 * time.Millisecond
	// undoLimit is how long adoption may take to remove what a start that was cut
	// short has left. Delete has what takes longer.
	undoLimit = 5 * time.Second
)

// Config is what all containers of a podmon share.
type Config struct {
	RunDir        string
	Owner         string // this podmon's instance name
	Build         string // tells this podmon's program from others, for the daemon
	SystemdCgroup bool
	// OOMScoreAdj is for containers whose spec says none: podmon's own is not theirs.
	OOMScoreAdj int
	// OnExit is told of every exit, after everything of the container is gone
	// and the exit is on file. It must not block.
	OnExit func(wire.Event)
}

// Manager holds a podmon's containers.
type Manager struct {
	Config
	journal *stdio.Journal
	reaper  *reaper

	keeping    sync.Mutex // by KeepFiles
	mu         sync.Mutex
	containers map[string]*Container
	filters    filter.Cache
	executable *os.File     // podmon's own
	privileges []string     // the capabilities that podmon has
	execs      atomic.Int64 // running ones
}

// Container is one container of this podmon.
type Container struct {
	ID  string
	m   *Manager
	dir string

	// ready is closed when Start or Adopt is over; the fields below are set then
	// and never again, and are nil when it failed.
	ready   chan struct{}
	err     error
	rec     record
	process initProcess // nil when adopted: PID 1 is not our child
	cgroup  cgroups.Manager
	pidfd   *os.File
	output  *stdio.Output
	reaped  *wire.Exit // by a podmon that died before it had cleared up

	// life is held for reading while a process is started in the container, and
	// for writing while its limits change and while PID 1 is reaped. So the PID by
	// which libcontainer joins the namespaces stays PID 1's.
	life sync.RWMutex
	// lc is nil once PID 1 has ended. It must not be used then: libcontainer
	// starts a process in a destroyed container without any namespace, that is,
	// on the host.
	lc *libcontainer.Container
	// hidden is lc's list of its cgroups, empty but for a moment; see hideCgroups.
	hidden map[string]string

	// files is held while missing files are written anew, which must not be when
	// Delete has removed them.
	files   sync.Mutex
	deleted bool

	filter     atomic.Pointer[filter.Filter] // see filterOf
	unfiltered atomic.Bool                   // the log has why there is none

	killBy time.Time   // watch's own: when killing leftovers ends
	killed atomic.Bool // podmon has sent SIGKILL
	// executed: PID 1 is the container's own program; see awaitProgram.
	executed atomic.Bool

	mu       sync.Mutex
	begun    cgroups.Manager // of a start underway, for abort
	starting *os.Process     // a pause that may not have joined its cgroups
	handles  handles
	exit     *wire.Exit
	cleared  bool          // nothing is left that the record would be needed for
	released bool          // another podmon settles the exit
	ending   bool          // this one does
	gone     chan struct{} // closed after exit is set and published
}

// handles are the descriptors that podmon keeps open and never reads, by number:
// see wire.Message. -1 is none.
type handles struct {
	stdin   int // write end
	console int // master
	// slave is podmon's own end of the terminal. It keeps the terminal from ending
	// while PID 1, an init for example, has closed it and will open it again.
	slave int
}

func (h *handles) close() {
	for _, fd := range []*int{&h.stdin, &h.console, &h.slave} {
		if *fd >= 0 {
			unix.Close(*fd)
		}
		*fd = -1
	}
}

// NewManager makes a Manager on RunDir.
func NewManager(c Config) (*Manager, error) {
	m := &Manager{Config: c, containers: map[string]*Container{}, reaper: newReaper()}
	for _, dir := range []string{m.stateRoot(), m.containerRoot()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	var err error
	if m.executable, err = os.Open("/proc/self/exe"); err != nil {
		return nil, err
	}
	if m.privileges, err = ownCapabilities(); err != nil {
		return nil, fmt.Errorf("capabilities: %w", err)
	}
	m.journal, err = stdio.NewJournal(m.journalOf(c.Owner))
	return m, err
}

func (m *Manager) journalOf(owner string) string {
	return filepath.Join(m.RunDir, "podmon", owner, "journal")
}

func (m *Manager) stateRoot() string     { return filepath.Join(m.RunDir, "state") }
func (m *Manager) containerRoot() string { return filepath.Join(m.RunDir, "containers") }

// validID tells whether id can be a file name here and an ID for libcontainer. (Not
// a regexp: compiling it would cost every "podmon init" time.)
func validID(id string) bool {
	for i, r := range id {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_':
		case i > 0 && (r == '.' || r == '+' || r == '-'):
		default:
			return false
		}
	}
	return id != "" && len(id) <= 128
}

// claim reserves an ID, so that what is started under it is held from the first moment.
func (m *Manager) claim(id string) (*Container, error) {
	if !validID(id) {
		return nil, wire.Errorf(wire.ClassInvalid, "container id %q is not valid", id)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.containers[id] != nil {
		return nil, wire.Errorf(wire.ClassExists, "container %s already exists", id)
	}
	c := &Container{
		ID: id, m: m, dir: filepath.Join(m.containerRoot(), id),
		ready: make(chan struct{}), gone: make(chan struct{}), handles: handles{-1, -1, -1},
	}
	m.containers[id] = c
	return c, nil
}

// settle ends a claim: with an error the ID is free again.
func (m *Manager) settle(c *Container, err error) {
	if err != nil {
		m.mu.Lock()
		delete(m.containers, c.ID)
		m.mu.Unlock()
	}
	c.err = err
	close(c.ready)
}

// Get returns a container once it is started.
func (m *Manager) Get(ctx context.Context, id string) (*Container, error) {
	m.mu.Lock()
	c := m.containers[id]
	m.mu.Unlock()
	if c == nil {
		return nil, wire.Errorf(wire.ClassNotFound, "container %s is not here", id)
	}
	select {
	case <-c.ready:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if c.err != nil {
		return nil, wire.Errorf(wire.ClassNotFound, "container %s could not be started: %w", id, c.err)
	}
	return c, nil
}

// List returns every container that is started.
func (m *Manager) List() []wire.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := []wire.Status{}
	for _, c := range m.containers {
		select {
		case <-c.ready:
			if c.err == nil {
				list = append(list, c.Status())
			}
		default:
		}
	}
	return list
}

// Busy tells whether a container or an exec would be lost with this process.
func (m *Manager) Busy() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.containers) > 0 || m.execs.Load() > 0
}

// Status returns the container's process and exit.
func (c *Container) Status() wire.Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	return wire.Status{ID: c.ID, Process: c.rec.Process, Exit: c.exit}
}

func (c *Container) hasExited() bool { return c.Status().Exit != nil }

// Output is what the container writes; nil when all of it is discarded.
func (c *Container) Output() *stdio.Output { return c.output }

// Handles adds duplicates of all descriptors to an answer.
func (c *Container) Handles(answer *wire.Message) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.exit != nil {
		return nil
	}
	err := errors.Join(
		answer.Attach(wire.FilePidfd, c.pidfd),
		answer.AttachFd(wire.FileStdin, c.handles.stdin),
		answer.AttachFd(wire.FileConsole, c.handles.console),
	)
	if err != nil || c.output == nil || c.rec.Terminal {
		return err
	}
	// A stream that has ended needs nothing kept.
	return c.output.Share(answer.Attach)
}

// CloseStdin closes podmon's end of standard input.
func (c *Container) CloseStdin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.handles.stdin >= 0 {
		unix.Close(c.handles.stdin)
		c.handles.stdin = -1
	}
}

// Signal sends a signal to PID 1, or to every process.
func (c *Container) Signal(ctx context.Context, sig syscall.Signal, all bool) error {
	if c.hasExited() {
		return wire.Errorf(wire.ClassNotFound, "container %s has exited", c.ID)
	}
	if sig == unix.SIGKILL {
		c.killed.Store(true)
		c.expectEnd()
	} else if err := c.awaitProgram(ctx); err != nil {
		return fmt.Errorf("signal %d: %w", sig, err)
	}
	if all {
		return c.signalAll(ctx, sig)
	}
	err := c.signalInit(sig)
	switch {
	case errors.Is(err, unix.ESRCH):
		return wire.Errorf(wire.ClassNotFound, "container %s has exited", c.ID)
	case errors.Is(err, unix.EINVAL):
		return wire.Errorf(wire.ClassInvalid, "signal %d: %w", sig, err)
	case err != nil:
		return fmt.Errorf("signal %d: %w", sig, err)
	}
	if sig == unix.SIGKILL {
		return thaw(c.cgroup)
	}
	return nil
}

// signalInit signals PID 1; ESRCH when it is gone.
func (c *Container) signalInit(sig syscall.Signal) error {
	c.mu.Lock() // the pidfd stays open
	defer c.mu.Unlock()
	if c.exit != nil || c.pidfd == nil {
		return unix.ESRCH
	}
	return control(c.pidfd, func(fd int) error { return unix.PidfdSendSignal(fd, sig, nil, 0) })
}

// expectEnd looks for what keeps a killed container from ending.
func (c *Container) expectEnd() {
	time.AfterFunc(reapPause, func() {
		if !c.hasExited() {
			c.m.reaper.look()
		}
	})
}

func (c *Container) signalAll(ctx context.Context, sig syscall.Signal) error {
	if sig == unix.SIGKILL {
		return killAll(ctx, c.cgroup)
	}
	pids, err := processes(c.cgroup)
	if err != nil {
		return fmt.Errorf("processes of cgroup: %w", err)
	}
	return signalEach(c.cgroup, pids, sig)
}

// watch waits for PID 1's end and then leaves nothing of the container but its exit.
func (c *Container) watch() {
	if c.lc == nil {
		c.killLeftovers() // podmon died in the middle of this
		_ = c.signalInit(unix.SIGKILL)
	}
	at := c.awaitEnd()
	oomKills, counted := c.oomKills()
	c.mu.Lock()
	released := c.released
	c.ending = !released // one podmon settles an exit
	c.mu.Unlock()
	if !released {
		// Ends execs that are being started as well, or the lock would not come.
		c.killLeftovers()
	}
	c.life.Lock()
	status, known := c.reap()
	lc := c.lc
	c.lc, c.process = nil, nil // config and seccomp profile are large
	c.life.Unlock()
	if released {
		return
	}
	exit := exitOf(status, known, at)
	exit.OOMKilled = known && c.killedByOOM(status, oomKills, counted)
	exit = c.reapedOnce(exit)
	cleared := c.clear(lc)
	if err := save(c.dir, exitFile, exit); err != nil {
		c.log().WithError(err).Error("record exit")
	}
	c.mu.Lock()
	c.exit, c.cleared = &exit, cleared
	c.handles.close()
	if c.pidfd != nil {
		c.pidfd.Close()
	}
	c.mu.Unlock()
	close(c.gone)
	c.m.OnExit(wire.Event{ID: c.ID, Exit: exit})
}

// awaitEnd returns when PID 1 has ended, with the time of that.
func (c *Container) awaitEnd() time.Time {
	if c.pidfd == nil {
		return time.Now()
	}
	at, err := awaitPidfd(c.pidfd)
	if err != nil {
		c.log().WithError(err).Error("wait for pidfd")
		return time.Now()
	}
	return at
}

// reapedOnce keeps the exit on file as soon as it is known, for clearing up may
// take long; and goes by what a podmon that died in that has left there.
func (c *Container) reapedOnce(exit wire.Exit) wire.Exit {
	if c.reaped != nil {
		return *c.reaped
	}
	if err := save(c.dir, reapedFile, exit); err != nil {
		c.log().WithError(err).Error("record exit")
	}
	return exit
}

// reap returns PID 1's wait status; it has ended already.
func (c *Container) reap() (syscall.WaitStatus, bool) {
	if c.process == nil {
		return c.foreignStatus()
	}
	state, _ := c.process.Wait() // its error is a non-zero exit
	c.m.reaper.disown(c.rec.Process.PID)
	if state == nil {
		return c.foreignStatus()
	}
	status, ok := state.Sys().(syscall.WaitStatus)
	return status, ok
}

// oomKills reads the cgroup's oom_kill counter, if the cgroup is there still.
func (c *Container) oomKills() (n uint64, counted bool) {
	n, err := c.cgroup.OOMKillCount()
	if err != nil {
		c.log().WithError(err).Debug("read oom_kill")
	}
	return n, err == nil
}

// killLeftovers kills what PID 1 has left behind. All calls together take no
// longer than killLimit.
func (c *Container) killLeftovers() {
	if c.killBy.IsZero() {
		c.killBy = time.Now().Add(killLimit)
	}
	ctx, cancel := context.WithDeadline(context.Background(), c.killBy)
	defer cancel()
	if err := killAll(ctx, c.cgroup); err != nil {
		c.log().WithError(err).Warn("kill leftovers")
	}
}

// clear kills what was started at the last moment, reads the output to its end,
// and removes the cgroup and libcontainer's state. When it is false, something is
// left: Delete tries again, and does not succeed before it has gone.
func (c *Container) clear(lc *libcontainer.Container) bool {
	c.killLeftovers()
	c.closeSlave()
	if c.output != nil {
		if err := c.output.Drain(drainLimit); err != nil {
			c.log().WithError(err).Warn("close log")
		}
	}
	destroy := c.cgroup.Destroy
	if lc != nil {
		c.showCgroups()
		destroy = lc.Destroy
	}
	if err := destroy(); err != nil {
		c.log().WithError(err).Warn("remove container")
		return false
	}
	return true
}

// Abort ends a start that is underway, however it hangs: in a hook, in a mount.
// None underway is success.
func (m *Manager) Abort(ctx context.Context, id string) error {
	m.mu.Lock()
	c := m.containers[id]
	m.mu.Unlock()
	if c == nil {
		return nil
	}
	for {
		c.mu.Lock()
		cg, starting := c.begun, c.starting
		c.mu.Unlock()
		select {
		case <-c.ready:
			return nil
		default:
		}
		if starting != nil {
			_ = starting.Kill() // the gone is success
		}
		if cg != nil {
			if err := killAll(ctx, cg); err != nil {
				return fmt.Errorf("abort start: %w", err)
			}
		}
		select {
		case <-c.ready:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("abort start: %w", ctx.Err())
		case <-time.After(abortPause): // it may not have been in its cgroup yet
		}
	}
}

// Delete kills the container if it runs, and removes all that is known of it.
func (c *Container) Delete(ctx context.Context) error {
	if !c.hasExited() {
		c.killed.Store(true)
		if err := killAll(ctx, c.cgroup); err != nil {
			return err
		}
		// PID 1 may have left its cgroup, which root with a writable cgroup
		// mount can do.
		if err := c.Signal(ctx, unix.SIGKILL, false); err != nil && wire.ToError(err).Class != wire.ClassNotFound {
			return err
		}
		select {
		case <-c.gone:
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of PID 1: %w", ctx.Err())
		}
	}
	c.mu.Lock()
	cleared := c.cleared
	c.mu.Unlock()
	if !cleared {
		if err := removeCgroup(ctx, c.rec); err != nil {
			return err
		}
	}
	c.files.Lock()
	c.deleted = true
	c.files.Unlock()
	if err := c.m.removeFiles(c.ID); err != nil {
		return err
	}
	c.m.forget(c)
	return nil
}

func (m *Manager) forget(c *Container) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.containers[c.ID] == c {
		delete(m.containers, c.ID)
	}
}

// removeFiles removes what Start and Adopt leave in the run directory. The
// record goes last: as long as it is there, a later Delete finds the rest.
func (m *Manager) removeFiles(id string) error {
	if err := os.RemoveAll(filepath.Join(m.stateRoot(), id)); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(m.containerRoot(), id))
}

// DeleteUnknown removes what a podmon that died has left of a container that
// nobody took over; nothing left is success.
func (m *Manager) DeleteUnknown(ctx context.Context, id string) error {
	if !validID(id) {
		return wire.Errorf(wire.ClassInvalid, "container id %q is not valid", id)
	}
	var rec record
	if _, err := load(filepath.Join(m.containerRoot(), id), recordFile, &rec); err != nil {
		logrus.WithError(err).WithField("container", id).Warn("record is unreadable; removing it")
	}
	if len(rec.CgroupPaths) == 0 {
		m.recall(id, &rec)
	}
	if err := removeCgroup(ctx, rec); err != nil {
		return err
	}
	return m.removeFiles(id)
}

// recall completes a record that is damaged with what libcontainer has on file.
func (m *Manager) recall(id string, rec *record) {
	lc, err := libcontainer.Load(m.stateRoot(), id)
	if err != nil {
		return
	}
	if state, err := lc.State(); err == nil {
		rec.CgroupPaths, rec.Systemd = maps.Clone(state.CgroupPaths), m.SystemdCgroup
	}
}

// removeCgroup kills what is in a container's cgroup and removes it; the gone,
// and one that was never made, is success.
func removeCgroup(ctx context.Context, rec record) error {
	if len(rec.CgroupPaths) == 0 {
		return nil
	}
	cg, err := cgroupAt(rec)
	if err != nil {
		return err
	}
	if err := killAll(ctx, cg); err != nil {
		return err
	}
	if err := cg.Destroy(); err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	return nil
}

// cgroupAt makes a manager for the cgroup a record names. A manager empties the map
// that it is given.
func cgroupAt(rec record) (cgroups.Manager, error) {
	cg, err := manager.NewWithPaths(&cgroups.Cgroup{
		Systemd: rec.Systemd, Resources: &cgroups.Resources{},
	}, maps.Clone(rec.CgroupPaths))
	if err != nil {
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	return cg, nil
}

func (c *Container) log() *logrus.Entry { return logrus.WithField("container", c.ID) }

// ReopenLog opens the log's path anew, after a rotation.
func (c *Container) ReopenLog() error {
	if c.hasExited() {
		return wire.Errorf(wire.ClassPrecondition, "container %s has exited", c.ID)
	}
	if c.output == nil {
		return nil
	}
	return c.output.Reopen()
}
