package container

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/podshim/podshim/internal/monitor/wire"
)

// A container whose terminal died with both its holders has no output any more, and
// its log is not kept open for that.
func TestAdoptionWithoutTerminalKeepsNoLog(t *testing.T) {
	root := t.TempDir()
	c := &Container{handles: handles{-1, -1, -1}, rec: record{LogRoot: root, LogPath: "log", Terminal: true}}
	if err := c.resumeOutput(new(wire.Message)); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "log")); err != nil {
		t.Fatal(err)
	}
	open, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range open {
		if file, _ := os.Readlink(fd); file == filepath.Join(root, "log") {
			t.Errorf("%s is the log", fd)
		}
	}
}
