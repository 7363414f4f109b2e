package stdio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/crilog"
)

// restFile keeps a stream's incomplete line for the next podmon:
//
//	seq (8) | length (4) | line
//
// It is written in one go, in place, so that it is either the old or the new one
// when podmon is killed. seq is that of the chunk it is the rest of.
type restFile struct {
	path string
	seq  uint64
	used bool // the file holds something
}

const restHead = 12

// save puts the rest of chunk seq on file. An empty rest after an empty one needs
// no writing. A failure costs an incomplete line only when podmon dies as well.
func (r *restFile) save(seq uint64, rest []byte) {
	if len(rest) == 0 && !r.used {
		return
	}
	b := make([]byte, restHead, restHead+len(rest))
	binary.LittleEndian.PutUint64(b, seq)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(rest)))
	fd, err := unix.Open(r.path, unix.O_WRONLY|unix.O_CREAT|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if _, err := unix.Pwrite(fd, append(b, rest...), 0); err == nil {
		r.seq, r.used = seq, len(rest) > 0
	}
}

// load reads what save wrote; no file is an empty rest.
func (r *restFile) load() ([]byte, error) {
	b, err := os.ReadFile(r.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("incomplete line: %w", err)
	}
	if len(b) < restHead {
		return nil, nil
	}
	n := int(binary.LittleEndian.Uint32(b[8:]))
	if n > crilog.MaxPiece || n > len(b)-restHead {
		return nil, fmt.Errorf("incomplete line: %s is damaged", r.path)
	}
	r.seq, r.used = binary.LittleEndian.Uint64(b), n > 0
	return b[restHead : restHead+n], nil
}
