package stage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

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

// Rlimit is one of setrlimit(2).
type Rlimit struct{ Resource, Soft, Hard uint64 }

// pieces are what a request is sent in, bytes: a message must fit the socket's buffer.
const pieces = 32 << 10

// largest is program.c's buffer.
const largest = 16 << 20

// request is what program.h's struct of this name holds.
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
	if err := putStrings(&rest, slices.Concat([]string{e.Cwd, e.Keyring, e.AppArmor, e.SELinux}, e.Args, e.Env)); err != nil {
		return nil, err
	}
	return join(&r, &r.Size, rest.Bytes())
}

// putStrings writes strings as C has them.
func putStrings(to *bytes.Buffer, list []string) error {
	for _, text := range list {
		if strings.IndexByte(text, 0) >= 0 {
			return errors.New("a string holds a NUL byte")
		}
		to.WriteString(text)
		to.WriteByte(0)
	}
	return nil
}

// join is a request of a head, in which size is that of all, and a rest.
func join(head any, size *uint32, rest []byte) ([]byte, error) {
	n := binary.Size(head) + len(rest)
	if n > largest {
		return nil, fmt.Errorf("arguments and environment: %w", unix.E2BIG)
	}
	*size = uint32(n)
	whole := bytes.NewBuffer(make([]byte, 0, n))
	if err := binary.Write(whole, binary.NativeEndian, head); err != nil {
		return nil, err
	}
	whole.Write(rest)
	return whole.Bytes(), nil
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
