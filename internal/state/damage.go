package state

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/podshim/podshim/internal/boot"
)

// aside is where damaged records are kept.
type aside struct {
	dir  string
	boot boot.Last
	log  *logrus.Entry
}

// today is the folder for what is found damaged now. It was written in the boot that
// the last daemon ran in: what it stands for has not outlived that.
func (a aside) today() string { return filepath.Join(a.dir, a.boot.Boot) }

// database sets a damaged database aside.
func (a aside) database(path string, cause error) error {
	if err := os.MkdirAll(a.today(), 0o700); err != nil {
		return fmt.Errorf("make directory for what is damaged: %w", classify(err))
	}
	kept := filepath.Join(a.today(), filepath.Base(path)+"-"+time.Now().UTC().Format("20060102T150405.000Z"))
	err := os.Rename(path, kept)
	if errors.Is(err, os.ErrNotExist) { // gone: that it was is noted
		err = os.WriteFile(kept, nil, 0o600)
	}
	if err != nil {
		return fmt.Errorf("set the damaged database aside: %w", classify(err))
	}
	a.log.WithError(cause).WithField("kept_as", kept).Error("the state database is damaged: a new one is made from the run directory. " + a.advice("what no record knows"))
	return nil
}

// record sets one damaged record aside; one that is there already is not changed.
func (a aside) record(k key, raw []byte) error {
	name := string(k.kind) + "-" + k.id
	if !isID(k.id) { // its name is damaged as well
		name = fmt.Sprintf("unknown-%08x", crc32.Checksum(append([]byte(k.id), raw...), castagnoli))
	}
	if err := os.MkdirAll(a.today(), 0o700); err != nil {
		return fmt.Errorf("make directory for what is damaged: %w", classify(err))
	}
	kept := filepath.Join(a.today(), name)
	if old, err := os.ReadFile(kept); err != nil || !bytes.Equal(old, raw) {
		if err := os.WriteFile(kept+partial, raw, 0o600); err != nil {
			return errors.Join(fmt.Errorf("set record %s aside: %w", name, classify(err)), removeIfThere(kept+partial))
		}
		if err := os.Rename(kept+partial, kept); err != nil {
			return fmt.Errorf("set record %s aside: %w", name, err)
		}
	}
	a.log.WithFields(logrus.Fields{"record": name, "kept_as": kept}).Error("a record is damaged in both places. " + a.advice("what it stands for"))
	return nil
}

// advice says what follows from a loss, and what to do.
func (a aside) advice(what string) string {
	if a.boot.Restarted() {
		return "It was of pods that a restart of the machine has ended: " + what + " is given back"
	}
	return "It may be of pods that run: " + what + " is left alone until the machine is restarted, or this file is removed and then podshim restarted"
}

// isID tells whether a name can be that of a record, and of a file.
func isID(name string) bool {
	return name != "" && strings.Trim(name, "0123456789abcdefghijklmnopqrstuvwxyz") == ""
}

// readAside finds out what is lost in this boot, by what lies in its folder.
func (s *Store) readAside() error {
	found, err := asideNow(s.aside)
	for _, d := range found {
		s.log.WithField("file", d.Path).
			Warn("what this damaged record may stand for is left alone until the machine is restarted, or the file is removed and then podshim restarted")
		s.lose(key{d.Kind, d.ID})
	}
	return err
}

// asideKey is what a file in the folder is the record of; the zero key where nobody
// knows.
func asideKey(name string) key {
	for _, kind := range kinds {
		if id, ok := strings.CutPrefix(name, string(kind)+"-"); ok && isID(id) {
			return key{kind, id}
		}
	}
	return key{}
}

// lose notes that a record is lost whose thing may run.
func (s *Store) lose(k key) {
	if k == (key{}) || !isID(k.id) {
		s.any = true
		return
	}
	s.lost[k] = true
}
