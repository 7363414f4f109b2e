package monitor_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/monitor"
)

// volumeOf is a bind mount as podshim asks for it.
func volumeOf(source, destination string, options ...string) specs.Mount {
	return specs.Mount{Type: "bind", Source: source, Destination: destination, Options: append([]string{"rbind", "rprivate"}, options...)}
}

func add(mounts ...specs.Mount) func(*specs.Spec) {
	return func(s *specs.Spec) { s.Mounts = append(s.Mounts, mounts...) }
}

// source is a directory of the host's with files, a mount that has flags of its own, and one
// below it.
func source(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	must(t, os.WriteFile(filepath.Join(dir, "file"), []byte("of the host\n"), 0o640))
	must(t, os.Mkdir(filepath.Join(dir, "below"), 0o755))
	must(t, unix.Mount("tmpfs", filepath.Join(dir, "below"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOATIME, "size=1m,mode=755"))
	t.Cleanup(func() { _ = unix.Unmount(filepath.Join(dir, "below"), unix.MNT_DETACH) })
	return dir
}

// mountTable is what a process sees as mounts: where, on which, of what, with which options.
func mountTable(t *testing.T, id string, p monitor.Process) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p.PID))
	must(t, err)
	at, names := map[string]string{}, regexp.MustCompile(`\b`+regexp.QuoteMeta(id)+`\b`)
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		at[f[0]] = f[4]
	}
	var table []string
	for line := range strings.Lines(names.ReplaceAllString(string(b), "ID")) {
		f := strings.Fields(line)
		if slices.Contains([]string{"tmpfs", "devpts", "mqueue", "sysfs", "proc"}, f[len(f)-3]) {
			f[2] = "its own"
		}
		table = append(table, fmt.Sprintln(f[4], "on", at[f[1]], f[2:]))
	}
	slices.SortStableFunc(table, func(a, b string) int { return strings.Compare(strings.Fields(a)[0], strings.Fields(b)[0]) })
	return strings.Join(table, "")
}

// listing is what lies in a directory: kinds, modes, owners, devices and links.
func listing(t *testing.T, dir string) string {
	t.Helper()
	var list strings.Builder
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		to, _ := os.Readlink(path)
		name, _ := filepath.Rel(dir, path)
		if d.Name() == "pts" || d.Name() == "proc" || d.Name() == "sys" || d.Name() == "bin" && dir != path {
			fmt.Fprintln(&list, name, info.Mode())
			return fs.SkipDir
		}
		fmt.Fprintln(&list, name, info.Mode(), st.Uid, st.Gid, st.Rdev, to)
		return nil
	}))
	return list.String()
}

// started waits until a process runs the program: libcontainer answers before.
func started(t *testing.T, name string, pid int) {
	t.Helper()
	for !strings.HasPrefix(procStat(pid), fmt.Sprintf("%d (%s) S ", pid, name)) {
		if stat := procStat(pid); stat == "" || strings.Contains(stat, ") Z ") {
			t.Fatalf("process %d has ended: %q", pid, stat)
		}
		time.Sleep(time.Millisecond)
	}
}

// A container that podmon starts by itself is as libcontainer makes it of the same spec: the
// process, its mounts, and what is made in the root for them.
func TestContainerIsWhatLibcontainerMakes(t *testing.T) {
	volume := source(t)
	file := filepath.Join(volume, "file")
	for name, edit := range map[string]func(*specs.Spec){
		"as it is": func(*specs.Spec) {},
		"user, groups, capabilities, limits": func(s *specs.Spec) {
			s.Process.User = specs.User{UID: 1234, GID: 567, AdditionalGids: []uint32{8, 9}}
			s.Process.Capabilities.Inheritable, s.Process.Capabilities.Ambient = []string{"CAP_KILL"}, []string{"CAP_KILL"}
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 66, Hard: 88}, {Type: "RLIMIT_CORE"}}
			score := 321
			s.Process.OOMScoreAdj = &score
		},
		"no new privileges": func(s *specs.Spec) { s.Process.NoNewPrivileges = true },
		"directory that is to be made, read-only root": func(s *specs.Spec) {
			s.Process.Cwd, s.Root.Readonly = "/made/by/podmon", true
		},
		"directory behind links":      func(s *specs.Spec) { s.Process.Cwd = "/link/made/../made" },
		"directory of the user alone": func(s *specs.Spec) { s.Process.Cwd, s.Process.User.UID = "/own", 1234 },
		"the node's namespaces": func(s *specs.Spec) {
			s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}}
		},
		"limits of its cgroups": func(s *specs.Spec) {
			shares, limit, memory := uint64(2), int64(77), int64(64<<20)
			s.Linux.Resources = &specs.LinuxResources{
				CPU: &specs.LinuxCPU{Shares: &shares}, Pids: &specs.LinuxPids{Limit: &limit}, Memory: &specs.LinuxMemory{Limit: &memory},
				Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}},
			}
		},
		"what kubelet mounts": add(
			specs.Mount{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
			volumeOf(volume, "/dev/shm", "nosuid", "nodev", "noexec", "rw"),
			volumeOf(file, "/etc/hosts", "rw"), volumeOf(file, "/etc/resolv.conf", "nosuid", "nodev", "noexec", "ro"),
			volumeOf(file, "/dev/termination-log", "rw"),
			volumeOf(volume, "/var/run/secrets/kubernetes.io/serviceaccount", "ro"),
		),
		"flags of volumes": add(
			volumeOf(volume, "/v1"), volumeOf(volume, "/v2", "ro"), volumeOf(volume, "/v3", "rw", "nosuid", "nodev", "noexec"),
			volumeOf(volume, "/v4", "noatime"), volumeOf(volume, "/v5", "strictatime", "nodiratime"), volumeOf(volume, "/v6", "nodiratime"),
			volumeOf(volume, "/v7", "relatime"), volumeOf(volume, "/v8", "rro"), volumeOf(volume, "/v9", "ro", "rnosuid", "rnoexec"),
			volumeOf(volume, "/v10", "rnoatime"), volumeOf(volume, "/v11", "nosymfollow"), volumeOf(volume, "/v12", "suid", "dev", "exec"),
			specs.Mount{Type: "bind", Source: volume, Destination: "/v13", Options: []string{"bind", "rprivate", "ro"}},
			volumeOf(filepath.Join(volume, "below"), "/v14", "ro"), volumeOf(filepath.Join(volume, "below"), "/v15"),
			volumeOf(filepath.Join(volume, "below"), "/v16", "strictatime"),
		),
		"volumes behind links": add(
			volumeOf(volume, "/link/a"), volumeOf(volume, "/up/b"), volumeOf(volume, "/nowhere/c/d"), volumeOf(file, "/etc/dangling"),
			volumeOf(volume, "/far/away/../e"), volumeOf(volume, "/tmp/../tmp//f/"), volumeOf(file, "/lost/file"), volumeOf(volume, "/out/g"),
		),
		"volumes in volumes": add(
			volumeOf(volume, "/v"), volumeOf(file, "/v/file"), volumeOf(volume, "/v/below/more"), volumeOf(file, "/v/below/new"),
		),
		"the whole host":   add(volumeOf("/", "/host", "ro"), volumeOf("/proc", "/host/proc", "ro"), volumeOf("/sys", "/host/sys", "ro")),
		"a volume at /dev": add(volumeOf("/dev", "/dev")),
		"a volume at /sys": add(volumeOf(volume, "/sys")),
		"paths that are hidden and read-only": func(s *specs.Spec) {
			s.Linux.MaskedPaths = []string{"/proc/kcore", "/proc/acpi", "/proc/keys", "/nonesuch", "/sys/firmware", "/sys/fs/bpf", "/proc/scsi", "/proc/keys", "/tmp", "/etc/hostname"}
			s.Linux.ReadonlyPaths = []string{"/proc/bus", "/proc/sys", "/nonesuch", "/proc/sysrq-trigger", "/proc/fs", "/own"}
			s.Root.Readonly = true
		},
		"devices": func(s *specs.Spec) {
			mode, id := fs.FileMode(0o4625), uint32(77)
			s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
			s.Linux.Devices = []specs.LinuxDevice{
				{Path: "/dev/char", Type: "c", Major: 1, Minor: 8, FileMode: &mode, UID: &id, GID: &id},
				{Path: "/dev/deep/down/block", Type: "b", Major: 7, Minor: 0},
				{Path: "/dev/fifo", Type: "p"}, {Path: "/elsewhere/char", Type: "c", Major: 1, Minor: 3},
				{Path: "/link/char", Type: "u", Major: 1, Minor: 3}, {Path: "/dev/null", Type: "c", Major: 1, Minor: 3},
			}
		},
		"other options of /dev": func(s *specs.Spec) {
			s.Mounts[1].Options = []string{"nosuid", "strictatime", "mode=711", "size=65536k", "uid=5"}
			s.Mounts[2].Options = []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}
		},
		"no /dev, no /sys": func(s *specs.Spec) { s.Mounts = s.Mounts[:1] },
		"a pipe for input": func(*specs.Spec) {},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			rootfs := m.rootfs
			var is []map[string]string
			for i, by := range whose {
				m.rootfs = filepath.Join(t.TempDir(), "root") // what is mounted there changes it
				must(t, os.CopyFS(m.rootfs, os.DirFS(rootfs)))
				must(t, os.Chmod(filepath.Join(m.rootfs, "bin/busybox"), 0o755))
				for _, dir := range []string{"etc", "own", "deep/er"} {
					must(t, os.MkdirAll(filepath.Join(m.rootfs, dir), 0o755))
				}
				must(t, os.Chmod(filepath.Join(m.rootfs, "own"), 0o700))
				must(t, os.Chown(filepath.Join(m.rootfs, "own"), 1234, 567))
				must(t, os.WriteFile(filepath.Join(m.rootfs, "etc/hostname"), nil, 0o644))
				for at, to := range map[string]string{
					"link": "/deep", "up": "../../deep/er", "nowhere": "deep/none/at/all", "etc/dangling": "../run/systemd/resolv.conf",
					"far": "/up/../link", "lost": "/nowhere/more", "out": "/../../../../../deep",
				} {
					must(t, os.Symlink(to, filepath.Join(m.rootfs, at)))
				}
				if i == 0 {
					m.narrow()
				}
				id, p := m.start("", func(r *monitor.StartRequest) {
					edit(r.Spec)
					r.Spec.Process.Args = []string{"sleep", "1000"}
					r.Spec.Process = by(r.Spec.Process)
					r.Stdin = name == "a pipe for input"
				})
				// libcontainer answers before the program runs. (Where a mount namespace's file is
				// mounted on the host, all of it goes to libcontainer.)
				if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.PID)); i == 0 && name != "the whole host" && (err != nil || strings.HasPrefix(exe, "/memfd:")) {
					t.Errorf("it is not podmon that has started it: it runs %s, %v", exe, err)
				}
				started(t, "sleep", p.PID)
				looked := looks(t, id, p)
				for what, value := range looked { // pipes are each container's own
					if strings.HasPrefix(what, "descriptor ") {
						looked[what] = strings.TrimRight(filepath.Base(value), "0123456789[]")
					}
				}
				looked["mounts"] = strings.ReplaceAll(mountTable(t, id, p), m.rootfs, "ROOT")
				// libcontainer's begins with what it has mounted so far of the root, where the host has it.
				looked["mounts"] = regexp.MustCompile(`(?m)^/hostROOT.*\n`).ReplaceAllString(looked["mounts"], "")
				looked["/dev"] = listing(t, fmt.Sprintf("/proc/%d/root/dev", p.PID))
				looked["limits of the cgroup"] = fmt.Sprint(limitsOf(t, m, id))
				looked["root"] = listing(t, m.rootfs)
				for line := range strings.Lines(m.execOutput(id, "cat", "/proc/keys")) {
					if f := strings.Fields(strings.ReplaceAll(line, id, "ID")); strings.HasPrefix(f[8], "_ses.ID") {
						looked["keyring"] = fmt.Sprint(f[1], f[4:])
					}
				}
				is = append(is, looked)
			}
			if _, ok := is[0]["keyring"]; !ok && name != "paths that are hidden and read-only" {
				t.Error("no keyring of its own")
			}
			for _, what := range []string{"mounts", "/dev", "root"} {
				if is[0][what] != is[1][what] {
					t.Errorf("%s:\n%s\nby libcontainer:\n%s", what, is[0][what], is[1][what])
				}
				delete(is[0], what)
				delete(is[1], what)
			}
			compare(t, is[0], is[1])
		})
	}
}

// What cannot be, or would be a way out, is refused as by libcontainer, and leaves nothing.
func TestContainerRefuses(t *testing.T) {
	volume := source(t)
	replace := func(name, to string) func(*testing.T, *machine) {
		return func(t *testing.T, m *machine) {
			must(t, os.RemoveAll(filepath.Join(m.rootfs, name)))
			if to == "" {
				must(t, os.WriteFile(filepath.Join(m.rootfs, name), nil, 0o644))
			} else {
				must(t, os.Symlink(to, filepath.Join(m.rootfs, name)))
			}
		}
	}
	withNull := func(s *specs.Spec) { // a /dev that is the image's
		s.Mounts = append(s.Mounts[:1], volumeOf(volume, "/dev"))
		s.Linux.MaskedPaths = []string{"/proc/keys"}
	}
	for name, c := range map[string]struct {
		prepare func(*testing.T, *machine)
		edit    func(*specs.Spec)
		want    string // in the error, also in libcontainer's
	}{
		"/proc is a link":          {replace("proc", "tmp"), nil, "must be mounted on ordinary directory"},
		"/proc is a file":          {replace("proc", ""), nil, "must be mounted on ordinary directory"},
		"/sys is a link":           {replace("sys", "/tmp"), nil, "must be mounted on ordinary directory"},
		"a volume over /proc":      {replace("link", "/proc"), add(volumeOf(volume, "/link")), ""},
		"a volume in /proc":        {replace("link", "proc/sys"), add(volumeOf(volume, "/link/kernel")), ""},
		"a volume over the root":   {replace("link", "/tmp/.."), add(volumeOf(volume, "/link")), ""},
		"a loop of links":          {replace("link", "/link"), add(volumeOf(volume, "/link/a")), "too many levels of symbolic links"},
		"a file in the way":        {replace("link", ""), add(volumeOf(volume, "/link/a")), "not a directory"},
		"a file under a directory": {replace("link", ""), add(volumeOf(volume, "/link")), "not a directory"},
		"a directory under a file": {nil, add(volumeOf(filepath.Join(volume, "file"), "/tmp")), "not a directory"},
		"no such volume":           {nil, add(volumeOf(filepath.Join(volume, "none"), "/v")), "no such file or directory"},
		"a link to a device node's directory": {replace("link", "/link"), func(s *specs.Spec) {
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/link/a", Type: "c", Major: 1, Minor: 3}}
		}, ""},
		"the directory is a file":      {nil, func(s *specs.Spec) { s.Process.Cwd = "/bin/plain" }, "not a directory"},
		"the directory is podmon's":    {nil, func(s *specs.Spec) { s.Process.Cwd = "/proc/self/fd/3" }, ""},
		"a directory in one of podmon": {nil, func(s *specs.Spec) { s.Process.Cwd = "/proc/self/fd/4/new" }, ""},
		"/dev/null is a file": {func(t *testing.T, m *machine) {
			must(t, os.RemoveAll(filepath.Join(volume, "null")))
			must(t, os.WriteFile(filepath.Join(volume, "null"), nil, 0o666))
		}, withNull, "/dev/null is invalid"},
		"/dev/null is another": {func(t *testing.T, m *machine) {
			must(t, os.RemoveAll(filepath.Join(volume, "null")))
			must(t, unix.Mknod(filepath.Join(volume, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))))
		}, withNull, "/dev/null is invalid"},
		"a file system's option": {nil, func(s *specs.Spec) { s.Mounts[1].Options = []string{"mode=755", "nonesuch=1"} }, ""},
		"no program":             {nil, func(s *specs.Spec) { s.Process.Args = []string{"nonesuch"} }, "executable file not found"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			for _, by := range whose { // what podmon and libcontainer open once
				warm, _ := m.start("true", func(r *monitor.StartRequest) { r.Spec.Process = by(r.Spec.Process) })
				m.exit(warm)
			}
			if c.prepare != nil {
				c.prepare(t, m)
			}
			for i, by := range whose {
				id := m.id()
				r := monitor.StartRequest{ID: id, Spec: m.spec(id, "sleep", "1000"), LogRoot: m.logs, LogPath: id + "/0.log"}
				if c.edit != nil {
					c.edit(r.Spec)
				}
				r.Spec.Process = by(r.Spec.Process)
				before := descriptors(t, m.podmons()[0])
				p, err := m.Start(t.Context(), r)
				if err == nil {
					t.Errorf("it is started: %s", mountTable(t, id, p))
					continue
				}
				if !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v, want %q in it", err, c.want)
				}
				if left := children(t, m.podmons()[0]); len(left) != 0 {
					t.Errorf("podmon's children: %v", left)
				}
				for _, pattern := range []string{"/sys/fs/cgroup/*", "/sys/fs/cgroup"} { // v1, v2
					if left, _ := filepath.Glob(pattern + m.cgroup + "/" + id); len(left) > 0 {
						t.Errorf("cgroups are left: %v", left)
					}
				}
				if n := descriptors(t, m.podmons()[0]); i == 0 && n > before { // libcontainer leaves one to the GC
					t.Errorf("podmon had %d descriptors, and has %d", before, n)
				}
			}
		})
	}
}

// While somebody who can write to a volume exchanges a directory there for a link, what is
// mounted below it is made and mounted in the container's root or not at all (CVE-2021-30465).
func TestMountsStayInTheRoot(t *testing.T) {
	m := newMachine(t)
	volume, outside := t.TempDir(), t.TempDir()
	dir, link := filepath.Join(volume, "dir"), filepath.Join(volume, "link")
	must(t, os.Mkdir(dir, 0o755))
	must(t, os.Symlink(strings.Repeat("../", 20)+outside, link))
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				_ = unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, link, unix.RENAME_EXCHANGE)
			}
		}
	}()
	places, refused := map[string]int{}, 0
	for range 60 {
		id := m.id()
		r := monitor.StartRequest{ID: id, Spec: m.spec(id, "sleep", "1000"), LogRoot: m.logs, LogPath: id + "/0.log"}
		r.Spec.Mounts = append(r.Spec.Mounts, volumeOf(volume, "/v"), volumeOf(m.logs, "/v/dir/made/deep"))
		p, err := m.Start(t.Context(), r)
		if err != nil {
			refused++
			continue
		}
		for line := range strings.Lines(mountTable(t, id, p)) {
			if at := strings.Fields(line)[0]; strings.HasSuffix(at, "/made/deep") {
				places[at]++
			}
		}
		must(t, m.Delete(t.Context(), id))
	}
	close(stop)
	<-stopped
	t.Logf("mounted at %v, refused %d times", places, refused)
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("made on the host: %v, %v", left, err)
	}
	for at := range places {
		if !strings.HasPrefix(at, "/v/") && !strings.HasPrefix(at, outside+"/") {
			t.Errorf("mounted at %s", at)
		}
	}
	if len(places) < 2 {
		t.Error("the exchange was never met")
	}
}

// A volume below which the file of a mount namespace is mounted, as snapd does in /run, is one
// for libcontainer.
func TestVolumeAboveMountNamespace(t *testing.T) {
	m := newMachine(t)
	volume := source(t)
	must(t, unix.Mount("", filepath.Join(volume, "below"), "", unix.MS_PRIVATE, ""))
	file := filepath.Join(volume, "below/namespace")
	must(t, os.WriteFile(file, nil, 0o644))
	if out, err := exec.Command("unshare", "--mount="+file, "true").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { _ = unix.Unmount(file, unix.MNT_DETACH) })
	id, p := m.start("exec sleep 1000", func(r *monitor.StartRequest) {
		filtered(t)(r)
		r.Spec.Mounts = append(r.Spec.Mounts, volumeOf(volume, "/v", "ro"))
	})
	if got := m.execOutput(id, "ls", "/v/below"); got != "namespace\n" {
		t.Errorf("the volume holds %q", got)
	}
	if is := looks(t, id, p); is["Seccomp"] != "2" || is["has the host's mnt namespace"] != "false" {
		t.Errorf("it is %v", is)
	}
}

// Whoever has podmon's program in a container, and root's rights there, cannot take from podmon
// the right to execute it.
func TestProgramCannotBeSpoiled(t *testing.T) {
	m := newMachine(t)
	fd, err := unix.MemfdCreate("probe", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	must(t, err)
	defer unix.Close(fd)
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_EXEC); err != nil {
		t.Skip("needs Linux 6.3: ", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, 0x10); err != nil {
		t.Skip("needs Linux 6.0 and CAP_LINUX_IMMUTABLE: ", err)
	}
	id, _ := m.start("exec sleep 1000")
	exe := fmt.Sprintf("/proc/%d/exe", m.podmons()[0])
	if err := os.Chmod(exe, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("its mode is changed: %v", err)
	}
	// An ACL by which everybody may read: version 2, then tag, rights and ID of each entry.
	acl := []byte("\x02\x00\x00\x00\x01\x00\x04\x00\xff\xff\xff\xff\x04\x00\x04\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff")
	if err := unix.Setxattr(exe, "system.posix_acl_access", acl, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("its ACL is changed: %v", err)
	}
	if got := m.execOutput(id, "echo", "yes"); got != "yes\n" {
		t.Errorf("an exec says %q", got)
	}
}
