package e2e

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
	"github.com/podshim/podshim/test/images"
)

var (
	manyPods  = flag.Int("e2e.pods", 100, "pods that TestMany starts at once; 30 with -short")
	probeTime = flag.Duration("e2e.probes", time.Minute, "TestExecProbes lets kubelet make as many exec probes as 50 a second are in this time; 15s with -short")
)

// TestMany drops many manifests at once, and takes them away at once.
func TestMany(t *testing.T) {
	t.Parallel()
	count := *manyPods
	if testing.Short() {
		count = min(count, 30)
	}
	k := Start(t, Options{Config: fmt.Sprintf("maxPods: %d\n", count+10)})
	k.Node.Pull(images.Busybox)
	before := k.state()
	idle := k.use()
	begin := time.Now()
	var pods []*Pod
	for n := range count {
		pods = append(pods, k.RunManifest(fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata:
  name: many-%d
spec:
  terminationGracePeriodSeconds: 0
  containers:
  - name: app
    image: %s
    command: [sleep, "1000000"]
`, n, images.Busybox)))
	}
	if !k.ask(func() bool {
		return len(slices.DeleteFunc(k.pods(), func(p PodStatus) bool { return !p.Ready() })) == count
	}) {
		t.Fatalf("of %d pods run after %v:\n%v", count, Limit, k.pods())
	}
	up := time.Since(begin)
	busy := k.use()
	seen := map[string]bool{}
	for _, p := range k.pods() {
		if seen[p.Status.PodIP] || p.Status.PodIP == "" {
			t.Errorf("pod %s has IP %q, which another has as well", p.Metadata.Name, p.Status.PodIP)
		}
		seen[p.Status.PodIP] = true
		if c := p.Container("app"); c.RestartCount != 0 {
			t.Errorf("%v", c)
		}
	}
	begin = time.Now()
	for _, p := range pods {
		p.Remove()
	}
	after := before
	if !k.ask(func() bool { return len(k.podDirs()) == 0 }) {
		t.Errorf("pods %v are still there", k.podDirs())
	}
	gone := time.Since(begin)
	if !k.ask(func() bool {
		after = k.state()
		return slices.Equal(before, after)
	}) {
		t.Errorf("what the pods have left:\n%s\nwhat is missing:\n%s", strings.Join(less(after, before), "\n"), strings.Join(less(before, after), "\n"))
	}
	var later use
	if !k.ask(func() bool {
		later = k.use()
		return later.files <= idle.files+fewMore && later.goroutines <= idle.goroutines+fewMore
	}) {
		t.Errorf("descriptors or goroutines stay")
	}
	t.Logf("%d pods: all Running after %.1f s, all gone %.1f s after their manifests\nidle:           %v\nwith the pods:  %v\nafterwards:     %v",
		count, up.Seconds(), gone.Seconds(), idle, busy, later)
}

// use is what podshim takes of the machine.
type use struct {
	// kib is memory that no other process has a share in (and its share of the rest),
	// of daemon and monitors.
	daemonKiB, monitorKiB      int
	anonKiB                    int // of both: pages of programs come and go with the node's cache
	files, threads, goroutines int
	cpu                        time.Duration
}

func (u use) String() string {
	return fmt.Sprintf("daemon %.1f MB, podmon %.1f MB, %d descriptors, %d threads, %d goroutines, %.1f s of CPU time",
		float64(u.daemonKiB)/1024, float64(u.monitorKiB)/1024, u.files, u.threads, u.goroutines, u.cpu.Seconds())
}

func (k *Kubelet) use() use {
	k.t.Helper()
	daemon, err := harness.ReadProcess(k.Node.PID())
	if err != nil {
		k.t.Fatalf("read podshim's process: %v", err)
	}
	monitors := k.Node.Podmons()
	u := use{daemonKiB: pss(daemon, "Pss:"), anonKiB: pss(daemon, "Pss_Anon:")}
	for _, p := range append(monitors, daemon) {
		fds, _ := os.ReadDir(p.Path("fd"))
		u.files += len(fds)
		threads, _ := strconv.Atoi(p.Status("Threads"))
		u.threads += threads
		u.cpu += cpuTime(p)
	}
	for _, p := range monitors {
		u.monitorKiB += pss(p, "Pss:")
		u.anonKiB += pss(p, "Pss_Anon:")
	}
	// The kernel does not know goroutines; the daemon has to say how many there are.
	status, err := k.Node.Runtime.Status(k.Node.Context(), &cri.StatusRequest{Verbose: true})
	var daemonInfo struct{ Goroutines int }
	if err == nil {
		err = json.Unmarshal([]byte(status.Info["daemon"]), &daemonInfo)
	}
	if err != nil || daemonInfo.Goroutines == 0 {
		k.t.Fatalf("podshim does not tell its goroutines: %v, %v", err, status.GetInfo()["daemon"])
	}
	u.goroutines = daemonInfo.Goroutines
	return u
}

// cpuTime is what a process, and its children that have ended, have used of the CPUs, as
// proc_pid_stat(5) counts it.
func cpuTime(p harness.Process) (total time.Duration) {
	_, rest, _ := strings.Cut(p.Read("stat"), ") ") // what follows the name
	fields := strings.Fields(rest)
	for _, field := range fields[min(11, len(fields)):min(15, len(fields))] {
		ticks, _ := strconv.Atoi(field)
		total += time.Duration(ticks) * time.Second / 100
	}
	return total
}

// pss is a process's share of memory in KiB, by that field of smaps_rollup.
func pss(p harness.Process, field string) int {
	for line := range strings.Lines(p.Read("smaps_rollup")) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == field {
			n, _ := strconv.Atoi(fields[1])
			return n
		}
	}
	return 0
}

// TestExecProbes has kubelet make exec probes, one a second in each of 65 containers,
// until it has made as many as 50 a second are. They leave nothing behind: no
// descriptor, no goroutine, no memory that grows with their number. How many a second
// a machine with other tests on it makes is logged, and nothing is asked of it.
//
// podshim is measured at rest, before and after: kubelet is stopped then, so that no
// probe is under way, and a few descriptors more would show.
func TestExecProbes(t *testing.T) {
	t.Parallel()
	last := *probeTime
	if testing.Short() {
		last = min(last, 15*time.Second)
	}
	k := Start(t, Options{})
	const pods, containers = 13, 5
	var all []*Pod
	for n := range pods {
		manifest := fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata:\n  name: probed-%d\nspec:\n  terminationGracePeriodSeconds: 0\n  containers:\n", n)
		for c := range containers {
			manifest += fmt.Sprintf(`  - name: c%d
    image: %s
    command: [sleep, "1000000"]
    livenessProbe:
      exec: {command: ["true"]}
      periodSeconds: 1
      timeoutSeconds: 20
      failureThreshold: 10
`, c, images.Busybox)
		}
		all = append(all, k.RunManifest(manifest))
	}
	for _, p := range all {
		p.WaitReady()
	}
	// The first few fill caches and pools.
	k.waitProbes(t, 10*pods*containers)
	k.Stop()
	before := k.rest(t)
	k.Launch()
	// Each container's probes begin anew within a second.
	k.waitProbes(t, pods*containers)
	begin, since := k.probes(), time.Now()
	k.waitProbes(t, begin+50*int(last.Seconds()))
	count, took := k.probes()-begin, time.Since(since)
	k.Stop()
	var after use
	back := k.ask(func() bool { after = k.use(); return after.grownFrom(before, count) == "" })
	t.Logf("%d exec probes in %.0f s (%.1f a second)\nbefore:     %v\nafterwards: %v", count, took.Seconds(), float64(count)/took.Seconds(), before, after)
	if !back {
		t.Errorf("podshim does not come back to what it took: %s", after.grownFrom(before, count))
	}
	k.Launch()
	for _, p := range all {
		for _, c := range p.Status().Status.ContainerStatuses {
			if c.RestartCount != 0 {
				t.Errorf("%s: %v", p.Name, c)
			}
		}
	}
}

// rest is what podshim takes once nothing is under way, which shows in figures that stay.
func (k *Kubelet) rest(t *testing.T) (u use) {
	t.Helper()
	same := 0
	if !k.ask(func() bool {
		now := k.use()
		if same++; now.files != u.files || now.goroutines != u.goroutines {
			same = 0
		}
		u = now
		return same > 5
	}) {
		t.Fatalf("podshim does not come to rest: %v", u)
	}
	return u
}

// fewMore descriptors or goroutines are none that every pod, or every probe, has left.
const fewMore = 8

// grownFrom says what has grown since, with so many probes in between; "" if nothing has.
// Threads are Go's, which keeps those it once had: as many as there are probes at a time.
// Memory has what the collector leaves lying; 4 KiB of each probe of a minute would show.
func (u use) grownFrom(before use, probes int) string {
	switch {
	case u.files > before.files+fewMore:
		return fmt.Sprintf("descriptors %d -> %d", before.files, u.files)
	case u.goroutines > before.goroutines+fewMore:
		return fmt.Sprintf("goroutines %d -> %d", before.goroutines, u.goroutines)
	case u.threads > before.threads+50:
		return fmt.Sprintf("threads %d -> %d", before.threads, u.threads)
	case u.anonKiB > before.anonKiB+probes+4096:
		return fmt.Sprintf("KiB of memory %d -> %d", before.anonKiB, u.anonKiB)
	}
	return ""
}

// probes is how many liveness probes kubelet has counted as successful.
func (k *Kubelet) probes() int {
	k.t.Helper()
	body, err := k.Get("/metrics/probes")
	if err != nil {
		k.t.Fatalf("%v", err)
	}
	total := 0
	for line := range strings.Lines(body) {
		if strings.HasPrefix(line, "prober_probe_total{") && strings.Contains(line, `result="successful"`) {
			fields := strings.Fields(line)
			n, _ := strconv.ParseFloat(fields[len(fields)-1], 64)
			total += int(n)
		}
	}
	return total
}

// waitProbes waits until kubelet has made so many probes: ten times as long as 50 a second take, and
// as long as any other wait.
func (k *Kubelet) waitProbes(t *testing.T, count int) {
	t.Helper()
	made := k.probes()
	begin, had := time.Now(), made
	limit := Limit + time.Duration(count-had)*time.Second/5
	for ; made < count; made = k.probes() {
		if time.Since(begin) > limit {
			t.Fatalf("kubelet has made %d probes in %v, want %d", made-had, limit, count-had)
		}
		time.Sleep(time.Second) // kubelet, too, has better things to do than to count
	}
}
