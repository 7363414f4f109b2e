package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func pulledStore(t testing.TB) (*Store, Image) {
	t.Helper()
	s := openStore(t)
	return s, mustPull(t, s, serve(t).push(t, "app:v1", imageOf(t,
		layerOf(t, dir("etc", 0o755), file("etc/base", "base")), layerOf(t, file("top", strings.Repeat("t", 10_000))))))
}

func TestRemoveByAnyNameRemovesAll(t *testing.T) {
	ctx := context.Background()
	for name, pick := range map[string]func(Image) string{
		"ID": func(i Image) string { return i.ID }, "tag": func(i Image) string { return i.RepoTags[0] },
		"digest": func(i Image) string { return i.RepoDigests[0] }, "prefix": func(i Image) string { return i.ID[:20] },
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t)
			srv := serve(t)
			img := imageOf(t, layerOf(t, file("f", "x")), layerOf(t, file("g", "y")))
			mustPull(t, s, srv.push(t, "a:1", img))
			got := mustPull(t, s, srv.push(t, "b:2", img))
			if err := s.Remove(ctx, pick(got)); err != nil {
				t.Fatal(err)
			}
			assertEmpty(t, s)
			if err := s.Remove(ctx, pick(got)); err != nil {
				t.Errorf("again: %v", err)
			}
			mustPull(t, s, srv.host+"/a:1")
		})
	}
}

func TestRemoveKeepsSharedLayers(t *testing.T) {
	s := openStore(t)
	srv := serve(t)
	base := layerOf(t, file("base", "x"))
	a := mustPull(t, s, srv.push(t, "a:1", imageOf(t, base, layerOf(t, file("a", "x")))))
	b := mustPull(t, s, srv.push(t, "b:1", imageOf(t, base)))
	assertSnapshots(t, s, 2)
	if err := s.Remove(context.Background(), a.ID); err != nil {
		t.Fatal(err)
	}
	assertSnapshots(t, s, 1)
	if got := read(t, mounted(t, s, "c", b), "base"); got != "x" {
		t.Error(got)
	}
}

func TestContainerKeepsItsLayersUntilItGoes(t *testing.T) {
	ctx := context.Background()
	s, img := pulledStore(t)
	mounts, err := s.Prepare(ctx, "c1", img)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(ctx, img.ID); err != nil {
		t.Fatal(err)
	}
	if len(s.List()) != 0 {
		t.Error("image is listed")
	}
	assertSnapshots(t, s, 3)
	target := filepath.Join(t.TempDir(), "rootfs")
	if err := Mount(mounts, target, ""); err != nil {
		t.Fatal(err)
	}
	if got := read(t, target, "etc/base"); got != "base" {
		t.Error(got)
	}
	if err := errors.Join(Unmount(target), Unmount(target)); err != nil {
		t.Error(err)
	}
	for range 2 { // the second time it is gone
		if err := s.RemoveSnapshot(ctx, "c1"); err != nil {
			t.Error(err)
		}
	}
	assertEmpty(t, s)
	if _, err := s.Prepare(ctx, "c2", img); !errdefs.IsNotFound(err) {
		t.Errorf("prepare of a removed image: %v", err)
	}
}

func TestDiscardedSnapshotsAreGoneWhenTheStoreIsClosed(t *testing.T) {
	ctx := context.Background()
	needRoot(t)
	cfg := testConfig(t, t.TempDir())
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	img := mustPull(t, s, serve(t).push(t, "app:v1", imageOf(t, layerOf(t, file("a", "a")), layerOf(t, file("b", "b")))))
	for _, key := range []string{"c1", "c2", "stays"} {
		if _, err := s.Prepare(ctx, key, img); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"c1", "never made", "c2", "c1"} {
		s.DiscardSnapshot(key)
	}
	if _, err := s.Mounts(ctx, "stays"); err != nil {
		t.Error(err)
	}
	again := func() {
		closeStore(t, s)
		if s, err = Open(cfg); err != nil {
			t.Fatal(err)
		}
	}
	again()
	assertSnapshots(t, s, 3) // two layers and the one that stays
	if err := s.Remove(ctx, img.ID); err != nil {
		t.Fatal(err)
	}
	s.DiscardSnapshot("stays")
	again()
	assertEmpty(t, s)
	closeStore(t, s)
}

func TestPrepareIsIdempotent(t *testing.T) {
	ctx := context.Background()
	s, img := pulledStore(t)
	first, err := s.Prepare(ctx, "c1", img)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.Prepare(ctx, "c1", img)
	if err != nil || len(again) != 1 || !slices.Equal(first[0].Options, again[0].Options) {
		t.Errorf("%v, then %v %v", first, again, err)
	}
	if _, err := s.View(ctx, "c1", img); !errdefs.IsAlreadyExists(err) {
		t.Errorf("view under the same key: %v", err)
	}
	if _, err := s.Prepare(ctx, "c1", Image{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("other image under the same key: %v", err)
	}
	if _, err := s.Prepare(ctx, "", img); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no key: %v", err)
	}
	if keys, err := s.Snapshots(ctx); err != nil || !slices.Equal(keys, []string{"c1"}) {
		t.Errorf("keys %v %v", keys, err)
	}
	if _, err := s.Mounts(ctx, "nosuch"); !errdefs.IsNotFound(err) {
		t.Errorf("mounts of nothing: %v", err)
	}
}

func TestWritesStayInTheContainer(t *testing.T) {
	ctx := context.Background()
	s, img := pulledStore(t)
	a, b := mounted(t, s, "a", img), mounted(t, s, "b", img)
	if err := os.WriteFile(filepath.Join(a, "etc/base"), []byte(strings.Repeat("w", 50_000)), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := read(t, b, "etc/base"); got != "base" {
		t.Errorf("b sees %q", got)
	}
	ua, err := s.Usage(ctx, "a")
	if err != nil || ua.Bytes < 50_000 || ua.Inodes < 2 {
		t.Errorf("usage of a: %+v %v", ua, err)
	}
	ub, err := s.Usage(ctx, "b")
	if err != nil || ub.Bytes >= 50_000 {
		t.Errorf("usage of b: %+v %v", ub, err)
	}
}

// The kernel syncs the whole filesystem when a root without this option is unmounted.
func TestUnmountWaitsForNoDisk(t *testing.T) {
	s, img := pulledStore(t)
	root := mounted(t, s, "c", img)
	write := filepath.Join(root, "written")
	if err := os.WriteFile(write, []byte("by the container"), 0o644); err != nil {
		t.Fatal(err)
	}
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if f[4] == root && !strings.HasSuffix(f[len(f)-1], "volatile") {
			t.Errorf("mounted with %s", f[len(f)-1])
		}
	}
	if err := Unmount(root); err != nil {
		t.Fatal(err)
	}
	if err := s.RemoveSnapshot(context.Background(), "c"); err != nil {
		t.Fatal(err)
	}
	assertSnapshots(t, s, 2) // the image's layers
}

func TestViewIsReadOnly(t *testing.T) {
	s, img := pulledStore(t)
	mounts, err := s.View(context.Background(), "volume", img)
	if err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(t.TempDir(), "view")
	if err := Mount(mounts, target, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := Unmount(target); err != nil {
			t.Error(err)
		}
	}()
	if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v", err)
	}
	if got := read(t, target, "etc/base"); got != "base" {
		t.Error(got)
	}
}

func TestIDMappedSnapshot(t *testing.T) {
	s, img := pulledStore(t)
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100_000, Size: 65536}}
	root := mounted(t, s, "c", img, WithIDMap(ids, ids))
	for _, path := range []string{".", "etc", "etc/base", "top"} {
		if st := lstat(t, root, path); st.Uid != 100_000 || st.Gid != 100_000 {
			t.Errorf("%s belongs to %d:%d on the host", path, st.Uid, st.Gid)
		}
	}
	if left := mountsUnder(t, s.cfg.Root); len(left) != 0 {
		t.Errorf("mounts left in the store: %v", left)
	}
}

func TestFsInfoCountsLayers(t *testing.T) {
	ctx := context.Background()
	s := openStore(t)
	before, err := s.FsInfo(ctx)
	if err != nil || before.Mountpoint != s.cfg.Root {
		t.Fatalf("%+v %v", before, err)
	}
	img := mustPull(t, s, serve(t).push(t, "app:v1", imageOf(t, layerOf(t, file("f", strings.Repeat("x", 1<<20))))))
	after, err := s.FsInfo(ctx)
	if err != nil || after.Bytes-before.Bytes < 1<<20 || after.Inodes <= before.Inodes {
		t.Errorf("before %+v, after %+v, %v", before, after, err)
	}
	if err := s.Remove(ctx, img.ID); err != nil {
		t.Fatal(err)
	}
	if now, err := s.FsInfo(ctx); err != nil || after.Bytes-now.Bytes < 1<<20 {
		t.Errorf("after removal %+v %v", now, err)
	}
}

func TestReopenKeepsImagesAndSnapshots(t *testing.T) {
	ctx := context.Background()
	needRoot(t)
	cfg := testConfig(t, t.TempDir(), func(c *Config) { c.Pinned = []string{"docker.io/library/none"} })
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	img := mustPull(t, s, serve(t).push(t, "app:v1", imageOf(t, layerOf(t, file("f", "x")))))
	if _, err := s.Prepare(ctx, "c1", img); err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)
	cfg.Pinned = img.RepoTags
	if s, err = Open(cfg); err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, s)
	got, err := s.Get(img.RepoTags[0])
	if err != nil || got.ID != img.ID || !got.Pinned || got.ChainID != img.ChainID || got.Size != img.Size {
		t.Errorf("%+v %v", got, err)
	}
	assertSnapshots(t, s, 2)
	if keys, err := s.Snapshots(ctx); err != nil || !slices.Equal(keys, []string{"c1"}) {
		t.Errorf("keys %v %v", keys, err)
	}
}

func TestRootIsPrivate(t *testing.T) {
	s := openStore(t)
	if st := lstat(t, s.cfg.Root); st.Mode&0o777 != 0o700 {
		t.Errorf("mode %o", st.Mode)
	}
}

func TestUnmountOfNothing(t *testing.T) {
	needRoot(t)
	if err := errors.Join(Unmount(t.TempDir()), Unmount("/nonexistent/podshim")); err != nil {
		t.Error(err)
	}
}

func BenchmarkPrepareRemove(b *testing.B) {
	ctx := context.Background()
	s, img := pulledStore(b)
	for b.Loop() {
		if _, err := s.Prepare(ctx, "c", img); err != nil {
			b.Fatal(err)
		}
		if err := s.RemoveSnapshot(ctx, "c"); err != nil {
			b.Fatal(err)
		}
	}
}

// An image of one layer is mounted by a bind mount, not by overlayfs.
func TestIDMappedViewOfOneLayer(t *testing.T) {
	ctx := context.Background()
	s := openStore(t)
	img := mustPull(t, s, serve(t).push(t, "one:v1", imageOf(t, layerOf(t, file("f", "x")))))
	ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100_000, Size: 65536}}
	mounts, err := s.View(ctx, "v", img, WithIDMap(ids, ids))
	if err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(t.TempDir(), "view")
	if err := Mount(mounts, target, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := Unmount(target); err != nil {
			t.Error(err)
		}
	}()
	if st := lstat(t, target, "f"); st.Uid != 100_000 {
		t.Errorf("belongs to %d on the host", st.Uid)
	}
	if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v", err)
	}
}

// What a container costs the image store on its way up and down.
func BenchmarkPrepareAndDiscard(b *testing.B) {
	ctx := context.Background()
	s, img := pulledStore(b)
	for n := 0; b.Loop(); n++ {
		key := fmt.Sprint("c", n)
		if _, err := s.Prepare(ctx, key, img); err != nil {
			b.Fatal(err)
		}
		s.DiscardSnapshot(key)
	}
}
