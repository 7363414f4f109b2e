// Package stdio reads what containers write: one goroutine a stream, which
// holds no buffer while nothing comes. Output goes to the CRI log and to
// whoever is attached, and neither can make the container wait: the log drops
// and counts what it cannot write, a slow reader is cut off.
//
// A podmon that dies loses none of it. What is in the pipe stays there, what has
// been read is in the Journal, an incomplete line is in a file of the container's
// directory; Resume puts them together. (A terminal is read without the journal,
// for its driver does not tell how much there is to read.)
package stdio

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/crilog"
)

const (
	// chunk is how much is read at once: what a pipe holds by default.
	chunk = 64 << 10
	// maxPipe is what a pipe holds at most (/proc/sys/fs/pipe-max-size).
	maxPipe = 1 << 20
)

// terminalChunks are for terminals, which have no slot in the journal.
var terminalChunks = sync.Pool{New: func() any { return &slot{mem: make([]byte, slotHead+4096), index: -1} }}

// records is what a chunk becomes; short lines make it larger than the chunk.
var records = sync.Pool{New: func() any { b := make([]byte, 0, 2*chunk); return &b }}

// Output is all that one container writes.
type Output struct {
	id, dir string
	journal *Journal
	log     *crilog.Log // nil: nobody reads the log

	mu       sync.Mutex
	attached map[*Attachment]struct{}
	over     bool

	streams  []*stream
	readers  sync.WaitGroup
	released atomic.Bool // before moved: readers leave the rest alone
	moved    atomic.Bool
}

type stream struct {
	f *os.File

	mu    sync.Mutex // held while others use f
	ended bool       // f is closed

	terminal bool
	lines    crilog.Lines
	rest     restFile
}

// New makes an Output of a container that writes to log, which may be nil. Its
// directory keeps incomplete lines.
func New(id, dir string, journal *Journal, log *crilog.Log) *Output {
	return &Output{id: id, dir: dir, journal: journal, log: log, attached: map[*Attachment]struct{}{}}
}

// Add makes f the stream of that name. Output owns f, which must be non-blocking.
// A container's streams are added before Resume and Read.
func (o *Output) Add(name string, f *os.File, terminal bool) {
	o.streams = append(o.streams, &stream{
		f: f, terminal: terminal, lines: crilog.Lines{Stream: name},
		rest: restFile{path: filepath.Join(o.dir, name+".rest")},
	})
}

// Resume goes on where a podmon has left off: with its incomplete lines, and
// with what is in its journal.
func (o *Output) Resume(journal string) error {
	for _, s := range o.streams {
		var err error
		if s.lines.Rest, err = s.rest.load(); err != nil {
			// It costs an incomplete line; the rest of the output is worth more.
			logrus.WithError(err).WithField("container", o.id).Warn("resume output")
		}
	}
	slots, err := unfinished(journal, o.id)
	if err != nil || o.log == nil {
		return err
	}
	// The one in state writing first: it makes the log whole.
	slices.SortFunc(slots, func(a, b *slot) int { return boolInt(b.state() == slotWriting) - boolInt(a.state() == slotWriting) })
	for _, slot := range slots {
		for _, s := range o.streams {
			if s.lines.Stream == slot.string(atStream) {
				o.redo(s, slot)
			}
		}
	}
	if err := o.log.Mend(); err != nil { // a terminal's, which is in no journal
		logrus.WithError(err).WithField("container", o.id).Error("mend log")
	}
	return nil
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// redo finishes a chunk that a dead podmon has begun.
func (o *Output) redo(s *stream, slot *slot) {
	if slot.seq() == s.rest.seq {
		return // nothing was missing but marking it idle
	}
	switch slot.state() {
	case slotReading:
		if !slot.arrived() {
			return // it is still in the pipe
		}
	case slotWriting:
		if err := o.log.Undo(slot.uint64(atDevice), slot.uint64(atInode), int64(slot.uint64(atOffset))); err != nil {
			logrus.WithError(err).WithField("container", o.id).Error("undo a torn write of the log")
		}
	case slotWritten:
		s.lines.Append(nil, slot.data(), time.Now()) // for the rest
		s.rest.save(slot.seq(), s.lines.Rest)
		return
	}
	o.log.Write(s.lines.Append(nil, slot.data(), time.Now()), nil)
	s.rest.save(slot.seq(), s.lines.Rest)
}

// Read begins reading all streams.
func (o *Output) Read() {
	for _, s := range o.streams {
		o.readers.Go(func() { o.pump(s) })
	}
}

// Drop closes an Output that has not begun to read; what there is to read stays.
func (o *Output) Drop() {
	for _, s := range o.streams {
		s.close()
	}
	if o.log != nil {
		o.log.Close()
	}
}

// Share calls add for the read end of every stream that has not ended. The files
// are valid during the call.
func (o *Output) Share(add func(stream string, f *os.File) error) error {
	for _, s := range o.streams {
		if err := s.use(func() error { return add(s.lines.Stream, s.f) }); err != nil {
			return err
		}
	}
	return nil
}

// use runs f unless the stream has ended, and keeps its file open meanwhile.
func (s *stream) use(f func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil
	}
	return f()
}

func (s *stream) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
	s.f.Close()
}

// pump ends at end of file, or when the read deadline is set to the past.
func (o *Output) pump(s *stream) {
	defer s.close()
	raw, err := s.f.SyscallConn()
	if err != nil {
		return
	}
	var read reader = o.readPipe
	if s.terminal {
		read = readTerminal
	}
	for {
		var c *slot
		var err error
		werr := raw.Read(func(fd uintptr) (done bool) {
			c, err = read(int(fd), s.lines.Stream)
			return err != unix.EAGAIN
		})
		if errors.Is(werr, os.ErrDeadlineExceeded) {
			if !o.released.Load() { // else the rest is for the successor
				o.readRest(s, raw, read)
			}
			return
		}
		if err = errors.Join(werr, err); err != nil {
			logrus.WithError(err).WithField("container", o.id).Error("read output")
		}
		if c == nil {
			o.flush(s)
			return
		}
		o.consume(s, c)
	}
}

// readRest reads what is there when waiting is over, and no more than a pipe can
// hold: who holds it open may go on writing.
func (o *Output) readRest(s *stream, raw syscall.RawConn, read reader) {
	for left := maxPipe; left > 0; {
		var c *slot
		var err error
		cerr := raw.Control(func(fd uintptr) { c, err = read(int(fd), s.lines.Stream) })
		if err = errors.Join(cerr, err); err != nil && !errors.Is(err, unix.EAGAIN) {
			logrus.WithError(err).WithField("container", o.id).Error("read rest of output")
		}
		if c == nil {
			return
		}
		left -= len(c.data())
		o.consume(s, c)
	}
}

// reader reads a chunk from a descriptor without waiting: EAGAIN is nothing there,
// no slot is the end.
type reader func(fd int, stream string) (*slot, error)

// consume puts a chunk where it belongs and gives its memory back.
func (o *Output) consume(s *stream, c *slot) {
	o.deliver(s, c)
	if s.terminal {
		terminalChunks.Put(c)
	} else {
		o.journal.put(c)
	}
}

// readPipe reads what is in the pipe, at most a chunk, into a slot of the journal.
// No slot is the end of the stream; EAGAIN is an empty pipe, which holds no slot.
func (o *Output) readPipe(fd int, stream string) (*slot, error) {
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		return nil, fmt.Errorf("FIONREAD: %w", err)
	}
	if n == 0 {
		return nil, emptyPipe(fd)
	}
	c := o.journal.get(o.id, stream)
	// Exactly as much can be read as is there, unless the container reads it itself.
	if err = c.expect(fd, min(n, chunk)); err == nil {
		n, err = ignoringEINTR(func() (int, error) { return unix.Read(fd, c.data()) })
	}
	if err != nil || n == 0 {
		o.journal.put(c)
		return nil, err
	}
	c.setLength(n)
	c.setState(slotRead)
	return c, nil
}

// emptyPipe tells an empty pipe (EAGAIN) from one at its end (nil), and does not
// read what comes meanwhile.
func emptyPipe(fd int) error {
	poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if _, err := unix.Poll(poll, 0); err != nil && err != unix.EINTR {
		return fmt.Errorf("poll: %w", err)
	}
	if poll[0].Revents&unix.POLLIN == 0 && poll[0].Revents&unix.POLLHUP != 0 {
		return nil
	}
	return unix.EAGAIN
}

// readTerminal reads from a terminal's master, whose end is EIO.
func readTerminal(fd int, _ string) (*slot, error) {
	c := terminalChunks.Get().(*slot)
	for {
		n, err := unix.Read(fd, c.mem[slotHead:])
		if err == unix.EINTR {
			continue
		}
		if err == nil && n > 0 {
			c.setLength(n)
			return c, nil
		}
		terminalChunks.Put(c)
		if err == unix.EIO {
			err = nil
		}
		return nil, err
	}
}

func (o *Output) deliver(s *stream, c *slot) {
	o.tee(s.lines.Stream, c.data())
	if o.log == nil {
		return
	}
	out := records.Get().(*[]byte)
	defer func() { records.Put(out) }()
	*out = s.lines.Append((*out)[:0], c.data(), time.Now())
	o.log.Write(*out, c)
	s.rest.save(c.seq(), s.lines.Rest)
	if cap(*out) > 8*chunk {
		*out = make([]byte, 0, 2*chunk) // a flood of empty lines; do not keep it
	}
}

// Writing and Written are how the log tells what it does with a chunk.
func (s *slot) Writing(log unix.Stat_t) { s.writing(log) }
func (s *slot) Written()                { s.setState(slotWritten) }

// flush writes the incomplete line at the end of a stream.
func (o *Output) flush(s *stream) {
	if o.log != nil {
		o.log.Write(s.lines.Flush(nil, time.Now()), nil)
	}
	s.rest.save(s.rest.seq+1, nil)
}

func (o *Output) tee(stream string, p []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for a := range o.attached {
		a.put(stream, p)
	}
}

// Attach copies the output from now on to the files, which it owns, until the
// output ends or nobody reads them any more. The caller must Wait for it.
func (o *Output) Attach(stdout, stderr *os.File) *Attachment {
	o.mu.Lock()
	defer o.mu.Unlock()
	a := newAttachment(o, stdout, stderr)
	if o.over {
		a.finish()
	} else {
		o.attached[a] = struct{}{}
	}
	return a
}

// Drain waits for the end of all streams, at most until limit: a descriptor that
// was passed to another container keeps a stream open for ever. What was read
// until then is in the log, and the log is closed.
func (o *Output) Drain(limit time.Duration) error {
	done := make(chan struct{})
	go func() { o.readers.Wait(); close(done) }()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
	case <-timer.C:
		o.interrupt()
		<-done
		for _, s := range o.streams {
			o.flush(s)
		}
	}
	return o.end()
}

// Release stops reading for a successor and closes the log.
func (o *Output) Release() error {
	o.released.Store(true)
	o.interrupt()
	o.readers.Wait()
	o.moved.Store(true)
	return o.end()
}

// Moved tells whether another podmon has the output now, and attachments ended
// for that.
func (o *Output) Moved() bool { return o.moved.Load() }

// interrupt ends all waiting for output.
func (o *Output) interrupt() {
	for _, s := range o.streams {
		if err := s.use(func() error { return s.f.SetReadDeadline(time.Unix(1, 0)) }); err != nil {
			logrus.WithError(err).Error("stop reading output")
		}
	}
}

func (o *Output) end() error {
	o.mu.Lock()
	o.over = true
	for a := range o.attached {
		a.finish()
	}
	o.mu.Unlock()
	if o.log == nil {
		return nil
	}
	return o.log.Close()
}

// Reopen opens the log's path anew; without a log there is nothing to do.
func (o *Output) Reopen() error {
	if o.log == nil {
		return nil
	}
	return o.log.Reopen()
}
