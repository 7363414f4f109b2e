package container

import (
	"path/filepath"
	"strings"
	"sync"

	"github.com/opencontainers/cgroups"
)

const cgroupRoot = "/sys/fs/cgroup"

// within tells whether a clean path is dir or below it.
func within(p, dir string) bool { return p == dir || strings.HasPrefix(p, dir+"/") }

// hierarchies are the node's of cgroup v1, as libcontainer finds them, in its mount table, which
// has some lines for every pod; none where they are not where they are expected. They are looked
// for once: a hierarchy that is mounted later has no cgroup of podmon's making.
var hierarchies = sync.OnceValue(func() (found []hierarchy) {
	all, err := cgroups.GetCgroupMounts(false)
	if err != nil {
		return nil
	}
	for _, h := range all {
		if filepath.Dir(h.Mountpoint) != cgroupRoot {
			return nil
		}
		found = append(found, hierarchy{h})
	}
	return found
})

// hierarchy is one of them, as it is mounted on the node.
type hierarchy struct{ cgroups.Mount }

// directory is the container's cgroup in the hierarchy.
func (h hierarchy) directory(paths, own map[string]string) (string, error) {
	for _, subsystem := range h.Subsystems { // a named one has lost its prefix
		for _, key := range []string{subsystem, cgroups.CgroupNamePrefix + subsystem} {
			if dir, ok := paths[key]; ok {
				return dir, nil
			}
		}
	}
	dir, err := h.GetOwnCgroup(own)
	if err != nil {
		return "", err
	}
	rel, err := filepath.Rel(h.Root, dir)
	if err != nil {
		return "", err
	}
	return filepath.Join(h.Mountpoint, rel), nil
}
