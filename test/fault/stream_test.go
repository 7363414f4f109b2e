package fault

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// stream is a client's WebSocket connection of an attach, exec or port-forward, down
// to its TCP connection, which tests break.
type stream struct {
	tcp *net.TCPConn
	r   *bufio.Reader
}

// attach connects to a container's output, and to its input where that is open.
func attach(ctx context.Context, n *harness.Node, id string, stdin bool) (*stream, error) {
	resp, err := n.Runtime.Attach(ctx, &cri.AttachRequest{ContainerId: id, Stdin: stdin, Stdout: true, Stderr: true})
	if err != nil {
		return nil, err
	}
	return open(ctx, resp.Url, "v5.channel.k8s.io")
}

// open makes the WebSocket of a URL.
func open(ctx context.Context, at, protocol string) (_ *stream, err error) {
	u, err := url.Parse(at)
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", u.Host)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			c.Close()
		}
	}()
	if err := c.SetDeadline(time.Now().Add(harness.Limit)); err != nil {
		return nil, err
	}
	key := make([]byte, 16)
	_, _ = rand.Read(key)
	fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\nSec-WebSocket-Protocol: %s\r\n\r\n",
		u.RequestURI(), u.Host, base64.StdEncoding.EncodeToString(key), protocol)
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, fmt.Errorf("upgrade: %s", resp.Status)
	}
	return &stream{c.(*net.TCPConn), r}, nil
}

// frame reads one message; it is short enough for none to be in parts.
func (s *stream) frame() (opcode byte, body []byte, err error) {
	var head [2]byte
	if _, err := io.ReadFull(s.r, head[:]); err != nil {
		return 0, nil, err
	}
	size := uint64(head[1] & 0x7f)
	if long := map[uint64]int{126: 2, 127: 8}[size]; long > 0 {
		b := make([]byte, 8)
		if _, err := io.ReadFull(s.r, b[8-long:]); err != nil {
			return 0, nil, err
		}
		size = binary.BigEndian.Uint64(b)
	}
	body = make([]byte, size)
	_, err = io.ReadFull(s.r, body)
	return head[0] & 0xf, body, err
}

// Channels by the first byte of a message: output of a process, and what comes from a
// forwarded port (after a message of 2 bytes, the port).
const (
	forwardChannel = 0
	stdoutChannel  = 1
)

// awaitData returns when output has come on a channel.
func (s *stream) awaitData(channel byte) error {
	for {
		opcode, body, err := s.frame()
		if err != nil {
			return err
		}
		const binaryFrame, closeFrame = 2, 8
		if opcode == binaryFrame && len(body) > 3 && body[0] == channel {
			return nil
		}
		if opcode == closeFrame {
			return errors.New("closed before any output came")
		}
	}
}

// write sends input; a client's frames are masked (RFC 6455, 5.3), here with zeros.
func (s *stream) write(input string) error {
	frame := slices.Concat([]byte{0x82, 0x80 | byte(len(input)+1), 0, 0, 0, 0, 0}, []byte(input))
	_, err := s.tcp.Write(frame)
	return err
}

func (s *stream) Close() error { return s.tcp.Close() }

// Reset breaks the connection by RST, as a client's machine that has gone does.
func (s *stream) Reset() error { return errors.Join(s.tcp.SetLinger(0), s.tcp.Close()) }

func worst(all []time.Duration) time.Duration { return percentile(all, 100) }

// p99 is what all but one of a hundred took at most.
func p99(all []time.Duration) time.Duration { return percentile(all, 99) }

func p90(all []time.Duration) time.Duration { return percentile(all, 90) }

func median(all []time.Duration) time.Duration { return percentile(all, 50) }

func percentile(all []time.Duration, n int) time.Duration {
	if len(all) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(all))
	return sorted[(len(sorted)-1)*n/100].Round(100 * time.Microsecond)
}
