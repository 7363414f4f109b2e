package cri

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/image"
)

// ListImages lists images, or the one that the filter names.
func (s *imageService) ListImages(_ context.Context, req *runtime.ListImagesRequest) (*runtime.ListImagesResponse, error) {
	images, err := s.images(req.GetFilter())
	if err != nil {
		return nil, err
	}
	resp := new(runtime.ListImagesResponse)
	for _, img := range images {
		resp.Images = append(resp.Images, criImage(img))
	}
	return resp, nil
}

// images returns all images, or the one that the filter names, if it is there.
func (s *imageService) images(f *runtime.ImageFilter) ([]image.Image, error) {
	ref := f.GetImage().GetImage()
	if ref == "" {
		return s.Images.List(), nil
	}
	img, err := s.Images.Get(ref)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return []image.Image{img}, nil
}

// ImageStatus tells of one image; none at all is an empty answer, as the CRI has it.
func (s *imageService) ImageStatus(_ context.Context, req *runtime.ImageStatusRequest) (*runtime.ImageStatusResponse, error) {
	if err := required("image.image", req.GetImage().GetImage()); err != nil {
		return nil, err
	}
	img, err := s.Images.Get(req.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return &runtime.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &runtime.ImageStatusResponse{Image: criImage(img)}
	if req.GetVerbose() {
		raw, err := s.Images.RawConfig(img.ID)
		if err != nil {
			return nil, err
		}
		resp.Info, err = info("info", struct {
			ChainID   string          `json:"chainID"`
			ImageSpec json.RawMessage `json:"imageSpec"`
		}{img.ChainID.String(), raw})
		if err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// PullImage fetches an image and returns its ID, by which everything else names it.
func (s *imageService) PullImage(ctx context.Context, req *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
	if err := required("image.image", req.GetImage().GetImage()); err != nil {
		return nil, err
	}
	if h := req.GetImage().GetRuntimeHandler(); h != "" {
		if _, ok := s.Handlers[h]; !ok {
			return nil, fmt.Errorf("image.runtime_handler: no handler %q is configured: %w", h, errdefs.ErrInvalidArgument)
		}
	}
	var auth *image.Auth
	if a := req.GetAuth(); a != nil {
		auth = &image.Auth{
			Username: a.GetUsername(), Password: a.GetPassword(), Auth: a.GetAuth(),
			ServerAddress: a.GetServerAddress(),
			IdentityToken: a.GetIdentityToken(), RegistryToken: a.GetRegistryToken(),
		}
	}
	// The error stays as it is: kubelet looks at its beginning (cri-api errors).
	id, err := s.Images.Pull(ctx, req.GetImage().GetImage(), auth)
	if err != nil {
		return nil, err
	}
	return &runtime.PullImageResponse{ImageRef: id}, nil
}

// RemoveImage removes an image under all its names; the gone is success.
func (s *imageService) RemoveImage(ctx context.Context, req *runtime.RemoveImageRequest) (*runtime.RemoveImageResponse, error) {
	if err := required("image.image", req.GetImage().GetImage()); err != nil {
		return nil, err
	}
	if err := s.Images.Remove(ctx, req.GetImage().GetImage()); err != nil {
		return nil, err
	}
	return &runtime.RemoveImageResponse{}, nil
}

// ImageFsInfo tells how much the images take, and the containers' layers.
func (s *imageService) ImageFsInfo(ctx context.Context, _ *runtime.ImageFsInfoRequest) (*runtime.ImageFsInfoResponse, error) {
	fs, err := s.Images.FsInfo(ctx)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, r := range s.Containers.List() {
		ids = append(ids, r.ID)
	}
	layers := s.Stats.WritableLayers(ids)
	// One filesystem has both, which kubelet sees by the mount point.
	return &runtime.ImageFsInfoResponse{
		ImageFilesystems:     []*runtime.FilesystemUsage{filesystem(fs.Mountpoint, fs.Bytes, fs.Inodes)},
		ContainerFilesystems: []*runtime.FilesystemUsage{filesystem(fs.Mountpoint, layers.Bytes, layers.Inodes)},
	}, nil
}

func filesystem(mountpoint string, bytes, inodes int64) *runtime.FilesystemUsage {
	return &runtime.FilesystemUsage{
		Timestamp:  time.Now().UnixNano(),
		FsId:       &runtime.FilesystemIdentifier{Mountpoint: mountpoint},
		UsedBytes:  &runtime.UInt64Value{Value: uint64(bytes)},
		InodesUsed: &runtime.UInt64Value{Value: uint64(inodes)},
	}
}

func criImage(img image.Image) *runtime.Image {
	out := &runtime.Image{
		Id:          img.ID,
		RepoTags:    img.RepoTags,
		RepoDigests: img.RepoDigests,
		Size:        uint64(img.Size),
		Spec:        &runtime.ImageSpec{Image: img.ID},
		Pinned:      img.Pinned,
	}
	uid, username := image.UserOf(img.Config.User)
	if uid != nil {
		out.Uid = &runtime.Int64Value{Value: *uid}
	}
	out.Username = username
	return out
}
