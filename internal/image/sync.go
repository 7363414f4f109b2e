package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// syncSoon has the syncer bring to disk what pulls have unpacked.
func (s *Store) syncSoon() {
	select {
	case s.unsync <- struct{}{}:
	default: // asked already, and not begun
	}
}

// syncLoop works off syncSoon until the store closes. What it has not got to by
// then the next Open asks for.
func (s *Store) syncLoop() {
	for {
		select {
		case <-s.closing:
			return
		case <-s.unsync:
		}
		if err := s.syncImages(); err != nil {
			s.log.WithError(err).Warn("images are not known to be on disk yet: will be tried again")
			time.AfterFunc(sweepRetry, s.syncSoon)
		}
	}
}

// syncImages brings all layers to disk and takes the mark off the records of those
// images that were there before. An image whose layers the disk does not take is
// forgotten: a second syncfs would not tell of it any more.
func (s *Store) syncImages() error {
	marked := s.index.unsynced()
	if len(marked) == 0 {
		return nil
	}
	dir, err := os.Open(filepath.Join(s.cfg.Root, "snapshots"))
	if err != nil {
		return err
	}
	defer dir.Close()
	// In one go: a file at a time would take the disk's time for each.
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		errs := []error{fmt.Errorf("syncfs: %w", err)}
		for _, rec := range marked {
			s.log.WithError(err).WithField("image", rec.ID).Error("the image cannot be brought to disk: image forgotten, pull it again")
			errs = append(errs, s.Remove(context.Background(), rec.ID))
		}
		return errors.Join(errs...)
	}
	s.publish.Lock()
	defer s.publish.Unlock()
	var whole []*record
	for _, rec := range marked {
		// A record is never changed: another one is of another pull, or has lost a
		// name to it, and that pull asks for its own.
		if now, ok := s.index.get(rec.ID); ok && now == rec {
			synced := *rec
			synced.Unsynced = ""
			whole = append(whole, &synced)
		}
	}
	if err := s.records.update(whole...); err != nil {
		return err
	}
	s.index.set(whole...)
	return nil
}
