package inflate

import "math/bits"

// Tables have an entry for each value of the next bits of the input:
//
//	literal    1 << 31 | its value << 16 | bits of its code
//	length     its base << 16 | bits of its code << 8 | these and its extra bits
//	distance   as a length
//	subtable   special | isSubtable | its place << 16 | its bits << 8 | the table's bits
//	end        special | isEnd | bits of its code
//	no code    special
const (
	literal    = 1 << 31
	special    = 1 << 15
	isSubtable = 1 << 14
	isEnd      = 1 << 13

	lengthBits   = 11 // looked at first
	distanceBits = 8
	// Room for the table and its subtables: zlib's enough.c finds 2342 and 402
	// entries at most. Powers of two, so that a mask is a bounds check.
	lengthRoom   = 4096
	distanceRoom = 512

	maxLengths   = 288
	maxDistances = 32
)

type tables struct {
	lengths   [lengthRoom]uint32
	distances [distanceRoom]uint32
}

// lengthCodes and distanceCodes are the entries of the codes, without their bits.
var (
	lengthCodes   = makeLengthCodes()
	distanceCodes = makeDistanceCodes()
)

func makeLengthCodes() (codes [maxLengths]uint32) {
	for c := range 256 {
		codes[c] = literal | uint32(c)<<16
	}
	codes[256] = special | isEnd
	base := uint32(3)
	for c := 257; c < 285; c++ {
		extra := uint32(max(0, (c-261)/4))
		codes[c] = base<<16 | extra
		base += 1 << extra
	}
	codes[285] = 258 << 16
	codes[286], codes[287] = special, special
	return codes
}

func makeDistanceCodes() (codes [maxDistances]uint32) {
	base := uint32(1)
	for c := range 30 {
		extra := uint32(max(0, c/2-1))
		codes[c] = base<<16 | extra
		base += 1 << extra
	}
	codes[30], codes[31] = special, special
	return codes
}

// fixedTables are those of blocks with fixed codes.
var fixedTables = makeFixedTables()

func makeFixedTables() *tables {
	var lens [maxLengths]uint8
	for i := range lens {
		switch {
		case i < 144, i >= 280:
			lens[i] = 8
		case i < 256:
			lens[i] = 9
		default:
			lens[i] = 7
		}
	}
	t := &tables{}
	fill(t.lengths[:], lengthBits, lens[:], lengthCodes[:])
	for i := range maxDistances {
		lens[i] = 5
	}
	fill(t.distances[:], distanceBits, lens[:maxDistances], distanceCodes[:])
	return t
}

// fill makes a table of 1 << root entries, and its subtables, of the lengths of the
// codes' bits; codes has their entries. It returns false when there are no such
// codes: as compress/flate it takes no incomplete ones, but none at all, and a
// single one of one bit.
func fill(table []uint32, root uint, lens []uint8, codes []uint32) bool {
	var count [16]int
	for _, l := range lens {
		count[l]++
	}
	count[0] = 0
	longest := uint(0)
	left := 1 // codes not used, of the present length
	for l := 1; l < 16; l++ {
		if left = left<<1 - count[l]; left < 0 {
			return false
		}
		if count[l] > 0 {
			longest = uint(l)
		}
	}
	if longest == 0 || left > 0 {
		if longest > 1 || count[1] > 1 {
			return false
		}
		for i := range table[:1<<root] {
			table[i] = special
		}
		if longest == 0 {
			return true
		}
	}
	// Symbols in the order of their codes.
	var sorted [maxLengths]uint16
	var place [16]int
	for l := 1; l < 15; l++ {
		place[l+1] = place[l] + count[l]
	}
	for s, l := range lens {
		if l > 0 {
			sorted[place[l]] = uint16(s)
			place[l]++
		}
	}

	code := uint32(0) // not reversed yet
	free := 1 << root // where the next subtable goes
	prefix, start, sub := ^uint32(0), 0, uint(0)
	i := 0
	for l := uint(1); l <= longest; l++ {
		code <<= 1
		for ; count[l] > 0; count[l]-- {
			entry := codes[sorted[i]]
			reversed := bits.Reverse32(code) >> (32 - l)
			i++
			code++
			if l <= root {
				e := entryOf(entry, uint32(l))
				for at := reversed; at < 1<<root; at += 1 << l {
					table[at] = e
				}
				continue
			}
			if low := reversed & (1<<root - 1); low != prefix {
				// A new subtable, as large as the codes left with this prefix need.
				prefix, start = low, free
				sub = l - root
				for room := 1 << sub; sub+root < longest; room <<= 1 {
					if room -= count[sub+root]; room <= 0 {
						break
					}
					sub++
				}
				free += 1 << sub
				table[low] = special | isSubtable | uint32(start)<<16 | uint32(sub)<<8 | uint32(root)
			}
			e := entryOf(entry, uint32(l-root))
			for at := reversed >> root; at < 1<<sub; at += 1 << (l - root) {
				table[start+int(at)] = e
			}
		}
	}
	return true
}

// entryOf completes a code's entry with the bits that remain of it where it is
// looked up.
func entryOf(entry, bits uint32) uint32 {
	if entry&(literal|special) != 0 {
		return entry | bits
	}
	return entry + bits<<8 + bits
}
