package state

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// entry is one version of a record as both places keep it:
//
//	0        4        12      13
//	| crc32c | sequence | flags | value ...
//
// all little endian, the checksum over all that follows it.
type entry struct {
	seq     uint64
	deleted bool // a tombstone: hides the database's copy until that is deleted
	value   []byte
}

const (
	headerSize  = 13
	flagDeleted = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (e entry) encode() []byte {
	raw := make([]byte, headerSize, headerSize+len(e.value))
	binary.LittleEndian.PutUint64(raw[4:], e.seq)
	if e.deleted {
		raw[12] = flagDeleted
	}
	raw = append(raw, e.value...)
	binary.LittleEndian.PutUint32(raw, crc32.Checksum(raw[4:], castagnoli))
	return raw
}

func decode(raw []byte) (entry, error) {
	if len(raw) < headerSize {
		return entry{}, fmt.Errorf("record of %d bytes is cut off", len(raw))
	}
	if binary.LittleEndian.Uint32(raw) != crc32.Checksum(raw[4:], castagnoli) {
		return entry{}, errors.New("checksum does not match")
	}
	return entry{
		seq:     binary.LittleEndian.Uint64(raw[4:]),
		deleted: raw[12]&flagDeleted != 0,
		value:   append([]byte(nil), raw[headerSize:]...),
	}, nil
}

// IsTombstone tells whether raw, a file of the run directory, is the mark of a
// removed record: it is there until the removal is in the database as well.
func IsTombstone(raw []byte) bool {
	e, err := decode(raw)
	return err == nil && e.deleted
}

// partial marks a file that a crash may have left half written.
const partial = ".partial"

func (s *Store) runPath(k key) string {
	return filepath.Join(s.runDir, string(k.kind), k.id)
}

// writeRun replaces the run directory's copy, wholly or not at all.
func (s *Store) writeRun(k key, e entry) error {
	path := s.runPath(k)
	if err := os.WriteFile(path+partial, e.encode(), 0o600); err != nil {
		return errors.Join(err, removeIfThere(path+partial))
	}
	return os.Rename(path+partial, path)
}

// readRun reads the run directory's copies, and what there cannot be read;
// half-written ones, whose Put has not returned, are removed.
func (s *Store) readRun(kind Kind) (found map[string]entry, bad map[string][]byte, err error) {
	dir := filepath.Join(s.runDir, string(kind))
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("read records: %w", err)
	}
	found, bad = make(map[string]entry, len(files)), make(map[string][]byte)
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		if strings.HasSuffix(f.Name(), partial) {
			if err := removeIfThere(path); err != nil {
				return nil, nil, fmt.Errorf("remove half-written record: %w", err)
			}
			continue
		}
		raw, err := os.ReadFile(path)
		if err != nil {
			return nil, nil, fmt.Errorf("read record: %w", err)
		}
		if e, err := decode(raw); err != nil || !isID(f.Name()) {
			bad[f.Name()] = raw
		} else {
			found[f.Name()] = e
		}
	}
	return found, bad, nil
}

func removeIfThere(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
