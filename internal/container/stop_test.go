package container

import (
	"context"
	"syscall"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/monitor"
)

// deaf is a monitor of containers whose process takes no signal but SIGKILL, as one
// whose program is still being read from a disk that hangs.
type deaf struct {
	Monitor
	killed func()
}

func (d deaf) Signal(ctx context.Context, _ string, sig syscall.Signal, _ bool) error {
	if sig == syscall.SIGKILL {
		d.killed()
		return nil
	}
	<-ctx.Done()
	return ctx.Err()
}

func TestStopKillsWhatTakesNoSignal(t *testing.T) {
	m, _ := testManager(t)
	c := m.all.Add(&Record{ID: "c", State: Running, StopSignal: syscall.SIGTERM, Config: &runtime.ContainerConfig{}})
	m.Monitor = deaf{killed: func() {
		if err := m.exited(c, monitor.Exit{Known: true, Code: 137}, ""); err != nil {
			t.Error(err)
		}
	}}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := m.Stop(ctx, "c", time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if r := c.Get(); r.State != Exited || r.ExitCode != 137 {
		t.Errorf("container is %s with code %d", r.State, r.ExitCode)
	}
}
