package stdio

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Journal keeps the output that podmon has taken out of a pipe and not yet put
// into the log where the next podmon finds it: in a file that is mapped into
// memory. So a podmon that is killed between the two loses nothing, and writing
// costs no system call. The file is an array of slots, one for each chunk underway:
//
//	idle -> reading -> read -> writing -> written -> idle
//
//	reading  n bytes are about to be read; whether they have been is told by a
//	         sentinel at their end, which the read overwrites. It is random, or, where
//	         few bytes could equal it by chance, made of what is about to be read
//	read     the data is in the slot
//	writing  its records are about to be appended to the log at an offset; what is
//	         behind the offset is of this slot and may be torn. One slot of a
//	         container at a time is in this state.
//	written  the records are in the log; the incomplete line may not be on file yet
type Journal struct {
	f *os.File

	mu    sync.Mutex
	free  []*slot // with their memory
	holes []int64 // indexes of slots without
	slots int64
	seq   uint64
	era   int // counts the files
}

// States of a slot.
const (
	slotIdle uint32 = iota
	slotReading
	slotRead
	slotWriting
	slotWritten
)

const (
	slotHead = 4096 // a page, so that the data is page aligned
	slotSize = slotHead + chunk
	// keepSlots is how many unused slots keep their memory.
	keepSlots = 4
	// sentinelSize makes it as good as impossible that data looks like a random sentinel.
	sentinelSize = 16
	maxID        = 255
)

// Offsets in a slot's head. The state is written last, atomically.
const (
	atState    = 0
	atLength   = 4
	atSeq      = 8
	atDevice   = 16
	atInode    = 24
	atOffset   = 32
	atSentinel = 40
	atStream   = 56 // length byte and name
	atID       = 72 // length byte and name
)

// slot is one chunk's place, mapped or read from a dead podmon's journal.
type slot struct {
	mem   []byte
	index int64 // in the journal; -1 is not in it
	era   int   // of the journal's file
	// look is a pipe to see in what another one holds, made when it is first needed.
	// Its own: a container can hold up who looks into its output (a write to a pipe
	// keeps the pipe locked while it waits for the memory that it is from).
	look [2]int
}

// NewJournal makes a journal at path, which must not exist.
func NewJournal(path string) (*Journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make journal: %w", err)
	}
	// Sequence numbers must differ from those of every podmon before.
	return &Journal{f: f, seq: uint64(time.Now().UnixNano())}, nil
}

// get returns a slot for a chunk of a container's stream. When the run directory
// is full it is one outside the journal: reading must go on.
func (j *Journal) get(id, stream string) *slot {
	j.mu.Lock()
	defer j.mu.Unlock()
	var s *slot
	if n := len(j.free); n > 0 {
		s = j.free[n-1]
		j.free = j.free[:n-1]
	} else if s = j.grow(); s == nil {
		s = &slot{mem: make([]byte, slotSize), index: -1}
	}
	j.seq++
	s.putUint64(atSeq, j.seq)
	s.putString(atStream, stream)
	s.putString(atID, id)
	return s
}

// grow maps another slot; nil when that cannot be had. Its memory is reserved
// first: a full tmpfs raises SIGBUS when a mapped hole is touched.
func (j *Journal) grow() *slot {
	index := j.slots
	if n := len(j.holes); n > 0 {
		index = j.holes[n-1]
	}
	fd := int(j.f.Fd())
	if err := unix.Fallocate(fd, 0, index*slotSize, slotSize); err != nil {
		return nil
	}
	mem, err := unix.Mmap(fd, index*slotSize, slotSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil
	}
	if index == j.slots {
		j.slots++
	} else {
		j.holes = j.holes[:len(j.holes)-1]
	}
	return &slot{mem: mem, index: index, era: j.era}
}

// Keep goes on in a new file when the one at path is gone. What is underway at that
// moment is in the old one, which a successor will not find.
func (j *Journal) Keep(path string) error {
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	next, err := NewJournal(path)
	if err != nil {
		return err
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, s := range j.free {
		s.drop()
	}
	j.f.Close()
	j.f, j.free, j.holes, j.slots, j.era = next.f, nil, nil, 0, j.era+1
	return nil
}

// drop gives a slot's memory back; false when it cannot be.
func (s *slot) drop() bool {
	if s.look != noPipe {
		unix.Close(s.look[0])
		unix.Close(s.look[1])
		s.look = noPipe
	}
	return unix.Munmap(s.mem) == nil
}

// put takes a slot back; the memory of more than a few is given back.
func (j *Journal) put(s *slot) {
	s.setState(slotIdle)
	if s.index < 0 {
		return
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	if s.era != j.era {
		s.drop()
		return
	}
	if len(j.free) < keepSlots {
		j.free = append(j.free, s)
		return
	}
	if s.drop() {
		_ = unix.Fallocate(int(j.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, s.index*slotSize, slotSize)
		j.holes = append(j.holes, s.index)
	}
}

func (s *slot) putUint64(at int, v uint64) { binary.LittleEndian.PutUint64(s.mem[at:], v) }
func (s *slot) uint64(at int) uint64       { return binary.LittleEndian.Uint64(s.mem[at:]) }

func (s *slot) putString(at int, v string) {
	s.mem[at] = byte(len(v))
	copy(s.mem[at+1:at+1+maxID], v)
}

func (s *slot) string(at int) string {
	return string(s.mem[at+1 : at+1+int(s.mem[at])])
}

func (s *slot) setState(state uint32) {
	atomic.StoreUint32((*uint32)(unsafe.Pointer(&s.mem[atState])), state)
}

func (s *slot) state() uint32 { return binary.NativeEndian.Uint32(s.mem[atState:]) }
func (s *slot) seq() uint64   { return s.uint64(atSeq) }

// data is the chunk; its length is fixed by expect or trim.
func (s *slot) data() []byte {
	n := binary.LittleEndian.Uint32(s.mem[atLength:])
	return s.mem[slotHead : slotHead+min(int(n), chunk)]
}

func (s *slot) setLength(n int) { binary.LittleEndian.PutUint32(s.mem[atLength:], uint32(n)) }

// expect prepares the slot for reading up to n bytes from a pipe that held them.
// EAGAIN tells that they are gone: a container can read its own output.
func (s *slot) expect(pipe, n int) error {
	var sentinel [sentinelSize]byte
	if n < sentinelSize && s.canPeek() {
		held, err := s.peek(pipe, sentinel[:n])
		if err != nil {
			return err
		}
		n = held
		for i := range sentinel[:n] {
			sentinel[i] = ^sentinel[i]
		}
	} else {
		_, _ = rand.Read(sentinel[:]) // never fails
	}
	s.setLength(n)
	copy(s.mem[atSentinel:], sentinel[:])
	tail := min(n, sentinelSize)
	copy(s.mem[slotHead+n-tail:], sentinel[:tail])
	s.setState(slotReading)
	return nil
}

var noPipe [2]int

// canPeek tells whether peek is of use and works: reading must go on without.
func (s *slot) canPeek() bool {
	return s.index >= 0 && (s.look != noPipe || unix.Pipe2(s.look[:], unix.O_CLOEXEC|unix.O_NONBLOCK) == nil)
}

// peek reads what a pipe holds, leaves it there, and tells how much it is. EAGAIN is
// nothing.
func (s *slot) peek(pipe int, p []byte) (int, error) {
	n, err := ignoringEINTR(func() (int, error) {
		n, err := unix.Tee(pipe, s.look[1], len(p), unix.SPLICE_F_NONBLOCK)
		return int(n), err
	})
	if err == unix.EAGAIN || err == nil && n == 0 {
		return 0, unix.EAGAIN
	}
	if err != nil {
		return 0, fmt.Errorf("look into pipe: %w", err)
	}
	seen, err := ignoringEINTR(func() (int, error) { return unix.Read(s.look[0], p) })
	if err != nil || seen != n {
		return 0, fmt.Errorf("look into pipe: %d of %d bytes: %w", seen, n, errors.Join(err, unix.EIO))
	}
	return n, nil
}

func ignoringEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return n, err
		}
	}
}

// arrived tells, of a slot in state reading, whether the data has been read.
func (s *slot) arrived() bool {
	data := s.data()
	tail := min(len(data), sentinelSize)
	return !bytes.Equal(data[len(data)-tail:], s.mem[atSentinel:atSentinel+tail])
}

// writing notes where the log will be written.
func (s *slot) writing(log unix.Stat_t) {
	s.putUint64(atDevice, log.Dev)
	s.putUint64(atInode, log.Ino)
	s.putUint64(atOffset, uint64(log.Size))
	s.setState(slotWriting)
}

// unfinished returns the slots of a container in another podmon's journal that are
// not idle; a journal that is gone has none. Of the others only the heads are read:
// each container that is taken over looks, and the journal is that of all.
func unfinished(path, id string) ([]*slot, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	defer f.Close()
	var found []*slot
	head := &slot{mem: make([]byte, atID+1+maxID), index: -1}
	for at := int64(0); ; at += slotSize {
		if _, err := f.ReadAt(head.mem, at); errors.Is(err, io.EOF) {
			return found, nil
		} else if err != nil {
			return nil, fmt.Errorf("read journal: %w", err)
		}
		if head.state() == slotIdle || head.string(atID) != id {
			continue
		}
		s := &slot{mem: make([]byte, slotSize), index: -1}
		if _, err := f.ReadAt(s.mem, at); err != nil {
			return nil, fmt.Errorf("read journal: %w", err)
		}
		found = append(found, s)
	}
}
