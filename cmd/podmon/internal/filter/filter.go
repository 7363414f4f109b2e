// Package filter compiles seccomp profiles. libseccomp takes 30 ms for the default profile,
// and libcontainer has it do that anew in every process it starts; here it is done once for
// a profile.
//
// What libcontainer makes of a profile cannot be had from it but by installing it. So a
// process of our own installs it, "podmon filter", and is traced: the filter is read back
// from the kernel (PTRACE_SECCOMP_GET_FILTER), exactly as it was loaded.
package filter

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/seccomp"
	"golang.org/x/sys/unix"
)

// Filter is what seccomp(2) is given.
type Filter struct {
	Code  []unix.SockFilter
	Flags uint32 // SECCOMP_FILTER_FLAG_*
}

// ErrNotify is returned for a profile with SCMP_ACT_NOTIFY, whose listener is another one
// for each process.
var ErrNotify = errors.New("the profile notifies")

// limit is how long a profile may take; the default one takes 50 ms.
const limit = 10 * time.Second

// most is how many profiles are kept. A node has a handful.
const most = 32

// Cache holds the filters of a podmon. Its zero value is empty.
type Cache struct {
	mu      sync.Mutex
	filters map[[sha256.Size]byte]func() (*Filter, error)
}

// Get compiles a profile, or has done so before. An error is kept, too, unless it may pass.
func (c *Cache) Get(profile *configs.Seccomp) (*Filter, error) {
	for _, call := range profile.Syscalls {
		if call != nil && call.Action == configs.Notify {
			return nil, ErrNotify
		}
	}
	text, err := json.Marshal(profile)
	if err != nil {
		return nil, err
	}
	key := sha256.Sum256(text)
	c.mu.Lock()
	get, ok := c.filters[key]
	if !ok {
		if len(c.filters) >= most || c.filters == nil {
			c.filters = map[[sha256.Size]byte]func() (*Filter, error){}
		}
		get = sync.OnceValues(func() (*Filter, error) { return compile(text) })
		c.filters[key] = get
	}
	c.mu.Unlock()
	f, err := get()
	if errors.Is(err, errPassing) {
		c.mu.Lock()
		delete(c.filters, key)
		c.mu.Unlock()
	}
	return f, err
}

// errPassing is the class of errors that are of the moment, not of the profile or the kernel.
var errPassing = errors.New("try again")

// refused is the exit code of "podmon filter" for a profile that it cannot install.
const refused = 1

// Main is "podmon filter": it installs the profile on stdin for the process that traces it.
func Main() {
	var profile configs.Seccomp
	err := json.NewDecoder(os.Stdin).Decode(&profile)
	if err == nil {
		_, err = seccomp.InitSeccomp(&profile)
	}
	if err == nil {
		err = errors.New("nobody has ended this process")
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(refused)
}

// compile runs "podmon filter".
func compile(profile []byte) (_ *Filter, err error) {
	runtime.LockOSThread() // ptrace(2) is for the thread that has started the process
	defer runtime.UnlockOSThread()
	var said bytes.Buffer
	cmd := exec.Command("/proc/self/exe")
	cmd.Args, cmd.Env, cmd.Stdin, cmd.Stderr = []string{"podmon", "filter"}, []string{}, bytes.NewReader(profile), &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.EAGAIN, unix.ENOMEM} {
			if errors.Is(err, e) {
				err = fmt.Errorf("%w: %w", err, errPassing)
			}
		}
		return nil, fmt.Errorf("compile seccomp profile: %w", err)
	}
	late := time.AfterFunc(limit, func() { _ = cmd.Process.Kill() })
	f, err := watch(cmd.Process.Pid)
	late.Stop()
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		return nil, fmt.Errorf("compile seccomp profile: %w; %.1000s", err, said.String())
	}
	return f, nil
}

// watch follows the process, which has been stopped as it began, until it has a filter.
func watch(pid int) (*Filter, error) {
	if _, err := next(pid); err != nil {
		return nil, err
	}
	if err := unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_EXITKILL); err != nil {
		return nil, fmt.Errorf("trace: %w", err)
	}
	var loading bool
	var flags uint32
	for signal := 0; ; {
		if err := unix.PtraceSyscall(pid, signal); err != nil {
			return nil, fmt.Errorf("trace: %w", err)
		}
		stop, err := next(pid)
		if err != nil {
			return nil, err
		}
		signal = 0
		if stop != unix.SIGTRAP|0x80 {
			signal = int(stop &^ 0x80)
			continue
		}
		call, err := syscallOf(pid)
		switch {
		case err != nil:
			return nil, fmt.Errorf("trace: %w", err)
		case call.op == unix.PTRACE_SYSCALL_INFO_ENTRY:
			loading, flags = call.loads()
		case loading && !call.failed():
			code, err := installed(pid)
			return &Filter{Code: code, Flags: flags}, err
		}
	}
}

// next waits for the next stop, and returns its signal.
func next(pid int) (unix.Signal, error) {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &status, unix.WALL, nil)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, fmt.Errorf("trace: %w", err)
		case status.Signaled():
			return 0, fmt.Errorf("%v: %w", status.Signal(), errPassing)
		case status.Exited() && status.ExitStatus() != refused: // Go, without memory
			return 0, fmt.Errorf("it has ended with %d: %w", status.ExitStatus(), errPassing)
		case !status.Stopped():
			return 0, errors.New("it has ended without a filter")
		}
		return status.StopSignal(), nil
	}
}

// syscallInfo is struct ptrace_syscall_info of ptrace(2).
type syscallInfo struct {
	op      uint8
	_       [3]uint8
	arch    uint32
	ip, sp  uint64
	payload [8]uint64 // nr and args, or rval and is_error
}

func syscallOf(pid int) (info syscallInfo, err error) {
	_, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(pid),
		unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if errno != 0 {
		return info, errno
	}
	return info, nil
}

// loads tells whether the call is one that installs a filter, and with which flags.
func (i syscallInfo) loads() (bool, uint32) {
	switch i.payload[0] {
	case unix.SYS_SECCOMP:
		return i.payload[1] == unix.SECCOMP_SET_MODE_FILTER, uint32(i.payload[2])
	case unix.SYS_PRCTL:
		return i.payload[1] == unix.PR_SET_SECCOMP && i.payload[2] == unix.SECCOMP_MODE_FILTER, 0
	}
	return false, 0
}

func (i syscallInfo) failed() bool { return uint8(i.payload[1]) != 0 }

// installed reads the only filter of a process.
func installed(pid int) ([]unix.SockFilter, error) {
	n, err := getFilter(pid, 0, nil)
	if err != nil {
		return nil, fmt.Errorf("read the filter: %w", err)
	}
	code := make([]unix.SockFilter, n)
	if _, err := getFilter(pid, 0, code); err != nil {
		return nil, fmt.Errorf("read the filter: %w", err)
	}
	if _, err := getFilter(pid, 1, nil); err != unix.ENOENT {
		return nil, errors.New("read the filter: podmon has one itself")
	}
	return code, nil
}

// getFilter reads the filter of that number, or counts its instructions.
func getFilter(pid int, number uintptr, code []unix.SockFilter) (int, error) {
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SECCOMP_GET_FILTER, uintptr(pid), number,
		uintptr(unsafe.Pointer(unsafe.SliceData(code))), 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
