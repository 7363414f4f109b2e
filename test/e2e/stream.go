package e2e

import (
	"bytes"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/net/websocket"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/podshim/podshim/test/harness"
)

// exitError is the end of a command that ran.
type exitError struct{ code, message string }

func (e exitError) Error() string {
	return fmt.Sprintf("command ended with exit code %s: %s", e.code, e.message)
}

// streamStatus is what comes on the error stream: Kubernetes' metav1.Status.
type streamStatus struct {
	Status, Reason, Message string
	Details                 struct {
		Causes []struct{ Reason, Message string }
	}
}

func (s streamStatus) err() error {
	if s.Status == "Success" {
		return nil
	}
	for _, cause := range s.Details.Causes {
		if cause.Reason == "ExitCode" {
			return exitError{cause.Message, s.Message}
		}
	}
	return errors.New(s.Message)
}

// TryExec runs a command through kubelet's /exec over WebSocket (v4.channel.k8s.io:
// the first byte of a frame is its channel) and returns its standard output; an
// exitError when it ended with a code.
func (p *Pod) TryExec(container string, command ...string) (string, error) {
	query := url.Values{"output": {"1"}, "error": {"1"}, "command": command}
	path := fmt.Sprintf("/exec/default/%s/%s?%s", p.FullName(), container, query.Encode())
	config, err := websocket.NewConfig("wss://"+p.k.Addr+path, "http://localhost")
	if err != nil {
		return "", err
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	config.TlsConfig = &tls.Config{InsecureSkipVerify: true} // kubelet's own certificate, on loopback
	ws, err := config.DialContext(p.k.Node.Context())
	if err != nil {
		return "", err
	}
	defer ws.Close()
	_ = ws.SetDeadline(time.Now().Add(harness.Limit))
	channels := map[byte]*bytes.Buffer{1: {}, 2: {}, 3: {}}
	for {
		var frame []byte
		if err := websocket.Message.Receive(ws, &frame); err == io.EOF {
			break
		} else if err != nil {
			return "", fmt.Errorf("exec %q: %w", command, err)
		}
		if len(frame) > 1 && channels[frame[0]] != nil {
			channels[frame[0]].Write(frame[1:])
		}
	}
	var status streamStatus
	if err := json.Unmarshal(channels[3].Bytes(), &status); err != nil {
		return "", fmt.Errorf("status of exec %q: %w in %q", command, err, channels[3])
	}
	out := channels[1].String()
	if err := status.err(); err != nil {
		return out, fmt.Errorf("%w; it wrote %q %q", err, out, channels[2])
	}
	return out, nil
}

// dial opens a SPDY connection, kubectl's old protocol, to one of kubelet's
// streaming endpoints. It goes with the test.
func (k *Kubelet) dial(path, protocol string) httpstream.Connection {
	k.t.Helper()
	conn, err := k.tryDial(path, protocol)
	if err != nil {
		k.t.Fatalf("%v", err)
	}
	k.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (k *Kubelet) tryDial(path, protocol string) (httpstream.Connection, error) {
	req, err := http.NewRequest(http.MethodPost, "https://"+k.Addr+path, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
	req.Header.Set(httpstream.HeaderUpgrade, "SPDY/3.1")
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	raw, err := tls.Dial("tcp", k.Addr, &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		return nil, err
	}
	_ = raw.SetDeadline(time.Now().Add(harness.Limit))
	if err := req.Write(raw); err != nil {
		return nil, err
	}
	// Read byte by byte: what follows the head belongs to SPDY.
	var head []byte
	for one := make([]byte, 1); !strings.HasSuffix(string(head), "\r\n\r\n"); {
		if _, err := raw.Read(one); err != nil {
			return nil, fmt.Errorf("upgrade %s: %w after %q", path, err, head)
		}
		head = append(head, one[0])
	}
	if !strings.HasPrefix(string(head), "HTTP/1.1 101 ") {
		rest := make([]byte, 1000)
		n, _ := raw.Read(rest)
		return nil, fmt.Errorf("upgrade %s refused: %s%s", path, head, rest[:n])
	}
	return spdy.NewClientConnection(raw)
}

// session is an exec or attach over SPDY.
type session struct {
	conn                          httpstream.Connection
	stdin, stdout, stderr, errors httpstream.Stream
	resize                        httpstream.Stream
}

// exec opens a session; verb is exec or attach.
func (p *Pod) session(verb, container string, tty bool, command ...string) *session {
	p.k.t.Helper()
	query := url.Values{"input": {"1"}, "output": {"1"}, "command": command}
	if tty {
		query.Set("tty", "1")
	} else {
		query.Set("error", "1")
	}
	s := &session{conn: p.k.dial(fmt.Sprintf("/%s/default/%s/%s?%s", verb, p.FullName(), container, query.Encode()), "v4.channel.k8s.io")}
	open := func(kind string) httpstream.Stream {
		stream, err := s.conn.CreateStream(http.Header{"Streamtype": {kind}})
		if err != nil {
			p.k.t.Fatalf("open stream %s: %v", kind, err)
		}
		return stream
	}
	s.errors = open("error")
	s.stdin = open("stdin")
	s.stdout = open("stdout")
	if tty {
		s.resize = open("resize")
	} else {
		s.stderr = open("stderr")
	}
	return s
}

// end is the status of the session's process.
func (s *session) end() error {
	var status streamStatus
	if err := json.NewDecoder(s.errors).Decode(&status); err != nil {
		return fmt.Errorf("read status: %w", err)
	}
	return status.err()
}

// forward opens the two streams of one connection to a port of the pod.
func forward(conn httpstream.Connection, port, id int) (data, failure httpstream.Stream, err error) {
	header := http.Header{"Streamtype": {"error"}, "Port": {fmt.Sprint(port)}, "Requestid": {fmt.Sprint(id)}}
	if failure, err = conn.CreateStream(header); err != nil {
		return nil, nil, err
	}
	_ = failure.Close() // nothing is ever sent on it
	header.Set("Streamtype", "data")
	data, err = conn.CreateStream(header)
	return data, failure, err
}
