package pod

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/harness"
)

// What no record knows any more, since a power cut took the record, is given back
// by the next daemon; what runs is left alone.
func TestOrphansAreRemoved(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	p := n.RunPod()
	keeps := p.Run([]string{"sleep", "100000"})
	process := keeps.Process()
	n.Stop()
	id := strings.Repeat("0123456789abcdef", 4)
	var planted []string
	for _, dir := range []string{"containers", "sandboxes"} {
		planted = append(planted, filepath.Join(n.RunDir, dir, id), filepath.Join(n.Root, dir, id))
	}
	for _, dir := range planted {
		if err := os.MkdirAll(filepath.Join(dir, "rootfs"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	mounted := filepath.Join(planted[0], "rootfs")
	if err := unix.Mount("orphan", mounted, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(mounted, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.Resume()
	for _, dir := range planted {
		if err := harness.WaitNoFile(dir); err != nil {
			t.Errorf("%s is still there: %v", dir, err)
		}
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(planted[0]))
	if err != nil || len(mounts) > 0 {
		t.Errorf("still mounted: %v, %v", mounts, err)
	}
	if !process.Alive() {
		t.Error("a running container's process ended")
	}
	if _, err := os.Stat(filepath.Join(n.RunDir, "containers", keeps.ID, "rootfs", "bin")); err != nil {
		t.Errorf("a running container's root is gone: %v", err)
	}
	keeps.Stop(0)
}
