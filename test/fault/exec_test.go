package fault

import (
	"fmt"
	"os"
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
type footprint struct{ descriptors, threads, kilobytes int }

func (h footprint) String() string {
	return fmt.Sprintf("%d descriptors, %d threads, %d kB", h.descriptors, h.threads, h.kilobytes)
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
	return footprint{len(fds), threads, rss}
}

// flat checks that what do has made the daemon and podmon hold is given back, but for
// the few threads and the memory (kB) that a Go program keeps for the next time. A first
// round has them make what they keep.
func flat(t *testing.T, n *harness.Node, memory int, do func(rounds int)) {
	t.Helper()
	do(20)
	programs := map[string]int{"podshim": n.PID(), "podmon": n.Podmon().PID}
	before := map[string]footprint{}
	for name, pid := range programs {
		before[name] = holds(t, pid)
	}
	rounds := times(1000, 40)
	do(rounds)
	for name, pid := range programs {
		var after footprint
		asked(t, name+" gives back its descriptors", func() bool {
			after = holds(t, pid)
			return after.descriptors <= before[name].descriptors
		})
		if after.threads > before[name].threads+10 {
			t.Errorf("%s has %d threads, and had %d", name, after.threads, before[name].threads)
		}
		// A goroutine that is left has 2 kB of stack at least, and what it holds.
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
// ends at its timeout.
func TestExecWritesWithoutEnd(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	c := n.RunPod().Shell("echo ready; sleep 100000")
	c.WaitLog("ready")
	flat(t, n, 64<<10, func(rounds int) { // a few times what is collected, until it is garbage
		for range max(3, rounds/50) {
			_, err := n.Runtime.ExecSync(n.Context(), &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: []string{"yes"}, Timeout: 1})
			if status.Code(err) != codes.DeadlineExceeded {
				t.Fatalf("exec of yes: %v, want DeadlineExceeded", err)
			}
		}
	})
	for _, p := range c.Processes() {
		if p.Name == "yes" {
			t.Errorf("%v runs on", p)
		}
	}
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
