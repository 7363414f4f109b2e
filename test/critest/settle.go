package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/podshim/podshim/internal/state"
)

// settleLimit is how long podshim's flusher may take with the removals it has
// answered for.
const settleLimit = 10 * time.Second

// settleRecords waits until no removed record's mark is left in podshim's state
// directory: they are no leak, and stay until the database knows of the removal.
// Another runtime has no such directory.
func settleRecords(dir string) error {
	kinds, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watch.Close()
	for _, kind := range kinds {
		if err := watch.Add(filepath.Join(dir, kind.Name())); err != nil {
			return err
		}
	}
	limit := time.After(settleLimit)
	for {
		mark, err := tombstone(dir)
		if err != nil || mark == "" {
			return err
		}
		select {
		case <-watch.Events:
		case err := <-watch.Errors:
			return err
		case <-limit:
			return fmt.Errorf("%s still marks a removal after %s", mark, settleLimit)
		}
	}
}

// tombstone finds one mark below dir; "" is none.
func tombstone(dir string) (found string, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || e.IsDir() {
			return err
		}
		raw, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && state.IsTombstone(raw) {
			found = path
			return fs.SkipAll
		}
		return err
	})
	return found, err
}
