package stage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/spawn"
)

// Container describes PID 1 of a container: in a PID and a mount namespace of its own and in a
// session of its own, without whatever podmon has open.
type Container struct {
	Program
	Root string // directory on the host, bound with all that is mounted below it
	// Net, IPC and UTS are namespaces to join, by path; empty is podmon's own, or the one
	// that Own has it make.
	Net, IPC, UTS string
	Own           uintptr // CLONE_NEW* flags; CLONE_NEWCGROUP is made when it has joined its cgroups
	OOMScoreAdj   int
	// Steps make the root, in their order.
	Steps        []Step
	ReadonlyRoot bool
	// OwnDev: there is a /dev/null in Steps, which standard input and output are to be.
	OwnDev bool
	// Readonly and Masked are paths that are made so where they exist.
	Readonly, Masked []string
	// Stdin, Stdout and Stderr are /dev/null where they are nil.
	Stdin, Stdout, Stderr *os.File
}

// Step is something in a container's root. Directories above it are made, and a directory or a
// file to mount on. Paths are the container's.
type Step struct {
	Path   string
	Source string   // on the host of what is bound, of a file system, or of a link
	Type   string   // of a file system
	Data   []string // its options
	kind   uint32
	// Node.
	mode, uid, gid uint32
	device         uint64
	recursive      bool
	replace        bool
	// Top are attributes of a mount, All those of what is mounted below it as well
	// (MOUNT_ATTR_*).
	Top, All Attributes
}

// Attributes are set after others are cleared.
type Attributes struct{ Set, Clear uint64 }

// The kinds of root.h.
const (
	mount uint32 = iota
	bind
	node
	link
)

// Mount mounts a file system: /proc or /sys where there is a directory of that name, any other
// also where a link leads.
func Mount(path, source, fs string, data []string, set uint64) Step {
	return Step{kind: mount, Path: path, Source: source, Type: fs, Data: data, Top: Attributes{Set: set}}
}

// Bind mounts a directory or file of the host, with what is mounted below it if recursive. No
// mount that comes later goes from one to the other.
func Bind(path, source string, recursive bool, top, all Attributes) Step {
	return Step{kind: bind, Path: path, Source: source, recursive: recursive, Top: top, All: all}
}

// Node makes a device or FIFO (S_IF*) where there is nothing.
func Node(path string, mode, uid, gid uint32, device uint64) Step {
	return Step{kind: node, Path: path, mode: mode, uid: uid, gid: gid, device: device}
}

// Link makes a symbolic link where there is nothing, or in the place of a file.
func Link(path, to string, replace bool) Step {
	return Step{kind: link, Path: path, Source: to, replace: replace}
}

// plan is what container.c's struct of this name holds, and rawStep root.h's step.
type plan struct {
	Size, Steps, Readonly, Masked         uint32
	CgroupNamespace, ReadonlyRoot, OwnDev uint32
	_                                     uint32
}

type rawStep struct {
	Kind, Options, Mode, UID, GID, Recursive, Replace uint32
	_                                                 uint32
	Device                                            uint64
	Top, All                                          Attributes
}

func (c *Container) encodePlan() ([]byte, error) {
	number := map[bool]uint32{true: 1}
	p := plan{
		Steps: uint32(len(c.Steps)), Readonly: uint32(len(c.Readonly)), Masked: uint32(len(c.Masked)),
		CgroupNamespace: number[c.Own&unix.CLONE_NEWCGROUP != 0], ReadonlyRoot: number[c.ReadonlyRoot], OwnDev: number[c.OwnDev],
	}
	var rest bytes.Buffer
	list := []string{c.Root, c.Net, c.IPC, c.UTS}
	for _, s := range c.Steps {
		raw := rawStep{
			Kind: s.kind, Options: uint32(len(s.Data)), Mode: s.mode, UID: s.uid, GID: s.gid, Device: s.device,
			Recursive: number[s.recursive], Replace: number[s.replace], Top: s.Top, All: s.All,
		}
		if err := binary.Write(&rest, binary.NativeEndian, raw); err != nil {
			return nil, err
		}
		list = append(append(list, s.Path, s.Source, s.Type), s.Data...)
	}
	if err := putStrings(&rest, append(append(list, c.Readonly...), c.Masked...)); err != nil {
		return nil, err
	}
	return join(&p, &p.Size, rest.Bytes())
}

// Start starts it. It waits for Request and the order of cgroups, and then, all set up, for
// Proceed. With a cgroup it is born there (CLONE_INTO_CGROUP).
func (c *Container) Start(o *Order, cgroup *os.File) (*os.Process, error) {
	empty, err := Empty()
	if err != nil {
		return nil, err
	}
	process, err := spawn.Process{
		Path: self, Args: []string{"podmon", "container"}, Files: []*os.File{c.Stdin, c.Stdout, c.Stderr, o.theirs, empty},
		Cgroup: cgroup, Cloneflags: c.Own &^ unix.CLONE_NEWCGROUP, Setsid: true,
	}.Start()
	if err != nil {
		return nil, err
	}
	o.theirs.Close() // so that its end is seen
	return process, nil
}

// Request tells it what it is to be. Where it has ended, Ready says why.
func (c *Container) Request(o *Order) error {
	plan, err := c.encodePlan()
	if err != nil {
		return err
	}
	program, err := c.encode(0, c.OOMScoreAdj)
	if err != nil {
		return err
	}
	for _, text := range [][]byte{plan, program} {
		if err := o.sendRequest(text); err != nil && !Ended(err) {
			return err
		}
	}
	return nil
}

// Ended tells whether an error in telling a process something is its end.
func Ended(err error) bool { return errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) }

// Ready returns when a container's process has set up everything, or with what kept it from
// that; nothing is left of it then but its cgroups.
func (o *Order) Ready() error {
	for {
		text, _, err := o.read(0)
		switch {
		case err == unix.ECONNRESET:
			// It has ended without having read its order. What it said comes next.
		case err != nil:
			return err
		case len(text) == 0:
			return ErrEnded
		case len(text) == 2:
			return nil
		case len(text) == 3:
			return ErrLeft
		case len(text) > 4:
			return errors.New(string(text))
		}
	}
}

// Proceed has it execute its program; Started tells of that.
func (o *Order) Proceed() error {
	if _, err := o.ours.Write([]byte{0}); err != nil && !Ended(err) {
		return fmt.Errorf("have the process proceed: %w", err)
	}
	return nil
}
