package inflate

import (
	"encoding/binary"
	"io"
)

// input is a stream of bits, the lowest of each byte first.
//
// What is in buf from pos on has not been taken into bits, but for a part of a byte
// that may be there already: or-ing it in again changes nothing.
type input struct {
	r   io.Reader
	err error // of r; nothing comes after it

	bits uint64
	n    uint // how many of bits count

	buf [inSize + pad]byte
	pos int
	end int // of what was read; after an error pad zeros follow
}

// pad is what a decoder may look at, and run on, behind the stream's end before it
// has to notice.
const pad = 32

// more reads on, until at least min bytes are there or the stream has ended. min is
// at most pad.
func (in *input) more(min int) {
	if in.end-in.pos >= min || in.err != nil {
		return
	}
	taken := int(in.n >> 3) // whole bytes, which align may give back
	in.end = copy(in.buf[:], in.buf[in.pos-taken:in.end])
	in.pos = taken
	min += taken
	empty := 0
	for in.end < min && in.err == nil {
		var n int
		n, in.err = in.r.Read(in.buf[in.end:inSize])
		if in.end += n; n > 0 {
			empty = 0
		} else if empty++; empty > 100 && in.err == nil {
			in.err = io.ErrNoProgress
		}
	}
	if in.err != nil {
		clear(in.buf[in.end : in.end+pad])
	}
}

// overrun tells whether more bits were used than the stream has.
func (in *input) overrun() bool { return in.err != nil && in.pos-int(in.n>>3) > in.end }

// ended is the error for a decoder that needs more than there is.
func (in *input) ended() error { return unexpected(in.err) }

// fill takes in at least 56 bits. more(8) must have been called, or more bytes be
// known to be there.
func (in *input) fill() {
	in.bits |= binary.LittleEndian.Uint64(in.buf[in.pos:]) << (in.n & 63)
	in.pos += int((63 - in.n) >> 3)
	in.n |= 56
}

// take takes up to 32 bits.
func (in *input) take(n uint) (uint32, error) {
	if in.n < n {
		in.more(16)
		if in.pos > in.end { // the stream has ended: in.buf has zeros
			return 0, in.ended()
		}
		in.fill()
	}
	v := uint32(in.bits & (1<<n - 1))
	in.bits >>= n
	in.n -= n
	if in.overrun() {
		return 0, in.ended()
	}
	return v, nil
}

// align drops the rest of a byte, and gives back whole bytes that were taken in.
func (in *input) align() {
	in.pos -= int(in.n >> 3)
	in.bits, in.n = 0, 0
}

// byte reads a byte; the input is aligned.
func (in *input) byte() (byte, error) {
	in.more(1)
	if in.pos >= in.end {
		return 0, in.err
	}
	b := in.buf[in.pos]
	in.pos++
	return b, nil
}

// copy reads bytes; the input is aligned.
func (in *input) copy(p []byte) int {
	in.more(1)
	n := copy(p, in.buf[in.pos:max(in.pos, in.end)])
	in.pos += n
	return n
}
