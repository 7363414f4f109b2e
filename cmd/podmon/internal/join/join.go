// Package join has a process that libcontainer starts move itself into its cgroups on
// cgroup v1, as the first thing it does.
//
// Whoever moves another process there waits for an RCU grace period, 5 to 20 ms, because
// a write to cgroup.procs takes cgroup_threadgroup_rwsem (kernel/cgroup/cgroup.c,
// cgroup_procs_write_start). A thread that moves itself does not: it writes 0 to "tasks".
// Nor does one that is born in a cgroup of v2 (CLONE_INTO_CGROUP), the hierarchy without
// controllers that is beside v1 in the hybrid layout. So "podmon init" does that, in C and
// before any code of libcontainer or Go: a thread of podmon must not, since a cgroup that
// it is in can be frozen or throttled, and whoever kills what is in it would kill podmon.
//
// What the process starts from then on is in the same cgroups. When a cgroup cannot be
// joined the process ends, and its start fails with the reason.
package join

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

// Order tells one process which cgroups to join, and podmon what has become of that. It is
// a memfd of the name that join.c looks for:
//
//	4 bytes  what podmon is told: 0 before the move; then the PID of the process that
//	         goes on, or -1 when that is the one libcontainer has made
//	1 byte   'r': it may use all CPUs of its cpuset, whatever podmon may
//	then     a letter and a path, each ended by a zero byte: 't' for the "tasks" file of a
//	         v1 cgroup, 'T' for one that it joins where it can, 'U' for the directory of a
//	         v2 one, the same
type Order struct{ file *os.File }

// name must be that in join.c.
const name = "podmon-cgroups"

// limit is the size of join.c's buffer.
const limit = 64 << 10

// NewOrder makes an order for the cgroups, whose keys are the subsystems as
// cgroups.Manager has them. It must be the first of the process's extra files.
func NewOrder(paths map[string]string, resetAffinity bool) (*Order, error) {
	text := encode(paths, resetAffinity)
	if len(text) >= limit {
		return nil, errors.New("list of cgroups: too long")
	}
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("list of cgroups: %w", err)
	}
	o := &Order{os.NewFile(uintptr(fd), name)}
	if _, err := o.file.Write(text); err != nil {
		o.file.Close()
		return nil, fmt.Errorf("list of cgroups: %w", err)
	}
	return o, nil
}

func encode(paths map[string]string, resetAffinity bool) []byte {
	text := bytes.NewBuffer(make([]byte, 4, 2<<10))
	text.WriteByte(map[bool]byte{true: 'r', false: '-'}[resetAffinity])
	var entries []string
	for subsystem, dir := range paths {
		switch {
		case subsystem == "":
			entries = append(entries, "U"+dir)
		case subsystem == "misc" || strings.HasPrefix(subsystem, "name="):
			// The cgroups package joins these where it can.
			entries = append(entries, "T"+filepath.Join(dir, "tasks"))
		default:
			entries = append(entries, "t"+filepath.Join(dir, "tasks"))
		}
	}
	// The 'U' comes last by that: what is born there is in all others already. Several
	// subsystems may have one hierarchy.
	slices.SortFunc(entries, func(a, b string) int {
		return strings.Compare(strings.ToLower(a), strings.ToLower(b))
	})
	for _, entry := range slices.Compact(entries) {
		text.WriteString(entry)
		text.WriteByte(0)
	}
	return text.Bytes()
}

// File is what the process has to be given.
func (o *Order) File() *os.File { return o.file }

// Settle is called when libcontainer has started the process, or has given up (failed). It
// reaps the first stage where libcontainer does not know of it, killed after a failure, and
// tells whether the move has been made.
func (o *Order) Settle(failed bool) (moved bool) {
	defer o.file.Close()
	var told [4]byte
	if _, err := o.file.ReadAt(told[:], 0); err != nil {
		return false
	}
	pid := int(int32(binary.NativeEndian.Uint32(told[:])))
	if pid > 0 {
		if failed {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		for {
			if _, err := unix.Wait4(pid, nil, 0, nil); err != unix.EINTR {
				break
			}
		}
	}
	return pid != 0
}
