package fault

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/test/harness"
)

// The kernel is asked where podshim's steps are (seccomp_unotify(2)): the daemon
// runs under a filter by which every system call that takes something or gives it
// back, of its own, of podmon's, of a starting container's and of a CNI plugin's,
// waits for this test's word. So no step can be forgotten, the programs under test
// are those that are installed, and any one call can be made to fail, or the daemon
// be killed at it.

// trapped are those system calls. Of openat only those that may make a file wait.
var trapped = map[uint32]string{
	unix.SYS_OPENAT: "create", unix.SYS_MKDIRAT: "mkdir", unix.SYS_MKNODAT: "mknod", unix.SYS_SYMLINKAT: "symlink",
	unix.SYS_UNLINKAT: "remove", unix.SYS_RENAMEAT: "rename", unix.SYS_RENAMEAT2: "rename",
	unix.SYS_MOUNT: "mount", unix.SYS_UMOUNT2: "unmount", unix.SYS_MOVE_MOUNT: "move mount",
	unix.SYS_UNSHARE: "unshare", unix.SYS_EXECVE: "execute", unix.SYS_SENDMSG: "send",
	unix.SYS_KILL: "kill", unix.SYS_PIDFD_SEND_SIGNAL: "kill", unix.SYS_SENDTO: "netlink",
}

const launch = "PODSHIM_TEST_TRAPPED"

// becomeTrapped, in a process that trap.spawn has started, installs the filter,
// hands its listener over and becomes the daemon.
func becomeTrapped() {
	program := os.Getenv(launch)
	if program == "" {
		return
	}
	err := func() error {
		runtime.LockOSThread() // the filter is the thread's, and so is execve(2)
		listener, err := installFilter()
		if err != nil {
			return err
		}
		var number [4]byte
		binary.LittleEndian.PutUint32(number[:], uint32(listener))
		if _, err := unix.Write(3, number[:]); err != nil {
			return err
		}
		if _, err := unix.Read(4, number[:]); err != nil { // until it has been taken
			return err
		}
		for _, fd := range []int{3, 4, listener} {
			unix.CloseOnExec(fd)
		}
		if err := os.Unsetenv(launch); err != nil {
			return err
		}
		return syscall.Exec(program, os.Args, os.Environ())
	}()
	fmt.Fprintln(os.Stderr, "run the daemon with trapped system calls:", err)
	os.Exit(1)
}

// installFilter has the thread's trapped calls wait for the listener it returns.
func installFilter() (listener int, err error) {
	const number, openFlags = 0, 16 + 2*8 // offsets in struct seccomp_data
	code := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number}}
	for nr := range trapped {
		if nr == unix.SYS_OPENAT {
			continue
		}
		code = append(code,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: nr, Jf: 1},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF})
	}
	code = append(code,
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_OPENAT, Jf: 3},
		unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: openFlags},
		unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K, K: unix.O_CREAT, Jf: 1},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
		unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	program := unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}
	// Without WAIT_KILLABLE_RECV Go's own signals would make calls wait twice.
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER,
		unix.SECCOMP_FILTER_FLAG_NEW_LISTENER|unix.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV, uintptr(unsafe.Pointer(&program)))
	if errno != 0 {
		return -1, fmt.Errorf("install seccomp filter: %w", errno)
	}
	return int(fd), nil
}

// trap is the other end of the filter: it lets calls go on, counts them, and springs
// at one.
type trap struct {
	t *testing.T
	n *harness.Node

	mu     sync.Mutex
	daemon int            // its PID
	counts map[string]int // of the calls since arm; nil when not armed
	seen   []string
	target string
	fail   bool
	sprung chan struct{} // closed when the target has been met
	goOn   chan struct{} // what the target waits for if it is not to fail
}

// spawn starts the daemon under the filter.
func (s *trap) spawn(cmd *exec.Cmd) error {
	numbers, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer numbers.Close()
	gate, taken, err := os.Pipe()
	if err != nil {
		return err
	}
	defer taken.Close()
	cmd.Env = append(cmd.Env, launch+"="+cmd.Path)
	cmd.Path, cmd.ExtraFiles = "/proc/self/exe", []*os.File{theirs, gate}
	err = cmd.Start()
	theirs.Close()
	gate.Close()
	if err != nil {
		return err
	}
	var number [4]byte
	if _, err := numbers.Read(number[:]); err != nil {
		return errors.Join(fmt.Errorf("the filter was not installed: %w", err), cmd.Process.Kill(), cmd.Wait())
	}
	pidfd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	listener, err := unix.PidfdGetfd(pidfd, int(binary.LittleEndian.Uint32(number[:])), 0)
	if err != nil {
		return fmt.Errorf("take the filter's listener: %w", err)
	}
	s.mu.Lock()
	s.daemon = cmd.Process.Pid
	s.mu.Unlock()
	go s.serve(listener) // until no process has the filter any more
	_, err = taken.Write([]byte{0})
	return err
}

// notification is struct seccomp_notif, answer struct seccomp_notif_resp.
type notification struct {
	id         uint64
	pid, flags uint32
	number     int32
	arch       uint32
	at         uint64
	args       [6]uint64
}

type answer struct {
	id           uint64
	value        int64
	errno, flags int32
}

func (s *trap) serve(listener int) {
	defer unix.Close(listener)
	for {
		ready := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, -1); err != nil && !errors.Is(err, unix.EINTR) {
			s.t.Errorf("wait for trapped calls: %v", err)
			return
		}
		if ready[0].Revents&unix.POLLIN == 0 {
			if ready[0].Revents != 0 {
				return
			}
			continue
		}
		var call notification
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&call))); errno != 0 {
			continue // its process was killed
		}
		go func() {
			const goOn = 1 // SECCOMP_USER_NOTIF_FLAG_CONTINUE
			a := answer{id: call.id, flags: goOn}
			if s.decide(&call) {
				a.flags, a.errno = 0, -int32(unix.EIO)
			}
			// Its process may have been killed meanwhile.
			_, _, _ = unix.Syscall(unix.SYS_IOCTL, uintptr(listener), unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&a)))
		}()
	}
}

// decide tells whether the call is to fail; a call that the daemon is to be killed
// at waits in it.
func (s *trap) decide(call *notification) (fail bool) {
	s.mu.Lock()
	armed := s.counts != nil
	s.mu.Unlock()
	if !armed {
		return false
	}
	name := s.name(call)
	if name == "" {
		return false
	}
	s.mu.Lock()
	if s.counts == nil {
		s.mu.Unlock()
		return false
	}
	s.counts[name]++
	if count := s.counts[name]; count > 1 {
		name = fmt.Sprintf("%s (%d)", name, count)
	}
	s.seen = append(s.seen, name)
	if name != s.target {
		s.mu.Unlock()
		return false
	}
	fail, goOn := s.fail, s.goOn
	close(s.sprung)
	s.target = "" // once
	s.mu.Unlock()
	if !fail {
		<-goOn
	}
	return fail
}

// arm begins to count. At the target the trap springs: the call fails, or waits until
// the returned function is called, which may be at any time.
func (s *trap) arm(target string, fail bool) (sprung <-chan struct{}, release func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts, s.seen = make(map[string]int), nil
	s.target, s.fail = target, fail
	s.sprung, s.goOn = make(chan struct{}), make(chan struct{})
	return s.sprung, sync.OnceFunc(func() { close(s.goOn) })
}

// disarm ends the counting and returns the names of the calls that there were.
func (s *trap) disarm() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts, s.target = nil, ""
	return s.seen
}

// name is who calls what: "podshim mount RUN/sandboxes/ID/shm". Calls of others than
// podshim and what it has started, such as the containers' own, have none.
func (s *trap) name(call *notification) string {
	who := s.actor(int(call.pid))
	what := trapped[uint32(call.number)]
	if who == "" {
		return ""
	}
	if who == "init" && uint32(call.number) != unix.SYS_SENDTO {
		// A container's first moments: dozens of mounts and files, which are nobody's
		// but podmon's to take back. One of each kind stands for them.
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.counts["init "+what] > 0 {
			return ""
		}
		return "init " + what
	}
	var object string
	switch uint32(call.number) {
	case unix.SYS_OPENAT, unix.SYS_MKDIRAT, unix.SYS_MKNODAT, unix.SYS_UNLINKAT:
		object = s.path(call.pid, int32(call.args[0]), call.args[1])
	case unix.SYS_SYMLINKAT:
		object = s.path(call.pid, int32(call.args[1]), call.args[2])
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2, unix.SYS_MOVE_MOUNT:
		object = s.path(call.pid, int32(call.args[2]), call.args[3])
	case unix.SYS_MOUNT:
		object = s.path(call.pid, unix.AT_FDCWD, call.args[1])
	case unix.SYS_UMOUNT2, unix.SYS_EXECVE:
		object = s.path(call.pid, unix.AT_FDCWD, call.args[0])
	case unix.SYS_SENDMSG:
		if object = message(call.pid, call.args[1]); object == "ping" || object == "" {
			return ""
		}
	case unix.SYS_SENDTO:
		if object = change(call.pid, call.args[1], call.args[4]); object == "" {
			return ""
		}
	}
	return strings.TrimSpace(who + " " + what + " " + object)
}

// actor tells whose thread it is; "" are others.
func (s *trap) actor(tid int) string {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", tid))
	if err != nil {
		return ""
	}
	cmdline, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", tid))
	name := strings.TrimSuffix(filepath.Base(exe), " (deleted)")
	switch {
	case name == "podshim":
		return name
	case strings.HasPrefix(exe, "/memfd:podmon") && bytes.Contains(cmdline, []byte("\x00serve\x00")):
		return "podmon"
	case strings.HasPrefix(exe, "/memfd:podmon"):
		return "init"
	}
	if tools, err := harness.Tools(); err == nil && filepath.Dir(exe) == resolved(tools) {
		return "plugin " + name
	}
	return ""
}

func resolved(path string) string {
	if to, err := filepath.EvalSymlinks(path); err == nil {
		return to
	}
	return path
}

// What differs from one pod to the next, in paths.
var (
	idInPath     = regexp.MustCompile(`[0-9a-f]{64}|podshim-[0-9a-f]{16}|veth[0-9a-f]{8}`)
	numberInPath = regexp.MustCompile(`[0-9]+`)
)

// path is a path among a call's arguments, without what differs each time.
func (s *trap) path(tid uint32, dirfd int32, address uint64) string {
	path := text(tid, address, 4096)
	if !filepath.IsAbs(path) && dirfd != unix.AT_FDCWD {
		dir, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", tid, dirfd))
		path = filepath.Join(dir, path)
	}
	tools, _ := harness.Tools()
	for _, place := range [][2]string{
		{tools, "TOOLS"},
		{s.n.Root, "ROOT"}, {s.n.RunDir, "RUN"}, {s.n.NetnsDir, "NETNS"}, {s.n.LogRoot, "LOGS"},
		{s.n.IPAM, "IPAM"}, {s.n.Dir, "DIR"}, {s.n.Name, "NODE"},
	} {
		path = strings.ReplaceAll(path, place[0], place[1])
	}
	return numberInPath.ReplaceAllString(idInPath.ReplaceAllString(path, "ID"), "N")
}

// text reads a string of another process, at most to the end of its page and the
// next.
func text(tid uint32, address uint64, most int) string {
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", tid))
	if err != nil {
		return ""
	}
	defer memory.Close()
	buffer := make([]byte, most)
	n, _ := memory.ReadAt(buffer, int64(address))
	if end := bytes.IndexByte(buffer[:n], 0); end >= 0 {
		n = end
	}
	return string(buffer[:n])
}

// change is what a message to the kernel's network changes (rtnetlink(7)); "" for one that
// only asks, and for what is no such message.
func change(tid uint32, buffer, address uint64) string {
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", tid))
	if err != nil {
		return ""
	}
	defer memory.Close()
	var family, kind [2]byte
	if _, err := memory.ReadAt(family[:], int64(address)); err != nil || binary.NativeEndian.Uint16(family[:]) != unix.AF_NETLINK {
		return ""
	}
	if _, err := memory.ReadAt(kind[:], int64(buffer)+4); err != nil {
		return ""
	}
	return map[uint16]string{
		unix.RTM_NEWLINK: "new link", unix.RTM_SETLINK: "set link", unix.RTM_DELLINK: "delete link",
		unix.RTM_NEWADDR: "new address", unix.RTM_DELADDR: "delete address",
		unix.RTM_NEWROUTE: "new route", unix.RTM_DELROUTE: "delete route",
	}[binary.NativeEndian.Uint16(kind[:])]
}

var operation = regexp.MustCompile(`^\{(?:"id":[0-9]+,)?(?:"op":"([a-z-]+)")?`)

// message is what a frame between podshim and podmon says: its operation, or answer.
func message(tid uint32, header uint64) string {
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", tid))
	if err != nil {
		return ""
	}
	defer memory.Close()
	var msghdr, iovec [8 * 4]byte
	if _, err := memory.ReadAt(msghdr[:], int64(header)); err != nil {
		return ""
	}
	if _, err := memory.ReadAt(iovec[:16], int64(binary.NativeEndian.Uint64(msghdr[16:]))); err != nil {
		return ""
	}
	frame := make([]byte, min(binary.NativeEndian.Uint64(iovec[8:]), 200))
	if _, err := memory.ReadAt(frame, int64(binary.NativeEndian.Uint64(iovec[:]))); err != nil || len(frame) < 8 {
		return ""
	}
	found := operation.FindSubmatch(frame[8:])
	switch {
	case found == nil:
		return ""
	case len(found[1]) == 0:
		return "answer"
	}
	return string(found[1])
}
