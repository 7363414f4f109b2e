package stdio

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
)

// attachLimit is how far an attached reader may fall behind before it is cut off.
const attachLimit = 1 << 20

// Attachment is one reader of a container's live output.
type Attachment struct {
	o     *Output
	sinks map[string]*sink
	wg    sync.WaitGroup
	why   atomic.Pointer[error] // why it was cut off
}

// Reasons for which an attachment is cut off before the output has ended.
var (
	ErrSlow = fmt.Errorf("attached reader is more than %d bytes behind", attachLimit)
	ErrGone = errors.New("attached reader has gone")
)

// sink queues output for one descriptor of a reader.
type sink struct {
	a *Attachment
	f *os.File

	mu     sync.Mutex
	queue  []byte
	wake   *sync.Cond
	closed bool // no more will come, or nobody reads
}

// newAttachment owns the files; nil ones are streams that nobody wants.
func newAttachment(o *Output, stdout, stderr *os.File) *Attachment {
	a := &Attachment{o: o, sinks: map[string]*sink{}}
	for name, f := range map[string]*os.File{"stdout": stdout, "stderr": stderr} {
		if f == nil {
			continue
		}
		s := &sink{a: a, f: f}
		s.wake = sync.NewCond(&s.mu)
		a.sinks[name] = s
		a.wg.Go(s.run)
	}
	return a
}

// put queues output; a reader that is too far behind is cut off, from both its
// streams: with one of them missing the other would look whole.
func (a *Attachment) put(stream string, p []byte) {
	s := a.sinks[stream]
	if s == nil {
		return
	}
	if !s.add(p) {
		a.cutOff(ErrSlow)
	}
}

// add queues output unless it is too much.
func (s *sink) add(p []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return true
	}
	if len(s.queue)+len(p) > attachLimit {
		return false
	}
	s.queue = append(s.queue, p...)
	s.wake.Signal()
	return true
}

// cutOff ends the attachment at once, for the first reason there is.
func (a *Attachment) cutOff(why error) {
	a.why.CompareAndSwap(nil, &why)
	for _, s := range a.sinks {
		s.mu.Lock()
		s.closed, s.queue = true, nil
		s.wake.Signal()
		s.mu.Unlock()
		s.f.Close() // also ends a write underway
	}
}

// Err tells, after Wait, why the attachment was cut off; nil when it was not.
func (a *Attachment) Err() error {
	if why := a.why.Load(); why != nil {
		return *why
	}
	return nil
}

// finish lets queued output go out and ends the attachment then.
func (a *Attachment) finish() {
	for _, s := range a.sinks {
		s.mu.Lock()
		s.closed = true
		s.wake.Signal()
		s.mu.Unlock()
	}
}

// Wait returns when the output has ended, the reader has gone, or ctx is done,
// which ends the attachment.
func (a *Attachment) Wait(ctx context.Context) {
	stop := context.AfterFunc(ctx, a.Close)
	defer stop()
	a.wg.Wait()
	a.o.mu.Lock()
	defer a.o.mu.Unlock()
	delete(a.o.attached, a)
}

// Moved tells that the attachment has ended because another podmon has the output.
func (a *Attachment) Moved() bool { return a.o.Moved() }

// Close ends the attachment at once.
func (a *Attachment) Close() {
	a.finish()
	for _, s := range a.sinks {
		s.f.Close() // also ends a write underway
	}
}

func (s *sink) run() {
	defer s.f.Close()
	for {
		s.mu.Lock()
		for len(s.queue) == 0 && !s.closed {
			s.wake.Wait()
		}
		out := s.queue
		s.queue = nil
		s.mu.Unlock()
		if len(out) == 0 {
			return
		}
		if _, err := s.f.Write(out); err != nil {
			if !errors.Is(err, os.ErrClosed) { // by Close, or already cut off
				s.a.cutOff(ErrGone)
			}
			return
		}
	}
}
