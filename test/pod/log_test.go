package pod

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// Both streams are in the log, in CRI format, in order and in time's order.
func TestLog(t *testing.T) {
	_, p := start(t)
	c := p.Shell("echo one; echo two >&2; echo; printf 'no end'")
	c.WaitExit()
	lines := c.Log()
	if got := c.LogText("stderr"); got != "two\n" {
		t.Errorf("stderr is %q", got)
	}
	var out []string
	for i, l := range lines {
		if i > 0 && l.Time.Before(lines[i-1].Time) {
			t.Errorf("line %d is earlier than the one before", i)
		}
		if l.Stream == "stdout" {
			out = append(out, l.Text)
		}
	}
	if strings.Join(out, "|") != "one||no end" {
		t.Errorf("stdout lines are %q", out)
	}
	if info, err := os.Stat(c.LogPath()); err != nil || info.Mode().Perm()&0o007 != 0 {
		t.Errorf("log's mode is %v, %v; want nothing for others", info.Mode(), err)
	}
}

// A long line is cut into partial ones of 16 KiB, none longer, nothing lost.
func TestLongLine(t *testing.T) {
	_, p := start(t)
	const length = 100000
	c := p.Shell(fmt.Sprintf("head -c %d /dev/zero | tr '\\0' x; echo; echo short", length))
	c.WaitExit()
	var pieces, total int
	for _, l := range c.Log() {
		if len(l.Text) > 16<<10 {
			t.Errorf("a piece has %d bytes", len(l.Text))
		}
		if strings.HasPrefix(l.Text, "x") {
			pieces++
			total += len(l.Text)
			if last := total == length; l.Partial == last {
				t.Errorf("piece %d (%d of %d bytes) is partial: %v", pieces, total, length, l.Partial)
			}
		}
	}
	if total != length {
		t.Errorf("%d of %d bytes in %d pieces", total, length, pieces)
	}
	if got := c.LogText("stdout"); !strings.HasSuffix(got, "x\nshort\n") {
		t.Error("the line after the long one is not its own")
	}
}

// Rotation loses nothing: what is written while the log is moved and opened anew
// is in one of the two files.
func TestReopenLosesNothing(t *testing.T) {
	n, p := start(t)
	// It writes as fast as it can, until all the rotations are done.
	c := p.Shell("i=0; until test -e /done; do echo line $i; i=$((i+1)); done; echo all $i")
	c.WaitLog("line 500\n")
	var old []string
	for i := range 5 {
		moved := c.LogPath() + "." + strconv.Itoa(i)
		if err := os.Rename(c.LogPath(), moved); err != nil {
			t.Fatal(err)
		}
		old = append(old, moved)
		if _, err := n.Runtime.ReopenContainerLog(n.Context(), &cri.ReopenContainerLogRequest{ContainerId: c.ID}); err != nil {
			t.Fatalf("reopen: %v", err)
		}
		if _, err := os.Stat(c.LogPath()); err != nil {
			t.Fatalf("no new log after the reopening: %v", err)
		}
	}
	c.Touch("/done")
	c.WaitExit()
	var all strings.Builder
	for _, file := range append(old, c.LogPath()) {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		lines, err := harness.ParseLog(string(data))
		if err != nil {
			t.Fatal(err)
		}
		all.WriteString(harness.JoinLog(lines, "stdout"))
	}
	next := 0
	for line := range strings.Lines(all.String()) {
		if line != fmt.Sprintf("line %d\n", next) {
			if line != fmt.Sprintf("all %d\n", next) {
				t.Fatalf("after line %d comes %q", next-1, line)
			}
			next = -1 // nothing may come after it
			continue
		}
		next++
	}
	if next != -1 {
		t.Errorf("the logs end after line %d", next-1)
	}
}

// A log path that leads out of the pod's log directory writes nothing there.
func TestLogDoesNotEscape(t *testing.T) {
	n := harness.Shared(t)
	t.Parallel()
	cases := map[string]struct {
		path  string
		plant func(t *testing.T, logs, outside string)
	}{
		"dots": {"../../outside-%s/log", func(*testing.T, string, string) {}},
		"link to a file": {"link.log", func(t *testing.T, logs, outside string) {
			symlink(t, filepath.Join(outside, "log"), filepath.Join(logs, "link.log"))
		}},
		"link to a directory": {"dir/log", func(t *testing.T, logs, outside string) {
			symlink(t, outside, filepath.Join(logs, "dir"))
		}},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			n := n.With(t)
			p := n.RunPod()
			outside := filepath.Join(n.Dir, "outside-"+p.ID[:12])
			if err := os.Mkdir(outside, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(outside+"/log", []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
			tc.plant(t, p.Config.LogDirectory, outside)
			conf := p.ContainerConfig([]string{"sh", "-c", "echo escaped"})
			conf.LogPath = strings.ReplaceAll(tc.path, "%s", p.ID[:12])
			created, err := n.Runtime.CreateContainer(n.Context(), &cri.CreateContainerRequest{PodSandboxId: p.ID, Config: conf, SandboxConfig: p.Config})
			if err == nil {
				_, err = n.Runtime.StartContainer(n.Context(), &cri.StartContainerRequest{ContainerId: created.ContainerId})
			}
			if err == nil {
				t.Error("neither CreateContainer nor StartContainer refuses")
			}
			if data, _ := os.ReadFile(outside + "/log"); string(data) != "precious" {
				t.Errorf("the file outside now holds %q", data)
			}
			if files, _ := os.ReadDir(outside); len(files) != 1 {
				t.Errorf("files outside: %v", files)
			}
		})
	}
}

func symlink(t *testing.T, target, link string) {
	t.Helper()
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
}

// A flood of output never stalls the daemon and is complete in the log.
func TestLogFlood(t *testing.T) {
	_, p := start(t)
	const lines = 200000
	c := p.Shell(fmt.Sprintf("seq 1 %d", lines))
	c.WaitExit()
	out := c.LogText("stdout")
	if got := strings.Count(out, "\n"); got != lines || !strings.HasSuffix(out, "\n"+strconv.Itoa(lines)+"\n") {
		t.Errorf("%d of %d lines in the log", got, lines)
	}
}
