package streaming

import (
	"bufio"
	"net"
	"net/http"

	"golang.org/x/net/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// protocolTunnel is a SPDY connection for port-forward whose bytes are the
// payload of binary WebSocket frames: what client-go's WebSocket port-forward
// speaks (k8s.io/client-go/tools/portforward, NewSPDYOverWebsocketDialer).
const protocolTunnel = spdy.HeaderSpdy31 + "+" + portforward.ProtocolV1Name

// serveTunnel shakes hands for the WebSocket and leaves the rest to the
// port-forward of SPDY, to which it looks like a request for an upgrade.
func (j *job) serveTunnel(w http.ResponseWriter, r *http.Request, sandbox string) {
	acceptWebSocket(w, r, protocolTunnel, func(ws *websocket.Conn) {
		ws.PayloadType = websocket.BinaryFrame
		inner := r.Clone(r.Context())
		inner.Header = http.Header{}
		inner.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
		inner.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
		inner.Header.Set(httpstream.HeaderProtocolVersion, portforward.ProtocolV1Name)
		j.serveForwards(&tunnelWriter{header: http.Header{}, conn: ws}, inner, sandbox)
	})
}

// tunnelWriter is the response to the inner request. Nothing of it is sent: the
// client knows the protocol by the WebSocket's handshake.
type tunnelWriter struct {
	header http.Header
	conn   net.Conn
}

// Header implements http.ResponseWriter.
func (t *tunnelWriter) Header() http.Header { return t.header }

// WriteHeader implements http.ResponseWriter.
func (t *tunnelWriter) WriteHeader(int) {}

// Write implements http.ResponseWriter.
func (t *tunnelWriter) Write(p []byte) (int, error) { return len(p), nil }

// Hijack implements http.Hijacker.
func (t *tunnelWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return t.conn, bufio.NewReadWriter(bufio.NewReader(t.conn), bufio.NewWriter(t.conn)), nil
}
