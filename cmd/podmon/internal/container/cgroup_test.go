package container

import (
	"maps"
	"path/filepath"
	"testing"
)

// Those who end a container and those who ask for its processes at that moment have a
// map each: Go ends a program that reads one while it is written, and podmon with it.
func TestCgroupManagersShareNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "c") // gone, as after the removal
	paths := map[string]string{"devices": dir, "memory": dir, "": dir}
	rec := record{CgroupPaths: maps.Clone(paths)}
	cg, err := cgroupAt(rec)
	if err != nil {
		t.Fatal(err)
	}
	if err := cg.Destroy(); err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(rec.CgroupPaths, paths) {
		t.Errorf("the record's paths are %v after the removal", rec.CgroupPaths)
	}
	another, err := cgroupAt(rec)
	if err != nil {
		t.Fatal(err)
	}
	if pids, err := processes(another); err != nil || len(pids) > 0 {
		t.Errorf("processes of a cgroup that is gone: %v, %v", pids, err)
	}
}
