package image

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Limits on what a registry sends us.
const (
	maxManifest = 4 << 20
	maxConfig   = 8 << 20
	// maxLayers is what overlayfs stacks at most (OVL_MAX_STACK), less the
	// writable one.
	maxLayers = 499
	// maxIndexDepth bounds indexes that name indexes.
	maxIndexDepth = 3
)

// document is a manifest or an index: what it is shows in its fields, since the
// Content-Type of registries is not always to be trusted.
type document struct {
	SchemaVersion int                  `json:"schemaVersion"`
	MediaType     string               `json:"mediaType"`
	Config        *ocispec.Descriptor  `json:"config"`
	Layers        []ocispec.Descriptor `json:"layers"`
	Manifests     []ocispec.Descriptor `json:"manifests"`
	FSLayers      json.RawMessage      `json:"fsLayers"` // Docker schema 1
}

func (d *document) isIndex() bool { return d.Manifests != nil }

// parseDocument decodes a manifest or index and refuses what is neither, or both
// at once (CVE-2021-41190: two readers would see two images under one digest).
func parseDocument(data []byte) (*document, error) {
	d := &document{}
	if err := json.Unmarshal(data, d); err != nil {
		return nil, fmt.Errorf("manifest is not JSON: %w: %w", err, errdefs.ErrDataLoss)
	}
	switch {
	case d.FSLayers != nil || d.SchemaVersion == 1:
		return nil, fmt.Errorf("manifest has Docker's schema 1, which is not supported: push the image again with a current tool: %w", errdefs.ErrNotImplemented)
	case d.isIndex() && (d.Config != nil || d.Layers != nil):
		return nil, fmt.Errorf("manifest is an index and an image at once: %w", errdefs.ErrDataLoss)
	case d.isIndex() && d.MediaType != "" && !images.IsIndexType(d.MediaType),
		!d.isIndex() && d.MediaType != "" && !images.IsManifestType(d.MediaType):
		return nil, fmt.Errorf("manifest's media type %q and its fields disagree, or it is not supported: %w", d.MediaType, errdefs.ErrDataLoss)
	case !d.isIndex() && d.Config == nil:
		return nil, fmt.Errorf("manifest has no config: %w", errdefs.ErrDataLoss)
	}
	return d, d.validate()
}

func (d *document) validate() error {
	if d.isIndex() {
		return checkDescriptors(d.Manifests)
	}
	if len(d.Layers) > maxLayers {
		return fmt.Errorf("image has %d layers, at most %d can be mounted: %w", len(d.Layers), maxLayers, errdefs.ErrInvalidArgument)
	}
	if t := d.Config.MediaType; !images.IsConfigType(t) {
		return fmt.Errorf("not a container image: its config is of type %q: %w", t, errdefs.ErrInvalidArgument)
	}
	for i, l := range d.Layers {
		if !images.IsLayerType(l.MediaType) || strings.HasSuffix(l.MediaType, "+encrypted") {
			return fmt.Errorf("layer %d is of type %q, which is not supported: %w", i, l.MediaType, errdefs.ErrNotImplemented)
		}
	}
	return checkDescriptors(append([]ocispec.Descriptor{*d.Config}, d.Layers...))
}

func checkDescriptors(descs []ocispec.Descriptor) error {
	for _, desc := range descs {
		if err := desc.Digest.Validate(); err != nil {
			return fmt.Errorf("descriptor: %w: %w", err, errdefs.ErrDataLoss)
		}
		if desc.Digest.Algorithm() != digest.SHA256 {
			return fmt.Errorf("descriptor %s: only sha256 is supported: %w", desc.Digest, errdefs.ErrNotImplemented)
		}
		if desc.Size < 0 {
			return fmt.Errorf("descriptor %s: size %d: %w", desc.Digest, desc.Size, errdefs.ErrDataLoss)
		}
	}
	return nil
}

// candidates returns the manifests of an index that may be for this machine, the
// best one first; those that do not say what they are for come last. None is
// errdefs.ErrNotFound.
func (d *document) candidates(machine platforms.MatchComparer) ([]ocispec.Descriptor, error) {
	var named, silent []ocispec.Descriptor
	for _, m := range d.Manifests {
		switch {
		case !images.IsManifestType(m.MediaType) && !images.IsIndexType(m.MediaType):
		case m.Platform == nil:
			silent = append(silent, m)
		case machine.Match(*m.Platform):
			named = append(named, m)
		}
	}
	slices.SortStableFunc(named, func(a, b ocispec.Descriptor) int {
		switch {
		case machine.Less(*a.Platform, *b.Platform):
			return -1
		case machine.Less(*b.Platform, *a.Platform):
			return 1
		}
		return 0
	})
	all := append(named, silent...)
	if len(all) == 0 {
		return nil, fmt.Errorf("image is not for %s, only for %s: %w", platforms.DefaultString(), d.offers(), errdefs.ErrNotFound)
	}
	return all, nil
}

func (d *document) offers() string {
	var names []string
	for _, m := range d.Manifests {
		if m.Platform != nil && m.Platform.OS != "unknown" { // attestations
			names = merge(names, platforms.Format(*m.Platform))
		}
	}
	if len(names) == 0 {
		return "nothing"
	}
	return strings.Join(names, ", ")
}

// parseConfig decodes an image config; fields it does not know are ignored.
func parseConfig(data []byte) (*ocispec.Image, error) {
	img := &ocispec.Image{}
	if err := json.Unmarshal(data, img); err != nil {
		return nil, fmt.Errorf("image config is not valid: %w: %w", err, errdefs.ErrDataLoss)
	}
	return img, nil
}

// layersOf pairs the manifest's layers with the config's diff IDs.
func layersOf(manifest *document, config *ocispec.Image) ([]layer, error) {
	ids := config.RootFS.DiffIDs
	if t := config.RootFS.Type; t != "" && t != "layers" {
		return nil, fmt.Errorf("image's root filesystem is of type %q: %w", t, errdefs.ErrNotImplemented)
	}
	if len(ids) != len(manifest.Layers) {
		return nil, fmt.Errorf("manifest has %d layers, config has %d: %w", len(manifest.Layers), len(ids), errdefs.ErrDataLoss)
	}
	layers := make([]layer, len(ids))
	chain := identity.ChainIDs(slices.Clone(ids))
	for i := range ids {
		if err := ids[i].Validate(); err != nil || ids[i].Algorithm() != digest.SHA256 {
			return nil, fmt.Errorf("config's diff ID %q is no sha256 digest: %w", ids[i], errdefs.ErrDataLoss)
		}
		layers[i] = layer{desc: manifest.Layers[i], diffID: ids[i], chain: chain[i]}
		if i > 0 {
			layers[i].parent = chain[i-1]
		}
		// Layers come from the registry they were asked of, never from an
		// address that a manifest brings along.
		layers[i].desc.URLs = nil
	}
	return layers, nil
}

// checkPlatform refuses an image made for another machine. One that does not say
// is taken at the user's word.
func checkPlatform(config *ocispec.Image, machine platforms.Matcher) error {
	if config.OS == "" && config.Architecture == "" {
		return nil
	}
	if p := platforms.Normalize(config.Platform); !machine.Match(p) {
		return fmt.Errorf("image is not for %s, only for %s: %w", platforms.DefaultString(), platforms.Format(p), errdefs.ErrNotFound)
	}
	return nil
}
