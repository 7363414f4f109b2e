package stage

import (
	"os"

	"github.com/podshim/podshim/internal/spawn"
)

// self is this program.
const self = "/proc/self/exe"

// Exec describes a process of a running container: it is in a session of its own, without
// whatever podmon has open.
type Exec struct {
	Program
	// Init is a pidfd of the container's PID 1, whose namespaces it joins: those of the
	// CLONE_NEW* flags. A user namespace is not among them.
	Init        *os.File
	Namespaces  uintptr
	OOMScoreAdj int
	// Stdin, Stdout and Stderr are /dev/null where they are nil.
	Stdin, Stdout, Stderr *os.File
}

// Start starts it in the cgroups, as Send has them. It returns the first process, which ends
// when the one that Order.Started tells of is there.
func (e *Exec) Start(o *Order, cgroups map[string]string, instead string) (*os.Process, error) {
	text, err := e.encode(e.Namespaces, e.OOMScoreAdj)
	if err != nil {
		return nil, err
	}
	process, err := spawn.Process{
		Path: self, Args: []string{"podmon", "exec"}, Files: []*os.File{e.Stdin, e.Stdout, e.Stderr, o.theirs, e.Init},
	}.Start()
	if err != nil {
		return nil, err
	}
	o.theirs.Close() // so that its end is seen
	err = o.sendRequest(text)
	if err == nil {
		err = o.Send(cgroups, instead, true)
	}
	if err != nil && !Ended(err) {
		_ = process.Kill()
		_, _ = process.Wait()
		return nil, err
	}
	return process, nil // else it has ended, and Started says why
}
