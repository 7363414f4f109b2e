// Package stdio reads what containers write: one goroutine a stream, which
// holds no buffer while nothing comes. Output goes to the CRI log and to
// whoever is attached, and neither can make the container wait: the log drops
// and counts what it cannot write, a slow reader is cut off.
package stdio

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/crilog"
)

// chunk is how much is read at once: what a pipe holds by default.
const chunk = 64 << 10

var chunks = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// records is what a chunk becomes; short lines make it larger than the chunk.
var records = sync.Pool{New: func() any { b := make([]byte, 0, 2*chunk); return &b }}

// Output is all that one container writes.
type Output struct {
	log *crilog.Log // nil: nobody reads the log

	mu       sync.Mutex
	attached map[*Attachment]struct{}
	over     bool

	streams []*stream
	readers sync.WaitGroup
}

type stream struct {
	f *os.File

	mu    sync.Mutex // held while others use f
	ended bool       // f is closed

	lines   crilog.Lines
	rest    string // file that keeps lines.Rest for a successor
	hasRest bool
}

// New makes an Output that writes to log, which may be nil.
func New(log *crilog.Log) *Output {
	return &Output{log: log, attached: map[*Attachment]struct{}{}}
}

// Read begins reading f as the stream of that name. Output owns f, which must be
// non-blocking. The file rest keeps an incomplete last line, so that the next
// podmon goes on with it when this one dies.
func (o *Output) Read(name string, f *os.File, rest string) {
	s := &stream{f: f, lines: crilog.Lines{Stream: name}, rest: rest}
	if b, err := os.ReadFile(rest); err == nil && len(b) > 0 && len(b) <= crilog.MaxPiece {
		s.lines.Rest, s.hasRest = b, true
	}
	o.streams = append(o.streams, s)
	o.readers.Go(func() { o.pump(s) })
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

// pump ends at end of file or when the read deadline is set to the past.
func (o *Output) pump(s *stream) {
	defer s.close()
	raw, err := s.f.SyscallConn()
	if err != nil {
		return
	}
	for {
		buf, n, err := readReady(raw)
		if n > 0 {
			o.deliver(s, (*buf)[:n])
		}
		if buf != nil {
			chunks.Put(buf)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return // released: the rest is on file for the successor
		}
		if err != nil || n == 0 {
			// EIO is a terminal whose last user is gone.
			o.flush(s)
			return
		}
	}
}

// readReady waits until there is something to read and only then takes a buffer.
func readReady(raw interface {
	Read(func(uintptr) bool) error
}) (buf *[]byte, n int, err error) {
	werr := raw.Read(func(fd uintptr) bool {
		buf = chunks.Get().(*[]byte)
		for {
			n, err = unix.Read(int(fd), *buf)
			if err != unix.EINTR {
				break
			}
		}
		if err == unix.EAGAIN {
			chunks.Put(buf)
			buf, n = nil, 0
			return false
		}
		return true
	})
	if werr != nil {
		return nil, 0, werr
	}
	return buf, max(n, 0), err
}

func (o *Output) deliver(s *stream, p []byte) {
	o.tee(s.lines.Stream, p)
	if o.log == nil {
		return
	}
	out := records.Get().(*[]byte)
	defer func() { records.Put(out) }()
	*out = s.lines.Append((*out)[:0], p, time.Now())
	o.log.Write(*out)
	s.saveRest()
	if cap(*out) > 8*chunk {
		*out = make([]byte, 0, 2*chunk) // a flood of empty lines; do not keep it
	}
}

// saveRest keeps the incomplete line on file. A failure costs that line only
// when podmon dies too, and is not worth more than trying.
func (s *stream) saveRest() {
	if len(s.lines.Rest) == 0 && !s.hasRest {
		return
	}
	s.hasRest = os.WriteFile(s.rest, s.lines.Rest, 0o600) == nil && len(s.lines.Rest) > 0
}

func (o *Output) flush(s *stream) {
	if o.log != nil {
		o.log.Write(s.lines.Flush(nil, time.Now()))
	}
	s.saveRest()
}

func (o *Output) tee(stream string, p []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for a := range o.attached {
		a.put(stream, p)
	}
}

// Attach copies the output from now on to the files until it ends, nobody reads
// them any more or ctx is done. It owns the files.
func (o *Output) Attach(ctx context.Context, stdout, stderr *os.File) {
	o.mu.Lock()
	a := newAttachment(stdout, stderr)
	if o.over {
		a.finish()
	} else {
		o.attached[a] = struct{}{}
	}
	o.mu.Unlock()
	a.Wait(ctx)
	o.mu.Lock()
	delete(o.attached, a)
	o.mu.Unlock()
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
	o.interrupt()
	o.readers.Wait()
	return o.end()
}

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
