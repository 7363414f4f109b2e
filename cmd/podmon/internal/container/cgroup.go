package container

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"

	"github.com/podshim/podshim/cmd/podmon/internal/stage"
)

// joins tells whether processes join the container's cgroups by themselves (package
// stage). Otherwise libcontainer moves them: cgroup v2 has no need, and systemd wants to
// be asked.
func (c *Container) joins() bool {
	return !c.rec.Systemd && !cgroups.IsCgroup2UnifiedMode()
}

// hideCgroups keeps libcontainer from moving processes into cgroups: its manager goes by
// the map of paths that State returns. Nothing else of libcontainer that looks at cgroups
// works then. The caller has the container for itself, or holds life for writing.
func (c *Container) hideCgroups() error {
	if !c.joins() {
		return nil
	}
	state, err := c.lc.State()
	if err != nil {
		return err
	}
	c.hidden = state.CgroupPaths
	clear(c.hidden)
	return nil
}

// showCgroups undoes hideCgroups, for Set and Destroy. It needs the same of the caller.
func (c *Container) showCgroups() {
	if c.hidden != nil {
		maps.Copy(c.hidden, c.rec.CgroupPaths)
	}
}

// run starts PID 1: in its cgroups from its first instruction on, and its program when
// these have the container's limits.
//
// With f, libcontainer has executed podmon then, and podmon executes the program.
func (c *Container) run(process *libcontainer.Process, f *filtered) error {
	config := c.lc.Config()
	if f != nil {
		config = *f.config
	} else if !c.joins() {
		return c.lc.Run(process)
	} else if hasHooks(&config) {
		if err := c.lc.Run(process); err != nil {
			return err
		}
		return c.hideCgroups()
	}
	err := c.startInit(process, config.Cgroups, f)
	if err != nil {
		return err
	}
	// The program waits for Exec: podmon's own work there is under no limit.
	if err = c.lc.Set(config); err != nil {
		err = fmt.Errorf("set limits: %w", err)
	}
	if err := errors.Join(err, c.hideCgroups()); err != nil {
		return err
	}
	if f == nil {
		return c.lc.Exec()
	}
	if err := seesProc(process); err != nil {
		return err
	}
	if err := c.lc.Exec(); err != nil {
		return err
	}
	pid, err := process.Pid()
	if err != nil {
		return err
	}
	if err := f.Execute(pid); err != nil {
		return c.blameOOM(fmt.Errorf("unable to start container process: error during container init: %w", err)) // as libcontainer says it
	}
	c.executed.Store(true)
	return nil
}

// hasHooks tells whether there are hooks that see, and may change, what libcontainer has
// set before.
func hasHooks(config *configs.Config) bool {
	return config.HasHook(configs.Prestart, configs.CreateRuntime, configs.CreateContainer, configs.Poststart)
}

// startInit starts "podmon init" as PID 1. libcontainer has no cgroup meanwhile and is
// told to make do without; afterwards it has them again.
func (c *Container) startInit(process *libcontainer.Process, settings *cgroups.Cgroup, f *filtered) error {
	if !c.joins() { // it is f that needs more steps than one
		process.ExtraFiles = f.files(c.m.executable, nil)
		return c.lc.Start(process)
	}
	wanted := *settings
	if err := c.hideCgroups(); err != nil {
		return err
	}
	order, err := stage.NewOrder()
	if err != nil {
		return err
	}
	process.ExtraFiles = []*os.File{order.File()}
	if f != nil {
		process.ExtraFiles = f.files(c.m.executable, order.File())
	}
	settings.Rootless, settings.Resources = true, &cgroups.Resources{}
	// Beside the first steps of the process, which waits for them.
	made := make(chan error, 1)
	go func() {
		err := makeCgroups(wanted, c.rec.CgroupPaths)
		if err == nil {
			err = order.Send(c.rec.CgroupPaths, "", true)
		}
		if err != nil {
			order.Cancel()
		}
		made <- err
	}()
	err = c.lc.Start(process)
	if madeErr := <-made; madeErr != nil {
		err = errors.Join(madeErr, err)
	}
	err = settle(order, process, err)
	*settings = wanted
	c.showCgroups()
	return c.blameOOM(err)
}

// blameOOM says so where a start has failed because memory is short.
func (c *Container) blameOOM(err error) error {
	if err == nil {
		return nil
	}
	if kills, counted := c.oomKills(); counted && kills > 0 {
		return fmt.Errorf("the OOM killer has ended it (pod's memory limit too low?): %w", err)
	}
	return err
}

// makeCgroups makes the cgroups and puts nothing into them.
func makeCgroups(config cgroups.Cgroup, paths map[string]string) error {
	inheritCpuset(paths)
	cg, err := manager.NewWithPaths(&config, maps.Clone(paths))
	if err == nil {
		err = cg.Apply(-1)
	}
	if err != nil {
		return fmt.Errorf("make cgroups: %w", err)
	}
	return nil
}

var inheriting sync.Mutex

// inheritCpuset makes the cgroup of v1's cpuset hierarchy, with the CPUs and memory nodes of
// its parent. The cgroups package would write them, and at each such write the kernel makes its
// scheduling domains anew, which takes the longer the more cpusets there are on the node. Where
// this does not come about, it does write.
func inheritCpuset(paths map[string]string) {
	dir, ok := paths["cpuset"]
	parent := filepath.Dir(dir)
	if !ok || cgroups.IsCgroup2UnifiedMode() || filepath.Dir(parent) == cgroupRoot { // the hierarchy's root is everybody's
		return
	}
	inheriting.Lock()
	defer inheriting.Unlock()
	const file = "cgroup.clone_children" // for those that are made while it is 1
	was, err := cgroups.ReadFile(parent, file)
	if err != nil || strings.TrimSpace(was) != "0" || cgroups.WriteFile(parent, file, "1") != nil {
		return
	}
	made := os.Mkdir(dir, 0o755)
	_ = cgroups.WriteFile(parent, file, "0")
	if made == nil {
		_ = cgroups.WriteFile(dir, file, "0")
	}
}

// startExec starts a process that is not PID 1, in the container's cgroups.
func (c *Container) startExec(process *libcontainer.Process) error {
	if !c.joins() {
		return c.lc.Run(process)
	}
	order, err := stage.NewOrder()
	if err != nil {
		return err
	}
	process.ExtraFiles = []*os.File{order.File()}
	if err := order.Send(c.rec.CgroupPaths, "", false); err != nil {
		return settle(order, process, err)
	}
	return settle(order, process, c.lc.Run(process))
}

// settle takes the result of a start, and adds to it when the process has not joined.
func settle(order *stage.Order, process *libcontainer.Process, err error) error {
	process.ExtraFiles = nil
	if moved := order.Settle(err != nil); !moved && err == nil {
		return errors.New("the process has not joined its cgroups")
	}
	return err
}
