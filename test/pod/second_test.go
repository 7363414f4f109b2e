package pod

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/podshim/podshim/test/harness"
)

// A second podshim on the same run directory, however it came about, must leave
// the first one's socket alone.
func TestSecondDaemonIsRefused(t *testing.T) {
	harness.NeedRoot(t)
	t.Parallel()
	n := harness.Start(t, harness.Options{})
	exe, err := os.Readlink(filepath.Join("/proc", strings.TrimSpace(readAll(t, filepath.Join(n.RunDir, "lock"))), "exe"))
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(exe, "--run", n.RunDir, "--root", t.TempDir(), "--socket", n.Socket).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another podshim") {
		t.Errorf("a second podshim: %v\n%s", err, out)
	}
	p := n.RunPod() // the first one still answers
	p.Shell("echo ready").WaitExit()
}

func readAll(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}
