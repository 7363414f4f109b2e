package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// settleTime is what a runtime gets to come to rest before its memory is looked
// at: garbage collectors return memory late.
const settleTime = 10 * time.Second

// idle measures runtimes that have pulled an image and run nothing.
func (b *bench) idle(ctx context.Context) error {
	return b.memory(ctx, b.subjects, "idle", "memory before the first pod", func(s *subject, bytes int64) float64 {
		return float64(bytes) / 1e6
	}, "MB")
}

func (b *bench) memory(ctx context.Context, subjects []*subject, section, row string, of func(*subject, int64) float64, unit string) error {
	if err := sleep(ctx, settleTime); err != nil {
		return err
	}
	for _, s := range subjects {
		bytes, err := s.pss()
		if err != nil {
			return err
		}
		b.report.add(section, row, unit, s, of(s, bytes))
	}
	return nil
}

// networks the pods of one section are in.
var networks = []struct {
	name string
	host bool
}{{"bridge network", false}, {"host network", true}}

// sequential runs pods one after the other: up, an exec, and down again. A first
// one of each runtime is not counted.
func (b *bench) sequential(ctx context.Context) error {
	for _, network := range networks {
		section := "one pod at a time, " + network.name
		err := b.turns(ctx, b.sizes.pods+1, func(s *subject, turn int) error {
			p, err := s.newPod(network.host)
			if err != nil {
				return err
			}
			t := b.report.timer(section, s)
			if turn == 0 {
				t = nil
			}
			before, err := cpu(s.cgroup)
			if err != nil {
				return err
			}
			if err := p.up(ctx, t, 1); err != nil {
				return err
			}
			up, err := cpu(s.cgroup)
			if err != nil {
				return err
			}
			if err := p.exec(ctx, t); err != nil {
				return err
			}
			execed, err := cpu(s.cgroup)
			if err != nil {
				return err
			}
			if err := p.down(ctx, t); err != nil {
				return err
			}
			down, err := cpu(s.cgroup)
			if err == nil && turn > 0 {
				b.report.add(section, "CPU time of a pod up + down", "ms", s, ms(up-before+down-execed))
				b.report.add(section, "CPU time of an exec", "ms", s, ms(execed-up))
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// parallel runs some pods of one runtime at the same time.
func (b *bench) parallel(ctx context.Context) error {
	for _, network := range networks {
		section := fmt.Sprintf("%d pods at a time, %s", b.sizes.together, network.name)
		err := b.turns(ctx, b.sizes.batches+1, func(s *subject, turn int) error {
			pods := make([]*pod, b.sizes.together)
			for i := range pods {
				var err error
				if pods[i], err = s.newPod(network.host); err != nil {
					return err
				}
			}
			t := b.report.timer(section, s)
			if turn == 0 {
				t = nil
			}
			for _, phase := range []struct {
				name string
				do   func(context.Context, *pod) error
			}{
				{"up", func(ctx context.Context, p *pod) error { return p.up(ctx, t.only("pod up"), 1) }},
				{"down", func(ctx context.Context, p *pod) error { return p.down(ctx, t.only("pod down")) }},
			} {
				err := t.time("all pods "+phase.name, func() error { return b.together(ctx, pods, phase.do) })
				if err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// together does something with each of the pods, several at a time.
func (b *bench) together(ctx context.Context, pods []*pod, do func(context.Context, *pod) error) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(b.sizes.together)
	for _, p := range pods {
		g.Go(func() error { return do(ctx, p) })
	}
	return g.Wait()
}

// standing runs many pods of each runtime and looks at what they cost while they
// stand there.
func (b *bench) standing(ctx context.Context) error {
	section := fmt.Sprintf("with %d pods, bridge network", b.sizes.standing)
	empty := map[*subject]int64{}
	err := b.memory(ctx, b.subjects, section, "memory before", func(s *subject, bytes int64) float64 {
		empty[s] = bytes
		return float64(bytes) / 1e6
	}, "MB")
	if err != nil {
		return err
	}
	pods := map[*subject][]*pod{}
	err = b.turns(ctx, b.sizes.standing, func(s *subject, turn int) error {
		p, err := s.newPod(false)
		if err != nil {
			return err
		}
		pods[s] = append(pods[s], p)
		t := b.report.timer(section, s).only("pod up")
		if turn < b.sizes.standing/2 {
			t = nil
		}
		return p.up(ctx, t, 1)
	})
	if err != nil {
		return err
	}
	err = b.memory(ctx, b.subjects, section, "memory per pod", func(s *subject, bytes int64) float64 {
		return float64(bytes-empty[s]) / 1e3 / float64(b.sizes.standing)
	}, "kB")
	if err != nil {
		return err
	}
	if err := b.lists(ctx, section, b.subjects, pods); err != nil {
		return err
	}
	if err := b.polling(ctx, section); err != nil {
		return err
	}
	err = b.turns(ctx, b.sizes.standing, func(s *subject, turn int) error {
		p := pods[s][turn]
		if err := p.exec(ctx, b.report.timer(section, s)); err != nil {
			return err
		}
		return p.down(ctx, b.report.timer(section, s).only("pod down"))
	})
	if err != nil {
		return err
	}
	return b.memory(ctx, b.subjects, section, "memory after they are gone", func(_ *subject, bytes int64) float64 {
		return float64(bytes) / 1e6
	}, "MB")
}

// lists times what kubelet asks all the time, call by call: right after another runtime has
// read the stats of all its pods, the machine is not the same as after a status. A runtime is
// asked for its version before each. Statuses come in four rounds, and the first, after a pause,
// is told from the others too: a runtime's caches are cold then.
func (b *bench) lists(ctx context.Context, section string, subjects []*subject, pods map[*subject][]*pod) error {
	for turn := range b.sizes.calls {
		for _, call := range []struct {
			name  string
			times int
			do    func(s *subject, p *pod) error
		}{
			{"ContainerStatus", 4, func(s *subject, p *pod) error {
				_, err := s.rpc.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: p.ids[0]})
				return err
			}},
			{"PodSandboxStatus", 4, func(s *subject, p *pod) error {
				_, err := s.rpc.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.sandbox})
				return err
			}},
			{"ListContainers", 1, func(s *subject, _ *pod) error {
				r, err := s.rpc.ListContainers(ctx, &runtime.ListContainersRequest{})
				return errors.Join(err, atLeast(len(r.GetContainers()), len(pods[s])))
			}},
			{"ListPodSandbox", 1, func(s *subject, _ *pod) error {
				r, err := s.rpc.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
				return errors.Join(err, atLeast(len(r.GetItems()), len(pods[s])))
			}},
			{"ListPodSandboxStats", 1, func(s *subject, _ *pod) error {
				r, err := s.rpc.ListPodSandboxStats(ctx, &runtime.ListPodSandboxStatsRequest{})
				return errors.Join(err, atLeast(len(r.GetStats()), len(pods[s])))
			}},
		} {
			paused := call.name == "ListPodSandboxStats" || call.name == "ContainerStatus"
			if paused {
				// podshim answers from what it has read in the last 200 ms; kubelet asks less often.
				// And what the stats left, garbage above all, is not the next status's.
				if err := sleep(ctx, 250*time.Millisecond); err != nil {
					return err
				}
			}
			for i := range call.times {
				rows := []string{call.name}
				if paused && i == 0 && call.times > 1 {
					rows = append(rows, "the first "+call.name+" after a pause")
				}
				err := b.list(ctx, section, rows, subjects, func(s *subject) error {
					return call.do(s, pods[s][(turn*call.times+i)%len(pods[s])])
				})
				if err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// list times one call of each runtime, for one or more rows. Whose garbage collection, say, runs
// into whose call is left to chance.
func (b *bench) list(ctx context.Context, section string, rows []string, subjects []*subject, do func(*subject) error) error {
	for _, i := range rand.Perm(len(subjects)) {
		s := subjects[i]
		// Else the first call after others' pays for a process that sleeps, whosever it is.
		if _, err := s.rpc.Version(ctx, &runtime.VersionRequest{}); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		start := time.Now()
		err := do(s)
		took := time.Since(start)
		if err != nil {
			return fmt.Errorf("%s: %s: %w", s.name, rows[0], err)
		}
		for _, row := range rows {
			b.report.add(section, row, "ms", s, ms(took))
		}
	}
	return nil
}

func atLeast(got, want int) error {
	if got < want {
		return fmt.Errorf("lists %d of %d", got, want)
	}
	return nil
}

// polling has all runtimes asked as kubelet does, and measures the CPU time of
// that: what runs each second, and what each ten.
func (b *bench) polling(ctx context.Context, section string) error {
	before := map[*subject]time.Duration{}
	for _, s := range b.subjects {
		var err error
		if before[s], err = cpu(s.cgroup + "/runtime"); err != nil {
			return err
		}
	}
	begin := time.Now()
	for second := range b.sizes.polls {
		for _, s := range b.subjects {
			if err := s.poll(ctx, second%10 == 0); err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
		}
		if err := sleep(ctx, time.Until(begin.Add(time.Duration(second+1)*time.Second))); err != nil {
			return err
		}
	}
	for _, s := range b.subjects {
		now, err := cpu(s.cgroup + "/runtime")
		if err != nil {
			return err
		}
		b.report.add(section, "CPU time a second, idle under kubelet's polling", "ms", s,
			ms(now-before[s])/time.Since(begin).Seconds())
	}
	return nil
}

func (s *subject) poll(ctx context.Context, tenth bool) error {
	_, err := s.rpc.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err == nil {
		_, err = s.rpc.ListContainers(ctx, &runtime.ListContainersRequest{})
	}
	if err == nil && tenth {
		_, err = s.rpc.ListPodSandboxStats(ctx, &runtime.ListPodSandboxStatsRequest{})
	}
	if err == nil && tenth {
		_, err = s.images.ImageFsInfo(ctx, &runtime.ImageFsInfoRequest{})
	}
	if err == nil && tenth {
		_, err = s.rpc.Status(ctx, &runtime.StatusRequest{})
	}
	return err
}

// crowd runs as many pods of the first runtime as a large node has, of two containers each, and
// brings up pods beside a few of them and beside all: the same ones in the same way, in turns, as
// a shared machine is faster or slower for minutes. So the many come and go several at a time.
func (b *bench) crowd(ctx context.Context) error {
	s := b.subjects[0]
	section := fmt.Sprintf("%s alone, %d pods of two containers, bridge network", s.name, b.sizes.crowd)
	few := max(b.sizes.crowd/40, 1)
	var pods []*pod
	up := func(host bool, t timer) (*pod, error) {
		p, err := s.newPod(host)
		if err != nil {
			return nil, err
		}
		if err := p.up(ctx, t, 2); err != nil {
			return nil, fmt.Errorf("beside %d pods: %w", len(pods), err)
		}
		return p, nil
	}
	upTo := func(n int) error {
		had := len(pods)
		for len(pods) < n {
			p, err := s.newPod(false)
			if err != nil {
				return err
			}
			pods = append(pods, p)
		}
		return b.together(ctx, pods[had:], func(ctx context.Context, p *pod) error { return p.up(ctx, nil, 2) })
	}
	downTo := func(n int) error {
		err := b.together(ctx, pods[n:], func(ctx context.Context, p *pod) error { return p.down(ctx, nil) })
		pods = pods[:n]
		return err
	}
	// More pods are up and gone again, a few at a time: beside 10 means beside 10 to 19.
	beside := func() error {
		when := fmt.Sprintf("beside %d", len(pods))
		for range 3 {
			for _, host := range []bool{false, true} {
				t := b.report.timer(section, s).of(when)
				if host { // what a pod costs without network plugins
					t = b.report.timer(section, s).of("host network, " + when).only("pod up")
				}
				var more []*pod
				for range few {
					p, err := up(host, t)
					if err != nil {
						return err
					}
					more = append(more, p)
					b.report.add(section, "the machine's own speed "+when, "ms", s, ms(yardstick()))
					start, err := b.startOfProcess(ctx)
					if err != nil {
						return err
					}
					b.report.add(section, "the machine's own start of a process "+when, "ms", s, ms(start))
				}
				for _, p := range more {
					if err := p.down(ctx, t.only("pod down")); err != nil {
						return err
					}
				}
				if err := sleep(ctx, time.Second); err != nil { // namespaces end in the background
					return err
				}
			}
		}
		return nil
	}
	once, err := up(true, nil) // what the runtime does once
	if err != nil {
		return err
	}
	if err := once.down(ctx, nil); err != nil {
		return err
	}
	for turn := range b.sizes.turns {
		if err := upTo(few); err != nil {
			return err
		}
		if err := b.rest(ctx); err != nil {
			return err
		}
		if err := beside(); err != nil {
			return err
		}
		if err := upTo(b.sizes.crowd); err != nil {
			return err
		}
		if err := b.rest(ctx); err != nil {
			return err
		}
		if err := beside(); err != nil {
			return err
		}
		if turn == 0 {
			if err := b.lists(ctx, section, b.subjects[:1], map[*subject][]*pod{s: pods}); err != nil {
				return err
			}
			bytes, err := s.pss()
			if err != nil {
				return err
			}
			b.report.add(section, "memory of daemon and podmon", "MB", s, float64(bytes)/1e6)
		}
		if err := downTo(few); err != nil {
			return err
		}
	}
	return downTo(0)
}

// yardstick takes the time of a piece of work that is always the same: what it says beside a few
// pods and beside many tells whether the processor was. Its data is small, so that the next pod
// finds the caches as the last one left them. See startOfProcess for the kernel and the hypervisor.
func yardstick() time.Duration {
	start := time.Now()
	for range 256 {
		sha256.Sum256(measured)
	}
	return time.Since(start)
}

var measured = make([]byte, 16<<10)

// startOfProcess takes the time that a plugin needs to start and say its version: fork, exec,
// page faults and exit, which is what most of a pod's time goes to.
func (b *bench) startOfProcess(ctx context.Context) (time.Duration, error) {
	plugin := exec.CommandContext(ctx, filepath.Join(b.tools, "host-local"))
	plugin.Env = []string{"CNI_COMMAND=VERSION"}
	start := time.Now()
	if err := plugin.Run(); err != nil {
		return 0, fmt.Errorf("ask host-local for its version: %w", err)
	}
	return time.Since(start), nil
}

// rest waits until what the work before has left to the background is done: namespaces and cgroups
// that end, files that are written. A shared machine that has been idle may be faster for a while:
// what is compared begins alike. (ext4 without a journal, which virtual machines are given, passes
// by all inodes that were deleted within the last minute, fs/ext4/ialloc.c; it is for the runtime to
// cope with that.)
func (b *bench) rest(ctx context.Context) error {
	if b.sizes.rest == 0 {
		return nil
	}
	unix.Sync()
	fmt.Fprintf(os.Stderr, "bench: rest %s\n", b.sizes.rest)
	return sleep(ctx, b.sizes.rest)
}

// pull pulls the large images, which no runtime has.
func (b *bench) pull(ctx context.Context) error {
	others := b.subjects
	if err := b.startThose(ctx, b.pullsOnly); err != nil {
		return err
	}
	if err := b.rest(ctx); err != nil { // after the start
		return err
	}
	for _, image := range []struct{ name, row string }{
		{tenLayers, "pull of 300 MB in ten layers"}, {oneLayer, "pull of 300 MB in one layer"},
	} {
		err := b.turns(ctx, b.sizes.pulls, func(s *subject, _ int) error {
			unix.Sync() // what the last one has written is not this one's affair
			before, err := cpu(s.cgroup)
			if err != nil {
				return err
			}
			err = b.report.timer("images", s).time(image.row, func() error { return s.pullImage(ctx, image.name) })
			if err != nil {
				return err
			}
			after, err := cpu(s.cgroup)
			if err != nil {
				return err
			}
			b.report.add("images", strings.Replace(image.row, "pull", "CPU time of a pull", 1), "ms", s, ms(after-before))
			_, err = s.images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: image.name}})
			return err
		})
		if err != nil {
			return err
		}
	}
	// Of those that have run what was before: else it says who has just started.
	return b.memory(ctx, others, "images", "memory after the pulls", func(_ *subject, bytes int64) float64 {
		return float64(bytes) / 1e6
	}, "MB")
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
