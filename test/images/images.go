// Package images makes the container images that tests pull, out of Debian's
// packages, and serves them from a registry on loopback.
//
// The machine that tests run on has no registry to pull from. Build makes
// every image that critest asks for (and our own tests use) from real
// programs: busybox, nginx, Apache, etcd, iptables, dumb-init, and two small C
// programs compiled here.
// Serve puts them behind a registry on 127.0.0.1 under their real repository
// names, and Server.WriteHosts writes the certs.d directory (hosts.toml, as
// containerd reads it) that sends registry.k8s.io, k8s.gcr.io and gcr.io
// there. A test therefore pulls registry.k8s.io/pause:3.9 and means it.
//
// Building takes about half a minute and needs root's debootstrap, dpkg-deb
// and gcc; what it made is kept in the directory it was given and used again
// as long as this package's sources stay the same.
package images

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// sources are hashed into the name of what they build, and hold the C
// programs.
//
//go:embed *.go src/*.c
var sources embed.FS

// Set is a built catalogue: an OCI image layout on disk.
type Set struct {
	// Dir is the layout; immutable once built.
	Dir string
	// Images are the names in the layout, in a fixed order.
	Images []Named
}

// Named is one name of one image.
type Named struct {
	// Name is the full reference with registry and tag.
	Name string
	// Digest is that of the manifest or index the name resolves to.
	Digest v1.Hash
	// MediaType is the manifest's or index's.
	MediaType types.MediaType
}

// Build returns the catalogue below dir, making it first if these sources
// have not been built there yet. Processes that build into one directory at
// the same time wait for each other.
func Build(ctx context.Context, dir string) (*Set, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("create image directory: %w", err)
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("image directory: %w", err)
	}
	key, err := sourceKey()
	if err != nil {
		return nil, err
	}
	final := filepath.Join(dir, "layout-"+key)
	if set, err := open(final); err == nil {
		return set, nil
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if set, err := open(final); err == nil { // built by the one we waited for
		return set, nil
	}
	if err := build(ctx, dir, final); err != nil {
		return nil, fmt.Errorf("build test images: %w", err)
	}
	return open(final)
}

// sourceKey names what this package would build: a hash of its sources and
// the platform.
func sourceKey() (string, error) {
	sum := sha256.New()
	err := fs.WalkDir(sources, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		text, err := sources.ReadFile(name)
		fmt.Fprintf(sum, "%s %d\n%s", name, len(text), text)
		return err
	})
	if err != nil {
		return "", fmt.Errorf("hash sources: %w", err)
	}
	return runtime.GOARCH + "-" + hex.EncodeToString(sum.Sum(nil))[:16], nil
}

// lock takes an exclusive lock on a file; the kernel drops it with the
// process.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return func() { f.Close() }, nil
}

// build writes the layout under a temporary name, renames it to final, and
// drops the layouts of older sources. One that is younger than a day may be in use:
// several checkouts can have one directory.
func build(ctx context.Context, dir, final string) error {
	d, err := fetchDebian(ctx, dir)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp(dir, "build-")
	if err != nil {
		return fmt.Errorf("create work directory: %w", err)
	}
	defer os.RemoveAll(work)
	list, err := recipes(ctx, d, work)
	if err != nil {
		return err
	}
	out := filepath.Join(work, "layout")
	if err := write(out, list); err != nil {
		return err
	}
	older, err := filepath.Glob(filepath.Join(dir, "layout-*"))
	if err != nil {
		return err
	}
	for _, old := range older {
		if info, err := os.Stat(old); err == nil && time.Since(info.ModTime()) < 24*time.Hour {
			continue
		}
		if err := os.RemoveAll(old); err != nil {
			return fmt.Errorf("remove older images: %w", err)
		}
	}
	if err := os.Rename(out, final); err != nil {
		return fmt.Errorf("publish images: %w", err)
	}
	return nil
}

// write makes the recipes' images into an OCI layout whose index names them.
func write(dir string, list []recipe) error {
	to, err := layout.Write(dir, empty.Index)
	if err != nil {
		return fmt.Errorf("create layout: %w", err)
	}
	made := map[string]v1.Layer{}
	for _, r := range list {
		img, err := r.image(made)
		if err != nil {
			return fmt.Errorf("make %s: %w", r.names[0], err)
		}
		for _, name := range r.names {
			named := layout.WithAnnotations(map[string]string{imagespec.AnnotationRefName: name})
			if r.index {
				err = to.AppendIndex(indexOf(img), named)
			} else {
				err = to.AppendImage(img, named)
			}
			if err != nil {
				return fmt.Errorf("write %s: %w", name, err)
			}
		}
	}
	return nil
}

// indexOf is an OCI index of two platforms: the image for this one, and the
// same manifest for one that no machine is, which pulls have to pass over.
func indexOf(img v1.Image) v1.ImageIndex {
	platform := func(arch string) v1.Descriptor {
		return v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}
	}
	other := "s390x"
	if runtime.GOARCH == other {
		other = "ppc64le"
	}
	return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: img, Descriptor: platform(other)},
		mutate.IndexAddendum{Add: img, Descriptor: platform(runtime.GOARCH)})
}

// open reads the names of a finished layout.
func open(dir string) (*Set, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("open image layout: %w", err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("read image layout: %w", err)
	}
	set := &Set{Dir: dir}
	for _, d := range manifest.Manifests {
		set.Images = append(set.Images, Named{
			Name: d.Annotations[imagespec.AnnotationRefName], Digest: d.Digest, MediaType: d.MediaType,
		})
	}
	if len(set.Images) == 0 {
		return nil, fmt.Errorf("image layout %s names no image", dir)
	}
	return set, nil
}

// Digest is what name resolves to in the registry, or an error when the
// catalogue has no such name.
func (s *Set) Digest(name string) (v1.Hash, error) {
	for _, image := range s.Images {
		if image.Name == name {
			return image.Digest, nil
		}
	}
	return v1.Hash{}, fmt.Errorf("no test image named %s", name)
}
