package streaming

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/streaming/pkg/httpstream"
)

// serveOn runs a server for one connection on loopback.
func serveOn(t *testing.T, handle func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		handle(c.(*net.TCPConn))
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return l.Addr().String()
}

// wires are the ways to a SPDY connection.
var wires = map[string]func(*testing.T, string, string) (httpstream.Connection, net.Conn){
	"spdy": spdyConn, "tunnel": tunnelConn,
}

// eachWire runs a test over both, each on a server of its own.
func eachWire(t *testing.T, f func(*testing.T, *Server, *local, opener)) {
	for name, dial := range wires {
		t.Run(name, func(t *testing.T) {
			s, l := newServer(t)
			f(t, s, l, func(t *testing.T, s *Server) (httpstream.Stream, httpstream.Stream, net.Conn) {
				return forwardSPDY(t, s, dial)
			})
		})
	}
}

// opener opens a forwarded connection.
type opener func(*testing.T, *Server) (data, errs httpstream.Stream, raw net.Conn)

// forwardSPDY opens a forwarded connection: its data and its error stream.
func forwardSPDY(t *testing.T, s *Server, dial func(*testing.T, string, string) (httpstream.Connection, net.Conn)) (data, errs httpstream.Stream, raw net.Conn) {
	t.Helper()
	r, err := s.GetPortForward(&runtime.PortForwardRequest{PodSandboxId: "p"})
	if err != nil {
		t.Fatal(err)
	}
	conn, raw := dial(t, r.Url, "portforward.k8s.io")
	open := func(kind string) httpstream.Stream {
		s, err := conn.CreateStream(http.Header{"Streamtype": {kind}, "Port": {"80"}, "Requestid": {"1"}})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	errs = open("error")
	errs.Close() // as kubectl does
	return open("data"), errs, raw
}

// TestForwardHalfClose: a server that answers after its client's end of file.
func TestForwardHalfClose(t *testing.T) {
	eachWire(t, func(t *testing.T, s *Server, l *local, open opener) {
		l.addr.Store(serveOn(t, func(c *net.TCPConn) {
			b, _ := io.ReadAll(c)
			_, _ = io.WriteString(c, strings.ToUpper(string(b)))
		}))
		data, errs, _ := open(t, s)
		if _, err := io.WriteString(data, "hello"); err != nil {
			t.Fatal(err)
		}
		if err := data.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(data); err != nil || string(got) != "HELLO" {
			t.Errorf("%q, %v", got, err)
		}
		if got, _ := io.ReadAll(errs); len(got) > 0 {
			t.Errorf("error stream: %q", got)
		}
		if err := within(t, "end", l.returned); err != nil {
			t.Error(err)
		}
	})
}

// TestForwardPodEnds: the pod's end of file reaches the client, which may still
// send: nothing of it holds up the connection.
func TestForwardPodEnds(t *testing.T) {
	eachWire(t, func(t *testing.T, s *Server, l *local, open opener) {
		l.addr.Store(serveOn(t, func(c *net.TCPConn) { _, _ = io.WriteString(c, "bye") }))
		data, _, _ := open(t, s)
		if got, err := io.ReadAll(data); err != nil || string(got) != "bye" {
			t.Errorf("%q, %v", got, err)
		}
		for chunk := range 100 {
			if _, err := data.Write(make([]byte, 8192)); err != nil {
				t.Fatalf("chunk %d: %v", chunk, err)
			}
		}
		data.Close()
		if err := within(t, "end", l.returned); err != nil {
			t.Error(err)
		}
	})
}

// TestForwardRefused: the client learns why.
func TestForwardRefused(t *testing.T) {
	eachWire(t, func(t *testing.T, s *Server, l *local, open opener) {
		gone, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		gone.Close()
		l.addr.Store(gone.Addr().String())
		_, errs, _ := open(t, s)
		if got, _ := io.ReadAll(errs); !strings.Contains(string(got), "connection refused") {
			t.Errorf("error stream: %q", got)
		}
		if err := within(t, "end", l.returned); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Error(err)
		}
	})
}

// TestForwardReset: a reset by the pod ends both directions at once.
func TestForwardReset(t *testing.T) {
	eachWire(t, func(t *testing.T, s *Server, l *local, open opener) {
		l.addr.Store(serveOn(t, func(c *net.TCPConn) {
			_, _ = c.Read(make([]byte, 1))
			_ = c.SetLinger(0) // close with RST
		}))
		data, _, _ := open(t, s)
		if _, err := io.WriteString(data, "x"); err != nil {
			t.Fatal(err)
		}
		if err := within(t, "end", l.returned); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("ended with %v", err)
		}
		if got, err := io.ReadAll(data); len(got) > 0 {
			t.Errorf("%q, %v", got, err)
		}
	})
}

// TestForwardClientLeaves: the pod's connection does not outlive the client's,
// though the pod neither sends nor closes.
func TestForwardClientLeaves(t *testing.T) {
	for name, dial := range map[string]func(*testing.T, *Server) net.Conn{
		"spdy": func(t *testing.T, s *Server) net.Conn {
			data, _, raw := forwardSPDY(t, s, spdyConn)
			if _, err := io.WriteString(data, "x"); err != nil {
				t.Fatal(err)
			}
			return raw
		},
		"tunnel": func(t *testing.T, s *Server) net.Conn {
			data, _, raw := forwardSPDY(t, s, tunnelConn)
			if _, err := io.WriteString(data, "x"); err != nil {
				t.Fatal(err)
			}
			return raw
		},
		"websocket": func(t *testing.T, s *Server) net.Conn {
			r, err := s.GetPortForward(&runtime.PortForwardRequest{PodSandboxId: "p", Port: []int32{80}})
			if err != nil {
				t.Fatal(err)
			}
			_, writer, raw := wsChannels(t, r.Url, "v4.channel.k8s.io", 2)
			if _, err := io.WriteString(writer(0), "x"); err != nil {
				t.Fatal(err)
			}
			return raw
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, l := newServer(t)
			first, ended := make(chan struct{}), make(chan error, 1)
			l.addr.Store(serveOn(t, func(c *net.TCPConn) {
				_, _ = io.ReadFull(c, make([]byte, 1))
				close(first)
				_, err := c.Read(make([]byte, 1))
				ended <- err
			}))
			raw := dial(t, s)
			within(t, "first byte", first)
			raw.Close()
			within(t, "end of the pod's connection", ended)
			if err := within(t, "end", l.returned); !errors.Is(err, context.Canceled) && err != nil {
				t.Error(err)
			}
		})
	}
}

func TestForwardWebSocket(t *testing.T) {
	s, l := newServer(t)
	l.addr.Store(serveOn(t, func(c *net.TCPConn) {
		b := make([]byte, 5)
		_, _ = io.ReadFull(c, b)
		_, _ = io.WriteString(c, strings.ToUpper(string(b)))
	}))
	r, err := s.GetPortForward(&runtime.PortForwardRequest{PodSandboxId: "p", Port: []int32{80}})
	if err != nil {
		t.Fatal(err)
	}
	readers, writer, _ := wsChannels(t, r.Url, "v4.channel.k8s.io", 2)
	if _, err := io.WriteString(writer(0), "hello"); err != nil {
		t.Fatal(err)
	}
	// Each channel begins with its port.
	go func() { _, _ = io.Copy(io.Discard, readers[1]) }()
	if got, err := io.ReadAll(readers[0]); err != nil || string(got) != "\x50\x00HELLO" {
		t.Errorf("%q, %v", got, err)
	}
	if err := within(t, "end", l.returned); err != nil {
		t.Error(err)
	}
}

// TestForwardStreamsAreChecked: those that are refused are told so.
func TestForwardStreamsAreChecked(t *testing.T) {
	s, _ := newServer(t)
	r, err := s.GetPortForward(&runtime.PortForwardRequest{PodSandboxId: "p"})
	if err != nil {
		t.Fatal(err)
	}
	conn, _ := spdyConn(t, r.Url, "portforward.k8s.io")
	for name, h := range map[string]http.Header{
		"no port":     {"Streamtype": {"data"}, "Requestid": {"1"}},
		"port 0":      {"Streamtype": {"data"}, "Requestid": {"2"}, "Port": {"0"}},
		"large port":  {"Streamtype": {"data"}, "Requestid": {"3"}, "Port": {"65536"}},
		"no request":  {"Streamtype": {"data"}, "Port": {"80"}},
		"no type":     {"Requestid": {"4"}, "Port": {"80"}},
		"wrong type":  {"Streamtype": {"stdin"}, "Requestid": {"5"}, "Port": {"80"}},
		"second port": {"Streamtype": {"error"}, "Requestid": {"6"}, "Port": {"81"}},
		"twice":       {"Streamtype": {"data"}, "Requestid": {"6"}, "Port": {"80"}},
	} {
		if h.Get("Requestid") == "6" {
			first := http.Header{"Streamtype": {"data"}, "Requestid": {"6 " + name}, "Port": {"80"}}
			if _, err := conn.CreateStream(first); err != nil {
				t.Fatal(err)
			}
			h.Set("Requestid", "6 "+name)
		}
		stream, err := conn.CreateStream(h)
		if err != nil {
			continue
		}
		if got, err := io.ReadAll(stream); len(got) > 0 || err != nil {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}
