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
	"testing"

	"github.com/podshim/podshim/test/harness"
)

func TestMain(m *testing.M) {
	becomeTrapped() // in the process that is to be the daemon, does not return
	os.Exit(harness.Main(m, harness.Options{}))
}

// times is how often a fault is repeated: all times, or few of them with -short.
func times(all, few int) int {
	if testing.Short() {
		return few
	}
	return all
}
