package pod

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// transports runs a test over both protocols that crictl speaks: SPDY, and
// WebSocket with v5.channel.k8s.io. websocket_test.go has v4.
func transports(t *testing.T, test func(t *testing.T, n *harness.Node, p *harness.Pod, transport string)) {
	n, p := start(t)
	for _, transport := range []string{"spdy", "websocket"} {
		t.Run(transport, func(t *testing.T) { test(t, n.With(t), p.With(t), transport) })
	}
}

// Exec: the streams are apart and whole, standard input ends, the code comes back.
func TestExecStreams(t *testing.T) {
	transports(t, func(t *testing.T, n *harness.Node, p *harness.Pod, transport string) {
		c := p.Run(sleeper)
		c.WaitLog("ready")
		execute := func(stdin io.Reader, command ...string) (string, string, error) {
			args := append([]string{"exec", "--transport", transport}, command...)
			if stdin != nil {
				args = append([]string{"exec", "-i", "--transport", transport}, command...)
			}
			return output(t, n.Crictl(args...), stdin)
		}
		stdout, stderr, err := execute(nil, c.ID, "sh", "-c", "echo out; echo err >&2; exit 7")
		if stdout != "out\n" || !strings.HasPrefix(stderr, "err\n") || err == nil || !strings.Contains(stderr+err.Error(), "7") {
			t.Errorf("stdout %q, stderr %q, %v; want out, err, 7", stdout, stderr, err)
		}
		data := bytes.Repeat([]byte("0123456789abcdef"), 1<<18) // 4 MiB
		stdout, stderr, err = execute(bytes.NewReader(data), c.ID, "cat")
		if err != nil || sha256.Sum256([]byte(stdout)) != sha256.Sum256(data) {
			t.Errorf("cat of %d bytes gave %d: %v %s", len(data), len(stdout), err, stderr)
		}
		if _, stderr, err = execute(nil, c.ID, "/no/such/program"); err == nil || !strings.Contains(stderr, "/no/such/program") {
			t.Errorf("program that does not exist: %v, %q", err, stderr)
		}
	})
}

// output runs a command to its end.
func output(t *testing.T, cmd *exec.Cmd, stdin io.Reader) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	limit := time.AfterFunc(harness.Limit, func() { _ = cmd.Process.Kill() })
	defer limit.Stop()
	err = cmd.Wait()
	return out.String(), errs.String(), err
}

// Exec with a terminal: it is one, echoes, and follows the client's size.
func TestExecTerminal(t *testing.T) {
	transports(t, func(t *testing.T, n *harness.Node, p *harness.Pod, transport string) {
		c := p.Run(sleeper)
		c.WaitLog("ready")
		term := newTerminal(t, 33, 101)
		term.run(n.Crictl("exec", "-it", "--transport", transport, c.ID, "sh"))
		term.write("tty; until [ \"$(stty size)\" = '33 101' ]; do sleep 0.02; done; echo sized'-first'\n")
		term.waitFor("/dev/pts/")
		term.waitFor("sized-first")
		term.resize(44, 120)
		term.write("until [ \"$(stty size)\" = '44 120' ]; do sleep 0.02; done; echo sized'-anew'\n")
		term.waitFor("sized-anew")
		term.write("exit 9\n")
		if err := term.wait(); err == nil {
			t.Error("exit code 9 came back as success")
		}
	})
}

// terminal is a pseudo terminal of this machine with a program on it.
type terminal struct {
	t            *testing.T
	master, tail *os.File
	cmd          *exec.Cmd

	mu      sync.Mutex
	changed chan struct{} // closed and renewed when more was read
	read    strings.Builder
}

func newTerminal(t *testing.T, rows, cols uint16) *terminal {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	tail, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	term := &terminal{t: t, master: os.NewFile(uintptr(fd), "/dev/ptmx"), tail: tail, changed: make(chan struct{})}
	term.resize(rows, cols)
	t.Cleanup(func() { _ = term.master.Close() })
	return term
}

func (term *terminal) resize(rows, cols uint16) {
	term.t.Helper()
	if err := unix.IoctlSetWinsize(int(term.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: cols}); err != nil {
		term.t.Fatal(err)
	}
}

func (term *terminal) run(cmd *exec.Cmd) {
	term.t.Helper()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = term.tail, term.tail, term.tail
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	if err := cmd.Start(); err != nil {
		term.t.Fatal(err)
	}
	term.cmd = cmd
	_ = term.tail.Close()
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := term.master.Read(buf)
			term.mu.Lock()
			term.read.Write(buf[:n])
			close(term.changed)
			term.changed = make(chan struct{})
			term.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
}

func (term *terminal) write(s string) {
	term.t.Helper()
	if _, err := term.master.WriteString(s); err != nil {
		term.t.Fatal(err)
	}
}

func (term *terminal) waitFor(s string) {
	term.t.Helper()
	limit := time.After(harness.Limit)
	for {
		term.mu.Lock()
		text, changed := term.read.String(), term.changed
		term.mu.Unlock()
		if strings.Contains(text, s) {
			return
		}
		select {
		case <-changed:
		case <-limit:
			_ = term.cmd.Process.Kill()
			term.t.Fatalf("terminal never showed %q:\n%s", s, text)
		}
	}
}

func (term *terminal) wait() error {
	limit := time.AfterFunc(harness.Limit, func() { _ = term.cmd.Process.Kill() })
	defer limit.Stop()
	return term.cmd.Wait()
}

func interactive(once bool) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) { c.Stdin, c.StdinOnce = true, once }
}

// Attach with stdin_once: the end of the client's input is the end of the
// container's.
func TestAttachOnce(t *testing.T) {
	transports(t, func(t *testing.T, n *harness.Node, p *harness.Pod, transport string) {
		c := p.Shell("echo started; cat; echo end of input", interactive(true))
		c.WaitLog("started")
		stdout, stderr, err := output(t, n.Crictl("attach", "-i", "--transport", transport, c.ID), strings.NewReader("hello\n"))
		if err != nil || !strings.Contains(stdout, "hello\n") {
			t.Errorf("attach: %v, stdout %q, stderr %q", err, stdout, stderr)
		}
		if s := c.WaitExit(); s.ExitCode != 0 {
			t.Errorf("exit code %d", s.ExitCode)
		}
		if got := c.LogText("stdout"); got != "started\nhello\nend of input\n" {
			t.Errorf("log is %q", got)
		}
	})
}

// Attach without stdin_once: a client that leaves does not end the container's
// input; the next one goes on.
func TestAttachAgain(t *testing.T) {
	transports(t, func(t *testing.T, n *harness.Node, p *harness.Pod, transport string) {
		c := p.Shell("echo started; while read line; do echo got $line; [ \"$line\" = quit ] && exit 5; done; exit 6", interactive(false))
		c.WaitLog("started")
		for _, line := range []string{"first", "second"} {
			in, feed := io.Pipe()
			cmd := n.Crictl("attach", "-i", "--transport", transport, c.ID)
			cmd.Stdin = in
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(feed, line+"\n"); err != nil {
				t.Fatal(err)
			}
			c.WaitLog("got " + line)
			_ = feed.Close()
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		if !c.Process().Alive() {
			t.Fatal("container ended with its client")
		}
		_, _, _ = output(t, n.Crictl("attach", "-i", "--transport", transport, c.ID), strings.NewReader("quit\n"))
		if s := c.WaitExit(); s.ExitCode != 5 {
			t.Errorf("exit code %d, want 5", s.ExitCode)
		}
	})
}

// Attach to a container with a terminal.
func TestAttachTerminal(t *testing.T) {
	transports(t, func(t *testing.T, n *harness.Node, p *harness.Pod, transport string) {
		c := p.Run([]string{"sh"}, interactive(false), func(c *cri.ContainerConfig) { c.Tty = true })
		term := newTerminal(t, 30, 90)
		term.run(n.Crictl("attach", "-it", "--transport", transport, c.ID))
		term.write("tty; until [ \"$(stty size)\" = '30 90' ]; do sleep 0.02; done; echo sized'-so'\n")
		term.waitFor("sized-so")
		term.write("exit 4\n")
		_ = term.wait()
		if s := c.WaitExit(); s.ExitCode != 4 {
			t.Errorf("exit code %d, want 4", s.ExitCode)
		}
		if got := c.LogText("stdout"); !strings.Contains(got, "sized-so") {
			t.Errorf("terminal's output is not in the log: %q", got)
		}
	})
}

var forwarding = regexp.MustCompile(`127\.0\.0\.1:(\d+) -> 8080`)

// Port-forward reaches what listens on the pod's loopback only.
func TestPortForward(t *testing.T) {
	transports(t, func(t *testing.T, n *harness.Node, p *harness.Pod, transport string) {
		c := p.Shell("mkdir -p /tmp/www; echo forwarded > /tmp/www/index.html; httpd -p 127.0.0.1:8080 -h /tmp/www 2>/dev/null; echo serving; sleep 100000")
		c.WaitLog("serving")
		out := n.Dir + "/forward-" + transport
		file, err := os.Create(out)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		cmd := n.Crictl("port-forward", "--transport", transport, p.ID, ":8080")
		cmd.Stdout, cmd.Stderr = file, file
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
		if err := harness.WaitFile(out, forwarding.MatchString); err != nil {
			text, _ := os.ReadFile(out)
			t.Fatalf("crictl does not forward: %v\n%s", err, text)
		}
		text, _ := os.ReadFile(out)
		for range 3 {
			if got := get(t, "http://127.0.0.1:"+forwarding.FindStringSubmatch(string(text))[1]); got != "forwarded\n" {
				t.Errorf("through the forwarded port came %q", got)
			}
		}
	})
}

func get(t *testing.T, url string) string {
	t.Helper()
	client := http.Client{Timeout: harness.Limit, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// A streaming URL works once and without it nobody gets in.
func TestStreamURLs(t *testing.T) {
	n, p := start(t)
	c := p.Run(sleeper)
	c.WaitLog("ready")
	resp, err := n.Runtime.Exec(n.Context(), &cri.ExecRequest{ContainerId: c.ID, Cmd: []string{"true"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(resp.Url, "http://127.0.0.1:") {
		t.Fatalf("URL is %s", resp.Url)
	}
	guess := resp.Url[:strings.LastIndexByte(resp.Url, '/')+1] + "AAAAAAAA"
	answer, err := http.Get(guess)
	if err != nil {
		t.Fatal(err)
	}
	_ = answer.Body.Close()
	if answer.StatusCode != http.StatusNotFound {
		t.Errorf("a guessed URL answers %s", answer.Status)
	}
}
