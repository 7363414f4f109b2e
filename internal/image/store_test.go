package image

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	push "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/sirupsen/logrus"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: layers have owners, device nodes and mounts")
	}
}

// openStore opens a store in a directory of its own and checks at the end that it
// left no mount there.
func openStore(t testing.TB, change ...func(*Config)) *Store {
	t.Helper()
	needRoot(t)
	s, err := Open(testConfig(t, t.TempDir(), change...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeStore(t, s) })
	return s
}

func testConfig(t testing.TB, root string, change ...func(*Config)) Config {
	log := logrus.New()
	log.SetOutput(io.Discard)
	log.SetLevel(logrus.DebugLevel)
	cfg := Config{Root: root, HostsDirs: []string{}, NoProgressTimeout: 20 * time.Second, Log: logrus.NewEntry(log)}
	for _, c := range change {
		c(&cfg)
	}
	return cfg
}

func closeStore(t testing.TB, s *Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if left := mountsUnder(t, s.cfg.Root); len(left) != 0 {
		t.Errorf("mounts left: %v", left)
	}
}

func mountsUnder(t testing.TB, dir string) (found []string) {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	return found
}

// server is a real registry on loopback; wrap goes around its handler.
type server struct {
	*httptest.Server
	host string
}

func serve(t testing.TB, wrap ...func(http.Handler) http.Handler) server {
	t.Helper()
	var h http.Handler = registry.New(registry.Logger(discardLog))
	for _, w := range wrap {
		h = w(h)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	u, err := url.Parse(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	return server{srv, u.Host}
}

// push puts img into the registry and returns its reference.
func (s server) push(t testing.TB, repoTag string, img v1.Image) string {
	t.Helper()
	ref, err := name.ParseReference(s.host+"/"+repoTag, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	if err := push.Write(ref, img); err != nil {
		t.Fatal(err)
	}
	return s.host + "/" + repoTag
}

// entry is one member of a layer's archive.
type entry struct {
	name string
	body string
	hdr  tar.Header // of it: what differs from a regular root-owned 0644 file
}

func file(name, body string) entry { return entry{name: name, body: body} }
func dir(name string, mode int64) entry {
	return entry{name: name, hdr: tar.Header{Typeflag: tar.TypeDir, Mode: mode}}
}
func symlink(name, to string) entry {
	return entry{name: name, hdr: tar.Header{Typeflag: tar.TypeSymlink, Linkname: to}}
}
func hardlink(name, to string) entry {
	return entry{name: name, hdr: tar.Header{Typeflag: tar.TypeLink, Linkname: to}}
}

func archiveOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, e := range entries {
		h := e.hdr
		h.Name, h.Size, h.Format = e.name, int64(len(e.body)), tar.FormatPAX
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		h.ModTime = time.Unix(1700000000, 0)
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func layerOf(t testing.TB, entries ...entry) v1.Layer {
	t.Helper()
	return layerFrom(t, archiveOf(t, entries...))
}

func layerFrom(t testing.TB, data []byte, opts ...tarball.LayerOption) v1.Layer {
	t.Helper()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func imageOf(t testing.TB, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	return configured(t, img, func(c *v1.ConfigFile) { c.OS, c.Architecture = "linux", "amd64" })
}

func configured(t testing.TB, img v1.Image, change func(*v1.ConfigFile)) v1.Image {
	t.Helper()
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	c = c.DeepCopy()
	change(c)
	if img, err = mutate.ConfigFile(img, c); err != nil {
		t.Fatal(err)
	}
	return img
}

func idOf(t testing.TB, img v1.Image) string {
	t.Helper()
	h, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

func mustPull(t testing.TB, s *Store, ref string) Image {
	t.Helper()
	id, err := s.Pull(context.Background(), ref, nil)
	if err != nil {
		t.Fatalf("pull %s: %v", ref, err)
	}
	img, err := s.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// mounted prepares and mounts a snapshot of img and returns where.
func mounted(t testing.TB, s *Store, key string, img Image, opts ...SnapshotOpt) string {
	t.Helper()
	mounts, err := s.Prepare(context.Background(), key, img, opts...)
	if err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(t.TempDir(), "rootfs")
	if err := Mount(mounts, target, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Unmount(target); err != nil {
			t.Error(err)
		}
	})
	return target
}

func read(t testing.TB, path ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// assertEmpty checks that nothing of any image is left: no record, no snapshot, no
// directory.
func assertEmpty(t testing.TB, s *Store) {
	t.Helper()
	if images := s.List(); len(images) != 0 {
		t.Errorf("images: %v", images)
	}
	whole, broken, err := s.records.load()
	if err != nil || len(whole)+len(broken) != 0 {
		t.Errorf("records: %v %v %v", whole, broken, err)
	}
	assertSnapshots(t, s, 0)
}

// assertSnapshots checks how many snapshots there are, on record and on disk.
func assertSnapshots(t testing.TB, s *Store, want int) {
	t.Helper()
	ctx := s.quiet(context.Background())
	if err := s.free(ctx); err != nil { // the sweeper's work, now
		t.Error(err)
	}
	infos, err := s.snapshotInfos(ctx)
	if err != nil || len(infos) != want {
		t.Errorf("%d snapshots on record, want %d: %v %v", len(infos), want, infos, err)
	}
	dirs, err := os.ReadDir(filepath.Join(s.cfg.Root, "snapshots"))
	if err != nil || len(dirs) != want {
		t.Errorf("%d snapshots on disk, want %d: %v %v", len(dirs), want, dirs, err)
	}
	if staging, err := os.ReadDir(filepath.Join(s.cfg.Root, stagingDir)); err != nil || len(staging) != 0 {
		t.Errorf("staging area holds %v %v", staging, err)
	}
	s.layers.mu.Lock()
	defer s.layers.mu.Unlock()
	if len(s.layers.pins) != 0 || len(s.layers.jobs) != 0 {
		t.Errorf("pins %v, jobs %v", s.layers.pins, s.layers.jobs)
	}
}
