package fault

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// A container never waits for the daemon: while none is there, it writes 100 MB in
// a minute, in steps that are more than a pipe holds, and notes how long it took from one
// step to the next. Every line is in the log once, and the end is exact.
func TestContainerWritesWithoutDaemon(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	p := n.RunPod()
	seconds := times(60, 3)
	volume := t.TempDir()
	const steps, lines = 20, 850 // steps a second, lines a step
	c := p.Shell(fmt.Sprintf(`while [ ! -e /tmp/go ]; do usleep 1000; done
awk -v steps=%d -v lines=%d -v pause=%d '
function now(  text) { getline text < "/proc/uptime"; close("/proc/uptime"); return text + 0 }
BEGIN {
	last = now()
	for (s = 0; s < steps; s++) {
		for (i = 0; i < lines; i++) printf "%%d %%090d\n", n++, s
		fflush()
		t = now(); if (t - last > longest) longest = t - last; last = t
		system("usleep " pause)
	}
	printf "%%.2fs", longest > "/volume/longest"
}'
exit 7`, seconds*steps, lines, 1000000/steps), func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{{HostPath: volume, ContainerPath: "/volume"}}
	})
	process := c.Process()
	c.Output("touch", "/tmp/go")
	n.Kill()
	gone := time.Now()
	if err := process.WaitGone(time.Duration(seconds)*time.Second + 5*harness.Limit); err != nil {
		t.Fatal(err)
	}
	ended := time.Now()
	n.Resume()
	s := c.WaitExit()
	if finished := time.Unix(0, s.FinishedAt); s.ExitCode != 7 || finished.Before(gone) || finished.After(ended.Add(time.Second)) {
		t.Errorf("code %d at %v; want 7, before %v", s.ExitCode, finished, ended)
	}
	got := counted(t, c.LogPath(), "stdout")
	if want := seconds * steps * lines; got.next != want || len(got.notes) > 0 {
		t.Errorf("%d lines, want %d; notes %q", got.next, want, got.notes)
	}
	noted, err := os.ReadFile(filepath.Join(volume, "longest"))
	if err != nil {
		t.Fatal(err)
	}
	longest, err := time.ParseDuration(string(noted))
	if err != nil || longest == 0 {
		t.Errorf("the container's longest step is %q: %v", noted, err)
	}
	if most := max(longest, got.stall); most > promised(5*time.Second) {
		t.Errorf("a stall of %v", most)
	}
	figures(t, "%d lines in a log of %.0f MB while the daemon was away for %v; the container's longest step of %v %v, longest time between two records %v",
		got.next, float64(got.bytes)/1e6, ended.Sub(gone).Round(time.Second), time.Second/steps, longest, got.stall.Round(time.Millisecond))
}

// podmon is killed again and again under containers that write, and under others that
// come and go. They keep their PIDs and pipes; every line is in the log once, but for
// a terminal's, of which at most 4 KiB are lost a time; exec and attach are back at
// once; and every exit code is exact.
func TestPodmonKilled(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	p := n.RunPod()
	writers := map[string]*harness.Container{
		"stdout": p.Shell(counter("")), "stderr": p.Shell(counter(">&2")),
	}
	reader := p.Shell("read x; echo got $x; exit 21", func(c *cri.ContainerConfig) { c.Stdin = true })
	terminal := p.Shell("trap 'exit 33' TERM; i=0; while :; do echo $i; i=$((i+1)); usleep 1000; done",
		func(c *cri.ContainerConfig) { c.Tty, c.Stdin = true, true })
	processes := map[*harness.Container]harness.Process{reader: reader.Process(), terminal: terminal.Process()}
	for _, c := range writers {
		processes[c] = c.Process()
	}
	// Each has to be taken over, too.
	for range times(50, 5) {
		c := p.Shell(idler)
		processes[c] = c.Process()
	}
	churn := churnContainers(t, n, p)

	kills := times(50, 5)
	// What is done after each kill is done before it too: on a busy machine it takes its
	// time without a kill.
	exec := func(ctx context.Context) error {
		_, err := n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: writers["stdout"].ID, Cmd: []string{"true"}})
		return err
	}
	attached := func(ctx context.Context) error {
		s, err := attach(ctx, n, writers["stdout"].ID, false)
		if err != nil {
			return err
		}
		defer s.Close()
		return s.awaitData(stdoutChannel)
	}
	var execsBefore, attachesBefore, execs, attaches []time.Duration
	for range kills {
		began := time.Now()
		untilDone(t, n, "exec", exec)
		execsBefore = append(execsBefore, time.Since(began))
		untilDone(t, n, "attach", attached)
		attachesBefore = append(attachesBefore, time.Since(began))
		time.Sleep(time.Duration(rand.Int64N(int64(200 * time.Millisecond))))
		old := n.Podmon()
		if err := old.Kill(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		killed := time.Now()
		untilDone(t, n, "exec", exec)
		execs = append(execs, time.Since(killed))
		untilDone(t, n, "attach", attached)
		attaches = append(attaches, time.Since(killed))
		if now := n.Podmon(); now.PID == old.PID {
			t.Fatalf("%v was killed and is %v", old, now)
		}
	}
	short := churn()
	for c, process := range processes {
		if now := c.Process(); now.PID != process.PID || now.StartTime != process.StartTime {
			t.Errorf("container %s was %v and is %v", c.Config.Metadata.Name, process, now)
		}
	}
	s, err := attach(n.Context(), n, reader.ID, true)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := s.write("input\n"); err != nil {
		t.Fatal(err)
	}
	if s := reader.WaitExit(); s.ExitCode != 21 || reader.LogText("stdout") != "got input\n" {
		t.Errorf("the reader ended with %d, and has written %q", s.ExitCode, reader.LogText("stdout"))
	}
	lines, stall := 0, time.Duration(0)
	for stream, c := range writers {
		c.Stop(30 * time.Second)
		if s := c.Status(); s.ExitCode != 33 || s.Reason != "Error" {
			t.Errorf("the writer to %s ended with %d, %s; want 33", stream, s.ExitCode, s.Reason)
		}
		got := counted(t, c.LogPath(), stream)
		lines, stall = lines+got.next, max(stall, got.stall)
		if len(got.notes) > 0 {
			t.Errorf("notes in the log: %q", got.notes)
		}
	}
	if stall > promised(10*time.Second) {
		t.Errorf("a log stood still for %v", stall)
	}
	terminal.Stop(30 * time.Second)
	if s := terminal.Status(); s.ExitCode != 33 {
		t.Errorf("the terminal's container ended with %d, want 33", s.ExitCode)
	}
	written, lost := terminalLines(t, terminal)
	if most := kills * 4096 / 4; lost > most {
		t.Errorf("%d lines of the terminal are lost, at most %d may be", lost, most)
	}
	figures(t, "%d kills under %d containers; %d lines, none lost or twice, at most %v between two records; of %d lines of a terminal %d were lost; exec again after %v (of 9 in 10 %v, median %v), attach after %v (%v, %v); the same without a kill %v (%v, %v), %v (%v, %v); %d containers came and went with exact codes, the start of %d was cut off",
		kills, len(processes), lines, stall.Round(time.Millisecond), written, lost,
		worst(execs), p90(execs), median(execs), worst(attaches), p90(attaches), median(attaches),
		worst(execsBefore), p90(execsBefore), median(execsBefore), worst(attachesBefore), p90(attachesBefore), median(attachesBefore),
		short.exact, short.cut)
}

// untilDone asks again what a podmon that went away has cut off.
func untilDone(t *testing.T, n *harness.Node, what string, try func(context.Context) error) {
	t.Helper()
	asked(t, what+" works again", func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), harness.Limit)
		defer cancel()
		err := try(ctx)
		if err != nil && status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", what, err)
			return true
		}
		return err == nil
	})
}

// tally is what became of the containers of a churn.
type tally struct{ exact, cut int }

// churnContainers runs containers that end at once, each with a code of its own, until
// the returned function is called. A start may be cut off; then nothing of it runs.
func churnContainers(t *testing.T, n *harness.Node, p *harness.Pod) (end func() tally) {
	done := make(chan struct{})
	var sum tally
	var work sync.WaitGroup
	work.Go(func() {
		for i := 1; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			code := int32(1 + i%250)
			c := p.Create([]string{"sh", "-c", fmt.Sprintf("echo $$; exit %d", code)})
			_, err := n.Runtime.StartContainer(n.Context(), &cri.StartContainerRequest{ContainerId: c.ID})
			if err != nil {
				sum.cut++
				if s := c.Status(); s.State != cri.ContainerState_CONTAINER_EXITED || len(c.Processes()) > 0 {
					t.Errorf("start was cut off (%v), and the container is %v with %v", err, s.State, c.Processes())
				}
			} else if s := c.WaitExit(); s.ExitCode != code {
				t.Errorf("a container that ended with %d has %d, %s: %s", code, s.ExitCode, s.Reason, s.Message)
			} else if out := c.LogText("stdout"); out != "1\n" {
				t.Errorf("a container that wrote one line has %q in its log", out)
			} else {
				sum.exact++
			}
			c.Remove()
		}
	})
	stop := sync.OnceFunc(func() {
		close(done)
		work.Wait()
	})
	t.Cleanup(stop)
	return func() tally { stop(); return sum }
}

// terminalLines returns how many numbered lines a terminal's log has, and how many
// are missing between them. What a kill has torn is not a number in its place.
func terminalLines(t *testing.T, c *harness.Container) (written, lost int) {
	t.Helper()
	next := 0
	for _, l := range c.Log() {
		var i int
		if k, err := fmt.Sscanf(l.Text, "%d", &i); k != 1 || err != nil {
			continue
		}
		if i < next {
			// The end of a line whose beginning is lost, if it is no repetition.
			continue
		}
		lost += i - next
		written, next = written+1, i+1
	}
	return written, lost
}

// While podmon hangs, all that only looks is answered, and it is soon replaced.
func TestPodmonHangs(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	var containers []*harness.Container
	for range times(20, 4) {
		c := n.RunPod().Shell(idler)
		c.WaitLog(" 1\n")
		containers = append(containers, c)
	}
	var replaced, execs, answers []time.Duration
	for range times(5, 1) {
		old := n.Podmon()
		if err := old.Kill(unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		stopped := time.Now()
		another := make(chan time.Duration, 1)
		go func() {
			quietly(func() bool {
				all := n.Podmons()
				return len(all) == 1 && all[0].PID != old.PID
			})
			another <- time.Since(stopped)
		}()
		rounds := 0
		for old.Alive() && time.Since(stopped) < harness.Limit {
			took := look(t, n, containers)
			if now, err := harness.ReadProcess(old.PID); err == nil && now.State == "T" && now.StartTime == old.StartTime {
				rounds++ // all was answered by a podmon that could not
				answers = append(answers, took...)
			}
		}
		if rounds == 0 {
			t.Error("nothing was answered before podmon was replaced")
		}
		untilDone(t, n, "exec", func(ctx context.Context) error {
			_, err := n.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: containers[0].ID, Cmd: []string{"true"}})
			return err
		})
		execs = append(execs, time.Since(stopped))
		replaced = append(replaced, <-another)
		if now := n.Podmon(); now.PID == old.PID {
			t.Errorf("%v is not replaced", old)
		}
	}
	for _, c := range containers {
		c.Stop(30 * time.Second)
		if s := c.Status(); s.ExitCode != 33 {
			t.Errorf("a container ended with %d, want 33", s.ExitCode)
		}
		counted(t, c.LogPath(), "stdout")
	}
	// It is asked every second, and hangs when none of it has wanted to run 2.7 s later.
	if most := worst(replaced); most > promised(10*time.Second) {
		t.Errorf("replaced after %v", most)
	}
	figures(t, "%d pods; another podmon %v after the SIGSTOP (median %v), exec again after %v (median %v); %d answers meanwhile, the slowest after %v (of 99 in 100 %v, median %v)",
		len(containers), worst(replaced), median(replaced), worst(execs), median(execs), len(answers), worst(answers), p99(answers), median(answers))
}

// look asks for all that only looks, and returns the times it took.
func look(t *testing.T, n *harness.Node, containers []*harness.Container) (took []time.Duration) {
	t.Helper()
	ask := func(what string, f func(ctx context.Context) error) {
		began := time.Now()
		if err := f(n.Context()); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		took = append(took, time.Since(began))
	}
	ask("Status", func(ctx context.Context) error {
		_, err := n.Runtime.Status(ctx, &cri.StatusRequest{})
		return err
	})
	ask("ListPodSandbox", func(ctx context.Context) error {
		_, err := n.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
		return err
	})
	ask("ListContainers", func(ctx context.Context) error {
		_, err := n.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
		return err
	})
	ask("ListContainerStats", func(ctx context.Context) error {
		_, err := n.Runtime.ListContainerStats(ctx, &cri.ListContainerStatsRequest{})
		return err
	})
	ask("ListPodSandboxStats", func(ctx context.Context) error {
		_, err := n.Runtime.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{})
		return err
	})
	ask("ListMetricDescriptors", func(ctx context.Context) error {
		_, err := n.Runtime.ListMetricDescriptors(ctx, &cri.ListMetricDescriptorsRequest{})
		return err
	})
	ask("ListPodSandboxMetrics", func(ctx context.Context) error {
		_, err := n.Runtime.ListPodSandboxMetrics(ctx, &cri.ListPodSandboxMetricsRequest{})
		return err
	})
	ask("ListImages", func(ctx context.Context) error {
		_, err := n.Images.ListImages(ctx, &cri.ListImagesRequest{})
		return err
	})
	ask("ImageFsInfo", func(ctx context.Context) error {
		_, err := n.Images.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
		return err
	})
	for _, c := range containers {
		ask("PodSandboxStatus", func(ctx context.Context) error {
			_, err := n.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: c.Pod.ID})
			return err
		})
		ask("PodSandboxStats", func(ctx context.Context) error {
			_, err := n.Runtime.PodSandboxStats(ctx, &cri.PodSandboxStatsRequest{PodSandboxId: c.Pod.ID})
			return err
		})
		ask("ContainerStatus", func(ctx context.Context) error {
			_, err := n.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.ID})
			return err
		})
		ask("ContainerStats", func(ctx context.Context) error {
			_, err := n.Runtime.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: c.ID})
			return err
		})
	}
	return took
}

// An upgrade: the daemon comes back with another podmon, which takes over all that
// runs. No container notices: processes, pipes and logs go on.
func TestPodmonUpgraded(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	var containers []*harness.Container
	var processes []harness.Process
	for i := range times(50, 5) {
		script := idler
		if i%10 == 0 {
			script = counter("")
		}
		c := n.RunPod().Shell(script, func(c *cri.ContainerConfig) { c.Tty = i%10 == 9 })
		c.WaitLog(" 1")
		containers, processes = append(containers, c), append(processes, c.Process())
	}
	for range times(5, 2) {
		old := n.Podmon()
		n.InstallPodmon()
		n.Restart()
		if err := old.WaitGone(harness.Limit); err != nil {
			t.Errorf("the old podmon: %v", err)
		}
		if now := n.Podmon(); now.PID == old.PID {
			t.Errorf("%v is not replaced", old)
		}
		for i, c := range containers {
			if now := c.Process(); now.PID != processes[i].PID || now.StartTime != processes[i].StartTime {
				t.Errorf("%v has become %v", processes[i], now)
			}
		}
		containers[0].Output("true")
	}
	stall := time.Duration(0)
	for i, c := range containers {
		c.Stop(30 * time.Second)
		if s := c.Status(); s.ExitCode != 33 {
			t.Errorf("a container ended with %d, want 33", s.ExitCode)
		}
		if i%10 == 9 {
			if _, lost := terminalLines(t, c); lost > 0 {
				t.Errorf("%d lines of a terminal are lost", lost)
			}
			continue
		}
		if got := counted(t, c.LogPath(), "stdout"); i%10 == 0 {
			stall = max(stall, got.stall)
		}
	}
	if stall > promised(10*time.Second) {
		t.Errorf("a log stood still for %v", stall)
	}
	figures(t, "%d containers through %d upgrades; longest time between two records of one that writes every 20 ms %v", len(containers), times(5, 2), stall.Round(time.Millisecond))
}

// Daemon and podmon are killed at once. What runs, runs on and is taken over; what
// ended with nobody there has an end, and no invented code.
func TestBothKilled(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	p := n.RunPod()
	// Orphans become this process's children, and it takes their exit codes as an init
	// does: else a zombie would tell its own.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) }()
	reap := func(p harness.Process) {
		if _, err := unix.Wait4(p.PID, nil, 0, nil); err != nil {
			t.Errorf("reap %v: %v", p, err)
		}
	}
	runs, ends := p.Shell(counter("")), p.Shell(counter(""))
	process, lines := runs.Process(), 0
	rounds := times(10, 2)
	for range rounds {
		if ends == nil {
			ends = p.Shell(counter(""))
		}
		ends.WaitLog(" 1\n")
		podmon, ending := n.Podmon(), ends.Process()
		n.Kill()
		if err := podmon.Kill(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		reap(podmon)
		if err := ending.Kill(unix.SIGTERM); err != nil {
			t.Fatal(err)
		}
		reap(ending)
		n.Resume()
		if s := ends.WaitExit(); s.ExitCode != 255 || s.Reason != "Unknown" {
			t.Errorf("a container whose end nobody saw has %d, %s; want 255, Unknown", s.ExitCode, s.Reason)
		}
		ends.Remove()
		ends = nil
		if now := runs.Process(); now.PID != process.PID || now.StartTime != process.StartTime {
			t.Errorf("%v has become %v", process, now)
		}
		runs.Output("true")
		got := counted(t, runs.LogPath(), "stdout")
		if got.next <= lines {
			t.Errorf("the log does not go on: %d lines, %d before", got.next, lines)
		}
		lines = got.next
	}
	runs.Stop(30 * time.Second)
	reap(process)
	if s := runs.Status(); s.ExitCode != 33 {
		t.Errorf("the container that ran on ended with %d, want 33", s.ExitCode)
	}
	got := counted(t, runs.LogPath(), "stdout")
	infra := p.Infra()
	if err := p.StopAndRemove(); err != nil {
		t.Error(err)
	}
	reap(infra)
	figures(t, "%d times both were killed; %d lines, none lost or twice; longest time between two records %v",
		rounds, got.next, got.stall.Round(time.Millisecond))
}
