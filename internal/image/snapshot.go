package image

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// userPrefix keeps callers' keys apart from layers and staging areas.
const userPrefix = "use/"

// SnapshotOpt modifies what Prepare and View make.
type SnapshotOpt func(map[string]string)

// WithIDMap shows the files of the snapshot's layers with the owners they have in
// a user namespace of these mappings, by id-mapped mounts (Linux 5.19 for
// overlayfs): nothing is copied or chowned.
func WithIDMap(uids, gids []specs.LinuxIDMapping) SnapshotOpt {
	return func(labels map[string]string) {
		labels[snapshots.LabelSnapshotUIDMapping] = idMap(uids)
		labels[snapshots.LabelSnapshotGIDMapping] = idMap(gids)
	}
}

func idMap(mappings []specs.LinuxIDMapping) string {
	ranges := make([]string, len(mappings))
	for i, m := range mappings {
		ranges[i] = fmt.Sprintf("%d:%d:%d", m.ContainerID, m.HostID, m.Size)
	}
	return strings.Join(ranges, ",")
}

// Prepare makes a writable snapshot of img for key, which is the caller's (a
// container's ID), and returns the mounts that make its root filesystem. Asked
// again for the same key and image it returns the same snapshot;
// errdefs.ErrAlreadyExists when the key has one of another image, ErrNotFound
// when the image is gone.
func (s *Store) Prepare(ctx context.Context, key string, img Image, opts ...SnapshotOpt) ([]mount.Mount, error) {
	return s.snapshot(ctx, snapshots.KindActive, key, img, opts)
}

// View is Prepare for a snapshot that cannot be written to: the image volume of a
// container (CRI Mount.image). It lives until RemoveSnapshot(key) as well.
func (s *Store) View(ctx context.Context, key string, img Image, opts ...SnapshotOpt) ([]mount.Mount, error) {
	return s.snapshot(ctx, snapshots.KindView, key, img, opts)
}

func (s *Store) snapshot(ctx context.Context, kind snapshots.Kind, key string, img Image, opts []SnapshotOpt) ([]mount.Mount, error) {
	if key == "" {
		return nil, fmt.Errorf("snapshot key is empty: %w", errdefs.ErrInvalidArgument)
	}
	if err := s.verifyImage(s.quiet(ctx), img); err != nil {
		return nil, err
	}
	labels := map[string]string{}
	for _, o := range opts {
		o(labels)
	}
	create := s.sn.Prepare
	if kind == snapshots.KindView {
		create = s.sn.View
	}
	mounts, err := create(s.quiet(ctx), userPrefix+key, img.ChainID.String(), snapshots.WithLabels(labels))
	if errdefs.IsAlreadyExists(err) {
		return s.existing(ctx, kind, key, img)
	}
	if err != nil {
		return nil, fmt.Errorf("make snapshot %s of image %s: %w", key, img.ID, err)
	}
	return mounts, nil
}

func (s *Store) existing(ctx context.Context, kind snapshots.Kind, key string, img Image) ([]mount.Mount, error) {
	info, err := s.sn.Stat(s.quiet(ctx), userPrefix+key)
	if err != nil {
		return nil, fmt.Errorf("look at snapshot %s: %w", key, err)
	}
	if info.Parent != img.ChainID.String() || info.Kind != kind {
		return nil, fmt.Errorf("snapshot %s is of another image or kind: %w", key, errdefs.ErrAlreadyExists)
	}
	return s.Mounts(ctx, key)
}

// Mounts returns the mounts of an existing snapshot; errdefs.ErrNotFound when
// there is none.
func (s *Store) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	mounts, err := s.sn.Mounts(s.quiet(ctx), userPrefix+key)
	if err != nil {
		return nil, fmt.Errorf("mounts of snapshot %s: %w", key, err)
	}
	return mounts, nil
}

// RemoveSnapshot removes a snapshot, and the layers under it if their image has
// been removed before. It must not be mounted any more. The gone is success. The
// disk space is free a moment later.
func (s *Store) RemoveSnapshot(ctx context.Context, key string) error {
	ctx = s.quiet(ctx)
	s.freeing.RLock()
	defer s.freeing.RUnlock()
	info, err := s.sn.Stat(ctx, userPrefix+key)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err == nil {
		err = s.sn.Remove(ctx, userPrefix+key)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("remove snapshot %s: %w", key, err)
	}
	defer s.sweep.ask()
	return s.collectFrom(ctx, info.Parent)
}

// DiscardSnapshot is RemoveSnapshot for a caller that does not wait for the disk: it
// returns at once, and the sweeper removes together what is discarded at about the
// same time. It tries again what fails. What a crash keeps it from is among
// Snapshots, for whoever knows that nothing needs it.
func (s *Store) DiscardSnapshot(key string) {
	s.discard.Lock()
	s.discard.keys = append(s.discard.keys, key)
	s.discard.Unlock()
	s.sweep.ask()
}

// removeDiscarded removes what was discarded, in one transaction.
func (s *Store) removeDiscarded(ctx context.Context) error {
	s.freeing.RLock()
	defer s.freeing.RUnlock()
	keys := s.discarded()
	if len(keys) == 0 {
		return nil
	}
	parents, failed := map[string]bool{}, map[string]bool{}
	var errs []error
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		for _, key := range keys {
			_, info, _, err := storage.GetInfo(ctx, userPrefix+key)
			if err == nil {
				_, _, err = storage.Remove(ctx, userPrefix+key)
			}
			if err != nil && !errdefs.IsNotFound(err) {
				failed[key] = true // the others go all the same
				errs = append(errs, fmt.Errorf("remove snapshot %s: %w", key, err))
				continue
			}
			parents[info.Parent] = true
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.discard.Lock()
	later := s.discard.keys[len(keys):]
	s.discard.keys = slices.DeleteFunc(keys, func(key string) bool { return !failed[key] })
	s.discard.keys = append(s.discard.keys, later...)
	s.discard.Unlock()
	for parent := range parents {
		errs = append(errs, s.collectFrom(ctx, parent))
	}
	return errors.Join(errs...)
}

// discarded are the keys of the snapshots that the sweeper is to remove.
func (s *Store) discarded() []string {
	s.discard.Lock()
	defer s.discard.Unlock()
	return slices.Clone(s.discard.keys)
}

// Usage is what a snapshot's writable layer takes. It walks the layer, which
// takes long when the container has written many files: call it from where
// nobody waits.
func (s *Store) Usage(ctx context.Context, key string) (Usage, error) {
	u, err := s.sn.Usage(s.quiet(ctx), userPrefix+key)
	if err != nil {
		return Usage{}, fmt.Errorf("usage of snapshot %s: %w", key, err)
	}
	return Usage{Bytes: u.Size, Inodes: u.Inodes}, nil
}

// Snapshots returns the keys of all snapshots that Prepare and View made, but those
// that are discarded.
func (s *Store) Snapshots(ctx context.Context) ([]string, error) {
	discarded := s.discarded()
	infos, err := s.snapshotInfos(s.quiet(ctx))
	if err != nil {
		return nil, err
	}
	keys := []string{}
	for _, i := range infos {
		if key, ok := strings.CutPrefix(i.Name, userPrefix); ok && !slices.Contains(discarded, key) {
			keys = append(keys, key)
		}
	}
	return keys, nil
}

// SnapshotDirs are the keys of all snapshots that Prepare and View made, by the names of
// their directories in Root/snapshots.
func (s *Store) SnapshotDirs(ctx context.Context) (map[string]string, error) {
	dirs := map[string]string{}
	err := s.meta.WithTransaction(s.quiet(ctx), false, func(ctx context.Context) error {
		all, err := storage.IDMap(ctx)
		for id, name := range all {
			if key, ok := strings.CutPrefix(name, userPrefix); ok {
				dirs[id] = key
			}
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read snapshot records: %w", err)
	}
	return dirs, nil
}

// FsInfo tells what the images take on which filesystem. It adds up records and
// walks no directory.
func (s *Store) FsInfo(ctx context.Context) (FsInfo, error) {
	info := FsInfo{Mountpoint: s.cfg.Root, Usage: Usage{Bytes: s.records.size(), Inodes: 1}}
	err := s.meta.WithTransaction(s.quiet(ctx), false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, i snapshots.Info) error {
			if i.Kind != snapshots.KindCommitted {
				return nil
			}
			_, _, u, err := storage.GetInfo(ctx, i.Name)
			info.Bytes += u.Size
			info.Inodes += u.Inodes
			return err
		})
	})
	if err != nil {
		return FsInfo{}, fmt.Errorf("read snapshot records: %w", err)
	}
	return info, nil
}
