package image

import (
	"context"
	"errors"
	"io"
	"log"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	push "github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

var discardLog = log.New(io.Discard, "", 0)

func digestOf(t testing.TB, img interface{ Digest() (v1.Hash, error) }) string {
	t.Helper()
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

func TestImageDescribesItself(t *testing.T) {
	s := openStore(t, func(c *Config) { c.Pinned = []string{"example.com/other", "docker.io/library/pause:1"} })
	srv := serve(t)
	img := configured(t, imageOf(t, layerOf(t, file("f", "x")), layerOf(t, file("g", "y"))), func(c *v1.ConfigFile) {
		c.Config.User, c.Config.Entrypoint, c.Config.Env = "www-data:1004", []string{"/f"}, []string{"A=b"}
	})
	got := mustPull(t, s, srv.push(t, "app:v1", img))
	manifest, _ := img.Manifest()
	raw, _ := img.RawManifest()
	size := int64(len(raw)) + manifest.Config.Size + manifest.Layers[0].Size + manifest.Layers[1].Size
	if got.ID != idOf(t, img) || got.Size != size || got.Pinned ||
		!slices.Equal(got.RepoTags, []string{srv.host + "/app:v1"}) ||
		!slices.Equal(got.RepoDigests, []string{srv.host + "/app@" + digestOf(t, img)}) ||
		got.Config.User != "www-data:1004" || !slices.Equal(got.Config.Entrypoint, []string{"/f"}) || !slices.Equal(got.Config.Env, []string{"A=b"}) {
		t.Errorf("got %+v", got)
	}
	if config, err := s.RawConfig(got.ID); err != nil || !strings.Contains(string(config), "www-data") {
		t.Errorf("config %s %v", config, err)
	}
	if data, err := s.RawManifest(got.ID); err != nil || string(data) != string(raw) {
		t.Errorf("manifest %s %v", data, err)
	}
	if uid, user := UserOf(got.Config.User); uid != nil || user != "www-data" {
		t.Errorf("user %v %q", uid, user)
	}
}

func TestUserOf(t *testing.T) {
	for spec, want := range map[string]struct {
		uid  int64
		name string
	}{"": {-1, ""}, "1002": {1002, ""}, "1003:1004": {1003, ""}, "www-data": {-1, "www-data"}, "0": {0, ""}, "1x:2": {-1, "1x"}} {
		uid, name := UserOf(spec)
		if name != want.name || (uid == nil) != (want.uid < 0) || (uid != nil && *uid != want.uid) {
			t.Errorf("%q: %v %q", spec, uid, name)
		}
	}
}

func TestGetByEveryName(t *testing.T) {
	s := openStore(t)
	srv := serve(t)
	img := imageOf(t, layerOf(t, file("f", "x")))
	srv.push(t, "app:latest", img)
	dgst := digestOf(t, img)
	want := mustPull(t, s, srv.host+"/app:latest@"+dgst) // the digest decides, the tag is dropped
	if len(want.RepoTags) != 0 || len(want.RepoDigests) != 1 {
		t.Errorf("pulled by digest: %+v", want)
	}
	mustPull(t, s, srv.host+"/app")
	hexID := strings.TrimPrefix(want.ID, "sha256:")
	for _, ref := range []string{want.ID, hexID, hexID[:12], "sha256:" + hexID[:12], srv.host + "/app", srv.host + "/app:latest",
		srv.host + "/app@" + dgst, srv.host + "/app:v7@" + dgst} {
		if got, err := s.Get(ref); err != nil || got.ID != want.ID {
			t.Errorf("%s: %v %v", ref, got.ID, err)
		}
	}
	for _, ref := range []string{srv.host + "/app:v2", "nosuch", "sha256:" + strings.Repeat("0", 64), "0000"} {
		if _, err := s.Get(ref); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", ref, err)
		}
	}
	for _, ref := range []string{"", "docker.io/UPPER", "a b", "x:y:z/", strings.Repeat("a", 5000)} {
		if _, err := s.Get(ref); !errdefs.IsInvalidArgument(err) {
			t.Errorf("get %q: %v", ref, err)
		}
		if _, err := s.Pull(context.Background(), ref, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("pull %q: %v", ref, err)
		}
		if err := s.Remove(context.Background(), ref); !errdefs.IsInvalidArgument(err) {
			t.Errorf("remove %q: %v", ref, err)
		}
	}
	if _, err := s.Get("sha256:"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("empty prefix: %v", err)
	}
}

func TestOneImageUnderManyNames(t *testing.T) {
	s := openStore(t)
	srv := serve(t)
	img := imageOf(t, layerOf(t, file("f", "x")))
	for _, n := range []string{"tags:3", "tags:1", "tags:2", "other:1"} {
		mustPull(t, s, srv.push(t, n, img))
	}
	images := s.List()
	if len(images) != 1 || !slices.Equal(images[0].RepoTags, []string{srv.host + "/other:1", srv.host + "/tags:1", srv.host + "/tags:2", srv.host + "/tags:3"}) || len(images[0].RepoDigests) != 2 {
		t.Errorf("got %+v", images)
	}
	assertSnapshots(t, s, 1)
}

func TestMovedTagLeavesTheOldImageItsDigest(t *testing.T) {
	s := openStore(t)
	srv := serve(t)
	old := mustPull(t, s, srv.push(t, "app:v1", imageOf(t, layerOf(t, file("f", "old")))))
	now := mustPull(t, s, srv.push(t, "app:v1", imageOf(t, layerOf(t, file("f", "new")))))
	old, err := s.Get(old.ID)
	if err != nil || len(old.RepoTags) != 0 || len(old.RepoDigests) != 1 {
		t.Errorf("old: %+v %v", old, err)
	}
	if got, err := s.Get(srv.host + "/app:v1"); err != nil || got.ID != now.ID {
		t.Errorf("tag names %s: %v", got.ID, err)
	}
	reopened(t, s, func(s *Store) { // on disk it is the same
		if again, err := s.Get(old.ID); err != nil || len(again.RepoTags) != 0 || len(again.RepoDigests) != 1 {
			t.Errorf("old after reopening: %+v %v", again, err)
		}
	})
}

// reopened runs check on a second store over a copy of s's root.
func reopened(t *testing.T, s *Store, check func(*Store)) {
	t.Helper()
	root := filepath.Join(t.TempDir(), "copy")
	if out, err := exec.Command("cp", "-a", s.cfg.Root, root).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	again, err := Open(testConfig(t, root))
	if err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, again)
	check(again)
}

func TestIndexGivesThisMachinesImage(t *testing.T) {
	srv := serve(t)
	mine, other := imageOf(t, layerOf(t, file("f", "mine"))), configured(t, imageOf(t, layerOf(t, file("f", "other"))), func(c *v1.ConfigFile) { c.Architecture = "s390x" })
	on := func(arch string) v1.Descriptor {
		return v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}
	}
	for name, idx := range map[string]v1.ImageIndex{
		"oci":    mutate.IndexMediaType(mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: other, Descriptor: on("s390x")}, mutate.IndexAddendum{Add: mine, Descriptor: on("amd64")}), types.OCIImageIndex),
		"docker": mutate.IndexMediaType(mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: other, Descriptor: on("s390x")}, mutate.IndexAddendum{Add: mine, Descriptor: on("amd64")}), types.DockerManifestList),
		"silent": mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: other}, mutate.IndexAddendum{Add: mine}),
		"nested": mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: mine, Descriptor: on("amd64")})}),
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			ref, _ := parseName(srv.host + "/" + name + ":v1")
			if err := push.WriteIndex(ref, idx); err != nil {
				t.Fatal(err)
			}
			got := mustPull(t, s, ref.String())
			if got.ID != idOf(t, mine) || !slices.Equal(got.RepoDigests, []string{srv.host + "/" + name + "@" + digestOf(t, idx)}) {
				t.Errorf("got %+v", got)
			}
			if _, err := s.Get(srv.host + "/" + name + "@" + digestOf(t, idx)); err != nil {
				t.Error(err)
			}
		})
	}
}

func parseName(ref string) (name.Reference, error) { return name.ParseReference(ref, name.Insecure) }

func TestImageForAnotherMachineIsRefused(t *testing.T) {
	s := openStore(t)
	ref := serve(t).push(t, "app:v1", configured(t, imageOf(t, layerOf(t, file("f", "x"))), func(c *v1.ConfigFile) { c.Architecture = "s390x" }))
	if _, err := s.Pull(context.Background(), ref, nil); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "only for linux/s390x") {
		t.Errorf("got %v", err)
	}
	assertEmpty(t, s)
}

func TestWrongDiffIDIsDataLoss(t *testing.T) {
	s := openStore(t)
	img := configured(t, imageOf(t, layerOf(t, file("f", "x"))), func(c *v1.ConfigFile) {
		c.RootFS.DiffIDs[0].Hex = strings.Repeat("a", 64)
	})
	if _, err := s.Pull(context.Background(), serve(t).push(t, "app:v1", img), nil); !errdefs.IsDataLoss(err) {
		t.Errorf("got %v", err)
	}
	assertEmpty(t, s)
}

func TestUnknownConfigFieldsAreIgnored(t *testing.T) {
	if c, err := parseConfig([]byte(`{"os":"linux","future":{"x":[1]},"config":{"User":"u","Later":true}}`)); err != nil || c.Config.User != "u" {
		t.Errorf("%+v %v", c, err)
	}
}

// counter counts what a registry is asked for.
type counter struct{ manifests, blobs atomic.Int32 }

func (c *counter) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.UserAgent() == "podshim" {
			switch {
			case strings.Contains(r.URL.Path, "/blobs/"):
				c.blobs.Add(1)
			case strings.Contains(r.URL.Path, "/manifests/"):
				c.manifests.Add(1)
			}
		}
		next.ServeHTTP(w, r)
	})
}

func TestSamePullsJoin(t *testing.T) {
	var asked counter
	arrived, release := make(chan struct{}, 100), make(chan struct{})
	hold := func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.UserAgent() == "podshim" {
				arrived <- struct{}{}
				<-release
			}
			next.ServeHTTP(w, r)
		})
	}
	s := openStore(t)
	srv := serve(t, asked.wrap, hold)
	ref := srv.push(t, "app:v1", imageOf(t, layerOf(t, file("f", "x")), layerOf(t, file("g", "x"))))

	leaver, leave := context.WithCancel(context.Background())
	left := make(chan error, 1)
	go func() { _, err := s.Pull(leaver, ref, nil); left <- err }()
	<-arrived
	leave() // the first caller leaves: the pull goes on for the others
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Errorf("leaver got %v", err)
	}
	var wg sync.WaitGroup
	ids := make([]string, 8)
	started := make(chan struct{}, len(ids))
	for i := range ids {
		wg.Go(func() {
			started <- struct{}{}
			id, err := s.Pull(context.Background(), ref, nil)
			if err != nil {
				t.Error(err)
			}
			ids[i] = id
		})
	}
	for range ids {
		<-started
	}
	close(release)
	wg.Wait()
	if slices.Sort(ids); ids[0] != ids[7] || ids[0] == "" {
		t.Errorf("IDs %v", ids)
	}
	// Latecomers may have found the pull done and asked for manifest and config again,
	// but no layer comes twice.
	if n := asked.blobs.Load(); n < 3 || n > 2+9 {
		t.Errorf("%d blobs asked for", n)
	}
	assertSnapshots(t, s, 2)
}

func TestParallelPullsShareLayers(t *testing.T) {
	var asked counter
	s := openStore(t)
	srv := serve(t, asked.wrap)
	shared := make([]v1.Layer, 5)
	for i := range shared {
		shared[i] = layerOf(t, file("shared", strings.Repeat(string(rune('a'+i)), 100_000)))
	}
	const images = 6
	refs := make([]string, images)
	for i := range refs {
		own := layerOf(t, file("own", strings.Repeat("x", i+1)))
		refs[i] = srv.push(t, "app"+string(rune('0'+i))+":v1", imageOf(t, append(slices.Clone(shared), own)...))
	}
	var wg sync.WaitGroup
	for _, ref := range refs {
		wg.Go(func() {
			if _, err := s.Pull(context.Background(), ref, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := asked.blobs.Load(); n != 5+2*images {
		t.Errorf("%d blobs fetched, want 5 shared, %d own and %d configs", n, images, images)
	}
	assertSnapshots(t, s, 5+images)
}

func TestFailedPullKeepsWhatOthersHave(t *testing.T) {
	s := openStore(t)
	srv := serve(t)
	base := layerOf(t, file("base", "x"))
	kept := mustPull(t, s, srv.push(t, "good:v1", imageOf(t, base)))
	bad := configured(t, imageOf(t, base, layerOf(t, file("mid", "x")), layerOf(t, file("top", "x"))), func(c *v1.ConfigFile) {
		c.RootFS.DiffIDs[2].Hex = strings.Repeat("a", 64)
	})
	if _, err := s.Pull(context.Background(), srv.push(t, "bad:v1", bad), nil); err == nil {
		t.Fatal("pulled")
	}
	assertSnapshots(t, s, 1)
	if got := s.List(); len(got) != 1 || got[0].ID != kept.ID {
		t.Errorf("images %+v", got)
	}
}

func TestCloseEndsPulls(t *testing.T) {
	needRoot(t)
	arrived := make(chan struct{}, 10)
	hang := func(_ http.ResponseWriter, r *http.Request) bool {
		arrived <- struct{}{}
		<-r.Context().Done()
		return false
	}
	s, err := Open(testConfig(t, t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	ref := serve(t, readsOnly(hang)).host + "/app:v1"
	done := make(chan error, 1)
	go func() { _, err := s.Pull(context.Background(), ref, nil); done <- err }()
	<-arrived
	closeStore(t, s)
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := s.Pull(context.Background(), ref, nil); !errdefs.IsUnavailable(err) {
		t.Errorf("pull on a closed store: %v", err)
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	s := openStore(t)
	if _, err := Open(testConfig(t, s.cfg.Root)); !errdefs.IsUnavailable(err) {
		t.Errorf("got %v", err)
	}
}

// The test binary runs itself as a puller, to be killed in the middle of it.
func TestMain(m *testing.M) {
	if ref := os.Getenv("PULL_UNTIL_KILLED"); ref != "" {
		cfg := Config{Root: os.Getenv("PULL_ROOT"), HostsDirs: []string{}}
		s, err := Open(cfg)
		if err == nil {
			_, err = s.Pull(context.Background(), ref, nil)
		}
		log.Fatal("not killed: ", err)
	}
	os.Exit(m.Run())
}

func TestKilledPullLeavesNothingAndCanBeRetried(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	// The registry gives the bottom layers and holds back the last, half sent.
	last := layerOf(t, file("last", strings.Repeat("0123456789", 1<<18)))
	held := digestOf(t, last)
	half, release := make(chan struct{}, 1), make(chan struct{})
	var holding atomic.Bool
	holding.Store(true)
	srv := serve(t, func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.UserAgent() != "podshim" || !strings.Contains(r.URL.Path, held) || !holding.Load() {
				next.ServeHTTP(w, r)
				return
			}
			w.Header().Set("Content-Length", "100000")
			_, _ = w.Write([]byte{0x1f, 0x8b})
			w.(http.Flusher).Flush()
			half <- struct{}{}
			select {
			case <-release:
			case <-r.Context().Done():
			}
		})
	})
	defer close(release)
	ref := srv.push(t, "app:v1", imageOf(t, layerOf(t, file("a", "1")), layerOf(t, file("b", "2")), last))

	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "PULL_UNTIL_KILLED="+ref, "PULL_ROOT="+root)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-half
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if dirs, err := os.ReadDir(filepath.Join(root, stagingDir)); err != nil || len(dirs) == 0 {
		t.Fatalf("the kill came too early: %v %v", dirs, err)
	}
	holding.Store(false)

	s, err := Open(testConfig(t, root))
	if err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, s)
	assertEmpty(t, s)
	if got := read(t, mounted(t, s, "c", mustPull(t, s, ref)), "last"); len(got) != 10<<18 {
		t.Errorf("%d bytes", len(got))
	}
}

func TestLostLayersMakeTheImageForgotten(t *testing.T) {
	needRoot(t)
	root := t.TempDir()
	s, err := Open(testConfig(t, root))
	if err != nil {
		t.Fatal(err)
	}
	ref := serve(t).push(t, "app:v1", imageOf(t, layerOf(t, file("f", "x"))))
	mustPull(t, s, ref)
	closeStore(t, s)
	dirs, _ := filepath.Glob(filepath.Join(root, "snapshots", "*"))
	for _, d := range dirs {
		if err := os.RemoveAll(d); err != nil {
			t.Fatal(err)
		}
	}
	if s, err = Open(testConfig(t, root)); err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, s)
	assertEmpty(t, s)
	mustPull(t, s, ref)
}

// BenchmarkPullTenLayers pulls an image of ten layers, 4 MiB each, from a registry in
// this process: inflation, hashing, unpacking, sync and records.
func BenchmarkPullTenLayers(b *testing.B) {
	srv := serve(b)
	layers := make([]v1.Layer, 10)
	for i := range layers {
		l, err := random.Layer(4<<20, types.DockerLayer)
		if err != nil {
			b.Fatal(err)
		}
		layers[i] = l
	}
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		b.Fatal(err)
	}
	ref := srv.push(b, "ten:v1", img)
	s := openStore(b)
	b.SetBytes(40 << 20)
	for b.Loop() {
		id, err := s.Pull(context.Background(), ref, nil)
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := s.Remove(context.Background(), id); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}
