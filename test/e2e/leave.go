package e2e

import (
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/harness"
)

// end removes every manifest, waits until kubelet has taken the pods down, and
// ends kubelet. What podshim left is the harness's to find.
func (k *Kubelet) end() {
	files, _ := filepath.Glob(k.Manifests + "/*")
	for _, file := range files {
		if err := os.Remove(file); err != nil {
			k.t.Errorf("remove manifest: %v", err)
		}
	}
	// The last thing kubelet does for a pod is to remove its directory.
	if !k.ask(func() bool { return len(k.podDirs()) == 0 }) {
		k.t.Errorf("kubelet has not taken down the pods %v", k.podDirs())
	}
	k.checkPLEG()
	k.Stop()
	complaints, allowed := k.complaints()
	for _, line := range complaints {
		k.t.Errorf("kubelet logged an error: %s", line)
	}
	for _, pattern := range slices.Sorted(maps.Keys(allowed)) {
		k.t.Logf("%d errors in kubelet's log are allowed as %s", allowed[pattern], pattern)
	}
	if k.t.Failed() {
		k.t.Logf("kubelet's log:\n%s", k.tail(80))
	}
	k.removeLogLinks()
	// kubelet mounts its directory onto itself, to make mounts in it propagate.
	if err := unix.Unmount(k.Root, 0); err != nil && err != unix.EINVAL {
		k.t.Errorf("unmount kubelet's directory, which must hold no mount now: %v", err)
	}
	if err := harness.RemoveCgroup(k.cgroup("kubepods")); err != nil {
		k.t.Errorf("remove kubelet's cgroups, which must be empty now: %v", err)
	}
}

// checkPLEG looks whether kubelet's generator of pod events, which lists podshim's pods and
// containers once a second, has gone on until now and has lost nothing.
func (k *Kubelet) checkPLEG() {
	if k.cmd == nil {
		return // the test has ended kubelet
	}
	if health, err := k.Get("/healthz?verbose"); err != nil || !strings.Contains(health, "[+]syncloop ok") {
		k.t.Errorf("kubelet is not healthy: %v\n%s", err, health)
	}
	text, err := k.Get("/metrics")
	if err != nil {
		k.t.Errorf("%v", err)
		return
	}
	value := func(name string) float64 {
		_, rest, _ := strings.Cut("\n"+text, "\n"+name+" ")
		number, _, _ := strings.Cut(rest, "\n")
		v, _ := strconv.ParseFloat(number, 64)
		return v
	}
	rounds, seconds := value("kubelet_pleg_relist_duration_seconds_count"), value("kubelet_pleg_relist_duration_seconds_sum")
	const limit = 3 * time.Minute // when kubelet calls it unhealthy
	since := time.Since(time.Unix(int64(value("kubelet_pleg_last_seen_seconds")), 0))
	if lost := value("kubelet_pleg_discard_events"); rounds == 0 || lost != 0 || since > limit {
		k.t.Errorf("kubelet's PLEG has listed %v times, last %v ago, and lost %v events", rounds, since, lost)
	}
	if strings.Contains(k.Log(), "PLEG is not healthy: pleg was last seen") {
		k.t.Errorf("kubelet's PLEG was not healthy:\n%s", k.tail(5, "PLEG is not healthy"))
	}
	k.t.Logf("kubelet's PLEG listed %.0f times, in %.1f ms on average", rounds, seconds/max(rounds, 1)*1000)
}

// cgroup names a cgroup of kubelet's below its root as CRI does: a path, or a slice
// with the systemd driver.
func (k *kubelet) cgroup(names ...string) string {
	if !harness.Systemd {
		return filepath.Join(append([]string{k.CgroupRoot}, names...)...)
	}
	slice := names[0]
	for _, name := range names[1:] {
		slice += "-" + strings.ReplaceAll(name, "-", "_")
	}
	return slice + ".slice"
}

// podCgroup names the cgroup that kubelet makes for a pod.
func (k *kubelet) podCgroup(status PodStatus) string {
	names := []string{"kubepods", strings.ToLower(status.Status.QOSClass), "pod" + status.Metadata.UID}
	if names[1] == "guaranteed" {
		names = slices.Delete(names, 1, 2)
	}
	return k.cgroup(names...)
}

// podDirs lists kubelet's directories of pods.
func (k *kubelet) podDirs() []string {
	entries, _ := os.ReadDir(k.Root + "/pods")
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// removeLogLinks removes what kubelet links in a directory that is the same for
// every kubelet of a machine, as far as it leads to this one's logs.
func (k *kubelet) removeLogLinks() {
	links, _ := filepath.Glob("/var/log/containers/*.log")
	for _, link := range links {
		if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, k.Logs+"/") {
			_ = os.Remove(link)
		}
	}
}

func (k *kubelet) logPath() string { return k.Dir + "/kubelet.log" }

// Log is everything kubelet has logged.
func (k *kubelet) Log() string {
	data, _ := os.ReadFile(k.logPath())
	return string(data)
}

// tail is the end of kubelet's log; with words, of the lines that hold one.
func (k *kubelet) tail(lines int, words ...string) string {
	var kept []string
	for line := range strings.Lines(k.Log()) {
		if len(words) == 0 || containsAny(line, words) {
			kept = append(kept, line)
		}
	}
	return strings.Join(kept[max(0, len(kept)-lines):], "")
}

func containsAny(s string, parts []string) bool {
	for _, p := range parts {
		if strings.Contains(s, p) {
			return true
		}
	}
	return false
}

// errorLine is klog's: severity, date, time, thread, source.
var errorLine = regexp.MustCompile(`^[EF]\d{4} `)

// complaints are the errors in kubelet's log that harmless does not explain, and how many
// there are that it does, by pattern.
func (k *kubelet) complaints() (found []string, allowed map[string]int) {
	allowed = map[string]int{}
	end := 0
	for line := range strings.Lines(k.Log()) {
		begin := end
		end += len(line)
		line = strings.TrimSpace(line) // "$" is before no newline
		if !errorLine.MatchString(line) {
			continue
		}
		patterns := slices.Concat(harmless, k.expect)
		for _, e := range k.expectIn {
			if begin >= e.from && begin < e.to {
				patterns = append(patterns, e.pattern)
			}
		}
		i := slices.IndexFunc(patterns, func(p *regexp.Regexp) bool { return p.MatchString(line) })
		if i < 0 {
			found = append(found, line)
			continue
		}
		allowed[patterns[i].String()]++
	}
	return found, allowed
}

// expectDuring allows errors that match a pattern as long as do runs, and at no other time.
func (k *Kubelet) expectDuring(pattern *regexp.Regexp, do func()) {
	from := len(k.Log())
	do()
	k.expectIn = append(k.expectIn, passage{pattern, from, len(k.Log())})
}

// passage is a part of kubelet's log, by bytes, in which a pattern is expected.
type passage struct {
	pattern  *regexp.Regexp
	from, to int
}

// harmless are errors of kubelet that podshim has no part in.
var harmless = []*regexp.Regexp{
	// kubelet removes a pod's containers from two places, and asks for the status of
	// what the other one has removed; so does the part that rotates logs, which asks for a
	// log that has gone with its pod to be opened anew, of one that has ended by then.
	regexp.MustCompile(`"(ContainerStatus from runtime service failed|Failed to get container status)" err="rpc error: code = NotFound `),
	regexp.MustCompile(`"(ReopenContainerLog from runtime service failed|Container log doesn't exist, reopen container log failed)" err="rpc error: code = (NotFound|FailedPrecondition) `),
	regexp.MustCompile(`(Failed|failed) to remove .*failed to get container status .* code = NotFound desc = container`),
	// Who reads a log and does not follow it may meet its last line half-written: a write
	// to a file is not one step for its readers.
	regexp.MustCompile(`"Failed when parsing line in log file" err="(stream type|log tag|timestamp) is not found"`),
	// Every kubelet of a machine tidies one and the same directory of links.
	regexp.MustCompile(`"Failed to remove container log dead symlink" err="remove .* no such file or directory"`),
	regexp.MustCompile(`"Could not read directory" err="readdirent .* no such file or directory"|"Pod found, but error occurred during checking mounted volumes from disk"`),
	// kubelet asks on while it takes a container down: the probe's command meets the
	// container's end.
	regexp.MustCompile(`"ExecSync cmd from runtime service failed" err="rpc error: code = FailedPrecondition .*(has|is) exited`),
	// kubelet gives up a call: the pod is going, or a client of its own has left.
	regexp.MustCompile(`err=".*rpc error: code = Canceled desc = context canceled"`),
	regexp.MustCompile(`"Error proxying data from (backend to client|client to backend)" err=".*(broken pipe|connection reset by peer|abnormal closure.*)"`),
	regexp.MustCompile(`"Error on socket receive" err="read tcp .* use of closed network connection"`),
	// cAdvisor lists the machine's interfaces, others' too, and reads each: one has gone.
	regexp.MustCompile(`"?Failed to get network devices: open /sys/class/net/\w+/address: no such file or directory`),
	// kubelet looks into the cgroup of a pod that it has itself removed.
	regexp.MustCompile(`"failed to read memory cgroup (config|limits) for the pod" .*no such file or directory"`),
	// kubelet learns of a mirror pod later than it makes it.
	regexp.MustCompile(`"Failed creating a mirror pod" err="pods .* already exists"`),
	// A log is read while podmon writes: the kernel shows a write page by page, so that the
	// last line may be a part of one.
	regexp.MustCompile(`"Failed when parsing line in log file" err="timestamp is not found" .* line="[-0-9T:.]*Z?"$`),
	// testLifetimes kills the pod's infra container while kubelet starts a container in the pod.
	regexp.MustCompile(`"CreateContainer in sandbox from runtime service failed" err="rpc error: code = FailedPrecondition desc = pod sandbox \w+ is not ready \(the infra container ended\)`),
	regexp.MustCompile(`"crashing\\?" with CreateContainerError: \\?"pod sandbox |start failed in pod lifetimes-node_default\(\w+\): CreateContainerError: pod sandbox `),
	// What the tests' own containers do.
	regexp.MustCompile(`"Error syncing pod, skipping" err="(failed|\[failed) to \\"StartContainer\\" for \\"(flaky|crashing|steady|greedy|fading|sidecar|unsteady|again|whole)\\" with CrashLoopBackOff`),
	regexp.MustCompile(`"StartContainer from runtime service failed" .*exec: \\"/no/such/program\\"`),
	regexp.MustCompile(`"Unhandled Error" err="container missing start failed`),
	regexp.MustCompile(`"Error syncing pod, skipping" err="failed to \\"StartContainer\\" for \\"missing\\" with RunContainerError`),
	regexp.MustCompile(`CreateContainerConfigError: .*container has runAsNonRoot and image `),
	regexp.MustCompile(`podName:\w+ nodeName:}" failed\..* MountVolume.SetUp failed for volume .*hostPath type check failed`),
	regexp.MustCompile(`"(Unable to attach or mount volumes for pod; skipping pod|Error syncing pod, skipping)" .*pod="default/wrong-path-`),
	// A machine that is too busy: kubelet's own rounds.
	regexp.MustCompile(`"Housekeeping took longer than expected"`),
	regexp.MustCompile(`"Partial failure issuing cadvisor.ContainerInfoV2"`),
	// This machine's root may not raise limits.
	regexp.MustCompile(`"Failed to set rlimit on max file handles" err="operation not permitted"`),
	// At the start, before the first round of each; on a busy machine kubelet's eviction manager
	// asks for the cgroup of all pods before kubelet's cAdvisor has found it.
	regexp.MustCompile(`"Failed to get system container stats" err=".*unknown container \\"\S*kubepods\S*\\"`),
	regexp.MustCompile(`"Eviction manager: failed to construct signal" err="system container \\"pods\\" not found in metrics"`),
	regexp.MustCompile(`"Skipping pod synchronization" err="\[?container runtime status check may not have completed yet`),
	regexp.MustCompile(`"Image garbage collection failed once. Stats initialization may not have completed yet"`),
	regexp.MustCompile(`"Failed to read data from checkpoint" err="checkpoint is not found"`),
	// A machine without an identity of its own, as a container or a minimal root is.
	regexp.MustCompile(`Failed to get system UUID: open /etc/machine-id`),
	// kubelet looks for its own process by a command that is not systemd's.
	regexp.MustCompile(`"Failed to ensure process in container with oom score" err="failed to find pid namespace of init process"`),
	// kubelet knows these labels of CRI-O alone; it ignores what it reports.
	regexp.MustCompile(`failed to check if we have separate container filesystem. Ignoring.`),
	// cAdvisor watches all cgroups of the machine, and some are gone before it does.
	regexp.MustCompile(`watcher.go:\d+\] Failed to watch directory .* no such file or directory`),
	// A manifest that comes and goes within a second.
	regexp.MustCompile(`"Unable to process watch event" err="the pod with key .* doesn't exist in cache"`),
	regexp.MustCompile(`"Could not get metadata" err="stat .*\.yaml: no such file or directory"`),
	// There is no API server.
	regexp.MustCompile(`"failed to check if node is newer; using informer node"`),
}

// exists tells whether a path is there, links not followed.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// filesBelow lists the paths below a directory.
func filesBelow(dir string) []string {
	var found []string
	_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && path != dir {
			found = append(found, path)
		}
		return nil
	})
	return found
}
