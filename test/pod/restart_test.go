package pod

import (
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// The daemon's end and new start are not noticed by any container: same processes,
// no line lost, exact codes of those that ended meanwhile, and everything works
// afterwards.
func TestDaemonRestart(t *testing.T) {
	harness.NeedRoot(t)
	for name, end := range map[string]func(*harness.Node){"stopped": (*harness.Node).Stop, "killed": (*harness.Node).Kill} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := harness.Start(t, harness.Options{})
			p := n.RunPod()
			counter := p.Shell("i=0; while [ ! -e /tmp/end ]; do echo line $i; i=$((i+1)); sleep 0.001; done; echo last $i; sleep 100000")
			quits := p.Shell("while [ ! -e /tmp/end ]; do sleep 0.01; done; exit 42")
			killed, created := p.Run([]string{"sleep", "100000"}), p.Create(sleeper)
			counter.WaitLog("line 20\n")
			before := map[string]harness.Process{"infra": p.Infra(), "counter": counter.Process(), "quits": quits.Process()}
			ip, root := p.Status().Network.Ip, quits.Process().Path("root/tmp/end")

			end(n)
			// While no daemon is there, one container exits and one is killed.
			toKill, toQuit := killed.Process(), quits.Process()
			if err := toKill.Kill(unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			touch(t, root)
			for _, process := range []harness.Process{toKill, toQuit} {
				if err := process.WaitGone(harness.Limit); err != nil {
					t.Fatal(err)
				}
			}
			delete(before, "quits")
			for name, process := range before {
				if !process.Alive() {
					t.Fatalf("%s ended with the daemon", name)
				}
			}
			n.Resume()

			for name, process := range before {
				if !process.Alive() {
					t.Errorf("%s ended with the new daemon", name)
				}
			}
			if s := quits.WaitExit(); s.ExitCode != 42 || s.Reason != "Error" {
				t.Errorf("exited meanwhile: code %d, %s; want 42", s.ExitCode, s.Reason)
			}
			if s := killed.WaitExit(); s.ExitCode != 137 {
				t.Errorf("killed meanwhile: code %d, want 137", s.ExitCode)
			}
			if s := counter.Status(); s.State != cri.ContainerState_CONTAINER_RUNNING {
				t.Errorf("running container is %v", s.State)
			}
			if s := p.Status(); s.State != cri.PodSandboxState_SANDBOX_READY || s.Network.Ip != ip {
				t.Errorf("pod is %v with %s, was ready with %s", s.State, s.Network.GetIp(), ip)
			}
			created.Start()
			created.WaitLog("ready")
			counter.Output("touch", "/tmp/end")
			counter.WaitLog("last ")
			checkCount(t, counter.LogText("stdout"))
			counter.Stop(0)
			if s := counter.WaitExit(); s.ExitCode != 137 {
				t.Errorf("stopped by the new daemon: code %d, want 137", s.ExitCode)
			}
		})
	}
}

func touch(t *testing.T, path string) {
	t.Helper()
	fd, err := unix.Open(path, unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		t.Fatalf("touch %s: %v", path, err)
	}
	_ = unix.Close(fd)
}

// checkCount finds gaps in a counter's output.
func checkCount(t *testing.T, out string) {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(out), "\n")
	for i, line := range lines {
		want := fmt.Sprintf("line %d", i)
		if i == len(lines)-1 {
			want = fmt.Sprintf("last %d", i)
		}
		if line != want {
			t.Fatalf("line %d of the log is %q, want %q", i, line, want)
		}
	}
}

// A pod that the daemon did not see end is known as NotReady afterwards, and can
// be removed without leaving anything.
func TestInfraEndsWithoutDaemon(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	p := n.RunPod()
	p.Run(sleeper).WaitLog("ready")
	infra := p.Infra()
	n.Stop()
	if err := infra.Kill(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := infra.WaitGone(harness.Limit); err != nil {
		t.Fatal(err)
	}
	n.Resume()
	p.WaitNotReady()
}
