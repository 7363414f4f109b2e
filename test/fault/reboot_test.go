package fault

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// The machine loses power with many pods running: the next daemon is up at once,
// tells of each what is known and no more, and kubelet's calls give back what the
// disk still holds of them. A pod that was too young to be on record loses its
// address too.
func TestReboot(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	pods := times(200, 16)
	type one struct {
		pod          *harness.Pod
		runs, exited *harness.Container
		finished     int64
	}
	all := make([]one, pods)
	var g errgroup.Group
	g.SetLimit(4)
	for i := range all {
		g.Go(func() error {
			p := n.RunPod()
			all[i] = one{pod: p, runs: p.Run([]string{"sleep", "100000"})}
			if i%8 == 0 {
				all[i].exited = p.Shell("exit 7")
				all[i].finished = all[i].exited.WaitExit().FinishedAt
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil || t.Failed() {
		t.Fatalf("not all pods are up: %v", err)
	}
	young := hold(t, n)
	// The cut comes when everything but the youngest pod is on record.
	n.Restart()
	n.LosePower()
	forget(t, n, young.pod.ID, young.c.ID)

	began := time.Now()
	n.Resume()
	took := time.Since(began)
	figures(t, "podshim answers %v after its start, with %d pods and %d containers on record", took.Round(time.Millisecond), pods, pods+(pods+7)/8)
	if took > promised(10*time.Second) {
		t.Errorf("podshim has waited for something: it answers after %v", took)
	}
	listed, err := n.Runtime.ListPodSandbox(n.Context(), &cri.ListPodSandboxRequest{})
	if err != nil || len(listed.Items) != pods {
		t.Fatalf("%d pods are listed, %v; want %d", len(listed.GetItems()), err, pods)
	}
	for _, p := range listed.Items {
		if p.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			t.Errorf("pod %s is %v", p.Id, p.State)
		}
	}
	for _, o := range all {
		if s := o.runs.Status(); s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode != 255 || s.Reason != "Unknown" {
			t.Errorf("a container that ran is %v, code %d, reason %q; nobody saw its end", s.State, s.ExitCode, s.Reason)
		}
		if o.exited == nil {
			continue
		}
		if s := o.exited.Status(); s.ExitCode != 7 || s.Reason != "Error" || s.FinishedAt != o.finished {
			t.Errorf("a container that had ended has code %d, reason %q, finished at %d; want 7, Error, %d", s.ExitCode, s.Reason, s.FinishedAt, o.finished)
		}
	}
	young.gone(t)
	for _, o := range all {
		if err := o.pod.StopAndRemove(); err != nil {
			t.Errorf("give back pod %s: %v", o.pod.ID, err)
		}
	}
	if left := addresses(t, n); len(left) > 0 {
		t.Errorf("%d addresses are still reserved: %q", len(left), left)
	}
	hold(t, n) // and new ones are made
}

// addresses are those that host-local holds.
func addresses(t *testing.T, n *harness.Node) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(n.IPAM, n.Name, "[0-9]*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// forget takes records out of the database, as if the cut had come before they were
// written there. No daemon runs.
func forget(t *testing.T, n *harness.Node, ids ...string) {
	t.Helper()
	db, err := bolt.Open(filepath.Join(n.Root, "state.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.Update(func(tx *bolt.Tx) error {
		for _, id := range ids {
			for _, kind := range []string{"sandboxes", "containers"} {
				if err := tx.Bucket([]byte(kind)).Delete([]byte(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
