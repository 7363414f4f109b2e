package host

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

func TestFacts(t *testing.T) {
	h, facts, err := Facts(Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range facts {
		t.Logf("%-18s %-10s %s", f.Name, f.Value, f.Why)
		if f.Name == "" || f.Why == "" {
			t.Errorf("a fact without a reason: %+v", f)
		}
	}
	// Each against another source than the one it was read from.
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); (err == nil) != h.CgroupV2 {
		t.Errorf("cgroup v2 %v, but its file: %v", h.CgroupV2, err)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if got := bytes.Contains(status, []byte("Seccomp_filters:")); got != h.Seccomp {
		t.Errorf("seccomp %v, /proc/self/status has filters: %v", h.Seccomp, got)
	}
	if name, _ := exec.Command("uname", "-r").Output(); strings.TrimSpace(string(name)) != h.Kernel {
		t.Errorf("kernel %q, uname says %q", h.Kernel, name)
	}
	if os.Geteuid() == 0 && !slices.Contains(h.Capabilities, "CAP_SYS_ADMIN") {
		t.Errorf("root without CAP_SYS_ADMIN: %v", h.Capabilities)
	}
	for _, d := range h.Devices {
		if strings.HasPrefix(d.Path, "/dev/pts/") || strings.HasPrefix(d.Path, "/dev/shm/") || d.Path == "/dev/console" {
			t.Errorf("%s is not a device to give away", d.Path)
		}
	}
	if !slices.ContainsFunc(facts, func(f Fact) bool { return f.Name == "IDMapMounts" }) {
		t.Error("the last probes are missing")
	}
}

// TestLimitsHold sets what Facts says can be set, on a child.
func TestLimitsHold(t *testing.T) {
	needRoot(t)
	h, _, err := Facts(Options{})
	if err != nil {
		t.Fatal(err)
	}
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = child.Process.Kill()
		_ = child.Wait()
	}()
	limit := unix.Rlimit{Cur: 1024, Max: h.NofileHard}
	if err := unix.Prlimit(child.Process.Pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Errorf("nofile %d: %v", h.NofileHard, err)
	}
	score := filepath.Join("/proc", strconv.Itoa(child.Process.Pid), "oom_score_adj")
	if err := os.WriteFile(score, []byte(strconv.Itoa(h.MinOOMScoreAdj)), 0); err != nil {
		t.Errorf("oom_score_adj %d: %v", h.MinOOMScoreAdj, err)
	}
}

// TestProbesLeaveNothing: no mount, no process, no descriptor. It looks at a whole
// mount table, and therefore from a process with one of its own.
func TestProbesLeaveNothing(t *testing.T) {
	needRoot(t)
	const alone = "PODSHIM_TEST_ALONE"
	if os.Getenv(alone) == "" {
		cmd := exec.Command("/proc/self/exe", "-test.run", "^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), alone+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS} // makes all mounts private
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
		return
	}
	state := func() (string, int) {
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return string(mounts), len(fds)
	}
	dir := t.TempDir()
	_ = probeRRO()
	_ = probeIDMap(dir) // the runtime's own descriptors are open after the first
	goruntime.GC()
	mounts, fds := state()
	for range 3 {
		if err := probeRRO(); err != nil {
			t.Error(err)
		}
		if err := probeIDMap(dir); err != nil {
			t.Error(err)
		}
	}
	if m, f := state(); m != mounts || f != fds {
		t.Errorf("%d descriptors, were %d; mounts equal: %v", f, fds, m == mounts)
	}
	if children, err := os.ReadFile("/proc/thread-self/children"); err == nil && len(children) > 0 {
		t.Errorf("children are left: %s", children)
	}
}

func TestDriver(t *testing.T) {
	if _, _, err := Facts(Options{CgroupDriver: "banana"}); !errors.Is(err, errdefs.ErrInvalidArgument) {
		t.Errorf("unknown driver: %v", err)
	}
	_, err := os.Lstat("/run/systemd/system")
	h, _, ferr := Facts(Options{CgroupDriver: DriverSystemd})
	if err != nil && !errors.Is(ferr, errdefs.ErrFailedPrecondition) {
		t.Errorf("systemd without systemd: %v", ferr)
	}
	if err == nil && !h.SystemdCgroup {
		t.Errorf("systemd asked for, but not taken: %v", ferr)
	}
	if h, _, err := Facts(Options{CgroupDriver: DriverCgroupfs}); err != nil || h.SystemdCgroup {
		t.Errorf("cgroupfs: %v, %v", h.SystemdCgroup, err)
	}
}

func TestPageSize(t *testing.T) {
	for in, want := range map[string]string{
		"hugepages-2048kB": "2MB", "hugepages-1048576kB": "1GB", "hugepages-64kB": "64KB", "hugepages-xkB": "",
	} {
		if got, ok := pageSize(in); got != want || ok != (want != "") {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

func TestSources(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	got, err := Sources([]*runtime.Mount{{HostPath: link}, {HostPath: dir}, {Image: &runtime.ImageSpec{Image: "x"}}})
	if err != nil || len(got) != 2 || got[link].Path != dir || got[dir].Path != dir {
		t.Errorf("%+v, %v", got, err)
	}
	_, err = Sources([]*runtime.Mount{{HostPath: dir}, {HostPath: filepath.Join(dir, "none")}})
	if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.HasPrefix(err.Error(), "mounts[1].host_path: ") {
		t.Errorf("missing path: %v", err)
	}
}

// TestPropagation looks at tmpfs mounts of its own, in a mount namespace of its own.
func TestPropagation(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	failed := make(chan string, 10)
	go func() { // its thread has left the namespace of the others and dies with it
		defer close(failed)
		goruntime.LockOSThread()
		check := func(what string, err error) bool {
			if err != nil {
				failed <- what + ": " + err.Error()
			}
			return err == nil
		}
		if !check("unshare", unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS)) ||
			!check("private root", unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")) ||
			!check("tmpfs", unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k")) ||
			!check("mkdir", os.Mkdir(filepath.Join(dir, "sub"), 0o700)) {
			return
		}
		for _, step := range []struct {
			flag          uintptr
			shared, slave bool
		}{{0, false, false}, {unix.MS_SHARED, true, false}, {unix.MS_SLAVE, false, false}} {
			if step.flag != 0 && !check("propagation", unix.Mount("", dir, "", step.flag, "")) {
				return
			}
			// mountinfo reads /proc/thread-self where the thread is on its own.
			shared, slave, err := propagation(filepath.Join(dir, "sub"))
			if check("propagation", err) && (shared != step.shared || slave != step.slave) {
				failed <- "wrong propagation"
			}
		}
	}()
	for message := range failed {
		t.Error(message)
	}
}

func TestDevices(t *testing.T) {
	config := func(hostPath, containerPath string) *runtime.ContainerConfig {
		return &runtime.ContainerConfig{Devices: []*runtime.Device{{HostPath: hostPath, ContainerPath: containerPath, Permissions: "rw"}}}
	}
	got, err := Devices(config("/dev/null", "/dev/mine"))
	if err != nil || len(got) != 1 || got[0].Path != "/dev/mine" || got[0].Major != 1 || got[0].Minor != 3 || got[0].Access != "rw" || got[0].Type != "c" {
		t.Errorf("%+v, %v", got, err)
	}
	for _, path := range []string{"/dev/no-such-device", "/etc/passwd", t.TempDir()} {
		if _, err := Devices(config(path, "")); !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.HasPrefix(err.Error(), "devices[0].host_path: ") {
			t.Errorf("%s: %v", path, err)
		}
	}
	needRoot(t)
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mknod(filepath.Join(dir, "sub", "zero"), unix.S_IFCHR|0o640, int(unix.Mkdev(1, 5))); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "note"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	got, err = Devices(config(dir, "/dev/group"))
	if err != nil || len(got) != 1 || got[0].Path != "/dev/group/sub/zero" || *got[0].FileMode != 0o640 {
		t.Errorf("directory: %+v, %v", got, err)
	}
}

func TestReadSeccomp(t *testing.T) {
	dir := t.TempDir()
	good, big, fifo := filepath.Join(dir, "good"), filepath.Join(dir, "big"), filepath.Join(dir, "fifo")
	if err := os.WriteFile(good, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(big, make([]byte, maxProfile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := ReadSeccomp(good); err != nil || string(got) != "{}" {
		t.Errorf("%q, %v", got, err)
	}
	for _, path := range []string{big, fifo, dir, filepath.Join(dir, "none")} {
		if _, err := ReadSeccomp(path); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v", path, err)
		}
	}
}

// A parser that hangs is killed at the limit, and the error says so.
func TestParserThatHangs(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, appArmorParser)
	held := filepath.Join(dir, "held")
	if err := unix.Mkfifo(held, 0o600); err != nil {
		t.Fatal(err)
	}
	// The shell itself waits, for a writer that does not come.
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho $$ > "+dir+"/pid\nread x < "+held+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("TMPDIR", dir)
	err := loadProfile("podshim-test", 5*time.Second)
	if !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("a parser that hangs: %v", err)
	}
	pid, err := os.ReadFile(filepath.Join(dir, "pid"))
	if err != nil {
		t.Fatal("it was not run")
	}
	process := filepath.Join("/proc", strings.TrimSpace(string(pid)))
	for until := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(process); errors.Is(err, os.ErrNotExist) {
			break
		}
		if time.Now().After(until) {
			t.Fatalf("parser %s is still there", pid)
		}
	}
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho no such thing >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := loadProfile("podshim-test", time.Minute); err == nil || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("a parser that refuses: %v", err)
	}
	if err := os.WriteFile(script, []byte("#!/bin/sh\ngrep -q 'profile podshim-test ' \"$2\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := loadProfile("podshim-test", time.Minute); err != nil {
		t.Errorf("a parser that loads: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, "podshim-test*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
}
