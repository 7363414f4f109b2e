package infra_test

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/podshim/podshim/internal/infra"
)

func install(t *testing.T) (dir, rootfs string) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "infra")
	rootfs, err := infra.Install(dir)
	if err != nil {
		t.Fatal(err)
	}
	return dir, rootfs
}

func TestInstall(t *testing.T) {
	dir, rootfs := install(t)
	program := filepath.Join(rootfs, infra.Path)
	before, err := os.Stat(program)
	if err != nil {
		t.Fatal(err)
	}
	if before.Size() > 4096 || before.Mode() != 0o555 {
		t.Errorf("pause has %d bytes, mode %v", before.Size(), before.Mode())
	}
	if _, err := infra.Install(dir); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.Stat(program); !os.SameFile(before, after) {
		t.Error("a second Install replaced the right program")
	}
	if err := os.Chmod(program, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(program, []byte("something else"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := infra.Install(dir); err != nil {
		t.Fatal(err)
	}
	if after, _ := os.Stat(program); os.SameFile(before, after) || after.Size() != before.Size() || after.Mode() != 0o555 {
		t.Error("a wrong program was not replaced")
	}
	for d, want := range map[string]int{dir: 1, rootfs: 3, rootfs + "/dev": 0, rootfs + "/proc": 0} {
		if entries, _ := os.ReadDir(d); len(entries) != want {
			t.Errorf("%s holds %v", d, entries)
		}
	}
}

func TestPauseEndsOnSignals(t *testing.T) {
	_, rootfs := install(t)
	for sig, want := range map[syscall.Signal]int{syscall.SIGTERM: 0, syscall.SIGINT: 0, syscall.SIGKILL: -1} {
		cmd := exec.Command(filepath.Join(rootfs, infra.Path))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// It blocks the signals as its very first act; until then their default
		// action ends it with another status.
		awaitState(t, cmd.Process.Pid)
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != want {
			t.Errorf("%v: exit code %d, want %d", sig, got, want)
		}
	}
}

// awaitState waits until the process sleeps, which it does nowhere but waiting
// for signals.
func awaitState(t *testing.T, pid int) {
	t.Helper()
	for range 10000 {
		b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), "State:\tS") {
			return
		}
	}
	t.Fatal("pause does not sleep")
}

// As PID 1 it ends on SIGTERM as well, and reaps orphans.
func TestPauseAsInit(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	_, rootfs := install(t)
	// The shell is PID 1, leaves a child behind and becomes pause.
	cmd := exec.Command("sh", "-c", "(sleep 0.05; echo done >&3)& exec "+filepath.Join(rootfs, infra.Path))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	cmd.ExtraFiles = []*os.File{w}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	if line, err := bufio.NewReader(r).ReadString('\n'); line != "done\n" {
		t.Fatal(line, err)
	}
	children := filepath.Join("/proc", strconv.Itoa(cmd.Process.Pid), "task", strconv.Itoa(cmd.Process.Pid), "children")
	left := "?"
	for range 100000 {
		b, err := os.ReadFile(children)
		if err != nil {
			t.Fatal(err)
		}
		if left = string(b); left == "" {
			break
		}
	}
	if left != "" {
		t.Errorf("pause has not reaped %s", left)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("exit: %v", err)
	}
}
