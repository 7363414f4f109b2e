package crilog

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

var when = time.Date(2026, 11, 21, 2, 43, 21, 123456789, time.UTC)

const stamp = "2026-11-21T02:43:21.123456789Z stdout "

func TestLines(t *testing.T) {
	full := strings.Repeat("x", MaxPiece)
	for name, tc := range map[string]struct {
		chunks []string
		want   []string
	}{
		"line":               {[]string{"a\n"}, []string{"F a"}},
		"empty":              {[]string{"\n\n"}, []string{"F ", "F "}},
		"across chunks":      {[]string{"a", "b", "c\nd\n"}, []string{"F abc", "F d"}},
		"no end":             {[]string{"a\nb"}, []string{"F a", "P b"}},
		"one piece":          {[]string{full + "\n"}, []string{"F " + full}},
		"one piece, split":   {[]string{full, "\n"}, []string{"F " + full}},
		"two pieces":         {[]string{full + "y\n"}, []string{"P " + full, "F y"}},
		"two pieces, split":  {[]string{full[:9], full[9:] + "y", "z\n"}, []string{"P " + full, "F yz"}},
		"two pieces, no end": {[]string{full + "y"}, []string{"P " + full, "P y"}},
		"binary":             {[]string{"\x00\xff\r\n"}, []string{"F \x00\xff\r"}},
	} {
		t.Run(name, func(t *testing.T) {
			l := Lines{Stream: "stdout"}
			var got []byte
			for _, c := range tc.chunks {
				got = l.Append(got, []byte(c), when)
			}
			got = l.Flush(got, when)
			want := ""
			for _, w := range tc.want {
				want += stamp + w + "\n"
			}
			if string(got) != want {
				t.Errorf("%.100q\nwant %.100q", got, want)
			}
			if len(l.Rest) != 0 {
				t.Errorf("rest %q", l.Rest)
			}
		})
	}
}

// join is what a reader of CRI logs does.
func join(t *testing.T, log []byte) []byte {
	var out []byte
	for line := range bytes.Lines(log) {
		rest, ok := bytes.CutPrefix(line, []byte(stamp))
		if !ok || len(rest) < 3 || len(rest) > MaxPiece+3 || rest[1] != ' ' {
			t.Fatalf("record %.100q", line)
		}
		switch rest[0] {
		case 'P':
			out = append(out, rest[2:len(rest)-1]...)
		case 'F':
			out = append(out, rest[2:]...)
		default:
			t.Fatalf("tag %q", rest[0])
		}
	}
	return out
}

// Whatever is written in whatever pieces, a reader gets the same bytes.
func FuzzLines(f *testing.F) {
	f.Add([]byte("a\nb\n\nc"), uint16(2))
	f.Add(bytes.Repeat([]byte("x"), 2*MaxPiece), uint16(MaxPiece))
	f.Add(append(bytes.Repeat([]byte("x"), MaxPiece), '\n'), uint16(MaxPiece-1))
	f.Fuzz(func(t *testing.T, data []byte, size uint16) {
		l := Lines{Stream: "stdout"}
		var log []byte
		for rest := data; len(rest) > 0; {
			n := min(len(rest), int(size)+1)
			log = l.Append(log, rest[:n], when)
			rest = rest[n:]
			if len(l.Rest) > MaxPiece {
				t.Fatalf("rest of %d bytes", len(l.Rest))
			}
		}
		if got := join(t, l.Flush(log, when)); !bytes.Equal(got, data) {
			t.Errorf("%q became %q", data, got)
		}
	})
}

func TestOpenStaysBeneath(t *testing.T) {
	root, outside := t.TempDir(), t.TempDir()
	for link, to := range map[string]string{"dir": outside, "file": outside + "/file", "dangling": outside + "/new", "up": ".."} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(root, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(root, "real"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{
		"", ".", "..", "../x", "a/../../x", "/etc/x", "dir/x", "file", "dangling", "up/x", "fifo", "real", "fifo/x",
	} {
		if l, err := Open(root, path); err == nil {
			l.Close()
			t.Errorf("%q was opened", path)
		}
	}
	if left, _ := os.ReadDir(outside); len(left) > 0 {
		t.Errorf("made outside: %v", left)
	}
	l, err := Open(root, "new/deep/0.log")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	st, err := os.Stat(filepath.Join(root, "new/deep/0.log"))
	if err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
}

// What a full disk swallows is counted, and no torn record stays.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	root := t.TempDir()
	if err := unix.Mount("tmpfs", root, "tmpfs", 0, "size=16k"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(root, unix.MNT_DETACH)
	l, err := Open(root, "log")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	record := []byte(stamp + "F " + strings.Repeat("x", 3000) + "\n")
	for range 10 {
		l.Write(record, nil)
	}
	path := filepath.Join(root, "log")
	b, err := os.ReadFile(path)
	if err != nil || len(b)%len(record) != 0 || len(b) == 0 {
		t.Fatalf("%d bytes are not whole records: %v", len(b), err)
	}
	written := len(b) / len(record)
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path+".1", 0); err != nil {
		t.Fatal(err)
	}
	if err := l.Reopen(); err != nil {
		t.Fatal(err)
	}
	l.Write(record, nil)
	b, err = os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	note, rest, _ := bytes.Cut(b, []byte("\n"))
	lost := []byte("stderr F [podmon: " + strconv.Itoa((10-written)*len(record)) + " bytes of log records were lost here: ")
	if !bytes.Contains(note, lost) || !bytes.Contains(note, []byte("no space left on device")) {
		t.Errorf("note %q", note)
	}
	if !bytes.Equal(rest, record) {
		t.Errorf("after the note: %.100q", rest)
	}
	for range 10 {
		l.Write(record, nil)
	}
	err = l.Close()
	if b, rerr := os.ReadFile(path); rerr != nil || bytes.Count(b, []byte("were lost here")) != 2 && err == nil {
		t.Errorf("a log that has lost records is closed without a word of it: %v, %v", err, rerr)
	}
	if err := errors.Join(l.Close(), l.Close()); err != nil {
		t.Error(err)
	}
	l.Write(record, nil) // dropped
}

// A record that was written in part is taken back, and nothing else is.
func TestMend(t *testing.T) {
	whole := stamp + "F whole\n"
	for content, want := range map[string]string{
		"": "", whole: whole, whole + stamp: whole, whole + "2": whole, stamp + "P x": "",
		whole + strings.Repeat("x", 2*maxRecord): whole + strings.Repeat("x", 2*maxRecord),
	} {
		path := filepath.Join(t.TempDir(), "log")
		if err := os.WriteFile(path, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
		l, err := Open(filepath.Dir(path), "log")
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(l.Mend(), l.Close()); err != nil {
			t.Error(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("%.100q is mended to %.100q, want %.100q", content, got, want)
		}
	}
}

// A log that cannot be opened swallows nothing in silence, and is opened once it can be.
func TestAwait(t *testing.T) {
	root := filepath.Join(t.TempDir(), "gone")
	_, why := Open(root, "log")
	if why == nil {
		t.Fatal("a log is open in a directory that is not there")
	}
	l := Await(root, "log", why)
	l.tried = time.Time{}
	record := []byte(stamp + "F lost\n")
	l.Write(record, nil)
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	l.tried = time.Time{}
	l.Write([]byte(stamp+"F written\n"), nil)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(filepath.Join(root, "log"))
	note, rest, _ := strings.Cut(string(b), "\n")
	if err != nil || rest != stamp+"F written\n" || !strings.Contains(note, fmt.Sprintf("%d bytes of log records were lost here", len(record))) {
		t.Errorf("%q, %v", b, err)
	}
}

// A device that was planted as the log is refused without opening it.
func TestDeviceIsNotOpened(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	root := t.TempDir()
	// No driver has it, so that opening it would be ENXIO.
	if err := unix.Mknod(filepath.Join(root, "log"), unix.S_IFCHR|0o600, int(unix.Mkdev(4000, 77))); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(root, "log"); err == nil || errors.Is(err, unix.ENXIO) {
		t.Errorf("open: %v", err)
	}
}
