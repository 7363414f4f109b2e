package inflate

import "encoding/binary"

// slack is how much room one step of decode needs at the end of out: the longest
// match, copied by words, after two literals.
const slack = 258 + 2 + 16

// block reads a block's header.
func (z *Reader) block() error {
	if z.last {
		z.step = nil
		return nil
	}
	head, err := z.in.take(3)
	if err != nil {
		return err
	}
	z.last = head&1 != 0
	switch head >> 1 {
	case 0:
		return z.beginStored()
	case 1:
		z.fixed = true
	case 2:
		z.fixed = false
		if err := z.codes(); err != nil {
			return err
		}
	default:
		return formatError("no such type of block")
	}
	z.step = (*Reader).decode
	return nil
}

func (z *Reader) beginStored() error {
	z.in.align()
	h := headerReader{in: &z.in}
	var b [4]byte
	h.read(b[:])
	if h.err != nil {
		return unexpected(h.err)
	}
	n := binary.LittleEndian.Uint16(b[:2])
	if n != ^binary.LittleEndian.Uint16(b[2:]) {
		return formatError("wrong length of a stored block")
	}
	z.stored = int(n)
	z.step = (*Reader).copyStored
	return nil
}

func (z *Reader) copyStored() error {
	to := z.out[z.w:]
	n := z.in.copy(to[:min(len(to), z.stored)])
	z.w += n
	if z.stored -= n; z.stored == 0 {
		z.step = (*Reader).block
	} else if n == 0 {
		return z.in.ended()
	}
	return nil
}

// codeOrder is the order of the code lengths' own lengths.
var codeOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// lengthEntries are the entries of the codes that lengths are written in.
var lengthEntries = func() (codes [19]uint32) {
	for i := range codes {
		codes[i] = literal | uint32(i)<<16
	}
	return codes
}()

// codes reads the codes of a block.
func (z *Reader) codes() error {
	head, err := z.in.take(14)
	if err != nil {
		return err
	}
	nLengths, nDistances, n := int(head&31)+257, int(head>>5&31)+1, int(head>>10)+4
	if nLengths > 286 || nDistances > 30 {
		return formatError("too many codes")
	}
	var lens [maxLengths + maxDistances]uint8
	for _, at := range codeOrder[:n] {
		l, err := z.in.take(3)
		if err != nil {
			return err
		}
		lens[at] = uint8(l)
	}
	var table [128]uint32
	if !fill(table[:], 7, lens[:19], lengthEntries[:]) {
		return formatError("codes of code lengths")
	}
	clear(lens[:19])
	all := nLengths + nDistances
	for i := 0; i < all; {
		// At most seven bits of a code and seven extra.
		if z.in.n < 14 {
			z.in.more(16)
			if z.in.pos > z.in.end {
				return z.in.ended()
			}
			z.in.fill()
		}
		e := table[z.in.bits&127]
		if e&literal == 0 {
			return formatError("no such code length")
		}
		z.in.bits >>= e & 63
		z.in.n -= uint(e & 0xff)
		symbol := uint8(e >> 16)
		if symbol < 16 {
			if z.in.overrun() {
				return z.in.ended()
			}
			lens[i] = symbol
			i++
			continue
		}
		var same uint8
		repeat, extra := uint32(3), uint(2)
		switch symbol {
		case 16:
			if i == 0 {
				return formatError("repeats no code length")
			}
			same = lens[i-1]
		case 17:
			extra = 3
		case 18:
			repeat, extra = 11, 7
		}
		more, err := z.in.take(extra)
		if err != nil {
			return err
		}
		if repeat += more; i+int(repeat) > all {
			return formatError("too many code lengths")
		}
		for range repeat {
			lens[i] = same
			i++
		}
	}
	if lens[256] == 0 {
		return formatError("no end of the block")
	}
	if !fill(z.tables.lengths[:], lengthBits, lens[:nLengths], lengthCodes[:]) ||
		!fill(z.tables.distances[:], distanceBits, lens[nLengths:all], distanceCodes[:]) {
		return formatError("codes of a block")
	}
	return nil
}

// decode inflates a block until it ends, out is full, or the stream ends.
func (z *Reader) decode() error {
	t := &z.tables
	if z.fixed {
		t = fixedTables
	}
	in := &z.in
	for z.w <= outSize-slack {
		in.more(stepIn)
		limit := in.end - stepIn
		if in.err != nil {
			limit = in.end // and pad zeros
		}
		if in.pos > limit {
			return in.ended()
		}
		ended, err := z.run(t, limit)
		if in.overrun() {
			return in.ended()
		}
		if err != nil {
			return err
		}
		if ended {
			z.step = (*Reader).block
			return nil
		}
	}
	return nil
}

// stepIn is how far one step of run looks ahead, and at most goes: two fills.
const stepIn = 16

// run inflates while the input's position is at most limit and out has room. It
// returns true at the end of the block.
func (z *Reader) run(t *tables, limit int) (ended bool, err error) {
	var (
		buf      = &z.in.buf
		pos      = z.in.pos
		bb, bc   = z.in.bits, z.in.n
		out      = &z.out
		w, begin = z.w, z.begin
	)
loop:
	for pos <= limit && w <= outSize-slack {
		bb |= binary.LittleEndian.Uint64(buf[pos:pos+8]) << (bc & 63)
		pos += int((63 - bc) >> 3)
		bc |= 56
		// Three literals take 33 bits at most.
		e := t.lengths[bb&(1<<lengthBits-1)]
		if e&literal != 0 {
			bb >>= e & 63
			bc -= uint(e & 0xff)
			out[w] = byte(e >> 16)
			w++
			e = t.lengths[bb&(1<<lengthBits-1)]
			if e&literal != 0 {
				bb >>= e & 63
				bc -= uint(e & 0xff)
				out[w] = byte(e >> 16)
				w++
				e = t.lengths[bb&(1<<lengthBits-1)]
				if e&literal != 0 {
					bb >>= e & 63
					bc -= uint(e & 0xff)
					out[w] = byte(e >> 16)
					w++
					continue
				}
			}
		}
		// At least 34 bits are left: enough for a length, 20, not for its distance, 28.
		if e&special != 0 {
			if e&isSubtable != 0 {
				bb >>= lengthBits
				bc -= lengthBits
				e = t.lengths[(uint64(e>>16)+bb&(1<<(e>>8&15)-1))&(lengthRoom-1)]
				if e&literal != 0 {
					bb >>= e & 63
					bc -= uint(e & 0xff)
					out[w] = byte(e >> 16)
					w++
					continue
				}
			}
			if e&special != 0 {
				if e&isEnd == 0 {
					err = formatError("no such length")
					break loop
				}
				bb >>= e & 63
				bc -= uint(e & 0xff)
				ended = true
				break loop
			}
		}
		length := int(e>>16) + int(bb&(1<<(e&63)-1)>>(e>>8&63))
		bb >>= e & 63
		bc -= uint(e & 0xff)

		bb |= binary.LittleEndian.Uint64(buf[pos:pos+8]) << (bc & 63)
		pos += int((63 - bc) >> 3)
		bc |= 56
		e = t.distances[bb&(1<<distanceBits-1)]
		if e&special != 0 {
			if e&isSubtable != 0 {
				bb >>= distanceBits
				bc -= distanceBits
				e = t.distances[(uint64(e>>16)+bb&(1<<(e>>8&15)-1))&(distanceRoom-1)]
			}
			if e&special != 0 {
				err = formatError("no such distance")
				break loop
			}
		}
		distance := int(e>>16) + int(bb&(1<<(e&63)-1)>>(e>>8&63))
		bb >>= e & 63
		bc -= uint(e & 0xff)
		from := w - distance
		if from < begin {
			err = formatError("distance is too far")
			break loop
		}
		to := w
		w += length
		switch {
		case distance >= 8:
			for to < w {
				word := binary.LittleEndian.Uint64(out[from : from+8])
				binary.LittleEndian.PutUint64(out[to:to+8], word)
				from += 8
				to += 8
			}
		case distance == 1:
			word := uint64(out[from]) * 0x0101010101010101
			for to < w {
				binary.LittleEndian.PutUint64(out[to:to+8], word)
				to += 8
			}
		default:
			// The pattern is at the word's beginning; what follows it in the word the next
			// one overwrites.
			word := binary.LittleEndian.Uint64(out[from : from+8])
			for to < w {
				binary.LittleEndian.PutUint64(out[to:to+8], word)
				to += distance
			}
		}
	}
	z.in.pos, z.in.bits, z.in.n, z.w = pos, bb, bc, w
	return ended, err
}
