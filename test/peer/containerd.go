package peer

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/podshim/podshim/test/private"
)

// StartContainerd runs the containerd of a directory that holds its shim and runc
// as well. More is TOML put behind the configuration, env is added to its environment.
func StartContainerd(ctx context.Context, dir string, place *private.Place, c private.Config, more string, env ...string) (*Daemon, error) {
	config := fmt.Sprintf(`version = 3
root = %q
state = %q
[grpc]
  address = %q
[ttrpc]
  address = %q
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [%q]
    conf_dir = %q
[plugins."io.containerd.cri.v1.images"]
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "registry.k8s.io/pause:3.9"
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = %q
`, place.Path("root"), place.Path("state"), place.Socket(), place.Path("run", "ttrpc.sock"),
		c.Plugins, place.Path("cni"), place.Certs())
	err := prepare(place, c)
	if err == nil {
		err = os.WriteFile(place.Path("containerd.toml"), []byte(config+more), 0o644)
	}
	if err != nil {
		return nil, fmt.Errorf("configure containerd: %w", err)
	}
	cmd := exec.Command(filepath.Join(dir, "containerd"), "--config", place.Path("containerd.toml"))
	cmd.Env = append(append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH")), env...)
	cmd.Stdout, cmd.Stderr = c.Log, c.Log
	return start(ctx, place, cmd)
}
