package fault

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// counter is a shell script that writes numbers, a line each, some thousand a second,
// and ends with 33 at SIGTERM. Its output goes on to where to leads, such as ">&2".
func counter(to string) string { return counting(to, 200, 20*time.Millisecond) }

// idler is one that writes a few lines a second, for many containers at once: each
// time costs two processes.
var idler = counting("", 20, time.Second)

func counting(to string, lines int, pause time.Duration) string {
	return fmt.Sprintf("trap 'exit 33' TERM; i=0; while :; do seq $i $((i+%d)) %s; i=$((i+%d)); usleep %d; done",
		lines-1, to, lines, pause.Microseconds())
}

// numbers is what a log holds of a stream of lines that begin with consecutive numbers.
type numbers struct {
	next  int           // how many lines there were: the number that the next one should have
	cycle int           // if set, the line after this many has number 0 again
	bytes int           // of the log
	stall time.Duration // the longest time between two records
	last  time.Time
	notes []string // records in podmon's own name
	// gap, if set, is told how many lines are missing where some are.
	gap func(missing int)
}

// read checks one log file; its lines follow those of the files before. Only whole
// records are wanted: a file that is being written ends with one.
func (n *numbers) read(path, stream string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 64<<10)
	middle := false // of a line that several records hold
	for {
		record, err := r.ReadSlice('\n')
		if len(record) == 0 {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: torn record %.80q: %w", path, record, err)
		}
		n.bytes += len(record)
		parts := bytes.SplitN(record, []byte(" "), 4)
		if len(parts) != 4 || len(parts[2]) != 1 {
			return fmt.Errorf("%s: not a record: %.80q", path, record)
		}
		at, err := time.Parse(time.RFC3339Nano, string(parts[0]))
		if err != nil {
			return fmt.Errorf("%s: %.80q: %w", path, record, err)
		}
		if bytes.HasPrefix(parts[3], []byte("[podmon: ")) {
			n.notes = append(n.notes, string(parts[3]))
			continue
		}
		if string(parts[1]) != stream {
			continue
		}
		if !n.last.IsZero() {
			n.stall = max(n.stall, at.Sub(n.last))
		}
		n.last = at
		if !middle {
			if err := n.line(parts[3]); err != nil {
				return fmt.Errorf("%s at %v: %w", path, at, err)
			}
		}
		middle = parts[2][0] == 'P'
	}
}

var errOutOfOrder = errors.New("a line is missing, twice there or torn")

func (n *numbers) line(text []byte) error {
	var got int
	_, err := fmt.Sscan(string(text[:min(len(text), 20)]), &got)
	if err == nil && got > n.next && n.gap != nil {
		n.gap(got - n.next)
		n.next = got
	}
	want := n.next
	if n.cycle > 0 {
		want %= n.cycle
	}
	if err != nil || got != want {
		return fmt.Errorf("%.40q, want %d: %w", text, want, errOutOfOrder)
	}
	n.next++
	return nil
}

// counted checks that a log's numbers are all there, once and in order, and returns
// how many there are.
func counted(t *testing.T, path, stream string) *numbers {
	t.Helper()
	n := &numbers{}
	if err := n.read(path, stream); err != nil {
		t.Error(err)
	}
	return n
}

// figures is what a run has shown, for docs/reliability.md, and how many processes of
// the machine wanted to run in the minute before.
func figures(t *testing.T, format string, args ...any) {
	t.Helper()
	load, _ := os.ReadFile("/proc/loadavg")
	minute, _, _ := strings.Cut(string(load), " ")
	t.Logf("figures: %s (load %s)", strings.TrimSpace(fmt.Sprintf(format, args...)), minute)
}
