package check

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/podshim/podshim/internal/config"
	"github.com/podshim/podshim/internal/host"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
}

// testConfig is a completed configuration whose every directory is the test's.
func testConfig(t *testing.T) *config.Config {
	t.Helper()
	dir := t.TempDir()
	cfg := config.Default()
	cfg.Root, cfg.Run = filepath.Join(dir, "root"), filepath.Join(dir, "run")
	cfg.Network.ConfDir = filepath.Join(dir, "net.d")
	cfg.Network.BinDirs = []string{filepath.Join(dir, "bin")}
	cfg.Network.NetnsDir = filepath.Join(dir, "netns")
	cfg.Cgroup.Driver, cfg.Cgroup.Parent = config.DriverCgroupfs, "/podshim-check-test-none"
	cfg.Monitor.Binary = filepath.Join(dir, "podmon")
	cfg.CRI.Socket = filepath.Join(dir, "sock")
	write(t, cfg.Monitor.Binary, "", 0o700)
	if err := cfg.Complete(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

// tree lists all that is below dir.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var paths []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		paths = append(paths, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

func TestRunOnThisMachine(t *testing.T) {
	needRoot(t)
	cfg := testConfig(t)
	dir := filepath.Dir(cfg.Root)
	before, mounted := tree(t, dir), mountCount(t)

	r := Run(t.Context(), cfg)

	if after := tree(t, dir); !slices.Equal(before, after) {
		t.Errorf("the check has left files: %q, before %q", after, before)
	}
	if n := mountCount(t); n != mounted {
		t.Errorf("%d mounts, %d before the check", n, mounted)
	}
	// Tests of podshim start containers on this machine, so it must do.
	for _, f := range r.Findings {
		if f.Level == Failure {
			t.Errorf("%s, %s: %s", f.Area, f.Name, f.Found)
		}
		if (f.Level == OK) != (f.Consequence == "") {
			t.Errorf("%s, %s: level %s with consequence %q", f.Area, f.Name, f.Level, f.Consequence)
		}
	}
	if !r.CanRun {
		t.Error("this machine is said not to do")
	}
}

func mountCount(t *testing.T) int {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(t.TempDir()))
	if err != nil {
		t.Fatal(err)
	}
	return len(mounts)
}

func TestOneFailureIsEnough(t *testing.T) {
	cfg := testConfig(t)
	if err := os.Remove(cfg.Monitor.Binary); err != nil {
		t.Fatal(err)
	}
	r := Run(t.Context(), cfg)
	if r.CanRun || r.Count(Failure) == 0 {
		t.Errorf("without podmon: %+v", r)
	}
}

func TestPidfdExitMatchesTheKernel(t *testing.T) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	release := unix.ByteSliceToString(uts.Release[:])
	err := pidfdExit()
	if since615 := judgeKernelAtLeast(t, release, 6, 15); since615 != (err == nil) {
		t.Errorf("on %s: %v", release, err)
	}
}

func judgeKernelAtLeast(t *testing.T, release string, major, minor int) bool {
	t.Helper()
	var a, b int
	for i, p := range []*int{&a, &b} {
		for _, c := range strings.Split(release, ".")[i] {
			if c < '0' || c > '9' {
				break
			}
			*p = *p*10 + int(c-'0')
		}
	}
	return a > major || a == major && b >= minor
}

func TestJudgeVersion(t *testing.T) {
	for release, want := range map[string]Level{
		"6.18.44-fc": OK, "5.10.0-8-amd64": OK, "6.1": OK, "5.9.16": Warning, "4.19.0": Warning, "plan9": Warning,
	} {
		if f := judgeVersion(release); f.Level != want {
			t.Errorf("%s: %+v", release, f)
		}
	}
}

func TestNamespaces(t *testing.T) {
	dir := t.TempDir()
	for _, kind := range []string{"ipc", "mnt", "net", "pid"} {
		write(t, filepath.Join(dir, kind), "", 0o600)
	}
	if f := namespaces(dir); len(f) != 1 || f[0].Level != Failure || f[0].Found != "missing: uts" {
		t.Errorf("without uts: %+v", f)
	}
	write(t, filepath.Join(dir, "uts"), "", 0o600)
	if f := namespaces(dir); len(f) != 2 || f[0].Level != OK || f[1].Level != Warning {
		t.Errorf("without cgroup: %+v", f)
	}
}

func TestOverlayThatCannotBe(t *testing.T) {
	needRoot(t)
	// proc takes no directories.
	if f := overlay("/proc/self/x"); f.Level != Failure || f.Remedy == "" {
		t.Errorf("%+v", f)
	}
}

func TestKernelFiles(t *testing.T) {
	dir := t.TempDir()
	list, sysctl := filepath.Join(dir, "filesystems"), filepath.Join(dir, "memfd")
	if f := memfd(sysctl); f.Level != OK {
		t.Errorf("no sysctl: %+v", f)
	}
	for text, want := range map[string]Level{"0\n": OK, "1\n": OK, "2\n": Failure} {
		write(t, sysctl, text, 0o600)
		if f := memfd(sysctl); f.Level != want {
			t.Errorf("memfd_noexec %q: %+v", text, f)
		}
	}
	for text, want := range map[string]Level{"nodev\tmqueue\n\text4\n": OK, "\text4\n": Failure} {
		write(t, list, text, 0o600)
		if f := messageQueues(list); f.Level != want {
			t.Errorf("filesystems %q: %+v", text, f)
		}
	}
}

func TestJudgeFacts(t *testing.T) {
	facts := func(yes, nofile string) []host.Fact {
		return []host.Fact{{Name: "Hostname", Value: "vm"}, {Name: "Seccomp", Value: yes}, {Name: "AppArmor", Value: "false"},
			{Name: "NofileHard", Value: nofile}, {Name: "RRO", Value: yes}, {Name: "IDMapMounts", Value: yes, Why: "why"}}
	}
	if f := judgeFacts(facts("true", "100"), 100); !slices.Equal(levels(f), []Level{OK, OK, OK, OK, OK}) {
		t.Errorf("all there: %+v", f)
	}
	f := judgeFacts(facts("false", "99"), 100)
	if !slices.Equal(levels(f), []Level{Warning, OK, Warning, Warning, Warning}) || f[4].Found != "no: why" {
		t.Errorf("none there: %+v", f)
	}
}

// The names judged must be names that the machine's facts have.
func TestFactsAreStillCalledSo(t *testing.T) {
	_, facts, err := host.Facts(host.Options{CgroupDriver: config.DriverCgroupfs, Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if f := judgeFacts(facts, 0); len(f) != 6 {
		t.Errorf("%d of the facts are judged: %+v", len(f), f)
	}
}

func levels(findings []Finding) (l []Level) {
	for _, f := range findings {
		l = append(l, f.Level)
	}
	return l
}

func TestHierarchy(t *testing.T) {
	v2 := t.TempDir()
	v1 := func(options string) *mountinfo.Info {
		return &mountinfo.Info{FSType: "cgroup", Mountpoint: "/c/" + options, VFSOptions: "rw," + options}
	}
	unified := &mountinfo.Info{FSType: "cgroup2", Mountpoint: v2, VFSOptions: "rw,nsdelegate"}
	all := []*mountinfo.Info{v1("cpu,cpuacct"), v1("memory"), v1("pids"), v1("devices"), v1("freezer"), v1("cpuset"), v1("blkio"), v1("xattr,name=systemd")}
	for _, tc := range []struct {
		name        string
		mounts      []*mountinfo.Info
		controllers string // of v2
		layout      Level
		judged      []Level
		found       string // part of what is said
	}{
		{"v2", []*mountinfo.Info{unified}, "cpuset cpu io memory pids", OK, []Level{OK}, "v2 at " + v2},
		{"v2 without cpuset", []*mountinfo.Info{unified}, "cpu io memory pids", OK, []Level{OK, Warning}, "missing: cpuset"},
		{"v2 without memory", []*mountinfo.Info{unified}, "cpuset cpu io pids", OK, []Level{Failure}, "missing: memory"},
		{"v1", all, "", Warning, []Level{OK}, "v1"},
		{"hybrid", append([]*mountinfo.Info{unified}, all...), "", Warning, []Level{OK}, "hybrid"},
		{"v1 without devices", slices.Concat(all[:3], all[4:]), "", Warning, []Level{Failure}, "missing: devices"},
		{"none", nil, "", Failure, []Level{Failure, Warning}, "no cgroup filesystem"},
		{"names only", []*mountinfo.Info{v1("name=systemd")}, "", Failure, []Level{Failure, Warning}, "no cgroup filesystem"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			write(t, filepath.Join(v2, "cgroup.controllers"), tc.controllers+"\n", 0o600)
			h, err := readHierarchy(tc.mounts)
			if err != nil {
				t.Fatal(err)
			}
			layout, judged := h.layout(), h.judgeControllers()
			if layout.Level != tc.layout || !slices.Equal(levels(judged), tc.judged) {
				t.Errorf("%+v %+v", layout, judged)
			}
			said := layout.Found
			for _, f := range judged {
				said += "\n" + f.Found
			}
			if !strings.Contains(said, tc.found) {
				t.Errorf("%q does not say %q", said, tc.found)
			}
		})
	}
}

func TestDriver(t *testing.T) {
	plain, booted, bus := t.TempDir(), t.TempDir(), t.TempDir()
	write(t, filepath.Join(booted, "run/systemd/system/x"), "", 0o600)
	write(t, filepath.Join(bus, "run/systemd/system/x"), "", 0o600)
	write(t, filepath.Join(bus, "run/systemd/private"), "", 0o600)
	for _, tc := range []struct {
		driver, root string
		want         Level
	}{
		{config.DriverCgroupfs, plain, OK},
		{config.DriverCgroupfs, booted, Warning},
		{config.DriverSystemd, plain, Failure},
		{config.DriverSystemd, booted, Failure},
		{config.DriverSystemd, bus, OK},
	} {
		if f := driver(tc.driver, tc.root); f.Level != tc.want {
			t.Errorf("%s: %+v, want %s", tc.driver, f, tc.want)
		}
	}
}

func TestJudgeCapabilities(t *testing.T) {
	all := append(slices.Clone(needed), "CAP_SYS_RESOURCE", "CAP_NET_RAW")
	without := func(name string) []string {
		return slices.DeleteFunc(slices.Clone(all), func(n string) bool { return n == name })
	}
	for _, tc := range []struct {
		have []string
		want []Level
	}{
		{all, []Level{OK}},
		{without("CAP_SYS_ADMIN"), []Level{Failure}},
		{without("CAP_SYS_RESOURCE"), []Level{OK, Warning}},
		{without("CAP_NET_RAW"), []Level{OK, Warning}},
		{nil, []Level{Failure, Warning, Warning}},
	} {
		if got := judgeCapabilities(tc.have, []string{"CAP_NET_RAW", "CAP_CHOWN"}[:1]); !slices.Equal(levels(got), tc.want) {
			t.Errorf("with %q: %+v", tc.have, got)
		}
	}
}

func TestEffectiveIsWhatTheKernelSays(t *testing.T) {
	names, err := effective()
	if err != nil {
		t.Fatal(err)
	}
	// PR_CAPBSET_READ would tell of the bounding set; CapEff of /proc is the set itself.
	status, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "CapEff:\t")
	bits := 0
	for _, c := range strings.TrimSpace(rest[:16]) {
		for v := strings.IndexRune("0123456789abcdef", c); v > 0; v &= v - 1 {
			bits++
		}
	}
	if bits != len(names) {
		t.Errorf("%d capabilities, the kernel says %d", len(names), bits)
	}
}

const bridge = `{"cniVersion":"1.0.0","name":"pods","plugins":[
 {"type":"bridge","ipam":{"type":"host-local","ranges":[[{"subnet":"10.99.0.0/24"}]]}},
 {"type":"portmap","capabilities":{"portMappings":true}}]}`

func TestNetwork(t *testing.T) {
	cfg := testConfig(t)
	conf, bin := cfg.Network.ConfDir, cfg.Network.BinDirs[0]
	look := func() []Finding {
		t.Helper()
		info, err := loadedNetwork(cfg)
		if err != nil {
			t.Fatal(err)
		}
		return judgeNetwork(info, cfg.Network.BinDirs)
	}
	if f := look(); len(f) != 1 || f[0].Level != Warning || !strings.Contains(f[0].Found, conf) {
		t.Errorf("no directory: %+v", f)
	}
	write(t, filepath.Join(conf, "10.conflist"), "{", 0o600)
	if f := look(); len(f) != 1 || f[0].Level != Warning || !strings.Contains(f[0].Found, "10.conflist") {
		t.Errorf("garbage: %+v", f)
	}
	write(t, filepath.Join(conf, "10.conflist"), bridge, 0o600)
	write(t, filepath.Join(bin, "bridge"), "", 0o700)
	write(t, filepath.Join(bin, "portmap"), "", 0o600)
	f := look()
	if f[0].Level != OK || f[1].Level != Warning || !strings.HasSuffix(f[1].Found, ": portmap, host-local") && !strings.HasSuffix(f[1].Found, ": host-local, portmap") {
		t.Errorf("plugins missing: %+v", f)
	}
	write(t, filepath.Join(bin, "host-local"), "", 0o700)
	if err := os.Chmod(filepath.Join(bin, "portmap"), 0o700); err != nil {
		t.Fatal(err)
	}
	if f := look(); f[0].Level != OK || f[1].Level != OK || len(f) != 3 || f[2].Name != "portmap" {
		t.Errorf("all there: %+v", f)
	}
}

func TestFirewall(t *testing.T) {
	none := func(string) (string, error) { return "", errors.New("none") }
	if f := firewall(none); f.Level != Warning {
		t.Errorf("%+v", f)
	}
	if f := firewall(func(n string) (string, error) { return "/sbin/" + n, nil }); f.Level != OK {
		t.Errorf("%+v", f)
	}
}

func TestForwarding(t *testing.T) {
	dir := t.TempDir()
	for text, want := range map[string]Level{"0\n": Warning, "1\n": OK} {
		write(t, filepath.Join(dir, "ipv4/ip_forward"), text, 0o600)
		if f := forwarding(dir); f.Level != want {
			t.Errorf("%q: %+v", text, f)
		}
	}
}

func TestDirectory(t *testing.T) {
	dir := t.TempDir()
	objection := func(string) Finding { return warning("d", "found", "so what", "do") }
	if f := directory("d", dir+"/a/b", nil); f.Level != OK || !strings.HasSuffix(f.Found, "to be made") {
		t.Errorf("%+v", f)
	}
	if f := directory("d", dir, objection); f.Level != Warning {
		t.Errorf("objection: %+v", f)
	}
	if f := directory("d", "/proc/self/x", nil); f.Level != Failure {
		t.Errorf("cannot be written: %+v", f)
	}
	if _, err := os.Stat(dir + "/a"); err == nil {
		t.Error("the check has made the directory")
	}
}

func TestLeftovers(t *testing.T) {
	needRoot(t)
	cfg := testConfig(t)
	if f := leftovers(t.Context(), cfg); !slices.Equal(levels(f), []Level{OK}) {
		t.Fatalf("nothing is left, but: %+v", f)
	}

	id := strings.Repeat("0123456789abcdef", 4)
	pin := filepath.Join(cfg.Network.NetnsDir, "podshim-"+id[:16])
	write(t, pin, "", 0o600)
	write(t, filepath.Join(cfg.Network.NetnsDir, "another"), "", 0o600)
	home := filepath.Join(cfg.Run, "containers", id)
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	f := leftovers(t.Context(), cfg)
	if !slices.Equal(levels(f), []Level{Warning, Warning}) || f[0].Found != "1 left: "+pin || f[1].Found != "1 left: "+home {
		t.Errorf("%+v", f)
	}

	// The same things may belong to whoever runs, who knows.
	if err := os.MkdirAll(filepath.Dir(cfg.CRI.Socket), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", cfg.CRI.Socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if f := leftovers(t.Context(), cfg); len(f) != 1 || f[0].Level != OK || !strings.Contains(f[0].Found, cfg.CRI.Socket) {
		t.Errorf("with somebody on the socket: %+v", f)
	}
}

func TestSummarySaysHowMany(t *testing.T) {
	if got := summary([]string{"a", "b", "c", "d", "e"}); got != "5 left: a, b, c and 2 more" {
		t.Error(got)
	}
}

func TestReportForms(t *testing.T) {
	r := Report{CanRun: false, Findings: []Finding{
		{Area: "kernel", Name: "a", Level: OK, Found: "works"},
		{Area: "kernel", Name: "b", Level: Failure, Found: "not", Consequence: "so", Remedy: "do"},
		{Area: "cgroup", Name: "c", Level: Warning, Found: "old", Consequence: "then"},
	}}
	var text bytes.Buffer
	if err := r.WriteTable(&text); err != nil {
		t.Fatal(err)
	}
	want := `kernel  ok       a  works
        failure  b  not
                    - so
                    - to do: do
cgroup  warning  c  old
                    - then

podshim cannot run here. 1 failures, 1 warnings.
`
	if text.String() != want {
		t.Errorf("got\n%s\nwant\n%s", text.String(), want)
	}
	raw, err := json.Marshal(r)
	if err != nil || !bytes.Contains(raw, []byte(`{"area":"cgroup","name":"c","level":"warning","found":"old","consequence":"then"}`)) || !bytes.Contains(raw, []byte(`"can_run":false`)) {
		t.Errorf("%s, %v", raw, err)
	}
}
