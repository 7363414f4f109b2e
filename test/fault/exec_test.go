package fault

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// footprint is what a process of podshim holds.
type footprint struct {
	descriptors, threads, kilobytes int
	goroutines                      int // of the daemon; podmon does not tell
}

func (h footprint) String() string {
	s := fmt.Sprintf("%d descriptors, %d threads, %d kB", h.descriptors, h.threads, h.kilobytes)
	if h.goroutines > 0 {
		s += fmt.Sprintf(", %d goroutines", h.goroutines)
	}
	return s
}

// holds reads what a process holds now.
func holds(t *testing.T, pid int) footprint {
	t.Helper()
	p, err := harness.ReadProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	fds, err := os.ReadDir(p.Path("fd"))
	if err != nil {
		t.Fatal(err)
	}
	threads, _ := strconv.Atoi(p.Status("Threads"))
	rss, _ := strconv.Atoi(strings.TrimSuffix(p.Status("VmRSS"), " kB"))
	return footprint{descriptors: len(fds), threads: threads, kilobytes: rss}
}

// daemonHolds is what the daemon holds, goroutines too, of which only it can tell.
func daemonHolds(t *testing.T, n *harness.Node) footprint {
	t.Helper()
	answer, err := n.Runtime.Status(n.Context(), &cri.StatusRequest{Verbose: true})
	var daemon struct{ Goroutines int }
	if err == nil {
		err = json.Unmarshal([]byte(answer.Info["daemon"]), &daemon)
	}
	if err != nil || daemon.Goroutines == 0 {
		t.Fatalf("podshim does not tell its goroutines: %v, %q", err, answer.GetInfo()["daemon"])
	}
	h := holds(t, n.PID())
	h.goroutines = daemon.Goroutines
	return h
}

// flat checks that what do has made the daemon and podmon hold is given back, but for
// the few threads and goroutines and the memory (kB) that a Go program keeps for the next
// time. A first round has them make what they keep.
func flat(t *testing.T, n *harness.Node, memory int, do func(rounds int)) {
	t.Helper()
	do(20)
	podmon := n.Podmon().PID
	programs := map[string]func() footprint{
		"podshim": func() footprint { return daemonHolds(t, n) },
		"podmon":  func() footprint { return holds(t, podmon) },
	}
	before := map[string]footprint{}
	for name, now := range programs {
		before[name] = now()
	}
	rounds := times(1000, 40)
	do(rounds)
	for name, now := range programs {
		var after footprint
		asked(t, name+" gives back its descriptors and goroutines", func() bool {
			after = now()
			return after.descriptors <= before[name].descriptors && after.goroutines <= before[name].goroutines+5
		})
		if after.threads > before[name].threads+10 {
			t.Errorf("%s has %d threads, and had %d", name, after.threads, before[name].threads)
		}
		// A goroutine of podmon's that is left has 2 kB of stack at least, and what it holds.
		if after.kilobytes > before[name].kilobytes+memory {
			t.Errorf("%s has %d kB in memory, and had %d", name, after.kilobytes, before[name].kilobytes)
		}
		figures(t, "%d rounds: %s had %v, and has %v", rounds, name, before[name], after)
	}
}

// What a command leaves in the background belongs to its container: nobody waits for
// it, it costs podshim nothing, and it ends with the container.
func TestExecLeavesBackground(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	c := n.RunPod().Shell("while :; do sleep 100000 & wait; done")
	left, late := 0, 0
	flat(t, n, 16<<10, func(rounds int) {
		for range rounds {
			resp, err := n.Runtime.ExecSync(n.Context(), &cri.ExecSyncRequest{
				ContainerId: c.ID, Cmd: []string{"sh", "-c", "sleep 1d & echo done"}, Timeout: 1,
			})
			switch {
			case status.Code(err) == codes.DeadlineExceeded:
				late++ // the machine was slow
			case err != nil || string(resp.Stdout) != "done\n" || resp.ExitCode != 0:
				t.Fatalf("exec: %v, %v", resp, err)
			default:
				left++
			}
		}
	})
	if late > (left+late)/2 {
		t.Errorf("%d of %d commands have waited for what they left in the background", late, left+late)
	}
	if got := len(c.Processes()); got < left {
		t.Errorf("%d processes in the container: the %d that were left there are not the runtime's to end", got, left)
	}
	c.Stop(0)
	if got := c.Processes(); len(got) > 0 {
		t.Errorf("%d processes have outlived the container", len(got))
	}
	figures(t, "%d commands have left a process, %d took longer than a second", left, late)
}

// A command that writes without end costs what is collected of it and no more, and
// ends at its timeout with an error; one that ends has what is collected returned.
func TestExecWritesWithoutEnd(t *testing.T) {
	harness.NeedRoot(t)
	const limit, most = 1 << 20, 16 << 20 // of output, and of memory for it until it is garbage
	n := start(t, harness.Options{CRI: fmt.Sprintf("exec_sync_output_limit = %d", limit)})
	c := n.RunPod().Shell("echo ready; sleep 100000")
	c.WaitLog("ready")
	seconds := times(10, 1)
	var wrote []int
	var peak func() int
	flat(t, n, most>>10, func(rounds int) {
		for range max(2, rounds/200) {
			wrote = append(wrote, execYes(t, n, c, seconds))
		}
		if peak == nil {
			peak = watchPeak(t, n.PID())
		}
	})
	if least := slices.Min(wrote); least < limit {
		t.Errorf("yes has written %d bytes, and is to go over the limit", least)
	}
	if got := peak(); got > most {
		t.Errorf("at its peak podshim took %d bytes of memory more than before, for output of which it collects %d", got, limit)
	}
	// All that is collected of one that ends, and its own code.
	out, _, code := c.Exec("sh", "-c", "yes | head -c 5000000; exit 7")
	if len(out) != limit || code != 7 {
		t.Errorf("of 5 MB there are %d bytes, with %d; want %d, with 7", len(out), code, limit)
	}
	figures(t, "%d times yes for %d s, which has written %d MB (at least %d); the peak of podshim's memory was %d kB above what it took before, with a limit of %d kB",
		len(wrote), seconds, slices.Max(wrote)>>20, slices.Min(wrote)>>20, peak()>>10, limit>>10)
	for _, p := range c.Processes() {
		if p.Name == "yes" {
			t.Errorf("%v runs on", p)
		}
	}
}

// execYes executes yes until its timeout, and returns how much it had written, as the kernel
// counts, when it was last looked at.
func execYes(t *testing.T, n *harness.Node, c *harness.Container, seconds int) (wrote int) {
	t.Helper()
	ended := make(chan error, 1)
	go func() {
		_, err := n.Runtime.ExecSync(n.Context(), &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"yes"}, Timeout: int64(seconds)})
		ended <- err
	}()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case err := <-ended:
			if status.Code(err) != codes.DeadlineExceeded {
				t.Fatalf("exec of yes: %v, want DeadlineExceeded", err)
			}
			return wrote
		case <-tick.C:
			wrote = max(wrote, written(c))
		}
	}
}

// watchPeak returns by how many bytes a process's memory has been larger at most than it
// is now (proc_pid_clear_refs(5)).
func watchPeak(t *testing.T, pid int) (grown func() int) {
	t.Helper()
	p, err := harness.ReadProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.Path("clear_refs"), []byte("5"), 0); err != nil {
		t.Fatal(err)
	}
	peak := func() int {
		kilobytes, err := strconv.Atoi(strings.TrimSuffix(p.Status("VmHWM"), " kB"))
		if err != nil {
			t.Fatal(err)
		}
		return kilobytes << 10
	}
	before := peak()
	return func() int { return peak() - before }
}

// Clients that break their connections cost nothing afterwards.
func TestStreamsCut(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	p := n.RunPod()
	c := p.Shell("httpd -p 8080; " + counter(""))
	asked(t, "the server listens", func() bool {
		_, _, code := c.Exec("sh", "-c", "echo | nc 127.0.0.1 8080")
		return code == 0
	})
	cuts := map[string]func() error{
		"attach": func() error {
			s, err := attach(n.Context(), n, c.ID, false)
			if err != nil {
				return err
			}
			defer s.Reset()
			return s.awaitData(stdoutChannel)
		},
		"exec": func() error {
			resp, err := n.Runtime.Exec(n.Context(), &cri.ExecRequest{ContainerId: c.ID, Cmd: []string{"cat"}, Stdin: true, Stdout: true})
			if err != nil {
				return err
			}
			s, err := open(n.Context(), resp.Url, "v5.channel.k8s.io")
			if err != nil {
				return err
			}
			defer s.Reset()
			if err := s.write("echo\n"); err != nil {
				return err
			}
			return s.awaitData(stdoutChannel)
		},
		"port-forward": func() error {
			resp, err := n.Runtime.PortForward(n.Context(), &cri.PortForwardRequest{PodSandboxId: p.ID, Port: []int32{8080}})
			if err != nil {
				return err
			}
			s, err := open(n.Context(), resp.Url, "v4.channel.k8s.io")
			if err != nil {
				return err
			}
			defer s.Reset()
			if err := s.write("GET /none HTTP/1.0\r\n\r\n"); err != nil {
				return err
			}
			return s.awaitData(forwardChannel)
		},
	}
	for name, cut := range cuts {
		t.Run(name, func(t *testing.T) {
			flat(t, n, 16<<10, func(rounds int) {
				todo := make(chan struct{}, rounds)
				for range rounds {
					todo <- struct{}{}
				}
				close(todo)
				var clients sync.WaitGroup
				for range 8 {
					clients.Go(func() {
						for range todo {
							if err := cut(); err != nil {
								t.Errorf("%s: %v", name, err)
								return
							}
						}
					})
				}
				clients.Wait()
			})
		})
	}
	asked(t, "what was executed has ended", func() bool {
		for _, p := range c.Processes() {
			if p.Name == "cat" {
				return false
			}
		}
		return true
	})
	c.Stop(30 * time.Second)
	counted(t, c.LogPath(), "stdout")
}

// A command that is being started when its container is killed, by podshim or by
// another, is told that the container has exited, whoever of its processes the kernel
// has ended first.
func TestExecMeetsKill(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	p := n.RunPod()
	answers := map[codes.Code]int{}
	rounds := times(100, 10)
	for round := range rounds {
		c := p.Shell("exec sleep 1000000")
		pid := c.Process().PID
		var begun, running sync.WaitGroup
		ends := make([]error, 8)
		for i := range ends {
			begun.Add(1)
			running.Go(func() {
				for runs := 0; ends[i] == nil; runs++ {
					_, ends[i] = n.Runtime.ExecSync(n.Context(), &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"true"}})
					if runs == 0 {
						begun.Done()
					}
				}
			})
		}
		begun.Wait()
		if round%2 == 0 {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
		} else {
			c.Stop(0)
		}
		running.Wait()
		for _, err := range ends {
			code := status.Code(err)
			answers[code]++
			if code != codes.FailedPrecondition && code != codes.NotFound {
				t.Errorf("round %d: %v", round, err)
			}
		}
		c.Remove()
	}
	podmon := n.Podmon().PID
	asked(t, "podmon reaps what is left of the starts", func() bool {
		return len(harness.Processes(func(p harness.Process) bool { return p.Parent == podmon && p.State == "Z" })) == 0
	})
	figures(t, "%d rounds of 8 commands at a time: %v", rounds, answers)
}
