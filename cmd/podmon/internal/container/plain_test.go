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

func bound(dest string) *configs.Mount {
	return &configs.Mount{Destination: dest, Device: "bind", Flags: unix.MS_BIND | unix.MS_REC, PropagationFlags: []int{unix.MS_PRIVATE | unix.MS_REC}}
}

// What only libcontainer does is left to it, and nothing else.
func TestLeftToLibcontainer(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if !plainKernel() {
		t.Fatal("all is left to libcontainer: the kernel is older than 5.14, or does not let this process mount")
	}
	rootfs := t.TempDir()
	if err := os.Symlink("volume/deep", filepath.Join(rootfs, "link")); err != nil {
		t.Fatal(err)
	}
	type edit func(*libcontainer.Process, *configs.Config)
	for name, c := range map[string]struct {
		edit edit
		// By podmon: an exec, all of a start, and the last part of one.
		exec, init, start bool
	}{
		"as it is":              {func(*libcontainer.Process, *configs.Config) {}, true, true, true},
		"no HOME":               {func(p *libcontainer.Process, _ *configs.Config) { p.Env = []string{"PATH=/bin"} }, false, false, false},
		"an empty HOME":         {func(p *libcontainer.Process, _ *configs.Config) { p.Env = []string{"HOME=/", "HOME="} }, false, false, false},
		"no variable":           {func(p *libcontainer.Process, _ *configs.Config) { p.Env = append(p.Env, "novariable") }, false, false, false},
		"no directory":          {func(p *libcontainer.Process, _ *configs.Config) { p.Cwd = "" }, false, false, false},
		"a terminal":            {func(p *libcontainer.Process, _ *configs.Config) { p.ConsoleSocket = os.Stdin }, false, false, true},
		"a scheduler":           {func(p *libcontainer.Process, _ *configs.Config) { p.Scheduler = &configs.Scheduler{} }, false, false, true},
		"an I/O priority":       {func(_ *libcontainer.Process, c *configs.Config) { c.IOPriority = &configs.IOPriority{} }, false, false, true},
		"CPU affinity":          {func(p *libcontainer.Process, _ *configs.Config) { p.CPUAffinity = &configs.CPUAffinity{} }, false, false, true},
		"a personality":         {func(_ *libcontainer.Process, c *configs.Config) { c.Personality = &configs.LinuxPersonality{} }, false, false, true},
		"a memory policy":       {func(_ *libcontainer.Process, c *configs.Config) { c.MemoryPolicy = &configs.LinuxMemoryPolicy{} }, false, false, true},
		"a class of RDT":        {func(_ *libcontainer.Process, c *configs.Config) { c.IntelRdt = &configs.IntelRdt{} }, false, false, true},
		"a umask":               {func(_ *libcontainer.Process, c *configs.Config) { c.Umask = new(uint32) }, false, false, true},
		"no capabilities known": {func(p *libcontainer.Process, c *configs.Config) { p.Capabilities, c.Capabilities = nil, nil }, false, false, false},
		"a user namespace": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Namespaces = append(c.Namespaces, configs.Namespace{Type: configs.NEWUSER})
		}, false, false, false},
		"a time namespace": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Namespaces = append(c.Namespaces, configs.Namespace{Type: configs.NEWTIME})
		}, false, false, true},
		"no mount namespace": {func(_ *libcontainer.Process, c *configs.Config) { c.Namespaces = c.Namespaces[1:] }, false, true, true},
		"no filter":          {func(_ *libcontainer.Process, c *configs.Config) { c.Seccomp = nil }, true, true, false},
		"a SELinux label":    {func(_ *libcontainer.Process, c *configs.Config) { c.ProcessLabel = "a:b:c" }, true, false, false},
		"an AppArmor profile": {func(_ *libcontainer.Process, c *configs.Config) {
			c.AppArmorProfile = "one"
		}, true, true, true},
		"a hook": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Hooks = configs.Hooks{configs.StartContainer: configs.HookList{configs.NewFunctionHook(func(*specs.State) error { return nil })}}
		}, true, false, false},
		"a hook of podmon's side": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Hooks = configs.Hooks{configs.CreateRuntime: configs.HookList{configs.NewFunctionHook(func(*specs.State) error { return nil })}}
		}, true, false, false},
		"no /proc": {func(_ *libcontainer.Process, c *configs.Config) { c.Mounts = c.Mounts[1:] }, true, false, false},
		"a volume on /proc": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts = append(c.Mounts, bound("/proc"))
		}, true, false, false},
		"a volume below /proc": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts = append(c.Mounts, bound("/proc/sys/../self"))
		}, true, false, false},
		"a volume on /": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts = append(c.Mounts, bound("/.."))
		}, true, false, false},
		"a directory on a volume":              {func(p *libcontainer.Process, _ *configs.Config) { p.Cwd = "/volume/own" }, true, true, false},
		"a directory that leads to a volume":   {func(p *libcontainer.Process, _ *configs.Config) { p.Cwd = "/link" }, true, true, false},
		"a directory that is called as if one": {func(p *libcontainer.Process, _ *configs.Config) { p.Cwd = "/volumes" }, true, true, true},
		"a PID namespace of others":            {func(_ *libcontainer.Process, c *configs.Config) { c.Namespaces[1].Path = "/proc/1/ns/pid" }, true, false, true},
		"the host's PID namespace":             {func(_ *libcontainer.Process, c *configs.Config) { c.Namespaces = c.Namespaces[:1] }, true, false, true},
		"a network of its own": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Namespaces = append(c.Namespaces, configs.Namespace{Type: configs.NEWNET})
		}, true, false, true},
		"namespaces of the pod": {func(_ *libcontainer.Process, c *configs.Config) {
			for _, kind := range []configs.NamespaceType{configs.NEWNET, configs.NEWIPC, configs.NEWUTS} {
				c.Namespaces = append(c.Namespaces, configs.Namespace{Type: kind, Path: "/run/x"})
			}
		}, true, true, true},
		"a host name": {func(_ *libcontainer.Process, c *configs.Config) { c.Hostname = "x" }, true, false, true},
		"a sysctl":    {func(_ *libcontainer.Process, c *configs.Config) { c.Sysctl = map[string]string{"a": "b"} }, true, false, true},
		"a volume that mounts go on to": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts[2].PropagationFlags = []int{unix.MS_SLAVE | unix.MS_REC}
		}, true, false, true},
		"a root that mounts go on to":    {func(_ *libcontainer.Process, c *configs.Config) { c.RootPropagation = unix.MS_SHARED | unix.MS_REC }, true, false, true},
		"a volume of no propagation":     {func(_ *libcontainer.Process, c *configs.Config) { c.Mounts[2].PropagationFlags = nil }, true, false, true},
		"an id-mapped volume":            {func(_ *libcontainer.Process, c *configs.Config) { c.Mounts[2].IDMapping = &configs.MountIDMapping{} }, true, false, true},
		"a volume that is mounted again": {func(_ *libcontainer.Process, c *configs.Config) { c.Mounts[2].Flags |= unix.MS_REMOUNT }, true, false, true},
		"a tmpfs with the image's mode": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts = append(c.Mounts, &configs.Mount{Destination: "/dev", Device: "tmpfs", Data: "size=1m"})
		}, true, false, true},
		"a read-only tmpfs": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts = append(c.Mounts, &configs.Mount{Destination: "/x", Device: "tmpfs", Data: "mode=755", Flags: unix.MS_RDONLY})
		}, true, false, true},
		"another file system": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts = append(c.Mounts, &configs.Mount{Destination: "/x", Device: "ext4"})
		}, true, false, true},
		"/proc last": {func(_ *libcontainer.Process, c *configs.Config) { slices.Reverse(c.Mounts) }, true, false, true},
		"/sys elsewhere": {func(_ *libcontainer.Process, c *configs.Config) {
			c.Mounts = append(c.Mounts, &configs.Mount{Destination: "/x/sys", Device: "sysfs"})
		}, true, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			yes, score, caps := true, 0, &configs.Capabilities{}
			p := &libcontainer.Process{Args: []string{"true"}, Env: []string{"HOME=/", "A=1", "A=2"}, Cwd: "/", NoNewPrivileges: &yes, Capabilities: caps}
			config := &configs.Config{
				Rootfs: rootfs, OomScoreAdj: &score, Seccomp: &configs.Seccomp{},
				Namespaces: configs.Namespaces{{Type: configs.NEWNS}, {Type: configs.NEWPID}},
				Mounts: []*configs.Mount{
					{Destination: "/proc", Device: "proc"}, bound("/etc/hosts"), bound("/volume"),
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
			if s := held.plainInit(config, p); (s != nil) != c.init {
				t.Errorf("init by podmon: %v, want %v", s != nil, c.init)
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
