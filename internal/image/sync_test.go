package image

import (
	"errors"
	"path/filepath"
	"testing"
)

// mark returns the mark that an image's record on disk has.
func mark(t *testing.T, s *Store, id string) string {
	t.Helper()
	recs, broken, err := s.records.load()
	if err != nil || len(broken) != 0 {
		t.Fatal(err, broken)
	}
	for _, rec := range recs {
		if rec.ID == id {
			return rec.Unsynced
		}
	}
	t.Fatalf("no record of %s", id)
	return ""
}

// reopenedWith pulls an image, closes the store, gives the image's record a mark, and
// opens the store again.
func reopenedWith(t *testing.T, boot func(*Store) string) (*Store, Image) {
	t.Helper()
	needRoot(t)
	cfg := testConfig(t, t.TempDir())
	open := func() *Store {
		s, err := Open(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	img := mustPull(t, s, serve(t).push(t, "app:v1", imageOf(t, layerOf(t, file("f", "x")))))
	closeStore(t, s) // its syncer as well
	records, err := openRecords(filepath.Join(cfg.Root, "images.db"))
	if err != nil {
		t.Fatal(err)
	}
	recs, _, err := records.load()
	if err == nil {
		recs[0].Unsynced = boot(s)
		err = records.update(recs...)
	}
	if err := errors.Join(err, records.close()); err != nil {
		t.Fatal(err)
	}
	s = open()
	t.Cleanup(func() { closeStore(t, s) })
	return s, img
}

func TestImageLosesItsMarkWhenItIsOnDisk(t *testing.T) {
	s := openStore(t)
	srv := serve(t)
	img := imageOf(t, layerOf(t, file("f", "x")))
	got := mustPull(t, s, srv.push(t, "a:1", img))
	if err := s.syncImages(); err != nil {
		t.Fatal(err)
	}
	if m := mark(t, s, got.ID); m != "" {
		t.Errorf("marked %q after a sync", m)
	}
	// A power cut must not cost what was on disk before.
	mustPull(t, s, srv.push(t, "b:2", img))
	if m := mark(t, s, got.ID); m != "" {
		t.Errorf("marked %q by another pull of the same layers", m)
	}
	if names := s.List()[0].RepoTags; len(names) != 2 {
		t.Errorf("names %v", names)
	}
}

func TestImageThatAPowerCutMayHaveTornIsForgotten(t *testing.T) {
	s, _ := reopenedWith(t, func(*Store) string { return "another boot of this machine" })
	assertEmpty(t, s)
}

func TestImageWithTheMarkOutlivesTheDaemon(t *testing.T) {
	s, img := reopenedWith(t, func(s *Store) string { return s.boot })
	if _, err := s.Get(img.ID); err != nil {
		t.Fatal(err)
	}
	if err := s.syncImages(); err != nil {
		t.Fatal(err)
	}
	if m := mark(t, s, img.ID); m != "" {
		t.Errorf("marked %q after a sync", m)
	}
}
