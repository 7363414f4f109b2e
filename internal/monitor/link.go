package monitor

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// errLost is the error of requests whose podmon went away before it answered.
// Whether they were carried out is not known.
var errLost = fmt.Errorf("podmon is gone: %w", errdefs.ErrUnavailable)

// link is the connection to one podmon. It ends once, for good: a podmon that
// comes back is a new one.
type link struct {
	name string // instance, the name of its directory in RunDir/podmon
	dir  string
	conn *wire.Conn
	wire.Hello
	pidfd int       // of the podmon
	cmd   *exec.Cmd // when it is our child

	onExit func(*link, Event)

	mu      sync.Mutex
	last    uint64
	pending map[uint64]chan *wire.Message
	dead    bool

	lost   chan struct{} // closed when dead
	killed chan struct{} // closed when the podmon is known to be dead as well
	work   sync.WaitGroup
}

// dial connects to the podmon that listens in dir. Its exits go to onExit, which
// may be called before dial returns and must not block.
func dial(ctx context.Context, name, dir string, onExit func(*link, Event)) (_ *link, err error) {
	addr, d, err := wire.Address(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	c, err := net.DialUnix("unix", nil, addr)
	if err != nil {
		return nil, err
	}
	conn, err := wire.NewConn(c)
	if err != nil {
		c.Close()
		return nil, err
	}
	l := &link{
		name: name, dir: dir, conn: conn, pidfd: -1, onExit: onExit,
		pending: map[uint64]chan *wire.Message{}, lost: make(chan struct{}), killed: make(chan struct{}),
	}
	l.work.Go(l.receive)
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	if err := l.request(ctx, wire.OpHello, struct{}{}, &l.Hello); err != nil {
		return nil, fmt.Errorf("greet podmon: %w", err)
	}
	if l.Version != wire.Version {
		return nil, fmt.Errorf("podmon speaks version %d, not %d: %w", l.Version, wire.Version, errdefs.ErrFailedPrecondition)
	}
	if l.pidfd, err = unix.PidfdOpen(l.Process.PID, 0); err != nil {
		return nil, fmt.Errorf("pidfd of podmon: %w", err)
	}
	if !l.Process.Exists() {
		return nil, errLost
	}
	return l, nil
}

// receive hands answers to those who wait for them.
func (l *link) receive() {
	defer l.fail()
	for {
		m, err := l.conn.Receive()
		if err != nil {
			return
		}
		if m.ID == 0 {
			l.event(m)
			continue
		}
		l.mu.Lock()
		waiter := l.pending[m.ID]
		delete(l.pending, m.ID)
		l.mu.Unlock()
		if waiter == nil {
			m.Close() // whoever asked has gone
			continue
		}
		waiter <- m
	}
}

func (l *link) event(m *wire.Message) {
	defer m.Close()
	var e Event
	if m.Op == wire.EventExit && wire.Decode(m.Body, &e) == nil {
		l.onExit(l, e)
	}
}

// fail ends the link; every request in flight gets errLost.
func (l *link) fail() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return
	}
	l.dead = true
	l.conn.Close()
	close(l.lost)
}

// close ends the link and leaves podmon running.
func (l *link) close() {
	l.fail()
	l.work.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.pidfd >= 0 {
		unix.Close(l.pidfd)
		l.pidfd = -1
	}
}

// request sends body and decodes the answer into result, which may be nil.
func (l *link) request(ctx context.Context, op string, body, result any) error {
	m, err := l.call(ctx, op, body, nil)
	if err != nil {
		return err
	}
	defer m.Close()
	if result == nil || len(m.Body) == 0 {
		return nil
	}
	return wire.Decode(m.Body, result)
}

// call sends a request with the descriptors that attach adds to it, and returns
// the answer, which the caller closes. When ctx ends first, podmon is told.
func (l *link) call(ctx context.Context, op string, body any, attach func(*wire.Message) error) (*wire.Message, error) {
	raw, err := wire.Encode(body)
	if err != nil {
		return nil, err
	}
	m := &wire.Message{Op: op, Body: raw}
	if attach != nil {
		if err := attach(m); err != nil {
			m.Close()
			return nil, err
		}
	}
	answer := make(chan *wire.Message, 1)
	id, err := l.enlist(answer)
	if err != nil {
		m.Close()
		return nil, err
	}
	m.ID = id
	sent := make(chan error, 1)
	if !l.spawn(func() {
		defer m.Close()
		sent <- l.conn.Send(m)
	}) {
		m.Close()
		return nil, errLost
	}
	select {
	case err := <-sent:
		if err != nil {
			l.desert(id, answer)
			if wire.ToError(err).Class != "" {
				return nil, classed(err)
			}
			l.fail()
			return nil, errLost
		}
		sent <- nil // for a cancel
	case <-ctx.Done():
		l.abandon(id, answer, sent)
		return nil, ctx.Err()
	}
	select {
	case a := <-answer:
		return checked(a)
	case <-l.lost:
		select {
		case a := <-answer:
			return checked(a)
		default:
		}
		return nil, errLost
	case <-ctx.Done():
		l.abandon(id, answer, sent)
		return nil, ctx.Err()
	}
}

// spawn runs f beside the caller; close waits for it. False when the link has ended.
func (l *link) spawn(f func()) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return false
	}
	l.work.Go(f)
	return true
}

// abandon stops waiting for an answer and tells podmon so, once the request has
// been sent. The caller's next request comes after that, unless podmon takes
// nothing in: then nobody waits long here.
func (l *link) abandon(id uint64, answer chan *wire.Message, sent <-chan error) {
	told := make(chan struct{})
	if l.spawn(func() {
		defer close(told)
		if <-sent == nil {
			_ = l.conn.Send(&wire.Message{ID: id, Op: wire.OpCancel}) // a lost link needs no cancel
		}
	}) {
		select {
		case <-told:
		case <-time.After(tellLimit):
		}
	}
	l.desert(id, answer)
}

// tellLimit is how long a caller whose time is over waits for its cancel to be sent.
const tellLimit = 100 * time.Millisecond

func (l *link) enlist(answer chan *wire.Message) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return 0, errLost
	}
	l.last++
	l.pending[l.last] = answer
	return l.last, nil
}

// desert stops waiting for an answer; one that has come already is closed.
func (l *link) desert(id uint64, answer chan *wire.Message) {
	l.mu.Lock()
	_, waiting := l.pending[id]
	delete(l.pending, id)
	l.mu.Unlock()
	if !waiting {
		select {
		case a := <-answer:
			a.Close()
		case <-l.lost:
		}
	}
}

// checked returns the answer, or the error in it.
func checked(a *wire.Message) (*wire.Message, error) {
	if a.Truncated {
		return nil, fmt.Errorf("answer of podmon: short of descriptors: %w", errdefs.ErrUnavailable)
	}
	if a.Error != nil {
		a.Close()
		return nil, classed(a.Error)
	}
	return a, nil
}

var classes = map[string]error{
	wire.ClassNotFound: errdefs.ErrNotFound, wire.ClassInvalid: errdefs.ErrInvalidArgument,
	wire.ClassExists: errdefs.ErrAlreadyExists, wire.ClassPrecondition: errdefs.ErrFailedPrecondition,
	wire.ClassUnavailable:  errdefs.ErrUnavailable,
	wire.ClassCutOff:       errdefs.ErrAborted,
	wire.ClassNoExecutable: ErrNoExecutable, wire.ClassNotExecutable: ErrNotExecutable,
}

// classed gives an error of podmon its class in the daemon.
func classed(err error) error {
	var e *wire.Error
	if errors.As(err, &e) && classes[e.Class] != nil {
		return fmt.Errorf("%s: %w", e.Message, classes[e.Class])
	}
	return err
}

// ping asks podmon for a sign of life. The request waits behind others on a full
// socket, which is no excuse.
func (l *link) ping(ctx context.Context) error {
	return l.request(ctx, wire.OpPing, struct{}{}, nil)
}

// kill ends the podmon and returns when it is dead, so that two never read the
// same container. A stopped (SIGSTOP) or hung one dies as well.
func (l *link) kill(ctx context.Context) error {
	if err := unix.PidfdSendSignal(l.pidfd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		return fmt.Errorf("kill podmon %d: %w", l.Process.PID, err)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(l.pidfd), Events: unix.POLLIN}}, 100)
		if n > 0 {
			break
		}
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("await end of podmon %d: %w", l.Process.PID, err)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("await end of podmon %d: %w", l.Process.PID, ctx.Err())
		}
	}
	if l.cmd != nil {
		_ = l.cmd.Wait() // reaps it; how it ended does not matter any more
	}
	return nil
}

// spawn starts a podmon from the sealed binary and connects to it.
func spawn(ctx context.Context, o Options, binary *os.File, build, name, dir string, onExit func(*link, Event)) (_ *link, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	cmd, err := launch(o, binary, build, name, dir)
	if err != nil {
		return nil, err
	}
	l, err := dial(ctx, name, dir, onExit)
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	l.cmd = cmd
	return l, nil
}

// launch runs podmon in a session of its own and returns when it listens.
func launch(o Options, binary *os.File, build, name, dir string) (*exec.Cmd, error) {
	logfile, err := os.OpenFile(logOf(dir), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer logfile.Close()
	ready, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close()
	defer theirs.Close()
	args := []string{"podmon", "serve", o.RunDir, name, build}
	if o.SystemdCgroup {
		args = append(args, "systemd")
	}
	// Through our own /proc entry: the number of the memfd means something else
	// in the child, where descriptors have been shuffled (golang.org/issue/61751).
	cmd := &exec.Cmd{
		Path: fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), binary.Fd()),
		Args: args, Dir: "/",
		Env:    []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Stdout: logfile, Stderr: logfile,
		ExtraFiles:  []*os.File{theirs},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start podmon: %w", err)
	}
	theirs.Close()
	if err := awaitReady(ready, dir); err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, err
	}
	return cmd, nil
}

// readyLimit is how long podmon may take to listen; it is milliseconds on an
// idle machine.
const readyLimit = 15 * time.Second

// awaitReady returns when podmon has closed its end of the pipe, by listening
// or by dying, and tells which.
func awaitReady(ready *os.File, dir string) error {
	if err := ready.SetReadDeadline(time.Now().Add(readyLimit)); err != nil {
		return err
	}
	if _, err := ready.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("start podmon: not listening after %v: %w", readyLimit, errdefs.ErrUnavailable)
	}
	if _, err := os.Stat(dir + "/sock"); err != nil {
		said, _ := lastWords(dir)
		return fmt.Errorf("start podmon: it ended at once: %s: %w", said, errdefs.ErrUnavailable)
	}
	return nil
}

// sealAttempts is how often seal asks again, 3 s in all.
const sealAttempts = 20

// seal copies a program into a memfd that nobody can change any more. libcontainer
// recognises it and spares itself a copy at every start (CVE-2019-5736). build tells
// it from other programs.
func seal(path string) (_ *os.File, build string, err error) {
	src, err := os.Open(path)
	if err != nil {
		return nil, "", fmt.Errorf("podmon: %w", err)
	}
	defer src.Close()
	fd, err := unix.MemfdCreate("podmon", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if err == unix.EINVAL { // before Linux 6.3
		fd, err = unix.MemfdCreate("podmon", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, "", fmt.Errorf("memfd: %w", err)
	}
	f := os.NewFile(uintptr(fd), "podmon")
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(f, sum), src); err != nil {
		return nil, "", fmt.Errorf("copy podmon: %w", err)
	}
	if err := f.Chmod(0o555); err != nil {
		return nil, "", fmt.Errorf("copy podmon: %w", err)
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_EXEC
	// EBUSY: the kernel itself has held a page (migration, DAMON), and F_ADD_SEALS has waited
	// 150 ms for it (mm/memfd.c, memfd_wait_for_pins).
	for attempt := 0; ; attempt++ {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals)
		if err == nil {
			break
		}
		if err == unix.EINVAL && seals&unix.F_SEAL_EXEC != 0 { // before Linux 6.3
			seals &^= unix.F_SEAL_EXEC
			continue
		}
		if err != unix.EBUSY || attempt == sealAttempts {
			return nil, "", fmt.Errorf("seal podmon: %w", err)
		}
	}
	// A process in a container can have it run, as /proc/self/exe, and the container's root
	// owns it then: it must not take the right to execute it from all others, by a mode, which
	// the seal is for, or by an ACL. Before Linux 6.0, and without CAP_LINUX_IMMUTABLE, the
	// latter stays.
	_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, immutable)
	return f, hex.EncodeToString(sum.Sum(nil)), nil
}

const immutable = 0x10 // FS_IMMUTABLE_FL of linux/fs.h

// buildOf is what seal says of a program.
func buildOf(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("podmon: %w", err)
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", fmt.Errorf("podmon: %w", err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}
