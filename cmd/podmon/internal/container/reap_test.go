package container

import (
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// zombie makes a child that has ended and is not waited for before the test's end.
func zombie(t *testing.T) int {
	t.Helper()
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Wait() })
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

// The reaper takes what is lost, and nobody's zombie but that.
func TestReaper(t *testing.T) {
	r := newReaper()
	lost := func() map[int]bool {
		pids := map[int]bool{}
		for p := range r.lost(zombies()) {
			pids[p.PID] = true
		}
		return pids
	}
	if got := lost(); len(got) > 0 {
		t.Fatalf("zombies at the beginning: %v", got)
	}
	owned, helper := zombie(t), zombie(t)
	r.own(owned)
	end := r.begin()
	if got := lost(); len(got) > 0 {
		t.Errorf("lost during the start that made it: %v", got)
	}
	r.begin() // a later one
	end()
	if got := lost(); len(got) != 1 || !got[helper] {
		t.Errorf("lost %v, want the helper %d and not the owned %d", got, helper, owned)
	}
	r.disown(owned)
	if got := lost(); got[owned] {
		t.Errorf("lost %v: first seen during a start", got)
	}
}
