package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// pss is the memory of a runtime's own processes, bytes: of all processes in its
// cgroup that live in this mount namespace, as its daemon, monitors and shims do
// and no container does. What several share counts in equal parts.
func (s *subject) pss() (int64, error) {
	ours, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return 0, err
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	var sum int64
	for _, dir := range dirs {
		groups, err := os.ReadFile(filepath.Join(dir, "cgroup"))
		if err != nil || !strings.Contains(string(groups), ":"+s.cgroup+"/") {
			continue // gone meanwhile, or another's
		}
		if theirs, err := os.Readlink(filepath.Join(dir, "ns", "mnt")); err != nil || theirs != ours {
			continue
		}
		kb, err := pssOf(dir)
		if err != nil {
			return 0, err
		}
		sum += kb << 10
	}
	if sum == 0 {
		return 0, fmt.Errorf("no process of %s in cgroup %s", s.name, s.cgroup)
	}
	return sum, nil
}

// pssOf reads a process's proportional set size, kB; 0 when it has ended.
func pssOf(dir string) (int64, error) {
	text, err := os.ReadFile(filepath.Join(dir, "smaps_rollup"))
	if err != nil {
		return 0, nil
	}
	lines := bufio.NewScanner(bytes.NewReader(text))
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) == 3 && fields[0] == "Pss:" {
			return strconv.ParseInt(fields[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("%s/smaps_rollup has no Pss", dir)
}
