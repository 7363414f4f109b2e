package monitor_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor"
)

func skipUnlessV1(t testing.TB) {
	if _, err := os.Stat("/sys/fs/cgroup/freezer"); err != nil {
		t.Skip("needs cgroup v1")
	}
}

// What could not be removed at the exit is not forgotten by Delete.
func TestDeleteUntilNothingIsLeft(t *testing.T) {
	skipUnlessV1(t)
	m := newMachine(t)
	id, _ := m.start("read x", func(r *monitor.StartRequest) { r.Stdin = true })
	// In one hierarchy only, where no list of the container's processes shows it.
	squatter := exec.Command("sleep", "1000")
	must(t, squatter.Start())
	defer squatter.Wait()
	defer squatter.Process.Kill()
	dir := "/sys/fs/cgroup/cpu" + m.cgroup + "/" + id
	must(t, os.WriteFile(dir+"/cgroup.procs", fmt.Append(nil, squatter.Process.Pid), 0))
	must(t, m.CloseStdin(t.Context(), id))
	m.exit(id)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := m.Delete(ctx, id); err == nil {
		t.Error("deleted, with a process in its cgroup")
	}
	must(t, squatter.Process.Kill())
	_ = squatter.Wait()
	must(t, m.Delete(t.Context(), id))
	if dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup + "/" + id); len(dirs) > 0 {
		t.Errorf("cgroup left: %v", dirs)
	}
}

// A container may freeze processes in cgroups that it has made itself.
func TestDeleteFrozenChild(t *testing.T) {
	skipUnlessV1(t)
	m := newMachine(t)
	id, p := m.start("sleep 1000 & echo ready; wait")
	m.awaitLog(id, "ready")
	procs := readFile(t, "/sys/fs/cgroup/devices"+m.cgroup+"/"+id+"/cgroup.procs")
	dir := "/sys/fs/cgroup/freezer" + m.cgroup + "/" + id + "/inner"
	must(t, os.Mkdir(dir, 0o755))
	for pid := range strings.FieldsSeq(procs) {
		if pid != fmt.Sprint(p.PID) {
			must(t, os.WriteFile(dir+"/cgroup.procs", []byte(pid), 0))
		}
	}
	must(t, os.WriteFile(dir+"/freezer.state", []byte("FROZEN"), 0))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	err := m.Delete(ctx, id)
	if err != nil {
		must(t, os.WriteFile(dir+"/freezer.state", []byte("THAWED"), 0)) // let the rest end
	}
	must(t, err)
}

// Containers that ended while neither daemon nor podmon was there hold nobody up.
func TestManyLost(t *testing.T) {
	m := newMachine(t)
	var ids []string
	var pids []monitor.Process
	for range 6 {
		id, p := m.start("printf half; exec sleep 1000")
		m.awaitTaken(id)
		ids, pids = append(ids, id), append(pids, p)
	}
	podmon := m.podmons()[0]
	must(t, m.Close())
	must(t, syscall.Kill(podmon, unix.SIGKILL))
	_, err := syscall.Wait4(podmon, nil, 0, nil)
	must(t, err)
	for _, p := range pids {
		must(t, syscall.Kill(p.PID, unix.SIGKILL))
		awaitGone(t, p)
	}
	began := time.Now()
	m.connect()
	for _, id := range ids {
		m.exit(id)
		if got := m.logged(id); got != "stdout P half\n" {
			t.Errorf("log %q", got)
		}
	}
	if took := time.Since(began); took > 5*time.Second { // 2 s each would be 12
		t.Errorf("took %v", took)
	}
}

// awaitTaken waits until podmon has put an incomplete line on file.
func (m *machine) awaitTaken(id string) {
	m.t.Helper()
	m.awaitFile(filepath.Join(m.o.RunDir, "containers", id, "stdout.rest"))
}

func (m *machine) awaitFile(path string) {
	m.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if st, err := os.Stat(path); err == nil && st.Size() > 0 {
			return
		}
	}
	m.t.Fatalf("%s does not come", path)
}

// An exit is on file before the clearing up that may take long.
func TestExitSurvivesBoth(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("read x; exit 7", func(r *monitor.StartRequest) { r.Stdin = true })
	dir := filepath.Join(m.o.RunDir, "containers", id)
	writer, err := os.OpenFile(filepath.Join(dir, "stdout"), os.O_WRONLY, 0) // holds the output open
	must(t, err)
	defer writer.Close()
	must(t, m.CloseStdin(t.Context(), id))
	m.awaitFile(filepath.Join(dir, "reaped.json"))
	podmon := m.podmons()[0]
	must(t, m.Close())
	must(t, syscall.Kill(podmon, unix.SIGKILL))
	_, err = syscall.Wait4(podmon, nil, 0, nil)
	must(t, err)
	writer.Close()
	m.connect()
	if e := m.exit(id); e.Code != 7 || !e.Known {
		t.Errorf("exit %+v, want 7", e)
	}
}

// A start that hangs can be deleted.
func TestDeleteHungStart(t *testing.T) {
	m := newMachine(t)
	id := m.id()
	r := monitor.StartRequest{ID: id, Spec: m.spec(id, "true"), Discard: true}
	r.Spec.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{{Path: "/bin/sleep", Args: []string{"sleep", "1000"}}}}
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	if _, err := m.Start(ctx, r); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("start: %v", err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	must(t, m.Delete(ctx, id))
	if dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup + "/" + id); len(dirs) > 0 {
		t.Errorf("cgroup left: %v", dirs)
	}
}

// A PID 1 that dies before its program runs leaves no thread of podmon behind.
func TestEarlyDeath(t *testing.T) {
	m := newMachine(t)
	tasks := fmt.Sprintf("/proc/%d/task/*", m.podmons()[0])
	before, _ := filepath.Glob(tasks)
	const starts = 15
	for range starts {
		id := m.id()
		r := monitor.StartRequest{ID: id, Spec: m.spec(id, "true"), Discard: true}
		r.Spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActKillProcess}
		if _, err := m.Start(t.Context(), r); err == nil {
			t.Fatal("started")
		}
	}
	after, _ := filepath.Glob(tasks)
	if len(after) >= len(before)+starts {
		t.Errorf("%d threads, %d before", len(after), len(before))
	}
}

// A terminal outlives a PID 1's closing of it.
func TestTerminalReopened(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("echo one; exec 0<&- 1>&- 2>&-; sleep 0.2; exec 1>/dev/console; echo two; exit 4",
		func(r *monitor.StartRequest) { r.Spec.Process.Terminal = true })
	if e := m.exit(id); e.Code != 4 || !e.Known {
		t.Errorf("exit %+v, want 4", e)
	}
	if got := m.logged(id); got != "stdout F one\r\nstdout F two\r\n" {
		t.Errorf("log %q", got)
	}
}

// A podmon that was started for nothing goes with its Monitor, one that holds something
// stays.
func TestDismiss(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("exec sleep 1000")
	must(t, m.Dismiss(t.Context()))
	must(t, m.Close())
	m.connect()
	if got := len(m.podmons()); got != 1 {
		t.Fatalf("%d podmons with a container, want 1", got)
	}
	must(t, m.Delete(t.Context(), id))
	must(t, syscall.Kill(m.podmons()[0], unix.SIGKILL))
	must(t, m.Close())
	m.connect() // starts another
	must(t, m.Dismiss(t.Context()))
	for deadline := time.Now().Add(10 * time.Second); len(m.podmons()) > 0; {
		if time.Now().After(deadline) {
			t.Fatalf("podmons %v, want none", m.podmons())
		}
	}
	must(t, m.Close())
	if left := m.podmons(); len(left) > 0 {
		t.Errorf("podmons %v after Close: the dismissed one was replaced", left)
	}
	m.connect()
}

// A podmon whose directory is removed, when nobody needs it, ends and makes nothing anew.
func TestRemovedRunDirectory(t *testing.T) {
	m := newMachine(t)
	podmon := m.podmons()[0]
	must(t, m.Close())
	must(t, os.RemoveAll(filepath.Join(m.o.RunDir, "podmon")))
	if _, err := syscall.Wait4(podmon, nil, 0, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(filepath.Join(m.o.RunDir, "podmon")); !os.IsNotExist(err) {
		t.Errorf("its directory: %v", err)
	}
	m.connect()
}

// A podmon whose program has been taken away is replaced by the same program.
func TestReplacedWithoutItsProgram(t *testing.T) {
	m := newMachine(t)
	id, p := m.start("trap 'exit 33' TERM; echo ready; while :; do sleep 0.01; done")
	m.awaitLog(id, "ready")
	must(t, os.Rename(podmonBinary, podmonBinary+".away"))
	defer os.Rename(podmonBinary+".away", podmonBinary)
	must(t, syscall.Kill(m.podmons()[0], unix.SIGKILL))
	must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
	if e := m.exit(id); e.Code != 33 || !e.Known {
		t.Errorf("%v ended with %+v, want 33", p, e)
	}
}

func TestHealth(t *testing.T) {
	m := newMachine(t)
	must(t, m.Health())
	good := m.Monitor
	m.spoilBinary(func() {
		must(t, syscall.Kill(m.podmons()[0], unix.SIGKILL))
		for deadline := time.Now().Add(10 * time.Second); ; {
			if err := good.Health(); err != nil && strings.Contains(err.Error(), "exec format error") {
				t.Log(err)
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("health without a podmon: %v", err)
			}
		}
	})
	id, _ := m.start("exit 0") // waits for the next podmon
	m.exit(id)
	must(t, m.Health())
}

// spoilBinary runs f while podmon's program is none.
func (m *machine) spoilBinary(f func()) {
	m.t.Helper()
	must(m.t, os.Rename(podmonBinary, podmonBinary+".away"))
	defer os.Rename(podmonBinary+".away", podmonBinary)
	must(m.t, os.WriteFile(podmonBinary, []byte("no program"), 0o755))
	f()
}
