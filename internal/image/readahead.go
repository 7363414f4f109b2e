package image

import "io"

const (
	wireChunk  = 64 << 10 // of what is received
	plainChunk = 256 << 10
	chunks     = 4
)

// readAhead reads from r in a goroutine of its own, a few chunks ahead: one core
// inflates and hashes while another writes files.
type readAhead struct {
	full chan chunk
	free chan []byte
	quit chan struct{}
	done chan struct{}

	cur  chunk
	rest []byte
}

type chunk struct {
	buf []byte // its whole capacity goes back to free
	n   int
	err error
}

// newReadAhead begins to read, chunks of a size; the caller must call stop, and may
// use r itself only after that.
func newReadAhead(r io.Reader, size int) *readAhead {
	a := &readAhead{
		full: make(chan chunk, chunks), free: make(chan []byte, chunks),
		quit: make(chan struct{}), done: make(chan struct{}),
	}
	for range chunks {
		a.free <- make([]byte, size)
	}
	go a.fill(r)
	return a
}

func (a *readAhead) fill(r io.Reader) {
	defer close(a.done)
	for {
		var buf []byte
		select {
		case buf = <-a.free:
		case <-a.quit:
			return
		}
		var n int
		var err error
		for n < len(buf) && err == nil {
			var m int
			m, err = r.Read(buf[n:])
			n += m
		}
		a.full <- chunk{buf, n, err}
		if err != nil {
			return
		}
	}
}

// Read implements io.Reader.
func (a *readAhead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.cur.err != nil {
			return 0, a.cur.err
		}
		if a.cur.buf != nil {
			a.free <- a.cur.buf
		}
		a.cur = <-a.full
		a.rest = a.cur.buf[:a.cur.n]
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// stop ends the goroutine and waits for it: after a read that is under way.
func (a *readAhead) stop() {
	close(a.quit)
	<-a.done
}
