package state

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"

	"github.com/podshim/podshim/internal/boot"
)

// lost tells whether the thing called id may be what a damaged record stood for.
func lost(s *Store, id string) bool {
	for _, kind := range kinds {
		if ids, more := s.Damage(kind); more || slices.Contains(ids, id) {
			return true
		}
	}
	return false
}

// spoil changes what a record's file in the run directory holds.
func (p places) spoil(t *testing.T, id string, change func([]byte) []byte) {
	t.Helper()
	file := filepath.Join(p.RunDir, string(Containers), id)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, change(raw), 0o600); err != nil {
		t.Fatal(err)
	}
}

// spoilDB puts raw bytes into the database, where a record was.
func (p places) spoilDB(t *testing.T, id string, raw []byte) {
	t.Helper()
	db, err := bolt.Open(p.Database, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bolt.Tx) error { return tx.Bucket([]byte(Containers)).Put([]byte(id), raw) })
	if err != nil {
		t.Fatal(err)
	}
}

func flip(raw []byte) []byte { raw[len(raw)-1] ^= 1; return raw }
func half(raw []byte) []byte { return raw[:len(raw)/2] }

// asideOf lists what is kept for this boot.
func (p places) asideOf(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(filepath.Dir(p.Database), "damaged", p.Boot.Boot, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

var sameBoot = boot.Last{Boot: "this", Now: "this", Known: true}

// A record that is damaged in both places stands for what may run: that is said at
// every start, until the file that keeps it is taken away or the machine restarts.
func TestRecordDamagedInBothPlaces(t *testing.T) {
	for what, change := range map[string]func([]byte) []byte{"flipped": flip, "half": half, "empty": func([]byte) []byte { return nil }} {
		t.Run(what, func(t *testing.T) {
			p := newPlaces(t)
			s := p.open(t)
			put(t, s, "a", "1")
			put(t, s, "b", "2")
			s.Close()
			p.Boot = sameBoot
			p.spoil(t, "a", change)
			p.spoilDB(t, "a", []byte("garbage"))
			for range 2 {
				s = p.open(t)
				want(t, s, map[string]string{"b": "2"})
				if !lost(s, "a") || lost(s, "c") {
					t.Errorf("lost: the damaged one %t, an unknown one %t", lost(s, "a"), lost(s, "c"))
				}
				if ids, more := s.Damage(Containers); !slices.Equal(ids, []string{"a"}) || more {
					t.Errorf("damaged are %q, more %t", ids, more)
				}
				if ids, _ := s.Damage(Sandboxes); len(ids) > 0 {
					t.Errorf("damaged sandboxes: %q", ids)
				}
				s.Close()
			}
			kept := p.asideOf(t)
			if len(kept) != 1 || filepath.Base(kept[0]) != "containers-a" {
				t.Fatalf("set aside are %q", kept)
			}
			restarted := p
			restarted.Boot = boot.Last{Boot: "this", Now: "next", Known: true}
			s = restarted.open(t)
			if lost(s, "a") {
				t.Error("after a restart of the machine it may still run")
			}
			s.Close()
			if err := os.Remove(kept[0]); err != nil {
				t.Fatal(err)
			}
			if s = p.open(t); lost(s, "a") {
				t.Error("its file was taken away, and it is lost still")
			}
		})
	}
}

func TestRecordDamagedInOnePlaceIsHealed(t *testing.T) {
	p := newPlaces(t)
	s := p.open(t)
	put(t, s, "a", "1")
	put(t, s, "b", "2")
	s.Close()
	p.Boot = sameBoot
	p.spoil(t, "a", flip)
	p.spoilDB(t, "b", []byte("garbage"))
	for range 2 { // healed in both places: the second time the other one is missing
		s = p.open(t)
		want(t, s, map[string]string{"a": "1", "b": "2"})
		if err := s.Sync(); err != nil {
			t.Fatal(err)
		}
		if lost(s, "a") || lost(s, "b") || len(p.asideOf(t)) > 0 {
			t.Error("what the other place has is taken for lost")
		}
		s.Close()
		if err := os.RemoveAll(p.RunDir); err != nil {
			t.Fatal(err)
		}
	}
}

// The database's own structure, or a name in it, is damaged: nobody knows whose
// records are lost.
func TestDamageThatNobodyKnowsTheOwnersOf(t *testing.T) {
	for what, spoil := range map[string]func(t *testing.T, p places){
		"zeroed": func(t *testing.T, p places) {
			st, err := os.Stat(p.Database)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(p.Database, make([]byte, st.Size()), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"truncated": func(t *testing.T, p places) {
			// Behind its two pages of meta data.
			if err := os.Truncate(p.Database, int64(2*os.Getpagesize()+100)); err != nil {
				t.Fatal(err)
			}
		},
		"empty": func(t *testing.T, p places) {
			if err := os.Truncate(p.Database, 0); err != nil {
				t.Fatal(err)
			}
		},
		"gone": func(t *testing.T, p places) {
			if err := os.Remove(p.Database); err != nil {
				t.Fatal(err)
			}
		},
		"a record under another name": func(t *testing.T, p places) {
			p.spoilDB(t, "../../x", []byte("garbage"))
		},
	} {
		t.Run(what, func(t *testing.T) {
			p := newPlaces(t)
			s := p.open(t)
			put(t, s, "a", "1")
			put(t, s, "b", "2")
			s.Close()
			p.Boot = sameBoot
			spoil(t, p)
			// The run directory lacks one as well.
			if err := os.Remove(filepath.Join(p.RunDir, string(Containers), "b")); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				s = p.open(t)
				if !lost(s, "b") {
					t.Error("a lost one is not known to be")
				}
				if _, more := s.Damage(Sandboxes); !more {
					t.Error("no sandbox may be lost")
				}
				if got := s.Take(Containers); string(got["a"]) != "1" {
					t.Errorf("records: %q", got)
				}
				put(t, s, "c", "3") // and it works
				if err := s.Sync(); err != nil {
					t.Fatal(err)
				}
				s.Close()
			}
			if kept := p.asideOf(t); len(kept) != 1 || !strings.Contains(filepath.Base(kept[0]), "state.db-") && what != "a record under another name" {
				t.Errorf("set aside are %q", kept)
			}
		})
	}
}

// bbolt takes a file that is not there for a new database: right at the first start.
func TestFirstStartIsNoDamage(t *testing.T) {
	p := newPlaces(t)
	p.Boot = boot.Last{Boot: "this", Now: "this"}
	if s := p.open(t); lost(s, "x") || len(p.asideOf(t)) > 0 {
		t.Error("the first start finds damage")
	}
}

// A daemon that is killed while it sets a record aside leaves no half of it behind.
func TestHalfSetAside(t *testing.T) {
	p := newPlaces(t)
	s := p.open(t)
	put(t, s, "a", "1")
	s.Close()
	p.Boot = sameBoot
	p.spoil(t, "a", flip)
	p.spoilDB(t, "a", []byte("garbage"))
	folder := filepath.Join(filepath.Dir(p.Database), "damaged", "this")
	if err := os.MkdirAll(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(folder, "containers-a"+partial), []byte("ha"), 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(filepath.Join(p.RunDir, string(Containers), "a"))
	if err != nil {
		t.Fatal(err)
	}
	s = p.open(t)
	if lost(s, "other") || !lost(s, "a") {
		t.Error("half a file stands for something")
	}
	kept := p.asideOf(t)
	if len(kept) != 1 {
		t.Fatalf("set aside are %q", kept)
	}
	if raw, err := os.ReadFile(kept[0]); err != nil || !bytes.Equal(raw, before) {
		t.Errorf("kept is %q, %v; want %q", raw, err, before)
	}
}

// A daemon that was killed when it had just made the database has lost nothing.
func TestFirstStartAgain(t *testing.T) {
	p := newPlaces(t)
	if err := os.MkdirAll(filepath.Dir(p.Database), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.Database, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, damage, err := Inspect(p.Config); err != nil || len(damage) > 0 {
		t.Errorf("inspected: %v, %v", damage, err)
	}
	if s := p.open(t); lost(s, "any") || len(s.Damages()) > 0 {
		t.Errorf("lost: %v", s.Damages())
	}
}
