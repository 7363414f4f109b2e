package sandbox

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podshim/podshim/internal/host"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/infra"
	"github.com/podshim/podshim/internal/rootfs"
	"github.com/podshim/podshim/internal/spec"
)

// InfraImage is what an infra container runs.
type InfraImage struct {
	Rootfs string
	// Config is the image's; nil means the embedded pause.
	Config *ocispec.ImageConfig
	Name   string // of the image
	User   specs.User
	// Mounts are what starting it needs.
	Mounts []specs.Mount
}

// EmbeddedInfra gives every infra container the one directory that holds nothing
// but the embedded pause. It needs no image, so that none can be collected from
// under a pod.
type EmbeddedInfra struct{ root string }

// NewEmbeddedInfra installs pause below dir.
func NewEmbeddedInfra(dir string) (*EmbeddedInfra, error) {
	root, err := infra.Install(dir)
	if err != nil {
		return nil, fmt.Errorf("install pause: %w", err)
	}
	if err := Relabel(root, sharedLabel()); err != nil {
		return nil, err
	}
	return &EmbeddedInfra{root}, nil
}

// Acquire returns the one root there is.
func (e *EmbeddedInfra) Acquire(context.Context, string, string, []specs.LinuxIDMapping, []specs.LinuxIDMapping) (InfraImage, error) {
	return InfraImage{Rootfs: e.root, Mounts: infra.Mounts(e.root)}, nil
}

// Release has nothing to give back.
func (e *EmbeddedInfra) Release(context.Context, string) error { return nil }

// Images is where a configured infra image comes from; *image.Store is one.
type Images interface {
	Get(ref string) (image.Image, error)
	Pull(ctx context.Context, ref string, auth *image.Auth) (string, error)
	Prepare(ctx context.Context, key string, img image.Image, opts ...image.SnapshotOpt) ([]mount.Mount, error)
	RemoveSnapshot(ctx context.Context, key string) error
}

// ImageInfra gives each infra container a writable snapshot of a configured
// image, for those who must run one of their own.
type ImageInfra struct {
	Images Images
	Ref    string
	Dir    string // holds the mounted snapshots, e.g. /run/podshim/infra/roots
}

func (i *ImageInfra) dir(id string) string  { return filepath.Join(i.Dir, id) }
func (i *ImageInfra) path(id string) string { return filepath.Join(i.dir(id), "rootfs") }
func (i *ImageInfra) key(id string) string  { return "infra-" + id }

// Acquire pulls the image if it is not there, and mounts a snapshot of it with the
// pod's SELinux label.
func (i *ImageInfra) Acquire(ctx context.Context, id, label string, uids, gids []specs.LinuxIDMapping) (InfraImage, error) {
	img, err := i.Images.Get(i.Ref)
	if errdefs.IsNotFound(err) {
		if _, err = i.Images.Pull(ctx, i.Ref, nil); err == nil {
			img, err = i.Images.Get(i.Ref)
		}
	}
	if err != nil {
		return InfraImage{}, fmt.Errorf("infra_image: %w", err)
	}
	var opts []image.SnapshotOpt
	if len(uids) > 0 {
		opts = append(opts, image.WithIDMap(uids, gids))
	}
	mounts, err := i.Images.Prepare(ctx, i.key(id), img, opts...)
	if err != nil {
		return InfraImage{}, fmt.Errorf("snapshot of infra_image: %w", err)
	}
	if err := host.PrivateDir(i.dir(id), gids); err != nil {
		return InfraImage{}, fmt.Errorf("make infra directory: %w", err)
	}
	if err := image.Mount(mounts, i.path(id), label); err != nil {
		return InfraImage{}, err
	}
	user, err := rootfs.LookupUser(i.path(id), rootfs.UserRequest{Image: img.Config.User})
	if err != nil {
		return InfraImage{}, fmt.Errorf("user of infra_image: %w", err)
	}
	return InfraImage{Rootfs: i.path(id), Config: &img.Config, Name: i.Ref, Mounts: spec.KernelMounts(), User: specs.User{UID: user.UID, GID: user.GID, AdditionalGids: user.AdditionalGIDs}}, nil
}

// Release unmounts and removes the snapshot.
func (i *ImageInfra) Release(ctx context.Context, id string) error {
	if err := image.Unmount(i.path(id)); err != nil {
		return err
	}
	if err := os.RemoveAll(i.dir(id)); err != nil {
		return fmt.Errorf("remove infra directory: %w", err)
	}
	return i.Images.RemoveSnapshot(ctx, i.key(id))
}
