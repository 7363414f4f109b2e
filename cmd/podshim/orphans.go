package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/podshim/podshim/internal/image"
)

// removeOrphans gives back the snapshots and directories that no record knows:
// those whose record a power cut or a damaged database has taken. All of them lie
// in podshim's own directories. Nothing waits for it.
func (d *parts) removeOrphans(ctx context.Context) {
	for _, dir := range []string{d.run("containers"), d.root("containers"), d.run("sandboxes"), d.root("sandboxes")} {
		if err := d.removeOrphanDirs(ctx, dir); err != nil {
			d.log.WithError(err).Warn("remove directories that no record knows")
		}
	}
	if err := d.removeOrphanSnapshots(ctx); err != nil && ctx.Err() == nil {
		d.log.WithError(err).Warn("remove snapshots that no record knows")
	}
}

func (d *parts) owned(id string) bool { return d.sandboxes.Owns(id) || d.containers.Owns(id) }

// removeOrphanDirs removes the directories below dir, which are named for IDs.
func (d *parts) removeOrphanDirs(ctx context.Context, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if ctx.Err() != nil || d.owned(e.Name()) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		d.log.WithField("directory", path).Warn("no record knows this directory: removing it")
		errs = append(errs, removeMounted(path))
	}
	return errors.Join(errs...)
}

// removeMounted removes a container's or sandbox's directory after what may be
// mounted in it.
func removeMounted(dir string) error {
	points, err := filepath.Glob(filepath.Join(dir, "images", "*"))
	if err != nil {
		return err
	}
	for _, point := range append(points, filepath.Join(dir, "rootfs"), filepath.Join(dir, "shm")) {
		if err := image.Unmount(point); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

func (d *parts) removeOrphanSnapshots(ctx context.Context) error {
	keys, err := d.images.Snapshots(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, key := range keys {
		// ID, ID-image-N or infra-ID.
		id, _, _ := strings.Cut(strings.TrimPrefix(key, "infra-"), "-")
		if d.owned(id) {
			continue
		}
		d.log.WithField("snapshot", key).Warn("no record knows this snapshot: removing it")
		if err := d.images.RemoveSnapshot(ctx, key); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
	}
	return errors.Join(errs...)
}
