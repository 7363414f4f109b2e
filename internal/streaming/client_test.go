package streaming

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/websocket"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// client is a test's side of an exec or attach, over either protocol.
type client struct {
	stdin          io.Writer
	closeStdin     func() error // nil where the protocol has no half-close
	stdout, stderr io.Reader
	errors         io.Reader
	resize         io.Writer
	conn           net.Conn // the wire
}

// status reads what became of the process: "Success", or the reason and code.
func (c *client) status(t *testing.T) string {
	t.Helper()
	var s struct {
		Status, Reason, Message string
		Details                 struct{ Causes []struct{ Message string } }
	}
	if err := json.NewDecoder(c.errors).Decode(&s); err != nil {
		t.Fatalf("status: %v", err)
	}
	if len(s.Details.Causes) > 0 {
		return s.Reason + " " + s.Details.Causes[0].Message
	}
	return strings.TrimSpace(s.Status + " " + s.Reason)
}

type want struct{ stdin, stdout, stderr, tty bool }

// protocols are the ways to dial a URL.
var protocols = map[string]func(*testing.T, string, want) *client{
	"spdy": dialSPDY, "websocket": dialWebSocket, "websocket v5": dialV5,
}

// spdyConn opens a SPDY connection of a subprotocol.
func spdyConn(t *testing.T, url, protocol string) (httpstream.Connection, net.Conn) {
	t.Helper()
	req, err := http.NewRequest(http.MethodPost, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
	req.Header.Set(httpstream.HeaderUpgrade, "SPDY/3.1")
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	raw, err := net.Dial("tcp", req.URL.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	if err := req.Write(raw); err != nil {
		t.Fatal(err)
	}
	// The answer is read byte by byte: what follows it belongs to SPDY.
	var head []byte
	for one := make([]byte, 1); !strings.HasSuffix(string(head), "\r\n\r\n"); {
		if _, err := raw.Read(one); err != nil {
			t.Fatalf("upgrade: %v after %q", err, head)
		}
		head = append(head, one[0])
	}
	if !strings.HasPrefix(string(head), "HTTP/1.1 101 ") {
		t.Fatalf("upgrade refused: %q", head)
	}
	return spdyOver(t, raw), raw
}

// tunnelConn opens a SPDY connection in a WebSocket.
func tunnelConn(t *testing.T, url, protocol string) (httpstream.Connection, net.Conn) {
	t.Helper()
	ws, raw := dialWS(t, url, "SPDY/3.1+"+protocol)
	ws.PayloadType = websocket.BinaryFrame
	return spdyOver(t, ws), raw
}

func spdyOver(t *testing.T, wire net.Conn) httpstream.Connection {
	t.Helper()
	conn, err := spdy.NewClientConnection(wire)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func dialSPDY(t *testing.T, url string, w want) *client {
	conn, raw := spdyConn(t, url, "v4.channel.k8s.io")
	c := &client{conn: raw}
	open := func(kind string) httpstream.Stream {
		s, err := conn.CreateStream(http.Header{"Streamtype": {kind}})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	c.errors = open("error")
	if w.stdin {
		s := open("stdin")
		c.stdin, c.closeStdin = s, s.Close
	}
	if w.stdout {
		c.stdout = open("stdout")
	}
	if w.stderr {
		c.stderr = open("stderr")
	}
	if w.tty {
		c.resize = open("resize")
	}
	return c
}

// dialWS opens a WebSocket that may speak the given protocols.
func dialWS(t *testing.T, url string, protocols ...string) (*websocket.Conn, net.Conn) {
	t.Helper()
	config, err := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), "http://localhost")
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol = protocols
	raw, err := net.Dial("tcp", config.Location.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { raw.Close() })
	ws, err := websocket.NewClient(config, raw)
	if err != nil {
		t.Fatal(err)
	}
	return ws, raw
}

// wsChannels splits a WebSocket into its numbered channels.
func wsChannels(t *testing.T, url, protocol string, n int) ([]io.Reader, func(byte) io.Writer, net.Conn) {
	t.Helper()
	ws, raw := dialWS(t, url, protocol)
	readers, writers := make([]io.Reader, n), make([]*io.PipeWriter, n)
	for i := range n {
		readers[i], writers[i] = io.Pipe()
	}
	var pump sync.WaitGroup
	pump.Go(func() {
		for {
			var frame []byte
			err := websocket.Message.Receive(ws, &frame)
			if err != nil {
				for _, w := range writers {
					w.CloseWithError(io.EOF)
				}
				return
			}
			if len(frame) > 1 && int(frame[0]) < n {
				_, _ = writers[frame[0]].Write(frame[1:])
			}
		}
	})
	t.Cleanup(func() {
		raw.Close()
		for _, w := range writers {
			w.Close() // and those nobody read
		}
		for _, r := range readers {
			r.(*io.PipeReader).Close()
		}
		pump.Wait()
	})
	return readers, func(channel byte) io.Writer { return wsWriter{ws, channel} }, raw
}

type wsWriter struct {
	ws      *websocket.Conn
	channel byte
}

func (w wsWriter) Write(p []byte) (int, error) {
	return len(p), websocket.Message.Send(w.ws, append([]byte{w.channel}, p...))
}

func dialWebSocket(t *testing.T, url string, _ want) *client {
	return wsClient(t, url, "v4.channel.k8s.io")
}

func dialV5(t *testing.T, url string, _ want) *client {
	c := wsClient(t, url, protocolV5)
	signal := c.stdin.(wsWriter)
	signal.channel = channelClose
	c.closeStdin = func() error {
		_, err := signal.Write([]byte{channelStdin})
		return err
	}
	return c
}

func wsClient(t *testing.T, url, protocol string) *client {
	readers, writer, raw := wsChannels(t, url, protocol, 5)
	return &client{
		stdin: writer(0), resize: writer(4), stdout: readers[1], stderr: readers[2], errors: readers[3], conn: raw,
	}
}
