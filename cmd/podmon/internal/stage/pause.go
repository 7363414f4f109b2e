package stage

import (
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/spawn"
)

// Pause describes an infra container that runs the embedded pause program: without
// capabilities, with no_new_privs and /dev/null for stdio, in a session keyring of its own,
// with nothing mounted but its root, read-only. Its mount namespace is its own.
type Pause struct {
	Root    string // directory on the host
	Program string // path in Root
	Env     string // one variable
	// Net, IPC and UTS are namespaces to join, by path; empty is podmon's own, or the one
	// that Own has it make.
	Net, IPC, UTS string
	Own           uintptr // CLONE_NEW* flags
	Hostname      string  // not set when empty
	OOMScoreAdj   int
	UID, GID      uint32
	Groups        []uint32
	// Filter leaves the process only the system calls that the program makes.
	Filter bool
}

// PauseGroups is the most supplemental groups that pause.c takes.
const PauseGroups = 64

// Start starts it. It waits, set up but for its cgroups and privileges, for the order, and
// Started tells when it has obeyed. With a cgroup it is born there (CLONE_INTO_CGROUP).
func (p Pause) Start(o *Order, cgroup *os.File) (*os.Process, error) {
	filter := ""
	if p.Filter {
		filter = "filter"
	}
	args := []string{
		"podmon", "pause", p.Program, p.Env, p.Net, p.IPC, p.UTS, p.Hostname, strconv.Itoa(p.OOMScoreAdj),
		strconv.FormatUint(uint64(p.UID), 10), strconv.FormatUint(uint64(p.GID), 10), filter,
	}
	for _, gid := range p.Groups {
		args = append(args, strconv.FormatUint(uint64(gid), 10))
	}
	empty, err := Empty()
	if err != nil {
		return nil, fmt.Errorf("start pause: %w", err)
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, p.Root, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("start pause: bind %s: %w", p.Root, err)
	}
	tree := os.NewFile(uintptr(fd), p.Root)
	defer tree.Close()
	process, err := spawn.Process{
		Path: self, Args: args, Files: []*os.File{nil, nil, nil, o.theirs, empty, tree},
		Cgroup: cgroup, Cloneflags: p.Own, Setsid: true,
	}.Start()
	if err != nil {
		return nil, fmt.Errorf("start pause: %w", err)
	}
	o.theirs.Close() // so that its end is seen
	return process, nil
}
