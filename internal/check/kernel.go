package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/config"
	"github.com/podshim/podshim/internal/host"
)

// What a kernel must be newer than to be known to work: 5.10 is the oldest
// longterm kernel, and has all that is tried below.
const oldestMajor, oldestMinor = 5, 10

func kernel(_ context.Context, cfg *config.Config) []Finding {
	findings := []Finding{version()}
	findings = append(findings, namespaces("/proc/self/ns")...)
	findings = append(findings,
		need("pidfd", pidfd(), "podshim tells processes apart by pidfd: a PID alone may be reused", "run Linux 5.3 or later"),
		want("pidfd exit codes", pidfdExit(),
			"exit codes of containers that end while no podmon runs are reported as unknown", "run Linux 6.15 or later"),
		need("openat2", openat2(), "files in images cannot be opened without leaving the image by a symlink", "run Linux 5.6 or later"),
		overlay(cfg.Root),
		userNamespace(),
		messageQueues("/proc/filesystems"),
		memfd("/proc/sys/vm/memfd_noexec"),
	)
	_, facts, err := host.Facts(host.Options{CgroupDriver: cfg.Cgroup.Driver, Dir: nearest(cfg.Root)})
	if err != nil {
		return append(findings, failure("facts", err.Error(), "podshim reads these before it starts", "see the cgroup area below"))
	}
	return append(findings, judgeFacts(facts, cfg.Runtime.NofileHard)...)
}

var yesNo = strings.NewReplacer("true", "yes", "false", "no")

// judgeFacts says what follows from what the daemon, too, reads of this machine
// when it starts.
func judgeFacts(facts []host.Fact, nofileHard uint64) []Finding {
	var findings []Finding
	for _, f := range facts {
		found := yesNo.Replace(f.Value) + ": " + f.Why
		switch f.Name {
		case "IDMapMounts":
			findings = append(findings, unless("idmapped mounts", f.Value == "true", found,
				"pods with a user namespace (hostUsers: false) are refused",
				"run Linux 5.12 or later, with root on a filesystem that can map IDs (ext4, xfs, btrfs)"))
		case "RRO":
			findings = append(findings, unless("recursive read-only", f.Value == "true", found,
				"mounts with recursiveReadOnly are refused", "run Linux 5.12 or later"))
		case "Seccomp":
			findings = append(findings, unless("seccomp", f.Value == "true", found,
				"containers cannot have a system call filter", "run a kernel with CONFIG_SECCOMP_FILTER"))
		case "AppArmor", "SELinux":
			// Either, or none, is an operator's choice.
			findings = append(findings, ok(f.Name, "%s", found))
		case "NofileHard":
			most, err := strconv.ParseUint(f.Value, 10, 64)
			findings = append(findings, unless("open files", err == nil && most >= nofileHard, found,
				fmt.Sprintf("containers get this and not the %d of runtime.nofile_hard", nofileHard),
				"raise podshim's own limit (LimitNOFILE in a systemd unit)"))
		}
	}
	return findings
}

func version() Finding {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return failure("version", err.Error(), "this is not Linux as podshim knows it", "run Linux")
	}
	return judgeVersion(unix.ByteSliceToString(uts.Release[:]))
}

// judgeVersion takes what uname -r prints.
func judgeVersion(release string) Finding {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return warning("version", release, "whether it is new enough is not known", "")
	}
	if major < oldestMajor || major == oldestMajor && minor < oldestMinor {
		return warning("version", release, "podshim is not tested on kernels this old",
			fmt.Sprintf("run Linux %d.%d or later", oldestMajor, oldestMinor))
	}
	return ok("version", "%s", release)
}

// namespaces looks for the kinds of namespaces in dir (/proc/self/ns).
func namespaces(dir string) []Finding {
	var missing []string
	for _, kind := range []string{"ipc", "mnt", "net", "pid", "uts"} {
		if _, err := os.Lstat(filepath.Join(dir, kind)); err != nil {
			missing = append(missing, kind)
		}
	}
	if len(missing) > 0 {
		return []Finding{failure("namespaces", "missing: "+strings.Join(missing, ", "),
			"a pod is made of these", "run a kernel with CONFIG_NAMESPACES and all below it")}
	}
	findings := []Finding{ok("namespaces", "ipc, mnt, net, pid, uts")}
	if _, err := os.Lstat(filepath.Join(dir, "cgroup")); err != nil {
		findings = append(findings, warning("cgroup namespaces", "missing",
			"containers see the host's cgroup paths", "run a kernel with CONFIG_CGROUPS, 4.6 or later"))
	}
	return findings
}

func pidfd() error {
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return fmt.Errorf("pidfd_open: %w", err)
	}
	return unix.Close(fd)
}

// pidfdExit reads the exit of a process that was reaped before through a pidfd
// (PIDFD_INFO_EXIT in linux/pidfd.h).
func pidfdExit() error {
	fd, err := deadChild()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.PIDFD_GET_INFO, uintptr(unsafe.Pointer(&info))); errno != 0 {
		return fmt.Errorf("PIDFD_GET_INFO: %w", errno)
	}
	status := syscall.WaitStatus(info.Exit_code)
	if info.Mask&unix.PIDFD_INFO_EXIT == 0 || !status.Signaled() || status.Signal() != syscall.SIGKILL {
		return errors.New("PIDFD_GET_INFO does not tell the exit of a process that was reaped")
	}
	return nil
}

// deadChild returns a pidfd of a child that was killed and reaped. The child is
// this executable, traced: it stops at the end of execve(2), before its first
// instruction.
func deadChild() (fd int, err error) {
	// A tracer is a thread, not a process (ptrace(2)).
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	fd = -1
	child, err := os.StartProcess("/proc/self/exe", []string{"podshim-check"}, &os.ProcAttr{
		Env: []string{},
		Sys: &syscall.SysProcAttr{Ptrace: true, PidFD: &fd, Pdeathsig: syscall.SIGKILL},
	})
	if err != nil {
		return -1, fmt.Errorf("start a child: %w", err)
	}
	pid := child.Pid
	err = errors.Join(child.Kill(), child.Release())
	for err == nil {
		var status unix.WaitStatus
		_, err = unix.Wait4(pid, &status, unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			err = nil
			continue
		}
		if err == nil && (status.Exited() || status.Signaled()) {
			break
		}
	}
	if err == nil && fd < 0 {
		err = errors.New("clone gives no pidfd")
	}
	if err != nil && fd >= 0 {
		unix.Close(fd)
	}
	return fd, err
}

func openat2() error {
	fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return fmt.Errorf("openat2: %w", err)
	}
	return unix.Close(fd)
}

// overlay mounts an overlay of two lower directories where podshim's layers
// would be, and writes to it.
func overlay(root string) Finding {
	dir := nearest(root)
	err := tryOverlay(dir)
	f := need("overlayfs", err, "container root filesystems cannot be made",
		"load the module (modprobe overlay), and have root ("+root+") on ext4, xfs or btrfs, not on overlayfs itself")
	if err == nil {
		f.Found = "works on " + dir
	}
	return f
}

func tryOverlay(parent string) (err error) {
	dir, err := os.MkdirTemp(parent, ".podshim-check-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for _, sub := range []string{"lower1", "lower2", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			return err
		}
	}
	merged := filepath.Join(dir, "merged")
	options := fmt.Sprintf("lowerdir=%[1]s/lower2:%[1]s/lower1,upperdir=%[1]s/upper,workdir=%[1]s/work,volatile", dir)
	if err := unix.Mount("overlay", merged, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Unmount(merged, unix.MNT_DETACH)) }()
	if err := os.WriteFile(filepath.Join(merged, "file"), nil, 0o600); err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(dir, "upper", "file"))
	return err
}

func userNamespace() Finding {
	ns, err := mount.GetUsernsFD("0:100000:65536", "0:100000:65536")
	if err == nil {
		err = ns.Close()
	}
	return want("user namespaces", err, "pods with a user namespace (hostUsers: false) are refused",
		"run a kernel with CONFIG_USER_NS and sysctl user.max_user_namespaces above 0")
}

// messageQueues looks for mqueue in the list at path: every container has one
// at /dev/mqueue.
func messageQueues(path string) Finding {
	list, err := os.ReadFile(path)
	if err == nil && !strings.Contains(string(list), "\tmqueue\n") {
		err = errors.New("mqueue is not a filesystem of this kernel")
	}
	return need("message queues", err, "containers have a /dev/mqueue and cannot be started without", "run a kernel with CONFIG_POSIX_MQUEUE")
}

// memfd reads vm.memfd_noexec: podmon is run from a sealed memfd, which no
// container can write to (CVE-2019-5736).
func memfd(path string) Finding {
	v, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return ok("executable memfd", "always allowed") // before Linux 6.3
	}
	if err != nil {
		return warning("executable memfd", err.Error(), "podmon may not start", "")
	}
	if s := strings.TrimSpace(string(v)); s == "2" {
		return failure("executable memfd", "forbidden (vm.memfd_noexec = 2)", "podmon is run from one", "sysctl -w vm.memfd_noexec=1")
	}
	return ok("executable memfd", "allowed")
}
