package container

import (
	"bytes"
	"testing"

	"golang.org/x/sys/unix"
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

// When a command has ended, what it has left behind and writes on and on is not
// listened to: at most what the pipe held.
func TestDrainEnds(t *testing.T) {
	c := &collector{limit: 1 << 40}
	s, err := c.stream()
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	size, err := unix.FcntlInt(s.read.Fd(), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(int(s.read.Fd()), true); err != nil { // Fd has made it blocking
		t.Fatal(err)
	}
	chunk := make([]byte, size)
	if _, err := s.write.Write(chunk); err != nil {
		t.Fatal(err)
	}
	for range 8 {
		go func() {
			for {
				if _, err := s.write.Write(chunk); err != nil {
					return
				}
			}
		}()
	}
	s.drain()
	if taken := c.taken.Load(); taken != int64(size) {
		t.Errorf("%d bytes are read of a pipe of %d", taken, size)
	}
}
