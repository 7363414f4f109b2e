package container

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"reflect"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/stage"
	"github.com/podshim/podshim/internal/monitor/wire"
)

// joinable are the namespaces of a pause that may be others': it makes them, or joins
// them by path.
var joinable = map[specs.LinuxNamespaceType]uintptr{
	specs.NetworkNamespace: unix.CLONE_NEWNET, specs.IPCNamespace: unix.CLONE_NEWIPC, specs.UTSNamespace: unix.CLONE_NEWUTS,
}

// isPause tells whether the request is for an infra container that startPause can make:
// that runs the embedded pause, and whose spec asks for nothing but what is done there. In
// whatever else there is in it, a user namespace, sysctls, an LSM's label, libcontainer is
// the one to trust.
func isPause(r wire.StartRequest) bool {
	if !r.Pause || !r.Discard || r.Stdin || r.LogPath != "" {
		return false
	}
	rest, process, linux, root := *r.Spec, *r.Spec.Process, *r.Spec.Linux, *r.Spec.Root
	if len(process.Args) != 1 || len(process.Env) != 1 || process.Cwd != "/" || !process.NoNewPrivileges || !root.Readonly ||
		!reflect.DeepEqual(process.Capabilities, &specs.LinuxCapabilities{}) {
		return false
	}
	for _, ns := range linux.Namespaces {
		_, known := joinable[ns.Type]
		if !known && (ns.Path != "" || ns.Type != specs.MountNamespace && ns.Type != specs.PIDNamespace) {
			return false
		}
	}
	process.Args, process.Env, process.Cwd, process.NoNewPrivileges = nil, nil, "", false
	process.Capabilities, process.OOMScoreAdj, process.User = nil, nil, specs.User{}
	linux.Namespaces, linux.Seccomp, linux.CgroupsPath, linux.Resources = nil, nil, "", nil
	rest.Process, rest.Linux, rest.Root, rest.Mounts = nil, nil, nil, nil
	rest.Version, rest.Hostname, rest.Annotations = "", "", nil
	if len(linux.Sysctl) == 0 {
		linux.Sysctl = nil
	}
	return root.Path != "" && reflect.DeepEqual(rest, specs.Spec{}) &&
		reflect.DeepEqual(process, specs.Process{}) && reflect.DeepEqual(linux, specs.Linux{})
}

// startPause makes the infra container of a pod without libcontainer. What it does is done
// before each pod is there, for a program of some hundred bytes that is our own: a few
// system calls (stage.Pause) instead of a start of "podmon init", which is made for
// everything that a spec may ask for. The mounts of the spec are what libcontainer needs.
//
// It begins with the record in a directory that is there. When clean is false the record
// must stay.
func (c *Container) startPause(r wire.StartRequest, config *configs.Config) (clean bool, err error) {
	cg, err := manager.New(config.Cgroups)
	if err != nil {
		return true, fmt.Errorf("cgroup: %w", err)
	}
	if err := c.note(r, cg.GetPaths()); err != nil {
		return true, err
	}
	defer func() {
		if err != nil {
			derr := c.cgroup.Destroy()
			clean = derr == nil
			err = errors.Join(err, derr)
		}
	}()
	order, err := stage.NewOrder()
	if err != nil {
		return true, err
	}
	p := pauseOf(r.Spec)
	p.OOMScoreAdj = *config.OomScoreAdj
	process, err := c.launchPause(p, order, cg, config.Cgroups.Resources)
	if err == nil {
		err = order.Started()
	} else {
		order.Cancel()
	}
	if err != nil {
		if process != nil {
			c.terminate(process)
		}
		return true, err
	}
	return true, c.own(process, func() error { return nil })
}

// launchPause starts the process and has it join its cgroups when these have their limits.
func (c *Container) launchPause(p stage.Pause, order *stage.Order, cg cgroups.Manager, limits *cgroups.Resources) (initProcess, error) {
	paths := maps.Clone(c.rec.CgroupPaths)
	var birth *os.File
	if !c.joins() {
		paths = nil // podmon moves it, or systemd does
	} else if dir := paths[""]; dir != "" {
		delete(paths, "")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
		f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return nil, fmt.Errorf("open cgroup: %w", err)
		}
		defer f.Close()
		birth = f
	}
	started, err := p.Start(order, birth)
	if err != nil {
		return nil, err
	}
	process, pid := child{started}, -1
	if paths == nil {
		pid = started.Pid
	}
	// Beside the first steps of the process.
	if err := cg.Apply(pid); err != nil {
		return process, fmt.Errorf("make cgroups: %w", err)
	}
	if err := cg.Set(limits); err != nil {
		return process, fmt.Errorf("set limits: %w", err)
	}
	if err := order.Send(paths, paths != nil); err != nil && !errors.Is(err, unix.EPIPE) {
		return process, err
	}
	return process, nil // a process that has ended has said why
}

// child is a process that podmon has started itself.
type child struct{ *os.Process }

func (c child) Pid() (int, error) { return c.Process.Pid, nil }

// pauseOf takes from a spec what isPause has allowed in it.
func pauseOf(spec *specs.Spec) stage.Pause {
	p := stage.Pause{
		Root: spec.Root.Path, Program: spec.Process.Args[0], Env: spec.Process.Env[0], Hostname: spec.Hostname,
		UID: spec.Process.User.UID, GID: spec.Process.User.GID, Groups: spec.Process.User.AdditionalGids,
		Filter: spec.Linux.Seccomp != nil,
	}
	for _, ns := range spec.Linux.Namespaces {
		switch {
		case ns.Type == specs.PIDNamespace:
			p.Own |= unix.CLONE_NEWPID
		case ns.Type == specs.NetworkNamespace && ns.Path != "":
			p.Net = ns.Path
		case ns.Type == specs.IPCNamespace && ns.Path != "":
			p.IPC = ns.Path
		case ns.Type == specs.UTSNamespace && ns.Path != "":
			p.UTS = ns.Path
		default:
			p.Own |= joinable[ns.Type]
		}
	}
	return p
}
