package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const (
	// stagingDir, under the root, holds what pulls are unpacking. What an earlier
	// process left there is garbage.
	stagingDir = "unpack"
	// stagePrefix is that of a layer's key until its transaction's end.
	stagePrefix = "unpack/"
)

// layers is who works on which layer and who counts on it.
type layers struct {
	mu   sync.Mutex
	pins map[digest.Digest]int           // by chain ID: pulls that must find the layer
	jobs map[digest.Digest]chan struct{} // by chain ID: closed when its unpacking has ended
}

func newLayers() layers {
	return layers{pins: map[digest.Digest]int{}, jobs: map[digest.Digest]chan struct{}{}}
}

// pin keeps the chain's layers from being collected until the returned function
// is called.
func (l *layers) pin(chain []digest.Digest) (unpin func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range chain {
		l.pins[c]++
	}
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, c := range chain {
			if l.pins[c]--; l.pins[c] == 0 {
				delete(l.pins, c)
			}
		}
	}
}

// begin makes the caller the one who unpacks the layer, until it calls done, or
// tells it whom to wait for. done is nil when somebody else does it.
func (l *layers) begin(chain digest.Digest) (done func(), wait <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if job, ok := l.jobs[chain]; ok {
		return nil, job
	}
	job := make(chan struct{})
	l.jobs[chain] = job
	return func() {
		l.mu.Lock()
		delete(l.jobs, chain)
		l.mu.Unlock()
		close(job)
	}, nil
}

// snapshotDir is where the overlay snapshotter has the snapshot with a number; what
// it adds to its parent is in fs.
func (s *Store) snapshotDir(id string) string {
	return filepath.Join(s.cfg.Root, "snapshots", id)
}

// layerDir returns the directory that holds what the snapshot adds to its parent.
// errdefs.ErrNotFound when there is no such snapshot.
func (s *Store) layerDir(ctx context.Context, key string) (dir string, err error) {
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, _, _, err := storage.GetInfo(ctx, key)
		dir = filepath.Join(s.snapshotDir(id), "fs")
		return err
	})
	return dir, err
}

// hasLayer tells whether a layer is committed, and if so whether it is damaged.
func (s *Store) hasLayer(ctx context.Context, chain digest.Digest) (has, damaged bool, err error) {
	err = s.verifyLayer(ctx, chain)
	switch {
	case errdefs.IsNotFound(err):
		s.verifier.trust(chain) // there is no such layer yet
		return false, false, nil
	case errdefs.IsDataLoss(err):
		return true, true, nil
	}
	return err == nil, false, err
}

// snapshotInfos returns all snapshots' infos.
func (s *Store) snapshotInfos(ctx context.Context) (infos []snapshots.Info, err error) {
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(_ context.Context, i snapshots.Info) error {
			infos = append(infos, i)
			return nil
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	return infos, nil
}

// collect removes every layer that no image, no pull in flight and no other
// snapshot needs.
func (s *Store) collect(ctx context.Context) error {
	infos, err := s.snapshotInfos(ctx)
	if err != nil {
		return err
	}
	isParent := map[string]bool{}
	for _, i := range infos {
		isParent[i.Parent] = true
	}
	var errs []error
	for _, i := range infos {
		if i.Kind == snapshots.KindCommitted && !isParent[i.Name] {
			errs = append(errs, s.collectFrom(ctx, i.Name))
		}
	}
	return errors.Join(errs...)
}

// collectFrom removes the layer called name if nothing needs it, then its parent,
// and so on.
func (s *Store) collectFrom(ctx context.Context, name string) error {
	for name != "" {
		parent, removed, err := s.collectOne(ctx, name)
		if err != nil {
			return fmt.Errorf("collect layer %s: %w", name, err)
		}
		if !removed {
			return nil
		}
		name = parent
	}
	return nil
}

func (s *Store) collectOne(ctx context.Context, name string) (parent string, removed bool, err error) {
	chain := digest.Digest(name)
	s.layers.mu.Lock()
	defer s.layers.mu.Unlock()
	if s.layers.pins[chain] > 0 || s.index.uses(chain) {
		return "", false, nil
	}
	info, err := s.sn.Stat(ctx, name)
	if err == nil {
		err = s.sn.Remove(ctx, name)
	}
	switch {
	case err == nil:
		return info.Parent, true, nil
	case errdefs.IsNotFound(err), errdefs.IsFailedPrecondition(err): // gone, or has children
		return "", false, nil
	}
	return "", false, err
}

// free deletes the directories of removed snapshots. Those that cannot be deleted
// now the sweeper tries again.
func (s *Store) free(ctx context.Context) error {
	dirs, err := s.removedDirs(ctx)
	if err != nil {
		return fmt.Errorf("free removed snapshots: %w", err)
	}
	var errs []error
	for _, dir := range dirs {
		errs = append(errs, os.RemoveAll(dir))
	}
	if err := errors.Join(errs...); err != nil {
		s.log.WithError(err).Warn("removed snapshots could not be deleted: will be tried again")
		time.AfterFunc(retrySweep, s.sweep.ask)
	}
	return nil
}

// retrySweep is how long the sweeper waits after a failure.
const retrySweep = 10 * time.Second

// removedDirs lists the directories of snapshots that there are no more.
func (s *Store) removedDirs(ctx context.Context) (left []string, err error) {
	root := filepath.Join(s.cfg.Root, "snapshots")
	// For writing, so that no snapshot is being made; but nothing is written, and the
	// disk not waited for.
	err = s.meta.WithTransaction(ctx, !s.readOnly, func(ctx context.Context) error {
		known, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		dirs, err := os.ReadDir(root)
		for _, d := range dirs {
			if _, ok := known[d.Name()]; !ok {
				left = append(left, filepath.Join(root, d.Name()))
			}
		}
		return cmp.Or(err, errNothingChanged)
	})
	if errors.Is(err, errNothingChanged) {
		err = nil
	}
	return left, err
}

// sweeps are the removals whose directories are not deleted yet. Most are left
// to the sweeper: a container with a million files is removed as fast as one with
// none.
type sweeps struct {
	wake chan struct{} // holds one token while something is queued

	mu      sync.Mutex // guards what follows
	last    uint64
	pending map[uint64]bool // by number
	queued  []uint64        // those for the sweeper
	changed chan struct{}   // closed and replaced when pending shrinks
}

func newSweeps() sweeps {
	return sweeps{wake: make(chan struct{}, 1), pending: map[uint64]bool{}, changed: make(chan struct{})}
}

// begin counts a sweep that the caller does itself, and ends with finish.
func (w *sweeps) begin() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last++
	w.pending[w.last] = true
	return w.last
}

// ask leaves it to the sweeper.
func (w *sweeps) ask() {
	n := w.begin()
	w.mu.Lock()
	w.queued = append(w.queued, n)
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default: // asked already, and not begun
	}
}

// take returns what the sweeper is asked for.
func (w *sweeps) take() []uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	taken := w.queued
	w.queued = nil
	return taken
}

func (w *sweeps) finish(numbers ...uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, n := range numbers {
		delete(w.pending, n)
	}
	close(w.changed)
	w.changed = make(chan struct{})
}

// newest is the number of the last sweep begun.
func (w *sweeps) newest() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// wait returns when every sweep up to a number has ended.
func (w *sweeps) wait(ctx context.Context, upTo uint64) error {
	for {
		w.mu.Lock()
		busy, changed := false, w.changed
		for n := range w.pending {
			busy = busy || n <= upTo
		}
		w.mu.Unlock()
		if !busy {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// collectHeld collects layers, and deletes what is collected before it returns.
// freeing is held for reading, and let go of before anything is deleted.
func (s *Store) collectHeld(ctx context.Context) error {
	err := s.collect(ctx)
	sweep := s.sweep.begin()
	s.freeing.RUnlock()
	defer s.sweep.finish(sweep)
	return errors.Join(err, s.free(ctx))
}

// sweepPause is how long the sweeper waits for more of what it was asked for: each
// of its transactions costs the disk as much as many removals in one, and holds up
// those that somebody waits for.
const sweepPause = 200 * time.Millisecond

// sweepRetry is how long it waits after a failure.
const sweepRetry = time.Second

func (s *Store) sweepLoop() {
	ctx := s.quiet(context.Background())
	for {
		select {
		case <-s.closing:
			select {
			case <-s.sweep.wake: // what was removed just before is freed as well
			default:
				return
			}
		case <-s.sweep.wake:
			select {
			case <-s.closing:
			case <-time.After(sweepPause):
			}
		}
		asked := s.sweep.take()
		if err := errors.Join(s.removeDiscarded(ctx), s.free(ctx)); err != nil {
			s.log.WithError(err).Warn("removed snapshots, or their disk space, are not all given back: will be tried again")
			time.AfterFunc(sweepRetry, s.sweep.ask)
		}
		s.sweep.finish(asked...)
	}
}
