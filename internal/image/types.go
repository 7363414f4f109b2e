package image

import (
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
)

// Defaults of Config's zero values.
const (
	// DefaultMaxConcurrentDownloads layers of one pull are under way at a time.
	DefaultMaxConcurrentDownloads = 3
	// DefaultNoProgressTimeout is how long a pull waits for a registry that
	// sends nothing.
	DefaultNoProgressTimeout = 5 * time.Minute
)

// DefaultHostsDirs are where registry hosts are configured, the first directory
// that knows a registry wins.
var DefaultHostsDirs = []string{"/etc/podshim/certs.d", "/etc/containerd/certs.d", "/etc/docker/certs.d"}

// Config is what a Store needs to know. Only Root has no default.
type Config struct {
	// Root is the store's own directory, made with mode 0700. It needs a
	// filesystem that overlayfs takes as upper directory.
	Root string
	// HostsDirs hold a directory per registry with hosts.toml or certificates.
	// nil is DefaultHostsDirs; empty is none.
	HostsDirs []string
	// Pinned are names of images that kubelet's collector must leave alone.
	Pinned []string
	// MaxConcurrentDownloads bounds the layers of one pull that are fetched and
	// unpacked at a time; 0 is the default.
	MaxConcurrentDownloads int
	// NoProgressTimeout ends a pull whose registry sends nothing for so long;
	// 0 is the default.
	NoProgressTimeout time.Duration
	// Restarted: the machine was, since the store was last open, and no container
	// runs. Crashed: it went down while the store was open, as in a power cut.
	Restarted, Crashed bool
	// Log gets what no caller is told; nil is logrus's standard logger.
	Log *logrus.Entry
}

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
	// ChainID names the snapshot of the topmost layer; "" is an image without
	// layers.
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
	// Mountpoint is a directory on that filesystem: the store's root.
	Mountpoint string
	// Usage counts the layers of all images, not the containers' writable layers.
	Usage
}
