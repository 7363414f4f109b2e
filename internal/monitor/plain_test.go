package monitor_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor"
)

// byLibcontainer is the same process for which libcontainer has to look up HOME, which
// podmon leaves to it.
func byLibcontainer(p *specs.Process) *specs.Process {
	same := *p
	same.Env = slices.DeleteFunc(slices.Clone(p.Env), func(kv string) bool { return strings.HasPrefix(kv, "HOME=") })
	return &same
}

// exec starts a process and ends it with the test.
func (m *machine) exec(t *testing.T, id string, p *specs.Process, stdout *os.File) *monitor.Exec {
	t.Helper()
	x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: p, Stdout: stdout})
	must(t, err)
	t.Cleanup(func() {
		must(t, x.Kill(unix.SIGKILL))
		_, _ = x.Wait(t.Context())
	})
	return x
}

// What podmon executes by itself in a container is as what libcontainer executes there.
func TestExecIsWhatLibcontainerMakes(t *testing.T) {
	type edits struct {
		container func(*specs.Spec)
		process   func(*specs.Process)
	}
	for name, edit := range map[string]edits{
		"as it is": {},
		"user and groups": {process: func(p *specs.Process) {
			p.User = specs.User{UID: 1234, GID: 567, AdditionalGids: []uint32{8, 9}}
		}},
		"user with capabilities": {process: func(p *specs.Process) {
			p.User = specs.User{UID: 1234, GID: 567}
			p.Capabilities.Inheritable, p.Capabilities.Ambient = []string{"CAP_KILL", "CAP_CHOWN"}, []string{"CAP_KILL"}
			p.Capabilities.Bounding = append(p.Capabilities.Bounding, "CAP_SYS_PTRACE", "CAP_NO_SUCH")
		}},
		"an ambient capability that cannot be": {process: func(p *specs.Process) { p.Capabilities.Ambient = []string{"CAP_KILL"} }},
		"no capabilities":                      {process: func(p *specs.Process) { p.Capabilities = &specs.LinuxCapabilities{} }},
		"no new privileges":                    {process: func(p *specs.Process) { p.NoNewPrivileges = true }},
		"limits": {process: func(p *specs.Process) {
			p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 77, Hard: 99}, {Type: "RLIMIT_CORE"}}
		}},
		"limits of the container": {container: func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 66, Hard: 88}}
		}},
		"OOM score":         {container: func(s *specs.Spec) { score := 321; s.Process.OOMScoreAdj = &score }},
		"working directory": {process: func(p *specs.Process) { p.Cwd = "/tmp" }},
		"directory that is the user's alone": {process: func(p *specs.Process) {
			p.Cwd, p.User = "/tmp/own", specs.User{UID: 1234, GID: 567}
		}},
		"a variable twice": {process: func(p *specs.Process) { p.Env = append([]string{"A=1", "B=2", "A=3", "EMPTY="}, p.Env...) }},
		"a large environment": {process: func(p *specs.Process) {
			for i := range 40 {
				p.Env = append([]string{fmt.Sprintf("V%d=%s", i, strings.Repeat("x", 10_000))}, p.Env...)
			}
		}},
		"host's PID namespace": {container: hostPID},
		"a cgroup namespace": {container: func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
		}},
		"a network namespace": {container: func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
		}},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			own := filepath.Join(m.rootfs, "tmp/own")
			must(t, os.Mkdir(own, 0o700))
			must(t, os.Chown(own, 1234, 567))
			id, init := m.start("exec sleep 1000", func(r *monitor.StartRequest) {
				if edit.container != nil {
					edit.container(r.Spec)
				}
			})
			p := process("sleep", "1000")
			if edit.process != nil {
				edit.process(p)
			}
			stdout := newPipe(t)
			ours, its := m.exec(t, id, p, stdout.w), m.exec(t, id, byLibcontainer(p), stdout.w)
			var all []map[string]string
			for _, x := range []*monitor.Exec{ours, its} {
				for !strings.HasPrefix(procStat(x.PID), fmt.Sprintf("%d (sleep) S ", x.PID)) {
					time.Sleep(time.Millisecond) // libcontainer answers before it executes the program
				}
				all = append(all, looks(t, id, monitor.Process{PID: x.PID}))
			}
			compare(t, all[0], all[1])
			if all[0]["leads its session"] != "true" || all[0]["Threads"] != "1" {
				t.Errorf("it is %v", all[0])
			}
			for _, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "user", "uts"} {
				of := func(pid int) string {
					to, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
					must(t, err)
					return to
				}
				if of(ours.PID) != of(init.PID) {
					t.Errorf("its %s namespace is %s, the container's %s", ns, of(ours.PID), of(init.PID))
				}
			}
			var st unix.Stat_t
			must(t, unix.Fstat(int(stdout.w.Fd()), &st))
			if st.Uid != p.User.UID {
				t.Errorf("its output belongs to user %d", st.Uid)
			}
		})
	}
}

func compare(t *testing.T, ours, its map[string]string) {
	t.Helper()
	for what := range its {
		if _, ok := ours[what]; !ok {
			t.Errorf("%s: none, by libcontainer %.300q", what, its[what])
		}
	}
	for what := range ours {
		if ours[what] != its[what] {
			t.Errorf("%s: %.300q, by libcontainer %.300q", what, ours[what], its[what])
		}
	}
}

// Its keys are the container's, and what it sees of podmon is nothing.
func TestExecHasTheContainersKeys(t *testing.T) {
	m := newMachine(t)
	id, _ := m.start("exec sleep 1000")
	var said []string
	for _, p := range []*specs.Process{process("cat", "/proc/keys"), byLibcontainer(process("cat", "/proc/keys"))} {
		stdout := newPipe(t)
		m.exec(t, id, p, stdout.w)
		stdout.w.Close()
		said = append(said, stdout.all(t))
	}
	if !strings.Contains(said[0], "_ses."+id) {
		t.Errorf("keys %q, by libcontainer %q", said[0], said[1])
	}
}

// What cannot be executed is refused as by libcontainer, to callers and in words.
func TestExecRefuses(t *testing.T) {
	m := newMachine(t)
	must(t, os.WriteFile(filepath.Join(m.rootfs, "bin/broken"), []byte("#!/no/such/shell\n"), 0o755))
	must(t, os.WriteFile(filepath.Join(m.rootfs, "bin/script"), []byte("no program"), 0o755))
	id, _ := m.start("exec sleep 1000")
	for name, c := range map[string]struct {
		edit func(*specs.Process)
		want error // nil is any
		// By libcontainer as well: in its words; with another error; it says nothing and the
		// process exits.
		also string
	}{
		"no such program":           {func(p *specs.Process) { p.Args = []string{"nonesuch"} }, monitor.ErrNoExecutable, "same"},
		"no such path":              {func(p *specs.Process) { p.Args = []string{"/bin/nonesuch"} }, monitor.ErrNoExecutable, "other"},
		"a directory":               {func(p *specs.Process) { p.Args = []string{"/bin"} }, monitor.ErrNotExecutable, "same"},
		"no program":                {func(p *specs.Process) { p.Args = []string{"/bin/plain"} }, monitor.ErrNotExecutable, "same"},
		"no format":                 {func(p *specs.Process) { p.Args = []string{"/bin/script"} }, monitor.ErrNotExecutable, "exits"},
		"no interpreter":            {func(p *specs.Process) { p.Args = []string{"/bin/broken"} }, monitor.ErrNoExecutable, "exits"},
		"none in a relative one":    {func(p *specs.Process) { p.Args, p.Env[0], p.Cwd = []string{"sleep"}, "PATH=bin", "/" }, nil, "same"},
		"no PATH":                   {func(p *specs.Process) { p.Env = p.Env[1:] }, monitor.ErrNoExecutable, "same"},
		"no such directory":         {func(p *specs.Process) { p.Cwd = "/nonesuch" }, nil, "other"},
		"a directory of the host":   {func(p *specs.Process) { p.Cwd = "/proc/self/fd/3" }, nil, "other"},
		"another of podmon's files": {func(p *specs.Process) { p.Cwd = "/proc/self/fd/5" }, nil, "other"},
		"a limit that is too high": {func(p *specs.Process) {
			p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1 << 40, Hard: 1 << 40}}
		}, nil, "other"},
	} {
		t.Run(name, func(t *testing.T) {
			p := process("sleep", "1000")
			c.edit(p)
			var said []string
			processes := []*specs.Process{p, byLibcontainer(p)}
			if c.also == "exits" {
				processes = processes[:1]
			}
			for _, p := range processes {
				x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: p})
				if err == nil {
					_ = x.Kill(unix.SIGKILL)
					t.Fatal("it is started")
				}
				if c.want != nil && !errors.Is(err, c.want) {
					t.Errorf("%v, want %v", err, c.want)
				}
				said = append(said, err.Error())
			}
			if c.also == "same" && said[0] != said[1] {
				t.Errorf("%q, by libcontainer %q", said[0], said[1])
			}
		})
	}
	left := strings.Fields(readFile(t, filepath.Join("/sys/fs/cgroup/pids", m.cgroup, id, "cgroup.procs")))
	if len(left) != 1 {
		t.Errorf("left in the container: %v", left)
	}
}

// filtered gives a container the default seccomp profile.
func filtered(t testing.TB) func(*monitor.StartRequest) {
	return func(r *monitor.StartRequest) {
		profile, err := seccomp.GetDefaultProfile(r.Spec)
		must(t, err)
		r.Spec.Linux.Seccomp = profile
	}
}

// BenchmarkSeccomp is a start of a container with the default profile, and an exec there.
func BenchmarkSeccomp(b *testing.B) {
	m, s := newMachine(b), steps{}
	for b.Loop() {
		var id string
		apart()
		s.time("start", func() { id, _ = m.start("exec sleep 1000", filtered(b)) })
		apart()
		s.time("exec", func() {
			x, err := m.Exec(b.Context(), monitor.ExecRequest{ContainerID: id, Process: process("true")})
			must(b, err)
			if e, err := x.Wait(b.Context()); err != nil || e.Code != 0 {
				b.Fatalf("%+v, %v", e, err)
			}
		})
		must(b, m.Delete(b.Context(), id))
	}
	s.report(b)
}
