package state

import (
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Probe reads all of a bbolt database. The error tells why it cannot be read, and is
// errBusy, as Busy tells, when another process has it open.
func Probe(path string) error {
	return guarded(path, bolt.Options{Timeout: time.Second, FreelistType: bolt.FreelistMapType}, func(db *bolt.DB) error {
		return errors.Join(db.View(func(tx *bolt.Tx) error {
			return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return walk(b) })
		}), db.Close())
	})
}

// Busy tells whether another process has the database open.
func Busy(err error) bool { return errors.Is(err, errBusy) }

func walk(b *bolt.Bucket) error {
	return b.ForEach(func(k, v []byte) error {
		if sub := b.Bucket(k); v == nil && sub != nil {
			return walk(sub)
		}
		return nil
	})
}

// guarded opens a database for f. bbolt panics or faults on some kinds of damage;
// that is an error here, after which the database is closed.
func guarded(path string, opts bolt.Options, f func(*bolt.DB) error) (err error) {
	var db *bolt.DB
	// A truncated file faults where bbolt has mapped more than there is.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("read %s: %v", path, p)
		}
		if err != nil && db != nil {
			err = errors.Join(err, db.Close())
		}
	}()
	db, err = bolt.Open(path, 0o600, &opts)
	if errors.Is(err, bolt.ErrTimeout) {
		return errBusy
	}
	if err != nil {
		return err
	}
	return f(db)
}
