package fault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// subject is a pod with a container, as far as they have been made.
type subject struct {
	n                  *harness.Node
	config             *cri.PodSandboxConfig
	sandbox, container string
}

// operations are the calls whose every step is made to fail. Each is made on a
// subject that the calls before it have made; gone tells whether nothing may be
// held after it has failed, since what it makes is not there.
var operations = []struct {
	name   string
	before []func(*subject) error
	call   func(*subject) error
	makes  bool
}{
	{"RunPodSandbox", nil, (*subject).runPod, true},
	{"CreateContainer", up(0), (*subject).create, true},
	{"StartContainer", up(1), (*subject).start, false},
	{"StopContainer", up(2), (*subject).stop, false},
	{"RemoveContainer", up(2), (*subject).remove, false},
	{"StopPodSandbox", up(2), (*subject).stopPod, false},
	{"RemovePodSandbox", up(2), (*subject).removePod, false},
}

func up(last int) []func(*subject) error {
	return []func(*subject) error{(*subject).runPod, (*subject).create, (*subject).start}[:last+1]
}

func (s *subject) runPod() error {
	answer, err := s.n.Runtime.RunPodSandbox(s.n.Context(), &cri.RunPodSandboxRequest{Config: s.config})
	if err == nil {
		s.sandbox = answer.PodSandboxId
	}
	return err
}

func (s *subject) create() error { return s.createWithin(s.n.Context()) }

func (s *subject) createWithin(ctx context.Context) error {
	answer, err := s.n.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: s.sandbox, SandboxConfig: s.config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "c"},
			Image:    &cri.ImageSpec{Image: harness.Busybox},
			Command:  []string{"sh", "-c", "trap 'exit 0' TERM; sleep 100000 & wait"},
			LogPath:  "c.log",
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
				NamespaceOptions: s.config.Linux.SecurityContext.NamespaceOptions,
			}},
		},
	})
	if err == nil {
		s.container = answer.ContainerId
	}
	return err
}

func (s *subject) start() error {
	_, err := s.n.Runtime.StartContainer(s.n.Context(), &cri.StartContainerRequest{ContainerId: s.container})
	return err
}

func (s *subject) stop() error {
	_, err := s.n.Runtime.StopContainer(s.n.Context(), &cri.StopContainerRequest{ContainerId: s.container, Timeout: 1})
	return err
}

func (s *subject) remove() error {
	_, err := s.n.Runtime.RemoveContainer(s.n.Context(), &cri.RemoveContainerRequest{ContainerId: s.container})
	return err
}

func (s *subject) stopPod() error {
	_, err := s.n.Runtime.StopPodSandbox(s.n.Context(), &cri.StopPodSandboxRequest{PodSandboxId: s.sandbox})
	return err
}

func (s *subject) removePod() error {
	_, err := s.n.Runtime.RemovePodSandbox(s.n.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: s.sandbox})
	return err
}

// done tells by the machine whether an operation has done what it is for.
func (s *subject) done(operation string) error {
	_, infra := firstOf(s.sandbox)
	_, process := firstOf(s.container)
	var wrong bool
	switch operation {
	case "RunPodSandbox":
		wrong = infra != nil
	case "CreateContainer":
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil || !strings.Contains(string(mounts), "/"+s.container+"/rootfs ") {
			return fmt.Errorf("it has succeeded, but the root of container %q is not mounted: %w", s.container, err)
		}
	case "StartContainer":
		wrong = infra != nil || process != nil
	case "StopContainer", "RemoveContainer":
		wrong = infra != nil || process == nil
	case "StopPodSandbox", "RemovePodSandbox":
		wrong = infra == nil || process == nil
	}
	if wrong {
		return fmt.Errorf("it has succeeded, but: infra container: %v; container: %v", infra, process)
	}
	if removed := map[string]string{"RemoveContainer": s.container, "RemovePodSandbox": s.sandbox}[operation]; removed != "" {
		for _, line := range s.n.State() {
			if strings.Contains(line, removed) {
				return errors.New("it has succeeded, but there is " + line)
			}
		}
	}
	return nil
}

// Every step of every operation on pods and containers is made to fail, and the
// daemon is killed at it. A failed operation leaves nothing, at once; what a killed
// daemon was at the next one finishes or gives back; and the same request then
// succeeds. The steps are the kernel's: see trap.
func TestEveryStep(t *testing.T) {
	harness.NeedRoot(t)
	trap := &trap{t: t}
	n := start(t, harness.Options{Spawn: trap.spawn})
	trap.n = n
	s := &steps{trap: trap, n: n}
	// The first pod makes what all pods share: the bridge, the network's files. Its
	// snapshot goes a moment later, which is no step of the next pod.
	layers := n.SnapshotDirs()
	if err := s.clear(s.subject(t, up(2))); err != nil {
		t.Fatal(err)
	}
	asked(t, "the first container's snapshot is deleted", func() bool { return slices.Equal(n.SnapshotDirs(), layers) })
	s.empty = lasting(n)
	for _, o := range operations {
		t.Run(o.name, func(t *testing.T) {
			s.n = n.With(t)
			points := s.record(t, o.before, o.call)
			s.nothingSince(t, s.empty, "after the record")
			documented(t, points)
			var missed []string
			for i, point := range points {
				if testing.Short() && i%max(1, len(points)/4) != 0 {
					continue
				}
				if !unfailing(point) {
					t.Run("fails/"+point, func(t *testing.T) {
						if !s.failAt(t, point, o.name, o.before, o.call, o.makes) {
							missed = append(missed, "fails/"+point)
						}
					})
				}
				t.Run("killed/"+point, func(t *testing.T) {
					if !s.killAt(t, point, o.name, o.before, o.call) {
						missed = append(missed, "killed/"+point)
					}
				})
			}
			figures(t, "%d steps; not met again: %d, %q", len(points), len(missed), missed)
			if len(missed) > len(points)/5 {
				t.Errorf("%d points of %d were not met again", len(missed), len(points))
			}
		})
	}
}

// documented finds steps that no table of docs/reliability.md has: their first columns
// hold steps, "*" for any end.
func documented(t *testing.T, points []string) {
	t.Helper()
	text, err := os.ReadFile("../../docs/reliability.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows []string
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "| `pod") || strings.HasPrefix(line, "| `init") || strings.HasPrefix(line, "| `plugin") {
			column, _, _ := strings.Cut(line[2:], " | ")
			for step := range strings.SplitSeq(column, ", ") {
				rows = append(rows, strings.Trim(step, "`"))
			}
		}
	}
	count := regexp.MustCompile(` \([0-9]+\)$`)
	for _, point := range points {
		point = count.ReplaceAllString(point, "")
		if !slices.ContainsFunc(rows, func(row string) bool {
			start, any := strings.CutSuffix(row, "*")
			return row == point || any && strings.HasPrefix(point, start)
		}) {
			t.Errorf("docs/reliability.md does not say what is held at %q", point)
		}
	}
}

// unfailing are the steps that the daemon is only killed at: a message is lost with
// one of its ends only, and host-local tells nobody that it could not give an
// address back.
func unfailing(point string) bool {
	return strings.Contains(point, " send ") || strings.HasPrefix(point, "plugin host-local remove ")
}

type steps struct {
	trap  *trap
	n     *harness.Node
	empty []string
}

// subject makes a pod and a container as far as asked for.
func (s *steps) subject(t *testing.T, before []func(*subject) error) *subject {
	t.Helper()
	n := s.n.With(t)
	made := &subject{n: n, config: n.PodConfig()}
	for _, f := range before {
		if err := f(made); err != nil {
			t.Fatalf("prepare: %v", err)
		}
	}
	return made
}

// clear takes the subject down.
func (s *steps) clear(made *subject) error {
	if made.sandbox == "" {
		return nil
	}
	return errors.Join(made.stopPod(), made.removePod())
}

// record lists the steps of an operation, each once.
func (s *steps) record(t *testing.T, before []func(*subject) error, call func(*subject) error) []string {
	made := s.subject(t, before)
	s.trap.arm("", false)
	err := call(made)
	points := s.trap.disarm()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.clear(made); err != nil {
		t.Fatal(err)
	}
	return points
}

// failAt makes a step fail; it returns false when the step was not met.
func (s *steps) failAt(t *testing.T, point, name string, before []func(*subject) error, call func(*subject) error, makes bool) bool {
	made := s.subject(t, before)
	held := lasting(made.n)
	sprung, _ := s.trap.arm(point, true)
	err := call(made)
	s.trap.disarm()
	met := isClosed(sprung)
	if !met && err != nil {
		t.Errorf("without a fault: %v", err)
	}
	if err != nil {
		t.Logf("says: %v", err)
		if makes {
			s.nothingSince(t, held, "after the failure")
		}
	}
	// The program may be executed only after the start has been answered: then it ends
	// as one does that ends at once, and a client makes another one.
	late := met && err == nil && point == "init execute"
	if late && name == "RunPodSandbox" {
		asked(t, "a pod whose infra container cannot be executed is not ready", func() bool {
			answer, err := s.n.Runtime.PodSandboxStatus(s.n.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: made.sandbox})
			return err == nil && answer.Status.State == cri.PodSandboxState_SANDBOX_NOTREADY
		})
		if err := s.clear(made); err != nil {
			t.Errorf("take the pod down: %v", err)
		}
	} else if late {
		asked(t, "a container whose program cannot be executed ends", func() bool {
			answer, err := s.n.Runtime.ContainerStatus(s.n.Context(), &cri.ContainerStatusRequest{ContainerId: made.container})
			return err == nil && answer.Status.State == cri.ContainerState_CONTAINER_EXITED && answer.Status.ExitCode != 0
		})
	}
	if (err != nil || late) && name == "StartContainer" {
		// It is exited now; a client makes another one.
		if p, err := firstOf(made.container); err == nil {
			t.Errorf("after the failure there is %v", p)
		}
		if err := errors.Join(made.remove(), made.create()); err != nil {
			t.Errorf("another container: %v", err)
		}
	}
	s.again(t, made, name, call)
	return met
}

// killAt kills the daemon at a step; what is in another process there goes on when
// the next daemon has come.
func (s *steps) killAt(t *testing.T, point, name string, before []func(*subject) error, call func(*subject) error) bool {
	made := s.subject(t, before)
	sprung, release := s.trap.arm(point, false)
	defer release()
	answered := make(chan error, 1)
	go func() { answered <- call(made) }()
	select {
	case <-sprung:
	case err := <-answered:
		s.trap.disarm()
		if err != nil {
			t.Errorf("without a fault: %v", err)
		}
		s.again(t, made, name, call)
		return false
	}
	s.n.With(t).Kill()
	if strings.HasPrefix(point, "podshim execute ") {
		// Its child, that is to be the plugin: until it is, it has the descriptors of
		// the dead.
		release()
	}
	if err := <-answered; err == nil {
		t.Log("it was answered before the kill")
	} else if status.Code(err) != codes.Unavailable {
		t.Errorf("cut off: %v", err)
	}
	s.trap.disarm()
	s.n.With(t).Launch()
	// The next daemon meets the others in the middle of it, and must not wait for
	// them in vain.
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	_, _ = s.n.Runtime.Version(ctx, &cri.VersionRequest{})
	cancel()
	release()
	s.n.With(t).Await()
	s.again(t, made, name, call)
	return true
}

// again makes the same request, which must succeed, and takes the subject down.
func (s *steps) again(t *testing.T, made *subject, name string, call func(*subject) error) {
	t.Helper()
	if err := call(made); err != nil {
		t.Errorf("the same request again: %v", err)
	} else if err := made.done(name); err != nil {
		t.Errorf("the same request again: %v", err)
	}
	if err := s.clear(made); err != nil {
		t.Errorf("take it down: %v", err)
	}
	s.nothingSince(t, s.empty, "in the end")
}

// nothingSince waits until the machine has nothing that it had not.
func (s *steps) nothingSince(t *testing.T, held []string, when string) {
	t.Helper()
	left := func() []string {
		return slices.DeleteFunc(lasting(s.n.With(t)), func(line string) bool { return slices.Contains(held, line) })
	}
	if !quietly(func() bool { return len(left()) == 0 }) {
		for _, line := range left() {
			t.Errorf("%s there is %s", when, line)
		}
		s.empty = append(s.empty, left()...) // said once
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
