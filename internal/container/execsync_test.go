package container

import (
	"bytes"
	"testing"
)

// What is kept of a command's output is the beginning of it, up to the limit, and
// takes no more memory for being written in single bytes.
func TestOutputIsKeptUpToTheLimit(t *testing.T) {
	const limit = 3*partSize + 5
	text := bytes.Repeat([]byte("0123456789abcdef!"), limit/10)
	for _, size := range []int{1, 7, partSize, partSize + 1, len(text)} {
		s := &stream{c: &collector{limit: limit}}
		for rest := text; len(rest) > 0; {
			n := min(size, len(rest))
			if wrote, err := s.Write(rest[:n]); wrote != n || err != nil {
				t.Fatalf("wrote %d of %d bytes, %v", wrote, n, err)
			}
			rest = rest[n:]
		}
		if got := bytes.Join(s.parts, nil); !bytes.Equal(got, text[:limit]) {
			t.Errorf("writes of %d bytes: %d bytes are kept, not the first %d", size, len(got), limit)
		}
		held := 0
		for _, part := range s.parts {
			held += cap(part)
		}
		if len(s.parts) > 4 || held > 2*limit {
			t.Errorf("writes of %d bytes: %d bytes of memory in %d parts for %d", size, held, len(s.parts), limit)
		}
	}
}
