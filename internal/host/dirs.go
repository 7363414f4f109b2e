package host

import (
	"fmt"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// PrivateDir makes a directory that nobody but root gets through: what lies below
// may hold setuid programs and secrets of a container, and must not be had from
// the host by others (CVE-2021-41103). The group of a user namespace's root
// (gids, nil without one) gets through as well, since that root has to.
func PrivateDir(path string, gids []specs.LinuxIDMapping) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	for _, id := range gids {
		if id.ContainerID != 0 {
			continue
		}
		if err := os.Chown(path, 0, int(id.HostID)); err != nil {
			return err
		}
		if err := os.Chmod(path, 0o710); err != nil {
			return fmt.Errorf("open %s to the user namespace: %w", path, err)
		}
	}
	return nil
}
