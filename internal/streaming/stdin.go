package streaming

import (
	"io"
	"sync"
)

// stdin is a client's input whose Read can be freed: the library's streams
// block until the connection ends, which is only after the Runtime has
// returned, so a Runtime could never wait for its reader.
type stdin struct {
	data   chan []byte
	closed chan struct{}
	done   chan struct{} // the pump has ended
	once   sync.Once
	rest   []byte
	err    error // of the source; read after data is closed
}

const stdinChunk = 32 << 10

func newStdin(source io.Reader) *stdin {
	s := &stdin{data: make(chan []byte), closed: make(chan struct{}), done: make(chan struct{})}
	go s.pump(source)
	return s
}

// pump reads until the source ends; after Close it discards, so that the other
// streams of the connection are not held up behind this one.
func (s *stdin) pump(source io.Reader) {
	defer close(s.done)
	defer close(s.data)
	// Two buffers: one is being read from while the other is being filled.
	buffers := [2][]byte{make([]byte, stdinChunk), make([]byte, stdinChunk)}
	for i := 0; ; i ^= 1 {
		n, err := source.Read(buffers[i])
		if n > 0 {
			select {
			case s.data <- buffers[i][:n]:
			case <-s.closed:
				// Into a buffer of its own: a Read may still be at one of ours.
				_, _ = io.Copy(io.Discard, readOnly{source})
				s.err = io.ErrClosedPipe
				return
			}
		}
		if err != nil {
			s.err = err
			return
		}
	}
}

// Read implements io.Reader; one goroutine calls it.
func (s *stdin) Read(p []byte) (int, error) {
	for len(s.rest) == 0 {
		select {
		case <-s.closed:
			return 0, io.ErrClosedPipe
		default:
		}
		select {
		case chunk, ok := <-s.data:
			if !ok {
				return 0, s.err
			}
			s.rest = chunk
		case <-s.closed:
			return 0, io.ErrClosedPipe
		}
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

// Close frees a waiting Read and discards what is still to come.
func (s *stdin) Close() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}
