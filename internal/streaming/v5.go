package streaming

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/websocket"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream/wsstream"
	utilexec "k8s.io/utils/exec"
)

// protocolV5 is v4 with a way to end an input: a frame of the byte 255 and the
// channel's number. It is all that client-go's WebSocket executor offers
// (k8s.io/apimachinery/pkg/util/remotecommand).
const protocolV5 = "v5.channel.k8s.io"

// channelProtocols are those of cri-streaming.
var channelProtocols = []string{
	"v4." + wsstream.ChannelWebSocketProtocol, "v4." + wsstream.Base64ChannelWebSocketProtocol,
	wsstream.ChannelWebSocketProtocol, wsstream.Base64ChannelWebSocketProtocol,
}

// A frame begins with its channel's number.
const (
	channelStdin = iota
	channelStdout
	channelStderr
	channelError
	channelResize
	channelClose = 255 // the next byte is the channel that ends
)

const (
	// frameLimit is the largest frame a client may send; client-go's have 32 KiB.
	frameLimit = 4 << 20
	// beatPeriod is how often a client hears that we are alive while its pings
	// are stuck behind input that the process does not take. client-go gives up
	// after a minute.
	beatPeriod = 10 * time.Second
	// partingLimit is how long a client that has left may take the last frame.
	partingLimit = time.Second
)

// prefers tells whether a WebSocket client likes protocol best of all that we
// have, the others being rest. Clients name theirs best first (RFC 6455, 4.1).
func prefers(r *http.Request, protocol string, rest []string) bool {
	if !wsstream.IsWebSocketRequest(r) {
		return false
	}
	for _, header := range r.Header.Values(wsstream.WebSocketProtocolHeader) {
		for offer := range strings.SplitSeq(header, ",") {
			offer = strings.TrimSpace(offer)
			if offer == protocol {
				return true
			}
			if slices.Contains(rest, offer) {
				return false
			}
		}
	}
	return false
}

// acceptWebSocket shakes hands on a protocol and calls handle, after which the
// connection is closed.
func acceptWebSocket(w http.ResponseWriter, r *http.Request, protocol string, handle func(*websocket.Conn)) {
	websocket.Server{
		// No look at the origin: a URL cannot be guessed, and works once.
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			c.Protocol = []string{protocol}
			return nil
		},
		Handler: handle,
	}.ServeHTTP(w, r)
}

// serveV5 serves one exec or attach and tells the client how it ended.
func (j *job) serveV5(w http.ResponseWriter, r *http.Request, run func(Streams) error) {
	acceptWebSocket(w, r, protocolV5, func(ws *websocket.Conn) {
		ws.PayloadType, ws.MaxPayloadBytes = websocket.BinaryFrame, frameLimit
		c := &channels{ws: ws, idle: j.server.config.IdleTimeout, resize: make(chan TerminalSize, 1), gone: make(chan struct{})}
		stdin, write := io.Pipe()
		c.stdin = write
		var work sync.WaitGroup
		defer work.Wait()
		work.Go(c.receive)
		work.Go(c.beat)

		err := run(j.streams(stdin, c.writer(channelStdout), c.writer(channelStderr), c.resize))
		stdin.Close() // frees receive, when nobody reads what the client sends
		// A client that is gone misses its status, nobody else does.
		_, _ = c.writer(channelError).Write(statusOf(err))
		ws.Close()
	})
}

// channels are a v5 connection.
type channels struct {
	ws      *websocket.Conn
	idle    time.Duration
	stdin   *io.PipeWriter
	resize  chan TerminalSize // has the last size that nobody has taken yet
	stalled atomic.Bool       // receive waits for the process to take its input
	gone    chan struct{}     // receive has ended
}

// receive takes the client's frames until the connection ends.
func (c *channels) receive() {
	defer close(c.gone)
	defer close(c.resize)
	for {
		c.moved()
		var frame []byte
		if err := websocket.Message.Receive(c.ws, &frame); err != nil {
			break
		}
		if !c.take(frame) {
			break
		}
	}
	// Not the end of input, that would have been said.
	c.stdin.CloseWithError(io.ErrUnexpectedEOF)
	// Answers a client's goodbye, and ends the request's context.
	_ = c.ws.SetWriteDeadline(time.Now().Add(partingLimit))
	c.ws.Close()
}

// take passes on one frame; false when the client breaks the protocol.
func (c *channels) take(frame []byte) bool {
	if len(frame) == 0 {
		return true
	}
	channel, data := frame[0], frame[1:]
	switch channel {
	case channelStdin:
		if len(data) > 0 {
			c.stalled.Store(true)
			_, _ = c.stdin.Write(data) // an error is that nobody wants it
			c.stalled.Store(false)
		}
	case channelResize:
		var size TerminalSize
		if json.Unmarshal(data, &size) != nil {
			return false
		}
		c.setSize(size)
	case channelClose:
		if len(data) != 1 {
			return false
		}
		if data[0] == channelStdin {
			c.stdin.Close()
		}
	}
	return true
}

// setSize replaces a size that has not been taken.
func (c *channels) setSize(size TerminalSize) {
	select {
	case <-c.resize:
	default:
	}
	c.resize <- size // has room: nobody else sends
}

// beat sends pongs that no ping has asked for (RFC 6455, 5.5.3) while receive
// cannot get at the pings.
func (c *channels) beat() {
	ticker := time.NewTicker(beatPeriod)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			if c.stalled.Load() && pong.Send(c.ws, nil) != nil {
				return
			}
		case <-c.gone:
			return
		}
	}
}

var pong = websocket.Codec{Marshal: func(any) ([]byte, byte, error) { return nil, websocket.PongFrame, nil }}

// moved puts off the end of an idle connection.
func (c *channels) moved() {
	if c.idle > 0 {
		_ = c.ws.SetDeadline(time.Now().Add(c.idle))
	}
}

// writer sends on one channel.
func (c *channels) writer(channel byte) io.Writer { return &channelWriter{c: c, channel: channel} }

type channelWriter struct {
	c       *channels
	channel byte
	frame   []byte
}

// Write implements io.Writer; one goroutine calls it.
func (w *channelWriter) Write(p []byte) (int, error) {
	w.c.moved()
	w.frame = append(append(w.frame[:0], w.channel), p...)
	if err := websocket.Message.Send(w.c.ws, w.frame); err != nil {
		return 0, err
	}
	return len(p), nil
}

// status is the part of a metav1.Status that v4 and v5 clients read.
type status struct {
	Status  string   `json:"status"`
	Message string   `json:"message,omitempty"`
	Reason  string   `json:"reason,omitempty"`
	Details *details `json:"details,omitempty"`
	Code    int32    `json:"code,omitempty"`
}

type details struct {
	Causes []cause `json:"causes"`
}

type cause struct {
	Reason  string `json:"reason"`
	Message string `json:"message"`
}

// statusOf says how an exec or attach has ended, as cri-streaming does for v4.
func statusOf(err error) []byte {
	var exit utilexec.CodeExitError
	s := status{Status: "Success"}
	switch {
	case errors.As(err, &exit):
		s = status{
			Status: "Failure", Reason: remotecommand.NonZeroExitCodeReason,
			Message: fmt.Sprintf("command terminated with non-zero exit code: %v", exit),
			Details: &details{[]cause{{remotecommand.ExitCodeCauseType, fmt.Sprint(exit.Code)}}},
		}
	case err != nil:
		s = status{Status: "Failure", Reason: "InternalError", Code: http.StatusInternalServerError, Message: err.Error()}
	}
	body, _ := json.Marshal(s) // strings and numbers always can be
	return body
}
