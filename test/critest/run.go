package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/enclosure"
	"github.com/podshim/podshim/test/images"
	"github.com/podshim/podshim/test/machine"
	"github.com/podshim/podshim/test/peer"
	"github.com/podshim/podshim/test/private"
)

//go:embed benchmark.yaml
var benchmarkParams []byte

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
	if err := enclosure.Settle(); err != nil {
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
	if o.runtime == "podshim" {
		scope.Files = append(scope.Files, place.Path("run"), place.Path("root"))
	}
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

	name := o.runtime + ".log"
	if o.repeat > 1 {
		name = fmt.Sprintf("%s-%d.log", o.runtime, o.seed) // one run's log must not hide another's
	}
	log, err := os.Create(filepath.Join(o.artifacts, name))
	if err != nil {
		return tally{}, fmt.Errorf("create daemon's log: %w", err)
	}
	defer log.Close()
	daemon, err := start(ctx, o, place, log)
	if err != nil {
		return tally{}, errors.Join(err, machine.Sweep(), fmt.Errorf("the daemon's log is %s", log.Name()))
	}
	idle, err := standing(ctx, o, place, scope)
	if err != nil {
		return tally{}, errors.Join(err, daemon.Kill(), machine.Sweep(), fmt.Errorf("the daemon's log is %s", log.Name()))
	}
	fmt.Printf("%s: pid %d, seed %d\n", o.runtime, daemon.PID(), o.seed)
	t, err := suites(ctx, o, place)
	if ctx.Err() != nil {
		return t, errors.Join(ctx.Err(), daemon.Kill(), machine.Sweep())
	}
	problems, emptyErr := emptied(ctx, place.Endpoint())
	t.problems = append(t.problems, problems...)
	leaks, leakErr := leaksOf(scope, place, empty, idle, daemon)
	err = errors.Join(err, emptyErr, leakErr, machine.Sweep())
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
		return peer.StartContainerd(ctx, o.peers, place, config, "")
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
		if err := os.WriteFile(place.Path("benchmark.yaml"), benchmarkParams, 0o644); err != nil {
			return tally{}, fmt.Errorf("write benchmark parameters: %w", err)
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
func leaksOf(scope machine.Scope, place *private.Place, empty, idle []machine.Thing, daemon runtime) ([]machine.Thing, error) {
	expected := slices.Concat(empty, idle)
	leaks, err := settled(place, scope, expected)
	if err != nil {
		return nil, errors.Join(err, daemon.Kill())
	}
	if err := daemon.Stop(); err != nil {
		return leaks, err
	}
	machine.Reap()
	// The monitors are still there, and must be without children.
	scope.Except = place.Monitors()
	scope.Files = nil
	held, err := scope.Held()
	if err != nil {
		return leaks, err
	}
	leaks = append(leaks, machine.Leaks(slices.Concat(expected, leaks), held)...)
	return leaks, place.KillMonitors()
}

// settled finds what is held beside a running daemon and was not expected, once
// what it does in the background is done.
func settled(place *private.Place, scope machine.Scope, expected []machine.Thing) ([]machine.Thing, error) {
	if err := settleRecords(place.Path("run", "state")); err != nil {
		return nil, err
	}
	leaks := func() ([]machine.Thing, error) {
		held, err := besideDaemon(scope).Held()
		return machine.Leaks(expected, held), err
	}
	if err := settleSnapshots(place.Path("root", "images", "snapshots"), leaks); err != nil {
		return nil, err
	}
	return leaks()
}

// besideDaemon is the scope as it can be judged while the daemon is up: all but
// its processes.
func besideDaemon(scope machine.Scope) machine.Scope {
	scope.Parent = 0
	return scope
}

// standing is what there is once a pod has come and gone: what the runtime
// makes once for all pods. That pod's own things would have its ID in their
// names, and the suite's pods would leave the like of them under other IDs.
func standing(ctx context.Context, o options, place *private.Place, scope machine.Scope) ([]machine.Thing, error) {
	before, err := besideDaemon(scope).Held()
	if err != nil {
		return nil, err
	}
	id, err := onePod(ctx, o, place)
	if err != nil {
		return nil, fmt.Errorf("run a first pod: %w", err)
	}
	if err := settleRecords(place.Path("run", "state")); err != nil {
		return nil, err
	}
	after, err := besideDaemon(scope).Held()
	if err != nil {
		return nil, err
	}
	for _, thing := range machine.Leaks(before, after) {
		if strings.Contains(thing.Name, id) {
			return nil, fmt.Errorf("the first pod left %v", thing)
		}
	}
	return after, nil
}
