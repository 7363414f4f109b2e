package image

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// layerDirs are the directories of the image's layers, topmost first.
func layerDirs(t *testing.T, s *Store, img Image) []string {
	t.Helper()
	dirs, err := s.chainDirs(context.Background(), img.ChainID.String())
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

func crashed(c *Config) { c.Restarted, c.Crashed = true, true }

// After a power cut an image is read before it is used; a damaged layer, and no
// other, is brought again by the next pull.
func TestDamageOfAPowerCut(t *testing.T) {
	needRoot(t)
	ctx := context.Background()
	for what, spoil := range map[string]func(layer string) error{
		"zeroed file":    func(l string) error { return os.WriteFile(filepath.Join(l, "b"), make([]byte, 4), 0o644) },
		"truncated file": func(l string) error { return os.Truncate(filepath.Join(l, "b"), 0) },
		"lost file":      func(l string) error { return os.Remove(filepath.Join(l, "b")) },
		"lost link":      func(l string) error { return os.Remove(filepath.Join(l, "to-b")) },
		"lost layer":     os.RemoveAll,
		"lost list":      func(l string) error { return os.Truncate(filepath.Join(filepath.Dir(l), listingFile), 5) },
	} {
		t.Run(what, func(t *testing.T) {
			var asked counter
			srv := serve(t, asked.wrap)
			ref := srv.push(t, "app:1", imageOf(t,
				layerOf(t, file("a", "aaaa")),
				layerOf(t, file("b", "bbbb"), symlink("to-b", "b"), hardlink("b-too", "b")),
				layerOf(t, file("c", "cccc"))))
			root := t.TempDir()
			s, err := Open(testConfig(t, root))
			if err != nil {
				t.Fatal(err)
			}
			img := mustPull(t, s, ref)
			// A container of before: its snapshot keeps the layers from being removed.
			if _, err := s.Prepare(ctx, "old", img); err != nil {
				t.Fatal(err)
			}
			layer := layerDirs(t, s, img)[1]
			if damage, err := s.Damages(ctx, true); err != nil || len(damage) > 0 {
				t.Fatalf("whole layers: %v, %v", damage, err)
			}
			closeStore(t, s)
			if err := spoil(layer); err != nil {
				t.Fatal(err)
			}
			if s, err = Inspect(testConfig(t, root)); err != nil {
				t.Fatal(err)
			}
			if damage, err := s.Damages(ctx, true); err != nil || len(damage) != 1 || !slices.Equal(damage[0].Images, []string{img.ID}) {
				t.Errorf("found damaged: %v, %v", damage, err)
			}
			closeStore(t, s)
			asked.blobs.Store(0)
			if s, err = Open(testConfig(t, root, crashed)); err != nil {
				t.Fatal(err)
			}
			defer func() { closeStore(t, s) }()
			if _, err := s.Prepare(ctx, "new", img); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "pull it again") {
				t.Errorf("use of a damaged image: %v", err)
			}
			if _, err := s.Get(ref); !errdefs.IsNotFound(err) {
				t.Errorf("the damaged image is there: %v", err)
			}
			img = mustPull(t, s, ref)
			if n := asked.blobs.Load(); n != 2 { // the config and one layer
				t.Errorf("%d blobs were fetched, want 2", n)
			}
			dir := mounted(t, s, "new", img)
			for _, name := range []string{"a", "b", "c", "to-b", "b-too"} {
				if got := read(t, dir, name); got != strings.Repeat(strings.TrimSuffix(strings.TrimPrefix(name, "to-"), "-too"), 4) {
					t.Errorf("%s is %q", name, got)
				}
			}
			if damage, err := s.Damages(ctx, true); err != nil || len(damage) > 0 {
				t.Errorf("after the pull: %v, %v", damage, err)
			}
		})
	}
}

// Layers are not read again and again: not without a power cut, and not once they
// were found whole.
func TestWholeLayersAreTrusted(t *testing.T) {
	needRoot(t)
	ctx := context.Background()
	srv := serve(t)
	ref := srv.push(t, "app:1", imageOf(t, layerOf(t, file("a", "aaaa"))))
	root := t.TempDir()
	s, err := Open(testConfig(t, root))
	if err != nil {
		t.Fatal(err)
	}
	img := mustPull(t, s, ref)
	closeStore(t, s)
	if s, err = Open(testConfig(t, root, crashed)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prepare(ctx, "c", img); err != nil {
		t.Errorf("a whole image: %v", err)
	}
	layer := layerDirs(t, s, img)[0]
	closeStore(t, s) // waits for the background's look, or cuts it short
	if err := os.Truncate(filepath.Join(layer, "a"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(root, unverifiedFile)); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(testConfig(t, root)); err != nil {
		t.Fatal(err)
	}
	defer closeStore(t, s)
	if _, err := s.Prepare(ctx, "d", img); err != nil {
		t.Errorf("read without a reason: %v", err)
	}
}

// Without its databases the store begins anew, and leaves alone what running
// containers are in.
func TestDamagedDatabases(t *testing.T) {
	needRoot(t)
	ctx := context.Background()
	for _, db := range []string{"images.db", "metadata.db"} {
		for what, spoil := range map[string]func(string) error{
			"zeroed":    func(p string) error { return os.WriteFile(p, make([]byte, 64<<10), 0o600) },
			"truncated": func(p string) error { return os.Truncate(p, int64(2*os.Getpagesize()+10)) },
			"empty":     func(p string) error { return os.Truncate(p, 0) },
		} {
			t.Run(db+" "+what, func(t *testing.T) {
				srv := serve(t)
				ref := srv.push(t, "app:1", imageOf(t, layerOf(t, file("a", "aaaa")), layerOf(t, file("b", "bbbb"))))
				root := t.TempDir()
				s, err := Open(testConfig(t, root))
				if err != nil {
					t.Fatal(err)
				}
				running := filepath.Join(t.TempDir(), "rootfs")
				mounts, err := s.Prepare(ctx, "running", mustPull(t, s, ref))
				if err == nil {
					err = Mount(mounts, running, "")
				}
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					if err := Unmount(running); err != nil {
						t.Error(err)
					}
				})
				closeStore(t, s)
				if err := spoil(filepath.Join(root, db)); err != nil {
					t.Fatal(err)
				}
				if s, err = Open(testConfig(t, root)); err != nil {
					t.Fatal(err)
				}
				defer func() { closeStore(t, s) }()
				if got := s.List(); len(got) != 0 {
					t.Errorf("images without records: %v", got)
				}
				for _, name := range []string{"a", "b"} {
					if got := read(t, running, name); len(got) != 4 {
						t.Errorf("a running container's %s is %q", name, got)
					}
				}
				if err := os.WriteFile(filepath.Join(running, "new"), nil, 0o644); err != nil {
					t.Errorf("a running container cannot write: %v", err)
				}
				img := mustPull(t, s, ref)
				if got := read(t, mounted(t, s, "new", img), "a"); got != "aaaa" {
					t.Errorf("a new container's a is %q", got)
				}
				// Given back as if nothing had been.
				if err := s.RemoveSnapshot(ctx, "running"); err != nil {
					t.Error(err)
				}
			})
		}
	}
}
