// Package boot tells whether the machine has been restarted since podshim last
// ran on it, and whether podshim had been stopped before. Both follow from one
// small file in the root directory, which is written when the daemon has started and
// when it stops.
//
// It matters where something is damaged or missing: what a lost record stood for
// may run as long as the machine does, and cannot after; and what was written to
// disk before a power cut is looked at before it is used.
package boot

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Last is how the daemon that ran before has ended.
type Last struct {
	// Boot is the ID of the boot it ran in, Now that of this one. Where nobody knows
	// the former it is taken for this one.
	Boot, Now string
	// Known: a daemon has started here before, and nobody has taken the mark away.
	Known bool
	// Stopped: the daemon ended in order, before the machine could.
	Stopped bool
}

// Restarted tells whether the machine was: nothing that podshim ever started
// before runs any more.
func (l Last) Restarted() bool { return l.Boot != l.Now }

// Crashed tells whether the machine went down while podshim ran, as in a power cut.
func (l Last) Crashed() bool { return l.Restarted() && !l.Stopped }

// mark is the file's content.
type mark struct {
	Boot    string `json:"boot"`
	Stopped bool   `json:"stopped"`
}

// Read reads the mark at path; one that makes no sense is as good as none.
func Read(path string) (Last, error) {
	now, err := Current()
	if err != nil {
		return Last{}, err
	}
	last := Last{Boot: now, Now: now}
	raw, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return Last{}, fmt.Errorf("read boot mark: %w", err)
	}
	var m mark
	if json.Unmarshal(raw, &m) == nil && m.Boot != "" {
		last.Boot, last.Stopped, last.Known = m.Boot, m.Stopped, true
	}
	return last, nil
}

// MarkStarted marks at path that a daemon runs in this boot.
func (l Last) MarkStarted(path string) error { return write(path, mark{Boot: l.Now}) }

// MarkStopped marks that the daemon has ended in order.
func (l Last) MarkStopped(path string) error { return write(path, mark{Boot: l.Now, Stopped: true}) }

// Current is the kernel's ID of this boot (random(4)).
func Current() (string, error) {
	raw, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot ID: %w", err)
	}
	return strings.TrimSpace(string(raw)), nil
}

// write replaces the mark, on the disk too: a power cut is what it is for, and the
// mark before may say that all was stopped in order. A full disk takes it away: that
// is no reason for a daemon not to start, and no mark is better than that of an
// earlier boot.
func write(path string, m mark) error {
	raw, err := json.Marshal(m)
	if err != nil {
		return err
	}
	early := path + ".new"
	if err = writeSynced(early, append(raw, '\n')); err == nil {
		err = os.Rename(early, path)
	}
	if err == nil {
		err = syncDir(filepath.Dir(path))
	}
	if err == nil {
		return nil
	}
	err = errors.Join(fmt.Errorf("write boot mark: %w", err), ignoreMissing(os.Remove(early)))
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return ignoreMissing(os.Remove(path))
	}
	return err
}

func writeSynced(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
