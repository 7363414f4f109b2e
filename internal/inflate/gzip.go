// Package inflate reads gzip (RFC 1952, RFC 1951) fast: layers of images are
// inflated more than anything else is done to them.
//
// It decodes two to three times as fast as compress/gzip and klauspost/compress: it
// keeps 64 bits of input in a register and looks there for three literals, or a
// length and its distance, before it asks for more; one table entry has a code's
// value, its length and that of its extra bits; matches are copied eight bytes at a
// time. All indexes are checked by Go as ever: a hostile stream ends with an error,
// and takes no more memory than any other.
package inflate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

const (
	window  = 32 << 10 // how far back a match may reach
	outSize = window + 256<<10
	inSize  = 64 << 10
)

// ErrFormat is wrapped by all errors that a stream's content is the reason of, but
// those that begin with its end, which are io.ErrUnexpectedEOF.
var ErrFormat = errors.New("invalid gzip stream")

func formatError(what string) error { return fmt.Errorf("%w: %s", ErrFormat, what) }

// Reader inflates one gzip stream, of one or several members.
type Reader struct {
	in  input
	out [outSize]byte
	r   int // out[r:w] is to be read
	w   int
	// begin is where in out the member begins: no match reaches beyond it.
	begin int

	step   func(*Reader) error // what comes next in the stream
	last   bool                // no block of the member follows the present one
	stored int                 // bytes left of a stored block
	tables tables              // of the present block
	fixed  bool                // its codes are the fixed ones

	crc  uint32
	size uint32 // of the member, modulo 2^32
	err  error  // ends the stream once all before it is read
}

// NewReader reads the first member's header. The reader reads ahead in r.
func NewReader(r io.Reader) (*Reader, error) {
	z := &Reader{in: input{r: r}}
	if err := z.header(); err != nil {
		return nil, err
	}
	return z, nil
}

// Read implements io.Reader. Its error is that of the underlying reader,
// io.ErrUnexpectedEOF, or an ErrFormat.
func (z *Reader) Read(p []byte) (int, error) {
	for z.r == z.w {
		if z.err != nil {
			return 0, z.err
		}
		if len(p) == 0 {
			return 0, nil
		}
		z.produce()
	}
	n := copy(p, z.out[z.r:z.w])
	z.r += n
	return n, nil
}

// produce inflates until out is full, or the stream ends. All that out had is read.
func (z *Reader) produce() {
	if z.w > window {
		gone := z.w - window
		copy(z.out[:window], z.out[gone:z.w])
		z.begin = max(z.begin-gone, 0)
		z.r, z.w = window, window
	}
	from := z.w
	sum := func() {
		z.crc = crc32.Update(z.crc, crc32.IEEETable, z.out[from:z.w])
		z.size += uint32(z.w - from)
		from = z.w
	}
	for z.err == nil && z.w <= outSize-slack {
		if z.step == nil {
			sum()
			z.err = z.trailer()
		} else {
			z.err = z.step(z)
		}
	}
	sum()
}

// Member header flags.
const (
	flagHeaderCRC = 1 << 1
	flagExtra     = 1 << 2
	flagName      = 1 << 3
	flagComment   = 1 << 4
)

// header reads a member's header; io.EOF when there is none.
func (z *Reader) header() error {
	h := headerReader{in: &z.in}
	var fixed [10]byte
	if n := h.read(fixed[:]); n == 0 && errors.Is(h.err, io.EOF) {
		return io.EOF
	}
	if h.err == nil && (fixed[0] != 0x1f || fixed[1] != 0x8b || fixed[2] != 8) {
		return formatError("no gzip header")
	}
	flags := fixed[3]
	if flags&flagExtra != 0 {
		var length [2]byte
		h.read(length[:])
		for range binary.LittleEndian.Uint16(length[:]) {
			h.byte()
		}
	}
	for _, text := range []byte{flagName, flagComment} {
		for flags&text != 0 && h.err == nil && h.byte() != 0 {
		}
	}
	if flags&flagHeaderCRC != 0 {
		want := uint16(h.crc)
		var got [2]byte
		h.read(got[:])
		if h.err == nil && binary.LittleEndian.Uint16(got[:]) != want {
			return formatError("wrong checksum of the header")
		}
	}
	if h.err != nil {
		return unexpected(h.err)
	}
	z.step, z.last = (*Reader).block, false
	z.crc, z.size, z.begin = 0, 0, z.w
	return nil
}

// headerReader reads bytes of a header until an error.
type headerReader struct {
	in  *input
	crc uint32
	err error
}

func (h *headerReader) read(p []byte) (n int) {
	for n = range p {
		if p[n] = h.byte(); h.err != nil {
			return n
		}
	}
	return len(p)
}

func (h *headerReader) byte() byte {
	if h.err != nil {
		return 0
	}
	var b byte
	if b, h.err = h.in.byte(); h.err == nil {
		h.crc = crc32.Update(h.crc, crc32.IEEETable, []byte{b})
	}
	return b
}

// trailer compares what the member says of itself with what it was, and begins the
// next one.
func (z *Reader) trailer() error {
	z.in.align()
	h := headerReader{in: &z.in}
	var t [8]byte
	h.read(t[:])
	switch {
	case h.err != nil:
		return unexpected(h.err)
	case binary.LittleEndian.Uint32(t[:4]) != z.crc:
		return formatError("wrong checksum")
	case binary.LittleEndian.Uint32(t[4:]) != z.size:
		return formatError("wrong length")
	}
	return z.header()
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
