package state

import (
	"io"
	"maps"
	"os"
	"path/filepath"
	"testing"

	"github.com/sirupsen/logrus"
)

type places struct{ Config }

func newPlaces(t *testing.T) places {
	log := logrus.New()
	log.SetOutput(io.Discard)
	dir := t.TempDir()
	return places{Config{
		Database: filepath.Join(dir, "root", "state.db"),
		RunDir:   filepath.Join(dir, "run"),
		Log:      logrus.NewEntry(log),
	}}
}

func (p places) open(t *testing.T) *Store {
	t.Helper()
	s, err := Open(p.Config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t *testing.T, s *Store, id, value string) {
	t.Helper()
	if err := s.Put(Containers, id, []byte(value)); err != nil {
		t.Fatal(err)
	}
}

func want(t *testing.T, s *Store, records map[string]string) {
	t.Helper()
	got := make(map[string]string)
	for id, v := range s.Take(Containers) {
		got[id] = string(v)
	}
	if !maps.Equal(got, records) {
		t.Fatalf("records are %q, want %q", got, records)
	}
}

// crash is the end of a daemon that flushed nothing since Sync: the database as
// it was, the run directory as it is.
func crash(t *testing.T, p places, s *Store, change func()) {
	t.Helper()
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(p.Database)
	if err != nil {
		t.Fatal(err)
	}
	change()
	run := t.TempDir()
	if err := os.CopyFS(filepath.Join(run, "copy"), os.DirFS(p.RunDir)); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.Database, before, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(p.RunDir); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(p.RunDir, os.DirFS(filepath.Join(run, "copy"))); err != nil {
		t.Fatal(err)
	}
}

func TestRecordsSurviveCloseAndEitherPlace(t *testing.T) {
	p := newPlaces(t)
	s := p.open(t)
	put(t, s, "a", "1")
	put(t, s, "b", "1")
	put(t, s, "a", "2")
	if err := s.Delete(Containers, "b"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(Containers, "c", nil); err == nil {
		t.Fatal("a closed store took a record")
	}

	t.Run("emptied run directory", func(t *testing.T) {
		if err := os.RemoveAll(p.RunDir); err != nil {
			t.Fatal(err)
		}
		s := p.open(t)
		want(t, s, map[string]string{"a": "2"})
		s.Close()
	})
	for name, damage := range map[string]func() error{
		"zeroed":    func() error { return os.WriteFile(p.Database, make([]byte, 64<<10), 0o600) },
		"truncated": func() error { return os.Truncate(p.Database, 5000) },
		"one page":  func() error { return os.Truncate(p.Database, 4096) },
		"emptied":   func() error { return os.Truncate(p.Database, 0) },
		"removed":   func() error { return os.Remove(p.Database) },
	} {
		t.Run(name+" database", func(t *testing.T) {
			if err := damage(); err != nil {
				t.Fatal(err)
			}
			s := p.open(t)
			want(t, s, map[string]string{"a": "2"})
			s.Close()
		})
	}
}

func TestCrashBeforeFlush(t *testing.T) {
	p := newPlaces(t)
	s := p.open(t)
	put(t, s, "changed", "old")
	crash(t, p, s, func() {
		put(t, s, "changed", "new")
		put(t, s, "made", "new")
	})
	// What a crash leaves of a record that was being written.
	if err := os.WriteFile(filepath.Join(p.RunDir, string(Containers), "half"+partial), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	again := p.open(t)
	want(t, again, map[string]string{"changed": "new", "made": "new"})
}

// With a lost database every record is flushed at once, before anybody has asked
// for one.
func TestFlushKeepsWhatIsNotTaken(t *testing.T) {
	p := newPlaces(t)
	s := p.open(t)
	put(t, s, "a", "1")
	s.Close()
	if err := os.Remove(p.Database); err != nil {
		t.Fatal(err)
	}
	s = p.open(t)
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	want(t, s, map[string]string{"a": "1"})
	put(t, s, "a", "2")
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.records[key{Containers, "a"}]; e.value != nil {
		t.Errorf("the store keeps the flushed value %q", e.value)
	}
}

func TestTombstoneHidesTheDatabasesCopy(t *testing.T) {
	p := newPlaces(t)
	s := p.open(t)
	put(t, s, "a", "old")
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	s.Close()
	// Deleted by a daemon that was killed before its flush.
	if err := s.writeRun(key{Containers, "a"}, entry{seq: s.seq + 1, deleted: true}); err != nil {
		t.Fatal(err)
	}
	mark := filepath.Join(p.RunDir, string(Containers), "a")
	if raw, err := os.ReadFile(mark); err != nil || !IsTombstone(raw) {
		t.Errorf("no mark of the removal: %v", err)
	}
	s = p.open(t)
	want(t, s, map[string]string{})
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if _, err := os.Stat(mark); err == nil {
		t.Error("the mark outlives the removal")
	}
	s = p.open(t)
	want(t, s, map[string]string{})
}

func TestDamagedRunRecordFallsBackToTheDatabase(t *testing.T) {
	p := newPlaces(t)
	s := p.open(t)
	put(t, s, "a", "1")
	s.Close()
	file := filepath.Join(p.RunDir, string(Containers), "a")
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	raw[len(raw)-1] ^= 1
	if err := os.WriteFile(file, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	want(t, p.open(t), map[string]string{"a": "1"})
}

func TestTwoStoresOnOneDatabase(t *testing.T) {
	p := newPlaces(t)
	p.open(t)
	if _, err := Open(p.Config); err == nil {
		t.Fatal("the database was opened twice")
	}
}

func BenchmarkPut(b *testing.B) {
	log := logrus.New()
	log.SetOutput(io.Discard)
	dir := b.TempDir()
	s, err := Open(Config{Database: filepath.Join(dir, "state.db"), RunDir: filepath.Join(dir, "run"), Log: logrus.NewEntry(log)})
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	value := make([]byte, 3000)
	for b.Loop() {
		if err := s.Put(Containers, "id", value); err != nil {
			b.Fatal(err)
		}
	}
}
