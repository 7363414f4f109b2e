package stdio

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/crilog"
)

// BenchmarkFlood is one stream through the journal into a log: what podmon can take in
// from a writer that does nothing but write.
func BenchmarkFlood(b *testing.B) {
	dir := b.TempDir()
	journal, err := NewJournal(filepath.Join(dir, "journal"))
	if err != nil {
		b.Fatal(err)
	}
	log, err := crilog.Open(dir, "log")
	if err != nil {
		b.Fatal(err)
	}
	var ends [2]int
	if err := unix.Pipe2(ends[:], unix.O_CLOEXEC); err != nil {
		b.Fatal(err)
	}
	if err := unix.SetNonblock(ends[0], true); err != nil {
		b.Fatal(err)
	}
	r, w := os.NewFile(uintptr(ends[0]), "read end"), os.NewFile(uintptr(ends[1]), "write end")
	line := append(bytes.Repeat([]byte("x"), 7999), '\n')
	const lines = 8
	chunk := bytes.Repeat(line, lines)
	b.SetBytes(int64(len(chunk)))
	o := New("flood", dir, journal, log)
	o.Add("stdout", r, false)
	o.Read()
	b.ResetTimer()
	for i := range b.N {
		for part := range slices.Chunk(chunk, 4096) { // as stdio(3) does
			if _, err := w.Write(part); err != nil {
				b.Fatal(err)
			}
		}
		if i%4096 == 4095 { // as a rotation does: the disk does not fill
			b.StopTimer()
			_ = os.Truncate(filepath.Join(dir, "log"), 0)
			b.StartTimer()
		}
	}
	w.Close()
	if err := o.Drain(time.Minute); err != nil {
		b.Fatal(err)
	}
}
