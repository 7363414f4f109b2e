package stage

import (
	"os"
)

// Start is the last part of the start of a container's PID 1: libcontainer executes "podmon
// start" there as if that were the container's program, and podmon that one. So a filter can
// be installed that is compiled already.
type Start struct {
	Program
	order *Order
	text  []byte
}

// NewStart makes ready what the process waits for.
func NewStart(p Program) (*Start, error) {
	text, err := p.encode(0, 0)
	if err != nil {
		return nil, err
	}
	order, err := NewOrder()
	return &Start{Program: p, order: order, text: text}, err
}

// Args are those that libcontainer executes.
func (s *Start) Args() []string { return []string{"/proc/self/fd/4", "start"} }

// Files are the extra files that the process must be given: the order of cgroups, or any
// file, this program's executable, and /proc of the host, or any file when it is not needed
// for a label.
func (s *Start) Files(cgroups, executable, proc *os.File) []*os.File {
	return []*os.File{cgroups, executable, s.order.theirs, proc}
}

// Execute has the process of the PID execute its program, once libcontainer has let it go on, and
// returns when it has, or with what kept it from that.
func (s *Start) Execute(pid int) error {
	s.order.theirs.Close() // so that its end is seen
	if err := s.order.sendRequest(s.text); err != nil {
		return s.order.why(err)
	}
	_, err := s.order.Started(pid)
	return err
}

// Close ends a process that waits.
func (s *Start) Close() { s.order.Close() }
