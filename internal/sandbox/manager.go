package sandbox

import (
	"context"
	"path/filepath"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/janitor"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/roster"
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
	// Acquire returns the root filesystem of the sandbox's infra container, with
	// the pod's SELinux mount label or one that all pods may read, and the config
	// of its image (nil: the embedded pause).
	Acquire(ctx context.Context, sandboxID, label string, uids, gids []specs.LinuxIDMapping) (InfraImage, error)
	// Release gives it back; it may be called without Acquire, and again.
	Release(ctx context.Context, sandboxID string) error
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
	Records  roster.Records
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
	all     *roster.Roster[Record, State]
	flights flight.Group
	janitor *janitor.Janitor
}

// class is what the roster knows of sandboxes.
var class = roster.Class[Record, State]{
	Kind: state.Sandboxes, Noun: "pod sandbox",
	Making: Creating, End: NotReady, Next: next,
	Fields: func(r *Record) roster.Fields[State] {
		return roster.Fields[State]{ID: r.ID, Name: r.Name, State: &r.State, Failed: &r.Failed, Why: &r.Reason}
	},
	Shown:     func(r *Record) bool { return r.State != Creating },
	Encode:    (*Record).encode,
	Decode:    Decode,
	LogFields: func(r *Record) logrus.Fields { return logrus.Fields{"pod": r.Name, "sandbox": r.ID} },
}

// NewManager reads the records and compares them with what the monitor still
// runs. Sandboxes whose making was interrupted are released in the background.
func NewManager(cfg Config) (*Manager, error) {
	m := &Manager{Config: cfg}
	m.flights.Limit = cfg.OperationLimit
	m.all = roster.New(roster.Config[Record, State]{
		Class: class, Records: cfg.Records, Changed: cfg.Changed, Forgotten: releaseLabels, Log: cfg.Log,
	})
	running := make(map[string]monitor.Status)
	for _, s := range m.Monitor.List() {
		running[s.ID] = s
	}
	if err := m.all.Load(func(s *Sandbox) error { return m.recheck(s, running) }); err != nil {
		return nil, err
	}
	for _, s := range m.all.All() {
		reserveLabels(s.Get()) // no new pod may get the same ones
	}
	m.janitor = m.all.StartJanitor(func(r *Record) bool { return r.Failed }, func(ctx context.Context, s *Sandbox) error {
		return m.Remove(ctx, s.Get().ID)
	})
	return m, nil
}

// Close waits until the operations that run are over, or ctx is: what is cut off
// then the next podshim finds on record. Sandboxes go on.
func (m *Manager) Close(ctx context.Context) error {
	m.janitor.Close()
	return m.flights.Wait(ctx)
}

// recheck brings a sandbox that was ready up to what happened meanwhile.
func (m *Manager) recheck(s *Sandbox, running map[string]monitor.Status) error {
	r := s.Get()
	status, known := running[r.ID]
	if r.State != Ready || known && status.Exit == nil {
		return nil
	}
	return m.all.Update(s, func(r *Record) {
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
	return m.all.Get(id)
}

// List returns all sandboxes that are ready or not, in no order.
func (m *Manager) List() []*Record { return m.all.Visible(m.all.All()) }

// Networked returns the pods whose network is not given back yet, for the CNI
// plugins to know what of theirs is still in use. Of those whose records cannot be
// read it has the IDs alone.
func (m *Manager) Networked() []cni.Pod {
	var pods []cni.Pod
	for _, s := range m.all.All() {
		r := s.Get()
		if r.HostNetwork() || r.Released {
			continue
		}
		if pod, err := cniPod(r); err == nil {
			pods = append(pods, pod)
		}
	}
	for _, id := range m.all.Unreadable() {
		pods = append(pods, cni.Pod{ID: id})
	}
	return pods
}

// Owns tells whether id is a sandbox, also one that is being made or whose record
// cannot be read.
func (m *Manager) Owns(id string) bool { return m.all.Owns(id) }

// Exited takes note that an infra container has ended.
func (m *Manager) Exited(ctx context.Context, e monitor.Event) error {
	unlock, err := m.all.Lock(ctx, e.ID)
	if err != nil {
		return err
	}
	defer unlock()
	s := m.all.Exact(e.ID)
	if s == nil || s.Get().State != Ready {
		return nil
	}
	m.log(s.Get()).WithField("code", e.Exit.Code).
		Warn("infra container ended: the pod is not ready")
	return m.all.Move(s, NotReady, func(r *Record) {
		r.InfraExit = &e.Exit
		r.Reason = "the infra container ended"
	})
}

// next holds every legal move; there is none to Creating.
var next = map[State][]State{
	Creating: {Ready, NotReady},
	Ready:    {NotReady},
}

func (m *Manager) log(r *Record) *logrus.Entry { return m.Log.WithFields(class.LogFields(r)) }

// dir is where the sandbox's own files are; shm where its /dev/shm is mounted.
// Containers may write to the files, so they are not in the run directory, which
// podshim's own records must have room in.
func (m *Manager) dir(id string) string { return filepath.Join(m.RootDir, id) }
func (m *Manager) shm(id string) string { return filepath.Join(m.RunDir, id) }
