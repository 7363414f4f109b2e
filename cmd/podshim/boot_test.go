package main

import (
	"io"
	"path/filepath"
	"testing"

	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/boot"
	"github.com/podshim/podshim/internal/config"
)

// That a podshim was stopped in order is on file before another one can start, and
// only of one that had started.
func TestStopIsMarked(t *testing.T) {
	for _, started := range []bool{true, false} {
		dir := t.TempDir()
		log := logrus.New()
		log.SetOutput(io.Discard)
		d := &parts{cfg: &config.Config{Run: dir, Root: dir}, log: log}
		steps := []step{{"lock", d.lockRun}, {"read", d.readBoot}, {"mark", d.markBoot}}
		if !started {
			steps = steps[:2]
		}
		if err := d.build(t.Context(), steps); err != nil {
			t.Fatal(err)
		}
		unlock := d.closers[0]
		d.closers[0] = func() error {
			if last, err := boot.Read(filepath.Join(dir, "boot")); err != nil || last.Stopped != started || last.Known != started {
				t.Errorf("started: %v; when the lock is given back the mark says %+v, %v", started, last, err)
			}
			return unlock()
		}
		if err := d.close(); err != nil {
			t.Error(err)
		}
	}
}
