// Package server answers the daemon on podmon's socket; internal/monitor/wire
// describes the protocol.
package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/container"
	"github.com/podshim/podshim/cmd/podmon/internal/stdio"
	"github.com/podshim/podshim/internal/monitor/wire"
)

// Server is one podmon's socket.
type Server struct {
	m    *container.Manager
	self wire.Process

	mu       sync.Mutex
	sessions map[*session]struct{}

	retiring atomic.Bool
	retired  chan struct{}
	once     sync.Once
}

// New makes a server for containers; it takes their exits, config.OnExit is its own.
func New(config container.Config) (*Server, error) {
	s := &Server{sessions: map[*session]struct{}{}, retired: make(chan struct{})}
	var err error
	if s.self, err = wire.Identify(os.Getpid()); err != nil {
		return nil, err
	}
	config.OnExit = s.announce
	s.m, err = container.NewManager(config)
	return s, err
}

// Listen says in dir who this podmon is, and makes the socket dir/sock. It has that name once
// it takes connections: a daemon that is refused takes podmon for gone.
func (s *Server) Listen(dir string) (*net.UnixListener, error) {
	if err := s.sign(dir); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	addr, d, err := wire.Address(dir)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	defer d.Close()
	path := filepath.Join(dir, "sock")
	if err := os.Remove(path + ".new"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("listen: %w", err)
	}
	addr.Name += ".new"
	l, err := net.ListenUnix("unix", addr)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	l.SetUnlinkOnClose(false) // the daemon removes the directory
	if err := errors.Join(os.Chmod(path+".new", 0o600), os.Rename(path+".new", path)); err != nil {
		return nil, errors.Join(fmt.Errorf("listen: %w", err), l.Close())
	}
	return l, nil
}

// sign writes dir/process.json, whole or not at all.
func (s *Server) sign(dir string) error {
	b, err := wire.Encode(s.self)
	if err != nil {
		return err
	}
	path := filepath.Join(dir, wire.ProcessFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Serve answers connections until this podmon is retired, or l is closed.
func (s *Server) Serve(l *net.UnixListener) error {
	done := make(chan struct{})
	defer close(done)
	go func() {
		select {
		case <-s.retired:
			l.Close()
		case <-done:
		}
	}()
	for {
		c, err := l.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			// Descriptors or memory are short. The containers need this process.
			logrus.WithError(err).Warn("accept")
			time.Sleep(acceptPause)
			continue
		}
		conn, err := wire.NewConn(c)
		if err != nil {
			logrus.WithError(err).Warn("refuse connection")
			c.Close()
			continue
		}
		go s.serve(conn)
	}
}

// acceptPause keeps a failing accept from taking the CPU.
const acceptPause = 100 * time.Millisecond

// announce tells every session of an exit.
func (s *Server) announce(e wire.Event) {
	body, err := wire.Encode(e)
	if err != nil {
		logrus.WithError(err).Error("announce exit")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for ss := range s.sessions {
		go ss.send(&wire.Message{Op: wire.EventExit, Body: body})
	}
}

// retireIfIdle ends this podmon when it has been asked to and nothing needs it.
func (s *Server) retireIfIdle() {
	if s.retiring.Load() && !s.m.Busy() {
		s.once.Do(func() { close(s.retired) })
	}
}

// session is one connection of a daemon.
type session struct {
	s    *Server
	conn *wire.Conn

	mu          sync.Mutex
	cancels     map[uint64]context.CancelFunc
	execs       map[uint64]*container.Exec
	attachments map[uint64]*stdio.Attachment
	last        uint64 // of execs and attachments
	closed      bool
}

func (s *Server) serve(conn *wire.Conn) {
	ss := &session{
		s: s, conn: conn,
		cancels: map[uint64]context.CancelFunc{}, execs: map[uint64]*container.Exec{},
		attachments: map[uint64]*stdio.Attachment{},
	}
	s.mu.Lock()
	s.sessions[ss] = struct{}{}
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	defer func() {
		cancel()
		s.mu.Lock()
		delete(s.sessions, ss)
		s.mu.Unlock()
		ss.end()
		conn.Close()
		s.retireIfIdle()
	}()
	for {
		m, err := conn.Receive()
		if err != nil {
			return
		}
		if m.Op == wire.OpCancel {
			ss.cancel(m.ID)
			continue
		}
		rctx, done := ss.begin(ctx, m.ID)
		go func() {
			defer done()
			ss.answer(rctx, m)
		}()
	}
}

// begin makes a request's context, which a cancel message ends.
func (ss *session) begin(ctx context.Context, id uint64) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	ss.mu.Lock()
	ss.cancels[id] = cancel
	ss.mu.Unlock()
	return ctx, func() {
		cancel()
		ss.mu.Lock()
		delete(ss.cancels, id)
		ss.mu.Unlock()
	}
}

func (ss *session) cancel(id uint64) {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	if cancel := ss.cancels[id]; cancel != nil {
		cancel()
	}
}

// end kills the execs of the session and ends its attachments.
func (ss *session) end() {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.closed = true
	for _, a := range ss.attachments {
		a.Close()
	}
	for _, e := range ss.execs {
		if err := e.Kill(unix.SIGKILL); err != nil {
			logrus.WithError(err).WithField("pid", e.Process.PID).Warn("kill exec")
		}
	}
}

func (ss *session) send(m *wire.Message) {
	if err := ss.conn.Send(m); err != nil {
		ss.conn.Close() // the daemon will come back and ask for everything
	}
}

// answer handles one request.
func (ss *session) answer(ctx context.Context, req *wire.Message) {
	answer := &wire.Message{ID: req.ID}
	handle, ok := handlers[req.Op]
	var result any
	var err error
	switch {
	case req.Truncated:
		err = wire.Errorf(wire.ClassUnavailable, "podmon is short of descriptors")
	case !ok:
		err = wire.Errorf(wire.ClassInvalid, "unknown operation %q", req.Op)
	default:
		result, err = handle(ss, ctx, req, answer)
	}
	req.Close()
	if err == nil {
		answer.Body, err = wire.Encode(result)
	}
	if err != nil {
		answer.Close()
		answer.Error = wire.ToError(err)
	}
	ss.send(answer)
	answer.Close()
	if ss.s.retiring.Load() {
		ss.s.retireIfIdle()
	}
}

type handler func(ss *session, ctx context.Context, req, answer *wire.Message) (any, error)

var handlers = map[string]handler{
	wire.OpHello:      (*session).hello,
	wire.OpPing:       func(*session, context.Context, *wire.Message, *wire.Message) (any, error) { return nil, nil },
	wire.OpStart:      (*session).start,
	wire.OpHandles:    (*session).handles,
	wire.OpSignal:     (*session).signal,
	wire.OpDelete:     (*session).delete,
	wire.OpExec:       (*session).exec,
	wire.OpExecWait:   (*session).execWait,
	wire.OpExecKill:   (*session).execKill,
	wire.OpAttach:     (*session).attach,
	wire.OpAttachWait: (*session).attachWait,
	wire.OpCloseStdin: (*session).closeStdin,
	wire.OpReopenLog:  (*session).reopenLog,
	wire.OpUpdate:     (*session).update,
	wire.OpRelease:    (*session).release,
	wire.OpAdopt:      (*session).adopt,
	wire.OpRetire:     (*session).retire,
}

func (ss *session) hello(_ context.Context, _, _ *wire.Message) (any, error) {
	ss.s.keepFiles()
	return wire.Hello{
		Version: wire.Version, Process: ss.s.self,
		ExitInfo: container.KeepsExitInfo(), Containers: ss.s.m.List(),
		Build: ss.s.m.Build, SystemdCgroup: ss.s.m.SystemdCgroup, Retiring: ss.s.retiring.Load(),
	}, nil
}

// start runs to its end even when the daemon stops waiting: an abandoned start
// is a container that the daemon finds in the list or deletes by its ID.
func (ss *session) start(ctx context.Context, req, answer *wire.Message) (any, error) {
	var r wire.StartRequest
	if err := wire.Decode(req.Body, &r); err != nil {
		return nil, err
	}
	if ss.s.retiring.Load() {
		return nil, wire.Errorf(wire.ClassUnavailable, "podmon is retiring")
	}
	c, err := ss.s.m.Start(ctx, r)
	if err != nil {
		return nil, err
	}
	return c.Status().Process, c.Handles(answer)
}

// get finds the container that a request names.
func (ss *session) get(ctx context.Context, req *wire.Message, body any, id *string) (*container.Container, error) {
	if err := wire.Decode(req.Body, body); err != nil {
		return nil, err
	}
	return ss.s.m.Get(ctx, *id)
}

func (ss *session) handles(ctx context.Context, req, answer *wire.Message) (any, error) {
	var r wire.Ref
	c, err := ss.get(ctx, req, &r, &r.ID)
	if err != nil {
		return nil, err
	}
	return nil, c.Handles(answer)
}

func (ss *session) signal(ctx context.Context, req, _ *wire.Message) (any, error) {
	var r wire.Signal
	c, err := ss.get(ctx, req, &r, &r.ID)
	if err != nil {
		return nil, err
	}
	return nil, c.Signal(ctx, syscall.Signal(r.Signal), r.All)
}

func (ss *session) delete(ctx context.Context, req, _ *wire.Message) (any, error) {
	var r wire.Ref
	if err := wire.Decode(req.Body, &r); err != nil {
		return nil, err
	}
	if err := ss.s.m.Abort(ctx, r.ID); err != nil {
		return nil, err
	}
	c, err := ss.s.m.Get(ctx, r.ID)
	if err != nil {
		if wire.ToError(err).Class == wire.ClassNotFound {
			err = ss.s.m.DeleteUnknown(ctx, r.ID)
		}
		return nil, err
	}
	if err := c.Delete(ctx); err != nil {
		return nil, err
	}
	return c.Status(), nil
}

func (ss *session) exec(ctx context.Context, req, answer *wire.Message) (any, error) {
	var r wire.ExecRequest
	c, err := ss.get(ctx, req, &r, &r.ContainerID)
	if err != nil {
		return nil, err
	}
	for name, end := range map[string]**os.File{
		wire.FileStdin: &r.Stdin, wire.FileStdout: &r.Stdout, wire.FileStderr: &r.Stderr,
	} {
		// Programs expect blocking stdio.
		if *end, err = take(req, name, false); err != nil {
			return nil, err
		}
		defer closeAll(*end)
	}
	e, err := c.Exec(ctx, r)
	if err != nil {
		return nil, err
	}
	defer closeAll(e.Console)
	if err := answer.Attach(wire.FileConsole, e.Console); err != nil {
		_ = e.Kill(unix.SIGKILL)
		return nil, err
	}
	return wire.ExecStarted{Exec: ss.hold(e), Process: e.Process}, nil
}

func closeAll(files ...*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}

// hold keeps an exec for the session's later requests.
func (ss *session) hold(e *container.Exec) uint64 {
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.last++
	ss.execs[ss.last] = e
	if ss.closed {
		_ = e.Kill(unix.SIGKILL)
	}
	return ss.last
}

func (ss *session) execOf(req *wire.Message) (*container.Exec, wire.ExecRef, error) {
	var r wire.ExecRef
	if err := wire.Decode(req.Body, &r); err != nil {
		return nil, r, err
	}
	ss.mu.Lock()
	defer ss.mu.Unlock()
	e := ss.execs[r.Exec]
	if e == nil {
		return nil, r, wire.Errorf(wire.ClassNotFound, "exec %d is not here", r.Exec)
	}
	return e, r, nil
}

// execWait answers once; the exec is forgotten with the answer.
func (ss *session) execWait(ctx context.Context, req, _ *wire.Message) (any, error) {
	e, r, err := ss.execOf(req)
	if err != nil {
		return nil, err
	}
	select {
	case <-e.Done():
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	ss.mu.Lock()
	delete(ss.execs, r.Exec)
	ss.mu.Unlock()
	return e.Exit(), nil
}

func (ss *session) execKill(_ context.Context, req, _ *wire.Message) (any, error) {
	e, r, err := ss.execOf(req)
	if err != nil {
		return nil, err
	}
	return nil, e.Kill(syscall.Signal(r.Signal))
}

func (ss *session) attach(ctx context.Context, req, _ *wire.Message) (any, error) {
	var r wire.Ref
	c, err := ss.get(ctx, req, &r, &r.ID)
	if err != nil {
		return nil, err
	}
	if c.Output() == nil && c.Status().Exit != nil {
		return nil, wire.Errorf(wire.ClassPrecondition, "container %s has exited", r.ID)
	}
	if c.Output() == nil {
		return nil, wire.Errorf(wire.ClassPrecondition, "output of container %s is discarded", r.ID)
	}
	stdout, err := take(req, wire.FileStdout, true)
	if err != nil {
		return nil, err
	}
	stderr, err := take(req, wire.FileStderr, true)
	if err != nil {
		closeAll(stdout)
		return nil, err
	}
	a := c.Output().Attach(stdout, stderr)
	ss.mu.Lock()
	defer ss.mu.Unlock()
	ss.last++
	ss.attachments[ss.last] = a
	if ss.closed {
		a.Close()
	}
	return wire.Attached{Attachment: ss.last}, nil
}

// attachWait answers when the attachment has ended; cancelling it ends it.
func (ss *session) attachWait(ctx context.Context, req, _ *wire.Message) (any, error) {
	var r wire.Attached
	if err := wire.Decode(req.Body, &r); err != nil {
		return nil, err
	}
	ss.mu.Lock()
	a := ss.attachments[r.Attachment]
	delete(ss.attachments, r.Attachment)
	ss.mu.Unlock()
	if a == nil {
		return nil, wire.Errorf(wire.ClassNotFound, "attachment %d is not here", r.Attachment)
	}
	a.Wait(ctx)
	if a.Moved() {
		return nil, wire.Errorf(wire.ClassUnavailable, "another podmon has the container; attach again")
	}
	if err := a.Err(); err != nil {
		return nil, wire.Errorf(wire.ClassCutOff, "%w", err)
	}
	return nil, nil
}

// take takes a descriptor out of a request, nil when there is none. Only a
// non-blocking file can be closed while it is being written.
func take(req *wire.Message, name string, nonblocking bool) (*os.File, error) {
	fd := req.Fd(name)
	if fd < 0 {
		return nil, nil
	}
	if err := unix.SetNonblock(fd, nonblocking); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (ss *session) closeStdin(ctx context.Context, req, _ *wire.Message) (any, error) {
	var r wire.Ref
	c, err := ss.get(ctx, req, &r, &r.ID)
	if err != nil {
		return nil, err
	}
	c.CloseStdin()
	return nil, nil
}

func (ss *session) reopenLog(ctx context.Context, req, _ *wire.Message) (any, error) {
	var r wire.Ref
	c, err := ss.get(ctx, req, &r, &r.ID)
	if err != nil {
		return nil, err
	}
	return nil, c.ReopenLog()
}

func (ss *session) update(ctx context.Context, req, _ *wire.Message) (any, error) {
	var r wire.Update
	c, err := ss.get(ctx, req, &r, &r.ID)
	if err != nil {
		return nil, err
	}
	return nil, c.Update(r.Resources, r.OOMScoreAdj)
}

func (ss *session) release(ctx context.Context, req, _ *wire.Message) (any, error) {
	var r wire.Ref
	c, err := ss.get(ctx, req, &r, &r.ID)
	if err != nil {
		return nil, err
	}
	return nil, c.Release()
}

func (ss *session) adopt(ctx context.Context, req, answer *wire.Message) (any, error) {
	var r wire.Ref
	if err := wire.Decode(req.Body, &r); err != nil {
		return nil, err
	}
	c, err := ss.s.m.Adopt(ctx, r.ID, req)
	if err != nil {
		return nil, err
	}
	return c.Status(), c.Handles(answer)
}

func (ss *session) retire(context.Context, *wire.Message, *wire.Message) (any, error) {
	ss.s.retiring.Store(true)
	return nil, nil
}
