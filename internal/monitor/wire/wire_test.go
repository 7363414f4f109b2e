package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func pair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	conns := [2]*net.UnixConn{}
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "pair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
		t.Cleanup(func() { c.Close() })
	}
	return conns[0], conns[1]
}

func open(t testing.TB) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestDescriptorsTravel(t *testing.T) {
	a, b := pair(t)
	from, to := &Conn{c: a}, &Conn{c: b}
	before := open(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("x", 1<<20) // more than the socket's buffer
	m := &Message{ID: 7, Op: OpExec}
	if m.Body, err = Encode(big); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Attach(FileStdin, r), m.Attach(FileStdout, w), m.Attach(FileStderr, nil), m.AttachFd(FilePidfd, -1)); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = from.Send(m)
		_ = from.Send(&Message{ID: 8})
	}()
	got, err := to.Receive()
	if err != nil {
		t.Fatal(err)
	}
	var body string
	if err := Decode(got.Body, &body); err != nil || body != big || got.ID != 7 || got.Op != OpExec {
		t.Errorf("got %d %s, %d bytes, %v", got.ID, got.Op, len(body), err)
	}
	if got.File(FileStderr) != nil || got.Fd(FilePidfd) != -1 {
		t.Error("descriptors that were not sent")
	}
	out := got.File(FileStdout)
	flags, err := unix.FcntlInt(out.Fd(), unix.F_GETFD, 0)
	if err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor flags %x, %v", flags, err)
	}
	if _, err := out.WriteString("through"); err != nil {
		t.Fatal(err)
	}
	in := got.File(FileStdin)
	buf := make([]byte, 7)
	if _, err := io.ReadFull(in, buf); err != nil || string(buf) != "through" {
		t.Errorf("%q, %v", buf, err)
	}
	if next, err := to.Receive(); err != nil || next.ID != 8 {
		t.Errorf("next message: %+v, %v", next, err)
	}
	m.Close()
	got.Close()
	for _, f := range []*os.File{r, w, in, out} {
		f.Close()
	}
	if after := open(t); after != before {
		t.Errorf("%d descriptors open, before %d", after, before)
	}
}

func TestSendLimits(t *testing.T) {
	a, _ := pair(t)
	c := &Conn{c: a}
	body, err := Encode(strings.Repeat("x", MaxFrame))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Send(&Message{Body: body}); ToError(err) == nil || ToError(err).Class != ClassInvalid {
		t.Errorf("oversized: %v", err)
	}
}

func header(length uint32, nfds, mark uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, length)
	b = binary.BigEndian.AppendUint16(b, nfds)
	return binary.BigEndian.AppendUint16(b, mark)
}

// FuzzReceive sends garbage: an error, never a panic, and no descriptor stays open.
func FuzzReceive(f *testing.F) {
	f.Add([]byte(nil))
	f.Add([]byte("short"))
	f.Add(append(header(2, 0, magic), "{}"...))
	f.Add(append(header(2, 1, magic), "{}"...))
	f.Add(append(header(2, 0, 0), "{}"...))
	f.Add(append(header(MaxFrame+1, 0, magic), "{}"...))
	f.Add(append(header(1<<31, 0, magic), "{}"...))
	f.Add(append(header(20, 0, magic), `{"names":["a","b"]}`...))
	f.Add(append(header(8, 0, magic), `{"id":-1`...))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, b := pair(t)
		go func() {
			oob := unix.UnixRights(0)
			if len(data) > 0 {
				_, _, _ = a.WriteMsgUnix(data, oob, nil)
			}
			a.Close()
		}()
		c := &Conn{c: b}
		for {
			m, err := c.Receive()
			if err != nil {
				return
			}
			m.Close()
		}
	})
}

func TestErrorsKeepTheirClass(t *testing.T) {
	err := Errorf(ClassNoExecutable, "start: %w", io.EOF)
	e := ToError(errors.Join(errors.New("outer"), err))
	if e.Class != ClassNoExecutable || !strings.Contains(e.Message, "outer") || !strings.Contains(e.Message, "start: EOF") {
		t.Errorf("%+v", e)
	}
	if ToError(nil) != nil || ToError(io.EOF).Class != "" {
		t.Error("a class from nowhere")
	}
}

func TestProcess(t *testing.T) {
	p, err := Identify(os.Getpid())
	if err != nil || !p.Exists() || !p.Alive() {
		t.Fatalf("%+v, %v", p, err)
	}
	other := p
	other.StartTime++
	if other.Exists() || other.Alive() {
		t.Error("another start time is the same process")
	}
	began, err := p.StartedAt()
	if err != nil || began.IsZero() {
		t.Error(began, err)
	}
	if bytes.Contains([]byte(began.String()), []byte("0001-")) {
		t.Error(began)
	}
}
