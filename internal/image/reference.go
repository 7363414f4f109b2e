package image

import (
	"fmt"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// maxReference bounds what a caller may ask for, bytes.
const maxReference = 4096

var (
	idPattern     = regexp.MustCompile(`^(?:sha256:)?([0-9a-f]{64})$`)
	prefixPattern = regexp.MustCompile(`^(?:sha256:)?([0-9a-f]{1,63})$`)
)

// parseReference normalizes an image name as Docker does: "busybox" is
// docker.io/library/busybox:latest. Of name:tag@digest the tag is dropped, since
// the digest decides.
func parseReference(ref string) (reference.Named, error) {
	if len(ref) > maxReference {
		return nil, fmt.Errorf("image reference of %d bytes: %w", len(ref), errdefs.ErrInvalidArgument)
	}
	if ref == "" {
		return nil, fmt.Errorf("image reference is empty: %w", errdefs.ErrInvalidArgument)
	}
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, fmt.Errorf("image reference %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	if d, ok := named.(reference.Digested); ok && d.Digest().Algorithm() != digest.SHA256 {
		return nil, fmt.Errorf("image reference %q: only sha256 digests are supported: %w", ref, errdefs.ErrInvalidArgument)
	}
	return named, nil
}

// names are the names an image gets from a pull of named that resolved to
// manifest: RepoTag ("" when pulled by digest) and RepoDigest.
func names(named reference.Named, manifest digest.Digest) (tag, dgst string) {
	if t, ok := named.(reference.Tagged); ok {
		tag = named.Name() + ":" + t.Tag()
	}
	return tag, named.Name() + "@" + manifest.String()
}

// asID returns the full image ID that ref spells, with or without its algorithm.
func asID(ref string) (string, bool) {
	if m := idPattern.FindStringSubmatch(ref); m != nil {
		return "sha256:" + m[1], true
	}
	return "", false
}

// asPrefix returns the beginning of the image IDs that ref may abbreviate.
func asPrefix(ref string) (string, bool) {
	if m := prefixPattern.FindStringSubmatch(ref); m != nil {
		return "sha256:" + m[1], true
	}
	return "", false
}

// UserOf splits an image's USER as ImageStatus reports it (CRI Image.uid and
// Image.username): a number is a UID, anything else a name; neither when the
// image names no user.
func UserOf(user string) (uid *int64, username string) {
	user, _, _ = strings.Cut(user, ":")
	if user == "" {
		return nil, ""
	}
	var n int64
	for _, c := range []byte(user) {
		if c < '0' || c > '9' || n > 1<<32 {
			return nil, user
		}
		n = n*10 + int64(c-'0')
	}
	return &n, ""
}
