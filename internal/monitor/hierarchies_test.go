package monitor_test

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/podshim/podshim/internal/monitor"
)

// cgroupView is what a container has at /sys/fs/cgroup: each mount with its root and
// options, and what lies in the topmost.
func cgroupView(t *testing.T, m *machine, id string, p monitor.Process) (view []string) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p.PID))
	must(t, err)
	optional := regexp.MustCompile(` (master|shared|propagate_from):\d+`)
	for line := range strings.Lines(strings.ReplaceAll(string(b), id, "ID")) {
		f := strings.Fields(optional.ReplaceAllString(line, ""))
		if strings.HasPrefix(f[4], "/sys/fs/cgroup") {
			if f[8] == "tmpfs" {
				f[2] = "its own"
			}
			view = append(view, fmt.Sprint(f[2:]))
		}
	}
	return append(view, m.execOutput(id, "ls", "-1Ap", "/sys/fs/cgroup"))
}

// The hierarchies of cgroup v1 that podmon mounts are those libcontainer mounts.
func TestHierarchies(t *testing.T) {
	skipUnlessV1(t)
	for name, options := range map[string][]string{
		"read-only": {"nosuid", "noexec", "nodev", "relatime", "ro"},
		"writable":  {"nosuid", "noexec", "nodev", "relatime", "rw"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			var views [2][]string
			for i := range views {
				id, p := m.start("exec sleep 1000", func(r *monitor.StartRequest) {
					at := slices.IndexFunc(r.Spec.Mounts, func(m specs.Mount) bool { return m.Type == "cgroup" })
					r.Spec.Mounts[at].Options = options
					if i == 1 { // with a hook, libcontainer does all
						r.Spec.Hooks = &specs.Hooks{Poststart: []specs.Hook{{Path: "/bin/true"}}}
					}
				})
				views[i] = cgroupView(t, m, id, p)
				if n := len(views[i]); n < 5 {
					t.Errorf("container has %d mounts of cgroups: %q", n, views[i])
				}
			}
			if !reflect.DeepEqual(views[0], views[1]) {
				t.Errorf("podmon's\n%s\nlibcontainer's\n%s", strings.Join(views[0], "\n"), strings.Join(views[1], "\n"))
			}
		})
	}
}

// The order of mounts holds: a volume on /sys hides the cgroups, also where it gets there by a
// link.
func TestHierarchiesBelowVolume(t *testing.T) {
	skipUnlessV1(t)
	m := newMachine(t)
	must(t, os.Symlink("sys", filepath.Join(m.rootfs, "link")))
	volume := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(volume, "fs/cgroup"), 0o755))
	for _, dest := range []string{"/sys", "/link", "/link/fs/cgroup"} {
		id, _ := m.start("exec sleep 1000", func(r *monitor.StartRequest) {
			r.Spec.Mounts = append(r.Spec.Mounts, volumeOf(volume, dest))
		})
		at := strings.Replace(dest, "/link", "/sys", 1)
		if got := m.execOutput(id, "ls", at); got != "fs\n" {
			t.Errorf("a volume at %s: %s holds %q", dest, at, got)
		}
	}
}
