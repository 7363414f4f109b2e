package wire

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Identify reads a process's start time, so that a later look can tell it from
// another one that got the same PID.
func Identify(pid int) (Process, error) {
	p := Process{PID: pid}
	fields, err := statFields(pid)
	if err != nil {
		return p, err
	}
	p.StartTime, err = strconv.ParseUint(fields[startTimeField], 10, 64)
	if err != nil {
		return p, fmt.Errorf("start time of %d: %w", pid, err)
	}
	return p, nil
}

// Exists tells whether the process is still in the process table, running or as
// a zombie, and not another one that has got its PID.
func (p Process) Exists() bool {
	now, err := Identify(p.PID)
	return err == nil && now == p
}

// Alive tells whether the process still runs.
func (p Process) Alive() bool {
	fields, err := statFields(p.PID)
	return err == nil && fields[startTimeField] == strconv.FormatUint(p.StartTime, 10) &&
		fields[stateField] != "Z" && fields[stateField] != "X"
}

// Ending tells whether the process runs no more of its program: it is dead, or has
// begun to die. PID 1 of a PID namespace stays in that until all others in it, which
// the kernel kills then, have been reaped.
func (p Process) Ending() bool {
	fields, err := statFields(p.PID)
	if err != nil || fields[startTimeField] != strconv.FormatUint(p.StartTime, 10) {
		return true
	}
	flags, err := strconv.ParseUint(fields[flagsField], 10, 64)
	return err == nil && flags&exiting != 0
}

// exiting is the kernel's PF_EXITING (include/linux/sched.h).
const exiting = 0x4

// userHZ is the unit of times in /proc for user space: always 100 a second on
// the architectures that Go knows (see sysconf(3), _SC_CLK_TCK).
const userHZ = 100

// StartedAt is when the process was started, exact to a clock tick.
func (p Process) StartedAt() (time.Time, error) {
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		return time.Time{}, fmt.Errorf("read boot clock: %w", err)
	}
	age := time.Duration(boot.Nano()) - time.Duration(p.StartTime)*time.Second/userHZ
	return time.Now().Add(-age), nil
}

// Fields of /proc/PID/stat after the command name (proc(5) counts from 1 and
// includes PID and name).
const (
	stateField     = 3 - 3
	parentField    = 4 - 3
	flagsField     = 9 - 3
	startTimeField = 22 - 3
	exitCodeField  = 52 - 3
)

func statFields(pid int) ([]string, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return nil, err
	}
	// The name is in parentheses and may contain anything, parentheses too.
	end := bytes.LastIndexByte(b, ')')
	if end < 0 {
		return nil, fmt.Errorf("stat of %d: no name", pid)
	}
	var fields []string
	for _, f := range bytes.Fields(b[end+1:]) {
		fields = append(fields, string(f))
	}
	if len(fields) <= exitCodeField {
		return nil, fmt.Errorf("stat of %d: %d fields", pid, len(fields))
	}
	return fields, nil
}

// ZombieStatus returns the wait status of a process that has ended and whose
// parent has not reaped it; ok is false in every other case.
func (p Process) ZombieStatus() (status uint32, ok bool) {
	fields, err := statFields(p.PID)
	if err != nil || fields[stateField] != "Z" {
		return 0, false
	}
	if st, err := strconv.ParseUint(fields[startTimeField], 10, 64); err != nil || st != p.StartTime {
		return 0, false
	}
	code, err := strconv.ParseUint(fields[exitCodeField], 10, 32)
	if err != nil {
		return 0, false
	}
	return uint32(code), true
}

// ZombieChild identifies pid when it is a zombie and a child of parent.
func ZombieChild(pid, parent int) (Process, bool) {
	fields, err := statFields(pid)
	if err != nil || fields[stateField] != "Z" || fields[parentField] != strconv.Itoa(parent) {
		return Process{}, false
	}
	start, err := strconv.ParseUint(fields[startTimeField], 10, 64)
	return Process{PID: pid, StartTime: start}, err == nil
}
