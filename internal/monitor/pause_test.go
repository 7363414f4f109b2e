package monitor_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/infra"
	"github.com/podshim/podshim/internal/monitor"
	"github.com/podshim/podshim/internal/monitor/wire"
)

// pause asks for an infra container as package spec describes one.
func (m *machine) pause(rootfs string) monitor.StartRequest {
	id, adj := m.id(), 77
	spec := m.spec(id, infra.Path)
	spec.Root, spec.Mounts = &specs.Root{Path: rootfs, Readonly: true}, infra.Mounts(rootfs)
	spec.Hostname = "its-name"
	spec.Process.Env, spec.Process.Capabilities = []string{"PATH=/bin"}, &specs.LinuxCapabilities{}
	spec.Process.NoNewPrivileges, spec.Process.OOMScoreAdj = true, &adj
	return monitor.StartRequest{ID: id, Spec: spec, Discard: true, Pause: true}
}

func (m *machine) startPause(edit ...func(*monitor.StartRequest)) (string, monitor.Process) {
	m.t.Helper()
	rootfs, err := infra.Install(filepath.Join(m.t.TempDir(), "infra"))
	must(m.t, err)
	r := m.pause(rootfs)
	for _, e := range edit {
		e(&r)
	}
	p, err := m.Start(m.t.Context(), r)
	must(m.t, err)
	return r.ID, p
}

// looks is what the kernel says of a process that tells how it is confined.
func looks(t *testing.T, id string, p monitor.Process) map[string]string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/", p.PID)
	read := func(name string) string {
		b, err := os.ReadFile(dir + name)
		must(t, err)
		return string(b)
	}
	link := func(name string) string {
		to, err := os.Readlink(dir + name)
		must(t, err)
		return to
	}
	is := map[string]string{
		"exe": link("exe"), "cwd": link("cwd"), "root": link("root"), "args": read("cmdline"),
		"environment":   strings.TrimSuffix(read("environ"), "HOME=/\x00"), // libcontainer's addition
		"oom_score_adj": read("oom_score_adj"), "limits": read("limits"),
		"cgroups": strings.ReplaceAll(read("cgroup"), id, "ID"),
	}
	for line := range strings.Lines(read("status")) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		if slices.Contains([]string{
			"Name", "Umask", "State", "PPid", "TracerPid", "Uid", "Gid", "Groups", "Threads", "SigBlk", "SigIgn", "SigCgt",
			"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs", "Seccomp", "Seccomp_filters", "Cpus_allowed",
		}, name) {
			is[name] = value
		}
	}
	for _, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} {
		own, err := os.Readlink("/proc/self/ns/" + ns)
		must(t, err)
		is["has the host's "+ns+" namespace"] = fmt.Sprint(link("ns/"+ns) == own)
	}
	fds, err := os.ReadDir(dir + "fd")
	must(t, err)
	for _, fd := range fds {
		is["descriptor "+fd.Name()] = link("fd/" + fd.Name())
	}
	stat := strings.Fields(read("stat")[strings.LastIndex(read("stat"), ")")+1:])
	is["leads its session"] = fmt.Sprint(stat[3] == fmt.Sprint(p.PID))
	var st unix.Stat_t
	must(t, unix.Stat(dir, &st))
	is["owner of its /proc"] = fmt.Sprint(st.Uid) // root's when it is not dumpable
	return is
}

// mounts are a process's mount points, with their options.
func mounts(t *testing.T, p monitor.Process) (list []string) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p.PID))
	must(t, err)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		list = append(list, f[4]+" "+f[5])
	}
	return list
}

func hostnameIn(t *testing.T, p monitor.Process) string {
	t.Helper()
	out, err := exec.Command("nsenter", "-t", fmt.Sprint(p.PID), "-u", "hostname").Output()
	must(t, err)
	return strings.TrimSpace(string(out))
}

// What podmon starts by itself is confined as what libcontainer starts from the same spec,
// and has no mounts but its root.
func TestPauseIsWhatLibcontainerMakes(t *testing.T) {
	other := exec.Command("unshare", "-n", "sleep", "1000")
	must(t, other.Start())
	defer func() {
		must(t, other.Process.Kill())
		_ = other.Wait()
	}()
	netns := fmt.Sprintf("/proc/%d/ns/net", other.Process.Pid)
	for own, _ := os.Readlink("/proc/self/ns/net"); ; time.Sleep(time.Millisecond) {
		if its, err := os.Readlink(netns); err == nil && its != own {
			break
		}
	}
	for name, edit := range map[string]func(*specs.Spec){
		"as it is": func(*specs.Spec) {},
		"user and groups": func(s *specs.Spec) {
			s.Process.User = specs.User{UID: 1234, GID: 567, AdditionalGids: []uint32{8, 9}}
		},
		"host's PID and UTS namespaces": func(s *specs.Spec) {
			s.Hostname = ""
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
				return ns.Type == specs.PIDNamespace || ns.Type == specs.UTSNamespace
			})
		},
		"another's network namespace": func(s *specs.Spec) {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: netns})
		},
		"limits": func(s *specs.Spec) {
			shares, limit := uint64(2), int64(7)
			s.Linux.Resources = &specs.LinuxResources{
				CPU: &specs.LinuxCPU{Shares: &shares}, Pids: &specs.LinuxPids{Limit: &limit},
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
			}
		},
		"seccomp profile": func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{
				{Names: []string{"mount"}, Action: specs.ActErrno},
			}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.narrow() // podmon's CPUs are not the pod's
			by := func(pause bool) (string, monitor.Process) {
				return m.startPause(func(r *monitor.StartRequest) {
					edit(r.Spec)
					r.Pause = pause
				})
			}
			id, ours := by(true)
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", ours.PID)); err != nil || exe != infra.Path {
				t.Errorf("it is started, and runs %q: %v", exe, err)
			}
			// By which an older podmon takes it over, and one that finds its record damaged.
			var state struct {
				PID int `json:"init_process_pid"`
			}
			b, err := os.ReadFile(filepath.Join(m.o.RunDir, "state", id, "state.json"))
			must(t, err)
			if err := json.Unmarshal(b, &state); err != nil || state.PID != ours.PID {
				t.Errorf("libcontainer knows %+v, not process %d: %v", state, ours.PID, err)
			}
			other, its := by(false)
			for _, p := range []monitor.Process{ours, its} {
				for !strings.HasPrefix(procStat(p.PID), fmt.Sprintf("%d (pause) S ", p.PID)) {
					time.Sleep(time.Millisecond) // libcontainer answers before it executes the program
				}
			}
			got, want := looks(t, id, ours), looks(t, other, its)
			for what := range want {
				if got[what] != want[what] {
					t.Errorf("%s: %q, by libcontainer %q", what, got[what], want[what])
				}
			}
			for what := range got {
				if _, ok := want[what]; !ok {
					t.Errorf("%s: %q, by libcontainer none", what, got[what])
				}
			}
			if a, b := limitsOf(t, m, id), limitsOf(t, m, other); !reflect.DeepEqual(a, b) {
				t.Errorf("cgroup files %v, by libcontainer %v", a, b)
			}
			if a, b := hostnameIn(t, ours), hostnameIn(t, its); a != b {
				t.Errorf("host name %q, by libcontainer %q", a, b)
			}
			if all := mounts(t, ours); len(all) != 1 || !strings.HasPrefix(all[0], "/ ro,nosuid,nodev") {
				t.Errorf("mounts %q, want the root alone", all)
			}
			if all := mounts(t, its); len(all) != 3 {
				t.Errorf("libcontainer has mounted %q", all)
			}
			must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
			if e := m.exit(id); !e.Known || e.Code != 0 {
				t.Errorf("exit %+v, want 0", e)
			}
		})
	}
}

// limitsOf reads what a spec can set.
func limitsOf(t *testing.T, m *machine, id string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, f := range []string{"cpu/cpu.shares", "pids/pids.max", "devices/devices.list", "memory/memory.limit_in_bytes", "cpuset/cpuset.cpus"} {
		controller, name := filepath.Split(f)
		if b, err := os.ReadFile(filepath.Join("/sys/fs/cgroup", controller, m.cgroup, id, name)); err == nil {
			out[f] = string(b)
		}
	}
	return out
}

// A spec that asks for more than podmon does by itself goes to libcontainer.
func TestPauseWithMore(t *testing.T) {
	for name, edit := range map[string]func(*machine, *monitor.StartRequest){
		"sysctls": func(_ *machine, r *monitor.StartRequest) {
			r.Spec.Linux.Sysctl = map[string]string{"kernel.shm_rmid_forced": "1"}
		},
		"capabilities": func(_ *machine, r *monitor.StartRequest) {
			r.Spec.Process.Capabilities.Bounding = []string{"CAP_KILL"}
		},
		"many groups": func(_ *machine, r *monitor.StartRequest) {
			for gid := range uint32(65) {
				r.Spec.Process.User.AdditionalGids = append(r.Spec.Process.User.AdditionalGids, gid+1)
			}
		},
		"directory": func(_ *machine, r *monitor.StartRequest) { r.Spec.Process.Cwd = "/dev" },
		"log": func(m *machine, r *monitor.StartRequest) {
			r.Discard, r.LogRoot, r.LogPath = false, m.logs, "0.log"
		},
		"limits of its own": func(_ *machine, r *monitor.StartRequest) {
			r.Spec.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}}
		},
		"hook": func(_ *machine, r *monitor.StartRequest) {
			r.Spec.Hooks = &specs.Hooks{Poststart: []specs.Hook{{Path: "/bin/true"}}}
		},
		"network namespace": func(_ *machine, r *monitor.StartRequest) {
			r.Spec.Linux.Namespaces = append(r.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace})
		},
		"image": func(_ *machine, r *monitor.StartRequest) { r.Pause = false },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			_, p := m.startPause(func(r *monitor.StartRequest) { edit(m, r) })
			if all := mounts(t, p); len(all) < 3 {
				t.Errorf("not started by libcontainer: mounts %q", all)
			}
		})
	}
}

// With a seccomp profile in its spec, nothing is left to it that pause does not call. (Its
// own calls are: it ends on SIGTERM above.)
func TestPauseFilter(t *testing.T) {
	m := newMachine(t)
	// A shell in its place, which gets nowhere without others: it may have ended when
	// podmon looks.
	r := m.pause(m.rootfs)
	r.Spec.Process.Args = []string{"/bin/sh"}
	r.Spec.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow}
	if _, err := m.Start(t.Context(), r); err != nil {
		if !strings.Contains(err.Error(), "/bin/sh cannot be executed") {
			t.Error(err)
		}
	} else if e := m.exit(r.ID); !e.Known || e.Code == 0 {
		t.Errorf("exit %+v of a program that needs other system calls", e)
	}
}

// What a pause cannot be made from is refused, with the reason, and leaves nothing.
func TestPauseRefused(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(*monitor.StartRequest)
		want string
	}{
		"no program": {func(r *monitor.StartRequest) { r.Spec.Process.Args[0] = "/nonesuch" }, "execute /nonesuch: no such file or directory"},
		"no root":    {func(r *monitor.StartRequest) { r.Spec.Root.Path = "/nonesuch" }, "/nonesuch: no such file or directory"},
		"no network namespace": {func(r *monitor.StartRequest) {
			r.Spec.Linux.Namespaces = append(r.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/nonesuch"})
		}, "/nonesuch"},
		"not a namespace": {func(r *monitor.StartRequest) {
			r.Spec.Linux.Namespaces = append(r.Spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/proc/self/ns/ipc"})
		}, "join namespace /proc/self/ns/ipc"},
		"host's own name": {func(r *monitor.StartRequest) {
			r.Spec.Linux.Namespaces = slices.DeleteFunc(r.Spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.UTSNamespace })
		}, "UTS namespace"},
		"no way for its user": {func(r *monitor.StartRequest) {
			must(t, os.Chmod(r.Spec.Root.Path, 0o700))
			r.Spec.Process.User.UID = 1234
		}, "execute /pause: permission denied"},
		"not a program": {func(r *monitor.StartRequest) {
			r.Spec.Process.Args[0] = "/text"
			must(t, os.WriteFile(filepath.Join(r.Spec.Root.Path, "text"), []byte("text"), 0o755))
		}, "/text cannot be executed"},
		"no such limit": {func(r *monitor.StartRequest) {
			none := uint64(1)
			r.Spec.Linux.Resources.CPU = &specs.LinuxCPU{Period: &none}
		}, "set limits"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			rootfs, err := infra.Install(filepath.Join(t.TempDir(), "infra"))
			must(t, err)
			first, _ := m.startPause() // podmon keeps some descriptors from its first start on
			must(t, m.Delete(t.Context(), first))
			r := m.pause(rootfs)
			c.edit(&r)
			before := descriptors(t, m.podmons()[0])
			if _, err := m.Start(t.Context(), r); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q in it", err, c.want)
			}
			if left, _ := filepath.Glob("/sys/fs/cgroup/*" + m.cgroup + "/" + r.ID); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			if left, _ := os.ReadDir(filepath.Join(m.o.RunDir, "containers")); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			must(t, os.Chmod(rootfs, 0o755))
			r = m.pause(rootfs)
			_, err = m.Start(t.Context(), r)
			must(t, err)
			must(t, m.Delete(t.Context(), r.ID))
			if now := descriptors(t, m.podmons()[0]); now > before {
				t.Errorf("podmon has %d descriptors, had %d", now, before)
			}
		})
	}
}

func descriptors(t *testing.T, pid int) int {
	t.Helper()
	all, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	return len(all)
}

// A cgroup that others are in is refused, and they live.
func TestPauseInUsedCgroup(t *testing.T) {
	m := newMachine(t)
	other, p := m.start("exec sleep 1000")
	rootfs, err := infra.Install(filepath.Join(t.TempDir(), "infra"))
	must(t, err)
	r := m.pause(rootfs)
	r.Spec.Linux.CgroupsPath = m.cgroup + "/" + other
	if _, err := m.Start(t.Context(), r); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("%v, want a refusal", err)
	}
	if now, err := wire.Identify(p.PID); err != nil || now != p {
		t.Errorf("the other was %+v, is %+v: %v", p, now, err)
	}
}

// The next podmon has it as the last one had.
func TestPauseChangesMonitors(t *testing.T) {
	for name, change := range map[string]func(*testing.T, *machine){
		"replaced": func(t *testing.T, m *machine) { must(t, m.Upgrade(t.Context())) },
		"killed":   func(t *testing.T, m *machine) { must(t, unix.Kill(m.podmons()[0], unix.SIGKILL)) },
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			id, p := m.startPause()
			before := m.podmons()
			change(t, m)
			// Podmon sees to it that no process but its own gets a signal.
			must(t, m.Signal(t.Context(), id, unix.SIGCHLD, false))
			if now, err := wire.Identify(p.PID); err != nil || now != p {
				t.Errorf("pause was %+v, is %+v: %v", p, now, err)
			}
			if now := m.podmons(); reflect.DeepEqual(now, before) {
				t.Errorf("podmon is still %v", now)
			}
			must(t, m.Signal(t.Context(), id, unix.SIGTERM, false))
			if e := m.exit(id); !e.Known || e.Code != 0 {
				t.Errorf("exit %+v, want 0", e)
			}
			must(t, m.Delete(t.Context(), id))
		})
	}
}

// What a pause unmounts in its own mount namespace stays mounted on the host, also below a
// shared mount, as podshim's directory of network namespaces is one.
func TestPauseLeavesSharedMounts(t *testing.T) {
	m := newMachine(t)
	dir := t.TempDir()
	must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	defer func() { must(t, unix.Unmount(dir, unix.MNT_DETACH)) }()
	must(t, unix.Mount("", dir, "", unix.MS_SHARED, ""))
	pin := filepath.Join(dir, "pin")
	must(t, os.Mkdir(pin, 0o755))
	must(t, unix.Mount("proc", pin, "proc", 0, ""))
	m.startPause()
	var st unix.Statfs_t
	if err := unix.Statfs(pin, &st); err != nil || st.Type != unix.PROC_SUPER_MAGIC {
		t.Errorf("a mount below a shared one is gone: type %x, %v", st.Type, err)
	}
}
