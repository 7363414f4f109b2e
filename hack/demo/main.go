// Command demo is `make demo`: it runs one pod on a podshim of its own and
// shows what a pod is.
//
// Nothing outside one temporary directory, one bridge and one cgroup is used,
// all with names of their own; at the end, also after a failure or Ctrl-C,
// everything is taken down, and the machine is searched for what might be left.
// The pod's files are examples/crictl/*.yaml; every command shown is the one
// that was run, with CONTAINER_RUNTIME_ENDPOINT set.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/podshim/podshim/test/images"
	"github.com/podshim/podshim/test/machine"
	"github.com/podshim/podshim/test/private"
)

// demo is one run.
type demo struct {
	screen  screen
	place   *private.Place
	crictl  string
	plugins string
	podshim string
	images  string
	source  string
}

func main() {
	d := &demo{screen: newScreen(os.Stdout)}
	flag.StringVar(&d.podshim, "podshim", "bin/podshim", "podshim executable; podmon lies beside it")
	flag.StringVar(&d.plugins, "tools", "_artifacts/tools", "directory of crictl and the CNI plugins")
	flag.StringVar(&d.images, "images", "_artifacts/images", "where built test images are kept")
	flag.StringVar(&d.source, "examples", "examples/crictl", "directory of the pod's files")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := d.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// run brings everything up, shows the pod and takes everything down again.
func (d *demo) run(ctx context.Context) (err error) {
	began := time.Now()
	if err := d.resolve(); err != nil {
		return err
	}
	if err := machine.Adopt(); err != nil {
		return err
	}
	if d.place, err = private.NewPlace("podshim-demo"); err != nil {
		return err
	}
	scope := d.place.Scope(os.Getpid())
	defer func() {
		// After success all of this finds nothing to do but the directory.
		err = errors.Join(err, machine.Sweep(), d.place.Remove())
	}()
	before, err := scope.Held()
	if err != nil {
		return err
	}
	d.screen.title("One pod on a private podshim: what it is made of, and that nothing is left of it")

	daemon, end, err := d.up(ctx)
	if err != nil {
		return err
	}
	defer end()
	if err := d.pod(ctx); err != nil {
		_ = daemon.Kill() // the error that matters is the pod's
		return fmt.Errorf("%w\n%s", err, d.logTail())
	}
	if err := d.down(scope, before, daemon); err != nil {
		return err
	}
	d.screen.done(fmt.Sprintf("%.1f s from nothing to nothing.", time.Since(began).Seconds()))
	return nil
}

// resolve makes the flags' paths absolute.
func (d *demo) resolve() error {
	for _, path := range []*string{&d.podshim, &d.plugins, &d.images, &d.source} {
		abs, err := filepath.Abs(*path)
		if err != nil {
			return err
		}
		*path = abs
	}
	d.crictl = filepath.Join(d.plugins, "crictl")
	return nil
}

// up starts the registry and the daemon; end stops the registry.
func (d *demo) up(ctx context.Context) (_ *private.Daemon, end func(), err error) {
	set, err := images.Build(ctx, d.images)
	if err != nil {
		return nil, nil, err
	}
	registry, err := set.Serve("127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	end = func() { _ = registry.Close() }
	if err := registry.WriteHosts(d.place.Certs()); err != nil {
		end()
		return nil, nil, err
	}
	log, err := os.Create(d.place.Path("podshim.log"))
	if err != nil {
		end()
		return nil, nil, err
	}
	defer log.Close() // the daemon has its own descriptor
	daemon, err := d.place.Start(ctx, private.Config{
		Podshim: d.podshim, Plugins: d.plugins, Subnet: "10.202.0.0/24", Log: log,
	})
	if err != nil {
		end()
		return nil, nil, fmt.Errorf("%w\n%s", err, d.logTail())
	}
	if err := d.writeExamples(); err != nil {
		end()
		return nil, nil, errors.Join(err, daemon.Kill())
	}
	d.screen.step("A podshim of our own")
	d.screen.fact("daemon", fmt.Sprintf("pid %d, CRI on %s", daemon.PID(), d.place.Endpoint()))
	d.screen.fact("network", fmt.Sprintf("CNI bridge %s, 10.202.0.0/24", d.place.Bridge()))
	d.screen.fact("registry", registry.Addr+", which stands in for registry.k8s.io (hosts.toml)")
	return daemon, end, nil
}

// writeExamples copies the pod's files, with their directories moved into the
// place.
func (d *demo) writeExamples() error {
	for _, dir := range []string{"page", "logs"} {
		if err := os.Mkdir(d.place.Path(dir), 0o755); err != nil {
			return err
		}
	}
	for _, name := range []string{"pod", "init", "web", "sidecar"} {
		text, err := os.ReadFile(filepath.Join(d.source, name+".yaml"))
		if err != nil {
			return fmt.Errorf("read example: %w", err)
		}
		text = bytes.ReplaceAll(text, []byte("/tmp/podshim-demo/"), []byte(d.place.Dir+"/"))
		if err := os.WriteFile(d.place.Path(name+".yaml"), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// pod runs the pod and shows it.
func (d *demo) pod(ctx context.Context) error {
	d.screen.step("Images: real nginx and busybox, made from Debian's packages")
	for _, image := range []string{images.Nginx, images.Busybox} {
		if _, err := d.show(ctx, "pull", image); err != nil {
			return err
		}
	}

	d.screen.step("The pod: its infra container first, which holds the namespaces")
	pod, err := d.show(ctx, "runp", "pod.yaml")
	if err != nil {
		return err
	}

	d.screen.step("The init container runs to its end and leaves a page in the pod's volume")
	if _, err := d.container(ctx, pod, "init.yaml", "CONTAINER_EXITED"); err != nil {
		return err
	}

	d.screen.step("The web server and a sidecar join the pod, as peers")
	web, err := d.container(ctx, pod, "web.yaml", "CONTAINER_RUNNING")
	if err != nil {
		return err
	}
	sidecar, err := d.container(ctx, pod, "sidecar.yaml", "CONTAINER_RUNNING")
	if err != nil {
		return err
	}
	if _, err := d.show(ctx, "ps", "-a", "--pod", pod); err != nil {
		return err
	}

	d.screen.step("The sidecar has fetched the page over localhost; its log, by way of CRI")
	if err := d.awaitLog(ctx, "sidecar.log", "answered"); err != nil {
		return err
	}
	if _, err := d.show(ctx, "logs", sidecar); err != nil {
		return err
	}

	d.screen.step("What makes it a pod: each container's namespaces, read from /proc")
	if err := d.namespaces(pod, web, sidecar); err != nil {
		return err
	}

	d.screen.step("Stop and remove the pod: all of it goes")
	if _, err := d.show(ctx, "stopp", pod); err != nil {
		return err
	}
	_, err = d.show(ctx, "rmp", pod)
	return err
}

// container creates and starts a container and waits for the state.
func (d *demo) container(ctx context.Context, pod, file, state string) (string, error) {
	id, err := d.show(ctx, "create", pod, file, "pod.yaml")
	if err != nil {
		return "", err
	}
	if _, err := d.show(ctx, "start", id); err != nil {
		return "", err
	}
	return id, d.await(ctx, file+" to be "+state, func() (bool, error) {
		out, err := d.run1(ctx, "inspect", "-o", "go-template", "--template", "{{.status.state}} {{.status.exitCode}}", id)
		got, code, _ := strings.Cut(strings.TrimSpace(out), " ")
		if err == nil && got == "CONTAINER_EXITED" && (state != got || code != "0") {
			err = fmt.Errorf("it ended with exit code %s", code)
		}
		return got == state, err
	})
}

// awaitLog waits for a line in a container's log file.
func (d *demo) awaitLog(ctx context.Context, file, want string) error {
	return d.await(ctx, want+" in "+file, func() (bool, error) {
		text, err := os.ReadFile(d.place.Path("logs", file))
		return bytes.Contains(text, []byte(want)), err
	})
}

// await asks until the answer is yes, at most 20 s.
func (d *demo) await(ctx context.Context, what string, done func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		ok, err := done()
		if err != nil {
			return fmt.Errorf("await %s: %w", what, err)
		}
		if ok {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("await %s: %w", what, ctx.Err())
		}
	}
}

// show prints a crictl command, runs it, prints and returns its output.
func (d *demo) show(ctx context.Context, args ...string) (string, error) {
	d.screen.command("crictl", args)
	out, err := d.run1(ctx, args...)
	if err != nil {
		return "", err
	}
	d.screen.output(out)
	return strings.TrimSpace(out), nil
}

// run1 runs crictl in the place and returns its output.
func (d *demo) run1(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, d.crictl, args...)
	cmd.Dir = d.place.Dir
	cmd.Env = append(os.Environ(),
		"CONTAINER_RUNTIME_ENDPOINT="+d.place.Endpoint(), "IMAGE_SERVICE_ENDPOINT="+d.place.Endpoint())
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("crictl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// down stops the daemon and searches the machine.
func (d *demo) down(scope machine.Scope, before []machine.Thing, daemon *private.Daemon) error {
	d.screen.step("And the machine: nothing is left")
	if err := daemon.Stop(); err != nil {
		return fmt.Errorf("%w\n%s", err, d.logTail())
	}
	machine.Reap()
	scope.Except = d.place.Monitors() // they are for all pods and outlive the daemon
	after, err := scope.Held()
	if err != nil {
		return err
	}
	leaks := machine.Leaks(before, after)
	for _, kind := range []string{"process", "mount", "network namespace", "link", "cgroup", "file"} {
		var found []string
		for _, leak := range leaks {
			if leak.Kind == kind {
				found = append(found, leak.Name)
			}
		}
		d.screen.check(kinds[kind], found)
	}
	if len(leaks) > 0 {
		return fmt.Errorf("%d things were left behind", len(leaks))
	}
	if err := d.place.KillMonitors(); err != nil {
		return err
	}
	machine.Reap()
	return nil
}

// kinds are the kinds of things as a reader knows them.
var kinds = map[string]string{
	"process":           "processes",
	"mount":             "mounts",
	"network namespace": "network namespaces",
	"link":              "veths on the bridge",
	"cgroup":            "cgroups",
	"file":              "IP reservations",
}

// logTail is the end of the daemon's log, for errors.
func (d *demo) logTail() string {
	text, err := os.ReadFile(d.place.Path("podshim.log"))
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return "the daemon's log ends:\n  " + strings.Join(lines[max(0, len(lines)-15):], "\n  ")
}
