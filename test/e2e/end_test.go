package e2e

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/harness"
)

const (
	sigkill = unix.SIGKILL
	sigterm = unix.SIGTERM
)

// logFile opens a container's log file, which can then be read beyond the life of
// the pod.
func (p *Pod) logFile(container string) *os.File {
	p.k.t.Helper()
	s := p.Status()
	path := filepath.Join(p.k.Logs, "default_"+p.FullName()+"_"+s.Metadata.UID, container, "0.log")
	f, err := os.Open(path)
	if err != nil {
		p.k.t.Fatalf("open log: %v", err)
	}
	p.k.t.Cleanup(func() { _ = f.Close() })
	return f
}

// lastLog is the whole of an open log once kubelet has deleted the file, which it
// does after the container has been removed.
func (k *Kubelet) lastLog(f *os.File) string {
	k.t.Helper()
	if !k.ask(func() bool {
		info, err := f.Stat()
		return err == nil && info.Sys().(*syscall.Stat_t).Nlink == 0
	}) {
		k.t.Fatalf("log %s is still there", f.Name())
	}
	data, err := io.ReadAll(f)
	if err != nil {
		k.t.Fatalf("read log: %v", err)
	}
	lines, err := harness.ParseLog(string(data))
	if err != nil {
		k.t.Fatalf("log %s: %v", f.Name(), err)
	}
	return harness.JoinLog(lines, "stdout") + harness.JoinLog(lines, "stderr")
}

// P12: SIGTERM reaches PID 1, which may end well; who ignores it is killed at the
// end of the grace; nothing of a container survives its PID 1.
func testPID1(t *testing.T, k *Kubelet) {
	p := k.Run("pid1")
	p.WaitReady()
	clean, deaf := p.Process("clean"), p.Process("deaf")
	deafID := p.Status().Container("deaf").ID()
	// One that exec starts and leaves behind is the container's as well.
	if _, err := p.TryExec("deaf", "sh", "-c", "setsid sleep 98766 >/dev/null 2>&1 & sleep 0.1"); err != nil {
		t.Fatal(err)
	}
	var children []harness.Process
	if !k.ask(func() bool {
		children = nil
		for _, c := range processesOf(deafID) {
			if strings.Contains(c.Read("cmdline"), "sleep\x009876") {
				children = append(children, c)
			}
		}
		return len(children) == 2
	}) {
		t.Fatalf("found %v, want the setsid child and the one that exec left", children)
	}
	log := p.logFile("clean")
	begin := time.Now()
	p.Remove()
	if err := clean.WaitGone(Limit); err != nil {
		t.Fatal(err)
	}
	if !deaf.Alive() {
		t.Error("the one that ignores SIGTERM has not outlived the other")
	}
	if err := deaf.WaitGone(Limit); err != nil {
		t.Fatal(err)
	}
	// The manifest is seen within a second; a grace is 5 of them.
	if took := time.Since(begin); took < 5*time.Second || took > 15*time.Second {
		t.Errorf("the one that ignores SIGTERM ended after %v, want its grace of 5 s", took)
	}
	for _, c := range children {
		if c.Alive() {
			t.Errorf("%v has survived PID 1", c)
		}
	}
	if got := k.lastLog(log); got != "goodbye\n" {
		t.Errorf("the clean one's last words are %q", got)
	}
}

// Hooks, and the image's stop signal.
func testHooks(t *testing.T, k *Kubelet) {
	p := k.Run("hooks")
	p.WaitReady()
	p.WaitLog("hooked", "postStart hook\n")
	hooked, apache := p.logFile("hooked"), p.logFile("apache")
	p.Remove()
	log := k.lastLog(hooked)
	if i, j := strings.Index(log, "preStop hook\n"), strings.Index(log, "got SIGTERM\n"); i < 0 || j < i {
		t.Errorf("last words are %q, want the preStop hook's and then SIGTERM's", log)
	}
	if log := k.lastLog(apache); !strings.Contains(log, "caught SIGWINCH") {
		t.Errorf("Apache was not stopped by its image's STOPSIGNAL:\n%s", log)
	}
}
