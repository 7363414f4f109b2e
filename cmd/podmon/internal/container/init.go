package container

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/moby/sys/userns"
	"github.com/opencontainers/cgroups"
	devices "github.com/opencontainers/cgroups/devices/config"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/stage"
)

// plainInit is a PID 1 that podmon starts by itself.
type plainInit struct {
	*stage.Container
	// view is the mount of cgroup v1, and at where in Steps the hierarchies go; the cgroups
	// are not known before libcontainer has made the container.
	view *configs.Mount
	at   int
}

// plainInit describes the container's PID 1 for startPlainInit, as libcontainer would make it
// from the same; nil when something is asked for that only libcontainer does. What is not valid
// is left to it, too, to refuse.
func (c *Container) plainInit(config *configs.Config, p *libcontainer.Process) *plainInit {
	if p.ConsoleSocket != nil || p.Scheduler != nil || config.Scheduler != nil || p.IOPriority != nil || config.IOPriority != nil ||
		p.CPUAffinity != nil || config.Personality != nil || config.MemoryPolicy != nil || config.IntelRdt != nil ||
		config.Umask != nil || config.RootlessEUID || config.RootlessCgroups || config.OomScoreAdj == nil ||
		config.NoPivotRoot || config.ParentDeathSignal != 0 || config.Hostname != "" || config.Domainname != "" ||
		config.MountLabel != "" || config.ProcessLabel != "" || p.Label != "" ||
		len(config.Sysctl)+len(config.Hooks)+len(config.Networks)+len(config.Routes)+len(config.NetDevices)+len(config.TimeOffsets) > 0 ||
		config.RootPropagation&^(unix.MS_PRIVATE|unix.MS_REC) != 0 || !plainKernel() {
		return nil
	}
	program := c.programOf(p, config)
	if program == nil {
		return nil
	}
	s := &plainInit{Container: &stage.Container{
		Program: *program, Root: config.Rootfs, OOMScoreAdj: *config.OomScoreAdj,
		ReadonlyRoot: config.Readonlyfs, Readonly: config.ReadonlyPaths, Masked: config.MaskPaths,
	}}
	own := false
	for _, ns := range config.Namespaces {
		switch {
		case ns.Type == configs.NEWPID && ns.Path == "":
			s.Own |= unix.CLONE_NEWPID
			own = true
		case ns.Type == configs.NEWNS && ns.Path == "": // in any case
		case ns.Type == configs.NEWNET && ns.Path != "":
			s.Net = ns.Path
		case ns.Type == configs.NEWIPC && ns.Path != "":
			s.IPC = ns.Path
		case ns.Type == configs.NEWUTS && ns.Path != "":
			s.UTS = ns.Path
		case ns.Path == "" && (ns.Type == configs.NEWIPC || ns.Type == configs.NEWUTS || ns.Type == configs.NEWCGROUP):
			s.Own |= namespaceFlags[ns.Type]
		default:
			return nil
		}
	}
	// In a PID namespace with others, one of these might look into it before its program runs.
	if !own || !c.addMounts(s, config) {
		return nil
	}
	if s.OwnDev && !addDevices(s.Container, config.Devices) {
		return nil
	}
	return s
}

// plainKernel tells whether all that stage.Container needs can be done: not before Linux 5.14,
// nor in a user namespace, where other rules hold for mounts, or under a seccomp filter around
// podmon that does not know the calls.
var plainKernel = sync.OnceValue(func() bool {
	err := errors.New("podmon is in a user namespace")
	if !userns.RunningInUserNS() {
		err = tryMounts()
	}
	if err != nil {
		logrus.WithError(err).Warn("libcontainer starts all containers")
	}
	return err == nil
})

func tryMounts() error {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("fsopen", err)
	}
	defer unix.Close(fs)
	if err := errors.Join(unix.FsconfigSetString(fs, "source", "tmpfs"), unix.FsconfigCreate(fs)); err != nil {
		return os.NewSyscallError("fsconfig", err)
	}
	top, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("fsmount", err)
	}
	defer unix.Close(top)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY, Attr_clr: unix.MOUNT_ATTR_NOSYMFOLLOW}
	if err := unix.MountSetattr(top, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return os.NewSyscallError("mount_setattr", err)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("open_tree", err)
	}
	unix.Close(fd)
	_, err = stage.Empty()
	return err
}

// addMounts is false for mounts that only libcontainer makes: those that go on from one side to
// the other, which must not miss what comes while they are not attached yet; id-mapped ones;
// /proc or /sys in an unusual place.
func (c *Container) addMounts(s *plainInit, config *configs.Config) bool {
	if len(config.Mounts) == 0 || path.Clean("/"+config.Mounts[0].Destination) != "/proc" || config.Mounts[0].Device != "proc" {
		return false // what comes before it could be below it
	}
	s.OwnDev = true // as libcontainer has it, also where nothing is mounted there
	for i, m := range config.Mounts {
		dest := path.Clean("/" + m.Destination)
		if dest == "/" || within(dest, "/proc") && i > 0 || m.IsIDMapped() || m.Extensions != 0 || len(m.Destination) >= unix.PathMax {
			return false
		}
		switch m.Device {
		case "bind":
			bind, ok := bindOf(dest, m)
			if !ok {
				return false
			}
			s.Steps = append(s.Steps, bind)
			s.OwnDev = s.OwnDev && dest != "/dev"
		case "proc", "sysfs":
			if dest != "/proc" && dest != "/sys" {
				return false
			}
			fallthrough
		case "tmpfs", "devpts", "mqueue":
			fs, ok := fileSystemOf(dest, m)
			if !ok {
				return false
			}
			s.Steps = append(s.Steps, fs)
		case "cgroup":
			if !c.addCgroups(s, dest, m, config) {
				return false
			}
		default:
			return false
		}
	}
	return true
}

const (
	atimeFlags = unix.MS_NOATIME | unix.MS_RELATIME | unix.MS_STRICTATIME | unix.MS_NODIRATIME
	// plainFlags are those of mount(2) that attributes can say.
	plainFlags = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOSYMFOLLOW | atimeFlags
)

// attributesOf are flags of mount(2) as those of mount_setattr(2).
func attributesOf(flags int) (set uint64) {
	for flag, attribute := range map[int]uint64{
		unix.MS_RDONLY: unix.MOUNT_ATTR_RDONLY, unix.MS_NOSUID: unix.MOUNT_ATTR_NOSUID, unix.MS_NODEV: unix.MOUNT_ATTR_NODEV,
		unix.MS_NOEXEC: unix.MOUNT_ATTR_NOEXEC, unix.MS_NOSYMFOLLOW: unix.MOUNT_ATTR_NOSYMFOLLOW,
		unix.MS_NODIRATIME: unix.MOUNT_ATTR_NODIRATIME,
	} {
		if flags&flag != 0 {
			set |= attribute
		}
	}
	switch { // path_mount in fs/namespace.c
	case flags&unix.MS_STRICTATIME != 0:
		set |= unix.MOUNT_ATTR_STRICTATIME
	case flags&unix.MS_NOATIME != 0:
		set |= unix.MOUNT_ATTR_NOATIME
	}
	return set
}

// bindOf is a bind mount with the flags that libcontainer's second mount(2) for it, a remount,
// would leave it with: those that are asked for and no others, if any are.
func bindOf(dest string, m *configs.Mount) (stage.Step, bool) {
	private := slices.ContainsFunc(m.PropagationFlags, func(f int) bool { return f == unix.MS_PRIVATE|unix.MS_REC }) && len(m.PropagationFlags) == 1
	asked := m.Flags &^ (unix.MS_BIND | unix.MS_REC)
	if !private || asked&^plainFlags != 0 || m.RecAttr != nil && (m.RecAttr.Propagation != 0 || m.RecAttr.Userns_fd != 0) {
		return stage.Step{}, false
	}
	var top, all stage.Attributes
	if asked != 0 || m.ClearedFlags != 0 {
		top.Set = attributesOf(asked)
		top.Clear = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC | unix.MOUNT_ATTR_NOSYMFOLLOW
		if asked&atimeFlags != 0 { // else they stay
			top.Clear |= unix.MOUNT_ATTR__ATIME | unix.MOUNT_ATTR_NODIRATIME
		}
	}
	if m.RecAttr != nil {
		all = stage.Attributes{Set: m.RecAttr.Attr_set, Clear: m.RecAttr.Attr_clr}
	}
	return stage.Bind(dest, m.Source, m.Flags&unix.MS_REC != 0, top, all), true
}

// fileSystemOf is a mount of a file system of its own.
func fileSystemOf(dest string, m *configs.Mount) (stage.Step, bool) {
	readonly := m.Flags&unix.MS_RDONLY != 0
	if m.Flags&^plainFlags != 0 || len(m.PropagationFlags) > 0 || m.RecAttr != nil || readonly && (m.Device == "tmpfs" || dest == "/dev") ||
		strings.Contains(m.Data, "mpol=") || // it has commas of its own
		m.Device == "tmpfs" && !strings.Contains(","+m.Data, ",mode=") { // else it has that of what it hides
		return stage.Step{}, false
	}
	var data []string
	for option := range strings.SplitSeq(m.Data, ",") {
		if option != "" {
			data = append(data, option)
		}
	}
	if readonly { // mount(2) makes the file system so as well
		data = append(data, "ro")
	}
	return stage.Mount(dest, m.Source, m.Device, data, attributesOf(m.Flags)), true
}

// addCgroups mounts the container's cgroup: on v1 a tmpfs with one mount for each hierarchy.
func (c *Container) addCgroups(s *plainInit, dest string, m *configs.Mount, config *configs.Config) bool {
	if cgroups.IsCgroup2UnifiedMode() {
		as := *m
		as.Device = "cgroup2"
		fs, ok := fileSystemOf(dest, &as)
		s.Steps = append(s.Steps, fs)
		return ok
	}
	if !c.joins() || config.Namespaces.Contains(configs.NEWCGROUP) || len(m.PropagationFlags) > 0 || m.RecAttr != nil ||
		m.Flags&viewFlags != viewFlags || m.Flags&^plainFlags != 0 || s.view != nil || len(hierarchies()) == 0 {
		return false
	}
	s.Steps = append(s.Steps, stage.Mount(dest, "tmpfs", "tmpfs", []string{"mode=755"}, attributesOf(viewFlags)))
	s.view, s.at = m, len(s.Steps)
	return true
}

const viewFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// addHierarchies fills the tmpfs of addCgroups. paths are keyed as cgroups.Manager has them.
func (s *plainInit) addHierarchies(paths map[string]string) error {
	if s.view == nil {
		return nil
	}
	own, err := cgroups.ParseCgroupFile("/proc/self/cgroup") // where it has none, it is in podmon's
	if err != nil {
		return err
	}
	top := stage.Attributes{Set: attributesOf(s.view.Flags)}
	if s.view.Flags&atimeFlags != 0 {
		top.Clear = unix.MOUNT_ATTR__ATIME | unix.MOUNT_ATTR_NODIRATIME
	}
	dest := path.Clean("/" + s.view.Destination)
	var binds, links []stage.Step
	for _, h := range hierarchies() {
		dir, err := h.directory(paths, own)
		if err != nil {
			return err
		}
		name := filepath.Base(h.Mountpoint)
		binds = append(binds, stage.Bind(path.Join(dest, name), dir, false, top, stage.Attributes{}))
		if strings.Contains(name, ",") {
			for alias := range strings.SplitSeq(name, ",") {
				links = append(links, stage.Link(path.Join(dest, alias), name, false))
			}
		}
	}
	s.Steps = slices.Insert(s.Steps, s.at, append(binds, links...)...)
	return nil
}

// addDevices makes what every container has in its /dev, and its devices.
func addDevices(s *stage.Container, list []*devices.Device) bool {
	kinds := map[devices.Type]uint32{devices.BlockDevice: unix.S_IFBLK, devices.CharDevice: unix.S_IFCHR, devices.FifoDevice: unix.S_IFIFO}
	for _, d := range list {
		kind, known := kinds[d.Type]
		number, err := d.Mkdev()
		if !known || err != nil {
			return false
		}
		if at := path.Clean("/" + d.Path); d.Path != "" && at != "/dev/ptmx" {
			s.Steps = append(s.Steps, stage.Node(at, uint32(d.FileMode)|kind, d.Uid, d.Gid, number))
		}
	}
	s.Steps = append(s.Steps,
		stage.Link("/dev/ptmx", "pts/ptmx", true),
		stage.Link("/dev/fd", "/proc/self/fd", false),
		stage.Link("/dev/stdin", "/proc/self/fd/0", false),
		stage.Link("/dev/stdout", "/proc/self/fd/1", false),
		stage.Link("/dev/stderr", "/proc/self/fd/2", false))
	if _, err := os.Stat("/proc/kcore"); err == nil {
		s.Steps = append(s.Steps, stage.Link("/dev/core", "/proc/kcore", false))
	}
	return true
}

// giveStdio gives it what is libcontainer's process's.
func (s *plainInit) giveStdio(p *libcontainer.Process) {
	s.Stdin, _ = p.Stdin.(*os.File)
	s.Stdout, _ = p.Stdout.(*os.File)
	s.Stderr, _ = p.Stderr.(*os.File)
}

// startPlainInit starts the container's PID 1 without libcontainer, which would start Go for it,
// have that read all of the configuration, and defend each mount against what paths may lead to
// by looking at what it has mounted. It has made the container, and gets the state it would
// have written: to it, and to any podmon that comes after, this is a container like others.
func (c *Container) startPlainInit(s *plainInit, settings *cgroups.Cgroup) (initProcess, error) {
	if err := s.addHierarchies(c.rec.CgroupPaths); err != nil {
		return nil, err
	}
	order, err := stage.NewOrder()
	if err != nil {
		return nil, err
	}
	defer order.Close()
	process, err := c.launch(func(cgroup *os.File) (*os.Process, error) { return s.Start(order, cgroup) })
	if err != nil {
		return nil, err
	}
	if err = s.Request(order); err == nil {
		err = c.awaitInit(process, order, settings, [3]*os.File{s.Stdin, s.Stdout, s.Stderr})
	}
	if err == nil {
		c.executed.Store(true)
		return process, nil
	}
	_ = process.Signal(unix.SIGKILL) // of no matter to one that has ended
	state, _ := process.Wait()
	c.terminate(process)
	if errors.Is(err, stage.ErrLeft) {
		return nil, err
	}
	// As libcontainer says it.
	err = fmt.Errorf("unable to start container process: error during container init: %w", killedEarly(err, state))
	return nil, c.blameOOM(err)
}

// awaitInit returns when the process has executed its program, under the container's limits.
func (c *Container) awaitInit(process child, order *stage.Order, settings *cgroups.Cgroup, stdio [3]*os.File) error {
	cg, paths, err := c.makeCgroupsFor(process, order, settings)
	if err != nil {
		return err
	}
	if err := order.Send(paths, "", true); err != nil && !stage.Ended(err) {
		return err // else it has ended, and has said why
	}
	// Beside the process's work.
	if err := c.tellLibcontainer(process.Process.Pid, stdio); err != nil {
		return errors.Join(order.Said(), err)
	}
	if err := order.Ready(); err != nil {
		return err
	}
	if err := cg.Set(settings.Resources); err != nil {
		return fmt.Errorf("set limits: %w", err)
	}
	if err := order.Proceed(); err != nil {
		return err
	}
	_, err = order.Started(process.Process.Pid)
	return err
}
