package image

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// index is what the store knows of its images, in memory: lookups and lists
// wait for no disk and no pull.
type index struct {
	pinned map[string]bool // normalized names; set once

	mu     sync.RWMutex
	byID   map[string]*record
	byName map[string]string // tag or digest name to ID
}

func newIndex(pinned []string) (*index, error) {
	x := &index{pinned: map[string]bool{}, byID: map[string]*record{}, byName: map[string]string{}}
	for _, p := range pinned {
		if id, ok := asID(p); ok {
			x.pinned[id] = true
			continue
		}
		named, err := parseReference(p)
		if err != nil {
			return nil, fmt.Errorf("pinned image: %w", err)
		}
		x.pinned[named.String()] = true
	}
	return x, nil
}

// set publishes recs, which replace what was known under their IDs.
func (x *index) set(recs ...*record) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, r := range recs {
		x.forget(r.ID)
	}
	for _, r := range recs {
		x.byID[r.ID] = r
		for _, n := range r.names() {
			x.byName[n] = r.ID
		}
	}
}

// remove drops an image and all its names.
func (x *index) remove(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.forget(id)
}

func (x *index) forget(id string) {
	old, ok := x.byID[id]
	if !ok {
		return
	}
	for _, n := range old.names() {
		if x.byName[n] == id {
			delete(x.byName, n)
		}
	}
	delete(x.byID, id)
}

// get returns the image's record; records are never changed once published.
func (x *index) get(id string) (*record, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	r, ok := x.byID[id]
	return r, ok
}

// owner returns the record of the image that has the given name.
func (x *index) owner(name string) (*record, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	r, ok := x.byID[x.byName[name]]
	return r, ok
}

// find resolves what a caller calls an image: an ID, a name, or the unique
// beginning of an ID.
func (x *index) find(ref string) (*record, error) {
	if id, ok := asID(ref); ok {
		if r, ok := x.get(id); ok {
			return r, nil
		}
		return nil, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
	}
	named, err := parseReference(ref)
	if err == nil {
		if r, ok := x.owner(nameOf(named)); ok {
			return r, nil
		}
	}
	if prefix, ok := asPrefix(ref); ok {
		return x.findPrefix(prefix)
	}
	if err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("image %s: %w", ref, errdefs.ErrNotFound)
}

func nameOf(named reference.Named) string {
	if d, ok := named.(reference.Digested); ok {
		return named.Name() + "@" + d.Digest().String()
	}
	return named.String()
}

func (x *index) findPrefix(prefix string) (*record, error) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	var found *record
	for id, r := range x.byID {
		if !strings.HasPrefix(id, prefix) {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("image ID %s is not unique: %w", prefix, errdefs.ErrInvalidArgument)
		}
		found = r
	}
	if found == nil {
		return nil, fmt.Errorf("image %s: %w", prefix, errdefs.ErrNotFound)
	}
	return found, nil
}

// list returns all images, by ID.
func (x *index) list() []Image {
	x.mu.RLock()
	defer x.mu.RUnlock()
	images := make([]Image, 0, len(x.byID))
	for _, id := range slices.Sorted(maps.Keys(x.byID)) {
		images = append(images, x.image(x.byID[id]))
	}
	return images
}

// image is the record as callers see it; they get slices of their own.
func (x *index) image(r *record) Image {
	img := Image{
		ID:          r.ID,
		RepoTags:    slices.Clone(r.RepoTags),
		RepoDigests: slices.Clone(r.RepoDigests),
		Size:        r.Size,
		Config:      r.config,
		Pinned:      x.pinned[r.ID],
		ChainID:     r.ChainID,
	}
	for _, n := range r.names() {
		img.Pinned = img.Pinned || x.pinned[n]
	}
	return img
}

// uses tells whether an image's topmost layer is chain.
func (x *index) uses(chain digest.Digest) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for _, r := range x.byID {
		if r.ChainID == chain {
			return true
		}
	}
	return false
}

// unsynced returns the records of images whose layers may not all be on disk.
func (x *index) unsynced() (recs []*record) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	for _, r := range x.byID {
		if r.Unsynced != "" {
			recs = append(recs, r)
		}
	}
	return recs
}
