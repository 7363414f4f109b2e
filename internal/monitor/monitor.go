// Package monitor is the daemon's side of podmon, the small process that is the
// parent of every container.
package monitor

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
)

// Options configure a Monitor.
type Options struct {
	// RunDir holds podmon's sockets and the records of containers; 0700, on a tmpfs.
	RunDir string
	// Binary is the path of podmon.
	Binary string
	// SystemdCgroup makes cgroups through systemd instead of cgroupfs.
	SystemdCgroup bool
	// PingInterval and PingTimeout say how soon a podmon that does not answer is
	// replaced. Zero is 5 s and 10 s.
	PingInterval, PingTimeout time.Duration
	Log                       *logrus.Entry
}

// ErrNoExecutable and ErrNotExecutable are in the chain of Start's and Exec's
// errors when the program to run does not exist (a shell would say 127) or
// cannot be executed (126). Both are errdefs.ErrInvalidArgument.
var (
	ErrNoExecutable  = fmt.Errorf("executable not found: %w", errdefs.ErrInvalidArgument)
	ErrNotExecutable = fmt.Errorf("not executable: %w", errdefs.ErrInvalidArgument)
)

var errNotYet = fmt.Errorf("monitor is being built: %w", errdefs.ErrUnavailable)

// Monitor runs containers through podmon.
type Monitor struct{}

// New connects to every podmon that is alive in RunDir, or starts one.
func New(ctx context.Context, o Options) (*Monitor, error) { return nil, errNotYet }

// Start creates and starts a container.
func (m *Monitor) Start(ctx context.Context, r StartRequest) (Process, error) {
	return Process{}, errNotYet
}

// Signal sends sig to PID 1, or to every process of the container.
func (m *Monitor) Signal(ctx context.Context, id string, sig syscall.Signal, all bool) error {
	return errNotYet
}

// Delete kills what is left of a container and removes all of it.
func (m *Monitor) Delete(ctx context.Context, id string) error { return errNotYet }

// Exec is one process started in a running container.
type Exec struct {
	PID int
	// Console is the pseudo terminal's master; nil without a terminal. The caller closes it.
	Console *os.File
}

// Exec starts a process in a running container.
func (m *Monitor) Exec(ctx context.Context, r ExecRequest) (*Exec, error) { return nil, errNotYet }

// Wait returns how the process ended.
func (e *Exec) Wait(ctx context.Context) (Exit, error) { return Exit{}, errNotYet }

// Kill sends sig to the process; the gone is success.
func (e *Exec) Kill(sig syscall.Signal) error { return errNotYet }

// Attach copies output until the container ends, the reader goes away or ctx ends.
func (m *Monitor) Attach(ctx context.Context, r AttachRequest) error { return errNotYet }

// Stdin returns a duplicate of the write end of standard input; the caller closes it.
func (m *Monitor) Stdin(id string) (*os.File, error) { return nil, errNotYet }

// Console returns a duplicate of the terminal's master (input, resize); the caller closes it.
func (m *Monitor) Console(id string) (*os.File, error) { return nil, errNotYet }

// CloseStdin lets the container read end of file once all duplicates are closed too.
func (m *Monitor) CloseStdin(ctx context.Context, id string) error { return errNotYet }

// ReopenLog opens the log's path anew, after a rotation.
func (m *Monitor) ReopenLog(ctx context.Context, id string) error { return errNotYet }

// Update changes a running container's resources.
func (m *Monitor) Update(ctx context.Context, id string, r *specs.LinuxResources) error {
	return errNotYet
}

// List returns every container the monitors hold, the exited ones with their exit.
func (m *Monitor) List() []Status { return nil }

// Events delivers the exit of every container, once.
func (m *Monitor) Events() <-chan Event { return nil }

// Upgrade replaces the running podmon by a new one from Options.Binary.
func (m *Monitor) Upgrade(ctx context.Context) error { return errNotYet }

// Close drops the connections; podmon and the containers go on.
func (m *Monitor) Close() error { return nil }
