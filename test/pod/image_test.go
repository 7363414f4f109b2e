package pod

import (
	"os"
	"slices"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// An image is pulled, listed, seen under all its names, used and removed.
func TestImages(t *testing.T) {
	harness.NeedRoot(t)
	n := harness.Start(t, harness.Options{NoPull: true})
	reg, err := harness.LoopbackRegistry()
	if err != nil {
		t.Fatal(err)
	}
	opts := harness.ImageOptions{Files: map[string]string{"only/here": "content"}}
	opts.Config.User = "1000:50000"
	var digests []string
	for _, tag := range []string{"a", "b"} {
		digest, err := reg.Push("images-test", tag, opts)
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, digest.String())
	}
	if digests[0] != digests[1] {
		t.Fatalf("one image has digests %v", digests)
	}
	name := harness.RegistryHost + "/images-test"
	if s := imageStatus(t, n, name+":a"); s != nil {
		t.Fatalf("image is there before the pull: %v", s)
	}
	refA, refB := n.Pull(name+":a"), n.Pull(name+":b")
	if refA != refB {
		t.Errorf("one image has references %s and %s", refA, refB)
	}
	byDigest := name + "@" + digests[0]
	n.Pull(byDigest)
	var id string
	for _, ref := range []string{name + ":a", name + ":b", byDigest, refA} {
		s := imageStatus(t, n, ref)
		if s == nil {
			t.Fatalf("%s is not known after the pull", ref)
		}
		if id == "" {
			id = s.Id
		}
		slices.Sort(s.RepoTags)
		if s.Id != id || !slices.Equal(s.RepoTags, []string{name + ":a", name + ":b"}) ||
			!slices.Equal(s.RepoDigests, []string{byDigest}) || s.Size == 0 || s.GetUid().GetValue() != 1000 || s.Pinned {
			t.Errorf("%s is %v", ref, s)
		}
	}
	if !strings.HasPrefix(id, "sha256:") || len(id) != 71 {
		t.Errorf("image ID is %q", id)
	}
	list, err := n.Images.ListImages(n.Context(), &cri.ListImagesRequest{})
	if err != nil || len(list.Images) != 1 {
		t.Errorf("list: %v, %v", list.GetImages(), err)
	}
	filtered, err := n.Images.ListImages(n.Context(), &cri.ListImagesRequest{Filter: &cri.ImageFilter{Image: &cri.ImageSpec{Image: name + ":zzz"}}})
	if err != nil || len(filtered.Images) != 0 {
		t.Errorf("list of another name: %v, %v", filtered.GetImages(), err)
	}
	usedBefore := fsUsed(t, n)

	c := n.RunPod().Run(sleeper, image(id))
	if got := c.Output("cat", "/only/here"); got != "content" {
		t.Errorf("container sees %q", got)
	}
	if s := c.Status(); s.ImageId != id && s.ImageRef != refA {
		t.Errorf("container's image is %s, %s", s.ImageId, s.ImageRef)
	}
	// CRI: removing by one tag removes the image with all its tags. An image in
	// use may be refused or kept for its container, but never pulled from under it.
	c.Stop(0)
	if _, err := n.Runtime.RemovePodSandbox(n.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: c.Pod.ID}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := n.Images.RemoveImage(n.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: name + ":a"}}); err != nil {
			t.Fatalf("remove: %v", err)
		}
	}
	for _, ref := range []string{name + ":a", name + ":b", byDigest, id} {
		if s := imageStatus(t, n, ref); s != nil {
			t.Errorf("%s is there after the removal: %v", ref, s)
		}
	}
	if !eventually(func() bool { return fsUsed(t, n) < usedBefore }) {
		t.Errorf("disk use is %d after the removal, was %d", fsUsed(t, n), usedBefore)
	}
}

func imageStatus(t *testing.T, n *harness.Node, ref string) *cri.Image {
	t.Helper()
	s, err := n.Images.ImageStatus(n.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatalf("status of %s: %v", ref, err)
	}
	return s.Image
}

func fsUsed(t *testing.T, n *harness.Node) uint64 {
	t.Helper()
	info, err := n.Images.ImageFsInfo(n.Context(), &cri.ImageFsInfoRequest{})
	if err != nil || len(info.ImageFilesystems) != 1 {
		t.Fatalf("image filesystem: %v, %v", info, err)
	}
	fs := info.ImageFilesystems[0]
	if st, err := os.Stat(fs.GetFsId().GetMountpoint()); err != nil || !st.IsDir() {
		t.Errorf("image filesystem at %q: %v", fs.GetFsId().GetMountpoint(), err)
	}
	return fs.GetUsedBytes().GetValue()
}
