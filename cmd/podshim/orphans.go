package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/state"
)

// removeOrphans gives back the snapshots, directories and pinned namespaces that no
// record knows: those whose record a power cut has taken. Nothing waits for it.
func (d *parts) removeOrphans(ctx context.Context) {
	for _, dir := range []string{d.run("containers"), d.root("containers"), d.run("sandboxes"), d.root("sandboxes")} {
		if err := d.removeOrphanDirs(ctx, dir); err != nil {
			d.log.WithError(err).Warn("remove directories that no record knows")
		}
	}
	if err := d.removeOrphanPins(ctx); err != nil {
		d.log.WithError(err).Warn("unpin namespaces that no record knows")
	}
	if err := d.removeOrphanSnapshots(ctx); err != nil && ctx.Err() == nil {
		d.log.WithError(err).Warn("remove snapshots that no record knows")
	}
}

// owned tells whether a record knows id, or a damaged one may have known it: then
// log, which names the thing, says that it is left alone.
func (d *parts) owned(id string, log *logrus.Entry) bool {
	if d.sandboxes.Owns(id) || d.containers.Owns(id) {
		return true
	}
	if d.records.Lost(id) {
		log.Warn("this may be what a damaged record stood for: it is left alone")
		return true
	}
	return false
}

// removeOrphanDirs removes the directories below dir, which are named for IDs.
func (d *parts) removeOrphanDirs(ctx context.Context, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		log := d.log.WithField("directory", path)
		if ctx.Err() != nil || d.owned(e.Name(), log) {
			continue
		}
		log.Warn("no record knows this directory: removing it")
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
		log := d.log.WithField("snapshot", key)
		if d.owned(id, log) {
			continue
		}
		log.Warn("no record knows this snapshot: removing it")
		if err := d.images.RemoveSnapshot(ctx, key); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", key, err))
		}
	}
	return errors.Join(errs...)
}

// removeOrphanPins unpins the namespaces that were pinned before this daemon started,
// that no record knows and no process is in. The directory may be shared with another
// podshim: its pods have a process in theirs.
func (d *parts) removeOrphanPins(ctx context.Context) error {
	pins, err := d.sandboxes.OrphanPins(d.started)
	if err != nil || len(pins) == 0 {
		return err
	}
	ids, more := d.records.Damage(state.Sandboxes)
	used, err := cni.InUse(pins)
	if err != nil {
		return err
	}
	var errs []error
	for _, pin := range pins {
		log := d.log.WithField("namespace", pin)
		switch {
		case ctx.Err() != nil:
		case more || d.sandboxes.PinnedBy(pin, ids):
			log.Warn("this may be what a damaged record stood for: it is left alone")
		case used[pin]:
			log.Warn("no record knows this namespace, but processes are in it: it is left alone")
		default:
			log.Warn("no record knows this pinned namespace: unpinning it")
			errs = append(errs, cni.Remove(pin))
		}
	}
	return errors.Join(errs...)
}
