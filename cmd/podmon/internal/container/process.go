package container

import (
	"fmt"
	"strings"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// newProcess is the OCI process as libcontainer wants it.
func newProcess(p *specs.Process) (*libcontainer.Process, error) {
	if p == nil || len(p.Args) == 0 {
		return nil, wire.Errorf(wire.ClassInvalid, "process has no args")
	}
	if !strings.HasPrefix(p.Cwd, "/") {
		return nil, wire.Errorf(wire.ClassInvalid, "process cwd %q is not absolute", p.Cwd)
	}
	lp := &libcontainer.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd,
		UID: int(p.User.UID), GID: int(p.User.GID),
		Label: p.SelinuxLabel, AppArmorProfile: p.ApparmorProfile,
		NoNewPrivileges: &p.NoNewPrivileges,
		Scheduler:       p.Scheduler, IOPriority: p.IOPriority,
		LogLevel: "4", // logrus.InfoLevel
	}
	for _, gid := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(gid))
	}
	if size := p.ConsoleSize; size != nil {
		lp.ConsoleWidth, lp.ConsoleHeight = uint16(size.Width), uint16(size.Height)
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Permitted: c.Permitted,
			Inheritable: c.Inheritable, Ambient: c.Ambient,
		}
	}
	var err error
	if lp.Rlimits, err = rlimits(p.Rlimits); err != nil {
		return nil, err
	}
	if lp.CPUAffinity, err = configs.ConvertCPUAffinity(p.ExecCPUAffinity); err != nil {
		return nil, wire.Errorf(wire.ClassInvalid, "cpu affinity: %w", err)
	}
	return lp, nil
}

// rlimitNumbers are the kernel's; see getrlimit(2).
var rlimitNumbers = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK, "RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE,
	"RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO, "RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}

func rlimits(in []specs.POSIXRlimit) ([]configs.Rlimit, error) {
	var out []configs.Rlimit
	for _, r := range in {
		n, ok := rlimitNumbers[r.Type]
		if !ok {
			return nil, wire.Errorf(wire.ClassInvalid, "unknown rlimit %q", r.Type)
		}
		out = append(out, configs.Rlimit{Type: n, Soft: r.Soft, Hard: r.Hard})
	}
	return out, nil
}

// classify gives runc's start errors, which are text from the other side of a
// pipe, the class that callers decide by. Known errors are those of a helper that
// got as far as looking for the program, and was waited for.
func classify(attempt string, err error) (_ error, known bool) {
	text := err.Error()
	class := ""
	isExec := strings.Contains(text, "exec: \"") || strings.Contains(text, "exec /")
	switch {
	case strings.Contains(text, "executable file not found"),
		isExec && strings.Contains(text, "no such file or directory"):
		class = wire.ClassNoExecutable
	case isExec && (strings.Contains(text, "permission denied") || strings.Contains(text, "is a directory") ||
		strings.Contains(text, "exec format error")):
		class = wire.ClassNotExecutable
	}
	if class == "" {
		return fmt.Errorf("%s: %w", attempt, err), false
	}
	return wire.Errorf(class, "%s: %w", attempt, err), true
}
