package fault

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// The daemon is killed again and again while clients run and remove pods as fast
// as they can. What a kill has cut off is asked for again, as kubelet does, and
// must succeed; what ran before runs as the same process; what ended while no
// daemon was there has ended with its own code, at its own time; and when the
// clients have gone the machine is as it was before them.
func TestDaemonKilledAtRandom(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	done := make(chan struct{})
	k := &killer{n: n, random: rand.New(rand.NewPCG(seed, 0)), over: done, dead: make(chan struct{})}
	before := lasting(n)

	var clients sync.WaitGroup
	all := make([]*churner, 6)
	for i := range all {
		all[i] = &churner{t: t, n: n, k: k, volumes: t.TempDir(), random: rand.New(rand.NewPCG(seed, uint64(i+1)))}
	}
	end := sync.OnceFunc(func() {
		close(done)
		clients.Wait()
	})
	t.Cleanup(end)
	// The first pods are brought up undisturbed, beside one another: twice what that takes,
	// and a second to ten, is the longest life of a daemon, or no pod would ever be up on a
	// slow or busy machine.
	since := time.Now()
	for _, c := range all {
		clients.Go(func() {
			if err := c.pod(); err != nil {
				t.Errorf("the first pod of a client: %v", err)
			}
		})
	}
	clients.Wait()
	if t.Failed() {
		t.FailNow()
	}
	k.life = min(max(time.Second, 2*time.Since(since)), 10*time.Second)
	for _, c := range all {
		clients.Go(func() { c.run(done) })
	}
	for range times(200, 10) {
		k.strike()
	}
	end()

	pods, ends, alone, late := 0, 0, 0, time.Duration(0)
	for _, c := range all {
		pods += c.pods
		late = max(late, c.late)
		for _, e := range c.ends {
			ends++
			if slices.ContainsFunc(k.gaps, func(g span) bool { return !e.from.Before(g.from) && !e.to.After(g.to) }) {
				alone++
			}
		}
		for _, p := range c.kept {
			if err := c.checkKept(p); err != nil {
				t.Errorf("a pod that ran all the while: %v", err)
			}
			if err := c.down(p); err != nil {
				t.Errorf("remove a pod that ran all the while: %v", err)
			}
		}
	}
	figures(t, "%d kills, %d of them before the daemon answered, the others at most %v after it; %d pods, %d calls cut off and asked again; %d ends of containers, %d of them while no daemon was there; reported at most %v after the kernel's",
		k.strikes, k.early, k.life.Round(time.Millisecond), pods, k.cut.Load(), ends, alone, late)
	if alone == 0 && !testing.Short() {
		t.Error("no container has ended while no daemon was there")
	}
	if k.cut.Load() == 0 {
		t.Error("no call was cut off: the kills have hit nothing")
	}
	// Sandboxes whose making a kill has cut off are shown until they are given back.
	asked(t, "all sandboxes are given back", func() bool {
		list, err := n.Runtime.ListPodSandbox(n.Context(), &cri.ListPodSandboxRequest{})
		return err == nil && len(list.Items) == 0
	})
	var left []string
	asked(t, "nothing is left", func() bool {
		left = slices.DeleteFunc(lasting(n), func(line string) bool { return slices.Contains(before, line) })
		return len(left) == 0
	})
	for _, line := range left {
		t.Errorf("left: %s", line)
	}
}

// lasting is the node's state without what a new daemon brings along, and without
// the processes' names: a container's first has its own only after a moment.
func lasting(n *harness.Node) []string {
	lines := n.State()
	for i, line := range lines {
		if f := strings.Fields(line); f[0] == "process" {
			lines[i] = "process " + f[1]
		}
	}
	return slices.DeleteFunc(lines, func(line string) bool {
		return line == fmt.Sprintf("process %d", n.PID())
	})
}

// asked repeats a question until the answer is yes; CRI has no call that waits
// for the background.
func asked(t *testing.T, what string, question func() bool) {
	t.Helper()
	if !quietly(question) {
		t.Errorf("%s: not within %v", what, harness.Limit)
	}
}

// quietly is asked without a word; it tells whether the answer was yes.
func quietly(question func() bool) bool {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for until := time.Now().Add(harness.Limit); !question(); <-tick.C {
		if time.Now().After(until) {
			return false
		}
	}
	return true
}

// killer kills the daemon and starts it again.
type killer struct {
	n              *harness.Node
	random         *rand.Rand
	strikes, early int
	// epoch is odd from before a kill until the daemon is gone: a call may fail
	// if the epoch has changed while it ran, or was odd.
	epoch atomic.Uint64
	cut   atomic.Int64
	over  <-chan struct{} // closed after the last strike
	gaps  []span          // in which there was no daemon
	life  time.Duration   // a daemon's longest

	// alone is held for reading while a container is made to end without a daemon: none
	// is started meanwhile. Ends at any other time meet starts, too.
	alone sync.RWMutex
	mu    sync.Mutex
	dead  chan struct{} // closed while there is no daemon
}

type span struct{ from, to time.Time }

// next is closed when there is no daemon.
func (k *killer) next() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.dead
}

// rises notes that a daemon is about to be started.
func (k *killer) rises() {
	k.alone.Lock()
	defer k.alone.Unlock()
	k.mu.Lock()
	defer k.mu.Unlock()
	k.gaps[len(k.gaps)-1].to = time.Now()
	k.dead = make(chan struct{})
}

// without does something while there is no daemon, or after the last kill.
func (k *killer) without(do func() error) error {
	for {
		next := k.next()
		select {
		case <-next:
		case <-k.over:
			return do()
		}
		k.alone.RLock()
		if k.next() == next {
			defer k.alone.RUnlock()
			return do()
		}
		k.alone.RUnlock() // a daemon came first
	}
}

func (k *killer) strike() {
	k.pause(k.life)
	k.kill()
	for k.random.IntN(4) == 0 {
		// In the middle of its start, too.
		k.rises()
		k.n.Launch()
		k.pause(100 * time.Millisecond)
		k.kill()
		k.early++
	}
	k.pause(100 * time.Millisecond)
	k.rises()
	k.n.Resume()
}

func (k *killer) kill() {
	k.epoch.Add(1)
	k.n.Kill()
	k.gaps = append(k.gaps, span{from: time.Now()})
	k.mu.Lock()
	close(k.dead)
	k.mu.Unlock()
	k.n.AwaitDisconnect()
	k.epoch.Add(1)
	k.strikes++
}

func (k *killer) pause(most time.Duration) { time.Sleep(time.Duration(k.random.Int64N(int64(most)))) }

// call makes a call, and again each time that a kill has cut it off.
func call[Q, R any](k *killer, f func(context.Context, Q, ...grpc.CallOption) (R, error), request Q) (R, error) {
	for {
		epoch := k.epoch.Load()
		ctx, cancel := context.WithTimeout(context.Background(), harness.Limit)
		answer, err := f(ctx, request, grpc.WaitForReady(true))
		cancel()
		killed := epoch%2 == 1 || k.epoch.Load() != epoch
		if err == nil || !killed || status.Code(err) != codes.Unavailable {
			return answer, err
		}
		k.cut.Add(1)
	}
}

// churner is one client: it runs pods and removes them, and keeps a few.
type churner struct {
	t       *testing.T
	n       *harness.Node
	k       *killer
	volumes string
	random  *rand.Rand
	pods    int
	kept    []*churned
	late    time.Duration
	ends    []span // between which containers have ended
}

// churned is a pod of a churner: one container that runs on, and one that ends when
// a file appears in the volume.
type churned struct {
	config         *cri.PodSandboxConfig
	id             string
	volume         string
	steady, quits  string // containers' IDs
	infra, process harness.Process
}

func (c *churner) run(done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		default:
		}
		if err := c.pod(); err != nil {
			c.t.Errorf("pod %d of a client: %v", c.pods, err)
			return
		}
	}
}

// pod is one pod's life.
func (c *churner) pod() error {
	c.pods++
	p, err := c.up()
	if err != nil {
		return err
	}
	if len(c.kept) < 2 {
		c.kept = append(c.kept, p)
		return nil
	}
	if out, err := c.exec(p); err != nil || out != "hello" {
		return fmt.Errorf("exec: %q, %w", out, err)
	}
	if err := c.quit(p); err != nil {
		return err
	}
	return c.down(p)
}

func (c *churner) up() (*churned, error) {
	p := &churned{config: c.n.PodConfig(c.kind())}
	var err error
	if p.volume, err = os.MkdirTemp(c.volumes, ""); err != nil {
		return nil, err
	}
	sandbox, err := call(c.k, c.n.Runtime.RunPodSandbox, &cri.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		return nil, fmt.Errorf("RunPodSandbox: %w", err)
	}
	p.id = sandbox.PodSandboxId
	if p.steady, err = c.container(p, "steady", "echo ready; sleep 100000"); err != nil {
		return nil, err
	}
	code := c.code(p)
	if p.quits, err = c.container(p, "quits", fmt.Sprintf("while [ ! -e /volume/end ]; do sleep 0.01; done; exit %d", code)); err != nil {
		return nil, err
	}
	if p.infra, err = firstOf(p.id); err == nil {
		p.process, err = firstOf(p.steady)
	}
	return p, err
}

// code is the exit code of a pod's second container: one of its own.
func (c *churner) code(p *churned) int { return 1 + int(p.config.Metadata.Uid[0]) }

// kind is a pod on its own network, and now and then one on the node's.
func (c *churner) kind() func(*cri.PodSandboxConfig) {
	hostNetwork := c.random.IntN(4) == 0
	return func(conf *cri.PodSandboxConfig) {
		if hostNetwork {
			conf.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_NODE
		}
	}
}

func (c *churner) container(p *churned, name, script string) (string, error) {
	made, err := call(c.k, c.n.Runtime.CreateContainer, &cri.CreateContainerRequest{
		PodSandboxId: p.id, SandboxConfig: p.config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: name},
			Image:    &cri.ImageSpec{Image: harness.Busybox},
			Command:  []string{"sh", "-c", script},
			LogPath:  name + ".log",
			Mounts:   []*cri.Mount{{HostPath: p.volume, ContainerPath: "/volume"}},
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions,
			}},
		},
	})
	if err != nil {
		return "", fmt.Errorf("CreateContainer %s: %w", name, err)
	}
	if _, err := call(c.k, c.n.Runtime.StartContainer, &cri.StartContainerRequest{ContainerId: made.ContainerId}); err != nil {
		return "", fmt.Errorf("StartContainer %s: %w", name, err)
	}
	return made.ContainerId, nil
}

func (c *churner) exec(p *churned) (string, error) {
	answer, err := call(c.k, c.n.Runtime.ExecSync, &cri.ExecSyncRequest{
		ContainerId: p.steady, Cmd: []string{"echo", "-n", "hello"}, Timeout: int64(harness.Limit.Seconds()),
	})
	if err == nil && answer.ExitCode != 0 {
		err = fmt.Errorf("exit code %d: %s", answer.ExitCode, answer.Stderr)
	}
	return string(answer.GetStdout()), err
}

// quit lets the second container end, one time in three when no daemon is there, and
// checks what the runtime says of it.
func (c *churner) quit(p *churned) error {
	process, err := firstOf(p.quits)
	if err != nil {
		return err
	}
	var from, gone time.Time
	end := func() error {
		from = time.Now()
		if err := os.WriteFile(filepath.Join(p.volume, "end"), nil, 0o600); err != nil {
			return err
		}
		err := process.WaitGone(harness.Limit)
		gone = time.Now()
		return err
	}
	if c.random.IntN(3) == 0 {
		err = c.k.without(end)
	} else {
		err = end()
	}
	if err != nil {
		return err
	}
	c.ends = append(c.ends, span{from, gone})
	answer, err := call(c.k, c.n.Runtime.ContainerStatus, &cri.ContainerStatusRequest{ContainerId: p.quits})
	for err == nil && answer.Status.State == cri.ContainerState_CONTAINER_RUNNING && time.Since(gone) < harness.Limit {
		time.Sleep(5 * time.Millisecond)
		answer, err = call(c.k, c.n.Runtime.ContainerStatus, &cri.ContainerStatusRequest{ContainerId: p.quits})
	}
	if err != nil {
		return fmt.Errorf("ContainerStatus: %w", err)
	}
	s, finished := answer.Status, time.Unix(0, answer.Status.FinishedAt)
	if s.State != cri.ContainerState_CONTAINER_EXITED || int(s.ExitCode) != c.code(p) || s.Reason != "Error" {
		return fmt.Errorf("a container that ended with %d is %v with %d, %s", c.code(p), s.State, s.ExitCode, s.Reason)
	}
	// By podmon's clock, whoever was down: not when a daemon came and saw it.
	if late := finished.Sub(gone); finished.Before(from) || late > time.Second {
		return fmt.Errorf("a container ended between %v and %v, and is said to have at %v", from, gone, finished)
	} else {
		c.late = max(c.late, late)
	}
	return nil
}

// checkKept tells whether a pod is the one that it was.
func (c *churner) checkKept(p *churned) error {
	if !p.infra.Alive() || !p.process.Alive() {
		return fmt.Errorf("%s: its processes %v and %v have ended", p.id, p.infra, p.process)
	}
	pod, err := call(c.k, c.n.Runtime.PodSandboxStatus, &cri.PodSandboxStatusRequest{PodSandboxId: p.id})
	if err != nil || pod.Status.State != cri.PodSandboxState_SANDBOX_READY {
		return fmt.Errorf("sandbox %s is %v: %w", p.id, pod.GetStatus().GetState(), err)
	}
	container, err := call(c.k, c.n.Runtime.ContainerStatus, &cri.ContainerStatusRequest{ContainerId: p.steady})
	if err != nil || container.Status.State != cri.ContainerState_CONTAINER_RUNNING {
		return fmt.Errorf("container %s is %v: %w", p.steady, container.GetStatus().GetState(), err)
	}
	if out, err := c.exec(p); err != nil || out != "hello" {
		return fmt.Errorf("exec in %s: %q, %w", p.steady, out, err)
	}
	return c.quit(p)
}

// down takes a pod down as kubelet does.
func (c *churner) down(p *churned) error {
	if _, err := call(c.k, c.n.Runtime.StopContainer, &cri.StopContainerRequest{ContainerId: p.steady}); err != nil {
		return fmt.Errorf("StopContainer: %w", err)
	}
	for _, id := range []string{p.steady, p.quits} {
		if _, err := call(c.k, c.n.Runtime.RemoveContainer, &cri.RemoveContainerRequest{ContainerId: id}); err != nil {
			return fmt.Errorf("RemoveContainer: %w", err)
		}
	}
	if _, err := call(c.k, c.n.Runtime.StopPodSandbox, &cri.StopPodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("StopPodSandbox: %w", err)
	}
	if _, err := call(c.k, c.n.Runtime.RemovePodSandbox, &cri.RemovePodSandboxRequest{PodSandboxId: p.id}); err != nil {
		return fmt.Errorf("RemovePodSandbox: %w", err)
	}
	return nil
}

// firstOf is the first process of a container or sandbox, by its cgroup.
func firstOf(id string) (harness.Process, error) {
	all := harness.Processes(func(p harness.Process) bool { return p.State != "Z" && strings.Contains(p.Cgroup, id) })
	if len(all) == 0 {
		return harness.Process{}, errors.New("no process has a cgroup of " + id)
	}
	return slices.MinFunc(all, func(a, b harness.Process) int {
		return int(int64(a.StartTime) - int64(b.StartTime))
	}), nil
}
