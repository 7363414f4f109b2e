package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// epoch is the time of every file and image, so that the same packages give
// the same digests on every machine.
var epoch = time.Date(2026, time.January, 1, 0, 0, 0, 0, time.UTC)

// tree is a layer being gathered: absolute, clean path to tar header and
// content. Parent directories come by themselves.
type tree map[string]entry

type entry struct {
	header tar.Header
	body   []byte
}

// dir adds a directory; mode may hold the sticky bit as 0o1000.
func (t tree) dir(name string, mode int64) { t.dirOf(name, mode, 0, 0) }

// dirOf is dir with an owner.
func (t tree) dirOf(name string, mode int64, uid, gid int) {
	t.add(name, tar.Header{Typeflag: tar.TypeDir, Mode: mode, Uid: uid, Gid: gid}, nil)
}

// file adds a regular file owned by root; mode may hold the setuid bit as
// 0o4000.
func (t tree) file(name string, mode int64, body []byte) {
	t.add(name, tar.Header{Typeflag: tar.TypeReg, Mode: mode, Size: int64(len(body))}, body)
}

// text adds a regular file that everyone may read.
func (t tree) text(name, body string) { t.file(name, 0o644, []byte(body)) }

// symlink adds a symbolic link.
func (t tree) symlink(name, target string) {
	t.add(name, tar.Header{Typeflag: tar.TypeSymlink, Mode: 0o777, Linkname: target}, nil)
}

// hardlink adds another name for a file of the same tree.
func (t tree) hardlink(name, target string) {
	t.add(name, tar.Header{Typeflag: tar.TypeLink, Mode: 0o755, Linkname: strings.TrimPrefix(target, "/")}, nil)
}

func (t tree) add(name string, header tar.Header, body []byte) {
	name = path.Clean("/" + name)
	for parent := path.Dir(name); parent != "/"; parent = path.Dir(parent) {
		if _, ok := t[parent]; !ok {
			t[parent] = entry{header: tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}}
		}
	}
	t[name] = entry{header: header, body: body}
}

// binaries adds programs of the Debian tree, with the libraries they need
// that the layers below do not have yet.
func (t tree) binaries(d *debian, below []tree, names ...string) error {
	for _, name := range names {
		need, err := d.binary(name)
		if err != nil {
			return err
		}
		for at, from := range need {
			if slices.ContainsFunc(below, func(b tree) bool { _, ok := b[at]; return ok }) {
				continue
			}
			p, err := d.path(from)
			if err != nil {
				return err
			}
			body, err := os.ReadFile(p)
			if err != nil {
				return fmt.Errorf("read %s: %w", from, err)
			}
			t.file(at, 0o755, body)
		}
	}
	return nil
}

// layer turns the tree into a gzip layer of the given media type. The order
// is fixed: by name, hard links last because they need their target.
func (t tree) layer(media types.MediaType) (v1.Layer, error) {
	var names []string
	for name := range t {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		aLink, bLink := t[a].header.Typeflag == tar.TypeLink, t[b].header.Typeflag == tar.TypeLink
		if aLink != bLink {
			if aLink {
				return 1
			}
			return -1
		}
		return strings.Compare(a, b)
	})
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	for _, name := range names {
		header := t[name].header
		header.Name = strings.TrimPrefix(name, "/")
		if header.Typeflag == tar.TypeDir {
			header.Name += "/"
		}
		header.ModTime = epoch
		header.Format = tar.FormatPAX
		if err := w.WriteHeader(&header); err != nil {
			return nil, fmt.Errorf("write header of %s: %w", name, err)
		}
		if _, err := w.Write(t[name].body); err != nil {
			return nil, fmt.Errorf("write %s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("finish layer: %w", err)
	}
	return tarball.LayerFromOpener(
		func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(archive.Bytes())), nil },
		tarball.WithCompressionLevel(gzip.BestSpeed), tarball.WithMediaType(media))
}
