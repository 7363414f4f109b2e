// Package stage is what processes that podmon starts do first, in C and before any code of
// libcontainer or Go: all of them join their cgroups, where podmon has no better way. Most
// containers (container.c, root.c), most processes that are executed in one (exec.c) and the
// pause of a pod (pause.c) are started by it alone, and a container with a seccomp profile that
// libcontainer starts is finished by it (start.go).
//
// Joining, on cgroup v1: whoever moves another process there waits for an RCU grace period,
// 5 to 20 ms, because a write to cgroup.procs takes cgroup_threadgroup_rwsem
// (kernel/cgroup/cgroup.c, cgroup_procs_write_start). A thread that moves itself does not:
// it writes 0 to "tasks". Nor does one that is born in a cgroup of v2 (CLONE_INTO_CGROUP),
// the hierarchy without controllers that is beside v1 in the hybrid layout. So the process
// does that itself: a thread of podmon must not, since a cgroup that it is in can be frozen
// or throttled, and whoever kills what is in it would kill podmon.
//
// What the process starts from then on is in the same cgroups. When a cgroup cannot be
// joined the process ends, and its start fails with the reason.
package stage

// #cgo CFLAGS: -Wall -Werror
import "C"

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Order tells one process which cgroups to join, over a socket on which it waits for that
// (SOCK_SEQPACKET, by which join.c knows it); requests (program.go, container.go) come before
// it, and Proceed after it. The message is
//
//	1 byte   'r': it may use all CPUs of its cpuset, whatever podmon may
//	then     a letter and a path, each ended by a zero byte: 't' for the "tasks" file of a
//	         v1 cgroup, 'T' for one that it joins where it can, 'u' and 'U' for the
//	         directory of a v2 one, the same; a second 'u' is for when the first
//	         takes no process
//
// What comes from it is told by its length:
//
//	4 bytes  it has joined, and goes on as the process with this PID; as the one that
//	         podmon or libcontainer has started for -1
//	1 byte   it is about to execute the program
//	2 bytes  all of a container is set up but its limits, for which it waits (Proceed)
//	3 bytes  it ends because the container is one that only libcontainer can make
//	more     why it ends
type Order struct{ ours, theirs *os.File }

var (
	// ErrEnded is returned for a process that has said nothing of its end.
	ErrEnded = errors.New("it has ended before its time")
	// ErrLeft is returned for a container that is left to libcontainer.
	ErrLeft = errors.New("only libcontainer can start it")
)

// limit is the size of join.c's buffer.
const limit = 64 << 10

// NewOrder makes an order. Its File must be the first of the process's extra files.
func NewOrder() (*Order, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socket for the order of cgroups: %w", err)
	}
	// A process that has been killed early may have made another one that podmon must know.
	if err := unix.SetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, fmt.Errorf("socket for the order of cgroups: %w", err)
	}
	return &Order{os.NewFile(uintptr(fds[0]), "order"), os.NewFile(uintptr(fds[1]), "order")}, nil
}

// Send has the process join the cgroups, whose keys are the subsystems as cgroups.Manager
// has them. They must be there, but that of v2, when another one is given instead. It may
// be called before the process is.
func (o *Order) Send(paths map[string]string, instead string, resetAffinity bool) error {
	text := encode(paths, instead, resetAffinity)
	if len(text) >= limit {
		return errors.New("send the order of cgroups: too long")
	}
	if _, err := o.ours.Write(text); err != nil {
		return fmt.Errorf("send the order of cgroups: %w", err)
	}
	return nil
}

// Cancel ends a process that has got no order, or will be made without one.
func (o *Order) Cancel() {
	// Not by Fd: it may be closed meanwhile, and the number another's.
	if conn, err := o.ours.SyscallConn(); err == nil {
		_ = conn.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
	}
}

func encode(paths map[string]string, instead string, resetAffinity bool) []byte {
	text := bytes.NewBuffer(make([]byte, 0, 2<<10))
	text.WriteByte(map[bool]byte{true: 'r', false: '-'}[resetAffinity])
	var entries []string
	for subsystem, dir := range paths {
		switch {
		case subsystem == "":
		case subsystem == "misc" || strings.HasPrefix(subsystem, "name="):
			// The cgroups package joins these where it can.
			entries = append(entries, "T"+filepath.Join(dir, "tasks"))
		default:
			entries = append(entries, "t"+filepath.Join(dir, "tasks"))
		}
	}
	slices.Sort(entries)
	entries = slices.Compact(entries) // several subsystems may have one hierarchy
	// Last: what is born there is in all others already.
	letter := "U"
	if len(entries) == 0 {
		letter = "u"
	}
	if dir, ok := paths[""]; ok {
		entries = append(entries, letter+dir)
	}
	if instead != "" && instead != paths[""] {
		entries = append(entries, letter+instead)
	}
	for _, entry := range entries {
		text.WriteString(entry)
		text.WriteByte(0)
	}
	return text.Bytes()
}

// File is what the process has to be given.
func (o *Order) File() *os.File { return o.theirs }

// Settle is called when libcontainer has started the process, or has given up (failed). It
// reaps the first stage where libcontainer does not know of it, killed after a failure, and
// tells whether the move has been made.
func (o *Order) Settle(failed bool) (moved bool) {
	defer o.ours.Close()
	o.theirs.Close()
	var answer [4]byte
	n, _, err := unix.Recvfrom(int(o.ours.Fd()), answer[:], unix.MSG_DONTWAIT)
	if err != nil || n != len(answer) {
		return false
	}
	pid := int(int32(binary.NativeEndian.Uint32(answer[:])))
	if pid < 0 {
		return true
	}
	if failed {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	for {
		if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
			return true
		}
	}
}

// Born are the processes of an order, by their PIDs in podmon's namespace.
type Born struct {
	// Last is the one that executes the program, or is to.
	Last int
	// Before are those that it has come from, which end.
	Before []int
}

// longest is how many processes an order may make.
const longest = 2

// Started returns when the process has executed its program, or has ended, with what kept
// it from that. first is the one that was started with the order. Only what it has made is
// believed: a container that looks into the last process may speak with its voice, but with
// the PID of a process of its own (SCM_CREDENTIALS is the kernel's).
func (o *Order) Started(first int) (Born, error) {
	made, ready, said := map[int]int{}, map[int]bool{}, map[int]string{} // by who has spoken
	err := func() error {
		for {
			text, sender, err := o.read(0)
			switch {
			case err == unix.ECONNRESET:
				// It has ended without having read its order. What it said comes next.
			case err != nil:
				return err
			case len(text) == 0:
				return nil
			case len(text) == 1:
				ready[sender] = true
			case len(text) == 4:
				if _, twice := made[sender]; !twice {
					made[sender] = int(int32(binary.NativeEndian.Uint32(text)))
				}
			default:
				said[sender] = string(text)
			}
		}
	}()
	b := Born{Last: first}
	for len(b.Before) < longest && made[b.Last] > 0 {
		b.Before = append(b.Before, b.Last)
		b.Last = made[b.Last]
	}
	if err != nil {
		return b, err
	}
	for _, pid := range append([]int{b.Last}, b.Before...) {
		if text, ok := said[pid]; ok {
			return b, errors.New(text)
		}
	}
	if !ready[b.Last] {
		return b, ErrEnded
	}
	return b, nil
}

// why is what the process has said to an error in telling it something.
func (o *Order) why(err error) error {
	if said := o.Said(); said != nil {
		return said
	}
	return err
}

// Said is what the process has said so far to why it does not start; nil is nothing.
func (o *Order) Said() error {
	text, _, err := o.read(unix.MSG_DONTWAIT)
	if err == unix.ECONNRESET {
		text, _, err = o.read(unix.MSG_DONTWAIT)
	}
	if err != nil || len(text) < 5 {
		return nil
	}
	return errors.New(string(text))
}

// read receives a message, and who sent it; an empty one is the end of all of them.
func (o *Order) read(flags int) (text []byte, sender int, err error) {
	text, control := make([]byte, 8<<10), make([]byte, unix.CmsgSpace(unix.SizeofUcred))
	for {
		n, nc, _, _, err := unix.Recvmsg(int(o.ours.Fd()), text, control, flags)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		if parts, err := unix.ParseSocketControlMessage(control[:nc]); err == nil && len(parts) == 1 {
			if who, err := unix.ParseUnixCredentials(&parts[0]); err == nil {
				sender = int(who.Pid)
			}
		}
		return text[:n], sender, nil
	}
}

// Close ends a process that waits for the order.
func (o *Order) Close() {
	o.ours.Close()
	o.theirs.Close()
}
