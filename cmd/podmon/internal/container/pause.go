package container

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
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
		len(process.User.AdditionalGids) > stage.PauseGroups || !reflect.DeepEqual(process.Capabilities, &specs.LinuxCapabilities{}) {
		return false
	}
	for _, ns := range linux.Namespaces {
		_, known := joinable[ns.Type]
		switch {
		case ns.Type == specs.NetworkNamespace && ns.Path == "": // libcontainer sets its loopback up
			return false
		case !known && (ns.Path != "" || ns.Type != specs.MountNamespace && ns.Type != specs.PIDNamespace):
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
	if !(root.Path != "" && reflect.DeepEqual(rest, specs.Spec{}) &&
		reflect.DeepEqual(process, specs.Process{}) && reflect.DeepEqual(linux, specs.Linux{})) {
		return false
	}
	if _, err := stage.Empty(); err != nil { // a seccomp profile around podmon
		logrus.WithError(err).Warn("libcontainer starts a pod's pause")
		return false
	}
	return true
}

// startPause starts the infra container of a pod without libcontainer's help. It is done
// before each pod is there, for a program of some hundred bytes that is our own: a few
// system calls (stage.Pause) instead of a start of "podmon init", which is made for
// everything that a spec may ask for. The mounts of the spec are what libcontainer needs.
//
// libcontainer has made the container, and gets the state it would have written: to it, and
// to any podmon that comes after, this is a container like others.
func (c *Container) startPause(spec *specs.Spec, config *configs.Config) error {
	order, err := stage.NewOrder()
	if err != nil {
		return err
	}
	defer order.Close()
	p := pauseOf(spec)
	p.OOMScoreAdj = *config.OomScoreAdj
	process, err := c.launch(func(cgroup *os.File) (*os.Process, error) { return p.Start(order, cgroup) })
	if err == nil {
		err = c.commandPause(process, order, config.Cgroups)
	}
	if err == nil {
		if _, err = order.Started(process.Process.Pid); err != nil {
			err = fmt.Errorf("start pause: %w", err)
		}
	}
	if err != nil {
		if process != (child{}) {
			c.terminate(process)
		}
		return c.blameOOM(err)
	}
	return c.own(process, func() error {
		its, err := identifyFile(fmt.Sprintf("/proc/%d/exe", process.Process.Pid))
		if err == nil && its != c.rec.Init {
			return nil
		}
		return c.blameOOM(fmt.Errorf("start pause: %s cannot be executed, or has ended at once", p.Program))
	})
}

// launch starts a process that is to be PID 1: on the hybrid layout in its v2 cgroup, where
// that can be. (libcontainer does without it as well.)
func (c *Container) launch(start func(cgroup *os.File) (*os.Process, error)) (child, error) {
	var started *os.Process
	birth, err := c.birthCgroup()
	if err == nil {
		started, err = start(birth)
		birth.Close()
	}
	if err != nil {
		if started, err = start(nil); err != nil {
			return child{}, err
		}
	}
	c.mu.Lock()
	c.starting = started
	c.mu.Unlock()
	return child{started}, nil
}

// birthCgroup makes the v2 cgroup that a process on v1 is to be born in.
func (c *Container) birthCgroup() (*os.File, error) {
	dir := c.rec.CgroupPaths[""]
	if !c.joins() || dir == "" {
		return nil, errors.New("none")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
}

// commandPause has the process join its cgroups when these have their limits. It is beside
// the first steps of the process, which waits then.
func (c *Container) commandPause(process child, order *stage.Order, settings *cgroups.Cgroup) error {
	cg, paths, err := c.makeCgroupsFor(process, order, settings)
	if err != nil {
		return err
	}
	if err := cg.Set(settings.Resources); err != nil {
		return errors.Join(order.Said(), fmt.Errorf("set limits: %w", err))
	}
	if err := order.Send(paths, "", true); err != nil && !stage.Ended(err) {
		return err // else it has ended, and has said why
	}
	return c.tellLibcontainer(process.Process.Pid, [3]*os.File{})
}

// makeCgroupsFor makes the cgroups of a process that has been launched, and tells which it has
// to join by itself.
func (c *Container) makeCgroupsFor(process child, order *stage.Order, settings *cgroups.Cgroup) (cgroups.Manager, map[string]string, error) {
	pid, paths := process.Process.Pid, map[string]string(nil)
	if c.joins() {
		pid, paths = -1, maps.Clone(c.rec.CgroupPaths)
		delete(paths, "") // it is there, or stays where podmon is
		inheritCpuset(paths)
	}
	cg, err := manager.NewWithPaths(settings, maps.Clone(c.rec.CgroupPaths))
	if err != nil {
		return nil, nil, fmt.Errorf("cgroup: %w", err)
	}
	if err := cg.Apply(pid); err != nil {
		return nil, nil, errors.Join(order.Said(), fmt.Errorf("make cgroups: %w", err))
	}
	return cg, paths, nil
}

// tellLibcontainer gives libcontainer the state that it would have written. stdio is that of
// the process, nil for /dev/null.
func (c *Container) tellLibcontainer(pid int, stdio [3]*os.File) error {
	state, err := c.lc.State()
	if err != nil {
		return err
	}
	init, err := wire.Identify(pid)
	if err != nil {
		return err
	}
	for _, f := range stdio {
		name := os.DevNull
		if f != nil {
			if name, err = os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err != nil {
				return err
			}
		}
		state.ExternalDescriptors = append(state.ExternalDescriptors, name)
	}
	state.InitProcessPid, state.InitProcessStartTime, state.Created = init.PID, init.StartTime, time.Now().UTC()
	for _, kind := range configs.NamespaceTypes() {
		ns := configs.Namespace{Type: kind}
		if configs.IsNamespaceSupported(kind) {
			state.NamespacePaths[kind] = ns.GetPath(pid)
		}
	}
	if err := save(filepath.Join(c.m.stateRoot(), c.ID), libState, state); err != nil {
		return err
	}
	lc, err := libcontainer.Load(c.m.stateRoot(), c.ID)
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	c.lc = lc
	return c.hideCgroups()
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
