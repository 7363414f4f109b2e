package fault

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// fill makes files until the disk has no room for another one, or another byte, and
// returns their directory.
func fill(t *testing.T, root string) string {
	t.Helper()
	dir := filepath.Join(root, "fill")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "bytes"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); errors.Is(err, unix.ENOSPC) {
			size /= 2
		} else if err != nil {
			t.Fatal(err)
		}
	}
	for i := 0; ; i++ {
		err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o644)
		if errors.Is(err, unix.ENOSPC) {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// free is how many bytes a filesystem has left.
func free(t *testing.T, dir string) uint64 {
	t.Helper()
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	// What is deleted ext4 has free when its journal says so.
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		t.Fatal(err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		t.Fatal(err)
	}
	return fs.Bavail * uint64(fs.Bsize)
}

// refused checks that a call failed for want of room, and said where and what to do.
func refused(t *testing.T, what string, err error) {
	t.Helper()
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(status.Convert(err).Message(), "no space left on device") {
		t.Errorf("%s on a full disk: %v", what, err)
	}
}

// The root directory's filesystem is full: what needs room is refused and leaves
// nothing; what gives room back works, and then all is as it was.
func TestFullDisk(t *testing.T) {
	harness.NeedRoot(t)
	for name, options := range smallDisks {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testFullDisk(t, start(t, options))
		})
	}
}

// smallDisks are filesystems that are soon full.
var smallDisks = map[string]harness.Options{
	"tmpfs": {SmallRoot: "48m"},
	"ext4":  {SmallRoot: "64m", SmallRootType: "ext4"},
}

func testFullDisk(t *testing.T, n *harness.Node) {
	big := n.NewImage("fault/big", harness.ImageOptions{Files: map[string]string{"big": strings.Repeat("x", 8<<20)}})
	pod := n.RunPod()
	// Its log is on the full disk too.
	logs := filepath.Join(n.Root, "pod-logs")
	logged := n.RunPod(func(c *cri.PodSandboxConfig) { c.LogDirectory = logs })
	writer := logged.Shell("while :; do echo line; sleep 0.01; done")
	stays, goes := pod.Run([]string{"sleep", "100000"}), pod.Run([]string{"sleep", "100000"})
	gone := n.RunPod()
	gone.Run([]string{"sleep", "100000"})
	if _, err := n.Images.RemoveImage(n.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: big}}); err != nil {
		t.Fatal(err)
	}
	for _, rounds := range []string{"first", "second"} {
		filled := fill(t, n.Root)
		before := stateOf(n, writer)
		// More than one page of records: the database must grow for them.
		padded := n.PodConfig(func(c *cri.PodSandboxConfig) {
			c.Annotations = map[string]string{"padding": strings.Repeat("p", 64<<10)}
		})
		_, err := n.Runtime.RunPodSandbox(n.Context(), &cri.RunPodSandboxRequest{Config: padded})
		refused(t, "RunPodSandbox", err)
		_, err = n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{
			PodSandboxId: pod.ID, Config: pod.ContainerConfig([]string{"true"}), SandboxConfig: pod.Config})
		refused(t, "CreateContainer", err)
		_, err = n.Images.PullImage(n.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: big}})
		refused(t, "PullImage", err)
		// Snapshots are removed in the background, also those of an earlier step.
		if !quietly(func() bool { return added(before, stateOf(n, writer)) == "" }) {
			t.Errorf("%s round: the refused calls left something:\n%s", rounds, added(before, stateOf(n, writer)))
		}
		if !stays.Process().Alive() {
			t.Error("a running container ended")
		}
		if got := stays.Output("echo", "works"); got != "works" {
			t.Errorf("exec: %q", got)
		}
		if rounds == "second" {
			if err := os.RemoveAll(filled); err != nil {
				t.Fatal(err)
			}
			break
		}
		// A restart on the full disk knows all that there is.
		n.Restart()
		if s := stays.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING {
			t.Errorf("after a restart on the full disk a container is %v", s.State)
		}
		had := free(t, n.Root)
		goes.Stop(0)
		goes.Remove()
		if err := gone.StopAndRemove(); err != nil {
			t.Errorf("give back a pod on the full disk: %v", err)
		}
		if err := os.Rename(filepath.Join(logs, writer.Config.LogPath), filepath.Join(logs, "rotated")); err != nil {
			t.Fatal(err)
		}
		if _, err := n.Runtime.ReopenContainerLog(n.Context(), &cri.ReopenContainerLogRequest{ContainerId: writer.ID}); err != nil {
			t.Errorf("rotate the log on the full disk: %v", err)
		}
		if err := os.Remove(filepath.Join(logs, "rotated")); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(filled); err != nil {
			t.Fatal(err)
		}
		writer.WaitLog("line")
		if now := free(t, n.Root); now <= had {
			t.Errorf("free were %d bytes, are %d", had, now)
		}
	}
	if _, err := n.Images.RemoveImage(n.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: n.Pull(big)}}); err != nil {
		t.Errorf("remove an image: %v", err)
	}
	hold(t, n)
}

// An image is removed from a full disk, and its room is there again.
func TestImageIsRemovedFromAFullDisk(t *testing.T) {
	harness.NeedRoot(t)
	for name, options := range smallDisks {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testImageIsRemoved(t, start(t, options))
		})
	}
}

func testImageIsRemoved(t *testing.T, n *harness.Node) {
	big := n.NewImage("fault/removed", harness.ImageOptions{Files: map[string]string{"big": strings.Repeat("x", 8<<20)}})
	filled := fill(t, n.Root)
	if _, err := n.Images.RemoveImage(n.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: big}}); err != nil {
		t.Fatalf("RemoveImage on a full disk: %v", err)
	}
	if now := free(t, n.Root); now < 8<<20 {
		t.Errorf("%d bytes are free after an image of 8 MiB was removed", now)
	}
	if err := os.RemoveAll(filled); err != nil {
		t.Fatal(err)
	}
	n.Pull(big)
}

// stateOf is the node's, without the processes that a writer starts all the time: those in
// its cgroup, and those that are gone by now.
func stateOf(n *harness.Node, writer *harness.Container) []string {
	return slices.DeleteFunc(n.State(), func(line string) bool {
		var pid int
		if _, err := fmt.Sscanf(line, "process %d ", &pid); err != nil {
			return false
		}
		p, err := harness.ReadProcess(pid)
		return err != nil || strings.Contains(p.Cgroup, writer.ID)
	})
}

// added shows what only the later of two lists has.
func added(before, after []string) string {
	had := make(map[string]bool)
	for _, line := range before {
		had[line] = true
	}
	return strings.Join(slices.DeleteFunc(slices.Clone(after), func(line string) bool { return had[line] }), "\n")
}
