package sandbox

import (
	"fmt"
	"path/filepath"
	"strings"

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

// PinPrefix begins the names of pods' pins, and userPinSuffix ends those of user
// namespaces.
const (
	PinPrefix     = "podshim-"
	userPinSuffix = "-user"
)

// PinnedFor is the beginning of the ID of the sandbox that a pin is named for; ""
// for what is no pod's.
func PinnedFor(path string) string {
	name := strings.TrimSuffix(filepath.Base(path), userPinSuffix)
	id, ok := strings.CutPrefix(name, PinPrefix)
	if !ok || len(id) != 16 || strings.Trim(id, "0123456789abcdef") != "" {
		return ""
	}
	return id
}

// userPin is where a pod's user namespace is pinned until infra is in it, which
// then holds it: beside the network namespace that it owns.
func (m *Manager) userPin(id string) string { return m.netnsPin(id) + userPinSuffix }

// netnsPin is where a pod's network namespace is pinned. Only the first 16 digits
// of the ID are used, so that `ip netns` stays readable.
func (m *Manager) netnsPin(id string) string {
	return filepath.Join(m.NetnsDir, PinPrefix+id[:16])
}
