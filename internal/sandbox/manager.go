package sandbox

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/ids"
	"github.com/podshim/podshim/internal/janitor"
	"github.com/podshim/podshim/internal/keylock"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/spec"
	"github.com/podshim/podshim/internal/state"
)

// Monitor starts and ends infra containers; *monitor.Monitor is one.
type Monitor interface {
	Start(context.Context, monitor.StartRequest) (monitor.Process, error)
	Delete(ctx context.Context, id string) error
	List() []monitor.Status
}

// Network connects pods; *cni.Network is one.
type Network interface {
	Add(context.Context, cni.Pod) (cni.Result, error)
	Del(context.Context, cni.Pod) error
}

// InfraRoot gives infra containers their root filesystem.
type InfraRoot interface {
	// Acquire returns the root filesystem of the sandbox's infra container, and
	// the config of its image (nil: the embedded pause).
	Acquire(ctx context.Context, sandboxID string, uids, gids []specs.LinuxIDMapping) (InfraImage, error)
	// Release gives it back; it may be called without Acquire, and again.
	Release(ctx context.Context, sandboxID string) error
}

// Records keep what must outlive the daemon; *state.Store does.
type Records interface {
	Put(kind state.Kind, id string, value []byte) error
	Delete(kind state.Kind, id string) error
	Take(kind state.Kind) map[string][]byte
}

// Config is what a Manager is made of.
type Config struct {
	// RunDir holds the pods' /dev/shm, e.g. /run/podshim/sandboxes; RootDir the
	// files that containers may write to, e.g. /var/lib/podshim/sandboxes.
	RunDir, RootDir string
	// NetnsDir is where network namespaces are pinned, e.g. /run/netns.
	NetnsDir string
	// CgroupParent holds the cgroups of pods whose client named none.
	CgroupParent string
	// OperationLimit bounds Run and Stop, which no client's deadline does.
	OperationLimit time.Duration

	Host     spec.Host
	Handlers map[string]spec.Handler
	Records  Records
	Monitor  Monitor
	Network  Network
	Infra    InfraRoot
	// Changed is called, if set, after a sandbox has got a new record, or nil
	// when it was removed; it must not block.
	Changed func(before, after *Record)
	Log     *logrus.Entry
}

// Manager holds all sandboxes.
type Manager struct {
	Config

	ops     keylock.Locker
	flights flight.Group

	mu    sync.RWMutex // guards what follows
	byID  map[string]*Sandbox
	names map[string]string // reserved name to ID

	// unreadable are the IDs of records that make no sense: what they stand for
	// may run, and is nobody else's.
	unreadable map[string]bool

	janitor *janitor.Janitor
}

// NewManager reads the records and compares them with what the monitor still
// runs. Sandboxes whose making was interrupted are released in the background.
func NewManager(cfg Config) (*Manager, error) {
	m := &Manager{
		Config:     cfg,
		byID:       make(map[string]*Sandbox),
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
// then the next podshim finds on record. Sandboxes go on.
func (m *Manager) Close(ctx context.Context) error {
	m.janitor.Close()
	return m.flights.Wait(ctx)
}

func (m *Manager) load() error {
	running := make(map[string]monitor.Status)
	for _, s := range m.Monitor.List() {
		running[s.ID] = s
	}
	for id, raw := range m.Records.Take(state.Sandboxes) {
		r, err := decode(raw)
		if err != nil {
			m.Log.WithError(err).WithField("sandbox", id).Error("a sandbox's record cannot be read: what it stands for is left alone")
			m.unreadable[id] = true
			continue
		}
		s := newSandbox(r)
		m.byID[id] = s
		if !r.Failed && r.State != Creating {
			m.names[r.Name] = id
		}
		switch r.State {
		case Creating:
			err = m.update(s, func(r *Record) {
				r.State, r.Failed, r.Reason = NotReady, true, "podshim was stopped while it made this sandbox"
			})
		case Ready:
			err = m.recheck(s, running)
		}
		if err != nil {
			return err
		}
		if r.ProcessLabel != "" {
			selinux.ReserveLabel(r.ProcessLabel) // no new pod may get the same one
		}
	}
	return nil
}

// recheck brings a sandbox that was ready up to what happened meanwhile.
func (m *Manager) recheck(s *Sandbox, running map[string]monitor.Status) error {
	r := s.Get()
	status, known := running[r.ID]
	if known && status.Exit == nil {
		return nil
	}
	return m.update(s, func(r *Record) {
		r.State = NotReady
		r.Reason = "the infra container ended while podshim was not running"
		r.InfraExit = status.Exit
		if r.InfraExit == nil {
			r.InfraExit = &monitor.Exit{At: time.Now()}
		}
	})
}

// Get returns the sandbox with this ID or unique prefix of an ID.
// Sandboxes that are being made are not there yet.
func (m *Manager) Get(id string) (*Sandbox, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return ids.Find(m.byID, id, "pod sandbox", (*Sandbox).shown)
}

// List returns all sandboxes that are ready or not, in no order.
func (m *Manager) List() []*Record {
	m.mu.RLock()
	defer m.mu.RUnlock()
	all := make([]*Record, 0, len(m.byID))
	for _, s := range m.byID {
		if s.shown() {
			all = append(all, s.Get())
		}
	}
	return all
}

// Networked returns the pods whose network is not given back yet, for the CNI
// plugins to know what of theirs is still in use.
func (m *Manager) Networked() []cni.Pod {
	m.mu.RLock()
	defer m.mu.RUnlock()
	var pods []cni.Pod
	for _, s := range m.byID {
		r := s.Get()
		if r.HostNetwork() || r.Released {
			continue
		}
		if pod, err := cniPod(r); err == nil {
			pods = append(pods, pod)
		}
	}
	return pods
}

// Owns tells whether id is a sandbox, also one that is being made or whose record
// cannot be read.
func (m *Manager) Owns(id string) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.byID[id] != nil || m.unreadable[id]
}

// Unreadable tells whether there are records that cannot be read: then nobody
// knows all that the pods of this node hold.
func (m *Manager) Unreadable() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return len(m.unreadable) > 0
}

// Exited takes note that an infra container has ended.
func (m *Manager) Exited(ctx context.Context, e monitor.Event) error {
	unlock, err := m.ops.Lock(ctx, e.ID)
	if err != nil {
		return err
	}
	defer unlock()
	m.mu.RLock()
	s := m.byID[e.ID]
	m.mu.RUnlock()
	if s == nil || s.Get().State != Ready {
		return nil
	}
	m.Log.WithFields(logrus.Fields{"sandbox": e.ID, "pod": s.Get().Name, "code": e.Exit.Code}).
		Warn("infra container ended: the pod is not ready")
	return m.transition(s, NotReady, func(r *Record) {
		r.InfraExit = &e.Exit
		r.Reason = "the infra container ended"
	})
}

// next holds every legal move; there is none to Creating.
var next = map[State][]State{
	Creating: {Ready, NotReady},
	Ready:    {NotReady},
}

// transition moves a sandbox on. Its lock is held.
func (m *Manager) transition(s *Sandbox, to State, edit func(*Record)) error {
	from := s.Get().State
	for _, legal := range next[from] {
		if legal == to {
			return m.update(s, func(r *Record) {
				r.State = to
				if edit != nil {
					edit(r)
				}
			})
		}
	}
	return fmt.Errorf("pod sandbox %s cannot go from %s to %s: %w", s.Get().ID, from, to, errdefs.ErrFailedPrecondition)
}

// update edits a copy of the record, saves it, and only then publishes it:
// memory is never ahead of what a restart would find.
//
// The one exception is a sandbox's end. That is a fact, not a wish, and on a full
// disk too a pod must be seen to have ended and be removable. A restart finds it
// out again, from podmon and by releasing once more.
func (m *Manager) update(s *Sandbox, edit func(*Record)) error {
	before := s.Get()
	after := before.clone()
	edit(after)
	raw, err := after.encode()
	if err == nil {
		err = m.Records.Put(state.Sandboxes, after.ID, raw)
	}
	if err != nil && after.State != NotReady {
		return err
	}
	if err != nil {
		m.Log.WithError(err).WithField("sandbox", after.ID).Error("the end of a pod sandbox could not be recorded")
	}
	s.record.Store(after)
	if m.Changed != nil {
		m.Changed(before, after)
	}
	return nil
}

// dir is where the sandbox's own files are; shm where its /dev/shm is mounted.
// Containers may write to the files, so they are not in the run directory, which
// podshim's own records must have room in.
func (m *Manager) dir(id string) string { return filepath.Join(m.RootDir, id) }
func (m *Manager) shm(id string) string { return filepath.Join(m.RunDir, id) }
