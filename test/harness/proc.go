package harness

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Process is one process of the machine as /proc shows it. Pid and StartTime
// together name it for good.
type Process struct {
	PID, Parent int
	// StartTime is in clock ticks since boot (field 22 of /proc/PID/stat).
	StartTime uint64
	// Name is the kernel's comm, at most 15 bytes.
	Name string
	// State is the kernel's letter; "Z" is a zombie.
	State string
	// Cgroup is the content of /proc/PID/cgroup: a line for each hierarchy.
	Cgroup string
}

func (p Process) String() string {
	return fmt.Sprintf("pid %d (%s, state %s, parent %d)", p.PID, p.Name, p.State, p.Parent)
}

// Processes lists the machine's processes for which keep answers true. A
// process that goes away during the reading is left out.
func Processes(keep func(Process) bool) []Process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var found []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if p, err := ReadProcess(pid); err == nil && keep(p) {
			found = append(found, p)
		}
	}
	return found
}

// ReadProcess reads one process; the error is that of the missing /proc file
// when it is gone.
func ReadProcess(pid int) (Process, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Process{}, err
	}
	cgroup, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return Process{}, err
	}
	// comm is in parentheses and may itself hold parentheses and blanks.
	open, end := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')')
	if open < 0 || end < open {
		return Process{}, fmt.Errorf("parse /proc/%d/stat: no command", pid)
	}
	fields := strings.Fields(string(stat[end+1:]))
	if len(fields) < 20 {
		return Process{}, fmt.Errorf("parse /proc/%d/stat: %d fields", pid, len(fields))
	}
	parent, _ := strconv.Atoi(fields[1])
	start, _ := strconv.ParseUint(fields[19], 10, 64)
	return Process{
		PID: pid, Parent: parent, StartTime: start, State: fields[0],
		Name: string(stat[open+1 : end]), Cgroup: string(cgroup),
	}, nil
}

// Alive tells whether this very process is still there (a zombie is not).
func (p Process) Alive() bool {
	now, err := ReadProcess(p.PID)
	return err == nil && now.StartTime == p.StartTime && now.State != "Z"
}

// initsZombie tells a dead process that init has inherited: one of the host's PID
// namespace whose parent was killed with it. It holds nothing any more, and how
// soon init reaps it is not podshim's.
func (p Process) initsZombie() bool { return p.State == "Z" && p.Parent == 1 }

// Namespace is the identity of one of the process's namespaces, such as
// "net:[4026531840]".
func (p Process) Namespace(kind string) string {
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", p.PID, kind))
	if err != nil {
		return "unreadable: " + err.Error()
	}
	return link
}

// Status is one field of /proc/PID/status, without the name and blanks around.
func (p Process) Status(field string) string {
	for line := range strings.Lines(p.Read("status")) {
		if name, value, ok := strings.Cut(line, ":"); ok && name == field {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// Read is the content of a file below /proc/PID; "" when it cannot be read.
func (p Process) Read(name string) string {
	data, _ := os.ReadFile(p.Path(name))
	return string(data)
}

// Path is the path of a file below /proc/PID; "root/etc/passwd" is a file the
// process itself sees.
func (p Process) Path(name string) string {
	return filepath.Join("/proc", strconv.Itoa(p.PID), name)
}

// Mount is one line of /proc/PID/mountinfo.
type Mount struct {
	// Root is the path within the filesystem, Point where it is mounted.
	Root, Point string
	// Options are those of this mount, Super those of the filesystem.
	Options, Super []string
	// Optional are the propagation fields, such as "shared:3" and "master:1".
	Optional     []string
	Type, Source string
}

// Mounts reads the mounts the process sees, in mount order.
func (p Process) Mounts() []Mount { return parseMounts(p.Read("mountinfo")) }

// MountAt is the topmost mount at a path the process sees.
func (p Process) MountAt(point string) (Mount, bool) {
	var found Mount
	ok := false
	for _, m := range p.Mounts() {
		if m.Point == point {
			found, ok = m, true
		}
	}
	return found, ok
}

func parseMounts(text string) []Mount {
	var mounts []Mount
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		dash := slices.Index(fields, "-")
		if dash < 6 || len(fields) < dash+4 {
			continue
		}
		mounts = append(mounts, Mount{
			Root: unescape(fields[3]), Point: unescape(fields[4]),
			Options: strings.Split(fields[5], ","), Optional: fields[6:dash],
			Type: fields[dash+1], Source: unescape(fields[dash+2]),
			Super: strings.Split(fields[dash+3], ","),
		})
	}
	return mounts
}

// unescape undoes the kernel's octal escapes in mountinfo.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// exitWatch waits for the end of a process that is not a child.
type exitWatch struct {
	process Process
	fd      int
}

// watchExit opens a pidfd of the process, making sure that it is of this very
// process and not of a later one with its number.
func watchExit(p Process) (*exitWatch, error) {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd of %v: %w", p, err)
	}
	if now, err := ReadProcess(p.PID); err != nil || now.StartTime != p.StartTime {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("pidfd of %v: %w", p, unix.ESRCH)
	}
	return &exitWatch{p, fd}, nil
}

// wait blocks until the process has ended; the pidfd is closed afterwards.
func (w *exitWatch) wait(limit time.Duration) error {
	defer unix.Close(w.fd)
	until := time.Now().Add(limit)
	for {
		left := time.Until(until)
		if left <= 0 {
			return fmt.Errorf("%v still runs after %v", w.process, limit)
		}
		fds := []unix.PollFd{{Fd: int32(w.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(left.Milliseconds())+1)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("poll pidfd: %w", err)
		}
		if n == 1 {
			return nil
		}
	}
}

// WaitGone blocks until the process has ended; gone already is success.
func (p Process) WaitGone(limit time.Duration) error {
	w, err := watchExit(p)
	if err != nil {
		if p.Alive() {
			return err
		}
		return nil
	}
	return w.wait(limit)
}

// Kill sends a signal through a pidfd, so that it can reach no other process.
func (p Process) Kill(sig unix.Signal) error {
	w, err := watchExit(p)
	if err != nil {
		return err
	}
	defer unix.Close(w.fd)
	return unix.PidfdSendSignal(w.fd, sig, nil, 0)
}
