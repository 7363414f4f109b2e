// Package streaming serves exec, attach and port-forward: the CRI answers those
// calls with a URL on this server, at which a client (kubelet, crictl) then
// speaks SPDY or WebSocket. The protocols are k8s.io/cri-streaming's, but for
// port-forward over SPDY (forwards.go), and two newer ones that client-go insists
// on: exec and attach over v5.channel.k8s.io (v5.go), and port-forward over SPDY
// in a WebSocket (tunnel.go). This package owns those, and what is around all.
//
//   - A URL works once, for a minute, and cannot be guessed.
//   - The context a Runtime gets ends when the client is gone, whether or not
//     anybody reads from its connection at that moment: the kernel is asked
//     (EPOLLRDHUP), since a connection whose reader is busy would never tell;
//     of the client's own end, too, since its close stands behind its input.
//   - Close ends every connection and waits for all that was started for them.
//
// A Runtime joins a client's Streams with a process by a Bridge, and a
// forwarded connection with a socket in the pod by Forward.
package streaming

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream/wsstream"
	utilexec "k8s.io/utils/exec"
)

// TerminalSize is in characters.
type TerminalSize = remotecommand.TerminalSize

// Runtime does what a client has asked for. Every method returns soon after
// its context has ended, with nothing left behind; the streams are closed by
// the server afterwards.
type Runtime interface {
	// Exec runs cmd in a container until it ends. A non-zero exit is an
	// ExitError; the client learns the code.
	Exec(ctx context.Context, containerID string, cmd []string, s Streams) error
	// Attach copies from and to a container's PID 1 until it ends.
	Attach(ctx context.Context, containerID string, s Streams) error
	// PortForward joins one connection with a port in the pod (see Forward).
	PortForward(ctx context.Context, sandboxID string, port int32, stream io.ReadWriteCloser) error
}

// Streams are a client's side of an exec or attach. What the client has not
// asked for is nil.
type Streams struct {
	// Stdin ends (io.EOF) when the client closes it. Close frees a waiting Read.
	Stdin io.ReadCloser
	// Stdout carries the terminal's output when TTY is set, and Stderr is then nil.
	Stdout, Stderr io.Writer
	TTY            bool
	// Resize brings the client's terminal sizes; closed when no more come.
	Resize <-chan TerminalSize

	// hangUp breaks the connection: the last resort against a client that
	// neither reads nor leaves. Nil does nothing.
	hangUp func()
}

// Config of a Server. The zero value of a field is its default.
type Config struct {
	// Addr is the host:port to listen on; default 127.0.0.1:0.
	Addr string
	// IdleTimeout ends a connection on which nothing moves; default 4 hours.
	IdleTimeout time.Duration
	// CreationTimeout is how long a SPDY client may take to open its streams;
	// default 30 seconds.
	CreationTimeout time.Duration
	// Log gets what the HTTP server has to say; default discards.
	Log logrus.FieldLogger
}

// Bounds on what clients can make the server hold.
const (
	// tokenLife is how long a URL waits for its client.
	tokenLife = time.Minute
	// maxTokens is how many URLs may wait.
	maxTokens = 1000
	// headerLimit is how long a client may take to send its request.
	headerLimit = 10 * time.Second
	// lingerLimit is how long a client that has all of its output may take to
	// say goodbye after its request is done.
	lingerLimit = 10 * time.Second
)

// Server serves streams until Close.
type Server struct {
	config  Config
	runtime Runtime
	base    url.URL
	http    *http.Server
	watcher *watcher
	work    sync.WaitGroup // the accept loop, handlers and forwards

	mu     sync.Mutex
	closed bool
	tokens map[string]request
	conns  map[*conn]struct{}
	sweeps *time.Timer // runs while there are conns
}

// request is what a URL stands for.
type request struct {
	message any // *runtime.ExecRequest, AttachRequest or PortForwardRequest
	expires time.Time
}

// Listen starts a server. Close gives everything back.
func Listen(config Config, rt Runtime) (*Server, error) {
	if config.Addr == "" {
		config.Addr = "127.0.0.1:0"
	}
	if config.IdleTimeout == 0 {
		config.IdleTimeout = 4 * time.Hour
	}
	if config.CreationTimeout == 0 {
		config.CreationTimeout = remotecommand.DefaultStreamCreationTimeout
	}
	if config.Log == nil {
		quiet := logrus.New()
		quiet.SetOutput(io.Discard)
		config.Log = quiet
	}
	listener, err := net.Listen("tcp", config.Addr)
	if err != nil {
		return nil, fmt.Errorf("listen for streams: %w", err)
	}
	w, err := newWatcher()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("watch connections: %w", err), listener.Close())
	}
	s := &Server{
		config: config, runtime: rt, watcher: w, base: url.URL{Scheme: "http", Host: reachable(listener.Addr())},
		tokens: make(map[string]request), conns: make(map[*conn]struct{}),
	}
	s.sweeps = time.AfterFunc(sweepPeriod, s.sweep)
	mux := http.NewServeMux()
	mux.HandleFunc("/exec/{token}", s.serve)
	mux.HandleFunc("/attach/{token}", s.serve)
	mux.HandleFunc("/portforward/{token}", s.serve)
	s.http = &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: headerLimit,
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return c.(*conn).begin(ctx) },
		ConnState: func(c net.Conn, state http.ConnState) {
			if state == http.StateHijacked {
				c.(*conn).hijacked.Store(true)
			}
		},
		ErrorLog: errorLog(config.Log),
	}
	s.work.Go(func() {
		// ErrServerClosed after Close; any other error leaves a server that
		// accepts no one, which its clients will say.
		if err := s.http.Serve(&tracked{listener, s}); !errors.Is(err, http.ErrServerClosed) {
			config.Log.WithError(err).Error("streaming server stopped")
		}
	})
	return s, nil
}

// reachable is the address to dial: that of the listener, or loopback when it
// listens on all.
func reachable(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok || !tcp.IP.IsUnspecified() {
		return addr.String()
	}
	return fmt.Sprintf("127.0.0.1:%d", tcp.Port)
}

// Addr is the host:port in the server's URLs.
func (s *Server) Addr() string { return s.base.Host }

// Close ends every connection, and returns when all methods of the Runtime
// have. Closing twice is fine.
func (s *Server) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		s.work.Wait()
		return nil
	}
	s.closed = true
	s.sweeps.Stop()
	clear(s.tokens)
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	err := s.http.Close()
	for _, c := range conns {
		c.abort() // hijacked ones are out of the HTTP server's sight
	}
	s.work.Wait()
	return errors.Join(err, s.watcher.close())
}

// start registers work for Close to wait for; false when it is too late.
func (s *Server) start() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.work.Add(1)
	}
	return !s.closed
}

// GetExec answers CRI Exec with a URL.
func (s *Server) GetExec(r *runtime.ExecRequest) (*runtime.ExecResponse, error) {
	if len(r.GetCmd()) == 0 {
		return nil, fmt.Errorf("cmd: is missing: %w", errdefs.ErrInvalidArgument)
	}
	if err := validate(r); err != nil {
		return nil, err
	}
	u, err := s.issue("exec", r)
	return &runtime.ExecResponse{Url: u}, err
}

// GetAttach answers CRI Attach with a URL.
func (s *Server) GetAttach(r *runtime.AttachRequest) (*runtime.AttachResponse, error) {
	if err := validate(r); err != nil {
		return nil, err
	}
	u, err := s.issue("attach", r)
	return &runtime.AttachResponse{Url: u}, err
}

// GetPortForward answers CRI PortForward with a URL. SPDY clients name their
// ports later; WebSocket clients can only have those of the request.
func (s *Server) GetPortForward(r *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	if r.GetPodSandboxId() == "" {
		return nil, fmt.Errorf("pod_sandbox_id: is missing: %w", errdefs.ErrInvalidArgument)
	}
	for i, p := range r.GetPort() {
		if p < 1 || p > 65535 {
			return nil, fmt.Errorf("port[%d]: %d is not a port: %w", i, p, errdefs.ErrInvalidArgument)
		}
	}
	u, err := s.issue("portforward", r)
	return &runtime.PortForwardResponse{Url: u}, err
}

// validate holds exec and attach requests to what the CRI says of them.
func validate(r interface {
	GetContainerId() string
	GetTty() bool
	GetStdin() bool
	GetStdout() bool
	GetStderr() bool
}) error {
	switch {
	case r.GetContainerId() == "":
		return fmt.Errorf("container_id: is missing: %w", errdefs.ErrInvalidArgument)
	case r.GetTty() && r.GetStderr():
		return fmt.Errorf("stderr: a terminal has one output: %w", errdefs.ErrInvalidArgument)
	case !r.GetStdin() && !r.GetStdout() && !r.GetStderr():
		return fmt.Errorf("stdin, stdout, stderr: one of them must be set: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// issue makes the URL for a request.
func (s *Server) issue(kind string, message any) (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return "", fmt.Errorf("the streaming server is closed: %w", errdefs.ErrUnavailable)
	}
	now := time.Now()
	if len(s.tokens) >= maxTokens {
		for token, r := range s.tokens {
			if now.After(r.expires) {
				delete(s.tokens, token)
			}
		}
	}
	if len(s.tokens) >= maxTokens {
		return "", fmt.Errorf("%d streams wait for their clients: %w", maxTokens, errdefs.ErrResourceExhausted)
	}
	token := rand.Text()
	s.tokens[token] = request{message, now.Add(tokenLife)}
	return s.base.JoinPath(kind, token).String(), nil
}

// redeem takes the request of a token; each works once.
func (s *Server) redeem(token string) (any, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.tokens[token]
	delete(s.tokens, token)
	return r.message, ok && time.Now().Before(r.expires)
}

// serve handles one URL's one request. The context ends with the connection.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	if !s.start() {
		http.Error(w, "closed", http.StatusServiceUnavailable)
		return
	}
	defer s.work.Done()
	message, ok := s.redeem(r.PathValue("token"))
	if !ok {
		http.NotFound(w, r)
		return
	}
	c := connOf(r.Context())
	defer c.finish()
	j := &job{server: s, ctx: r.Context(), conn: c}
	defer j.join()
	switch m := message.(type) {
	case *runtime.ExecRequest:
		j.options = remotecommand.Options{Stdin: m.GetStdin(), Stdout: m.GetStdout(), Stderr: m.GetStderr(), TTY: m.GetTty()}
		if prefers(r, protocolV5, channelProtocols) {
			j.serveV5(w, r, func(s Streams) error { return j.exec(m.GetContainerId(), m.GetCmd(), s) })
			return
		}
		remotecommand.ServeExec(w, r, j, "", "", m.GetContainerId(), m.GetCmd(), &j.options,
			s.config.IdleTimeout, s.config.CreationTimeout, remotecommand.SupportedStreamingProtocols)
	case *runtime.AttachRequest:
		j.options = remotecommand.Options{Stdin: m.GetStdin(), Stdout: m.GetStdout(), Stderr: m.GetStderr(), TTY: m.GetTty()}
		if prefers(r, protocolV5, channelProtocols) {
			j.serveV5(w, r, func(s Streams) error { return j.attach(m.GetContainerId(), s) })
			return
		}
		remotecommand.ServeAttach(w, r, j, "", "", m.GetContainerId(), &j.options,
			s.config.IdleTimeout, s.config.CreationTimeout, remotecommand.SupportedStreamingProtocols)
	case *runtime.PortForwardRequest:
		if prefers(r, protocolTunnel, channelProtocols) {
			j.serveTunnel(w, r, m.GetPodSandboxId())
			return
		}
		if !wsstream.IsWebSocketRequest(r) {
			j.serveForwards(w, r, m.GetPodSandboxId())
			return
		}
		portforward.ServePortForward(w, r, j, m.GetPodSandboxId(), "", &portforward.V4Options{Ports: m.GetPort()},
			s.config.IdleTimeout, s.config.CreationTimeout, portforward.SupportedProtocols)
	}
}

// job is one request on its way through cri-streaming, which calls it back.
type job struct {
	server  *Server
	ctx     context.Context
	conn    *conn
	options remotecommand.Options
	stdin   *stdin
}

// ExecInContainer implements remotecommand.Executor.
func (j *job) ExecInContainer(_ context.Context, _, _, container string, cmd []string, in io.Reader, out, errs io.WriteCloser,
	_ bool, resize <-chan TerminalSize, _ time.Duration) error {
	return j.exec(container, cmd, j.streams(in, out, errs, resize))
}

func (j *job) exec(container string, cmd []string, s Streams) error {
	return plainExit(j.server.runtime.Exec(j.ctx, container, cmd, s))
}

// AttachContainer implements remotecommand.Attacher.
func (j *job) AttachContainer(_ context.Context, _, _, container string, in io.Reader, out, errs io.WriteCloser,
	_ bool, resize <-chan TerminalSize) error {
	return j.attach(container, j.streams(in, out, errs, resize))
}

func (j *job) attach(container string, s Streams) error {
	return j.server.runtime.Attach(j.ctx, container, s)
}

// PortForward implements portforward.PortForwarder, for WebSocket.
func (j *job) PortForward(_ context.Context, sandbox, _ string, port int32, stream io.ReadWriteCloser) error {
	return j.server.runtime.PortForward(j.ctx, sandbox, port, stream)
}

// streams gives the Runtime what the request has asked for; the library hands
// out WebSocket channels that nobody did.
func (j *job) streams(in io.Reader, out, errs io.Writer, resize <-chan TerminalSize) Streams {
	s := Streams{TTY: j.options.TTY, hangUp: func() { j.conn.abort() }}
	if j.options.Stdin {
		j.stdin = newStdin(in)
		s.Stdin = j.stdin
	}
	if j.options.Stdout {
		s.Stdout = out
	}
	if j.options.Stderr {
		s.Stderr = errs
	}
	if j.options.TTY {
		s.Resize = resize
	}
	return s
}

// join waits for what the request started; its connection is closed by now, or
// was never made.
func (j *job) join() {
	if j.stdin != nil {
		j.stdin.Close()
		<-j.stdin.done
	}
}

// ExitError is the error of an Exec whose process ended with code; nil for 0.
func ExitError(code int32) error {
	if code == 0 {
		return nil
	}
	return utilexec.CodeExitError{Err: fmt.Errorf("exit status %d", code), Code: int(code)}
}

// plainExit unwraps an exit code, which cri-streaming knows only as the error's
// own type.
func plainExit(err error) error {
	var exit utilexec.CodeExitError
	if errors.As(err, &exit) {
		return exit
	}
	return err
}
