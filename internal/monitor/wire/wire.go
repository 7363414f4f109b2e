// Package wire is the protocol between the daemon and podmon.
//
// One unix stream socket per podmon, in a directory only root can enter; both
// ends check with SO_PEERCRED that the other one is root. Every message is a
// frame:
//
//	0        4        6        8                8+length
//	+--------+--------+--------+----------------+
//	| length | nfds   | magic  | JSON (Message) |    integers are big-endian
//	+--------+--------+--------+----------------+
//	  ^ SCM_RIGHTS with nfds descriptors rides on the header's first byte
//
// Requests carry an ID chosen by the daemon; the answer repeats it. Many
// requests are in flight at once and answers come in any order. Events have
// ID 0. A session, drawn for one container:
//
//	daemon                                   podmon
//	  | 1 hello                             ->  |
//	  |  <-                 1 Hello{containers} |
//	  | 2 start StartRequest                ->  |
//	  |  <-  2 Process + pidfd,stdout,stderr..  |
//	  | 3 exec ExecRequest + stdin,stdout.. ->  |
//	  |  <-            3 ExecStarted + console  |
//	  | 4 exec-wait ExecRef                 ->  |
//	  | 5 attach Ref + stdout,stderr        ->  |
//	  |  <-                         5 Attached  |
//	  | 6 attach-wait Attached              ->  |   (4 and 6 stay open)
//	  |  <-                             4 Exit  |
//	  | 6 cancel                            ->  |
//	  |  <-                             6 {}    |
//	  |  <-                 0 exit Event        |
//	  | 7 delete Ref                        ->  |
//	  |  <-                           7 Status  |
//
// What a connection started dies with it where it has no life of its own:
// execs are killed, attachments end. Containers stay.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Version is the protocol's; it changes when an old daemon could misread a new
// podmon or the other way round.
const Version = 1

const (
	// MaxFrame limits a message's JSON. CRI requests are limited to 16 MiB by
	// gRPC, and a spec is about as large as the request it comes from.
	MaxFrame = 16 << 20
	// MaxFiles is the most descriptors a message carries.
	MaxFiles = 8

	// sendLimit is how long the other end may take nothing in before it counts
	// as dead.
	sendLimit = 30 * time.Second

	headerSize = 8
	magic      = 0x706d // "pm"
)

// Operations of a request, and the one event.
const (
	OpHello      = "hello"       // {} -> Hello
	OpPing       = "ping"        // {} -> {}
	OpStart      = "start"       // StartRequest -> Process + files
	OpHandles    = "handles"     // Ref -> {} + files as start gave them
	OpSignal     = "signal"      // Signal -> {}
	OpDelete     = "delete"      // Ref -> Status with its exit; {} when there was nothing
	OpExec       = "exec"        // ExecRequest + files -> ExecStarted + console
	OpExecWait   = "exec-wait"   // ExecRef -> Exit, when it has ended
	OpExecKill   = "exec-kill"   // ExecRef -> {}
	OpAttach     = "attach"      // Ref + files -> Attached
	OpAttachWait = "attach-wait" // Attached -> {}, when it has ended; cancel ends it
	OpCloseStdin = "close-stdin" // Ref -> {}
	OpReopenLog  = "reopen-log"  // Ref -> {}
	OpUpdate     = "update"      // Update -> {}
	OpRelease    = "release"     // Ref -> {}: stop reading, forget; the container runs on
	OpAdopt      = "adopt"       // Ref + files -> Status: take over what another podmon held
	OpRetire     = "retire"      // {} -> {}: end once nothing is held any more
	OpCancel     = "cancel"      // ends the request with this ID early; has no answer

	EventExit = "exit" // Event
)

// Classes of errors, mapped to errdefs by the daemon.
const (
	ClassNotFound      = "not-found"
	ClassInvalid       = "invalid"
	ClassExists        = "exists"
	ClassPrecondition  = "precondition"
	ClassUnavailable   = "unavailable"
	ClassCutOff        = "cut-off"        // an attached reader that was too slow, or has gone
	ClassNoExecutable  = "no-executable"  // 127 in a shell
	ClassNotExecutable = "not-executable" // 126 in a shell
)

// Error is a failure that crosses the wire. An empty class is an unclassed error.
type Error struct {
	Class   string `json:"class,omitempty"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// Errorf makes an Error of a class.
func Errorf(class, format string, args ...any) error {
	return &Error{class, fmt.Errorf(format, args...).Error()}
}

// ToError keeps the class of err if it has one anywhere in its chain.
func ToError(err error) *Error {
	if err == nil {
		return nil
	}
	e := &Error{Message: err.Error()}
	var classed *Error
	if errors.As(err, &classed) {
		e.Class = classed.Class
	}
	return e
}

// Message is the JSON of a frame.
type Message struct {
	ID uint64 `json:"id,omitempty"`
	// Op is set in requests and events, empty in answers.
	Op    string          `json:"op,omitempty"`
	Body  json.RawMessage `json:"body,omitempty"`
	Error *Error          `json:"error,omitempty"`
	// Names says what each of the descriptors is.
	Names []string `json:"names,omitempty"`
	// Truncated tells that descriptors were lost on the way, because the receiver
	// may not open more. The others are closed.
	Truncated bool `json:"-"`
	// fds belong to the message. They are plain numbers, because an os.File of a
	// pipe wakes its process for every byte that somebody else is to read.
	fds []int
}

// File takes the descriptor of that name out of the message; nil when there is none.
func (m *Message) File(name string) *os.File {
	fd := m.Fd(name)
	if fd < 0 {
		return nil
	}
	return os.NewFile(uintptr(fd), name)
}

// Fd takes the descriptor of that name out of the message; -1 when there is none.
func (m *Message) Fd(name string) int {
	for i, n := range m.Names {
		if n == name && i < len(m.fds) {
			fd := m.fds[i]
			m.fds[i] = -1
			return fd
		}
	}
	return -1
}

// Attach adds a duplicate of f unless it is nil.
func (m *Message) Attach(name string, f *os.File) error {
	if f == nil {
		return nil
	}
	// Not File.Fd, which makes the file blocking for all its holders.
	raw, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("pass %s: %w", name, err)
	}
	cerr := raw.Control(func(fd uintptr) { err = m.AttachFd(name, int(fd)) })
	return errors.Join(cerr, err)
}

// AttachFd adds a duplicate of fd unless it is negative.
func (m *Message) AttachFd(name string, fd int) error {
	if fd < 0 {
		return nil
	}
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return fmt.Errorf("pass %s: %w", name, err)
	}
	m.Names = append(m.Names, name)
	m.fds = append(m.fds, dup)
	return nil
}

// Close closes every descriptor that nobody has taken.
func (m *Message) Close() {
	for _, fd := range m.fds {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
	m.fds, m.Names = nil, nil
}

// Conn sends and receives messages. Send may be called by many goroutines,
// Receive by one.
type Conn struct {
	c *net.UnixConn

	mu sync.Mutex // holds a frame together on the socket
}

// NewConn wraps a connection whose other end must be root.
func NewConn(c *net.UnixConn) (*Conn, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("peer credentials: %w", err)
	}
	var cred *unix.Ucred
	cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(cerr, err); err != nil {
		return nil, fmt.Errorf("peer credentials: %w", err)
	}
	if cred.Uid != 0 {
		return nil, fmt.Errorf("peer has uid %d, not root", cred.Uid)
	}
	return &Conn{c: c}, nil
}

// Close ends the connection; a blocked Receive returns.
func (c *Conn) Close() error { return c.c.Close() }

// Send writes one message, which keeps its descriptors until it is closed. After
// an error without a class the connection is of no use any more.
func (c *Conn) Send(m *Message) error {
	body, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode %s: %w", m.Op, err)
	}
	if len(body) > MaxFrame {
		return Errorf(ClassInvalid, "message of %d bytes is larger than %d", len(body), MaxFrame)
	}
	if len(m.fds) > MaxFiles {
		return Errorf(ClassInvalid, "message with %d descriptors, at most %d", len(m.fds), MaxFiles)
	}
	frame := make([]byte, headerSize, headerSize+len(body))
	binary.BigEndian.PutUint32(frame, uint32(len(body)))
	binary.BigEndian.PutUint16(frame[4:], uint16(len(m.fds)))
	binary.BigEndian.PutUint16(frame[6:], magic)
	frame = append(frame, body...)
	var oob []byte
	if len(m.fds) > 0 {
		oob = unix.UnixRights(m.fds...)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.c.SetWriteDeadline(time.Now().Add(sendLimit)); err != nil {
		return err
	}
	n, _, err := c.c.WriteMsgUnix(frame, oob, nil)
	if err == nil && n < len(frame) {
		_, err = c.c.Write(frame[n:])
	}
	return err
}

// Receive returns the next message; the caller closes it.
func (c *Conn) Receive() (*Message, error) {
	var header [headerSize]byte
	oob := make([]byte, unix.CmsgSpace(4*MaxFiles))
	n, oobn, flags, _, err := c.c.ReadMsgUnix(header[:], oob)
	if err != nil {
		return nil, err
	}
	m := &Message{}
	ok := false
	defer func() {
		if !ok {
			m.Close()
		}
	}()
	if m.fds, err = parseRights(oob[:oobn]); err != nil {
		return nil, err
	}
	if n == 0 {
		return nil, io.EOF
	}
	truncated := flags&unix.MSG_CTRUNC != 0
	if _, err := io.ReadFull(c.c, header[n:]); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(header[:])
	switch {
	case binary.BigEndian.Uint16(header[6:]) != magic:
		return nil, errors.New("not a podmon frame")
	case size > MaxFrame:
		return nil, fmt.Errorf("frame of %d bytes is larger than %d", size, MaxFrame)
	case int(binary.BigEndian.Uint16(header[4:])) > MaxFiles:
		return nil, errors.New("more descriptors than a message may carry")
	case int(binary.BigEndian.Uint16(header[4:])) != len(m.fds) && !truncated:
		return nil, errors.New("descriptors are missing from a frame")
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(c.c, body); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(body, m); err != nil {
		return nil, fmt.Errorf("decode frame: %w", err)
	}
	if truncated {
		m.Close()
		m.Truncated = true
	}
	if len(m.Names) != len(m.fds) {
		return nil, errors.New("descriptors without names in a frame")
	}
	ok = true
	return m, nil
}

// parseRights returns the descriptors of a control message. Go's ReadMsgUnix asks
// for MSG_CMSG_CLOEXEC, so none can leak into a child.
func parseRights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	scms, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	var all []int
	for i := range scms {
		fds, err := syscall.ParseUnixRights(&scms[i])
		if err != nil {
			continue // credentials or the like
		}
		all = append(all, fds...)
	}
	return all, nil
}

// Encode makes a body of v.
func Encode(v any) (json.RawMessage, error) {
	if v == nil {
		return nil, nil
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("encode: %w", err)
	}
	return b, nil
}

// Decode reads a body into v.
func Decode(body json.RawMessage, v any) error {
	if err := json.Unmarshal(body, v); err != nil {
		return Errorf(ClassInvalid, "decode: %w", err)
	}
	return nil
}

// Address is a name for dir/sock that fits sockaddr_un whatever the length of
// dir: through a descriptor of the directory, which the caller closes after use.
func Address(dir string) (*net.UnixAddr, *os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, nil, err
	}
	name := fmt.Sprintf("/proc/self/fd/%d/sock", d.Fd())
	return &net.UnixAddr{Name: name, Net: "unix"}, d, nil
}
