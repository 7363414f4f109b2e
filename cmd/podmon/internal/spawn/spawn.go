// Package spawn starts processes. A new process begins with a copy of its maker's descriptor
// table, and closes all of it when it executes its program: with some descriptors for each
// container of a node podmon has thousands, and closing them takes a millisecond of every start
// and exec. So where there are many it is a thread that makes the process which has a table of
// its own with next to nothing in it.
package spawn

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Process describes a process. Its environment is empty.
type Process struct {
	Path string
	Args []string
	// Files become its descriptors from 0 on; nil is /dev/null.
	Files []*os.File
	// Cgroup is the directory of the v2 cgroup it is born in, nil its maker's.
	Cgroup     *os.File
	Cloneflags uintptr // CLONE_NEW*
	Setsid     bool
}

// many is from how many descriptors on the thread is worth the way to it.
const many = 500

// Start starts it.
func (p Process) Start() (*os.Process, error) {
	fork := func() (int, error) { return p.fork(own) }
	if p.highest() >= many {
		if t := thread(); t != nil {
			fork = func() (int, error) { return t.run(p) }
		}
	}
	pid, err := fork()
	if err != nil {
		return nil, &os.PathError{Op: "fork/exec", Path: p.Path, Err: err}
	}
	return os.FindProcess(pid)
}

// highest is the highest number of its files, which the kernel has given as the lowest that
// was free.
func (p Process) highest() (highest uintptr) {
	for _, f := range p.Files {
		if f != nil {
			highest = max(highest, f.Fd())
		}
	}
	return highest
}

// descriptor is a file's number where the process is made, and what gives it back.
type descriptor func(*os.File) (fd int, done func(), err error)

func own(f *os.File) (int, func(), error) { return int(f.Fd()), func() {}, nil }

func (p Process) fork(number descriptor) (int, error) {
	attr := &syscall.ProcAttr{Env: []string{}, Sys: &syscall.SysProcAttr{Cloneflags: p.Cloneflags, Setsid: p.Setsid}}
	for i, f := range p.Files {
		if f == nil {
			null, err := unix.Open(os.DevNull, map[bool]int{true: unix.O_RDONLY, false: unix.O_WRONLY}[i == 0]|unix.O_CLOEXEC, 0)
			if err != nil {
				return 0, &os.PathError{Op: "open", Path: os.DevNull, Err: err}
			}
			defer unix.Close(null)
			attr.Files = append(attr.Files, uintptr(null))
			continue
		}
		fd, done, err := number(f)
		if err != nil {
			return 0, err
		}
		defer done()
		attr.Files = append(attr.Files, uintptr(fd))
	}
	if p.Cgroup != nil {
		fd, done, err := number(p.Cgroup)
		if err != nil {
			return 0, err
		}
		defer done()
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, fd
	}
	pid, err := syscall.ForkExec(p.Path, p.Args, attr)
	runtime.KeepAlive(p)
	return pid, err
}

// maker is the thread.
type maker struct {
	jobs chan job
	self int // a pidfd of this process, in the thread's table
}

type job struct {
	p      Process
	result chan<- result
}

type result struct {
	pid int
	err error
}

func (m *maker) run(p Process) (int, error) {
	done := make(chan result, 1)
	m.jobs <- job{p, done}
	r := <-done
	runtime.KeepAlive(p)
	return r.pid, r.err
}

// thread makes the maker; nil where the kernel cannot (before Linux 5.9, or under a seccomp
// filter around podmon).
var thread = sync.OnceValue(func() *maker {
	r, w, err := os.Pipe() // so that Go's poller is there
	if err != nil {
		return nil
	}
	r.Close()
	w.Close()
	m := &maker{jobs: make(chan job)}
	ready := make(chan error, 1)
	go m.loop(ready)
	if <-ready != nil {
		return nil
	}
	return m
})

func (m *maker) loop(ready chan<- error) {
	runtime.LockOSThread() // for good
	err := m.part()
	ready <- err
	if err != nil {
		return
	}
	for j := range m.jobs {
		pid, err := j.p.fork(m.take)
		j.result <- result{pid, err}
	}
}

// part gives the thread its own table, in which there is only what Go's runtime may look for
// on any thread, its poller, by the same numbers.
func (m *maker) part() error {
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return err
	}
	var err error
	if m.self, err = unix.PidfdOpen(os.Getpid(), 0); err != nil {
		return err
	}
	const table = "/proc/thread-self/fd"
	names, err := os.ReadDir(table)
	if err != nil {
		return err
	}
	for _, name := range names {
		fd, err := strconv.Atoi(name.Name())
		if err != nil {
			return err
		}
		to, err := os.Readlink(filepath.Join(table, name.Name()))
		if err != nil || fd <= 2 || fd == m.self || to == "anon_inode:[eventpoll]" || to == "anon_inode:[eventfd]" {
			continue
		}
		unix.Close(fd)
	}
	// It works at all: with a descriptor that all have.
	fd, err := unix.PidfdGetfd(m.self, 2, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// take makes a descriptor of the process one of the thread's as well.
func (m *maker) take(f *os.File) (int, func(), error) {
	fd, err := unix.PidfdGetfd(m.self, int(f.Fd()), 0)
	if err != nil {
		return 0, nil, os.NewSyscallError("pidfd_getfd", err)
	}
	return fd, func() { unix.Close(fd) }, nil
}
