package monitor_test

import (
	"os/exec"
	"testing"

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
