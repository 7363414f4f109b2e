// Package monitor is the daemon's side of podmon, the small process that is the
// parent of every container.
//
// One podmon runs as long as containers do, and longer than the daemon. New finds
// the one that is there, or starts one. When it dies or stops answering, it is
// killed for good and another one takes over its containers, which run on:
//
//	podmon 1 ----X                    containers keep running; their output
//	              \                   waits in FIFOs
//	daemon         +-- adopt --> podmon 2
//
// For that the Monitor keeps a pidfd of every container's PID 1, so that its exit
// code can still be had (Linux 6.15), and duplicates of its stdio, so that no pipe
// breaks. It routes each request to the podmon that holds the container; during
// an upgrade there are two.
//
// Errors have the classes of errdefs: NotFound for a container that is not held
// (and, from Signal, for one whose PID 1 is gone), Unavailable when podmon was
// lost in the middle of a request that cannot be repeated safely.
package monitor

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// Options configure a Monitor.
type Options struct {
	// RunDir holds podmon's sockets and the records of containers; 0700, on a tmpfs.
	RunDir string
	// Binary is the path of podmon.
	Binary string
	// SystemdCgroup makes cgroups through systemd instead of cgroupfs.
	SystemdCgroup bool
	// PingInterval is between two looks at whether a podmon answers. PingTimeout is
	// how long one that does nothing may take, PingLimit one that works or waits for
	// a CPU; it is replaced then. Zero is 1 s, 2 s and 30 s.
	PingInterval, PingTimeout, PingLimit time.Duration
	Log                                  *logrus.Entry
}

// ErrNoExecutable and ErrNotExecutable are in the chain of Start's and Exec's
// errors when the program to run does not exist (a shell would say 127) or
// cannot be executed (126). Both are errdefs.ErrInvalidArgument.
var (
	ErrNoExecutable  = fmt.Errorf("executable not found: %w", errdefs.ErrInvalidArgument)
	ErrNotExecutable = fmt.Errorf("not executable: %w", errdefs.ErrInvalidArgument)
)

// Monitor runs containers through podmon.
type Monitor struct {
	o      Options
	log    *logrus.Entry
	events *queue
	ctx    context.Context // of background work; ended by Close
	cancel context.CancelFunc
	work   sync.WaitGroup

	started atomic.Uint64 // podmons, by this daemon
	remains []string      // directories of podmons that New found dead, or killed
	fallen  []*link       // those of them that had told of their containers

	// upgrading is held while the current podmon changes, not for requests.
	upgrading sync.Mutex
	program   *program // nil until it is needed

	mu       sync.Mutex
	closed   bool
	current  *link // nil while there is none
	trouble  error // why there is none
	troubled time.Time
	links    map[*link]struct{}
	held     map[string]*held
	starting map[string]struct{}
	adopting map[string]int // requests underway
	awaited  map[string]int // requests that wait for a container's podmon
	// stray are exits that came before the container was on record as their
	// podmon's: answers and events are handled by different goroutines.
	stray   map[string]stray
	changed chan struct{} // closed and replaced when routes change
}

type stray struct {
	from *link
	Event
}

// held is a container as the daemon knows it.
type held struct {
	owner  *link
	moving bool // to another podmon; requests wait
	status Status
	// Descriptors by number, -1 is none; see wire.Message.
	pidfd, stdin, console, stdout, stderr int
}

// New connects to every podmon that is alive in RunDir and takes over what dead
// ones left, or starts the first one. A podmon that is not the program at Binary, or
// was started for another cgroup driver, is replaced as Upgrade does. Exits that happened meanwhile are in List
// and come as Events.
func New(ctx context.Context, o Options) (_ *Monitor, err error) {
	for limit, usual := range map[*time.Duration]time.Duration{
		&o.PingInterval: time.Second, &o.PingTimeout: 2 * time.Second, &o.PingLimit: 30 * time.Second,
	} {
		if *limit == 0 {
			*limit = usual
		}
	}
	if o.Log == nil {
		o.Log = logrus.NewEntry(logrus.StandardLogger())
	}
	for _, dir := range []string{o.RunDir, filepath.Join(o.RunDir, "podmon"), filepath.Join(o.RunDir, "containers")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	m := &Monitor{
		o: o, log: o.Log, events: newQueue(),
		links: map[*link]struct{}{}, held: map[string]*held{},
		starting: map[string]struct{}{}, stray: map[string]stray{}, adopting: map[string]int{}, awaited: map[string]int{},
		changed: make(chan struct{}),
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Dismiss(context.WithoutCancel(ctx)), m.Close())
		}
	}()
	if err := m.reconnect(ctx); err != nil {
		return nil, err
	}
	m.upgrading.Lock()
	err = m.ensureCurrent(ctx)
	m.upgrading.Unlock()
	if err != nil {
		return nil, err
	}
	for _, l := range m.fallen {
		if err := m.adoptAll(ctx, l); err != nil {
			return nil, err
		}
	}
	if err := m.adoptOrphans(ctx); err != nil {
		return nil, err
	}
	for _, dir := range m.remains {
		m.bury(dir)
	}
	m.upgrading.Lock()
	outdated := m.outdated()
	m.upgrading.Unlock()
	if outdated {
		// What does not move stays with the old podmon, which does for it.
		if err := m.Upgrade(ctx); err != nil {
			m.log.WithError(err).Warn("replace podmon by the one that is installed")
		}
	}
	return m, nil
}

// Close drops the connections; podmon and the containers go on.
func (m *Monitor) Close() error {
	m.cancel()
	m.mu.Lock()
	m.closed = true
	links := m.links
	m.links = map[*link]struct{}{}
	m.announce()
	m.mu.Unlock()
	for l := range links {
		l.fail()
	}
	m.work.Wait()
	for l := range links {
		l.close()
	}
	m.events.close()
	m.upgrading.Lock()
	if m.program != nil {
		m.program.sealed.Close()
	}
	m.upgrading.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, h := range m.held {
		h.close()
		delete(m.held, id)
	}
	return nil
}

// Dismiss ends a podmon that this Monitor has started, and that holds nothing: who starts
// podshim in vain leaves none behind. Nobody replaces it; only Close may follow.
func (m *Monitor) Dismiss(ctx context.Context) error {
	m.mu.Lock()
	l := m.current
	idle := m.Started() > 0 && len(m.held)+len(m.starting) == 0
	m.mu.Unlock()
	if l == nil || !idle {
		return nil
	}
	m.cancel() // those who would replace it
	if err := l.request(ctx, wire.OpRetire, struct{}{}, nil); err != nil {
		return fmt.Errorf("dismiss podmon: %w", err)
	}
	return nil
}

// spawn runs f in the background; Close waits for it. False when the Monitor is closed.
func (m *Monitor) spawn(f func()) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return false
	}
	m.work.Go(f)
	return true
}

// announce wakes those who wait for a route; mu is held.
func (m *Monitor) announce() {
	close(m.changed)
	m.changed = make(chan struct{})
}

func (h *held) close() {
	for _, fd := range []*int{&h.pidfd, &h.stdin, &h.console, &h.stdout, &h.stderr} {
		closeFd(fd)
	}
}

func closeFd(fd *int) {
	if *fd >= 0 {
		unix.Close(*fd)
	}
	*fd = -1
}

// keep makes a held container of an answer's descriptors.
func keep(owner *link, status Status, answer *wire.Message) *held {
	return &held{
		owner: owner, status: status,
		pidfd: answer.Fd(wire.FilePidfd), stdin: answer.Fd(wire.FileStdin), console: answer.Fd(wire.FileConsole),
		stdout: answer.Fd(wire.FileStdout), stderr: answer.Fd(wire.FileStderr),
	}
}

// offer adds the descriptors to a message, so that another podmon goes on with them.
func (h *held) offer(m *wire.Message) error {
	return errors.Join(
		m.AttachFd(wire.FilePidfd, h.pidfd), m.AttachFd(wire.FileStdin, h.stdin),
		m.AttachFd(wire.FileConsole, h.console),
		m.AttachFd(wire.FileStdout, h.stdout), m.AttachFd(wire.FileStderr, h.stderr),
	)
}

// Start creates and starts a container. When ctx ends first, or podmon is lost
// (Unavailable), the container may exist all the same; Delete removes it.
func (m *Monitor) Start(ctx context.Context, r StartRequest) (Process, error) {
	m.mu.Lock()
	_, starting := m.starting[r.ID]
	if m.held[r.ID] != nil || starting {
		m.mu.Unlock()
		return Process{}, fmt.Errorf("start: container %s: %w", r.ID, errdefs.ErrAlreadyExists)
	}
	m.starting[r.ID] = struct{}{}
	m.mu.Unlock()
	h, err := m.start(ctx, r)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.starting, r.ID)
	if err != nil {
		delete(m.stray, r.ID)
		return Process{}, err
	}
	if m.closed {
		h.close()
		return h.status.Process, nil
	}
	m.install(h)
	delete(m.stray, r.ID)
	// A link that was lost meanwhile has been handed over without this one.
	if _, alive := m.links[h.owner]; !alive {
		m.work.Go(func() { m.handOver(h.owner) })
	}
	return h.status.Process, nil
}

func (m *Monitor) start(ctx context.Context, r StartRequest) (*held, error) {
	l, err := m.route(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	answer, err := l.call(ctx, wire.OpStart, r, nil)
	if err != nil {
		return nil, err
	}
	defer answer.Close()
	status := Status{ID: r.ID}
	if err := wire.Decode(answer.Body, &status.Process); err != nil {
		return nil, err
	}
	return keep(l, status, answer), nil
}

// route returns the podmon that holds a container, the current one for no ID or
// an unknown one, and waits while it is being replaced.
func (m *Monitor) route(ctx context.Context, id string) (*link, error) {
	for {
		m.mu.Lock()
		if m.closed {
			m.mu.Unlock()
			return nil, fmt.Errorf("monitor is closed: %w", errdefs.ErrUnavailable)
		}
		l, moving := m.current, false
		if h := m.held[id]; h != nil {
			l, moving = h.owner, h.moving
		}
		_, alive := m.links[l]
		changed := m.changed
		if alive && !moving {
			m.mu.Unlock()
			return l, nil
		}
		m.awaited[id]++
		m.mu.Unlock()
		var err error
		select {
		case <-changed:
		case <-ctx.Done():
			err = fmt.Errorf("wait for podmon: %w", ctx.Err())
		}
		m.mu.Lock()
		if m.awaited[id]--; m.awaited[id] == 0 {
			delete(m.awaited, id)
		}
		m.mu.Unlock()
		if err != nil {
			return nil, err
		}
	}
}

// do is ask without a result.
func (m *Monitor) do(ctx context.Context, id, op string, body any) error {
	return m.ask(ctx, id, op, body, nil)
}

// ask sends a request that may safely be sent twice, and sends it again when its
// podmon is lost.
func (m *Monitor) ask(ctx context.Context, id, op string, body, result any) error {
	for {
		l, err := m.route(ctx, id)
		if err != nil {
			return err
		}
		err = l.request(ctx, op, body, result)
		if !errors.Is(err, errLost) {
			return err
		}
		m.discard(l)
	}
}

func (m *Monitor) known(id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.held[id] == nil {
		return fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	return nil
}

// Signal sends sig to PID 1, or to every process of the container. SIGKILL to all
// returns when none is left, or with ctx's error.
func (m *Monitor) Signal(ctx context.Context, id string, sig syscall.Signal, all bool) error {
	if err := m.known(id); err != nil {
		return err
	}
	return m.do(ctx, id, wire.OpSignal, wire.Signal{ID: id, Signal: int(sig), All: all})
}

// Delete kills what is left of a container and removes all of it. The gone, and
// the never started, is success. It returns after the exit event, if there is
// still one to come, is queued.
func (m *Monitor) Delete(ctx context.Context, id string) error {
	var status Status
	if err := m.ask(ctx, id, wire.OpDelete, wire.Ref{ID: id}, &status); err != nil {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if h := m.held[id]; h != nil {
		if status.Exit != nil {
			m.exited(h, Event{ID: id, Exit: *status.Exit})
		}
		h.close()
		delete(m.held, id)
	}
	delete(m.stray, id)
	return nil
}

// Attach copies output until the container ends (nil), the reader is cut off because
// it is too slow or has gone (Aborted), podmon is lost or replaced (Unavailable:
// attach again), or ctx ends (then its error). The caller closes the files when it
// has returned; that is the reader's end of file. A reader that goes away is noticed
// with the next output, so the caller ends ctx then.
func (m *Monitor) Attach(ctx context.Context, r AttachRequest) error {
	if err := m.known(r.ContainerID); err != nil {
		return err
	}
	l, err := m.route(ctx, r.ContainerID)
	if err != nil {
		return err
	}
	answer, err := l.call(ctx, wire.OpAttach, wire.Ref{ID: r.ContainerID}, func(msg *wire.Message) error {
		return errors.Join(msg.Attach(wire.FileStdout, r.Stdout), msg.Attach(wire.FileStderr, r.Stderr))
	})
	if err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	defer answer.Close()
	var attached wire.Attached
	if err := wire.Decode(answer.Body, &attached); err != nil {
		return err
	}
	if r.Attached != nil {
		r.Attached()
	}
	if err := l.request(ctx, wire.OpAttachWait, attached, nil); err != nil {
		return fmt.Errorf("attach: %w", err)
	}
	return nil
}

// Stdin returns a duplicate of the write end of standard input; the caller
// closes it. FailedPrecondition when the container has none.
func (m *Monitor) Stdin(id string) (*os.File, error) {
	return m.end(id, "stdin", func(h *held) int { return h.stdin })
}

// Console returns a duplicate of the terminal's master (input, resize); the
// caller closes it. FailedPrecondition when the container has none.
func (m *Monitor) Console(id string) (*os.File, error) {
	return m.end(id, "console", func(h *held) int { return h.console })
}

func (m *Monitor) end(id, name string, of func(*held) int) (*os.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.held[id]
	if h == nil {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	fd := of(h)
	if fd < 0 {
		return nil, fmt.Errorf("container %s has no %s: %w", id, name, errdefs.ErrFailedPrecondition)
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", name, err)
	}
	return os.NewFile(uintptr(dup), name), nil
}

// CloseStdin lets the container read end of file once all duplicates are closed too.
func (m *Monitor) CloseStdin(ctx context.Context, id string) error {
	if err := m.known(id); err != nil {
		return err
	}
	m.dropStdin(id)
	err := m.do(ctx, id, wire.OpCloseStdin, wire.Ref{ID: id})
	m.dropStdin(id) // an adoption meanwhile has brought another one
	return err
}

func (m *Monitor) dropStdin(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if h := m.held[id]; h != nil {
		closeFd(&h.stdin)
	}
}

// ReopenLog opens the log's path anew, after a rotation.
func (m *Monitor) ReopenLog(ctx context.Context, id string) error {
	if err := m.known(id); err != nil {
		return err
	}
	return m.do(ctx, id, wire.OpReopenLog, wire.Ref{ID: id})
}

// Started is how many podmons this Monitor has started.
func (m *Monitor) Started() uint64 { return m.started.Load() }

// Update changes a running container's resources, and the oom_score_adj of its
// processes; what r leaves out stays, and the score with a nil adj.
func (m *Monitor) Update(ctx context.Context, id string, r *specs.LinuxResources, adj *int) error {
	if err := m.known(id); err != nil {
		return err
	}
	return m.do(ctx, id, wire.OpUpdate, wire.Update{ID: id, Resources: r, OOMScoreAdj: adj})
}

// List returns every container the monitors hold, the exited ones with their exit.
func (m *Monitor) List() []Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := make([]Status, 0, len(m.held))
	for _, h := range m.held {
		list = append(list, h.status)
	}
	return list
}

// Events delivers the exit of every container, once, and is closed by Close.
func (m *Monitor) Events() <-chan Event { return m.events.out }

// onExit takes an exit from a podmon.
func (m *Monitor) onExit(l *link, e Event) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if h := m.held[e.ID]; h != nil && h.owner == l {
		m.exited(h, e)
		return
	}
	_, starting := m.starting[e.ID]
	_, known := m.links[l] // else its containers are being taken in
	if starting || m.adopting[e.ID] > 0 || !known {
		m.stray[e.ID] = stray{l, e}
	}
}

// install puts a container on record; mu is held.
func (m *Monitor) install(h *held) {
	id := h.status.ID
	m.held[id] = h
	if s, ok := m.stray[id]; ok {
		delete(m.stray, id)
		if s.from == h.owner {
			m.exited(h, s.Event)
		}
	}
}

// exited publishes an exit; mu is held.
func (m *Monitor) exited(h *held, e Event) {
	if h.status.Exit != nil {
		return
	}
	exit := e.Exit
	h.status.Exit = &exit
	h.close()
	m.events.put(e)
}

// newName names a podmon; short, for it is in a socket's path.
func newName() string { return rand.Text()[:8] }
