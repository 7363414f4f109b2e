package monitor_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"

	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/monitor/wire"
)

// After a restart of the machine any process can have the PID and start time of a
// container on record. It is not the container, and not killed.
func TestEndLostEndsOnlyTheContainer(t *testing.T) {
	other := exec.Command("sleep", "600")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = other.Process.Kill(), other.Wait() }()
	p, err := wire.Identify(other.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	const id = "5ce11ab1e05ce11ab1e05ce11ab1e05ce11ab1e05ce11ab1e05ce11ab1e05ce1"
	for path, systemd := range map[string]bool{"/pods/" + id: false, "pods.slice:cri:" + id: true, "": false} {
		if err := monitor.EndLost(t.Context(), p, path, systemd); err != nil {
			t.Error(err)
		}
		if !p.Alive() {
			t.Fatalf("%q: another process is killed", path)
		}
	}
}

// A container whose first process has ended is ended with what is left in its cgroup.
func TestEndLostEndsWhatTheFirstProcessLeft(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("SKIPPED: needs root (cgroups)")
	}
	path := fmt.Sprintf("/podshim-lost-%d/5ce11ab1e05ce11ab1e05ce11ab1e05ce11ab1e05ce11ab1e05ce11ab1e05ce2", os.Getpid())
	cm, err := manager.New(&cgroups.Cgroup{Path: path, Resources: &cgroups.Resources{}})
	if err != nil {
		t.Fatal(err)
	}
	left := exec.Command("sleep", "600")
	if err := left.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = left.Wait(); close(ended) }()
	t.Cleanup(func() {
		_ = left.Process.Kill()
		<-ended
		_ = cm.Destroy()
		for _, dir := range cm.GetPaths() {
			_ = os.Remove(filepath.Dir(dir))
		}
	})
	if err := cm.Apply(left.Process.Pid); err != nil {
		t.Fatal(err)
	}
	first := exec.Command("true")
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	p, err := wire.Identify(first.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Wait(); err != nil {
		t.Fatal(err)
	}
	if err := monitor.EndLost(t.Context(), p, path, false); err != nil {
		t.Fatal(err)
	}
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("what the first process has left runs on")
	}
	if cm.Exists() {
		t.Error("the cgroup is there still")
	}
}
