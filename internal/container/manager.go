package container

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/ids"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/janitor"
	"github.com/podshim/podshim/internal/keylock"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/spec"
	"github.com/podshim/podshim/internal/state"
)

// Monitor runs containers; *monitor.Monitor is one.
type Monitor interface {
	Start(context.Context, monitor.StartRequest) (monitor.Process, error)
	Signal(ctx context.Context, id string, sig syscall.Signal, all bool) error
	Delete(ctx context.Context, id string) error
	Exec(context.Context, monitor.ExecRequest) (*monitor.Exec, error)
	Attach(context.Context, monitor.AttachRequest) error
	Stdin(id string) (*os.File, error)
	Console(id string) (*os.File, error)
	CloseStdin(ctx context.Context, id string) error
	ReopenLog(ctx context.Context, id string) error
	Update(ctx context.Context, id string, r *specs.LinuxResources) error
	List() []monitor.Status
}

// Images gives containers their root filesystems; *image.Store does.
type Images interface {
	Get(ref string) (image.Image, error)
	Prepare(ctx context.Context, key string, img image.Image, opts ...image.SnapshotOpt) ([]mount.Mount, error)
	View(ctx context.Context, key string, img image.Image, opts ...image.SnapshotOpt) ([]mount.Mount, error)
	RemoveSnapshot(ctx context.Context, key string) error
}

// Config is what a Manager is made of.
type Config struct {
	// RunDir holds a folder per container for what a reboot may take (mount
	// points, the OCI spec), e.g. /run/podshim/containers; RootDir one for what
	// it may not (image volumes), e.g. /var/lib/podshim/containers.
	RunDir, RootDir string
	// OperationLimit bounds Create, Start and Remove, which no client's deadline does.
	OperationLimit time.Duration
	// ExecSyncLimit is how much output ExecSync collects, bytes.
	ExecSyncLimit int

	Host      spec.Host
	Handlers  map[string]spec.Handler
	Records   sandbox.Records
	Monitor   Monitor
	Images    Images
	Sandboxes *sandbox.Manager
	// Changed is called, if set, after a container has got a new record, or nil
	// when it was removed; it must not block.
	Changed func(before, after *Record)
	Log     *logrus.Entry
}

// Manager holds all containers.
type Manager struct {
	Config

	ops     keylock.Locker
	flights flight.Group

	mu        sync.RWMutex // guards what follows
	byID      map[string]*Container
	bySandbox map[string]map[string]*Container
	names     map[string]string // reserved name to ID

	// unreadable are the IDs of records that make no sense: what they stand for
	// may run, and is nobody else's.
	unreadable map[string]bool

	janitor *janitor.Janitor
}

// NewManager reads the records and compares them with what the monitor runs.
func NewManager(cfg Config) (*Manager, error) {
	m := &Manager{
		Config:     cfg,
		byID:       make(map[string]*Container),
		bySandbox:  make(map[string]map[string]*Container),
		names:      make(map[string]string),
		unreadable: make(map[string]bool),
	}
	m.flights.Limit = cfg.OperationLimit
	if err := m.load(); err != nil {
		return nil, err
	}
	m.janitor = janitor.Start(m.leftovers, m.releaseLeftover)
	return m, nil
}

// Close waits until the operations that run are over, or ctx is: what is cut off
// then the next podshim finds on record. Containers go on.
func (m *Manager) Close(ctx context.Context) error {
	m.janitor.Close()
	return m.flights.Wait(ctx)
}

func (m *Manager) load() error {
	known := make(map[string]monitor.Status)
	for _, s := range m.Monitor.List() {
		known[s.ID] = s
	}
	for id, raw := range m.Records.Take(state.Containers) {
		r, err := decode(raw)
		if err != nil {
			m.Log.WithError(err).WithField("container", id).Error("a container's record cannot be read: what it stands for is left alone")
			m.unreadable[id] = true
			continue
		}
		c := newContainer(r)
		m.index(c)
		if !r.Failed && r.State != Creating {
			m.names[r.Name] = id
		}
		if err := m.recheck(c, known); err != nil {
			return err
		}
	}
	return nil
}

// recheck brings a container up to what happened while no daemon ran.
func (m *Manager) recheck(c *Container, known map[string]monitor.Status) error {
	r := c.Get()
	status, monitored := known[r.ID]
	switch {
	case r.State == Creating:
		return m.update(c, func(r *Record) { r.State, r.Failed = Exited, true })
	case r.State == Exited && monitored && status.Exit == nil:
		// Its Start failed, and so did ending what was started.
		return m.update(c, func(r *Record) { r.Unended = true })
	case r.State == Running && !monitored:
		return m.exited(c, monitor.Exit{At: time.Now()}, "podshim found no process of it when it started")
	case r.State == Running && status.Exit != nil:
		return m.exited(c, *status.Exit, "")
	case r.State == Created && monitored:
		// Started, but the daemon was stopped before it could take note.
		err := m.update(c, func(r *Record) {
			r.State, r.Process, r.StartedAt = Running, status.Process, startTime(status.Process)
		})
		if err == nil && status.Exit != nil {
			err = m.exited(c, *status.Exit, "")
		}
		return err
	}
	return nil
}

func (m *Manager) index(c *Container) {
	r := c.Get()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.byID[r.ID] = c
	if m.bySandbox[r.SandboxID] == nil {
		m.bySandbox[r.SandboxID] = make(map[string]*Container)
	}
	m.bySandbox[r.SandboxID][r.ID] = c
}

// forget removes the container from the indexes and frees its name.
func (m *Manager) forget(r *Record) {
	m.unreserve(r)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.byID, r.ID)
	delete(m.bySandbox[r.SandboxID], r.ID)
	if len(m.bySandbox[r.SandboxID]) == 0 {
		delete(m.bySandbox, r.SandboxID)
	}
}

func (m *Manager) unreserve(r *Record) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.names[r.Name] == r.ID {
		delete(m.names, r.Name)
	}
}

// shown tells whether clients see a container.
func (c *Container) shown() bool {
	r := c.Get()
	return r.State != Creating && !r.Failed
}

// Get returns the container with this ID or unique prefix of an ID.
func (m *Manager) Get(id string) (*Container, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return ids.Find(m.byID, id, "container", (*Container).shown)
}

// List returns all containers, in no order.
func (m *Manager) List() []*Record {
	m.mu.RLock()
	defer m.mu.RUnlock()
	all := make([]*Record, 0, len(m.byID))
	for _, c := range m.byID {
		if c.shown() {
			all = append(all, c.Get())
		}
	}
	return all
}

// InSandbox returns the containers of a sandbox, newest first: kubelet takes the
// first of a name for the one that counts.
func (m *Manager) InSandbox(id string) []*Record {
	var all []*Record
	for _, c := range m.ofSandbox(id) {
		if c.shown() {
			all = append(all, c.Get())
		}
	}
	slices.SortFunc(all, func(a, b *Record) int { return b.CreatedAt.Compare(a.CreatedAt) })
	return all
}

// ofSandbox returns all containers of a sandbox, those being made too.
func (m *Manager) ofSandbox(id string) []*Container {
	m.mu.RLock()
	defer m.mu.RUnlock()
	all := make([]*Container, 0, len(m.bySandbox[id]))
	for _, c := range m.bySandbox[id] {
		all = append(all, c)
	}
	return all
}

// Owns tells whether id is a container, also one that is being made or whose
// record cannot be read.
func (m *Manager) Owns(id string) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.byID[id] != nil || m.unreadable[id]
}

// next holds every legal move; there is none to Creating.
var next = map[State][]State{
	Creating: {Created, Exited},
	Created:  {Running, Exited},
	Running:  {Exited},
}

// transition moves a container on. Its lock is held.
func (m *Manager) transition(c *Container, to State, edit func(*Record)) error {
	from := c.Get().State
	for _, legal := range next[from] {
		if legal != to {
			continue
		}
		return m.update(c, func(r *Record) {
			r.State = to
			if edit != nil {
				edit(r)
			}
		})
	}
	return fmt.Errorf("container %s cannot go from %s to %s: %w", c.Get().ID, from, to, errdefs.ErrFailedPrecondition)
}

// update edits a copy of the record, saves it, and only then publishes it:
// memory is never ahead of what a restart would find.
//
// The one exception is a container's end. That is a fact, not a wish, and on a
// full disk too it must be seen. A restart finds it out again, from podmon.
func (m *Manager) update(c *Container, edit func(*Record)) error {
	before := c.Get()
	after := before.clone()
	edit(after)
	raw, err := after.encode()
	if err == nil {
		err = m.Records.Put(state.Containers, after.ID, raw)
	}
	if err != nil && after.State != Exited {
		return err
	}
	if err != nil {
		m.log(after).WithError(err).Error("the end of a container could not be recorded")
	}
	c.record.Store(after)
	if after.State == Exited {
		c.close()
	}
	if m.Changed != nil {
		m.Changed(before, after)
	}
	return nil
}

func (m *Manager) runDir(id string) string  { return filepath.Join(m.RunDir, id) }
func (m *Manager) rootDir(id string) string { return filepath.Join(m.RootDir, id) }
func (m *Manager) rootfs(id string) string  { return filepath.Join(m.runDir(id), "rootfs") }

func (m *Manager) log(r *Record) *logrus.Entry {
	return m.Log.WithFields(logrus.Fields{
		"container": r.ID, "sandbox": r.SandboxID, "name": r.Config.GetMetadata().GetName(),
	})
}
