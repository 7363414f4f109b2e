package monitor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

const (
	// retryStart is the pause between attempts to start a podmon, and to hand
	// containers over.
	retryStart = time.Second
	// adoptAttempts is how often a running container is offered before it is
	// killed: a minute is enough for descriptors or memory to become free again.
	adoptAttempts = 60
	// moveAttempts is how often an upgrade offers a container that the old podmon
	// has let go of.
	moveAttempts = 10
	// removeLimit is how long removing what nobody can hold may hold others up;
	// Delete tries again.
	removeLimit = 10 * time.Second
)

// reconnect finds the podmons that are alive. The directories of dead ones are
// kept until their containers, whose output may be in a journal there, have moved.
// One that cannot be talked to is killed: were it taken for dead, two podmons
// would read the same output.
func (m *Monitor) reconnect(ctx context.Context) error {
	root := filepath.Join(m.o.RunDir, "podmon")
	alive, err := findPodmons(m.o.RunDir)
	if err != nil {
		return fmt.Errorf("look for podmons: %w", err)
	}
	for name, p := range alive {
		if err := awaitSocket(ctx, filepath.Join(root, name), p); err != nil {
			m.log.WithError(err).WithField("podmon", name).Error("podmon runs without its socket")
		}
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		l, err := m.dialPatiently(ctx, e.Name(), dir, pidIn(dir))
		if err == nil {
			err = m.welcome(ctx, l)
		}
		if err == nil {
			m.admit(l, !l.Retiring)
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		m.log.WithError(err).WithField("podmon", e.Name()).Info("podmon is gone")
		if err := killFound(ctx, dir, alive[e.Name()]); err != nil {
			return fmt.Errorf("podmon %s does not answer: %w", e.Name(), err)
		}
		if l != nil {
			l.close()
			m.fallen = append(m.fallen, l)
		}
		m.remains = append(m.remains, dir)
	}
	return nil
}

// dialPatiently gives up on a podmon that accepts and hangs.
func (m *Monitor) dialPatiently(ctx context.Context, name, dir string, pid int) (l *link, err error) {
	err = m.expectAnswer(ctx, pid, func(ctx context.Context) error {
		l, err = dial(ctx, name, dir, m.onExit)
		return err
	})
	return l, err
}

// welcome takes the containers of a podmon over into the Monitor.
func (m *Monitor) welcome(ctx context.Context, l *link) error {
	for _, status := range l.Containers {
		if m.recognize(l, status) {
			continue
		}
		answer, err := l.call(ctx, wire.OpHandles, wire.Ref{ID: status.ID}, nil)
		if errors.Is(err, errdefs.ErrNotFound) {
			continue // deleted meanwhile
		}
		if err != nil {
			return fmt.Errorf("reconnect container %s: %w", status.ID, err)
		}
		h := keep(l, Status{ID: status.ID, Process: status.Process}, answer)
		answer.Close()
		m.mu.Lock()
		m.install(h)
		if status.Exit != nil {
			m.exited(h, Event{ID: status.ID, Exit: *status.Exit})
		}
		m.mu.Unlock()
	}
	return nil
}

// recognize takes in what a podmon says of a container that is held already.
func (m *Monitor) recognize(l *link, status Status) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.held[status.ID]
	if h == nil || h.owner != l {
		return false
	}
	if status.Exit != nil {
		m.exited(h, Event{ID: status.ID, Exit: *status.Exit})
	}
	return true
}

// admit begins to use a podmon, also for new containers if it is to be the current
// one, and watches over it.
func (m *Monitor) admit(l *link, current bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.links[l] = struct{}{}
	if current {
		m.current, m.trouble = l, nil
	}
	m.announce()
	m.work.Go(func() { m.watch(l) })
}

// startPodmon starts a podmon and makes it the current one.
func (m *Monitor) startPodmon(ctx context.Context) error {
	p, err := m.sealedProgram()
	if err != nil {
		return err
	}
	name := newName()
	l, err := spawn(ctx, m.o, p.sealed, p.build, name, filepath.Join(m.o.RunDir, "podmon", name), m.onExit)
	if err != nil {
		return err
	}
	m.started.Add(1)
	m.log.WithField("podmon", name).WithField("pid", l.Process.PID).Info("podmon started")
	m.admit(l, true)
	return nil
}

// outdated tells whether the current podmon runs another program than
// Options.Binary, or makes cgroups in another way.
func (m *Monitor) outdated() bool {
	m.mu.Lock()
	current := m.current
	m.mu.Unlock()
	if current == nil {
		return false
	}
	var st unix.Stat_t
	err := unix.Stat(m.o.Binary, &st)
	if err == nil && m.program.isOf(st) {
		return current.Build != m.program.build || current.SystemdCgroup != m.o.SystemdCgroup
	}
	build, err := buildOf(m.o.Binary)
	if err != nil {
		m.log.WithError(err).Warn("compare podmon with its program")
		return false
	}
	if current.Build == build {
		m.borrowProgram(current.Process, build, st)
	}
	return current.Build != build || current.SystemdCgroup != m.o.SystemdCgroup
}

// watch pings a podmon until it is lost, and then has it replaced.
func (m *Monitor) watch(l *link) {
	tick := time.NewTicker(m.o.PingInterval)
	defer tick.Stop()
	hangs := false
	for {
		select {
		case <-m.ctx.Done():
			return
		case <-l.lost:
			if m.ctx.Err() != nil {
				return // Close dropped the link; podmon stays
			}
			if !hangs && m.redial(l) {
				return
			}
			m.discard(l)
			m.replace(l)
			return
		case <-tick.C:
			if err := trimLog(l.dir); err != nil {
				m.log.WithField("podmon", l.name).WithError(err).Warn("limit podmon's log")
			}
			err := m.expectAnswer(m.ctx, l.Process.PID, l.ping)
			if hangs = errors.Is(err, errHangs); hangs {
				m.log.WithField("podmon", l.name).WithError(err).Warn("podmon does not answer")
				m.unwell(fmt.Errorf("podmon does not answer: %w", err))
				l.fail()
			}
		}
	}
}

// redial connects again to a podmon whose connection broke while it lives, so that
// no healthy one is killed. The containers stay where they are.
func (m *Monitor) redial(l *link) bool {
	again, err := m.dialPatiently(m.ctx, l.name, l.dir, l.Process.PID)
	if err != nil {
		return false
	}
	if again.Process != l.Process {
		again.close()
		return false
	}
	again.cmd = l.cmd
	m.mu.Lock()
	for id, h := range m.held {
		if h.owner != l {
			continue
		}
		h.owner = again
		if s, ok := m.stray[id]; ok && s.from == again {
			delete(m.stray, id)
			m.exited(h, s.Event)
		}
	}
	m.mu.Unlock()
	if err := m.welcome(m.ctx, again); err != nil {
		m.log.WithField("podmon", l.name).WithError(err).Warn("reconnect podmon")
		m.mu.Lock()
		for _, h := range m.held {
			if h.owner == again {
				h.owner = l
			}
		}
		m.mu.Unlock()
		again.close()
		return false
	}
	m.mu.Lock()
	delete(m.links, l)
	// A request that found the link lost may have discarded it already.
	current := m.current == l || m.current == nil && !again.Retiring
	m.mu.Unlock()
	m.admit(again, current)
	l.close()
	m.log.WithField("podmon", l.name).Warn("connection to podmon had broken")
	return true
}

// discard takes a lost podmon out of the routes: requests to its containers wait.
func (m *Monitor) discard(l *link) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.links, l)
	if m.current == l {
		m.current = nil
		if m.trouble == nil {
			m.trouble, m.troubled = errLost, time.Now()
		}
	}
}

// unwell notes why there is no podmon that answers.
func (m *Monitor) unwell(why error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.trouble == nil {
		m.troubled = time.Now()
	}
	m.trouble = why
}

// Health is nil when new containers can be started: there is a podmon, and it is not
// known to hang. Otherwise it says since when not and why.
func (m *Monitor) Health() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed:
		return fmt.Errorf("monitor is closed: %w", errdefs.ErrUnavailable)
	case m.current != nil:
		return nil
	default:
		return fmt.Errorf("no podmon since %s: %w", m.troubled.Format(time.RFC3339), m.trouble)
	}
}

// replace makes sure that a lost podmon is dead, starts another one where
// there is none, and hands the containers over.
func (m *Monitor) replace(l *link) {
	for {
		err := l.kill(m.ctx)
		if err == nil {
			break
		}
		m.log.WithField("podmon", l.name).WithError(err).Error("lost podmon is not dead")
		if !m.pause() {
			l.close()
			return
		}
	}
	l.close()
	close(l.killed)
	m.log.WithField("podmon", l.name).Warn("podmon has ended; containers run on, and what it held goes to another podmon")
	m.handOver(l)
}

// bury removes the directory of a podmon that holds nothing any more, and tells
// what it has said last: a panic, if it died of one.
func (m *Monitor) bury(dir string) {
	words, err := lastWords(dir)
	if err != nil {
		m.log.WithError(err).Warn("read podmon's log")
	}
	if words != "" {
		m.log.WithField("podmon", filepath.Base(dir)).Warnf("end of the log of a podmon that is gone:\n%s", words)
	}
	if err := os.RemoveAll(dir); err != nil {
		m.log.WithError(err).Warn("remove podmon's directory")
	}
}

// pause waits before another attempt; false when the Monitor is closed.
func (m *Monitor) pause() bool {
	select {
	case <-m.ctx.Done():
		return false
	case <-time.After(retryStart):
		return true
	}
}

// handOver gives all containers of a dead podmon to the current one, which is
// started if need be. It goes on until all have moved or ended, and lets others
// change the current podmon between its attempts.
func (m *Monitor) handOver(from *link) {
	select {
	case <-from.killed: // or two would read the same output
	case <-m.ctx.Done():
		return
	}
	for attempt := 1; m.ctx.Err() == nil; attempt++ {
		err := m.tryHandOver(from)
		if err == nil {
			m.bury(from.dir)
			return
		}
		m.log.WithError(err).WithField("attempt", attempt).Error("hand containers over")
		m.unwell(err)
		if attempt >= adoptAttempts {
			m.endAll(from)
		}
		m.pause()
	}
}

func (m *Monitor) tryHandOver(from *link) error {
	m.upgrading.Lock()
	defer m.upgrading.Unlock()
	if err := m.ensureCurrent(m.ctx); err != nil {
		return err
	}
	return errors.Join(m.adoptAll(m.ctx, from), m.adoptOrphans(m.ctx))
}

// endAll kills the containers that no podmon could take over: kubelet can start
// them anew, and can do nothing with one that nobody holds.
func (m *Monitor) endAll(from *link) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, h := range m.held {
		if h.owner != from || h.pidfd < 0 {
			continue
		}
		m.log.WithField("container", id).Error("no podmon can take the container over; killing it")
		if err := unix.PidfdSendSignal(h.pidfd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
			m.log.WithField("container", id).WithError(err).Error("kill container")
		}
	}
}

func (m *Monitor) ensureCurrent(ctx context.Context) error {
	m.mu.Lock()
	current := m.current
	m.mu.Unlock()
	if current != nil {
		return nil
	}
	return m.startPodmon(ctx)
}

// adoptAll moves every container of from, which reads none of them any more.
func (m *Monitor) adoptAll(ctx context.Context, from *link) error {
	return m.adoptEach(ctx, m.heldBy(from))
}

// adopters is how many containers are adopted at once: none waits for another one that is
// hard to take over, and those that a request waits for do not share the CPU with all.
const adopters = 8

// adoptEach adopts containers, first those that somebody waits for. None fails with
// another one.
func (m *Monitor) adoptEach(ctx context.Context, ids []string) error {
	var mu sync.Mutex // guards what is left of ids, and errs
	var errs []error
	next := func() (string, bool) {
		mu.Lock()
		defer mu.Unlock()
		if len(ids) == 0 {
			return "", false
		}
		i := max(0, slices.IndexFunc(ids, m.isAwaited))
		id := ids[i]
		ids = slices.Delete(ids, i, i+1)
		return id, true
	}
	var wg sync.WaitGroup
	for range min(adopters, len(ids)) {
		wg.Go(func() {
			for id, ok := next(); ok; id, ok = next() {
				if err := m.adopt(ctx, id); err != nil {
					mu.Lock()
					errs = append(errs, err)
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// isAwaited tells whether a request waits for a container's podmon.
func (m *Monitor) isAwaited(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.awaited[id] > 0
}

func (m *Monitor) heldBy(l *link) []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	var ids []string
	for id, h := range m.held {
		if h.owner == l {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// adoptOrphans hands over what is on record and held by no podmon: containers
// of a podmon that died while the daemon was away, and those whose start was cut
// short.
func (m *Monitor) adoptOrphans(ctx context.Context) error {
	entries, err := os.ReadDir(filepath.Join(m.o.RunDir, "containers"))
	if err != nil {
		return err
	}
	var orphans []string
	for _, e := range entries {
		m.mu.Lock()
		_, known := m.held[e.Name()]
		_, starting := m.starting[e.Name()]
		m.mu.Unlock()
		if !known && !starting {
			orphans = append(orphans, e.Name())
		}
	}
	return m.adoptEach(ctx, orphans)
}

// adopt gives one container to the current podmon. When it fails, and the
// container runs, everything of it stays held for another attempt.
func (m *Monitor) adopt(ctx context.Context, id string) error {
	m.mu.Lock()
	to, h := m.current, m.held[id]
	if to == nil {
		m.mu.Unlock()
		return errLost
	}
	m.adopting[id]++
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.adopting[id]--; m.adopting[id] <= 0 {
			delete(m.adopting, id)
			delete(m.stray, id)
		}
	}()
	answer, err := to.call(ctx, wire.OpAdopt, wire.Ref{ID: id}, func(msg *wire.Message) error {
		m.mu.Lock()
		defer m.mu.Unlock()
		if h == nil {
			return nil
		}
		return h.offer(msg)
	})
	if errors.Is(err, errLost) || ctx.Err() != nil {
		return err
	}
	if err != nil {
		return m.refused(ctx, to, h, id, err)
	}
	defer answer.Close()
	var status Status
	if err := wire.Decode(answer.Body, &status); err != nil {
		return err
	}
	fresh := keep(to, Status{ID: id, Process: status.Process}, answer)
	m.mu.Lock()
	defer m.mu.Unlock()
	if h != nil {
		fresh.status.Exit = h.status.Exit
		h.close()
	}
	m.install(fresh)
	if status.Exit != nil {
		m.exited(fresh, Event{ID: id, Exit: *status.Exit})
	}
	m.announce()
	return nil
}

// refused settles a container that podmon would not take over. An exit is told
// only of one that is known to have ended.
func (m *Monitor) refused(ctx context.Context, to *link, h *held, id string, cause error) error {
	log := m.log.WithField("container", id).WithError(cause)
	if h == nil {
		if errdefs.IsNotFound(cause) {
			return nil // its start was cut short; podmon has removed it
		}
		// Nobody holds anything of it, so nobody could ever tell of its end.
		log.Error("container cannot be taken over; removing it")
		ctx, cancel := context.WithTimeout(ctx, removeLimit)
		defer cancel()
		if err := to.request(ctx, wire.OpDelete, wire.Ref{ID: id}, nil); err != nil {
			log.WithField("because", err).Error("remove container; Delete will try again")
		}
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if h.status.Exit == nil && h.pidfd >= 0 && !ended(h.pidfd) {
		return fmt.Errorf("adopt %s: %w", id, cause)
	}
	log.Warn("container has ended and cannot be taken over")
	h.owner = m.current
	m.exited(h, Event{ID: id, Exit: Exit{At: time.Now()}})
	m.announce()
	return nil
}

// ended tells whether a pidfd's process is dead.
func ended(pidfd int) bool {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 0)
	return n > 0 && err == nil
}

// Upgrade starts a podmon from Options.Binary and makes it the one for new
// containers. Running containers move to it without a stall of more than
// milliseconds; where the kernel could not tell their exit codes to the new podmon
// (before Linux 6.15) they stay with the old one until they end.
func (m *Monitor) Upgrade(ctx context.Context) (err error) {
	m.upgrading.Lock()
	defer m.upgrading.Unlock()
	m.mu.Lock()
	old := m.current
	m.mu.Unlock()
	if err := m.startPodmon(ctx); err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	if old == nil {
		return nil
	}
	if old.ExitInfo {
		for _, id := range m.heldBy(old) {
			if merr := m.move(ctx, old, id); merr != nil {
				err = errors.Join(err, fmt.Errorf("upgrade: move %s: %w", id, merr))
			}
		}
	}
	// It ends when nothing is left with it, which may be later.
	if rerr := old.request(ctx, wire.OpRetire, struct{}{}, nil); rerr != nil && !errors.Is(rerr, errLost) {
		err = errors.Join(err, fmt.Errorf("upgrade: retire the old podmon: %w", rerr))
	}
	return err
}

// move hands one container from a living podmon to the current one.
func (m *Monitor) move(ctx context.Context, from *link, id string) error {
	// Once released it must arrive, whatever happens to the caller.
	ctx = context.WithoutCancel(ctx)
	m.setMoving(id, true)
	defer m.setMoving(id, false)
	err := from.request(ctx, wire.OpRelease, wire.Ref{ID: id}, nil)
	if errors.Is(err, errLost) {
		return nil // its containers are handed over as those of a dead podmon
	}
	if err != nil && !errors.Is(err, errdefs.ErrNotFound) {
		return err
	}
	for attempt := 1; ; attempt++ {
		if err = m.ensureCurrent(ctx); err == nil {
			err = m.adopt(ctx, id)
		}
		if err == nil || attempt >= moveAttempts || !m.pause() {
			return err
		}
		m.log.WithField("container", id).WithError(err).Warn("move container")
	}
}

// setMoving makes requests to a container wait while it changes hands.
func (m *Monitor) setMoving(id string, moving bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if h := m.held[id]; h != nil {
		h.moving = moving
	}
	m.announce()
}
