package monitor_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor"
)

const countForever = "trap 'exit 33' TERM; i=0; while :; do echo $i; i=$((i+1)); done"

// watchLog returns a channel that gets every log message containing text.
func (m *machine) watchLog(text string) <-chan string {
	h := &logHook{text: text, seen: make(chan string, 1000)}
	m.o.Log.Logger.AddHook(h)
	return h.seen
}

type logHook struct {
	text string
	seen chan string
}

func (h *logHook) Levels() []logrus.Level { return logrus.AllLevels }
func (h *logHook) Fire(e *logrus.Entry) error {
	if strings.Contains(e.Message, h.text) {
		h.seen <- e.Message
	}
	return nil
}

func await[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		t.Fatalf("%s does not come", what)
		panic("unreachable")
	}
}

// A container that cannot be taken over at once has not ended for that.
func TestHandOverDifficult(t *testing.T) {
	for name, damage := range map[string]func(m *machine, id string) (repair func()){
		"incomplete line damaged": func(m *machine, id string) func() {
			must(m.t, os.WriteFile(filepath.Join(m.o.RunDir, "containers", id, "stdout.rest"), []byte("12345678\xff\xff\xff\xffx"), 0o600))
			return nil
		},
		"record not writable": func(m *machine, id string) func() {
			must(m.t, os.Mkdir(filepath.Join(m.o.RunDir, "containers", id, ".record.json"), 0o700))
			return nil
		},
		"state unreadable for a while": func(m *machine, id string) func() {
			path := filepath.Join(m.o.RunDir, "state", id, "state.json")
			good := readFile(m.t, path)
			must(m.t, os.WriteFile(path, []byte("{"), 0o600))
			return func() { must(m.t, os.WriteFile(path, []byte(good), 0o600)) }
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			failed := m.watchLog("hand containers over")
			id, p := m.start("trap 'exit 33' TERM; read x; echo got $x; while :; do sleep 0.01; done", func(r *monitor.StartRequest) { r.Stdin = true })
			repair := damage(m, id)
			must(t, syscall.Kill(m.podmons()[0], unix.SIGKILL))
			if repair != nil {
				await(t, "failed attempt", failed)
				if !p.Alive() || m.List()[0].Exit != nil {
					t.Fatalf("exit invented: %+v", m.List()[0])
				}
				repair()
			}
			must(t, m.ReopenLog(t.Context(), id))
			in, err := m.Stdin(id)
			must(t, err)
			_, err = in.WriteString("input\n")
			must(t, err)
			in.Close()
			m.awaitLog(id, "got input")
			must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
			if e := m.exit(id); e.Code != 33 || !e.Known {
				t.Errorf("exit %+v, want 33", e)
			}
		})
	}
}

// A podmon that New cannot talk to is killed before its containers are taken over; one
// whose socket was removed makes it again, and stays.
func TestUnreachablePodmon(t *testing.T) {
	for name, cut := range map[string]func(m *machine, pid int){
		"socket gone": func(m *machine, pid int) {
			socks, _ := filepath.Glob(filepath.Join(m.o.RunDir, "podmon/*/sock"))
			must(m.t, os.Remove(socks[0]))
		},
		"stopped": func(m *machine, pid int) {
			must(m.t, syscall.Kill(pid, unix.SIGSTOP))
			for deadline := time.Now().Add(10 * time.Second); !strings.Contains(procStat(pid), ") T "); {
				if time.Now().After(deadline) {
					m.t.Fatal("podmon does not stop")
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			id, _ := m.start(countForever)
			m.awaitLog(id, " 100\n")
			old := m.podmons()
			must(t, m.Close())
			cut(m, old[0])
			m.connect()
			if again := m.podmons(); len(again) != 1 || (again[0] == old[0]) != (name == "socket gone") {
				t.Errorf("podmons %v, then %v", old, again)
			}
			must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
			if e := m.exit(id); e.Code != 33 || !e.Known {
				t.Errorf("exit %+v, want 33", e)
			}
			t.Logf("%d lines", checkCounting(t, m.logged(id)))
		})
	}
}

// stop stops a process: when it returns none of its threads goes on. (kill returns when the
// first of them has been told.)
func stop(t *testing.T, pid int) {
	t.Helper()
	must(t, syscall.Kill(pid, unix.SIGSTOP))
	for {
		all, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		must(t, err)
		running := slices.ContainsFunc(all, func(path string) bool {
			b, err := os.ReadFile(path)
			return err == nil && !strings.Contains(string(b), ") T ")
		})
		if len(all) > 0 && !running {
			return
		}
		time.Sleep(time.Millisecond) // nothing tells of it but its parent's wait
	}
}

// A podmon that hangs is found out even when nothing fits into its socket any more.
func TestHungWithFullSocket(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start(countForever)
	m.awaitLog(id, " 100\n")
	stop(t, m.podmons()[0])
	big := process("true")
	big.Env = append(big.Env, "BIG="+strings.Repeat("x", 1<<20))
	done := make(chan error, 4)
	for range cap(done) {
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			_, err := m.Exec(ctx, monitor.ExecRequest{ContainerID: id, Process: big})
			done <- err
		}()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	signalled := make(chan error, 1)
	go func() { signalled <- m.Signal(ctx, id, unix.SIGCONT, false) }()
	if err := await(t, "end of a request that cannot be sent", signalled); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("signal: %v", err)
	}
	for range cap(done) {
		if err := await(t, "end of an exec", done); err == nil {
			t.Error("exec succeeds in a stopped podmon")
		}
	}
	reopened := make(chan error, 1)
	go func() { reopened <- m.ReopenLog(t.Context(), id) }()
	must(t, await(t, "hand-over", reopened))
	must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
	if e := m.exit(id); e.Code != 33 || !e.Known {
		t.Errorf("exit %+v, want 33", e)
	}
}

// A broken connection is no reason to kill a podmon, nor to be without one: not even
// when requests have found out first that it is broken.
func TestConnectionBroken(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start(countForever)
	ends, _ := m.start("read x; exit 4", func(r *monitor.StartRequest) { r.Stdin = true })
	before := m.podmons()
	for range 10 {
		reconnected := m.watchLog("connection to podmon had broken")
		done := make(chan error)
		stop := make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				case done <- m.ReopenLog(t.Context(), id):
				}
			}
		}()
		must(t, await(t, "a request before", done))
		m.CutConnections()
		await(t, "reconnection", reconnected)
		must(t, await(t, "a request after", done))
		close(stop)
		for err := range done {
			must(t, err)
		}
	}
	if after := m.podmons(); len(after) != 1 || after[0] != before[0] {
		t.Errorf("podmons %v, then %v", before, after)
	}
	must(t, m.Health())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	another := m.id()
	_, err := m.Start(ctx, monitor.StartRequest{ID: another, Spec: m.spec(another, "true"), Discard: true})
	must(t, err)
	m.exit(another)
	must(t, m.CloseStdin(t.Context(), ends))
	if e := m.exit(ends); e.Code != 4 || !e.Known {
		t.Errorf("exit %+v, want 4", e)
	}
	must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
	if e := m.exit(id); e.Code != 33 || !e.Known {
		t.Errorf("exit %+v, want 33", e)
	}
	checkCounting(t, m.logged(id))
}

// A podmon that gets next to no CPU is slow, and nothing is won by replacing it.
func TestStarved(t *testing.T) {
	skipUnlessV1(t)
	m := newMachine(t)
	must(t, m.Close())
	m.o.PingTimeout = 100 * time.Millisecond
	m.connect()
	before := m.podmons()
	cgroup := filepath.Join("/sys/fs/cgroup/cpu", m.cgroup+"-starved")
	must(t, os.Mkdir(cgroup, 0o755))
	t.Cleanup(func() { // before m.clean: then podmon is to have its time again
		must(t, os.WriteFile("/sys/fs/cgroup/cpu/cgroup.procs", []byte(strconv.Itoa(before[0])), 0))
		must(t, os.Remove(cgroup))
	})
	for file, value := range map[string]string{"cpu.cfs_period_us": "1000000", "cpu.cfs_quota_us": "1000"} {
		must(t, os.WriteFile(filepath.Join(cgroup, file), []byte(value), 0))
	}
	must(t, os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte(strconv.Itoa(before[0])), 0))
	throttled := func() (n int) {
		for line := range strings.Lines(readFile(t, filepath.Join(cgroup, "cpu.stat"))) {
			fmt.Sscanf(line, "nr_throttled %d", &n)
		}
		return n
	}
	for deadline := time.Now().Add(time.Minute); throttled() < 5; {
		if time.Now().After(deadline) {
			t.Fatal("podmon is not starved")
		}
		time.Sleep(100 * time.Millisecond)
		if after := m.podmons(); len(after) != 1 || after[0] != before[0] {
			t.Fatalf("podmons %v, then %v", before, after)
		}
	}
}

// A daemon that comes with another podmon replaces the one that runs, once.
func TestNewProgram(t *testing.T) {
	m := newMachine(t)
	id, p := m.start(countForever)
	m.awaitLog(id, " 100\n")
	old := m.podmons()
	must(t, m.Close())
	program := []byte(readFile(t, podmonBinary))
	m.o.Binary = filepath.Join(t.TempDir(), "podmon")
	must(t, os.WriteFile(m.o.Binary, append(program, 0), 0o755)) // behind the ELF: another build that does the same
	m.connect()
	_, err := syscall.Wait4(old[0], nil, 0, nil) // it retires
	must(t, err)
	replaced := m.podmons()
	if len(replaced) != 1 || replaced[0] == old[0] {
		t.Errorf("podmons %v, then %v", old, replaced)
	}
	must(t, m.Close())
	m.connect()
	if again := m.podmons(); len(again) != 1 || again[0] != replaced[0] {
		t.Errorf("podmons %v, then %v with the same program", replaced, again)
	}
	if !p.Alive() {
		t.Fatal("PID 1 is gone")
	}
	must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
	if e := m.exit(id); e.Code != 33 || !e.Known {
		t.Errorf("exit %+v, want 33", e)
	}
	checkCounting(t, m.logged(id))
}
