package stage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"

	"golang.org/x/sys/unix"
)

// Program describes what a process becomes, as libcontainer would make it. The zero value of
// what a kernel may lack (labels, a keyring, a filter) leaves it out.
type Program struct {
	Args []string // looked up in the PATH of Env
	Env  []string // each of the form NAME=VALUE
	Cwd  string

	UID, GID   uint32
	Groups     []uint32
	Rlimits    []Rlimit
	NoNewPrivs bool
	// Capabilities are sets of bits, 1 << CAP_*.
	Bounding, Effective, Permitted, Inheritable, Ambient uint64

	Keyring           string // the session keyring's name
	AppArmor, SELinux string // profile and label of the program
	Filter            []unix.SockFilter
	FilterFlags       uint32 // SECCOMP_FILTER_FLAG_*
}

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

// Rlimit is one of setrlimit(2).
type Rlimit struct{ Resource, Soft, Hard uint64 }

// pieces are what a request is sent in, bytes: a message must fit the socket's buffer.
const pieces = 32 << 10

// largest is exec.c's buffer.
const largest = 16 << 20

// request is what exec.c's struct of this name holds.
type request struct {
	Size, Namespaces, UID, GID                           uint32
	OOMScoreAdj                                          int32
	NoNewPrivs, FilterFlags                              uint32
	Rlimits, Instructions, Groups, Args, Env             uint32
	Bounding, Effective, Permitted, Inheritable, Ambient uint64
}

func (e *Program) encode(namespaces uintptr, oomScoreAdj int) ([]byte, error) {
	r := request{
		Namespaces: uint32(namespaces), UID: e.UID, GID: e.GID, OOMScoreAdj: int32(oomScoreAdj),
		FilterFlags: e.FilterFlags, Rlimits: uint32(len(e.Rlimits)), Instructions: uint32(len(e.Filter)),
		Groups: uint32(len(e.Groups)), Args: uint32(len(e.Args)), Env: uint32(len(e.Env)),
		Bounding: e.Bounding, Effective: e.Effective, Permitted: e.Permitted, Inheritable: e.Inheritable, Ambient: e.Ambient,
	}
	if e.NoNewPrivs {
		r.NoNewPrivs = 1
	}
	var rest bytes.Buffer
	for _, part := range []any{e.Rlimits, e.Filter, e.Groups} {
		if err := binary.Write(&rest, binary.NativeEndian, part); err != nil {
			return nil, err
		}
	}
	for _, list := range [][]string{{e.Cwd, e.Keyring, e.AppArmor, e.SELinux}, e.Args, e.Env} {
		for _, text := range list {
			if bytes.IndexByte([]byte(text), 0) >= 0 {
				return nil, errors.New("a string holds a NUL byte")
			}
			rest.WriteString(text)
			rest.WriteByte(0)
		}
	}
	size := binary.Size(r) + rest.Len()
	if size > largest {
		return nil, fmt.Errorf("arguments and environment: %w", unix.E2BIG)
	}
	r.Size = uint32(size)
	whole := bytes.NewBuffer(make([]byte, 0, size))
	if err := binary.Write(whole, binary.NativeEndian, r); err != nil {
		return nil, err
	}
	whole.Write(rest.Bytes())
	return whole.Bytes(), nil
}

// Start starts it in the cgroups, as Send has them. It returns the first process, which ends
// when the one that Order.Started tells of is there.
func (e *Exec) Start(o *Order, cgroups map[string]string, instead string) (*os.Process, error) {
	text, err := e.encode(e.Namespaces, e.OOMScoreAdj)
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{
		Path: "/proc/self/exe", Args: []string{"podmon", "exec"}, Env: []string{}, ExtraFiles: []*os.File{o.theirs, e.Init},
		SysProcAttr: &syscall.SysProcAttr{},
	}
	// A nil file in one of these would not be nil.
	if e.Stdin != nil {
		cmd.Stdin = e.Stdin
	}
	if e.Stdout != nil {
		cmd.Stdout = e.Stdout
	}
	if e.Stderr != nil {
		cmd.Stderr = e.Stderr
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	o.theirs.Close() // so that its end is seen
	err = o.sendRequest(text)
	if err == nil {
		err = o.Send(cgroups, instead, true)
	}
	if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		_ = cmd.Process.Kill()
		_, _ = cmd.Process.Wait()
		return nil, err
	}
	return cmd.Process, nil // else it has ended, and Started says why
}

func (o *Order) sendRequest(text []byte) error {
	for len(text) > 0 {
		n := min(len(text), pieces)
		if _, err := o.ours.Write(text[:n]); err != nil {
			return err
		}
		text = text[n:]
	}
	return nil
}
