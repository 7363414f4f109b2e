package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/podshim/podshim/internal/state"
)

const (
	// unverifiedFile is there while layers are not trusted that a power cut may have
	// damaged.
	unverifiedFile = "unverified"
	// replacedDir holds what was damaged and replaced, for containers that use it
	// still; a restart of the machine has ended those.
	replacedDir = "replaced"
)

// verifier knows which layers are as they were unpacked. Each is read once, by
// whoever needs it first.
type verifier struct {
	mu       sync.Mutex
	distrust bool // layers are read before they are used
	doubted  bool // by Mend: containers may be in a layer that is damaged
	layers   map[digest.Digest]*verified
	kept     map[string]func() // by the ID of a forgotten image: lets go of its layers
}

type verified struct {
	done chan struct{}
	err  error // damage, once done is closed
}

// verifyLayer tells whether a layer is as it was unpacked; damage is
// errdefs.ErrDataLoss.
func (s *Store) verifyLayer(ctx context.Context, chain digest.Digest) error {
	v := &s.verifier
	v.mu.Lock()
	if !v.distrust {
		v.mu.Unlock()
		return s.checkDir(ctx, chain)
	}
	r, known := v.layers[chain]
	if !known {
		r = &verified{done: make(chan struct{})}
		v.layers[chain] = r
	}
	v.mu.Unlock()
	if known {
		select {
		case <-r.done:
			return r.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	dir, err := s.layerDir(ctx, chain.String())
	if err == nil {
		err = checkListing(filepath.Dir(dir), true)
	}
	if errdefs.IsNotImplemented(err) {
		err = nil // nothing can be said of it
	}
	r.err = err
	if err != nil && !errdefs.IsDataLoss(err) {
		v.trust(chain) // nothing is known: the next one looks again
	}
	close(r.done)
	return err
}

// trust forgets what was found of a layer.
func (v *verifier) trust(chain digest.Digest) {
	v.mu.Lock()
	defer v.mu.Unlock()
	delete(v.layers, chain)
}

// keep holds an image's layers until it is pulled again; nil lets go of them.
func (v *verifier) keep(id string, unpin func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if old := v.kept[id]; old != nil {
		old()
	}
	v.kept[id] = unpin
}

// checkDir is all that is looked at of a layer that there is no reason to doubt.
func (s *Store) checkDir(ctx context.Context, chain digest.Digest) error {
	dir, err := s.layerDir(ctx, chain.String())
	if err != nil {
		return err
	}
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s is gone: %w", dir, errdefs.ErrDataLoss)
	} else if err != nil {
		return fmt.Errorf("look at layer %s: %w", chain, err)
	}
	return nil
}

// chainNames returns a layer and those below it, topmost first.
func (s *Store) chainNames(ctx context.Context, top digest.Digest) (names []digest.Digest, err error) {
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		for name := top.String(); name != ""; {
			_, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return fmt.Errorf("find layer %s: %w", name, err)
			}
			names = append(names, digest.Digest(name))
			name = info.Parent
		}
		return nil
	})
	return names, err
}

// verifyChain verifies a layer and those below it.
func (s *Store) verifyChain(ctx context.Context, top digest.Digest) error {
	if top == "" {
		return nil
	}
	names, err := s.chainNames(ctx, top)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if err := s.verifyLayer(ctx, name); err != nil {
			errs = append(errs, fmt.Errorf("layer %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// verifyImage verifies an image before it is used. One with a damaged layer is
// forgotten, so that its next pull brings that layer again: the error is
// errdefs.ErrNotFound.
func (s *Store) verifyImage(ctx context.Context, img Image) error {
	s.verifier.mu.Lock()
	distrust := s.verifier.distrust
	s.verifier.mu.Unlock()
	if !distrust {
		return nil
	}
	err := s.verifyChain(ctx, img.ChainID)
	if !errdefs.IsDataLoss(err) {
		return err
	}
	s.forgetDamaged(img, err)
	return fmt.Errorf("image %s is damaged, pull it again: %w: %w", img.ID, err, errdefs.ErrNotFound)
}

// forgetDamaged forgets an image. Its layers stay until it is pulled again, or the
// next start, so that the pull need not bring those again that are whole.
func (s *Store) forgetDamaged(img Image, why error) {
	log := s.log.WithField("image", img.ID).WithField("names", strings.Join(append(slices.Clone(img.RepoTags), img.RepoDigests...), " "))
	names, err := s.chainNames(s.quiet(context.Background()), img.ChainID)
	if err == nil {
		s.verifier.keep(img.ID, s.layers.pin(names))
	}
	if _, rerr := s.removeRecord(img.ID); rerr != nil && !errdefs.IsNotFound(rerr) {
		err = errors.Join(err, rerr)
	}
	log.WithError(errors.Join(why, err)).Error("an image is damaged: it is forgotten, and its next pull brings the damaged layers again")
}

// replaceLayer puts a layer that was fetched again in the place of the damaged one,
// whose snapshot others may be based on. The caller has the layer's job.
func (s *Store) replaceLayer(ctx context.Context, st *staged) error {
	if err := s.inheritAll(ctx, []*staged{st}); err != nil {
		return err
	}
	dir, err := s.layerDir(ctx, st.layer.chain.String())
	if err != nil {
		return err
	}
	dir = filepath.Dir(dir)
	old, err := os.MkdirTemp(filepath.Join(s.cfg.Root, replacedDir), "layer-")
	if err != nil {
		return fmt.Errorf("set damaged layer aside: %w", err)
	}
	if err := os.Rename(dir, filepath.Join(old, "layer")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("set damaged layer aside: %w", err)
	}
	if err := os.Rename(st.dir, dir); err != nil {
		return fmt.Errorf("replace damaged layer: %w", err)
	}
	s.verifier.mu.Lock()
	unused := s.cfg.Crashed && !s.verifier.doubted
	s.verifier.mu.Unlock()
	if unused { // no container had it since the crash
		if err := os.RemoveAll(old); err != nil {
			return fmt.Errorf("remove damaged layer: %w", err)
		}
	}
	s.verifier.trust(st.layer.chain)
	s.log.WithField("layer", st.layer.chain).Warn("a damaged layer was fetched again")
	return nil
}

// startVerifying has all layers read in the background if the machine went down while
// they may have been written: those pulled last first. Until then each image is read
// before its first use.
func (s *Store) startVerifying() error {
	mark := s.unverified()
	if s.cfg.Crashed {
		if err := os.WriteFile(mark, nil, 0o600); err != nil {
			s.log.WithError(err).Warn("mark the layers as not verified")
		}
	} else if _, err := os.Lstat(mark); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	s.verifier.distrust = true
	s.sweeper.Go(func() { s.verifyAll(mark) })
	return nil
}

// unverified is the path of the mark of layers that are not trusted.
func (s *Store) unverified() string { return filepath.Join(s.cfg.Root, unverifiedFile) }

func (s *Store) verifyAll(mark string) {
	began := time.Now()
	ctx, cancel := context.WithCancel(s.quiet(context.Background()))
	defer cancel()
	go func() {
		select {
		case <-s.closing:
			cancel()
		case <-ctx.Done():
		}
	}()
	all := s.index.list()
	slices.SortFunc(all, func(a, b Image) int { return s.pulledAt(b.ID).Compare(s.pulledAt(a.ID)) })
	for _, img := range all {
		if err := s.verifyImage(ctx, img); err != nil && !errdefs.IsNotFound(err) {
			s.log.WithError(err).WithField("image", img.ID).Warn("verify the layers of an image")
		}
	}
	// Those too that only a container has still: a pull would take them as they are.
	infos, err := s.snapshotInfos(ctx)
	layers, damaged := 0, 0
	for _, info := range infos {
		if info.Kind != snapshots.KindCommitted || err != nil {
			continue
		}
		layers++
		lerr := s.verifyLayer(ctx, digest.Digest(info.Name))
		if errdefs.IsDataLoss(lerr) {
			damaged++
		} else if !errdefs.IsNotFound(lerr) {
			err = lerr
		}
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		s.log.WithError(err).Warn("verify layers: will be tried at the next start")
		return
	}
	s.log.Infof("read %d layers after a power cut, in %s; %d are damaged", layers, time.Since(began).Round(time.Millisecond), damaged)
	if damaged > 0 {
		return // what a pull does not replace is looked at again by the next start
	}
	s.verifier.mu.Lock()
	defer s.verifier.mu.Unlock()
	if s.verifier.doubted {
		return // somebody has found damage since
	}
	s.verifier.distrust = false
	if err := os.Remove(mark); err != nil {
		s.log.WithError(err).Warn("the layers are verified, and marked as not")
	}
}

func (s *Store) pulledAt(id string) time.Time {
	if rec, ok := s.index.get(id); ok {
		return rec.PulledAt
	}
	return time.Time{}
}

// checkDatabases sets aside what cannot be read of the store's own databases. Without
// records of its snapshots the store begins anew, and what they are is set aside as
// well: running containers are in them.
func (s *Store) checkDatabases() error {
	replaced := filepath.Join(s.cfg.Root, replacedDir)
	if s.cfg.Restarted {
		if err := os.RemoveAll(replaced); err != nil {
			return fmt.Errorf("remove what was replaced: %w", err)
		}
	}
	if err := os.MkdirAll(replaced, 0o700); err != nil {
		return fmt.Errorf("make directory for what is replaced: %w", err)
	}
	for _, db := range []struct {
		name string
		with []string
		then string
	}{
		{"images.db", nil, "all images are forgotten, pull them again"},
		{"metadata.db", []string{"snapshots"}, "all layers are forgotten with their images, pull them again; containers that run keep theirs"},
	} {
		path := filepath.Join(s.cfg.Root, db.name)
		st, err := os.Stat(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil && st.Size() == 0 {
			err = errors.New("it has 0 bytes")
		} else if err == nil {
			err = state.Probe(path)
		}
		if err == nil {
			continue
		}
		if state.Busy(err) {
			return fmt.Errorf("open %s: another process uses it: %w", path, errdefs.ErrUnavailable)
		}
		kept, merr := os.MkdirTemp(replaced, db.name+"-")
		if merr != nil {
			return fmt.Errorf("set %s aside: %w", path, merr)
		}
		s.log.WithError(err).WithField("kept_in", kept).Errorf("%s is damaged: %s", path, db.then)
		for _, name := range append([]string{db.name}, db.with...) {
			if err := os.Rename(filepath.Join(s.cfg.Root, name), filepath.Join(kept, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("set %s aside: %w", name, err)
			}
		}
	}
	return nil
}
