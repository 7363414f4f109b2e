package filter

import (
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// The test's own program is what installs the filter.
func init() {
	if len(os.Args) == 2 && os.Args[1] == "filter" {
		runtime.LockOSThread()
		Main()
	}
}

func TestX(t *testing.T) {
	spec := &specs.Spec{Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}, Linux: &specs.Linux{}}
	p, err := seccomp.GetDefaultProfile(spec)
	if err != nil {
		t.Fatal(err)
	}
	var c Cache
	s, err := specconv.SetupSeccomp(p)
	if err != nil {
		t.Fatal(err)
	}
	_ = configs.Notify
	at := time.Now()
	f, err := c.Get(s)
	t.Log(time.Since(at))
	if err != nil {
		t.Fatal(err)
	}
	t.Log(len(f.Code), f.Flags)
	at = time.Now()
	_, err = c.Get(s)
	t.Log(time.Since(at), err)
}
