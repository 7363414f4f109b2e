package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// rootOf pulls an image of the layers and mounts it.
func rootOf(t *testing.T, layers ...v1.Layer) string {
	t.Helper()
	s := openStore(t)
	return mounted(t, s, "c", mustPull(t, s, serve(t).push(t, "app:v1", imageOf(t, layers...))))
}

func lstat(t *testing.T, path ...string) unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(path...), &st); err != nil {
		t.Fatalf("%s: %v", filepath.Join(path...), err)
	}
	return st
}

func TestLayersMakeTheRootfs(t *testing.T) {
	root := rootOf(t,
		layerOf(t, dir("a", 0o755), file("a/kept", "1"), file("a/gone", "1"), file("a/changed", "1"),
			dir("opaque", 0o755), file("opaque/hidden", "1"), dir("d", 0o755), file("d/x", "1")),
		layerOf(t, file("a/.wh.gone", ""), file("a/changed", "2"),
			dir("opaque", 0o711), file("opaque/.wh..wh..opq", ""), file("opaque/new", "2"),
			file(".wh.d", ""), file("setuid", "s"), hardlink("link", "setuid")),
		layerOf(t,
			entry{"setuid2", "s", tar.Header{Mode: 0o4755, Uid: 33, Gid: 44}},
			entry{"xattr", "", tar.Header{PAXRecords: map[string]string{"SCHILY.xattr.user.note": "kept"}}},
			entry{"null", "", tar.Header{Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}},
			entry{"fifo", "", tar.Header{Typeflag: tar.TypeFifo}}, symlink("abs", "/a/kept")))
	for path, want := range map[string]string{"a/kept": "1", "a/changed": "2", "opaque/new": "2", "link": "s"} {
		if got := read(t, root, path); got != want {
			t.Errorf("%s = %q, want %q", path, got, want)
		}
	}
	for _, gone := range []string{"a/gone", "opaque/hidden", "d", "d/x", "a/.wh.gone"} {
		if _, err := os.Lstat(filepath.Join(root, gone)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is there: %v", gone, err)
		}
	}
	if st := lstat(t, root, "opaque"); st.Mode&0o777 != 0o711 {
		t.Errorf("opaque has mode %o", st.Mode)
	}
	if a, b := lstat(t, root, "setuid"), lstat(t, root, "link"); a.Ino != b.Ino {
		t.Error("hard link is a file of its own")
	}
	if st := lstat(t, root, "setuid2"); st.Mode&0o7777 != 0o4755 || st.Uid != 33 || st.Gid != 44 || st.Mtim.Sec != 1700000000 {
		t.Errorf("setuid2: %+v", st)
	}
	if st := lstat(t, root, "null"); st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("null: %+v", st)
	}
	value := make([]byte, 16)
	if n, err := unix.Getxattr(filepath.Join(root, "xattr"), "user.note", value); err != nil || string(value[:n]) != "kept" {
		t.Errorf("xattr: %v", err)
	}
}

func TestImpliedDirectoriesKeepTheirAttributes(t *testing.T) {
	root := rootOf(t,
		layerOf(t, entry{"tmp", "", tar.Header{Typeflag: tar.TypeDir, Mode: 0o1777, Uid: 5, Gid: 6}},
			entry{"home/app", "", tar.Header{Typeflag: tar.TypeDir, Mode: 0o700, Uid: 1000,
				PAXRecords: map[string]string{"SCHILY.xattr.user.note": "kept"}}},
			dir("cut", 0o700), dir("cut/in", 0o711), dir("link", 0o700)),
		layerOf(t, dir("cut", 0o755), file("cut/.wh..wh..opq", ""), file(".wh.link", "")),
		layerOf(t, file("unrelated", "")),
		layerOf(t, file("tmp/x", ""), file("home/app/deep/y", ""), file("cut/in/z", ""), file("link/z", "")))
	for path, want := range map[string]uint32{"tmp": 0o1777, "home/app": 0o700, "home/app/deep": 0o755, "cut/in": 0o755, "link": 0o755} {
		if st := lstat(t, root, path); st.Mode&0o7777 != want {
			t.Errorf("%s has mode %o, want %o", path, st.Mode&0o7777, want)
		}
	}
	if st := lstat(t, root, "tmp"); st.Uid != 5 || st.Gid != 6 || st.Mtim.Sec != 1700000000 {
		t.Errorf("tmp: %+v", st)
	}
	if _, err := unix.Getxattr(filepath.Join(root, "home/app"), "user.note", nil); err != nil {
		t.Errorf("xattr of home/app: %v", err)
	}
}

func TestHostileArchivesStayInside(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "victim"), []byte("untouched"), 0o644); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 30)
	for name, entries := range map[string][]entry{
		"dot dot":             {file(up+outside[1:]+"/new", "evil"), file(up+outside[1:]+"/victim", "evil")},
		"absolute":            {file(outside+"/new", "evil"), file(outside+"/victim", "evil")},
		"through a symlink":   {symlink("l", outside), file("l/new", "evil"), file("l/victim", "evil")},
		"through two":         {symlink("a", "b"), symlink("b", outside), file("a/new", "evil")},
		"relative symlink":    {symlink("l", up+outside[1:]), file("l/victim", "evil")},
		"overwritten symlink": {symlink("f", outside+"/victim"), file("f", "evil")},
		"hard link out":       {symlink("l", outside), hardlink("h", "l/victim"), file("h", "evil")},
		"whiteout out":        {symlink("l", outside), file("l/.wh.victim", "")},
		"opaque out":          {symlink("l", outside), file("l/.wh..wh..opq", "")},
		"bad whiteouts":       {file(".wh..", ""), file(".wh...", "")},
		"device whiteout":     {entry{"w", "", tar.Header{Typeflag: tar.TypeChar}}},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			ref := serve(t).push(t, "app:v1", imageOf(t, layerOf(t, dir("base", 0o755)), layerOf(t, entries...)))
			_, err := s.Pull(context.Background(), ref, nil)
			if body := read(t, outside, "victim"); body != "untouched" {
				t.Errorf("victim says %q", body)
			}
			if names, _ := os.ReadDir(outside); len(names) != 1 {
				t.Errorf("outside holds %v", names)
			}
			if err != nil {
				assertEmpty(t, s)
			}
		})
	}
}

func TestCompressions(t *testing.T) {
	data := archiveOf(t, file("f", strings.Repeat("compress me ", 100_000)))
	for name, l := range map[string]v1.Layer{
		"gzip":       layerFrom(t, data, tarball.WithMediaType(types.DockerLayer)),
		"oci gzip":   layerFrom(t, data, tarball.WithMediaType(types.OCILayer)),
		"zstd":       layerFrom(t, data, tarball.WithCompression(compression.ZStd), tarball.WithMediaType(types.OCILayerZStd)),
		"none":       plainLayer{static.NewLayer(data, types.OCIUncompressedLayer)},
		"wrong type": plainLayer{static.NewLayer(data, types.DockerLayer)},
	} {
		t.Run(name, func(t *testing.T) {
			if got := read(t, rootOf(t, l), "f"); len(got) != 1_200_000 {
				t.Errorf("%d bytes", len(got))
			}
		})
	}
}

// plainLayer is a layer whose blob is the archive itself.
type plainLayer struct{ v1.Layer }

func (p plainLayer) DiffID() (v1.Hash, error) { return p.Digest() }

func TestImageWithoutLayers(t *testing.T) {
	s := openStore(t)
	img := mustPull(t, s, serve(t).push(t, "empty:v1", imageOf(t)))
	root := mounted(t, s, "c", img)
	if err := os.WriteFile(filepath.Join(root, "f"), nil, 0o644); err != nil {
		t.Error(err)
	}
}

func TestManyLayersMount(t *testing.T) {
	layers := make([]v1.Layer, 130)
	for i := range layers {
		layers[i] = layerOf(t, file("f", strings.Repeat("x", i+1)))
	}
	if got := read(t, rootOf(t, layers...), "f"); len(got) != 130 {
		t.Errorf("f is of layer %d", len(got))
	}
}

func TestReadAheadPassesDataAndErrors(t *testing.T) {
	broken := errors.New("broken")
	data := bytes.Repeat([]byte("0123456789"), 300_000)
	a := newReadAhead(readerFunc(func(p []byte) (int, error) {
		if len(data) == 0 {
			return 0, broken
		}
		n := copy(p[:min(len(p), 7777)], data)
		data = data[n:]
		return n, nil
	}), plainChunk)
	defer a.stop()
	var got bytes.Buffer
	if _, err := got.ReadFrom(a); !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	if want := bytes.Repeat([]byte("0123456789"), 300_000); !bytes.Equal(got.Bytes(), want) {
		t.Errorf("%d bytes differ", got.Len())
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func TestFullDiskIsResourceExhausted(t *testing.T) {
	needRoot(t)
	disk := filepath.Join(t.TempDir(), "disk")
	if err := os.Mkdir(disk, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("small", disk, "tmpfs", 0, "size=2m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Unmount(disk); err != nil {
			t.Error(err)
		}
	})
	s, err := Open(testConfig(t, filepath.Join(disk, "images")))
	if err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, s)
	srv := serve(t)
	big := srv.push(t, "big:v1", imageOf(t, layerOf(t, file("big", strings.Repeat("x", 5<<20)))))
	if _, err := s.Pull(context.Background(), big, nil); !errdefs.IsResourceExhausted(err) {
		t.Errorf("got %v", err)
	}
	assertEmpty(t, s)
	mustPull(t, s, srv.push(t, "small:v1", imageOf(t, layerOf(t, file("f", "small")))))
}

func TestDecompressionOfGarbage(t *testing.T) {
	for name, data := range map[string][]byte{
		"no archive":      bytes.Repeat([]byte("garbage!"), 1000),
		"gzip of garbage": {0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff},
		"zstd of garbage": {0x28, 0xb5, 0x2f, 0xfd, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		"cut archive":     archiveOf(t, file("f", strings.Repeat("x", 5000)))[:2000],
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			img, err := mutate.AppendLayers(imageOf(t), plainLayer{static.NewLayer(data, types.DockerLayer)})
			if err != nil {
				t.Fatal(err)
			}
			_, err = s.Pull(context.Background(), serve(t).push(t, "app:v1", img), nil)
			if err == nil || errdefs.IsUnavailable(err) {
				t.Errorf("got %v", err)
			}
			assertEmpty(t, s)
		})
	}
}

// TestSumsTakenInPassing: what is listed is what is on disk, whatever archives do
// with their names.
func TestSumsTakenInPassing(t *testing.T) {
	needRoot(t)
	s := openStore(t)
	plain := []entry{dir("d", 0o755), file("d/a", "one"), file("d/empty", ""), symlink("d/link", "a"), file("b", strings.Repeat("two", 100_000))}
	for name, c := range map[string]struct {
		entries []entry
		known   []string // found without reading
	}{
		"plain":                         {plain, []string{"d/a", "d/empty", "b"}},
		"written twice":                 {append(plain, file("d/a", "other")), []string{"d/a"}},
		"replaced by a hard link":       {append(plain, file("z", "two"), hardlink("d/a", "z")), nil},
		"through a link":                {append(plain, symlink("l", "d"), file("l/a", "two")), nil},
		"through a hard link to a link": {append(plain, symlink("l", "d"), hardlink("m", "l"), file("m/a", "two")), nil},
		"through what becomes a link":   {append(plain, file("e/a", "three"), symlink("e", "d"), file("e/a", "two")), nil},
		"through a link that is gone":   {append(plain, symlink("l", "d"), dir("l", 0o755), file("l/a", "own")), nil},
		"names that are not clean":      {append(plain, file("./d/../d/a", "two"), file("/b", "three")), []string{"d/a", "b"}},
		"a directory replaced":          {append(plain, file("d", "now a file")), []string{"d"}},
	} {
		t.Run(name, func(t *testing.T) {
			data := archiveOf(t, c.entries...)
			l := layer{desc: ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}, diffID: digest.FromBytes(data)}
			st, err := s.stage(t.Context(), l, bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = st.drop() }()
			if err := checkListing(st.dir, true); err != nil {
				t.Error(err)
			}
			_, known, err := unpack(t.Context(), t.TempDir(), l, bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range c.known {
				if _, ok := known.of(name, lstat(t, st.fs(), name).Size); !ok {
					t.Errorf("%s would be read again", name)
				}
			}
		})
	}
}

// BenchmarkUnpack is all that is done to a layer but to receive it: 2,000 files of
// 16 KB, packed as builders do.
func BenchmarkUnpack(b *testing.B) {
	var entries []entry
	for i := range 2000 {
		text := fmt.Sprintf("file %d, ", i)
		for n := range 2000 {
			text += strconv.Itoa(n*i) + " "
		}
		entries = append(entries, file(fmt.Sprintf("usr/lib/d%d/f%d", i/50, i), text))
	}
	plain := archiveOf(b, entries...)
	var packed bytes.Buffer
	w := gzip.NewWriter(&packed)
	if _, err := w.Write(plain); err != nil {
		b.Fatal(err)
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	l := layer{desc: ocispec.Descriptor{Digest: digest.FromBytes(packed.Bytes()), Size: int64(packed.Len())}, diffID: digest.FromBytes(plain)}
	s := openStore(b)
	b.SetBytes(int64(len(plain)))
	for b.Loop() {
		st, err := s.stage(b.Context(), l, bytes.NewReader(packed.Bytes()))
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := st.drop(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
