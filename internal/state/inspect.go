package state

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	bolt "go.etcd.io/bbolt"
)

// Damage is a record, or a whole database, that cannot be read.
type Damage struct {
	// Path is the file; Kind and ID the record in it, empty when nobody knows whose
	// records are lost.
	Path string
	Kind Kind
	ID   string
	// Past: it was of pods that a restart of the machine has ended.
	Past bool
	Err  error
}

// Damages are the records that were lost in this boot, whose things may run.
func (s *Store) Damages() []Damage {
	var found []Damage
	folder := filepath.Join(s.aside.dir, s.aside.boot.Now)
	for k := range s.lost {
		found = append(found, Damage{Path: filepath.Join(folder, string(k.kind)+"-"+k.id), Kind: k.kind, ID: k.id, Err: errAside})
	}
	if s.any {
		found = append(found, Damage{Path: folder, Err: errAside})
	}
	return found
}

// asideNow lists what is kept aside for this boot.
func asideNow(a aside) (found []Damage, err error) {
	folder := filepath.Join(a.dir, a.boot.Now)
	files, err := os.ReadDir(folder)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("look for damaged records: %w", err)
	}
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), partial) {
			k := asideKey(f.Name())
			found = append(found, Damage{Path: filepath.Join(folder, f.Name()), Kind: k.kind, ID: k.id, Err: errAside})
		}
	}
	return found, nil
}

var errAside = errors.New("podshim has set it aside when it started")

// Inspect reads all records as Open does, while no store is open on them, and
// changes nothing. What it cannot read is no error but damage.
func Inspect(cfg Config) (map[Kind]map[string][]byte, []Damage, error) {
	s := &Store{aside: aside{filepath.Join(filepath.Dir(cfg.Database), "damaged"), cfg.Boot, cfg.Log}}
	damage, err := asideNow(s.aside)
	if err != nil {
		return nil, nil, err
	}
	latest, bad := make(map[key]entry), make(map[key]Damage)
	take := func(path string, k key, raw []byte) {
		e, err := decode(raw)
		if err == nil && !isID(k.id) {
			err = errors.New("its name is damaged")
		}
		if err != nil {
			bad[k] = Damage{Path: path, Kind: k.kind, ID: k.id, Past: cfg.Boot.Restarted(), Err: err}
		} else if old, known := latest[k]; !known || e.seq > old.seq {
			latest[k] = e
		}
	}
	err = s.checkThere(cfg.Database)
	if err == nil {
		err = eachInDatabase(cfg.Database, take)
	}
	if err != nil {
		damage = append(damage, Damage{Path: cfg.Database, Past: cfg.Boot.Restarted(), Err: err})
	}
	for _, kind := range kinds {
		dir := filepath.Join(cfg.RunDir, string(kind))
		files, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, nil, fmt.Errorf("read records: %w", err)
		}
		for _, f := range files {
			if strings.HasSuffix(f.Name(), partial) {
				continue // the next Open removes it
			}
			path := filepath.Join(dir, f.Name())
			raw, err := os.ReadFile(path)
			if err != nil {
				return nil, nil, fmt.Errorf("read record: %w", err)
			}
			take(path, key{kind, f.Name()}, raw)
		}
	}
	for k, d := range bad {
		if _, whole := latest[k]; whole {
			continue // the next Open uses that one
		}
		if !isID(k.id) {
			d.ID = ""
		}
		damage = append(damage, d)
	}
	all := map[Kind]map[string][]byte{Sandboxes: {}, Containers: {}}
	for k, e := range latest {
		if !e.deleted {
			all[k.kind][k.id] = e.value
		}
	}
	return all, damage, nil
}

// eachInDatabase calls f for every record of a database that may be missing or just
// made.
func eachInDatabase(path string, f func(path string, k key, raw []byte)) error {
	if st, err := os.Stat(path); errors.Is(err, os.ErrNotExist) || err == nil && st.Size() == 0 {
		return nil
	}
	return guarded(path, bolt.Options{ReadOnly: true, Timeout: retryFlush}, func(db *bolt.DB) error {
		return errors.Join(db.View(func(tx *bolt.Tx) error {
			for _, kind := range kinds {
				b := tx.Bucket([]byte(kind))
				if b == nil {
					continue
				}
				err := b.ForEach(func(id, raw []byte) error {
					f(path, key{kind, string(id)}, raw)
					return nil
				})
				if err != nil {
					return err
				}
			}
			return nil
		}), db.Close())
	})
}
