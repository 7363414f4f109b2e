package monitor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// killFound makes sure that the podmon of a directory is dead, whether or not it
// can be talked to, and returns when it is. Who it is it has written there itself,
// before it listened; seen is what the kernel says, if anything.
func killFound(ctx context.Context, dir string, seen Process) error {
	l := &link{}
	var err error
	if l.Process, err = processIn(dir); errors.Is(err, fs.ErrNotExist) {
		if seen.PID == 0 {
			return nil // it never listened
		}
		l.Process, err = seen, nil
	}
	if err != nil {
		return err
	}
	if l.pidfd, err = unix.PidfdOpen(l.Process.PID, 0); err == unix.ESRCH {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pidfd of podmon: %w", err)
	}
	defer unix.Close(l.pidfd)
	if !l.Process.Exists() {
		return nil // its PID is another's
	}
	return l.kill(ctx)
}

// processIn is the process that has signed a podmon's directory.
func processIn(dir string) (p Process, err error) {
	path := filepath.Join(dir, wire.ProcessFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return p, err
	}
	if err := json.Unmarshal(b, &p); err != nil {
		return p, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

// pidIn is its PID; 0 when that is not known.
func pidIn(dir string) int {
	p, err := processIn(dir)
	if err != nil {
		return 0
	}
	return p.PID
}

// errHangs is the error of a podmon that would have answered long ago if it could.
var errHangs = errors.New("it hangs")

// maxEffort is the CPU time after which an answer must have come: it costs
// microseconds, and Go lets every goroutine run within milliseconds.
const maxEffort = 5 * time.Second

// expectAnswer runs ask, which wants an answer of the podmon with that PID, and
// ends it with errHangs when none will come.
//
// A slow podmon must not be mistaken for a hung one: all containers' output would
// stall for its replacement, on a machine that has no time for it. The request has
// made a thread of it runnable, which stays so until it gets a CPU, or its memory.
// So two looks in a row that find all of them asleep find a process that has stopped
// or waits for something else.
func (m *Monitor) expectAnswer(ctx context.Context, pid int, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, m.o.PingLimit, errHangs)
	defer cancel()
	answer := make(chan error, 1)
	before := cpuTime(pid)
	go func() { answer <- ask(ctx) }()
	look := time.NewTimer(m.o.PingTimeout)
	defer look.Stop()
	for idle := 0; ; {
		select {
		case err := <-answer:
			if err != nil && errors.Is(context.Cause(ctx), errHangs) {
				return fmt.Errorf("no answer after %v: %w", m.o.PingLimit, errHangs)
			}
			return err
		case <-look.C:
			if wakeful(pid) && cpuTime(pid)-before < maxEffort {
				idle = 0
			} else if idle++; idle > 1 {
				cancel()
				if <-answer == nil {
					return nil
				}
				return fmt.Errorf("no answer, and nothing in it runs or wants to (state %s): %w", stateOf(pid), errHangs)
			}
			look.Reset(m.o.PingTimeout / 3)
		}
	}
}

// wakeful tells whether a thread of the process runs, waits for a CPU, or sleeps as
// it does for a page of memory.
func wakeful(pid int) bool {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	return err == nil && slices.ContainsFunc(stats, func(path string) bool {
		state := stateAt(path)
		return state == "R" || state == "D"
	})
}

// stateOf is the kernel's letter for what the process's first thread does.
func stateOf(pid int) string { return stateAt(fmt.Sprintf("/proc/%d/stat", pid)) }

func stateAt(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	// The name is in parentheses and may contain anything, parentheses too.
	if _, rest, ok := bytes.Cut(b[bytes.LastIndexByte(b, ')')+1:], []byte(" ")); ok && len(rest) > 0 {
		return string(rest[:1])
	}
	return ""
}

// cpuTime is what the process has used of CPUs.
func cpuTime(pid int) time.Duration {
	const cpuClockSched = 2 // clock_getcpuclockid(3), as the kernel has it
	var used unix.Timespec
	if pid <= 0 || unix.ClockGettime(int32(^pid)<<3|cpuClockSched, &used) != nil {
		return 0
	}
	return time.Duration(used.Nano())
}
