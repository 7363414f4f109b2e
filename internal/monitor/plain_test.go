package monitor_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

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

// whose are a process that podmon starts by itself, and the same by libcontainer.
var whose = []func(*specs.Process) *specs.Process{func(p *specs.Process) *specs.Process { return p }, byLibcontainer}

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
			stdout := [2]pipe{newPipe(t), newPipe(t)}
			m.narrow()
			ours, its := m.exec(t, id, p, stdout[0].w), m.exec(t, id, byLibcontainer(p), stdout[1].w)
			var all []map[string]string
			for _, x := range []*monitor.Exec{ours, its} {
				for !strings.HasPrefix(procStat(x.PID), fmt.Sprintf("%d (sleep) S ", x.PID)) {
					time.Sleep(time.Millisecond) // libcontainer answers before it executes the program
				}
				is := looks(t, id, monitor.Process{PID: x.PID})
				is["descriptor 1"], _, _ = strings.Cut(is["descriptor 1"], ":") // each has a pipe of its own
				all = append(all, is)
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
			must(t, unix.Fstat(int(stdout[0].w.Fd()), &st))
			if st.Uid != p.User.UID {
				t.Errorf("its output belongs to user %d", st.Uid)
			}
		})
	}
}

// narrow leaves podmon one CPU, which is not what processes of containers are to have.
func (m *machine) narrow() {
	m.t.Helper()
	var one unix.CPUSet
	one.Set(0)
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", m.podmons()[0]))
	must(m.t, err)
	for _, thread := range threads {
		tid, err := strconv.Atoi(thread.Name())
		must(m.t, err)
		must(m.t, unix.SchedSetaffinity(tid, &one))
	}
}

// children are a process's, zombies too.
func children(t *testing.T, pid int) (list []string) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	must(t, err)
	for _, task := range tasks {
		b, _ := os.ReadFile(task) // of a thread that has ended: none
		list = append(list, strings.Fields(string(b))...)
	}
	return list
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

// A container that may look into other processes, by CAP_SYS_PTRACE, sees nothing of the
// host in one that is about to be executed in it, at whatever moment it stops that.
func TestExecShowsNothingOfTheHost(t *testing.T) {
	m := newMachine(t)
	out, err := exec.Command("gcc", "-O1", "-static", "-o", filepath.Join(m.rootfs, "bin/peep"), "testdata/peep.c").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, nil, 0o600))
	id, _ := m.start("exec peep "+secret, func(r *monitor.StartRequest) {
		caps := append([]string{"CAP_SYS_PTRACE"}, r.Spec.Process.Capabilities.Bounding...)
		r.Spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	})
	m.awaitLog(id, "looks")
	for range 40 {
		x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: process("true")})
		must(t, err)
		_, err = x.Wait(t.Context())
		must(t, err)
	}
	log := m.logged(id)
	if strings.Contains(log, "the host's file") {
		t.Errorf("it has seen %d times what is the host's: %.500s", strings.Count(log, "the host's file"), log)
	}
	if n := strings.Count(log, "looked"); n < 20 { // some are over before they can be stopped
		t.Errorf("it has looked %d times", n)
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
	m.exec(t, id, process("true"), nil).Wait(t.Context())
	before := descriptors(t, m.podmons()[0])
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
			for i, p := range []*specs.Process{p, byLibcontainer(p)} {
				x, err := m.Exec(t.Context(), monitor.ExecRequest{ContainerID: id, Process: p})
				if i == 1 && c.also == "exits" { // by which it shows that it is libcontainer
					must(t, err)
					if e, err := x.Wait(t.Context()); err != nil || e.Code == 0 {
						t.Errorf("exit %+v, %v", e, err)
					}
					continue
				}
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
	podmon := m.podmons()[0]
	if n := descriptors(t, podmon); n != before {
		t.Errorf("podmon had %d descriptors, and has %d", before, n)
	}
	if left := children(t, podmon); len(left) != 1 {
		t.Errorf("podmon's children: %v", left)
	}
	left := strings.Fields(readFile(t, filepath.Join("/sys/fs/cgroup/pids", m.cgroup, id, "cgroup.procs")))
	if len(left) != 1 {
		t.Errorf("left in the container: %v", left)
	}
}

// A container with a seccomp profile, which podmon executes itself in the end, is as
// libcontainer starts it, and so is what is executed in it; with the same filter.
func TestFilteredIsWhatLibcontainerMakes(t *testing.T) {
	for name, edit := range map[string]func(*specs.Spec){
		"as it is":          func(*specs.Spec) {},
		"no new privileges": func(s *specs.Spec) { s.Process.NoNewPrivileges = true },
		"user and groups": func(s *specs.Spec) {
			s.Process.User = specs.User{UID: 1234, GID: 567, AdditionalGids: []uint32{8, 9}}
			s.Process.Capabilities.Inheritable, s.Process.Capabilities.Ambient = []string{"CAP_KILL"}, []string{"CAP_KILL"}
		},
		"no capabilities, a directory that is to be made, a read-only root": func(s *specs.Spec) {
			s.Process.Capabilities, s.Process.Cwd = &specs.LinuxCapabilities{}, "/made/by/podmon"
			s.Root.Readonly = true
		},
		"limits": func(s *specs.Spec) {
			score := 321
			s.Process.OOMScoreAdj = &score
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 66, Hard: 88}, {Type: "RLIMIT_CORE"}}
		},
		"a terminal": func(s *specs.Spec) { s.Process.Terminal = true },
		"a profile with flags": func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{
				DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog},
				Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir"}, Action: specs.ActErrno}},
			}
		},
		"a profile that logs what a start needs no more": func(s *specs.Spec) {
			s.Process.NoNewPrivileges = true
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
				{Names: []string{"setuid", "setgid", "setgroups", "capset", "prctl", "sendto", "chdir"}, Action: specs.ActKillProcess},
			}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			var seen, execs []map[string]string
			var code [][]unix.SockFilter
			for _, by := range whose {
				var forExec specs.Process
				id, p := m.start("", func(r *monitor.StartRequest) {
					filtered(t)(r)
					edit(r.Spec)
					r.Spec.Process.Args = []string{"sleep", "1000"}
					forExec = *r.Spec.Process
					forExec.Terminal = false
					r.Spec.Process = by(r.Spec.Process)
				})
				x := m.exec(t, id, by(&forExec), nil)
				for _, pid := range []int{p.PID, x.PID} {
					for !strings.HasPrefix(procStat(pid), fmt.Sprintf("%d (sleep) S ", pid)) {
						time.Sleep(time.Millisecond) // libcontainer answers before it executes the program
					}
					code = append(code, filterOf(t, pid))
				}
				seen, execs = append(seen, looks(t, id, p)), append(execs, looks(t, id, monitor.Process{PID: x.PID}))
			}
			for _, is := range slices.Concat(seen, execs) {
				delete(is, "State")           // it was stopped a moment ago, for filterOf
				for what, value := range is { // pipes and terminals are each container's own
					if strings.HasPrefix(what, "descriptor ") {
						is[what] = strings.TrimRight(strings.ReplaceAll(value, m.o.RunDir, ""), "0123456789[]")
						if i := strings.Index(is[what], "/containers/"); i >= 0 {
							is[what] = filepath.Base(value)
						}
					}
				}
			}
			compare(t, seen[0], seen[1])
			compare(t, execs[0], execs[1])
			if seen[0]["Seccomp"] != "2" || seen[0]["Seccomp_filters"] != "1" || execs[0]["Seccomp"] != "2" {
				t.Errorf("no filter: %v", seen[0])
			}
			if !slices.Equal(code[0], code[1]) {
				t.Error("podmon has installed two different filters")
			}
			sameVerdicts(t, code[0], code[2])
			sameVerdicts(t, code[1], code[3])
		})
	}
}

// sameVerdicts compares two filters by what they say of system calls: libcontainer makes one
// of another order of the same profile each time.
func sameVerdicts(t *testing.T, ours, its []unix.SockFilter) {
	t.Helper()
	values := []uint64{0, 1, 2, 8, 0x20000, 0x20008, 0xffffffff, unix.CLONE_NEWUSER, unix.CLONE_NEWNS, 40, 16}
	verdicts := map[uint32]int{}
	for _, arch := range []uint32{unix.AUDIT_ARCH_X86_64, unix.AUDIT_ARCH_I386, unix.AUDIT_ARCH_AARCH64, unix.AUDIT_ARCH_ARM} {
		for number := range uint32(1200) {
			for _, number := range []uint32{number, number | 0x40000000} {
				for _, value := range values {
					call := [16]uint32{0: number, 1: arch, 4: uint32(value), 6: uint32(value), 8: uint32(value)}
					a, b := verdict(ours, call), verdict(its, call)
					if a != b {
						t.Fatalf("call %d of architecture %#x with %#x: %#x, by libcontainer %#x", number, arch, value, a, b)
					}
					verdicts[a]++
				}
			}
		}
	}
	if len(verdicts) < 2 {
		t.Errorf("the same for every call: %v", verdicts)
	}
}

// verdict runs a filter on struct seccomp_data, as words.
func verdict(code []unix.SockFilter, data [16]uint32) uint32 {
	var a uint32
	for pc := 0; pc < len(code); pc++ {
		op := code[pc]
		jump := func(yes bool) {
			if yes {
				pc += int(op.Jt)
			} else {
				pc += int(op.Jf)
			}
		}
		switch op.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = data[op.K/4]
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= op.K
		case unix.BPF_JMP | unix.BPF_JA:
			pc += int(op.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump(a == op.K)
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			jump(a > op.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			jump(a >= op.K)
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			jump(a&op.K != 0)
		case unix.BPF_RET | unix.BPF_K:
			return op.K
		default:
			panic(fmt.Sprintf("instruction %#x", op.Code))
		}
	}
	panic("a filter without an end")
}

// filterOf reads a process's seccomp filter from the kernel, the oldest one.
func filterOf(t *testing.T, pid int) []unix.SockFilter {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	must(t, unix.PtraceSeize(pid))
	must(t, unix.PtraceInterrupt(pid))
	var status unix.WaitStatus
	_, err := unix.Wait4(pid, &status, unix.WALL, nil)
	must(t, err)
	code := make([]unix.SockFilter, 4096)
	n, _, errno := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SECCOMP_GET_FILTER, uintptr(pid), 0, uintptr(unsafe.Pointer(&code[0])), 0, 0)
	if errno != 0 {
		t.Errorf("read the filter of process %d: %v", pid, errno)
		n = 0
	}
	must(t, unix.PtraceDetach(pid))
	return code[:n]
}

// A start under a filter is refused as by libcontainer, and leaves nothing.
func TestFilteredRefuses(t *testing.T) {
	for name, edit := range map[string]func(*specs.Process){
		"no format":              func(p *specs.Process) { p.Args = []string{"/bin/script"} }, // which libcontainer does not tell
		"no such program":        func(p *specs.Process) { p.Args = []string{"nonesuch"} },
		"a directory":            func(p *specs.Process) { p.Args = []string{"/bin"} },
		"no program":             func(p *specs.Process) { p.Args = []string{"/bin/plain"} },
		"none in a relative one": func(p *specs.Process) { p.Args, p.Env[0] = []string{"sleep"}, "PATH=bin" },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			must(t, os.WriteFile(filepath.Join(m.rootfs, "bin/script"), []byte("no program"), 0o755))
			var said []string
			for i, by := range []func(*specs.Process) *specs.Process{func(p *specs.Process) *specs.Process { return p }, byLibcontainer} {
				id := m.id()
				r := monitor.StartRequest{ID: id, Spec: m.spec(id, "sleep", "1000"), LogRoot: m.logs, LogPath: id + "/0.log"}
				filtered(t)(&r)
				edit(r.Spec.Process)
				r.Spec.Process = by(r.Spec.Process)
				_, err := m.Start(t.Context(), r)
				if i == 1 && name == "no format" {
					must(t, err)
					if e := m.exit(id); e.Code == 0 {
						t.Errorf("exit %+v", e)
					}
					return
				}
				if err == nil {
					t.Fatal("it is started")
				}
				said = append(said, err.Error())
			}
			if said[0] != said[1] {
				t.Errorf("%q, by libcontainer %q", said[0], said[1])
			}
		})
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

// BenchmarkByWhom is a start of a container and an exec there, without a filter and with the
// default one, by podmon itself and by libcontainer in turns.
func BenchmarkByWhom(b *testing.B) {
	m := newMachine(b)
	s := steps{}
	for b.Loop() {
		for _, filter := range []string{"plain", "filtered"} {
			for i, by := range whose {
				name := [...]string{"podmon", "libcontainer"}[i]
				var id string
				apart()
				s.time(filter+"-start-"+name, func() {
					id, _ = m.start("exec sleep 1000", func(r *monitor.StartRequest) {
						if filter == "filtered" {
							filtered(b)(r)
						}
						r.Spec.Process = by(r.Spec.Process)
					})
				})
				apart()
				s.time(filter+"-exec-"+name, func() {
					x, err := m.Exec(b.Context(), monitor.ExecRequest{ContainerID: id, Process: by(process("true"))})
					must(b, err)
					if e, err := x.Wait(b.Context()); err != nil || e.Code != 0 {
						b.Fatalf("%+v, %v", e, err)
					}
				})
				must(b, m.Delete(b.Context(), id))
			}
		}
	}
	s.report(b)
}
