// Package fault breaks things under a real podshim, on real processes, and
// then looks at the machine: nothing may be lost, and nothing left.
// docs/reliability.md says what is promised, and what the long run has shown.
//
//	go test ./test/fault              all of it, at the size of the promise
//	go test -short ./test/fault       the same faults, fewer times: what CI runs
//
// Root is needed; see package harness for what else.
package fault

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/podshim/podshim/test/harness"
)

func TestMain(m *testing.M) {
	becomeTrapped() // in the process that is to be the daemon, does not return
	os.Exit(harness.Main(m, harness.Options{}))
}

// start makes a node for a test. When the test is over, its doctor must find nothing:
// what a daemon that has just come back gives back in the background, within a while.
func start(t *testing.T, opts harness.Options) *harness.Node {
	t.Helper()
	n := harness.Start(t, opts)
	t.Cleanup(func() {
		if t.Failed() {
			return // how far the test came is not known
		}
		var found diagnosis
		// What the test has damaged is kept for a person to look at.
		kept := func(f finding) bool { return f.Kind == "record" && strings.HasPrefix(f.Name, n.Root+"/damaged/") }
		nothing := func() bool {
			found = doctor(t, n)
			found.Findings = slices.DeleteFunc(found.Findings, kept)
			return len(found.Findings) == 0
		}
		if !quietly(nothing) {
			t.Errorf("does not belong here after the test (beside a daemon: %t): %+v", found.Daemon, found.Findings)
		}
	})
	return n
}

// promised is a bound that is promised against hanging, on a machine as slow as
// PODSHIM_TEST_PATIENCE says.
func promised(promise time.Duration) time.Duration {
	return time.Duration(float64(promise) * harness.Limit.Minutes())
}

// times is how often a fault is repeated: all times, or few of them with -short.
func times(all, few int) int {
	if testing.Short() {
		return few
	}
	return all
}
