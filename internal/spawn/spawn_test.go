package spawn

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// open opens a file so often that the next number is at least n.
func open(t testing.TB, n int) {
	t.Helper()
	for {
		f, err := os.Open("/proc/self/stat")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if int(f.Fd()) >= n {
			return
		}
	}
}

// output runs a shell script as p and returns what it says and its PID.
func output(t testing.TB, script string, p Process) (string, int) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p.Path, p.Args, p.Files = "/bin/sh", []string{"sh", "-c", script}, []*os.File{nil, w, w}
	started, err := p.Start()
	w.Close() // also the thread's, or there is no end
	if err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if state, err := started.Wait(); err != nil || !state.Success() {
		t.Errorf("%v, %v: %s", state, err, said)
	}
	return string(said), started.Pid
}

// A process is the same with few descriptors and with many, and made by the thread with many.
func TestStart(t *testing.T) {
	const script = `echo "$$ $(cut -d' ' -f4,6 /proc/$$/stat)"; ls -l /proc/$$/fd | sed -n 's/.* \([012] -> .*\)/\1/p'; tr '\0' ' ' </proc/$$/environ; cat <&0`
	said := map[bool]string{}
	for _, crowded := range []bool{false, true} {
		if crowded {
			open(t, many)
		}
		all, _ := output(t, script, Process{Setsid: true})
		lines := strings.SplitN(all, "\n", 2)
		var pid, parent, session int
		if _, err := fmt.Sscan(lines[0], &pid, &parent, &session); err != nil || parent != os.Getpid() || session != pid {
			t.Errorf("%q: not our child, or not in a session of its own: %v", lines[0], err)
		}
		said[crowded] = strings.Map(func(r rune) rune { // the pipe's number
			if r >= '0' && r <= '9' {
				return '#'
			}
			return r
		}, lines[1])
	}
	if said[false] != said[true] || !strings.Contains(said[true], "pipe:") || strings.Contains(said[true], "/stat") {
		t.Errorf("with few descriptors %q, with many %q", said[false], said[true])
	}
	least := 1 << 20
	threads, err := filepath.Glob("/proc/self/task/*/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range threads {
		if fds, err := os.ReadDir(dir); err == nil {
			least = min(least, len(fds))
		}
	}
	if least > 10 {
		t.Errorf("each thread has %d descriptors and more", least)
	}
}

// The thread lives with Go's collector and poller, and keeps nothing open.
func TestThreadUnderCollection(t *testing.T) {
	open(t, many)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 200 {
			runtime.GC()
			time.Sleep(time.Millisecond)
		}
	}()
	for n := 0; ; n++ {
		if got, _ := output(t, "echo yes", Process{}); got != "yes\n" {
			t.Fatalf("process %d says %q", n, got)
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

// A process has the environment, directory and group it is given, whoever makes it.
func TestStartWhere(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, crowded := range []bool{false, true} {
		if crowded {
			open(t, many)
		}
		said, pid := output(t, `tr '\0' ' ' </proc/$$/environ; pwd; cut -d' ' -f5,6 /proc/$$/stat`,
			Process{Env: []string{"A=b", "PATH=" + os.Getenv("PATH")}, Dir: dir, Setpgid: true})
		session, err := unix.Getsid(0)
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("A=b PATH=%s %s\n%d %d\n", os.Getenv("PATH"), dir, pid, session); said != want {
			t.Errorf("many descriptors: %v: %q, not %q", crowded, said, want)
		}
	}
}

// tableSize is how many descriptors a process's table has room for.
const tableSize = `sed -n 's/FDSize:.//p' /proc/$$/status`

// The thread makes processes by its own small table, and nobody waits for it while it makes one.
func TestThread(t *testing.T) {
	open(t, many)
	m := thread()
	if m == nil {
		t.Skip("the kernel has no such thread")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	files := []int{none, int(w.Fd()), none}
	p := Process{Path: "/bin/sh", Args: []string{"sh", "-c", tableSize}, Files: make([]*os.File, 3)}
	pid, err := m.run(job{p: p, files: files, cgroup: none})
	for errors.Is(err, errBusy) { // it has not come to its loop yet
		runtime.Gosched()
		pid, err = m.run(job{p: p, files: files, cgroup: none})
	}
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if process, err := os.FindProcess(pid); err != nil {
		t.Error(err)
	} else if _, err := process.Wait(); err != nil {
		t.Error(err)
	}
	var size int
	if _, err := fmt.Sscan(string(said), &size); err != nil || size > 256 {
		t.Errorf("its table is for %q", said)
	}

	held := make(chan result) // that the thread cannot give
	p.Path = "/nonesuch"
	m.jobs <- job{p: p, files: []int{none}, cgroup: none, result: held}
	defer func() { <-held }()
	all, _ := output(t, tableSize, Process{})
	if _, err := fmt.Sscan(all, &size); err != nil || size < many {
		t.Errorf("while the thread is held a process's table is for %q", all)
	}
}

func TestStartFails(t *testing.T) {
	for range 2 {
		if _, err := (Process{Path: "/nonesuch", Args: []string{"x"}, Files: []*os.File{nil}}).Start(); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v", err)
		}
		open(t, many)
	}
}
