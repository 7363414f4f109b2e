package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/podshim/podshim/internal/state"
	"github.com/podshim/podshim/test/machine"
)

// settleLimit is how long podshim may take in the background with the removals
// that it has answered for.
const settleLimit = 10 * time.Second

// settleRecords waits until no removed record's mark is left in podshim's state
// directory: they are no leak, and stay until the database knows of the removal.
// Another runtime has no such directory.
func settleRecords(dir string) error {
	kinds, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return err
	}
	return await(kinds, func() (string, error) { return tombstone(dir) })
}

// settleSnapshots waits until the files of removed snapshots are gone, which are
// deleted in the background: the leaks found now that lie in podshim's snapshot
// directory. Those that stay are for the caller to find.
func settleSnapshots(dir string, leaks func() ([]machine.Thing, error)) error {
	if _, err := os.Stat(dir); err != nil {
		return nil // another runtime
	}
	err := await([]string{dir}, func() (string, error) {
		found, err := leaks()
		for _, thing := range found {
			if strings.HasPrefix(thing.Name, dir) {
				return thing.Name, err
			}
		}
		return "", err
	})
	if errors.Is(err, errStays) {
		return nil
	}
	return err
}

// errStays says that what was awaited to go did not.
var errStays = errors.New("is still there")

// await returns when pending names nothing any more; it is asked whenever
// something changes in one of the directories.
func await(dirs []string, pending func() (string, error)) error {
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watch.Close()
	for _, dir := range dirs {
		if err := watch.Add(dir); err != nil {
			return err
		}
	}
	limit := time.After(settleLimit)
	for {
		what, err := pending()
		if err != nil || what == "" {
			return err
		}
		select {
		case <-watch.Events:
		case err := <-watch.Errors:
			return err
		case <-limit:
			return fmt.Errorf("%s %w after %s", what, errStays, settleLimit)
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
