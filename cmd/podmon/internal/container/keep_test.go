package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// newManager makes a podmon's Manager on a run directory of its own.
func newManager(t *testing.T) *Manager {
	t.Helper()
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "podmon", "m"), 0o700); err != nil {
		t.Fatal(err)
	}
	m, err := NewManager(Config{RunDir: dir, Owner: "m"})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// ended adds a container that has ended and holds nothing but its files.
func (m *Manager) ended(id string) *Container {
	c := &Container{ID: id, m: m, dir: filepath.Join(m.containerRoot(), id), ready: make(chan struct{}),
		gone: make(chan struct{}), exit: &wire.Exit{Code: 3}, cleared: true, handles: handles{-1, -1, -1}}
	close(c.ready)
	close(c.gone)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.containers[id] = c
	return c
}

// What somebody has removed is there again, with its content.
func TestKeepFiles(t *testing.T) {
	m := newManager(t)
	c := m.ended("a")
	if err := os.RemoveAll(m.RunDir); err != nil {
		t.Fatal(err)
	}
	if err := m.KeepFiles(); err != nil {
		t.Fatal(err)
	}
	var exit wire.Exit
	if found, err := load(c.dir, exitFile, &exit); !found || err != nil || exit.Code != 3 {
		t.Errorf("exit on file %+v: %t, %v", exit, found, err)
	}
	for _, path := range []string{filepath.Join(c.dir, recordFile), m.stateRoot(), m.journalOf("m")} {
		if _, err := os.Lstat(path); err != nil {
			t.Error(err)
		}
	}
}

// A container that is deleted while missing files are written anew leaves none: the
// next podmon would take it for one that runs.
func TestDeleteMeetsKeepFiles(t *testing.T) {
	m := newManager(t)
	for i := range 10000 {
		c := m.ended(fmt.Sprintf("c%d", i))
		var both sync.WaitGroup
		both.Go(func() {
			if err := m.KeepFiles(); err != nil {
				t.Errorf("keep files: %v", err)
			}
		})
		both.Go(func() {
			if err := c.Delete(context.Background()); err != nil {
				t.Errorf("delete: %v", err)
			}
		})
		both.Wait()
		if _, err := os.Lstat(c.dir); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("container %d is deleted, and %s is there: %v", i, c.dir, err)
		}
	}
}
