package spec

import (
	"slices"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// ForExec describes a process that joins a container: it has the user, groups,
// environment, working directory, capabilities, limits and labels of the
// container's own process. With tty it has a terminal and TERM, which is
// xterm unless the container has set it. The result shares no memory that
// either side changes.
func ForExec(own *specs.Process, cmd []string, tty bool) *specs.Process {
	p := *own
	p.Args = slices.Clone(cmd)
	p.Env = slices.Clone(p.Env)
	p.Terminal = tty
	p.ConsoleSize = nil
	if tty && !hasEnv(p.Env, "TERM") {
		p.Env = append(p.Env, "TERM=xterm")
	}
	return &p
}
