package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/version"
	"github.com/fsnotify/fsnotify"
)

const (
	// settle is how long the directory must be quiet before it is read:
	// installers write several files, and each in several steps.
	settle = 100 * time.Millisecond
	// lookAgain is how often the watcher looks for changes that nobody told.
	lookAgain = 2 * time.Second
	// statusAge is how old the plugins' answer to STATUS may be when somebody
	// asks, statusLimit how long they may take to give it.
	statusAge   = 5 * time.Second
	statusLimit = 10 * time.Second
)

// health is the plugins' own answer to STATUS.
type health struct {
	err error
	at  time.Time
}

// watch keeps a Network's view of its directories true. It is used by one
// goroutine.
type watch struct {
	n         *Network
	notify    *fsnotify.Watcher // nil when inotify has no room: then looking again does
	watched   string            // the directory that is being watched
	watchedAs uint64            // and its inode
	seen      string            // signature at the last load
	said      string            // last state that was logged

	asking context.CancelFunc // of the STATUS that runs
	answer chan *health       // its result (buffered: nobody need wait), nil when none runs
}

func newWatch(n *Network) *watch {
	w := &watch{n: n}
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		n.cfg.Log.WithError(err).Warn("no inotify for the CNI directories: looking every 2 s instead")
		return w
	}
	w.notify = notify
	return w
}

// run serves until ctx ends.
func (w *watch) run(ctx context.Context) {
	defer w.close()
	tick := time.NewTicker(lookAgain)
	defer tick.Stop()
	quiet := time.NewTimer(0)
	<-quiet.C
	for {
		var events <-chan fsnotify.Event
		var problems <-chan error
		if w.notify != nil {
			events, problems = w.notify.Events, w.notify.Errors
		}
		select {
		case <-ctx.Done():
			return
		case <-events:
			quiet.Reset(settle)
		case <-problems: // the queue overflowed, as a rule
			quiet.Reset(settle)
		case <-quiet.C:
			w.look(ctx)
		case <-tick.C:
			w.look(ctx)
		case seen := <-w.n.look:
			w.look(ctx)
			close(seen)
		case h := <-w.answer:
			w.answered(h)
		}
	}
}

func (w *watch) close() {
	if w.notify != nil {
		w.notify.Close()
	}
	w.dropAnswer()
}

// dropAnswer kills a STATUS that runs. It is not waited for here: a plugin that
// the kernel cannot kill at once must not keep a new configuration waiting.
func (w *watch) dropAnswer() {
	if w.answer != nil {
		w.asking()
		w.answer = nil
	}
}

// look reloads what has changed, and asks the plugins again if their answer has
// become old and somebody wants to know.
func (w *watch) look(ctx context.Context) {
	if signature(w.n.cfg) != w.seen {
		w.reload(ctx)
		return
	}
	w.follow()
	h := w.n.health.Load()
	if h != nil && time.Since(h.at) > statusAge && w.n.asked.Swap(false) {
		w.ask(ctx)
	}
}

// reload reads the directory. It is watched before it is read, so that no
// change falls in between.
func (w *watch) reload(ctx context.Context) {
	w.follow()
	w.seen = signature(w.n.cfg)
	l := load(w.n.cfg, w.n.runner)
	w.n.current.Store(l)
	w.say(l)
	w.dropAnswer() // it would be about the old configuration
	w.ask(ctx)
}

// say logs what has become of the network, once.
func (w *watch) say(l *loaded) {
	log := w.n.cfg.Log
	if l.err != nil {
		if w.said != l.err.Error() {
			log.WithError(l.err).Warn("pods can get no network")
			w.said = l.err.Error()
		}
		return
	}
	if now := l.list.Name + " from " + l.file; w.said != now {
		log.WithField("network", l.list.Name).WithField("file", l.file).Info("pods get this network")
		w.said = now
	}
}

// follow watches the configuration directory or, while that is missing, the
// nearest directory above it that exists.
func (w *watch) follow() {
	if w.notify == nil {
		return
	}
	dir, ino := nearest(w.n.cfg.ConfDir)
	if dir == w.watched && ino == w.watchedAs {
		return
	}
	if w.watched != "" {
		_ = w.notify.Remove(w.watched) // gone by itself if the directory is
	}
	w.watched, w.watchedAs = "", 0
	if err := w.notify.Add(dir); err == nil {
		w.watched, w.watchedAs = dir, ino
	}
}

func nearest(dir string) (string, uint64) {
	for {
		st, err := os.Stat(dir)
		if err == nil && st.IsDir() {
			return dir, st.Sys().(*syscall.Stat_t).Ino
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return dir, 0
		}
		dir = parent
	}
}

// ask starts STATUS of the plugins, unless one runs. The old answer stands
// until the new one is there. Networks before CNI 1.1 have nothing to ask.
func (w *watch) ask(ctx context.Context) {
	l := w.n.current.Load()
	if w.answer != nil || l.err != nil {
		return
	}
	if has, err := version.GreaterThanOrEqualTo(l.list.CNIVersion, "1.1.0"); err != nil || !has {
		w.n.health.Store(&health{at: time.Now()})
		return
	}
	ctx, w.asking = context.WithTimeout(ctx, statusLimit)
	answer := make(chan *health, 1)
	w.answer = answer
	w.n.done.Go(func() {
		err := w.n.cni.GetStatusNetworkList(ctx, l.list)
		if err != nil {
			var perr *PluginError
			if errors.As(err, &perr) {
				err = perr
			}
			err = fmt.Errorf("network %q (%s): %w", l.list.Name, l.file, err)
		}
		answer <- &health{err: err, at: time.Now()}
	})
}

func (w *watch) answered(h *health) {
	w.asking()
	w.answer = nil
	w.n.health.Store(h)
}
