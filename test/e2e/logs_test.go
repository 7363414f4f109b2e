package e2e

import (
	"compress/gzip"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/podshim/podshim/test/harness"
)

// kubelet rotates a log while its container writes: no line is lost, none comes twice.
func testLogRotation(t *testing.T, k *Kubelet) {
	p := k.Run("log-rotation")
	status := p.WaitReady()
	p.WaitLog("noisy", "written\n")
	dir := filepath.Join(k.Logs, "default_"+p.FullName()+"_"+status.Metadata.UID, "noisy")
	// kubelet compresses an older file under a temporary name, and then renames it.
	var text string
	var files []string
	if !k.ask(func() bool {
		var err error
		text, files, err = readRotated(dir)
		return err == nil && strings.HasSuffix(text, "written\n")
	}) {
		t.Fatalf("logs %v are not whole", files)
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		if want := fmt.Sprintf("line %d of what a busy program has to say\n", n); line != want && (n != 60001 || line != "written\n") {
			t.Fatalf("line %d of %v is %q", n, files, line)
		}
	}
	if n != 60001 {
		t.Errorf("%v hold %d lines, want 60001", files, n)
	}
	if len(files) < 3 {
		t.Errorf("the log is in %v, want it rotated", files)
	}
}

// readRotated joins what the files of a log hold, oldest first.
func readRotated(dir string) (text string, files []string, err error) {
	files, err = filepath.Glob(dir + "/0.log*")
	if err != nil {
		return "", nil, err
	}
	// 0.log is the newest, then come 0.log.TIME and 0.log.TIME.gz in the order of time.
	slices.Sort(files)
	if len(files) > 0 {
		files = append(files[1:], files[0])
	}
	for _, file := range files {
		if strings.HasSuffix(file, ".tmp") {
			return "", files, fmt.Errorf("%s is being compressed", file)
		}
		raw, err := readLog(file)
		if err != nil {
			return "", files, err
		}
		lines, err := harness.ParseLog(raw)
		if err != nil {
			return "", files, fmt.Errorf("%s: %w", file, err)
		}
		text += harness.JoinLog(lines, "stdout")
	}
	return text, files, nil
}

func readLog(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var in io.Reader = f
	if strings.HasSuffix(file, ".gz") {
		if in, err = gzip.NewReader(f); err != nil {
			return "", err
		}
	}
	data, err := io.ReadAll(in)
	return string(data), err
}

// A line of ten million bytes comes out of kubelet as it went in.
func testLongLine(t *testing.T, k *Kubelet) {
	p := k.Run("long-line")
	p.WaitReady()
	log := p.WaitLog("talker", "\nafter\n")
	lines := slices.Collect(strings.Lines(log))
	if len(lines) != 3 || lines[0] != "before\n" || len(lines[1]) != 10_000_001 || strings.Trim(lines[1], "x") != "\n" {
		sizes := make([]int, len(lines))
		for i, line := range lines {
			sizes[i] = len(line)
		}
		t.Errorf("lines have %v bytes, want 7, 10000001 and 6", sizes)
	}
}
