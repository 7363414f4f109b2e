package container

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/janitor"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/roster"
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
	Update(ctx context.Context, id string, r *specs.LinuxResources, adj *int) error
	List() []monitor.Status
}

// Images gives containers their root filesystems; *image.Store does.
type Images interface {
	Get(ref string) (image.Image, error)
	Prepare(ctx context.Context, key string, img image.Image, opts ...image.SnapshotOpt) ([]mount.Mount, error)
	View(ctx context.Context, key string, img image.Image, opts ...image.SnapshotOpt) ([]mount.Mount, error)
	RemoveSnapshot(ctx context.Context, key string) error
	DiscardSnapshot(key string)
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
	Records   roster.Records
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
	all     *roster.Roster[Record, State]
	flights flight.Group
	janitor *janitor.Janitor
}

// class is what the roster knows of containers.
var class = roster.Class[Record, State]{
	Kind: state.Containers, Noun: "container",
	Making: Creating, End: Exited, Next: next,
	Fields: func(r *Record) roster.Fields[State] {
		return roster.Fields[State]{ID: r.ID, Name: r.Name, State: &r.State, Failed: &r.Failed, Why: &r.Message}
	},
	Parent: func(r *Record) string { return r.SandboxID },
	Shown:  func(r *Record) bool { return r.State != Creating && !r.Failed },
	Encode: (*Record).encode,
	Decode: Decode,
	LogFields: func(r *Record) logrus.Fields {
		return logrus.Fields{"container": r.ID, "sandbox": r.SandboxID, "name": r.Config.GetMetadata().GetName()}
	},
}

// NewManager reads the records and compares them with what the monitor runs.
// Containers whose making was interrupted are released in the background.
func NewManager(cfg Config) (*Manager, error) {
	m := newManager(cfg)
	known := make(map[string]monitor.Status)
	for _, s := range m.Monitor.List() {
		known[s.ID] = s
	}
	if err := m.all.Load(func(c *Container) error { return m.recheck(c, known) }); err != nil {
		return nil, err
	}
	m.janitor = m.all.StartJanitor(func(r *Record) bool { return r.Failed || r.Unended }, m.giveBack)
	return m, nil
}

func newManager(cfg Config) *Manager {
	m := &Manager{Config: cfg}
	m.flights.Limit = cfg.OperationLimit
	m.all = roster.New(roster.Config[Record, State]{Class: class, Records: cfg.Records, Changed: cfg.Changed, Log: cfg.Log})
	return m
}

// Close waits until the operations that run are over, or ctx is: what is cut off
// then the next podshim finds on record. Containers go on.
func (m *Manager) Close(ctx context.Context) error {
	m.janitor.Close()
	return m.flights.Wait(ctx)
}

// recheck brings a container up to what happened while no daemon ran.
func (m *Manager) recheck(c *Container, known map[string]monitor.Status) error {
	r := c.Get()
	status, monitored := known[r.ID]
	switch {
	case r.State == Exited && monitored && status.Exit == nil:
		// Its Start failed, and so did ending what was started.
		return m.all.Update(c, func(r *Record) { r.Unended = true })
	case r.State == Running && !monitored:
		message := "podshim found no process of it when it started"
		if r.Process.Alive() {
			message = "podmon has lost it: it runs, unseen, until it is stopped or removed"
			m.log(r).WithField("pid", r.Process.PID).Error(message)
		}
		return m.exited(c, monitor.Exit{At: time.Now()}, message)
	case r.State == Running && status.Exit != nil:
		return m.exited(c, *status.Exit, "")
	case r.State == Created && monitored:
		// Started, but the daemon was stopped before it could take note.
		err := m.all.Update(c, func(r *Record) {
			r.State, r.Process, r.StartedAt = Running, status.Process, startTime(status.Process)
		})
		if err == nil && status.Exit != nil {
			err = m.exited(c, *status.Exit, "")
		}
		return err
	}
	return nil
}

// Get returns the container with this ID or unique prefix of an ID.
func (m *Manager) Get(id string) (*Container, error) {
	return m.all.Get(id)
}

// List returns all containers, in no order.
func (m *Manager) List() []*Record { return m.all.Visible(m.all.All()) }

// InSandbox returns the containers of a sandbox, newest first: kubelet takes the
// first of a name for the one that counts.
func (m *Manager) InSandbox(id string) []*Record {
	all := m.all.Visible(m.all.In(id))
	slices.SortFunc(all, func(a, b *Record) int { return b.CreatedAt.Compare(a.CreatedAt) })
	return all
}

// Owns tells whether id is a container, also one that is being made or whose
// record cannot be read.
func (m *Manager) Owns(id string) bool { return m.all.Owns(id) }

// next holds every legal move; there is none to Creating.
var next = map[State][]State{
	Creating: {Created, Exited},
	Created:  {Running, Exited},
	Running:  {Exited},
}

func (m *Manager) runDir(id string) string  { return filepath.Join(m.RunDir, id) }
func (m *Manager) rootDir(id string) string { return filepath.Join(m.RootDir, id) }
func (m *Manager) rootfs(id string) string  { return filepath.Join(m.runDir(id), "rootfs") }

func (m *Manager) log(r *Record) *logrus.Entry { return m.Log.WithFields(class.LogFields(r)) }
