package fault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// spoilRecord damages both copies of a record, as a failing disk and memory would.
// No daemon runs.
func spoilRecord(t *testing.T, n *harness.Node, kind, id string) {
	t.Helper()
	file := filepath.Join(n.RunDir, "state", kind, id)
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, raw[:len(raw)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(n.Root, "state.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket([]byte(kind))
		raw := append([]byte(nil), b.Get([]byte(id))...)
		if len(raw) == 0 {
			t.Errorf("the database has no record of %s %s", kind, id)
		}
		clear(raw[len(raw)/2:])
		return b.Put([]byte(id), raw)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// holding is what a pod and its container have on this machine.
type holding struct {
	n        *harness.Node
	pod      *harness.Pod
	c        *harness.Container
	infra    harness.Process
	process  harness.Process
	ip       string
	pin      string
	snapshot string // the writable layer's directory
}

func hold(t *testing.T, n *harness.Node) holding {
	t.Helper()
	h := holding{n: n, pod: n.RunPod()}
	h.c = h.pod.Run([]string{"sleep", "100000"})
	h.infra, h.process = h.pod.Infra(), h.c.Process()
	h.ip = h.pod.Status().GetNetwork().GetIp()
	h.pin = filepath.Join(n.NetnsDir, "podshim-"+h.pod.ID[:16])
	h.snapshot = filepath.Dir(upperDir(t, h.process))
	return h
}

// upperDir is the writable layer of a process's root.
func upperDir(t *testing.T, p harness.Process) string {
	t.Helper()
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", p.PID))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, mountinfo.SingleEntryFilter("/"))
	if err != nil || len(mounts) != 1 {
		t.Fatalf("roots of process %d: %v, %v", p.PID, mounts, err)
	}
	for _, o := range strings.Split(mounts[0].VFSOptions, ",") {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok {
			return dir
		}
	}
	t.Fatalf("process %d has no upperdir: %s", p.PID, mounts[0].VFSOptions)
	return ""
}

// reserved tells whether host-local holds the pod's address.
func (h holding) reserved() bool {
	_, err := os.Stat(filepath.Join(h.n.IPAM, h.n.Name, h.ip))
	return err == nil
}

// untouched checks that nothing was taken from it.
func (h holding) untouched(t *testing.T) {
	t.Helper()
	if !h.infra.Alive() || !h.process.Alive() {
		t.Errorf("processes: infra alive %t, container alive %t", h.infra.Alive(), h.process.Alive())
	}
	if !h.reserved() {
		t.Errorf("the address %s is not reserved any more", h.ip)
	}
	for _, path := range []string{h.pin, h.snapshot, fmt.Sprintf("/proc/%d/root/bin", h.process.PID), filepath.Join(h.n.Root, "sandboxes", h.pod.ID)} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("taken away: %v", err)
		}
	}
}

// gone waits until all of it is given back.
func (h holding) gone(t *testing.T) {
	t.Helper()
	for _, p := range []harness.Process{h.infra, h.process} {
		if err := p.WaitGone(harness.Limit); err != nil {
			t.Error(err)
		}
	}
	for _, path := range []string{h.pin, h.snapshot, filepath.Join(h.n.RunDir, "containers", h.c.ID), filepath.Join(h.n.Root, "sandboxes", h.pod.ID), filepath.Join(h.n.IPAM, h.n.Name, h.ip)} {
		if err := harness.WaitNoFile(path); err != nil {
			t.Errorf("%s is still there: %v", path, err)
		}
	}
}

// A pod whose record and a container whose record are damaged in both places run on
// with all that they have, over any number of restarts, until somebody says
// otherwise. The records beside them lose nothing.
func TestDamagedRecordsKeepWhatTheyStandFor(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := start(t, harness.Options{})
	container, pod, whole := hold(t, n), hold(t, n), hold(t, n)
	n.Stop()
	spoilRecord(t, n, "containers", container.c.ID)
	spoilRecord(t, n, "sandboxes", pod.pod.ID)
	for range 2 {
		n.Resume()
		// The last things that the start looks at.
		n.WaitLog("it is left alone", "snapshot="+container.c.ID)
		n.WaitLog("it is left alone", "namespace="+pod.pin)
		for _, h := range []holding{container, pod, whole} {
			h.untouched(t)
		}
		if got := whole.c.Output("echo", "works"); got != "works" {
			t.Errorf("the container with a record: %q", got)
		}
		hold(t, n) // and so do new ones
		n.Stop()
	}
	kept, err := filepath.Glob(filepath.Join(n.Root, "damaged", "*", "*"))
	if err != nil || len(kept) != 2 {
		t.Fatalf("set aside are %q, %v", kept, err)
	}
	for _, path := range kept {
		if !strings.Contains(n.Log(), path) {
			t.Errorf("the log does not say that %s is kept", path)
		}
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	n.Resume()
	if err := container.process.WaitGone(harness.Limit); err != nil {
		t.Errorf("a container that was given up: %v", err)
	}
	// Its container has a record, and keeps the pod's namespace.
	n.WaitLog("processes are in it", "namespace="+pod.pin)
	if err := pod.pod.StopAndRemove(); err != nil {
		t.Error(err)
	}
	n.Restart()
	pod.gone(t)
	whole.untouched(t)
}

// The database is damaged and the run directory empty: no pod is known, and all run
// on.
func TestAllRecordsAreLost(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := start(t, harness.Options{})
	lost := hold(t, n)
	n.Kill()
	if err := os.WriteFile(filepath.Join(n.Root, "state.db"), make([]byte, 32<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(n.RunDir, "state")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		n.Resume()
		n.WaitLog("it is left alone", "snapshot="+lost.c.ID)
		lost.untouched(t)
		hold(t, n).untouched(t)
		n.Kill()
	}
	if err := os.RemoveAll(filepath.Join(n.Root, "damaged")); err != nil {
		t.Fatal(err)
	}
	n.Resume()
	lost.gone(t)
}

// One of the two places is enough.
func TestDamagedDatabaseOrEmptyRunDirectory(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	for what, spoil := range map[string]func(n *harness.Node) error{
		"zeroed database":    func(n *harness.Node) error { return os.WriteFile(n.Root+"/state.db", make([]byte, 32<<10), 0o600) },
		"truncated database": func(n *harness.Node) error { return os.Truncate(n.Root+"/state.db", 5000) },
		"empty database":     func(n *harness.Node) error { return os.Truncate(n.Root+"/state.db", 0) },
		"no records in the run directory": func(n *harness.Node) error {
			return os.RemoveAll(n.RunDir + "/state")
		},
		"half-written records": func(n *harness.Node) error {
			for _, kind := range []string{"containers", "sandboxes"} {
				files, err := filepath.Glob(n.RunDir + "/state/" + kind + "/*")
				if err != nil {
					return err
				}
				for _, f := range files {
					if err := os.Truncate(f, 7); err != nil {
						return err
					}
					if err := os.WriteFile(f+".partial", []byte("half"), 0o600); err != nil {
						return err
					}
				}
			}
			return nil
		},
	} {
		t.Run(what, func(t *testing.T) {
			n := start(t, harness.Options{})
			h := hold(t, n)
			n.Stop()
			if err := spoil(n); err != nil {
				t.Fatal(err)
			}
			n.Resume()
			h.untouched(t)
			if got := h.c.Output("echo", "works"); got != "works" {
				t.Errorf("exec: %q", got)
			}
			if again := h.c.Process(); again.PID != h.process.PID || again.StartTime != h.process.StartTime {
				t.Errorf("its process was %v, is %v", h.process, again)
			}
			if err := h.pod.StopAndRemove(); err != nil {
				t.Fatal(err)
			}
			h.gone(t)
		})
	}
}

// The disk has lost in a power cut what it was told to keep: the daemon says what, the
// image is pulled again, and of its layers only the damaged one is fetched.
func TestLayerDamagedByAPowerCut(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := start(t, harness.Options{})
	name := n.NewImage("fault/damaged", harness.ImageOptions{Files: map[string]string{"data/file": "what the image holds"}})
	before := n.RunPod()
	before.Shell("exit 3", func(c *cri.ContainerConfig) { c.Image.Image = name }).WaitExit()
	n.LosePower()
	files, err := filepath.Glob(filepath.Join(n.Root, "images", "snapshots", "*", "fs", "data", "file"))
	if err != nil || len(files) != 1 {
		t.Fatalf("the image's file is at %q, %v", files, err)
	}
	if err := os.WriteFile(files[0], make([]byte, len("what the image holds")), 0o644); err != nil {
		t.Fatal(err)
	}
	n.Resume()
	n.WaitLog("an image is damaged", files[0], name)
	pod := n.RunPod()
	config := pod.ContainerConfig([]string{"cat", "/data/file"}, func(c *cri.ContainerConfig) { c.Image.Image = name })
	_, err = n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{PodSandboxId: pod.ID, Config: config, SandboxConfig: pod.Config})
	if status.Code(err) != codes.NotFound {
		t.Errorf("a container of a damaged image: %v", err)
	}
	// kubelet sees that the image is not there, and pulls it.
	asked, err := n.Images.ImageStatus(n.Context(), &cri.ImageStatusRequest{Image: config.Image})
	if err != nil || asked.Image != nil {
		t.Errorf("the damaged image is there: %v, %v", asked, err)
	}
	n.Pull(name)
	n.WaitLog("a damaged layer was fetched again")
	c := pod.Run(config.Command, func(c *cri.ContainerConfig) { c.Image.Image = name })
	c.WaitExit()
	c.WaitLog("what the image holds")
	// An image that lost nothing is used as ever.
	pod.Run([]string{"true"}).WaitExit()
}

// empty deletes all files of the run directory but what is in mounts, and podmon's
// directories as well.
func empty(t *testing.T, n *harness.Node) {
	t.Helper()
	find := exec.Command("find", n.RunDir, "-xdev", "-mindepth", "1", "-not", "-path", "*/rootfs", "-not", "-path", "*/shm", "-type", "f,s,p,l", "-delete")
	if out, err := find.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// podmon may write already what is being deleted.
	if err := os.RemoveAll(filepath.Join(n.RunDir, "monitor")); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
		t.Fatal(err)
	}
}

// Somebody empties the run directory while the daemon is away, mounts aside, which
// cannot be deleted. podmon writes anew what others need of it, the daemon has the rest
// in the root directory: nothing is lost, also not when podmon is replaced after that.
func TestEmptiedRunDirectory(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := start(t, harness.Options{})
	h := hold(t, n)
	writes := h.pod.Shell(counter(""))
	ends := h.pod.Shell("read x; echo got $x; exit 21", func(c *cri.ContainerConfig) { c.Stdin = true })
	process := writes.Process()
	n.Stop()
	empty(t, n)
	n.Resume()
	h.untouched(t)
	for _, podmon := range []string{"the same", "another"} {
		if podmon == "another" {
			old := n.Podmon()
			if err := old.Kill(unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			untilDone(t, n, "exec", func(ctx context.Context) error {
				_, err := n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: h.c.ID, Cmd: []string{"true"}})
				return err
			})
			if n.Podmon().PID == old.PID {
				t.Errorf("podmon %v is not replaced", old)
			}
		}
		if got := h.c.Output("echo", "works"); got != "works" {
			t.Errorf("%s podmon: exec says %q", podmon, got)
		}
		if now := writes.Process(); now.PID != process.PID || now.StartTime != process.StartTime {
			t.Errorf("%s podmon: %v has become %v", podmon, process, now)
		}
		if s := h.pod.Status(); s.State != cri.PodSandboxState_SANDBOX_READY {
			t.Errorf("%s podmon: the pod is %v", podmon, s.State)
		}
		limits := &cri.LinuxContainerResources{CpuShares: 512}
		if _, err := n.Runtime.UpdateContainerResources(n.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: h.c.ID, Linux: limits}); err != nil {
			t.Errorf("%s podmon: update: %v", podmon, err)
		}
		hold(t, n)
	}
	s, err := attach(n.Context(), n, ends.ID, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.write("input\n"); err != nil {
		t.Fatal(err)
	}
	if s := ends.WaitExit(); s.ExitCode != 21 || ends.LogText("stdout") != "got input\n" {
		t.Errorf("the reader ended with %d, and has written %q", s.ExitCode, ends.LogText("stdout"))
	}
	writes.Stop(30 * time.Second)
	if s := writes.Status(); s.ExitCode != 33 {
		t.Errorf("the writer ended with %d, want 33", s.ExitCode)
	}
	if got := counted(t, writes.LogPath(), "stdout"); len(got.notes) > 0 {
		t.Errorf("notes in the log: %q", got.notes)
	}
	if err := h.pod.StopAndRemove(); err != nil {
		t.Fatal(err)
	}
	h.gone(t)
}

// The same, and podmon has gone too: nobody knows the containers any more. They run on,
// and what is known of them in the root directory is enough to remove them.
func TestEmptiedRunDirectoryWithoutPodmon(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := start(t, harness.Options{})
	h := hold(t, n)
	podmon := n.Podmon()
	n.Stop()
	if err := podmon.Kill(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := podmon.WaitGone(harness.Limit); err != nil {
		t.Fatal(err)
	}
	empty(t, n)
	n.Resume()
	n.WaitLog("podmon has lost it", h.c.ID)
	if !h.infra.Alive() || !h.process.Alive() {
		t.Errorf("processes: infra alive %t, container alive %t", h.infra.Alive(), h.process.Alive())
	}
	if s := h.c.Status(); s.ExitCode != 255 || s.Reason != "Unknown" {
		t.Errorf("nobody sees it any more, and it is %v, code %d, reason %q", s.State, s.ExitCode, s.Reason)
	}
	hold(t, n)
	// kubelet stops the pod that is not ready any more before it makes another one.
	if err := h.pod.StopAndRemove(); err != nil {
		t.Fatal(err)
	}
	h.gone(t)
}
