package container

import (
	"context"
	"fmt"
	"time"
)

// awaitProgram returns when PID 1 is the container's own program, or dead. Before
// it is "podmon init", which libcontainer says is started when it is about to run
// StartContainer hooks and then the program. Go's signal handlers there would drop
// a signal (SIGUSR1), or end it with an exit code that nobody has chosen (SIGTERM),
// and /proc/1 is closed to the container's own processes (PR_SET_DUMPABLE): a
// postStart hook could not write to /proc/1/fd/1. The kernel tells nobody of an exec,
// so it is looked for.
func (c *Container) awaitProgram(ctx context.Context) error {
	for pause := 50 * time.Microsecond; !c.executed.Load(); pause = min(2*pause, 10*time.Millisecond) {
		if !c.isInit() {
			c.executed.Store(true)
			return nil
		}
		select {
		case <-c.gone:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("PID 1 has not executed its program: %w", ctx.Err())
		case <-time.After(pause):
		}
	}
	return nil
}

// isInit tells whether PID 1 still runs the program of the podmon that started it.
func (c *Container) isInit() bool {
	its, err := identifyFile(fmt.Sprintf("/proc/%d/exe", c.rec.Process.PID))
	return err == nil && its == c.rec.Init && !c.ended()
}
