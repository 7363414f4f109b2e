package harness

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// LogLine is one entry of a container's log in CRI format:
//
//	2026-11-21T02:43:20.000000001Z stdout F the line
type LogLine struct {
	Time time.Time
	// Stream is stdout or stderr; Partial is set for tag P, when the line goes on.
	Stream  string
	Partial bool
	Text    string
}

// LogPath is where the container's log is on this machine.
func (c *Container) LogPath() string {
	return filepath.Join(c.Pod.Config.LogDirectory, c.Config.LogPath)
}

// Log reads the container's log; a line that is not in CRI format ends the test.
func (c *Container) Log() []LogLine {
	c.n.t.Helper()
	data, err := os.ReadFile(c.LogPath())
	if err != nil {
		c.n.t.Fatalf("read log: %v", err)
	}
	lines, err := ParseLog(string(data))
	if err != nil {
		c.n.t.Fatalf("log of %s: %v", c.Config.Metadata.Name, err)
	}
	return lines
}

// LogText is what the container wrote to a stream, put together from its log.
func (c *Container) LogText(stream string) string {
	c.n.t.Helper()
	return JoinLog(c.Log(), stream)
}

// ParseLog reads whole lines; an unfinished one at the end is left out.
func ParseLog(text string) ([]LogLine, error) {
	var lines []LogLine
	for raw := range strings.Lines(text) {
		if !strings.HasSuffix(raw, "\n") {
			break
		}
		fields := strings.SplitN(strings.TrimSuffix(raw, "\n"), " ", 4)
		if len(fields) != 4 {
			return nil, fmt.Errorf("not a CRI log line: %q", raw)
		}
		at, err := time.Parse(time.RFC3339Nano, fields[0])
		if err != nil {
			return nil, fmt.Errorf("log line %.80q: %w", raw, err)
		}
		if fields[1] != "stdout" && fields[1] != "stderr" {
			return nil, fmt.Errorf("log line %.80q: no such stream", raw)
		}
		if fields[2] != "F" && fields[2] != "P" {
			return nil, fmt.Errorf("log line %.80q: no such tag", raw)
		}
		lines = append(lines, LogLine{at, fields[1], fields[2] == "P", fields[3]})
	}
	return lines, nil
}

// JoinLog puts a stream's output together again.
func JoinLog(lines []LogLine, stream string) string {
	var b strings.Builder
	for _, l := range lines {
		if l.Stream != stream {
			continue
		}
		b.WriteString(l.Text)
		if !l.Partial {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// WaitLog returns when a line of the container's log contains the text.
func (c *Container) WaitLog(text string) {
	c.n.t.Helper()
	if err := WaitFile(c.LogPath(), func(content string) bool { return strings.Contains(content, text) }); err != nil {
		data, _ := os.ReadFile(c.LogPath())
		c.n.t.Fatalf("wait for %q in the log of %s: %v\nthe log:\n%s", text, c.Config.Metadata.Name, err, data)
	}
}

// WaitFile returns when a file's content is as wanted; its directory must exist.
func WaitFile(path string, wanted func(content string) bool) error {
	return waitDir(filepath.Dir(path), func() bool {
		data, err := os.ReadFile(path)
		return err == nil && wanted(string(data))
	}, Limit)
}

// WaitNoFile returns when nothing is at path any more.
func WaitNoFile(path string) error {
	return waitDir(filepath.Dir(path), func() bool {
		_, err := os.Lstat(path)
		return errors.Is(err, os.ErrNotExist)
	}, Limit)
}

// waitDir returns when done answers true; it asks whenever inotify tells of a
// change in the directory.
func waitDir(dir string, done func() bool, limit time.Duration) error {
	watch, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watch.Close()
	if err := watch.Add(dir); err != nil {
		return err
	}
	end := time.After(limit)
	for !done() {
		select {
		case <-watch.Events:
		case err := <-watch.Errors:
			return err
		case <-end:
			return fmt.Errorf("not within %v", limit)
		}
	}
	return nil
}
