// Package spawn starts processes. A new process begins with a copy of its maker's descriptor
// table, and closes all of it when it executes its program: with some descriptors for each
// container of a node podmon and the daemon have thousands, and closing them takes a millisecond
// of every start, exec and CNI plugin. So where there are many it is a thread that makes the
// process which has a table of its own with next to nothing in it.
package spawn

import (
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Process describes a process.
type Process struct {
	Path string
	Args []string
	Env  []string // "key=value"; nil is an empty environment
	Dir  string   // where it begins, "" is its maker's
	// Files become its descriptors from 0 on; nil is /dev/null.
	Files []*os.File
	// Cgroup is the directory of the v2 cgroup it is born in, nil its maker's.
	Cgroup     *os.File
	Cloneflags uintptr // CLONE_NEW*
	Setsid     bool
	Setpgid    bool // it leads a process group of its own
}

// many is from how many descriptors on the thread is worth the way to it.
const many = 500

// Start starts it.
func (p Process) Start() (*os.Process, error) {
	numbers, highest := make([]int, len(p.Files)), 0
	for i, f := range p.Files {
		numbers[i] = none
		if f != nil {
			numbers[i] = int(f.Fd())
			highest = max(highest, numbers[i])
		}
	}
	cgroup := none
	if p.Cgroup != nil {
		cgroup = int(p.Cgroup.Fd())
	}
	defer runtime.KeepAlive(p)
	pid, err := -1, errors.New("no thread")
	// The kernel has given the highest number as the lowest that was free.
	if highest >= many {
		if t := thread(); t != nil {
			pid, err = t.run(job{p: p, files: numbers, cgroup: cgroup})
		}
	}
	if pid < 0 && !errors.Is(err, errStart) {
		pid, err = p.fork(numbers, cgroup)
	}
	if err != nil {
		return nil, &os.PathError{Op: "fork/exec", Path: p.Path, Err: err}
	}
	return os.FindProcess(pid)
}

// none is no descriptor: /dev/null, or no cgroup.
const none = -1

// errStart is an error that another thread would have as well.
var errStart = errors.New("the process cannot be made")

func (p Process) fork(files []int, cgroup int) (int, error) {
	attr := &syscall.ProcAttr{
		Dir: p.Dir, Env: p.Env,
		Sys: &syscall.SysProcAttr{Cloneflags: p.Cloneflags, Setsid: p.Setsid, Setpgid: p.Setpgid},
	}
	if attr.Env == nil {
		attr.Env = []string{} // nil would be this process's
	}
	for i, fd := range files {
		if fd == none {
			null, err := unix.Open(os.DevNull, map[bool]int{true: unix.O_RDONLY, false: unix.O_WRONLY}[i == 0]|unix.O_CLOEXEC, 0)
			if err != nil {
				return none, &os.PathError{Op: "open", Path: os.DevNull, Err: err}
			}
			defer unix.Close(null)
			fd = null
		}
		attr.Files = append(attr.Files, uintptr(fd))
	}
	if cgroup != none {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, cgroup
	}
	pid, err := syscall.ForkExec(p.Path, p.Args, attr)
	if err != nil {
		return none, fmt.Errorf("%w: %w", errStart, err)
	}
	return pid, nil
}

// errBusy is the thread's while it makes another process.
var errBusy = errors.New("the thread is busy")

// maker is the thread.
type maker struct {
	jobs chan job
	self int // a pidfd of this process, in the thread's table
}

type job struct {
	p      Process
	files  []int // numbers in the process's table
	cgroup int
	result chan<- result
}

type result struct {
	pid int
	err error
}

// run fails at once while the thread makes another process: a program on a filesystem that
// does not answer holds up its own start only.
func (m *maker) run(j job) (int, error) {
	done := make(chan result, 1)
	j.result = done
	select {
	case m.jobs <- j:
	default:
		return none, errBusy
	}
	r := <-done
	return r.pid, r.err
}

// thread makes the maker; nil where the kernel cannot (before Linux 5.6, or under a seccomp
// filter around this process).
var thread = sync.OnceValue(func() *maker {
	r, w, err := os.Pipe() // so that Go's poller is there
	if err != nil {
		return nil
	}
	defer r.Close()
	defer w.Close()
	m := &maker{jobs: make(chan job)}
	ready := make(chan error, 1)
	go m.loop(int(r.Fd()), ready)
	if <-ready != nil {
		return nil
	}
	return m
})

// loop never ends. The process has the descriptor, by which it sees that the thread has its
// own table and can reach the process's.
func (m *maker) loop(known int, ready chan<- error) {
	runtime.LockOSThread() // for good
	if unix.Gettid() == os.Getpid() {
		// The first thread's table is the one that a pidfd of the process shows. Another thread
		// does it while this one is held.
		inner := make(chan error, 1)
		go m.loop(known, inner)
		err := <-inner
		runtime.UnlockOSThread()
		ready <- err
		return
	}
	err := m.part(known)
	ready <- err
	if err != nil {
		return
	}
	for j := range m.jobs {
		pid, err := m.fork(j)
		j.result <- result{pid, err}
	}
}

// part gives the thread its own table, in which there is only what Go's runtime may look for
// on any thread, its poller, by the same numbers.
func (m *maker) part(known int) error {
	const table = "/proc/thread-self/fd"
	kept := func(fd int, to string) bool {
		return fd <= 2 || to == "anon_inode:[eventpoll]" || to == "anon_inode:[eventfd]"
	}
	last := 0
	if err := each(table, func(fd int, to string) {
		if kept(fd, to) {
			last = max(last, fd)
		}
	}); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return err
	}
	// At once, where there is the call (Linux 5.9): what the process closes meanwhile is open
	// here. CLOSE_RANGE_UNSHARE would not even copy it, but leave a broken table that the
	// processes inherit (CVE-2024-45025, mended in Linux 6.11).
	unix.CloseRange(uint(last)+1, math.MaxUint32, 0)
	var rest []int
	if err := each(table, func(fd int, to string) {
		if !kept(fd, to) {
			rest = append(rest, fd)
		}
	}); err != nil {
		return err
	}
	for _, fd := range rest {
		unix.Close(fd)
	}
	var err error
	if m.self, err = unix.PidfdOpen(os.Getpid(), 0); err != nil {
		return err
	}
	fd, err := unix.PidfdGetfd(m.self, known, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// each calls f for each descriptor of a directory of /proc, with what it is of.
func each(dir string, f func(fd int, to string)) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, name := range names {
		fd, err := strconv.Atoi(name.Name())
		if err != nil {
			return err
		}
		// One that has been closed in the meantime, the directory's own too, is of nothing.
		to, _ := os.Readlink(filepath.Join(dir, name.Name()))
		f(fd, to)
	}
	return nil
}

// fork makes descriptors of the process the thread's as well, and the process by these.
func (m *maker) fork(j job) (int, error) {
	var taken []int
	defer func() {
		for _, fd := range taken {
			unix.Close(fd)
		}
	}()
	take := func(fd int) (int, error) {
		if fd == none {
			return none, nil
		}
		own, err := unix.PidfdGetfd(m.self, fd, 0)
		if err != nil {
			return none, os.NewSyscallError("pidfd_getfd", err)
		}
		taken = append(taken, own)
		return own, nil
	}
	files := make([]int, len(j.files))
	for i, fd := range j.files {
		var err error
		if files[i], err = take(fd); err != nil {
			return none, err
		}
	}
	cgroup, err := take(j.cgroup)
	if err != nil {
		return none, err
	}
	return j.p.fork(files, cgroup)
}
