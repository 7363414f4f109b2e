package pod

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/cni"
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
	pin := filepath.Join(n.NetnsDir, "podshim-"+id[:16])
	if err := cni.NewNetns(pin); err != nil {
		t.Fatal(err)
	}
	// A crash between the making of the file and the mount.
	half := filepath.Join(n.NetnsDir, "podshim-fedcba9876543210-user")
	foreign := filepath.Join(n.NetnsDir, "podshim-of-somebody")
	for _, path := range []string{half, foreign} {
		if err := os.WriteFile(path, nil, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	planted = append(planted, pin, half)
	// Another podshim's pod, in the same directory: somebody is in its namespace.
	others := filepath.Join(n.NetnsDir, "podshim-0000000000000000")
	if err := cni.NewNetns(others); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cni.Remove(others); err != nil {
			t.Error(err)
		}
		if err := os.Remove(foreign); err != nil {
			t.Error(err)
		}
	})
	inhabitant := exec.Command("sleep", "100000")
	if err := cni.Do(others, inhabitant.Start); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := inhabitant.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = inhabitant.Wait() // killed
	}()
	n.Resume()
	for _, dir := range planted {
		if err := harness.WaitNoFile(dir); err != nil {
			t.Errorf("%s is still there: %v", dir, err)
		}
	}
	for _, path := range []string{foreign, others, filepath.Join(n.NetnsDir, "podshim-"+p.ID[:16])} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("taken away: %v", err)
		}
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(planted[0]))
	if err != nil || len(mounts) > 0 {
		t.Errorf("still mounted: %v, %v", mounts, err)
	}
	if !process.Alive() {
		t.Error("a running container's process ended")
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/bin", process.PID)); err != nil {
		t.Errorf("a running container's root is gone: %v", err)
	}
	keeps.Stop(0)
}
