// Package image keeps the node's images and the snapshots made from them: it
// pulls, verifies, unpacks, mounts and collects.
//
// # What is where
//
// Under Config.Root (mode 0700):
//
//	images.db            records of the images: names, config, manifest (bbolt)
//	metadata.db          records of the snapshots (bbolt, containerd's metastore)
//	snapshots/<n>/fs     one directory per layer, and per writable snapshot
//	unpack/              layers that pulls are unpacking
//	snapshots/<n>/files  what is in a layer, with checksums
//	tmp/                 idmapped mounts of layers while a mount is being made
//	unverified           is there until all layers were read after a power cut
//	replaced/            what was damaged, until a restart of the machine: running
//	                     containers may be in it
//
// Layers are containerd overlay snapshots named by chain ID. The compressed blobs
// are not kept: a layer goes from the registry's socket through verification and
// inflation straight into its snapshot. That halves what an image takes and
// writes, and containerd's content store and metadata database, which exist to
// share blobs between clients, are not linked at all: an operation on a snapshot
// costs one transaction instead of two.
//
// # Names
//
// An image is known by its ID (the digest of its config), by tags and by digests.
// A pull of a tag that another image has takes it from that image, which stays
// under its other names. Remove takes an image with all its names, whichever of
// them it is called by, as kubelet and crictl expect of RemoveImage.
//
// # Never half visible
//
// All layers of an image are unpacked at the same time, each into a directory of
// its own. One whose digest and diff ID are right becomes a snapshot when its
// parent is one; those that are ready together do so in one transaction. Then one
// transaction writes the image's record, which makes it visible. Whatever no record
// reaches is garbage: Open, Remove and failed pulls collect it.
//
// Nobody waits until all of it is on disk: the record says on which boot of the
// machine it was written, and loses that mark when a syncfs in the background has
// ended. On another boot an image with the mark may lack some of its files, and is
// forgotten. So after a crash or a power cut an image is there whole or not at
// all, and a retry starts clean; a power cut takes with it images that were
// pulled in the last moments.
//
// # Damage
//
// A disk may break its promise and lose in a power cut what was synced. When the
// machine went down while the store was open every image is therefore read once more,
// in the background or before its first use, whatever comes first. One with a damaged
// layer is forgotten, and the pull that follows brings that layer, and no other, again.
//
// A layer that a pull in flight counts on is pinned in memory; layers under a
// container's snapshot are its ancestors, which cannot be removed before it.
//
// # Locks
//
// publish orders writers of records; layers.mu orders those who take layers
// against those who collect them; index.mu guards the maps and is held for no
// disk access. Get and List take index.mu only. freeing keeps who looks for
// leftovers from seeing a removal half done. Order: freeing, publish, layers.mu,
// index.mu.
package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/boot"
	"github.com/podshim/podshim/internal/flight"
	"github.com/podshim/podshim/internal/host"
)

// Store holds images and snapshots. It is safe for concurrent use.
type Store struct {
	cfg      Config
	log      *logrus.Entry
	libLog   *logrus.Entry // for containerd's libraries
	index    *index
	records  *records
	meta     *storage.MetaStore
	sn       snapshots.Snapshotter
	layers   layers
	verifier verifier
	publish  sync.Mutex
	pulls    flight.Group
	boot     string // ID of this boot of the machine

	closing chan struct{}  // closed by Close: pulls in flight end
	sweep   sweeps         // what the sweeper is to remove, and what is being deleted
	unsync  chan struct{}  // asks the syncer to bring pulled layers to disk
	sweeper sync.WaitGroup // the syncer too
	discard struct {
		sync.Mutex
		keys []string // of snapshots that are to be removed
	}
	readOnly bool

	// freeing is held for reading from the removal of a snapshot's record until
	// its layers are collected and the sweep of its directory has begun.
	freeing sync.RWMutex
}

// Open opens the store under cfg.Root, makes it if there is none, and collects
// what an earlier process left unfinished. Only one process can have it open
// (errdefs.ErrUnavailable).
func Open(cfg Config) (_ *Store, err error) {
	cfg = withDefaults(cfg)
	if !filepath.IsAbs(cfg.Root) {
		return nil, fmt.Errorf("image root %q is not an absolute path: %w", cfg.Root, errdefs.ErrInvalidArgument)
	}
	idx, err := newIndex(cfg.Pinned)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Root, 0o700); err != nil {
		return nil, fmt.Errorf("make image root: %w", err)
	}
	s := &Store{
		cfg: cfg, log: cfg.Log, libLog: warningsOf(cfg.Log), index: idx, layers: newLayers(),
		closing: make(chan struct{}), sweep: newSweeps(), unsync: make(chan struct{}, 1),
	}
	s.verifier.layers, s.verifier.kept = map[digest.Digest]*verified{}, map[string]func(){}
	if s.boot, err = boot.Current(); err != nil {
		return nil, err
	}
	if err := s.checkDatabases(); err != nil {
		return nil, err
	}
	if s.records, err = openRecords(filepath.Join(cfg.Root, "images.db")); err != nil {
		return nil, err
	}
	// The records are locked: nobody else is in here any more.
	if err := prepareRoot(cfg.Root); err != nil {
		return nil, errors.Join(err, s.records.close())
	}
	if err := s.openSnapshots(); err != nil {
		return nil, errors.Join(err, s.records.close())
	}
	if err := s.recover(s.quiet(context.Background())); err != nil {
		return nil, errors.Join(err, s.sn.Close(), s.records.close())
	}
	if err := s.startVerifying(); err != nil {
		return nil, errors.Join(err, s.sn.Close(), s.records.close())
	}
	s.sweeper.Go(s.sweepLoop)
	s.sweeper.Go(s.syncLoop)
	s.syncSoon()
	return s, nil
}

func withDefaults(cfg Config) Config {
	if cfg.HostsDirs == nil {
		cfg.HostsDirs = DefaultHostsDirs
	}
	if cfg.MaxConcurrentDownloads <= 0 {
		cfg.MaxConcurrentDownloads = DefaultMaxConcurrentDownloads
	}
	if cfg.NoProgressTimeout <= 0 {
		cfg.NoProgressTimeout = DefaultNoProgressTimeout
	}
	if cfg.Log == nil {
		cfg.Log = logrus.NewEntry(logrus.StandardLogger())
	}
	return cfg
}

// prepareRoot keeps the store private and removes what an earlier process was
// working on. A container in a user namespace needs no way through the root:
// overlayfs looks into its layers with the mounter's credentials.
func prepareRoot(root string) error {
	if err := os.Chmod(root, 0o700); err != nil {
		return fmt.Errorf("make image root private: %w", err)
	}
	if err := os.RemoveAll(filepath.Join(root, stagingDir)); err != nil {
		return fmt.Errorf("remove unfinished layers: %w", err)
	}
	if err := os.Mkdir(filepath.Join(root, stagingDir), 0o700); err != nil {
		return fmt.Errorf("make staging area: %w", err)
	}
	host.Spread(filepath.Join(root, stagingDir))
	// The library mounts id-mapped layers there for a moment; a crash may have
	// left one mounted.
	if err := mount.SetTempMountLocation(filepath.Join(root, "tmp")); err != nil {
		return fmt.Errorf("set place for temporary mounts: %w", err)
	}
	if _, err := mount.CleanupTempMounts(0); err != nil {
		return fmt.Errorf("remove temporary mounts: %w", err)
	}
	return nil
}

func (s *Store) openSnapshots() (err error) {
	if s.meta, err = storage.NewMetaStore(filepath.Join(s.cfg.Root, "metadata.db")); err != nil {
		return fmt.Errorf("open snapshot records: %w", err)
	}
	s.sn, err = overlay.NewSnapshotter(s.cfg.Root,
		overlay.WithMetaStore(s.meta), overlay.WithRemapIDs, overlay.AsynchronousRemove)
	if err != nil {
		return errors.Join(fmt.Errorf("open overlay snapshots: %w", err), s.meta.Close())
	}
	host.Spread(filepath.Join(s.cfg.Root, "snapshots"))
	if err := s.initSnapshots(s.quiet(context.Background())); err != nil {
		return errors.Join(fmt.Errorf("prepare snapshot records: %w", err), s.sn.Close())
	}
	return nil
}

// initSnapshots has the metastore make its buckets, which it does with the first
// snapshot only; until then it cannot even look for leftovers.
func (s *Store) initSnapshots(ctx context.Context) error {
	nothing := func(context.Context, snapshots.Info) error { return nil }
	if err := s.sn.Walk(ctx, nothing); !errdefs.IsNotFound(err) {
		return err
	}
	return s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		if _, err := storage.CreateSnapshot(ctx, snapshots.KindActive, stagePrefix, ""); err != nil {
			return err
		}
		_, _, err := storage.Remove(ctx, stagePrefix)
		return err
	})
}

// recover loads the images and drops what is not whole: records whose layers are
// gone, staging areas, layers without an image, directories without a record.
func (s *Store) recover(ctx context.Context) error {
	whole, broken, err := s.records.load()
	if err != nil {
		return err
	}
	drop := make([]string, 0, len(broken))
	for id, why := range broken {
		s.log.WithField("image", id).WithError(why).Warn("image record is damaged: image forgotten, pull it again")
		drop = append(drop, id)
	}
	for _, rec := range whole {
		err := s.checkLayers(ctx, rec)
		switch {
		case rec.Unsynced != "" && rec.Unsynced != s.boot:
			s.log.WithField("image", rec.ID).Warn("the machine went down before the image was wholly on disk: image forgotten, pull it again")
			drop = append(drop, rec.ID)
		case errdefs.IsNotFound(err):
			s.log.WithField("image", rec.ID).WithError(err).Warn("image has lost its layers: image forgotten, pull it again")
			drop = append(drop, rec.ID)
		case err != nil:
			return err
		default:
			s.index.set(rec)
		}
	}
	if err := s.records.remove(drop...); err != nil {
		return err
	}
	if err := s.collect(ctx); err != nil {
		return err
	}
	return s.free(ctx)
}

// checkLayers fails with errdefs.ErrNotFound when one of the image's layers has no
// record or no directory.
func (s *Store) checkLayers(ctx context.Context, rec *record) error {
	err := s.verifyChain(ctx, rec.ChainID)
	if errdefs.IsDataLoss(err) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// Close ends the pulls in flight, waits for all the store's goroutines and closes
// its databases. Mounts made from its snapshots stay.
func (s *Store) Close() error {
	if s.readOnly {
		return errors.Join(s.meta.Close(), s.records.close())
	}
	close(s.closing)
	_ = s.pulls.Wait(context.Background()) // never an error: it waits for good
	s.sweeper.Wait()
	return errors.Join(s.sn.Close(), s.records.close())
}

// warningsOf returns a logger that passes on warnings only. The debug lines of
// containerd's libraries carry headers and whole responses, and their info lines
// say what the returned errors say as well.
func warningsOf(log *logrus.Entry) *logrus.Entry {
	l := logrus.New()
	l.Out, l.Formatter, l.Hooks = log.Logger.Out, log.Logger.Formatter, log.Logger.Hooks
	l.SetLevel(logrus.WarnLevel)
	return l.WithFields(log.Data)
}

// quiet gives containerd's libraries their logger.
func (s *Store) quiet(ctx context.Context) context.Context { return log.WithLogger(ctx, s.libLog) }

// Get returns the image that ref names: an ID with or without "sha256:", the
// unique beginning of an ID, a tag (":latest" when it has none), or name@digest.
// errdefs.ErrNotFound when there is none, ErrInvalidArgument when ref is no
// reference or not unique.
func (s *Store) Get(ref string) (Image, error) {
	rec, err := s.index.find(ref)
	if err != nil {
		return Image{}, err
	}
	return s.index.image(rec), nil
}

// List returns all images, ordered by ID. It reads memory only.
func (s *Store) List() []Image { return s.index.list() }

// RawConfig returns an image's config byte for byte (verbose ImageStatus).
// id is the full image ID.
func (s *Store) RawConfig(id string) ([]byte, error) { return s.records.blob(id, keyConfig) }

// RawManifest returns the manifest by which the image was pulled, byte for byte.
func (s *Store) RawManifest(id string) ([]byte, error) { return s.records.blob(id, keyManifest) }
