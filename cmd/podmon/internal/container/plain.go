package container

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"github.com/moby/sys/capability"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/filter"
	"github.com/podshim/podshim/cmd/podmon/internal/stage"
	"github.com/podshim/podshim/internal/monitor/wire"
)

// namespaceFlags are the namespaces that startPlain joins.
var namespaceFlags = map[configs.NamespaceType]uintptr{
	configs.NEWNS: unix.CLONE_NEWNS, configs.NEWPID: unix.CLONE_NEWPID, configs.NEWNET: unix.CLONE_NEWNET,
	configs.NEWIPC: unix.CLONE_NEWIPC, configs.NEWUTS: unix.CLONE_NEWUTS, configs.NEWCGROUP: unix.CLONE_NEWCGROUP,
}

// plainExec describes the process for startPlain, as libcontainer would make it from the
// same; nil when something is asked for that only libcontainer does. What is not valid is
// left to it, too, to refuse.
func (c *Container) plainExec(config *configs.Config, p *libcontainer.Process, r wire.ExecRequest) *stage.Exec {
	if !c.joins() && !cgroups.IsCgroup2UnifiedMode() || p.ConsoleSocket != nil ||
		p.Scheduler != nil || config.Scheduler != nil || p.IOPriority != nil || config.IOPriority != nil ||
		p.CPUAffinity != nil || config.ExecCPUAffinity != nil || config.Personality != nil || config.MemoryPolicy != nil ||
		config.IntelRdt != nil || config.Umask != nil || config.RootlessEUID || config.OomScoreAdj == nil {
		return nil
	}
	program := c.programOf(p, config)
	if program == nil {
		return nil
	}
	e := &stage.Exec{
		Program: *program, OOMScoreAdj: *config.OomScoreAdj,
		Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr,
	}
	for _, ns := range config.Namespaces {
		flag, known := namespaceFlags[ns.Type]
		if !known {
			return nil
		}
		e.Namespaces |= flag
	}
	if e.Namespaces&unix.CLONE_NEWNS == 0 {
		return nil
	}
	return e
}

// programOf is what a process becomes; nil when only libcontainer can do that, or say why it
// cannot be.
func (c *Container) programOf(p *libcontainer.Process, config *configs.Config) *stage.Program {
	e := &stage.Program{
		Args: p.Args, Env: environment(p.Env), Cwd: p.Cwd,
		UID: uint32(p.UID), GID: uint32(p.GID), NoNewPrivs: *p.NoNewPrivileges,
		AppArmor: cmp.Or(p.AppArmorProfile, config.AppArmorProfile), SELinux: cmp.Or(p.Label, config.ProcessLabel),
	}
	if e.Env == nil || e.Cwd == "" {
		return nil
	}
	for _, gid := range p.AdditionalGroups {
		e.Groups = append(e.Groups, uint32(gid))
	}
	limits := p.Rlimits
	if len(limits) == 0 {
		limits = config.Rlimits
	}
	for _, l := range limits {
		e.Rlimits = append(e.Rlimits, stage.Rlimit{Resource: uint64(l.Type), Soft: l.Soft, Hard: l.Hard})
	}
	caps := p.Capabilities
	if caps == nil {
		caps = config.Capabilities
	}
	if caps == nil {
		return nil
	}
	e.Bounding, e.Effective, e.Permitted = capabilityBits(caps.Bounding), capabilityBits(caps.Effective), capabilityBits(caps.Permitted)
	e.Inheritable, e.Ambient = capabilityBits(caps.Inheritable), capabilityBits(caps.Ambient)
	if !config.NoNewKeyring {
		e.Keyring = "_ses." + c.ID
	}
	if config.Seccomp != nil {
		f := c.filterOf(config.Seccomp)
		if f == nil {
			return nil
		}
		e.Filter, e.FilterFlags = f.Code, f.Flags
	}
	return e
}

// filterOf is the container's seccomp filter; nil for one that only libcontainer installs.
func (c *Container) filterOf(profile *configs.Seccomp) *filter.Filter {
	if f := c.filter.Load(); f != nil {
		return f
	}
	f, err := c.m.filters.Get(profile)
	if err != nil && !errors.Is(err, filter.ErrNotify) && c.unfiltered.CompareAndSwap(false, true) {
		c.log().WithError(err).Warn("libcontainer compiles the seccomp profile in each process")
	}
	c.filter.Store(f)
	return f
}

// environment leaves the last of each variable; nil when there is something that
// libcontainer refuses or adds to.
func environment(list []string) []string {
	last := make(map[string]int, len(list))
	for i, kv := range list {
		name, _, ok := strings.Cut(kv, "=")
		if !ok || name == "" || strings.IndexByte(kv, 0) >= 0 {
			return nil
		}
		last[name] = i
	}
	if i, ok := last["HOME"]; !ok || list[i] == "HOME=" {
		return nil
	}
	at := slices.Sorted(maps.Values(last))
	env := make([]string, len(at))
	for i, n := range at {
		env[i] = list[n]
	}
	return env
}

// capabilityNumbers are those the kernel has, by their names.
var capabilityNumbers = sync.OnceValue(func() map[string]uint {
	numbers := map[string]uint{}
	list, err := capability.ListSupported()
	if err != nil {
		list = capability.ListKnown()
	}
	for _, c := range list {
		numbers["CAP_"+strings.ToUpper(c.String())] = uint(c)
	}
	return numbers
})

// capabilityBits leaves out what the kernel does not know, as libcontainer does.
func capabilityBits(names []string) (bits uint64) {
	for _, name := range names {
		if n, ok := capabilityNumbers()[name]; ok {
			bits |= 1 << n
		}
	}
	return bits
}

// startPlain starts a process of the container without libcontainer: most execs are
// kubelet's probes, which each would wait for a start of Go and for all of the container's
// configuration to be read (stage.Exec).
func (c *Container) startPlain(ctx context.Context, e *stage.Exec) (initProcess, error) {
	if c.frozen() {
		return nil, wire.Errorf(wire.ClassPrecondition, "container %s is frozen: thaw it first", c.ID)
	}
	instead, err := c.cgroupOfInit()
	if err != nil {
		return nil, err
	}
	if e.Init, err = openPidfd(c.rec.Process); err != nil {
		return nil, err
	}
	defer e.Init.Close()
	order, err := stage.NewOrder()
	if err != nil {
		return nil, err
	}
	first, err := e.Start(order, c.rec.CgroupPaths, instead)
	if err != nil {
		order.Close()
		return nil, err
	}
	type result struct {
		process initProcess
		err     error
	}
	started := make(chan result, 1)
	end := c.m.reaper.begin() // for as long as there is somebody to wait for
	go func() {
		defer end()
		defer order.Close()
		process, err := awaitPlain(order, first)
		started <- result{process, err}
	}()
	select {
	case r := <-started:
		return r.process, r.err
	case <-ctx.Done():
	}
	// In a frozen cgroup it may not even end before that is thawed; nobody waits for it.
	order.Cancel()
	_ = first.Kill()
	go func() {
		if r := <-started; r.err == nil {
			_ = r.process.Signal(unix.SIGKILL)
			_, _ = r.process.Wait()
		}
		c.m.reaper.look()
	}()
	return nil, context.Cause(ctx)
}

// awaitPlain returns the process that has executed its program, and reaps the others.
func awaitPlain(order *stage.Order, first *os.Process) (initProcess, error) {
	born, err := order.Started(first.Pid)
	if err != nil {
		err = fmt.Errorf("unable to start container process: %w", err) // as libcontainer says it
	}
	if born.Last == first.Pid {
		state, _ := first.Wait()
		if err == nil {
			err = errors.New("exec: it is not in the container")
		}
		return nil, killedEarly(err, state)
	}
	for _, pid := range born.Before {
		p := first
		if pid != first.Pid {
			p, _ = os.FindProcess(pid)
		}
		if p != nil {
			_, _ = p.Wait()
		}
	}
	last, ferr := os.FindProcess(born.Last)
	if ferr != nil {
		return nil, fmt.Errorf("find the new process: %w", ferr)
	}
	if err != nil {
		_ = last.Kill()
		state, _ := last.Wait()
		return nil, killedEarly(err, state)
	}
	return child{last}, nil
}

// frozen tells whether the container's processes are stopped by the freezer of cgroup v1,
// where one that has joined them could not even be killed.
func (c *Container) frozen() bool {
	dir := c.rec.CgroupPaths["freezer"]
	if !c.joins() || dir == "" {
		return false
	}
	state, err := cgroups.ReadFile(dir, "freezer.state")
	return err == nil && strings.TrimSpace(state) != string(cgroups.Thawed)
}

// killedEarly says so when it was not podmon that has ended a process.
func killedEarly(err error, state *os.ProcessState) error {
	if !errors.Is(err, stage.ErrEnded) || state == nil {
		return err
	}
	if status, ok := state.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return fmt.Errorf("%w: %v (out of memory?)", err, status.Signal())
	}
	return err
}

// cgroupOfInit is where PID 1 is on cgroup v2: it may have moved to a cgroup below the
// container's, as systemd does in a container, and a cgroup with such children takes no
// process; or have left it, and it is gone.
func (c *Container) cgroupOfInit() (string, error) {
	if !cgroups.IsCgroup2UnifiedMode() {
		return "", nil
	}
	own, err := cgroups.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", c.rec.Process.PID))
	if err != nil {
		return "", fmt.Errorf("cgroup of PID 1: %w", err)
	}
	if own[""] == "" {
		return "", nil
	}
	return filepath.Join(cgroupRoot, own[""]), nil
}
