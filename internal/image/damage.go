package image

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Damage is a layer, or an image's record, that is not as it was written.
type Damage struct {
	// Layer is the layer's chain ID; empty for a record.
	Layer string
	// Images are the IDs of the images that have the layer, or whose record it is.
	Images []string
	Why    error
}

// Damages looks for layers and records that would be used although they are damaged.
// Without contents it looks at every file of every layer and reads none; with, it
// takes as long as reading all images takes. It changes nothing. What the store knows
// to be damaged, and will not use before a pull has brought it again, is none.
func (s *Store) Damages(ctx context.Context, contents bool) ([]Damage, error) {
	ctx = s.quiet(ctx)
	records, err := s.damagedRecords(ctx)
	if err != nil {
		return nil, err
	}
	layers, err := s.damagedLayers(ctx, contents)
	return append(records, layers...), err
}

// damagedRecords are those of images that cannot be read, or whose layers are not on
// record.
func (s *Store) damagedRecords(ctx context.Context) ([]Damage, error) {
	_, broken, err := s.records.load()
	if err != nil {
		return nil, err
	}
	for _, img := range s.index.list() {
		if img.ChainID == "" {
			continue
		}
		_, err := s.chainNames(ctx, img.ChainID)
		if _, known := s.index.get(img.ID); known && errdefs.IsNotFound(err) {
			broken[img.ID] = err
		}
	}
	var found []Damage
	for _, id := range slices.Sorted(maps.Keys(broken)) {
		found = append(found, Damage{Images: []string{id}, Why: broken[id]})
	}
	return found, nil
}

func (s *Store) damagedLayers(ctx context.Context, contents bool) ([]Damage, error) {
	infos, err := s.snapshotInfos(ctx)
	if err != nil {
		return nil, err
	}
	parents := make(map[string]string)
	for _, info := range infos {
		parents[info.Name] = info.Parent
	}
	var found []Damage
	for _, info := range infos {
		if info.Kind != snapshots.KindCommitted {
			continue
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		dir, err := s.layerDir(ctx, info.Name)
		if err == nil {
			err = checkListing(filepath.Dir(dir), contents)
		}
		if !errdefs.IsDataLoss(err) {
			continue
		}
		// Removed or replaced meanwhile?
		if again, derr := s.layerDir(ctx, info.Name); derr != nil || checkListing(filepath.Dir(again), contents) == nil {
			continue
		}
		d := Damage{Layer: info.Name, Images: s.imagesOn(info.Name, parents), Why: err}
		if s.Used(d) {
			found = append(found, d)
		}
	}
	return found, nil
}

// imagesOn are the IDs of the images that have a layer.
func (s *Store) imagesOn(layer string, parents map[string]string) []string {
	var ids []string
	for _, img := range s.index.list() {
		for name := img.ChainID.String(); name != ""; name = parents[name] {
			if name == layer {
				ids = append(ids, img.ID)
				break
			}
		}
	}
	return ids
}

// expectsDamage tells whether each layer will be read before a pull counts on it.
func (s *Store) expectsDamage() bool {
	if s.readOnly {
		_, err := os.Lstat(s.unverified())
		return err == nil
	}
	s.verifier.mu.Lock()
	defer s.verifier.mu.Unlock()
	return s.verifier.distrust
}

// Mend sees to it that what is damaged is fetched again: the images that need it are
// forgotten, and their next pulls bring the damaged layers, and no others. Containers
// keep the layers that they are in. As one layer is damaged others may be, so each is
// read once more before it is used, also by the next process.
func (s *Store) Mend(ctx context.Context, d Damage) error {
	ctx = s.quiet(ctx)
	if d.Layer == "" {
		return s.forgetRecord(ctx, d)
	}
	if err := s.doubt(); err != nil {
		return err
	}
	for _, id := range d.Images {
		img, err := s.Get(id)
		if err == nil {
			err = s.verifyImage(ctx, img)
		}
		if err != nil && !errdefs.IsNotFound(err) { // it is forgotten
			return err
		}
	}
	return nil
}

// Used tells whether what is damaged would be used all the same.
func (s *Store) Used(d Damage) bool {
	for _, id := range d.Images {
		if _, known := s.index.get(id); known {
			return true
		}
		if _, err := s.records.blob(id, keyRecord); err == nil {
			return true
		}
	}
	return len(d.Images) == 0 && !s.expectsDamage()
}

// doubt takes back the trust in all layers, as after a power cut.
func (s *Store) doubt() error {
	v := &s.verifier
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := os.WriteFile(s.unverified(), nil, 0o600); err != nil {
		return fmt.Errorf("mark the layers as not verified: %w", err)
	}
	v.distrust, v.doubted = true, true
	v.layers = map[digest.Digest]*verified{}
	return nil
}

// forgetRecord forgets an image by its ID, whatever of its record can be read, unless it
// has been pulled anew meanwhile.
func (s *Store) forgetRecord(ctx context.Context, d Damage) error {
	for _, id := range d.Images {
		if img, err := s.Get(id); err == nil {
			if _, err := s.chainNames(ctx, img.ChainID); err == nil {
				continue
			}
			s.forgetDamaged(img, d.Why)
		}
		s.publish.Lock()
		err := s.records.remove(id) // one that no index knows is there still
		s.publish.Unlock()
		if err != nil {
			return err
		}
	}
	return s.Collect(ctx)
}
