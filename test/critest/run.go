package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/images"
	"github.com/podshim/podshim/test/machine"
	"github.com/podshim/podshim/test/private"
)

// runtime is what the suite is run against.
type runtime interface {
	// PID of the daemon.
	PID() int
	// Stop ends it; pods are gone by then.
	Stop() error
	// Kill ends it at once.
	Kill() error
}

// run does everything inside the namespaces of its own.
func run(ctx context.Context, o options) error {
	if err := settle(); err != nil {
		return err
	}
	set, err := images.Build(ctx, o.images)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.artifacts, 0o755); err != nil {
		return fmt.Errorf("make artifacts directory: %w", err)
	}
	var total tally
	for i := range o.repeat {
		one := o
		one.seed += int64(i)
		t, err := runOnce(ctx, one, set)
		total.add(t)
		if err != nil {
			total.problems = append(total.problems, err.Error())
		}
		if ctx.Err() != nil {
			break
		}
	}
	for _, problem := range total.problems {
		fmt.Fprintln(os.Stderr, "  "+problem)
	}
	fmt.Printf("critest: %d passed, %d failed, %d skipped\n", total.passed, total.failed, total.skipped)
	if len(total.problems) > 0 || total.failed > 0 {
		return fmt.Errorf("%d problems, reports in %s", len(total.problems), o.artifacts)
	}
	if total.passed == 0 && !o.benchmark {
		return errors.New("no spec ran")
	}
	return nil
}

// runOnce starts a registry and a runtime, runs the suite, stops them and
// looks for what is left. The error is for what is not a spec's failure.
func runOnce(ctx context.Context, o options, set *images.Set) (_ tally, err error) {
	place, err := private.NewPlace("critest")
	if err != nil {
		return tally{}, err
	}
	defer func() { err = errors.Join(err, place.Remove()) }()
	scope := place.Scope(os.Getpid())
	scope.Whole = true
	// critest leaves its own temporary files; they go with the place.
	empty, err := scope.Held()
	if err != nil {
		return tally{}, err
	}
	registry, err := set.Serve("127.0.0.1:0")
	if err != nil {
		return tally{}, err
	}
	defer registry.Close()
	if err := registry.WriteHosts(place.Certs()); err != nil {
		return tally{}, err
	}

	log, err := os.Create(filepath.Join(o.artifacts, o.runtime+".log"))
	if err != nil {
		return tally{}, fmt.Errorf("create daemon's log: %w", err)
	}
	defer log.Close()
	daemon, err := start(ctx, o, place, log)
	if err != nil {
		return tally{}, errors.Join(err, sweep(), fmt.Errorf("the daemon's log is %s", log.Name()))
	}
	fmt.Printf("%s: pid %d, seed %d\n", o.runtime, daemon.PID(), o.seed)
	t, err := suites(ctx, o, place)
	if ctx.Err() != nil {
		return t, errors.Join(ctx.Err(), daemon.Kill(), sweep())
	}
	leaks, leakErr := leaksOf(o, scope, empty, daemon)
	err = errors.Join(err, leakErr, sweep())
	for _, leak := range leaks {
		t.problems = append(t.problems, "left behind: "+leak.String())
	}
	return t, err
}

// start brings the runtime up in the place.
func start(ctx context.Context, o options, place *private.Place, log io.Writer) (runtime, error) {
	config := private.Config{
		Podshim: o.podshim, Plugins: o.tools, Subnet: "10.201.0.0/16", PortMappings: true,
		InfraImage: o.infraImage, Log: log,
	}
	if o.handler != "" {
		config.Handlers = []string{o.handler}
	}
	switch o.runtime {
	case "podshim":
		return place.Start(ctx, config)
	case "containerd":
		return startContainerd(ctx, o, place, config)
	}
	return nil, fmt.Errorf("unknown runtime %q", o.runtime)
}

// suites runs critest: all specs over SPDY, then the streaming specs over
// WebSocket; or the benchmarks.
func suites(ctx context.Context, o options, place *private.Place) (tally, error) {
	if o.benchmark {
		out := filepath.Join(o.artifacts, "benchmark")
		if err := os.MkdirAll(out, 0o755); err != nil {
			return tally{}, fmt.Errorf("make benchmark directory: %w", err)
		}
		r, err := critest(ctx, o, place, "benchmark", "-benchmark",
			"-benchmarking-params-file", place.Path("benchmark.yaml"), "-benchmarking-output-dir", out)
		return r.count(false), err
	}
	var args []string
	for _, s := range skips {
		if s.ask {
			args = append(args, "-ginkgo.skip", s.specs.String())
		}
	}
	if o.focus != "" {
		args = append(args, "-ginkgo.focus", o.focus)
	}
	r, err := critest(ctx, o, place, "suite", args...)
	t := r.count(o.focus == "")
	fmt.Printf("suite: %d specs passed in %.1f s\n", t.passed, t.took.Seconds())
	for _, s := range r.slowest(5) {
		fmt.Printf("  %5.1f s  %s\n", s.RunTime.Seconds(), s.name())
	}
	if err != nil || !o.webSocket || ctx.Err() != nil {
		return t, err
	}
	r, err = critest(ctx, o, place, "websocket", "-ginkgo.focus", "Streaming",
		"-websocket-exec", "-websocket-attach", "-websocket-portforward")
	web := r.count(false)
	fmt.Printf("streaming over WebSocket: %d specs passed in %.1f s\n", web.passed, web.took.Seconds())
	t.add(web)
	return t, err
}

// critest runs the program once and reads its report. That specs failed is in
// the result and not an error.
func critest(ctx context.Context, o options, place *private.Place, name string, args ...string) (result, error) {
	report := filepath.Join(o.artifacts, o.runtime+"-"+name+".json")
	if err := os.RemoveAll(report); err != nil {
		return result{}, fmt.Errorf("remove old report: %w", err)
	}
	logPath := filepath.Join(o.artifacts, o.runtime+"-"+name+".log")
	log, err := os.Create(logPath)
	if err != nil {
		return result{}, fmt.Errorf("create critest's log: %w", err)
	}
	defer log.Close()
	var out io.Writer = log
	if o.verbose {
		out = io.MultiWriter(log, os.Stdout)
	}
	args = append([]string{
		"-runtime-endpoint", place.Endpoint(), "-image-endpoint", place.Endpoint(),
		"-runtime-handler", o.handler, "-config", place.Path("no-crictl.yaml"),
		"-ginkgo.timeout", "20m", "-ginkgo.no-color",
		"-ginkgo.seed", fmt.Sprint(o.seed), "-ginkgo.json-report", report,
	}, args...)
	cmd := exec.CommandContext(ctx, filepath.Join(o.tools, "critest"), args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Dir = place.Dir
	cmd.Env = append(os.Environ(), "TMPDIR="+place.Path("tmp"))
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	runErr := cmd.Run()
	r, err := readReport(report)
	if err != nil {
		return result{}, errors.Join(err, runErr, fmt.Errorf("critest's output is %s", logPath))
	}
	return r, nil
}

// leaksOf compares the machine with what it was before the daemon started:
// first beside the daemon, which must hold nothing for pods that are gone, then
// after it has stopped.
func leaksOf(o options, scope machine.Scope, empty []machine.Thing, daemon runtime) ([]machine.Thing, error) {
	beside := scope
	beside.Parent = 0 // the daemon's own processes are there
	beside.Whole = false
	beside.Dir = ""
	held, err := beside.Held()
	if err != nil {
		return nil, errors.Join(err, daemon.Kill())
	}
	leaks := machine.Leaks(empty, held)
	if err := daemon.Stop(); err != nil {
		return leaks, err
	}
	if err := stopMonitors(o); err != nil {
		return leaks, err
	}
	reap()
	held, err = scope.Held()
	if err != nil {
		return leaks, err
	}
	return append(leaks, machine.Leaks(append(empty, leaks...), held)...), nil
}

// stopMonitors ends the monitors that outlive the daemon by design and waits
// for them, at most 10 s.
func stopMonitors(o options) error {
	deadline := time.Now().Add(10 * time.Second)
	for _, pid := range children(func(name string) bool { return strings.HasPrefix(name, "podmon") }) {
		if err := unix.Kill(pid, unix.SIGTERM); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("stop podmon: %w", err)
		}
		if err := awaitExit(pid, time.Until(deadline)); err != nil {
			return fmt.Errorf("stop podmon: %w", err)
		}
	}
	return nil
}

// awaitExit waits for the end of a process through its pidfd.
func awaitExit(pid int, limit time.Duration) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pidfd of %d: %w", pid, err)
	}
	defer unix.Close(fd)
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(limit.Milliseconds()))
	if err == nil && n == 0 {
		return fmt.Errorf("process %d is still there", pid)
	}
	return err
}

// children are this process's own, the orphans it adopted among them.
func children(keep func(name string) bool) []int {
	things, err := (machine.Scope{Parent: os.Getpid()}).Held()
	if err != nil {
		return nil
	}
	var pids []int
	for _, t := range things {
		var pid int
		var rest string
		if _, err := fmt.Sscanf(t.Name, "%d (%s", &pid, &rest); err == nil && keep(rest) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// reap collects the adopted children that have ended: a zombie is no leak of
// the runtime, this process is init for it.
func reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err != nil || pid <= 0 {
			return
		}
	}
}

// sweep kills whatever a failed run left, so that the machine is clean for the
// next one.
func sweep() error {
	var errs []error
	for _, pid := range children(func(string) bool { return true }) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, err)
			continue
		}
		if err := awaitExit(pid, 5*time.Second); err != nil {
			errs = append(errs, err)
		}
	}
	reap()
	return errors.Join(errs...)
}
