package stage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The test's own program is what joins: join.c is in it. It gets as far as here when that
// has gone well.
func TestMain(m *testing.M) {
	if os.Getenv("_LIBCONTAINER_INITPIPE") != "" {
		text, _ := os.ReadFile("/proc/self/cgroup")
		var set unix.CPUSet
		_ = unix.SchedGetaffinity(0, &set)
		fmt.Printf("parent %d\ncpus %d\n%s", os.Getppid(), set.Count(), text)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// cgroupsOf makes a cgroup of the test's in each v1 hierarchy and in that of v2 beside them.
func cgroupsOf(t *testing.T) (paths map[string]string, name string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root")
	}
	if _, err := os.Stat("/sys/fs/cgroup/pids/tasks"); err != nil {
		t.Skip("SKIPPED: needs cgroup v1")
	}
	paths, name = map[string]string{}, fmt.Sprintf("podmon-join-%d", os.Getpid())
	for _, subsystem := range []string{"cpu", "devices", "freezer", "memory", "pids", ""} {
		root := filepath.Join("/sys/fs/cgroup", subsystem)
		if subsystem == "" {
			if root += "/unified"; !isMounted(root) {
				continue
			}
		}
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		paths[subsystem] = dir
		t.Cleanup(func() {
			if err := os.Remove(dir); err != nil {
				t.Error(err)
			}
		})
	}
	return paths, name
}

func isMounted(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// joined starts the test's program with an order, as libcontainer starts "podmon init".
func joined(t *testing.T, o *Order) (out, log string, err error) {
	t.Helper()
	lines, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer lines.Close()
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.ExtraFiles = []*os.File{o.File(), pipe}
	cmd.Env = []string{"_LIBCONTAINER_INITPIPE=5", "_LIBCONTAINER_LOGPIPE=4", "GOMAXPROCS=1"}
	cmd.Stdout = write
	err = cmd.Run()
	write.Close()
	pipe.Close()
	text := make([]byte, 64<<10)
	n, _ := read.Read(text)
	m, _ := lines.Read(text[n:])
	return string(text[:n]), string(text[n : n+m]), err
}

func ordered(t *testing.T, paths map[string]string, resetAffinity bool) *Order {
	t.Helper()
	o, err := NewOrder()
	if err == nil {
		err = o.Send(paths, "", resetAffinity)
	}
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestJoin(t *testing.T) {
	paths, name := cgroupsOf(t)
	paths["name=absent"] = "/sys/fs/cgroup/absent/" + name // may be missing
	var before, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		t.Fatal(err)
	}
	one.Set(0)
	o := ordered(t, paths, true)
	runtime.LockOSThread() // whose CPUs they are
	defer runtime.UnlockOSThread()
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		t.Fatal(err)
	}
	defer unix.SchedSetaffinity(0, &before)
	out, log, err := joined(t, o)
	if !o.Settle(err != nil) || err != nil {
		t.Fatalf("%v: %s", err, log)
	}
	for subsystem := range paths {
		if subsystem != "name=absent" && !strings.Contains(out, ":"+subsystem+":/"+name+"\n") {
			t.Errorf("not in the cgroup of %q:\n%s", subsystem, out)
		}
	}
	if want := fmt.Sprintf("parent %d\ncpus %d\n", os.Getpid(), before.Count()); !strings.HasPrefix(out, want) {
		t.Errorf("runs as %q, want %q", out, want)
	}
	if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.ECHILD {
		t.Errorf("a child is left: %v", err)
	}
}

// What cannot join does not run.
func TestJoinRefused(t *testing.T) {
	paths, name := cgroupsOf(t)
	paths["blkio"] = "/sys/fs/cgroup/blkio/absent-" + name
	o := ordered(t, paths, false)
	out, log, err := joined(t, o)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || out != "" {
		t.Errorf("ran without its cgroup: %v: %s", err, out)
	}
	if want := "join " + paths["blkio"] + "/tasks: no such file or directory"; !strings.Contains(log, want) {
		t.Errorf("log %q, want %q", log, want)
	}
	if o.Settle(true) {
		t.Error("says that it has joined")
	}
}

// A process waits for its order, and ends when there will be none.
func TestCancel(t *testing.T) {
	o, err := NewOrder()
	if err != nil {
		t.Fatal(err)
	}
	o.Cancel()
	out, log, err := joined(t, o)
	if err == nil || out != "" || !strings.Contains(log, "receive the order of cgroups") {
		t.Errorf("%v, ran: %q, log %q", err, out, log)
	}
	if o.Settle(true) {
		t.Error("says that it has joined")
	}
}

// Nobody but what the first process has made is believed.
func TestStartedBelieves(t *testing.T) {
	say := func(texts ...string) *Order {
		o, err := NewOrder()
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range texts {
			if _, err := o.theirs.Write([]byte(text)); err != nil {
				t.Fatal(err)
			}
		}
		o.theirs.Close()
		t.Cleanup(o.Close)
		return o
	}
	pid := string(binary.NativeEndian.AppendUint32(nil, 1)) // of somebody who is nothing to us
	first := os.Getpid() + 1
	b, err := say(pid, "forged", "x").Started(first)
	if !errors.Is(err, ErrEnded) || b.Last != first || len(b.Before) > 0 {
		t.Errorf("another's words: %+v, %v", b, err)
	}
	b, err = say(pid, "its words").Started(os.Getpid())
	if err == nil || err.Error() != "its words" || b.Last != 1 || !slices.Equal(b.Before, []int{os.Getpid()}) {
		t.Errorf("its own words: %+v, %v", b, err)
	}
	if b, err = say("x").Started(os.Getpid()); err != nil || b.Last != os.Getpid() {
		t.Errorf("it is ready: %+v, %v", b, err)
	}
	if _, err = say(pid, "x").Started(os.Getpid()); !errors.Is(err, ErrEnded) {
		t.Errorf("it is ready, and not its child: %v", err)
	}
}
