package container

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/filter"
	"github.com/podshim/podshim/internal/monitor/wire"
)

// What only libcontainer does is left to it, and nothing else.
func TestLeftToLibcontainer(t *testing.T) {
	rootfs := t.TempDir()
	if err := os.Symlink("volume/deep", filepath.Join(rootfs, "link")); err != nil {
		t.Fatal(err)
	}
	type edit func(*libcontainer.Process, *configs.Config)
	for name, c := range map[string]struct {
		edit        edit
		exec, start bool // by podmon
	}{
		"as it is":              {func(*libcontainer.Process, *configs.Config) {}, true, true},
		"no HOME":               {func(p *libcontainer.Process, _ *configs.Config) { p.Env = []string{"PATH=/bin"} }, false, false},
		"an empty HOME":         {func(p *libcontainer.Process, _ *configs.Config) { p.Env = []string{"HOME=/", "HOME="} }, false, false},
		"no variable":           {func(p *libcontainer.Process, _ *configs.Config) { p.Env = append(p.Env, "novariable") }, false, false},
		"no directory":          {func(p *libcontainer.Process, _ *configs.Config) { p.Cwd = "" }, false, false},
		"a terminal":            {func(p *libcontainer.Process, _ *configs.Config) { p.ConsoleSocket = os.Stdin }, false, true},
		"a scheduler":           {func(p *libcontainer.Process, _ *configs.Config) { p.Scheduler = &configs.Scheduler{} }, false, true},
		"an I/O priority":       {func(_ *libcontainer.Process, c *configs.Config) { c.IOPriority = &configs.IOPriority{} }, false, true},
		"CPU affinity":          {func(p *libcontainer.Process, _ *configs.Config) { p.CPUAffinity = &configs.CPUAffinity{} }, false, true},
		"a personality":         {func(_ *libcontainer.Process, c *configs.Config) { c.Personality = &configs.LinuxPersonality{} }, false, true},
		"a memory policy":       {func(_ *libcontainer.Process, c *configs.Config) { c.MemoryPolicy = &configs.LinuxMemoryPolicy{} }, false, true},
		"a class of RDT":        {func(_ *libcontainer.Process, c *configs.Config) { c.IntelRdt = &configs.IntelRdt{} }, false, true},
		"a umask":               {func(_ *libcontainer.Process, c *configs.Config) { c.Umask = new(uint32) }, false, true},
		"no capabilities known": {func(p *libcontainer.Process, c *configs.Config) { p.Capabilities, c.Capabilities = nil, nil }, false, false},
		"a user namespace": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Namespaces = append(c.Namespaces, configs.Namespace{Type: configs.NEWUSER})
		}, false, false},
		"a time namespace": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Namespaces = append(c.Namespaces, configs.Namespace{Type: configs.NEWTIME})
		}, false, true},
		"no mount namespace": {func(_ *libcontainer.Process, c *configs.Config) { c.Namespaces = c.Namespaces[1:] }, false, true},
		"no filter":          {func(_ *libcontainer.Process, c *configs.Config) { c.Seccomp = nil }, true, false},
		"a SELinux label":    {func(_ *libcontainer.Process, c *configs.Config) { c.ProcessLabel = "a:b:c" }, true, false},
		"an AppArmor profile": {func(_ *libcontainer.Process, c *configs.Config) {
			c.AppArmorProfile = "one"
		}, true, true},
		"a hook": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Hooks = configs.Hooks{configs.StartContainer: configs.HookList{configs.NewFunctionHook(func(*specs.State) error { return nil })}}
		}, true, false},
		"a hook of podmon's side": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Hooks = configs.Hooks{configs.CreateRuntime: configs.HookList{configs.NewFunctionHook(func(*specs.State) error { return nil })}}
		}, true, false},
		"no /proc": {func(_ *libcontainer.Process, c *configs.Config) { c.Mounts = c.Mounts[1:] }, true, false},
		"a volume on /proc": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts = append(c.Mounts, &configs.Mount{Destination: "/proc", Device: "bind"})
		}, true, false},
		"a volume below /proc": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts = append(c.Mounts, &configs.Mount{Destination: "/proc/sys/../self", Device: "bind"})
		}, true, false},
		"a volume on /": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts = append(c.Mounts, &configs.Mount{Destination: "/..", Device: "bind"})
		}, true, false},
		"a directory on a volume":              {func(p *libcontainer.Process, _ *configs.Config) { p.Cwd = "/volume/own" }, true, false},
		"a directory that leads to a volume":   {func(p *libcontainer.Process, _ *configs.Config) { p.Cwd = "/link" }, true, false},
		"a directory that is called as if one": {func(p *libcontainer.Process, _ *configs.Config) { p.Cwd = "/volumes" }, true, true},
	} {
		t.Run(name, func(t *testing.T) {
			yes, score, caps := true, 0, &configs.Capabilities{}
			p := &libcontainer.Process{Args: []string{"true"}, Env: []string{"HOME=/", "A=1", "A=2"}, Cwd: "/", NoNewPrivileges: &yes, Capabilities: caps}
			config := &configs.Config{
				Rootfs: rootfs, OomScoreAdj: &score, Seccomp: &configs.Seccomp{},
				Namespaces: configs.Namespaces{{Type: configs.NEWNS}, {Type: configs.NEWPID}},
				Mounts: []*configs.Mount{
					{Destination: "/proc", Device: "proc"}, {Destination: "/etc/hosts", Device: "bind"}, {Destination: "/volume", Device: "bind"},
				},
			}
			c.edit(p, config)
			held := &Container{ID: "x", m: &Manager{privileges: []string{"CAP_KILL"}}}
			held.filter.Store(&filter.Filter{Code: make([]unix.SockFilter, 1)})
			e := held.plainExec(config, p, wire.ExecRequest{})
			if (e != nil) != c.exec {
				t.Errorf("exec by podmon: %v, want %v", e != nil, c.exec)
			}
			if e != nil && (!slices.Equal(e.Env, []string{"HOME=/", "A=2"}) || (len(e.Filter) == 1) != (config.Seccomp != nil)) {
				t.Errorf("exec of %+v", e)
			}
			f, err := held.takeFilter(p, config)
			if err != nil || (f != nil) != c.start {
				t.Fatalf("start by podmon: %v, want %v: %v", f != nil, c.start, err)
			}
			if f == nil {
				return
			}
			defer f.close()
			if f.bare.Seccomp != nil || f.bare.AppArmorProfile != "" || *f.process.NoNewPrivileges || f.config != config || config.Seccomp == nil {
				t.Errorf("libcontainer starts %+v", f.bare)
			}
		})
	}
}
