package sandbox

import (
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/image"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/monitor/wire"
	"github.com/podshim/podshim/internal/spec"
	"github.com/podshim/podshim/internal/state"
)

// world is what a Manager works with: the machine's own namespaces, mounts and
// files, and for the rest a ledger of what is held. Each of its calls is a step,
// and any one step can be made to fail.
type world struct {
	mu       sync.Mutex
	steps    int
	failAt   int // which step fails, counted from 1; 0 is none
	delFails int // how often Del fails before it works

	infra     map[string]*exec.Cmd
	networks  map[string]bool
	roots     map[string]bool
	records   map[string][]byte
	addBegins chan struct{} // closed when an Add begins, if not nil
	addWaits  chan struct{} // what an Add waits for, if not nil
	noStart   chan struct{} // closed when a Start fails, which it does if not nil
	addIsCut  bool          // an Add beside that was cut short
}

var errInjected = errors.New("injected")

func (w *world) step() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.steps++
	if w.steps == w.failAt {
		return errInjected
	}
	return nil
}

// note changes the ledger under its lock.
func (w *world) note(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

func (w *world) Start(_ context.Context, r monitor.StartRequest) (monitor.Process, error) {
	if w.noStart != nil {
		close(w.noStart)
		return monitor.Process{}, errors.New("no start")
	}
	infra := exec.Command("sleep", "100000")
	if err := infra.Start(); err != nil {
		return monitor.Process{}, err
	}
	// Taken even when the step fails: an answer may be lost on its way.
	w.note(func() { w.infra[r.ID] = infra })
	if err := w.step(); err != nil {
		return monitor.Process{}, err
	}
	return wire.Identify(infra.Process.Pid)
}

func (w *world) Delete(ctx context.Context, id string) error {
	var infra *exec.Cmd
	w.note(func() {
		infra = w.infra[id]
		delete(w.infra, id)
	})
	if infra != nil {
		if err := infra.Process.Kill(); err != nil {
			return err
		}
		_ = infra.Wait() // killed
	}
	return ctx.Err()
}

func (w *world) List() []monitor.Status { return nil }

func (w *world) Add(ctx context.Context, p cni.Pod) (cni.Result, error) {
	if w.addBegins != nil {
		close(w.addBegins)
		<-w.addWaits
	}
	if w.noStart != nil {
		<-w.noStart
		select {
		case <-ctx.Done():
			w.addIsCut = true
		case <-time.After(100 * time.Millisecond):
		}
	}
	w.note(func() { w.networks[p.ID] = true })
	if err := w.step(); err != nil {
		return cni.Result{}, err
	}
	return cni.Result{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.2")}, Interface: "eth0", Raw: []byte(`{}`)}, ctx.Err()
}

func (w *world) Del(ctx context.Context, p cni.Pod) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.delFails > 0 {
		w.delFails--
		return errInjected
	}
	delete(w.networks, p.ID)
	return ctx.Err()
}

func (w *world) Acquire(_ context.Context, id, _ string, _, _ []specs.LinuxIDMapping) (InfraImage, error) {
	w.note(func() { w.roots[id] = true })
	return InfraImage{Rootfs: "/"}, w.step()
}

func (w *world) Release(_ context.Context, id string) error {
	w.note(func() { delete(w.roots, id) })
	return nil
}

func (w *world) Put(kind state.Kind, id string, value []byte) error {
	if err := w.step(); err != nil {
		return err
	}
	w.note(func() { w.records[string(kind)+"/"+id] = value })
	return nil
}

func (w *world) forgetRecord(kind state.Kind, id string) error {
	w.note(func() { delete(w.records, string(kind)+"/"+id) })
	return nil
}

func (w *world) Take(kind state.Kind) map[string][]byte {
	out := make(map[string][]byte)
	for k, v := range w.records {
		if id, ok := strings.CutPrefix(k, string(kind)+"/"); ok {
			out[id] = v
		}
	}
	return out
}

// recordsOf lets a world be Records too, whose Delete is another than Monitor's.
type recordsOf struct{ *world }

func (r recordsOf) Delete(kind state.Kind, id string) error { return r.forgetRecord(kind, id) }

func newWorld() *world {
	return &world{
		infra: map[string]*exec.Cmd{}, networks: map[string]bool{}, roots: map[string]bool{}, records: map[string][]byte{},
	}
}

func (w *world) manager(t *testing.T, dir string) *Manager {
	t.Helper()
	log := logrus.New()
	log.SetOutput(io.Discard)
	host := spec.Host{Hostname: "node"}
	m, err := NewManager(Config{
		RunDir: filepath.Join(dir, "sandboxes"), RootDir: filepath.Join(dir, "files"), NetnsDir: filepath.Join(dir, "netns"),
		CgroupParent: "/podshim-sandbox-test", OperationLimit: time.Minute,
		Host: host, Handlers: map[string]spec.Handler{"": {}},
		Records: recordsOf{w}, Monitor: w, Network: w, Infra: w,
		Log: logrus.NewEntry(log),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(context.Background()); err != nil {
			t.Error(err)
		}
		w.note(func() {
			for _, infra := range w.infra { // of a test that failed
				_ = infra.Process.Kill()
				_ = infra.Wait()
			}
		})
	})
	return m
}

// held lists all that is taken, in the ledger and on the machine.
func (w *world) held(t *testing.T, dir string) []string {
	t.Helper()
	var all []string
	w.note(func() {
		for id := range w.infra {
			all = append(all, "infra "+id)
		}
		for what, ids := range map[string]map[string]bool{"network": w.networks, "root": w.roots} {
			for id := range ids {
				all = append(all, what+" "+id)
			}
		}
		for k := range w.records {
			all = append(all, "record "+k)
		}
	})
	for _, sub := range []string{"sandboxes", "files", "netns"} {
		entries, err := os.ReadDir(filepath.Join(dir, sub))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		for _, e := range entries {
			all = append(all, "file "+sub+"/"+e.Name())
		}
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if m.Mountpoint != filepath.Join(dir, "netns") { // stays, as /run/netns does
			all = append(all, "mount "+m.Mountpoint)
		}
	}
	return all
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces and mounts")
	}
}

// place is a directory in which namespaces are pinned; its own mount goes with it.
func place(t *testing.T) string {
	t.Helper()
	needRoot(t)
	dir := t.TempDir()
	t.Cleanup(func() {
		if err := image.Unmount(filepath.Join(dir, "netns")); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func podConfig(name string) *runtime.PodSandboxConfig {
	return &runtime.PodSandboxConfig{
		Metadata: &runtime.PodSandboxMetadata{Name: name, Namespace: "default", Uid: "uid-" + name},
		Hostname: name,
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent: "/podshim-sandbox-test/pod",
			SecurityContext: &runtime.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER},
			},
		},
	}
}

// Every step of Run is made to fail once: nothing may be held afterwards, and the
// same request must succeed.
func TestRunGivesBackWhateverStepFails(t *testing.T) {
	ctx := context.Background()
	for failAt := 1; ; failAt++ {
		dir := place(t)
		w := newWorld()
		m := w.manager(t, dir)
		w.failAt = failAt
		cfg := podConfig("p")
		id, err := m.Run(ctx, cfg, "")
		if err == nil {
			if failAt < 5 {
				t.Errorf("Run has no more than %d steps", failAt-1)
			}
			w.failAt = 0
			if err := m.Remove(ctx, id); err != nil {
				t.Error(err)
			}
			return
		}
		if !errors.Is(err, errInjected) || id != "" {
			t.Fatalf("step %d: Run returned %q, %v", failAt, id, err)
		}
		if held := w.held(t, dir); len(held) > 0 {
			t.Errorf("step %d failed and these are held: %q", failAt, held)
		}
		if list := m.List(); len(list) > 0 {
			t.Errorf("step %d failed and a sandbox is listed", failAt)
		}
		w.failAt = 0
		if id, err = m.Run(ctx, cfg, ""); err != nil {
			t.Fatalf("step %d: the retry failed: %v", failAt, err)
		}
		for range 2 {
			if err := m.Stop(ctx, id); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if err := m.Remove(ctx, id); err != nil {
				t.Fatal(err)
			}
		}
		if held := w.held(t, dir); len(held) > 0 {
			t.Errorf("after Remove these are held: %q", held)
		}
	}
}

// The daemon is "killed" at each step of Run: another one, on the records and the
// machine that it leaves, gives everything back by itself.
func TestNextManagerFinishesWhatACrashLeft(t *testing.T) {
	ctx := context.Background()
	dir := place(t)
	w := newWorld()
	w.addBegins, w.addWaits = make(chan struct{}), make(chan struct{})
	first := w.manager(t, dir)
	crashed, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = first.Run(crashed, podConfig("p"), "")
	}()
	<-w.addBegins
	// What the next daemon finds when this one dies in the middle of ADD.
	left := newWorld()
	w.note(func() {
		for k, v := range w.records {
			left.records[k] = v
			left.networks[strings.TrimPrefix(k, "sandboxes/")] = true
		}
	})
	if len(left.records) != 1 {
		t.Fatalf("%d records at the time of the crash, want 1", len(left.records))
	}
	cancel()
	next := left.manager(t, dir)
	id, err := next.Run(ctx, podConfig("p"), "")
	if err != nil {
		t.Fatalf("the retry after the crash: %v", err)
	}
	if err := next.Remove(ctx, id); err != nil {
		t.Fatal(err)
	}
	if !next.janitor.Sweep(ctx) {
		t.Error("leftovers are not all released")
	}
	close(w.addWaits)
	<-done
	if err := first.Close(ctx); err != nil {
		t.Fatal(err)
	}
	left.note(func() {
		if len(left.records)+len(left.networks) > 0 {
			t.Errorf("held: records %d, networks %v", len(left.records), left.networks)
		}
	})
}

// What a failed Run cannot give back stays visible, its name is free, and the
// janitor goes on until all is given back.
func TestJanitorGoesOnWhereUndoFails(t *testing.T) {
	ctx := context.Background()
	dir := place(t)
	w := newWorld()
	m := w.manager(t, dir)
	w.failAt, w.delFails = 3, 2
	if _, err := m.Run(ctx, podConfig("p"), ""); !errors.Is(err, errInjected) {
		t.Fatalf("Run: %v", err)
	}
	if id, err := m.Run(ctx, podConfig("p"), ""); err != nil {
		t.Fatalf("the name is still taken: %v", err)
	} else if err := m.Remove(ctx, id); err != nil {
		t.Fatal(err)
	}
	for !m.janitor.Sweep(ctx) {
	}
	if held := w.held(t, dir); len(held) > 0 {
		t.Errorf("held: %q", held)
	}
}

func TestRetryOfRun(t *testing.T) {
	ctx := context.Background()
	dir := place(t)
	w := newWorld()
	w.addBegins, w.addWaits = make(chan struct{}), make(chan struct{})
	m := w.manager(t, dir)

	impatient, cancel := context.WithCancel(ctx)
	gaveUp := make(chan error, 1)
	go func() {
		_, err := m.Run(impatient, podConfig("p"), "")
		gaveUp <- err
	}()
	<-w.addBegins
	cancel()
	if err := <-gaveUp; !errors.Is(err, context.Canceled) {
		t.Fatalf("the caller that gave up got %v", err)
	}
	other := podConfig("p")
	other.Hostname = "other"
	if _, err := m.Run(ctx, other, ""); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another config under a name in use: %v", err)
	}
	close(w.addWaits)
	// The impatient one was killed: kubelet's next life marks the pod with another time.
	retry := podConfig("p")
	retry.Annotations = map[string]string{"kubernetes.io/config.seen": "2026-01-02T03:04:05Z"}
	id, err := m.Run(ctx, retry, "")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := m.Run(ctx, podConfig("p"), ""); err != nil || again != id {
		t.Errorf("asked again when ready: %q, %v; want %q", again, err, id)
	}
	if n := len(m.List()); n != 1 {
		t.Errorf("%d sandboxes", n)
	}
	if got, err := m.Get(id[:8]); err != nil || got.Get().ID != id {
		t.Errorf("by prefix: %v", err)
	}
	if err := m.Remove(ctx, id); err != nil {
		t.Fatal(err)
	}
	if held := w.held(t, dir); len(held) > 0 {
		t.Errorf("held: %q", held)
	}
}

// A plugin that is killed in the midst may leave what no DEL finds.
func TestAddIsNotCutShort(t *testing.T) {
	dir := place(t)
	w := newWorld()
	w.noStart = make(chan struct{})
	m := w.manager(t, dir)
	if _, err := m.Run(t.Context(), podConfig("p"), ""); err == nil || !strings.Contains(err.Error(), "no start") {
		t.Errorf("Run without infra: %v", err)
	}
	if w.addIsCut {
		t.Error("CNI ADD was cut short because infra has failed")
	}
	if left := w.held(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestInfraEnds(t *testing.T) {
	ctx := context.Background()
	w := newWorld()
	m := w.manager(t, place(t))
	id, err := m.Run(ctx, podConfig("p"), "")
	if err != nil {
		t.Fatal(err)
	}
	s, err := m.Get(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Pod(s); err != nil {
		t.Fatal(err)
	}
	if err := m.Exited(ctx, monitor.Event{ID: id, Exit: monitor.Exit{Code: 137, Known: true, At: time.Now()}}); err != nil {
		t.Fatal(err)
	}
	if r := s.Get(); r.State != NotReady || r.InfraExit == nil || r.InfraExit.Code != 137 {
		t.Errorf("after infra's end: %+v", r)
	}
	if _, err := m.Pod(s); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a container may still join: %v", err)
	}
	if err := m.Remove(ctx, id); err != nil {
		t.Fatal(err)
	}
}

func TestIllegalMoves(t *testing.T) {
	m := newWorld().manager(t, t.TempDir())
	for _, from := range []State{Creating, Ready, NotReady} {
		for _, to := range []State{Creating, Ready, NotReady} {
			legal := from == Creating && to != Creating || from == Ready && to == NotReady
			s := m.all.Add(&Record{ID: string(from + to), State: from, Config: podConfig("p")})
			err := m.all.Move(s, to, nil)
			if legal != (err == nil) {
				t.Errorf("%s to %s: %v", from, to, err)
			}
			if want := map[bool]State{true: to, false: from}[legal]; s.Get().State != want {
				t.Errorf("%s to %s: is %s", from, to, s.Get().State)
			}
		}
	}
}
