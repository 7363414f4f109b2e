package streaming

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tracked is a listener whose connections the server knows.
type tracked struct {
	net.Listener
	server *Server
}

func (t *tracked) Accept() (net.Conn, error) {
	for {
		raw, err := t.Listener.Accept()
		if err != nil {
			return nil, err
		}
		c := &conn{Conn: raw, server: t.server}
		if t.server.admit(c) {
			return c, nil
		}
		raw.Close()
	}
}

// admit registers a connection; false when the server is closed.
func (s *Server) admit(c *conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.conns[c] = struct{}{}
	if len(s.conns) == 1 {
		s.sweeps.Reset(sweepPeriod)
	}
	return true
}

// sweepPeriod is how often clients are looked after whose input is not read.
const sweepPeriod = 5 * time.Second

// sweep ends the connections of clients that have left behind input that
// nobody takes: the end of such a client stands behind that input, in the
// client's kernel, which would give up only after minutes.
func (s *Server) sweep() {
	if !s.start() {
		return
	}
	defer s.work.Done()
	s.mu.Lock()
	conns := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, c := range conns {
		if c.unread() && peerClosed(c) {
			c.abort()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed && len(s.conns) > 0 {
		s.sweeps.Reset(sweepPeriod)
	}
}

// peerClosed tells whether the other end of a connection has been closed. That
// end is a socket of this machine, as a rule, so the kernel can be asked;
// false when it is not.
func peerClosed(c net.Conn) bool {
	theirs, ok := c.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return false
	}
	socket, err := netlink.SocketGet(theirs, c.LocalAddr())
	// The kernel looks for the ports alone.
	return err == nil && socket.ID.Source.Equal(theirs.IP) &&
		socket.State != netlink.TCP_ESTABLISHED && socket.State != netlink.TCP_CLOSE_WAIT
}

// conn is a client's connection, with a context that ends with it.
type conn struct {
	net.Conn
	server   *Server
	hijacked atomic.Bool
	once     sync.Once
	err      error

	mu      sync.Mutex
	closed  bool
	aborted bool
	cancel  context.CancelFunc
	linger  *time.Timer
	rest    net.Conn // the same socket, while the client takes its leave

	queued int // sweep's: what was there to read the last time
}

type connKey struct{}

// connOf is the connection of a request's context.
func connOf(ctx context.Context) *conn { return ctx.Value(connKey{}).(*conn) }

// begin makes the connection's context, which ends when the connection is
// closed, and closes the connection when the client is gone.
func (c *conn) begin(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancel(context.WithValue(ctx, connKey{}, c))
	c.mu.Lock()
	c.cancel = cancel
	closed := c.closed
	c.mu.Unlock()
	if closed {
		cancel()
		return ctx
	}
	c.server.watcher.add(c)
	return ctx
}

// finish is called when the request on the connection is done. The library has
// said goodbye to the client and closes the connection when the goodbye is out;
// it forgets those whose streams never came.
func (c *conn) finish() {
	if !c.hijacked.Load() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	end := time.Now().Add(c.server.config.IdleTimeout)
	c.linger = time.AfterFunc(lingerLimit, func() {
		// The goodbye stands behind output that the client has yet to take.
		if unsent(c.Conn) == 0 || time.Now().After(end) {
			c.Close()
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.closed {
			c.linger.Reset(lingerLimit)
		}
	})
}

// Close implements net.Conn. The client is told, and gets all that has been
// written: closing a socket at which its input still arrives would reset the
// connection, and what is on its way to the client would be lost.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.server.watcher.remove(c) // while the descriptor is still ours
		leaving := c.hijacked.Load() && c.part()
		c.err = c.Conn.Close()
		c.mu.Lock()
		c.closed = true
		if c.cancel != nil {
			c.cancel()
		}
		if c.linger != nil {
			c.linger.Stop()
		}
		c.mu.Unlock()
		if !leaving {
			c.forget()
		}
	})
	return c.err
}

// abort closes the connection at once: the client is gone, or has to go.
func (c *conn) abort() {
	c.mu.Lock()
	c.aborted = true
	rest := c.rest
	c.mu.Unlock()
	if rest != nil {
		rest.Close()
	}
	c.Close()
}

// forget takes the connection from the server's books.
func (c *conn) forget() {
	c.server.mu.Lock()
	delete(c.server.conns, c)
	c.server.mu.Unlock()
}

// part ends our sending, and discards what the client still sends until it has
// closed its side as well. It does that on a duplicate of the descriptor, so
// that the connection itself can be closed, which wakes its readers. False when
// there is nothing to wait for.
func (c *conn) part() bool {
	tcp, ok := c.Conn.(*net.TCPConn)
	if !ok || !c.server.start() {
		return false
	}
	rest, err := duplicate(tcp)
	if err != nil {
		c.server.work.Done()
		return false
	}
	c.mu.Lock()
	aborted := c.aborted
	if !aborted {
		c.rest = rest
	}
	c.mu.Unlock()
	if aborted || tcp.CloseWrite() != nil {
		rest.Close()
		c.server.work.Done()
		return false
	}
	go func() {
		defer c.server.work.Done()
		defer c.forget()
		defer rest.Close()
		awaitEnd(rest, c.server.config.IdleTimeout)
	}()
	return true
}

// awaitEnd discards what a client sends until it closes its side. One that does
// not is given lingerLimit from when it has got all of what was sent to it, and
// at most the limit in all.
func awaitEnd(conn net.Conn, limit time.Duration) {
	for end := time.Now().Add(limit); time.Now().Before(end); {
		if conn.SetReadDeadline(time.Now().Add(lingerLimit)) != nil {
			return
		}
		_, err := io.Copy(io.Discard, readOnly{conn})
		if !errors.Is(err, os.ErrDeadlineExceeded) || unsent(conn) == 0 {
			return
		}
	}
}

// duplicate returns a connection of its own to the same socket.
func duplicate(tcp *net.TCPConn) (net.Conn, error) {
	f, err := tcp.File()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return net.FileConn(f)
}

// unsent is how many bytes of what was written the client's kernel has not
// taken; 0 when that cannot be known.
func unsent(c net.Conn) int { return queueLength(c, unix.SIOCOUTQ) }

// unread tells whether input has waited since the last call.
func (c *conn) unread() bool {
	before := c.queued
	c.queued = queueLength(c.Conn, unix.SIOCINQ)
	return before > 0 && c.queued >= before
}

// queueLength asks for a length of a socket's queue, in bytes.
func queueLength(c net.Conn, request uint) int {
	sc, ok := c.(syscall.Conn)
	if !ok {
		return 0
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return 0
	}
	n := 0
	_ = raw.Control(func(fd uintptr) {
		if queued, err := unix.IoctlGetInt(int(fd), request); err == nil {
			n = queued
		}
	})
	return n
}

// watcher hears from the kernel that a peer has closed its end, for all
// connections on one goroutine. The protocols' readers cannot be relied on for
// that: one that waits for a slow process to take its input reads nothing, so
// it never sees the end.
type watcher struct {
	epoll *os.File
	done  chan struct{}

	mu    sync.Mutex
	conns map[int32]*conn // by descriptor
}

func newWatcher() (*watcher, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	// Non-blocking, so that Go's own poller waits for it and Close ends the wait.
	w := &watcher{epoll: os.NewFile(uintptr(fd), "epoll"), done: make(chan struct{}), conns: make(map[int32]*conn)}
	raw, err := w.epoll.SyscallConn()
	if err != nil {
		w.epoll.Close()
		return nil, err
	}
	go w.run(raw)
	return w, nil
}

func (w *watcher) run(raw syscall.RawConn) {
	defer close(w.done)
	events := make([]unix.EpollEvent, 16)
	for {
		var gone []*conn
		err := raw.Read(func(fd uintptr) bool {
			// Held over both, so that no event is of a connection that had the
			// descriptor before.
			w.mu.Lock()
			defer w.mu.Unlock()
			n, err := unix.EpollWait(int(fd), events, 0)
			if err != nil || n <= 0 {
				return false // Go's poller waits until there is something
			}
			for _, e := range events[:n] {
				if c := w.conns[e.Fd]; c != nil {
					gone = append(gone, c)
				}
			}
			return true
		})
		for _, c := range gone {
			c.abort()
		}
		if err != nil {
			return // closed
		}
	}
}

// add starts watching. A connection that cannot be watched is served
// nevertheless: its end then shows at the next read or write.
func (w *watcher) add(c *conn) {
	w.control(c, func(fd int32) {
		event := unix.EpollEvent{Events: unix.EPOLLRDHUP | unix.EPOLLONESHOT, Fd: fd}
		w.conns[fd] = c
		if w.ctl(unix.EPOLL_CTL_ADD, fd, &event) != nil {
			delete(w.conns, fd)
		}
	})
}

func (w *watcher) remove(c *conn) {
	w.control(c, func(fd int32) {
		if w.conns[fd] == c {
			delete(w.conns, fd)
			_ = w.ctl(unix.EPOLL_CTL_DEL, fd, nil)
		}
	})
}

// control runs f with a connection's descriptor, which stays open meanwhile.
func (w *watcher) control(c *conn, f func(fd int32)) {
	sc, ok := c.Conn.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Control(func(fd uintptr) {
		w.mu.Lock()
		defer w.mu.Unlock()
		f(int32(fd))
	})
}

func (w *watcher) ctl(op int, fd int32, event *unix.EpollEvent) (err error) {
	raw, err := w.epoll.SyscallConn()
	if err != nil {
		return err
	}
	if cerr := raw.Control(func(epfd uintptr) { err = unix.EpollCtl(int(epfd), op, int(fd), event) }); cerr != nil {
		return cerr
	}
	return err
}

func (w *watcher) close() error {
	err := w.epoll.Close()
	<-w.done
	return err
}
