package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/podshim/podshim/test/machine"
)

// hierarchies are the mount points of the cgroup hierarchies. They are looked up once: a
// node with hundreds of pods has thousands of mounts, and the bench is not what is measured.
var hierarchies = sync.OnceValues(machine.CgroupRoots)

// enterCgroup moves this process into a child of the named cgroup, in every
// hierarchy, until leave is called. What it starts meanwhile stays there, with all
// that starts in turn: by that the CPU time of a runtime is counted.
func enterCgroup(name string) (leave func() error, err error) {
	roots, err := hierarchies()
	if err != nil {
		return nil, err
	}
	move := func(path string) error {
		return os.WriteFile(filepath.Join(path, "cgroup.procs"), []byte("0"), 0)
	}
	var left []string
	for _, root := range roots {
		dir := filepath.Join(root, name, "runtime")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
		if strings.HasSuffix(root, "/cpuset") {
			continue // takes no process before its CPUs are set, and counts nothing
		}
		if err := move(dir); err != nil {
			return nil, fmt.Errorf("enter cgroup: %w", err)
		}
		left = append(left, root)
	}
	return func() error {
		var errs []error
		for _, root := range left {
			errs = append(errs, move(root))
		}
		return errors.Join(errs...)
	}, nil
}

// podCgroup makes a pod's cgroup, as kubelet does before it asks for the pod.
func podCgroup(name string) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		if strings.HasSuffix(root, "/unified") {
			continue // the runtime makes it
		}
		dir := filepath.Join(root, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make the pod's cgroup: %w", err)
		}
		if strings.HasSuffix(root, "/cpuset") {
			if err := copyCpuset(root, dir); err != nil {
				return fmt.Errorf("make the pod's cgroup: %w", err)
			}
		}
	}
	return nil
}

// copyCpuset gives a cpuset, and those between, the CPUs and memory nodes of the topmost.
func copyCpuset(root, dir string) error {
	if dir == root {
		return nil
	}
	if err := copyCpuset(root, filepath.Dir(dir)); err != nil {
		return err
	}
	for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
		has, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return err
		}
		if len(strings.TrimSpace(string(has))) > 0 {
			continue
		}
		all, err := os.ReadFile(filepath.Join(root, file))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, file), all, 0)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// removeCgroup removes a pod's cgroup, once the pod is gone. What the runtime has
// left in it goes with the run.
func removeCgroup(name string) {
	roots, _ := hierarchies()
	for _, root := range roots {
		_ = os.Remove(filepath.Join(root, name))
	}
}

// cpu is the CPU time spent in the named cgroup and those below it so far.
func cpu(name string) (time.Duration, error) {
	roots, err := hierarchies()
	if err != nil {
		return 0, err
	}
	for _, root := range roots {
		if text, err := os.ReadFile(filepath.Join(root, name, "cpuacct.usage")); err == nil {
			ns, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
			return time.Duration(ns), err
		}
		text, err := os.ReadFile(filepath.Join(root, name, "cpu.stat"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			if value, ok := strings.CutPrefix(line, "usage_usec "); ok {
				us, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
				return time.Duration(us) * time.Microsecond, err
			}
		}
	}
	return 0, fmt.Errorf("no cgroup %s counts CPU time", name)
}
