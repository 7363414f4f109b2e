package crilog

import (
	"bytes"
	"time"
)

// MaxPiece is how much of a line one record holds. kubelet joins the pieces of
// a line by their tags: P for all but the last one, which is F.
const MaxPiece = 16 << 10

// maxRecord is more than a record's length.
const maxRecord = MaxPiece + 100

// Lines turns one stream's bytes into records:
//
//	2026-11-21T02:43:21.123456789Z stdout F a whole line
//	2026-11-21T02:43:21.123456789Z stdout P a piece of a line
//
// An incomplete last line waits in Rest for its end. Lines is used by one
// goroutine.
type Lines struct {
	Stream string // stdout or stderr
	Rest   []byte // at most MaxPiece
}

// Append appends the records that chunk completes to dst.
func (l *Lines) Append(dst, chunk []byte, now time.Time) []byte {
	var prefix [64]byte
	stamp := append(now.UTC().AppendFormat(prefix[:0], time.RFC3339Nano), ' ')
	stamp = append(append(stamp, l.Stream...), ' ')
	for len(chunk) > 0 {
		end := bytes.IndexByte(chunk, '\n')
		room := MaxPiece - len(l.Rest)
		switch {
		case end >= 0 && end <= room:
			dst = l.record(dst, stamp, 'F', chunk[:end])
			chunk = chunk[end+1:]
		case end < 0 && len(chunk) <= room:
			l.Rest = append(l.Rest, chunk...)
			return dst
		default:
			dst = l.record(dst, stamp, 'P', chunk[:room])
			chunk = chunk[room:]
		}
	}
	return dst
}

// Flush appends what is left at the end of the stream. It is tagged P: the line
// never got its newline, and a reader that joins the pieces gets the exact bytes.
func (l *Lines) Flush(dst []byte, now time.Time) []byte {
	if len(l.Rest) == 0 {
		return dst
	}
	stamp := append(now.UTC().AppendFormat(nil, time.RFC3339Nano), ' ')
	stamp = append(append(stamp, l.Stream...), ' ')
	return l.record(dst, stamp, 'P', nil)
}

// record appends one record of the rest and piece, and lets go of the rest's
// memory: most streams are idle most of the time.
func (l *Lines) record(dst, stamp []byte, tag byte, piece []byte) []byte {
	dst = append(dst, stamp...)
	dst = append(dst, tag, ' ')
	dst = append(dst, l.Rest...)
	dst = append(dst, piece...)
	l.Rest = nil
	return append(dst, '\n')
}
