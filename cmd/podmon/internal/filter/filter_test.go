//go:build seccomp

package filter

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// The test's own program is what installs the filter.
func init() {
	if len(os.Args) == 2 && os.Args[1] == "filter" {
		runtime.LockOSThread()
		Main()
	}
}

func profile(t testing.TB, spec *specs.LinuxSeccomp) *configs.Seccomp {
	t.Helper()
	p, err := specconv.SetupSeccomp(spec)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func defaultProfile(t testing.TB) *configs.Seccomp {
	t.Helper()
	p, err := seccomp.GetDefaultProfile(&specs.Spec{
		Process: &specs.Process{Capabilities: &specs.LinuxCapabilities{}}, Linux: &specs.Linux{},
	})
	if err != nil {
		t.Fatal(err)
	}
	return profile(t, p)
}

// What is installed is held against libcontainer's in internal/monitor.
func TestGet(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	var c Cache
	first, err := c.Get(defaultProfile(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(first.Code) < 100 {
		t.Errorf("%d instructions", len(first.Code))
	}
	again, err := c.Get(defaultProfile(t))
	if err != nil || again != first {
		t.Errorf("compiled again: %v", err)
	}
	const spec = unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW | unix.SECCOMP_FILTER_FLAG_LOG
	flagged, err := c.Get(profile(t, &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow},
	}))
	if err != nil || flagged.Flags != spec {
		t.Errorf("flags %+v, want %#x: %v", flagged, spec, err)
	}
	none, err := c.Get(profile(t, &specs.LinuxSeccomp{DefaultAction: specs.ActKillProcess}))
	if err != nil || len(none.Code) == 0 {
		t.Errorf("a profile that forbids all, itself too: %v", err)
	}
}

func TestGetRefuses(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	var c Cache
	notify := profile(t, &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActNotify}},
	})
	if _, err := c.Get(notify); !errors.Is(err, ErrNotify) {
		t.Errorf("a profile with a listener: %v", err)
	}
	broken := &configs.Seccomp{DefaultAction: configs.Allow, Architectures: []string{"nonesuch"}}
	if _, err := c.Get(broken); err == nil || !strings.Contains(err.Error(), "nonesuch") && !strings.Contains(err.Error(), "architecture") {
		t.Errorf("a profile with an unknown architecture: %v", err)
	}
}

// An error of the moment is not kept.
func TestGetAgain(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	open, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	limit := func(cur uint64) {
		t.Helper()
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: cur, Max: before.Max}); err != nil {
			t.Fatal(err)
		}
	}
	var c Cache
	limit(uint64(len(open)))
	_, err = c.Get(defaultProfile(t))
	limit(before.Cur)
	if !errors.Is(err, errPassing) {
		t.Errorf("without descriptors: %v", err)
	}
	if _, err := c.Get(defaultProfile(t)); err != nil {
		t.Errorf("with descriptors again: %v", err)
	}
}

func BenchmarkCompile(b *testing.B) {
	p := defaultProfile(b)
	for b.Loop() {
		var c Cache
		if _, err := c.Get(p); err != nil {
			b.Fatal(err)
		}
	}
}
