package monitor_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podshim/podshim/internal/monitor"
)

// A program that looks at its cgroups as the first thing it does finds itself in those of
// its container, in every hierarchy: as PID 1, by exec, and by exec of a podmon that has
// taken the container over. No thread of podmon ever stays there.
func TestInItsCgroups(t *testing.T) {
	m := newMachine(t)
	look := []string{"cat", "/proc/self/cgroup"}
	id, _ := m.start("", func(r *monitor.StartRequest) { r.Spec.Process.Args = look })
	m.exit(id)
	m.within(id, m.logged(id))

	id, _ = m.start("echo up; exec sleep 1000")
	m.awaitLog(id, "up")
	m.within(id, m.execOutput(id, look...))
	for _, pid := range m.podmons() {
		m.outside(pid)
		must(t, syscall.Kill(pid, syscall.SIGKILL))
		awaitGone(t, monitor.Process{PID: pid})
	}
	must(t, m.ReopenLog(t.Context(), id)) // waits for the hand-over
	m.within(id, m.execOutput(id, look...))
	limit := int64(50)
	must(t, m.Update(t.Context(), id, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &limit}}, nil))
	m.within(id, m.execOutput(id, look...))
	for _, pid := range m.podmons() {
		m.outside(pid)
	}
}

// within checks the text of a /proc/PID/cgroup.
func (m *machine) within(id, text string) {
	m.t.Helper()
	if text == "" {
		m.t.Fatal("no cgroups")
	}
	for line := range strings.Lines(text) {
		if !strings.HasSuffix(line, m.cgroup+"/"+id+"\n") {
			m.t.Errorf("not in the container's cgroup: %q", line)
		}
	}
}

// outside checks every thread of a process.
func (m *machine) outside(pid int) {
	m.t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/cgroup", pid))
	must(m.t, err)
	if len(tasks) == 0 {
		m.t.Fatalf("%d has no threads", pid)
	}
	for _, path := range tasks {
		if text, _ := os.ReadFile(path); strings.Contains(string(text), m.cgroup) {
			m.t.Errorf("%s is in a container's cgroup:\n%s", path, text)
		}
	}
}

// execOutput runs a program in the container and returns what it writes.
func (m *machine) execOutput(id string, args ...string) string {
	m.t.Helper()
	out, in, err := os.Pipe()
	must(m.t, err)
	defer out.Close()
	x, err := m.Exec(m.t.Context(), monitor.ExecRequest{ContainerID: id, Process: process(args...), Stdout: in})
	in.Close()
	must(m.t, err)
	if e, err := x.Wait(m.t.Context()); err != nil || e.Code != 0 {
		m.t.Fatalf("exec %v: %+v, %v", args, e, err)
	}
	text := make([]byte, 8<<10) // less than a pipe holds
	n, _ := out.Read(text)
	return string(text[:n])
}

// The limits hold before the program's first instruction, and before that of the hooks
// that are told of the container.
func TestLimitsBeforeProgram(t *testing.T) {
	m := newMachine(t)
	limited := func(n int64) func(r *monitor.StartRequest) {
		return func(r *monitor.StartRequest) {
			r.Spec.Linux.Resources.Pids = &specs.LinuxPids{Limit: &n}
		}
	}
	id, _ := m.start("sleep 0 && echo forked", limited(1))
	m.exit(id)
	if log := m.logged(id); !strings.Contains(log, "can't fork") {
		t.Errorf("a program that may not fork says %q", log)
	}

	seen := filepath.Join(t.TempDir(), "pids.max")
	id, _ = m.start("exec sleep 1000", limited(77), func(r *monitor.StartRequest) {
		dir := r.Spec.Linux.CgroupsPath
		r.Spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{
			Path: "/bin/sh",
			Args: []string{"sh", "-c", "cat /sys/fs/cgroup/pids" + dir + "/pids.max /sys/fs/cgroup" + dir + "/pids.max 2>/dev/null >" + seen + "; true"},
		}}}
	})
	text, err := os.ReadFile(seen)
	must(t, err)
	if n, _ := strconv.Atoi(strings.TrimSpace(string(text))); n != 77 {
		t.Errorf("the hook has seen the limit %q, want 77", text)
	}
	m.within(id, m.execOutput(id, "cat", "/proc/self/cgroup"))
}
