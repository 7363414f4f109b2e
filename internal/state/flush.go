package state

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
)

// openDatabase opens or makes the database and reads its records.
func (s *Store) openDatabase(path string) error {
	err := s.checkThere(path)
	if err == nil {
		err = s.readDatabase(path)
	}
	if err == nil {
		return nil
	}
	if errors.Is(err, errBusy) {
		return fmt.Errorf("open %s: another podshim has it open; each needs a root directory of its own", path)
	}
	if _, serr := os.Stat(path); serr != nil && !errors.Is(err, errEmpty) {
		return fmt.Errorf("open %s: %w", path, classify(err))
	}
	clear(s.records)
	s.damagedDB = make(map[key][]byte)
	s.seq = 0
	if err := s.aside.database(path, err); err != nil {
		return err
	}
	if err := s.readDatabase(path); err != nil {
		return fmt.Errorf("open %s: %w", path, classify(err))
	}
	return nil
}

// checkThere fails when there is nothing where a database was, which bbolt would
// take for a new one. Before any daemon has started that is no loss: the first one
// may have been killed when it had just made the file.
func (s *Store) checkThere(path string) error {
	st, err := os.Stat(path)
	switch {
	case err == nil && st.Size() > 0:
		return nil
	case err != nil && !errors.Is(err, os.ErrNotExist):
		return err
	case !s.aside.boot.Known:
		return nil
	case err == nil:
		return fmt.Errorf("%w: of 0 bytes", errEmpty)
	default:
		return fmt.Errorf("%w: gone", errEmpty)
	}
}

// errEmpty is a database that is not there any more.
var errEmpty = errors.New("database is empty")

// errBusy is the lock of the database held by another process.
var errBusy = errors.New("database is locked")

// readDatabase opens the database and loads its records.
func (s *Store) readDatabase(path string) error {
	return guarded(path, bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType}, s.load)
}

// load reads the records of a database and makes it the Store's.
func (s *Store) load(db *bolt.DB) error {
	err := db.Update(func(tx *bolt.Tx) error {
		for _, kind := range kinds {
			if _, err := tx.CreateBucketIfNotExists([]byte(kind)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	err = db.View(func(tx *bolt.Tx) error {
		for _, kind := range kinds {
			err := tx.Bucket([]byte(kind)).ForEach(func(id, raw []byte) error {
				e, err := decode(raw)
				if err != nil || !isID(string(id)) {
					s.damagedDB[key{kind, string(id)}] = append([]byte(nil), raw...)
					return nil
				}
				s.records[key{kind, string(id)}] = e
				s.seq = max(s.seq, e.seq)
				return nil
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.db = db
	return nil
}

// mergeRunDir takes from the run directory what is later than the database's,
// and gives it what it lacks. What is damaged in one place the other one heals; if
// in both, it is set aside.
func (s *Store) mergeRunDir() error {
	damaged := s.damagedDB
	s.damagedDB = nil
	for k := range damaged {
		s.dirty[k] = struct{}{} // written anew from the run directory, or deleted
	}
	here := make(map[key]bool)
	for _, kind := range kinds {
		found, bad, err := s.readRun(kind)
		if err != nil {
			return err
		}
		for id, raw := range bad {
			damaged[key{kind, id}] = raw // the later of the two
		}
		for id, e := range found {
			k := key{kind, id}
			here[k] = true
			if old, known := s.records[k]; !known || e.seq > old.seq {
				s.records[k] = e
				s.dirty[k] = struct{}{}
			} else if e.seq < old.seq {
				here[k] = false
			}
			s.seq = max(s.seq, e.seq)
		}
	}
	for k, raw := range damaged {
		if e, whole := s.records[k]; whole {
			s.log.WithFields(logrus.Fields{"record": string(k.kind) + "/" + k.id, "deleted": e.deleted}).
				Warn("one of the two copies of a record is damaged: the other one is used")
			continue
		}
		if err := s.aside.record(k, raw); err != nil {
			s.log.WithError(err).Error("a damaged record cannot be set aside: it stays where it is, and what it stands for is left alone")
			delete(s.dirty, k)
			s.lose(k)
			continue
		}
		s.seq++
		s.records[k] = entry{seq: s.seq, deleted: true}
		s.dirty[k] = struct{}{}
	}
	for k, e := range s.records {
		if here[k] || !isID(k.id) {
			continue
		}
		if err := s.writeRun(k, e); err != nil {
			return fmt.Errorf("restore record %s %s: %w", k.kind, k.id, classify(err))
		}
	}
	return nil
}

// nudge wakes the flusher.
func (s *Store) nudge() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	select {
	case s.wake <- struct{}{}:
	default: // it will see this change too
	}
}

// flushPause is how long the flusher waits for more to come: a pod is recorded half a
// dozen times on its way up, and each transaction costs the disk two flushes.
const flushPause = 50 * time.Millisecond

// flusher carries changes to the database until wake is closed: what changes while
// it waits in one transaction, what changes while it writes in the next.
func (s *Store) flusher() {
	defer close(s.done)
	for range s.wake {
		time.Sleep(flushPause)
		if err := s.flush(); err != nil {
			s.log.WithError(err).Error("records are in the run directory only; the database will be tried again")
			time.AfterFunc(retryFlush, s.nudge)
		}
	}
}

// flush writes all dirty records in one transaction.
func (s *Store) flush() error {
	s.mu.Lock()
	batch := make(map[key]entry, len(s.dirty))
	for k := range s.dirty {
		batch[k] = s.records[k]
	}
	s.mu.Unlock()
	if len(batch) == 0 {
		return nil
	}
	err := s.db.Update(func(tx *bolt.Tx) error {
		for k, e := range batch {
			b := tx.Bucket([]byte(k.kind))
			if e.deleted {
				if err := b.Delete([]byte(k.id)); err != nil {
					return err
				}
			} else if err := b.Put([]byte(k.id), e.encode()); err != nil {
				return err
			}
		}
		return nil
	})

	s.mu.Lock()
	s.stalled = err
	var buried []key
	if err == nil {
		for k, e := range batch {
			if s.records[k].seq != e.seq {
				continue // changed again meanwhile
			}
			delete(s.dirty, k)
			if e.deleted {
				delete(s.records, k)
				buried = append(buried, k)
			} else if s.taken[k.kind] {
				s.records[k] = entry{seq: e.seq}
			}
		}
	}
	s.flushed.Broadcast()
	s.mu.Unlock()
	for _, k := range buried {
		if !isID(k.id) && filepath.Base(k.id) != k.id {
			continue // a name that only a damaged database can have
		}
		// IDs are never used twice, so no later record can be hit.
		if err := os.Remove(s.runPath(k)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.WithError(err).Warn("a deleted record's file stays in the run directory")
		}
	}
	return err
}
