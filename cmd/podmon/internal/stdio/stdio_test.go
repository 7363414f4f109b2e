package stdio

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/crilog"
)

// bench is a container's output on files of its own.
type bench struct {
	t       *testing.T
	dir     string
	journal *Journal
	w       *os.File
	r       *os.File
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, dir: t.TempDir()}
	var err error
	if b.journal, err = NewJournal(filepath.Join(b.dir, "journal")); err != nil {
		t.Fatal(err)
	}
	if b.r, b.w, err = os.Pipe(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.w.Close(); b.r.Close() })
	return b
}

// output is a podmon's reader of the pipe.
func (b *bench) output() *Output {
	b.t.Helper()
	log, err := crilog.Open(b.dir, "log")
	if err != nil {
		b.t.Fatal(err)
	}
	fd, err := unix.FcntlInt(b.r.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		b.t.Fatal(err)
	}
	o := New("c", b.dir, b.journal, log)
	o.Add("stdout", os.NewFile(uintptr(fd), "stdout"), false)
	return o
}

// logged is the log without its timestamps.
func (b *bench) logged() string {
	raw, err := os.ReadFile(filepath.Join(b.dir, "log"))
	if err != nil {
		b.t.Fatal(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(raw)) {
		_, rest, _ := strings.Cut(line, " ")
		out.WriteString(rest)
	}
	return out.String()
}

func (b *bench) write(s string) {
	b.t.Helper()
	if _, err := b.w.WriteString(s); err != nil {
		b.t.Fatal(err)
	}
}

func TestDrainToTheEnd(t *testing.T) {
	b := newBench(t)
	o := b.output()
	o.Read()
	want := ""
	for range 20000 {
		b.write("line\n")
		want += "stdout F line\n"
	}
	b.write("half")
	b.w.Close()
	if err := o.Drain(time.Minute); err != nil {
		t.Fatal(err)
	}
	if got := b.logged(); got != want+"stdout P half\n" {
		t.Errorf("log of %d bytes, want %d", len(got), len(want))
	}
}

// A write end that never closes must not hold up a container's end.
func TestDrainGivesUp(t *testing.T) {
	b := newBench(t)
	o := b.output()
	o.Read()
	b.write("line\nhalf")
	b.await("line")
	began := time.Now()
	if err := o.Drain(20 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("drained for %v", took)
	}
	if got := b.logged(); got != "stdout F line\nstdout P half\n" {
		t.Errorf("log %q", got)
	}
}

// await waits until the reader has taken everything out of the pipe and written
// text to the log.
func (b *bench) await(text string) {
	b.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		n, err := unix.IoctlGetInt(int(b.r.Fd()), unix.TIOCINQ)
		if err == nil && n == 0 && strings.Contains(b.logged(), text) {
			return
		}
	}
	b.t.Fatalf("%q does not come", text)
}

// What one podmon has begun another one finishes.
func TestRelease(t *testing.T) {
	b := newBench(t)
	first := b.output()
	first.Read()
	b.write("one\nha")
	b.await("one")
	if err := first.Release(); err != nil {
		t.Fatal(err)
	}
	b.write("lf\ntwo\n")
	second := b.output()
	if err := second.Resume(filepath.Join(b.dir, "none")); err != nil {
		t.Fatal(err)
	}
	second.Read()
	b.w.Close()
	if err := second.Drain(time.Minute); err != nil {
		t.Fatal(err)
	}
	if got := b.logged(); got != "stdout F one\nstdout F half\nstdout F two\n" {
		t.Errorf("log %q", got)
	}
}

// A podmon that was killed has left a chunk in each possible state.
func TestResumeFromJournal(t *testing.T) {
	const torn = "2026-11-21T02:43:21Z stdout F to"
	for name, tc := range map[string]struct {
		leave func(b *bench, s *slot)
		want  string
	}{
		"reading, still in the pipe": {func(b *bench, s *slot) {
			b.write("ha")
			b.expect(s, 2)
		}, ""},
		"reading, taken out": {func(b *bench, s *slot) {
			b.take(s, "a\nb\nha")
		}, "stdout F a\nstdout F b\n"},
		"read": {func(b *bench, s *slot) {
			b.take(s, "a\nb\nha")
			s.setState(slotRead)
		}, "stdout F a\nstdout F b\n"},
		"writing, not begun": {func(b *bench, s *slot) {
			b.take(s, "a\nb\nha")
			s.writing(b.stat())
		}, "stdout F a\nstdout F b\n"},
		"writing, torn": {func(b *bench, s *slot) {
			b.take(s, "a\nb\nha")
			s.writing(b.stat())
			b.append(torn)
		}, "stdout F a\nstdout F b\n"},
		"written": {func(b *bench, s *slot) {
			b.take(s, "a\nb\nha")
			s.writing(b.stat())
			b.append("2026-11-21T02:43:21Z stdout F a\n2026-11-21T02:43:21Z stdout F b\n")
			s.setState(slotWritten)
		}, "stdout F a\nstdout F b\n"},
		"written, rest saved": {func(b *bench, s *slot) {
			b.take(s, "a\nb\nha")
			b.append("2026-11-21T02:43:21Z stdout F a\n2026-11-21T02:43:21Z stdout F b\n")
			s.setState(slotWritten)
			r := restFile{path: filepath.Join(b.dir, "stdout.rest")}
			r.save(s.seq(), []byte("ha"))
		}, "stdout F a\nstdout F b\n"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.append("2026-11-21T02:43:21Z stdout F before\n")
			other := b.journal.get("another", "stdout")
			b.take(other, "alien\n")
			other.setState(slotRead)
			tc.leave(b, b.journal.get("c", "stdout"))

			o := b.output()
			if err := o.Resume(filepath.Join(b.dir, "journal")); err != nil {
				t.Fatal(err)
			}
			o.Read()
			b.write("lf\n")
			b.w.Close()
			if err := o.Drain(time.Minute); err != nil {
				t.Fatal(err)
			}
			if got, want := b.logged(), "stdout F before\n"+tc.want+"stdout F half\n"; got != want {
				t.Errorf("log %q, want %q", got, want)
			}
		})
	}
}

// expect prepares the slot for reading n bytes that the pipe holds.
func (b *bench) expect(s *slot, n int) {
	b.t.Helper()
	if err := s.expect(int(b.r.Fd()), n); err != nil {
		b.t.Fatal(err)
	}
}

// take reads what is written through the pipe, up to before the note that it has
// been read.
func (b *bench) take(s *slot, written string) {
	b.t.Helper()
	b.write(written)
	b.expect(s, len(written))
	if n, err := unix.Read(int(b.r.Fd()), s.data()); n != len(written) || err != nil {
		b.t.Fatalf("read %d bytes: %v", n, err)
	}
}

// Whether output has been taken out of the pipe is known whatever it looks like, be
// it a single byte.
func TestSentinelIsNeverOutput(t *testing.T) {
	b := newBench(t)
	s := b.journal.get("c", "stdout")
	for length := range 2 * sentinelSize {
		for value := range 256 << max(0, 4-length) { // what is possible by chance happens
			b.write(strings.Repeat(string([]byte{byte(value)}), length+1))
			b.expect(s, length+1)
			if s.arrived() {
				t.Fatalf("%d bytes of %#x have arrived before they were read", length+1, value)
			}
			if n, err := unix.Read(int(b.r.Fd()), s.data()); n != length+1 || err != nil {
				t.Fatalf("read %d bytes: %v", n, err)
			}
			if !s.arrived() {
				t.Fatalf("%d bytes of %#x have not arrived when they were read", length+1, value)
			}
		}
	}
}

// A container that reads its own output, as by /proc/1/fd/1, gets what it reads and
// no more: the rest is in the log, and reading goes on.
func TestContainerReadsItsOwnOutput(t *testing.T) {
	b := newBench(t)
	s := b.journal.get("c", "stdout")
	fd := int(b.r.Fd())
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	if err := s.expect(fd, 3); err != unix.EAGAIN {
		t.Errorf("of an empty pipe: %v, not EAGAIN", err)
	}
	b.write("ab")
	b.expect(s, 3)
	if len(s.data()) != 2 || s.arrived() {
		t.Errorf("%d bytes are awaited of a pipe that holds 2", len(s.data()))
	}
	if n, err := unix.Read(fd, s.data()); n != 2 || err != nil || !s.arrived() {
		t.Errorf("read %d bytes, %v", n, err)
	}

	o := b.output()
	o.Read()
	stop, stopped := make(chan struct{}), make(chan int)
	go func() {
		taken := 0
		for one := make([]byte, 1); ; {
			select {
			case <-stop:
				stopped <- taken
				return
			default:
			}
			if n, err := unix.Read(fd, one); err == nil {
				taken += n
			}
		}
	}()
	for range 20000 {
		b.write("x")
	}
	close(stop)
	t.Logf("%d of 20000 bytes were taken", <-stopped)
	b.write("\nthe end\n")
	b.await("the end")
	b.w.Close()
	if err := o.Drain(time.Minute); err != nil {
		t.Fatal(err)
	}
}

// kubelet rotates the log while podmon is dead: what it has written half is taken
// back where it is, and nothing is written twice.
func TestResumeAfterRotation(t *testing.T) {
	b := newBench(t)
	b.append("2026-11-21T02:43:21Z stdout F before\n")
	s := b.journal.get("c", "stdout")
	b.take(s, "a\nb\n")
	s.writing(b.stat())
	b.append("2026-11-21T02:43:21Z stdout F a\n2026-11-21T02:43:21Z stdo")
	rotated := filepath.Join(b.dir, "log.20261121-024321")
	if err := os.Rename(filepath.Join(b.dir, "log"), rotated); err != nil {
		t.Fatal(err)
	}
	o := b.output()
	if err := o.Resume(filepath.Join(b.dir, "journal")); err != nil {
		t.Fatal(err)
	}
	o.Read()
	b.w.Close()
	if err := o.Drain(time.Minute); err != nil {
		t.Fatal(err)
	}
	if old, err := os.ReadFile(rotated); err != nil || string(old) != "2026-11-21T02:43:21Z stdout F before\n" {
		t.Errorf("rotated log %q, %v", old, err)
	}
	if got := b.logged(); got != "stdout F a\nstdout F b\n" {
		t.Errorf("log %q", got)
	}
}

func (b *bench) append(s string) {
	b.t.Helper()
	f, err := os.OpenFile(filepath.Join(b.dir, "log"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString(s); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) stat() unix.Stat_t {
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(b.dir, "log"), &st); err != nil {
		b.t.Fatal(err)
	}
	return st
}

// Slots that are not used at the moment give their memory back.
func TestJournalShrinks(t *testing.T) {
	b := newBench(t)
	var slots []*slot
	for range 50 {
		slots = append(slots, b.journal.get("c", "stdout"))
	}
	for _, s := range slots {
		b.journal.put(s)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(b.dir, "journal"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Blocks*512 > keepSlots*slotSize+64<<10 {
		t.Errorf("journal keeps %d bytes", st.Blocks*512)
	}
	for range 50 {
		s := b.journal.get("c", "stdout")
		if s.index < 0 || s.index >= 50 {
			t.Fatalf("slot %d", s.index)
		}
		s.mem[slotSize-1] = 1
	}
}
