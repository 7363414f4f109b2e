package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/podshim/podshim/internal/cni"
	"github.com/podshim/podshim/internal/spec"
)

// makeNamespaces pins the namespaces that must be there before the infra
// container: the network's, which CNI sets up meanwhile, and the user namespace
// that owns it. The others are infra's own.
func (m *Manager) makeNamespaces(r *Record) error {
	uids, gids := spec.IDMappings(r.Config)
	switch {
	case r.User != "":
		return cni.NewUserNetns(r.User, r.Netns, uids, gids)
	case r.Netns != "":
		return cni.NewNetns(r.Netns)
	default:
		return nil
	}
}

// removePins unpins what makeNamespaces has pinned; the gone is success.
func removePins(r *Record) error {
	for _, path := range []string{r.Netns, r.User} {
		if path == "" {
			continue
		}
		if err := cni.Remove(path); err != nil {
			return fmt.Errorf("remove namespace: %w", err)
		}
	}
	return nil
}

// userPin is where a pod's user namespace is pinned until infra is in it, which
// then holds it: beside the network namespace that it owns.
func (m *Manager) userPin(id string) string { return m.netnsPin(id) + "-user" }

// netnsPin is where a pod's network namespace is pinned. Only the first 16 digits
// of the ID are used, so that `ip netns` stays readable.
func (m *Manager) netnsPin(id string) string {
	return filepath.Join(m.NetnsDir, "podshim-"+id[:16])
}

// pin is the name of a pod's pins.
var pin = regexp.MustCompile("^podshim-[0-9a-f]{16}(-user)?$")

// OrphanPins returns the namespaces pinned before the given time under a pod's name
// that no sandbox has on record.
func (m *Manager) OrphanPins(before time.Time) ([]string, error) {
	// Listed before the records are looked at, which are there before their pins.
	pins, err := cni.List(m.NetnsDir, "podshim-")
	if err != nil {
		return nil, err
	}
	known := m.all.Unreadable()
	for _, s := range m.all.All() {
		known = append(known, s.Get().ID)
	}
	return slices.DeleteFunc(pins, func(path string) bool {
		st, err := os.Lstat(path)
		return !pin.MatchString(filepath.Base(path)) || m.PinnedBy(path, known) || err != nil || st.ModTime().After(before)
	}), nil
}

// PinnedBy tells whether a pin is that of one of these sandboxes.
func (m *Manager) PinnedBy(path string, ids []string) bool {
	return slices.ContainsFunc(ids, func(id string) bool {
		return len(id) >= 16 && (path == m.netnsPin(id) || path == m.userPin(id))
	})
}
