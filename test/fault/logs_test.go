package fault

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/podshim/podshim/test/harness"
)

// lineLength is that of the flood's lines, about.
const lineLength = 8000

// numbered writes numbered lines until there is a file /tmp/end.
const numbered = `awk 'BEGIN {
	x = sprintf("%07990d", 0)
	do for (i = 0; i < 100; i++) print n++ " " x
	while ((getline line < "/tmp/end") < 0)
	print n > "/tmp/lines"
}'
while [ ! -e /tmp/leave ]; do usleep 10000; done`

// flooder is a container that writes 100 MB of lines, numbered from 0 to floodLines, again
// and again until there is a file /tmp/end, and hardly needs the processor for it: cat
// puts the file's own pages into the pipe (sendfile(2)).
func flooder(t *testing.T, p *harness.Pod) *harness.Container {
	t.Helper()
	volume := t.TempDir()
	var lines bytes.Buffer
	for i := range floodLines {
		fmt.Fprintf(&lines, "%d %0*d\n", i, lineLength, 0)
	}
	if err := os.WriteFile(filepath.Join(volume, "lines"), lines.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return p.Shell(fmt.Sprintf(`n=0
while [ ! -e /tmp/end ]; do cat /volume/lines; n=$((n+%d)); done
echo $n > /tmp/lines
while [ ! -e /tmp/leave ]; do usleep 10000; done`, floodLines), func(c *cri.ContainerConfig) {
		c.Mounts = []*cri.Mount{{HostPath: volume, ContainerPath: "/volume", Readonly: true}}
	})
}

const floodLines = 12500

// endFlood ends the writing, and returns how many lines were written. The container
// is told to leave by leave.
func endFlood(t *testing.T, c *harness.Container) (lines int) {
	t.Helper()
	c.Output("touch", "/tmp/end")
	asked(t, "the flood ends", func() bool {
		out, _, code := c.Exec("cat", "/tmp/lines")
		_, err := fmt.Sscan(out, &lines)
		return code == 0 && err == nil
	})
	return lines
}

func leave(c *harness.Container) *cri.ContainerStatus {
	c.Touch("/tmp/leave")
	return c.WaitExit()
}

// rotate does what kubelet does to a log that has become large, and returns the file
// that nothing is written to any more.
func rotate(n *harness.Node, c *harness.Container, number int) (string, error) {
	old := fmt.Sprintf("%s.%06d", c.LogPath(), number)
	if err := os.Rename(c.LogPath(), old); err != nil {
		return "", err
	}
	_, err := n.Runtime.ReopenContainerLog(n.Context(), &cri.ReopenContainerLogRequest{ContainerId: c.ID})
	return old, err
}

// One container writes as much as it can, and its log is rotated all the while. No
// line is lost or twice there, and other pods and calls go on.
func TestLogFlood(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	var others []*harness.Container
	for range 3 {
		c := n.RunPod().Shell(counter(""))
		c.WaitLog(" 1\n")
		others = append(others, c)
	}
	latencies := func(until <-chan struct{}) (looks, execs, pods []time.Duration) {
		for {
			select {
			case <-until:
				return looks, execs, pods
			default:
			}
			looks = append(looks, look(t, n, others)...)
			began := time.Now()
			others[0].Output("true")
			execs = append(execs, time.Since(began))
			began = time.Now()
			p := n.RunPod()
			p.Shell("exit 0").WaitExit()
			if err := p.StopAndRemove(); err != nil {
				t.Errorf("remove a pod: %v", err)
			}
			pods = append(pods, time.Since(began))
		}
	}
	calm := make(chan struct{})
	length := time.Duration(times(30, 4)) * time.Second
	time.AfterFunc(length/3, func() { close(calm) })
	looksBefore, execsBefore, podsBefore := latencies(calm)

	c := flooder(t, n.RunPod())
	got := numbers{cycle: floodLines}
	over := make(chan struct{})
	var rotations int
	var rotating sync.WaitGroup
	began := time.Now()
	rotating.Go(func() {
		defer close(over)
		for time.Since(began) < length {
			time.Sleep(300 * time.Millisecond)
			rotations++
			old, err := rotate(n, c, rotations)
			if err == nil {
				err = got.read(old, "stdout")
			}
			if err != nil {
				t.Errorf("rotation %d: %v", rotations, err)
				return
			}
			if err := os.Remove(old); err != nil {
				t.Errorf("remove rotated log: %v", err)
			}
		}
	})
	looks, execs, pods := latencies(over)
	rotating.Wait()
	took := time.Since(began)
	lines := endFlood(t, c)
	if s := leave(c); s.ExitCode != 0 {
		t.Errorf("the flood ended with %d", s.ExitCode)
	}
	if err := got.read(c.LogPath(), "stdout"); err != nil || got.next != lines {
		t.Errorf("%d lines of %d: %v", got.next, lines, err)
	}
	if len(got.notes) > 0 {
		t.Errorf("notes in the log: %q", got.notes)
	}
	stall := time.Duration(0)
	for _, c := range others {
		c.Stop(30 * time.Second)
		stall = max(stall, counted(t, c.LogPath(), "stdout").stall)
	}
	if most := max(stall, worst(looks)); most > promised(5*time.Second) {
		t.Errorf("another pod's log or a look stood still for %v", most)
	}
	figures(t, "%d lines, %.0f MB/s, %d rotations, none lost or twice; longest time between two records of another log %v",
		got.next, float64(got.bytes)/1e6/took.Seconds(), rotations, stall.Round(time.Millisecond))
	figures(t, "median before, and at most and median during the flood: look %v, %v, %v; exec %v, %v, %v; a pod up, ended and removed %v, %v, %v",
		median(looksBefore), worst(looks), median(looks), median(execsBefore), worst(execs), median(execs), median(podsBefore), worst(pods), median(pods))
}

// A full disk stops no container: what cannot be written is counted, and the log says
// how much is missing, at the place where it is.
func TestLogOnFullDisk(t *testing.T) {
	harness.NeedRoot(t)
	n := start(t, harness.Options{})
	config := n.PodConfig()
	if err := unix.Mount("tmpfs", config.LogDirectory, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(config.LogDirectory, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	p := n.RunConfig(config, "")
	c := p.Shell(numbered)
	var got numbers
	gaps, bytes := 0, 0
	makeRoom := func(i int) {
		old, err := rotate(n, c, i)
		if err != nil {
			t.Fatal(err)
		}
		lines, missing := readGaps(t, &got, old)
		gaps, bytes = gaps+lines, bytes+missing
		if err := os.Remove(old); err != nil {
			t.Fatal(err)
		}
	}
	rounds := times(20, 3)
	for i := range rounds {
		asked(t, "the disk is full", func() bool {
			var st unix.Statfs_t
			return unix.Statfs(config.LogDirectory, &st) == nil && st.Bfree < 16
		})
		before := written(c)
		asked(t, "the container writes on", func() bool { return written(c) > before+1<<20 })
		makeRoom(i)
	}
	lines := endFlood(t, c)
	makeRoom(rounds) // for the last note
	leave(c)
	more, missing := readGaps(t, &got, c.LogPath())
	gaps, bytes = gaps+more+lines-got.next, bytes+missing
	// A record is a line with its number, the time and the stream before it.
	if gaps == 0 || bytes < gaps*lineLength || bytes > gaps*(lineLength+60) {
		t.Errorf("%d lines are missing, and the log speaks of %d bytes", gaps, bytes)
	}
	if err := p.StopAndRemove(); err != nil {
		t.Error(err)
	}
	figures(t, "%d lines; %d could not be written, and the log says so: %d bytes in %d places", lines, gaps, bytes, len(got.notes))
}

// written is how much the container's processes have written until now.
func written(c *harness.Container) (sum int) {
	for _, p := range c.Processes() {
		for line := range strings.Lines(p.Read("io")) {
			var n int
			fmt.Sscanf(line, "wchar: %d", &n)
			sum += n
		}
	}
	return sum
}

var lostNote = regexp.MustCompile(`^\[podmon: (\d+) bytes of log records were lost here: `)

// readGaps reads a log in which lines are missing. It returns how many are, and how
// many bytes the log itself says are missing.
func readGaps(t *testing.T, n *numbers, path string) (lines, bytes int) {
	t.Helper()
	notes := len(n.notes)
	n.gap = func(missing int) { lines += missing }
	if err := n.read(path, "stdout"); err != nil {
		t.Error(err)
	}
	for _, note := range n.notes[notes:] {
		m := lostNote.FindStringSubmatch(note)
		if m == nil {
			t.Errorf("note %q", note)
			continue
		}
		b, _ := strconv.Atoi(m[1])
		bytes += b
	}
	return lines, bytes
}
