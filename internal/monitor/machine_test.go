package monitor_test

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor"
)

var podmonBinary string

func TestMain(m *testing.M) {
	if dir := os.Getenv(guardedDir); dir != "" {
		guard(dir)
		return
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "podmon-test")
	if err != nil {
		panic(err)
	}
	// All test directories are in here, and all podmons' run directories.
	if err := os.Setenv("TMPDIR", dir); err != nil {
		panic(err)
	}
	defer startGuard(dir)()
	podmonBinary = filepath.Join(dir, "podmon")
	build := exec.Command("go", "build", "-tags", "seccomp,netgo,osusergo", "-ldflags", "-s -w -extldflags=-static",
		"-o", podmonBinary, "github.com/podshim/podshim/cmd/podmon")
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "build podmon: %v\n%s", err, out)
		return 1
	}
	return m.Run()
}

// guardedDir tells this program in its environment that it is the guard of the tests
// that work in that directory.
const guardedDir = "PODMON_TEST_GUARD"

// startGuard starts a process that takes down what the tests have made when they are
// killed or interrupted: podmon and containers are made to outlive whoever starts
// them. The returned function ends it at the tests' end.
func startGuard(dir string) (end func()) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), guardedDir+"="+dir)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Ctrl-C is not for it
	open, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		panic(err)
	}
	return func() {
		open.Close()
		_ = cmd.Wait()
	}
}

// guard waits for the end of its parent, however that comes, and takes down what is
// left: podmons first, so that nothing is started any more, then containers, and files.
func guard(dir string) {
	parent := os.Getppid()
	_, _ = io.Copy(io.Discard, os.Stdin)
	for _, pid := range podmonsIn(dir) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	for {
		left, _ := filepath.Glob(cgroupsOf(parent))
		if len(left) == 0 {
			break
		}
		for _, root := range left {
			dirs := []string{}
			_ = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
				if err == nil && e.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			for _, dir := range slices.Backward(dirs) {
				procs, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
				for _, pid := range strings.Fields(string(procs)) {
					if n, err := strconv.Atoi(pid); err == nil && n > 0 {
						_ = syscall.Kill(n, syscall.SIGKILL)
					}
				}
				_ = os.Remove(dir)
			}
		}
	}
	_ = os.RemoveAll(dir)
}

// cgroupsOf matches the cgroups of a test process's containers in all hierarchies.
func cgroupsOf(pid int) string { return fmt.Sprintf("/sys/fs/cgroup/*/podmon-test-%d-*", pid) }

// machine is a Monitor on directories and cgroups of its own.
type machine struct {
	*monitor.Monitor
	t      testing.TB
	o      monitor.Options
	rootfs string
	logs   string
	cgroup string // parent of all containers
	exits  map[string]monitor.Exit
	n      int
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox (Debian: busybox-static)")
	}
	m := &machine{t: t, logs: t.TempDir(), rootfs: t.TempDir(), exits: map[string]monitor.Exit{}}
	for _, dir := range []string{"bin", "proc", "dev", "tmp", "sys"} {
		must(t, os.Mkdir(filepath.Join(m.rootfs, dir), 0o755))
	}
	copyProgram(t, busybox, m.rootfs)
	for _, applet := range []string{"sh", "mkdir", "sleep", "echo", "cat", "true", "kill", "setsid", "stty", "dd", "tail", "id", "seq", "tty", "ls"} {
		must(t, os.Symlink("busybox", filepath.Join(m.rootfs, "bin", applet)))
	}
	must(t, os.WriteFile(filepath.Join(m.rootfs, "bin/plain"), []byte("no program"), 0o644))
	m.cgroup = fmt.Sprintf("/podmon-test-%d-%s", os.Getpid(), filepath.Base(filepath.Dir(m.logs))[:8])
	m.o = monitor.Options{
		RunDir: t.TempDir(), Binary: podmonBinary,
		PingInterval: 100 * time.Millisecond, PingTimeout: 2 * time.Second,
		Log: logrus.NewEntry(logrus.New()),
	}
	m.connect()
	t.Cleanup(m.clean)
	return m
}

// copyProgram puts a program and the libraries it says it needs into a rootfs.
func copyProgram(t testing.TB, program, rootfs string) {
	t.Helper()
	install := func(from, to string) {
		b, err := os.ReadFile(from)
		must(t, err)
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(rootfs, to)), 0o755))
		must(t, os.WriteFile(filepath.Join(rootfs, to), b, 0o755))
	}
	install(program, "bin/busybox")
	libs, _ := exec.Command("ldd", program).Output() // a static one is an error
	for _, word := range strings.Fields(string(libs)) {
		if strings.HasPrefix(word, "/") {
			install(word, word)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (m *machine) connect() {
	m.t.Helper()
	var err error
	m.Monitor, err = monitor.New(m.t.Context(), m.o)
	must(m.t, err)
}

func (m *machine) clean() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, s := range m.List() {
		if err := m.Delete(ctx, s.ID); err != nil {
			m.t.Error(err)
		}
	}
	if left, _ := os.ReadDir(filepath.Join(m.o.RunDir, "containers")); len(left) > 0 {
		m.t.Errorf("left in the run directory: %v", left)
	}
	if left, _ := os.ReadDir(filepath.Join(m.o.RunDir, "state")); len(left) > 0 {
		m.t.Errorf("left in the state directory: %v", left)
	}
	pids := m.podmons()
	must(m.t, m.Close())
	for _, pid := range pids {
		must(m.t, syscall.Kill(pid, syscall.SIGKILL))
		_, _ = syscall.Wait4(pid, nil, 0, nil) // a child unless it was found by a reconnect
	}
	parents, _ := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup)
	for _, dir := range parents {
		if err := os.Remove(dir); err != nil {
			m.t.Errorf("left in the cgroup: %v", err)
		}
	}
}

// podmons finds the podmons of this test's run directory.
func (m *machine) podmons() []int { return podmonsIn(m.o.RunDir) }

// podmonsIn finds the podmons whose run directory is dir, or in it.
func podmonsIn(dir string) (pids []int) {
	cmdlines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range cmdlines {
		b, _ := os.ReadFile(path)
		args := strings.Split(string(b), "\x00")
		if len(args) > 3 && args[1] == "serve" && strings.HasPrefix(args[2]+"/", dir+"/") {
			var pid int
			fmt.Sscanf(path, "/proc/%d/", &pid)
			if !strings.Contains(procStat(pid), ") Z ") {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func procStat(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return string(b)
}

// spec runs args with busybox as its root filesystem.
func (m *machine) spec(id string, args ...string) *specs.Spec {
	return &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: m.rootfs},
		Process: process(args...),
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=755"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"newinstance", "ptmxmode=0666"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"ro", "nosuid", "noexec", "nodev"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		},
		Linux: &specs.Linux{
			CgroupsPath: m.cgroup + "/" + id,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.MountNamespace},
				{Type: specs.IPCNamespace}, {Type: specs.UTSNamespace},
			},
			Resources: &specs.LinuxResources{},
		},
	}
}

func process(args ...string) *specs.Process {
	caps := []string{"CAP_KILL", "CAP_CHOWN", "CAP_SETUID", "CAP_SETGID"}
	return &specs.Process{
		Args: args, Cwd: "/", Env: []string{"PATH=/bin", "TERM=xterm", "HOME=/"},
		Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
	}
}

// hostPID takes the container's own PID namespace away.
func hostPID(s *specs.Spec) {
	s.Linux.Namespaces = s.Linux.Namespaces[1:]
}

func (m *machine) id() string {
	m.n++
	return fmt.Sprintf("c%d-%d", os.Getpid(), m.n)
}

// start runs a shell script with a log.
func (m *machine) start(script string, edit ...func(*monitor.StartRequest)) (string, monitor.Process) {
	m.t.Helper()
	id := m.id()
	r := monitor.StartRequest{
		ID: id, Spec: m.spec(id, "sh", "-c", script), LogRoot: m.logs, LogPath: id + "/0.log",
	}
	for _, e := range edit {
		e(&r)
	}
	p, err := m.Start(m.t.Context(), r)
	must(m.t, err)
	return id, p
}

// exit waits for a container's exit event.
func (m *machine) exit(id string) monitor.Exit {
	m.t.Helper()
	limit := time.After(30 * time.Second)
	for {
		if e, ok := m.exits[id]; ok {
			return e
		}
		select {
		case e := <-m.Events():
			if _, twice := m.exits[e.ID]; twice {
				m.t.Errorf("second exit event of %s", e.ID)
			}
			m.exits[e.ID] = e.Exit
		case <-limit:
			m.t.Fatalf("no exit of %s", id)
		}
	}
}

// logged returns the container's log without timestamps; it checks those.
func (m *machine) logged(id string) string {
	m.t.Helper()
	return readLog(m.t, filepath.Join(m.logs, id, "0.log"))
}

func readLog(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	var out strings.Builder
	for line := range strings.Lines(string(b)) {
		stamp, rest, ok := strings.Cut(line, " ")
		if _, err := time.Parse(time.RFC3339Nano, stamp); err != nil || !ok {
			t.Fatalf("log line without timestamp: %q", line)
		}
		out.WriteString(rest)
	}
	return out.String()
}

// awaitLog waits until the log contains text.
func (m *machine) awaitLog(id, text string) {
	m.t.Helper()
	path := filepath.Join(m.logs, id, "0.log")
	in, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	must(m.t, err)
	defer unix.Close(in)
	_, err = unix.InotifyAddWatch(in, filepath.Dir(path), unix.IN_MODIFY|unix.IN_CREATE)
	must(m.t, err)
	deadline := time.Now().Add(20 * time.Second)
	for {
		b, _ := os.ReadFile(path)
		if strings.Contains(string(b), text) {
			return
		}
		left := time.Until(deadline).Milliseconds()
		if left <= 0 {
			m.t.Fatalf("log of %s never says %q; it says %q", id, text, b)
		}
		if n, _ := unix.Poll([]unix.PollFd{{Fd: int32(in), Events: unix.POLLIN}}, int(left)); n > 0 {
			_, _ = unix.Read(in, make([]byte, 4096))
		}
	}
}
