package container

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	crierrors "k8s.io/cri-api/pkg/errors"

	securejoin "github.com/cyphar/filepath-securejoin"

	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/rootfs"
	"github.com/podshim/podshim/internal/sandbox"
	"github.com/podshim/podshim/internal/spec"
)

// volumes makes what the image's VOLUMEs and the config's image mounts are
// mounted from. refs are the mounted images', by the mount's index.
func (m *Manager) volumes(ctx context.Context, r *Record, root string, pod spec.Pod, img image.Image, label string) (mounts []specs.Mount, refs map[int]string, err error) {
	taken := make(map[string]bool)
	for _, mount := range r.Config.GetMounts() {
		taken[path.Clean(mount.GetContainerPath())] = true
	}
	for i, destination := range slices.Sorted(maps.Keys(img.Config.Volumes)) {
		destination = path.Clean("/" + destination)
		if taken[destination] || destination == "/" {
			continue
		}
		source := filepath.Join(m.rootDir(r.ID), "volumes", strconv.Itoa(i))
		if err := os.MkdirAll(source, 0o711); err != nil {
			return nil, nil, fmt.Errorf("make volume directory: %w", err)
		}
		// Whatever the image holds there is the volume's first content.
		if err := rootfs.CopyUp(root, destination, source); err != nil {
			return nil, nil, fmt.Errorf("copy the image's volume %s: %w", destination, err)
		}
		if err := sandbox.Relabel(source, label); err != nil {
			return nil, nil, err
		}
		mounts = append(mounts, specs.Mount{
			Destination: destination, Type: "bind", Source: source,
			Options: []string{"rbind", "rprivate", "rw"},
		})
	}
	for i, mount := range r.Config.GetMounts() {
		if mount.GetImage() == nil {
			continue
		}
		img, err := m.image(fmt.Sprintf("mounts[%d].image", i), mount.GetImage())
		if err != nil {
			return nil, nil, fmt.Errorf("%w: %w", crierrors.ErrImageVolumeMountFailed, err)
		}
		source, err := m.mountImage(ctx, r.ID, i, img, mount.GetImageSubPath(), pod, label)
		if err != nil {
			return nil, nil, fmt.Errorf("mounts[%d].image: %w", i, err)
		}
		if refs == nil {
			refs = make(map[int]string)
		}
		refs[i] = imageRef(img)
		mounts = append(mounts, specs.Mount{
			Destination: path.Clean(mount.GetContainerPath()), Type: "bind", Source: source,
			Options: []string{"rbind", "rprivate", "ro"},
		})
	}
	return mounts, refs, nil
}

func imageKey(id string, i int) string { return fmt.Sprintf("%s-image-%d", id, i) }

func (m *Manager) imagePath(id string, i int) string {
	return filepath.Join(m.runDir(id), "images", strconv.Itoa(i))
}

// mountImage mounts an image read-only and returns the directory that the
// container is to see (CRI Mount.image, image_sub_path; KEP 4639).
func (m *Manager) mountImage(ctx context.Context, id string, i int, img image.Image, subPath string, pod spec.Pod, label string) (string, error) {
	target := m.imagePath(id, i)
	if err := os.MkdirAll(target, 0o711); err != nil {
		return "", fmt.Errorf("make mount point: %w", err)
	}
	mounts, err := m.Images.View(ctx, imageKey(id, i), img, idMapping(pod)...)
	if err != nil {
		return "", fmt.Errorf("%w: %w", crierrors.ErrImageVolumeMountFailed, err)
	}
	if err := image.Mount(mounts, target, label); err != nil {
		return "", fmt.Errorf("%w: %w", crierrors.ErrImageVolumeMountFailed, err)
	}
	if subPath == "" {
		return target, nil
	}
	// Nothing writes to the view, so that the path stays what it is found to be.
	source, err := securejoin.SecureJoin(target, subPath)
	if err == nil {
		_, err = os.Lstat(source)
	}
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%w: image_sub_path %q is not in the image: %w", crierrors.ErrImageVolumeMountFailed, subPath, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return "", fmt.Errorf("image_sub_path: %w", err)
	}
	return source, nil
}

// releaseImages gives back the image mounts; the gone is success.
func (m *Manager) releaseImages(ctx context.Context, r *Record) error {
	var errs []error
	for i, mount := range r.Config.GetMounts() {
		if mount.GetImage() == nil {
			continue
		}
		if err := image.Unmount(m.imagePath(r.ID, i)); err != nil {
			errs = append(errs, err)
			continue
		}
		if err := m.Images.RemoveSnapshot(ctx, imageKey(r.ID, i)); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
