package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// namespaceKinds in the order of the table; the first ones are the pod's.
var namespaceKinds = []string{"net", "ipc", "uts", "user", "mnt", "pid"}

// namespaces prints the table and checks what makes containers a pod: one
// network, IPC, UTS and user namespace, but root filesystems and processes of
// their own.
func (d *demo) namespaces(pod, web, sidecar string) error {
	rows := []struct{ name, id string }{{"infra", pod}, {"web", web}, {"sidecar", sidecar}}
	table := [][]string{append([]string{"CONTAINER", "PID", "PROGRAM"}, upper(namespaceKinds)...)}
	seen := map[string][]string{}
	for _, row := range rows {
		pid, err := firstProcess(row.id)
		if err != nil {
			return fmt.Errorf("find process of %s: %w", row.name, err)
		}
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil {
			return err
		}
		line := []string{row.name, strconv.Itoa(pid), strings.TrimSpace(string(comm))}
		for _, kind := range namespaceKinds {
			link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
			if err != nil {
				return err
			}
			inode := strings.Trim(strings.TrimPrefix(link, kind+":"), "[]")
			seen[kind] = append(seen[kind], inode)
			line = append(line, inode)
		}
		table = append(table, line)
	}
	verdict := []string{"", "", ""}
	for _, kind := range namespaceKinds {
		one := len(slices.Compact(slices.Sorted(slices.Values(seen[kind])))) == 1
		if want := kind != "mnt" && kind != "pid"; one != want {
			return fmt.Errorf("%s namespaces of the pod's containers: %v, want them shared: %v", kind, seen[kind], want)
		}
		if one {
			verdict = append(verdict, "shared")
		} else {
			verdict = append(verdict, "own")
		}
	}
	d.screen.table(append(table, verdict))
	return nil
}

func upper(words []string) []string {
	var all []string
	for _, word := range words {
		all = append(all, strings.ToUpper(word))
	}
	return all
}

// firstProcess is the lowest pid in the cgroup that is named for the container:
// its PID 1. The runtime is not asked.
func firstProcess(id string) (int, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return 0, err
	}
	first := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue // gone meanwhile
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(text)) {
			if strings.Contains(filepath.Base(strings.TrimSpace(line)), id) && (first == 0 || pid < first) {
				first = pid
			}
		}
	}
	if first == 0 {
		return 0, fmt.Errorf("no process in a cgroup named for %s", id)
	}
	return first, nil
}
