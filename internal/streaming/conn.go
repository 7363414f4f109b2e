package streaming

import (
	"context"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

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
	if !s.closed {
		s.conns[c] = struct{}{}
	}
	return !s.closed
}

// conn is a client's connection, with a context that ends with it.
type conn struct {
	net.Conn
	server   *Server
	hijacked atomic.Bool
	once     sync.Once
	err      error

	mu     sync.Mutex
	closed bool
	cancel context.CancelFunc
	linger *time.Timer
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
	if !c.closed {
		c.linger = time.AfterFunc(lingerLimit, func() { c.Close() })
	}
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.server.watcher.remove(c) // while the descriptor is still ours
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
		c.server.mu.Lock()
		delete(c.server.conns, c)
		c.server.mu.Unlock()
	})
	return c.err
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
			n, err := unix.EpollWait(int(fd), events, 0)
			if err != nil || n <= 0 {
				return false // Go's poller waits until there is something
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			for _, e := range events[:n] {
				if c := w.conns[e.Fd]; c != nil {
					gone = append(gone, c)
				}
			}
			return true
		})
		for _, c := range gone {
			c.Close()
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
