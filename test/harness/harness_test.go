package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { os.Exit(Main(m, Options{})) }

func TestParseLog(t *testing.T) {
	const text = "2026-11-21T02:43:20.000000001Z stdout P one \n" +
		"2026-11-21T02:43:20.1Z stdout F two\n" +
		"2026-11-21T02:43:20.2+01:00 stderr F \n" +
		"2026-11-21T02:43:20.3Z stdout F unfin"
	lines, err := ParseLog(text)
	if err != nil || len(lines) != 3 {
		t.Fatalf("%v, %v", lines, err)
	}
	if got := JoinLog(lines, "stdout"); got != "one two\n" {
		t.Errorf("stdout is %q", got)
	}
	if got := JoinLog(lines, "stderr"); got != "\n" {
		t.Errorf("stderr is %q", got)
	}
	for _, bad := range []string{"x\n", "today stdout F x\n", "2026-11-21T02:43:20Z stdin F x\n", "2026-11-21T02:43:20Z stdout X x\n"} {
		if _, err := ParseLog(bad); err == nil {
			t.Errorf("%q is taken for a log line", bad)
		}
	}
}

func TestParseMounts(t *testing.T) {
	const text = `36 35 98:0 /mnt1 /with\040blank rw,noatime master:1 - ext3 /dev/root rw,errors=continue
37 35 0:5 / /plain ro - tmpfs tmpfs rw
`
	got := parseMounts(text)
	if len(got) != 2 || got[0].Point != "/with blank" || got[0].Type != "ext3" || !slices.Equal(got[0].Optional, []string{"master:1"}) ||
		got[1].Options[0] != "ro" || len(got[1].Optional) != 0 {
		t.Errorf("mounts are %+v", got)
	}
}

// The harness is only worth something if it sees what is left: each kind of leak
// is planted, must be found by the ID, and must be gone after destroy.
func TestLeaksAreFound(t *testing.T) {
	NeedRoot(t)
	for _, find := range []func() (string, error){Binaries, Tools} {
		if _, err := find(); err != nil {
			t.Skipf("SKIPPED: %v", err)
		}
	}
	d, err := newDaemon(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.destroy(); err != nil {
			t.Errorf("destroy: %v", err)
		}
	})
	const id = "feedfacefeedfacefeedfacefeedface"
	ids := []string{id}
	if found := append(d.leftovers(ids), d.remains()...); len(found) != 0 {
		t.Fatalf("a fresh node has %q", found)
	}

	mount := filepath.Join(d.RunDir, id, "shm")
	cgroup := d.PodsCgroup + "/" + id
	for _, step := range []error{
		os.MkdirAll(mount, 0o755),
		unix.Mount("tmpfs", mount, "tmpfs", 0, ""),
		os.WriteFile(filepath.Join(d.NetnsDir, id), nil, 0o600),
		os.MkdirAll(d.IPAM+"/net", 0o755),
		os.WriteFile(d.IPAM+"/net/10.0.0.9", []byte(id+"\neth0"), 0o600),
		MakeCgroup(cgroup),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	process := plantProcess(t, cgroup)

	found := strings.Join(d.leftovers(ids), "\n")
	for _, want := range []string{"process pid ", "mount " + mount, "cgroup ", "file " + filepath.Dir(mount), "file " + d.NetnsDir, "IP reservation "} {
		if !strings.Contains(found, want) {
			t.Errorf("leftovers by ID do not show %q:\n%s", want, found)
		}
	}
	if other := d.leftovers([]string{"0000000000000000"}); len(other) != 0 {
		t.Errorf("another pod is blamed for %q", other)
	}
	remains := strings.Join(d.remains(), "\n")
	for _, want := range []string{"mount " + mount, "network namespace ", "cgroup ", "IP reservation "} {
		if !strings.Contains(remains, want) {
			t.Errorf("remains do not show %q:\n%s", want, remains)
		}
	}
	if all := d.processes(); len(all) != 1 || all[0].PID != process.PID {
		t.Errorf("node's processes are %v", all)
	}

	if err := d.destroy(); err != nil {
		t.Fatalf("destroy: %v", err)
	}
	if process.Alive() {
		t.Error("process outlives destroy")
	}
	if _, err := os.Stat(d.Dir); err == nil {
		t.Error("directory outlives destroy")
	}
	if left := d.leftovers(ids); len(left) != 0 {
		t.Errorf("left after destroy: %q", left)
	}
}

func plantProcess(t *testing.T, cgroup string) Process {
	t.Helper()
	root, err := unifiedRoot()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.Open(filepath.Join(root, cgroup))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(done)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	p, err := ReadProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// The registry serves what was pushed.
func TestRegistryServes(t *testing.T) {
	if _, err := exec.LookPath("busybox"); err != nil {
		t.Skip("SKIPPED: busybox is not installed")
	}
	reg, err := LoopbackRegistry()
	if err != nil {
		t.Fatal(err)
	}
	one, err := reg.Push("some/image", "tag", ImageOptions{Files: map[string]string{"a/b": "c"}})
	if err != nil {
		t.Fatal(err)
	}
	two, err := reg.Push("some/image", "tag", ImageOptions{Files: map[string]string{"a/b": "d"}})
	if err != nil || one == two {
		t.Errorf("another content has digest %s, %v", two, err)
	}
}
