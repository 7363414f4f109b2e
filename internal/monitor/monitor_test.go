package monitor_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/infra"
	"github.com/podshim/podshim/internal/monitor"
)

func TestExitCodesAndLogs(t *testing.T) {
	m := newMachine(t)
	long := strings.Repeat("x", 16<<10)
	for _, tc := range []struct {
		name, script, log string
		code              int32
	}{
		{"quiet", "exit 0", "", 0},
		{"code", "exit 42", "", 42},
		{"signal", "kill -9 $$", "", 0}, // PID 1 of a namespace cannot kill itself
		{"both streams", "echo out; sleep 0.05; echo err >&2; exit 3", "stdout F out\nstderr F err\n", 3},
		{"incomplete", "printf 'a\\nb'", "stdout F a\nstdout P b\n", 0},
		{"long", "printf %s " + long + "yz; echo", "stdout P " + long + "\nstdout F yz\n", 0},
		{"exactly one piece", "printf %s " + long + "; echo", "stdout F " + long + "\n", 0},
		{"empty lines", "echo; echo", "stdout F \nstdout F \n", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			id, p := m.start(tc.script)
			e := m.exit(id)
			if !e.Known || e.Code != tc.code || e.OOMKilled {
				t.Errorf("exit %+v, want code %d", e, tc.code)
			}
			if since := time.Since(e.At); since < 0 || since > 10*time.Second {
				t.Errorf("exit at %v, now %v", e.At, time.Now())
			}
			if got := m.logged(id); got != tc.log {
				t.Errorf("log %.80q, want %.80q", got, tc.log)
			}
			if p.Exists() {
				t.Error("PID 1 is still there")
			}
			if dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup + "/" + id); len(dirs) > 0 {
				t.Errorf("cgroup left: %v", dirs)
			}
			for range 2 {
				must(t, m.Delete(t.Context(), id))
			}
		})
	}
}

func TestStartRefused(t *testing.T) {
	m := newMachine(t)
	outside := t.TempDir()
	must(t, os.Symlink(outside, filepath.Join(m.logs, "link")))
	must(t, unix.Mkfifo(filepath.Join(m.logs, "fifo"), 0o600))
	for name, tc := range map[string]struct {
		edit func(*monitor.StartRequest)
		is   func(error) bool
	}{
		"no program":       {func(r *monitor.StartRequest) { r.Spec.Process.Args = []string{"nonesuch"} }, isErr(monitor.ErrNoExecutable)},
		"no program path":  {func(r *monitor.StartRequest) { r.Spec.Process.Args = []string{"/bin/nonesuch"} }, isErr(monitor.ErrNoExecutable)},
		"not executable":   {func(r *monitor.StartRequest) { r.Spec.Process.Args = []string{"/bin/plain"} }, isErr(monitor.ErrNotExecutable)},
		"no args":          {func(r *monitor.StartRequest) { r.Spec.Process.Args = nil }, errdefs.IsInvalidArgument},
		"bad id":           {func(r *monitor.StartRequest) { r.ID = "../x" }, errdefs.IsInvalidArgument},
		"bad mount":        {func(r *monitor.StartRequest) { r.Spec.Mounts[0].Source, r.Spec.Mounts[0].Type = "/nonesuch", "bind" }, isAny},
		"log above root":   {func(r *monitor.StartRequest) { r.LogPath = "../x" }, isAny},
		"log through link": {func(r *monitor.StartRequest) { r.LogPath = "link/x" }, isAny},
		"log is a fifo":    {func(r *monitor.StartRequest) { r.LogPath = "fifo" }, isAny},
		"bad rlimit":       {func(r *monitor.StartRequest) { r.Spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_X"}} }, errdefs.IsInvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			id := m.id()
			r := monitor.StartRequest{ID: id, Spec: m.spec(id, "true"), LogRoot: m.logs, LogPath: "log"}
			tc.edit(&r)
			if _, err := m.Start(t.Context(), r); err == nil || !tc.is(err) {
				t.Fatalf("error %v", err)
			} else {
				t.Log(err)
			}
			if dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup + "/" + id); len(dirs) > 0 {
				t.Errorf("cgroup left: %v", dirs)
			}
			if left, _ := filepath.Glob(m.o.RunDir + "/*/" + id); len(left) > 0 {
				t.Errorf("files left: %v", left)
			}
			must(t, m.Delete(t.Context(), strings.Trim(id, "./")))
			// The same ID must be free for another try.
			r = monitor.StartRequest{ID: id, Spec: m.spec(id, "true"), LogRoot: m.logs, LogPath: "log"}
			_, err := m.Start(t.Context(), r)
			must(t, err)
			if e := m.exit(id); e.Code != 0 {
				t.Errorf("second try: %+v", e)
			}
		})
	}
	if left, _ := os.ReadDir(outside); len(left) > 0 {
		t.Errorf("written outside the log directory: %v", left)
	}
}

func isErr(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}
func isAny(error) bool { return true }

func TestDuplicate(t *testing.T) {
	m := newMachine(t)
	id, p := m.start("exec sleep 1000")
	_, err := m.Start(t.Context(), monitor.StartRequest{ID: id, Spec: m.spec(id, "true")})
	if !errdefs.IsAlreadyExists(err) {
		t.Errorf("second start: %v", err)
	}
	if !p.Alive() {
		t.Error("the first one is gone")
	}
}

func TestSignals(t *testing.T) {
	m := newMachine(t)
	polite, _ := m.start("trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.01; done")
	m.awaitLog(polite, "ready")
	must(t, m.Signal(t.Context(), polite, unix.SIGTERM, false))
	if e := m.exit(polite); e.Code != 7 || !e.Known {
		t.Errorf("exit %+v, want 7", e)
	}
	if got := m.logged(polite); got != "stdout F ready\nstdout F bye\n" {
		t.Errorf("log %q", got)
	}
	if err := m.Signal(t.Context(), polite, unix.SIGTERM, false); !errdefs.IsNotFound(err) {
		t.Errorf("signal to the dead: %v", err)
	}
	if err := m.Signal(t.Context(), "nonesuch", unix.SIGTERM, false); !errdefs.IsNotFound(err) {
		t.Errorf("signal to the unknown: %v", err)
	}

	deaf, p := m.start("trap '' TERM; echo ready; while :; do sleep 0.01; done")
	m.awaitLog(deaf, "ready")
	must(t, m.Signal(t.Context(), deaf, unix.SIGTERM, false))
	if !p.Alive() {
		t.Fatal("SIGTERM killed it")
	}
	must(t, m.Signal(t.Context(), deaf, unix.SIGKILL, true))
	if e := m.exit(deaf); e.Code != 137 || !e.Known || e.OOMKilled {
		t.Errorf("exit %+v, want 137", e)
	}
}

// SIGTERM must have its default action in a container: podmon catches it, and
// what is ignored would stay ignored across exec.
func TestSignalDispositions(t *testing.T) {
	m := newMachine(t)
	// Not by way of a shell, which ignores SIGQUIT.
	id, _ := m.start("", func(r *monitor.StartRequest) {
		hostPID(r.Spec)
		r.Spec.Process.Args = []string{"tail", "-n", "100", "-f", "/proc/self/status"}
	})
	m.awaitLog(id, "SigCgt:")
	for line := range strings.Lines(strings.ReplaceAll(m.logged(id), "stdout F ", "")) {
		if name, mask, _ := strings.Cut(strings.TrimSpace(line), ":\t"); (name == "SigIgn" || name == "SigBlk") && mask != "0000000000000000" {
			t.Errorf("%s is %s", name, mask)
		}
	}
	must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
	if e := m.exit(id); e.Code != 143 {
		t.Errorf("exit %+v, want 143", e)
	}
}

// gated starts a container whose program is not executed before open is called: a
// StartContainer hook waits.
func (m *machine) gated(edit func(*specs.Spec)) (id string, open func()) {
	m.t.Helper()
	gate := filepath.Join(m.rootfs, "tmp/gate")
	must(m.t, unix.Mkfifo(gate, 0o600))
	id = m.id()
	spec := m.spec(id, "sleep", "1000")
	edit(spec)
	spec.Hooks = &specs.Hooks{StartContainer: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "read x < /tmp/gate"}}}}
	_, err := m.Start(m.t.Context(), monitor.StartRequest{ID: id, Spec: spec, Discard: true})
	must(m.t, err)
	w, err := os.OpenFile(gate, os.O_WRONLY, 0) // returns when the hook is there
	must(m.t, err)
	return id, func() {
		_, err := io.WriteString(w, "go\n")
		must(m.t, err)
		must(m.t, w.Close())
	}
}

// A signal that comes right after the start is not lost in "podmon init", which has
// still to run hooks and to execute the program.
func TestSignalBeforeProgram(t *testing.T) {
	for name, adopted := range map[string]bool{"by the podmon that started it": false, "by another one": true} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			id, open := m.gated(hostPID) // else the kernel drops what has no handler
			if adopted {
				must(t, m.Upgrade(t.Context()))
			}
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if err := m.Signal(ctx, id, unix.SIGUSR1, false); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("signal before the program is there: %v", err)
			}
			signalled := make(chan error, 1)
			go func() { signalled <- m.Signal(t.Context(), id, unix.SIGUSR1, false) }()
			open()
			must(t, <-signalled)
			if e := m.exit(id); e.Code != 128+int32(unix.SIGUSR1) || !e.Known {
				t.Errorf("exit %+v", e)
			}
		})
	}
}

// An exec that comes right after the start, as kubelet's postStart hook does, finds
// the container's program as PID 1: "podmon init" lets nobody into its /proc.
func TestExecBeforeProgram(t *testing.T) {
	m := newMachine(t)
	id, open := m.gated(func(*specs.Spec) {})
	write := monitor.ExecRequest{ContainerID: id, Process: process("sh", "-c", "echo hook > /proc/1/fd/1")}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := m.Exec(ctx, write); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("exec before the program is there: %v", err)
	}
	type started struct {
		*monitor.Exec
		error
	}
	execed := make(chan started, 1)
	go func() {
		x, err := m.Exec(t.Context(), write)
		execed <- started{x, err}
	}()
	open()
	x := <-execed
	must(t, x.error)
	if e, err := x.Wait(t.Context()); err != nil || e.Code != 0 {
		t.Errorf("exec: %+v, %v", e, err)
	}
}

func readFile(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	return string(b)
}

// P12: no process is left behind when PID 1 ends, also without a PID namespace.
func TestLeftoversDie(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("setsid sleep 4321 & setsid sh -c 'while :; do sh -c : & sleep 0.01; done' & echo ready; cat; exit 5",
		func(r *monitor.StartRequest) { hostPID(r.Spec); r.Stdin = true })
	m.awaitLog(id, "ready")
	x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: process("sh", "-c", "setsid sleep 4321 & exit 0")})
	must(t, err)
	if e, err := x.Wait(t.Context()); err != nil || e.Code != 0 {
		t.Fatalf("exec: %+v, %v", e, err)
	}
	procs, err := os.ReadFile("/sys/fs/cgroup/pids" + m.cgroup + "/" + id + "/cgroup.procs")
	must(t, err)
	if strings.Count(string(procs), "\n") < 4 {
		t.Fatalf("too few processes: %q", procs)
	}
	must(t, m.CloseStdin(t.Context(), id))
	if e := m.exit(id); e.Code != 5 {
		t.Errorf("exit %+v, want 5", e)
	}
	for line := range strings.Lines(string(procs)) {
		dir := "/proc/" + strings.TrimSpace(line)
		cgroup, _ := os.ReadFile(dir + "/cgroup")
		stat, _ := os.ReadFile(dir + "/stat")
		// A zombie waits for the host's init, and is dead.
		if strings.Contains(string(cgroup), id) && !strings.Contains(string(stat), ") Z ") {
			t.Errorf("process %s is left: %s", strings.TrimSpace(line), stat)
		}
	}
	if dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup + "/" + id); len(dirs) > 0 {
		t.Errorf("cgroup left: %v", dirs)
	}
}

func TestOOM(t *testing.T) {
	m := newMachine(t)
	limit := int64(16 << 20)
	limited := func(r *monitor.StartRequest) {
		r.Spec.Mounts = append(r.Spec.Mounts, specs.Mount{Destination: "/dev/zero", Type: "bind", Source: "/dev/zero", Options: []string{"bind"}})
		r.Spec.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit, Swap: &limit}
		r.Spec.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	id, _ := m.start("exec tail /dev/zero", limited)
	if e := m.exit(id); !e.OOMKilled || e.Code != 137 || !e.Known {
		t.Errorf("exit %+v, want an OOM kill", e)
	}
	// A child had no memory; PID 1 is killed by whoever stops the container.
	for _, all := range []bool{false, true} {
		id, _ = m.start("tail /dev/zero; echo survived; exec sleep 1000", limited)
		m.awaitLog(id, "survived")
		must(t, m.Signal(t.Context(), id, unix.SIGKILL, all))
		if e := m.exit(id); e.OOMKilled || e.Code != 137 || !e.Known {
			t.Errorf("exit %+v, want a kill that is no OOM kill", e)
		}
	}
}

func TestStdin(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("cat; echo end", func(r *monitor.StartRequest) { r.Stdin = true })
	in, err := m.Stdin(id)
	must(t, err)
	_, err = io.WriteString(in, "hello\n")
	must(t, err)
	must(t, in.Close())
	m.awaitLog(id, "hello")
	must(t, m.CloseStdin(t.Context(), id))
	if e := m.exit(id); e.Code != 0 {
		t.Errorf("exit %+v", e)
	}
	if got := m.logged(id); got != "stdout F hello\nstdout F end\n" {
		t.Errorf("log %q", got)
	}
	none, _ := m.start("cat; exec sleep 1000")
	if _, err := m.Stdin(none); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("stdin of a container without one: %v", err)
	}
}

func TestTerminal(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("tty; stty size; read x; echo got $x; stty size", func(r *monitor.StartRequest) {
		r.Spec.Process.Terminal = true
		r.Spec.Process.ConsoleSize = &specs.Box{Height: 33, Width: 77}
	})
	m.awaitLog(id, "33 77")
	console, err := m.Console(id)
	must(t, err)
	defer console.Close()
	raw, err := console.SyscallConn()
	must(t, err)
	must(t, raw.Control(func(fd uintptr) {
		err = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: 20, Col: 50})
	}))
	must(t, err)
	_, err = io.WriteString(console, "line\n")
	must(t, err)
	if e := m.exit(id); e.Code != 0 {
		t.Errorf("exit %+v", e)
	}
	got := m.logged(id)
	for _, want := range []string{"stdout F /dev/pts/0", "stdout F 33 77", "stdout F got line", "stdout F 20 50"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in the log %q", want, got)
		}
	}
}

func TestExec(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("exec sleep 1000")
	for _, tc := range []struct {
		script, in, out, err string
		code                 int32
	}{
		{"exit 0", "", "", "", 0},
		{"echo out; echo err >&2; exit 9", "", "out\n", "err\n", 9},
		{"cat", "through", "through", "", 0},
		{"kill -TERM $$", "", "", "", 143},
	} {
		stdin, stdout, stderr := newPipe(t), newPipe(t), newPipe(t)
		x, err := m.Exec(t.Context(), monitor.ExecRequest{
			ContainerID: id, Process: process("sh", "-c", tc.script),
			Stdin: stdin.r, Stdout: stdout.w, Stderr: stderr.w,
		})
		must(t, err)
		stdin.r.Close()
		stdout.w.Close()
		stderr.w.Close()
		_, err = io.WriteString(stdin.w, tc.in)
		if err != nil && !errors.Is(err, unix.EPIPE) {
			t.Error(err)
		}
		stdin.w.Close()
		if got := stdout.all(t); got != tc.out {
			t.Errorf("%s: stdout %q", tc.script, got)
		}
		if got := stderr.all(t); got != tc.err {
			t.Errorf("%s: stderr %q", tc.script, got)
		}
		e, err := x.Wait(t.Context())
		if err != nil || !e.Known || e.Code != tc.code {
			t.Errorf("%s: %+v, %v", tc.script, e, err)
		}
	}
	for want, args := range map[error][]string{
		monitor.ErrNoExecutable: {"nonesuch"}, monitor.ErrNotExecutable: {"/bin/plain"},
	} {
		_, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: process(args...)})
		if !errors.Is(err, want) || !errdefs.IsInvalidArgument(err) {
			t.Errorf("exec %v: %v", args, err)
		}
	}
	if _, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: "nonesuch", Process: process("true")}); !errdefs.IsNotFound(err) {
		t.Errorf("exec in the unknown: %v", err)
	}
	must(t, m.Signal(t.Context(), id, unix.SIGKILL, false))
	m.exit(id)
	if _, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: process("true")}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec in the dead: %v", err)
	}
}

type pipe struct{ r, w *os.File }

func newPipe(t testing.TB) pipe {
	t.Helper()
	r, w, err := os.Pipe()
	must(t, err)
	t.Cleanup(func() { r.Close(); w.Close() })
	return pipe{r, w}
}

func (p pipe) all(t testing.TB) string {
	t.Helper()
	must(t, p.r.SetReadDeadline(time.Now().Add(20*time.Second)))
	b, err := io.ReadAll(p.r)
	must(t, err)
	return string(b)
}

func TestExecTerminal(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("exec sleep 1000")
	p := process("sh", "-c", "tty; stty size; read x; exit $x")
	p.Terminal, p.ConsoleSize = true, &specs.Box{Height: 11, Width: 22}
	x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: p})
	must(t, err)
	defer x.Console.Close()
	must(t, x.Console.SetReadDeadline(time.Now().Add(10*time.Second)))
	lines := bufio.NewScanner(x.Console)
	for _, want := range []string{"/dev/pts/0", "11 22"} {
		if !lines.Scan() || strings.TrimSpace(lines.Text()) != want {
			t.Errorf("terminal says %q, want %q", lines.Text(), want)
		}
	}
	_, err = io.WriteString(x.Console, "6\n")
	must(t, err)
	if e, err := x.Wait(t.Context()); err != nil || e.Code != 6 {
		t.Errorf("exit %+v, %v", e, err)
	}
}

func TestExecKilled(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("exec sleep 1000")
	x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: process("sleep", "1000")})
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := x.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("wait: %v", err)
	}
	must(t, x.Kill(unix.SIGKILL))
	if e, err := x.Wait(t.Context()); err != nil || e.Code != 137 {
		t.Errorf("exit %+v, %v", e, err)
	}
	must(t, x.Kill(unix.SIGKILL))
}

func TestAttach(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("read x; echo out $x; echo err $x >&2; read x; exit 0", func(r *monitor.StartRequest) { r.Stdin = true })
	stdout, stderr := newPipe(t), newPipe(t)
	slow := newPipe(t) // nobody reads it
	done, attached := make(chan error, 2), make(chan struct{})
	go func() {
		done <- m.Attach(t.Context(), monitor.AttachRequest{
			ContainerID: id, Stdout: stdout.w, Stderr: stderr.w, Attached: func() { close(attached) },
		})
		stdout.w.Close()
		stderr.w.Close()
	}()
	in, err := m.Stdin(id)
	must(t, err)
	defer in.Close()
	<-attached
	_, err = io.WriteString(in, "1\n")
	must(t, err)
	line, err := bufio.NewReader(stdout.r).ReadString('\n')
	if err != nil || line != "out 1\n" {
		t.Errorf("attached stdout %q, %v", line, err)
	}
	line, err = bufio.NewReader(stderr.r).ReadString('\n')
	if err != nil || line != "err 1\n" {
		t.Errorf("attached stderr %q, %v", line, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		done <- m.Attach(ctx, monitor.AttachRequest{ContainerID: id, Stdout: slow.w, Attached: cancel})
	}()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled attach: %v", err)
	}
	_, err = io.WriteString(in, "2\n")
	must(t, err)
	m.exit(id)
	if err := <-done; err != nil {
		t.Errorf("attach: %v", err)
	}
}

// A reader that reads nothing must not make the container wait.
func TestAttachSlowReader(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("read x; seq 1 400000; exit 0", func(r *monitor.StartRequest) { r.Stdin = true })
	slow := newPipe(t)
	done, attached := make(chan error, 1), make(chan struct{})
	go func() {
		done <- m.Attach(t.Context(), monitor.AttachRequest{
			ContainerID: id, Stdout: slow.w, Attached: func() { close(attached) },
		})
	}()
	in, err := m.Stdin(id)
	must(t, err)
	defer in.Close()
	<-attached
	_, err = io.WriteString(in, "\n")
	must(t, err)
	if e := m.exit(id); e.Code != 0 {
		t.Errorf("exit %+v", e)
	}
	if err := <-done; !errdefs.IsAborted(err) {
		t.Errorf("attach of a slow reader: %v", err)
	}
	if n := strings.Count(m.logged(id), "\n"); n != 400000 {
		t.Errorf("%d lines in the log", n)
	}
}

// No line is lost when the log is renamed under a writing container.
func TestReopenLog(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("i=0; while [ $i -lt 20000 ]; do echo line $i; i=$((i+1)); done")
	path := filepath.Join(m.logs, id, "0.log")
	var files []string
	for i := range 5 {
		old := fmt.Sprintf("%s.%d", path, i)
		must(t, os.Rename(path, old))
		files = append(files, old)
		if err := m.ReopenLog(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	if e := m.exit(id); e.Code != 0 {
		t.Errorf("exit %+v", e)
	}
	var all strings.Builder
	for _, f := range append(files, path) {
		all.WriteString(readLog(t, f))
	}
	i := 0
	for line := range strings.Lines(all.String()) {
		if want := fmt.Sprintf("stdout F line %d\n", i); line != want {
			t.Fatalf("line %q, want %q", line, want)
		}
		i++
	}
	if i != 20000 {
		t.Errorf("%d lines", i)
	}
}

func TestUpdate(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("exec sleep 1000")
	limit, quota, period := int64(64<<20), int64(50000), uint64(100000)
	must(t, m.Update(t.Context(), id, &specs.LinuxResources{
		Memory: &specs.LinuxMemory{Limit: &limit}, CPU: &specs.LinuxCPU{Quota: &quota, Period: &period},
	}, nil))
	for file, want := range map[string]string{"memory/%s/memory.limit_in_bytes": "67108864", "cpu/%s/cpu.cfs_quota_us": "50000"} {
		path := "/sys/fs/cgroup/" + fmt.Sprintf(file, strings.Trim(m.cgroup, "/")+"/"+id)
		if got := strings.TrimSpace(readFile(t, path)); got != want {
			t.Errorf("%s is %s, want %s", path, got, want)
		}
	}
	x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: process("true")})
	must(t, err)
	if e, err := x.Wait(t.Context()); err != nil || e.Code != 0 {
		t.Errorf("exec after update: %+v, %v", e, err)
	}
}

// The daemon restarts: containers and podmon go on, and an exit in between is told.
func TestDaemonRestart(t *testing.T) {
	m := newMachine(t)
	lives, p := m.start("i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done")
	ends, endsP := m.start("read x; exit 4", func(r *monitor.StartRequest) { r.Stdin = true })
	in, err := m.Stdin(ends)
	must(t, err)
	podmon := m.podmons()
	must(t, m.Close())
	_, err = io.WriteString(in, "go\n")
	must(t, err)
	in.Close()
	awaitGone(t, endsP)
	m.connect()
	if again := m.podmons(); len(podmon) != 1 || len(again) != 1 || again[0] != podmon[0] {
		t.Errorf("podmons %v, then %v", podmon, again)
	}
	if e := m.exit(ends); e.Code != 4 || !e.Known {
		t.Errorf("exit %+v, want 4", e)
	}
	found := map[string]monitor.Status{}
	for _, s := range m.List() {
		found[s.ID] = s
	}
	if s := found[lives]; s.Process != p || s.Exit != nil || !p.Alive() {
		t.Errorf("running container: %+v", s)
	}
	must(t, m.Signal(t.Context(), lives, unix.SIGKILL, false))
	m.exit(lives)
	checkCounting(t, m.logged(lives))
}

func awaitGone(t testing.TB, p monitor.Process) {
	t.Helper()
	fd, err := unix.PidfdOpen(p.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	must(t, err)
	defer unix.Close(fd)
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 20000); n == 0 {
		t.Fatalf("process %d does not end: %v", p.PID, err)
	}
}

// checkCounting checks that a log counts from 0 without a gap.
func checkCounting(t testing.TB, log string) int {
	t.Helper()
	i := 0
	for line := range strings.Lines(log) {
		if want := fmt.Sprintf("stdout F %d\n", i); line != want {
			t.Fatalf("line %d is %q", i, line)
		}
		i++
	}
	return i
}

// podmon is killed, or stops answering, under running containers.
func TestPodmonLost(t *testing.T) {
	for name, sig := range map[string]syscall.Signal{"killed": unix.SIGKILL, "stopped": unix.SIGSTOP} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			counts, p := m.start("trap 'exit 33' TERM; i=0; while :; do echo $i; i=$((i+1)); done")
			reads, _ := m.start("read x; echo got $x; exit 21", func(r *monitor.StartRequest) { r.Stdin = true })
			tty, _ := m.start("read x; echo got $x; exit 22", func(r *monitor.StartRequest) { r.Spec.Process.Terminal = true })
			half, _ := m.start("printf half; read x; echo $x", func(r *monitor.StartRequest) { r.Stdin = true })
			done, _ := m.start("exit 3")
			m.exit(done)
			m.awaitLog(counts, " 100\n")
			old := m.podmons()
			must(t, syscall.Kill(old[0], sig))
			oldProcess := monitor.Process{PID: old[0]}
			awaitGone(t, oldProcess)

			// Each of these waits for the hand-over.
			must(t, m.ReopenLog(t.Context(), counts))
			x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: counts, Process: process("true")})
			must(t, err)
			if e, err := x.Wait(t.Context()); err != nil || e.Code != 0 {
				t.Errorf("exec: %+v, %v", e, err)
			}
			if again := m.podmons(); len(again) != 1 || again[0] == old[0] {
				t.Errorf("podmons %v, then %v", old, again)
			}
			if !p.Alive() {
				t.Error("PID 1 is gone")
			}
			in, err := m.Stdin(reads)
			must(t, err)
			_, err = io.WriteString(in, "input\n")
			must(t, err)
			in.Close()
			if e := m.exit(reads); e.Code != 21 || !e.Known {
				t.Errorf("exit of the reading one: %+v", e)
			}
			if got := m.logged(reads); got != "stdout F got input\n" {
				t.Errorf("log %q", got)
			}
			in, err = m.Stdin(half)
			must(t, err)
			_, err = io.WriteString(in, "done\n")
			must(t, err)
			in.Close()
			m.exit(half)
			if got := m.logged(half); got != "stdout F halfdone\n" {
				t.Errorf("log %q", got)
			}
			console, err := m.Console(tty)
			must(t, err)
			_, err = io.WriteString(console, "input\n")
			must(t, err)
			console.Close()
			if e := m.exit(tty); e.Code != 22 || !e.Known {
				t.Errorf("exit of the terminal: %+v", e)
			}
			must(t, m.Signal(t.Context(), counts, unix.SIGTERM, false))
			if e := m.exit(counts); e.Code != 33 || !e.Known {
				t.Errorf("exit of the counting one: %+v", e)
			}
			t.Logf("%d lines", checkCounting(t, m.logged(counts)))
			must(t, m.Delete(t.Context(), done))
		})
	}
}

// Daemon and podmon die together; the next daemon finds the containers.
func TestBothLost(t *testing.T) {
	m := newMachine(t)
	id, p := m.start("trap 'exit 33' TERM; i=0; while :; do echo $i; i=$((i+1)); done")
	m.awaitLog(id, " 100\n")
	podmon := m.podmons()
	must(t, m.Close())
	must(t, syscall.Kill(podmon[0], unix.SIGKILL))
	_, err := syscall.Wait4(podmon[0], nil, 0, nil)
	must(t, err)
	m.connect()
	if !p.Alive() {
		t.Fatal("PID 1 is gone")
	}
	must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
	if e := m.exit(id); e.Code != 33 || !e.Known {
		t.Errorf("exit %+v, want 33", e)
	}
	t.Logf("%d lines", checkCounting(t, m.logged(id)))
}

func TestUpgrade(t *testing.T) {
	m := newMachine(t)
	id, p := m.start("trap 'exit 33' TERM; i=0; while :; do echo $i; i=$((i+1)); done")
	m.awaitLog(id, " 100\n")
	old := m.podmons()
	live, done, attached := newPipe(t), make(chan error, 1), make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, live.r) }()
	go func() {
		done <- m.Attach(t.Context(), monitor.AttachRequest{
			ContainerID: id, Stdout: live.w, Attached: func() { close(attached) },
		})
	}()
	<-attached
	must(t, m.Upgrade(t.Context()))
	if err := <-done; !errdefs.IsUnavailable(err) {
		t.Errorf("attachment ended with %v", err)
	}
	awaitGone(t, monitor.Process{PID: old[0]})
	must(t, m.ReopenLog(t.Context(), id))
	if again := m.podmons(); len(again) != 1 || again[0] == old[0] {
		t.Errorf("podmons %v, then %v", old, again)
	}
	if !p.Alive() {
		t.Fatal("PID 1 is gone")
	}
	must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
	if e := m.exit(id); e.Code != 33 || !e.Known {
		t.Errorf("exit %+v, want 33", e)
	}
	t.Logf("%d lines", checkCounting(t, m.logged(id)))
}

// steps times the parts of an operation and reports the least and the median of
// each in ms: on a busy machine the mean says little.
type steps map[string][]time.Duration

func (s steps) time(name string, f func()) {
	began := time.Now()
	f()
	s[name] = append(s[name], time.Since(began))
}

func (s steps) report(b *testing.B) {
	for name, all := range s {
		slices.Sort(all)
		b.ReportMetric(float64(all[0].Microseconds())/1000, name+"-least-ms")
		b.ReportMetric(float64(all[len(all)/2].Microseconds())/1000, name+"-median-ms")
	}
}

// apart is the time between two starts or execs on a node, roughly: what one has warmed
// up in the kernel is cold again when the next one comes (rcu_sync, which a move between
// cgroups of v1 takes).
func apart() { time.Sleep(50 * time.Millisecond) }

func BenchmarkStartDelete(b *testing.B) {
	m, s := newMachine(b), steps{}
	for b.Loop() {
		var id string
		apart()
		s.time("start", func() { id, _ = m.start("exec sleep 1000") })
		s.time("delete", func() { must(b, m.Delete(b.Context(), id)) })
	}
	s.report(b)
}

// BenchmarkInfra is the first step of every pod.
func BenchmarkInfra(b *testing.B) {
	m, s := newMachine(b), steps{}
	rootfs, err := infra.Install(filepath.Join(b.TempDir(), "infra"))
	must(b, err)
	for b.Loop() {
		r := m.pause(rootfs)
		id := r.ID
		s.time("start", func() {
			_, err := m.Start(b.Context(), r)
			must(b, err)
		})
		s.time("delete", func() { must(b, m.Delete(b.Context(), id)) })
	}
	s.report(b)
}

func BenchmarkExec(b *testing.B) {
	m, s := newMachine(b), steps{}
	id, _ := m.start("exec sleep 1000")
	for b.Loop() {
		apart()
		s.time("exec", func() {
			x, err := m.Exec(b.Context(), monitor.ExecRequest{ContainerID: id, Process: process("true")})
			must(b, err)
			if e, err := x.Wait(b.Context()); err != nil || e.Code != 0 {
				b.Fatalf("%+v, %v", e, err)
			}
		})
	}
	s.report(b)
}

// BenchmarkMemory reports what podmon's memory (PSS) grows by for each pod of an
// infra and an app container that has written a little and is idle.
func BenchmarkMemory(b *testing.B) {
	m := newMachine(b)
	rootfs, err := infra.Install(filepath.Join(b.TempDir(), "infra"))
	must(b, err)
	const pods = 60
	for b.Loop() {
		podmon := m.podmons()[0]
		before := pss(b, podmon)
		for range pods {
			_, err := m.Start(b.Context(), m.pause(rootfs))
			must(b, err)
			app, _ := m.start("echo hello; exec sleep 1000")
			m.awaitLog(app, "hello")
		}
		b.ReportMetric(float64(before), "empty-kB")
		b.ReportMetric(float64(pss(b, podmon)-before)/pods, "kB/pod")
	}
}

func pss(t testing.TB, pid int) int {
	t.Helper()
	var kb int
	for line := range strings.Lines(readFile(t, fmt.Sprintf("/proc/%d/smaps_rollup", pid))) {
		if _, err := fmt.Sscanf(line, "Pss: %d kB", &kb); err == nil {
			return kb
		}
	}
	t.Fatal("no Pss")
	return 0
}

func TestSeccomp(t *testing.T) {
	m := newMachine(t)
	errno := uint(unix.EXDEV)
	id, _ := m.start("mkdir /tmp/x; exit 0", func(r *monitor.StartRequest) {
		r.Spec.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow,
			Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchAARCH64},
			Syscalls: []specs.LinuxSyscall{
				{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: &errno},
			},
		}
	})
	m.exit(id)
	if got := m.logged(id); !strings.Contains(got, "cross-device link") {
		t.Errorf("log %q", got)
	}
}

// A container in a user namespace owns its stdio: it can open /dev/stdout anew.
func TestUserNamespace(t *testing.T) {
	m := newMachine(t)
	// The namespace's root must get to the rootfs.
	for dir := m.rootfs; dir != "/tmp" && dir != "/"; dir = filepath.Dir(dir) {
		must(t, os.Chmod(dir, 0o755))
	}
	id, p := m.start("id -u; echo again > /proc/self/fd/1; exec sleep 1000", func(r *monitor.StartRequest) {
		l := r.Spec.Linux
		l.Namespaces = append(l.Namespaces, specs.LinuxNamespace{Type: specs.UserNamespace},
			specs.LinuxNamespace{Type: specs.NetworkNamespace})
		ids := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 65536}}
		l.UIDMappings, l.GIDMappings = ids, ids
		r.Spec.Mounts = r.Spec.Mounts[:2]
	})
	m.awaitLog(id, "again")
	if got := m.logged(id); got != "stdout F 0\nstdout F again\n" {
		t.Errorf("log %q", got)
	}
	var st unix.Stat_t
	must(t, unix.Stat(fmt.Sprintf("/proc/%d", p.PID), &st))
	if st.Uid != 200000 {
		t.Errorf("runs as %d", st.Uid)
	}
	x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: process("sh", "-c", "exit $(id -u)")})
	must(t, err)
	if e, err := x.Wait(t.Context()); err != nil || e.Code != 0 {
		t.Errorf("exec: %+v, %v", e, err)
	}
}

// An exec whose caller has gone must not stay.
func TestExecAbandoned(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("exec sleep 1000")
	procs := "/sys/fs/cgroup/pids" + m.cgroup + "/" + id + "/cgroup.procs"
	for i := range 30 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*500*time.Microsecond)
		x, err := m.Exec(ctx, monitor.ExecRequest{ContainerID: id, Process: process("sleep", "1000")})
		cancel()
		if err == nil {
			must(t, x.Kill(unix.SIGKILL))
		} else if !errors.Is(err, context.DeadlineExceeded) {
			t.Fatal(err)
		}
	}
	left := ""
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if left = readFile(t, procs); strings.Count(left, "\n") == 1 {
			return
		}
	}
	t.Errorf("processes left: %q", left)
}

// Many starts, execs and deletions at once.
func TestConcurrency(t *testing.T) {
	m := newMachine(t)
	var wg sync.WaitGroup
	for i := range 12 {
		id := m.id()
		wg.Go(func() {
			for range 2 {
				s := m.spec(id, "sh", "-c", "echo up; exec sleep 1000")
				if _, err := m.Start(t.Context(), monitor.StartRequest{ID: id, Spec: s, LogRoot: m.logs, LogPath: id}); err != nil {
					t.Error(err)
					return
				}
				x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: process("sh", "-c", fmt.Sprint("exit ", i))})
				if err != nil {
					t.Error(err)
				} else if e, err := x.Wait(t.Context()); err != nil || e.Code != int32(i) {
					t.Errorf("exec %d: %+v, %v", i, e, err)
				}
				if err := m.Delete(t.Context(), id); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if left := m.List(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// Containers are deleted while execs are being started in them. A helper that
// is killed half way must not keep PID 1 from ending.
func TestDeleteDuringExec(t *testing.T) {
	m := newMachine(t)
	for i := range 10 {
		id, p := m.start("exec sleep 1000")
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				out := newPipe(t)
				x, err := m.Exec(t.Context(), monitor.ExecRequest{
					ContainerID: id, Process: process("sh", "-c", "[ -e /bin/plain ] || echo escaped; exec sleep 1000"),
					Stdout: out.w, Stderr: out.w,
				})
				out.w.Close()
				if err == nil {
					_, err = x.Wait(t.Context())
				}
				// libcontainer runs it on the host when the container is destroyed.
				if said := out.all(t); said != "" {
					t.Errorf("exec said %q", said)
				}
				if err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
					t.Log(err) // runc's words for a process that was killed half way
				}
			})
		}
		time.Sleep(time.Duration(i) * time.Millisecond) // hit different moments
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		must(t, m.Delete(ctx, id))
		cancel()
		if p.Exists() {
			t.Error("PID 1 is left")
		}
		wg.Wait()
	}
}
