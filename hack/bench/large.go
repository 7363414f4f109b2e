package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"

	"github.com/podshim/podshim/test/images"
)

// The large images: the same files of Debian, 300 MB of them, in ten layers and in
// one.
const (
	largeHost = "bench.example"
	tenLayers = largeHost + "/ten-layers:1"
	oneLayer  = largeHost + "/one-layer:1"
	largeSize = 300 << 20
)

// largeImages makes the large images out of the tree that the test images are made
// of, and keeps them.
func largeImages(ctx context.Context, dir string) (*images.Set, error) {
	final := filepath.Join(dir, "bench-1")
	if set, err := openLarge(final); err == nil {
		return set, nil
	}
	trees, err := filepath.Glob(filepath.Join(dir, "debian-*"))
	if err != nil || len(trees) == 0 {
		return nil, fmt.Errorf("no debian-* tree in %s: %w", dir, errors.Join(err, fs.ErrNotExist))
	}
	work, err := os.MkdirTemp(dir, "bench-new-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(work)
	to, err := layout.Write(filepath.Join(work, "layout"), empty.Index)
	if err != nil {
		return nil, err
	}
	for _, layers := range []int{10, 1} {
		img, err := largeImage(ctx, trees[0], work, layers)
		if err == nil {
			err = to.AppendImage(img)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := os.Rename(string(to), final); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return openLarge(final)
}

// openLarge reads what largeImages has made; the images are in its order.
func openLarge(dir string) (*images.Set, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	if len(manifest.Manifests) != 2 {
		return nil, fmt.Errorf("%s holds %d images, not 2", dir, len(manifest.Manifests))
	}
	set := &images.Set{Dir: dir}
	for i, name := range []string{tenLayers, oneLayer} {
		d := manifest.Manifests[i]
		set.Images = append(set.Images, images.Named{Name: name, Digest: d.Digest, MediaType: d.MediaType})
	}
	return set, nil
}

func largeImage(ctx context.Context, tree, work string, layers int) (v1.Image, error) {
	img := mutate.MediaType(empty.Image, types.OCIManifestSchema1)
	img = mutate.ConfigMediaType(img, types.OCIConfigJSON)
	files, err := chosen(tree)
	if err != nil {
		return nil, err
	}
	for n := range layers {
		path := filepath.Join(work, fmt.Sprintf("%d-%d.tar.gz", layers, n))
		var size int64
		some := files
		for i, f := range files {
			if size += f.size; size >= largeSize/int64(layers) && n < layers-1 {
				some = files[:i+1]
				break
			}
		}
		files = files[len(some):]
		if err := writeLayer(ctx, tree, some, path); err != nil {
			return nil, err
		}
		layer, err := tarball.LayerFromFile(path, tarball.WithMediaType(types.OCILayer))
		if err != nil {
			return nil, err
		}
		if img, err = mutate.AppendLayers(img, layer); err != nil {
			return nil, err
		}
	}
	return img, nil
}

type file struct {
	name string
	size int64
}

// chosen are the tree's first regular files, up to the size wanted.
func chosen(tree string) ([]file, error) {
	var files []file
	var sum int64
	err := filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		name, err := filepath.Rel(tree, path)
		if err != nil {
			return err
		}
		files = append(files, file{name, info.Size()})
		if sum += info.Size(); sum >= largeSize {
			return fs.SkipAll
		}
		return nil
	})
	return files, err
}

// writeLayer packs files as most builders do: gzip at its usual level. Missing
// directories are for who unpacks it.
func writeLayer(ctx context.Context, tree string, files []file, path string) (err error) {
	to, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	packed := gzip.NewWriter(to)
	archive := tar.NewWriter(packed)
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := archive.WriteHeader(&tar.Header{Name: f.name, Mode: 0o644, Size: f.size}); err != nil {
			return err
		}
		from, err := os.Open(filepath.Join(tree, f.name))
		if err != nil {
			return err
		}
		_, err = io.Copy(archive, from)
		from.Close()
		if err != nil {
			return err
		}
	}
	return errors.Join(archive.Close(), packed.Close())
}
