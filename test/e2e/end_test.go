package e2e

import (
	"fmt"
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
	path := filepath.Join(p.k.Logs, "default_"+p.FullName()+"_"+s.Metadata.UID, container,
		fmt.Sprintf("%d.log", s.Container(container).RestartCount))
	f, err := os.Open(path)
	if err != nil {
		p.k.t.Fatalf("open log: %v", err)
	}
	p.k.t.Cleanup(func() { _ = f.Close() })
	return f
}

// lastLog is what the container wrote to an open log, as lastLines has it.
func (k *Kubelet) lastLog(f *os.File) string {
	k.t.Helper()
	lines := k.lastLines(f)
	return harness.JoinLog(lines, "stdout") + harness.JoinLog(lines, "stderr")
}

// lastLines is the whole of an open log once kubelet has deleted the file, which it
// does after the container has been removed.
func (k *Kubelet) lastLines(f *os.File) []harness.LogLine {
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
	return lines
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
		return len(children) == 3
	}) {
		t.Fatalf("found %v, want the setsid child, the orphan, and the one that exec left", children)
	}
	log := p.logFile("clean")
	begin := time.Now()
	p.Remove()
	if err := clean.WaitGone(Limit); err != nil {
		t.Fatal(err)
	}
	told := time.Now()
	if !deaf.Alive() {
		t.Error("the one that ignores SIGTERM has not outlived the other")
	}
	if err := deaf.WaitGone(Limit); err != nil {
		t.Fatal(err)
	}
	// Not at once, and not at the end of the usual grace of 30 s.
	if time.Since(begin) < 5*time.Second || time.Since(told) > Limit/8 {
		t.Errorf("the one that ignores SIGTERM ended %v after the removal, and %v after SIGTERM; want its grace of 5 s",
			time.Since(begin), time.Since(told))
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
	p.WaitLog("apache", "resuming normal operations") // before, nothing takes SIGWINCH
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

// P13: codes, reasons, last words; a container of a pod ends for itself.
func testExitCodes(t *testing.T, k *Kubelet) {
	p := k.Run("exit-codes")
	status := p.Wait("ended in each container", func(s PodStatus) bool { return s.Status.Phase == "Failed" })
	for name, want := range map[string]struct {
		code            int
		reason, message string
	}{
		"fine":   {0, "Completed", ""},
		"worded": {4, "Error", "disk is full\n"},
		"logged": {5, "Error", "cannot reach the database\n"},
	} {
		end := status.Container(name).State.Terminated
		if end == nil || end.ExitCode != want.code || end.Reason != want.reason || end.Message != want.message {
			t.Errorf("%v, want %d %s %q", status.Container(name), want.code, want.reason, want.message)
		}
		if n := status.Container(name).RestartCount; n != 0 {
			t.Errorf("%s was restarted %d times", name, n)
		}
	}
	missing := status.Container("missing").State.Terminated
	if missing == nil || missing.ExitCode == 0 || !strings.Contains(missing.Message, "/no/such/program") {
		t.Errorf("%v, want the missing program named", status.Container("missing"))
	}
}

// restartPolicy OnFailure.
func testOnFailure(t *testing.T, k *Kubelet) {
	p := k.Run("on-failure")
	status := p.Wait("done", func(s PodStatus) bool { return s.Status.Phase == "Succeeded" })
	c := status.Container("unsteady")
	if c.RestartCount != 2 || c.State.Terminated == nil || c.State.Terminated.ExitCode != 0 {
		t.Errorf("%v, want two restarts and then success", c)
	}
	if log := p.Logs("unsteady"); log != "try 3\n" {
		t.Errorf("the last log is %q", log)
	}
}

// Restarts by exit code, of a container and of all.
func testRestartRules(t *testing.T, k *Kubelet) {
	p := k.Run("restart-rules")
	p.WaitLog("first", "ran\n")
	sandbox := p.Sandbox()
	status := p.Wait("anew from its init container, and running", func(s PodStatus) bool {
		return s.Ready() && s.Container("whole").RestartCount == 1 && s.Container("again").State.Running != nil
	})
	if log := p.Logs("first"); log != "ran\nran\n" || status.Container("first").RestartCount != 1 {
		t.Errorf("the init container has written %q: %v; want it run twice", log, status.Container("first"))
	}
	// 42 twice, and once with all of the pod.
	if c := status.Container("again"); c.RestartCount != 3 {
		t.Errorf("%v, want 3 restarts", c)
	}
	if now := p.Sandbox(); now != sandbox {
		t.Errorf("sandbox %s became %s", sandbox, now)
	}
}

// P16: an init as PID 1 reaps, sends signals on, starts again what it watches, and
// takes all down.
func testInitSystem(t *testing.T, k *Kubelet) {
	p := k.Run("init-system")
	status := p.WaitReady()
	p.WaitLog("small", "ready\n")
	small, whole := p.Process("small"), p.Process("whole")
	if small.Name != "dumb-init" || whole.Name != "init" {
		t.Errorf("PID 1 are %v and %v", small, whole)
	}
	// The orphan has gone and is no zombie: its init has waited for it.
	if !k.ask(func() bool {
		return len(harness.Processes(func(c harness.Process) bool { return c.Parent == small.PID })) == 1
	}) {
		t.Error("dumb-init keeps more than its one child")
	}
	server := func() []harness.Process {
		return harness.Processes(func(c harness.Process) bool {
			return c.Parent == whole.PID && strings.Contains(c.Read("cmdline"), "httpd")
		})
	}
	if !k.ask(func() bool { return len(server()) == 1 }) {
		t.Fatalf("init's table is not running: %v", processesOf(status.Container("whole").ID()))
	}
	first := server()[0]
	if err := first.Kill(sigkill); err != nil {
		t.Fatal(err)
	}
	if !k.ask(func() bool { now := server(); return len(now) == 1 && now[0].PID != first.PID }) {
		t.Error("init has not started its web server again")
	}
	if c := p.Status().Container("whole"); c.RestartCount != 0 {
		t.Errorf("the container was restarted with it: %v", c)
	}
	logs := map[string]*os.File{"small": p.logFile("small"), "whole": p.logFile("whole")}
	p.Remove()
	for _, init := range []harness.Process{small, whole} {
		if err := init.WaitGone(Limit); err != nil {
			t.Error(err)
		}
	}
	for name, want := range map[string]string{"small": "told to end\n", "whole": "taken down\n"} {
		if log := k.lastLog(logs[name]); !strings.Contains(log, want) {
			t.Errorf("last words of %s are %q, want %q", name, log, want)
		}
	}
}
