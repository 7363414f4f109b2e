package image

import (
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Image is one image of the store under all its names.
type Image struct {
	// ID is the digest of the image's config ("sha256:..."), as kubelet and
	// crictl expect (CRI Image.id).
	ID string
	// RepoTags are "name:tag", RepoDigests "name@sha256:...", sorted.
	RepoTags, RepoDigests []string
	// Size is the sum of the compressed layers, config and manifest, bytes.
	Size int64
	// Config is what the image says of its process: entrypoint, env, user...
	Config ocispec.ImageConfig
	// Pinned images are never collected (CRI Image.pinned).
	Pinned bool
	// ChainID names the snapshot of the topmost layer.
	ChainID digest.Digest
}

// Auth is what PullImage may carry (CRI AuthConfig). It is never logged or stored.
type Auth struct {
	Username, Password, Auth, ServerAddress, IdentityToken, RegistryToken string
}

// Usage is what a writable snapshot takes on disk.
type Usage struct {
	Bytes, Inodes int64
}

// FsInfo is the image filesystem (CRI FilesystemUsage).
type FsInfo struct {
	Mountpoint string
	Usage
}
