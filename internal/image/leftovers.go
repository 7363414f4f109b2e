package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
)

// Leftovers are what nothing in the store needs. Collect removes them.
type Leftovers struct {
	// Layers are the chain IDs of layers that no image, no pull in flight and no
	// snapshot needs.
	Layers []string
	// Dirs are directories of snapshots that are in no record.
	Dirs []string
}

// Leftovers looks for what should not be there. What is being removed or made at
// this moment is none.
func (s *Store) Leftovers(ctx context.Context) (Leftovers, error) {
	ctx = s.quiet(ctx)
	// While nobody is between removing a record and freeing what it stood for.
	s.freeing.Lock()
	found, err := s.leftovers(ctx)
	last := s.sweep.newest()
	s.freeing.Unlock()
	if err != nil || len(found.Dirs) == 0 {
		return found, err
	}
	// The sweeper may have these still to remove.
	if err := s.sweep.wait(ctx, last); err != nil {
		return found, err
	}
	again, err := s.removedDirs(ctx)
	found.Dirs = slices.DeleteFunc(found.Dirs, func(dir string) bool { return !slices.Contains(again, dir) })
	return found, err
}

func (s *Store) leftovers(ctx context.Context) (found Leftovers, err error) {
	infos, err := s.snapshotInfos(ctx)
	if err != nil {
		return found, err
	}
	isParent := map[string]bool{}
	for _, i := range infos {
		isParent[i.Parent] = true
	}
	s.layers.mu.Lock()
	for _, i := range infos {
		chain := digest.Digest(i.Name)
		if i.Kind == snapshots.KindCommitted && !isParent[i.Name] && s.layers.pins[chain] == 0 && !s.index.uses(chain) {
			found.Layers = append(found.Layers, i.Name)
		}
	}
	s.layers.mu.Unlock()
	if found.Dirs, err = s.removedDirs(ctx); err != nil {
		return found, fmt.Errorf("look for leftovers of the image store: %w", err)
	}
	return found, nil
}

// Collect removes the leftovers.
func (s *Store) Collect(ctx context.Context) error {
	s.freeing.RLock()
	return s.collectHeld(s.quiet(ctx))
}

// Inspect opens the store for looking only, while no process has it open: Leftovers
// and Snapshots may be called, and Close. Nothing is made or changed; nil is a
// store that is not there yet.
func Inspect(cfg Config) (_ *Store, err error) {
	cfg = withDefaults(cfg)
	path := filepath.Join(cfg.Root, "images.db")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	idx, err := newIndex(cfg.Pinned)
	if err != nil {
		return nil, err
	}
	s := &Store{
		cfg: cfg, log: cfg.Log, libLog: warningsOf(cfg.Log), index: idx, layers: newLayers(),
		closing: make(chan struct{}), sweep: newSweeps(), readOnly: true,
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: openTimeout, ReadOnly: true})
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	s.records = &records{db: db}
	whole, _, err := s.records.load()
	if err != nil {
		return nil, errors.Join(err, s.records.close())
	}
	s.index.set(whole...)
	s.meta, err = storage.NewMetaStore(filepath.Join(cfg.Root, "metadata.db"), func(o *bolt.Options) error {
		o.ReadOnly, o.Timeout = true, openTimeout
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open snapshot records: %w", err), s.records.close())
	}
	return s, nil
}
