package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"

	"k8s.io/streaming/pkg/httpstream"
)

// What kubectl exec, attach, logs -f and port-forward do, through kubelet.
func testStreams(t *testing.T, k *Kubelet) {
	p := k.Run("streams")
	p.WaitReady()
	for name, test := range map[string]func(*testing.T, *Pod){
		"run": streamRun, "exec": streamExec, "exec-stdin": streamStdin, "exec-tty": streamTTY,
		"attach": streamAttach, "attach-tty": streamAttachTTY, "logs": streamLogs, "port-forward": streamForward,
	} {
		t.Run(name, func(t *testing.T) {
			sub := *p
			sub.k = k.With(t)
			test(t, &sub)
		})
	}
}

func streamRun(t *testing.T, p *Pod) {
	query := url.Values{"cmd": {"cat /etc/hostname"}}
	resp, err := p.k.client.Post("https://"+p.k.Addr+"/run/default/"+p.FullName()+"/web?"+query.Encode(), "", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, _ := io.ReadAll(resp.Body); strings.TrimSpace(string(body)) != p.FullName() {
		t.Errorf("/run cat /etc/hostname answers %s %q", resp.Status, body)
	}
}

func streamExec(t *testing.T, p *Pod) {
	if out := p.Exec("web", "sh", "-c", "echo $0 two words; echo oops >&2", "a b"); out != "a b two words\n" {
		t.Errorf("exec wrote %q", out)
	}
	_, err := p.TryExec("web", "sh", "-c", "exit 42")
	var exit exitError
	if !errors.As(err, &exit) || exit.code != "42" {
		t.Errorf("exit code 42 came as %v", err)
	}
	if _, err := p.TryExec("web", "/no/such/program"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("exec of nothing ended with %v", err)
	}
}

func streamStdin(t *testing.T, p *Pod) {
	s := p.session("exec", "web", false, "sh", "-c", "cat; echo end >&2; exit 3")
	const size = 1 << 20
	var sent sync.WaitGroup
	sent.Go(func() {
		_, _ = io.Copy(s.stdin, io.LimitReader(zeros{}, size))
		_ = s.stdin.Close()
	})
	got, err := io.Copy(io.Discard, s.stdout)
	sent.Wait()
	if err != nil || got != size {
		t.Errorf("%d bytes came back, %v; want %d", got, err, size)
	}
	if text, _ := io.ReadAll(s.stderr); string(text) != "end\n" {
		t.Errorf("standard error is %q", text)
	}
	var exit exitError
	if err := s.end(); !errors.As(err, &exit) || exit.code != "3" {
		t.Errorf("exit code 3 came as %v", err)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func streamTTY(t *testing.T, p *Pod) {
	s := p.session("exec", "web", true, "sh")
	if _, err := s.resize.Write([]byte(`{"Width":101,"Height":37}`)); err != nil {
		t.Fatal(err)
	}
	// The size may come after the shell; it asks until it is there.
	_, err := io.WriteString(s.stdin, "until test \"$(stty size)\" = '37 101'; do sleep 0.1; done; tty; echo si''zed; exit 5\n")
	if err != nil {
		t.Fatal(err)
	}
	out, _ := io.ReadAll(s.stdout)
	if !strings.Contains(string(out), "sized") || !strings.Contains(string(out), "/dev/pts/") {
		t.Errorf("the terminal showed %q", out)
	}
	var exit exitError
	if err := s.end(); !errors.As(err, &exit) || exit.code != "5" {
		t.Errorf("exit code 5 came as %v", err)
	}
}

func streamAttach(t *testing.T, p *Pod) {
	before := p.Status().Container("reader")
	// A detached client leaves the container as it was, and each new one gets the
	// answer to its first line.
	var want strings.Builder
	for n := range 20 {
		fmt.Fprintf(&want, "read line %d\n", n)
		s := p.session("attach", "reader", false)
		if _, err := fmt.Fprintf(s.stdin, "line %d\n", n); err != nil {
			t.Fatal(err)
		}
		if got, err := bufio.NewReader(s.stdout).ReadString('\n'); got != fmt.Sprintf("read line %d\n", n) {
			t.Errorf("the container answered %q, %v", got, err)
		}
		_ = s.conn.Close()
	}
	if log := p.WaitLog("reader", "line 19"); log != want.String() {
		t.Errorf("the log holds %q", log)
	}
	if now := p.Status().Container("reader"); now.ID() != before.ID() || now.RestartCount != 0 {
		t.Errorf("attaching has changed the container: %v", now)
	}
}

func streamAttachTTY(t *testing.T, p *Pod) {
	s := p.session("attach", "terminal", true)
	if _, err := io.WriteString(s.stdin, "echo he''llo\n"); err != nil {
		t.Fatal(err)
	}
	in := bufio.NewReader(s.stdout)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			t.Fatalf("the terminal ended: %v", err)
		}
		if strings.HasPrefix(line, "hello") {
			break
		}
	}
	_ = s.conn.Close()
}

// logs -f: what comes later comes through as well.
func streamLogs(t *testing.T, p *Pod) {
	resp, err := http.NewRequest(http.MethodGet, "https://"+p.k.Addr+"/containerLogs/default/"+p.FullName()+"/web?follow=true", nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := p.k.client.Do(resp)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	in := bufio.NewReader(answer.Body)
	for n := range 3 {
		p.Exec("web", "sh", "-c", fmt.Sprintf("echo later %d > /proc/1/fd/1", n))
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				t.Fatalf("log ended: %v", err)
			}
			if line == fmt.Sprintf("later %d\n", n) {
				break
			}
		}
	}
}

// port-forward: many at once, some dropped in the middle.
func streamForward(t *testing.T, p *Pod) {
	conn := p.k.dial("/portForward/default/"+p.FullName(), "portforward.k8s.io")
	var all sync.WaitGroup
	for id := range 50 {
		all.Go(func() {
			if err := fetch(conn, id, id%5 == 4); err != nil {
				t.Errorf("connection %d: %v", id, err)
			}
		})
	}
	all.Wait()
	// A whole client that goes away with connections open.
	rude := p.k.dial("/portForward/default/"+p.FullName(), "portforward.k8s.io")
	if _, _, err := forward(rude, 80, 1); err != nil {
		t.Error(err)
	}
	_ = rude.Close()
	if err := fetch(conn, 1000, false); err != nil {
		t.Errorf("after a client went away: %v", err)
	}
	// A port that nobody listens on is told as an error on its own stream.
	data, failure, err := forward(conn, 81, 1001)
	if err != nil {
		t.Fatal(err)
	}
	text, _ := io.ReadAll(failure)
	if !strings.Contains(string(text), "refused") {
		t.Errorf("a closed port is told as %q", text)
	}
	_ = data.Reset()
	if err := fetch(conn, 1002, false); err != nil {
		t.Errorf("after a refused port: %v", err)
	}
}

// fetch asks the pod's web server for its page; a rude one goes away instead of
// reading the answer.
func fetch(conn httpstream.Connection, id int, rude bool) error {
	data, _, err := forward(conn, 80, id)
	if err != nil {
		return err
	}
	if _, err := io.WriteString(data, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	if rude {
		return data.Reset()
	}
	answer, err := io.ReadAll(data)
	if err == nil && !strings.Contains(string(answer), "nginx") {
		err = fmt.Errorf("answer is %q", answer)
	}
	return err
}
