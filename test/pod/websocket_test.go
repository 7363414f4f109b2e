package pod

import (
	"bytes"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// The WebSocket protocol of critest and of clients before Kubernetes 1.30:
// v4.channel.k8s.io, without a half-close. crictl speaks v5, see stream_test.go.

// Channels of v4.channel.k8s.io: the first byte of each frame.
const (
	stdinChannel = iota
	stdoutChannel
	stderrChannel
	statusChannel
	resizeChannel
)

// socket is a WebSocket split into its channels.
type socket struct {
	t  *testing.T
	ws *websocket.Conn

	mu      sync.Mutex
	got     map[byte]*bytes.Buffer
	ended   bool
	changed chan struct{} // closed and renewed with every change
}

func dialSocket(t *testing.T, url string) *socket {
	t.Helper()
	config, err := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), "http://localhost")
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	raw, err := net.Dial("tcp", config.Location.Host)
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.SetDeadline(time.Now().Add(harness.Limit))
	ws, err := websocket.NewClient(config, raw)
	if err != nil {
		_ = raw.Close()
		t.Fatalf("WebSocket to %s: %v", url, err)
	}
	s := &socket{t: t, ws: ws, got: map[byte]*bytes.Buffer{}, changed: make(chan struct{})}
	var reader sync.WaitGroup
	reader.Go(s.readAll)
	t.Cleanup(func() { _ = raw.Close(); reader.Wait() })
	return s
}

func (s *socket) readAll() {
	for {
		var frame []byte
		err := websocket.Message.Receive(s.ws, &frame)
		s.mu.Lock()
		if len(frame) > 0 {
			b := s.got[frame[0]]
			if b == nil {
				b = new(bytes.Buffer)
				s.got[frame[0]] = b
			}
			b.Write(frame[1:])
		}
		s.ended = s.ended || err != nil
		close(s.changed)
		s.changed = make(chan struct{})
		s.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (s *socket) send(channel byte, data string) {
	s.t.Helper()
	if err := websocket.Message.Send(s.ws, append([]byte{channel}, data...)); err != nil {
		s.t.Fatalf("send: %v", err)
	}
}

// wait returns a channel's content once it contains the text; with "" once the
// other side has closed.
func (s *socket) wait(channel byte, text string) string {
	s.t.Helper()
	limit := time.After(harness.Limit)
	for {
		s.mu.Lock()
		var now string
		if b := s.got[channel]; b != nil {
			now = b.String()
		}
		ended, changed := s.ended, s.changed
		s.mu.Unlock()
		if ended && text == "" || text != "" && strings.Contains(now, text) {
			return now
		}
		if ended {
			s.t.Fatalf("the stream ended without %q: %q", text, now)
		}
		select {
		case <-changed:
		case <-limit:
			s.t.Fatalf("no %q on channel %d: %q", text, channel, now)
		}
	}
}

func (s *socket) close() { _ = s.ws.Close() }

func execSocket(t *testing.T, n *harness.Node, c *harness.Container, edit func(*cri.ExecRequest), command ...string) *socket {
	t.Helper()
	request := &cri.ExecRequest{ContainerId: c.ID, Cmd: command, Stdout: true, Stderr: true}
	if edit != nil {
		edit(request)
	}
	resp, err := n.Runtime.Exec(n.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	return dialSocket(t, resp.Url)
}

func attachSocket(t *testing.T, n *harness.Node, c *harness.Container, edit func(*cri.AttachRequest)) *socket {
	t.Helper()
	request := &cri.AttachRequest{ContainerId: c.ID, Stdin: true, Stdout: true, Stderr: true}
	if edit != nil {
		edit(request)
	}
	resp, err := n.Runtime.Attach(n.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	return dialSocket(t, resp.Url)
}

func TestWebSocketExec(t *testing.T) {
	n, p := start(t)
	c := p.Run(sleeper)
	c.WaitLog("ready")
	s := execSocket(t, n, c, nil, "sh", "-c", "echo out; echo err >&2; exit 7")
	status := s.wait(statusChannel, "ExitCode")
	if !strings.Contains(status, `"message":"7"`) {
		t.Errorf("status is %s", status)
	}
	if out, err := s.wait(stdoutChannel, "out"), s.wait(stderrChannel, "err"); out != "out\n" || err != "err\n" {
		t.Errorf("stdout %q, stderr %q", out, err)
	}
	if good := execSocket(t, n, c, nil, "true"); !strings.Contains(good.wait(statusChannel, "status"), "Success") {
		t.Error("true did not succeed")
	}
	in := execSocket(t, n, c, func(r *cri.ExecRequest) { r.Stdin = true }, "head", "-c", "1000000")
	for range 1000000 / 16 {
		in.send(stdinChannel, "0123456789abcdef")
	}
	in.wait(statusChannel, "Success")
	if got := in.wait(stdoutChannel, ""); len(got) != 1000000 {
		t.Errorf("1000000 bytes in, %d out", len(got))
	}
}

func TestWebSocketTerminal(t *testing.T) {
	n, p := start(t)
	c := p.Run(sleeper)
	c.WaitLog("ready")
	s := execSocket(t, n, c, func(r *cri.ExecRequest) { r.Tty, r.Stdin, r.Stderr = true, true, false }, "sh")
	s.send(resizeChannel, `{"Width":101,"Height":33}`)
	s.send(stdinChannel, "tty; until [ \"$(stty size)\" = '33 101' ]; do sleep 0.02; done; echo sized'-first'\n")
	s.wait(stdoutChannel, "/dev/pts/")
	s.wait(stdoutChannel, "sized-first")
	s.send(resizeChannel, `{"Width":120,"Height":44}`)
	s.send(stdinChannel, "until [ \"$(stty size)\" = '44 120' ]; do sleep 0.02; done; echo sized'-anew'; exit 9\n")
	s.wait(stdoutChannel, "sized-anew")
	if status := s.wait(statusChannel, "ExitCode"); !strings.Contains(status, `"message":"9"`) {
		t.Errorf("status is %s", status)
	}
}

func TestWebSocketAttach(t *testing.T) {
	n, p := start(t)
	once := p.Shell("echo started; cat; echo end of input", interactive(true))
	once.WaitLog("started")
	s := attachSocket(t, n, once, nil)
	s.send(stdinChannel, "hello\n")
	s.wait(stdoutChannel, "hello\n")
	// There is no half-close: the client's leaving is the end of its input.
	s.close()
	once.WaitExit()
	if got := once.LogText("stdout"); got != "started\nhello\nend of input\n" {
		t.Errorf("log is %q", got)
	}

	again := p.Shell("echo started; while read line; do echo got $line; [ \"$line\" = quit ] && exit 5; done; exit 6", interactive(false))
	again.WaitLog("started")
	for _, line := range []string{"first", "second", "quit"} {
		s := attachSocket(t, n, again, nil)
		s.send(stdinChannel, line+"\n")
		s.wait(stdoutChannel, "got "+line)
		s.close()
	}
	if status := again.WaitExit(); status.ExitCode != 5 {
		t.Errorf("exit code %d, want 5", status.ExitCode)
	}
}

// A client that reads nothing is cut off or left behind; the container goes on.
func TestAttachNeverStalls(t *testing.T) {
	n, p := start(t)
	c := p.Shell("until [ -e /tmp/go ]; do sleep 0.01; done; seq 1 300000; echo done")
	resp, err := n.Runtime.Attach(n.Context(), &cri.AttachRequest{ContainerId: c.ID, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	config, err := websocket.NewConfig("ws"+strings.TrimPrefix(resp.Url, "http"), "http://localhost")
	if err != nil {
		t.Fatal(err)
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	deaf, err := websocket.DialConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	c.Touch("/tmp/go")
	c.WaitExit()
	if got := strings.Count(c.LogText("stdout"), "\n"); got != 300001 {
		t.Errorf("%d lines in the log, want 300001", got)
	}
}

func TestWebSocketPortForward(t *testing.T) {
	n, p := start(t)
	c := p.Shell("mkdir -p /tmp/www; echo forwarded > /tmp/www/index.html; httpd -p 127.0.0.1:8080 -h /tmp/www; echo serving; sleep 100000")
	c.WaitLog("serving")
	resp, err := n.Runtime.PortForward(n.Context(), &cri.PortForwardRequest{PodSandboxId: p.ID, Port: []int32{8080, 9}})
	if err != nil {
		t.Fatal(err)
	}
	s := dialSocket(t, resp.Url)
	// Two channels a port: data and error. Each begins with the port, low byte first.
	const first, secondError = 0, 3
	s.send(first, "GET / HTTP/1.0\r\n\r\n")
	answer := s.wait(first, "forwarded\n")
	if !strings.HasPrefix(answer, "\x90\x1f") {
		t.Errorf("the data channel begins with %q, want port 8080", answer[:2])
	}
	// Nobody listens on port 9; the other port's stream is not harmed by it.
	if got := s.wait(secondError, "9"); !strings.Contains(got, "refused") {
		t.Errorf("error of the closed port is %q", got)
	}
}
