package container

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"

	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/moby/sys/capability"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/cmd/podmon/internal/stage"
)

// filtered is the start of a container under a seccomp filter that is compiled already.
// libcontainer makes the container, as for a program that may do everything, and executes
// podmon in it, which installs the filter, gives up the rest, and executes the program
// (stage.Start). So it does in execs anyway; libcontainer would compile the filter again.
type filtered struct {
	*stage.Start
	config  *configs.Config       // the container's own
	bare    *configs.Config       // what libcontainer starts it with
	process *libcontainer.Process // and what it executes
	proc    *os.File              // nil when no label is to be set
}

// takeFilter prepares such a start; nil when there is no filter, or something that only
// libcontainer does comes after it. (A working directory on a volume may be one that only
// the container's user can enter; libcontainer does not try that for another one.)
func (c *Container) takeFilter(p *libcontainer.Process, config *configs.Config) (*filtered, error) {
	if config.Seccomp == nil || hasHooks(config) || config.HasHook(configs.StartContainer) ||
		config.Namespaces.Contains(configs.NEWUSER) || config.RootlessEUID || config.ProcessLabel != "" || p.Label != "" ||
		!hasProc(config) || onVolume(p.Cwd, config) {
		return nil, nil
	}
	program := c.programOf(p, config)
	if program == nil {
		return nil, nil
	}
	// libcontainer sets the limits from outside, with podmon's privileges, and the keyring.
	program.Rlimits, program.Keyring = nil, ""
	start, err := stage.NewStart(*program)
	if err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	f := &filtered{Start: start, config: config}
	if program.AppArmor != "" {
		if f.proc, err = os.OpenFile("/proc", unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
			start.Close()
			return nil, err
		}
	}
	bare, process, all, no := *config, *p, slices.Clone(c.m.privileges), false
	bare.Seccomp, bare.AppArmorProfile, bare.NoNewPrivileges = nil, "", false
	process.Args, process.Env = start.Args(), []string{"HOME=/"}
	process.UID, process.GID, process.AdditionalGroups = 0, 0, nil
	process.AppArmorProfile, process.NoNewPrivileges = "", &no
	process.Capabilities = &configs.Capabilities{Bounding: all, Effective: all, Permitted: all}
	f.bare, f.process = &bare, &process
	return f, nil
}

// files are the process's extra files; cgroups is nil when it gets no order of cgroups.
func (f *filtered) files(executable, cgroups *os.File) []*os.File {
	proc := f.proc
	if proc == nil {
		proc = executable
	}
	if cgroups == nil {
		cgroups = executable
	}
	return f.Files(cgroups, executable, proc)
}

func (f *filtered) close() {
	f.Start.Close()
	if f.proc != nil {
		f.proc.Close()
	}
}

// ownCapabilities are the names of those that podmon has.
func ownCapabilities() (names []string, err error) {
	own, err := capability.NewPid2(0)
	if err == nil {
		err = own.Load()
	}
	if err != nil {
		return nil, err
	}
	for name, n := range capabilityNumbers() {
		if own.Get(capability.PERMITTED, capability.Cap(n)) {
			names = append(names, name)
		}
	}
	return names, nil
}

// seesProc makes sure that what libcontainer executes by way of /proc in a container that
// is set up, and as root, is what podmon has given it: nothing else than procfs is there.
func seesProc(process initProcess) error {
	pid, err := process.Pid()
	if err != nil {
		return err
	}
	root, err := os.OpenFile(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer root.Close()
	fd, err := unix.Openat2(int(root.Fd()), "proc", &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return fmt.Errorf("look at the container's /proc: %w", err)
	}
	defer unix.Close(fd)
	var fs unix.Statfs_t
	var st unix.Stat_t
	if err := errors.Join(unix.Fstatfs(fd, &fs), unix.Fstat(fd, &st)); err != nil {
		return fmt.Errorf("look at the container's /proc: %w", err)
	}
	const rootOfProc = 1 // its inode (fs/proc, PROC_ROOT_INO)
	if fs.Type != unix.PROC_SUPER_MAGIC || st.Ino != rootOfProc {
		return errors.New("the container's /proc is something else")
	}
	return nil
}

// hasProc tells whether /proc is as podmon needs it, in the container.
func hasProc(config *configs.Config) bool {
	has := false
	for _, m := range config.Mounts {
		switch dest := path.Clean("/" + m.Destination); {
		case dest == "/proc":
			has = m.Device == "proc"
		case within(dest, "/proc"), dest == "/":
			return false
		}
	}
	return has
}

// onVolume tells whether a path leads to something mounted from the node, also by the
// image's links.
func onVolume(name string, config *configs.Config) bool {
	real, err := securejoin.SecureJoin(config.Rootfs, name)
	if err != nil {
		return true
	}
	return slices.ContainsFunc(config.Mounts, func(m *configs.Mount) bool {
		dest := path.Clean("/" + m.Destination)
		return m.Device == "bind" && (within(path.Clean("/"+name), dest) || within(real, filepath.Join(config.Rootfs, dest)))
	})
}
