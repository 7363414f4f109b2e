package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/opencontainers/go-digest"
)

// committer turns one pull's staged layers into snapshots, bottom first. A
// transaction waits for the disk, so one of those whose layer is next commits all
// that are ready on top of it as well; what arrives meanwhile goes into the next.
type committer struct {
	store *Store
	stop  func() bool // detaches the committer from the pull's context

	mu    sync.Mutex
	moved *sync.Cond      // a field below has changed
	ready map[int]*staged // by the layer's place, bottom 0; nil is there already
	next  int             // the lowest layer not committed
	busy  int             // layers [next, busy) are being committed
	err   error           // nothing is committed any more
}

func newCommitter(ctx context.Context, s *Store) *committer {
	c := &committer{store: s, ready: map[int]*staged{}}
	c.moved = sync.NewCond(&c.mu)
	c.stop = context.AfterFunc(ctx, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.fail(context.Cause(ctx))
	})
	return c
}

func (c *committer) fail(err error) {
	if c.err == nil {
		c.err = err
	}
	c.moved.Broadcast()
}

// commit returns when layer i is committed. On error st is the caller's again and
// nobody else uses it.
func (c *committer) commit(ctx context.Context, i int, st *staged) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ready[i] = st
	c.moved.Broadcast()
	for {
		_, turn := c.ready[c.next]
		switch {
		case i < c.next:
			return nil
		case i < c.busy: // somebody has it in hand, whatever else has failed
			c.moved.Wait()
		case c.err != nil:
			return c.err
		case turn && c.busy <= c.next:
			c.lead(ctx)
		default:
			c.moved.Wait()
		}
	}
}

// lead commits what is ready. c.mu is held, but not while the disk is waited for.
func (c *committer) lead(ctx context.Context) {
	var batch []*staged
	for c.busy = c.next; ; c.busy++ {
		st, ok := c.ready[c.busy]
		if !ok {
			break
		}
		if st != nil {
			batch = append(batch, st)
		}
	}
	c.mu.Unlock()
	err := c.store.commitBatch(ctx, batch)
	c.mu.Lock()
	if err == nil {
		c.next = c.busy
	}
	c.busy = c.next
	if err != nil {
		c.fail(err)
	}
	c.moved.Broadcast()
}

// commitBatch makes snapshots of staged layers, bottom first, the lowest one's
// parent being one already: all or none.
func (s *Store) commitBatch(ctx context.Context, batch []*staged) (err error) {
	if len(batch) == 0 {
		return nil
	}
	if err := s.inheritAll(ctx, batch); err != nil {
		return err
	}
	var moved []string
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		for _, st := range batch {
			dir, err := s.adopt(ctx, st)
			if dir != "" {
				moved = append(moved, dir)
			}
			if err != nil {
				return fmt.Errorf("commit layer %s: %w", st.layer.chain, err)
			}
		}
		return nil
	})
	if err != nil && len(moved) > 0 {
		s.discardMoved(context.WithoutCancel(ctx), moved) // err says enough; Open removes what stays
	}
	return err
}

// errNothingChanged ends a transaction that was only there to keep others out.
var errNothingChanged = errors.New("nothing is changed")

// discardMoved removes the directories of layers whose commit was rolled back. Their
// numbers are free again: another snapshot may have got one meanwhile, and keeps what
// it finds under it. Nobody gets one while this transaction lasts.
func (s *Store) discardMoved(ctx context.Context, dirs []string) {
	_ = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		taken, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		for _, dir := range dirs {
			if _, used := taken[filepath.Base(dir)]; !used {
				_ = os.RemoveAll(dir)
			}
		}
		return errNothingChanged
	})
}

// adopt records a staged layer as a committed snapshot and moves it to where the
// snapshotter looks for it, dir, which is "" when it has not come so far. Nobody
// else commits this layer: the caller has its job.
func (s *Store) adopt(ctx context.Context, st *staged) (dir string, err error) {
	key := stagePrefix + st.layer.chain.String()
	sn, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, st.layer.parent.String())
	if err != nil {
		return "", err
	}
	if err := os.Rename(st.dir, s.snapshotDir(sn.ID)); err != nil {
		return "", err
	}
	dir = s.snapshotDir(sn.ID)
	if _, err := storage.CommitActive(ctx, key, st.layer.chain.String(), st.usage); err != nil {
		return dir, err
	}
	return dir, nil
}

// inheritAll completes the implied directories of each layer from the layers below
// it, those of the same batch included.
func (s *Store) inheritAll(ctx context.Context, batch []*staged) error {
	var lowers []string // topmost first
	var top digest.Digest
	for _, st := range batch {
		if st.layer.parent != top {
			var err error
			if lowers, err = s.chainDirs(ctx, st.layer.parent.String()); err != nil {
				return err
			}
		}
		if err := st.inherit(lowers); err != nil {
			return err
		}
		lowers = append([]string{st.fs()}, lowers...)
		top = st.layer.chain
	}
	return nil
}
