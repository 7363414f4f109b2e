package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
	"github.com/podshim/podshim/test/images"
)

// The disk becomes full: kubelet removes the images that nobody uses and no other, then
// ends the pod that has written most.
func TestClusterNodePressure(t *testing.T) {
	t.Parallel()
	const size, spare, short = 1 << 30, 300 << 20, 60 << 20
	c := StartCluster(t, Options{
		Node:     harness.Options{SmallRoot: strconv.Itoa(size)},
		Eviction: fmt.Sprintf("{nodefs.available: \"%d\", imagefs.available: \"%[1]d\"}", spare),
		Config:   "imageMinimumGCAge: 1s\nevictionPressureTransitionPeriod: 1s\n",
	})
	c.expect = append(c.expect, regexp.MustCompile(`"Eviction manager: cannot evict a critical pod" pod="kube-system/`),
		// kubelet waits ten seconds for a pod to be gone before it looks for another one.
		regexp.MustCompile(`"Eviction manager: pod failed to evict" err="timeout waiting to kill pod"`))
	hungry, modest := c.Apply("hungry"), c.Apply("modest")
	hungry.WaitReady()
	modest.WaitReady()
	hungry.WaitLog("app", "written\n")
	// kubelet spares an image that it has not seen before; this one it saw at its start.
	if have := c.imageNames(); !slices.Contains(have, harness.Busybox) {
		t.Fatalf("there are %v, want %s as well", have, harness.Busybox)
	}
	fill(t, filepath.Join(c.Node.Root, "filler"), spare-short)
	status := hungry.Wait("evicted", func(s PodStatus) bool { return s.Status.Phase == "Failed" })
	if status.Status.Reason != "Evicted" || !strings.Contains(status.Status.Message, "low on resource: ephemeral-storage") {
		t.Errorf("the pod ended as %s: %s", status.Status.Reason, status.Status.Message)
	}
	if size := regexp.MustCompile(`was using (\d+)Ki`).FindStringSubmatch(status.Status.Message); size == nil {
		t.Errorf("kubelet does not say how much the pod used: %s", status.Status.Message)
	} else if kib, _ := strconv.Atoi(size[1]); kib < 100<<10 || kib > 101<<10 {
		t.Errorf("kubelet says that the pod used %d Ki, want 100 Mi and little more", kib)
	}
	if s := modest.Status(); s.Status.Phase != "Running" {
		t.Errorf("the modest pod is\n%v", s)
	}
	have := c.imageNames()
	for name, want := range map[string]bool{images.Busybox: true, images.Etcd: true, harness.Busybox: false} {
		if slices.Contains(have, name) != want {
			t.Errorf("image %s is there: %v, want %v; there are %v", name, !want, want, have)
		}
	}
}

// fill writes a file until only so much is free on its filesystem; it goes with the test.
func fill(t *testing.T, file string, free uint64) {
	t.Helper()
	var fs unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(file), &fs); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	t.Cleanup(func() { _ = os.Remove(file) })
	if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(fs.Bavail*uint64(fs.Bsize)-free)); err != nil {
		t.Fatal(err)
	}
}

// imageNames lists the tags that podshim has.
func (k *Kubelet) imageNames() (names []string) {
	k.t.Helper()
	list, err := k.Node.Images.ListImages(k.Node.Context(), &cri.ListImagesRequest{})
	if err != nil {
		k.t.Fatalf("list images: %v", err)
	}
	for _, image := range list.Images {
		names = append(names, image.RepoTags...)
	}
	return names
}
