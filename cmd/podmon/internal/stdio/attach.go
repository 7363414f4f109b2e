package stdio

import (
	"context"
	"os"
	"sync"
)

// attachLimit is how far an attached reader may fall behind before it is cut off.
const attachLimit = 1 << 20

// Attachment is one reader of a container's live output.
type Attachment struct {
	o     *Output
	sinks map[string]*sink
	wg    sync.WaitGroup
}

// sink queues output for one descriptor of a reader.
type sink struct {
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
		s := &sink{f: f}
		s.wake = sync.NewCond(&s.mu)
		a.sinks[name] = s
		a.wg.Go(s.run)
	}
	return a
}

// put queues output; a reader that is too far behind is cut off.
func (a *Attachment) put(stream string, p []byte) {
	s := a.sinks[stream]
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	if len(s.queue)+len(p) > attachLimit {
		s.closed, s.queue = true, nil
		s.f.Close() // also ends a write underway
	} else {
		s.queue = append(s.queue, p...)
	}
	s.wake.Signal()
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
			s.mu.Lock()
			s.closed, s.queue = true, nil
			s.mu.Unlock()
			return
		}
	}
}
