package streaming

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/sirupsen/logrus"
	"golang.org/x/net/websocket"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestMain(m *testing.M) {
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	RouteKlog(quiet)
	os.Exit(m.Run())
}

// local is a Runtime whose containers are processes of this machine, and whose
// pods' ports are those of addr.
type local struct {
	addr     atomic.Value  // string: where every port leads
	started  chan int      // PIDs of executed processes
	returned chan error    // what Exec and PortForward returned
	drain    time.Duration // after the process's end
}

func (l *local) Exec(ctx context.Context, _ string, cmd []string, s Streams) (err error) {
	defer func() { l.returned <- err }()
	b := NewBridge(s)
	defer b.Close()
	c := exec.Command(cmd[0], cmd[1:]...)
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.TTY {
		master, slave, err := openTerminal()
		if err != nil {
			return err
		}
		b.Terminal(master)
		b.theirs = append(b.theirs, slave)
		c.Stdin, c.Stdout, c.Stderr = slave, slave, slave
		c.SysProcAttr.Setctty = true
	} else {
		in, out, errs, err := b.Pipes()
		if err != nil {
			return err
		}
		// A nil *os.File in an interface is not nil.
		if in != nil {
			c.Stdin = in
		}
		if out != nil {
			c.Stdout = out
		}
		if errs != nil {
			c.Stderr = errs
		}
	}
	if err := c.Start(); err != nil {
		return err
	}
	b.Started()
	l.started <- c.Process.Pid
	stop := context.AfterFunc(ctx, func() { _ = c.Process.Kill() })
	defer stop()
	_ = c.Wait()
	b.Drain(l.drain)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := ExitError(int32(c.ProcessState.ExitCode())); err != nil {
		return fmt.Errorf("exec: %w", err)
	}
	return nil
}

func (l *local) Attach(ctx context.Context, id string, s Streams) error {
	return l.Exec(ctx, id, []string{"sh", "-c", "read line; echo attached $line"}, s)
}

func (l *local) PortForward(ctx context.Context, _ string, _ int32, stream io.ReadWriteCloser) (err error) {
	defer func() { l.returned <- err }()
	conn, err := net.Dial("tcp", l.addr.Load().(string))
	if err != nil {
		return err
	}
	return Forward(ctx, stream, conn)
}

// openTerminal makes a pseudo terminal; the master is non-blocking.
func openTerminal() (master, slave *os.File, err error) {
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	master = os.NewFile(uintptr(fd), "master")
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		master.Close()
	}
	return master, slave, err
}

// newServer starts a server; at the test's end it is closed, and nothing of it
// may be left: no goroutine, no descriptor.
func newServer(t *testing.T) (*Server, *local) {
	t.Helper()
	goroutines, fds := goruntime.NumGoroutine(), descriptors(t)
	l := &local{started: make(chan int, 10), returned: make(chan error, 10), drain: 5 * time.Second}
	s, err := Listen(Config{}, l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		// The library's goroutines end on their own once their connections are
		// closed; nothing announces it.
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			g, f := goruntime.NumGoroutine(), descriptors(t)
			if g <= goroutines && f <= fds {
				return
			}
			if time.Now().After(end) {
				buf := make([]byte, 1<<20)
				t.Fatalf("%d goroutines, were %d; %d descriptors, were %d\n%s", g, goroutines, f, fds, buf[:goruntime.Stack(buf, true)])
			}
		}
	})
	return s, l
}

func descriptors(t *testing.T) int {
	t.Helper()
	// The first poll of the process opens two descriptors for good.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// start makes an exec and dials it.
func start(t *testing.T, s *Server, dial func(*testing.T, string, want) *client, w want, cmd ...string) *client {
	t.Helper()
	r, err := s.GetExec(&runtime.ExecRequest{ContainerId: "c", Cmd: cmd, Stdin: w.stdin, Stdout: w.stdout, Stderr: w.stderr, Tty: w.tty})
	if err != nil {
		t.Fatal(err)
	}
	return dial(t, r.Url, w)
}

// within awaits a value, or fails.
func within[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatalf("%s: nothing in 20 s", what)
		panic("unreachable")
	}
}

// each runs a test over both protocols, each on a server of its own.
func each(t *testing.T, f func(*testing.T, *Server, *local, func(*testing.T, string, want) *client)) {
	for name, dial := range protocols {
		t.Run(name, func(t *testing.T) {
			s, l := newServer(t)
			f(t, s, l, dial)
		})
	}
}

func TestExecOutputsAndExitCode(t *testing.T) {
	each(t, func(t *testing.T, s *Server, _ *local, dial func(*testing.T, string, want) *client) {
		c := start(t, s, dial, want{stdout: true, stderr: true}, "sh", "-c", "echo out; echo err >&2; exit 7")
		errs := make(chan string, 1)
		go func() {
			b, _ := io.ReadAll(c.stderr)
			errs <- string(b)
		}()
		status := make(chan string, 1)
		go func() { status <- c.status(t) }()
		out, err := io.ReadAll(c.stdout)
		if err != nil || string(out) != "out\n" {
			t.Errorf("stdout %q, %v", out, err)
		}
		if got := within(t, "stderr", errs); got != "err\n" {
			t.Errorf("stderr %q", got)
		}
		if got := within(t, "status", status); got != "NonZeroExitCode 7" {
			t.Errorf("status %q", got)
		}
	})
}

func TestExecSuccess(t *testing.T) {
	each(t, func(t *testing.T, s *Server, _ *local, dial func(*testing.T, string, want) *client) {
		c := start(t, s, dial, want{stdout: true}, "true")
		if got := c.status(t); got != "Success" {
			t.Errorf("status %q", got)
		}
	})
}

func TestExecFailsToStart(t *testing.T) {
	each(t, func(t *testing.T, s *Server, _ *local, dial func(*testing.T, string, want) *client) {
		c := start(t, s, dial, want{stdout: true, stdin: true}, "/no/such/program")
		if got := c.status(t); !strings.HasPrefix(got, "Failure") {
			t.Errorf("status %q", got)
		}
	})
}

// TestExecLargeInput: a MiB through cat and back, byte for byte.
func TestExecLargeInput(t *testing.T) {
	each(t, func(t *testing.T, s *Server, _ *local, dial func(*testing.T, string, want) *client) {
		data := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		c := start(t, s, dial, want{stdin: true, stdout: true}, "head", "-c", fmt.Sprint(len(data)))
		go func() {
			for rest := data; len(rest) > 0; {
				n := min(len(rest), 10000)
				if _, err := c.stdin.Write(rest[:n]); err != nil {
					return
				}
				rest = rest[n:]
			}
		}()
		got := make([]byte, len(data))
		if _, err := io.ReadFull(c.stdout, got); err != nil || !bytes.Equal(got, data) {
			t.Errorf("what came back differs (%v)", err)
		}
		if status := c.status(t); status != "Success" {
			t.Errorf("status %q", status)
		}
	})
}

// TestExecHalfClose: the end of the client's input ends the process's.
func TestExecHalfClose(t *testing.T) {
	for _, name := range []string{"spdy", "websocket v5"} {
		t.Run(name, func(t *testing.T) {
			s, _ := newServer(t)
			dial := protocols[name]
			c := start(t, s, dial, want{stdin: true, stdout: true}, "sort")
			if _, err := io.WriteString(c.stdin, "b\na\n"); err != nil {
				t.Fatal(err)
			}
			if err := c.closeStdin(); err != nil {
				t.Fatal(err)
			}
			// A WebSocket's channels all end with the connection.
			ended := make(chan string, 1)
			go func() { ended <- c.status(t) }()
			if out, err := io.ReadAll(c.stdout); err != nil || string(out) != "a\nb\n" {
				t.Errorf("%q, %v", out, err)
			}
			if got := within(t, "status", ended); got != "Success" {
				t.Errorf("status %q", got)
			}
		})
	}
}

func TestTerminalResize(t *testing.T) {
	each(t, func(t *testing.T, s *Server, l *local, dial func(*testing.T, string, want) *client) {
		c := start(t, s, dial, want{stdin: true, stdout: true, tty: true}, "sh", "-c", `trap 'stty size; exit 3' WINCH; echo ready; while :; do read x; done`)
		within(t, "start", l.started)
		buf := make([]byte, 100)
		var out strings.Builder
		for resized := false; !strings.Contains(out.String(), "33 44"); {
			n, err := c.stdout.Read(buf)
			if err != nil {
				t.Fatalf("%v after %q", err, out.String())
			}
			out.Write(buf[:n])
			if !resized && strings.Contains(out.String(), "ready") {
				resized = true
				if _, err := io.WriteString(c.resize, `{"Width":44,"Height":33}`); err != nil {
					t.Fatal(err)
				}
				if _, err := io.WriteString(c.stdin, "x\n"); err != nil { // dash runs traps between commands
					t.Fatal(err)
				}
			}
		}
		go func() { _, _ = io.Copy(io.Discard, c.stdout) }()
		if got := c.status(t); got != "NonZeroExitCode 3" {
			t.Errorf("status %q", got)
		}
	})
}

// TestClientLeaves: whatever the process and the client are doing, the
// process's runtime hears that the client is gone.
func TestClientLeaves(t *testing.T) {
	flood := func(c *client) {
		for chunk := make([]byte, 8192); ; {
			if _, err := c.stdin.Write(chunk); err != nil {
				return
			}
		}
	}
	for _, tc := range []struct {
		name string
		want want
		cmd  []string
		busy func(*client)
	}{
		{"quiet process", want{stdout: true}, []string{"sleep", "1000"}, nil},
		{"waiting for input", want{stdin: true, stdout: true}, []string{"cat"}, nil},
		{"input nobody takes", want{stdin: true, stdout: true}, []string{"sleep", "1000"}, flood},
		{"output nobody takes", want{stdout: true}, []string{"yes"}, nil},
		{"terminal", want{stdin: true, stdout: true, tty: true}, []string{"cat"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			each(t, func(t *testing.T, s *Server, l *local, dial func(*testing.T, string, want) *client) {
				c := start(t, s, dial, tc.want, tc.cmd...)
				pid := within(t, "start", l.started)
				flooded := make(chan struct{})
				go func() {
					defer close(flooded)
					if tc.busy != nil {
						tc.busy(c)
					}
				}()
				c.conn.Close()
				if err := within(t, "end of exec", l.returned); !errors.Is(err, context.Canceled) {
					t.Errorf("exec ended with %v", err)
				}
				if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
					t.Errorf("the process is left: %v", err)
				}
				within(t, "end of flood", flooded)
			})
		})
	}
}

// TestServerCloses: Close ends what runs, also when the client does not read.
func TestServerCloses(t *testing.T) {
	each(t, func(t *testing.T, s *Server, l *local, dial func(*testing.T, string, want) *client) {
		start(t, s, dial, want{stdout: true}, "yes")
		start(t, s, dial, want{stdin: true, stdout: true}, "cat")
		within(t, "start", l.started)
		within(t, "start", l.started)
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		for range 2 {
			select {
			case <-l.returned:
			default:
				t.Error("Close returned before Exec")
			}
		}
		if _, err := s.GetExec(&runtime.ExecRequest{ContainerId: "c", Cmd: []string{"a"}, Stdout: true}); !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("a URL from a closed server: %v", err)
		}
	})
}

// TestLeftoverHoldsOutput: a child that keeps the output open does not keep
// the exec open for longer than the drain limit.
func TestLeftoverHoldsOutput(t *testing.T) {
	each(t, func(t *testing.T, s *Server, l *local, dial func(*testing.T, string, want) *client) {
		l.drain = 10 * time.Millisecond
		c := start(t, s, dial, want{stdout: true}, "sh", "-c", "sleep 1000 & echo $!")
		pid := 0
		if _, err := fmt.Fscan(c.stdout, &pid); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
		if got := c.status(t); got != "Success" {
			t.Errorf("status %q", got)
		}
	})
}

func TestAttach(t *testing.T) {
	each(t, func(t *testing.T, s *Server, _ *local, dial func(*testing.T, string, want) *client) {
		r, err := s.GetAttach(&runtime.AttachRequest{ContainerId: "c", Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		c := dial(t, r.Url, want{stdin: true, stdout: true})
		if _, err := io.WriteString(c.stdin, "me\n"); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len("attached me\n"))
		if _, err := io.ReadFull(c.stdout, got); err != nil || string(got) != "attached me\n" {
			t.Errorf("%q, %v", got, err)
		}
	})
}

func TestURLsWorkOnce(t *testing.T) {
	s, _ := newServer(t)
	r, err := s.GetExec(&runtime.ExecRequest{ContainerId: "c", Cmd: []string{"true"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := dialSPDY(t, r.Url, want{stdout: true}).status(t); got != "Success" {
		t.Errorf("status %q", got)
	}
	for _, url := range []string{r.Url, r.Url + "x", "http://" + s.Addr() + "/", "http://" + s.Addr() + "/exec/"} {
		resp, err := http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", url, resp.Status)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestURLsAreBounded(t *testing.T) {
	s, _ := newServer(t)
	get := func() error {
		_, err := s.GetPortForward(&runtime.PortForwardRequest{PodSandboxId: "p"})
		return err
	}
	for range maxTokens {
		if err := get(); err != nil {
			t.Fatal(err)
		}
	}
	if err := get(); !errors.Is(err, errdefs.ErrResourceExhausted) {
		t.Errorf("one too many: %v", err)
	}
	s.mu.Lock()
	for token, r := range s.tokens {
		r.expires = time.Now().Add(-time.Second)
		s.tokens[token] = r
	}
	s.mu.Unlock()
	if err := get(); err != nil {
		t.Errorf("expired URLs are in the way: %v", err)
	}
}

func TestRequestsAreValidated(t *testing.T) {
	s, _ := newServer(t)
	for name, get := range map[string]func() error{
		"container_id": func() error {
			_, err := s.GetExec(&runtime.ExecRequest{Cmd: []string{"a"}, Stdout: true})
			return err
		},
		"cmd": func() error { _, err := s.GetExec(&runtime.ExecRequest{ContainerId: "c", Stdout: true}); return err },
		"stderr": func() error {
			_, err := s.GetAttach(&runtime.AttachRequest{ContainerId: "c", Tty: true, Stderr: true})
			return err
		},
		"stdin":          func() error { _, err := s.GetAttach(&runtime.AttachRequest{ContainerId: "c"}); return err },
		"pod_sandbox_id": func() error { _, err := s.GetPortForward(&runtime.PortForwardRequest{}); return err },
		"port[1]": func() error {
			_, err := s.GetPortForward(&runtime.PortForwardRequest{PodSandboxId: "p", Port: []int32{1, 65536}})
			return err
		},
	} {
		if err := get(); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.HasPrefix(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSlowClient: a client that goes on sending while it takes its output
// slowly gets all of it, and how the command ended.
func TestSlowClient(t *testing.T) {
	each(t, func(t *testing.T, s *Server, l *local, dial func(*testing.T, string, want) *client) {
		l.drain = time.Millisecond
		const size = 12 << 20
		c := start(t, s, dial, want{stdin: true, stdout: true}, "sh", "-c", fmt.Sprintf("head -c %d /dev/zero; exit 3", size))
		stop := make(chan struct{})
		var sender sync.WaitGroup
		sender.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					if _, err := c.stdin.Write(make([]byte, 8192)); err != nil {
						return
					}
				}
			}
		})
		defer func() {
			close(stop)
			c.conn.Close()
			sender.Wait()
		}()
		ended := make(chan string, 1)
		go func() { ended <- c.status(t) }()
		got, buf := 0, make([]byte, 64<<10)
		for got < size {
			n, err := c.stdout.Read(buf)
			if err != nil {
				t.Fatalf("after %d bytes: %v", got, err)
			}
			got += n
			time.Sleep(2 * time.Millisecond) // the client is slow
		}
		if st := within(t, "status", ended); st != "NonZeroExitCode 3" {
			t.Errorf("status %q", st)
		}
	})
}

// TestPreference: a client gets the protocol it likes best.
func TestPreference(t *testing.T) {
	for offer, want := range map[string]string{
		"v5.channel.k8s.io, v4.channel.k8s.io": "v5.channel.k8s.io",
		"v4.channel.k8s.io, v5.channel.k8s.io": "v4.channel.k8s.io",
		"v9.channel.k8s.io, v5.channel.k8s.io": "v5.channel.k8s.io",
	} {
		s, _ := newServer(t)
		r, err := s.GetExec(&runtime.ExecRequest{ContainerId: "c", Cmd: []string{"true"}, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		ws, _ := dialWS(t, r.Url, strings.Split(offer, ", ")...)
		if got := ws.Config().Protocol; len(got) != 1 || got[0] != want {
			t.Errorf("%s: got %v", offer, got)
		}
	}
}

// TestBrokenFrames: a v5 client that breaks the protocol is sent away.
func TestBrokenFrames(t *testing.T) {
	for name, frame := range map[string][]byte{
		"close of nothing": {channelClose},
		"size":             append([]byte{channelResize}, "{"...),
		"too large":        make([]byte, frameLimit+1),
	} {
		t.Run(name, func(t *testing.T) {
			s, l := newServer(t)
			r, err := s.GetExec(&runtime.ExecRequest{ContainerId: "c", Cmd: []string{"sleep", "1d"}, Stdin: true})
			if err != nil {
				t.Fatal(err)
			}
			ws, _ := dialWS(t, r.Url, protocolV5)
			within(t, "start", l.started)
			if err := websocket.Message.Send(ws, frame); err != nil {
				t.Fatal(err)
			}
			if err := within(t, "end", l.returned); !errors.Is(err, context.Canceled) {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

// TestStalledClientLeaves: the end of a client is noticed though it stands
// behind input that the process does not take.
func TestStalledClientLeaves(t *testing.T) {
	each(t, func(t *testing.T, s *Server, l *local, dial func(*testing.T, string, want) *client) {
		c := start(t, s, dial, want{stdin: true}, "sleep", "1d")
		within(t, "start", l.started)
		if err := c.conn.SetWriteDeadline(time.Now().Add(2 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for {
			if _, err := c.stdin.Write(make([]byte, 32<<10)); err != nil {
				break // both kernels are full
			}
		}
		c.conn.Close()
		if err := within(t, "end", l.returned); !errors.Is(err, context.Canceled) {
			t.Errorf("ended with %v", err)
		}
	})
}
