package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/podshim/podshim/internal/rollback"
)

// layer is one layer of a pull.
type layer struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
	chain  digest.Digest // names its snapshot
	parent digest.Digest // "" for the bottom layer
}

// zstdMaxWindow bounds the memory a zstd stream can ask for; zstd's own --ultra
// levels stay below it.
const zstdMaxWindow = 128 << 20

// staged is a layer that is unpacked and verified, not yet committed.
type staged struct {
	layer layer
	dir   string // holds fs, the layer's root directory
	// implied are directories the layer has entries in but no entry for; they
	// take the attributes they have in the layers below.
	implied []string
	usage   snapshots.Usage
}

func (st *staged) fs() string { return filepath.Join(st.dir, "fs") }

// drop removes what has not been committed; what has is no longer there.
func (st *staged) drop() error { return os.RemoveAll(st.dir) }

// stage unpacks a layer into a directory of its own, without its parents, so that
// all layers of an image can be unpacked at the same time. The caller commits or
// drops the result.
func (s *Store) stage(ctx context.Context, l layer, blob io.Reader) (_ *staged, err error) {
	dir, err := os.MkdirTemp(filepath.Join(s.cfg.Root, stagingDir), "layer-")
	if err != nil {
		return nil, fmt.Errorf("make staging area: %w", err)
	}
	st := &staged{layer: l, dir: dir}
	var undo rollback.Stack
	defer func() { err = undo.Settle(ctx, err) }()
	undo.Push("drop staging area", func(context.Context) error { return st.drop() })

	if err := os.Mkdir(st.fs(), 0o755); err != nil {
		return nil, fmt.Errorf("make staging area: %w", err)
	}
	implied, sums, err := unpack(ctx, st.fs(), l, blob)
	if err != nil {
		return nil, err
	}
	st.implied = implied
	if st.usage, err = writeListing(st.dir, sums); err != nil {
		return nil, fmt.Errorf("list the layer's files: %w", err)
	}
	return st, nil
}

// unpack verifies blob against the layer's size, digest and diff ID while it
// unpacks it into dir, and returns the directories that the archive implies and the
// checksums of its files.
func unpack(ctx context.Context, dir string, l layer, blob io.Reader) ([]string, *sums, error) {
	wire := &digestReader{r: blob, h: sha256.New()}
	implied, sums, got, err := unpackStream(ctx, dir, wire)
	var local syscall.Errno // from writing: a full disk needs no look at the rest of the blob
	if ctx.Err() == nil && !errors.As(err, &local) {
		// Whatever the unpacker choked on, a wrong blob is the better explanation.
		if werr := wire.verify(l.desc); werr != nil {
			return nil, nil, werr
		}
		if err != nil { // the blob is what was pushed: no layer
			err = fmt.Errorf("%w: %w", err, errdefs.ErrDataLoss)
		}
	}
	if err != nil {
		return nil, nil, fmt.Errorf("unpack: %w", err)
	}
	if got != l.diffID {
		return nil, nil, fmt.Errorf("unpacked content has digest %s, the image's config says %s: %w", got, l.diffID, errdefs.ErrDataLoss)
	}
	return implied, sums, nil
}

// unpackStream has three goroutines at work: one receives and hashes what is
// received, one inflates and hashes that, and this one writes files and takes their
// checksums.
func unpackStream(ctx context.Context, dir string, wire io.Reader) (implied []string, known *sums, diffID digest.Digest, err error) {
	received := newReadAhead(wire, wireChunk)
	defer received.stop() // wire is the caller's alone again
	plain, err := decompress(received)
	if err != nil {
		return nil, nil, "", err
	}
	defer plain.Close()
	content := &digestReader{r: plain, h: sha256.New()}
	ahead := newReadAhead(content, plainChunk)
	known = newSums(ahead)
	dirs := newImpliedDirs()
	_, err = archive.Apply(ctx, dir, known,
		archive.WithConvertWhiteout(archive.OverlayConvertWhiteout),
		archive.WithFilter(func(hdr *tar.Header) (bool, error) {
			name := strings.TrimPrefix(path.Clean("/"+hdr.Name), "/")
			dirs.see(hdr, name)
			known.see(hdr, name)
			return true, nil
		}))
	if err == nil {
		_, err = io.Copy(io.Discard, ahead) // what follows the archive's end counts for the digests
	}
	ahead.stop() // content is ours alone again
	if err != nil {
		return nil, nil, "", err
	}
	return dirs.list(), known, content.digest(), nil
}

// decompress returns the tar archive in a blob. The stream's own magic decides, not
// the media type, which registries and build tools get wrong.
func decompress(blob io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(blob, 4<<10)
	magic, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return gzip.NewReader(br)
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}), isSkippableZstd(magic):
		d, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(zstdMaxWindow))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(br), nil
}

// isSkippableZstd: zstd:chunked blobs may begin with a skippable frame (RFC 8878, 3.1.2).
func isSkippableZstd(magic []byte) bool {
	return len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18})
}

// digestReader hashes and counts what is read through it.
type digestReader struct {
	r   io.Reader
	h   hash.Hash
	n   int64
	err error // what ended reading, io.EOF included
}

func (d *digestReader) Read(p []byte) (int, error) {
	n, err := d.r.Read(p)
	d.h.Write(p[:n])
	d.n += int64(n)
	if err != nil {
		d.err = err
	}
	return n, err
}

func (d *digestReader) digest() digest.Digest {
	return digest.NewDigestFromEncoded(digest.SHA256, hex.EncodeToString(d.h.Sum(nil)))
}

// verify reads what is left and compares all of it with desc.
func (d *digestReader) verify(desc ocispec.Descriptor) error {
	if d.err == nil {
		_, _ = io.Copy(io.Discard, d) // the error is in d.err
	}
	switch {
	case d.err != nil && !errors.Is(d.err, io.EOF):
		return d.err
	case d.n != desc.Size:
		return fmt.Errorf("blob %s has %d bytes, the manifest says %d: %w", desc.Digest, d.n, desc.Size, errdefs.ErrDataLoss)
	case d.digest() != desc.Digest:
		return fmt.Errorf("blob %s has digest %s: %w", desc.Digest, d.digest(), errdefs.ErrDataLoss)
	}
	return nil
}

// impliedDirs finds the directories an archive uses without describing them.
type impliedDirs struct{ used, described map[string]bool }

func newImpliedDirs() *impliedDirs {
	return &impliedDirs{used: map[string]bool{}, described: map[string]bool{}}
}

// see is told of each header; name is clean.
func (i *impliedDirs) see(hdr *tar.Header, name string) {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return
	}
	if hdr.Typeflag == tar.TypeDir {
		i.described[name] = true
	}
	for dir := path.Dir(name); dir != "." && !i.used[dir]; dir = path.Dir(dir) {
		i.used[dir] = true
	}
}

// list returns them, parents before children.
func (i *impliedDirs) list() []string {
	var dirs []string
	for d := range i.used {
		if !i.described[d] {
			dirs = merge(dirs, d)
		}
	}
	return dirs
}
