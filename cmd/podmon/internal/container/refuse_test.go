package container

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/cgroups"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// A limit below what a v2 cgroup could give back is refused, since the kernel
// would kill for it.
func TestCheckShrink(t *testing.T) {
	cgroups.TestMode = true // files outside of cgroupfs are read
	defer func() { cgroups.TestMode = false }()
	dir := t.TempDir()
	for name, content := range map[string]string{
		"memory.current":      "100000000\n",
		"memory.stat":         "anon 40000000\nactive_file 30000000\ninactive_file 20000000\nslab_reclaimable 1000000\n",
		"memory.swap.max":     "0\n",
		"memory.swap.current": "0\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for limit, refused := range map[int64]bool{
		0: false, -1: false, 200_000_000: false, 60_000_000: false, 49_000_000: false, 48_999_999: true, 1: true,
	} {
		err := checkShrink(dir, limit)
		if (err != nil) != refused || refused && wire.ToError(err).Class != wire.ClassPrecondition {
			t.Errorf("limit %d: %v; want refused: %v", limit, err, refused)
		}
	}
	if err := checkShrink(t.TempDir(), 1); err != nil {
		t.Errorf("without memory.current (v1): %v", err)
	}
}

// What failed named first goes back to the kernel's default; what was in force
// stays in force.
func TestUndo(t *testing.T) {
	failed := &cgroups.Resources{CpuShares: 7, CpuQuota: 8, CpuPeriod: 9, Memory: 10, MemorySwap: 11}
	got := undo(cgroups.Resources{CpuQuota: 5, Memory: 6}, failed)
	if got.CpuShares != 1024 || got.CpuWeight != 100 || got.CpuPeriod != 100_000 || got.MemorySwap != -1 || got.CpuQuota != 5 || got.Memory != 6 {
		t.Errorf("undo gives %+v", got)
	}
	if got := undo(cgroups.Resources{}, &cgroups.Resources{}); got.CpuShares != 0 || got.CpuQuota != 0 || got.Memory != 0 {
		t.Errorf("nothing was named, undo gives %+v", got)
	}
}
