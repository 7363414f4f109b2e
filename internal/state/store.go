// Package state keeps podshim's records in two places, for two kinds of end.
//
// A record that Put has returned for is in a file of the run directory: the
// daemon may be killed at any moment after and finds it again. It costs a rename
// on tmpfs and no wait for a disk. A flusher then carries what has changed to a
// bbolt database in the root directory, many records a transaction, so that the
// records survive the machine as well: a power cut takes at most those of the
// last tenth of a second, whose processes it took too.
//
// Each copy also stands in for the other. With an emptied run directory the
// database has every record; with a damaged database, which is made anew, the run
// directory has them all as long as the machine is up. Where both know a record the
// later one counts, by a sequence number.
//
// # Damage
//
// A record that is damaged in one place and whole in the other costs nothing. What
// is lost is kept as it is found, for a human to look at, beside the database in
//
//	damaged/<boot ID>/<kind>-<ID>      one record
//	damaged/<boot ID>/<anything else>  nobody knows whose: a whole database, say
//
// As long as the file is there and the machine has not been restarted, Lost tells
// that what has no record may be what the lost one stood for.
package state

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/boot"
)

// Kind is a family of records, a bucket of the database and a folder of the run
// directory.
type Kind string

// The kinds there are.
const (
	Sandboxes  Kind = "sandboxes"
	Containers Kind = "containers"
)

var kinds = []Kind{Sandboxes, Containers}

// Config says where the records are.
type Config struct {
	Database string // file, e.g. /var/lib/podshim/state.db
	RunDir   string // folder of this package's own, e.g. /run/podshim/state
	Boot     boot.Last
	Log      *logrus.Entry
}

// Store holds all records. Its methods may be called by many goroutines, but
// the caller orders the changes of one record (a lock per ID).
type Store struct {
	runDir string
	aside  aside
	log    *logrus.Entry
	db     *bolt.DB
	// damagedDB are the database's records that cannot be read; only during Open.
	damagedDB map[key][]byte
	lost      map[key]bool // records that are damaged, and whose things may run
	any       bool         // records may be lost that nobody knows the IDs of

	mu      sync.Mutex // guards what follows
	seq     uint64
	records map[key]entry // all that live, and tombstones until they are flushed; values only while dirty or not taken
	taken   map[Kind]bool // kinds whose values nobody will ask for any more
	dirty   map[key]struct{}
	flushed *sync.Cond // broadcast after each flush
	stalled error      // why the last flush failed
	closed  bool

	wake chan struct{} // holds one token while there is something to flush
	done chan struct{} // closed when the flusher has ended
}

type key struct {
	kind Kind
	id   string
}

// Open reads all records. Of what is damaged the whole copy is used; without one it
// is set aside, and said in the log.
func Open(cfg Config) (*Store, error) {
	s := &Store{
		runDir:    cfg.RunDir,
		aside:     aside{filepath.Join(filepath.Dir(cfg.Database), "damaged"), cfg.Boot, cfg.Log},
		log:       cfg.Log,
		lost:      make(map[key]bool),
		damagedDB: make(map[key][]byte),
		records:   make(map[key]entry),
		dirty:     make(map[key]struct{}),
		taken:     make(map[Kind]bool),
		wake:      make(chan struct{}, 1),
		done:      make(chan struct{}),
	}
	s.flushed = sync.NewCond(&s.mu)
	for _, kind := range kinds {
		if err := os.MkdirAll(filepath.Join(cfg.RunDir, string(kind)), 0o700); err != nil {
			return nil, fmt.Errorf("make record directory: %w", err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Database), 0o700); err != nil {
		return nil, fmt.Errorf("make database directory: %w", err)
	}
	if err := s.openDatabase(cfg.Database); err != nil {
		return nil, err
	}
	if err := s.mergeRunDir(); err != nil {
		return nil, errors.Join(err, s.db.Close())
	}
	if err := s.readAside(); err != nil {
		return nil, errors.Join(err, s.db.Close())
	}
	go s.flusher()
	s.nudge()
	return s, nil
}

// Take returns the value of every record of a kind, by ID, as they were found at
// Open. The store lets go of them: it keeps in memory only what is not flushed.
func (s *Store) Take(kind Kind) map[string][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken[kind] = true
	all := make(map[string][]byte)
	for k, e := range s.records {
		if k.kind != kind || e.deleted {
			continue
		}
		all[k.id] = e.value
		if _, unflushed := s.dirty[k]; !unflushed {
			s.records[k] = entry{seq: e.seq}
		}
	}
	return all
}

// Damage returns the IDs of the lost records of a kind, and whether there may be
// more of them.
func (s *Store) Damage(kind Kind) (ids []string, more bool) {
	for k := range s.lost {
		if k.kind == kind {
			ids = append(ids, k.id)
		}
	}
	return ids, s.any
}

// Put makes value the record of id. When it returns nil the record outlives the
// daemon; the machine's end it outlives a moment later (see Sync).
// A full disk is ErrResourceExhausted.
func (s *Store) Put(kind Kind, id string, value []byte) error {
	return s.change(key{kind, id}, entry{value: value})
}

// Delete forgets the record of id; one that is not there is no error.
func (s *Store) Delete(kind Kind, id string) error {
	return s.change(key{kind, id}, entry{deleted: true})
}

func (s *Store) change(k key, e entry) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return fmt.Errorf("record %s %s: store is closed: %w", k.kind, k.id, errdefs.ErrUnavailable)
	}
	_, known := s.records[k]
	if e.deleted && !known {
		s.mu.Unlock()
		return nil
	}
	s.seq++
	e.seq = s.seq
	s.mu.Unlock()

	err := s.writeRun(k, e)
	if err != nil && e.deleted {
		// A full disk must not keep things from being removed. Without a
		// tombstone the worst is that a crash before the flush brings back a
		// record of something that is gone.
		err = removeIfThere(s.runPath(k))
	}
	if err != nil {
		return fmt.Errorf("record %s %s: %w", k.kind, k.id, classify(err))
	}

	s.mu.Lock()
	s.records[k] = e
	s.dirty[k] = struct{}{}
	s.mu.Unlock()
	s.nudge()
	return nil
}

// Sync waits until all that was put before is in the database, or says why it
// cannot be written.
func (s *Store) Sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	want := s.seq
	for !s.flushedUpTo(want) {
		if s.stalled != nil {
			return fmt.Errorf("flush records: %w", classify(s.stalled))
		}
		if s.closed {
			return fmt.Errorf("flush records: store is closed: %w", errdefs.ErrUnavailable)
		}
		s.flushed.Wait()
	}
	return nil
}

// flushedUpTo tells whether no change up to seq waits. s.mu is held.
func (s *Store) flushedUpTo(seq uint64) bool {
	for k := range s.dirty {
		if s.records[k].seq <= seq {
			return false
		}
	}
	return true
}

// Close flushes and closes the database. Records are in the run directory even
// when it fails.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.mu.Unlock()
	close(s.wake)
	<-s.done
	err := s.flush()
	s.mu.Lock()
	s.flushed.Broadcast()
	s.mu.Unlock()
	return errors.Join(err, s.db.Close())
}

// classify gives a full disk its class.
func classify(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: free some space on the disk of podshim's root and run directories: %w", errdefs.ErrResourceExhausted, err)
	}
	return err
}

// retryFlush is how long the flusher waits after a failed transaction.
const retryFlush = time.Second
